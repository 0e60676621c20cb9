"""From the traces of K particles to their log weights, by site, and to what the estimators of gradients need.

Every site's scaled log densities are summed over all dims but those of the plates that the bound is taken inside, which
gives one column of shape ``(K, *B)`` for each; ``log w = log p(x, z) - log q(z)`` is a signed sum of columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from pyro.distributions import Delta
from pyro.distributions.util import is_identically_zero
from torch import Tensor

from pyro_elbo_ext.bounds import Gradient, Path, Weights
from pyro_elbo_ext.bounds.site_weights import Number, SiteWeights
from pyro_elbo_ext.particles.estimate import check_path, stack, weights_like
from pyro_elbo_ext.particles.particles import Draw
from pyro_elbo_ext.particles.placement import Placement
from pyro_elbo_ext.particles.plate_costs import PlateScores, Stack
from pyro_elbo_ext.programs.densities import log_prob, score_parts
from pyro_elbo_ext.programs.nodes import Node
from pyro_elbo_ext.terms.enumeration.rows import Row
from pyro_elbo_ext.terms.terms import Site


class Column(NamedTuple):
    """What one column of log densities is."""

    site: str
    is_prior: bool  # log p of a latent site
    sign: float  # in log w
    is_direct: bool  # its dependence on parameters at fixed draws is kept where paths are taken apart
    is_scored: bool  # log q of a draw without a path
    is_local: bool  # the bound is taken over it


class Densities(NamedTuple):
    """Log densities of one draw: by site, detached and in full; and reduced to columns, with their graphs."""

    full: list[tuple[Tensor | None, tuple[Tensor, ...]]]  # log p and the parts of log q
    columns: list[Column]
    values: list[Tensor]
    scores: list[tuple[bool, Tensor]]  # of the draws without a path: whether it is local, log q unscaled and unmasked
    corrections: list[tuple[bool, Tensor]]  # of the draws whose path is incomplete
    scored_nodes: list[tuple[Stack, Tensor]]  # both, in full, with their plates


def read_densities(
    draw: Draw,
    sites: Sequence[Site],
    placement: Placement,
    gradient: Gradient,
    max_plate_nesting: float,
    particle_dim: int | None,
    rows: Mapping[str, Row],
) -> Densities:
    """Log densities of the sites at one draw, summed over the dims that the bound is not taken over.

    Parameters
    ----------
    sites
        From :func:`pyro_elbo_ext.terms.read_sites`, of the traces in ``draw``.
    max_plate_nesting
        For Pyro's validation of shapes; ``inf`` if unknown.
    particle_dim
        The (negative) dim of the particle plate; None if the particles are looped over.
    rows
        From :func:`~pyro_elbo_ext.particles.summed_out.summed_out`: what stands for the densities of some sites.
    """
    densities = Densities([], [], [], [], [], [])
    for site, is_local in zip(sites, placement.local, strict=True):
        kept = _kept(placement, is_local, particle_dim)
        log_p: Tensor | None = None
        row = rows.get(site.name)
        if site.p is not None:
            in_sum = None if row is None else row.log_p
            value = log_prob(site.p, draw.model_trace, max_plate_nesting) if in_sum is None else in_sum
            densities.columns.append(Column(site.name, site.kind == "latent", 1.0, True, False, is_local))
            densities.values.append(_reduce(value, kept))
            log_p = value.detach()
        log_qs: list[Tensor] = []
        for log_q in () if row is None else row.log_q:
            densities.columns.append(Column(site.name, False, -1.0, True, False, is_local))
            densities.values.append(_reduce(log_q, kept))
            log_qs.append(log_q.detach())
        for node in site.q:
            log_q, score, correction = _log_q(node, draw, gradient, max_plate_nesting)
            is_direct = isinstance(node["fn"], Delta) or node["is_observed"]
            densities.columns.append(Column(site.name, False, -1.0, is_direct, score is not None, is_local))
            densities.values.append(_reduce(log_q, kept))
            log_qs.append(log_q.detach())
            if score is not None:
                densities.scores.append((is_local, _reduce(score, kept)))
            if correction is not None:
                densities.corrections.append((is_local, _reduce(correction, kept)))
            densities.scored_nodes.extend((vectorized(node), part) for part in (score, correction) if part is not None)
        densities.full.append((log_p, tuple(log_qs)))
    return densities


def _log_q(
    node: Node, draw: Draw, gradient: Gradient, max_plate_nesting: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Scaled log q of a guide node; its score if the draw has no path; a correction if the path is incomplete."""
    trace, name = draw.guide_trace, node["name"]
    if gradient.detach_draws:
        log_q = log_prob(node, trace, max_plate_nesting)
        has_score = log_q.requires_grad and not isinstance(node["fn"], Delta)
        return log_q, node["unscaled_log_prob"] if has_score else None, None
    try:
        log_q, score, entropy_term = score_parts(node, trace, max_plate_nesting)
    except (KeyError, NotImplementedError) as error:
        if not draw.paths:
            raise
        raise ValueError(
            f"the density of guide site '{name}' is known only at its own draw, not at a copy of it: {error}. "
            f"gradient='{gradient.name}' needs the copy: use gradient='pathwise', or a flow that can be inverted."
        ) from error
    drawn = node
    if draw.paths:  # a score keeps its path through the draws it depends on
        drawn = draw.drawn.nodes[name]
        _, score, entropy_term = score_parts(drawn, draw.drawn, max_plate_nesting)
    if log_q.requires_grad:
        check_path(drawn)
    if is_identically_zero(score):
        return log_q, None, None
    return (log_q, score, None) if is_identically_zero(entropy_term) else (log_q, None, score)


