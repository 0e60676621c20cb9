"""Stopping rules on synthetic iterates whose distribution is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.typing import NDArray
from pyro.distributions.transforms import affine_autoregressive
from pyro.infer.autoguide import (
    AutoDelta,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
    AutoStructured,
)
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from pyro_elbo_ext.training.stopping.adaptive import AdaptiveStopping
from pyro_elbo_ext.training.stopping.guide_moments import GuideMoments, Moments, flatten, symmetrized_kl, unflatten
from pyro_elbo_ext.training.stopping.iterates import MAX_BYTES, Iterates, best_window, largest_r_hat, smallest_ess
from pyro_elbo_ext.training.stopping.power_law import fit_power_law, predicted_steps
from pyro_elbo_ext.training.stopping.rules import Decision, FixedSteps, Patience

Array = NDArray[np.float64]


def autoregressive(steps: int, columns: int, seed: int, phi: float = 0.9) -> Array:
    """Stationary AR(1) series of variance 1, shape ``(steps, columns)``."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(steps, columns)) * math.sqrt(1 - phi**2)
    series = np.empty((steps, columns))
    value = rng.normal(size=columns)
    for step in range(steps):
        value = phi * value + noise[step]
        series[step] = value
    return series


@pytest.fixture
def guide() -> Callable[[], None]:
    """Two independent Normals, whose unconstrained parameters are two means and two log sds."""

    def program() -> None:
        loc = pyro.param("loc", torch.zeros(2))
        scale = pyro.param("scale", torch.ones(2), constraint=dist.constraints.positive)
        pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    program()
    return program


def parameters() -> dict[str, Tensor]:
    return dict(pyro.get_param_store()._params)


# ----------------------------------------------------------------------------------------------------------------------
# Iterates


def test_rows_are_means_of_all_that_was_added() -> None:
    values = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = Iterates(3, max_rows=256)
    for value in values:
        kept.add(value)
    assert kept.stride == 4
    assert kept.added == 1000
    assert torch.allclose(kept.rows(), values.reshape(250, 4, 3).mean(1), atol=1e-14, rtol=0)


def test_memory_is_bounded_over_a_million_iterates() -> None:
    kept = Iterates(2)
    row = torch.tensor([1.0, 2.0])
    for _ in range(1_000_000):
        kept.add(row)
    assert kept.added == 1_000_000
    assert 512 <= len(kept.rows()) <= 1024
    assert torch.equal(kept.rows(), row.double().expand(len(kept.rows()), 2))
    wide = Iterates(50_000)
    assert 8 * wide.width * wide.max_rows <= MAX_BYTES
    assert not Iterates.fit(100_000)


@pytest.mark.parametrize("seed", range(5))
def test_stationary_iterates_are_found_and_trending_ones_are_not(seed: int) -> None:
    series = autoregressive(3000, 20, seed)
    window = best_window(series)
    assert window is not None
    assert window.r_hat < 1.1
    assert largest_r_hat(series[-window.length :]) == pytest.approx(window.r_hat, abs=1e-10)
    # one of twenty columns goes on by ten sds in all
    series[:, 7] += np.linspace(0, 10, 3000)
    window = best_window(series)
    assert window is not None
    assert window.r_hat > 1.1


def test_a_window_leaves_out_the_way_to_the_stationary_part() -> None:
    series = autoregressive(1000, 4, 0)
    series[:300] += np.linspace(30, 0, 300)[:, None]
    window = best_window(series)
    assert window is not None
    assert window.r_hat < 1.1
    assert window.length < 750
    assert best_window(series[:40]) is None


def test_effective_size_is_that_of_an_autoregressive_series() -> None:
    series = autoregressive(20_000, 3, 1)
    # (1 - 0.9) / (1 + 0.9) of the draws; the smallest of three estimates, each within some percent
    assert smallest_ess(series) == pytest.approx(20_000 / 19, rel=0.2)
    series[:, 1] = 5.0
    assert smallest_ess(series[:, 1:2]) == 20_000
    assert largest_r_hat(series[:, 1:2]) == 1.0


# ----------------------------------------------------------------------------------------------------------------------
# Distances


