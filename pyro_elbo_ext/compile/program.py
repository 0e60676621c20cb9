"""All that is compiled for calls with one kind of arguments."""

from __future__ import annotations

import logging
import math
import operator
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_elbo_ext.compile.binding import Binding
from pyro_elbo_ext.compile.errors import CannotCompile
from pyro_elbo_ext.compile.machine_code.compiler import failures_are_reasons
from pyro_elbo_ext.compile.machine_code.kernel_calls import NotKnown, NotNative
from pyro_elbo_ext.compile.machine_code.layouts import Changed, Layouts, comparable_in_c, look_of
from pyro_elbo_ext.compile.machine_code.native import NativeSteps, Taken
from pyro_elbo_ext.compile.machine_code.step_graph import Backend, Compiled, build_steps, build_value, compile_function
from pyro_elbo_ext.compile.tracing.arguments import Arguments
from pyro_elbo_ext.compile.tracing.capture import Evaluation, capture, written_inputs
from pyro_elbo_ext.compile.tracing.guards import Guards, all_of
from pyro_elbo_ext.compile.tracing.losses import TracedLoss
from pyro_elbo_ext.compile.tracing.numbers import NeedsNumber
from pyro_elbo_ext.compile.tracing.reads import Recorder
from pyro_elbo_ext.compile.tracing.sharing import Sharing
from pyro_elbo_ext.compile.tracing.static_check import check_graph, check_structure, nothing_changed
from pyro_elbo_ext.history.record import VALUES
from pyro_elbo_ext.objectives.evaluation import Program as PyroProgram
from pyro_elbo_ext.objectives.evaluation import Weight
from pyro_elbo_ext.programs.interrupts import handlers_are_heard
from pyro_elbo_ext.terms.registration import modules_of

logger = logging.getLogger(__name__)


# attributes of a loss
_NOT_IN_GRAPH = frozenset(
    [
        *("history", "num_steps", "retain_graph", "jit_options", "ignore_jit_warnings", "strict_enumeration_warning"),
        *("tail_adaptive_beta", "max_plate_nesting"),
    ]
)
# Of Inductor: what is computed for each state is written down before it is used for each datum; else it would be computed
# again for each of these.
_FOR_SUMS = {"realize_opcount_threshold": 12, "realize_reads_threshold": 2}
_OTHER_VALUES = (0.97, 0.99)  # times a float that is an input of the graph: where it must be right too


class Settings(NamedTuple):
    """How graphs are compiled; see :class:`~pyro_elbo_ext.CompiledSVI`."""

    backend: Backend
    same_draws: bool
    options: dict[str, Any]


