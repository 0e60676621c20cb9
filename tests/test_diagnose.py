"""The verdict on guides at known distances of known posteriors, by all three ways."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import evidence_oracles as oracles
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroSample
from scipy.optimize import brentq
from scipy.stats import norm

from pyro_elbo_ext import DecomposedELBO, diagnose
from pyro_elbo_ext.density.log_density import compiled_log_density
from pyro_elbo_ext.diagnosis import Diagnosis, reasons, reliability, report
from pyro_elbo_ext.diagnosis.many_chains import COLUMNS, run_chains, split_rhat
from pyro_elbo_ext.diagnosis.marginals import Scalars, by_chains
from pyro_elbo_ext.evidence.importance import ImportanceSample
from pyro_elbo_ext.evidence.ledger import EvidenceBounds, Interval
from pyro_elbo_ext.particles import batched_draws

ERRORS = 4.5  # standard errors that a figure may be off

MEAN, SD = 8.0, math.sqrt(0.2)  # of the posterior of oracles.GAUSSIAN


def gaussian_draws(chains: int = 4, draws: int = 2000) -> dict[str, np.ndarray]:
    return {"z": np.random.default_rng(0).normal(MEAN, SD, (chains, draws))}


def normal_guide(mean: float, sd: float) -> Callable[[], None]:
    def guide() -> None:
        pyro.sample("z", dist.Normal(mean, sd))

    return guide


def text(found: Diagnosis) -> str:
    return "\n".join(f"{f.subject} {f.statement} {f.remedy}" for f in found.findings)


@pytest.mark.parametrize("mcmc", [False, True], ids=["alone", "mcmc"])
@pytest.mark.parametrize(
    ("shift", "ratio", "verdict"),
    [
        (0.0, 0.0, "good"),
        (0.05, -0.05, "good"),
        (0.3, 0.0, "means only"),
        (0.0, -0.3, "means only"),
        (0.0, 0.3, "means only"),
        (-0.7, 0.0, "do not use"),
        (0.0, -0.7, "do not use"),
        (0.0, -3.0, "do not use"),
        (30.0, -1.0, "do not use"),
    ],
)
def test_exact_posterior(shift: float, ratio: float, verdict: str, mcmc: bool) -> None:
    guide = normal_guide(MEAN - shift * SD, SD * math.exp(ratio))
    draws = gaussian_draws() if mcmc else None
    found = diagnose(oracles.GAUSSIAN.model, guide, seed=0, mcmc=draws)
    row = found.scalars.loc["z"]
    assert found.verdict == row["verdict"] == verdict
    # the shift is in estimated posterior sds, which adds to its error where it is large
    assert abs(row["mean_shift"] - shift) < ERRORS * (row["mean_shift_se"] + 0.02 * abs(shift)) + 1e-3
    assert abs(row["log_sd_ratio"] - ratio) < ERRORS * row["log_sd_ratio_se"] + 1e-3
    assert row["mean_shift_se"] < 0.04 * (1 + abs(shift))
    assert row["log_sd_ratio_se"] < 0.04
    assert (found.mcmc is not None) == mcmc == (found.method == "mcmc")
    lower, upper = found.evidence.kl_posterior
    exact = -ratio + (math.exp(2 * ratio) + shift**2 - 1) / 2
    assert lower - 1e-2 <= exact <= upper + 1e-2


@pytest.mark.parametrize(
    ("name", "worst"),
    [("exact", "good"), ("mean_field", "means only"), ("shifted", "do not use"), ("prior", "do not use")],
)
def test_regression(name: str, worst: str) -> None:
    """Two correlated weights: the mean-field optimum has the right means, and sds too small by sqrt(1 - r^2)."""
    guide = oracles.REGRESSION.guides[name][0]
    draws = {"w": oracles.REGRESSION.posterior(4000)["w"].numpy().reshape(4, 1000, 2)}
    alone = diagnose(oracles.REGRESSION.model, guide, seed=0)
    checked = diagnose(oracles.REGRESSION.model, guide, seed=0, mcmc=draws)
    covariance = np.cov(draws["w"].reshape(-1, 2).T)
    if name == "mean_field":
        r = covariance[0, 1] / math.sqrt(covariance[0, 0] * covariance[1, 1])
        assert np.allclose(alone.scalars["log_sd_ratio"], 0.5 * math.log(1 - r**2), atol=0.06)
        size = float(np.abs(alone.scalars["log_sd_ratio"]).max())
        worst = "do not use" if size > 0.5 else "means only"
        assert "full covariance" in text(alone)
        assert "w[0]" in text(alone)
        assert "w[1]" in text(alone)
    assert alone.verdict == checked.verdict == worst


def test_weights_are_used_only_where_they_can_be_relied_on() -> None:
    close = diagnose(oracles.GAUSSIAN.model, normal_guide(MEAN, 1.05 * SD), seed=0)
    narrow = diagnose(oracles.GAUSSIAN.model, normal_guide(MEAN, 0.2 * SD), seed=0)
    assert close.method == "importance weights"
    assert close.evidence.importance.khat < 0.5
    assert narrow.method.startswith("Hamiltonian")
    assert narrow.evidence.importance.khat > 0.5
    assert "collapsed" in text(narrow)


def test_seed_and_isolation() -> None:
    guide = normal_guide(MEAN, 0.3 * SD)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = (diagnose(oracles.GAUSSIAN.model, guide, seed=3) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert first.scalars.equals(second.scalars)
    assert not first.scalars.equals(diagnose(oracles.GAUSSIAN.model, guide, seed=4).scalars)


def funnel() -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("child", 6):
        pyro.sample("x", dist.Normal(0.0, scale))


def test_funnel_is_to_be_non_centred() -> None:
    def guide() -> None:
        pyro.sample("scale", dist.LogNormal(-0.5, 0.3))
        with pyro.plate("child", 6):
            pyro.sample("x", dist.Normal(0.0, 0.5))

    found = diagnose(funnel, guide, seed=0)
    assert found.verdict == "do not use"
    by_site = [finding for finding in found.findings if finding.subject == "x"]
    (remedy,) = {
        finding.remedy for finding in by_site if "scale" in finding.statement and "Non-centre" in finding.remedy
    }
    code = re.search(r"poutine\.reparam\(.*\)", remedy)
    assert code is not None
    noncentered = eval(code[0], {"poutine": poutine, "model": funnel, "LocScaleReparam": LocScaleReparam})
    assert "x_decentered" in poutine.trace(noncentered).get_trace()


def test_correlated_gaussian_in_fifty_dimensions() -> None:
    """Under the mean-field optimum, whose sds are 1 / sqrt(precision): the figure of every scalar is known."""
    a = torch.randn(50, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covariance = a @ a.T / 50 + 0.05 * torch.eye(50)
    sd = covariance.inverse().diagonal().rsqrt()

    def model() -> None:
        pyro.sample("z", dist.MultivariateNormal(torch.zeros(50, dtype=torch.float64), covariance))

    def guide() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(50, dtype=torch.float64), sd).to_event(1))

    found = diagnose(model, guide, seed=0)
    exact = (sd / covariance.diagonal().sqrt()).log().numpy()
    scalars = found.scalars
    assert (np.abs(scalars["log_sd_ratio"] - exact) < ERRORS * scalars["log_sd_ratio_se"]).all()
    assert (np.abs(scalars["mean_shift"]) < ERRORS * scalars["mean_shift_se"]).all()
    assert found.verdict == "do not use"
    listed = [finding for finding in found.findings if finding.subject.startswith("z")]
    assert len(listed) < 20  # the worst by name, the rest in one
    assert "correlates it with z[" in text(found)


def two_modes() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 100.0))
    pyro.factor("modes", torch.logaddexp(dist.Normal(-5.0, 1.0).log_prob(z), dist.Normal(5.0, 1.0).log_prob(z)))


def test_two_modes() -> None:
    """A guide on both at once is right in the first two moments; from one in between chains end in different places."""
    wide = diagnose(two_modes, normal_guide(0.0, math.sqrt(26)), seed=0, num_draws=4000)
    between = diagnose(two_modes, normal_guide(0.0, 2.0), seed=0)
    assert wide.verdict == "good"
    assert between.verdict == "do not use"
    assert any("do not come to agree" in finding.statement for finding in between.findings)


def test_pyro_module_and_autoguide() -> None:
    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.slope = PyroSample(dist.Normal(0.0, 1.0))

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> None:
            slope = self.slope
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(slope * x, 0.5), obs=y)

    x = torch.linspace(-1, 1, 20)
    y = 0.7 * x
    model = Model()
    guide = AutoNormal(model)
    elbo = DecomposedELBO(num_particles=4)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.993}), elbo)
    early = diagnose(model, guide_started(guide, x, y), x, y, seed=0)
    for _ in range(600):
        svi.step(x, y)
    late = diagnose(model, guide, x, y, seed=0, history=elbo)
    assert early.verdict == "do not use"
    assert late.verdict == "good"
    assert list(late.scalars.index) == ["slope"]


def guide_started(guide: AutoNormal, x: torch.Tensor, y: torch.Tensor) -> AutoNormal:
    guide(x, y)
    return guide


@pytest.mark.parametrize("traceable", [True, False], ids=["compiled", "nuts"])
def test_models_that_take_one_point_at_a_time(traceable: bool) -> None:
    """Masked indexing has no batched form; a loop whose length depends on a draw is no graph at all."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if traceable:
            pyro.sample(
                "x", dist.Multinomial(3, torch.stack([z.sigmoid(), 1 - z.sigmoid()])), obs=torch.tensor([3.0, 0.0])
            )
        else:
            sign = 1.0 if z > 0 else 1.0 + 1e-9
            pyro.sample("x", dist.Normal(sign * z, 0.5), obs=torch.tensor(1.0))

    def guide() -> None:
        pyro.sample("z", dist.Normal(0.0, 0.1))

    u = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    data = 3 * u.sigmoid().log() if traceable else dist.Normal(u, 0.5).log_prob(torch.tensor(1.0))
    weight = torch.softmax(data - u**2 / 2, 0)
    mean = (weight * u).sum()
    sd = ((weight * (u - mean) ** 2).sum()).sqrt()
    found = diagnose(model, guide, seed=0)
    row = found.scalars.loc["z"]
    assert found.method == ("Hamiltonian Monte Carlo from the guide's draws" if traceable else "NUTS")
    assert abs(row["mean_shift"] - float(mean / sd)) < ERRORS * row["mean_shift_se"] + 0.03
    assert abs(row["log_sd_ratio"] - float((0.1 / sd).log())) < ERRORS * row["log_sd_ratio_se"]


