"""Modes of the posterior that a guide has no draws in: looked for, told, and reckoned with in the figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from pyro_elbo_ext.automatic.modes import LEAST, SAME_VALUE, Mode, Modes
from pyro_elbo_ext.automatic.search import how_hard, said_weight, search_modes
from pyro_elbo_ext.comparison import Components
from pyro_elbo_ext.comparison.ordering import indexed_by_components, sorted_entries
from pyro_elbo_ext.density import LogDensity
from pyro_elbo_ext.density.points import guide_points
from pyro_elbo_ext.diagnosis.findings import NOT_KNOWN, Finding, worst_of
from pyro_elbo_ext.diagnosis.marginals import Array, Scalars, judged, scalars_of
from pyro_elbo_ext.evidence import ImportanceSample
from pyro_elbo_ext.programs.given import imputation
from pyro_elbo_ext.programs.randomness import isolated

SAME_PLACE = 0.02  # of the distance between two modes, up to which their coordinates are the same in some order
NAMED = 3  # scalars that tell where a mode is


def density_of(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], seed: int) -> LogDensity | str:
    """The model's log density, or why there is none."""
    try:
        with isolated(seed):
            return LogDensity(model, args, kwargs, seed)
    except (ValueError, torch.linalg.LinAlgError) as error:
        return str(error)


def look_for_modes(
    density: LogDensity | str,
    sample: ImportanceSample,
    seed: int,
    known: Array | None = None,
    components: Sequence[Components] = (),
) -> Modes | str:
    """The modes, and which of them the guide's draws cover; or why they were not looked for.

    Parameters
    ----------
    density
        Of the model, or why it has none.
    sample
        The guide's draws and weights.
    seed
        Of the search.
    known
        Points to climb from too, shape (n, dim).
    components
        Exchangeable ones of the model: modes that differ in their order alone are one.
    """
    if isinstance(density, str):
        return density
    with isolated(seed):
        points, which = guide_points(density, sample.draws)
        weights = sample.log_weights[which.numpy()]
        if any(imputation(name, sample.nodes) for name in density.layout):
            weights = np.full(len(which), -np.inf)  # the density has a factor for what is not missing
        found = search_modes(density, points.numpy(), weights, seed, () if known is None else list(known))
        return found if isinstance(found, str) or not components else _in_any_order(found, density, components)


def _in_any_order(modes: Modes, density: LogDensity, components: Sequence[Components]) -> Modes:
    """One mode for all that are the same but for the order of components, with their draws together and one's weight."""
    if len(modes.modes) < 2:
        return modes
    axes = indexed_by_components(components)
    values = density.constrain(np.stack([mode.gaussian.loc for mode in modes.modes]))
    plain = np.concatenate([values[site].reshape(len(modes.modes), -1) for site in density.layout], 1)
    sites = {site: sorted_entries(value, axes[site]) if axes.get(site) else value for site, value in values.items()}
    ordered = np.concatenate([sites[site].reshape(len(modes.modes), -1) for site in density.layout], 1)
    kept: list[int] = []
    shares: dict[int, float] = {}
    for k, mode in enumerate(modes.modes):
        for first in kept:
            near = np.abs(ordered[k] - ordered[first]) < SAME_PLACE * np.abs(plain[k] - plain[first]).max()
            if abs(mode.log_density - modes.modes[first].log_density) < SAME_VALUE and near.all():
                shares[first] += mode.share
                break
        else:
            kept.append(k)
            shares[k] = mode.share
    total = sum(modes.modes[k].weight for k in kept)
    return replace(
        modes,
        modes=[
            replace(modes.modes[k], share=shares[k], copy_of=None, weight=modes.modes[k].weight / total) for k in kept
        ],
    )


def on_modes(
    modes: Modes | str, density: LogDensity | str, scalars: pd.DataFrame, guide: Scalars, sample: ImportanceSample
) -> tuple[pd.DataFrame, list[Finding]]:
    """Findings on other modes, and the figures with the modes reckoned in that the guide has no draws in.

    Parameters
    ----------
    modes
        What `look_for_modes` gave.
    density
        Of the model.
    scalars
        Figures of the mode that the guide is in.
    guide
        Its draws.
    sample
        Its weights.
    """
    if isinstance(modes, str) or isinstance(density, str):
        return scalars, [Finding("", "good", f"Other modes were not looked for: {modes}.")]
    told = how_hard(modes)
    if not modes.missed:
        what = f"no mode of a weight of {LEAST} or more without draws of the guide"
        more = f"; {len(modes.modes)} modes in all" if len(modes.modes) > 1 else ""
        return scalars, [Finding("", "good", f"Other modes: {told} found {what}{more}.")]
    places = [_values_at(mode, density, guide, sample) for mode in modes.missed]
    changed = with_missed(scalars, guide, modes.missed, places)
    worst = worst_of([*changed["verdict"], "means only"])
    findings = []
    for mode, place in zip(modes.missed, places, strict=True):
        at = _told_place(place, guide)
        copy = (
            " It has the same density and coordinates as another mode, up to their order and signs: a copy by a symmetry of "
            "the model."
            if mode.copy_of is not None or any(other.copy_of is not None for other in modes.modes)
            else ""
        )
        findings.append(
            Finding(
                "",
                worst,
                f"The posterior has another mode, of weight {said_weight(mode)}, in which the guide has "
                f"{_share(mode.share)} of its draws: at {at}.{copy} {told} found {len(modes.modes)} modes; "
                f"{mode.climbs} ended here.",
                "A guide that has both: a mixture with a component for each mode, each fitted from there and weighted by "
                "its evidence; or run_nuts with chains that start in each. If only one of them is meant, say so in the "
                "model: an ordered or sign constraint, a tighter prior.",
            )
        )
    without = -math.log1p(-min(sum(mode.weight for mode in modes.missed), 1 - 1e-12))
    findings.append(
        Finding(
            "",
            "good",
            "The bounds on log p(x) and on the gap KL(q || posterior) are of the part of the posterior that the guide "
            f"covers: with the modes that it misses both are {without:.2g} nats greater.",
        )
    )
    return changed, findings


