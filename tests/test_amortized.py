"""ELBO surgery, active units and the amortization gap, against quadrature and conjugate posteriors."""

from __future__ import annotations

import math

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from scipy import integrate, stats
from torch import Tensor, nn

from pyro_elbo_ext import (
    ActiveUnits,
    AmortizationGap,
    DecomposedELBO,
    ElboSurgery,
    active_units,
    amortization_gap,
    elbo_surgery,
)

matplotlib.use("Agg")

SIGMAS = 4  # tolerance of every Monte Carlo test, in standard errors


def within(value: float, truth: float, error: float, floor: float = 1e-6) -> bool:
    return abs(value - truth) < SIGMAS * error + floor


# One real latent per datum, q(z | x_n) = Normal(loc_n, scale_n), prior Normal(0, 1)

LOC = torch.tensor([-1.5, 0.2, 0.4, 2.0])
SCALE = torch.tensor([0.4, 0.5, 0.3, 0.8])


def scalar_model(loc: Tensor, scale: Tensor) -> None:
    with pyro.plate("data", len(loc)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.7), obs=loc)


def scalar_guide(loc: Tensor, scale: Tensor) -> None:
    with pyro.plate("data", len(loc)):
        pyro.sample("z", dist.Normal(loc, scale))


def exact_parts(loc: Tensor, scale: Tensor) -> tuple[float, float]:
    """Index-code information and KL of the aggregate posterior from Normal(0, 1), by quadrature."""
    q = stats.norm(loc.double().numpy()[:, None], scale.double().numpy()[:, None])
    grid = np.linspace(-12, 12, 40_001)
    density = q.pdf(grid).mean(0)
    entropy = integrate.simpson(-density * np.log(density + 1e-300), x=grid)
    cross = integrate.simpson(-density * stats.norm.logpdf(grid), x=grid)
    return float(entropy - q.entropy().mean()), float(cross - entropy)


def test_surgery_equals_quadrature() -> None:
    found = elbo_surgery(scalar_model, scalar_guide, LOC, SCALE, num_draws=1500)
    index_code, marginal = exact_parts(LOC, SCALE)
    assert within(found.index_code_mi, index_code, found.errors["index_code_mi"])
    assert within(found.marginal_kl_prior, marginal, found.errors["marginal_kl_prior"])
    assert found.errors["index_code_mi"] < 0.02
    kl = torch.distributions.kl_divergence(dist.Normal(LOC, SCALE), dist.Normal(0.0, 1.0)).mean().item()
    assert found.analytic_kl_prior == pytest.approx(kl, rel=1e-5)
    assert within(found.kl_prior, kl, found.errors["kl_prior"])
    reconstruction = (dist.Normal(LOC, 0.7).log_prob(LOC) - SCALE**2 / (2 * 0.49)).mean().item()
    assert within(found.reconstruction, reconstruction, found.errors["reconstruction"])
    assert found.sites == ("z",)
    assert found.num_data == 4


def test_the_standard_errors_are_those_over_seeds() -> None:
    runs = [elbo_surgery(scalar_model, scalar_guide, LOC, SCALE, num_draws=10, seed=seed) for seed in range(40)]
    for name in ("elbo", "reconstruction", "kl_prior", "index_code_mi", "marginal_kl_prior"):
        spread = np.std([getattr(run, name) for run in runs], ddof=1)
        said = math.sqrt(np.mean([run.errors[name] ** 2 for run in runs]))
        assert spread / said == pytest.approx(1.0, abs=4 / math.sqrt(2 * 40))


def test_the_parts_add_up_exactly() -> None:
    found = elbo_surgery(scalar_model, scalar_guide, LOC, SCALE, num_draws=3)
    assert found.index_code_mi + found.marginal_kl_prior == pytest.approx(found.kl_prior, abs=1e-6)
    assert found.reconstruction - found.kl_prior - found.other_kl_prior == pytest.approx(found.elbo, abs=1e-6)
    objective = DecomposedELBO()
    objective.loss(scalar_model, scalar_guide, LOC, SCALE)
    assert objective.last is not None
    assert found.analytic_kl_prior == pytest.approx(objective.last.kl_prior / 4, rel=1e-5)


