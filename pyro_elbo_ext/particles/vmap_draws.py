"""Make the samplers of ``torch.distributions`` and ``pyro.distributions`` run inside ``torch.vmap``.

Most of them fill fresh memory in place, which ``torch.vmap`` refuses: what is fresh there belongs to all the batch. While
a :class:`DrawMode` is active they fill memory that has the batch's dimension instead. The distributions drawn from, and
so the gradients of reparameterized draws, are the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.distributions import Distribution, dirichlet
from torch.overrides import TorchFunctionMode

_DRAWS_IN_PLACE = {
    Tensor.bernoulli_,
    Tensor.cauchy_,
    Tensor.exponential_,
    Tensor.geometric_,
    Tensor.log_normal_,
    Tensor.normal_,
    Tensor.random_,
    Tensor.uniform_,
}
# These are known to use what the in-place draw returns, not the tensor it was called on, which stays as it was.
_USE_THE_RETURN_VALUE = ("torch.distributions.", "pyro.distributions.")
_FILL_PARAMETERS = "pyro.distributions.transforms."


class DrawMode(TorchFunctionMode):
    """Rewrites what samplers do in place.  Active around a distribution's ``sample`` or ``rsample``.

    Parameters
    ----------
    seed : Tensor
        Any tensor that is batched by the ``torch.vmap`` in which the mode is used.
    """

    def __init__(self, seed: Tensor) -> None:
        super().__init__()
        self._seed = seed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rewrite = _REWRITES.get(func)
        if rewrite is not None:
            return rewrite(self, func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def like(self, tensor: Tensor) -> Tensor:
        """Batched memory of the shape, dtype and device of ``tensor``."""
        return self._seed.new_empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)

    def batched(self, tensor: Tensor) -> Tensor:
        """``tensor``, differentiably, as a batched one."""
        return tensor if is_batchedtensor(tensor) else self.like(tensor).copy_(tensor)


def _draw(mode: DrawMode, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    target = args[0]
    if not is_batchedtensor(target):
        caller = sys._getframe(2).f_globals.get("__name__", "")
        if caller.startswith(_USE_THE_RETURN_VALUE) and not caller.startswith(_FILL_PARAMETERS):
            target = mode.like(target)
    return func(target, *args[1:], **kwargs)


def _new(mode: DrawMode, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    if len(args) == 2 and isinstance(args[1], torch.Size) and not kwargs and is_batchedtensor(args[0]):
        return args[0].new_empty(args[1])  # Tensor.new itself forgets the batch
    return func(*args, **kwargs)


def _clamp(mode: DrawMode, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    if is_batchedtensor(args[0]):
        return args[0].copy_(torch.clamp(*args, **kwargs))  # Tensor.clamp_ has no batching rule
    return func(*args, **kwargs)


def _binomial(mode: DrawMode, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return func(*[mode.batched(tensor) for tensor in args], **kwargs)  # its rule wants both batched


_REWRITES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_DRAWS_IN_PLACE, _draw),
    Tensor.new: _new,
    Tensor.clamp_: _clamp,
    torch.binomial: _binomial,
}


class _DirichletDraw(torch.autograd.Function):
    """torch's reparameterized draw of Dirichlet and Beta, written so that it can be batched."""

    @staticmethod
    def forward(concentration: Tensor) -> Tensor:
        return torch._sample_dirichlet(concentration)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(output, inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        draw, concentration = ctx.saved_tensors
        return dirichlet._Dirichlet_backward(draw, concentration, grad)

    @staticmethod
    def vmap(info: Any, in_dims: Any, concentration: Tensor) -> Any:
        return _DirichletDraw.apply(concentration.movedim(in_dims[0], 0)), 0


class _BatchedDirichlet:
    """Stands in for ``torch.distributions.dirichlet._Dirichlet``."""

    def __init__(self, mode: DrawMode) -> None:
        self._mode = mode

    def apply(self, concentration: Tensor) -> Tensor:
        return _DirichletDraw.apply(self._mode.batched(concentration))  # unbatched, it would be one draw for all


_DIRICHLET = dirichlet._Dirichlet
_VALIDATE_SAMPLE = Distribution._validate_sample


@contextmanager
def samplers_for(mode: DrawMode) -> Iterator[None]:
    """Put in place what a :class:`DrawMode` cannot reach, while model and guide run inside ``torch.vmap``.

    Like Pyro's stack of handlers and its switch for validation, this holds for the whole process.
    """
    dirichlet._Dirichlet = _BatchedDirichlet(mode)  # type: ignore[assignment,misc]
    # a distribution that was expanded while validation was on goes on checking its values, and waits for the device
    Distribution._validate_sample = _accept  # type: ignore[method-assign]
    try:
        yield
    finally:
        dirichlet._Dirichlet = _DIRICHLET  # type: ignore[misc]
        Distribution._validate_sample = _VALIDATE_SAMPLE  # type: ignore[method-assign]


def _accept(self: Distribution, value: Tensor) -> None:
    """The looped run has checked."""
