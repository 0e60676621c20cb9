"""Results whose size depends on values, as ``x[mask]`` has: a graph has one size for each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.overrides import TorchFunctionMode

from pyro_elbo_ext.compile.errors import CannotCompile
from pyro_elbo_ext.compile.tracing.dead_code import remove_dead_code

_READ = torch.ops.aten.index.Tensor
_WRITES = (torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)


class MaskedAssignment(TorchFunctionMode):
    """``a[mask] = b[mask]`` and ``a[mask] = number`` in a form that has one size whatever the mask."""

    def __init__(self) -> None:
        super().__init__()
        # by the id of b[mask]: itself, kept so that no id is used twice; b; mask; their versions
        self._taken: dict[int, tuple[Tensor, Tensor, Tensor, tuple[int, int]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and _is_mask(args[1], args[0]):
            source, mask = args
            result = func(source, mask)
            self._taken[id(result)] = result, source, mask, (source._version, mask._version)
            return result
        if func is Tensor.__setitem__ and _is_mask(args[1], args[0]):
            target, mask, value = args
            if not isinstance(value, Tensor) or value.dim() == 0:
                return target.masked_fill_(mask, value)
            source = self._source(target, mask, value)
            if source is not None:
                return target.copy_(torch.where(mask, source, target))
        return func(*args, **(kwargs or {}))

    def _source(self, target: Tensor, mask: Tensor, value: Tensor) -> Tensor | None:
        """What ``value`` was taken from by this very mask, if that can stand for it."""
        if id(value) not in self._taken:
            return None
        _, source, same, versions = self._taken[id(value)]
        fits = same is mask and source.shape == target.shape and source.dtype == target.dtype
        return source if fits and versions == (source._version, mask._version) and value._version == 0 else None


def _is_mask(index: Any, tensor: Tensor) -> bool:
    return isinstance(index, Tensor) and index.dtype is torch.bool and index.shape == tensor.shape


def settle_sizes(module: GraphModule) -> None:
    """Replace masks that no input has a part in, as the lower triangle of a matrix, by the integers they stand for.

    Raises
    ------
    CannotCompile
        If the size of a result depends on values otherwise.
    """
    graph = module.graph
    remove_dead_code(graph)
    for node in list(graph.nodes):
        if not isinstance(node.target, OpOverload):
            continue
        if node.target is _READ or node.target in _WRITES:
            _settle_indices(node, module)
        elif torch.Tag.dynamic_output_shape in node.target.tags:
            value = _constant(node)
            if not isinstance(value, Tensor):
                raise CannotCompile(_refusal(f"calls {node.target.overloadpacket}"))
            with graph.inserting_before(node):
                node.replace_all_uses_with(_attribute(module, value))
    remove_dead_code(graph)
    module.recompile()


def _settle_indices(node: Node, module: GraphModule) -> None:
    indices: list[Any] = []
    given: Any = node.args[1]
    for index in given:
        if index is None or _meta(index, module).dtype is not torch.bool:
            indices.append(index)
        elif (mask := _constant(index)) is not None:
            with module.graph.inserting_before(node):
                indices += [_attribute(module, place.contiguous()) for place in mask.nonzero().unbind(1)]
        elif node.target in _WRITES and _meta(node.args[2], module).shape.numel() == 1:
            indices.append(index)  # one number wherever the mask is true
        else:
            raise CannotCompile(_refusal("uses a mask of bool as an index, as in x[mask]"))
    node.args = (node.args[0], indices, *node.args[2:])


def _refusal(what: str) -> str:
    return (
        f"the program {what}: how many elements that gives depends on values, and a graph has one size. Use torch.where, "
        "poutine.mask or obs_mask, or index by integers (mask.nonzero(as_tuple=True)) found outside of model and guide; or "
        "train with pyro.infer.SVI, or fallback=True."
    )


def _meta(node: Any, module: GraphModule) -> Any:
    """What has the shape and dtype of a node's tensor."""
    return getattr(module, node.target) if node.op == "get_attr" else node.meta["tensor_meta"]


def _attribute(module: GraphModule, tensor: Tensor) -> Node:
    count = 0
    while hasattr(module, name := f"_integers_{count}"):
        count += 1
    module.register_buffer(name, tensor)
    return module.graph.get_attr(name)


def _constant(node: Node) -> Any:
    """The value of a node that is computed from no input, draw or tensor from outside; None for any other."""
    target = node.target
    if not isinstance(target, OpOverload) or target._schema.is_mutable or _is_written(node):
        return None
    if torch.Tag.nondeterministic_seeded in target.tags:
        return None
    known: dict[Node, Any] = {}
    for source in node.all_input_nodes:
        known[source] = _constant(source)
        if known[source] is None:
            return None
    args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
    return target(*args, **kwargs)


def _is_written(node: Node) -> bool:
    """Whether an operator writes into this tensor, or into a view of it."""
    for user in node.users:
        if not isinstance(user.target, OpOverload):
            continue
        for given, argument in zip(user.args, user.target._schema.arguments, strict=False):
            if (
                given is node
                and argument.alias_info is not None
                and (argument.alias_info.is_write or _is_written(user))
            ):
                return True
    return False
