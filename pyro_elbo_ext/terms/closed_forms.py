"""Closed-form ``E_q[log q]`` and ``E_q[log p]`` for pairs of distributions, each with its own scale and mask.

``torch.distributions.kl_divergence`` knows the pairs; this file takes wrappers off (Independent, expand, mask, the same
bijection on both sides), refuses pairs whose registered form would be wrong, and weighs what remains::

    kl_prior = w_q E_q[log q] - w_p E_q[log p] = w KL(q || p)             where q and p have the same weight w,
                                               = w_p CE(q, p) - w_q H(q)  where they have not.

In the second case there is no weighted KL: with ``w_q = 1`` and ``w_p = 0.1`` any multiple of ``KL(q || p)`` is wrong.
All functions raise ``NotImplementedError``, with the reason as its message, where no closed form is known.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro.distributions import Delta, ImproperUniform, MaskedDistribution
from pyro.distributions import TransformedDistribution as PyroTransformedDistribution
from pyro.distributions.distribution import Distribution as PyroDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.distributions.util import scale_and_mask, sum_rightmost
from torch import Tensor
from torch.distributions import (
    Cauchy,
    Distribution,
    ExponentialFamily,
    HalfCauchy,
    Independent,
    LowRankMultivariateNormal,
    Multinomial,
    MultivariateNormal,
    Normal,
    Transform,
    TransformedDistribution,
    Wishart,
    kl_divergence,
)
from torch.distributions import transforms as T
from torch.distributions.kl import _KL_REGISTRY, _dispatch_kl

from pyro_elbo_ext.terms import positive
from pyro_elbo_ext.terms.double import in_double

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
_VECTOR_GAUSSIANS = (MultivariateNormal, LowRankMultivariateNormal)
_PLAIN_IMAGES = (TransformedDistribution, PyroTransformedDistribution)
# Registered for what any image, exponential family or point mass has in common. Torch's for exponential families has no
# gradient in the guide's parameters; Pyro's for point masses leaves out their density.
_GENERIC = (
    (TransformedDistribution, TransformedDistribution),
    (ExponentialFamily, ExponentialFamily),
    (Delta, PyroDistribution),
    (Independent, Independent),
    (Independent, MultivariateNormal),
)


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
    """Whether the density is a product over the elements of the value."""
    leaf = _elementwise(bare(fn)).leaf
    return not leaf.event_shape or isinstance(leaf, ImproperUniform)


def bare(fn: Distribution) -> Bare:
    event_dims = 0
    masks: list[tuple[Mask, int]] = []
    while has_density_of_its_class(fn):
        if isinstance(fn, Independent):
            event_dims += fn.reinterpreted_batch_ndims
        elif isinstance(fn, MaskedDistribution):
            masks.append((fn._mask, event_dims))
        elif not isinstance(fn, ExpandedDistribution):
            break
        fn = fn.base_dist
    return Bare(fn, event_dims, tuple(masks))


def _forms(q: Bare, p: Bare) -> _Forms:
    if q.event_dims == p.event_dims:
        registered = registered_kl(q.leaf, p.leaf)
        if registered is not None:
            return _Forms(registered, _entropy_of(q.leaf), q.event_dims)
    if isinstance(q.leaf, Delta):
        return _forms_of_point(q.leaf, q, p)
    for leaf in (q.leaf, p.leaf):
        if not has_density_of_its_class(leaf):
            raise NotImplementedError(f"{_name(leaf)} overrides log_prob, so its parent's closed form need not hold")
    q, p = _elementwise(q), _elementwise(p)
    if isinstance(p.leaf, ImproperUniform) and not p.masks:  # whose log density is 0
        entropy = _entropy_of(q.leaf)
        return _Forms(-entropy(), entropy, q.event_dims)
    # One vector-valued Gaussian, the other a product of scalar ones.
    for vector, product in ((q, p), (p, q)):
        if isinstance(vector.leaf, _VECTOR_GAUSSIANS) and not product.leaf.event_shape:
            if product.event_dims != vector.event_dims + 1 or vector.masks or product.masks:
                break
            if vector is q:
                return _Forms(in_double(_kl_vector, q.leaf, p.leaf), _entropy_of(q.leaf), vector.event_dims)
            if isinstance(q.leaf, Normal):
                kl = in_double(_kl_gaussians, q.leaf, p.leaf)
                return _Forms(kl, lambda: q.leaf.entropy().sum(-1), vector.event_dims)
    if q.event_dims != p.event_dims:
        raise NotImplementedError(f"{_name(q.leaf)} and {_name(p.leaf)} have events of different structure")
    return _Forms(_kl_leaves(q.leaf, p.leaf), _entropy_of(q.leaf), q.event_dims)


def _forms_of_point(point: Delta, q: Bare, p: Bare) -> _Forms:
    if q.event_dims == p.event_dims:
        return _Forms(point.log_density - p.leaf.log_prob(point.v), lambda: -point.log_density, q.event_dims)
    if q.masks or p.masks:
        raise NotImplementedError(f"masked events of {_name(p.leaf)} and Delta have different structure")
    log_density = sum_rightmost(point.log_density, q.event_dims)
    log_p = sum_rightmost(p.leaf.log_prob(point.v), p.event_dims)
    return _Forms(log_density - log_p, lambda: -log_density, 0)


def _elementwise(fn: Bare) -> Bare:
    """The same, with an Independent under scalar bijections taken off too: ``Normal.to_event(1)`` through ``exp``."""
    leaf: Any = fn.leaf
    if type(leaf) not in _PLAIN_IMAGES or not isinstance(leaf.base_dist, Independent):
        return fn
    if any(transform.domain.event_dim or transform.codomain.event_dim for transform in leaf.transforms):
        return fn
    base = leaf.base_dist
    image = TransformedDistribution(base.base_dist, leaf.transforms, validate_args=False)
    return _elementwise(fn._replace(leaf=image, event_dims=fn.event_dims + base.reinterpreted_batch_ndims))


def _entropy_of(leaf: Distribution) -> Callable[[], Tensor]:
    def entropy() -> Tensor:
        if not has_density_of_its_class(leaf, "entropy"):
            raise NotImplementedError
        return in_double(positive.entropy, leaf)

    return entropy


def _kl_leaves(q: Distribution, p: Distribution) -> Tensor:
    registered = registered_kl(q, p)
    if registered is not None:
        return registered
    if isinstance(q, TransformedDistribution) and isinstance(p, TransformedDistribution):
        transforms = q.transforms, p.transforms
        if len(transforms[0]) == len(transforms[1]) and all(map(same_bijection, *transforms)):
            base_q, base_p = bare(q.base_dist), bare(p.base_dist)
            if base_q.masks or base_p.masks:
                raise NotImplementedError("masked base distributions under a transform")
            forms = _forms(base_q, base_p)
            return sum_rightmost(forms.kl, forms.event_dims)
    return in_double(_kl_families, q, p)


def _kl_families(q: Distribution, p: Distribution) -> Tensor:
    simple_q, simple_p = (positive.simplified(fn, has_density_of_its_class) for fn in (q, p))
    if simple_q is not q or simple_p is not p:
        return _kl_leaves(simple_q, simple_p)
    unknown = f"no closed form is known for {_name(q)} || {_name(p)}"
    if isinstance(q, Wishart) and isinstance(p, Wishart):
        raise NotImplementedError("torch's KL of Wishart has no gradient in the guide's parameters")
    if isinstance(q, HalfCauchy) and isinstance(p, HalfCauchy):  # folded at 0, as the Cauchys are symmetric about it
        return kl_divergence(Cauchy(0.0, q.scale, validate_args=False), Cauchy(0.0, p.scale, validate_args=False))
    if isinstance(q, Multinomial) and isinstance(p, Multinomial):
        if q.total_count != p.total_count:
            raise NotImplementedError(f"{unknown} with different total counts")
        return q.total_count * kl_divergence(q._categorical, p._categorical)
    try:
        return positive.cross_entropy(q, p) - positive.entropy(q)
    except NotImplementedError as reason:
        raise NotImplementedError(f"{unknown}: {reason}" if str(reason) else unknown) from None


def registered_kl(q: Distribution, p: Distribution) -> Tensor | None:
    """The KL that torch's dispatch finds, if it is one of these densities; else None.

    A class that overrides ``log_prob`` needs one registered for itself, or for a class between; its parent's need not hold.
    """
    classes: Any = type(q), type(p)
    pair = _registered_pair(*classes, len(_KL_REGISTRY))
    if pair is None:
        return None
    function: Callable[..., Tensor] = _KL_REGISTRY[pair]
    try:
        return in_double(function, q, p) if _is_of_library(function) else function(q, p)
    except NotImplementedError:
        return None


@functools.lru_cache(maxsize=1024)
def _registered_pair(q: type, p: type, registered: int) -> tuple[type, type] | None:
    """The classes whose KL torch's dispatch takes, of so many that are registered, if it is to be used."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Ambiguous kl_divergence")
        function = _dispatch_kl(q, p)
    for pair, other in _KL_REGISTRY.items():
        matches = other is function and issubclass(q, pair[0]) and issubclass(p, pair[1]) and pair not in _GENERIC
        if matches and _speaks_for(pair[0], q) and _speaks_for(pair[1], p):
            return pair
    return None


