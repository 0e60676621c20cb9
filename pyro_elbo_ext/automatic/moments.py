"""Weighted draws of a Gaussian, and means and covariance moved to what they say."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyro_elbo_ext.automatic.evaluations import Array, Evaluations
from pyro_elbo_ext.automatic.gaussian import Gaussian, standard_draws
from pyro_elbo_ext.automatic.site_moments import Moments, move_to_moments
from pyro_elbo_ext.evidence.importance import EVEN, khat_threshold
from pyro_elbo_ext.inference_data.arviz_statistics import pareto_smoothed

WORTH = 0.05  # difference in a mean, in sds, or in a log sd, from which on it is worth a closer look
MATCH_DRAWS = (16384, 49152)  # the second where the first have fewer effective draws than ENOUGH_EFFECTIVE
LEAST_EFFECTIVE, ENOUGH_EFFECTIVE = 1000, 8000  # draws with which means and sds are told to 0.03 and 0.01 sds
ROUNDS = 2  # of moving and looking again, by the better weights of what was moved
OWN_DRAWS = 4096  # evenly spread ones, for the Gaussian's own moments
WIDER = 0.3  # by which half of the draws of a closer look are wider, so that the weights of the tails are bounded
TELLING = 0.65  # k-hat below which weights tell means and sds: from there on to the threshold, 0.2 sd were missing
MOST_TAILS = 3  # scalars whose squared deviations are looked at
MOST_ENTRIES = 20_000_000  # of all sites at all draws


@dataclass(frozen=True, eq=False)
class Weighted:
    """Draws with Pareto-smoothed importance weights.

    Attributes
    ----------
    draws : ndarray
        In unconstrained space, shape (S, dim).
    weights, own : ndarray
        For the posterior, smoothed; and for the Gaussian itself, which are all equal if the draws are its own. Both sum to
        one, shape (S,).
    khat, ess : float
        Pareto k-hat, and effective sample size.
    elbo, elbo_se : float
        Mean of the log weights with its standard error, in nats: the ELBO if the draws are the Gaussian's own.
    outside : int
        Draws at which the log density is not finite. They have weight zero and no part in ``elbo``.
    """

    draws: Array
    weights: Array
    own: Array
    khat: float
    ess: float
    elbo: float
    elbo_se: float
    outside: int

    @property
    def num_draws(self) -> int:
        return len(self.draws)

    @property
    def good(self) -> bool:
        """Whether k-hat is below its threshold, or the weights so even that their tail does not matter."""
        return self.khat < khat_threshold(self.num_draws) or self.ess > EVEN * self.num_draws

    @property
    def near_threshold(self) -> bool:
        """Whether k-hat is within two of its standard errors of the threshold: other draws could fall on the other side."""
        tail = min(self.num_draws / 5, 3 * self.num_draws**0.5)  # the largest weights, from which it is estimated
        return abs(self.khat - khat_threshold(self.num_draws)) < 2 * (1 + self.khat) / tail**0.5

    @property
    def reliable(self) -> bool:
        """Whether they tell the posterior's moments."""
        return self.good and not self.outside


def look(evaluate: Evaluations, gaussian: Gaussian, rng: np.random.Generator, count: int) -> tuple[Weighted, Weighted]:
    """Independent draws with their weights: some of the Gaussian alone, and those with as many of a wider one.

    Parameters
    ----------
    evaluate
        Log density.
    gaussian
        The Gaussian.
    rng
        Of the draws.
    count
        Number of all draws; half are the Gaussian's.

    Returns
    -------
    tuple of Weighted
        The Gaussian's own draws, from which ELBO and k-hat are; and all, as draws of the mixture of both, which tell the
        posterior's moments better, since the weights of its tails are smaller.
    """
    dim, half = evaluate.dim, count // 2
    wider = min(WIDER, 1.5 / np.sqrt(dim))
    noise = rng.standard_normal((count, dim))
    noise[half:] *= 1 + wider
    draws = gaussian.at(noise)
    values, _ = evaluate(draws)
    squares, constant = (noise**2).sum(1), -0.5 * dim * np.log(2 * np.pi) - gaussian.log_volume
    log_own = constant - 0.5 * squares
    log_wide = constant - 0.5 * squares / (1 + wider) ** 2 - dim * np.log1p(wider)
    log_mixture = np.logaddexp(log_own, log_wide) - np.log(2)
    float64 = evaluate.density.float64
    own = weigh(draws[:half], values[:half], log_own[:half], log_own[:half], float64)
    return own, weigh(draws, values, log_mixture, log_own, float64)


