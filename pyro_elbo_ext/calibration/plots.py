"""Pictures of a calibration: matplotlib axes in, axes out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pyro_elbo_ext.history.pictures import pyplot
from pyro_elbo_ext.inference_data.arviz_statistics import ecdf_band

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_rank_ecdf(ranks: NDArray[Any], num_draws: int, title: str, ax: Axes, prob: float = 0.95) -> Axes:
    """Distribution function of ranks, 0 to ``num_draws``, less the uniform one, with the band that uniform ranks stay in.

    With probability ``prob`` all of the curve is inside. A curve above 0 on the left and below on the right: the guide is
    too narrow; the mirror image: too wide; all above or all below: too high or too low.
    """
    if not 0 < prob < 1:
        raise ValueError(f"prob must be between 0 and 1, got {prob}")
    # at (r + 1) / (L + 1) the distribution function of uniform ranks is exactly that
    grid = np.unique(np.linspace(0, num_draws - 1, 100).astype(int))
    points = (grid + 1) / (num_draws + 1)
    curve = np.searchsorted(np.sort(ranks), grid, side="right") / ranks.size
    lower, upper = ecdf_band(ranks.size, points, prob)
    outside = (curve < lower) | (curve > upper)
    # step: the limits of a count are whole numbers
    ax.fill_between(points, lower - points, upper - points, step="mid", color="0.85", linewidth=0)
    ax.step(points, curve - points, where="mid", color="C3" if outside.any() else "C0", linewidth=1.5)
    ax.axhline(0, color="0.6", linewidth=0.8)
    ax.set_xlim(0, 1)
    ax.set_title(title, fontsize="medium")
    ax.set_xlabel("rank of the truth / L")
    ax.set_ylabel("ECDF − uniform")
    ax.spines[["right", "top"]].set_visible(False)
    return ax


def plot_symmetry(p: NDArray[Any], title: str, ax: Axes) -> Axes:
    """Histogram of ``P_q(theta > truth)`` and, as a line, its mirror image; where they differ the guide is biased."""
    bins = int(np.clip(p.size // 10, 4, 20))
    counts, edges = np.histogram(p, bins, (0, 1))
    ax.stairs(counts, edges, fill=True, color="0.8")
    ax.stairs(counts[::-1], edges, color="C1", linewidth=1.2)
    ax.axvline(0.5, color="0.6", linewidth=0.8)
    ax.set_xlim(0, 1)
    ax.set_title(title, fontsize="medium")
    ax.set_xlabel("P(guide > truth)")
    ax.set_yticks([])
    ax.spines[["left", "right", "top"]].set_visible(False)
    return ax


def plot_calibration(
    table: pd.DataFrame,
    ranks: Mapping[str, NDArray[Any]],
    probabilities: Mapping[str, NDArray[Any]],
    num_draws: int,
    max_parameters: int = 6,
) -> Figure:
    """Both pictures of the parameters with the smallest p-values, on a new figure.

    Parameters
    ----------
    table
        As of ``Calibration.to_dataframe()``.
    ranks, probabilities
        By parameter, shape (finished simulations,).
    num_draws
        The highest rank.
    max_parameters
        How many are shown at most.

    Raises
    ------
    ImportError
        Without matplotlib.
    """
    plt = pyplot()
    worst = table[["sbc_p_value", "symmetry_p_value"]].min(axis=1).sort_values(kind="stable").index[:max_parameters]
    names = [str(name) for name in table.index if name in set(worst)]
    figure, axes = plt.subplots(
        2, len(names), figsize=(2.9 * len(names) + 0.6, 5.2), layout="constrained", squeeze=False
    )
    for name, (above, below) in zip(names, axes.T, strict=True):
        plot_rank_ecdf(ranks[name], num_draws, name, above)
        plot_symmetry(probabilities[name], f"{name}: symmetry p = {table.loc[name, 'symmetry_p_value']:.2g}", below)
    for ax in axes[0, 1:]:
        ax.set_ylabel("")
    if len(names) < len(table):
        figure.suptitle(f"the {len(names)} of {len(table)} parameters with the smallest p-values", fontsize="medium")
    return figure
