from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from torch import Tensor

from pyro_elbo_ext import (
    CompiledSVI,
    DecomposedELBO,
    ImportanceWeightedELBO,
    RenyiELBO,
    diagnose,
    evidence_bounds,
    fit,
    run_nuts,
)
from pyro_elbo_ext.density.unconstrained import UnconstrainedModel
from pyro_elbo_ext.evidence.scoring import Scorer
from pyro_elbo_ext.programs.nodes import is_latent
from tests.enumeration_oracles import sum_over_states

Program = Callable[..., Any]
Y = torch.tensor([-1.2, 0.4, 2.1])
SEQUENCES = torch.tensor([[0.3, -1.0], [1.5, 0.2], [-0.7, 0.9]])  # (time, sequence)


@pytest.fixture(autouse=True)
def double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def loc() -> Tensor:
    return pyro.sample("loc", dist.Normal(torch.tensor([-1.0, 1.5]), 1.0).to_event(1))


def mixture() -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([2.0, 1.0])))
    means = loc()
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(means[z], 0.8), obs=Y)


def latent_below() -> None:
    """A continuous latent site whose prior depends on a discrete one."""
    means = loc()
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        x = pyro.sample("x", dist.Normal(means[z.long()], 0.5))
        pyro.sample("y", dist.Normal(x, 1.0), obs=Y)


def tree() -> None:
    """A discrete site outside of the plate, and two dependent ones inside."""
    means = loc()
    a = pyro.sample("a", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
    with pyro.plate("data", 3):
        b = pyro.sample("b", dist.Categorical(torch.tensor([[0.1, 0.9], [0.6, 0.4], [0.5, 0.5]])[a]))
        c = pyro.sample("c", dist.Bernoulli(torch.tensor([0.2, 0.7])[b]))
        pyro.sample("y", dist.Normal(means[c.long()] + b, 0.9), obs=Y)


def chain() -> None:
    means, table = loc(), torch.tensor([[0.8, 0.2], [0.3, 0.7]])
    x: Any = 0
    for t in pyro.markov(range(4)):
        x = pyro.sample(f"x_{t}", dist.Categorical(table[x]))
        pyro.sample(f"y_{t}", dist.Normal(means[x], 1.0), obs=torch.tensor(0.5 * t - 1.0))


def chains(masks_states: bool = True) -> None:
    """Two sequences, with a mask over the last step of one: over states, it changes nothing, for they sum to one."""
    means, table = loc(), torch.tensor([[0.8, 0.2], [0.3, 0.7]])
    with pyro.plate("sequences", 2, dim=-1):
        x: Any = 0
        for t in pyro.markov(range(3)):
            mask = torch.tensor([True, t < 2])
            with poutine.mask(mask=mask if masks_states else True):
                x = pyro.sample(f"x_{t}", dist.Categorical(table[x]))
            with poutine.mask(mask=mask):
                pyro.sample(f"y_{t}", dist.Normal(means[x], 1.0), obs=SEQUENCES[t])


def nested() -> None:
    means = loc()
    with pyro.plate("outer", 2, dim=-2):
        a = pyro.sample("a", dist.Bernoulli(0.4))
        with pyro.plate("inner", 3, dim=-1):
            b = pyro.sample("b", dist.Categorical(torch.tensor([[0.7, 0.3], [0.2, 0.8]])[a.long()]))
            pyro.sample("y", dist.Normal(means[b], 1.0), obs=SEQUENCES.T)


def one_hot() -> None:
    means = loc()
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.3, 0.7])))
        pyro.sample("y", dist.Normal((z * means).sum(-1), 0.8), obs=Y)


def binomial() -> None:
    means = loc()
    with pyro.plate("data", 3):
        n = pyro.sample("n", dist.Binomial(2, 0.4))
        pyro.sample("y", dist.Normal(means[0] + n, 0.8), obs=Y)


def scaled(scale: float = 0.5) -> None:
    means = loc()
    with poutine.scale(scale=scale), pyro.plate("data", 3):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])))
        pyro.sample("y", dist.Normal(means[z], 0.8), obs=Y)


