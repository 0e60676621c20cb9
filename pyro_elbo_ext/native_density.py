"""A compiled density as one C function, which threads call at the same time without Python's lock."""

from __future__ import annotations

import ctypes
import dis
import os
import sys
from collections.abc import Callable
from types import BuiltinFunctionType, FrameType, FunctionType
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
        code, names, inputs = _generated(compiled, x)
        calls, (value, gradient), buffers = _record(code, names, list(inputs))
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


def _generated(
    compiled: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor
) -> tuple[Any, dict[str, Any], tuple[Tensor, ...]]:
    """The Python function that Inductor wrote, its globals, and what it was called with."""
    found: list[tuple[Any, dict[str, Any], tuple[Tensor, ...]]] = []

    def watch(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_name == "call" and "empty_strided_cpu" in frame.f_globals:
            found.append((frame.f_code, frame.f_globals, tuple(frame.f_locals["args"])))

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        with torch.no_grad():
            compiled(x)
    finally:
        sys.setprofile(before)
    if len(found) != 1 or not all(isinstance(value, Tensor) for value in found[0][2]):
        raise NotNative("it is not one function of tensors")
    return found[0]


def _record(
    code: Any, names: dict[str, Any], inputs: list[Tensor]
) -> tuple[list[tuple[Any, tuple[Tensor, ...]]], tuple[Tensor, ...], list[Tensor]]:
    """Run the generated function; its calls of kernels with their tensors, its results, and the memory it allocated."""
    calls: list[tuple[Any, tuple[Tensor, ...]]] = []
    buffers: list[Tensor] = []  # kept, so that no memory is used twice

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

    known: dict[str, Any] = {
        "empty_strided_cpu": allocate,
        "torch": _Dtypes(),
        **{
            name: names[name]
            for name in ("assert_size_stride", "assert_alignment", "reinterpret_tensor")
            if name in names
        },
    }
    for name in {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"} - set(known):
        kernel = names.get(name)
        if not isinstance(kernel, BuiltinFunctionType) or kernel.__name__ != "kernel":
            raise NotNative(f"it calls {name}")
        known[name] = recorder(kernel)
    function = FunctionType(code, {**known, "__builtins__": {}})
    with torch.no_grad():
        results = function(inputs) if code.co_argcount == 1 else function(None, inputs)
    return calls, results, buffers


class _Dtypes:
    """What the generated function may read of torch."""

    def __getattr__(self, name: str) -> torch.dtype:
        value = getattr(torch, name)
        if not isinstance(value, torch.dtype):
            raise NotNative(f"it calls torch.{name}")
        return value
