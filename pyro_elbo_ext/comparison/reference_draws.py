"""Reference draws from files: ArviZ's netCDF, and posteriordb's and Stan's scalars by name."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from pyro_elbo_ext.files.untrusted import NUMBERS, loaded, open_zip, read_npz, reading

KINDS = (".nc", ".npz", ".json", ".zip")
MOST_DIMS = 30  # beside chain and draw
STAN_NAME = re.compile(r"(?P<base>.+)\[(?P<index>\d+(?:\s*,\s*\d+)*)\]")


def read_draws(path: str | os.PathLike[str]) -> xr.Dataset:
    """Draws of shape (chain, draw, ...) from a file.

    Parameters
    ----------
    path
        ``.nc``: the group ``posterior`` of ArviZ data. ``.npz``: Stan's scalar names, such as ``beta[1]`` or
        ``L[2,1]``, to arrays of shape (chain, draw). ``.json``, also in a ``.zip``: posteriordb's list with one object
        per chain, name to list of draws.

    Returns
    -------
    xarray.Dataset
        ``beta[1]``, ``beta[2]``, ... become one variable ``beta`` with dims ``(chain, draw, beta_dim_0)``.

    Raises
    ------
    FileNotFoundError, IsADirectoryError, PermissionError
        If there is no such file, or none that can be opened.
    ValueError
        With the name of the file, if its kind is none of these, or what it holds does not make arrays.
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"no such draws: {file}")
    if file.suffix not in KINDS:
        raise ValueError(f"draws are read from {', '.join(KINDS[:-1])} or {KINDS[-1]}, not {file.suffix!r}: {file}")
    with reading(file, "a file of draws"):
        if file.is_dir():
            raise IsADirectoryError
        if file.suffix == ".nc":
            return _posterior(file)
        if file.suffix == ".npz":
            return stan_dataset(read_npz(file))
        if file.suffix == ".zip":
            with open_zip(file) as archive:
                names = [name for name in archive.namelist() if name.endswith(".json")]
                if len(names) != 1:
                    raise ValueError(f"{file} must hold one .json file, it has {names or 'none'}")
                return _chains(json.loads(archive.read(names[0])), file)
        return _chains(json.loads(file.read_text(encoding="utf-8")), file)


def _posterior(file: Path) -> xr.Dataset:
    try:
        opened = xr.open_dataset(file, group="posterior", engine="h5netcdf")
    except OSError as error:
        if "group not found" in str(error):
            raise ValueError(f"{file} has no group 'posterior'") from error
        raise
    with opened as dataset:
        found = loaded(dataset, file)
    for name, variable in found.data_vars.items():
        if variable.dtype.kind not in NUMBERS:
            raise ValueError(f"{file}: '{name}' has dtype {variable.dtype}, which is not one of numbers")
    return found


def stan_dataset(columns: Mapping[str, Any]) -> xr.Dataset:
    """Stan's scalars, name to array of shape (chain, draw), as arrays by the name before the bracket.

    Raises
    ------
    ValueError
        If a scalar is not of that shape, if shapes differ, or if an index is missing; the name is given.
    """
    if not columns:
        raise ValueError("there are no draws: the file is empty")
    first, size = "", (0, 0)
    found: dict[str, dict[tuple[int, ...], NDArray[np.float64]]] = {}
    for name, values in columns.items():
        array = _numbers(name, values)
        if array.ndim != 2 or not array.size:
            raise ValueError(
                f"'{name}' has shape {array.shape}; a scalar's draws have shape (chain, draw), both above 0"
            )
        if not first:
            first, size = name, array.shape
        if array.shape != size:
            raise ValueError(
                f"'{name}' has shape {array.shape}, '{first}' {size}: all must have the same chains and draws"
            )
        match = STAN_NAME.fullmatch(name)
        base, index = (name, ()) if match is None else (match["base"], tuple(int(i) for i in match["index"].split(",")))
        scalars = found.setdefault(base, {})
        if index in scalars:
            raise ValueError(f"'{name}' is there twice, perhaps written in two ways")
        scalars[index] = array
    variables = {base: _assembled(base, scalars, size) for base, scalars in found.items()}
    return xr.Dataset(
        {
            base: (["chain", "draw", *(f"{base}_dim_{i}" for i in range(array.ndim - 2))], array)
            for base, array in variables.items()
        }
    )


def _numbers(name: str, values: Any) -> NDArray[np.float64]:
    try:
        array = np.asarray(values)
    except ValueError as error:  # lists of unequal lengths
        raise ValueError(f"'{name}' is not an array of numbers") from error
    if array.size and array.dtype.kind not in "fiu":
        raise ValueError(f"'{name}' is not an array of numbers")
    return array.astype(np.float64)


def _assembled(
    base: str, scalars: Mapping[tuple[int, ...], NDArray[np.float64]], size: tuple[int, ...]
) -> NDArray[np.float64]:
    ndims = {len(index) for index in scalars}
    if len(ndims) > 1:
        raise ValueError(f"'{base}' has entries of {sorted(ndims)} indices: they are not of one array")
    if min((i for index in scalars for i in index), default=1) < 1:
        raise ValueError(f"'{base}' has an index 0; Stan counts from 1")
    count = ndims.pop()
    if count > MOST_DIMS:
        raise ValueError(f"'{base}' has {count} indices, more than an array has dimensions")
    shape = tuple(max(index[axis] for index in scalars) for axis in range(count))
    if math.prod(shape) != len(scalars):
        # among one place more than there are entries, one has none
        missing = next(place for place in (_place(n, shape) for n in range(len(scalars) + 1)) if place not in scalars)
        raise ValueError(f"'{base}' has shape {shape}, but {base}[{','.join(map(str, missing))}] is missing")
    array = np.empty((*size, *shape))
    for index, draws in scalars.items():
        place: tuple[Any, ...] = (slice(None), slice(None), *(i - 1 for i in index))
        array[place] = draws
    return array


def _place(number: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The index, from 1, of a place in an array's order."""
    index: list[int] = []
    for size in reversed(shape):
        number, rest = divmod(number, size)
        index.append(rest + 1)
    return tuple(reversed(index))


def _chains(chains: Any, file: Path) -> xr.Dataset:
    if not (isinstance(chains, list) and chains and all(isinstance(chain, dict) for chain in chains)):
        raise ValueError(f"{file} must hold a list with one object per chain, as posteriordb's reference draws do")
    for number, chain in enumerate(chains):
        if chain.keys() != chains[0].keys():
            raise ValueError(
                f"chain {number} of {file} has other names than chain 0: {sorted(chain.keys() ^ chains[0].keys())}"
            )
        for name, draws in (*chain.items(), *chains[0].items()):
            if not isinstance(draws, list):
                raise ValueError(f"chain {number} of {file} has no list of draws of '{name}'")
        lengths = {len(draws) for draws in chain.values()} | {len(draws) for draws in chains[0].values()}
        if len(lengths) > 1:
            raise ValueError(
                f"chains 0 and {number} of {file} have draws of lengths {sorted(lengths)}; they must be equal"
            )
    return stan_dataset({name: [chain[name] for chain in chains] for name in chains[0]})
