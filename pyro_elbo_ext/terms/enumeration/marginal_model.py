"""A model with its marked sites summed out, as a model of the other sites: for whatever asks for its density alone."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.poutine import Trace
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger

from pyro_elbo_ext.programs.nodes import is_latent, plate_nesting
from pyro_elbo_ext.programs.randomness import kept
from pyro_elbo_ext.programs.running import trace_guide, trace_replayed
from pyro_elbo_ext.terms.enumeration.rows import model_alone
from pyro_elbo_ext.terms.enumeration.traces import Enumerate, is_marked


class MarginalModel:
    """A model whose marked sites are summed out, exactly, in each run.

    Called as the model, it has the same sites but for those that are summed out and the data that depend on them: in place
    of these stands the log of the sum, as one ``pyro.factor`` for all that hangs together, in the plates that it is in.
    A latent site whose prior depends on a summed-out one stays, with a density of 1: its own is in the sum.

    Parameters
    ----------
    model : callable
    max_plate_nesting : int
        How many dims from the right belong to plates.
    given : collection of str
        Marked sites that are not summed out, for a guide draws them.
    """

    def __init__(self, model: Callable[..., Any], max_plate_nesting: int, given: Collection[str] = ()) -> None:
        self.model, self.max_plate_nesting, self.given = model, max_plate_nesting, frozenset(given)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        enumerating = Enumerate(first_available_dim=-1 - self.max_plate_nesting)
        with _Hidden(self.max_plate_nesting, self.given), poutine.trace() as traced, enumerating:
            result = self.model(*args, **kwargs)
        pair = model_alone(traced.trace, self.max_plate_nesting)
        frames = _frames(pair.model_trace)
        for names, log_sum, symbols in pair.log_sums():
            with _InPlates([frames[symbol] for symbol in symbols]):
                pyro.sample(f"sum over {', '.join(names)}", Unit(log_sum), obs=torch.empty(0))
        return result


def _frames(trace: Trace) -> dict[str, CondIndepStackFrame]:
    """The plates by their symbols."""
    stacks = [node["cond_indep_stack"] for node in trace.nodes.values() if node["type"] == "sample"]
    return {trace.plate_to_symbol[frame.name]: frame for stack in stacks for frame in stack if frame.vectorized}


class _Hidden(Messenger):
    """Keeps from what is outside: summed-out sites and what depends on them; of latent sites among these, the density."""

    def __init__(self, max_plate_nesting: int, given: frozenset[str]) -> None:
        super().__init__()
        self._plates, self._given = max_plate_nesting, given
        self._masks: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if "_enumerate_dim" in msg["infer"] and name not in self._given:
            msg["stop"] = True
            return
        shape = getattr(fn, "batch_shape", ())
        if all(size == 1 for size in shape[: max(len(shape) - self._plates, 0)]):
            return
        if msg["is_observed"]:
            msg["stop"] = True
        else:
            self._masks[name] = msg["mask"]
            msg["mask"] = False

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self._masks:
            msg["mask"] = self._masks.pop(msg["name"])


class _InPlates(Messenger):
    """Puts what is sampled into plates that have been left."""

    def __init__(self, frames: list[CondIndepStackFrame]) -> None:
        super().__init__()
        self._stack = tuple(frames)

    def _pyro_sample(self, msg: Any) -> None:
        msg["cond_indep_stack"] = self._stack + msg["cond_indep_stack"]


def without_marks(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Model and guide as programs without marks, for the density of the guide's draws.

    What the guide marks it draws, as without the mark. What only the model has, and marks, is summed out. Runs both once;
    random numbers are left as they were.
    """
    with kept():
        guide_trace = trace_guide(guide, model, args, kwargs)
        model_trace = trace_replayed(model, guide, guide_trace, args, kwargs)
    if is_marked(guide_trace):
        guide = poutine.infer_config(guide, lambda site: {"enumerate": None})
    if not is_marked(model_trace):
        return model, guide
    marked = [name for name, node in guide_trace.nodes.items() if name in model_trace.nodes and is_latent(node)]
    return MarginalModel(model, plate_nesting(model_trace, guide_trace), marked), guide
