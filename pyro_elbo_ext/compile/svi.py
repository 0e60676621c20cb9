"""``pyro.infer.SVI`` whose steps are compiled graphs."""

from __future__ import annotations

import logging
import math
import operator
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from pyro import poutine
from pyro.infer import ELBO, SVI
from pyro.infer.util import zero_grads
from pyro.optim import PyroOptim
from pyro.poutine.runtime import _PYRO_STACK
from pyro.util import warn_if_nan
from torch import Tensor
from tqdm.auto import tqdm

from pyro_elbo_ext.compile.binding import Binding, WholeOptimizer, portable
from pyro_elbo_ext.compile.errors import CannotCompile
from pyro_elbo_ext.compile.machine_code.compiler import check_backend, import_dynamo
from pyro_elbo_ext.compile.machine_code.layouts import Changed, has_memory
from pyro_elbo_ext.compile.machine_code.native import Taken
from pyro_elbo_ext.compile.program import Program, Settings
from pyro_elbo_ext.compile.programs import MOST_KEPT, Programs
from pyro_elbo_ext.compile.threads import OneThread
from pyro_elbo_ext.compile.tracing.arguments import Args, Arguments, Key, Kwargs, described, name_of, take_apart
from pyro_elbo_ext.compile.tracing.first_look import FirstLook
from pyro_elbo_ext.compile.tracing.losses import TracedLoss, traced_loss
from pyro_elbo_ext.compile.updates import Unsupported, check_evaluates_once
from pyro_elbo_ext.history.record import VALUES
from pyro_elbo_ext.objectives.evaluation import Weight
from pyro_elbo_ext.objectives.not_finite import NotFinite
from pyro_elbo_ext.objectives.objective import Objective
from pyro_elbo_ext.programs.interrupts import interrupts_wait
from pyro_elbo_ext.programs.replay import OwnIndices

logger = logging.getLogger(__name__)

_MANY_PROGRAMS = 8
_MANY_CHANGES, _MOST_CHANGES = 3, 16  # graphs made because one thing has changed that programs read
_KEEP_IN_TENSOR = "Pass it as an argument, or keep it in a tensor that is written to in place (fill_, copy_)."
_NEEDS_GRADIENT = operator.attrgetter("requires_grad")
_is_autocast = torch._C._is_any_autocast_enabled
_CALLS_PER_CHECK = 64  # of a run, between two looks at its losses
_SHORT, _SHORT_STEPS = 5e-4, 4  # seconds that a step may take for so many to be put in a graph
_SECONDS_IN_C, _MOST_IN_C = 0.1, 1 << 15  # of a run, between two looks at its losses and at the keyboard


class _Found(NamedTuple):
    """The program of a call with its tensors; without a program, what Pyro made of the call."""

    program: Program | None
    tensors: list[Tensor]
    loss: float | None


