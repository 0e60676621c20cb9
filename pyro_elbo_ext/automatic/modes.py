"""The modes of a log density: found by climbs from dispersed points, weighed by importance sampling."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, logsumexp

from pyro_elbo_ext.automatic.climbing import Ends, climb_all
from pyro_elbo_ext.automatic.evaluations import Array, Evaluations
from pyro_elbo_ext.automatic.gaussian import Gaussian, standard_draws
from pyro_elbo_ext.automatic.starting import laplace
from pyro_elbo_ext.evidence.importance import khat_threshold
from pyro_elbo_ext.inference_data.arviz_statistics import pareto_smoothed

FULL = 500  # coordinates up to which a mode has a full covariance
SIGNS = 32  # random directions that tell a diagonal one
UNFINISHED = 2  # ends of climbs that have not arrived which are looked at as modes nonetheless
NEAR = 0.5  # root mean square distance in sds of a mode, below which an end is that mode's
FAR = 5.0  # sds of a mode, beyond which an end is looked at by itself: a wide mode on the shoulder of a high one has no dip
DIP = 0.3  # nats by which the density falls between two ends of one mode
BETWEEN = 9  # points of a segment
FLAT, NEARLY = 1e-4, 1e-2  # nats that a Newton step promises at a maximum; where only the diagonal is known
POLISHING = 40  # gradients to come from the end of a climb to there
FREEDOM = 5.0  # of Student's t
DRAWS = 400  # at each mode
ROUNDING = 1e-6  # nats by which weights that are equal differ
KEPT = 400  # of a mode's draws, by their weights
WIDE = 3.0  # times a mode's own radius, in which draws of a guide count as its own
MOST_ABOUT = 0.8  # of a guide's draws about the modes, from which on they tell which modes it covers
LEAST = 0.05  # weight from which on a mode is missed
SHARE = 0.25  # of a mode's weight that a guide must put there, at least
SAME_PLACE, SAME_VALUE = 0.05, 1e-3  # sds and nats that two copies differ by, at most


@dataclass(frozen=True, eq=False)
class Mode:
    """A separate maximum of the log density.

    Attributes
    ----------
    gaussian : Gaussian
        Laplace approximation, at the maximum.
    log_density : float
        There, in nats.
    climbs : int
        How many ended there.
    share : float
        Of the guide's draws, that lie about it.
    log_evidence, log_evidence_se : float
        Log of the density's integral about it, with its standard error; where not ``reliable``, a lower bound.
    khat : float
        Pareto k-hat of the importance weights behind that.
    weight, weight_se : float
        Posterior probability, with its standard error.
    draws : ndarray or None
        Of the posterior about it, shape (T, dim); None where not ``reliable``.
    copy_of : int or None
        The mode before it with the same coordinates up to their order and signs, and the same density: a symmetry's copy.
    """

    gaussian: Gaussian
    log_density: float
    climbs: int
    share: float = 1.0
    log_evidence: float = np.nan
    log_evidence_se: float = np.nan
    khat: float = np.nan
    weight: float = 1.0
    weight_se: float = 0.0
    draws: Array | None = None
    copy_of: int | None = None

    @property
    def missed(self) -> bool:
        """Whether it has weight, and the guide too few draws there."""
        return self.weight >= LEAST and self.share < SHARE * self.weight

    @property
    def reliable(self) -> bool:
        """Whether the importance weights tell its weight."""
        return self.khat < khat_threshold(DRAWS)


@dataclass(frozen=True, eq=False)
class Modes:
    """What a search has found.

    Attributes
    ----------
    modes : list of Mode
        By weight. Empty if no climb ended at a maximum.
    climbs : dict of str to int
        Kind of starting point to how many climbs set out from there.
    elsewhere : int
        Climbs that ended at no maximum: on a ridge, in a funnel's neck.
    gradients : int
        That ``evaluate`` counts, starting points included.
    """

    modes: list[Mode]
    climbs: dict[str, int]
    elsewhere: int
    gradients: int

    @property
    def missed(self) -> list[Mode]:
        """Those that have weight and that the guide does not cover."""
        return [mode for mode in self.modes if mode.missed]


def find_modes(
    evaluate: Evaluations,
    rng: np.random.Generator,
    starts: dict[str, Array],
    draws: Array,
    log_weights: Array,
    *,
    steps: int = 200,
    candidates: int = 12,
) -> Modes:
    """Climb from all starts, tell apart where the climbs end, and weigh what the guide covers against what it does not.

    Ends are one mode if they are close and the density hardly falls on the straight way between them. The weight of a mode
    is its evidence, by importance sampling with Student's t about each, over that of all. What the guide covers counts with
    what its own importance weights say, where these are good: it may be a region without a maximum, as a hierarchical
    model's.

    Parameters
    ----------
    evaluate
        Log density and gradients.
    rng
        Of the draws.
    starts
        Kind to points, shape (n, dim). Climbs of the kind ``"guide"`` start at draws of the guide, and tell with the draws
        themselves which modes it covers.
    draws
        Of the guide, shape (S, dim).
    log_weights
        Of these, log density less the guide's, shape (S,); -inf where it is not known.
    steps
        Most gradients of a climb.
    candidates
        Most ends of climbs that are looked at as modes.
    """
    scale = gaussian_of(draws)
    points = np.concatenate(list(starts.values()))
    kinds = np.repeat(list(starts), [len(each) for each in starts.values()])
    ends = climb_all(evaluate, points, scale, steps)
    found, owner = _told_apart(evaluate, ends, candidates)
    regions, shares = _shares(found, draws, owner[kinds == "guide"])
    found = [replace(mode, share=float(share)) for mode, share in zip(found, shares, strict=True)]
    found = _with_weights(found, evaluate, rng, regions, log_weights)
    counts = {kind: len(each) for kind, each in starts.items()}
    return Modes(found, counts, int((owner == -1).sum()), evaluate.gradients)


def _shares(modes: list[Mode], draws: Array, climbed: NDArray[np.int_]) -> tuple[NDArray[np.int_], Array]:
    """Which mode each of a guide's draws is nearest to, and the share of them that is about each mode.

    Where many are about none, as in a posterior that is far from a Gaussian about its maximum, the ends of climbs from such
    draws tell too; where not, these may have leapt from one mode to another and are not asked.
    """
    if not modes:
        return np.zeros(len(draws), int), np.empty(0)
    regions = _region(modes, draws)
    about = np.array([(regions == k) & _about(mode, draws) for k, mode in enumerate(modes)])
    shares = about.mean(1)
    if about.any(0).mean() < MOST_ABOUT and len(climbed):
        shares = np.maximum(shares, [(climbed == k).mean() for k in range(len(modes))])
    return regions, shares


def gaussian_of(draws: Array) -> Gaussian:
    """With the mean and covariance of draws, diagonal where they are too few to tell it."""
    dim, loc = draws.shape[1], np.median(draws, 0)
    low, high = np.quantile(draws, [0.1587, 0.8413], 0)
    sd = np.maximum((high - low) / 2, 1e-8 * (1 + np.abs(loc)))
    if dim <= FULL and len(draws) >= 5 * dim:
        kept = (np.abs(draws - loc) < 6 * sd).all(1)
        if kept.sum() >= 5 * dim:
            scaled = (draws[kept] - loc) / sd
            values, axes = np.linalg.eigh(scaled.T @ scaled / kept.sum())
            return Gaussian(loc, sd[:, None] * axes * np.sqrt(np.clip(values, 1e-6, None)))
    return Gaussian(loc, sd)


def _told_apart(evaluate: Evaluations, ends: Ends, candidates: int) -> tuple[list[Mode], NDArray[np.int_]]:
    """Maxima among ends of climbs, the highest first, and to which of them each end belongs, -1 for none."""
    points, values, arrived = ends
    rest = [int(i) for i in np.lexsort((-values, ~arrived)) if np.isfinite(values[i])]
    owner = np.full(len(points), -1)
    found: list[Mode] = []
    tried = unfinished = 0
    while rest and tried < candidates and unfinished < UNFINISHED:
        top, tried = rest.pop(0), tried + 1
        unfinished += not arrived[top]
        gaussian, value, is_mode = _polished(evaluate, points[top], values[top])
        own = [top]
        if rest:
            others = points[rest]
            distance = np.linalg.norm(_standard(gaussian, others), axis=1)
            same = (distance < NEAR * np.sqrt(evaluate.dim)) if is_mode else np.zeros(len(rest), bool)
            apart = np.flatnonzero(~same & ~(is_mode & arrived[rest] & (distance > FAR)))
            if len(apart):
                same[apart] = _one_hill(evaluate, gaussian.loc, others[apart], np.minimum(values[rest][apart], value))
            own += [i for i, yes in zip(rest, same, strict=True) if yes]
            rest = [i for i, yes in zip(rest, same, strict=True) if not yes]
        if is_mode:
            owner[own] = len(found)
            found.append(Mode(gaussian, value, len(own)))
    return found, owner


def _polished(evaluate: Evaluations, x: Array, value: float) -> tuple[Gaussian, float, bool]:
    """The Laplace approximation at the end of a climb, after some steps more in its own coordinates."""
    diagonal = evaluate.dim > FULL
    noise = standard_draws(np.random.default_rng(0), SIGNS, evaluate.dim, diagonal=True)
    for _ in range(2):
        gaussian, is_mode, _ = laplace(evaluate, x, noise, diagonal)
        (value,), gradient = evaluate(x[None])
        promised = 0.5 * float((gaussian.whitened(gradient) ** 2).sum())
        if not is_mode or promised < FLAT:
            break
        ends = climb_all(evaluate, x[None], gaussian, POLISHING)
        x, value = ends.points[0], float(ends.values[0])
    return gaussian, float(value), is_mode and promised < (NEARLY if diagonal else FLAT)


def _one_hill(evaluate: Evaluations, top: Array, others: Array, lower: Array) -> NDArray[np.bool_]:
    """Whether the density nowhere falls below both ends' on the straight way from each of the others to the top."""
    steps = np.arange(1, BETWEEN + 1) / (BETWEEN + 1)
    way = top + (1 - steps)[:, None, None] * (others - top)
    values, _ = evaluate(way.reshape(-1, top.size))
    return np.asarray(values.reshape(BETWEEN, -1).min(0) >= lower - DIP)


