"""Settings and summaries as the plain values that trackers can store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Plain = bool | int | float | str | None


def plain(value: Any) -> Any:
    """Mappings, lists, numbers, text and None as they are, arrays of one element as numbers, all else as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    if getattr(value, "size", None) == 1 or (hasattr(value, "numel") and value.numel() == 1):
        return value.item()
    return str(value)


def flat(values: Mapping[str, Any]) -> dict[str, Plain]:
    """One level of names, those of inner mappings joined by "/"; lists as text."""
    found: dict[str, Plain] = {}
    for name, value in plain(values).items():
        if isinstance(value, dict):
            found.update({f"{name}/{inner}": item for inner, item in flat(value).items()})
        else:
            found[name] = str(value) if isinstance(value, list) else value
    return found


def missing(what: str, extra: str, error: ImportError) -> ImportError:
    """The error for a library that is not installed."""
    return ImportError(f'{what} needs {extra}: pip install "pyro_elbo_ext[{extra}]" ({error})')
