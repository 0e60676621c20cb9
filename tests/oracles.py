"""Models and guides whose ELBO is known exactly as a function of the parameters.

Every parameter is a real scalar or vector ``pyro.param``; scales are ``exp`` and probabilities ``sigmoid`` or ``softmax``
of them. ``exact(params)`` is the ELBO in nats, differentiable, from Gaussian moments or by enumeration.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from torch import Tensor
from torch.nn.functional import logsigmoid

Params = dict[str, Tensor]
LOG_2PI = math.log(2 * math.pi)
X = torch.tensor(2.0)


@dataclass(frozen=True)
class Problem:
    """``methods`` is the expected kl_method of each latent or auxiliary site with kl='auto'."""

    name: str
    model: Callable[..., None]
    guide: Callable[..., object]
    params: Params
    exact: Callable[[Params], Tensor]
    methods: dict[str, str]
    draws: int = 400
    log_evidence: float | None = None
    extra: dict[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def t(*values: float) -> Tensor:
    return torch.tensor(values[0] if len(values) == 1 else values)


def param(name: str, params: Params) -> Tensor:
    return pyro.param(f"param_{name}", params[name].clone())


def cross_entropy_of_normal(
    mean: Tensor | float, variance: Tensor | float, loc: Tensor | float, scale: float
) -> Tensor:
    """``-E[log Normal(z; loc, scale)]`` for ``z`` with this mean and variance."""
    return 0.5 * LOG_2PI + math.log(scale) + (torch.as_tensor(mean - loc) ** 2 + variance) / (2 * scale**2)


def entropy_of_normal(log_scale: Tensor) -> Tensor:
    return 0.5 * (1 + LOG_2PI) + log_scale


# One Gaussian latent: z ~ N(0, 1), x ~ N(z, 0.5)


def _gaussian_model() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 0.5), obs=X)


GAUSSIAN: Params = {"m": t(0.3), "log_s": t(-0.4)}


def _gaussian_guide() -> None:
    pyro.sample("z", dist.Normal(param("m", GAUSSIAN), param("log_s", GAUSSIAN).exp()))


def _weighted_gaussian(p_weight: float, q_weight: float, x_weight: float = 1.0) -> Callable[[Params], Tensor]:
    def exact(params: Params) -> Tensor:
        m, log_s = params["m"], params["log_s"]
        variance = (2 * log_s).exp()
        return (
            -x_weight * cross_entropy_of_normal(m, variance, X, 0.5)
            - p_weight * cross_entropy_of_normal(m, variance, 0.0, 1.0)
            + q_weight * entropy_of_normal(log_s)
        )

    return exact


def _scaled(program: Callable[..., object], scale: float | Tensor) -> Callable[..., object]:
    return poutine.scale(program, scale=scale)


def _model_scaled_prior() -> None:
    with poutine.scale(scale=0.1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 0.5), obs=X)


def _model_masked_prior() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(False))
    pyro.sample("x", dist.Normal(z, 0.5), obs=X)


def _nonreparameterized_guide() -> None:
    pyro.sample("z", NonreparameterizedNormal(param("m", GAUSSIAN), param("log_s", GAUSSIAN).exp()))


# The same on the positive line: z = exp(u)


def _lognormal_model() -> None:
    z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z.log(), 0.5), obs=X)


def _lognormal_guide() -> None:
    pyro.sample("z", dist.LogNormal(param("m", GAUSSIAN), param("log_s", GAUSSIAN).exp()))


def _lognormal_model_scaled_prior() -> None:
    with poutine.scale(scale=0.1):
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z.log(), 0.5), obs=X)


def _exact_lognormal_scaled_prior(params: Params) -> Tensor:
    # log p and log q both have the Jacobian -u, which the scale of the model weighs differently
    return _weighted_gaussian(0.1, 1.0)(params) - 0.1 * params["m"] + params["m"]


# Two Gaussians: a ~ N(0, 1), b ~ N(a, 1), x ~ N(b, 1)


def _chain_model() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(a, 1.0))
    pyro.sample("x", dist.Normal(b, 1.0), obs=X)


FORWARD: Params = {"m": t(0.2), "log_s": t(-0.3), "slope": t(0.7), "shift": t(0.4), "log_r": t(-0.6)}


def _chain_forward_guide() -> None:
    a = pyro.sample("a", dist.Normal(param("m", FORWARD), param("log_s", FORWARD).exp()))
    loc = param("slope", FORWARD) * a + param("shift", FORWARD)
    pyro.sample("b", dist.Normal(loc, param("log_r", FORWARD).exp()))


def _chain_backward_guide() -> None:
    """b first, then a from b: the prior of b depends on a, which is drawn from b, so b has no analytic KL."""
    b = pyro.sample("b", dist.Normal(param("m", FORWARD), param("log_s", FORWARD).exp()))
    loc = param("slope", FORWARD) * b + param("shift", FORWARD)
    pyro.sample("a", dist.Normal(loc, param("log_r", FORWARD).exp()))


def _chain_moments(params: Params) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Means and variances of the first and second variable, and the variance of their difference."""
    m, log_s, slope, shift, log_r = (params[name] for name in ("m", "log_s", "slope", "shift", "log_r"))
    variance, noise = (2 * log_s).exp(), (2 * log_r).exp()
    return m, variance, slope * m + shift, slope**2 * variance + noise, (slope - 1) ** 2 * variance + noise


