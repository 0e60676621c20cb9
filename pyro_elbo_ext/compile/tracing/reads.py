"""What model and guide read beside tensors while they are traced, and whether it is still the same.

A graph keeps the numbers, strings, flags and functions that Python code reads on the way, and knows tensors by identity. So
every name is written down as it is read: attributes of objects, of modules and of classes, globals, and variables of
closures; and of lists, dictionaries and NumPy arrays what is in them. Before each step the names are looked up again.

Attributes of modules, classes, functions and tensors cannot be watched: of those that the programs come by, each is written
down whose name stands in the code that has run.

Not seen are the environment, files, clocks, and what compiled extensions or other libraries' objects hold.
"""

from __future__ import annotations

import builtins
import dis
import functools
import gc
import inspect
import logging
import operator
import os
import sys
import sysconfig
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, repeat
from pathlib import Path
from types import CellType, CodeType, FrameType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_elbo_ext.compile.tracing.holdings import (
    CONTAINERS,
    MISSING,
    SIMPLE,
    are_same,
    contents,
    has_public_attributes,
    is_fixed,
    is_same,
    opened,
    within,
)
from pyro_elbo_ext.compile.tracing.places import PACKAGE

_FOLDERS = tuple(
    f"{folder}{os.sep}" for folder in (*[Path(str(of.__file__)).parent for of in (torch, pyro, np)], PACKAGE)
)
_STANDARD = sysconfig.get_paths()["stdlib"]
_LIBRARIES = sys.stdlib_module_names | {"builtins", "torch", "pyro", "numpy", "scipy", "pandas", PACKAGE.name}
_OF_MODULES = frozenset(vars(nn.Module())) - {"training"}  # how torch keeps a module
_OF_GUIDES = ("prototype_trace", "master", "plates", "locs", "scales", "create_plates")  # what Pyro's make once
_MEMBERS = ("_parameters", "_buffers", "_modules")
_GLOBAL = {"LOAD_GLOBAL", "LOAD_NAME"}
_MOST_WATCHED, _DEEPEST = 10_000, 64
_MANY = 256  # entries; of tensors in a longer list, of which a graph takes none, shapes are not looked at
_CONTENTS, _CODE = operator.attrgetter("cell_contents"), operator.attrgetter("__code__")
_NOTHING = repeat(MISSING)  # for as many as there are


