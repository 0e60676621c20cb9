"""Where automatic guides start and how they climb: densities without a mode, narrow valleys, what quasi-Newton steps do."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_elbo_ext.automatic.approximate import approximate
from pyro_elbo_ext.automatic.ascent import fit_gaussian
from pyro_elbo_ext.automatic.evaluations import Evaluations, TooManyGradients
from pyro_elbo_ext.automatic.gaussian import Gaussian, standard_draws
from pyro_elbo_ext.automatic.moments import tail_of_squares
from pyro_elbo_ext.automatic.quasi_newton import raise_elbo
from pyro_elbo_ext.automatic.starting import find_start
from pyro_elbo_ext.density import LogDensity
from pyro_elbo_ext.inference_data.arviz_statistics import pareto_smoothed
from pyro_elbo_ext.training.automatic_fit import fit_automatically

DEATHS = torch.tensor([0.0, 18, 8, 46, 8, 13, 9, 31, 14, 8, 29, 24])
OPERATIONS = torch.tensor([47.0, 148, 119, 810, 211, 196, 148, 215, 207, 97, 256, 360])
GROUPS = 0.5 + 0.3 * torch.tensor([-1.2, -0.4, 0.1, 0.5, 0.9, -0.2], dtype=torch.float64)


def density_of(model: object) -> LogDensity:
    return LogDensity(model, (), {}, 0)  # type: ignore[arg-type]


def correlated() -> None:
    """A Gaussian density: normalized, so that the greatest ELBO is 0."""
    cov = torch.tensor([[1.0, 1.2, 0.0], [1.2, 4.0, -0.5], [0.0, -0.5, 0.25]], dtype=torch.float64)
    pyro.sample("x", dist.MultivariateNormal(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64), cov))


def wide_funnel() -> None:
    """Twenty coordinates, normalized."""
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("plate", 19):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


def surgical() -> None:
    """Deaths at twelve hospitals (BUGS): the spread of their logits may fall to 0, where the density has a pole's neck."""
    mu, sigma = pyro.sample("mu", dist.Normal(0.0, 1000.0)), pyro.sample("sigma", dist.HalfCauchy(1.0))
    with pyro.plate("hospitals", 12):
        logit = pyro.sample("logit", dist.Normal(mu, sigma))
        pyro.sample("deaths", dist.Binomial(OPERATIONS, logits=logit), obs=DEATHS)


def means() -> None:
    """Six groups of which only the means are seen, with standard error 0.3: the evidence is an integral over one scale."""
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("groups", 6):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 0.3), obs=GROUPS)


def by_quadrature() -> tuple[float, float, float, float]:
    """Log evidence of `means`, mean and sd of log tau, and the sd of tau."""
    log_tau = np.linspace(-14, 3, 20_001)
    tau, y = np.exp(log_tau), GROUPS.numpy()
    variance, n = tau**2 + 0.09, len(y)
    spread = ((y - y.mean()) ** 2).sum() / variance
    of_mean = variance / n + 25.0
    log_density = (
        -0.5 * (n - 1) * np.log(2 * np.pi * variance)
        - 0.5 * np.log(n)
        - 0.5 * spread
        - 0.5 * np.log(2 * np.pi * of_mean)
        - 0.5 * y.mean() ** 2 / of_mean
    )
    log_density += 0.5 * np.log(2 / np.pi) - 0.5 * tau**2 + log_tau
    weights = np.exp(log_density - log_density.max())
    evidence = log_density.max() + math.log(np.trapezoid(weights, log_tau))
    weights /= weights.sum()
    mean = float(weights @ log_tau)
    spread_of_tau = math.sqrt(float(weights @ tau**2 - (weights @ tau) ** 2))
    return evidence, mean, math.sqrt(float(weights @ (log_tau - mean) ** 2)), spread_of_tau


@pytest.mark.parametrize("diagonal", [False, True])
def test_quasi_newton_steps_find_the_gaussian(diagonal: bool) -> None:
    """On draws of exact moments: the density's own, or the diagonal one, whose precisions are the density's diagonal."""
    evaluate = Evaluations(density_of(correlated), 10**6)
    noise = standard_draws(np.random.default_rng(0), 64, 3)
    start = Gaussian(np.zeros(3), np.ones(3) if diagonal else np.eye(3))
    found, values, gradients = raise_elbo(evaluate, start, noise, tolerance=1e-12, most=200)
    cov = np.array([[1.0, 1.2, 0.0], [1.2, 4.0, -0.5], [0.0, -0.5, 0.25]])
    if diagonal:
        np.testing.assert_allclose(found.loc, [1.0, -2.0, 3.0], atol=1e-4)
        np.testing.assert_allclose(found.factor, np.diag(np.linalg.inv(cov)) ** -0.5, rtol=1e-4)
    else:
        np.testing.assert_allclose(found.loc, [1.0, -2.0, 3.0], atol=1e-4)
        np.testing.assert_allclose(found.factor @ found.factor.T, cov, atol=1e-4)
        assert values.mean() + found.entropy == pytest.approx(0.0, abs=1e-8)
    again = evaluate(found.at(noise))
    np.testing.assert_array_equal(values, again[0])
    np.testing.assert_array_equal(gradients, again[1])


