"""Do guide and model belong together?"""

from __future__ import annotations

import math
from itertools import zip_longest

from pyro.poutine import Trace

from pyro_elbo_ext.programs.faults import REMEDY, described, draw_outside
from pyro_elbo_ext.programs.nodes import PARTICLE_PLATE, Node, enumerated_dims, is_latent, is_subsample


class Marked(ValueError):
    """A latent site is marked for enumeration, where nothing is enumerated."""


def check_pair(model_trace: Trace, guide_trace: Trace, *, enumerated: bool = False) -> None:
    """Compare names, kinds and shapes of the sites; nothing here waits for the device.

    ``enumerated`` says that these are traces under enumeration.

    Raises
    ------
    Marked
        For a latent site that is marked for enumeration, if nothing is enumerated.
    ValueError
        For a latent site of the model that is missing from the guide and not summed out, a site that is observed in one of
        them only, of another shape in the guide than in the model, or of plates that count it another number of times.
    """
    for trace, where in ((guide_trace, "guide"), (model_trace, "model")):
        for name, node in trace.nodes.items():
            if node["type"] != "sample" or is_subsample(node):
                continue
            if node["infer"].get("enumerate") and not node["is_observed"] and not enumerated:
                raise Marked(
                    f"site '{name}' of the {where} is marked for enumeration (infer={{'enumerate': ...}}), which this ELBO "
                    "does not do. Use pyro.infer.TraceEnum_ELBO, or remove the mark to sample the site."
                )
            if where == "guide":
                _check_not_observed(node, model_trace)
            elif not node["is_observed"]:
                if name not in guide_trace:
                    if enumerated and node["infer"].get("enumerate"):
                        _check_summed_out(node)
                        continue
                    raise ValueError(
                        f"site '{name}' is latent in the model but the guide has no site of that name, so it has no log "
                        f"q. Add pyro.sample('{name}', ...) to the guide, or observe it in the model."
                    )
                _check_latent_shape(node, guide_trace.nodes[name])
                _check_plates(node, guide_trace.nodes[name])


def _check_summed_out(node: Node) -> None:
    """Raise an error if a site of the model, which the guide does not have, is marked but cannot be summed out."""
    name, infer = node["name"], node["infer"]
    if infer.get("num_samples") is not None:
        raise ValueError(
            f"site '{name}' of the model is marked with num_samples={infer['num_samples']}, and the guide does not have it: "
            "draws of the prior would count as all values. Draw it in the guide, or remove num_samples to sum it out."
        )
    if "_enumerate_dim" not in infer:
        raise NotImplementedError(
            f"At site '{name}', model-side {infer['enumerate']} enumeration is not implemented: what the guide does not "
            "have is summed out in parallel. Use infer={'enumerate': 'parallel'}."
        )


def _check_not_observed(node: Node, model_trace: Trace) -> None:
    theirs = model_trace.nodes.get(node["name"])
    if theirs is None or theirs["type"] != "sample" or node["is_observed"]:
        return
    if theirs["is_observed"] and not is_subsample(theirs):
        raise ValueError(
            f"site '{node['name']}' is observed in the model, but the guide samples it. Leave it out of the guide, or "
            "remove obs= in the model, so that it is latent."
        )


def _check_plates(node: Node, guide_node: Node) -> None:
    """Raise ValueError if the draws of a latent site stand for other numbers of draws in the guide than in the model."""
    ours, theirs = _copies(node), _copies(guide_node)
    if math.isclose(ours, theirs, rel_tol=1e-6):
        return
    plates = [frame for frame in node["cond_indep_stack"] if frame.full_size not in (None, frame.size)]
    plates = plates or [frame for frame in guide_node["cond_indep_stack"] if frame.full_size not in (None, frame.size)]
    listed = ", ".join(f"'{frame.name}' ({frame.size} of {frame.full_size})" for frame in plates)
    raise ValueError(
        f"latent site '{node['name']}' stands for {ours:g} draws in the model and for {theirs:g} in the guide, by plate "
        f"{listed}: its densities would not belong together. Put it into plates of the same names and sizes in both."
    )


def _copies(node: Node) -> float:
    """How many draws each draw of a site in subsampled plates stands for."""
    frames = node["cond_indep_stack"]
    return math.prod([frame.full_size / frame.size for frame in frames if frame.full_size not in (None, frame.size)])


def _check_latent_shape(node: Node, guide_node: Node) -> None:
    """Raise ValueError if the guide's draw is not of the shape of the model's latent site ``node``, in Pyro's words."""
    fn, value = node["fn"], node["value"]
    if enumerated_dims(node) or "_enum_total" in guide_node["infer"]:
        return  # what broadcasts against enumerated values is looked at where their densities are
    if not hasattr(fn, "batch_shape") or any(frame.name == PARTICLE_PLATE for frame in node["cond_indep_stack"]):
        return  # in a batched run the model's distribution may be one for all particles
    shape = fn.batch_shape + fn.event_shape
    if value.shape != shape and any(a != b for a, b in zip_longest(value.shape[::-1], shape[::-1], fillvalue=1)):
        what = "shapes" if getattr(guide_node["fn"], "event_dim", fn.event_dim) == fn.event_dim else "event_dims"
        raise ValueError(
            f"Model and guide {what} disagree at site '{node['name']}': the guide's draw of {described(node)} in the model. "
            f"{REMEDY}"
        )


def check_draws(model_trace: Trace) -> None:
    """Raise ValueError if a draw of the guide is outside the support of the model's continuous site; waits for the device.

    Some densities, such as the exponential's, are finite there, where values are not validated.
    """
    for node in model_trace.nodes.values():
        if is_latent(node) and node["value"].is_floating_point() and bool(node["value"].isfinite().all()):
            sentence = draw_outside(node)
            if sentence is not None:
                raise ValueError(sentence)
