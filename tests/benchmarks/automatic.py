"""Seconds of ``fit(model, "auto")`` beside ``run_nuts`` and a guide as usually trained, on eight posteriors of posteriordb.

    python -m tests.benchmarks.automatic [--only NAME]

"cold" is all of it in this process, compilation included, "warm" is what remains once the density is compiled. How near the
guides are to the reference draws is in the table of ``python -m pytest tests/test_fit_posteriordb.py -s``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pyro_elbo_ext import compiled_log_density, fit, run_nuts
from tests import posteriordb_guides
from tests import posteriordb_models as db

LONG = 10.0  # seconds of NUTS from which on it is run once


def seconds(call: Callable[..., Any], *args: Any, **options: Any) -> tuple[float, Any]:
    began = time.perf_counter()
    found = call(*args, **options)
    return time.perf_counter() - began, found


def times(name: str) -> tuple[tuple[float, float], tuple[float, float], float]:
    """Cold and warm, each of ours and of NUTS, and of the usual guide."""
    model, (data, _) = db.MODELS[name], db.load(name)
    cold, _ = seconds(fit, model, "auto", data, progress=False, seed=0)
    cold_nuts, chains = seconds(run_nuts, model, data, progress=False)
    density = compiled_log_density(model, data)
    fit(density, "auto", progress=False, seed=0)
    warm, _ = seconds(fit, density, "auto", progress=False, seed=1)
    warm_nuts = chains.posterior.attrs["sampling_time"]
    if warm_nuts < LONG:
        run_nuts(density, progress=False)
        warm_nuts, _ = seconds(run_nuts, density, progress=False, seed=1)
    usual, _ = seconds(posteriordb_guides.usual, density)
    return (cold, cold_nuts), (warm, warm_nuts), usual


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=db.MODELS, help="one posterior")
    only = parser.parse_args().only
    if not db.FOLDER.is_dir():
        sys.exit(f"The posteriors are not here: {db.FOLDER} is missing")
    torch.set_num_threads(1)
    print("| posterior | cold, ours | NUTS | ratio | warm, ours | NUTS | ratio | usual guide |")
    print("|---|---|---|---|---|---|---|---|")
    ratios = []
    for name in [only] if only else db.MODELS:
        *pairs, usual = times(name)
        cells = [f"{ours:.3f} | {nuts:.3f} | {ours / nuts:.2f}" for ours, nuts in pairs]
        print(f"| {name.split('-')[0]} | {' | '.join(cells)} | {usual:.2f} |", flush=True)
        ratios.append([ours / nuts for ours, nuts in pairs])
    cold, warm = np.exp(np.log(ratios).mean(0))
    print(f"\nGeometric mean of the ratios: cold {cold:.3f}, warm {warm:.3f}")


if __name__ == "__main__":
    main()
