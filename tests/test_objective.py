"""The drop-in contract: what Pyro's SVI, ELBOModule, settings, pickle and copy expect of an ELBO."""

from __future__ import annotations

import copy
import gc
import inspect
import math
import pickle
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.forecast import forecaster
from pyro.infer import ELBO, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.infer.elbo import ELBOModule
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_elbo_ext import (
    ChiUpperBound,
    CompiledSVI,
    DecomposedELBO,
    History,
    ImportanceWeightedELBO,
    RenyiELBO,
    ThermodynamicELBO,
)
from pyro_elbo_ext.objectives.per_pair import PerPair


def model(x: torch.Tensor | None = None) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 0.5), obs=torch.tensor(2.0) if x is None else x)


def guide(x: torch.Tensor | None = None) -> None:
    loc = pyro.param("loc", torch.tensor(0.3))
    pyro.sample("z", dist.Normal(loc, pyro.param("scale", torch.tensor(0.7), constraint=dist.constraints.positive)))


def deep_model() -> None:
    with pyro.plate("a", 2, dim=-2), pyro.plate("b", 3, dim=-1):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def deep_guide() -> None:
    with pyro.plate("a", 2, dim=-2), pyro.plate("b", 3, dim=-1):
        pyro.sample("z", dist.Normal(pyro.param("l", torch.tensor(0.3)), 1.0))


def svi(objective: ELBO, model: Any = model, guide: Any = guide) -> SVI:
    return SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), objective)


def test_arguments_are_those_of_elbo_in_the_same_order() -> None:
    theirs = list(inspect.signature(ELBO.__init__).parameters.values())
    ours = list(inspect.signature(DecomposedELBO.__init__).parameters.values())
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [(p.name, p.default) for p in theirs]
    assert [p.name for p in ours[len(theirs) :]] == ["kl", "kl_weight", "free_bits", "gradient", "history"]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])
    elbo = DecomposedELBO(3, 2, None, True)
    assert (elbo.num_particles, elbo.vectorize_particles, elbo.max_plate_nesting) == (3, True, 3)
    assert DecomposedELBO(1, 2, None, True).max_plate_nesting == 2
    with pytest.raises(TypeError, match="num_particle'"):
        DecomposedELBO(num_particle=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="num_particles"):
        DecomposedELBO(1, num_particles=3)


def test_losses_are_plain_numbers() -> None:
    elbo = DecomposedELBO()
    assert type(elbo.loss(model, guide)) is float
    assert type(elbo.loss_and_grads(model, guide)) is float
    assert type(svi(elbo).step()) is float
    assert type(svi(elbo).evaluate_loss()) is float
    differentiable = elbo.differentiable_loss(model, guide)
    assert differentiable.shape == ()
    assert differentiable.requires_grad


def test_guide_runs_once_model_runs_once_and_nothing_else_is_drawn() -> None:
    runs: list[str] = []

    def counted_model() -> None:
        runs.append("model")
        model()

    def counted_guide() -> None:
        runs.append("guide")
        guide()

    for kl in ("auto", "sampled", "analytic"):
        elbo = DecomposedELBO(kl=kl)  # type: ignore[arg-type]
        for _ in range(2):  # the first evaluation tracks dependencies
            runs.clear()
            pyro.set_rng_seed(4)
            elbo.loss_and_grads(counted_model, counted_guide)
            ours = torch.rand(())
            assert runs == ["guide", "model"]
            pyro.set_rng_seed(4)
            Trace_ELBO().loss(model, guide)
            assert torch.rand(()) == ours


def test_history_and_last() -> None:
    elbo = DecomposedELBO()
    assert elbo.last is None
    assert elbo.history is not None
    assert len(elbo.history) == 0
    steps = [svi(elbo).step() for _ in range(5)]
    frame = elbo.history.to_dataframe()
    columns = [
        "step",
        "site",
        "kind",
        "log_p",
        "log_q",
        "reconstruction",
        "kl_prior",
        "kl_method",
        "kl_reason",
        "scale",
    ]
    assert list(frame.columns) == columns
    assert len(frame) == 10
    by_step = frame.groupby("step")[["reconstruction", "kl_prior"]].sum()
    assert (by_step.reconstruction - by_step.kl_prior).to_list() == pytest.approx([-loss for loss in steps])
    assert elbo.last is not None
    assert elbo.last.elbo == pytest.approx(-steps[-1], rel=1e-5)
    elbo.loss(model, guide)  # an evaluation is not a step
    assert len(elbo.history) == 5
    assert list(elbo.last) == ["z", "x"]
    assert elbo.last["z"].kind == "latent"
    assert elbo.last["x"].reconstruction is not None
    assert elbo.last["x"].kl_prior is None
    assert "kl_prior" in repr(elbo.last)
    assert "<table" in elbo.last._repr_html_()


