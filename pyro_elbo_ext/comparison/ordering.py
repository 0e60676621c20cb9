"""Draws of exchangeable components, put in the order of one of their sites."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from pyro_elbo_ext.inference_data.names import site_of
from pyro_elbo_ext.programs.symmetry import Components

OrderedBy = str | tuple[str | int, ...]
HOW = "components=exchangeable_components(model, *args)"


def as_groups(components: Components | Iterable[Components] | None) -> tuple[Components, ...] | None:
    """What was given as ``components``, as a tuple; None where nothing is known of them."""
    if components is None:
        return None
    groups = (components,) if isinstance(components, Components) else tuple(components)
    for group in groups:
        if not isinstance(group, Components):
            raise TypeError(f"components must be what exchangeable_components returns, got {type(group).__name__}")
    return groups


def in_order(
    data: xr.Dataset, components: Sequence[Components], ordered_by: OrderedBy, needed: Iterable[Any], side: str
) -> tuple[xr.Dataset, tuple[Components, ...]]:
    """Draws with components in the order of a site, smallest first, in each draw by itself.

    Parameters
    ----------
    data
        Variables with the dims ``chain`` and ``draw``.
    components
        The model's.
    ordered_by
        A site with one number for each component; or one with several and the index of that which counts, along its
        other axes: ``("locs", 0)``.
    needed
        Variables that have to be right. Others that cannot be ordered are left out.
    side
        Whose draws they are, for errors.

    Returns
    -------
    xarray.Dataset
        Along the dims of the components, coordinates are 0 to K - 1.
    tuple of Components
        Those that are still in any order.

    Raises
    ------
    ValueError
        If the site is not one of exchangeable components, or has not one number for each; if a variable that is needed has
        another shape than in the model, changes with the order in an unknown way, or is no site of the model.
    """
    site, index = _asked(ordered_by)
    group = _group_of(site, components)
    variables = {site_of(name, variable): str(name) for name, variable in data.data_vars.items()}
    if site not in variables:
        raise ValueError(
            f"ordered_by: there are no draws of '{site}' in {side}, which has {', '.join(variables) or 'none'}"
        )
    order = np.argsort(_key(site, index, group, data[variables[site]], side), axis=-1, kind="stable")
    found, ranked = {}, set()
    for own, name in variables.items():
        problem = _problem(own, group)
        if problem and name in needed:
            raise ValueError(
                f"'{own}' cannot be put in the order of '{site}': it {problem}. Compute it from ordered draws, by "
                "transformed={name: function of the draws}, or leave it out by var_names."
            )
        if problem:
            continue
        variable = data[name].transpose("chain", "draw", ...)
        array = variable.values
        for axis in group.axes[own]:
            _check_axis(own, axis, variable, group, side)
            array = np.take_along_axis(array, _along(order, array.ndim, axis), axis)
            ranked.add(variable.dims[axis])
        if own in group.states:
            array = _relabelled(own, array, order, group, side)
        found[name] = variable.copy(data=array)
    # a component's label is now its place in the order
    made = xr.Dataset(found, attrs=data.attrs).assign_coords({dim: np.arange(group.size) for dim in ranked})
    return made, tuple([other for other in components if other is not group])


def sorted_entries(array: NDArray[np.generic], axes: Sequence[int]) -> NDArray[np.generic]:
    """Entries along the components' axes sorted in each draw by itself: what they have without names, same shape."""
    last = tuple(range(-len(axes), 0))
    moved = np.moveaxis(array, axes, last)
    flat = np.sort(moved.reshape(*moved.shape[: moved.ndim - len(axes)], -1), axis=-1)
    return np.moveaxis(flat.reshape(moved.shape), last, axes)


def indexed_by_components(components: Iterable[Components]) -> dict[str, tuple[int, ...]]:
    """Site to the axes of its value along which some components are, of all sites that have any or are their states."""
    found: dict[str, set[int]] = {}
    for group in components:
        for site in group.indexed:
            found.setdefault(site, set()).update(group.axes[site])
    return {site: tuple(sorted(axes)) for site, axes in found.items()}