def test_identical_codes_have_no_information_and_distant_ones_all_of_it() -> None:
    same = elbo_surgery(scalar_model, scalar_guide, torch.full((50,), 0.3), torch.full((50,), 0.5), num_draws=5)
    assert same.index_code_mi == pytest.approx(0.0, abs=1e-5)
    assert same.marginal_kl_prior == pytest.approx(same.kl_prior, abs=1e-5)
    far = elbo_surgery(scalar_model, scalar_guide, 100.0 * torch.arange(50), torch.full((50,), 0.5), num_draws=5)
    assert far.index_code_mi == pytest.approx(math.log(50), abs=1e-4)
    assert far.index_code_bound == math.log(50)
    assert "100% of the log N" in far.verdict


def test_guide_at_the_prior_is_called_collapsed() -> None:
    found = elbo_surgery(scalar_model, scalar_guide, torch.zeros(9), torch.ones(9))
    assert found.kl_prior == pytest.approx(0.0, abs=1e-6)
    assert "posterior collapse" in found.verdict


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_chunks_change_nothing(chunk: int) -> None:
    whole = elbo_surgery(scalar_model, scalar_guide, LOC, SCALE)
    part = elbo_surgery(scalar_model, scalar_guide, LOC, SCALE, chunk_elements=chunk)
    np.testing.assert_allclose(part.to_dataframe(), whole.to_dataframe(), rtol=1e-5, atol=1e-6)


# The same two units per datum, laid out in four ways; drawn alike from one seed where the shape is (data, unit)

LOCS = torch.stack([LOC, LOC.flip(0) / 2], -1)
SCALES = torch.stack([SCALE, SCALE.flip(0)], -1)


def event_model() -> None:
    with pyro.plate("data", 4):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=LOC)


def event_guide() -> None:
    with pyro.plate("data", 4):
        pyro.sample("z", dist.Normal(LOCS, SCALES).to_event(1))


def plates_model() -> None:
    with pyro.plate("data", 4, dim=-2):
        with pyro.plate("unit", 2, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0), obs=LOC[:, None])


def plates_guide() -> None:
    with pyro.plate("data", 4, dim=-2), pyro.plate("unit", 2, dim=-1):
        pyro.sample("z", dist.Normal(LOCS, SCALES))


def swapped_model() -> None:
    with pyro.plate("data", 4, dim=-1):
        with pyro.plate("unit", 2, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.sum(0), 1.0), obs=LOC)


def swapped_guide() -> None:
    with pyro.plate("data", 4, dim=-1), pyro.plate("unit", 2, dim=-2):
        pyro.sample("z", dist.Normal(LOCS.T, SCALES.T))


def two_sites_model() -> None:
    with pyro.plate("data", 4):
        total = sum(pyro.sample(name, dist.Normal(0.0, 1.0)) for name in ("a", "b"))
        pyro.sample("x", dist.Normal(total, 1.0), obs=LOC)


def two_sites_guide() -> None:
    with pyro.plate("data", 4):
        for i, name in enumerate(("a", "b")):
            pyro.sample(name, dist.Normal(LOCS[:, i], SCALES[:, i]))


def test_layout_does_not_matter() -> None:
    reference = elbo_surgery(event_model, event_guide, num_draws=400)
    nested = elbo_surgery(plates_model, plates_guide, num_draws=400)
    np.testing.assert_allclose(nested.to_dataframe(), reference.to_dataframe(), rtol=1e-4, atol=1e-5)
    for model, guide in ((swapped_model, swapped_guide), (two_sites_model, two_sites_guide)):
        other = elbo_surgery(model, guide, num_draws=400)
        for name, error in reference.errors.items():
            assert within(getattr(other, name), getattr(reference, name), math.hypot(error, other.errors[name]))
        assert other.analytic_kl_prior == pytest.approx(reference.analytic_kl_prior, rel=1e-5)


