"""The compiled program of a call: found among those that were made, or made after a step of Pyro's."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, SVI
from pyro.optim import PyroOptim
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor

from pyro_elbo_ext.compile.binding import Binding, WholeOptimizer, portable
from pyro_elbo_ext.compile.errors import CannotCompile
from pyro_elbo_ext.compile.machine_code.compiler import check_backend, import_dynamo
from pyro_elbo_ext.compile.machine_code.layouts import Changed, has_memory
from pyro_elbo_ext.compile.program import Program, Settings
from pyro_elbo_ext.compile.programs import Programs
from pyro_elbo_ext.compile.reports import Reports
from pyro_elbo_ext.compile.threads import OneThread
from pyro_elbo_ext.compile.tracing.arguments import Args, Arguments, Key, Kwargs, name_of, take_apart
from pyro_elbo_ext.compile.tracing.first_look import FirstLook
from pyro_elbo_ext.compile.tracing.losses import TracedLoss, traced_loss
from pyro_elbo_ext.compile.updates import Unsupported, check_evaluates_once
from pyro_elbo_ext.objectives.objective import Objective
from pyro_elbo_ext.programs.arguments import check_count
from pyro_elbo_ext.programs.replay import OwnIndices

logger = logging.getLogger(__name__)

MANY_OPERATORS = 6000  # of a step's graph: beyond, Inductor and the C++ compiler take minutes

_is_autocast = torch._C._is_any_autocast_enabled

# the program of a call with its tensors; without a program, what Pyro made of the call
Found = tuple[Program | None, list[Tensor], float | None]


class CompiledCalls(SVI):
    """``pyro.infer.SVI`` that has a compiled program for each kind of call; :class:`CompiledSVI` says what it takes."""

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
        if steps_per_call is not None:
            check_count("steps_per_call", steps_per_call)
        if not (options is None or isinstance(options, Mapping)):
            raise TypeError(f"options must be a mapping from options of Inductor to values, not {options!r}")
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
        self._reports = Reports()
        # to find the program without taking arguments apart; with model and guide
        self._last: tuple[Args, Key, Program, Any, Any] | None = None
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

    def is_traced(self, *args: Any, **kwargs: Any) -> bool:
        """Whether there is a graph for these arguments, so that the next step is compiled and not Pyro's."""
        return self._known(args, kwargs) is not None

    def take_over_optimizer_state(self) -> None:
        """Read anew what optimizers keep in Python, after their state has been set in place."""
        for program in self._programs.values():
            if isinstance(program, Program) and program.binding is not None:
                program.binding.reload()

    # Finding the program of a call

    def _find(self, args: Args, kwargs: Kwargs, pyro_call: Callable[..., Any]) -> Found:
        """The program for these arguments; if there is none yet, Pyro takes the call, and then it is made.

        ``pyro_call`` is the method of ``pyro.infer.SVI``.
        """
        if _PYRO_STACK:
            self._reports.handler(_PYRO_STACK[-1])
            return None, [], pyro_call(self, *args, **kwargs)
        last = self._last
        if last is not None and not kwargs and _same_objects(args, last[0]) and self._mode() == last[1]:
            if last[3] is self.model and last[4] is self.guide and last[2].fits():
                return last[2], list(args), None
            self._last = None
        if self._traced is None:
            import_dynamo()
            return None, [], pyro_call(self, *args, **kwargs)  # of some losses a tuple
        try:
            arguments = self._take_apart(args, kwargs)
        except CannotCompile as error:
            self._refuse(error)
            return None, [], float(pyro_call(self, *args, **kwargs))
        key = self._key(arguments)
        found = self._made_for(key, arguments)
        self._closely = False
        if isinstance(found, Program):
            self._remember(args, kwargs, found)
            return found, found.inputs_of(arguments), None
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
            loss = float(pyro_call(self, *args, **kwargs))
        if found is None:
            self._make(key, arguments, called.trace, args, kwargs)
        return None, arguments.tensors, loss

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
            arguments = self._take_apart(args, kwargs)
        except CannotCompile:  # the step that follows says so
            return None
        found = self._made_for(self._key(arguments), arguments)
        return found if isinstance(found, Program) else None

    def _take_apart(self, args: Args, kwargs: Kwargs) -> Arguments:
        """The arguments; those are refused that Pyro would send a gradient to, and to the parameters behind them."""
        arguments = take_apart(args, kwargs)
        for place, tensor in enumerate(arguments.tensors):
            if tensor.requires_grad:
                raise CannotCompile(
                    f"{name_of(place, args, kwargs, self.model)} requires a gradient, which no compiled step would send "
                    "through it: what is behind it would not be trained. Pass it detached (.detach()) if that is not "
                    "wanted; otherwise compute it in the model or guide, train with pyro.infer.SVI, or pass fallback=True."
                )
        return arguments

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
            self._reports.changed(self._programs.changed(key))
            made = Program(self.model, self.guide, self._traced, list(parameters.values()), arguments, self._settings)
            self._check_size(made.operators)
            self._programs.add(key, made)
            self._reports.changed_by_itself(made.guards.changed_by_itself)
        except CannotCompile as error:
            self._programs.add(key, error)
            self._refuse(error)
        self._reports.made(args, kwargs, self.model)

    def _check_size(self, operators: int) -> None:
        """Raise CannotCompile, where there is a way without, for a graph that takes the compiler minutes."""
        if operators <= MANY_OPERATORS or self._settings.backend != "inductor":
            return
        size = f"a step has {operators:,} operators, as a Python loop over many times has, and compiling them takes minutes"
        if self.fallback:
            raise CannotCompile(
                f"{size}. To wait for it, use fallback=False, in fit compiled={{'fallback': False}}; or compute the times "
                "at once, with tensors that have a dim for them."
            )
        logger.warning("%s; with fallback=True Pyro trains instead", size)

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

    # Going without

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

    # Parameters and optimizers

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


def _no_memory(tensor: Tensor, name: str) -> str:
    return (
        f"{name} has shape {tuple(tensor.shape)}, but its memory does not reach that far, as after "
        "untyped_storage().resize_(). No step has been taken."
    )


def _same_objects(args: Args, others: Args) -> bool:
    return len(args) == len(others) and all(map(operator.is_, args, others))
