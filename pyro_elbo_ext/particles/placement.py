"""Where in a program a bound is taken: over which plates, with which scale outside.

A bound that is not linear in the log weights does not commute with sums over plates or with scales. It is taken *inside*
the plates that all its sites share, once for each element, where the elements are independent; their scale (data size over
batch size) multiplies the bounds, so that a subsample gives an unbiased estimate of the sum over all data. Plates that only
some sites have are summed over inside the log weights, which needs all of their elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pyro.distributions import Delta
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from pyro_elbo_ext.bounds import Bound
from pyro_elbo_ext.programs.nodes import PARTICLE_PLATE, Node
from pyro_elbo_ext.terms.terms import Site


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a bound is taken.

    Attributes
    ----------
    plates : tuple of CondIndepStackFrame
        The plates the bound is taken inside, by increasing dim.
    outside : float or Tensor
        What the bounds are multiplied with, and what the sites' scaled log densities are divided by inside.
    local : tuple of bool
        For each site whether it is inside; one that is not enters as a term of the ELBO, at one draw for all particles.
    """

    plates: tuple[CondIndepStackFrame, ...]
    outside: float | Tensor
    local: tuple[bool, ...]

    @property
    def is_plain(self) -> bool:
        """Whether nothing is scaled outside."""
        return isinstance(self.outside, float) and self.outside == 1.0

    @property
    def dims(self) -> tuple[int, ...]:
        return tuple([frame.dim for frame in self.plates if frame.dim is not None])

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple([frame.size for frame in self.plates])


def place(
    sites: Sequence[Site], bound: Bound, num_particles: int, local_plates: tuple[str, ...], *, masked_paths: bool
) -> Placement:
    """Find where ``bound`` is taken for these sites.

    Parameters
    ----------
    sites
        The sites of one particle.
    bound, num_particles
        Where the bound is linear, or of one particle, which is its log weight, nothing is required.
    local_plates
        Names of the plates to take the bound inside, the ELBO outside; empty for the plates that all sites share. The
        bound is taken inside whatever further plates the sites in them share.
    masked_paths
        Whether a masked guide site is acceptable; it is not where paths are weighted apart from scores.

    Raises
    ------
    ValueError
        If there is no such bound: a subsampled plate that only some of the sites are in, guide sites with different scales,
        a plate of ``local_plates`` that does not exist or that a site is only partly in.
    """
    nodes = [node for site in sites for node in _nodes(site)]
    local: tuple[bool, ...] = (True,) * len(sites)
    plates: set[CondIndepStackFrame] = set()
    if local_plates:
        plates, local = _named(sites, [_plates(site) for site in sites], local_plates)
        if not (bound.linear or bound.side == "lower"):
            raise ValueError(
                f"local_plates={local_plates!r} takes the ELBO outside those plates, so that the whole is a lower "
                f"bound, but {type(bound).__name__} is an upper one. Use a lower bound, or no local_plates."
            )
    elif nodes and all(node["cond_indep_stack"] for node in nodes):
        plates = set.intersection(*[_plates(site) for site in sites])
    ordered = tuple(sorted(plates, key=lambda frame: frame.dim or 0))
    linear = bound.linear or num_particles == 1
    if (linear and not local_plates) or (masked_paths and all(_is_plain(node) for node in nodes)):
        return Placement(ordered, 1.0, local)
    inside = [site for site, is_local in zip(sites, local, strict=True) if is_local]
    if not linear:
        _check_subsampling(sites, inside, plates)
        if not masked_paths:
            _check_masks(inside)
    return Placement(ordered, _scale_of(ordered) * _guide_scale(inside), local)


def _nodes(site: Site) -> tuple[Node, ...]:
    return site.q if site.p is None else (site.p, *site.q)


def _is_plain(node: Node) -> bool:
    """Whether nothing scales the node."""
    scale = node["scale"]
    return isinstance(scale, float) and scale == 1.0 and not (node["cond_indep_stack"] and _subsampled(node))


def _plates(site: Site) -> set[CondIndepStackFrame]:
    """Plates that every node of the site is in, by broadcasting."""
    stacks = [node["cond_indep_stack"] for node in _nodes(site)]
    if not all(stacks):
        return set()
    shared = set(stacks[0]).intersection(*stacks[1:])
    return {frame for frame in shared if frame.vectorized and frame.name != PARTICLE_PLATE}