def test_symmetrized_kl_is_that_of_the_gaussians() -> None:
    a = Moments(torch.tensor([0.0, 1.0, -2.0]).double(), torch.tensor([0.0, -1.0, 2.0]).double())
    b = Moments(torch.tensor([0.3, 1.0, 5.0]).double(), torch.tensor([0.1, 0.5, 1.0]).double())
    p, q = Normal(a.mean, a.log_sd.exp()), Normal(b.mean, b.log_sd.exp())
    exact = kl_divergence(p, q) + kl_divergence(q, p)
    assert torch.allclose(symmetrized_kl(a, b), exact, rtol=1e-12)
    assert torch.equal(symmetrized_kl(a, a), torch.zeros(3, dtype=torch.float64))


def model() -> None:
    pyro.sample("a", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("b", dist.LogNormal(0.0, 1.0))


@pytest.mark.parametrize("make", [AutoNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal])
def test_moments_of_gaussian_guides_are_exact_and_disturb_nothing(make: Any) -> None:
    pyro.set_rng_seed(0)
    guide = make(model)
    guide()
    held = list(parameters().values())
    moments = GuideMoments(guide, held)
    assert moments.method == "closed form"
    other = flatten(held) + 0.1 * torch.randn(len(flatten(held)))
    before, state = [p.detach().clone() for p in held], torch.get_rng_state()
    found = moments(other)
    assert all(map(torch.equal, held, before))
    assert torch.equal(torch.get_rng_state(), state)
    unflatten(other, held)
    if make is AutoNormal:
        loc = torch.cat([guide.locs.a, guide.locs.b[None]])
        sd = torch.cat([guide.scales.a, guide.scales.b[None]])
    else:
        posterior = guide.get_posterior()
        loc, sd = posterior.mean, posterior.variance.sqrt()
        if make is AutoMultivariateNormal:
            assert isinstance(posterior, MultivariateNormal)
    assert torch.allclose(found.mean, loc.double())
    assert torch.allclose(found.log_sd, sd.double().log())


def test_moments_by_draws_move_with_the_parameters_and_not_with_the_noise() -> None:
    pyro.set_rng_seed(0)
    guide = AutoNormalizingFlow(model, affine_autoregressive)
    guide()
    held = list(parameters().values())
    moments = GuideMoments(guide, held)
    assert moments.method == "draws"
    here = flatten(held)
    assert torch.equal(moments(here).mean, moments(here).mean)
    nearby = moments(here + 1e-3 * torch.randn(here.shape))
    # other draws would be apart by sqrt(2 / 128) sd, 0.0156 squared
    assert 0 < float(symmetrized_kl(moments(here), nearby).max()) < 1e-3


def test_moments_depend_on_every_parameter() -> None:
    """AutoStructured draws auxiliary numbers, and then moves them by a linear map whose weights are parameters."""
    pyro.set_rng_seed(0)
    guide = AutoStructured(model, conditionals={"a": "mvn", "b": "normal"}, dependencies={"b": {"a": "linear"}})
    guide()
    names, held = list(parameters()), list(parameters().values())
    moments = GuideMoments(guide, held)
    here = flatten(held)
    for index, name in enumerate(names):
        start = sum(p.numel() for p in held[:index])
        moved = here.clone()
        moved[start : start + held[index].numel()] += 0.5
        assert float(symmetrized_kl(moments(here), moments(moved)).max()) > 1e-4, name


def test_a_point_estimate_has_no_moments() -> None:
    guide = AutoDelta(model)
    guide()
    with pytest.raises(NotImplementedError, match="points"):
        GuideMoments(guide, list(parameters().values()))
    rule = AdaptiveStopping()
    rule.start(parameters(), guide=guide)
    assert rule.measure.startswith("ELBO")


@pytest.mark.parametrize("power", [0.5, 0.75, 1.0])
def test_the_power_law_predicts_what_obeys_it(power: float) -> None:
    rates = 0.5 ** np.arange(7)
    errors = 3.0 * rates**power
    fit = fit_power_law(list(errors[:-1] - errors[1:]), list(rates[1:]), 0.5)
    assert fit.power == pytest.approx(power, abs=0.05)  # between the least and the greatest, of a posterior
    assert fit.error == pytest.approx(errors[-1], rel=0.15)
    one = fit_power_law([errors[0] - errors[1]], [0.5], 0.5)
    assert one.power == pytest.approx(0.75)
    assert predicted_steps([1000, 2000, 4000], 0.5) == pytest.approx(8000)
    assert predicted_steps([1000], 0.5) == 2000
    assert predicted_steps([4000, 1000], 0.5) == 1000


# ----------------------------------------------------------------------------------------------------------------------
# AdaptiveStopping


def synthetic(rule: AdaptiveStopping, seed: int, drift: float = 0.0) -> Iterator[tuple[int, Tensor, Array]]:
    """Iterates as of an optimizer: around a point as far from the limit, 0, as the learning rate times 0.4.

    Each one is the deviation of two means and two log sds, and its losses.
    """
    rng = np.random.default_rng(seed)
    noise, step = np.zeros(4), 0
    while True:
        rate = rule.factor ** len(rule.phases)
        phi = 1 - 0.3 * rate
        noise = phi * noise + math.sqrt(1 - phi**2) * 0.2 * math.sqrt(rate) * rng.normal(size=4)
        step += rule.every
        value = 0.4 * rate + noise + drift * step
        losses = 10 + value @ value + rng.normal(size=rule.every)
        yield step, torch.tensor(value, dtype=torch.float32), losses


def follow(rule: AdaptiveStopping, seed: int, cap: int, drift: float = 0.0) -> list[tuple[int, Decision]]:
    found = []
    for step, iterate, losses in synthetic(rule, seed, drift):
        decision = rule.observe(step, iterate, losses)
        if decision.action != "continue":
            found.append((step, decision))
        if decision.action == "stop" or step >= cap:
            return found
    raise AssertionError


@pytest.mark.parametrize("seed", range(3))
def test_adaptive_lowers_the_rate_and_stops_near_the_limit(guide: Callable[[], None], seed: int) -> None:
    rule = AdaptiveStopping()
    rule.start(parameters(), guide=guide, learning_rate=0.1)
    assert "closed form" in rule.measure
    decisions = follow(rule, seed, 400_000)
    assert [decision.action for _, decision in decisions] == ["lower"] * (len(decisions) - 1) + ["stop"]
    assert len(decisions) >= 3
    assert rule.converged
    assert decisions[0][1].factor == 0.5
    assert decisions[0][1].parameters is not None
    # the first average: 0.4 off, its Monte Carlo error below 0.1
    assert torch.allclose(decisions[0][1].parameters, torch.full((4,), 0.4), atol=0.2)
    average = rule.average
    assert average is not None
    assert average.dtype == torch.float32
    deviation = symmetrized_kl(GuideMoments(guide, list(parameters().values()))(average), _at_zero())
    assert float(deviation.max()) ** 0.5 < 0.1
    assert "converged" in decisions[-1][1].reason


def _at_zero() -> Moments:
    return Moments(torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))


