"""Pictures of a diagnosis: matplotlib axes in, axes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyro_elbo_ext.comparison.marginal import BAD, GOOD
from pyro_elbo_ext.diagnosis.report import worst_first
from pyro_elbo_ext.evidence.importance import about_khat
from pyro_elbo_ext.history import History
from pyro_elbo_ext.history.pictures import COLOURS, OTHER, pyplot
from pyro_elbo_ext.history.plots import running_mean

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pyro_elbo_ext.diagnosis.findings import Judgement
    from pyro_elbo_ext.evidence import EvidenceBounds, ImportanceSample
    from pyro_elbo_ext.evidence.ledger import Bound

BLUE, ORANGE, GREEN = COLOURS[0], COLOURS[1], COLOURS[2]
MAX_SCALARS = 25  # of the forest, whose names would not fit otherwise
EDGE = 2.0  # posterior sds, log sds: what is further out is marked at the edge, with its figure
FIGURES = {"mean_shift": "mean shift (sds)", "log_sd_ratio": "log sd ratio"}
MARKERS = {"lower": (">", BLUE), "upper": ("<", ORANGE), "estimate": ("D", GREEN)}


def plot_forest(scalars: pd.DataFrame, axes: Sequence[Axes], max_scalars: int = MAX_SCALARS) -> NDArray[np.object_]:
    """``mean_shift`` and ``log_sd_ratio`` of each scalar, ± two standard errors, between the thresholds.

    Parameters
    ----------
    scalars
        As ``Diagnosis.scalars``.
    axes
        Two, with a common y axis.
    max_scalars
        Of more, the worst are shown.

    Returns
    -------
    numpy.ndarray
        The two axes.
    """
    shown = scalars if len(scalars) <= max_scalars else worst_first(scalars).iloc[:max_scalars]
    places = np.arange(len(shown))
    for axis, (column, label) in zip(axes, FIGURES.items(), strict=True):
        values = shown[column].to_numpy(float)
        errors = 2 * shown[f"{column}_se"].fillna(0.0).to_numpy(float)
        known = np.isfinite(values)
        reach = float(np.abs(values[known]).max(initial=0.0))
        edge = min(max(0.65, 1.2 * reach), EDGE)
        axis.axvspan(-GOOD, GOOD, color=GREEN, alpha=0.22, linewidth=0)
        for side in (-1, 1):
            axis.axvline(side * BAD, color=OTHER, linestyle="--", linewidth=1)
        inside = known & (np.abs(values) <= edge)
        axis.errorbar(
            values[inside], places[inside], xerr=errors[inside], fmt="o", color=BLUE, markersize=4, elinewidth=1.5
        )
        for place in places[known & ~inside]:
            side = 1 if values[place] > 0 else -1
            axis.plot(side * 0.96 * edge, place, ">" if side > 0 else "<", color=COLOURS[5], markersize=5)
            inward = "right" if side > 0 else "left"
            axis.text(side * 0.87 * edge, place, f"{values[place]:+.3g}", ha=inward, va="center", fontsize=7)
        for place in places[~known]:
            axis.text(0.0, place, "unknown", ha="center", va="center", fontsize=7)
        axis.set_xlim(-edge, edge)
        axis.set_xlabel(label)
        axis.spines[["left", "right", "top"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    # names are shown as they are: a $ in one is no formula
    axes[0].set_yticks(places, [_short(str(name)) for name in shown.index], fontsize=8, parse_math=False)
    axes[0].set_ylim(len(shown) - 0.4, -0.6)
    if len(shown) < len(scalars):
        axes[0].set_title(f"the worst {len(shown)} of {len(scalars)}", loc="left", fontsize="medium")
    return np.array(list(axes), object)


def plot_evidence(evidence: EvidenceBounds, ax: Axes) -> Axes:
    """The ledger: each bound ± two standard errors, and the interval of ``log p(x)``.

    Bounds that cannot be relied on are grey. The distance of the interval from the ELBO is ``KL(q || posterior)``.
    """
    rows = [bound for bound in evidence.bounds if np.isfinite(bound.value)]
    lower, upper = evidence.log_evidence
    ends = [end for end in (lower, upper) if np.isfinite(end)]
    trusted = [bound for bound in rows if bound.valid or bound.method == "ELBO"]
    points = [*ends, *(b.value + side * 2 * _known(b.standard_error) for b in trusted for side in (-1, 1))] or [0.0]
    margin = 0.06 * (max(points) - min(points)) or 1.0
    left, right = min(points) - margin, max(points) + margin
    if ends and lower <= upper:
        ax.axvspan(max(lower, left), min(upper, right), color=GREEN, alpha=0.25, linewidth=0)
    for place, bound in enumerate(rows):
        marker, colour = MARKERS[bound.direction] if bound.valid else (MARKERS[bound.direction][0], OTHER)
        if left <= bound.value <= right:
            error = 2 * _known(bound.standard_error)
            ax.errorbar(bound.value, place, xerr=error, fmt=marker, color=colour, markersize=5, elinewidth=1.5)
        else:
            side = 1 if bound.value > right else -1
            at = right if side > 0 else left
            ax.annotate(
                f"{bound.value:.4g} (off scale)",
                (at, place),
                fontsize=7,
                va="center",
                ha="right" if side > 0 else "left",
            )
    ax.set_yticks(range(len(rows)), [_row_name(bound) for bound in rows], fontsize=8)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlim(left, right)
    ax.locator_params(axis="x", nbins=3)  # long numbers would run into each other
    ax.ticklabel_format(axis="x", useOffset=False)
    ax.set_xlabel(f"nats; band: {100 * evidence.level:g}% interval of log p(x)")
    ax.spines[["left", "right", "top"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    return ax


def plot_weights(importance: ImportanceSample, ax: Axes, max_points: int = 300) -> Axes:
    """Importance weights by rank, raw and Pareto-smoothed: a tail that falls with slope ``-k-hat`` on log scales."""
    raw = importance.log_weights - importance.log_weights.max()
    raw = raw - np.log(np.exp(raw).sum())
    order = np.argsort(-raw, kind="stable")[: importance.num_draws - importance.num_zero]
    ranks = np.unique(np.geomspace(1, len(order), max_points).astype(int)) if len(order) else np.empty(0, int)
    at = order[ranks - 1]
    log10 = np.log(10)
    ax.plot(ranks, raw[at] / log10, "o", color=BLUE, markersize=3.5, label="as drawn")
    # both normalized by the weights as drawn, so that the lines part in the tail alone
    offset = np.median(importance.log_smoothed[order] - raw[order]) if len(order) else 0.0
    smoothed = np.sort(importance.log_smoothed)[::-1][ranks - 1] - offset
    ax.plot(ranks, smoothed / log10, color=ORANGE, linewidth=1.5, label="Pareto-smoothed")
    ax.axhline(-np.log10(importance.num_draws), color=OTHER, linestyle=":", linewidth=1.2, label="all equal")
    ax.set_xscale("log")
    bottom = (
        max(float(np.quantile(raw[order], 0.01)) / log10, -np.log10(importance.num_draws) - 6) if len(order) else -6.0
    )
    ax.set_ylim(bottom - 0.5, 0.3)
    ax.set_xlabel("rank of the draw")
    ax.set_ylabel("log10 of normalized weight")
    ax.set_title(
        about_khat(importance.khat, importance.ess, importance.num_draws),
        loc="left",
        fontsize="medium",
    )
    ax.legend(frameon=False, fontsize=8, loc="upper right")
    ax.spines[["right", "top"]].set_visible(False)
    return ax


def plot_elbo(history: History | ArrayLike, evidence: EvidenceBounds, ax: Axes) -> Axes:
    """The ELBO over steps with its running mean, below the interval of ``log p(x)``.

    Parameters
    ----------
    history
        Of `DecomposedELBO`, or the ELBO of each step in nats (the negative of what ``SVI.step`` returns), shape (n,).

    Raises
    ------
    ValueError
        For a history without steps or of another shape.
    """
    if isinstance(history, History):
        steps, elbo = np.asarray(history.steps, float), np.asarray(history.elbo, float)
    else:
        elbo = np.asarray(history, float)
        steps = np.arange(elbo.size, dtype=float)
    if elbo.ndim != 1 or not elbo.size:
        raise ValueError(f"history must have the ELBO of at least one step, shape (n,); its shape is {elbo.shape}")
    lower, upper = evidence.log_evidence
    mean = running_mean(steps, elbo, 0.05 * (steps[-1] - steps[0]))
    late = elbo[steps >= steps[0] + 0.3 * (steps[-1] - steps[0])]
    late = late[np.isfinite(late)]
    ax.plot(steps, elbo, color=BLUE, alpha=0.25, linewidth=0.8)
    ax.plot(steps, mean, color=BLUE, linewidth=1.8, label="ELBO", marker="o" if elbo.size == 1 else None)
    if late.size:  # the start would squash the rest
        ends = [end for end in (lower, upper) if np.isfinite(end)]
        low, high = np.min([np.quantile(late, 0.005), *ends]), np.max([np.quantile(late, 0.995), *ends])
        margin = 0.08 * (high - low) or 1.0
        ax.set_ylim(low - margin, high + margin)
        if np.isfinite(lower) and lower <= upper:
            top = min(upper, high + margin)
            ax.axhspan(lower, top, color=GREEN, alpha=0.25, linewidth=0)
            ax.axhline(lower, color=GREEN, linewidth=1.2, label="interval of log p(x)")
    ax.set_xlabel("step")
    ax.set_ylabel("nats")
    ax.ticklabel_format(axis="y", useOffset=False)
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    ax.spines[["right", "top"]].set_visible(False)
    return ax


def panels(diagnosis: Judgement, history: Any = None) -> list[tuple[str, float, Callable[[Any], Any]]]:
    """Title, height in inches and painter of each picture there is; a painter draws in a figure or subfigure."""
    rows = min(len(diagnosis.scalars), MAX_SCALARS)
    found: list[tuple[str, float, Callable[[Any], Any]]] = []
    if rows:
        found.append(
            (
                "How far each scalar is from the posterior",
                1.0 + 0.2 * rows,
                lambda figure: plot_forest(diagnosis.scalars, figure.subplots(1, 2, sharey=True)),
            )
        )
    found += [
        (
            "Bounds on log p(x)",
            1.0 + 0.24 * len(diagnosis.evidence.bounds),
            lambda figure: plot_evidence(diagnosis.evidence, figure.subplots()),
        ),
        ("Importance weights", 2.9, lambda figure: plot_weights(diagnosis.evidence.importance, figure.subplots())),
    ]
    if history is None and diagnosis.history is not None and len(diagnosis.history):
        history = diagnosis.history
    if history is not None:
        found.append(
            ("ELBO over the fit", 2.9, lambda figure: plot_elbo(history, diagnosis.evidence, figure.subplots()))
        )
    return found


def plot_diagnosis(diagnosis: Judgement, history: Any = None) -> Figure:
    """All pictures on a new figure, two beside each other.

    Raises
    ------
    ImportError
        Without matplotlib.
    """
    plt = pyplot()
    found = panels(diagnosis, history)
    rows = [found[i : i + 2] for i in range(0, len(found), 2)]
    heights = [max(height for _, height, _ in row) + 0.3 for row in rows]
    figure = plt.figure(figsize=(10, sum(heights)), layout="constrained")
    for subfigures, row in zip(
        figure.subfigures(len(rows), 2, height_ratios=heights, squeeze=False, hspace=0.03), rows, strict=True
    ):
        for subfigure, (title, _, paint) in zip(subfigures, row, strict=False):
            subfigure.suptitle(title, x=0.02, ha="left", fontsize="large")
            paint(subfigure)
    return figure


def _row_name(bound: Bound) -> str:
    shown = bound.k > 1 and bound.method in ("IWAE", "multi-sample upper")
    return f"{bound.method}, K = {bound.k}" if shown else bound.method


def _short(name: str, length: int = 28) -> str:
    return name if len(name) <= length else f"{name[: length // 2 - 1]}…{name[-length // 2 :]}"


def _known(value: float) -> float:
    return value if np.isfinite(value) else 0.0
