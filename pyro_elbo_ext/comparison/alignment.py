"""Two sets of draws brought to the same variables, dims and order of coordinates."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import xarray as xr

from pyro_elbo_ext.comparison.reference_draws import read_draws
from pyro_elbo_ext.inference_data.export import dataset_of
from pyro_elbo_ext.programs.arguments import check_mapping, names_of

SIDES = ("approx", "mcmc")
Transformed = Mapping[str, Callable[[xr.Dataset], Any]]


def draws_of(data: Any, side: str) -> xr.Dataset:
    """Draws as a Dataset whose variables have the dims ``chain`` and ``draw``.

    Parameters
    ----------
    data
        ArviZ data with a group ``posterior``, a Dataset, a mapping from name to array of shape (chain, draw, ...), or the
        path of a file, see :func:`pyro_elbo_ext.comparison.reference_draws.read_draws`.
    side
        Name of the argument, for errors.
    """
    if isinstance(data, xr.Dataset):
        found = data
    elif isinstance(data, xr.DataTree) or callable(getattr(data, "groups", None)):
        try:
            found = dataset_of(data, "posterior")
        except KeyError as error:
            raise ValueError(f"{side} has no draws: {error.args[0]}") from error
    elif isinstance(data, str | os.PathLike):
        found = read_draws(data)
    elif isinstance(data, Mapping):
        arrays = {name: np.asarray(value) for name, value in data.items()}
        for name, value in arrays.items():
            if value.dtype.kind not in "fiub":
                raise ValueError(f"'{name}' of {side} is not an array of numbers, it has dtype {value.dtype}")
            if value.ndim < 2:
                raise ValueError(f"'{name}' of {side} has shape {value.shape}; it must start with (chain, draw)")
        found = xr.Dataset(
            {n: (["chain", "draw", *(f"{n}_dim_{i}" for i in range(v.ndim - 2))], v) for n, v in arrays.items()}
        )
    else:
        raise TypeError(
            f"{side} must be ArviZ data with a posterior, a Dataset, mapping or path, got {type(data).__name__}"
        )
    for name, variable in found.data_vars.items():
        if not {"chain", "draw"} <= set(variable.dims):
            raise ValueError(f"'{name}' of {side} has dims {variable.dims}; it needs 'chain' and 'draw'")
    return found


def with_transformed(approx: xr.Dataset, mcmc: xr.Dataset, transformed: Transformed) -> tuple[xr.Dataset, xr.Dataset]:
    """Both sides with the functions of their draws that they lack.

    Raises
    ------
    ValueError
        If both sides have a variable of that name, or if the function does not return draws.
    """
    sides = [approx, mcmc]
    check_mapping("transformed", transformed)
    for name, function in transformed.items():
        if all(name in side for side in sides):
            raise ValueError(f"transformed has '{name}', which approx and mcmc both have: give it another name")
        for i, (which, side) in enumerate(zip(SIDES, sides, strict=True)):
            if name in side:
                continue
            try:
                made = function(side)
            except Exception as error:
                error.add_note(f"in transformed['{name}'] on the draws of {which}, which has {list(side.data_vars)}")
                raise
            if not isinstance(made, xr.DataArray):
                made = np.asarray(made)
                made = xr.DataArray(
                    made, dims=["chain", "draw", *(f"{name}_dim_{i}" for i in range(made.ndim - 2))][: made.ndim]
                )
            expected = tuple(side.sizes[dim] for dim in ("chain", "draw"))
            if tuple(made.sizes.get(dim) for dim in ("chain", "draw")) != expected:
                raise ValueError(
                    f"transformed['{name}'] gives dims {dict(made.sizes)} on {which}; it must keep 'chain' and 'draw' of "
                    f"sizes {expected}, first where it returns an array"
                )
            sides[i] = side.assign({name: made})
    return sides[0], sides[1]


def aligned(
    approx: xr.Dataset, mcmc: xr.Dataset, var_names: Iterable[str] | None = None
) -> dict[str, tuple[xr.DataArray, xr.DataArray]]:
    """Variables of both sides, dims ``(chain, draw, ...)``, entry by entry in the order of ``mcmc``.

    Dims of the same names may be in another order, and coordinates of the same labels too. Dims of other names are taken by
    their position.

    Raises
    ------
    KeyError
        If a variable is missing on a side.
    ValueError
        If shapes or labels differ. Both say what is only here, what only there, which shapes differ and what to do.
    """
    names = list(mcmc.data_vars) if var_names is None else names_of("var_names", var_names)
    if not names:
        raise ValueError("there is no variable to compare")
    pairs, problems, missing = {}, [], False
    for name in names:
        absent = [(which, side) for which, side in zip(SIDES, (approx, mcmc), strict=True) if name not in side]
        if absent:
            missing = True
            problems += [f"'{name}' is not in {which}, which has {list(side.data_vars)}" for which, side in absent]
            continue
        a, b = (side[name].transpose("chain", "draw", ...) for side in (approx, mcmc))
        if set(a.dims) == set(b.dims):
            a = a.transpose(*b.dims)
        if a.shape[2:] != b.shape[2:]:
            problems.append(f"'{name}' has shape {a.shape[2:]} in approx and {b.shape[2:]} in mcmc")
            continue
        pairs[str(name)] = (a, b)
        for dim in b.dims[2:]:
            if dim not in a.dims or dim not in a.coords or dim not in b.coords:
                continue
            ours, theirs = a.coords[dim].values, b.coords[dim].values
            if np.array_equal(ours, theirs):
                continue
            if set(ours.tolist()) == set(theirs.tolist()) and len(set(ours.tolist())) == len(ours):
                pairs[str(name)] = (pairs[str(name)][0].sel({dim: theirs}), b)
            elif not (ours.dtype.kind in "iu" and theirs.dtype.kind in "iu"):  # numbers are places, from 0 or 1
                problems.append(
                    f"'{name}' has other labels along '{dim}': {ours.tolist()} in approx, {theirs.tolist()} in mcmc"
                )
    if problems:
        only = [
            f"only in {which}: {', '.join(map(str, left)) or 'none'}"
            for which, left in (
                ("approx", [name for name in approx.data_vars if name not in mcmc]),
                ("mcmc", [name for name in mcmc.data_vars if name not in approx]),
            )
        ]
        message = (
            f"{'; '.join(problems)}. {'; '.join(only)}. Rename or reshape one side, compute what is missing by "
            "transformed={name: function of the draws}, or name what to compare by var_names."
        )
        raise KeyError(message) if missing else ValueError(message)
    return pairs