def test_adaptive_does_not_take_a_drift_for_stationary(guide: Callable[[], None]) -> None:
    rule = AdaptiveStopping()
    rule.start(parameters(), guide=guide)
    # the noise has sd 0.2 and forgets itself within about 3 looks; the drift is 1 sd of the guide in 100 looks
    assert follow(rule, 0, 40_000, drift=0.01 / rule.every) == []
    # the last fifth of a drift from 0 to 20, 0.4 off
    assert torch.allclose(rule.average, torch.full((4,), 18.4), atol=0.2)  # type: ignore[arg-type]
    assert not rule.converged
    assert "R-hat" in rule.status


def test_the_average_is_that_of_the_window(guide: Callable[[], None]) -> None:
    rule = AdaptiveStopping()
    rule.start(parameters(), guide=guide)
    added = []
    for step, iterate, losses in synthetic(rule, 5):
        decision = rule.observe(step, iterate, losses)
        added.append(iterate.double())
        if decision.action == "lower":
            break
    stacked = torch.stack(added)
    window = best_window(stacked.numpy())
    assert window is not None
    assert decision.parameters is not None
    assert torch.allclose(decision.parameters.double(), stacked[-window.length :].mean(0), atol=1e-6)


@pytest.mark.parametrize("cut", [37, 1500])
def test_adaptive_goes_on_from_its_state_bit_for_bit(guide: Callable[[], None], cut: int) -> None:
    whole = AdaptiveStopping()
    whole.start(parameters(), guide=guide)
    seen: list[tuple[int, Tensor, Array]] = []
    expected: list[Decision] = []
    for seen_one in synthetic(whole, 3):
        seen.append(seen_one)
        expected.append(whole.observe(*seen_one))
        if expected[-1].action == "stop" or len(seen) > 20_000:
            break
    assert expected[-1].action == "stop"
    assert len(seen) > cut
    first, second = AdaptiveStopping(), AdaptiveStopping()
    first.start(parameters(), guide=guide)
    for one in seen[:cut]:
        first.observe(*one)
    state = first.state_dict()
    for one in seen[cut : cut + 50]:
        first.observe(*one)  # which must not change the state that was read
    second.start(parameters(), guide=guide)
    second.load_state_dict(state)
    for one, decision in zip(seen[cut:], expected[cut:], strict=True):
        found = second.observe(*one)
        assert found[:3] == decision[:3]
        assert (found.parameters is None) == (decision.parameters is None)
        assert found.parameters is None or torch.equal(found.parameters, decision.parameters)  # type: ignore[arg-type]
    assert torch.equal(second.average, whole.average)  # type: ignore[arg-type]


