"""`fit` with ``accuracy``: rungs, centring in part, and what it says of draws that are not as near as was asked for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch.distributions import constraints

from pyro_elbo_ext import FitResult, fit
from pyro_elbo_ext.automatic.approximate import approximate
from pyro_elbo_ext.automatic.centering import centred_in_part, centredness
from pyro_elbo_ext.automatic.gaussian import Gaussian
from pyro_elbo_ext.density import LogDensity
from pyro_elbo_ext.inference_data.export import dataset_of
from pyro_elbo_ext.training.automatic_fit import AutomaticFit
from tests.models import SIGMA, Y, schools

OPTIONS: dict[str, Any] = {"progress": False, "seed": 0}
ERRORS = torch.tensor([0.1, 1.0, 3.0, 20.0], dtype=torch.float64)


def effects() -> None:
    """Gaussian: prior scale 2, data of which the first say all and the last nothing."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=torch.float64), 5.0))
    pyro.sample("apart", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
    with pyro.plate("groups", 4):
        x = pyro.sample("x", dist.Normal(mu, 2.0))
        pyro.sample("y", dist.Normal(x, ERRORS), obs=torch.ones(4, dtype=torch.float64))


def funnel() -> None:
    """Normalized: its evidence is 1."""
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("plate", 9):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


def line(x: Tensor) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=2 * x)


def two_modes() -> None:
    """Of weights 0.7 and 0.3, eight sds apart."""
    x = pyro.sample("x", dist.ImproperUniform(constraints.real, (), ()))
    one, other = dist.Normal(-4.0, 1.0).log_prob(x) + math.log(0.7), dist.Normal(4.0, 0.5).log_prob(x) + math.log(0.3)
    pyro.factor("modes", torch.logaddexp(one, other))


def spike_and_slab() -> None:
    """Thirty-two modes that touch each other."""
    x = pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (5,)))
    pyro.factor("modes", torch.logaddexp(dist.Normal(0.0, 2.0).log_prob(x), dist.Normal(2.0, 0.1).log_prob(x)).sum(-1))


def test_centredness_is_the_share_of_the_data() -> None:
    density = LogDensity(effects, (), {}, 0)
    found = approximate(density, seed=0)
    shares = centredness(density, found.guide.gaussian)  # type: ignore[attr-defined]
    assert list(shares) == ["x"]  # the others hang on nothing
    exact = 4 / (4 + ERRORS**2)
    torch.testing.assert_close(shares["x"], torch.where(exact < 0.05, 0.0, exact), rtol=1e-4, atol=1e-5)
    diagonal = Gaussian(np.zeros(7), np.full(7, 2.0))
    assert bool((centredness(density, diagonal)["x"] == 0).all())


def test_centred_in_part_is_the_same_model() -> None:
    """At the same values of the sites, up to the Jacobian of the other coordinates; evidence and moments are the same."""
    whole = LogDensity(effects, (), {}, 0)
    shares = {"x": torch.tensor([1.0, 0.7, 0.2, 0.0], dtype=torch.float64)}
    part = LogDensity(centred_in_part(effects, shares), (), {}, 0)
    assert set(part.layout) == {"mu", "apart", "x_decentered"}
    a, b = approximate(whole, seed=0), approximate(part, seed=0)
    assert a.elbo == pytest.approx(b.elbo, abs=1e-6)  # both are exact: the evidence
    u = b.guide.get_posterior().sample((2000,)).numpy()
    values = part.constrain(u)
    points = np.stack([whole.unconstrain({k: values[k][i] for k in ("mu", "apart", "x")}).numpy() for i in range(5)])
    jacobian = float(((1 - shares["x"]) * math.log(2.0)).sum())
    np.testing.assert_allclose(
        part.value_and_grad(u[:5])[0], whole.value_and_grad(points)[0] + jacobian, rtol=1e-9, atol=1e-9
    )


def test_funnel_is_exact_in_other_coordinates() -> None:
    """Without data no element is centred, and the density is Gaussian."""
    result = fit(funnel, "auto", accuracy=0.1, **OPTIONS)
    assert isinstance(result, AutomaticFit)
    assert [rung.rung for rung in result.rungs] == ["gaussian", "gaussian, centred in part"]
    assert result.accurate is True
    assert result.chains is None
    assert result.elbo == pytest.approx(0.0, abs=1e-6)
    draws = result.draws(20_000, seed=1)
    assert abs(float(draws["v"].std()) / 3 - 1) < 5 / math.sqrt(2 * 20_000) + 0.01
    torch.testing.assert_close(draws["x"], draws["x_decentered"] * (draws["v"][:, None] / 2).exp())
    assert "gaussian, centred in part" in repr(result)


def test_one_rung_where_that_is_enough() -> None:
    x = torch.linspace(-1, 1, 20)
    result = fit(line, "auto", x, accuracy=0.1, **OPTIONS)
    assert isinstance(result, AutomaticFit)
    (rung,) = result.rungs
    assert (rung.rung, rung.enough, rung.elbo) == ("gaussian", True, result.elbo)
    plain = fit(line, "auto", x, **OPTIONS)
    assert isinstance(plain, AutomaticFit)
    assert plain.rungs == []
    assert plain.accurate is None
    assert torch.equal(plain.draws(5, seed=0)["slope"], result.draws(5, seed=0)["slope"])


