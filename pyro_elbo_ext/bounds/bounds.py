"""Bounds on ``log p(x)`` as functions of the log weights of K particles: plain torch, no Pyro.

With ``log w_k = log p(x, z_k) - log q(z_k)`` for independent draws ``z_k`` of the guide, a bound is a function
``f(log w_1, ..., log w_K)`` whose expectation lies on one side of ``log p(x)``. The estimators in
:mod:`pyro_elbo_ext.bounds.gradients` need its first derivative and, for some, its curvature; both have defaults by
autograd, so a new bound is a class with a ``value``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from pyro_elbo_ext.programs.arguments import check_number

Side = Literal["lower", "upper"]


class Bound(ABC):
    """A function of the log weights that is symmetric in the particles and shifts with them, ``f(l + c) = f(l) + c``.

    Attributes
    ----------
    side : {"lower", "upper"}
        Which side of ``log p(x)`` its expectation lies on; an upper bound may need infinitely many particles for that.
    linear : bool
        Whether it is the mean, so that sites, plates and scales can be taken apart.
    """

    side: Side = "lower"
    linear: bool = False

    @abstractmethod
    def value(self, log_weights: Tensor) -> Tensor:
        """The bound, in nats: shape ``(K, *B)`` to ``(*B)``."""

    def gradient(self, log_weights: Tensor) -> Tensor:
        """``d value / d log_weights``, shape ``(K, *B)``; sums to 1 over the particles."""
        with torch.enable_grad():
            leaf = log_weights.detach().requires_grad_()
            return torch.autograd.grad(self.value(leaf).sum(), leaf)[0]

    def curvature(self, log_weights: Tensor) -> Tensor:
        """Diagonal of the Hessian, ``d^2 value / d log_weights[k]^2``, shape ``(K, *B)``."""
        with torch.enable_grad():
            leaf = log_weights.detach().requires_grad_()
            (first,) = torch.autograd.grad(self.value(leaf).sum(), leaf, create_graph=True)
            if not first.requires_grad:  # linear
                return torch.zeros_like(leaf)
            seconds = [torch.autograd.grad(one.sum(), leaf, retain_graph=True)[0][k] for k, one in enumerate(first)]
            return torch.stack(seconds)

    def leave_one_out(self, log_weights: Tensor) -> tuple[Tensor, Tensor]:
        """Value and own derivative when particle k's log weight is replaced by the mean of the others', for each k.

        Neither depends on particle k, so both serve as control variates for its score (Mnih and Rezende 2016,
        "Variational inference for Monte Carlo objectives"). Both have shape ``(K, *B)``; K must be at least 2.
        """
        count = len(log_weights)
        own = torch.eye(count, dtype=torch.bool, device=log_weights.device)
        own = own.reshape(count, count, *(1,) * (log_weights.dim() - 1))
        others = log_weights.unsqueeze(1).expand(count, count, *log_weights.shape[1:])
        mean = others.masked_fill(own, 0.0).sum(0) / (count - 1)
        replaced = torch.where(own, mean.unsqueeze(0), others)
        return self.value(replaced), self.gradient(replaced).diagonal(dim1=0, dim2=1).movedim(-1, 0)


@dataclass(frozen=True)
class ELBO(Bound):
    """The mean of the log weights, ``log p(x) - KL(q || posterior)`` in expectation."""

    linear = True

    def value(self, log_weights: Tensor) -> Tensor:
        return log_weights.mean(0)

    def gradient(self, log_weights: Tensor) -> Tensor:
        return torch.full_like(log_weights, 1 / len(log_weights))

    def curvature(self, log_weights: Tensor) -> Tensor:
        return torch.zeros_like(log_weights)

    def leave_one_out(self, log_weights: Tensor) -> tuple[Tensor, Tensor]:
        count = len(log_weights)
        mean = (log_weights.sum(0) - log_weights) / (count - 1)
        return mean, self.gradient(log_weights)


class _LogPowerMean(Bound):
    r"""``(1 / t) log mean_k w_k^t``; its gradient are the normalized ``w_k^t``."""

    @property
    @abstractmethod
    def power(self) -> float:
        """The exponent ``t``; 0 stands for the limit, the mean of the log weights."""

    def value(self, log_weights: Tensor) -> Tensor:
        power = self.power
        if power == 0 or len(log_weights) == 1:
            return log_weights.mean(0)
        by_sum = (torch.logsumexp(power * log_weights, 0) - math.log(len(log_weights))) / power
        if abs(power) >= 0.1:
            return by_sum
        # the division by a small power would amplify the rounding of the logarithm; this form does not cancel
        top = log_weights.amax(0)
        spread = power * (log_weights - top)
        by_expansion = top + torch.log1p(torch.expm1(spread).mean(0)) / power
        return torch.where(spread.abs().amax(0) < 0.5, by_expansion, by_sum)

    def gradient(self, log_weights: Tensor) -> Tensor:
        return torch.softmax(self.power * log_weights, 0)

    def curvature(self, log_weights: Tensor) -> Tensor:
        share = self.gradient(log_weights)
        return self.power * share * (1 - share)

    def leave_one_out(self, log_weights: Tensor) -> tuple[Tensor, Tensor]:
        if self.power == 0:
            return super().leave_one_out(log_weights)
        count = len(log_weights)
        scaled = self.power * log_weights
        # sums over the others from both sides, since a difference of sums would cancel
        nothing = torch.full_like(scaled[:1], -torch.inf)
        below = torch.cat([nothing, torch.logcumsumexp(scaled, 0)[:-1]])
        above = torch.cat([torch.logcumsumexp(scaled.flip(0), 0).flip(0)[1:], nothing])
        total = torch.cumsum(log_weights, 0)
        before = torch.cat([torch.zeros_like(scaled[:1]), total[:-1]])
        after = torch.cat([torch.cumsum(log_weights.flip(0), 0).flip(0)[1:], torch.zeros_like(scaled[:1])])
        own = self.power * (before + after) / (count - 1)
        everything = torch.logaddexp(torch.logaddexp(below, above), own)
        return (everything - math.log(count)) / self.power, torch.exp(own - everything)


@dataclass(frozen=True)
class IWAE(_LogPowerMean):
    """``log mean_k w_k``: tightens to ``log p(x)`` with K (Burda, Grosse and Salakhutdinov 2016)."""

    power = 1.0


@dataclass(frozen=True)
class Renyi(_LogPowerMean):
    """``(1 / (1 - alpha)) log mean_k w_k^(1 - alpha)`` (Li and Turner 2016, "Renyi divergence variational inference").

    ``alpha=0`` is IWAE, ``alpha=1`` (the limit) the ELBO, ``alpha > 1`` lies below the ELBO. For ``alpha < 0`` it is an
    upper bound with infinitely many particles, and neither with few.
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha)
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha must be a finite number, not {self.alpha!r}")

    @property
    def power(self) -> float:
        return 1.0 - self.alpha

    @property
    def linear(self) -> bool:  # type: ignore[override]
        return self.alpha == 1

    @property
    def side(self) -> Side:  # type: ignore[override]
        return "lower" if self.alpha >= 0 else "upper"


