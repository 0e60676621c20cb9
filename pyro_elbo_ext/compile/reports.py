"""What is said of many compilations: which argument, or which thing that programs read, takes one after the other."""

from __future__ import annotations

import logging
from collections import Counter

from pyro_elbo_ext.compile.errors import CannotCompile
from pyro_elbo_ext.compile.programs import MOST_KEPT
from pyro_elbo_ext.compile.tracing.arguments import Args, Kwargs, described
from pyro_elbo_ext.objectives.evaluation import Program as PyroProgram

logger = logging.getLogger(__name__)

_MANY_PROGRAMS = 8
_MANY_CHANGES, _MOST_CHANGES = 3, 16  # graphs made because one thing has changed that programs read
_KEEP_IN_TENSOR = "Pass it as an argument, or keep it in a tensor that is written to in place (fill_, copy_)."


class Reports:
    """Counts what programs are made for, and says it in the log, each thing once."""

    def __init__(self) -> None:
        self._num_made = 0  # programs, those dropped included
        self._kinds: dict[str, set[object]] = {}  # of arguments, by their names, that programs were made for
        self._within: set[str] = set()  # handlers around steps
        self._counters: set[str] = set()  # what programs were found to change themselves
        self._changes: Counter[str] = Counter()  # by what is read from outside: how often it took another graph

    def made(self, args: Args, kwargs: Kwargs, model: PyroProgram) -> None:
        """Count a program; say which argument varies, if each of its kinds takes a compilation."""
        self._num_made += 1
        for name, kind in described(args, kwargs, model).items():
            self._kinds.setdefault(name, set()).add(kind)
        if self._num_made not in (_MANY_PROGRAMS + 1, MOST_KEPT + 1) or not self._kinds:
            return
        name = max(self._kinds, key=lambda of: len(self._kinds[of]))
        logger.warning(
            "CompiledSVI has compiled for %d kinds of arguments, %d of them of %s, and keeps the last %d. Each new shape or "
            "dtype of a tensor, and each value of another argument that decides something in Python, takes a compilation: "
            "pad or drop the last, smaller batch; pass numbers as tensors, or use them without if, float() or math.",
            self._num_made,
            len(self._kinds[name]),
            name,
            MOST_KEPT,
        )

    def changed(self, name: str | None) -> None:
        """Take note that a graph is made because something that programs read has changed; too often is an error.

        Raises
        ------
        CannotCompile
            If it has changed 16 times.
        """
        if name is None:
            return
        self._changes[name] += 1
        if self._changes[name] == _MANY_CHANGES:
            logger.warning(
                "%s changes from step to step, and each value takes a compilation. %s", name, _KEEP_IN_TENSOR
            )
        if self._changes[name] > _MOST_CHANGES:
            raise CannotCompile(
                f"{name} changes from step to step: a graph keeps the value that Python reads, and {_MOST_CHANGES} have "
                f"been compiled for other values. {_KEEP_IN_TENSOR} Or train with pyro.infer.SVI, or pass fallback=True."
            )

    def handler(self, around: object) -> None:
        """Say once that Pyro takes the steps within a handler, which a graph would not have."""
        name = type(around).__name__
        if name not in self._within:
            self._within.add(name)
            logger.warning(
                "a step within a handler (%s) around it is Pyro's, uncompiled: the handler may be another one each time. "
                "Put it around model and guide before CompiledSVI is made.",
                name,
            )

    def changed_by_itself(self, names: list[str]) -> None:
        """Say what programs change themselves."""
        new = [name for name in names if name not in self._counters]
        self._counters.update(new)
        if new:
            logger.warning(
                "model or guide change %s themselves in every run. Compiled steps run no Python: it stays as it is, and "
                "must not decide what they compute.",
                " and ".join(new),
            )