def test_one_of_two_sites() -> None:
    alone = elbo_surgery(two_sites_model, two_sites_guide, site="a", num_draws=400)
    joint = elbo_surgery(two_sites_model, two_sites_guide, num_draws=400)
    index_code, marginal = exact_parts(LOCS[:, 0], SCALES[:, 0])
    assert within(alone.index_code_mi, index_code, alone.errors["index_code_mi"])
    assert within(alone.marginal_kl_prior, marginal, alone.errors["marginal_kl_prior"])
    assert alone.elbo == pytest.approx(joint.elbo, abs=1e-5)  # the other site's is other_kl_prior
    assert alone.kl_prior + alone.other_kl_prior == pytest.approx(joint.kl_prior, abs=1e-5)


def hierarchical_model(x: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(w, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def hierarchical_guide(x: Tensor) -> None:
    pyro.sample("w", dist.Normal(0.4, 0.3))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.7 * x, 0.4))


def test_surgery_with_a_global_latent() -> None:
    found = elbo_surgery(hierarchical_model, hierarchical_guide, LOC, num_draws=300)
    objective = DecomposedELBO(20_000, vectorize_particles=True, max_plate_nesting=1)
    elbo = -objective.loss(hierarchical_model, hierarchical_guide, LOC) / 4
    assert within(found.elbo, elbo, 1.1 * found.errors["elbo"])
    kl_w = torch.distributions.kl_divergence(dist.Normal(0.4, 0.3), dist.Normal(0.0, 1.0)).item()
    assert within(found.other_kl_prior, kl_w / 4, found.errors["other_kl_prior"])
    np.testing.assert_allclose(found.index_code_mi, exact_parts(0.7 * LOC, torch.full((4,), 0.4))[0], atol=0.03)


def test_autonormal_of_real_sites_is_read_through() -> None:
    guide = AutoNormal(scalar_model)
    guide(LOC, SCALE)
    found = elbo_surgery(scalar_model, guide, LOC, SCALE, num_draws=400)
    loc, scale = guide.locs.z.detach(), guide.scales.z.detach()
    index_code, marginal = exact_parts(loc, scale)
    assert within(found.index_code_mi, index_code, found.errors["index_code_mi"])
    assert within(found.marginal_kl_prior, marginal, found.errors["marginal_kl_prior"])


# Minibatches


def batched_model(index: Tensor, x: Tensor) -> None:
    with pyro.plate("data", 4, subsample=index):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.7), obs=x[index])


def batched_guide(index: Tensor, x: Tensor) -> None:
    with pyro.plate("data", 4, subsample=index):
        pyro.sample("z", dist.Normal(x[index], SCALE[index]))


def test_batches_are_the_whole_data() -> None:
    index_code, marginal = exact_parts(LOC, SCALE)
    parts = [torch.tensor([2, 0]), torch.tensor([1]), torch.tensor([3])]
    by_index = elbo_surgery(batched_model, batched_guide, batches=[(part, LOC) for part in parts], num_draws=300)
    by_slice = elbo_surgery(
        scalar_model, scalar_guide, batches=[(LOC[:3], SCALE[:3]), (LOC[3:], SCALE[3:])], num_draws=3000
    )
    whole = elbo_surgery(scalar_model, scalar_guide, LOC, SCALE, num_draws=300)
    for found in (by_index, by_slice):
        assert found.num_data == 4
        assert within(found.index_code_mi, index_code, found.errors["index_code_mi"])
        assert within(found.marginal_kl_prior, marginal, found.errors["marginal_kl_prior"])
        assert within(found.elbo, whole.elbo, math.hypot(found.errors["elbo"], whole.errors["elbo"]))
        assert found.analytic_kl_prior == pytest.approx(whole.analytic_kl_prior, rel=1e-5)
    units = active_units(batched_model, batched_guide, batches=[(part, LOC) for part in parts])
    assert units.table["variance_of_mean"][0] == pytest.approx(LOC.var().item(), rel=1e-5)


def test_batches_must_cover_the_data() -> None:
    with pytest.raises(ValueError, match="3 indices, 2 of them different"):
        elbo_surgery(batched_model, batched_guide, batches=[(torch.tensor([0, 1]), LOC), (torch.tensor([1]), LOC)])
    with pytest.raises(ValueError, match="subsamples 2 of 4"):
        elbo_surgery(batched_model, batched_guide, torch.tensor([0, 1]), LOC)
    with pytest.raises(ValueError, match="not both"):
        elbo_surgery(scalar_model, scalar_guide, LOC, SCALE, batches=[(LOC, SCALE)])
    with pytest.raises(ValueError, match="batches is empty"):
        elbo_surgery(scalar_model, scalar_guide, batches=[])


