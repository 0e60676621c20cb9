"""A batched run equals the loop: densities, gradients and layout; and says why where it cannot be."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.distributions.util import is_identically_zero
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal, AutoNormalMessenger
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_elbo_ext.bounds.site_weights import SiteWeights
from pyro_elbo_ext.particles.batch_check import check_batched
from pyro_elbo_ext.particles.batching import Batched, run_batched
from pyro_elbo_ext.particles.estimate import Ledger, evaluate
from pyro_elbo_ext.particles.supply import CannotBatch
from pyro_elbo_ext.programs.densities import log_prob, score_parts
from pyro_elbo_ext.programs.nodes import PARTICLE_PLATE
from pyro_elbo_ext.programs.running import trace_pair
from pyro_elbo_ext.terms.kl import KLPrior
from pyro_elbo_ext.terms.terms import read_sites
from tests.models import Regression, autoencoder, eight_schools, vectors
from tests.oracles import PROBLEMS, Problem
from tests.test_parity import AUTOGUIDES

K = 5
X = torch.linspace(-1, 1, 12).reshape(4, 3)
Y = torch.tensor([1.0, 0.0, 1.0, 1.0])


def regression() -> None:
    """``X @ w`` is not what it should be in a particle plate."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Bernoulli(logits=X @ w), obs=Y)


def plates() -> None:
    with pyro.plate("rows", 3, dim=-2):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("columns", 4, dim=-1), poutine.scale(scale=2.0):
            keep = torch.arange(12).reshape(3, 4) % 3 > 0
            b = pyro.sample("b", dist.Normal(a, 1.0).expand([3, 4]).mask(keep))
            pyro.sample("x", dist.Normal(b, 1.0), obs=torch.ones(3, 4), obs_mask=keep)
    pyro.factor("penalty", -a.square().sum())


def scaled_by_draw() -> None:
    """Scale and mask that vary over the particles."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4), poutine.scale(scale=z.exp()), poutine.mask(mask=z * torch.arange(4.0) < 1.0):
        pyro.sample("x", dist.Normal(z, 1.0), obs=Y)


def batch(
    model: Callable[..., Any], guide: Callable[..., Any], *args: Any, particles: int = K, **options: Any
) -> tuple[Batched, tuple[Trace, Trace]]:
    reference = trace_pair(model, guide, args, {})
    return run_batched(model, guide, args, {}, particles, reference, **options), reference


def assert_batches(model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **options: Any) -> Batched:
    result, reference = batch(model, guide, *args, **options)
    check_batched(result, model, guide, args, {}, reference)
    return result


def log_weights(traces: tuple[Trace, Trace]) -> Tensor:
    """``log p - log q`` of a loop's pair of traces."""
    total = torch.zeros(())
    for trace, density, sign in ((traces[0], log_prob, 1.0), (traces[1], score_parts, -1.0)):
        for node in trace.nodes.values():
            if node["type"] == "sample" and not site_is_subsample(node):
                value = density(node, trace)
                total = total + sign * (value if isinstance(value, Tensor) else value.log_prob).sum()
    return total


def batched_log_weights(result: Batched) -> Tensor:
    total = torch.zeros(())
    for trace, sign in ((result.model_trace, 1.0), (result.guide_trace, -1.0)):
        for node in trace.nodes.values():
            if "log_prob" in node:
                total = total + sign * node["log_prob"].reshape(len(node["log_prob"]), -1).sum(1)
    return total


