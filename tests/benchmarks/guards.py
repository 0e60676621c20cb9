"""What it costs a compiled step to look whether its tensors, and what Python reads, are as they were when it was traced.

    python -m tests.benchmarks.guards

One thread, seconds of the process, the least of many blocks. A look at tensors is a part of the one call of C that a step
makes anyway: what it costs is how the time of that call grows with the number of tensors. In ``run`` both are asked once for
each piece of the run, not at each step. Nothing is asserted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam  # type: ignore[attr-defined]  # Pyro defines it at run time

from pyro_elbo_ext import CompiledSVI, DecomposedELBO
from pyro_elbo_ext.compile.machine_code import layouts
from tests.benchmarks.problems import eight_schools, logistic_regression

CALLS, BLOCKS = 5000, 30


def microseconds(function: Callable[[], Any]) -> float:
    """Of one call, the least of the blocks."""
    least = float("inf")
    for _ in range(BLOCKS):
        start = time.process_time()
        for _ in range(CALLS):
            function()
        least = min(least, time.process_time() - start)
    return 1e6 * least / CALLS


def main() -> None:
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    changed = layouts._library().changed
    print("| tensors that are looked at in C | microseconds of the call |\n|---|---|")
    times = {}
    for count in (1, 11, 21, 51):
        looks = layouts.Layouts([], [torch.zeros(8, 4) for _ in range(count)], in_c=True)
        addresses = looks.address, layouts.address_of_items(())
        times[count] = microseconds(lambda addresses=addresses: changed(*addresses))  # type: ignore[misc]
        print(f"| {count} | {times[count]:.3f} |")
    print(f"\nFor each tensor {1e3 * (times[51] - times[1]) / 50:.1f} ns\n")
    print("| problem | loss | `step`, microseconds | of it, what Python reads and parameters |\n|---|---|---|---|")
    for build in (eight_schools, logistic_regression):
        for loss in (Trace_ELBO, DecomposedELBO):
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            model, guide, data = build()
            svi = CompiledSVI(model, guide, Adam({"lr": 0.01}), loss())
            for _ in range(10):
                svi.step(*data)
            program, _, _ = svi._find(data, {}, SVI.step)
            assert program is not None
            step, fits = microseconds(lambda svi=svi, data=data: svi.step(*data)), microseconds(program.fits)  # type: ignore[misc]
            print(f"| {build.__name__} | {loss.__name__} | {step:.2f} | {fits:.2f} |")


if __name__ == "__main__":
    main()