# What cannot be done says so, and changes nothing


def conditional_prior_model() -> None:
    with pyro.plate("data", 4):
        z = pyro.sample("z", dist.Normal(LOC, 1.0))
        pyro.sample("x", dist.Normal(z, 0.7), obs=LOC)


def fixed_guide() -> None:
    with pyro.plate("data", 4):
        pyro.sample("z", dist.Normal(LOC, SCALE))


def ladder_model() -> None:
    with pyro.plate("data", 4):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(b, 1.0), obs=LOC)


def ladder_guide() -> None:
    with pyro.plate("data", 4):
        a = pyro.sample("a", dist.Normal(LOC, 0.5))
        pyro.sample("b", dist.Normal(a, 0.5))


def delta_guide(loc: Tensor, scale: Tensor) -> None:
    with pyro.plate("data", len(loc)):
        pyro.sample("z", dist.Delta(loc))


def no_plate_model() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=LOC[0])


def no_plate_guide() -> None:
    pyro.sample("z", dist.Normal(0.0, 1.0))


def two_plates_model() -> None:
    with pyro.plate("data", 4, dim=-2), pyro.plate("pixel", 3, dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=LOC[:, None].expand(4, 3))


def two_plates_guide() -> None:
    with pyro.plate("data", 4, dim=-2), pyro.plate("pixel", 3, dim=-1):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def empty_guide(loc: Tensor, scale: Tensor) -> None:
    pass


@pytest.mark.parametrize("function", [elbo_surgery, active_units, amortization_gap])
def test_sites_that_are_not_local(function) -> None:
    with pytest.raises(KeyError, match="'y' is no latent site of the model; there are z"):
        function(scalar_model, scalar_guide, LOC, SCALE, site="y")
    with pytest.raises(KeyError, match="no latent site is in a plate 'batch'; the plates are data"):
        function(scalar_model, scalar_guide, LOC, SCALE, plate="batch")
    with pytest.raises(ValueError, match="site names no site"):
        function(scalar_model, scalar_guide, LOC, SCALE, site=[])
    with pytest.raises(ValueError, match="no plate shared"):
        function(no_plate_model, no_plate_guide)
    with pytest.raises(ValueError, match="several plates, data, pixel"):
        function(two_plates_model, two_plates_guide)
    with pytest.raises(ValueError, match="site 'z' has no density of its own"):
        function(scalar_model, delta_guide, LOC, SCALE)
    with pytest.raises(ValueError, match="draws site 'b' given a"):
        function(ladder_model, ladder_guide)
    with pytest.raises(ValueError, match="site 'z' is latent in the model but the guide has no site"):
        function(scalar_model, empty_guide, LOC, SCALE)
    with pytest.raises(ValueError, match="site 'z' is scaled or masked"):
        function(pyro.poutine.scale(scalar_model, 0.5), scalar_guide, LOC, SCALE)
    with pytest.raises(ValueError, match="site 'z' is scaled or masked"):
        function(scalar_model, pyro.poutine.mask(scalar_guide, LOC > 0), LOC, SCALE)
    with (
        pyro.validation_enabled(False),
        pytest.raises(ValueError, match="NaN or infinite for 1 of 4 data, first at index 2"),
    ):
        function(scalar_model, scalar_guide, LOC.clone().index_fill(0, torch.tensor([2]), math.nan), SCALE)


def test_the_surgery_needs_one_prior() -> None:
    with pytest.raises(ValueError, match="prior of site 'z' differs between data of plate 'data'"):
        elbo_surgery(conditional_prior_model, fixed_guide)


