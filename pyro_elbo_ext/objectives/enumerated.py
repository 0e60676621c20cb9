"""The terms of an ELBO whose discrete sites are summed over: from enumerated traces to the ledger of a step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from torch import Tensor

from pyro_elbo_ext.history.history import SiteInfo
from pyro_elbo_ext.objectives.evaluation import Args, Kwargs, Pair, Program, signature_of
from pyro_elbo_ext.objectives.kl_choice import Evaluated, KLObjective
from pyro_elbo_ext.particles.estimate import (
    Ledger,
    Particle,
    Slots,
    check_path,
    num_observations,
    scale_of,
    with_mask_of_plates,
)
from pyro_elbo_ext.programs.densities import of_plates
from pyro_elbo_ext.programs.pairs import check_draws
from pyro_elbo_ext.terms import Term
from pyro_elbo_ext.terms.dependencies import DependencyTracker
from pyro_elbo_ext.terms.enumeration.marks import listed
from pyro_elbo_ext.terms.enumeration.rows import JOINT, MARGINALIZED, PairOfTraces, Row, Rows, is_summed_out
from pyro_elbo_ext.terms.enumeration.traces import Begun, check_enumerated, enumerated_pairs, pack
from pyro_elbo_ext.terms.kl import KLPrior, Structure
from pyro_elbo_ext.terms.terms import Site, read_sites

ENUMERATED = KLPrior("enumerated", "summed over its values in the guide")
_INSIDE_A_SUM = "its prior depends on a site that is summed out in the model"


def exact_kl(site: Site) -> KLPrior | None:
    """How the ``kl_prior`` of a latent site is computed if it is summed over; else None."""
    if is_summed_out(site):
        return MARGINALIZED
    infer = site.q[-1]["infer"]
    is_enumerated = infer.get("num_samples") is None and ("_enumerate_dim" in infer or "_enum_total" in infer)
    return ENUMERATED if is_enumerated else None


class Entry(NamedTuple):
    """What one site, or several that are summed out together, comes to."""

    site: Site
    kl: KLPrior | None  # how kl_prior is computed; None for observed sites
    row: Row


def entries(sites: Sequence[Site], kls: Sequence[KLPrior | None], rows: Rows) -> list[Entry]:
    """An entry for each site, but one for all of those whose log q is known in total only."""
    group_of = {name: group for group in rows.joint for name in group}
    found: list[Entry] = []
    members: dict[tuple[str, ...], list[Row]] = {}
    for site, kl in zip(sites, kls, strict=True):
        row = rows.by_site[site.name]
        group = group_of.get(site.name)
        if group is not None:
            of_group = members.setdefault(group, [])
            of_group.append(row)
            if len(of_group) < len(group):
                continue
            row = Row(
                _total([one.log_p.sum() for one in of_group if one.log_p is not None]), (rows.joint[group].sum(),)
            )
            kl = JOINT
            site = Site(listed(group), "latent", site.p, ())
        found.append(Entry(site, kl, row))
    return found


def added(branches: Sequence[Sequence[Entry]]) -> list[Entry]:
    """The sum of the entries of all branches of a sequential enumeration; a site that some lack counts as zero there."""
    if len(branches) == 1:
        return list(branches[0])
    by_name: dict[str, list[Entry]] = {}
    for branch in branches:
        for entry in branch:
            by_name.setdefault(entry.site.name, []).append(entry)
    return [of[0]._replace(row=_sum_of_rows([entry.row for entry in of])) for of in by_name.values()]


def _sum_of_rows(rows: Sequence[Row]) -> Row:
    first = rows[0]
    parts = zip(*[row.log_q for row in rows], strict=True)
    return Row(
        None if first.log_p is None else _total([row.log_p for row in rows]),
        tuple([_total(part) for part in parts]),
        None if first.kl_prior is None else _total([row.kl_prior for row in rows]),
    )


def _total(values: Sequence[Tensor | None]) -> Tensor:
    """The sum, element by element where the shapes are the same."""
    known = [value for value in values if value is not None]
    if any(value.shape != known[0].shape for value in known):
        known = [value.sum() for value in known]
    return torch.stack(known).sum(0)


def enter(found: Sequence[Entry], ledger: Ledger, *, counts_latent: bool) -> Particle:
    """Enter the sums of one particle into the ledger."""
    terms: list[Term] = []
    slots: list[Slots] = []
    for entry in found:
        log_p, log_q, kl_value = entry.row.log_p, entry.row.log_q, entry.row.kl_prior
        site, kl = entry.site, entry.kl
        node = site.p or site.q[-1]
        scale: float | int = scale_of(node, ledger)
        count: float | int = 0.0
        if log_p is not None and (kl is None or (counts_latent and not site.is_point)):
            count = num_observations(with_mask_of_plates(node, log_p), log_p, ledger)
        of_site = None if kl is None else site.name
        sign = 1.0 if kl_value is None else None
        p_at = None if log_p is None else ledger.add(log_p, sign, of_site, entry.row.log_p_sum)
        q_sign = None if sign is None else -1.0
        q_at = tuple([ledger.add(part, q_sign, of_site, entry.row.log_q_sum) for part in log_q])
        kl_at = None if kl_value is None else ledger.add(kl_value, -1.0, of_site)
        slots.append(Slots(p_at, q_at, kl_at, scale, count))
        terms.append(
            Term(
                site.name,
                site.kind,
                None if log_p is None else log_p.detach(),
                tuple([part.detach() for part in log_q]),
                None if kl_value is None else kl_value.detach(),
                None if kl is None else kl.method,
                None if kl is None else kl.reason,
                node["cond_indep_stack"],
                node["scale"].detach() if isinstance(node["scale"], Tensor) else node["scale"],
                node["mask"],
                () if entry.row.states is None else (entry.row.states,),
            )
        )
    return Particle(terms, slots)


def infos_of(found: Sequence[Entry]) -> tuple[SiteInfo, ...]:
    """How the term of each site is computed."""
    return tuple(
        [
            SiteInfo(entry.site.name, entry.site.kind, entry.kl and entry.kl.method, entry.kl and entry.kl.reason)
            for entry in found
        ]
    )


def check_paths(sites: Sequence[Site]) -> None:
    """Raise ValueError if a draw has lost the gradient of the parameters it was drawn with."""
    for site in sites:
        for node in site.q:
            if "_enumerate_dim" not in node["infer"] and node["log_prob"].requires_grad:
                check_path(node)


def evaluate_enumerated(
    objective: KLObjective,
    pair: Pair,
    model: Program,
    guide: Program,
    args: Args,
    kwargs: Kwargs,
    begun: Begun | None = None,
    *,
    differentiable: bool,
) -> Evaluated:
    """Particles one after the other, or all of them in Pyro's particle plate, summed over what is marked.

    ``begun`` is the first run of all, if it has been made.
    """
    ledger = Ledger()
    particles: list[Particle] = []
    infos: list[tuple[SiteInfo, ...]] = []
    runs: list[tuple[Trace, Trace]] = []
    nesting = objective._plate_nesting(pair, model, guide, args, kwargs)
    repeats, model, guide = objective._programs(model, guide, args, kwargs)
    for _ in range(repeats):
        ledger.begin_particle()
        branches: list[list[Entry]] = []
        if begun is not None:
            tracker = begun.tracker
        else:
            tracker = DependencyTracker() if objective._is_tracked(pair, args, kwargs) else None
        with tracker or nullcontext():
            between = tracker and tracker.enter_model
            for traces in enumerated_pairs(model, guide, args, kwargs, nesting, between, begun):
                signature = signature_of(*traces, args, kwargs)
                is_new = signature not in pair.structures
                if is_validation_enabled() or is_new:
                    check_enumerated(*traces, nesting)
                structure = objective._structure(pair, signature, *traces, tracker)
                if is_new and objective._traced is None:
                    check_draws(traces[0])
                runs.append(traces)
                branches.append(_entries_of(objective, traces, structure, nesting, differentiable=differentiable))
        begun = None
        found = added(branches)
        objective._check_sites([entry.site for entry in found])
        particles.append(enter(found, ledger, counts_latent=objective._free_bits is not None))
        info = infos_of(found)
        if tracker is not None or objective.kl == "analytic":
            objective._report(info)
        infos.append(objective._known(pair, signature, info))
    return Evaluated(ledger, signature, particles, infos, runs)


def _entries_of(
    objective: KLObjective, traces: tuple[Trace, Trace], structure: Structure, nesting: int, *, differentiable: bool
) -> list[Entry]:
    pack(*traces, nesting)
    sites = read_sites(*traces, structure.sites)
    check_paths(sites)
    enumerated = PairOfTraces(*traces)
    kls: list[KLPrior | None] = []
    for site in sites:
        kl = None if site.kind == "observed" else exact_kl(site) or objective._kl_prior(_aligned(site), structure)
        if kl is not None and site.q and enumerated.depends_on_summed(site):
            kl = KLPrior("sampled", _INSIDE_A_SUM, log_q=kl.log_q)
        kls.append(kl)
    return entries(sites, kls, enumerated.rows(sites, kls, differentiable=differentiable))


def _aligned(site: Site) -> Site:
    """The site with a prior and a guide of the same batch shape, where only the values of enumerated sites part them."""
    if site.p is None or len(site.q) != 1:
        return site
    p, q = site.p["fn"], site.q[0]["fn"]
    if not hasattr(p, "batch_shape") or not hasattr(q, "batch_shape") or p.batch_shape == q.batch_shape:
        return site
    if of_plates(p.batch_shape, site.p) != of_plates(q.batch_shape, site.p):
        return site
    shape = torch.broadcast_shapes(p.batch_shape, q.batch_shape)
    nodes = [{**node, "fn": fn.expand(shape)} for node, fn in ((site.p, p), (site.q[0], q))]
    return Site(site.name, site.kind, nodes[0], (nodes[1],))
