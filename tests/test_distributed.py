"""Several processes: the same result as one with all batches together, the same errors everywhere, and none that hangs.

The processes are local, over gloo. One run of ``torchrun`` goes through the cases of ``distributed_cases``.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal

from pyro_elbo_ext import DecomposedELBO, History
from pyro_elbo_ext.training import processes
from pyro_elbo_ext.training.distributed.batch_shares import weights_of
from pyro_elbo_ext.training.distributed.svi import DistributedSVI
from tests import distributed_cases as cases
from tests import lost_processes

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TORCHRUN = ("--standalone", "--nproc-per-node", "2")
LIMIT = 240  # seconds for a subprocess, on a busy machine


def run_module(*command: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of every case, by process."""
    folder = tmp_path_factory.mktemp("two")
    run_module("torch.distributed.run", *TORCHRUN, "-m", "tests.distributed_cases", str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def compare(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    """Losses, parameters and the history are those of one process, to rounding, and alike in both."""
    assert two[0]["losses"] == two[1]["losses"]
    np.testing.assert_allclose(two[0]["losses"], one["losses"], rtol=1e-10)
    assert two[0]["parameters"].keys() == one["parameters"].keys()
    for name, value in one["parameters"].items():
        assert torch.equal(two[0]["parameters"][name], two[1]["parameters"][name])
        torch.testing.assert_close(two[0]["parameters"][name], value, rtol=1e-10, atol=1e-12)
    if "table" in one:
        pd.testing.assert_frame_equal(two[0]["table"], two[1]["table"], check_exact=True)
        pd.testing.assert_frame_equal(two[0]["table"], one["table"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "case",
    ["shared_auto_normal", "pyro_loss", "bound", "shared_plain_parameters", *cases.SINGLE],
)
def test_two_processes_equal_one(case: str, two: list[dict[str, Any]]) -> None:
    one = cases.run(cases.SINGLE.get(case, getattr(cases, case)))
    compare(one, [results[case] for results in two])


def test_one_process_equals_pyro() -> None:
    ours = cases.run(lambda: cases.auto_normal(seed=5))
    pyro.clear_param_store()
    guide, loss = cases.ready(AutoNormal(cases.regression)), DecomposedELBO(num_particles=2)
    svi = SVI(cases.regression, guide, pyro.optim.Adam({"lr": 0.05}), loss)
    streams = DistributedSVI(cases.regression, guide, pyro.optim.Adam({}), loss, seed=5).streams
    losses = []
    for step, index in enumerate(cases.batches(6)):
        torch.manual_seed(streams.seed_at(step))
        losses.append(svi.step(cases.X[index], cases.Y[index]))
    assert losses == ours["losses"]
    assert all(torch.equal(value, ours["parameters"][name]) for name, value in cases.parameters().items())


def test_a_guide_that_sets_itself_up_in_the_first_step(two: list[dict[str, Any]]) -> None:
    found = [results["lazy_auto_normal"]["parameters"] for results in two]
    assert len(found[0]) == 4
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_each_process_draws_for_itself(two: list[dict[str, Any]]) -> None:
    losses = []
    guide = cases.ready(AutoNormal(cases.regression))
    svi = DistributedSVI(cases.regression, guide, pyro.optim.Adam({}), DecomposedELBO(), seed=8)
    for rank in range(2):
        torch.manual_seed(svi.streams.seed_at(0, rank=rank))
        losses.append(DecomposedELBO().loss(cases.regression, guide, cases.X[: cases.BATCH], cases.Y[: cases.BATCH]))
    assert losses[0] != losses[1]
    for results in two:
        assert results["own_draws"]["loss"] == pytest.approx(np.mean(losses), rel=1e-12)
        assert results["own_draws"]["untouched"]


def test_resumed_run_equals_the_uninterrupted_one(two: list[dict[str, Any]]) -> None:
    for results in two:
        assert results["resumed"]["again"] == results["resumed"]["losses"]


def test_an_error_in_one_process_is_raised_in_all(two: list[dict[str, Any]]) -> None:
    expected = {
        "nan": "NotFinite: process 1 of 2 at step 2: observed site 'y' has NaN in 1 of 4 observations",
        "nan, evaluated": "NotFinite: process 1 of 2 at step 2: observed site 'y' has NaN in 1 of 4 observations",
        "nan, Pyro's loss": "NotFinite: process 1 of 2 at step 0: observed site 'y' has NaN in 1 of 4 observations",
        "in the model": "ValueError: process 1 of 2 at step 2: Shape mismatch inside plate('row') at site y",
        "size": "ValueError: plate 'row' has size 40, 41 in processes 0 to 1",
        "unscaled": "ValueError: site 'y' has other data in process 1 than in process 0, but its weight is 1",
        "plates": "ValueError: the batches of processes 0 to 1 have sizes 4, 5 in plate 'other' but 4, 4 in plate 'row'",
        "sites": "ValueError: processes 0 and 1 have different sites: extra",
        "parameters": "ValueError: parameter 'sized' is in process 0: shape (2,), in process 1: shape (3,)",
        "free bits": "ValueError: free_bits compares the kl_prior of a whole batch",
    }
    for results in two:
        found = results["errors"]
        assert found["errors"].keys() == expected.keys()
        for name, text in expected.items():
            assert found["errors"][name].startswith(text), found["errors"][name]
        assert found["unchanged"]
        assert math.isfinite(found["goes on"])


def test_infinite_gradient_changes_nothing(two: list[dict[str, Any]]) -> None:
    for results in two:
        assert "the gradient of parameter 'root' is not finite" in results["gradient"]["error"]
        assert results["gradient"]["root"] == 0


def test_fit_in_two_processes(two: list[dict[str, Any]]) -> None:
    found = [results["fitted"] for results in two]
    for kind in ("whole", "halved"):
        for name, value in found[0]["whole"]["parameters"].items():
            assert all(torch.equal(of[kind]["parameters"][name], value) for of in found)
        for table in ("table", "validation"):
            for of in found:
                pd.testing.assert_frame_equal(of[kind][table], found[0]["whole"][table], check_exact=True)
    assert len(found[0]["whole"]["validation"]) == 3
    assert found[0]["reason"] == found[1]["reason"] == "all 10 steps were taken"
    for of in found:
        assert "process 1 of 2 at step 1: observed site 'y' has NaN in 1 of 20 observations" in of["nan"]
        assert "argument 'y'" in of["nan"]


def test_decisions_and_files_are_those_of_process_0(two: list[dict[str, Any]]) -> None:
    for rank, results in enumerate(two):
        found = results["helpers"]
        assert (found["rank"], found["size"]) == (rank, 2)
        assert found["decision"] == {"stop": 0}
        assert found["done"] == 0
    assert two[0]["helpers"]["failed"] == "OSError: disk full"
    assert two[1]["helpers"]["failed"] == "RuntimeError: process 0 failed: OSError: disk full"


# ----------------------------------------------------------------------------------------------------------------------
# A process that is gone


@pytest.fixture(scope="module")
def lost(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What process 0 found, by how process 1 was lost."""
    folder = tmp_path_factory.mktemp("lost")
    run_module("tests.lost_processes", str(folder))
    return {way: torch.load(folder / f"{way}.pt", weights_only=False) for way in lost_processes.WAYS}


@pytest.mark.slow
@pytest.mark.parametrize(("way", "limit"), [("killed", 3.0), ("hangs", lost_processes.TIMEOUT + 3.0)])
def test_a_lost_process_ends_the_others_in_time(way: str, limit: float, lost: dict[str, dict[str, Any]]) -> None:
    found = lost[way]
    assert found["error"].startswith("process 0 of 2 has failed at the exchange of losses")
    assert found["seconds"] < limit
    assert found["same"]  # the parameters of the last whole step, for a checkpoint
    assert found["steps"] == lost_processes.LOST_AT


# ----------------------------------------------------------------------------------------------------------------------
# Weights and arguments


def test_weights_follow_the_sizes_of_batches() -> None:
    full = np.array([[100.0], [100.0], [100.0]])
    assert weights_of(["a"], np.array([[5.0], [3.0], [2.0]]), full).tolist() == [0.5, 0.3, 0.2]
    assert weights_of(["a"], np.array([[5.0], [5.0], [5.0]]), full).tolist() == [1 / 3] * 3
    assert weights_of([], np.zeros((4, 0)), np.zeros((4, 0))).tolist() == [0.25] * 4
    twice = np.array([[4.0, 8.0], [1.0, 2.0]])
    assert weights_of(["a", "b"], twice, np.full((2, 2), 50.0)).tolist() == [0.8, 0.2]


def test_single_process_helpers() -> None:
    assert not processes.is_distributed()
    assert (processes.rank(), processes.world_size(), processes.is_main()) == (0, 1, True)
    assert processes.from_main("x") == "x"
    assert processes.on_main(lambda: 3) == 3
    assert processes.gather_objects("x") == ["x"]
    with pytest.raises(ValueError, match="timeout must be a positive number"):
        processes.start(0.0)


def test_bad_arguments() -> None:
    guide = cases.ready(AutoNormal(cases.regression))
    optim = pyro.optim.Adam({"lr": 0.01})
    with pytest.raises(TypeError, match="has no differentiable_loss"):
        DistributedSVI(cases.regression, guide, optim, pyro.infer.ReweightedWakeSleep())
    with pytest.raises(TypeError, match="optim must be an optimizer"):
        DistributedSVI(cases.regression, guide, torch.optim.Adam, DecomposedELBO())
    loss = DecomposedELBO(2, history=History(gradient_snr="particles"))
    with pytest.raises(ValueError, match="gradients by particle"):
        DistributedSVI(cases.regression, guide, optim, loss)


def test_an_error_in_a_single_process_is_as_it_was() -> None:
    guide = cases.ready(AutoNormal(cases.regression))
    svi = DistributedSVI(cases.regression, guide, pyro.optim.Adam({"lr": 0.01}), DecomposedELBO())
    bad = cases.Y[:8].clone()
    bad[0] = math.nan
    with pyro.validation_enabled(False), pytest.raises(ValueError, match=r"^observed site 'y' has NaN"):
        svi.step(cases.X[:8], bad)


def test_gradient_noise_is_recorded() -> None:
    loss = DecomposedELBO(history=History(gradient_snr="steps"))
    guide = cases.ready(AutoNormal(cases.regression))
    svi = DistributedSVI(cases.regression, guide, pyro.optim.Adam({"lr": 0.01}), loss)
    cases.train(svi, 4)
    assert loss.history is not None
    assert set(loss.history.gradient_snr()["parameter"]) == set(cases.parameters())
