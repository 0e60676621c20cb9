"""What a model makes of the draws of NUTS: log likelihoods of its data, and data drawn anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import xarray as xr
from numpy.typing import NDArray
from tqdm import tqdm

from pyro_elbo_ext.density import LogDensity
from pyro_elbo_ext.density.pointwise import log_likelihoods
from pyro_elbo_ext.inference_data.draws import Columns
from pyro_elbo_ext.inference_data.labels import Labels
from pyro_elbo_ext.programs.given import data_of, run_given
from pyro_elbo_ext.programs.nodes import is_latent
from pyro_elbo_ext.programs.randomness import isolated


class Predictions(NamedTuple):
    """The groups that are wanted beside the posterior."""

    log_likelihood: bool
    posterior_predictive: bool

    def check(self, density: LogDensity) -> None:
        """Raise ValueError, before sampling, where they cannot be had."""
        for name in self._fields:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        marked = [
            name for name, site in density.program.sites.items() if is_latent(site) and site["infer"].get("enumerate")
        ]
        for name in self._fields:
            if getattr(self, name) and marked:
                raise ValueError(
                    f"{name}=True needs draws of all latent sites, but {marked} are summed out: leave it out"
                )

    def groups(
        self,
        density: LogDensity,
        points: NDArray[Any],
        values: Mapping[str, NDArray[Any]],
        labels: Labels,
        seed: int,
        progress: bool,
    ) -> dict[str, xr.Dataset]:
        """The groups, at unconstrained ``points`` of shape (chain, draw, dim) and the sites' ``values`` there."""
        sites, groups = density.program.sites, {}
        if self.log_likelihood:
            found = log_likelihoods(density, points)
            arrays, counts = ({name: part[i] for name, part in found.items()} for i in range(2))
            groups["log_likelihood"] = labels.pointwise(arrays, counts, sites)
        if self.posterior_predictive:
            drawn = _redrawn(density, points.shape[0] * points.shape[1], values, seed, progress)
            groups["posterior_predictive"] = labels.dataset(drawn.by_chain(len(points)), sites)
        return {name: group for name, group in groups.items() if group.variables}


def _redrawn(density: LogDensity, size: int, values: Mapping[str, NDArray[Any]], seed: int, progress: bool) -> Columns:
    """Observed sites drawn anew at each draw."""
    program, drawn = density.program, Columns(size)
    latents = {}
    for name, site in program.sites.items():
        # what is missing of a partly observed site has its draws in the completed one
        source = name if name in values else name.removesuffix("_unobserved")
        if is_latent(site) and source in values:
            like = site["value"]
            latents[name] = torch.as_tensor(values[source], dtype=like.dtype, device=like.device).flatten(0, 1)
    with isolated(seed), torch.no_grad(), program.precision():
        for index in tqdm(range(size), desc="predictions", disable=not progress):
            given = {name: value[index] for name, value in latents.items()}
            trace = run_given(
                program.model, program.args, program.kwargs, given, redraw=True, option="posterior_predictive"
            )
            for name, value in data_of(trace).items():
                drawn.put(index, name, value)
    return drawn