def gradients(value: Tensor) -> dict[str, Tensor]:
    parameters = dict(pyro.get_param_store().named_parameters())
    found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, found, strict=True))


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert any(gradient.any() for gradient in theirs.values())
    for name, gradient in theirs.items():
        torch.testing.assert_close(
            ours[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Equal to the loop


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("particles", [1, K])
def test_densities_of_problems(problem: Problem, particles: int) -> None:
    assert_batches(problem.model, problem.guide, particles=particles)


@pytest.mark.parametrize("autoguide", AUTOGUIDES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("model", [eight_schools, plates, vectors, regression], ids=lambda fn: fn.__name__)
def test_densities_of_autoguides(model: Callable[[], None], autoguide: Any) -> None:
    if model is plates and autoguide.__name__ == "AutoGaussian":
        model = eight_schools  # AutoGaussian cannot read the dependencies of a partly observed site
    assert_batches(model, autoguide(model))


@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.name != "subsampled"], ids=str)
def test_gradients_at_given_draws(problem: Problem) -> None:
    loop = [trace_pair(problem.model, problem.guide, (), {}) for _ in range(K)]
    draws = {
        name: torch.stack([traces[1].nodes[name]["value"].detach() for traces in loop])
        for name, node in loop[0][1].nodes.items()
        if node["type"] == "sample" and not site_is_subsample(node)
    }
    total = torch.zeros(())
    for traces in loop:
        at = traces[1].copy()
        for name in draws:
            at.nodes[name] = {**at.nodes[name], "value": at.nodes[name]["value"].detach()}
        if problem.name == "delta":  # at a draw of its own, which given draws of a Delta are taken to be
            at = Trace()
        guide = poutine.replay(problem.guide, trace=at)
        total = total + log_weights(trace_pair(problem.model, guide, (), {}))
    result = run_batched(problem.model, problem.guide, (), {}, K, loop[0], draws=draws)
    ours = batched_log_weights(result).sum()
    torch.testing.assert_close(ours, total)
    if problem.name != "delta":  # its parameter is its draw, which is given
        assert_same_gradients(gradients(ours), gradients(total))


def normal_guide() -> None:
    loc = pyro.param("loc", torch.tensor([0.3, -0.2, 0.5]))
    scale = pyro.param("scale", torch.tensor([0.5, 1.0, 0.7]), constraint=dist.constraints.positive)
    pyro.sample("w", dist.Normal(loc, scale).to_event(1))


def test_path_gradients_equal_the_loop_with_the_same_noise() -> None:
    result = assert_batches(regression, normal_guide)
    draws = result.guide_trace.nodes["w"]["value"]
    assert draws.shape == (K, 1, 3)
    noise = ((draws - pyro.param("loc")) / pyro.param("scale")).detach()
    total = torch.zeros(())
    for k in range(K):
        value = pyro.param("loc") + pyro.param("scale") * noise[k, 0]
        at = Trace()
        at.add_node("w", name="w", type="sample", is_observed=False, infer={}, value=value)
        total = total + log_weights(trace_pair(regression, poutine.replay(normal_guide, trace=at), (), {}))
    ours = batched_log_weights(result).sum()
    torch.testing.assert_close(ours, total)
    assert_same_gradients(gradients(ours), gradients(total))


def test_path_gradients_of_an_autoguide() -> None:
    guide = AutoNormal(eight_schools)
    result = assert_batches(eight_schools, guide)
    sites = [name for name in result.guide_trace.nodes if name.endswith("_unconstrained")]
    assert len(sites) == 3
    total = torch.zeros(())
    for k in range(K):
        at = Trace()
        for name in sites:
            short = name.removesuffix("_unconstrained")
            loc, scale = pyro.param(f"AutoNormal.locs.{short}"), pyro.param(f"AutoNormal.scales.{short}")
            draw = result.guide_trace.nodes[name]["value"][k].reshape(loc.shape)
            value = loc + scale * ((draw - loc) / scale).detach()
            at.add_node(name, name=name, type="sample", is_observed=False, infer={"is_auxiliary": True}, value=value)
        total = total + log_weights(trace_pair(eight_schools, poutine.replay(guide, trace=at), (), {}))
    ours = batched_log_weights(result).sum()
    torch.testing.assert_close(ours, total)
    assert_same_gradients(gradients(ours), gradients(total))


@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.name in ("discrete", "nonreparameterized")], ids=str)
def test_score_function_gradients_equal_the_loop(problem: Problem) -> None:
    """Through the very code that evaluates an objective."""

    def gradient(pairs: list[tuple[Trace, Trace]]) -> dict[str, Tensor]:
        ledger = Ledger()
        for traces in pairs:
            sites = read_sites(*traces)
            kls = [None if site.kind == "observed" else KLPrior("sampled", "") for site in sites]
            evaluate(sites, kls, *traces, max_plate_nesting=float("inf"), ledger=ledger)
        return gradients(ledger.surrogate_loss(K, SiteWeights(0.7)))

    result = assert_batches(problem.model, problem.guide)
    loop = []
    for k in range(K):
        at = Trace()
        for name, node in result.guide_trace.nodes.items():
            at.add_node(name, **{**node, "value": node["value"][k]})
        loop.append(trace_pair(problem.model, poutine.replay(problem.guide, trace=at), (), {}))
    assert_same_gradients(gradient([result[:2]]), gradient(loop))


def test_gradients_reach_given_draws() -> None:
    _, reference = batch(regression, normal_guide)
    draws = torch.randn(K, 3).requires_grad_()
    result = run_batched(regression, normal_guide, (), {}, K, reference, draws={"w": draws})
    (ours,) = torch.autograd.grad(batched_log_weights(result).sum(), draws)
    for k in range(K):
        value = draws[k].detach().requires_grad_()
        at = Trace()
        at.add_node("w", name="w", type="sample", is_observed=False, infer={}, value=value)
        weight = log_weights(trace_pair(regression, poutine.replay(normal_guide, trace=at), (), {}))
        torch.testing.assert_close(ours[k], torch.autograd.grad(weight, value)[0])