def said(components: Iterable[Components]) -> str:
    """What is exchangeable, in a sentence's part."""
    return "; ".join(map(str, components))


def _asked(ordered_by: OrderedBy) -> tuple[str, tuple[int, ...]]:
    if isinstance(ordered_by, str):
        return ordered_by, ()
    if isinstance(ordered_by, tuple) and len(ordered_by) > 1 and isinstance(ordered_by[0], str):
        index = ordered_by[1:]
        if all(isinstance(i, int) and not isinstance(i, bool) for i in index):
            return ordered_by[0], tuple(int(i) for i in index)
    raise TypeError(f"ordered_by must be a site, or a site with an index such as ('locs', 0), got {ordered_by!r}")


def _group_of(site: str, components: Sequence[Components]) -> Components:
    found = [group for group in components if group.axes.get(site)]
    if not found:
        able = [name for group in components for name, axes in group.axes.items() if len(axes) == 1]
        raise ValueError(
            f"ordered_by names '{site}', which no exchangeable components index. "
            + (
                f"There are {', '.join(able)}."
                if able
                else "The model has none: it is not the same in any other order."
            )
        )
    if len(found) > 1:
        raise ValueError(
            f"ordered_by names '{site}', which two sets of components index: {said(found)}. Order by a site of one set."
        )
    if len(found[0].axes[site]) > 1:
        able = [name for name, axes in found[0].axes.items() if len(axes) == 1]
        raise ValueError(
            f"ordered_by names '{site}', which the components index along {len(found[0].axes[site])} axes: it has not one "
            f"number for each. Order by one of {', '.join(able) or 'a deterministic site made for it'}."
        )
    return found[0]


def _key(
    site: str, index: tuple[int, ...], group: Components, variable: xr.DataArray, side: str
) -> NDArray[np.generic]:
    """The numbers that are sorted, shape (chain, draw, K)."""
    (axis,) = group.axes[site]
    variable = variable.transpose("chain", "draw", ...)
    _check_axis(site, axis, variable, group, side)
    array = np.moveaxis(variable.values, axis, 2)
    rest = array.shape[3:]
    if len(index) != len(rest):
        raise ValueError(
            f"ordered_by: '{site}' has {rest or 'one number'} for each component, {'an entry' if rest else 'no index'} of "
            f"which is to be named: {(site, *[0] * len(rest)) if rest else repr(site)}"
        )
    for place, (i, size) in enumerate(zip(index, rest, strict=True)):
        if not -size <= i < size:
            raise ValueError(f"ordered_by: index {i} at place {place} of '{site}' is outside its {size} entries")
    where: Any = (..., *index)
    return np.asarray(array[where])


def _problem(site: str, group: Components) -> str:
    if site in group.unclear:
        return "changes with the order, but not by its axes or states"
    return "" if site in group.axes else "is no site of the model"


def _check_axis(site: str, axis: int, variable: xr.DataArray, group: Components, side: str) -> None:
    shape = variable.shape[2:]
    if len(shape) < -axis or shape[axis] != group.size:
        raise ValueError(
            f"'{site}' has shape {shape} in {side}; in the model its axis {axis} has the {group.size} components"
        )


def _along(order: NDArray[np.intp], ndim: int, axis: int) -> NDArray[np.intp]:
    """The order, shape (chain, draw, K), as an index of an array of ``ndim`` dims."""
    shape = [*order.shape[:2], *[1] * (ndim - 2)]
    shape[axis] = order.shape[2]
    return order.reshape(shape)


def _relabelled(
    site: str, array: NDArray[np.generic], order: NDArray[np.intp], group: Components, side: str
) -> NDArray[np.generic]:
    """States, numbers of components, as their numbers in the order."""
    states = array.astype(np.intp)
    if not (states == array).all() or states.min(initial=0) < 0 or states.max(initial=0) >= group.size:
        raise ValueError(f"'{site}' has states in {side} that are not 0 to {group.size - 1}, the model's")
    ranks = np.argsort(order, axis=-1)
    flat = states.reshape(*states.shape[:2], -1)
    return np.asarray(np.take_along_axis(ranks, flat, -1).reshape(array.shape).astype(array.dtype))
