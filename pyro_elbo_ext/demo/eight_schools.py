"""Eight schools: the data, the model in two parameterizations, and its evidence by quadrature."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
from numpy.typing import NDArray
from scipy import integrate, stats
from torch import Tensor


def load_eight_schools() -> dict[str, Any]:
    """The shipped data: ``school`` (8 names), ``y`` (estimated effects) and ``sigma`` (their standard errors), in points."""
    return json.loads(resources.files("pyro_elbo_ext").joinpath("data/eight_schools.json").read_text("utf-8"))


def centered(sigma: Tensor, y: Tensor | None = None) -> None:
    """Eight schools with each ``theta`` drawn from ``Normal(mu, tau)``: a funnel that independent normals cannot follow."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(sigma)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def noncentered(sigma: Tensor, y: Tensor | None = None) -> None:
    """The same model with ``theta = mu + tau * z`` and ``z`` standard normal: no funnel."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(sigma)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * z)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def log_evidence(sigma: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """``log p(y)`` in nats: theta and mu integrate out, and the integral over tau is done by quadrature."""

    def joint(tau: float) -> float:
        covariance = np.diag(sigma**2 + tau**2) + 5.0**2
        return stats.halfcauchy.pdf(tau, scale=5.0) * stats.multivariate_normal.pdf(y, cov=covariance)

    unit = joint(0.0)
    integral, _ = integrate.quad(lambda tau: joint(tau) / unit, 0.0, np.inf, epsabs=0.0, epsrel=1e-9)
    return float(np.log(integral) + np.log(unit))