def test_draws_of_a_result_can_be_given_again() -> None:
    guide = AutoDiagonalNormal(eight_schools)
    first, reference = batch(eight_schools, guide)
    draws = {name: node["value"].detach() for name, node in first.guide_trace.nodes.items()}
    again = run_batched(eight_schools, guide, (), {}, K, reference, draws=draws)
    torch.testing.assert_close(batched_log_weights(again), batched_log_weights(first))
    for name, value in draws.items():
        assert torch.equal(again.guide_trace.nodes[name]["value"], value)


def test_without_gradients() -> None:
    with torch.no_grad():
        result = assert_batches(regression, normal_guide)
    assert not batched_log_weights(result).requires_grad


def test_observed_site_that_depends_on_no_draw_is_expanded() -> None:
    def model() -> None:
        regression()
        pyro.sample("alone", dist.Normal(0.0, 1.0), obs=torch.tensor(0.5))

    node = assert_batches(model, normal_guide).model_trace.nodes["alone"]
    assert node["log_prob"].shape == node["value"].shape == (K, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Layout


def plates_guide() -> None:
    with pyro.plate("rows", 3, dim=-2):
        pyro.sample("a", dist.Normal(pyro.param("a_loc", torch.zeros(3, 1)), 1.0))
        with pyro.plate("columns", 4, dim=-1):
            pyro.sample("b", dist.Normal(pyro.param("b_loc", torch.zeros(3, 4)), 1.0))
            pyro.sample("x_unobserved", NonreparameterizedNormal(0.0, pyro.param("s", torch.ones(3, 4))))
    pyro.sample("extra", dist.Normal(torch.zeros(2), 1.0).to_event(1), infer={"is_auxiliary": True})


def plates_model() -> None:
    with pyro.plate("rows", 3, dim=-2):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("columns", 4, dim=-1), poutine.scale(scale=2.0):
            b = pyro.sample("b", dist.Normal(a, 1.0).mask(torch.arange(4) > 1))
            pyro.sample("x", dist.Normal(b, 1.0), obs=torch.ones(3, 4), obs_mask=torch.arange(4) > 0)
    pyro.factor("alone", torch.tensor(0.1))


def test_layout_is_that_of_the_particle_plate() -> None:
    result = assert_batches(plates_model, plates_guide)
    plate = pyro.plate(PARTICLE_PLATE, K, dim=-3)
    vectorized = trace_pair(plate(plates_model), pyro.plate(PARTICLE_PLATE, K, dim=-3)(plates_guide), (), {})
    for ours, theirs in zip(result[:2], vectorized, strict=True):
        sites = {
            name: node
            for name, node in theirs.nodes.items()
            if node["type"] == "sample" and not node["infer"].get("_deterministic") and name != PARTICLE_PLATE
        }
        assert [name for name in ours.nodes if not ours.nodes[name]["infer"].get("_deterministic")] == list(sites)
        for name, node in sites.items():
            if site_is_subsample(node):
                continue
            mine = ours.nodes[name]
            assert mine["log_prob"].shape == mine["unscaled_log_prob"].shape == (K, *log_prob(node, theirs).shape[1:])
            assert set(mine["cond_indep_stack"]) == set(node["cond_indep_stack"])
            assert mine["cond_indep_stack"][0].name == PARTICLE_PLATE
            if not node["is_observed"]:
                assert mine["value"].shape == node["value"].shape
            assert mine["scale"] == node["scale"]


def test_scale_and_mask_that_vary_over_particles() -> None:
    def guide() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    node = assert_batches(scaled_by_draw, guide).model_trace.nodes["x"]
    assert node["scale"].shape == (K, 1)
    assert node["mask"].shape == (K, 4)
    assert (node["log_prob"] != 0).equal(node["mask"])


def test_score_parts_keep_what_they_say() -> None:
    guide_trace = assert_batches(plates_model, plates_guide).guide_trace
    pathwise, scored = guide_trace.nodes["b"]["score_parts"], guide_trace.nodes["x_unobserved"]["score_parts"]
    assert pathwise.entropy_term is pathwise.log_prob is guide_trace.nodes["b"]["log_prob"]
    assert is_identically_zero(pathwise.score_function)
    assert is_identically_zero(scored.entropy_term)
    assert scored.score_function is scored.log_prob
    assert scored.log_prob.shape == (K, 3, 4)


def test_nodes_hold_nothing_that_died_with_vmap() -> None:
    guide = AutoNormalMessenger(eight_schools)
    result = assert_batches(eight_schools, guide)
    for node in (*result.model_trace.nodes.values(), *result.guide_trace.nodes.values()):
        assert node["fn"].sample().isfinite().all()
        assert not node["value"].isnan().any()
    assert not guide.trace.nodes or all(
        torch.as_tensor(node["value"]).isfinite().all()
        for node in guide.trace.nodes.values()
        if node["type"] == "sample"
    )


def test_derived_tensors() -> None:
    def derive(model_trace: Trace, guide_trace: Trace) -> dict[str, Tensor]:
        assert "data" not in model_trace
        assert "log_prob" in model_trace.nodes["y"]
        fn = guide_trace.nodes["w"]["fn"]
        return {"scalar": fn.mean.sum(), "plated": model_trace.nodes["y"]["fn"].mean, "log_q": fn.entropy()}

    result, _ = batch(regression, normal_guide, derive=derive)
    assert result.derived["scalar"].shape == (K, 1)
    assert result.derived["plated"].shape == (K, 4)
    w = result.guide_trace.nodes["w"]["value"].squeeze(1)
    torch.testing.assert_close(result.derived["plated"], (w @ X.T).sigmoid())
    torch.testing.assert_close(result.derived["scalar"], pyro.param("loc").sum().expand(K, 1))


# ----------------------------------------------------------------------------------------------------------------------
# Subsamples


def subsampling(indices: Tensor | None = None, size: int = 4, subsample_size: int | None = 2) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size, subsample_size=subsample_size, subsample=indices) as i:
        z = pyro.sample("z", dist.Normal(w, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=Y[i])


def subsampling_guide(indices: Tensor | None = None, size: int = 4, subsample_size: int | None = 2) -> None:
    pyro.sample("w", dist.Normal(pyro.param("w_loc", torch.tensor(0.1)), 1.0))
    with pyro.plate("data", size, subsample_size=subsample_size, subsample=indices):
        loc = pyro.param("z_loc", torch.arange(4.0), event_dim=0)
        pyro.sample("z", dist.Normal(loc, 0.1))


def test_particles_share_one_subsample() -> None:
    seen = set()
    for _ in range(8):
        result = assert_batches(subsampling, subsampling_guide)
        indices = result.model_trace.nodes["data"]["value"]
        assert indices.shape == (2,)
        assert indices is result.guide_trace.nodes["data"]["value"]
        seen.add(tuple(indices.tolist()))
        x = result.model_trace.nodes["x"]
        assert torch.equal(x["value"], Y[indices].expand(K, 2))
        assert x["scale"] == 2.0
        assert (result.guide_trace.nodes["z"]["value"] - indices).abs().max() < 0.6  # z is drawn near its own index
    assert len(seen) > 1


def test_subsample_of_an_earlier_run() -> None:
    first, reference = batch(subsampling, subsampling_guide)
    draws = {name: node["value"].detach() for name, node in first.guide_trace.nodes.items()}
    for _ in range(4):
        again = run_batched(subsampling, subsampling_guide, (), {}, K, reference, draws=draws)
        torch.testing.assert_close(batched_log_weights(again), batched_log_weights(first))


def test_subsample_chosen_by_the_user() -> None:
    indices = torch.tensor([3, 0])
    for subsample_size in (2, None):
        result = assert_batches(subsampling, subsampling_guide, indices, 4, subsample_size)
        assert torch.equal(result.model_trace.nodes["data"]["value"], indices)


def test_subsample_of_another_size_than_before() -> None:
    reference = trace_pair(subsampling, subsampling_guide, (None, 4, 2), {})
    with pytest.raises(CannotBatch, match="plate 'data' subsamples 3 of 4"):
        run_batched(subsampling, subsampling_guide, (None, 4, 3), {}, K, reference)


def test_particles_share_one_subsample_of_a_messenger_guide() -> None:
    seen = set()
    for _ in range(8):
        result = assert_batches(subsampling, AutoNormalMessenger(subsampling))
        seen.add(tuple(result.guide_trace.nodes["data"]["value"].tolist()))
    assert len(seen) > 1


def test_plate_in_a_loop() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        for i in pyro.plate("data", 4, subsample_size=3):
            pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=Y[i])

    def guide() -> None:
        pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))

    reference = trace_pair(model, guide, (), {})
    draws = {"data": reference[0].nodes["data"]["value"]}  # the names of the sites depend on it
    check_batched(run_batched(model, guide, (), {}, K, reference, draws=draws), model, guide, (), {}, reference)