def impossible_states() -> None:
    """Transitions of probability 0, and a likelihood that rules a state out."""
    means, table = loc(), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    x: Any = 0
    for t in pyro.markov(range(3)):
        x = pyro.sample(f"x_{t}", dist.Categorical(table[x], validate_args=False))
        pyro.sample(f"y_{t}", dist.Normal(means[x], 1.0), obs=torch.tensor(0.3 * t))


def factorial() -> None:
    """Two sites that only the data tie together: their posterior does not split by site."""
    means = loc()
    with pyro.plate("data", 3):
        a = pyro.sample("a", dist.Bernoulli(0.3))
        b = pyro.sample("b", dist.Bernoulli(0.6))
        pyro.sample("y", dist.Normal(means[0] * a + means[1] * b, 0.9), obs=Y)


SPLIT = [mixture, latent_below, tree, chain, chains, nested, one_hot, binomial, impossible_states]
MODELS = [*SPLIT, scaled, factorial]
NESTING = {chain: 0, nested: 2, impossible_states: 0}


def guide_of(model: Program) -> AutoNormal:
    trace = poutine.trace(model).get_trace()
    names = [name for name, node in trace.nodes.items() if is_latent(node) and not node["fn"].support.is_discrete]
    pyro.set_rng_seed(3)
    guide = AutoNormal(poutine.block(model, expose=names), init_scale=0.3)
    guide()
    return guide


