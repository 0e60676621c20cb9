"""A rehearsal of a run that goes on for a day: memory does not grow, and the history still plots."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

STEPS = 200_000


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux's /proc")
def test_memory_of_a_long_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.long_run", str(tmp_path), str(STEPS)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout, done.stderr)
    memory, history, size = (line.split() for line in done.stdout.splitlines())
    first, last = map(float, memory)
    assert last - first < 20  # MiB
    recorded, kept = int(history[0]), int(history[1])
    assert recorded == STEPS
    assert 5_000 <= kept <= 10_000
    assert (float(history[2]), float(history[3])) == (0, STEPS - 1)
    assert history[4] == "None"  # compiled
    assert int(size[0]) < 5_000_000
    assert (tmp_path / "history.png").stat().st_size > 10_000
    assert pd.read_csv(tmp_path / "metrics.csv")["step"].tolist() == list(range(STEPS // 100, STEPS + 1, STEPS // 100))
