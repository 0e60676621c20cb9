"""Why a fit is not good, and what helps: findings from the figures and the draws of both sides."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from pyro_elbo_ext.diagnosis.findings import NOT_KNOWN, Finding, worst_of
from pyro_elbo_ext.diagnosis.marginals import GOOD, Scalars
from pyro_elbo_ext.diagnosis.reliability import on_precision, on_weights
from pyro_elbo_ext.diagnosis.report import times
from pyro_elbo_ext.evidence import EvidenceBounds, ImportanceSample

Array = NDArray[np.float64]

NAMED = 10  # scalars that are told of one by one
COLLAPSED = 4.0  # times too small, from which on an sd has collapsed
RUNAWAY = 100.0  # posterior sds, or times the posterior's sd
MISSED = 0.25  # difference of a correlation
NARROW = 0.2  # sd of the log spread below which there is no funnel
FUNNEL = 0.5  # correlation of a scale with the log spread of what it scales
UNEVEN = 100.0  # ratio of the largest to the smallest sd, from which on one step size suits no parameter
TAILED = 2.0  # excess kurtosis that a Gaussian guide cannot have
MOST = 400  # scalars whose correlations are looked at


def findings_of(
    scalars: pd.DataFrame,
    guide: Scalars,
    posterior: Scalars | None,
    evidence: EvidenceBounds,
    sample: ImportanceSample,
    level: bool = False,
) -> list[Finding]:
    """What the figures say, worst first, each scalar with the likeliest cause.

    Parameters
    ----------
    scalars
        The table of figures.
    guide, posterior
        Draws behind it, shape ``(draws, n)``; a posterior of None is not known.
    evidence, sample
        Bounds and importance weights.
    level
        Whether the ELBO is known to rise no more, so that a longer run is no remedy.
    """
    pairs = {} if posterior is None else _pairs(scalars, guide, posterior)
    funnels = {} if posterior is None else _funnels(posterior, sample)
    findings = _on_scalars(scalars, guide, posterior, pairs, funnels, level)
    if posterior is not None:
        findings += _on_funnels(scalars, funnels)
        findings += _on_joint(scalars, pairs)
        findings += _on_scales(scalars, posterior, sample)
    return findings + on_precision(scalars) + on_weights(evidence, sample)


class _Funnel(NamedTuple):
    """The scalar site that a site's spread goes with, and their rank correlation."""

    scale: str
    correlation: float


class _Pair(NamedTuple):
    """Another scalar, and its correlation with the one in question."""

    other: str
    posterior: float
    guide: float


def _pairs(scalars: pd.DataFrame, guide: Scalars, posterior: Scalars) -> dict[str, _Pair]:
    """For each scalar the other one whose correlation with it the guide misses most."""
    size = scalars[["mean_shift", "log_sd_ratio"]].abs().max(axis=1).to_numpy()
    chosen = np.sort(np.argsort(-np.nan_to_num(size, nan=np.inf), kind="stable")[:MOST])
    if len(chosen) < 2:
        return {}
    ours, theirs = (
        np.nan_to_num(np.asarray(np.corrcoef(_ranks(side.draws[:, chosen]).T))) for side in (guide, posterior)
    )
    gap = np.abs(theirs) - np.abs(ours)
    np.fill_diagonal(gap, -np.inf)
    found = {}
    for row, column in enumerate(gap.argmax(1)):
        if gap[row, column] > MISSED:
            found[guide.names[chosen[row]]] = _Pair(
                guide.names[chosen[column]], float(theirs[row, column]), float(ours[row, column])
            )
    return found


def _ranks(draws: Array) -> Array:
    """Normal scores, whose correlations heavy tails do not spoil."""
    return np.asarray(stats.norm.ppf((stats.rankdata(draws, axis=0) - 0.5) / len(draws)))