def evaluated(elbo: Any, model: Program, guide: Program, seed: int = 5) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients at a seed."""
    pyro.set_rng_seed(seed)
    parameters = dict(pyro.get_param_store().named_parameters())
    for parameter in parameters.values():
        parameter.grad = None
    loss = elbo.loss_and_grads(config_enumerate(model), guide)
    return loss, {name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None}


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_value_and_gradient_are_those_of_pyro(model: Program) -> None:
    guide, nesting = guide_of(model), NESTING.get(model, 1)
    loss, gradients = evaluated(TraceEnum_ELBO(max_plate_nesting=nesting), model, guide)
    ours, our_gradients = evaluated(DecomposedELBO(max_plate_nesting=nesting, kl="sampled"), model, guide)
    assert ours == pytest.approx(loss, abs=1e-10)
    assert our_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=0, atol=1e-10)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_rows_are_sums_over_all_states(model: Program) -> None:
    guide = guide_of(model)
    elbo = DecomposedELBO(kl="sampled")
    loss, _ = evaluated(elbo, model, guide)
    terms = elbo.last
    assert terms is not None
    assert terms.elbo == pytest.approx(-loss, abs=1e-10)
    pyro.set_rng_seed(5)
    guide_trace = poutine.trace(guide).get_trace()
    draws = {name: node["value"].detach() for name, node in guide_trace.nodes.items() if name in terms}
    scale = 0.5 if model is scaled else 1.0
    exact = sum_over_states(model, {scaled: (1.0,), chains: (False,)}.get(model, ()), draws)
    discrete = list(exact.marginals)
    joint = model is factorial
    for name, expected in exact.log_p.items():
        if name not in terms:  # the plate
            continue
        factor = 1.0 if name in draws else scale
        assert float(terms[name].log_p.sum()) == pytest.approx(factor * float(expected), abs=1e-10), name
    if joint:
        (name,) = [name for name in terms if ", " in name]
        assert float(terms[name].log_p.sum()) == pytest.approx(float(exact.log_p["a"] + exact.log_p["b"]), abs=1e-10)
        assert float(terms[name].log_q.sum()) == pytest.approx(float(exact.log_q["a"] + exact.log_q["b"]), abs=1e-10)
        assert "does not split" in terms[name].kl_reason
        return
    marginals = terms.marginals()
    for name in discrete:
        expected = exact.marginals[name].detach().squeeze()
        np.testing.assert_allclose(marginals[name], expected, rtol=0, atol=1e-10)
        assert marginals[name].dims == (*terms[name].plates, f"{name}_state")
        assert terms[name].kl_method == "marginalized"
        assert float(terms[name].log_q.sum()) == pytest.approx(scale * float(exact.log_q[name]), abs=1e-10), name


@pytest.mark.parametrize("model", [mixture, latent_below, tree], ids=lambda model: model.__name__)
@pytest.mark.parametrize("autoguide", [AutoNormal, AutoMultivariateNormal, AutoDelta])
@pytest.mark.parametrize("kl", ["sampled", "auto"])
def test_autoguides_count_once(model: Program, autoguide: Any, kl: Any) -> None:
    """A vector that several sites are made of is shared out among their rows."""
    names = [name for name in guide_of(model).prototype_trace.nodes if name in {"weights", "loc", "x"}]
    pyro.clear_param_store()
    pyro.set_rng_seed(4)
    guide = autoguide(poutine.block(model, expose=names))
    guide()
    elbo = DecomposedELBO(kl=kl)
    loss, _ = evaluated(elbo, model, guide)
    terms = elbo.last
    assert terms is not None
    assert terms.elbo == pytest.approx(-loss, abs=1e-9)
    pyro.set_rng_seed(5)
    log_q = float(poutine.trace(guide).get_trace().log_prob_sum().detach())
    drawn = [term.log_q for term in terms.values() if term.log_q is not None and term.kl_method != "marginalized"]
    assert sum([float(of.sum()) for of in drawn]) == pytest.approx(log_q, abs=1e-9)


def log_weights(model: Program, guide: Program, count: int, seed: int = 5) -> Tensor:
    """Of so many draws, with the discrete sites summed out state by state; with the gradient through the draws."""
    pyro.set_rng_seed(seed)
    weights = []
    traces = [poutine.trace(guide).get_trace() for _ in range(count)]
    for trace in traces:
        trace.compute_log_prob()
        log_q = torch.stack([node["log_prob"].sum() for node in trace.nodes.values() if is_latent(node)]).sum()
        draws = {name: node["value"] for name, node in trace.nodes.items() if is_latent(node)}
        weights.append(sum_over_states(model, {chains: (False,)}.get(model, ()), draws).log_sum - log_q)
    return torch.stack(weights)


BOUNDS = {
    "iwae": (lambda: ImportanceWeightedELBO(3), lambda w: w.logsumexp(0) - torch.tensor(3.0).log()),
    "renyi": (lambda: RenyiELBO(0.5, 3), lambda w: ((0.5 * w).logsumexp(0) - torch.tensor(3.0).log()) / 0.5),
    "elbo": (lambda: DecomposedELBO(3, kl="sampled"), lambda w: w.mean()),
}


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("model", [model for model in MODELS if model is not scaled], ids=lambda model: model.__name__)
def test_bounds_sum_out_inside_of_each_log_weight(model: Program, bound: str) -> None:
    guide = guide_of(model)
    make, of_weights = BOUNDS[bound]
    loss, gradients = evaluated(make(), model, guide)
    expected = -of_weights(log_weights(model, guide, 3))
    assert loss == pytest.approx(float(expected.detach()), abs=1e-10)
    parameters = {name: value for name, value in pyro.get_param_store().named_parameters() if name in gradients}
    for (name, _), gradient in zip(
        parameters.items(), torch.autograd.grad(expected, list(parameters.values())), strict=True
    ):
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-10)


@pytest.mark.parametrize("gradient", ["doubly_reparameterized", "score_function"])
@pytest.mark.parametrize("model", [mixture, latent_below, factorial, chains], ids=lambda model: model.__name__)
def test_other_gradients_leave_the_value(model: Program, gradient: Any) -> None:
    guide = guide_of(model)
    for elbo, of_weights in (
        (ImportanceWeightedELBO(3, gradient=gradient), BOUNDS["iwae"][1]),
        (DecomposedELBO(3, gradient=gradient), BOUNDS["elbo"][1]),
    ):
        loss, gradients = evaluated(elbo, model, guide)
        assert loss == pytest.approx(float(-of_weights(log_weights(model, guide, 3)).detach()), abs=1e-10)
        assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())
        terms = elbo.last
        assert terms is not None
        methods = {term.kl_method for term in terms.values() if term.kind == "latent"}
        assert methods == {"marginalized", "sampled"}


# Sites that the guide enumerates


def classes() -> None:
    """The guide's part is discrete and continuous, and depends on it."""
    with pyro.plate("data", 3):
        g = pyro.sample("g", dist.Categorical(torch.tensor([0.3, 0.7])))
        x = pyro.sample("x", dist.Normal(torch.tensor([-1.0, 1.0])[g], 1.0))
        pyro.sample("y", dist.Normal(x + g, 0.7), obs=Y)


