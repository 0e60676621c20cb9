"""Exchangeable components in a diagnosis: put in an order, or not held against the fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from torch import Tensor

from pyro_elbo_ext.comparison import Components, exchangeable_components
from pyro_elbo_ext.comparison.ordering import OrderedBy, in_order, indexed_by_components, said, sorted_entries
from pyro_elbo_ext.diagnosis.findings import NOT_KNOWN, Finding
from pyro_elbo_ext.diagnosis.many_chains import split_rhat
from pyro_elbo_ext.diagnosis.posterior_draws import PosteriorDraws
from pyro_elbo_ext.inference_data.draws import to_numpy

Values = dict[str, Any]  # site to draws


class Labelling(NamedTuple):
    """What the model's components are, and the site that orders them.

    Attributes
    ----------
    found : tuple of Components
        All that are exchangeable.
    loose : dict
        Site to the axes of those that nothing orders.
    fault : str
        Why it is not known which there are; empty where it is.
    """

    found: tuple[Components, ...]
    loose: dict[str, tuple[int, ...]]
    ordered_by: OrderedBy | None
    fault: str = ""

    def ordered(self, draws: xr.Dataset, side: str) -> xr.Dataset:
        """Draws in the order that was asked for, without what cannot be put in it."""
        return draws if self.ordered_by is None else in_order(draws, self.found, self.ordered_by, (), side)[0]

    def ordered_values(self, values: Mapping[str, Any], leading: int, side: str) -> Values:
        """The same of tensors or arrays whose first ``leading`` dims are of the draws."""
        if self.ordered_by is None:
            return dict(values)
        found = self.ordered(_dataset(values, leading), side)
        return {site: found[site].values[0] if leading == 1 else found[site].values for site in values if site in found}

    def sorted_values(self, values: Mapping[str, Any]) -> Values:
        """Values of the sites with loose components, sorted, which takes their names away."""
        return {
            site: sorted_entries(_array(value), self.loose[site])
            for site, value in values.items()
            if self.loose.get(site)
        }

    def taken_back(self, scalars: pd.DataFrame, of_sorted: Callable[[], pd.DataFrame]) -> int:
        """Make "not known" what may be off by the order of components alone, and say how many scalars these are.

        Parameters
        ----------
        scalars
            The table of figures, which is changed.
        of_sorted
            The same table of sorted entries, made where it is needed.
        """
        off = scalars["site"].isin(list(self.loose)) & (scalars["verdict"] != "good")
        if not off.any():
            return 0
        if any(self.loose.values()):
            off &= of_sorted()["verdict"].reindex(scalars.index) != "do not use"
        scalars.loc[off, "verdict"] = NOT_KNOWN
        return int(off.sum())

    def agreed(self, drawn: PosteriorDraws) -> PosteriorDraws:
        """Draws of chains in the order that was asked for, and whether they agree when the order does not count."""
        if not self.found:
            return drawn
        drawn = drawn._replace(values=self.ordered_values(drawn.values, 2, "the chains"))
        if drawn.converged:
            return drawn
        worst, which = 0.0, ""
        for site, array in (drawn.values | self.sorted_values(drawn.values)).items():
            rhat = split_rhat(array.reshape(*array.shape[:2], -1).astype(np.float64))
            if np.nanmax(rhat, initial=0.0) > worst:
                worst, which = float(np.nanmax(rhat)), site
        return drawn._replace(rhat=worst, worst=which)

    def findings(self, taken_back: int) -> list[Finding]:
        """What is said of it."""
        if self.fault:
            return [Finding("", "good", f"Whether components of the model can trade places is not known: {self.fault}")]
        if not self.found:
            return []
        gap = sum(math.lgamma(group.size + 1) for group in self.found)
        modes = (
            f"The model is the same in any order of its {said(self.found)}. Each mode of the posterior is there in as many "
            "places; where guide and draws are in one of these alone, KL(q || posterior) and log p(x) are larger than their "
            f"bounds say, by up to {gap:.2f} nats, which is no fault of the fit."
        )
        if not self.loose:
            return [Finding("", "good", f"{modes} They are judged in the order of {_shown(self.ordered_by)}.")]
        able = [site for group in self.found for site, axes in group.axes.items() if len(axes) == 1]
        remedy = f"Name a site that tells the components apart: ordered_by={able[0]!r}." if able else ""
        if not taken_back:
            return [Finding("", "good", modes, remedy)]
        return [
            Finding(
                "",
                "means only",
                f"{taken_back} of their scalars are not judged, since which component is which may differ between guide and "
                f"posterior. {modes}",
                remedy,
            )
        ]


def labelling_of(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    points: Mapping[str, Tensor],
    judged: Mapping[str, Any],
    ordered_by: OrderedBy | None,
) -> Labelling:
    """Components of the model.

    Parameters
    ----------
    points
        Draws of the guide at which they are looked for, latent sites with a first dim of draws.
    judged
        Draws that are to be put in order, the same and deterministic sites.

    Raises
    ------
    ValueError
        For an ``ordered_by`` that is not a site of exchangeable components.
    """
    try:
        found = exchangeable_components(partial(model, *args, **kwargs), values=points)
    except (ValueError, RuntimeError) as error:  # a program that runs only under enumeration
        if ordered_by is not None:
            raise
        return Labelling((), {}, None, str(error))
    loose = found
    if ordered_by is not None:
        few = {site: value[:1] for site, value in judged.items()}
        loose = in_order(_dataset(few, 1), found, ordered_by, (), "the guide")[1]
    return Labelling(found, indexed_by_components(loose), ordered_by)


def _dataset(values: Mapping[str, Any], leading: int) -> xr.Dataset:
    """Draws, whose first ``leading`` dims are of chain and draw, or of the draw alone."""
    arrays = {site: _array(value) for site, value in values.items()}
    arrays = {site: array if leading == 2 else array[None] for site, array in arrays.items()}
    return xr.Dataset(
        {
            site: (["chain", "draw", *(f"{site}_{i}" for i in range(array.ndim - 2))], array)
            for site, array in arrays.items()
        }
    )


def _shown(ordered_by: OrderedBy | None) -> str:
    return f"'{ordered_by}'" if isinstance(ordered_by, str) else str(ordered_by)


def _array(value: Any) -> Any:
    return to_numpy(value) if isinstance(value, Tensor) else np.asarray(value)
