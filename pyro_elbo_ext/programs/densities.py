"""Log densities of single sites, kept in the trace as Pyro keeps them, and whether their shapes fit."""

from __future__ import annotations

import math

import torch
from pyro.distributions import Delta, MaskedDistribution
from pyro.distributions.score_parts import ScoreParts
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.util import check_site_shape
from torch import Tensor

from pyro_elbo_ext.programs.faults import (
    REMEDY,
    brief,
    check_data,
    counts_at_fault,
    data_at_fault,
    described,
    draw_outside,
    dtype_at_fault,
    no_tensor,
    of_event_at_fault,
    shapes_at_fault,
    support_is_drawn,
)
from pyro_elbo_ext.programs.nodes import (
    PARTICLE_PLATE,
    Node,
    enumerated_dims,
    is_data,
    is_latent,
    is_masked,
    is_subsample,
    says_what_it_takes,
)


def log_prob(node: Node, trace: Trace, max_plate_nesting: float = math.inf) -> Tensor:
    """Scaled and masked log density of a site, shape ``batch_shape``.  Computed once per trace."""
    if "log_prob" not in node:
        fn = node["fn"]
        if not isinstance(node["value"], Tensor):
            raise TypeError(no_tensor(node))
        try:
            unscaled = node.get("unscaled_log_prob")
            if unscaled is None:
                unscaled = fn.log_prob(node["value"], *node["args"], **node["kwargs"])
        except (ValueError, RuntimeError) as error:
            raise _at_site(error, node, trace, of_model=True) from error
        if is_validation_enabled() and (sentence := counts_at_fault(node)):
            raise ValueError(sentence)
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
                raise _at_site(error, node, trace, of_model=False) from error
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


def counted(node: Node, density: Tensor) -> Tensor:
    """Which elements of a site's log density count: not what ``poutine.mask``, ``obs_mask`` or ``fn.mask`` leave out."""
    counts = torch.ones_like(density, dtype=torch.bool)
    fn, masks = node["fn"], [node["mask"]]
    while isinstance(fn, MaskedDistribution):
        masks.append(fn._mask)
        fn = fn.base_dist
    for mask in masks:
        if mask is not None:
            counts = counts & torch.as_tensor(mask, device=counts.device)
    return counts


def check_densities(trace: Trace, *, finite: bool = True) -> None:
    """Compute the log densities of a model that was run alone.

    Raises
    ------
    ValueError
        For a site whose value does not fit its distribution, that is empty, or, if ``finite``, whose data have no
        finite density.
    """
    for node in list(trace.nodes.values()):
        if node["type"] == "sample" and not is_subsample(node):
            density = log_prob(node, trace)
            if finite and not bool(torch.isfinite(density).all()) and (sentence := data_at_fault(node)):
                raise ValueError(sentence)


def check_observed(trace: Trace) -> None:
    """Compute the log densities of all data of a model's trace, but where some are masked, and look at them.

    Raises
    ------
    ValueError
        As :func:`~pyro_elbo_ext.programs.faults.check_data`; and for values that do not fit their distributions.
    """
    for node in trace.nodes.values():
        if node["type"] != "sample" or is_subsample(node) or not is_data(node) or is_masked(node):
            continue
        if isinstance(node["value"], Tensor) and support_is_drawn(node):
            continue
        log_prob(node, trace)
    check_data(trace)


def _at_site(error: Exception, node: Node, trace: Trace, of_model: bool) -> Exception:
    """What is wrong at the site; if that is not known, the same error with its name and the shapes, in Pyro's words."""
    name = node["name"]
    try:
        sentence = shapes_at_fault(node) or data_at_fault(node)
        if sentence is None and of_model and is_latent(node):
            sentence = draw_outside(node)
        if sentence is None and isinstance(error, RuntimeError) and not isinstance(error, torch.linalg.LinAlgError):
            sentence = dtype_at_fault(node)
    except RuntimeError:  # under torch.vmap values cannot be looked at; the program is then run draw by draw
        sentence = None
    if sentence is not None:
        return ValueError(f"{sentence}\n{brief(error)}")
    return type(error)(
        f"Error while computing log_prob at site '{name}':\n{error}\n{trace.format_shapes(last_site=name)}"
    )


