"""What takes the steps of a run, Pyro's SVI or a compiled one, and how many it takes in one go."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from pyro.infer import SVI
from pyro.optim import PyroLRScheduler

from pyro_elbo_ext.compile import CompiledSVI
from pyro_elbo_ext.compile.binding import WholeOptimizer
from pyro_elbo_ext.compile.tracing.first_look import FirstLook
from pyro_elbo_ext.objectives.objective import Objective
from pyro_elbo_ext.training import processes
from pyro_elbo_ext.training.data.batches import Batches, Call, Whole
from pyro_elbo_ext.training.distributed import DistributedSVI
from pyro_elbo_ext.training.progress import Progress
from pyro_elbo_ext.training.state.state import (
    TrainingState,
    load_objective,
    objective_state,
    random_state,
    set_random_state,
)

_PLATEAU = torch.optim.lr_scheduler.ReduceLROnPlateau
_PIECE = 0.2  # seconds of compiled steps between two chances to interrupt


def what_steps(
    model: Any,
    guide: Any,
    optim: Any,
    loss: Any,
    compiled: bool | Mapping[str, Any],
    distributed: bool | Mapping[str, Any] | None,
    call: Call,
) -> SVI:
    """What takes the steps, as `fit` was asked, which has looked at the programs with arguments like those of ``call``."""
    if processes.world_size() > 1 if distributed is None else distributed is not False:
        return DistributedSVI(model, guide, optim, loss, **(distributed if isinstance(distributed, Mapping) else {}))
    if compiled is not False:
        # one step in a graph: how many could depend on timing, and a resumed run must not
        options = {"steps_per_call": 1, "fallback": True, **({} if compiled is True else compiled)}
        svi = CompiledSVI(model, guide, optim, loss, **options)
        if isinstance(svi.loss_and_grads, FirstLook):
            svi.loss_and_grads.looked_at(*call)
        return svi
    if isinstance(optim, torch.optim.Optimizer):
        optim = WholeOptimizer(optim)
    return SVI(model, guide, optim, loss)


def uncompiled(svi: SVI) -> str | None:
    """Why Pyro takes the steps; None if they are compiled."""
    if isinstance(svi, DistributedSVI):
        return "several processes"
    return svi.eager_reason if isinstance(svi, CompiledSVI) else "compiled=False"


class Steps:
    """Takes steps, with the schedules of the learning rate.

    Parameters
    ----------
    svi
        What takes a step.
    objective
        The loss that it was given.
    state
        Parameters and optimizers.
    data
        Where arguments come from: whole data allow several steps in one go.
    """

    def __init__(self, svi: SVI, objective: Any, state: TrainingState, data: Whole | Batches) -> None:
        self.svi, self.objective, self.state, self.data = svi, objective, state, data
        self._said = False  # whether the steps are compiled
        self._piece = 16  # steps that take about _PIECE seconds

    @property
    def in_one_go(self) -> bool:
        """Whether many steps are repeated without Python."""
        return isinstance(self.data, Whole) and self._is_compiled

    @property
    def _is_compiled(self) -> bool:
        return isinstance(self.svi, CompiledSVI) and self.svi.eager_reason is None

    def take(self, call: Call, step: int, most: int, bar: Progress) -> list[float]:
        """Take one step after ``step`` of them, or up to ``most`` compiled ones; their losses."""
        args, kwargs = call
        svi: Any = self.svi
        compiled = self._is_compiled
        if compiled and step > 0 and not svi.is_traced(*args, **kwargs):
            bar.describe("compiling")
            self._prime(call)
            compiled = svi.eager_reason is None
        together = compiled and step > 0 and isinstance(self.data, Whole) and not self._schedules_by_step
        if together and svi.optimizer_reason is None:
            losses = self._run(min(most, self._piece), call)
        else:
            losses = [float(svi.step(*args, **kwargs))]
            self._step_schedule()
        bar.describe(None)
        if not self._said:
            self._said = True
            reason = uncompiled(svi)
            how = "compiled steps, after some seconds for the compiler"
            bar.say(f"fit: {how if reason is None else f'steps by Pyro, uncompiled: {reason}'}")
        return losses

    def _run(self, steps: int, call: Call) -> list[float]:
        began = time.perf_counter()
        svi: Any = self.svi
        losses: list[float] = svi.run(steps, *call[0], progress=False, **call[1]).tolist()
        seconds = time.perf_counter() - began
        if steps == self._piece and not _PIECE / 4 < seconds < _PIECE:
            self._piece = max(1, min(int(steps * _PIECE / (2 * max(seconds, 1e-6))), 8 * steps))
        return losses

    def _prime(self, call: Call) -> None:
        """Have the graph for new arguments made, which takes a step of Pyro's, and take that back.

        So a step is a compiled one whether or not the run was resumed before it.
        """
        captured, random = self.state.capture(), random_state()
        objective = self.objective
        history = getattr(objective, "history", None)
        remembered = objective_state(objective)
        try:
            if isinstance(objective, Objective):
                objective.history = None
            self.svi.step(*call[0], **call[1])
        finally:
            if isinstance(objective, Objective):
                objective.history = None
                load_objective(objective, remembered)
                objective.history = history
            self.state.restore(captured)
            set_random_state(random)

    # Schedules of the learning rate

    @property
    def _schedules_by_step(self) -> bool:
        return isinstance(self.svi.optim, PyroLRScheduler) and isinstance(self.data, Whole)

    def _step_schedule(self) -> None:
        """Learning-rate schedulers go on once an epoch; where there are no epochs, with every step."""
        if not isinstance(self.svi.optim, PyroLRScheduler) or self._is_plateau:
            return
        epoch_ends = isinstance(self.data, Whole) or self.data.index == self.data.per_epoch
        if epoch_ends:
            self.svi.optim.step()

    @property
    def _is_plateau(self) -> bool:
        optim = self.svi.optim
        return isinstance(optim, PyroLRScheduler) and optim.pt_scheduler_constructor is _PLATEAU

    def validated(self, elbo: float) -> None:
        """Let a scheduler that follows the held-out ELBO see it."""
        if self._is_plateau:
            self.svi.optim.step(-elbo)
