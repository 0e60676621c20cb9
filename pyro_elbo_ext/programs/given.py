"""A model run at given draws of its latent sites, and what it has then: values, data, plates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_elbo_ext.programs.nodes import Node, is_data, is_deterministic
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


def sample_sites(trace: Trace) -> Iterator[tuple[str, Node]]:
    """Name and node of each ``pyro.sample`` statement."""
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
    for name, node in sample_sites(trace):
        if is_deterministic(node) or (not node["is_observed"] and not imputation(name, trace)):
            found[name] = node["value"]
    return found


def data_of(trace: Trace) -> dict[str, Tensor]:
    """Values of the observed sites, without ``pyro.factor``."""
    return {name: torch.as_tensor(node["value"]) for name, node in sample_sites(trace) if is_data(node)}


def check_full(trace: Trace) -> None:
    """Raise a ValueError if a plate subsamples."""
    for _, node in sample_sites(trace):
        for frame in node["cond_indep_stack"]:
            if frame.full_size is not None and frame.full_size != frame.size:
                raise ValueError(
                    f"plate '{frame.name}' subsamples {frame.size} of {frame.full_size}: draws would be of other data "
                    "each time. Call with the full data, or with a model and guide without subsampling."
                )
