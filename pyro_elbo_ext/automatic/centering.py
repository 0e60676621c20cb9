"""Hierarchies centred in part, by element: where data say little of a group, its effect is drawn in units of the spread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor
from torch.distributions import constraints

from pyro_elbo_ext.automatic.gaussian import Gaussian, standard_draws
from pyro_elbo_ext.density import LogDensity

DRAWS = 64  # for the spread of log scales
LEAST = 0.05  # share below which an element is not centred at all
CENTRED = 0.95  # centredness of all elements from which on a site is left as it is


def centredness(density: LogDensity, gaussian: Gaussian) -> dict[str, Tensor]:
    r"""How far each element of a location-scale site is to be centred, from a Gaussian on the centred coordinates.

    With ``x ~ Normal(loc, scale)`` given other latent sites, ``x`` itself is one coordinate to choose (1: centred), and
    ``(x - loc) / scale`` another (0: not centred). Between them, that with the least to do with ``loc`` and ``scale`` is
    centred by the share of the information on ``x`` that the data give,

    .. math:: c = 1 - \frac{\operatorname{E} \text{scale}^{-2}}{\operatorname{Var}(x \mid \text{all others, data})^{-1}},

    both under the Gaussian: the latter is on the diagonal of its precision, the former from the mean and the spread of the
    log scale over `DRAWS` draws.

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
    precision = (
        gaussian.factor**-2.0 if gaussian.diagonal else (np.linalg.inv(gaussian.factor) ** 2).sum(0)  # its diagonal
    )
    noise = standard_draws(np.random.default_rng(0), DRAWS, density.dim, diagonal=True)
    points = torch.from_numpy(np.concatenate([gaussian.loc[None], gaussian.at(noise)]))
    traces = [density.program.run_at(point)[0] for point in points]
    found = {}
    for name, place in density.layout.items():
        bases = [_location_scale(trace.nodes[name]["fn"]) for trace in traces]
        if None in bases or any(base.batch_shape != place.shape for base in bases):  # as below a summed-out site
            continue
        loc, log_scale = (
            torch.stack([value.detach().cpu().double().expand(place.shape) for value in values])
            for values in ([base.loc for base in bases], [base.scale.log() for base in bases])
        )
        if bool((loc == loc[0]).all()) and bool((log_scale == log_scale[0]).all()):
            continue
        prior = (-2 * log_scale[1:].mean(0) + 2 * log_scale[1:].var(0)).exp()
        of_all = torch.from_numpy(precision[place.start : place.stop].reshape(place.shape))
        share = (1 - prior / of_all).clamp(0.0, 1.0)
        share = torch.where(share < LEAST, 0.0, share)
        if bool((share < CENTRED).any()):
            found[name] = share.to(bases[0].loc)
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
