"""What all pictures have in common: matplotlib where there is something to draw, axes, colours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito (2008): told apart with any common colour blindness. Grey is for "other", black for totals.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
OTHER = "#8F8F8F"
TOTAL = "#222222"


def pyplot() -> Any:
    """``matplotlib.pyplot``, imported only where there is something to draw.

    Raises
    ------
    ImportError
        Without matplotlib, saying how to install it.
    """
    try:
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "pyro_elbo_ext[plots]"') from error
    return plt


def axes_or_new(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """``ax``, or the axes of a new figure of ``size``, in inches.

    Raises
    ------
    ImportError
        If there is no ``ax`` and no matplotlib.
    """
    if ax is not None:
        return ax
    new: Axes = pyplot().subplots(figsize=size, layout="constrained")[1]
    return new