# ----------------------------------------------------------------------------------------------------------------------
# Modules and parameters


def test_amortized_guide_with_modules() -> None:
    model, guide = autoencoder()

    _, reference = batch(model, guide, torch.ones(7, 6))
    smaller = torch.ones(3, 6)  # the last minibatch, after a reference with a full one
    result = run_batched(model, guide, (smaller,), {}, K, reference)
    check_batched(result, model, guide, (smaller,), {}, reference)
    assert result.model_trace.nodes["x"]["log_prob"].shape == (K, 3)


@pytest.mark.parametrize("local", [False, True])
def test_pyro_module_with_samples(local: bool) -> None:

    with pyro.settings.context(module_local_params=local):
        model = Regression()
        assert_batches(model, AutoNormal(model), X, Y)


def test_values_are_not_checked_again() -> None:
    prior = dist.Gamma(2.0, 1.0).expand([2]).to_event(1)  # made while validation is on, which expand writes down

    def model() -> None:
        regression()
        pyro.sample("outside", prior, obs=torch.tensor([-1.0, 1.0]))

    result, _ = batch(model, normal_guide)
    assert result.model_trace.nodes["outside"]["log_prob"].isnan().all()


@pytest.mark.parametrize("make", [dist.transforms.affine_autoregressive, dist.transforms.spline_autoregressive])
def test_flow_guide(make: Callable[..., Any]) -> None:
    flow = make(2)

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(), 1.0), obs=torch.tensor(1.0))

    def guide() -> None:
        pyro.module("flow", flow)
        pyro.sample("z", dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [flow]))

    if make is dist.transforms.affine_autoregressive:
        assert_batches(model, guide)
    else:  # Pyro's splines index by a mask
        with pytest.raises(CannotBatch, match="site 'z', the shape of a result depends on a drawn value"):
            batch(model, guide)


