"""What one evaluation of a bound leaves behind: each site's numbers for the history, and the log densities for Terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from pyro_elbo_ext.history.history import SiteInfo
from pyro_elbo_ext.objectives.evaluation import Pair, Read, Signature, Totals, Values
from pyro_elbo_ext.particles.estimate import Ledger, num_observations, scale_of, with_mask_of_plates
from pyro_elbo_ext.particles.log_weights import LogWeights
from pyro_elbo_ext.particles.particles import Draw
from pyro_elbo_ext.programs.densities import log_prob
from pyro_elbo_ext.terms import Term, Terms
from pyro_elbo_ext.terms.enumeration.rows import JOINT, MARGINALIZED, Row, is_summed_out
from pyro_elbo_ext.terms.kl import KLPrior
from pyro_elbo_ext.terms.terms import Kind, Site, stack_particles

_NAN = float("nan")


class Description(NamedTuple):
    """What a site is, without its traces and their graphs."""

    site: str
    kind: Kind
    stack: tuple[CondIndepStackFrame, ...]
    scale: float | Tensor
    mask: bool | Tensor | None
    history_scale: float | int  # as a number, or its place in the ledger
    num_elements: float | int  # of an observed site; of a latent one if they are counted
    kl: KLPrior | None  # how kl_prior is computed; None for observed sites


@dataclass(slots=True)
class Particles:
    """Detached log densities of every particle's sites, from which :class:`Terms` are made when asked for.

    ``looped`` has one entry for each looped particle, or a single one for all vectorized ones.
    """

    looped: list[tuple[list[Description], list[tuple[Tensor | None, tuple[Tensor, ...]]]]]
    num_particles: int
    contributions: dict[str, float] | None

    def terms(self) -> Terms:
        """The terms; log densities are those of the draws, not weighted."""
        vectorized = self.num_particles if len(self.looped) == 1 else 1
        each = []
        for descriptions, full in self.looped:
            terms = {}
            for of, (log_p, log_q) in zip(descriptions, full, strict=True):
                method, reason = (None, None) if of.kl is None else of.kl[:2]
                terms[of.site] = Term(of.site, of.kind, log_p, log_q, None, method, reason, of.stack, of.scale, of.mask)
            each.append(Terms(terms, vectorized))
        return Terms(stack_particles(each).by_site, self.num_particles, self.contributions)


def describe(
    sites: Sequence[Site],
    drawn: Draw,
    rows: Mapping[str, Row],
    max_plate_nesting: float,
    ledger: Ledger,
    *,
    reason: str,
    counts_latent: bool,
) -> list[Description]:
    """What the sites are; ``reason`` says why ``kl_prior`` is sampled where it is not summed out exactly."""
    descriptions = []
    for site in sites:
        node = site.p or site.q[-1]
        count: float | int = 0.0
        if site.kind == "observed" or (counts_latent and site.kind == "latent" and not site.is_point):
            log_p = rows[site.name].log_p if site.name in rows else log_prob(node, drawn.model_trace, max_plate_nesting)
            assert log_p is not None
            count = num_observations(with_mask_of_plates(node, log_p), log_p, ledger)
        kl: KLPrior | None = KLPrior("sampled", reason)
        if site.kind == "observed":
            kl = None
        elif is_summed_out(site):
            kl = MARGINALIZED if site.p is not None and site.p["name"] == site.name else JOINT
        scale = node["scale"]
        descriptions.append(
            Description(
                site.name,
                site.kind,
                node["cond_indep_stack"],
                scale.detach() if isinstance(scale, Tensor) else scale,
                node["mask"],
                scale_of(node, ledger),
                count,
                kl,
            )
        )
    return descriptions


def known_infos(pair: Pair, signature: Signature, sites: Sequence[Description]) -> tuple[SiteInfo, ...]:
    """What the history takes; the same object as at the last step if nothing has changed."""
    known = pair.infos.get(signature)
    if known is not None and [info.site for info in known] == [of.site for of in sites]:
        return known
    pair.infos[signature] = tuple(
        [SiteInfo(of.site, of.kind, *((None, None) if of.kl is None else of.kl[:2])) for of in sites]
    )
    return pair.infos[signature]


def scalars_of(value: Tensor, log_weights: LogWeights, shares: Tensor | None, ledger: Ledger) -> Tensor:
    """The value, and the numbers that the history is made of, in one tensor.

    ``shares`` is the bound's gradient, which weights the sites' contributions; None for the ELBO, where they are known.
    """
    local = log_weights.values.detach()
    means = local.mean(0) if len(local) > 1 else local[0]
    parts = [value.reshape(1), means.flatten(1).sum(1) if means.dim() > 1 else means]
    if log_weights.outer_values is not None:
        parts.append(log_weights.outer_values.detach())
    if shares is not None and len(local) > 1:  # one particle has all the weight
        # a particle without weight contributes nothing, though its log density may be -inf
        weighted = shares.unsqueeze(1) * local.masked_fill((shares == 0).unsqueeze(1), 0.0)
        parts.append(weighted.sum(0).flatten(1).sum(1) if local.dim() > 2 else weighted.sum(0))
        if log_weights.outer_values is not None:
            parts.append(log_weights.outer_values.detach())
    if ledger.scalars:
        parts.append(torch.stack([scalar.to(value.device) for scalar in ledger.scalars]))
    return torch.cat(parts)


def reader(
    sites: Sequence[Description], log_weights: LogWeights, ledger: Ledger, has_contributions: bool, num_vectorized: int
) -> Read:
    """Makes the scalars into the value, zero, and for each site the history's numbers."""
    columns = [*log_weights.columns, *log_weights.outer_columns]
    num_in_ledger, num_particles = len(ledger.scalars), len(log_weights.values)

    def read_scalars(host: list[float]) -> Totals:
        objective, *numbers = host
        in_ledger = numbers[len(numbers) - num_in_ledger :]
        log_p, log_q, contribution = ({of.site: 0.0 for of in sites} for _ in range(3))
        for i, column in enumerate(columns):
            (log_p if column.sign > 0 else log_q)[column.site] += numbers[i]
            if has_contributions:
                at = i if num_particles == 1 else len(columns) + i  # one particle has all the weight
                contribution[column.site] += column.sign * numbers[at]
        rows: Values = []
        for of in sites:
            name = of.site
            weighted_term = contribution[name] if has_contributions else _NAN
            scale = in_ledger[of.history_scale] if type(of.history_scale) is int else of.history_scale
            if of.kind == "observed":
                count = in_ledger[of.num_elements] if type(of.num_elements) is int else of.num_elements
                rows.append((log_p[name], _NAN, _NAN, scale, count / num_vectorized, weighted_term))
                continue
            prior = _NAN if of.kind == "auxiliary" else log_p[name]
            rows.append((prior, log_q[name], log_q[name] - log_p[name], scale, 0.0, weighted_term))
        return objective, 0.0, rows

    return read_scalars