def test_deterministic_sites_are_judged() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.deterministic("constant", torch.tensor(3.0))
        pyro.deterministic("exp", z.exp())
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=torch.ones(2))

    def guide() -> None:
        pyro.sample("z", dist.Normal(torch.full((2,), 0.5), torch.tensor([0.5**0.5, 0.4])).to_event(1))

    found = diagnose(model, guide, seed=0)
    assert list(found.scalars.index) == ["z[0]", "z[1]", "exp[0]", "exp[1]"]
    assert list(found.scalars["verdict"] == "good") == [True, False, True, False]


@pytest.mark.parametrize(("slope", "word"), [(0.05, "still rising"), (-0.05, "still falling"), (0.0, "level")])
def test_trend_of_the_elbo(slope: float, word: str) -> None:
    elbo = DecomposedELBO(history=True)
    level = torch.tensor(0.0)

    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("trend", level + 0.1 * torch.randn(()))

    guide = normal_guide(0.0, 1.0)
    for step in range(400):
        level = torch.tensor(slope * step)
        elbo.loss_and_grads(model, guide)
    found = diagnose(oracles.GAUSSIAN.model, normal_guide(MEAN, SD), seed=0, history=elbo)
    assert word in text(found)
    assert found.verdict == "good"  # a trend is told, and the figures decide
    assert text(diagnose(oracles.GAUSSIAN.model, normal_guide(MEAN, SD), seed=0, history=elbo.history)) == text(found)


