"""The programs made so far, as many as are kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator

from pyro_elbo_ext.compile.errors import CannotCompile
from pyro_elbo_ext.compile.program import Program
from pyro_elbo_ext.compile.tracing.arguments import Key

MOST_KEPT = 32


class Programs:
    """Programs, or the reasons why there is none, by the kind of call; those not used for longest are dropped.

    There may be several for one kind, which differ in what model and guide read beside their arguments.
    """

    def __init__(self) -> None:
        self._of: OrderedDict[Key, list[Program | CannotCompile]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))

    def values(self) -> Iterator[Program | CannotCompile]:
        """All, the one used last at the end."""
        for made in self._of.values():
            yield from made

    def find(self, key: Key, fits: Callable[[Program], bool]) -> Program | CannotCompile | None:
        """What is known of such a call; None if that is nothing."""
        made = self._of.get(key)
        if made is None:
            return None
        self._of.move_to_end(key)
        for place in range(len(made) - 1, -1, -1):
            one = made[place]
            if isinstance(one, CannotCompile) or fits(one):
                if place != len(made) - 1:
                    made.append(made.pop(place))
                return one
        return None

    def changed(self, key: Key) -> str | None:
        """What kept the program used last for such calls from being used again, if it is a name that programs read."""
        made = self._of.get(key)
        return made[-1].guards.changed if made and isinstance(made[-1], Program) else None

    def add(self, key: Key, made: Program | CannotCompile) -> None:
        """Enter one, and drop one where there are too many."""
        self._of.setdefault(key, []).append(made)
        self._of.move_to_end(key)
        if len(self) > MOST_KEPT:
            oldest = next(iter(self._of))
            self._of[oldest].pop(0)
            if not self._of[oldest]:
                del self._of[oldest]

    def replace(self, program: Program, reason: CannotCompile) -> None:
        """Keep the reason in place of a program that cannot be used."""
        for made in self._of.values():
            made[:] = [reason if one is program else one for one in made]

    def keep(self, fits: Callable[[Program], bool]) -> None:
        """Drop the programs that do not fit."""
        for key, made in list(self._of.items()):
            self._of[key] = [one for one in made if isinstance(one, CannotCompile) or fits(one)]
            if not self._of[key]:
                del self._of[key]

    def clear(self) -> None:
        """Drop all."""
        self._of.clear()
