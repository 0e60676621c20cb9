"""The losses as functions that can be traced: the value stays a tensor, and no number is read on the way.

Pyro's losses read every site's log density into Python. Here they are computed from the same traces, in the same order,
summed in double precision as Python sums them, so that the value is the same to the last digit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer import (
    ELBO,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceMeanField_ELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.trace_elbo import _compute_log_r
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_elbo_ext.bounds import Geco
from pyro_elbo_ext.compile.errors import CannotCompile
from pyro_elbo_ext.compile.tracing.arguments import Args, Kwargs
from pyro_elbo_ext.history.record import SiteInfo
from pyro_elbo_ext.objectives import DecomposedELBO
from pyro_elbo_ext.objectives.evaluation import Program, Read, Traced, Weight
from pyro_elbo_ext.objectives.hooks import PYROS, own_hooks
from pyro_elbo_ext.objectives.objective import Objective
from pyro_elbo_ext.objectives.weighted import WeightedObjective


class Value(NamedTuple):
    """One evaluation of a loss.

    Attributes
    ----------
    loss : Tensor
        In nats, a float64 scalar without gradient.
    surrogate : Tensor
        Scalar whose gradient estimates the loss'.
    table : Tensor
        What the history takes, float64, shape ``(sites * 6,)``; empty for losses without one.
    """

    loss: Tensor
    surrogate: Tensor
    table: Tensor


class TracedLoss:
    """A loss that can be traced.

    Attributes
    ----------
    of
        The loss itself.
    guards : bool
        Whether a loss that is not finite must leave the parameters as they were.
    sites : tuple of SiteInfo
        What the rows of the table are.
    weighting : tuple
        What a graph has taken from the loss's weights: the sites that have their own, and free bits.
    one_by_one : bool
        Whether the weight of a step depends on the step before.
    """

    guards = False
    sites: tuple[SiteInfo, ...] = ()
    of: Any

    @property
    def weighting(self) -> tuple[object, ...]:
        return ()

    @property
    def one_by_one(self) -> bool:
        return False

    def __call__(self, model: Program, guide: Program, args: Args, kwargs: Kwargs, kl_weight: Tensor) -> Value:
        """Evaluate once; ``kl_weight`` is a float64 scalar, used where the loss has such a weight.

        If sites have weights of their own it is theirs, shape ``(sites,)``.
        """
        raise NotImplementedError

    def enumerates(self, model: Program, guide: Program) -> bool:
        """Whether sites are summed over, as the first step has found."""
        return False

    def kl_weights(self, start: int, steps: int) -> list[Weight]:
        """The weights at some steps, counted from the next one."""
        return [1.0] * steps


_REPLACED = (
    "loss",
    "differentiable_loss",
    "loss_and_grads",
    "loss_and_surrogate_loss",
    "_differentiable_loss_particle",
)
_NOT_CALLED = (  # of an objective
    *("loss", "differentiable_loss", "loss_and_grads", *PYROS),
    *("_loss", "_transfer", "_record", "_record_step", "_follow", "_check_trainable", "_backward_and_record"),
)
_PYROS_LOSSES = (ELBO, Trace_ELBO, JitTrace_ELBO, TraceMeanField_ELBO, JitTraceMeanField_ELBO)


def traced_loss(loss: Any) -> TracedLoss:
    """The loss in a form that can be traced.

    Raises
    ------
    CannotCompile
        If there is none: for other losses, and for subclasses or objects with methods of their own that a compiled step
        does not call.
    """
    if isinstance(loss, Objective):
        _refuse_hooks(loss, _NOT_CALLED, [cls for cls in type(loss).__mro__ if cls.__module__.startswith(_PACKAGE)])
        return _OfObjective(loss)
    if isinstance(loss, TraceEnum_ELBO):
        _refuse_hooks(loss, (*_REPLACED, "_get_trace", "_get_traces"), (TraceEnum_ELBO, JitTraceEnum_ELBO))
        return _OfEnumeration(loss)
    if isinstance(loss, Trace_ELBO):
        _refuse_hooks(loss, _REPLACED, _PYROS_LOSSES)
        return _OfParticles(loss, _mean_field_elbo if isinstance(loss, TraceMeanField_ELBO) else _trace_elbo)
    raise CannotCompile(f"the loss {type(loss).__name__} cannot be compiled. {_USE}")


_PACKAGE = __name__.partition(".")[0] + "."
_USE = "Use Trace_ELBO, TraceMeanField_ELBO, TraceEnum_ELBO or an objective of pyro_elbo_ext; or train with pyro.infer.SVI."


def _refuse_hooks(loss: Any, names: Iterable[str], known: Iterable[type]) -> None:
    own = own_hooks(loss, names, [*known, ELBO])
    if own:
        raise CannotCompile(
            f"the loss {type(loss).__name__} cannot be compiled: it has its own {' and '.join(own)}, which a compiled step "
            f"does not call. {_USE}"
        )


class _OfParticles(TracedLoss):
    """A loss of Pyro's that is a mean over particles."""

    def __init__(self, loss: Any, particle: Callable[[Trace, Trace], tuple[Tensor, Tensor]]) -> None:
        self.of, self._particle = loss, particle

    def __call__(self, model: Program, guide: Program, args: Args, kwargs: Kwargs, kl_weight: Tensor) -> Value:
        count = self.of.num_particles
        loss, surrogate = torch.zeros((), dtype=torch.float64), torch.zeros(())
        for model_trace, guide_trace in self.of._get_traces(model, guide, args, kwargs):
            elbo, surrogate_elbo = self._particle(model_trace, guide_trace)
            loss = loss - elbo / count
            surrogate = surrogate - surrogate_elbo / count
        return Value(loss, surrogate, torch.zeros(0, dtype=torch.float64))


