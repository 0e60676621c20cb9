"""Point masses: latent sites that the guide does not draw, so that it has no posterior there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from pyro.poutine import Trace

from pyro_elbo_ext.programs.nodes import is_point_mass, is_random
from pyro_elbo_ext.programs.randomness import kept
from pyro_elbo_ext.programs.running import trace_guide

_RUNS = 5  # a discrete value that is computed from a draw may come again by chance

REMEDY = (
    "For a posterior use a guide with a density, such as AutoNormal or fit(model, 'auto'); an AutoLaplaceApproximation "
    "makes one by guide.laplace_approximation(*args)."
)


def point_sites(
    model_trace: Trace,
    guide_trace: Trace,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[str, ...]:
    """Latent sites that have a density in the model, and are point masses in the guide, not computed from its draws.

    Where the guide draws something else, such as an autoguide's vector, it is run again, at other random numbers: a site
    whose value never changes is a point. Random numbers are left as they were.
    """
    names = tuple(
        name
        for name, node in model_trace.nodes.items()
        if is_random(node) and name in guide_trace and is_point_mass(guide_trace.nodes[name]["fn"])
        if node["value"].numel()  # without elements there is nothing to estimate
    )
    if not any(is_random(node) for node in guide_trace.nodes.values()):
        return names
    with kept(), torch.no_grad():
        pyro.set_rng_seed(int(torch.randint(2**31, ())))
        for _ in range(_RUNS):
            if not names:
                break
            again = trace_guide(guide, model, args, kwargs).nodes
            names = tuple(
                name
                for name in names
                if name in again and torch.equal(again[name]["value"], guide_trace.nodes[name]["value"])
            )
    return names


def point_estimate(names: Sequence[str]) -> str:
    """Says that the guide is a point estimate at these sites."""
    listed = ", ".join(map(repr, names))
    return f"the guide has no density: at {listed} it is a point mass, a point estimate that has no posterior. {REMEDY}"
