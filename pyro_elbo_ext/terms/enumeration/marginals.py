"""Sites that the model sums out: the log of the sum, split into rows by the exact conditional posterior.

With ``m`` the summed-out sites and ``r(m) = p(m | x, z)`` their posterior given all else,

    log sum_m p(m) p(x | m, z) = E_r[log p(x | m, z)] - KL(r(m) || p(m)),

so reconstruction and ``kl_prior`` of a summed-out site are defined and exact: its guide is ``r``. The marginals of ``r`` are
the derivatives of the log sum by the log factors, which one backward pass through Pyro's own contraction gives. Its entropy
is the log sum less the expected log factors; site by site it is known where ``r`` has the model's own edges, as for single
sites, chains and trees (see :func:`_splits`).
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from opt_einsum import shared_intermediates
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.rings import LogRing
from torch import Tensor

from pyro_elbo_ext.terms.enumeration import log_einsum
from pyro_elbo_ext.terms.enumeration.chains import Alike, chain_of
from pyro_elbo_ext.terms.enumeration.expectations import GuideWeights
from pyro_elbo_ext.terms.packing import Ordinal, broadcast, connected, dims_of, named, spread, summed_to


@dataclass(frozen=True, slots=True)
class Factor:
    """A log density that depends on summed-out sites: packed, masked, not scaled.

    ``own`` is the symbol of the summed-out site that it is the prior of; None for what only depends on such sites.
    ``stacked`` is a tensor that has those of several sites, not packed, along its first dim, and the place in it, if any.
    """

    site: str
    ordinal: Ordinal
    log_density: Tensor
    own: str | None
    stacked: tuple[Tensor, int] | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """Summed-out sites that hang together, and what depends on them.

    The sum of ``log_p`` less that of ``log_q`` is the expected log sum, in value and in gradient.

    Attributes
    ----------
    names : tuple of str
        Of the summed-out sites.
    log_p : dict of str to Tensor
        Of each site: the expectation under ``r`` of its log factor, scaled; packed, with the dims of the site's plates.
    log_q : dict of str to Tensor, or Tensor
        Of each summed-out site: the expectation of ``log r``, alike; where it is known for all of them only, in total, with
        the dims of the plates that all of the group are in.
    ordinal : frozenset of str
        Those plates.
    joint : dict of str to Tensor
        Of each summed-out site: the posterior weight of its values together with its parents', times the scale; packed,
        detached.
    sums : dict of (str, str) to Tensor
        Of ``"log_p"`` or ``"log_q"`` of some sites, where these are known together.
    """

    names: tuple[str, ...]
    log_p: dict[str, Tensor]
    log_q: dict[str, Tensor] | Tensor
    ordinal: Ordinal
    joint: dict[str, Tensor]
    sums: dict[tuple[str, str], Tensor]


def sum_out(
    factors: Sequence[Factor],
    summed: set[str],
    plates: set[str],
    scale: float | Tensor,
    guide: GuideWeights,
    *,
    differentiable: bool,
) -> Group:
    """Sum out the sites of a group, and read its rows off their posterior.

    Parameters
    ----------
    factors
        Of one group, from :func:`groups_of`.
    summed, plates
        Symbols of the summed-out sites, and of the plates.
    scale
        Common to all factors; multiplies the log of the sum.
    differentiable
        Whether ``log_p`` and ``log_q`` have each their own gradient. Without it only that of the whole is right: by the
        envelope theorem ``r`` may be held fixed in it, and the contraction is gone through once, not twice.
    """
    densities = _with_guide_dims(factors, summed | plates)
    owns = [factor.own for factor in factors]
    same_plates = len({factor.ordinal for factor in factors}) == 1
    chain = None
    if same_plates and not differentiable:
        chain = chain_of(densities, owns, summed, [factor.stacked for factor in factors])
    with torch.enable_grad():
        if chain is not None:
            ordinal, (leaf, *posterior) = factors[0].ordinal, chain.log_sum()
            leaves = [named(leaf.requires_grad_(), chain.batch)]
            log_sum = leaves[0]
        else:
            leaves = [_leaf(density, differentiable) for density in densities]
            ordinal, log_sum = _contract(factors, leaves, summed)
        log_sum = packed.scale_and_mask(log_sum, scale=scale)
        (expected,) = guide.expected(ordinal, [log_sum])
        weights = torch.autograd.grad(expected.sum(), leaves, create_graph=differentiable)
        if not differentiable:  # what remains of its gradient is that of the guide's weights
            (expected,) = guide.expected(ordinal, [named(log_sum.detach(), dims_of(log_sum))])
        stacks = _alike(factors, densities, weights) if chain is None else chain.alike(*posterior, *weights)

    log_p: dict[str, Tensor] = {}
    log_q: dict[str, Tensor] = {}
    joint: dict[str, Tensor] = {}
    sums: dict[tuple[str, str], Tensor] = {}
    for stack in stacks:
        of_p, of_q = _expected([factors[at] for at in stack.places], stack, sums)
        log_p.update(of_p)
        log_q.update(of_q)
        for at, dims, weight in zip(stack.places, stack.dims, stack.weight.detach().unbind(), strict=True):
            if owns[at]:
                joint[factors[at].site] = named(weight, dims)
    names = tuple([factor.site for factor in factors if factor.own])
    if not _splits(factors, summed):
        shares = broadcast(expected, *[summed_to(term, ordinal) for term in log_p.values()])
        whole = torch.stack(shares[1:]).sum(0)
        total = named((whole if differentiable else whole.detach()) - shares[0], dims_of(shares[0]))
        return Group(names, log_p, total, ordinal, joint, sums)
    if not differentiable and expected.requires_grad:
        of_first, value = log_q[names[0]], expected.sum()
        sums.pop(("log_q", names[0]))
        log_q[names[0]] = named(of_first - (value - value.detach()) / of_first.numel(), dims_of(of_first))
    return Group(names, log_p, log_q, ordinal, joint, sums)


def _with_guide_dims(factors: Sequence[Factor], others: set[str]) -> list[Tensor]:
    """The densities; those of the summed-out sites' own with all dims that the guide enumerates, as the posterior has."""
    sizes = {
        dim: size
        for factor in factors
        for dim, size in zip(dims_of(factor.log_density), factor.log_density.shape, strict=True)
        if dim not in others
    }
    if not sizes:
        return [factor.log_density for factor in factors]
    return [factor.log_density if factor.own is None else spread(factor.log_density, sizes) for factor in factors]