def _check_shape(node: Node, max_plate_nesting: float) -> None:
    """Reject log densities that came about by accidental broadcasting, or that cover no data at all."""
    fn, value, name = node["fn"], node["value"], node["name"]
    batch_shape = getattr(fn, "batch_shape", node["log_prob"].shape)
    of_value = value.shape[: value.dim() - fn.event_dim] if hasattr(fn, "event_dim") else node["log_prob"].shape
    shape, batch_shape, of_value = [of_plates(of, node) for of in (node["log_prob"].shape, batch_shape, of_value)]
    if shape != batch_shape and shape != of_value:
        raise ValueError(_broadcast(node))
    if is_data(node) and (of_event_at_fault(node) or (shape != of_value and _is_repeated(of_value, node))):
        raise ValueError(_broadcast(node))
    if getattr(fn, "event_shape", ()) and _is_spread(node, of_value, batch_shape):
        raise ValueError(_broadcast(node))
    # A latent site may have no elements, as in Pyro: the weights of a model without covariates.
    if node["is_observed"] and (0 in shape or (0 in value.shape and type(fn).__name__ != "Unit")):
        raise ValueError(f"site '{name}' is empty: its value has shape {tuple(value.shape)}. Skip empty batches.")
    # where the plates end is not known, dims of enumerated values would be taken for theirs
    if is_validation_enabled() and not (math.isinf(max_plate_nesting) and enumerated_dims(node)):
        check_site_shape(node, max_plate_nesting)


def of_plates(shape: torch.Size, node: Node) -> torch.Size:
    """A shape without the dims along which a site has the values of enumerated sites."""
    enumerated = enumerated_dims(node)
    if not enumerated:
        return shape
    sizes = [1 if dim in enumerated else size for dim, size in enumerate(shape, -len(shape))]
    while sizes and sizes[0] == 1:
        del sizes[0]
    return torch.Size(sizes)


def _broadcast(node: Node) -> str:
    if is_data(node) and of_event_at_fault(node):
        return str(shapes_at_fault(node))
    mask = node["mask"]
    of_mask = f", under a mask of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else ""
    return (
        f"at site '{node['name']}', a value of {described(node)}{of_mask}: they were broadcast against each other, into a "
        f"log density that counts elements several times. {REMEDY} If data are to count several times, expand them."
    )


def _is_repeated(of_value: torch.Size, node: Node) -> bool:
    """Whether data count several times where that cannot be meant.

    One datum for all of a plate is what the model says. Not so along a dim that no plate declares, nor if the data have
    another dim of the plate's size: labels of shape (N, 1) in a plate of N, or N labels for N vectors.
    """
    shape = of_plates(node["log_prob"].shape, node)
    several = {dim for dim in range(-len(shape), 0) if shape[dim] > 1}
    repeated = {dim for dim in several if len(of_value) < -dim or of_value[dim] == 1}
    frames = {frame.dim: frame.name for frame in node["cond_indep_stack"]}
    if not repeated <= frames.keys():
        return True
    undeclared = {size for dim, size in enumerate(of_value, -len(of_value)) if dim not in frames}
    return any(shape[dim] in (undeclared if frames[dim] == PARTICLE_PLATE else node["value"].shape) for dim in repeated)


def _is_spread(node: Node, of_value: torch.Size, batch_shape: torch.Size) -> bool:
    """Whether value and distribution broadcast to a shape that is neither's, which a sum over the event would hide."""
    fn, value = node["fn"], node["value"]
    whole, given = batch_shape + fn.event_shape, of_value + value.shape[value.dim() - len(fn.event_shape) :]
    if given == whole or says_what_it_takes(fn):
        return False
    try:
        return torch.broadcast_shapes(given, whole) not in (given, whole)
    except RuntimeError:  # no elementwise density
        return False