def test_factor_in_guide() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", -z.square())

    def guide() -> None:
        z = pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 1.0))
        pyro.factor("g", 0.3 * z, has_rsample=True)

    assert_batches(model, guide)


def test_svi_sees_the_parameters_of_a_batched_run() -> None:
    guide = AutoNormal(eight_schools)
    reference = trace_pair(eight_schools, guide, (), {})
    with poutine.trace(param_only=True) as capture:
        result = run_batched(eight_schools, guide, (), {}, K, reference)
    batched_log_weights(result).mean().backward()
    captured = {id(node["value"].unconstrained()) for node in capture.trace.nodes.values()}
    parameters = pyro.get_param_store()._params.values()
    assert captured == {id(parameter) for parameter in parameters}
    assert all(parameter.grad.any() for parameter in parameters)


def test_no_parameter_is_made_for_one_particle() -> None:
    def guide() -> None:
        normal_guide()
        if late:
            pyro.param("late", pyro.param("loc") * torch.randn(3))

    late = False
    _, reference = batch(regression, guide)
    before = dict(pyro.get_param_store().named_parameters())
    late = True
    with pytest.raises(CannotBatch, match="parameter 'late' does not exist yet"):
        run_batched(regression, guide, (), {}, K, reference)
    after = dict(pyro.get_param_store().named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


# ----------------------------------------------------------------------------------------------------------------------
# Distributions

ONE, THREE = torch.tensor(1.5), torch.tensor([0.5, 1.0, 2.0])
CONTINUOUS: dict[str, Callable[[Tensor], Any]] = {
    "Normal": lambda s: dist.Normal(s, s),
    "MultivariateNormal": lambda s: dist.MultivariateNormal(THREE * s, torch.eye(3) * s),
    "LowRankMultivariateNormal": lambda s: dist.LowRankMultivariateNormal(THREE * s, torch.ones(3, 1), THREE),
    "MultivariateStudentT": lambda s: dist.MultivariateStudentT(s + 3, THREE, torch.eye(3)),
    "Gamma": lambda s: dist.Gamma(s, s),
    "InverseGamma": lambda s: dist.InverseGamma(s + 1, s),
    "Beta": lambda s: dist.Beta(s, 2 * s),
    "Dirichlet": lambda s: dist.Dirichlet(THREE * s),
    "StudentT": lambda s: dist.StudentT(s + 1, s, s),
    "Chi2": lambda s: dist.Chi2(s),
    "Exponential": lambda s: dist.Exponential(s),
    "Laplace": lambda s: dist.Laplace(s, s),
    "Cauchy": lambda s: dist.Cauchy(s, s),
    "HalfCauchy": lambda s: dist.HalfCauchy(s),
    "HalfNormal": lambda s: dist.HalfNormal(s),
    "LogNormal": lambda s: dist.LogNormal(s, s),
    "Uniform": lambda s: dist.Uniform(-s, s),
    "Gumbel": lambda s: dist.Gumbel(s, s),
    "Weibull": lambda s: dist.Weibull(s, s),
    "Pareto": lambda s: dist.Pareto(s, s),
    "Kumaraswamy": lambda s: dist.Kumaraswamy(s, s),
    "Logistic": lambda s: dist.Logistic(s, s),
    "AsymmetricLaplace": lambda s: dist.AsymmetricLaplace(s, s, s),
    "SoftLaplace": lambda s: dist.SoftLaplace(s, s),
    "LKJCholesky": lambda s: dist.LKJCholesky(3, s),
    "MixtureSameFamily": lambda s: dist.MixtureSameFamily(dist.Categorical(THREE), dist.Normal(THREE * s, THREE)),
    "RelaxedBernoulli": lambda s: dist.RelaxedBernoulli(torch.tensor(0.5), logits=s),
    "RelaxedOneHotCategorical": lambda s: dist.RelaxedOneHotCategorical(torch.tensor(0.5), logits=THREE * s),
    "flow": lambda s: dist.TransformedDistribution(dist.Normal(s, s), [dist.transforms.SigmoidTransform()]),
}
DISCRETE: dict[str, Callable[[Tensor], Any]] = {
    "Categorical": lambda s: dist.Categorical(logits=THREE * s),
    "OneHotCategorical": lambda s: dist.OneHotCategorical(logits=THREE * s),
    "Bernoulli": lambda s: dist.Bernoulli(logits=s),
    "Poisson": lambda s: dist.Poisson(s),
    "Binomial": lambda s: dist.Binomial(5, logits=s),
    "Geometric": lambda s: dist.Geometric(logits=s),
    "NegativeBinomial": lambda s: dist.NegativeBinomial(s, logits=-s),
    "GammaPoisson": lambda s: dist.GammaPoisson(s, s),
    "BetaBinomial": lambda s: dist.BetaBinomial(s, s, 5),
    "DirichletMultinomial": lambda s: dist.DirichletMultinomial(THREE * s, 5),
    "ZeroInflatedPoisson": lambda s: dist.ZeroInflatedPoisson(s, gate=torch.tensor(0.2)),
}


@pytest.mark.parametrize("name", [*CONTINUOUS, *DISCRETE])
def test_draws_have_the_right_distribution(name: str) -> None:
    """Of a site whose parameters are the same for all particles, and of one whose parameters vary."""
    make = (CONTINUOUS | DISCRETE)[name]

    def guide() -> None:
        pyro.sample("shared", make(pyro.param("s", ONE)))
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        pyro.sample("varying", make(ONE + 1e-6 * u))

    result = assert_batches(lambda: None, guide, particles=2000)
    expected = make(ONE).sample((2000,)).flatten(1).T if make(ONE).event_shape else make(ONE).sample((1, 2000))
    for site in ("shared", "varying"):
        value = result.guide_trace.nodes[site]["value"].detach()
        for ours, theirs in zip(value.flatten(1).T if value.dim() > 1 else value[None], expected, strict=True):
            points = torch.cat([ours, theirs]).sort().values
            distance = torch.searchsorted(ours.sort().values, points, right=True) - torch.searchsorted(
                theirs.sort().values, points, right=True
            )
            assert distance.abs().max() / 2000 < 0.0617  # Kolmogorov-Smirnov, at level 0.001


@pytest.mark.parametrize("name", ["Gamma", "Beta", "Dirichlet"])
def test_implicit_gradients_are_those_of_torch(name: str) -> None:
    def guide() -> None:
        fn = CONTINUOUS[name](pyro.param("s", ONE))
        pyro.sample("x", fn)

    value = batch(lambda: None, guide)[0].guide_trace.nodes["x"]["value"]
    (ours,) = torch.autograd.grad(value.flatten(1).select(1, 0).sum() if value.dim() > 1 else value.sum(), _leaf("s"))
    s, x = pyro.param("s").detach(), value.detach()
    if name == "Gamma":  # x = y / s with y ~ Gamma(s, 1)
        expected = torch._standard_gamma_grad(s.expand(K), x * s) / s - x / s
    else:
        weights = torch.tensor([1.0, 2.0]) if name == "Beta" else THREE
        simplex = torch.stack([x, 1 - x], -1) if name == "Beta" else x
        concentration = (weights * s).expand(simplex.shape)
        total = concentration.sum(-1, keepdim=True).expand(simplex.shape)
        first = torch.zeros(simplex.shape)
        first[..., 0] = 1
        partial = torch._dirichlet_grad(simplex.contiguous(), concentration.contiguous(), total.contiguous())
        expected = (partial * (first - simplex[..., :1]) * weights).sum(-1)
    torch.testing.assert_close(ours, expected.sum())


def _leaf(name: str) -> Tensor:
    return dict(pyro.get_param_store().named_parameters())[name]


@pytest.mark.parametrize(
    "make",
    [
        lambda s: dist.VonMises(s, s),
        lambda s: dist.Wishart(torch.tensor(5.0), torch.eye(2) * s),
        lambda s: dist.RelaxedBernoulliStraightThrough(torch.tensor(0.5), logits=s),
        lambda s: dist.Stable(s, s * 0.1),
        lambda s: dist.Multinomial(5, logits=THREE * s),
    ],
    ids=["VonMises", "Wishart", "RelaxedBernoulliStraightThrough", "Stable", "Multinomial"],
)
@pytest.mark.filterwarnings("ignore:Singular sample detected")
def test_distributions_that_cannot_be_batched(make: Callable[[Tensor], Any]) -> None:
    def guide() -> None:
        pyro.sample("shape", make(pyro.param("s", torch.tensor(1.2))))

    with pytest.raises(CannotBatch, match="site 'shape'"):
        batch(lambda: None, guide)


# ----------------------------------------------------------------------------------------------------------------------
# What cannot be batched


class Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


class Running(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, z: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * z.detach()
        return z


def _branch(z: Tensor) -> Tensor:
    return z if z > 0 else -z


def _write(z: Tensor) -> Tensor:
    total = torch.zeros(2)
    total[0] = z
    return total.sum()


def _noise(z: Tensor) -> Tensor:
    noise = torch.empty(())
    noise.normal_()  # what this returns is dropped
    return z + 0 * noise


NORMALIZE, RUNNING = nn.BatchNorm1d(2), Running()
UNBATCHABLE: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "branch": (_branch, "branches on a drawn value"),
    "item": (lambda z: z.item(), "reads a drawn value into Python"),
    "tensor": (lambda z: torch.tensor([z.detach(), 0.0]).sum(), "reads a drawn value into Python"),
    "numpy": (lambda z: torch.tensor(z.detach().numpy()), "reads a drawn value into Python"),
    "in place": (_write, "in place"),
    "in-place sum": (lambda z: torch.zeros(()).add_(z), "in place"),
    "nonzero": (lambda z: z.expand(2)[z.expand(2) > 0].sum(), "shape of a result depends"),
    "histogram": (lambda z: torch.histc(z.detach()[None]).sum(), "no rule for torch.vmap"),
    "function": (Identity.apply, "autograd.Function"),
    "batch norm": (lambda z: NORMALIZE(z.expand(3, 2)).sum(), "running statistics"),
    "buffer": (RUNNING, "buffer 'mean' of Running"),
    "in-place noise": (_noise, "random numbers into an existing tensor"),
}


@pytest.mark.parametrize("name", UNBATCHABLE)
def test_reason_names_the_site(name: str) -> None:
    compute, reason = UNBATCHABLE[name]

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(compute(z), 1.0), obs=torch.tensor(1.0))

    guide = AutoNormal(model)
    reference = trace_pair(model, guide, (), {})
    buffers = [buffer.clone() for buffer in (NORMALIZE.running_mean, NORMALIZE.running_var, RUNNING.mean)]
    handlers = len(poutine.runtime._PYRO_STACK)
    with pytest.raises(CannotBatch, match=reason) as raised:
        run_batched(model, guide, (), {}, K, reference)
    if name != "buffer":
        assert "'z'" in str(raised.value)
        assert isinstance(raised.value.__cause__, RuntimeError)
    assert len(poutine.runtime._PYRO_STACK) == handlers
    after = [NORMALIZE.running_mean, NORMALIZE.running_var, RUNNING.mean]
    assert all(torch.equal(a, b) for a, b in zip(after, buffers, strict=True))
    assert_batches(eight_schools, AutoNormal(eight_schools))  # nothing is left in a bad state


