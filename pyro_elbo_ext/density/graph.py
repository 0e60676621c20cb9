"""A function of one tensor as an ATen graph with its constants folded, and as machine code."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_elbo_ext.compile import CannotCompile
from pyro_elbo_ext.compile.machine_code.compiler import (
    failures_are_reasons,
    import_dynamo,
    import_inductor,
    inductor_code,
)
from pyro_elbo_ext.compile.tracing.dead_code import remove_dead_code
from pyro_elbo_ext.programs.faults import first_line
from pyro_elbo_ext.programs.interrupts import handlers_are_heard

logger = logging.getLogger(__name__)

# Bits of the vectors in compiled code: what a row of some tens of predictors leaves over costs more in longer ones than they
# save: 41 µs for the value and gradient of a logistic regression of 1000 x 20 in those of AVX512, 24 µs in these.
SHORT = 256

Graph = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]


def trace(function: Graph, points: list[torch.Tensor], rtol: float, what: str) -> Graph:
    """``function`` as one ATen graph with its constants folded, or unchanged where that would not be the same."""
    with handlers_are_heard():
        try:
            with _no_collection():
                import_dynamo()
                graph = make_fx(lambda x: function(x))(points[0])
                _name_dtypes(graph.graph)
                _write_anew(graph.graph)
                if any(
                    _writes(node) for node in graph.graph.nodes
                ):  # writes in place bar the folding of what is written to
                    graph = make_fx(torch.func.functionalize(graph, remove="mutations"))(points[0])
                _fold_constants(graph)
            check_equal(graph, function, points, rtol)
            return graph
        except Exception as error:  # whatever stops the tracer, the model itself runs, and is used instead
            logger.info("the %s is not traced, Pyro runs the model each time: %s", what, first_line(error))
    return function


def trace_batch(graph: torch.fx.GraphModule, points: torch.Tensor, rtol: float) -> Graph | None:
    """``graph`` over all rows of ``points`` as a graph for so many rows, or None where that would not be the same.

    It computes what ``torch.vmap`` of ``graph`` does, without finding out at each call how.
    """
    with handlers_are_heard():
        try:
            with _no_collection(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
                batched = torch.vmap(graph)
                found = make_fx(batched)(points)
                _fold_constants(found)
                _drop_copies(found)
                check_equal(found, batched, [points, points.flip(0)], rtol)
            return found
        except Exception as error:  # whatever stops the tracer, torch.vmap is used at each call
            logger.info("a batch is not traced, torch.vmap runs each time: %s", first_line(error))
    return None


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without the garbage collector, which goes through all of torch's objects several times while a graph is traced."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def to_machine_code(
    graph: torch.fx.GraphModule, points: list[torch.Tensor], rtol: float, what: str, one_thread: bool
) -> Graph | None:
    """``graph`` as machine code, or None where there is no compiler for it or the code is not equal to it.

    The code is kept on disk by torch, in its cache directory (``TORCHINDUCTOR_CACHE_DIR``), by a hash of the graph: another
    process with the same model and shapes skips the C++ compiler. It runs in as many threads as torch is set to at this
    moment, or in the caller's alone.
    """
    options: dict[str, Any] = {"cpp.threads": 1} if one_thread else {}
    if _has_long_vectors():
        options["cpp.simdlen"] = SHORT
    try:
        with failures_are_reasons(f"compiling the {what}", "inductor"), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's of itself, no error where warnings are errors
            copy = torch.fx.GraphModule(graph, deepcopy(graph.graph))
            compiled: Graph = inductor_code(copy, [points[0]], **options)
            check_equal(compiled, graph, points, rtol)
    except CannotCompile as reason:  # no C++ compiler, an operation it lacks, or another result
        logger.info("the %s is not compiled, its graph is interpreted: %s", what, reason)
        return None
    return compiled


@contextmanager
def short_vectors_only() -> Iterator[None]:
    """Keep Inductor from trying instruction sets of longer vectors than ours, each by a run of the compiler.

    Together these take longer than the compilation of a small graph. What it finds meanwhile is forgotten afterwards.
    """
    cpu_vec_isa: Any = None
    with handlers_are_heard():
        try:
            import_inductor()
            cpu_vec_isa = import_module("torch._inductor.cpu_vec_isa")
        except Exception as error:
            logger.info("torch's compiler cannot be imported: %s", first_line(error))
    if cpu_vec_isa is None:
        yield
        return
    if not _has_long_vectors() or cpu_vec_isa.valid_vec_isa_list.cache_info().currsize:  # tried already: known
        yield
        return
    short = [kind for kind in cpu_vec_isa.supported_vec_isa_list if kind.bit_width() <= SHORT]
    try:
        with patch.object(cpu_vec_isa, "supported_vec_isa_list", short):
            yield
    finally:
        cpu_vec_isa.valid_vec_isa_list.cache_clear()


def _has_long_vectors() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def check_equal(graph: Graph, function: Graph, points: list[torch.Tensor], rtol: float) -> None:
    """Raise an AssertionError where the two differ by more than ``rtol`` at one of the points."""
    for x in points:
        for ours, eager in zip(graph(x), function(x), strict=True):
            torch.testing.assert_close(ours, eager, rtol=rtol, atol=rtol, equal_nan=True)


def _fold_constants(module: torch.fx.GraphModule) -> None:
    """Compute once whatever does not depend on the input, unless the graph writes into such a value in place."""
    graph = module.graph
    remove_dead_code(graph)
    calls = [node for node in graph.nodes if node.op == "call_function"]
    known: dict[torch.fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            known[node] = getattr(module, node.target)
        elif node.op == "call_function" and all(source in known for source in node.all_input_nodes):
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                continue
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            with torch.no_grad():
                known[node] = node.target(*args, **kwargs)
    for node in calls:
        if _writes(node):
            root = node.args[0]
            while isinstance(root, torch.fx.Node) and _returns_view(root):
                root = root.args[0]
            if not isinstance(root, torch.fx.Node) or root in known or root.op != "call_function":
                return  # a folded buffer would carry what one call wrote into the next
    for node in calls:
        if node.target in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default) and node not in known:
            # a mask known in advance is so many indices, whose number a compiler then knows too
            indices = [
                index
                for source in node.args[1]
                for index in (
                    known[source].nonzero().unbind(1)
                    if source in known and known[source].dtype == torch.bool
                    else [source]
                )
            ]
            with graph.inserting_before(node):
                for at, index in enumerate(indices):
                    if isinstance(index, torch.Tensor):
                        name = f"_index_{len(known)}"
                        module.register_buffer(name, index)
                        indices[at] = graph.get_attr(name)
                        known[indices[at]] = index
            node.args = (node.args[0], indices, *node.args[2:])
    for index, (node, value) in enumerate(known.items()):
        if isinstance(value, torch.Tensor) and any(user not in known for user in node.users):
            module.register_buffer(f"_folded_{index}", value.detach())
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.get_attr(f"_folded_{index}"))
    for node in calls:
        if node.target is torch.ops.aten.detach.default and node not in known:
            node.replace_all_uses_with(node.args[0])
    remove_dead_code(graph)
    module.recompile()


def _drop_copies(module: torch.fx.GraphModule) -> None:
    """Leave out views and expansions to the shape that is there already, of which batching makes many."""
    graph = module.graph
    if any(_writes(node) for node in graph.nodes):
        return
    for node in graph.nodes:
        if node.target not in (torch.ops.aten.view.default, torch.ops.aten.expand.default):
            continue
        source = node.args[0]
        if "val" in source.meta and source.meta["val"].shape == node.meta["val"].shape:
            node.replace_all_uses_with(source)
    remove_dead_code(graph)
    module.recompile()


def _name_dtypes(graph: torch.fx.Graph) -> None:
    """Name the dtype of what is made without inputs, such as zeros: that of the tracing, whatever the default is later."""
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.all_input_nodes or schema is None or node.kwargs.get("dtype") is not None:
            continue
        made = node.meta.get("val")
        if isinstance(made, torch.Tensor) and any(argument.name == "dtype" for argument in schema.arguments):
            node.kwargs = {**node.kwargs, "dtype": made.dtype}


def _write_anew(graph: torch.fx.Graph) -> None:
    """Replace writes into a value that nothing else shares by a new value, which spares tracing the graph once more."""
    place = {node: index for index, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if not _writes(node) or not isinstance(node.args[0], torch.fx.Node):
            continue
        old, name = node.args[0], node.target._schema.name.split("::")[1]
        anew = getattr(getattr(torch.ops.aten, name[:-1], None), node.target._overloadname, None)
        shared = old.op != "call_function" or any(_returns_view(user) for user in (old, *old.users) if user is not node)
        if anew is None or not name.endswith("_") or shared or old.meta["val"].dtype != node.meta["val"].dtype:
            continue
        with graph.inserting_before(node):
            new = graph.call_function(anew, node.args, node.kwargs)
        new.meta, place[new] = dict(node.meta), place[node]
        node.replace_all_uses_with(new)
        for user in list(old.users):
            if user is not new and place[user] > place[new]:
                user.replace_input_with(old, new)
        graph.erase_node(node)


def _writes(node: torch.fx.Node) -> bool:
    return getattr(getattr(node.target, "_schema", None), "is_mutable", False)


def _returns_view(node: torch.fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(result.alias_info is not None for result in schema.returns)
