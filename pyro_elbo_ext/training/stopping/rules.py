"""When to stop: what the training loop asks of a rule, and two simple rules.  See `adaptive` for the default."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_elbo_ext.programs.arguments import check_count, check_number
from pyro_elbo_ext.training.stopping.guide_moments import flatten


class Decision(NamedTuple):
    """What the loop is to do next.

    Attributes
    ----------
    action : {"continue", "lower", "stop"}
        Go on; multiply the learning rate by ``factor`` and go on; or end the run.
    factor : float
        Of the learning rate, in (0, 1]; 1 unless the action is "lower".
    reason : str
        In words, for the result and the log; empty for "continue".
    parameters : Tensor or None
        Flat unconstrained parameters to go on from, shape ``(P,)``; None for those that are.
    """

    action: Literal["continue", "lower", "stop"]
    factor: float = 1.0
    reason: str = ""
    parameters: Tensor | None = None


CONTINUE = Decision("continue")


class StoppingRule(Protocol):
    """What the loop asks of a rule.

    It calls `start` once the parameters exist, then takes ``every`` steps at a time and calls `observe` after them. At the
    end it writes ``average``, if there is one, into the parameters.

    Attributes
    ----------
    every : int
        Steps between two looks.
    converged : bool
        Whether the rule has found the run to have converged.
    """

    every: int
    converged: bool

    def start(
        self,
        parameters: Mapping[str, Tensor],
        *,
        guide: Callable[..., Any] | None = None,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        learning_rate: float | None = None,
    ) -> None:
        """Begin, or go on before `load_state_dict`.

        Parameters
        ----------
        parameters
            Names to the unconstrained leaf tensors that are trained, which the loop goes on to change in place.
        guide, args, kwargs
            The guide and the arguments of a call; of any one batch where there are several.
        learning_rate
            The optimizer's, for the progress line.
        """

    def observe(self, step: int, iterate: Tensor, losses: NDArray[np.float64]) -> Decision:
        """Take note of the parameters after ``step`` steps, shape ``(P,)``, and of the losses since the last look."""

    @property
    def average(self) -> Tensor | None:
        """What to write into the parameters at the end, shape ``(P,)``; None to leave them."""

    @property
    def status(self) -> str:
        """A few words for the progress line."""

    def state_dict(self) -> dict[str, Any]:
        """All that has been found so far, as plain values and tensors."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""


def check_iterate(step: int, iterate: Tensor, parameters: Mapping[str, Tensor]) -> None:
    """Raise unless every number is finite, naming the parameter."""
    count = sum(parameter.numel() for parameter in parameters.values())
    if iterate.shape != (count,):
        raise ValueError(f"the iterate has shape {tuple(iterate.shape)}, the parameters {count} numbers")
    if bool(torch.isfinite(iterate).all()):
        return
    start = 0
    for name, parameter in parameters.items():
        piece = iterate[start : start + parameter.numel()]
        if not bool(torch.isfinite(piece).all()):
            raise ValueError(
                f"parameter '{name}' is NaN or infinite after step {step}; the stopping rule has taken no note of it. "
                "Go back to earlier parameters, with a smaller learning rate."
            )
        start += parameter.numel()


class Rule:
    """What the rules here have in common: how they begin. A rule of your own needs no base, see `StoppingRule`."""

    _parameters: dict[str, Tensor]

    def start(
        self,
        parameters: Mapping[str, Tensor],
        *,
        guide: Callable[..., Any] | None = None,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        learning_rate: float | None = None,
    ) -> None:
        """See `StoppingRule`."""
        self._parameters = dict(parameters)
        self._begin(guide, args, kwargs or {}, learning_rate)

    def _begin(
        self,
        guide: Callable[..., Any] | None,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        learning_rate: float | None,
    ) -> None:
        """For rules that look at more than the parameters."""