def test_run_away_and_uneven_scales() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1000.0))
        b = pyro.sample("b", dist.Normal(0.0, 1000.0))
        pyro.sample("x", dist.Normal(a, 100.0), obs=torch.tensor(0.0))
        pyro.sample("y", dist.Normal(b, 0.01), obs=torch.tensor(0.0))

    def guide() -> None:
        pyro.sample("a", dist.Normal(0.0, 99.5))
        pyro.sample("b", dist.Normal(50.0, 0.1))

    found = diagnose(model, guide, seed=0)
    assert found.verdict == "do not use"
    assert found.findings[0].subject == "b"
    assert "ran away" in found.findings[0].remedy
    assert any(finding.subject == "a" and "Standardize" in finding.remedy for finding in found.findings)


def test_heavy_tails_are_judged_by_quantiles() -> None:
    """A Cauchy distribution has no variance, so that a ratio of sds would say nothing; a Gaussian has one."""
    rng = np.random.default_rng(0)
    posterior = np.stack([rng.standard_cauchy((128, 100)), rng.normal(size=(128, 100))], -1)
    guide = Scalars(["heavy", "light"], ["heavy", "light"], rng.normal(0.0, 0.5, (10_000, 2)))
    found = by_chains(guide, posterior, 0.0)
    # the central 68% of a Cauchy distribution
    exact = np.log([0.5 / math.tan(math.pi * (norm.cdf(1.0) - 0.5)), 0.5])
    assert found["robust"].tolist() == [True, False]
    assert (np.abs(found["log_sd_ratio"] - exact) < ERRORS * found["log_sd_ratio_se"]).all()
    assert (np.abs(found["mean_shift"]) < ERRORS * found["mean_shift_se"]).all()


