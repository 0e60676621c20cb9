"""Metrics as a run of Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from pyro_elbo_ext.training.callbacks import Callback
from pyro_elbo_ext.training.trackers.values import missing, plain


class WandbTracker(Callback):
    """Record a run with Weights & Biases: metrics by step, settings as its config, and ``final/NAME`` for the summary.

    Without network or account use ``mode="offline"`` and send the run later, with ``wandb sync DIRECTORY``.

    A resumed run has the same id. Of steps that it already has, W&B keeps the first values; offline the resumed part
    becomes a second directory of the same id. Other active runs of W&B stay as they are.

    Parameters
    ----------
    project
        Its name; W&B's default if it is None.
    mode
        "online", "offline" or "disabled"; None: what W&B is set to, for instance by WANDB_MODE.
    **options
        Further arguments of ``wandb.init``, such as ``name``, ``entity``, ``group``, ``tags`` or ``dir``.

    Attributes
    ----------
    run_id : str or None
        W&B's id of the run, once it has started.
    run
        W&B's run while it is active, else None.

    Raises
    ------
    ImportError
        Without wandb, saying how to install it.
    """

    def __init__(
        self,
        project: str | None = None,
        *,
        mode: Literal["online", "offline", "disabled"] | None = None,
        **options: Any,
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise missing("WandbTracker", "wandb", error) from error
        for name in ("config", "resume", "resume_from", "fork_from", "reinit"):
            if name in options:
                raise TypeError(f"WandbTracker takes no {name}: it comes from the run's settings or its checkpoint")
        self.run_id: str | None = options.pop("id", None)
        self.run: Any = None
        self._init = wandb.init
        self._project, self._mode, self._options = project, mode, options
        self._resumes = False

    def start(self, settings: Mapping[str, Any]) -> None:
        """Make the run, or go on with the one of the checkpoint."""
        online = (self._mode or os.environ.get("WANDB_MODE", "online")) == "online"
        self.run = self._init(
            project=self._project,
            mode=self._mode,
            id=self.run_id,
            resume="allow" if self._resumes and online else None,  # offline the id is all it takes
            reinit="create_new",
            config=plain(settings),
            **self._options,
        )
        self.run_id = self.run.id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record all metrics of a step."""
        self.run.log({name: float(value) for name, value in metrics.items()}, step=step)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Record the summary and end the run."""
        if self.run is None:
            return
        run, self.run = self.run, None
        # The last logged metrics become W&B's summary when the run ends, so those of the same names would be lost.
        run.summary.update({f"final/{name}": value for name, value in plain(summary).items()})
        run.finish(exit_code=int(summary.get("status") == "failed"))

    def state_dict(self) -> dict[str, Any]:
        """The id of the run."""
        return {"run_id": self.run_id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with this run."""
        self.run_id, self._resumes = state["run_id"], True
