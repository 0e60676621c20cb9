"""A model run at given draws of its latent sites: values, redrawn observations, pointwise log likelihoods."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pyro.distributions import MaskedDistribution
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_elbo_ext.programs.densities import log_prob
from pyro_elbo_ext.programs.faults import data_at_fault
from pyro_elbo_ext.programs.nodes import Node, is_data
from pyro_elbo_ext.programs.running import trace_program


class Given(Messenger):
    """Give latent sites the values of one draw, and redraw the observed sites if asked.

    Parameters
    ----------
    values
        Latent site to its value. Latent sites that are not in it are drawn from the model.
    redraw
        Draw observed sites anew, from the model, instead of taking the data.
    option
        Argument that the caller can set to False to do without, for errors; empty if there is none.
    """

    def __init__(self, values: Mapping[str, Tensor], *, redraw: bool = False, option: str = "") -> None:
        super().__init__()
        self.values = values
        self.redraw = redraw
        self.option = option

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if isinstance(fn, _Subsample):
            return
        if msg["is_observed"]:
            if not self.redraw or not is_data(msg):
                return
            msg["value"] = self._draw(msg)
        elif msg["done"]:
            return
        elif msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]
        else:
            msg["value"] = self._draw(msg)
        msg["done"] = True

    def _draw(self, msg: Any) -> Any:
        try:
            return msg["fn"](*msg["args"], **msg["kwargs"])
        except NotImplementedError as error:
            advice = f" Pass {self.option}=False." if self.option else ""
            raise ValueError(
                f"site '{msg['name']}' cannot be drawn from the model: {type(msg['fn']).__name__} has no sampler.{advice}"
            ) from error


def run_given(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    values: Mapping[str, Tensor],
    *,
    redraw: bool = False,
    option: str = "",
) -> Trace:
    """Run the model once at given values, see :class:`Given`; its trace without subsample sites."""
    with Given(values, redraw=redraw, option=option):
        # the handler is inside the trace, which so records what it gives
        return prune_subsample_sites(trace_program(model, args, kwargs))


def _sites(trace: Trace) -> Iterator[tuple[str, Node]]:
    nodes: Mapping[str, Any] = trace.nodes
    return ((name, node) for name, node in nodes.items() if node["type"] == "sample")


def imputation(name: str, trace: Trace) -> bool:
    """Whether a latent site stands for the missing part of a site with ``obs_mask``.

    Its draws have no meaning where the data are observed; the completed data are in the deterministic site.
    """
    whole = name.removesuffix("_unobserved")
    return whole != name and whole in trace and f"{whole}_observed" in trace


def values_of(trace: Trace) -> dict[str, Tensor]:
    """Values of the latent and deterministic sites of a model's trace, in the model's order."""
    found = {}
    for name, node in _sites(trace):
        if node["infer"].get("_deterministic") or (not node["is_observed"] and not imputation(name, trace)):
            found[name] = node["value"]
    return found


def data_of(trace: Trace) -> dict[str, Tensor]:
    """Values of the observed sites, without ``pyro.factor``."""
    return {name: torch.as_tensor(node["value"]) for name, node in _sites(trace) if is_data(node)}


def pointwise_log_likelihood(trace: Trace) -> dict[str, tuple[Tensor, Tensor]]:
    """Per observed site the unscaled log density of each observation and whether it counts, both of ``batch_shape``.

    An observation is one element of the batch, whatever the event's shape. What is masked out, by ``poutine.mask``,
    ``obs_mask`` or ``fn.mask(...)``, does not count and has 0.
    """
    found = {}
    for name, node in _sites(trace):
        if not is_data(node):
            continue
        log_prob(node, trace)
        unscaled = node["unscaled_log_prob"]
        counts = torch.ones_like(unscaled, dtype=torch.bool)
        fn, masks = node["fn"], [node["mask"]]
        while isinstance(fn, MaskedDistribution):
            masks.append(fn._mask)
            fn = fn.base_dist
        for mask in masks:
            if mask is not None:
                counts = counts & torch.as_tensor(mask, device=counts.device)
        density = unscaled.masked_fill(~counts, 0.0)
        if bool(density.isnan().any()) and (sentence := data_at_fault(node)):
            raise ValueError(sentence)
        found[name] = (density, counts)
    return found


def check_full(trace: Trace) -> None:
    """Raise a ValueError if a plate subsamples."""
    for _, node in _sites(trace):
        for frame in node["cond_indep_stack"]:
            if frame.full_size is not None and frame.full_size != frame.size:
                raise ValueError(
                    f"plate '{frame.name}' subsamples {frame.size} of {frame.full_size}: draws would be of other data "
                    "each time. Call with the full data, or with a model and guide without subsampling."
                )


def to_numpy(value: Any) -> NDArray[Any]:
    """A tensor as an array on the host."""
    if not isinstance(value, Tensor):
        return np.asarray(value)
    tensor = value.detach()
    if tensor.dtype == torch.bfloat16:  # numpy has no such type
        tensor = tensor.float()
    return tensor.resolve_conj().cpu().numpy()


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

    def by_chain(self, chains: int) -> dict[str, NDArray[Any]]:
        """The arrays, shape ``(chains, size / chains, *shape)``."""
        for name, filled in self._filled.items():
            if filled != self.size:
                raise ValueError(f"site '{name}' is not in every draw: a model whose sites vary has no array of draws")
        return {
            name: array.reshape(chains, len(array) // chains, *array.shape[1:]) for name, array in self.arrays.items()
        }