@pytest.mark.parametrize("many", [False, True])
def test_adaptive_by_elbo(many: bool) -> None:
    """Without a guide: the loss's excess is proportional to the learning rate, 16 nats at the first."""
    held = {"w": torch.zeros(100_000 if many else 2)}
    rule = AdaptiveStopping()
    rule.start(held)
    assert rule.measure.startswith("ELBO")
    rng = np.random.default_rng(0)
    for step in range(20, 200_000, 20):
        rate = rule.factor ** len(rule.phases)
        iterate = torch.full_like(held["w"], rate)
        decision = rule.observe(step, iterate, 100 + 16 * rate + rng.normal(size=20))
        if decision.action == "stop":
            break
    assert rule.converged
    # 16 nats fall below two standard errors after some halvings; a run of 2000 steps tells 0.06 nats from none
    assert 5 <= len(rule.phases) <= 10
    assert rule.average is not None
    assert torch.allclose(rule.average, torch.tensor(0.5 ** (len(rule.phases) - 1)))


def test_a_constant_loss_is_stationary() -> None:
    rule = AdaptiveStopping()
    rule.start({"w": torch.zeros(1)})
    actions = [rule.observe(step, torch.ones(1), np.full(20, 3.0)).action for step in range(20, 4001, 20)]
    assert "stop" in actions


def test_adaptive_refuses_what_is_not_finite(guide: Callable[[], None]) -> None:
    rule = AdaptiveStopping()
    rule.start(parameters(), guide=guide)
    rule.observe(20, torch.zeros(4), np.ones(20))
    before = rule.state_dict()
    with pytest.raises(ValueError, match=r"parameter 'scale' is NaN or infinite after step 40; .* no note"):
        rule.observe(40, torch.tensor([0.0, 0.0, float("nan"), 0.0]), np.ones(20))
    with pytest.raises(ValueError, match="losses of the steps up to 40"):
        rule.observe(40, torch.zeros(4), np.array([1.0, math.inf]))
    with pytest.raises(ValueError, match=r"shape \(3,\), the parameters 4 numbers"):
        rule.observe(40, torch.zeros(3), np.ones(20))
    after = rule.state_dict()
    assert before["iterates"]["added"] == after["iterates"]["added"] == 1
    assert torch.equal(before["iterates"]["rows"], after["iterates"]["rows"])


