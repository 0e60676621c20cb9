"""Analytic or sampled: the value, the validity and the reason, against closed forms worked out by hand."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal
from torch.distributions import kl_divergence, transforms

from pyro_elbo_ext import DecomposedELBO
from pyro_elbo_ext.terms.closed_forms import Weight, kl_prior, same_bijection
from pyro_elbo_ext.terms.terms import Term

ONE = Weight(1.0, None)


def term(model: Callable[..., Any], guide: Callable[..., Any], site: str = "z", **options: Any) -> Term:
    elbo = DecomposedELBO(**options)
    elbo.loss_and_grads(model, guide)
    assert elbo.last is not None
    return elbo.last[site]


def losses(model: Callable[..., Any], guide: Callable[..., Any], count: int = 20) -> torch.Tensor:
    elbo = DecomposedELBO()
    return torch.tensor([elbo.loss(model, guide) for _ in range(count)])


def pair(p: Any, q: Any) -> tuple[Callable[[], None], Callable[[], None]]:
    """Model and guide of one site, from distributions or functions that make them."""

    def model() -> None:
        pyro.sample("z", p() if callable(p) and not isinstance(p, dist.Distribution) else p)

    def guide() -> None:
        pyro.sample("z", q() if callable(q) and not isinstance(q, dist.Distribution) else q)

    return model, guide


CLOSED = [
    (dist.Normal(0.0, 1.0), dist.Normal(3.0, 1.0)),
    (dist.Normal(torch.zeros(3), 1.0).to_event(1), dist.Normal(torch.ones(3), 0.5).to_event(1)),
    (dist.Normal(0.0, 1.0).expand([3]).to_event(1), dist.Normal(torch.arange(3.0), 0.5).to_event(1)),
    (dist.LogNormal(0.0, 1.0), dist.LogNormal(0.5, 0.3)),
    (dist.Gamma(2.0, 1.0), dist.Gamma(3.0, 2.0)),
    (dist.Beta(2.0, 1.0), dist.Beta(3.0, 2.0)),
    (dist.Dirichlet(torch.ones(3)), dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0]))),
    (dist.Bernoulli(0.3), dist.Bernoulli(0.7)),
    (dist.Categorical(torch.tensor([0.2, 0.3, 0.5])), dist.Categorical(torch.tensor([0.4, 0.4, 0.2]))),
    (dist.Poisson(2.0), dist.Poisson(3.0)),
    (dist.HalfNormal(1.0), dist.HalfNormal(2.0)),
    (dist.Laplace(0.0, 1.0), dist.Laplace(0.5, 2.0)),
    (dist.MultivariateNormal(torch.zeros(2), torch.eye(2)), dist.MultivariateNormal(torch.ones(2), 0.5 * torch.eye(2))),
]


@pytest.mark.parametrize(("p", "q"), CLOSED, ids=lambda fn: type(fn).__name__)
def test_registered_pairs(p: Any, q: Any) -> None:
    found = term(*pair(p, q))
    assert found.kl_method == "analytic", found.kl_reason
    draws = q.sample((20_000,))
    difference = q.log_prob(draws) - p.log_prob(draws)
    standard_error = difference.std() / math.sqrt(len(draws))
    assert found.kl_prior is not None
    assert abs(found.kl_prior - difference.mean()) < 4.5 * standard_error + 1e-5


@pytest.mark.parametrize("batch", [(), (4,)])
def test_vector_gaussian_against_independent_ones(batch: tuple[int, ...]) -> None:
    tril = torch.tensor([[1.0, 0.0], [0.6, 0.8]]).expand(*batch, 2, 2)
    vector = dist.MultivariateNormal(torch.tensor([0.3, -0.2]).expand(*batch, 2), scale_tril=tril)
    product = dist.Normal(torch.tensor([1.0, 0.5]).expand(*batch, 2), torch.tensor([0.7, 1.3])).to_event(1)
    as_vector = dist.MultivariateNormal(product.mean, torch.diag_embed(product.variance))
    for q, p, same in ((vector, product, (vector, as_vector)), (product, vector, (as_vector, vector))):
        value, _ = kl_prior(q, p, ONE, ONE)
        torch.testing.assert_close(value, kl_divergence(*same))


def test_masked_and_expanded_wrappers() -> None:
    mask = torch.tensor([True, False, True])
    q, p = dist.Normal(torch.arange(3.0), 1.0), dist.Normal(0.0, 2.0).expand([3])
    elementwise = kl_divergence(q, p)
    value, _ = kl_prior(q.mask(mask).to_event(1), p.mask(mask).to_event(1), ONE, ONE)
    torch.testing.assert_close(value, elementwise[mask].sum())
    value, form = kl_prior(q.to_event(1), p.mask(mask).to_event(1), ONE, ONE)
    cross_entropy = elementwise + q.entropy()
    torch.testing.assert_close(value, cross_entropy[mask].sum() - q.entropy().sum())
    assert "cross-entropy minus entropy" in form
    site_mask = Weight(2.0, torch.tensor([True, True, False]))
    value, _ = kl_prior(q, p, site_mask, site_mask)
    torch.testing.assert_close(value, 2 * elementwise * site_mask.mask)
    expanded = dist.Normal(torch.zeros(1), 1.0)
    wrapped = pyro.distributions.torch_distribution.ExpandedDistribution(expanded, torch.Size([3]))
    value, _ = kl_prior(q, wrapped, ONE, ONE)
    torch.testing.assert_close(value, kl_divergence(q, dist.Normal(torch.zeros(3), 1.0)))


@pytest.mark.parametrize(
    ("model_scale", "guide_scale", "expected"), [(0.1, 1.0, -0.83), (1.0, 0.1, 5.777), (0.1, 0.1, 0.45)]
)
def test_scale_of_one_side_only(model_scale: float, guide_scale: float, expected: float) -> None:
    """Prior N(0, 1), q = N(3, 1).  TraceMeanField_ELBO scales the whole KL by the guide's scale: 4.50 and 0.45."""
    model, guide = pair(dist.Normal(0.0, 1.0), dist.Normal(3.0, 1.0))
    model, guide = poutine.scale(model, scale=model_scale), poutine.scale(guide, scale=guide_scale)
    found = term(model, guide)
    assert found.kl_method == "analytic"
    assert found.kl_prior is not None
    assert found.kl_prior.item() == pytest.approx(expected, abs=0.005)
    if model_scale != guide_scale:
        assert abs(TraceMeanField_ELBO().loss(model, guide) - expected) > 1


