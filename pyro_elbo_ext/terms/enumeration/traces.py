"""Runs of guide and model under enumeration, by Pyro's own handlers."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pyro import poutine
from pyro.infer.enum import iter_discrete_escape, iter_discrete_extend
from pyro.infer.traceenum_elbo import _check_tmc_elbo_constraint
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, check_traceenum_requirements
from torch import Tensor

from pyro_elbo_ext.programs.alike import densities_at_once
from pyro_elbo_ext.programs.densities import log_prob, score_parts
from pyro_elbo_ext.programs.nodes import is_marked_site
from pyro_elbo_ext.programs.pairs import check_pair
from pyro_elbo_ext.programs.running import trace_guide, trace_replayed
from pyro_elbo_ext.terms.dependencies import DependencyTracker

Program = Callable[..., Any]
Beginnings = queue.LifoQueue[Trace]  # of sequential sites, as the beginnings of traces


class Enumerate(EnumMessenger):
    """Pyro's own, which looks at a value's ``.data`` for its shape: ``torch.vmap`` has none to give."""

    def _pyro_post_sample(self, msg: Any) -> None:
        value = msg["value"]
        if isinstance(value, Tensor):
            value = torch.empty(value.shape, device="meta")
        super()._pyro_post_sample({**msg, "value": value})


def is_marked(*traces: Trace) -> bool:
    """Whether a latent site is marked for enumeration (``infer={'enumerate': ...}``)."""
    return any(is_marked_site(node) for trace in traces for node in trace.nodes.values())


def _enumerating(model: Program, guide: Program, values: Beginnings, max_plate_nesting: int) -> tuple[Program, Program]:
    """Model and guide with all values of their marked sites: those of "sequential" ones by further runs, from ``values``."""
    # the model's dims come after, to the left of the guide's: Pyro's allocator is not set back in between
    guide = EnumMessenger(first_available_dim=-1 - max_plate_nesting)(guide)
    guide = poutine.queue(guide, values, escape_fn=iter_discrete_escape, extend_fn=iter_discrete_extend)
    return EnumMessenger()(model), guide


class Begun(Exception):
    """The first run of programs that turned out to be marked, under enumeration.

    It is the first pair of traces, so that what a program makes when it is first run, such as an autoguide's parameters, is
    made once, and random numbers are drawn as by Pyro.
    """

    def __init__(self, traces: tuple[Trace, Trace], values: Beginnings, tracker: DependencyTracker | None) -> None:
        super().__init__()
        self.traces, self.values, self.tracker = traces, values, tracker


def first_values(
    model: Program, guide: Program, max_plate_nesting: int, values: Beginnings | None = None
) -> tuple[Program, Program]:
    """The same, for a first run, which leaves the rest in ``values``; a guide that runs the model inside stays as it is."""
    if isinstance(poutine.unwrap(guide), Messenger):
        return model, guide
    rest: Beginnings = queue.LifoQueue() if values is None else values
    model, enumerating = _enumerating(model, guide, rest, max_plate_nesting)

    def first(*args: Any, **kwargs: Any) -> Any:
        rest.queue.clear()
        rest.put(Trace())
        return enumerating(*args, **kwargs)

    return model, first


def enumerated_pairs(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    max_plate_nesting: int,
    between: Callable[[], None] | None = None,
    begun: Begun | None = None,
) -> Iterator[tuple[Trace, Trace]]:
    """Traces of one draw, model's and guide's, without subsample sites, unchecked.

    Sites marked "parallel" have all their values in one trace, along dims to the left of the plates. Those that the guide
    marks "sequential" have a pair of traces for each combination of their values.

    Parameters
    ----------
    max_plate_nesting
        How many dims from the right belong to plates.
    between
        Called after each run of the guide and before the model's.
    begun
        The first run, if it has been made.

    Raises
    ------
    NotImplementedError
        For a guide that runs the model inside, as ``EffectMixin`` and other guide messengers do.
    """
    if isinstance(poutine.unwrap(guide), Messenger):
        raise NotImplementedError(
            f"{type(poutine.unwrap(guide)).__name__} runs guide and model in one, where nothing can be enumerated. Write "
            "the guide as a function, or remove the marks (infer={'enumerate': ...})."
        )
    values: Beginnings = queue.LifoQueue() if begun is None else begun.values
    model, guide = _enumerating(model, guide, values, max_plate_nesting)
    if begun is None:
        values.put(Trace())
    else:
        yield pruned(*begun.traces)
    while not values.empty():
        guide_trace = trace_guide(guide, model, args, kwargs)
        if between is not None:
            between()
        model_trace = trace_replayed(model, guide, guide_trace, args, kwargs)
        yield pruned(model_trace, guide_trace)


def pruned(model_trace: Trace, guide_trace: Trace) -> tuple[Trace, Trace]:
    """The traces without subsample sites."""
    return prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)


def check_enumerated(model_trace: Trace, guide_trace: Trace, max_plate_nesting: int) -> None:
    """Raise ValueError unless the two belong together; with validation on, warn as Pyro's ``TraceEnum_ELBO`` does."""
    check_pair(model_trace, guide_trace, enumerated=True)
    if is_validation_enabled():
        check_model_guide_match(model_trace, guide_trace, max_plate_nesting)
        check_traceenum_requirements(model_trace, guide_trace)
        _check_tmc_elbo_constraint(model_trace, guide_trace)


def pack(model_trace: Trace, guide_trace: Trace, max_plate_nesting: int) -> None:
    """Compute all log densities, and name the dims of each: what Pyro's sums over products ask for."""
    for node in guide_trace.nodes.values():
        if node["type"] == "sample":
            score_parts(node, guide_trace, max_plate_nesting)
    guide_trace.pack_tensors()
    pack_model(model_trace, max_plate_nesting, guide_trace.plate_to_symbol)


def pack_model(model_trace: Trace, max_plate_nesting: int, plate_to_symbol: dict[str, str] | None = None) -> None:
    """The same of the model alone."""
    densities_at_once(model_trace)
    for node in model_trace.nodes.values():
        if node["type"] == "sample":
            log_prob(node, model_trace, max_plate_nesting)
    model_trace.pack_tensors(plate_to_symbol)
