"""Models with conjugate priors, their evidence, exact draws of their posteriors, guides at a known distance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import kl_divergence


@dataclass(frozen=True)
class Conjugate:
    """``guides`` has for each name the guide and its exact ``KL(q || posterior)`` and ``KL(q || prior)``."""

    model: Callable[[], None]
    log_evidence: float
    posterior: Callable[[int], dict[str, Tensor]]
    guides: dict[str, tuple[Callable[[], object], float, float]]


def _with(
    model: Callable[[], None], site: str, log_evidence: float, before: Any, after: Any, /, **guides: Any
) -> Conjugate:
    def program(q: Any) -> Callable[[], object]:
        return lambda: pyro.sample(site, q)

    return Conjugate(
        model,
        log_evidence,
        lambda count: {site: after.sample((count,))},
        {
            name: (program(q), float(kl_divergence(q, after)), float(kl_divergence(q, before)))
            for name, q in guides.items()
        },
    )


def _gaussian_model() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 0.5), obs=torch.tensor(10.0))


# log Normal(10; 0, variance 1.25)
GAUSSIAN = _with(
    _gaussian_model,
    "z",
    -41.03051,
    dist.Normal(0.0, 1.0),
    dist.Normal(8.0, math.sqrt(0.2)),
    exact=dist.Normal(8.0, math.sqrt(0.2)),
    close=dist.Normal(8.05, 0.42),
    narrow=dist.Normal(8.0, 0.3),
    very_narrow=dist.Normal(8.0, 0.1),
    wide=dist.Normal(8.0, 1.0),
    shifted=dist.Normal(7.0, math.sqrt(0.2)),
    far=dist.Normal(5.0, 0.3),
    prior=dist.Normal(0.0, 1.0),
)


def _beta_model() -> None:
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    pyro.sample("heads", dist.Binomial(10, p), obs=torch.tensor(2.0))


BETA = _with(
    _beta_model,
    "p",
    -math.log(11),
    dist.Beta(1.0, 1.0),
    dist.Beta(3.0, 9.0),
    exact=dist.Beta(3.0, 9.0),
    prior=dist.Beta(1.0, 1.0),
    narrow=dist.Beta(6.0, 18.0),
    wrong=dist.Beta(6.0, 2.0),
)

_generator = torch.Generator().manual_seed(3)
_X = torch.randn(20, 2, generator=_generator) @ torch.tensor([[1.0, 0.8], [0.0, 0.6]])
_Y = _X @ torch.tensor([1.0, -0.5]) + 0.7 * torch.randn(20, generator=_generator)
_NOISE = 0.7


def _regression_model() -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(_Y)):
        pyro.sample("y", dist.Normal(_X @ w, _NOISE), obs=_Y)


_precision = torch.eye(2) + _X.T @ _X / _NOISE**2
_covariance = torch.linalg.inv(_precision)
_mean = _covariance @ _X.T @ _Y / _NOISE**2
_evidence = dist.MultivariateNormal(
    torch.zeros(20).double(), _X.double() @ _X.double().T + _NOISE**2 * torch.eye(20).double()
).log_prob(_Y.double())


def _normal(mean: Tensor, covariance: Tensor) -> dist.MultivariateNormal:
    return dist.MultivariateNormal(mean, covariance)


REGRESSION = _with(
    _regression_model,
    "w",
    float(_evidence),
    _normal(torch.zeros(2), torch.eye(2)),
    _normal(_mean, _covariance),
    exact=_normal(_mean, _covariance),
    mean_field=_normal(_mean, torch.diag(1 / _precision.diagonal())),
    shifted=_normal(_mean + 0.15, 1.5 * _covariance),
    prior=_normal(torch.zeros(2), torch.eye(2)),
)

PROBLEMS = {"gaussian": GAUSSIAN, "beta": BETA, "regression": REGRESSION}
