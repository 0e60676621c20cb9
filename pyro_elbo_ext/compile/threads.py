"""What one thread at a time may do."""

from __future__ import annotations

import threading
from contextlib import ContextDecorator
from typing import Any

_RLock: Any = type(threading.RLock())  # written in C, as leaving the block is then


class OneThread(ContextDecorator, _RLock):
    """Refuses a second thread while one is in the block; the same one may enter again. A copy or pickle is a new one.

    Parameters
    ----------
    what
        Is done in the block, for the message.

    Raises
    ------
    RuntimeError
        On entering, if another thread is in it.
    """

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        if not self.acquire(False):
            raise RuntimeError(
                f"another thread is in {self._what}. Pyro keeps its handlers and parameters in one place for the whole "
                "process, so that two threads would take each other's. Train one after the other, or in several processes."
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return OneThread, (self._what,)
