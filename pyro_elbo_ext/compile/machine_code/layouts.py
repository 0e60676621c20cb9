"""Whether tensors still look as they did when a graph was made for them.

Machine code reads so many numbers at such distances from an address: where a tensor has been resized, transposed, given
other data or lost its memory since, it would read something else; and it trains what required a gradient then. All inputs
are compared in C before each call, which costs a few nanoseconds a tensor; without a compiler in Python.
"""

from __future__ import annotations

import ctypes
import operator
import weakref
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Look = tuple[object, ...]

# Reads tensors through torch's C interface for compiled code, whose handles are pointers to tensors.
SOURCE = """
struct Layouts {
    long count; void** tensors; const long* known; int (**get)(void*, void*); char** addresses;
    long live, inside; bool (*requires_grad)(void*);
};

// Takes the tensors that Python has at the address of these objects in place of the first ones.
static inline void take(const Layouts* of, char** objects)
{
    for (long i = 0; i < of->live; i++) of->tensors[i] = *(void**) (objects[i] + of->inside);
}

// The first tensor that differs from what is known; -1 if none does, and then their addresses.
static inline long first_changed(const Layouts* of)
{
    const long* known = of->known;
    for (long i = 0; i < of->count; i++) {
        void* handle = of->tensors + i;
        long dim = -1, offset = 0, bytes = 0, *sizes = 0, *strides = 0;
        int dtype = -1, type = -1, index = -1;
        if (of->get[0](handle, &dim) | of->get[1](handle, &dtype) | of->get[2](handle, &type)
            | of->get[3](handle, &index) | of->get[4](handle, &sizes) | of->get[5](handle, &strides)
            | of->get[6](handle, &offset) | of->get[7](handle, &bytes) | of->get[8](handle, of->addresses + i)) return i;
        if (dim != known[0] || dtype != known[1] || type != known[2] || index != known[3]) return i;
        if (of->requires_grad(of->tensors[i]) != known[6]) return i;
        const long *size = known + 7, *stride = size + dim;
        for (long k = 0; k < dim; k++) if (sizes[k] != size[k] || strides[k] != stride[k]) return i;
        if (known[5] && (!of->addresses[i] || bytes < offset * known[4] + known[5])) return i;
        known = stride + dim;
    }
    return -1;
}
"""
_ALONE = """
extern "C" long changed(const Layouts* of, char** objects)
{
    take(of, objects);
    return first_changed(of);
}
"""
_GETTERS = (
    *("dim", "dtype", "device_type", "device_index", "sizes", "strides", "storage_offset", "storage_size", "data_ptr"),
)
_REQUIRES_GRAD = "_ZNK3c1010TensorImpl13requires_gradEv"  # TensorImpl::requires_grad, as C++ compilers call it
_HANDLE = operator.attrgetter("_cdata")
_ITEMS = tuple.__basicsize__  # bytes from the start of a tuple to its first item


class Changed(Exception):
    """A tensor does not look as it did; nothing has been computed.

    Attributes
    ----------
    tensor : Tensor
        Which.
    """

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(f"a tensor of shape {tuple(tensor.shape)} has changed")
        self.tensor = tensor


class Layouts:
    """Shape, strides, dtype, device and memory of some tensors, as they were at construction.

    Parameters
    ----------
    live
        Tensors that may be others at the next call.
    fixed
        Tensors that will be these at every call.
    in_c
        Whether to compare in C, which takes a compiler.

    Attributes
    ----------
    address : int
        What ``take`` and ``first_changed`` take in C.
    """

    def __init__(self, live: Sequence[Tensor], fixed: Sequence[Tensor], in_c: bool) -> None:
        self._num_live = len(live)
        self._fixed = list(fixed)
        self._in_c = in_c
        tensors = [*live, *fixed]
        if not in_c:
            self._looks = list(map(look_of, tensors))
            return
        # torch does not exchange what is behind two tensors of which it knows that somebody else watches them
        self._watched = [weakref.ref(tensor) for tensor in fixed]
        count, known = len(tensors), [number for tensor in tensors for number in _numbers(tensor)]
        self._tensors = (ctypes.c_void_p * count)(*map(_HANDLE, tensors))
        self._known, self._addresses = (ctypes.c_long * len(known))(*known), (ctypes.c_void_p * count)()
        arrays = [ctypes.addressof(of) for of in (self._tensors, self._known, _getters(), self._addresses)]
        self.struct = _Struct(count, *arrays, len(live), _inside(), _requires_grad())
        self.address = ctypes.addressof(self.struct)

    def at(self, place: int, live: Sequence[Tensor]) -> Tensor:
        """The tensor at a place, counted through both kinds."""
        return live[place] if place < self._num_live else self._fixed[place - self._num_live]

    def check(self, live: tuple[Tensor, ...]) -> None:
        """Raise :class:`Changed` for the first that differs."""
        if self._in_c:
            place = _library().changed(self.address, address_of_items(live))
        else:
            looks = list(map(look_of, [*live, *self._fixed]))
            place = (
                -1 if looks == self._looks else [a == b for a, b in zip(looks, self._looks, strict=True)].index(False)
            )
        if place >= 0:
            raise Changed(self.at(place, live))


