"""One particle: from a pair of traces to its terms, their sums, and what the surrogate's gradient needs.

With weight ``w`` on a site's ``kl_prior`` the objective is ``sum reconstruction - sum w kl_prior``. Its gradient is the
pathwise one and, for each guide site whose draw is not reparameterized, ``grad log q(site)`` times the cost of the terms
that share the site's plates (Ranganath, Gerrish and Blei 2014; the Rao-Blackwellization over plates is Pyro's). The
weights are asked for last: with free bits they depend on the values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from pyro.distributions import Delta, Unit
from pyro.distributions.util import is_identically_zero
from pyro.infer.util import MultiFrameTensor
from pyro.poutine import Trace
from torch import Tensor

from pyro_elbo_ext.bounds.site_weights import Number, SiteWeights
from pyro_elbo_ext.history.history import VALUES, SiteInfo
from pyro_elbo_ext.programs.densities import log_prob, score_parts
from pyro_elbo_ext.programs.nodes import Node
from pyro_elbo_ext.terms import Term
from pyro_elbo_ext.terms.kl import KLPrior
from pyro_elbo_ext.terms.terms import Site

_NAN = float("nan")
_SUMMED = [VALUES.index(name) for name in ("log_p", "log_q", "kl_prior", "num_observations")]  # over a site's batch
_Scored = tuple[str, Node, Tensor, Tensor | None]  # site, guide node, its log q, its kl_prior if that is analytic


class Slots(NamedTuple):
    """Where a term's sums stand in the :class:`Ledger`."""

    log_p: int | None
    log_q: tuple[int, ...]
    kl_prior: int | None  # None: log q - log p
    scale: float | int  # an int is a place in the ledger
    num_elements: float | int  # data elements of an observed site; of a latent one, if they are counted, its own


class Particle(NamedTuple):
    """The terms of one draw (or of all draws, if vectorized), detached, and where their sums stand."""

    terms: list[Term]
    slots: list[Slots]


@dataclass(slots=True)
class Ledger:
    """The scalars of one step, gathered so that one transfer brings all of them to the host.

    Attributes
    ----------
    scalars : list of Tensor
        Sums over sites' batches.
    signs : list of (float, str or None) or None
        Each one's sign in the objective, and the site whose weight it has (None: 1); None for those that only the record
        needs.
    extra : list of callable
        Scalars that only the surrogate needs, given the weights: score-function terms.
    starts : list of tuple
        Where each looped particle begins in ``scalars`` and ``extra``.
    """

    scalars: list[Tensor] = field(default_factory=list)
    signs: list[tuple[float, str | None] | None] = field(default_factory=list)
    extra: list[Callable[[SiteWeights], list[Tensor]]] = field(default_factory=list)
    starts: list[tuple[int, int]] = field(default_factory=list)

    def begin_particle(self) -> None:
        """What follows belongs to the next looped particle."""
        self.starts.append((len(self.scalars), len(self.extra)))

    def add(self, density: Tensor, sign: float | None, site: str | None = None, known_sum: Tensor | None = None) -> int:
        """Enter a density, of which the sum may be known, and return its place."""
        self.scalars.append(known_sum if known_sum is not None else density.sum() if density.dim() else density)
        self.signs.append(None if sign is None else (sign, site))
        return len(self.scalars) - 1

    def surrogate_loss(self, num_particles: int, weights: SiteWeights) -> Tensor:
        """Scalar whose gradient is unbiased for that of the negative objective, averaged over particles."""
        return self._surrogate_loss(num_particles, weights, (0, 0), (len(self.scalars), len(self.extra)))

    def surrogate_shares(self, num_particles: int, weights: SiteWeights) -> Tensor:
        """Each looped particle's share of :meth:`surrogate_loss`, shape ``(looped particles,)``."""
        ends = [*self.starts[1:], (len(self.scalars), len(self.extra))]
        places = zip(self.starts, ends, strict=True)
        return torch.stack([self._surrogate_loss(num_particles, weights, *place) for place in places])

    def _surrogate_loss(
        self, num_particles: int, weights: SiteWeights, start: tuple[int, int], end: tuple[int, int]
    ) -> Tensor:
        scalars: list[Tensor] = []
        factors: list[Number] = []
        for scalar, entry in zip(self.scalars[start[0] : end[0]], self.signs[start[0] : end[0]], strict=True):
            if entry is not None:
                sign, site = entry
                scalars.append(scalar)
                factors.append(-sign * (1.0 if site is None else weights.of(site)) / num_particles)
        total = torch.zeros(())
        if scalars:
            stacked = stack(scalars)
            total = torch.dot(stacked, weights_like(stacked, factors))
        for terms in self.extra[start[1] : end[1]]:
            for term in terms(weights):
                total = total - term / num_particles
        return total

    def stacked(self) -> Tensor:
        """Every scalar, detached, in one tensor."""
        return stack(self.scalars).detach() if self.scalars else torch.zeros(0)


