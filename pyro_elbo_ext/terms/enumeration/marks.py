"""Latent sites, their names, and whether somebody draws each: the guide, or who sums it out."""

from __future__ import annotations

from collections.abc import Sequence

from pyro.poutine import Trace

from pyro_elbo_ext.programs.nodes import is_latent

LISTED = 4  # names in a message, an attribute or a row, at most


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


def listed(names: Sequence[str]) -> str:
    """Names in a row, those in the middle left out where there are many."""
    if len(names) <= LISTED:
        return ", ".join(names)
    return f"{names[0]}, {names[1]}, ..., {names[-1]}"
