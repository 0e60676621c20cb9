"""Lightning: the same training as by SVI, in one process and in two."""

from __future__ import annotations

import builtins
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch.utils.data import DataLoader, TensorDataset

from pyro_elbo_ext import DecomposedELBO
from tests import distributed_cases as cases
from tests.test_distributed import run_module

if importlib.util.find_spec("lightning") is None:
    pytest.skip("lightning is not installed", allow_module_level=True)

from pyro_elbo_ext.training.distributed.lightning import LightningELBO
from tests import lightning_run

pytestmark = [
    # A data set of 40 rows in memory needs no workers.
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    # Held-out data are not always given.
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    # Lightning 2.6 uses a class of torch's that torch 2.13 would rather have otherwise.
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
]


def loader(batch_size: int = cases.BATCH, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(cases.X, cases.Y), batch_size=batch_size, **options)


def test_one_process_equals_svi() -> None:
    pyro.set_rng_seed(0)
    loss = DecomposedELBO()
    elbo = LightningELBO(
        cases.regression, AutoNormal(cases.regression), loss, pyro.optim.ClippedAdam({"lr": 0.05}), seed=1
    )
    trainer = lightning_run.trainer()
    held_out = loader(cases.N)
    trainer.fit(elbo, loader(), held_out)
    metrics = trainer.callback_metrics
    streams = elbo._joint.streams

    pyro.clear_param_store()
    guide, other = AutoNormal(cases.regression), DecomposedELBO()
    with streams.at(0):
        guide(cases.X[: cases.BATCH], cases.Y[: cases.BATCH])
    svi = SVI(cases.regression, guide, pyro.optim.ClippedAdam({"lr": 0.05}), other)
    for step, (x, y) in enumerate([*loader(), *loader()]):
        torch.manual_seed(streams.seed_at(step))
        svi.step(x, y)
    pd.testing.assert_frame_equal(cases.table(loss), cases.table(other), rtol=1e-10)
    for name, value in elbo.elbo.guide.state_dict().items():
        torch.testing.assert_close(value, guide.state_dict()[name], rtol=1e-10, atol=1e-12)
    last = other.history.to_dataframe(by="step").iloc[-1]
    for name in ("elbo", "objective", "reconstruction", "kl_prior"):
        assert float(metrics[name]) == pytest.approx(last[name], rel=1e-6)  # Lightning keeps them in single precision
    sites = other.history.to_dataframe().set_index(["step", "site"]).loc[last["step"]]
    assert float(metrics["kl_prior/weights"]) == pytest.approx(sites.loc["weights", "kl_prior"], rel=1e-6)
    assert float(metrics["reconstruction/y"]) == pytest.approx(sites.loc["y", "reconstruction"], rel=1e-6)
    # one evaluation of all data after each epoch; the third, since the sanity check came before
    torch.manual_seed(streams.seed_at(2, "evaluation"))
    with torch.no_grad():
        value = -other.loss(cases.regression, guide, cases.X, cases.Y)
    assert float(metrics["val_elbo"]) == pytest.approx(value, rel=1e-6)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    run_module("tests.lightning_run", str(tmp_path))
    two = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    elbo, trainer = lightning_run.module(), lightning_run.trainer()
    order = torch.arange(cases.N).reshape(-1, cases.BATCH)
    rows = torch.cat([torch.cat([row[::2], row[1::2]]) for row in order])  # as two processes take them together
    data = torch.utils.data.Subset(lightning_run.data(), rows.tolist())
    trainer.fit(elbo, DataLoader(data, batch_size=cases.BATCH), DataLoader(data, batch_size=cases.N))
    one = lightning_run.result(elbo, trainer)
    for found in two:
        assert found["parameters"].keys() == one["parameters"].keys()
        for name, value in one["parameters"].items():
            torch.testing.assert_close(found["parameters"][name], value, rtol=1e-10, atol=1e-12)
        pd.testing.assert_frame_equal(found["table"], one["table"], rtol=1e-10, atol=1e-10)
        assert found["metrics"] == pytest.approx(one["metrics"], rel=1e-6)
        assert "process 1 of 2 at step 10: " in found["error"]
        assert "site 'z' (latent) has log_p = nan" in found["error"]
    assert {"elbo", "kl_prior/z", "reconstruction/x", "val_elbo", "val_kl_prior/z"} <= one["metrics"].keys()