def weights_like(tensor: Tensor, weights: Sequence[Number]) -> Tensor:
    """The weights in one tensor; some are tensors where they depend on values, or are inputs of a graph being traced."""
    if any(isinstance(weight, Tensor) for weight in weights):
        return torch.stack([torch.as_tensor(weight, dtype=tensor.dtype, device=tensor.device) for weight in weights])
    return tensor.new_tensor(weights)


def stack(values: list[Tensor], dim: int = 0) -> Tensor:
    """``torch.stack`` of tensors that may be on several devices: on the first that is not the host."""
    device = values[0].device
    if any(value.device != device for value in values):  # e.g. a factor computed on the host
        device = next((value.device for value in values if value.device.type != "cpu"), device)
        values = [value.to(device) for value in values]
    return torch.stack(values, dim)


def evaluate(
    sites: Sequence[Site],
    kls: Sequence[KLPrior | None],
    model_trace: Trace,
    guide_trace: Trace,
    *,
    max_plate_nesting: float,
    ledger: Ledger,
    counts_latent: bool = False,
) -> Particle:
    """Compute the terms of one pair of traces and enter their sums into the ledger.

    Parameters
    ----------
    sites
        From :func:`pyro_elbo_ext.terms.read_sites`.
    kls
        For each site how its ``kl_prior`` is computed; None for observed sites.
    max_plate_nesting
        For Pyro's validation of shapes; ``inf`` if unknown.
    counts_latent
        Whether to count the elements of latent sites.
    """
    terms: list[Term] = []
    slots: list[Slots] = []
    scored: list[_Scored] = []
    for site, kl in zip(sites, kls, strict=True):
        if kl is None:
            assert site.p is not None
            data = log_prob(site.p, model_trace, max_plate_nesting)
            at = ledger.add(data, 1.0)
            slots.append(Slots(at, (), None, scale_of(site.p, ledger), num_observations(site.p, data, ledger)))
            terms.append(_term(site, data, (), None))
            continue
        analytic = kl.method == "analytic"
        log_p: Tensor | None = None
        p_at: int | None = None
        if site.p is not None:
            if analytic:
                with torch.no_grad():
                    log_p = log_prob(site.p, model_trace, max_plate_nesting)
            else:
                log_p = log_prob(site.p, model_trace, max_plate_nesting)
            p_at = ledger.add(log_p, None if analytic else 1.0, site.name)
        log_qs: tuple[Tensor, ...] = ()
        q_at: tuple[int, ...] = ()
        if kl.log_q is not None:
            log_qs = (kl.log_q,)
            q_at = (ledger.add(kl.log_q, None if analytic else -1.0, site.name),)
        else:
            for node in site.q:
                log_q, score, entropy_term = score_parts(node, guide_trace, max_plate_nesting)
                log_qs += (log_q,)
                if log_q.requires_grad:
                    check_path(node)
                pathwise = not analytic and entropy_term is log_q
                q_at += (ledger.add(log_q if pathwise else log_q.detach(), -1.0 if pathwise else None, site.name),)
                if not analytic and not pathwise and not is_identically_zero(entropy_term):  # partly reparameterized
                    ledger.extra.append(partial(_entropy_terms, site.name, entropy_term))
                if not is_identically_zero(score):
                    scored.append((site.name, node, score, kl.value))
        kl_at = None if kl.value is None else ledger.add(kl.value, -1.0, site.name)
        counted = counts_latent and log_p is not None and not site.is_point
        count = num_observations(site.p, log_p, ledger) if counted else 0.0  # type: ignore[arg-type]
        slots.append(Slots(p_at, q_at, kl_at, scale_of(site.p or site.q[-1], ledger), count))
        terms.append(_term(site, log_p, log_qs, kl))
    if scored:
        ledger.extra.append(partial(_score_terms, sites, terms, scored))
    return Particle(terms, slots)


