"""Training runs that are killed and resumed, each in a process of its own.  Used by test_resume.

    python -m tests.killed_runs CASE FOLDER KILLS SEED [SIGINT]

One run is left alone. KILLS others are killed by SIGKILL, or interrupted by SIGINT, each at a random step and moment, and
resumed. For each a line
says whether it ends as the run that was left alone, and further ones what differs.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_elbo_ext import AdaptiveStopping, Callback, CSVTracker, DecomposedELBO, Patience
from pyro_elbo_ext.bounds.weighting import LinearWarmup
from pyro_elbo_ext.compile.machine_code.compiler import import_dynamo
from pyro_elbo_ext.training.fit import fit
from pyro_elbo_ext.training.state import checkpoints
from tests.models import SIGMA, Y, schools

TIMES = {"seconds"}  # the only values of a checkpoint that may differ


class Autoencoder(nn.Module):
    """Four numbers, coded by one; with dropout, which draws random numbers in steps but not in evaluations."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 2))
        self.decoder = nn.Linear(1, 4)

    def model(self, x: Tensor) -> None:
        pyro.module("autoencoder", self)
        with pyro.plate("data", 60, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("autoencoder", self)
        with pyro.plate("data", 60, subsample_size=len(x)):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def fit_schools(**options: Any) -> None:
    """Compiled steps, thousands in a second; a learning rate that falls, and is lowered by a rule."""
    fit(
        schools,
        AutoNormal(schools),
        Y,
        SIGMA,
        optim=pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.9999}),
        loss=DecomposedELBO(kl_weight=LinearWarmup(300)),
        num_steps=4000,
        stopping=AdaptiveStopping(
            accuracy=0.1, inefficiency=1e9, r_hat=2.0, min_ess=4
        ),  # lowers the learning rate only
        checkpoint_every=100,
        **options,
    )


def fit_batches(**options: Any) -> None:
    """Pyro's steps on shuffled batches, with schedules of the learning rate and of the KL weight, and held-out data."""
    autoencoder = Autoencoder()
    x = torch.randn(90, 4, generator=torch.Generator().manual_seed(8)) @ torch.linspace(-1, 1, 16).reshape(4, 4)
    fit(
        autoencoder.model,
        autoencoder.guide,
        batches=DataLoader(TensorDataset(x[:60]), batch_size=16, shuffle=True),
        validation=x[60:],
        optim=pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.02}, "gamma": 0.98}),
        loss=DecomposedELBO(kl_weight=LinearWarmup(100)),
        num_steps=160,
        stopping=Patience(100),
        checkpoint_every=10,
        compiled=False,
        **options,
    )


CASES: dict[str, tuple[Callable[..., None], int]] = {"schools": (fit_schools, 4000), "batches": (fit_batches, 160)}


class Killed(Callback):
    """Sends its process a signal ``delay`` seconds after a step, whatever it is doing by then."""

    def __init__(self, step: int, delay: float, number: signal.Signals) -> None:
        self._step, self._delay, self._number = step, delay, number

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step >= self._step:
            self._step = sys.maxsize
            threading.Thread(target=self._kill, daemon=True).start()

    def _kill(self) -> None:
        time.sleep(self._delay)
        os.kill(os.getpid(), self._number)


def run(case: str, folder: Path, kill: Callback | None = None) -> int:
    """Run, or go on with, a case in a process of its own; its exit status, negative if a signal ended it."""
    process = os.fork()
    if process == 0:
        try:
            torch.set_num_threads(1)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
            CASES[case][0](
                seed=3,
                checkpoint=folder / "checkpoint.pt",
                resume=True,
                callbacks=[CSVTracker(folder / "metrics.csv"), *([kill] if kill else [])],
                log_every=10,
                progress=False,
            )
        except BaseException:
            sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def differences(a: Any, b: Any, path: str) -> Iterator[str]:
    """Where two checkpoints differ; bit for bit, NaN equal to NaN."""
    if type(a) is not type(b):
        yield f"{path}: {type(a).__name__} and {type(b).__name__}"
    elif isinstance(a, Tensor):
        if a.dtype != b.dtype or not torch.equal(a, b):
            yield f"{path}: tensors differ"
    elif isinstance(a, np.ndarray):
        if a.dtype != b.dtype or not np.array_equal(a, b, equal_nan=a.dtype.kind == "f"):
            yield f"{path}: arrays differ"
    elif isinstance(a, Mapping):
        if a.keys() != b.keys():
            yield f"{path}: {sorted(map(str, a.keys() ^ b.keys()))} in one only"
        for key in a:
            if key in b and key not in TIMES:
                yield from differences(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        if len(a) != len(b):
            yield f"{path}: {len(a)} and {len(b)} items"
        for i, (left, right) in enumerate(zip(a, b, strict=False)):
            yield from differences(left, right, f"{path}[{i}]")
    elif hasattr(a, "__dict__"):
        yield from differences(vars(a), vars(b), path)
    elif a != b and not (isinstance(a, float) and math.isnan(a) and math.isnan(b)):
        yield f"{path}: {a!r} and {b!r}"


def compare(a: Path, b: Path) -> Iterator[str]:
    """Where the ends of two runs differ: checkpoints, and what a tracker wrote."""
    yield from differences(checkpoints.read(a / "checkpoint.pt"), checkpoints.read(b / "checkpoint.pt"), "")
    left, right = (pd.read_csv(folder / "metrics.csv").drop(columns="steps_per_second") for folder in (a, b))
    if not left.equals(right):
        yield "metrics.csv differs"


def main() -> None:
    import_dynamo()  # once, and not in each process
    case, folder, kills, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    number = signal.Signals[sys.argv[5]] if len(sys.argv) > 5 else signal.SIGKILL
    whole = folder / "whole"
    if run(case, whole):
        sys.exit("the run that was left alone failed")
    chance = random.Random(seed)
    for i in range(kills):
        killed = folder / f"killed_{i}"
        step, delay = chance.randrange(1, int(0.9 * CASES[case][1])), chance.uniform(0, 0.02)
        if i == 0:
            step, delay = 1, 0.0  # the first look, as a rule before there is a checkpoint
        status = run(case, killed, Killed(step, delay, number))
        checkpoint = killed / "checkpoint.pt"
        loop = checkpoints.read(checkpoint)["loop"] if checkpoint.exists() else {"step": 0, "reason": ""}
        expected = (0, "interrupted") if number == signal.SIGINT else (-number, "")
        if (status, loop["reason"]) != expected:
            print(f"run {i}: ended with status {status} and reason '{loop['reason']}' instead of {expected}")
        before = loop["step"]
        if run(case, killed):
            print(f"run {i}: could not be resumed")
            continue
        found = [f"  {line}" for line in itertools.islice(compare(whole, killed), 10)]
        verdict = "identical" if not found else "NOT identical"
        print(
            f"run {i}: killed after step {step}, resumed at step {before}, ends {verdict}", *found, sep="\n", flush=True
        )


if __name__ == "__main__":
    main()
