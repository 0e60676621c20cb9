"""Climbs of a log density from many points at once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyro_elbo_ext.automatic.evaluations import Array, Evaluations
from pyro_elbo_ext.automatic.gaussian import Gaussian

MEMORY = 8  # steps that the curvature is told by
ARMIJO = 1e-4  # least share of the rise that the slope promises
ENOUGH = 1e-6  # nats that the next step promises, at which a climb has arrived
FAILURES = 20  # of one step, each time shortened
LONGER = 4.0  # factor of the next step where the density is not concave


class Ends(NamedTuple):
    """Where climbs ended: points, shape (n, dim), log densities there, shape (n,), and which have arrived."""

    points: Array
    values: Array
    arrived: NDArray[np.bool_]


@np.errstate(over="ignore")  # where a climb begins far out
def climb_all(evaluate: Evaluations, points: Array, scale: Gaussian, most: int = 200) -> Ends:
    """Climb the log density from each of the points by L-BFGS, with one batch of gradients for a step of all of them.

    Parameters
    ----------
    evaluate
        Log density and gradients.
    points
        Starting points, shape (n, dim); those without a finite density stay where they are.
    scale
        In whose standard coordinates the climbs are made; where the density has its covariance they take few steps.
    most
        Gradients of one climb.

    References
    ----------
    Nocedal, Wright (2006), Numerical Optimization, chapter 7.
    """
    count, dim = points.shape
    x = points.copy()
    f, raw = evaluate(x)
    g = scale.whitened(raw)
    steps, changes = np.zeros((2, MEMORY, count, dim))
    inverse = np.zeros((MEMORY, count))  # 1 / step . change, zero where there is none
    gamma = 1 / _lengths(g)  # a first step of one sd
    direction, size = gamma[:, None] * g, np.ones(count)
    failures, rise = np.zeros(count, int), np.full(count, np.inf)
    active, arrived = np.isfinite(f), np.zeros(count, bool)
    for _ in range(most):
        rows = np.flatnonzero(active)
        if not len(rows):
            break
        move = size[rows, None] * direction[rows]
        there = x[rows] + (scale.at(move) - scale.loc)
        value, raw = evaluate(there)
        slope = (g[rows] * direction[rows]).sum(1)
        good = value >= f[rows] + ARMIJO * size[rows] * slope - 1e-12 * np.abs(f[rows])
        # steps that fall short: to the top of the parabola through the two values and the slope
        bad = rows[~good]
        with np.errstate(all="ignore"):
            promised = size[bad] * slope[~good]
            shorter = 0.5 * promised / (f[bad] + promised - value[~good])
        size[bad] *= np.clip(np.nan_to_num(shorter, nan=0.1), 0.1, 0.5)
        failures[bad] += 1
        lost = bad[failures[bad] > FAILURES]
        again = lost[inverse[:, lost].any(0)]  # once more along the gradient, if it was not
        inverse[:, again], failures[again], size[again] = 0.0, 0, 1.0
        gamma[again] = 1 / _lengths(g[again])
        direction[again] = gamma[again, None] * g[again]
        active[np.setdiff1d(lost, again)] = False
        # steps that do
        kept, move, value = rows[good], move[good], value[good]
        gradient = scale.whitened(raw[good])
        change = g[kept] - gradient
        product = (move * change).sum(1)
        concave = product > 1e-10 * _lengths(move) * _lengths(change)
        pushed = kept[concave]
        for array, new in ((steps, move[concave]), (changes, change[concave])):
            array[:-1, pushed] = array[1:, pushed]
            array[-1, pushed] = new
        inverse[:-1, pushed] = inverse[1:, pushed]
        inverse[-1, pushed] = 1 / product[concave]
        gamma[pushed] = product[concave] / (change[concave] ** 2).sum(1)
        convex = kept[~concave]
        inverse[:, convex] = 0.0
        length = _lengths(move[~concave]) / _lengths(gradient[~concave])
        gamma[convex] = LONGER * length
        rise[kept] = value - f[kept]
        x[kept], f[kept], g[kept] = there[good], value, gradient
        direction[kept] = _two_loops(gradient, steps[:, kept], changes[:, kept], inverse[:, kept], gamma[kept])
        size[kept], failures[kept] = 1.0, 0
        promised = (g[kept] * direction[kept]).sum(1)
        there_now = kept[concave & (promised < ENOUGH) & (rise[kept] < 1e2 * ENOUGH)]
        arrived[there_now], active[there_now] = True, False
    return Ends(x, f, arrived)


def _two_loops(g: Array, steps: Array, changes: Array, inverse: Array, gamma: Array) -> Array:
    """The L-BFGS estimate of minus the inverse Hessian times the gradient, for each row."""
    q, along = g.copy(), np.zeros(inverse.shape)
    used = [i for i in range(MEMORY) if inverse[i].any()]
    for i in reversed(used):
        along[i] = inverse[i] * (steps[i] * q).sum(1)
        q -= along[i][:, None] * changes[i]
    q *= gamma[:, None]
    for i in used:
        q += (along[i] - inverse[i] * (changes[i] * q).sum(1))[:, None] * steps[i]
    return q


def _lengths(rows: Array) -> Array:
    """Of vectors whose squares may be too large for a number."""
    largest = np.maximum(np.abs(rows).max(1, initial=0.0), 1e-300)
    return np.maximum(largest * np.linalg.norm(rows / largest[:, None], axis=1), 1e-300)
