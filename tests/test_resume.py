"""A run that was killed and resumed equals the one that was left alone, bit for bit."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch.utils.data import DataLoader, TensorDataset

from pyro_elbo_ext import DecomposedELBO, FitResult, ImportanceWeightedELBO, fit
from pyro_elbo_ext.bounds.weighting import LinearWarmup
from pyro_elbo_ext.programs.interrupts import interrupts_wait
from pyro_elbo_ext.training.state import checkpoints
from pyro_elbo_ext.training.stopping.rules import FixedSteps
from tests.killed_runs import differences

ALONE = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # a process that forks has one thread


def killed_runs(case: str, folder: Path, kills: int, number: str = "SIGKILL") -> str:
    """What ``tests.killed_runs`` prints."""
    command = [sys.executable, "-m", "tests.killed_runs", case, str(folder), str(kills), "7", number]
    done = subprocess.run(command, env=ALONE, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("case", "kills", "number"),
    [
        ("batches", 3, "SIGINT"),
        pytest.param("batches", 17, "SIGKILL", marks=pytest.mark.slow),
        pytest.param("schools", 2, "SIGKILL", marks=pytest.mark.slow),
    ],
)
def test_killed_runs_end_identically(case: str, kills: int, number: str, tmp_path: Path) -> None:
    output = killed_runs(case, tmp_path, kills, number)
    print(output)
    expected = re.compile(r"run \d+: killed after step \d+, resumed at step \d+, ends identical")
    assert [bool(expected.fullmatch(line)) for line in output.splitlines()] == [True] * kills, output


def test_differences_are_found() -> None:
    a = {"x": torch.tensor([1.0, 2.0]), "y": [np.array([np.nan, 1.0]), {"z": float("nan")}], "seconds": 3.0}
    b = copy.deepcopy(a)
    b["seconds"] = 4.0
    assert list(differences(a, b, "")) == []
    b["x"][1] = torch.nextafter(b["x"][1], torch.tensor(3.0))
    b["y"][0][1] = np.nextafter(1.0, 2.0)  # type: ignore[index]
    b["y"][1]["z"] = 0.0  # type: ignore[index]
    assert list(differences(a, b, "")) == [
        "/x: tensors differ",
        "/y[0]: arrays differ",
        "/y[1]/z: nan and 0.0",
    ]
    assert list(differences([1], [1.0], "")) == ["[0]: int and float"]
    assert list(differences([1], [1, 2], "")) == [": 1 and 2 items"]
    assert list(differences({"a": 1}, {"b": 1}, "")) == [": ['a', 'b'] in one only"]


def test_a_second_interrupt_does_not_wait() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    reached = []

    def send(times: int) -> None:
        with interrupts_wait():
            for i in range(times):
                signal.raise_signal(signal.SIGINT)
                reached.append((times, i))

    try:
        with pytest.raises(KeyboardInterrupt):
            send(1)
        with pytest.raises(KeyboardInterrupt):
            send(2)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert reached == [(1, 0), (2, 0)]


def test_a_checkpoint_has_all_that_is_compared(tmp_path: Path) -> None:
    killed_runs("batches", tmp_path, 0)
    content = checkpoints.read(tmp_path / "whole" / "checkpoint.pt")
    assert content["loop"]["step"] == 160
    assert len(content["training"]["parameters"]) == 6
    assert len(content["training"]["optimizers"]) == 6
    assert content["objective"]["history"].num_recorded == 160
    assert content["random"].keys() >= {"torch", "numpy", "python"}
    assert content["loop"]["validated"]
    assert content["callbacks"][0]["state"]["rows"] == 16


# What is resumed is what was begun


DATA = torch.linspace(-1.0, 2.0, 24)


def model(x: torch.Tensor, spread: float = 1.0) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", 24, subsample_size=len(x)):
        pyro.sample("x", dist.Normal(mu, spread), obs=x)


def adam(**settings: float) -> Any:
    return pyro.optim.Adam({"lr": 0.01, **settings})  # type: ignore[attr-defined]


def begun(path: Path, *args: Any, **options: Any) -> Any:
    pyro.clear_param_store()
    given: dict[str, Any] = {"optim": adam(), "num_steps": 30, "seed": 3, "loss": DecomposedELBO(), **options}
    args = args or (() if "batches" in given else (DATA,))
    return fit(model, AutoNormal(model), *args, checkpoint=path, compiled=False, progress=False, **given)


def loader(data: torch.Tensor = DATA, **options: Any) -> Any:
    return DataLoader(TensorDataset(data), **{"batch_size": 8, "shuffle": True, **options})


Change = tuple[dict[str, Any], tuple[Any, ...], dict[str, Any], tuple[Any, ...], str]


def changes() -> dict[str, Change]:
    """What was given, what is given now, each with arguments of the model, and what is said of it."""
    return {
        "optimizer": ({}, (), {"optim": pyro.optim.SGD({"lr": 0.01})}, (), r"optim was Adam and is now SGD"),  # type: ignore[attr-defined]
        "rate": ({}, (), {"optim": adam(lr=0.1)}, (), r"optim, settings, lr was 0.01 and is now 0.1"),
        "betas": ({}, (), {"optim": adam(betas=(0.5, 0.9))}, (), r"betas was None and is now \[0.5, 0.9\]"),
        "clipping": (
            {},
            (),
            {"optim": pyro.optim.Adam({"lr": 0.01}, {"clip_norm": 1.0})},  # type: ignore[attr-defined]
            (),
            r"clip_args, clip_norm was None and is now 1.0",
        ),
        "schedule": (
            {
                "optim": pyro.optim.ExponentialLR(
                    {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.9}
                )
            },
            (),
            {
                "optim": pyro.optim.ExponentialLR(
                    {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.8}
                )
            },
            (),
            r"gamma was 0.9 and is now 0.8",
        ),
        "loss": ({}, (), {"loss": Trace_ELBO()}, (), r"loss was DecomposedELBO and is now Trace_ELBO"),
        "particles": ({}, (), {"loss": DecomposedELBO(2)}, (), r"loss, num_particles was 1 and is now 2"),
        "kl": ({}, (), {"loss": DecomposedELBO(kl="sampled")}, (), r"loss, kl was 'auto' and is now 'sampled'"),
        "gradient": (
            {},
            (),
            {"loss": DecomposedELBO(gradient="doubly_reparameterized")},
            (),
            r"gradient was 'pathwise' and is now 'doubly_reparameterized'",
        ),
        "bound": ({}, (), {"loss": ImportanceWeightedELBO(2)}, (), r"loss was DecomposedELBO"),
        "weight": (
            {"loss": DecomposedELBO(kl_weight=LinearWarmup(5))},
            (),
            {"loss": DecomposedELBO(kl_weight=LinearWarmup(9))},
            (),
            r"kl_weight, num_steps was 5 and is now 9",
        ),
        "seed": ({}, (), {"seed": 4}, (), r"seed was 3 and is now 4"),
        "rule": (
            {"stopping": FixedSteps(20)},
            (),
            {"stopping": FixedSteps(25)},
            (),
            r"stopping, num_steps was 20 and is now 25",
        ),
        "no rule": ({"stopping": FixedSteps(20)}, (), {}, (), r"stopping was FixedSteps and is now None"),
        "content": ({}, (), {}, (DATA + 1e-6,), r"data, argument 0 was 'torch.float32 \(24,\) \w+' and is now"),
        "dtype": ({}, (), {}, (DATA.double(),), r"is now 'torch.float64 \(24,\)"),
        "setting": ({}, (DATA, 1.0), {}, (DATA, 2.0), r"data, argument 1 was 1.0 and is now 2.0"),
        "batches": (
            {"batches": loader()},
            (),
            {"batches": loader(DATA + 1)},
            (),
            r"data, batches, dataset, tensors\[0\] was",
        ),
        "batch size": (
            {"batches": loader()},
            (),
            {"batches": loader(batch_size=12)},
            (),
            r"batch_size was 8 and is now 12",
        ),
        "order": ({"batches": loader()}, (), {"batches": loader(shuffle=False)}, (), r"sampler was 'RandomSampler'"),
        "list": (
            {"batches": list(DATA.split(8))},
            (),
            {"batches": list((-DATA).split(8))},
            (),
            r"data, batches\[0\] was",
        ),
        "held out": ({"validation": DATA}, (), {"validation": DATA + 1}, (), r"validation was 'torch.float32"),
        "steps": ({}, (), {"num_steps": 20}, (), r"has taken 30 steps, more than the 20 that are asked for"),
    }


CHANGES = list(changes())


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_is_resumed_with_what_it_was_given(change: str, tmp_path: Path) -> None:
    first, args, second, other_args, message = changes()[change]
    path = tmp_path / "run.pt"
    begun(path, *args, **first)
    before = path.read_bytes()
    given = {**({"batches": first["batches"]} if "batches" in first else {}), **second}
    with pytest.raises(ValueError, match=message) as raised:
        begun(path, *(other_args or args), resume=True, **given)
    assert str(path) in str(raised.value)
    assert path.read_bytes() == before
    more = {**first, "num_steps": 40}
    assert begun(path, *args, resume=True, **more).num_steps == (20 if "stopping" in first else 40)


@pytest.mark.parametrize("change", [name for name in CHANGES if name not in ("steps", "dtype")])
def test_it_goes_on_with_what_is_given_now_if_that_is_asked_for(
    change: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, args, second, other_args, message = changes()[change]
    path = tmp_path / "run.pt"
    begun(path, *args, **first)
    mu = pyro.param("AutoNormal.locs.mu").item()
    batches = {"batches": first["batches"]} if "batches" in first else {}
    with caplog.at_level(logging.WARNING):
        result = begun(path, *(other_args or args), resume="anyway", **{**batches, **second, "num_steps": 60})
    assert any(re.search(message, record.getMessage()) for record in caplog.records)
    assert result.num_steps > (20 if "stopping" in first else 30)
    assert pyro.param("AutoNormal.locs.mu").item() != mu
    if change == "rate":
        rates = [group["lr"] for optim in second["optim"].optim_objs.values() for group in optim.param_groups]
        assert rates == [0.1, 0.1]


def scaled(scale: float = 10.0, family: Any = dist.Normal, name: str = "mu", plate: str = "data") -> Any:
    def changed(y: torch.Tensor) -> None:
        mu = pyro.sample(name, family(0.0, scale))
        with pyro.plate(plate, len(DATA), subsample=y):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    return changed


def located(scale: float = 0.5) -> Any:
    def changed(y: torch.Tensor) -> None:
        loc = pyro.param("loc", lambda: torch.randn(()))  # which starts elsewhere in each process
        pyro.sample("mu", dist.Normal(loc, scale))

    return changed


PROGRAMS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "prior": ({"scale": 1.0}, {}, r"log densities of the model, mu, was -\d.* and is now -\d.* at the same parameters"),
    "guide": ({}, {"scale": 0.4}, r"log densities of the guide, mu, was -?\d.* and is now"),
    "family": ({"family": dist.Laplace}, {}, r"model, mu was 'Normal \(\) \(\)' and is now 'Laplace \(\) \(\)'"),
    "plate": (
        {"plate": "rows"},
        {},
        r"model, y was 'Normal \(24,\) \(\) in data, observed' and is now .* in rows, observed'",
    ),
}


@pytest.mark.parametrize("change", PROGRAMS)
@pytest.mark.parametrize("batches", [False, True], ids=["whole", "batches"])
def test_other_programs_with_the_same_parameters_are_told_apart(change: str, batches: bool, tmp_path: Path) -> None:
    of_model, of_guide, message = PROGRAMS[change]
    path = tmp_path / "run.pt"
    given: dict[str, Any] = {"optim": adam(), "seed": 3, "checkpoint": path, "compiled": False, "progress": False}
    args = () if batches else (DATA,)
    if batches:
        given["batches"] = loader()
        message = message.replace(r" \(24,\) \(\)", "").replace(r" \(\) \(\)", "")

    def run(model: Any, guide: Any, num_steps: int, **options: Any) -> Any:
        pyro.clear_param_store()
        return fit(model, guide, *args, num_steps=num_steps, **given, **options)

    run(scaled(), located(), 6)
    before = path.read_bytes()
    assert run(scaled(), located(), 8, resume=True).num_steps == 8  # the same again, written anew
    path.write_bytes(before)
    with pytest.raises(ValueError, match=message):
        run(scaled(**of_model), located(**of_guide), 8, resume=True)
    assert path.read_bytes() == before
    assert run(scaled(**of_model), located(**of_guide), 8, resume="anyway").num_steps == 8


def test_an_optimizer_of_torch_may_be_the_same_object(tmp_path: Path) -> None:
    pyro.clear_param_store()
    guide = AutoNormal(model)
    guide(DATA)
    optim = torch.optim.Adam(guide.parameters(), lr=0.01)

    def run(steps: int, **options: Any) -> FitResult:
        return fit(
            model, guide, DATA, optim=optim, num_steps=steps, checkpoint=tmp_path / "run.pt", progress=False,
            compiled=False, **options,
        )  # fmt: skip

    run(10)
    assert run(20, resume=True).num_steps == 20
    optim.param_groups[0]["lr"] = 0.02
    with pytest.raises(ValueError, match=r"lr was 0.01 and is now 0.02"):
        run(30, resume=True)


def test_a_checkpoint_with_nan_parameters_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    begun(path)
    content = checkpoints.read(path)
    content["training"]["parameters"]["AutoNormal.locs.mu"].fill_(float("nan"))
    checkpoints.write(path, content)
    for resume in (True, "anyway"):
        with pytest.raises(ValueError, match=r"parameter 'AutoNormal.locs.mu' is NaN or infinite in .*run.pt"):
            begun(path, num_steps=50, resume=resume)


def test_a_checkpoint_of_an_older_version_goes_on_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "run.pt"
    begun(path)
    content = checkpoints.read(path)
    del content["fingerprint"]
    checkpoints.write(path, content)
    with caplog.at_level(logging.WARNING):
        assert begun(path, num_steps=50, resume=True, optim=adam(lr=0.1)).num_steps == 50
    assert "does not tell what its run was given" in caplog.text


# Files


def not_checkpoints() -> dict[str, bytes]:
    return {
        "empty": b"",
        "text": b"step,loss\n1,2\n",
        "pickle": pickle.dumps({"a": 1}),
        "cut": pickle.dumps({"format": 1, "kind": "checkpoint"})[:-4],
        "unknown": b"cno_such_module\nThing\n.",
        "zip": b"PK\x03\x04" + bytes(40),
    }


@pytest.mark.parametrize("kind", [*not_checkpoints(), "tensors", "list", "parts", "folder"])
def test_what_is_no_checkpoint_is_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.pt"
    if kind in not_checkpoints():
        path.write_bytes(not_checkpoints()[kind])
    elif kind == "folder":
        path.mkdir()
    else:
        made: dict[str, Any] = {
            "tensors": {"w": torch.ones(2)},
            "list": [1],
            "parts": {"format": 1, "kind": "checkpoint"},
        }
        torch.save(made[kind], path)
    with pytest.raises(ValueError, match=r"odd\.pt"):
        begun(path, resume=True)
    with pytest.raises(ValueError, match=r"odd\.pt"):
        FitResult.load(path, model, AutoNormal(model), DATA)


def test_several_processes_refuse_the_file_of_one_before_anything_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "fit.pt"
    begun(path)
    loss = DecomposedELBO()
    with pytest.raises(ValueError, match=r"fit\.pt was written by a single process: resume in one"):
        begun(path, loss=loss, num_steps=60, resume=True, distributed=True)
    assert loss.num_steps == 0
    assert len(loss.history) == 0  # type: ignore[arg-type]
    assert pyro.param("AutoNormal.scales.mu").item() == pytest.approx(0.1)  # as it begins


def test_what_a_killed_run_left_is_removed_and_what_a_live_one_writes_stays(tmp_path: Path) -> None:
    """Files of that name only."""
    path = tmp_path / "run[1].pt"
    stale = [tmp_path / ".run[1].pt.abcd1234", tmp_path / ".run[1].pt.0a1b2c3d.pt"]
    others = [tmp_path / ".other.pt.abcd1234", tmp_path / ".run[1].pt.notes", tmp_path / "run[1].pt.abcd1234"]
    for file in (*stale, *others):
        file.write_bytes(b"half")
    script = (
        "import sys, time; from pathlib import Path; from pyro_elbo_ext.files.atomic import replaced\n"
        "with replaced(Path(sys.argv[1])) as new:\n    new.write_bytes(b'whole'); print(new, flush=True); sys.stdin.read()"
    )
    live = subprocess.Popen(
        [sys.executable, "-c", script, str(path)], env=ALONE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert live.stdout is not None
    written = Path(live.stdout.readline().strip())
    assert not any(file.exists() for file in stale)
    checkpoints.write(path, {"kind": "checkpoint"})
    assert written.exists()
    assert all(file.exists() for file in others)
    live.kill()
    live.communicate()
    assert written.exists()
    checkpoints.write(path, {"kind": "checkpoint"})
    assert not written.exists()
    assert sorted(tmp_path.iterdir()) == sorted([*others, path])


def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    checkpoints.write(path, {"kind": "checkpoint", "a": 1})
    with pytest.raises(Exception, match=r"pickle|local object"):
        checkpoints.write(path, {"kind": "checkpoint", "a": lambda: 0})
    assert checkpoints.read(path)["a"] == 1
    assert list(tmp_path.iterdir()) == [path]


class Odd(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """Its order hangs on what no seed sets."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng()

    def __iter__(self) -> Any:
        return iter(DATA[torch.from_numpy(self.generator.permutation(24))])