def address_of_items(live: tuple[Tensor, ...]) -> int:
    """Where Python has the objects in a tuple one after the other, for C."""
    return id(live) + _ITEMS


def look_of(tensor: Tensor) -> Look:
    """What a graph takes for granted of a tensor: shape, strides, dtype, device, memory, and whether it is trained."""
    as_in_memory = not (tensor.is_neg() or tensor.is_conj())
    layout = tensor.shape, tensor.stride(), tensor.dtype, tensor.device
    return *layout, has_memory(tensor), as_in_memory, tensor.requires_grad


def has_memory(tensor: Tensor) -> bool:
    """Whether the memory reaches as far as shape and strides do."""
    if tensor.numel() == 0 or tensor.is_meta:
        return True
    needed = tensor.storage_offset() * tensor.element_size() + _span(tensor)
    return tensor.data_ptr() != 0 and tensor.untyped_storage().nbytes() >= needed


@cache
def comparable_in_c() -> bool:
    """Whether torch has the functions for it, and its objects their tensors where they are looked for."""
    has_getters = all(hasattr(_torch(), f"aoti_torch_get_{name}") for name in _GETTERS)
    return has_getters and hasattr(_torch("c10"), _REQUIRES_GRAD) and _inside() > 0


class _Struct(ctypes.Structure):
    _fields_ = (
        ("count", ctypes.c_long),
        *((name, ctypes.c_void_p) for name in ("tensors", "known", "get", "addresses")),
        *((name, ctypes.c_long) for name in ("live", "inside")),
        ("requires_grad", ctypes.c_void_p),
    )


def _span(tensor: Tensor) -> int:
    """Bytes from the first entry to behind the last."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _numbers(tensor: Tensor) -> list[int]:
    """In the order of ``known`` in C."""
    numbers = []
    cell, handle = ctypes.c_int32(), ctypes.c_void_p(tensor._cdata)
    for name in ("dtype", "device_type", "device_index"):
        if getattr(_torch(), f"aoti_torch_get_{name}")(ctypes.byref(handle), ctypes.byref(cell)) != 0:
            raise RuntimeError(f"torch does not say the {name} of a tensor")
        numbers.append(cell.value)
    sizes = tensor.element_size(), _span(tensor)
    return [tensor.dim(), *numbers, *sizes, int(tensor.requires_grad), *tensor.shape, *tensor.stride()]


@cache
def _torch(of: str = "torch_cpu") -> ctypes.CDLL:
    folder = Path(torch.__file__).parent / "lib"
    names = [folder / name for name in (f"lib{of}.so", f"lib{of}.dylib", f"{of}.dll")]
    return ctypes.CDLL(str(next((name for name in names if name.exists()), None)))


@cache
def _inside() -> int:
    """Bytes from the start of Python's object of a tensor to the address of the tensor itself; 0 if it is not there."""
    places = set(range(object.__basicsize__, Tensor.__basicsize__, ctypes.sizeof(ctypes.c_void_p)))
    for tensor in (torch.zeros(1), torch.ones(2, requires_grad=True), torch.nn.Parameter(torch.ones(3))):
        at = {place: ctypes.c_void_p.from_address(id(tensor) + place).value for place in places}
        places = {place for place, value in at.items() if value == tensor._cdata}
    return min(places, default=0)


@cache
def _requires_grad() -> int | None:
    return ctypes.cast(getattr(_torch("c10"), _REQUIRES_GRAD), ctypes.c_void_p).value


@cache
def _getters() -> Any:
    found = [ctypes.cast(getattr(_torch(), f"aoti_torch_get_{name}"), ctypes.c_void_p).value for name in _GETTERS]
    return (ctypes.c_void_p * len(found))(*found)


@cache
def _library() -> Any:
    from torch._inductor.codecache import CppCodeCache  # slow to import

    library = CppCodeCache.load(SOURCE + _ALONE)
    library.changed.restype, library.changed.argtypes = ctypes.c_long, [ctypes.c_void_p] * 2
    return library
