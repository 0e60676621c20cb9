"""Calibration: ranks of exact, too narrow and biased posteriors; resuming, failures, and executors."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from scipy import stats
from torch import Tensor

from pyro_elbo_ext import DecomposedELBO
from pyro_elbo_ext.calibration import Calibration, TrainGuide, simulate_calibration
from pyro_elbo_ext.calibration.plots import plot_rank_ecdf
from pyro_elbo_ext.calibration.rank_tests import holm, symmetric_ks, uniform_chi2, uniform_ks
from pyro_elbo_ext.inference_data.arviz_statistics import ecdf_band

PRIOR = torch.eye(2, dtype=torch.float64)
NOISE = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
POSTERIOR = (PRIOR.inverse() + NOISE.inverse()).inverse()
X = torch.tensor([0.3, -0.2], dtype=torch.float64)
NUM_DRAWS = 99
LEVEL = 0.001  # of a test that what is calibrated passes: by chance it fails once in a thousand seeds, not in twenty


def correlated(x: Tensor) -> None:
    """z ~ N(0, I), x ~ N(z, NOISE): the posterior is N(POSTERIOR NOISE^-1 x, POSTERIOR)."""
    z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(2, dtype=x.dtype), PRIOR))
    pyro.sample("x", dist.MultivariateNormal(z, NOISE), obs=x)


def posterior(data: dict[str, Tensor]) -> Tensor:
    return POSTERIOR @ NOISE.inverse() @ data["x"]


def exact(data: dict[str, Tensor], *_: Any) -> dict[str, Tensor]:
    return {"z": dist.MultivariateNormal(posterior(data), POSTERIOR).sample((NUM_DRAWS,))}


def mean_field(data: dict[str, Tensor], *_: Any) -> dict[str, Tensor]:
    """The best product of normals: the posterior's mean, and the inverse of the precision's diagonal."""
    scale = POSTERIOR.inverse().diagonal().rsqrt()
    return {"z": dist.Normal(posterior(data), scale).sample((NUM_DRAWS,))}


def biased(data: dict[str, Tensor], *_: Any) -> dict[str, Tensor]:
    shift = 0.4 * POSTERIOR.diagonal().sqrt() * torch.tensor([1.0, 0.0])
    return {"z": dist.MultivariateNormal(posterior(data) + shift, POSTERIOR).sample((NUM_DRAWS,))}


def calibrate(recipe: Callable[..., Any], num_simulations: int = 300, **options: Any) -> Calibration:
    options = {"num_draws": NUM_DRAWS, "progress": False, "seed": 1, **options}
    return simulate_calibration(correlated, recipe, X, num_simulations=num_simulations, **options)


def assert_same(a: Calibration, b: Calibration) -> None:
    for quantity in ("ranks", "probabilities", "truth", "means", "sds"):
        assert getattr(a, quantity).identical(getattr(b, quantity)), quantity


def test_exact_posterior_passes() -> None:
    found = calibrate(exact)
    assert found.passes(LEVEL)
    table = found.to_dataframe()
    assert list(table.index) == found.parameters == ["z[0]", "z[1]"]
    # z = (mean - truth) / sd is N(0, 1) up to the error of an sd from 99 draws
    assert (table["z_mean"].abs() < 4.5 / 300**0.5).all()
    assert ((table["z_sd"] - 1).abs() < 4.5 / 600**0.5 + 0.01).all()
    # variance of POSTERIOR over that of the prior; the sample variance of 300 truths has a relative error of sqrt(2 / 300)
    assert table["contraction"].to_numpy() == pytest.approx(1 - np.diag(POSTERIOR), abs=4.5 * (2 / 300) ** 0.5 * 0.4)
    assert "ranks look uniform" in found.verdict
    assert "no bias" in found.verdict
    assert "gross errors only" not in found.verdict
    assert "gross errors only" in calibrate(exact, 20).verdict


def test_mean_field_fails_sbc_and_passes_vsbc() -> None:
    found = calibrate(mean_field)
    assert not found.passes(0.001, "sbc")
    assert found.passes(LEVEL, "vsbc")
    assert not found.passes()
    assert "z[0] (too narrow)" in found.verdict


def test_biased_guide_fails_vsbc() -> None:
    found = calibrate(biased)
    assert not found.passes(0.001, "vsbc")
    table = found.to_dataframe()
    # P_q(theta > truth) = Phi(u + 0.4) with u ~ N(0, 1): its mean is Phi(0.4 / sqrt 2)
    bias = stats.norm.cdf(0.4 / 2**0.5) - 0.5
    assert abs(table.loc["z[0]", "bias"] - bias) < 4.5 * table.loc["z[0]", "bias_error"]
    assert table.loc["z[1]", "symmetry_adjusted"] > LEVEL
    assert "not calibrated in z[0] (too high)" in found.verdict
    assert "biased in z[0] (too high)" in found.verdict


def test_exact_recipe_is_rejected_as_often_as_it_should() -> None:
    """Level of both tests at 5%, from 400 sets of uniform ranks."""
    rng = np.random.default_rng(0)
    ranks = rng.integers(0, NUM_DRAWS + 1, (400, 100))
    for test in (uniform_chi2, uniform_ks):
        rejected = sum(test(row, NUM_DRAWS) < 0.05 for row in ranks)
        assert abs(rejected - 20) < 4.5 * 19**0.5, test.__name__
    rejected = sum(symmetric_ks(2 * row - NUM_DRAWS)[1] < 0.05 for row in ranks)
    assert rejected < 20 + 4.5 * 19**0.5  # a discrete statistic: at most 5%
    assert rejected > 4


@pytest.mark.parametrize("deviations", [[3, -1, 2, 5, 7, -4], [1, 1, -1, 3, 3, 2, 0, -3], [2, 2, 2, 2], [0, 0]])
def test_symmetry_by_enumeration(deviations: list[int]) -> None:
    values = np.array(deviations)
    distance, p_value = symmetric_ks(values)
    assert distance == pytest.approx(stats.ks_2samp(values, -values).statistic, abs=1e-12)
    signs = np.array(list(itertools.product([-1, 1], repeat=values.size)))
    flipped = np.array([symmetric_ks(np.abs(values) * sign)[0] for sign in signs])
    assert p_value == pytest.approx((flipped >= distance - 1e-12).mean(), abs=1e-12)


def test_holm() -> None:
    # by hand: 4 x 0.01, 3 x 0.02 and 2 x 0.03 (no less than the one before), 1 x 0.5
    assert holm(np.array([0.02, 0.5, 0.01, 0.03])) == pytest.approx([0.06, 0.5, 0.04, 0.06])


def test_band_holds_uniform_ranks() -> None:
    points = np.arange(1, 20) / 20
    lower, upper = ecdf_band(100, points, 0.9)
    sample = np.random.default_rng(1).uniform(size=(2000, 100, 1))
    curves = (sample <= points).mean(1)
    inside = ((curves >= lower - 1e-9) & (curves <= upper + 1e-9)).all(1).mean()
    # the band is found from 1000 simulations, and limits of counts are whole
    assert 0.9 - 4.5 * (0.09 / 1000 + 0.09 / 2000) ** 0.5 < inside < 0.97


def test_ties_are_broken_evenly() -> None:
    def coin(x: Tensor) -> None:
        pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def prior(*_: Any) -> dict[str, Tensor]:
        return {"k": dist.Bernoulli(0.5).sample((NUM_DRAWS,))}

    found = simulate_calibration(
        coin, prior, torch.tensor(0.0), num_draws=NUM_DRAWS, num_simulations=300, progress=False
    )
    assert found.passes(LEVEL)
    assert np.unique(found.of("k", "ranks")).size > 80


def test_trained_guide() -> None:
    """The posterior of a mean is normal: a trained AutoNormal hits it; the data are an argument and observed."""

    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("datum", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    recipe = TrainGuide(
        AutoNormal, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(num_particles=5, vectorize_particles=True), 60
    )
    found = simulate_calibration(model, recipe, torch.zeros(5), num_simulations=25, num_draws=19, progress=False)
    assert found.failures.empty
    row = found.to_dataframe().loc["mean"]
    assert row["contraction"] > 0.5  # exact: 1 - 1/6
    assert found.passes(0.01)
    assert not pyro.get_param_store().keys()


@pytest.mark.slow
def test_compiled_training() -> None:
    recipe = TrainGuide(AutoNormal, pyro.optim.Adam({"lr": 0.05}), DecomposedELBO(), 200, compiled=True)
    found = simulate_calibration(correlated, recipe, X, num_simulations=1, num_draws=199, seed=1, progress=False)
    assert found.failures.empty
    reference = calibrate(exact, 1)
    np.testing.assert_array_equal(found.truth["z"], reference.truth["z"])
    # from about the posterior's mean, an sd of 0.7 off at first, to within its error and Adam's wandering
    np.testing.assert_allclose(found.means["z"], reference.means["z"], atol=0.35)
    mean_field_sd = POSTERIOR.inverse().diagonal().rsqrt()
    np.testing.assert_allclose(found.sds["z"][0], mean_field_sd, rtol=0.3)


def test_modules_of_the_program_are_copied() -> None:
    """A guide's network outside the recipe, trained in place: each simulation starts from the untrained one."""
    network = torch.nn.Linear(2, 2).double()
    before = network.weight.detach().clone()

    def recipe(data: dict[str, Tensor], *_: Any) -> dict[str, Tensor]:
        if not torch.equal(network.weight, before):
            raise AssertionError("trained by another simulation")
        with torch.no_grad():
            network.weight += 1
        return exact(data)

    assert calibrate(recipe, 4).failures.empty
    assert torch.equal(network.weight, before)


