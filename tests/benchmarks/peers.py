"""Compiled SVI and NUTS beside NumPyro's, and NUTS beside PyMC's, in an environment of their own.

    python -m tests.benchmarks.peers --python /path/to/python [--blocks B] [--draws N] [--only NAME] [--skip svi|nuts]

The interpreter (or the environment variable ``PEERS_PYTHON``) is one with ``pip install "jax[cpu]" numpyro funsor`` and, for
PyMC, ``pymc nutpie numba``. Without it nothing is measured. Each contestant is a process that takes one command after
the other, and they take turns in short blocks, so that a change in the machine's speed hits all; a ratio is taken within
a block. The models, data and dtype (float32; but ours and PyMC's NUTS are in float64, as they are by default) are the same.
SVI has one thread each, NUTS the whole machine. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import arviz
import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, autoguide
from pyro.optim import Adam  # type: ignore[attr-defined]  # Pyro defines it at run time

from pyro_elbo_ext import CompiledSVI, LogDensity, compiled_log_density, run_nuts
from tests.benchmarks.enumerated import PROBLEMS as SUMMED
from tests.benchmarks.measuring import one_thread
from tests.benchmarks.peer_workers import CHAINS, DRAWS, Commands, saved, serve, timed
from tests.benchmarks.problems import PROBLEMS

NAMES = ("eight_schools", "logistic_regression")
ENUMERATED = {
    "mixture": "Gaussian mixture",
    "hmm": "HMM",
}  # with sites that are summed out: SVI alone, under AutoNormal
GUIDES = ("AutoNormal", "AutoMultivariateNormal")
STEPS, UPDATES = 4000, 500  # of a block: within a graph, and called from Python
RUNS = (10_000, 210_000)  # lengths of svi.run, whose difference leaves its compilation out
ONE_THREAD = {"OMP_NUM_THREADS": "1", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"}
FOUR_DEVICES = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={CHAINS}"}

MISSING = """Skipped: no peers. Make an environment for them and name its interpreter:
    python -m venv peers && peers/bin/pip install "jax[cpu]" numpyro funsor pymc nutpie numba
    PEERS_PYTHON=peers/bin/python python -m tests.benchmarks.peers"""


# ----------------------------------------------------------------------------------------------------------------------
# Ours


def build(name: str) -> tuple[Any, tuple[torch.Tensor, ...]]:
    """Model and data, the same in every process."""
    pyro.set_rng_seed(0)
    if name in ENUMERATED:
        model, _, data = SUMMED[ENUMERATED[name]][0]()
    else:
        model, _, data = PROBLEMS[name].build()
    return model, data


def our_svi(name: str, guide: str, options: str) -> Commands:
    """``run`` and ``step`` of CompiledSVI."""
    model, data = build(name)
    loss, of = Trace_ELBO(), model
    if name in ENUMERATED:
        loss, of = (
            TraceEnum_ELBO(max_plate_nesting=1),
            poutine.block(model, hide_fn=lambda site: site["name"][0] in "xz"),
        )
    svi = CompiledSVI(model, getattr(autoguide, guide)(of), Adam({"lr": 0.01}), loss, **json.loads(options))

    def run(steps: int) -> tuple[float, float, float]:
        seconds, cpu, losses = timed(lambda: svi.run(steps, *data, progress=False))
        return seconds, cpu, float(losses.mean())

    def step(steps: int) -> tuple[float, float, float]:
        seconds, cpu, losses = timed(lambda: [svi.step(*data) for _ in range(steps)])
        return seconds, cpu, statistics.fmean(losses)

    return {"run": run, "step": step}


def our_nuts(name: str, _: str, __: str) -> Commands:
    """NUTS; the first ``draw`` compiles."""
    model, data = build(name)
    density: list[
        LogDensity
    ] = []  # made in the first run, and kept as NumPyro's samplers keep their compiled functions

    def draws(**options: Any) -> Any:
        if not density:
            density.append(compiled_log_density(model, *data))
        return run_nuts(density[0], backend="nutpie", progress=False, **options)

    def draw(seed: int) -> tuple[float, float, str]:
        options: dict[str, Any] = {"num_samples": DRAWS, "warmup": DRAWS, "chains": CHAINS, "seed": seed}
        seconds, cpu, found = timed(lambda: draws(**options))
        return seconds, cpu, saved(found.posterior.data_vars)

    return {"draw": draw}


OURS = {"svi": our_svi, "nuts": our_nuts}


# ----------------------------------------------------------------------------------------------------------------------
# Processes in turns


class Worker:
    """A process that answers commands."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._reply()

    def _reply(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with status {self._process.wait()}; its message is above")
        return json.loads(line)

    def ask(self, command: str, number: int) -> tuple[float, float, Any]:
        """Seconds, CPU seconds, and the loss or the file of draws."""
        assert self._process.stdin is not None
        print(command, number, file=self._process.stdin, flush=True)
        seconds, cpu, result = self._reply()
        return seconds, cpu, result

    def end(self) -> None:
        """Let the process end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def ours(*arguments: str, **environment: str) -> Iterator[Worker]:
    """A worker of ours, with an empty cache of compiled code."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "tests.benchmarks.peers", "--worker", *arguments]
        worker = Worker(command, {"TORCHINDUCTOR_CACHE_DIR": cache, **environment})
        try:
            yield worker
        finally:
            worker.end()


@contextmanager
def theirs(python: str, kind: str, name: str, option: str, **environment: str) -> Iterator[Worker]:
    """A worker of a peer's, on the data of the problem."""
    script = str(Path(__file__).with_name("peer_workers.py"))
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "data.npz")
        np.savez(file, *[tensor.numpy() for tensor in build(name)[1]])
        worker = Worker([python, script, kind, name, option, file], environment)
        try:
            yield worker
        finally:
            worker.end()


