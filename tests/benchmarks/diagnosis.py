"""Time and memory of ``diagnose`` on a hierarchical model of 1000 latent scalars.

    python -m tests.benchmarks.diagnosis

Target: within 60 s and 2 GiB. The peak is the kernel's own mark of this process, imports included.
"""

from __future__ import annotations

import platform
import re
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch

from pyro_elbo_ext import diagnose

ROWS = 998


def _peak() -> float:
    """Most memory that the process has had so far, GiB. How much of it imports take differs between builds of torch."""
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    return int(peak[1]) / 2**20


def main() -> None:
    """Print both."""
    torch.set_num_threads(1)
    y = torch.randn(ROWS, generator=torch.Generator().manual_seed(0))

    def model() -> None:
        mean, sd = pyro.sample("mean", dist.Normal(0.0, 1.0)), pyro.sample("sd", dist.LogNormal(0.0, 0.5))
        with pyro.plate("row", ROWS):
            z = pyro.sample("z", dist.Normal(mean, sd))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    def guide() -> None:
        pyro.sample("mean", dist.Normal(0.0, 0.03))
        pyro.sample("sd", dist.LogNormal(-0.2, 0.03))
        with pyro.plate("row", ROWS):
            pyro.sample("z", dist.Normal(0.8 * y, 0.45))

    imported = _peak()
    began = time.perf_counter()
    found = diagnose(model, guide, seed=0)
    seconds = time.perf_counter() - began
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}: {len(found.scalars)} scalars by {found.method}, "
        f"{seconds:.1f} s, peak {_peak():.2f} GiB, {imported:.2f} of it before"
    )


if __name__ == "__main__":
    main()