def test_arguments_hold_the_simulated_data() -> None:
    """An amortized guide gets its data from the argument; the model is conditioned on the same."""
    seen: list[bool] = []

    def recipe(data: dict[str, Tensor], model: Any, x: Tensor, *, noise: float) -> Any:
        trace = pyro.poutine.trace(model).get_trace(x, noise=noise)
        if not (torch.equal(x, data["x"]) and torch.equal(trace.nodes["x"]["value"], x) and not torch.equal(x, X)):
            raise AssertionError("the data are not the simulated ones")
        pyro.param("trained", x.sum())
        return lambda x, noise: pyro.sample("z", dist.MultivariateNormal(posterior({"x": x}), POSTERIOR))

    def model(x: Tensor, noise: float) -> None:
        seen.append("trained" in pyro.get_param_store())
        correlated(x)

    found = simulate_calibration(model, recipe, X, noise=1.0, num_simulations=40, num_draws=19, progress=False)
    assert found.failures.empty
    assert found.passes(0.01)
    assert not any(seen)


def test_data_sites_without_data() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2 * z)
        pyro.sample("x", dist.Normal(z, 1.0))

    def guide_of(data: dict[str, Tensor], model: Any) -> Any:
        assert pyro.poutine.trace(model).get_trace().nodes["x"]["is_observed"]
        return lambda: pyro.sample("z", dist.Normal(data["x"] / 2, 0.5**0.5))

    found = simulate_calibration(
        model,
        guide_of,
        observed_sites=["x"],
        var_names=["z", "twice"],
        num_simulations=40,
        num_draws=19,
        progress=False,
    )
    assert found.failures.empty
    np.testing.assert_array_equal(found.of("z", "ranks"), found.of("twice", "ranks"))
    with pytest.raises(ValueError, match="no observed site"):
        simulate_calibration(model, guide_of)


