"""Metrics as a CSV file, one row for each time they were logged."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from pyro_elbo_ext.files.atomic import named, replaced
from pyro_elbo_ext.training.callbacks import Callback
from pyro_elbo_ext.training.trackers.values import plain


class CSVTracker(Callback):
    """Write the metrics of a run to a CSV file, and its settings and summary as JSON beside it.

    The columns are ``step`` and the metrics; one that comes late, such as ``validation_elbo``, is empty in the rows before
    it. ``pandas.read_csv(path)`` reads it, at any time during the run. Numbers are written so that they are read back
    exactly. ``run.csv.json`` holds the settings and, in the end, the summary of ``run.csv``.

    A new run replaces both files. A resumed run cuts off what was written after its checkpoint, so that the file becomes
    what it would have been without the interruption, except for ``steps_per_second``.

    Parameters
    ----------
    path
        The file; its directory is made where there is none.

    Raises
    ------
    IsADirectoryError
        If ``path`` is a directory.
    FileNotFoundError, ValueError
        On resuming, if the file is gone, or does not have the rows that were there at the checkpoint.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise IsADirectoryError(f"CSVTracker writes a file, but {self.path} is a directory")
        self._columns = ["step"]
        self._rows = 0
        self._last: int | None = None  # step of the last row
        self._settings: Any = {}

    def start(self, settings: Mapping[str, Any]) -> None:
        """Begin the file, or cut it off behind the checkpoint."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._rewrite(self._kept() if self._rows else [])
        self._settings = plain(settings)
        self._describe({})

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a row.

        Raises
        ------
        ValueError
            If a metric is called ``step``.
        """
        if "step" in metrics:
            raise ValueError("a metric can't be called 'step': this is the column of the steps")
        values = {"step": int(step), **{name: float(value) for name, value in metrics.items()}}
        late = [name for name in values if name not in self._columns]
        if late:
            rows = self._kept()
            self._columns += late
            self._rewrite(rows)
        with named(self.path), self.path.open("a", newline="", encoding="utf-8") as file:
            _writer(file).writerow([values.get(name, "") for name in self._columns])
        self._rows, self._last = self._rows + 1, int(step)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary."""
        self._describe(plain(summary))

    def state_dict(self) -> dict[str, Any]:
        """What is in the file so far; it is on the disk once this returns."""
        if self._rows:
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
        return {"columns": list(self._columns), "rows": self._rows, "step": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the rows of the checkpoint."""
        self._columns, self._rows, self._last = list(state["columns"]), state["rows"], state["step"]
        if self._rows:
            self._kept()

    def _kept(self) -> list[list[str]]:
        """The rows that have been logged, in today's columns; what a killed run wrote behind them is left out."""
        if not self._rows:
            return []
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path} is gone: it had {self._rows} rows, up to step {self._last}")
        with self.path.open(newline="", encoding="utf-8") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            rows = [row[: len(self._columns)] for row, _ in zip(reader, range(self._rows), strict=False)]
        if header[: len(self._columns)] != self._columns or len(rows) < self._rows or rows[-1][0] != str(self._last):
            raise ValueError(
                f"{self.path} does not have the {self._rows} rows, up to step {self._last}, that were logged: it was changed"
            )
        return rows

    def _rewrite(self, rows: Iterable[list[str]]) -> None:
        with _replacing(self.path) as file:
            writer = _writer(file)
            writer.writerow(self._columns)
            writer.writerows([*row, *[""] * (len(self._columns) - len(row))] for row in rows)

    def _describe(self, summary: Any) -> None:
        with _replacing(self.path.with_name(f"{self.path.name}.json")) as file:
            json.dump({"settings": self._settings, "summary": summary}, file, indent=2)


@contextmanager
def _replacing(path: Path) -> Iterator[TextIO]:
    """A file that takes the place of ``path`` once it is whole; until then, and after an error, the old one stays."""
    with replaced(path) as new, new.open("w", newline="", encoding="utf-8") as file:
        yield file


def _writer(file: TextIO) -> Any:
    return csv.writer(file, lineterminator="\n")
