"""What every estimator owes on every problem: the exact ELBO in the mean, and its exact gradient."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pytest
import torch

from pyro_elbo_ext import DecomposedELBO
from pyro_elbo_ext.kl import KLChoice
from tests.oracles import PROBLEMS, Problem

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


@pytest.mark.parametrize(("problem", "kl"), CASES, ids=str)
def test_unbiased(problem: Problem, kl: KLChoice) -> None:
    draws = problem.draws
    losses, gradients, elbo = estimates(problem, draws, kl=kl)

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
