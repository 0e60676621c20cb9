"""The part of an objective that weighs ``kl_prior``: one weight or one for each site, free bits, and their record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pyro_elbo_ext.bounds import Geco
from pyro_elbo_ext.bounds.site_weights import SiteWeights, check_sites, recorded
from pyro_elbo_ext.bounds.weighting import FreeBits, KLWeight, check_free_bits, check_kl_weight, checked_weight
from pyro_elbo_ext.history.history import VALUES, SiteInfo
from pyro_elbo_ext.objectives.evaluation import Floats, Weight
from pyro_elbo_ext.objectives.objective import Objective
from pyro_elbo_ext.terms.terms import Site


class WeightedObjective(Objective):
    """Base of objectives of the form reconstruction less weighted ``kl_prior``.

    Takes what :class:`~pyro_elbo_ext.objectives.objective.Objective` takes, and ``kl_weight`` and ``free_bits``, which
    :class:`~pyro_elbo_ext.DecomposedELBO` describes.
    """

    def __init__(self, *args: Any, kl_weight: KLWeight, free_bits: FreeBits | None, **options: Any) -> None:
        super().__init__(*args, **options)
        self._free_bits: FreeBits | None = None
        self.kl_weight = kl_weight
        self.free_bits = free_bits

    @property
    def kl_weight(self) -> KLWeight:
        """Weight of ``kl_prior``, as given; it may be set between steps."""
        return self._kl_weight

    @kl_weight.setter
    def kl_weight(self, kl_weight: KLWeight) -> None:
        check_kl_weight(kl_weight)
        self._kl_weight: KLWeight
        if isinstance(kl_weight, Mapping):
            self._kl_weight = dict(kl_weight)
        else:
            self._kl_weight = kl_weight if callable(kl_weight) else float(kl_weight)
        self._describe_weights()

    @property
    def free_bits(self) -> FreeBits | None:
        """Free bits, as given; they may be set between steps."""
        return self._free_bits

    @free_bits.setter
    def free_bits(self, free_bits: FreeBits | None) -> None:
        check_free_bits(free_bits)
        self._free_bits = dict(free_bits) if isinstance(free_bits, Mapping) else free_bits
        self._describe_weights()

    def _describe_weights(self) -> None:
        weight, bits = self._kl_weight, self._free_bits
        self.weighted_sites = tuple(weight) if isinstance(weight, Mapping) else ()
        self._weighs_by_site = bool(self.weighted_sites) or bits is not None
        self._is_one = not self._weighs_by_site and isinstance(weight, float) and weight == 1.0
        self.weighting = self.weighted_sites, tuple(bits.items()) if isinstance(bits, Mapping) else bits, self._is_one
        self._geco = weight if isinstance(weight, Geco) else None

    def kl_weight_at(self, step: int) -> Weight:
        """The weight of ``kl_prior`` at a step (0, 1, ...); of a mapping, those of its sites in order."""
        if isinstance(self._kl_weight, Mapping):
            return [
                checked_weight(weight(step), f"kl_weight['{site}']({step})") if callable(weight) else float(weight)
                for site, weight in self._kl_weight.items()
            ]
        if callable(self._kl_weight):
            return checked_weight(self._kl_weight(step), f"kl_weight({step})")
        return float(self._kl_weight)

    def _site_weights(self) -> tuple[SiteWeights, Weight]:
        """The weights of an evaluation, by site and as they were given."""
        given: Any = self.kl_weight_at(self.num_steps) if self._traced is None else self._traced.kl_weight
        if self.weighted_sites:
            named = dict(zip(self.weighted_sites, given, strict=True))
            return SiteWeights(1.0, named, self._free_bits, is_one=False), given
        return SiteWeights(given, {}, self._free_bits, self._is_one), given

    def _check_sites(self, sites: list[Site]) -> None:
        if self._weighs_by_site:
            check_sites(self._kl_weight, self._free_bits, sites)

    def _recorded(
        self, sites: tuple[SiteInfo, ...], rows: Floats, objective: Floats, kl_weights: list[Weight]
    ) -> tuple[Floats, Floats]:
        given = np.array(kl_weights)
        if not self._weighs_by_site:
            return rows, given
        return recorded(sites, rows, objective, given, self.weighted_sites, has_floor=self._free_bits is not None)

    def _follow(self, sites: tuple[SiteInfo, ...], values: Floats) -> None:
        if self._geco is not None:
            observed = [site.kind == "observed" for site in sites]
            of = values[observed].sum(0).tolist()
            self._geco.update(of[VALUES.index("log_p")], of[VALUES.index("num_observations")])
