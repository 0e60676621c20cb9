"""What a compiled graph does, as a list of calls that C can make.

Inductor turns a graph into machine code for its kernels and a Python function, which allocates memory and calls them. For
small models that function takes ten times as long as the kernels. Here it is run once with everything it calls replaced
by something that only writes the calls down.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

_HARMLESS = ("assert_size_stride", "assert_size_stride_grouped", "assert_alignment", "reinterpret_tensor")
_MOST_PRODUCTS = 1 << 15  # multiplications in a matrix product of ours: beyond, a library's is quicker even by Python

_C_TYPES = {torch.float32: "float", torch.float64: "double"}
_C_NUMBERS = {**_C_TYPES, torch.int64: "long", torch.int32: "int", torch.bool: "bool"}


class NotNative(Exception):
    """The compiled graph does more than call its own kernels: it needs Python."""


class NotKnown(NotNative):
    """Torch is not as it was when this was written, whatever the graph: no step can be taken in C with this release."""


@dataclass(slots=True)
class Call:
    """One call.

    Attributes
    ----------
    text : str
        In C, with ``{0}``, ``{1}`` ... for the tensors' addresses and ``kernel[i]`` for the kernels', of type ``void*``.
    tensors : tuple of Tensor
        What it reads and writes.
    """

    text: str
    tensors: tuple[Tensor, ...]


@dataclass(slots=True)
class Calls:
    """All that the generated function does.

    Attributes
    ----------
    calls : list of Call
        In their order.
    kernels : list
        Inductor's kernels; the file ``kernel.__self__.__file__`` has the function ``kernel``.
    seeds : list of (int, int, Tensor)
        Tensors that must be filled with whole numbers, from the first up to and without the second, before the calls.
    buffers : list of Tensor
        The memory that it allocates, none of it used twice.
    results : tuple of Tensor
        What it returns.
    sums : set of torch.dtype
        Of matrix products that are summed in another order than by Python; without any, every bit is the same.
    """

    calls: list[Call] = field(default_factory=list)
    kernels: list[Any] = field(default_factory=list)
    seeds: list[tuple[int, int, Tensor]] = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)
    results: tuple[Tensor, ...] = ()
    sums: set[torch.dtype] = field(default_factory=set)


def record(compiled: Callable[..., Any], inputs: Sequence[Tensor]) -> Calls:
    """Write down what a graph compiled by ``torch._inductor.compile`` calls; nothing is computed, read or drawn.

    Raises
    ------
    NotNative
        If it needs Python, for instance for large matrix products, factorizations, or other draws than those in its
        kernels; the message says what it calls.
    """
    if any(tensor.device.type != "cpu" for tensor in inputs):
        raise NotNative("a tensor is not on the CPU")
    graph = inductor_graph(compiled)
    generated = graph.current_callable
    function = getattr(generated, "__func__", generated)
    if not isinstance(function, FunctionType) or "empty_strided_cpu" not in function.__globals__:
        raise NotNative("Inductor wrote no function of Python")
    recorder = _Recorder(function.__globals__)
    # in a namespace of its own, since torch gives equal graphs one module
    dry = FunctionType(function.__code__, {**recorder.known, "__builtins__": {}})

    def call(arguments: list[Tensor]) -> Any:
        # a method may read parts of its graph from its object
        return dry(*[_Only("self", {})] * isinstance(generated, MethodType), list(arguments))

    graph.current_callable = call
    try:
        with torch.no_grad():
            recorder.found.results = tuple(compiled(*[tensor.detach() for tensor in inputs]))
    except NameError as error:
        raise NotNative(f"it calls {error.name}") from error
    finally:
        graph.current_callable = generated
    return recorder.found


def inductor_graph(compiled: Callable[..., Any]) -> Any:
    """Inductor's object of a graph that it compiled, found in the functions around it.

    Raises
    ------
    NotKnown
        If there is none.
    NotNative
        If there are several.
    """
    from torch._inductor.output_code import CompiledFxGraph  # slow to import

    found: list[Any] = []
    seen: set[int] = set()
    waiting: list[Any] = [compiled]
    while waiting:
        function = waiting.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        if isinstance(function, CompiledFxGraph):
            found.append(function)
        for cell in getattr(function, "__closure__", None) or ():
            try:
                waiting.append(cell.cell_contents)
            except ValueError:  # a name that is not bound yet
                continue
    if not found:
        raise NotKnown("what Inductor compiles keeps its graph in another place")
    if len(found) != 1 or found[0].partition_maps:
        raise NotNative(f"it is {len(found)} graphs of Inductor, or one in parts")
    return found[0]


class _Recorder:
    """What the generated function finds in place of torch."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.found = Calls()
        self._allocate = names.get("empty_strided_cpu")
        solve = _Only("linalg_solve_triangular", {"default": self._solve})
        running = {name: _Only(name, {"default": partial(self._running, name)}) for name in ("cumsum", "cumprod")}
        chain = _Only("chain", {"default": self._chain})
        libraries = {
            "aten": _Only("aten", {"linalg_solve_triangular": solve, **running}),
            "pyro_elbo_ext": _Only("pyro_elbo_ext", {"chain": chain}),
        }
        dtypes = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
        self.known: dict[str, Any] = {name: _Only(name, {}) for name in names}
        self.known |= {name: names[name] for name in _HARMLESS if name in names}
        self.known |= {name: self._kernel(value) for name, value in names.items() if _is_kernel(value)}
        self.known |= {
            "empty_strided_cpu": self._empty,
            "extern_kernels": _Only("extern_kernels", {"mm": self._mm, "bmm": self._mm, "addmm": self._addmm}),
            "aten": _Only("aten", {"randint": _Only("aten.randint", {"low_out": self._seeds})}),
            "torch": _Only("torch", {**dtypes, "ops": _Only("torch.ops", libraries)}),
        }

    def _kernel(self, kernel: Any) -> Callable[..., None]:
        number = len(self.found.kernels)
        self.found.kernels.append(kernel)

        def call(*args: Any) -> None:
            if not all(isinstance(value, Tensor) and value.device.type == "cpu" for value in args):
                raise NotNative("a kernel takes other things than tensors on the CPU")
            types, addresses = ", ".join(["void*"] * len(args)), ", ".join(f"{{{i}}}" for i in range(len(args)))
            self.found.calls.append(Call(f"((void (*)({types})) kernel[{number}])({addresses})", args))

        return call

    def _empty(self, *args: Any) -> Tensor:
        assert self._allocate is not None
        self.found.buffers.append(self._allocate(*args))
        return self.found.buffers[-1]

    def _seeds(self, least: int, end: int, shape: Sequence[int], *, out: Tensor) -> None:
        if out.dtype != torch.int64 or not out.is_contiguous() or list(shape) != list(out.shape):
            raise NotNative("it draws whole numbers in a way that is not known here")
        self.found.seeds.append((least, end, out))

    def _mm(self, a: Tensor, b: Tensor, *, out: Tensor) -> None:
        self._product(a, b, out, None, 1.0, 1.0)

    def _addmm(self, d: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1, beta: float = 1, out: Tensor) -> None:
        self._product(a, b, out, d.expand(out.shape), alpha, beta)

    def _product(self, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, alpha: float, beta: float) -> None:
        rows, inner, columns = a.shape[-2], a.shape[-1], b.shape[-1]
        if a.shape[:-2].numel() * rows * inner * columns > _MOST_PRODUCTS or c.dtype not in _C_TYPES:
            raise NotNative(f"it multiplies matrices of shapes {tuple(a.shape)} and {tuple(b.shape)}")
        kind = _C_TYPES[c.dtype]
        third = "nullptr" if d is None else f"(const {kind}*) {{3}}"
        for matrices in _matrices(a, b, c, c if d is None else d):
            self._own(
                f"product<{kind}>((const {kind}*) {{0}}, (const {kind}*) {{1}}, ({kind}*) {{2}}, {third}, "
                f"{float(alpha)!r}, {float(beta)!r}, {rows}, {inner}, {columns}, {_strides(matrices)})",
                matrices,
            )

    def _solve(self, t: Tensor, b: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False) -> Tensor:
        x = torch.ops.aten.linalg_solve_triangular.default(t, b, upper=upper, left=left, unitriangular=unitriangular)
        self.found.buffers.append(x)
        size, columns = b.shape[-2:]
        if b.numel() * size > _MOST_PRODUCTS or x.dtype not in _C_TYPES or not left or t.shape[:-2] != b.shape[:-2]:
            raise NotNative(f"it solves triangular systems of shapes {tuple(t.shape)} and {tuple(b.shape)}")
        kind = _C_TYPES[x.dtype]
        flags = f"{str(upper).lower()}, {str(unitriangular).lower()}"
        for matrices in _matrices(t, b, x):
            self._own(
                f"solve<{kind}>((const {kind}*) {{0}}, (const {kind}*) {{1}}, ({kind}*) {{2}}, {size}, {columns}, {flags}, "
                f"{_strides(matrices)})",
                matrices,
            )
        return x

    def _running(self, name: str, x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
        result: Tensor = getattr(torch.ops.aten, name).default(x, dim, dtype=dtype)
        self.found.buffers.append(result)
        if not (x.is_contiguous() and result.is_contiguous() and {x.dtype, result.dtype} <= _C_NUMBERS.keys()):
            raise NotNative(f"it takes running sums or products of {x.dtype} that do not lie in one piece")
        outer, size, inner = x.shape[:dim].numel(), x.shape[dim], x.shape[dim:][1:].numel()
        given, made = _C_NUMBERS[x.dtype], _C_NUMBERS[result.dtype]
        total = "double" if result.is_floating_point() else "long"
        self.found.calls.append(
            Call(
                f"cumulate<{given}, {made}, {total}>((const {given}*) {{0}}, ({made}*) {{1}}, {outer}, {size}, {inner}, "
                f"{str(name == 'cumprod').lower()})",
                (x, result),
            )
        )
        return result

    def _chain(self, alone: Tensor, between: Tensor) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = torch.ops.pyro_elbo_ext.chain(alone, between)
        self.found.buffers += found
        if not (alone.is_contiguous() and between.is_contiguous()) or alone.dtype not in _C_TYPES:
            raise NotNative("it sums over a chain of states that does not lie in one piece")
        layers, batch, states = alone.shape
        kind, stride = _C_TYPES[alone.dtype], 0 if between.shape[1] < batch else states * states
        addresses = ", ".join(
            [f"(const {kind}*) {{{i}}}" for i in range(2)] + [f"({kind}*) {{{i}}}" for i in range(2, 5)]
        )
        self._own(
            f"chain<{kind}>({addresses}, {layers}, {batch}, {states}, {stride})",
            (alone, between, *[of.contiguous() for of in found]),
        )
        return found

    def _own(self, text: str, tensors: tuple[Tensor, ...]) -> None:
        self.found.sums.add(tensors[0].dtype)
        self.found.calls.append(Call(text, tensors))


def _matrices(*batches: Tensor) -> list[tuple[Tensor, ...]]:
    """The matrices of batches of them, one of each batch at a time."""
    places = itertools.product(*map(range, batches[0].shape[:-2]))
    return [tuple(batch[place] for batch in batches) for place in places]


def _strides(matrices: tuple[Tensor, ...]) -> str:
    return ", ".join(str(stride) for matrix in matrices for stride in matrix.stride())


def _is_kernel(value: Any) -> bool:
    return isinstance(value, BuiltinFunctionType) and value.__name__ == "kernel"


class _Only:
    """What may not be called, or a module of which only some names may be used."""

    def __init__(self, name: str, known: dict[str, Any]) -> None:
        self._name, self._known = name, known

    def __getattr__(self, name: str) -> Any:
        if name not in self._known:
            raise NotNative(f"it calls {self._name}.{name}")
        return self._known[name]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotNative(f"it calls {self._name}")
