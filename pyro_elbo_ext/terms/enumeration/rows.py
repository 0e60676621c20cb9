"""The terms of one pair of enumerated traces: each an exact expectation over all that is enumerated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.ops import packed
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_elbo_ext.programs.nodes import Node, is_latent
from pyro_elbo_ext.terms.enumeration.expectations import GuideWeights
from pyro_elbo_ext.terms.enumeration.factors import model_factors
from pyro_elbo_ext.terms.enumeration.marginals import Factor, Group, groups_of, log_sum_of, sum_out
from pyro_elbo_ext.terms.enumeration.traces import pack_model
from pyro_elbo_ext.terms.kl import KLPrior
from pyro_elbo_ext.terms.packing import Ordinal, named, unpacked
from pyro_elbo_ext.terms.states import States, values_of
from pyro_elbo_ext.terms.terms import Site

MARGINALIZED = KLPrior(
    "marginalized", "summed out in the model: its guide is the exact posterior given the other sites"
)
JOINT = KLPrior(
    "marginalized", "summed out in the model, several sites at once: their posterior does not split by site"
)


@dataclass(slots=True)
class Row:
    """What the site comes to, shape ``batch_shape`` without what is enumerated; None where the site has no such density."""

    log_p: Tensor | None = None
    log_q: tuple[Tensor, ...] = ()
    kl_prior: Tensor | None = None  # where it is analytic
    log_p_sum: Tensor | None = None  # where it is known beforehand
    log_q_sum: Tensor | None = None
    states: States | None = None  # of a site that is summed over


@dataclass(slots=True)
class Rows:
    """The rows of a pair of traces.

    Attributes
    ----------
    by_site : dict of str to Row
    joint : dict of tuple of str to Tensor
        Sites of the model that are summed out together, to their ``log q`` where it does not split: with the dims of the
        plates that all of them are in.
    """

    by_site: dict[str, Row] = field(default_factory=dict)
    joint: dict[tuple[str, ...], Tensor] = field(default_factory=dict)


def is_summed_out(site: Site) -> bool:
    """Whether a site is latent in the model, and its guide the exact posterior."""
    return site.kind == "latent" and not site.q


class PairOfTraces:
    """A packed pair of traces: which of the model's sites are summed out, and which depend on those."""

    def __init__(self, model_trace: Trace, guide_trace: Trace) -> None:
        self.model_trace, self.guide_trace = model_trace, guide_trace
        _, factors, ordering, summed, scale = model_factors(model_trace, guide_trace)
        self._in_sums = {id(factor) for of_ordinal in factors.values() for factor in of_ordinal}
        self._ordering: dict[str, Ordinal] = ordering
        self._summed: set[str] = summed
        self._scale: Any = scale
        self._symbols: dict[str, int] = {**guide_trace.symbol_to_dim, **model_trace.symbol_to_dim}

    def depends_on_summed(self, site: Site) -> bool:
        """Whether the model's density at a site stands inside a sum over others."""
        return site.p is not None and self._in_sum(site.p) is not None

    def is_in_sum(self, node: Node) -> bool:
        """Whether the density of a site of the model stands inside a sum."""
        return self._in_sum(node) is not None

    def _in_sum(self, node: Node) -> Tensor | None:
        for name in ("masked_log_prob", "unscaled_log_prob"):
            density: Tensor | None = node["packed"].get(name)
            if id(density) in self._in_sums:
                return density
        return None

    def rows(self, sites: Sequence[Site], kls: Sequence[KLPrior | None], *, differentiable: bool) -> Rows:
        """The rows of all sites.

        Parameters
        ----------
        sites
            From :func:`pyro_elbo_ext.terms.terms.read_sites`.
        kls
            For each site how its ``kl_prior`` is computed; None for observed sites.
        differentiable
            See :func:`~pyro_elbo_ext.terms.enumeration.marginals.sum_out`.
        """
        rows = Rows({site.name: Row() for site in sites})
        guide = GuideWeights(self.guide_trace, self._ordering)
        costs: dict[tuple[Ordinal, str | None], list[tuple[Row, str, Tensor]]] = {}

        def expect(name: str, what: str, cost: Tensor, without: str | None = None) -> None:
            costs.setdefault((self._ordering[name], without), []).append((rows.by_site[site.name], what, cost))

        for site, kl in zip(sites, kls, strict=True):
            if site.p is not None and self._in_sum(site.p) is None:
                expect(site.name, "log_p", site.p["packed"]["log_prob"])
            if kl is not None and kl.log_q is not None:  # its share of a vector's density
                expect(site.name, "log_q", self._pack(kl.log_q, site))
            else:
                for node in site.q:
                    expect(node["name"], "log_q", node["packed"]["log_prob"])
            if kl is not None and kl.value is not None:
                expect(site.name, "kl_prior", self._pack(kl.value, site), without=site.q[-1]["name"])
        for (ordinal, without), of_ordinal in costs.items():
            expected = guide.expected(ordinal, [cost for _, _, cost in of_ordinal], without)
            for (row, what, _), value in zip(of_ordinal, expected, strict=True):
                value = unpacked(value, self._symbols)
                setattr(row, what, (*row.log_q, value) if what == "log_q" else value)
        for site in sites:
            if site.q and "_enumerate_dim" in site.q[-1]["infer"]:
                rows.by_site[site.name].states = self._states_in_guide(site.q[-1], guide)
        self.enter_sums(rows, guide, differentiable=differentiable)
        return rows

    def _states_in_guide(self, node: Node, guide: GuideWeights) -> States | None:
        if node["infer"].get("num_samples") is not None:
            return None
        ordinal = self._ordering[node["name"]]
        return self._states(node, guide.joint(ordinal, node["packed"]["log_prob"]))

    def _states(self, node: Node, joint: Tensor) -> States:
        infer = node["infer"]
        values = values_of(node["value"], infer["_enumerate_dim"], node["fn"].event_dim)
        own: str = infer["_enumerate_symbol"]
        return States(joint, own, self._ordering[node["name"]], self._symbols, values)

    def log_sums(self) -> list[tuple[tuple[str, ...], Tensor, list[str]]]:
        """For sites that are summed out and hang together: names, log sum, scaled, and the symbols of its plates."""
        found = []
        for group in groups_of(self._factors(), self._summed):
            names = tuple([factor.site for factor in group if factor.own is not None])
            ordinal, log_sum = log_sum_of(group, self._summed, self._scale)
            found.append((names, unpacked(log_sum, self._symbols), sorted(ordinal)))
        return found

    def _factors(self) -> list[Factor]:
        """Of what is summed out in the model, and what depends on it."""
        factors = []
        for name, node in self.model_trace.nodes.items():
            density = self._in_sum(node) if node["type"] == "sample" else None
            if density is not None:
                summed = not node["is_observed"] and name not in self.guide_trace.nodes
                own = node["infer"].get("_enumerate_symbol") if summed else None
                stacked = node.get("stacked") if density is node["packed"].get("unscaled_log_prob") else None
                factors.append(Factor(name, self._ordering[name], density, own, stacked))
        return factors

    def enter_sums(self, rows: Rows, guide: GuideWeights, *, differentiable: bool) -> None:
        """Enter the rows of what is summed out in the model, and of what depends on it."""
        plates = set(self.model_trace.plate_to_symbol.values())
        for group in groups_of(self._factors(), self._summed):
            self._enter(sum_out(group, self._summed, plates, self._scale, guide, differentiable=differentiable), rows)

    def _enter(self, group: Group, rows: Rows) -> None:
        for name, value in group.log_p.items():
            rows.by_site[name].log_p = unpacked(value, self._symbols)
            rows.by_site[name].log_p_sum = group.sums.get(("log_p", name))
        for name, joint in group.joint.items():
            rows.by_site[name].states = self._states(self.model_trace.nodes[name], joint)
        if isinstance(group.log_q, Tensor):
            rows.joint[group.names] = unpacked(group.log_q, self._symbols)
        else:
            for name, value in group.log_q.items():
                rows.by_site[name].log_q = (unpacked(value, self._symbols),)
                rows.by_site[name].log_q_sum = group.sums.get(("log_q", name))

    def _pack(self, value: Tensor, site: Site) -> Tensor:
        dims = {}
        for node in (*site.q, site.p):
            if node is not None:
                dims.update(node["infer"]["_dim_to_symbol"])
        result: Tensor = packed.pack(value, dims)
        return result