def _entropy_terms(site: str, entropy_term: Tensor, weights: SiteWeights) -> list[Tensor]:
    return [-weights.of(site) * entropy_term.sum()]


def _score_terms(
    sites: Sequence[Site], terms: Sequence[Term], scored: Sequence[_Scored], weights: SiteWeights
) -> list[Tensor]:
    costs = _costs(sites, terms, weights)
    extra = []
    for site, node, score, own in scored:
        cost = costs.sum_to(node["cond_indep_stack"])
        if own is not None:  # given its parents an analytic kl_prior does not depend on the draw
            cost = cost + weights.of(site) * own.detach()
        extra.append((cost * score).sum())
    return extra


def check_path(node: Node) -> None:
    """A draw that claims to be reparameterized must carry the gradient of the parameters it was drawn with."""
    fn = node["fn"]
    if fn.has_rsample and not node["is_observed"] and not isinstance(fn, Delta) and not node["value"].requires_grad:
        raise ValueError(
            f"the draw at guide site '{node['name']}' carries no gradient, though its {type(fn).__name__} depends on "
            "parameters and says that it is reparameterized (has_rsample). Its gradient would be lost. Do not detach the "
            "draw or make it under torch.no_grad(); or use the score function: .has_rsample_(False) on the distribution."
        )


def _costs(sites: Sequence[Site], terms: Sequence[Term], weights: SiteWeights) -> MultiFrameTensor:
    costs = MultiFrameTensor()
    for site, term in zip(sites, terms, strict=True):
        stack = tuple(frame for frame in (site.p or site.q[-1])["cond_indep_stack"] if frame.vectorized)
        if term.kind == "observed":
            assert term.log_p is not None
            costs.add((stack, term.log_p))
        else:
            assert term.kl_prior is not None
            costs.add((stack, -weights.of(site.name) * term.kl_prior))
    return costs


def _term(site: Site, log_p: Tensor | None, log_qs: tuple[Tensor, ...], kl: KLPrior | None) -> Term:
    node = site.p or site.q[-1]
    scale, mask = node["scale"], node["mask"]
    return Term(
        site.name,
        site.kind,
        None if log_p is None else log_p.detach(),
        tuple(log_q.detach() for log_q in log_qs),
        None if kl is None or kl.value is None else kl.value.detach(),
        None if kl is None else kl.method,
        None if kl is None else kl.reason,
        node["cond_indep_stack"],
        scale.detach() if isinstance(scale, Tensor) else scale,
        mask,
    )


def scale_of(node: Node, ledger: Ledger) -> float | int:
    scale = node["scale"]
    if isinstance(scale, Tensor):
        return ledger.add(scale.detach().mean(dtype=torch.get_default_dtype()), None)
    return float(scale)


def num_observations(node: Node, log_p: Tensor, ledger: Ledger) -> float | int:
    """How many data elements the scaled term stands for; none for ``pyro.factor``."""
    scale, mask = node["scale"], node["mask"]
    if mask is False or isinstance(node["fn"], Unit):
        return 0.0
    if not isinstance(mask, Tensor) and not isinstance(scale, Tensor):
        return float(log_p.numel() * scale)
    counted = log_p.new_full((), 1.0) * scale
    if isinstance(mask, Tensor):
        counted = counted * mask
    return ledger.add(counted.detach().expand(log_p.shape), None)


