"""Every estimator is unbiased for the gradient of every bound, and has the variance that is known of it."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any, get_args, get_type_hints

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.testing.fakes import NonreparameterizedNormal

from pyro_elbo_ext import DecomposedELBO, ImportanceWeightedELBO, MultiSampleELBO, RenyiELBO
from pyro_elbo_ext.bounds import bounds, gradients
from pyro_elbo_ext.bounds.bounds import CUBO, ELBO, IWAE, TVO, Bound, Renyi
from pyro_elbo_ext.bounds.gradients import Gradient
from tests.bound_oracles import PROBLEMS, Problem, hermite, normal, replicated

STANDARD_ERRORS = 5.0  # two-sided 6e-7 for each figure compared
REPLICATES = 20_000


def concrete(module: Any, base: type) -> list[type]:
    """Subclasses of ``base`` that a module defines, by themselves, so that a new one is found."""
    return [
        cls
        for name, cls in vars(module).items()
        if inspect.isclass(cls) and issubclass(cls, base) and not inspect.isabstract(cls) and not name.startswith("_")
    ]


def examples(cls: type) -> list[Any]:
    """An instance with the defaults, and one for every other choice of its Literal fields."""
    instances = [cls()]
    for one in dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ():
        choices = get_args(get_type_hints(cls, vars(bounds))[one.name])
        instances += [
            cls(**{one.name: choice}) for choice in choices if isinstance(choice, str) and choice != one.default
        ]
    return instances


BOUNDS: list[Bound] = [bound for cls in concrete(bounds, Bound) for bound in examples(cls)]
GRADIENTS: list[Gradient] = [cls() for cls in concrete(gradients, Gradient)]


def works(gradient: Gradient, bound: Bound) -> bool:
    try:
        gradient.check(bound, 2)
    except ValueError:
        return False
    return True


COMBINATIONS = [(bound, gradient) for bound in BOUNDS for gradient in GRADIENTS if works(gradient, bound)]


def name_of(value: object) -> str:
    return value.name if isinstance(value, Gradient) else str(value)


def test_the_combinations_are_found() -> None:
    assert {type(bound) for bound in BOUNDS} >= {ELBO, IWAE, Renyi, CUBO, TVO}
    assert {bound.side for bound in BOUNDS if isinstance(bound, TVO)} == {"lower", "upper"}
    assert {gradient.name for gradient in GRADIENTS} == set(get_args(gradients.GradientName))
    assert len(COMBINATIONS) == 3 * len(BOUNDS) + 1  # VarGrad with the ELBO alone


def estimate(problem: Problem, objective: Any) -> tuple[float, dict[str, np.ndarray]]:
    """Loss per copy, and every copy's own estimate of the gradient, each (replicates,)."""
    with pyro.validation_enabled(False):
        loss = objective.loss_and_grads(problem.model, problem.guide, REPLICATES)
    store = pyro.get_param_store()._params
    return loss / REPLICATES, {name: store[f"param_{name}"].grad.numpy().copy() for name in problem.params}


PARTICLES = [*((problem, 2) for problem in PROBLEMS), *((p, 3) for p in PROBLEMS if p.name in ("gaussian", "discrete"))]


@pytest.mark.parametrize(("problem", "num_particles"), PARTICLES, ids=str)
@pytest.mark.parametrize(("bound", "gradient"), COMBINATIONS, ids=name_of)
def test_unbiased(problem: Problem, num_particles: int, bound: Bound, gradient: Gradient) -> None:
    check_unbiased(problem, MultiSampleELBO(bound, num_particles, gradient=gradient, history=False))


def check_unbiased(problem: Problem, objective: MultiSampleELBO) -> None:
    """Compare the means over the copies of the problem with the exact bound and its exact gradient."""
    bound = objective.bound
    params = {name: torch.tensor(value).double().requires_grad_() for name, value in problem.params.items()}
    exact = problem.exact(bound, objective.num_particles, params) * problem.scale
    exact.backward()
    sign = -1.0 if bound.side == "lower" else 1.0

    loss, estimates = estimate(problem, objective)
    assert objective.last is not None
    values = problem.scale * bound.value(per_copy_log_weights(objective) / problem.scale)
    assert loss == pytest.approx(sign * values.mean().item(), rel=1e-4, abs=1e-5)
    error = values.mean().item() - exact.item()
    assert abs(error) <= STANDARD_ERRORS * values.std().item() / math.sqrt(REPLICATES) + 1e-5
    for name, parameter in params.items():
        assert parameter.grad is not None
        truth = sign * parameter.grad.item()
        ours = estimates[name]
        standard_error = ours.std(ddof=1) / math.sqrt(REPLICATES)
        assert abs(ours.mean() - truth) <= STANDARD_ERRORS * standard_error + 2e-4 * (0.01 + abs(truth)), (
            name,
            ours.mean(),
            truth,
            standard_error,
        )
        assert standard_error <= 0.05 * (1 + abs(truth)), f"{name}: too few copies to tell"


