"""Pyro runs as ArviZ data.  The only importer of ArviZ."""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Mapping
from typing import Any

import xarray as xr


def to_arviz(groups: Mapping[str, xr.Dataset], attrs: Mapping[str, Any] | None = None) -> Any:
    """Groups of labelled arrays as the data structure of the installed ArviZ.

    Parameters
    ----------
    groups
        Name of the group, such as ``"posterior"``, to its arrays. ArviZ wants dims ``(chain, draw, ...)`` in the groups
        of samples. The datasets are not copied or changed.
    attrs
        Attributes of the whole; time and library are added to it unless it has them.

    Returns
    -------
    arviz.InferenceData or xarray.DataTree
        The former with ArviZ 0.x, the latter with ArviZ 1.x. Both have ``data["posterior"]["site"]``,
        ``data.to_netcdf(path)`` and are taken by all functions of that ArviZ; :func:`dataset_of` reads either.

    Raises
    ------
    TypeError
        If a group is not an ``xarray.Dataset``.
    """
    for name, group in groups.items():
        if not isinstance(group, xr.Dataset):
            raise TypeError(f"group '{name}' must be an xarray.Dataset, got {type(group).__name__}")
    import arviz  # takes seconds, so not before it is needed

    tree = xr.DataTree.from_dict(dict(groups))
    tree.attrs = {**_attributes(), **(attrs or {})}
    return arviz.from_datatree(tree) if hasattr(arviz, "from_datatree") else tree


def dataset_of(data: Any, group: str = "posterior") -> xr.Dataset:
    """One group of ArviZ data of either generation.

    Parameters
    ----------
    data
        ``arviz.InferenceData``, ``xarray.DataTree``, or an ``xarray.Dataset``, which is returned as it is.
    group
        Name of the group.

    Raises
    ------
    KeyError
        If there is no such group.
    TypeError
        If ``data`` is none of these.
    """
    if isinstance(data, xr.Dataset):
        return data
    if isinstance(data, xr.DataTree):
        names = list(data.children)
    elif callable(getattr(data, "groups", None)):  # InferenceData, also of an ArviZ that is not the installed one
        names = list(data.groups())
    else:
        raise TypeError(f"data must be InferenceData, DataTree or xarray.Dataset, got {type(data).__name__}")
    if group not in names:
        raise KeyError(f"there is no group '{group}' in the data; it has {', '.join(names) or 'none'}")
    found = data[group]
    return found.to_dataset() if isinstance(found, xr.DataTree) else found


def _attributes() -> dict[str, Any]:
    return {
        "created_at": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        "creation_library": "pyro_elbo_ext",
        "inference_library": "pyro",
        "inference_library_version": importlib.metadata.version("pyro-ppl"),
    }
