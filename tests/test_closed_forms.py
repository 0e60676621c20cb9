"""Which pairs of guide and prior have a closed form: the docs' tables, and each value and gradient by quadrature."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoLowRankMultivariateNormal, AutoNormal
from pyro.infer.autoguide.initialization import init_to_feasible
from torch import Tensor
from torch.distributions import kl_divergence, register_kl, transforms

from pyro_elbo_ext import CompiledSVI, DecomposedELBO, fit
from pyro_elbo_ext.terms.closed_forms import Weight, kl_prior, same_bijection
from pyro_elbo_ext.terms.terms import Term

ONE = Weight(1.0, None)
Family = tuple[Callable[..., Any], list[tuple[float, ...]]]  # and parameters to try

POSITIVE: dict[str, Family] = {
    "LogNormal": (dist.LogNormal, [(0.3, 0.7), (-4.0, 0.05), (5.0, 2.0)]),
    "Gamma": (dist.Gamma, [(2.5, 1.5), (300.0, 0.1), (3.0, 1e3)]),
    "Chi2": (dist.Chi2, [(3.0,), (90.0,)]),
    "Exponential": (dist.Exponential, [(1.5,), (1e-2,)]),
    "InverseGamma": (dist.InverseGamma, [(3.5, 2.0), (60.0, 1e3)]),
    "Weibull": (dist.Weibull, [(1.5, 2.0), (30.0, 1.3)]),
    "HalfNormal": (dist.HalfNormal, [(1.3,), (0.2,)]),
    "HalfCauchy": (dist.HalfCauchy, [(2.0,)]),
}
REAL: dict[str, Family] = {
    "Normal": (dist.Normal, [(0.3, 0.7), (-5.0, 3.0)]),
    "Laplace": (dist.Laplace, [(0.5, 1.2), (-6.0, 0.4)]),
    "Gumbel": (dist.Gumbel, [(0.5, 1.5), (2.0, 0.8)]),
    "Cauchy": (dist.Cauchy, [(0.5, 1.5)]),
    "StudentT": (dist.StudentT, [(4.0, 0.5, 1.5)]),
    "Logistic": (dist.Logistic, [(0.5, 1.5)]),
}


def make(family: Family, parameters: tuple[float, ...], dtype: torch.dtype) -> tuple[Any, list[Tensor]]:
    tensors = [torch.tensor(number, dtype=dtype, requires_grad=True) for number in parameters]
    return family[0](*tensors), tensors


def term(q: Any, p: Any) -> Term:
    """The term of a site with these distributions; a callable takes the model and gives a guide."""

    def model() -> None:
        pyro.sample("z", p)

    def guide() -> None:
        pyro.sample("z", q)

    elbo = DecomposedELBO()
    with pyro.validation_enabled(False):
        elbo.loss(model, guide if isinstance(q, torch.distributions.Distribution) else q(model))
    assert elbo.last is not None
    return elbo.last["z"]


# ----------------------------------------------------------------------------------------------------------------------
# The tables in the docs

UNIT = torch.tensor([0.2, 0.3, 0.5])
VECTOR = dist.MultivariateNormal(torch.tensor([0.3, -0.2]), scale_tril=torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
LOW_RANK = dist.LowRankMultivariateNormal(
    torch.tensor([0.3, -0.2]), torch.tensor([[1.0], [0.5]]), torch.tensor([0.5, 0.6])
)
ELEMENTS = dist.Normal(torch.tensor([1.0, 0.5]), torch.tensor([0.7, 1.3])).to_event(1)
BY_NAME: dict[str, Any] = {
    "Normal.to_event(1)": ELEMENTS,
    "Laplace.to_event(1)": dist.Laplace(torch.zeros(2), 1.0).to_event(1),
    "MultivariateNormal": VECTOR,
    "LowRankMultivariateNormal": LOW_RANK,
    "Beta": dist.Beta(2.0, 3.0),
    "Uniform": dist.Uniform(0.0, 1.0),
    "Kumaraswamy": dist.Kumaraswamy(2.0, 3.0),
    "Dirichlet": dist.Dirichlet(3 * UNIT),
    "Bernoulli": dist.Bernoulli(0.3),
    "Binomial": dist.Binomial(5, torch.tensor(0.3)),
    "Categorical": dist.Categorical(UNIT),
    "OneHotCategorical": dist.OneHotCategorical(UNIT),
    "Multinomial": dist.Multinomial(4, UNIT),
    "Poisson": dist.Poisson(2.0),
    "Geometric": dist.Geometric(0.3),
    "NegativeBinomial": dist.NegativeBinomial(3.0, torch.tensor(0.4)),
    "BetaBinomial": dist.BetaBinomial(2.0, 3.0, 5),
    "VonMises": dist.VonMises(0.3, 2.0),
    "LKJCholesky": dist.LKJCholesky(3, 1.0),
    "ImproperUniform": dist.ImproperUniform(constraints.real, (), ()),
    "Delta": dist.Delta(torch.tensor(0.4)),
    "Delta.to_event(1)": dist.Delta(torch.tensor([0.4, 0.3])).to_event(1),
    "MixtureSameFamily": dist.MixtureSameFamily(dist.Categorical(UNIT), dist.Normal(torch.arange(3.0), torch.ones(3))),
    "AutoNormal": lambda model: AutoNormal(model, init_loc_fn=init_to_feasible),
    "AutoDiagonalNormal": lambda model: AutoDiagonalNormal(model, init_loc_fn=init_to_feasible),
    "AutoDelta": AutoDelta,
    "AutoLowRankMultivariateNormal": lambda model: AutoLowRankMultivariateNormal(model, rank=1),
    **{name: make(family, family[1][0], torch.float32)[0] for name, family in {**POSITIVE, **REAL}.items()},
}

OTHERS = {"Kumaraswamy": dist.Kumaraswamy(3.0, 2.0)}  # the same one on both sides is a shared bijection


def rows() -> Iterator[tuple[str, str, str]]:
    """Guide, prior and method of every pair that the section tables."""
    text = (Path(__file__).parents[1] / "docs/guides/closed_forms.md").read_text("utf-8")
    section = text.split("## Which pairs have a closed form")[1]
    for table in re.findall(r"(?:^\|.*\n)+", section, flags=re.M):
        head, _, *body = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()]
        for guides, *cells in body:
            for guide in guides.split(", "):
                if head[1] == "prior":
                    yield from ((guide.strip("`"), prior.strip("`"), cells[1]) for prior in cells[0].split(", "))
                else:
                    for priors, cell in zip(head[1:], cells, strict=True):
                        yield from ((guide.strip("`"), prior.strip("`"), cell) for prior in priors.split(", "))


ROWS = list(rows())


def test_the_tables_are_read() -> None:
    assert len(ROWS) == len(set(ROWS)) > 120
    named = {(guide, prior) for guide, prior, _ in ROWS}
    for families in (POSITIVE, REAL):
        assert {(guide, prior) for guide in families for prior in families} <= named
    assert {method.split(":")[0] for *_, method in ROWS} == {"analytic", "sampled"}


@pytest.mark.parametrize(("guide", "prior", "method"), ROWS, ids=lambda name: name.split(":")[0])
def test_the_tables_are_true(guide: str, prior: str, method: str) -> None:
    found = term(BY_NAME[guide], OTHERS.get(prior, BY_NAME[prior]))
    assert found.kl_method == method.split(":")[0], found.kl_reason


# ----------------------------------------------------------------------------------------------------------------------
# Values and gradients


def by_quadrature(q: Any, p: Any, *, positive: bool) -> Tensor:
    """``KL(q || p)`` by the trapezoid rule, on the logarithm of a positive value; differentiable."""
    if positive:
        t = torch.linspace(-70.0, 40.0, 40_001, dtype=torch.float64)
        log_q, log_p = q.log_prob(t.exp()), p.log_prob(t.exp())
        density = (log_q + t).exp()
    else:
        t = torch.linspace(
            -150.0005, 249.9995, 400_001, dtype=torch.float64
        )  # a Laplace has its kink between two points
        log_q, log_p = q.log_prob(t), p.log_prob(t)
        density = log_q.exp()
    counts = (density > 0).detach()
    integrand = torch.where(counts, density * torch.where(counts, log_q - log_p, 0.0), 0.0)
    return integrand.sum() * (t[1] - t[0])


ANALYTIC = [
    (guide, prior, positive)
    for families, positive in ((POSITIVE, True), (REAL, False))
    for guide in families
    for prior in families
    if (guide, prior, "analytic") in ROWS and (guide, prior) != ("Cauchy", "Cauchy") and guide != "HalfCauchy"
]


@pytest.mark.parametrize(("guide", "prior", "positive"), ANALYTIC)
def test_value_and_gradient_by_quadrature(guide: str, prior: str, positive: bool) -> None:
    families = POSITIVE if positive else REAL
    with pyro.validation_enabled(False):
        for at_q in families[guide][1]:
            for at_p in families[prior][1]:
                q, of_q = make(families[guide], at_q, torch.float64)
                p, of_p = make(families[prior], at_p, torch.float64)
                expected = by_quadrature(q, p, positive=positive)
                gradients = torch.autograd.grad(expected, of_q + of_p, retain_graph=True)
                value, _ = kl_prior(q, p, ONE, ONE)
                size = 1 + float(expected.detach().abs())
                torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
                found = torch.autograd.grad(value, of_q + of_p, allow_unused=True, materialize_grads=True)
                loose = 100 if "Laplace" in (guide, prior) else 1  # whose kink the rule sees to second order only
                torch.testing.assert_close(found, gradients, rtol=loose * 1e-5, atol=loose * 1e-6 * size)
                q32, of_q32 = make(families[guide], at_q, torch.float32)
                p32, of_p32 = make(families[prior], at_p, torch.float32)
                value32, _ = kl_prior(q32, p32, ONE, ONE)
                torch.testing.assert_close(value32.double(), value, rtol=1e-3, atol=1e-3)
                assert all(g.isfinite() for g in torch.autograd.grad(value32, of_q32 + of_p32))


@pytest.mark.parametrize(("guide", "prior"), [("HalfCauchy", "HalfCauchy"), ("HalfCauchy", "LogNormal")])
def test_heavy_tails_by_substitution(guide: str, prior: str) -> None:
    """``x = s tan(u)`` makes a HalfCauchy uniform."""
    q, p = dist.HalfCauchy(torch.tensor(2.0, dtype=torch.float64)), None
    p = (
        dist.HalfCauchy(torch.tensor(0.7, dtype=torch.float64))
        if prior == guide
        else dist.LogNormal(torch.tensor(0.3, dtype=torch.float64), 1.5)
    )
    u = (torch.arange(2_000_000, dtype=torch.float64) + 0.5) / 2_000_000
    x = 2.0 * torch.tan(torch.pi / 2 * u)
    expected = (q.log_prob(x) - p.log_prob(x)).mean()
    torch.testing.assert_close(kl_prior(q, p, ONE, ONE)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("q", "p"),
    [
        (VECTOR, BY_NAME["Laplace.to_event(1)"]),
        (LOW_RANK, BY_NAME["Laplace.to_event(1)"]),
        (LOW_RANK, ELEMENTS),
        (ELEMENTS, LOW_RANK),
        (LOW_RANK, VECTOR),
        (BY_NAME["Multinomial"], dist.Multinomial(4, torch.tensor([0.5, 0.3, 0.2]))),
        (BY_NAME["Uniform"], BY_NAME["Beta"]),
        (BY_NAME["Dirichlet"], dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0]))),
    ],
)
def test_vectors_and_counts_by_draws(q: Any, p: Any) -> None:
    """Within 4.5 standard errors of the mean over 100,000 draws."""
    pyro.set_rng_seed(0)
    draws = q.sample((100_000,))
    difference = q.log_prob(draws) - p.log_prob(draws)
    value, _ = kl_prior(q, p, ONE, ONE)
    assert abs(value - difference.mean()) < 4.5 * difference.std() / len(draws) ** 0.5


@pytest.mark.parametrize(("guide", "prior"), [(guide, prior) for guide, prior, positive in ANALYTIC if positive])
def test_cross_entropy_minus_entropy(guide: str, prior: str) -> None:
    """The two with weights of their own: their difference at ``w_p = 1`` is the KL, and linear in ``w_p``."""
    q, _ = make(POSITIVE[guide], POSITIVE[guide][1][0], torch.float64)
    p, _ = make(POSITIVE[prior], POSITIVE[prior][1][0], torch.float64)
    kl, _ = kl_prior(q, p, ONE, ONE)
    half, _ = kl_prior(q, p, ONE, Weight(0.5, None))
    none, form = kl_prior(q, p, ONE, Weight(0.0, None))
    assert "cross-entropy minus entropy" in form
    torch.testing.assert_close(2 * half - none, kl)
    t = torch.linspace(-70.0, 40.0, 40_001, dtype=torch.float64)
    with pyro.validation_enabled(False):
        density = (q.log_prob(t.exp()) + t).exp()
        negative_entropy = torch.where(density > 0, density * q.log_prob(t.exp()), 0.0).sum() * (t[1] - t[0])
    torch.testing.assert_close(none, negative_entropy, rtol=1e-6, atol=1e-6)


def test_expectations_that_are_infinite() -> None:
    """1/x has no mean under a Gamma of concentration 1 or less, nor x under an InverseGamma."""
    concentration = torch.tensor([0.5, 1.0, 1.5], requires_grad=True)
    value, _ = kl_prior(dist.Gamma(concentration, 2.0), dist.InverseGamma(torch.ones(3), 1.0), ONE, ONE)
    assert value.isfinite().tolist() == [False, False, True]
    value, _ = kl_prior(dist.InverseGamma(concentration, 2.0), dist.Gamma(torch.ones(3), 1.0), ONE, ONE)
    assert value.isfinite().tolist() == [False, False, True]
    with pytest.raises(NotImplementedError, match="infinite"):
        kl_prior(dist.Exponential(1.0), dist.InverseGamma(2.0, 1.0), ONE, ONE)


# ----------------------------------------------------------------------------------------------------------------------
# Images of families


def image(base: Any, *parts: Any) -> Any:
    return dist.TransformedDistribution(base, list(parts))


@pytest.mark.parametrize(
    ("q", "same"),
    [
        (image(dist.Normal(0.3, 0.7), transforms.ExpTransform()), dist.LogNormal(0.3, 0.7)),
        (
            image(
                dist.Normal(0.0, 1.0),
                transforms.AffineTransform(torch.tensor(0.3), torch.tensor(-0.7)),
                transforms.ExpTransform(),
            ),
            dist.LogNormal(0.3, 0.7),
        ),
        (
            image(
                dist.Normal(0.3, 0.7),
                transforms.ComposeTransform([transforms.ExpTransform(), transforms.PowerTransform(-2.0)]),
            ),
            dist.LogNormal(-0.6, 1.4),
        ),
        (image(dist.LogNormal(0.3, 0.7), transforms.AffineTransform(0.0, 2.0)), dist.LogNormal(0.3 + 0.6931472, 0.7)),
        (image(dist.Gamma(3.0, 2.0), transforms.AffineTransform(0.0, 4.0)), dist.Gamma(3.0, 0.5)),
        (image(dist.Gamma(3.0, 2.0), transforms.PowerTransform(-1.0)), dist.InverseGamma(3.0, 2.0)),
        (image(dist.InverseGamma(3.0, 2.0), transforms.PowerTransform(-1.0)), dist.Gamma(3.0, 2.0)),
        (image(dist.InverseGamma(3.0, 2.0), transforms.AffineTransform(0.0, 4.0)), dist.InverseGamma(3.0, 8.0)),
        (image(dist.Exponential(4.0), transforms.PowerTransform(0.5)), dist.Weibull(0.5, 2.0)),
        (image(dist.HalfNormal(1.0), transforms.AffineTransform(0.0, 3.0)), dist.HalfNormal(3.0)),
    ],
)
def test_images_go_by_the_name_of_their_family(q: Any, same: Any) -> None:
    for prior in ("Gamma", "LogNormal", "HalfNormal", "Weibull"):
        p = BY_NAME[prior]
        torch.testing.assert_close(kl_prior(q, p, ONE, ONE)[0], kl_prior(same, p, ONE, ONE)[0])
    with_event = kl_prior(
        image(dist.LogNormal(torch.zeros(3), 1.0).to_event(1)), dist.Gamma(2.0, 1.0).expand([3]).to_event(1), ONE, ONE
    )
    torch.testing.assert_close(with_event[0], 3 * kl_prior(dist.LogNormal(0.0, 1.0), dist.Gamma(2.0, 1.0), ONE, ONE)[0])


def test_shared_bijections_leave_the_kl_as_it_is() -> None:
    for q, p in (
        (dist.Beta(2.0, 3.0), dist.Beta(1.0, 4.0)),
        (dist.Gamma(3.0, 2.0), dist.Gamma(2.0, 1.0)),
        (dist.Gumbel(0.0, 1.0), dist.Gumbel(0.5, 2.0)),
    ):
        expected = kl_divergence(q, p)
        for part in (
            lambda: transforms.AffineTransform(1.0, -2.0),
            lambda: transforms.AffineTransform(torch.tensor(1.0), 3.0),
        ):
            torch.testing.assert_close(kl_prior(image(q, part()), image(p, part()), ONE, ONE)[0], expected)
    affine = [
        dist.AffineBeta(a, b, torch.tensor(1.0), torch.tensor(2.0)).expand([3]) for a, b in ((2.0, 3.0), (1.0, 4.0))
    ]
    expected = kl_divergence(dist.Beta(2.0, 3.0), dist.Beta(1.0, 4.0))
    torch.testing.assert_close(kl_prior(affine[0], affine[1], ONE, ONE)[0], expected.expand(3))


def test_subclass_of_a_bijection_is_not_the_same_bijection() -> None:
    class Scaled(transforms.ExpTransform):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def _call(self, x: Tensor) -> Tensor:
            return (self.factor * x).exp()

    assert not same_bijection(Scaled(1.0), Scaled(2.0))
    with pytest.raises(NotImplementedError):
        kl_prior(image(dist.Normal(0.0, 1.0), Scaled(1.0)), image(dist.Normal(0.0, 1.0), Scaled(2.0)), ONE, ONE)


# ----------------------------------------------------------------------------------------------------------------------
# KLs that others have registered


class Shifted(dist.Normal):  # type: ignore[misc]
    """A density of its own, with its own KL and entropy, as GPyTorch's multivariate normal has."""

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value - 1)


