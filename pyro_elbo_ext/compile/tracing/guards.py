"""Whether what model and guide have read beside tensors is as it was when a graph was made; asked before each step."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from itertools import chain, repeat
from types import CellType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_elbo_ext.compile.tracing.arrays import Arrays
from pyro_elbo_ext.compile.tracing.holdings import CONTAINERS, MISSING, SIMPLE, are_same, contents, is_same, within
from pyro_elbo_ext.compile.tracing.reads import Read, Recorder, is_library, read_cell

_MANY = 256  # entries; of tensors in a longer list, of which a graph takes none, shapes are not looked at
_CONTENTS, _CODE = operator.attrgetter("cell_contents"), operator.attrgetter("__code__")
_NOTHING = repeat(MISSING)  # for as many as there are
_ROW = 3  # so many names of one dictionary are read at once


def all_of(keys: list[str]) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    """Reads all these keys of a dictionary at once; KeyError if one is missing."""
    if len(keys) > 1:
        return operator.itemgetter(*keys)
    return lambda of: tuple([of[key] for key in keys])


class Guards:
    """Whether what a :class:`Recorder` has seen is as it was.

    Parameters
    ----------
    recorder
        After the run that was traced.

    Attributes
    ----------
    changed : str or None
        What the last look found to be other than it was.
    changed_by_itself : list of str
        What the programs themselves change from run to run: compiled steps run no Python, so it stays as it is.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._reads, self._inside = recorder.reads()
        self._after_first = [_current(read) for read in self._reads]
        self._inside_after_first = [contents(inside.container) for inside in self._inside]
        self.changed: str | None = None
        self.changed_by_itself: list[str] = []
        self._dicts: list[Any] = []
        self._keys: list[str] = []
        self._values: list[Any] = []
        self._cells: list[CellType] = []
        self._held: list[Any] = []
        self._names: list[str] = []
        self._names_of_cells: list[str] = []
        self._others: list[Read] = []
        self._functions: list[Any] = []
        self._codes: list[Any] = []
        self._objects: list[Any] = []
        self._attributes: list[str] = []
        self._of_objects: list[Any] = []
        self._bystanders: dict[str, Tensor] = {}
        self._looks: list[Any] = []
        self._rows: list[tuple[dict[str, Any], Callable[[dict[str, Any]], tuple[Any, ...]], list[Any]]] = []

    def names(self) -> list[str]:
        """All that is compared."""
        others, inside = [read.name for read in self._others], [one.name for one in self._inside]
        return [*self._names, *self._names_of_cells, *others, *inside]

    def settle(self, known: Sequence[Tensor]) -> None:
        """Keep what did not change in the runs since; to be called after at least one more.

        Parameters
        ----------
        known
            Tensors that are looked at elsewhere; of others, whose shape alone may have been read, the looks are kept.
        """
        lasting, own = set(), {_place(read) for read in self._reads if not _is_of_library_object(read)}
        for read, after in zip(self._reads, self._after_first, strict=True):
            if read.owner is not None and read.owner() is None:
                continue
            if is_same(read.value, after) and is_same(after, _current(read)):
                lasting.add(_place(read))
                if isinstance(read.holder, CellType):
                    self._cells.append(read.holder)
                    self._held.append(_current(read))
                    self._names_of_cells.append(read.name)
                elif isinstance(read.holder, dict):
                    self._dicts.append(read.holder)
                    self._keys.append(read.key)
                    self._values.append(_current(read))
                    self._names.append(read.name)
                else:
                    self._others.append(read._replace(holder=_holder(read)))
            elif isinstance(after, SIMPLE) and not isinstance(read.value, Tensor) and not _is_of_library_object(read):
                self.changed_by_itself.append(read.name)
        inside = []
        for one, after in zip(self._inside, self._inside_after_first, strict=True):
            now = contents(one.container)
            if one.root not in lasting:
                continue
            if are_same(one.contents, after) and are_same(after, now):
                inside.append(one)
            elif one.root in own:
                self.changed_by_itself.append(one.name)
        self._inside = inside
        self._arrange()
        self._take_bystanders(known)
        self._reads, self._after_first, self._inside_after_first = [], [], []

    def hold(self, exchange: Callable[[Tensor, Tensor], bool]) -> bool:
        """Whether all is as it was.

        Parameters
        ----------
        exchange
            Takes a tensor and another one that has its name now; says whether the graph can read that in its place.
        """
        # almost without loops of Python: this is asked at each step
        try:
            for of, read, values in self._rows:
                if not all(map(operator.is_, read(of), values)):
                    return self._look(exchange)
        except KeyError:
            return self._look(exchange)
        if (
            (not self._values_of_single or self._are_single_same())
            and (not self._bystanders or list(map(_look_at, self._bystanders.values())) == self._looks)
            and (not self._cells or all(map(operator.is_, map(_CONTENTS, self._cells), self._held)))
            and (not self._inside or self._is_same_inside())
            and (not self._functions or all(map(operator.is_, map(_CODE, self._functions), self._codes)))
            and (
                not self._objects
                or all(map(operator.is_, map(getattr, self._objects, self._attributes, _NOTHING), self._of_objects))
            )
        ):
            return True
        return self._look(exchange)

    def _are_single_same(self) -> bool:
        return all(map(operator.is_, map(dict.get, *self._single, _NOTHING), self._values_of_single))

    def _is_same_inside(self) -> bool:
        return (
            list(map(len, self._sized)) == self._sizes
            and all(map(operator.is_, chain.from_iterable(self._sized), self._entries))
            and (
                not self._mappings
                or all(map(operator.is_, chain.from_iterable(map(dict.values, self._mappings)), self._of_keys))
            )
            and (not self._arrays or self._arrays.are_same())
            and (not self._slow or all(map(are_same, map(contents, self._slow), self._in_slow)))
        )

    def _arrange(self) -> None:
        """What :meth:`hold` compares: names by their dictionary where it has many, and what all containers hold."""
        places: dict[int, list[int]] = {}
        for place, of in enumerate(self._dicts):
            places.setdefault(id(of), []).append(place)
        self._rows, single = [], []
        for row in places.values():
            of, keys = self._dicts[row[0]], [self._keys[place] for place in row]
            if len(row) < _ROW or type(of) is not dict or any(key not in of for key in keys):
                single += row
            else:
                self._rows.append((of, all_of(keys), [self._values[place] for place in row]))
        self._single = [self._dicts[place] for place in single], [self._keys[place] for place in single]
        self._values_of_single = [self._values[place] for place in single]
        containers = [inside.container for inside in self._inside]
        self._arrays = Arrays([one for one in containers if isinstance(one, np.ndarray) and one.dtype != object])
        self._sized = [one for one in containers if isinstance(one, CONTAINERS)]
        self._slow = [one for one in containers if not isinstance(one, (*CONTAINERS, np.ndarray))]
        self._slow += [one for one in containers if isinstance(one, np.ndarray) and one.dtype == object]
        self._in_slow = [contents(one) for one in self._slow]
        self._sizes = list(map(len, self._sized))
        self._entries = list(chain.from_iterable(self._sized))
        self._mappings = [one for one in self._sized if isinstance(one, dict)]
        self._of_keys = list(chain.from_iterable(map(dict.values, self._mappings)))
        codes = [read for read in self._others if read.key == "__code__"]
        others = [read for read in self._others if read.key != "__code__"]
        self._functions, self._codes = [read.holder for read in codes], [_current(read) for read in codes]
        self._objects = [read.holder for read in others]
        self._attributes = [read.key for read in others]
        self._of_objects = [_current(read) for read in others]

    def _take_bystanders(self, known: Sequence[Tensor]) -> None:
        elsewhere = {id(tensor) for tensor in known}
        named = [*zip(self._names, self._values, strict=True), *zip(self._names_of_cells, self._held, strict=True)]
        named += [(read.name, _current(read)) for read in self._others]
        for inside in self._inside:
            if len(inside.contents) <= _MANY:
                named += [(f"{inside.name}[{place}]", one) for place, one in enumerate(within(inside.container))]
        self._bystanders = {name: one for name, one in named if isinstance(one, Tensor) and id(one) not in elsewhere}
        self._looks = list(map(_look_at, self._bystanders.values()))

    def _look(self, exchange: Callable[[Tensor, Tensor], bool]) -> bool:
        """The same, slower: values that are equal, tensors of new names, contents."""
        places: dict[int, list[tuple[list[Any], int, Any]]] = {}
        for values, names, current in (
            (self._values, self._names, map(dict.get, self._dicts, self._keys, repeat(MISSING))),
            (self._held, self._names_of_cells, map(read_cell, self._cells)),
        ):
            for place, (old, new) in enumerate(zip(list(values), current, strict=True)):
                if old is new:
                    if isinstance(old, Tensor):
                        places.setdefault(id(old), []).append((values, place, new))
                elif isinstance(old, Tensor) and isinstance(new, Tensor):
                    places.setdefault(id(old), []).append((values, place, new))
                elif is_same(old, new):
                    values[place] = new
                else:
                    self.changed = names[place]
                    return False
        for (name, tensor), look in zip(self._bystanders.items(), self._looks, strict=True):
            if _look_at(tensor) != look:
                self.changed = f"the shape of {name}"
                return False
        for read in self._others:
            if not is_same(read.value, _current(read)):
                self.changed = read.name
                return False
        for inside in self._inside:
            if not are_same(inside.contents, contents(inside.container)):
                self.changed = inside.name
                return False
        for found in places.values():
            values, place, new = found[0]
            old = values[place]
            if new is old and all(one is old for _, _, one in found):
                continue
            if any(one is not new for _, _, one in found) or not exchange(old, new):
                self.changed = self._names[place] if values is self._values else self._names_of_cells[place]
                return False
            for others, at, _ in found:
                others[at] = new
        self._arrange()
        self.changed = None
        return True


def _look_at(tensor: Tensor) -> tuple[object, ...]:
    """What Python may read of a tensor beside its values."""
    strides = tensor.stride() if tensor.layout is torch.strided else None
    return tensor.shape, strides, tensor.dtype, tensor.device, tensor.requires_grad


def _holder(read: Read) -> Any:
    return read.holder() if isinstance(read.holder, weakref.ref) else read.holder


def _place(read: Read) -> tuple[int, str]:
    return id(_holder(read)), read.key


def _current(read: Read) -> Any:
    holder = _holder(read)
    if isinstance(holder, CellType):
        return read_cell(holder)
    return holder.get(read.key, MISSING) if type(holder) is dict else getattr(holder, read.key, MISSING)


def _is_of_library_object(read: Read) -> bool:
    """Whether it is in an object of torch's or Pyro's, which keep books of their own."""
    owner = None if read.owner is None else read.owner()
    return owner is not None and not isinstance(owner, type | FunctionType) and is_library(type(owner))
