"""A first Gaussian: of several climbs of the log density, the point along them whose Laplace approximation is best.

Where no climb ends at a mode that is near a Gaussian, as in a hierarchical model with a centred parametrization, whose
density has no greatest value, a mean-field Gaussian of few draws stands beside them.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize

from pyro_elbo_ext.automatic.evaluations import Array, Evaluations, TooManyGradients
from pyro_elbo_ext.automatic.gaussian import Gaussian, standard_draws
from pyro_elbo_ext.automatic.quasi_newton import raise_elbo
from pyro_elbo_ext.mcmc.starts import culprit

RADIUS = 2.0  # of the uniform starting points, as in Stan
ATTEMPTS = 100  # random points among which a starting point with a finite density is looked for
CLIMBS = 4  # starting points
MOST_ITERATIONS = 200  # of one climb
ALONG = 6  # points of a climb that are tried
DRAWS = 32  # for the ELBO of a candidate
SHRINKS = (1.0, 0.3)  # sds of a candidate, over those of the Laplace approximation
SAME, APART = 0.5, 4.0  # sds between ends of climbs that are one mode, and that are two
CLOSE = 1.0  # nats, times the root of dim, between the ELBO at a mode and what it would be for a Gaussian density
MEAN_FIELDS = 2  # starting points of a mean-field Gaussian
FIRST_SD, MOST_STEPS, RISE = 0.3, 200, 0.01  # of its coordinates at first; of its ascent; nats of a step that ends it


@dataclass(frozen=True, eq=False)
class Start:
    """A Gaussian to start from.

    Attributes
    ----------
    gaussian : Gaussian
        Of the greatest estimated ELBO.
    modes : list of (Gaussian, float)
        The Gaussian to start from, and that of each other mode, with their estimated ELBOs, the best first.
    """

    gaussian: Gaussian
    modes: list[tuple[Gaussian, float]]


class Candidate(NamedTuple):
    """A Gaussian, its estimated ELBO, and whether it stands at a mode whose ELBO is near a Gaussian density's."""

    gaussian: Gaussian
    elbo: float
    is_mode: bool


def find_start(evaluate: Evaluations, rng: np.random.Generator, *, diagonal: bool, climbs: int = CLIMBS) -> Start:
    """Climb the log density by L-BFGS from several points, and choose the best Laplace approximation along the way.

    A density may have no mode, or one with no mass about it, as that of a hierarchical model with a centred
    parametrization: then the ELBO is greatest before the end of the climb, or of a `mean_field` Gaussian.

    Parameters
    ----------
    evaluate
        Log density and gradients.
    rng
        Of starting points and draws.
    diagonal
        Whether the Gaussian is to be a diagonal one.
    climbs
        Number of starting points.

    Raises
    ------
    ValueError
        If no point with finite density and gradient is found; the site is named.

    References
    ----------
    Zhang, Carpenter, Gelman, Vehtari (2022), Pathfinder: Parallel quasi-Newton variational inference.
    """
    points = starting_points(evaluate, rng, climbs)
    noise = standard_draws(rng, DRAWS, evaluate.dim, diagonal=True)
    found: list[Candidate] = []
    for point in points:
        path = climb(evaluate, point)
        if any(_distance(path[-1], other.gaussian) < SAME for other in found):
            continue
        new = best_along(evaluate, path, noise, diagonal)
        if all(_distance(new.gaussian.loc, other.gaussian) > APART for other in found):
            found.append(new)
        elif new.elbo > found[0].elbo:
            found[0] = new
        found.sort(key=lambda candidate: -candidate.elbo)
    with contextlib.suppress(TooManyGradients):  # a starting point there is, and the ascent meets the cap again
        fresh = standard_draws(rng, DRAWS, evaluate.dim, diagonal=True)
        found = _with_mean_fields(evaluate, found, points, noise, fresh)
    return Start(found[0].gaussian, [(mode.gaussian, mode.elbo) for mode in found])


def _with_mean_fields(
    evaluate: Evaluations, found: list[Candidate], points: Array, noise: Array, fresh: Array
) -> list[Candidate]:
    """The same, or a mean-field Gaussian before what modes there are, if its ELBO is greater by draws that chose neither."""
    best = found[0].gaussian
    starts = points[: 1 if found[0].is_mode else MEAN_FIELDS]
    others = [best, *(mean_field(evaluate, point, noise, best.diagonal) for point in starts)]
    elbos = [float(evaluate(other.at(fresh))[0].mean() + other.entropy) for other in others]
    if not (index := int(np.argmax(elbos))):
        return found
    chosen = Candidate(others[index], elbos[index], False)
    return [chosen, *(mode for mode in found if mode.is_mode and _distance(mode.gaussian.loc, chosen.gaussian) > APART)]


def _distance(x: Array, gaussian: Gaussian) -> float:
    """In sds of the coordinate that is farthest off."""
    return float((np.abs(x - gaussian.loc) / gaussian.sd).max())


