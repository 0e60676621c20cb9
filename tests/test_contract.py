"""What every objective and estimator owes on every problem: the exact ELBO in the mean, its exact gradient; or an error."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pytest
import torch

from pyro_elbo_ext import DecomposedELBO, MultiSampleELBO
from pyro_elbo_ext.bounds.bounds import Bound
from pyro_elbo_ext.bounds.gradients import Gradient
from pyro_elbo_ext.terms.kl import KLChoice
from tests.oracles import PROBLEMS, Problem
from tests.test_gradients import BOUNDS, GRADIENTS, name_of

STANDARD_ERRORS = 4.5  # two-sided 7e-6 for each figure compared


def estimates(problem: Problem, draws: int, **options: Any) -> tuple[np.ndarray, dict[str, np.ndarray], DecomposedELBO]:
    """Losses (draws,) and gradients of the loss by parameter, each (draws, numel), from fresh evaluations."""
    elbo = DecomposedELBO(**options)
    losses, gradients = [], {name: [] for name in problem.params}
    for _ in range(draws):
        losses.append(elbo.loss_and_grads(problem.model, problem.guide))
        for name, store in gradients.items():
            parameter = pyro.get_param_store()._params[f"param_{name}"]
            store.append(parameter.grad.reshape(-1).clone())
            parameter.grad = None
    return np.array(losses), {name: torch.stack(store).numpy() for name, store in gradients.items()}, elbo


# Sampled values and gradients equal Pyro's (test_parity.py), but for auxiliary sites, where Pyro's gradient is biased.
CASES = [*((problem, "auto") for problem in PROBLEMS), *((p, "sampled") for p in PROBLEMS if "auxiliary" in p.name)]


def assert_unbiased(problem: Problem, losses: np.ndarray, gradients: dict[str, np.ndarray]) -> None:
    """Compare means over evaluations with the exact ELBO and its gradient."""
    draws = len(losses)
    params = {name: value.double().requires_grad_() for name, value in problem.params.items()}
    exact = problem.exact(params)
    exact.backward()

    def compare(what: str, samples: np.ndarray, truth: np.ndarray) -> None:
        error = samples.mean(0) - truth
        standard_error = samples.std(0, ddof=1) / math.sqrt(draws)
        assert (np.abs(error) <= STANDARD_ERRORS * standard_error + 2e-5 * (1 + np.abs(truth))).all(), (
            what,
            error,
            standard_error,
        )
        assert (standard_error <= 0.25 * (1 + np.abs(truth))).all(), f"{what}: too few draws to tell ({standard_error})"

    compare("loss", losses, -np.asarray(exact.item()))
    for name, parameter in params.items():
        assert parameter.grad is not None
        compare(f"gradient of {name}", gradients[name], -parameter.grad.reshape(-1).numpy())


@pytest.mark.parametrize(("problem", "kl"), CASES, ids=str)
def test_unbiased(problem: Problem, kl: KLChoice) -> None:
    losses, gradients, elbo = estimates(problem, problem.draws, kl=kl)
    assert_unbiased(problem, losses, gradients)
    assert elbo.history is not None
    latent = elbo.history.to_dataframe().query("step == 0 and kind != 'observed'").set_index("site")
    expected = problem.methods if kl == "auto" else dict.fromkeys(problem.methods, "sampled")
    assert latent.kl_method.to_dict() == expected


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("kl", ["auto", "sampled"])
def test_terms_sum_to_the_elbo(problem: Problem, kl: KLChoice) -> None:
    elbo = DecomposedELBO(kl=kl)
    loss = elbo.loss_and_grads(problem.model, problem.guide)
    terms = elbo.last
    assert terms is not None
    assert elbo.history is not None
    frame = elbo.history.to_dataframe()
    assert frame.reconstruction.sum() - frame.kl_prior.sum() == pytest.approx(-loss, abs=1e-9)
    assert terms.reconstruction - terms.kl_prior == pytest.approx(-loss, abs=1e-4)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("kl", ["auto", "sampled"])
def test_the_three_losses_agree_under_one_seed(problem: Problem, kl: KLChoice) -> None:
    elbo = DecomposedELBO(kl=kl)
    elbo.loss(problem.model, problem.guide)
    values = []
    for evaluate in (elbo.loss, elbo.loss_and_grads, elbo.differentiable_loss):
        pyro.set_rng_seed(3)
        value = evaluate(problem.model, problem.guide)
        values.append(value.item() if isinstance(value, torch.Tensor) else value)
    assert values[0] == values[1]
    assert values[2] == pytest.approx(values[0], rel=1e-6)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_particles_are_averaged(problem: Problem) -> None:
    single, double = DecomposedELBO(), DecomposedELBO(num_particles=2)
    for elbo in (single, double):  # the first call tracks dependencies
        elbo.loss(problem.model, problem.guide)
    pyro.set_rng_seed(5)
    two = [single.loss(problem.model, problem.guide) for _ in range(2)]
    pyro.set_rng_seed(5)
    assert double.loss(problem.model, problem.guide) == pytest.approx(sum(two) / 2, rel=1e-6)
    assert double.last is not None
    assert double.last.elbo == pytest.approx(-sum(two) / 2, rel=1e-5)
    assert all(term.log_q is None or len(term.log_q) == 2 for term in double.last.values())


# Every bound with every estimator on every problem

ESTIMATORS = [gradient for gradient in GRADIENTS if gradient.name != "pathwise"]
SEED = 11


def expected_error(problem: Problem, bound: Bound, gradient: Gradient) -> str | None:
    """The remedy that the error names; None where there is none. A combination that changes sides fails a test."""
    if gradient.name == "vargrad" and not bound.linear:
        return "Use gradient='score_function'"
    if problem.name == "subsampled" and not bound.linear:
        return "Use local_plates='data'.*or all the data, or DecomposedELBO"
    return None


def seeded(evaluate: Any, problem: Problem) -> float:
    pyro.set_rng_seed(SEED)
    value = evaluate(problem.model, problem.guide)
    return float(value.detach()) if isinstance(value, torch.Tensor) else value


def collect(problem: Problem) -> dict[str, torch.Tensor]:
    """The parameters' gradients, taken away from them."""
    found = {}
    for name in problem.params:
        parameter = pyro.get_param_store()._params[f"param_{name}"]
        found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        parameter.grad = None
    return found


