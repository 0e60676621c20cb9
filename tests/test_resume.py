"""A run that was killed and resumed equals the one that was left alone, bit for bit."""

from __future__ import annotations

import copy
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_elbo_ext.programs.interrupts import interrupts_wait
from pyro_elbo_ext.training import checkpoints
from tests.killed_runs import differences

ALONE = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # a process that forks has one thread


def killed_runs(case: str, folder: Path, kills: int, number: str = "SIGKILL") -> str:
    """What ``tests.killed_runs`` prints."""
    command = [sys.executable, "-m", "tests.killed_runs", case, str(folder), str(kills), "7", number]
    done = subprocess.run(command, env=ALONE, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("case", "kills", "number"),
    [
        ("batches", 3, "SIGKILL"),
        ("batches", 3, "SIGINT"),
        pytest.param("batches", 17, "SIGKILL", marks=pytest.mark.slow),
        pytest.param("schools", 3, "SIGKILL", marks=pytest.mark.slow),
    ],
)
def test_killed_runs_end_identically(case: str, kills: int, number: str, tmp_path: Path) -> None:
    output = killed_runs(case, tmp_path, kills, number)
    print(output)
    expected = re.compile(r"run \d+: killed after step \d+, resumed at step \d+, ends identical")
    assert [bool(expected.fullmatch(line)) for line in output.splitlines()] == [True] * kills, output


def test_differences_are_found() -> None:
    a = {"x": torch.tensor([1.0, 2.0]), "y": [np.array([np.nan, 1.0]), {"z": float("nan")}], "seconds": 3.0}
    b = copy.deepcopy(a)
    b["seconds"] = 4.0
    assert list(differences(a, b, "")) == []
    b["x"][1] = torch.nextafter(b["x"][1], torch.tensor(3.0))
    b["y"][0][1] = np.nextafter(1.0, 2.0)  # type: ignore[index]
    b["y"][1]["z"] = 0.0  # type: ignore[index]
    assert list(differences(a, b, "")) == [
        "/x: tensors differ",
        "/y[0]: arrays differ",
        "/y[1]/z: nan and 0.0",
    ]
    assert list(differences([1], [1.0], "")) == ["[0]: int and float"]
    assert list(differences([1], [1, 2], "")) == [": 1 and 2 items"]
    assert list(differences({"a": 1}, {"b": 1}, "")) == [": ['a', 'b'] in one only"]


def test_a_second_interrupt_does_not_wait() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    reached = []

    def send(times: int) -> None:
        with interrupts_wait():
            for i in range(times):
                signal.raise_signal(signal.SIGINT)
                reached.append((times, i))

    try:
        with pytest.raises(KeyboardInterrupt):
            send(1)
        with pytest.raises(KeyboardInterrupt):
            send(2)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert reached == [(1, 0), (2, 0)]


def test_a_checkpoint_has_all_that_is_compared(tmp_path: Path) -> None:
    killed_runs("batches", tmp_path, 0)
    content = checkpoints.read(tmp_path / "whole" / "checkpoint.pt")
    assert content["loop"]["step"] == 160
    assert len(content["training"]["parameters"]) == 6
    assert len(content["training"]["optimizers"]) == 6
    assert content["objective"]["history"].num_recorded == 160
    assert content["random"].keys() >= {"torch", "numpy", "python"}
    assert content["loop"]["validated"]
    assert content["callbacks"][0]["state"]["rows"] == 16