def test_dependent_parent_is_sampled() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0))

    def guide() -> None:
        y = pyro.sample("y", dist.Normal(0.3, 1.0))
        pyro.sample("x", dist.Normal(y, 1.0))

    found = term(model, guide, "y")
    assert found.kl_method == "sampled"
    assert found.kl_reason is not None
    assert "'y'" in found.kl_reason
    assert term(model, guide, "x").kl_method == "analytic"
    with pytest.raises(ValueError, match=r"site 'y': a parent of 'y' in the model is drawn from 'y' in the guide"):
        DecomposedELBO(kl="analytic").loss(model, guide)


def test_other_site_order_alone_is_no_obstacle() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0))

    def guide() -> None:
        pyro.sample("y", dist.Normal(0.3, 1.0))
        pyro.sample("x", dist.Normal(0.1, 1.0))

    assert term(model, guide, "y").kl_method == term(model, guide, "x").kl_method == "analytic"


@pytest.mark.parametrize("through", ["index", "branch", "tolist", "in place", "scale", "mask"])
def test_dependencies_that_autograd_does_not_see(through: str) -> None:
    """The prior of b depends on a, and the guide draws a given b: b has no analytic KL, however a gets there."""

    def model() -> None:
        a = pyro.sample("a", dist.Bernoulli(0.5))
        loc: Any = torch.zeros(())
        scale: Any = 1.0
        mask: Any = torch.tensor(True)
        if through == "index":
            loc = torch.tensor([0.0, 2.0])[a.long()]
        elif through == "branch":
            loc = torch.tensor(2.0 if a > 0 else 0.0)
        elif through == "tolist":
            loc = torch.tensor(2 * a.tolist())
        elif through == "in place":
            buffer = torch.zeros(2)
            buffer[0] = a
            loc = buffer[0]
        elif through == "scale":
            scale = 1 + a
        else:
            mask = a > 0
        with poutine.scale(scale=scale), poutine.mask(mask=mask):
            pyro.sample("b", dist.Normal(loc, 1.0))

    def guide() -> None:
        b = pyro.sample("b", dist.Normal(0.5, 1.0))
        pyro.sample("a", dist.Bernoulli(torch.sigmoid(b.detach())))

    assert term(model, guide, "b").kl_method == "sampled"
    assert term(model, guide, "a").kl_method == "analytic"


def test_subclass_with_its_own_density_is_not_trusted() -> None:
    class Shifted(dist.Normal):  # type: ignore[misc]
        def log_prob(self, value: torch.Tensor) -> torch.Tensor:
            return super().log_prob(value - 1)

    found = term(*pair(Shifted(0.0, 1.0), dist.Normal(0.0, 1.0)))
    assert found.kl_method == "sampled"
    assert "overrides log_prob" in str(found.kl_reason)


