"""``pyro.infer.SVI`` whose steps are compiled graphs."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from pyro.infer import SVI
from pyro.util import warn_if_nan
from torch import Tensor
from tqdm.auto import tqdm

from pyro_elbo_ext.compile.errors import CannotCompile
from pyro_elbo_ext.compile.machine_code.layouts import Changed
from pyro_elbo_ext.compile.taking import CompiledSteps


class CompiledSVI(CompiledSteps):
    r"""Stochastic variational inference as compiled graphs: a drop-in for ``pyro.infer.SVI``.

    Model and guide are run by Pyro once for each kind of arguments; what they compute, its gradient and the optimizer's
    update become one ATen graph, which is compiled. Parameters, data, the optimizer's state, learning rates and random
    numbers are inputs of the graph, not part of it; parameters and state are updated in place, so that the param store,
    modules, ``guide.median()``, ``Predictive``, saving and loading see them as ever.

    The first step with new shapes or settings is taken by Pyro itself: it makes the parameters and the optimizer's state,
    and checks values if validation is on. Compiled steps do not check values.

    Parameters
    ----------
    model, guide
        Any Pyro programs whose structure is the same in every run: the same sites, shapes and plates, and no decision in
        Python that depends on a drawn value, a parameter or the data. This is checked before a graph is used. Python code
        in them runs while tracing only. What it reads then is compared before each step (in :meth:`run` before each call of
        C): attributes, closures, globals, default arguments, what lists, dictionaries and NumPy arrays hold, and the shape,
        strides, dtype, device and memory of every tensor. A change takes another graph (the last 32 are kept); another
        tensor of the same shape does not. What changes 16 times is an error that names it: pass it as an argument. Not seen
        are files, the environment, clocks, and what compiled extensions hold.
    optim : PyroOptim or torch.optim.Optimizer
        Adam, AdamW, ClippedAdam and SGD become part of the graph, with per-parameter arguments, gradient clipping and
        schedulers of the learning rate. Any other runs as it is, on compiled gradients; see ``optimizer_reason``.
    loss
        ``Trace_ELBO``, ``TraceMeanField_ELBO``, or any objective of this package, whose history is recorded as ever; its
        ``last`` is None after a compiled step.
    loss_and_grads
        Not compiled; with ``fallback`` Pyro trains with it.
    num_samples, num_steps, kwargs
        As ``pyro.infer.SVI`` takes them, deprecated there; they are for its :meth:`run`, which is another one here.
    backend : str or callable
        "inductor", machine code; "eager", the graph run operator by operator; or another of ``torch.compile``'s.
    same_draws : bool
        Draw random numbers with the operators that Pyro uses, so that under the same seed a compiled step equals Pyro's up
        to rounding. Otherwise "inductor" may draw its own, equal in distribution and reproducible by ``pyro.set_rng_seed``.
    steps_per_call : int, optional
        Steps in one graph in :meth:`run` where they cannot be repeated in C: more of them run faster and compile longer. By
        default 4 where a step is short, else 1.
    fallback : bool
        Whether to train as ``pyro.infer.SVI`` does, with a warning in the log, where a program cannot be compiled; see
        ``eager_reason``. Otherwise that is an error.
    options : dict, optional
        For the "inductor" backend, e.g. ``{"cpp_wrapper": True}``: faster steps, longer compilation.

    Attributes
    ----------
    compile_time : float
        Seconds spent on tracing and compiling so far. The machine code is kept on disk by torch, between processes.
    eager_reason : str or None
        Why some or all steps are run by Pyro, if they are.
    optimizer_reason : str or None
        Why the optimizer is not part of the graph, if it is not.

    Raises
    ------
    CannotCompile
        A ValueError: the loss, an argument or the programs cannot be compiled, or the compiler fails; says why, at which
        site or line, and what to do. It comes at construction for the loss, otherwise after the first step, or at a later
        one that needs another graph; parameters, optimizer and history are then those after the last whole step.
    ValueError
        At construction, for a backend or an option that torch does not know, or an optimizer that SVI cannot use. In a step,
        if a term of an objective of this package is NaN or infinite, naming the site; the parameters are then those
        before that step. With Pyro's losses a NaN is a warning, as in Pyro.

    RuntimeError
        If another thread is in a step of it.

    References
    ----------
    Ansel et al. (2024), "PyTorch 2: Faster machine learning through dynamic Python bytecode transformation and graph
    compilation".
    """

    def __repr__(self) -> str:
        programs = (getattr(program, "__name__", type(program).__name__) for program in (self.model, self.guide))
        how = "compiled" if self.eager_reason is None else f"by Pyro, {self.eager_reason}"
        return f"{type(self).__name__}({', '.join(programs)}, {type(self.optim).__name__}, {self.objective!r}): {how}"

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Take one step; arguments are those of model and guide.

        Returns
        -------
        float
            The loss before the step, in nats.
        """
        with self._alone:
            program, tensors, loss = self._find(args, kwargs, SVI.step)
            if program is None:
                assert loss is not None
                return loss
            if not self._bind(program):
                return float(super().step(*args, **kwargs))
            (kl_weight,) = self._kl_weights(0, 1)
            binding, recorded = program.binding, self._records
            before = self.objective.num_steps if recorded else 0
            if recorded:
                program.forget_last()
            try:
                if self.optimizer_reason is not None:
                    return self._step_with_eager_optimizer(program, tensors)
                assert binding is not None
                value, table = program.take_one(kl_weight, tensors)
                if recorded:
                    self._record(program, value, table, kl_weight)
                binding.advance(1)
            except Changed as changed:
                self._look_again(program, changed, args, kwargs)
                return self.step(*args, **kwargs)
            except CannotCompile as error:  # its graph, before anything has changed
                self._give_up(program, error)
                return float(super().step(*args, **kwargs))
            except BaseException:  # it may come from outside, after the step: what was taken is counted and recorded
                taken = program.last_in_c() if recorded else None
                if taken is not None and math.isfinite(taken[0]) and self._count() == before:
                    self._record(program, *taken, kl_weight)
                if binding is not None:
                    binding.settle()
                raise
            if not recorded and value != value:
                warn_if_nan(value, "loss")
            return value

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """The loss, in nats, without a step; it is not recorded in the history."""
        with self._alone:
            program, tensors, loss = self._find(args, kwargs, SVI.evaluate_loss)
            if program is None:
                assert loss is not None
                return loss
            try:
                value = float(program.value(self._kl_weights(0, 1)[0], tensors))
            except Changed as changed:
                self._look_again(program, changed, args, kwargs)
                return self.evaluate_loss(*args, **kwargs)
            except CannotCompile as error:
                self._give_up(program, error)
                return float(super().evaluate_loss(*args, **kwargs))
            warn_if_nan(value, "loss")
            return value

    def run(self, num_steps: int, *args: Any, progress: bool = True, **kwargs: Any) -> Tensor:
        """Take many steps with the same arguments.

        On the CPU, with "inductor", a step that is nothing but kernels, small matrix products and triangular systems is
        repeated in C, without Python in between; the results are those of :meth:`step`.

        Parameters
        ----------
        num_steps
            How many.
        args, kwargs
            Those of model and guide, but for ``num_steps`` and ``progress``.
        progress
            Whether to show a progress bar.

        Returns
        -------
        Tensor
            The loss of each step, float64, shape ``(num_steps,)``, on the device of the parameters; ``(num_steps, n)`` for a
            loss of Pyro's that returns a tuple of n.
        """
        if not hasattr(num_steps, "__index__") or isinstance(num_steps, Tensor):
            raise TypeError(
                f"num_steps must be an integer, not a {type(num_steps).__name__}: run takes the number of steps first, then "
                "the arguments of model and guide. Pyro's own run is another method, which is deprecated."
            )
        if operator.index(num_steps) < 0:
            raise ValueError(f"num_steps must be at least 0, not {num_steps!r}")
        losses: list[Tensor] = []
        with self._alone, tqdm(total=num_steps, disable=not progress, unit="step") as bar:
            taken, compiling = 0, progress
            while taken < num_steps:
                if compiling:
                    compiling = self.eager_reason is None and not self._is_compiled(args, kwargs)
                    bar.set_description("compiling" if compiling else None)
                many = self._many(num_steps - taken, args, kwargs)
                if many is None:  # Pyro's first step, or all of them where something is not compiled
                    many = torch.tensor([self.step(*args, **kwargs)], dtype=torch.float64)
                losses.append(many)
                taken += len(many)
                bar.update(len(many))
                if progress:
                    last = many[-1].reshape(-1).tolist()  # several numbers of a loss of Pyro's that returns a tuple
                    bar.set_postfix(loss=", ".join([f"{loss:.5g}" for loss in last]), refresh=False)
            bar.set_description(None)
        device = losses[-1].device if losses else None
        return torch.cat([of.to(device) for of in losses]) if losses else torch.zeros(0, dtype=torch.float64)
