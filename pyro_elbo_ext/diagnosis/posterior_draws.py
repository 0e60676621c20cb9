"""Draws of the posterior that rest on the model alone: chains that start at draws of the guide and forget it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_elbo_ext.density import LogDensity
from pyro_elbo_ext.diagnosis.many_chains import CONVERGED, run_chains, split_rhat
from pyro_elbo_ext.inference_data.export import dataset_of
from pyro_elbo_ext.inference_data.names import by_site
from pyro_elbo_ext.mcmc import run_nuts
from pyro_elbo_ext.programs.randomness import isolated

CHAINS = 128
KEPT = 100  # draws of each chain
FEWEST = 16  # chains that make sense
LARGE = 40_000  # numbers computed for one density, from which on compiling it takes less time than it saves
NUMBERS = 15_000_000  # kept, of all sites
NUTS: dict[str, Any] = {
    "num_samples": 500,
    "warmup": 500,
    "chains": 4,
}  # where the model cannot be run at many points at once


class CannotSample(Exception):
    """There are no draws of the posterior; the message says why."""


class PosteriorDraws(NamedTuple):
    """What the chains gave.

    Attributes
    ----------
    values : dict
        Latent and deterministic sites to arrays of shape ``(chain, draw, *site)``.
    rhat : float
        The largest of the unconstrained coordinates.
    worst : str
        The coordinate that has it.
    method : str
        How they were made.
    """

    values: dict[str, np.ndarray]
    rhat: float
    worst: str
    method: str

    @property
    def converged(self) -> bool:
        """Whether all chains agree."""
        return self.rhat < CONVERGED


def draw_posterior(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    density: LogDensity | str,
    guide_draws: Mapping[str, Tensor],
    seed: int,
    progress: bool,
) -> PosteriorDraws:
    """Chains of Hamiltonian Monte Carlo from the guide's draws, many at once; else NUTS.

    Parameters
    ----------
    density
        Of the model, not compiled, or why it has none.
    guide_draws
        Every latent site to draws, shape ``(S, *site)``.

    Raises
    ------
    CannotSample
        If the model has no density on unconstrained space that can be traced and differentiated, or if too few of the
        guide's draws have a finite one.
    """
    if isinstance(density, str):
        raise CannotSample(density)
    with isolated(seed):
        at_once = density.batched
        if density.traced and (density.size > LARGE or not at_once):
            density.compile()
    if not (at_once or density.compiled):
        return _by_nuts(model, args, kwargs, seed, progress)
    start = _started(density, guide_draws)
    generator = torch.Generator().manual_seed(seed)
    with isolated(seed):
        found = run_chains(density, start, KEPT, generator, progress=progress)
        points = found.points
        one = sum(value.size for value in density.constrain(points[0, 0].numpy()).values())
        thin = max(1, math.ceil(one * points.shape[0] * points.shape[1] / NUMBERS))
        values = density.constrain(points[:, ::thin].numpy())
    rhat = np.where(np.isnan(found.rhat), np.inf, found.rhat)
    return PosteriorDraws(
        values,
        float(rhat.max()),
        density.coordinates[int(rhat.argmax())],
        "Hamiltonian Monte Carlo from the guide's draws",
    )


def _started(density: LogDensity, guide_draws: Mapping[str, Tensor]) -> Tensor:
    """Unconstrained points of the guide's draws where the density is finite."""
    points: list[Tensor] = []
    count = len(next(iter(guide_draws.values())))
    for index in range(count):
        values = {name: guide_draws[name][index] for name in density.layout}
        try:
            point = density.unconstrain(values)
        except ValueError:  # on the border of the support, by rounding: not a place to start from
            continue
        value, gradient = density.value_and_grad(point)
        if bool(torch.isfinite(value)) and bool(torch.isfinite(gradient).all()):
            points.append(point)
        if len(points) == CHAINS:
            break
        if index >= 2 * CHAINS and len(points) < FEWEST:
            break
    if len(points) < FEWEST:
        raise CannotSample(
            f"the model's log density or its gradient is not finite at all but {len(points)} of the guide's draws tried"
        )
    return torch.stack(points)


def _by_nuts(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], seed: int, progress: bool
) -> PosteriorDraws:
    try:
        data = dataset_of(run_nuts(model, *args, **NUTS, seed=seed, progress=progress, **kwargs))
    except (ValueError, torch.linalg.LinAlgError) as error:
        raise CannotSample(str(error)) from error
    values = {site: variable.transpose("chain", "draw", ...).values for site, variable in by_site(data).items()}
    worst, which = 0.0, ""
    for name, array in values.items():
        flat = array.reshape(*array.shape[:2], math.prod(array.shape[2:]))
        rhat = float(np.nanmax(split_rhat(flat), initial=0.0))
        if rhat > worst:
            worst, which = rhat, name
    return PosteriorDraws(values, worst, which, "NUTS")
