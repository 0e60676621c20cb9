"""Corrected covariances of mean-field guides: exact on Gaussian posteriors, and near elsewhere."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta

from pyro_elbo_ext import LinearResponse, fit, linear_response

X = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
X[:, 1] += X[:, 0]
Y = X.sum(1) + torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
OPTIONS: dict[str, Any] = {"progress": False, "seed": 0}


def regression() -> None:
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3, dtype=torch.float64), 2.0).to_event(1))
    pyro.deterministic("total", beta.sum(-1))
    with pyro.plate("data", 40):
        pyro.sample("y", dist.Normal(X @ beta, 1.0), obs=Y)


def posterior() -> tuple[np.ndarray, np.ndarray]:
    cov = torch.linalg.inv(X.T @ X + torch.eye(3, dtype=torch.float64) / 4)
    return (cov @ X.T @ Y).numpy(), cov.numpy()


def mean_field(loc: np.ndarray, sd: np.ndarray) -> Any:
    def guide() -> None:
        pyro.sample("beta", dist.Normal(torch.from_numpy(loc), torch.from_numpy(sd)).to_event(1))

    return guide


def test_exact_on_a_gaussian_posterior() -> None:
    mean, cov = posterior()
    guide = mean_field(mean, np.diag(np.linalg.inv(cov)) ** -0.5)
    before = torch.random.get_rng_state()
    found = linear_response(regression, guide, seed=0)
    assert isinstance(found, LinearResponse)
    assert torch.equal(before, torch.random.get_rng_state())
    np.testing.assert_allclose(found.covariance, cov, rtol=1e-4, atol=1e-7)
    assert list(found.table.index) == ["beta[0]", "beta[1]", "beta[2]", "total"]
    exact = [*np.sqrt(np.diag(cov)), math.sqrt(cov.sum())]
    np.testing.assert_allclose(found.table["sd_corrected"], exact, rtol=1e-3)
    np.testing.assert_allclose(found.table["mean"], [*mean, mean.sum()], atol=1e-4)
    assert (found.table["sd"][:3] < 0.9 * found.table["sd_corrected"][:3]).sum() >= 2
    assert found.coordinates == ["beta[0]", "beta[1]", "beta[2]"]
    assert found.moved < 0.2  # of 1000 draws
    assert "sd_corrected" in repr(found)


def test_positive_sites() -> None:
    """A scale and a mean, against quadrature: correlated through the data."""
    y = torch.tensor([0.3, -1.2, 2.0, 0.4, 1.1], dtype=torch.float64)

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        rate = pyro.sample("rate", dist.Gamma(3.0, 1.0))
        pyro.factor("together", -8.0 * (mu - rate.log()) ** 2)
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    mu, log_rate = np.meshgrid(np.linspace(-3, 4, 800), np.linspace(-3, 4, 800), indexing="ij")
    value = -0.5 * mu**2 - 0.5 * ((y.numpy() - mu[..., None]) ** 2).sum(-1)
    value += 3 * log_rate - np.exp(log_rate) - 8 * (mu - log_rate) ** 2
    weights = np.exp(value - value.max())
    weights /= weights.sum()
    sds = []
    for f in (mu, np.exp(log_rate)):
        mean = (weights * f).sum()
        sds.append(math.sqrt((weights * (f - mean) ** 2).sum()))
    guide = fit(model, "diagonal", **OPTIONS).guide
    table = linear_response(model, guide, seed=0).table
    assert table["sd"]["mu"] < 0.6 * sds[0]
    np.testing.assert_allclose(table["sd_corrected"][["mu", "rate"]], sds, rtol=0.1)


def test_refusals() -> None:
    mean, cov = posterior()
    with pytest.raises(ValueError, match="sds off the mean-field guide of greatest ELBO: train it for longer"):
        linear_response(regression, mean_field(mean + 1.0, np.sqrt(np.diag(cov))), seed=0)
    guide = AutoDelta(regression)
    guide()
    with pytest.raises(ValueError, match="point mass"):
        linear_response(regression, guide, seed=0)
    with pytest.raises(ValueError, match="num_draws must be at least 25"):
        linear_response(regression, mean_field(mean, np.sqrt(np.diag(cov))), num_draws=3)
