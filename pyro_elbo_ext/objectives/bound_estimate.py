"""One evaluation of a bound: draws, log weights, value, each site's numbers, and the surrogate of the chosen estimator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.util import check_model_guide_match
from torch import Tensor

from pyro_elbo_ext.bounds import Bound, Gradient, Pathwise
from pyro_elbo_ext.bounds.gradients import by_particle
from pyro_elbo_ext.bounds.site_weights import Number, SiteWeights
from pyro_elbo_ext.objectives.bound_record import Description, Particles, describe, known_infos, reader, scalars_of
from pyro_elbo_ext.objectives.evaluation import (
    Args,
    Evaluation,
    Kwargs,
    Pair,
    Program,
    Signature,
    signature_of,
)
from pyro_elbo_ext.objectives.not_finite import NotFinite
from pyro_elbo_ext.objectives.objective import Objective
from pyro_elbo_ext.particles.estimate import Ledger
from pyro_elbo_ext.particles.log_weights import Densities, LogWeights, join, plate_scores, read_densities
from pyro_elbo_ext.particles.particles import Draw, draw, draw_particles, drawn_sites
from pyro_elbo_ext.particles.placement import Placement, place
from pyro_elbo_ext.particles.plate_costs import score_shares
from pyro_elbo_ext.particles.summed_out import check_guide_draws, summed_out
from pyro_elbo_ext.programs.nodes import Node
from pyro_elbo_ext.programs.pairs import check_pair
from pyro_elbo_ext.terms.enumeration.rows import Row
from pyro_elbo_ext.terms.terms import Site, read_sites


def estimate_bound(
    objective: Objective,
    bound: Bound,
    model: Program,
    guide: Program,
    args: Args,
    kwargs: Kwargs,
    *,
    local_plates: tuple[str, ...] = (),
    kl_weights: SiteWeights = SiteWeights(),  # noqa: B008 - immutable
    reason: str,
    with_gradient: bool,
) -> tuple[Evaluation, Particles]:
    """Evaluate ``bound`` on the log weights of the objective's particles.

    Parameters
    ----------
    local_plates
        See :func:`pyro_elbo_ext.placement.place`.
    kl_weights
        Weights of ``log q - log p`` of the latent sites; other than 1 only for the ELBO.
    reason
        Why every ``kl_prior`` is sampled, for the history.
    with_gradient
        Whether the surrogate will be asked for; without it no graph is made.

    Raises
    ------
    ValueError
        If the bound does not exist for these sites, its value is NaN or infinite, or the programs do not belong together.
    """
    gradient: Gradient = objective.estimator if with_gradient else Pathwise()
    pair = objective._pairs(model, guide)
    with torch.set_grad_enabled(with_gradient and torch.is_grad_enabled()):
        has_floor = kl_weights.free_bits is not None
        call = _Call(objective, pair, model, guide, args, kwargs)

        def evaluated(enumerated: bool) -> tuple[_Draws, _Read]:
            draws = _draw(call, gradient, frozenset(local_plates), enumerated=enumerated)
            return draws, _read(call, draws, bound, gradient, local_plates, reason, kl_weights, enumerated=enumerated)

        draws, read = objective._by_enumeration(pair, lambda: evaluated(False), lambda _: evaluated(True))
        floors: Number = 0.0
        if has_floor:
            kl_weights, floors = _with_floors(kl_weights, read, draws.num_vectorized or 1)
        weights = read.log_weights.weights(read.placement, gradient, kl_weights)
        if read.separable:
            of_draws = zip(read.densities, read.sites, strict=True)
            scores = [plate_scores(of, sites, kl_weights) for of, sites in of_draws if of.scored_nodes]
            if scores:
                weights.score_shares = score_shares(scores, draws.num_vectorized)
    traces = [(of.model_trace, of.guide_trace) for of in draws.draws]
    detached = weights.log_weights.detach()
    value = bound.value(detached).sum()
    if not read.placement.is_plain:
        value = value * read.placement.outside
    if has_floor:
        value = value - floors
    outer = read.log_weights.outer(kl_weights)
    if outer is not None:
        value = value + outer.detach()
    shares = None if bound.linear else bound.gradient(detached) if len(detached) > 1 else torch.ones_like(detached)
    sites: dict[str, Description] = {}  # as the first particle that has them has them
    for descriptions in read.described:
        for of in descriptions:
            sites.setdefault(of.site, of)
    scalars = scalars_of(value, read.log_weights, shares, read.ledger)
    of_sites, vectorized = list(sites.values()), draws.num_vectorized or 1
    read_scalars = reader(of_sites, read.log_weights, read.ledger, shares is not None, vectorized)
    host, _, rows = objective._transfer(scalars, read_scalars)
    infos = known_infos(pair, read.signature, of_sites)
    if not math.isfinite(host):
        objective._raise_not_finite(infos, rows, traces)
        raise NotFinite(
            f"{type(bound).__name__} is {host} at step {objective.num_steps}, though no site's mean is infinite. No "
            "parameter has been changed. Check the scales and the range of the log densities."
        )

    def surrogate() -> Tensor:
        shares = by_particle(gradient.surrogate(weights, bound))
        if not read.placement.is_plain:
            shares = shares * read.placement.outside
        outer = read.log_weights.outer(kl_weights, without_scores=True)
        if outer is not None:
            if read.log_weights.outer_scores is not None:
                outer = outer + value * read.log_weights.outer_scores
            shares = shares + outer / len(shares)
        return -shares if objective.maximized else shares

    contributions = None
    if shares is not None:
        contributions = {name: row[-1] for name, row in zip(sites, rows, strict=True)}
    particles = Particles(
        [(descriptions, of.full) for descriptions, of in zip(read.described, read.densities, strict=True)],
        objective.num_particles,
        contributions,
    )
    return Evaluation(
        pair, read.signature, infos, rows, host, 1.0, surrogate, draws.model_parameters, traces
    ), particles


@dataclass(slots=True)
class _Draws:
    """The draws of all particles.

    ``particle_dim`` and ``num_vectorized`` are those of vectorized particles, else None; ``programs`` model's and
    guide's trace of one run, with their parameters.
    """

    draws: list[Draw]
    particle_dim: int | None
    num_vectorized: int | None
    programs: tuple[Trace, Trace]

    def model_parameters(self) -> list[str]:
        model, guide = (trace.nodes for trace in self.programs)
        return [name for name, node in model.items() if node["type"] == "param" and name not in guide]


class _Call(NamedTuple):
    """Who evaluates what."""

    objective: Objective
    pair: Pair
    model: Program
    guide: Program
    args: Args
    kwargs: Kwargs

    @property
    def max_plate_nesting(self) -> int:
        return self.objective._plate_nesting(*self[1:])


def _draw(call: _Call, gradient: Gradient, local_plates: frozenset[str], *, enumerated: bool) -> _Draws:
    objective, pair, model, guide, args, kwargs = call

    def is_shared(node: Node) -> bool:
        return bool(local_plates) and not local_plates <= {frame.name for frame in node["cond_indep_stack"]}

    count = objective.num_particles
    batch = None if enumerated else objective._batch(pair, model, guide, args, kwargs)
    if batch is not None and not any(is_shared(node) for _, node in drawn_sites(batch.reference[1])):
        batched = batch.draw(model, guide, args, kwargs, count, gradient)
        if batched is not None:
            return _Draws([batched.draw], batched.particle_dim, count, batch.reference)
    particle_dim = objective._particle_dim(model, guide, args, kwargs)
    nesting = call.max_plate_nesting if enumerated else 0
    repeats, model, guide = objective._programs(model, guide, args, kwargs)
    if enumerated:
        model = poutine.enum(model, first_available_dim=-1 - nesting)
    else:
        model, guide = objective._looking_for_marks(pair, model, guide)
    if particle_dim is None:
        draws = list(draw_particles(model, guide, args, kwargs, repeats, gradient, is_shared))
    else:
        draws = [draw(model, guide, args, kwargs, gradient, None)]
    programs = draws[0].model_trace, draws[0].drawn
    return _Draws(draws, particle_dim, None if particle_dim is None else count, programs)


class _Read(NamedTuple):
    """What the draws' sites come to."""

    signature: Signature
    placement: Placement
    densities: list[Densities]
    described: list[list[Description]]
    ledger: Ledger
    log_weights: LogWeights
    sites: list[list[Site]]  # of each draw
    separable: bool  # whether each score term has the cost of its own plates


