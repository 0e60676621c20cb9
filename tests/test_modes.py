"""The search for modes: climbs, starting points, which ends are one mode, weights; and what `diagnose` makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate

from pyro_elbo_ext import diagnose, fit
from pyro_elbo_ext.automatic.climbing import climb_all
from pyro_elbo_ext.automatic.evaluations import Evaluations
from pyro_elbo_ext.automatic.gaussian import Gaussian
from pyro_elbo_ext.automatic.modes import Modes
from pyro_elbo_ext.automatic.search import search_modes
from pyro_elbo_ext.density import LogDensity
from pyro_elbo_ext.density.points import guide_points, prior_points

FAR = np.array([6.0, -5.0, 4.0])
SDS = np.array([0.5, 1.0, 2.0])


def two_gaussians(weight: float, far: np.ndarray = FAR, sds: np.ndarray = SDS) -> Callable[[], None]:
    """Of this weight at zero, the rest at ``far``; the normalizing constant is one."""

    def model() -> None:
        with pyro.plate("i", len(far)), pyro.poutine.mask(mask=False):
            z = pyro.sample("z", dist.Normal(0.0, 20.0))
        first = dist.Normal(torch.zeros(len(far)), torch.from_numpy(sds)).log_prob(z).sum() + math.log(weight)
        second = dist.Normal(torch.from_numpy(far), torch.from_numpy(sds)).log_prob(z).sum() + math.log1p(-weight)
        pyro.factor("modes", torch.logaddexp(first, second))

    return model


def at_zero(sds: np.ndarray = SDS) -> Callable[[], None]:
    def guide() -> None:
        with pyro.plate("i", len(sds)):
            pyro.sample("z", dist.Normal(torch.zeros(len(sds)), torch.from_numpy(sds)))

    return guide


def searched(model: Callable[[], None], draws: np.ndarray, log_q: np.ndarray, seed: int = 0) -> Modes:
    density = LogDensity(model, (), {}, 0)
    values, _ = density.value_and_grad(draws)
    found = search_modes(density, draws, values - log_q, seed)
    assert isinstance(found, Modes)
    return found


def normal_draws(sds: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    noise = np.random.default_rng(seed).standard_normal((1000, len(sds)))
    return noise * sds, -0.5 * (noise**2).sum(1) - np.log(sds).sum() - 0.5 * len(sds) * np.log(2 * np.pi)


# Climbs


def test_climbs_end_at_the_nearer_mode() -> None:
    evaluate = Evaluations(LogDensity(two_gaussians(0.3), (), {}, 0), 1 << 62)
    starts = np.concatenate([FAR + 0.5 * SDS, -0.5 * SDS, 30 + FAR, -30 - FAR]).reshape(4, 3)
    ends = climb_all(evaluate, starts, Gaussian(np.zeros(3), SDS))
    assert ends.arrived.all()
    # at a mode the other one's density is e^-70 of its own
    np.testing.assert_allclose(ends.points, [FAR, 0 * FAR, FAR, 0 * FAR], atol=5e-3)
    tops = np.log([0.7, 0.3, 0.7, 0.3]) - 1.5 * np.log(2 * np.pi) - np.log(SDS).sum()
    np.testing.assert_allclose(ends.values, tops, atol=1e-5)


def test_climbs_of_a_badly_scaled_gaussian_arrive_whatever_the_scale_that_they_are_made_in() -> None:
    precision = torch.tensor([[1e4, 30.0, 0.0], [30.0, 1.0, 0.1], [0.0, 0.1, 0.05]]).double()

    def model() -> None:
        pyro.sample("z", dist.MultivariateNormal(torch.ones(3).double(), precision_matrix=precision))

    evaluate = Evaluations(LogDensity(model, (), {}, 0), 1 << 62)
    starts = np.random.default_rng(0).normal(0, 10, (8, 3))
    for scale in (np.ones(3), np.array([1e-3, 1e-3, 1e-3]), np.diag(np.linalg.inv(precision)) ** 0.5):
        ends = climb_all(evaluate, starts, Gaussian(np.zeros(3), scale))
        assert ends.arrived.all()
        short = ends.points - 1
        assert (np.einsum("ni,ij,nj->n", short, precision.numpy(), short) < 1e-3).all()


def test_a_climb_without_end_has_not_arrived_and_one_without_a_density_stays() -> None:
    def model() -> None:
        with pyro.poutine.mask(mask=False):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("slope", torch.where(z > 5.0, torch.tensor(-math.inf), -z))

    evaluate = Evaluations(LogDensity(model, (), {}, 0), 1 << 62)
    ends = climb_all(evaluate, np.array([[0.0], [6.0]]), Gaussian(np.zeros(1), np.ones(1)), 30)
    assert not ends.arrived.any()
    assert ends.values[0] > 10
    assert ends.points[1] == 6


# Starting points


def test_draws_of_the_prior() -> None:
    def model() -> None:
        scale = pyro.sample("scale", dist.LogNormal(1.0, 0.5))
        pyro.sample("x", dist.Normal(3.0, scale))
        pyro.sample("flat", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("heavy", dist.HalfCauchy(2.0))
        pyro.sample("y", dist.Normal(scale, 0.01), obs=torch.tensor(50.0))

    density = LogDensity(model, (), {}, 0)
    points, without = prior_points(density, 400, 0)
    assert without == ["flat"]
    assert points.shape == (400, 4)
    scale, x, flat, heavy = points.numpy().T
    assert abs(scale.mean() - 1) < 5 * 0.5 / 20
    assert abs(((x - 3) / np.exp(scale)).std() - 1) < 5 / 28
    assert np.abs(flat).max() <= 2
    assert (
        abs(np.median(heavy) - math.log(2)) < 5 * 1.6 / 20
    )  # the log of a half Cauchy has density 1 / pi at its median
    assert torch.equal(points, prior_points(density, 400, 0)[0])


@pytest.mark.parametrize("dependent", [False, True])
def test_draws_of_a_guide_on_unconstrained_space(dependent: bool) -> None:
    def model() -> None:
        top = pyro.sample("top", dist.Uniform(1.0, 2.0))
        pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        pyro.sample("z", dist.Uniform(0.0, top if dependent else 2.0))

    density = LogDensity(model, (), {}, 0)
    u = torch.randn(10, density.dim, generator=torch.Generator().manual_seed(0)).double()
    draws = density.constrain(u)
    draws["scale"][4] = 0.0  # on the border, at minus infinity
    points, which = guide_points(density, draws)
    assert which.tolist() == [i for i in range(10) if i != 4]
    torch.testing.assert_close(points, u[which], rtol=1e-3, atol=1e-3)


# Modes and their weights


@pytest.mark.parametrize("weight", [0.9, 0.5, 0.1])
def test_weights_are_exact_within_their_errors(weight: float) -> None:
    found = searched(two_gaussians(weight), *normal_draws(SDS))
    assert len(found.modes) == 2
    (missed,) = found.missed
    np.testing.assert_allclose(missed.gaussian.loc, FAR, atol=0.02)
    assert missed.share == 0
    assert missed.reliable
    assert missed.weight_se < 0.03
    assert abs(missed.weight - (1 - weight)) < 5 * missed.weight_se + 1e-3
    assert missed.draws is not None
    np.testing.assert_allclose(missed.draws.mean(0), FAR, atol=6 * SDS.max() / 15)
    assert math.isclose(sum(mode.weight for mode in found.modes), 1)


def test_a_wide_mode_on_the_shoulder_of_a_narrow_one_is_found() -> None:
    """Between the two the density falls by less than 0.1 nats, but in 20 dimensions half of the posterior is in each."""
    far = 8 * np.eye(20)[0]

    def model() -> None:
        with pyro.plate("i", 20), pyro.poutine.mask(mask=False):
            z = pyro.sample("z", dist.Normal(0.0, 20.0))
        narrow = dist.Normal(0.0, torch.ones(20).double()).log_prob(z).sum()
        wide = dist.Normal(torch.from_numpy(far), 3 * torch.ones(20).double()).log_prob(z).sum()
        pyro.factor("modes", torch.logaddexp(narrow, wide) - math.log(2))

    (missed,) = searched(model, *normal_draws(np.ones(20))).missed
    assert abs(missed.weight - 0.5) < 5 * missed.weight_se
    np.testing.assert_allclose(missed.gaussian.sd, 3, rtol=0.02)


def test_a_mode_that_the_guide_has_draws_in_is_not_missed() -> None:
    draws, _ = normal_draws(SDS)
    draws[:300] += FAR
    density = np.logaddexp(
        *(-0.5 * (((draws - at) / SDS) ** 2).sum(1) + math.log(w) for at, w in ((0, 0.7), (FAR, 0.3)))
    )
    log_q = density - np.log(SDS).sum() - 1.5 * math.log(2 * math.pi)
    found = searched(two_gaussians(0.5), draws, log_q)
    assert sorted(round(mode.share, 2) for mode in found.modes) == [0.3, 0.7]
    assert not found.missed
    np.testing.assert_allclose([mode.weight for mode in found.modes], 0.5, atol=0.1)


def test_mirrored_modes_are_copies() -> None:
    def model() -> None:
        with pyro.plate("i", 2):
            z = pyro.sample("z", dist.Normal(0.0, 5.0))
        pyro.sample("y", dist.Normal(z.prod(), 0.5), obs=torch.tensor(8.0))

    # guides at one of z = (r, r) and (-r, -r)
    noise = np.random.default_rng(0).standard_normal((500, 2)) * 0.05
    found = searched(model, 2.8 + noise, np.zeros(500))
    assert [mode.copy_of for mode in found.modes] == [None, 0]


def funnel() -> None:
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("i", 5):
        pyro.sample("x", dist.Normal(0.0, torch.exp(v / 2)))


def banana() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(2 * x**2, 0.3))


def heavy() -> None:
    with pyro.plate("i", 3):
        pyro.sample("x", dist.StudentT(2.0, 0.0, 1.0))


def neck() -> None:
    """Its density has no greatest value."""
    mean, scale = pyro.sample("mean", dist.Normal(0.0, 5.0)), pyro.sample("scale", dist.HalfCauchy(5.0))
    with pyro.plate("i", 4):
        pyro.sample("x", dist.Normal(mean, scale))


@pytest.mark.parametrize("model", [funnel, banana, heavy, neck])
def test_no_false_alarm_where_the_guide_is_right(model: Callable[[], None]) -> None:
    """The prior's draws are the posterior's, where there are no data."""
    density = LogDensity(model, (), {}, 0)
    draws = prior_points(density, 500, 1)[0].numpy()
    for seed in range(3):
        found = search_modes(density, draws, np.zeros(500), seed)
        assert isinstance(found, Modes)
        assert not found.missed
        assert len(found.modes) <= 1


# diagnose


def test_diagnose_reckons_with_a_mode_that_the_guide_misses() -> None:
    weight = 0.7
    found = diagnose(two_gaussians(weight), at_zero(), seed=0)
    assert found.verdict == "do not use"
    first = found.findings[0].statement
    assert "another mode, of weight 0.3" in first
    assert "the guide has none of its draws" in first
    assert "climbs (" in first
    mean = (1 - weight) * FAR
    sd = np.sqrt(SDS**2 + weight * (1 - weight) * FAR**2)
    scalars = found.scalars
    for column, exact in (("mean_shift", mean / sd), ("log_sd_ratio", np.log(SDS / sd))):
        error = scalars[f"{column}_se"] + 0.02  # of the mode's own 400 draws
        assert (np.abs(scalars[column] - exact) < 5 * error).all()
    assert not any("agree with the posterior" in finding.statement for finding in found.findings)
    assert any("both are 0.36 nats greater" in finding.statement for finding in found.findings)  # -log(0.7) = 0.357


def test_diagnose_says_how_hard_it_looked() -> None:
    def model() -> None:
        with pyro.plate("i", 3):
            pyro.sample("z", dist.Normal(0.0, torch.from_numpy(SDS)))

    found = diagnose(model, at_zero(), seed=0)
    assert found.verdict == "good"
    assert found.modes is not None
    (told,) = [finding.statement for finding in found.findings if finding.statement.startswith("Other modes: ")]
    assert told.startswith(f"Other modes: {sum(found.modes.climbs.values())} climbs (")
    assert told.endswith("found no mode of a weight of 0.05 or more without draws of the guide.")


def test_draws_that_miss_the_same_mode_hide_nothing() -> None:
    draws = np.random.default_rng(0).standard_normal((4, 500, 3)) * SDS
    found = diagnose(two_gaussians(0.5), at_zero(), mcmc={"z": draws}, seed=0)
    assert found.verdict == "do not use"
    assert "another mode" in found.findings[0].statement


def test_a_model_that_is_no_graph_is_not_searched_and_that_is_said() -> None:
    def model() -> Any:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        return pyro.sample("y", dist.Normal(z if z.item() < 3 else z + 0.1, 1.0), obs=torch.tensor(0.5))

    def guide() -> None:
        pyro.sample("z", dist.Normal(0.25, math.sqrt(0.5)))

    found = diagnose(model, guide, seed=0, num_draws=500)
    assert found.modes is None
    assert any("Other modes were not looked for: the model is not a graph" in f.statement for f in found.findings)


def test_the_same_in_another_order_of_components_is_no_other_mode() -> None:
    y = torch.cat([torch.linspace(-6.0, -4.0, 20), torch.linspace(2.0, 4.0, 20)])

    def model() -> None:
        with pyro.plate("component", 2):
            mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(y)):
            parts = dist.Normal(mean, torch.ones(2))
            pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(torch.ones(2) / 2), parts), obs=y)

    def guide() -> None:
        with pyro.plate("component", 2):
            pyro.sample("mean", dist.Normal(torch.tensor([-5.0, 3.0]) * 0.998, 20**-0.5))

    found = diagnose(model, guide, seed=0)
    assert found.modes is not None
    assert not any("another mode" in finding.statement for finding in found.findings)
    assert found.modes.modes[0].share == 1
    assert found.verdict == "good"


# fit


@pytest.mark.parametrize("seed", range(4))
def test_the_automatic_guide_is_at_the_heaviest_mode_and_tells_of_the_other(seed: int) -> None:
    """All starting points of a first guide, uniform on (-2, 2), are nearer to the lighter one."""
    result = fit(two_gaussians(0.2, 4 * FAR), "auto", seed=seed, progress=False)
    modes = result.modes
    assert len(modes) == 2
    assert modes["share"].tolist() == [1.0, 0.0]
    assert (np.abs(modes["weight"] - [0.8, 0.2]) < 5 * modes["weight_se"] + 1e-3).all()
    np.testing.assert_allclose(modes.loc[0, ["z[0]", "z[1]", "z[2]"]].to_numpy(float), 4 * FAR, atol=0.01)
    assert result.elbo == pytest.approx(math.log(0.8), abs=1e-3)
    assert "there are other modes" in repr(result)
    assert "(missed)" in repr(result)
    if seed == 0:
        found = result.diagnose(seed=0)
        assert found.verdict == "do not use"
        assert found.modes is not None
        assert found.modes.climbs["known"] == 2


def test_an_automatic_guide_of_one_mode_says_that_no_other_was_found() -> None:
    def model() -> None:
        with pyro.plate("i", 3):
            pyro.sample("z", dist.Normal(0.0, torch.from_numpy(SDS)))

    result = fit(model, "auto", seed=0, progress=False)
    assert result.approximation.next_guide == ""
    assert "other modes: none of weight 0.05 or more in " in repr(result)
    assert result.modes["weight"].tolist() == [1.0]


def test_sites_below_summed_out_ones() -> None:
    """One coordinate for each element, whatever the states above it are: the prior's draws have one for each state."""
    data = torch.tensor([-2.0, -1.5, 2.2, 1.9])

    @config_enumerate
    def model() -> None:
        loc = pyro.sample("loc", dist.Normal(torch.tensor([-2.0, 2.0]), 0.5).to_event(1))
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
            x = pyro.sample("x", dist.Normal(loc[z], 0.5))
            pyro.sample("y", dist.Normal(x, 0.5), obs=data)

    density = LogDensity(model, (), {}, 0)
    points, without = prior_points(density, 50, 0)
    assert points.shape == (50, density.dim)
    assert without == []
    assert torch.isfinite(points).all()
    found = fit(density, "auto", seed=0, progress=False)
    assert found.converged