def test_mcmc_of_fewer_sites_and_bad_chains() -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("other", dist.Normal(0.0, 1.0))

    def guide() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("other", dist.Normal(0.0, 1.0))

    rng = np.random.default_rng(0)
    found = diagnose(model, guide, seed=0, mcmc={"z": rng.normal(size=(4, 500)), "unknown": rng.normal(size=(4, 500))})
    assert list(found.scalars.index) == ["z"]
    assert "no draws of other" in text(found)
    apart = rng.normal(size=(4, 500)) + np.array([[0.0], [0.0], [3.0], [3.0]])
    assert "do not agree themselves" in text(diagnose(model, guide, seed=0, mcmc={"z": apart, "other": apart}))
    with pytest.raises(ValueError, match="none of the model's sites"):
        diagnose(model, guide, mcmc={"unknown": rng.normal(size=(4, 500))})


def discrete() -> None:
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    pyro.sample("k", dist.Bernoulli(p))


def discrete_guide() -> None:
    pyro.sample("p", dist.Beta(1.0, 1.0))
    pyro.sample("k", dist.Bernoulli(0.5))


def subsampled() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 10, subsample_size=3):
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(3))


@pytest.mark.parametrize(
    ("model", "guide", "options", "error", "match"),
    [
        (discrete, discrete_guide, {}, ValueError, "latent site 'k' is discrete.*Sum it out"),
        (subsampled, normal_guide(0.0, 1.0), {}, ValueError, "plate 'data' subsamples 3 of 10"),
        (oracles.GAUSSIAN.model, normal_guide(math.nan, 1.0), {}, ValueError, "z"),
        (oracles.GAUSSIAN.model, lambda: None, {}, ValueError, "z"),
        (oracles.GAUSSIAN.model, normal_guide(0.0, 1.0), {"num_draws": 0}, ValueError, "num_draws must be at least 25"),
        (oracles.GAUSSIAN.model, normal_guide(0.0, 1.0), {"num_draws": 1.5}, TypeError, "num_draws"),
        (oracles.GAUSSIAN.model, normal_guide(0.0, 1.0), {"history": Trace_ELBO()}, TypeError, "history"),
        (3, normal_guide(0.0, 1.0), {}, TypeError, "model must be callable"),
    ],
)
@pytest.mark.filterwarnings("ignore:Found vars")
def test_bad_input(
    model: object, guide: object, options: dict[str, object], error: type[Exception], match: str
) -> None:
    with pyro.validation_enabled(False), pytest.raises(error, match=match):
        diagnose(model, guide, **options)  # type: ignore[arg-type]


