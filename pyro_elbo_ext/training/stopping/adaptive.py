"""Lower the learning rate whenever the iterates are stationary, and stop when lowering it would change little."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_elbo_ext.inference_data.arviz_statistics import effective_size
from pyro_elbo_ext.inference_data.draws import to_numpy
from pyro_elbo_ext.programs.arguments import check_count, check_fraction, check_number
from pyro_elbo_ext.training.stopping.guide_moments import GuideMoments, symmetrized_kl
from pyro_elbo_ext.training.stopping.iterates import LONGEST, Iterates, Window, best_window, largest_r_hat, smallest_ess
from pyro_elbo_ext.training.stopping.power_law import fit_power_law, predicted_steps
from pyro_elbo_ext.training.stopping.rules import CONTINUE, Decision, Rule, check_iterate

_BETWEEN_LOOKS = 1.15  # a look costs as much as all steps of a phase in a fixed proportion, so looks grow rarer
_BLOCKS = 8  # of a window, whose averages' scatter gives the Monte Carlo standard error of the whole average
_FIRST_ERROR = 0.1  # sds that an average at the first learning rate may be uncertain by; less and less later
_TINY = 1e-9
_FREE_STEPS = 1000  # a phase this short is cheap
_HARDLY = 0.25  # of the accuracy; see AdaptiveStopping
_LEAST_DISTANCE = 0.3  # of its noise: what a distance that drowns in it is taken as


@dataclass
class Phase:
    """What was found at one learning rate.

    Attributes
    ----------
    rate : float
        Learning rate, the first one being 1.
    steps : int
        Taken at it.
    distance : float
        From the average before: the largest square root of a marginal symmetrized KL, less what noise explains; or nats of
        ELBO. NaN in the first phase.
    noise : float
        Standard error of ``distance``, in the same unit.
    loss : float
        Mean loss of the stationary iterates, nats.
    loss_error : float
        Its standard error.
    """

    rate: float
    steps: int
    distance: float
    noise: float
    loss: float
    loss_error: float


class _Prediction(NamedTuple):
    error: float  # of the latest average; infinite after the first phase
    inefficiency: float  # of the next phase
    reason: str


class AdaptiveStopping(Rule):
    r"""Averages of stationary iterates at lower and lower learning rates, until the next would be much the same.

    At one learning rate, the iterates of a stochastic optimizer come to scatter around a point that is a little off the
    optimum. That they do is seen by the split R-hat of all parameters over windows of iterates. Their average over the
    window is kept once its Monte Carlo standard error is small and its effective sample size large enough. Then the
    learning rate is multiplied by ``factor``, and it begins anew from the average; from then on it is also enough that as
    many steps have been taken as at the rate before and the average's standard error is below a quarter of ``accuracy``,
    for parameters that matter little may wander for long. The distances between successive averages are fitted by a power
    of the learning rate, which predicts how far the last one is from the limit.

    Distances and errors are measured on what the guide draws, whatever its parameters are: as the square root of the
    symmetrized KL between the marginals of two guides, the largest of all (`guide_moments.symmetrized_kl`). 0.05 is a mean
    off by 0.05 posterior sds, or a log sd off by 0.035.

    Where the guide has no such marginals, as a point estimate, or was not given to `start`, and with more than about 60,000
    parameters, the ELBO is looked at instead: iterates are stationary when the loss is, and the run ends when the ELBO
    gained by the last reduction of the learning rate is below ``elbo_tolerance`` or twice its standard error.

    Parameters
    ----------
    accuracy : float
        Largest predicted distance from the limit to stop at, in the unit above.
    elbo_tolerance : float
        The same in nats of ELBO, where that is looked at.
    factor : float
        Of the learning rate, in (0, 1).
    inefficiency : float
        Stop, without having converged, when the predicted relative distance after the next reduction, plus
        ``accuracy`` over the distance now, times the predicted relative number of steps, is more than this.
    r_hat : float
        Largest split R-hat of stationary iterates.
    min_ess : int
        Smallest effective sample size of an average.
    every : int
        Steps between two iterates that are looked at.

    Attributes
    ----------
    phases : list of Phase
        What was found at the learning rates so far.
    measure : str
        What distances are measured by, and why.

    References
    ----------
    Welandawe, Andersen, Vehtari, Huggins (2022), A framework for improving the reliability of black-box variational
    inference.  Dhaka et al. (2020), Robust, accurate stochastic optimization for variational inference.
    """

    def __init__(
        self,
        accuracy: float = 0.1,
        *,
        elbo_tolerance: float = 0.1,
        factor: float = 0.5,
        inefficiency: float = 10.0,
        r_hat: float = 1.1,
        min_ess: int = 16,
        every: int = 20,
    ) -> None:
        for name, value in (("accuracy", accuracy), ("elbo_tolerance", elbo_tolerance), ("inefficiency", inefficiency)):
            check_number(name, value)
            if not value > 0:
                raise ValueError(f"{name} must be positive, not {value!r}")
        check_fraction("factor", factor)
        check_number("r_hat", r_hat)
        if not r_hat > 1:
            raise ValueError(f"r_hat must be more than 1, not {r_hat!r}")
        self.accuracy, self.elbo_tolerance = float(accuracy), float(elbo_tolerance)
        self.factor, self.inefficiency, self.r_hat = float(factor), float(inefficiency), float(r_hat)
        self.min_ess, self.every = check_count("min_ess", min_ess), check_count("every", every)
        self.measure = ""
        self._parameters: dict[str, Tensor] = {}
        self._moments: GuideMoments | None = None
        self._learning_rate: float | None = None
        self._keeps_all = True
        self._begin_anew(0)

    def _begin_anew(self, width: int) -> None:
        self.converged = False
        self.phases: list[Phase] = []
        self._iterates = Iterates(width)
        self._begun: int | None = None  # step at which the phase began
        self._next_look = 0  # in rows added
        self._found = math.nan  # R-hat at the last look
        self._average: Tensor | None = None  # of the last phase that is done
        self._error: Tensor | None = None  # of it: squared standard error of each marginal
        self._tail: Tensor | None = None  # running mean since the loss became stationary, where iterates are too many
        self._tail_count = 0

    # What the loop calls

    def _begin(
        self,
        guide: Callable[..., Any] | None,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        learning_rate: float | None,
    ) -> None:
        if not self._parameters:
            raise ValueError("there are no parameters to look at")
        self._learning_rate = learning_rate
        tensors = list(self._parameters.values())
        width = sum(parameter.numel() for parameter in tensors)
        self._moments = None
        if not Iterates.fit(width + 1):
            self.measure = f"ELBO, for there are {width} parameters"
        elif guide is None:
            self.measure = "ELBO, for the guide is not known"
        else:
            try:
                self._moments = GuideMoments(guide, tensors, args, kwargs)
                self.measure = f"symmetrized KL of the guide's marginals, by {self._moments.method}"
            except NotImplementedError as error:
                self.measure = f"ELBO, for {error}"
        self._keeps_all = Iterates.fit(width + 1)
        self._begin_anew(width + 1 if self._keeps_all else 1)

    def observe(self, step: int, iterate: Tensor, losses: NDArray[np.float64]) -> Decision:
        """See `StoppingRule`."""
        check_iterate(step, iterate, self._parameters)
        if len(losses) == 0 or not np.isfinite(losses).all():
            raise ValueError(
                f"the losses of the steps up to {step} are not all finite, or there is none; the stopping rule has taken "
                "no note of them."
            )
        if self._begun is None:
            self._begun = step - len(losses)
        loss = iterate.new_tensor([float(np.mean(losses))], dtype=torch.float64)
        self._iterates.add(torch.cat([iterate.double(), loss]) if self._keeps_all else loss)
        if self._tail is not None:
            self._tail_count += 1
            self._tail += (iterate.double() - self._tail) / self._tail_count
        if self._iterates.added < self._next_look:
            return CONTINUE
        self._next_look = max(self._iterates.added + 1, int(_BETWEEN_LOOKS * self._iterates.added))
        return self._look(step, iterate)

    @property
    def average(self) -> Tensor | None:
        """What to write into the parameters at the end, shape ``(P,)``.

        Where the run ends before the rule stops it, that is the average of the stationary iterates at the last learning
        rate, or at the one before it where they were observed for longer. Where the iterates never became stationary, it is
        the average of the last fifth of them, or None if only the ELBO is looked at.
        """
        found = self._average
        rows = self._iterates.rows()
        if self.converged:
            pass
        elif not self._keeps_all:
            found = self._tail if found is None else found
        elif (window := best_window(self._watched(rows))) is not None:
            steps = window.length * self._iterates.stride * self.every
            if window.r_hat <= self.r_hat and (found is None or 2 * steps >= self.phases[-1].steps):
                found = rows[-window.length :, :-1].mean(0)
            elif found is None and self._moments is not None:
                found = rows[-(len(rows) // 5) :, :-1].mean(0)
        return None if found is None else found.to(next(iter(self._parameters.values())).dtype)

    @property
    def status(self) -> str:
        """Learning rate, or its part of the first, and R-hat."""
        part = self.factor ** len(self.phases)
        rate = f"lr x {part:.3g}" if self._learning_rate is None else f"lr {self._learning_rate * part:.3g}"
        return rate if math.isnan(self._found) else f"{rate}, R-hat {self._found:.2f}"

    def state_dict(self) -> dict[str, Any]:
        """See `StoppingRule`."""
        return {
            "phases": [asdict(phase) for phase in self.phases],
            "iterates": self._iterates.state_dict(),
            "converged": self.converged,
            "begun": self._begun,
            "next_look": self._next_look,
            "found": self._found,
            "average": None if self._average is None else self._average.clone(),
            "error": None if self._error is None else self._error.clone(),
            "tail": None if self._tail is None else self._tail.clone(),
            "tail_count": self._tail_count,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `StoppingRule`; after `start`."""
        self.phases = [Phase(**phase) for phase in state["phases"]]
        self._iterates.load_state_dict(state["iterates"])
        self.converged, self._begun, self._next_look = state["converged"], state["begun"], state["next_look"]
        self._found = state["found"]
        self._average, self._error, self._tail = [
            None if state[key] is None else state[key].clone() for key in ("average", "error", "tail")
        ]
        self._tail_count = state["tail_count"]

    # A look at the iterates

    def _watched(self, rows: Tensor) -> NDArray[np.float64]:
        """The columns that are to be stationary: parameters, or the loss where that is looked at."""
        return to_numpy(rows[:, :-1] if self._moments is not None else rows[:, -1:])

    def _look(self, step: int, iterate: Tensor) -> Decision:
        rows = self._iterates.rows()
        watched = self._watched(rows)
        window = best_window(watched)
        if window is None:
            return CONTINUE
        self._found = window.r_hat
        length = window.length if self._is_stationary(watched, window) else None
        if self._moments is None:
            if length is not None:
                return self._by_elbo(step, rows[-length:], iterate)
            if window.r_hat > self.r_hat:
                self._tail = None
            return CONTINUE
        if length is not None:
            target = max(self.accuracy / 2, _FIRST_ERROR * self.factor ** len(self.phases))
        elif self.phases and self._iterates.added * self.every >= self.phases[-1].steps:
            length, target = int(LONGEST * len(rows)), self.accuracy * _HARDLY
        else:
            return CONTINUE
        rows = rows[-length:]
        average, error = self._measured(rows[:, :-1])
        largest = math.sqrt(float(error.max()))
        if largest > target:
            return self._wait((largest / target) ** 2)
        distance, noise = math.nan, math.nan
        if self._average is not None and self._error is not None:
            squared = symmetrized_kl(self._moments(self._average), self._moments(average))
            variance = error + self._error
            noise = math.sqrt(float(variance.max()))
            distance = math.sqrt(max(float((squared - variance).max()), 0.0))
        phase = self._phase(step, to_numpy(rows[:, -1]), distance, noise)
        predicted = self._predict(phase)
        if predicted.error <= self.accuracy and largest > self.accuracy / 2:
            return self._wait((2 * largest / self.accuracy) ** 2)  # it only wants a longer average
        self._average, self._error = average, error
        return self._close(phase, predicted.error <= self.accuracy, predicted.reason, predicted.inefficiency)

    def _is_stationary(self, watched: NDArray[np.float64], window: Window) -> bool:
        if window.r_hat > self.r_hat:
            return False
        tail = watched[-window.length :]
        # a quick R-hat has let it through; rows are means, of which there may be few
        if largest_r_hat(tail) > self.r_hat:
            return False
        return smallest_ess(tail) >= min(self.min_ess, len(tail) // 2)

    def _wait(self, longer: float) -> Decision:
        """Look again when the window is so many times as long, but no later than at half as many rows again."""
        self._next_look = max(self._next_look, int(min(longer, 1.5) * self._iterates.added))
        return CONTINUE

    def _measured(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Average of the rows and, of each marginal, its squared standard error as a symmetrized KL, from block means."""
        assert self._moments is not None
        size = len(rows) // _BLOCKS
        blocks = rows[-size * _BLOCKS :].reshape(_BLOCKS, size, -1).mean(1)
        mean, log_sd = (torch.stack(part) for part in zip(*map(self._moments, blocks), strict=True))
        scatter = (mean.var(0) / torch.exp(2 * log_sd.mean(0)) + 2 * log_sd.var(0)) / _BLOCKS
        return rows.mean(0), scatter

    def _by_elbo(self, step: int, rows: Tensor, iterate: Tensor) -> Decision:
        losses = to_numpy(rows[:, -1])
        if not self._keeps_all and self._tail is None:
            self._tail, self._tail_count = iterate.double().clone(), 1  # average from here
            return CONTINUE
        if not self._keeps_all and 2 * self._tail_count < self._iterates.added:
            return CONTINUE
        phase = self._phase(step, losses, math.nan, math.nan)
        if self.phases:
            before = self.phases[-1]
            phase.distance = before.loss - phase.loss
            phase.noise = math.hypot(before.loss_error, phase.loss_error)
        # the excess of the loss at stationary iterates is proportional to the learning rate
        predicted = phase.distance * self.factor / (1 - self.factor)
        enough = predicted <= max(self.elbo_tolerance, 2 * phase.noise)
        reason = (
            f"the last reduction of the learning rate gained {phase.distance:.3g} nats of ELBO, +- {phase.noise:.2g}"
        )
        self._average = rows[:, :-1].mean(0) if self._keeps_all else self._tail
        return self._close(phase, enough, reason, 0.0)

    def _phase(self, step: int, losses: NDArray[np.float64], distance: float, noise: float) -> Phase:
        size = effective_size(losses[None]) if losses.std() > 0 else float(len(losses))
        error = float(losses.std(ddof=1)) / math.sqrt(size)
        rate = self.factor ** len(self.phases)
        assert self._begun is not None
        return Phase(rate, step - self._begun, distance, noise, float(losses.mean()), error)

    def _predict(self, phase: Phase) -> _Prediction:
        if math.isnan(phase.distance):
            return _Prediction(math.inf, 0.0, "")
        measured = [*self.phases[1:], phase]
        fit = fit_power_law(
            [max(of.distance, _LEAST_DISTANCE * of.noise, _TINY) for of in measured],
            [of.rate for of in measured],
            self.factor,
        )
        relative = self.factor**fit.power + self.accuracy / fit.error
        steps = predicted_steps([of.steps for of in measured], self.factor)
        return _Prediction(
            fit.error,
            relative * steps / (phase.steps + _FREE_STEPS),
            f"the guide's marginals are predicted to be within {fit.error:.2g} sd of their limit",
        )

    def _close(self, phase: Phase, enough: bool, reason: str, inefficiency: float) -> Decision:
        """End the phase, and the run if that is enough or the next one would cost too much."""
        self.phases.append(phase)
        if enough and not math.isnan(phase.distance):
            self.converged = True
            return Decision("stop", reason=f"converged: {reason}")
        if len(self.phases) > 3 and inefficiency > self.inefficiency:
            return Decision(
                "stop", reason=f"a lower learning rate would cost too many steps ({inefficiency:.2g}): {reason}"
            )
        self._iterates.clear()
        self._begun = None
        self._next_look, self._found, self._tail = 0, math.nan, None
        assert self._average is not None
        parameters = self._average.to(next(iter(self._parameters.values())).dtype)
        return Decision("lower", self.factor, "the iterates are stationary", parameters)
