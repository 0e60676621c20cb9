"""What model and guide read beside tensors while they are traced, and whether it is still the same.

A graph keeps the numbers, strings, flags and functions that Python code reads on the way, and knows tensors by identity. So
every name is written down as it is read: attributes of objects, of modules and of classes, globals, and variables of
closures; and of lists, dictionaries and NumPy arrays what is in them. Before each step the names are looked up again.

Not seen are the environment, files, clocks, and what compiled extensions or other libraries' objects hold.
"""

from __future__ import annotations

import dis
import functools
import gc
import logging
import operator
import sys
import sysconfig
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from itertools import chain
from pathlib import Path
from types import CellType, CodeType, FrameType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_elbo_ext.compile.tracing.places import PACKAGE

_FOLDERS = (*[str(Path(str(of.__file__)).parent) for of in (torch, pyro, np)], str(PACKAGE))
_STANDARD = sysconfig.get_paths()["stdlib"]
_LIBRARIES = sys.stdlib_module_names | {"builtins", "torch", "pyro", "numpy", "scipy", "pandas", PACKAGE.name}
_OF_MODULES = frozenset(vars(nn.Module())) - {"training"}  # how torch keeps a module
_OF_GUIDES = ("prototype_trace", "master", "plates", "locs", "scales", "create_plates")  # what Pyro's make once
_MEMBERS = ("_parameters", "_buffers", "_modules")
_GLOBAL = {"LOAD_GLOBAL", "LOAD_NAME"}
_CONTAINERS = (list, tuple, dict, set, frozenset, deque)
_MOST_WATCHED, _DEEPEST = 10_000, 8
_CONTENTS = operator.attrgetter("cell_contents")
_SIMPLE = (int, float, complex, str, bytes, bool, type(None), Enum, np.generic, torch.dtype, torch.device, torch.Size)


class _Read(NamedTuple):
    """A name, as it was when it was first read."""

    holder: Any  # a dictionary, a cell, or an object with the attribute
    key: str
    value: Any
    name: str
    owner: Any  # whose it is, to tell what lives on after the run


class _Inside(NamedTuple):
    """What a container or an array held, and by which of the reads one comes to it."""

    container: Any
    contents: Any
    name: str
    root: tuple[int, str]


