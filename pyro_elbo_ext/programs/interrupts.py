"""Ctrl-C at a moment that suits."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interrupts_wait(numbers: Iterable[int] = (signal.SIGINT,)) -> Iterator[None]:
    """Let an interrupt come at the end of the block, so that what belongs together is done together.

    A second Ctrl-C does not wait: the block may hang. Only the main thread receives interrupts: elsewhere there is nothing
    to do.

    Parameters
    ----------
    numbers
        Of the signals that wait, as far as Python handles them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in numbers}
    before: dict[int, Any] = {
        number: of for number, of in handlers.items() if callable(of) or (number == signal.SIGINT and of is not None)
    }
    received: list[int] = []

    def wait(number: int, *_: Any) -> None:
        if number not in received:
            received.append(number)
        elif number == signal.SIGINT:
            received.remove(number)
            signal.signal(number, before[number])
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, wait)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in received:
            signal.raise_signal(number)


@contextmanager
def handlers_are_heard() -> Iterator[list[BaseException]]:
    """Whatever a signal handler raises in the block comes out of it as it was raised.

    A time-out is raised in the middle of whatever runs. Torch's compiler wraps some exceptions and goes on after others. The
    block is given the list of what has been raised, so that it need not go on.
    """
    raised: list[BaseException] = []
    if threading.current_thread() is not threading.main_thread():  # which alone runs handlers
        yield raised
        return
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    before = {number: (_heard(of, raised), of) for number, of in handlers.items() if callable(of)}
    for number, (heard, _) in before.items():
        signal.signal(number, heard)
    try:
        yield raised
    finally:
        for number, (heard, handler) in before.items():
            if signal.getsignal(number) is heard:  # or the handler has set another
                signal.signal(number, handler)
        if raised:
            raise raised[0]


def _heard(handler: Any, raised: list[BaseException]) -> Any:
    def heard(*of: Any) -> Any:
        try:
            return handler(*of)
        except BaseException as error:
            raised.append(error)
            raise

    return heard