def _leaf(density: Tensor, differentiable: bool) -> Tensor:
    leaf = density.view_as(density) if differentiable else density.detach()
    return named(leaf if leaf.requires_grad else leaf.requires_grad_(), dims_of(density))


class _BatchableRing(LogRing):
    _backend = log_einsum.__name__


def _contract(
    factors: Sequence[Factor], densities: Sequence[Tensor], summed: set[str], of: type[LogRing] = LogRing
) -> tuple[Ordinal, Tensor]:
    """The log of the sum over the summed-out sites, by Pyro's message passing."""
    tree: OrderedDict[Ordinal, list[Tensor]] = OrderedDict()
    sizes: dict[str, int] = {}
    dtype = functools.reduce(torch.promote_types, [density.dtype for density in densities])
    for factor, density in zip(factors, densities, strict=True):
        of_common_dtype = density if density.dtype == dtype else named(density.to(dtype), dims_of(density))
        tree.setdefault(factor.ordinal, []).append(of_common_dtype)  # states of float32 and data of float64, say
        sizes.update(zip(dims_of(density), density.shape, strict=True))
    with shared_intermediates() as cache:
        contracted = contract_tensor_tree(tree, summed & set(sizes), ring=of(cache=cache, dim_to_size=sizes))
    ((ordinal, (log_sum,)),) = contracted.items()
    return ordinal, log_sum


