"""Draws of a guide, and the model at them, collected for export."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pyro.poutine import Trace
from tqdm import tqdm

from pyro_elbo_ext.inference_data.draws import Columns, to_numpy
from pyro_elbo_ext.inference_data.model_runs import ModelRuns
from pyro_elbo_ext.inference_data.summed_out import SummedOut, draw_guide
from pyro_elbo_ext.programs.densities import log_prob, score_parts
from pyro_elbo_ext.programs.faults import NO_LATENT, cause, check_data
from pyro_elbo_ext.programs.given import check_full, values_of
from pyro_elbo_ext.programs.nodes import is_latent
from pyro_elbo_ext.programs.points import point_sites
from pyro_elbo_ext.programs.running import checked_pair, trace_pair
from pyro_elbo_ext.terms.enumeration.traces import is_marked
from pyro_elbo_ext.terms.terms import latent_values, read_sites

Program = Callable[..., Any]
Check = Callable[[Mapping[str, Any]], None]


class GuideRuns(NamedTuple):
    """What was collected; arrays have the draws in front.

    Attributes
    ----------
    posterior, stats
        Site, or statistic, to its draws.
    rest
        What the model makes of them.
    nodes
        Of the model's first run.
    points
        Latent sites at which the guide is a point mass.
    """

    posterior: dict[str, NDArray[Any]]
    stats: dict[str, NDArray[Any]]
    rest: ModelRuns
    nodes: Mapping[str, Any]
    points: tuple[str, ...]


def guide_runs(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    size: int,
    make: dict[str, Any],
    check: Check,
    progress: bool,
) -> GuideRuns:
    """``size`` draws of the guide.

    Parameters
    ----------
    make
        Which groups to make, as `ModelRuns` takes it.
    check
        Called with the model's nodes after the first run.
    """
    posterior, stats = Columns(size), Columns(size)
    rest = ModelRuns(model, args, kwargs, size, **make)
    for index in tqdm(range(size), desc="draws", disable=not progress):
        pair = trace_pair(model, guide, args, kwargs)
        if index == 0 and is_marked(*pair):
            return _summed_out(model, guide, args, kwargs, size, make, check, progress)
        model_trace, guide_trace = checked_pair(*pair)
        log_p, log_q = _log_densities(model_trace, guide_trace, index)
        if index == 0:
            check_full(guide_trace)
            check_full(model_trace)
            first = model_trace
            check_data(model_trace)
            points = point_sites(model_trace, guide_trace, model, guide, args, kwargs)
            if not any(is_latent(node) for node in model_trace.nodes.values()):
                raise ValueError(NO_LATENT)
            check(first.nodes)
        for name, value in values_of(model_trace).items():
            posterior.put(index, name, value, allow_nan=model_trace.nodes[name]["is_observed"])
        stats.put(index, "log_p", log_p)
        stats.put(index, "log_q", log_q)
        rest.add(index, model_trace, latent_values(model_trace, guide_trace))
    return GuideRuns(posterior.full(), stats.full(), rest, first.nodes, tuple(points))


def _summed_out(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    size: int,
    make: dict[str, Any],
    check: Check,
    progress: bool,
) -> GuideRuns:
    drawn = draw_guide(model, guide, args, kwargs, size, progress)
    points = point_sites(*drawn.first, model, guide, args, kwargs)
    summed = SummedOut(model, args, kwargs, drawn.latents, size)
    nodes = summed.at.reference.nodes
    check_data(summed.at.reference)
    check(nodes)
    log_p = summed.log_p()
    if np.isnan(log_p).any():
        reason = cause(*drawn.first)
        raise ValueError(
            ("" if reason is None else f"{reason}\n")
            + f"the log density of the model is NaN at {int(np.isnan(log_p).sum())} of {size} draws"
        )
    known = summed.log_likelihoods() if make["log_likelihood"] else []
    rest = ModelRuns(model, args, kwargs, size, **make, summed_out=known)
    rest.add_all({**drawn.latents, **summed.states}, progress)
    return GuideRuns(summed.posterior(), {"log_p": log_p, "log_q": drawn.log_q}, rest, nodes, tuple(points))


def _log_densities(model_trace: Trace, guide_trace: Trace, index: int) -> tuple[float, float]:
    """Log densities of model and guide at one draw, scaled and masked, summed in float64."""
    sums = [0.0, 0.0]
    for site in read_sites(model_trace, guide_trace):
        nodes = [(0, site.p, model_trace)] if site.p is not None else []
        nodes += [(1, node, guide_trace) for node in site.q]
        for which, node, trace in nodes:
            density = log_prob(node, trace) if which == 0 else score_parts(node, trace).log_prob
            term = float(to_numpy(density).sum(dtype=np.float64))
            if np.isnan(term):
                where = "guide" if which else "model"
                reason = cause(model_trace, guide_trace)
                raise ValueError(
                    ("" if reason is None else f"{reason}\n")
                    + f"the log density of site '{site.name}' in the {where} is NaN at draw {index}"
                )
            sums[which] += term
    return sums[0], sums[1]