def _speaks_for(registered: type, cls: type) -> bool:
    owner = _owner(cls, "log_prob")
    return _is_of_library(owner) or issubclass(registered, owner)


@functools.lru_cache(maxsize=1024)
def _owner(cls: type, method: str) -> type:
    return next(parent for parent in cls.__mro__ if method in vars(parent))


def _is_of_library(what: type | Callable[..., Any]) -> bool:
    return what.__module__.startswith(("torch.distributions.", "pyro.distributions."))


def has_density_of_its_class(leaf: Distribution, method: str = "log_prob") -> bool:
    """Whether ``method`` is known to be that of the density: torch's or Pyro's own, or the user's for both."""
    cls: Any = type(leaf)
    owner = _owner(cls, "log_prob")
    return _is_of_library(owner) or (method != "log_prob" and issubclass(_owner(cls, method), owner))


def _kl_vector(q: Distribution, p: Distribution) -> Tensor:
    """KL of a Gaussian over vectors to a product of scalar densities, which takes its marginals only."""
    if isinstance(q, MultivariateNormal) and isinstance(p, Normal):
        return _kl_gaussians(q, p)
    marginals = Normal(q.mean, q.variance.sqrt(), validate_args=False)
    return (_kl_leaves(marginals, p) + marginals.entropy()).sum(-1) - q.entropy()


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
        assert isinstance(p, _VECTOR_GAUSSIANS)
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
    if type(a) is not type(b):
        return False
    if type(a) is T.ComposeTransform and isinstance(b, T.ComposeTransform):
        return len(a.parts) == len(b.parts) and all(map(same_bijection, a.parts, b.parts))
    if type(a) is T.IndependentTransform and isinstance(b, T.IndependentTransform):
        same_dims = a.reinterpreted_batch_ndims == b.reinterpreted_batch_ndims
        return same_dims and same_bijection(a.base_transform, b.base_transform)
    if type(a) is T.AffineTransform and isinstance(b, T.AffineTransform):
        return _same_constant(a.loc, b.loc) and _same_constant(a.scale, b.scale) and a.event_dim == b.event_dim
    if type(a) is T.PowerTransform and isinstance(b, T.PowerTransform):
        return _same_constant(a.exponent, b.exponent)
    return type(a) in _FIXED_TRANSFORMS  # not a subclass, which may have parameters


def _same_constant(a: object, b: object) -> bool:
    if a is b:
        return True
    number = positive.constant(a)
    return number is not None and number == positive.constant(b)


def _name(fn: Distribution) -> str:
    name = type(fn).__name__
    if name != "TransformedDistribution":
        return name
    assert isinstance(fn, TransformedDistribution)
    return " through ".join(
        [_name(bare(fn.base_dist).leaf), *(type(transform).__name__ for transform in fn.transforms)]
    )
