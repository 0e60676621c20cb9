"""Pointwise log likelihoods of a model's trace, and arrays of draws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pyro.poutine import Trace
from torch import Tensor

from pyro_elbo_ext.programs.densities import counted, log_prob
from pyro_elbo_ext.programs.given import sample_sites
from pyro_elbo_ext.programs.nodes import is_data


def pointwise_log_likelihood(trace: Trace) -> dict[str, tuple[Tensor, Tensor]]:
    """Per observed site the unscaled log density of each observation and whether it counts, both of ``batch_shape``.

    An observation is one element of the batch, whatever the event's shape. What is masked out, by ``poutine.mask``,
    ``obs_mask`` or ``fn.mask(...)``, does not count and has 0.
    """
    found = {}
    for name, node in sample_sites(trace):
        if not is_data(node):
            continue
        log_prob(node, trace)
        unscaled = node["unscaled_log_prob"]
        counts = counted(node, unscaled)
        density = unscaled.masked_fill(~counts, 0.0)
        found[name] = (density, counts)
    return found


def to_numpy(value: Any) -> NDArray[Any]:
    """A tensor as an array on the host."""
    if not isinstance(value, Tensor):
        return np.asarray(value)
    tensor = value.detach()
    if tensor.dtype == torch.bfloat16:  # numpy has no such type
        tensor = tensor.float()
    return tensor.resolve_conj().cpu().numpy()


def as_integers(states: NDArray[Any]) -> NDArray[Any]:
    """States as integers, where they are whole numbers: a model gives those of Bernoulli and Binomial sites as floats."""
    if states.dtype.kind == "b" or (states.dtype.kind == "f" and (states == np.round(states)).all()):
        return states.astype(np.int64)
    return states


class Columns:
    """Arrays of shape ``(size, *shape)`` per site, filled draw by draw."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.arrays: dict[str, NDArray[Any]] = {}
        self._filled: dict[str, int] = {}

    def put(self, index: int, name: str, value: Any, *, allow_nan: bool = False) -> None:
        """Enter the value of one draw.

        Raises
        ------
        ValueError
            If it has NaN, or if the site was not in all draws before or had another shape there.
        """
        array = to_numpy(value)
        if not allow_nan and array.dtype.kind in "fc" and np.isnan(array).any():
            raise ValueError(
                f"site '{name}' is NaN in {int(np.isnan(array).sum())} of {array.size} elements at draw {index}. Look "
                "for parameters of the guide or model, or data, that are NaN."
            )
        if name not in self.arrays and index == 0:
            self.arrays[name] = np.empty((self.size, *array.shape), array.dtype)
            self._filled[name] = 0
        if self._filled.get(name) != index:
            raise ValueError(f"site '{name}' is not in every draw: a model whose sites vary has no array of draws")
        if array.shape != self.arrays[name].shape[1:]:
            raise ValueError(
                f"site '{name}' has shape {array.shape} at draw {index}, {self.arrays[name].shape[1:]} before: draws of "
                "one site must have one shape"
            )
        self.arrays[name][index] = array
        self._filled[name] = index + 1

    def full(self) -> dict[str, NDArray[Any]]:
        """The arrays, once every draw is there."""
        for name, filled in self._filled.items():
            if filled != self.size:
                raise ValueError(f"site '{name}' is not in every draw: a model whose sites vary has no array of draws")
        return self.arrays

    def by_chain(self, chains: int) -> dict[str, NDArray[Any]]:
        """The arrays, shape ``(chains, size / chains, *shape)``."""
        return by_chain(self.full(), chains)


def by_chain(arrays: Mapping[str, NDArray[Any]], chains: int) -> dict[str, NDArray[Any]]:
    """Arrays with the draws of all chains in front, shape ``(chains, draws / chains, *shape)``."""
    return {name: array.reshape(chains, len(array) // chains, *array.shape[1:]) for name, array in arrays.items()}
