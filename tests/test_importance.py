from __future__ import annotations

import math
import signal
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from torch import Tensor

from pyro_elbo_ext import evidence_bounds, psis_khat
from pyro_elbo_ext.demo import centered, load_eight_schools, noncentered
from pyro_elbo_ext.density.log_density import LogDensity
from pyro_elbo_ext.evidence.importance import ImportanceSample
from pyro_elbo_ext.evidence.scoring import Scorer
from pyro_elbo_ext.inference_data.export import dataset_of
from tests.evidence_oracles import GAUSSIAN


def reference_khat(log_weights: np.ndarray) -> float:
    """By the installed ArviZ, called as its documentation says."""
    import arviz

    if hasattr(arviz, "psislw"):
        return float(arviz.psislw(log_weights)[1])
    from arviz_stats.base import array_stats

    return float(array_stats.psislw(-log_weights)[1])


def local_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, torch.ones(2)).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def local_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, None] / 3, torch.tensor([0.3, 1.0])).to_event(1))


def looping_model() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    loc = z if float(z.detach()) > -100 else -z  # what torch.vmap cannot do
    pyro.sample("x", dist.Normal(loc, 0.5), obs=torch.tensor(10.0))


@pytest.mark.parametrize("name", ["narrow", "very_narrow", "wide", "shifted", "prior"])
def test_weights_and_khat_are_those_of_the_definition(name: str) -> None:
    found = psis_khat(GAUSSIAN.model, GAUSSIAN.guides[name][0], num_draws=2000, seed=1)
    z = found.draws["z"].double()
    log_p = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 0.5).log_prob(torch.tensor(10.0))
    np.testing.assert_allclose(found.log_p, log_p, rtol=1e-5)
    np.testing.assert_array_equal(found.log_weights, found.log_p - found.log_q)
    assert found.khat == reference_khat(found.log_weights)
    frame = found.per_draw()
    assert frame["weight"].sum() == pytest.approx(1)
    assert frame["smoothed_weight"].sum() == pytest.approx(1)
    assert found.ess == pytest.approx(1 / (frame["smoothed_weight"] ** 2).sum())
    assert 1 <= found.ess <= 2000


def test_exact_guide_has_bounded_weights_in_full_number() -> None:
    found = psis_khat(GAUSSIAN.model, GAUSSIAN.guides["exact"][0], seed=0)
    assert found.khat == -math.inf  # weights constant but for rounding, for which ArviZ would find a tail
    assert found.ess == pytest.approx(1000)
    assert found.log_weights.mean() == pytest.approx(GAUSSIAN.log_evidence, abs=1e-4)


@pytest.mark.parametrize(("draws", "threshold"), [(10, 0.0), (100, 0.5), (1000, 2 / 3), (10_000, 0.7)])
def test_threshold(draws: int, threshold: float) -> None:
    assert psis_khat(GAUSSIAN.model, GAUSSIAN.guides["wide"][0], num_draws=draws, seed=0).threshold == pytest.approx(
        threshold
    )


def test_same_seed_same_draws_and_generators_left() -> None:
    before = torch.get_rng_state()
    first, second = (psis_khat(GAUSSIAN.model, GAUSSIAN.guides["wide"][0], num_draws=50, seed=3) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    np.testing.assert_array_equal(first.log_weights, second.log_weights)


def test_batches_and_loops_give_the_same_densities(caplog: pytest.LogCaptureFixture) -> None:
    guide = GAUSSIAN.guides["wide"][0]
    batched = psis_khat(GAUSSIAN.model, guide, num_draws=60, batch_size=25, seed=0)
    assert batched.looped is None
    assert batched.num_draws == 60
    looped = psis_khat(looping_model, guide, num_draws=60, seed=0)
    assert looped.looped is not None
    assert "reads a drawn value" in looped.looped
    z = looped.draws["z"].double()
    expected = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 0.5).log_prob(torch.tensor(10.0))
    np.testing.assert_allclose(
        looped.log_p, expected, rtol=1e-5, atol=1e-4
    )  # in single precision, of terms that cancel