class _Read(NamedTuple):
    """A name, as it was when it was first read."""

    holder: Any  # a dictionary, a cell, or an object with the attribute, or a weak reference to it
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
        self._holders: dict[int, Any] = {}  # whose attributes are written down by the names in the code
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
            self._find_named()

    def program(self, program: Any) -> None:
        """Write down what a partial function is given."""
        while isinstance(program, functools.partial):
            name = f"an argument of {program!r}"
            self._note(program.keywords, "__dict__", MISSING, name, None)
            self._look_inside(program, name, (id(program.keywords), "__dict__"), 0)
            program = program.func

    def attributes(self, of: Any, without: frozenset[str]) -> None:
        """Write down the public attributes of an object as if they were read."""
        for key, value in vars(of).items():
            if not key.startswith("_") and key not in without:
                self._note(vars(of), key, value, f"{type(of).__name__}.{key}", of)

    def reads(self) -> tuple[list[_Read], list[_Inside]]:
        """All that was read; owners, whose life tells what belongs to this run alone, are no longer kept alive."""
        reads = []
        for read in self._reads.values():
            owner = _weak(read.owner)
            of_owner = owner is not None and read.holder is read.owner
            reads.append(read._replace(owner=owner, holder=owner if of_owner else read.holder))
        self._reads.clear()
        self._holders.clear()
        return reads, list(self._inside.values())

    # Functions: their globals, and what they are given

    def _called(self, frame: FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        if event != "call" or _is_of_library(code.co_filename, frame.f_globals):
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
        for instruction in dis.get_instructions(code):
            name = str(instruction.argval)
            if instruction.opname in _GLOBAL:
                if name in given or not hasattr(builtins, name):
                    self._note(given, name, given.get(name, MISSING), f"the global {name!r}", None)
                elif name == "globals":
                    self._holders[id(given)] = given
            elif instruction.opname == "IMPORT_NAME":
                for module in _imported(name, given):
                    self._hold(module)
        for value in self._variables[code].values():
            self._hold(value)

    def _hold(self, value: Any) -> None:
        """Attributes of a module of the user's, a class, a function or a tensor: reading those cannot be watched."""
        if isinstance(value, ModuleType):
            if value.__name__.partition(".")[0] not in _LIBRARIES:
                self._holders[id(value)] = value
        elif isinstance(value, type):
            if not _is_library(value):
                self._holders[id(value)] = value
        elif isinstance(value, FunctionType | Tensor) and vars(value):
            self._holders[id(value)] = value

    def _find_named(self) -> None:
        """Write down the attributes of modules and the like that have a name of the code's."""
        names = {name for code in self._variables for name in _names_in(code)}
        done: set[int] = set()
        while rest := [of for at, of in self._holders.items() if at not in done]:
            for of in rest:
                done.add(id(of))
                if isinstance(of, type):
                    for base in [*inspect.getmro(of), *inspect.getmro(type(of))]:
                        for key in names & vars(base).keys():
                            self._of_class(base, key, f"{of.__name__}.{key}")
                    continue
                inner = of if isinstance(of, dict) else vars(of)
                what = "the global" if isinstance(of, dict) else f"{getattr(of, '__name__', type(of).__name__)}."
                for key in names & inner.keys():
                    owner = None if isinstance(of, dict | ModuleType) else of
                    self._note(inner, key, inner[key], f"{what} {key!r}" if isinstance(of, dict) else what + key, owner)

    def _find_closures(self) -> None:
        codes = list(self._variables)
        for function in gc.get_referrers(*codes) if codes else ():
            if not isinstance(function, FunctionType) or function.__code__ not in self._variables:
                continue
            self._note(function, "__code__", function.__code__, f"the code of {function.__name__}", function)
            self._hold(function)
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
                self._all_attributes(of, own)
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
        if self._of_class(cls, key, name):
            if own is not None:
                self._note(own, key, MISSING, name, of)  # an attribute of the object would come first
        elif own is not None and not any(key in vars(base) for base in cls.__mro__):  # of a __getattribute__ of its own
            self._all_attributes(of, own)

    def _all_attributes(self, of: Any, own: dict[str, Any]) -> None:
        name = f"the attributes of {type(of).__name__}"
        self._note(own, "__dict__", MISSING, name, of)
        self._look_inside(own, name, (id(own), "__dict__"), 0)

    def _missing(self, of: Any, key: str) -> None:
        """What is not there, or a member of a module, which Python finds only after it has looked for an attribute."""
        if threading.get_ident() != self._thread or key.startswith("__"):
            return
        if key.endswith("_unconstrained") or _is_kept_by_library(type(of), of, key):  # those are in the param store
            return
        own, name = _dictionary(of), f"{type(of).__name__}.{key}"
        if own is not None and isinstance(of, nn.Module):
            for members in _MEMBERS:
                if key in own.get(members, ()):
                    self._note(own[members], key, own[members][key], name, of)
                    return
        if not _is_library(type(of)) or (isinstance(of, nn.Module) and type(of).__module__.startswith("torch.")):
            self._note(of if own is None else own, key, MISSING, name, of)

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
        self._hold(value)
        if isinstance(value, ModuleType) or (id(holder), key) in self._reads:
            return
        self._reads[id(holder), key] = _Read(holder, key, value, name, owner)
        self._look_inside(value, name, (id(holder), key), 0)
        self._watch(value)

    def _look_inside(self, value: Any, name: str, root: tuple[int, str], depth: int) -> None:
        self._hold(value)
        if isinstance(value, (*SIMPLE, Tensor)) or depth > _DEEPEST:
            return
        if has_public_attributes(value):
            own = vars(value)
            for key in [key for key in own if not key.startswith("_")]:
                self._note(own, key, own[key], f"{name}.{key}", value)
        for container in opened(value):
            if id(container) in self._inside:
                continue
            if not is_fixed(container):
                self._inside[id(container)] = _Inside(container, contents(container), name, root)
            for one in within(container):
                if not isinstance(one, (*SIMPLE, Tensor)):
                    self._watch(one)
                    self._look_inside(one, name, root, depth + 1)

    def _watch(self, value: Any, depth: int = 0) -> None:
        """Have reads of the attributes of an object written down, or of those in a container."""
        for one in chain.from_iterable(map(within, opened(value))):
            if depth < _DEEPEST and self._watched < _MOST_WATCHED and not isinstance(one, (*SIMPLE, Tensor)):
                self._watched += 1
                self._watch(one, depth + 1)
        if isinstance(value, MethodType):
            value = value.__self__
        self._hold(value)
        if _is_library(type(value)) or isinstance(value, (type, FunctionType, Tensor, *SIMPLE)):
            return
        self._hold(type(value))
        if not isinstance(value, tuple):
            self._note(value, "__class__", type(value), f"the class of {type(value).__name__}", value)
        if not any(cls in self._patched for cls in type(value).__mro__):
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
        self._others: list[_Read] = []
        self._functions: list[Any] = []
        self._codes: list[Any] = []
        self._objects: list[Any] = []
        self._attributes: list[str] = []
        self._of_objects: list[Any] = []
        self._bystanders: dict[str, Tensor] = {}
        self._looks: list[Any] = []

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
        self._take_contents()
        self._take_bystanders(known)
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
            all(map(operator.is_, map(dict.get, self._dicts, self._keys, _NOTHING), self._values))
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

    def _is_same_inside(self) -> bool:
        return (
            list(map(len, self._sized)) == self._sizes
            and all(map(operator.is_, chain.from_iterable(self._sized), self._entries))
            and (
                not self._mappings
                or all(map(operator.is_, chain.from_iterable(map(dict.values, self._mappings)), self._of_keys))
            )
            and (not self._arrays or list(map(np.ndarray.tobytes, self._arrays)) == self._bytes)
            and (not self._slow or all(map(are_same, map(contents, self._slow), self._in_slow)))
        )

    def _take_contents(self) -> None:
        """Of all containers in a row, what :meth:`_is_same_inside` compares."""
        containers = [inside.container for inside in self._inside]
        self._arrays = [one for one in containers if isinstance(one, np.ndarray) and one.dtype != object]
        self._bytes = [array.tobytes() for array in self._arrays]
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
            (self._held, self._names_of_cells, map(_read_cell, self._cells)),
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
        self._take_contents()
        self.changed = None
        return True


def _look_at(tensor: Tensor) -> tuple[object, ...]:
    """What Python may read of a tensor beside its values."""
    strides = tensor.stride() if tensor.layout is torch.strided else None
    return tensor.shape, strides, tensor.dtype, tensor.device, tensor.requires_grad


def _dictionary(of: Any) -> dict[str, Any] | None:
    try:
        found = object.__getattribute__(of, "__dict__")
    except AttributeError:
        return None
    return found if isinstance(found, dict) else None


def _holder(read: _Read) -> Any:
    return read.holder() if isinstance(read.holder, weakref.ref) else read.holder


def _place(read: _Read) -> tuple[int, str]:
    return id(_holder(read)), read.key


def _current(read: _Read) -> Any:
    holder = _holder(read)
    if isinstance(holder, CellType):
        return _read_cell(holder)
    return holder.get(read.key, MISSING) if type(holder) is dict else getattr(holder, read.key, MISSING)


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


def _imported(name: str, given: dict[str, Any]) -> list[ModuleType]:
    """Modules that an import in a function may mean; its dots are not known."""
    package = str(given.get("__package__") or "")
    parents = [package.rsplit(".", up)[0] for up in range(package.count(".") + 1)] if package else []
    found = [sys.modules.get(of) for of in [name, *[f"{parent}.{name}".rstrip(".") for parent in parents]]]
    return [module for module in found if module is not None]


def _names_in(code: CodeType) -> Iterator[str]:
    """Names of attributes, and strings that may be."""
    yield from code.co_names
    for one in code.co_consts:
        yield from [of for of in (one if isinstance(one, tuple) else (one,)) if isinstance(of, str)]


def _is_of_library(file: str, given: dict[str, Any]) -> bool:
    if file == "<string>":  # of exec, or of python -c
        name = str(given.get("__name__"))
        return name.partition(".")[0] in _LIBRARIES or name.startswith("namedtuple_")
    return file.startswith((*_FOLDERS, "<frozen")) or (file.startswith(_STANDARD) and "site-packages" not in file)


def _is_aside(frame: FrameType) -> bool:
    """Whether a function runs for a handler of logging or for an import, which are no part of the programs."""
    caller = frame.f_back
    while caller is not None:
        if caller.f_code.co_filename.startswith((logging.__file__, "<frozen importlib")):
            return True
        caller = caller.f_back
    return False


def _is_library(cls: type) -> bool:
    return str(cls.__module__).partition(".")[0] in _LIBRARIES  # of some extensions' classes it is a descriptor


def _is_kept_by_library(cls: type, of: Any, key: str) -> bool:
    """Whether torch or Pyro keep their own books by that name."""
    if key in _MEMBERS:
        return cls is nn.Module or str(cls.__module__).startswith(("pyro.infer.autoguide", "pyro.nn"))
    if key in _OF_GUIDES and _is_library(cls):
        return True
    if isinstance(of, nn.Module) and (key in _OF_MODULES or key.startswith("_pyro_")):
        return True
    return _is_library(cls) and key.startswith("_")