def _on_scalars(
    scalars: pd.DataFrame,
    guide: Scalars,
    posterior: Scalars | None,
    pairs: Mapping[str, _Pair],
    funnels: Mapping[str, _Funnel],
    level: bool,
) -> list[Finding]:
    bad = scalars[~scalars["verdict"].isin(["good", NOT_KNOWN]) & scalars["mean_shift"].notna()]
    size = bad[["mean_shift", "log_sd_ratio"]].abs().max(axis=1)
    bad = bad.loc[size.sort_values(ascending=False, kind="stable").index]
    place = {name: i for i, name in enumerate(guide.names)}
    findings = []
    for name, row in bad.head(NAMED).iterrows():
        i = place[str(name)]
        tails = None if posterior is None else (guide.draws[:, i], posterior.draws[:, i])
        children = [child for child, funnel in funnels.items() if row["site"] in (child, funnel.scale)]
        remedy = _non_centre(children[0]) if children else _remedy(row, pairs.get(str(name)), tails, level)
        findings.append(Finding(str(name), row["verdict"], _statement(row), remedy))
    rest = bad.iloc[NAMED:]
    for site, rows in rest.groupby("site", sort=False):
        worst = worst_of(rows["verdict"])
        findings.append(
            Finding(
                str(site),
                worst,
                f"{len(rows)} more of its scalars are off: means by up to {rows['mean_shift'].abs().max():.2f} posterior "
                f"sds, log sds by up to {rows['log_sd_ratio'].abs().max():.2f}.",
                "See the table of scalars.",
            )
        )
    if (scalars["verdict"] == "good").all() and scalars["mean_shift"].notna().all():
        worst_shift, worst_ratio = (scalars[name].abs().max() for name in ("mean_shift", "log_sd_ratio"))
        findings.append(
            Finding(
                "",
                "good",
                f"All {len(scalars)} scalars agree with the posterior: means within {worst_shift:.2f} posterior sds, log "
                f"sds within {worst_ratio:.2f}.",
            )
        )
    return findings


def _statement(row: pd.Series) -> str:
    mean, spread = ("median", "half width of the central 68%") if row["robust"] else ("mean", "sd")
    shift, ratio = row["mean_shift"], row["log_sd_ratio"]
    said = [
        f"the posterior's {mean} is {shift:+.2f} ± {row['mean_shift_se']:.2f} posterior sds from the guide's",
        f"the guide's {spread} is {times(ratio)} times too {'small' if ratio < 0 else 'large'} (log ratio {ratio:+.2f} ± "
        f"{row['log_sd_ratio_se']:.2f})",
    ]
    first, second = said if abs(shift) > abs(ratio) else said[::-1]  # what the verdict rests on comes first
    return f"{first[0].upper()}{first[1:]}; {second}."


def _remedy(row: pd.Series, pair: _Pair | None, tails: tuple[Array, Array] | None, level: bool) -> str:
    shift, ratio = row["mean_shift"], row["log_sd_ratio"]
    if abs(shift) > RUNAWAY or ratio > math.log(RUNAWAY):
        return (
            "The parameters ran away or never arrived: train again from the mode (init_loc_fn, or "
            "AutoLaplaceApproximation), with a smaller step size, and standardize predictors whose scales differ."
        )
    if ratio < -GOOD and pair is not None:
        return (
            f"Richer guide: the posterior correlates it with {pair.other} by {pair.posterior:+.2f}, the guide by "
            f"{pair.guide:+.2f}. Use one with a full covariance (AutoMultivariateNormal, AutoLowRankMultivariateNormal), "
            "or reparametrize so that they are less correlated, as by centring predictors."
        )
    if tails is not None and _excess(tails[1]) - _excess(tails[0]) > TAILED:
        return (
            "Heavier tails or skew: the posterior has more of them than the guide. Use a normalizing flow (AutoIAFNormal, "
            "AutoNormalizingFlow) or a guide with Student's t, or reparametrize."
        )
    if ratio < -math.log(COLLAPSED):
        return (
            "The sd has collapsed: train longer, with several particles and a step size that falls, from a larger "
            "init_scale."
        )
    if level:
        return (
            "Richer guide (full covariance, normalizing flow), or the average of the last iterates: the ELBO is level, and "
            "a longer run alone moves little."
        )
    if abs(shift) > GOOD:
        return (
            "Longer run: train on with a step size that falls to zero and more particles, or average the last iterates. If "
            "that moves nothing the guide's family is too narrow: a richer one."
        )
    return (
        "Longer run with a step size that falls to zero and more particles; if the sd stays as it is, a richer guide "
        "(full covariance, normalizing flow)."
    )