def test_learnable_bijections_of_equal_value_are_not_the_same() -> None:
    shift = torch.tensor(0.5, requires_grad=True)
    a, b = transforms.AffineTransform(shift, 1.0), transforms.AffineTransform(torch.tensor(0.5), 1.0)
    assert not same_bijection(a, b)
    assert same_bijection(a, a)
    assert same_bijection(transforms.ExpTransform(), transforms.ExpTransform())
    assert same_bijection(transforms.AffineTransform(0.5, 1.0), transforms.AffineTransform(0.5, 1.0))
    composed = [
        transforms.ComposeTransform([transforms.ExpTransform(), transforms.AffineTransform(1.0, 2.0)]) for _ in "ab"
    ]
    assert same_bijection(*composed)
    assert not same_bijection(transforms.ExpTransform(), transforms.SigmoidTransform())


@pytest.mark.parametrize("validate", [True, False])
def test_discrete_gradient_is_right(validate: bool) -> None:
    """TraceMeanField_ELBO without validation gives 0.0 here; the right gradient is -2.07."""

    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(3 * z, 1.0), obs=torch.tensor(3.0))

    def guide() -> None:
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.5))))

    logit = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    q = torch.stack([torch.sigmoid(-logit), torch.sigmoid(logit)])
    reconstruction = dist.Normal(torch.tensor([0.0, 3.0]), 1.0).log_prob(torch.tensor(3.0))
    exact_loss = (q * (q.log() - math.log(0.5) - reconstruction)).sum()
    exact_loss.backward()
    assert logit.grad is not None
    with pyro.validation_enabled(validate):
        elbo, gradients = DecomposedELBO(), []
        for _ in range(800):
            elbo.loss_and_grads(model, guide)
            gradients.append(pyro.param("l").unconstrained().grad.item())
            pyro.param("l").unconstrained().grad = None
    samples = torch.tensor(gradients)
    assert abs(samples.mean() - logit.grad) < 4.5 * samples.std() / math.sqrt(len(samples))
    assert samples.mean() < -0.5


# Autoguides


def prior_only() -> None:
    pyro.sample("a", dist.Normal(1.0, 2.0))
    with pyro.plate("plate", 3):
        pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("s", dist.LogNormal(0.0, 0.5))


@pytest.mark.parametrize(
    "autoguide", [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal], ids=lambda cls: cls.__name__
)
def test_folded_autoguide_has_no_noise_against_its_prior(autoguide: Any) -> None:
    guide = autoguide(prior_only)
    guide()
    if autoguide is AutoMultivariateNormal:
        guide.scale_tril = torch.eye(10) + 0.3 * torch.ones(10, 10).tril(-1)
    values = losses(prior_only, guide)
    assert values.std() < 1e-5
    sampled = DecomposedELBO(kl="sampled")
    draws = torch.tensor([sampled.loss(prior_only, guide) for _ in range(1500)])
    assert abs(draws.mean() - values[0]) < 4.5 * draws.std() / math.sqrt(len(draws))
    assert draws.std() > 0.5
    elbo = DecomposedELBO(kl="analytic")
    elbo.loss(prior_only, guide)
    assert elbo.last is not None
    assert set(elbo.last) == {"a", "b", "s"}


def correlated_chain() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("plate", 2):
        b = pyro.sample("b", dist.Normal(a, 0.5))
    c = pyro.sample("c", dist.LogNormal(b.sum(), 1.0))
    pyro.sample("x", dist.Normal(c.log(), 1.0), obs=torch.tensor(1.0))