def with_mask_of_plates(node: Node, log_p: Tensor) -> Node:
    """The node with a mask that fits its row: what counts under some of the enumerated values is taken to count."""
    mask = node["mask"]
    if not isinstance(mask, Tensor):
        return node
    while mask.dim() > log_p.dim():
        mask = mask.any(0)
    for dim in range(-mask.dim(), 0):
        if mask.shape[dim] > log_p.shape[dim]:
            mask = mask.any(dim, keepdim=True)
    return {**node, "mask": mask}


def row(slots: Sequence[Slots], kinds: Sequence[SiteInfo], host: Sequence[float]) -> list[tuple[float, ...]]:
    """Values of one particle, by site, in the columns that :class:`pyro_elbo_ext.history.history.History` takes."""
    values: list[tuple[float, ...]] = []
    for slot, info in zip(slots, kinds, strict=True):
        log_p = _NAN if slot.log_p is None else host[slot.log_p]
        scale = host[slot.scale] if type(slot.scale) is int else slot.scale
        if info.kind == "observed":
            count = slot.num_elements
            values.append((log_p, _NAN, _NAN, scale, host[count] if type(count) is int else count, _NAN))
            continue
        log_q = sum([host[at] for at in slot.log_q])
        kl_prior = log_q if slot.log_p is None else log_q - log_p
        if slot.kl_prior is not None:
            kl_prior = host[slot.kl_prior]
        values.append((log_p, log_q, kl_prior, scale, 0.0, _NAN))
    return values


def average(
    infos: Sequence[tuple[SiteInfo, ...]], rows: Sequence[list[tuple[float, ...]]], vectorized: int
) -> tuple[tuple[SiteInfo, ...], list[tuple[float, ...]]]:
    """Mean over particles, of which ``vectorized`` are summed in each row; a site that some lack counts as zero in them."""
    if len(rows) == 1 and vectorized == 1:
        return infos[0], rows[0]
    if all(info == infos[0] for info in infos):
        total, sites = np.sum(rows, axis=0).reshape(-1, len(VALUES)), infos[0]
    else:
        by_name: dict[str, SiteInfo] = {}
        for info in infos:
            for site in info:
                by_name.setdefault(site.site, site)
        places = {name: i for i, name in enumerate(by_name)}
        total, sites = np.zeros((len(places), len(VALUES))), tuple(by_name.values())
        for info, values in zip(infos, rows, strict=True):
            total[[places[site.site] for site in info]] += values
    total = total / len(rows)
    total[:, _SUMMED] /= vectorized
    return sites, [tuple(value) for value in total.tolist()]


def sums_by_site(
    particles: Sequence[Particle], scalars: Sequence[Number], num_particles: int
) -> tuple[dict[str, Number], dict[str, Number]]:
    """``kl_prior`` of each site that has one, and how many elements the site has, averaged over particles.

    ``scalars`` are the ledger's, on the host or as tensors.
    """
    kl_priors: dict[str, Number] = {}
    counts: dict[str, Number] = {}
    for particle in particles:
        for term, slot in zip(particle.terms, particle.slots, strict=True):
            if term.kind == "observed":
                continue
            if slot.kl_prior is not None:
                kl = scalars[slot.kl_prior]
            else:
                kl = sum([scalars[at] for at in slot.log_q])
                kl = kl if slot.log_p is None else kl - scalars[slot.log_p]
            count = scalars[slot.num_elements] if type(slot.num_elements) is int else slot.num_elements
            kl_priors[term.site] = kl_priors.get(term.site, 0.0) + kl / num_particles
            counts[term.site] = counts.get(term.site, 0.0) + count / num_particles
    return kl_priors, counts
