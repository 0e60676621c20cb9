"""Iterates of an optimizer in bounded memory, and whether they have become stationary."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_elbo_ext.inference_data.arviz_statistics import effective_size, split_r_hat

Array = NDArray[np.float64]

MAX_BYTES = 1 << 27  # of the rows that are kept
MOST_ROWS, FEWEST_ROWS = 1024, 256  # with fewer, the largest R-hat of many parameters never comes near 1
_LEAST_HALF = 24  # rows in each half of the shortest window
_NUM_WINDOWS = 5
LONGEST = 0.95  # of all rows
_CANDIDATES = 16  # columns that are worst by a quick estimate, for which ArviZ is asked


class Iterates:
    """Rows of numbers, one after the other; where they become too many, two neighbours are averaged into one.

    Every row so is the mean of ``stride`` of those that were added, and a mean over rows is a mean over all of them.

    Parameters
    ----------
    width : int
        Numbers in a row.
    max_rows : int, optional
        How many rows are kept; by default 1024, or fewer where they would take more than 128 MiB.
    """

    def __init__(self, width: int, max_rows: int | None = None) -> None:
        self.width = width
        self.max_rows = max_rows or max(FEWEST_ROWS, min(MOST_ROWS, MAX_BYTES // (8 * max(width, 1)))) // 2 * 2
        self.clear()

    @staticmethod
    def fit(width: int) -> bool:
        """Whether rows of this width can be kept in bounded memory."""
        return 8 * width * FEWEST_ROWS <= MAX_BYTES

    def clear(self) -> None:
        """Forget all rows."""
        self._rows: Tensor | None = None
        self._count = 0
        self._open: Tensor | None = None  # sum of the rows of an unfinished mean
        self._in_open = 0
        self.stride = 1
        self.added = 0

    def add(self, row: Tensor) -> None:
        """Add one row, shape ``(width,)``."""
        row = row.detach().double()
        self._open = row.clone() if self._open is None else self._open.add_(row)
        self._in_open += 1
        self.added += 1
        if self._in_open < self.stride:
            return
        if self._count == self.max_rows:
            assert self._rows is not None
            self._rows[: self._count // 2] = self._rows.reshape(-1, 2, self.width).mean(1)
            self._count //= 2
            self.stride *= 2
            return  # the open mean is half of the next one
        if self._rows is None or self._count == len(self._rows):
            size = min(self.max_rows, 2 * self._count or 64)
            grown = row.new_empty((size, self.width))
            if self._rows is not None:
                grown[: self._count] = self._rows
            self._rows = grown
        self._rows[self._count] = self._open / self.stride
        self._count += 1
        self._open, self._in_open = None, 0

    def rows(self) -> Tensor:
        """The rows, oldest first, shape ``(n, width)``; a view."""
        return torch.empty((0, self.width), dtype=torch.float64) if self._rows is None else self._rows[: self._count]

    def state_dict(self) -> dict[str, Any]:
        """Copies of all that :meth:`load_state_dict` needs."""
        return {
            "rows": self.rows().clone(),
            "open": None if self._open is None else self._open.clone(),
            "in_open": self._in_open,
            "stride": self.stride,
            "added": self.added,
            "max_rows": self.max_rows,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.max_rows = state["max_rows"]
        self._count = len(state["rows"])
        self._rows = state["rows"].clone() if self._count else None
        self._open = None if state["open"] is None else state["open"].clone()
        self._in_open, self.stride, self.added = state["in_open"], state["stride"], state["added"]


class Window(NamedTuple):
    """The last ``length`` rows, and the largest split R-hat among their columns."""

    length: int
    r_hat: float


def best_window(rows: Array) -> Window | None:
    """Of five windows, all of which end with the last row, that with the smallest of the largest split R-hats.

    Parameters
    ----------
    rows
        Shape ``(n, P)``.

    Returns
    -------
    Window or None
        None where there are too few rows for the shortest window.

    References
    ----------
    Welandawe, Andersen, Vehtari, Huggins (2022), A framework for improving the reliability of black-box variational
    inference, Algorithm 2.
    """
    longest = int(LONGEST * len(rows))
    if longest < 2 * _LEAST_HALF:
        return None
    found = None
    for half in np.unique(np.linspace(_LEAST_HALF, longest // 2, _NUM_WINDOWS).astype(int)):
        spread = _excess_of_halves(rows[-2 * half :])
        largest = float(np.sqrt((half - 1) / half + spread.max(initial=0.0)))
        if found is None or largest <= found.r_hat:
            found = Window(2 * int(half), largest)
    return found


def largest_r_hat(window: Array) -> float:
    """The largest split R-hat of the columns of a window, shape ``(n, P)``, by ArviZ; a constant column has 1."""
    worst = _worst(_excess_of_halves(window))
    varying = window[:, worst[np.ptp(window[:, worst], axis=0) > 0]]
    return float(np.max(split_r_hat(varying), initial=1.0))


def smallest_ess(window: Array) -> float:
    """The smallest effective sample size of the columns of a window, shape ``(n, P)``, by ArviZ.

    A constant column has n.
    """
    count = len(window)
    blocks = int(np.sqrt(count))
    means = window[-(count // blocks) * blocks :].reshape(blocks, -1, window.shape[1]).mean(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        inefficiency = np.nan_to_num(means.var(0, ddof=1) / window.var(0, ddof=1), nan=0.0)
    worst = _worst(inefficiency)
    sizes = [effective_size(window[None, :, p]) for p in worst[np.ptp(window[:, worst], axis=0) > 0]]
    return float(np.min(sizes, initial=count))


def _excess_of_halves(window: Array) -> Array:
    """Variance between the means of the two halves over that within them, shape ``(P,)``; 0 where constant."""
    half = len(window) // 2
    halves = window[-2 * half :].reshape(2, half, -1)
    between = halves.mean(1).var(0, ddof=1)
    within = halves.var(1, ddof=1).mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nan_to_num(between / within, nan=0.0, posinf=np.inf)


def _worst(badness: Array) -> NDArray[np.intp]:
    return np.argsort(badness, kind="stable")[-_CANDIDATES:]