def assert_gradients_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, msg=lambda text, name=name: f"{name}: {text}")
        assert gradient.isfinite().all()


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("gradient", GRADIENTS, ids=name_of)
@pytest.mark.parametrize("bound", BOUNDS, ids=str)
def test_every_bound_with_every_estimator_works_or_says_what_to_do(
    bound: Bound, gradient: Gradient, problem: Problem
) -> None:
    remedy = expected_error(problem, bound, gradient)
    if remedy is not None:
        with pytest.raises(ValueError, match=f"(?s){remedy}"):
            MultiSampleELBO(bound, 3, gradient=gradient).loss_and_grads(problem.model, problem.guide)
        return
    objective = MultiSampleELBO(bound, 3, gradient=gradient, retain_graph=True)
    assert objective.gradient == gradient.name

    loss = seeded(objective.loss_and_grads, problem)
    gradients = collect(problem)
    assert math.isfinite(loss)
    assert any(each.any() for each in gradients.values())
    assert seeded(objective.loss, problem) == loss
    assert not any(each.any() for each in collect(problem).values())
    pyro.set_rng_seed(SEED)
    differentiable = objective.differentiable_loss(problem.model, problem.guide)
    assert differentiable.shape == ()
    assert differentiable.item() == pytest.approx(loss, rel=1e-6, abs=1e-6)
    differentiable.backward(retain_graph=True)
    assert_gradients_equal(collect(problem), gradients)
    differentiable.backward()  # nothing of the graph was used up on the way
    assert_gradients_equal(collect(problem), gradients)

    assert objective.last is not None
    sign = -1 if bound.side == "lower" else 1
    if not bound.linear and not any("data" in term.plates for term in objective.last.values()):
        scale = {"scaled guide": 0.1, "scaled by different tensors": 0.6}.get(problem.name, 1.0)
        value = scale * bound.value(objective.last.log_weights / scale)
        assert loss == pytest.approx(sign * value.item(), rel=1e-5, abs=1e-5)
    if bound.linear:
        assert loss == pytest.approx(-objective.last.elbo, rel=1e-5, abs=1e-5)
    assert objective.history is not None
    assert objective.history.objective.tolist() == [sign * loss] * 2


