"""Latent sites, and whether somebody draws each: the guide, or who sums it out."""

from __future__ import annotations

from pyro.poutine import Trace

from pyro_elbo_ext.programs.nodes import is_latent


def latent_names(trace: Trace) -> list[str]:
    """Latent sites of a trace."""
    return [name for name, node in trace.nodes.items() if is_latent(node)]


def check_drawn(model_trace: Trace, guide_trace: Trace) -> None:
    """Raise ValueError if a latent site of the model is neither in the guide nor marked to be summed out."""
    for name in latent_names(model_trace):
        if name not in guide_trace and not model_trace.nodes[name]["infer"].get("enumerate"):
            raise ValueError(
                f"site '{name}' is latent in the model but the guide has no site of that name, so it has no log q. Add "
                f"pyro.sample('{name}', ...) to the guide, observe it in the model, or mark it infer={{'enumerate': "
                "'parallel'}} if it is discrete, to sum it out."
            )