@pytest.mark.parametrize("source", ["generator", "list", "odd"])
def test_what_programs_compute_is_compared_on_the_same_batch(source: str, tmp_path: Path) -> None:
    """Where it is the same: in another process generators and orders are others, which is no difference of the programs."""
    made: dict[str, Callable[[int], Any]] = {
        "generator": lambda seed: loader(generator=torch.Generator().manual_seed(seed)),
        "list": lambda seed: list(DATA.split(8)),
        "odd": lambda seed: DataLoader(Odd(), batch_size=8),
    }
    given: dict[str, Any] = {"checkpoint": tmp_path / "run.pt", "compiled": False, "progress": False}

    def run(model: Any, seed: int, num_steps: int, **options: Any) -> Any:
        pyro.clear_param_store()
        batches = made[source](seed)
        before = batches.generator.get_state() if source == "generator" else None
        result = fit(
            model, located(), batches=batches, optim=adam(), num_steps=num_steps, dataset_size=24, **given, **options
        )
        assert before is None or num_steps == 1 or not torch.equal(before, batches.generator.get_state())
        return result

    run(scaled(), 1, 6)
    assert run(scaled(), 2, 8, resume=True).num_steps == 8
    if source == "odd":
        assert run(scaled(scale=1.0), 2, 10, resume=True).num_steps == 10
    else:
        with pytest.raises(ValueError, match=r"log densities of the model, mu, was -\d.* and is now -\d"):
            run(scaled(scale=1.0), 2, 10, resume=True)
