"""The automatic guide against exact posteriors, and what it says where it cannot be right."""

from __future__ import annotations

import math
import re

import automatic_models as am
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import Tensor

from pyro_elbo_ext import CompiledSVI, DecomposedELBO, compiled_log_density, diagnose, from_pyro_svi, psis_khat
from pyro_elbo_ext.automatic.approximate import approximate
from pyro_elbo_ext.automatic.ascent import fit_gaussian
from pyro_elbo_ext.automatic.evaluations import Evaluations
from pyro_elbo_ext.automatic.flow import Flow, FlowGuide, pushed
from pyro_elbo_ext.automatic.gaussian import Gaussian, standard_draws
from pyro_elbo_ext.automatic.guide import DiagonalGuide, GaussianGuide
from pyro_elbo_ext.automatic.moments import Weighted
from pyro_elbo_ext.automatic.natural_gradient import natural_step, taken
from pyro_elbo_ext.automatic.starting import find_start
from pyro_elbo_ext.density.log_density import LogDensity
from pyro_elbo_ext.programs.randomness import isolated

X = torch.randn(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = X @ torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64) + 0.3 * torch.cos(torch.arange(30.0))


def regression(x: Tensor, y: Tensor) -> None:
    """Conjugate: noise of known sd 0.5, prior sds 2."""
    beta = pyro.sample("beta", dist.Normal(torch.zeros(x.shape[1], dtype=x.dtype), 2.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, 0.5), obs=y)


def exact(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float]:
    """Posterior mean, covariance and log evidence of `regression`."""
    covariance = torch.linalg.inv(x.T @ x / 0.25 + torch.eye(x.shape[1], dtype=x.dtype) / 4)
    mean = covariance @ x.T @ y / 0.25
    marginal = torch.distributions.MultivariateNormal(torch.zeros_like(y), 0.25 * torch.eye(len(y)) + 4 * x @ x.T)
    return mean, covariance, float(marginal.log_prob(y))


def density_of(model: object, *args: object) -> LogDensity:
    """Not compiled: quick to make."""
    with isolated(0):
        return LogDensity(model, args, {}, 0)  # type: ignore[arg-type]


def covariance_of(guide: GaussianGuide) -> Tensor:
    return (guide.scale_tril @ guide.scale_tril.T).detach()


