"""Draws of a posterior with several modes: chains in each, put together by the modes' weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from pyro_elbo_ext.automatic.modes import Mode, Modes
from pyro_elbo_ext.density import LogDensity
from pyro_elbo_ext.density.points import guide_points
from pyro_elbo_ext.inference_data.export import dataset_of, groups_of, to_arviz
from pyro_elbo_ext.inference_data.names import by_site
from pyro_elbo_ext.mcmc import run_nuts

LEAST = 0.01  # weight of a mode that counts
MOST = 12  # modes
STRAYED = 0.01  # share of a chain's draws that may lie nearer to another mode
FEWEST = 2  # chains of a mode that have stayed there


class CannotTell(Exception):
    """Chains and weights do not give draws of the posterior; the message says why."""


class _About:
    """Draws about a mode, as a start of chains."""

    def __init__(self, density: LogDensity, mode: Mode) -> None:
        assert mode.draws is not None
        self.density, self._points = density, mode.draws

    def draws(self, count: int, *, seed: int) -> dict[str, Any]:
        """As of a result of `fit`."""
        return self.density.constrain(torch.from_numpy(self.unconstrained_draws(count, seed=seed)))

    def unconstrained_draws(self, count: int, *, seed: int) -> NDArray[np.float64]:
        """The same in the density's coordinates."""
        return np.asarray(self._points[np.random.default_rng(seed).integers(len(self._points), size=count)])


def chains_by_mode(density: LogDensity, modes: Modes, **options: Any) -> tuple[list[Any], list[Mode]]:
    """ArviZ data of `run_nuts` for each mode that counts, of chains that start about it and stay there.

    Raises
    ------
    CannotTell
        If a mode's weight is not known, or if chains go from one to another.
    """
    kept = [mode for mode in modes.modes if mode.weight >= LEAST]
    if len(kept) > MOST:
        raise CannotTell(f"there are {len(kept)} modes")
    unknown = [mode for mode in kept if mode.draws is None]
    if unknown:
        raise CannotTell(f"the weights of {len(unknown)} of {len(kept)} modes are not known")
    found = []
    for number, mode in enumerate(kept):
        data = run_nuts(density, start=_About(density, mode), **options)
        sites = {
            name: torch.from_numpy(variable.transpose("chain", "draw", ...).values).flatten(0, 1)
            for name, variable in by_site(dataset_of(data)).items()
            if name in density.layout
        }
        lengths = dataset_of(data).sizes
        points, which = guide_points(density, sites)
        away = np.zeros(lengths["chain"] * lengths["draw"])
        away[which.numpy()] = np.argmin([_distance(other, points.numpy()) for other in kept], 0) != number
        strayed = away.reshape(lengths["chain"], lengths["draw"]).mean(1)
        stayed = np.flatnonzero(strayed <= STRAYED)  # the others left while they looked for a step size
        if len(stayed) < FEWEST:
            raise CannotTell(f"{strayed.mean():.1%} of the draws of the chains in one mode are in another")
        found.append(data if len(stayed) == len(strayed) else _chosen(data, stayed))
    fewest = min(dataset_of(data).sizes["chain"] for data in found)
    return [_chosen(data, np.arange(fewest)) for data in found], kept


def _chosen(data: Any, chains: NDArray[np.int_]) -> Any:
    groups = {group: dataset_of(data, group) for group in groups_of(data)}
    for name, group in groups.items():
        if "chain" in group.dims:
            groups[name] = group.isel(chain=chains).assign_coords(chain=np.arange(len(chains)))
    return to_arviz(groups)


def _distance(mode: Mode, points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Squared, in the mode's own sds, less the log of its height: what a Gaussian there says."""
    gaussian = mode.gaussian
    away = points - gaussian.loc
    white = away / gaussian.factor if gaussian.diagonal else np.linalg.solve(gaussian.factor, away.T).T
    return np.asarray((white**2).sum(1) - 2 * mode.log_density)


def put_together(chains: list[Any], modes: list[Mode]) -> Any:
    """One set of chains, in each of which each mode has as many draws as its weight says."""
    total = sum(mode.weight for mode in modes)
    length = dataset_of(chains[0]).sizes["draw"]
    counts = [max(1, round(length * mode.weight / total)) for mode in modes]
    groups: dict[str, xr.Dataset] = {}
    for group in groups_of(chains[0]):
        parts = [dataset_of(data, group) for data in chains]
        if "draw" not in parts[0].dims:
            groups[group] = parts[0]
            continue
        parts = [
            part.isel(draw=np.linspace(0, length - 1, count).astype(int))
            for part, count in zip(parts, counts, strict=True)
        ]
        whole = xr.concat(parts, "draw", join="override", combine_attrs="override")
        groups[group] = whole.assign_coords(draw=np.arange(sum(counts)))
    return to_arviz(groups)


def error_by_weights(chains: list[Any], modes: list[Mode]) -> float:
    r"""Largest standard error of a mean, in sds, or of a log sd that the weights' own errors make.

    With means :math:`m_k` and second moments about the whole's mean :math:`q_k` of the modes, errors :math:`\sigma_k` of
    their weights move the mean by :math:`\sum_k \sigma_k m_k` and the variance by :math:`\sum_k \sigma_k q_k`.
    """
    weights = np.array([mode.weight for mode in modes])
    weights, errors = weights / weights.sum(), np.array([mode.weight_se for mode in modes])
    worst = 0.0
    datasets = [dataset_of(data) for data in chains]
    for name in datasets[0].data_vars:
        values = [part[name].transpose("chain", "draw", ...).values.astype(float) for part in datasets]
        flat = [value.reshape(math.prod(value.shape[:2]), -1) for value in values]
        means = np.stack([value.mean(0) for value in flat])
        mean = weights @ means
        squares = np.stack([((value - mean) ** 2).mean(0) for value in flat])
        variance = weights @ squares
        varies = variance > 1e-24
        of_mean = np.sqrt((errors**2) @ (means - mean) ** 2)[varies] / np.sqrt(variance[varies])
        of_log_sd = np.sqrt((errors**2) @ (squares - variance) ** 2)[varies] / (2 * variance[varies])
        worst = max(worst, *of_mean, *of_log_sd, 0.0)
    return float(worst)
