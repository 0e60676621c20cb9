"""State that belongs to a (model, guide) pair and must not outlive it or stick to the next one."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

State = TypeVar("State")
Program = Callable[..., object]


class PerPair(Generic[State]):
    """Mapping from (model, guide) to a state, made on first use, that keeps neither alive.

    Bound methods are told apart by their object and function, since each access makes a new bound method. Copies and
    pickles of it are empty: what it holds can be found out again.
    """

    def __init__(self, make: Callable[[], State]) -> None:
        self._make = make
        self._entries: dict[tuple[int, ...], tuple[list[Callable[[], object]], State]] = {}
        self._recent: tuple[Callable[[], object], Callable[[], object], State] | None = None

    def __call__(self, model: Program, guide: Program) -> State:
        if self._recent is not None and self._recent[0]() is model and self._recent[1]() is guide:
            return self._recent[2]
        state = self._find(model, guide)
        self._recent = (_reference(model), _reference(guide), state)
        return state

    def _find(self, model: Program, guide: Program) -> State:
        owners = (*_owners(model), *_owners(guide))
        key = tuple([id(owner) for owner in owners])
        if key in self._entries:
            references, state = self._entries[key]
            if tuple([reference() for reference in references]) == owners:
                return state
        dead = [
            k for k, (references, _) in self._entries.items() if any(reference() is None for reference in references)
        ]
        for k in dead:
            del self._entries[k]
        state = self._make()
        self._entries[key] = ([_reference(owner) for owner in owners], state)
        return state

    def __getstate__(self) -> dict[str, object]:
        return {"_make": self._make, "_entries": {}, "_recent": None}


def _owners(program: Program) -> tuple[object, ...]:
    owner = getattr(program, "__self__", None)
    function = getattr(program, "__func__", None)
    return (program,) if owner is None or function is None else (owner, function)


def _reference(owner: object) -> Callable[[], object]:
    try:
        return weakref.ref(owner)
    except TypeError:  # a few callables cannot be referenced weakly; they are small
        return lambda: owner