def test_many_chains_forget_where_they_start() -> None:
    """From far away and too close together, the moments of a Gaussian of scales 100 and 0.01, correlated."""
    covariance = torch.tensor([[1e4, 0.9], [0.9, 1e-4]], dtype=torch.float64)

    def model() -> None:
        pyro.sample("z", dist.MultivariateNormal(torch.tensor([3.0, -2.0], dtype=torch.float64), covariance))

    generator = torch.Generator().manual_seed(0)
    start = torch.tensor([1.0, 5.0]) + 0.1 * torch.randn(64, 2, dtype=torch.float64, generator=generator)
    found = run_chains(compiled_log_density(model), start, 100, generator)
    assert found.converged
    means = found.points.mean(1)
    error = means.std(0) / 8
    assert ((means.mean(0) - torch.tensor([3.0, -2.0])).abs() < ERRORS * error).all()
    assert (error < 0.05 * covariance.diagonal().sqrt()).all()
    assert torch.allclose(torch.cov(found.points.flatten(0, 1).T), covariance, rtol=0.1)


def test_split_rhat() -> None:
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(50, 100, 4))
    draws[:25, :, 1] += 1.0  # in other places
    draws[:25, :, 2] *= 3.0  # of other spread
    draws[:, 50:, 3] += 1.0  # drifting
    rhat = split_rhat(draws)
    assert rhat[0] < 1.02
    assert (rhat[1:] > 1.05).all()


def test_split_rhat_of_many_coordinates_is_that_of_each() -> None:
    draws = np.random.default_rng(0).normal(size=(6, 20, 2 * COLUMNS + 3))
    draws[:3, :, COLUMNS + 1] += 3.0  # standard deviations
    rhat = split_rhat(draws)
    alone = [split_rhat(draws[..., [i, i + 1]])[0] for i in range(draws.shape[2] - 1)]
    assert rhat.shape == (2 * COLUMNS + 3,)
    np.testing.assert_allclose(rhat[:-1], alone, rtol=1e-12)
    assert rhat.argmax() == COLUMNS + 1


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the unit of ru_maxrss differs")
@pytest.mark.parametrize(
    ("case", "what", "most"),
    [("diagnose_1000", "1000 scalars", 1.5), ("khat_million_rows", "1000 draws", 0.75)],  # 1.5 GB with all imports
)
def test_many_latents_and_many_rows_in_bounded_memory(case: str, what: str, most: float) -> None:
    output = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.diagnosis", "--only", case], capture_output=True, text=True, check=True
    ).stdout
    print(output)
    match = re.search(rf"\| `{case}` \| {what}[^|]*\| [\d.]+ \| ([\d.]+) \| ([\d.]+) \|", output)
    assert match is not None
    assert float(match[1]) - float(match[2]) < most


