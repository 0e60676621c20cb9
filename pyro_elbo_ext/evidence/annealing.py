r"""Annealed importance sampling from the guide to the posterior.

The path is that of Neal (2001), :math:`\pi_b \propto q\, w^b` with :math:`w = p(x, z) / q(z)`, from the guide at b = 0 to
the posterior at b = 1. It is walked in the space of the guide's own draws, mapped to unconstrained reals: an autoguide's
auxiliary vector, or the latent sites themselves. One run of guide and model on all chains at once gives both densities
at the same points, whatever the guide's way from its draws to the sites.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Transform
from torch.distributions.constraints import Constraint, independent
from tqdm import tqdm

from pyro_elbo_ext.evidence.scores import Array
from pyro_elbo_ext.evidence.scoring import Scorer
from pyro_elbo_ext.inference_data.draws import to_numpy
from pyro_elbo_ext.particles.supply import CannotBatch
from pyro_elbo_ext.programs.densities import log_prob, score_parts
from pyro_elbo_ext.programs.nodes import is_random
from pyro_elbo_ext.programs.running import trace_program
from pyro_elbo_ext.terms.folding import transform_of
from pyro_elbo_ext.terms.terms import read_sites

LEAPFROG = 5  # steps of a trajectory
ADAPTATION = 4  # trajectories per temperature of the pilot run, in which the step size is adapted
ACCEPTANCE = 0.8  # that it is adapted to
CONDITIONAL_ESS = 0.9  # of the chains, from one temperature of the pilot to the next
VARIANCE = 0.15  # of the log weights, that the temperatures are made close enough for
PILOT_TEMPERATURES = 200
TEMPERATURES = 600  # at most


class CannotAnneal(Exception):
    """Annealed importance sampling is not possible for this model and guide; the message says why."""


class Annealed(NamedTuple):
    """What annealed importance sampling found.

    Attributes
    ----------
    forward : ndarray
        Log weights of the chains from the guide to the posterior, shape ``(chains,)``: ``E[exp(forward)] = p(x)``.
    reverse : ndarray or None
        Of the chains from posterior draws to the guide: ``E[exp(-reverse)] = 1 / p(x)``.
    temperatures : ndarray
        From 0 to 1.
    acceptance : float
        Mean acceptance probability.
    """

    forward: Array
    reverse: Array | None
    temperatures: Array
    acceptance: float


class _State(NamedTuple):
    """Chains at ``u``, shape ``(chains, dim)``, with the log densities there and the gradients of both."""

    u: Tensor
    log_q: Tensor  # of u, under the guide
    log_w: Tensor
    grad_q: Tensor
    grad_w: Tensor

    def log_density(self, beta: float) -> Tensor:
        return self.log_q + beta * self.log_w

    def gradient(self, beta: float) -> Tensor:
        return self.grad_q + beta * self.grad_w

    def where(self, chosen: Tensor, other: _State) -> _State:
        return _State(
            *[torch.where(chosen.reshape(-1, *(1,) * (a.dim() - 1)), a, b) for a, b in zip(self, other, strict=True)]
        )

    def take(self, index: Tensor) -> _State:
        return _State(*[tensor[index] for tensor in self])


def annealed(
    scorer: Scorer, num_chains: int, posterior: dict[str, Tensor] | None = None, *, progress: bool = False
) -> Annealed:
    """Annealed importance sampling with Hamiltonian transitions, and in reverse if there are posterior draws.

    A pilot run, which resamples, finds temperatures, step sizes and scales; the run that counts starts from new draws with
    all of them fixed, so that its weights are unbiased.

    Parameters
    ----------
    num_chains
        Chains each way, run at once.
    posterior
        Latent site to draws, shape ``(chains, *plates, *event)``, exact ones for the reverse weights to be unbiased.

    Raises
    ------
    CannotAnneal
        For discrete sites, supports that depend on draws, or programs that cannot be run on all chains at once.

    References
    ----------
    Neal (2001), Annealed importance sampling. Grosse, Ghahramani, Adams (2015), Sandwiching the marginal likelihood using
    bidirectional Monte Carlo. Zhou, Johansen, Aston (2016), Toward automatic model comparison, for temperatures by the
    conditional effective sample size.
    """
    path = _Path(scorer)
    plan, scales, steps = _pilot(path, num_chains, progress)
    forward, accepted = _walk(path, path.start(num_chains), plan, scales, steps, progress, reverse=False)
    reverse = None
    if posterior is not None:
        there = path.at(path.unconstrained(scorer.guide_values(posterior)))
        reverse, _ = _walk(path, there, plan, scales, steps, progress, reverse=True)
    return Annealed(forward, reverse, np.array(plan), accepted)


@dataclass(slots=True)
class _Site:
    name: str
    start: int
    stop: int
    shape: torch.Size  # unconstrained
    value_shape: torch.Size
    transform: Transform


class _Path:
    """The densities along the path, at flat unconstrained points."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.sites: list[_Site] = []
        start = 0
        for name, node in scorer.reference[1].nodes.items():
            if not is_random(node):
                continue
            if node["fn"].support.is_discrete:
                raise CannotAnneal(f"guide site '{name}' is discrete: Hamiltonian transitions need gradients")
            transform = transform_of(node)
            value = node["value"]
            shape = transform.inverse_shape(value.shape)
            self.sites.append(_Site(name, start, start + shape.numel(), shape, value.shape, transform))
            start += shape.numel()
        self.dim = start
        self._check_supports()

    def _check_supports(self) -> None:
        """A support that moves with another draw would be cut off where it was in the reference run."""
        scorer = self.scorer
        # the reference run used the random numbers that the first of these uses again
        _, again = (trace_program(scorer.guide, scorer.args, scorer.kwargs) for _ in range(2))
        for site in self.sites:
            before, after = (
                [
                    end
                    for end in vars(_innermost(trace.nodes[site.name]["fn"].support)).values()
                    if isinstance(end, Tensor)
                ]
                for trace in (scorer.reference[1], again)
            )
            if any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)):
                raise CannotAnneal(f"the support of guide site '{site.name}' depends on another draw")

    def start(self, count: int) -> _State:
        """New draws of the guide."""
        guide_trace = self.scorer.draw_batch(count)
        if guide_trace is None:
            raise CannotAnneal(f"model and guide cannot be run on all chains at once, since {self.scorer.looped}")
        return self.at(self.unconstrained({site.name: guide_trace.nodes[site.name]["value"] for site in self.sites}))

    def unconstrained(self, values: dict[str, Tensor]) -> Tensor:
        """Flat points of values of the guide's random sites, shape ``(chains, dim)``."""
        parts = []
        for site in self.sites:
            value = values[site.name]
            u = site.transform.inv(value.reshape(len(value), *site.value_shape))
            parts.append(u.reshape(len(u), u[0].numel()))
        return torch.cat(parts, 1)

    def at(self, u: Tensor) -> _State:
        """Densities and gradients at ``u``, shape ``(chains, dim)``."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            log_q, log_w = self._densities(u)
            (grad_q,) = torch.autograd.grad(log_q.sum(), u, retain_graph=True)
            (grad_w,) = torch.autograd.grad(log_w.sum(), u)
        # a chain outside the model's support has no slope there, and will not be accepted
        return _State(u.detach(), log_q.detach().double(), log_w.detach().double(), grad_q, grad_w.nan_to_num(0.0))

    def _densities(self, u: Tensor) -> tuple[Tensor, Tensor]:
        count = len(u)
        values, jacobian = {}, u.new_zeros(count)
        for site in self.sites:
            own = u[:, site.start : site.stop].reshape(count, *site.shape)
            values[site.name] = site.transform(own)
            log_det = site.transform.log_abs_det_jacobian(own, values[site.name])
            jacobian = jacobian + _by_chain(log_det)
        try:
            model_trace, guide_trace = self.scorer.run(values, count)
        except CannotBatch as error:
            raise CannotAnneal(f"model and guide cannot be run on all chains at once, since {error}") from error
        log_q, log_w = jacobian, u.new_zeros(count)
        for pair in read_sites(model_trace, guide_trace):
            if pair.p is not None:
                log_w = log_w + _by_chain(log_prob(pair.p, model_trace))
            for node in pair.q:
                density = _by_chain(score_parts(node, guide_trace).log_prob)
                log_w = log_w - density
                if node["name"] in values:
                    log_q = log_q + density
        return log_q, log_w


def _pilot(path: _Path, num_chains: int, progress: bool) -> tuple[list[float], list[Tensor], list[float]]:
    """Temperatures from 0 to 1, and for each of them the scale of every coordinate and the step size.

    A sequential Monte Carlo sampler: temperatures are so close that the weights from one to the next leave most chains
    effective, chains are resampled and moved, and the step size is adapted in doing so.
    """
    state = path.start(num_chains)
    betas, step = [0.0], 1.0
    scales, steps = [_scale(state.u)], [step]
    with tqdm(desc="annealing, pilot", disable=not progress) as bar:
        while betas[-1] < 1:
            beta = _next(betas[-1], to_numpy(state.log_w))
            if len(betas) >= PILOT_TEMPERATURES:
                beta = 1.0
            increments = (beta - betas[-1]) * state.log_w
            state = state.take(_resampled(torch.softmax(increments, 0)))
            scale = _scale(state.u)
            for _ in range(ADAPTATION):
                state, acceptance = _move(path, state, beta, scale, step)
                step = min(max(step * math.exp(2 * (acceptance - ACCEPTANCE)), 1e-3), 2.0)
            betas.append(beta)
            scales.append(_scale(state.u))
            steps.append(step)
            bar.update()
    # n temperatures further apart than that would have n times this variance in all; divided by as much as is needed
    variance = (len(betas) - 1) * (1 / CONDITIONAL_ESS - 1)
    parts = max(1, min(math.ceil(variance / VARIANCE), TEMPERATURES // len(betas)))
    plan, fine_scales, fine_steps = [0.0], [scales[0]], [steps[0]]
    for i in range(1, len(betas)):
        for part in range(1, parts + 1):
            at = part / parts
            plan.append(betas[i - 1] + at * (betas[i] - betas[i - 1]) if part < parts else betas[i])
            fine_scales.append(scales[i - 1] ** (1 - at) * scales[i] ** at)
            fine_steps.append(steps[i - 1] ** (1 - at) * steps[i] ** at)
    return plan, fine_scales, fine_steps


def _next(beta: float, log_w: Array) -> float:
    """The temperature to which the conditional effective sample size falls to its share of the chains."""

    def share(to: float) -> float:
        scaled = (to - beta) * log_w
        weights = np.exp(scaled - scaled.max())
        return float(weights.mean() ** 2 / np.square(weights).mean())

    if share(1.0) >= CONDITIONAL_ESS:
        return 1.0
    low, high = beta, 1.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if share(middle) >= CONDITIONAL_ESS else (low, middle)
    return high


def _walk(
    path: _Path,
    state: _State,
    plan: list[float],
    scales: list[Tensor],
    steps: list[float],
    progress: bool,
    *,
    reverse: bool,
) -> tuple[Array, float]:
    """Log weights of the chains along the temperatures, or back along them; and the mean acceptance probability."""
    total = torch.zeros_like(state.log_w)
    accepted = []
    order = range(len(plan) - 1, 0, -1) if reverse else range(1, len(plan))
    name = "annealing, reverse" if reverse else "annealing"
    for i in tqdm(order, desc=name, disable=not progress):
        total = total + (plan[i] - plan[i - 1]) * state.log_w
        to = i - 1 if reverse else i
        if 0 < to < len(plan) - 1:
            state, acceptance = _move(path, state, plan[to], scales[to], steps[to])
            accepted.append(acceptance)
    return to_numpy(total), float(np.mean(accepted)) if accepted else 1.0


def _move(path: _Path, state: _State, beta: float, scale: Tensor, step: float) -> tuple[_State, float]:
    """One trajectory of Hamiltonian Monte Carlo per chain, which leaves ``q w^beta`` invariant."""
    momentum = torch.randn_like(state.u)
    energy = state.log_density(beta) - 0.5 * momentum.double().square().sum(1)
    new = state
    for _ in range(LEAPFROG):
        momentum = momentum + 0.5 * step * scale * new.gradient(beta)
        new = path.at(new.u + step * scale * momentum)
        momentum = momentum + 0.5 * step * scale * new.gradient(beta)
    change = new.log_density(beta) - 0.5 * momentum.double().square().sum(1) - energy
    # from outside the support to inside is accepted, from anywhere to where there is no density is not
    acceptance = change.exp().clamp(max=1.0).nan_to_num(0.0)
    chosen = torch.rand_like(acceptance) < acceptance
    return new.where(chosen, state), float(acceptance.mean())


def _scale(u: Tensor) -> Tensor:
    """Standard deviation of each coordinate over the chains, shape ``(dim,)``."""
    spread = u.std(0)
    return torch.where(spread > 0, spread, torch.ones_like(spread))


def _resampled(weights: Tensor) -> Tensor:
    """Systematic resampling: which chain each goes on from."""
    count = len(weights)
    points = (torch.arange(count, device=weights.device) + torch.rand((), device=weights.device)) / count
    return torch.searchsorted(weights.cumsum(0), points.to(weights.dtype)).clamp(max=count - 1)


def _by_chain(density: Tensor) -> Tensor:
    return density.flatten(1).sum(1) if density.dim() > 1 else density


def _innermost(support: Constraint) -> Any:
    while isinstance(support, independent):
        support = support.base_constraint
    return support
