"""Ctrl-C at a moment that suits."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Let an interrupt come at the end of the block, so that what belongs together is done together.

    A second one does not wait: the block may hang. Only the main thread receives interrupts: elsewhere there is nothing to
    do.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:  # None: not set by Python
        yield
        return
    received: list[tuple[Any, ...]] = []

    def wait(*of: Any) -> None:
        if not received:
            received.append(of)
            return
        received.clear()
        signal.signal(signal.SIGINT, before)
        signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if received:
            signal.raise_signal(signal.SIGINT)


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
