"""Is the batched run the same as running the particles one by one?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.poutine import Trace
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_elbo_ext.particles.batching import Batched
from pyro_elbo_ext.particles.supply import CannotBatch, Supply
from pyro_elbo_ext.programs.densities import log_prob, score_parts
from pyro_elbo_ext.programs.nodes import Node, is_point_mass
from pyro_elbo_ext.programs.randomness import torch_kept
from pyro_elbo_ext.programs.running import trace_pair

Program = Callable[..., Any]

# of the largest element: sums and products come in another order
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def check_batched(
    batched: Batched,
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    reference: tuple[Trace, Trace],
) -> None:
    """Run the first, middle and last particle in ordinary code at their own draws, and compare every site.

    The random state is left as it was, and no gradient is computed.

    Parameters
    ----------
    batched
        From :func:`pyro_elbo_ext.batching.run_batched`, with the other arguments as they were there and parameters that
        have not changed since.

    Raises
    ------
    CannotBatch
        Naming the site that differs, or whose draws are the same for all particles.
    """
    frame = particle_frame(batched)
    if frame is None:  # no sites, nothing that could differ
        return
    _check_draws_differ(batched, frame.size)
    subsamples = {
        name: (node["fn"], node["value"])
        for trace in batched[:2]
        for name, node in trace.nodes.items()
        if site_is_subsample(node)
    }
    with torch_kept(), torch.no_grad(), pyro.validation_enabled(False):
        for k in sorted({0, frame.size // 2, frame.size - 1}):
            draws = {
                name: node["value"][k].reshape(node["value"].shape[-rank:] if rank else ())
                for name, node in _drawn(batched.guide_trace)
                for rank in (reference[1].nodes[name]["value"].dim(),)
            }
            with Supply(draws, subsamples):
                model_trace, guide_trace = trace_pair(model, guide, args, kwargs)
            _compare(guide_trace, batched.guide_trace, "guide", k, frame)
            _compare(model_trace, batched.model_trace, "model", k, frame)


def particle_frame(batched: Batched) -> CondIndepStackFrame | None:
    """The particle plate of a batched run; None if there are no sites."""
    for trace in batched[:2]:
        for node in trace.nodes.values():
            if not site_is_subsample(node):
                return node["cond_indep_stack"][0]
    return None


def _drawn(guide_trace: Trace) -> list[tuple[str, Node]]:
    """Sites that are drawn; point masses are computed from the others, and need not agree to the last digit."""
    return [
        (name, node)
        for name, node in guide_trace.nodes.items()
        if not (site_is_subsample(node) or node["is_observed"] or is_point_mass(node["fn"]))
    ]


def _check_draws_differ(batched: Batched, particles: int) -> None:
    for name, node in _drawn(batched.guide_trace):
        value = node["value"]
        if particles == 1 or value.numel() == 0 or not value.is_floating_point() or _is_discrete(node["fn"]):
            continue
        if bool((value == value[:1]).all()):
            raise CannotBatch(
                f"the draws of site '{name}' are the same for all {particles} particles: its {type(node['fn']).__name__} "
                "does not draw anew for each"
            )


def _is_discrete(fn: Any) -> bool:
    try:
        return bool(fn.support.is_discrete)
    except NotImplementedError:  # a distribution that does not say
        return False


def _compare(looped: Trace, batched: Trace, where: str, k: int, frame: CondIndepStackFrame) -> None:
    """Compare each site of an ordinary run with particle ``k`` of the batched one."""
    expected = {name: node for name, node in looped.nodes.items() if node["type"] == "sample"}
    if list(expected) != list(batched.nodes):
        name = next(iter(set(expected) ^ set(batched.nodes)), next(iter(expected)))
        raise CannotBatch(f"site '{name}' of the {where} is only in the batched run, only in the loop, or out of order")
    for name, node in expected.items():
        if site_is_subsample(node):
            continue
        ours = batched.nodes[name]
        entries: dict[str, tuple[Any, Any, int]] = {
            "value": (ours["value"], node["value"], getattr(node["fn"], "event_dim", 0)),
            "scale": (ours["scale"], node["scale"], 0),
            "mask": (ours["mask"], node["mask"], 0),
            "plates": (ours["cond_indep_stack"], (frame, *node["cond_indep_stack"]), 0),
        }
        if where == "guide" and "score_parts" in ours:
            parts = score_parts(node, looped)
            for key, part, other in zip(parts._fields, ours["score_parts"], parts, strict=True):
                entries[key] = part, other, 0
        if "log_prob" in ours:
            entries["log density"] = ours["log_prob"], log_prob(node, looped), 0
            entries["unscaled log density"] = ours["unscaled_log_prob"], node["unscaled_log_prob"], 0
        for what, (batch, single, event_dim) in entries.items():
            if not _same(batch, single, event_dim, k, frame):
                raise CannotBatch(
                    f"at site '{name}' of the {where}, the {what} of particle {k} is not what it is for that particle "
                    "alone: the program draws random numbers outside pyro.sample, or keeps state between runs"
                )


def _same(batch: Any, single: Any, event_dim: int, k: int, frame: CondIndepStackFrame) -> bool:
    if not isinstance(batch, Tensor) or not isinstance(single, Tensor):
        return type(batch) is type(single) and bool(batch == single)
    depth = -1 - (frame.dim or 0)
    ones = (1,) * (depth - (single.dim() - event_dim))
    if batch.shape == (frame.size, *ones, *single.shape):
        batch = batch[k].reshape(single.shape)
    elif batch.shape != single.shape:  # a scale or mask that all particles share
        return False
    if batch.dtype != single.dtype:
        return False
    tolerance = _TOLERANCE.get(single.dtype)
    if tolerance is None or single.numel() == 0:
        return torch.equal(batch, single)
    finite = single[single.isfinite()].abs()
    size = float(finite.max()) if finite.numel() else 0.0
    return torch.allclose(batch, single, rtol=tolerance, atol=tolerance * max(size, 1.0), equal_nan=True)