class Further(Shifted):
    """The same density."""


class Elsewhere(Shifted):
    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(2 * value)


@register_kl(Shifted, Shifted)
def _kl_shifted(q: Shifted, p: Shifted) -> Tensor:
    return kl_divergence(dist.Normal(q.loc, q.scale), dist.Normal(p.loc, p.scale)) * torch.ones(())


def test_registered_for_the_classes_themselves() -> None:
    expected = kl_divergence(dist.Normal(0.0, 1.0), dist.Normal(1.0, 2.0))
    for q in (Shifted(0.0, 1.0), Further(0.0, 1.0)):
        found = term(q, Shifted(1.0, 2.0))
        assert found.kl_method == "analytic"
        torch.testing.assert_close(found.kl_prior, expected)
        vector = term(q.expand([3]).to_event(1), Shifted(1.0, 2.0).expand([3]).to_event(1))
        torch.testing.assert_close(vector.kl_prior, 3 * expected)


def test_registered_for_a_parent_with_another_density() -> None:
    for q, p in (
        (Shifted(0.0, 1.0), dist.Normal(0.0, 1.0)),
        (dist.Normal(0.0, 1.0), Shifted(0.0, 1.0)),
        (Elsewhere(0.0, 1.0), Shifted(0.0, 1.0)),
        (image(Shifted(0.0, 1.0), transforms.ExpTransform()), dist.Gamma(2.0, 1.0)),
    ):
        found = term(q, p)
        assert found.kl_method == "sampled"
        assert "overrides log_prob" in str(found.kl_reason) or "no closed form" in str(found.kl_reason)


