"""Tests of ranks: are they uniform, are they symmetric, and which of several p-values are small."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import stats


def uniform_chi2(ranks: NDArray[np.int64], num_draws: int) -> float:
    """p-value of Pearson's chi-squared test that ranks are uniform on 0, ..., L.

    Parameters
    ----------
    ranks
        Shape (N,).
    num_draws
        L, the number of draws that each rank is among.

    Notes
    -----
    The L + 1 ranks are put into at most 20 bins of about ten expected ranks or more each, two at the least.
    """
    bins = int(np.clip(ranks.size // 10, 2, min(20, num_draws + 1)))
    edges = np.linspace(0, num_draws + 1, bins + 1).round()
    counts = np.histogram(ranks, edges - 0.5)[0]  # integers lie between the shifted edges, none on them
    return float(stats.chisquare(counts, ranks.size * np.diff(edges) / (num_draws + 1)).pvalue)


def uniform_ks(ranks: NDArray[np.int64], num_draws: int) -> float:
    """p-value of the Kolmogorov-Smirnov test of the same.

    A rank is spread evenly over its ``1 / (L + 1)`` of the unit interval, at random from a fixed seed, which makes a uniform
    rank a uniform number and the test exact.
    """
    spread = np.random.default_rng(0).uniform(size=ranks.shape)
    return float(stats.kstest((ranks + spread) / (num_draws + 1), "uniform").pvalue)


def symmetric_ks(deviations: NDArray[np.int64]) -> tuple[float, float]:
    """Kolmogorov-Smirnov distance between numbers and their mirror images about 0, with its exact p-value.

    Parameters
    ----------
    deviations
        Shape (N,); integers, as twice a rank less L, so that ties are exact.

    Returns
    -------
    tuple of float
        ``sup_x |F(x) - F_mirrored(x)|`` and the probability of one as large when signs are independent fair coins.

    Notes
    -----
    In decreasing order of size, the running sum of the signs is a random walk, and N times the distance its largest
    excursion (Butler 1969). The usual two-sample test does not hold here: a sample and its mirror image are not
    independent, and it would reject about 10% at a level of 5%.

    References
    ----------
    Butler (1969), A test for symmetry using the sample distribution function.
    """
    sizes, block = np.unique(-np.abs(deviations), return_inverse=True)
    signs = np.bincount(block.ravel(), np.sign(deviations), minlength=sizes.size).round().astype(int)
    counts = np.bincount(block.ravel(), minlength=sizes.size)[sizes != 0]  # a 0 is its own mirror image
    reached = int(np.abs(np.cumsum(signs)).max(initial=0))
    if reached == 0:
        return 0.0, 1.0
    inside = np.zeros(2 * reached - 1)  # probability of each place of a walk that has stayed below ``reached``
    inside[reached - 1] = 1.0
    for count in counts:
        step = np.zeros(2 * count + 1)
        step[::2] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        inside = np.convolve(inside, step)[count : count + inside.size]
    return reached / deviations.size, float(np.clip(1 - inside.sum(), 0.0, 1.0))


def holm(p_values: NDArray[np.float64]) -> NDArray[np.float64]:
    """p-values adjusted for their number, shape (M,): all those below alpha are false at most with probability alpha.

    References
    ----------
    Holm (1979), A simple sequentially rejective multiple test procedure.
    """
    order = np.argsort(p_values)
    scaled = p_values[order] * np.arange(p_values.size, 0, -1)
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted
