"""Running a model, or a guide and the model against its draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match

from pyro_elbo_ext.programs.arguments import signature_of_callable
from pyro_elbo_ext.programs.densities import check_densities, log_prob
from pyro_elbo_ext.programs.faults import brief, cause, fault_of_run
from pyro_elbo_ext.programs.nodes import is_subsample
from pyro_elbo_ext.programs.pairs import check_pair
from pyro_elbo_ext.programs.randomness import kept
from pyro_elbo_ext.programs.replay import replayed


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
    return checked_pair(*trace_pair(model, guide, args, kwargs))


def checked_pair(model_trace: Trace, guide_trace: Trace) -> tuple[Trace, Trace]:
    """The traces without subsample sites, once it is known that they belong together; see :func:`run_pair`."""
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
        _check_nothing_hidden(unwrapped)
        run = trace_program(guide, args, kwargs, "guide")
        model_trace, guide_trace = unwrapped.get_traces()  # without the subsample sites
        subsamples = {name: node for name, node in run.nodes.items() if is_subsample(node)}
        model_trace.nodes.update(subsamples)
        guide_trace.nodes.update(subsamples)
        return model_trace, guide_trace
    guide_trace = trace_guide(guide, model, args, kwargs)
    if between is not None:
        between()
    return trace_replayed(model, guide, guide_trace, args, kwargs), guide_trace


def _check_nothing_hidden(guide: Messenger) -> None:
    """Raise ValueError if a guide runs a model of which sites are hidden: nobody would see that the prior draws them."""
    program = getattr(guide, "model", None)
    while isinstance(program, partial):  # of a handler and what it is around, see pyro.poutine.unwrap
        if len(program.args) >= 2 and isinstance(program.args[0], BlockMessenger):
            raise ValueError(
                f"{type(guide).__name__} runs its model with sites hidden by poutine.block: they would be drawn from the "
                "prior, and be left out of the ELBO. Give it the whole model; or, to sum the hidden ones out, take a guide "
                "that runs apart from the model, such as AutoNormal(poutine.block(model, hide=[...]))."
            )
        program = program.args[1] if len(program.args) >= 2 else program.func


def trace_replayed(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    guide_trace: Trace,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Trace:
    """Trace of the model at the draws of a trace of the guide."""
    try:
        return trace_program(replayed(model, guide_trace), args, kwargs)
    except ValueError as error:
        _raise_known_fault(error, model, guide, args, kwargs)
        raise


def look_at_pair(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Run guide and model once more, without gradient, to see whether names and shapes are right, for losses that do not.

    Random numbers are left as they were. Programs that are marked for enumeration, whose sites have other shapes then, are
    left to the loss; returns whether they are.

    Raises
    ------
    ValueError
        As :func:`run_pair`; and for a value that does not fit its distribution.
    """
    with kept(), torch.no_grad():
        model_trace, guide_trace = trace_pair(model, guide, args, kwargs)
        nodes = [node for trace in (guide_trace, model_trace) for node in trace.nodes.values()]
        if any(node["type"] == "sample" and node["infer"].get("enumerate") for node in nodes):
            return True
        check_pair(model_trace, guide_trace)
        check_densities(model_trace, finite=False)
    return False


def trace_guide(
    guide: Callable[..., Any], model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Trace:
    """Trace of the guide's run; an autoguide, which runs the model, fails with what is wrong with the model."""
    try:
        return trace_program(guide, args, kwargs, "guide")
    except (ValueError, RuntimeError) as error:
        _raise_model_fault(error, model, args, kwargs)
        _raise_known_fault(error, model, guide, args, kwargs)
        raise


def trace_program(
    program: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], where: str = "model"
) -> Trace:
    """Trace of one run, with subsample sites.  ``where`` is what errors call the program."""
    traced = poutine.trace(program)
    try:
        _run(traced, args, kwargs)
    except Exception as error:
        _check_loops(traced.trace, where)
        better = fault_of_run(error, traced.trace, where)
        if better is None:
            raise
        raise better from error
    _check_loops(traced.trace, where)
    return traced.trace  # as it is: get_trace would copy it


def _check_loops(trace: Trace, where: str) -> None:
    """Raise NotImplementedError for a loop whose sites stand there twice, as ``pyro.vectorized_markov`` has them."""
    for name, node in trace.nodes.items():
        if node["type"] == "sample" and "_do_not_score" in node["infer"]:
            raise NotImplementedError(
                f"site '{name}' of the {where} is in a loop of vectorized_markov, which Pyro's funsor backend alone takes "
                "apart: here, and in pyro.infer.TraceEnum_ELBO, its steps would be added up wrongly. Write the loop as for "
                "t in pyro.markov(range(size)), with the same body; or train with pyro.contrib.funsor's SVI and its "
                "TraceMarkovEnum_ELBO."
            )


def _run(traced: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Run a program under Pyro's trace, which is told of the program, so that errors can name its arguments."""
    try:
        traced(*args, **kwargs)
    finally:
        if "_INPUT" in traced.trace.nodes:
            traced.trace.nodes["_INPUT"]["program"] = traced.fn


def _is_batched() -> bool:
    """Whether ``torch.vmap`` runs the programs: values cannot be looked at then, and they are tried one by one after it."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _raise_model_fault(
    error: Exception, model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Raise what is wrong with the model by itself, which an autoguide runs; return if nothing is."""
    if _is_batched():
        return
    store = pyro.get_param_store()
    traced = poutine.trace(model)
    with kept(), torch.no_grad(), store.scope(store.get_state()):
        try:
            _run(traced, args, kwargs)
        except Exception as own:
            better = fault_of_run(own, traced.trace, "model")
            if better is None:
                return
            raise better from error
        check_densities(traced.trace)


def _raise_known_fault(
    error: Exception,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> None:
    """Raise what a run without validation has at fault: torch says that a parameter is NaN, but not at which site."""
    if not isinstance(error, ValueError) or not is_validation_enabled() or _is_batched():
        return
    store = pyro.get_param_store()
    with kept(), torch.no_grad(), store.scope(store.get_state()), pyro.validation_enabled(False):
        of_guide, of_model = poutine.trace(guide), poutine.trace(model)
        try:
            _run(of_guide, args, kwargs)
            of_model = poutine.trace(poutine.replay(model, trace=of_guide.trace))
            _run(of_model, args, kwargs)
        except Exception:  # the first error is the one to report, and what has been traced is looked at
            pass
        try:
            sentence = cause(of_model.trace, of_guide.trace)
            if sentence is None and (sentence := _nan_density(of_model.trace)):
                sentence = cause(of_model.trace, of_guide.trace) or sentence
        except (ValueError, RuntimeError):  # what has been traced has no log density: the first error says why
            return
    if sentence is not None and not str(error).startswith(sentence):
        raise ValueError(f"{sentence}\n{brief(error)}") from error


def _nan_density(trace: Trace) -> str | None:
    for name, node in trace.nodes.items():
        if node["type"] == "sample" and not is_subsample(node) and bool(log_prob(node, trace).isnan().any()):
            return f"the log density of site '{name}' in the model is NaN."
    return None


def check_callable(function: Any, what: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise TypeError unless the program ``what`` can be called with these arguments."""
    if isinstance(function, type):
        made = f"{function.__name__}({'model' if what == 'guide' else '...'})"
        raise TypeError(f"{what} must be a program, got the class {function.__name__}: pass {made}")
    if not callable(function):
        where = ": it comes second, before the data" if what == "guide" else ""
        raise TypeError(f"{what} must be callable, got {type(function).__name__}{where}")
    signature = signature_of_callable(function)
    if signature is not None:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(
                f"the {what} cannot be called with these arguments, {error}; it takes {signature}"
            ) from error
