"""Packed tensors, as Pyro's sums over products take them: no dims of size 1, and a name for each, in ``_pyro_dims``."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

from pyro.ops import packed
from torch import Tensor

Ordinal = frozenset[str]  # the symbols of the plates that a site is in


def dims_of(tensor: Tensor) -> str:
    """The symbols of its dims."""
    dims: str = tensor._pyro_dims  # type: ignore[attr-defined]
    return dims


def named(tensor: Tensor, dims: str) -> Tensor:
    """The tensor, with these names for its dims."""
    tensor._pyro_dims = dims  # type: ignore[attr-defined]
    return tensor


def summed_to(tensor: Tensor, ordinal: Ordinal) -> Tensor:
    """The sum over all dims but those of the ordinal's plates."""
    dims = dims_of(tensor)
    others = [at for at, dim in enumerate(dims) if dim not in ordinal]
    return named(tensor.sum(others), "".join([dim for dim in dims if dim in ordinal])) if others else tensor


def spread(tensor: Tensor, sizes: dict[str, int]) -> Tensor:
    """The tensor, expanded to further dims."""
    missing = {dim: size for dim, size in sizes.items() if dim not in dims_of(tensor)}
    return named(tensor.expand(*missing.values(), *tensor.shape), "".join(missing) + dims_of(tensor))


def broadcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, with the same dims."""
    result: tuple[Tensor, ...] = packed.broadcast_all(*tensors)
    return result


def unpacked(tensor: Tensor, symbol_to_dim: dict[str, int]) -> Tensor:
    """The tensor with its dims where the trace has them."""
    result: Any = packed.unpack(tensor, symbol_to_dim)
    return result


def connected(dims: Sequence[Set[str]]) -> list[list[int]]:
    """The positions of those that share dims, directly or through others, together; in order within a group."""
    groups: list[tuple[Set[str], list[int]]] = []
    for position, own in enumerate(dims):
        symbols, members = own, [position]
        apart = []
        for theirs, others in groups:
            if symbols & theirs:
                symbols, members = symbols | theirs, others + members
            else:
                apart.append((theirs, others))
        groups = [*apart, (symbols, members)]
    return [sorted(members) for _, members in groups]
