"""NUTS on unchanged Pyro models: exact log densities and posteriors, contracts, and bad inputs."""

from __future__ import annotations

import importlib.util
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from pyro_elbo_ext.density.log_density import LogDensity, compiled_log_density
from pyro_elbo_ext.inference_data.export import dataset_of
from pyro_elbo_ext.mcmc import samplers
from pyro_elbo_ext.mcmc.nuts import run_nuts
from pyro_elbo_ext.mcmc.starts import starting_point

NUTPIE = importlib.util.find_spec("nutpie") is not None
BACKENDS = ["pyro", pytest.param("nutpie", marks=pytest.mark.skipif(not NUTPIE, reason="nutpie is not installed"))]
Y = torch.tensor([1.0, 2.0, 4.0])


def conjugate(y: torch.Tensor) -> None:
    """Posterior of mu: Normal(sum(y) / 4, 1/2)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.deterministic("double", 2 * mu)
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def groups_of(data: Any) -> set[str]:
    return set(getattr(data, "children", None) or data.groups())


def short(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return run_nuts(model, *args, **{"num_samples": 40, "warmup": 40, "chains": 2, "progress": False} | kwargs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_conjugate_posterior(backend: str) -> None:
    data = short(conjugate, Y, backend=backend, num_samples=300, warmup=200, seed=3)
    mu = data.posterior["mu"].values
    assert mu.shape == (2, 300)
    # Effective size at least a fifth of 600: five standard errors of the mean 0.23, of the log sd 0.32
    assert abs(mu.mean() - 7 / 4) < 5 * 0.5 / math.sqrt(120)
    assert abs(math.log(mu.std() / 0.5)) < 5 / math.sqrt(2 * 120)
    np.testing.assert_allclose(data.posterior["double"].values, 2 * mu)
    assert data.observed_data["y"].dims == ("row",)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sample_stats(backend: str) -> None:
    data = short(conjugate, Y, backend=backend)
    stats = data.sample_stats
    names = {"diverging", "tree_depth", "n_steps", "energy", "acceptance_rate", "step_size", "lp"}
    assert set(stats.data_vars) == names
    assert all(stats[name].shape == (2, 40) for name in names)
    assert stats["diverging"].dtype == bool
    assert ((stats["n_steps"] < 2.0 ** (stats["tree_depth"] + 1)) & (stats["n_steps"] >= 1)).all()
    assert (stats["acceptance_rate"] <= 1).all()
    mu = data.posterior["mu"]
    lp = -0.5 * mu**2 - 2 * math.log(2 * math.pi) - 0.5 * sum((float(y) - mu) ** 2 for y in Y)
    np.testing.assert_allclose(stats["lp"], lp, rtol=1e-10)


def test_log_likelihood_is_that_of_each_observation_and_arviz_takes_it() -> None:
    data = short(conjugate, Y, backend="pyro", compile=False, log_likelihood=True)
    mu = data.posterior["mu"].values[..., None]
    found = dataset_of(data, "log_likelihood")["y"]
    assert found.dims == ("chain", "draw", "row")
    np.testing.assert_allclose(found, dist.Normal(torch.as_tensor(mu), 1.0).log_prob(Y), rtol=1e-12)
    assert np.isfinite(getattr(az.loo(data), "elpd", None) or az.loo(data).elpd_loo)
    assert not {"log_likelihood", "posterior_predictive"} & set(groups_of(short(conjugate, Y, compile=False)))


def test_predictions_in_float64_of_a_float32_model_are_repeatable() -> None:
    """A product of float32 data with draws: the model itself does not run at draws in float64."""
    x = torch.linspace(-1, 1, 6).reshape(3, 2)

    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("row", 3):
            pyro.sample("y", dist.Normal(x @ w, 0.0078125), obs=Y)

    options = {"backend": "pyro", "compile": False, "posterior_predictive": True, "log_likelihood": True}
    data, again = short(model, **options), short(model, **options)
    drawn = dataset_of(data, "posterior_predictive")["y"]
    assert drawn.dims == ("chain", "draw", "row")
    means = data.posterior["w"].values @ x.double().numpy().T
    # 240 draws: the largest is beyond six standard deviations with a probability of 5e-7
    assert 0 < np.abs(drawn.values - means).max() < 0.06
    np.testing.assert_array_equal(drawn, dataset_of(again, "posterior_predictive")["y"])
    np.testing.assert_allclose(
        dataset_of(data, "log_likelihood")["y"],
        dist.Normal(torch.as_tensor(means), 0.0078125).log_prob(Y.double()),
        rtol=1e-9,
    )


def test_predictions_of_a_partly_observed_site() -> None:
    """What is masked out is no observation; what depends on a missing value is given the value of the draw."""
    seen = torch.tensor([True, False, True])

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 3):
            y = pyro.sample("y", dist.Normal(mu, 1.0), obs=Y, obs_mask=seen)
            pyro.sample("z", dist.Normal(y, 0.25), obs=Y)

    data = short(model, backend="pyro", compile=False, log_likelihood=True, posterior_predictive=True)
    likelihood = dataset_of(data, "log_likelihood")
    assert likelihood["y_observed"].shape == (2, 40, 2)
    z = likelihood["z"].values
    exact = dist.Normal(torch.as_tensor(data.posterior["y"].values), 0.25).log_prob(Y.double())
    np.testing.assert_allclose(z, exact, rtol=1e-8)
    drawn = dataset_of(data, "posterior_predictive")
    missing = drawn["z"].values - data.posterior["y"].values
    # six standard deviations; draws of y[1] from its prior would be 1.5 off in a third of the cases
    assert 0 < np.abs(missing[..., 1]).max() < 1.5


def test_predictions_of_other_kinds_are_named() -> None:
    with pytest.raises(TypeError, match="posterior_predictive must be True or False, got 1"):
        short(conjugate, Y, compile=False, posterior_predictive=1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_seed_and_global_state(backend: str) -> None:
    pyro.clear_param_store()
    pyro.param("kept", torch.tensor(3.0))
    torch.manual_seed(5)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, second, other = (short(conjugate, Y, backend=backend, seed=s).posterior["mu"].values for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert (numpy_before == np.random.get_state()[1]).all()  # noqa: NPY002
    assert list(pyro.get_param_store().keys()) == ["kept"]
    assert torch.get_default_dtype() == torch.float32
    np.testing.assert_array_equal(first, second)
    assert (first != other).all()
    assert (first[0] != first[1]).all()


def test_params_are_held_and_not_registered() -> None:
    pyro.clear_param_store()

    def model() -> None:
        loc = pyro.param("loc", torch.tensor(2.0))
        pyro.sample("x", dist.Normal(loc, 1.0))

    density = LogDensity(model, (), {}, 0)
    np.testing.assert_allclose(density.value_and_grad(np.array([2.5]))[1], [-0.5])
    pyro.clear_param_store()
    short(model, backend="pyro", num_samples=2, warmup=5)
    assert not list(pyro.get_param_store().keys())


def test_density_has_jacobian_and_dependent_support() -> None:
    def model() -> None:
        scale = pyro.sample("scale", dist.Exponential(1.0))
        pyro.sample("x", dist.Uniform(0.0, scale))

    value, gradient = LogDensity(model, (), {}, 0).value_and_grad(np.array([0.3, 0.7]))
    # Exponential with u = log(scale): u - e^u. x = scale s(v) under Uniform(0, scale): the scale cancels
    sigmoid = 1 / (1 + math.exp(-0.7))
    assert value == pytest.approx(0.3 - math.exp(0.3) + math.log(sigmoid * (1 - sigmoid)), rel=1e-7)
    np.testing.assert_allclose(gradient, [1 - math.exp(0.3), 1 - 2 * sigmoid], rtol=1e-6)


def test_float32_matmul_is_computed_in_float64() -> None:
    x, w = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), np.array([0.1, -0.2, 0.3])

    def model() -> None:
        pyro.sample(
            "y",
            dist.Normal(x @ pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1)), 1.0).to_event(1),
            obs=x[:, 0],
        )

    density = LogDensity(model, (), {}, 0)
    x64 = x.numpy().astype(np.float64)
    assert density.float64
    np.testing.assert_allclose(density.value_and_grad(w)[1], x64.T @ (x64[:, 0] - x64 @ w) - w, rtol=1e-12)


def test_control_flow_falls_back_to_eager() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("f", x if x > 0 else 3 * x)

    density = LogDensity(model, (), {}, 0)
    np.testing.assert_allclose([density.value_and_grad(np.array([v]))[1][0] for v in (0.5, -0.5)], [0.5, 3.5])


def test_compiled_density() -> None:
    def model() -> None:
        with pyro.plate("row", 7):
            tau = pyro.sample("tau", dist.HalfNormal(1.0))
            pyro.sample("y", dist.StudentT(4.0, 0.0, tau), obs=torch.arange(7.0))

    plain, compiled = (LogDensity(model, (), {}, 0, compile) for compile in (False, True))
    assert (plain.compiled, compiled.compiled) == (False, True)
    for x in np.random.default_rng(0).normal(size=(5, 7)):
        value, gradient = compiled.value_and_grad(x)
        np.testing.assert_allclose(value, plain.value_and_grad(x)[0], rtol=1e-10)
        np.testing.assert_allclose(gradient, plain.value_and_grad(x)[1], rtol=1e-10)


@pytest.mark.parametrize("compile", [False, True])
def test_no_density_where_cholesky_fails(compile: bool) -> None:
    def model() -> None:
        rho = pyro.sample("rho", dist.Normal(0.0, 1.0))
        covariance = torch.eye(2) + rho * (1 - torch.eye(2))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), covariance), obs=torch.zeros(2))

    density = LogDensity(model, (), {}, 0, compile)
    assert density.value_and_grad(np.array([1.5]))[0] == -math.inf
    value, gradient = density.value_and_grad(np.array([0.5]))
    assert value == pytest.approx(-1.5 * math.log(2 * math.pi) - 0.125 - 0.5 * math.log(0.75))
    np.testing.assert_allclose(gradient, [-0.5 + 0.5 / 0.75])


def test_without_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    caplog.set_level(logging.INFO, logger="pyro_elbo_ext")

    def model() -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0).expand([11]).to_event(1))

    # not by monkeypatch, which takes this setting away when it should put it back, and with it the compiler
    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        density = LogDensity(model, (), {}, 0, compile=True)
    np.testing.assert_allclose(density.value_and_grad(np.arange(11.0))[1], -np.arange(11.0))
    assert "the log density is not compiled" in caplog.text
    monkeypatch.undo()
    caplog.clear()
    LogDensity(model, (), {}, 0, compile=True)
    assert "not compiled" not in caplog.text


def test_flat_site() -> None:
    def model() -> None:
        mu = pyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
        pyro.sample("y", dist.Normal(mu, 2.0), obs=torch.tensor(3.0))

    np.testing.assert_allclose(LogDensity(model, (), {}, 0).value_and_grad(np.array([1.0]))[1], [0.5])


def test_enumerated_site_is_summed_out() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Bernoulli(0.25), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(x + 2 * k, 1.0), obs=torch.tensor(0.5))

    value, _ = LogDensity(model, (), {}, 0).value_and_grad(np.array([0.2]))
    normal = lambda v: math.exp(-0.5 * v * v) / math.sqrt(2 * math.pi)  # noqa: E731
    assert value == pytest.approx(math.log(normal(0.2) * (0.75 * normal(0.3) + 0.25 * normal(-1.7))), rel=1e-6)


def test_imputed_data() -> None:
    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 3):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=Y, obs_mask=torch.tensor([True, False, True]))

    posterior = short(model, backend="pyro").posterior
    assert set(posterior.data_vars) == {"mu", "y"}
    assert (posterior["y"].values[..., [0, 2]] == [1.0, 4.0]).all()
    assert posterior["y"].values[..., 1].std() > 0


def test_init_values() -> None:
    density = LogDensity(conjugate, (Y,), {}, 0)
    np.testing.assert_allclose(starting_point(density, np.random.default_rng(0), {"mu": 0.7}), [0.7])
    np.testing.assert_allclose(starting_point(density, np.random.default_rng(0), 0.0), [0.0])


def discrete() -> None:
    pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("k", dist.Poisson(3.0))


def subsampled() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 3, subsample_size=2) as index:
        pyro.sample("y", dist.Normal(x, 1.0), obs=Y[index])


def subsampled_by_hand() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 3, subsample=torch.tensor([0, 2])) as index:
        pyro.sample("y", dist.Normal(x, 1.0), obs=Y[index])


def no_latent() -> None:
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))


def nan_data() -> None:
    pyro.sample("y", dist.Normal(pyro.sample("x", dist.Normal(0.0, 1.0)), 1.0), obs=torch.tensor(torch.nan))


def outside() -> None:
    pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("bad", dist.Exponential(1.0), obs=torch.tensor(-1.0))


def impossible() -> None:
    pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("f", torch.tensor(-torch.inf))


def infinite_gradient() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("f", torch.sqrt(x - x))


def random_density() -> None:
    pyro.factor("f", torch.randn(()) * pyro.sample("x", dist.Normal(0.0, 1.0)))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (discrete, "'k' is discrete"),
        (subsampled, "plate 'rows' subsamples 2 of 3"),
        (subsampled_by_hand, "plate 'rows' subsamples 2 of 3"),
        (no_latent, "no continuous latent site"),
        (nan_data, "'y' has NaN in 1 of 1"),
        (outside, "observed site 'bad' has data outside the support of its Exponential"),
        (impossible, "site 'f' is -inf"),
        (infinite_gradient, "no starting point .* in 100 tries: the gradient with respect to site 'x' is not finite"),
        (random_density, "differs between two runs"),
    ],
)
def test_bad_models(model: Callable[[], None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        short(model, backend="pyro")


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"num_samples": 0}, ValueError, "num_samples must be at least 1"),
        ({"num_samples": 2.5}, TypeError, "num_samples must be an integer"),
        ({"warmup": -1}, ValueError, "warmup must be at least 0"),
        ({"chains": True}, TypeError, "chains must be an integer"),
        ({"chains": 0}, ValueError, "chains must be at least 1"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"seed": 2**32}, ValueError, "seed must be below"),
        ({"target_accept": 1.0}, ValueError, "target_accept must be between"),
        ({"cores": 0}, ValueError, "cores must be at least 1"),
        ({"cores": 1.5}, TypeError, "cores must be an integer"),
        ({"max_tree_depth": 0}, ValueError, "max_tree_depth must be at least 1"),
        ({"backend": "stan"}, ValueError, "backend must be"),
        ({"compile": "yes"}, ValueError, "compile must be"),
        ({"init": -1.0}, ValueError, "init must be"),
        ({"init": {"nu": 1.0}}, ValueError, "init names 'nu'"),
        ({"init": {"mu": [1.0, 2.0]}}, ValueError, "init for 'mu' has shape"),
        ({"init": {"mu": math.nan}}, ValueError, "init for 'mu' is outside"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        short(conjugate, Y, **{"backend": "pyro"} | kwargs)


def test_model_must_be_callable() -> None:
    with pytest.raises(TypeError, match="model must be callable"):
        short("model")  # type: ignore[arg-type]


@pytest.mark.skipif(not NUTPIE, reason="nutpie is not installed")
def test_draws_do_not_depend_on_cores_or_on_who_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    without_python = samplers.without_python

    def watched(*args: Any) -> Any:
        calls.append(without_python(*args))
        return calls[-1]

    monkeypatch.setattr(samplers, "without_python", watched)
    one, two = (short(conjugate, Y, backend="nutpie", compile=True, cores=cores) for cores in (1, 2))
    assert None not in calls
    monkeypatch.setattr(samplers, "without_python", lambda *_: None)
    called_by_python = short(conjugate, Y, backend="nutpie", compile=True)
    for other in (two, called_by_python):
        np.testing.assert_array_equal(one.posterior["mu"], other.posterior["mu"])
        np.testing.assert_array_equal(one.sample_stats["lp"], other.sample_stats["lp"])


@pytest.mark.skipif(not NUTPIE, reason="nutpie is not installed")
@pytest.mark.parametrize("compile", [False, True])
def test_interrupted_nutpie_keeps_draws(monkeypatch: pytest.MonkeyPatch, compile: bool) -> None:
    from nutpie.sample import _BackgroundSampler

    chains = 2 if compile else 1
    seen: list[int] = []

    def wait(sampler: Any) -> None:
        while len(seen) < chains or min(seen) < 60:
            time.sleep(0.01)
            seen[:] = [batch.num_rows for batch in sampler.inspect().get_arrow_trace()[0]]
        raise KeyboardInterrupt

    monkeypatch.setattr(_BackgroundSampler, "wait", wait)
    with pytest.warns(UserWarning, match=rf"interrupted: \d+ of 1000000 draws are kept, in \d of {chains} chains"):
        data = short(conjugate, Y, backend="nutpie", num_samples=1_000_000, chains=chains, cores=2, compile=compile)
    # compiled chains ran at the same time: both had draws before one was done with its 40 + 1,000,000, warmup included
    assert max(seen) < 1_000_040
    kept, draws = data.posterior["mu"].shape
    assert 0 < draws < 1_000_000
    assert data.sample_stats["lp"].shape == (kept, draws)
    assert data.posterior.attrs["interrupted"] == 1


def test_interrupted_pyro_keeps_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    sample, calls = samplers.RecordingNUTS.sample, iter(range(10**6))

    def interrupted(kernel: Any, params: Any) -> Any:
        if next(calls) == 40 + 25:
            raise KeyboardInterrupt
        return sample(kernel, params)

    monkeypatch.setattr(samplers.RecordingNUTS, "sample", interrupted)
    with pytest.warns(UserWarning, match="interrupted: 25 of 40 draws are kept, in 1 of 2 chains"):
        data = short(conjugate, Y, backend="pyro")
    assert data.posterior["mu"].shape == (1, 25)


def test_interrupted_before_the_first_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(kernel: Any, params: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(samplers.RecordingNUTS, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt, match="before the first draw"):
        short(conjugate, Y, backend="pyro")


def test_chains_that_keep_most_draws() -> None:
    def drawn(*lengths: int) -> tuple[list[int], tuple[int, ...]]:
        points = [np.zeros((n, 3)) for n in lengths]
        kept, rectangle, _ = samplers.Draws(points, [{"lp": np.zeros(n)} for n in lengths], True).rectangle()
        return kept, rectangle.shape

    assert drawn(10, 10, 2, 0) == ([0, 1], (2, 10, 3))
    assert drawn(10, 8, 9) == ([0, 1, 2], (3, 8, 3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_log_density_is_sampled_without_being_made_again(backend: Any) -> None:
    data = torch.tensor([0.5, 1.5, 2.5])

    def model(x: torch.Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    density = compiled_log_density(model, data)
    options = {"num_samples": 200, "warmup": 200, "chains": 2, "seed": 4, "progress": False, "backend": backend}
    one, other = run_nuts(density, **options), run_nuts(density, **options)
    np.testing.assert_array_equal(one.posterior["mean"], other.posterior["mean"])
    np.testing.assert_array_equal(one.observed_data["x"], data)
    # the posterior is N(4.5 / 4, 1/4); 4 standard errors
    size = float(az.ess(one, var_names=["mean"])["mean"])
    assert abs(float(one.posterior["mean"].mean()) - 4.5 / 4) < 4 * 0.5 / size**0.5
    with pytest.raises(TypeError, match="pass no others"):
        run_nuts(density, data)


@pytest.mark.parametrize("backend", ["auto", "pyro"])
@pytest.mark.parametrize("warmup", [0, 1])
def test_few_draws_and_no_warmup(backend: str, warmup: int) -> None:
    data = run_nuts(
        lambda: pyro.sample("a", dist.Normal(0.0, 1.0)), num_samples=1, warmup=warmup, chains=2, backend=backend,
        progress=False, compile=False,
    )  # fmt: skip
    posterior = dataset_of(data)
    assert posterior["a"].shape == (2, 1)
    assert np.isfinite(posterior["a"]).all()
    assert posterior.attrs["inference_library"] == ("nutpie" if backend == "auto" and warmup and NUTPIE else "pyro")


@pytest.mark.skipif(not NUTPIE, reason="needs nutpie")
def test_nutpie_without_warmup_is_refused() -> None:
    with pytest.raises(ValueError, match=r"warmup must be at least 1 with nutpie.*backend='pyro'"):
        run_nuts(lambda: pyro.sample("a", dist.Normal(0.0, 1.0)), warmup=0, backend="nutpie", compile=False)


def test_a_panic_of_nutpie_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its exceptions are none of Exception; one that is real: no warmup, past the check."""
    nutpie = pytest.importorskip("nutpie")
    sample = nutpie.sample
    monkeypatch.setattr(nutpie, "sample", lambda *args, **kwargs: sample(*args, **{**kwargs, "tune": 0}))
    with pytest.raises(RuntimeError, match=r"nutpie has failed.*backend='pyro'"):
        run_nuts(
            lambda: pyro.sample("a", dist.Normal(0.0, 1.0)), num_samples=2, warmup=1, chains=1, backend="nutpie",
            progress=False, compile=False,
        )  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "pyro"])
@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("num_samples", 0, ValueError),
        ("num_samples", -1, ValueError),
        ("num_samples", 2.0, TypeError),
        ("num_samples", True, TypeError),
        ("warmup", -1, ValueError),
        ("warmup", 0.5, TypeError),
        ("warmup", False, TypeError),
        ("chains", 0, ValueError),
        ("chains", -2, ValueError),
        ("chains", "2", TypeError),
        ("cores", 0, ValueError),
        ("max_tree_depth", 0, ValueError),
    ],
)
def test_numbers_of_draws_are_checked_for_every_sampler(backend: str, name: str, value: Any, error: type) -> None:
    with pytest.raises(error, match=name):
        run_nuts(lambda: pyro.sample("a", dist.Normal(0.0, 1.0)), backend=backend, compile=False, **{name: value})