def test_chains_are_the_draws(tmp_path: Path) -> None:
    """Eight schools centred, against quadrature over log tau."""
    result = fit(schools, "auto", Y, SIGMA, accuracy=0.1, **OPTIONS)
    assert isinstance(result, AutomaticFit)
    assert [rung.rung for rung in result.rungs] == ["gaussian", "gaussian, centred in part", "nuts"]
    assert result.accurate is True
    mean, sd = _tau_by_quadrature()
    draws = result.draws(4000, seed=1)
    assert set(draws) >= {"mu", "tau", "theta"}
    assert draws["theta"].shape == (4000, 8)
    assert abs(float(draws["tau"].mean()) - mean) < 0.1 * sd
    assert abs(math.log(float(draws["tau"].std()) / sd)) < 0.1
    assert result.to_arviz() is result.chains
    with pytest.raises(TypeError, match="to_arviz takes no num_samples"):
        result.to_arviz(num_samples=5)
    result.save(tmp_path / "fit.pt")
    loaded = FitResult.load(tmp_path / "fit.pt", result.model, "auto", Y, SIGMA)
    assert isinstance(loaded, AutomaticFit)
    assert repr(loaded.rungs) == repr(result.rungs)  # which has NaN
    assert torch.equal(loaded.draws(7, seed=2)["tau"], result.draws(7, seed=2)["tau"])
    assert set(dataset_of(loaded.chains, "sample_stats")) == set(dataset_of(result.chains, "sample_stats"))


def _tau_by_quadrature() -> tuple[float, float]:
    log_tau = np.linspace(-12, 8, 20_001)
    tau, y, sigma = np.exp(log_tau), Y.numpy()[:, None], SIGMA.numpy()[:, None]
    variance = tau**2 + sigma**2
    precision = (1 / variance).sum(0) + 1 / 25
    mean = (y / variance).sum(0) / precision
    value = -0.5 * np.log(variance).sum(0) - 0.5 * (y**2 / variance).sum(0) + 0.5 * precision * mean**2
    value += -0.5 * np.log(precision) - np.log1p((tau / 5) ** 2) + log_tau
    weights = np.exp(value - value.max())
    weights /= weights.sum()
    mean_tau = float(weights @ tau)
    return mean_tau, math.sqrt(float(weights @ (tau - mean_tau) ** 2))


@pytest.mark.parametrize("seed", [0, 1])
def test_modes_have_their_weights(seed: int) -> None:
    result = fit(two_modes, "auto", accuracy=0.1, progress=False, seed=seed)
    assert isinstance(result, AutomaticFit)
    assert result.accurate is True
    assert "chains in each of 2 modes" in result.rungs[-1].says
    x = result.draws(20_000, seed=1)["x"]
    mean, sd = -1.6, math.sqrt(0.7 * 17 + 0.3 * 16.25 - 1.6**2)
    assert abs(float(x.mean()) - mean) < 0.1 * sd
    assert abs(math.log(float(x.std()) / sd)) < 0.1
    posterior = dataset_of(result.to_arviz())
    in_each = (posterior["x"] > 0).mean("draw")  # each chain has both, by their weights
    np.testing.assert_allclose(in_each, 0.3, atol=0.03)


def test_tails_that_draws_do_not_tell() -> None:
    """Student's t with 3 degrees of freedom has an sd, whose estimate from draws has none."""

    def heavy() -> None:
        pyro.sample("x", dist.StudentT(torch.tensor(3.0)))

    result = fit(heavy, "auto", accuracy=0.1, **OPTIONS)
    assert isinstance(result, AutomaticFit)
    nuts = next(rung for rung in result.rungs if rung.rung == "nuts")
    assert not nuts.enough
    assert "tails" in nuts.says
    sd = float(result.draws(50_000, seed=1)["x"].std())
    assert not result.accurate or abs(math.log(sd / math.sqrt(3))) < 0.15


def test_modes_without_weights_are_not_called_enough() -> None:
    result = fit(spike_and_slab, "auto", accuracy=0.1, **OPTIONS)
    assert isinstance(result, AutomaticFit)
    x = result.draws(20_000, seed=1)["x"]
    sd = math.sqrt(0.5 * 4 + 0.5 * 4.01 - 1)
    right = bool(((x.mean(0) - 1).abs() < 0.1 * sd).all() and ((x.std(0) / sd).log().abs() < 0.1).all())
    assert result.accurate is False or right
    assert "modes" in repr(result)


@pytest.mark.parametrize(
    ("guide", "accuracy", "error", "message"),
    [
        ("auto", 0.0, ValueError, "accuracy must be between 0 and 1"),
        ("auto", "high", TypeError, "accuracy must be a number"),
        ("flow", 0.1, TypeError, "accuracy goes with guide='auto'"),
        (AutoNormal(funnel), 0.1, TypeError, "accuracy goes with guide='auto'"),
    ],
)
def test_bad_accuracy(guide: Any, accuracy: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fit(funnel, guide, accuracy=accuracy, **OPTIONS)
