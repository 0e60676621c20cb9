"""Small problems whose bound of K particles, and its gradient, are known by enumeration and quadrature.

``outcomes(params)`` lists what one draw of the guide can come to: log weights and probabilities, each of shape (M,), where
continuous draws are Gauss-Hermite nodes. The bound of K particles is then a sum over all K-tuples of outcomes,
differentiable in the parameters.

The programs hold R copies of the problem in a plate, each with parameters of its own, so that one evaluation gives R
independent estimates of the bound and of its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.distributions.testing.rejection_gamma import RejectionGamma
from pyro.poutine.guide import GuideMessenger
from torch import Tensor

from pyro_elbo_ext.bounds.bounds import Bound

Params = dict[str, Tensor]
Outcomes = tuple[Tensor, Tensor]
X = torch.tensor(2.0)


@dataclass(frozen=True)
class Problem:
    """``scale`` is what the programs' scale multiplies the bound with."""

    name: str
    model: Callable[[int], None]
    guide: Callable[[int], None]
    params: dict[str, float]
    outcomes: Callable[[Params], Outcomes]
    scale: float = 1.0

    def __str__(self) -> str:
        return self.name

    def exact(self, bound: Bound, num_particles: int, params: Params) -> Tensor:
        """The bound of ``num_particles`` particles, apart from the scale."""
        log_weights, probabilities = self.outcomes(params)
        tuples = torch.cartesian_prod(*[torch.arange(len(log_weights))] * num_particles)
        tuples = tuples.reshape(-1, num_particles).T
        return (probabilities[tuples].prod(0) * bound.value(log_weights[tuples])).sum()


def replicated(name: str, value: float, replicates: int) -> Tensor:
    return pyro.param(f"param_{name}", torch.full((replicates,), value))


