"""Boolean masks as indices: the number of elements they take must not depend on values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.overrides import TorchFunctionMode

from pyro_elbo_ext.compile.errors import CannotCompile

_READS = (torch.ops.aten.index.Tensor,)
_WRITES = (torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)


class MaskedAssignment(TorchFunctionMode):
    """``a[mask] = b[mask]`` and ``a[mask] = number`` as ``torch.where``, which has one shape whatever the mask."""

    def __init__(self) -> None:
        super().__init__()
        self._taken: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # kept, so that no id is used twice

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and _is_mask(args[1], args[0]):
            result = func(*args)
            self._taken[id(result)] = result, args[0], args[1]
            return result
        if func is Tensor.__setitem__ and _is_mask(args[1], args[0]):
            target, mask, value = args
            _, source, same = self._taken.get(id(value), (None, None, None))
            if same is mask and source is not None and source.shape == target.shape:
                return target.copy_(torch.where(mask, source, target))
            if not isinstance(value, Tensor) or value.dim() == 0:
                return target.copy_(torch.where(mask, value, target))
        return func(*args, **(kwargs or {}))


def _is_mask(index: Any, tensor: Tensor) -> bool:
    return isinstance(index, Tensor) and index.dtype is torch.bool and index.shape == tensor.shape


def settle_masks(module: GraphModule) -> None:
    """Replace masks that no input has a part in, as the lower triangle of a matrix, by the integers they stand for.

    Raises
    ------
    CannotCompile
        For any other that is an index.
    """
    graph = module.graph
    graph.eliminate_dead_code()
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in (*_READS, *_WRITES):
            continue
        indices: list[Any] = []
        for index in node.args[1]:
            if index is None or _meta(index).dtype is not torch.bool:
                indices.append(index)
            elif (mask := _constant(index, module)) is not None:
                with graph.inserting_before(node):
                    indices += [_attribute(module, place.contiguous()) for place in mask.nonzero().unbind(1)]
            elif node.target in _WRITES and _meta(node.args[2]).shape.numel() == 1:
                indices.append(index)  # one number for all of them
            else:
                raise CannotCompile(
                    "the program uses a mask of bool as an index, as in x[mask]: how many elements that takes depends on "
                    "values, and a graph has one shape. Use torch.where, poutine.mask or obs_mask, or index by integers "
                    "(mask.nonzero(as_tuple=True)) found outside of model and guide; or train with pyro.infer.SVI, or "
                    "fallback=True."
                )
        node.args = (node.args[0], indices, *node.args[2:])
    graph.eliminate_dead_code()
    module.recompile()


def _meta(node: Node) -> Any:
    return node.meta["tensor_meta"]


def _attribute(module: GraphModule, tensor: Tensor) -> Node:
    count = 0
    while hasattr(module, name := f"_mask_{count}"):
        count += 1
    module.register_buffer(name, tensor)
    return module.graph.get_attr(name)


def _constant(node: Node, module: GraphModule, depth: int = 20) -> Tensor | None:
    """The value of a node that is computed from no input, draw or tensor from outside; None for any other."""
    if node.op != "call_function" or depth == 0 or not isinstance(node.target, torch._ops.OpOverload):
        return None
    if node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags:
        return None
    if any(
        isinstance(u.target, torch._ops.OpOverload) and u.target._schema.is_mutable
        for u in node.users
        if u.args[0] is node
    ):
        return None
    known: dict[Node, Tensor] = {}
    for source in node.all_input_nodes:
        value = _constant(source, module, depth - 1)
        if value is None:
            return None
        known[source] = value
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda source: known[source])
    return node.target(*args, **kwargs)  # type: ignore[no-any-return]
