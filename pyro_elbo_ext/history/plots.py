"""Pictures of a fit: matplotlib axes in, axes out, numpy arrays as data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np

from pyro_elbo_ext.history.pictures import COLOURS, OTHER, TOTAL, pyplot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


def plot_history(
    steps: NDArray[Any],
    elbo: Floats,
    reconstruction: Floats,
    kl_prior: Floats,
    sites: Sequence[str],
    *,
    objective: Floats | None = None,
    objective_label: str = "weighted objective",
    axes: Sequence[Axes] | None = None,
    smooth: float = 0.05,
    top: int = 6,
    unit: str = "nats",
) -> NDArray[np.object_]:
    """Draw a fit in three panels: ELBO, reconstruction, and KL(q || prior) stacked by site, over steps.

    Each panel has the running mean in front of the raw curve. A sampled ``kl_prior`` may be negative, so the running
    means of the sites are stacked upwards from 0 where positive and downwards where negative, and a line has their
    sum. A start far below the rest is left off the scale, and the panel then says so.

    Parameters
    ----------
    steps : (n,) array
        Increasing; need not be evenly spaced.
    elbo, reconstruction, objective : (n,) arrays
        ``objective`` (drawn dashed in the first panel) where it isn't the ELBO.
    objective_label
        What the legend calls ``objective``.
    kl_prior : (n, len(sites)) array
        0 where a step didn't have the site.
    axes
        Three axes to draw in; by default a new figure with the panels one above the other.
    smooth
        Width of the running mean as a fraction of the range of steps, from 0 (raw curves only) to 1.
    top
        Sites with the largest mean absolute ``kl_prior`` get a colour each; the others are summed as "other".
    unit
        For the axis labels.

    Returns
    -------
    numpy.ndarray
        The three axes.

    Raises
    ------
    ValueError
        Shapes don't fit, there are no steps, ``axes`` are not three, or ``smooth`` or ``top`` is out of range.
    ImportError
        matplotlib is not installed.
    """
    steps = np.asarray(steps, float)
    if steps.ndim != 1 or not steps.size:
        raise ValueError(f"steps must be a vector with at least one step; its shape is {steps.shape}")
    if kl_prior.shape != (steps.size, len(sites)):
        raise ValueError(f"kl_prior has shape {kl_prior.shape}; {steps.size} steps and {len(sites)} sites don't fit it")
    if not 0 <= smooth <= 1:
        raise ValueError(f"smooth is a fraction of the run, from 0 to 1; got {smooth}")
    if top < 1:
        raise ValueError(f"top must be at least 1; got {top}")
    if axes is None:
        axes = _new_panels()
    panels = np.array(axes, object).ravel()
    if panels.size != 3:
        raise ValueError(f"axes must be three matplotlib axes; got {panels.size}")

    width = smooth * (steps[-1] - steps[0])
    _curve(panels[0], steps, elbo, width, COLOURS[0], "ELBO")
    if objective is not None:
        _curve(panels[0], steps, objective, width, COLOURS[5], objective_label, linestyle="--")
        _legend(panels[0])
    _curve(panels[1], steps, reconstruction, width, COLOURS[2], "reconstruction")
    shown = [elbo] if objective is None else [elbo, objective]
    _limit(panels[0], steps, shown)
    _limit(panels[1], steps, [reconstruction])
    _stack(panels[2], steps, kl_prior, sites, width, top)
    for panel, title in zip(
        panels,
        ("ELBO = reconstruction - KL(q || prior)", "Reconstruction, E_q[log p(x | z)]", "KL(q || prior) by site"),
        strict=True,
    ):
        panel.set_title(title, loc="left", fontsize="medium")
        panel.set_ylabel(unit)
        panel.grid(axis="y", color="0.9", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(x=0.01)
    panels[2].set_xlabel("step")
    return cast("NDArray[np.object_]", panels)


def running_mean(steps: Floats, values: Floats, width: float) -> Floats:
    """Mean of ``values`` over a window of ``width`` steps around each step, NaNs left out.

    Near the first step the window is at most as wide as the distance from it, so that the mean doesn't lag behind
    a steep start; at the end it is cut off. Unevenly spaced steps count with the stretch of steps they stand for.

    Parameters
    ----------
    steps : (n,) array
        Increasing.
    values : (n,) or (n, m) array
        Averaged along the first axis.
    width
        In steps, at least 0.

    Returns
    -------
    numpy.ndarray
        Of the shape of ``values``.
    """
    half = np.minimum(width / 2, (steps - steps[0]) / 2)
    start = np.searchsorted(steps, steps - half, side="left")
    stop = np.searchsorted(steps, steps + half, side="right")
    weight = np.gradient(steps) if steps.size > 1 else np.ones(1)
    known = np.isfinite(values)
    weights = np.where(known, weight.reshape(-1, *[1] * (values.ndim - 1)), 0.0)
    # Centring keeps the difference of two cumulative sums accurate.
    centre = np.median(values[known.all(axis=tuple(range(1, values.ndim)))], axis=0) if known.any() else 0.0
    sums = [
        np.concatenate([np.zeros((1, *values.shape[1:])), np.cumsum(column, axis=0)])
        for column in (weights, weights * np.where(known, values - centre, 0.0))
    ]
    total, weighted = (column[stop] - column[start] for column in sums)
    mean = np.divide(weighted, total, out=np.full(values.shape, np.nan), where=total > 0)
    return cast("Floats", mean + centre)


def _new_panels() -> Sequence[Axes]:
    plt = pyplot()
    figure = plt.figure(figsize=(8.5, 8.0), layout="constrained")
    return cast("Sequence[Axes]", figure.subplots(3, 1, sharex=True, height_ratios=(1, 1, 1.25)))


def _curve(
    axis: Axes, steps: Floats, values: Floats, width: float, colour: str, label: str, linestyle: str = "-"
) -> None:
    if width > 0:
        raw = _evenly(steps)
        axis.plot(steps[raw], values[raw], color=colour, alpha=0.25, linewidth=0.8)
        values = running_mean(steps, values, width)
    marker = "o" if steps.size == 1 else None  # a line through one point is invisible
    axis.plot(steps, values, color=colour, linewidth=1.8, linestyle=linestyle, label=label, marker=marker)


def _evenly(steps: Floats) -> NDArray[np.intp]:
    """Rows spaced as the oldest are: a denser end of a thinned history would look noisier than the rest."""
    if steps.size < 3:
        return np.arange(steps.size)
    gap = np.median(np.diff(steps)[: max(steps.size // 4, 1)])
    return np.unique((steps - steps[0]) // gap, return_index=True)[1]


def _limit(axis: Axes, steps: Floats, curves: Sequence[Floats]) -> None:
    """Leave the start off the scale if it would squash the rest, and say where it was."""
    late = steps >= steps[0] + 0.05 * (steps[-1] - steps[0])
    known = [curve[np.isfinite(curve)] for curve in curves]
    rest = [curve[late & np.isfinite(curve)] for curve in curves]
    if sum(curve.size for curve in rest) < 20:
        return
    low, high = np.min([curve.min() for curve in rest if curve.size]), np.max([curve.max() for curve in known])
    lowest = np.min([curve.min() for curve in known])
    span = high - low
    if span > 0 and lowest < low - 2 * span:
        axis.set_ylim(low - 0.08 * span, high + 0.08 * span)
        axis.annotate(
            f"goes down to {lowest:.4g} in the first steps (off scale)",
            xy=(0.99, 0.05),
            xycoords="axes fraction",
            ha="right",
            fontsize="small",
            color="0.35",
        )


def _stack(axis: Axes, steps: Floats, kl_prior: Floats, sites: Sequence[str], width: float, top: int) -> None:
    raw = _evenly(steps)
    if width > 0:
        axis.plot(steps[raw], kl_prior[raw].sum(1), color=TOTAL, alpha=0.25, linewidth=0.8, zorder=0.9)
        kl_prior = running_mean(steps, kl_prior, width)
    if steps.size == 1:  # an area needs some width
        steps, kl_prior = steps + np.array([-0.5, 0.5]), kl_prior.repeat(2, axis=0)
    kl_prior = np.nan_to_num(kl_prior)
    order = np.argsort(-np.abs(kl_prior).mean(0), kind="stable")
    shown, rest = order[:top], order[top:]
    up, down = kl_prior.clip(min=0), kl_prior.clip(max=0)
    # Colours come round again: hatching tells the second use of one from the first.
    layers = [
        (up[:, i], down[:, i], sites[i], COLOURS[n % len(COLOURS)], "//" * (n // len(COLOURS)))
        for n, i in enumerate(shown)
    ]
    if rest.size:
        layers.append((up[:, rest].sum(1), down[:, rest].sum(1), f"other ({rest.size})", OTHER, ""))
    above, below = np.zeros(steps.size), np.zeros(steps.size)
    for rise, fall, label, colour, hatch in layers:
        style: dict[str, Any] = {"facecolor": colour, "edgecolor": "white", "linewidth": 0.4, "hatch": hatch}
        axis.fill_between(steps, above, above + rise, label=label, **style)
        if fall.any():
            axis.fill_between(steps, below + fall, below, **style)
        above, below = above + rise, below + fall
    axis.plot(steps, kl_prior.sum(1), color=TOTAL, linewidth=1.5, label="total")
    axis.axhline(0, color=TOTAL, linewidth=0.8)
    _legend(axis, reverse=True)  # in the order of the stack


def _legend(axis: Axes, reverse: bool = False) -> None:
    axis.legend(
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        frameon=False,
        borderaxespad=0.0,
        fontsize="small",
        reverse=reverse,
    )
