"""What an export needs of a model whose marked sites are summed out: their draws, densities, pointwise log likelihoods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from pyro.poutine import Trace
from torch import Tensor
from tqdm import tqdm

from pyro_elbo_ext.inference_data.draws import as_integers, to_numpy
from pyro_elbo_ext.inference_data.labels import Labels
from pyro_elbo_ext.programs.densities import score_parts
from pyro_elbo_ext.programs.given import check_full
from pyro_elbo_ext.programs.nodes import is_latent, is_marked_site
from pyro_elbo_ext.programs.running import trace_guide, trace_replayed
from pyro_elbo_ext.terms.enumeration.at_draws import AtDraws
from pyro_elbo_ext.terms.enumeration.marks import check_drawn, latent_names
from pyro_elbo_ext.terms.enumeration.pointwise import Together, pointwise
from pyro_elbo_ext.terms.enumeration.posterior_draws import completed, draw_states, log_joint


class GuideDraws(NamedTuple):
    """Draws of the guide's sites that are the model's too, and their log densities under the guide."""

    latents: dict[str, Tensor]
    log_q: NDArray[Any]
    first: tuple[Trace, Trace]


def draw_guide(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    size: int,
    progress: bool,
) -> GuideDraws:
    """Run the guide alone, draw by draw; sites that it marks for enumeration are drawn like any other."""
    parts: dict[str, list[Tensor]] = {}
    log_q = np.zeros(size)
    for index in tqdm(range(size), desc="draws of the guide", disable=not progress):
        trace = trace_guide(guide, model, args, kwargs)
        if index == 0:
            first = trace_replayed(model, guide, trace, args, kwargs), trace
            check_full(trace)
            check_full(first[0])
            check_drawn(*first)
            parts = {name: [] for name in latent_names(first[0]) if name in trace}
        for name, values in parts.items():
            values.append(trace.nodes[name]["value"].detach())
        for name, node in trace.nodes.items():
            if is_latent(node):
                term = float(to_numpy(score_parts(node, trace).log_prob).sum(dtype=np.float64))
                if np.isnan(term):
                    raise ValueError(f"the log density of site '{name}' in the guide is NaN at draw {index}")
                log_q[index] += term
    return GuideDraws({name: torch.stack(values) for name, values in parts.items()}, log_q, first)


class SummedOut:
    """A model at draws of its latent sites but those that are summed out, and one draw of these at each.

    Attributes
    ----------
    states : dict of str to Tensor
        Summed-out site to its draws, in the model's dtype.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        draws: dict[str, Tensor],
        size: int,
    ) -> None:
        self.at = AtDraws(model, args, kwargs, draws, size)
        self.states = draw_states(self.at)

    def posterior(self) -> dict[str, NDArray[Any]]:
        """All latent and deterministic sites, in the model's order; what is marked for enumeration as integers."""
        nodes = self.at.reference.nodes
        return {
            name: as_integers(to_numpy(value)) if is_marked_site(nodes[name]) else to_numpy(value)
            for name, value in completed(self.at, self.states).items()
        }

    def log_p(self) -> NDArray[Any]:
        """Log joint density of data and draws, discrete sites summed out, scaled and masked, shape (S,)."""
        return to_numpy(log_joint(self.at))

    def log_likelihoods(self) -> list[tuple[Together, NDArray[Any]]]:
        """Pointwise log likelihoods of what depends on the summed-out sites.

        Raises
        ------
        ValueError
            Where there are none, with the reason and what to pass.
        """
        try:
            return [(together, to_numpy(value)) for together, value in pointwise(self.at)]
        except (ValueError, NotImplementedError) as error:
            raise ValueError(f"{error}\nPass log_likelihood=False to do without pointwise log likelihoods.") from error


def label_likelihoods(
    labels: Labels,
    arrays: Mapping[str, NDArray[Any]],
    counts: Mapping[str, NDArray[np.bool_]],
    nodes: Mapping[str, Any],
    attrs: Mapping[str, Any] | None,
    summed_out: Sequence[tuple[Together, NDArray[Any]]],
) -> xr.Dataset:
    """Log likelihoods of single sites, and those from which others are summed out, which say what they are of.

    Arrays have shape ``(chain, draw, ...)``; see `Labels.pointwise`.
    """
    arrays, counts, nodes = dict(arrays), dict(counts), dict(nodes)
    said = {}
    for together, array in summed_out:
        name = together.name
        while name in arrays:
            name += "_"
        arrays[name], counts[name], nodes[name] = array, to_numpy(together.counts), together.node
        said[labels.variable(name)] = together.said()
    group = labels.pointwise(arrays, counts, nodes, attrs)
    for variable, sentence in said.items():
        if variable in group:  # not if all is masked
            group[variable].attrs["of"] = sentence
    return group
