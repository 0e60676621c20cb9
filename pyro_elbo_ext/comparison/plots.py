"""Pictures of a comparison with MCMC: matplotlib axes in, axes out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_elbo_ext.history.plots import pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pyro_elbo_ext.comparison.marginal import Comparison


def plot_marginal(comparison: Comparison, parameter: str, ax: Axes) -> Axes:
    """Histograms of one parameter's draws, the approximation's over MCMC's, on common bins."""
    if parameter not in comparison.mcmc:
        raise KeyError(f"'{parameter}' was not compared; the parameters are {list(comparison.mcmc)}")
    approx, mcmc = comparison.approx[parameter].ravel(), comparison.mcmc[parameter].ravel()
    low, high = np.quantile(np.concatenate([approx, mcmc]), [0.002, 0.998])
    # as many bins as the smaller side fills without ragged counts
    bins = np.linspace(low, high, int(np.clip(min(approx.size, mcmc.size) ** 0.45, 10, 40)) + 1).tolist()
    ax.hist(mcmc, bins=bins, density=True, color="0.78")
    ax.hist(approx, bins=bins, density=True, histtype="step", color="C0", linewidth=1.5)
    ax.set_title(f"{parameter}: {comparison.table.loc[parameter, 'verdict']}", fontsize="medium")
    ax.set_yticks([])
    ax.spines[["left", "right", "top"]].set_visible(False)
    return ax


def plot_forest(comparison: Comparison, ax: Axes, max_parameters: int = 50) -> Axes:
    """Mean and 90% interval of each parameter on both sides, in MCMC standard deviations from the MCMC mean.

    Of more than ``max_parameters``, those with the largest Wasserstein distances are shown.
    """
    worst = set(_worst(comparison, max_parameters))
    names = [name for name in comparison.mcmc if name in worst]
    for row, name in enumerate(names):
        center, scale = comparison.mcmc[name].mean(), comparison.mcmc[name].std(ddof=1)
        for side, draws, color, offset in (
            ("MCMC", comparison.mcmc[name], "0.55", -0.14),
            ("approximation", comparison.approx[name], "C0", 0.14),
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
    if len(names) < len(comparison.mcmc):
        ax.set_title(f"the {len(names)} of {len(comparison.mcmc)} that differ most", fontsize="medium")
    return ax


def plot_comparison(comparison: Comparison, max_marginals: int = 12) -> Figure:
    """The forest, and marginals of the parameters that differ most, on a new figure.

    Raises
    ------
    ImportError
        Without matplotlib.
    """
    plt = pyplot()
    order = _worst(comparison, max_marginals)
    columns = min(3, len(order))
    rows = -(-len(order) // columns)
    height = max(2.0 * rows, 0.28 * min(len(comparison.mcmc), 50)) + 1.2
    figure = plt.figure(figsize=(2.6 * columns + 5, height), layout="constrained")
    grid: Any = figure.add_gridspec(rows, columns + 1, width_ratios=[1.0] * columns + [1.4])
    for i, name in enumerate(order):
        plot_marginal(comparison, name, figure.add_subplot(grid[i // columns, i % columns]))
    forest = plot_forest(comparison, figure.add_subplot(grid[:, columns]))
    figure.legend(*forest.get_legend_handles_labels(), loc="outside lower right", ncols=2, frameon=False)
    return figure


def _worst(comparison: Comparison, count: int) -> list[str]:
    return list(comparison.table["wasserstein"].sort_values(ascending=False).index[:count])
