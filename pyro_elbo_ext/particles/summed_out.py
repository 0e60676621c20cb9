"""What the model sums out in each particle: its share of the log weight, by site."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.poutine import Trace
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_elbo_ext.particles.particles import Draw
from pyro_elbo_ext.programs.densities import log_prob
from pyro_elbo_ext.programs.nodes import is_latent
from pyro_elbo_ext.terms.enumeration.expectations import GuideWeights
from pyro_elbo_ext.terms.enumeration.rows import PairOfTraces, Row, Rows, joint_name, plates_only
from pyro_elbo_ext.terms.terms import Site


def enumerating_model(model: Callable[..., Any], max_plate_nesting: int) -> Callable[..., Any]:
    """The model with the values of its marked sites along dims to the left of the plates."""
    result: Callable[..., Any] = EnumMessenger(first_available_dim=-1 - max_plate_nesting)(model)
    return result


def check_guide_draws(guide_trace: Trace, what: str) -> None:
    """Raise ValueError if the guide marks a site: each particle needs one log weight, which a sum has not."""
    for name, node in guide_trace.nodes.items():
        if is_latent(node) and node["infer"].get("enumerate"):
            raise ValueError(
                f"site '{name}' of the guide is marked for enumeration (infer={{'enumerate': ...}}), but {what} takes the "
                "log weight of each draw as a whole, and what is summed over in the guide has none. Leave the site out of "
                "the guide and mark it in the model, which then sums it out inside of each log weight; or use "
                "DecomposedELBO(gradient='pathwise')."
            )


def summed_out(
    draw: Draw, sites: Sequence[Site], max_plate_nesting: int, *, differentiable: bool
) -> tuple[list[Site], dict[str, Row]]:
    """Rows of what the model sums out at one draw, and of what depends on it.

    Returns
    -------
    sites : list of Site
        As given, but one for all of those that are summed out together and known in total only.
    rows : dict of str to Row
        Of those sites whose log density stands inside a sum; see `pyro_elbo_ext.terms.enumeration.rows`.
    """
    model_trace = prune_subsample_sites(draw.model_trace)
    for node in model_trace.nodes.values():
        if node["type"] == "sample":
            log_prob(node, model_trace, max_plate_nesting)
    model_trace.pack_tensors()
    drawn = [name for name, node in draw.guide_trace.nodes.items() if node["type"] == "sample"]
    pair = PairOfTraces(model_trace, plates_only(drawn, model_trace))
    rows = Rows({site.name: Row() for site in sites})
    pair.enter_sums(rows, GuideWeights(Trace(), {}), differentiable=differentiable)
    by_site = {site.name: rows.by_site[site.name] for site in sites if pair.depends_on_summed(site)}
    merged = list(sites)
    for group, log_q in rows.joint.items():
        members = [site for site in merged if site.name in group]
        top = min(members, key=lambda site: len(site.p["cond_indep_stack"]))  # type: ignore[index]
        log_p = [by_site.pop(site.name).log_p for site in members]
        by_site[joint_name(group)] = Row(_to_plates(log_p, log_q), (log_q,))
        at = merged.index(members[0])
        merged = [site for site in merged if site.name not in group]
        merged.insert(at, Site(joint_name(group), "latent", top.p, ()))
    return merged, by_site


def _to_plates(values: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """The sum of the members' values, over all dims that are not those of the plates they share."""
    return torch.stack([value.sum_to_size(like.shape) for value in values if value is not None]).sum(0)