def test_entropy_of_a_parent_is_not_used_either() -> None:
    """The KL is registered for the pair; where scales differ the entropy is needed too, and that is the parent's."""
    with pytest.raises(NotImplementedError, match="entropy"):
        kl_prior(Shifted(0.0, 1.0), Shifted(1.0, 2.0), ONE, Weight(0.5, None))


def test_wrapper_with_a_density_of_its_own_is_not_taken_off() -> None:
    class Halved(torch.distributions.Independent):
        def log_prob(self, value: Tensor) -> Tensor:
            return 0.5 * super().log_prob(value)

    with pytest.raises(NotImplementedError, match="overrides log_prob"):
        kl_prior(ELEMENTS, Halved(dist.Normal(torch.zeros(2), 1.0), 1), ONE, ONE)


def test_generic_form_of_exponential_families_is_not_used() -> None:
    """Torch's has no gradient in the guide's parameters."""

    class Own(torch.distributions.Wishart):
        pass

    df = torch.tensor(4.0, requires_grad=True)
    with pytest.raises(NotImplementedError):
        kl_prior(Own(df, torch.eye(2)), torch.distributions.Wishart(torch.tensor(3.0), torch.eye(2)), ONE, ONE)


def test_density_of_a_point_mass_counts() -> None:
    q = dist.Delta(torch.tensor([0.4, 0.3]), log_density=torch.tensor([-1.0, 0.5])).to_event(1)
    value, _ = kl_prior(q, ELEMENTS, ONE, ONE)
    torch.testing.assert_close(value, -0.5 - ELEMENTS.log_prob(torch.tensor([0.4, 0.3])))


