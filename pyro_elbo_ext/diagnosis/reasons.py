"""Why a fit is not good, and what helps: findings from the figures, the draws of both sides, and the fit's record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from pyro_elbo_ext.diagnosis.findings import NOT_KNOWN, Finding, worst_of
from pyro_elbo_ext.diagnosis.many_chains import CONVERGED
from pyro_elbo_ext.diagnosis.marginals import BAD, GOOD, Scalars, corrected
from pyro_elbo_ext.diagnosis.posterior_draws import PosteriorDraws
from pyro_elbo_ext.evidence import EvidenceBounds, ImportanceSample
from pyro_elbo_ext.history import History

Array = NDArray[np.float64]

NAMED = 10  # scalars that are told of one by one
COLLAPSED = 4.0  # times too small, from which on an sd has collapsed
RUNAWAY = 100.0  # posterior sds, or times the posterior's sd
MISSED = 0.25  # difference of a correlation
NARROW = 0.2  # sd of the log spread below which there is no funnel
FUNNEL = 0.5  # correlation of a scale with the log spread of what it scales
UNEVEN = 100.0  # ratio of the largest to the smallest sd, from which on one step size suits no parameter
TAILED = 2.0  # excess kurtosis that a Gaussian guide cannot have
WINDOW = 20  # recorded steps that a trend needs
NEAR = 0.5  # nats of KL(q || posterior) below which a guide is not called far
MOST = 400  # scalars whose correlations are looked at


def findings_of(
    scalars: pd.DataFrame,
    guide: Scalars,
    posterior: Scalars | None,
    evidence: EvidenceBounds,
    sample: ImportanceSample,
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
    """
    pairs = {} if posterior is None else _pairs(scalars, guide, posterior)
    funnels = {} if posterior is None else _funnels(posterior, sample)
    findings = _on_scalars(scalars, guide, posterior, pairs, funnels)
    if posterior is not None:
        findings += _on_funnels(scalars, funnels)
        findings += _on_joint(scalars, pairs)
        findings += _on_scales(scalars, posterior, sample)
    return findings + _on_precision(scalars) + _on_weights(evidence, sample)


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
        remedy = _non_centre(children[0]) if children else _remedy(row, pairs.get(str(name)), tails)
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
    ratio = row["log_sd_ratio"]
    factor = math.exp(min(abs(ratio), 700.0))
    size = f"{factor:.2f}" if factor < 100 else f"{factor:.1e}"
    return (
        f"The posterior's {mean} is {row['mean_shift']:+.2f} ± {row['mean_shift_se']:.2f} posterior sds from the guide's; "
        f"the guide's {spread} is {size} times too {'small' if ratio < 0 else 'large'} (log ratio {ratio:+.2f} ± "
        f"{row['log_sd_ratio_se']:.2f})."
    )


def _remedy(row: pd.Series, pair: _Pair | None, tails: tuple[Array, Array] | None) -> str:
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
        f"Non-centre '{child}': poutine.reparam(model, config={{'{child}': LocScaleReparam(0)}}), then train a guide of "
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


def _on_precision(scalars: pd.DataFrame) -> list[Finding]:
    """Figures that are nearer to a threshold than their errors."""
    close = []
    for name, row in scalars[scalars["verdict"] != NOT_KNOWN].iterrows():
        for figure in ("mean_shift", "log_sd_ratio"):
            value, error = corrected(row[figure], row[f"{figure}_se"]), row[f"{figure}_se"]
            if any(abs(value - threshold) < 2 * error for threshold in (GOOD, BAD)):
                close.append((str(name), figure, row[figure], error))
    if not close:
        return []
    name, figure, value, error = max(close, key=lambda entry: abs(entry[2]))
    return [
        Finding(
            name,
            "good",
            f"Near a threshold: {figure} {value:+.3f} ± {error:.3f}, one of {len(close)} figures that chance may put on "
            "the other side.",
            "More draws, if it matters: num_draws, or longer chains as mcmc.",
        )
    ]


