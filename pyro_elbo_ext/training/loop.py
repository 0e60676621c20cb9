"""The loop: steps up to the next look, then rollback, stopping rule, validation, progress, callbacks, checkpoint."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pyro.infer import SVI
from torch import Tensor

from pyro_elbo_ext.objectives.not_finite import NotFinite
from pyro_elbo_ext.programs.interrupts import interrupts_wait
from pyro_elbo_ext.training import processes
from pyro_elbo_ext.training.callbacks import CallbackList
from pyro_elbo_ext.training.checkpoint import Checkpoint
from pyro_elbo_ext.training.data.batches import Batches, Call, Whole
from pyro_elbo_ext.training.data.validation import Validation
from pyro_elbo_ext.training.fingerprint import Fingerprint
from pyro_elbo_ext.training.progress import Progress
from pyro_elbo_ext.training.reports import Reports
from pyro_elbo_ext.training.result import Rollback
from pyro_elbo_ext.training.safety import Watch, explain, is_numerical, nan_arguments
from pyro_elbo_ext.training.state.state import State, TrainingState, random_state
from pyro_elbo_ext.training.steps import Steps
from pyro_elbo_ext.training.stopping import Decision, Patience, StoppingRule

logger = logging.getLogger(__name__)

LOOK_EVERY = 100  # steps between two looks, where no stopping rule asks for others
_OWN = ("step", "seconds", "reason", "converged", "rollbacks", "validated", "looks")  # in a checkpoint
_OF_STEPS = ("_factor", "_captured_factor", "_epoch", "_since_look", "_unchecked")
_LOOK_IN_C = 10  # times that, where steps are repeated without Python


@dataclass
class Loop:
    """One training run.

    Attributes
    ----------
    svi
        What takes the steps.
    objective
        The loss that it was given.
    parameters
        Name to unconstrained tensor.
    data
        Gives the arguments of each step.
    example
        Those of one step.
    max_steps
        Steps after which training ends in any case.
    rule
        Stopping rule, or None.
    not_before
        Steps before the rule is asked: those of a warm-up, during which the objective changes.
    step, seconds, reason, converged
        Where the run is.
    """

    svi: SVI
    objective: Any
    parameters: dict[str, Tensor]
    data: Whole | Batches
    example: Call
    max_steps: int
    rule: StoppingRule | None = None
    not_before: int = 0
    validation: Validation | None = None
    validate_every: int | None = None
    callbacks: CallbackList = field(default_factory=lambda: CallbackList(()))
    log_every: int = LOOK_EVERY
    checkpoint: Path | None = None
    checkpoint_every: int | None = None
    max_rollbacks: int = 5
    progress: bool = True
    settings: dict[str, Any] = field(default_factory=dict)
    fingerprint: Fingerprint = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.state = TrainingState(self.svi, self.parameters)
        self.step, self.seconds, self.reason = 0, 0.0, ""
        self.converged: bool | None = None
        self.rollbacks: list[Rollback] = []
        self.validated: list[tuple[int, float]] = []
        self.looks: list[tuple[int, float]] = []
        self._factor = 1.0
        self._epoch = 0
        self._watch = Watch(objective=self.objective)
        self._steps = Steps(self.svi, self.objective, self.state, self.data)
        self._file = None if self.checkpoint is None else self._checkpoint(self.checkpoint)
        self._good: tuple[int, State] | None = None
        self._since_look: list[float] = []  # losses
        self._unchecked: list[float] = []  # the last of them, not yet known to be good
        self._reports = Reports(self.objective, self.state, self.callbacks, self.log_every)

    # The run

    def run(self) -> None:
        """Train until a rule, the number of steps or an interrupt ends it; the reason is in ``reason``.

        Raises
        ------
        ValueError
            If a step is NaN, infinite or diverges again and again, naming the site where it is known. Whatever else a
            program, its data or a callback raises comes through at once.
        """
        began = time.monotonic()
        self.state.make_optimizers()
        if self.step == 0:
            self._start_rule()
        if self.validation is not None and self.step == 0:
            self._validate()
        bar = self._bar = Progress(self.max_steps if self.rule is None else None, self.step, self.progress)
        try:
            self.callbacks.start(self.settings)
            while not self.reason:
                self._advance(began)
        except KeyboardInterrupt:
            if processes.world_size() > 1:  # the others may be in another step
                raise
            if self._torn and self._good is not None:  # it did not wait for the end of a step or look
                self.step = self._good[0]
                self.state.restore(self._good[1])
            if not self.reason:
                self.reason = "interrupted"
                self.converged = False if self.rule is not None else None
        except BaseException as error:
            summary = self._summary("failed", f"{type(error).__name__}: {error}", time.monotonic() - began)
            self.callbacks.finish(summary, error)
            raise
        finally:
            if self.looks:
                bar.conclude(self._reports.metrics(self.step, self.looks, self.validated, last=True), "")
            bar.close()
        self.seconds += time.monotonic() - began
        if self._file is not None and processes.is_main() and not self._torn:
            self._file.write(self._own(), self._good)  # to go on from: before the average takes the parameters' place
        self._conclude()
        status = "interrupted" if self.reason == "interrupted" else "finished"
        self.callbacks.finish(self._summary(status, self.reason, 0.0))

    def _start_rule(self) -> None:
        if self.rule is None:
            return
        args, kwargs = self.example
        rates = self.state.learning_rates()
        self.rule.start(
            self.state.parameters,
            guide=self.svi.guide,
            args=args,
            kwargs=kwargs,
            learning_rate=max(rates) if rates else self.settings.get("learning_rate"),
        )

    def _advance(self, began: float) -> None:
        """Steps up to the next look, and the look."""
        if self.step >= self.max_steps:
            self.reason = f"all {self.max_steps:,} steps were taken"
            if self.rule is not None:
                self.converged, self.reason = False, f"{self.reason} before the stopping rule was satisfied"
            return
        if self._good is None:
            self._good = self.step, self.state.capture()
        until = self._next_look()
        while self.step < until:
            with self._whole():
                call = self._call = self.data.next()
                try:
                    self._count(self._steps.take(call, self.step, until - self.step, self._bar))
                    if self.step == until:
                        self._check()
                except (ValueError, RuntimeError) as error:
                    # with parameters that are not finite any operation may fail
                    if not (is_numerical(error) or self.state.not_finite()):
                        raise
                    self._roll_back(error)
                    return
                if self.step == until:
                    self._look()
                    self._torn = False
                    if self._reports.is_due(self.step, self._bar):
                        status = getattr(self.rule, "status", "")
                        self._reports.give(self.step, self.looks, self.validated, self._bar, status)
        self._save_if_due(began)

    _torn = False

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """A step, with the look after it: an interrupt in the middle would make a resumed run differ."""
        with interrupts_wait():
            self._torn = True
            yield
            self._torn = False

    def _next_look(self) -> int:
        every = [
            self.rule.every if self.rule is not None else self._look_every,
            self.validate_every,
            self.checkpoint_every,
        ]
        if self.callbacks:
            every.append(self.log_every)
        if self.validation is not None and self.validate_every is None:
            every.append(self.data.per_epoch)
        nexts = [self.step - self.step % n + n for n in every if n is not None]
        return min([self.max_steps, *nexts])

    @property
    def _look_every(self) -> int:
        return LOOK_EVERY * (_LOOK_IN_C if self._steps.in_one_go else 1)

    def _count(self, losses: list[float]) -> None:
        self.step += len(losses)
        self._unchecked += losses
        self._bar.advance(len(losses))

    # Safety

    def _check(self) -> None:
        """Raise NotFinite if the steps since the last check have gone wrong."""
        losses, self._unchecked = self._unchecked, []
        for i, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise explain(
                    self.svi.model, self.svi.guide, self.objective, self._call, loss, self.step - len(losses) + i
                )
        self.state.adopt()
        names = self.state.not_finite()
        if names:
            raise NotFinite(f"parameter '{names[0]}' has become NaN or infinite by step {self.step}.")
        reason = self._watch.diverged(losses)
        if reason:
            raise NotFinite(f"{reason} by step {self.step}.")
        self._since_look += losses

    def _roll_back(self, error: Exception) -> None:
        """Return to the last good state with half the step size; raise where that has been tried often enough."""
        bad = nan_arguments(self.svi.model, self._call)
        bad = sorted({name for of_process in processes.gather_objects(bad) for name in of_process})
        assert self._good is not None
        to_step, captured = self._good
        self.state.restore(captured)
        if bad:
            raise ValueError(f"{error} (the data, {', '.join(bad)}, have NaN)") from error
        if len(self.rollbacks) >= self.max_rollbacks:
            raise ValueError(
                f"training failed {len(self.rollbacks) + 1} times, with learning rates down to {self._factor:g} of the "
                f"given; the last time: {error} Parameters are those after step {to_step}."
            ) from error
        self._factor /= 2
        self.state.scale_learning_rates(self._factor / self._captured_factor)
        self._captured_factor = self._factor
        rollback = Rollback(self.step, to_step, str(error), self._factor)
        self.rollbacks.append(rollback)
        logger.info("back to step %d with half the learning rate: %s", to_step, error)
        self._bar.say(f"fit: back to the state after step {to_step}, half the learning rate: {error}")
        self._start_rule()
        self._since_look.clear()
        self._unchecked.clear()
        self._watch.forget()
        self._good = to_step, self.state.capture()

    _captured_factor = 1.0  # of the learning rates in ``_good``

    # Looks

    def _look(self) -> None:
        losses = np.array(self._since_look)
        self.looks.append((self.step, float(losses.mean()) if len(losses) else math.nan))
        if len(self.looks) > 20_000:  # a long run keeps every other one
            del self.looks[1::2]
        assert self._good is not None
        if self.step - self._good[0] >= self._look_every:
            self._good = self.step, self.state.capture()
            self._captured_factor = self._factor
        if self.validation is not None and self._is_validation_due():
            self._validate()
        if self.rule is not None and not self.reason and self.step % self.rule.every == 0 and len(losses):
            if self.step > self.not_before:
                self._follow(processes.from_main(self.rule.observe(self.step, self.state.flat(), losses)))
            self._since_look.clear()
        elif self.rule is None:
            self._since_look.clear()

    def _follow(self, decision: Decision) -> None:
        assert self.rule is not None
        if decision.action == "stop":
            self.reason, self.converged = decision.reason, bool(self.rule.converged)
        elif decision.action == "lower":
            self._factor *= decision.factor
            self.state.scale_learning_rates(decision.factor)
            if decision.parameters is not None:
                self.state.set_flat(decision.parameters)
            self._watch.forget()
            self._good = self.step, self.state.capture()
            self._captured_factor = self._factor

    def _is_validation_due(self) -> bool:
        if self.validate_every is not None:
            return self.step % self.validate_every == 0
        if isinstance(self.data, Batches):  # once an epoch
            due = self.data.epoch + (self.data.index == self.data.per_epoch) > self._epoch
            self._epoch += due
            return due
        return self.step % self._look_every == 0

    def _validate(self) -> None:
        assert self.validation is not None
        elbo = self.validation.elbo(self.svi, self.objective)
        if not math.isfinite(elbo):
            raise ValueError(f"the held-out ELBO is {elbo} at step {self.step}: look for NaN in the held-out data")
        self.validated.append((self.step, elbo))
        self._steps.validated(elbo)
        if isinstance(self.rule, Patience) and self.step > self.not_before:
            self._follow(self.rule.observe_validation(self.step, elbo))

    def _conclude(self) -> None:
        """The parameters that a rule gives in the end, such as an average of the last iterates."""
        average = getattr(self.rule, "average", None)
        if average is not None:
            last = self.state.flat()
            self.state.set_flat(average)
            if self.state.not_finite():
                self.state.set_flat(last)

    def _summary(self, status: str, reason: str, seconds: float) -> dict[str, Any]:
        """What callbacks are told at the end."""
        summary = {
            "status": status,
            "reason": reason,
            "converged": self.converged,
            "steps": self.step,
            "seconds": self.seconds + seconds,
        }
        if self.looks:
            summary["elbo"] = -self.looks[-1][1]
        return summary

    # Checkpoints

    def _checkpoint(self, path: Path) -> Checkpoint:
        return Checkpoint(
            path,
            self.checkpoint_every,
            self.state,
            self.svi,
            self.objective,
            self.data,
            self.rule,
            self.callbacks,
            self._watch,
            self.fingerprint,
        )

    def _own(self) -> State:
        return {**{name: getattr(self, name) for name in (*_OWN, *_OF_STEPS)}, "reported": self._reports.since}

    def _save_if_due(self, began: float) -> None:
        if self._file is not None and processes.is_main() and self._file.is_due(self.step):
            seconds = self.seconds + time.monotonic() - began
            self._file.write({**self._own(), "seconds": seconds}, self._good)

    def resume(self, anyway: bool = False) -> None:
        """Go on from the checkpoint; ``anyway``, even if it is of a run that was given something else.

        Raises
        ------
        ValueError
            If it is of other programs, or of another kind of loss, stopping rule or callbacks, or has parameters that are
            not finite. Nothing has changed then.
        """
        assert self._file is not None
        saved, seeded = self._file.read(self.max_steps, anyway), random_state()
        self._file.restore(saved)
        if self.rule is not None:
            self._start_rule()
            if "stopping" not in saved.changed:
                self.rule.load_state_dict(saved.content["rule"])
        for name in (*_OWN, *_OF_STEPS):
            setattr(self, name, saved.content["loop"][name])
        self._reports.since = saved.content["loop"]["reported"]
        self._good = None if saved.changed else saved.content["good"]
        if saved.changed:  # what was said of its end, and what was known of steps under other settings, no longer holds
            self.reason, self.converged = "", None
            self._factor = self._captured_factor = 1.0
            self._since_look, self._unchecked = [], []
        if self.reason == "interrupted" or "steps were taken" in self.reason:
            self.reason = ""  # there may be more steps to take now
        self._file.restore_random(saved, seeded)
