"""The Gaussian of greatest ELBO, by natural-gradient steps on growing batches of draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy.special import ndtri
from scipy.stats import qmc

from pyro_elbo_ext.automatic.evaluations import Array, Evaluations, TooManyGradients

AIM = 0.01  # standard error of a mean or log sd, in sds, that batches grow for
TOLERANCE = 0.04  # the same where more than ENOUGH_DRAWS would be needed
SMALL_GAIN = 1e-14  # nats, where there is no noise
ROUNDING = 1e-6  # nats: of a step this small the rise may be lost in rounding errors
LEAST_DRAWS, ENOUGH_DRAWS, MOST_DRAWS = 256, 8192, 32768  # of a batch
PER_DIM = 4  # draws for each coordinate, at least: fewer do not tell a full covariance
GROWTH = 8  # most times that a batch becomes larger
MAX_STEPS = 300
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


def triangular(gaussian: Gaussian) -> Gaussian:
    """The same with a lower triangular factor of positive diagonal."""
    upper = np.asarray(np.linalg.qr(gaussian.factor.T, mode="r"))
    return Gaussian(gaussian.loc, upper.T * np.sign(np.diag(upper)))


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
        noise = ndtri(np.clip(qmc.Sobol(dim, seed=rng).random(half), 1e-12, 1 - 1e-12))
    else:
        noise = rng.standard_normal((half, dim))
    if diagonal:
        noise /= np.sqrt((noise**2).mean(0))
    elif half > dim:
        noise = np.linalg.solve(np.linalg.cholesky(noise.T @ noise / half), noise.T).T
    return np.concatenate([noise, -noise])


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


def fit_gaussian(
    evaluate: Evaluations,
    start: Gaussian,
    rng: np.random.Generator,
    *,
    max_steps: int = MAX_STEPS,
    after_step: Callable[[dict[str, float]], None] | None = None,
) -> Fit:
    """The Gaussian of greatest ELBO from a starting one, of the same shape: full or diagonal.

    On one batch of draws the ELBO is a deterministic function, which steps must raise (sample average approximation). When
    what a step would gain is as small as the batch's noise, another batch follows, as large as the errors ask for. It ends
    when both the gain and the Monte Carlo errors are small.

    Parameters
    ----------
    evaluate
        Log density and gradients.
    start
        Where to start.
    rng
        Of the draws.
    max_steps
        Cap on the number of steps.
    after_step
        Called with each entry of the path.

    Returns
    -------
    Fit
        The last Gaussian, also where it has not converged.

    Raises
    ------
    ValueError
        If the log density is nowhere finite at draws of ``start``, or does not fall off: the posterior is improper. The
        message names coordinates.

    References
    ----------
    Khan, Lin (2023), The Bayesian learning rule. Roeder, Wu, Duvenaud (2017), Sticking the landing. Giordano, Ingram,
    Broderick (2024), Black box variational inference with a deterministic objective.
    """
    fit = Fit(start, False, "")
    try:
        _ascend(fit, evaluate, rng, max_steps, after_step)
    except TooManyGradients:
        fit.reason = f"not converged: {evaluate.gradients} gradients were not enough"
    return fit


def _ascend(
    fit: Fit,
    evaluate: Evaluations,
    rng: np.random.Generator,
    max_steps: int,
    after_step: Callable[[dict[str, float]], None] | None,
) -> None:
    here, dim, diagonal = fit.gaussian, evaluate.dim, fit.gaussian.diagonal
    least = LEAST_DRAWS if diagonal else max(LEAST_DRAWS, _power_of_two(PER_DIM * dim))
    noise = standard_draws(rng, least, dim, diagonal)
    values, gradients = _finite(*evaluate(here.at(noise)))
    first, size, widened = 1.0, 1.0, 0
    for number in range(max_steps):
        step, residuals = natural_step(here, noise, gradients)
        errors = errors_of(here, step, noise, residuals)
        error, elbo = errors.largest, float(values.mean() + here.entropy)
        entry = {
            "step": number,
            "elbo": elbo,
            "gradients": evaluate.gradients,
            "draws": len(noise),
            "step_size": size,
            "gain": step.gain,
            "error": error,
        }
        fit.path.append(entry)
        if after_step is not None:
            after_step(entry)
        precise = error <= (AIM if len(noise) < ENOUGH_DRAWS else TOLERANCE)
        small = max(SMALL_GAIN, 0.1 * errors.gain) if precise else 0.3 * min(errors.gain, 1.0)
        stuck = False
        if step.gain > small:
            size = first
            for _ in range(HALVINGS):
                there = taken(here, step, size)
                new_values, new_gradients = _finite(*evaluate(there.at(noise)))
                rise = new_values.mean() + there.entropy - elbo
                if rise >= 1e-4 * size * step.slope - 1e-12 * abs(elbo):
                    break
                size /= 2
            else:
                stuck = True
            if not stuck:
                widened = widened + 1 if size == 1 and step.raw.min() < 1 / WIDEN else 0
                if widened >= RUNAWAY:
                    raise _improper(evaluate, here, step)
                first = min(1.0, size * _overshoot(step, size, there, noise, new_gradients))
                here, values, gradients = there, new_values, new_gradients
                fit.gaussian = here
                continue
        if precise and (not stuck or step.gain < ROUNDING):
            fit.converged = True
            fit.reason = f"converged: a step gains {step.gain:.1g} nats, standard errors are {error:.2g} sd at most"
            return
        if len(noise) >= MOST_DRAWS:
            fit.reason = (
                f"not converged: no step raises the ELBO of {len(noise)} draws"
                if stuck
                else f"not converged: with {len(noise)} draws standard errors are {error:.2g} sd"
            )
            return
        wanted = 1.2 * len(noise) * (error / AIM) ** 2
        limit = ENOUGH_DRAWS if len(noise) < ENOUGH_DRAWS else MOST_DRAWS
        count = min(limit, _power_of_two(max(2 * len(noise), min(GROWTH * len(noise), wanted))))
        noise = standard_draws(rng, max(count, least), dim, diagonal)
        values, gradients = _finite(*evaluate(here.at(noise)))
    fit.reason = f"not converged: {max_steps} steps were not enough"


def _overshoot(step: Step, size: float, there: Gaussian, noise: Array, gradients: Array) -> float:
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


def _finite(values: Array, gradients: Array) -> tuple[Array, Array]:
    """Draws at which the density is not finite, which have no gradient here, count as worse than any other."""
    bad = values == -np.inf
    if not bad.any():
        return values, gradients
    if bad.all():
        return np.full_like(values, -np.inf), gradients
    worst = values[~bad].min()
    values = np.where(bad, worst - max(100.0, abs(worst)), values)
    return values, gradients


def _power_of_two(number: float) -> int:
    return 1 << int(np.ceil(np.log2(number)))


def _improper(evaluate: Evaluations, gaussian: Gaussian, step: Step) -> ValueError:
    """The error of a variance that grows without end, with the coordinates in which it does."""
    least = int(step.raw.argmin())
    share = np.zeros(evaluate.dim)
    if step.axes is None:
        share[least] = 1.0
    else:
        share = (gaussian.factor @ step.axes[:, least]) ** 2 / gaussian.sd**2
    names = [evaluate.density.coordinates[i] for i in np.argsort(-share)[:3] if share[i] > 0.5 * share.max()]
    return ValueError(
        f"the posterior seems to be improper: the ELBO rises without end as the guide widens along {', '.join(names)}. "
        "Give the sites a proper prior, or data that tell them."
    )
