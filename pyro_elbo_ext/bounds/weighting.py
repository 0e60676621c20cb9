"""Weights of ``kl_prior`` in the objective: constant, warmed up, cyclical, by site, or set by a constraint.

A weight below 1 lets the data speak before ``KL(q || prior)`` does, which keeps latents of amortized models from being
ignored. Whatever the weight, the history holds the true ELBO, with weight 1, beside the objective.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pyro_elbo_ext.programs.arguments import check_count

Schedule = Callable[[int], float]
KLWeight = float | Schedule | Mapping[str, float | Schedule]
FreeBits = float | Mapping[str, float]


@dataclass(frozen=True)
class Constant:
    """The same weight at every step, such as the beta of a beta-VAE (Higgins et al. 2017).

    Parameters
    ----------
    weight : float
        At least 0.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        checked_weight(self.weight, "weight")

    def __call__(self, step: int) -> float:
        """The weight at a step (0, 1, ...)."""
        return float(self.weight)

    @property
    def reaches_one_at(self) -> int | None:
        """0 if the weight is 1, else None: it never is."""
        return 0 if self.weight == 1 else None


@dataclass(frozen=True)
class LinearWarmup:
    r"""Linear from ``start`` at step 0 to 1 at step ``num_steps``, and 1 from there on.

    .. math:: w_t = \min(1, s + (1 - s)\, t / T)

    Parameters
    ----------
    num_steps : int
        T, at least 1.
    start : float
        s, from 0 to 1.

    References
    ----------
    Bowman et al. (2016), "Generating sentences from a continuous space". Sonderby et al. (2016), "Ladder variational
    autoencoders".
    """

    num_steps: int
    start: float = 0.0

    def __post_init__(self) -> None:
        check_count("num_steps", self.num_steps)
        _check_fraction(self.start, "start")

    def __call__(self, step: int) -> float:
        """The weight at a step (0, 1, ...)."""
        if step >= self.num_steps:
            return 1.0
        return self.start + (1.0 - self.start) * step / self.num_steps

    @property
    def reaches_one_at(self) -> int | None:
        """The first step from which the weight stays 1."""
        return 0 if self.start == 1 else self.num_steps


@dataclass(frozen=True)
class CyclicalWarmup:
    r"""A linear warm-up again and again: in each cycle up to 1 over the first part ``ramp``, then 1 for the rest.

    .. math:: w_t = \min\left(1,\; s + (1 - s) \frac{t \bmod P}{R P}\right)

    Parameters
    ----------
    period : int
        P, steps in a cycle.
    num_cycles : int, optional
        How many; the weight stays 1 afterwards. By default there is no end to them. Fu et al. take 4 in a run of
        ``4 * period`` steps.
    ramp : float
        R, above 0 and so small that every cycle has a step of weight 1.
    start : float
        s, from 0 to 1.

    References
    ----------
    Fu et al. (2019), "Cyclical annealing schedule: a simple approach to mitigating KL vanishing".
    """

    period: int
    num_cycles: int | None = None
    ramp: float = 0.5
    start: float = 0.0

    def __post_init__(self) -> None:
        check_count("period", self.period)
        if self.num_cycles is not None:
            check_count("num_cycles", self.num_cycles)
        _check_fraction(self.ramp, "ramp")
        _check_fraction(self.start, "start")
        if self.ramp == 0:
            raise ValueError("ramp must be above 0; for a constant weight use a number")
        if self._ramp_steps >= self.period:
            raise ValueError(
                f"with period={self.period} and ramp={self.ramp} no step of a cycle has weight 1: make ramp smaller or "
                "period longer"
            )

    @property
    def _ramp_steps(self) -> int:
        return math.ceil(self.ramp * self.period)

    def __call__(self, step: int) -> float:
        """The weight at a step (0, 1, ...)."""
        if self.num_cycles is not None and step >= self.num_cycles * self.period:
            return 1.0
        return min(1.0, self.start + (1.0 - self.start) * (step % self.period) / (self.ramp * self.period))

    @property
    def reaches_one_at(self) -> int | None:
        """The first step from which the weight stays 1; None if it falls again in every cycle to come."""
        if self.start == 1:
            return 0
        if self.num_cycles is None:
            return None
        return (self.num_cycles - 1) * self.period + self._ramp_steps


