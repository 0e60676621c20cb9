"""Points far apart, from which a search for modes sets out."""

from __future__ import annotations

import numpy as np

from pyro_elbo_ext.automatic.evaluations import Array, Evaluations
from pyro_elbo_ext.automatic.gaussian import Gaussian

RADIUS, WIDEST = 2.0, 30.0  # of uniform points, and how many times wider the widest are
PUSHES = (3.0, 6.0, 12.0, 24.0)  # sds of the guide by which its draws are pushed outwards, in every direction at random
REACH = np.geomspace(2.0, 60.0, 16)  # sds along a line through the guide
LINES = 40  # such lines
RISE = 0.1  # nats by which the density rises again along a line
FROM_LINES = 8  # of the points where it does
HALVINGS = 8  # of the way to a point without a density


def dispersed(
    evaluate: Evaluations, rng: np.random.Generator, draws: Array, scale: Gaussian, prior: Array, count: int
) -> dict[str, Array]:
    """Kinds of starting points, shape (n, dim) each, with a finite density.

    Parameters
    ----------
    evaluate
        Log density and gradients.
    rng
        Random numbers.
    draws
        Of a guide, shape (S, dim).
    scale
        Their Gaussian.
    prior
        Draws of the prior, shape (P, dim), all of which are taken.
    count
        Number of the others, about, by kind: a third each.
    """
    dim, each = evaluate.dim, max(4, count // 3)
    widths = np.geomspace(RADIUS, RADIUS * WIDEST, each)
    widths[: each // 2] = RADIUS
    found = {
        "guide": draws[rng.choice(len(draws), min(each, len(draws)), replace=False)],
        "prior": prior,
        "wide": rng.uniform(-1, 1, (each, dim)) * widths[:, None],
        "pushed": scale.at(rng.standard_normal((each, dim)) * np.resize(PUSHES, each)[:, None]),
        "lines": _along_lines(evaluate, rng, scale),
    }
    inwards = np.median(draws, 0)
    return {kind: _inside(evaluate, points, inwards) for kind, points in found.items()}


def _along_lines(evaluate: Evaluations, rng: np.random.Generator, scale: Gaussian) -> Array:
    """Points where the density rises again along lines outwards: single coordinates, and the guide's principal axes."""
    dim = evaluate.dim
    axes = np.diag(scale.sd)
    if not scale.diagonal:
        axes = np.concatenate([axes, scale.factor.T])
    axes = np.concatenate([axes, -axes])
    if len(axes) > LINES:
        axes = axes[rng.choice(len(axes), LINES, replace=False)]
    points = scale.loc + REACH[:, None, None] * axes
    values, _ = evaluate(points.reshape(-1, dim))
    values = values.reshape(len(REACH), -1)
    with np.errstate(invalid="ignore"):
        rises = values[1:-1] > np.minimum.accumulate(values, 0)[:-2] + RISE
        tops = rises & (values[1:-1] >= values[2:])
    at, line = np.nonzero(tops)
    best = np.argsort(-values[1:-1][at, line])[:FROM_LINES]
    return points[1:-1][at[best], line[best]].reshape(-1, dim)


def _inside(evaluate: Evaluations, points: Array, inwards: Array) -> Array:
    """The points, each halfway to the middle as often as it takes to a finite density; those that have none left out."""
    if not len(points):
        return points
    points = points.copy()
    values, _ = evaluate(points)
    for _ in range(HALVINGS):
        bad = np.flatnonzero(~np.isfinite(values))
        if not len(bad):
            break
        points[bad] = (points[bad] + inwards) / 2
        values[bad], _ = evaluate(points[bad])
    return points[np.isfinite(values)]
