"""The model's factors, by plates, of a packed pair of traces: Pyro's own, with the sites named in its errors."""

from __future__ import annotations

from typing import Any

from pyro.infer.traceenum_elbo import _compute_model_factors
from pyro.poutine import Trace
from torch import Tensor

from pyro_elbo_ext.programs.nodes import enumerated_dims


def model_factors(model_trace: Trace, guide_trace: Trace) -> tuple[Any, ...]:
    """What Pyro's ``_compute_model_factors`` returns.

    Raises
    ------
    ValueError
        If summed-out sites, and what depends on them, have more than one scale.
    """
    try:
        found: tuple[Any, ...] = _compute_model_factors(model_trace, guide_trace)
    except ValueError as error:
        by_scale = _by_scale(model_trace)
        if "common poutine.scale" not in str(error) or len(by_scale) < 2:
            raise
        sites = ", ".join(f"'{name}' has {scale:g}" for scale, name in by_scale.items())
        raise ValueError(
            f"sites that are summed out, and those that depend on them, must have one scale: {sites}. A sum over the states "
            "of a site above a plate is over all its data at once, which a part of them does not tell. Put the site into "
            "the plate that subsamples (or the poutine.scale), call with all data, or give the guide a site of its name, "
            "marked to be summed over there."
        ) from error
    return found


def _by_scale(trace: Trace) -> dict[float, str]:
    """Each scale of sites that depend on enumerated ones, and the first site that has it."""
    found: dict[float, str] = {}
    for name, node in trace.nodes.items():
        if node["type"] == "sample" and enumerated_dims(node):
            scale = node["scale"]
            found.setdefault(float(scale.detach()) if isinstance(scale, Tensor) else float(scale), name)
    return found