@pytest.mark.parametrize("bound", [IWAE(), CUBO(2.0)], ids=str)
def test_a_discrete_draw_that_depends_on_a_reparameterized_one(bound: Bound) -> None:
    """With many times the draws: its score has a path that the direct part of log q must share, 2% of the gradient here."""
    problem = next(of for of in PROBLEMS if of.name == "continuous, then discrete")
    params = {name: torch.tensor(value).double().requires_grad_() for name, value in problem.params.items()}
    problem.exact(bound, 2, params).backward()
    sign = -1.0 if bound.side == "lower" else 1.0
    found: dict[str, list[float]] = {name: [] for name in params}
    errors: dict[str, list[float]] = {name: [] for name in params}
    for seed in range(12):
        pyro.set_rng_seed(seed)
        pyro.clear_param_store()
        objective = MultiSampleELBO(bound, 2, gradient="doubly_reparameterized", history=False)
        for name, values in estimate(problem, objective)[1].items():
            found[name].append(values.mean())
            errors[name].append(values.std(ddof=1) / math.sqrt(REPLICATES))
    for name, parameter in params.items():
        assert parameter.grad is not None
        standard_error = np.sqrt(np.mean(np.square(errors[name])) / len(errors[name]))
        assert abs(np.mean(found[name]) - sign * parameter.grad.item()) < STANDARD_ERRORS * standard_error, name


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("gradient", ["pathwise", "doubly_reparameterized", "score_function"])
def test_one_particle_is_the_elbo(problem: Problem, gradient: Any) -> None:
    """Every bound of one particle is its log weight: the same value and gradient under one seed."""
    found = []
    for bound in BOUNDS:
        pyro.set_rng_seed(1)
        pyro.clear_param_store()
        objective = MultiSampleELBO(bound, 1, gradient=gradient, history=False)
        objective.maximized = True
        found.append(estimate(problem, objective))
    for loss, each in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        for name, gradients_by_copy in each.items():
            np.testing.assert_allclose(gradients_by_copy, found[0][1][name], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("vectorize", [False, "vmap"])
def test_a_discrete_site_has_a_gradient_where_pyros_is_zero(vectorize: Any) -> None:
    problem = next(problem for problem in PROBLEMS if problem.name == "discrete")
    logit = torch.tensor(problem.params["k"]).double().requires_grad_()
    problem.exact(IWAE(), 2, {"k": logit}).backward()
    assert logit.grad is not None
    _, ours = estimate(problem, RenyiELBO(alpha=0, num_particles=2, vectorize_particles=vectorize))
    standard_error = float(ours["k"].std()) / math.sqrt(REPLICATES)
    assert ours["k"].mean() == pytest.approx(-logit.grad.item(), abs=STANDARD_ERRORS * standard_error)
    assert abs(ours["k"].mean()) > 10 * standard_error
    pyro.clear_param_store()
    _, theirs = estimate(problem, pyro.infer.RenyiELBO(alpha=0, num_particles=2))
    assert (theirs["k"] == 0.0).all()


def per_copy_log_weights(objective: Any) -> torch.Tensor:
    """Scaled log weights of every copy, shape (K, replicates), from the recorded terms."""
    total: Any = 0.0
    for term in objective.last.values():
        total = total + (0.0 if term.log_p is None else term.log_p) - (0.0 if term.log_q is None else term.log_q)
    return total


# The ELBO outside a plate, the bound inside: w ~ N(0, 1); for i of 2, z_i ~ N(w, 1), x_i ~ N(z_i, 0.5)

LOCAL = {"m": 0.4, "log_s": -0.3, "slope": 0.6, "shift": 0.5, "log_r": -0.5, "prior": 0.2}
DATA = torch.tensor([[1.5], [-0.5]])


def local_program(is_model: bool, subsample_size: int | None, family: Any = dist.Normal) -> Any:
    def program(replicates: int) -> None:
        m, log_s, slope, shift, log_r, prior = (replicated(name, value, replicates) for name, value in LOCAL.items())
        with pyro.plate("copies", replicates, dim=-1):
            w = pyro.sample("w", family(prior, torch.ones(())) if is_model else family(m, log_s.exp()))
            with pyro.plate("data", 2, subsample_size=subsample_size, dim=-2) as i:
                z = pyro.sample("z", dist.Normal(w, 1.0) if is_model else dist.Normal(slope * w + shift, log_r.exp()))
                if is_model:
                    pyro.sample("x", dist.Normal(z, 0.5), obs=DATA[i].expand(len(i), replicates))

    return program


def exact_local(bound: Bound, params: dict[str, torch.Tensor]) -> torch.Tensor:
    nodes, probabilities = hermite(24)
    w = (params["m"] + params["log_s"].exp() * nodes).unsqueeze(-1)
    center, scale = params["slope"] * w + params["shift"], params["log_r"].exp()
    z = center + scale * nodes
    total = (normal(params["prior"], 1.0, w) - normal(params["m"], params["log_s"].exp(), w)).squeeze(-1)
    for x in DATA.double():
        log_weights = normal(w, 1.0, z) + normal(z, 0.5, x) - normal(center, scale, z)  # (w, z)
        pairs = torch.stack(
            [log_weights.unsqueeze(-1).expand(24, 24, 24), log_weights.unsqueeze(-2).expand(24, 24, 24)]
        )
        total = total + (bound.value(pairs) * torch.outer(probabilities, probabilities)).sum((-2, -1))
    return (probabilities * total).sum()


@pytest.mark.parametrize("subsample_size", [None, 1])
@pytest.mark.parametrize("family", [dist.Normal, NonreparameterizedNormal])
@pytest.mark.parametrize("gradient", ["pathwise", "score_function"])
@pytest.mark.parametrize("bound", [IWAE(), ELBO()], ids=str)
def test_a_bound_inside_a_plate_is_unbiased(
    bound: Bound, gradient: Any, family: Any, subsample_size: int | None
) -> None:
    objective = MultiSampleELBO(bound, 2, gradient=gradient, local_plates="data", history=False)
    params = {name: torch.tensor(value).double().requires_grad_() for name, value in LOCAL.items()}
    exact = exact_local(bound, params)
    exact.backward()
    if family is dist.Normal and gradient == "pathwise" and subsample_size is None:  # each copy's gradient is its own
        replicates = REPLICATES
        program = [local_program(is_model, subsample_size) for is_model in (True, False)]
        loss = objective.loss_and_grads(*program, replicates)
        store = pyro.get_param_store()._params
        samples = {name: store[f"param_{name}"].grad.clone() for name in LOCAL}
        losses = None
    else:  # all copies have one subsample, and a shared draw without a path has all of them as its cost
        replicates = 800
        program = [
            local_program(is_model, subsample_size, family if not is_model else dist.Normal)
            for is_model in (True, False)
        ]
        each: list[dict[str, torch.Tensor]] = []
        losses = []
        for _ in range(replicates):
            losses.append(objective.loss_and_grads(*program, 1))
            store = pyro.get_param_store()._params
            each.append({name: store[f"param_{name}"].grad.clone() for name in LOCAL})
            for name in LOCAL:
                store[f"param_{name}"].grad = None
        samples = {name: torch.cat([one[name] for one in each]) for name in LOCAL}
        loss = sum(losses)
    if losses is not None:
        error = loss / replicates + exact.item()
        assert abs(error) <= STANDARD_ERRORS * np.std(losses) / math.sqrt(replicates)
    else:
        assert loss / replicates == pytest.approx(-exact.item(), abs=0.06)
    for name, parameter in params.items():
        assert parameter.grad is not None
        ours, truth = samples[name], -parameter.grad.item()
        standard_error = ours.std().item() / math.sqrt(replicates)
        assert abs(ours.mean().item() - truth) <= STANDARD_ERRORS * standard_error + 1e-4, (name, ours.mean(), truth)
        assert standard_error <= 0.4 * (1 + abs(truth)), f"{name}: too few draws to tell"


# What is known of the variances


def conjugate(replicates: int) -> None:
    with pyro.plate("copies", replicates):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.2).expand(replicates))


