"""``pyro.infer.SVI`` in several processes, each with its own part of every batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.infer import ELBO, SVI
from pyro.infer.util import zero_grads
from pyro.optim import PyroOptim
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pyro_elbo_ext.compile.binding import WholeOptimizer
from pyro_elbo_ext.objectives.not_finite import NotFinite
from pyro_elbo_ext.objectives.objective import Objective
from pyro_elbo_ext.programs.arguments import check_seed
from pyro_elbo_ext.terms.registration import check_registered
from pyro_elbo_ext.training import processes
from pyro_elbo_ext.training.distributed.joint_loss import JointLoss, Run
from pyro_elbo_ext.training.distributed.random_streams import RandomStreams
from pyro_elbo_ext.training.distributed.replica import (
    average_gradients,
    data_parallel,
    gradients_of,
    is_parameter,
    name_of,
    send_from_main,
)


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
    objective : pyro.infer.ELBO
        The loss.

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
        check_seed(seed)
        processes.start(timeout)
        if seed is None:
            seed = int(torch.randint(1 << 31, ())) if processes.is_main() else 0
        self.streams = RandomStreams(processes.from_main(seed), processes.rank(), shared_draws)
        self._parameters = _Parameters(model, guide, loss, self.streams, optim)
        super().__init__(model, guide, optim, loss)
        self.objective = loss

    @property
    def steps(self) -> int:
        """Steps taken."""
        return self._parameters.steps

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Take one step; arguments are those of model and guide: this process's part of the batch.  Every process calls it.

        Returns
        -------
        float
            The loss of all batches together before the step, in nats; the same in all processes.
        """
        joint = self._parameters
        run, merged = joint.evaluate(args, kwargs, with_gradient=True)
        assert run.surrogate is not None
        if run.surrogate.requires_grad:
            surrogate = run.surrogate if merged.weight == 1 else merged.weight * run.surrogate
            with processes.bounded("the average of the gradients"):
                surrogate.backward(retain_graph=self.objective.retain_graph)
                if processes.is_distributed():
                    average_gradients(joint.strays)
        trained = list({id(p): p for p in (*run.captured, *joint.of_optimizer())}.values())
        self._check_gradients(trained)
        history = self.objective.history if isinstance(self.objective, Objective) else None
        if history is not None and history.gradient_mode is not None:
            reached = [p for p in trained if p.grad is not None]
            names = [joint.name_of(p) or f"unregistered_{i}" for i, p in enumerate(reached)]
            history.append_gradients(dict(zip(names, gradients_of(reached), strict=True)))
        joint.record(run, merged)
        self.optim(trained)
        zero_grads([*trained, *joint.replica.parameters()])
        joint.steps += 1
        return merged.loss

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """The loss of all batches together, in nats, without a step; not recorded.  Every process calls it."""
        return self._parameters.evaluate(args, kwargs, with_gradient=False)[1].loss

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands, beside the parameters, the optimizer and the objective; the same in all processes."""
        return self._parameters.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, with the draws of the run that was not interrupted."""
        self._parameters.load_state_dict(state)

    def _check_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Raise ValueError if a gradient, by now the same in all processes, is NaN or infinite."""
        reached = [p for p in parameters if p.grad is not None]
        finite = [bool(torch.isfinite(norm)) for norm in torch._foreach_norm(gradients_of(reached))] if reached else []
        if all(finite):
            return
        name = self._parameters.name_of(reached[finite.index(False)])
        for p in reached:
            p.grad = torch.zeros_like(p)
        raise NotFinite(
            f"the gradient of parameter '{name}' is not finite at step {self.steps}, though the loss is. No parameter has "
            "been changed. Look for a density at the edge of its support; if training has diverged, lower the learning rate."
        )


class _Parameters(JointLoss):
    """A joint loss with its parameters: those of modules in DistributedDataParallel, the others averaged here.

    Attributes
    ----------
    strays : list of Tensor
        Parameters that no module holds, in the same order in all processes.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        loss: ELBO,
        streams: RandomStreams,
        optim: PyroOptim,
    ) -> None:
        super().__init__(model, guide, loss, streams)
        self.strays: list[Tensor] = []
        self._optim = optim
        self._parallel: DistributedDataParallel | None = None
        self._of_modules: set[int] = set()  # ids of parameters

    def name_of(self, parameter: Tensor) -> str:
        """Its name in the param store, its place in the optimizer, or ""."""
        return name_of(parameter, self._optim.optimizer if isinstance(self._optim, WholeOptimizer) else None)

    def of_optimizer(self) -> list[Tensor]:
        """The parameters of an optimizer that was made with them."""
        return list(self._optim.optim_objs) if isinstance(self._optim, WholeOptimizer) else []

    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return (self._parallel or self.replica)(*args, **kwargs)

    def _check_new(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if run.surrogate is not None and not isinstance(self._optim, WholeOptimizer):
            check_registered(run.surrogate, (self.model, self.guide), (args, kwargs))

    def _trained(self, run: Run) -> list[Tensor]:
        """The leaves that Pyro, a module or the optimizer knows; the others were made on the way."""
        own = {id(p) for p in self.of_optimizer()} | self._of_modules
        return [p for p in run.leaves if id(p) in own or is_parameter(p)]

    def _knows_parameters(self, run: Run) -> bool:
        leaves = self._trained(run)
        strays = [leaf for leaf in leaves if id(leaf) not in self._of_modules]
        if any(not any(leaf is p for p in self.strays) for leaf in strays):
            return False
        # without find_unused_parameters DistributedDataParallel would wait for gradients that do not come
        return self._allows_unused or len(leaves) - len(strays) == len(self._of_modules)

    @property
    def _allows_unused(self) -> bool:
        return self._parallel is None or bool(self._parallel.find_unused_parameters)

    def _named_parameters(self, run: Run) -> dict[str, Tensor]:
        named = {self.name_of(p): p for p in (*run.captured, *self._trained(run))}
        named.pop("", None)  # a module's, or nothing trains it
        return named

    def _agree_on_parameters(self, run: Run) -> None:
        named = self._named_parameters(run)
        strays = self.replica.adopt([named[name] for name in sorted(named)])
        own = [p for p in self.replica.parameters() if p.requires_grad]
        has_new = {id(p) for p in own} != self._of_modules
        self._of_modules = {id(p) for p in own}
        if processes.is_distributed():
            send_from_main([*self.replica.parameters(), *self.replica.buffers(), *strays])
        here = {id(p) for p in run.leaves}
        reached = [i for i, p in enumerate(strays) if id(p) in here]
        used = processes.gather_objects((reached, all(id(p) in here for p in own)))
        for i in sorted({i for indices, _ in used for i in indices}):
            if not any(strays[i] is p for p in self.strays):
                self.strays.append(strays[i])
        if not processes.is_distributed() or run.surrogate is None:
            return
        unused = not all(all_used for _, all_used in used) or (self._parallel is not None and self._allows_unused)
        if self._parallel is None or has_new or unused != self._allows_unused:
            self._parallel = None  # the hooks of the old one end before those of the new one begin
            self._parallel = data_parallel(self.replica, unused)
