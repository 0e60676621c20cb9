"""Time and memory of ``diagnose`` on hierarchical models of many latent scalars, and of ``psis_khat`` on a million rows.

    python -m tests.benchmarks.diagnosis [--only NAME]

Targets: `diagnose` of 1000 scalars within 60 s and 2 GiB, of 5000 within 2 minutes; `psis_khat` within 1.5 GB. Each case
is a process of its own; the peak is the kernel's mark of it (``ru_maxrss``), imports included.
"""

from __future__ import annotations

import argparse
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_elbo_ext import diagnose, psis_khat

STEPS = 500
ROWS = 1_000_000


def _peak() -> float:
    """Most memory that the process has had so far, GiB. How much of it imports take differs between builds of torch."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _by_hand(scalars: int) -> Callable[[], str]:
    """A guide by hand, close to the posterior."""
    rows = scalars - 2
    y = torch.randn(rows, generator=torch.Generator().manual_seed(0))

    def model() -> None:
        mean, sd = pyro.sample("mean", dist.Normal(0.0, 1.0)), pyro.sample("sd", dist.LogNormal(0.0, 0.5))
        with pyro.plate("row", rows):
            z = pyro.sample("z", dist.Normal(mean, sd))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    def guide() -> None:
        pyro.sample("mean", dist.Normal(0.0, 0.03))
        pyro.sample("sd", dist.LogNormal(-0.2, 0.03))
        with pyro.plate("row", rows):
            pyro.sample("z", dist.Normal(0.8 * y, 0.45))

    return lambda: _diagnosed(model, guide)


def _trained(scalars: int) -> Callable[[], str]:
    """An ``AutoNormal``, trained a little."""
    generator = torch.Generator().manual_seed(0)
    rows = scalars - 2
    y = torch.randn(rows, generator=generator) + torch.randn(rows, generator=generator)

    def model() -> None:
        mean, sd = pyro.sample("mean", dist.Normal(0.0, 1.0)), pyro.sample("sd", dist.LogNormal(0.0, 1.0))
        with pyro.plate("group", rows):
            effect = pyro.sample("effect", dist.Normal(mean, sd))
            pyro.sample("y", dist.Normal(effect, 1.0), obs=y)

    pyro.set_rng_seed(0)
    guide = AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(STEPS):
        svi.step()
    return lambda: _diagnosed(model, guide)


def _million() -> Callable[[], str]:
    """A regression whose guide has few latent scalars: what takes memory is draws times data."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, generator=generator)
    y = 1 + 2 * x + torch.randn(ROWS, generator=generator)

    def model() -> None:
        a, b = pyro.sample("a", dist.Normal(0.0, 1.0)), pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("row", ROWS):
            pyro.sample("y", dist.Normal(a + b * x, 1.0), obs=y)

    def guide() -> None:
        pyro.sample("a", dist.Normal(1.0, 0.001))
        pyro.sample("b", dist.Normal(2.0, 0.001))

    return lambda: f"{psis_khat(model, guide, seed=0).num_draws} draws"


def _diagnosed(model: Callable[..., object], guide: Callable[..., object]) -> str:
    found = diagnose(model, guide, seed=0)
    return f"{len(found.scalars)} scalars by {found.method}"


CASES: dict[str, Callable[[], Callable[[], str]]] = {
    "diagnose_1000": lambda: _by_hand(1000),
    "diagnose_5000": lambda: _trained(5000),
    "khat_million_rows": _million,
}


def _measure(name: str) -> None:
    torch.set_num_threads(1)
    case = CASES[name]()
    before = _peak()
    began = time.perf_counter()
    what = case()
    seconds = time.perf_counter() - began
    print(f"| `{name}` | {what} | {seconds:.1f} | {_peak():.2f} | {before:.2f} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--here", choices=CASES, help="measure this case in this process")
    arguments = parser.parse_args()
    if arguments.here:
        _measure(arguments.here)
        return
    print(f"Python {platform.python_version()}, torch {torch.__version__}\n")
    print("| case | what | s | peak, GiB | of it before, GiB |\n|---|---|---|---|---|", flush=True)
    for name in [arguments.only] if arguments.only else CASES:
        subprocess.run([sys.executable, "-m", "tests.benchmarks.diagnosis", "--here", name], check=True)


if __name__ == "__main__":
    main()
