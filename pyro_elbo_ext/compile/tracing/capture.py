"""One evaluation of a loss and its gradient as an ATen graph, with everything it depends on as an input.

Pyro runs the programs once, on real tensors, while ``make_fx`` records the operators. The parameters are recognized by
identity, wherever the program gets them from: ``pyro.param``, an ``nn.Module``, a flow. Any other tensor that was there
before, such as data in a closure or a buffer of a module, becomes an input too: the graph holds no data of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from pyro_elbo_ext.compile.errors import CannotCompile
from pyro_elbo_ext.compile.tracing.arguments import Arguments
from pyro_elbo_ext.compile.tracing.dead_code import remove_dead_code
from pyro_elbo_ext.compile.tracing.losses import TracedLoss, Value
from pyro_elbo_ext.compile.tracing.masks import MaskedAssignment, settle_sizes
from pyro_elbo_ext.compile.tracing.numbers import Number, NumbersAsTensors
from pyro_elbo_ext.compile.tracing.places import line_of
from pyro_elbo_ext.compile.tracing.sharing import Sharing
from pyro_elbo_ext.objectives.evaluation import Program
from pyro_elbo_ext.terms.registration import modules_of, replaced, two_of_one_name


@dataclass(slots=True)
class Capture:
    """A loss and its gradient as a graph.

    Attributes
    ----------
    graph : GraphModule
        Inputs: the parameters, ``kl_weight``, the arguments, ``captured``. Outputs: the loss, the table of the history,
        and the gradient of each parameter that is ``reached``.
    captured : list of Tensor
        What the programs use beside parameters and arguments.
    reached : list of bool
        Which parameters the loss depends on.
    """

    graph: GraphModule
    captured: list[Tensor]
    reached: list[bool]


class Evaluation:
    """A loss with its gradient as a function of tensors: what is traced, and what the graph is compared with."""

    def __init__(
        self, loss: TracedLoss, model: Program, guide: Program, parameters: Sequence[Tensor], arguments: Arguments
    ) -> None:
        self._loss, self._model, self._guide = loss, model, guide
        self.parameters, self._rebuild = list(parameters), arguments.rebuild
        self.numbers = list(arguments.numbers)  # the floats among the arguments
        self.lifted: list[int] = []  # those that are inputs of the graph, the last ones
        self.needed: list[str] | None = None  # while it is traced: where the program needs the value of such a float
        self.reached: list[bool] = []
        self.watched: Callable[[], AbstractContextManager[None]] = nullcontext  # what to run the programs in

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        """``inputs`` are the parameters themselves, ``kl_weight`` and the arguments."""
        count = len(self.parameters)
        given, numbers = inputs[count + 1 :], list(self.numbers)
        if self.lifted:
            given, scalars = given[: -len(self.lifted)], given[-len(self.lifted) :]
            if self.needed is not None:
                for place, scalar in zip(self.lifted, scalars, strict=True):
                    numbers[place] = Number(scalar, self.needed)
        args, kwargs = self._rebuild(given, numbers)
        with torch.enable_grad(), self.watched():
            value: Value = self._loss(self._model, self._guide, args, kwargs, inputs[count])
            gradients: Sequence[Tensor | None] = [None] * count
            if value.surrogate.requires_grad and count:
                gradients = torch.autograd.grad(value.surrogate, self.parameters, allow_unused=True)
        self.reached = [gradient is not None for gradient in gradients]
        return [value.loss, value.table, *[gradient for gradient in gradients if gradient is not None]]


def capture(
    evaluation: Evaluation, inputs: list[Tensor], programs: tuple[Program, Program], sharing: Sharing | None = None
) -> Capture:
    """Trace an evaluation.

    Parameters
    ----------
    inputs
        As :class:`Evaluation` takes them, each a tensor of its own: the tracer takes two names of one tensor for the same
        input.
    programs
        Model and guide, searched for the names of parameters.
    sharing
        What the program computes several times from the same, the graph computes once.

    Raises
    ------
    CannotCompile
        If Python reads the value of a tensor (naming the line), or a parameter is used that SVI does not train.
    """
    with as_traced():
        try:
            with NumbersAsTensors(), _ScalarIndices(), MaskedAssignment(), sharing or nullcontext():
                graph = make_fx(evaluation)(inputs)
        except RuntimeError as error:
            reason = _reads_a_value(error)
            if reason is None:
                raise
            raise CannotCompile(reason) from error
    flat = _flatten_inputs(graph, len(inputs))
    settle_sizes(flat)
    captured = _lift(flat, evaluation, programs)
    return Capture(flat, captured, evaluation.reached)


@contextmanager
def as_traced() -> Iterator[None]:
    """Without the checks of values, which read them, even in distributions made while validation was on."""
    check = Distribution._validate_sample
    Distribution._validate_sample = _accept  # type: ignore[method-assign]
    try:
        with pyro.validation_enabled(False):
            yield
    finally:
        Distribution._validate_sample = check  # type: ignore[method-assign]


def _accept(self: Distribution, value: Tensor) -> None:
    """The first step, which Pyro ran, has checked."""


class _ScalarIndices(TorchFunctionMode):
    """``x[k]`` with a scalar tensor ``k``, for which torch reads ``k`` into Python, as the operator that does not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            indices = args[1] if isinstance(args[1], tuple) else (args[1],)
            if indices and all(isinstance(k, Tensor) and k.dim() == 0 and k.dtype is torch.int64 for k in indices):
                return torch.ops.aten.index.Tensor(args[0], list(indices))
        return func(*args, **(kwargs or {}))