class FixedSteps(Rule):
    """Stop after a number of steps, with or without the average of the last half of the iterates.

    The average of the iterates has less noise than the last one. It takes two vectors of the parameters' size, and the
    iterates of every ``every`` steps.

    Parameters
    ----------
    num_steps : int
        How many.
    average : {None, "tail"}
        "tail" averages the iterates of the second half.
    every : int
        Steps between two looks.

    References
    ----------
    Polyak and Juditsky (1992), Acceleration of stochastic approximation by averaging.
    """

    def __init__(self, num_steps: int, average: Literal["tail"] | None = None, *, every: int = 20) -> None:
        if average not in (None, "tail"):
            raise ValueError(f'average must be None or "tail", not {average!r}')
        self.num_steps, self.every = check_count("num_steps", num_steps), check_count("every", every)
        self.converged = False  # nothing is looked at
        self._tail = average == "tail"
        self._parameters: dict[str, Tensor] = {}
        self._mean: Tensor | None = None
        self._count = 0

    def observe(self, step: int, iterate: Tensor, losses: NDArray[np.float64]) -> Decision:
        """See `StoppingRule`."""
        check_iterate(step, iterate, self._parameters)
        if self._tail and 2 * step > self.num_steps:
            self._count += 1
            if self._mean is None:
                self._mean = torch.zeros_like(iterate, dtype=torch.float64)
            self._mean += (iterate.double() - self._mean) / self._count
        if step < self.num_steps:
            return CONTINUE
        return Decision("stop", reason=f"all {self.num_steps} steps taken")

    @property
    def average(self) -> Tensor | None:
        """See `StoppingRule`."""
        return None if self._mean is None else self._mean.to(flatten(list(self._parameters.values())).dtype)

    @property
    def status(self) -> str:
        """See `StoppingRule`."""
        return ""

    def state_dict(self) -> dict[str, Any]:
        """See `StoppingRule`."""
        return {"mean": None if self._mean is None else self._mean.clone(), "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `StoppingRule`."""
        self._mean = None if state["mean"] is None else state["mean"].clone()
        self._count = state["count"]


class Patience(Rule):
    """Stop once the ELBO of held-out data has not improved in so many validations, and give back the best parameters.

    For amortized guides and learned models, which begin to fit the noise of their data. It is what Keras and Lightning
    call early stopping: after each validation, ``elbo > best + min_delta`` makes it the best and the count zero; otherwise
    the count goes up by one, and at ``patience`` the run ends.

    Parameters
    ----------
    patience : int
        Validations without an improvement.
    min_delta : float
        What counts as one, >= 0: nats, or a fraction of the best ELBO's size if ``relative``.
    relative : bool
        See ``min_delta``.
    every : int
        Steps between two looks.

    References
    ----------
    Prechelt (1998), Early stopping - but when?
    """

    def __init__(self, patience: int = 10, min_delta: float = 0.0, *, relative: bool = False, every: int = 20) -> None:
        check_number("min_delta", min_delta)
        if not (math.isfinite(min_delta) and min_delta >= 0):
            raise ValueError(f"min_delta must be finite and at least 0, not {min_delta!r}")
        self.patience, self.every = check_count("patience", patience), check_count("every", every)
        self.min_delta, self.relative = float(min_delta), relative
        self.converged = False
        self._parameters: dict[str, Tensor] = {}
        self._best = -math.inf
        self._best_step: int | None = None
        self._best_parameters: Tensor | None = None
        self._waited = 0

    def observe(self, step: int, iterate: Tensor, losses: NDArray[np.float64]) -> Decision:
        """Only check: training losses decide nothing here."""
        check_iterate(step, iterate, self._parameters)
        return CONTINUE

    def observe_validation(self, step: int, elbo: float) -> Decision:
        """Take note of the ELBO of held-out data at the parameters as they are.

        Raises
        ------
        ValueError
            If it is NaN or +inf, or the rule has not been started.
        """
        if not self._parameters:
            raise ValueError("start the rule with the parameters before the first validation")
        if math.isnan(elbo) or elbo == math.inf:
            raise ValueError(
                f"the validation ELBO after step {step} is {elbo}; the stopping rule has taken no note of it. Look for "
                "NaN in the validation data."
            )
        size = abs(self._best) if self.relative and math.isfinite(self._best) else 1.0
        needed = self.min_delta * size
        if self._best_parameters is None or elbo > self._best + needed:
            self._best, self._best_step, self._waited = float(elbo), step, 0
            self._best_parameters = flatten(list(self._parameters.values()))
            return CONTINUE
        self._waited += 1
        if self._waited < self.patience:
            return CONTINUE
        self.converged = True
        return Decision(
            "stop",
            reason=f"the validation ELBO has not risen above {self._best:.6g}, reached at step {self._best_step}, "
            f"in {self._waited} validations",
        )

    @property
    def average(self) -> Tensor | None:
        """The parameters of the best validation, shape ``(P,)``; None before the first."""
        return None if self._best_parameters is None else self._best_parameters.clone()

    @property
    def status(self) -> str:
        """See `StoppingRule`."""
        return f"patience {self._waited}/{self.patience}"

    def state_dict(self) -> dict[str, Any]:
        """See `StoppingRule`."""
        best = self._best_parameters
        return {
            "best": self._best,
            "best_step": self._best_step,
            "best_parameters": None if best is None else best.clone(),
            "waited": self._waited,
            "converged": self.converged,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `StoppingRule`."""
        best = state["best_parameters"]
        self._best, self._best_step, self._waited = state["best"], state["best_step"], state["waited"]
        self._best_parameters = None if best is None else best.clone()
        self.converged = state["converged"]