def test_local_khat_is_that_of_the_data_one_by_one() -> None:
    x = torch.tensor([0.3, -1.0, 2.5, 0.0])
    found = psis_khat(local_model, local_guide, x, seed=0)
    weights = found.local["data"]
    np.testing.assert_allclose(weights.sum(1), found.log_weights, rtol=1e-5, atol=1e-5)
    z = found.draws["z"].double()
    for i in range(4):
        own = (
            dist.Normal(0.0, 1.0).log_prob(z[:, i]).sum(-1)
            + dist.Normal(z[:, i].sum(-1), 1.0).log_prob(x[i])
            - dist.Normal(x[i] / 3, torch.tensor([0.3, 1.0])).log_prob(z[:, i]).sum(-1)
        )
        np.testing.assert_allclose(weights[:, i], own, rtol=1e-4, atol=1e-4)
        assert found.local_khat["data"][i] == reference_khat(weights[:, i])
    frame = found.to_dataframe()
    assert list(frame["index"].dropna()) == [0, 1, 2, 3]
    assert frame["khat"][0] == found.khat
    assert "plate 'data'" in repr(found)


def test_no_local_khat_where_the_model_does_not_factorize() -> None:
    data = load_eight_schools()
    args = torch.tensor(data["sigma"]), torch.tensor(data["y"])
    found = psis_khat(centered, AutoNormal(centered), *args, num_draws=100, seed=0)
    assert found.local == {}
    assert "'mu'" in found.not_local["school"]

    def coupled() -> None:
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.sum(), 1.0), obs=torch.tensor(2.0))

    found = psis_khat(coupled, AutoNormal(coupled), num_draws=100, seed=0)
    assert found.local == {}
    assert "'x'" in found.not_local["data"]


def test_resampled_draws_are_the_posteriors() -> None:
    found = psis_khat(GAUSSIAN.model, GAUSSIAN.guides["wide"][0], num_draws=8000, seed=0)
    data = found.resample(4000, seed=1)
    posterior = dataset_of(data)
    z = posterior["z"]
    assert z.dims == ("chain", "draw")
    error = math.sqrt(0.2 * (1 / found.ess + 1 / 4000))
    assert abs(float(z.mean()) - 8.0) < 4 * error
    assert abs(float(z.std()) / math.sqrt(0.2) - 1) < 4 * math.sqrt((1 / found.ess + 1 / 4000) / 2)
    assert posterior.attrs["khat"] == found.khat
    stats = dataset_of(data, "sample_stats")
    source = stats["source_draw"].values[0]
    np.testing.assert_array_equal(z.values[0], found.draws["z"].numpy()[source])
    without = dataset_of(found.resample(100, seed=1, replace=False), "sample_stats")["source_draw"].values
    assert len(np.unique(without)) == 100


def test_resampled_draws_have_plates_and_deterministic_sites() -> None:
    data = load_eight_schools()
    args = torch.tensor(data["sigma"]), torch.tensor(data["y"])
    found = psis_khat(noncentered, AutoNormal(noncentered), *args, num_draws=50, seed=0)
    posterior = dataset_of(found.resample(30, seed=0))
    assert posterior["theta"].dims == ("chain", "draw", "school")
    expected = posterior["mu"].values[..., None] + posterior["tau"].values[..., None] * posterior["z"].values
    np.testing.assert_allclose(posterior["theta"].values, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "autoguide", [AutoNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal, AutoIAFNormal]
)
def test_a_guides_own_draws_score_the_same_when_given(autoguide: type) -> None:
    data = load_eight_schools()
    args = torch.tensor(data["sigma"]), torch.tensor(data["y"])
    guide = autoguide(centered)
    guide(*args)
    found = psis_khat(centered, guide, *args, num_draws=50, seed=0)
    scores = Scorer(centered, guide, args, {}, 20, False).at(found.draws)
    np.testing.assert_allclose(scores.log_q, found.log_q, atol=1e-3)
    np.testing.assert_allclose(scores.log_p, found.log_p, atol=1e-3)


