"""The ledger of ``log p(x) = ELBO + KL(q || posterior)``: bounds on the evidence, and with them on the gap.

``KL(q || posterior)``, here ``kl_posterior``, is the gap between the ELBO and ``log p(x)``. ``KL(q || prior)``, here
``kl_prior``, is a part of the ELBO and says nothing about the gap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import xarray as xr
from scipy import stats
from torch import Tensor

from pyro_elbo_ext.evidence import estimates
from pyro_elbo_ext.evidence.annealing import CannotAnneal, annealed
from pyro_elbo_ext.evidence.estimates import Estimate
from pyro_elbo_ext.evidence.importance import BATCH_SIZE, ImportanceSample, importance_sample
from pyro_elbo_ext.evidence.ledger import Bound, EvidenceBounds, Interval
from pyro_elbo_ext.evidence.scores import Array
from pyro_elbo_ext.evidence.scoring import Scorer
from pyro_elbo_ext.inference_data.arviz_statistics import effective_size, pareto_smoothed
from pyro_elbo_ext.inference_data.export import dataset_of
from pyro_elbo_ext.inference_data.names import by_site, found_in
from pyro_elbo_ext.objectives import DecomposedELBO
from pyro_elbo_ext.programs.arguments import check_count, check_fraction, check_seed
from pyro_elbo_ext.programs.interrupts import handlers_are_heard
from pyro_elbo_ext.programs.randomness import untouched

BLOCKS = 20  # fewer values of a bound have no standard error to rely on
FINITE_VARIANCE = 0.5  # k-hat below which the weights have a variance
CHAINS = 500  # of annealed importance sampling
LEAST_DRAWS = 25  # for k-hat, which needs five in the tail


class _Entry(NamedTuple):
    """A row of the ledger in the making."""

    method: str
    direction: Literal["lower", "upper", "estimate"]
    k: int
    num_draws: int
    estimate: Estimate
    valid: bool
    note: str
    counts: bool  # towards the interval
    paired: bool = True  # made of the draws that the ELBO is made of


@handlers_are_heard()
def evidence_bounds(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_draws: int = 1000,
    posterior: Any = None,
    ladder: Sequence[int] = (1, 10, 100, 1000),
    level: float = 0.95,
    fallback: Literal["auto", "ais"] | None = "auto",
    seed: int | None = None,
    batch_size: int = BATCH_SIZE,
    progress: bool = False,
    **kwargs: Any,
) -> EvidenceBounds:
    r"""Bounds on ``log p(x)`` and on ``KL(q || posterior)``, each with a standard error and what makes it valid.

    With :math:`w = p(x, z) / q(z)`, below log p(x) in expectation: the ELBO :math:`\mathrm E_q[\log w]`; IWAE,
    :math:`\mathrm E_q[\log \frac1K \sum_k w_k]`. Above: CUBO, :math:`\frac12 \log \mathrm E_q[w^2]`; with draws of the
    posterior EUBO, :math:`\mathrm E_p[\log w]`, and the multi-sample upper bound, IWAE's with one draw among the K from the
    posterior. Bridge sampling between guide and posterior draws estimates log p(x) itself.

    The interval for log p(x) goes from the highest lower limit to the lowest upper limit, where a limit is a bound or
    estimate with its margin (Student's t). The margins are those of a two-sided interval at ``level``, with Bonferroni's
    correction for the number of limits on the side. These count: below, IWAE over all draws, the bridge and annealed
    importance sampling; above, EUBO, the multi-sample bound with the largest K that leaves 20 blocks, the bridge and reverse
    annealing, or without posterior draws CUBO, where k-hat says that the weights have a variance. The
    interval for KL(q || posterior) is the same of the differences to the ELBO, whose errors take into account that both
    are made of the same draws.

    No bound sees a mode that neither the guide nor the posterior draws visit.

    Parameters
    ----------
    model, guide
        As given to ``pyro.infer.SVI``, called as ``model(*args, **kwargs)``. Model keywords with the name of a
        parameter below need ``functools.partial``.
    num_draws
        Draws of the guide, S, at least 25.
    posterior
        Draws of the posterior: ArviZ data with a group ``posterior``, as of :func:`~pyro_elbo_ext.run_nuts`, a Dataset, or a
        mapping from latent site to array or tensor of shape ``(draw, *plates, *event)`` or ``(chain, draw, *plates,
        *event)``. They are taken for exact but for their autocorrelation.
    ladder
        The K of IWAE and of the multi-sample upper bound; those above S / 2 are left out, S itself is always there.
    level
        Confidence level of the two intervals.
    fallback
        Annealed importance sampling from the guide to the posterior: "auto", where there are no posterior draws and the
        weights may have no variance (k-hat not below 0.5 or its threshold), so that they give no upper bound; "ais",
        always, and in reverse from posterior draws too; None, never.
    seed
        Same seed and ``batch_size``, same draws, and the caller's random number generators are left as they were. None: draw
        from these.
    batch_size
        Draws run at once; fewer need less memory.
    progress
        Show progress bars.

    Returns
    -------
    EvidenceBounds
        ``log_evidence`` and ``kl_posterior``, (lower, upper) pairs in nats; ``kl_prior``, ``elbo``; ``importance``, the
        weights with k-hat; ``to_dataframe()``, the whole ledger.

    Raises
    ------
    ValueError
        As :func:`~pyro_elbo_ext.psis_khat`; for posterior draws that lack a site or fit neither the model nor the guide; for
        ``fallback="ais"`` where annealing is not possible; for arguments out of range.
    TypeError
        For arguments of a wrong type.

    References
    ----------
    Burda, Grosse, Salakhutdinov (2016), Importance weighted autoencoders. Dieng, Tran, Ranganath, Paisley, Blei (2017),
    Variational inference via chi upper bound minimization. Ji, Shen (2019), Stochastic variational inference via upper
    bound. Sobolev, Vetrov (2019), Importance weighted hierarchical variational inference. Brekelmans et al. (2022),
    Improving mutual information estimation with annealed and energy-based bounds. Meng, Wong (1996), Simulating ratios of
    normalizing constants. Frühwirth-Schnatter (2004), Estimating marginal likelihoods for mixture and Markov switching
    models. Grosse, Ghahramani, Adams (2015), Sandwiching the marginal likelihood using bidirectional Monte Carlo.
    """
    _check(num_draws, ladder, level, fallback, batch_size, seed)
    draws = None if posterior is None else read_posterior(posterior)
    with untouched(seed):
        scorer = Scorer(model, guide, args, kwargs, batch_size, progress)
        flat, shape = (None, (0, 0)) if draws is None else _flattened(draws, scorer)
        sample = importance_sample(scorer, num_draws)
        log_w = sample.log_weights
        entries = _from_guide(sample, ladder, alone=flat is None)
        if flat is not None:
            scores = scorer.at(flat)
            of_posterior = (scores.log_p - scores.log_q).reshape(shape)
            entries += _from_posterior(sample, of_posterior, ladder)
        reason = ""
        bad = flat is None and sample.khat >= min(sample.threshold, FINITE_VARIANCE)
        if fallback == "ais" or (fallback == "auto" and bad):
            start = None if flat is None else _thinned(flat, CHAINS)
            try:
                found = annealed(scorer, CHAINS, start, progress=progress)
            except CannotAnneal as error:
                if fallback == "ais":
                    raise ValueError(f"fallback='ais' is not possible here: {error}. Pass fallback=None.") from error
                reason = f"Annealed importance sampling, the fallback for such weights, is not possible: {error}."
            else:
                entries += _from_annealing(found.forward, found.reverse, sample.noise)
        if sample.num_zero:  # which no ELBO accepts
            kl_prior = float((sample.log_q - sample.log_prior).mean())
        else:
            particles, kl_prior = min(num_draws, batch_size), 0.0
            for done in range(0, particles, scorer.batch_size):
                size = min(scorer.batch_size, particles - done)
                elbo = DecomposedELBO(num_particles=size, vectorize_particles="vmap", history=False)
                elbo.loss(model, guide, *args, **kwargs)
                assert elbo.last is not None
                kl_prior += elbo.last.kl_prior * size / particles
    base = estimates.elbo(log_w)
    rows = [_row(entry, sample.noise) for entry in entries]
    log_evidence = _interval(entries, None, level, sample.noise)
    if base.value == -math.inf:
        kl_posterior = Interval(math.inf, math.inf)
    else:
        found_kl = _interval(entries, base, level, sample.noise)
        kl_posterior = Interval(max(found_kl.lower, 0.0), max(found_kl.upper, 0.0))
    return EvidenceBounds(
        log_evidence, kl_posterior, kl_prior, base.value, rows[0].standard_error, level, tuple(rows), sample, reason
    )


def read_posterior(posterior: Any) -> dict[str, Any]:
    """Draws by site, arrays or tensors that start with (chain, draw), or only draw in a mapping."""
    is_arviz = isinstance(posterior, xr.Dataset | xr.DataTree) or callable(getattr(posterior, "groups", None))
    if isinstance(posterior, Mapping) and not is_arviz:  # both generations' data are mappings too
        return dict(posterior)
    data = dataset_of(posterior)
    for name, variable in data.data_vars.items():
        if not {"chain", "draw"} <= set(variable.dims):
            raise ValueError(f"'{name}' of the posterior has dims {variable.dims}; it needs 'chain' and 'draw'")
    return {site: variable.transpose("chain", "draw", ...).values for site, variable in by_site(data).items()}


def _flattened(draws: Mapping[str, Any], scorer: Scorer) -> tuple[dict[str, Tensor], tuple[int, int]]:
    """The latent sites' draws, shape ``(chain * draw, *site)``, and the numbers of chains and draws."""
    flat: dict[str, Tensor] = {}
    shape: tuple[int, int] | None = None
    for site in scorer.latents:
        name = found_in(draws, site)
        if name is None:
            raise ValueError(f"the posterior has no draws of latent site '{site}'; it has {', '.join(draws) or 'none'}")
        value = torch.as_tensor(np.array(draws[name]) if not isinstance(draws[name], Tensor) else draws[name])
        own = scorer.reference[0].nodes[site]["value"].shape
        leading = value.dim() - len(own)
        if leading not in (1, 2) or value.shape[leading:] != own:
            raise ValueError(
                f"the posterior draws of site '{site}' have shape {tuple(value.shape)}: (chain, draw) or (draw,) and then "
                f"the site's shape {tuple(own)} are needed"
            )
        found = (value.shape[0], value.shape[1]) if leading == 2 else (1, value.shape[0])
        if shape is not None and found != shape:
            raise ValueError(f"the posterior has {found} chains and draws at site '{site}', {shape} at others")
        shape = found
        flat[site] = value.detach().reshape(found[0] * found[1], *own)
    if shape is None:
        raise ValueError("the model has no latent site")
    if shape[1] < 4:
        raise ValueError(f"the posterior has {shape[1]} draws per chain; at least 4 are needed")
    return flat, shape


def _from_guide(sample: ImportanceSample, ladder: Sequence[int], *, alone: bool) -> list[_Entry]:
    log_w, count, khat = sample.log_weights, sample.num_draws, sample.khat
    heavy = "" if khat < FINITE_VARIANCE else f"k-hat {khat:.2f}: the weights may have no variance, the bound is loose"
    note = f"{sample.num_zero} draws outside the model's support" if sample.num_zero else ""
    entries = [_Entry("ELBO", "lower", 1, count, estimates.elbo(log_w), True, note, False)]
    for k in sorted(set(ladder)):
        if 1 < k <= count // 2:
            few = "" if count // k >= BLOCKS else f"only {count // k} blocks"
            entries.append(
                _Entry("IWAE", "lower", k, count // k * k, estimates.iwae(log_w, k), not few, few or note, False)
            )
    entries.append(_Entry("IWAE", "lower", count, count, estimates.iwae(log_w, count), True, heavy, True))
    light = khat < FINITE_VARIANCE
    note = (
        "upper bound with infinitely many draws; assumes that the guide reaches all of the posterior"
        if light
        else f"k-hat {khat:.2f} is not below 0.5: the weights may have no variance, and what is computed is too low"
    )
    entries.append(_Entry("CUBO", "upper", 2, count, estimates.cubo(log_w), light, note, alone and light))
    return entries


def _from_posterior(sample: ImportanceSample, posterior: Array, ladder: Sequence[int]) -> list[_Entry]:
    log_w, count, size = sample.log_weights, sample.num_draws, posterior.size
    outside = int((posterior == np.inf).sum())
    note = f"the guide has no density at {outside} posterior draws" if outside else ""
    entries = [_Entry("EUBO", "upper", 1, size, estimates.eubo(posterior), True, note, not outside)]
    usable = [k for k in sorted(set(ladder)) if k > 1 and count // (k - 1) >= 2]
    largest = max((k for k in usable if count // (k - 1) >= BLOCKS), default=None)
    for k in usable:
        blocks = count // (k - 1)
        few = "" if blocks >= BLOCKS else f"only {blocks} blocks"
        found = estimates.multi_sample_upper(log_w, posterior, k - 1)
        entries.append(
            _Entry(
                "multi-sample upper",
                "upper",
                k,
                size + count,
                found,
                not few,
                few or note,
                k == largest and not outside,
            )
        )
    light = sample.khat < FINITE_VARIANCE
    found = estimates.multi_sample_upper(log_w, posterior, count)
    heavy = "" if light else f"k-hat {sample.khat:.2f}: one block of draws whose weights may have no variance"
    entries.append(_Entry("multi-sample upper", "upper", count + 1, size + count, found, light, heavy or note, False))
    found = estimates.bridge(log_w, posterior, _effective(posterior))
    entries.append(_bridge_entry("bridge sampling", count, size, found))
    return entries


def _from_annealing(forward: Array, reverse: Array | None, noise: float) -> list[_Entry]:
    count = len(forward)
    khat = pareto_smoothed(forward, noise)[1]
    light = khat < FINITE_VARIANCE
    entries = [_Entry("AIS", "lower", count, count, estimates.iwae(forward, count), True, "", True, paired=False)]
    note = f"k-hat {khat:.2f} of the annealed weights"
    note += "; assumes that annealing reaches all of the posterior" if light else " is not below 0.5: too low"
    alone = reverse is None
    entries.append(
        _Entry("AIS, CUBO", "upper", 2, count, estimates.cubo(forward), light, note, alone and light, paired=False)
    )
    if reverse is not None:
        column = reverse[None]
        entries.append(
            _Entry("reverse AIS", "upper", 1, len(reverse), estimates.eubo(column), True, "", True, paired=False)
        )
        found = estimates.bridge(forward, column, float(len(reverse)))
        entries.append(_bridge_entry("AIS, bridge sampling", count, len(reverse), found)._replace(paired=False))
    return entries


def _bridge_entry(method: str, count: int, size: int, found: Estimate) -> _Entry:
    good = found.overlap >= estimates.OVERLAP
    note = "" if good else f"too little overlap: {found.overlap:.0f} effective draws, {estimates.OVERLAP} are needed"
    return _Entry(method, "estimate", count, count + size, found, good, note, good)


def _effective(values: Array) -> float:
    """Effective number of draws of shape ``(chain, draw)``, at most their number."""
    if not np.isfinite(values).all() or np.ptp(values) == 0:
        return float(values.size)
    size = effective_size(values)
    return min(size, float(values.size)) if math.isfinite(size) else float(values.size)


def _thinned(flat: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """At most ``count`` draws, evenly spaced."""
    size = len(next(iter(flat.values())))
    index = torch.linspace(0, size - 1, min(count, size)).round().long()
    return {name: value[index.to(value.device)] for name, value in flat.items()}


def _row(entry: _Entry, noise: float) -> Bound:
    error = _error(entry, None, noise)
    return Bound(
        entry.method,
        entry.direction,
        entry.k,
        entry.num_draws,
        entry.estimate.value,
        error,
        entry.valid and not math.isnan(entry.estimate.value),
        entry.counts,
        entry.note,
    )


def _error(entry: _Entry, base: Estimate | None, noise: float) -> float:
    """Standard error of a bound, or of its difference to the ELBO; with the rounding error of a log weight."""
    if not math.isfinite(entry.estimate.value):
        return math.nan
    own, variance = entry.estimate.guide, noise**2
    if base is not None:
        if own.size and entry.paired:
            blocks = estimates.in_blocks(base.guide, entry.estimate.block).mean(1)
            own = own - blocks
        else:
            variance += base.guide.var(ddof=1) / base.guide.size
    if own.size > 1:
        variance += own.var(ddof=1) / own.size
    other = entry.estimate.posterior
    if other.size > 1:
        variance += other.var(ddof=1) / _effective(other)
    return math.sqrt(variance)


def _interval(entries: Sequence[_Entry], base: Estimate | None, level: float, noise: float) -> Interval:
    """From the highest lower to the lowest upper limit, of ``log p(x)`` or of its difference to the ELBO ``base``."""
    limits: dict[str, list[float]] = {"lower": [], "upper": []}
    used = {
        side: [entry for entry in entries if entry.counts and entry.direction in (side, "estimate")] for side in limits
    }
    for side, sign in (("lower", -1.0), ("upper", 1.0)):
        for entry in used[side]:
            value = entry.estimate.value - (0.0 if base is None else base.value)
            freedom = max(
                [size for size in (entry.estimate.guide.size, entry.estimate.posterior.size) if size], default=2
            )
            quantile = stats.t.isf((1 - level) / 2 / len(used[side]), max(freedom - 1, 1))
            margin = quantile * _error(entry, base, noise)
            if entry.direction == "lower":
                # one value of log mean w: where the mean is found too high, its logarithm's error is found too low
                margin += 0.5 * (quantile * _error(entry, None, noise)) ** 2
            limits[side].append(value + sign * margin)
    return Interval(float(max(limits["lower"], default=-math.inf)), float(min(limits["upper"], default=math.inf)))


def _check(num_draws: Any, ladder: Any, level: Any, fallback: Any, batch_size: Any, seed: Any) -> None:
    check_count("num_draws", num_draws, LEAST_DRAWS)
    check_count("batch_size", batch_size, 1)
    check_seed(seed)
    if not isinstance(ladder, Iterable) or isinstance(ladder, str):
        raise TypeError(f"ladder must be a sequence of integers, not {ladder!r}")
    for k in ladder:
        check_count("every K of ladder", k, 1)
    check_fraction("level", level)
    if fallback not in ("auto", "ais", None):
        raise ValueError(f"fallback must be 'auto', 'ais' or None, got {fallback!r}")
