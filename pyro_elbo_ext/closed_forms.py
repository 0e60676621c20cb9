"""Closed-form ``E_q[log q]`` and ``E_q[log p]`` for pairs of distributions, each with its own scale and mask.

``torch.distributions.kl_divergence`` knows the pairs; this file takes wrappers off (Independent, expand, mask, the same
bijection on both sides), refuses pairs whose registered form would be wrong, and weighs what remains::

    kl_prior = w_q E_q[log q] - w_p E_q[log p] = w KL(q || p)             where q and p have the same weight w,
                                               = w_p CE(q, p) - w_q H(q)  where they have not.

In the second case there is no weighted KL: with ``w_q = 1`` and ``w_p = 0.1`` any multiple of ``KL(q || p)`` is wrong.
All functions raise ``NotImplementedError``, with the reason as its message, where no closed form is known.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from pyro.distributions import MaskedDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.distributions.util import scale_and_mask, sum_rightmost
from torch import Tensor
from torch.distributions import (
    Distribution,
    Gumbel,
    HalfNormal,
    Independent,
    MultivariateNormal,
    Normal,
    Pareto,
    Transform,
    TransformedDistribution,
    Wishart,
    kl_divergence,
)
from torch.distributions import transforms as T

Scale = float | Tensor
Mask = bool | Tensor | None

_FIXED_TRANSFORMS = (
    T.ExpTransform,
    T.SigmoidTransform,
    T.TanhTransform,
    T.SoftplusTransform,
    T.StickBreakingTransform,
    T.LowerCholeskyTransform,
    T.PositiveDefiniteTransform,
    T.CorrCholeskyTransform,
)
_REGISTERED_IMAGES = (Gumbel, HalfNormal, Pareto)  # TransformedDistributions with closed forms of their own


class Weight(NamedTuple):
    """What multiplies a site's log density: Pyro's scale and mask."""

    scale: Scale
    mask: Mask

    def __call__(self, log_density: Tensor) -> Tensor:
        return scale_and_mask(log_density, self.scale, self.mask)

    def same_as(self, other: Weight) -> bool:
        """Whether the two are known to be equal without reading values from the device."""
        return _same(self.scale, other.scale) and _same(self.mask, other.mask)


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b
    return a == b


class Bare(NamedTuple):
    """A distribution without wrappers."""

    leaf: Distribution
    event_dims: int  # rightmost batch dims of the leaf that Independent sums over
    masks: tuple[tuple[Mask, int], ...]  # each with the event dims that had been taken off where it was found

    def same_masks_as(self, other: Bare) -> bool:
        return len(self.masks) == len(other.masks) and all(
            _same(a, b) and i == j for (a, i), (b, j) in zip(self.masks, other.masks, strict=True)
        )


class _Forms(NamedTuple):
    """Elementwise ``KL(q || p)`` of two leaves, the entropy of ``q`` if it is asked for, and the event dims still to sum."""

    kl: Tensor
    entropy: Callable[[], Tensor]
    event_dims: int


def kl_prior(q: Distribution, p: Distribution, q_weight: Weight, p_weight: Weight) -> tuple[Tensor, str]:
    """Weighted ``E_q[log q - log p]`` in closed form.

    Parameters
    ----------
    q, p : Distribution
        Guide's and model's distribution at the site, of equal batch and event shapes.
    q_weight, p_weight : Weight
        Scale and mask at the guide's and the model's site.

    Returns
    -------
    (Tensor, str)
        The value, of shape ``batch_shape``, in nats; and which form it is, in words.

    Raises
    ------
    NotImplementedError
        If no closed form is known; its message is the reason.
    """
    if q.batch_shape != p.batch_shape or q.event_shape != p.event_shape:
        raise NotImplementedError(
            f"shapes differ: guide {tuple(q.batch_shape)} | {tuple(q.event_shape)}, "
            f"model {tuple(p.batch_shape)} | {tuple(p.event_shape)}"
        )
    q_bare, p_bare = bare(q), bare(p)
    forms = _forms(q_bare, p_bare)
    pair = f"{_name(q_bare.leaf)} || {_name(p_bare.leaf)}"

    def total(elementwise: Tensor, bare: Bare, weight: Weight) -> Tensor:
        for mask, taken_off in bare.masks:
            inner = mask[(...,) + (None,) * (forms.event_dims - taken_off)] if isinstance(mask, Tensor) else mask
            elementwise = scale_and_mask(elementwise, mask=inner)
        return weight(sum_rightmost(elementwise, forms.event_dims).expand(q.batch_shape))

    if q_bare.same_masks_as(p_bare) and q_weight.same_as(p_weight):
        return total(forms.kl, p_bare, p_weight), f"closed form {pair}"
    try:
        entropy = forms.entropy()
    except NotImplementedError:
        raise NotImplementedError(
            f"scale or mask differ between guide and model, and the entropy of {_name(q_bare.leaf)} has no closed form"
        ) from None
    return (
        total(forms.kl + entropy, p_bare, p_weight) - total(entropy, q_bare, q_weight),
        f"cross-entropy minus entropy {pair}, for scale or mask differ between guide and model",
    )


def has_independent_elements(fn: Distribution) -> bool:
    """Whether the density is a product over the elements of the value: a Normal, or its image under a scalar bijection."""
    leaf = bare(fn).leaf
    if isinstance(leaf, TransformedDistribution) and not leaf.event_shape:
        leaf = bare(leaf.base_dist).leaf
    return isinstance(leaf, Normal)


def bare(fn: Distribution) -> Bare:
    event_dims = 0
    masks: list[tuple[Mask, int]] = []
    while True:
        if isinstance(fn, Independent):
            event_dims += fn.reinterpreted_batch_ndims
        elif isinstance(fn, MaskedDistribution):
            masks.append((fn._mask, event_dims))
        elif not isinstance(fn, ExpandedDistribution):
            return Bare(fn, event_dims, tuple(masks))
        fn = fn.base_dist


def _forms(q: Bare, p: Bare) -> _Forms:
    for leaf in (q.leaf, p.leaf):
        _check_own_density(leaf)
    # One vector-valued Gaussian, the other a product of scalar ones.
    for vector, product in ((q, p), (p, q)):
        if isinstance(vector.leaf, MultivariateNormal) and isinstance(product.leaf, Normal):
            if product.event_dims != vector.event_dims + 1 or vector.masks or product.masks:
                break
            kl = _kl_gaussians(q.leaf, p.leaf)
            if vector is q:
                return _Forms(kl, q.leaf.entropy, vector.event_dims)
            return _Forms(kl, lambda: q.leaf.entropy().sum(-1), vector.event_dims)
    if q.event_dims != p.event_dims:
        raise NotImplementedError(f"{_name(q.leaf)} and {_name(p.leaf)} have events of different structure")
    return _Forms(_kl_leaves(q.leaf, p.leaf), q.leaf.entropy, q.event_dims)


def _kl_leaves(q: Distribution, p: Distribution) -> Tensor:
    q_image, p_image = _as_image(q), _as_image(p)
    if q_image is not None and p_image is not None:
        transforms = q_image.transforms, p_image.transforms
        if len(transforms[0]) != len(transforms[1]) or not all(map(same_bijection, *transforms)):
            raise NotImplementedError(f"no closed form is known for {_name(q)} || {_name(p)}")
        base_q, base_p = bare(q_image.base_dist), bare(p_image.base_dist)
        if base_q.masks or base_p.masks:
            raise NotImplementedError("masked base distributions under a transform")
        forms = _forms(base_q, base_p)
        return sum_rightmost(forms.kl, forms.event_dims)
    if q_image is not None or p_image is not None:
        raise NotImplementedError(f"no closed form is known for {_name(q)} || {_name(p)}")
    if isinstance(q, Wishart):  # torch's generic exponential-family form drops the gradient of q's parameters
        raise NotImplementedError("torch's KL of Wishart has no gradient in the guide's parameters")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Ambiguous kl_divergence")
        try:
            return kl_divergence(q, p)
        except NotImplementedError:
            raise NotImplementedError(f"no closed form is known for {_name(q)} || {_name(p)}") from None


def _as_image(fn: Distribution) -> TransformedDistribution | None:
    """The distribution, if its closed forms are to be found through its base and transforms."""
    return fn if isinstance(fn, TransformedDistribution) and not isinstance(fn, _REGISTERED_IMAGES) else None


def _kl_gaussians(q: Distribution, p: Distribution) -> Tensor:
    """KL between Gaussians over vectors, of which one has independent components; shape of the batch."""
    if isinstance(q, MultivariateNormal):
        assert isinstance(p, Normal)
        tril, precision = q.scale_tril, p.scale.reciprocal()
        trace = (tril * precision.unsqueeze(-1)).square().sum((-1, -2))
        deviation = (q.loc - p.loc) * precision
        log_ratio = p.scale.log().expand(q.loc.shape).sum(-1) - tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    else:
        assert isinstance(q, Normal)
        assert isinstance(p, MultivariateNormal)
        tril, difference = p.scale_tril, (q.loc - p.loc).unsqueeze(-1)
        trace = torch.linalg.solve_triangular(tril, torch.diag_embed(q.scale), upper=False).square().sum((-1, -2))
        deviation = torch.linalg.solve_triangular(tril, difference, upper=False).squeeze(-1)
        log_ratio = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1) - q.scale.log().sum(-1)
    return 0.5 * (trace + deviation.square().sum(-1) - deviation.shape[-1]) + log_ratio


def same_bijection(a: Transform, b: Transform) -> bool:
    """Whether two transforms are the same fixed function, known without reading values from the device.

    Equality of the values of learnable parameters would not do: the KL does not depend on them only while they are equal,
    so its gradient would be lost.
    """
    if a is b:
        return True
    if isinstance(a, T.ComposeTransform) and isinstance(b, T.ComposeTransform):
        return len(a.parts) == len(b.parts) and all(map(same_bijection, a.parts, b.parts))
    if isinstance(a, T.IndependentTransform) and isinstance(b, T.IndependentTransform):
        same_dims = a.reinterpreted_batch_ndims == b.reinterpreted_batch_ndims
        return same_dims and same_bijection(a.base_transform, b.base_transform)
    if isinstance(a, T.AffineTransform) and isinstance(b, T.AffineTransform):
        return _same_constant(a.loc, b.loc) and _same_constant(a.scale, b.scale) and a.event_dim == b.event_dim
    if isinstance(a, T.PowerTransform) and isinstance(b, T.PowerTransform):
        return _same_constant(a.exponent, b.exponent)
    return type(a) is type(b) and isinstance(a, _FIXED_TRANSFORMS)


def _same_constant(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor) and not (a.requires_grad or b.requires_grad):
        if a.device.type == "cpu" and a.numel() == b.numel() == 1:
            return bool(a.item() == b.item())
        return a is b
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


def _check_own_density(leaf: Distribution) -> None:
    """A user's subclass that overrides ``log_prob`` inherits its parent's KL, which need not be its own."""
    owner = next(cls for cls in type(leaf).__mro__ if "log_prob" in vars(cls))
    if not owner.__module__.startswith(("torch.distributions.", "pyro.distributions.")):
        raise NotImplementedError(f"{_name(leaf)} overrides log_prob, so its parent's closed form need not hold")


def _name(fn: Distribution) -> str:
    name = type(fn).__name__
    if name != "TransformedDistribution":
        return name
    assert isinstance(fn, TransformedDistribution)
    return " through ".join(
        [_name(bare(fn.base_dist).leaf), *(type(transform).__name__ for transform in fn.transforms)]
    )
