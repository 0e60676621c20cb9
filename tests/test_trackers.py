"""Callbacks and trackers, each read back with the library that it writes for."""

from __future__ import annotations

import csv
import json
import math
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_elbo_ext import Callback, CSVTracker, DecomposedELBO, MLflowTracker, TensorBoardTracker, WandbTracker
from pyro_elbo_ext.compile.binding import WholeOptimizer
from pyro_elbo_ext.training.callbacks import CallbackList
from pyro_elbo_ext.training.fit import fit
from pyro_elbo_ext.training.settings import describe_run

SETTINGS: dict[str, Any] = {
    "model": "eight_schools",
    "guide": "AutoNormal",
    "loss": "DecomposedELBO",
    "learning_rate": 0.02,
    "num_steps": None,
    "seed": 3,
    "compiled": True,
    "versions": {"torch": "2.13", "pyro": "1.9.2"},
}
SUMMARY: dict[str, Any] = {
    "status": "finished",
    "reason": "a | b",
    "converged": True,
    "steps": 10,
    "seconds": 1.5,
    "elbo": -math.pi,
}


def metrics(step: int) -> dict[str, float]:
    """Numbers that need all their digits; the held-out ELBO comes late and not each time."""
    found = {"elbo": -100 / 3 / step, "kl_weight": 1.0, "kl_prior/theta[0]": math.sqrt(step), "log_p/y": -1e-17 * step}
    return {**found, "validation_elbo": -math.e * step} if step in (5, 8) else found


def complete(make: Callable[[], Callback]) -> Callback:
    tracker = make()
    tracker.start(SETTINGS)
    for step in range(1, 11):
        tracker.log(step, metrics(step))
    tracker.finish(SUMMARY)
    return tracker


def killed_and_resumed(
    make: Callable[[], Callback], path: Path, checkpoint: int = 4, killed: int = 7, end: Callable[[Callback], Any] = id
) -> Callback:
    """Ten steps, of which a killed process took the first ones twice: a checkpoint is older than the last log."""
    tracker = make()
    tracker.start(SETTINGS)
    for step in range(1, killed):
        if step == checkpoint:
            torch.save(tracker.state_dict(), path)
        tracker.log(step, metrics(step))
    end(tracker)
    tracker = make()
    tracker.load_state_dict(torch.load(path, weights_only=True))
    tracker.start(SETTINGS)
    for step in range(checkpoint, 11):
        tracker.log(step, metrics(step))
    tracker.finish(SUMMARY)
    return tracker


# Callbacks


class Recorder(Callback):
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def start(self, settings: Mapping[str, Any]) -> None:
        self.calls.append(("start", dict(settings)))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.calls.append(("log", step, dict(metrics)))

    def finish(self, summary: Mapping[str, Any]) -> None:
        self.calls.append(("finish", dict(summary)))

    def state_dict(self) -> dict[str, Any]:
        return {"calls": len(self.calls)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = [None] * state["calls"]


def test_base_class_does_nothing() -> None:
    assert complete(Callback).state_dict() == {}


def test_list_calls_each_in_turn() -> None:
    one, two = Recorder(), Recorder()
    group = CallbackList([one, two])
    group.start(SETTINGS)
    group.log(5, {"elbo": -1.0})
    state = group.state_dict()
    group.finish(SUMMARY)
    assert one.calls == two.calls == [("start", SETTINGS), ("log", 5, {"elbo": -1.0}), ("finish", SUMMARY)]
    again = CallbackList([Recorder(), Recorder()])
    again.load_state_dict(state)
    assert [callback.calls for callback in again._callbacks] == [[None] * 2] * 2  # type: ignore[attr-defined]


def test_list_takes_only_callbacks(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"write \[Recorder\(\.\.\.\)\]"):
        CallbackList(Recorder())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="an instance of it, not the class"):
        CallbackList([Recorder])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="subclasses of Callback, got <built-in function print>"):
        CallbackList([print])  # type: ignore[list-item]