@dataclass(frozen=True)
class CUBO(_LogPowerMean):
    """``(1 / n) log mean_k w_k^n`` with ``n > 1``, the chi upper bound (Dieng et al. 2017).

    It is an upper bound with infinitely many particles; with K it is biased downwards, and by much if the weights have heavy
    tails.
    """

    n: float = 2.0
    side = "upper"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.n) and self.n > 1):
            raise ValueError(f"n must be a finite number greater than 1, not {self.n!r}: up to 1 it is no upper bound")

    @property
    def power(self) -> float:
        return float(self.n)


@dataclass(frozen=True)
class TVO(Bound):
    r"""Thermodynamic variational objective (Masrani, Le and Wood 2019): a Riemann sum of

    .. math:: \log p(x) = \int_0^1 \mathrm E_{\pi_\beta}[\log w] \, d\beta, \qquad \pi_\beta \propto q\, w^\beta.

    The integrand increases with beta: its values at the left ends of the intervals give a lower sum, at the right ends an
    upper one. The expectations are self-normalized over the K particles, so the sums are bounds as K grows. One
    interval from 0 to 1 has the ELBO as its lower sum.

    Parameters
    ----------
    betas : tuple of float
        Ends of the intervals, increasing from 0 to 1.
    side : {"lower", "upper"}
        Which sum.
    """

    betas: tuple[float, ...] = (0.0, 0.03, 0.1, 0.3, 1.0)
    side: Side = "lower"

    def __post_init__(self) -> None:
        betas = self.betas
        increasing = all(left < right for left, right in pairwise(betas))
        if len(betas) < 2 or betas[0] != 0 or betas[-1] != 1 or not increasing:
            raise ValueError(f"betas must increase from 0 to 1, not {betas!r}")
        if self.side not in ("lower", "upper"):
            raise ValueError(f"side must be 'lower' or 'upper', not {self.side!r}")

    def _terms(self, log_weights: Tensor) -> list[tuple[float, float, Tensor, Tensor]]:
        """For each interval: its length, its beta, the normalized ``w^beta`` and the mean of the log weights under them."""
        terms = []
        for left, right in pairwise(self.betas):
            beta = left if self.side == "lower" else right
            share = torch.softmax(beta * log_weights, 0) if beta else torch.full_like(log_weights, 1 / len(log_weights))
            # a weight of zero has no share, and 0 * -inf would be NaN
            weighted = torch.where(share == 0, 0.0, share * log_weights)
            terms.append((right - left, beta, share, weighted.sum(0)))
        return terms

    def value(self, log_weights: Tensor) -> Tensor:
        return torch.stack([length * mean for length, _, _, mean in self._terms(log_weights)]).sum(0)

    def gradient(self, log_weights: Tensor) -> Tensor:
        slopes = [
            length * _slope(beta, share, log_weights - mean) for length, beta, share, mean in self._terms(log_weights)
        ]
        return torch.stack(slopes).sum(0)

    def curvature(self, log_weights: Tensor) -> Tensor:
        total = torch.zeros_like(log_weights)
        for length, beta, share, mean in self._terms(log_weights):
            slope = _slope(beta, share, log_weights - mean)
            total = total + length * beta * ((1 - share) * slope + share * (1 - slope))
        return total


def _slope(beta: float, share: Tensor, deviation: Tensor) -> Tensor:
    """Derivative of the mean log weight under ``share = softmax(beta * log_weights)``."""
    return torch.where(share == 0, 0.0, share * (1 + beta * deviation))
