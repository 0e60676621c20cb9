"""NUTS with chains that start at draws of a fit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_elbo_ext import fit, run_nuts
from pyro_elbo_ext.density import LogDensity
from pyro_elbo_ext.mcmc.starts import DRAWS, draws_of

Y = torch.tensor([1.0, 2.0, 4.0])
OPTIONS: dict[str, Any] = {"progress": False, "seed": 0}


def conjugate(y: torch.Tensor) -> None:
    """Posterior of mu: Normal(sum(y) / 4, 1/2)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def dependent() -> None:
    top = pyro.sample("top", dist.Gamma(5.0, 2.0))
    pyro.sample("below", dist.Uniform(0.0, top))
    pyro.sample("share", dist.Dirichlet(torch.ones(3)))


def imputed() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", 3):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=Y, obs_mask=torch.tensor([True, False, True]))


@pytest.mark.parametrize("backend", ["pyro", "nutpie"])
def test_posterior_is_that_of_the_model(backend: Any) -> None:
    if backend == "nutpie":
        pytest.importorskip("nutpie")
    result = fit(conjugate, "auto", Y, **OPTIONS)
    data = run_nuts(conjugate, Y, start=result, num_samples=300, chains=2, backend=backend, compile=False, **OPTIONS)
    mu = data.posterior["mu"].values
    assert data.posterior.attrs["tuning_steps"] == 200
    # effective size at least a fifth of 600: five standard errors
    assert abs(mu.mean() - 7 / 4) < 5 * 0.5 / math.sqrt(120)
    assert abs(math.log(mu.std() / 0.5)) < 5 / math.sqrt(2 * 120)
    again = run_nuts(conjugate, Y, start=result, num_samples=300, chains=2, backend=backend, compile=False, **OPTIONS)
    np.testing.assert_array_equal(mu, again.posterior["mu"].values)


def test_a_wrong_guide_costs_warmup_only() -> None:
    """It is 8 sds off."""
    guide = AutoNormal(conjugate, init_loc_fn=lambda site: torch.tensor(-2.25))
    pyro.clear_param_store()
    result = fit(conjugate, guide, Y, num_steps=1, optim=pyro.optim.Adam({"lr": 1e-6}), **OPTIONS)
    data = run_nuts(conjugate, Y, start=result, num_samples=300, chains=2, backend="pyro", compile=False, **OPTIONS)
    assert abs(data.posterior["mu"].values.mean() - 7 / 4) < 5 * 0.5 / math.sqrt(120)


def test_points_are_the_draws_of_the_guide() -> None:
    """Of an automatic guide in its own coordinates; of others site by site, dependent supports included."""
    automatic = fit(imputed, "auto", **OPTIONS)
    density = LogDensity(imputed, (), {}, 0)
    np.testing.assert_array_equal(draws_of(automatic, density, 3), automatic.unconstrained_draws(DRAWS, seed=3))
    own = LogDensity(dependent, (), {}, 0)

    def guide() -> None:
        top = pyro.sample("top", dist.Gamma(5.0, 2.0))
        pyro.sample("below", dist.Uniform(0.0, top))
        pyro.sample("share", dist.Dirichlet(torch.ones(3)))

    class Result:
        def draws(self, count: int, *, seed: int) -> dict[str, torch.Tensor]:
            pyro.set_rng_seed(seed)
            traces = [pyro.poutine.trace(guide).get_trace() for _ in range(count)]
            return {name: torch.stack([t.nodes[name]["value"] for t in traces]) for name in ("top", "below", "share")}

    points = draws_of(Result(), own, 1)
    expected = Result().draws(DRAWS, seed=1)
    for name, value in own.constrain(points).items():
        np.testing.assert_allclose(value, expected[name][: len(points)].numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("start", "error", "message"),
    [
        (3.0, TypeError, "start must be a result of fit, which has draws, got float"),
        ({"mu": torch.zeros(10)}, TypeError, "start must be a result of fit"),
    ],
)
def test_what_is_no_fit(start: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run_nuts(conjugate, Y, start=start, num_samples=5, compile=False, **OPTIONS)


def test_a_fit_of_another_model() -> None:
    result = fit(dependent_free, "auto", **OPTIONS)
    with pytest.raises(ValueError, match=r"start has no draws of the sites \['mu'\] of the model"):
        run_nuts(conjugate, Y, start=result, num_samples=5, compile=False, **OPTIONS)


def dependent_free() -> None:
    pyro.sample("nu", dist.Normal(0.0, 1.0))