def interrupted(recipe: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    """The recipe, which is stopped for good at its fourth call."""

    def stops(*args: Any) -> Any:
        calls = folder / "calls"
        count = len(calls.read_text()) if calls.exists() else 0
        if count == 3:
            raise KeyboardInterrupt
        calls.write_text("." * (count + 1))
        return recipe(*args)

    stops.__qualname__ = recipe.__qualname__
    return stops


def test_resume(tmp_path: Path) -> None:
    path = tmp_path / "calibration"
    whole = calibrate(exact, 10)
    with pytest.raises(KeyboardInterrupt):
        calibrate(interrupted(exact, tmp_path), 10, path=path)
    kept = {file: file.stat().st_mtime_ns for file in path.glob("*.npz")}
    assert len(kept) == 3
    assert_same(calibrate(exact, 10, path=path), whole)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert len(list(path.glob("*.npz"))) == 10
    assert not list(path.glob("*.partial"))
    assert_same(calibrate(exact, 12, path=path), calibrate(exact, 12))
    assert_same(calibrate(exact, 5, path=path), calibrate(exact, 5))
    for changed in ({"seed": 2}, {"num_draws": 9}):
        with pytest.raises(ValueError, match=f"another calibration .*{next(iter(changed))}"):
            calibrate(exact, 10, path=path, **changed)
    with pytest.raises(ValueError, match="recipe: exact there, biased now"):
        calibrate(biased, 10, path=path)
    with pytest.raises(ValueError, match="another model or other arguments"):
        simulate_calibration(
            pyro.poutine.do(correlated, {"z": torch.ones(2, dtype=torch.float64)}),
            exact,
            X,
            num_draws=NUM_DRAWS,
            seed=1,
            path=path,
            progress=False,
        )
    with pytest.raises(ValueError, match="holds no calibration"):
        calibrate(exact, 10, path=tmp_path)


def sometimes(data: dict[str, Tensor], *_: Any) -> dict[str, Tensor]:
    if data["x"][0] > 1:
        raise ArithmeticError("x is above 1")
    draws = exact(data)
    return {"z": draws["z"] * float("nan")} if data["x"][0] > 0.5 else draws


def test_failures_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = calibrate(sometimes, 30, path=tmp_path / "kept", progress=True)
    counts = found.failures["error"].value_counts()
    assert counts["ArithmeticError"] > 0
    assert counts["ValueError"] > 0
    assert found.ranks.sizes["simulation"] == 30 - len(found.failures)
    assert not set(found.failures.index) & set(found.ranks["simulation"].values.tolist())
    assert f"{len(found.failures)} failed" in found.verdict
    assert "ArithmeticError: x is above 1" in repr(found)
    assert "ArithmeticError: x is above 1" in found._repr_html_()
    assert "in sometimes" in found.failures["traceback"].iloc[0]
    assert f"failed={len(found.failures)}" in capsys.readouterr().err
    # what failed is tried again, and what is left is the same as without a failure
    again = calibrate(sometimes, 30, path=tmp_path / "kept")
    assert_same(again, found)
    others = calibrate(exact, 30).ranks.sel(simulation=found.ranks["simulation"])
    assert others.identical(found.ranks)


def test_all_fail() -> None:
    with pytest.raises(
        RuntimeError, match=r"all 3 simulations failed, the first with ValueError: the recipe gives no draws"
    ):
        calibrate(lambda *_: {"y": torch.zeros(NUM_DRAWS)}, 3)


class Infinite(Trace_ELBO):
    def loss_and_grads(self, *_: Any, **__: Any) -> float:
        return float("inf")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (lambda *_: {"z": torch.zeros(NUM_DRAWS, 3)}, r"'z' have shape \(99, 3\); they must have \(99, 2\)"),
        (lambda *_: {"z": torch.full((NUM_DRAWS, 2), torch.inf)}, "198 NaN or infinite"),
        (lambda *_: 3, "must be InferenceData"),
        (TrainGuide(AutoNormal, pyro.optim.Adam({"lr": 1e30}), num_steps=9), "Expected parameter scale"),
        (TrainGuide(AutoNormal, pyro.optim.Adam({"lr": 0.1}), Infinite()), "loss is inf at step 0 of 1000"),
    ],
)
def test_bad_recipes(recipe: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        calibrate(recipe, 1)


def with_factor() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("penalty", -z.abs())
    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.0))


