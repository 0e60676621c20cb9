"""Log densities of sites that differ in nothing but their names and numbers, as those of a loop over times, at once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import Distribution

from pyro_elbo_ext.programs.nodes import Node

FEWEST = 4  # sites that are worth it
_MODULES = (
    "pyro.distributions.torch",
    "torch.distributions.",
)  # whose distributions keep all that they know in tensors


def densities_at_once(trace: Trace) -> None:
    """Compute the densities of data of which there are several of one kind: ``unscaled_log_prob`` of each node.

    ``stacked`` of the node is then the tensor that has all of them, and the node's place in it. Where that fails, the sites
    are left, for the error to name one.
    """
    kinds: dict[object, list[Node]] = {}
    for node in trace.nodes.values():
        is_plain = node["type"] == "sample" and node["is_observed"] and not (node["args"] or node["kwargs"])
        if is_plain and isinstance(node["value"], Tensor) and "log_prob" not in node:
            kind = _kind(node["fn"])
            if kind is not None:
                value = node["value"]
                kinds.setdefault((kind, value.shape, value.dtype, value.device), []).append(node)
    for nodes in kinds.values():
        if len(nodes) < FEWEST:
            continue
        try:
            densities = _densities(nodes)
        except (ValueError, RuntimeError):  # comes again, with the site's name
            continue
        for place, (node, density) in enumerate(zip(nodes, densities.unbind(), strict=True)):
            node["unscaled_log_prob"], node["stacked"] = density, (densities, place)


def _kind(fn: Any) -> tuple[object, ...] | None:
    """What two distributions have in common whose parameters can be stacked; None if those of ``fn`` cannot."""
    if not (isinstance(fn, Distribution) and type(fn).__module__.startswith(_MODULES)):
        return None
    found: list[object] = [type(fn)]
    for name, value in vars(fn).items():
        if isinstance(value, Tensor):
            if value.shape[: len(fn.batch_shape)] != fn.batch_shape:
                return None
            found.append((name, value.shape, value.dtype, value.device))
        elif isinstance(value, Distribution):
            inner = _kind(value)
            if inner is None or value.batch_shape[: len(fn.batch_shape)] != fn.batch_shape:
                return None
            found.append((name, inner))
        elif value is None or isinstance(value, (bool, int, float, str, torch.Size)):
            found.append((name, value))
        else:
            return None
    return tuple(found)


def _densities(nodes: Sequence[Node]) -> Tensor:
    """Shape ``(nodes, *shape of one)``."""
    fns, values = [node["fn"] for node in nodes], [node["value"] for node in nodes]
    of_fn, of_value = len(fns[0].batch_shape) + len(fns[0].event_shape), values[0].dim()
    value = _stack(values, max(of_fn - of_value, 0))
    density: Tensor = _at_once(fns, max(of_value - of_fn, 0)).log_prob(value)
    return density


def _at_once(fns: Sequence[Any], more: int) -> Any:
    """One distribution that has all of them along a dim in front, and ``more`` dims of size 1 after it."""
    result, stacks = copy.copy(fns[0]), {}
    for name, value in vars(fns[0]).items():
        if isinstance(value, Tensor):
            if id(value) not in stacks:
                stacks[id(value)] = _stack([getattr(fn, name) for fn in fns], more)
            vars(result)[name] = stacks[id(value)]
        elif isinstance(value, Distribution):
            vars(result)[name] = _at_once([getattr(fn, name) for fn in fns], more)
    result._batch_shape = torch.Size([len(fns), *[1] * more, *fns[0].batch_shape])
    return result


def _stack(tensors: Sequence[Tensor], more: int) -> Tensor:
    stacked = torch.stack(list(tensors))
    return stacked.reshape([len(tensors), *[1] * more, *stacked.shape[1:]]) if more else stacked