def test_arguments_out_of_range() -> None:
    with pytest.raises(ValueError, match="num_draws must be at least 2, not 1"):
        elbo_surgery(scalar_model, scalar_guide, LOC, SCALE, num_draws=1)
    with pytest.raises(ValueError, match="chunk_elements must be"):
        elbo_surgery(scalar_model, scalar_guide, LOC, SCALE, chunk_elements=0)
    with pytest.raises(ValueError, match="threshold must be"):
        active_units(scalar_model, scalar_guide, LOC, SCALE, threshold=-1.0)
    with pytest.raises(ValueError, match="at least 2 data"):
        active_units(scalar_model, scalar_guide, LOC[:1], SCALE[:1])
    with pytest.raises(ValueError, match="num_steps must be"):
        amortization_gap(scalar_model, scalar_guide, LOC, SCALE, num_steps=0)
    with pytest.raises(ValueError, match="lr must be"):
        amortization_gap(scalar_model, scalar_guide, LOC, SCALE, lr=math.nan)
    with pytest.raises(ValueError, match="evidence_draws must be"):
        amortization_gap(scalar_model, scalar_guide, LOC, SCALE, evidence_draws=1)


class Autoencoder(nn.Module):
    """A small VAE, its modules registered with Pyro."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 4), nn.Linear(2, 3)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def test_nothing_is_changed() -> None:
    vae, x = Autoencoder(), torch.randn(6, 3)
    Trace_ELBO().loss_and_grads(vae.model, vae.guide, x)  # registers the modules, and leaves gradients
    pyro.param("other", torch.tensor(1.0))
    store = dict(pyro.get_param_store()._params)
    before = {name: (value.detach().clone(), value.grad) for name, value in store.items()}
    gradients = {name: grad.clone() for name, (_, grad) in before.items() if grad is not None}
    assert gradients
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    elbo_surgery(vae.model, vae.guide, x)
    active_units(vae.model, vae.guide, x)
    amortization_gap(vae.model, vae.guide, x, num_steps=5, num_draws=2, evidence_draws=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    after = pyro.get_param_store()._params
    assert set(after) == set(store)
    for name, value in after.items():
        assert value is store[name]
        assert torch.equal(value, before[name][0])
        assert value.grad is before[name][1]
        assert value.requires_grad
        if name in gradients:
            assert torch.equal(value.grad, gradients[name])


def test_a_model_seen_for_the_first_time_leaves_no_parameters() -> None:
    vae, x = Autoencoder(), torch.randn(6, 3)
    amortization_gap(vae.model, vae.guide, x, num_steps=2, num_draws=2)
    elbo_surgery(vae.model, vae.guide, x, num_draws=2)
    assert len(pyro.get_param_store()) == 0
    assert all(parameter.grad is None for parameter in vae.parameters())


# Active units


def test_active_units_are_exact() -> None:
    units = active_units(event_model, event_guide)
    np.testing.assert_allclose(units.table["variance_of_mean"], LOCS.var(0), rtol=1e-5)
    kl = torch.distributions.kl_divergence(dist.Normal(LOCS, SCALES), dist.Normal(0.0, 1.0)).mean(0)
    np.testing.assert_allclose(units.table["kl_prior"], kl, rtol=1e-5)
    assert units.table["active"].all()
    assert (units.posterior_collapse, units.share_inactive, units.remedies) == ("none", 0.0, ())
    for model, guide in (
        (plates_model, plates_guide),
        (swapped_model, swapped_guide),
        (two_sites_model, two_sites_guide),
    ):
        other = active_units(model, guide, plate="data").table
        np.testing.assert_allclose(other["variance_of_mean"], LOCS.var(0), rtol=1e-5)
        np.testing.assert_allclose(other["kl_prior"], kl, rtol=1e-5)
    assert list(other["site"]) == ["a", "b"]


def units_of(loc: Tensor, scale: Tensor) -> ActiveUnits:
    size = loc.shape[-1]

    def model() -> None:
        with pyro.plate("data", len(loc)):
            z = pyro.sample("z", dist.Normal(torch.zeros(size), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=torch.zeros(len(loc)))

    def guide() -> None:
        with pyro.plate("data", len(loc)):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return active_units(model, guide)


def test_collapse_is_told() -> None:
    n = 40
    used, at_prior = torch.linspace(-1, 1, n), torch.zeros(n)
    full = units_of(torch.stack([at_prior, at_prior], -1), torch.ones(n, 2))
    assert (full.posterior_collapse, full.num_active) == ("full", 0)
    assert "Posterior collapse: none of the 2 units" in full.verdict
    assert full.table["at_prior"].all()
    assert any("kl_weight" in remedy for remedy in full.remedies)
    partial = units_of(
        torch.stack([used, at_prior, torch.full((n,), 2.0)], -1), torch.tensor([0.3, 1.0, 1.0]).expand(n, 3)
    )
    assert (partial.posterior_collapse, partial.num_active) == ("partial", 1)
    assert list(partial.table["active"]) == [True, False, False]
    assert list(partial.table["at_prior"]) == [False, True, False]
    assert "1 of the inactive are the same for all data but not at the prior" in partial.verdict
    assert "kl_weight" in repr(partial)
    assert "<li>" in partial._repr_html_()


def test_units_of_other_families() -> None:
    """Marginals of a full-covariance guide; a mean by sampling; a pair without a closed form."""
    tril = torch.tensor([[0.5, 0.0], [0.4, 0.3]])

    def model() -> None:
        with pyro.plate("data", 4):
            pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            g = pyro.sample("g", dist.HalfCauchy(1.0))
            pyro.sample("x", dist.Normal(w + g, 1.0), obs=LOC)

    def guide() -> None:
        with pyro.plate("data", 4):
            pyro.sample("z", dist.MultivariateNormal(LOCS, scale_tril=tril))
            through = dist.TransformedDistribution(dist.Normal(LOC, 0.5), [dist.transforms.AffineTransform(1.0, 2.0)])
            pyro.sample("w", through)
            pyro.sample("g", dist.Gamma(LOC.exp(), 1.0))

    found = active_units(model, guide, num_draws=300).table.set_index(["site", "unit"])
    sd = (tril @ tril.T).diagonal().sqrt()
    kl = torch.distributions.kl_divergence(dist.Normal(LOCS, sd), dist.Normal(0.0, 1.0)).mean(0)
    np.testing.assert_allclose(found.loc["z", "kl_prior"], kl, rtol=1e-5)
    # the sampled means of w have sd 1 / sqrt(600) each
    truth = (2 * LOC).var().item()
    assert within(found.loc[("w", 0), "variance_of_mean"], truth, 2 * math.sqrt(truth / 3 / 600))
    assert found.loc["g", "kl_prior"].isna().all()
    assert found.loc[("g", 0), "variance_of_mean"] == pytest.approx(LOC.exp().var().item(), rel=1e-5)


# The amortization gap: probabilistic PCA, x ~ N(W z + b, sigma^2), whose posterior is Gaussian

SIGMA = 0.6
X = torch.randn(12, 3, generator=torch.Generator().manual_seed(3))
ORTHOGONAL = torch.tensor([[1.0, 0.5, 0.0], [-0.5, 1.0, 1.0]])  # rows are orthogonal: the posterior is diagonal
SKEW = torch.tensor([[1.0, 0.5, 0.0], [0.8, 1.0, 0.3]])


def posterior(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Means (N, 2) and covariance."""
    covariance = (torch.eye(2) + weights @ weights.T / SIGMA**2).inverse()
    return X @ weights.T @ covariance / SIGMA**2, covariance


