"""ArviZ's statistics, whichever generation of it is installed.  Its data structures are `export`'s business."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.special import logsumexp

from pyro_elbo_ext.inference_data.export import dataset_of
from pyro_elbo_ext.inference_data.quiet_arviz import import_arviz


def ecdf_band(
    count: int, points: NDArray[np.float64], prob: float = 0.95, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Simultaneous band of the empirical distribution function of uniform numbers, by ArviZ.

    Parameters
    ----------
    count
        How many numbers, N.
    points
        Where the function is looked at, increasing, in (0, 1), shape (G,).
    prob
        Probability that the function is inside at all of the points.
    seed
        Of the simulation that finds the band.

    Returns
    -------
    tuple of numpy.ndarray
        Lower and upper limit, shape (G,).

    References
    ----------
    Säilynoja, Bürkner, Vehtari (2022), Graphical test for discrete uniformity and its applications.
    """
    rng = np.random.default_rng(seed)
    try:
        from arviz_stats import ecdf_utils as new  # ArviZ 1.x
    except ImportError:
        import_arviz()
        from arviz.stats import ecdf_utils as old  # ArviZ 0.x

        def draw(size: int, random_state: np.random.Generator) -> NDArray[np.float64]:
            return random_state.uniform(size=size)

        lower, upper = old.ecdf_confidence_band(
            count, points, points, prob, "simulated", rvs=draw, num_trials=1000, random_state=rng
        )
    else:
        pointwise = new.simulate_confidence_bands(count, 1, points, prob, 1000, rng)
        lower, upper = new.get_pointwise_confidence_band(pointwise, count, points)
    return np.asarray(lower), np.asarray(upper)


def effective_size(draws: NDArray[np.float64]) -> float:
    """Effective sample size for the mean of draws of shape ``(chain, draw)``."""
    arviz = import_arviz()

    return float(arviz.ess(np.asarray(draws, dtype=np.float64), method="mean"))


def split_r_hat(draws: NDArray[np.float64]) -> NDArray[np.float64]:
    """Split R-hat of one chain's draws, not of their ranks: the first half as one chain, the second as another.

    Parameters
    ----------
    draws
        Shape ``(S, P)``, S >= 8; the first one is left out where S is odd.

    Returns
    -------
    numpy.ndarray
        Of each column, shape ``(P,)``; NaN where the column is constant.

    References
    ----------
    Gelman and Rubin (1992), Inference from iterative simulation using multiple sequences.
    """
    arviz = import_arviz()

    half = len(draws) // 2
    halves = np.asarray(draws, dtype=np.float64)[-2 * half :].reshape(2, half, -1)
    return np.array([float(arviz.rhat(halves[..., p], method="identity")) for p in range(halves.shape[-1])])


def leave_one_out(data: Any, name: str) -> tuple[xr.DataArray, xr.DataArray, str]:
    """Expected log predictive density of each observation, by Pareto-smoothed importance sampling.

    Parameters
    ----------
    data
        ArviZ data with the group ``log_likelihood``. Where ``sample_stats`` has ``log_p`` and ``log_q`` the draws are an
        approximation's, whose distance from the posterior is weighted away too, if the installed ArviZ can (1.x).
    name
        Observed site.

    Returns
    -------
    tuple
        ``elpd_i`` in nats and k-hat, both of the observations' dims, and the name of ArviZ's function.

    References
    ----------
    Vehtari, Gelman, Gabry (2017), Practical Bayesian model evaluation using leave-one-out cross-validation and WAIC.
    Magnusson, Andersen, Jonasson, Vehtari (2019), Bayesian Leave-One-Out Cross-Validation for Large Data.
    """
    arviz = import_arviz()

    groups = [group.strip("/") for group in data.groups] if isinstance(data, xr.DataTree) else data.groups()
    stats = dataset_of(data, "sample_stats") if "sample_stats" in groups else xr.Dataset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Pareto")  # the caller gets k-hat itself
        if hasattr(arviz, "loo_approximate_posterior") and {"log_p", "log_q"} <= set(stats):
            method = "loo_approximate_posterior"
            found = arviz.loo_approximate_posterior(data, stats["log_p"], stats["log_q"], pointwise=True, var_name=name)
        else:
            method = "loo"
            found = arviz.loo(data, pointwise=True, var_name=name)
    elpd = found.elpd_i if hasattr(found, "elpd_i") else found.loo_i
    return elpd, found.pareto_k, method


def pareto_smoothed(log_weights: NDArray[np.float64], noise: float = 0.0) -> tuple[NDArray[np.float64], float]:
    """ArviZ's Pareto-smoothed importance sampling, of either generation.

    Parameters
    ----------
    log_weights
        Log importance weights, shape ``(S,)``; -inf is a weight of zero.
    noise
        Differences of log weights up to this one, in nats, are rounding errors.

    Returns
    -------
    tuple of ndarray and float
        Smoothed log weights, whose weights sum to one, shape ``(S,)``, and k-hat. Where the tail that k-hat is fitted to is
        flat, the weights are bounded: k-hat is -inf and nothing is smoothed. Where the tail has fewer than 5 draws, or
        weights of zero, k-hat cannot be told: it is inf and nothing is smoothed.

    References
    ----------
    Vehtari, Simpson, Gelman, Yao, Gabry (2024), Pareto smoothed importance sampling.
    """
    count = len(log_weights)
    length = int(np.ceil(min(count / 5, 3 * count**0.5)))
    tail = np.sort(log_weights)[-min(count, length + 1) :]
    if length < 5 or tail[0] == -np.inf:
        return log_weights - logsumexp(log_weights), np.inf
    if tail[-1] - tail[0] <= noise:
        return log_weights - logsumexp(log_weights), -np.inf
    arviz = import_arviz()

    with np.errstate(over="ignore"):  # of candidates that have no part in what it finds
        if hasattr(arviz, "psislw"):
            smoothed, khat = arviz.psislw(log_weights)
        else:
            from arviz_stats.base import array_stats

            smoothed, khat = array_stats.psislw(
                -log_weights
            )  # it takes log likelihoods, whose inverses are the weights
    if np.isnan(khat):  # ArviZ 1.x, where the tail spans more than floating point: nothing could be heavier
        return log_weights - logsumexp(log_weights), np.inf
    smoothed = np.asarray(smoothed, dtype=np.float64)
    return smoothed - logsumexp(smoothed), float(khat)
