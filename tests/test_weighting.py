"""Weights of kl_prior: schedules, weights by site, free bits and constrained reconstruction."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.optim import Adam, PyroLRScheduler, RMSprop  # type: ignore[attr-defined]  # Pyro defines it at run time
from torch import Tensor

from pyro_elbo_ext import CompiledSVI, DecomposedELBO, History
from pyro_elbo_ext.bounds.weighting import Constant, CyclicalWarmup, Geco, LinearWarmup, check_reaches_one

DATA = torch.tensor([0.5, -1.0, 2.0, 1.5, -0.5, 3.0], dtype=torch.float64)
BATCH = DATA[:3]
LOC = {"a": 0.7, "b": 0.2}
SCALE = {"a": 0.6, "b": 0.5}


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    yield
    torch.set_default_dtype(before)
    pyro.clear_param_store()


def model(x: Tensor) -> None:
    """A global ``a`` and a local ``b`` in a plate of 6 of which 3 are seen."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 6, subsample=torch.arange(3)):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(a + b, 0.5), obs=x)


def guide(x: Tensor) -> None:
    loc = {name: pyro.param(f"loc_{name}", torch.tensor(value)) for name, value in LOC.items()}
    scale = {
        name: pyro.param(f"scale_{name}", torch.tensor(value), constraint=dist.constraints.positive)
        for name, value in SCALE.items()
    }
    pyro.sample("a", dist.Normal(loc["a"], scale["a"]))
    with pyro.plate("data", 6, subsample=torch.arange(3)):
        pyro.sample("b", dist.Normal(loc["b"], scale["b"]).expand([3]))


def kl_by_hand(site: str) -> float:
    """KL(N(loc, scale) || N(0, 1)), for each element."""
    return 0.5 * (SCALE[site] ** 2 + LOC[site] ** 2 - 1) - math.log(SCALE[site])


