"""The Gaussian of greatest ELBO, by natural-gradient steps on growing batches of draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy.special import ndtri
from scipy.stats import qmc

from pyro_elbo_ext.automatic.evaluations import Array, Evaluations

LEAST_DRAWS = 128  # of the first batch
PER_DIM = 4  # draws for each coordinate, at least: fewer do not tell a full covariance
GROWTH = 8  # most times that a batch becomes larger
WIDEN, NARROW = 8.0, 8.0  # most times that a variance grows or falls in one step
LONGEST = 10.0  # longest move of the mean in one step, in sds
HALVINGS = 12  # of a step that does not raise the ELBO
RUNAWAY = 20  # consecutive steps in which the variance grows as much as it may: it has no end


@dataclass(frozen=True, eq=False)
class Gaussian:
    """``z = loc + factor @ e`` with e standard normal; a ``factor`` of shape (dim,) is the diagonal of a diagonal one."""

    loc: Array
    factor: Array

    @property
    def diagonal(self) -> bool:
        return self.factor.ndim == 1

    def at(self, noise: Array) -> Array:
        """Draws, shape (S, dim), of standard normal ones."""
        return self.loc + (noise * self.factor if self.diagonal else noise @ self.factor.T)

    def whitened(self, gradients: Array) -> Array:
        """Gradients with respect to the standard normal draws."""
        return gradients * self.factor if self.diagonal else gradients @ self.factor

    @property
    def sd(self) -> Array:
        return np.abs(self.factor) if self.diagonal else np.sqrt((self.factor**2).sum(1))

    @property
    def log_volume(self) -> float:
        """log |det factor|."""
        if self.diagonal:
            return float(np.log(np.abs(self.factor)).sum())
        return float(np.linalg.slogdet(self.factor)[1])

    @property
    def entropy(self) -> float:
        """In nats."""
        return self.log_volume + 0.5 * len(self.loc) * (1 + np.log(2 * np.pi))


class Step(NamedTuple):
    """A natural-gradient step from one Gaussian, in its own whitened coordinates.

    ``axes`` are the directions (columns; the coordinates themselves if None) in which the precision is multiplied by
    ``precisions``, shape (dim,), ``shift`` the move of the mean, ``raw`` the precisions before they were limited. ``gain``
    is the symmetrized KL between the Gaussian and the one a whole step away, in nats, ``slope`` the ELBO's rise per step.
    """

    shift: Array
    axes: Array | None
    precisions: Array
    raw: Array
    gain: float
    slope: float


class Errors(NamedTuple):
    """Standard errors of one batch's step: of the means and log sds of the coordinates, in sds; and ``gain`` that is noise."""

    mean: Array
    log_sd: Array
    gain: float


@dataclass(eq=False)
class Fit:
    """A Gaussian with how it was found.

    Attributes
    ----------
    gaussian : Gaussian
        The last.
    converged : bool
        Whether what can still be gained and the Monte Carlo errors are below their tolerances.
    reason : str
        Why it ended.
    path : list of dict
        One entry per step: ``step``, ``elbo`` (of its batch), ``gradients`` so far, ``draws`` of the batch, ``step_size``,
        ``gain`` (symmetrized KL of a whole step, nats), ``error`` (largest standard error of a mean or log sd, in sds).
    """

    gaussian: Gaussian
    converged: bool
    reason: str
    path: list[dict[str, float]] = field(default_factory=list)


def standard_draws(rng: np.random.Generator, count: int, dim: int, diagonal: bool = False) -> Array:
    """Standard normal draws of which mean, skewness and covariance are exact: pairs (e, -e), rotated and stretched.

    With exact moments, what a batch says of a Gaussian density is exact: the mean gradient and the mean of gradient times
    draw are then the regression of gradients on draws.

    Parameters
    ----------
    rng
        Generator.
    count, dim
        Shape of the result; ``count`` is even.
    diagonal
        Whether only the variances, not all of the covariance, are made exact.
    """
    with_sobol = dim <= qmc.Sobol.MAXDIM and dim * count < 1 << 20
    half = count // 2
    if with_sobol:
        noise = ndtri(np.clip(qmc.Sobol(dim, rng=rng).random(half), 1e-12, 1 - 1e-12))
    else:
        noise = rng.standard_normal((half, dim))
    if diagonal:
        noise /= np.sqrt((noise**2).mean(0))
    elif half > dim:
        noise = np.linalg.solve(np.linalg.cholesky(noise.T @ noise / half), noise.T).T
    return np.concatenate([noise, -noise])


