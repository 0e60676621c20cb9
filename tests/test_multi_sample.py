"""Bounds of several particles as objectives: parity with Pyro's, where the bound is taken, scales, what is recorded."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoGuideList,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
)
from pyro.infer.elbo import ELBOModule
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

from pyro_elbo_ext import (
    ChiUpperBound,
    DecomposedELBO,
    History,
    ImportanceWeightedELBO,
    MultiSampleELBO,
    RenyiELBO,
    ThermodynamicELBO,
)
from pyro_elbo_ext.bounds.bounds import CUBO, ELBO, IWAE, TVO, Bound, Renyi
from tests.models import eight_schools, vectors
from tests.oracles import DATA, PROBLEMS, _exact_plated
from tests.test_gradients import BOUNDS
from tests.test_parity import AUTOGUIDES, evaluate

ALPHAS = [0, 0.5, 2, -1]
NONLINEAR = [bound for bound in BOUNDS if not bound.linear]
BY_NAME = {problem.name: problem for problem in PROBLEMS}
STANDARD_ERRORS = 4.5


def log_weights_by_element(objective: MultiSampleELBO, *sites: str) -> Tensor:
    """log p - log q of the last evaluation's sites (default: all), summed with broadcasting, in float64."""
    assert objective.last is not None
    total: Any = 0.0
    for name, term in objective.last.items():
        if not sites or name in sites:
            for value, sign in ((term.log_p, 1.0), (term.log_q, -1.0)):
                total = total + (0.0 if value is None else sign * value.double())
    return total


# ----------------------------------------------------------------------------------------------------------------------
# Parity with pyro.infer.RenyiELBO


def assert_same_as_pyro(
    model: Callable[..., Any], guide: Callable[..., Any], alpha: float, *args: Any, **options: Any
) -> MultiSampleELBO:
    """Compare value and gradients under one seed, with all parameters made beforehand."""
    pyro.infer.Trace_ELBO().loss(model, guide, *args)
    parameters = list(pyro.get_param_store()._params.values())
    expected_loss, expected = evaluate(pyro.infer.RenyiELBO(alpha=alpha, **options), model, guide, parameters, *args)
    objectives: list[MultiSampleELBO] = [RenyiELBO(alpha, **options)]
    if alpha == 0:
        objectives.append(ImportanceWeightedELBO(**options))
    for objective in objectives:
        loss, gradients = evaluate(objective, model, guide, parameters, *args)
        assert loss == pytest.approx(expected_loss, rel=2e-6, abs=1e-5)
        pyro.set_rng_seed(1)
        assert objective.loss(model, guide, *args) == loss
        for name, ours, theirs in zip(pyro.get_param_store()._params, gradients, expected, strict=True):
            if theirs is None or ours is None:
                assert theirs is None or not theirs.any(), name
                assert ours is None or not ours.any(), name
            else:
                torch.testing.assert_close(
                    ours, theirs, rtol=5e-5, atol=5e-5, msg=lambda text, name=name: f"{name}: {text}"
                )
    return objectives[0]


def local_rows() -> None:
    """Every site is in the plate of rows, some in a plate of columns too."""
    with pyro.plate("rows", 3, dim=-2):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("columns", 4, dim=-1):
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(b, 1.0), obs=torch.arange(12.0).reshape(3, 4) / 6)


def local_positive() -> None:
    with pyro.plate("data", 5):
        z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=torch.arange(5.0))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("autoguide", AUTOGUIDES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("model", [eight_schools, vectors], ids=lambda fn: fn.__name__)
def test_autoguides(model: Callable[[], None], autoguide: Any, alpha: float) -> None:
    assert_same_as_pyro(model, autoguide(model), alpha, num_particles=3)


def test_autoguide_list() -> None:
    guide = AutoGuideList(eight_schools)
    guide.append(AutoNormal(poutine.block(eight_schools, expose=["mu", "tau"])))
    guide.append(AutoDiagonalNormal(poutine.block(eight_schools, expose=["z"])))
    assert_same_as_pyro(eight_schools, guide, 0.5, num_particles=3)


UNSCALED = ["gaussian", "lognormal", "masked prior", "delta", "chain, guide forward", "chain, guide backward", "plated"]


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("num_particles", [1, 2, 7])
@pytest.mark.parametrize("name", UNSCALED)
def test_hand_written_guides(name: str, num_particles: int, alpha: float) -> None:
    problem = BY_NAME[name]
    objective = assert_same_as_pyro(problem.model, problem.guide, alpha, num_particles=num_particles)
    assert objective.last is not None
    assert objective.last.num_particles == num_particles


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("name", UNSCALED)
def test_vectorized_hand_written_guides(name: str, alpha: float) -> None:
    problem = BY_NAME[name]
    nesting = 1 if name == "plated" else 0
    assert_same_as_pyro(
        problem.model, problem.guide, alpha, num_particles=4, vectorize_particles=True, max_plate_nesting=nesting
    )


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("options", [{}, {"vectorize_particles": True, "max_plate_nesting": 1}], ids=str)
@pytest.mark.parametrize("model", [eight_schools, local_positive], ids=lambda fn: fn.__name__)
def test_vectorized_autoguides(model: Callable[[], None], options: dict[str, Any], alpha: float) -> None:
    assert_same_as_pyro(model, AutoNormal(model), alpha, num_particles=6, **options)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("options", [{}, {"vectorize_particles": True, "max_plate_nesting": 2}], ids=str)
def test_every_site_in_a_plate(options: dict[str, Any], alpha: float) -> None:
    objective = assert_same_as_pyro(local_rows, AutoNormal(local_rows), alpha, num_particles=4, **options)
    loss = objective.loss(local_rows, AutoNormal(local_rows))
    inner = log_weights_by_element(objective, "b", "x").sum(-1, keepdim=True)
    by_row = log_weights_by_element(objective, "a").reshape(inner.shape) + inner
    assert loss == pytest.approx(-Renyi(alpha).value(by_row).sum().item(), rel=1e-5)


def test_global_auxiliary_draw_takes_the_bound_out_of_the_plate() -> None:
    """AutoMultivariateNormal draws all rows at once: there is one weight for the whole program. (Pyro keeps the plate.)"""
    guide = AutoMultivariateNormal(local_positive)
    objective = ImportanceWeightedELBO(4)
    loss = objective.loss(local_positive, guide)
    assert objective.last is not None
    assert loss == pytest.approx(-IWAE().value(objective.last.log_weights).item(), rel=1e-5)


def test_trains_as_with_pyro() -> None:
    def fit(objective: Any) -> dict[str, Tensor]:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AutoNormal(eight_schools)
        svi = SVI(eight_schools, guide, pyro.optim.Adam({"lr": 0.02}), objective)
        for _ in range(20):
            svi.step()
        return guide.median()

    expected = fit(pyro.infer.RenyiELBO(0.5, 3))
    for ours in (RenyiELBO(0.5, 3), MultiSampleELBO(Renyi(0.5), 3)):
        for name, value in fit(ours).items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-4)


def test_arguments_of_renyi_are_pyros_in_the_same_order() -> None:
    theirs = list(inspect.signature(pyro.infer.RenyiELBO.__init__).parameters.values())
    ours = list(inspect.signature(RenyiELBO.__init__).parameters.values())
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [(p.name, p.default) for p in theirs]
    assert [p.kind for p in ours[len(theirs) :]] == [inspect.Parameter.VAR_KEYWORD]
    objective = RenyiELBO(0.5, 3, 1, None, True, False)
    assert objective.alpha == 0.5
    assert (objective.num_particles, objective.max_plate_nesting, objective.vectorize_particles) == (3, 2, True)
    assert not objective.strict_enumeration_warning


def test_arguments_after_the_bound_are_those_of_elbo() -> None:
    theirs = [p for p in inspect.signature(pyro.infer.ELBO.__init__).parameters.values() if p.name != "self"]
    ours = list(inspect.signature(MultiSampleELBO.__init__).parameters.values())[2:]
    assert [p.name for p in ours[: len(theirs)]] == [p.name for p in theirs]
    assert [p.name for p in ours[len(theirs) :]] == ["gradient", "local_plates", "history"]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])


