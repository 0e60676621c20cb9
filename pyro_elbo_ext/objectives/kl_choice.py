"""The part of an objective that decides how each ``kl_prior`` is computed: analytic or sampled."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple, get_args

from pyro.poutine import Trace

from pyro_elbo_ext.bounds import Pathwise, bounds
from pyro_elbo_ext.history.history import SiteInfo
from pyro_elbo_ext.objectives.evaluation import MAX_STRUCTURES, Args, Kwargs, Pair, Signature
from pyro_elbo_ext.objectives.weighted import WeightedObjective
from pyro_elbo_ext.particles.batched_draws import call_key
from pyro_elbo_ext.particles.estimate import Ledger, Particle
from pyro_elbo_ext.terms.dependencies import DependencyTracker
from pyro_elbo_ext.terms.kl import KLChoice, KLPrior, Structure, kl_prior
from pyro_elbo_ext.terms.terms import Site, outline

logger = logging.getLogger(__name__)

_SAMPLED = KLPrior("sampled", "kl='sampled'")


class Evaluated(NamedTuple):
    """The particles of one evaluation: how each one's terms are computed, their traces, and their sums in the ledger."""

    ledger: Ledger
    signature: Signature
    particles: list[Particle]
    infos: list[tuple[SiteInfo, ...]]
    traces: list[tuple[Trace, Trace]]


class KLObjective(WeightedObjective):
    """Base of objectives that are the sum of their terms.

    Takes what :class:`~pyro_elbo_ext.objectives.weighted.WeightedObjective` takes, and ``kl``, which
    :class:`~pyro_elbo_ext.DecomposedELBO` describes.
    """

    def __init__(self, *args: Any, kl: KLChoice, **options: Any) -> None:
        super().__init__(*args, **options)
        if kl not in get_args(KLChoice):
            raise ValueError(f"kl must be one of {get_args(KLChoice)}, not {kl!r}")
        self.estimator.check(bounds.ELBO(), self.num_particles)
        if kl == "analytic" and not self._by_terms:
            raise ValueError(
                f"kl='analytic' leaves no log q for gradient='{self.gradient}' to work on. Use kl='sampled', or "
                "gradient='pathwise'."
            )
        self.kl = kl

    @property
    def _by_terms(self) -> bool:
        """Whether the gradient is taken term by term; the other estimators work on the log weights as a whole."""
        return type(self.estimator) is Pathwise

    @property
    def _tracks_dependencies(self) -> bool:  # type: ignore[override]
        return self._by_terms and self.kl != "sampled"

    def _is_tracked(self, pair: Pair, args: Args, kwargs: Kwargs) -> bool:
        """Whether the next run is to find out the dependencies of its sites."""
        if not self._tracks_dependencies:
            return False
        if not self._weighs_by_site:
            return pair.track_next
        # new sites may be sampled once and tracked in the next run, but then an autoguide's are not known apart
        key = call_key(args, kwargs)
        is_new = key not in pair.tracked
        if len(pair.tracked) >= MAX_STRUCTURES:
            pair.tracked.clear()
        pair.tracked.add(key)
        return is_new or pair.track_next

    def _kl_prior(self, site: Site, structure: Structure) -> KLPrior:
        return _SAMPLED if self.kl == "sampled" else kl_prior(site, structure)

    def _describe(
        self, pair: Pair, signature: Signature, sites: list[Site], kls: list[KLPrior | None]
    ) -> tuple[SiteInfo, ...]:
        """How each site's term is computed; the same object as at the last step if nothing has changed."""
        known = pair.infos.get(signature)
        if known is not None and self.kl == "sampled":
            return known
        info = [
            SiteInfo(site.name, site.kind, kl and kl.method, kl and kl.reason)
            for site, kl in zip(sites, kls, strict=True)
        ]
        return self._known(pair, signature, tuple(info))

    def _known(self, pair: Pair, signature: Signature, info: tuple[SiteInfo, ...]) -> tuple[SiteInfo, ...]:
        """The same object as at the last step if nothing has changed."""
        known = pair.infos.get(signature)
        if known == info:
            return known
        pair.infos[signature] = info
        return info

    def _structure(
        self,
        pair: Pair,
        signature: Signature,
        model_trace: Trace,
        guide_trace: Trace,
        tracker: DependencyTracker | None,
    ) -> Structure:
        structure = pair.structures.get(signature)
        if structure is None and self._traced is not None:  # values are not to be read, so what folds is not known
            return Structure(outline(model_trace, guide_trace))
        if tracker is None and (structure is not None or self.kl != "sampled"):
            if structure is None:  # new sites, seen without a tracker: sample them now, track the next run
                pair.track_next = True
                return Structure(outline(model_trace, guide_trace))
            return structure
        return self._remember(pair, signature, model_trace, guide_trace, tracker)

    def _report(self, sites: tuple[SiteInfo, ...]) -> None:
        """Say how each kl_prior is computed: in the log, or as the error that kl='analytic' asks for."""
        sampled = [site for site in sites if site.kl_method == "sampled"]
        if self.kl == "analytic" and sampled:
            listed = "; ".join(f"site '{site.site}': {site.kl_reason}" for site in sampled)
            raise ValueError(
                f"kl='analytic', but there is no valid closed form for {listed}. Use kl='auto' or kl='sampled'."
            )
        for site in sites:
            if site.kl_method is not None:
                logger.info("kl_prior of site '%s' is %s: %s", site.site, site.kl_method, site.kl_reason)
