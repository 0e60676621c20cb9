"""What is in objects whose reads cannot be watched: containers, arrays, and objects of the standard library."""

from __future__ import annotations

import argparse
import functools
import gc
import threading
import weakref
from array import array
from collections import ChainMap, UserDict, UserList, deque
from collections.abc import Iterator
from contextvars import ContextVar
from enum import Enum
from types import MappingProxyType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from pyro.infer.reparam.reparam import Reparam
from torch.distributions import Distribution, Transform
from torch.utils.data import Dataset

CONTAINERS = (list, tuple, dict, set, frozenset, deque)
SIMPLE = (int, float, complex, str, bytes, bool, type(None), Enum, np.generic, torch.dtype, torch.device, torch.Size)
BUFFERS = (array, bytearray)
MISSING = object()  # stands for what is not there

_WITH_ATTRIBUTES = (SimpleNamespace, argparse.Namespace, UserDict, UserList, ChainMap, threading.local)
_CACHED = type(functools.lru_cache(len))
_IN_CACHE = "_lru_list_elem"


def opened(value: Any) -> list[Any]:
    """The containers in which an object keeps what it holds: itself, if it is one."""
    if isinstance(value, (*CONTAINERS, np.ndarray, *BUFFERS, ContextVar)) or _is_table(value):
        return [value]
    if isinstance(value, _WITH_ATTRIBUTES) or str(type(value).__module__).startswith("scipy."):
        return [vars(value)] if hasattr(value, "__dict__") else []
    if isinstance(value, functools.partial):
        return [value.args, value.keywords]
    if isinstance(value, functools.partialmethod):
        return [value.args, value.keywords]
    if isinstance(value, MappingProxyType):
        return [one for one in gc.get_referents(value) if isinstance(one, dict)]
    if isinstance(value, _CACHED):
        return [one for one in gc.get_referents(value) if isinstance(one, dict) and one is not value.__dict__]
    if isinstance(value, weakref.ref):
        return [(value(),)]
    if type(value).__name__ == _IN_CACHE:
        return [tuple(gc.get_referents(value))]
    return []


def has_public_attributes(value: Any) -> bool:
    """Whether it is of a class of torch's or Pyro's whose public attributes a user may set."""
    return isinstance(value, Distribution | Transform | Reparam | Dataset)


def within(container: Any) -> Iterator[Any]:
    """The objects in what :func:`opened` gives."""
    if isinstance(container, dict):
        yield from list(container.values())
    elif isinstance(container, CONTAINERS):
        yield from list(container)
    elif isinstance(container, np.ndarray) and container.dtype == object:
        yield from container.ravel().tolist()
    elif isinstance(container, ContextVar):
        yield container.get(None)


def contents(container: Any) -> list[Any]:
    """What it holds now, to be compared with what it held."""
    if isinstance(container, np.ndarray):
        if container.dtype == object:
            return [container.shape, *container.ravel().tolist()]
        return [container.shape, container.dtype, container.tobytes()]
    if isinstance(container, BUFFERS):
        return [bytes(container)]
    if isinstance(container, ContextVar):
        return [container.get(MISSING)]
    if _is_table(container):
        return [*contents(container.to_numpy()), *map(str, np.ravel(container.axes[-1]))]
    return [*container, *container.values()] if isinstance(container, dict) else list(container)


def is_fixed(value: Any) -> bool:
    """Whether a container can never hold anything else, nor what is in it."""
    if isinstance(value, tuple | frozenset):
        return all(map(is_fixed, value))
    return not isinstance(value, (*CONTAINERS, np.ndarray, *BUFFERS, ContextVar)) and not _is_table(value)


def are_same(some: list[Any], others: list[Any]) -> bool:
    """Whether :func:`is_same` holds for each pair."""
    return len(some) == len(others) and all(map(is_same, some, others))


def is_same(one: Any, other: Any) -> bool:
    """Whether a graph that was made with the one can be used with the other."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple):
        return are_same(list(one), list(other))
    if isinstance(one, MethodType):
        return one.__self__ is other.__self__ and one.__func__ is other.__func__
    if isinstance(one, float | complex | np.generic):
        return repr(one) == repr(other)  # also of NaN and -0.0
    return isinstance(one, SIMPLE) and bool(one == other)


def _is_table(value: Any) -> bool:
    """Whether it is a DataFrame or a Series of pandas, told without importing it."""
    return str(type(value).__module__).partition(".")[0] == "pandas" and type(value).__name__ in ("DataFrame", "Series")