@pytest.mark.parametrize(
    ("objective", "bound"),
    [
        (ImportanceWeightedELBO(4), IWAE()),
        (RenyiELBO(0.3, 4), Renyi(0.3)),
        (RenyiELBO(-1, 4), Renyi(-1)),
        (ChiUpperBound(3, 4), CUBO(3)),
        (ThermodynamicELBO([0.0, 0.5, 1.0], 4), TVO((0.0, 0.5, 1.0))),
        (ThermodynamicELBO(num_particles=4, side="upper"), TVO(side="upper")),
    ],
    ids=lambda value: str(value) if isinstance(value, Bound) else type(value).__name__,
)
def test_named_objectives_and_the_sign_of_the_loss(objective: MultiSampleELBO, bound: Bound) -> None:
    problem = BY_NAME["gaussian"]
    assert objective.bound == bound
    assert objective.num_particles == 4
    loss = objective.loss_and_grads(problem.model, problem.guide)
    assert objective.last is not None
    value = bound.value(objective.last.log_weights.double()).item()
    is_minimized = isinstance(objective, ChiUpperBound) or (isinstance(bound, TVO) and bound.side == "upper")
    assert abs(value) > 0.1
    assert loss == pytest.approx(value if is_minimized else -value, rel=1e-5)
    assert objective.history is not None
    assert objective.history.objective[-1] == pytest.approx(value, rel=1e-5)


def test_alpha_one_is_the_elbo() -> None:
    problem = BY_NAME["chain, guide forward"]
    problem.guide()
    parameters = list(pyro.get_param_store()._params.values())
    expected_loss, expected = evaluate(DecomposedELBO(3, kl="sampled"), problem.model, problem.guide, parameters)
    loss, found = evaluate(RenyiELBO(1, 3), problem.model, problem.guide, parameters)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


# ----------------------------------------------------------------------------------------------------------------------
# Where the bound is taken: inside the plates that all sites share


class TableNormal(dist.Normal):  # type: ignore[misc]
    """A normal whose draw is made of given noise."""

    def __init__(self, loc: Tensor, scale: Tensor, noise: Tensor) -> None:
        loc, scale, self.noise = torch.broadcast_tensors(loc, scale, noise)
        super().__init__(loc, scale)

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> TableNormal:
        return TableNormal(self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.noise.expand(batch_shape))

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        assert not sample_shape
        return self.loc + self.scale * self.noise

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return self.rsample(sample_shape).detach()


class Local:
    """z_i ~ N(prior, 1), x_i ~ N(z_i, 0.6), i < 6, with noise from a table, the same for a datum in every subsample.

    Noise is of shape (K, 6); a looped particle takes the next row, vectorized ones take all of it.
    """

    size = 6

    def __init__(self, num_particles: int, *, vectorized: bool = False, is_global: bool = False) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = 2 * torch.randn(self.size, generator=generator, dtype=torch.float64)
        self.noise = torch.randn(num_particles, self.size, generator=generator, dtype=torch.float64)
        self.start = torch.randn(2, self.size, generator=generator, dtype=torch.float64) / 3
        self.vectorized, self.is_global = vectorized, is_global
        self.particle = 0
        self.runs: list[str] = []

    def parameter(self, name: str) -> Tensor:
        starts = {"loc": self.start[0], "log_scale": self.start[1], "prior": torch.tensor(0.2).double()}
        return pyro.param(name, starts[name].clone())

    def model(self, subsample: Tensor | None = None) -> None:
        self.runs.append("model")
        prior = self.parameter("prior")
        if self.is_global:
            prior = pyro.sample("w", dist.Normal(prior, 1.0))
        with pyro.plate("data", self.size, subsample=subsample) as i:
            z = pyro.sample("z", dist.Normal(prior, 1.0))
            pyro.sample("x", dist.Normal(z, 0.6), obs=self.x[i])
        self.particle += 1  # here, as some estimators run the guide twice

    def guide(self, subsample: Tensor | None = None) -> None:
        self.runs.append("guide")
        noise = self.noise if self.vectorized else self.noise[self.particle % len(self.noise)]
        if self.is_global:  # a draw that is the same in every evaluation
            pyro.sample(
                "w", TableNormal(self.parameter("prior"), torch.tensor(0.5).double(), torch.tensor(0.25).double())
            )
        with pyro.plate("data", self.size, subsample=subsample) as i:
            loc, scale = self.parameter("loc")[i], self.parameter("log_scale")[i].exp()
            pyro.sample("z", TableNormal(loc, scale, noise[..., i]))

    def gradients(self) -> dict[str, Tensor]:
        found = {}
        for name, parameter in pyro.get_param_store()._params.items():
            found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
            parameter.grad = None
        return found


def subsampled(size: int) -> list[Tensor]:
    return [torch.tensor(chosen) for chosen in itertools.combinations(range(Local.size), size)]


LOCAL_OPTIONS: list[dict[str, Any]] = [
    {},
    {"gradient": "doubly_reparameterized"},
    {"gradient": "score_function"},
    {"vectorize_particles": True, "max_plate_nesting": 1},
    {"vectorize_particles": True, "max_plate_nesting": 1, "gradient": "doubly_reparameterized"},
]


@pytest.mark.parametrize("options", LOCAL_OPTIONS, ids=str)
@pytest.mark.parametrize("bound", BOUNDS, ids=str)
def test_mean_over_all_subsamples_is_the_bound_of_all_data(bound: Bound, options: dict[str, Any]) -> None:
    """Exactly, value and gradient, for every bound and estimator, since each datum has its own draws."""
    programs = Local(4, vectorized="vectorize_particles" in options)
    objective = MultiSampleELBO(bound, 4, history=False, **options)
    full = objective.loss_and_grads(programs.model, programs.guide, None)
    expected = programs.gradients()
    log_weights = log_weights_by_element(objective)
    assert log_weights.shape == (4, 6)
    sign = -1 if bound.side == "lower" else 1
    assert full == pytest.approx(sign * bound.value(log_weights).sum().item(), rel=1e-12)
    for size in (2, 5):
        losses, gradients = [], []
        for chosen in subsampled(size):
            losses.append(objective.loss_and_grads(programs.model, programs.guide, chosen))
            gradients.append(programs.gradients())
        assert np.std(losses) > 0.1
        assert np.mean(losses) == pytest.approx(full, rel=1e-12)
        for name, gradient in expected.items():
            mean = torch.stack([each[name] for each in gradients]).mean(0)
            torch.testing.assert_close(mean, gradient, rtol=1e-10, atol=1e-10)
            assert gradient.abs().max() > 1e-3, name


@pytest.mark.parametrize("bound", NONLINEAR, ids=str)
@pytest.mark.parametrize("gradient", ["pathwise", "doubly_reparameterized"])
def test_gradient_of_the_surrogate_is_that_of_the_bound_by_hand(bound: Bound, gradient: Any) -> None:
    """Pathwise: autograd through the bound at the same noise."""
    programs = Local(3)
    objective = MultiSampleELBO(bound, 3, gradient=gradient)
    objective.loss_and_grads(programs.model, programs.guide, None)
    found = programs.gradients()
    leaves = {name: p.detach().clone().requires_grad_() for name, p in pyro.get_param_store()._params.items()}
    loc, scale = leaves["loc"], leaves["log_scale"].exp()
    z = loc + scale * programs.noise
    log_q = dist.Normal(loc, scale).log_prob(z)
    log_p = dist.Normal(leaves["prior"], 1.0).log_prob(z) + dist.Normal(z, 0.6).log_prob(programs.x)
    value = bound.value(log_p - log_q).sum()
    expected = torch.autograd.grad(-value if bound.side == "lower" else value, list(leaves.values()))
    same = [torch.allclose(found[name], each, rtol=1e-10) for name, each in zip(leaves, expected, strict=True)]
    if gradient == "pathwise":
        assert all(same)
    else:  # another estimator for the guide, the same for the model
        assert dict(zip(leaves, same, strict=True)) == {"prior": True, "loc": False, "log_scale": False}


