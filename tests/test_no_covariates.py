"""Latent sites without elements, as of a model without covariates: what Pyro trains is trained, at every way in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from torch import Tensor

from pyro_elbo_ext import (
    CompiledSVI,
    DecomposedELBO,
    ImportanceWeightedELBO,
    compare_to_mcmc,
    diagnose,
    evidence_bounds,
    fit,
    from_pyro_svi,
    psis_khat,
    run_nuts,
)

X = torch.empty(20, 0)
Y = torch.linspace(-1.0, 3.0, 20)


def model(x: Tensor, y: Tensor) -> None:
    intercept = pyro.sample("intercept", dist.Normal(0.0, 2.0))
    slopes = pyro.sample("slopes", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(intercept + x @ slopes, 1.0), obs=y)


def by_hand(x: Tensor, y: Tensor) -> None:
    loc = pyro.param("loc", lambda: torch.zeros(1 + x.shape[1]))
    pyro.sample("intercept", dist.Normal(loc[0], 0.5))
    pyro.sample("slopes", dist.Normal(loc[1:], 0.5).to_event(1))


def without_slopes(x: Tensor, y: Tensor) -> None:
    intercept = pyro.sample("intercept", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(intercept, 1.0), obs=y)


GUIDES: dict[str, Callable[[], Any]] = {
    "by hand": lambda: by_hand,
    "AutoNormal": lambda: AutoNormal(model),
    "AutoDiagonalNormal": lambda: AutoDiagonalNormal(model),
    "AutoMultivariateNormal": lambda: AutoMultivariateNormal(model),
}


def losses(make_guide: Callable[[], Any], elbo: Any, svi: Any = SVI) -> list[float]:
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    trained = svi(model, make_guide(), pyro.optim.Adam({"lr": 0.05}), elbo)
    return [trained.step(X, Y) for _ in range(3)]


@pytest.mark.parametrize("guide", GUIDES)
def test_losses_are_those_of_pyro(guide: str) -> None:
    make = GUIDES[guide]
    expected = losses(make, Trace_ELBO())
    assert losses(make, DecomposedELBO(kl="sampled")) == pytest.approx(expected, rel=1e-6)
    assert losses(make, ImportanceWeightedELBO(num_particles=1)) == pytest.approx(expected, rel=1e-6)
    assert losses(make, DecomposedELBO(gradient="doubly_reparameterized"))[:1] == pytest.approx(expected[:1], rel=1e-6)


def test_a_site_without_elements_has_no_kl() -> None:
    elbo = DecomposedELBO()
    losses(GUIDES["by hand"], elbo)
    assert elbo.last is not None
    assert elbo.last["slopes"].kl_method == "analytic"
    assert elbo.last["slopes"].kl_prior == 0


@pytest.mark.parametrize("gradient", ["pathwise", "doubly_reparameterized"])
@pytest.mark.parametrize("kind", [DecomposedELBO, ImportanceWeightedELBO])
def test_particles_in_one_run(kind: Any, gradient: str) -> None:
    options = {"num_particles": 4, "vectorize_particles": "vmap", "gradient": gradient}
    values = losses(GUIDES["AutoNormal"], kind(**options))
    assert np.isfinite(values).all()


def test_compiled_steps() -> None:
    for elbo in (DecomposedELBO(), DecomposedELBO(kl="sampled")):
        compiled = losses(GUIDES["AutoNormal"], elbo, CompiledSVI)
        assert np.isfinite(compiled).all()
        assert compiled[0] == pytest.approx(losses(GUIDES["AutoNormal"], type(elbo)(kl=elbo.kl))[0], rel=1e-6)


def test_every_other_way_in() -> None:
    """The intercept's posterior is that of the model without the site: N(mean, 1 / (20 + 1/4))."""
    exact_mean, exact_sd = float(Y.sum()) / 20.25, 20.25**-0.5
    pyro.set_rng_seed(0)
    result = fit(model, AutoNormal(model), X, Y, progress=False)
    guide = result.guide
    draws = result.draws(1000)
    assert abs(np.asarray(draws["intercept"]).mean() - exact_mean) < 0.2 * exact_sd
    assert draws["slopes"].shape == (1000, 0)
    assert diagnose(model, guide, X, Y, progress=False).verdict == "good"
    assert psis_khat(model, guide, X, Y).khat < 0.7
    bounds = evidence_bounds(model, guide, X, Y)
    exact = dist.MultivariateNormal(torch.zeros(20), torch.eye(20) + 4.0).log_prob(Y).item()
    assert bounds.log_evidence[0] - 0.01 < exact < bounds.log_evidence[1] + 0.01
    exported = from_pyro_svi(model, guide, X, Y, num_samples=100)
    assert exported["posterior"]["slopes"].shape == (1, 100, 0)
    chains = run_nuts(model, X, Y, num_samples=200, warmup=200, chains=2, progress=False)
    assert chains["posterior"]["slopes"].shape == (2, 200, 0)
    assert compare_to_mcmc(exported, chains) is not None


def test_automatic_guide() -> None:
    result = fit(model, "auto", X, Y, progress=False)
    assert result.draws(50)["slopes"].shape == (50, 0)


def test_empty_data_are_still_an_error() -> None:
    def guide(x: Tensor, y: Tensor) -> None:
        pyro.sample("intercept", dist.Normal(0.0, 1.0))

    def observes_nothing(x: Tensor, y: Tensor) -> None:
        intercept = pyro.sample("intercept", dist.Normal(0.0, 2.0))
        pyro.sample("y", dist.Normal(intercept.expand([0]), 1.0).to_event(1), obs=y)

    with pytest.raises(ValueError, match="plate 'rows': size cannot be zero"):
        DecomposedELBO().loss(without_slopes, guide, X[:0], Y[:0])
    with pytest.raises(ValueError, match="site 'y' is empty"):
        DecomposedELBO().loss(observes_nothing, guide, X, Y[:0])
    with pytest.raises(ValueError, match="argument 1 is empty"):
        fit(model, by_hand, X, Y[:0])
