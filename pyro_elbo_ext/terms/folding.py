"""Reading an autoguide's auxiliary draw and its Delta as the one Gaussian they are.

Pyro's Gaussian autoguides draw ``u`` from a Normal at an auxiliary site and then put a Delta at ``z = T(u)`` with the
Jacobian of ``T`` as its density. No closed-form KL can see through that pair. What is folded back here is

- AutoNormal: one auxiliary site for each latent site;
- AutoDiagonalNormal and AutoMultivariateNormal: one auxiliary vector for all of them. By the chain rule
  ``q(u) = prod_b q(u_b | u_1, ..., u_{b-1})`` each latent site ``b`` gets its own conditional Gaussian, whose moments
  are read off the Cholesky factor.

A fold is accepted only if redoing it gives the draw and the density that the trace holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from pyro.distributions import Delta
from pyro.distributions.util import sum_rightmost
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    ComposeTransform,
    Independent,
    IndependentTransform,
    MultivariateNormal,
    Normal,
    Transform,
    biject_to,
)

from pyro_elbo_ext.programs.nodes import Node

_LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True, slots=True)
class Fold:
    """How one latent site is made from an auxiliary one.

    Attributes
    ----------
    auxiliary : str
        Guide site that draws ``u``.
    block : slice or None
        The part of the auxiliary vector that belongs to the site; None if all of it does (AutoNormal).
    earlier : frozenset of str
        Latent sites made from earlier blocks of the same vector.
    identity : bool
        Whether the site is its block, unchanged, so that the Delta's density is 1.
    """

    auxiliary: str
    block: slice | None
    earlier: frozenset[str]
    identity: bool


@dataclass(frozen=True, slots=True)
class GaussianBlock:
    """A site's conditional Gaussian in unconstrained space, each field of the site's unconstrained shape.

    ``loc`` and ``scale`` are mean and sd of each element; ``entropy`` and ``log_q`` are the elements' shares, by the chain
    rule, of the entropy and of the log density at the draw, in nats. ``correlated`` says whether elements may depend on
    each other.
    """

    loc: Tensor
    scale: Tensor
    entropy: Tensor
    log_q: Tensor
    correlated: bool


def find_folds(model_trace: Trace, guide_trace: Trace) -> dict[str, Fold]:
    """Latent sites that the guide makes from an auxiliary Gaussian, each checked against the draw in the traces.

    This compares values, so it waits for the device; it is done once for each structure of model and guide.
    """
    nodes = guide_trace.nodes
    deltas = [
        name
        for name, node in nodes.items()
        if node["type"] == "sample" and type(node["fn"]) is Delta and name in model_trace and not node["is_observed"]
    ]
    folds: dict[str, Fold] = {}
    for name, node in nodes.items():
        if node["type"] != "sample" or node["is_observed"] or not node["infer"].get("is_auxiliary"):
            continue
        partner = name.removesuffix("_unconstrained")
        if partner in deltas and isinstance(_leaf(node["fn"]), Normal):
            if _agrees(node["value"], model_trace.nodes[partner], nodes[partner]):
                folds[partner] = Fold(name, None, frozenset(), is_identity(transform_of(model_trace.nodes[partner])))
        elif node["fn"].event_dim == 1 and isinstance(_leaf(node["fn"]), Normal | MultivariateNormal):
            folds.update(unpack(name, node["value"], [d for d in deltas if d not in folds], model_trace, guide_trace))
    return folds


def unpack(auxiliary: str, vector: Tensor, names: list[str], model_trace: Trace, guide_trace: Trace) -> dict[str, Fold]:
    """Cut the auxiliary vector into the sites' blocks; nothing is folded unless the whole vector is used up."""
    folds: dict[str, Fold] = {}
    start = 0
    for name in names:
        site = model_trace.nodes[name]
        shape = transform_of(site).inverse_shape(site["value"].shape)
        size, rest = divmod(math.prod(shape), math.prod(vector.shape[:-1]))
        block = slice(start, start + size)
        if rest or block.stop > vector.shape[-1]:
            return {}
        if not _agrees(vector[..., block].reshape(shape), site, guide_trace.nodes[name]):
            return {}
        folds[name] = Fold(auxiliary, block, frozenset(folds), is_identity(transform_of(site)))
        start = block.stop
    return folds if start == vector.shape[-1] else {}


