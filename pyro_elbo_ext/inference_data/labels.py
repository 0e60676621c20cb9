"""Names for a site's array and its axes: dims from the plates, coordinates from the caller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from pyro.poutine.util import site_is_subsample

from pyro_elbo_ext.inference_data.names import SAMPLE_DIMS, SITE, variables_of, written
from pyro_elbo_ext.programs.arguments import check_mapping
from pyro_elbo_ext.programs.nodes import Node


class Labels:
    """Dims and coordinates that all groups of one export share.

    A plate's axis has the plate's name, any other axis ``{variable}_dim_{axis}``, as ArviZ names it. A plate called as a
    site, or ``chain`` or ``draw``, becomes ``{plate}_dim``. What files cannot hold is renamed, see
    `pyro_elbo_ext.inference_data.names`.

    Parameters
    ----------
    coords
        Dim to the labels along it; 0, 1, ... for dims that are not named here.
    dims
        Site, or constant, to the names of its value's axes, batch before event; None keeps an axis' own name.
    nodes
        Every site of the model, by name; further names come as they are met.
    """

    def __init__(
        self,
        coords: Mapping[str, Any] | None = None,
        dims: Mapping[str, Sequence[str | None]] | None = None,
        nodes: Mapping[str, Any] | None = None,
    ) -> None:
        for what, given in (("coords", coords), ("dims", dims)):
            if given is not None:
                check_mapping(what, given)
        self.coords = dict(coords or {})
        self.dims = dict(dims or {})
        self._sizes: dict[str, tuple[int, str]] = {}  # dim -> its size, and the site that set it
        self._labelled: set[str] = set()
        sampled = [(name, node) for name, node in (nodes or {}).items() if node["type"] == "sample"]
        self._variables = variables_of([name for name, node in sampled if not site_is_subsample(node)])
        frames = [frame.name for _, node in sampled for frame in node["cond_indep_stack"]]
        self._plates = variables_of(frames, ())
        for name, chosen in self.dims.items():
            if isinstance(chosen, str) or any(not isinstance(dim, str | None) for dim in chosen):
                raise TypeError(f"dims['{name}'] must be a list of names or None, one per axis, got {chosen!r}")

    def variable(self, name: str) -> str:
        """The name of a site's, or a constant's, variable."""
        if name not in self._variables:
            self._variables |= variables_of([name], {*SAMPLE_DIMS, *self._variables.values()})
        return self._variables[name]

    def check(self, nodes: Mapping[str, Any]) -> None:
        """Raise what :meth:`of` would for these sites' values, before anything is drawn."""
        for name, node in nodes.items():
            if node["type"] == "sample" and not site_is_subsample(node):
                self.of(name, tuple(node["value"].shape), node)

    def _dim(self, name: str) -> str:
        """A dim's name that no variable has."""
        (name,) = variables_of([name], ()).values()
        while name in SAMPLE_DIMS or name in self._variables.values():
            name += "_dim"
        return name

    def of(self, name: str, shape: tuple[int, ...], node: Node | None, *, batch_only: bool = False) -> list[str]:
        """Dims of an array of ``shape``, the value of a site or, with ``batch_only``, its log density.

        Raises
        ------
        ValueError
            If ``dims`` has another number of names for it, or if a dim would have two sizes.
        """
        own = [f"{self.variable(name)}_dim_{axis}" for axis in range(len(shape))]
        if node is not None:
            event_dim = 0 if batch_only else _event_dim(node)
            for frame in node["cond_indep_stack"]:
                axis = len(shape) - event_dim + frame.dim if frame.vectorized else -1
                if axis >= 0 and shape[axis] == frame.size:
                    own[axis] = self._dim(self._plates.get(frame.name, frame.name))
        if name in self.dims:
            chosen = list(self.dims[name])
            if batch_only and node is not None:
                chosen = chosen[: len(chosen) - _event_dim(node)]
            if len(chosen) != len(shape):
                what = "log likelihood" if batch_only else "value"
                raise ValueError(
                    f"dims['{name}'] names {len(chosen)} axes {chosen}, but the {what} of '{name}' has shape {shape}. "
                    "Give one name per axis, None to keep the axis' own."
                )
            own = [
                default if dim is None else dim if dim in SAMPLE_DIMS else self._dim(dim)
                for dim, default in zip(chosen, own, strict=True)
            ]
        self._labelled.add(name)
        for axis, (dim, size) in enumerate(zip(own, shape, strict=True)):
            if dim in own[:axis] or dim in SAMPLE_DIMS:
                raise ValueError(f"axis {axis} of '{name}' cannot be named '{dim}': another axis of it has that name")
            known, other = self._sizes.setdefault(dim, (size, name))
            if known != size:
                raise ValueError(
                    f"dim '{dim}' has size {known} at '{other}' and {size} at '{name}': two plates of one name, or "
                    f"dims, that disagree. Rename one of the plates, or name the axes of one site: dims={{'{name}': [...]}}."
                )
        return own

    def labels(self, dim: str, size: int) -> NDArray[Any]:
        """Labels along a dim, shape ``(size,)``."""
        if dim not in self.coords:
            return np.arange(size)
        values = np.asarray(self.coords[dim])
        if values.shape != (size,):
            raise ValueError(f"coords['{dim}'] has shape {values.shape}, but dim '{dim}' has size {size}")
        return values

    def dataset(
        self,
        arrays: Mapping[str, NDArray[Any]],
        nodes: Mapping[str, Any],
        samples: Sequence[str] = SAMPLE_DIMS,
        attrs: Mapping[str, Any] | None = None,
    ) -> xr.Dataset:
        """Values of sites, shape ``(*samples, *batch, *event)``, as a Dataset."""
        variables: dict[str, Any] = {}
        coords: dict[str, Any] = {}
        for name, array in arrays.items():
            dims = self.of(name, array.shape[len(samples) :], nodes.get(name))
            coords.update({dim: np.arange(size) for dim, size in zip(samples, array.shape, strict=False)})
            shape = array.shape[len(samples) :]
            coords.update({dim: self.labels(dim, size) for dim, size in zip(dims, shape, strict=True)})
            variables[self.variable(name)] = ([*samples, *dims], array, self._attrs(name))
        return xr.Dataset(variables, coords, dict(attrs or {}))

    def pointwise(
        self,
        arrays: Mapping[str, NDArray[Any]],
        counts: Mapping[str, NDArray[np.bool_]],
        nodes: Mapping[str, Any],
        attrs: Mapping[str, Any] | None = None,
    ) -> xr.Dataset:
        """Log likelihoods, shape ``(chain, draw, *batch)``, of the observations that count, as a Dataset.

        Where ``counts``, shape ``batch``, leaves some out, the others are in one dim ``{site}_unmasked``, with their
        flat positions in the batch as its labels and coordinates ``{site}_{dim}`` for the labels along each dim.
        """
        variables: dict[str, Any] = {}
        coords: dict[str, Any] = {}
        for name, array in arrays.items():
            shape, count = array.shape[2:], counts[name]
            dims = self.of(name, shape, nodes[name], batch_only=True)
            labels = {dim: self.labels(dim, size) for dim, size in zip(dims, shape, strict=True)}
            key = self.variable(name)
            if not count.any():
                continue
            coords.update({dim: np.arange(size) for dim, size in zip(SAMPLE_DIMS, array.shape, strict=False)})
            if count.all():
                coords.update(labels)
                variables[key] = ([*SAMPLE_DIMS, *dims], array, self._attrs(name))
                continue
            unmasked = self._dim(f"{key}_unmasked")
            coords[unmasked] = np.flatnonzero(count)
            for dim, index in zip(dims, np.nonzero(count), strict=True):
                coords[self._dim(f"{key}_{dim}")] = (unmasked, labels[dim][index])
            variables[key] = ([*SAMPLE_DIMS, unmasked], array[:, :, count], self._attrs(name))
        return xr.Dataset(variables, coords, dict(attrs or {}))

    def _attrs(self, name: str) -> dict[str, str]:
        if self.variable(name) == name:
            return {}
        return {SITE: written(name)}

    def check_used(self) -> None:
        """Raise a ValueError if the caller named a site or dim that is not there."""
        for what, named, there in (
            ("dims", self.dims, sorted(self._labelled)),
            ("coords", self.coords, sorted(self._sizes)),
        ):
            for name in named:
                if name not in there:
                    kind = "no such site" if what == "dims" else "no dim of that name"
                    raise ValueError(
                        f"{what} names '{name}', but there is {kind}; there are {', '.join(there) or 'none'}"
                    )


def scalar_label(name: str, array: xr.DataArray, index: tuple[int, ...]) -> str:
    """Name of one scalar of a variable, as ``theta[Alpha, 2]``; ``index`` is along its last dims."""
    dims = array.dims[array.ndim - len(index) :]
    labels = [
        str(array.coords[dim].values[i]) if dim in array.coords else str(i) for dim, i in zip(dims, index, strict=True)
    ]
    return f"{name}[{', '.join(labels)}]" if labels else name


def _event_dim(node: Node) -> int:
    event_dim = int(node["fn"].event_dim)
    if node["infer"].get("_deterministic") and event_dim == node["value"].dim():
        return 0  # pyro.deterministic counts all dims as event dims unless told otherwise
    return event_dim
