"""Log densities of single sites, kept in the trace as Pyro keeps them, and whether their shapes fit."""

from __future__ import annotations

import math

from pyro.distributions import Delta
from pyro.distributions.score_parts import ScoreParts
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.util import check_site_shape
from torch import Tensor

from pyro_elbo_ext.programs.nodes import Node


def log_prob(node: Node, trace: Trace, max_plate_nesting: float = math.inf) -> Tensor:
    """Scaled and masked log density of a site, shape ``batch_shape``.  Computed once per trace."""
    if "log_prob" not in node:
        fn = node["fn"]
        try:
            unscaled = fn.log_prob(node["value"], *node["args"], **node["kwargs"])
        except (ValueError, RuntimeError) as error:
            raise _at_site(error, node, trace) from error
        node["unscaled_log_prob"] = unscaled
        node["log_prob"] = scale_and_mask(unscaled, node["scale"], node["mask"])
        _check_shape(node, max_plate_nesting)
    return node["log_prob"]


def score_parts(node: Node, trace: Trace, max_plate_nesting: float = math.inf) -> ScoreParts:
    """Scaled and masked ``(log_prob, score_function, entropy_term)`` of a guide site.  Computed once per trace."""
    if "score_parts" not in node:
        fn = node["fn"]
        if type(fn) is Delta and _is_own_draw(fn, node["value"]):
            parts = ScoreParts(fn.log_density, 0, fn.log_density)  # the point mass sits at its own draw
        else:
            try:
                parts = fn.score_parts(node["value"], *node["args"], **node["kwargs"])
            except (ValueError, RuntimeError) as error:
                raise _at_site(error, node, trace) from error
        node["unscaled_log_prob"] = parts.log_prob
        if node["mask"] is not None or not (isinstance(node["scale"], float) and node["scale"] == 1.0):
            parts = parts.scale_and_mask(node["scale"], node["mask"])
        node["score_parts"] = parts
        node["log_prob"] = parts.log_prob
        _check_shape(node, max_plate_nesting)
    return node["score_parts"]


def _is_own_draw(fn: Delta, value: Tensor) -> bool:
    if value is fn.v:
        return True
    return value.data_ptr() == fn.v.data_ptr() and value.shape == fn.v.shape and value.stride() == fn.v.stride()


def _at_site(error: Exception, node: Node, trace: Trace) -> Exception:
    """The same error, saying at which site it arose and what the shapes are, in Pyro's words."""
    name = node["name"]
    return type(error)(
        f"Error while computing log_prob at site '{name}':\n{error}\n{trace.format_shapes(last_site=name)}"
    )


def _check_shape(node: Node, max_plate_nesting: float) -> None:
    """Reject log densities that came about by accidental broadcasting, or that cover no data at all."""
    shape = node["log_prob"].shape
    fn, value, name = node["fn"], node["value"], node["name"]
    batch_shape = getattr(fn, "batch_shape", shape)
    if shape != batch_shape:
        value_batch = value.shape[: value.dim() - fn.event_dim]
        if shape != value_batch:
            raise ValueError(
                f"at site '{name}', a value with batch shape {tuple(value_batch)} was broadcast against a distribution with "
                f"batch shape {tuple(batch_shape)} into a log density of shape {tuple(shape)}. Make the shapes agree, with "
                ".to_event(...), pyro.plate(...) or an unsqueeze."
            )
    if 0 in shape or (0 in value.shape and type(fn).__name__ != "Unit"):
        raise ValueError(f"site '{name}' is empty: its value has shape {tuple(value.shape)}. Skip empty batches.")
    if is_validation_enabled():
        check_site_shape(node, max_plate_nesting)
