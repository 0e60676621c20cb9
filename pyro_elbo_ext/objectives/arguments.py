"""The arguments of ``pyro.infer.ELBO``, which every objective takes: their signature is Pyro's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypedDict, TypeVar, cast

from pyro.infer import ELBO

from pyro_elbo_ext.programs.arguments import check_count, check_number

Init = TypeVar("Init", bound=Callable[..., None])

_PYROS = inspect.signature(ELBO.__init__)


class OtherArguments(TypedDict, total=False):
    """All but the first, by name, for type checkers; what they mean :class:`pyro_elbo_ext.DecomposedELBO` says."""

    max_plate_nesting: float
    max_iarange_nesting: int | None
    vectorize_particles: bool | Literal["vmap"]
    strict_enumeration_warning: bool
    ignore_jit_warnings: bool
    jit_options: dict[str, Any] | None
    retain_graph: bool | None
    tail_adaptive_beta: float


class PyrosArguments(OtherArguments, total=False):
    """All of them."""

    num_particles: int


def checked_arguments(loss: ELBO, args: tuple[Any, ...], options: Mapping[str, Any]) -> dict[str, Any]:
    """All of Pyro's arguments by name, those not given by Pyro's default.

    Raises
    ------
    TypeError
        For one that Pyro's ELBO does not take.
    ValueError
        For one out of range.
    """
    given = _PYROS.bind(loss, *args, **options)
    given.apply_defaults()
    named = dict(given.arguments)
    del named["self"]
    count, nesting, vectorize = named["num_particles"], named["max_plate_nesting"], named["vectorize_particles"]
    check_count("num_particles", count)
    check_number("max_plate_nesting", nesting)
    if not nesting >= 0:
        raise ValueError(f"max_plate_nesting must be at least 0, not {nesting!r}")
    if not isinstance(vectorize, bool) and vectorize != "vmap":
        raise ValueError(f"vectorize_particles must be True, False or 'vmap', not {vectorize!r}")
    return named


def with_pyros_arguments(init: Init) -> Init:
    """Let a constructor that passes on ``*args`` and ``**options`` say what these are: Pyro's arguments, in Pyro's order."""
    own = list(inspect.signature(init).parameters.values())
    first = [p for p in own if p.kind is p.POSITIONAL_OR_KEYWORD]
    named = {p.name for p in first}
    pyros = [p for p in _PYROS.parameters.values() if p.name not in named]
    keywords = [p for p in own if p.kind is p.KEYWORD_ONLY]
    cast(Any, init).__signature__ = inspect.Signature([*first, *pyros, *keywords])
    return init