def _named(
    sites: Sequence[Site], stacks: Sequence[set[CondIndepStackFrame]], names: tuple[str, ...]
) -> tuple[set[CondIndepStackFrame], tuple[bool, ...]]:
    known = {frame.name: frame for stack in stacks for frame in stack}
    for name in names:
        if name not in known:
            raise ValueError(
                f"local_plates names '{name}', but no site is in a plate of that name (with pyro.plate(...) as a context); "
                f"the plates are {', '.join(sorted(known)) or 'none'}"
            )
    local = []
    for site, stack in zip(sites, stacks, strict=True):
        inside = {frame.name for frame in stack} & set(names)
        if inside and inside != set(names):
            raise ValueError(
                f"site '{site.name}' is in plate '{min(inside)}' but not in '{min(set(names) - inside)}': the bound "
                "cannot be taken inside both. Name in local_plates only plates that its sites share."
            )
        local.append(bool(inside))
    shared = set.intersection(*[stack for stack, is_local in zip(stacks, local, strict=True) if is_local])
    return shared, tuple(local)


def _subsampled(node: Node) -> list[CondIndepStackFrame]:
    return [f for f in node["cond_indep_stack"] if f.full_size is not None and f.full_size != f.size]


def _scale_of(frames: Iterable[CondIndepStackFrame]) -> float:
    """Data size over batch size of subsampled plates."""
    return math.prod([1.0 if frame.full_size is None else frame.full_size / frame.size for frame in frames])


def _check_subsampling(sites: Sequence[Site], inside: Sequence[Site], plates: set[CondIndepStackFrame]) -> None:
    for site in inside:
        for node in _nodes(site):
            for frame in _subsampled(node):
                if frame not in plates:
                    raise ValueError(_why_no_bound(site, frame, sites))


def _why_no_bound(site: Site, frame: CondIndepStackFrame, sites: Sequence[Site]) -> str:
    outsiders = [repr(other.name) for other in sites if all(f.name != frame.name for f in _plates(other))]
    if frame.vectorized:
        reason = f"{', '.join(outsiders)} is not in it"
        remedy = f"local_plates='{frame.name}' to take the bound inside the plate and the ELBO outside"
    else:
        reason = "it is sequential (for i in pyro.plate(...))"
        remedy = "it as a context (with pyro.plate(...))"
    return (
        f"site '{site.name}' is in plate '{frame.name}', which subsamples {frame.size} of {frame.full_size}, but "
        f"{reason}: a log weight would need all the data, and a scaled-up subsample of it gives no bound. Use "
        f"{remedy}, or all the data, or DecomposedELBO."
    )


def _check_masks(inside: Sequence[Site]) -> None:
    for site in inside:
        for node in site.q:
            if node["mask"] is not None and node["mask"] is not True and type(node["fn"]) is not Delta:
                raise ValueError(
                    f"guide site '{node['name']}' is masked: where its density does not count, its path must not be "
                    "weighted like the others under a bound that is not linear. Use gradient='pathwise' or 'score_function'."
                )


def _guide_scale(inside: Sequence[Site]) -> float | Tensor:
    """The scale that the guide's sites share, apart from subsampling.

    ``s (log p - log q)`` gives s times a bound, and what scales only the model tempers it: both are taken care of by
    dividing all scales by the guide's. Guide sites with different scales make no density, so there is no weight.
    """
    scales: dict[str, float | Tensor] = {}
    for site in inside:
        for node in site.q:
            scale = node["scale"]
            if isinstance(scale, Tensor) and scale.numel() != 1:
                raise ValueError(
                    f"guide site '{node['name']}' has a scale of shape {tuple(scale.shape)}: a log weight needs one "
                    "scale for the whole guide. Scale the model instead, or use DecomposedELBO."
                )
            scales[node["name"]] = scale / _scale_of(_subsampled(node))
    if not scales:
        return 1.0
    (first, value), *others = scales.items()
    for name, other in others:
        if other is not value and not math.isclose(float(other), float(value), rel_tol=1e-5):
            raise ValueError(
                f"guide sites '{first}' and '{name}' have different scales, {float(value):.6g} and {float(other):.6g}: "
                "together they make no density, so there is no log weight. Scale the model instead, or use DecomposedELBO."
            )
    return value.detach().reshape(()) if isinstance(value, Tensor) else value