def with_missed(scalars: pd.DataFrame, guide: Scalars, missed: list[Mode], places: list[Scalars]) -> pd.DataFrame:
    r"""The figures of a posterior that is the one behind ``scalars`` and the missed modes, each with its weight.

    With mean m_0 and sd s_0 of what was seen and those of the modes, all of weights w, the posterior has mean
    :math:`m = \sum_k w_k m_k` and variance :math:`\sum_k w_k (s_k^2 + m_k^2) - m^2`. The errors of the weights go into the
    standard errors.
    """
    frame = scalars.copy()
    guide_mean, guide_sd = guide.draws.mean(0), guide.draws.std(0, ddof=1)
    old_shift, old_ratio = (frame[name].to_numpy(float) for name in ("mean_shift", "log_sd_ratio"))
    seen_sd = guide_sd * np.exp(-old_ratio)
    seen_mean = guide_mean + old_shift * seen_sd
    means, sds = [seen_mean], [seen_sd]
    for place in places:
        at = {name: i for i, name in enumerate(place.names)}
        column = [at.get(name, -1) for name in guide.names]
        unknown = np.array(column) < 0
        means.append(np.where(unknown, seen_mean, place.draws.mean(0)[column]))
        sds.append(np.where(unknown, seen_sd, place.draws.std(0, ddof=1)[column]))

    def figures(weights: Array) -> tuple[Array, Array, Array]:
        all_weights = np.append(1 - weights.sum(), weights)[:, None]
        mean = (all_weights * means).sum(0)
        sd = np.sqrt((all_weights * (np.square(sds) + np.square(np.array(means) - mean))).sum(0))
        return (mean - guide_mean) / sd, np.log(guide_sd / sd), sd

    weights = np.array([mode.weight for mode in missed])
    shift, ratio, sd = figures(weights)
    variance_shift = (frame["mean_shift_se"].to_numpy(float) * (1 - weights.sum()) * seen_sd / sd) ** 2
    variance_ratio = (frame["log_sd_ratio_se"].to_numpy(float) * (1 - weights.sum()) * (seen_sd / sd) ** 2) ** 2
    for k, mode in enumerate(missed):
        other_shift, other_ratio, _ = figures(weights - mode.weight_se * (np.arange(len(weights)) == k))
        variance_shift += (other_shift - shift) ** 2
        variance_ratio += (other_ratio - ratio) ** 2
    frame["mean_shift"], frame["mean_shift_se"] = shift, np.sqrt(variance_shift)
    frame["log_sd_ratio"], frame["log_sd_ratio_se"] = ratio, np.sqrt(variance_ratio)
    judgement = judged(frame.copy())["verdict"]
    frame["verdict"] = [
        NOT_KNOWN if before == NOT_KNOWN and after != "do not use" else worst_of([before, after])
        for before, after in zip(scalars["verdict"], judgement, strict=True)
    ]
    return frame


def _values_at(mode: Mode, density: LogDensity, guide: Scalars, sample: ImportanceSample) -> Scalars:
    """Draws of the guide's scalars about a mode."""
    draws = mode.draws
    if draws is None:
        noise = np.random.default_rng(0).standard_normal((200, density.dim))
        draws = mode.gaussian.at(noise)
    with isolated(0):
        values = density.constrain(draws)
    wanted = set(guide.sites)
    return scalars_of({name: value for name, value in values.items() if name in wanted}, sample.nodes, 1)


def _told_place(place: Scalars, guide: Scalars) -> str:
    """The scalars in which a mode is farthest from the guide, with their means and sds in both."""
    at = {name: i for i, name in enumerate(place.names)}
    rows = []
    for i, name in enumerate(guide.names):
        if name in at:
            there, here = place.draws[:, at[name]], guide.draws[:, i]
            spread = math.hypot(float(there.std()), float(here.std())) or 1.0
            rows.append((abs(float(there.mean() - here.mean())) / spread, name, there, here))
    rows.sort(key=lambda row: -row[0])
    return ", ".join(
        f"{name} = {there.mean():.3g} ± {there.std():.2g} (the guide's {here.mean():.3g} ± {here.std():.2g})"
        for _, name, there, here in rows[:NAMED]
    ) + (", ..." if len(rows) > NAMED else "")


def _share(share: float) -> str:
    return "none" if share == 0 else f"{share:.1%}"