class Geco:
    r"""Constrained reconstruction: the least ``kl_prior`` with a reconstruction of at least ``target``.

    .. math:: \min_q \mathrm{KL}(q(z) \,\|\, p(z)) \quad \text{subject to} \quad \mathrm E_q[\log p(x \mid z)] \ge \tau

    Its Lagrangian is ``kl_prior + lambda (target - reconstruction)``. Divided by the multiplier, and without what is
    constant, it is the negative objective with ``kl_weight = 1 / lambda``: of the ELBO's scale whatever the multiplier, and
    the ELBO at ``lambda = 1``. After each step the multiplier moves with the moving average ``c`` of the constraint,

    .. math:: c \leftarrow \alpha c + (1 - \alpha)(\tau - r), \qquad
              \log\lambda \leftarrow \log\lambda + \nu \max(-1, \min(1, c))

    so that the weight falls while the reconstruction r is below its target and rises above it. Give it as
    ``DecomposedELBO(kl_weight=Geco(...))``, one to each objective; the weight of each step is the history's ``kl_weight``.
    It takes the reconstruction of the last step from what the history takes, so that nothing waits for the device; and so
    ``CompiledSVI.run`` takes steps one by one.

    Parameters
    ----------
    target : float
        tau, in nats per observation as ``num_observations`` in the history counts them: elements of the batch of observed
        sites, such as images whose pixels are in ``.to_event(...)``, or pixels in a plate.
    per_observation : bool
        False: ``target`` and reconstruction are in nats in total, scaled as the model's plates scale them. Per observation
        they are the same thing with numbers that depend less on the data, of the order of the limit of 1 nat.
    decay : float
        alpha, from 0 to below 1.
    rate : float
        nu, above 0: the most that the logarithm changes by in a step. With the learning rate of the parameters it makes a
        loop; a rate much greater than the learning rate can oscillate.
    weight : float
        ``kl_weight`` at the first step, within the bounds.
    min_weight, max_weight : float
        Bounds of ``kl_weight``, ``0 < min_weight < max_weight``. A weight that stays at ``min_weight`` says that the target
        is out of reach; one at ``max_weight`` that the prior alone reaches it.

    References
    ----------
    Rezende and Viola (2018), "Taming VAEs": there the multiplier is on the reconstruction, as lambda here, and the
    exponent has the moving average's value and the gradient of the step's.
    """

    def __init__(
        self,
        target: float,
        *,
        per_observation: bool = True,
        decay: float = 0.9,
        rate: float = 0.02,
        weight: float = 1.0,
        min_weight: float = 1e-4,
        max_weight: float = 1e4,
    ) -> None:
        if not _is_finite(target):
            raise ValueError(f"target must be a finite number of nats, not {target!r}")
        if not (_is_finite(decay) and 0 <= decay < 1):
            raise ValueError(f"decay must be from 0 to below 1, not {decay!r}")
        if not (_is_finite(rate) and rate > 0):
            raise ValueError(f"rate must be a finite number above 0, not {rate!r}")
        if not (_is_finite(min_weight) and _is_finite(max_weight) and 0 < min_weight < max_weight):
            raise ValueError(f"0 < min_weight < max_weight must hold, not {min_weight!r} and {max_weight!r}")
        if not (_is_finite(weight) and min_weight <= weight <= max_weight):
            raise ValueError(f"weight must be from min_weight={min_weight} to max_weight={max_weight}, not {weight!r}")
        self.target = float(target)
        self.per_observation = bool(per_observation)
        self.decay, self.rate = float(decay), float(rate)
        self.min_weight, self.max_weight = float(min_weight), float(max_weight)
        self.weight = float(weight)
        self.violation: float | None = None

    weight: float
    """The weight of the next step: 1 / lambda."""

    violation: float | None
    """The moving average of ``target - reconstruction``; None before the first step."""

    def __call__(self, step: int) -> float:
        """The weight of the next step, whatever its number."""
        return self.weight

    def update(self, reconstruction: float, num_observations: float) -> None:
        """Take in the reconstruction of a step, in nats in total; the objective calls this.

        Raises
        ------
        ValueError
            The target is per observation and there are none. Nothing has changed then.
        """
        if self.per_observation:
            if not num_observations > 0:
                raise ValueError(
                    "Geco's target is in nats per observation, but the step has no observations (no observed site, or only "
                    "pyro.factor): use per_observation=False"
                )
            reconstruction = reconstruction / num_observations
        violation = self.target - reconstruction
        if self.violation is not None:
            violation = self.decay * self.violation + (1.0 - self.decay) * violation
        self.violation = violation
        # limited, or a bad start would wind the multiplier up to where the small slack at the target is long in unwinding it
        change = self.rate * max(-1.0, min(1.0, violation))
        self.weight = max(self.min_weight, min(self.max_weight, self.weight * math.exp(-change)))

    def state_dict(self) -> dict[str, Any]:
        """What changes from step to step, as plain values."""
        return {"weight": self.weight, "violation": self.violation}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict``.

        Raises
        ------
        ValueError
            An entry is missing, or the weight is outside this controller's bounds. Nothing has changed then.
        """
        missing = sorted({"weight", "violation"} - set(state))
        if missing:
            raise ValueError(f"not a state of Geco: {', '.join(missing)} missing")
        weight, violation = float(state["weight"]), state["violation"]
        if not self.min_weight <= weight <= self.max_weight:
            raise ValueError(
                f"weight {weight} is not from min_weight={self.min_weight} to max_weight={self.max_weight}"
            )
        self.weight, self.violation = weight, None if violation is None else float(violation)

    def __repr__(self) -> str:
        unit = "nats per observation" if self.per_observation else "nats"
        return f"Geco(target={self.target:g} {unit}, kl_weight={self.weight:.6g}, violation={self.violation})"


def check_reaches_one(kl_weight: KLWeight, num_steps: int, *, first_step: int = 0) -> None:
    """Raise ValueError if a warm-up of ``kl_weight`` has not reached weight 1 at the end of a run.

    What is optimized at the end would then not be the ELBO. A plain number or a :class:`Constant` is no warm-up but a
    choice, and :class:`Geco` has another aim: both pass.

    Parameters
    ----------
    kl_weight
        As ``DecomposedELBO`` takes it; a mapping is checked site by site.
    num_steps : int
        Steps of the run, at least 1.
    first_step : int
        The number of its first step, if the objective has taken steps before.

    Raises
    ------
    ValueError
        The weight at the last step is below 1; says which it is and what to change.
    """
    check_count("num_steps", num_steps)
    last = operator.index(first_step) + num_steps - 1
    of_sites: Iterable[tuple[str | None, float | Schedule]]
    of_sites = kl_weight.items() if isinstance(kl_weight, Mapping) else [(None, kl_weight)]
    for site, schedule in of_sites:
        if not callable(schedule) or isinstance(schedule, Constant | Geco):
            continue
        weight = checked_weight(schedule(last), f"kl_weight({last})")
        if weight >= 1:
            continue
        name = "kl_weight" if site is None else f"kl_weight of site '{site}'"
        reached = getattr(schedule, "reaches_one_at", None)
        if reached is not None:
            remedy = (
                f"it stays at 1 from step {reached} on: run at least {reached + 1 - first_step} steps, or make the warm-up "
                "shorter"
            )
        elif isinstance(schedule, CyclicalWarmup):
            remedy = (
                f"end the run in the last part of a cycle, after step {schedule._ramp_steps} of {schedule.period}, or give "
                "num_cycles, after which the weight stays at 1"
            )
        else:
            remedy = "run more steps, or make the warm-up shorter"
        raise ValueError(
            f"{name} is {weight:g} at the last step, {last}, of a run of {num_steps} steps: the ELBO would never be what is "
            f"optimized. {schedule!r}: {remedy}. For a constant weight below 1 give a number."
        )


def check_kl_weight(kl_weight: KLWeight) -> None:
    """Raise ValueError if this is no weight of ``kl_prior``, nor a schedule or mapping of such."""
    if not isinstance(kl_weight, Mapping):
        if not callable(kl_weight):
            checked_weight(kl_weight, "kl_weight")
        return
    if not kl_weight:
        raise ValueError("kl_weight is an empty mapping: give 1.0, or name a site")
    for site, weight in kl_weight.items():
        if isinstance(weight, Geco):
            raise ValueError(
                f"kl_weight['{site}'] is a Geco, which weighs all sites alike: give it as kl_weight=Geco(...)"
            )
        if not callable(weight):
            checked_weight(weight, f"kl_weight['{site}']")


def check_free_bits(free_bits: FreeBits | None) -> None:
    """Raise ValueError if this is no number of nats, nor a mapping to such."""
    named: Iterable[tuple[str | None, Any]]
    named = free_bits.items() if isinstance(free_bits, Mapping) else [(None, free_bits)]
    for site, nats in named:
        name = "free_bits" if site is None else f"free_bits['{site}']"
        if (site is not None or nats is not None) and not (_is_finite(nats) and nats >= 0):
            raise ValueError(f"{name} must be a finite number of nats, at least 0, not {nats!r}")
    if isinstance(free_bits, Mapping) and not free_bits:
        raise ValueError("free_bits is an empty mapping: give None, or name a site")


def checked_weight(weight: float, name: str) -> float:
    """The weight as a float, if it is finite and at least 0; else ValueError."""
    if not _is_finite(weight) or weight < 0:
        raise ValueError(f"{name} must be a finite number, at least 0, not {weight!r}")
    return float(weight)


def _is_finite(value: object) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)


def _check_fraction(value: float, name: str) -> None:
    if not _is_finite(value) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be from 0 to 1, not {value!r}")