def guide_of_classes(mark: dict[str, Any] | None = None) -> Program:
    def guide() -> None:
        logits = pyro.param("logits", torch.tensor([[0.3, -0.2], [0.1, 0.4], [-0.5, 0.2]]))
        locs = pyro.param("locs", torch.tensor([-0.5, 0.8]))
        with pyro.plate("data", 3):
            g = pyro.sample("g", dist.Categorical(logits=logits), infer=mark or {"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(locs[g], 0.6))

    return guide


def mixed() -> None:
    """One site for the guide, one for the model, and a score-function draw beside them."""
    with pyro.plate("data", 3):
        g = pyro.sample("g", dist.Categorical(torch.tensor([0.3, 0.7])))
        n = pyro.sample("n", dist.Poisson(1.5))
        m = pyro.sample("m", dist.Bernoulli(torch.tensor([0.2, 0.6])[g]), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(0.5 * g + m + 0.3 * n, 0.7), obs=Y)


def guide_of_mixed() -> None:
    logits = pyro.param("logits", torch.tensor([[0.3, -0.2], [0.1, 0.4], [-0.5, 0.2]]))
    rates = pyro.param("rates", torch.tensor([0.8, 1.0, 2.0]))
    with pyro.plate("data", 3):
        pyro.sample("g", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
        pyro.sample("n", dist.Poisson(rates))


IN_GUIDE = {
    "parallel": (classes, guide_of_classes(), {}),
    "sequential": (classes, guide_of_classes({"enumerate": "sequential"}), {}),
    "several draws": (classes, guide_of_classes({"enumerate": "parallel", "num_samples": 4}), {}),
    "with the model's": (mixed, guide_of_mixed, {}),
    "particles": (classes, guide_of_classes(), {"num_particles": 3}),
    "vectorized": (classes, guide_of_classes(), {"num_particles": 3, "vectorize_particles": True}),
}


@pytest.mark.parametrize("case", IN_GUIDE)
def test_enumeration_in_the_guide_is_pyros(case: str) -> None:
    model, guide, options = IN_GUIDE[case]
    results = []
    for elbo in (
        TraceEnum_ELBO(max_plate_nesting=1, **options),
        DecomposedELBO(max_plate_nesting=1, kl="sampled", **options),
    ):
        pyro.clear_param_store()
        pyro.set_rng_seed(11)
        loss = elbo.loss_and_grads(model, guide)
        gradients = {name: value.grad for name, value in pyro.get_param_store().named_parameters()}
        results.append((loss, gradients))
    (theirs, their_gradients), (ours, our_gradients) = results
    assert ours == pytest.approx(theirs, abs=1e-10)
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kl", ["sampled", "auto"])
def test_states_and_data_of_different_precision(kl: Any) -> None:
    """As float32 data beside the float64 draws of an automatic guide."""

    def model(dtype: torch.dtype) -> None:
        means, table = loc(), torch.tensor([[0.75, 0.25], [0.5, 0.5]], dtype=dtype)
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Categorical(table[0]), infer={"enumerate": "parallel"})
            w = pyro.sample("w", dist.Categorical(table[z]), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(means[w], 0.8), obs=Y)

    def guide(dtype: torch.dtype) -> None:
        at = pyro.param("at", torch.zeros(2))
        pyro.sample("loc", dist.Normal(at, 0.5).to_event(1))

    found = []
    for dtype in (torch.float32, torch.float64):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        elbo = DecomposedELBO(kl=kl, max_plate_nesting=1)
        loss = elbo.loss_and_grads(model, guide, dtype)
        assert elbo.last is not None
        found.append([loss, *elbo.last.to_dataframe()["kl_prior"].dropna(), *pyro.param("at").grad.tolist()])
    assert found[0] == pytest.approx(found[1], rel=1e-5, abs=1e-6)


def test_rows_of_the_guides_sites_are_expectations() -> None:
    elbo = DecomposedELBO(max_plate_nesting=1, kl="sampled")
    pyro.set_rng_seed(2)
    elbo.loss_and_grads(classes, guide_of_classes())
    terms = elbo.last
    assert terms is not None
    q = torch.tensor([[0.3, -0.2], [0.1, 0.4], [-0.5, 0.2]]).softmax(-1)
    prior = torch.tensor([0.3, 0.7])
    assert terms["g"].kl_method == "enumerated"
    torch.testing.assert_close(terms["g"].log_q, (q * q.log()).sum(-1))
    torch.testing.assert_close(terms["g"].log_p, (q * prior.log()).sum(-1))
    np.testing.assert_allclose(terms.marginals()["g"], q)


def test_closed_forms_given_enumerated_parents() -> None:
    """The expectation of the closed form under q; the parent's probabilities in the guide do not depend on the site."""
    elbo = DecomposedELBO(max_plate_nesting=1, kl="auto")
    elbo.loss_and_grads(classes, guide_of_classes())
    terms = elbo.last
    assert terms is not None
    q = torch.tensor([[0.3, -0.2], [0.1, 0.4], [-0.5, 0.2]]).softmax(-1)
    kls = torch.distributions.kl_divergence(
        dist.Normal(torch.tensor([-0.5, 0.8]), 0.6), dist.Normal(torch.tensor([-1.0, 1.0]), 1.0)
    )
    assert terms["x"].kl_method == "analytic"
    torch.testing.assert_close(terms["x"].kl_prior, (q * kls).sum(-1))


def test_closed_forms_of_a_site_that_only_its_prior_ties_to_an_enumerated_one() -> None:
    def guide() -> None:
        with pyro.plate("data", 3):
            pyro.sample("g", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.zeros(3)), 0.5))

    def model() -> None:
        with pyro.plate("data", 3):
            g = pyro.sample("g", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(g, 1.0))

    elbo = DecomposedELBO(max_plate_nesting=1)
    elbo.loss_and_grads(model, guide)
    terms = elbo.last
    assert terms is not None
    kls = torch.distributions.kl_divergence(dist.Normal(0.0, 0.5), dist.Normal(torch.tensor([0.0, 1.0]), 1.0))
    assert terms["x"].kl_method == "analytic"
    torch.testing.assert_close(terms["x"].kl_prior, (kls @ torch.tensor([0.6, 0.4])).expand(3))


