"""Two pairs of processes: in one the second process is killed, in the other it hangs; what the first one then finds.

python -m tests.lost_processes FOLDER
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pyro
import torch

from pyro_elbo_ext import DecomposedELBO
from pyro_elbo_ext.training import processes
from pyro_elbo_ext.training.distributed.svi import DistributedSVI
from tests import distributed_cases as cases

WAYS = ("killed", "hangs")
TIMEOUT = 4.0
LOST_AT = 5


def train(folder: Path, way: str, rank: int, port: int) -> None:
    """Step until it fails; process 1 is lost on the way."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    processes.start(120.0)  # on a busy machine the two may come long after each other
    optim = pyro.optim.Adam({"lr": 0.02})
    svi = DistributedSVI(cases.regression, cases.plain_guide, optim, DecomposedELBO(), timeout=TIMEOUT)
    x, y = cases.X[:4], cases.Y[:4]
    while True:
        if svi.steps == LOST_AT and rank == 1:
            if way == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)
        before, start = cases.parameters() if svi.steps else {}, time.perf_counter()
        try:
            svi.step(x, y)
        except RuntimeError as error:
            seconds = time.perf_counter() - start
            same = all(torch.equal(before[name], value) for name, value in cases.parameters().items())
            torch.save(
                {"error": str(error), "seconds": seconds, "same": same, **svi.state_dict()}, folder / f"{way}.pt"
            )
            raise


if __name__ == "__main__":
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")  # torch is loaded once
    pairs = []
    for way in WAYS:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pair = [fork.Process(target=train, args=(Path(sys.argv[1]), way, rank, port), daemon=True) for rank in range(2)]
        for process in pair:
            process.start()
        pairs.append(pair)
    for first, _ in pairs:
        first.join()
    for _, second in pairs:
        second.kill()
    sys.exit(0 if all(first.exitcode == 1 for first, _ in pairs) else 1)