def log_evidence(weights: Tensor) -> Tensor:
    covariance = weights.T @ weights + SIGMA**2 * torch.eye(3)
    return torch.distributions.MultivariateNormal(torch.zeros(3), covariance).log_prob(X)


def pca(weights: Tensor):
    def model() -> None:
        with pyro.plate("data", len(X)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weights, SIGMA).to_event(1), obs=X)

    return model


def encoder(q: dist.Distribution):
    def guide() -> None:
        with pyro.plate("data", len(X)):
            pyro.sample("z", q)

    return guide


def test_the_exact_encoder_has_no_gap() -> None:
    mean, covariance = posterior(ORTHOGONAL)
    exact = dist.Normal(mean, covariance.diagonal().sqrt()).to_event(1)
    found = amortization_gap(pca(ORTHOGONAL), encoder(exact), num_draws=4, evidence_draws=4)
    # every draw's log weight is log p(x_n), so there is no Monte Carlo error at all
    np.testing.assert_allclose(found.elbo_amortized, log_evidence(ORTHOGONAL), atol=1e-4)
    np.testing.assert_allclose(found.gap, 0.0, atol=1e-3)
    np.testing.assert_allclose(found.approximation_gap, 0.0, atol=1e-3)
    assert not found.still_rising


def test_the_gap_is_kl_posterior_where_the_family_has_the_posterior() -> None:
    mean, covariance = posterior(ORTHOGONAL)
    sd = covariance.diagonal().sqrt()
    shift = torch.linspace(-0.6, 0.9, 24).reshape(12, 2)
    q = dist.Normal(mean + shift, sd * torch.tensor([1.7, 0.6]))
    found = amortization_gap(pca(ORTHOGONAL), encoder(q.to_event(1)), num_draws=300, evidence_draws=10)
    kl_posterior = torch.distributions.kl_divergence(q, dist.Normal(mean, sd)).sum(-1).numpy()
    np.testing.assert_allclose(found.elbo_optimized, log_evidence(ORTHOGONAL), atol=2e-3)
    assert within(found.mean_gap, kl_posterior.mean(), found.mean_gap_error, 2e-3)
    assert (np.abs(found.gap - kl_posterior) < 5 * found.gap_error + 2e-3).all()  # 12 data
    assert found.log_evidence is not None
    np.testing.assert_allclose(found.log_evidence, log_evidence(ORTHOGONAL), atol=2e-3)
    assert "larger encoder" in found.verdict
    assert not found.still_rising
    assert list(found.to_dataframe()["approximation_gap"]) == list(found.approximation_gap)