def _on_weights(evidence: EvidenceBounds, sample: ImportanceSample) -> list[Finding]:
    lower, upper = evidence.kl_posterior
    gap = (
        f"between {lower:.3g} and {upper:.3g} nats"
        if math.isfinite(upper)
        else "infinite"
        if math.isinf(lower)
        else f"at least {lower:.3g} nats"
    )
    findings = [
        Finding("", "good", f"The gap between the ELBO and log p(x), KL(q || posterior), is {gap}."),
    ]
    count = sample.num_draws
    if sample.num_zero:
        findings.append(
            Finding(
                "",
                "good",
                f"{sample.num_zero} of {count} draws of the guide are outside the model's support: the ELBO is -inf.",
                "Give the guide the support of the model's sites.",
            )
        )
    if sample.even:
        findings.append(
            Finding(
                "",
                "good",
                f"The importance weights are nearly equal, and leave {sample.ess:.1f} of {count} draws: k-hat, "
                f"{sample.khat:.2f}, says nothing of them.",
            )
        )
    elif sample.khat < sample.threshold:
        reliable = "" if sample.khat < 0.5 else "; above 0.5 their variance is infinite"
        findings.append(
            Finding(
                "",
                "good",
                f"The importance weights can be relied on: k-hat {sample.khat:.2f}, below {sample.threshold:.2f} for "
                f"{count} draws{reliable}.",
            )
        )
    elif upper < NEAR:
        findings.append(
            Finding(
                "",
                "good",
                f"The guide is near the posterior, but its tails are lighter: k-hat {sample.khat:.2f}, not below "
                f"{sample.threshold:.2f} for {count} draws, which leave {sample.ess:.1f} effective ones.",
                "Do not reweight its draws. A guide with heavier tails brings k-hat down.",
            )
        )
    else:
        findings.append(
            Finding(
                "",
                "good",
                f"As a joint distribution the guide is far from the posterior: k-hat {sample.khat:.2f}, not below "
                f"{sample.threshold:.2f} for {count} draws; the importance weights have no variance, and leave "
                f"{sample.ess:.1f} effective draws.",
                "Do not reweight its draws. A richer guide, or one with heavier tails, brings k-hat down.",
            )
        )
    for plate, khats in sample.local_khat.items():
        bad = np.flatnonzero(~sample.local_reliable[plate])
        if len(bad):
            shown = ", ".join(str(i) for i in bad[np.argsort(-khats[bad])][:5])
            findings.append(
                Finding(
                    plate,
                    "good",
                    f"{len(bad)} of {len(khats)} indices of the plate have k-hat of {sample.threshold:.2f} or more: {shown} "
                    "are the worst.",
                    "A richer guide for these indices.",
                )
            )
    return findings


def on_chains(drawn: PosteriorDraws) -> list[Finding]:
    """Whether the chains that stand for the posterior agree."""
    if drawn.converged:
        return [
            Finding(
                "",
                "good",
                f"The figures rest on {drawn.method}, whose chains agree: largest R-hat {drawn.rhat:.3f}, at "
                f"{drawn.worst}. Modes that the guide has no draws near are not seen.",
            )
        ]
    site = drawn.worst.split("[", maxsplit=1)[0]
    return [
        Finding(
            site,
            "do not use",
            f"Chains started at draws of the guide do not come to agree: R-hat {drawn.rhat:.2f} at {drawn.worst} on "
            f"unconstrained space, {CONVERGED} at most is wanted. Either the guide is too far off, or the posterior has "
            "several modes or a funnel; the figures are a rough guess.",
            "Run NUTS and pass its draws as mcmc. If it has divergences or does not converge either, reparametrize the "
            "model: non-centre its hierarchical sites, order what is exchangeable.",
        )
    ]


def on_comparison(scalars: pd.DataFrame, rhat: Mapping[str, float], absent: Sequence[str]) -> list[Finding]:
    """What limits a comparison with MCMC draws."""
    findings = []
    bad = {name: value for name, value in rhat.items() if not value < CONVERGED}
    if bad:
        worst = max(bad, key=lambda name: np.nan_to_num(bad[name], nan=np.inf))
        findings.append(
            Finding(
                worst,
                "do not use",
                f"The MCMC chains do not agree themselves: R-hat {bad[worst]:.2f}, and not below {CONVERGED} for {len(bad)} "
                f"of {len(scalars)} scalars. How far the guide is from the posterior they do not show.",
                "Longer chains, or a reparametrized model.",
            )
        )
    if absent:
        findings.append(
            Finding(
                "", "good", f"mcmc has no draws of {', '.join(absent)}: these are not judged.", "Keep their draws too."
            )
        )
    return findings


def on_scalars_left_out(names: Sequence[str]) -> list[Finding]:
    """Deterministic sites that are not judged."""
    if not names:
        return []
    shown = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
    return [Finding("", "good", f"Not judged, since too large or not finite in every draw: {shown}.")]


def on_history(record: History | None) -> list[Finding]:
    """Whether the ELBO was still rising over the last quarter of the fit, or had NaN."""
    if record is None or len(record) == 0:
        return []
    elbo, steps = record.elbo, record.steps
    findings = []
    broken = ~np.isfinite(elbo)
    if broken.any():
        findings.append(
            Finding(
                "",
                "good",
                f"The ELBO was NaN or infinite in {int(broken.sum())} of {len(elbo)} recorded steps, first at step "
                f"{int(steps[broken][0])}.",
                "A smaller step size, clipped gradients, or starting values nearer to the mode.",
            )
        )
    last = np.flatnonzero(~broken & (steps > steps[-1] - max(1, (steps[-1] - steps[0]) // 4)))
    if len(last) < WINDOW:
        return findings
    # means of four parts are little correlated, where single steps are
    parts = [elbo[part] for part in np.array_split(last, 8)]
    means = np.array([part.mean() for part in parts])
    line = stats.linregress(np.arange(8), means)
    rise, error = 7 * line.slope, 7 * line.stderr
    if line.pvalue < 0.01 and abs(rise) > GOOD:
        word = "rising" if rise > 0 else "falling"
        findings.append(
            Finding(
                "",
                "good",
                f"The ELBO was still {word}: by {rise:+.2f} ± {error:.2f} nats over the last {len(last)} recorded steps.",
                "Longer run." if rise > 0 else "Smaller steps or more particles: it moves away from the optimum.",
            )
        )
    else:
        findings.append(
            Finding("", "good", f"The ELBO was level over the last {len(last)} recorded steps, up to {error:.2f} nats.")
        )
    return findings
