"""Covariances of a mean-field guide put right by how its optimum answers to a small change of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from pyro_elbo_ext.automatic.evaluations import Array, Evaluations
from pyro_elbo_ext.automatic.gaussian import Gaussian, standard_draws
from pyro_elbo_ext.automatic.quasi_newton import raise_elbo
from pyro_elbo_ext.density import LogDensity
from pyro_elbo_ext.density.points import guide_points
from pyro_elbo_ext.diagnosis.marginals import scalars_of, varying
from pyro_elbo_ext.evidence import psis_khat
from pyro_elbo_ext.programs.arguments import check_count, check_seed
from pyro_elbo_ext.programs.randomness import isolated, seeded

MOST_COORDINATES = 500
DRAWS, MORE_DRAWS = 256, 4096  # for the ELBO, and for the sites' own scale; even numbers
RISE, MOST_STEPS = 1e-7, 500  # of the ELBO, in nats: of a step that ends the ascent, and steps of it
STEP = 1e-3  # of finite differences, in sds
FAR = 0.5  # sds of a mean, or of a log sd, by which a guide that has converged is not off its own optimum


@dataclass(frozen=True, eq=False)
class LinearResponse:
    """What `linear_response` has found.

    Attributes
    ----------
    table : DataFrame
        Row per scalar of latent and deterministic sites, columns ``mean``, ``sd`` (of the mean-field guide) and
        ``sd_corrected``.
    covariance : ndarray
        Corrected, of the unconstrained coordinates, shape (dim, dim).
    coordinates : list of str
        Their names.
    moved : float
        Largest difference in a mean, in sds, or in a log sd, between the guide and its optimum, from which all is computed.
    """

    table: pd.DataFrame
    covariance: NDArray[np.float64]
    coordinates: list[str]
    moved: float

    def __repr__(self) -> str:
        return (
            f"{self.table.to_string(float_format='{:.4g}'.format)}\n\nthe guide was {self.moved:.2g} sd off its optimum"
        )


def linear_response(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_draws: int = 1000,
    seed: int | None = None,
    **kwargs: Any,
) -> LinearResponse:
    r"""Standard deviations and correlations that a mean-field guide leaves out, for the price of one Hessian.

    A mean-field guide often has the right means and sds that are too small, since it cannot follow correlations. But how
    its means answer to a small change of the log density is a covariance: with :math:`\eta` the guide's locations and log
    scales, :math:`H` the ELBO's Hessian in them at the optimum and
    :math:`g = \partial \operatorname{E}_q f / \partial \eta`,

    .. math:: \operatorname{Cov}(f) \approx g^\top (-H)^{-1} g .

    Exact where the posterior is Gaussian. The guide is taken for what it is on unconstrained space, independent coordinates
    with its means and sds, and from there to the optimum of the ELBO on fixed draws; a guide that was far from that has not
    converged. Means are not corrected.

    Parameters
    ----------
    model, guide, args, kwargs
        As given to ``pyro.infer.SVI``, after training; sites that are marked for enumeration are summed out.
    num_draws
        Of the guide, at least 25.
    seed
        Same seed, same answer; the caller's generators and parameters are left as they were.

    Returns
    -------
    LinearResponse
        Printed, a table of the scalars.

    Raises
    ------
    ValueError
        For a model without a log density on unconstrained space, or with more than 500 coordinates; a guide that is more
        than half an sd off its own optimum; an ELBO that has no maximum there.

    References
    ----------
    Giordano, Broderick, Jordan (2018), Covariances, robustness, and variational Bayes. Giordano, Ingram, Broderick (2024),
    Black box variational inference with a deterministic objective.
    """
    check_count("num_draws", num_draws, 25)
    check_seed(seed)
    with isolated(0):
        density = LogDensity(model, args, kwargs, 0)
    if density.dim > MOST_COORDINATES:
        raise ValueError(f"linear_response is for up to {MOST_COORDINATES} coordinates, the model has {density.dim}")
    sample = psis_khat(model, guide, *args, num_draws=num_draws, seed=seed, **kwargs)
    with seeded(0 if seed is None else seed), torch.no_grad():
        points = guide_points(density, sample.draws)[0].numpy()
        own = Gaussian(points.mean(0), points.std(0))
        if not (own.sd > 0).all():
            still = [density.coordinates[i] for i in np.flatnonzero(own.sd == 0)[:3]]
            raise ValueError(f"the guide has no spread at {', '.join(still)}: a point mass has no linear response")
        evaluate, rng = Evaluations(density, 1 << 62), np.random.default_rng(0)
        noise = standard_draws(rng, max(DRAWS, 4 * density.dim), density.dim)
        best = raise_elbo(evaluate, own, noise, tolerance=RISE, most=MOST_STEPS)[0]
        moved = float(max((np.abs(best.loc - own.loc) / best.sd).max(), np.abs(np.log(best.sd / own.sd)).max()))
        if moved > FAR:
            raise ValueError(
                f"the guide is {moved:.2f} sds off the mean-field guide of greatest ELBO: train it for longer, or with "
                "smaller steps. A guide that is not mean-field has no need of linear_response."
            )
        inverse = _inverse(_curvature(evaluate, best, noise))
        dim, sd = density.dim, best.sd
        more = standard_draws(rng, MORE_DRAWS, dim)
        found = scalars_of(density.constrain(torch.from_numpy(best.at(more))), density.program.sites, 1)
        found = found.take(varying(found.draws))
        centred = found.draws - found.draws.mean(0)
        # by Stein's identity; in shifts and log scales, both in sds
        slopes = np.concatenate([more.T @ centred, (more**2 - 1).T @ centred]) / len(more)
        variance = (slopes * (inverse @ slopes)).sum(0)
    table = pd.DataFrame(
        {"mean": found.draws.mean(0), "sd": found.draws.std(0), "sd_corrected": np.sqrt(variance)},
        index=pd.Index(found.names, name="scalar"),
    )
    covariance = sd[:, None] * inverse[:dim, :dim] * sd
    return LinearResponse(table, covariance, density.coordinates, moved)


def _curvature(evaluate: Evaluations, gaussian: Gaussian, noise: Array) -> Array:
    """Hessian of minus the ELBO in shifts and log scales of a diagonal Gaussian, in its sds, shape (2 dim, 2 dim)."""
    dim = evaluate.dim

    def gradient(eta: Array) -> Array:
        scales = np.exp(eta[dim:])
        moved = Gaussian(gaussian.loc + gaussian.factor * eta[:dim], gaussian.factor * scales)
        whitened = gaussian.whitened(evaluate(moved.at(noise))[1])
        return np.concatenate([whitened.mean(0), (whitened * noise).mean(0) * scales + 1])

    rows = [(gradient(step) - gradient(-step)) / (2 * STEP) for step in STEP * np.eye(2 * dim)]
    hessian = -np.stack(rows)
    return (hessian + hessian.T) / 2


def _inverse(hessian: Array) -> Array:
    try:
        np.linalg.cholesky(hessian)
    except np.linalg.LinAlgError:
        raise ValueError(
            "the ELBO of a mean-field guide has no maximum here: it has a direction in which it does not fall. Use "
            "fit(model, 'auto'), or run_nuts"
        ) from None
    return np.asarray(np.linalg.inv(hessian))
