"""The demo as it runs: what is fitted, sampled and timed, in what order, and what is kept of it."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from pyro.infer import SVI, Predictive
from pyro.infer.autoguide import AutoNormal
from pyro.optim import ClippedAdam
from torch import Tensor

from pyro_elbo_ext import __version__
from pyro_elbo_ext.comparison import Comparison, compare_to_mcmc
from pyro_elbo_ext.demo import telling
from pyro_elbo_ext.demo.eight_schools import centered, load_eight_schools, log_evidence, noncentered
from pyro_elbo_ext.demo.page import write_report
from pyro_elbo_ext.demo.speed import Speed, measure_speed
from pyro_elbo_ext.diagnosis import Diagnosis, diagnose
from pyro_elbo_ext.history import History
from pyro_elbo_ext.inference_data.export import dataset_of, to_arviz
from pyro_elbo_ext.mcmc import run_nuts
from pyro_elbo_ext.objectives import DecomposedELBO
from pyro_elbo_ext.programs.randomness import kept
from pyro_elbo_ext.training.automatic_fit import AutomaticFit
from pyro_elbo_ext.training.fit import fit

VAR_NAMES = ("mu", "tau", "theta")


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    steps: int  # of the mean-field fit
    nuts: tuple[int, int, int]  # chains, warmup, draws: by nutpie
    nuts_by_pyro: tuple[int, int, int]  # the same where there is no nutpie, which takes a hundred times as long
    draws: int  # of each guide, to compare
    exported: int  # draws of the file for ArviZ, each with predictions


FULL = Sizes(steps=1500, nuts=(4, 500, 2000), nuts_by_pyro=(2, 300, 400), draws=4000, exported=400)
QUICK = Sizes(steps=300, nuts=(4, 300, 500), nuts_by_pyro=(1, 150, 200), draws=2000, exported=100)


@dataclass(frozen=True)
class Demo:
    """What the demo found.

    Attributes
    ----------
    log_evidence : float
        log p(y) by quadrature, nats.
    history : History
        The terms of the mean-field fit of the centred model, by site and step.
    diagnosis : Diagnosis
        Of that fit, without MCMC.
    automatic : AutomaticFit
        ``fit(model, "auto")`` of the non-centred model.
    nuts : arviz.InferenceData or xarray.DataTree
        Draws of the posterior.
    comparisons : dict
        "mean-field" and "auto", each beside NUTS.
    speed : Speed
        The same steps by Pyro and compiled.
    files : list of Path
        What was written.
    """

    log_evidence: float
    history: History
    diagnosis: Diagnosis
    automatic: AutomaticFit
    nuts: Any
    comparisons: dict[str, Comparison]
    speed: Speed
    files: list[Path]


def run_demo(
    output: str | Path = "demo_output",
    *,
    seed: int = 0,
    quick: bool = False,
    echo: Callable[[str], None] = print,
) -> Demo:
    """Fit eight schools, say whether the fits are any good, time the steps, and write a report.

    The caller's parameter store and random number generators are left as they were.

    Parameters
    ----------
    output
        Folder for the files; made if need be, files of the same name in it are replaced.
    seed
        Same seed, same figures on one machine, but for times.
    quick
        Fewer steps and draws: rougher figures.
    echo
        Takes each line.

    Raises
    ------
    NotADirectoryError, FileExistsError
        ``output``, or something above it, is a file.
    """
    start = time.perf_counter()
    sizes = QUICK if quick else FULL
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    schools = load_eight_schools()
    coords = {"school": schools["school"]}
    sigma, y = (torch.tensor(schools[key], dtype=torch.float32) for key in ("sigma", "y"))
    evidence = log_evidence(sigma.double().numpy(), y.double().numpy())

    say = telling.Lines(echo)
    say.opening(schools["title"], len(y), evidence)
    with kept(), pyro.get_param_store().scope():
        pyro.set_rng_seed(seed)
        guide = AutoNormal(centered, init_scale=1.0)
        history = _train(guide, sigma, y, sizes.steps, say)
        say.terms(history)

        diagnosis = diagnose(centered, guide, sigma, y, history=history, seed=seed)
        say.verdict(diagnosis)
        automatic = cast(AutomaticFit, fit(noncentered, "auto", sigma, y, seed=seed, progress=False))
        say.fitted(automatic)
        nuts = _sample(sigma, y, coords, seed, sizes, say)
        draws = {
            "auto": {name: value.numpy() for name, value in automatic.draws(sizes.draws, seed=seed).items()},
            "mean-field": _draws(guide, sigma, y, sizes.draws, seed),
        }
        comparisons = {
            name: compare_to_mcmc({site: values[site][None] for site in VAR_NAMES}, nuts, VAR_NAMES)
            for name, values in draws.items()
        }
        gaps = {"auto": evidence - automatic.elbo, "mean-field": evidence - diagnosis.evidence.elbo}
        say.compared(comparisons, gaps)

        pyro.clear_param_store()
        speed = measure_speed(noncentered, sigma, y, seed)
        say.timed(speed)

        files = [output / name for name in ("report.html", "mean_field_history.nc", "automatic.nc", "nuts.nc")]
        history.save(files[1])
        automatic.to_arviz(num_samples=sizes.exported, coords=coords, seed=seed).to_netcdf(
            str(files[2]), engine="h5netcdf"
        )
        nuts.to_netcdf(str(files[3]), engine="h5netcdf")
    funnel = {"NUTS": _flat(dataset_of(nuts)), **draws}
    write_report(files[0], say.lines, history, diagnosis, comparisons, funnel, speed, schools["school"], __version__)
    say.closing(files, time.perf_counter() - start)
    return Demo(evidence, history, diagnosis, automatic, nuts, comparisons, speed, files)


def _train(guide: AutoNormal, sigma: Tensor, y: Tensor, num_steps: int, say: telling.Lines) -> History:
    history = History(max_steps=None)
    elbo = DecomposedELBO(history=history)
    svi = SVI(centered, guide, ClippedAdam({"lr": 0.1, "lrd": 0.01 ** (1 / num_steps)}), elbo)
    svi.step(sigma, y)  # with Pyro's checks of shapes and supports on, as they are by default
    done = 0
    with pyro.validation_enabled(False):
        for row in (1, *(max(2, round(num_steps * part)) for part in (0.05, 0.25, 1.0))):
            for _ in range(len(history), row):
                svi.step(sigma, y)
            say.steps(history, done)
            done = row
    return history


def _sample(sigma: Tensor, y: Tensor, coords: dict[str, Any], seed: int, sizes: Sizes, say: telling.Lines) -> Any:
    fast = importlib.util.find_spec("nutpie") is not None
    chains, warmup, draws = sizes.nuts if fast else sizes.nuts_by_pyro
    start = time.perf_counter()
    nuts = run_nuts(
        noncentered, sigma, y, num_samples=draws, warmup=warmup, chains=chains, seed=seed,
        progress=sys.stderr.isatty() and not fast, target_accept=0.9,
    )  # fmt: skip
    divergences = int(dataset_of(nuts, "sample_stats")["diverging"].sum())
    library = dataset_of(nuts).attrs["inference_library"]
    say.sampled(chains, draws, time.perf_counter() - start, library, divergences)
    groups = {group: dataset_of(nuts, group) for group in ("posterior", "sample_stats", "observed_data")}
    return to_arviz(
        {name: group.assign_coords(coords) if "school" in group.dims else group for name, group in groups.items()}
    )


def _draws(guide: AutoNormal, sigma: Tensor, y: Tensor, num_draws: int, seed: int) -> dict[str, NDArray[np.float32]]:
    pyro.set_rng_seed(seed)
    with torch.no_grad():
        found = Predictive(guide, num_samples=num_draws, parallel=True)(sigma, y)
    shapes = {"mu": (), "tau": (), "theta": y.shape}
    return {name: found[name].reshape(num_draws, *shape).numpy() for name, shape in shapes.items()}


def _flat(posterior: Any) -> dict[str, NDArray[Any]]:
    """Draws of all chains, one after the other."""
    return {name: np.concatenate(list(posterior[name].values)) for name in VAR_NAMES}
