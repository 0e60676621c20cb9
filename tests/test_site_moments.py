"""A Gaussian moved to given means and sds of sites on their constrained scale."""

from __future__ import annotations

import numpy as np
import pytest

from pyro_elbo_ext.automatic.evaluations import Array
from pyro_elbo_ext.automatic.gaussian import Gaussian, standard_draws
from pyro_elbo_ext.automatic.site_moments import CLOSE, Moments, move_to_moments

NOISE = standard_draws(np.random.default_rng(0), 4096, 3)
EVEN = np.full(len(NOISE), 1 / len(NOISE))


def sites(u: Array) -> Array:
    """Three latent sites, one of them positive, and a product as a deterministic one."""
    return np.stack([u[:, 0], np.exp(u[:, 1]), u[:, 2], u[:, 0] + np.exp(u[:, 1]) * u[:, 2]], 1)


def target() -> Moments:
    """Exact: mean and sd of a normal and a lognormal variable, and of the sum for independent ones."""
    mean, sd = np.exp(0.4 + 0.5 * 0.6**2), np.exp(0.4 + 0.5 * 0.6**2) * np.sqrt(np.expm1(0.6**2))
    product_variance = (sd**2 + mean**2) * (0.9**2 + 0.2**2) - (mean * 0.2) ** 2
    means = np.array([1.0, mean, 0.2, 1.0 + mean * 0.2])
    return Moments(means, np.array([0.5, sd, 0.9, np.sqrt(0.25 + product_variance)]))


@pytest.mark.parametrize("diagonal", [False, True])
def test_reaches_moments_that_a_gaussian_has(diagonal: bool) -> None:
    start = Gaussian(np.zeros(3), np.ones(3) if diagonal else np.eye(3))
    assert np.abs(Moments.of(sites(start.at(NOISE)), EVEN).errors(target())).max() > 0.3
    moved, worst = move_to_moments(start, NOISE, EVEN, sites, target())
    assert worst < CLOSE
    # on draws that had no part in it: four standard errors of a sd of 40,000 heavy-tailed draws are below 0.05
    fresh = np.random.default_rng(1).standard_normal((40_000, 3))
    errors = Moments.of(sites(moved.at(fresh)), np.ones(40_000)).errors(target())
    assert np.abs(errors).max() < CLOSE + 0.05


def test_changes_little_where_there_is_little_to_change() -> None:
    start = Gaussian(np.array([1.0, 0.4, 0.2]), np.diag([0.5, 0.6, 0.9]))
    moved, worst = move_to_moments(start, NOISE, EVEN, sites, target())
    assert worst < CLOSE
    assert np.abs(moved.loc - start.loc).max() < 0.1
    assert np.abs(moved.factor - start.factor).max() < 0.1


def test_what_no_gaussian_has_is_said() -> None:
    # an sd without a mean shift: a lognormal variable of mean 1 cannot have the mean of its logarithm at 0.5 too
    impossible = Moments(np.array([0.5, 1.0]), np.array([1.0, 1.0]))
    moved, worst = move_to_moments(
        Gaussian(np.zeros(1), np.eye(1)),
        NOISE[:, :1],
        EVEN,
        lambda u: np.concatenate([u, np.exp(u)], 1),
        impossible,
    )
    assert worst > 0.1
    errors = Moments.of(np.concatenate([moved.at(NOISE[:, :1]), np.exp(moved.at(NOISE[:, :1]))], 1), EVEN)
    assert np.abs(errors.errors(impossible)).max() == pytest.approx(worst)


def test_weights_stand_for_draws() -> None:
    """Draws that are wider, weighted back to standard normal, give the same Gaussian up to their noise."""
    rng = np.random.default_rng(2)
    wide = 1.3 * rng.standard_normal((60_000, 3))
    log_weights = -0.5 * (wide**2).sum(1) * (1 - 1 / 1.3**2)
    weights = np.exp(log_weights - log_weights.max())
    start = Gaussian(np.zeros(3), np.eye(3))
    moved, worst = move_to_moments(start, wide, weights / weights.sum(), sites, target())
    assert worst < CLOSE
    plain = Moments.of(sites(moved.at(rng.standard_normal((60_000, 3)))), np.ones(60_000))
    assert np.abs(plain.errors(target())).max() < CLOSE + 0.05
