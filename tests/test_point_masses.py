"""A guide that is a point has no posterior: every way in says so, through every wrapper of a Delta."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
)
from pyro.nn import PyroModule, PyroSample
from torch.distributions.transforms import AffineTransform, ExpTransform

from pyro_elbo_ext import diagnose, evidence_bounds, fit, from_pyro_svi, psis_khat

X, Y = torch.linspace(-1, 1, 5), torch.tensor([-0.9, -0.3, 0.2, 0.6, 1.1])
SENTENCE = "the guide has no density: at 'w' it is a point mass"


def model(x: torch.Tensor, y: torch.Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w[0] + w[1] * x, 1.0), obs=y)


def v() -> torch.Tensor:
    return pyro.param("v", torch.tensor([0.1, 0.2]))


def drawn(fn: Callable[[], Any]) -> Callable[..., None]:
    def guide(*args: Any) -> None:
        pyro.sample("w", fn())

    return guide


def beside_noise(*args: Any) -> None:
    """As many dimensions as the model has, but none of them reaches w."""
    pyro.sample("noise", dist.Normal(torch.zeros(2), 1.0).to_event(1), infer={"is_auxiliary": True})
    pyro.sample("w", dist.Delta(v()).to_event(1))


class PointModule(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.w = PyroSample(lambda self: dist.Delta(v()).to_event(1))

    def forward(self, *args: Any) -> torch.Tensor:
        return self.w


POINTS: dict[str, Callable[[], Any]] = {
    "event_dim": lambda: drawn(lambda: dist.Delta(v(), event_dim=1)),
    "to_event": lambda: drawn(lambda: dist.Delta(v()).to_event(1)),
    "expanded": lambda: drawn(lambda: dist.Delta(v().sum()).expand([2]).to_event(1)),
    "masked": lambda: drawn(lambda: dist.Delta(v()).to_event(1).mask(torch.tensor(True))),
    "mask inside": lambda: drawn(lambda: dist.Delta(v()).mask(torch.ones(2, dtype=torch.bool)).to_event(1)),
    "transformed": lambda: drawn(
        lambda: dist.TransformedDistribution(dist.Delta(v()).to_event(1), [AffineTransform(0.0, 2.0, event_dim=1)])
    ),
    "transformed inside": lambda: drawn(
        lambda: dist.TransformedDistribution(dist.Delta(v()), [ExpTransform()]).to_event(1)
    ),
    "masked mixture": lambda: drawn(
        lambda: dist.MaskedMixture(torch.tensor([True, False]), dist.Delta(v()), dist.Delta(2 * v())).to_event(1)
    ),
    "mixture with a density": lambda: drawn(
        lambda: dist.MaskedMixture(torch.tensor([True, False]), dist.Normal(v(), 0.3), dist.Delta(v())).to_event(1)
    ),
    "beside noise": lambda: beside_noise,
    "PyroSample": PointModule,
    "AutoDelta": lambda: AutoDelta(model),
    "AutoLaplaceApproximation": lambda: AutoLaplaceApproximation(model),
}

REFUSE = {
    "psis_khat": lambda guide: psis_khat(model, guide, X, Y, num_draws=50),
    "evidence_bounds": lambda guide: evidence_bounds(model, guide, X, Y, num_draws=50),
    "diagnose": lambda guide: diagnose(model, guide, X, Y, num_draws=100, progress=False),
}


@pytest.mark.parametrize("way", REFUSE)
@pytest.mark.parametrize("name", POINTS)
def test_nothing_is_certified(name: str, way: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)^{SENTENCE}.*AutoNormal.*laplace_approximation"):
        REFUSE[way](POINTS[name]())


@pytest.mark.parametrize("name", POINTS)
def test_export_warns_and_marks(name: str) -> None:
    with pytest.warns(UserWarning, match=SENTENCE):
        data = from_pyro_svi(model, POINTS[name](), X, Y, num_samples=3)
    assert data["posterior"].attrs["point_estimates"] == "w"
    spread = data["posterior"]["w"].std("draw")
    assert spread.min() == 0
    assert (spread.max() == 0) == (name != "mixture with a density")


@pytest.mark.parametrize("name", ["to_event", "AutoDelta", "AutoLaplaceApproximation"])
def test_fit_says_so(name: str, tmp_path: Any) -> None:
    result = fit(model, POINTS[name](), X, Y, num_steps=3, compiled=False, progress=False)
    assert result.point_sites == ("w",)
    assert "no ELBO and no bound on log p(x)" in repr(result)
    assert "\n  ELBO" not in repr(result)
    with pytest.warns(UserWarning, match=SENTENCE):
        assert result.draws(4)["w"].std(0).max() == 0
    with pytest.raises(ValueError, match=SENTENCE):
        result.diagnose(num_draws=100, progress=False)


def test_part_of_a_guide() -> None:
    def pair(x: torch.Tensor, y: torch.Tensor) -> None:
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mu, sigma), obs=y)

    def half(x: torch.Tensor, y: torch.Tensor) -> None:
        pyro.sample("mu", dist.Normal(pyro.param("mu_loc", torch.tensor(0.0)), 0.3))
        pyro.sample("sigma", dist.Delta(pyro.param("s", torch.tensor(1.0))))

    with pytest.raises(ValueError, match=r"^the guide has no density: at 'sigma' it is a point mass"):
        psis_khat(pair, half, X, Y, num_draws=50)
    result = fit(pair, half, X, Y, num_steps=2, compiled=False, progress=False)
    assert result.point_sites == ("sigma",)


def through_a_scale(*args: Any) -> None:
    u = pyro.sample("u", dist.Normal(v(), 0.3).to_event(1), infer={"is_auxiliary": True})
    pyro.sample("w", dist.Delta(2 * u, log_density=-2 * torch.tensor(2.0).log(), event_dim=1))


DRAWN: dict[str, Callable[[], Any]] = {
    "AutoNormal": lambda: AutoNormal(model),
    "AutoDiagonalNormal": lambda: AutoDiagonalNormal(model),
    "AutoMultivariateNormal": lambda: AutoMultivariateNormal(model),
    "AutoIAFNormal": lambda: AutoIAFNormal(model, hidden_dim=[4], num_transforms=1),
    "AutoStructured": lambda: AutoStructured(model, conditionals="mvn", dependencies="linear"),
    "by hand": lambda: through_a_scale,
    "a normal that is wrapped": lambda: drawn(lambda: dist.Normal(v(), 0.3).to_event(1).mask(torch.tensor(True))),
}


@pytest.mark.parametrize("name", DRAWN)
def test_a_draw_behind_a_delta_is_no_point(name: str) -> None:
    pyro.set_rng_seed(0)  # the second run of the guide must not repeat the first
    guide = DRAWN[name]()
    sample = psis_khat(model, guide, X, Y, num_draws=50)
    assert sample.draws["w"].std(0).min() > 0
    result = fit(model, guide, X, Y, num_steps=2, compiled=False, progress=False)
    assert result.point_sites == ()
    assert "\n  ELBO" in repr(result)


def test_the_advice_works() -> None:
    guide = AutoLaplaceApproximation(model)
    fit(model, guide, X, Y, num_steps=300, compiled=False, progress=False)
    sample = psis_khat(model, guide.laplace_approximation(X, Y), X, Y, num_draws=200, seed=0)
    assert sample.ess > 100