def test_history_off_or_given() -> None:
    elbo = DecomposedELBO(history=False)
    svi(elbo).step()
    assert elbo.history is None
    mine = History(max_steps=10)
    elbo = DecomposedELBO(history=mine)
    svi(elbo).step()
    assert elbo.history is mine
    assert len(mine) == 1


def test_kl_weight_and_schedule() -> None:
    seen: list[int] = []

    def schedule(step: int) -> float:
        seen.append(step)
        return min(1.0, step / 4)

    elbo = DecomposedELBO(kl_weight=schedule)
    losses = [svi(elbo).step() for _ in range(6)]
    assert seen == list(range(6))
    assert elbo.history is not None
    table = elbo.history.to_dataframe(by="step")
    assert table.kl_weight.to_list() == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert table.objective.to_list() == pytest.approx([-loss for loss in losses])
    expected = table.reconstruction - table.kl_weight * table.kl_prior
    assert table.objective.to_list() == pytest.approx(expected.to_list())
    assert table.elbo.to_list() == pytest.approx((table.reconstruction - table.kl_prior).to_list())


@pytest.mark.parametrize("kl", ["auto", "sampled"])
def test_kl_weight_scales_the_gradient_of_the_kl_alone(kl: Any) -> None:
    def gradient(weight: float) -> torch.Tensor:
        pyro.clear_param_store()
        guide()
        pyro.set_rng_seed(7)
        DecomposedELBO(kl=kl, kl_weight=weight).loss_and_grads(model, guide)
        return torch.stack([p.grad.clone() for p in pyro.get_param_store()._params.values()])

    none, half, full = gradient(0.0), gradient(0.5), gradient(1.0)
    torch.testing.assert_close(half, (none + full) / 2)
    assert not torch.allclose(none, full)


def test_guessed_nesting_does_not_stick() -> None:
    elbo = DecomposedELBO(num_particles=2, vectorize_particles=True)
    elbo.loss_and_grads(model, guide)
    elbo.loss_and_grads(deep_model, deep_guide)
    elbo.loss_and_grads(model, guide)
    assert elbo.max_plate_nesting == float("inf")
    pyro.set_rng_seed(1)
    elbo.loss(deep_model, deep_guide)
    after = torch.rand(())
    pyro.set_rng_seed(1)
    Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=2).loss(deep_model, deep_guide)
    assert torch.rand(()) == after


@pytest.mark.parametrize("kind", [DecomposedELBO, ImportanceWeightedELBO, RenyiELBO, ChiUpperBound, ThermodynamicELBO])
@pytest.mark.parametrize(("vectorize", "expected"), [(False, 2), (True, 3), ("vmap", 2)])
def test_guess_that_a_caller_asks_for_is_stored(kind: Any, vectorize: Any, expected: int) -> None:
    """As Pyro's is: with one more than the plates if the particles have a plate."""
    elbo = kind(num_particles=2, vectorize_particles=vectorize)
    elbo._guess_max_plate_nesting(deep_model, deep_guide, (), {})
    assert elbo.max_plate_nesting == expected
    if vectorize != "vmap":
        of_pyro = Trace_ELBO(num_particles=2, vectorize_particles=vectorize)
        of_pyro._guess_max_plate_nesting(deep_model, deep_guide, (), {})
        assert of_pyro.max_plate_nesting == expected
    assert math.isfinite(elbo.loss_and_grads(deep_model, deep_guide))


class Trend(forecaster.ForecastingModel):  # type: ignore[misc]
    def model(self, zero_data: torch.Tensor, covariates: torch.Tensor) -> None:
        weight = pyro.sample("weight", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0).expand([1]).to_event(1))
        self.predict(dist.Normal(0.0, scale.unsqueeze(-2)), weight.unsqueeze(-2) * covariates)


