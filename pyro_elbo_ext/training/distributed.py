"""``pyro.infer.SVI`` in several processes, each with its own part of every batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from pyro import poutine
from pyro.infer import ELBO, SVI
from pyro.infer.util import zero_grads
from pyro.optim import PyroOptim
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pyro_elbo_ext.compile.binding import WholeOptimizer
from pyro_elbo_ext.decomposed import DecomposedELBO
from pyro_elbo_ext.objective import Evaluation, Objective
from pyro_elbo_ext.record import VALUES
from pyro_elbo_ext.registration import check_registered, leaves_of
from pyro_elbo_ext.training import processes
from pyro_elbo_ext.training.batch_shares import Report, Survey, check_reports, merge, weights_of
from pyro_elbo_ext.training.random_streams import Purpose, RandomStreams
from pyro_elbo_ext.training.replica import (
    Replica,
    average_gradients,
    data_parallel,
    gradients_of,
    name_of,
    send_from_main,
)

_READY, _NEW, _FAILED = 0.0, 1.0, 2.0
_HEAD = 3  # status, loss, objective


@dataclass(slots=True)
class _Run:
    """One evaluation in this process: a loss with its gradient's surrogate, or the error it ended with."""

    survey: Survey
    loss: float = math.nan
    surrogate: Tensor | None = None
    evaluation: Evaluation | None = None
    captured: list[Tensor] | None = None  # the parameters that Pyro was asked for
    leaves: list[Tensor] | None = None  # those that the loss depends on
    error: Exception | None = None

    @property
    def sites(self) -> tuple[tuple[str, str], ...]:
        return () if self.evaluation is None else tuple((of.site, of.kind) for of in self.evaluation.sites)


class _Agreed(NamedTuple):
    """What all processes know of each other's runs: the sites in the history, and the plates that are split.

    ``own_split`` are those that are split in this process.
    """

    sites: tuple[tuple[str, str], ...] = ()
    split: tuple[str, ...] = ()
    own_split: frozenset[str] = frozenset()


class _Merged(NamedTuple):
    """A step of all processes together."""

    loss: float
    objective: float
    values: NDArray[np.float64]
    weight: float  # of this process's loss in the mean, times the number of processes


