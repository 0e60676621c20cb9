"""The losses as functions that can be traced: the value stays a tensor, and no number is read on the way.

Pyro's losses read every site's log density into Python. Here they are computed from the same traces, in the same order,
summed in double precision as Python sums them, so that the value is the same to the last digit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer import JitTrace_ELBO, JitTraceMeanField_ELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.trace_elbo import _compute_log_r
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_elbo_ext.compile.arguments import Args, Kwargs
from pyro_elbo_ext.compile.errors import CannotCompile
from pyro_elbo_ext.decomposed import DecomposedELBO
from pyro_elbo_ext.objective import Objective, Program, Read, Traced, Values
from pyro_elbo_ext.record import VALUES, SiteInfo


class Value(NamedTuple):
    """One evaluation of a loss.

    Attributes
    ----------
    loss : Tensor
        In nats, a float64 scalar without gradient.
    surrogate : Tensor
        Scalar whose gradient estimates the loss'.
    scalars : Tensor
        What the history is made of, float64, shape ``(n,)``; empty for losses without one.
    """

    loss: Tensor
    surrogate: Tensor
    scalars: Tensor


class TracedLoss:
    """A loss that can be traced.

    Attributes
    ----------
    guards : bool
        Whether a loss that is not finite must leave the parameters as they were.
    reading : Reading or None
        How the scalars of the last trace are read.
    """

    guards = False
    reading: Reading | None = None

    def __call__(self, model: Program, guide: Program, args: Args, kwargs: Kwargs, kl_weight: Tensor) -> Value:
        """Evaluate once; ``kl_weight`` is a float64 scalar, used where the loss has such a weight."""
        raise NotImplementedError

    def kl_weight(self, step: int) -> float:
        """The weight at a step, counted from the next one."""
        return 1.0


def traced_loss(loss: Any) -> TracedLoss:
    """The loss in a form that can be traced.

    Raises
    ------
    CannotCompile
        If there is none.
    """
    if isinstance(loss, Objective):
        return _OfObjective(loss)
    if type(loss) in (Trace_ELBO, JitTrace_ELBO):
        return _OfParticles(loss, _trace_elbo)
    if type(loss) in (TraceMeanField_ELBO, JitTraceMeanField_ELBO):
        return _OfParticles(loss, _mean_field_elbo)
    raise CannotCompile(
        f"the loss {type(loss).__name__} cannot be compiled. Use Trace_ELBO, TraceMeanField_ELBO or an objective of "
        "pyro_elbo_ext; or train with pyro.infer.SVI."
    )


class _OfParticles(TracedLoss):
    """A loss of Pyro's that is a mean over particles."""

    def __init__(self, loss: Any, particle: Callable[[Trace, Trace], tuple[Tensor, Tensor]]) -> None:
        self._loss, self._particle = loss, particle

    def __call__(self, model: Program, guide: Program, args: Args, kwargs: Kwargs, kl_weight: Tensor) -> Value:
        count = self._loss.num_particles
        loss, surrogate = torch.zeros((), dtype=torch.float64), torch.zeros(())
        for model_trace, guide_trace in self._loss._get_traces(model, guide, args, kwargs):
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


@dataclass(slots=True)
class Reading:
    """How the scalars of an objective make up what its history takes: linear, so found by reading unit vectors."""

    sites: tuple[SiteInfo, ...]
    read: Read
    offset: NDArray[np.float64]  # (sites, 6)
    matrix: NDArray[np.float64]  # (sites * 6, n)
    value: list[float]  # (n,): the reconstruction, or the bound
    kl_prior: list[float]  # (n,)

    def table(self, scalars: NDArray[np.float64]) -> NDArray[np.float64]:
        """What :meth:`pyro_elbo_ext.record.Record.append` takes, of one step."""
        if np.isfinite(scalars).all():
            return self.offset + (self.matrix @ scalars).reshape(self.offset.shape)
        return np.array(self.read(scalars.tolist())[2]).reshape(-1, len(VALUES))  # 0 * inf is none of its sites'

    def rows(self, scalars: NDArray[np.float64]) -> Values:
        """The same as a list of rows."""
        return [tuple(row) for row in self.table(scalars).tolist()]


def _reading(sites: tuple[SiteInfo, ...], read: Read, count: int) -> Reading:
    at_zero = read([0.0] * count)
    offset = np.array(at_zero[2]).reshape(-1, len(VALUES))
    matrix = np.zeros((offset.size, count))
    value, kl_prior = [0.0] * count, [0.0] * count
    for i in range(count):
        one = read([float(i == j) for j in range(count)])
        matrix[:, i] = np.nan_to_num(np.array(one[2]).reshape(-1) - offset.reshape(-1))
        value[i], kl_prior[i] = one[0] - at_zero[0], one[1] - at_zero[1]
    return Reading(sites, read, offset, matrix, value, kl_prior)


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
        self._loss = loss

    def __call__(self, model: Program, guide: Program, args: Args, kwargs: Kwargs, kl_weight: Tensor) -> Value:
        objective = self._loss
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
        reading = self.reading = _reading(evaluation.sites, traced.read, len(scalars))
        value = _dot(reading.value, scalars) - kl_weight * _dot(reading.kl_prior, scalars)
        return Value(-value if objective.maximized else value, surrogate, scalars)

    def kl_weight(self, step: int) -> float:
        if not isinstance(self._loss, DecomposedELBO):
            return 1.0
        return self._loss.kl_weight_at(self._loss.num_steps + step)


def _dot(weights: list[float], scalars: Tensor) -> Tensor:
    """Sum of those with a weight: one that is infinite and has none must not matter."""
    used = [i for i, weight in enumerate(weights) if weight != 0]
    if not used:
        return scalars.new_zeros(())
    return (scalars[used] * scalars.new_tensor([weights[i] for i in used])).sum()
