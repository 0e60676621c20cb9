"""The arguments of a step: tensors, which become inputs of the graph, and all else, which tells graphs apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import SequenceKey, keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from pyro_elbo_ext.compile.errors import CannotCompile
from pyro_elbo_ext.programs.arguments import named_arguments

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Key = tuple[object, ...]


class Arguments(NamedTuple):
    """The arguments of one call, taken apart.

    Attributes
    ----------
    tensors : list of Tensor
        All tensors among them, in containers too.
    key : tuple
        Equal for two calls if one graph may serve both: the shape, strides, dtype and device of each tensor, the type of
        each float, and the type and value of what is neither.
    rebuild : callable
        Gives ``args, kwargs`` with other tensors, and other floats, in place of these.
    numbers : list of float
        All floats among them.
    """

    tensors: list[Tensor]
    key: Key
    rebuild: Callable[[list[Tensor], list[Any]], tuple[Args, Kwargs]]
    numbers: list[Any]


def take_apart(args: Args, kwargs: Kwargs) -> Arguments:
    """Separate the tensors from the rest.

    Raises
    ------
    CannotCompile
        For an argument whose changes could not be noticed, such as a NumPy array, or a tensor that is not strided.
    """
    if not kwargs and all(isinstance(value, Tensor) for value in args):  # most calls; a tree takes longer
        return Arguments(list(args), tuple([_describe(tensor) for tensor in args]), _as_positional, [])
    leaves, spec = tree_flatten((args, kwargs))
    is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
    key: list[object] = [repr(spec)]
    for leaf in leaves:
        if isinstance(leaf, float | np.floating):
            key.append(type(leaf))
            continue
        key.append(_describe(leaf) if isinstance(leaf, Tensor) else (type(leaf), leaf))
        try:
            hash(key[-1])
        except TypeError:
            raise CannotCompile(
                f"an argument is a {type(leaf).__name__}, of which a graph could not tell whether it has changed. Pass "
                "data as tensors, settings as numbers, strings or other hashable objects."
            ) from None

    def rebuild(tensors: list[Tensor], numbers: list[Any]) -> tuple[Args, Kwargs]:
        remaining, floats = iter(tensors), iter(numbers)
        filled = [
            next(remaining) if at else next(floats) if isinstance(leaf, float | np.floating) else leaf
            for at, leaf in zip(is_tensor, leaves, strict=True)
        ]
        return tree_unflatten(filled, spec)

    numbers = [leaf for leaf in leaves if isinstance(leaf, float | np.floating)]
    return Arguments([leaf for leaf in leaves if isinstance(leaf, Tensor)], tuple(key), rebuild, numbers)


def name_of(
    place: int, args: Args, kwargs: Kwargs, program: Callable[..., Any], kind: type | tuple[type, ...] = Tensor
) -> str:
    """What to call the tensor at a place in :class:`Arguments`: where it stands, and the program's name for it."""
    paths = [path for path, leaf in tree_flatten_with_path((args, kwargs))[0] if isinstance(leaf, kind)]
    (of, first, *rest) = paths[place]
    by_name = of == SequenceKey(1)
    name = f"argument {first.key!r}" if by_name else named_arguments(program, args, {})[first.idx][0]  # type: ignore[attr-defined]
    return f"{name}{keystr(tuple(rest))}"


def described(args: Args, kwargs: Kwargs, program: Callable[..., Any]) -> dict[str, object]:
    """What tells calls apart, by the names of the arguments."""
    leaves = tree_flatten((args, kwargs))[0]
    return {
        name_of(place, args, kwargs, program, object): _describe(leaf)
        if isinstance(leaf, Tensor)
        else (type(leaf), leaf)
        for place, leaf in enumerate(leaves)
    }


def _as_positional(tensors: list[Tensor], numbers: list[Any]) -> tuple[Args, Kwargs]:
    return tuple(tensors), {}


def _describe(tensor: Tensor) -> tuple[object, ...]:
    if tensor.layout is not torch.strided:
        raise CannotCompile(f"an argument is a tensor of layout {tensor.layout}. Pass strided tensors.")
    if tensor.is_neg() or tensor.is_conj():  # machine code reads the memory as it is
        raise CannotCompile(
            "an argument is the view that conj() gives, of numbers whose signs are not yet changed in memory. Pass "
            ".resolve_conj().resolve_neg() of it."
        )
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