class DistributedSVI(SVI):
    r"""Stochastic variational inference in several processes: a drop-in for ``pyro.infer.SVI``.

    Every process that ``torchrun`` started makes one and calls :meth:`step` with its own part of the batch. The gradients
    are averaged by ``DistributedDataParallel`` over Pyro's ``ELBOModule``, over gloo on CPUs and nccl on GPUs, and all
    processes take the same step. In a single process it trains as ``pyro.infer.SVI`` does, but for where the random numbers
    come from, so that one script serves both.

    The result is that of one process with all batches together. For process r with :math:`B_r` of N data, the plate of the
    batch must have the size of the *whole* data set: ``pyro.plate(name, N, subsample_size=len(batch))``. Then

    .. math:: \mathrm{ELBO}_r = \tfrac{N}{B_r} \sum_{n \in r} f_n + g, \qquad
              \sum_r \tfrac{B_r}{B} \mathrm{ELBO}_r = \tfrac{N}{B} \sum_n f_n + g, \qquad B = \sum_r B_r,

    with :math:`f_n` the terms of a datum and its own latents and g those of the latents that all data share. The right side
    is the ELBO of the batch of B. Batches of one size have equal weights; those that differ are weighted as here, and it is
    an error where several plates are split in different proportion. ``torch.utils.data.DistributedSampler`` gives each
    process its part.

    Parameters
    ----------
    model, guide
        Pyro programs, the same in all processes. Their parameters may be those of modules, or plain ``pyro.param``.
    optim : PyroOptim or torch.optim.Optimizer
        Schedulers are stepped by the caller, in every process.
    loss : pyro.infer.ELBO
        An objective of this package, whose history then holds each site's terms for all batches together; or one of Pyro's
        that has a ``differentiable_loss``.
    shared_draws : bool
        Whether latents outside subsampled plates are drawn alike in all processes. By default each process draws them for
        itself, which lowers the gradient's variance as that many particles would, at no cost. With shared draws a step is
        that of a single process with the same draws, to rounding. Latents inside those plates, and random subsamples, are
        always drawn by each process for itself.
    seed : int, optional
        Of all random numbers. By default drawn by torch in process 0, so that ``pyro.set_rng_seed`` fixes it.
    timeout : float
        Seconds to wait for the other processes in one step. A process that dies is noticed at once by its closed connection,
        one that hangs after this time.

    Attributes
    ----------
    steps : int
        Steps taken.
    streams : RandomStreams
        Where the random numbers come from. The program's own generators are left as they were.

    Raises
    ------
    TypeError
        At construction, if the loss has no ``differentiable_loss``, or the optimizer is none.
    ValueError
        In every process and before any parameter has changed: if a term or the loss is NaN or infinite in one of them (names
        it and the site), a gradient is (names the parameter), parameters or sites differ between processes, or data
        would be counted wrongly.
    RuntimeError
        If another process has ended or does not answer in time. The parameters are those after the last whole step.

    References
    ----------
    Li et al. (2020), "PyTorch Distributed: Experiences on accelerating data parallel training".
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: PyroOptim | torch.optim.Optimizer,
        loss: ELBO,
        *,
        shared_draws: bool = False,
        seed: int | None = None,
        timeout: float = processes.TIMEOUT,
    ) -> None:
        if not isinstance(loss, ELBO) or not hasattr(loss, "differentiable_loss"):
            raise TypeError(
                f"the loss {type(loss).__name__} has no differentiable_loss, so that its gradients cannot wait for the "
                "other processes. Use an objective of pyro_elbo_ext, Trace_ELBO, TraceMeanField_ELBO or TraceEnum_ELBO."
            )
        if isinstance(optim, torch.optim.Optimizer):
            optim = WholeOptimizer(optim)
        if not isinstance(optim, PyroOptim):
            raise TypeError(f"optim must be an optimizer of pyro.optim or torch.optim, not {type(optim).__name__}")
        history = loss.history if isinstance(loss, Objective) else None
        if history is not None and history.gradient_mode == "particles":
            raise ValueError(
                "History(gradient_snr='particles') needs gradients by particle, which are not averaged over processes. Use "
                "gradient_snr='steps'."
            )
        super().__init__(model, guide, optim, loss)
        self.objective = loss
        self.steps = self.evaluations = 0
        processes.start(timeout)
        if seed is None:
            seed = int(torch.randint(1 << 31, ())) if processes.is_main() else 0
        self.streams = RandomStreams(processes.from_main(seed), processes.rank(), shared_draws)
        self._replica = Replica(model, guide, loss)
        self._parallel: DistributedDataParallel | None = None
        self._strays: list[Tensor] = []  # parameters that no module holds, in the same order in all processes
        self._of_modules: set[int] = set()  # ids of those that modules hold
        self._agreed: dict[bool, _Agreed] = {}  # by whether there is a gradient

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Take one step; arguments are those of model and guide: this process's part of the batch.  Every process calls it.

        Returns
        -------
        float
            The loss of all batches together before the step, in nats; the same in all processes.
        """
        run, merged = self._evaluate_together(args, kwargs, with_gradient=True)
        assert run.surrogate is not None
        assert run.captured is not None
        if run.surrogate.requires_grad:
            surrogate = run.surrogate if merged.weight == 1 else merged.weight * run.surrogate
            with processes.bounded("the average of the gradients"):
                surrogate.backward(retain_graph=self.objective.retain_graph)
                if processes.is_distributed():
                    average_gradients(self._strays)
        trained = list({id(p): p for p in (*run.captured, *self._of_optimizer())}.values())
        self._check_gradients(trained)
        if run.evaluation is not None:
            self._record(run.evaluation, merged, trained)
        self.optim(trained)
        zero_grads([*trained, *self._replica.parameters()])
        self.steps += 1
        return merged.loss

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """The loss of all batches together, in nats, without a step; not recorded.  Every process calls it."""
        _, merged = self._evaluate_together(args, kwargs, with_gradient=False)
        self.evaluations += 1
        return merged.loss

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands, beside the parameters, the optimizer and the objective; the same in all processes."""
        return {"steps": self.steps, "evaluations": self.evaluations, "seed": self.streams.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, with the draws of the run that was not interrupted."""
        self.steps, self.evaluations = int(state["steps"]), int(state["evaluations"])
        self.streams.seed = int(state["seed"])

    # One evaluation, here and everywhere

    def _evaluate_together(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, with_gradient: bool
    ) -> tuple[_Run, _Merged]:
        """Evaluate in this process, tell the others, and merge."""
        count, purpose = self._place(with_gradient)
        for _ in range(3):
            with self.streams.at(count, purpose):
                run = self._run(args, kwargs, with_gradient)
            merged = self._merge(run, with_gradient)
            if merged is not None:
                return run, merged
        raise ValueError(
            "the sites, plates or parameters of model and guide differ from run to run under the same random numbers, so "
            "that the processes cannot agree on them. Make them the same in every run."
        )

    def _place(self, with_gradient: bool) -> tuple[int, Purpose]:
        """Which of the streams of random numbers comes next."""
        return (self.steps, "step") if with_gradient else (self.evaluations, "evaluation")

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], with_gradient: bool) -> _Run:
        run = _Run(Survey())
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
                    run.loss = float(super().evaluate_loss(*args, **kwargs))
            unconstrained = [site["value"].unconstrained() for site in captured.trace.nodes.values()]
            run.captured = list({id(p): p for p in unconstrained}.values())
            if not math.isfinite(run.loss):
                self._raise_not_finite(run.loss, args, kwargs, with_gradient)
        except Exception as error:  # the others must hear of it before it is raised
            run.error = error
        return run

    def _run_with_gradient(self, run: _Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run.surrogate = (self._parallel or self._replica)(*args, **kwargs)
        run.leaves = [leaf for leaf in leaves_of(run.surrogate) if self._is_trained(leaf)]
        if isinstance(self.objective, Objective):
            run.evaluation = self._replica.evaluation
            assert run.evaluation is not None
            run.loss = self.objective._loss(run.evaluation)
        else:
            run.loss = float(run.surrogate.detach())
        if not self._knows(run):
            if isinstance(self.objective, Objective) and run.evaluation is not None:
                self.objective._check_trainable(run.evaluation)
            if not isinstance(self.optim, WholeOptimizer):
                check_registered(run.surrogate, (self.model, self.guide), (args, kwargs))

    def _is_trained(self, leaf: Tensor) -> bool:
        """Whether Pyro, a module or the optimizer knows it: not a tensor made on the way."""
        return (
            id(leaf) in self._of_modules
            or leaf in pyro.get_param_store()._param_to_name
            or isinstance(leaf, torch.nn.Parameter)
            or any(leaf is p for p in self._of_optimizer())
        )

    def _raise_not_finite(
        self, loss: float, args: tuple[Any, ...], kwargs: dict[str, Any], with_gradient: bool
    ) -> None:
        """Name the site where one of Pyro's losses is not finite, from the same draws made again."""
        if isinstance(self.objective, Objective):
            raise ValueError(f"the loss is {loss}")
        count, purpose = self._place(with_gradient)
        with self.streams.at(count, purpose), torch.no_grad():
            sampled = DecomposedELBO(self.objective.num_particles, kl="sampled", history=False)
            sampled.loss(self.model, self.guide, *args, **kwargs)
        raise ValueError(f"the loss is {loss}, though every site's log density is finite")

    def _knows(self, run: _Run) -> bool:
        """Whether the processes have agreed on runs like this one."""
        agreed = self._agreed.get(run.surrogate is not None)
        if agreed is None or agreed.sites != run.sites or agreed.own_split != run.survey.split:
            return False
        strays = [leaf for leaf in run.leaves or () if id(leaf) not in self._of_modules]
        if any(not any(leaf is p for p in self._strays) for leaf in strays):
            return False
        # without find_unused_parameters DistributedDataParallel would wait for gradients that do not come
        all_used = len(run.leaves or ()) - len(strays) == len(self._of_modules)
        return run.surrogate is None or self._uses_unused or all_used

    @property
    def _uses_unused(self) -> bool:
        return self._parallel is None or bool(self._parallel.find_unused_parameters)

    def _merge(self, run: _Run, with_gradient: bool) -> _Merged | None:
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
        weights = weights_of(agreed.split, by_plate[:, ::2], by_plate[:, 1::2])
        split = np.array([site in run.survey.sites_in_split for site, _ in agreed.sites], bool)
        return _Merged(
            float(weights @ table[:, 1]),
            float(weights @ table[:, 2]),
            merge(by_site.reshape(len(table), len(agreed.sites), len(VALUES)), weights, split),
            float(weights[processes.rank()] * len(table)) if processes.is_distributed() else 1.0,
        )

    def _raise_together(self, run: _Run) -> None:
        """Raise the error of the first process that has one."""
        if run.error is not None and not processes.is_distributed():
            raise run.error
        own = None if run.error is None else (type(run.error).__name__, str(run.error))
        errors = processes.gather_objects(own)
        first, (kind, message) = next((number, error) for number, error in enumerate(errors) if error is not None)
        head = f"process {first} of {len(errors)} at step {self.steps}: "
        raise (
            ValueError(head + message) if kind == "ValueError" else RuntimeError(f"{head}{kind}: {message}")
        ) from run.error

    # Agreeing with the others

    def _agree(self, run: _Run, with_gradient: bool) -> None:
        """Compare what is new with the other processes, and give all of them the parameters of process 0."""
        parameters = {self._name_of(p): p for p in (*(run.captured or ()), *(run.leaves or ()))}
        parameters.pop("", None)  # a module's, or nothing trains it
        state = {f"{name} of the modules": p for name, p in self._replica.state_dict(keep_vars=True).items()}
        own = Report(
            run.sites,
            tuple(sorted(run.survey.plates)),
            tuple(sorted(run.survey.split)),
            run.survey.digests(),
            {name: tuple(p.shape) for name, p in {**parameters, **state}.items() if isinstance(p, Tensor)},
        )
        reports = processes.gather_objects(own)
        if processes.is_distributed():
            check_reports(reports)
        split = tuple(sorted({name for of in reports for name in of.split}))
        self._agreed[with_gradient] = _Agreed(run.sites, split, frozenset(run.survey.split))
        self._synchronize([parameters[name] for name in sorted(parameters)], run.leaves or ())

    def _synchronize(self, parameters: Sequence[Tensor], reached: Sequence[Tensor]) -> None:
        """Make all processes start from the same parameters, and find out whose gradients are to be averaged, and how."""
        strays = self._replica.adopt(parameters)
        own = [p for p in self._replica.parameters() if p.requires_grad]
        has_new = {id(p) for p in own} != self._of_modules
        self._of_modules = {id(p) for p in own}
        if processes.is_distributed():
            send_from_main([*self._replica.parameters(), *self._replica.buffers(), *strays])
        here = {id(p) for p in reached}
        used = processes.gather_objects(
            ([i for i, p in enumerate(strays) if id(p) in here], all(id(p) in here for p in own))
        )
        for i in sorted({i for indices, _ in used for i in indices}):
            if not any(strays[i] is p for p in self._strays):
                self._strays.append(strays[i])
        if not processes.is_distributed() or not reached:
            return
        unused = not all(all_used for _, all_used in used) or (self._parallel is not None and self._uses_unused)
        if self._parallel is None or has_new or unused != self._uses_unused:
            self._parallel = None  # the hooks of the old one end before those of the new one begin
            self._parallel = data_parallel(self._replica, unused)

    def _name_of(self, parameter: Tensor) -> str:
        return name_of(parameter, self.optim.optimizer if isinstance(self.optim, WholeOptimizer) else None)

    # Taking the step

    def _of_optimizer(self) -> list[Tensor]:
        """The parameters of an optimizer that was made with them."""
        return list(self.optim.optim_objs) if isinstance(self.optim, WholeOptimizer) else []

    def _check_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Raise ValueError if a gradient, by now the same in all processes, is NaN or infinite."""
        reached = [p for p in parameters if p.grad is not None]
        finite = [bool(torch.isfinite(norm)) for norm in torch._foreach_norm(gradients_of(reached))] if reached else []
        if all(finite):
            return
        name = self._name_of(reached[finite.index(False)])
        for p in reached:
            p.grad = torch.zeros_like(p)
        raise ValueError(
            f"the gradient of parameter '{name}' is not finite at step {self.steps}, though the loss is. No parameter has "
            "been changed. Look for a density at the edge of its support; if training has diverged, lower the learning rate."
        )

    def _record(self, evaluation: Evaluation, merged: _Merged, trained: Sequence[Tensor]) -> None:
        objective = self.objective
        history = objective.history
        if history is not None and history.gradient_mode is not None:
            reached = [p for p in trained if p.grad is not None]
            names = [self._name_of(p) or f"unregistered_{i}" for i, p in enumerate(reached)]
            history.append_gradients(dict(zip(names, gradients_of(reached), strict=True)))
        values = [tuple(row) for row in merged.values.tolist()]
        objective._record(replace(evaluation, values=values, objective=merged.objective))
