"""`fit` with a guide that it makes itself."""

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

from pyro_elbo_ext import Callback, FitResult, compiled_log_density, fit
from pyro_elbo_ext.training.automatic_fit import AutomaticFit

X = torch.linspace(-1, 1, 40, dtype=torch.float64)
Y = 0.5 + 2 * X + 0.3 * torch.sin(40 * X)


def line(x: Tensor, y: Tensor) -> None:
    """Conjugate: the posterior is a Gaussian."""
    b = pyro.sample("b", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
    mean = pyro.deterministic("mean", b[0] + b[1] * x)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def exact() -> tuple[Tensor, Tensor, float]:
    """Mean and covariance of the posterior, and log p(y)."""
    design = torch.stack([torch.ones_like(X), X], -1)
    covariance = torch.linalg.inv(torch.eye(2, dtype=X.dtype) + design.T @ design / 0.25)
    marginal = torch.distributions.MultivariateNormal(
        torch.zeros_like(X), design @ design.T + 0.25 * torch.eye(len(X), dtype=X.dtype)
    )
    return covariance @ design.T @ Y / 0.25, covariance, float(marginal.log_prob(Y))


@pytest.fixture(scope="module")
def fitted() -> AutomaticFit:
    result = fit(line, "auto", X, Y, progress=False, seed=0)
    assert isinstance(result, AutomaticFit)
    return result


def test_exact_where_the_posterior_is_gaussian(fitted: AutomaticFit) -> None:
    mean, covariance, evidence = exact()
    guide = fitted.approximation.guide
    np.testing.assert_allclose(guide.loc.detach(), mean, atol=1e-5)
    factor = guide.scale_tril.detach()
    np.testing.assert_allclose(factor @ factor.T, covariance, atol=1e-6)
    assert fitted.elbo == pytest.approx(evidence, abs=1e-5)
    assert fitted.converged
    assert fitted.num_steps == len(fitted.path)


def test_is_the_default() -> None:
    assert isinstance(fit(lambda: line(X, Y), progress=False, seed=0), AutomaticFit)


def test_draws_are_those_of_the_posterior(fitted: AutomaticFit) -> None:
    draws = fitted.draws(20_000, seed=1)
    assert {name: tuple(value.shape) for name, value in draws.items()} == {"b": (20_000, 2), "mean": (20_000, 40)}
    mean, covariance, _ = exact()
    sds = covariance.diagonal().sqrt()
    assert bool(((draws["b"].mean(0) - mean).abs() < 4 * sds / math.sqrt(20_000)).all())
    assert torch.equal(fitted.draws(10, seed=1)["b"], fitted.draws(10, seed=1)["b"])
    with pytest.raises(ValueError, match="at least 1"):
        fitted.draws(0)


def test_account_history_and_verdict(fitted: AutomaticFit) -> None:
    assert "gradient evaluations" in repr(fitted)
    assert "stopped: converged" in repr(fitted)
    table = fitted.summary()
    # the terms are of 32 draws each, the ELBO of all of them has no noise where the guide is the posterior
    assert table.loc["ELBO", "mean"] == pytest.approx(fitted.elbo, abs=4 * table.loc["ELBO", "se"] + 1e-6)
    assert fitted.diagnose(seed=0).verdict == "good"
    pyplot = pytest.importorskip("matplotlib.pyplot")
    assert len(fitted.plot()) == 2
    pyplot.close("all")


def test_guide_goes_on_in_the_loop(fitted: AutomaticFit) -> None:
    """The guide is a Pyro guide like any other: trained on, it stays where it is."""
    before = fitted.approximation.guide.loc.detach().clone()
    fit(
        line,
        fitted.guide,
        X,
        Y,
        num_steps=20,
        optim=pyro.optim.Adam({"lr": 1e-4}),
        compiled=False,
        progress=False,
        seed=0,
    )
    assert not torch.equal(before, fitted.approximation.guide.loc)
    assert bool(((before - fitted.approximation.guide.loc).abs() < 0.01).all())


def test_log_density_is_taken_too() -> None:
    density = compiled_log_density(line, X, Y)
    result = fit(density, "auto", progress=False, seed=0)
    assert result.elbo == pytest.approx(exact()[2], abs=1e-5)
    with pytest.raises(TypeError, match="arguments already"):
        fit(density, "auto", X, Y, progress=False)


def test_flat_and_constrained_sites() -> None:
    def model() -> None:
        scale = pyro.sample("scale", dist.ImproperUniform(constraints.positive, (), ()))
        with pyro.plate("data", 200):
            pyro.sample("y", dist.Normal(0.0, scale), obs=torch.linspace(-2, 2, 200))

    result = fit(model, "auto", progress=False, seed=0)
    draws = result.draws(20_000, seed=0)["scale"]
    # scale**-2 has a Gamma posterior: n - 1 degrees of freedom with a flat prior on the scale
    n, squares = 200, float((torch.linspace(-2, 2, 200) ** 2).sum())
    precision = np.random.default_rng(0).gamma((n - 1) / 2, 2 / squares, 200_000)
    exact_scale = precision**-0.5
    assert abs(float(draws.mean()) - exact_scale.mean()) < 0.06 * exact_scale.std()
    assert abs(math.log(float(draws.std()) / exact_scale.std())) < 0.1


def test_same_seed_same_guide() -> None:
    first, second = (fit(line, "auto", X, Y, progress=False, seed=3).approximation.guide for _ in range(2))
    assert torch.equal(first.loc, second.loc)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    fit(line, "auto", X, Y, progress=False, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())


def test_callbacks_are_told() -> None:
    told: list[tuple[str, Any]] = []

    class Listener(Callback):
        def start(self, settings: Any) -> None:
            told.append(("start", settings["guide"]))

        def log(self, step: int, metrics: Any) -> None:
            told.append(("log", metrics["elbo"]))

        def finish(self, summary: Any) -> None:
            told.append(("finish", summary["status"]))

    result = fit(line, "auto", X, Y, progress=False, seed=0, callbacks=[Listener()])
    assert [name for name, _ in told] == ["start", *["log"] * result.num_steps, "finish"]
    assert told[-1] == ("finish", "finished")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"guide": "best"}, ValueError, "'auto', 'gaussian', 'diagonal', 'flow', not 'best'"),
        ({"optim": pyro.optim.Adam({"lr": 0.1})}, TypeError, "takes no optim"),
        ({"num_steps": 100}, TypeError, "takes no num_steps"),
        ({"validation": X, "checkpoint": "c.pt"}, TypeError, "takes no validation, checkpoint"),
    ],
)
def test_what_it_does_not_take(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fit(line, options.pop("guide", "auto"), X, Y, progress=False, **options)


def test_bad_data_is_named() -> None:
    with pytest.raises(ValueError, match="'y' has NaN"):
        fit(line, "auto", X, Y * math.nan, progress=False)
    with pytest.raises(TypeError, match="cannot be called"):
        fit(line, "auto", X, progress=False)


def test_save_and_load(fitted: AutomaticFit, tmp_path: Path) -> None:
    fitted.restore_parameters()  # another test trains the guide further
    fitted.save(tmp_path / "fit.pt")
    loaded = FitResult.load(tmp_path / "fit.pt", line, "auto", X, Y)
    assert isinstance(loaded, AutomaticFit)
    assert repr(loaded) == repr(fitted)
    assert torch.equal(loaded.draws(10, seed=1)["b"], fitted.draws(10, seed=1)["b"])
    with pytest.raises(ValueError, match="guide='auto'"):
        FitResult.load(tmp_path / "fit.pt", line, AutoNormal(line), X, Y)


def test_refined_result_says_what_was_bought(tmp_path: Path) -> None:
    def funnel() -> None:
        scale = pyro.sample("scale", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Normal(0.0, scale.exp()))

    result = fit(funnel, "auto", progress=False, seed=0)
    assert isinstance(result, AutomaticFit)
    refined = result.refine(seed=0, progress=False)
    assert refined.elbo > result.elbo
    assert refined.elbo == pytest.approx(0.0, abs=0.1)  # the prior is normalized: log evidence 0
    assert "nats above the Gaussian's; k-hat was" in repr(refined)
    refined.save(tmp_path / "flow.pt")
    loaded = FitResult.load(tmp_path / "flow.pt", funnel, "auto")
    assert torch.equal(loaded.draws(10, seed=1)["z"], refined.draws(10, seed=1)["z"])
    with pytest.raises(ValueError, match="flow already"):
        refined.refine()