def test_vectorized_particles_are_the_looped_ones_at_the_same_noise() -> None:
    for gradient in ("pathwise", "doubly_reparameterized", "score_function"):
        for bound in NONLINEAR:
            found = []
            for vectorized in (False, True):
                programs = Local(4, vectorized=vectorized)
                objective = MultiSampleELBO(bound, 4, 1, vectorize_particles=vectorized, gradient=gradient)  # type: ignore[arg-type]
                loss = objective.loss_and_grads(programs.model, programs.guide)
                found.append((loss, programs.gradients(), objective))
                assert programs.runs == ["guide", "model"] * (1 if vectorized else 4) or gradient != "pathwise"
            (loss, gradients, looped), (other_loss, other_gradients, vectorized_objective) = found
            assert loss == pytest.approx(other_loss, rel=1e-12)
            for name, each in gradients.items():
                torch.testing.assert_close(each, other_gradients[name], rtol=1e-10, atol=1e-12)
            assert looped.last is not None
            assert vectorized_objective.last is not None
            ours, theirs = looped.last.to_dataframe(), vectorized_objective.last.to_dataframe()
            columns = ["log_p", "log_q", "reconstruction", "kl_prior", "contribution"]
            np.testing.assert_allclose(ours[columns], theirs[columns], rtol=1e-6)
            assert looped.history is not None
            assert vectorized_objective.history is not None
            ours, theirs = looped.history.to_dataframe(), vectorized_objective.history.to_dataframe()
            np.testing.assert_allclose(ours[columns], theirs[columns], rtol=1e-6)
            steps = [objective.history.to_dataframe(by="step") for objective in (looped, vectorized_objective)]
            np.testing.assert_allclose(steps[0], steps[1], rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 0.3], ids=lambda scale: f"scale {scale}")
@pytest.mark.parametrize("bound", NONLINEAR, ids=str)
def test_two_subsampled_plates(bound: Bound, scale: float) -> None:
    """All sites in both: the bound of each cell, scaled by both, and by what scales the programs beside."""
    generator = torch.Generator().manual_seed(5)
    x, noise = torch.randn(3, 4, generator=generator).double(), torch.randn(2, 3, 4, generator=generator).double()
    runs = itertools.count()

    def plates(rows: Tensor, columns: Tensor) -> tuple[Any, Any]:
        return pyro.plate("rows", 3, subsample=rows, dim=-2), pyro.plate("columns", 4, subsample=columns, dim=-1)

    def model(*chosen: Tensor) -> None:
        rows, columns = plates(*chosen)
        with poutine.scale(scale=scale), rows as i, columns as j:
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("x", dist.Normal(z, 0.6), obs=x[i][:, j])

    def guide(*chosen: Tensor) -> None:
        rows, columns = plates(*chosen)
        with poutine.scale(scale=scale), columns as j, rows as i:
            loc = pyro.param("loc", torch.zeros(3, 4).double())[i][:, j]
            pyro.sample("z", TableNormal(loc, torch.ones(()).double(), noise[next(runs) % 2][i][:, j]))

    objective = MultiSampleELBO(bound, 2)
    every = [
        (torch.tensor(rows), torch.tensor(columns))
        for rows in itertools.combinations(range(3), 2)
        for columns in itertools.combinations(range(4), 2)
    ]
    full = objective.loss_and_grads(model, guide, torch.arange(3), torch.arange(4))
    gradient = pyro.get_param_store()._params["loc"].grad
    assert gradient is not None
    expected, gradient = gradient.clone(), gradient.zero_()
    assert abs(full) == pytest.approx(
        abs(scale * bound.value(log_weights_by_element(objective) / scale).sum().item()), rel=1e-7
    )
    losses = [objective.loss_and_grads(model, guide, *chosen) for chosen in every]
    assert np.std(losses) > 0.05
    assert np.mean(losses) == pytest.approx(full, rel=1e-7)
    torch.testing.assert_close(gradient / len(every), expected, rtol=1e-6, atol=1e-7)


def test_pyros_bound_of_a_subsample_is_none() -> None:
    """Pyro scales the weights before it takes their mean: under- and overflowing exponents, and no estimate of the bound."""
    programs = Local(4)
    objective = pyro.infer.RenyiELBO(num_particles=4)
    full = objective.loss(programs.model, programs.guide, None)
    assert full == pytest.approx(ImportanceWeightedELBO(4).loss(programs.model, programs.guide, None), rel=1e-12)
    losses = [objective.loss(programs.model, programs.guide, chosen) for chosen in subsampled(2)]
    assert abs(np.mean(losses) - full) > 0.2


def evidence_problem(size: int) -> tuple[Callable[[], None], Callable[[], None], Tensor]:
    """z_i ~ N(0, 1), x_i ~ N(z_i, 0.5), 100 data, with the posterior as the guide; and each datum's log evidence."""
    x = torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 1.25**0.5

    def model() -> None:
        with pyro.plate("data", 100, subsample_size=size) as i:
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x[i])

    def guide() -> None:
        with pyro.plate("data", 100, subsample_size=size) as i:
            pyro.sample("z", dist.Normal(0.8 * x[i], 0.2**0.5))

    return model, guide, dist.Normal(torch.zeros(()).double(), 1.25**0.5).log_prob(x)


@pytest.mark.parametrize("bound", BOUNDS, ids=str)
@pytest.mark.parametrize("options", [{}, {"vectorize_particles": True, "max_plate_nesting": 1}], ids=str)
def test_bound_at_the_posterior_is_the_evidence_of_the_subsample(bound: Bound, options: dict[str, Any]) -> None:
    model, guide, evidence = evidence_problem(10)
    objective = MultiSampleELBO(bound, 5, **options)
    losses = []
    for seed in range(3):
        pyro.set_rng_seed(seed)
        losses.append(objective.loss(model, guide))
        pyro.set_rng_seed(seed)
        chosen = poutine.trace(guide).get_trace().nodes["data"]["value"]
        sign = -1 if bound.side == "lower" else 1
        assert losses[-1] == pytest.approx(sign * 10 * evidence[chosen].sum().item(), rel=1e-10)
    assert len(set(losses)) == 3


def test_subsampled_bound_finds_the_evidence_where_pyros_does_not() -> None:
    """Pyro's particles see other data each, and the luckiest of them outweighs the rest: no bound even at the posterior."""
    model, guide, evidence = evidence_problem(10)
    exact, draws = evidence.sum().item(), 200
    standard_error = 10 * evidence.std().item() * math.sqrt(10 / draws)

    def mean_of(objective: Any, guide: Callable[[], None]) -> float:
        return float(np.mean([-objective.loss(model, guide) for _ in range(draws)]))

    def prior() -> None:
        with pyro.plate("data", 100, subsample_size=10):
            pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))

    assert mean_of(ImportanceWeightedELBO(5), guide) == pytest.approx(exact, abs=STANDARD_ERRORS * standard_error)
    assert mean_of(ImportanceWeightedELBO(5), prior) < exact - STANDARD_ERRORS * standard_error
    for one in (guide, prior):
        theirs = mean_of(pyro.infer.RenyiELBO(num_particles=5), one)
        assert theirs > exact + 3 * STANDARD_ERRORS * standard_error


@pytest.mark.parametrize("options", [{}, {"vectorize_particles": True, "max_plate_nesting": 1}], ids=str)
@pytest.mark.parametrize("gradient", ["pathwise", "doubly_reparameterized", "score_function"])
def test_particles_share_one_subsample(options: dict[str, Any], gradient: Any) -> None:
    data = torch.arange(100.0)

    def model() -> None:
        with pyro.plate("data", 100, subsample_size=3) as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0 * z, 1.0), obs=data[i])  # its density tells which datum it is

    def guide() -> None:
        with pyro.plate("data", 100, subsample_size=3):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 1.0))

    objective = ImportanceWeightedELBO(5, gradient=gradient, **options)
    rows = []
    for _ in range(3):
        objective.loss_and_grads(model, guide)
        assert objective.last is not None
        log_p, log_q = objective.last["x"].log_p, objective.last["z"].log_q
        assert log_p is not None
        assert log_q is not None
        assert log_p.shape == log_q.shape == (5, 3)
        assert (log_p == log_p[0]).all()
        assert (log_q != log_q[0])[1:].all()
        rows.append(log_p[0])
    assert not torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[1], rows[2])


def test_given_subsample_may_change_from_call_to_call_but_not_within() -> None:
    programs = Local(2)
    objective = ImportanceWeightedELBO(2)
    objective.loss(programs.model, programs.guide, torch.tensor([0, 1]))
    first = objective.last
    objective.loss(programs.model, programs.guide, torch.tensor([1, 0]))
    assert first is not None
    assert objective.last is not None
    assert first["x"].log_p is not None
    torch.testing.assert_close(objective.last["x"].log_p, first["x"].log_p.flip(-1))


# ----------------------------------------------------------------------------------------------------------------------
# The bound inside some plates, the ELBO outside