TIME = torch.linspace(0.0, 1.0, 8).unsqueeze(-1)


@pytest.mark.parametrize("options", [{}, {"warm_start": True}, {"dct_gradients": True}], ids=str)
def test_forecaster(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Pyro's Forecaster asks for the guess and reads it; under the same seed the losses are those with Pyro's ELBO."""

    def losses(elbo: Any) -> list[float]:
        monkeypatch.setattr(forecaster, "Trace_ELBO", elbo)
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        trained = forecaster.Forecaster(Trend(), TIME[:6] ** 2, TIME[:6], num_steps=3, log_every=0, **options)
        assert trained.max_plate_nesting == 1
        assert len(trained(TIME[:6] ** 2, TIME, num_samples=2)) == 2
        return list(trained.losses)

    expected = losses(Trace_ELBO)
    assert losses(partial(DecomposedELBO, kl="sampled")) == pytest.approx(expected, rel=1e-6)
    assert all(map(math.isfinite, losses(DecomposedELBO)))


def test_forecaster_whose_particles_share_their_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its particles lie along a dim of their own, and the data beside it: Pyro counts them twice."""
    monkeypatch.setattr(forecaster, "Trace_ELBO", DecomposedELBO)
    with pytest.raises(ValueError, match=r"at site 'residual', (.|\n)* counts elements several times"):
        forecaster.Forecaster(Trend(), TIME[:6] ** 2, TIME[:6], num_steps=3, log_every=0, num_particles=2)


def test_elbo_module_trains_with_local_parameters() -> None:
    class Model(PyroModule):
        def forward(self) -> None:
            model()

    class Guide(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.loc = PyroParam(torch.tensor(0.0))
            self.net = nn.Linear(1, 1)

        def forward(self) -> None:
            shift = self.net(torch.ones(1)).squeeze(-1)
            pyro.sample("z", dist.Normal(self.loc + shift, 0.447))

    with pyro.settings.context(module_local_params=True):
        elbo = DecomposedELBO(num_particles=4)
        module = elbo(Model(), Guide())
        assert isinstance(module, ELBOModule)
        module()
        optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
        for _ in range(300):
            optimizer.zero_grad()
            module().backward()
            optimizer.step()
        mean = module.guide.loc + module.guide.net(torch.ones(1))
    assert mean.item() == pytest.approx(1.6, abs=0.15)  # the posterior's mean
    assert elbo.history is not None
    assert len(elbo.history) == 301


def test_retain_graph() -> None:
    objective = DecomposedELBO(retain_graph=True)
    held: list[torch.Tensor] = []

    def holding_guide() -> None:
        loc = pyro.param("loc", torch.tensor(0.3)) * 2
        held.append(loc)
        pyro.sample("z", dist.Normal(loc, 1.0))

    objective.loss_and_grads(model, holding_guide)
    held[-1].backward()  # the graph is still there


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda elbo: pickle.loads(pickle.dumps(elbo))], ids=["deepcopy", "pickle"]
)
def test_copies_are_equal_and_independent(duplicate: Callable[[DecomposedELBO], DecomposedELBO]) -> None:
    elbo = DecomposedELBO(num_particles=2, kl_weight=0.5)
    for _ in range(3):
        svi(elbo).step()
    twin = duplicate(elbo)
    assert elbo.history is not None
    assert twin.history is not None
    assert twin.history.to_dataframe().equals(elbo.history.to_dataframe())
    svi(twin).step()
    assert (len(elbo.history), len(twin.history)) == (3, 4)
    assert twin.history.steps[-1] == 3


def test_nothing_keeps_the_graph_or_the_trace() -> None:
    values: list[weakref.ref[torch.Tensor]] = []

    def watched_guide() -> None:
        loc = pyro.param("loc", torch.tensor(0.3)) * 1.0
        values.append(weakref.ref(loc))
        pyro.sample("z", dist.Normal(loc, 1.0))

    for kl in ("auto", "sampled"):
        elbo = DecomposedELBO(kl=kl)  # type: ignore[arg-type]
        elbo.loss_and_grads(model, watched_guide)
        gc.collect()
        assert values[-1]() is None
        assert elbo.last is not None
        for found in elbo.last.values():
            tensors = [found.log_p, found.log_q, found.kl_prior, found.analytic_kl_prior]
            assert not any(t.requires_grad for t in tensors if t is not None)