def vectorized(node: Node) -> Stack:
    """The plates that a node is in by broadcasting."""
    return tuple([frame for frame in node["cond_indep_stack"] if frame.vectorized])


def plate_scores(densities: Densities, sites: Sequence[Site], kl_weights: SiteWeights) -> PlateScores:
    """The draw's costs and scores with their plates, for a bound that is the sum of its terms."""
    costs = []
    for site, (log_p, log_qs) in zip(sites, densities.full, strict=True):
        weight = 1.0 if site.kind == "observed" else kl_weights.of(site.name)
        if site.p is not None and log_p is not None:
            costs.append((vectorized(site.p), weight * log_p))
        nodes = site.q or (site.p,) * len(log_qs)  # what the model sums out is in its own plates
        costs.extend((vectorized(node), -weight * log_q) for node, log_q in zip(nodes, log_qs, strict=True) if node)
    return PlateScores(costs, densities.scored_nodes)


def _kept(placement: Placement, is_local: bool, particle_dim: int | None) -> dict[int, int | None]:
    """Dims that are not summed over, with their sizes where known; the particle's first."""
    kept: dict[int, int | None] = {} if particle_dim is None else {particle_dim: None}
    if is_local:
        kept.update(zip(placement.dims, placement.sizes, strict=True))
    return kept


def _reduce(value: Tensor, kept: dict[int, int | None]) -> Tensor:
    if not kept:
        return value.sum() if value.dim() else value
    missing = -min(kept) - value.dim()
    if missing > 0:
        value = value.reshape((1,) * missing + value.shape)
    summed = [dim for dim in range(-value.dim(), 0) if dim not in kept]
    if summed:
        value = value.sum(summed)
    sizes = tuple([value.shape[i] if size is None else size for i, size in enumerate(kept.values())])
    return value if value.shape == sizes else value.expand(sizes)


@dataclass(slots=True)
class LogWeights:
    """The log densities of K particles, in columns, with their graphs.

    Attributes
    ----------
    columns, values
        Those the bound is taken over; ``values`` has shape ``(K, columns, *B)``.
    outer_columns, outer_values
        Those outside, at the one draw that all particles share; ``outer_values`` has shape ``(columns,)``.
    scores, corrections
        See :class:`~pyro_elbo_ext.bounds.gradients.Weights`; shape ``(K, *B)``.
    outer_scores
        Score terms of the shared draws, a scalar.
    paths
        See :class:`~pyro_elbo_ext.bounds.gradients.Weights`.
    """

    columns: list[Column]
    values: Tensor
    outer_columns: list[Column]
    outer_values: Tensor | None
    scores: Tensor | None
    corrections: Tensor | None
    outer_scores: Tensor | None
    paths: list[Path]

    def weights(self, placement: Placement, gradient: Gradient, kl_weights: SiteWeights) -> Weights:
        """Log weights, divided by the scale that is taken outside, and what the estimator needs beside them."""
        all_of_it = self._signed([True] * len(self.columns), placement, kl_weights)
        direct = scored = None
        if gradient.separate_paths:
            direct = self._signed([column.is_direct for column in self.columns], placement, kl_weights)
        if self.scores is not None:
            scored = -self._signed([column.is_scored for column in self.columns], placement, kl_weights)
        return Weights(all_of_it, direct, scored, self.scores, self.corrections, self.paths)

    def kl_priors(self) -> dict[str, Number]:
        """``log q - log p`` of each latent or auxiliary site, averaged over particles: detached float64 scalars."""
        sums: dict[str, Number] = {}
        for column, value in zip(self.columns, self.values.detach().double().mean(0), strict=True):
            if column.is_prior or column.sign < 0:
                sums[column.site] = sums.get(column.site, 0.0) - column.sign * value.sum()
        return sums

    def outer(self, kl_weights: SiteWeights, *, without_scores: bool = False) -> Tensor | None:
        """What the sites outside the bound add to the objective, a scalar; None if there are no such sites.

        ``without_scores`` leaves out log q of the draws without a path, whose own gradient is zero in expectation.
        """
        if self.outer_values is None:
            return None
        signs = _signs(self.outer_columns, kl_weights)
        if without_scores:
            signs = [0.0 if of.is_scored else sign for of, sign in zip(self.outer_columns, signs, strict=True)]
        return torch.dot(self.outer_values, weights_like(self.outer_values, signs))

    def _signed(self, use: Sequence[bool], placement: Placement, kl_weights: SiteWeights) -> Tensor:
        outside = placement.outside
        divisor = outside if isinstance(outside, float) else 1.0
        signs = [
            sign / divisor if used else 0.0 for used, sign in zip(use, _signs(self.columns, kl_weights), strict=True)
        ]
        taken = self.values
        if not all(use):  # a column left out must not matter, not even if it is infinite
            at = [i for i, used in enumerate(use) if used]
            signs, taken = [signs[i] for i in at], taken[:, at]
        vector = weights_like(taken, signs)
        total = taken @ vector if taken.dim() == 2 else torch.tensordot(taken, vector, dims=([1], [0]))
        return total if isinstance(outside, float) else total / outside