def log_evidence_of_plated() -> float:
    covariance = torch.ones(4, 4) + 1.25 * torch.eye(4)
    return float(dist.MultivariateNormal(torch.zeros(4), covariance).log_prob(DATA))


@pytest.mark.parametrize("name", ["plated", "subsampled"])
@pytest.mark.parametrize("gradient", ["pathwise", "score_function"])
@pytest.mark.parametrize("bound", [bound for bound in BOUNDS if bound.side == "lower"], ids=str)
def test_local_plates_by_hand(bound: Bound, gradient: Any, name: str) -> None:
    problem = BY_NAME[name]
    objective = MultiSampleELBO(bound, 3, gradient=gradient, local_plates="data")
    loss = objective.loss_and_grads(problem.model, problem.guide)
    assert objective.last is not None
    outer = log_weights_by_element(objective, "w")
    assert outer.shape == (3,)
    assert (outer == outer[0]).all()  # one draw for all particles
    inner = log_weights_by_element(objective, "z", "x")
    size = 4 if name == "plated" else 2
    assert inner.shape == (3, size)
    scale = 4 / size
    expected = outer[0] + scale * bound.value(inner / scale).sum()
    assert loss == pytest.approx(-expected.item(), rel=1e-5)
    assert objective.local_plates == ("data",)
    assert objective.history is not None
    frame = objective.history.to_dataframe()
    assert frame.reconstruction.sum() - frame.kl_prior.sum() == pytest.approx(
        (outer.mean() + inner.sum(1).mean()).item(), rel=1e-5
    )


@pytest.mark.parametrize("gradient", ["pathwise", "score_function"])
def test_local_plates_over_all_subsamples(gradient: Any) -> None:
    programs = Local(3, is_global=True)
    objective = ImportanceWeightedELBO(3, local_plates=["data"], gradient=gradient, history=False)
    full = objective.loss_and_grads(programs.model, programs.guide, None)
    expected = programs.gradients()
    losses, gradients = [], []
    for chosen in subsampled(2):
        losses.append(objective.loss_and_grads(programs.model, programs.guide, chosen))
        gradients.append(programs.gradients())
    assert np.std(losses) > 0.1
    assert np.mean(losses) == pytest.approx(full, rel=1e-12)
    for name, gradient_of_all in expected.items():
        mean = torch.stack([each[name] for each in gradients]).mean(0)
        torch.testing.assert_close(mean, gradient_of_all, rtol=1e-10, atol=1e-10)


def test_local_plates_pathwise_gradient_by_hand() -> None:
    programs = Local(3, is_global=True)
    objective = ImportanceWeightedELBO(3, local_plates="data")
    objective.loss_and_grads(programs.model, programs.guide)
    found = programs.gradients()
    leaves = {name: p.detach().clone().requires_grad_() for name, p in pyro.get_param_store()._params.items()}
    loc, scale, prior = leaves["loc"], leaves["log_scale"].exp(), leaves["prior"]
    w = prior + 0.5 * 0.25
    z = loc + scale * programs.noise
    log_weights = dist.Normal(w, 1.0).log_prob(z) + dist.Normal(z, 0.6).log_prob(programs.x)
    log_weights = log_weights - dist.Normal(loc, scale).log_prob(z)
    loss = dist.Normal(prior, 0.5).log_prob(w) - dist.Normal(prior, 1.0).log_prob(w) - IWAE().value(log_weights).sum()
    for name, gradient in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-10)


class GivenBernoulli(dist.Bernoulli):  # type: ignore[misc]
    """A Bernoulli whose draw is given."""

    draw = 0.0

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return torch.full_like(self.probs, self.draw)


@pytest.mark.parametrize("gradient", ["pathwise", "score_function"])
@pytest.mark.parametrize("bound", [ELBO(), IWAE(), Renyi(0.5), TVO()], ids=str)
def test_local_plates_with_a_discrete_site_outside(bound: Bound, gradient: Any) -> None:
    """Enumerated: its score has the whole objective as its cost, whatever the subsample."""
    programs = Local(3)

    def model(subsample: Tensor | None) -> None:
        k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3).double()))
        with pyro.plate("data", 6, subsample=subsample) as i:
            z = pyro.sample("z", dist.Normal(2 * k, 1.0))
            pyro.sample("x", dist.Normal(z, 0.6), obs=programs.x[i])
        programs.particle += 1

    def guide(subsample: Tensor | None) -> None:
        pyro.sample("k", GivenBernoulli(logits=pyro.param("logit", torch.tensor(0.4).double())))
        with pyro.plate("data", 6, subsample=subsample) as i:
            noise = programs.noise[programs.particle % 3][i]
            pyro.sample("z", TableNormal(programs.parameter("loc")[i], torch.tensor(0.8).double(), noise))

    objective = MultiSampleELBO(bound, 3, local_plates="data", gradient=gradient)
    probability = torch.tensor(0.4).double().sigmoid()
    found, loss = {"logit": torch.zeros(()).double(), "loc": torch.zeros(6).double()}, 0.0
    for k, weight in ((0.0, 1 - probability), (1.0, probability)):
        GivenBernoulli.draw = k
        for chosen in subsampled(4):
            loss += weight.item() * objective.loss_and_grads(model, guide, chosen) / 15
            for name, each in programs.gradients().items():
                found[name] += weight * each / 15

    logit, loc = torch.tensor(0.4).double().requires_grad_(), programs.start[0].clone().requires_grad_()
    q, z = dist.Bernoulli(logits=logit), loc + torch.tensor(0.8).double() * programs.noise
    expected: Any = 0.0
    for k in (torch.zeros(()).double(), torch.ones(()).double()):
        log_w = dist.Normal(2 * k, 1.0).log_prob(z) + dist.Normal(z, 0.6).log_prob(programs.x)
        log_w = log_w - dist.Normal(loc, torch.tensor(0.8).double()).log_prob(z)
        prior = dist.Bernoulli(torch.tensor(0.3).double()).log_prob(k)
        expected = expected - q.log_prob(k).exp() * (prior - q.log_prob(k) + bound.value(log_w).sum())
    assert loss == pytest.approx(expected.item(), rel=1e-10)
    of_logit, of_loc = torch.autograd.grad(expected, (logit, loc))
    torch.testing.assert_close(found["logit"], of_logit, rtol=1e-9, atol=1e-9)
    if gradient == "pathwise":
        torch.testing.assert_close(found["loc"], of_loc, rtol=1e-9, atol=1e-9)
    assert of_logit.abs() > 0.1


@pytest.mark.parametrize("gradient", ["pathwise", "score_function"])
def test_local_plates_with_a_point_outside(gradient: Any) -> None:
    """Under MAP for the site outside it is still one that the particles share."""
    programs = Local(3, is_global=True)

    def guide(subsample: Tensor | None = None) -> None:
        pyro.sample("w", dist.Delta(pyro.param("point", torch.tensor(0.1).double())))
        with pyro.plate("data", 6, subsample=subsample) as i:
            loc, scale = programs.parameter("loc")[i], programs.parameter("log_scale")[i].exp()
            pyro.sample("z", TableNormal(loc, scale, programs.noise[programs.particle % 3][i]))

    objective = ImportanceWeightedELBO(3, local_plates="data", gradient=gradient)
    full = objective.loss_and_grads(programs.model, guide)
    inner = log_weights_by_element(objective, "z", "x")
    outer = dist.Normal(torch.tensor(0.2).double(), 1.0).log_prob(torch.tensor(0.1).double())
    assert full == pytest.approx(-(outer + IWAE().value(inner).sum()).item(), rel=1e-10)
    expected = programs.gradients()
    assert expected["point"].abs() > 0.01
    losses = [objective.loss_and_grads(programs.model, guide, chosen) for chosen in subsampled(2)]
    assert np.mean(losses) == pytest.approx(full, rel=1e-10)
    for name, gradient_of_all in programs.gradients().items():
        torch.testing.assert_close(gradient_of_all / 15, expected[name], rtol=1e-9, atol=1e-9)