def weigh(draws: Array, values: Array, log_proposal: Array, log_own: Array, float64: bool) -> Weighted:
    """Draws of a proposal with their weights, of which ``log_own`` is the log density of another distribution."""
    log_weights = values - log_proposal
    inside = np.isfinite(log_weights)
    if not inside.any():
        raise ValueError("the log density is finite at none of the guide's draws")
    kept = log_weights[inside]
    eps = float(np.finfo(np.float64 if float64 else np.float32).eps)
    rounding = 4 * eps * (1 + float(np.abs(log_proposal).mean() + np.abs(values[inside]).mean()))
    smoothed, khat = pareto_smoothed(log_weights, rounding)
    weights, own = np.exp(smoothed), np.exp(log_own - log_proposal)
    return Weighted(
        draws=draws,
        weights=weights,
        own=own / own.sum(),
        khat=khat,
        ess=float(1 / (weights**2).sum()),
        elbo=float(kept.mean()),
        elbo_se=float(kept.std() / np.sqrt(len(kept))),
        outside=int((~inside).sum()),
    )


@dataclass(frozen=True, eq=False)
class Matched:
    """What `match_moments` has found.

    Attributes
    ----------
    gaussian : Gaussian
        The one given, or that near it with the posterior's means and sds.
    own, many : Weighted
        Draws of it alone, and those with as many of a wider one: of the last look at it, which had the most draws.
    distance : float
        Largest difference in a mean, in sds, or in a log sd from the posterior; NaN where the weights cannot tell.
    note : str
        What was moved, and what it cost; empty if nothing was.
    why : str
        Why ``distance`` is NaN, if it is.
    """

    gaussian: Gaussian
    own: Weighted
    many: Weighted
    distance: float
    note: str = ""
    why: str = ""


def match_moments(evaluate: Evaluations, gaussian: Gaussian, rng: np.random.Generator, count: int) -> Matched:
    """The Gaussian near that of greatest ELBO whose sites have the means and sds of the weighted draws.

    The greatest ELBO has too small sds where the posterior has heavier tails than a Gaussian, and a shift where it is skew.
    With good importance weights the posterior's own means and sds are known, of all latent and deterministic sites on their
    constrained scale, and the Gaussian is moved to them (`move_to_moments`), which costs a little of the ELBO.

    Parameters
    ----------
    evaluate
        Log density.
    gaussian
        The one of greatest ELBO.
    rng
        Of the draws.
    count
        Number of draws with which to see whether it is worth it.

    References
    ----------
    Paananen, Piironen, Bürkner, Vehtari (2021), Implicitly adaptive importance sampling.
    """
    own, many = look(evaluate, gaussian, rng, count)
    distance, why = distance_of(evaluate, many, own)
    if distance < WORTH:
        return Matched(gaussian, own, many, distance)
    here, first, told, note = gaussian, own, np.nan, ""
    for number in range(ROUNDS + 1):
        own, many = _closer(evaluate, here, rng, own, many)
        distance, why = distance_of(evaluate, many, own)  # whatever fewer draws said
        if np.isnan(distance) and not np.isnan(told):  # the draws before told what was moved to
            distance, why = told, ""
        if number == 0:
            first = own
        if number == ROUNDS or distance < WORTH or not many.reliable or many.ess < LEAST_EFFECTIVE:
            break
        best, before, after = _moved(evaluate, here, many, rng)
        if not after < before - WORTH / 2:
            break
        look_at_best = look(evaluate, best, rng, count)
        if look_at_best[0].outside:
            break
        told = np.nan if np.isnan(distance) else after
        note = note or (
            f"means and sds are moved to the posterior's by importance weights (k-hat {many.khat:.2f}, {many.num_draws} "
            f"draws): the worst mean or log sd of a site was {before:.2f} off"
        )
        here, (own, many) = best, look_at_best
    if note:
        left = f" and is {distance:.2f}" if np.isfinite(distance) else ", and how far it is the weights cannot tell"
        cost, error = first.elbo - own.elbo, np.hypot(first.elbo_se, own.elbo_se)
        note += f"{left}; that lowers the ELBO by {cost:.2g} ± {error:.1g} nats"
    return Matched(here, own, many, distance, note, why)