def test_no_closed_form_where_the_parents_probabilities_depend_on_the_site() -> None:
    def model() -> None:
        g = pyro.sample("g", dist.Bernoulli(0.4))
        pyro.sample("x", dist.Normal(g, 1.0))

    def guide() -> None:
        x = pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.3)), 0.5))
        pyro.sample("g", dist.Bernoulli(logits=x), infer={"enumerate": "parallel"})

    elbo = DecomposedELBO(max_plate_nesting=0)
    for _ in range(2):
        elbo.loss_and_grads(model, guide)
    terms = elbo.last
    assert terms is not None
    assert terms["x"].kl_method == "sampled"
    assert "'x'" in str(terms["x"].kl_reason)


def test_sequential_enumeration_in_the_model_is_refused() -> None:
    def model() -> None:
        pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "sequential"})

    with pytest.raises(NotImplementedError, match=r"At site 'z', model-side sequential.*'parallel'"):
        DecomposedELBO().loss(model, lambda: None)


def test_programs_that_count_on_enumeration_are_not_run_without() -> None:
    """Where it is known how many dims plates have; else they are run once, as by Pyro."""
    shapes = []

    def model() -> None:
        shapes.append(pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"}).shape)

    for _ in range(2):
        DecomposedELBO(max_plate_nesting=0).loss(model, lambda: None)
    assert set(shapes) == {(2,)}


def _lazy_autoguide() -> tuple[Program, Program]:
    model = config_enumerate(mixture, "parallel")
    return model, AutoNormal(poutine.block(model, hide=["z"]))


def _random_start() -> tuple[Program, Program]:
    """A parameter whose first value is drawn when it is first asked for; the guide's site is summed over in two runs."""

    def guide() -> None:
        at = pyro.param("at", lambda: torch.randn(2))
        pyro.sample("weights", dist.Dirichlet(torch.tensor([2.0, 1.0])))
        pyro.sample("loc", dist.Normal(at, 0.5).to_event(1))
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])))

    return config_enumerate(mixture, "parallel"), config_enumerate(guide, "sequential")


