"""A run's checkpoint: when it is due, what is in it, whether it is of this run, and putting it back."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pyro.infer import SVI

from pyro_elbo_ext.programs.interrupts import interrupts_wait
from pyro_elbo_ext.training import processes
from pyro_elbo_ext.training.callbacks import CallbackList
from pyro_elbo_ext.training.data.batches import Batches, Whole
from pyro_elbo_ext.training.distributed import DistributedSVI
from pyro_elbo_ext.training.fingerprint import Fingerprint, described, differences
from pyro_elbo_ext.training.safety import Watch
from pyro_elbo_ext.training.state import checkpoints
from pyro_elbo_ext.training.state.state import (
    State,
    TrainingState,
    load_objective,
    objective_state,
    random_state,
    set_random_state,
)
from pyro_elbo_ext.training.stopping import StoppingRule

logger = logging.getLogger(__name__)

_SECONDS = 60.0  # between two, where no number of steps is asked for
_PARTS = ("training", "objective", "data", "rule", "callbacks", "loop", "good", "watch", "svi", "random")


@dataclass
class Saved:
    """What a checkpoint has, after it was checked.

    Attributes
    ----------
    content
        All of it.
    changed
        What the run is given now and was not given then, by the names of `fit`, in words.
    """

    content: State
    changed: Mapping[str, list[str]]


@dataclass
class Checkpoint:
    """The file that a run can go on from, and all that the rest of the run depends on, but the loop's own.

    Attributes
    ----------
    path
        The file.
    every
        Steps between two; None: about a minute.
    fingerprint
        What the run was given.
    """

    path: Path
    every: int | None
    state: TrainingState
    svi: SVI
    objective: Any
    data: Whole | Batches
    rule: StoppingRule | None
    callbacks: CallbackList
    watch: Watch
    fingerprint: Fingerprint

    def __post_init__(self) -> None:
        self._written = -math.inf  # the first comes at the first look

    def is_due(self, step: int) -> bool:
        """Whether to write one after so many steps."""
        return step % self.every == 0 if self.every is not None else time.monotonic() - self._written > _SECONDS

    def write(self, loop: State, good: tuple[int, State] | None) -> None:
        """Write all that the rest of the run depends on.

        Parameters
        ----------
        loop
            The loop's own.
        good
            The last good state, with its step.
        """
        content = {
            "training": self.state.capture(),
            "objective": objective_state(self.objective),
            "data": self.data.state_dict(),
            "rule": self.rule.state_dict() if self.rule is not None else None,
            "callbacks": self.callbacks.state_dict(),
            "loop": loop,
            "good": good,
            "watch": self.watch.state_dict(),
            "svi": self.svi.state_dict() if isinstance(self.svi, DistributedSVI) else None,
            "random": random_state(),
            "fingerprint": self.fingerprint,
        }
        with interrupts_wait():
            checkpoints.write(self.path, {"kind": "checkpoint", **content})
        self._written = time.monotonic()

    def read(self, max_steps: int, anyway: bool) -> Saved:
        """What the file has; nothing is changed yet.

        Raises
        ------
        ValueError
            If it is of other programs, or of a run that was given something else, or has parameters that are not finite.
        """
        path = self.path
        content = processes.on_main(lambda: checkpoints.read(path))
        if content.get("kind") != "checkpoint":
            raise ValueError(f"{path} is not a checkpoint of fit")
        checkpoints.check_parts(content, _PARTS, path)
        parameters = content["training"]["parameters"]
        checkpoints.check_same_parameters(self.state.parameters, parameters, str(path))
        for name, value in parameters.items():
            if not bool(torch.isfinite(value).all()):
                raise ValueError(
                    f"parameter '{name}' is NaN or infinite in {path}: begin anew, with another checkpoint"
                )
        if isinstance(self.svi, DistributedSVI) and content["svi"] is None:
            raise ValueError(f"{path} was written by a single process: resume in one")
        return Saved(content, processes.on_main(lambda: self._changed(content, max_steps, anyway)))

    def restore(self, saved: Saved) -> None:
        """Put back parameters, optimizers, objective, data and callbacks; what was given anew begins anew."""
        content, changed = saved.content, saved.changed
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
        if isinstance(self.svi, DistributedSVI):
            self.svi.load_state_dict(content["svi"])
        if not changed:
            self.watch.load_state_dict(content["watch"])

    @staticmethod
    def restore_random(saved: Saved, seeded: State) -> None:
        """Go on with the run's random numbers; with those of ``seeded`` where a seed is given anew."""
        set_random_state(seeded if "seed" in saved.changed else saved.content["random"])

    def _changed(self, content: State, max_steps: int, anyway: bool) -> dict[str, list[str]]:
        """What was given now and is not what the checkpoint's run was given; an error unless that is asked for."""
        path, taken = self.path, content["loop"]["step"]
        if taken > max_steps:
            raise ValueError(
                f"{path} has taken {taken:,} steps, more than the {max_steps:,} that are asked for: ask for more, or "
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
