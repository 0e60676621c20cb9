"""Draws of K particles: pairs of traces in which the particles share what they must share.

The log weights of K particles are compared with each other, so all of them see the same subsample of the data; and where a
bound is taken inside some plates only, the same draw of the sites outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from pyro import poutine
from pyro.distributions import Delta
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_elbo_ext.bounds import Gradient, Path
from pyro_elbo_ext.particles.supply import Supply
from pyro_elbo_ext.programs.nodes import Node
from pyro_elbo_ext.programs.running import trace_guide, trace_pair, trace_replayed

Program = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


@dataclass(slots=True)
class Draw:
    """The traces of one particle, or of all of them if they are vectorized.

    ``drawn`` is the guide's trace that made the draws: ``guide_trace`` itself, unless the densities were evaluated at
    detached copies of them; then ``paths`` ties each copy to its draw.
    """

    model_trace: Trace
    guide_trace: Trace
    drawn: Trace
    paths: list[Path] = field(default_factory=list)


def draw_particles(
    model: Program,
    guide: Program,
    args: Args,
    kwargs: Kwargs,
    count: int,
    gradient: Gradient,
    is_shared: Callable[[Node], bool],
) -> Iterator[Draw]:
    """Run guide and model ``count`` times.

    Parameters
    ----------
    gradient
        Says whether draws are constants, and whether densities are evaluated at copies of them.
    is_shared
        Tells the guide's nodes that all particles share, beside the subsamples.
    """
    first = draw(model, guide, args, kwargs, gradient, 0)
    yield first
    if count == 1:
        return
    shared = Trace()
    for trace in (first.model_trace, first.drawn):
        for name, node in trace.nodes.items():
            if node["type"] == "sample" and site_is_subsample(node):
                shared.nodes[name] = node
    shared.nodes.update({name: node for name, node in drawn_sites(first.drawn) if is_shared(node)})
    if shared.nodes:
        model, guide = poutine.replay(model, trace=shared), poutine.replay(guide, trace=shared)
    for particle in range(1, count):
        yield draw(model, guide, args, kwargs, gradient, particle)


def draw(model: Program, guide: Program, args: Args, kwargs: Kwargs, gradient: Gradient, particle: int | None) -> Draw:
    """Run guide and model once, for one particle or (``particle=None``) for all of them in a particle plate."""
    with _DetachDraws() if gradient.detach_draws else nullcontext():
        if isinstance(poutine.unwrap(guide), Messenger):
            model_trace, guide_trace = trace_pair(model, guide, args, kwargs)
            drawn = guide_trace
        else:
            drawn = guide_trace = trace_guide(guide, model, args, kwargs)
            model_trace = None
    paths: list[Path] = []
    if gradient.separate_paths:
        values, indices, paths = detached_copies(drawn, particle)
        if paths:
            with Supply(values, indices):
                model_trace, guide_trace = trace_pair(model, guide, args, kwargs)
    if model_trace is None:
        model_trace = trace_replayed(model, guide, guide_trace, args, kwargs)
    return Draw(model_trace, guide_trace, drawn, paths)


def drawn_sites(guide_trace: Trace) -> Iterator[tuple[str, Node]]:
    """The guide's sites but for subsamples and what is observed or factored in."""
    for name, node in guide_trace.nodes.items():
        if node["type"] == "sample" and not node["is_observed"] and not site_is_subsample(node):
            yield name, node


def detached_copies(
    drawn: Trace, particle: int | None
) -> tuple[dict[str, Tensor], dict[str, tuple[_Subsample, Tensor]], list[Path]]:
    """The guide's draws as constants to run it at again, those with a path as new leaves; and its subsamples.

    A Delta is no draw but a function of others: it is left out, so that a second run computes it anew.
    """
    values: dict[str, Tensor] = {}
    paths: list[Path] = []
    for name, node in drawn_sites(drawn):
        if not isinstance(node["fn"], Delta):
            value = node["value"].detach()
            if node["value"].requires_grad:
                paths.append(Path(node["value"], value.requires_grad_(), particle))
            values[name] = value
    indices = {
        name: (node["fn"], node["value"])
        for name, node in drawn.nodes.items()
        if node["type"] == "sample" and site_is_subsample(node)
    }
    return values, indices, paths


class _DetachDraws(Messenger):
    """Makes every draw a constant to what follows; a Delta, which has no score, keeps its path.

    To be entered around ``poutine.trace``: the outermost handler's ``_pyro_post_sample`` runs first.
    """

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not site_is_subsample(msg) and not isinstance(msg["fn"], Delta):
            msg["value"] = msg["value"].detach()
