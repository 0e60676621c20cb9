"""Checkpoint files: written so that a crash at any moment leaves the old one or the new one, whole."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_elbo_ext.files.atomic import write_whole
from pyro_elbo_ext.programs.faults import first_line
from pyro_elbo_ext.programs.interrupts import handlers_are_heard

FORMAT = 1


def write(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` to ``path`` atomically: to a file beside it, which then takes its place."""
    made = io.BytesIO()
    torch.save({"format": FORMAT, **content}, made)
    write_whole(path, made.getvalue())


def read(path: Path) -> dict[str, Any]:
    """What :func:`write` wrote, on the CPU. It is a pickle: read your own files only.

    Raises
    ------
    FileNotFoundError
        If there is nothing at ``path``.
    ValueError
        If it is not a checkpoint, or one of another version; the file is named.
    """
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    with handlers_are_heard():
        try:
            content = torch.load(path, map_location="cpu", weights_only=False)
        except MemoryError:
            raise
        except Exception as error:  # a pickle of anything may raise anything
            raise ValueError(
                f"{path} cannot be read as a file of fit: {type(error).__name__}, {first_line(error)}"
            ) from error
    if not isinstance(content, dict) or "format" not in content:
        raise ValueError(f"{path} is not a file of fit")
    if content["format"] != FORMAT:
        raise ValueError(f"{path} is not a file of this version of fit")
    return content


def check_parts(content: dict[str, Any], parts: Iterable[str], path: Path) -> None:
    """Raise a ValueError, naming the file, if something is missing that files of its kind have."""
    missing = [name for name in parts if name not in content]
    if missing:
        raise ValueError(f"{path} is not a whole file of fit: {', '.join(missing)} missing")


def check_same_parameters(live: Mapping[str, Tensor], saved: Mapping[str, Tensor], path: str) -> None:
    """Raise a ValueError if a file's parameters are not those of the programs, by name and shape."""
    missing, unknown = sorted(live.keys() - saved.keys()), sorted(saved.keys() - live.keys())
    if missing or unknown:
        raise ValueError(
            f"{path} is of another model or guide: it lacks the parameters {missing} and has {unknown} that they have not"
        )
    for name, tensor in live.items():
        if saved[name].shape != tensor.shape:
            raise ValueError(
                f"{path}: parameter '{name}' has shape {tuple(saved[name].shape)} there, {tuple(tensor.shape)} here"
            )
