"""Signs that training has failed: losses that are not finite, or far above where they were."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_elbo_ext.objectives import DecomposedELBO
from pyro_elbo_ext.objectives.not_finite import NotFinite
from pyro_elbo_ext.objectives.objective import Objective
from pyro_elbo_ext.programs.arguments import named_arguments
from pyro_elbo_ext.training.data.batches import Call
from pyro_elbo_ext.training.state.state import State

_FEWEST = 20  # losses before anything is said about their level
_DEFINITE = (constraints.positive_definite, constraints.positive_semidefinite)
_FACTOR = 100.0  # times the range of the losses so far, above the best level


class Watch:
    """Compares the level of the losses with the best so far.

    The range is from the best level to the first, and at least ten standard deviations of the losses and ten nats. Losses
    whose ``kl_prior`` has a weight that changes are not compared.
    """

    def __init__(self, objective: Any) -> None:
        weight = getattr(objective, "kl_weight", 1.0)
        self._comparable = isinstance(weight, int | float)
        self._first: float | None = None
        self._best = math.inf
        self._noise = 0.0
        self._recent: list[float] = []

    def diverged(self, losses: list[float]) -> str:
        """What is wrong with the losses of the steps since the last call; empty if nothing is."""
        self._recent += losses
        if not self._comparable or len(self._recent) < _FEWEST:
            return ""
        values = np.array(self._recent[-1000:])
        self._recent = []
        level = float(np.median(values))
        if self._first is None:
            self._first = level
        if level < self._best:
            self._best, self._noise = level, float(np.subtract(*np.percentile(values, [75, 25])) / 1.35)
        span = max(self._first - self._best, 10 * self._noise, 10.0)
        if level - self._best > _FACTOR * span:
            return f"the loss has risen from {self._best:.5g} to {level:.5g}"
        return ""

    def forget(self) -> None:
        """Drop what has not been judged yet."""
        self._recent = []

    def state_dict(self) -> State:
        """All of it."""
        return dict(vars(self))

    def load_state_dict(self, state: State) -> None:
        """Put it back."""
        vars(self).update(state)


def is_numerical(error: Exception) -> bool:
    """Whether an error comes of numbers that a program has computed, not of the program or the data.

    That is a loss or a term that is not finite, a matrix that is not positive definite, and a distribution that refuses a
    value for being NaN or infinite, or because what was computed from the parameters has come down to zero.
    """
    if isinstance(error, NotFinite | torch.linalg.LinAlgError):
        return True
    first: BaseException = error
    while first.__cause__ is not None:  # Pyro adds the site to it
        first = first.__cause__
    trace = first.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if not isinstance(first, ValueError) or trace is None:
        return isinstance(first, torch.linalg.LinAlgError)
    frame = trace.tb_frame
    if frame.f_globals.get("__name__") != torch.distributions.distribution.__name__:
        return False
    value, constraint = frame.f_locals.get("value"), frame.f_locals.get("constraint")
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    if not bool(value.isfinite().all()):
        return True
    if not value.requires_grad:  # it is data, or a constant of the program
        return False
    return constraint in _DEFINITE or (bool((value >= 0).all()) and bool((value == 0).any()))


def explain(model: Any, guide: Any, objective: Any, call: Call, loss: float, step: int) -> NotFinite:
    """An error for a loss that is not finite, naming the site where it can be found."""
    if not isinstance(objective, Objective):
        try:
            with torch.no_grad():
                DecomposedELBO(history=False).loss(model, guide, *call[0], **call[1])
        except ValueError as error:
            return NotFinite(f"{error}\nThe loss is {loss} at step {step}.")
    return NotFinite(f"the loss is {loss} at step {step}")


def nan_arguments(model: Callable[..., Any], call: Call) -> list[str]:
    """What the model calls the arguments of a step that have NaN."""
    return [
        name
        for name, value in named_arguments(model, *call)
        if isinstance(value, Tensor) and value.is_floating_point() and bool(value.isnan().any())
    ]