def _reads_a_value(error: RuntimeError) -> str | None:
    """What to say if the program read a tensor into Python; None if that is not what the error is about."""
    text = str(error)
    if "_local_scalar_dense" not in text and "data-dependent" not in text and "tracing tensor" not in text:
        return None
    return (
        f"the program reads the value of a tensor into Python{line_of(error.__traceback__)}: a graph would keep the "
        "value of this one run. Compute with tensors (torch.where in place of if, no .item(), float() or int()), or "
        "train with pyro.infer.SVI, or fallback=True."
    )


def _flatten_inputs(graph: GraphModule, count: int) -> GraphModule:
    """The graph with ``count`` plain tensors as inputs in place of a list of them."""
    flat = torch.fx.GraphModule(graph, graph.graph)
    flat.graph.set_codegen(torch.fx.graph.CodeGen())
    found = [node for node in flat.graph.nodes if node.op == "placeholder"]
    assert len(found) == count
    for i, node in enumerate(found):
        node.target = node.name = f"input_{i}"
    flat.recompile()
    return flat


def _lift(module: GraphModule, evaluation: Evaluation, programs: tuple[Program, Program]) -> list[Tensor]:
    """Turn every tensor that the graph holds into an input, and return them in order."""
    graph = module.graph
    captured: list[Tensor] = []
    places: dict[int, torch.fx.Node] = {}
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        tensor = getattr(module, node.target)
        if not isinstance(tensor, Tensor):
            raise CannotCompile(
                f"the program calls a function of functions ({node.target}), which is not supported here"
            )
        if tensor.requires_grad:
            raise CannotCompile(_unregistered(tensor, programs))
        if tensor.layout is not torch.strided or tensor.is_neg() or tensor.is_conj():
            kind = tensor.layout if tensor.layout is not torch.strided else "the view that conj() gives"
            raise CannotCompile(
                f"model or guide read a tensor from outside, of shape {tuple(tensor.shape)}, that is {kind}. Use a strided "
                "one (.to_dense(), .resolve_conj().resolve_neg()), train with pyro.infer.SVI, or pass fallback=True."
            )
        if _inline(module, node, tensor):
            continue
        if id(tensor) not in places:
            with graph.inserting_after(last):
                last = places[id(tensor)] = graph.placeholder(f"captured_{len(captured)}")
            captured.append(tensor)
        node.replace_all_uses_with(places[id(tensor)])
        graph.erase_node(node)
    remove_dead_code(graph)
    graph.lint()
    module.recompile()
    return captured


def written_inputs(module: GraphModule) -> list[int]:
    """Which inputs the graph writes to, such as the running means of batch normalization."""
    places = [node for node in module.graph.nodes if node.op == "placeholder"]
    written: set[int] = set()
    for node in module.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            continue
        unannounced = "batch_norm" in schema.name and "backward" not in schema.name  # torch declares it without effects
        for argument, value in zip(schema.arguments, node.args, strict=False):
            if unannounced or (argument.alias_info is not None and argument.alias_info.is_write):
                root = value
                while isinstance(root, torch.fx.Node) and root.op == "call_function":  # a view, if anything
                    root = next(iter(root.all_input_nodes), None)
                if root in places:
                    written.add(places.index(root))
    return sorted(written)


_FRESH = {torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default}


def _inline(module: GraphModule, node: torch.fx.Node, tensor: Tensor) -> bool:
    """Write a number that the program itself spells out, ``torch.tensor(2.0)``, into the graph; False if it is not one."""
    if tensor.numel() > 1 or any(user.target not in _FRESH for user in node.users):
        return False
    value = tensor.item() if tensor.numel() else 0
    for user in list(node.users):
        with module.graph.inserting_before(user):
            full = module.graph.call_function(
                torch.ops.aten.full.default,
                (list(tensor.shape), value),
                {"dtype": tensor.dtype, "device": tensor.device, "pin_memory": False},
            )
        user.replace_all_uses_with(full)
        module.graph.erase_node(user)
    module.graph.erase_node(node)
    return True


def _unregistered(tensor: Tensor, programs: tuple[Program, Program]) -> str:
    if clash := two_of_one_name(tensor, programs):
        return clash
    name = f"a tensor of shape {tuple(tensor.shape)}"
    for path, module in modules_of({"model and guide": programs}):
        for inner, parameter in module.named_parameters():
            if parameter is tensor:
                name = f"{path}.{inner} ({type(module).__name__})"
    kind = "parameter" if isinstance(tensor, nn.Parameter) else "tensor with requires_grad"
    return (
        f"the loss depends on a {kind} that is not registered with Pyro, so SVI would never train it: {name}. Call "
        "pyro.module(name, module) in the model or guide; if it is meant to stay fixed, call requires_grad_(False) or "
        f"detach it.{replaced(tensor, programs)}"
    )