def starting_points(evaluate: Evaluations, rng: np.random.Generator, count: int) -> Array:
    """Points uniform on (-2, 2) with finite density and gradient, shape (count, dim)."""
    found = np.empty((0, evaluate.dim))
    for _ in range(-(-ATTEMPTS // (2 * count))):
        points = rng.uniform(-RADIUS, RADIUS, (2 * count, evaluate.dim))
        values, _ = evaluate(points)
        found = np.concatenate([found, points[values > -np.inf]])
        if len(found) >= count:
            return found[:count]
    if len(found):
        return found
    raise ValueError(
        f"no starting point with finite log density and gradient in {ATTEMPTS} points uniform on "
        f"({-RADIUS:g}, {RADIUS:g}) in unconstrained space: at the last one, {culprit(evaluate.density, points[-1])}. "
        "Check the data and supports of that site."
    )


def climb(evaluate: Evaluations, x: Array) -> list[Array]:
    """Points of an L-BFGS climb, each higher than the one before; the last is the mode, if there is one."""
    path, best = [x], -np.inf

    def negative(at: Array) -> tuple[float, Array]:
        nonlocal best
        values, gradients = evaluate(at[None])
        value = float(values[0])
        if value > best:
            best = value
            path.append(at.copy())
        return (-value if np.isfinite(value) else 1e100), -gradients[0]

    options = {"maxiter": MOST_ITERATIONS, "ftol": 1e-9, "maxcor": 20}
    minimize(negative, x, jac=True, method="L-BFGS-B", options=options)
    return path


def mean_field(evaluate: Evaluations, point: Array, noise: Array, diagonal: bool) -> Gaussian:
    """The Gaussian of independent coordinates that has the greatest ELBO on a few draws, from a point.

    Its sds keep it out of the narrow parts of a density, where a climb ends. As a full Gaussian unless ``diagonal``.

    References
    ----------
    Giordano, Ingram, Broderick (2024), Black box variational inference with a deterministic objective.
    """
    start = Gaussian(point, np.full(evaluate.dim, FIRST_SD))
    found = raise_elbo(evaluate, start, noise, tolerance=RISE, most=MOST_STEPS)[0]
    return found if diagonal else Gaussian(found.loc, np.diag(found.factor))


def best_along(evaluate: Evaluations, path: list[Array], noise: Array, diagonal: bool) -> Candidate:
    """The Laplace approximation of the greatest estimated ELBO at points of a climb."""
    best: tuple[Gaussian, float] | None = None
    settled = False
    for index in np.unique(np.geomspace(1, len(path), ALONG).astype(int)):
        gaussian, is_mode, top = laplace(evaluate, path[-index], noise, diagonal)
        tried = [Gaussian(gaussian.loc, gaussian.factor * shrink) for shrink in SHRINKS]
        values, _ = evaluate(np.concatenate([candidate.at(noise) for candidate in tried]))
        for candidate, own in zip(tried, values.reshape(len(tried), -1), strict=True):
            elbo = float(own.mean() + candidate.entropy)
            if best is None or elbo > best[1]:
                best = candidate, elbo
        assert best is not None
        of_gaussian = top + gaussian.log_volume + 0.5 * evaluate.dim * np.log(2 * np.pi)
        if settled := is_mode and best[1] > of_gaussian - CLOSE * np.sqrt(evaluate.dim):
            break
    assert best is not None
    return Candidate(*best, settled)


def laplace(evaluate: Evaluations, x: Array, noise: Array, diagonal: bool) -> tuple[Gaussian, bool, float]:
    """The Gaussian at a point with the density's curvature there, of which only the size counts where it is negative.

    Also whether the point is a maximum as far as the curvature tells, and the log density there.

    The curvature is by finite differences of the gradient; that of a diagonal one is estimated by random directions, as
    ``E[v * (H v)]`` with v of random signs (Hutchinson).
    """
    dim = evaluate.dim
    step = 1e-4 if evaluate.density.float64 else 1e-2
    if diagonal:
        signs = np.sign(noise)
        values, gradients = evaluate(np.concatenate([x + step * signs, x - step * signs]))
        products = (gradients[len(signs) :] - gradients[: len(signs)]) / (2 * step)
        curvature = (signs * products).mean(0)
        gaussian = Gaussian(x, np.clip(np.abs(curvature), 1e-4, 1e12) ** -0.5)
        return gaussian, bool((curvature > 0).all()), float(values.mean())
    steps = np.full(dim, step)
    for _ in range(2):
        moves = np.diag(steps)
        values, gradients = evaluate(np.concatenate([x + moves, x - moves]))
        hessian = (gradients[dim:] - gradients[:dim]) / (2 * steps[:, None])
        sd = np.clip(np.abs(np.diag(hessian)), 1e-12, 1e20) ** -0.5
        if (steps <= sd).all():
            break
        steps = np.minimum(steps, 0.1 * sd)
    scale = np.clip(np.abs(np.diag(hessian)), 1e-4, 1e20) ** -0.5
    hessian = scale[:, None] * (hessian + hessian.T) / 2 * scale
    curvatures, axes = np.linalg.eigh(hessian)
    factor = scale[:, None] * axes * np.clip(np.abs(curvatures), 1e-4, None) ** -0.5
    return Gaussian(x, factor), bool(curvatures[0] > 1e-4), float(values.mean())