# ----------------------------------------------------------------------------------------------------------------------
# A model like those of single cells


COUNTS = torch.tensor([[3.0, 0.0, 5.0, 2.0], [1.0, 2.0, 9.0, 0.0], [4.0, 1.0, 3.0, 1.0]])


def single_cells(counts: Tensor) -> None:
    """Hierarchical Gamma priors, each rate from other latents: eight latent sites, all of them positive."""
    shape = pyro.sample("shape", dist.Gamma(9.0, 3.0))
    rate = pyro.sample("rate", dist.Gamma(shape, 2.0))
    spread = pyro.sample("spread", dist.Exponential(rate))
    noise = pyro.sample("noise", dist.InverseGamma(3.0, 1.0 + spread))
    genes = pyro.plate("genes", 4, dim=-1)
    with genes:
        level = pyro.sample("level", dist.Gamma(shape, rate))
        overdispersion = pyro.sample("overdispersion", dist.Exponential(spread))
    with pyro.plate("cells", 3, dim=-2):
        depth = pyro.sample("depth", dist.LogNormal(0.0, noise))
        detection = pyro.sample("detection", dist.HalfNormal(1 + spread))
        with genes:
            mean = level * depth * detection
            pyro.sample(
                "counts", dist.GammaPoisson(1 / (0.1 + overdispersion), 1 / (0.1 + overdispersion) / mean), obs=counts
            )