def test_a_mean_field_family_keeps_its_approximation_gap() -> None:
    mean, covariance = posterior(SKEW)
    precision = covariance.inverse()
    best = dist.Normal(mean, precision.diagonal().rsqrt())  # of mean-field ones, by Bishop (2006), 10.1.2
    exact = torch.distributions.MultivariateNormal(mean, covariance)
    as_full = torch.distributions.MultivariateNormal(mean, torch.diag_embed(best.scale**2))
    lacking = torch.distributions.kl_divergence(as_full, exact).mean().item()
    start = dist.Normal(mean + 0.5, best.scale * 1.5).to_event(1)
    found = amortization_gap(pca(SKEW), encoder(start), num_steps=600, num_draws=300, evidence_draws=500)
    assert found.approximation_gap is not None
    assert within(found.approximation_gap.mean(), lacking, found.mean_approximation_gap_error, 5e-3)
    wide = torch.distributions.MultivariateNormal(mean + 0.5, torch.diag_embed((1.5 * best.scale) ** 2))
    gap = torch.distributions.kl_divergence(wide, exact).mean().item() - lacking
    assert within(found.mean_gap, gap, found.mean_gap_error, 5e-3)


def test_gap_of_a_full_covariance_guide() -> None:
    mean, covariance = posterior(SKEW)
    exact = torch.distributions.MultivariateNormal(mean, covariance)
    start = dist.MultivariateNormal(mean - 0.3, covariance_matrix=torch.diag(covariance.diagonal() * 2))
    found = amortization_gap(pca(SKEW), encoder(start), num_steps=600, num_draws=200)
    kl_posterior = torch.distributions.kl_divergence(start, exact).mean().item()
    assert within(found.mean_gap, kl_posterior, found.mean_gap_error, 5e-3)
    assert found.approximation_gap is None


COUNTS = torch.tensor([0.0, 3.0, 1.0, 8.0])


def poisson_model() -> None:
    with pyro.plate("data", 4):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        pyro.sample("x", dist.Poisson(rate), obs=COUNTS)


def gamma_guide() -> None:
    with pyro.plate("data", 4):
        pyro.sample("rate", dist.Gamma(3.0, torch.tensor(1.2)))


def test_gap_of_gamma_sites() -> None:
    found = amortization_gap(poisson_model, gamma_guide, num_steps=600, num_draws=600)
    kl_posterior = torch.distributions.kl_divergence(dist.Gamma(3.0, 1.2), dist.Gamma(2 + COUNTS, 2.0)).numpy()
    assert (np.abs(found.gap - kl_posterior) < 5 * found.gap_error + 5e-3).all()