def test_local_plates_batched_are_the_looped_ones() -> None:
    problem = BY_NAME["plated"]
    losses = []
    for vectorize in (False, "vmap"):  # a shared draw cannot be batched: these particles are looped over
        objective = ImportanceWeightedELBO(4, vectorize_particles=vectorize, local_plates="data")  # type: ignore[arg-type]
        pyro.set_rng_seed(1)
        objective.loss(problem.model, problem.guide)
        pyro.set_rng_seed(1)
        losses.append(objective.loss_and_grads(problem.model, problem.guide))
        outer = log_weights_by_element(objective, "w")
        assert (outer == outer[0]).all()
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", ["plated", "subsampled"])
def test_local_plates_lie_between_the_elbo_and_the_evidence(name: str) -> None:
    problem = BY_NAME[name]
    objective = ImportanceWeightedELBO(6, local_plates="data", history=False)
    with pyro.validation_enabled(False):
        values = np.array([-objective.loss(problem.model, problem.guide) for _ in range(300)])
    error = values.std(ddof=1) / math.sqrt(len(values))
    elbo = _exact_plated(problem.params).item()
    assert error < 0.3
    assert elbo + STANDARD_ERRORS * error < values.mean() < log_evidence_of_plated() + STANDARD_ERRORS * error


def test_local_plates_of_all_sites_change_nothing() -> None:
    found = []
    for local_plates in (None, "data"):
        programs = Local(4)
        objective = ImportanceWeightedELBO(4, local_plates=local_plates)
        loss = objective.loss_and_grads(programs.model, programs.guide, torch.tensor([1, 4]))
        found.append((loss, programs.gradients()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient)


# ----------------------------------------------------------------------------------------------------------------------
# Scales and masks


def seeded(objective: MultiSampleELBO, model: Any, guide: Any, *args: Any) -> tuple[float, dict[str, Tensor]]:
    pyro.set_rng_seed(2)
    loss = objective.loss_and_grads(model, guide, *args)
    gradients = {}
    for name, parameter in pyro.get_param_store()._params.items():
        gradients[name], parameter.grad = parameter.grad, None
    return loss, gradients


@pytest.mark.parametrize("scale", [0.01, 3.0, torch.tensor(0.5)], ids=str)
@pytest.mark.parametrize("gradient", ["pathwise", "doubly_reparameterized", "score_function"])
@pytest.mark.parametrize("name", ["lognormal", "mixed", "auxiliary, discrete", "plated"])
def test_scale_of_model_and_guide_multiplies_the_bound(name: str, gradient: Any, scale: Any) -> None:
    problem = BY_NAME[name]
    for bound in NONLINEAR:
        loss, gradients = seeded(MultiSampleELBO(bound, 3, gradient=gradient), problem.model, problem.guide)
        model, guide = poutine.scale(problem.model, scale=scale), poutine.scale(problem.guide, scale=scale)
        objective = MultiSampleELBO(bound, 3, gradient=gradient)
        scaled_loss, scaled_gradients = seeded(objective, model, guide)
        assert scaled_loss == pytest.approx(float(scale) * loss, rel=1e-5)
        for parameter, each in gradients.items():
            torch.testing.assert_close(
                scaled_gradients[parameter], float(scale) * each, rtol=1e-3, atol=1e-4 * float(scale)
            )


@pytest.mark.parametrize("scale", [0.2, torch.tensor(0.2)], ids=str)
@pytest.mark.parametrize("bound", NONLINEAR, ids=str)
def test_scale_of_the_model_alone_tempers_it(bound: Bound, scale: Any) -> None:
    problem = BY_NAME["chain, guide forward"]
    plain = MultiSampleELBO(bound, 4)
    plain_loss, _ = seeded(plain, problem.model, problem.guide)
    assert plain.last is not None
    terms = plain.last
    log_p = sum(term.log_p for term in terms.values() if term.log_p is not None)
    log_q = sum(term.log_q for term in terms.values() if term.log_q is not None)
    expected = bound.value(0.2 * log_p - log_q).item()
    objective = MultiSampleELBO(bound, 4)
    loss, _ = seeded(objective, poutine.scale(problem.model, scale=scale), problem.guide)
    assert loss == pytest.approx(-expected if bound.side == "lower" else expected, rel=1e-5)
    assert abs(abs(plain_loss) - abs(expected)) > 0.1


def test_guide_sites_with_different_scales_make_no_weight() -> None:
    problem = BY_NAME["chain, guide forward"]

    def guide() -> None:
        pyro.sample("a", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 1.0))
        with poutine.scale(scale=0.5):
            pyro.sample("b", dist.Normal(0.0, 1.0))

    for bound in NONLINEAR:
        with pytest.raises(ValueError, match=r"(?s)'a' and 'b'.*different scales, 1 and 0\.5.*DecomposedELBO"):
            MultiSampleELBO(bound).loss_and_grads(problem.model, guide)
    MultiSampleELBO(ELBO()).loss_and_grads(problem.model, guide)


@pytest.mark.parametrize("scale", [torch.ones(4), 0.0, -1.0, torch.tensor(0.0), torch.tensor(-1.0)], ids=str)
def test_scale_that_no_weight_can_have(scale: Any) -> None:
    problem = BY_NAME["plated"]

    def guide() -> None:
        with poutine.scale(scale=scale):
            problem.guide()

    match = r"guide site '[wz]'.*scale" if torch.is_tensor(scale) and scale.dim() else "scale > 0"  # Pyro's own
    with pytest.raises(ValueError, match=match):
        ImportanceWeightedELBO(2).loss_and_grads(problem.model, guide)


@pytest.mark.parametrize("options", [{}, {"vectorize_particles": True, "max_plate_nesting": 1}], ids=str)
@pytest.mark.parametrize("gradient", ["pathwise", "score_function"])
@pytest.mark.parametrize("bound", BOUNDS, ids=str)
def test_masked_elements_do_not_count(bound: Bound, gradient: Any, options: dict[str, Any]) -> None:
    """Four of the six data, by a mask on all sites and by leaving the others out."""
    keep = torch.tensor([True, False, True, True, False, True])
    found = []
    for chosen in (None, keep.nonzero().squeeze(-1)):
        programs = Local(3, vectorized=bool(options))
        programs.size = 6 if chosen is None else 4
        if chosen is None:
            model, guide = poutine.mask(programs.model, mask=keep), poutine.mask(programs.guide, mask=keep)
        else:
            model, guide = programs.model, programs.guide
            programs.x, programs.noise, programs.start = (
                programs.x[chosen],
                programs.noise[:, chosen],
                programs.start[:, chosen],
            )
        pyro.clear_param_store()
        loss = MultiSampleELBO(bound, 3, gradient=gradient, **options).loss_and_grads(model, guide)
        found.append((loss, programs.gradients()))
    (masked_loss, masked), (loss, gradients) = found
    assert masked_loss == pytest.approx(loss, rel=1e-10)
    torch.testing.assert_close(masked["prior"], gradients["prior"])
    for name in ("loc", "log_scale"):
        torch.testing.assert_close(masked[name][keep], gradients[name])
        assert masked[name][~keep].abs().max() < 1e-12


def test_mask_on_the_data_alone_leaves_the_prior() -> None:
    keep = torch.tensor([True, False, True, True, False, True])
    programs = Local(3)

    def model() -> None:
        with pyro.plate("data", 6):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.6).mask(keep), obs=programs.x)

    for gradient in ("pathwise", "doubly_reparameterized"):
        objective = ImportanceWeightedELBO(3, gradient=gradient)  # type: ignore[arg-type]
        loss = objective.loss_and_grads(model, programs.guide)
        log_weights = log_weights_by_element(objective)
        assert log_weights.shape == (3, 6)
        assert loss == pytest.approx(-IWAE().value(log_weights).sum().item(), rel=1e-6)
        assert objective.last is not None
        assert objective.last["x"].log_p is not None
        assert ((objective.last["x"].log_p == 0) == ~keep).all()


def test_masked_guide_has_no_doubly_reparameterized_gradient_under_a_bound_that_is_not_linear() -> None:
    keep = torch.tensor([True, False, True, True, False, True])
    programs = Local(2)
    model, guide = poutine.mask(programs.model, mask=keep), poutine.mask(programs.guide, mask=keep)
    for bound in NONLINEAR:
        objective = MultiSampleELBO(bound, gradient="doubly_reparameterized")
        with pytest.raises(ValueError, match=r"(?s)guide site 'z' is masked.*gradient='pathwise'"):
            objective.loss_and_grads(model, guide)
    MultiSampleELBO(ELBO(), gradient="doubly_reparameterized").loss_and_grads(model, guide)


# ----------------------------------------------------------------------------------------------------------------------
# What SVI, ELBOModule, pickle and copy expect; history and last


