"""Running a model, or a guide and the model against its draws."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match

from pyro_elbo_ext.programs.nodes import is_subsample
from pyro_elbo_ext.programs.pairs import check_pair


def run_pair(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Trace, Trace]:
    """Run the guide once, replay the model against it once, and check that they belong together.

    Returns the model's and the guide's trace without subsample sites. Log densities are not computed yet.

    Raises
    ------
    ValueError
        If a latent site of the model is missing from the guide, a site is marked for enumeration, or shapes disagree.
    """
    model_trace, guide_trace = trace_pair(model, guide, args, kwargs)
    check_pair(model_trace, guide_trace)
    if is_validation_enabled():
        check_model_guide_match(model_trace, guide_trace)
    return prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)


def trace_pair(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    between: Callable[[], None] | None = None,
) -> tuple[Trace, Trace]:
    """Traces of the model and the guide, with subsample sites, unchecked.

    ``between`` is called after the guide's run and before the model's, where these are two runs.
    """
    unwrapped = poutine.unwrap(guide)
    if isinstance(unwrapped, Messenger):  # a GuideMessenger interleaves guide and model in one run
        run = trace_program(guide, args, kwargs)
        model_trace, guide_trace = unwrapped.get_traces()  # without the subsample sites
        subsamples = {name: node for name, node in run.nodes.items() if is_subsample(node)}
        model_trace.nodes.update(subsamples)
        guide_trace.nodes.update(subsamples)
        return model_trace, guide_trace
    guide_trace = trace_program(guide, args, kwargs)
    if between is not None:
        between()
    return trace_program(poutine.replay(model, trace=guide_trace), args, kwargs), guide_trace


def trace_program(program: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Trace:
    """Trace of one run, with subsample sites."""
    traced = poutine.trace(program)
    with _plates_are_not_empty():
        traced(*args, **kwargs)
    return traced.trace  # as it is: get_trace would copy it


@contextmanager
def _plates_are_not_empty() -> Iterator[None]:
    try:
        yield
    except ZeroDivisionError as error:  # Pyro's own for pyro.plate(name, 0)
        raise ValueError(f"{error}: a plate in the model or guide is empty. Skip empty batches.") from error


def signature_of_callable(function: Any) -> inspect.Signature | None:
    """What a program takes; None where that is not known."""
    function = poutine.unwrap(function)
    if isinstance(function, torch.nn.Module):
        function = function.forward
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # some callables have none
        return None


def check_callable(function: Any, what: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise TypeError unless the program ``what`` can be called with these arguments."""
    if not callable(function):
        raise TypeError(f"{what} must be callable, got {type(function).__name__}")
    signature = signature_of_callable(function)
    if signature is not None:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(
                f"the {what} cannot be called with these arguments, {error}; it takes {signature}"
            ) from error
