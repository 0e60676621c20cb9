"""Score-function terms of the ELBO, each draw's score with the cost of its own plates alone.

The ELBO is a sum, and a term in other elements of a plate than a draw's does not depend on the draw: leaving it out of the
draw's cost leaves the gradient's mean and takes away noise (Ranganath, Gerrish and Blei 2014). Bounds that are not
linear allow that only for the plates that the bound is taken inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from pyro.infer.util import MultiFrameTensor
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

Stack = tuple[CondIndepStackFrame, ...]


class PlateScores(NamedTuple):
    """What one particle, or all in a particle plate, bring to the score-function terms.

    ``costs`` are the terms of the objective, detached, with their plates; ``scores`` the scores with theirs.
    """

    costs: list[tuple[Stack, Tensor]]
    scores: list[tuple[Stack, Tensor]]


def score_shares(particles: Sequence[PlateScores], num_vectorized: int | None) -> Tensor:
    """Each particle's share of ``mean_k sum_sites (cost_k - mean of the others' cost) score_k``, shape ``(K,)``.

    Parameters
    ----------
    particles
        One for each looped particle, or a single one with the particle as the leftmost dim of every tensor.
    num_vectorized
        Their number in the latter case, else None.
    """
    costs = [MultiFrameTensor(*particle.costs) for particle in particles]
    shares: list[Tensor] = []
    for scores in zip(*[particle.scores for particle in particles], strict=True):
        if num_vectorized is None:
            cost = torch.stack([costs[k].sum_to(stack) for k, (stack, _) in enumerate(scores)])
            score = torch.stack([score for _, score in scores])
        else:
            ((stack, score),) = scores
            cost = costs[0].sum_to(stack)
            cost = cost.expand(torch.broadcast_shapes(cost.shape, score.shape))
        count = len(score)
        centered = (cost - cost.mean(0)) / (count - 1) if count > 1 else cost
        product = centered * score if num_vectorized is not None else _aligned(centered, score)
        shares.append(product.flatten(1).sum(1) if product.dim() > 1 else product)
    return torch.stack(shares).sum(0)


def _aligned(cost: Tensor, score: Tensor) -> Tensor:
    """Product of two tensors with the particle in front and plates aligned from the right."""
    missing = score.dim() - cost.dim()
    if missing > 0:
        cost = cost.reshape(len(cost), *(1,) * missing, *cost.shape[1:])
    elif missing < 0:
        score = score.reshape(len(score), *(1,) * -missing, *score.shape[1:])
    return cost * score
