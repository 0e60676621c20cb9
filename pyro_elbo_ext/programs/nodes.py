"""Sites of a Pyro trace, and what tells their kinds apart."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import Delta, MaskedDistribution, MaskedMixture, Unit
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch.distributions import Distribution, Independent

Node = dict[str, Any]  # one site of a Pyro trace
PARTICLE_PLATE = "num_particles_vectorized"  # Pyro's name for it


def is_subsample(node: Node) -> bool:
    """Whether it is the indices of a plate."""
    return node["type"] == "sample" and site_is_subsample(node)


def is_latent(node: Node) -> bool:
    """Whether it is drawn and not observed; in the guide, point masses too."""
    return node["type"] == "sample" and not node["is_observed"] and not site_is_subsample(node)


def is_marked_site(node: Node) -> bool:
    """Whether it is latent and marked for enumeration (``infer={'enumerate': ...}``)."""
    return is_latent(node) and bool(node["infer"].get("enumerate"))


def plate_nesting(*traces: Trace) -> int:
    """How many dims from the right plates have, in runs without enumeration."""
    stacks = [node["cond_indep_stack"] for of in traces for node in of.nodes.values() if node["type"] == "sample"]
    return -min([frame.dim for stack in stacks for frame in stack if frame.vectorized], default=0)


def enumerated_dims(node: Node) -> frozenset[int]:
    """The dims, from the right, along which a site has values of enumerated sites, its own included."""
    return frozenset(node["infer"].get("_dim_to_id", ()))


def is_deterministic(node: Node) -> bool:
    """Whether a site is a value that the program has computed: of ``pyro.deterministic``, or of a reparameterized site.

    ``poutine.reparam`` leaves an observed point mass that counts for nothing in the place of the site, without the mark.
    """
    if node["type"] != "sample":
        return False
    fn = node["fn"]
    return bool(node["infer"].get("_deterministic")) or (
        node["is_observed"]
        and isinstance(fn, MaskedDistribution)
        and fn._mask is False
        and isinstance(innermost(fn), Delta)
    )


def is_data(node: Node) -> bool:
    """Whether an observed site is data: neither a deterministic one nor ``pyro.factor``."""
    return node["is_observed"] and not is_deterministic(node) and not isinstance(node["fn"], Unit)


def is_random(node: Node) -> bool:
    """Whether a node of model or guide is a latent draw that has a density; in the guide, not a point mass."""
    return is_latent(node) and not is_point_mass(node["fn"])


def is_point_mass(fn: Any) -> bool:
    """Whether a distribution is a Delta, if only for some elements, through ``to_event``, ``mask``, transforms and so on."""
    fn = innermost(fn)
    if isinstance(fn, MaskedMixture):
        return is_point_mass(fn.component0) or is_point_mass(fn.component1)
    return isinstance(fn, Delta)


def innermost(fn: Any) -> Any:
    """The distribution that others are wrapped around."""
    while not isinstance(fn, Delta) and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def is_masked(node: Node) -> bool:
    """Whether some values of a site may not count."""
    fn, masked = node["fn"], node["mask"] is not None
    while not masked and hasattr(fn, "base_dist"):
        masked, fn = isinstance(fn, MaskedDistribution), fn.base_dist
    return masked


def says_what_it_takes(fn: Any) -> bool:
    """Whether a distribution has rules of its own for the shapes of values, as a time series of any length."""
    return type(innermost(fn))._validate_sample is not Distribution._validate_sample


def base_distribution(fn: Any) -> str:
    """Name of a distribution's class, through ``to_event``, ``expand`` and ``mask``, for messages."""
    while isinstance(fn, Independent | MaskedDistribution | ExpandedDistribution):
        fn = fn.base_dist
    return type(fn).__name__


def tensor_options(fn: Any) -> tuple[torch.dtype, torch.device]:
    """The floating dtype and device of a distribution's parameters, or torch's defaults if it has none."""
    while fn is not None:
        for value in vars(fn).values():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                return value.dtype, value.device
        fn = getattr(fn, "base_dist", None)
    return torch.get_default_dtype(), torch.get_default_device()
