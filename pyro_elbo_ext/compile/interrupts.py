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
