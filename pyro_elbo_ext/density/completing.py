"""Points of the flat unconstrained space, completed by draws of the discrete sites that are summed out of the density."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_elbo_ext.density.log_density import LogDensity
from pyro_elbo_ext.programs.randomness import untouched
from pyro_elbo_ext.terms.enumeration.at_draws import AtDraws
from pyro_elbo_ext.terms.enumeration.posterior_draws import completed, draw_states


def complete(density: LogDensity, u: Any, seed: int | None = None) -> dict[str, Tensor]:
    """Values of all latent and deterministic sites at ``u``, with a draw of what is summed out at each point.

    Parameters
    ----------
    density
        Of a model, with or without such sites.
    u
        Array or tensor of shape ``(*batch, dim)``.
    seed
        Of the draws; None: from torch's random numbers as they are.

    Returns
    -------
    dict
        Site to tensor of shape ``(*batch, *site shape)``, in the model's order: what ``density.constrain`` gives, discrete
        sites from their exact posterior given the others and the data, in the dtype of the model, and deterministic sites
        computed at these.

    Raises
    ------
    ValueError
        For discrete sites that cannot be drawn, named.
    """
    if not density.program.has_discrete:
        found = density.all_values(u)
        return {name: found[name] for name in density.names}
    points = torch.as_tensor(u)
    batch = points.shape[:-1]
    at = at_points(density, points.reshape(-1, density.dim))
    with untouched(seed), density.program.precision():
        values = completed(at, draw_states(at))
    return {name: value.reshape(batch + value.shape[1:]) for name, value in values.items()}


def at_points(density: LogDensity, points: Tensor) -> AtDraws:
    """The model at points of shape (S, dim), discrete sites summed out; to be used in the program's precision."""
    found, program = density.all_values(points), density.program
    with untouched(0), program.precision():
        return AtDraws(program.model, program.args, program.kwargs, {name: found[name] for name in density.layout})