def test_all_runs_see_the_same_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guide that was never called: its parameters come with the first run, and the later runs must not lose them."""
    pyro.clear_param_store()
    made: list[str] = []

    class Guide(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.loc = torch.nn.Parameter(torch.tensor(MEAN))

        def forward(self) -> None:
            scale = pyro.param("scale", lambda: made.append("scale") or torch.tensor(0.1 * SD))
            pyro.sample("z", dist.Normal(self.loc, scale))

    given_up: list[str] = []
    monkeypatch.setattr(batched_draws.Batch, "_give_up", lambda self, reason: given_up.append(reason))
    found = diagnose(oracles.GAUSSIAN.model, Guide(), seed=3, num_draws=200)
    assert found.method.startswith("Hamiltonian")
    assert made == ["scale"]
    assert not given_up
    assert not pyro.get_param_store().keys()


# What is said of k-hat, and of chains that disagree, contradicts nothing beside it


def weighted_sample(spread: float, tail: float, count: int = 2000) -> ImportanceSample:
    """Weights whose bulk has a log sd of ``spread``, and whose largest are of a tail of shape ``tail``."""
    rng = np.random.default_rng(0)
    log_w = spread * rng.normal(size=count)
    order = np.argsort(log_w)[-count // 20 :]
    log_w[order] = log_w[order[0]] + max(spread, 1e-3) * np.sort(rng.pareto(1 / tail, len(order)))
    if tail > 0.6:
        log_w[order[-3:]] += spread * np.array([3.0, 6.0, 9.0])
    return ImportanceSample({"z": torch.zeros(count)}, log_w, np.zeros(count), np.zeros(count), noise=1e-12)


@pytest.mark.parametrize("upper", [0.003, 0.3, 3.0, 300.0, math.inf])
@pytest.mark.parametrize("tail", [0.1, 0.6, 1.5])
@pytest.mark.parametrize("spread", [0.0, 1e-4, 0.03, 0.3, 3.0])
def test_one_thing_is_said_of_the_weights(spread: float, tail: float, upper: float) -> None:
    sample = weighted_sample(spread, tail)
    evidence = EvidenceBounds(
        Interval(0.0, upper), Interval(min(0.001, upper), upper), 0.0, 0.01, 1.0, 0.95, (), sample
    )
    said = [f.statement for f in reliability.on_weights(evidence, sample)]
    about = [s for s in said if "k-hat" in s]
    assert len(about) == 1
    (sentence,) = about
    far, near = "far from the posterior" in sentence, "near the posterior" in sentence
    assert not (far and (upper < reliability.NEAR or sample.ess > 0.95 * sample.num_draws))
    assert not (near and upper > reliability.NEAR)
    assert ("can be " in sentence) == (sample.khat < sample.threshold and not sample.even)
    assert ("can be relied on" in sentence) == (sample.khat < min(0.5, sample.threshold) and not sample.even)
    assert ("says nothing" in sentence) == sample.even
    row = next(what for name, _, what in report.summary(evidence) if name == "k-hat")
    assert ("says nothing" in row) == sample.even
    assert ("is no good" in " ".join(evidence.notes)) == (not sample.reliable)
    assert bool(sample.to_dataframe()["ok"].iloc[0]) == sample.reliable
    assert ("says nothing" in repr(sample)) == sample.even


def test_nearly_equal_weights_are_relied_on_whatever_k_hat_is() -> None:
    """A guide that is the posterior but for a little: weights with a tail of no weight."""

    def model() -> None:
        pyro.sample("z", dist.StudentT(30.0, 0.0, 1.0))

    def guide() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.02))

    found = diagnose(model, guide, seed=0)
    assert found.evidence.importance.even
    assert found.verdict == "good"
    assert "far from the posterior" not in text(found)


def test_nothing_is_good_while_chains_disagree(tmp_path: Path) -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("other", dist.Normal(0.0, 1.0))

    def guide() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("other", dist.Normal(0.0, 1.0))

    rng = np.random.default_rng(0)
    apart = rng.normal(size=(4, 500)) * 1.0 + np.array([[-0.4], [-0.4], [0.4], [0.4]])
    found = diagnose(model, guide, seed=0, mcmc={"z": apart, "other": rng.normal(size=(4, 500))})
    assert found.verdict == "means only"
    assert found.scalars.loc["z", "verdict"] == "not known"
    assert found.scalars.loc["other", "verdict"] == "good"
    assert "scalars agree" not in text(found)
    assert "1 not known, 1 good" in repr(found)
    assert found.to_dataframe().loc["z", "verdict"] == "not known"
    page = found.to_html(tmp_path / "page.html").read_text()
    assert "not-known" in page
    assert "scalars agree" not in page
    assert "not known" in found._repr_html_()
    assert found.plot() is not None


def with_rhat(draws: np.ndarray, wanted: Mapping[int, float]) -> np.ndarray:
    """Draws of shape (4, draw, n) whose halves of chains are moved apart until the columns have the wanted R-hat."""
    places = np.array([-1.0, 1.0, 1.0, -1.0])[:, None]
    moved = draws.copy()
    for column, rhat in wanted.items():

        def miss(size: float, column: int = column, rhat: float = rhat) -> float:
            one = draws[..., column] + size * places
            return float(split_rhat(one[..., None])[0]) - rhat

        moved[..., column] += brentq(miss, 0.0, 100.0) * places
    return moved


@pytest.mark.parametrize(
    ("rhats", "verdict"),
    [
        ({}, "good"),
        ({2: 1.06}, "means only"),
        ({2: 1.06, 4: 1.08}, "means only"),
        ({2: 1.2}, "do not use"),
        ({0: 1.2, 2: 1.2, 4: 1.2}, "do not use"),
        ({0: 1.06, 2: 1.06, 4: 1.06}, "do not use"),
        ({4: 4.9}, "do not use"),
    ],
)
def test_how_far_chains_disagree_decides_what_is_said(rhats: dict[int, float], verdict: str) -> None:
    """The guide is the posterior, and the draws are too but for the chains' places, so that all hangs on these."""

    def model() -> None:
        with pyro.plate("i", 6):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    draws = with_rhat(np.random.default_rng(0).normal(size=(4, 2000, 6)), rhats)
    found = diagnose(model, model, seed=0, num_draws=4000, mcmc={"z": draws})
    assert found.verdict == verdict
    names = [f"z[{i}]" for i in rhats]
    assert not found.scalars.loc[names, "verdict"].isin(["good", "means only"]).any()
    others = found.scalars.drop(names)["verdict"]
    assert (others == "good").all()
    told = [finding for finding in found.findings if "MCMC chains do not" in finding.statement]
    assert len(told) == bool(rhats)
    if verdict == "means only":
        assert all(name in told[0].statement for name in names)
        assert told[0].statement.startswith("Not judged")


