"""How a guide is made from data: the recipe that calibration tries out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from pyro_elbo_ext.compile import CompiledSVI
from pyro_elbo_ext.objectives import DecomposedELBO
from pyro_elbo_ext.programs.arguments import check_count
from pyro_elbo_ext.programs.nodes import is_marked_site
from pyro_elbo_ext.programs.randomness import kept


def _is_marked(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    with kept(), torch.no_grad():
        nodes = poutine.trace(model).get_trace(*args, **kwargs).nodes
    return any(map(is_marked_site, nodes.values()))


class TrainGuide:
    """Train a fresh guide by stochastic variational inference.

    Parameters
    ----------
    guide_factory
        Called with the model, returns the guide: ``AutoNormal``, or ``lambda model: guide`` for a hand-written one.
    optim
        Optimizer; each training starts from a copy of it.
    loss
        Pyro loss or objective of this package; copied too. ``Trace_ELBO()`` by default, and ``DecomposedELBO()`` where the
        model has sites that are marked for enumeration, which it sums over.
    num_steps
        Steps of training.
    compiled
        Train by :class:`pyro_elbo_ext.CompiledSVI`. It compiles anew at each training, so that it pays for long ones only.

    Raises
    ------
    ValueError
        If ``num_steps`` is below 1; when called, if the loss becomes NaN or infinite.
    TypeError
        If ``optim`` is not an optimizer of ``pyro.optim``.
    """

    def __init__(
        self,
        guide_factory: Callable[[Any], Callable[..., Any]],
        optim: pyro.optim.PyroOptim,
        loss: Any = None,
        num_steps: int = 1000,
        *,
        compiled: bool = False,
    ) -> None:
        if not isinstance(optim, pyro.optim.PyroOptim):
            raise TypeError(f"optim must be an optimizer of pyro.optim, got {type(optim).__name__}")
        if not callable(guide_factory):
            raise TypeError(f"guide_factory must be callable, as AutoNormal is, got {type(guide_factory).__name__}")
        check_count("num_steps", num_steps)
        self.guide_factory, self.optim, self.num_steps = guide_factory, optim, num_steps
        self.loss, self.is_default = Trace_ELBO() if loss is None else loss, loss is None
        self.compiled = compiled

    def __call__(self, data: Mapping[str, Tensor], model: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The guide, trained on ``model(*args, **kwargs)``, which observes the data."""
        guide = self.guide_factory(model)
        optim, loss = copy.deepcopy(self.optim), copy.deepcopy(self.loss)
        if self.is_default and _is_marked(model, args, kwargs):
            loss = DecomposedELBO(history=False)
        if self.compiled:
            compiled = CompiledSVI(model, guide, optim, loss)
            losses = compiled.run(self.num_steps, *args, progress=False, **kwargs).tolist()
        else:
            svi, losses = SVI(model, guide, optim, loss), []
            for _ in range(self.num_steps):
                losses.append(svi.step(*args, **kwargs))
                if not math.isfinite(losses[-1]):
                    break
        for step, value in enumerate(losses):
            if not math.isfinite(value):
                raise ValueError(f"the loss is {value} at step {step} of {self.num_steps}: lower the learning rate")
        return guide

    def __repr__(self) -> str:
        # no addresses: a resumed calibration compares it
        guide = getattr(self.guide_factory, "__qualname__", type(self.guide_factory).__qualname__)
        optim = f"{self.optim.pt_optim_constructor.__name__}({self.optim.pt_optim_args})"
        loss = type(self.loss).__name__
        return f"TrainGuide({guide}, {optim}, {loss}, num_steps={self.num_steps}, compiled={self.compiled})"
