"""A function of one draw, computed for many: all at once by ``torch.vmap`` where that gives the same, else one by one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import pyro
import torch
from torch import Tensor
from torch._C import _functorch

from pyro_elbo_ext.programs.faults import first_line
from pyro_elbo_ext.programs.interrupts import handlers_are_heard

logger = logging.getLogger(__name__)

OfOneDraw = Callable[[Mapping[str, Tensor]], list[Tensor]]

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # sums come in another order


class OverDraws:
    """Tensors that a function gives at each of many draws, stacked along a new first dim.

    Attributes
    ----------
    looped : str or None
        Why the draws are run one after the other; None while they are run at once.
    """

    def __init__(self, function: OfOneDraw) -> None:
        self.function = function
        self.looped: str | None = None
        self._checked = False

    def __call__(self, values: Mapping[str, Tensor], count: int) -> list[Tensor]:
        """The tensors at ``count`` draws, ``values`` of shape ``(count, ...)`` by site."""
        if not values:
            return [tensor.expand(count, *tensor.shape) for tensor in self.function({})]
        if count > 1 and self.looped is None:
            with handlers_are_heard() as raised:
                try:
                    stacked = self._at_once(values)
                    if not self._checked:
                        self._check(values, stacked, count)
                        self._checked = True
                    return stacked
                except Exception as error:
                    if raised:  # a time-out by a signal, and no reason to go on one by one
                        raise
                    # an error of the program itself will come again
                    self.looped = f"{type(error).__name__}: {first_line(error)}"
                    logger.info("the model is run for one draw after the other, since %s", self.looped)
        rows = [self.function(_at(values, index)) for index in range(count)]
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    def _at_once(self, values: Mapping[str, Tensor]) -> list[Tensor]:
        fallback = _functorch._is_vmap_fallback_enabled()  # type: ignore[attr-defined]
        # a loop over the draws, with a warning, for operators that have no rule
        _functorch._set_vmap_fallback_enabled(False)  # type: ignore[attr-defined]
        try:
            with pyro.validation_enabled(False):
                stacked: list[Tensor] = torch.vmap(self.function, randomness="error")(dict(values))
                return stacked
        finally:
            _functorch._set_vmap_fallback_enabled(fallback)  # type: ignore[attr-defined]

    def _check(self, values: Mapping[str, Tensor], stacked: list[Tensor], count: int) -> None:
        """Raise RuntimeError unless the first and the last draw give alone what they give among the others."""
        for index in (0, count - 1):
            for alone, tensor in zip(self.function(_at(values, index)), stacked, strict=True):
                among, tolerance = tensor[index], _TOLERANCE.get(alone.dtype, 0.0)
                if among.shape != alone.shape or not torch.allclose(
                    among.double(), alone.double(), rtol=tolerance, atol=tolerance, equal_nan=True
                ):
                    raise RuntimeError("a draw gives other numbers among others than alone")


def _at(values: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    return {name: draws[index] for name, draws in values.items()}
