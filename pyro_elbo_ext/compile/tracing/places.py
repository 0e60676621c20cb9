"""Where in the user's program an error arose: file and line, cell of a notebook, or function of an installed package."""

from __future__ import annotations

import os
import re
import sys
import sysconfig
import traceback
from pathlib import Path
from types import TracebackType

import pyro
import torch

Frame = traceback.FrameSummary


def _folder(path: str | Path) -> str:
    return f"{path}{os.sep}"


_TORCH = _folder(Path(torch.__file__).parent)
_PYRO = _folder(Path(pyro.__file__).parent)
PACKAGE = Path(str(sys.modules[__name__.partition(".")[0]].__file__)).parent  # wherever in it this file lies
_PACKAGE = _folder(PACKAGE)
_MACHINERY = (
    _folder(f"{_PYRO}poutine"),
    f"{_PYRO}primitives.py",
    _folder(f"{_PYRO}nn"),
)  # what any program runs through
_INSTALLED = tuple({_folder(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")})
_PYTHON = tuple({_folder(sysconfig.get_path(kind)) for kind in ("stdlib", "platstdlib")})
_GENERATED = ("<frozen", "<eval_with_key", "<attrs generated", "<__array_function__")


def line_of(trace: TracebackType | None) -> str:
    """The innermost place outside of torch, Pyro and this package, as ", at file:line: code"; "" if there is none.

    The user's own code goes before that of installed packages. If own code calls a package's or Pyro's, such as a
    reparameterization, which function of it follows. If there is nothing else, Pyro's function is named alone.
    """
    frames = traceback.extract_tb(trace)
    shown = [
        frame for frame in frames if not frame.filename.startswith((_TORCH, _PACKAGE)) and not _is_generated(frame)
    ]
    own = next((frame for frame in reversed(shown) if _is_own(frame)), None)
    inner = shown if own is None else shown[shown.index(own) + 1 :]
    called = next((frame for frame in reversed(inner) if _is_of_package(frame)), None)
    text = "" if own is None else f", at {_place(own)}"
    if called is None:
        return text
    if own is None and not called.filename.startswith(_PYRO):
        return f", at {_place(called)}, in {_function(called)}"
    return f"{text}, in {_function(called)} ({Path(called.filename).name}:{called.lineno})"


def _is_generated(frame: Frame) -> bool:
    """Whether it is code that no one wrote; an interactive session's is in ``linecache``."""
    return frame.filename.startswith(_GENERATED) or (frame.filename.startswith("<") and not frame.line)


def _is_own(frame: Frame) -> bool:
    if frame.filename.startswith(_INSTALLED):
        return False
    return not frame.filename.startswith((_PYRO, *_PYTHON))


def _is_of_package(frame: Frame) -> bool:
    if frame.filename.startswith(_PYRO):
        return not frame.filename.startswith(_MACHINERY)
    return frame.filename.startswith(_INSTALLED)


def _place(frame: Frame) -> str:
    cell = _cell(frame.filename)
    where = f"{Path(frame.filename).name}:{frame.lineno}" if cell is None else f"{cell}, line {frame.lineno}"
    return f"{where}: `{frame.line}`" if frame.line else where


def _cell(filename: str) -> str | None:
    """What a notebook or an interactive session calls the code of a file; None if it is not theirs."""
    if found := re.match(r"<ipython-input-(\d+)-", filename):
        return f"cell [{found[1]}]"
    if not re.search(r"[/\\]ipykernel_\d+[/\\]", filename):
        return None
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    counts = getattr(getattr(shell, "compile", None), "_filename_map", {})
    return f"cell [{counts[filename]}]" if filename in counts else "a cell of the notebook"


def _function(frame: Frame) -> str:
    if frame.filename.startswith(_PYRO):
        return f"Pyro's {frame.name}"
    folder = next(folder for folder in _INSTALLED if frame.filename.startswith(folder))
    return f"{Path(frame.filename[len(folder) :]).parts[0].removesuffix('.py')}'s {frame.name}"
