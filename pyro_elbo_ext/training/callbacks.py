"""What a training run tells to the outside: a base class for callbacks, and the list of them that the loop calls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any


class Callback:
    """Told about a run at its start, every so many steps, and at its end. Subclass it and override what you need.

    The methods here do nothing, and each returns nothing. An exception in one of them ends the run.
    """

    def start(self, settings: Mapping[str, Any]) -> None:
        """Before the first step, and before the first step of a run that is resumed.

        Parameters
        ----------
        settings
            What was asked for, as plain values: names of model and guide, loss, optimizer, learning rate, number of steps,
            seed, versions.
        """

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Every so many steps.

        Parameters
        ----------
        step
            Steps taken so far.
        metrics
            In nats, means over the last steps: ``elbo``, ``objective``, ``reconstruction``, ``kl_prior``, the last being
            KL(q || prior) with weight 1, and by site ``kl_prior/SITE`` and ``log_p/SITE``. Besides ``kl_weight``,
            ``learning_rate``, ``steps_per_second``, and ``validation_elbo`` where there is a new one. A loss of Pyro's gives
            fewer.
        """

    def finish(self, summary: Mapping[str, Any]) -> None:
        """After the last step, also if an interrupt or an error has ended the run.

        Parameters
        ----------
        summary
            ``status`` ("finished", "interrupted" or "failed"), ``reason``, ``converged``, ``steps``, ``seconds`` and
            ``elbo``, the last mean.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on from here: values that ``torch.save`` can write."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave at the checkpoint; called before :meth:`start`."""


class CallbackList:
    """The callbacks of a run, called in turn.

    Parameters
    ----------
    callbacks
        In the order in which they are called.

    Raises
    ------
    TypeError
        If one is not a :class:`Callback`, or later if one of its methods returns something.
    """

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        if isinstance(callbacks, Callback):
            raise TypeError(f"callbacks must be a list of callbacks: write [{type(callbacks).__name__}(...)]")
        self._callbacks = list(callbacks)
        self._started: list[Callback] = []
        for callback in self._callbacks:
            if not isinstance(callback, Callback):
                hint = " (an instance of it, not the class)" if isinstance(callback, type) else ""
                raise TypeError(f"callbacks must be subclasses of Callback{hint}, got {callback!r}")

    def __len__(self) -> int:
        return len(self._callbacks)

    def start(self, settings: Mapping[str, Any]) -> None:
        """Start all, each with the same settings that it can only read."""
        self._started = []
        for callback in self._callbacks:
            self._started.append(callback)
            self._call(callback, "start", MappingProxyType(dict(settings)))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Give the metrics to all."""
        for callback in self._callbacks:
            self._call(callback, "log", step, MappingProxyType(dict(metrics)))

    def finish(self, summary: Mapping[str, Any], error: BaseException | None = None) -> None:
        """Finish all that were started, even if one of them fails.

        Parameters
        ----------
        summary
            The account of the run.
        error
            What has ended the run. Failures of callbacks are then noted on it, so that it remains what is raised;
            otherwise the first of them is raised at the end.
        """
        started, self._started = self._started, []
        first: Exception | None = None
        for callback in started:
            try:
                self._call(callback, "finish", MappingProxyType(dict(summary)))
            except Exception as failure:
                earlier = error or first
                if earlier is None:
                    first = failure
                else:
                    earlier.add_note(
                        f"Then {type(callback).__name__}.finish failed: {type(failure).__name__}: {failure}"
                    )
        if first is not None:
            raise first

    def state_dict(self) -> list[dict[str, Any]]:
        """Class and state of each that has a state."""
        states = [(type(callback).__name__, callback.state_dict()) for callback in self._callbacks]
        return [{"class": name, "state": state} for name, state in states if state]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Give each state to the next callback of its class. Callbacks that have none may come and go.

        Raises
        ------
        ValueError
            If there is none of that class left, naming it: what it wrote would end at the checkpoint.
        """
        waiting = list(self._callbacks)
        for state in states:
            found = next((callback for callback in waiting if type(callback).__name__ == state["class"]), None)
            if found is None:
                raise ValueError(
                    f"the checkpoint has the state of a {state['class']}, which is not among the callbacks "
                    f"{[type(callback).__name__ for callback in self._callbacks]}: resume with the same ones, in order"
                )
            waiting.remove(found)
            self._call(found, "load_state_dict", state["state"])

    @staticmethod
    def _call(callback: Callback, method: str, *args: Any) -> None:
        result = getattr(callback, method)(*args)
        if result is not None:
            raise TypeError(
                f"{type(callback).__name__}.{method} returned {result!r}. A callback returns nothing; to end a run, raise."
            )
