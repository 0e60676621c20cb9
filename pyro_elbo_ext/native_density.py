"""A compiled density as one C function, which threads call at the same time without Python's lock."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

ALIGN = 64  # bytes: a cache line, so that threads do not share one
SPARE_SLOTS = 2  # scratch memories beyond one per core: a thread put off between two calls still finds one free

# The C function, as nutpie (and Stan's BridgeStan, up to the order) has it. Status 0: right; 3, 4: gradient, value not
# finite; -1: an error. Scratch memory comes from a slot that no other thread holds.
SOURCE = """
struct Data {{ long slots; char* scratch; char* busy; char** address; }};

extern "C" long log_density(unsigned long dim, const double* x, double* gradient, double* value, void* data)
{{
    const Data* d = (const Data*) data;
    if (dim != {dim}) return -1;
    long slot = 0, status = 0;
    while (__atomic_test_and_set(d->busy + slot * {align}, __ATOMIC_ACQUIRE)) slot = (slot + 1) % d->slots;
    char* b = d->scratch + slot * {stride};
    char** a = d->address;
    try {{
{calls}
        *value = *(const double*) ({value});
        __builtin_memcpy(gradient, {gradient}, {dim} * sizeof(double));
    }} catch (...) {{ status = -1; }}
    __atomic_clear(d->busy + slot * {align}, __ATOMIC_RELEASE);
    if (status) return status;
    for (unsigned long i = 0; i < {dim}; i++) if (!__builtin_isfinite(gradient[i])) return 3;
    return __builtin_isfinite(*value) ? 0 : 4;
}}

