"""Whole steps as one compiled graph: the captured loss and gradient, then the updates, several times over."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_elbo_ext.compile.machine_code.compiler import (
    failures_are_reasons,
    inductor_code,
)
from pyro_elbo_ext.compile.tracing.capture import Capture
from pyro_elbo_ext.compile.tracing.dead_code import remove_dead_code
from pyro_elbo_ext.compile.updates import Rule

Compiled = Callable[..., Any]
Backend = str | Callable[..., Any]


def build_steps(found: Capture, rules: Sequence[Rule | None], steps: int, guards: bool) -> Compiled:
    """``steps`` steps as a function of flat tensors, which it writes to.

    Its inputs are the parameters, the state of their rules, and then

    - learning rates, float64, one for each rule;
    - ``count``, how many of the steps to take, and ``good``, whether all losses so far were finite;
    - weights of ``kl_prior``, one for each step, or those of sites, shape ``(steps, sites)``;
    - arguments and captured tensors.

    It returns the losses, shape ``(steps,)``, and the history's tables, shape ``(steps, sites * 6)``. If it ``guards``,
    nothing changes from the first loss on that is not finite.
    """
    graph, reached = found.graph, found.reached
    sizes = [0 if rule is None else len(rule.tensors) for rule in rules]
    decays = [rule.decay for rule in rules if rule is not None]

    def run(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        remaining = iter(inputs)
        parameters = [next(remaining) for _ in rules]
        states = [[next(remaining) for _ in range(size)] for size in sizes]
        rates, count, good, kl_weights = (next(remaining) for _ in range(4))
        rest = list(remaining)
        losses, tables = [], []
        for i in range(steps):
            loss, table, *known = graph(*parameters, kl_weights[i], *rest)
            losses.append(loss)
            tables.append(table)
            taken: Tensor | None = None
            if guards:
                good.copy_(good & torch.isfinite(loss))
                taken = good
            if steps > 1:
                taken = count > i if taken is None else good & (count > i)
            if any(decay != 1.0 for decay in decays):
                decayed = rates * rates.new_tensor(decays)
                rates.copy_(decayed if taken is None else torch.where(taken, decayed, rates))
            remaining_gradients = iter(known)
            gradients = [next(remaining_gradients) if at else None for at in reached]
            place = 0
            for p, gradient, rule, state in zip(parameters, gradients, rules, states, strict=True):
                if rule is None:
                    continue
                if gradient is None:  # eager keeps a gradient of zero for it
                    gradient = torch.zeros_like(p)
                value, after = rule.update(p, gradient, state, rates[place])
                place += 1
                for old, new in zip([p, *state], [value, *after], strict=True):
                    old.copy_(new if taken is None else torch.where(taken, new, old))
        return torch.stack(losses), torch.stack(tables)

    return run


def build_value(found: Capture) -> Compiled:
    """The loss alone, as a function of the capture's inputs."""

    def run(*inputs: Tensor) -> tuple[Tensor]:
        return (found.graph(*inputs)[0],)

    return run


def compile_function(
    function: Compiled, inputs: Sequence[Tensor], backend: Backend, same_draws: bool, options: dict[str, Any]
) -> Compiled:
    """Make a function of flat tensors, which returns a tuple of tensors, into machine code.

    Raises
    ------
    CannotCompile
        If that fails, for whatever cause.
    """
    with failures_are_reasons(f"compiling the step with backend={backend!r}", backend), torch.no_grad():
        # a trace on tensors without memory: nothing is computed, drawn or written
        graph = make_fx(function, tracing_mode="fake")(*[_plain(tensor) for tensor in inputs])
        if same_draws:
            _keep_bernoulli(graph)
        remove_dead_code(graph.graph)
        graph.recompile()
        if backend == "eager":
            return graph
        with warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning):  # torch's compiler warns of torch
                warnings.filterwarnings("ignore", category=category, module="torch")
            return _compile(graph, inputs, backend, same_draws, options)


def _compile(
    graph: GraphModule, inputs: Sequence[Tensor], backend: Backend, same_draws: bool, options: dict[str, Any]
) -> Compiled:
    if not same_draws:
        _fuse_draws(graph)
    if backend != "inductor":
        compiled: Compiled = torch.compile(graph, backend=backend, dynamic=False)
        with torch.random.fork_rng(_devices_of(inputs)):  # Dynamo compiles at the first call, which must not be a step
            compiled(*[_apart(tensor) for tensor in inputs])
        return compiled
    # shapes and dtypes have been compared before a step is run
    options = {"fallback_random": same_draws, "size_asserts": False, **options}
    return inductor_code(graph, [_plain(tensor) for tensor in inputs], **options)


def _apart(tensor: Tensor) -> Tensor:
    """A copy with the same layout, for a call that must leave no trace."""
    storage = tensor.untyped_storage().clone()
    copy = tensor.new_empty(0).set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
    return copy.requires_grad_(tensor.requires_grad)


def _devices_of(inputs: Sequence[Tensor]) -> list[torch.device]:
    return list({tensor.device for tensor in inputs if tensor.device.type == "cuda"})


_EMPTY = {torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default, torch.ops.aten.empty_like.default}
_DRAWS = {
    torch.ops.aten.normal_.default: (torch.ops.aten.randn.default, (0.0, 1.0)),
    torch.ops.aten.uniform_.default: (torch.ops.aten.rand.default, (0.0, 1.0)),
}


_MANY_DRAWS = (
    512  # elements; beyond, torch's generator, which draws vectors, is quicker on a CPU even if Python calls it
)


def _fuse_draws(graph: GraphModule) -> None:
    """Draw standard normal and uniform numbers in the kernels that use them, not by a call of torch's generator."""
    for node in list(graph.graph.nodes):
        fused, standard = _DRAWS.get(node.target, (None, ()))
        if fused is None or tuple(node.args[1:]) not in ((), standard) or node.kwargs:
            continue
        memory = node.args[0]
        if memory.target not in _EMPTY or len(memory.users) > 1:
            continue
        like = memory.meta["val"]
        if like.device.type == "cpu" and like.numel() > _MANY_DRAWS:
            continue
        with graph.graph.inserting_before(node):
            drawn = graph.graph.call_function(
                fused, (list(like.shape),), {"dtype": like.dtype, "device": like.device, "pin_memory": False}
            )
        drawn.meta = dict(node.meta)
        node.replace_all_uses_with(drawn)
        graph.graph.erase_node(node)
        graph.graph.erase_node(memory)
    graph.recompile()


def _keep_bernoulli(graph: GraphModule) -> None:
    """Inductor draws ``bernoulli(p)`` as ``rand() < p`` even with ``fallback_random``; a form that it leaves alone."""
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.bernoulli.default):
        node.target, node.args = torch.ops.aten.bernoulli.Tensor, (node.args[0], node.args[0])


def _plain(tensor: Tensor) -> Tensor:
    """The same memory without a gradient."""
    return tensor.detach()
