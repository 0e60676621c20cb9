"""Steps along the natural gradient of a Gaussian's ELBO, their lengths and their errors."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pyro_elbo_ext.automatic.evaluations import Array
from pyro_elbo_ext.automatic.gaussian import Gaussian

WIDEN, NARROW = 8.0, 8.0  # most times that a variance grows or falls in one step
LONGEST = 10.0  # longest move of the mean in one step, in sds


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
    """Standard errors of one batch's step: of means and log sds of the coordinates, in sds; and ``gain`` that is noise."""

    mean: Array
    log_sd: Array
    gain: float

    @property
    def largest(self) -> float:
        return float(max(self.mean.max(), self.log_sd.max()))


def natural_step(gaussian: Gaussian, noise: Array, gradients: Array) -> tuple[Step, Array]:
    r"""The step that solves for a Gaussian posterior, and the residuals it is made of.

    With whitened gradients ``h`` at draws ``e``, the ELBO's gradient is ``E[h]`` in the mean and ``E[h e'] + I`` in the
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
    solved = (
        residuals / step.precisions if step.axes is None else ((residuals @ step.axes) / step.precisions) @ step.axes.T
    )
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


def overshoot(step: Step, size: float, there: Gaussian, noise: Array, gradients: Array) -> float:
    """By which factor the step was too long (below 1), or may become longer, by the secant of the ELBO's slopes."""
    residuals = there.whitened(gradients) + noise
    stretch = step.precisions ** (0.5 * size)
    force = residuals.mean(0)
    if step.axes is None:
        shift, rise = stretch * step.shift, (residuals * noise).mean(0)
    else:
        shift = step.axes @ (stretch * (step.axes.T @ step.shift))
        rise = ((residuals @ step.axes) * (noise @ step.axes)).mean(0)
    slope = float(force @ shift - 0.5 * (rise * np.log(step.precisions)).sum())
    if slope >= 0 or step.slope <= 0:
        return 2.0
    return max(0.25, step.slope / (step.slope - slope))