@pytest.mark.parametrize("compiled", [False, True])
def test_conjugate_posterior_is_exact(compiled: bool) -> None:
    density = compiled_log_density(regression, X, Y) if compiled else density_of(regression, X, Y)
    found = approximate(density, seed=3)
    mean, covariance, evidence = exact(X, Y)
    assert isinstance(found.guide, GaussianGuide)
    torch.testing.assert_close(found.guide.loc.detach(), mean, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(covariance_of(found.guide), covariance, rtol=1e-6, atol=1e-8)
    assert found.elbo == pytest.approx(evidence, abs=1e-8)
    assert found.elbo_se < 1e-8
    assert found.khat < 0.1  # of weights that are equal but for rounding
    assert found.distance < 1e-3  # of the smoothing of the weights
    assert found.converged
    assert found.next_guide == ""
    assert found.gradients < 10_000
    assert found.path[-1]["gradients"] < found.gradients


def test_natural_step_solves_a_gaussian_density_at_once() -> None:
    """From far off, were the step not limited: two steps, since a variance may change eightfold at a time."""
    density = density_of(regression, X, Y)
    mean, covariance, _ = exact(X, Y)
    evaluate = Evaluations(density, 10_000)
    factor = 1.3 * torch.linalg.cholesky(covariance)
    here = Gaussian((mean + factor @ torch.ones(4, dtype=torch.float64)).numpy(), factor.numpy())
    noise = standard_draws(np.random.default_rng(0), 64, 4)
    step, _ = natural_step(here, noise, evaluate(here.at(noise))[1])
    there = taken(here, step, 1.0)
    np.testing.assert_allclose(there.loc, mean, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(there.factor @ there.factor.T, covariance, rtol=1e-9, atol=1e-12)
    # the symmetrized KL between the two
    both = [torch.distributions.MultivariateNormal(torch.from_numpy(g.loc), torch.from_numpy(g.factor @ g.factor.T))
            for g in (here, there)]  # fmt: skip
    kl = torch.distributions.kl_divergence
    assert step.gain == pytest.approx(float(kl(*both) + kl(*reversed(both))), rel=1e-9)


def test_standard_draws_have_exact_moments() -> None:
    noise = standard_draws(np.random.default_rng(0), 128, 5)
    np.testing.assert_allclose(noise.mean(0), 0, atol=1e-14)
    np.testing.assert_allclose((noise**3).mean(0), 0, atol=1e-14)
    np.testing.assert_allclose(noise.T @ noise / 128, np.eye(5), atol=1e-12)


def test_standard_errors_are_those_of_repeated_fits() -> None:
    """On a skew posterior: the spread over seeds is near the largest standard error that a fit reports, in sds."""
    density = compiled_log_density(am.random_effects)
    start = find_start(Evaluations(density, 10**6), np.random.default_rng(0), diagonal=False).gaussian
    fits = [fit_gaussian(Evaluations(density, 10**6), start, np.random.default_rng(seed)) for seed in range(8)]
    sd = np.mean([fit.gaussian.sd for fit in fits], 0)
    means = np.std([fit.gaussian.loc for fit in fits], 0) / sd
    log_sds = np.std([np.log(fit.gaussian.sd) for fit in fits], 0)
    reported = np.mean([fit.path[-1]["error"] for fit in fits])
    assert all(fit.converged for fit in fits)
    # Sobol points do better than the independent ones that the standard error is for
    assert 0.1 * reported < max(means.max(), log_sds.max()) < 2 * reported


def test_same_seed_same_guide_and_generators_untouched() -> None:
    density = density_of(am.proportions)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    one, two, other = (approximate(density, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.guide.loc, two.guide.loc)
    assert torch.equal(one.guide.scale_tril, two.guide.scale_tril)
    assert not torch.equal(one.guide.loc, other.guide.loc)
    assert one.elbo == two.elbo
    assert torch.equal(state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()  # noqa: NPY002
    assert not pyro.get_param_store().keys()


def flat(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
    sigma = pyro.sample("sigma", dist.ImproperUniform(dist.constraints.positive, (), ()))
    mean = pyro.deterministic("mean", 2 * mu)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean / 2, sigma), obs=y)


def test_flat_priors_and_tools() -> None:
    """mu given the data is a Student t of 28 degrees of freedom: its sd is known."""
    pyro.clear_param_store()
    found = approximate(density_of(flat, Y))
    sample = psis_khat(flat, found.guide, Y, num_draws=4000, seed=0)
    assert sample.log_weights.mean() == pytest.approx(found.elbo, abs=5 * found.elbo_se)
    assert found.distance < 0.1
    freedom = len(Y) - 2
    sd = Y.std() * math.sqrt((len(Y) - 1) / freedom / len(Y)) * math.sqrt(freedom / (freedom - 2))
    scale = float(found.guide.quantiles([0.8413447])["mu"][0] - found.guide.median()["mu"])
    assert float(found.guide.median()["mu"]) == pytest.approx(float(Y.mean()), abs=0.02 * float(sd))
    assert math.log(scale / sd) == pytest.approx(0, abs=0.05)
    assert diagnose(flat, found.guide, Y, seed=0).verdict == "good"
    posterior = from_pyro_svi(flat, found.guide, Y, num_samples=50, prior=False).posterior
    assert set(posterior.data_vars) == {"mu", "sigma", "mean"}


def schools() -> None:
    mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0, dtype=torch.float64), 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(torch.tensor(5.0, dtype=torch.float64)))
    with pyro.plate("school", 4):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        y = torch.tensor([28.0, 8.0, -3.0, 7.0], dtype=torch.float64)
        pyro.sample("y", dist.Normal(mu + tau * z, 10.0), obs=y)


def test_two_guides_do_not_share_parameters() -> None:
    """Pyro's parameter store goes by names, which two guides of one class would share."""
    pyro.clear_param_store()
    one, two = approximate(density_of(schools)).guide, approximate(density_of(flat, Y)).guide
    Trace_ELBO().loss(schools, one)
    Trace_ELBO().loss(flat, two, Y)
    assert len(pyro.get_param_store().keys()) == 4


def test_guide_in_pyro() -> None:
    """Training, prediction, saving; and the KL to the prior in closed form where it has one."""
    pyro.clear_param_store()
    found = approximate(density_of(schools))
    guide = found.guide
    elbo = DecomposedELBO(num_particles=200)
    pyro.set_rng_seed(0)
    losses = [elbo.loss(schools, guide) for _ in range(5)]
    error = math.hypot(float(np.std(losses, ddof=1)) / math.sqrt(len(losses)), found.elbo_se)
    assert np.mean(losses) == pytest.approx(-found.elbo, abs=5 * error)
    assert {name: term.kl_method for name, term in elbo.last.items() if term.kl_method} == {
        "mu": "analytic", "tau": "analytic", "z": "analytic"
    }  # fmt: skip
    drawn = Predictive(schools, guide=guide, num_samples=20)()
    assert drawn["z"].shape == (20, 4)
    pyro.clear_param_store()
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    assert set(before) == {"loc", "scale_tril_unconstrained"}
    SVI(schools, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step()
    assert not torch.equal(before["loc"], guide.loc)
    other = approximate(density_of(schools), seed=9).guide
    other.load_state_dict(before)
    torch.testing.assert_close(other.median()["tau"], torch.exp(before["loc"][1]))
    assert math.isfinite(CompiledSVI(schools, other, pyro.optim.Adam({"lr": 0.01}), DecomposedELBO()).step())


@pytest.mark.parametrize("name", ["correlation", "proportions", "single_precision"])
def test_constrained_sites_and_single_precision(name: str) -> None:
    model = am.MODELS[name]
    found = approximate(density_of(model))
    trace = pyro.poutine.trace(found.guide).get_trace()
    for site, node in pyro.poutine.trace(model).get_trace().nodes.items():
        if node["type"] == "sample" and hasattr(node["fn"], "support") and not node["is_observed"]:
            assert node["fn"].support.check(trace.nodes[site]["value"]).all()
    assert found.guide.dtype == (torch.float32 if name == "single_precision" else torch.float64)
    assert found.distance < 0.1
    if name != "proportions":  # runs draw by draw
        assert diagnose(model, found.guide, seed=0).verdict == "good"


def enumerated() -> None:
    p = pyro.sample("p", dist.Beta(torch.tensor(2.0, dtype=torch.float64), 2.0))
    with pyro.plate("data", 10):
        k = pyro.sample("k", dist.Bernoulli(p), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(2 * k, 0.5), obs=torch.tensor([0.0, 2.0] * 5, dtype=torch.float64))


def test_enumerated_sites_are_left_out() -> None:
    found = approximate(density_of(enumerated))
    assert set(pyro.poutine.trace(found.guide).get_trace().stochastic_nodes) == {"_GaussianGuide_latent", "p"}
    # nearly: five of ten are certain to be one, so p is Beta(7, 7)
    assert float(found.guide.median()["p"]) == pytest.approx(0.5, abs=0.02)


def test_many_coordinates_get_independent_ones() -> None:
    size = 1000
    y = torch.linspace(-2, 2, size, dtype=torch.float64)

    def model() -> None:
        with pyro.plate("units", size):
            z = pyro.sample("z", dist.Normal(torch.zeros(size, dtype=torch.float64), 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    found = approximate(density_of(model))
    assert isinstance(found.guide, DiagonalGuide)
    assert found.family == "diagonal"
    torch.testing.assert_close(found.guide.loc.detach(), y / 1.25, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.guide.scale.detach(), torch.full_like(y, math.sqrt(0.2)), rtol=1e-6, atol=1e-6)
    assert found.converged


def test_two_modes_are_told() -> None:
    found = approximate(density_of(am.two_modes))
    (note,) = [note for note in found.notes if "other modes" in note]
    assert re.search(r"climbs found 2, of weight 0\.\d+ ± 0\.\d+ at \w+ = .*; 0\.\d+ ± 0\.\d+ at \w+ = ", note)
    assert "a copy of mode 1 by a symmetry" in note
    assert "other modes" in found.next_guide


@pytest.mark.parametrize("seed", range(5))
def test_centred_hierarchy_does_not_run_off(seed: int) -> None:
    """Its density rises without bound as the spread of the groups falls; the ELBO does not.

    The weights' k-hat is near 0.85, and from 2000 draws it is estimated at anything between 0.5 and 1.1.
    """
    found = approximate(density_of(am.centred), seed=seed)
    assert found.converged
    assert 0.5 < float(found.guide.median()["tau"]) < 10
    assert "is not enough" in found.next_guide


def weighted_with(khat: float, num_draws: int) -> Weighted:
    even = np.full(num_draws, 1 / num_draws)
    return Weighted(np.zeros((num_draws, 1)), even, even, khat, 0.5 * num_draws, 0.0, 0.0, 0)


def test_khat_is_near_the_threshold_by_its_standard_error() -> None:
    """About (1 + k) / sqrt(tail), with a tail of 3 * sqrt(S) draws: 0.12 of 4000 draws, 0.07 of 49152."""
    assert weighted_with(0.5, 4000).near_threshold
    assert weighted_with(0.95, 4000).near_threshold
    assert not weighted_with(0.3, 4000).near_threshold
    assert not weighted_with(0.5, 49152).near_threshold
    assert not weighted_with(0.95, 49152).near_threshold
    assert not weighted_with(-math.inf, 4000).near_threshold
    assert not weighted_with(math.inf, 4000).near_threshold


@pytest.mark.parametrize("size", [3, 400, 1000])
def test_exact_guide_is_enough_in_any_dimension(size: int) -> None:
    y = torch.linspace(-2, 2, size, dtype=torch.float64)

    def model() -> None:
        with pyro.plate("units", size):
            z = pyro.sample("z", dist.Normal(torch.zeros(size, dtype=torch.float64), 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    found = approximate(density_of(model), family="diagonal")
    assert found.distance < 0.1
    assert found.next_guide == ""


def test_flow_starts_as_the_gaussian_and_inverts() -> None:
    x = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with isolated(0):
        flow = Flow(3)
    same, log_det = pushed(flow, x)
    torch.testing.assert_close(same, x, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(log_det, torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-14)
    with torch.no_grad(), isolated(1):
        for parameter in flow.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    y, log_det = pushed(flow, x)
    for layer in reversed(flow.layers):
        y = layer._inverse(y)
    torch.testing.assert_close(y, x, rtol=1e-9, atol=1e-9)
    jacobians = torch.stack(
        [torch.autograd.functional.jacobian(lambda u: pushed(flow, u[None])[0][0], row) for row in x]
    )
    torch.testing.assert_close(torch.linalg.slogdet(jacobians)[1], log_det, rtol=1e-9, atol=1e-9)


def test_flow_on_a_funnel() -> None:
    """The funnel is normalized: the greatest ELBO is 0, that of the Gaussian -1.86."""
    pyro.clear_param_store()
    density = compiled_log_density(am.funnel)
    found = approximate(density, family="flow")
    assert isinstance(found.guide, FlowGuide)
    assert found.gain > 1.5
    assert found.gain_se < 0.3
    assert -0.4 < found.elbo < 3 * found.elbo_se
    assert "above the Gaussian's" in found.notes[0]
    sample = psis_khat(am.funnel, found.guide, num_draws=2000, seed=0)
    assert sample.looped is None
    assert sample.log_weights.mean() == pytest.approx(found.elbo, abs=5 * found.elbo_se)
    elbo = DecomposedELBO(num_particles=100)
    losses = [elbo.loss(am.funnel, found.guide) for _ in range(5)]
    error = math.hypot(float(np.std(losses, ddof=1)) / math.sqrt(len(losses)), found.elbo_se)
    assert np.mean(losses) == pytest.approx(-found.elbo, abs=5 * error)
    assert abs(float(found.guide.median()["v"])) < 0.5
    other = FlowGuide(density, torch.zeros(10), torch.eye(10), Flow(10))
    other.load_state_dict(found.guide.state_dict())
    x = found.guide.get_posterior().sample((5,))
    torch.testing.assert_close(other.get_posterior().log_prob(x), found.guide.get_posterior().log_prob(x))


def test_improper_posterior_is_an_error() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.ImproperUniform(dist.constraints.real, (), ()))
        b = pyro.sample("b", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("c", dist.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0))
        pyro.sample("y", dist.Normal(a + b, 1.0), obs=torch.tensor(1.0, dtype=torch.float64))

    with pytest.raises(ValueError, match=r"improper.* along (a, b|b, a)\."):
        approximate(density_of(model))


def test_nan_in_data_names_the_site() -> None:
    with pytest.raises(ValueError, match="observed site 'y' has NaN"):
        density_of(flat, torch.tensor([1.0, math.nan]))


def test_density_that_is_nowhere_finite_names_the_site() -> None:
    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0))
        with pyro.validation_enabled(False):
            pyro.sample("y", dist.Uniform(mu, mu + 1.0), obs=torch.tensor(100.0, dtype=torch.float64))

    with pytest.raises(ValueError, match="observed site 'y' has data outside the support of its Uniform"):
        approximate(density_of(model))


def test_support_that_depends_on_a_site_is_an_error() -> None:
    def model() -> None:
        top = pyro.sample("top", dist.HalfNormal(torch.tensor(1.0, dtype=torch.float64)))
        pyro.sample("below", dist.Uniform(0.0, top))

    with pytest.raises(ValueError, match="support of site 'below' depends on another latent site"):
        approximate(density_of(model))


def test_cap_on_gradients() -> None:
    density = density_of(am.centred)
    found = approximate(density, max_gradients=6000)
    assert not found.converged
    assert "not enough" in found.reason
    assert math.isfinite(found.elbo)
    assert found.next_guide.startswith("The gaussian guide is not to be relied on: it has not converged")
    with pytest.raises(ValueError, match="max_gradients=20 is not enough"):
        approximate(density, max_gradients=20)


@pytest.mark.parametrize(
    ("options", "message"), [({"family": "cauchy"}, "family must be"), ({"max_gradients": 0}, "max_gradients must be")]
)
def test_bad_arguments(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        approximate(density_of(schools), **options)  # type: ignore[arg-type]


def test_progress_sees_every_step() -> None:
    seen: list[dict[str, float]] = []
    found = approximate(density_of(schools), progress=seen.append)
    assert seen == found.path
    assert [entry["step"] for entry in seen] == list(range(len(seen)))