def _exact_chain(first_is_a: bool) -> Callable[[Params], Tensor]:
    def exact(params: Params) -> Tensor:
        mean_1, variance_1, mean_2, variance_2, variance_of_difference = _chain_moments(params)
        a, b = (
            ((mean_1, variance_1), (mean_2, variance_2)) if first_is_a else ((mean_2, variance_2), (mean_1, variance_1))
        )
        return (
            -cross_entropy_of_normal(*a, 0.0, 1.0)
            - cross_entropy_of_normal(mean_2 - mean_1, variance_of_difference, 0.0, 1.0)
            - cross_entropy_of_normal(*b, X, 1.0)
            + entropy_of_normal(params["log_s"])
            + entropy_of_normal(params["log_r"])
        )

    return exact


# Discrete: k ~ Categorical, b ~ Bernoulli given k, x ~ N(k + b, 1)

PRIOR_K = torch.tensor([0.5, 0.3, 0.2])
PRIOR_B = torch.tensor([0.2, 0.5, 0.7])
DISCRETE: Params = {"k": t(0.1, -0.5, 0.4), "b": t(0.3, -0.8, 1.1)}


def _discrete_model() -> None:
    k = pyro.sample("k", dist.Categorical(PRIOR_K))
    b = pyro.sample("b", dist.Bernoulli(PRIOR_B[k]))
    pyro.sample("x", dist.Normal(k + b, 1.0), obs=X)


def _discrete_guide() -> None:
    k = pyro.sample("k", dist.Categorical(logits=param("k", DISCRETE)))
    pyro.sample("b", dist.Bernoulli(logits=param("b", DISCRETE)[k]))


def _exact_discrete(params: Params) -> Tensor:
    log_q_k = params["k"].log_softmax(-1)
    total = torch.zeros(())
    for k in range(3):
        for b in (0, 1):
            log_q = log_q_k[k] + logsigmoid(params["b"][k] if b else -params["b"][k])
            log_p = PRIOR_K[k].log() + (PRIOR_B[k] if b else 1 - PRIOR_B[k]).log()
            log_p = log_p - cross_entropy_of_normal(t(float(k + b)), 0.0, X, 1.0)
            total = total + log_q.exp() * (log_p - log_q)
    return total


# Mixed: k ~ Bernoulli, z ~ N(k, 1), x ~ N(z, 0.5); the guide draws z given k

MIXED: Params = {"k": t(0.3), "m": t(0.5, 1.5), "log_s": t(-0.5, -0.2)}


def _mixed_model() -> None:
    k = pyro.sample("k", dist.Bernoulli(0.3))
    z = pyro.sample("z", dist.Normal(k, 1.0))
    pyro.sample("x", dist.Normal(z, 0.5), obs=X)


def _mixed_guide() -> None:
    k = pyro.sample("k", dist.Bernoulli(logits=param("k", MIXED)))
    i = k.long()
    pyro.sample("z", dist.Normal(param("m", MIXED)[i], param("log_s", MIXED)[i].exp()))


def _exact_mixed(params: Params, auxiliary: bool = False) -> Tensor:
    total = torch.zeros(())
    for k in (0, 1):
        log_q = logsigmoid(params["k"] if k else -params["k"])
        m, log_s = params["m"][k], params["log_s"][k]
        variance = (2 * log_s).exp()
        inner = (
            -cross_entropy_of_normal(m, variance, 0.0 if auxiliary else float(k), 1.0)
            - cross_entropy_of_normal(m, variance, X, 0.5)
            + entropy_of_normal(log_s)
            - log_q
        )
        if not auxiliary:
            inner = inner + math.log(0.3 if k else 0.7)
        total = total + log_q.exp() * inner
    return total


def _auxiliary_guide() -> None:
    """k is in the guide only: a mixture of two Gaussians with its index as an auxiliary variable."""
    k = pyro.sample("k", dist.Bernoulli(logits=param("k", MIXED)), infer={"is_auxiliary": True})
    i = k.long()
    pyro.sample("z", dist.Normal(param("m", MIXED)[i], param("log_s", MIXED)[i].exp()))


# Plates: w ~ N(0, 1); in a plate z_i ~ N(w, 1), x_i ~ N(z_i, 0.5)

DATA = torch.tensor([0.5, -1.0, 2.0, 1.5])
PLATED: Params = {"w": t(0.1), "log_w": t(-0.3), "z": t(0.4, -0.6, 1.0, 0.9), "log_z": t(-0.5, -0.4, -0.6, -0.2)}


