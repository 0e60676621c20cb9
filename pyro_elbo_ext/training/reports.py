"""What callbacks and the line of progress are told of a run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from pyro_elbo_ext.training.callbacks import CallbackList
from pyro_elbo_ext.training.progress import Progress
from pyro_elbo_ext.training.state.state import TrainingState

Numbers = Sequence[tuple[int, float]]  # step and number


class Reports:
    """The numbers of a run since it was last reported on.

    Parameters
    ----------
    callbacks
        Who is told of them.
    every
        Steps between two reports to them.
    """

    def __init__(self, objective: Any, state: TrainingState, callbacks: CallbackList, every: int) -> None:
        self._objective, self._state, self._callbacks, self._every = objective, state, callbacks, every
        self.since = 0  # step of the last report
        self._at = time.monotonic()

    def metrics(self, step: int, looks: Numbers, validated: Numbers, *, last: bool = False) -> dict[str, float]:
        """By name; ``looks`` has mean losses, ``validated`` held-out ELBOs.

        Means are over the steps since the last report, or with ``last`` over those that the result's ELBO is of.
        """
        seconds = time.monotonic() - self._at
        history = getattr(self._objective, "history", None)
        recent = looks[-1][1]
        metrics = {"elbo": -recent, "objective": -recent}
        if history is not None and len(history):
            metrics = history.recent(max(1, min(step if last else step - self.since, len(history) // 4, 1000)))
        rates = self._state.learning_rates()
        if rates:
            metrics["learning_rate"] = max(rates)
        metrics["steps_per_second"] = (step - self.since) / max(seconds, 1e-9)
        if validated and validated[-1][0] > self.since:
            metrics["validation_elbo"] = validated[-1][1]
        return metrics

    def is_due(self, step: int, bar: Progress) -> bool:
        """Whether anyone wants to be told."""
        return bar.is_due or self._is_callbacks(step)

    def give(self, step: int, looks: Numbers, validated: Numbers, bar: Progress, status: str) -> None:
        """Tell the callbacks and the line, each if it is due; ``status`` is what the stopping rule says."""
        metrics = self.metrics(step, looks, validated)
        if self._is_callbacks(step):
            self._reported(step)
            self._callbacks.log(step, metrics)
        if bar.is_due:
            if validated:
                metrics = {**metrics, "validation_elbo": validated[-1][1]}
            bar.show(metrics, status)
            if not self._callbacks:
                self._reported(step)

    def _is_callbacks(self, step: int) -> bool:
        return bool(self._callbacks) and step % self._every == 0

    def _reported(self, step: int) -> None:
        self.since, self._at = step, time.monotonic()
