"""A look at model and guide before the first step of a loss of Pyro's, which does not look itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.util import zero_grads
from torch import Tensor
from torch.utils._pytree import tree_map_only

from pyro_elbo_ext.compile.tracing.arguments import Args, Kwargs
from pyro_elbo_ext.compile.tracing.static_check import nothing_changed
from pyro_elbo_ext.objectives import DecomposedELBO
from pyro_elbo_ext.objectives.evaluation import Program
from pyro_elbo_ext.particles.batched_draws import CallKey, call_key
from pyro_elbo_ext.programs.running import look_at_pair

_MOST = 64  # kinds of calls that are remembered


def look(loss: Any, model: Program, guide: Program, args: Args, kwargs: Kwargs) -> None:
    """Raise what :class:`DecomposedELBO` would say of the programs; random numbers and buffers are left as they were.

    Of losses that are not the ELBO only names and shapes are looked at.
    """
    # what is behind an argument has been through its backward pass
    args, kwargs = tree_map_only(Tensor, lambda of: of.detach() if of.requires_grad else of, (args, kwargs))
    with nothing_changed((model, guide)) as written, written:
        marked = look_at_pair(model, guide, args, kwargs)
        if isinstance(loss, TraceEnum_ELBO) or (not marked and isinstance(loss, Trace_ELBO | TraceMeanField_ELBO)):
            DecomposedELBO(kl="sampled", history=False).check_programs(model, guide, *args, **kwargs)


class FirstLook:
    """``loss_and_grads`` of a loss with a look at the first call of each kind, before anything is trained by it.

    The look comes after the loss, which makes the parameters and draws its random numbers as without.
    """

    def __init__(self, loss: Any, loss_and_grads: Callable[..., Any]) -> None:
        self._loss, self._inner = loss, loss_and_grads
        self._seen: set[CallKey] = set()

    def __call__(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Any:
        key = call_key(args, kwargs)
        if key in self._seen:
            return self._inner(model, guide, *args, **kwargs)
        with warnings.catch_warnings(record=True) as caught:  # of what may be an error
            warnings.simplefilter("always")
            try:
                with poutine.trace(param_only=True) as called:
                    loss = self._inner(model, guide, *args, **kwargs)
            except (TypeError, ValueError, RuntimeError, ZeroDivisionError):
                look(self._loss, model, guide, args, kwargs)  # which may say better what is wrong
                raise
            try:
                look(self._loss, model, guide, args, kwargs)
            except (TypeError, ValueError, RuntimeError):
                zero_grads([site["value"].unconstrained() for site in called.trace.nodes.values()])
                raise
        for warning in caught:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        self._remember(key)
        return loss

    def looked_at(self, args: Args, kwargs: Kwargs) -> None:
        """Take note that the programs have been looked at in a call of this kind."""
        self._remember(call_key(args, kwargs))

    def _remember(self, key: CallKey) -> None:
        if len(self._seen) >= _MOST:
            self._seen.clear()
        self._seen.add(key)