def test_single_cells_have_nothing_sampled() -> None:
    pyro.set_rng_seed(0)
    guide = AutoNormal(single_cells)
    elbo, sampled = DecomposedELBO(num_particles=500, vectorize_particles="vmap"), DecomposedELBO(kl="sampled")
    elbo.loss(single_cells, guide, COUNTS)
    assert elbo.last is not None
    latent = {term.site: term.kl_method for term in elbo.last.values() if term.kind == "latent"}
    assert len(latent) == 8
    assert set(latent.values()) == {"analytic"}, elbo.last
    draws = torch.tensor([sampled.loss(single_cells, guide, COUNTS) for _ in range(500)])
    analytic = torch.tensor([DecomposedELBO().loss(single_cells, guide, COUNTS) for _ in range(3)])
    assert analytic.isfinite().all()
    # within 4.5 standard errors of the sampled losses' mean
    assert abs(elbo.loss(single_cells, guide, COUNTS) - draws.mean()) < 4.5 * 1.5 * draws.std() / 500**0.5


def test_compiled() -> None:
    """The graph is compared with the program before it is used; here every closed form stays one."""

    def model() -> None:
        rate = pyro.sample("rate", dist.Gamma(3.0, 2.0))
        pyro.sample("noise", dist.InverseGamma(3.0, rate))
        pyro.sample("time", dist.Weibull(1.0, 2.0))

    def guide() -> None:
        a = pyro.param("a", torch.tensor(2.0))
        pyro.sample("rate", dist.LogNormal(a.log(), 0.5))
        pyro.sample("noise", dist.InverseGamma(1 + a, 2.0))
        pyro.sample("time", dist.Gamma(a, 1.0))

    pyro.set_rng_seed(0)
    elbo = DecomposedELBO()
    svi = CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    assert torch.tensor([svi.step() for _ in range(3)]).isfinite().all()
    assert elbo.history is not None
    assert set(elbo.history.to_dataframe().kl_method) == {"analytic"}