def test_sampler_that_drops_what_an_in_place_draw_returns() -> None:
    class Own(dist.Normal):  # type: ignore[misc]
        def rsample(self, sample_shape: Any = ()) -> Tensor:
            noise = torch.empty(self.loc.shape)
            noise.normal_()
            return self.loc + self.scale * noise

    def guide() -> None:
        pyro.sample("w", Own(pyro.param("loc", torch.zeros(3)), 1.0).to_event(1))

    with pytest.raises(CannotBatch, match="site 'w', it draws random numbers into an existing tensor"):
        batch(regression, guide)


def test_log_density_that_cannot_be_batched() -> None:
    class Checking(dist.Normal):  # type: ignore[misc]
        def log_prob(self, value: Tensor) -> Tensor:
            return super().log_prob(value) if value.sum() > -100 else value

    def model() -> None:
        pyro.sample("z", Checking(0.0, 1.0))

    guide = AutoNormal(model)
    with pytest.raises(CannotBatch, match="in the log density of site 'z', it branches"):
        batch(model, guide)


def test_structure_that_differs_from_the_reference() -> None:
    def model(extra: bool, heavy: bool) -> None:
        regression()
        if extra:
            pyro.sample("extra", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))
        pyro.sample("tail", dist.Cauchy(0.0, 1.0) if heavy else dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    def guide(*_: bool) -> None:
        normal_guide()

    reference = trace_pair(model, guide, (False, False), {})
    with pytest.raises(CannotBatch, match="site 'extra' of the model is not as in the run before"):
        run_batched(model, guide, (True, False), {}, K, reference)
    with pytest.raises(CannotBatch, match="site 'tail' of the model is not as in the run before"):
        run_batched(model, guide, (False, True), {}, K, reference)
    reference = trace_pair(model, guide, (True, False), {})
    with pytest.raises(CannotBatch, match="site 'extra' of the model is not in this run"):
        run_batched(model, guide, (False, False), {}, K, reference)


@pytest.mark.parametrize("error", [KeyError("mine"), ValueError("mine"), RuntimeError("mine")], ids=lambda e: repr(e))
def test_errors_of_the_program_itself_stay_what_they_are(error: Exception) -> None:
    def model() -> None:
        regression()
        if fail:
            raise error

    fail = False
    _, reference = batch(model, normal_guide)
    fail = True
    with pytest.raises(type(error), match="mine"):
        run_batched(model, normal_guide, (), {}, K, reference)


@pytest.mark.parametrize(
    ("draws", "message"),
    [
        ({"v": torch.zeros(K, 3)}, "'v', which is not a latent site of the guide"),
        ({"y": torch.zeros(K, 4)}, "'y', which is not a latent site of the guide"),
        ({"w": torch.zeros(K + 1, 3)}, "site 'w' have shape"),
        ({"w": torch.zeros(K)}, "site 'w' have shape"),
        ({"w": torch.zeros(K, 2, 3)}, "site 'w' have shape"),
    ],
)
def test_draws_that_do_not_fit(draws: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batch(regression, normal_guide, draws=draws)


# ----------------------------------------------------------------------------------------------------------------------
# The check


def test_check_leaves_random_state_and_gradients() -> None:
    guide = AutoNormal(eight_schools)
    result, reference = batch(eight_schools, guide)
    batched_log_weights(result).mean().backward()
    parameters = list(pyro.get_param_store()._params.values())
    gradients = [parameter.grad.clone() for parameter in parameters]
    state = torch.random.get_rng_state()
    check_batched(result, eight_schools, guide, (), {}, reference)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, gradients, strict=True))


