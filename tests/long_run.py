"""A long training run on a small model, with what it keeps in memory.  Used by test_long_run.

    python -m tests.long_run FOLDER STEPS

Prints the resident memory, in MiB, after the first and the last hundredth of the steps, and the result.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pyro
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_elbo_ext import Callback, CSVTracker, DecomposedELBO
from pyro_elbo_ext.training.fit import fit
from tests.models import SIGMA, Y, schools


class Memory(Callback):
    """Resident memory, each time that metrics are logged."""

    def __init__(self) -> None:
        self.resident: list[float] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.resident.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)


def main() -> None:
    folder, num_steps = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    mpl.use("Agg")
    memory = Memory()
    result = fit(
        schools,
        AutoNormal(schools),
        Y,
        SIGMA,
        loss=DecomposedELBO(),
        optim=pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.01 ** (1 / num_steps)}),
        num_steps=num_steps,
        callbacks=[memory, CSVTracker(folder / "metrics.csv")],
        log_every=num_steps // 100,
        checkpoint=folder / "checkpoint.pt",
        checkpoint_every=num_steps // 20,
        progress=False,
        seed=1,
    )
    history = result.history
    assert history is not None
    panels = result.plot()
    panels[0].figure.savefig(folder / "history.png")
    drawn = np.concatenate([line.get_xdata() for line in panels[0].get_lines()])
    print(result, file=sys.stderr)
    print(memory.resident[0], memory.resident[-1])
    print(history.num_recorded, len(history), drawn.min(), drawn.max(), result.uncompiled)
    print((folder / "checkpoint.pt").stat().st_size)


if __name__ == "__main__":
    main()
