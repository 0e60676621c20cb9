r"""Estimators of a bound's gradient.  None of them changes the bound's value.

The objective of K particles is ``L = E[f(l_1, ..., l_K)]`` with ``l_k = log p(x, z_k) - log q(z_k)``. Its gradient has three
parts: the *path* from the parameters through the draws into ``l``, the *direct* dependence of the densities on the
parameters, and, for draws without a path, the *score* ``grad log q``. With ``g_k = df/dl_k`` and ``h_k = d^2 f/dl_k^2``

- model parameters only have the direct part, with weight ``g_k``, under every estimator;
- for a draw with a path the direct part of ``log q`` is a score, which may be traded for a path:
  ``E[g_k grad log q(z_k)] = E[h_k (dl_k/dz_k) (dz_k/dphi)]``, leaving the path with weight ``g_k - h_k``;
- for a draw without one, ``grad log q(z_k)`` has the coefficient ``(f - b_k) - (g_k - c_k)``, where ``b_k`` and ``c_k`` are
  any numbers that do not depend on ``z_k``: here ``f`` and ``g_k`` with ``l_k`` replaced by the mean of the others;
- if it depends on a draw with a path, whose score has been traded, its ``log q`` has the same coefficient along the path.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from pyro_elbo_ext.bounds.bounds import Bound

GradientName = Literal["pathwise", "doubly_reparameterized", "score_function", "vargrad"]


@dataclass(slots=True)
class Path:
    """A reparameterized draw and the detached copy of it that the densities were evaluated at.

    ``particle`` is its index, or None if dimension 0 of both tensors is the particle.
    """

    draw: Tensor
    leaf: Tensor
    particle: int | None


@dataclass(slots=True)
class Weights:
    """Log weights of K particles, shape ``(K, *B)`` each, with their graphs, and what the estimators need beside them.

    Attributes
    ----------
    log_weights : Tensor
        ``l_k``: as it stands for the estimators that take it whole, or evaluated at the leaves of ``paths``.
    direct : Tensor or None
        The part of ``log_weights`` whose direct gradient stays if the paths are taken separately: ``log p`` and the
        Jacobians of Delta sites.
    scored : Tensor or None
        ``log q`` of the draws without a path, as it enters ``log_weights`` (scaled and masked).
    scores : Tensor or None
        The score terms of those draws: ``log q``, neither scaled nor masked.
    corrections : Tensor or None
        Score terms of draws whose path is incomplete, such as those made by rejection sampling.
    paths : list of Path
        The reparameterized draws, for :class:`DoublyReparameterized`.
    score_shares : Tensor or None
        For a bound that is linear, all score terms with their coefficients, shape ``(K,)``: each score then has the cost of
        its own plates alone. None otherwise.
    """

    log_weights: Tensor
    direct: Tensor | None = None
    scored: Tensor | None = None
    scores: Tensor | None = None
    corrections: Tensor | None = None
    paths: list[Path] = field(default_factory=list)
    score_shares: Tensor | None = None

    @property
    def has_scores(self) -> bool:
        """Whether there are draws without a path, or with an incomplete one."""
        return self.scores is not None or self.corrections is not None


class Gradient(ABC):
    """How the gradient of a bound is estimated.

    Attributes
    ----------
    name : str
        What users call it.
    detach_draws : bool
        Whether the guide's draws are constants to the densities, so that no draw has a path.
    separate_paths : bool
        Whether the densities are evaluated a second time at detached draws, to tell paths from direct dependence.
    """

    name: ClassVar[str]
    detach_draws: ClassVar[bool] = False
    separate_paths: ClassVar[bool] = False

    @abstractmethod
    def surrogate(self, weights: Weights, bound: Bound) -> Tensor:
        """Each particle's share of the surrogate, shape ``(K, *B)`` or ``(K,)``.

        The gradient of their sum is the estimate of the bound's.
        """

    def check(self, bound: Bound, num_particles: int) -> None:  # noqa: B027 - most work for every bound
        """Raise ValueError, saying what to do, if the estimator does not work for this bound."""


class Pathwise(Gradient):
    """Through the draws where they are reparameterized, score function with leave-one-out baseline elsewhere.

    With IWAE the latter is VIMCO, with a control variate for the direct part too, so that it vanishes where all weights
    are equal.
    """

    name = "pathwise"

    def surrogate(self, weights: Weights, bound: Bound) -> Tensor:
        if len(weights.log_weights) == 1:  # the bound is the log weight
            shares = by_particle(weights.log_weights)
        else:
            shares = by_particle(bound.gradient(weights.log_weights.detach()) * _finite(weights.log_weights))
        return shares + _score_terms(weights, bound, 0.0) if weights.has_scores else shares


class ScoreFunction(Pathwise):
    """The score function at every site, with a leave-one-out baseline (VIMCO for IWAE): it needs no derivative of the model.

    Mnih and Rezende (2016), "Variational inference for Monte Carlo objectives"; Kool, van Hoof and Welling (2019), "Buy 4
    REINFORCE samples, get a baseline for free!". A Delta in the guide has no score and keeps its path.
    """

    name = "score_function"
    detach_draws = True


class VarGrad(ScoreFunction):
    """Gradient of half the variance of the log weights at fixed draws (Richter et al. 2020, "VarGrad").

    For the ELBO that is the score function with leave-one-out baseline, term by term; for other bounds it is not the
    gradient.
    """

    name = "vargrad"

    def check(self, bound: Bound, num_particles: int) -> None:
        if not bound.linear:
            raise ValueError(
                f"gradient='vargrad' is a gradient of the ELBO, not of {type(bound).__name__}. Use "
                "gradient='score_function', which is VIMCO for IWAE, or DecomposedELBO(gradient='vargrad')."
            )
        if num_particles < 2:
            raise ValueError("gradient='vargrad' takes a variance over particles: use num_particles of at least 2")


class DoublyReparameterized(Gradient):
    """The score of the reparameterized draws traded for a path: with the ELBO sticking the landing, with IWAE DReG.

    Roeder, Wu and Duvenaud (2017), "Sticking the landing"; Tucker et al. (2019), "Doubly reparameterized gradient estimators
    for Monte Carlo objectives"; Bauer and Mnih (2021). Draws that are not reparameterized get their score term.
    """

    name = "doubly_reparameterized"
    separate_paths = True

    def surrogate(self, weights: Weights, bound: Bound) -> Tensor:
        assert weights.direct is not None
        log_weights = weights.log_weights.detach()
        gradient = bound.gradient(log_weights)
        shares = by_particle(gradient * _finite(weights.direct)) + _score_terms(weights, bound, gradient)
        if weights.paths:
            along = (gradient - bound.curvature(log_weights)) * _finite(weights.log_weights)
            if weights.scored is not None and weights.score_shares is None:
                # of draws without a path that depend on one with: the rest of the coefficient, their scores have a path
                along = along + (_centered(log_weights, bound)[1] - gradient) * weights.scored
            shares = shares + _along_paths(weights.paths, along)
        return shares


def by_particle(values: Tensor) -> Tensor:
    """Sum over all dims but the particle's."""
    return values.flatten(1).sum(1) if values.dim() > 1 else values


