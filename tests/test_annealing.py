from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal
from scipy.special import logsumexp

from pyro_elbo_ext.evidence.annealing import CannotAnneal, _Path, annealed
from pyro_elbo_ext.evidence.scoring import Scorer
from tests.evidence_oracles import BETA, GAUSSIAN, REGRESSION, Conjugate

CHAINS = 200


def scorer_of(problem: Conjugate, name: str) -> Scorer:
    return Scorer(problem.model, problem.guides[name][0], (), {}, 1000, False)


@pytest.mark.parametrize(
    ("problem", "name"), [(GAUSSIAN, "shifted"), (GAUSSIAN, "narrow"), (BETA, "narrow"), (REGRESSION, "mean_field")]
)
def test_both_ways_meet_at_the_evidence(problem: Conjugate, name: str) -> None:
    with torch.no_grad():
        found = annealed(scorer_of(problem, name), CHAINS, problem.posterior(CHAINS))
    assert found.temperatures[0] == 0
    assert found.temperatures[-1] == 1
    assert np.all(np.diff(found.temperatures) > 0)
    assert 0.5 < found.acceptance < 1
    weights = np.exp(found.forward - problem.log_evidence)
    assert abs(weights.mean() - 1) < 4 * weights.std(ddof=1) / math.sqrt(CHAINS)  # E[w] = p(x)
    assert found.reverse is not None
    weights = np.exp(problem.log_evidence - found.reverse)
    assert abs(weights.mean() - 1) < 4 * weights.std(ddof=1) / math.sqrt(CHAINS)  # E[1/w] = 1/p(x)
    error = 4 / math.sqrt(CHAINS)
    assert found.forward.mean() - error * found.forward.std() <= problem.log_evidence
    assert found.reverse.mean() + error * found.reverse.std() >= problem.log_evidence


@pytest.mark.slow
def test_from_a_prior_far_from_the_posterior() -> None:
    with torch.no_grad():
        found = annealed(scorer_of(GAUSSIAN, "prior"), CHAINS)
    assert found.reverse is None
    value = logsumexp(found.forward) - math.log(CHAINS)
    error = np.exp(found.forward - value).std(ddof=1) / math.sqrt(CHAINS)
    assert error < 0.2
    assert abs(value - GAUSSIAN.log_evidence) < 4 * error


def test_densities_and_gradients_along_the_path() -> None:
    path = _Path(scorer_of(BETA, "narrow"))
    u = torch.randn(7, 1)
    state = path.at(u)
    p = torch.special.expit(u.double().squeeze(1))
    jacobian = p.log() + (-p).log1p()
    q = dist.Beta(6.0, 18.0).log_prob(p)
    torch.testing.assert_close(state.log_q, q + jacobian, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state.log_w, dist.Binomial(10, p).log_prob(torch.tensor(2.0)) - q, rtol=1e-4, atol=1e-4)
    for beta in (0.3, 1.0):
        step = 1e-2
        ahead, behind = (path.at(u + sign * step).log_density(beta) for sign in (1, -1))
        torch.testing.assert_close(
            (ahead - behind) / (2 * step), state.gradient(beta).squeeze(1).double(), rtol=1e-2, atol=1e-2
        )


def test_an_autoguide_is_walked_in_its_own_vector() -> None:
    guide = AutoMultivariateNormal(REGRESSION.model, init_scale=0.5)
    guide()
    with torch.no_grad():
        found = annealed(Scorer(REGRESSION.model, guide, (), {}, 1000, False), CHAINS, REGRESSION.posterior(CHAINS))
    assert found.reverse is not None
    error = 4 / math.sqrt(CHAINS)
    assert found.forward.mean() - error * found.forward.std() <= REGRESSION.log_evidence
    assert found.reverse.mean() + error * found.reverse.std() >= REGRESSION.log_evidence


def test_what_cannot_be_annealed_is_named() -> None:
    def discrete() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.0))

    def discrete_guide() -> None:
        pyro.sample("z", dist.Bernoulli(0.3))

    def moving() -> None:
        a = pyro.sample("a", dist.Gamma(2.0, 2.0))
        pyro.sample("b", dist.Uniform(torch.zeros(()), a))

    for model, guide, message in ((discrete, discrete_guide, "'z' is discrete"), (moving, moving, "'b' depends")):
        with torch.no_grad(), pytest.raises(CannotAnneal, match=message):
            annealed(Scorer(model, guide, (), {}, 1000, False), CHAINS)
