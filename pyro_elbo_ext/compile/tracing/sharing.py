"""While a program is traced: what is computed several times from the same is computed once.

A Python loop over times computes much anew that does not depend on the time: the rows of a transition matrix at all states,
their normalization and their logarithm. Every result has a number, which results of the same function of the same numbers
share; a result that has been there is given out again, and its gradient then is taken once for all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_FEWEST_ALIKE = 2  # times that a stack has a tensor, on average, for it to be stacked once

_UNARY = """abs amax clamp clamp_max clamp_min cumsum exp expm1 lgamma log log1p log_softmax logical_not logsigmoid logsumexp
    mean neg prod reciprocal relu rsqrt sigmoid softmax softplus sqrt square sum tanh"""
_SEVERAL = """add bmm div einsum eq gather ge gt index_select le linear lt matmul maximum minimum mm mul ne pow rsub sub
    take_along_dim true_divide where xlogy"""
_OPERATORS = "add radd sub rsub mul rmul truediv rtruediv pow rpow neg matmul rmatmul"
_SHARED = {*_UNARY.split(), *_SEVERAL.split(), *[f"__{name}__" for name in _OPERATORS.split()]}
# what gives views, or numbers that the program spells out: given out anew, for names and marks to be put on
_ANEW = {
    *(
        "as_tensor",
        "broadcast_tensors",
        "broadcast_to",
        "contiguous",
        "double",
        "expand",
        "expand_as",
        "flatten",
        "float",
    ),
    *(
        "long",
        "movedim",
        "narrow",
        "permute",
        "reshape",
        "select",
        "squeeze",
        "to",
        "transpose",
        "unflatten",
        "unsqueeze",
    ),
    *("view", "arange", "eye", "full", "full_like", "new_tensor", "ones", "ones_like", "tensor", "zeros", "zeros_like"),
}
_PLAIN = (bool, int, float, str, torch.dtype, torch.device, torch.Size)


class _Unknown(Exception):
    """An argument that cannot be compared."""


class Sharing(TorchFunctionMode):
    """The mode in which a program is traced.

    Attributes
    ----------
    count : int
        Of results that were given out again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._numbers: dict[object, int] = {}  # by how a result came about
        # by id: the tensor, so that no id is used twice; its version; its number
        self._known: dict[int, tuple[Tensor, int, int]] = {}
        self._results: dict[object, tuple[Tensor, int]] = {}  # and their versions

    @property
    def is_kept(self) -> bool:
        """Whether nothing has been written to what was given out."""
        return all(result._version == version for result, version in self._results.values())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "stack" and not kwargs and args[1:] in ((), (0,)):
            return self._stack(func, args[0])
        is_item = name == "__getitem__"
        if not (is_item or name in _SHARED or name in _ANEW) or "out" in kwargs:
            return func(*args, **kwargs)
        try:
            key = name, torch.is_grad_enabled(), self._key(args), self._key(tuple(kwargs.items()))
        except _Unknown:
            return func(*args, **kwargs)
        is_shared = name in _SHARED or (is_item and any(isinstance(leaf, Tensor) for leaf in tree_leaves(args[1])))
        if is_shared and key in self._results:
            known, version = self._results[key]
            if known._version == version and not known.__dict__:
                self.count += 1
                return known
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            self._enter(result, key)
            if is_shared:
                self._results[key] = result, result._version
        elif isinstance(result, (tuple, list)):
            for i, one in enumerate(result):
                self._enter(one, (key, i))
        return result

    def _stack(self, func: Any, tensors: Any) -> Tensor:
        """Each of several equal tensors once, and then as often as it is there."""
        places: dict[int, int] = {}
        at = [places.setdefault(self._number(tensor), len(places)) for tensor in tensors]
        if len(places) * _FEWEST_ALIKE > len(at):
            stacked: Tensor = func(tensors)
            return stacked
        self.count += len(at) - len(places)
        once: Tensor = func([tensors[at.index(place)] for place in range(len(places))])
        return once.index_select(0, torch.tensor(at, device=once.device))

    def _enter(self, result: Any, key: object) -> None:
        if isinstance(result, Tensor) and not self._is_known(result):
            number = self._numbers.setdefault(key, len(self._numbers))
            self._known[id(result)] = result, result._version, number

    def _is_known(self, tensor: Tensor) -> bool:
        known = self._known.get(id(tensor))
        return known is not None and known[1] == tensor._version

    def _number(self, tensor: Tensor) -> int:
        if not self._is_known(tensor):
            self._enter(tensor, ("given", id(tensor), tensor._version))
        return self._known[id(tensor)][2]

    def _key(self, value: Any) -> object:
        if type(value) in (Tensor, nn.Parameter):
            return Tensor, self._number(value)
        if isinstance(value, (tuple, list)):
            return type(value), tuple([self._key(one) for one in value])
        if isinstance(value, slice):
            return slice, self._key((value.start, value.stop, value.step))
        if value is None or value is Ellipsis or type(value) in _PLAIN:
            return type(value), repr(value)
        raise _Unknown
