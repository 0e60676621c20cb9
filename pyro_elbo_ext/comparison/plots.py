"""Pictures of a comparison with MCMC: matplotlib axes in, axes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pyro_elbo_ext.history.pictures import pyplot

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Draws = NDArray[np.float64]


def plot_marginal(approx: Draws, mcmc: Draws, title: str, ax: Axes) -> Axes:
    """Histograms of one parameter's draws, the approximation's over MCMC's, on common bins."""
    approx, mcmc = approx.ravel(), mcmc.ravel()
    low, high = np.quantile(np.concatenate([approx, mcmc]), [0.002, 0.998])
    # as many bins as the smaller side fills without ragged counts
    bins = np.linspace(low, high, int(np.clip(min(approx.size, mcmc.size) ** 0.45, 10, 40)) + 1).tolist()
    ax.hist(mcmc, bins=bins, density=True, color="0.78")
    ax.hist(approx, bins=bins, density=True, histtype="step", color="C0", linewidth=1.5)
    ax.set_title(title, fontsize="medium")
    ax.set_yticks([])
    ax.spines[["left", "right", "top"]].set_visible(False)
    return ax


def plot_forest(approx: Mapping[str, Draws], mcmc: Mapping[str, Draws], names: Sequence[str], ax: Axes) -> Axes:
    """Mean and 90% interval of the named parameters on both sides, in MCMC standard deviations from the MCMC mean."""
    for row, name in enumerate(names):
        center, scale = mcmc[name].mean(), mcmc[name].std(ddof=1)
        for side, draws, color, offset in (
            ("MCMC", mcmc[name], "0.55", -0.14),
            ("approximation", approx[name], "C0", 0.14),
        ):
            z = (draws.ravel() - center) / scale
            ax.plot(np.quantile(z, [0.05, 0.95]), [row + offset] * 2, color=color, linewidth=2.5)
            ax.plot(z.mean(), row + offset, "o", color=color, markersize=5, label=side if row == 0 else None)
    ax.axvline(0, color="0.85", linewidth=1, zorder=0)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.spines[["left", "right", "top"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("mean and 90% interval,\nMCMC sds from the MCMC mean")
    if len(names) < len(mcmc):
        ax.set_title(f"the {len(names)} of {len(mcmc)} that differ most", fontsize="medium")
    return ax


def plot_comparison(
    table: pd.DataFrame,
    approx: Mapping[str, Draws],
    mcmc: Mapping[str, Draws],
    max_marginals: int = 12,
    max_parameters: int = 50,
) -> Figure:
    """The forest, and marginals of the parameters that differ most, on a new figure.

    Parameters
    ----------
    table
        As ``Comparison.table``: the parameters with the largest ``wasserstein`` are shown.
    approx, mcmc
        Draws by parameter, shape (chain, draw).
    max_marginals, max_parameters
        Parameters with a histogram, and in the forest, at most.

    Raises
    ------
    ImportError
        Without matplotlib.
    """
    plt = pyplot()
    by_distance = list(table["wasserstein"].sort_values(ascending=False).index)
    order, told = by_distance[:max_marginals], set(by_distance[:max_parameters])
    columns = min(3, len(order))
    rows = -(-len(order) // columns)
    height = max(2.0 * rows, 0.28 * len(told)) + 1.2
    figure = plt.figure(figsize=(2.6 * columns + 5, height), layout="constrained")
    grid: Any = figure.add_gridspec(rows, columns + 1, width_ratios=[1.0] * columns + [1.4])
    for i, name in enumerate(order):
        title = f"{name}: {table.loc[name, 'verdict']}"
        plot_marginal(approx[name], mcmc[name], title, figure.add_subplot(grid[i // columns, i % columns]))
    forest = plot_forest(approx, mcmc, [name for name in mcmc if name in told], figure.add_subplot(grid[:, columns]))
    figure.legend(*forest.get_legend_handles_labels(), loc="outside lower right", ncols=2, frameon=False)
    return figure
