"""One line of progress: ELBO with its trend, reconstruction, KL(q || prior), steps per second."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, TextIO

from tqdm.auto import tqdm
from tqdm.std import tqdm as plain_tqdm

_EVERY = 0.5  # seconds between two looks at the numbers
_EVERY_IN_FILE = 10.0  # seconds between two lines where they are not overwritten
_SHOWN = 8  # means that the trend is judged by


class _Lines:
    """A stream on which each refresh of a bar is a line of its own, as a log file wants it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        text = text.replace("\r", "").rstrip(" ")
        if text.strip():
            self._stream.write(text.rstrip("\n") + "\n")

    def flush(self) -> None:
        self._stream.flush()


class Progress:
    """The line, in a terminal, a notebook or a log file.

    Parameters
    ----------
    total
        Steps to be taken, None if that is not known.
    shown
        False for no line at all.
    """

    def __init__(self, total: int | None, initial: int, shown: bool) -> None:
        self._shown = shown
        self._text: str | None = None
        self._means: deque[float] = deque(maxlen=_SHOWN)
        self._looked = 0.0
        settings: dict[str, Any] = {"total": total, "initial": initial, "unit": "step", "disable": not shown}
        if shown and not _overwrites():
            stream: Any = _Lines(sys.stderr)
            self._bar: Any = plain_tqdm(
                file=stream, mininterval=_EVERY_IN_FILE, maxinterval=_EVERY_IN_FILE, ascii=True, ncols=0, **settings
            )
        else:
            self._bar = tqdm(dynamic_ncols=True, **settings)

    @property
    def is_due(self) -> bool:
        """Whether it is time for new numbers."""
        return self._shown and time.monotonic() - self._looked > _EVERY

    def advance(self, steps: int) -> None:
        """Count steps."""
        self._bar.update(steps)

    def describe(self, text: str | None) -> None:
        """What is going on, in front of the line."""
        if text != self._text:
            self._text = text
            self._bar.set_description(text)

    def show(self, metrics: Mapping[str, float], status: str) -> None:
        """New numbers; ``status`` is what the stopping rule says."""
        self._looked = time.monotonic()
        self._means.append(metrics["elbo"])
        parts = [f"ELBO {metrics['elbo']:.5g} {self._trend()}".rstrip()]
        if "reconstruction" in metrics:
            parts.append(f"reconstruction {metrics['reconstruction']:.5g}")
            parts.append(f"KL(q||prior) {metrics['kl_prior']:.4g}")
        if metrics.get("kl_weight", 1.0) != 1.0:
            parts.append(f"weight {metrics['kl_weight']:.2g}")
        if "validation_elbo" in metrics:
            parts.append(f"validation {metrics['validation_elbo']:.5g}")
        if status:
            parts.append(status)
        self._bar.set_postfix_str(", ".join(parts), refresh=False)

    def conclude(self, metrics: Mapping[str, float], status: str) -> None:
        """The result's own numbers, which have no trend."""
        self._means.clear()
        self.show(metrics, status)

    def _trend(self) -> str:
        """Whether the later half of the means differs from the earlier by more than their noise."""
        half = len(self._means) // 2
        if half < 2 or not all(map(math.isfinite, self._means)):
            return ""
        values = list(self._means)
        early, late = values[:half], values[-half:]
        means = sum(early) / half, sum(late) / half
        squares = [sum((v - m) ** 2 for v in of) for of, m in zip((early, late), means, strict=True)]
        error = math.sqrt(sum(squares) / (half - 1) / half)
        if abs(means[1] - means[0]) <= 3 * error:
            return "(level)"
        return "(rising)" if means[1] > means[0] else "(falling)"

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self._shown:
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """The last state stays."""
        self._bar.close()


def _overwrites() -> bool:
    """Whether what is written can be overwritten: a terminal, or a notebook's widget."""
    return "ipykernel" in sys.modules or bool(getattr(sys.stderr, "isatty", lambda: False)())