@pytest.mark.slow
def test_eight_schools_above_and_below_the_threshold() -> None:
    data = load_eight_schools()
    args = torch.tensor(data["sigma"]), torch.tensor(data["y"])
    khats = []
    for model in (centered, noncentered):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AutoNormal(model)
        svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.998}), Trace_ELBO())
        with pyro.validation_enabled(False):
            for _ in range(1500):
                svi.step(*args)
        khats.append(psis_khat(model, guide, *args, num_draws=10_000, seed=0).khat)
    assert khats[0] > 0.7
    assert khats[1] < 0.7


def test_draws_outside_the_support_have_weight_zero() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Uniform(-1.0, 1.0, validate_args=False))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.3))

    def guide() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pyro.validation_enabled(False):
        found = psis_khat(model, guide, num_draws=1000, seed=0)
    outside = int((found.draws["z"].abs() > 1).sum())
    assert outside > 100
    assert found.num_zero == outside
    assert "outside the model's support" in repr(found)
    assert np.isfinite(found.ess)

    def nowhere() -> None:
        pyro.sample("z", dist.Normal(50.0, 1.0))

    with pyro.validation_enabled(False), pytest.raises(ValueError, match="outside the model's support"):
        psis_khat(model, nowhere, num_draws=100, seed=0)


def _nan_model() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0, validate_args=False), obs=torch.tensor(float("nan")))


def _nan_guide() -> None:
    pyro.sample("z", dist.Normal(torch.tensor(float("nan")), 1.0))


def _auxiliary_guide() -> None:
    r = pyro.sample("r", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
    pyro.sample("z", dist.Normal(r, 1.0))


def _scaled_guide() -> None:
    with pyro.poutine.scale(scale=0.5):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def _subsampling_model() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 10, subsample_size=2) as index:
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(10)[index])


def _other_guide() -> None:
    pyro.sample("y", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        (_nan_model, GAUSSIAN.guides["wide"][0], "'x'"),
        (GAUSSIAN.model, _nan_guide, "'z'"),
        (GAUSSIAN.model, _auxiliary_guide, "'r' is an auxiliary draw"),
        (GAUSSIAN.model, _scaled_guide, "'z' has scale"),
        (GAUSSIAN.model, AutoDelta(GAUSSIAN.model), "'z' it is a point mass"),
        (_subsampling_model, GAUSSIAN.guides["wide"][0], "plate 'data' subsamples 2 of 10"),
        (GAUSSIAN.model, _other_guide, "'z' is latent in the model"),
    ],
)
def test_what_has_no_weights_is_named(model: object, guide: object, message: str) -> None:
    with pytest.raises(ValueError, match=message), pyro.validation_enabled(False):
        psis_khat(model, guide, num_draws=30, seed=0)  # type: ignore[arg-type]