def evaluated(objective: Any, *, seed: int = 0, programs: Any = None) -> tuple[float, dict[str, Tensor]]:
    """Loss, and its gradient by parameter, unconstrained."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    loss = objective.loss_and_grads(*(programs or (model, guide)), BATCH)
    store = pyro.get_param_store()
    return loss, {name: store._params[name].grad for name in store.keys()}  # noqa: SIM118


def gradients_by_hand(weights: dict[str, float]) -> dict[str, Tensor]:
    """Of ``sum w kl_prior`` in the location and the log of the scale; b stands for six."""
    count = {"a": 1, "b": 6}
    gradients = {}
    for site, weight in weights.items():
        gradients[f"loc_{site}"] = torch.tensor(weight * count[site] * LOC[site])
        gradients[f"scale_{site}"] = torch.tensor(weight * count[site] * (SCALE[site] ** 2 - 1))
    return gradients


# ----------------------------------------------------------------------------------------------------------------------
# Schedules


def test_linear_warmup() -> None:
    schedule = LinearWarmup(4, start=0.2)
    assert [schedule(step) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert schedule.reaches_one_at == 4
    assert LinearWarmup(4)(0) == 0.0


def test_cyclical_warmup() -> None:
    schedule = CyclicalWarmup(8, ramp=0.5)
    assert [schedule(step) for step in range(10)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 0.0, 0.25]
    assert schedule.reaches_one_at is None
    ended = CyclicalWarmup(8, num_cycles=2)
    assert ended.reaches_one_at == 12
    assert [ended(step) for step in range(16)] == [schedule(step) for step in range(16)]
    assert {ended(step) for step in range(16, 40)} == {1.0}


@pytest.mark.parametrize(
    "schedule", [LinearWarmup(7), LinearWarmup(1, 1.0), CyclicalWarmup(7, 3, 0.3, 0.1), Constant(1)]
)
def test_the_weight_stays_one_from_where_it_says(schedule: Any) -> None:
    at = schedule.reaches_one_at
    assert all(schedule(step) == 1 for step in range(at, at + 50))
    assert at == 0 or schedule(at - 1) < 1


@pytest.mark.parametrize("schedule", [LinearWarmup(7, 0.5), CyclicalWarmup(8, 3), CyclicalWarmup(9), Constant(0.25)])
def test_schedules_are_values(schedule: Any) -> None:
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert eval(repr(schedule)) == schedule
    assert hash(schedule) == hash(pickle.loads(pickle.dumps(schedule)))
    with pytest.raises(AttributeError):
        schedule.start = 0.1


@pytest.mark.parametrize(
    ("kl_weight", "num_steps"),
    [
        (0.5, 10),
        (Constant(0.5), 10),
        (LinearWarmup(9), 10),
        (CyclicalWarmup(10), 20),
        (CyclicalWarmup(10, num_cycles=1), 15),
        (lambda step: min(1.0, step / 5), 6),
        ({"a": LinearWarmup(5), "b": 0.5}, 6),
        (Geco(-1.0), 1),
    ],
)
def test_a_warm_up_that_reaches_one_passes(kl_weight: Any, num_steps: int) -> None:
    check_reaches_one(kl_weight, num_steps)


@pytest.mark.parametrize(
    ("kl_weight", "num_steps", "said"),
    [
        (LinearWarmup(10), 10, "kl_weight is 0.9 at the last step, 9.*at least 11 steps"),
        (CyclicalWarmup(10), 25, "0.8.*after step 5 of 10"),
        (CyclicalWarmup(10, num_cycles=3), 25, "at least 26 steps"),
        (lambda step: min(1.0, step / 5), 5, "0.8.*run more steps"),
        ({"a": LinearWarmup(5), "b": LinearWarmup(50)}, 10, "of site 'b' is 0.18"),
        (lambda step: math.nan, 5, "finite"),
    ],
)
def test_a_warm_up_that_does_not_reach_one_is_an_error(kl_weight: Any, num_steps: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_reaches_one(kl_weight, num_steps)


def test_a_run_that_goes_on_counts_on() -> None:
    check_reaches_one(LinearWarmup(10), 5, first_step=6)
    with pytest.raises(ValueError, match=r"at the last step, 9.*at least 6 steps"):
        check_reaches_one(LinearWarmup(10), 5, first_step=5)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LinearWarmup(0), "num_steps must be at least 1"),
        (lambda: LinearWarmup(5, 1.5), "start must be from 0 to 1"),
        (lambda: LinearWarmup(5, math.nan), "start"),
        (lambda: CyclicalWarmup(4, ramp=0.9), "no step of a cycle has weight 1"),
        (lambda: CyclicalWarmup(4, ramp=0.0), "ramp must be above 0"),
        (lambda: CyclicalWarmup(4, num_cycles=0), "num_cycles"),
        (lambda: Constant(-1.0), "weight must be a finite number"),
        (lambda: Geco(math.inf), "target"),
        (lambda: Geco(0.0, decay=1.0), "decay"),
        (lambda: Geco(0.0, rate=0.0), "rate"),
        (lambda: Geco(0.0, weight=2.0, max_weight=1.0), "weight must be from"),
        (lambda: Geco(0.0, min_weight=0.0), "min_weight"),
        (lambda: Geco(0.0).load_state_dict({"weight": 1.0}), "violation missing"),
        (lambda: Geco(0.0).load_state_dict({"weight": 1e9, "violation": None}), "min_weight"),
        (lambda: DecomposedELBO(kl_weight={}), "empty mapping"),
        (lambda: DecomposedELBO(kl_weight={"a": -1.0}), r"kl_weight\['a'\]"),
        (lambda: DecomposedELBO(kl_weight={"a": Geco(0.0)}), "kl_weight=Geco"),
        (lambda: DecomposedELBO(free_bits=-1.0), "free_bits must be a finite number of nats"),
        (lambda: DecomposedELBO(free_bits={"a": math.nan}), r"free_bits\['a'\]"),
        (lambda: DecomposedELBO(free_bits={"a": None}), r"free_bits\['a'\]"),  # type: ignore[dict-item]
        (lambda: DecomposedELBO(free_bits={}), "empty mapping"),
    ],
)
def test_bad_arguments(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


# ----------------------------------------------------------------------------------------------------------------------
# Weights by site and free bits: by hand

CASES: dict[str, tuple[dict[str, Any], dict[str, float], dict[str, bool]]] = {
    # options, weights, and which kl_prior are below their floor
    "one": ({"kl_weight": {"a": 0.25}}, {"a": 0.25, "b": 1.0}, {}),
    "both": ({"kl_weight": {"b": 0.0, "a": LinearWarmup(10, 0.5)}}, {"a": 0.5, "b": 0.0}, {}),
    "floor": ({"free_bits": 0.4}, {"a": 1.0, "b": 1.0}, {"b": True}),
    "floor of one": ({"free_bits": {"a": 5.0}}, {"a": 1.0, "b": 1.0}, {"a": True}),
    "weights and floor": (
        {"kl_weight": {"a": 0.25, "b": 0.5}, "free_bits": {"a": 0.01, "b": 3.0}},
        {"a": 0.25, "b": 0.5},
        {"b": True},
    ),
    "weight and floor": ({"kl_weight": 0.5, "free_bits": 1.0}, {"a": 0.5, "b": 0.5}, {"a": True, "b": True}),
}
BELOW = {"floor": 0.4, "floor of one": 5.0, "weights and floor": 3.0, "weight and floor": 1.0}


@pytest.mark.parametrize("case", CASES)
def test_objective_and_gradient_by_hand(case: str) -> None:
    options, weights, below = CASES[case]
    elbo = DecomposedELBO(kl="analytic", **options)
    loss, gradients = evaluated(elbo)
    count = {"a": 1, "b": 6}
    kl = {site: count[site] * kl_by_hand(site) for site in LOC}
    floored = {site: count[site] * BELOW[case] if below.get(site) else kl[site] for site in LOC}
    assert elbo.last is not None
    reconstruction = elbo.last.reconstruction
    assert -loss == pytest.approx(reconstruction - sum(weights[site] * floored[site] for site in LOC), rel=1e-12)
    _, without = evaluated(DecomposedELBO(kl="analytic", kl_weight=0.0))
    of_kl = gradients_by_hand({site: 0.0 if below.get(site) else weights[site] for site in LOC})
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, without[name] + of_kl[name])
    # the history has the true ELBO, the objective, and the weights
    assert elbo.history is not None
    (step,) = elbo.history.to_dataframe(by="step").itertuples()
    assert step.elbo == pytest.approx(reconstruction - sum(kl.values()), rel=1e-12)
    assert step.objective == -loss
    assert step.objective == pytest.approx(step.reconstruction - step.kl_weight * step.kl_prior, rel=1e-12)
    by_site = elbo.history.to_dataframe().set_index("site").kl_weight
    assert by_site[["a", "b"]].to_dict() == weights
    assert math.isnan(by_site["x"])


@pytest.mark.parametrize("vectorize", [False, True, "vmap"])
@pytest.mark.parametrize("kl", ["analytic", "sampled"])
@pytest.mark.parametrize(
    "options",
    [{"kl_weight": {"a": 0.3}}, {"free_bits": {"a": 0.5, "b": 0.01}}, {"kl_weight": {"b": 2.0}, "free_bits": 0.4}],
)
def test_gradient_is_the_slope_of_the_objective(options: dict[str, Any], kl: Any, vectorize: Any) -> None:
    """At fixed noise the pathwise gradient is the derivative of the value, whichever side of its floor a term is on."""

    def make() -> DecomposedELBO:
        return DecomposedELBO(3, 1, vectorize_particles=vectorize, kl=kl, history=False, **options)

    _, gradients = evaluated(make())
    store, h = pyro.get_param_store(), 1e-5
    for name, gradient in gradients.items():
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                store._params[name].add_(sign * h)
            pyro.set_rng_seed(0)
            values.append(make().loss(model, guide, BATCH))
            with torch.no_grad():
                store._params[name].sub_(sign * h)
        assert float(gradient) == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-6, abs=1e-7)


def discrete(x: Tensor) -> None:
    """No draw has a path."""
    a = pyro.sample("a", dist.Bernoulli(0.3))
    with pyro.plate("data", 6, subsample=torch.arange(3)):
        b = pyro.sample("b", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(a + b, 0.5), obs=x)


def discrete_guide(x: Tensor) -> None:
    logits = {name: pyro.param(f"loc_{name}", torch.tensor(value)) for name, value in LOC.items()}
    pyro.sample("a", dist.Bernoulli(logits=logits["a"]))
    with pyro.plate("data", 6, subsample=torch.arange(3)):
        pyro.sample("b", dist.Bernoulli(logits=logits["b"]).expand([3]))


@pytest.mark.parametrize("gradient", ["pathwise", "doubly_reparameterized", "score_function", "vargrad"])
@pytest.mark.parametrize("programs", [(model, guide), (discrete, discrete_guide)], ids=["normal", "discrete"])
@pytest.mark.parametrize("vectorize", [False, True, "vmap"])
def test_below_the_floor_the_gradient_is_that_of_weight_zero(vectorize: Any, programs: Any, gradient: Any) -> None:
    def outcome(**options: Any) -> tuple[float, dict[str, Tensor], DecomposedELBO]:
        elbo = DecomposedELBO(3, 1, vectorize_particles=vectorize, kl="auto", gradient=gradient, **options)
        return *evaluated(elbo, programs=programs), elbo

    loss, gradients, elbo = outcome(free_bits={"a": 50.0, "b": 0.0}, kl_weight={"a": 0.25, "b": 0.5})
    expected_loss, expected, _ = outcome(kl_weight={"a": 0.0, "b": 0.5})
    assert elbo.last is not None
    assert float(elbo.last["b"].kl_prior.sum()) > 0, "b is on the other side of its floor"  # type: ignore[union-attr]
    assert loss == pytest.approx(expected_loss + 0.25 * 50.0)
    for name, found in gradients.items():
        torch.testing.assert_close(found, expected[name])


def loss_gradients_by_hand(weights: dict[str, float]) -> dict[str, Tensor]:
    """Expected gradient of the loss, with the reconstruction ``sum_i 2 log N(x_i; a + b, 0.5)``."""
    residual = 2 * float((BATCH - LOC["a"] - LOC["b"]).sum()) / 0.25
    gradients = gradients_by_hand(weights)
    for site in LOC:
        gradients[f"loc_{site}"] -= residual
        gradients[f"scale_{site}"] += 2 * 3 * SCALE[site] ** 2 / 0.25
    return gradients


@pytest.mark.parametrize("gradient", ["pathwise", "doubly_reparameterized", "score_function", "vargrad"])
def test_every_estimator_is_unbiased_for_weights_of_sites(gradient: Any) -> None:
    """Mean of 40 gradients of 100 particles, within 4 standard errors of the exact one; the floor of b is far away."""
    elbo = DecomposedELBO(
        100,
        1,
        vectorize_particles=True,
        kl="sampled",
        gradient=gradient,
        history=False,
        kl_weight={"a": 0.25, "b": 3.0},
        free_bits={"b": 0.01},
    )
    found = [evaluated(elbo, seed=seed)[1] for seed in range(40)]
    for name, expected in loss_gradients_by_hand({"a": 0.25, "b": 3.0}).items():
        values = torch.stack([of[name] for of in found])
        error = float(values.std() / len(values) ** 0.5)
        assert float(values.mean()) == pytest.approx(float(expected), abs=4 * error), name
        assert error < 0.1 * abs(float(expected)) + 0.5


@pytest.mark.parametrize("gradient", ["pathwise", "doubly_reparameterized", "score_function"])
def test_one_weight_for_each_site_is_one_weight(gradient: Any) -> None:
    for kl in ("auto", "sampled"):
        loss, expected = evaluated(DecomposedELBO(2, kl=kl, kl_weight=0.3, gradient=gradient))
        elbo = DecomposedELBO(2, kl=kl, kl_weight={"a": 0.3, "b": 0.3}, gradient=gradient)
        found_loss, found = evaluated(elbo)
        assert found_loss == pytest.approx(loss, rel=1e-12)
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name])
        assert elbo.history is not None
        assert elbo.history.kl_weight.tolist() == [0.3]


def test_the_floor_counts_what_a_mask_leaves() -> None:
    seen = torch.tensor([True, False, True])

    def masked(x: Tensor) -> None:
        with pyro.plate("data", 6, subsample=torch.arange(3)), pyro.poutine.mask(mask=seen):
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(b, 0.5), obs=x)

    def masked_guide(x: Tensor) -> None:
        with pyro.plate("data", 6, subsample=torch.arange(3)), pyro.poutine.mask(mask=seen):
            pyro.sample("b", dist.Normal(pyro.param("loc_b", torch.tensor(0.2)), 0.9).expand([3]))

    for options in ({"kl": "analytic"}, {"gradient": "doubly_reparameterized"}):
        elbo = DecomposedELBO(free_bits=3.0, **options)  # type: ignore[arg-type]
        loss, _ = evaluated(elbo, programs=(masked, masked_guide))
        assert elbo.last is not None
        assert -loss == pytest.approx(elbo.last.reconstruction - 3.0 * 4)  # two of three, standing for two each


# ----------------------------------------------------------------------------------------------------------------------
# Errors before anything changes


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kl_weight": {"c": 0.5}}, "kl_weight names site 'c', which the model and guide do not have.*'a', 'b'"),
        ({"kl_weight": {"x": 0.5}}, "kl_weight names site 'x', which is observed"),
        ({"free_bits": {"x": 0.5}}, "free_bits names site 'x', which is observed"),
    ],
)
@pytest.mark.parametrize("gradient", ["pathwise", "score_function"])
def test_unknown_sites(options: dict[str, Any], said: str, gradient: Any) -> None:
    elbo = DecomposedELBO(gradient=gradient, **options)
    for svi in (
        SVI(model, guide, Adam({"lr": 0.1}), elbo),
        CompiledSVI(model, guide, Adam({"lr": 0.1}), elbo, backend="eager"),
    ):
        with pytest.raises(ValueError, match=said):
            svi.step(BATCH)
        for name, value in LOC.items():
            assert pyro.param(f"loc_{name}").item() == value
    assert elbo.history is not None
    assert len(elbo.history) == 0


def test_a_schedule_that_gives_no_weight() -> None:
    with pytest.raises(ValueError, match=r"kl_weight\['a'\]\(0\) must be a finite number"):
        evaluated(DecomposedELBO(kl_weight={"a": lambda step: -1.0}))


def vector(x: Tensor) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3):
        pyro.sample("x", dist.Normal(a + b, 0.5), obs=x)


def test_sites_that_share_a_vector() -> None:
    """A Gaussian vector is taken apart with kl='auto'; where it is not, weights by site do not exist."""
    programs = vector, AutoMultivariateNormal(vector)
    elbo = DecomposedELBO(kl_weight={"a": 0.5}, free_bits=0.0)
    loss, _ = evaluated(elbo, programs=programs)
    assert elbo.last is not None
    kl = {site: float(elbo.last[site].kl_prior) for site in ("a", "b")}  # type: ignore[arg-type]
    assert -loss == pytest.approx(elbo.last.reconstruction - 0.5 * kl["a"] - kl["b"])
    for options in ({"kl_weight": {"a": 0.5}}, {"free_bits": 0.1}):
        for how in ({"kl": "sampled"}, {"gradient": "doubly_reparameterized"}):
            with pytest.raises(ValueError, match="'a', 'b' is that of the guide's '_AutoMultivariateNormal_latent'"):
                evaluated(DecomposedELBO(**options, **how), programs=programs)  # type: ignore[arg-type]
    uniform: Any = dict.fromkeys(("a", "b", "_AutoMultivariateNormal_latent"), LinearWarmup(4))
    evaluated(DecomposedELBO(kl="sampled", kl_weight=uniform), programs=programs)


def test_a_point_has_no_floor() -> None:
    """Its kl_prior is infinite but for a constant."""

    def points(x: Tensor) -> None:
        pyro.sample("a", dist.Delta(pyro.param("loc_a", torch.tensor(0.7))))
        with pyro.plate("data", 6, subsample=torch.arange(3)):
            pyro.sample("b", dist.Normal(pyro.param("loc_b", torch.zeros(3)), 1.0))

    for gradient in ("pathwise", "doubly_reparameterized"):
        plain: dict[str, Any] = {"gradient": gradient, "kl_weight": {"b": 0.0}}
        loss, expected = evaluated(DecomposedELBO(**plain), programs=(model, points))
        found_loss, found = evaluated(DecomposedELBO(**plain, free_bits=50.0), programs=(model, points))
        assert found_loss == loss
        torch.testing.assert_close(found, expected)
        with pytest.raises(ValueError, match="free_bits names site 'a', which is a Delta in the guide"):
            evaluated(DecomposedELBO(free_bits={"a": 1.0}, gradient=gradient), programs=(model, points))


def test_new_sites_of_an_autoguide_are_known_apart_at_once() -> None:
    """A call with another flag may have other sites: their dependencies must be known in the same run."""

    def flagged(x: Tensor, wide: bool) -> None:
        vector(x)
        if wide:
            pyro.factor("more", torch.tensor(0.0))

    for autoguide in (AutoNormal(flagged), AutoMultivariateNormal(flagged)):
        elbo = DecomposedELBO(kl_weight={"a": 0.5}, free_bits=0.1)
        for wide in (False, True, False):
            elbo.loss_and_grads(flagged, autoguide, BATCH, wide)
            assert elbo.last is not None
            assert elbo.last["b"].kl_method == "analytic"


# ----------------------------------------------------------------------------------------------------------------------
# The history


def weighted_history() -> History:
    history = History()
    elbo: Any = DecomposedELBO(history=history)
    evaluated(elbo)
    elbo.kl_weight = {"b": LinearWarmup(2)}
    for _ in range(2):
        evaluated(elbo)
    elbo.kl_weight = 0.5
    evaluated(elbo)
    return history


def test_weights_of_sites_are_recorded(tmp_path: Any) -> None:
    history = weighted_history()
    table = history.to_dataframe().pivot(index="step", columns="site", values="kl_weight")
    assert table["a"].tolist() == [1.0, 1.0, 1.0, 0.5]
    assert table["b"].tolist() == [1.0, 0.5, 1.0, 0.5]
    steps = history.to_dataframe(by="step")
    np.testing.assert_allclose(steps.objective, steps.reconstruction - steps.kl_weight * steps.kl_prior)
    assert steps.kl_weight.tolist()[2:] == [1.0, 0.5]
    path = tmp_path / "history.nc"
    history.save(path)
    for twin in (History.load(path), pickle.loads(pickle.dumps(history))):
        assert twin.to_xarray().identical(history.to_xarray())
        assert twin._layouts == history._layouts
    history.plot()


def test_histories_without_weights_of_sites_have_no_such_column() -> None:
    elbo = DecomposedELBO(kl_weight=0.5)
    evaluated(elbo)
    assert elbo.history is not None
    assert "kl_weight" not in elbo.history.to_dataframe()
    assert "site_kl_weight" not in elbo.history.to_xarray()


# ----------------------------------------------------------------------------------------------------------------------
# Compiled


def fitted(
    make: Callable[[], Any],
    steps: int,
    svi: Callable[..., Any],
    *,
    by_run: bool = False,
    programs: Any = (model, guide),
    optim: Any = Adam,
) -> tuple[Any, ...]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    objective = make()
    one = svi(*programs, optim({"lr": 0.05}), objective)
    losses = one.run(steps, BATCH, progress=False).tolist() if by_run else [one.step(BATCH) for _ in range(steps)]
    return losses, {name: value.detach().clone() for name, value in pyro.get_param_store().items()}, objective


WEIGHTS: dict[str, Callable[[], DecomposedELBO]] = {
    "by site": lambda: DecomposedELBO(kl_weight={"b": LinearWarmup(8), "a": 0.5}),
    "free bits": lambda: DecomposedELBO(2, free_bits={"a": 0.3, "b": 0.4}),
    "both": lambda: DecomposedELBO(2, 1, vectorize_particles=True, kl_weight={"b": CyclicalWarmup(4)}, free_bits=0.3),
    "sampled": lambda: DecomposedELBO(kl="sampled", kl_weight={"b": LinearWarmup(8)}, free_bits=0.5),
    "sticking": lambda: DecomposedELBO(2, gradient="doubly_reparameterized", kl_weight={"b": 0.5}, free_bits=0.5),
    "score": lambda: DecomposedELBO(3, gradient="score_function", kl_weight=LinearWarmup(8), free_bits=0.5),
    "geco": lambda: DecomposedELBO(kl_weight=Geco(-1.0, rate=0.1), free_bits=0.1),
}


def assert_same_fit(found: tuple[Any, ...], expected: tuple[Any, ...], *, same_draws: bool = True) -> None:
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-8)
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-8, atol=1e-10)
    for by in ("step", "site"):
        for ours, theirs in zip(*[of[2].history.to_dataframe(by=by).items() for of in (found, expected)], strict=True):
            assert ours[0] == theirs[0]
            if ours[0] in ("log_p", "log_q") and not same_draws:
                continue
            if theirs[1].dtype == float:
                np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-8, atol=1e-10)
            else:
                assert ours[1].tolist() == theirs[1].tolist()


@pytest.mark.parametrize("name", WEIGHTS)
def test_compiled_steps_equal_pyros(name: str) -> None:
    make = WEIGHTS[name]

    def compiled(*args: Any) -> Any:
        steps = 4 if name == "by site" else 1  # of a graph
        return CompiledSVI(*args, backend="eager", same_draws=True, steps_per_call=steps)

    expected = fitted(make, 12, SVI)
    assert_same_fit(fitted(make, 12, compiled), expected)
    assert_same_fit(fitted(make, 12, compiled, by_run=True), expected)


def test_an_optimizer_outside_the_graph_takes_weights_of_sites() -> None:
    made: list[CompiledSVI] = []

    def compiled(*args: Any) -> Any:
        made.append(CompiledSVI(*args, backend="eager", same_draws=True))
        return made[-1]

    expected = fitted(WEIGHTS["both"], 6, SVI, optim=RMSprop)
    assert_same_fit(fitted(WEIGHTS["both"], 6, compiled, optim=RMSprop), expected)
    assert made[0].optimizer_reason is not None


def apart(x: Tensor) -> None:
    """The data do not depend on the draws, so that machine code, which draws its own, can be compared."""
    pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 6, subsample=torch.arange(3)):
        pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.5, 0.5), obs=x)


def test_machine_code_takes_weights_of_sites() -> None:
    def make() -> DecomposedELBO:
        return DecomposedELBO(kl_weight={"b": LinearWarmup(20), "a": 0.5}, free_bits={"a": 0.1})

    svis: list[CompiledSVI] = []

    def compiled(*args: Any) -> CompiledSVI:
        svis.append(CompiledSVI(*args))
        return svis[-1]

    programs = apart, guide
    expected = fitted(make, 40, SVI, programs=programs)
    assert_same_fit(fitted(make, 40, compiled, programs=programs), expected, same_draws=False)
    assert_same_fit(fitted(make, 40, compiled, by_run=True, programs=programs), expected, same_draws=False)
    (program,) = svis[-1]._programs.values()
    assert program.native([BATCH]) is not None, "the steps were C's"  # type: ignore[union-attr]
    of_a = svis[-1].objective.history.to_dataframe().query("site == 'a'").kl_prior
    assert 0 < (of_a > 0.1).sum() < 40, "on both sides of its floor"


def test_other_weights_make_another_graph() -> None:
    svi = CompiledSVI(model, guide, Adam({"lr": 0.05}), DecomposedELBO(), backend="eager", same_draws=True)
    for _ in range(2):
        svi.step(BATCH)

    def both() -> list[float]:
        losses = []
        for evaluate in (svi.evaluate_loss, lambda x: svi.objective.loss(model, guide, x)):
            for _ in range(2):
                pyro.set_rng_seed(1)
                losses.append(evaluate(BATCH))
        return losses

    seen = []
    for weight, bits in ((1.0, None), (0.5, None), ({"a": 0.5}, None), ({"b": 0.5}, None), ({"b": 0.5}, 3.0)):
        svi.objective.kl_weight, svi.objective.free_bits = weight, bits
        losses = both()
        assert losses == pytest.approx(losses[:1] * 4, rel=1e-10)
        seen.append(losses[0])
    assert len(set(seen)) == 5


def test_learning_rates_step_as_ever_beside_weights() -> None:
    def scheduled() -> PyroLRScheduler:
        return pyro.optim.ExponentialLR(  # type: ignore[attr-defined]
            {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.5}
        )

    ends = []
    for make in (SVI, lambda *args: CompiledSVI(*args, backend="eager", same_draws=True)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        optim = scheduled()
        svi = make(model, guide, optim, WEIGHTS["by site"]())  # type: ignore[operator]
        for _ in range(4):
            svi.step(BATCH)
            optim.step()
        ends.append([pyro.param(name).detach().clone() for name in ("loc_a", "scale_b")])
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


# ----------------------------------------------------------------------------------------------------------------------
# Constrained reconstruction

NOISE = 0.5


def local(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


def local_guide(x: Tensor) -> None:
    loc = pyro.param("loc", torch.zeros(len(x)))
    scale = pyro.param("scale", torch.ones(len(x)), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, scale))


def reconstruction_at(weight: float) -> float:
    """Per observation, where ``reconstruction - weight * kl_prior`` is greatest."""
    variance = 1 / (1 + 1 / (weight * NOISE**2))
    loc = DATA / (1 + weight * NOISE**2)
    squares = (DATA - loc) ** 2 + variance
    return float((-0.5 * math.log(2 * math.pi * NOISE**2) - squares / (2 * NOISE**2)).mean())


@pytest.mark.parametrize("weight", [0.4, 2.5])
def test_geco_reaches_its_target(weight: float) -> None:
    target = reconstruction_at(weight)
    geco = Geco(target)
    elbo = DecomposedELBO(16, 1, vectorize_particles=True, kl_weight=geco)
    pyro.set_rng_seed(0)
    svi = CompiledSVI(local, local_guide, Adam({"lr": 0.02}), elbo, backend="eager")
    svi.run(1500, DATA, progress=False)
    assert elbo.history is not None
    table = elbo.history.to_dataframe(by="step").iloc[-500:]
    per_observation = table.reconstruction / table.num_observations
    # the mean of 500 correlated steps; sd of one is about 0.1
    assert per_observation.mean() == pytest.approx(target, abs=0.03)
    assert np.exp(np.log(table.kl_weight).mean()) == pytest.approx(weight, rel=0.1)


def test_geco_goes_on_bit_for_bit() -> None:
    geco = Geco(-1.0, rate=0.03, decay=0.7)
    for reconstruction in (-3.0, 1.0, -0.4, math.pi):
        geco.update(reconstruction * 6, 6)
    twin = Geco(-1.0, rate=0.03, decay=0.7)
    twin.load_state_dict(pickle.loads(pickle.dumps(geco.state_dict())))
    for reconstruction in (0.1, -7.0, 0.3):
        geco.update(reconstruction, 1)
        twin.update(reconstruction, 1)
        assert geco.state_dict() == twin.state_dict()
        assert geco(0) == twin(5)


def test_geco_by_hand() -> None:
    geco = Geco(2.0, per_observation=False, decay=0.5, rate=0.01, min_weight=0.5)
    geco.update(1.0, 100)
    assert geco(0) == pytest.approx(math.exp(-0.01))
    geco.update(5.0, 100)  # the mean of 1 and -3
    assert geco.violation == -1.0
    assert geco(0) == pytest.approx(1.0)
    geco.update(-1e6, 100)
    assert geco(0) == pytest.approx(math.exp(-0.01))  # the most that one step can do
    for _ in range(100):
        geco.update(-1e6, 100)
    assert geco(0) == 0.5


def test_geco_takes_the_last_step_and_only_steps() -> None:
    geco = Geco(0.0)
    elbo = DecomposedELBO(kl_weight=geco)
    elbo.loss(model, guide, BATCH)
    assert geco.violation is None
    evaluated(elbo)
    assert elbo.history is not None
    assert elbo.last is not None
    assert elbo.history.kl_weight.tolist() == [1.0]
    assert geco.violation == pytest.approx(-elbo.last.reconstruction / 6)


def test_geco_per_observation_needs_observations() -> None:
    def without(x: Tensor) -> None:
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        pyro.factor("data", torch.tensor(-1.0))

    def its_guide(x: Tensor) -> None:
        pyro.sample("a", dist.Normal(pyro.param("loc_a", torch.tensor(0.5)), 1.0))
        pyro.sample("b", dist.Normal(0.0, 1.0).expand([3]).to_event(1))

    elbo = DecomposedELBO(kl_weight=Geco(0.0))
    with pytest.raises(ValueError, match="per_observation=False"):
        SVI(without, its_guide, Adam({"lr": 0.1}), elbo).step(BATCH)
    assert pyro.param("loc_a").item() == 0.5
    assert elbo.history is not None
    assert len(elbo.history) == 0
    evaluated(DecomposedELBO(kl_weight=Geco(0.0, per_observation=False)), programs=(without, its_guide))