def test_gap_with_a_global_latent() -> None:
    """Given w the best q(z_n) is Normal(0.2 E[w] + 0.8 x_n, variance 0.2)."""
    found = amortization_gap(hierarchical_model, hierarchical_guide, LOC, num_draws=500)
    best = dist.Normal(0.2 * 0.4 + 0.8 * LOC, 0.2**0.5)
    # the expectation over w of the ELBO lacks KL(q || best) of its maximum
    truth = torch.distributions.kl_divergence(dist.Normal(0.7 * LOC, 0.4), best).mean().item()
    assert within(found.mean_gap, truth, found.mean_gap_error, 5e-3)
    with pytest.raises(ValueError, match="local latents only"):
        amortization_gap(hierarchical_model, hierarchical_guide, LOC, evidence_draws=5)


def test_what_has_no_gap() -> None:
    def mixture_model() -> None:
        with pyro.plate("data", 4):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(k, 1.0), obs=LOC)

    def mixture_guide() -> None:
        with pyro.plate("data", 4):
            pyro.sample("k", dist.Bernoulli(LOC.sigmoid()))

    with pytest.raises(ValueError, match="site 'k' is Bernoulli, whose draws are not reparameterized"):
        amortization_gap(mixture_model, mixture_guide)

    def summed_model() -> None:
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=LOC)
        pyro.sample("total", dist.Normal(z.sum(), 1.0), obs=torch.tensor(1.0))

    with pytest.raises(ValueError, match="a site outside plate 'data' depends on z"):
        amortization_gap(summed_model, fixed_guide)

    def uniform_model() -> None:
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Uniform(-3.0, 3.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=LOC)

    def uniform_guide() -> None:
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Uniform(LOC - 0.1, LOC + 0.1))

    with pytest.raises(ValueError, match="site 'z' is Uniform, whose support moves"):
        amortization_gap(uniform_model, uniform_guide)


def test_an_optimization_cut_short_says_so() -> None:
    far = dist.Normal(torch.full((12, 2), 6.0), 0.02).to_event(1)
    found = amortization_gap(pca(ORTHOGONAL), encoder(far), num_steps=60, lr=0.01, num_draws=4)
    assert found.still_rising
    assert "take more steps" in found.verdict
    assert len(found.objective) == 60
    assert math.isnan(amortization_gap(pca(ORTHOGONAL), encoder(far), num_steps=4, num_draws=2).further_gain)


# Display


def results() -> tuple[ElboSurgery, ActiveUnits, AmortizationGap]:
    return (
        elbo_surgery(event_model, event_guide),
        active_units(event_model, event_guide),
        amortization_gap(event_model, event_guide, num_steps=10, num_draws=3, evidence_draws=3),
    )


def test_display() -> None:
    from matplotlib import pyplot as plt

    for result in results():
        assert result.verdict in repr(result)
        assert "<table" in result._repr_html_()
        assert len(result.to_dataframe())
        ax = plt.figure().add_subplot()
        assert result.plot(ax) is ax
        assert ax.get_xlabel()
        assert result.plot() is not ax
        plt.close("all")


def test_units_share_a_scale() -> None:
    from matplotlib import pyplot as plt

    _, (left, right) = plt.subplots(1, 2, sharey=True)
    units_of(torch.stack([torch.linspace(-0.01, 0.01, 9)], -1), torch.ones(9, 1)).plot(left)
    units_of(torch.stack([torch.linspace(-9.0, 9.0, 9)], -1), torch.ones(9, 1)).plot(right)
    low, high = left.get_ylim()
    assert 0 < low < torch.linspace(-0.01, 0.01, 9).var()
    assert high > torch.linspace(-9.0, 9.0, 9).var()
    plt.close("all")


def test_the_elbo_at_the_posterior_is_the_evidence() -> None:
    mean, covariance = posterior(ORTHOGONAL)
    exact = dist.Normal(mean, covariance.diagonal().sqrt()).to_event(1)
    found = elbo_surgery(pca(ORTHOGONAL), encoder(exact), num_draws=2)
    assert found.elbo == pytest.approx(log_evidence(ORTHOGONAL).mean().item(), abs=1e-5)