def test_joint_gaussian_by_the_chain_rule() -> None:
    """AutoMultivariateNormal on a linear-Gaussian chain: exact ELBO and gradients from moments."""
    guide = AutoMultivariateNormal(correlated_chain)
    guide()
    torch.manual_seed(3)
    root = torch.randn(4, 4).tril(-1) * 0.4 + torch.eye(4)
    with torch.no_grad():
        guide.loc.copy_(torch.tensor([0.2, -0.1, 0.4, 0.3]))
    guide.scale_tril = root
    guide.scale = torch.tensor([0.5, 0.7, 0.4, 0.9])

    def exact() -> torch.Tensor:
        loc, tril = guide.loc, guide.scale[:, None] * guide.scale_tril
        covariance = tril @ tril.T

        def expected_log_normal(direction: list[float], offset: float, scale: float) -> torch.Tensor:
            d = torch.tensor(direction, dtype=loc.dtype)
            square = (d @ loc - offset) ** 2 + d @ covariance @ d
            return -0.5 * math.log(2 * math.pi) - math.log(scale) - square / (2 * scale**2)

        entropy = 2 * (1 + math.log(2 * math.pi)) + tril.diagonal().log().sum()
        return (
            expected_log_normal([1, 0, 0, 0], 0.0, 1.0)
            + expected_log_normal([-1, 1, 0, 0], 0.0, 0.5)
            + expected_log_normal([-1, 0, 1, 0], 0.0, 0.5)
            + expected_log_normal([0, -1, -1, 1], 0.0, 1.0)
            + expected_log_normal([0, 0, 0, 1], 1.0, 1.0)
            + entropy
        )

    parameters = list(guide.parameters())
    expected_value = exact()
    expected = torch.autograd.grad(-expected_value, parameters)
    elbo = DecomposedELBO()
    values, gradients = [], []
    for _ in range(1500):
        values.append(elbo.loss_and_grads(correlated_chain, guide))
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))
        for parameter in parameters:
            parameter.grad = None
    assert elbo.last is not None
    assert {name: t.kl_method for name, t in elbo.last.items() if t.kind != "observed"} == dict.fromkeys(
        "abc", "analytic"
    )
    samples, stacked = torch.tensor(values), torch.stack(gradients)
    assert abs(samples.mean() + expected_value) < 4.5 * samples.std() / math.sqrt(1500)
    error = (stacked.mean(0) - torch.cat([g.flatten() for g in expected])).abs()
    assert (error <= 4.5 * stacked.std(0) / math.sqrt(1500) + 1e-5).all()


def test_joint_sites_add_up_to_the_joint_density() -> None:
    guide = AutoMultivariateNormal(correlated_chain)
    guide()
    guide.scale_tril = torch.eye(4) + 0.5 * torch.ones(4, 4).tril(-1)
    totals = []
    for kl in ("auto", "sampled"):
        pyro.set_rng_seed(2)
        elbo = DecomposedELBO(kl=kl)  # type: ignore[arg-type]
        elbo.loss(correlated_chain, guide)
        assert elbo.last is not None
        totals.append(elbo.last.log_weights)
    torch.testing.assert_close(*totals)


def test_other_autoguides_are_sampled_not_wrong() -> None:
    guide = AutoLowRankMultivariateNormal(prior_only, rank=2)
    guide()
    elbo = DecomposedELBO()
    for seed in range(3):
        pyro.set_rng_seed(seed)
        auto = elbo.loss(prior_only, guide)
        pyro.set_rng_seed(seed)
        assert auto == pytest.approx(DecomposedELBO(kl="sampled").loss(prior_only, guide), rel=1e-6)


def test_prior_without_closed_form_under_an_autoguide() -> None:
    def model() -> None:
        pyro.sample("tau", dist.HalfCauchy(5.0))

    guide = AutoNormal(model)
    guide()
    found = term(model, guide, "tau")
    assert found.kl_method == "sampled"
    assert "HalfCauchy" in str(found.kl_reason)
    with pytest.raises(ValueError, match=r"site 'tau'.*HalfCauchy"):
        DecomposedELBO(kl="analytic").loss(model, guide)


def test_methods_are_logged_once_without_warnings(caplog: pytest.LogCaptureFixture) -> None:
    model, guide = pair(dist.Normal(0.0, 1.0), dist.Laplace(0.0, 1.0))
    with caplog.at_level(logging.INFO, logger="pyro_elbo_ext"):
        elbo = DecomposedELBO()
        for _ in range(3):
            elbo.loss(model, guide)
    assert [record.message for record in caplog.records if "'z'" in record.message] == [
        "kl_prior of site 'z' is analytic: closed form Laplace || Normal"
    ]


def test_structure_that_changes_is_sampled_until_it_is_tracked() -> None:
    calls = []

    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        if len(calls) > 1:
            pyro.sample("b", dist.Normal(a, 1.0))

    def guide() -> None:
        calls.append(0)
        pyro.sample("a", dist.Normal(0.5, 1.0))
        if len(calls) > 1:
            pyro.sample("b", dist.Normal(0.5, 1.0))

    elbo = DecomposedELBO()
    methods = []
    for _ in range(4):
        elbo.loss(model, guide)
        assert elbo.last is not None
        methods.append([term.kl_method for term in elbo.last.values()])
    assert methods == [["analytic"], ["sampled"] * 2, ["analytic"] * 2, ["analytic"] * 2]