def test_resuming_with_other_callbacks_is_an_error(tmp_path: Path) -> None:
    state = CallbackList([Recorder()]).state_dict()
    with pytest.raises(ValueError, match=r"state of a Recorder, which is not among the callbacks \['CSVTracker'\]"):
        CallbackList([CSVTracker(tmp_path / "run.csv")]).load_state_dict(state)
    with pytest.raises(ValueError, match=r"not among the callbacks \[\]"):
        CallbackList([]).load_state_dict(state)


def test_stateless_callbacks_come_and_go() -> None:
    one, two = Recorder(), Recorder()
    one.start({})
    state = CallbackList([Callback(), one, two]).state_dict()
    again = [Recorder(), Broken("disk full"), Recorder(), Recorder()]
    CallbackList(again).load_state_dict(state)
    assert [len(callback.calls) for callback in again if isinstance(callback, Recorder)] == [1, 0, 0]


def test_a_callback_returns_nothing() -> None:
    class Talkative(Callback):
        def log(self, step: int, metrics: Mapping[str, float]) -> None:
            return True  # type: ignore[return-value]

    group = CallbackList([Talkative()])
    group.start({})
    with pytest.raises(TypeError, match=r"Talkative\.log returned True"):
        group.log(1, {})


def test_a_callback_cannot_change_what_the_next_one_sees() -> None:
    class Greedy(Callback):
        def log(self, step: int, metrics: Mapping[str, float]) -> None:
            metrics["elbo"] = 0.0  # type: ignore[index]

    with pytest.raises(TypeError, match="does not support item assignment"):
        CallbackList([Greedy()]).log(1, {"elbo": -1.0})


class Broken(Callback):
    def __init__(self, message: str) -> None:
        self.message = message

    def finish(self, summary: Mapping[str, Any]) -> None:
        raise OSError(self.message)


def test_all_are_finished_though_one_fails() -> None:
    last = Recorder()
    group = CallbackList([Broken("disk full"), Broken("no network"), last])
    group.start({})
    with pytest.raises(OSError, match="disk full") as raised:
        group.finish(SUMMARY)
    assert raised.value.__notes__ == ["Then Broken.finish failed: OSError: no network"]
    assert last.calls[-1] == ("finish", SUMMARY)
    group.finish(SUMMARY)  # once only
    assert len(last.calls) == 2


def test_failure_at_the_end_does_not_hide_what_ended_the_run() -> None:
    error = ValueError("site 'tau' is NaN")
    group = CallbackList([Broken("disk full")])
    group.start({})
    group.finish({}, error)
    assert error.__notes__ == ["Then Broken.finish failed: OSError: disk full"]


def test_only_the_started_are_finished() -> None:
    class NoStart(Callback):
        def start(self, settings: Mapping[str, Any]) -> None:
            raise ConnectionError("no server")

    late = Recorder()
    group = CallbackList([NoStart(), late])
    with pytest.raises(ConnectionError):
        group.start({})
    group.finish({})
    assert late.calls == []


# In a fit