def improper() -> None:
    z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.0))


def subsampled() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("datum", 10, subsample_size=2):
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(2))


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (with_factor, {}, ValueError, "factor 'penalty'"),
        (improper, {}, ValueError, "'z' cannot be drawn from the model: ImproperUniform"),
        (subsampled, {}, ValueError, "plate 'datum' subsamples 2 of 10"),
        (lambda: correlated(X), {"var_names": ["w"]}, ValueError, "var_names has 'w'"),
        (lambda: correlated(X), {"observed_sites": ["w"]}, ValueError, "observed_sites has 'w'"),
        (lambda: correlated(X), {"num_simulations": 0}, ValueError, "num_simulations must be at least 1"),
        (lambda: correlated(X), {"num_draws": 1}, ValueError, "num_draws must be at least 2"),
        (lambda: correlated(X), {"seed": -1}, ValueError, "seed must be at least 0"),
        (lambda: correlated(X), {"num_draws": 1.5}, TypeError, "num_draws must be an integer"),
        (lambda: correlated(X), {"dims": {"z": ["simulation"]}}, ValueError, "rename it"),
        (lambda: correlated(X), {"x": 3}, TypeError, "cannot be called"),
        (3, {}, TypeError, "model must be callable"),
    ],
)
def test_bad_inputs(model: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        simulate_calibration(model, exact, **options)


def test_bad_tests() -> None:
    found = calibrate(exact, 20)
    with pytest.raises(ValueError, match="test must be one of"):
        found.passes(test="other")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="alpha"):
        found.passes(0.0)
    with pytest.raises(KeyError, match="'y' was not ranked"):
        found.of("y", "ranks")


