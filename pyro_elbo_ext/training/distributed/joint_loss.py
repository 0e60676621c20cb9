"""One loss of all processes together: each evaluates its part, tells the others, and merges what they told.

After each evaluation one message goes round, in which every process has a row: whether it succeeded, its loss, the sizes of
its batch and the values of its sites. An error in one process is therefore an error in all of them, before any of them has
sent a gradient. What is new, in a first step or when model and guide do something they have not done before, is compared in
a longer message, and then the evaluation is made again with the same random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor

from pyro_elbo_ext.history.record import VALUES
from pyro_elbo_ext.objectives import DecomposedELBO
from pyro_elbo_ext.objectives.evaluation import Evaluation
from pyro_elbo_ext.objectives.not_finite import NotFinite
from pyro_elbo_ext.objectives.objective import Objective
from pyro_elbo_ext.terms.registration import leaves_of
from pyro_elbo_ext.training import processes
from pyro_elbo_ext.training.distributed.batch_shares import Report, Survey, check_reports, merge, weights_of
from pyro_elbo_ext.training.distributed.random_streams import Purpose, RandomStreams
from pyro_elbo_ext.training.distributed.replica import Replica
from pyro_elbo_ext.training.safety import is_numerical

_READY, _NEW, _FAILED = 0.0, 1.0, 2.0
_HEAD = 3  # status, loss, objective


@dataclass(slots=True)
class Run:
    """One evaluation in this process.

    Attributes
    ----------
    survey : Survey
        The plates it went through.
    loss : float
        In nats.
    surrogate : Tensor or None
        Scalar with the gradient of the loss; None without one.
    evaluation : Evaluation or None
        By site, of an objective of this package.
    captured : list of Tensor
        The unconstrained parameters that Pyro was asked for.
    leaves : list of Tensor
        The tensors that the surrogate depends on.
    error : Exception or None
        What it ended with.
    """

    survey: Survey
    loss: float = math.nan
    surrogate: Tensor | None = None
    evaluation: Evaluation | None = None
    captured: list[Tensor] = field(default_factory=list)
    leaves: list[Tensor] = field(default_factory=list)
    error: Exception | None = None

    @property
    def sites(self) -> tuple[tuple[str, str], ...]:
        return () if self.evaluation is None else tuple((of.site, of.kind) for of in self.evaluation.sites)


class Merged(NamedTuple):
    """An evaluation of all processes together.

    ``values`` has a row for each site; ``weight`` is that of this process's loss in the mean, times the number of processes.
    """

    loss: float
    objective: float
    values: NDArray[np.float64]
    weight: float


class _Agreed(NamedTuple):
    """What all processes know of each other: the sites in the history, the plates that are split in any, and in this one."""

    sites: tuple[tuple[str, str], ...] = ()
    split: tuple[str, ...] = ()
    own_split: frozenset[str] = frozenset()
    summed: bool = False  # whether the losses are to be summed, not averaged


class JointLoss:
    """A loss that several processes evaluate together.

    Parameters
    ----------
    model, guide, loss
        As of ``pyro.infer.SVI``; the loss must have a ``differentiable_loss``.
    streams
        Where the random numbers come from.

    Attributes
    ----------
    replica : Replica
        Model, guide and loss as a module.
    steps, evaluations : int
        Evaluations so far with a gradient and without one; the caller advances the first.
    """

    def __init__(
        self, model: Callable[..., Any], guide: Callable[..., Any], loss: ELBO, streams: RandomStreams
    ) -> None:
        if not isinstance(loss, ELBO) or not hasattr(loss, "differentiable_loss"):
            raise TypeError(
                f"the loss {type(loss).__name__} has no differentiable_loss, so that its gradients cannot wait for the "
                "other processes. Use an objective of pyro_elbo_ext, Trace_ELBO, TraceMeanField_ELBO or TraceEnum_ELBO."
            )
        if processes.world_size() > 1 and getattr(loss, "free_bits", None) is not None:
            raise ValueError(
                "free_bits compares the kl_prior of a whole batch with a floor, but each process sees a part of it only. "
                "Use kl_weight instead, or a single process."
            )
        self.model, self.guide, self.objective, self.streams = model, guide, loss, streams
        self.replica = Replica(model, guide, loss)
        self.steps = self.evaluations = 0
        self._agreed: dict[bool, _Agreed] = {}  # by whether there is a gradient

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands in its random numbers; the same in all processes."""
        return {"steps": self.steps, "evaluations": self.evaluations, "seed": self.streams.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, with the draws of the run that was not interrupted."""
        self.steps, self.evaluations = int(state["steps"]), int(state["evaluations"])
        self.streams.seed = int(state["seed"])

    def evaluate(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, with_gradient: bool) -> tuple[Run, Merged]:
        """Evaluate in this process, tell the others, and merge.  Every process calls it.

        Raises
        ------
        ValueError
            In every process: for an error in one of them, or if they do not fit together.
        RuntimeError
            If another process has ended or does not answer; or, in every process, for another error in one of them.
        """
        count, purpose = self._place(with_gradient)
        for _ in range(3):
            with self.streams.at(count, purpose):
                run = self.run(args, kwargs, with_gradient=with_gradient)
            merged = self._merge(run, with_gradient)
            if merged is not None:
                self.evaluations += not with_gradient
                return run, merged
        raise ValueError(
            "the sites, plates or parameters of model and guide differ from run to run under the same random numbers, so "
            "that the processes cannot agree on them. Make them the same in every run."
        )

    def record(self, run: Run, merged: Merged) -> None:
        """Enter the evaluation of all processes into the history of an objective of this package."""
        if run.evaluation is not None:
            values = [tuple(row) for row in merged.values.tolist()]
            self.objective._record(replace(run.evaluation, values=values, objective=merged.objective))

    # What trains it may know more of

    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The surrogate."""
        return self.replica(*args, **kwargs)

    def _check_new(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise ValueError if a run of a new kind cannot be trained."""

    def _knows_parameters(self, run: Run) -> bool:
        """Whether the processes have agreed on all parameters that it depends on."""
        return True

    def _named_parameters(self, run: Run) -> dict[str, Tensor]:
        """Those that no module holds."""
        return {}

    def _agree_on_parameters(self, run: Run) -> None:
        """Make them the same in all processes."""

    # One evaluation, here and everywhere

    def _place(self, with_gradient: bool) -> tuple[int, Purpose]:
        """Which of the streams of random numbers comes next."""
        return (self.steps, "step") if with_gradient else (self.evaluations, "evaluation")

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, with_gradient: bool) -> Run:
        """Evaluate in this process alone; an error is kept in the run."""
        run = Run(Survey())
        try:
            with poutine.trace(param_only=True) as captured, run.survey:
                if with_gradient:
                    self._run_with_gradient(run, args, kwargs)
                elif isinstance(self.objective, Objective):
                    with torch.no_grad():
                        model, guide = self.model, self.guide
                        run.evaluation = self.objective._evaluate(model, guide, args, kwargs, with_gradient=False)
                    run.loss = self.objective._loss(run.evaluation)
                else:
                    with torch.no_grad():
                        run.loss = float(self.objective.loss(self.model, self.guide, *args, **kwargs))
            unconstrained = [site["value"].unconstrained() for site in captured.trace.nodes.values()]
            run.captured = list({id(p): p for p in unconstrained}.values())
            if not math.isfinite(run.loss):
                self._raise_not_finite(run.loss, args, kwargs, with_gradient)
        except Exception as error:  # the others must hear of it before it is raised
            run.error = error
        return run

    def _run_with_gradient(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run.surrogate = self._forward(args, kwargs)
        run.leaves = leaves_of(run.surrogate)
        if isinstance(self.objective, Objective):
            run.evaluation = self.replica.evaluation
            assert run.evaluation is not None
            run.loss = self.objective._loss(run.evaluation)
        else:
            run.loss = float(run.surrogate.detach())
        if not self._knows(run):
            if isinstance(self.objective, Objective) and run.evaluation is not None:
                self.objective._check_trainable(run.evaluation)
            self._check_new(run, args, kwargs)

    def _raise_not_finite(
        self, loss: float, args: tuple[Any, ...], kwargs: dict[str, Any], with_gradient: bool
    ) -> None:
        """Name the site where one of Pyro's losses is not finite, from the same draws made again."""
        if isinstance(self.objective, Objective):
            raise NotFinite(f"the loss is {loss}")
        count, purpose = self._place(with_gradient)
        with self.streams.at(count, purpose), torch.no_grad():
            sampled = DecomposedELBO(self.objective.num_particles, kl="sampled", history=False)
            sampled.loss(self.model, self.guide, *args, **kwargs)
        raise NotFinite(f"the loss is {loss}, though every site's log density is finite")

    def _knows(self, run: Run) -> bool:
        """Whether the processes have agreed on runs like this one."""
        agreed = self._agreed.get(run.surrogate is not None)
        if agreed is None or agreed.sites != run.sites or agreed.own_split != run.survey.split:
            return False
        return run.surrogate is None or self._knows_parameters(run)

    def _merge(self, run: Run, with_gradient: bool) -> Merged | None:
        """The step of all processes together; None if they have agreed on something new and must run again.

        Raises the same error in all of them.
        """
        agreed = self._agreed.get(with_gradient, _Agreed())
        numbers = np.zeros(_HEAD + 2 * len(agreed.split) + len(VALUES) * len(agreed.sites))
        numbers[0] = _FAILED if run.error is not None else _READY if self._knows(run) else _NEW
        if numbers[0] == _READY:
            values = () if run.evaluation is None else np.ravel(run.evaluation.values)
            sizes = [size for name in agreed.split for size in run.survey.plates[name]]
            objective = -run.loss if run.evaluation is None else run.evaluation.objective
            numbers[1:] = [run.loss, objective, *sizes, *values]
        table = processes.gather(numbers)
        if (table[:, 0] == _FAILED).any():
            self._raise_together(run)
        if (table[:, 0] == _NEW).any():
            self._agree(run, with_gradient)
            return None
        by_plate, by_site = np.split(table[:, _HEAD:], [2 * len(agreed.split)], 1)
        weights = np.ones(len(table))
        if not agreed.summed:
            weights = weights_of(agreed.split, by_plate[:, ::2], by_plate[:, 1::2])
        split = np.array([site in run.survey.sites_in_split for site, _ in agreed.sites], bool)
        return Merged(
            float(weights @ table[:, 1]),
            float(weights @ table[:, 2]),
            merge(by_site.reshape(len(table), len(agreed.sites), len(VALUES)), weights, split),
            float(weights[processes.rank()] * len(table)) if processes.is_distributed() else 1.0,
        )

    def _raise_together(self, run: Run) -> None:
        """Raise the error of the first process that has one."""
        if run.error is not None and not processes.is_distributed():
            raise run.error
        own = None
        if run.error is not None:
            own = "NotFinite" if is_numerical(run.error) else type(run.error).__name__, str(run.error)
        errors = processes.gather_objects(own)
        first, (kind, message) = next((number, error) for number, error in enumerate(errors) if error is not None)
        head = f"process {first} of {len(errors)} at step {self.steps}: "
        if kind == "NotFinite":
            raise NotFinite(head + message) from run.error
        raise (
            ValueError(head + message) if kind == "ValueError" else RuntimeError(f"{head}{kind}: {message}")
        ) from run.error

    def _agree(self, run: Run, with_gradient: bool) -> None:
        """Compare what is new with the other processes."""
        parameters = self._named_parameters(run)
        state = {f"{name} of the modules": p for name, p in self.replica.state_dict(keep_vars=True).items()}
        own = Report(
            run.sites,
            tuple(sorted(run.survey.plates)),
            tuple(sorted(run.survey.split)),
            tuple(sorted(run.survey.shared or ())),
            run.survey.digests(),
            {name: tuple(p.shape) for name, p in {**parameters, **state}.items() if isinstance(p, Tensor)},
        )
        reports = processes.gather_objects(own)
        summed = check_reports(reports)
        split = tuple(sorted({name for of in reports for name in of.split}))
        self._agreed[with_gradient] = _Agreed(run.sites, split, frozenset(run.survey.split), summed)
        self._agree_on_parameters(run)
