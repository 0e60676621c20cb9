"""Reading files that may be anything: errors that name the file, and no more memory than what is in it warrants."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

if TYPE_CHECKING:
    import xarray as xr

SMALL = 64_000_000  # bytes that are read whatever they unpack from
PACKED = 200  # times smaller than what is unpacked, at most, for more than these
NUMBERS = "fiub"  # kinds of dtypes

_WRONG = (
    *(ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, OSError, OverflowError, RecursionError),
    *(MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error),
)  # what libraries raise on content that they cannot read


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turn whatever reading a file raises into a ValueError that says the file and that it is not ``what``.

    Raises
    ------
    ValueError
        For content that cannot be read.
    FileNotFoundError, IsADirectoryError, PermissionError
        As they are, with the name of the file.
    """
    try:
        yield
    except (FileNotFoundError, PermissionError, TimeoutError):
        raise
    except IsADirectoryError:
        raise IsADirectoryError(f"{path} is a folder, not {what}") from None
    except _WRONG as error:
        message = str(error) or type(error).__name__
        if message.startswith(str(path)):
            raise
        if "pickle" in message:  # libraries say how to load it all the same, which runs what is in it
            message = "it holds Python objects, not numbers"
        raise ValueError(f"{path} is not {what}: {message.splitlines()[0]}") from error


def check_unpacked(path: Path, size: int) -> None:
    """Raise a ValueError if ``size`` bytes are more than a file, or folder, of its size can hold in earnest."""
    files = path.rglob("*") if path.is_dir() else [path]
    there = sum(file.stat().st_size for file in files if file.is_file())
    if size > max(SMALL, PACKED * there):
        raise ValueError(f"{path} has {there:,} bytes and would unpack to {size:,}: it is refused")


def open_zip(path: Path) -> zipfile.ZipFile:
    """A zip file that does not unpack to many times its size."""
    archive = zipfile.ZipFile(path)
    try:
        check_unpacked(path, sum(info.file_size for info in archive.infolist()))
    except BaseException:
        archive.close()
        raise
    return archive


def read_npz(path: Path, kinds: str = NUMBERS) -> dict[str, NDArray[Any]]:
    """The arrays of an ``.npz`` file, none of Python objects.

    Raises
    ------
    ValueError
        If it is none, or if an array has another dtype than of these kinds, or says another size than it has; it is named.
    """
    found: dict[str, NDArray[Any]] = {}
    with reading(path, "an .npz file of arrays"), open_zip(path) as archive:
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            if name == info.filename:
                raise ValueError(f"{path}: '{name}' is not an array")
            with archive.open(info) as stream:
                shape, dtype = _header(stream)
            if dtype.kind == "O":
                raise ValueError(f"{path}: array '{name}' holds Python objects, not numbers")
            if dtype.kind not in kinds:
                raise ValueError(f"{path}: array '{name}' has dtype {dtype}, which is not one of numbers")
            if math.prod(shape) * dtype.itemsize > info.file_size:
                raise ValueError(f"{path}: array '{name}' says shape {shape}, and has {info.file_size} bytes")
            with archive.open(info) as stream:
                found[name] = npy.read_array(stream, allow_pickle=False)
    return found


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = npy.read_magic(stream)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"version {version} of NumPy's format is not read")
    shape, _, dtype = read(stream)
    return shape, dtype


def loaded(dataset: xr.Dataset, path: Path) -> xr.Dataset:
    """A dataset that was opened from ``path``, in memory."""
    check_unpacked(path, sum(variable.nbytes for variable in dataset.variables.values()))
    return dataset.load()
