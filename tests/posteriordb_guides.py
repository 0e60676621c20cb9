"""Three Gaussian guides on unconstrained space for any model: as usually trained, at the mode, and as good as they get."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from pyro.optim.clipped_adam import ClippedAdam
from scipy.optimize import minimize
from torch import Tensor
from torch.distributions import biject_to

from pyro_elbo_ext.density.log_density import LogDensity


class GaussianGuide:
    """A Gaussian on unconstrained space, as a Pyro guide of sites that Pyro's own autoguides may not start from.

    Attributes
    ----------
    loc, factor : Tensor
        Mean, shape (dim,), and Cholesky factor of the covariance.
    """

    def __init__(self, density: LogDensity, loc: Tensor, factor: Tensor) -> None:
        self.layout, self.loc, self.factor = density.layout, loc, factor
        self.supports = {name: density.program.sites[name]["fn"].support for name in density.layout}
        self.frames = {name: density.program.sites[name]["cond_indep_stack"] for name in density.layout}

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        u = pyro.sample(
            "_gaussian_latent", dist.MultivariateNormal(self.loc, scale_tril=self.factor), infer={"is_auxiliary": True}
        )
        for name, place in self.layout.items():
            support = self.supports[name]
            transform = biject_to(support)
            own = u[place.start : place.stop].reshape(place.shape)
            value = transform(own)
            log_density = transform.inv.log_abs_det_jacobian(value, own)
            log_density = sum_rightmost(log_density, log_density.dim() - value.dim() + support.event_dim)
            with ExitStack() as plates:
                for frame in self.frames[name]:
                    plates.enter_context(pyro.plate(frame.name, frame.size, dim=frame.dim))
                pyro.sample(name, dist.Delta(value, log_density=log_density, event_dim=support.event_dim))


def usual(density: LogDensity) -> GaussianGuide:
    """A mean-field Gaussian as `AutoNormal` is usually trained: from 0 with sds of 0.1, ClippedAdam, 5000 steps."""
    generator = torch.Generator().manual_seed(0)
    loc = torch.zeros(density.dim, dtype=torch.float64, requires_grad=True)
    log_scale = torch.full((density.dim,), np.log(0.1), dtype=torch.float64, requires_grad=True)
    optimizer = ClippedAdam([loc, log_scale], lr=0.01)
    for _ in range(5000):
        noise = torch.randn(density.dim, dtype=torch.float64, generator=generator)
        with torch.no_grad():
            _, gradient = density.value_and_grad(loc + log_scale.exp() * noise)
        loc.grad = -gradient
        log_scale.grad = -(gradient * noise * log_scale.exp().detach() + 1)
        optimizer.step()
    return GaussianGuide(density, loc.detach(), torch.diag(log_scale.detach().exp()))


def laplace(density: LogDensity) -> GaussianGuide:
    """The Gaussian at the mode with the density's curvature there."""
    x = np.zeros(density.dim)
    for _ in range(5):
        x = minimize(lambda u: tuple(-part for part in density.value_and_grad(u)), x, jac=True, method="BFGS").x
    steps = 1e-4 * np.eye(density.dim)
    rows = [(density.value_and_grad(x + h)[1] - density.value_and_grad(x - h)[1]) / 2e-4 for h in steps]
    hessian = -0.5 * (np.array(rows) + np.array(rows).T)
    covariance = torch.from_numpy(np.linalg.inv(hessian))
    return GaussianGuide(density, torch.from_numpy(x), torch.linalg.cholesky(covariance))


def whitened(density: LogDensity) -> GaussianGuide:
    """A full-rank Gaussian, in the Laplace approximation's coordinates, by sticking the landing and iterate averaging."""
    start = laplace(density)
    generator = torch.Generator().manual_seed(0)
    dim, steps = density.dim, 2000
    loc = torch.zeros(dim, dtype=torch.float64, requires_grad=True)
    factor = torch.eye(dim, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([loc, factor], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    averages = torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64)
    for step in range(steps):
        noise = torch.randn(16, dim, dtype=torch.float64, generator=generator)
        lower = factor.detach().tril()
        v = loc.detach() + noise @ lower.T
        _, gradient = density.value_and_grad(start.loc + v @ start.factor.T)
        # the path's part of the ELBO's gradient: of log p - log q at the draw, q held fixed
        path = gradient @ start.factor + torch.linalg.solve_triangular(lower.T, noise.T, upper=True).T
        loc.grad = -path.mean(0)
        factor.grad = -(path.T @ noise / len(noise)).tril()
        optimizer.step()
        schedule.step()
        if step >= steps // 2:
            averages[0].add_(loc.detach() / (steps - steps // 2))
            averages[1].add_(factor.detach().tril() / (steps - steps // 2))
    mean, lower = averages
    both = start.factor @ lower
    return GaussianGuide(density, start.loc + start.factor @ mean, torch.linalg.cholesky(both @ both.T))


GUIDES: dict[str, Callable[[LogDensity], GaussianGuide]] = {"usual": usual, "laplace": laplace, "whitened": whitened}