def _running_mean() -> tuple[Program, Program]:
    """A guide with a buffer that each run moves, and noise that it draws beside its sites."""
    pyro.set_rng_seed(3)
    net = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(2))

    def guide() -> None:
        pyro.module("net", net)
        pyro.sample("weights", dist.Dirichlet(torch.tensor([2.0, 1.0])))
        pyro.sample("loc", dist.Normal(net(torch.arange(6.0).reshape(3, 2)).sum(0), 0.5).to_event(1))

    guide.net = net  # type: ignore[attr-defined]
    return config_enumerate(mixture, "parallel"), guide


@pytest.mark.parametrize("programs", [_lazy_autoguide, _random_start, _running_mean])
@pytest.mark.parametrize("num_particles", [1, 2])
def test_what_a_first_run_makes_is_made_once_as_by_pyro(
    programs: Callable[[], tuple[Program, Program]], num_particles: int
) -> None:
    """From the same seed the same losses and parameters, for programs that no one has run before."""

    def train(elbo: Any) -> tuple[list[float], dict[str, Tensor], int]:
        pyro.clear_param_store()
        model, guide = programs()
        pyro.set_rng_seed(0)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), elbo)
        losses = [svi.step() for _ in range(3)]
        found = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
        found |= dict(getattr(guide, "net", torch.nn.Module()).named_buffers())
        return losses, found, int(torch.randint(1_000_000, ()))

    pyros = train(TraceEnum_ELBO(num_particles, max_plate_nesting=1))
    ours = train(DecomposedELBO(num_particles, max_plate_nesting=1, kl="sampled"))
    assert ours[0] == pytest.approx(pyros[0], rel=1e-10)
    assert ours[2] == pyros[2]
    for name, value in pyros[1].items():
        torch.testing.assert_close(ours[1][name], value)


def _vectorized(time: Callable[..., Any]) -> Program:
    """A chain whose steps ``time`` gives, as ``pyro.vectorized_markov`` does: the middle ones stand there twice."""

    def model(y: Tensor) -> None:
        means, table = loc(), torch.tensor([[0.8, 0.2], [0.3, 0.7]])
        x: Any = 0
        for t in time(name="time", size=len(y), dim=-1):
            x = pyro.sample(f"x_{t}", dist.Categorical(table[x]), infer={"enumerate": "parallel"})
            pyro.sample(f"y_{t}", dist.Normal(means[x], 1.0), obs=y[t])

    return model


def _twice(name: str, size: int, dim: int) -> Iterator[Any]:
    """What sites look like to Pyro's own handlers in such a loop, where funsor is not installed."""
    yield 0
    with poutine.infer_config(config_fn=lambda _: {"_do_not_score": True}):
        yield torch.arange(size - 1)
    yield torch.arange(1, size)


def _time_of_funsor() -> Callable[..., Any]:
    try:
        funsor = pytest.importorskip("funsor", reason="funsor is not installed")
        funsor.set_backend("torch")
    except TypeError as error:  # releases that do not know this torch
        pytest.skip(f"funsor does not work with this torch: {error}")
    found: Callable[..., Any] = pytest.importorskip("pyro.contrib.funsor").vectorized_markov
    return found


def _at_loc(y: Tensor) -> None:
    pyro.sample("loc", dist.Normal(pyro.param("at", torch.zeros(2)), 0.5).to_event(1))