def _standard(gaussian: Gaussian, x: Array) -> Array:
    """Points in a Gaussian's standard coordinates."""
    if gaussian.diagonal:
        return (x - gaussian.loc) / gaussian.factor
    return np.asarray(np.linalg.solve(gaussian.factor, (x - gaussian.loc).T).T)


def _log_t(gaussian: Gaussian, x: Array) -> Array:
    """Log density of Student's t with a Gaussian's location and scale."""
    dim = len(gaussian.loc)
    constant = gammaln((FREEDOM + dim) / 2) - gammaln(FREEDOM / 2) - 0.5 * dim * np.log(FREEDOM * np.pi)
    squares = (_standard(gaussian, x) ** 2).sum(1)
    return np.asarray(constant - gaussian.log_volume - 0.5 * (FREEDOM + dim) * np.log1p(squares / FREEDOM))


def _laplace_evidence(mode: Mode) -> float:
    return float(mode.log_density + mode.gaussian.log_volume + 0.5 * len(mode.gaussian.loc) * np.log(2 * np.pi))


def _region(modes: list[Mode], x: Array) -> NDArray[np.int_]:
    """Which mode each point is nearest to: that of the largest density."""
    return np.asarray(np.argmax([_laplace_evidence(mode) + _log_t(mode.gaussian, x) for mode in modes], 0))