def _signs(columns: Sequence[Column], kl_weights: SiteWeights) -> list[Number]:
    return [
        column.sign * (kl_weights.of(column.site) if column.is_prior or column.sign < 0 else 1.0) for column in columns
    ]


def join(particles: Sequence[Densities], paths: list[Path], num_vectorized: int | None) -> LogWeights:
    """Log weights of all particles.

    Parameters
    ----------
    particles
        One for each looped particle, or a single one with the particle as dimension 0 of every column.
    num_vectorized
        Their number in the latter case, else None.
    """
    first = particles[0]
    if any(densities.columns != first.columns for densities in particles[1:]):
        particles = _aligned(particles)
        first = particles[0]
    local = [i for i, column in enumerate(first.columns) if column.is_local]
    outer = [i for i, column in enumerate(first.columns) if not column.is_local]
    looped = num_vectorized is None
    if not local:  # no sites, or none in a plate: log weights of zero
        values = torch.zeros(len(particles) if num_vectorized is None else num_vectorized, 0)
    elif looped:
        values = torch.stack([stack([densities.values[i] for i in local]) for densities in particles])
    else:
        values = stack([first.values[i] for i in local], dim=1)
    outer_values = None
    if outer:
        shared = [first.values[i] for i in outer]
        outer_values = stack(shared if looped else [value.mean(0) for value in shared])
    outer_scores = [score for is_local, score in (*first.scores, *first.corrections) if not is_local]
    return LogWeights(
        [first.columns[i] for i in local],
        values,
        [first.columns[i] for i in outer],
        outer_values,
        _sums([[score for is_local, score in densities.scores if is_local] for densities in particles], looped),
        _sums([[score for is_local, score in densities.corrections if is_local] for densities in particles], looped),
        torch.stack(outer_scores).sum() if outer_scores else None,
        paths,
    )


def _sums(scores: list[list[Tensor]], looped: bool) -> Tensor | None:
    if not any(scores):
        return None
    known = next(score for of_particle in scores for score in of_particle)
    sums = [torch.stack(of_particle).sum(0) if of_particle else torch.zeros_like(known) for of_particle in scores]
    return torch.stack(sums) if looped else sums[0]


def _aligned(particles: Sequence[Densities]) -> list[Densities]:
    """Columns by site, zeros where a particle lacks one: programs whose sites vary from draw to draw."""
    keyed = [
        dict(zip(_keys(densities.columns), zip(densities.columns, densities.values, strict=True), strict=True))
        for densities in particles
    ]
    columns = {key: entry[0] for entries in keyed for key, entry in entries.items()}
    zero = torch.zeros_like(particles[0].values[0])
    return [
        densities._replace(
            columns=list(columns.values()),
            values=[entries[key][1] if key in entries else zero for key in columns],
        )
        for densities, entries in zip(particles, keyed, strict=True)
    ]


def _keys(columns: Sequence[Column]) -> list[tuple[str, float, int]]:
    seen: dict[tuple[str, float], int] = {}
    keys = []
    for column in columns:
        key = (column.site, column.sign)
        seen[key] = seen.get(key, 0) + 1
        keys.append((*key, seen[key]))
    return keys