def away_from_posterior(distance: float) -> Any:
    """Guide at a distance from the posterior N(0.6, sd sqrt(0.5))."""

    def guide(replicates: int) -> None:
        with pyro.plate("copies", replicates):
            loc = pyro.param("param_m", torch.full((replicates,), 0.6 + distance))
            log_scale = pyro.param("param_log_s", torch.full((replicates,), 0.5 * math.log(0.5) + 0.3 * distance))
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))

    return guide


def gradients_of(objective: Any, guide: Any, replicates: int = 2000) -> dict[str, torch.Tensor]:
    """Each copy's estimate of the gradient, in float64."""
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    objective.loss_and_grads(conjugate, guide, replicates)
    store = pyro.get_param_store()._params
    return {name: store[f"param_{name}"].grad.clone() for name in ("m", "log_s")}


@pytest.mark.parametrize("gradient", ["doubly_reparameterized", "score_function", "vargrad"])
@pytest.mark.parametrize("num_particles", [2, 5])
def test_no_variance_where_the_guide_is_the_posterior(gradient: Any, num_particles: int) -> None:
    found = gradients_of(DecomposedELBO(num_particles, gradient=gradient), away_from_posterior(0.0))
    for name, each in found.items():
        assert each.abs().max() < 1e-12, name
    noisy = gradients_of(DecomposedELBO(num_particles, kl="sampled"), away_from_posterior(0.0))
    assert all(each.std() > 0.1 for each in noisy.values())


