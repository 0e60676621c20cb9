"""One simulation of a calibration: truth and data from the model, draws from the recipe, the truth's rank among them."""

from __future__ import annotations

import hashlib
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cloudpickle
import numpy as np
import pyro
import torch
import xarray as xr
from numpy.typing import NDArray
from pyro import poutine
from pyro.distributions import Unit
from pyro.poutine import Trace
from torch import Tensor

from pyro_elbo_ext.inference_data.draws import Columns, to_numpy
from pyro_elbo_ext.inference_data.export import dataset_of
from pyro_elbo_ext.inference_data.names import by_site, found_in
from pyro_elbo_ext.inference_data.summed_out import SummedOut, draw_guide
from pyro_elbo_ext.programs.given import check_full, data_of, run_given, values_of
from pyro_elbo_ext.programs.nodes import is_marked_site
from pyro_elbo_ext.programs.randomness import seeded, untouched

QUANTITIES = ("truth", "rank", "above", "mean", "sd")
# Pyro's parameter store, handlers and seeds belong to the process: in threads, simulations take turns.
_TURN = threading.RLock()


@dataclass(frozen=True)
class Job:
    """All that a simulation needs, wherever it runs.

    Attributes
    ----------
    program : bytes
        Model, recipe, args and kwargs, pickled: each simulation has copies of its own, so that none sees what another one
        has trained.
    observed : tuple of str
        Sites that are data.
    shapes : dict
        Parameter to the shape of its value.
    data_arguments : dict
        Position or keyword of an argument to the observed site whose data it holds.
    """

    program: bytes
    observed: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    data_arguments: dict[int | str, str]
    num_draws: int
    seed: int
    dtype: torch.dtype
    validate: bool


@dataclass(frozen=True)
class Ranked:
    """A finished simulation: quantity to parameter to array of the parameter's shape, and a digest of the data."""

    index: int
    values: dict[str, dict[str, NDArray[Any]]]
    digest: str


@dataclass(frozen=True)
class Failed:
    """A simulation that raised an exception."""

    index: int
    error: str
    message: str
    traceback: str


def prior_run(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], observed: tuple[str, ...]
) -> tuple[dict[str, Tensor], dict[str, Tensor], Trace]:
    """Truth (latent and deterministic sites), data and trace of one run of the model with its data drawn anew.

    Raises
    ------
    ValueError
        If the model's joint distribution cannot be drawn from by running it.
    """
    trace = run_given(model, args, kwargs, {}, redraw=True)
    check_full(trace)
    for name, node in trace.nodes.items():
        if node["type"] == "sample" and isinstance(node["fn"], Unit):
            raise ValueError(
                f"the model has the factor '{name}', so that running it does not draw from its prior. Write the factor as "
                "a distribution of a latent or observed site."
            )
    values = values_of(trace)
    for name in observed:
        if name not in trace:
            raise ValueError(f"observed_sites has '{name}', which is not a site of the model")
    data = {**{name: values[name] for name in observed if name in values}, **data_of(trace)}
    return {name: value for name, value in values.items() if name not in data}, data, trace


