"""The true ELBO of held-out data, without a step."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from pyro.infer import SVI
from torch import Tensor

from pyro_elbo_ext.objectives.objective import Objective
from pyro_elbo_ext.programs.randomness import seeded
from pyro_elbo_ext.programs.running import check_callable
from pyro_elbo_ext.training import processes
from pyro_elbo_ext.training.data.batches import Batches, Call, as_call, batch_length, check_source
from pyro_elbo_ext.training.state.state import training_modes

_SEED = 20_220_314  # the same random numbers each time, so that two evaluations differ by the parameters alone


class Validation:
    """Held-out data: a tensor, a tuple of arguments, a mapping of keyword arguments, or an iterable of such batches.

    The ELBO has every ``kl_prior`` with weight 1, whatever the objective weighs, and modules are in evaluation mode. Over
    several batches it is the mean, each counted by the length of its first tensor.
    """

    def __init__(self, data: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """``args`` and ``kwargs`` are the fixed arguments that go with each batch."""
        self._args, self._kwargs = args, kwargs
        if isinstance(data, Tensor | tuple | Mapping):
            self._batches: Iterable[Any] = [data]
        else:
            check_source(data, "validation")
            self._batches = data

    def check(self, model: Any) -> None:
        """Raise if there are no held-out data, or the model cannot be called with the first of them."""
        source = Batches(self._batches, (), {})
        try:
            batch = source.first_raw()
        except StopIteration:
            raise ValueError("validation is empty: there is no held-out data") from None
        check_callable(model, "model with the held-out data", *self._call(batch, 0))

    def elbo(self, svi: SVI, objective: Any) -> float:
        """Evaluate once, in nats."""
        total, weight = 0.0, 0.0
        loss = true_objective(objective)
        modes = training_modes((svi.model, svi.guide))
        try:
            for module, _ in modes:
                module.training = False
            with seeded(_SEED), torch.no_grad():
                for i, batch in enumerate(self._batches):
                    args, kwargs = self._call(batch, i)
                    evaluate = loss.loss if hasattr(loss, "loss") else loss
                    value = float(evaluate(svi.model, svi.guide, *args, **kwargs))
                    size = batch_length((args, kwargs)) or 1
                    total, weight = total - value * size, weight + size
        finally:
            for module, training in modes:
                module.training = training
        sums = processes.gather(np.array([total, weight])).sum(0)
        if sums[1] == 0:
            raise ValueError("validation is empty: there is no held-out data")
        return float(sums[0] / sums[1])

    def _call(self, batch: Any, index: int) -> Call:
        # held-out keywords stand in for the training data's
        kwargs = {**self._kwargs, **batch} if isinstance(batch, Mapping) else self._kwargs
        return as_call(batch, self._args, kwargs, f"held-out batch {index}")


def true_objective(loss: Any) -> Any:
    """The objective with every ``kl_prior`` at weight 1, recording nothing; a loss of Pyro's as it is."""
    if not isinstance(loss, Objective):
        return loss
    true = copy.copy(loss)
    true.history = None
    for name, neutral in (("kl_weight", 1.0), ("free_bits", None)):
        if hasattr(true, name):
            setattr(true, name, neutral)
    return true