@pytest.mark.parametrize("vectorize", [True, "vmap"])
@pytest.mark.parametrize("gradient", GRADIENTS, ids=name_of)
@pytest.mark.parametrize("bound", BOUNDS, ids=str)
def test_every_bound_with_every_estimator_vectorized(bound: Bound, gradient: Gradient, vectorize: Any) -> None:
    """All problems can be: the same value and gradient from the three ways to evaluate, and the value from the terms."""
    for problem in PROBLEMS:
        if expected_error(problem, bound, gradient) is not None:
            continue
        pyro.clear_param_store()
        nesting = 1 if problem.name in ("plated", "subsampled") else 0
        objective = MultiSampleELBO(bound, 3, nesting, vectorize_particles=vectorize, gradient=gradient)
        loss = seeded(objective.loss_and_grads, problem)
        gradients = collect(problem)
        assert math.isfinite(loss), problem
        assert seeded(objective.loss, problem) == pytest.approx(loss, rel=1e-6, abs=1e-6)
        pyro.set_rng_seed(SEED)
        objective.differentiable_loss(problem.model, problem.guide).backward()
        assert_gradients_equal(collect(problem), gradients)
        assert objective.last is not None
        log_weights = objective.last.log_weights
        assert log_weights.shape == (3,)
        assert problem.name == "delta" or len(set(log_weights.tolist())) > 1
        sign = -1 if bound.side == "lower" else 1
        scale = {"scaled guide": 0.1, "scaled by different tensors": 0.6}.get(problem.name, 1.0)
        value = scale * bound.value(log_weights / scale)
        assert loss == pytest.approx(sign * value.item(), rel=1e-5, abs=1e-5), problem


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("gradient", ESTIMATORS, ids=name_of)
def test_no_estimator_changes_the_value(gradient: Gradient, problem: Problem) -> None:
    # looped particles share a subsample under these estimators alone; vectorized ones always do
    options = {"vectorize_particles": True, "max_plate_nesting": 1} if problem.name == "subsampled" else {}
    plain = DecomposedELBO(3, kl="sampled", **options)
    expected = seeded(plain.loss, problem)
    objective = DecomposedELBO(3, gradient=gradient, **options)
    assert seeded(objective.loss_and_grads, problem) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert seeded(objective.loss, problem) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert plain.last is not None
    assert objective.last is not None
    assert objective.last.contributions is None
    columns = ["site", "kind", "log_p", "log_q", "reconstruction", "kl_prior", "scale"]
    ours, theirs = objective.last.to_dataframe()[columns], plain.last.to_dataframe()[columns]
    assert ours.site.to_list() == theirs.site.to_list()
    np.testing.assert_allclose(ours[columns[2:]], theirs[columns[2:]], rtol=1e-5, atol=1e-6)


UNBIASED = [
    "gaussian",
    "scaled by different tensors",
    "lognormal",
    "delta",
    "chain, guide backward",
    "mixed",
    "auxiliary, discrete",
    "subsampled",
]


@pytest.mark.parametrize("problem", [problem for problem in PROBLEMS if problem.name in UNBIASED], ids=str)
@pytest.mark.parametrize("gradient", ["doubly_reparameterized", "score_function"])
def test_every_estimator_of_the_elbo_is_unbiased(gradient: Any, problem: Problem) -> None:
    with pyro.validation_enabled(False):
        losses, gradients, _ = estimates(
            problem, min(problem.draws, 400), num_particles=3, gradient=gradient, history=False
        )
    assert_unbiased(problem, losses, gradients)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_vargrad_is_the_score_function_with_leave_one_out_baseline(problem: Problem) -> None:
    found = []
    for gradient in ("score_function", "vargrad"):
        loss = seeded(DecomposedELBO(4, gradient=gradient).loss_and_grads, problem)
        found.append((loss, collect(problem)))
    assert found[0][0] == found[1][0]
    assert_gradients_equal(found[1][1], found[0][1])