def _alike(factors: Sequence[Factor], densities: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Alike]:
    """Factors that differ in nothing but their names, as the steps of a chain do, together."""
    places: dict[object, list[int]] = {}
    for at, (factor, density) in enumerate(zip(factors, densities, strict=True)):
        dims = dims_of(density)
        own = None if factor.own is None else dims.index(factor.own)
        plates = tuple([(i, dim) for i, dim in enumerate(dims) if dim in factor.ordinal])
        places.setdefault((density.shape, density.dtype, density.device, own, plates), []).append(at)
    return [
        Alike(
            like,
            [dims_of(densities[at]) for at in like],
            *[torch.stack([of[at] for at in like]) for of in (densities, weights)],
        )
        for like in places.values()
    ]


def _expected(
    factors: Sequence[Factor], stack: Alike, known: dict[tuple[str, str], Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Expected log factors, and log posteriors given the parents, of factors that are alike: all of them at once.

    Their sums are entered into ``known``.
    """
    weight, density, dims = stack.weight, stack.density, stack.dims[0]
    ordinal, own = factors[0].ordinal, factors[0].own
    others = [at for at, dim in enumerate(dims, 1) if dim not in ordinal]
    plates = "".join([dim for dim in dims if dim in ordinal])

    def by_site(what: str, product: Tensor) -> dict[str, Tensor]:
        sums = product.sum(others) if others else product
        totals = sums.flatten(1).sum(1) if sums.dim() > 1 else sums
        known.update(zip([(what, factor.site) for factor in factors], totals.unbind(), strict=True))
        return {factor.site: named(of, plates) for factor, of in zip(factors, sums.unbind(), strict=True)}

    # what has no weight does not count, though its density may be 0
    log_p = by_site("log_p", weight * density.masked_fill(weight.detach() == 0, 0.0))
    if own is None:
        return log_p, {}
    given_parents = weight.sum(dims.index(own) + 1, keepdim=True)
    return log_p, by_site("log_q", weight * (_log(weight) - _log(given_parents)))


def _log(weight: Tensor) -> Tensor:
    return weight.clamp_min(torch.finfo(weight.dtype).tiny).log()


def groups_of(factors: Sequence[Factor], summed: set[str]) -> list[list[Factor]]:
    """The factors, in groups that share summed-out sites."""
    groups = connected([summed.intersection(dims_of(factor.log_density)) for factor in factors])
    return [[factors[at] for at in group] for group in groups]


def log_sum_of(factors: Sequence[Factor], summed: set[str], scale: float | Tensor) -> tuple[Ordinal, Tensor]:
    """The plates that all of a group is in, and the log of its sum, scaled; packed."""
    ordinal, log_sum = _contract(factors, [factor.log_density for factor in factors], summed, _BatchableRing)
    return ordinal, packed.scale_and_mask(log_sum, scale=scale)


def _splits(factors: Sequence[Factor], summed: set[str]) -> bool:
    """Whether the posterior has the model's own edges: ``r(m) = prod_i r(m_i | parents of m_i)``.

    So it is if what depends on several summed-out sites depends on one of them and on parents of that one: then no sum over
    a site makes others depend on each other (a perfect ordering; Lauritzen 1996, "Graphical Models", section 2.1).
    """
    parents = {
        factor.own: summed.intersection(dims_of(factor.log_density)) - {factor.own}
        for factor in factors
        if factor.own is not None
    }
    order = {own: at for at, own in enumerate(parents)}
    cliques = [*parents.values()]
    cliques += [summed.intersection(dims_of(factor.log_density)) for factor in factors if factor.own is None]
    for clique in cliques:
        if clique:
            last = max(clique, key=order.__getitem__)
            if not clique - {last} <= parents[last]:
                return False
    return True
