"""A Gaussian moved until means and sds of a model's sites, on their constrained scale, are given ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyro_elbo_ext.automatic.evaluations import Array
from pyro_elbo_ext.automatic.gaussian import Gaussian

MOST_STEPS = 20
HALVINGS = 3
RIDGES = (0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4)  # one after the other as steps stall: small moves of the Gaussian first
STALLED = 0.95  # of the worst error before
LONGEST = 1.0  # of a step, as the norm of the whitened change
CLOSE = 0.025  # worst error at which it is enough: the target's own noise is about that
FULL_DIM = 25  # coordinates up to which correlations are changed too, and not only means and scales
MOST_ERRORS = 400  # the worst, that a step is made for


@dataclass(frozen=True, eq=False)
class Moments:
    """Means and sds of scalars, each of shape (n,)."""

    mean: Array
    sd: Array

    @classmethod
    def of(cls, values: Array, weights: Array) -> Moments:
        """Those of weighted values, shapes (S, n) and (S,)."""
        weights = weights / weights.sum()
        mean = weights @ values
        return cls(mean, np.sqrt(np.maximum(weights @ (values - mean) ** 2, 1e-300)))

    def errors(self, target: Moments) -> Array:
        """Differences of means in sds of the target, and log sd ratios, shape (2 * n,)."""
        return np.concatenate([(self.mean - target.mean) / target.sd, np.log(self.sd / target.sd)])


def move_to_moments(
    gaussian: Gaussian, noise: Array, weights: Array, sites: Callable[[Array], Array], target: Moments
) -> tuple[Gaussian, float]:
    r"""The Gaussian near a given one whose sites have the target's means and sds.

    Gauss-Newton steps in the whitened mean m and symmetric factor I + A, of least norm, which is least change in KL to
    second order. With f a scalar of the sites and e standard normal, the derivatives need none of f:

    .. math:: \frac{\partial \mathrm E f}{\partial m} = \mathrm E[f e], \qquad
              \frac{\partial \mathrm E f}{\partial A} = \mathrm E[f (e e^\top - I)],

    and the same of the squared deviations. They are noisy, so that a step counts only if the worst error, on the same noise,
    falls. Errors are raised to the fourth power, near to the worst one alone.

    Parameters
    ----------
    gaussian
        Where to start.
    noise, weights
        Standard normal draws, shape (S, dim), with weights, shape (S,), under which they are standard normal.
    sites
        Gives the scalars at draws of unconstrained space, shape (S, n).
    target
        What they shall have.

    Returns
    -------
    tuple
        The Gaussian, and its worst error.
    """
    dim = noise.shape[1]
    weights = weights / weights.sum()
    full = not gaussian.diagonal and dim <= FULL_DIM
    rows, columns = np.triu_indices(dim) if full else (np.arange(dim), np.arange(dim))
    products = noise[:, rows] * noise[:, columns]
    features = np.concatenate([noise, products - (rows == columns)], 1)
    # a pair i < j stands for two entries of A, and moves the KL twice as much
    features[:, dim:] /= np.where(rows == columns, np.sqrt(2), 1.0)
    here, values = gaussian, sites(gaussian.at(noise))
    errors = Moments.of(values, weights).errors(target)
    worst = float(np.abs(errors).max())
    ridges = iter(RIDGES)
    ridge = next(ridges)
    for _ in range(MOST_STEPS):
        if worst < CLOSE:
            break
        step = _step(values, errors, features, weights, target, ridge)
        size = min(1.0, LONGEST / max(float(np.linalg.norm(step)), 1e-12))
        before = worst
        for _ in range(HALVINGS):
            there = _moved(here, size * step, rows, columns)
            new_values = sites(there.at(noise))
            new_errors = Moments.of(new_values, weights).errors(target)
            new_worst = float(np.abs(new_errors).max())
            if new_worst < worst:
                here, values, errors, worst = there, new_values, new_errors, new_worst
                break
            size /= 2
        if worst > STALLED * before:
            following = next(ridges, None)
            if following is None:
                break
            ridge = following
    return here, worst


def _step(values: Array, errors: Array, features: Array, weights: Array, target: Moments, ridge: float) -> Array:
    """The whitened change of least norm that takes the errors to zero, to first order."""
    worst = np.argsort(-np.maximum(*np.abs(errors).reshape(2, -1)))[: MOST_ERRORS // 2]  # scalars
    values, target = values[:, worst], Moments(target.mean[worst], target.sd[worst])
    errors = errors.reshape(2, -1)[:, worst].ravel()
    own = Moments.of(values, weights)
    deviations = (values - own.mean) / own.sd
    of_means = (deviations * weights[:, None]).T @ features * (own.sd / target.sd)[:, None]
    of_log_sds = ((deviations**2 - 1) * weights[:, None]).T @ features / 2
    jacobian = np.concatenate([of_means, of_log_sds])
    importance = np.maximum(np.abs(errors) / np.abs(errors).max(), 0.1)  # errors**4 as weighted squares
    jacobian, wanted = jacobian * importance[:, None], -errors * importance
    left, singular, right = np.linalg.svd(jacobian, full_matrices=False)
    damped = singular / (singular**2 + ridge * singular.max() ** 2)
    return right.T @ (damped * (left.T @ wanted))


def _moved(gaussian: Gaussian, step: Array, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> Gaussian:
    """The Gaussian after a whitened change of its mean and factor."""
    dim = len(gaussian.loc)
    shift, change = step[:dim], step[dim:] / np.where(rows == columns, np.sqrt(2), 1.0)
    if gaussian.diagonal:
        return Gaussian(gaussian.loc + gaussian.factor * shift, gaussian.factor * np.exp(change))
    matrix = np.zeros((dim, dim))
    matrix[rows, columns] = change
    matrix[columns, rows] = change
    scales, axes = np.linalg.eigh(matrix)
    grown = (axes * np.exp(scales)) @ axes.T  # stays positive definite
    return Gaussian(gaussian.loc + gaussian.factor @ shift, gaussian.factor @ grown)