def _about(mode: Mode, x: Array) -> NDArray[np.bool_]:
    """Which points are about a mode."""
    dim = len(mode.gaussian.loc)
    return np.asarray((_standard(mode.gaussian, x) ** 2).sum(1) < WIDE**2 * (dim + 3 * np.sqrt(2 * dim)))


def _weighed(evaluate: Evaluations, rng: np.random.Generator, modes: list[Mode]) -> list[Mode]:
    """The modes with their evidence, and draws of the posterior about each.

    Points are drawn from Student's t about each mode, and weighted as draws of the mixture of all; each counts for the mode
    that it is nearest to.
    """
    dim = evaluate.dim
    drawn = []
    for mode in modes:
        noise = rng.standard_normal((DRAWS, dim)) / np.sqrt(rng.chisquare(FREEDOM, (DRAWS, 1)) / FREEDOM)
        drawn.append(mode.gaussian.at(noise))
    points = np.concatenate(drawn)
    values, _ = evaluate(points)
    mixture = logsumexp([_log_t(mode.gaussian, points) for mode in modes], 0) - np.log(len(modes))
    log_weights, regions = values - mixture, _region(modes, points)
    found = []
    for k, mode in enumerate(modes):
        own = np.where(regions == k, log_weights, -np.inf)
        if not np.isfinite(own).any():
            found.append(replace(mode, log_evidence=-np.inf, log_evidence_se=0.0, khat=np.inf))
            continue
        inside = own[np.isfinite(own)]
        smoothed, khat = pareto_smoothed(inside, ROUNDING)
        if khat >= khat_threshold(DRAWS):
            found.append(replace(mode, log_evidence=_bound(evaluate, rng, mode), log_evidence_se=0.0, khat=khat))
            continue
        top = own.max()
        strata = np.exp(own - top).reshape(len(modes), DRAWS)  # the variance is within each proposal's draws
        mean = strata.mean()
        error = np.sqrt((strata.var(1, ddof=1) / DRAWS).sum()) / len(modes)
        probability = np.exp(smoothed) / np.exp(smoothed).sum()
        chosen = rng.choice(np.flatnonzero(np.isfinite(own)), KEPT, p=probability)
        found.append(
            replace(
                mode,
                log_evidence=float(top + np.log(mean)),
                log_evidence_se=float(error / mean),
                khat=khat,
                draws=points[chosen],
            )
        )
    return found


