"""Step time of ``pyro.infer.SVI`` with ``Trace_ELBO`` over that of ``CompiledSVI``, in one process.

    python -m tests.benchmarks.compiled [--blocks B] [--only NAME] [--options '{"cpp_wrapper": true}']

One thread, validation off. The contestants fit the same problem with parameters of their own and take turns in blocks of
about 0.2 s (A B C A B C ...), so that a change in the machine's speed hits all of them; a ratio is taken within a block, and
the median, least and greatest are printed. Seconds are those of the process on a core: other programs do not
add to them. Compilation is outside the blocks and printed beside them, in seconds of the clock; it is cold only with an
empty cache (set TORCHINDUCTOR_CACHE_DIR to a new folder). Nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.optim import Adam  # type: ignore[attr-defined]  # Pyro defines it at run time
from torch import Tensor

from pyro_elbo_ext import CompiledSVI, DecomposedELBO
from tests.benchmarks.problems import eight_schools, logistic_regression, vae

BLOCK = 0.2  # seconds

Build = Callable[[], tuple[Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]]


def _with(build: Build, autoguide: Callable[[Any], Any]) -> Build:
    def built() -> tuple[Any, Any, tuple[Tensor, ...]]:
        model, _, data = build()
        return model, autoguide(model), data

    return built


PROBLEMS = {
    "eight_schools, AutoNormal": eight_schools,
    "eight_schools, AutoMultivariateNormal": _with(eight_schools, AutoMultivariateNormal),
    "logistic_regression, AutoNormal": _with(logistic_regression, AutoNormal),
    "logistic_regression, AutoMultivariateNormal": _with(logistic_regression, AutoMultivariateNormal),
    "vae, batch 256": vae,
}


class Contestant:
    """One way to fit a problem, with a param store of its own."""

    def __init__(self, build: Build, make: Callable[..., Any]) -> None:
        pyro.set_rng_seed(0)
        self._store: Any = {"params": {}, "constraints": {}}
        model, guide, self._data = build()
        self.svi = make(model, guide)
        for _ in range(3):
            self._timed(lambda: self._take(4))
        self.steps = 8
        while (seconds := self._timed(lambda: self._take(self.steps))) < BLOCK / 4:
            self.steps *= 4
        self.steps = max(4, int(self.steps * BLOCK / seconds))

    def _take(self, steps: int) -> None:
        for _ in range(steps):
            self.svi.step(*self._data)

    def _timed(self, call: Callable[[], Any]) -> float:
        with pyro.get_param_store().scope(self._store) as self._store:
            start = time.process_time()
            call()
            return time.process_time() - start

    def block(self) -> float:
        """Seconds per step in one block."""
        return self._timed(lambda: self._take(self.steps)) / self.steps


class Runner(Contestant):
    """The same by ``run``."""

    def _take(self, steps: int) -> None:
        self.svi.run(steps, *self._data, progress=False)


def measure(build: Build, blocks: int, options: dict[str, Any]) -> dict[str, tuple[list[float], float]]:
    """Seconds per step of each contestant in each block, and seconds of compilation."""

    def compiled(loss: Callable[[], Any]) -> Callable[..., Any]:
        return lambda model, guide: CompiledSVI(model, guide, Adam({"lr": 0.01}), loss(), options=options)

    contestants: dict[str, Contestant] = {
        "Pyro": Contestant(build, lambda model, guide: SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO()))
    }
    for name, loss in (
        ("Trace_ELBO", Trace_ELBO),
        ("DecomposedELBO(kl='sampled', history=False)", lambda: DecomposedELBO(kl="sampled", history=False)),
        ("DecomposedELBO(kl='sampled')", lambda: DecomposedELBO(kl="sampled")),
    ):
        contestants[f"step, {name}"] = Contestant(build, compiled(loss))
        contestants[f"run, {name}"] = Runner(build, compiled(loss))
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(blocks):
        for name, contestant in contestants.items():
            seconds[name].append(contestant.block())
    return {name: (seconds[name], getattr(one.svi, "compile_time", 0.0)) for name, one in contestants.items()}


def main() -> None:
    """Print a table of ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--only", choices=PROBLEMS)
    parser.add_argument("--options", type=json.loads, default={}, help="for the compiler, as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, Pyro {pyro.__version__}, one thread\n")
    print(
        "| problem | compiled | times as fast as Pyro's step (median) | least to greatest | ms | Pyro ms | compilation s |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, build in PROBLEMS.items():
        if arguments.only not in (None, name):
            continue
        with pyro.validation_enabled(False):
            measured = measure(build, arguments.blocks, arguments.options)
        base, _ = measured.pop("Pyro")
        for contestant, (seconds, compilation) in measured.items():
            ratios = [b / s for b, s in zip(base, seconds, strict=True)]
            print(
                f"| {name} | {contestant} | {statistics.median(ratios):.1f} | {min(ratios):.1f} to {max(ratios):.1f} | "
                f"{1e3 * statistics.median(seconds):.4f} | {1e3 * statistics.median(base):.3f} | {compilation:.1f} |",
                flush=True,
            )
    pyro.clear_param_store()


if __name__ == "__main__":
    main()
