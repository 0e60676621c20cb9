"""Pictures of VAE-like fits: matplotlib axes in, axes out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pyro_elbo_ext.history.pictures import COLOURS, OTHER, TOTAL, axes_or_new

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

MAX_LABELS = 30  # units, beyond which their names would not fit under the bars


def plot_surgery(parts: Mapping[str, float], bound: float, title: str, ax: Axes | None = None) -> Axes:
    """Draw ``kl_prior`` as a bar of its two parts, with log N, the most that the first can be; all in nats per datum."""
    ax = axes_or_new(ax, (6.5, 2.0))
    left = 0.0
    for (name, value), colour in zip(parts.items(), COLOURS, strict=False):
        ax.barh(0, value, left=left, height=0.5, color=colour, label=f"{name} {value:.2f}")
        left += value
    ax.axvline(bound, color=TOTAL, linestyle=":", linewidth=1.5, label=f"log N {bound:.2f}")
    ax.set_yticks([])
    ax.set_ylim(-0.5, 0.5)
    ax.set_xlim(left=min(0.0, 1.05 * left))
    ax.set_xlabel("nats per datum")
    ax.set_title(title, loc="left", fontsize="medium")
    ax.spines[["left", "right", "top"]].set_visible(False)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.45), ncols=3, frameon=False, fontsize="small")
    return ax


def plot_active_units(units: pd.DataFrame, threshold: float, ax: Axes | None = None) -> Axes:
    """Draw each unit's variance of the mean, largest first, on a log scale, with the threshold.

    ``units`` has a row for each unit: ``site``, ``unit``, ``variance_of_mean``, ``active``.
    """
    ax = axes_or_new(ax, (6.5, 3.2))
    table = units.sort_values("variance_of_mean", ascending=False, ignore_index=True)
    variance = table["variance_of_mean"].to_numpy()
    places = np.arange(len(table))
    for is_active, colour, label in ((True, COLOURS[0], "active"), (False, OTHER, "inactive")):
        rows = (table["active"] == is_active).to_numpy()
        if rows.any():
            ax.bar(places[rows], variance[rows], color=colour, label=label)
    shown = [value for value in (threshold, *variance) if value > 0] or [1.0]
    low, high = min(shown) / 3, 1.5 * max(shown)
    for other in ax.get_shared_y_axes().get_siblings(ax):
        if other is not ax and other.has_data():  # what is on the scale already stays on it
            low, high = min(low, other.get_ylim()[0]), max(high, other.get_ylim()[1])
    ax.set_yscale("log")
    ax.set_ylim(low, high)
    if threshold > 0:
        ax.axhline(threshold, color=TOTAL, linestyle=":", linewidth=1.5, label=f"threshold {threshold:g}")
    if len(table) <= MAX_LABELS:
        several = table["site"].nunique() > 1
        labels = [f"{s}[{u}]" if several else str(u) for s, u in zip(table["site"], table["unit"], strict=True)]
        ax.set_xticks(places, labels, rotation=90 if several else 0)
    ax.set_xlabel("unit")
    ax.set_ylabel("variance over data of E_q[z | x]")
    ax.set_title(f"{int(table['active'].sum())} of {len(table)} units active", loc="left", fontsize="medium")
    ax.spines[["right", "top"]].set_visible(False)
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, borderaxespad=0.0, fontsize="small")
    return ax


def plot_amortization_gap(
    gap: NDArray[np.float64], approximation_gap: NDArray[np.float64] | None, ax: Axes | None = None
) -> Axes:
    """Draw the histogram of the amortization gaps of the data, with their mean, and that of the approximation gaps."""
    ax = axes_or_new(ax, (6.5, 3.2))
    shown = [("amortization gap", gap, COLOURS[0])]
    if approximation_gap is not None:
        shown.append(("approximation gap", approximation_gap, COLOURS[1]))
    low, high = np.quantile(np.concatenate([values for _, values, _ in shown]), [0.0, 0.995])
    if low == high:
        low, high = low - 0.5, high + 0.5
    bins = np.linspace(low, high, int(np.clip(gap.size**0.5, 5, 40)) + 1).tolist()
    for label, values, colour in shown:
        ax.hist(values.clip(low, high), bins=bins, color=colour, alpha=0.5, label=f"{label}, mean {values.mean():.3f}")
        ax.axvline(float(values.mean()), color=colour, linewidth=1.8)
    ax.set_xlabel("nats per datum")
    ax.set_ylabel("data")
    ax.set_title("what is lost to log p(x)" if len(shown) > 1 else "amortization gap", loc="left", fontsize="medium")
    ax.spines[["right", "top"]].set_visible(False)
    ax.legend(frameon=False, fontsize="small")
    return ax
