"""A compiled step of a variational autoencoder over a step written by hand in PyTorch: time and memory.

    python -m tests.benchmarks.autoencoder [--blocks B] [--batch N] [--no-memory]

784-400-50, one thread, validation off. The contestants have networks of their own and take turns in short blocks; a ratio
is taken within a block. By hand means what one writes without Pyro: encoder, a reparametrized draw, decoder, the cross
entropy of logits, the closed form of KL(q || prior), ``backward`` and ``torch.optim.Adam``, whose three implementations
are measured; the divisor is the quickest of them.

Memory (on Linux alone) is that of a new process for each contestant: see :func:`measure_memory`. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam  # type: ignore[attr-defined]  # Pyro defines it at run time
from torch.nn.functional import binary_cross_entropy_with_logits

from pyro_elbo_ext import CompiledSVI
from tests.benchmarks.measuring import one_thread
from tests.benchmarks.problems import Encoder, decoder, eight_schools, images, vae

BATCHES = (32, 256)
WARM_UP = 5  # steps; of a compiled contestant the first two are Pyro's and the compiler's
MEMORY_STEPS = 50

Step = Callable[[], float]


def by_hand(batch: int, **implementation: bool) -> Step:
    """A training step without Pyro, by one of the implementations of torch's Adam."""
    encode, decode, x = Encoder(), decoder(), images(batch)
    optimizer = torch.optim.Adam([*encode.parameters(), *decode.parameters()], lr=1e-3, **implementation)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loc, scale = encode(x)
        z = loc + scale * torch.randn_like(loc)
        reconstruction = -binary_cross_entropy_with_logits(decode(z), x, reduction="sum")
        kl_prior = 0.5 * (loc.square() + scale.square() - 1.0).sum() - scale.log().sum()
        loss = kl_prior - reconstruction
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def by_svi(batch: int, make: Any, loss: Any) -> Step:
    """A step of SVI, with a param store of its own."""
    model, guide, (x,) = vae(batch)
    svi = make(model, guide, Adam({"lr": 1e-3}), loss())
    store: Any = {"params": {}, "constraints": {}}

    def step() -> float:
        nonlocal store
        with pyro.get_param_store().scope(store) as store:
            return float(svi.step(x))

    return step


CONTESTANTS: dict[str, Callable[[int], Step]] = {
    "by hand, Adam(fused=True)": lambda batch: by_hand(batch, fused=True),
    "by hand, Adam(foreach=True)": lambda batch: by_hand(batch, foreach=True),
    "by hand, Adam(foreach=False)": lambda batch: by_hand(batch, foreach=False),
    "CompiledSVI, Trace_ELBO": lambda batch: by_svi(batch, CompiledSVI, Trace_ELBO),
    "CompiledSVI, TraceMeanField_ELBO": lambda batch: by_svi(batch, CompiledSVI, TraceMeanField_ELBO),
    "Pyro SVI, Trace_ELBO": lambda batch: by_svi(batch, SVI, Trace_ELBO),
    "Pyro SVI, TraceMeanField_ELBO": lambda batch: by_svi(batch, SVI, TraceMeanField_ELBO),
}
BY_HAND = [name for name in CONTESTANTS if name.startswith("by hand")]


def measure(batch: int, blocks: int) -> dict[str, list[float]]:
    """Seconds per step of each contestant in each block."""
    contestants = {}
    for name, make in CONTESTANTS.items():
        pyro.set_rng_seed(0)
        contestants[name] = make(batch)
        for _ in range(WARM_UP):
            contestants[name]()
    steps = max(5, 1000 // batch)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    gc.collect()
    gc.freeze()
    for _ in range(blocks):
        for name, step in contestants.items():
            step()  # brings its weights back into the caches
            start = time.perf_counter()
            for _ in range(steps):
                step()
            seconds[name].append((time.perf_counter() - start) / steps)
    gc.unfreeze()
    return seconds


def print_rows(batch: int, seconds: dict[str, list[float]]) -> None:
    """Print one row per contestant; ratios are to the quickest by hand, in the same block."""
    of_blocks = [sum(block) for block in zip(*[seconds[name] for name in BY_HAND], strict=True)]
    relative = {name: [a / b for a, b in zip(seconds[name], of_blocks, strict=True)] for name in BY_HAND}
    reference = min(BY_HAND, key=lambda name: statistics.median(relative[name]))
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds[reference], strict=True)]
        print(
            f"| {batch} | {name} | {statistics.median(ratios):.3f} | {min(ratios):.3f} to {max(ratios):.3f} "
            f"| {1e3 * statistics.median(own):.3f} | {1e3 * min(own):.3f} |",
            flush=True,
        )


