"""A compiled density as one C function, which threads call at the same time without Python's lock."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pyro_elbo_ext.compile.machine_code.kernel_calls import NotNative, record
from pyro_elbo_ext.compile.machine_code.own_kernels import SOURCE as OWN_KERNELS

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
    void** kernel = (void**) a;  // they stand first
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

extern "C" long log_densities(unsigned long count, unsigned long dim, const double* x, double* gradients, double* values,
                              void* data)
{{
    for (unsigned long i = 0; i < count; i++)
        if (log_density(dim, x + i * dim, gradients + i * dim, values + i, data) < 0) return -1;
    return 0;
}}

extern "C" long copy(unsigned long dim, unsigned long expanded, const double* x, double* out, void* data)
{{
    if (dim != {dim} || expanded != {dim}) return -1;
    __builtin_memcpy(out, x, {dim} * sizeof(double));
    return 0;
}}
"""


class NativeDensity:
    """Value and gradient of a compiled graph, by calls of its kernels alone.

    Inductor turns a graph into C++ kernels and a Python function that allocates memory and calls them. That function is
    looked at once (see :mod:`pyro_elbo_ext.compile.machine_code.kernel_calls`), and a C function makes the same calls with
    the same kernels. Graphs that also call torch's operations, large matrix products or factorizations, are refused.

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
    is_exact : bool
        Whether every bit is what Python gives; otherwise some small matrix products are summed in another order.

    Raises
    ------
    NotNative
        Where the graph cannot be called without Python; the message says what it calls.
    """

    def __init__(self, compiled: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> None:
        recorded = record(compiled, [x])
        (value, gradient), buffers = recorded.results, recorded.buffers
        if value.dtype != torch.float64 or gradient.dtype != torch.float64 or not gradient.is_contiguous():
            raise NotNative("its results are not float64")
        if recorded.seeds:
            raise NotNative("it draws random numbers")
        self.is_exact = not recorded.sums
        starts = np.cumsum([0, *(-(-buffer.untyped_storage().nbytes() // ALIGN) * ALIGN for buffer in buffers)])
        spans = [(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes(), f"b + {starts[i]}")
                 for i, t in enumerate(buffers)]  # fmt: skip
        spans.append((x.data_ptr(), x.nbytes, "(char*) x"))
        self._libraries = [ctypes.CDLL(kernel.__self__.__file__) for kernel in recorded.kernels]
        addresses = [ctypes.cast(library.kernel, ctypes.c_void_p).value for library in self._libraries]

        def pointer(tensor: Tensor) -> str:
            at = tensor.data_ptr()
            for start, size, text in spans:
                if start <= at < start + size:
                    return f"({text} + {at - start})"  # a cast before it is of all of it
            if at not in addresses:
                addresses.append(at)
            return f"a[{addresses.index(at)}]"

        lines = [f"        {call.text.format(*map(pointer, call.tensors))};" for call in recorded.calls]
        stride = int(starts[-1]) + ALIGN
        source = SOURCE.format(
            dim=x.numel(), align=ALIGN, stride=stride, calls="\n".join(lines),
            value=pointer(value), gradient=pointer(gradient),
        )  # fmt: skip
        from torch._inductor.codecache import CppCodeCache

        library = CppCodeCache.load(
            OWN_KERNELS + source
        )  # on disk, by a hash of the source, which therefore holds no address
        slots = (os.cpu_count() or 1) + SPARE_SLOTS
        scratch = np.zeros(slots * stride + ALIGN, np.uint8)
        self._dim = x.numel()
        self._keep = (
            library,
            compiled,
            recorded,
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
        many = ctypes.cast(library.log_densities, ctypes.c_void_p).value or 0
        self._call_rows = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_ulong, ctypes.c_ulong, *pointers)(many)

    def __call__(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """Value and gradient at ``x``, float64 and contiguous of shape (dim,)."""
        if x.shape != (self._dim,):
            raise ValueError(f"the density takes points of shape ({self._dim},), got {x.shape}")
        result = np.empty(self._dim + 1)
        at = result.ctypes.data
        if self._call(self._dim, x.ctypes.data, at + 8, at, self._data) < 0:
            raise RuntimeError("a compiled kernel of the log density failed")
        return float(result[0]), result[1:]

    def rows(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values, shape (S,), and gradients, shape (S, dim), at the rows of ``x``, one after the other without Python."""
        if x.ndim != 2 or x.shape[1] != self._dim:
            raise ValueError(f"the density takes rows of shape (S, {self._dim}), got {x.shape}")
        x = np.ascontiguousarray(x, np.float64)
        values, gradients = np.empty(len(x)), np.empty_like(x)
        at = x.ctypes.data, gradients.ctypes.data, values.ctypes.data
        if self._call_rows(len(x), self._dim, *at, self._data) < 0:
            raise RuntimeError("a compiled kernel of the log density failed")
        return values, gradients
