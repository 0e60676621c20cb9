"""Many compiled steps: repeated in C, or by calls of graphs from Python; and what is recorded of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from pyro.infer.util import zero_grads
from pyro.util import warn_if_nan
from torch import Tensor

from pyro_elbo_ext.compile.errors import CannotCompile
from pyro_elbo_ext.compile.finding import CompiledCalls
from pyro_elbo_ext.compile.machine_code.layouts import Changed
from pyro_elbo_ext.compile.machine_code.native import Taken
from pyro_elbo_ext.compile.program import Program
from pyro_elbo_ext.compile.tracing.arguments import Args, Kwargs, take_apart
from pyro_elbo_ext.history.record import VALUES
from pyro_elbo_ext.objectives.evaluation import Weight
from pyro_elbo_ext.objectives.not_finite import NotFinite
from pyro_elbo_ext.programs.interrupts import interrupts_wait

_CALLS_PER_CHECK = 64  # of a run, between two looks at its losses
_SHORT, _SHORT_STEPS = 5e-4, 4  # seconds that a step may take for so many to be put in a graph
_SECONDS_IN_C, _MOST_IN_C = 0.1, 1 << 15  # of a run, between two looks at its losses and at the keyboard


class CompiledSteps(CompiledCalls):
    """Takes steps by a program, counts and records them."""

    _in_one_go = 64  # steps in one call of C, by the time that they take

    def _many(self, num_steps: int, args: Args, kwargs: Kwargs) -> Tensor | None:
        """Losses of up to ``num_steps`` steps; None if the next one is not a step of a graph."""
        program = self._known(args, kwargs)
        if program is None or not self._bind(program) or self.optimizer_reason is not None:
            return None
        try:
            return self._many_of(program, num_steps, args, kwargs)
        except Changed as changed:
            self._look_again(program, changed, args, kwargs)
            return None

    def _many_of(self, program: Program, num_steps: int, args: Args, kwargs: Kwargs) -> Tensor | None:
        """Losses of up to ``num_steps`` steps by the graphs of a program."""
        assert self._traced is not None
        if self._traced.one_by_one:
            steps = min(num_steps, _CALLS_PER_CHECK)
            return torch.tensor([self.step(*args, **kwargs) for _ in range(steps)], dtype=torch.float64)
        tensors = program.inputs_of(take_apart(args, kwargs))
        try:
            native = program.native(tensors)
            if native is None:
                return self._many_by_python(program, num_steps, tensors)
        except CannotCompile as error:
            self._give_up(program, error)
            return None
        start = time.perf_counter()
        steps = min(self._in_one_go, num_steps)
        kl_weights = self._kl_weights(0, steps)
        taken = Taken()
        before = self._count()
        with interrupts_wait():
            try:
                program.repeat(native, taken, kl_weights, tensors)
                self._enter(program, taken.results, kl_weights, before)
            except BaseException:  # a kernel that fails, or what comes from outside, keeps the steps before it
                self._enter(program, taken.results, kl_weights, before, failed=True)
                raise
        seconds = time.perf_counter() - start
        if steps == self._in_one_go and not _SECONDS_IN_C / 4 < seconds < _SECONDS_IN_C:
            self._in_one_go = max(1, min(int(steps * _SECONDS_IN_C / (2 * seconds)), _MOST_IN_C))
        return taken.losses[: int(taken.count)]

    def _many_by_python(self, program: Program, num_steps: int, tensors: list[Tensor]) -> Tensor:
        binding = program.binding
        assert binding is not None
        # Several steps in a graph save the overhead of a call, which is not worth their compilation where a step takes long.
        size = self.steps_per_call or (_SHORT_STEPS if program.step_seconds < _SHORT else 1)
        # Such a graph can leave out the update of a step, but not what a network does to its buffers.
        if program.writes_buffers and num_steps < size:
            size = 1
        losses: list[Tensor] = []
        tables: list[Tensor] = []
        kl_weights: list[Weight] = []
        taken, before = 0, self._count()

        def results() -> tuple[Tensor, Tensor]:
            count = min(len(losses), len(tables))
            return torch.cat(losses[:count]), torch.cat(tables[:count])

        try:
            for _ in range(_CALLS_PER_CHECK):
                steps = min(size, num_steps - taken)
                if steps == 0 or (steps < size and program.writes_buffers):
                    break
                if int(binding.count) != steps:
                    binding.count.fill_(steps)
                weights = self._kl_weights(taken, size)
                of_call = program.take(size, weights, tensors)
                kl_weights += weights[:steps]
                losses.append(of_call[0][:steps])
                tables.append(of_call[1][:steps])
                taken += steps
            self._enter(program, results, kl_weights, before)
        except (Changed, CannotCompile):  # of the next step, which meets it again
            if not losses:
                raise
            self._enter(program, results, kl_weights, before)
        except BaseException:  # an interrupt keeps what is done
            if losses and tables:
                self._enter(program, results, kl_weights, before, failed=True)
            raise
        return torch.cat(losses)

    def _step_with_eager_optimizer(self, program: Program, tensors: list[Tensor]) -> float:
        kl_weights = self._kl_weights(0, 1)
        loss, table, gradients = program.gradients(kl_weights[0], tensors)
        value = loss.item()
        if self._records:
            self._record(program, value, table.cpu().numpy().reshape(-1, len(VALUES)), kl_weights[0])
        else:
            warn_if_nan(value, "loss")
        parameters = [p for _, p in program.parameters]
        for p, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                p.grad = gradient if p.grad is None else p.grad + gradient
        self.optim(parameters)
        zero_grads(parameters)
        return value

    def _kl_weights(self, start: int, steps: int) -> list[Weight]:
        assert self._traced is not None
        return self._traced.kl_weights(start, steps)

    # Counting and recording

    def _count(self) -> int:
        """Steps that the objective has counted, if it counts."""
        return self.objective.num_steps if self._records else 0

    def _enter(
        self,
        program: Program,
        results: Callable[[], tuple[Tensor, Tensor]],
        kl_weights: list[Weight],
        before: int,
        failed: bool = False,
    ) -> None:
        """Record and count the steps that a graph has taken since step ``before``, unless that has been done.

        Where they have ``failed``, for a loss that is not finite or an exception from outside, at whatever place, that is up
        to the first whose loss is not finite.
        """
        binding = program.binding
        assert binding is not None
        losses, tables = results()
        if self._records:
            done = self._count() - before
            end = _count_finite(losses) if failed else len(losses)
            if done < end:
                self._record_many(program, losses[done:end], tables[done:end], kl_weights[done:end])
        if failed:
            binding.settle()
        else:
            binding.advance(len(losses))

    def _record(self, program: Program, loss: float, table: NDArray[np.float64], kl_weight: Weight) -> None:
        """Enter a compiled step into the objective's history; it is an error if its loss is not finite."""
        objective, sites = self.objective, program.sites
        if not math.isfinite(loss):
            if program.binding is not None:
                program.binding.good.fill_(True)
            objective._raise_not_finite(sites, [tuple(row) for row in table.tolist()])
            raise NotFinite(f"the loss is {loss} at step {objective.num_steps}. No parameter has been changed.")
        objective._record_step(sites, table, -loss if objective.maximized else loss, kl_weight)

    def _record_many(self, program: Program, losses: Tensor, tables: Tensor, kl_weights: list[Weight]) -> None:
        """The same for many steps, up to the first whose loss is not finite."""
        objective, sites = self.objective, program.sites
        rows = tables.cpu().numpy().reshape(len(tables), len(sites), len(VALUES))
        count = _count_finite(losses)
        values = losses[:count].cpu().numpy()
        objective._record_steps(sites, rows[:count], -values if objective.maximized else values, kl_weights[:count])
        if count < len(losses):
            self._record(program, float(losses[count]), rows[count], kl_weights[count])


def _count_finite(losses: Tensor) -> int:
    """How many there are before the first that is not finite."""
    finite = torch.isfinite(losses)
    return len(losses) if bool(finite.all()) else int(finite.int().argmin())