# ----------------------------------------------------------------------------------------------------------------------
# Memory


def memory(field: str) -> float:
    """Memory of this process in MiB: "VmRSS", held now, or "VmHWM", the most since :func:`reset_peak`."""
    status = Path("/proc/self/status").read_text()
    return float(status.split(f"{field}:")[1].split()[0]) / 1024


def reset_peak() -> None:
    """Let "VmHWM" begin anew at what is held now."""
    Path("/proc/self/clear_refs").write_text("5")


def release() -> None:
    """Give memory that is free but kept by the allocator back to the system, and begin a new peak."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    reset_peak()


def memory_of(name: str, batch: int) -> dict[str, float]:
    """What one contestant takes in this process, in MiB."""
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    CONTESTANTS[BY_HAND[0]](batch)()  # loads the libraries that all use, and is forgotten
    release()
    start = memory("VmRSS")
    if name.startswith("Compiled"):  # what a compiler takes for any model: its imports
        model, guide, data = eight_schools()
        with pyro.get_param_store().scope():
            svi = CompiledSVI(model, guide, Adam({"lr": 1e-3}), Trace_ELBO())
            for _ in range(WARM_UP):
                svi.step(*data)
            del svi, model, guide
    release()
    before = memory("VmRSS")
    step = CONTESTANTS[name](batch)
    for _ in range(WARM_UP):
        step()
    made = memory("VmHWM")
    release()
    for _ in range(MEMORY_STEPS):
        step()
    peak, held = memory("VmHWM"), memory("VmRSS")
    for _ in range(4 * MEMORY_STEPS):
        step()
    return {
        "imports": before - start,
        "made": made,
        "peak": peak,
        "own": peak - before,
        "growth": memory("VmRSS") - held,
    }


def measure_memory(name: str, batch: int, cache: str) -> dict[str, float]:
    """`memory_of` in a new process, with compiled code in the directory ``cache``.

    "imports" is what compiling eight schools, a tiny model, leaves behind: it does not depend on the model. "made" is the
    most held from the network's creation to the end of the first steps, tracing and compiling included; "peak" the most
    held in 50 later steps, both by the kernel's own mark ("VmHWM"), which is reset in between (``ru_maxrss`` cannot be, and
    a new process starts with its parent's). "own" is "peak" less what was held before the network was made; "growth" what
    200 more steps add. The C++ compiler is a process of its own and not counted.
    """
    command = [sys.executable, "-m", "tests.benchmarks.autoencoder", "--row", name, str(batch)]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def print_memory(batches: Sequence[int]) -> None:
    """Print a table of memory, cold and with the compiled code on disk."""
    columns = ["batch", "contestant", "compiler's imports", "peak until ready", "over by hand", "peak in 50 steps"]
    columns += ["over by hand", "the model's own part of it", "over by hand", "growth in 200 more"]
    print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    for batch in batches:
        reference: dict[str, float] = {}
        with tempfile.TemporaryDirectory() as cache:
            for name in [name for name in CONTESTANTS if "foreach" not in name]:
                for when in (", cold", ", code on disk") if name.startswith("Compiled") else ("",):
                    row = measure_memory(name, batch, cache)
                    reference = reference or row
                    compared = " | ".join(
                        f"{row[of]:.0f} | {row[of] / reference[of]:.2f}" for of in ("made", "peak", "own")
                    )
                    print(f"| {batch} | {name}{when} | {row['imports']:.0f} | {compared} ", end="")
                    print(f"| {row['growth']:+.1f} |", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table of times and one of memory."""
    parser = argparse.ArgumentParser(description="A compiled step of an autoencoder over one written by hand.")
    parser.add_argument("--blocks", type=int, default=25, help="blocks per batch size (default: 25)")
    parser.add_argument("--batch", type=int, help="only this batch size")
    parser.add_argument("--no-memory", action="store_true", help="time alone")
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.row:
        print(json.dumps(memory_of(arguments.row[0], int(arguments.row[1]))))
        return
    batches = (arguments.batch,) if arguments.batch else BATCHES
    with one_thread():
        print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
        print("| batch | contestant | time over by hand (median) | least to greatest | ms (median) | ms (least) |")
        print("|---|---|---|---|---|---|")
        with pyro.validation_enabled(False):
            for batch in batches:
                print_rows(batch, measure(batch, arguments.blocks))
        if not arguments.no_memory and Path("/proc/self/clear_refs").exists():
            print_memory(batches)
    print(f"load at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
