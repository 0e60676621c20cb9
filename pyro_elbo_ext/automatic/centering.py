"""Hierarchies centred in part, by element: where data say little of a group, its effect is drawn in units of their spread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor
from torch.distributions import constraints

from pyro_elbo_ext.automatic.gaussian import Gaussian
from pyro_elbo_ext.density import LogDensity

CENTRED = 0.95  # centredness of all elements from which on a site is left as it is


def centredness(density: LogDensity, gaussian: Gaussian) -> dict[str, Tensor]:
    r"""How far each element of a location-scale site is to be centred, from a Gaussian on the centred coordinates.

    With ``x ~ Normal(loc, scale)`` given other latent sites, ``x`` itself is one coordinate to choose (1: centred), and
    ``(x - loc) / scale`` another (0: not centred). Between them, that with the least to do with ``loc`` and ``scale`` has

    .. math:: c = 1 - \frac{\operatorname{Var}(x \mid \text{all others, data})}{\text{scale}^2},

    the share of the information on ``x`` that the data give. It is taken at the Gaussian's mean, where the conditional
    variance is one over the precision's diagonal.

    Parameters
    ----------
    density
        The model's log density.
    gaussian
        One that was fitted to it.

    Returns
    -------
    dict
        Each real location-scale site whose parameters hang on another latent site, and of which some element is better not
        centred, to a tensor of its shape.

    References
    ----------
    Papaspiliopoulos, Roberts, Sköld (2007), A general framework for the parametrization of hierarchical models. Gorinova,
    Moore, Hoffman (2020), Automatic reparameterisation of probabilistic programs.
    """
    here, _ = density.program.run_at(torch.from_numpy(gaussian.loc))
    away, _ = density.program.run_at(torch.from_numpy(gaussian.loc + 0.1 * gaussian.sd))
    conditional = (
        gaussian.factor**2
        if gaussian.diagonal
        else 1 / (np.linalg.inv(gaussian.factor) ** 2).sum(0)  # of the precision's diagonal
    )
    found = {}
    for name, place in density.layout.items():
        bases = [_location_scale(trace.nodes[name]["fn"]) for trace in (here, away)]
        if None in bases:
            continue
        pairs = [(base.loc, base.scale) for base in bases if base is not None]
        if all(torch.equal(a, b) for a, b in zip(*pairs, strict=True)):
            continue
        variance = torch.from_numpy(conditional[place.start : place.stop].reshape(place.shape))
        scale = pairs[0][1].detach().cpu().double().expand(place.shape)
        share = (1 - variance / scale**2).clamp(0.0, 1.0).to(pairs[0][1])
        if bool((share < CENTRED).any()):
            found[name] = share
    return found


def centred_in_part(model: Callable[..., Any], shares: Mapping[str, Tensor]) -> Callable[..., Any]:
    """The same model with sites ``name_decentered`` in the place of these, which become deterministic."""

    return poutine.reparam(model, config={name: LocScaleReparam(share) for name, share in shares.items()})


def _location_scale(fn: Any) -> Any:
    """The distribution of real numbers by location and scale beneath, None if it is another."""
    while hasattr(fn, "base_dist"):
        if type(fn).__name__ not in ("Independent", "ExpandedDistribution", "MaskedDistribution"):
            return None
        fn = fn.base_dist
    arguments = getattr(fn, "arg_constraints", {})
    if fn.support is not constraints.real or not {"loc", "scale"} <= set(arguments):
        return None
    return fn
