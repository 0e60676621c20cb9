"""Draws of summed-out sites from their exact posterior given all others, and the probabilities of their states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from opt_einsum import shared_intermediates
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.einsum.adjoint import require_backward
from pyro.ops.rings import LogRing
from torch import Tensor

from pyro_elbo_ext.programs.given import run_given, values_of
from pyro_elbo_ext.terms.enumeration.at_draws import AtDraws, Discrete, Factors
from pyro_elbo_ext.terms.enumeration.over_draws import OverDraws
from pyro_elbo_ext.terms.enumeration.sample_einsum import SortedSampleRing


@torch.no_grad()
def draw_states(model: AtDraws, batch_size: int | None = None) -> dict[str, Tensor]:
    """One joint draw of all summed-out sites from ``p(discrete | data, others)`` for each draw of the others.

    By Pyro's forward filtering and backward sampling, exact. Random numbers are torch's.

    Parameters
    ----------
    model
        The model at draws of its other latent sites.
    batch_size
        Draws at once, at most.

    Returns
    -------
    dict
        Site to its states, shape ``(S, *batch_shape, *event_shape)``, in the dtype that the model gives them.
    """
    drawn: dict[str, list[Tensor]] = {name: [] for name in model.discrete}
    if not drawn:
        return {}
    for _, factors in model.chunks(batch_size):
        for name, index in _indices(model, factors).items():
            drawn[name].append(model.discrete[name].support[index])
    return {name: torch.cat(parts) for name, parts in drawn.items()}


def _indices(model: AtDraws, factors: Factors) -> dict[str, Tensor]:
    """Which state each summed-out site has at each draw, shape ``(size, *batch_shape)``."""
    own = {f.site: t for f, t in zip(model.factors, factors.tensors, strict=True) if f.kind == "states"}
    tree = model.tree(factors.tensors)
    for tensor in own.values():
        require_backward(tensor)
    sizes = {
        dim: size
        for terms in tree.values()
        for term in terms
        for dim, size in zip(term._pyro_dims, term.shape, strict=True)  # type: ignore[attr-defined]
    }
    with shared_intermediates() as cache:
        ring = SortedSampleRing(cache=cache, dim_to_size=sizes)
        roots = [term for terms in contract_tensor_tree(tree, model.sum_dims, ring=ring).values() for term in terms]
        for root in roots:
            root._pyro_backward()
    found = {}
    for name, site in model.discrete.items():
        shape = (factors.size, *site.batch_shape)
        if site.symbol is None:
            found[name] = torch.zeros(shape, dtype=torch.long, device=site.support.device)
            continue
        sample: Any = own[name]._pyro_backward_result  # type: ignore[attr-defined]
        row = sample[sample._pyro_sample_dims.index(site.symbol)]
        found[name] = model.by_plate(row, sample._pyro_dims[1:], len(site.batch_shape)).expand(shape)
    return found


def state_probabilities(model: AtDraws, batch_size: int | None = None) -> dict[str, Tensor]:
    """Posterior probability of each state of each summed-out site, averaged over the draws of the others.

    They are the derivatives of the log sum over all states by the sites' log factors: one backward pass through Pyro's
    contraction.

    Returns
    -------
    dict
        Site to probabilities, shape ``(*batch_shape, K)``, float64, in the order of the site's ``enumerate_support``.
    """
    sums: dict[str, Tensor] = {}
    for _, factors in model.chunks(batch_size):
        own = {f.site: t for f, t in zip(model.factors, factors.tensors, strict=True) if f.kind == "states"}
        with torch.enable_grad():
            for tensor in own.values():
                tensor.requires_grad_()
            total = log_sum(model, factors)
            gradients = torch.autograd.grad(total.sum(), list(own.values()), allow_unused=True, materialize_grads=True)
        dims = {f.site: model.draws_symbol + f.dims for f in model.factors if f.kind == "states"}
        for name, gradient in zip(own, gradients, strict=True):
            site = model.discrete[name]
            one = _marginal(model, gradient.double(), dims[name], site)
            sums[name] = sums[name] + one if name in sums else one
    return {name: sums[name] / model.count for name in model.discrete}


def _marginal(model: AtDraws, gradient: Tensor, dims: str, site: Discrete) -> Tensor:
    """The gradient by a site's factor, summed over the draws and over the states of its parents."""
    if site.symbol is None:
        return gradient.new_full((*site.batch_shape, 1), gradient.shape[0])
    parents = [i for i, symbol in enumerate(dims) if symbol in model.sum_dims - {site.symbol}]
    kept = "".join(symbol for i, symbol in enumerate(dims) if i not in parents)
    marginal = gradient.sum(parents) if parents else gradient
    states = marginal.movedim(kept.index(site.symbol), 0)
    by_state = [model.by_plate(one, kept.replace(site.symbol, ""), len(site.batch_shape)) for one in states]
    return torch.stack(by_state, -1).sum(0).expand(*site.batch_shape, len(site.support))


def log_sum(model: AtDraws, factors: Factors) -> Tensor:
    """The log sum over all states of the factors that depend on them, shape ``(size,)``, float64."""
    tree = model.tree(factors.tensors)
    with shared_intermediates() as cache:
        contracted = contract_tensor_tree(tree, model.sum_dims, ring=LogRing(cache))
        roots = [term for terms in contracted.values() for term in terms]
        total = sum(
            term.movedim(term._pyro_dims.index(model.draws_symbol), 0)
            .reshape(factors.size, -1)
            .sum(1, dtype=torch.float64)
            for term in roots
        )
    return torch.as_tensor(total)


@torch.no_grad()
def log_joint(model: AtDraws, batch_size: int | None = None) -> Tensor:
    """Log joint density of data and draws, the discrete sites summed out: scaled and masked, shape ``(S,)``, float64."""
    return torch.cat([factors.rest + log_sum(model, factors) * model.scale for _, factors in model.chunks(batch_size)])


@torch.no_grad()
def completed(model: AtDraws, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values of all latent and deterministic sites, these computed at the drawn states, each of shape ``(S, ...)``."""
    given = {**model.draws, **states}
    wanted = values_of(model.reference)
    computed = [name for name in wanted if name not in given]

    def one(values: Mapping[str, Tensor]) -> list[Tensor]:
        found = values_of(run_given(model.model, model.args, model.kwargs, values))
        for name in computed:
            if name not in found or found[name].shape != wanted[name].shape:
                raise ValueError(f"site '{name}' is not in every draw, or of another shape in some")
        return [found[name] for name in computed]

    if computed:
        run, size = OverDraws(one), model.at_once
        parts = [
            run({name: draws[done : done + size] for name, draws in given.items()}, min(size, model.count - done))
            for done in range(0, model.count, size)
        ]
        given |= {name: torch.cat(column) for name, column in zip(computed, zip(*parts, strict=True), strict=True)}
    return {name: given[name] for name in wanted}
