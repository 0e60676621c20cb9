"""vectorize_particles='vmap' in the objectives: the same estimators as the loop, and the loop where it cannot be."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import (
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    AutoStructured,
)
from torch import Tensor

from pyro_elbo_ext import ChiUpperBound, DecomposedELBO, ImportanceWeightedELBO, MultiSampleELBO
from pyro_elbo_ext.bounds.bounds import IWAE
from pyro_elbo_ext.particles import batched_draws
from pyro_elbo_ext.particles.batched_draws import Batch
from pyro_elbo_ext.training.guide_draws import draw_guide
from tests.bound_oracles import PROBLEMS
from tests.models import eight_schools
from tests.test_gradients import check_unbiased

X = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).float()


def logistic(x: Tensor, y: Tensor) -> None:
    """``x @ w`` is for one particle: inside a particle plate it means something else."""
    w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def reason_of(elbo: Any, model: Any, guide: Any) -> list[str | None]:
    return [batch.reason for batch in elbo._pairs(model, guide).batches.values()]


@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.name != "rejection"], ids=str)
@pytest.mark.parametrize("gradient", ["pathwise", "doubly_reparameterized", "score_function"])
def test_unbiased(problem: Any, gradient: Any) -> None:
    objective = MultiSampleELBO(IWAE(), 2, vectorize_particles="vmap", gradient=gradient, history=False)
    check_unbiased(problem, objective)
    assert reason_of(objective, problem.model, problem.guide) == [None]


OBJECTIVES = {
    "auto": lambda **options: DecomposedELBO(4, **options),
    "sampled": lambda **options: DecomposedELBO(4, kl="sampled", **options),
    "sticking the landing": lambda **options: DecomposedELBO(4, gradient="doubly_reparameterized", **options),
    "dreg": lambda **options: ImportanceWeightedELBO(4, gradient="doubly_reparameterized", **options),
    "vimco": lambda **options: ImportanceWeightedELBO(4, gradient="score_function", **options),
    "cubo": lambda **options: ChiUpperBound(2, 4, **options),
}


@pytest.mark.parametrize("make", OBJECTIVES.values(), ids=OBJECTIVES.keys())
@pytest.mark.parametrize(
    "autoguide", [AutoNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal, AutoStructured]
)
@pytest.mark.parametrize(
    ("model", "args"), [(eight_schools, ()), (logistic, (X, Y))], ids=["eight_schools", "logistic"]
)
def test_autoguides_give_the_looped_terms(make: Any, autoguide: Any, model: Any, args: tuple[Any, ...]) -> None:
    """Each particle's terms are those of guide and model run on that particle's draws alone; the value is made of them."""
    guide = autoguide(model)
    elbo, looped = make(vectorize_particles="vmap"), make()
    loss = elbo.loss_and_grads(model, guide, *args)
    looped.loss(model, guide, *args)
    assert reason_of(elbo, model, guide) == [None]
    assert list(elbo.last) == list(looped.last)
    for name, term in elbo.last.items():
        other = looped.last[name]
        assert (term.kind, term.kl_method, term.kl_reason, term.plates) == (
            other.kind,
            other.kl_method,
            other.kl_reason,
            other.plates,
        )
        if other.log_p is not None:
            assert term.log_p.numel() == other.log_p.numel()
    log_weights = elbo.last.log_weights
    assert log_weights.shape == (4,)
    assert log_weights.unique().numel() == 4
    if isinstance(elbo, MultiSampleELBO):
        sign = -1 if elbo.maximized else 1
        assert loss == pytest.approx(sign * elbo.bound.value(log_weights).item(), rel=1e-5)
        assert elbo.history.elbo[-1] == pytest.approx(log_weights.mean().item(), rel=1e-5)
    else:
        assert loss == pytest.approx(-elbo.last.elbo, rel=1e-5)
        if elbo.kl == "sampled":
            assert loss == pytest.approx(-log_weights.mean().item(), rel=1e-5)
    gradients = [parameter.grad for parameter in pyro.get_param_store()._params.values()]
    assert all(gradient is not None and gradient.isfinite().all() and gradient.any() for gradient in gradients)


def test_pyros_particle_plate_cannot_do_it() -> None:
    guide = AutoNormal(logistic)
    with pytest.raises((ValueError, RuntimeError)):
        RenyiELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1).loss(logistic, guide, X, Y)
    elbo = ImportanceWeightedELBO(4, vectorize_particles="vmap")
    elbo.loss(logistic, guide, X, Y)
    assert reason_of(elbo, logistic, guide) == [None]


def branching() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z if z > 0 else -z, 1.0), obs=torch.tensor(0.5))


@pytest.mark.parametrize("make", [OBJECTIVES["auto"], OBJECTIVES["dreg"]])
def test_the_loop_otherwise_and_it_is_said_once(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    guide = AutoNormal(branching)
    elbo, looped = make(vectorize_particles="vmap"), make()
    looped.loss(branching, guide)
    with caplog.at_level(logging.WARNING, logger="pyro_elbo_ext"):
        for _ in range(3):
            pyro.set_rng_seed(1)
            ours = elbo.loss_and_grads(branching, guide)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "one after the other" in caplog.text
    assert "branches on a drawn value" in caplog.text
    pyro.set_rng_seed(1)
    assert ours == looped.loss_and_grads(branching, guide)


def test_an_error_of_the_model_is_raised_as_the_loop_raises_it() -> None:
    def broken() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(float("nan")))

    guide = AutoNormal(broken)
    with pyro.validation_enabled(False), pytest.raises(ValueError, match=r"site 'x'.*nan"):
        ImportanceWeightedELBO(4, vectorize_particles="vmap").loss_and_grads(broken, guide)


def test_a_smaller_last_batch_and_a_subsample() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=5) as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z + x[i].sum(-1), 1.0), obs=y[i])

    def guide(x: Tensor, y: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(1.0))
        with pyro.plate("data", len(x), subsample_size=5):
            pyro.sample("z", dist.Normal(torch.zeros(()), scale))

    for gradient in ("pathwise", "doubly_reparameterized"):
        elbo = ImportanceWeightedELBO(4, vectorize_particles="vmap", gradient=gradient)  # type: ignore[arg-type]
        for size in (30, 11, 30):
            elbo.loss_and_grads(model, guide, X[:size], Y[:size])
            assert elbo.last is not None
            log_p = elbo.last["y"].log_p
            assert log_p is not None
            assert log_p.shape == (4, 5)
            assert elbo.last["y"].scale == pytest.approx(size / 5)
        assert reason_of(elbo, model, guide) == [None, None]


def test_one_random_state_and_no_draw_more_than_the_particles() -> None:
    guide = AutoNormal(eight_schools)
    Trace_ELBO().loss(eight_schools, guide)
    fresh, used = (ImportanceWeightedELBO(4, vectorize_particles="vmap") for _ in range(2))
    used.loss(eight_schools, guide)
    values = []
    for elbo in (fresh, used):  # the reference run and the check leave the random state as it was
        pyro.set_rng_seed(3)
        values.append((elbo.loss(eight_schools, guide), torch.rand(()).item()))
    assert values[0] == values[1]
    again = [pickle.loads(pickle.dumps(used)), copy.deepcopy(used)]
    for elbo in again:
        pyro.set_rng_seed(3)
        assert elbo.loss(eight_schools, guide) == values[0][0]


def test_svi_trains() -> None:
    guide = AutoNormal(logistic)
    elbo = ImportanceWeightedELBO(8, vectorize_particles="vmap", gradient="doubly_reparameterized")
    svi = SVI(logistic, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
    losses = [svi.step(X, Y) for _ in range(200)]
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])
    assert (guide.median(X, Y)["w"] > 0).all()


def test_a_guide_that_runs_with_the_model() -> None:
    guide = AutoNormalMessenger(eight_schools)
    for gradient in ("pathwise", "doubly_reparameterized", "score_function"):
        elbo = ImportanceWeightedELBO(4, vectorize_particles="vmap", gradient=gradient)  # type: ignore[arg-type]
        elbo.loss_and_grads(eight_schools, guide)
        assert reason_of(elbo, eight_schools, guide) == [None]


def test_a_parameter_of_the_model_under_an_upper_bound() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(pyro.param("prior", torch.tensor(0.0)), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.5))

    guide = AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), ChiUpperBound(2, 4, vectorize_particles="vmap"))
    with pytest.raises(ValueError, match="'prior'"):
        svi.step()
    hidden = poutine.block(model, hide_types=["param"])
    SVI(hidden, guide, pyro.optim.Adam({"lr": 0.05}), ChiUpperBound(2, 4, vectorize_particles="vmap")).step()


def test_many_draws_come_in_chunks_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    guide = AutoNormal(logistic)
    guide(X, Y)
    batch = Batch.start(logistic, guide, (X, Y), {}, None, lambda *_: None)
    numbers = (
        4 + 30 + 4 * 4
    )  # w and y of the model; loc, scale, auxiliary and w of the guide; not the indices of the plate
    monkeypatch.setattr(batched_draws, "NUMBERS_AT_ONCE", 4 * numbers)
    sizes = [size for _, _, size in batch.chunks(logistic, guide, (X, Y), {}, 10, 1000)]
    assert sizes == [4, 4, 2]
    assert [size for _, _, size in batch.chunks(logistic, guide, (X, Y), {}, 10, 3)] == [3, 3, 3, None]
    drawn = draw_guide(logistic, guide, (X, Y), {}, 10)
    assert drawn["w"].shape == (10, 4)
    assert len(drawn["w"].unique(dim=0)) == 10
    batch.reason = "it is tried"
    assert [size for _, _, size in batch.chunks(logistic, guide, (X, Y), {}, 3, 1000)] == [None] * 3
