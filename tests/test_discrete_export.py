"""Summed-out sites in what a fit, NUTS and the exports give back: draws, labels, pointwise log likelihoods."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from scipy.special import logsumexp
from scipy.stats import norm
from torch import Tensor

from pyro_elbo_ext import compare_to_mcmc, fit, from_pyro_mcmc, from_pyro_svi, run_nuts
from pyro_elbo_ext.density import LogDensity
from pyro_elbo_ext.density.completing import complete
from pyro_elbo_ext.inference_data.export import dataset_of
from pyro_elbo_ext.terms.enumeration.at_draws import AtDraws
from pyro_elbo_ext.terms.enumeration.pointwise import pointwise

X = torch.tensor([-2.1, -1.9, 2.2, 1.8, 0.1])
LOCS = np.array([-2.0, 2.0])


@config_enumerate
def mixture(x: Tensor) -> None:
    weight = pyro.sample("weight", dist.Beta(2.0, 2.0))
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(weight))
        loc = pyro.deterministic("loc", shift + 4 * z - 2)
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def chance(draws: Any) -> np.ndarray:
    """Probability that each z is 1, given the draws of the others: shape (S, 5)."""
    weight, shift = np.ravel(draws["weight"])[:, None], np.ravel(draws["shift"])[:, None]
    one = weight * norm.pdf(X.numpy(), shift + 2, 1)
    return one / (one + (1 - weight) * norm.pdf(X.numpy(), shift - 2, 1))


def log_mixture(draws: Any) -> np.ndarray:
    weight, shift = np.ravel(draws["weight"])[:, None], np.ravel(draws["shift"])[:, None]
    parts = np.log([1 - weight, weight]) + norm.logpdf(X.numpy(), shift + LOCS[:, None, None], 1)
    return logsumexp(parts, axis=0)


def check_draws(posterior: Any) -> None:
    """Integers of the right frequencies, and deterministic sites that belong to them."""
    z = np.asarray(posterior["z"])
    assert z.shape[-1] == len(X)
    assert set(np.unique(z)) <= {0, 1}
    z = z.reshape(-1, len(X))
    exact = chance(posterior)
    errors = (z - exact).sum(0) / np.sqrt((exact * (1 - exact)).sum(0) + 1e-9)
    assert (np.abs(errors) < 4).all()
    loc = np.asarray(posterior["loc"]).reshape(-1, len(X))
    np.testing.assert_allclose(loc, np.ravel(posterior["shift"])[:, None] + 4 * z - 2, rtol=1e-5, atol=1e-5)


def test_nuts_draws_the_discrete_sites() -> None:
    data = run_nuts(mixture, X, num_samples=200, warmup=100, chains=2, seed=1, progress=False, compile=False)
    posterior = dataset_of(data)
    assert list(posterior.data_vars) == ["weight", "shift", "z", "loc"]
    assert posterior["z"].dtype == np.int64
    assert posterior["z"].dims == ("chain", "draw", "data") == posterior["loc"].dims
    check_draws(posterior)


def test_nuts_has_log_likelihoods_and_predictions_of_them() -> None:
    options: Any = {"num_samples": 30, "warmup": 30, "chains": 1, "seed": 1, "progress": False, "compile": False}
    data = run_nuts(mixture, X, log_likelihood=True, posterior_predictive=True, **options)
    check_likelihoods(data)
    redrawn = dataset_of(data, "posterior_predictive")["x"] - dataset_of(data)["loc"]
    assert abs(float(redrawn.std()) - 1) < 0.3
    with pytest.raises(ValueError, match="posterior_predictive=True needs draws"):
        run_nuts(mixture, X, posterior_predictive=True, discrete=False, **options)


def test_nuts_without_discrete_sites_if_asked() -> None:
    options: Any = {"num_samples": 10, "warmup": 10, "chains": 1, "seed": 1, "progress": False, "compile": False}
    without = dataset_of(run_nuts(mixture, X, discrete=False, **options))
    assert list(without.data_vars) == ["weight", "shift"]
    np.testing.assert_array_equal(without["shift"], dataset_of(run_nuts(mixture, X, **options))["shift"])
    with pytest.raises(TypeError, match="discrete must be True or False"):
        run_nuts(mixture, X, discrete=1, **options)  # type: ignore[arg-type]


def test_missing_bits_are_imputed_by_nuts() -> None:
    @config_enumerate
    def model() -> None:
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        with pyro.plate("data", 3):
            y = pyro.sample("y", dist.Bernoulli(p), obs=torch.ones(3), obs_mask=torch.tensor([True, False, False]))
            pyro.sample("x", dist.Normal(y, 0.2), obs=torch.tensor([1.0, 1.0, 0.0]))

    posterior = dataset_of(
        run_nuts(model, num_samples=40, warmup=30, chains=1, progress=False, compile=False, backend="pyro")
    )
    assert list(posterior.data_vars) == ["p", "y"]
    assert (posterior["y"].values[0] == [1, 1, 0]).mean(0).min() > 0.95


def test_a_density_completes_points() -> None:
    density = LogDensity(mixture, (X,), {}, 0)
    assert density.traced  # the density of a deterministic site is made of zeros, whose dtype is that of the program
    points = np.random.default_rng(0).normal(size=(2, 150, density.dim))
    values = complete(density, points, seed=3)
    assert values["z"].shape == (2, 150, 5)
    assert torch.equal(values["z"], complete(density, points, seed=3)["z"])
    assert list(density.constrain(points)) == ["weight", "shift"]
    check_draws({name: value.numpy() for name, value in values.items()})
    assert complete(density, points[0, 0])["z"].shape == (5,)


@functools.cache
def fitted(way: str) -> Any:
    pyro.clear_param_store()
    if way == "auto":
        return fit(mixture, "auto", X, seed=0, progress=False)
    guide = AutoNormal(poutine.block(mixture, hide=["z", "loc"]))
    return fit(mixture, guide, X, loss=TraceEnum_ELBO(max_plate_nesting=1), num_steps=50, seed=0, progress=False)


@pytest.mark.parametrize("way", ["auto", "guide"])
def test_fits_draw_the_discrete_sites(way: str) -> None:
    draws = fitted(way).draws(1000, seed=2)
    assert list(draws) == ["weight", "shift", "z", "loc"]
    assert draws["z"].shape == (1000, 5)
    check_draws({name: value.numpy() for name, value in draws.items()})
    assert all(torch.equal(value, draws[name]) for name, value in fitted(way).draws(1000, seed=2).items())


def check_likelihoods(data: Any) -> None:
    likelihood = dataset_of(data, "log_likelihood")
    assert list(likelihood.data_vars) == ["x"]
    assert likelihood["x"].dims == ("chain", "draw", "data")
    assert likelihood["x"].attrs["of"] == "log p of x, for each element of plate 'data', with z summed out"
    found = likelihood["x"].values.reshape(-1, len(X))
    np.testing.assert_allclose(found, log_mixture(dataset_of(data)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["auto", "guide"])
def test_svi_export(way: str) -> None:
    result = fitted(way)
    with result.own_parameters():
        data = from_pyro_svi(mixture, result.guide, X, num_samples=200, seed=1)
    posterior = dataset_of(data)
    assert list(posterior.data_vars) == ["weight", "shift", "z", "loc"]
    assert posterior["z"].dtype == np.int64
    assert posterior["z"].dims == ("chain", "draw", "data")
    check_draws(posterior)
    check_likelihoods(data)
    stats = dataset_of(data, "sample_stats")
    weight, shift = posterior["weight"].values, posterior["shift"].values
    prior = np.log(6 * weight * (1 - weight)) + norm.logpdf(shift)
    np.testing.assert_allclose(stats["log_p"], prior + log_mixture(posterior).sum(1), rtol=1e-4, atol=1e-4)
    assert np.isfinite(stats["log_q"]).all()
    redrawn = dataset_of(data, "posterior_predictive")["x"] - posterior["loc"]
    assert abs(float(redrawn.std()) - 1) < 0.1
    assert list(dataset_of(data, "prior").data_vars) == ["weight", "shift", "z", "loc"]


def test_sites_that_the_guide_enumerates_are_drawn_from_it() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(4.0 * z - 2, 1.0), obs=x)

    @config_enumerate
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(torch.tensor([0.25, 0.75])))

    data = from_pyro_svi(model, guide, X, num_samples=400, seed=1)
    z = dataset_of(data)["z"]
    assert abs(float(z.mean()) - 0.75) < 4 * np.sqrt(0.75 * 0.25 / z.size)
    log_q = np.log(np.where(z.values[0] == 1, 0.75, 0.25)).sum(1)
    np.testing.assert_allclose(dataset_of(data, "sample_stats")["log_q"].values[0], log_q, rtol=1e-5)
    found = dataset_of(data, "log_likelihood")["x"].values[0]
    np.testing.assert_allclose(found, norm.logpdf(X.numpy(), 4.0 * z.values[0] - 2, 1), rtol=1e-5)


def test_mcmc_export() -> None:
    pyro.set_rng_seed(0)
    mcmc = MCMC(NUTS(mixture), num_samples=60, warmup_steps=30, disable_progbar=True)
    mcmc.run(X)
    data = from_pyro_mcmc(mcmc, seed=0, posterior_predictive=True)
    posterior = dataset_of(data)
    assert list(posterior.data_vars) == ["weight", "shift", "z", "loc"]
    assert posterior["z"].dtype == np.int64
    check_draws(posterior)
    check_likelihoods(data)


# Against MCMC


def test_probabilities_of_states_are_compared() -> None:
    rng = np.random.default_rng(0)
    approx = {"a": rng.normal(size=(2, 1000)), "z": rng.random((2, 1000, 3)) < [0.2, 0.5, 1.0]}
    mcmc = {"a": rng.normal(size=(2, 1000)), "z": rng.random((2, 1000, 3)) < [0.2, 0.9, 0.999]}
    sides = [{"a": side["a"], "z": side["z"].astype(np.int64)} for side in (approx, mcmc)]
    found = compare_to_mcmc(*sides)
    assert list(found.table.index) == ["a"]
    assert list(found.states.index) == ["z[0]", "z[1]", "z[2]"]
    assert list(found.states["verdict"]) == ["good", "bad", "good"]
    exact = [abs(a["z"].mean((0, 1)) - b["z"].mean((0, 1))) for a, b in ((approx, mcmc),)]
    np.testing.assert_allclose(found.states["total_variation"], exact[0], atol=1e-12)
    error = math.sqrt((0.25 + 0.09) / 2000)
    assert found.states["total_variation_error"]["z[1]"] == pytest.approx(error, rel=0.35)
    said = f"3 discrete: 2 good, 1 bad. Worst: z[1], probabilities of its states off by {exact[0][1]:.3f}"
    assert said in found.verdict
    assert "total_variation" in repr(found)


# Pointwise log likelihoods


def given(**values: Any) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def test_states_of_each_datum_are_summed_out_exactly() -> None:
    draws = given(weight=[0.3, 0.8], shift=[0.1, -0.7])
    ((together, found),) = pointwise(AtDraws(mixture, (X.double(),), {}, draws))
    exact = log_mixture({name: value.numpy() for name, value in draws.items()})
    assert (together.name, together.summed_out, together.plates) == ("x", ("z",), ("data",))
    with torch.no_grad():
        np.testing.assert_allclose(found, exact, rtol=1e-6)  # X is float32 here: of its rounding


def sequences(x: Tensor, lengths: Tensor) -> None:
    """Hidden Markov chains of several lengths, in a plate."""
    stay = pyro.sample("stay", dist.Beta(1.0, 1.0))
    with pyro.plate("sequences", len(x)):
        z = torch.zeros(len(x), dtype=x.dtype)
        for t in pyro.markov(range(x.shape[1])):
            with poutine.mask(mask=t < lengths):
                p = stay * z + (1 - stay) * (1 - z)
                z = pyro.sample(f"z_{t}", dist.Bernoulli(p), infer={"enumerate": "parallel"})
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])


def forward(x: np.ndarray, stay: float) -> float:
    """Log likelihood of one chain by the forward algorithm."""
    transition = np.array([[stay, 1 - stay], [1 - stay, stay]])
    state, total = np.array([1.0, 0.0]), 0.0
    for value in x:
        state = state @ transition * norm.pdf(value, [0, 1], 1)
        total += np.log(state.sum())
        state /= state.sum()
    return total


def test_chains_have_a_log_likelihood_each() -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lengths = torch.tensor([4, 2, 3])
    draws = given(stay=[0.3, 0.9])
    ((together, found),) = pointwise(AtDraws(sequences, (x, lengths), {}, draws))
    exact = [[forward(x[n, : lengths[n]].numpy(), stay) for n in range(3)] for stay in (0.3, 0.9)]
    np.testing.assert_allclose(found, exact, rtol=1e-10)
    assert together.name == "x"
    assert together.sites == ("x_0", "x_1", "x_2", "x_3")
    mcmc = from_pyro_svi(sequences, AutoNormal(poutine.block(sequences, expose=["stay"])), x, lengths, num_samples=5)
    likelihood = dataset_of(mcmc, "log_likelihood")
    assert list(likelihood.data_vars) == ["x"]
    assert likelihood["x"].dims == ("chain", "draw", "sequences")
    assert "x_0, x_1, x_2, x_3 together, for each element of plate 'sequences'" in likelihood["x"].attrs["of"]


def test_a_latent_site_below_a_discrete_one_is_given() -> None:
    @config_enumerate
    def model() -> None:
        with pyro.plate("data", 2), poutine.mask(mask=torch.tensor([True, False])):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3, dtype=torch.float64)))
            theta = pyro.sample("theta", dist.Normal(2 * z, 1.0))
            pyro.sample("x", dist.Normal(theta + z, 1.0), obs=torch.tensor([0.5, 0.1], dtype=torch.float64))

    ((together, found),) = pointwise(AtDraws(model, (), {}, given(theta=[[0.2, 0.4]])))
    prior = np.array([0.7, 0.3]) * norm.pdf(0.2, [0, 2], 1)
    exact = np.log((prior * norm.pdf(0.5, [0.2, 1.2], 1)).sum() / prior.sum())
    np.testing.assert_allclose(found, [[exact, 0.0]], rtol=1e-10)
    assert together.counts.tolist() == [True, False]


def test_states_that_tie_all_data_together_are_refused() -> None:
    @config_enumerate
    def chain() -> None:
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        z = torch.tensor(0.0)
        for t in pyro.markov(range(3)):
            z = pyro.sample(f"z_{t}", dist.Bernoulli(0.1 + 0.8 * z * p))
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=torch.tensor(0.3))

    guide = AutoNormal(poutine.block(chain, expose=["p"]))
    with pytest.raises(ValueError, match=r"x_0, x_1, x_2 have no .*z_0, z_1, z_2.*\n.*log_likelihood=False"):
        from_pyro_svi(chain, guide, num_samples=3)
    posterior = dataset_of(from_pyro_svi(chain, guide, num_samples=3, log_likelihood=False))
    assert list(posterior.data_vars) == ["p", "z_0", "z_1", "z_2"]


def test_a_site_that_nobody_draws_is_named() -> None:
    guide = AutoNormal(poutine.block(mixture, expose=["shift"]))
    with pytest.raises(ValueError, match="site 'weight' is latent in the model but the guide has no site of that name"):
        from_pyro_svi(mixture, guide, X)