def log_density(model_trace: Trace, max_plate_nesting: int) -> Tensor:
    """Log density of a model's enumerated trace, a scalar: its marked sites summed out, what scales the sums outside."""
    pair = model_alone(model_trace, max_plate_nesting)
    sites = [node for node in pair.model_trace.nodes.values() if node["type"] == "sample"]
    parts = [node["log_prob"].sum() for node in sites if not pair.is_in_sum(node)]
    parts += [log_sum.sum() for _, log_sum, _ in pair.log_sums()]
    return torch.stack(parts).sum()


def model_alone(model_trace: Trace, max_plate_nesting: int) -> PairOfTraces:
    """A model's enumerated trace, packed, with a guide that enumerates nothing."""
    model_trace = prune_subsample_sites(model_trace)
    pack_model(model_trace, max_plate_nesting)
    guide = Trace()  # what the contraction asks of it: which sites it draws, and the plates they are in
    guide.plate_to_symbol, guide.symbol_to_dim = model_trace.plate_to_symbol, model_trace.symbol_to_dim
    for name, node in model_trace.nodes.items():
        if is_latent(node) and "_enumerate_dim" not in node["infer"]:
            guide.nodes[name] = {
                "type": "sample",
                "infer": {},
                "cond_indep_stack": node["cond_indep_stack"],
                "packed": {"log_prob": named(torch.zeros(()), "")},
            }
    return PairOfTraces(model_trace, guide)
