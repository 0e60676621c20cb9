"""The Gaussian of greatest ELBO, by natural-gradient and quasi-Newton steps on growing batches of draws."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from pyro_elbo_ext.automatic.evaluations import Evaluations, TooManyGradients
from pyro_elbo_ext.automatic.gaussian import Gaussian, standard_draws
from pyro_elbo_ext.automatic.natural_gradient import WIDEN, Step, errors_of, natural_step, overshoot, taken
from pyro_elbo_ext.automatic.quasi_newton import raise_elbo

AIM = 0.01  # standard error of a mean or log sd, in sds, that batches grow for
TOLERANCE = 0.04  # the same where more than ENOUGH_DRAWS would be needed
SMALL_GAIN = 1e-14  # nats, where there is no noise
ROUNDING = 1e-6  # nats: of a step this small the rise may be lost in rounding errors
LEAST_DRAWS, ENOUGH_DRAWS, MOST_DRAWS = 256, 8192, 32768  # of a batch
PER_DIM = 4  # draws for each coordinate, at least: fewer do not tell a full covariance
GROWTH = 8  # most times that a batch becomes larger
MAX_STEPS = 300
HALVINGS = 12  # of a step that does not raise the ELBO
CREEPING = 0.5  # of what the step before was to gain: if a step is to gain more than this, PATIENCE times, it creeps
PATIENCE = 3
BENDS = 60  # quasi-Newton steps on one batch
RUNAWAY = 20  # consecutive steps in which the variance grows as much as it may: it has no end


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
        One entry per step: ``step``, ``elbo`` (of its batch), ``gradients`` so far, ``draws`` of the batch, ``step_size``
        (NaN where quasi-Newton steps were taken), ``gain`` (symmetrized KL of a whole step, nats), ``error`` (largest
        standard error of a mean or log sd, in sds).
    """

    gaussian: Gaussian
    converged: bool
    reason: str
    path: list[dict[str, float]] = field(default_factory=list)


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
    what a step would gain is as small as the batch's noise, another batch follows, as large as the errors ask for. Where
    each step is to gain nearly what the last one was, quasi-Newton steps go on (`raise_elbo`). It ends when both the gain
    and the Monte Carlo errors are small.

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
    values, gradients = evaluate.penalized(here.at(noise))
    first, size, widened = 1.0, 1.0, 0
    gains: list[float] = []  # of the steps on this batch since it was last gone over by quasi-Newton steps
    bent = False  # whether this batch was
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
        gains.append(step.gain)
        if (step.gain > small and not widened and _creeps(gains)) or (
            step.gain <= small and not precise and not bent and len(noise) == least
        ):
            here, values, gradients = raise_elbo(evaluate, here, noise, tolerance=0.1 * small, most=BENDS)
            fit.gaussian, entry["step_size"] = here, np.nan
            gains, bent, first = [], True, 1.0
            continue
        if step.gain > small:
            size = first
            for _ in range(HALVINGS):
                there = taken(here, step, size)
                new_values, new_gradients = evaluate.penalized(there.at(noise))
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
                first = min(1.0, size * overshoot(step, size, there, noise, new_gradients))
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
        gains, bent = [], False
        values, gradients = evaluate.penalized(here.at(noise))
    fit.reason = f"not converged: {max_steps} steps were not enough"


def _creeps(gains: list[float]) -> bool:
    """Whether the last steps are each to gain nearly as much as the one before, so that many are to come."""
    last = gains[-PATIENCE - 1 :]
    return len(last) > PATIENCE and all(b > CREEPING * a for a, b in itertools.pairwise(last))


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
