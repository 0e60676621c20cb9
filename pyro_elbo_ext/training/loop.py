"""The loop: steps up to the next look, then rollback, stopping rule, validation, progress, callbacks, checkpoint."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyro.infer import SVI
from pyro.optim import PyroLRScheduler
from torch import Tensor

from pyro_elbo_ext.compile import CompiledSVI
from pyro_elbo_ext.objectives.not_finite import NotFinite
from pyro_elbo_ext.objectives.objective import Objective
from pyro_elbo_ext.programs.interrupts import interrupts_wait
from pyro_elbo_ext.training import processes
from pyro_elbo_ext.training.callbacks import CallbackList
from pyro_elbo_ext.training.data.batches import Batches, Call, Whole, named_arguments
from pyro_elbo_ext.training.data.validation import Validation
from pyro_elbo_ext.training.distributed import DistributedSVI
from pyro_elbo_ext.training.fingerprint import Fingerprint, described, differences
from pyro_elbo_ext.training.progress import Progress
from pyro_elbo_ext.training.result import Rollback
from pyro_elbo_ext.training.safety import Watch, explain, is_numerical
from pyro_elbo_ext.training.state import checkpoints
from pyro_elbo_ext.training.state.state import (
    State,
    TrainingState,
    load_objective,
    objective_state,
    random_state,
    set_random_state,
)
from pyro_elbo_ext.training.stopping import Decision, Patience, StoppingRule

logger = logging.getLogger(__name__)

_PLATEAU = torch.optim.lr_scheduler.ReduceLROnPlateau
LOOK_EVERY = 100  # steps between two looks, where no stopping rule asks for others
_LOOK_IN_C = 10  # times that, where steps are repeated without Python
_PIECE = 0.2  # seconds of compiled steps between two chances to interrupt
_CHECKPOINT_SECONDS = 60.0


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
        self._good: tuple[int, State] | None = None
        self._since_look: list[float] = []  # losses
        self._unchecked: list[float] = []  # the last of them, not yet known to be good
        self._checkpointed = -math.inf  # the first comes at the first look
        self._logged_step, self._logged_at = 0, time.monotonic()

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
        bar = self._bar = Progress(self._total(), self.step, self.progress)
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
                bar.show(self._metrics(), "")
            bar.close()
        self.seconds += time.monotonic() - began
        if self.checkpoint is not None and processes.is_main() and not self._torn:
            self.write_checkpoint()  # before the average takes the place of the parameters, to go on from
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
                    self._take(call, until - self.step)
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
                    if self._bar.is_due or (self.callbacks and self.step % self.log_every == 0):
                        self._report()
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
        in_one_go = isinstance(self.data, Whole) and isinstance(self.svi, CompiledSVI) and self.svi.eager_reason is None
        return LOOK_EVERY * (_LOOK_IN_C if in_one_go else 1)

    # Steps

    def _take(self, call: Call, most: int) -> None:
        """Take one step, or up to ``most`` compiled ones."""
        args, kwargs = call
        svi = self.svi
        compiled = isinstance(svi, CompiledSVI) and svi.eager_reason is None
        if compiled and self.step > 0 and not svi.is_traced(*args, **kwargs):
            self._bar.describe("compiling")
            self._prime(call)
            compiled = svi.eager_reason is None
        together = compiled and self.step > 0 and isinstance(self.data, Whole) and not self._schedules_by_step
        if together and svi.optimizer_reason is None:
            self._run(min(most, self._piece), call)
        else:
            self._count([float(svi.step(*args, **kwargs))])
            self._step_schedule()
        self._bar.describe(None)
        if not self._said:
            self._said = True
            reason = uncompiled(svi)
            self._bar.say(f"fit: {'compiled steps' if reason is None else f'steps by Pyro, uncompiled: {reason}'}")

    def _count(self, losses: list[float]) -> None:
        self.step += len(losses)
        self._unchecked += losses
        self._bar.advance(len(losses))

    def _run(self, steps: int, call: Call) -> None:
        began = time.perf_counter()
        self._count(self.svi.run(steps, *call[0], progress=False, **call[1]).tolist())
        seconds = time.perf_counter() - began
        if steps == self._piece and not _PIECE / 4 < seconds < _PIECE:
            self._piece = max(1, min(int(steps * _PIECE / (2 * max(seconds, 1e-6))), 8 * steps))

    _said = False  # whether the steps are compiled
    _piece = 16  # steps that take about _PIECE seconds

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

    @property
    def _schedules_by_step(self) -> bool:
        return isinstance(self.svi.optim, PyroLRScheduler) and isinstance(self.data, Whole)

    def _step_schedule(self) -> None:
        """Learning-rate schedulers go on once an epoch; where there are no epochs, with every step."""
        optim = self.svi.optim
        if not isinstance(optim, PyroLRScheduler) or optim.pt_scheduler_constructor is _PLATEAU:
            return
        epoch_ends = isinstance(self.data, Whole) or self.data.index == self.data.per_epoch
        if epoch_ends:
            optim.step()

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
        bad = [
            name
            for name, value in named_arguments(self._call)
            if isinstance(value, Tensor) and value.is_floating_point() and bool(value.isnan().any())
        ]
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
        optim = self.svi.optim
        if isinstance(optim, PyroLRScheduler) and optim.pt_scheduler_constructor is _PLATEAU:
            optim.step(-elbo)
        if isinstance(self.rule, Patience) and self.step > self.not_before:
            self._follow(self.rule.observe_validation(self.step, elbo))

    def _metrics(self) -> dict[str, float]:
        step, seconds = self._logged_step, time.monotonic() - self._logged_at
        history = getattr(self.objective, "history", None)
        recent = self.looks[-1][1]
        metrics = {"elbo": -recent, "objective": -recent}
        if history is not None and len(history):
            metrics = history.recent(max(1, min(self.step - step, len(history) // 4, 1000)))
        rates = self.state.learning_rates()
        if rates:
            metrics["learning_rate"] = max(rates)
        metrics["steps_per_second"] = (self.step - step) / max(seconds, 1e-9)
        if self.validated and self.validated[-1][0] > step:
            metrics["validation_elbo"] = self.validated[-1][1]
        return metrics

    def _report(self) -> None:
        metrics = self._metrics()
        if self.callbacks and self.step % self.log_every == 0:
            self._logged_step, self._logged_at = self.step, time.monotonic()
            self.callbacks.log(self.step, metrics)
        if self._bar.is_due:
            shown = {**metrics}
            if self.validated:
                shown["validation_elbo"] = self.validated[-1][1]
            self._bar.show(shown, getattr(self.rule, "status", ""))
            if not self.callbacks:
                self._logged_step, self._logged_at = self.step, time.monotonic()

    def _total(self) -> int | None:
        return self.max_steps if self.rule is None else None

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

    def _save_if_due(self, began: float) -> None:
        if self.checkpoint is None or not processes.is_main():
            return
        if self.checkpoint_every is not None:
            due = self.step % self.checkpoint_every == 0
        else:
            due = time.monotonic() - self._checkpointed > _CHECKPOINT_SECONDS
        if due:
            before = self.seconds
            self.seconds += time.monotonic() - began
            self.write_checkpoint()
            self.seconds = before

    def write_checkpoint(self) -> None:
        """Write all that the rest of the run depends on."""
        assert self.checkpoint is not None
        with interrupts_wait():
            checkpoints.write(self.checkpoint, {"kind": "checkpoint", **self._content()})
        self._checkpointed = time.monotonic()

    def _content(self) -> State:
        return {
            "training": self.state.capture(),
            "objective": objective_state(self.objective),
            "data": self.data.state_dict(),
            "rule": self.rule.state_dict() if self.rule is not None else None,
            "callbacks": self.callbacks.state_dict(),
            "loop": {name: getattr(self, name) for name in _OWN},
            "good": self._good,
            "watch": self._watch.state_dict(),
            "svi": self.svi.state_dict() if isinstance(self.svi, DistributedSVI) else None,
            "random": random_state(),
            "fingerprint": self.fingerprint,
        }

    def resume(self, anyway: bool = False) -> None:
        """Go on from the checkpoint; ``anyway``, even if it is of a run that was given something else.

        Raises
        ------
        ValueError
            If it is of other programs, or of another kind of loss, stopping rule or callbacks, or has parameters that are
            not finite. Nothing has changed then.
        """
        assert self.checkpoint is not None
        path = self.checkpoint
        content = processes.on_main(lambda: checkpoints.read(path))
        if content.get("kind") != "checkpoint":
            raise ValueError(f"{self.checkpoint} is not a checkpoint of fit")
        checkpoints.check_parts(content, (*self._content_parts(), "random"), path)
        checkpoints.check_same_parameters(self.parameters, content["training"]["parameters"], str(path))
        for name, value in content["training"]["parameters"].items():
            if not bool(torch.isfinite(value).all()):
                raise ValueError(
                    f"parameter '{name}' is NaN or infinite in {path}: begin anew, with another checkpoint"
                )
        seeded = random_state()
        changed = processes.on_main(lambda: self._changed(content, path, anyway))
        if processes.is_main():  # the others have none
            self.callbacks.load_state_dict(content["callbacks"])
        training = content["training"]
        if "optim" in changed:
            self.state.make_optimizers()
            training = {**training, "optimizers": self.state.capture()["optimizers"]}
        self.state.restore(training)
        load_objective(self.objective, content["objective"], same="loss" not in changed)
        if "data" not in changed:
            self.data.load_state_dict(content["data"])
        if self.rule is not None:
            self._start_rule()
            if "stopping" not in changed:
                self.rule.load_state_dict(content["rule"])
        for name, value in content["loop"].items():
            setattr(self, name, value)
        self._good = None if changed else content["good"]
        if not changed:
            self._watch.load_state_dict(content["watch"])
        else:  # what has been said of its end, and what was known of steps under other settings, no longer holds
            self.reason, self.converged = "", None
            self._factor = self._captured_factor = 1.0
            self._since_look, self._unchecked = [], []
        if isinstance(self.svi, DistributedSVI):
            if content["svi"] is None:
                raise ValueError(f"{self.checkpoint} was written by a single process: resume in one")
            self.svi.load_state_dict(content["svi"])
        if self.reason == "interrupted" or "steps were taken" in self.reason:
            self.reason = ""  # there may be more steps to take now
        set_random_state(seeded if "seed" in changed else content["random"])

    @staticmethod
    def _content_parts() -> tuple[str, ...]:
        return "training", "objective", "data", "rule", "callbacks", "loop", "good", "watch", "svi"

    def _changed(self, content: State, path: Path, anyway: bool) -> dict[str, list[str]]:
        """What was given now and is not what the checkpoint's run was given; an error unless that is asked for."""
        taken = content["loop"]["step"]
        if taken > self.max_steps:
            raise ValueError(
                f"{path} has taken {taken:,} steps, more than the {self.max_steps:,} that are asked for: ask for more, or "
                "begin anew with another checkpoint"
            )
        then = content.get("fingerprint")
        if then is None:
            logger.warning("%s does not tell what its run was given: it goes on with what is given now", path)
            if (content["rule"] is None) != (self.rule is None):
                raise ValueError(f"{path} was written with another stopping rule: resume with the same arguments")
            return {}
        changed = differences(then, self.fingerprint)
        if "optim" in changed and _live_rates(content["training"]["optimizers"], self.fingerprint["optim"]):
            del changed["optim"]
        said = [sentence for of_one in changed.values() for sentence in of_one]
        if said and not anyway:
            raise ValueError(
                f"{path} is of a run that was given something else: {'; '.join(said)}. Give the same, begin anew with "
                "another checkpoint, or pass resume='anyway' to go on with what is given now."
            )
        for sentence in said:
            logger.warning("going on from %s, though %s", path, sentence)
        return changed


def _live_rates(saved: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    """Whether an optimizer of torch is the very one of the checkpoint, with the learning rates that it had by then."""
    if "optimizer" not in saved or not isinstance(given["settings"], list):
        return False
    groups = [{k: v for k, v in group.items() if k != "initial_lr"} for group in saved["optimizer"]["groups"]]
    return bool(described(groups) == given["settings"])


def uncompiled(svi: SVI) -> str | None:
    """Why Pyro takes the steps; None if they are compiled."""
    if isinstance(svi, DistributedSVI):
        return "several processes"
    return svi.eager_reason if isinstance(svi, CompiledSVI) else "compiled=False"


_OWN = (
    "step",
    "seconds",
    "reason",
    "converged",
    "rollbacks",
    "validated",
    "looks",
    "_factor",
    "_captured_factor",
    "_epoch",
    "_since_look",
    "_unchecked",
    "_logged_step",
)
