"""Whether counts and seeds are what they may be, in one way for all that takes them; what errors call arguments."""

from __future__ import annotations

import inspect
import numbers
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine


def signature_of_callable(function: Any) -> inspect.Signature | None:
    """What a program takes; None where that is not known."""
    function = poutine.unwrap(function)
    if isinstance(function, torch.nn.Module):
        function = function.forward
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # some callables have none
        return None


def named_arguments(
    program: Callable[..., Any] | None, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[tuple[str, Any]]:
    """Each argument of a call with what errors call it: the name that the program has for it.

    Where there is none, as for those that ``*args`` takes, it is the place among the arguments by position, from 0.
    """
    signature = None if program is None else signature_of_callable(program)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    known = [] if signature is None else [name for name, of in signature.parameters.items() if of.kind in kinds]
    names = [f"argument '{known[i]}'" if i < len(known) else f"argument {i}" for i in range(len(args))]
    return [*zip(names, args, strict=True), *((f"argument '{name}'", value) for name, value in kwargs.items())]


def check_count(name: str, value: Any, least: int = 1) -> int:
    """The value as an ``int``: a TypeError for what is no integer, as a truth value is, a ValueError below ``least``."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {value!r}") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, not {number}")
    return number


def check_seed(seed: Any, *, needed: bool = False) -> None:
    """Raise unless ``seed`` is an integer that all generators take, from 0 to ``2**32 - 1``; or None, if not ``needed``."""
    if (needed or seed is not None) and check_count("seed", seed, 0) >= 2**32:
        raise ValueError(f"seed must be below 2**32, not {seed!r}")


def check_fraction(name: str, value: Any) -> None:
    """Raise unless the value is a number between 0 and 1, neither of them."""
    check_number(name, value)
    if not 0 < value < 1:
        raise ValueError(f"{name} must be between 0 and 1, not {value!r}")


def check_number(name: str, value: Any) -> None:
    """Raise a TypeError for what is no real number; NaN and infinity are some."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, not {value!r}")


def names_of(name: str, value: str | Iterable[str]) -> list[str]:
    """One name or several, as a list; a TypeError for anything else."""
    if isinstance(value, str):
        return [value]
    names = list(value) if isinstance(value, Iterable) else None
    if names is None or not all(isinstance(one, str) for one in names):
        raise TypeError(f"{name} must be a name or several, not {value!r}")
    return names


def check_mapping(name: str, value: Any) -> None:
    """Raise a TypeError for what is no mapping."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping, not {value!r}")
