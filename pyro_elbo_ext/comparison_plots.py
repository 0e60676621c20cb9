"""Pictures of a comparison with MCMC: matplotlib axes in, axes out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pyro_elbo_ext.comparison import Comparison


def plot_marginal(comparison: Comparison, parameter: str, ax: Axes) -> Axes:
    """Histograms of one parameter's draws, the approximation's over MCMC's, on common bins."""
    if parameter not in comparison.mcmc:
        raise KeyError(f"'{parameter}' was not compared; the parameters are {list(comparison.mcmc)}")
    approx, mcmc = comparison.approx[parameter].ravel(), comparison.mcmc[parameter].ravel()
    low, high = np.quantile(np.concatenate([approx, mcmc]), [0.002, 0.998])
    bins = np.linspace(low, high, 50).tolist()
    ax.hist(mcmc, bins=bins, density=True, color="0.75", label="MCMC")
    ax.hist(approx, bins=bins, density=True, histtype="step", color="C0", label="approximation")
    ax.set_title(f"{parameter}: {comparison.table.loc[parameter, 'verdict']}", fontsize="small")
    ax.set_yticks([])
    return ax


def plot_forest(comparison: Comparison, ax: Axes) -> Axes:
    """Mean and 90% interval of each parameter on both sides, in MCMC standard deviations from the MCMC mean."""
    names = list(comparison.mcmc)
    for row, name in enumerate(names):
        center, scale = comparison.mcmc[name].mean(), comparison.mcmc[name].std(ddof=1)
        for draws, color, offset in ((comparison.mcmc[name], "0.4", 0.15), (comparison.approx[name], "C0", -0.15)):
            z = (draws.ravel() - center) / scale
            ax.plot(np.quantile(z, [0.05, 0.95]), [row + offset] * 2, color=color)
            ax.plot(z.mean(), row + offset, "o", color=color, markersize=4)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set_xlabel("MCMC sds from the MCMC mean (grey: MCMC, blue: approximation)")
    return ax


def plot_comparison(comparison: Comparison, max_marginals: int = 12) -> Figure:
    """The forest, and marginals of the parameters that differ most, on a new figure.

    Raises
    ------
    ImportError
        Without matplotlib.
    """
    try:
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "pyro_elbo_ext[plots]"') from error

    order = comparison.table["wasserstein"].sort_values(ascending=False).index[:max_marginals]
    rows = -(-len(order) // 3)
    figure = plt.figure(figsize=(12, max(2.2 * rows, 0.35 * len(comparison.mcmc) + 1)), layout="constrained")
    grid: Any = figure.add_gridspec(rows, 4, width_ratios=[1, 1, 1, 1.6])
    for i, name in enumerate(order):
        ax = plot_marginal(comparison, name, figure.add_subplot(grid[i // 3, i % 3]))
        if i == 0:
            ax.legend(fontsize="x-small")
    plot_forest(comparison, figure.add_subplot(grid[:, 3]))
    return figure
