"""Pyro runs as ArviZ data: every group against an exact oracle, on models of any shape."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator
from typing import Any

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal
from pyro.infer.mcmc import StreamingMCMC
from pyro.nn import PyroModule, PyroParam, PyroSample
from scipy import stats
from torch.distributions import constraints

from pyro_elbo_ext import DecomposedELBO, History
from pyro_elbo_ext.inference_data.export import dataset_of, from_pyro_mcmc, from_pyro_svi, to_arviz

DATA = torch.tensor([1.2, -0.3, 0.8, 2.1, 0.4])


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()


def numpy_state() -> Any:
    state: Any = np.random.get_state()  # noqa: NPY002 (the one that Pyro seeds)
    return state[1].copy()


def conjugate(y: torch.Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("person", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def posterior_guide(y: torch.Tensor) -> None:
    """The exact posterior of ``conjugate``."""
    n = len(y)
    pyro.sample("mu", dist.Normal(y.sum() / (n + 1), (n + 1) ** -0.5))


def log_evidence(y: torch.Tensor) -> float:
    n = len(y)
    return float(stats.multivariate_normal(np.zeros(n), np.eye(n) + np.ones((n, n))).logpdf(y.numpy()))


def export(model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
    quick = {"num_samples": 7, "prior": False, "posterior_predictive": False, "seed": 0}
    return from_pyro_svi(model, guide, *args, **{**quick, **kwargs})


def groups_of(data: Any) -> set[str]:
    return set(data.children) if isinstance(data, xr.DataTree) else set(data.groups())


def mu_guide(*_: Any, **__: Any) -> None:
    pyro.sample("mu", dist.Normal(0.3, 0.5))


# Both generations of ArviZ


def test_to_arviz_gives_the_installed_generation() -> None:
    posterior = xr.Dataset({"mu": (("chain", "draw"), np.zeros((2, 3)))}, attrs={"inference_library": "ours"})
    data = to_arviz({"posterior": posterior, "svi_history": xr.Dataset({"elbo": ("step", np.ones(4))})})
    assert isinstance(data, az.InferenceData if az.__version__.startswith("0.") else xr.DataTree)
    assert groups_of(data) == {"posterior", "svi_history"}
    assert data.attrs["inference_library"] == "ours"
    assert data.attrs["creation_library"] == "pyro_elbo_ext"
    xr.testing.assert_identical(dataset_of(data), posterior)
    xr.testing.assert_identical(data["posterior"]["mu"], posterior["mu"])


def test_dataset_of_reads_every_kind() -> None:
    posterior = xr.Dataset({"mu": (("chain", "draw"), np.zeros((2, 3)))})
    assert dataset_of(posterior) is posterior
    xr.testing.assert_identical(dataset_of(xr.DataTree.from_dict({"posterior": posterior})), posterior)
    with pytest.raises(KeyError, match="no group 'prior' in the data; it has posterior"):
        dataset_of(to_arviz({"posterior": posterior}), "prior")
    with pytest.raises(TypeError, match=r"InferenceData, DataTree or xarray.Dataset, got dict"):
        dataset_of({"mu": 1})
    with pytest.raises(TypeError, match=r"group 'prior' must be an xarray.Dataset, got dict"):
        to_arviz({"prior": {}})  # type: ignore[dict-item]


def test_netcdf_round_trip(tmp_path: Any) -> None:
    elbo = DecomposedELBO()
    guide = AutoNormal(conjugate)
    svi = SVI(conjugate, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    for _ in range(5):
        svi.step(DATA)
    data = from_pyro_svi(conjugate, guide, DATA, num_samples=6, history=elbo.history)
    data.to_netcdf(str(tmp_path / "fit.nc"))
    read = az.from_netcdf(str(tmp_path / "fit.nc"))
    assert groups_of(read) == groups_of(data)
    for group in groups_of(data):
        xr.testing.assert_equal(dataset_of(read, group), dataset_of(data, group))
    assert read.attrs["inference_library"] == "pyro"
    assert elbo.history is not None
    again = History.from_xarray(dataset_of(read, "svi_history"))
    np.testing.assert_array_equal(again.elbo, elbo.history.elbo)


# The groups of a fit


def test_groups_shapes_and_attributes() -> None:
    def model(y: torch.Tensor, sigma: torch.Tensor, flag: bool) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
        with pyro.plate("school", 5):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.deterministic("effect", theta + 1)
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)
        pyro.factor("penalty", -(mu**2))

    sigma = torch.full((5,), 2.0)
    names = ["a", "b", "c", "d", "e"]
    data = from_pyro_svi(
        model,
        AutoNormal(model),
        DATA,
        sigma,
        flag=True,
        num_samples=4,
        coords={"school": names},
        dims={"sigma": ["school"]},
        seed=3,
    )
    assert groups_of(data) == {
        "posterior",
        "posterior_predictive",
        "prior",
        "prior_predictive",
        "log_likelihood",
        "sample_stats",
        "observed_data",
        "constant_data",
    }
    for group in ("posterior", "prior"):
        sites = dataset_of(data, group)
        assert list(sites.data_vars) == ["mu", "tau", "theta", "effect"]
        assert sites["mu"].dims == ("chain", "draw")
        assert sites["theta"].dims == sites["effect"].dims == ("chain", "draw", "school")
        assert sites.sizes == {"chain": 1, "draw": 4, "school": 5}
        assert (sites["tau"] > 0).all()
        np.testing.assert_array_equal(sites["effect"], sites["theta"] + 1)
        assert list(sites["school"].values) == names
    for group in ("posterior_predictive", "prior_predictive", "log_likelihood"):
        assert list(dataset_of(data, group).data_vars) == ["y"]  # not the factor
        assert dataset_of(data, group)["y"].dims == ("chain", "draw", "school")
    observed, constant = dataset_of(data, "observed_data"), dataset_of(data, "constant_data")
    assert list(observed.data_vars) == ["y"]
    np.testing.assert_array_equal(observed["y"], DATA)
    assert list(constant.data_vars) == ["sigma"]  # y is observed, flag no tensor
    assert constant["sigma"].dims == ("school",)
    attrs = dataset_of(data).attrs
    assert attrs["inference_library"] == "pyro"
    assert attrs["inference_library_version"] == pyro.__version__
    assert attrs["created_at"].startswith("20")
    assert attrs["creation_library_version"] == data.attrs["creation_library_version"]


@pytest.mark.parametrize("scale", [1.0, 0.1, 7.0])
def test_pointwise_log_likelihood_is_unscaled(scale: float) -> None:
    data = export(poutine.scale(conjugate, scale), mu_guide, DATA)
    mu = dataset_of(data)["mu"].values[..., None]
    found = dataset_of(data, "log_likelihood")["y"]
    np.testing.assert_allclose(found, stats.norm(mu, 1).logpdf(DATA.numpy()), rtol=1e-5)
    # scaled as in the ELBO
    expected = scale * (stats.norm.logpdf(mu[..., 0]) + stats.norm(mu, 1).logpdf(DATA.numpy()).sum(-1))
    np.testing.assert_allclose(dataset_of(data, "sample_stats")["log_p"], expected, rtol=1e-5)
    np.testing.assert_allclose(
        dataset_of(data, "sample_stats")["log_q"], stats.norm(0.3, 0.5).logpdf(mu[..., 0]), rtol=1e-4, atol=1e-5
    )


def masked_models() -> dict[str, Any]:
    mask = torch.tensor([True, False, True, True, False])

    def by_poutine(y: torch.Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("person", 5), poutine.mask(mask=mask):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def by_distribution(y: torch.Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("person", 5):
            pyro.sample("y", dist.Normal(mu, 1.0).expand([5]).mask(mask), obs=y)

    def scaled_too(y: torch.Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("person", 5), poutine.scale(scale=3.0), poutine.mask(mask=mask):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def twice(y: torch.Tensor) -> None:
        first = torch.tensor([True, False, True, True, True])
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("person", 5), poutine.mask(mask=first):
            pyro.sample("y", dist.Normal(mu, 1.0).expand([5]).mask(mask), obs=y)

    return {f.__name__: f for f in (by_poutine, by_distribution, scaled_too, twice)}


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
@pytest.mark.parametrize("kind", masked_models())
def test_masked_observations_do_not_count(kind: str) -> None:
    model = masked_models()[kind]
    data = export(model, mu_guide, DATA, num_samples=200, coords={"person": list("abcde")})
    found = dataset_of(data, "log_likelihood")["y"]
    mu = dataset_of(data)["mu"].values
    kept = np.array([0, 2, 3])
    expected = stats.norm(mu[..., None], 1).logpdf(DATA.numpy()[kept])
    assert found.dims == ("chain", "draw", "y_unmasked")
    assert list(found["y_person"].values) == ["a", "c", "d"]
    np.testing.assert_array_equal(found["y_unmasked"], kept)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    by_hand = (
        az.from_dict({"posterior": {"mu": mu}, "log_likelihood": {"y": expected}})
        if az.__version__ >= "1"
        else (az.from_dict(posterior={"mu": mu}, log_likelihood={"y": expected}))
    )
    ours, theirs = az.loo(data, pointwise=True), az.loo(by_hand, pointwise=True)
    for name in ("elpd", "elpd_loo"):
        if hasattr(ours, name):
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-5)
    assert ours.n_data_points == 3
    assert dataset_of(data, "observed_data")["y"].shape == (5,)


def test_wholly_masked_site_has_no_log_likelihood() -> None:
    data = export(poutine.mask(conjugate, mask=False), mu_guide, DATA)
    assert "log_likelihood" not in groups_of(data)
    assert "y" in dataset_of(data, "observed_data")


def test_mask_over_two_plates() -> None:
    y = torch.arange(6.0).reshape(2, 3)
    mask = torch.tensor([[True, False, True], [False, True, True]])

    def model(y: torch.Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 2, dim=-2), pyro.plate("column", 3, dim=-1), poutine.mask(mask=mask):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    found = dataset_of(export(model, mu_guide, y), "log_likelihood")["y"]
    assert list(found["y_row"].values) == [0, 0, 1, 1]
    assert list(found["y_column"].values) == [0, 2, 1, 2]
    mu = dataset_of(export(model, mu_guide, y))["mu"].values[..., None]
    np.testing.assert_allclose(found, stats.norm(mu, 1).logpdf(y[mask].numpy()), rtol=1e-5)


def test_mask_that_depends_on_the_draw() -> None:
    def model(y: torch.Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("person", 5), poutine.mask(mask=(y < mu + 1.5) & (y < 2)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    data = export(model, mu_guide, DATA, num_samples=50)
    found = dataset_of(data, "log_likelihood")["y"]
    mu = dataset_of(data)["mu"].values[..., None]
    kept = [0, 1, 2, 4]  # the fourth counts in no draw
    y = DATA.numpy()[kept]
    assert list(found["y_unmasked"].values) == kept
    assert (found.values == 0).any()
    np.testing.assert_allclose(found, np.where(y < mu + 1.5, stats.norm(mu, 1).logpdf(y), 0), rtol=1e-5)


def test_obs_mask_gives_the_completed_site() -> None:
    mask = torch.tensor([True, False, True, True, False])

    def model(y: torch.Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("person", 5):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=mask)

    data = export(model, AutoNormal(model), DATA, posterior_predictive=True)
    posterior = dataset_of(data)
    assert set(posterior.data_vars) == {"mu", "y"}
    assert posterior["y"].dims == ("chain", "draw", "person")
    assert (posterior["y"].values[..., mask] == DATA[mask].numpy()).all()
    assert len(np.unique(posterior["y"].values[..., ~mask])) == 14
    found = dataset_of(data, "log_likelihood")["y_observed"]
    expected = stats.norm(posterior["mu"].values[..., None], 1).logpdf(DATA[mask].numpy())
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert list(dataset_of(data, "posterior_predictive")) == ["y_observed"]


def test_events_and_unvectorized_models() -> None:
    y = torch.tensor([[1.0, 2.0, 0.0], [0.5, 0.0, 1.0]])

    def model(y: torch.Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        for i in range(2):
            pyro.sample(f"z_{i}", dist.Normal(weights[i], 1.0))
        for i in pyro.plate("items", 2):
            pyro.sample(f"x_{i}", dist.Normal(mu[i], 1.0), obs=y[i, 0])
        with pyro.plate("person", 2):
            pyro.sample("y", dist.MultivariateNormal(mu, torch.eye(3)), obs=y)

    data = export(model, AutoDiagonalNormal(model), y, posterior_predictive=True)
    posterior = dataset_of(data)
    assert posterior["mu"].dims == ("chain", "draw", "mu_dim_0")
    np.testing.assert_allclose(posterior["weights"].sum("weights_dim_0"), 1, rtol=1e-5)
    assert posterior["z_0"].dims == ("chain", "draw")
    assert dataset_of(data, "observed_data")["y"].dims == ("person", "y_dim_1")
    assert dataset_of(data, "posterior_predictive")["y"].dims == ("chain", "draw", "person", "y_dim_1")
    found = dataset_of(data, "log_likelihood")["y"]
    assert found.dims == ("chain", "draw", "person")
    x_1 = dataset_of(data, "log_likelihood")["x_1"]
    np.testing.assert_allclose(x_1, stats.norm(posterior["mu"].values[..., 1], 1).logpdf(0.5), rtol=1e-5)
    mu = posterior["mu"].values[..., None, :]
    np.testing.assert_allclose(found, stats.norm(mu, 1).logpdf(y.numpy()).sum(-1), rtol=1e-5)


def test_dims_and_names() -> None:
    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        with pyro.plate("chain", 3):
            pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("person", 5):
            pyro.sample("y", dist.Normal(x.sum(-1), 1.0), obs=y)
        pyro.sample("net/bias", dist.Normal(torch.zeros(2, 4), 1.0).to_event(2))

    guide = AutoNormal(model)
    data = export(
        model, guide, torch.ones(5, 2), y=DATA, dims={"net/bias": ["layer", None], "x": ["person", "feature"]}
    )
    posterior = dataset_of(data)
    assert posterior["w"].dims == ("chain", "draw", "chain_dim")
    assert posterior["net.bias"].dims == ("chain", "draw", "layer", "net.bias_dim_1")
    assert dataset_of(data, "observed_data")["y"].dims == ("person",)
    assert dataset_of(data, "constant_data")["x"].dims == ("person", "feature")
    data = export(model, guide, torch.ones(5, 2), y=DATA, dims={"y": ["who"]}, coords={"who": list("abcde")})
    assert dataset_of(data, "log_likelihood")["y"].dims == ("chain", "draw", "who")


def test_constants_are_named_by_the_signature() -> None:
    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.mu = PyroSample(dist.Normal(0.0, 1.0))

        def forward(self, x: torch.Tensor, *more: Any, y: torch.Tensor, **rest: Any) -> None:
            mu = self.mu
            with pyro.plate("person", 5):
                pyro.sample("y", dist.Normal(mu + x, 1.0), obs=y)

    def guide(*_: Any, **__: Any) -> None:
        pyro.sample("mu", dist.Normal(0.0, 1.0))

    model = Model()
    data = export(model, guide, torch.zeros(5), torch.ones(2), 3, y=DATA, size=np.arange(4), other="text")
    constants = dataset_of(data, "constant_data")
    assert set(constants.data_vars) == {"x", "more_0", "size"}
    np.testing.assert_array_equal(constants["size"], np.arange(4))


# Exact: with the guide at the posterior, log_p - log_q is the log evidence of each draw


def test_log_p_minus_log_q_is_the_evidence() -> None:
    sample_stats = dataset_of(export(conjugate, posterior_guide, DATA), "sample_stats")
    assert sample_stats["log_p"].dims == ("chain", "draw")
    assert sample_stats["log_p"].dtype == np.float64
    np.testing.assert_allclose(sample_stats["log_p"] - sample_stats["log_q"], log_evidence(DATA), rtol=1e-5)


@pytest.mark.parametrize("auto", [AutoNormal, AutoDiagonalNormal])
def test_log_q_of_an_autoguide_includes_the_jacobian(auto: Any) -> None:
    def model() -> None:
        pyro.sample("tau", dist.LogNormal(0.3, 0.5))
        pyro.sample("p", dist.Beta(2.0, 3.0))

    guide = auto(model, init_scale=0.4)
    data = from_pyro_svi(model, guide, num_samples=1000, seed=0, posterior_predictive=False, prior=False)
    sample_stats, posterior = dataset_of(data, "sample_stats"), dataset_of(data)
    expected = stats.lognorm(0.5, scale=math.exp(0.3)).logpdf(posterior["tau"]) + stats.beta(2, 3).logpdf(
        posterior["p"]
    )
    np.testing.assert_allclose(sample_stats["log_p"], expected, rtol=1e-4, atol=1e-4)
    median = guide.median()
    tau, logit = median["tau"].item(), torch.logit(median["p"]).item()
    p = posterior["p"].values
    expected = stats.lognorm(0.4, scale=tau).logpdf(posterior["tau"])
    expected += stats.norm(logit, 0.4).logpdf(np.log(p / (1 - p))) - np.log(p * (1 - p))
    np.testing.assert_allclose(sample_stats["log_q"], expected, rtol=1e-3, atol=1e-3)
    # the mean of log_p - log_q is the ELBO, within four standard errors
    pyro.set_rng_seed(1)
    elbos = [-Trace_ELBO().loss(model, guide) for _ in range(400)]
    weights = (sample_stats["log_p"] - sample_stats["log_q"]).values
    error = math.hypot(np.std(elbos) / math.sqrt(400), weights.std() / math.sqrt(weights.size))
    assert abs(weights.mean() - np.mean(elbos)) < 4 * error


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
def test_loo_is_that_of_a_hand_made_one() -> None:
    data = export(conjugate, posterior_guide, DATA, num_samples=500)
    mu = dataset_of(data)["mu"].values
    table = stats.norm(mu[..., None], 1).logpdf(DATA.numpy())
    coords = {"chain": [0], "draw": np.arange(500)}
    hand = to_arviz(
        {
            "posterior": xr.Dataset({"mu": (("chain", "draw"), mu)}, coords),
            "log_likelihood": xr.Dataset({"y": (("chain", "draw", "i"), table)}, coords),
        }
    )
    ours, theirs = az.loo(data), az.loo(hand)
    name = "elpd" if hasattr(ours, "elpd") else "elpd_loo"
    assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-5)
    # leave-one-out densities are known: y_i given the others is Normal(sum of the others / n, 1 + 1/n)
    y, n = DATA.numpy(), len(DATA)
    exact = stats.norm((y.sum() - y) / n, math.sqrt(1 + 1 / n)).logpdf(y).sum()
    assert getattr(ours, name) == pytest.approx(exact, abs=0.1)


@pytest.mark.skipif(not hasattr(az, "loo_approximate_posterior"), reason="ArviZ 1.x only")
def test_loo_approximate_posterior_corrects_the_guide() -> None:
    def wide(y: torch.Tensor) -> None:
        n = len(y)
        pyro.sample("mu", dist.Normal(y.sum() / (n + 1) + 0.2, 1.5 * (n + 1) ** -0.5))

    data = export(conjugate, wide, DATA, num_samples=4000)
    sample_stats = dataset_of(data, "sample_stats")
    loo_approximate_posterior: Any = getattr(az, "loo_approximate_posterior")  # noqa: B009 (unknown to ArviZ 0.x)
    found = loo_approximate_posterior(data, sample_stats["log_p"], sample_stats["log_q"])
    y, n = DATA.numpy(), len(DATA)
    exact = stats.norm((y.sum() - y) / n, math.sqrt(1 + 1 / n)).logpdf(y).sum()
    assert found.elpd == pytest.approx(exact, abs=0.05)
    assert abs(az.loo(data).elpd - exact) > 0.1


def test_predictive_draws_have_the_right_moments() -> None:
    size = 1000
    data = from_pyro_svi(conjugate, posterior_guide, DATA, num_samples=size, seed=0)
    n = len(DATA)
    for group, mean, variance in (
        ("posterior_predictive", float(DATA.sum()) / (n + 1), 1 + 1 / (n + 1)),
        ("prior_predictive", 0.0, 2.0),
    ):
        y = dataset_of(data, group)["y"].values[0]
        # five standard errors, for ten comparisons
        assert np.abs(y.mean(0) - mean).max() < 5 * math.sqrt(variance / size)
        assert np.abs(y.var(0) - variance).max() < 5 * variance * math.sqrt(2 / size)
    # a replication is drawn at its own draw of the posterior: cov(y, mu) = var(mu)
    mu = dataset_of(data)["mu"].values[0]
    y = dataset_of(data, "posterior_predictive")["y"].values[0].mean(1)
    assert np.cov(y, mu)[0, 1] == pytest.approx(1 / (n + 1), rel=0.25)


def test_replications_of_a_time_series_are_fed_back() -> None:
    def model(y: torch.Tensor) -> None:
        rho = pyro.sample("rho", dist.Delta(torch.tensor(1.0)))
        last = torch.tensor(0.0)
        for t in range(len(y)):
            last = pyro.sample(f"y_{t}", dist.Normal(rho * last, 1e-3), obs=y[t])

    data = export(model, AutoDelta(model), torch.tensor([100.0, -100.0]), posterior_predictive=True)
    found = dataset_of(data, "posterior_predictive")
    assert abs(found["y_1"]).max() < 1


# What is left as it was


def test_nothing_of_the_caller_changes() -> None:
    class Net(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.scale = PyroParam(torch.tensor(0.5), constraints.positive)
            self.drop = torch.nn.Dropout(0.5)

        def forward(self, y: torch.Tensor) -> None:
            pyro.sample("mu", dist.Normal(self.drop(torch.ones(1))[0], self.scale))

    guide = Net()
    SVI(conjugate, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(DATA)
    store = pyro.get_param_store()
    before, tensors = copy.deepcopy(store.get_state()), dict(store.get_state()["params"])
    guide.eval()
    random.seed(5)
    rng = torch.get_rng_state(), numpy_state(), random.getstate()
    first = from_pyro_svi(conjugate, guide, DATA, num_samples=5, seed=1)
    assert torch.equal(torch.get_rng_state(), rng[0])
    assert (numpy_state() == rng[1]).all()
    assert random.getstate() == rng[2]
    assert not guide.training
    assert torch.is_grad_enabled()
    after = store.get_state()
    assert set(after["params"]) == set(before["params"])
    for name, value in after["params"].items():
        assert value is tensors[name]
        assert torch.equal(value, before["params"][name])
    second = from_pyro_svi(conjugate, guide, DATA, num_samples=5, seed=1)
    for group in groups_of(first):
        for name in dataset_of(first, group).data_vars:
            np.testing.assert_array_equal(dataset_of(first, group)[name], dataset_of(second, group)[name])
    third = from_pyro_svi(conjugate, guide, DATA, num_samples=5, seed=2)
    assert not np.array_equal(dataset_of(first)["mu"], dataset_of(third)["mu"])
    from_pyro_svi(conjugate, guide, DATA, num_samples=5)
    assert not torch.equal(torch.get_rng_state(), rng[0])  # without a seed, the caller's generator goes on
    guide.train()
    from_pyro_svi(conjugate, guide, DATA, num_samples=5)
    assert guide.training


def test_parameters_do_not_appear_in_the_store() -> None:
    def guide(y: torch.Tensor) -> None:
        pyro.sample("mu", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    export(conjugate, guide, DATA)
    assert not list(pyro.get_param_store())


# MCMC


def run_mcmc(model: Any, *args: Any, num_samples: int = 20, **kwargs: Any) -> MCMC:
    mcmc = MCMC(NUTS(model), num_samples=num_samples, warmup_steps=20, disable_progbar=True, **kwargs)
    mcmc.run(*args)
    return mcmc


def plated(y: torch.Tensor) -> None:
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("person", len(y)):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.deterministic("effect", tau * theta)
        pyro.sample("y", dist.Normal(tau * theta, 1.0), obs=y)


@pytest.mark.filterwarnings("ignore:num_chains=2 is more than available_cpu")
def test_mcmc() -> None:
    mcmc = run_mcmc(plated, DATA, num_chains=2, mp_context="fork")
    data = from_pyro_mcmc(mcmc, posterior_predictive=True, prior=True, seed=0)
    posterior = dataset_of(data)
    for name, value in mcmc.get_samples(group_by_chain=True).items():
        np.testing.assert_array_equal(posterior[name], value)
    assert posterior["effect"].dims == ("chain", "draw", "person")
    assert posterior.sizes == {"chain": 2, "draw": 20, "person": 5}
    np.testing.assert_allclose(posterior["effect"], posterior["theta"] * posterior["tau"], rtol=1e-6)
    found = dataset_of(data, "log_likelihood")["y"]
    np.testing.assert_allclose(found, stats.norm(posterior["effect"], 1).logpdf(DATA.numpy()), rtol=1e-5)
    diverging = dataset_of(data, "sample_stats")["diverging"].values
    for chain, draws in enumerate(mcmc.diagnostics()["divergences"].values()):
        np.testing.assert_array_equal(np.flatnonzero(diverging[chain]), draws)
    assert diverging.dtype == bool
    assert dataset_of(data, "posterior_predictive")["y"].shape == (2, 20, 5)
    assert dataset_of(data, "prior")["theta"].shape == (1, 40, 5)
    np.testing.assert_array_equal(dataset_of(data, "observed_data")["y"], DATA)


def test_mcmc_divergences_are_at_their_draws() -> None:
    mcmc = run_mcmc(plated, DATA)
    mcmc._diagnostics[0]["divergences"] = [0, 7, 19]
    diverging = dataset_of(from_pyro_mcmc(mcmc), "sample_stats")["diverging"].values
    assert list(np.flatnonzero(diverging[0])) == [0, 7, 19]


def test_mcmc_with_another_model_and_arguments() -> None:
    mcmc = run_mcmc(plated, DATA)
    data = from_pyro_mcmc(mcmc, plated, DATA + 1)
    effect = dataset_of(data)["effect"]
    expected = stats.norm(effect, 1).logpdf(DATA.numpy() + 1)
    np.testing.assert_allclose(dataset_of(data, "log_likelihood")["y"], expected, rtol=1e-5)
    data = from_pyro_mcmc(mcmc, y=DATA + 1)
    np.testing.assert_allclose(dataset_of(data, "log_likelihood")["y"], expected, rtol=1e-5)


def test_mcmc_without_a_model() -> None:
    kernel = NUTS(potential_fn=lambda z: (z["x"] ** 2).sum() / 2)
    mcmc = MCMC(kernel, num_samples=10, warmup_steps=10, initial_params={"x": torch.zeros(3)}, disable_progbar=True)
    mcmc.run()
    with pytest.raises(ValueError, match="log_likelihood needs a model"):
        from_pyro_mcmc(mcmc)
    data = from_pyro_mcmc(mcmc, log_likelihood=False, dims={"x": ["axis"]}, coords={"axis": list("abc")})
    assert groups_of(data) == {"posterior", "sample_stats"}
    assert dataset_of(data)["x"].dims == ("chain", "draw", "axis")


def test_mcmc_with_an_enumerated_site() -> None:
    def model(y: torch.Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("person", len(y)):
            z = pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(mu + z, 1.0), obs=y)

    mcmc = run_mcmc(model, DATA)
    data = from_pyro_mcmc(mcmc)
    assert list(dataset_of(data).data_vars) == ["mu", "z"]
    unmarked = pyro.poutine.infer_config(model, lambda site: {"enumerate": None} if site["name"] == "z" else {})
    with pytest.raises(ValueError, match=r"'z' of the model has no draws in mcmc.*log_likelihood=False"):
        from_pyro_mcmc(mcmc, unmarked, DATA)
    data = from_pyro_mcmc(mcmc, unmarked, DATA, log_likelihood=False)
    assert list(dataset_of(data).data_vars) == ["mu"]


def test_mcmc_bad_input() -> None:
    mcmc = MCMC(NUTS(plated), num_samples=5, warmup_steps=1)
    with pytest.raises(RuntimeError, match=r"call mcmc.run"):
        from_pyro_mcmc(mcmc)
    with pytest.raises(TypeError, match=r"must be a pyro.infer.MCMC, .* got StreamingMCMC"):
        from_pyro_mcmc(StreamingMCMC(NUTS(plated), num_samples=5, warmup_steps=1))
    mcmc = run_mcmc(plated, DATA)
    with pytest.raises(TypeError, match="the model cannot be called with these arguments, missing a required argument"):
        from_pyro_mcmc(mcmc, plated)
    mcmc._samples["tau"][0, 3] = math.nan
    with pytest.raises(ValueError, match="site 'tau' is NaN in 1 of its draws"):
        from_pyro_mcmc(mcmc)


# Bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_samples": 0}, ValueError, "num_samples must be at least 1, not 0"),
        ({"num_samples": -3}, ValueError, "num_samples must be at least 1, not -3"),
        ({"num_samples": 2.5}, TypeError, "num_samples must be an integer, not 2.5"),
        ({"num_samples": True}, TypeError, "num_samples must be an integer, not True"),
        ({"history": [1.0]}, TypeError, "history must be a History, .* got list"),
        (
            {"z": 1},
            TypeError,
            "the model cannot be called with these arguments, got an unexpected keyword argument 'z'",
        ),
        ({"coords": {"persons": list("abcde")}}, ValueError, "coords names 'persons', .* there are person"),
        ({"coords": {"person": list("abc")}}, ValueError, r"coords\['person'\] has shape \(3,\), .* size 5"),
        ({"dims": {"yy": ["person"]}}, ValueError, "dims names 'yy', but there is no such site"),
        ({"dims": {"y": ["a", "b"]}}, ValueError, r"dims\['y'\] names 2 axes .* shape \(5,\)"),
        ({"dims": {"y": "person"}}, TypeError, r"dims\['y'\] must be a list of names"),
        ({"dims": {"y": ["draw"]}}, ValueError, "axis 0 of 'y' cannot be named 'draw'"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        export(conjugate, posterior_guide, DATA, **change)


def test_model_or_guide_that_do_not_fit() -> None:
    with pytest.raises(TypeError, match="model must be callable, got NoneType"):
        export(None, mu_guide, DATA)
    with pytest.raises(TypeError, match="guide must be callable, got dict"):
        export(conjugate, {}, DATA)
    with pytest.raises(TypeError, match=r"the guide cannot be called with these arguments.*it takes \(\)"):
        export(conjugate, lambda: None, DATA)
    with pytest.raises(ValueError, match="site 'mu' is latent in the model but the guide has no site of that name"):
        export(conjugate, lambda y: None, DATA)


@pytest.mark.parametrize("validate", [True, False])
def test_nan_draws_name_the_site(validate: bool) -> None:
    def guide(y: torch.Tensor) -> None:
        pyro.sample("mu", dist.Normal(pyro.param("loc", torch.tensor(math.nan)), 1.0))

    with pyro.validation_enabled(validate), pytest.raises(ValueError, match=r"site 'mu' .*NaN"):
        export(conjugate, guide, DATA)


def test_nan_density_names_the_site() -> None:
    def model(y: torch.Tensor) -> None:
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.factor("penalty", torch.tensor(math.nan))

    with pytest.raises(ValueError, match="log density of site 'penalty' in the model is NaN"):
        export(model, mu_guide, DATA)


def test_subsampling_names_the_plate() -> None:
    def model(y: torch.Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("batch", 5, subsample_size=2) as index:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])

    with pytest.raises(ValueError, match=r"plate 'batch' subsamples 2 of 5: .*full data"):
        export(model, mu_guide, DATA)
    with pytest.raises(ValueError, match="plate 'batch' subsamples 2 of 5"):
        from_pyro_mcmc(run_mcmc(conjugate, DATA), model, DATA)


def test_two_plates_of_one_name() -> None:
    def model(y: torch.Tensor, first: str, second: str) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate(first, 5):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        with pyro.plate(second, 3):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=y[:3])

    with pytest.raises(RuntimeError, match="Multiple sample sites named 'person'"):  # Pyro's own
        export(model, mu_guide, DATA, "person", "person")
    # names that Pyro keeps apart, and files do not
    assert {"a.b": 3, "a.b_": 5}.items() <= dataset_of(
        export(model, mu_guide, DATA, "a/b", "a.b"), "log_likelihood"
    ).sizes.items()
    with pytest.raises(ValueError, match="dim 'person' has size 5 at 'y' and 3 at 'x'"):
        export(model, mu_guide, DATA, "person", "few", dims={"x": ["person"]})
    data = export(model, mu_guide, DATA, "a/b", "a.b", dims={"x": ["few"]})
    assert dataset_of(data, "log_likelihood").sizes["few"] == 3


def test_flat_priors_say_what_to_leave_out() -> None:
    def model(y: torch.Tensor) -> None:
        mu = pyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
        pyro.sample("y", dist.Normal(mu, 1.0).expand([5]).to_event(1), obs=y)

    with pytest.raises(
        ValueError, match=r"site 'mu' cannot be drawn .* ImproperUniform has no sampler. Pass prior=False"
    ):
        export(model, mu_guide, DATA, prior=True)
    assert "log_likelihood" in groups_of(export(model, mu_guide, DATA))


def test_models_whose_sites_vary() -> None:
    def changing(names: list[str]) -> Any:
        order = iter(names)

        def model() -> None:
            pyro.sample("mu", dist.Normal(0.0, 1.0))
            pyro.deterministic(next(order), torch.ones(()))

        return model

    with pytest.raises(ValueError, match="site 'b' is not in every draw"):
        export(changing(["a", "b"]), mu_guide, num_samples=2, log_likelihood=False)

    sizes = iter([2, 3])

    def growing() -> None:
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.deterministic("a", torch.ones(next(sizes)))

    with pytest.raises(ValueError, match=r"site 'a' has shape \(3,\) at draw 1, \(2,\) before"):
        export(growing, mu_guide, num_samples=2, log_likelihood=False)
