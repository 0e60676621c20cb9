"""Weights of ``kl_prior`` by site in one evaluation, and free bits: a floor under what they weigh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_elbo_ext.bounds.weighting import FreeBits, KLWeight
from pyro_elbo_ext.history.record import VALUES, SiteInfo
from pyro_elbo_ext.terms.terms import Site

Number = float | Tensor
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class SiteWeights:
    """The weight of each site's ``kl_prior``: numbers, or tensors where they depend on values or a graph is being traced.

    Attributes
    ----------
    others : float or Tensor
        Weight of the sites that are not ``named``.
    named : mapping from site to float or Tensor
    free_bits : float, mapping from site to float, or None
        Nats for each element of a site that its ``kl_prior`` counts as at least.
    is_one : bool
        Whether the objective is the ELBO, unweighted, and stays so in a graph that is being traced.
    """

    others: Number = 1.0
    named: Mapping[str, Number] = field(default_factory=dict)
    free_bits: FreeBits | None = None
    is_one: bool = True

    def of(self, site: str) -> Number:
        return self.named.get(site, self.others)

    @property
    def is_uniform(self) -> bool:
        """Whether the objective is ``reconstruction - weight * kl_prior``."""
        return not self.named and self.free_bits is None

    def penalty(self, kl_priors: Mapping[str, Number], counts: Mapping[str, Number]) -> tuple[Number, SiteWeights]:
        """What the objective takes off the reconstruction, and the weights that its gradient has.

        Parameters
        ----------
        kl_priors, counts
            By site, averaged over particles: ``kl_prior`` in nats in total, and the number of elements it is summed over,
            0 where free bits do not apply.

        Returns
        -------
        penalty : float or Tensor
            ``sum w max(kl_prior, free_bits * count)``.
        weights : SiteWeights
            With weight 0 where the floor is the greater.
        """
        total: Number = 0.0
        weights: dict[str, Number] = {}
        for site, kl in kl_priors.items():
            weight, nats = self.of(site), self.free_bits
            if isinstance(nats, Mapping):
                nats = nats.get(site)
            count = counts[site]
            if nats is None or (not isinstance(count, Tensor) and count == 0):
                weights[site], floored = weight, kl
            else:
                floor = nats * count
                weights[site], floored = weight * (kl > floor), _greater(kl, floor)
            total = total + weight * floored
        return total, SiteWeights(self.others, weights)


def _greater(kl: Number, floor: Number) -> Number:
    if not isinstance(kl, Tensor):
        return torch.maximum(floor.new_tensor(kl), floor) if isinstance(floor, Tensor) else max(kl, floor)
    floor = torch.as_tensor(floor, dtype=kl.dtype, device=kl.device)
    # what is not finite must not hide in the floor
    return torch.where(torch.isfinite(kl), torch.maximum(kl, floor), kl)


def check_sites(kl_weight: KLWeight, free_bits: FreeBits | None, sites: Sequence[Site]) -> None:
    """Raise ValueError if weights or free bits name a site without ``kl_prior``, or part what is known only together."""
    kinds = {site.name: site.kind for site in sites}
    points = [site.name for site in sites if site.is_point]
    weights = kl_weight if isinstance(kl_weight, Mapping) else {}
    floors = free_bits if isinstance(free_bits, Mapping) else {}
    for argument, named, known in (
        ("kl_weight", weights, [name for name, kind in kinds.items() if kind != "observed"]),
        ("free_bits", floors, [site.name for site in sites if site.kind == "latent" and not site.is_point]),
    ):
        for name in named:
            if name not in known:
                kind = kinds.get(name)
                what = "which the model and guide do not have" if kind is None else f"which is {kind}"
                if name in points:
                    what = "which is a Delta in the guide: its kl_prior is infinite but for a constant, above any floor"
                raise ValueError(
                    f"{argument} names site '{name}', {what}. No parameter has been changed. Sites that it can name: "
                    f"{', '.join(map(repr, known)) or 'none'}."
                )
    auxiliary = [site.name for site in sites if site.kind == "auxiliary"]
    # a Delta has no log q of its own where an auxiliary draw, such as an autoguide's vector, holds that of several sites
    if not auxiliary or not points:
        return
    given = [weights.get(name, 1.0) for name in (*points, *auxiliary)]
    if any(weight != given[0] for weight in given) or (free_bits is not None and not floors):
        raise ValueError(
            f"the log q of {', '.join(map(repr, points))} is that of the guide's {', '.join(map(repr, auxiliary))}: their "
            "kl_prior is known only together, so that neither weights by site nor free bits exist for them. No parameter "
            "has been changed. Use one kl_weight for all sites; with a Gaussian autoguide kl='auto' and "
            "gradient='pathwise', which know each site's share; or a guide that draws each site by itself."
        )


def recorded(
    sites: Sequence[SiteInfo], rows: Floats, objective: Floats, given: Floats, names: Sequence[str], *, has_floor: bool
) -> tuple[Floats, Floats]:
    """What the history takes of steps whose weights differ by site.

    Parameters
    ----------
    sites
        What the rows are.
    rows : (n, sites, 6) array
        Their values.
    objective : (n,) array
    given : (n,) or (n, names) array
        Each step's weight, or those of the sites with these names; others have weight 1.
    has_floor
        Whether there are free bits.

    Returns
    -------
    rows : (n, sites, 7) array
        With the site's weight, NaN for observed sites.
    kl_weight : (n,) array
        ``(reconstruction - objective) / kl_prior``; NaN where ``kl_prior`` is 0 and the weights differ.
    """
    observed = np.array([site.kind == "observed" for site in sites], bool)
    weights = np.ones(rows.shape[:2]) if names else np.repeat(given[:, None], len(sites), 1)
    place = {site.site: i for i, site in enumerate(sites)}
    for j, name in enumerate(names):
        weights[:, place[name]] = given[:, j]
    weights[:, observed] = np.nan
    kl_prior = rows[:, ~observed, VALUES.index("kl_prior")].sum(1)
    paid = rows[:, observed, VALUES.index("log_p")].sum(1) - objective
    effective = np.divide(paid, kl_prior, out=np.full(len(rows), np.nan), where=kl_prior != 0)
    if not has_floor and not observed.all():
        latent = weights[:, ~observed]
        effective = np.where((latent == latent[:, :1]).all(1), latent[:, 0], effective)
    return np.concatenate([rows, weights[:, :, None]], 2), effective