def _finite(log_weights: Tensor) -> Tensor:
    """Zero for a particle of weight zero: ``-inf`` there is legitimate, and has no gradient."""
    return log_weights.masked_fill(log_weights == -torch.inf, 0.0)


def _score_terms(weights: Weights, bound: Bound, missing: Tensor | float) -> Tensor | float:
    """The terms of the draws without a path, shape ``(K,)``.

    ``missing`` is the weight of the direct part of their log q that the rest of the surrogate has left out.
    """
    if not weights.has_scores:
        return 0.0
    log_weights = weights.log_weights.detach()
    if weights.score_shares is not None:
        if weights.scored is None:
            return weights.score_shares
        # with a constant weight the direct part is a score of mean zero: all of it goes
        return weights.score_shares + by_particle((bound.gradient(log_weights) - missing) * weights.scored)
    centered, own = _centered(log_weights, bound)
    total = torch.zeros_like(log_weights)
    if weights.scores is not None:
        assert weights.scored is not None
        total = total + centered * weights.scores + (own - missing) * weights.scored
    if weights.corrections is not None:
        is_apart = isinstance(missing, Tensor)  # then the path has traded the score with the correction in it
        total = total + (centered + own - missing if is_apart else centered) * weights.corrections
    return by_particle(total)


def _centered(log_weights: Tensor, bound: Bound) -> tuple[Tensor, Tensor]:
    """``f - b_k`` and ``c_k``, each (K, *B); see the module's description."""
    value = bound.value(log_weights)
    if len(log_weights) == 1:  # no other particle to take a baseline from; the derivative is 1 whatever the weight
        return value.unsqueeze(0), torch.ones_like(log_weights)
    baseline, own = bound.leave_one_out(log_weights)
    # where all others have weight zero no baseline exists; that does not depend on particle k either
    usable = torch.isfinite(baseline)
    return value - torch.where(usable, baseline, 0.0), torch.where(usable, own, 0.0)


def _along_paths(paths: list[Path], terms: Tensor) -> Tensor:
    """``sum_sites z_k . (d terms_k / dz_k)`` with the second factor constant, shape ``(K,)``; ``terms`` is (K, *B)."""
    leaves = [path.leaf for path in paths]
    slopes = torch.autograd.grad(terms.sum(), leaves, retain_graph=True, allow_unused=True)
    count = len(terms)
    batched = terms.new_zeros(count)
    looped: list[list[Tensor]] = [[] for _ in range(count)]
    for path, slope in zip(paths, slopes, strict=True):
        if slope is None:
            continue
        product = path.draw * slope
        if path.particle is None:
            batched = batched + product.reshape(count, product[0].numel()).sum(1)
        else:
            looped[path.particle].append(product.sum())
    if not any(looped):
        return batched
    sums = [torch.stack(products).sum() if products else batched.new_zeros(()) for products in looped]
    return batched + torch.stack(sums)


_ESTIMATORS: tuple[type[Gradient], ...] = (Pathwise, DoublyReparameterized, ScoreFunction, VarGrad)


def as_gradient(gradient: str | Gradient) -> Gradient:
    """The estimator of that name, or the one given.

    Raises
    ------
    ValueError
        No estimator has the name.
    """
    if isinstance(gradient, Gradient):
        return gradient
    for estimator in _ESTIMATORS:
        if estimator.name == gradient:
            return estimator()
    raise ValueError(f"gradient must be one of {get_args(GradientName)} or a Gradient, not {gradient!r}")