# ----------------------------------------------------------------------------------------------------------------------
# SVI


def svi(python: str, name: str, guide: str, blocks: int, options: str) -> None:
    """Print the rows of one problem and guide."""
    with ours("svi", name, guide, options, **ONE_THREAD) as us, theirs(
        python, "numpyro-svi", name, guide, **ONE_THREAD
    ) as them:  # fmt: skip
        ways = {
            "NumPyro, compiled `lax.scan` of updates": (them, "scan", STEPS),
            "NumPyro, compiled `update`": (them, "update", UPDATES),
            "`CompiledSVI.run`": (us, "run", STEPS),
            "`CompiledSVI.step`": (us, "step", UPDATES),
        }
        first = {way: worker.ask(command, steps)[0] for way, (worker, command, steps) in ways.items()}
        taken: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ways}
        for _ in range(blocks):
            for way, (worker, command, steps) in ways.items():
                seconds, cpu, loss = worker.ask(command, steps)
                taken[way].append((1e6 * seconds / steps, cpu / seconds, loss))
        if name not in ENUMERATED:
            short, long = (min(them.ask("run", steps)[0] for _ in range(2)) for steps in RUNS)
            ours_whole = us.ask("run", RUNS[1])[0]
    per_step = {way: [row[0] for row in rows] for way, rows in taken.items()}
    for way, rows in taken.items():
        reference = "NumPyro, compiled `update`" if way.endswith(("update`", ".step`")) else next(iter(ways))
        ratios = [a / b for a, b in zip(per_step[way], per_step[reference], strict=True)]
        print(
            f"| {name}, {guide} | {way} | {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} "
            f"| {statistics.median(per_step[way]):.1f} | {min(per_step[way]):.1f} | {first[way]:.1f} "
            f"| {rows[-1][2]:.3f} | {max(row[1] for row in rows):.2f} |",
            flush=True,
        )
    if name in ENUMERATED:
        return
    difference = (long - short) / (RUNS[1] - RUNS[0])
    print(
        f"| {name}, {guide} | NumPyro, `svi.run`: {RUNS[0]} steps take {short:.2f} s, {RUNS[1]} take {long:.2f} s "
        f"(ours {ours_whole:.2f} s) | {1e6 * difference / statistics.median(per_step[next(iter(ways))]):.2f} | "
        f"| {1e6 * difference:.1f} | | {short:.1f} | | |",
        flush=True,
    )


# ----------------------------------------------------------------------------------------------------------------------
# NUTS


def worst_ess(file: str) -> float:
    """Bulk ESS of the scalar of which it is least; the file of draws is deleted."""
    with np.load(file) as draws:
        posterior = arviz.convert_to_dataset({name: draws[name] for name in draws.files})
    Path(file).unlink()
    return min(float(values.min()) for values in arviz.ess(posterior, method="bulk").data_vars.values())


