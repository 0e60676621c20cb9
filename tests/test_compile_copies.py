"""Copies and pickles of a used `CompiledSVI` train on as Pyro's do; several threads are refused."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import cloudpickle
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_elbo_ext import CompiledSVI, DecomposedELBO, ImportanceWeightedELBO, fit
from tests.models import through_origin as line

X = torch.linspace(-1.0, 1.0, 20)
HOW: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda of: pickle.loads(pickle.dumps(of)),
    "deepcopy": copy.deepcopy,
    "cloudpickle": lambda of: pickle.loads(cloudpickle.dumps(of)),
}


def free_guide(x: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor(0.0))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    pyro.sample("slope", dist.Normal(loc, scale))


def adam() -> Any:
    return pyro.optim.Adam({"lr": 0.1})  # type: ignore[attr-defined]


def compiled(*args: Any) -> CompiledSVI:
    return CompiledSVI(*args, backend="eager")


def values() -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in pyro.get_param_store()._params.items()}


def copied_and_trained(
    make: Any, how: str, guide: Any, loss: Any, clear: bool
) -> tuple[list[float], dict[str, Tensor], Any]:
    """Steps of an object, of its copy, with a new param store or not, and of itself again."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = make(line, AutoNormal(line) if guide is AutoNormal else guide, adam(), loss())
    losses = [svi.step(X) for _ in range(4)]
    other = HOW[how](svi)
    if clear:
        pyro.clear_param_store()
    losses += [other.step(X) for _ in range(4)]
    found = values()
    losses += [svi.step(X) for _ in range(4)]
    return losses, {**found, **{f"{name}, again": value for name, value in values().items()}}, other


@pytest.mark.parametrize("clear", [False, True], ids=["kept", "cleared"])
@pytest.mark.parametrize("how", HOW)
def test_copies_train_on_as_pyros(how: str, clear: bool) -> None:
    losses, parameters, _ = copied_and_trained(SVI, how, AutoNormal, Trace_ELBO, clear)
    ours, found, other = copied_and_trained(compiled, how, AutoNormal, Trace_ELBO, clear)
    assert ours == pytest.approx(losses, rel=1e-6)
    assert found.keys() == parameters.keys()
    for name, value in parameters.items():
        torch.testing.assert_close(found[name], value)
    assert other.is_traced(X)
    assert other.compile_time > 0


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("make", [adam, lambda: pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.9})])
def test_copies_go_on_with_parameters_of_the_store(how: str, make: Callable[[], Any]) -> None:
    # Pyro's SVI cannot be pickled with them; a copy of ours goes on where it was
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = SVI(line, free_guide, make(), Trace_ELBO())
    losses, parameters = [svi.step(X) for _ in range(8)], values()
    ours, found, _ = copied_and_trained(
        lambda *of: compiled(*of[:2], make(), of[3]), how, free_guide, Trace_ELBO, False
    )
    assert ours[:8] == pytest.approx(losses, rel=1e-6)
    for name, value in parameters.items():
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("loss", [DecomposedELBO, lambda: ImportanceWeightedELBO(3)], ids=["ELBO", "IWAE"])
def test_copies_of_what_holds_it(how: str, loss: Callable[[], Any]) -> None:
    pyro.clear_param_store()
    objective = loss()
    svi = compiled(line, AutoNormal(line), adam(), objective)
    for _ in range(3):
        svi.step(X)
    svi.evaluate_loss(X)
    (other,) = HOW[how]([svi])
    assert other.objective is not objective
    assert other.objective.num_steps == 3
    assert other.objective.loss == other.loss  # bound to the same copy
    other.step(X)
    other.step(X)
    assert (other.objective.num_steps, objective.num_steps) == (5, 3)
    assert len(other.objective.history) == 5
    alone = HOW[how](objective)
    assert alone.num_steps == 3


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_copies_of_results(how: str) -> None:
    pyro.clear_param_store()
    result = fit(line, AutoNormal(line), X, num_steps=20, compiled={"backend": "eager"}, progress=False, seed=0)
    other = HOW[how](result)
    assert other.num_steps == 20
    for name, value in result.parameters.items():
        assert torch.equal(other.parameters[name], value)


@pytest.mark.parametrize("how", ["deepcopy"])
def test_a_copy_tries_again_what_failed_here(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyro_elbo_ext.compile.machine_code import step_graph

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    pyro.clear_param_store()
    svi = CompiledSVI(line, AutoNormal(line), adam(), Trace_ELBO(), backend="eager", fallback=True)
    with monkeypatch.context() as here:
        here.setattr(step_graph, "make_fx", fail)
        svi.step(X)
        svi.step(X)
    assert svi.eager_reason is not None
    other = HOW[how](svi)
    other.step(X)
    other.step(X)
    assert other.eager_reason is None
    assert other.is_traced(X)


# ----------------------------------------------------------------------------------------------------------------------
# Threads


class Waits:
    """A model that waits in its first run, in a thread, until it is told to go on."""

    def __init__(self) -> None:
        self.is_in, self.go_on = threading.Event(), threading.Event()

    def __call__(self, x: Tensor) -> None:
        if threading.current_thread() is not threading.main_thread():
            self.is_in.set()
            assert self.go_on.wait(60)
        line(x)


def meanwhile(model: Waits, work: Callable[[], Any], here: Callable[[], Any]) -> Any:
    """What ``work`` in a thread gives, while ``here`` is tried in this one."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    try:
        assert model.is_in.wait(60)
        here()
    finally:
        model.go_on.set()
        thread.join()
    return results[0]


@pytest.mark.parametrize("call", [lambda svi: svi.step(X), lambda svi: svi.run(2, X), lambda svi: svi.evaluate_loss(X)])
def test_a_second_thread_is_refused(call: Callable[[Any], Any]) -> None:
    pyro.clear_param_store()
    model = Waits()
    svi = compiled(model, free_guide, adam(), Trace_ELBO())

    def refused() -> None:
        with pytest.raises(RuntimeError, match="another thread is in a step of this CompiledSVI"):
            call(svi)

    loss = meanwhile(model, lambda: svi.step(X), refused)
    assert loss > 0
    assert svi.step(X) > 0  # and goes on in this one
    assert svi.is_traced(X)


def test_a_second_fit_is_refused() -> None:
    pyro.clear_param_store()
    model = Waits()

    def refused() -> None:
        with pytest.raises(RuntimeError, match="another thread is in fit"):
            fit(line, AutoNormal(line), X, num_steps=2, progress=False)

    def work() -> Any:
        return fit(model, free_guide, X, num_steps=3, compiled=False, progress=False, seed=0)

    assert meanwhile(model, work, refused).num_steps == 3
    assert fit(line, free_guide, X, num_steps=2, compiled=False, progress=False).num_steps == 2