def _closer(
    evaluate: Evaluations, gaussian: Gaussian, rng: np.random.Generator, own: Weighted, many: Weighted
) -> tuple[Weighted, Weighted]:
    """More draws, as many as it takes to tell; those given where some of the new ones are outside the domain."""
    for draws in MATCH_DRAWS:
        closer = look(evaluate, gaussian, rng, draws)
        if closer[1].outside:  # so rare that the first look saw none
            break
        own, many = closer
        if not many.near_threshold and (many.ess > ENOUGH_EFFECTIVE or not many.good):
            break
    return own, many


def _moved(
    evaluate: Evaluations, gaussian: Gaussian, many: Weighted, rng: np.random.Generator
) -> tuple[Gaussian, float, float]:
    """A Gaussian with the means and sds that the weights tell, and the worst error before and after by these."""
    sites = _constrained(evaluate, many.draws)
    varying = _varies(sites)

    def scalars(draws: Array) -> Array:
        return _constrained(evaluate, draws)[:, varying]

    # what the weights say of the differences, on draws that share their noise, on top of what the Gaussian's own moments are
    seen, drawn = (Moments.of(sites[:, varying], weights[: len(sites)]) for weights in (many.weights, many.own))
    even = standard_draws(rng, OWN_DRAWS, evaluate.dim, gaussian.diagonal)
    equal = np.full(len(even), 1 / len(even))
    exact = Moments.of(scalars(gaussian.at(even)), equal)
    target = Moments(exact.mean + seen.mean - drawn.mean, exact.sd * seen.sd / drawn.sd)
    best, least = move_to_moments(gaussian, even, equal, scalars, target)
    return best, _off(sites, many), least


def distance_of(evaluate: Evaluations, weighted: Weighted, own: Weighted) -> tuple[float, str]:
    """Worst difference in a mean, in sds, or log sd of any entry of a site; NaN where the weights cannot tell, and why.

    What is told of moments asks for more than k-hat's threshold: near it, and where the squares that an sd is made of have
    a heavier tail, what the draws have not met is missing in silence. Where the weights of the guide's ``own`` draws are
    even there is nothing to miss.
    """
    if weighted.outside:
        return np.nan, f"the log density is not finite at {weighted.outside} of {weighted.num_draws} draws"
    if not weighted.good:
        return np.nan, f"k-hat {weighted.khat:.2f} is not below {khat_threshold(weighted.num_draws):.2f}"
    sites = _constrained(evaluate, weighted.draws)
    if own.ess < EVEN * own.num_draws:
        if weighted.khat >= TELLING:
            return np.nan, f"k-hat {weighted.khat:.2f} is not below {TELLING}, which means and sds ask for"
        khat = tail_of_squares(sites[:, _varies(sites)], weighted.weights[: len(sites)])
        limit = khat_threshold(len(sites))
        if khat >= limit:
            return np.nan, f"k-hat of the squares that an sd is made of, {khat:.2f}, is not below {limit:.2f}"
    return _off(sites, weighted), ""


def tail_of_squares(values: Array, weights: Array) -> float:
    """Largest k-hat of weight times squared deviation, of the columns to whose variance one draw contributes most.

    Weights that tell means may not tell variances: what is averaged then has a heavier tail, by which sds come out too
    small. So it is that tail which is looked at (Vehtari et al. 2024, "Pareto smoothed importance sampling", section 3.4).
    """
    moments = Moments.of(values, weights)
    squares = ((values - moments.mean) / moments.sd) ** 2 * weights[:, None]
    worst = np.argsort(squares.max(0))[-MOST_TAILS:]
    with np.errstate(divide="ignore"):
        return max(pareto_smoothed(np.log(squares[:, column]), 1e-9)[1] for column in worst)


def _constrained(evaluate: Evaluations, draws: Array) -> Array:
    """All entries of all sites at the first of the draws, as many as fit, shape (T, entries)."""
    count = max(1, min(len(draws), MOST_ENTRIES // max(1, evaluate.density.num_entries)))
    sites = evaluate.constrain(draws[:count])
    return np.concatenate(
        [np.asarray(site, float).reshape(count, math.prod(site.shape[1:])) for site in sites.values()], 1
    )


def _off(sites: Array, weighted: Weighted) -> float:
    """Worst difference in mean, in sds, or in log sd, of the sites at draws of the Gaussian from those of the posterior."""
    varying = sites[:, _varies(sites)]
    own, posterior = (Moments.of(varying, weights[: len(sites)]) for weights in (weighted.own, weighted.weights))
    return float(np.abs(own.errors(posterior)).max())


def _varies(values: Array) -> NDArray[np.bool_]:
    """Columns that are finite and not constant."""
    return (values.std(0) > 1e-12 * np.abs(values).max(0)) & np.isfinite(values).all(0)
