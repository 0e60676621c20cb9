"""How far the figures themselves can be relied on: their errors, the importance weights, the chains, the fit's record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from pyro_elbo_ext.diagnosis.findings import NOT_KNOWN, Finding
from pyro_elbo_ext.diagnosis.many_chains import CONVERGED
from pyro_elbo_ext.diagnosis.marginals import BAD, GOOD, corrected
from pyro_elbo_ext.diagnosis.posterior_draws import PosteriorDraws
from pyro_elbo_ext.evidence import EvidenceBounds, ImportanceSample
from pyro_elbo_ext.history import History

WINDOW = 20  # recorded steps that a trend needs
NEAR = 0.5  # nats of KL(q || posterior) below which a guide is not called far
NAMED = 10  # scalars whose chains disagree a little that are named
# R-hat is the root of one and the variance of the chains' means in squared sds: from here on these are BAD sds apart
FAR_APART = math.sqrt(1 + BAD**2)
MANY = 0.5  # share of the scalars


def on_precision(scalars: pd.DataFrame) -> list[Finding]:
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


def on_weights(evidence: EvidenceBounds, sample: ImportanceSample) -> list[Finding]:
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
        use, noise = (
            ("relied on", "") if sample.khat < 0.5 else ("used after Pareto smoothing", ", with much noise above 0.5")
        )
        findings.append(
            Finding(
                "",
                "good",
                f"The importance weights can be {use}: k-hat {sample.khat:.2f}, below {sample.threshold:.2f} for "
                f"{count} draws{noise}.",
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
    """What limits a comparison with MCMC draws.

    Scalars whose chains disagree are not judged. By itself that is a caution: where a few disagree a little, the others
    can be told. The whole is not to be used where the chains of one are `BAD` sds apart, by which a guide would not be used
    either, or where as many disagree as agree: such chains have not arrived.
    """
    findings = []
    bad = {name: value for name, value in rhat.items() if not value < CONVERGED}
    if bad:
        worst = max(bad, key=lambda name: np.nan_to_num(bad[name], nan=np.inf))
        apart = not bad[worst] < FAR_APART
        many = len(bad) == len(rhat) or len(bad) >= max(2, MANY * len(rhat))
        if apart or many:
            statement = (
                f"The MCMC chains do not agree themselves: R-hat {bad[worst]:.2f}, and not below {CONVERGED} for {len(bad)} "
                f"of {len(scalars)} scalars. How far the guide is from the posterior they do not show."
            )
        else:
            names = sorted(bad, key=lambda name: -bad[name])
            shown = ", ".join(f"{name} ({bad[name]:.3f})" for name in names[:NAMED])
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            statement = (
                f"Not judged, since the MCMC chains do not quite agree, R-hat not below {CONVERGED}: {shown}{more}, of "
                f"{len(scalars)} scalars."
            )
        remedy = "Longer chains, or a reparametrized model."
        findings.append(Finding(worst, "do not use" if apart or many else "means only", statement, remedy))
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
    trend = _trend(record)
    if trend is None:
        return findings
    rise, error, moves, count = trend
    if moves:
        word = "rising" if rise > 0 else "falling"
        findings.append(
            Finding(
                "",
                "good",
                f"The ELBO was still {word}: by {rise:+.2f} ± {error:.2f} nats over the last {count} recorded steps.",
                "Longer run." if rise > 0 else "Smaller steps or more particles: it moves away from the optimum.",
            )
        )
    else:
        findings.append(
            Finding("", "good", f"The ELBO was level over the last {count} recorded steps, up to {error:.2f} nats.")
        )
    return findings


def is_level(record: History | None) -> bool:
    """Whether the record is long enough to say that the ELBO rises no more."""
    trend = None if record is None or len(record) == 0 else _trend(record)
    return trend is not None and not trend.moves


class _Trend(NamedTuple):
    """Of the last quarter: rise of the ELBO in nats, its standard error, whether it is more than noise, steps."""

    rise: float
    error: float
    moves: bool
    steps: int


def _trend(record: History) -> _Trend | None:
    """None for too short a record."""
    elbo, steps = record.elbo, record.steps
    last = np.flatnonzero(np.isfinite(elbo) & (steps > steps[-1] - max(1, (steps[-1] - steps[0]) // 4)))
    if len(last) < WINDOW:
        return None
    # means of eight parts are little correlated, where single steps are
    means = np.array([elbo[part].mean() for part in np.array_split(last, 8)])
    line = stats.linregress(np.arange(8), means)
    rise, error = 7 * float(line.slope), 7 * float(line.stderr)
    return _Trend(rise, error, bool(line.pvalue < 0.01 and abs(rise) > GOOD), len(last))