def _excess(draws: Array) -> float:
    """Excess kurtosis and squared skewness."""
    return float(stats.kurtosis(draws)) + float(stats.skew(draws)) ** 2


def _funnels(posterior: Scalars, sample: ImportanceSample) -> dict[str, _Funnel]:
    """Latent sites whose spread goes with a scalar latent site, and that site."""
    columns: dict[str, list[int]] = {}
    for i, site in enumerate(posterior.sites):
        if site in sample.draws:
            columns.setdefault(site, []).append(i)
    found: dict[str, _Funnel] = {}
    for child, indices in columns.items():
        if len(indices) < 3:
            continue
        z = posterior.draws[:, indices]
        spread = np.log(np.abs(z - z.mean(1, keepdims=True)).mean(1) + np.finfo(float).tiny)
        if spread.std() < NARROW:
            continue
        for scale, (index, *others) in columns.items():
            if others or scale == child:
                continue
            correlation = float(stats.spearmanr(posterior.draws[:, index], spread).statistic)
            if abs(correlation) > max(FUNNEL, abs(found[child].correlation) if child in found else 0.0):
                found[child] = _Funnel(scale, correlation)
    return found


def _on_funnels(scalars: pd.DataFrame, funnels: Mapping[str, _Funnel]) -> list[Finding]:
    verdicts = scalars.groupby("site")["verdict"].agg(worst_of)
    findings = []
    for child, (scale, correlation) in funnels.items():
        worst = worst_of([verdicts[scale], verdicts[child]])
        if worst != "good":
            findings.append(
                Finding(
                    child,
                    worst,
                    f"A funnel: the spread of '{child}' goes with '{scale}' (rank correlation {correlation:+.2f}), "
                    "which no Gaussian guide can follow.",
                    _non_centre(child),
                )
            )
    return findings


def _non_centre(child: str) -> str:
    return (
        f"Non-centre '{child}': poutine.reparam(model, config={{'{child}': LocScaleReparam(0.0)}}), then train a guide of "
        "the reparametrized model."
    )


def _on_joint(scalars: pd.DataFrame, pairs: Mapping[str, _Pair]) -> list[Finding]:
    """The strongest correlation that is missed between scalars that are good on their own."""
    good = {name: pair for name, pair in pairs.items() if scalars.loc[name, "verdict"] == "good"}
    if not good:
        return []
    name = max(good, key=lambda key: abs(good[key].posterior) - abs(good[key].guide))
    pair = good[name]
    return [
        Finding(
            name,
            "good",
            f"By itself as in the posterior, but correlated with {pair.other} by {pair.posterior:+.2f} there and by "
            f"{pair.guide:+.2f} in the guide: functions of both are not reliable.",
            "Richer guide, if functions of both are wanted: a full covariance.",
        )
    ]


def _on_scales(scalars: pd.DataFrame, posterior: Scalars, sample: ImportanceSample) -> list[Finding]:
    """Sds that are so different that no step size suits all."""
    latent = np.array([site in sample.draws for site in posterior.sites])
    worst = worst_of(scalars["verdict"])
    if latent.sum() < 2 or worst == "good":
        return []
    sd = posterior.draws.std(0)
    sd = np.where(latent & (sd > 0), sd, np.nan)
    low, high = int(np.nanargmin(sd)), int(np.nanargmax(sd))
    if sd[high] / sd[low] < UNEVEN:
        return []
    return [
        Finding(
            posterior.names[high],
            worst,
            f"Scales are uneven: its posterior sd is {sd[high]:.3g}, that of {posterior.names[low]} {sd[low]:.3g}. One step "
            "size does not suit both.",
            "Standardize the predictors and outcomes behind them, or reparametrize.",
        )
    ]
