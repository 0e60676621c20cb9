"""What the model sums out in each particle: its share of the log weight, by site."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_elbo_ext.particles.particles import Draw
from pyro_elbo_ext.programs.nodes import is_marked_site
from pyro_elbo_ext.terms.enumeration.expectations import GuideWeights
from pyro_elbo_ext.terms.enumeration.marks import listed
from pyro_elbo_ext.terms.enumeration.rows import Row, Rows, model_alone
from pyro_elbo_ext.terms.terms import Site


def check_guide_draws(guide_trace: Trace, what: str) -> None:
    """Raise ValueError if the guide marks a site: each particle needs one log weight, which a sum has not."""
    for name, node in guide_trace.nodes.items():
        if is_marked_site(node):
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
    pair = model_alone(draw.model_trace, max_plate_nesting)
    rows = Rows({site.name: Row() for site in sites})
    pair.enter_sums(rows, GuideWeights(Trace(), {}), differentiable=differentiable)
    by_site = {site.name: rows.by_site[site.name] for site in sites if pair.depends_on_summed(site)}
    merged = list(sites)
    for group, log_q in rows.joint.items():
        members = [site for site in merged if site.name in group]
        top = min(members, key=lambda site: len(site.p["cond_indep_stack"]))  # type: ignore[index]
        log_p = [by_site.pop(site.name).log_p for site in members]
        by_site[listed(group)] = Row(_to_plates(log_p, log_q), (log_q,))
        at = merged.index(members[0])
        merged = [site for site in merged if site.name not in group]
        merged.insert(at, Site(listed(group), "latent", top.p, ()))
    return merged, by_site


def _to_plates(values: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """The sum of the members' values, over all dims that are not those of the plates they share."""
    return torch.stack([value.sum_to_size(like.shape) for value in values if value is not None]).sum(0)
