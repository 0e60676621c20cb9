"""Draws of the prior, and of a guide, as points of the flat unconstrained space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to

from pyro_elbo_ext.density.log_density import LogDensity
from pyro_elbo_ext.programs.randomness import isolated

CHECKED = 3  # draws that are taken to unconstrained space by the model itself too
MOST = 200  # draws, where only the model can
RADIUS = 2.0  # of the uniform numbers in place of a site that has no draws


def prior_points(density: LogDensity, count: int, seed: int) -> tuple[Tensor, list[str]]:
    """Draws of the latent sites from their prior, whatever the data are.

    Parameters
    ----------
    density
        Of the model.
    count
        Number of draws; each is a run of the model.
    seed
        Of the draws.

    Returns
    -------
    tuple of Tensor and list of str
        Points of shape (count, dim), and the sites that cannot be drawn, such as improper ones, whose coordinates are
        uniform on (-2, 2), as is a coordinate that is not finite.
    """
    rows: list[Tensor] = []
    without: set[str] = set()

    def supply(msg: Any, transform: Any) -> Tensor:
        name = msg["name"]
        place = density.layout[name]
        u = torch.empty(place.shape, dtype=torch.float64).uniform_(-RADIUS, RADIUS).to(place.device)
        try:
            drawn = transform.inv(msg["fn"].sample()).to(u)
            if drawn.numel() != u.numel():  # below a summed-out site there is one for each of its states
                drawn = drawn.reshape(-1, *u.shape)[0]
            u = torch.where(drawn.isfinite(), drawn, u)
        except NotImplementedError:
            without.add(name)
        rows[-1][place.start : place.stop] = u.reshape(-1)
        return u if density.float64 else u.to(place.dtype)

    with isolated(seed), torch.no_grad():
        for _ in range(count):
            rows.append(torch.empty(density.dim, dtype=torch.float64))
            density.program.run(supply)
    return torch.stack(rows), sorted(without)


def guide_points(density: LogDensity, draws: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A guide's draws on unconstrained space.

    Parameters
    ----------
    density
        Of the model.
    draws
        Every continuous latent site to draws, shape ``(S, *site)``.

    Returns
    -------
    tuple of Tensor
        Points of shape (T, dim), and which draws these are, shape (T,): all whose points are finite, or so many of the first
        ones where a site's support depends on others, so that only runs of the model tell the point.
    """
    count = len(next(iter(draws.values())))
    columns = []
    for name, place in density.layout.items():
        transform = biject_to(density.program.sites[name]["fn"].support)
        u = transform.inv(draws[name].to(place.device).double())
        columns.append(u.reshape(count, -1).cpu())
    points = torch.cat(columns, -1)
    which = points.isfinite().all(-1).nonzero()[:, 0]
    for index in which[:CHECKED]:
        if not torch.allclose(points[index], _by_model(density, draws, int(index)), rtol=1e-4, atol=1e-4):
            which = which[:MOST]
            points[which] = torch.stack([_by_model(density, draws, int(index)) for index in which])
            which = which[points[which].isfinite().all(-1)]
            break
    return points[which], which


def _by_model(density: LogDensity, draws: Mapping[str, Tensor], index: int) -> Tensor:
    try:
        return density.unconstrain({name: draws[name][index] for name in density.layout})
    except ValueError:  # on the border of the support, by rounding
        return torch.full((density.dim,), torch.nan, dtype=torch.float64)
