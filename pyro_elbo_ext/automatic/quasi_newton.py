"""L-BFGS on the ELBO of one batch of draws, for what natural-gradient steps are slow at."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize

from pyro_elbo_ext.automatic.evaluations import Array, Evaluations, TooManyGradients
from pyro_elbo_ext.automatic.gaussian import Gaussian

PAIRS = 20  # of steps and changes of the gradient that it remembers


def raise_elbo(
    evaluate: Evaluations, start: Gaussian, noise: Array, *, tolerance: float, most: int
) -> tuple[Gaussian, Array, Array]:
    """The Gaussian of greatest ELBO on fixed draws, of the same shape as the one given: full or diagonal.

    In the coordinates that ``start`` whitens: with ``start.loc + start.factor @ (m + L e)`` they are ``m``, the logs of L's
    diagonal and what is below it. A natural-gradient step moves mean and covariance as if neither hung on the other. Where
    they do, as along a funnel, whose sds follow the mean of the log scale, each step is as short as the last; L-BFGS learns
    how they go together.

    Parameters
    ----------
    evaluate
        Log density and gradients.
    start
        Where to start.
    noise
        Standard normal draws, shape (S, dim).
    tolerance
        Rise of the ELBO in one step, in nats, below which it ends.
    most
        Cap on the steps.

    Returns
    -------
    tuple
        The best Gaussian that was met, and values and gradients of the log density at its draws. Where the cap on
        gradients is reached it is the best one before.

    References
    ----------
    Giordano, Ingram, Broderick (2024), Black box variational inference with a deterministic objective. Liu, Nocedal (1989),
    On the limited memory BFGS method for large scale optimization.
    """
    dim = evaluate.dim
    rows, columns = np.tril_indices(dim, -1)
    best: tuple[float, tuple[Gaussian, Array, Array]] | None = None

    def negative(x: Array) -> tuple[float, Array]:
        nonlocal best
        shift, scales = x[:dim], np.exp(x[dim : 2 * dim])
        if start.diagonal:
            gaussian = Gaussian(start.loc + start.factor * shift, start.factor * scales)
        else:
            lower = np.diag(scales)
            lower[rows, columns] = x[2 * dim :]
            gaussian = Gaussian(start.loc + start.factor @ shift, start.factor @ lower)
        values, gradients = evaluate.penalized(gaussian.at(noise))
        elbo = float(values.mean() + start.log_volume + x[dim : 2 * dim].sum())
        if not np.isfinite(elbo):
            return 1e100, np.zeros_like(x)
        if best is None or elbo > best[0]:
            best = elbo, (gaussian, values, gradients)
        whitened = start.whitened(gradients)
        if start.diagonal:
            return -elbo, -np.concatenate([whitened.mean(0), (whitened * noise).mean(0) * scales + 1])
        moment = whitened.T @ noise / len(noise)
        return -elbo, -np.concatenate([whitened.mean(0), np.diag(moment) * scales + 1, moment[rows, columns]])

    x = np.zeros(2 * dim if start.diagonal else 2 * dim + len(rows))
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            elbo = -negative(x)[0]
            options = {"maxiter": most, "maxcor": PAIRS, "ftol": tolerance / max(abs(elbo), 1.0)}
            minimize(negative, x, jac=True, method="L-BFGS-B", options=options)
    except TooManyGradients:
        if best is None:
            raise
    if best is None:  # no draw of start has a finite density
        values, gradients = evaluate(start.at(noise))
        return start, values, gradients
    return best[1]