def test_a_single_scalar_that_is_not_judged_leaves_nothing_to_say() -> None:
    draws = with_rhat(np.random.default_rng(0).normal(size=(4, 500, 1)), {0: 1.06})[..., 0]
    found = diagnose(normal_guide(0.0, 1.0), normal_guide(0.0, 1.0), seed=0, mcmc={"z": draws})
    assert found.verdict == "do not use"


def test_nothing_is_good_where_many_chains_have_two_modes() -> None:
    def model() -> None:
        with pyro.plate("i", 3):
            z = pyro.sample("z", dist.Normal(0.0, 3.0))
        pyro.factor("modes", -((z.square() - 4.0).square() * 4).sum())

    def guide() -> None:
        with pyro.plate("i", 3):
            pyro.sample("z", dist.Normal(0.0, 2.0))

    found = diagnose(model, guide, seed=0, num_draws=200)
    assert found.verdict == "do not use"
    assert not (found.scalars["verdict"] == "good").any()
    assert not (found.scalars["verdict"] == "means only").any()
    assert "agree with the posterior" not in repr(found)


def test_a_longer_run_is_no_remedy_where_the_elbo_is_level() -> None:
    row = pd.Series({"mean_shift": 0.3, "log_sd_ratio": 0.2})
    assert reasons._remedy(row, None, None, level=False).startswith("Longer run")
    assert reasons._remedy(row, None, None, level=True).startswith("Richer guide")
    record = DecomposedELBO().history
    assert record is not None
    assert not reliability.is_level(record)


def test_the_larger_figure_comes_first() -> None:
    row = {"mean_shift": 0.1, "log_sd_ratio": -1.0, "mean_shift_se": 0.01, "log_sd_ratio_se": 0.01, "robust": False}
    assert reasons._statement(pd.Series(row)).startswith("The guide's sd is 2.72 times too small")
    assert reasons._statement(pd.Series(row | {"mean_shift": -2.0})).startswith("The posterior's mean is -2.00")