@pytest.mark.parametrize(
    ("where", "site", "key"),
    [
        (0, "y", "log_prob"),
        (0, "w", "unscaled_log_prob"),
        (0, "y", "value"),
        (0, "y", "scale"),
        (0, "y", "mask"),
        (0, "y", "cond_indep_stack"),
        (1, "w", "score_parts"),
    ],
)
def test_check_names_the_site_that_differs(where: int, site: str, key: str) -> None:
    result, reference = batch(regression, normal_guide)
    node = result[where].nodes[site]
    wrong: dict[str, Any] = {
        "scale": 2.0,
        "mask": torch.tensor(True),
        "cond_indep_stack": node["cond_indep_stack"][:1] * 2,
        "score_parts": node["score_parts"]._replace(log_prob=node["log_prob"].flip(0)) if where else None,
    }
    node[key] = wrong[key] if key in wrong else node[key] * torch.linspace(1.0, 1.1, K).unsqueeze(-1) + 0.1
    with pytest.raises(CannotBatch, match=f"at site '{site}' of the {['model', 'guide'][where]}"):
        check_batched(result, regression, normal_guide, (), {}, reference)


def test_check_finds_draws_that_are_the_same_for_all_particles() -> None:
    class Once(dist.Normal):  # type: ignore[misc]
        def rsample(self, sample_shape: Any = ()) -> Tensor:
            return self.loc + self.scale * random.gauss(0.0, 1.0)

    def guide() -> None:
        pyro.sample("w", Once(pyro.param("loc", torch.zeros(3)), 1.0).to_event(1))

    random.seed(0)
    result, reference = batch(regression, guide)
    with pytest.raises(CannotBatch, match="draws of site 'w' are the same for all 5 particles"):
        check_batched(result, regression, guide, (), {}, reference)


def test_check_finds_randomness_outside_of_sites() -> None:
    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", 4):
            pyro.sample("y", dist.Bernoulli(logits=X @ nn.functional.dropout(w, 0.5)), obs=Y)

    result, reference = batch(model, normal_guide)
    with pytest.raises(CannotBatch, match="at site 'y' of the model"):
        check_batched(result, model, normal_guide, (), {}, reference)