class Program:
    """Loss and gradient of a model and guide for one kind of arguments, and the graphs made from it.

    Raises
    ------
    CannotCompile
        If the programs cannot be made a graph, or it is not what they compute.
    """

    def __init__(
        self,
        model: PyroProgram,
        guide: PyroProgram,
        loss: TracedLoss,
        parameters: Sequence[tuple[str | None, Tensor]],
        arguments: Arguments,
        settings: Settings,
    ) -> None:
        start = time.perf_counter()
        self.parameters = list(parameters)
        self.binding: Binding | None = None
        self._settings, self._programs, self._loss = settings, (model, guide), loss
        self._guards = loss.guards
        tensors = [p for _, p in parameters]
        device = tensors[0].device if tensors else torch.device("cpu")
        self._weight = torch.ones(_shape(loss), dtype=torch.float64, device=device)
        # an argument may be the very tensor that the program reads elsewhere too: the tracer must not confuse the two
        inputs = [*tensors, self._weight, *[tensor.detach() for tensor in arguments.tensors]]
        with nothing_changed((model, guide)) as written, failures_are_reasons("tracing the step"):
            with written:  # in the first of the runs
                check_structure(model, guide, *arguments.rebuild(arguments.tensors, arguments.numbers))
            evaluation = Evaluation(loss, model, guide, tensors, arguments)
            self._scalars: list[Tensor] = []  # the floats among the arguments that are inputs
            self._constants = dict(enumerate(arguments.numbers))  # the others
            if not self._lift_numbers(evaluation, inputs):
                self._trace(evaluation, inputs)
            inputs += self._scalars
        self.reached = self._capture.reached
        self.operators = len(self._capture.graph.graph.nodes)
        self.sites = loss.sites
        self.compile_time = time.perf_counter() - start
        logger.info("traced the step in %.1f s", self.compile_time)
        self.step_seconds = math.inf  # the least that a graph of one step has taken
        self._compiled: dict[int | str, Compiled] = {}
        self._prefix: dict[int, tuple[list[Tensor], Tensor, list[Weight]]] = {}
        self._native: NativeSteps | NotNative | None = None
        self._written = [i - len(inputs) for i in written_inputs(self._capture.graph) if i >= len(inputs)]
        self._tensors = tensors
        self._looks = list(map(look_of, self._live(self.inputs_of(arguments))))
        named = {name: p for name, p in parameters if name is not None}
        self._in_store, self._named = all_of(list(named)), list(named.values())
        self._layouts: dict[int | str, Layouts] = {}

    def _trace(self, evaluation: Evaluation, inputs: list[Tensor]) -> None:
        """Make the graph, and compare it with the programs."""
        if self._loss.enumerates(*self._programs):
            sharing = Sharing()
            with suppress(CannotCompile):  # without it the same comes again, if that is not why
                self._trace_with(sharing, evaluation, inputs)
                if sharing.is_kept:
                    return
        self._trace_with(None, evaluation, inputs)

    def _trace_with(self, sharing: Sharing | None, evaluation: Evaluation, inputs: list[Tensor]) -> None:
        recorder = Recorder()
        evaluation.watched, evaluation.needed = recorder.recording, []
        self._capture = capture(evaluation, inputs, self._programs, sharing)
        needed, evaluation.watched, evaluation.needed = evaluation.needed, nullcontext, None
        if needed:
            raise NeedsNumber(needed[0])
        recorder.attributes(self._loss.of, _NOT_IN_GRAPH)
        for program in self._programs:
            recorder.program(program)
        self.guards = Guards(recorder)
        check_graph(self._capture, evaluation, inputs)
        self.guards.settle([*inputs, *evaluation.parameters, *self._capture.captured])

    def _lift_numbers(self, evaluation: Evaluation, inputs: list[Tensor]) -> bool:
        """Make the graph with floats as inputs; False if that is not possible, or not right at other values."""
        numbers = evaluation.numbers
        if not numbers or not all(map(math.isfinite, numbers)):
            return False
        device = self._weight.device
        scalars = [torch.tensor(float(one), dtype=torch.float64, device=device) for one in numbers]
        evaluation.lifted = list(range(len(numbers)))
        try:
            self._trace(evaluation, [*inputs, *scalars])
            for factor in _OTHER_VALUES:
                evaluation.numbers = [type(one)(one * factor + (one == 0) * (1 - factor)) for one in numbers]
                for scalar, number in zip(scalars, evaluation.numbers, strict=True):
                    scalar.fill_(float(number))
                check_graph(self._capture, evaluation, [*inputs, *scalars])
        except Exception as error:  # whatever it is: with the floats as they are, it comes again or is none
            logger.info("floats among the arguments are constants of the graph: %s", str(error).splitlines()[:1])
            evaluation.numbers, evaluation.lifted = numbers, []
            evaluation.watched, evaluation.needed = nullcontext, None
            return False
        self._scalars, self._constants = scalars, {}
        return True

    def inputs_of(self, arguments: Arguments) -> list[Tensor]:
        """The tensors that a call of the graph takes for these arguments."""
        if not self._scalars:
            return arguments.tensors
        for scalar, number in zip(self._scalars, arguments.numbers, strict=True):
            scalar.fill_(float(number))
        return [*arguments.tensors, *self._scalars]

    def takes(self, arguments: Arguments) -> bool:
        """Whether the floats that are constants of the graph are those of the arguments."""
        return all(repr(arguments.numbers[place]) == repr(value) for place, value in self._constants.items())

    @property
    def is_compiled(self) -> bool:
        """Whether there is a graph to run."""
        return bool(self._compiled)

    @property
    def writes_buffers(self) -> bool:
        """Whether a step writes to other tensors than parameters and the optimizer's state, as batch normalization does."""
        return bool(self._written)

    def fits(self) -> bool:
        """Whether all is as it was when the program was traced, but for the tensors' shapes; asked at each step."""
        return self.has_same_parameters() and self.guards.hold(self._exchange)

    def _exchange(self, old: Tensor, new: Tensor) -> bool:
        """Read another tensor in place of one that the graph takes, if it can."""
        captured = self._capture.captured
        place = next((i for i, tensor in enumerate(captured) if tensor is old), None)
        if place is None or type(new) is not type(old) or new.requires_grad:
            return False
        if look_of(new) != self._looks[place - len(captured)] or any(new is p for p in self._tensors):
            return False
        captured[place] = new
        return True

    def has_same_parameters(self) -> bool:
        """Whether the param store holds the tensors that it held when the program was traced."""
        try:
            return all(map(operator.is_, self._in_store(pyro.get_param_store()._params), self._named))
        except KeyError:
            return False

    def has_same_looks(self, arguments: Sequence[Tensor]) -> bool:
        """Whether what it reads still has the shapes, and so on, that it was traced with."""
        return list(map(look_of, self._live(arguments))) == self._looks

    def name_of(self, tensor: Tensor) -> str:
        """What to call a tensor that is not an argument."""
        for name, p in self.parameters:
            if p is tensor:
                return f"the parameter {name!r}"
        return _name_of_captured(tensor, self._programs)

    def _live(self, arguments: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The inputs that may be other tensors at another call, or look otherwise."""
        return (*self._tensors, *arguments, *self._capture.captured)

    def _check(self, key: int | str, arguments: Sequence[Tensor]) -> None:
        """Raise Changed if an input of a graph does not look as it did."""
        live = self._live(arguments)
        layouts = self._layouts.get(key)
        if layouts is not None:
            layouts.check(live)
            return
        for tensor, look in zip(live, self._looks, strict=True):  # not compiled yet: what it was traced with counts
            if look_of(tensor) != look:
                raise Changed(tensor)

    def bind(self, binding: Binding) -> None:
        """Take parameters and state from there; graphs of steps with other updates are dropped."""
        self._forget_steps()
        self.binding = binding

    def unbind(self) -> None:
        """Look for the optimizers' state anew at the next step."""
        self._forget_steps()
        self.binding = None

    def native(self, arguments: Sequence[Tensor]) -> NativeSteps | None:
        """The step as a C function, which repeats it without Python; None where that is not possible."""
        if self._native is None:
            prefix = self._prefix.get(1) or self._prepare(1, [self._weight.tolist()])
            self._check(1, arguments)
            inputs = [*prefix[0], *arguments, *self._capture.captured]
            compiled = self._compiled_steps(1, inputs)
            start = time.perf_counter()
            with handlers_are_heard():
                native = self._make_native(compiled, inputs)
            self._native = native
            self.compile_time += time.perf_counter() - start
        return self._native if isinstance(self._native, NativeSteps) else None

    def _make_native(self, compiled: Compiled, inputs: Sequence[Tensor]) -> NativeSteps | NotNative:
        try:
            if self._settings.backend != "inductor":
                raise NotNative(f"the backend is {self._settings.backend!r}")
            assert self.binding is not None
            last = len(self.binding.tensors()) - 1  # of what a step always writes to: ``good``
            first = len(inputs) - len(self._capture.captured)
            written = [*range(last + 1), *[first + i for i in self._written]]
            return NativeSteps(compiled, inputs, slice(len(self._tensors), last + 2), written)
        except NotKnown as reason:
            _say_off(str(reason))
            return reason
        except NotNative as reason:
            logger.info("the step is called from Python each time: %s", reason)
            return reason
        except Exception as error:  # what Inductor generates is no public interface, and it can be called from Python
            _say_off(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
            return NotNative(str(error))

    def take(self, steps: int, kl_weights: list[Weight], arguments: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Run the graph of ``steps`` steps: losses, shape ``(steps,)``, and tables, shape ``(steps, sites * 6)``."""
        inputs, weights, known = self._prefix.get(steps) or self._prepare(steps, kl_weights)
        self._check(steps, arguments)
        if kl_weights != known:
            weights.copy_(torch.tensor(kl_weights, dtype=torch.float64))
            known[:] = kl_weights
        inputs = [*inputs, *arguments, *self._capture.captured]
        compiled = self._compiled_steps(steps, inputs)
        start = time.perf_counter()
        with torch.no_grad():
            losses, tables = compiled(*inputs)
        if steps == 1:
            self.step_seconds = min(self.step_seconds, time.perf_counter() - start)
        return losses, tables

    def repeat(self, native: NativeSteps, taken: Taken, kl_weights: list[Weight], arguments: Sequence[Tensor]) -> None:
        """Take as many steps as there are weights; less if the loss is not finite."""
        native(taken, torch.tensor(kl_weights, dtype=torch.float64), self._live(arguments))

    def take_one(self, kl_weight: Weight, arguments: Sequence[Tensor]) -> tuple[float, NDArray[np.float64]]:
        """Take one step: its loss, and its table, shape ``(sites, 6)``, which the next step may overwrite."""
        native = self.native(arguments)
        if native is not None:
            return native.once(kl_weight, self._live(arguments))
        losses, tables = self.take(1, [kl_weight], arguments)
        return losses.item(), tables[0].cpu().numpy().reshape(len(self.sites), len(VALUES))

    def forget_last(self) -> None:
        """:meth:`last_in_c` is None until the next step."""
        if isinstance(self._native, NativeSteps):
            self._native.forget()

    def last_in_c(self) -> tuple[float, NDArray[np.float64]] | None:
        """What the last :meth:`take_one` took in C, even if an exception has come since; None if that is nothing."""
        return self._native.last() if isinstance(self._native, NativeSteps) else None

    def _prepare(self, steps: int, kl_weights: list[Weight]) -> tuple[list[Tensor], Tensor, list[Weight]]:
        assert self.binding is not None
        weights = torch.tensor(kl_weights, dtype=torch.float64, device=self._weight.device)
        self._prefix[steps] = [*self.binding.tensors(), weights], weights, list(kl_weights)
        return self._prefix[steps]

    def _compiled_steps(self, steps: int, inputs: Sequence[Tensor]) -> Compiled:
        function = self._compiled.get(steps)
        if function is None:
            assert self.binding is not None
            made = build_steps(self._capture, self.binding.rules, steps, self._guards)
            function = self._compile(steps, made, inputs, f"{steps} step{'s' * (steps > 1)} in one graph")
        return function

    def value(self, kl_weight: Weight, arguments: Sequence[Tensor]) -> Tensor:
        """The loss alone."""
        inputs = self._evaluated("value", kl_weight, arguments)
        function = self._compiled.get("value")
        if function is None:
            function = self._compile("value", build_value(self._capture), inputs, "the loss")
        with torch.no_grad():
            return function(*inputs)[0]

    def gradients(self, kl_weight: Weight, arguments: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """The loss, the table, and each parameter's gradient."""
        inputs = self._evaluated("gradients", kl_weight, arguments)
        function = self._compiled.get("gradients")
        if function is None:
            function = self._compile("gradients", self._capture.graph, inputs, "the gradient")
        with torch.no_grad():
            loss, table, *known = function(*inputs)
        remaining = iter(known)
        return loss, table, [next(remaining) if reached else None for reached in self.reached]

    def _evaluated(self, key: str, kl_weight: Weight, arguments: Sequence[Tensor]) -> list[Tensor]:
        self._check(key, arguments)
        self._weight.copy_(torch.tensor(kl_weight, dtype=torch.float64))
        return [*[p for _, p in self.parameters], self._weight, *arguments, *self._capture.captured]

    def _compile(self, key: int | str, function: Compiled, inputs: Sequence[Tensor], what: str) -> Compiled:
        start = time.perf_counter()
        settings = self._settings
        logger.info("compiling %s with backend='%s' ...", what, settings.backend)
        options = settings.options
        if settings.backend == "inductor" and self._loss.enumerates(*self._programs):
            options = {**_FOR_SUMS, **options}
        compiled = compile_function(function, inputs, settings.backend, settings.same_draws, options)
        seconds = time.perf_counter() - start
        self.compile_time += seconds
        logger.info("compiled %s in %.1f s", what, seconds)
        self._compiled[key] = compiled
        start_of_fixed = len(self._tensors)
        end_of_fixed = len(self._prefix[key][0]) if isinstance(key, int) else start_of_fixed + 1
        live, fixed = [*inputs[:start_of_fixed], *inputs[end_of_fixed:]], inputs[start_of_fixed:end_of_fixed]
        self._layouts[key] = Layouts(live, fixed, settings.backend == "inductor" and comparable_in_c())
        return compiled

    def _forget_steps(self) -> None:
        self._layouts = {key: layouts for key, layouts in self._layouts.items() if not isinstance(key, int)}
        self._compiled = {key: compiled for key, compiled in self._compiled.items() if not isinstance(key, int)}
        self._prefix.clear()
        self._native = None


@cache
def _say_off(reason: str) -> None:
    """Say, once in a process, that no step is taken in C with this release of torch."""
    logger.warning(
        "CompiledSVI calls each step from Python, which takes longer where a step is short: steps in C do not know torch %s "
        "(%s). The numbers are the same.",
        torch.__version__,
        reason,
    )


def _name_of_captured(tensor: Tensor, programs: tuple[PyroProgram, PyroProgram]) -> str:
    for path, module in modules_of({"model and guide": programs}):
        for name, buffer in module.named_buffers():
            if buffer is tensor:
                return f"the buffer {path}.{name}"
    return "a tensor that model or guide read from outside"


def _shape(loss: TracedLoss) -> tuple[int, ...]:
    """Of the weights of one step."""
    (weight,) = loss.kl_weights(0, 1)
    return (len(weight),) if isinstance(weight, list) else ()
