"""Files that are written whole or not at all: beside their place first, which they then take."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_OLD = 3600.0  # seconds without a write after which a file is taken for left behind, where locks do not tell


@contextmanager
def named(path: Path) -> Iterator[None]:
    """A block whose errors name the file, as those of opening one do and those of writing, to a full disk say, do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_whole(path: Path, content: bytes) -> None:
    """Write a file by :func:`replaced`.

    What libraries would write piece by piece is best made in memory: on a full disk torch and HDF5 lose the error, and HDF5
    ends the process.
    """
    with replaced(path) as new:
        new.write_bytes(content)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Another path in the same folder, ``.NAME.XXXXXXXX`` and the suffix, whose file takes the place of ``path`` in the end.

    After an error the old file stays. What runs that were killed have left beside it is removed: files of that name that no
    process has locked. The folder is made if it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(path)
    descriptor, name = _locked(path)
    try:
        with named(path):
            yield name
        with name.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        name.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def remove_stale(path: Path) -> None:
    """Remove what killed runs have left of :func:`replaced` for ``path``; what a live process writes stays."""
    start = len(path.name) + 2
    for found in path.parent.glob(f".{_literal(path.name)}.*"):
        made = found.name[start:].removesuffix(path.suffix)
        if len(made) == 8 and found.is_file() and _is_stale(found):
            found.unlink(missing_ok=True)


def _name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{path.suffix}")


def _locked(path: Path) -> tuple[int, Path]:
    """A new file that this process has locked, which tells others that it is being written."""
    while True:
        name = _name(path)
        descriptor = os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        if fcntl is None:
            return descriptor, name
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another process has just found it unlocked, and will remove it
            os.close(descriptor)
            continue
        except OSError:  # a file system without locks
            return descriptor, name
        if name.exists():
            return descriptor, name
        os.close(descriptor)


def _is_stale(found: Path) -> bool:
    try:
        with found.open("rb") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go as the file is closed
                return True
            return time.time() - os.fstat(file.fileno()).st_mtime > _OLD
    except BlockingIOError:  # its writer is alive
        return False
    except OSError:  # gone meanwhile, not ours, or on a file system without locks
        try:
            return time.time() - found.stat().st_mtime > _OLD
        except OSError:
            return False


def _literal(name: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)