DOORS: dict[str, Callable[[Program, Tensor], Any]] = {
    "DecomposedELBO": lambda model, y: SVI(model, _at_loc, pyro.optim.Adam({"lr": 0.1}), DecomposedELBO()).step(y),
    "ImportanceWeightedELBO": lambda model, y: ImportanceWeightedELBO(2).loss(model, _at_loc, y),
    "CompiledSVI": lambda model, y: CompiledSVI(
        model, _at_loc, pyro.optim.Adam({"lr": 0.1}), TraceEnum_ELBO(max_plate_nesting=1)
    ).step(y),
    "fit": lambda model, y: fit(model, _at_loc, y, num_steps=2, progress=False),
    "fit, auto": lambda model, y: fit(model, "auto", y, progress=False),
    "run_nuts": lambda model, y: run_nuts(model, y, num_samples=2, warmup=2, chains=1, progress=False),
    "diagnose": lambda model, y: diagnose(model, _at_loc, y),
    "evidence_bounds": lambda model, y: evidence_bounds(model, _at_loc, y),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("backend", ["none", "funsor"])
def test_a_loop_that_only_funsor_takes_apart_is_refused(door: str, backend: str) -> None:
    """Its numbers would be wrong: the middle steps would count twice."""
    model = _vectorized(_twice if backend == "none" else _time_of_funsor())
    with pytest.raises(NotImplementedError, match=r"site 'x_.*vectorized_markov.*for t in pyro\.markov\(range"):
        DOORS[door](model, torch.tensor([0.3, -1.0, 1.5]))
    assert all(bool((value == 0).all()) for value in pyro.get_param_store().values())


# Weights, scores, compiled steps


@pytest.mark.parametrize("model", [mixture, factorial, chains], ids=lambda model: model.__name__)
def test_weighted_objectives_have_the_gradient_of_what_they_say(model: Program) -> None:
    """By finite differences: with a weight, the posterior of the states does not drop out of the gradient."""
    guide = guide_of(model)
    elbo = DecomposedELBO(kl="sampled", kl_weight=0.3)
    _, gradients = evaluated(elbo, model, guide)
    store, step = pyro.get_param_store(), 1e-5
    for name, parameter in store.named_parameters():
        numeric = torch.zeros_like(parameter)
        for at in range(parameter.numel()):
            values = []
            for sign in (1.0, -1.0):
                with torch.no_grad():
                    parameter.view(-1)[at] += sign * step
                pyro.set_rng_seed(5)
                values.append(elbo.loss(config_enumerate(model), guide))
                with torch.no_grad():
                    parameter.view(-1)[at] -= sign * step
            numeric.view(-1)[at] = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close(gradients[name], numeric, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("model", [model for model in MODELS if model is not scaled], ids=lambda model: model.__name__)
def test_scores_at_draws_have_the_states_summed_out(model: Program) -> None:
    guide = guide_of(model)
    scorer = Scorer(config_enumerate(model), guide, (), {}, 64, False)
    scores = scorer.draw(3)
    assert scorer.looped is None
    for i in range(3):
        draws = {name: torch.as_tensor(value[i]) for name, value in scores.values.items()}
        exact = sum_over_states(model, {chains: (False,)}.get(model, ()), draws).log_sum
        assert float(scores.log_p[i]) == pytest.approx(float(exact), abs=1e-10)


def test_evidence_of_a_mixture_with_one_latent() -> None:
    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Bernoulli(0.4))
            pyro.sample("y", dist.Normal(mu + 2 * z, 0.8), obs=Y)

    mu = torch.linspace(-12.0, 12.0, 8001)
    log_p = dist.Normal(0.0, 2.0).log_prob(mu)
    for y in Y:
        states = [math.log(w) + dist.Normal(mu + 2 * z, 0.8).log_prob(y) for z, w in ((0, 0.6), (1, 0.4))]
        log_p = log_p + torch.logaddexp(*states)
    exact = float(log_p.logsumexp(0)) + math.log(float(mu[1] - mu[0]))
    guide = lambda: pyro.sample("mu", dist.Normal(-0.15, 0.6))  # noqa: E731
    pyro.set_rng_seed(0)
    bounds = evidence_bounds(config_enumerate(model), guide)
    assert bounds.log_evidence[0] <= exact <= bounds.log_evidence[1]
    assert bounds.log_evidence[0] > exact - 0.2


@pytest.mark.parametrize("loss", [TraceEnum_ELBO, DecomposedELBO], ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("model", [mixture, chain, factorial], ids=lambda model: model.__name__)
def test_compiled_steps_are_those_of_svi(model: Program, loss: Any) -> None:
    losses = []
    for make in (SVI, partial(CompiledSVI, same_draws=True, backend="eager")):
        pyro.clear_param_store()
        guide = guide_of(model)
        svi = make(
            config_enumerate(model), guide, pyro.optim.Adam({"lr": 0.05}), loss(max_plate_nesting=NESTING.get(model, 1))
        )
        pyro.set_rng_seed(2)
        losses.append([svi.step() for _ in range(4)])
    assert losses[1] == pytest.approx(losses[0], abs=1e-9)


# Subsamples


@config_enumerate
def subsampled() -> None:
    with pyro.plate("data", 3, subsample_size=2) as rows:
        z = pyro.sample("z", dist.Bernoulli(0.3))
        x = pyro.sample("x", dist.Normal(2 * z - 1, 0.5))
        pyro.sample("y", dist.Normal(x, 1.0), obs=Y[rows])


def guide_of_subsampled() -> None:
    locs = pyro.param("locs", torch.tensor([0.2, -0.1, 0.5]))
    with pyro.plate("data", 3, subsample_size=2) as rows:
        pyro.sample("x", dist.Normal(locs[rows], 0.7))


@pytest.mark.parametrize("num_particles", [1, 3])
def test_subsamples_are_pyros(num_particles: int) -> None:
    results = []
    for elbo in (
        TraceEnum_ELBO(num_particles=num_particles, max_plate_nesting=1),
        DecomposedELBO(num_particles=num_particles, max_plate_nesting=1, kl="sampled"),
    ):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        loss = elbo.loss_and_grads(subsampled, guide_of_subsampled)
        ((_, locs),) = pyro.get_param_store().named_parameters()
        results.append((loss, locs.grad))
    assert results[1][0] == pytest.approx(results[0][0], abs=1e-10)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=0, atol=1e-10)


def test_a_bound_inside_a_subsampled_plate() -> None:
    """Of each row by itself, with its states summed out, times data size over batch size."""
    elbo = ImportanceWeightedELBO(3, max_plate_nesting=1)
    pyro.set_rng_seed(0)
    loss = elbo.loss_and_grads(subsampled, guide_of_subsampled)
    ((_, locs),) = pyro.get_param_store().named_parameters()
    pyro.set_rng_seed(0)
    first = poutine.trace(guide_of_subsampled).get_trace()
    same_rows = poutine.Trace()
    same_rows.nodes["data"] = first.nodes["data"]
    others = [poutine.trace(poutine.replay(guide_of_subsampled, trace=same_rows)).get_trace() for _ in range(2)]
    rows, weights = first.nodes["data"]["value"], []
    for x in [trace.nodes["x"]["value"] for trace in (first, *others)]:
        states = [math.log(p) + dist.Normal(loc, 0.5).log_prob(x) for loc, p in ((-1.0, 0.7), (1.0, 0.3))]
        log_p = torch.logaddexp(*states) + dist.Normal(x, 1.0).log_prob(Y[rows])
        weights.append(log_p - dist.Normal(locs[rows], 0.7).log_prob(x))
    expected = -3 / 2 * (torch.stack(weights).logsumexp(0) - math.log(3)).sum()
    assert loss == pytest.approx(float(expected.detach()), abs=1e-10)
    torch.testing.assert_close(locs.grad, torch.autograd.grad(expected, locs)[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("model", [model for model in MODELS if model is not mixture], ids=lambda model: model.__name__)
def test_the_density_that_nuts_has(model: Program) -> None:
    """Of unconstrained sites, so that there is no Jacobian; what scales the sites stands outside the sum, as in SVI."""
    density = UnconstrainedModel(config_enumerate(model), (), {}, seed=0, points=1)
    x = torch.linspace(-0.7, 1.1, density.dim)
    draws, start = {}, 0
    for name, place in density.layout.items():
        draws[name], start = x[place.start : place.stop], place.stop
    assert start == density.dim
    exact = sum_over_states(model, {scaled: (1.0,), chains: (False,)}.get(model, ()), draws)
    expected = exact.log_sum
    if model is scaled:
        prior = exact.log_p["loc"]
        expected = prior + 0.5 * (exact.log_sum - prior)
    value, gradient = density.value_and_grad(x)
    assert float(value) == pytest.approx(float(expected), abs=1e-10)
    assert bool(torch.isfinite(gradient).all())