def test_random_state_is_left() -> None:
    state = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    pyro.param("mine", torch.tensor(1.0))
    calibrate(exact, 2)
    assert torch.equal(torch.random.get_rng_state(), state[0])
    np.testing.assert_array_equal(np.random.get_state()[1], state[1])  # noqa: NPY002
    assert list(pyro.get_param_store().keys()) == ["mine"]


@pytest.mark.parametrize("backend", ["loky", "threading", "multiprocessing"])
def test_result_does_not_depend_on_the_executor(backend: str) -> None:
    """Multiprocessing cannot hand out results one by one, as Ray cannot: simulations come in rounds."""
    alone = calibrate(exact, 20)
    with joblib.parallel_config(backend=backend, n_jobs=2):
        assert_same(calibrate(exact, 20), alone)


def test_local_dask_cluster() -> None:
    distributed = pytest.importorskip("distributed")
    alone = calibrate(exact, 12)
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None, protocol="inproc://"
        ) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config(backend="dask"),
    ):
        assert_same(calibrate(exact, 12), alone)


def test_labels_and_arviz() -> None:
    found = calibrate(exact, 20, coords={"side": ["left", "right"]}, dims={"z": ["side"]})
    assert found.parameters == ["z[left]", "z[right]"]
    assert found.ranks["z"].dims == ("simulation", "side")
    data = found.to_arviz()
    assert data["prior_sbc"]["z"].sizes == {"chain": 1, "draw": 20, "side": 2}


def test_plots() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    found = calibrate(exact, 20)
    figure = found.plot()
    assert [ax.get_title() for ax in figure.axes[:2]] == ["z[0]", "z[1]"]
    assert "symmetry p = " in figure.axes[2].get_title()
    matplotlib.pyplot.close(figure)
    figure = found.plot(max_parameters=1)
    assert figure.get_suptitle().startswith("the 1 of 2 parameters")
    matplotlib.pyplot.close(figure)


@pytest.mark.parametrize(("errors", "color"), [(0.0, "C0"), (1.0, "C0"), (6.0, "C3")])
def test_ranks_outside_the_band_are_red(errors: float, color: str) -> None:
    """Ranks whose distribution function is off by so many standard errors at 1/2; the band is at 2 to 4."""
    figure = pytest.importorskip("matplotlib.figure").Figure()
    ranks = np.repeat(np.arange(NUM_DRAWS + 1), 4)  # uniform
    upper = np.flatnonzero(ranks >= (NUM_DRAWS + 1) // 2)
    count = round(errors * 0.5 * ranks.size**0.5)  # a standard error of the count below 1/2 is sqrt(N) / 2
    ranks[upper[np.linspace(0, upper.size - 1, count).astype(int)]] -= (NUM_DRAWS + 1) // 2
    ax = plot_rank_ecdf(ranks, NUM_DRAWS, "z", figure.subplots())
    curve = np.asarray(ax.lines[0].get_ydata(), float)
    assert curve.max() == pytest.approx(errors * 0.5 / ranks.size**0.5, abs=1e-12)
    assert ax.lines[0].get_color() == color