def simulate(job: Job, index: int, model: Any, args: Any, kwargs: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Truth and data of a simulation, from its own seed."""
    with untouched(_seeds(job, index)[0]):
        truth, data, _ = prior_run(model, args, kwargs, job.observed)
    return {name: truth[name] for name in job.shapes}, data


def digest(data: Mapping[str, Tensor]) -> str:
    """Fingerprint of simulated data."""
    found = hashlib.sha256()
    for name in sorted(data):
        found.update(name.encode() + np.ascontiguousarray(to_numpy(data[name])).tobytes())
    return found.hexdigest()


def data_of_simulation(job: Job, index: int) -> str:
    """Digest of a simulation's data without running the recipe."""
    with _TURN, _settings(job):
        model, _, args, kwargs = cloudpickle.loads(job.program)
        return digest(simulate(job, index, model, args, kwargs)[1])


def run_simulation(job: Job, index: int) -> Ranked | Failed:
    """Simulate, call the recipe and rank; whatever goes wrong comes back as a `Failed`."""
    with _TURN:
        try:
            with _settings(job):
                return _run(job, index)
        except Exception as error:  # the caller counts and shows it
            return Failed(index, type(error).__name__, str(error), traceback.format_exc())


def _run(job: Job, index: int) -> Ranked:
    model, recipe, args, kwargs = cloudpickle.loads(job.program)
    truth, data = simulate(job, index, model, args, kwargs)
    positional = [_replaced(job.data_arguments.get(i), arg, data) for i, arg in enumerate(args)]
    keywords = {name: _replaced(job.data_arguments.get(name), arg, data) for name, arg in kwargs.items()}
    _, seed, tie_seed = _seeds(job, index)
    with seeded(seed):
        conditioned = poutine.condition(model, data)
        found = recipe(dict(data), conditioned, *positional, **keywords)
        draws = _draws(job, found, conditioned, positional, keywords)
    rng = np.random.default_rng(tie_seed)
    values: dict[str, dict[str, NDArray[Any]]] = {quantity: {} for quantity in QUANTITIES}
    for name, shape in job.shapes.items():
        true, drawn = to_numpy(truth[name]), draws[name]
        if true.shape != shape:
            raise ValueError(f"site '{name}' has shape {true.shape}, {shape} in the first run: its shape must not vary")
        if drawn.shape != (job.num_draws, *shape):
            raise ValueError(
                f"the recipe's draws of '{name}' have shape {drawn.shape}; they must have {(job.num_draws, *shape)}, "
                f"num_draws before the shape of the site"
            )
        if drawn.dtype.kind in "fc" and not np.isfinite(drawn).all():
            raise ValueError(f"the recipe's draws of '{name}' have {int((~np.isfinite(drawn)).sum())} NaN or infinite")
        below, equal = (drawn < true).sum(0), (drawn == true).sum(0)
        values["truth"][name] = true
        values["rank"][name] = np.asarray(below + rng.integers(0, equal + 1))  # ties broken at random, as they must be
        # twice the number above, a tie counting half: integer, so that the test of symmetry meets ties exactly
        values["above"][name] = np.asarray(2 * (job.num_draws - below) - equal)
        values["mean"][name] = np.asarray(drawn.mean(0, dtype=np.float64))
        values["sd"][name] = np.asarray(drawn.std(0, ddof=1, dtype=np.float64))
    return Ranked(index, values, digest(data))


def _draws(job: Job, found: Any, model: Any, args: list[Any], kwargs: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """What a recipe returned, as arrays of shape (draws, *shape)."""
    if callable(found):
        draws = _guide_draws(job, found, model, args, kwargs)
    elif (
        isinstance(found, Mapping)
        and not isinstance(found, xr.Dataset | xr.DataTree)
        and not hasattr(found, "posterior")
    ):
        draws = {name: to_numpy(value) for name, value in found.items()}
    else:
        posterior, draws = dataset_of(found), {}
        for site, variable in by_site(posterior).items():
            array = variable.transpose("chain", "draw", ...).values
            draws[site] = array.reshape(array.shape[0] * array.shape[1], *array.shape[2:])
    draws |= {name: draws[found] for name in job.shapes if (found := found_in(draws, name)) is not None}
    missing = [name for name in job.shapes if name not in draws]
    if missing:
        raise ValueError(
            f"the recipe gives no draws of {', '.join(missing)}; it has {', '.join(draws) or 'none'}. Leave out what cannot "
            "be drawn by var_names."
        )
    return draws


def _guide_draws(job: Job, guide: Any, model: Any, args: list[Any], kwargs: dict[str, Any]) -> dict[str, NDArray[Any]]:
    columns = Columns(job.num_draws)
    with torch.no_grad():
        for index in range(job.num_draws):
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            found = {name: node["value"] for name, node in guide_trace.nodes.items() if node["type"] == "sample"}
            if any(name not in found for name in job.shapes):
                trace = run_given(model, tuple(args), kwargs, found)
                if any(is_marked_site(node) and name not in found for name, node in trace.nodes.items()):
                    return _completed_draws(job, guide, model, tuple(args), kwargs)
                # without draws of every latent site, a deterministic one would be partly from the prior
                if all(name in found for name, node in trace.nodes.items() if _latent(node)):
                    found |= values_of(trace)
            for name in job.shapes:
                if name in found:
                    columns.put(index, name, found[name])
    return {name: array[0] for name, array in columns.by_chain(1).items()}


def _completed_draws(
    job: Job, guide: Any, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, NDArray[Any]]:
    """Draws of the guide, and of what is summed out of the model, from its exact posterior given each of them."""
    drawn = draw_guide(model, guide, args, kwargs, job.num_draws, False)
    found = SummedOut(model, args, kwargs, drawn.latents, job.num_draws).posterior()
    return {name: found[name] for name in job.shapes}


def _latent(node: Any) -> bool:
    return node["type"] == "sample" and not node["is_observed"]


def _seeds(job: Job, index: int) -> list[int]:
    return [int(number) for number in np.random.SeedSequence([job.seed, index]).generate_state(3)]


def _replaced(site: str | None, arg: Any, data: Mapping[str, Tensor]) -> Any:
    if site is None:
        return arg
    return data[site].to(arg.dtype) if isinstance(arg, Tensor) else to_numpy(data[site]).astype(arg.dtype)


@contextmanager
def _settings(job: Job) -> Iterator[None]:
    """The caller's settings, which another process does not have, and an empty parameter store."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(job.dtype)
    try:
        with pyro.get_param_store().scope(), pyro.validation_enabled(job.validate):
            yield
    finally:
        torch.set_default_dtype(dtype)
