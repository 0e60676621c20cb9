"""Reference draws from files: ArviZ's netCDF, and posteriordb's and Stan's scalars by name."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

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
    FileNotFoundError
        If there is no such file.
    ValueError
        If its kind is none of these, or what it holds does not make arrays.
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"no such draws: {file}")
    if file.suffix == ".nc":
        with xr.open_dataset(file, group="posterior", engine="h5netcdf") as dataset:
            return dataset.load()
    if file.suffix == ".npz":
        with np.load(file, allow_pickle=False) as archive:
            return stan_dataset({name: archive[name] for name in archive.files})
    if file.suffix == ".zip":
        with zipfile.ZipFile(file) as archive:
            names = [name for name in archive.namelist() if name.endswith(".json")]
            if len(names) != 1:
                raise ValueError(f"{file} must hold one .json file, it has {names or 'none'}")
            return _chains(json.loads(archive.read(names[0])), file)
    if file.suffix == ".json":
        return _chains(json.loads(file.read_text(encoding="utf-8")), file)
    raise ValueError(f"draws are read from .nc, .npz, .json or .zip, not {file.suffix!r}: {file}")


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
        array = np.asarray(values, dtype=np.float64)
        if array.ndim != 2:
            raise ValueError(f"'{name}' has shape {array.shape}; a scalar's draws have shape (chain, draw)")
        if not first:
            first, size = name, array.shape
        if array.shape != size:
            raise ValueError(
                f"'{name}' has shape {array.shape}, '{first}' {size}: all must have the same chains and draws"
            )
        match = STAN_NAME.fullmatch(name)
        base, index = (name, ()) if match is None else (match["base"], tuple(int(i) for i in match["index"].split(",")))
        found.setdefault(base, {})[index] = array
    variables = {base: _assembled(base, scalars, size) for base, scalars in found.items()}
    return xr.Dataset(
        {
            base: (["chain", "draw", *(f"{base}_dim_{i}" for i in range(array.ndim - 2))], array)
            for base, array in variables.items()
        }
    )


def _assembled(
    base: str, scalars: Mapping[tuple[int, ...], NDArray[np.float64]], size: tuple[int, ...]
) -> NDArray[np.float64]:
    ndims = {len(index) for index in scalars}
    if len(ndims) > 1:
        raise ValueError(f"'{base}' has entries of {sorted(ndims)} indices: they are not of one array")
    if min((i for index in scalars for i in index), default=1) < 1:
        raise ValueError(f"'{base}' has an index 0; Stan counts from 1")
    shape = tuple(max(index[axis] for index in scalars) for axis in range(ndims.pop()))
    for position in np.ndindex(shape):
        index = tuple(i + 1 for i in position)
        if index not in scalars:
            raise ValueError(f"'{base}' has shape {shape}, but {base}[{','.join(map(str, index))}] is missing")
    array = np.empty((*size, *shape))
    for index, draws in scalars.items():
        position = tuple(i - 1 for i in index)
        array[:, :, *position] = draws
    return array


def _chains(chains: Any, file: Path) -> xr.Dataset:
    if not (isinstance(chains, list) and chains and all(isinstance(chain, dict) for chain in chains)):
        raise ValueError(f"{file} must hold a list with one object per chain, as posteriordb's reference draws do")
    for number, chain in enumerate(chains):
        if chain.keys() != chains[0].keys():
            raise ValueError(
                f"chain {number} of {file} has other names than chain 0: {sorted(chain.keys() ^ chains[0].keys())}"
            )
        lengths = {len(draws) for draws in chain.values()} | {len(draws) for draws in chains[0].values()}
        if len(lengths) > 1:
            raise ValueError(
                f"chains 0 and {number} of {file} have draws of lengths {sorted(lengths)}; they must be equal"
            )
    return stan_dataset({name: [chain[name] for chain in chains] for name in chains[0]})