@pytest.mark.parametrize("kl", ["auto", "analytic"])
@pytest.mark.parametrize("way", ["step", "fit", "compiled"])
@pytest.mark.parametrize("family", [dist.Gamma, dist.Weibull])
def test_an_infinite_kl_is_an_error_that_says_so(family: Any, way: str, kl: Any) -> None:
    """The mean of 1/x is infinite at a concentration of 1 and below; nothing is trained on it."""

    def model() -> None:
        pyro.sample("rate", dist.InverseGamma(2.0, 1.0))

    def guide() -> None:
        one = pyro.param("one", torch.tensor(1.0))
        pyro.sample("rate", dist.Gamma(one, 1.0) if family is dist.Gamma else dist.Weibull(1.0, one))

    adam, elbo = pyro.optim.Adam({"lr": 0.1}), DecomposedELBO(kl=kl)
    ways: dict[str, Callable[[], Any]] = {
        "step": lambda: SVI(model, guide, adam, elbo).step(),
        "fit": lambda: fit(model, guide, num_steps=2, loss=elbo, compiled=False, progress=False),
        "compiled": lambda: CompiledSVI(model, guide, adam, elbo, backend="eager").step(),
    }
    with pytest.raises(ValueError, match=r"^the KL of the guide to the prior is infinite at site 'rate'.*LogNormal"):
        ways[way]()
    assert pyro.param("one").item() == 1