def test_arguments_are_checked() -> None:
    guide = GAUSSIAN.guides["wide"][0]
    with pytest.raises(ValueError, match="num_draws must be at least 1"):
        psis_khat(GAUSSIAN.model, guide, num_draws=0)
    with pytest.raises(TypeError, match="num_draws must be an integer"):
        psis_khat(GAUSSIAN.model, guide, num_draws=10.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model must be callable"):
        psis_khat("model", guide)  # type: ignore[arg-type]
    found = psis_khat(GAUSSIAN.model, guide, num_draws=30, seed=0)
    assert isinstance(found, ImportanceSample)
    with pytest.raises(ValueError, match="use replace=True"):
        found.resample(31, replace=False)
    assert psis_khat(GAUSSIAN.model, guide, num_draws=20, seed=0).khat == math.inf  # four draws are no tail


class TimeOut(Exception):
    pass


def psis(model: Any) -> None:
    psis_khat(model, AutoNormal(model), num_draws=50, batch_size=5, seed=0)


def bounds(model: Any) -> None:
    evidence_bounds(model, AutoNormal(model), num_draws=50, seed=0)


def density(model: Any) -> None:
    LogDensity(model, (), {}, 0)


@pytest.mark.parametrize("error", [TimeOut, RuntimeError, ValueError])
@pytest.mark.parametrize("way", [psis, bounds, density])
def test_what_a_signal_handler_raises_comes_through(way: Any, error: type[Exception]) -> None:
    """A time-out in the middle of the model is no reason to run it otherwise, nor part of another message."""
    calls, at = 0, math.inf

    def handler(*of: Any) -> None:
        raise error("time is up")

    def model() -> None:
        nonlocal calls
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        calls += 1
        if calls == at:
            signal.raise_signal(signal.SIGUSR1)
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.5))

    way(model)
    number, before = calls, signal.signal(signal.SIGUSR1, handler)
    try:
        for at in range(1, min(number, 8) + 1):
            pyro.clear_param_store()
            calls = 0
            with pytest.raises(error, match=r"^time is up"):
                way(model)
            assert calls == at or error is not TimeOut  # at once
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_the_batch_is_bounded_by_the_size_of_the_data() -> None:
    """A million rows at a thousand draws would take gigabytes."""
    x = torch.zeros(40_000)

    def model() -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide() -> None:
        pyro.sample("mean", dist.Normal(0.0, 0.005))

    scorer = Scorer(model, guide, (), {}, 1000, False)
    assert scorer.batch_size == 8_000_000 // 40_002
    assert len(scorer.draw(250).log_p) == 250
    assert Scorer(model, guide, (), {}, 7, False).batch_size == 7


@pytest.mark.parametrize("looped", [False, True])
def test_draws_of_several_chunks_lie_beside_their_densities(looped: bool) -> None:
    def model() -> None:
        with pyro.plate("row", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            z = z if not looped or float(z[0].detach()) > -100 else -z
            pyro.deterministic("twice", 2 * z)
            pyro.sample("x", dist.Normal(z, 0.5), obs=torch.ones(3))

    def guide() -> None:
        with pyro.plate("row", 3):
            pyro.sample("z", dist.Normal(0.5, 0.7))

    pyro.set_rng_seed(0)
    scorer = Scorer(model, guide, (), {}, 4, False)
    found = scorer.draw(10)
    assert (scorer.looped is not None) is looped
    z = found.values["z"].double()
    prior, likelihood = dist.Normal(0.0, 1.0).log_prob(z), dist.Normal(z, 0.5).log_prob(torch.ones(3).double())
    own = dist.Normal(0.5, 0.7).log_prob(z)
    assert len(set(z[:, 0].tolist())) == 10
    assert torch.equal(found.values["twice"], 2 * found.values["z"])
    np.testing.assert_allclose(found.log_prior, prior.sum(1), rtol=1e-5)
    np.testing.assert_allclose(found.log_p, (prior + likelihood).sum(1), rtol=1e-5)
    np.testing.assert_allclose(found.log_q, own.sum(1), rtol=1e-5)
    np.testing.assert_allclose(found.local["row"], prior + likelihood - own, rtol=1e-4, atol=1e-5)
    again = scorer.at({"z": found.values["z"]})
    np.testing.assert_allclose(again.log_p, found.log_p, rtol=1e-6)
    np.testing.assert_allclose(again.local["row"], found.local["row"], rtol=1e-5, atol=1e-6)


def test_integers_in_some_draws_do_not_cut_off_the_others() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("part", z if float(z.detach()) > 0 else torch.tensor(0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.0))

    def guide() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    pyro.set_rng_seed(0)
    for _ in range(5):
        found = psis_khat(model, guide, num_draws=12)
        assert torch.equal(found.deterministics["part"].float(), found.draws["z"].clamp(min=0))


def test_draws_of_varying_shape_are_no_array() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("part", torch.zeros(1 if float(z.detach()) > 0 else 2))

    def guide() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="site 'part' is not in every draw, or varies in shape"):
        psis_khat(model, guide, num_draws=30, seed=0)