def natural_step(gaussian: Gaussian, noise: Array, gradients: Array) -> tuple[Step, Array]:
    r"""The step that solves for a Gaussian posterior, and the residuals it is made of.

    With whitened gradients ``h`` at draws ``e``, the gradient of the ELBO is ``E[h]`` in the mean, and ``E[h e'] + I`` in the
    factor: by Stein's identity ``-E[h e']`` is the mean curvature. Both are taken from the residuals ``r = h + e``, which
    are zero where the density is this very Gaussian, so that their noise vanishes with the distance (sticking the landing;
    Roeder, Wu, Duvenaud 2017). The step is that of the variational online Newton method (Khan, Lin 2023).
    """
    count, dim = noise.shape
    residuals = gaussian.whitened(gradients) + noise
    force = residuals.mean(0)
    if gaussian.diagonal:
        axes, raw = None, 1 - (residuals * noise).mean(0)
    else:
        moment = residuals.T @ noise / count
        raw, axes = np.linalg.eigh(np.eye(dim) - (moment + moment.T) / 2)
    precisions = np.clip(raw, 1 / WIDEN, NARROW)
    along = force if axes is None else axes.T @ force
    move = along / precisions
    length = float(np.linalg.norm(move))
    if length > LONGEST * np.sqrt(dim):
        move *= LONGEST * np.sqrt(dim) / length
    shift = move if axes is None else axes @ move
    gain = float(0.5 * (precisions + 1 / precisions - 2).sum() + 0.5 * (move**2 * (1 + precisions)).sum())
    slope = float(along @ move - 0.5 * ((1 - raw) * np.log(precisions)).sum())
    return Step(shift, axes, precisions, raw, gain, slope), residuals


def taken(gaussian: Gaussian, step: Step, size: float) -> Gaussian:
    """The Gaussian after a part of the step: the path on which the log precisions go straight."""
    scales = step.precisions ** (-0.5 * size)
    if step.axes is None:
        return Gaussian(gaussian.loc + size * gaussian.factor * step.shift, gaussian.factor * scales)
    turned = gaussian.factor @ (step.axes * scales) @ step.axes.T
    return Gaussian(gaussian.loc + size * gaussian.factor @ step.shift, turned)


def errors_of(gaussian: Gaussian, step: Step, noise: Array, residuals: Array) -> Errors:
    """Monte Carlo errors of a step, from the spread over the pairs of draws."""
    half = len(noise) // 2
    solved = residuals / step.precisions if step.axes is None else ((residuals @ step.axes) / step.precisions) @ step.axes.T
    sd = gaussian.sd
    own, draws = gaussian.at(solved) - gaussian.loc, gaussian.at(noise) - gaussian.loc
    means = (own[:half] + own[half:]) / (2 * sd)
    squares = own * draws / (2 * sd**2)
    squares = (squares[:half] + squares[half:]) / 2
    whitened = (solved[:half] + solved[half:]) / 2
    pairs = (solved[:half] - solved[half:]) / 2
    variance = whitened.var(0).sum()
    if step.axes is None:
        variance += ((pairs * noise[:half]).var(0)).sum() / 2
    else:  # of all entries of the mean of solved times draw, made symmetric; their squared means hardly count
        variance += ((pairs**2).sum(1) * (noise[:half] ** 2).sum(1) + (pairs * noise[:half]).sum(1) ** 2).mean() / 4
    return Errors(means.std(0) / np.sqrt(half), squares.std(0) / np.sqrt(half), float(variance / half))


def fit_gaussian(
    evaluate: Evaluations,
    start: Gaussian,
    rng: np.random.Generator,
    *,
    tolerance: float = 0.01,
    most_draws: int = 1 << 15,
    max_steps: int = 200,
    after_step: Callable[[dict[str, float]], None] | None = None,
) -> Fit:
    dim = evaluate.dim
    least = max(LEAST_DRAWS, 2 ** int(np.ceil(np.log2(PER_DIM * dim))) if not start.diagonal else 0)
    fit = Fit(start, False, "")
    widening, size = 0, 1.0
    noise = standard_draws(rng, least, dim, start.diagonal)
    values, gradients = evaluate(start.at(noise))
    here = start
    for number in range(max_steps):
        step, residuals = natural_step(here, noise, gradients)
        errors = errors_of(here, step, noise, residuals)
        error = float(max(errors.mean.max(), errors.log_sd.max()))
        elbo = float(values.mean() + here.entropy)
        entry = {"step": number, "elbo": elbo, "gradients": evaluate.gradients, "draws": len(noise), "step_size": size,
                 "gain": step.gain, "error": error}
        fit.path.append(entry)
        if after_step is not None:
            after_step(entry)
        precise = error <= tolerance
        small = max(1e-5 if precise else 0.0, (0.1 if precise else 0.3) * errors.gain)
        stuck = False
        if step.gain > small:
            size = 1.0
            for _ in range(HALVINGS):
                there = taken(here, step, size)
                new_values, new_gradients = evaluate(there.at(noise))
                rise = new_values.mean() + there.entropy - elbo
                if rise >= 1e-4 * size * step.slope - 1e-9 * abs(elbo):
                    break
                size /= 2
            else:
                stuck = True
            if not stuck:
                here, values, gradients = there, new_values, new_gradients
                fit.gaussian = here
                continue
        if precise and not stuck:
            fit.gaussian = here
            fit.converged, fit.reason = True, "converged"
            return fit
        if len(noise) >= most_draws:
            fit.reason = "most draws"
            return fit
        wanted = len(noise) * (error / tolerance) ** 2 * 1.2
        count = int(min(most_draws, max(2 * len(noise), min(GROWTH * len(noise), wanted))))
        count = 2 ** int(np.ceil(np.log2(count)))
        noise = standard_draws(rng, count, dim, here.diagonal)
        values, gradients = evaluate(here.at(noise))
    fit.reason = "steps"
    return fit
