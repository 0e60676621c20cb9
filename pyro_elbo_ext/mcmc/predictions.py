"""What a model makes of the draws of NUTS: log likelihoods of its data, and data drawn anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import xarray as xr
from numpy.typing import NDArray
from tqdm import tqdm

from pyro_elbo_ext.density import LogDensity
from pyro_elbo_ext.density.pointwise import log_likelihoods, of_summed_out
from pyro_elbo_ext.inference_data.draws import Columns
from pyro_elbo_ext.inference_data.labels import Labels
from pyro_elbo_ext.inference_data.summed_out import label_likelihoods
from pyro_elbo_ext.programs.given import data_of, run_given
from pyro_elbo_ext.programs.nodes import is_latent
from pyro_elbo_ext.programs.randomness import isolated


class Predictions(NamedTuple):
    """The groups that are wanted beside the posterior."""

    log_likelihood: bool
    posterior_predictive: bool

    def check(self, density: LogDensity, complete: bool) -> None:
        """Raise ValueError, before sampling, where they cannot be had."""
        for name in self._fields:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.posterior_predictive and density.program.has_discrete and not complete:
            raise ValueError("posterior_predictive=True needs draws of all latent sites: leave out discrete=False")
        if self.log_likelihood:
            try:
                of_summed_out(density, density.program.points[0].numpy()[None])
            except (ValueError, NotImplementedError) as error:
                raise ValueError(f"{error}\nPass log_likelihood=False to do without log likelihoods.") from error

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
            summed_out = of_summed_out(density, points)
            found = log_likelihoods(density, points, summed_out)
            arrays, counts = ({name: part[i] for name, part in found.items()} for i in range(2))
            groups["log_likelihood"] = label_likelihoods(labels, arrays, counts, sites, None, summed_out)
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
