"""Many short chains of Hamiltonian Monte Carlo, started at draws of the guide and run at once.

What the chains have in common, the metric and the step size, is learned from all of them, so that few iterations are
enough where it takes a single chain hundreds. Their agreement at the end shows whether they have forgotten the guide.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from pyro_elbo_ext.density import LogDensity

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]
Evaluation = Callable[[Tensor], tuple[Tensor, ...]]

ACCEPTANCE = 0.8  # mean probability that the step size is adapted to
WARMUP = (10, 10, 10, 20, 20, 40)  # iterations between changes of the metric
SHORT = 8  # leapfrog steps in the first rounds, before the metric is known
LONGEST = 32  # leapfrog steps at most, twice as many in the second attempt
ATTEMPTS = 2
THIN = 2  # iterations per draw kept, doubled in the second attempt
GRADIENTS = (2_000, 15_000)  # least and most batches of gradients computed, the warmup's included
NUMBERS = 5_000_000_000  # computed for these, from which on there are fewer than the most: half a minute or so
PER_COORDINATE = 10  # draws per coordinate that a full covariance needs
SMALLER, SMALLEST = 0.25, 0.03  # share of the steps that are smaller, and the smallest factor
COLUMNS = 256  # coordinates whose R-hat is computed at once: it takes several times the memory of their draws
CONVERGED = 1.05  # R-hat of all coordinates, below


class Chains(NamedTuple):
    """What the chains gave.

    Attributes
    ----------
    points : Tensor
        On unconstrained space, float64, shape ``(chain, draw, dim)``.
    rhat : ndarray
        Split R-hat of each coordinate, or of its distance from the median where that is larger, shape ``(dim,)``.
    acceptance : float
        Mean acceptance probability.
    """

    points: Tensor
    rhat: Array
    acceptance: float

    @property
    def converged(self) -> bool:
        """Whether all chains agree."""
        return bool(np.nanmax(self.rhat) < CONVERGED) and not bool(np.isnan(self.rhat).any())


class _State(NamedTuple):
    x: Tensor  # shape (chain, dim)
    value: Tensor  # log density, shape (chain,)
    gradient: Tensor


def run_chains(
    density: LogDensity, start: Tensor, num_draws: int, generator: torch.Generator, *, progress: bool = False
) -> Chains:
    r"""Draw from a density by Hamiltonian Monte Carlo in all chains at once.

    In the warmup the metric is the covariance over all chains and the latest iterations, or only the variances where there
    are too few draws for it, and chains that are hopelessly far out are put to others' places. Then metric and step size
    are fixed, which makes the chains independent of each other, and every `THIN`-th iteration is kept. If their R-hat is not
    below `CONVERGED` these too become warmup, and twice as many iterations of trajectories twice as long are tried.

    Parameters
    ----------
    density
        The target.
    start
        Where the chains start, float64, shape ``(chain, dim)``.
    num_draws
        Iterations kept of each chain.
    generator
        Source of all randomness.
    progress
        Show a progress bar.

    References
    ----------
    Duane, Kennedy, Pendleton, Roweth (1987), Hybrid Monte Carlo. Hoffman, Radul, Sountsov (2021), An adaptive-MCMC scheme
    for setting trajectory lengths in Hamiltonian Monte Carlo. Margossian, Hoffman, Sountsov, Riou-Durand, Vehtari,
    Gelman (2024), Nested R-hat: assessing the convergence of Markov chain Monte Carlo when running many short chains.
    """
    evaluate = _evaluation(density, len(start))
    state = _at(evaluate, start)
    if not torch.isfinite(state.value).any():
        raise ValueError("the model's log density is not finite at any of the starting points")
    least, most = GRADIENTS
    budget = min(max(NUMBERS // max(density.size * len(start), 1), least), most)
    walk = _Walk(density.dim, evaluate, generator, budget)
    with tqdm(total=sum(WARMUP) + THIN * num_draws, desc="chains", disable=not progress) as bar:
        walk.learn(state.x[torch.isfinite(state.value)])
        for number, length in enumerate(WARMUP):
            state = _rescued(state, generator)
            state, kept, _ = walk.go(
                state, length, bar, share=0.2 * length / sum(WARMUP), adapt=True, fixed=SHORT if number < 2 else None
            )
            walk.learn(kept[:, length // 2 :].flatten(0, 1))
        for attempt in range(ATTEMPTS):
            state, kept, acceptance = walk.go(
                state, num_draws, bar, share=0.25 * (1 + attempt), adapt=False, thin=THIN * 2**attempt
            )
            found = Chains(kept, split_rhat(kept.numpy()), acceptance)
            if found.converged or attempt == ATTEMPTS - 1:
                return found
            logger.info("chains disagree, R-hat %.2f: longer trajectories", np.nanmax(found.rhat))
            bar.total += num_draws * THIN * (2 + attempt) + WARMUP[-1]
            walk.stretch *= 2
            walk.learn(kept.flatten(0, 1))
            state, _, _ = walk.go(state, WARMUP[-1], bar, share=0.05, adapt=True)
    raise AssertionError("not reached")


class _Walk:
    """The chains' common metric and step size."""

    def __init__(self, dim: int, evaluate: Evaluation, generator: torch.Generator, budget: int) -> None:
        self.evaluate, self.generator, self.budget = evaluate, generator, budget
        self.step, self.stretch = 0.5, 1.0
        self.factor: Tensor = torch.ones(dim, dtype=torch.float64)

    def learn(self, draws: Tensor) -> None:
        """The metric from draws of shape ``(draw, dim)``: a Cholesky factor, or the sds where these are few."""
        sd = draws.std(0) if len(draws) > 1 else torch.ones_like(draws[0])
        sd = torch.where((sd > 0) & torch.isfinite(sd), sd, torch.ones_like(sd))
        self.factor = sd
        if len(draws) >= PER_COORDINATE * draws.shape[1]:
            # a little towards independence, for draws that have not spread out in all directions yet
            correlation = torch.atleast_2d(torch.corrcoef((draws / sd).T))
            shrunk = correlation + 1e-6 * torch.eye(len(sd), dtype=torch.float64)
            factor, failed = torch.linalg.cholesky_ex(shrunk)
            if not failed and torch.isfinite(factor).all():
                self.factor = sd[:, None] * factor

    def go(
        self,
        state: _State,
        length: int,
        bar: Any,
        *,
        share: float,
        adapt: bool,
        fixed: int | None = None,
        thin: int = 1,
    ) -> tuple[_State, Tensor, float]:
        """``length * thin`` iterations: the last state, draws of shape ``(chain, length, dim)``, mean acceptance.

        They take a ``share`` of the gradients that are to be computed, at most.
        """
        longest = max(2.0, min(LONGEST * self.stretch, share * self.budget / (length * thin)))
        kept, acceptances = state.x.new_empty(len(state.x), length, state.x.shape[1]), []
        for iteration in range(length * thin):
            jitter = 0.5 + float(torch.rand((), generator=self.generator, dtype=torch.float64))
            # a quarter of a period in the metric's coordinates makes the next draw independent of the last, where
            # the density is Gaussian
            quarter = min(self.stretch * 0.5 * math.pi / self.step, longest)
            steps = max(2, round(quarter * jitter)) if fixed is None else fixed
            state, acceptance = self._move(state, steps)
            if adapt:
                gain = 2.0 if fixed is not None else 1.0 / math.sqrt(1 + iteration)
                self.step = min(max(self.step * math.exp(gain * (acceptance - ACCEPTANCE)), 1e-6), 4.0)
            if (iteration + 1) % thin == 0:
                kept[:, iteration // thin] = state.x
            acceptances.append(acceptance)
            bar.update()
        return state, kept, float(np.mean(acceptances))

    def _out(self, v: Tensor) -> Tensor:
        return v * self.factor if self.factor.dim() == 1 else v @ self.factor.T

    def _back(self, gradient: Tensor) -> Tensor:
        return gradient * self.factor if self.factor.dim() == 1 else gradient @ self.factor

    def _move(self, state: _State, steps: int) -> tuple[_State, float]:
        shape, count = state.x.shape, len(state.x)
        momentum = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        # one step size does not suit all places: a chain where it is too large gets on by a smaller one
        chance, smaller = torch.rand((2, count, 1), generator=self.generator, dtype=torch.float64)
        step = self.step * torch.where(chance < SMALLER, SMALLEST**smaller, 1.0)
        energy = state.value - 0.5 * momentum.square().sum(1)
        new, lost = state, torch.zeros(count, dtype=torch.bool)
        force = self._back(state.gradient)
        for _ in range(steps):
            momentum = momentum + 0.5 * step * force
            # what has left the domain will not be accepted: no need to follow it
            x = torch.where(lost[:, None], state.x, new.x + step * self._out(momentum))
            new = _at(self.evaluate, x)
            lost = lost | ~torch.isfinite(new.value)
            force = self._back(new.gradient)
            momentum = momentum + 0.5 * step * force
        change = new.value - 0.5 * momentum.square().sum(1) - energy
        change = torch.where(lost, -math.inf, change)
        acceptance = change.exp().clamp(max=1.0).nan_to_num(0.0)
        chosen = torch.rand(count, generator=self.generator, dtype=torch.float64) < acceptance
        return (
            _State(
                *[torch.where(chosen.reshape(-1, *(1,) * (a.dim() - 1)), a, b) for a, b in zip(new, state, strict=True)]
            ),
            float(acceptance.mean()),
        )


def _evaluation(density: LogDensity, chains: int) -> Evaluation:
    """Log density and gradient at a point of each chain."""
    if not density.compiled:
        return density.for_batches(chains)

    def one_by_one(x: Tensor) -> tuple[Tensor, ...]:  # machine code takes one point at a time
        pairs = [density.value_and_grad(row) for row in x]
        return tuple(torch.stack(column) for column in zip(*pairs, strict=True))

    return one_by_one


def _at(evaluate: Evaluation, x: Tensor) -> _State:
    value, gradient = evaluate(x)
    value = value.nan_to_num(-math.inf, posinf=-math.inf)
    return _State(x, value, gradient.nan_to_num(0.0, posinf=0.0, neginf=0.0))


def _rescued(state: _State, generator: torch.Generator) -> _State:
    """Chains that are far below what chains at the posterior have are put where others are."""
    usual = torch.quantile(state.value, 0.75)
    lost = ~(state.value > usual - 10 * math.sqrt(state.x.shape[1]) - 20)
    if not lost.any() or lost.all():
        return state
    others = torch.nonzero(~lost)[:, 0]
    index = torch.arange(len(lost))
    index[lost] = others[torch.randint(len(others), (int(lost.sum()),), generator=generator)]
    return _State(*[tensor[index] for tensor in state])


def split_rhat(draws: Array) -> Array:
    """Split R-hat of draws of shape ``(chain, draw, n)``, of the values or of their distances from the median.

    Gelman et al. (2013), Bayesian Data Analysis; the distances, for chains of one place but different spread, are those of
    Vehtari, Gelman, Simpson, Carpenter, Bürkner (2021).
    """
    blocks = [_split_rhat(draws[..., i : i + COLUMNS]) for i in range(0, draws.shape[2], COLUMNS)]
    return np.concatenate(blocks) if blocks else np.empty(0)


def _split_rhat(draws: Array) -> Array:
    half = draws.shape[1] // 2
    halves = np.concatenate([draws[:, :half], draws[:, half : 2 * half]])
    folded = np.abs(halves - np.median(halves, axis=(0, 1)))
    found = []
    for values in (halves, folded):
        within = values.var(1, ddof=1).mean(0)
        between = values.mean(1).var(0, ddof=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            found.append(np.sqrt((half - 1) / half + between / within))
    return np.maximum(*found)