# ----------------------------------------------------------------------------------------------------------------------
# In single precision

NEAR = "near"  # the guide is close to the prior, so that the KL is a small rest of large terms


def _positive(least: float = -4.0, most: float = 6.0) -> Callable[[int], Tensor]:
    return lambda n: 10 ** (least + (most - least) * torch.rand(n))


def _vectors(least: float, most: float) -> Callable[[int], Tensor]:
    return lambda n: 10 ** (least + (most - least) * torch.rand(n, 4))


def _locations(n: int) -> Tensor:
    return torch.randn(n) * _positive(-3, 5)(n)


def _logits(n: int) -> Tensor:
    return 4 * torch.randn(n)


WIDE: dict[str, tuple[Callable[..., Any], list[Callable[[int], Tensor]]]] = {
    "Normal": (dist.Normal, [_locations, _positive()]),
    "Laplace": (dist.Laplace, [_locations, _positive()]),
    "Gumbel": (dist.Gumbel, [_locations, _positive(-2, 3)]),
    "Cauchy": (dist.Cauchy, [_locations, _positive()]),
    "LogNormal": (dist.LogNormal, [lambda n: 5 * torch.randn(n), _positive(-4, 0.5)]),
    "Gamma": (dist.Gamma, [_positive(), _positive()]),
    "Chi2": (dist.Chi2, [_positive()]),
    "Exponential": (dist.Exponential, [_positive()]),
    "InverseGamma": (dist.InverseGamma, [_positive(0.4, 6), _positive()]),
    "Weibull": (dist.Weibull, [_positive(), _positive(-1, 4)]),
    "HalfNormal": (dist.HalfNormal, [_positive()]),
    "HalfCauchy": (dist.HalfCauchy, [_positive()]),
    "Pareto": (dist.Pareto, [_positive(), _positive()]),
    "Beta": (dist.Beta, [_positive(), _positive()]),
    "Uniform": (dist.Uniform, [lambda n: -_positive()(n), _positive()]),
    "Dirichlet": (dist.Dirichlet, [_vectors(-4, 6)]),
    "Poisson": (dist.Poisson, [_positive()]),
    "Bernoulli": (lambda logits: dist.Bernoulli(logits=logits), [_logits]),
    "Bernoulli(probs)": (dist.Bernoulli, [lambda n: _logits(n).sigmoid()]),
    "ContinuousBernoulli": (lambda logits: dist.ContinuousBernoulli(logits=logits), [_logits]),
    "Geometric": (lambda logits: dist.Geometric(logits=logits), [_logits]),
    "Geometric(probs)": (dist.Geometric, [lambda n: _logits(n).sigmoid()]),
    "Binomial": (lambda logits: dist.Binomial(10**6, logits=logits), [_logits]),
    "Categorical": (lambda logits: dist.Categorical(logits=logits), [_vectors(-3, 1)]),
    "Multinomial": (lambda logits: dist.Multinomial(10**4, logits=logits), [_vectors(-3, 1)]),
    "MultivariateNormal": (
        lambda loc, factor: dist.MultivariateNormal(loc, scale_tril=factor.tril()),
        [
            _vectors(-2, 2),
            lambda n: (torch.randn(n, 4, 4) / 2 + 4 * torch.eye(4)).abs() * _positive()(n)[:, None, None],
        ],
    ),
    "LowRankMultivariateNormal": (
        dist.LowRankMultivariateNormal,
        [_vectors(-2, 2), lambda n: torch.randn(n, 4, 2) * _positive(-2, 1)(n)[:, None, None], _vectors(-3, 1)],
    ),
    "Normal.to_event(1)": (lambda loc, scale: dist.Normal(loc, scale).to_event(1), [_vectors(-2, 2), _vectors(-3, 3)]),
    "Laplace.to_event(1)": (
        lambda loc, scale: dist.Laplace(loc, scale).to_event(1),
        [_vectors(-2, 2), _vectors(-3, 3)],
    ),
}


