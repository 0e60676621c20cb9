"""What model and guide read beside tensors while they are traced.

A graph keeps the numbers, strings, flags and functions that Python code reads on the way, and knows tensors by identity. So
every name is written down as it is read: attributes of objects, of modules and of classes, globals, and variables of
closures; and of lists, dictionaries and NumPy arrays what is in them. ``guards`` looks the names up again before each step.

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
import os
import sys
import sysconfig
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import CellType, CodeType, FrameType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_elbo_ext.compile.tracing.holdings import (
    MISSING,
    SIMPLE,
    contents,
    has_public_attributes,
    is_fixed,
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


class Read(NamedTuple):
    """A name, as it was when it was first read."""

    holder: Any  # a dictionary, a cell, or an object with the attribute, or a weak reference to it
    key: str
    value: Any
    name: str
    owner: Any  # whose it is, to tell what lives on after the run


class Inside(NamedTuple):
    """What a container or an array held, and by which of the reads one comes to it."""

    container: Any
    contents: Any
    name: str
    root: tuple[int, str]


class Recorder:
    """Writes down what is read in the block of :meth:`recording`."""

    def __init__(self) -> None:
        self._reads: dict[tuple[int, str], Read] = {}
        self._inside: dict[int, Inside] = {}
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

    def reads(self) -> tuple[list[Read], list[Inside]]:
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
            if not is_library(value):
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
            if all(read_cell(cell) is seen.get(name) for name, cell in found.items()):
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
        if is_library(cls):
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
        if not is_library(type(of)) or (isinstance(of, nn.Module) and type(of).__module__.startswith("torch.")):
            self._note(of if own is None else own, key, MISSING, name, of)

    def _of_class(self, cls: type, key: str, name: str) -> bool:
        for base in cls.__mro__:
            if key not in vars(base):
                continue
            value = vars(base)[key]
            if is_library(base):
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
        self._reads[id(holder), key] = Read(holder, key, value, name, owner)
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
                self._inside[id(container)] = Inside(container, contents(container), name, root)
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
        if is_library(type(value)) or isinstance(value, (type, FunctionType, Tensor, *SIMPLE)):
            return
        self._hold(type(value))
        if not isinstance(value, tuple):
            self._note(value, "__class__", type(value), f"the class of {type(value).__name__}", value)
        if not any(cls in self._patched for cls in type(value).__mro__):
            self._patch(type(value))


def _dictionary(of: Any) -> dict[str, Any] | None:
    try:
        found = object.__getattribute__(of, "__dict__")
    except AttributeError:
        return None
    return found if isinstance(found, dict) else None


def read_cell(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not bound any more
        return None


def _weak(owner: Any) -> Any:
    try:
        return weakref.ref(owner)
    except TypeError:  # a dictionary or a cell
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


def is_library(cls: type) -> bool:
    return str(cls.__module__).partition(".")[0] in _LIBRARIES  # of some extensions' classes it is a descriptor


def _is_kept_by_library(cls: type, of: Any, key: str) -> bool:
    """Whether torch or Pyro keep their own books by that name."""
    if isinstance(of, Messenger) and str(cls.__module__).partition(".")[0] == __name__.partition(".")[0]:
        return True  # made anew for each run
    if key in _MEMBERS:
        return cls is nn.Module or str(cls.__module__).startswith(("pyro.infer.autoguide", "pyro.nn"))
    if key in _OF_GUIDES and is_library(cls):
        return True
    if isinstance(of, nn.Module) and (key in _OF_MODULES or key.startswith("_pyro_")):
        return True
    return is_library(cls) and key.startswith("_")
