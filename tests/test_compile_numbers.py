"""Floats among the arguments are inputs of the graph where the program lets them, with Pyro's numbers and dtypes."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from torch import Tensor

from pyro_elbo_ext import CompiledSVI, DecomposedELBO
from pyro_elbo_ext.compile import programs

Y = torch.tensor([1.0, 4.0, -2.0, 0.5, 8.0])


def annealed(y: Tensor, beta: float) -> None:
    """As in Pyro's dmm example, and with numbers among numbers."""
    with poutine.scale(scale=beta):
        z = pyro.sample("z", dist.Normal(0.0, 1.0 + beta))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(z * beta + beta**2 / 3 - 1, 2 / (1 + beta)), obs=y)


def counted(y: Tensor, beta: float) -> None:
    """A float beside integers takes the default dtype."""
    z = pyro.sample("z", dist.Normal(torch.arange(1) * beta, 1.0).to_event(1))
    pyro.sample(
        "y", dist.Normal(z + torch.tensor(beta) + y.new_tensor(1.0) * beta, 1.0).expand(y.shape).to_event(1), obs=y
    )


def branching(y: Tensor, beta: float) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    mean = z if beta > 0.45 else -z
    pyro.sample("y", dist.Normal(mean, 1.0 + beta).expand(y.shape).to_event(1), obs=y)


def by_math(y: Tensor, beta: float) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z + math.exp(beta), 1.0).expand(y.shape).to_event(1), obs=y)


def by_type(y: Tensor, beta: float) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    mean = z + 3 if isinstance(beta, float) else z
    pyro.sample("y", dist.Normal(mean, 1.0 + beta).expand(y.shape).to_event(1), obs=y)


def by_name(y: Tensor, beta: float) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample(f"y_{beta}", dist.Normal(z, 1.0).expand(y.shape).to_event(1), obs=y)


def steps(make: Any, model: Any, data: Tensor, kind: Any = float, loss: Any = Trace_ELBO) -> tuple[list[float], Any]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = make(model, AutoDelta(model), pyro.optim.Adam({"lr": 0.05}), loss())  # type: ignore[attr-defined]
    losses = [svi.step(data, kind(0.1 + i / 10)) for i in range(3, 6)]
    losses.append(svi.evaluate_loss(data, kind(0.05)))
    if isinstance(svi, CompiledSVI):
        losses += svi.run(2, data, kind(0.25), progress=False).tolist()
    else:
        losses += [svi.step(data, kind(0.25)) for _ in range(2)]
    dtypes = [p.dtype for p in pyro.get_param_store()._params.values()]
    return losses, (svi, dtypes)


def by_operator(*args: Any) -> CompiledSVI:
    return CompiledSVI(*args, backend="eager", steps_per_call=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("model", [annealed, counted])
def test_floats_are_inputs(model: Any, dtype: torch.dtype) -> None:
    for kind in (float, np.float64):
        for loss in (DecomposedELBO,) if kind is float else (Trace_ELBO,):
            expected, (_, dtypes) = steps(SVI, model, Y.to(dtype), kind, loss)
            ours, (svi, found) = steps(by_operator, model, Y.to(dtype), kind, loss)
            tolerance = 1e-5 if dtype is torch.float32 or loss is not Trace_ELBO else 1e-7
            assert ours == pytest.approx(expected, rel=tolerance, nan_ok=True)
            assert found == dtypes
            assert len(svi._programs) == 1


@pytest.mark.parametrize("model", [branching, by_math, by_type, by_name])
def test_floats_that_the_program_needs_are_constants(model: Any) -> None:
    expected, _ = steps(SVI, model, Y)
    ours, (svi, _) = steps(by_operator, model, Y)
    assert ours == pytest.approx(expected, rel=1e-5)
    assert len(svi._programs) == 5


def test_machine_code_takes_floats() -> None:
    expected, _ = steps(SVI, annealed, Y)
    ours, (svi, _) = steps(CompiledSVI, annealed, Y)
    assert ours == pytest.approx(expected, rel=1e-5, nan_ok=True)
    assert len(svi._programs) == 1


def test_the_argument_that_varies_is_named_and_programs_are_dropped(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "MOST_KEPT", 5)
    pyro.clear_param_store()
    svi = by_operator(branching, AutoDelta(branching), pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING, "pyro_elbo_ext"):
        for i in range(10):
            svi.step(Y, 0.5 + i)
    messages = [record.getMessage() for record in caplog.records]
    assert any("argument 'beta'" in message and "tensor" in message for message in messages)
    assert len(messages) == 1
    assert len(svi._programs) == 5
