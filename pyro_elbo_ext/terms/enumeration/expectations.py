"""Expectations under the guide: exact over what it enumerates, by draws over the rest.

The weights are those of Pyro's :class:`~pyro.infer.util.Dice`: the probability of each enumerated value given those
upstream, times factors of value 1 whose gradient is the score function's (Foerster et al. 2018, "DiCE").
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from opt_einsum import shared_intermediates
from pyro.distributions.util import is_identically_zero
from pyro.infer.util import compute_site_dice_factor
from pyro.ops.einsum.adjoint import require_backward
from pyro.ops.rings import MarginalRing
from pyro.poutine import Trace
from torch import Tensor

from pyro_elbo_ext.terms.packing import Ordinal, broadcast, dims_of, named, summed_to


class GuideWeights:
    """The weights of the guide's draws and enumerated values, which give the expectation of each cost by itself."""

    def __init__(self, guide_trace: Trace, ordering: Mapping[str, Ordinal]) -> None:
        self._factors: list[tuple[str, Ordinal, Tensor]] = []  # log weights
        self._counts: list[
            tuple[Ordinal, float]
        ] = []  # log of how often a sequential enumeration repeats what is elsewhere
        self._shared: dict[object, object] = {}  # intermediate results of the sums
        self._joint: dict[tuple[Ordinal, frozenset[str]], Tensor] = {}
        for name, node in guide_trace.nodes.items():
            if node["type"] == "sample":
                factor, count = compute_site_dice_factor(node)
                if not is_identically_zero(factor):
                    self._factors.append((name, ordering[name], factor))
                if count:
                    self._counts.append((ordering[name], count))

    def expected(self, ordinal: Ordinal, costs: Sequence[Tensor], without: str | None = None) -> list[Tensor]:
        """Expectation of each cost at this ordinal.

        Parameters
        ----------
        costs
            Packed.
        without
            A guide site that the costs do not depend on, though they are in its plates: its score then adds no noise to
            their gradient.

        Returns
        -------
        list of Tensor
            Packed, with the dims of those of the ordinal's plates that the cost has.
        """
        scale = math.exp(-sum([count for at, count in self._counts if not at <= ordinal]))
        log_weights = [factor for name, at, factor in self._factors if at <= ordinal and name != without]
        if not log_weights:
            return [summed_to(_scaled(cost, scale), ordinal) for cost in costs]
        probabilities = self._probabilities(ordinal, costs, log_weights)
        expected = []
        for cost in costs:
            weight, cost = broadcast(probabilities[frozenset(dims_of(cost))], cost)
            # what has no weight does not count, though its density may be 0
            product = weight * cost.masked_fill(weight.detach() == 0, 0.0)
            expected.append(summed_to(_scaled(named(product, dims_of(cost)), scale), ordinal))
        return expected

    def _probabilities(
        self, ordinal: Ordinal, costs: Sequence[Tensor], log_weights: list[Tensor]
    ) -> dict[frozenset[str], Tensor]:
        """The joint probability of the dims of each cost: the gradient of a log sum, by Pyro's own backward pass."""
        queries: dict[frozenset[str], Tensor] = {}
        wanted = {frozenset(dims_of(cost)): cost for cost in costs}
        for log_weight in log_weights:
            key = frozenset(dims_of(log_weight))
            if key in wanted:
                queries.setdefault(key, log_weight)
        for key, cost in wanted.items():
            if key not in queries:
                queries[key] = named(torch.zeros_like(cost), dims_of(cost))
                log_weights.append(queries[key])
        with shared_intermediates(self._shared) as cache:
            ring = MarginalRing(cache=cache)
            for query in queries.values():
                require_backward(query)
            summed = {dim for term in log_weights for dim in dims_of(term)} - ordinal
            ring.sumproduct(log_weights, summed)._pyro_backward()
        results = {key: (query, query._pyro_backward_result) for key, query in queries.items()}  # type: ignore[attr-defined]
        found = {key: named(log_probability.exp(), dims_of(query)) for key, (query, log_probability) in results.items()}
        self._joint.update({(ordinal, key): found[key] for key in found})
        return found

    def joint(self, ordinal: Ordinal, cost: Tensor) -> Tensor:
        """The probability of the values that a cost has had the expectation taken over, detached; packed."""
        probability = self._joint[ordinal, frozenset(dims_of(cost))]
        return named(probability.detach(), dims_of(probability))


def _scaled(cost: Tensor, scale: float) -> Tensor:
    return cost if scale == 1.0 else named(scale * cost, dims_of(cost))