def test_quasi_newton_steps_stop_at_the_cap() -> None:
    density, noise = density_of(correlated), standard_draws(np.random.default_rng(0), 64, 3)
    start = Gaussian(np.zeros(3), np.eye(3))
    evaluate = Evaluations(density, 5 * 64)
    found, values, _ = raise_elbo(evaluate, start, noise, tolerance=1e-12, most=200)
    assert evaluate.gradients == 5 * 64
    before, _ = Evaluations(density, 64)(start.at(noise))
    assert values.mean() + found.entropy > before.mean() + start.entropy
    with pytest.raises(TooManyGradients):
        raise_elbo(Evaluations(density, 10), start, noise, tolerance=1e-12, most=200)


def test_valley_is_not_crept_along() -> None:
    """From the neck of a funnel, where each natural-gradient step gains as little as the last (300 did not do)."""
    density = density_of(wide_funnel)
    start = Gaussian(np.full(20, -0.5), np.diag(np.r_[0.3, np.full(19, 0.1)]))
    start.loc[0] = -6.0
    fit = fit_gaussian(Evaluations(density, 300_000), start, np.random.default_rng(0))
    assert fit.converged
    assert fit.path[-1]["elbo"] == pytest.approx(-2.23, abs=0.03)  # of other starts too; draws' error is 0.01


def test_every_seed_starts_where_the_mass_is() -> None:
    """Neither the neck, nor a point that a climb happened to pass: within nats of the greatest ELBO, which is -49.51."""
    density = density_of(surgical)
    for seed in range(2):
        start = find_start(Evaluations(density, 50_000), np.random.default_rng(seed), diagonal=False)
        assert start.modes[0][1] > -51.5


def test_every_seed_ends_alike() -> None:
    """A hierarchy with little to tell its spread, against quadrature: before, seeds ended at three different places."""
    evidence, mean, sd, spread_of_tau = by_quadrature()
    density = density_of(means)
    found = [approximate(density, seed=seed) for seed in range(5)]
    place = density.layout["tau"].start
    for one in found:
        assert one.converged
        assert evidence - 1.0 < one.elbo < evidence + 4 * one.elbo_se
        assert sum(note.startswith("other modes: none") for note in one.notes) == 1
        log_tau = float(one.guide.get_posterior().mean[place].detach())
        assert abs(log_tau - mean) < 0.6 * sd  # as far as a Gaussian goes: the neck is sds away
        # what is said to be enough is: the weights may tell means, and sds that are 0.1 to 0.2 too small
        tau = density.constrain(one.guide.get_posterior().sample((20_000,)).numpy())["tau"]
        if not one.next_guide:
            assert abs(math.log(tau.std() / spread_of_tau)) < 0.1


def test_tail_of_squares_is_heavier_than_that_of_the_weights() -> None:
    """Draws of a Gaussian with 0.75 of the target's sd: the weights' tail has k = 1 - 0.75**2 = 0.44 in the limit."""
    rng = np.random.default_rng(0)
    x = 0.75 * rng.standard_normal(40_000)
    log_weights = -0.5 * x**2 * (1 - 1 / 0.75**2)
    weights = np.exp(log_weights - log_weights.max())
    weights /= weights.sum()
    other = rng.standard_normal(40_000)  # on which the weights do not hang
    khat = tail_of_squares(np.stack([other, x], 1), weights)
    of_weights = pareto_smoothed(log_weights)[1]
    assert of_weights < 0.55
    assert of_weights + 0.05 < khat < 0.85
    assert tail_of_squares(other[:, None], np.full(40_000, 1 / 40_000)) < 0.3


def test_refining_goes_on_from_what_there_is() -> None:
    """Gradients of the Gaussian are not spent again, and one that had not converged is gone on with."""
    density = density_of(wide_funnel)
    first = fit_automatically(density, "auto", (), {}, seed=0, progress=False)
    count = first.approximation.gradients
    flow = fit_automatically(
        density, "flow", (), {}, seed=0, progress=False, start=first.approximation, max_gradients=30_000
    )
    assert flow.approximation.path[0]["draws"] == 256  # a round of the flow's
    assert flow.approximation.gain > 0
    short = approximate(density, seed=0, max_gradients=8000)
    assert not short.converged
    longer = approximate(density, seed=0, start=short)
    assert longer.converged
    assert longer.path[0]["gradients"] < 2000 < count
    with pytest.raises(ValueError, match="start must be a Gaussian"):
        approximate(density, start=flow.approximation)
