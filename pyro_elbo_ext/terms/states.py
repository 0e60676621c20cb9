"""Probabilities of the states of a discrete site that is summed over."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_elbo_ext.terms.packing import Ordinal, dims_of, named, summed_to, unpacked


@dataclass(frozen=True, slots=True)
class States:
    """The weights of a site's values, together with those of its parents.

    Attributes
    ----------
    joint : Tensor
        Up to a constant; packed, detached.
    own : str
        Symbol of the site's own dim.
    ordinal : frozenset of str
        Its plates.
    symbol_to_dim : dict
        The dims of the plates, from the right.
    values : Tensor
        The states, shape ``(K, *event_shape)``.
    """

    joint: Tensor
    own: str
    ordinal: Ordinal
    symbol_to_dim: dict[str, int]
    values: Tensor

    @property
    def probabilities(self) -> Tensor:
        """Marginal probability of each state, shape ``(*batch_shape, K)``."""
        weights = summed_to(self.joint, self.ordinal | {self.own})
        at = dims_of(weights).index(self.own)
        others = dims_of(weights).replace(self.own, "")
        by_state = [
            unpacked(named(weight / weights.sum(at), others), self.symbol_to_dim) for weight in weights.unbind(at)
        ]
        return torch.stack(by_state, -1)

    @property
    def labels(self) -> Tensor:
        """The states by number: their values, or 0, 1, ... if these are vectors."""
        return self.values if self.values.dim() == 1 else torch.arange(len(self.values))


def values_of(value: Tensor, enumerate_dim: int, event_dim: int) -> Tensor:
    """The states that an enumerated value goes through, shape ``(K, *event_shape)``."""
    value = value.detach().movedim(enumerate_dim - event_dim, 0)
    return value.reshape(len(value), -1, *value.shape[value.dim() - event_dim :])[:, 0]