def hermite(count: int) -> tuple[Tensor, Tensor]:
    """Nodes and probabilities of a standard normal."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return torch.tensor(nodes), torch.tensor(weights / weights.sum())


def normal(loc: Tensor | float, scale: Tensor | float, value: Tensor) -> Tensor:
    return dist.Normal(torch.as_tensor(loc).double(), torch.as_tensor(scale).double(), validate_args=False).log_prob(
        value
    )


def bernoulli(logit: Tensor, value: Tensor) -> Tensor:
    return torch.nn.functional.logsigmoid(torch.where(value > 0, logit, -logit))


# One Gaussian: z ~ N(0, 1), x ~ N(z, 0.5)

GAUSSIAN = {"m": 0.9, "log_s": -0.5}


def _gaussian_model(replicates: int) -> None:
    with pyro.plate("copies", replicates):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=X.expand(replicates))


def _gaussian(replicates: int, family: Callable[..., dist.Distribution] = dist.Normal) -> None:
    with pyro.plate("copies", replicates):
        loc, scale = (
            replicated("m", GAUSSIAN["m"], replicates),
            replicated("log_s", GAUSSIAN["log_s"], replicates).exp(),
        )
        pyro.sample("z", family(loc, scale))


def _gaussian_outcomes(params: Params, tempering: float = 1.0) -> Outcomes:
    nodes, probabilities = hermite(60)
    z = params["m"] + params["log_s"].exp() * nodes
    log_p = normal(0.0, 1.0, z) + normal(z, 0.5, X.double())
    return tempering * log_p - normal(params["m"], params["log_s"].exp(), z), probabilities


def _scaled(program: Callable[[int], None], scale: float) -> Callable[[int], None]:
    return poutine.scale(program, scale=scale)


# The same through an auxiliary draw and a Delta, as autoguides do: z = exp(u)


def _lognormal_model(replicates: int) -> None:
    with pyro.plate("copies", replicates):
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.log(), 0.5), obs=X.expand(replicates))


def _lognormal_guide(replicates: int) -> None:
    with pyro.plate("copies", replicates):
        loc, scale = (
            replicated("m", GAUSSIAN["m"], replicates),
            replicated("log_s", GAUSSIAN["log_s"], replicates).exp(),
        )
        u = pyro.sample("u", dist.Normal(loc, scale), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(u.exp(), log_density=-u))


# The same as a flow made of a draw without parameters and a Delta that holds them


def _delta_flow_guide(replicates: int) -> None:
    with pyro.plate("copies", replicates):
        loc, log_scale = (replicated(name, GAUSSIAN[name], replicates) for name in ("m", "log_s"))
        u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(loc + log_scale.exp() * u, log_density=-log_scale))


# Discrete: k ~ Bernoulli(0.3), x ~ N(2 k, 1)


def _discrete_model(replicates: int) -> None:
    with pyro.plate("copies", replicates):
        k = pyro.sample("k", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(2 * k, 1.0), obs=X.expand(replicates))


def _discrete_guide(replicates: int) -> None:
    with pyro.plate("copies", replicates):
        pyro.sample("k", dist.Bernoulli(logits=replicated("k", 0.4, replicates)))


def _discrete_outcomes(params: Params) -> Outcomes:
    k = torch.tensor([0.0, 1.0]).double()
    log_q = bernoulli(params["k"], k)
    log_p = torch.tensor([0.7, 0.3]).double().log() + normal(2 * k, 1.0, X.double())
    return log_p - log_q, log_q.exp()


# Discrete, then continuous: k ~ Bernoulli(0.3), z ~ N(k, 1), x ~ N(z, 0.5)

MIXED = {"k": 0.3, "m0": 1.0, "m1": 1.5, "log_s": -0.6}


def _mixed_model(replicates: int) -> None:
    with pyro.plate("copies", replicates):
        k = pyro.sample("k", dist.Bernoulli(0.3))
        z = pyro.sample("z", dist.Normal(k, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=X.expand(replicates))


def _mixed_guide(replicates: int) -> None:
    with pyro.plate("copies", replicates):
        logit, m0, m1, log_s = (replicated(name, value, replicates) for name, value in MIXED.items())
        k = pyro.sample("k", dist.Bernoulli(logits=logit))
        pyro.sample("z", dist.Normal(torch.where(k > 0, m1, m0), log_s.exp()))


def _mixed_outcomes(params: Params) -> Outcomes:
    nodes, probabilities = hermite(40)
    log_weights, all_probabilities = [], []
    for k in (0.0, 1.0):
        log_q = bernoulli(params["k"], torch.tensor(k))
        loc, scale = params["m1" if k else "m0"], params["log_s"].exp()
        z = loc + scale * nodes
        log_p = float(np.log(0.3 if k else 0.7)) + normal(k, 1.0, z) + normal(z, 0.5, X.double())
        log_weights.append(log_p - log_q - normal(loc, scale, z))
        all_probabilities.append(log_q.exp() * probabilities)
    return torch.cat(log_weights), torch.cat(all_probabilities)


# Continuous, then discrete: the guide draws k given z, so the score of k has a path

REVERSED = {"m": 1.2, "log_s": -0.6, "slope": 0.8, "shift": -0.5}


def _reversed_guide(replicates: int) -> None:
    with pyro.plate("copies", replicates):
        m, log_s, slope, shift = (replicated(name, value, replicates) for name, value in REVERSED.items())
        z = pyro.sample("z", dist.Normal(m, log_s.exp()))
        pyro.sample("k", dist.Bernoulli(logits=slope * z + shift))


def _reversed_outcomes(params: Params) -> Outcomes:
    nodes, probabilities = hermite(40)
    scale = params["log_s"].exp()
    z = params["m"] + scale * nodes
    log_weights, all_probabilities = [], []
    for k in (0.0, 1.0):
        log_q = bernoulli(params["slope"] * z + params["shift"], torch.tensor(k))
        log_p = float(np.log(0.3 if k else 0.7)) + normal(k, 1.0, z) + normal(z, 0.5, X.double())
        log_weights.append(log_p - log_q - normal(params["m"], scale, z))
        all_probabilities.append(log_q.exp() * probabilities)
    return torch.cat(log_weights), torch.cat(all_probabilities)


# Hierarchical: a ~ N(0, 1), b ~ N(a, 1), x ~ N(b, 1), the guide draws b given a; the model has a parameter

CHAIN = {"m": 0.6, "log_s": -0.4, "slope": 0.7, "shift": 0.6, "log_r": -0.6, "prior": 0.3}


def _chain_model(replicates: int) -> None:
    with pyro.plate("copies", replicates):
        a = pyro.sample("a", dist.Normal(replicated("prior", CHAIN["prior"], replicates), 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(b, 1.0), obs=X.expand(replicates))


def _chain_guide(replicates: int) -> None:
    with pyro.plate("copies", replicates):
        m, log_s, slope, shift, log_r = (
            replicated(name, CHAIN[name], replicates) for name in ("m", "log_s", "slope", "shift", "log_r")
        )
        a = pyro.sample("a", dist.Normal(m, log_s.exp()))
        pyro.sample("b", dist.Normal(slope * a + shift, log_r.exp()))


def _chain_outcomes(params: Params) -> Outcomes:
    nodes, probabilities = hermite(16)
    first, second = (grid.flatten() for grid in torch.meshgrid(nodes, nodes, indexing="ij"))
    a = params["m"] + params["log_s"].exp() * first
    center = params["slope"] * a + params["shift"]
    b = center + params["log_r"].exp() * second
    log_p = normal(params["prior"], 1.0, a) + normal(a, 1.0, b) + normal(b, 1.0, X.double())
    log_q = normal(params["m"], params["log_s"].exp(), a) + normal(center, params["log_r"].exp(), b)
    return log_p - log_q, torch.outer(probabilities, probabilities).flatten()


class _ChainMessenger(GuideMessenger):
    """The same guide, run together with the model."""

    def get_posterior(self, name: str, prior: dist.TorchDistribution) -> dist.TorchDistribution:
        m, log_s, slope, shift, log_r = (
            replicated(key, CHAIN[key], len(prior.mean)) for key in ("m", "log_s", "slope", "shift", "log_r")
        )
        if name == "a":
            return dist.Normal(m, log_s.exp())
        return dist.Normal(slope * self.upstream_value("a") + shift, log_r.exp())


# A draw beside a point mass: t is a Delta at a parameter

POINT = {"m": 0.9, "log_s": -0.4, "v": 0.5}


def _point_model(replicates: int) -> None:
    with pyro.plate("copies", replicates):
        t = pyro.sample("t", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Normal(t, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=X.expand(replicates))


def _point_guide(replicates: int) -> None:
    with pyro.plate("copies", replicates):
        m, log_s, v = (replicated(name, value, replicates) for name, value in POINT.items())
        pyro.sample("t", dist.Delta(v))
        pyro.sample("z", dist.Normal(m, log_s.exp()))


def _point_outcomes(params: Params) -> Outcomes:
    nodes, probabilities = hermite(60)
    z = params["m"] + params["log_s"].exp() * nodes
    log_p = normal(0.0, 1.0, params["v"]) + normal(params["v"], 1.0, z) + normal(z, 0.5, X.double())
    return log_p - normal(params["m"], params["log_s"].exp(), z), probabilities


# A draw by rejection, whose path is incomplete: z ~ Gamma(2, 1), x ~ N(z, 1)


def _gamma_model(replicates: int) -> None:
    with pyro.plate("copies", replicates):
        z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=X.expand(replicates))


def _gamma_guide(replicates: int) -> None:
    with pyro.plate("copies", replicates):
        concentration = replicated("log_c", 1.2, replicates).exp()
        pyro.sample("z", RejectionGamma(concentration, 2.0 * torch.ones(replicates)))


def _gamma_outcomes(params: Params) -> Outcomes:
    width = 0.02
    z = torch.arange(width / 2, 12.0, width).double()
    log_q = torch.distributions.Gamma(params["log_c"].exp(), torch.tensor(2.0).double()).log_prob(z)
    log_p = torch.distributions.Gamma(torch.tensor(2.0).double(), torch.tensor(1.0).double()).log_prob(z)
    return log_p + normal(z, 1.0, X.double()) - log_q, log_q.exp() * width


PROBLEMS = [
    Problem("gaussian", _gaussian_model, _gaussian, GAUSSIAN, _gaussian_outcomes),
    Problem("auxiliary and Delta", _lognormal_model, _lognormal_guide, GAUSSIAN, _gaussian_outcomes),
    Problem("parameters in a Delta", _gaussian_model, _delta_flow_guide, GAUSSIAN, _gaussian_outcomes),
    Problem(
        "no reparameterization",
        _gaussian_model,
        lambda replicates: _gaussian(replicates, NonreparameterizedNormal),
        GAUSSIAN,
        _gaussian_outcomes,
    ),
    Problem("scaled", _scaled(_gaussian_model, 0.3), _scaled(_gaussian, 0.3), GAUSSIAN, _gaussian_outcomes, scale=0.3),
    Problem(
        "tempered",
        _scaled(_gaussian_model, 0.5),
        _gaussian,
        GAUSSIAN,
        lambda params: _gaussian_outcomes(params, tempering=0.5),
    ),
    Problem("discrete", _discrete_model, _discrete_guide, {"k": 0.4}, _discrete_outcomes),
    Problem("discrete, then continuous", _mixed_model, _mixed_guide, MIXED, _mixed_outcomes),
    Problem("continuous, then discrete", _mixed_model, _reversed_guide, REVERSED, _reversed_outcomes),
    Problem("hierarchical", _chain_model, _chain_guide, CHAIN, _chain_outcomes),
    Problem("hierarchical, in one run", _chain_model, _ChainMessenger(_chain_model), CHAIN, _chain_outcomes),
    Problem("point mass", _point_model, _point_guide, POINT, _point_outcomes),
    Problem("rejection", _gamma_model, _gamma_guide, {"log_c": 1.2}, _gamma_outcomes),
]