def in_both_precisions(guide: str, prior: str, near: bool) -> list[list[Tensor]]:
    """Value and ``parameter * gradient`` of a thousand pairs from parameters of single precision: in double, in single."""
    pyro.set_rng_seed(0)
    make_q, of_q = WIDE[guide]
    make_p, of_p = WIDE[prior]
    at_q = [draw(1000) for draw in of_q]
    at_p = [draw(1000) for draw in of_p] if not near else [x * (1 + 1e-3 * torch.rand_like(x)) for x in at_q]
    if near and guide.endswith("(probs)"):
        at_p = [x.clamp(max=1 - 1e-6) for x in at_p]
    found = []
    for dtype in (torch.float64, torch.float32):
        parameters = [x.to(dtype).requires_grad_() for x in (*at_q, *at_p)]
        value, _ = kl_prior(make_q(*parameters[: len(at_q)]), make_p(*parameters[len(at_q) :]), ONE, ONE)
        assert value.dtype == dtype
        gradients = torch.autograd.grad(value.sum(), parameters, allow_unused=True, materialize_grads=True)
        found.append(
            [value.detach().double(), *((x.detach() * g).double() for x, g in zip(parameters, gradients, strict=True))]
        )
    return found


def _pairs_in_single_precision() -> Iterator[Any]:
    for guide, (make_q, of_q) in WIDE.items():
        for prior, (make_p, of_p) in WIDE.items():
            with pyro.validation_enabled(False), torch.random.fork_rng():
                torch.manual_seed(0)  # every process must find the same pairs
                try:
                    value, _ = kl_prior(make_q(*(x(100) for x in of_q)), make_p(*(x(100) for x in of_p)), ONE, ONE)
                except NotImplementedError:
                    continue
            if not value.isfinite().any():
                continue  # whatever the parameters
            yield pytest.param(guide, prior, False, id=f"{guide}-{prior}")
            if guide == prior:
                yield pytest.param(guide, prior, True, id=f"{guide}-{prior}-{NEAR}")


@pytest.mark.parametrize(("guide", "prior", "near"), list(_pairs_in_single_precision()))
def test_single_precision_loses_nothing(guide: str, prior: str, near: bool) -> None:
    """Parameters of single precision give the value and gradient that double precision has at the same parameters."""
    with pyro.validation_enabled(False):
        expected, found = in_both_precisions(guide, prior, near)
    value = expected[0]
    counts = value.abs() < 1e30
    for i, (exact, single) in enumerate(zip(expected, found, strict=True)):
        size = value.abs().reshape(-1, *[1] * (exact.dim() - 1)) + exact.abs() + 1
        error = ((exact - single).abs() / size)[counts & (exact.abs().reshape(len(value), -1).amax(-1) < 1e30)]
        # the constructor of a Multinomial normalizes its logits in their own precision
        tolerance = 1e-3 if guide == "Multinomial" else 2e-5
        assert (error < tolerance).all(), (i, error.max())


def test_a_sharp_beta_in_single_precision() -> None:
    """The example by which it was found: 5.25 in single precision."""
    q, p = dist.Beta(torch.tensor(1e5), torch.tensor(1e5)), dist.Beta(torch.tensor(1.0), torch.tensor(1.0))
    assert float(kl_prior(q, p, ONE, ONE)[0]) == pytest.approx(5.377246, abs=1e-5)
    assert float(kl_prior(q, p, ONE, Weight(0.0, None))[0]) == pytest.approx(5.377246, abs=1e-5)  # the negative entropy
