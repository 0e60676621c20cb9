"""Effective draws per second of ``run_nuts`` beside Pyro's NUTS, and the time of compilation.

    python -m tests.benchmarks.nuts [--pyro-draws N] [--only NAME]

Every row is a process of its own, with an empty cache of compiled code ("cold") or that of the row before ("disk
cache"), so that imports and compilers count where they should. Bulk ESS is that of the worst scalar. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import arviz
import pyro
import torch
from pyro.infer import MCMC, NUTS

from pyro_elbo_ext import compiled_log_density, run_nuts
from tests.benchmarks.problems import PROBLEMS

NAMES = ("eight_schools", "logistic_regression")
CHAINS, DRAWS = 4, 1000  # and as many draws of warmup
PYRO_DRAWS = 500  # of Pyro in one chain, and as many of warmup: four chains of 1000 take minutes


def worst_ess(posterior: Any) -> float:
    """Bulk ESS of the scalar of which it is least."""
    return min(float(values.min()) for values in arviz.ess(posterior, method="bulk").data_vars.values())


def ours(model: Callable[..., Any], data: tuple[Any, ...], cores: int) -> dict[str, float]:
    """Compile, then sample: seconds of both, and of sampling alone in a second run, whose code is there."""
    options = {"num_samples": DRAWS, "warmup": DRAWS, "chains": CHAINS, "cores": cores, "progress": False}
    began = time.perf_counter()
    density = compiled_log_density(model, *data)
    first = run_nuts(density, backend="nutpie", **options)
    cold = time.perf_counter() - began
    began = time.perf_counter()
    again = run_nuts(density, backend="nutpie", **options)
    return {
        "cold": cold,
        "warm": time.perf_counter() - began,
        "sampling": again.posterior.attrs["sampling_time"],
        "ess": worst_ess(first.posterior),
    }


def pyros(model: Callable[..., Any], data: tuple[Any, ...], draws: int) -> dict[str, float]:
    """One chain of Pyro's NUTS with ``jit_compile=True``."""
    mcmc = MCMC(
        NUTS(model, jit_compile=True, ignore_jit_warnings=True),
        num_samples=draws,
        warmup_steps=draws,
        disable_progbar=True,
    )
    began = time.perf_counter()
    mcmc.run(*data)
    seconds = time.perf_counter() - began
    samples = {name: values[None].numpy() for name, values in mcmc.get_samples().items()}
    return {"cold": seconds, "warm": seconds, "sampling": seconds, "ess": worst_ess(samples)}


def compilation(model: Callable[..., Any], data: tuple[Any, ...]) -> dict[str, float]:
    """Seconds of ``compiled_log_density``, and of one call of it on an array."""
    density = compiled_log_density(model, *data)
    u = density.program.points[0].numpy()
    began = time.perf_counter()
    for _ in range(2000):
        density.value_and_grad(u)
    return {"compile": density.compile_time, "call": (time.perf_counter() - began) / 2000}


def one_row(name: str, what: str, number: int) -> dict[str, float]:
    """The measurement that a process of its own makes."""
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    model, _, data = PROBLEMS[name].build()
    with pyro.validation_enabled(False):
        if what == "pyro":
            return pyros(model, data, number)
        return compilation(model, data) if what == "compilation" else ours(model, data, number)


def in_process(cache: str, *arguments: object) -> dict[str, float]:
    """`one_row` in a new process, with compiled code in the directory ``cache``."""
    command = [sys.executable, "-m", "tests.benchmarks.nuts", "--row", *map(str, arguments)]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the chosen problems and print two tables."""
    parser = argparse.ArgumentParser(description="Effective draws per second of run_nuts beside Pyro's NUTS.")
    parser.add_argument("--pyro-draws", type=int, default=PYRO_DRAWS)
    parser.add_argument("--only", choices=NAMES)
    parser.add_argument("--row", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.row:
        name, what, number = arguments.row
        print(json.dumps(one_row(name, what, int(number))))
        return
    names = [name for name in NAMES if arguments.only in (None, name)]
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print("| problem | sampler | bulk ESS | sampling, s | run, compiled before, s | run, cold, s | ESS/s, compiled before"
          " | over Pyro | ESS/s, cold | over Pyro |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|")
    compiled = []
    for name in names:
        with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as other:
            draws = arguments.pyro_draws
            rows = {
                f"Pyro `NUTS(jit_compile=True)`, 1 chain of {draws} + {draws}": in_process(other, name, "pyro", draws)
            }
            for cores in (2, 1):
                with tempfile.TemporaryDirectory() as empty:
                    rows[f"`run_nuts`, {CHAINS} x ({DRAWS} + {DRAWS}), cores={cores}"] = in_process(
                        empty, name, "ours", cores
                    )
            base = next(iter(rows.values()))
            for sampler, row in rows.items():
                warm, cold = (row["ess"] / row[time] for time in ("warm", "cold"))
                ratios = (rate / (base["ess"] / base["warm"]) for rate in (warm, cold))
                first, second = (f"{ratio:.1f}" for ratio in ratios)
                print(f"| {name} | {sampler} | {row['ess']:.0f} | {row['sampling']:.2f} | {row['warm']:.2f} | "
                      f"{row['cold']:.2f} | {warm:.0f} | {first} | {cold:.0f} | {second} |", flush=True)  # fmt: skip
            compiled.append(
                (name, in_process(cache, name, "compilation", 0), in_process(cache, name, "compilation", 0))
            )
    print("\n| problem | `compile_time`, cold, s | disk cache, s | `value_and_grad`, µs |\n|---|---|---|---|")
    for name, cold_row, cached in compiled:
        print(f"| {name} | {cold_row['compile']:.2f} | {cached['compile']:.2f} | {1e6 * cached['call']:.1f} |")
    print(f"\nload at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
