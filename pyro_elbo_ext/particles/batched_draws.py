"""Batching of an objective's particles: tried and checked once for each kind of call, and the reason kept if it fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_elbo_ext.bounds import Gradient, Path, Pathwise
from pyro_elbo_ext.particles.batch_check import check_batched, particle_frame
from pyro_elbo_ext.particles.batching import Batched, Derive, run_batched
from pyro_elbo_ext.particles.particles import Draw, detached_copies
from pyro_elbo_ext.particles.supply import CannotBatch
from pyro_elbo_ext.programs.interrupts import handlers_are_heard
from pyro_elbo_ext.programs.randomness import torch_kept
from pyro_elbo_ext.programs.running import trace_pair
from pyro_elbo_ext.terms.dependencies import DependencyTracker

logger = logging.getLogger(__name__)

NUMBERS_AT_ONCE = 8_000_000  # values of sites, of all draws that are run at once

Program = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
CallKey = tuple[object, ...]


class BatchedDraw(NamedTuple):
    """The draw of all particles, the (negative) dim that tells them apart, and what was derived from each."""

    draw: Draw
    particle_dim: int
    derived: dict[str, Tensor]


def call_key(args: Args, kwargs: Kwargs) -> CallKey:
    """What tells calls of a program apart whose particles may have other shapes or sites."""
    return tuple(
        [
            (key, value.shape if isinstance(value, Tensor) else value)
            for key, value in (*enumerate(args), *kwargs.items())
            if value is None or isinstance(value, bool | str | int | float | Tensor)
        ]
    )


@dataclass(slots=True)
class Batch:
    """One kind of call of a (model, guide) whose particles are to be batched.

    Attributes
    ----------
    reference : tuple of Trace
        Model's and guide's trace of one ordinary run.
    reason : str or None
        Why the particles are looped over after all; None while they are batched.
    """

    reference: tuple[Trace, Trace]
    reason: str | None = None
    checked: bool = False

    @classmethod
    def start(
        cls,
        model: Program,
        guide: Program,
        args: Args,
        kwargs: Kwargs,
        tracker: DependencyTracker | None,
        read: Callable[[Trace, Trace], object],
    ) -> Batch:
        """Run model and guide once in the ordinary way, for reference; the random state is left as it was.

        ``read`` is called with the traces while the ``tracker`` of their dependencies, if there is one, is still active.
        """
        with torch_kept(), torch.no_grad(), tracker or nullcontext():
            reference = trace_pair(model, guide, args, kwargs, tracker and tracker.enter_model)
            read(*reference)
        return cls(reference)

    def draw(
        self,
        model: Program,
        guide: Program,
        args: Args,
        kwargs: Kwargs,
        count: int,
        gradient: Gradient,
        derive: Derive | None = None,
    ) -> BatchedDraw | None:
        """All particles' draws; None if they have to be looped over, once the reason is known."""
        if self.reason is not None or count == 1:
            return None
        # a time-out by a signal is no reason to draw one by one
        listening: AbstractContextManager[list[BaseException]]
        listening = nullcontext([]) if self.checked else handlers_are_heard()
        with listening as raised:
            try:
                batched = run_batched(
                    model, guide, args, kwargs, count, self.reference, derive=derive, detach=gradient.detach_draws
                )
                if not self.checked:
                    check_batched(batched, model, guide, args, kwargs, self.reference)
                paths: list[Path] = []
                scored = batched
                if gradient.separate_paths:
                    draws, paths = _copies(batched)
                    if paths:
                        scored = run_batched(
                            model, guide, args, kwargs, count, self.reference, draws=draws, derive=derive
                        )
            except CannotBatch as error:
                self._give_up(str(error))
                return None
            except Exception as error:
                if self.checked or raised:
                    raise
                # an error of the program itself will be raised by the loop too; any other has to do with the batching
                self._give_up(f"{type(error).__name__}: {error}")
                return None
        self.checked = True
        frame = particle_frame(scored)
        if frame is None or frame.dim is None:
            self._give_up("model and guide have no sites")
            return None
        drawn = Draw(scored.model_trace, scored.guide_trace, batched.guide_trace, paths)
        return BatchedDraw(drawn, frame.dim, scored.derived)

    def at_once(self, most: int) -> int:
        """Draws that are run together, at most: as many as keep the values of all their sites to `NUMBERS_AT_ONCE`."""
        numbers = sum(
            node["value"].numel()
            for trace in self.reference
            for node in trace.nodes.values()
            if isinstance(node.get("value"), Tensor) and not site_is_subsample(node)
        )
        return min(most, max(2, NUMBERS_AT_ONCE // max(numbers, 1)))

    def chunks(
        self, model: Program, guide: Program, args: Args, kwargs: Kwargs, count: int, most: int
    ) -> Iterator[tuple[Trace, Trace, int | None]]:
        """``count`` draws of the guide, as many at a time as `at_once` allows, or one by one where they cannot be batched.

        Yields the model's and the guide's trace, and the number of draws in them; None for an ordinary run, whose values
        have no dimension for the draws.
        """
        done, size = 0, self.at_once(most)
        while done < count:
            drawn = self.draw(model, guide, args, kwargs, min(size, count - done), Pathwise())
            if drawn is None:
                yield *trace_pair(model, guide, args, kwargs), None
                done += 1
            else:
                there = min(size, count - done)
                yield drawn.draw.model_trace, drawn.draw.guide_trace, there
                done += there

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        logger.warning("vectorize_particles='vmap': the particles are drawn one after the other, since %s", reason)


def _copies(batched: Batched) -> tuple[dict[str, Tensor], list[Path]]:
    """Values to score again, those with a path as new leaves; and the subsample that they belong to."""
    draws, _, paths = detached_copies(batched.guide_trace, None)
    for trace in (batched.model_trace, batched.guide_trace):
        draws.update({name: node["value"] for name, node in trace.nodes.items() if site_is_subsample(node)})
    return draws, paths