OBJECTIVES: dict[str, Callable[..., MultiSampleELBO]] = {
    "iwae": ImportanceWeightedELBO,
    "renyi": lambda *args, **options: RenyiELBO(0.5, *args, **options),
    "chi": lambda *args, **options: ChiUpperBound(2.5, *args, **options),
    "thermodynamic": lambda *args, **options: ThermodynamicELBO((0.0, 0.2, 1.0), *args, **options),
    "bound": lambda *args, **options: MultiSampleELBO(TVO(side="upper"), *args, **options),
}


def model(x: Tensor | None = None) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 0.5), obs=torch.tensor(2.0) if x is None else x)


def guide(x: Tensor | None = None) -> None:
    loc = pyro.param("loc", torch.tensor(0.3))
    pyro.sample("z", dist.Normal(loc, pyro.param("scale", torch.tensor(0.7), constraint=dist.constraints.positive)))


def svi(objective: Any, model: Any = model, guide: Any = guide) -> SVI:
    return SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), objective)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_are_plain_numbers(name: str) -> None:
    objective = OBJECTIVES[name](3)
    assert type(objective.loss(model, guide)) is float
    assert type(objective.loss_and_grads(model, guide)) is float
    assert type(svi(objective).step()) is float
    assert type(svi(objective).evaluate_loss()) is float
    differentiable = objective.differentiable_loss(model, guide)
    assert differentiable.shape == ()
    assert differentiable.requires_grad
    with torch.no_grad():
        assert not objective.differentiable_loss(model, guide).requires_grad
    assert objective.history is not None
    assert len(objective.history) == 3


@pytest.mark.parametrize("name", OBJECTIVES)
def test_parameters_move_down_the_loss(name: str) -> None:
    # with few particles an upper bound is one from below, which falls as the guide moves away; with many others fall late
    many = {"vectorize_particles": True, "max_plate_nesting": 0}
    particles, options = (400, many) if name in ("chi", "bound") else (4, {})
    objective = OBJECTIVES[name](particles, history=False, **options)
    before = np.mean([objective.loss(model, guide) for _ in range(20)])
    optimizer = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), objective)
    for _ in range(40):
        optimizer.step()
    assert pyro.param("loc").item() > 0.8  # the posterior's mean is 1.6
    if objective.maximized:
        assert np.mean([objective.loss(model, guide) for _ in range(20)]) < before - 0.1


@pytest.mark.parametrize("gradient", ["pathwise", "score_function", "doubly_reparameterized"])
def test_runs_and_random_numbers(gradient: Any) -> None:
    """K runs of each, guide before model; doubly_reparameterized scores the guide again. Nothing else is drawn."""
    runs: list[str] = []

    def counted_model() -> None:
        runs.append("model")
        model()

    def counted_guide() -> None:
        runs.append("guide")
        guide()

    expected = ["guide", "model"] if gradient != "doubly_reparameterized" else ["guide", "guide", "model"]
    for options in ({}, {"vectorize_particles": True, "max_plate_nesting": 0}):
        pyro.set_rng_seed(4)
        pyro.infer.RenyiELBO(num_particles=4, **options).loss(model, guide)
        theirs = torch.rand(())
        for _ in range(2):
            objective = ImportanceWeightedELBO(4, gradient=gradient, **options)
            pyro.set_rng_seed(4)
            objective.loss_and_grads(counted_model, counted_guide)
            assert torch.rand(()) == theirs
            assert runs == expected * (1 if options else 4)
            runs.clear()
            pyro.set_rng_seed(4)
            objective.loss(counted_model, counted_guide)  # needs no gradient, so no second run either
            assert torch.rand(()) == theirs
            assert runs == ["guide", "model"] * (1 if options else 4)
            runs.clear()


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda objective: pickle.loads(pickle.dumps(objective))], ids=["deepcopy", "pickle"]
)
def test_copies_are_equal_and_independent(duplicate: Callable[[Any], Any], name: str) -> None:
    objective = OBJECTIVES[name](3, gradient="doubly_reparameterized")
    for _ in range(3):
        svi(objective).step()
    twin = duplicate(objective)
    assert type(twin) is type(objective)
    assert twin.bound == objective.bound
    assert (twin.maximized, twin.gradient, twin.local_plates) == (objective.maximized, objective.gradient, ())
    assert objective.last is not None
    assert twin.last.contributions == objective.last.contributions
    assert torch.equal(twin.last.log_weights, objective.last.log_weights)
    assert twin.history.to_dataframe().equals(objective.history.to_dataframe())  # type: ignore[union-attr]
    losses = []
    for each in (objective, twin):
        pyro.set_rng_seed(1)
        losses.append(each.loss(model, guide))
    assert losses[0] == losses[1]
    svi(twin).step()
    assert (len(objective.history), len(twin.history)) == (3, 4)  # type: ignore[arg-type]


