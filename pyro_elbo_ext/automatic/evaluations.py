"""Log density and gradient at many points at once, counted."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributions import biject_to

from pyro_elbo_ext.density import LogDensity

Array = NDArray[np.float64]

LARGE = 20_000  # numbers computed for one gradient from which machine code for one point beats the graph for many


class TooManyGradients(Exception):
    """The cap on gradient evaluations is reached."""


class Evaluations:
    """Value and gradient of a log density at the rows of an array, in the way that is fastest for this density.

    Attributes
    ----------
    density : LogDensity
        What is evaluated.
    dim : int
        Its number of coordinates.
    gradients : int
        Points evaluated so far.
    """

    def __init__(self, density: LogDensity, most: int) -> None:
        self.density, self.dim = density, density.dim
        self.gradients = 0
        self._most = most
        self._one_by_one = density.compiled and density.native is None and density.size > LARGE

    def __call__(self, x: Array) -> tuple[Array, Array]:
        """Values, shape (S,), and gradients, shape (S, dim), at ``x`` of shape (S, dim).

        Where either is not finite, the value is -inf and the gradient zero.

        Raises
        ------
        TooManyGradients
            If these would be more than the cap allows.
        """
        if self.gradients + len(x) > self._most:
            raise TooManyGradients
        self.gradients += len(x)
        with np.errstate(all="ignore"):
            if self.density.native is not None:
                values, gradients = self.density.native.rows(x)
            elif self._one_by_one:
                rows = [self.density.value_and_grad(row) for row in torch.from_numpy(x)]
                values = np.array([float(value) for value, _ in rows])
                gradients = np.stack([gradient.numpy() for _, gradient in rows])
            else:
                values, gradients = self.density.value_and_grad(x)
            bad = ~np.isfinite(values + gradients.sum(1))
        if bad.any():
            values, gradients = values.copy(), gradients.copy()
            values[bad], gradients[bad] = -np.inf, 0.0
        return values, gradients

    def penalized(self, x: Array) -> tuple[Array, Array]:
        """The same, where points without a finite density count as worse than any other; all -inf if none has one."""
        values, gradients = self(x)
        bad = values == -np.inf
        if bad.any() and not bad.all():
            worst = values[~bad].min()
            values = np.where(bad, worst - max(100.0, abs(worst)), values)
        return values, gradients

    def constrain(self, x: Array) -> dict[str, Array]:
        """Values of the latent and deterministic sites, shape (S, *site shape), at ``x`` of shape (S, dim)."""
        density = self.density
        if density.compiled or not set(density.names) <= set(density.layout):
            return density.constrain(x)
        u = torch.from_numpy(x)  # without deterministic sites, bijections do, and nothing need be traced
        sites: dict[str, Array] = {}
        for name, place in density.layout.items():
            transform = biject_to(density.program.sites[name]["fn"].support)
            sites[name] = transform(u[:, place.start : place.stop].reshape(len(u), *place.shape)).numpy()
        return sites
