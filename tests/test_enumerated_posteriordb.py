"""Two posteriors of posteriordb with their discrete sites written out: the states, and Stan's draws of all the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import posteriordb_models as db
import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.typing import NDArray
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, init_to_value
from torch import Tensor

from pyro_elbo_ext import DecomposedELBO, fit, run_nuts
from pyro_elbo_ext.terms.enumeration.at_draws import AtDraws
from pyro_elbo_ext.terms.enumeration.posterior_draws import draw_states, state_probabilities

pytestmark = pytest.mark.skipif(not db.FOLDER.is_dir(), reason="reference posteriors are not here")
PARALLEL = {"enumerate": "parallel"}


def gauss_mix(data: dict[str, Any]) -> None:
    mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.ordered_vector, (), (2,)))
    pyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum())
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    with pyro.plate("observation", len(data["y"])):
        z = pyro.sample("z", dist.Categorical(torch.stack([theta, 1 - theta])), infer=PARALLEL)
        pyro.sample("y", dist.Normal(mu[z], sigma[z]), obs=db.column(data, "y"))


def hmm(data: dict[str, Any]) -> None:
    """The first state's weights are 1 each in Stan's program: the same but for a constant as 1/2 each."""
    flat = torch.ones(2, dtype=torch.float64)
    table = torch.stack([pyro.sample(f"theta{k}", dist.Dirichlet(flat)) for k in (1, 2)])
    mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.positive_ordered_vector, (), (2,)))
    pyro.factor("mu_prior", dist.Normal(torch.tensor([3.0, 10.0], dtype=torch.float64), 1.0).log_prob(mu).sum())
    state: Any = None
    for t, y in pyro.markov(enumerate(db.column(data, "y"))):
        state = pyro.sample(f"state_{t}", dist.Categorical(flat / 2 if state is None else table[state]), infer=PARALLEL)
        pyro.sample(f"y_{t}", dist.Normal(mu[state], 1.0), obs=y)


MODELS: dict[str, Callable[[dict[str, Any]], None]] = {
    "low_dim_gauss_mix-low_dim_gauss_mix": gauss_mix,
    "hmm_example-hmm_example": hmm,
}


def site_draws(name: str, reference: dict[str, NDArray[np.float64]], count: int) -> dict[str, Tensor]:
    """``count`` of Stan's draws by site."""
    sites: dict[str, list[NDArray[np.float64]]] = {}
    for key in sorted(reference):
        sites.setdefault(key.partition("[")[0], []).append(reference[key].reshape(-1)[:: 10_000 // count][:count])
    return {site: torch.tensor(np.stack(of, -1) if len(of) > 1 else of[0]) for site, of in sites.items()}


def smoothed(name: str, data: dict[str, Any], at: dict[str, Tensor]) -> NDArray[np.float64]:
    """Probabilities of the states by Bayes' rule, or forward and backward; shape (draw, datum, 2)."""
    y = np.array(data["y"])[None, :, None]
    mu = at["mu"].numpy()[:, None]
    if "mix" in name:
        theta, sigma = at["theta"].numpy()[:, None], at["sigma"].numpy()[:, None]
        weights = np.stack([theta, 1 - theta], -1) * np.exp(-0.5 * ((y - mu) / sigma) ** 2) / sigma
        return weights / weights.sum(-1, keepdims=True)
    likelihood = np.exp(-0.5 * (y - mu) ** 2)
    table = np.stack([at["theta1"].numpy(), at["theta2"].numpy()], 1)
    forward, backward = np.empty_like(likelihood), np.ones_like(likelihood)
    steps = likelihood.shape[1]
    for t in range(steps):
        before = np.ones_like(likelihood[:, 0]) if t == 0 else np.einsum("si,sij->sj", forward[:, t - 1], table)
        forward[:, t] = before * likelihood[:, t]
        forward[:, t] /= forward[:, t].sum(-1, keepdims=True)
    for t in range(steps - 2, -1, -1):
        backward[:, t] = np.einsum("sij,sj->si", table, likelihood[:, t + 1] * backward[:, t + 1])
        backward[:, t] /= backward[:, t].sum(-1, keepdims=True)
    weights = forward * backward
    return weights / weights.sum(-1, keepdims=True)


def by_datum(name: str, of: dict[str, Any]) -> Any:
    """Of sites "state_0", "state_1", ... one array with the data along axis -1."""
    return of["z"] if "mix" in name else np.stack([np.asarray(of[f"state_{t}"]) for t in range(len(of))], -1)


@pytest.mark.parametrize("name", MODELS)
def test_states_are_those_of_exact_smoothing(name: str) -> None:
    data, reference = db.load(name)
    at = site_draws(name, reference, 20)
    exact = smoothed(name, data, at)

    found = state_probabilities(AtDraws(MODELS[name], (data,), {}, at))
    probabilities = np.stack([found["z"]]) if "mix" in name else np.stack([found[f"state_{t}"] for t in range(100)])
    np.testing.assert_allclose(probabilities.reshape(exact.shape[1:]), exact.mean(0), atol=1e-10)

    one = {site: draws[0] for site, draws in at.items()}
    guide = AutoDelta(poutine.block(MODELS[name], expose=list(one)), init_loc_fn=init_to_value(values=one))
    marginals = DecomposedELBO(max_plate_nesting=1).marginals(MODELS[name], guide, data)
    if "mix" in name:
        of_one = marginals["z"].transpose(..., "z_state").values
    else:
        of_one = np.stack([marginals[f"state_{t}"].values for t in range(100)])
    np.testing.assert_allclose(of_one, exact[0], atol=1e-6)  # AutoDelta's parameters go to unconstrained space and back

    many = {site: draws[:1].expand(4000, *draws.shape[1:]) for site, draws in at.items()}
    torch.manual_seed(0)
    drawn = by_datum(name, draw_states(AtDraws(MODELS[name], (data,), {}, many)))
    errors = np.sqrt(exact[0, :, 1] * (1 - exact[0, :, 1]) / 4000) + 1e-4
    assert np.abs((np.asarray(drawn).mean(0) - exact[0, :, 1]) / errors).max() < 4.5


def largest(values: Any, reference: dict[str, NDArray[np.float64]]) -> tuple[float, float]:
    """Largest |difference in mean| in sds of the reference, and |log sd ratio|, of all scalars."""
    pairs = [(db.scalar(values, key), ref) for key, ref in reference.items()]
    means = [abs(ours.mean() - ref.mean()) / ref.std() for ours, ref in pairs]
    return max(means), max(abs(np.log(ours.std() / ref.std())) for ours, ref in pairs)


def states_agree(name: str, reference: dict[str, NDArray[np.float64]], draws: Any, count: int) -> bool:
    """Whether the probabilities of the states are those of exact smoothing at Stan's draws, ``count`` draws counting."""
    data, _ = db.load(name)
    exact = smoothed(name, data, site_draws(name, reference, 1000))[..., 1].mean(0)
    sites = ["z"] if "mix" in name else [f"state_{t}" for t in range(100)]
    chances = np.concatenate([np.atleast_1d(draws[site].mean(("chain", "draw"))) for site in sites])
    # near 1/2 they go with mu: the noise of the states is not all
    return bool(np.abs(chances - exact).max() < 4.5 * 0.5 / np.sqrt(count) + 0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_fit_agrees_with_the_reference(name: str) -> None:
    data, reference = db.load(name)
    result = fit(MODELS[name], "auto", data, seed=0, progress=False)
    options = {"prior": False, "posterior_predictive": False, "log_likelihood": False}
    posterior = result.to_arviz(num_samples=4000, seed=1, **options).posterior
    mean, log_sd = largest(posterior, reference)
    print(f"\n{name}: {mean:.3f} {log_sd:.3f}")
    assert mean < 0.06
    assert log_sd < 0.1
    assert states_agree(name, reference, posterior, 4000)
    if "mix" in name:  # of the chain it takes minutes: each gradient goes through a loop of 100 steps
        assert result.diagnose(seed=1).verdict == "good"


@pytest.mark.slow
def test_nuts_agrees_with_the_reference() -> None:
    name = "low_dim_gauss_mix-low_dim_gauss_mix"
    data, reference = db.load(name)
    found = run_nuts(MODELS[name], data, num_samples=500, warmup=300, chains=2, seed=1, progress=False).posterior
    mean, log_sd = largest(found, reference)
    assert mean < 0.2  # 1000 draws, of which 500 and more count: 4.5 standard errors
    assert log_sd < 0.15
    assert states_agree(name, reference, found, 500)
