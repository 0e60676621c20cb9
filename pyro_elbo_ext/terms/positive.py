"""Cross-entropies between distributions on the positive reals, by the moments of the guide's.

The log densities of the usual priors there are linear in ``log x``, its square and a power of ``x``; and the usual guides'
moments of these are known. So one table of guides and one of priors give all their pairs::

    log-normal     log x, (log x)^2            Weibull(scale, k)   log x, x^k
    gamma          log x, x                    half-normal         x^2
    inverse gamma  log x, 1/x                  exponential         x

``simplified`` names an image of a family by the family it is: the exponential of a Normal, the reciprocal of a Gamma.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from pyro.distributions import InverseGamma as PyroInverseGamma
from torch import Tensor
from torch.distributions import (
    Cauchy,
    Distribution,
    Exponential,
    Gamma,
    HalfCauchy,
    HalfNormal,
    InverseGamma,
    Laplace,
    LogNormal,
    Normal,
    Transform,
    TransformedDistribution,
    Weibull,
)
from torch.distributions import transforms as T

Number = float | Tensor
_EULER = 0.57721566490153286
_INVERSE_GAMMAS = (InverseGamma, PyroInverseGamma)
_NAMED = (LogNormal, HalfNormal, HalfCauchy, Weibull, *_INVERSE_GAMMAS)


class Moments(NamedTuple):
    """``E[log x]``, ``Var[log x]`` if it is asked for, and ``log E[x^k]`` as a function of ``k``; shape of the batch."""

    mean_log: Tensor
    var_log: Callable[[], Tensor]
    log_power: Callable[[Number], Tensor]


def cross_entropy(q: Distribution, p: Distribution) -> Tensor:
    """``-E_q[log p]`` of scalars, in nats, shape of the batches broadcast; infinite where the expectation is.

    Raises
    ------
    NotImplementedError
        If ``q`` or ``p`` is not among the families, or the expectation is infinite for all parameters.
    """
    moments = _moments(q)
    log_x = moments.mean_log
    if isinstance(p, LogNormal):
        square = moments.var_log() / p.scale / p.scale + ((log_x - p.loc) / p.scale).square()
        return log_x + p.scale.log() + 0.5 * math.log(2 * math.pi) + 0.5 * square
    if isinstance(p, Gamma):
        a, log_b = p.concentration, p.rate.log()
        return a.lgamma() - a * log_b - (a - 1) * log_x + (log_b + moments.log_power(1)).exp()
    if isinstance(p, Exponential):
        log_b = p.rate.log()
        return (log_b + moments.log_power(1)).exp() - log_b
    if isinstance(p, _INVERSE_GAMMAS):
        a, log_b = p.base_dist.concentration, p.base_dist.rate.log()
        return a.lgamma() - a * log_b + (a + 1) * log_x + (log_b + moments.log_power(-1)).exp()
    if isinstance(p, Weibull):
        k, log_scale = p.concentration, p.scale.log()
        return k * log_scale - k.log() - (k - 1) * log_x + (moments.log_power(k) - k * log_scale).exp()
    if isinstance(p, HalfNormal):
        log_scale = p.scale.log()
        return log_scale + 0.5 * math.log(math.pi / 2) + 0.5 * (moments.log_power(2) - 2 * log_scale).exp()
    raise NotImplementedError


def entropy(fn: Distribution) -> Tensor:
    """Entropy in nats, shape of the batch; NotImplementedError if there is no closed form."""
    fn = simplified(fn)
    if isinstance(fn, _INVERSE_GAMMAS):  # Pyro's has none
        a = fn.base_dist.concentration
        return a + fn.base_dist.rate.log() + a.lgamma() - (1 + a) * a.digamma()
    return fn.entropy()


def _moments(q: Distribution) -> Moments:
    if isinstance(q, LogNormal):
        m, s = q.loc, q.scale
        return Moments(m, s.square, lambda k: k * m + 0.5 * (k * s).square())
    if isinstance(q, Exponential):
        return _gamma(torch.ones_like(q.rate), q.rate.log(), least=-1)
    if isinstance(q, Gamma):
        return _gamma(q.concentration, q.rate.log())
    if isinstance(q, _INVERSE_GAMMAS):
        of_reciprocal = _gamma(q.base_dist.concentration, q.base_dist.rate.log())
        return of_reciprocal._replace(mean_log=-of_reciprocal.mean_log, log_power=lambda k: of_reciprocal.log_power(-k))
    if isinstance(q, HalfNormal):  # its square is a Gamma
        square = _gamma(torch.full_like(q.scale, 0.5), -math.log(2) - 2 * q.scale.log(), least=-0.5)
        return Moments(0.5 * square.mean_log, lambda: 0.25 * square.var_log(), lambda k: square.log_power(0.5 * k))
    if isinstance(q, Weibull):  # its power is an Exponential
        c, log_scale = q.concentration, q.scale.log()
        unit = _gamma(torch.ones_like(c), torch.zeros_like(c))
        return Moments(
            log_scale - _EULER / c,
            lambda: math.pi**2 / (6 * c.square()),
            lambda k: k * log_scale + unit.log_power(k / c),
        )
    if isinstance(q, HalfCauchy):

        def no_power(k: Number) -> Tensor:
            raise NotImplementedError("the KL of a HalfCauchy to such a prior is infinite, or has no closed form")

        return Moments(q.scale.log(), lambda: torch.full_like(q.scale, math.pi**2 / 4), no_power)
    raise NotImplementedError


def _gamma(a: Tensor, log_b: Tensor, least: float = -math.inf) -> Moments:
    """Of a Gamma, from the logarithm of its rate; powers of ``least`` and below have an infinite mean for any parameters."""

    def log_power(k: Number) -> Tensor:
        if not isinstance(k, Tensor) and k <= least:
            raise NotImplementedError("the KL to this prior is infinite, whatever the parameters")
        is_finite = a + k > 0
        shifted = torch.where(is_finite, a + k, 1.0)
        return torch.where(is_finite, shifted.lgamma() - a.lgamma() - k * log_b, math.inf)

    return Moments(a.digamma() - log_b, lambda: torch.special.polygamma(1, a), log_power)


# ----------------------------------------------------------------------------------------------------------------------
# Images of families that are families


def simplified(fn: Distribution, is_known: Callable[[Distribution], bool] = lambda fn: True) -> Distribution:
    """The distribution itself, or the same one by the name of a family.

    Parameters
    ----------
    fn
        A distribution of scalars.
    is_known
        Whether the density of a base distribution is that of its class.
    """
    if not isinstance(fn, TransformedDistribution) or isinstance(fn, _NAMED) or fn.event_shape:
        return fn
    found: Distribution | None = simplified(fn.base_dist, is_known)
    if not is_known(fn.base_dist):
        return fn
    for transform in _flat(fn.transforms):
        found = _image(found, transform)
        if found is None:
            return fn
    assert found is not None
    return found


def _flat(transforms: list[Transform]) -> list[Transform]:
    parts: list[Transform] = []
    for transform in transforms:
        parts += _flat(transform.parts) if isinstance(transform, T.ComposeTransform) else [transform]
    return parts


def _image(fn: Distribution | None, transform: Transform) -> Distribution | None:
    if type(transform) is T.ExpTransform:
        return LogNormal(fn.loc, fn.scale, validate_args=False) if isinstance(fn, Normal) else None
    if type(transform) is T.PowerTransform:
        exponent = constant(transform.exponent)
        return None if exponent is None else _power(fn, exponent)
    if type(transform) is not T.AffineTransform or transform.event_dim:
        return None
    if isinstance(fn, Normal | Laplace | Cauchy):
        factor = torch.as_tensor(transform.scale)
        loc, scale = transform.loc + factor * fn.loc, factor.abs() * fn.scale
        family = next(family for family in (Normal, Laplace, Cauchy) if isinstance(fn, family))
        return family(loc, scale, validate_args=False)
    shift, multiple = constant(transform.loc), constant(transform.scale)
    return _scaled(fn, multiple) if shift == 0 and multiple is not None and multiple > 0 else None


def _power(fn: Distribution | None, k: float) -> Distribution | None:
    if isinstance(fn, LogNormal) and k != 0:
        return LogNormal(k * fn.loc, abs(k) * fn.scale, validate_args=False)
    if isinstance(fn, Gamma) and k == -1:
        return InverseGamma(fn.concentration, fn.rate, validate_args=False)
    if isinstance(fn, _INVERSE_GAMMAS) and k == -1:
        return Gamma(fn.base_dist.concentration, fn.base_dist.rate, validate_args=False)
    if isinstance(fn, Exponential) and k > 0:
        return Weibull(fn.rate**-k, torch.full_like(fn.rate, 1 / k), validate_args=False)
    if isinstance(fn, Weibull) and k > 0:
        return Weibull(fn.scale**k, fn.concentration / k, validate_args=False)
    return None


def _scaled(fn: Distribution | None, c: float) -> Distribution | None:
    if isinstance(fn, LogNormal):
        return LogNormal(fn.loc + math.log(c), fn.scale, validate_args=False)
    if isinstance(fn, Exponential):
        return Exponential(fn.rate / c, validate_args=False)
    if isinstance(fn, Gamma):
        return Gamma(fn.concentration, fn.rate / c, validate_args=False)
    if isinstance(fn, _INVERSE_GAMMAS):
        return InverseGamma(fn.base_dist.concentration, c * fn.base_dist.rate, validate_args=False)
    if isinstance(fn, Weibull):
        return Weibull(c * fn.scale, fn.concentration, validate_args=False)
    if isinstance(fn, HalfNormal):
        return HalfNormal(c * fn.scale, validate_args=False)
    return HalfCauchy(c * fn.scale, validate_args=False) if isinstance(fn, HalfCauchy) else None


def constant(value: object) -> float | None:
    """The number, if all elements are one that is known without waiting for a device and is not learned; else None."""
    if not isinstance(value, Tensor):
        return float(value)  # type: ignore[arg-type]
    if value.requires_grad or value.device.type != "cpu" or not value.numel():
        return None
    if value.numel() > 1 and any(value.stride()[i] for i in range(value.dim()) if value.shape[i] > 1):
        return None
    try:
        return float(value[(0,) * value.dim()].item())
    except RuntimeError:  # in a run that is traced or batched, where it may depend on the inputs
        return None
