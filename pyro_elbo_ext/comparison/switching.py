"""Draws whose components may have traded places: what is said of them in place of a verdict on the fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from pyro_elbo_ext.comparison.ordering import indexed_by_components, said, sorted_entries
from pyro_elbo_ext.inference_data.labels import scalar_label
from pyro_elbo_ext.inference_data.names import site_of
from pyro_elbo_ext.programs.symmetry import Components

EXCHANGEABLE = "exchangeable"
MOST_ENTRIES = 200  # of a variable whose draws are looked at for components without being told of any

Row = Callable[[np.ndarray, np.ndarray], dict[str, Any]]
Rows = dict[str, dict[str, Any]]
Pairs = Mapping[str, tuple[xr.DataArray, xr.DataArray]]


def of_exchangeable(pairs: Pairs, rows: Rows, states: Rows, components: Sequence[Components], row: Row) -> str:
    """Take back the verdicts that the order of components alone may have made, and say so.

    That is where a scalar of a site with components is not good, and its numbers without names, all components' entries
    sorted in each draw, are not bad.

    Returns
    -------
    str
        A sentence; empty where every verdict stands.
    """
    changed = False
    for name, axes in indexed_by_components(components).items():
        for variable in [key for key, (_, b) in pairs.items() if site_of(key, b) == name]:
            labels = _labels(variable, pairs[variable][1])
            for label in labels.values():
                if label in states and states[label]["verdict"] != "good":
                    states[label]["verdict"], changed = EXCHANGEABLE, True
            if axes and any(label in rows and rows[label]["verdict"] != "good" for label in labels.values()):
                of_sorted = _sorted_rows(
                    pairs[variable], axes, [i for i, label in labels.items() if label in rows], row
                )
                for index, verdict in of_sorted.items():
                    if rows[labels[index]]["verdict"] != "good" and verdict != "bad":
                        rows[labels[index]]["verdict"], changed = EXCHANGEABLE, True
    if not changed:
        return ""
    return (
        f"Exchangeable, the model being the same in any order of them: {said(components)}. Which is which may differ between"
        " the sides, which is no fault of the fit: name a site to order them by, as ordered_by='locs'"
    )


def of_suspects(pairs: Pairs, rows: Rows, row: Row) -> str:
    """A sentence on variables that differ, but not in their sorted entries; empty where there are none."""
    found = []
    for variable, (a, b) in pairs.items():
        labels = _labels(variable, b)
        if len(labels) > MOST_ENTRIES or not any(
            rows.get(label, {}).get("verdict") == "bad" for label in labels.values()
        ):
            continue
        known = [index for index, label in labels.items() if label in rows]
        for axis in range(2 - b.ndim, 0):
            if b.shape[axis] > 1 and not {"bad", "rough"} & set(_sorted_rows((a, b), (axis,), known, row).values()):
                found.append(f"{variable} along '{b.dims[axis]}'")
                break
    if not found:
        return ""
    return (
        f"Bad entry by entry, but not when the entries are sorted: {', '.join(found)}. If these are components that can "
        "trade places (label switching), pass components=exchangeable_components(model, *args), and ordered_by"
    )


def _labels(name: str, variable: xr.DataArray) -> dict[tuple[int, ...], str]:
    return {index: scalar_label(name, variable, index) for index in np.ndindex(variable.shape[2:])}


def _sorted_rows(
    pair: tuple[xr.DataArray, xr.DataArray], axes: tuple[int, ...], known: Sequence[tuple[int, ...]], row: Row
) -> dict[tuple[int, ...], str]:
    """Verdict on each entry, of sorted ones."""
    a, b = (sorted_entries(side.values.astype(np.float64), axes) for side in pair)
    every = (slice(None), slice(None))
    return {index: str(row(a[every + index], b[every + index])["verdict"]) for index in known}