@torch.no_grad()
def _agrees(unconstrained: Tensor, site: Node, delta: Node) -> bool:
    """Whether ``delta`` is the image of ``unconstrained`` under the bijection to the site's support."""
    transform = transform_of(site)
    fn = delta["fn"]
    value = transform(unconstrained)
    if value.shape != fn.v.shape or not torch.equal(value, fn.v):
        return False
    density = -transform.log_abs_det_jacobian(unconstrained, value)
    density = sum_rightmost(density, density.dim() - (value.dim() - fn.event_dim))
    return density.shape == fn.log_density.shape and torch.allclose(density, fn.log_density, rtol=1e-4, atol=1e-5)


def transform_of(site: Node) -> Transform:
    """Bijection from unconstrained space to the support of a model site, as simple as it can be written.

    Independent only changes event dims; and torch writes the positive reals as ``exp`` followed by ``0 + 1 * x``.
    """
    parts: list[Transform] = []
    queue = [biject_to(site["fn"].support)]
    while queue:
        transform = queue.pop(0)
        if isinstance(transform, IndependentTransform):
            queue.insert(0, transform.base_transform)
        elif isinstance(transform, ComposeTransform):
            queue[:0] = transform.parts
        elif not (isinstance(transform, AffineTransform) and _is(transform.loc, 0) and _is(transform.scale, 1)):
            parts.append(transform)
    return parts[0] if len(parts) == 1 else ComposeTransform(parts)


def _is(value: object, number: int) -> bool:
    return not isinstance(value, Tensor) and value == number


def is_identity(transform: Transform) -> bool:
    return isinstance(transform, ComposeTransform) and not transform.parts


def gaussian_block(fold: Fold, site: Node, auxiliary: Node, *, given_earlier: bool) -> GaussianBlock:
    """The conditional Gaussian of a folded site.

    Parameters
    ----------
    fold, site, auxiliary
        The fold, the model's node and the auxiliary guide node.
    given_earlier
        Whether ``loc`` and ``scale`` are those of ``u_b`` given the earlier blocks at their draw, or of ``u_b`` alone.
        ``entropy`` and ``log_q`` are those given the earlier blocks in any case, so that the blocks sum to the whole.
    """
    fn, value = auxiliary["fn"], auxiliary["value"]
    shape = transform_of(site).inverse_shape(site["value"].shape)

    def own(vector: Tensor) -> Tensor:
        return (vector if fold.block is None else vector[..., fold.block]).reshape(shape)

    leaf = _leaf(fn)
    if isinstance(leaf, Normal):
        loc, scale = own(leaf.loc.expand(fn.shape())), own(leaf.scale.expand(fn.shape()))
        deviation = (own(value) - loc) / scale
        diagonal = scale
    else:
        assert isinstance(leaf, MultivariateNormal)
        block = fold.block or slice(0, value.shape[-1])
        tril = leaf.scale_tril
        noise = torch.linalg.solve_triangular(tril, (value - leaf.loc).unsqueeze(-1), upper=False).squeeze(-1)
        rows = tril[..., block, :]
        center = leaf.loc[..., block]
        if given_earlier:
            earlier = (rows[..., : block.start] @ noise[..., : block.start].unsqueeze(-1)).squeeze(-1)
            center = center + earlier
            rows = rows[..., block.start :]
        loc = center.reshape(shape)
        scale = rows.square().sum(-1).sqrt().expand(center.shape).reshape(shape)
        deviation = own(noise)
        diagonal = tril.diagonal(dim1=-2, dim2=-1)[..., block].expand(center.shape).reshape(shape)
    log_diagonal = diagonal.log()
    return GaussianBlock(
        loc=loc,
        scale=scale,
        entropy=0.5 * (1 + _LOG_2PI) + log_diagonal,
        log_q=-0.5 * deviation.square() - log_diagonal - 0.5 * _LOG_2PI,
        correlated=not isinstance(leaf, Normal),
    )


def _leaf(fn: torch.distributions.Distribution) -> torch.distributions.Distribution:
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return fn