def _trace_elbo(model_trace: Trace, guide_trace: Trace) -> tuple[Tensor, Tensor]:
    """ELBO and surrogate of one particle, as ``Trace_ELBO`` has them."""
    elbo: Any = torch.zeros((), dtype=torch.float64)
    surrogate: Any = 0.0
    log_r = None
    for site in model_trace.nodes.values():
        if site["type"] == "sample":
            elbo = elbo + _double(site["log_prob_sum"])
            surrogate = surrogate + site["log_prob_sum"]
    for site in guide_trace.nodes.values():
        if site["type"] != "sample":
            continue
        _, score, entropy_term = site["score_parts"]
        elbo = elbo - _double(site["log_prob_sum"])
        if not is_identically_zero(entropy_term):
            surrogate = surrogate - entropy_term.sum()
        if not is_identically_zero(score):
            if log_r is None:
                log_r = _compute_log_r(model_trace, guide_trace)
            surrogate = surrogate + (log_r.sum_to(site["cond_indep_stack"]) * score).sum()
    return elbo, surrogate


def _mean_field_elbo(model_trace: Trace, guide_trace: Trace) -> tuple[Tensor, Tensor]:
    """ELBO and surrogate of one particle, as ``TraceMeanField_ELBO`` has them."""
    elbo: Any = 0.0
    for name, site in model_trace.nodes.items():
        if site["type"] != "sample":
            continue
        if site["is_observed"]:
            elbo = elbo + site["log_prob_sum"]
            continue
        q = guide_trace.nodes[name]
        try:
            kl = kl_divergence(q["fn"], site["fn"])
        except NotImplementedError:
            elbo = elbo + site["log_prob_sum"] - q["score_parts"].entropy_term.sum()
            continue
        kl = scale_and_mask(kl, scale=q["scale"], mask=q["mask"])
        elbo = elbo - (kl.sum() if isinstance(kl, Tensor) else kl * torch.Size(q["fn"].batch_shape).numel())
    for name, q in guide_trace.nodes.items():
        if q["type"] == "sample" and name not in model_trace.nodes:
            elbo = elbo - q["score_parts"].entropy_term.sum()
    return _double(elbo), elbo


def _double(value: Any) -> Tensor:
    return torch.as_tensor(value).detach().double()


# ----------------------------------------------------------------------------------------------------------------------
# Objectives of this package


class _Reading(NamedTuple):
    """How the scalars of an objective make up its value and its history: linear, so found by reading unit vectors."""

    offset: list[float]  # (sites * 6,): the history's table, flat, at scalars of zero
    weights: list[dict[int, float]]  # (sites * 6,): the scalars that each entry is made of
    value: dict[int, float]  # the reconstruction, or the bound
    kl_prior: dict[int, float]