def pair(x: torch.Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def fit_pair(*callbacks: Callback, **options: Any) -> None:
    fit(
        pair,
        AutoNormal(pair),
        torch.tensor([0.5, 1.5]),
        callbacks=callbacks,
        log_every=20,
        compiled=False,
        progress=False,
        seed=1,
        **{"optim": pyro.optim.Adam({"lr": 0.02, "betas": (0.9, 0.99)}), "num_steps": 50, **options},
    )


def test_fit_tells_its_callbacks() -> None:
    found = Recorder()
    fit_pair(found)
    (_, settings), (_, step, values), (_, later, _), (_, summary) = found.calls
    versions = settings.pop("versions")
    assert settings == {
        "model": "pair",
        "guide": "AutoNormal",
        "loss": "DecomposedELBO",
        "optimizer": "Adam",
        "learning_rate": 0.02,
        "optimizer_options": {"betas": (0.9, 0.99)},
        "scheduler": None,
        "stopping": None,
        "num_steps": 50,
        "max_steps": 50,
        "seed": 1,
        "compiled": False,
    }
    assert torch.__version__.startswith(versions["torch"])  # which may have "+cpu" after it
    assert (step, later) == (20, 40)
    sites = {"kl_prior/z", "log_p/z", "log_p/x"}
    terms = {"elbo", "objective", "reconstruction", "kl_prior", "kl_weight", "learning_rate", "steps_per_second"}
    assert values.keys() == sites | terms
    assert values["elbo"] == pytest.approx(values["log_p/x"] - values["kl_prior/z"])
    assert (summary["status"], summary["steps"], summary["converged"]) == ("finished", 50, None)
    assert "50 steps" in summary["reason"]


def test_automatic_fit_tells_its_callbacks(tmp_path: Path) -> None:
    found = Recorder()
    options: dict[str, Any] = {"callbacks": [CSVTracker(tmp_path / "run.csv"), found], "progress": False, "seed": 0}
    result = fit(pair, "auto", torch.tensor([0.5, 1.5]), **options)
    table = pd.read_csv(tmp_path / "run.csv")
    assert table["step"].tolist() == list(range(1, result.num_steps + 1))
    assert {"elbo", "gradients", "gain"} <= set(table.columns)
    assert (found.calls[0][1]["guide"], found.calls[0][1]["optimizer"]) == ("auto", None)
    assert found.calls[-1][1]["status"] == "finished"
    assert found.calls[-1][1]["elbo"] == result.elbo


def test_exception_in_a_callback_ends_the_run() -> None:
    class Full(Callback):
        def log(self, step: int, metrics: Mapping[str, float]) -> None:
            raise OSError("disk full")

    found = Recorder()
    with pytest.raises(OSError, match="disk full"):
        fit_pair(Full(), found)
    assert [call[0] for call in found.calls] == ["start", "finish"]
    assert (found.calls[-1][1]["status"], found.calls[-1][1]["steps"]) == ("failed", 20)
    assert found.calls[-1][1]["reason"] == "OSError: disk full"


def test_interrupt_finishes_the_callbacks() -> None:
    class Interrupt(Callback):
        def log(self, step: int, metrics: Mapping[str, float]) -> None:
            raise KeyboardInterrupt

    found = Recorder()
    fit_pair(Interrupt(), found)
    assert (found.calls[-1][1]["status"], found.calls[-1][1]["steps"]) == ("interrupted", 20)


def test_settings_of_other_optimizers() -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    options: dict[str, Any] = {"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.5}, "gamma": 0.9}
    for optim, scheduler in (
        (torch.optim.SGD([p], lr=0.5), None),
        (WholeOptimizer(torch.optim.SGD([p], lr=0.5)), None),
        (pyro.optim.ExponentialLR(options), "ExponentialLR"),
    ):
        found = describe_run(partial(pair, x=1), AutoNormal(pair), DecomposedELBO(), optim, None)
        assert (found["model"], found["optimizer"], found["learning_rate"]) == ("pair", "SGD", 0.5)
        assert found["scheduler"] == scheduler
    by_parameter = describe_run(pair, pair, DecomposedELBO(), pyro.optim.Adam(lambda name: {"lr": 0.1}), None)
    assert by_parameter["learning_rate"] is None


# CSV


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run.csv"
    complete(lambda: CSVTracker(path))
    table = pd.read_csv(path)
    assert list(table.columns) == ["step", *metrics(1), "validation_elbo"]
    assert table["step"].tolist() == list(range(1, 11))
    for _, row in table.iterrows():
        assert row.drop("step").dropna().to_dict() == pytest.approx(metrics(int(row["step"])), rel=1e-14)
    with path.open(newline="") as file:  # pandas 2 may be off in the last digit, which the file is not
        exact = [{k: float(v) for k, v in row.items() if v and k != "step"} for row in csv.DictReader(file)]
    assert exact == [metrics(step) for step in range(1, 11)]
    beside = json.loads((tmp_path / "new" / "run.csv.json").read_text())
    assert beside == {"settings": SETTINGS, "summary": SUMMARY}
    assert sorted(file.name for file in path.parent.iterdir()) == ["run.csv", "run.csv.json"]


def test_csv_can_be_read_during_the_run(tmp_path: Path) -> None:
    tracker = CSVTracker(tmp_path / "run.csv")
    tracker.start(SETTINGS)
    assert pd.read_csv(tracker.path).empty
    tracker.log(10, {"elbo": -1.0})
    tracker.log(20, {"elbo": math.nan, "objective": -math.inf})
    table = pd.read_csv(tracker.path, keep_default_na=False, na_values=[""])
    assert table["objective"].isna().tolist() == [True, False]
    assert table["objective"][1] == -math.inf
    assert math.isnan(float(table["elbo"][1]))
    assert json.loads((tmp_path / "run.csv.json").read_text()) == {"settings": SETTINGS, "summary": {}}


@pytest.mark.parametrize(("checkpoint", "killed"), [(1, 1), (1, 7), (4, 7), (6, 9), (9, 10)])
def test_csv_resumed_equals_uninterrupted(tmp_path: Path, checkpoint: int, killed: int) -> None:
    killed_and_resumed(lambda: CSVTracker(tmp_path / "b.csv"), tmp_path / "state", checkpoint, killed + 1)
    complete(lambda: CSVTracker(tmp_path / "a.csv"))
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    assert (tmp_path / "a.csv.json").read_bytes() == (tmp_path / "b.csv.json").read_bytes()


def test_csv_killed_in_the_middle_of_a_row(tmp_path: Path) -> None:
    def tear(tracker: Callback) -> None:
        with (tmp_path / "b.csv").open("a") as file:
            file.write('7,-4.7,"un')

    killed_and_resumed(lambda: CSVTracker(tmp_path / "b.csv"), tmp_path / "state", end=tear)
    complete(lambda: CSVTracker(tmp_path / "a.csv"))
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_csv_of_a_new_run_replaces_the_old(tmp_path: Path) -> None:
    tracker = CSVTracker(tmp_path / "run.csv")
    tracker.start({})
    tracker.log(1, {"old": 1.0})
    complete(lambda: CSVTracker(tmp_path / "run.csv"))
    assert "old" not in pd.read_csv(tmp_path / "run.csv").columns


def test_csv_errors(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="is a directory"):
        CSVTracker(tmp_path)
    path = tmp_path / "run.csv"
    tracker = CSVTracker(path)
    tracker.start({})
    with pytest.raises(ValueError, match="can't be called 'step'"):
        tracker.log(1, {"step": 1.0})
    tracker.log(1, {"elbo": -1.0})
    tracker.log(2, {"elbo": -2.0})
    state = tracker.state_dict()
    path.write_text("step,elbo\n1,-1.0\n")
    with pytest.raises(ValueError, match="does not have the 2 rows, up to step 2"):
        CSVTracker(path).load_state_dict(state)
    path.write_text("step,loss\n1,-1.0\n2,-2.0\n")
    with pytest.raises(ValueError, match="it was changed"):
        CSVTracker(path).load_state_dict(state)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="is gone: it had 2 rows"):
        CSVTracker(path).load_state_dict(state)


# TensorBoard


def read_tensorboard(directory: Path) -> Any:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    everything = dict.fromkeys(("scalars", "tensors"), 0)
    return event_accumulator.EventAccumulator(str(directory), size_guidance=everything).Reload()


def scalars_of(events: Any) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for tag in events.Tags()["scalars"]:
        points = [(point.step, point.value) for point in events.Scalars(tag)]
        assert len(points) == len(dict(points)), f"{tag} has a step twice"
        found[tag] = dict(points)
    return found


def by_metric() -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for step in range(1, 11):
        for name, value in metrics(step).items():
            found.setdefault(name, {})[step] = value
    return found


def text_of(events: Any, name: str) -> str:
    (event,) = events.Tensors(f"{name}/text_summary")
    return str(event.tensor_proto.string_val[0].decode())


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    complete(lambda: TensorBoardTracker(tmp_path))
    events = read_tensorboard(tmp_path)
    assert scalars_of(events) == {name: pytest.approx(points, rel=1e-6, abs=0) for name, points in by_metric().items()}
    assert "| versions/torch | 2.13 |" in text_of(events, "settings")
    assert r"| reason | a \| b |" in text_of(events, "summary")
    plugin = events.PluginTagToContent("hparams")
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    started = HParamsPluginData.FromString(plugin["_hparams_/session_start_info"]).session_start_info.hparams
    assert started["learning_rate"].number_value == 0.02
    assert started["versions/pyro"].string_value == "1.9.2"
    assert started["num_steps"].string_value == "None"
    experiment = HParamsPluginData.FromString(plugin["_hparams_/experiment"]).experiment
    assert [info.name.tag for info in experiment.metric_infos] == ["elbo"]
    assert "_hparams_/session_end_info" in plugin


@pytest.mark.parametrize("checkpoint", [1, 4])
def test_tensorboard_resumed(tmp_path: Path, checkpoint: int) -> None:
    pytest.importorskip("tensorboard")

    def kill(tracker: Any) -> None:
        tracker._writer.close()  # what was logged has reached the file

    killed_and_resumed(lambda: TensorBoardTracker(tmp_path), tmp_path / "state", checkpoint, end=kill)
    assert scalars_of(read_tensorboard(tmp_path)) == {
        name: pytest.approx(points, rel=1e-6, abs=0) for name, points in by_metric().items()
    }


def test_tensorboard_new_run_hides_the_old(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    old = TensorBoardTracker(tmp_path)
    old.start({})
    old.log(1, {"elbo": 0.0})
    old.log(50, {"elbo": 0.0})
    old.finish({})
    complete(lambda: TensorBoardTracker(tmp_path, flush_secs=1))
    assert scalars_of(read_tensorboard(tmp_path))["elbo"] == pytest.approx(by_metric()["elbo"])
    with pytest.raises(TypeError, match="takes no purge_step"):
        TensorBoardTracker(tmp_path, purge_step=1)


# MLflow


@pytest.fixture
def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")  # before its import: no test uses the network
    monkeypatch.chdir(tmp_path)
    return pytest.importorskip("mlflow")


@pytest.mark.slow  # MLflow takes seconds to make a database
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # MLflow 3.17 with SQLAlchemy 2.1
def test_mlflow(mlflow: Any, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/runs.db"
    before = mlflow.get_tracking_uri()

    def make() -> MLflowTracker:
        return MLflowTracker("schools", "first", tracking_uri=uri, tags={"who": "test"})

    tracker = complete(make)
    client = mlflow.tracking.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("schools").experiment_id])
    assert run.info.run_id == tracker.run_id  # type: ignore[attr-defined]
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert run.data.params["learning_rate"] == "0.02"
    assert run.data.params["versions/torch"] == "2.13"
    tags = {"who": "test", "model": "eight_schools", "guide": "AutoNormal", "reason": "a | b", "converged": "True"}
    assert tags.items() <= run.data.tags.items()
    assert run.data.metrics["final/elbo"] == -math.pi

    def recorded(run_id: str) -> dict[str, list[tuple[int, float]]]:
        names = client.get_run(run_id).data.metrics
        return {
            name: [(point.step, point.value) for point in client.get_metric_history(run_id, name)]
            for name in names
            if not name.startswith("final/")
        }

    expected = {name.replace("[", "_").replace("]", "_"): list(points.items()) for name, points in by_metric().items()}
    assert recorded(run.info.run_id) == expected

    resumed = killed_and_resumed(make, tmp_path / "state")
    assert len(client.search_runs([run.info.experiment_id])) == 2
    assert recorded(resumed.run_id) == expected  # type: ignore[attr-defined]
    assert client.get_run(resumed.run_id).info.status == "FINISHED"  # type: ignore[attr-defined]

    failed = make()
    failed.start(SETTINGS)
    failed.log(1, {"kl_prior/a[0]": math.nan, "kl_prior/a//b": 1.0, "kl_prior/..": 2.0, "elbo": -math.inf})
    with pytest.raises(ValueError, match=r"'kl_prior/a\[0\]' and 'kl_prior/a\(0\)' apart"):
        failed.log(2, {"kl_prior/a(0)": 1.0})
    failed.finish({"status": "failed", "reason": "NaN", "steps": 2})
    run = client.get_run(failed.run_id)
    assert run.info.status == "FAILED"
    assert {"kl_prior/a_0_", "kl_prior_a__b", "kl_prior_..", "elbo"} <= run.data.metrics.keys()
    assert mlflow.get_tracking_uri() == before
    assert mlflow.active_run() is None


# Weights & Biases


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb = pytest.importorskip("wandb")
    yield wandb
    wandb.teardown()


def wandb_records(path: Path) -> Iterable[Any]:
    """The records of a run's file, which is a LevelDB log of W&B's protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    content = path.read_bytes()
    assert content[:4] == b":W&B"
    position, whole = 7, b""
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:  # no room for a header: the rest of the block is padding
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        whole += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            yield Record.FromString(whole)
            whole = b""


def wandb_history(path: Path) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            found[record.history.step.num] = {k: v for k, v in items.items() if not k.startswith("_")}
    return found


def test_wandb(wandb: Any, tmp_path: Path) -> None:
    def make() -> WandbTracker:
        return WandbTracker("schools", mode="offline", dir=str(tmp_path), name="first", tags=["test"])

    tracker = complete(make)
    wandb.teardown()  # the file is complete when W&B's process has ended, a moment after the run is finished
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert wandb_history(path) == {step: metrics(step) for step in range(1, 11)}
    records = list(wandb_records(path))
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (run.run_id, run.project, run.display_name, list(run.tags)) == (
        tracker.run_id,  # type: ignore[attr-defined]
        "schools",
        "first",
        ["test"],
    )
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert SETTINGS.items() <= config.items()
    summary = {
        item.key or "/".join(item.nested_key): json.loads(item.value_json)
        for record in records
        if record.WhichOneof("record_type") == "summary"
        for item in record.summary.update
    }
    assert {f"final/{name}": value for name, value in SUMMARY.items()}.items() <= summary.items()
    assert wandb.run is None


def test_wandb_resumed(wandb: Any, tmp_path: Path) -> None:
    tracker = killed_and_resumed(
        lambda: WandbTracker("schools", mode="offline", dir=str(tmp_path)),
        tmp_path / "state",
        end=lambda tracker: tracker.run.finish(),  # type: ignore[attr-defined]
    )
    wandb.teardown()
    paths = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert [path.name for path in paths] == [f"run-{tracker.run_id}.wandb"] * 2  # type: ignore[attr-defined]
    first, second = map(wandb_history, paths)
    assert first == {step: metrics(step) for step in range(1, 7)}
    assert second == {step: metrics(step) for step in range(4, 11)}
    with pytest.raises(TypeError, match="takes no resume"):
        WandbTracker(resume="must")


# Missing libraries


@pytest.mark.parametrize(
    ("tracker", "hidden", "extra"),
    [
        (TensorBoardTracker, "tensorboard", "tensorboard"),
        (MLflowTracker, "mlflow", "mlflow"),
        (WandbTracker, "wandb", "wandb"),
    ],
)
def test_missing_library(
    tracker: Callable[..., Any], hidden: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(sys.modules):
        if name == hidden or name.startswith((f"{hidden}.", "torch.utils.tensorboard")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, hidden, None)
    monkeypatch.delattr(torch.utils, "tensorboard", raising=False)
    with pytest.raises(ImportError, match=rf'Tracker needs {extra}: pip install "pyro_elbo_ext\[{extra}\]"'):
        tracker(str(tmp_path))


def test_import_of_the_package_brings_no_tracker_library() -> None:
    code = "import sys, pyro_elbo_ext; print([m for m in ('tensorboard', 'mlflow', 'wandb') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
