"""Log likelihoods by observation, the discrete sites that observations depend on summed out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import NamedTuple

import torch
from opt_einsum import shared_intermediates
from pyro.ops.contract import contract_to_tensor
from torch import Tensor

from pyro_elbo_ext.programs.densities import counted
from pyro_elbo_ext.programs.nodes import Node
from pyro_elbo_ext.terms.enumeration.at_draws import AtDraws, Factor, Factors
from pyro_elbo_ext.terms.enumeration.marks import LISTED, listed
from pyro_elbo_ext.terms.packing import connected


class Together(NamedTuple):
    """Observed sites that have one log likelihood, since the same discrete sites are summed out of them.

    Attributes
    ----------
    name
        What to call it: the site's name, or what the names have in common.
    sites, summed_out
        Names of the observed and of the discrete sites.
    plates
        Names of the plates whose elements have a log likelihood each.
    node
        A node with these plates alone, without event dims, to label the log likelihood by.
    counts
        Which elements have an observation that is not masked.
    """

    name: str
    sites: tuple[str, ...]
    summed_out: tuple[str, ...]
    plates: tuple[str, ...]
    node: Node
    counts: Tensor

    def said(self) -> str:
        """What the log likelihood is of, in words."""
        by = " and ".join(f"'{plate}'" for plate in self.plates)
        together = listed(self.sites) + (" together" if len(self.sites) > 1 else "")
        each = f", for each element of plate {by}" if by else ""
        return f"log p of {together}{each}, with {listed(self.summed_out)} summed out"


@torch.no_grad()
def pointwise(model: AtDraws, batch_size: int | None = None) -> list[tuple[Together, Tensor]]:
    """Unscaled log likelihoods of what depends on summed-out sites, given the other latent sites.

    Where an observation depends on states of its own, ``log sum_k p(k) p(x_n | k)`` for each n. Where states tie
    observations together, as in a sequence, it is that of the sequence, as far as plates tell sequences apart.

    Returns
    -------
    list of (Together, Tensor)
        What it is of, and the log likelihoods, shape ``(S, *shape of the plates)``.

    Raises
    ------
    ValueError
        If discrete sites tie observations together that no plate tells apart.
    """
    tied = connected([set(factor.dims) & model.sum_dims for factor in model.factors])
    groups = [(group, _together(model, group)) for group in tied if _observed(model, group)]
    columns: list[list[Tensor]] = [[] for _ in groups]
    for _, factors in model.chunks(batch_size):
        for column, (group, together) in zip(columns, groups, strict=True):
            column.append(_log_likelihood(model, factors, group, together))
    return [(together, torch.cat(column)) for (_, together), column in zip(groups, columns, strict=True)]


def _observed(model: AtDraws, group: Sequence[int]) -> list[Factor]:
    return [model.factors[index] for index in group if model.factors[index].kind == "observed"]


def _together(model: AtDraws, group: Sequence[int]) -> Together:
    observed = _observed(model, group)
    sites = tuple(factor.site for factor in observed)
    summed_out = tuple(model.factors[index].site for index in group if model.factors[index].kind == "states")
    ordinal = frozenset.intersection(*[model.factors[index].ordinal for index in group])
    if not ordinal and (len(observed) > 1 or observed[0].ordinal):
        raise ValueError(
            f"the observations of {listed(sites)} have no log likelihoods of their own: discrete sites "
            f"({listed(summed_out)}) that are summed out tie them together, and no plate tells parts of the data apart, so "
            "that there is one log likelihood of all of them. Put independent sequences into a plate around them."
        )
    symbols = sorted(ordinal, key=model.symbol_to_dim.__getitem__)
    plates = tuple(model.plates[symbol] for symbol in symbols)
    nodes = [model.reference.nodes[site] for site in sites]
    if len(sites) == 1 and observed[0].ordinal == ordinal:
        node, counts = nodes[0], _counts(nodes[0])
    else:
        frames = {frame.name: frame for frame in nodes[0]["cond_indep_stack"]}
        kept = tuple(frames[plate]._replace(dim=axis - len(plates)) for axis, plate in enumerate(plates))
        node = {"cond_indep_stack": kept, "fn": SimpleNamespace(event_dim=0), "infer": {}, "type": "sample"}
        counts = torch.stack([_any(_counts(one), [model.symbol_to_dim[symbol] for symbol in symbols]) for one in nodes])
        counts = counts.any(0)
    return Together(_name(sites), sites, summed_out, plates, node, counts)


def _counts(node: Node) -> Tensor:
    return counted(node, torch.zeros(node["fn"].batch_shape))


def _any(counts: Tensor, dims: Sequence[int]) -> Tensor:
    """Whether any element counts, along these dims."""
    others = [axis for axis in range(-counts.dim(), 0) if axis not in dims]
    for axis in others:
        counts = counts.any(axis, keepdim=True)
    return counts.reshape([counts.shape[dim] for dim in dims])


def _name(sites: Sequence[str]) -> str:
    if len(sites) == 1:
        return sites[0]
    stems = {re.sub(r"[\W_]*\d+$", "", site) for site in sites}
    stem = stems.pop()
    if not stems and stem:
        return stem
    return "+".join(sites) if len(sites) <= LISTED else f"{sites[0]}+...+{sites[-1]}"


def _log_likelihood(model: AtDraws, factors: Factors, group: Sequence[int], together: Together) -> Tensor:
    kinds = {model.factors[index].kind for index in group}
    total = _contracted(model, factors, group, together)
    if "other" in kinds:  # of the latent sites, given which the observations are taken, and of factors
        rest = [index for index in group if model.factors[index].kind != "observed"]
        total = total - _contracted(model, factors, rest, together)
    # 0, as of any masked observation, and not the rounding of log 1
    return total.masked_fill(~together.counts, 0.0)


def _contracted(model: AtDraws, factors: Factors, group: Sequence[int], together: Together) -> Tensor:
    """The log sum over all states of some of the factors, shape ``(size, *shape of the plates)``."""
    tree = model.tree(factors.tensors, set(group))
    symbols = {symbol for symbol, plate in model.plates.items() if plate in together.plates}
    with shared_intermediates() as cache:
        term = contract_to_tensor(tree, model.sum_dims, frozenset(symbols | {model.draws_symbol}), cache=cache)
    laid_out = model.by_plate(term, term._pyro_dims, model.nesting)
    return laid_out.reshape(len(laid_out), *together.counts.shape)