class Recorder:
    """Writes down what is read in the block of :meth:`recording`."""

    def __init__(self) -> None:
        self._reads: dict[tuple[int, str], _Read] = {}
        self._inside: dict[int, _Inside] = {}
        self._patched: dict[type, Any] = {}
        self._variables: dict[CodeType, dict[str, Any]] = {}
        self._thread = 0
        self._watched = 0

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Look at every function that is called and at every attribute that is read, in this thread."""
        self._thread = threading.get_ident()
        self._patch(nn.Module)
        self._patch(Messenger)
        # a profiler that is written in C could not be set again
        by_trace = sys.getprofile() is not None and sys.gettrace() is None
        set_hook: Any = sys.settrace if by_trace else sys.setprofile
        before: Any = None if by_trace else sys.getprofile()
        set_hook(self._called)
        try:
            yield
        finally:
            set_hook(before if callable(before) else None)
            for cls, had in self._patched.items():
                if had is None:
                    del cls.__getattribute__
                else:
                    cls.__getattribute__ = had  # type: ignore[method-assign]
            self._patched.clear()
            self._find_closures()

    def program(self, program: Any) -> None:
        """Write down what a partial function is given."""
        while isinstance(program, functools.partial):
            self._note(program.keywords, "__dict__", None, f"an argument of {program!r}", None)
            self._look_inside(program.keywords, f"an argument of {program!r}", (id(program.keywords), "__dict__"), 0)
            program = program.func

    def attributes(self, of: Any, without: frozenset[str]) -> None:
        """Write down the public attributes of an object as if they were read."""
        for key, value in vars(of).items():
            if not key.startswith("_") and key not in without:
                self._note(vars(of), key, value, f"{type(of).__name__}.{key}", of)

    def reads(self) -> tuple[list[_Read], list[_Inside]]:
        """All that was read; owners, whose life tells what belongs to this run alone, are no longer kept alive."""
        reads = [read._replace(owner=_weak(read.owner)) for read in self._reads.values()]
        self._reads.clear()
        return reads, list(self._inside.values())

    # Functions: their globals, and what they are given

    def _called(self, frame: FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        if event != "call" or _is_of_library(code.co_filename):
            return
        if _is_aside(frame):
            return
        variables = frame.f_locals
        for name, value in variables.items():
            if name not in code.co_cellvars or name in code.co_varnames:
                self._watch(value)
        if code in self._variables:
            return
        self._variables[code] = {name: variables.get(name) for name in code.co_freevars}
        given = frame.f_globals
        for name in {str(of.argval) for of in dis.get_instructions(code) if of.opname in _GLOBAL}:
            if name in given:
                self._note(given, name, given[name], f"the global {name!r}", None)
                self._static(given[name], code)
        for value in self._variables[code].values():
            self._static(value, code)

    def _static(self, value: Any, code: CodeType) -> None:
        """Attributes of a module of the user's, or of a class, that the code names: reading those cannot be watched."""
        if isinstance(value, ModuleType):
            if value.__name__.partition(".")[0] not in _LIBRARIES:
                for name in code.co_names:
                    if name in vars(value):
                        self._note(vars(value), name, vars(value)[name], f"{value.__name__}.{name}", None)
        elif isinstance(value, type) and not _is_library(value):
            for name in code.co_names:
                self._of_class(value, name, value.__name__)

    def _find_closures(self) -> None:
        codes = list(self._variables)
        for function in gc.get_referrers(*codes) if codes else ():
            if not isinstance(function, FunctionType) or function.__code__ not in self._variables:
                continue
            if function.__defaults__ or function.__kwdefaults__:
                for key in ("__defaults__", "__kwdefaults__"):
                    value = getattr(function, key)
                    self._note(function, key, value, f"a default argument of {function.__name__}", function)
            seen, cells = self._variables[function.__code__], function.__closure__ or ()
            found = dict(zip(function.__code__.co_freevars, cells, strict=True))
            if all(_read_cell(cell) is seen.get(name) for name, cell in found.items()):
                for name, cell in found.items():
                    self._note(cell, name, seen[name], f"{name!r}, a variable around {function.__name__}", function)

    # Attributes

    def _patch(self, cls: type) -> None:
        if cls in self._patched:
            return
        original: Any = cls.__getattribute__
        recorder = self

        def __getattribute__(of: Any, name: str) -> Any:
            try:
                value = original(of, name)
            except AttributeError:
                recorder._missing(of, name)
                raise
            recorder._attribute(of, name, value)
            return value

        had = vars(cls).get("__getattribute__")
        try:
            cls.__getattribute__ = __getattribute__  # type: ignore[method-assign, assignment]
        except TypeError:  # of an extension
            return
        self._patched[cls] = had

    def _attribute(self, of: Any, key: str, value: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        own = _dictionary(of)
        cls = type(of)
        if key == "__dict__":
            if not isinstance(of, nn.Module | Messenger) and own is not None:
                self._note(own, "__dict__", None, f"the attributes of {cls.__name__}", of)
                self._look_inside(own, f"the attributes of {cls.__name__}", (id(own), "__dict__"), 0)
            return
        if key.startswith("__") or _is_kept_by_library(cls, of, key):
            return
        name = f"{cls.__name__}.{key}"
        if own is not None and key in own:
            if own[key] is value:
                self._note(own, key, value, name, of)
            return
        if _is_library(cls):
            return
        if any(isinstance(vars(base).get(key), MemberDescriptorType) for base in cls.__mro__):
            self._note(of, key, value, name, of)
            return
        if self._of_class(cls, key, name) and own is not None:
            self._note(own, key, None, name, of)  # an attribute of the object would come first

    def _missing(self, of: Any, key: str) -> None:
        """A member of a module, which Python finds only after it has looked for an attribute."""
        own = _dictionary(of)
        if threading.get_ident() != self._thread or own is None or not isinstance(of, nn.Module):
            return
        if key.endswith("_unconstrained") or _is_kept_by_library(type(of), of, key):  # those are in the param store
            return
        for members in _MEMBERS:
            if key in own.get(members, ()):
                self._note(own[members], key, own[members][key], f"{type(of).__name__}.{key}", of)

    def _of_class(self, cls: type, key: str, name: str) -> bool:
        for base in cls.__mro__:
            if key not in vars(base):
                continue
            value = vars(base)[key]
            if _is_library(base):
                return False
            if hasattr(value, "__set__"):  # what a property reads is seen itself
                return False
            found = [inner for inner in gc.get_referents(vars(base)) if isinstance(inner, dict)]
            if found:
                self._note(found[0], key, value, name, base)
            return True
        return False

    # What is written down

    def _note(self, holder: Any, key: str, value: Any, name: str, owner: Any) -> None:
        if isinstance(value, ModuleType) or (id(holder), key) in self._reads:
            return
        self._reads[id(holder), key] = _Read(holder, key, value, name, owner)
        self._look_inside(value, name, (id(holder), key), 0)
        self._watch(value)

    def _look_inside(self, value: Any, name: str, root: tuple[int, str], depth: int) -> None:
        if id(value) in self._inside or depth > _DEEPEST:
            return
        if isinstance(value, np.ndarray):
            self._inside[id(value)] = _Inside(value, _contents(value), name, root)
        elif isinstance(value, _CONTAINERS) and type(value).__module__ != "pyro.poutine.trace_struct":
            if not _is_fixed(value):
                self._inside[id(value)] = _Inside(value, _contents(value), name, root)
            for one in list(value.values() if isinstance(value, dict) else value):
                if isinstance(one, (*_CONTAINERS, np.ndarray)):
                    self._look_inside(one, name, root, depth + 1)

    def _watch(self, value: Any, depth: int = 0) -> None:
        """Have reads of the attributes of an object written down, or of those in a container."""
        if isinstance(value, _CONTAINERS):
            if depth < _DEEPEST:
                for one in list(value.values() if isinstance(value, dict) else value):
                    if self._watched < _MOST_WATCHED and not isinstance(one, (*_SIMPLE, Tensor)):
                        self._watched += 1
                        self._watch(one, depth + 1)
            return
        if isinstance(value, MethodType):
            value = value.__self__
        for cls in type(value).__mro__:
            if cls in self._patched:
                return
        if not _is_library(type(value)) and not isinstance(value, (type, FunctionType, Tensor, *_SIMPLE)):
            self._patch(type(value))


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
        self._inside_after_first = [_contents(inside.container) for inside in self._inside]
        self.changed: str | None = None
        self.changed_by_itself: list[str] = []
        self._dicts: list[Any] = []
        self._keys: list[str] = []
        self._values: list[Any] = []
        self._cells: list[CellType] = []
        self._held: list[Any] = []
        self._names: list[str] = []
        self._names_of_cells: list[str] = []
        self._others: list[_Read] = []

    def names(self) -> list[str]:
        """All that is compared."""
        others, inside = [read.name for read in self._others], [one.name for one in self._inside]
        return [*self._names, *self._names_of_cells, *others, *inside]

    def settle(self) -> None:
        """Keep what did not change in the runs since; to be called after at least one more."""
        lasting, own = set(), {(id(read.holder), read.key) for read in self._reads if not _is_of_library_object(read)}
        for read, after in zip(self._reads, self._after_first, strict=True):
            if read.owner is not None and read.owner() is None:
                continue
            if _is_same(read.value, after) and _is_same(after, _current(read)):
                lasting.add((id(read.holder), read.key))
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
                    self._others.append(read)
            elif isinstance(after, _SIMPLE) and not isinstance(read.value, Tensor) and not _is_of_library_object(read):
                self.changed_by_itself.append(read.name)
        inside = []
        for one, after in zip(self._inside, self._inside_after_first, strict=True):
            now = _contents(one.container)
            if one.root not in lasting:
                continue
            if _are_same(one.contents, after) and _are_same(after, now):
                inside.append(one)
            elif one.root in own:
                self.changed_by_itself.append(one.name)
        self._inside = inside
        self._take_contents()
        self._reads, self._after_first, self._inside_after_first = [], [], []

    def hold(self, exchange: Callable[[Tensor, Tensor], bool]) -> bool:
        """Whether all is as it was.

        Parameters
        ----------
        exchange
            Takes a tensor and another one that has its name now; says whether the graph can read that in its place.
        """
        # without loops of Python: this is asked at each step
        if (
            all(map(operator.is_, map(dict.get, self._dicts, self._keys), self._values))
            and (not self._cells or all(map(operator.is_, map(_CONTENTS, self._cells), self._held)))
            and (not self._inside or self._is_same_inside())
            and (not self._others or all(_current(read) is read.value for read in self._others))
        ):
            return True
        return self._look(exchange)

    def _is_same_inside(self) -> bool:
        return (
            list(map(len, self._sized)) == self._sizes
            and all(map(operator.is_, chain.from_iterable(self._sized), self._entries))
            and (
                not self._mappings
                or all(map(operator.is_, chain.from_iterable(map(dict.values, self._mappings)), self._of_keys))
            )
            and (not self._arrays or list(map(np.ndarray.tobytes, self._arrays)) == self._bytes)
        )

    def _take_contents(self) -> None:
        """Of all containers in a row, what :meth:`_is_same_inside` compares."""
        containers = [inside.container for inside in self._inside]
        self._arrays = [one for one in containers if isinstance(one, np.ndarray) and one.dtype != object]
        self._bytes = [array.tobytes() for array in self._arrays]
        self._sized = [one for one in containers if not isinstance(one, np.ndarray)]
        self._sizes = list(map(len, self._sized))
        self._entries = list(chain.from_iterable(self._sized))
        self._mappings = [one for one in self._sized if isinstance(one, dict)]
        self._of_keys = list(chain.from_iterable(map(dict.values, self._mappings)))

    def _look(self, exchange: Callable[[Tensor, Tensor], bool]) -> bool:
        """The same, slower: values that are equal, tensors of new names, contents."""
        places: dict[int, list[tuple[list[Any], int, Any]]] = {}
        for values, names, current in (
            (self._values, self._names, map(dict.get, self._dicts, self._keys)),
            (self._held, self._names_of_cells, map(_read_cell, self._cells)),
        ):
            for place, (old, new) in enumerate(zip(list(values), current, strict=True)):
                if old is new:
                    if isinstance(old, Tensor):
                        places.setdefault(id(old), []).append((values, place, new))
                elif isinstance(old, Tensor) and isinstance(new, Tensor):
                    places.setdefault(id(old), []).append((values, place, new))
                elif _is_same(old, new):
                    values[place] = new
                else:
                    self.changed = names[place]
                    return False
        for read in self._others:
            if not _is_same(read.value, _current(read)):
                self.changed = read.name
                return False
        for inside in self._inside:
            if not _are_same(inside.contents, _contents(inside.container)):
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
        self._take_contents()
        self.changed = None
        return True


def _is_fixed(value: Any) -> bool:
    """Whether a container can never hold anything else, nor what is in it."""
    if isinstance(value, tuple | frozenset):
        return all(map(_is_fixed, value))
    return not isinstance(value, (*_CONTAINERS, np.ndarray))


def _dictionary(of: Any) -> dict[str, Any] | None:
    try:
        found = object.__getattribute__(of, "__dict__")
    except AttributeError:
        return None
    return found if isinstance(found, dict) else None


def _current(read: _Read) -> Any:
    if isinstance(read.holder, CellType):
        return _read_cell(read.holder)
    return read.holder.get(read.key) if isinstance(read.holder, dict) else getattr(read.holder, read.key, None)


def _is_of_library_object(read: _Read) -> bool:
    """Whether it is in an object of torch's or Pyro's, which keep books of their own."""
    owner = None if read.owner is None else read.owner()
    return owner is not None and not isinstance(owner, type | FunctionType) and _is_library(type(owner))


def _weak(owner: Any) -> Any:
    try:
        return weakref.ref(owner)
    except TypeError:  # a dictionary or a cell
        return None


def _read_cell(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not bound any more
        return None


def _contents(value: Any) -> list[Any]:
    if isinstance(value, np.ndarray):
        if value.dtype == object:
            return [value.shape, *value.ravel().tolist()]
        return [value.shape, value.dtype, value.tobytes()]
    return [*value, *value.values()] if isinstance(value, dict) else list(value)


def _are_same(some: list[Any], others: list[Any]) -> bool:
    return len(some) == len(others) and all(map(_is_same, some, others))


def _is_same(one: Any, other: Any) -> bool:
    """Whether a graph that was made with the one can be used with the other."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple):
        return _are_same(list(one), list(other))
    if isinstance(one, MethodType):
        return one.__self__ is other.__self__ and one.__func__ is other.__func__
    if isinstance(one, float | complex | np.generic):
        return repr(one) == repr(other)  # also of NaN and -0.0
    return isinstance(one, _SIMPLE) and bool(one == other)


def _is_of_library(file: str) -> bool:
    return file.startswith((*_FOLDERS, "<frozen", "<string>")) or (
        file.startswith(_STANDARD) and "site-packages" not in file
    )


def _is_aside(frame: FrameType) -> bool:
    """Whether a function runs for a handler of logging or for an import, which are no part of the programs."""
    caller = frame.f_back
    while caller is not None:
        if caller.f_code.co_filename.startswith((logging.__file__, "<frozen importlib")):
            return True
        caller = caller.f_back
    return False


def _is_library(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in _LIBRARIES


def _is_kept_by_library(cls: type, of: Any, key: str) -> bool:
    """Whether torch or Pyro keep their own books by that name."""
    if key in _MEMBERS:
        return cls is nn.Module or cls.__module__.startswith(("pyro.infer.autoguide", "pyro.nn"))
    if key in _OF_GUIDES and _is_library(cls):
        return True
    if isinstance(of, nn.Module) and (key in _OF_MODULES or key.startswith("_pyro_")):
        return True
    return _is_library(cls) and key.startswith("_")