def _read(
    call: _Call,
    draws: _Draws,
    bound: Bound,
    gradient: Gradient,
    local_plates: tuple[str, ...],
    reason: str,
    kl_weights: SiteWeights,
    *,
    enumerated: bool,
) -> _Read:
    objective = call.objective
    structures = _Structures(call, enumerated=enumerated)
    ledger = Ledger()
    nesting = objective.max_plate_nesting if not enumerated else call.max_plate_nesting
    placement: Placement | None = None
    densities: list[Densities] = []
    described: list[list[Description]] = []
    of_draws: list[list[Site]] = []
    separable = bound.linear and not local_plates
    for drawn in draws.draws:
        sites, is_new = structures.read(drawn)
        rows: dict[str, Row] = {}
        if enumerated:
            check_guide_draws(drawn.guide_trace, _what(objective, bound))
            sites, rows = summed_out(drawn, sites, int(nesting), differentiable=not kl_weights.is_one)
        if is_new:
            objective._check_sites(sites)
        of_draws.append(sites)
        if placement is None or is_new:
            here = _place(sites, bound, objective.num_particles, local_plates, gradient, draws.particle_dim)
            if placement is not None:  # a program whose sites vary from draw to draw
                separable = False
                if here.plates != placement.plates:
                    raise ValueError(
                        "the particles have different sites, and no longer share the same plates: there is no common "
                        "bound. Make the sites of model and guide the same in every run, or use DecomposedELBO."
                    )
            placement, description = (
                here,
                describe(
                    sites,
                    drawn,
                    rows,
                    nesting,
                    ledger,
                    reason=reason,
                    counts_latent=kl_weights.free_bits is not None,
                ),
            )
        densities.append(read_densities(drawn, sites, here, gradient, nesting, draws.particle_dim, rows))
        described.append(description)
    assert placement is not None
    paths = [path for drawn in draws.draws for path in drawn.paths]
    log_weights = join(densities, paths, draws.num_vectorized)
    return _Read(structures.signature, placement, densities, described, ledger, log_weights, of_draws, separable)


