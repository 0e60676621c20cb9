"""Times of ``pyro.infer.SVI`` steps with several objectives in one process, and their ratios.

Each objective fits the same problem from the same seed, with parameters of its own; they take turns in short blocks
(A B C A B C ...), each block under one seed, so that a change in the machine's speed hits all of them. Ratios are taken
within a block and their median, least and greatest are printed. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import pyro
import torch
from pyro.infer import ELBO, SVI
from pyro.optim import Adam  # type: ignore[attr-defined]  # Pyro defines it at run time

from tests.benchmarks.problems import PROBLEMS, Problem

WARM_UP = 10

Objectives = Mapping[str, Callable[[], ELBO]]


class Block(NamedTuple):
    """Seconds of each step of a block, and the loss of the last step."""

    seconds: list[float]
    loss: float


class Fit:
    """One objective's fit of a problem, with parameters of its own, so that several can take turns in one process."""

    def __init__(self, problem: Problem, objective: Callable[[], ELBO]) -> None:
        pyro.set_rng_seed(0)
        model, guide, self.data = problem.build()
        self.svi = SVI(model, guide, Adam({"lr": 1e-3}), loss=objective())
        with pyro.get_param_store().scope() as self.parameters:
            self.run(WARM_UP)

    def run(self, steps: int) -> Block:
        """Take ``steps`` steps, each timed."""
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            loss = self.svi.step(*self.data)
            seconds.append(time.perf_counter() - start)
        return Block(seconds, float(loss))

    def run_block(self, steps: int, seed: int) -> Block:
        """Take ``steps`` further steps under ``seed``, after two that bring code and data back into the caches."""
        with pyro.get_param_store().scope(self.parameters):
            pyro.set_rng_seed(seed)
            self.run(2)
            return self.run(steps)


def measure(
    problem: Problem, objectives: Objectives, *, steps: int, blocks: int, seconds: float
) -> dict[str, list[Block]]:
    """Return the blocks of each objective, one per block; in each block the objectives run one after the other.

    If that takes more than ``seconds`` there are fewer blocks than asked for, but at least three.
    """
    start = time.perf_counter()
    fits = {name: Fit(problem, objective) for name, objective in objectives.items()}
    measured: dict[str, list[Block]] = {name: [] for name in objectives}
    gc.collect()
    gc.freeze()  # a later collection looks only at what the steps themselves leave behind
    for seed in range(1, blocks + 1):
        if seed > 3 and time.perf_counter() - start > seconds:
            break
        for name, fit in fits.items():
            measured[name].append(fit.run_block(steps, seed))
    gc.unfreeze()
    return measured


def quick(blocks: list[Block]) -> float:
    """Return the time that a tenth of all steps stays below: what a step takes when nothing disturbs it."""
    seconds = sorted(second for block in blocks for second in block.seconds)
    return seconds[len(seconds) // 10]


def print_header(*labels: str) -> None:
    """Print the first rows of a table whose rows :func:`print_rows` prints."""
    columns = [
        *labels,
        "objective",
        "ratio (median of blocks)",
        "least to greatest",
        "ratio (quick steps)",
        "ms (quick steps)",
        "same loss",
        "blocks",
    ]
    print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)


def print_rows(measured: dict[str, list[Block]], *labels: object) -> None:
    """Print one row per objective; the ratios are to the first objective, in the same block."""
    reference = next(iter(measured.values()))
    for name, blocks in measured.items():
        ratios = [sum(block.seconds) / sum(other.seconds) for block, other in zip(blocks, reference, strict=True)]
        same = all(abs(b.loss - r.loss) <= 1e-4 * abs(r.loss) for b, r in zip(blocks, reference, strict=True))
        print(
            "".join([f"| {label} " for label in labels]) + f"| `{name}` | {statistics.median(ratios):.3f} "
            f"| {min(ratios):.3f} to {max(ratios):.3f} | {quick(blocks) / quick(reference):.3f} "
            f"| {1e3 * quick(blocks):.3f} | {'yes' if same else 'no'} | {len(blocks)} |",
            flush=True,
        )


def parse(
    description: str, argv: Sequence[str] | None, problems: Sequence[str] = tuple(PROBLEMS)
) -> argparse.Namespace:
    """Read the command line: ``steps`` (None for the default), ``blocks``, and ``only``, the problem (None for all)."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, help="steps timed in a block (default: fewer in the slower problems)")
    parser.add_argument("--blocks", type=int, default=25, help="blocks per problem, at most (default: 25)")
    parser.add_argument("--only", choices=problems, help="measure this problem alone")
    arguments = parser.parse_args(argv)
    if arguments.blocks < 1 or (arguments.steps is not None and arguments.steps < 1):
        parser.error("--steps and --blocks must be at least 1")
    return arguments


@contextmanager
def one_thread() -> Iterator[None]:
    """Measure on one thread; print the versions before and the time taken after."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, Pyro {pyro.__version__}, "
        f"{platform.machine()}, one thread"
    )
    yield
    pyro.clear_param_store()
    print(f"\n{time.perf_counter() - start:.0f} s in all")
