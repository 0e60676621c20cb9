"""Whether NumPy arrays are as they were, which is asked before each step."""

from __future__ import annotations

import ctypes
import operator
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

_LARGE = 1 << 14  # bytes; from here on a copy at each look costs more than to find the memory
_FORM = operator.attrgetter("shape", "strides", "dtype")


class Arrays:
    """Keeps what arrays hold, byte by byte, with their shapes and dtypes.

    Large ones are compared where they lie, by C's ``memcmp``: of an array of 10 MB a copy would be most of a step.
    """

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self._forms = list(map(_FORM, arrays))
        self._all = list(arrays)
        large = [_compare is not None and one.nbytes > _LARGE and one.flags.c_contiguous for one in arrays]
        self._small = [one for one, is_large in zip(arrays, large, strict=True) if not is_large]
        self._bytes = [array.tobytes() for array in self._small]
        self._large = [one for one, is_large in zip(arrays, large, strict=True) if is_large]
        self._kept = [array.tobytes() for array in self._large]

    def __len__(self) -> int:
        return len(self._all)

    def are_same(self) -> bool:
        """Whether they are as they were when this was made."""
        return (
            list(map(_FORM, self._all)) == self._forms
            and (not self._small or list(map(np.ndarray.tobytes, self._small)) == self._bytes)
            and (not self._large or all(map(_holds, self._large, self._kept)))
        )


def _holds(array: np.ndarray, kept: bytes) -> bool:
    assert _compare is not None
    return _compare(array.ctypes.data, kept, len(kept)) == 0


def _c_compare() -> Callable[[int, bytes, int], int] | None:
    """C's ``memcmp``; None where it cannot be had."""
    try:
        library: Any = ctypes.PyDLL("msvcrt" if os.name == "nt" else None)
        library.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t]
        compare: Callable[[int, bytes, int], int] = library.memcmp
    except (OSError, AttributeError, TypeError):
        return None
    return compare


_compare = _c_compare()