def _bound(evaluate: Evaluations, rng: np.random.Generator, mode: Mode) -> float:
    """A lower bound of a mode's evidence that no heavy tail can spoil: the ELBO of its Laplace approximation."""
    values, _ = evaluate(mode.gaussian.at(rng.standard_normal((DRAWS, evaluate.dim))))
    return float(values.mean() + mode.gaussian.entropy)


def _with_weights(
    modes: list[Mode], evaluate: Evaluations, rng: np.random.Generator, regions: NDArray[np.int_], log_weights: Array
) -> list[Mode]:
    """The modes with their weights, the heaviest first; those that the guide covers count together as its weights say."""
    if not modes or (len(modes) == 1 and modes[0].share >= SHARE):
        return modes
    modes = _weighed(evaluate, rng, modes)
    evidence, errors = (
        np.array([getattr(mode, name) for mode in modes]) for name in ("log_evidence", "log_evidence_se")
    )
    shares = np.array([mode.share for mode in modes])
    total = logsumexp(evidence)
    covered = shares >= SHARE * np.exp(evidence - total)
    inside = np.isfinite(log_weights) & (covered[regions] | ~covered.any())
    extra, extra_error = -np.inf, 0.0
    if inside.any():  # what the guide's own weights say is more than what is about its modes
        smoothed, khat = pareto_smoothed(log_weights[inside], ROUNDING)
        here = logsumexp(log_weights[inside]) - np.log(len(log_weights))
        about = logsumexp(evidence[covered]) if covered.any() else -np.inf
        if khat < khat_threshold(inside.sum()) or here > about:
            weights = np.exp(smoothed)
            error = np.sqrt(max((weights**2).sum() - 1 / len(weights), 0.0))
            if covered.any():
                evidence[covered] += here - about
                errors[covered] = error
            else:
                extra, extra_error = here, error
    everything = np.append(evidence, extra)
    weights = np.exp(everything - logsumexp(everything))
    variances = np.append(errors, extra_error) ** 2
    spread = weights * np.sqrt((1 - weights) ** 2 * variances + (weights**2 * variances).sum() - weights**2 * variances)
    order = np.argsort(-weights[:-1])
    found: list[Mode] = []
    for k in order:
        mode = replace(modes[k], weight=float(weights[k]), weight_se=float(spread[k]))
        copies = [i for i, other in enumerate(found) if other.copy_of is None and _copies(mode, other)]
        found.append(replace(mode, copy_of=copies[0] if copies else None))
    return found


def _copies(one: Mode, other: Mode) -> bool:
    """Whether two modes have the same density, and the same coordinates up to order and signs."""
    if abs(one.log_density - other.log_density) > SAME_VALUE:
        return False
    a, b = (np.argsort(np.abs(mode.gaussian.loc)) for mode in (one, other))
    sd = np.minimum(one.gaussian.sd[a], other.gaussian.sd[b])
    return bool((np.abs(np.abs(one.gaussian.loc[a]) - np.abs(other.gaussian.loc[b])) < SAME_PLACE * sd).all())