@pytest.mark.parametrize(
    "bad",
    [
        {"accuracy": 0.0},
        {"factor": 1.0},
        {"r_hat": 1.0},
        {"min_ess": 0},
        {"every": 0},
        {"elbo_tolerance": -1.0},
        {"inefficiency": math.nan},
    ],
    ids=str,
)
def test_bad_arguments_of_adaptive(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        AdaptiveStopping(**bad)
    with pytest.raises(ValueError, match="no parameters"):
        AdaptiveStopping().start({})


# ----------------------------------------------------------------------------------------------------------------------
# Patience and FixedSteps


def validate(rule: Patience, elbos: list[float], held: Tensor) -> list[str]:
    rule.start({"w": held})
    actions = []
    for step, elbo in enumerate(elbos):
        held.fill_(step)
        actions.append(rule.observe_validation(step, elbo).action)
    return actions


def test_patience_stops_after_so_many_validations_without_improvement() -> None:
    held = torch.zeros(2)
    rule = Patience(3)
    actions = validate(rule, [-9.0, -5.0, -6.0, -5.0, -4.0, -4.0, -4.5, -7.0], held)
    assert actions == ["continue"] * 7 + ["stop"]  # an equal value is no improvement, as in Keras and Lightning
    assert rule.converged
    assert torch.equal(rule.average, torch.full((2,), 4.0))  # type: ignore[arg-type]
    assert torch.equal(held, torch.full((2,), 7.0))
    assert rule.status == "patience 3/3"


def test_patience_wants_more_than_min_delta() -> None:
    assert validate(Patience(2, 1.0), [-9.0, -8.5, -8.0], torch.zeros(1)) == ["continue", "continue", "stop"]
    assert validate(Patience(2, 1.0), [-9.0, -8.5, -7.9], torch.zeros(1)) == ["continue"] * 3
    assert validate(Patience(1, 0.1, relative=True), [-100.0, -91.0], torch.zeros(1)) == ["continue", "stop"]
    assert validate(Patience(1, 0.1, relative=True), [-100.0, -89.0], torch.zeros(1)) == ["continue"] * 2
    assert validate(Patience(1, 0.1, relative=True), [-math.inf, -89.0], torch.zeros(1)) == ["continue"] * 2


def test_patience_goes_on_from_its_state() -> None:
    held = torch.zeros(2)
    rule = Patience(2)
    validate(rule, [-3.0, -4.0], held)
    other = Patience(2)
    other.start({"w": held})
    other.load_state_dict(rule.state_dict())
    assert other.observe_validation(2, -4.0).action == "stop"
    assert torch.equal(other.average, torch.zeros(2))  # type: ignore[arg-type]


def test_bad_arguments_of_patience() -> None:
    for patience in (0, -1):
        with pytest.raises(ValueError, match="patience must be at least 1"):
            Patience(patience)
    with pytest.raises(TypeError, match="patience must be an integer"):
        Patience(1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="min_delta"):
        Patience(1, -0.1)
    with pytest.raises(ValueError, match="start the rule"):
        Patience(1).observe_validation(0, -1.0)
    rule = Patience(1)
    rule.start({"w": torch.zeros(1)})
    with pytest.raises(ValueError, match="validation ELBO after step 7 is nan"):
        rule.observe_validation(7, math.nan)
    assert rule.average is None
    with pytest.raises(ValueError, match="parameter 'w'"):
        rule.observe(3, torch.tensor([math.inf]), np.ones(3))


def test_fixed_steps_average_the_second_half() -> None:
    iterates = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    rule = FixedSteps(1000, "tail", every=20)
    rule.start({"w": torch.zeros(3)})
    for index, iterate in enumerate(iterates):
        if index == 30:  # goes on from its state
            state = rule.state_dict()
            rule = FixedSteps(1000, "tail", every=20)
            rule.start({"w": torch.zeros(3)})
            rule.load_state_dict(state)
        decision = rule.observe(20 * (index + 1), iterate, np.ones(20))
        assert decision.action == ("stop" if index == 49 else "continue")
    assert torch.allclose(rule.average, iterates[25:].mean(0), atol=1e-6)  # type: ignore[arg-type]
    assert not rule.converged
    plain = FixedSteps(20)
    plain.start({"w": torch.zeros(3)})
    assert plain.observe(20, iterates[0], np.ones(20)).action == "stop"
    assert plain.average is None


def test_bad_arguments_of_fixed_steps() -> None:
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        FixedSteps(0)
    with pytest.raises(ValueError, match='average must be None or "tail"'):
        FixedSteps(1, "mean")  # type: ignore[arg-type]
