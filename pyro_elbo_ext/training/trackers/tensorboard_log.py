"""Metrics as TensorBoard's event files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyro_elbo_ext.training.callbacks import Callback
from pyro_elbo_ext.training.trackers.values import flat, missing


class TensorBoardTracker(Callback):
    """Write the metrics of a run for TensorBoard: scalars of the same names, settings as hyperparameters, texts.

    The scalars are of single precision, as TensorBoard's are. The texts ``settings`` and ``summary`` are tables. Show them
    with ``tensorboard --logdir LOG_DIR``, where LOG_DIR may be a directory of the directories of several runs.

    A run goes on in new files of the same directory. Each hides what older files hold from its first step on: a resumed
    run what was written after the checkpoint, a new one all.

    Parameters
    ----------
    log_dir
        Directory of this run.
    **options
        Further arguments of ``torch.utils.tensorboard.SummaryWriter``, such as ``flush_secs``.

    Raises
    ------
    ImportError
        Without TensorBoard, saying how to install it.
    """

    def __init__(self, log_dir: str | Path, **options: Any) -> None:
        try:
            from torch.utils import tensorboard
        except ImportError as error:
            raise missing("TensorBoardTracker", "tensorboard", error) from error
        for name in ("purge_step", "comment"):
            if name in options:
                raise TypeError(f"TensorBoardTracker takes no {name}: log_dir and the checkpoint settle that")
        self.log_dir = Path(log_dir)
        self._open = tensorboard.SummaryWriter
        self._options = options
        self._writer: Any = None
        self._last = -1  # step logged last

    def start(self, settings: Mapping[str, Any]) -> None:
        """Open a file, and write the settings."""
        from torch.utils.tensorboard.summary import hparams

        self._writer = self._open(str(self.log_dir), purge_step=self._last + 1, **self._options)
        values = flat(settings)
        # Not add_hparams, which makes a run of its own and needs the final metrics: these are wanted from the start.
        experiment, began, self._ended = hparams(
            {name: str(value) if value is None else value for name, value in values.items()}, {"elbo": None}
        )
        for summary in (experiment, began):
            self._writer.file_writer.add_summary(summary)
        self._writer.add_text("settings", _table(values), self._last + 1)
        self._writer.flush()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write a scalar for each metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, float(value), step)
        self._last = int(step)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary and close the file."""
        if self._writer is None:
            return
        self._writer.add_text("summary", _table(flat(summary)), max(self._last, 0))
        self._writer.file_writer.add_summary(self._ended)
        self._writer.close()
        self._writer = None

    def state_dict(self) -> dict[str, Any]:
        """Where the run is; all events so far have been given to the operating system once this returns."""
        if self._writer is not None:
            self._writer.flush()
        return {"step": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind this step."""
        self._last = state["step"]


def _table(values: Mapping[str, Any]) -> str:
    """A table in Markdown."""
    rows = [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in values.items()]
    return "\n".join(["| | |", "| --- | --- |", *rows])