extern "C" long copy(unsigned long dim, unsigned long expanded, const double* x, double* out, void* data)
{{
    if (dim != {dim} || expanded != {dim}) return -1;
    __builtin_memcpy(out, x, {dim} * sizeof(double));
    return 0;
}}
"""


class NotNative(Exception):
    """The compiled graph does more than call its own kernels: it needs Python."""


class NativeDensity:
    """Value and gradient of a compiled graph, by calls of its kernels alone.

    Inductor turns a graph into C++ kernels and a Python function that allocates memory and calls them. That function is
    run once, its calls are written down, and a C function makes the same calls with the same kernels: the same results
    to the last bit. Graphs that also call torch's operations, large matrix products or factorizations, are refused.

    Parameters
    ----------
    compiled
        Result of ``torch._inductor.compile``: a tensor of shape (dim,) to value and gradient, float64 on the CPU.
    x
        A point, of shape (dim,).

    Attributes
    ----------
    function, copy : int
        Addresses of the C functions: the density; and its argument unchanged, which nutpie asks for.
    data : ndarray
        What their last argument points to.

    Raises
    ------
    NotNative
        Where the graph cannot be called without Python; the message says what it calls.
    """

    def __init__(self, compiled: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> None:
        generated, inputs = _generated(compiled, x)
        if x.data_ptr() not in {tensor.data_ptr() for tensor in inputs}:
            raise NotNative("it copies its argument")
        calls, (value, gradient), buffers = _record(generated, list(inputs))
        if value.dtype != torch.float64 or gradient.dtype != torch.float64 or not gradient.is_contiguous():
            raise NotNative("its results are not float64")
        starts = np.cumsum([0, *(-(-buffer.untyped_storage().nbytes() // ALIGN) * ALIGN for buffer in buffers)])
        spans = [(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes(), f"b + {starts[i]}")
                 for i, t in enumerate(buffers)]  # fmt: skip
        spans.append((x.data_ptr(), x.nbytes, "(char*) x"))
        kernels = {id(kernel): kernel for kernel, _ in calls}
        self._libraries = {key: ctypes.CDLL(kernel.__self__.__file__) for key, kernel in kernels.items()}
        numbers = {key: number for number, key in enumerate(kernels)}
        addresses = [ctypes.cast(library.kernel, ctypes.c_void_p).value for library in self._libraries.values()]

        def pointer(tensor: Tensor) -> str:
            at = tensor.data_ptr()
            for start, size, text in spans:
                if start <= at < start + size:
                    return f"{text} + {at - start}"
            if at not in addresses:
                addresses.append(at)
            return f"a[{addresses.index(at)}]"

        lines = [
            f"        ((void (*)({', '.join(['void*'] * len(tensors))})) a[{numbers[id(kernel)]}])"
            f"({', '.join(map(pointer, tensors))});"
            for kernel, tensors in calls
        ]
        stride = int(starts[-1]) + ALIGN
        source = SOURCE.format(
            dim=x.numel(), align=ALIGN, stride=stride, calls="\n".join(lines),
            value=pointer(value), gradient=pointer(gradient),
        )  # fmt: skip
        from torch._inductor.codecache import CppCodeCache

        library = CppCodeCache.load(source)  # on disk, by a hash of the source, which therefore holds no address
        slots = (os.cpu_count() or 1) + SPARE_SLOTS
        scratch = np.zeros(slots * stride + ALIGN, np.uint8)
        self._dim = x.numel()
        self._keep = (
            library,
            compiled,
            inputs,
            scratch,
            np.zeros(slots * ALIGN, np.uint8),
            np.array(addresses, np.uintp),
        )
        aligned = -(-scratch.ctypes.data // ALIGN) * ALIGN
        self.data = np.array([slots, aligned, *(array.ctypes.data for array in self._keep[-2:])], np.uintp)
        self._data = self.data.ctypes.data
        self.function, self.copy = (ctypes.cast(f, ctypes.c_void_p).value for f in (library.log_density, library.copy))
        pointers = [ctypes.c_void_p] * 4
        self._call = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_ulong, *pointers)(self.function or 0)

    def __call__(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """Value and gradient at ``x``, float64 and contiguous of shape (dim,)."""
        if x.shape != (self._dim,):
            raise ValueError(f"the density takes points of shape ({self._dim},), got {x.shape}")
        result = np.empty(self._dim + 1)
        at = result.ctypes.data
        if self._call(self._dim, x.ctypes.data, at + 8, at, self._data) < 0:
            raise RuntimeError("a compiled kernel of the log density failed")
        return float(result[0]), result[1:]


def _generated(compiled: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> tuple[FunctionType, tuple[Tensor, ...]]:
    """The Python function that Inductor wrote, and what it is called with at ``x``: point and constants of the graph."""
    from torch._inductor.output_code import CompiledFxGraph  # slow to import

    graphs, todo, seen = [], [compiled], set()  # torch wraps the graph in closures
    while todo:
        function: Any = todo.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        if isinstance(function, CompiledFxGraph):
            graphs.append(function)
        for cell in getattr(function, "__closure__", None) or ():
            try:
                todo.append(cell.cell_contents)
            except ValueError:  # a cell that is not filled
                continue
    if len(graphs) != 1:
        raise NotNative(f"it is {len(graphs)} graphs of Inductor")
    (graph,) = graphs
    generated: Any = graph.current_callable
    found: list[tuple[Any, ...]] = []

    def watch(inputs: Any) -> Any:
        found.append(tuple(inputs))
        return generated(inputs)

    graph.current_callable = watch
    try:
        with torch.no_grad():
            compiled(x)
    finally:
        graph.current_callable = generated
    function = getattr(generated, "__func__", generated)
    if not isinstance(function, FunctionType) or "empty_strided_cpu" not in function.__globals__:
        raise NotNative("it is no generated function of Python")
    if len(found) != 1 or not all(isinstance(value, Tensor) for value in found[0]):
        raise NotNative("it is not one function of tensors")
    return function, found[0]


def _record(
    generated: FunctionType, inputs: list[Tensor]
) -> tuple[list[tuple[Any, tuple[Tensor, ...]]], tuple[Tensor, ...], list[Tensor]]:
    """Run the generated function; its calls of kernels with their tensors, its results, and the memory it allocated.

    It runs in a namespace of its own, since torch gives equal graphs one module. There, kernels and the allocation of
    memory are written down, checks and views are as they were, and whatever else it reads is refused.
    """
    calls: list[tuple[Any, tuple[Tensor, ...]]] = []
    buffers: list[Tensor] = []  # kept, so that no memory is used twice
    names = generated.__globals__

    def allocate(*args: Any) -> Tensor:
        buffers.append(names["empty_strided_cpu"](*args))
        return buffers[-1]

    def recorder(kernel: Any) -> Callable[..., None]:
        def record(*args: Any) -> None:
            if not all(isinstance(value, Tensor) and value.device.type == "cpu" for value in args):
                raise NotNative("a kernel takes other things than tensors on the CPU")
            calls.append((kernel, args))
            kernel(*args)

        return record

    known: dict[str, Any] = {"__builtins__": {}}
    for name, value in names.items():
        if name == "empty_strided_cpu":
            known[name] = allocate
        elif name in ("assert_size_stride", "assert_alignment", "reinterpret_tensor"):
            known[name] = value
        elif isinstance(value, BuiltinFunctionType) and value.__name__ == "kernel":
            known[name] = recorder(value)
        elif name != "__builtins__":
            known[name] = _Refused(name, value)
    function = FunctionType(generated.__code__, known)
    taken = generated.__code__.co_argcount - 1  # a method reads parts of its graph from its object
    try:
        with torch.no_grad():
            results = function(*[_Refused("self", None)] * taken, inputs)
    except NameError as error:
        raise NotNative(f"it calls {error.name}") from error
    return calls, results, buffers


class _Refused:
    """What the generated function may not use, dtypes excepted."""

    def __init__(self, name: str, value: Any) -> None:
        self._name, self._value = name, value

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._value, name, None)
        if isinstance(value, torch.dtype):
            return value
        raise NotNative(f"it calls {self._name}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotNative(f"it calls {self._name}")