def _reading(read: Read, count: int) -> _Reading:
    at_zero = read([0.0] * count)
    offset = [entry for row in at_zero[2] for entry in row]
    reading = _Reading(offset, [{} for _ in offset], {}, {})
    for i in range(count):
        value, kl_prior, rows = read([float(i == j) for j in range(count)])
        table = [entry for row in rows for entry in row]
        for weights, one, zero in zip(reading.weights, table, offset, strict=True):
            if one != zero and not math.isnan(zero):
                weights[i] = one - zero
        for weights, difference in ((reading.value, value - at_zero[0]), (reading.kl_prior, kl_prior - at_zero[1])):
            if difference != 0:
                weights[i] = difference
    return reading


def _combine(scalars: Tensor, weights: list[dict[int, float]]) -> Tensor:
    """Sums of some of the scalars, shape ``(len(weights),)``: one that is infinite and has no weight must not matter."""
    size = max(map(len, weights), default=0)
    if size == 0:
        return scalars.new_zeros(len(weights))
    # entries are filled up with scalars that count for nothing
    places = [[*of, *[0] * (size - len(of))] for of in weights]
    factors = [[*of.values(), *[0.0] * (size - len(of))] for of in weights]
    by = scalars.new_tensor(factors)
    taken = scalars[torch.tensor(places, device=scalars.device)]
    return torch.where(by == 0, 0.0, taken * by).sum(-1)


class _OfObjective(TracedLoss):
    """An objective of this package."""

    guards = True

    def __init__(self, loss: Objective) -> None:
        history = loss.history
        if history is not None and history.gradient_mode is not None:
            raise CannotCompile(
                f"History(gradient_snr={history.gradient_mode!r}) records gradients, which a compiled step does not keep. "
                "Use a History without it, or train with pyro.infer.SVI."
            )
        self.of = loss

    def __call__(self, model: Program, guide: Program, args: Args, kwargs: Kwargs, kl_weight: Tensor) -> Value:
        objective = self.of
        traced = objective._traced = Traced(kl_weight)
        try:
            evaluation = objective._evaluate(model, guide, args, kwargs, with_gradient=True)
            surrogate = evaluation.surrogate().sum()
        finally:
            objective._traced = None
            objective.forget()  # the terms of this run are not those of the steps that follow
        assert traced.scalars is not None
        assert traced.read is not None
        scalars = traced.scalars.detach().double()
        reading = _reading(traced.read, len(scalars))
        self.sites = evaluation.sites
        table = _combine(scalars, reading.weights) + scalars.new_tensor(reading.offset)
        value, kl_prior = _combine(scalars, [reading.value, reading.kl_prior])
        if traced.penalty is not None:
            value = value - traced.penalty
        elif reading.kl_prior:
            value = value - kl_weight * kl_prior
        return Value(-value if objective.maximized else value, surrogate, table)

    @property
    def weighting(self) -> tuple[object, ...]:
        return self.of.weighting

    def enumerates(self, model: Program, guide: Program) -> bool:
        return bool(self.of._pairs(model, guide).enumerates)

    @property
    def one_by_one(self) -> bool:
        return isinstance(self.of, WeightedObjective) and isinstance(self.of.kl_weight, Geco)

    def kl_weights(self, start: int, steps: int) -> list[Weight]:
        objective = self.of
        if not isinstance(objective, WeightedObjective):
            return [1.0] * steps
        weight = objective.kl_weight
        if isinstance(weight, float):
            return [weight] * steps
        return [objective.kl_weight_at(objective.num_steps + start + i) for i in range(steps)]


class _OfEnumeration(TracedLoss):
    """Pyro's ``TraceEnum_ELBO``, whose value and gradient ``DecomposedELBO(kl="sampled")`` has.

    Traced as it is, Pyro's would look at the weights of the guide's values.
    """

    def __init__(self, loss: TraceEnum_ELBO) -> None:
        self.of = loss
        vectorized = bool(loss.vectorize_particles)
        self._same = DecomposedELBO(loss.num_particles, vectorize_particles=vectorized, kl="sampled", history=False)
        self._traced = _OfObjective(self._same)

    def __call__(self, model: Program, guide: Program, args: Args, kwargs: Kwargs, kl_weight: Tensor) -> Value:
        self._same.max_plate_nesting = self.of.max_plate_nesting  # the first step has guessed it
        self._same._pairs(model, guide).enumerates = True
        value = self._traced(model, guide, args, kwargs, kl_weight)
        return value._replace(table=torch.zeros(0, dtype=torch.float64))

    def enumerates(self, model: Program, guide: Program) -> bool:
        return True