def _plated_model(subsample_size: int | None = None, mask: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4, subsample_size=subsample_size) as i:
        z = pyro.sample("z", dist.Normal(w, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=DATA[i], obs_mask=mask)


def _plated_guide(subsample_size: int | None = None, mask: Tensor | None = None) -> None:
    pyro.sample("w", dist.Normal(param("w", PLATED), param("log_w", PLATED).exp()))
    with pyro.plate("data", 4, subsample_size=subsample_size) as i:
        pyro.sample("z", dist.Normal(param("z", PLATED)[i], param("log_z", PLATED)[i].exp()))


def _exact_plated(params: Params) -> Tensor:
    w, variance_w = params["w"], (2 * params["log_w"]).exp()
    z, variance_z = params["z"], (2 * params["log_z"]).exp()
    return (
        -cross_entropy_of_normal(w, variance_w, 0.0, 1.0)
        - cross_entropy_of_normal(z - w, variance_z + variance_w, 0.0, 1.0).sum()
        - cross_entropy_of_normal(z - DATA, variance_z, 0.0, 0.5).sum()
        + entropy_of_normal(params["log_w"])
        + entropy_of_normal(params["log_z"]).sum()
    )


# Learnable prior and a Delta guide


DELTA: Params = {"v": t(0.7), "prior": t(0.2)}


def _learnable_prior_model() -> None:
    z = pyro.sample("z", dist.Normal(param("prior", DELTA), 1.0))
    pyro.sample("x", dist.Normal(z, 0.5), obs=X)


def _delta_guide() -> None:
    pyro.sample("z", dist.Delta(param("v", DELTA)))


def _exact_delta(params: Params) -> Tensor:
    v = params["v"]
    return -cross_entropy_of_normal(v - params["prior"], 0.0, 0.0, 1.0) - cross_entropy_of_normal(v, 0.0, X, 0.5)


def gaussian_problems() -> list[Problem]:
    both = {"z": "analytic"}
    evidence = dist.Normal(0.0, 1.25**0.5).log_prob(X).item()
    return [
        Problem(
            "gaussian",
            _gaussian_model,
            _gaussian_guide,
            GAUSSIAN,
            _weighted_gaussian(1, 1),
            both,
            log_evidence=evidence,
        ),
        Problem("scaled prior", _model_scaled_prior, _gaussian_guide, GAUSSIAN, _weighted_gaussian(0.1, 1), both),
        Problem(
            "scaled guide", _gaussian_model, _scaled(_gaussian_guide, 0.1), GAUSSIAN, _weighted_gaussian(1, 0.1), both
        ),
        Problem(
            "scaled by different tensors",
            _scaled(_gaussian_model, torch.tensor(0.3)),
            _scaled(_gaussian_guide, torch.tensor(0.6)),
            GAUSSIAN,
            _weighted_gaussian(0.3, 0.6, 0.3),
            both,
        ),
        Problem("masked prior", _model_masked_prior, _gaussian_guide, GAUSSIAN, _weighted_gaussian(0, 1), both),
        Problem(
            "nonreparameterized",
            _gaussian_model,
            _nonreparameterized_guide,
            GAUSSIAN,
            _weighted_gaussian(1, 1),
            both,
            1500,
        ),
        Problem(
            "lognormal",
            _lognormal_model,
            _lognormal_guide,
            GAUSSIAN,
            _weighted_gaussian(1, 1),
            both,
            log_evidence=evidence,
        ),
        Problem(
            "lognormal scaled prior",
            _lognormal_model_scaled_prior,
            _lognormal_guide,
            GAUSSIAN,
            _exact_lognormal_scaled_prior,
            both,
        ),
        Problem("delta", _learnable_prior_model, _delta_guide, DELTA, _exact_delta, both, 2),
    ]


def structured_problems() -> list[Problem]:
    return [
        Problem(
            "chain, guide forward",
            _chain_model,
            _chain_forward_guide,
            FORWARD,
            _exact_chain(True),
            {"a": "analytic", "b": "analytic"},
        ),
        Problem(
            "chain, guide backward",
            _chain_model,
            _chain_backward_guide,
            FORWARD,
            _exact_chain(False),
            {"b": "sampled", "a": "analytic"},
            1000,
        ),
        Problem(
            "discrete",
            _discrete_model,
            _discrete_guide,
            DISCRETE,
            _exact_discrete,
            {"k": "analytic", "b": "analytic"},
            1500,
        ),
        Problem("mixed", _mixed_model, _mixed_guide, MIXED, _exact_mixed, {"k": "analytic", "z": "analytic"}, 1500),
        Problem(
            "auxiliary, discrete",
            _gaussian_model,
            _auxiliary_guide,
            MIXED,
            lambda params: _exact_mixed(params, auxiliary=True),
            {"k": "sampled", "z": "analytic"},
            1500,
        ),
        Problem("plated", _plated_model, _plated_guide, PLATED, _exact_plated, {"w": "analytic", "z": "analytic"}),
        Problem(
            "subsampled",
            lambda: _plated_model(2),
            lambda: _plated_guide(2),
            PLATED,
            _exact_plated,
            {"w": "analytic", "z": "analytic"},
            1000,
        ),
    ]


PROBLEMS = [*gaussian_problems(), *structured_problems()]