def test_one_read_from_the_device_per_step() -> None:
    class CountReads(TorchDispatchMode):
        reads = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.reads += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    def wide() -> None:
        for i in range(10):
            pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))

    autoguide = AutoNormal(wide)
    with pyro.validation_enabled(False):
        for kl in ("auto", "sampled"):
            elbo = DecomposedELBO(kl=kl, num_particles=2)  # type: ignore[arg-type]
            elbo.loss_and_grads(wide, autoguide)
            with CountReads() as counted:
                elbo.loss_and_grads(wide, autoguide)
            assert counted.reads == 0  # the transfer of all scalars together is a copy, not a read of a scalar


def test_no_new_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kl in ("auto", "sampled", "analytic"):
            svi(DecomposedELBO(kl=kl)).step()  # type: ignore[arg-type]


def test_works_without_gradients_and_without_parameters() -> None:
    def fixed_guide() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    elbo = DecomposedELBO()
    assert elbo.loss_and_grads(model, fixed_guide) == -elbo.history.elbo[-1]  # type: ignore[union-attr]
    with torch.no_grad():
        assert not elbo.differentiable_loss(model, guide).requires_grad


def test_mixed_precision_terms() -> None:
    def double_model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        pyro.sample("x", dist.Poisson(z.float().exp()), obs=torch.tensor(2.0))

    autoguide = AutoNormal(double_model)
    pyro.set_rng_seed(1)
    autoguide()
    pyro.set_rng_seed(2)
    expected = Trace_ELBO().loss(double_model, autoguide)
    pyro.set_rng_seed(2)
    assert DecomposedELBO(kl="sampled").loss(double_model, autoguide) == pytest.approx(expected, rel=1e-6)


def test_bound_methods_and_partials_as_programs() -> None:
    class Programs:
        def model(self) -> None:
            model()

        def guide(self) -> None:
            guide()

    programs = Programs()
    pairs: PerPair[list[int]] = PerPair(list)
    assert pairs(programs.model, programs.guide) is pairs(programs.model, programs.guide)
    assert pairs(programs.model, programs.guide) is not pairs(Programs().model, programs.guide)
    elbo = DecomposedELBO()
    svi(elbo, programs.model, programs.guide).step()


def test_pairs_do_not_outlive_their_programs() -> None:
    pairs: PerPair[list[int]] = PerPair(list)

    def make() -> Callable[[], None]:
        return lambda: None

    for _ in range(5):
        pairs(make(), make())
    pairs(model, guide)
    assert len(pairs._entries) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda() -> None:
    def cuda_model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros((), device="cuda"), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=torch.tensor(2.0, device="cuda"))
        pyro.factor("host", torch.tensor(0.5))

    autoguide = AutoNormal(cuda_model)
    elbo = DecomposedELBO()
    svi(elbo, cuda_model, autoguide).step()
    assert elbo.last is not None
    assert elbo.last["z"].log_p is not None
    assert elbo.last["z"].log_p.is_cuda


def test_what_is_printed_says_what_it_is() -> None:
    assert repr(DecomposedELBO()) == "DecomposedELBO(kl='auto', num_particles=1, gradient='pathwise')"
    svi = CompiledSVI(oracle_model, oracle_guide, pyro.optim.Adam({"lr": 0.1}), DecomposedELBO())
    assert repr(svi) == f"CompiledSVI(oracle_model, oracle_guide, PyroOptim, {DecomposedELBO()!r}): compiled"
    elbo = DecomposedELBO(kl="sampled")
    elbo.loss(oracle_model, oracle_guide)
    assert elbo.last is not None
    term = elbo.last["z"]
    assert term.kl_prior is not None
    said = repr(term)
    assert said.startswith("Term('z', latent; log_p=")
    assert f"kl_prior={term.kl_prior.item():.4f}; sampled: " in said


def oracle_model() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))


def oracle_guide() -> None:
    pyro.sample("z", dist.Normal(0.5, 1.0))
