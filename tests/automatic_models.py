"""Models of many kinds, with simulated data, on which an automatic guide is tried."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from tests.models import SIGMA, Y

RNG = np.random.default_rng(20)


def _tensor(values: Any) -> Tensor:
    return torch.as_tensor(np.asarray(values), dtype=torch.float64)


X = _tensor(RNG.standard_normal((200, 8)))
GROUP = torch.as_tensor(RNG.integers(0, 20, 200))
BETA = _tensor(RNG.standard_normal(8))
BINARY = _tensor(RNG.random(200)).lt(torch.sigmoid(X @ BETA)).double()
COUNTS = _tensor(RNG.poisson(np.exp(0.5 + 0.5 * X[:, 0].numpy() + 0.4 * RNG.standard_normal(20)[GROUP.numpy()])))
REAL = X @ BETA + 0.5 * _tensor(RNG.standard_t(3, 200))


def logistic() -> None:
    beta = pyro.sample("beta", dist.Normal(0.0, 2.5).expand([8]).to_event(1))
    with pyro.plate("data", 200):
        pyro.sample("y", dist.Bernoulli(logits=X @ beta), obs=BINARY)


def negative_binomial() -> None:
    beta = pyro.sample("beta", dist.Normal(0.0, 2.5).expand([8]).to_event(1))
    shape = pyro.sample("shape", dist.Gamma(2.0, 0.1))
    with pyro.plate("data", 200):
        pyro.sample("y", dist.GammaPoisson(shape, shape * torch.exp(-X @ beta)), obs=COUNTS)


def student_t() -> None:
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([8]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.0))
    nu = pyro.sample("nu", dist.Gamma(2.0, 0.1))
    with pyro.plate("data", 200):
        pyro.sample("y", dist.StudentT(nu, X @ beta, sigma), obs=REAL)


def horseshoe() -> None:
    tau = pyro.sample("tau", dist.HalfCauchy(0.1))
    with pyro.plate("predictors", 8):
        lam = pyro.sample("lam", dist.HalfCauchy(1.0))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("data", 200):
        pyro.sample("y", dist.Normal(X @ (z * lam * tau), sigma), obs=REAL)


def centred() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    y, sd = Y.double(), SIGMA.double()
    with pyro.plate("school", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sd), obs=y)


def funnel() -> None:
    v = pyro.sample("v", dist.Normal(_tensor(0.0), 3.0))
    with pyro.plate("others", 9):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


def correlation() -> None:
    factor = pyro.sample("factor", dist.LKJCholesky(3, _tensor(2.0)))
    scale = pyro.sample("scale", dist.HalfNormal(_tensor(2.0)).expand([3]).to_event(1))
    with pyro.plate("data", 200):
        pyro.sample(
            "y", dist.MultivariateNormal(_tensor(np.zeros(3)), scale_tril=scale[:, None] * factor), obs=X[:, :3]
        )


def proportions() -> None:
    p = pyro.sample("p", dist.Dirichlet(_tensor([1.0, 1.0, 1.0, 1.0])))
    pyro.sample("y", dist.Multinomial(100, p), obs=_tensor([50, 30, 18, 2]))


def random_effects() -> None:
    intercept = pyro.sample("intercept", dist.Normal(0.0, 2.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("groups", 20):
        effect = pyro.sample("effect", dist.Normal(0.0, sigma))
    with pyro.plate("data", 200):
        pyro.sample("y", dist.Poisson(torch.exp(intercept + slope * X[:, 0] + effect[GROUP])), obs=COUNTS)


def two_modes() -> None:
    x = pyro.sample("x", dist.Normal(_tensor(0.0), 3.0))
    y = pyro.sample("y", dist.Normal(_tensor(0.0), 1.0))
    pyro.sample("z", dist.Normal(x.abs() + y, 0.3), obs=_tensor(3.0))


def single_precision() -> None:
    x, y = X.float(), BINARY.float()
    beta = pyro.sample("beta", dist.Normal(0.0, 2.5).expand([8]).to_event(1))
    with pyro.plate("data", 200):
        pyro.sample("y", dist.Bernoulli(logits=x @ beta), obs=y)


def walk() -> None:
    """A random walk observed with noise: 250 coordinates."""
    sigma = pyro.sample("sigma", dist.HalfNormal(_tensor(1.0)))
    steps = pyro.sample("steps", dist.Normal(_tensor(0.0), 1.0).expand([249]).to_event(1))
    path = pyro.deterministic("path", 0.3 * steps.cumsum(-1))
    with pyro.plate("data", 249):
        pyro.sample("y", dist.Normal(path, sigma), obs=_tensor(np.sin(np.arange(249) / 20)) + 0.3 * X.reshape(-1)[:249])


def badly_scaled() -> None:
    """Coefficients of predictors in very different units, flat priors."""
    scale = 10.0 ** torch.linspace(-4, 4, 8, dtype=torch.float64)
    beta = pyro.sample("beta", dist.ImproperUniform(dist.constraints.real_vector, (), (8,)))
    sigma = pyro.sample("sigma", dist.ImproperUniform(dist.constraints.positive, (), ()))
    with pyro.plate("data", 200):
        pyro.sample("y", dist.Normal((X * scale) @ beta, sigma), obs=REAL)


MODELS: dict[str, Callable[[], None]] = {
    model.__name__: model
    for model in (
        logistic, negative_binomial, student_t, horseshoe, centred, funnel, correlation, proportions, random_effects,
        two_modes, single_precision, walk, badly_scaled,
    )
}  # fmt: skip