def nuts(python: str, name: str, draws: int, with_pymc: bool) -> None:
    """Print the rows of one problem."""
    with ExitStack() as stack:
        cores = str(os.cpu_count() or 1)
        workers = {
            "`run_nuts(backend=\"nutpie\")`": stack.enter_context(ours("nuts", name, "", "{}", OMP_NUM_THREADS="1")),
            **{
                f"NumPyro, {method}": stack.enter_context(
                    theirs(python, "numpyro-nuts", name, method, **(FOUR_DEVICES if method == "parallel" else {}))
                )
                for method in ("parallel", "vectorized", "sequential")
            },
        }  # fmt: skip
        if with_pymc:
            workers["PyMC, nutpie"] = stack.enter_context(theirs(python, "pymc-nuts", name, cores, OMP_NUM_THREADS="1"))
        rows: dict[str, list[tuple[float, float]]] = {sampler: [] for sampler in workers}
        for seed in range(draws + 1):
            for sampler, worker in workers.items():
                seconds, _, file = worker.ask("draw", seed)
                rows[sampler].append((seconds, worst_ess(file)))
    rates = {sampler: [ess / seconds for seconds, ess in row] for sampler, row in rows.items()}
    warm = {sampler: statistics.median(rate[1:]) for sampler, rate in rates.items()}
    numpyros = [sampler for sampler in rows if sampler.startswith("NumPyro")]
    best_warm = max(warm[sampler] for sampler in numpyros)
    best_cold = max(rates[sampler][0] for sampler in numpyros)
    for sampler, row in rows.items():
        print(
            f"| {name} | {sampler} | {statistics.median(ess for _, ess in row):.0f} "
            f"| {statistics.median(seconds for seconds, _ in row[1:]):.2f} | {warm[sampler]:.0f} "
            f"| {min(rates[sampler][1:]):.0f} to {max(rates[sampler][1:]):.0f} | {warm[sampler] / best_warm:.2f} "
            f"| {row[0][0]:.2f} | {rates[sampler][0]:.0f} | {rates[sampler][0] / best_cold:.2f} |",
            flush=True,
        )


def available(python: str | None) -> dict[str, str]:
    """The versions of the peers that an interpreter has; empty without NumPyro."""
    if not python:
        return {}
    code = (
        "import importlib.metadata as m, json, sys\n"
        "found = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "print(json.dumps({n: found[n] for n in ('numpyro', 'jax', 'pymc', 'nutpie') if n in found}))"
    )
    done = subprocess.run([python, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found if {"numpyro", "jax"} <= set(found) else {}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what there is and print two tables."""
    parser = argparse.ArgumentParser(description="Compiled SVI and NUTS beside NumPyro's and PyMC's.")
    parser.add_argument("--python", default=os.environ.get("PEERS_PYTHON"), help="an interpreter with NumPyro")
    parser.add_argument("--blocks", type=int, default=15, help="blocks of SVI (default: 15)")
    parser.add_argument("--draws", type=int, default=3, help="runs of NUTS after the one that compiles (default: 3)")
    parser.add_argument("--only", choices=(*NAMES, *ENUMERATED), help="measure this problem alone")
    parser.add_argument("--skip", choices=("svi", "nuts"), help="leave this out")
    parser.add_argument("--options", default="{}", help='of CompiledSVI, as JSON, e.g. {"steps_per_call": 8}')
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker:
        torch.set_num_threads(1)
        pyro.enable_validation(False)
        serve(OURS[arguments.worker[0]](*arguments.worker[1:]))
        return
    found = available(arguments.python)
    if not found:
        print(MISSING)
        return
    names = [name for name in (*NAMES, *ENUMERATED) if arguments.only in (None, name)]
    with one_thread():
        print(", ".join(f"{name} {version}" for name, version in found.items()), end="; ")
        print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        if arguments.skip != "svi":
            columns = ["problem", "one step by", "time over NumPyro's (median)", "least to greatest", "µs (median)"]
            columns += ["µs (least)", "first block, s", "mean loss of the last block", "CPU over wall time"]
            print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
            for name in names:
                for guide in GUIDES[:1] if name in ENUMERATED else GUIDES:
                    svi(arguments.python, name, guide, arguments.blocks, arguments.options)
        if arguments.skip != "nuts":
            columns = ["problem", "sampler", "bulk ESS", "s, compiled before", "ESS/s", "least to greatest"]
            columns += ["over the best of NumPyro", "s, cold", "ESS/s, cold", "over the best of NumPyro, cold"]
            print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
            for name in [name for name in names if name in NAMES]:
                nuts(arguments.python, name, arguments.draws, {"pymc", "nutpie"} <= set(found))
    print(f"load at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