class Model(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.prior = PyroParam(torch.tensor(0.0))

    def forward(self) -> None:
        z = pyro.sample("z", dist.Normal(self.prior, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=torch.tensor(2.0))


class Guide(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.loc = PyroParam(torch.tensor(0.0))
        self.net = torch.nn.Linear(1, 1)

    def forward(self) -> None:
        shift = self.net(torch.ones(1)).squeeze(-1)
        pyro.sample("z", dist.Normal(self.loc + shift, 0.447))


@pytest.mark.parametrize("gradient", ["pathwise", "doubly_reparameterized"])
def test_elbo_module_trains_with_local_parameters(gradient: Any) -> None:
    with pyro.settings.context(module_local_params=True):
        objective = ImportanceWeightedELBO(6, gradient=gradient)
        module = objective(Model(), Guide())
        assert isinstance(module, ELBOModule)
        module()
        optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
        for _ in range(200):
            optimizer.zero_grad()
            module().backward()
            optimizer.step()
        guide_loc = module.guide.loc + module.guide.net(torch.ones(1))
    assert module.model.prior.item() == pytest.approx(2.0, abs=0.3)  # the evidence is largest where the prior is at x
    assert guide_loc.item() == pytest.approx(2.0, abs=0.4)
    assert objective.history is not None
    assert len(objective.history) == 201


PLATES = ["gaussian", "chain, guide forward", "delta", "mixed", "auxiliary, discrete", "plated", "scaled guide"]


@pytest.mark.parametrize("gradient", ["pathwise", "doubly_reparameterized", "score_function"])
@pytest.mark.parametrize("name", PLATES)
@pytest.mark.parametrize("bound", NONLINEAR, ids=str)
def test_history_and_contributions(bound: Bound, name: str, gradient: Any) -> None:
    problem = BY_NAME[name]
    objective = MultiSampleELBO(bound, 5, gradient=gradient)
    sign = -1 if bound.side == "lower" else 1
    losses = [objective.loss_and_grads(problem.model, problem.guide) for _ in range(3)]
    history, last = objective.history, objective.last
    assert history is not None
    assert last is not None
    assert last.contributions is not None
    steps, sites = history.to_dataframe(by="step"), history.to_dataframe()
    assert steps.objective.to_list() == [sign * loss for loss in losses]
    assert steps.elbo.iloc[-1] == pytest.approx(last.log_weights.mean().item(), rel=1e-5)
    assert steps.elbo.iloc[-1] == pytest.approx(last.elbo, rel=1e-5)
    assert (steps.kl_weight == 1).all()

    own = sites[sites.step == 2].set_index("site")
    assert list(own.index) == list(last)
    assert own.contribution.to_dict() == last.contributions
    assert (own[own.kind != "observed"].kl_method == "sampled").all()
    assert (own[own.kind != "observed"].kl_reason.str.contains("no closed form")).all()
    np.testing.assert_allclose(own.log_p.astype(float), last.to_dataframe().log_p.astype(float), rtol=1e-5)
    np.testing.assert_allclose(own.kl_prior, last.to_dataframe().kl_prior, rtol=1e-5, atol=1e-6)

    scale = 0.1 if name == "scaled guide" else 1.0
    log_weights = last.log_weights.double() / scale
    shares = bound.gradient(log_weights)
    for site, term in last.items():
        by_particle = log_weights_by_element(objective, site).reshape(5, -1).sum(1)
        assert own.contribution[site] == pytest.approx((shares * by_particle).sum().item(), rel=1e-4, abs=1e-5)
        for tensor in (term.log_p, term.log_q):
            assert tensor is None or not tensor.requires_grad
    if isinstance(bound, IWAE):
        divergence = (shares * (shares * 5).clamp_min(1e-300).log()).sum().item()
        assert own.contribution.sum() - scale * divergence == pytest.approx(-losses[-1], rel=1e-5, abs=1e-5)
    summary = history.summary(window=2)
    assert "contribution" in summary
    assert summary.contribution.iloc[-1] == pytest.approx(steps.objective.iloc[-2:].mean())
    assert last.to_dataframe().contribution.to_list() == list(last.contributions.values())


@pytest.mark.parametrize("is_global", [False, True])
@pytest.mark.parametrize("bound", [bound for bound in NONLINEAR if bound.side == "lower"], ids=str)
def test_contributions_inside_plates(bound: Bound, is_global: bool) -> None:
    """Every datum has weights of its own; a site outside contributes its part of the ELBO."""
    for vectorized in (False,) if is_global else (False, True):
        programs = Local(4, vectorized=vectorized, is_global=is_global)
        objective = MultiSampleELBO(bound, 4, 1, vectorize_particles=vectorized, local_plates="data")
        loss = objective.loss_and_grads(programs.model, programs.guide, torch.tensor([0, 2, 3]))
        assert objective.last is not None
        contributions = objective.last.contributions
        assert contributions is not None
        log_weights = log_weights_by_element(objective, "z", "x")
        shares = bound.gradient(log_weights / 2)
        for site in ("z", "x"):
            expected = (shares * log_weights_by_element(objective, site)).sum().item()
            assert contributions[site] == pytest.approx(expected, rel=1e-10)
        total = sum(contributions.values())
        if is_global:
            assert contributions["w"] == pytest.approx(log_weights_by_element(objective, "w")[0].item(), rel=1e-10)
        if isinstance(bound, IWAE):
            assert total - 2 * (shares * (4 * shares).log()).sum().item() == pytest.approx(-loss, rel=1e-10)
        else:
            assert total != pytest.approx(-loss, rel=1e-4)


def test_last_has_a_particle_dim_before_the_batch() -> None:
    plated = BY_NAME["plated"]
    for options in ({}, {"vectorize_particles": True, "max_plate_nesting": 1}):
        objective = ImportanceWeightedELBO(5, **options)
        assert objective.last is None
        objective.loss(plated.model, plated.guide)
        last = objective.last
        assert last is not None
        assert last.num_particles == 5
        assert last.log_weights.shape == (5,)
        assert last["z"].log_p is not None
        assert last["z"].log_q is not None
        assert last["z"].log_p.shape == last["z"].log_q.shape == (5, 4)
        assert last["w"].log_p is not None
        assert last["w"].log_p.flatten().shape == (5,)
        assert last["z"].plates == ("data",)
        assert [term.kind for term in last.values()] == ["latent", "latent", "observed"]
        assert "contribution" in last.to_dataframe()
        assert "contribution" in repr(last)
        assert "<table" in last._repr_html_()
        assert objective.history is not None
        assert len(objective.history) == 0  # an evaluation is not a step


def test_history_off_given_or_bounded() -> None:
    objective = ImportanceWeightedELBO(2, history=False)
    svi(objective).step()
    assert objective.history is None
    assert objective.last is not None
    mine = History(max_steps=10)
    objective = ImportanceWeightedELBO(2, history=mine)
    svi(objective).step()
    assert objective.history is mine
    assert len(mine) == 1


def test_no_contributions_where_the_bound_is_linear() -> None:
    for objective in (MultiSampleELBO(ELBO(), 3), RenyiELBO(1.0, 3), DecomposedELBO(3, gradient="vargrad")):
        loss = objective.loss_and_grads(model, guide)
        assert objective.last is not None
        assert objective.last.contributions is None
        assert "contribution" not in objective.last.to_dataframe()
        assert objective.history is not None
        assert "contribution" not in objective.history.to_dataframe()
        assert objective.history.elbo[-1] == pytest.approx(-loss)


def test_sites_may_vary_from_particle_to_particle() -> None:
    """A site that some particles lack counts as zero in them."""

    runs = {"model": itertools.count(), "guide": itertools.count()}

    def varying_model() -> None:
        model()
        if next(runs["model"]) % 3 == 1:
            pyro.sample("w", dist.Normal(0.0, 2.0))

    def varying_guide() -> None:
        guide()
        if next(runs["guide"]) % 3 == 1:
            pyro.sample("w", dist.Normal(0.5, 1.0))

    objective = ImportanceWeightedELBO(3)
    loss = objective.loss_and_grads(varying_model, varying_guide)
    assert objective.last is not None
    assert objective.last["w"].log_p is not None
    assert (objective.last["w"].log_p != 0).tolist() == [False, True, False]
    assert loss == pytest.approx(-IWAE().value(objective.last.log_weights).item(), rel=1e-5)


def test_messenger_guide_has_every_estimator() -> None:
    """At the posterior two of them have no noise, though the guide runs together with the model."""
    messenger = AutoNormalMessenger(model, init_loc_fn=lambda site: torch.tensor(1.6), init_scale=0.2**0.5)
    objectives: list[Any] = [
        ImportanceWeightedELBO(4, gradient=gradient) for gradient in ("pathwise", "doubly_reparameterized")
    ]
    objectives += [DecomposedELBO(4, gradient=gradient) for gradient in ("doubly_reparameterized", "vargrad")]
    sizes = []
    for objective in objectives:
        messenger.zero_grad()
        loss = objective.loss_and_grads(model, messenger)
        assert loss == pytest.approx(-dist.Normal(0.0, 1.25**0.5).log_prob(torch.tensor(2.0)).item(), rel=1e-5)
        gradients = [parameter.grad for parameter in messenger.parameters()]
        assert len(gradients) == 2
        sizes.append(max(float(gradient.abs().max()) for gradient in gradients if gradient is not None))
    assert sizes[0] > 0.05
    assert max(sizes[1:]) < 1e-5


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("gradient", ["pathwise", "doubly_reparameterized", "score_function"])
def test_a_bound_of_ones_own_needs_a_value_alone(gradient: Any, vectorize: bool) -> None:
    class Mine(Bound):
        def value(self, log_weights: Tensor) -> Tensor:
            return torch.logsumexp(log_weights, 0) - math.log(len(log_weights))

    found = []
    for bound in (Mine(), IWAE()):
        programs = Local(3, vectorized=vectorize)
        objective = MultiSampleELBO(bound, 3, 1, vectorize_particles=vectorize, gradient=gradient)
        loss = objective.loss_and_grads(programs.model, programs.guide)
        found.append((loss, programs.gradients()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    for name, each in found[1][1].items():
        torch.testing.assert_close(found[0][1][name], each, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("vectorize", [False, True, "vmap"])
@pytest.mark.parametrize("gradient", ["pathwise", "doubly_reparameterized", "score_function"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_mixed_precision_terms(dtype: torch.dtype, gradient: Any, vectorize: Any) -> None:
    def mixed_model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        pyro.sample("x", dist.Poisson(z.float().exp()), obs=torch.tensor(2.0))

    def mixed_guide() -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.3, dtype=dtype)), 1.0))

    mixed_guide()
    objective = ImportanceWeightedELBO(3, 0, vectorize_particles=vectorize, gradient=gradient)
    loss = objective.loss_and_grads(mixed_model, mixed_guide)
    assert objective.last is not None
    assert loss == pytest.approx(-IWAE().value(objective.last.log_weights).item(), rel=1e-6)
    gradient_of_loc = pyro.get_param_store()._params["loc"].grad
    assert gradient_of_loc is not None
    assert gradient_of_loc.dtype == dtype


@pytest.mark.parametrize("vectorize", [False, True, "vmap"])
@pytest.mark.parametrize("gradient", ["pathwise", "doubly_reparameterized", "score_function"])
def test_without_latents_the_bound_is_the_evidence(gradient: Any, vectorize: Any) -> None:
    def observed() -> None:
        with pyro.plate("data", 5):
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 1.0), obs=torch.ones(5))

    for bound in NONLINEAR:
        pyro.clear_param_store()
        objective = MultiSampleELBO(bound, 3, 1, vectorize_particles=vectorize, gradient=gradient)
        loss = objective.loss_and_grads(observed, lambda: None)
        sign = -1 if bound.side == "lower" else 1
        assert loss == pytest.approx(sign * 5 * dist.Normal(0.5, 1.0).log_prob(torch.tensor(1.0)).item(), rel=1e-6)
        assert pyro.get_param_store()._params["loc"].grad.item() == pytest.approx(sign * 2.5, rel=1e-5)


@pytest.mark.parametrize("pair", ["loss", "loss_and_grads"])
def test_programs_without_sites_have_the_loss_that_they_have_in_pyro(pair: str) -> None:
    for theirs, ours in (
        (pyro.infer.Trace_ELBO(2), DecomposedELBO(2)),
        (pyro.infer.Trace_ELBO(2), DecomposedELBO(2, gradient="vargrad")),
        (pyro.infer.RenyiELBO(num_particles=2), ImportanceWeightedELBO(2)),
    ):
        # (its RenyiELBO.loss fails, though its loss_and_grads does not)
        expected = 0.0 if pair == "loss" else getattr(theirs, pair)(lambda: None, lambda: None)
        assert getattr(ours, pair)(lambda: None, lambda: None) == expected == 0.0


@pytest.mark.parametrize("gradient", ["doubly_reparameterized", "score_function", "vargrad"])
@pytest.mark.parametrize("name", ["lognormal", "mixed", "auxiliary, discrete", "plated"])
def test_kl_weight_with_every_estimator(name: str, gradient: Any) -> None:
    """It weights ``kl_prior`` in the value, and the gradient is linear in it."""
    problem = BY_NAME[name]
    found = []
    for weight in (0.0, 0.5, 1.0):
        pyro.clear_param_store()
        pyro.set_rng_seed(7)
        objective = DecomposedELBO(4, kl_weight=weight, gradient=gradient)
        loss = objective.loss_and_grads(problem.model, problem.guide)
        last = objective.last
        assert last is not None
        assert loss == pytest.approx(-(last.reconstruction - weight * last.kl_prior), rel=1e-5)
        assert objective.history is not None
        assert objective.history.elbo[-1] == pytest.approx(last.elbo, rel=1e-5)
        assert objective.history.objective[-1] == -loss
        parameters = pyro.get_param_store()._params
        found.append([parameters[f"param_{parameter}"].grad.clone() for parameter in problem.params])
    for none, half, full in zip(*found, strict=True):
        torch.testing.assert_close(half, (none + full) / 2, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(none, full)


# ----------------------------------------------------------------------------------------------------------------------
# Gradients in the history

RECORDED: dict[str, Callable[[bool | History], Any]] = {
    "elbo": lambda history: DecomposedELBO(4, history=history),
    "elbo, sampled": lambda history: DecomposedELBO(4, kl="sampled", history=history),
    "elbo, doubly_reparameterized": lambda history: DecomposedELBO(
        4, gradient="doubly_reparameterized", history=history
    ),
    "elbo, vargrad": lambda history: DecomposedELBO(4, gradient="vargrad", history=history),
    "iwae": lambda history: ImportanceWeightedELBO(4, history=history),
    "iwae, doubly_reparameterized": lambda history: ImportanceWeightedELBO(
        4, gradient="doubly_reparameterized", history=history
    ),
    "iwae, score_function": lambda history: ImportanceWeightedELBO(4, gradient="score_function", history=history),
    "iwae, vectorized": lambda history: ImportanceWeightedELBO(4, 1, vectorize_particles=True, history=history),
}


def gradients_in(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None}


@pytest.mark.parametrize("mode", ["steps", "particles"])
@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("problem", ["gaussian", "mixed", "plated"])
def test_recorded_gradients(name: str, mode: Any, problem: str) -> None:
    """The same gradients and parameters as without recording; their ratio is that of gradients collected by hand."""
    program = BY_NAME[problem]
    collected: list[dict[str, Tensor]] = []
    losses: list[list[float]] = []
    for history in (True, History(gradient_snr=mode)):
        pyro.clear_param_store()
        pyro.set_rng_seed(6)
        objective = RECORDED[name](history)
        objective.loss(program.model, program.guide)
        pyro.set_rng_seed(6)
        parameters = {name: pyro.get_param_store()._params[f"param_{name}"] for name in program.params}
        steps, at = [], len(collected)
        optimizer = svi(objective, program.model, program.guide)
        for _ in range(6):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(optimizer, "optim", lambda _, known=parameters: collected.append(gradients_in(known)))
                steps.append(optimizer.step())
        losses.append(steps)
        assert len(collected) == at + 6
    assert losses[0] == losses[1]
    plain, recorded = collected[:6], collected[6:]
    for ours, theirs in zip(recorded, plain, strict=True):
        for parameter, gradient in theirs.items():
            torch.testing.assert_close(ours[parameter], gradient, rtol=2e-5, atol=2e-5)
    table = history.gradient_snr(by="element").set_index(["parameter", "index"])
    assert (table.num_steps == 6).all()
    for parameter in program.params:
        own = table.loc[f"param_{parameter}"]
        by_step = torch.stack([each[parameter].reshape(-1) for each in plain]).double().numpy()
        np.testing.assert_allclose(own["mean"], by_step.mean(0), rtol=1e-4, atol=1e-4)
        if mode == "steps":
            np.testing.assert_allclose(own["sd"], by_step.std(0, ddof=1), rtol=1e-3, atol=1e-4)
            assert (own["sd"] > 0).all()


def test_noise_of_particles_is_that_of_single_ones() -> None:
    """For the ELBO, whose particles are independent: spread of their gradients, against evaluations of one particle."""
    history = History(gradient_snr="particles")
    objective = DecomposedELBO(6, kl="sampled", history=history)
    pyro.set_rng_seed(8)
    steps = 5
    for _ in range(steps):
        objective.loss_and_grads(model, guide)
    single = DecomposedELBO(kl="sampled", history=False)
    parameter = pyro.get_param_store()._params["loc"]
    pyro.set_rng_seed(8)
    gradients = np.empty((steps, 6))
    for index in np.ndindex(steps, 6):
        parameter.grad = None
        single.loss_and_grads(model, guide)
        assert parameter.grad is not None
        gradients[index] = parameter.grad.item()
    row = history.gradient_snr(by="element").set_index("parameter").loc["loc"]
    assert row["mean"] == pytest.approx(gradients.mean(), rel=1e-5)
    assert row["sd"] == pytest.approx(math.sqrt((gradients.var(1, ddof=1) / 6).mean()), rel=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda history: DecomposedELBO(4, 1, vectorize_particles=True, history=history),
        lambda history: DecomposedELBO(1, history=history),
        lambda history: ImportanceWeightedELBO(1, history=history),
    ],
)
def test_particles_that_cannot_be_told_apart(make: Callable[[History], Any]) -> None:
    objective = make(History(gradient_snr="particles"))
    guide()
    parameters = pyro.get_param_store()._params
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with pytest.raises(ValueError, match=r"num_particles of 2 or more with vectorize_particles=False"):
        svi(objective).step()
    assert all(torch.equal(parameters[name], value) for name, value in before.items())
    assert len(objective.history) == 0


@pytest.mark.parametrize("gradient", ["pathwise", "doubly_reparameterized"])
def test_one_particle_needs_no_common_plate(gradient: Any) -> None:
    """A bound of one particle is its log weight, a sum, and so unbiased under any subsample."""
    problem = next(problem for problem in PROBLEMS if problem.name == "subsampled")
    losses = []
    for objective in (RenyiELBO(num_particles=1, gradient=gradient), DecomposedELBO(kl="sampled")):
        pyro.set_rng_seed(5)
        losses.append(objective.loss_and_grads(problem.model, problem.guide))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    with pytest.raises(ValueError, match="local_plates='data'"):
        RenyiELBO(num_particles=2, gradient=gradient).loss_and_grads(problem.model, problem.guide)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("gradient", ["pathwise", "doubly_reparameterized", "score_function"])
@pytest.mark.parametrize("vectorize", [False, "vmap"])
def test_on_cuda(gradient: Any, vectorize: Any) -> None:
    def cuda_model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros((), device="cuda"), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=torch.tensor(2.0, device="cuda"))

    autoguide = AutoNormal(cuda_model)
    objective = ImportanceWeightedELBO(4, gradient=gradient, vectorize_particles=vectorize)
    SVI(cuda_model, autoguide, pyro.optim.Adam({"lr": 0.01}), objective).step()
    assert objective.last is not None
    assert objective.last.log_weights.is_cuda
