"""With kl='sampled', values and gradients equal ``Trace_ELBO``'s under the same seed, whatever the program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGaussian,
    AutoGuideList,
    AutoHierarchicalNormalMessenger,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    AutoRegressiveMessenger,
    AutoStructured,
)

from pyro_elbo_ext import DecomposedELBO
from pyro_elbo_ext.terms.kl import KLChoice
from tests.models import Regression, autoencoder, eight_schools, nested_plates, vectors
from tests.oracles import PROBLEMS, Problem

AUTOGUIDES = [
    AutoDelta,
    AutoNormal,
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    AutoLowRankMultivariateNormal,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoStructured,
    AutoGaussian,
    AutoNormalMessenger,
    AutoHierarchicalNormalMessenger,
    AutoRegressiveMessenger,
]


def evaluate(
    objective: Any, model: Callable[..., Any], guide: Callable[..., Any], parameters: list[torch.Tensor], *args: Any
) -> tuple[float, list[torch.Tensor | None]]:
    for parameter in parameters:
        parameter.grad = None
    pyro.set_rng_seed(1)
    loss = objective.loss_and_grads(model, guide, *args)
    return loss, [parameter.grad for parameter in parameters]


def assert_same(model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **options: Any) -> DecomposedELBO:
    """Compare value and gradients, with all parameters made beforehand."""
    Trace_ELBO().loss(model, guide, *args)
    parameters = list(pyro.get_param_store()._params.values())
    expected_loss, expected = evaluate(Trace_ELBO(**options), model, guide, parameters, *args)
    elbo = DecomposedELBO(kl="sampled", **options)
    loss, gradients = evaluate(elbo, model, guide, parameters, *args)
    assert loss == pytest.approx(expected_loss, rel=2e-6, abs=1e-5)
    for name, ours, theirs in zip(pyro.get_param_store()._params, gradients, expected, strict=True):
        if theirs is None or ours is None:
            assert theirs is None or not theirs.any(), name
            assert ours is None or not ours.any(), name
        else:
            torch.testing.assert_close(
                ours, theirs, rtol=2e-5, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
    assert elbo.last is not None
    assert elbo.last.elbo == pytest.approx(-loss, rel=1e-5, abs=1e-4)
    assert elbo.last.log_weights.mean().item() == pytest.approx(-loss, rel=1e-5, abs=1e-4)
    return elbo


@pytest.mark.parametrize("problem", [p for p in PROBLEMS if "auxiliary" not in p.name], ids=str)
@pytest.mark.parametrize("num_particles", [1, 3])
def test_hand_written_guides(problem: Problem, num_particles: int) -> None:
    assert_same(problem.model, problem.guide, num_particles=num_particles)


@pytest.mark.parametrize("autoguide", AUTOGUIDES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("model", [eight_schools, nested_plates, vectors], ids=lambda fn: fn.__name__)
def test_autoguides(model: Callable[[], None], autoguide: Any) -> None:
    if model is nested_plates and autoguide is AutoGaussian:
        model = eight_schools  # AutoGaussian reads dependencies by a run in which a random mask is not one draw
    assert_same(model, autoguide(model))


def test_autoguide_list() -> None:
    guide = AutoGuideList(eight_schools)
    guide.append(AutoNormal(poutine.block(eight_schools, expose=["mu", "tau"])))
    guide.append(AutoDiagonalNormal(poutine.block(eight_schools, expose=["z"])))
    assert_same(eight_schools, guide)


@pytest.mark.parametrize(
    "problem", [p for p in PROBLEMS if p.name in ("gaussian", "lognormal", "nonreparameterized")], ids=str
)
def test_vectorized_particles(problem: Problem) -> None:
    assert_same(problem.model, problem.guide, num_particles=4, vectorize_particles=True, max_plate_nesting=0)


def test_vectorized_particles_in_plates_with_autoguide() -> None:
    guide = AutoNormal(eight_schools)
    elbo = assert_same(eight_schools, guide, num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    assert elbo.last is not None
    assert elbo.last["z"].log_p is not None
    assert elbo.last["z"].log_p.shape == (5, 8)
    assert elbo.last["z"].plates == ("schools",)
    assert elbo.last.log_weights.shape == (5,)


def test_amortized_guide_with_modules() -> None:
    model, guide = autoencoder()

    elbo = assert_same(model, guide, torch.ones(7, 6))
    assert elbo.history is not None
    frame = elbo.history.to_dataframe()
    assert set(frame.site) == {"z", "x"}


def test_pyro_module_with_samples() -> None:

    model = Regression()
    assert_same(model, AutoNormal(model), torch.randn(5, 3), torch.randn(5))


def test_flow_guide() -> None:
    flow = dist.transforms.spline_autoregressive(2, count_bins=4)

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(), 1.0), obs=torch.tensor(1.0))

    def guide() -> None:
        pyro.module("flow", flow)
        pyro.sample("z", dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [flow]))

    assert_same(model, guide)


def test_factor_in_guide() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", -z.square())

    def guide() -> None:
        z = pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 1.0))
        pyro.factor("g", 0.3 * z, has_rsample=True)

    elbo = assert_same(model, guide)
    assert elbo.last is not None
    assert {name: term.kind for name, term in elbo.last.items()} == {"z": "latent", "f": "observed", "g": "auxiliary"}


@pytest.mark.parametrize("kl", ["auto", "sampled"])
def test_svi_trains_as_with_trace_elbo(kl: KLChoice) -> None:
    def fit(objective: Any) -> dict[str, torch.Tensor]:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AutoNormal(eight_schools)
        svi = SVI(eight_schools, guide, pyro.optim.Adam({"lr": 0.02}), objective)
        for _ in range(30 if kl == "sampled" else 600):
            svi.step()
        return guide.median()

    expected, ours = fit(Trace_ELBO()), fit(DecomposedELBO(kl=kl))
    for name, value in expected.items():
        tolerance = 1e-4 if kl == "sampled" else 0.6  # different noise: only the neighbourhood of the optimum is shared
        torch.testing.assert_close(ours[name], value, rtol=0, atol=tolerance)
