"""What the sites of model and guide allow: whether there are importance weights, and which plates have their own."""

from __future__ import annotations

import numpy as np
import torch
from pyro.poutine import Trace
from torch.distributions import biject_to

from pyro_elbo_ext.programs.nodes import Node, is_point_mass, is_random
from pyro_elbo_ext.terms.terms import Site


def _dims(node: Node) -> int:
    """Number of a site's free dimensions: those of its unconstrained space, or of its values where it is discrete."""
    shape = node["value"].shape
    if not node["fn"].support.is_discrete:
        shape = biject_to(node["fn"].support).inverse_shape(shape)
    return int(np.prod(shape, dtype=int))


def check_density(model_trace: Trace, guide_trace: Trace) -> None:
    """Raise a ValueError unless the guide has a density on the model's latent sites and on nothing else."""
    latents = {name: node for name, node in model_trace.nodes.items() if is_random(node)}
    drawn = {name: node for name, node in guide_trace.nodes.items() if is_random(node)}
    for name, node in drawn.items():
        scale = torch.as_tensor(node["scale"])
        if bool((scale != 1).any()):
            raise ValueError(
                f"guide site '{name}' has scale {node['scale']}: what is scaled is no density, so there is no importance "
                "weight. Scale the model instead."
            )
    wanted, there = sum(map(_dims, latents.values())), sum(map(_dims, drawn.values()))
    if wanted > there:
        points = [repr(name) for name in latents if is_point_mass(guide_trace.nodes[name]["fn"])]
        raise ValueError(
            f"the guide draws {there} of the {wanted} dimensions of the latent sites: at {', '.join(points)} it is a "
            "point mass, computed from other draws, which has no density and so no importance weight. Use a guide that "
            "draws each site, such as AutoNormal."
        )
    if there > wanted:
        extra = [repr(name) for name in drawn if name not in latents]
        raise ValueError(
            f"the guide draws {there} dimensions for the {wanted} of the model: {', '.join(extra)} is an auxiliary draw "
            "that the model has no density for, so that log p - log q is no importance weight. Integrate it out, or give "
            "the model a site of that name."
        )


def factors(sites: list[Site]) -> tuple[dict[str, tuple[int, int, frozenset[str]]], dict[str, str]]:
    """Plates that all draws are in: dim, size and sites; and why others do not do."""
    frames = {
        frame.name: frame
        for site in sites
        for node in ((site.p, *site.q) if site.p is not None else site.q)
        for frame in node["cond_indep_stack"]
    }
    found: dict[str, tuple[int, int, frozenset[str]]] = {}
    reasons: dict[str, str] = {}
    for name, frame in frames.items():
        if not frame.vectorized:
            reasons[name] = "it is sequential (for i in pyro.plate(...))"
            continue
        inside = frozenset(
            site.name
            for site in sites
            if all(
                any(f.name == name for f in node["cond_indep_stack"])
                for node in ((site.p, *site.q) if site.p is not None else site.q)
            )
        )
        outside = [repr(site.name) for site in sites if site.kind != "observed" and site.name not in inside]
        if outside:
            reasons[name] = f"latent site {', '.join(outside)} of model or guide is outside it"
        elif not any(site.kind != "observed" for site in sites):
            reasons[name] = "there is no latent site"
        else:
            found[name] = (frame.dim, frame.size, inside)
    return found, reasons