def _what(objective: Objective, bound: Bound) -> str:
    """What of an objective needs log weights, for messages."""
    return f"gradient='{objective.gradient}'" if bound.linear else type(objective).__name__


def _with_floors(kl_weights: SiteWeights, read: _Read, num_vectorized: int) -> tuple[SiteWeights, Number]:
    """The weights of the gradient under free bits, and what the floors take off the objective."""
    kl_priors = read.log_weights.kl_priors()
    counts: dict[str, Number] = dict.fromkeys(kl_priors, 0.0)
    for of in read.described[0]:
        at = of.num_elements
        counts[of.site] = (read.ledger.scalars[at] if type(at) is int else at) / num_vectorized
    penalty, weights = kl_weights.penalty(kl_priors, counts)
    return weights, penalty - sum([weights.of(site) * kl for site, kl in kl_priors.items()])


def _place(
    sites: Sequence[Site],
    bound: Bound,
    num_particles: int,
    local_plates: tuple[str, ...],
    gradient: Gradient,
    particle_dim: int | None,
) -> Placement:
    placement = place(sites, bound, num_particles, local_plates, masked_paths=not gradient.separate_paths)
    for site, is_local in zip(sites, placement.local, strict=True):
        if is_local or not site.q:
            continue
        if particle_dim is not None:
            raise ValueError(
                f"site '{site.name}' is outside local_plates={local_plates!r}, so all particles must share its draw, "
                "but they are vectorized. Use vectorize_particles=False."
            )
        if gradient.separate_paths:
            raise ValueError(
                f"site '{site.name}' is outside local_plates={local_plates!r}: gradient='{gradient.name}' weights its "
                "path and those inside alike. Use gradient='pathwise' or 'score_function'."
            )
    return placement


class _Structures:
    """Finds the sites of each draw; those of a program that does not change from draw to draw are looked up once."""

    def __init__(self, call: _Call, *, enumerated: bool) -> None:
        self.objective, self.pair, *_, self.args, self.kwargs = call
        self._enumerated = enumerated
        self._plate_nesting = call.max_plate_nesting if enumerated else self.objective.max_plate_nesting
        self.signature: Signature = ()
        self._names: tuple[str, ...] | None = None

    def read(self, drawn: Draw) -> tuple[list[Site], bool]:
        """The draw's sites, and whether they may be others than those of the draw before."""
        model_trace, guide_trace = drawn.model_trace, drawn.guide_trace
        names = (*model_trace.nodes, *guide_trace.nodes)
        is_new = names != self._names
        if is_new:
            self._names = names
            self.signature = signature_of(model_trace, guide_trace, self.args, self.kwargs)
        known = self.pair.structures.get(self.signature)
        if known is None or is_validation_enabled():
            check_pair(model_trace, guide_trace, enumerated=self._enumerated)
            if is_validation_enabled():
                check_model_guide_match(model_trace, guide_trace, self._plate_nesting)
        structure = known or self.objective._remember(self.pair, self.signature, model_trace, guide_trace, None)
        return read_sites(model_trace, guide_trace, structure.sites), is_new
