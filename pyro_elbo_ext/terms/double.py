"""Closed forms in double precision where single precision loses them.

Most KLs are small differences of large terms: of ``Beta(1e5, 1e5) || Beta(1, 1)``, 5.376, the terms are near 1e6, so that in
single precision 5.25 comes out. The form is therefore taken of a copy of the distributions whose parameters are in double
precision, and given back in the precision it would have had; gradients go the same way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributions import (
    Categorical,
    Cauchy,
    Distribution,
    Exponential,
    HalfCauchy,
    HalfNormal,
    LogNormal,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
)
from torch.distributions.utils import lazy_property

# Forms between these lose nothing: within 1e-5 of the value, and of the gradient, in single precision.
_EXACT = (Normal, MultivariateNormal, LogNormal, HalfNormal, Cauchy, HalfCauchy, Exponential)
_WITHOUT_DOUBLE = ("mps",)  # devices


def in_double(form: Callable[..., Tensor], *distributions: Distribution) -> Tensor:
    """``form`` of the distributions, computed in double precision where that matters and the device has it."""
    if all(isinstance(fn, _EXACT) for fn in distributions):
        return form(*distributions)
    parameters = [tensor for fn in distributions for tensor in _parameters(fn)]
    if all(tensor.dtype == torch.double or tensor.device.type in _WITHOUT_DOUBLE for tensor in parameters):
        return form(*distributions)
    dtype = parameters[0].dtype
    for tensor in parameters[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return form(*map(_double, distributions)).to(dtype)


def _parameters(fn: Distribution) -> Iterator[Tensor]:
    for value in vars(fn).values():
        if isinstance(value, Distribution):
            yield from _parameters(value)
        elif isinstance(value, Tensor) and value.is_floating_point():
            yield value


def _double(fn: Distribution) -> Distribution:
    """The same distribution with its parameters in double precision; what was worked out from them is left out."""
    if isinstance(fn, LowRankMultivariateNormal):  # which keeps a Cholesky factor of its parameters
        loc, factor, diagonal = fn.loc, fn._unbroadcasted_cov_factor, fn._unbroadcasted_cov_diag
        return LowRankMultivariateNormal(loc.double(), factor.double(), diagonal.double(), validate_args=False)
    wide: Any = copy.copy(fn)
    lazy = [name for name in vars(fn) if isinstance(getattr(type(fn), name, None), lazy_property)]
    given = vars(fn).get("_param", vars(fn)[lazy[0]] if lazy else None)
    for name, value in vars(fn).items():
        if isinstance(value, Distribution):
            setattr(wide, name, _double(value))
        elif name in lazy and value is not given:
            delattr(wide, name)
        elif isinstance(value, Tensor) and value.is_floating_point():
            setattr(wide, name, value.double())
    if isinstance(fn, Categorical):  # normalized to single precision
        if "probs" in vars(wide):
            wide.probs = wide.probs / wide.probs.sum(-1, keepdim=True)
        else:
            wide.logits = wide.logits - wide.logits.logsumexp(-1, keepdim=True)
    return wide
