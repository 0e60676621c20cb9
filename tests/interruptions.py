"""An exception from outside, as the handler of a signal raises it, at every place of some code in turn."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType, ModuleType
from typing import Any, TypeVar

State = TypeVar("State")


class Stop(BaseException):
    """What comes from outside: no class of error that code has a reason to expect."""


class _Tracer:
    """Counts the bytecodes that are run in some modules, and raises at one of them."""

    def __init__(self, modules: tuple[ModuleType, ...], at: int | None) -> None:
        self.files = {module.__file__ for module in modules}
        self.at, self.count = at, 0

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        if frame.f_code.co_filename not in self.files:
            return None
        frame.f_trace = self  # without it Python 3.12 and 3.13 do not take up what follows
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            self.count += 1
            if self.count - 1 == self.at:
                raise Stop
        return self


def stopped_everywhere(
    prepare: Callable[[], State], act: Callable[[State], object], *modules: ModuleType, stride: int = 1
) -> Iterator[State]:
    """The states after ``act`` on a fresh one has been stopped at every ``stride``-th of its bytecodes in the modules.

    ``prepare`` may give the same object again: then its bytecodes may be others each time, and the last ones not reached.
    """

    def run(state: State, at: int | None) -> int:
        tracer, before = _Tracer(modules, at), sys.gettrace()
        sys.settrace(tracer)
        try:
            act(state)
        except Stop:
            assert at is not None
        finally:
            sys.settrace(before)
        return tracer.count

    for at in range(0, run(prepare(), None), stride):
        state = prepare()
        run(state, at)
        yield state
