"""Estimates of ``log p(x)``, and of bounds on it, from log weights at draws of the guide and of the posterior: plain NumPy.

Each comes with the influence of every draw on it (Hampel 1974): to first order, the estimate is its expectation plus the
means of the influences over the guide's and over the posterior's draws. Their spread gives the standard error, and the
difference of two estimates' influences the standard error of the difference, though they share draws.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import logsumexp, softmax

from pyro_elbo_ext.evidence.scores import Array

OVERLAP = 50  # effective draws that the bridge needs on each side, for its standard error to be one
PAIRS = 10**6  # of a posterior draw and a block computed at a time


class Estimate(NamedTuple):
    """An estimate in nats, with the influences of the draws behind it.

    Attributes
    ----------
    value : float
    guide : ndarray
        Of each block of the guide's draws, shape ``(S // block,)``; empty if these have none.
    posterior : ndarray
        Of each posterior draw, shape ``(chain, draw)``; empty if these have none.
    block : int
        Draws of the guide in a block.
    overlap : float
        For the bridge, effective draws on the side where there are fewer; else inf.
    """

    value: float
    guide: Array
    posterior: Array
    block: int = 1
    overlap: float = math.inf


NONE = np.zeros(0)


def elbo(log_weights: Array) -> Estimate:
    """The mean log weight: ``log p(x) - KL(q || posterior)`` in expectation."""
    value = float(log_weights.mean())
    return Estimate(value, log_weights - value if math.isfinite(value) else NONE, NONE)


def iwae(log_weights: Array, block: int) -> Estimate:
    """``log mean_k w_k`` over blocks of draws, averaged: a lower bound in expectation (Burda et al. 2016).

    One block of all draws has its influences by the delta method, ``w / mean(w) - 1``.
    """
    count = len(log_weights)
    if block == count:
        return Estimate(float(logsumexp(log_weights) - math.log(count)), count * softmax(log_weights) - 1, NONE)
    values = logsumexp(in_blocks(log_weights, block), axis=1) - math.log(block)
    value = float(values.mean())
    return Estimate(value, values - value if math.isfinite(value) else NONE, NONE, block)


def cubo(log_weights: Array, n: float = 2.0) -> Estimate:
    """``(1 / n) log mean w^n``: an upper bound with infinitely many draws (Dieng et al. 2017), biased low with few."""
    count = len(log_weights)
    value = (logsumexp(n * log_weights) - math.log(count)) / n
    return Estimate(float(value), (count * softmax(n * log_weights) - 1) / n, NONE)


def eubo(posterior: Array) -> Estimate:
    """The mean log weight over the posterior: ``log p(x) + KL(posterior || q)`` in expectation (Ji and Shen 2019)."""
    value = float(posterior.mean())
    return Estimate(value, NONE, posterior - value if math.isfinite(value) else NONE)


def multi_sample_upper(log_weights: Array, posterior: Array, block: int) -> Estimate:
    """``log mean w`` of one posterior draw and ``block`` guide draws: an upper bound in expectation.

    Averaged over all pairs of a posterior draw and a block of the guide's draws (Sobolev and Vetrov 2019; Brekelmans et
    al. 2022). With all draws in one block, their influences are by the delta method.
    """
    count = len(log_weights)
    own = posterior.ravel()
    others = logsumexp(in_blocks(log_weights, block), axis=1)
    by_draw, by_block = np.empty(len(own)), np.zeros(len(others))
    rows = max(1, PAIRS // len(others))
    for start in range(0, len(own), rows):
        table = np.logaddexp(own[start : start + rows, None], others) - math.log(block + 1)
        by_draw[start : start + rows] = table.mean(1)
        by_block += table.sum(0) / len(own)
    value = float(by_draw.mean())
    if not math.isfinite(value):
        return Estimate(value, NONE, NONE, block)
    of_posterior = by_draw.reshape(posterior.shape) - value
    if block < count:
        return Estimate(value, by_block - value, of_posterior, block)
    share = np.exp(others - np.logaddexp(own, others)).mean()
    return Estimate(value, share * (count * softmax(log_weights) - 1), of_posterior)


def bridge(log_weights: Array, posterior: Array, effective: float) -> Estimate:
    r"""Bridge sampling between guide and posterior with the optimal bridge (Meng and Wong 1996).

    With :math:`s_1, s_2` the shares of posterior and guide draws, r solves

    .. math:: r = \frac{\mathrm E_q [w / (s_1 w + s_2 r)]}{\mathrm E_p [1 / (s_1 w + s_2 r)]},

    and the standard error is that of Frühwirth-Schnatter (2004).

    Parameters
    ----------
    effective
        Effective number of the posterior's draws, which may be autocorrelated.
    """
    count = len(log_weights)
    log_s1, log_s2 = math.log(effective / (effective + count)), math.log(count / (effective + count))
    flat = posterior.ravel()
    finite = np.concatenate([log_weights[np.isfinite(log_weights)], flat[np.isfinite(flat)]])

    def terms(log_r: float) -> tuple[Array, Array]:
        return -np.logaddexp(log_s1, log_s2 + log_r - log_weights), -np.logaddexp(log_s1 + flat, log_s2 + log_r)

    def excess(log_r: float) -> float:  # decreasing, so that the root is unique
        numerator, denominator = terms(log_r)
        return float(logsumexp(numerator) - logsumexp(denominator) - log_r + math.log(len(flat) / count))

    # both means are monotone in r, and beyond all weights by this much their ratio has the sign of its limit
    margin = 2 * abs(log_s1 - log_s2) + 2 * math.log(count * len(flat)) + 1
    low, high = finite.min() - margin, finite.max() + margin
    if not excess(low) > 0 > excess(high):  # weights of zero or infinity, of which too much is made
        return Estimate(math.nan, NONE, NONE, overlap=0.0)
    log_r = float(brentq(excess, low, high, xtol=1e-12))
    numerator, denominator = terms(log_r)
    top, bottom = softmax(numerator), softmax(denominator)
    overlap = min(1 / np.square(top).sum(), effective / len(flat) / np.square(bottom).sum())
    return Estimate(log_r, count * top - 1, -(len(flat) * bottom - 1).reshape(posterior.shape), overlap=float(overlap))


def in_blocks(values: Array, block: int) -> Array:
    """Consecutive blocks, shape ``(len // block, block)``; what is left over is dropped."""
    count = len(values) // block
    return values[: count * block].reshape(count, block)
