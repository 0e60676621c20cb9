"""Gaussians by location and factor, and draws to fit them with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri
from scipy.stats import qmc

from pyro_elbo_ext.automatic.evaluations import Array


@dataclass(frozen=True, eq=False)
class Gaussian:
    """``z = loc + factor @ e`` with e standard normal; a ``factor`` of shape (dim,) is the diagonal of a diagonal one."""

    loc: Array
    factor: Array

    @property
    def diagonal(self) -> bool:
        return self.factor.ndim == 1

    def at(self, noise: Array) -> Array:
        """Draws, shape (S, dim), of standard normal ones."""
        return self.loc + (noise * self.factor if self.diagonal else noise @ self.factor.T)

    def whitened(self, gradients: Array) -> Array:
        """Gradients with respect to the standard normal draws."""
        return gradients * self.factor if self.diagonal else gradients @ self.factor

    @property
    def sd(self) -> Array:
        return np.abs(self.factor) if self.diagonal else np.sqrt((self.factor**2).sum(1))

    @property
    def log_volume(self) -> float:
        """log |det factor|."""
        if self.diagonal:
            return float(np.log(np.abs(self.factor)).sum())
        return float(np.linalg.slogdet(self.factor)[1])

    @property
    def entropy(self) -> float:
        """In nats."""
        return self.log_volume + 0.5 * len(self.loc) * (1 + np.log(2 * np.pi))


def triangular(gaussian: Gaussian) -> Gaussian:
    """The same with a lower triangular factor of positive diagonal."""
    upper = np.asarray(np.linalg.qr(gaussian.factor.T, mode="r"))
    return Gaussian(gaussian.loc, upper.T * np.sign(np.diag(upper)))


def standard_draws(rng: np.random.Generator, count: int, dim: int, diagonal: bool = False) -> Array:
    """Standard normal draws of which mean, skewness and covariance are exact: pairs (e, -e), rotated and stretched.

    With exact moments, what a batch says of a Gaussian density is exact: the mean gradient and the mean of gradient times
    draw are then the regression of gradients on draws.

    Parameters
    ----------
    rng
        Generator.
    count, dim
        Shape of the result; ``count`` is even.
    diagonal
        Whether only the variances, not all of the covariance, are made exact.
    """
    with_sobol = dim <= qmc.Sobol.MAXDIM and dim * count < 1 << 20
    half = count // 2
    if with_sobol:
        noise = ndtri(np.clip(qmc.Sobol(dim, seed=rng).random(half), 1e-12, 1 - 1e-12))
    else:
        noise = rng.standard_normal((half, dim))
    if diagonal:
        noise /= np.sqrt((noise**2).mean(0))
    elif half > dim:
        noise = np.linalg.solve(np.linalg.cholesky(noise.T @ noise / half), noise.T).T
    return np.concatenate([noise, -noise])