@pytest.mark.parametrize("bound", [bound for bound in BOUNDS if not bound.linear], ids=str)
@pytest.mark.parametrize("gradient", ["doubly_reparameterized", "score_function"])
def test_no_variance_at_the_posterior_for_any_bound(bound: Bound, gradient: Any) -> None:
    for name, each in gradients_of(MultiSampleELBO(bound, 4, gradient=gradient), away_from_posterior(0.0)).items():
        assert each.abs().max() < 1e-12, name


def test_sticking_the_landing_needs_one_particle() -> None:
    found = gradients_of(DecomposedELBO(gradient="doubly_reparameterized"), away_from_posterior(0.0))
    assert all(each.abs().max() < 1e-12 for each in found.values())


@pytest.mark.parametrize(("gradient", "slope"), [("pathwise", -0.5), ("doubly_reparameterized", 0.5)])
def test_signal_to_noise_of_the_guides_gradient(gradient: Any, slope: float) -> None:
    """Rainforth et al. (2018), figure 1, and Tucker et al. (2019): slopes on log-log axes, -1/2 and +1/2."""
    counts, ratios = np.array([8, 16, 32, 64, 128]), []
    for count in counts:
        objective = ImportanceWeightedELBO(
            int(count), vectorize_particles=True, max_plate_nesting=1, gradient=gradient, history=False
        )
        # small K have little to average out, large K little signal
        each = gradients_of(objective, away_from_posterior(0.4), 60_000)["m"]
        ratios.append((each.mean().abs() / each.std()).item())
    fitted = np.polyfit(np.log(counts), np.log(ratios), 1)[0]
    assert fitted == pytest.approx(slope, abs=0.1), ratios


def test_vargrad_is_the_gradient_of_half_the_variance_of_the_log_weights() -> None:
    problem = next(problem for problem in PROBLEMS if problem.name == "hierarchical")
    objective = DecomposedELBO(4, gradient="vargrad", history=False)
    pyro.set_rng_seed(2)
    objective.loss_and_grads(problem.model, problem.guide, 3)
    store = pyro.get_param_store()._params
    found = {name: store[f"param_{name}"].grad.clone() for name in problem.params}
    pyro.set_rng_seed(2)
    log_weights = []
    for _ in range(4):
        guide_trace = pyro.poutine.trace(problem.guide).get_trace(3)
        for node in guide_trace.nodes.values():
            if node["type"] == "sample" and not node["is_observed"]:
                node["value"] = node["value"].detach()
        fixed = pyro.poutine.trace(pyro.poutine.replay(problem.guide, trace=guide_trace)).get_trace(3)
        model_trace = pyro.poutine.trace(pyro.poutine.replay(problem.model, trace=guide_trace)).get_trace(3)
        log_q = sum(fixed.nodes[name]["fn"].log_prob(guide_trace.nodes[name]["value"]) for name in ("a", "b"))
        log_p = sum(
            node["fn"].log_prob(node["value"]) for name, node in model_trace.nodes.items() if name in ("a", "b", "x")
        )
        log_weights.append(log_p.detach() - log_q)  # type: ignore[union-attr]
    half_variance = 0.5 * torch.stack(log_weights).var(0).sum()
    names = [name for name in problem.params if name != "prior"]
    expected = torch.autograd.grad(half_variance, [store[f"param_{name}"] for name in names])
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


def test_leave_one_out_beats_the_plain_score_function() -> None:
    class Plain(gradients.ScoreFunction):
        """Without a baseline."""

        def surrogate(self, weights: gradients.Weights, bound: Bound) -> torch.Tensor:
            log_weights = weights.log_weights.detach()
            assert weights.scores is not None
            total = bound.gradient(log_weights) * weights.log_weights + bound.value(log_weights) * weights.scores
            return total.flatten(1).sum(1)

    problem = next(problem for problem in PROBLEMS if problem.name == "discrete")
    variances = []
    for gradient in ("pathwise", Plain()):
        _, found = estimate(problem, ImportanceWeightedELBO(5, gradient=gradient, history=False))  # type: ignore[arg-type]
        variances.append(found["k"].var())
        pyro.clear_param_store()
    assert variances[0] < 0.1 * variances[1]