class CompiledSVI(SVI):
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

    model: Callable[..., Any]

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: PyroOptim | torch.optim.Optimizer,
        loss: Any,
        loss_and_grads: Callable[..., Any] | None = None,
        num_samples: int = 0,
        num_steps: int = 0,
        *,
        backend: str | Callable[..., Any] = "inductor",
        same_draws: bool = False,
        steps_per_call: int | None = None,
        fallback: bool = False,
        options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if steps_per_call is not None and operator.index(steps_per_call) < 1:
            raise ValueError(f"steps_per_call must be at least 1, not {steps_per_call!r}")
        if isinstance(optim, torch.optim.Optimizer):
            optim = WholeOptimizer(optim)
        super().__init__(model, guide, optim, loss, loss_and_grads, num_samples, num_steps, **kwargs)
        check_evaluates_once(optim)
        if isinstance(loss, ELBO) and not isinstance(loss, Objective) and loss_and_grads is None:
            self.loss_and_grads = FirstLook(loss, self.loss_and_grads)  # type: ignore[has-type]
        self.objective = loss
        self._records = isinstance(loss, Objective)  # steps in a history of its own
        self.steps_per_call = steps_per_call
        self.fallback = fallback
        self.eager_reason: str | None = None
        self.optimizer_reason: str | None = None
        self._settings = Settings(backend, same_draws, dict(options or {}))
        self._alone = OneThread("a step of this CompiledSVI")
        self._programs = Programs()
        self._closely = False  # whether the program of the next call must be found by a look at every tensor
        self._in_one_go = 64  # steps in one call of C, by the time that they take
        self._num_made = 0  # programs, those dropped included
        self._kinds: dict[str, set[object]] = {}  # of arguments, by their names, that programs were made for
        self._within: set[str] = set()  # handlers around steps that were reported
        self._counters: set[str] = set()  # what programs were found to change themselves
        self._changes: Counter[str] = Counter()  # by what is read from outside: how often it took another graph
        self._last: tuple[Args, Key, Program, Any, Any] | None = (
            None  # to find the program without taking arguments apart
        )
        self._traced: TracedLoss | None = None
        self._none_compiles: CannotCompile | None = None  # for want of something on this machine
        try:
            if loss_and_grads is not None:
                raise CannotCompile("loss_and_grads cannot be compiled. Leave it out, or train with pyro.infer.SVI.")
            traced = traced_loss(loss)
            check_backend(backend, self._settings.options)
            self._traced = traced
        except CannotCompile as error:
            self._refuse(error)

    def __getstate__(self) -> dict[str, Any]:
        """All but the programs, which a copy makes anew from its own parameters, and what was found out about them here."""
        reason = self.eager_reason if self._traced is None else None
        anew = {
            "_programs": Programs(),
            "_last": None,
            "_none_compiles": None,
            "optim": portable(self.optim),
        }
        return {**vars(self), **anew, "eager_reason": reason, "optimizer_reason": None}

    @property
    def compile_time(self) -> float:
        """Seconds spent on tracing and compiling so far."""
        return sum(program.compile_time for program in self._programs.values() if isinstance(program, Program))

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Take one step; arguments are those of model and guide.

        Returns
        -------
        float
            The loss before the step, in nats.
        """
        with self._alone:
            program, tensors, loss = self._find(args, kwargs, super().step)
            if program is None:
                assert loss is not None
                return loss
            if not self._bind(program):
                return float(super().step(*args, **kwargs))
            (kl_weight,) = self._kl_weights(0, 1)
            binding, recorded, before = program.binding, self._records, self._count()
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
            except (
                BaseException
            ):  # it may come from outside, after the step: what has been taken is counted and recorded
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
            program, tensors, loss = self._find(args, kwargs, super().evaluate_loss)
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

    def _many(self, num_steps: int, args: Args, kwargs: Kwargs) -> Tensor | None:
        """Losses of up to ``num_steps`` steps; None if the next one is not a step of a graph."""
        program = self._known(args, kwargs)
        if program is None or not self._bind(program) or self.optimizer_reason is not None:
            return None
        try:
            return self._many_of(program, num_steps, args, kwargs)
        except Changed as changed:
            self._look_again(program, changed, args, kwargs)
            return None

    def _many_of(self, program: Program, num_steps: int, args: Args, kwargs: Kwargs) -> Tensor | None:
        """Losses of up to ``num_steps`` steps by the graphs of a program."""
        assert self._traced is not None
        if self._traced.one_by_one:
            steps = min(num_steps, _CALLS_PER_CHECK)
            return torch.tensor([self.step(*args, **kwargs) for _ in range(steps)], dtype=torch.float64)
        tensors = program.inputs_of(take_apart(args, kwargs))
        try:
            native = program.native(tensors)
            if native is None:
                return self._many_by_python(program, num_steps, tensors)
        except CannotCompile as error:
            self._give_up(program, error)
            return None
        start = time.perf_counter()
        steps = min(self._in_one_go, num_steps)
        kl_weights = self._kl_weights(0, steps)
        taken = Taken()
        before = self._count()
        with interrupts_wait():
            try:
                program.repeat(native, taken, kl_weights, tensors)
                self._enter(program, taken.results, kl_weights, before)
            except BaseException:  # a kernel that fails, or what comes from outside, keeps the steps before it
                self._enter(program, taken.results, kl_weights, before, failed=True)
                raise
        seconds = time.perf_counter() - start
        if steps == self._in_one_go and not _SECONDS_IN_C / 4 < seconds < _SECONDS_IN_C:
            self._in_one_go = max(1, min(int(steps * _SECONDS_IN_C / (2 * seconds)), _MOST_IN_C))
        return taken.losses[: int(taken.count)]

    def _many_by_python(self, program: Program, num_steps: int, tensors: list[Tensor]) -> Tensor:
        binding = program.binding
        assert binding is not None
        # Several steps in a graph save the overhead of a call, which is not worth their compilation where a step takes long.
        size = self.steps_per_call or (_SHORT_STEPS if program.step_seconds < _SHORT else 1)
        # Such a graph can leave out the update of a step, but not what a network does to its buffers.
        if program.writes_buffers and num_steps < size:
            size = 1
        losses: list[Tensor] = []
        tables: list[Tensor] = []
        kl_weights: list[Weight] = []
        taken, before = 0, self._count()

        def results() -> tuple[Tensor, Tensor]:
            count = min(len(losses), len(tables))
            return torch.cat(losses[:count]), torch.cat(tables[:count])

        try:
            for _ in range(_CALLS_PER_CHECK):
                steps = min(size, num_steps - taken)
                if steps == 0 or (steps < size and program.writes_buffers):
                    break
                if int(binding.count) != steps:
                    binding.count.fill_(steps)
                weights = self._kl_weights(taken, size)
                of_call = program.take(size, weights, tensors)
                kl_weights += weights[:steps]
                losses.append(of_call[0][:steps])
                tables.append(of_call[1][:steps])
                taken += steps
            self._enter(program, results, kl_weights, before)
        except (Changed, CannotCompile):  # of the next step, which meets it again
            if not losses:
                raise
            self._enter(program, results, kl_weights, before)
        except BaseException:  # an interrupt keeps what is done
            if losses and tables:
                self._enter(program, results, kl_weights, before, failed=True)
            raise
        return torch.cat(losses)

    def _count(self) -> int:
        """Steps that the objective has counted, if it counts."""
        return self.objective.num_steps if self._records else 0

    def _enter(
        self,
        program: Program,
        results: Callable[[], tuple[Tensor, Tensor]],
        kl_weights: list[Weight],
        before: int,
        failed: bool = False,
    ) -> None:
        """Record and count the steps that a graph has taken since step ``before``, unless that has been done.

        Where they have ``failed``, for a loss that is not finite or an exception from outside, at whatever place, that is up
        to the first whose loss is not finite.
        """
        binding = program.binding
        assert binding is not None
        losses, tables = results()
        if self._records:
            done = self._count() - before
            end = len(losses)
            if failed and not bool(torch.isfinite(losses).all()):
                end = int(torch.isfinite(losses).int().argmin())
            if done < end:
                self._record_many(program, losses[done:end], tables[done:end], kl_weights[done:end])
        if failed:
            binding.settle()
        else:
            binding.advance(len(losses))

    # What a training loop asks

    def is_traced(self, *args: Any, **kwargs: Any) -> bool:
        """Whether there is a graph for these arguments, so that the next step is compiled and not Pyro's."""
        return self._known(args, kwargs) is not None

    def take_over_optimizer_state(self) -> None:
        """Read anew what optimizers keep in Python, after their state has been set in place."""
        for program in self._programs.values():
            if isinstance(program, Program) and program.binding is not None:
                program.binding.reload()

    # Finding the program of a call

    def _find(self, args: Args, kwargs: Kwargs, pyro_call: Callable[..., Any]) -> _Found:
        """The program for these arguments; if there is none yet, Pyro takes the call, and then it is made."""
        if _PYRO_STACK:
            self._report_handler()
            return _Found(None, [], pyro_call(*args, **kwargs))
        last = self._last
        if last is not None and not kwargs and _same_objects(args, last[0]) and self._mode() == last[1]:
            if (
                last[3] is self.model
                and last[4] is self.guide
                and last[2].fits()
                and not any(map(_NEEDS_GRADIENT, args))
            ):
                return _Found(last[2], list(args), None)
            self._last = None
        if self._traced is None:
            import_dynamo()
            return _Found(None, [], pyro_call(*args, **kwargs))  # of some losses a tuple
        try:
            arguments = take_apart(args, kwargs)
            self._check_gradients(arguments.tensors, args, kwargs)
        except CannotCompile as error:
            self._refuse(error)
            return _Found(None, [], float(pyro_call(*args, **kwargs)))
        key = self._key(arguments)
        found = self._made_for(key, arguments)
        self._closely = False
        if isinstance(found, Program):
            self._remember(args, kwargs, found)
            return _Found(found, found.inputs_of(arguments), None)
        found = found or self._none_compiles
        if found is not None and not self.fallback:
            raise found
        for place, tensor in enumerate(arguments.tensors):
            if not has_memory(tensor):
                raise ValueError(_no_memory(tensor, name_of(place, args, kwargs, self.model)))
        # none is of use after the param store was cleared, or a parameter replaced
        self._programs.keep(Program.has_same_parameters)
        import_dynamo()  # the optimizers do, but not where torch cannot make its folder
        with poutine.trace(param_only=True) as called, self._own_indices():
            loss = float(pyro_call(*args, **kwargs))
        if found is None:
            self._make(key, arguments, called.trace, args, kwargs)
        return _Found(None, arguments.tensors, loss)

    @contextmanager
    def _own_indices(self) -> Iterator[None]:
        """Have Pyro's losses look at the indices of plates, as the objectives of this package do."""
        model = self.model
        if not isinstance(self.objective, Objective):
            self.model = OwnIndices()(model)
        try:
            yield
        finally:
            self.model = model

    def _known(self, args: Args, kwargs: Kwargs) -> Program | None:
        """The program for these arguments, if it has been made."""
        if self._traced is None or _PYRO_STACK:
            return None
        try:
            arguments = take_apart(args, kwargs)
            self._check_gradients(arguments.tensors, args, kwargs)
        except CannotCompile:  # the step that follows says so
            return None
        found = self._made_for(self._key(arguments), arguments)
        return found if isinstance(found, Program) else None

    def _check_gradients(self, tensors: list[Tensor], args: Args, kwargs: Kwargs) -> None:
        """Refuse arguments that Pyro would send a gradient to, and to the parameters behind them."""
        for place, tensor in enumerate(tensors):
            if tensor.requires_grad:
                raise CannotCompile(
                    f"{name_of(place, args, kwargs, self.model)} requires a gradient, which no compiled step would send "
                    "through it: what is behind it would not be trained. Pass it detached (.detach()) if that is not "
                    "wanted; otherwise compute it in the model or guide, train with pyro.infer.SVI, or pass fallback=True."
                )

    def _report_handler(self) -> None:
        """Say once that Pyro takes the steps within a handler, which a graph would not have."""
        name = type(_PYRO_STACK[-1]).__name__
        if name not in self._within:
            self._within.add(name)
            logger.warning(
                "a step within a handler (%s) around it is Pyro's, uncompiled: the handler may be another one each time. "
                "Put it around model and guide before CompiledSVI is made.",
                name,
            )

    def _made_for(self, key: Key, arguments: Arguments) -> Program | CannotCompile | None:
        if not self._closely:
            return self._programs.find(key, lambda of: of.takes(arguments) and of.fits())
        return self._programs.find(
            key, lambda of: of.takes(arguments) and of.fits() and of.has_same_looks(of.inputs_of(arguments))
        )

    def _look_again(self, program: Program, changed: Changed, args: Args, kwargs: Kwargs) -> None:
        """Before the program of a call is looked for again: one of its tensors has changed since it was made.

        Raises
        ------
        ValueError
            If that tensor cannot be read at all.
        """
        self._last = None
        arguments = take_apart(args, kwargs)
        tensors = arguments.tensors
        if not has_memory(changed.tensor):
            place = next((i for i, tensor in enumerate(tensors) if tensor is changed.tensor), None)
            name = program.name_of(changed.tensor) if place is None else name_of(place, args, kwargs, self.model)
            raise ValueError(_no_memory(changed.tensor, name))
        if program.has_same_looks(program.inputs_of(arguments)):  # then it is the optimizer's
            program.unbind()
        else:
            self._closely = True

    def _is_compiled(self, args: Args, kwargs: Kwargs) -> bool:
        program = self._known(args, kwargs)
        return program is not None and program.is_compiled

    def _make(self, key: Key, arguments: Arguments, called: poutine.Trace, args: Args, kwargs: Kwargs) -> None:
        assert self._traced is not None
        store = pyro.get_param_store()
        parameters: dict[int, tuple[str | None, Tensor]] = {}
        for site in called.nodes.values():
            p = site["value"].unconstrained()
            parameters.setdefault(id(p), (store.param_name(p), p))
        try:
            self._count_change(self._programs.changed(key))
            made = Program(self.model, self.guide, self._traced, list(parameters.values()), arguments, self._settings)
            self._programs.add(key, made)
            self._report_counters(made.guards.changed_by_itself)
        except CannotCompile as error:
            self._programs.add(key, error)
            self._refuse(error)
        self._warn_of_many(args, kwargs)

    def _warn_of_many(self, args: Args, kwargs: Kwargs) -> None:
        """Say which argument varies, if each of its kinds takes a compilation."""
        self._num_made += 1
        for name, kind in described(args, kwargs, self.model).items():
            self._kinds.setdefault(name, set()).add(kind)
        if self._num_made not in (_MANY_PROGRAMS + 1, MOST_KEPT + 1) or not self._kinds:
            return
        name = max(self._kinds, key=lambda of: len(self._kinds[of]))
        logger.warning(
            "CompiledSVI has compiled for %d kinds of arguments, %d of them of %s, and keeps the last %d. Each new shape or "
            "dtype of a tensor, and each value of another argument that decides something in Python, takes a compilation: "
            "pad or drop the last, smaller batch; pass numbers as tensors, or use them without if, float() or math.",
            self._num_made,
            len(self._kinds[name]),
            name,
            MOST_KEPT,
        )

    def _count_change(self, name: str | None) -> None:
        """Take note that a graph is made because something that programs read has changed; too often is an error."""
        if name is None:
            return
        self._changes[name] += 1
        if self._changes[name] == _MANY_CHANGES:
            logger.warning(
                "%s changes from step to step, and each value takes a compilation. %s", name, _KEEP_IN_TENSOR
            )
        if self._changes[name] > _MOST_CHANGES:
            raise CannotCompile(
                f"{name} changes from step to step: a graph keeps the value that Python reads, and {_MOST_CHANGES} have "
                f"been compiled for other values. {_KEEP_IN_TENSOR} Or train with pyro.infer.SVI, or pass fallback=True."
            )

    def _report_counters(self, names: list[str]) -> None:
        new = [name for name in names if name not in self._counters]
        self._counters.update(new)
        if new:
            logger.warning(
                "model or guide change %s themselves in every run. Compiled steps run no Python: it stays as it is, and "
                "must not decide what they compute.",
                " and ".join(new),
            )

    def _remember(self, args: Args, kwargs: Kwargs, program: Program) -> None:
        if not kwargs and all(isinstance(value, Tensor) for value in args):
            self._last = args, self._mode(), program, self.model, self.guide

    def _mode(self) -> Key:
        """What beside the arguments a graph depends on."""
        weighting = None if self._traced is None else self._traced.weighting
        return torch.get_num_threads(), torch.get_default_dtype(), _is_autocast(), weighting

    def _key(self, arguments: Arguments) -> Key:
        # model and guide may be replaced; those that a graph was made of live on in it
        return *self._mode(), id(self.model), id(self.guide), arguments.key

    def _give_up(self, program: Program, error: CannotCompile) -> None:
        """Leave the calls of a program, one of whose graphs cannot be compiled, to Pyro."""
        self._programs.replace(program, error)
        self._last = None
        self._refuse(error)

    def _refuse(self, error: CannotCompile) -> None:
        if error.is_everywhere:
            self._none_compiles = error
        if not self.fallback:
            raise error
        is_new, self.eager_reason = self.eager_reason != str(error), str(error)
        if is_new:
            logger.warning("CompiledSVI trains as pyro.infer.SVI does, uncompiled: %s", error)

    # Taking steps

    def _bind(self, program: Program) -> bool:
        """Tie a program to parameters and optimizers as they are; False if Pyro must take a step first."""
        if self.optimizer_reason is not None:
            return True
        try:
            if program.binding is not None and program.binding.optim is self.optim and program.binding.is_current():
                return True
            binding = Binding(program.parameters, self.optim, program.reached)
            if binding.is_missing:
                return False
            program.bind(binding)
        except Unsupported as reason:
            self._leave_optimizer(str(reason))
        return True

    def _leave_optimizer(self, reason: str) -> None:
        name = getattr(self.optim.pt_optim_constructor, "__name__", type(self.optim).__name__)
        self.optimizer_reason = f"{name} is not part of the graph: {reason}"
        logger.info("%s. It runs as it is, on compiled gradients.", self.optimizer_reason)

    def _step_with_eager_optimizer(self, program: Program, tensors: list[Tensor]) -> float:
        kl_weights = self._kl_weights(0, 1)
        loss, table, gradients = program.gradients(kl_weights[0], tensors)
        value = loss.item()
        if self._records:
            self._record(program, value, table.cpu().numpy().reshape(-1, len(VALUES)), kl_weights[0])
        else:
            warn_if_nan(value, "loss")
        parameters = [p for _, p in program.parameters]
        for p, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                p.grad = gradient if p.grad is None else p.grad + gradient
        self.optim(parameters)
        zero_grads(parameters)
        return value

    def _kl_weights(self, start: int, steps: int) -> list[Weight]:
        assert self._traced is not None
        return self._traced.kl_weights(start, steps)

    def _record(self, program: Program, loss: float, table: NDArray[np.float64], kl_weight: Weight) -> None:
        """Enter a compiled step into the objective's history; it is an error if its loss is not finite."""
        objective, sites = self.objective, program.sites
        if not math.isfinite(loss):
            if program.binding is not None:
                program.binding.good.fill_(True)
            objective._raise_not_finite(sites, [tuple(row) for row in table.tolist()])
            raise NotFinite(f"the loss is {loss} at step {objective.num_steps}. No parameter has been changed.")
        objective._record_step(sites, table, -loss if objective.maximized else loss, kl_weight)

    def _record_many(self, program: Program, losses: Tensor, tables: Tensor, kl_weights: list[Weight]) -> None:
        """The same for many steps, up to the first whose loss is not finite."""
        objective, sites = self.objective, program.sites
        rows = tables.cpu().numpy().reshape(len(tables), len(sites), len(VALUES))
        finite = torch.isfinite(losses)
        count = len(losses) if bool(finite.all()) else int(finite.int().argmin())
        values = losses[:count].cpu().numpy()
        objective._record_steps(sites, rows[:count], -values if objective.maximized else values, kl_weights[:count])
        if count < len(losses):
            self._record(program, float(losses[count]), rows[count], kl_weights[count])


def _no_memory(tensor: Tensor, name: str) -> str:
    return (
        f"{name} has shape {tuple(tensor.shape)}, but its memory does not reach that far, as after "
        "untyped_storage().resize_(). No step has been taken."
    )


def _same_objects(args: Args, others: Args) -> bool:
    return len(args) == len(others) and all(map(operator.is_, args, others))