def test_checkpoints_hold_parameters_and_the_place_in_the_run(tmp_path: Path) -> None:
    def make() -> LightningELBO:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        loss = DecomposedELBO(kl_weight=lambda step: min(1.0, step / 8))
        return LightningELBO(cases.regression, AutoNormal(cases.regression), loss, example=next(iter(loader())))

    whole, path = make(), tmp_path / "half.ckpt"
    lightning_run.trainer().fit(whole, loader())
    expected = {name: value.clone() for name, value in whole.state_dict().items()}
    half, first = make(), lightning_run.trainer(max_steps=5)
    first.fit(half, loader())
    first.save_checkpoint(path)
    again = make()
    lightning_run.trainer().fit(again, loader(), ckpt_path=path)
    assert again.objective.num_steps == 10
    assert again.objective.history.steps.tolist() == [5, 6, 7, 8, 9]
    for name, value in again.state_dict().items():
        assert torch.equal(value, expected[name])


def test_mappings_and_further_arguments() -> None:
    def model(x: torch.Tensor, y: torch.Tensor, size: int) -> None:
        cases.regression(x, y, size)

    data = [{"x": cases.X[:8], "y": cases.Y[:8]}, {"x": cases.X[8:16], "y": cases.Y[8:16]}]
    loss = DecomposedELBO()
    elbo = LightningELBO(model, AutoNormal(model), loss, kwargs={"size": 16})
    lightning_run.trainer().fit(elbo, DataLoader(data, batch_size=None))
    assert (loss.history.to_dataframe().query("site == 'y'")["scale"] == 2).all()


def test_a_loss_of_pyros() -> None:
    elbo, trainer = LightningELBO(cases.regression, AutoNormal(cases.regression), Trace_ELBO()), lightning_run.trainer()
    trainer.fit(elbo, loader(), loader())
    assert trainer.callback_metrics.keys() == {"elbo", "val_elbo"}
    trainer.test(elbo, loader(), verbose=False)
    assert np.isfinite(float(trainer.callback_metrics["test_elbo"]))


def test_errors() -> None:
    guide = AutoNormal(cases.regression)
    with pytest.raises(
        ValueError, match=r"no module of model or guide holds the parameters 'loc', 'scale', 'sigma_loc',"
    ):
        LightningELBO(cases.regression, cases.plain_guide, example=(cases.X[:8], cases.Y[:8]))
    with pytest.raises(ValueError, match="there is nothing to train"):
        LightningELBO(lambda x: pyro.sample("x", dist.Normal(0.0, 1.0), obs=x), lambda x: None, example=cases.Y[0])
    with pytest.raises(TypeError, match="optim must be a function from parameters"):
        LightningELBO(cases.regression, guide, optim=torch.optim.SGD([torch.ones(1, requires_grad=True)]))
    with pytest.raises(TypeError, match="no equivalent in Lightning"):
        LightningELBO(cases.regression, guide, optim=pyro.optim.Adam({"lr": 0.1}, {"clip_norm": 1.0}))
    with pytest.raises(TypeError, match="has no differentiable_loss"):
        LightningELBO(cases.regression, guide, pyro.infer.ReweightedWakeSleep())
    with pytest.raises(ValueError, match="give LightningELBO a batch by example="):
        lightning_run.trainer().validate(LightningELBO(cases.regression, guide), loader())
    bad = TensorDataset(cases.X, torch.full_like(cases.Y, float("nan")))
    with pyro.validation_enabled(False), pytest.raises(ValueError, match=r"site 'y' .* has log_p = nan"):
        lightning_run.trainer().fit(LightningELBO(cases.regression, guide), DataLoader(bad, batch_size=8))


def test_without_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("lightning"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "pyro_elbo_ext.training.distributed.lightning")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'pyro_elbo_ext\[lightning\]'"):
        importlib.import_module("pyro_elbo_ext.training.distributed.lightning")


def unscaled(x: torch.Tensor, y: torch.Tensor) -> None:
    weights = pyro.sample("weights", dist.Normal(torch.zeros(3, dtype=x.dtype), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ weights, 1.0), obs=y)


def test_rows_that_do_not_count_once_are_an_error_before_the_first_step() -> None:
    wrong = [
        (unscaled, loader(), "observed site 'y' counts each of the"),
        (cases.regression, loader(12), "the batches have 4 to 12 rows, in the same order in every epoch"),
    ]
    for model, batches, said in wrong:
        pyro.clear_param_store()
        elbo = LightningELBO(model, AutoNormal(model), seed=1, example=next(iter(batches)))
        before = {name: value.clone() for name, value in elbo.state_dict().items()}
        with pytest.raises(ValueError, match=f"^{said}"):
            lightning_run.trainer().fit(elbo, batches)
        assert all(torch.equal(value, before[name]) for name, value in elbo.state_dict().items())
    pyro.clear_param_store()
    elbo = LightningELBO(cases.regression, AutoNormal(cases.regression), seed=1)
    lightning_run.trainer().fit(elbo, loader(12, shuffle=True))
