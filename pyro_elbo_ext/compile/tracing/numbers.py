"""Float arguments as inputs of a graph: numbers that compute as Python's do, without anybody knowing their value."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

_ARITHMETIC = frozenset(
    name
    for of in ("add", "sub", "mul", "div", "truediv", "pow")
    for name in (of, f"__{of}__", f"__r{of}__", f"r{of}", f"__i{of}__")
) | {"true_divide", "neg", "__neg__", "negative", "__pos__", "positive", "__abs__", "abs", "rsub"}
# what gives the value to Python; all else is asked by code that takes tensors and finds one
_READING = frozenset(
    [
        *(
            "item",
            "tolist",
            "numpy",
            "data",
            "__array__",
            "__bool__",
            "__float__",
            "__int__",
            "__index__",
            "__complex__",
        ),
        *(
            "__repr__",
            "__str__",
            "__format__",
            "__hash__",
            "__contains__",
            "__len__",
            "__iter__",
            "__deepcopy__",
            "__reduce_ex__",
        ),
    ]
)
_DESCRIBING = frozenset(
    [
        *("dtype", "shape", "device", "layout", "ndim", "requires_grad", "is_leaf", "is_sparse", "is_cuda", "is_meta"),
        *("dim", "size", "numel", "is_floating_point", "is_complex", "ndimension", "names"),
    ]
)


class NeedsNumber(Exception):
    """The program needs the value of a float: for a decision, a shape, or a function of Python's."""


class Number(Tensor):
    """A float argument of a program that is traced.

    It looks like a tensor of the default dtype. Among numbers it computes in double precision, as Python does; with a tensor
    it takes that tensor's dtype, as torch has it for Python's floats.

    Parameters
    ----------
    value
        Float64 scalar, which is traced.
    needed
        Is added to where the program needs the number itself.
    """

    value: Tensor
    needed: list[str]

    @staticmethod
    def __new__(cls, value: Tensor, needed: list[str]) -> Number:
        number = Tensor._make_wrapper_subclass(cls, (), dtype=torch.get_default_dtype())
        number.value, number.needed = value, needed
        return number

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise _refusal(func, args, kwargs)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = func.__self__.__name__
        if name in ("value", "needed") or name in _DESCRIBING:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        numbers = [leaf for leaf in leaves if isinstance(leaf, Number)]
        others = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, Number)]
        if not others and name in _ARITHMETIC:
            args, kwargs = tree_map_only(Number, lambda one: one.value, (args, kwargs))
            with torch._C.DisableTorchFunctionSubclass():
                return Number(func(*args, **kwargs), numbers[0].needed)
        if name in _READING:
            raise _refusal(func, args, kwargs)
        dtype, device = _dtype_beside(others), others[0].device if others else numbers[0].value.device
        args, kwargs = tree_map_only(Number, lambda one: one.value.to(device, dtype), (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


class NumbersAsTensors(TorchFunctionMode):
    """``torch.tensor(number)`` and its like, which would read the number."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and args and isinstance(args[0], Number):
            if kwargs.get("requires_grad") or len(args) > 1:
                raise _refusal(func, args, kwargs)
            dtype = kwargs.get("dtype") or torch.get_default_dtype()
            return args[0].value.to(kwargs.get("device") or args[0].value.device, dtype, copy=True)
        if func in (Tensor.new_tensor, torch.full, Tensor.new_full, torch.full_like) and any(
            isinstance(leaf, Number) for leaf in tree_leaves((args, kwargs))
        ):
            raise _refusal(func, args, kwargs)
        return func(*args, **kwargs)


def _dtype_beside(tensors: list[Tensor]) -> torch.dtype:
    """What torch makes of a Python float in an operation with these tensors."""
    inexact = [tensor for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()]
    large = [tensor for tensor in inexact if tensor.dim()] or inexact
    dtype = large[0].dtype if large else torch.get_default_dtype()
    for tensor in large[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype.to_real() if dtype.is_complex else dtype


def _refusal(func: Any, args: Any, kwargs: Any) -> NeedsNumber:
    name = getattr(func, "__name__", str(func))
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Number):
            leaf.needed.append(name)
    return NeedsNumber(f"{name} needs the value of a float argument")
