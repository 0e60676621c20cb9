"""Try a guide with its training recipe on data that the model simulates, and rank the truth among its draws."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import cloudpickle
import numpy as np
import pyro
import torch
from joblib import Parallel, delayed, effective_n_jobs
from pyro import poutine
from tqdm import tqdm

from pyro_elbo_ext.calibration.calibration import DIM, Calibration
from pyro_elbo_ext.calibration.files import Folder
from pyro_elbo_ext.calibration.simulation import Failed, Job, Ranked, data_of_simulation, prior_run, run_simulation
from pyro_elbo_ext.inference_data.draws import to_numpy
from pyro_elbo_ext.inference_data.labels import Labels
from pyro_elbo_ext.programs.arguments import check_count, names_of
from pyro_elbo_ext.programs.given import data_of
from pyro_elbo_ext.programs.nodes import is_deterministic
from pyro_elbo_ext.programs.randomness import untouched
from pyro_elbo_ext.programs.running import check_callable


def simulate_calibration(
    model: Callable[..., Any],
    recipe: Callable[..., Any],
    *args: Any,
    num_simulations: int = 200,
    num_draws: int = 999,
    observed_sites: Iterable[str] | None = None,
    var_names: Iterable[str] | None = None,
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str | None]] | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Calibration:
    """Try a recipe on data simulated from the model, and rank the true parameters among its draws.

    Each simulation draws parameters and data from the model, calls the recipe on the data, and counts how many of its
    draws are below the true parameters. If the recipe gives exact posteriors, the ranks are uniform (Talts et al. 2018).
    A variational family that is too simple fails that for sure; whether it is at least centered where it should be is what
    symmetry of ``P_q(theta > truth)`` about 1/2 tells (Yao et al. 2018).

    Simulations run through joblib, one after the other unless the caller says otherwise::

        with joblib.parallel_config(backend="loky", n_jobs=4):  # or "dask", or "ray"
            simulate_calibration(...)

    Each has its own seed, its own copies of model, recipe and arguments, and a parameter store that is empty at first; the
    result does not depend on where and in which order they run, save for rounding. In threads they take turns, since
    Pyro's state belongs to the process. Modules that are globals of an imported file are not copied: pass them as arguments,
    or make them in the recipe.

    Parameters
    ----------
    model
        Pyro model, called as ``model(*args, **kwargs)``, with ``obs=data`` as ever: its observed sites are drawn anew. Its
        parameters (``pyro.param``, modules) are at their initial values there. Model keywords with the name of a
        parameter below need ``functools.partial``.
    recipe
        Called as ``recipe(data, model, *args, **kwargs)``: ``data`` maps observed sites to simulated tensors, ``model`` is
        conditioned on them. An argument that holds the real data, equal to an observed site's value, holds the simulated
        data instead. Returns a guide, which is called with the same arguments; sites that the model marks for enumeration
        and the guide does not have are drawn from their exact posterior given its draws. Or a mapping from parameter to
        array of shape ``(num_draws, *shape)``; or ArviZ data with chain * draw = num_draws. Draws must be independent: thin
        those of MCMC. `TrainGuide` is such a recipe.
    num_simulations
        N. With 200 and one parameter, an sd too small by a fifth is found about half of the time.
    num_draws
        L. For the chi-squared test L + 1 is best a multiple of 20.
    observed_sites
        Sites that are data although the arguments hold none (``obs=None``), beside those that are observed.
    var_names
        Parameters to rank; by default all latent sites. Deterministic sites may be named too.
    seed
        Same seed, same result; the random number generators are left as they were.
    path
        Folder in which finished simulations are kept. Called again with the same path and settings, only those that are
        missing or failed are run. ``num_simulations`` may have grown.
    coords, dims
        As in ``from_pyro_svi``.
    progress
        Show a progress bar, with the number of failures.

    Returns
    -------
    Calibration
        Single failures are in its ``failures`` and its ``verdict``.

    Raises
    ------
    RuntimeError
        If all simulations fail; with the first error.
    ValueError
        If numbers are too small; if the model cannot be simulated (factors, improper priors, subsampling), has no
        data or no such parameter; if ``path`` holds another calibration.
    TypeError
        If model or recipe cannot be called, or pickled.

    References
    ----------
    Talts, Betancourt, Simpson, Vehtari, Gelman (2018), Validating Bayesian Inference Algorithms with Simulation-Based
    Calibration. Yao, Vehtari, Simpson, Gelman (2018), Yes, but Did It Work?: Evaluating Variational Inference.
    """
    for name, value, least in (("num_simulations", num_simulations, 1), ("num_draws", num_draws, 2), ("seed", seed, 0)):
        check_count(name, value, least)
    check_callable(model, "model", args, kwargs)
    if not callable(recipe):
        raise TypeError(f"recipe must be callable, got {type(recipe).__name__}")
    observed = tuple(names_of("observed_sites", () if observed_sites is None else observed_sites))
    with untouched(seed % 2**32):
        truth, data, trace = prior_run(model, args, kwargs, observed)
        data_arguments = _data_arguments(data_of(poutine.trace(model).get_trace(*args, **kwargs)), args, kwargs)
    if not data:
        raise ValueError("the model has no observed site: call it with its data, or name the sites in observed_sites")
    shapes = {name: tuple(truth[name].shape) for name in _parameters(truth, trace.nodes, var_names)}
    try:
        program = cloudpickle.dumps((model, recipe, args, kwargs))
    except Exception as error:
        raise TypeError(f"model, recipe and arguments must be picklable, to run anywhere: {error}") from error
    job = Job(
        program,
        observed,
        shapes,
        data_arguments,
        operator.index(num_draws),
        operator.index(seed),
        torch.get_default_dtype(),
        bool(pyro.infer.is_validation_enabled()),
    )
    labels = Labels(coords, dims, trace.nodes)
    for name, shape in shapes.items():
        if DIM in labels.of(name, shape, trace.nodes[name]):
            raise ValueError(f"'{name}' has a dim '{DIM}', which is that of the simulations: rename it by dims")
    labels.check_used()

    folder = None if path is None else Folder(path, _description(job, recipe, data))
    done = {} if folder is None else folder.read(num_simulations)
    for index in list(done)[:1]:
        if done[index].digest != data_of_simulation(job, index):
            raise ValueError(f"{path} was made with another model or other arguments. Pass another path.")
    failures: dict[int, Failed] = {}
    missing = [index for index in range(num_simulations) if index not in done]
    with tqdm(total=num_simulations, initial=len(done), desc="simulations", disable=not progress) as bar:
        for result in _finished(job, missing):
            if isinstance(result, Failed):
                failures[result.index] = result
                bar.set_postfix(failed=len(failures))
            else:
                done[result.index] = result
                if folder is not None:
                    folder.write(result)
            bar.update()
    if not done:
        first = failures[min(failures)]
        raise RuntimeError(
            f"all {num_simulations} simulations failed, the first with {first.error}: {first.message}\n{first.traceback}"
        )
    return Calibration(
        [done[index] for index in sorted(done)],
        [failures[index] for index in sorted(failures)],
        labels,
        trace.nodes,
        job.num_draws,
    )


def _finished(job: Job, indices: Sequence[int]) -> Iterator[Ranked | Failed]:
    """Results as they come, by the joblib backend that the caller has set."""
    try:
        parallel = Parallel(return_as="generator_unordered")
    except ValueError:
        # not every backend can hand out results one by one (Ray's): rounds, so that there are some to keep at all
        size = 4 * effective_n_jobs()
        with Parallel() as parallel:
            for start in range(0, len(indices), size):
                yield from parallel(delayed(run_simulation)(job, index) for index in indices[start : start + size])
        return
    yield from parallel(delayed(run_simulation)(job, index) for index in indices)


def _data_arguments(data: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[int | str, str]:
    found: dict[int | str, str] = {}
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for key, value in given:
        if isinstance(value, torch.Tensor | np.ndarray):
            array = to_numpy(value)
            for site, observed in data.items():
                other = to_numpy(observed)
                if array.ndim and np.array_equal(
                    array, other, equal_nan=array.dtype.kind in "fc" and other.dtype.kind in "fc"
                ):
                    found[key] = site
    return found


def _parameters(truth: Mapping[str, Any], nodes: Mapping[str, Any], var_names: Iterable[str] | None) -> list[str]:
    if var_names is None:
        names = [name for name in truth if not is_deterministic(nodes[name])]
    else:
        names = names_of("var_names", var_names)
        for name in names:
            if name not in truth:
                raise ValueError(f"var_names has '{name}', which is none of the model's parameters: {', '.join(truth)}")
    if not any(truth[name].numel() for name in names):
        raise ValueError("there is no parameter to rank: the model has no latent site, or var_names is empty")
    return names


def _description(job: Job, recipe: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """What a resumed calibration must have in common with the one before."""
    # functions have a name; an object may describe itself, but by default shows its address
    named = getattr(recipe, "__qualname__", type(recipe).__qualname__)
    described = repr(recipe)
    return {
        "format": 1,
        "seed": job.seed,
        "num_draws": job.num_draws,
        "shapes": job.shapes,
        "data": {name: list(value.shape) for name, value in data.items()},
        "dtype": str(job.dtype),
        "recipe": named if " at 0x" in described else described,
    }
