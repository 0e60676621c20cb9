"""Torch's compiler: importing it, and what to say when it fails."""

from __future__ import annotations

import getpass
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.fx import GraphModule

from pyro_elbo_ext.compile.errors import CannotCompile
from pyro_elbo_ext.programs.interrupts import handlers_are_heard, interrupts_wait

logger = logging.getLogger(__name__)

_FOLDER = "TORCHINDUCTOR_CACHE_DIR"
# What runs while torch traces and compiles: an error of a class that is not of these, raised among them, came from outside.
_MACHINERY = sys.stdlib_module_names | {
    *(
        "torch",
        "torchgen",
        "functorch",
        "triton",
        "sympy",
        "mpmath",
        "networkx",
        "jinja2",
        "filelock",
        "fsspec",
        "numpy",
    ),
    *("typing_extensions", "setuptools", "pyro", "pyro_elbo_ext"),
}
_first_failure: Exception | None = None  # to import the compiler


def import_dynamo() -> None:
    """Import ``torch._dynamo``, as torch's optimizers and its tracer do, even where torch cannot make its cache folder.

    Without the folder that import fails, and by another error each time after. Pyro's steps need it, but not the folder.
    """
    if "torch._dynamo" in sys.modules:
        return
    with _undisturbed():
        _import_dynamo()


def _undisturbed() -> AbstractContextManager[None]:
    """A block in which no signal is handled: an import of torch's compiler that is left half way cannot be made again."""
    return interrupts_wait(signal.valid_signals())


def _import_dynamo() -> None:
    try:
        os.makedirs(_cache_folder(), exist_ok=True)
    except OSError:
        there = {_FOLDER: str(Path(torch.__file__).parent)}  # nothing is written to it
        with patch.dict(os.environ, there):
            import_module("torch._dynamo")
            with suppress(ImportError):  # as the tracer does, in newer releases
                import_module("torch._inductor.compiler_bisector")
    else:
        import_module("torch._dynamo")


def _cache_folder() -> str:
    return os.environ.get(_FOLDER) or os.path.join(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")


def import_inductor() -> Any:
    """``torch._inductor``, with all that it imports when it compiles.

    Raises
    ------
    Exception
        Whatever the import fails with, the first time.
    """
    global _first_failure
    try:
        import_dynamo()
        if "torch._inductor.compile_fx" not in sys.modules:
            with _undisturbed():
                import_module("torch._inductor.compile_fx")
        return import_module("torch._inductor")
    except Exception as error:
        _first_failure = _first_failure or error
        if isinstance(error, AssertionError):  # half of it is there from the first time
            raise _first_failure from None
        raise


def inductor_code(graph: GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
    """An ATen graph as machine code: ``torch.compile`` without Dynamo, whose guards cost more than the call itself.

    The number of threads is written into the code: as many as torch is set to at this moment, unless ``options``, which are
    Inductor's, say otherwise. Code that has no such number has memory for so many, and starts as many, as the calling
    thread is set to. What the CPU has is taken for granted where the C++ compiler knows it: to try each instruction set, as
    torch does, takes as long as a small graph. What is made of a graph is kept in Inductor's folder, see :func:`_kept`.

    Raises
    ------
    CannotCompile
        For a matrix factorization in an early release, whose compiler leaves out the check that it has succeeded.
    """
    checks = [node for node in graph.graph.nodes if node.target is torch.ops.aten._linalg_check_errors.default]
    if checks and not checks[0].is_impure():
        raise CannotCompile(
            f"the compiler of torch {torch.__version__} leaves out the check that a matrix factorization has succeeded, "
            "without which one that fails gives NaN. Install a later torch."
        )
    inductor, settings = import_inductor(), {"cpp.threads": torch.get_num_threads(), **options}
    compiled: Callable[..., Any]
    if "cpp.vec_isa_ok" not in options:
        try:
            with _kept(inputs) as kept:
                compiled = inductor.compile(graph, kept, {"cpp.vec_isa_ok": True, **settings})
        except Exception as error:
            if not is_from_compiler(innermost(error)):
                raise
            logger.info("the C++ compiler does not know this CPU; torch looks for what it knows")
        else:
            return compiled
    compiled = inductor.compile(graph, inputs, settings)
    return compiled


@contextmanager
def _kept(inputs: list[Any]) -> Iterator[list[Any]]:
    """A block in which Inductor keeps what it makes of a graph in its folder, and takes it from there in another process.

    It does so for ``torch.compile`` only, in whose contexts there are symbolic shapes; here all are fixed. What it keeps is
    found by the graph, its inputs and all settings, but not by the instructions that the CPU has, which the code is for.
    The block has the inputs as Inductor is to have them.
    """
    if any(not isinstance(value, Tensor) or value.device.type != "cpu" for value in inputs):
        yield inputs
        return
    from torch._functorch import config as functorch  # slow to import
    from torch._guards import TracingContext, tracing
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    config = import_module("torch.compiler.config")
    tag = f"{config.cache_key_tag} {torch.backends.cpu.get_cpu_capability()}"
    mode = FakeTensorMode(shape_env=ShapeEnv())
    # autograd's level of that cache would hide the graph from C steps
    with tracing(TracingContext(mode)), functorch.patch(enable_autograd_cache=False), config.patch(cache_key_tag=tag):
        yield [mode.from_tensor(value, static_shapes=True) for value in inputs]


def check_backend(backend: str | Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Look at how graphs are to be compiled, before there is one.

    Raises
    ------
    ValueError
        For a backend, or an option of Inductor, that torch does not know.
    CannotCompile
        If torch's compiler cannot be imported.
    """
    if options and backend != "inductor":
        raise ValueError(f"options are for backend='inductor', not for {backend!r}: leave them out")
    if options:
        with failures_are_reasons("importing torch's compiler", "inductor"):
            import_dynamo()
            config = import_module("torch._inductor.config")
        unknown = sorted(set(options) - set(config.get_config_copy()))
        if unknown:
            raise ValueError(
                f"options has {unknown[0]!r}, which is none of Inductor's: torch._inductor.list_options() gives them all"
            )
        for name, value in options.items():
            kind = config.get_type(name) if hasattr(config, "get_type") else object
            if isinstance(kind, type) and not isinstance(value, (int, float) if kind is float else kind):
                raise ValueError(f"options[{name!r}] must be of type {kind.__name__}, not {type(value).__name__}")
    if callable(backend) or backend in ("inductor", "eager"):
        return
    with failures_are_reasons("importing torch's compiler"):
        import_dynamo()
        known = import_module("torch._dynamo").list_backends(exclude_tags=())
    if backend not in known:
        names = ", ".join(map(repr, ["inductor", "eager", *sorted(set(known) - {"inductor", "eager"})]))
        raise ValueError(f"backend must be one of {names}, or a callable that torch.compile takes; not {backend!r}")


@contextmanager
def failures_are_reasons(what: str, backend: str | Callable[..., Any] | None = None) -> Iterator[None]:
    """Whatever fails in the block is a reason not to compile; but errors from outside, such as time-outs, come through.

    Parameters
    ----------
    what
        Is done in the block, for the message.
    backend
        That compiles in it, if any.

    Raises
    ------
    CannotCompile
        With the cause, and a remedy where one is known.
    """
    with handlers_are_heard():
        try:
            yield
        except CannotCompile:
            raise
        except Exception as error:
            cause = innermost(error)
            if backend in (None, "inductor") and _is_from_outside(cause):
                raise cause from None
            instead = " backend='eager' runs the graph without a compiler." if backend not in (None, "eager") else ""
            refusal = CannotCompile(f"{what} failed: {_describe(cause)}.{_remedy(cause)}{instead}")
            refusal.is_everywhere = isinstance(cause, OSError | ImportError) or _lacks_compiler(cause)
            raise refusal from cause


def innermost(error: BaseException) -> BaseException:
    """What torch has wrapped in an error of its own."""
    inner = getattr(error, "inner_exception", None)
    return innermost(inner) if isinstance(inner, BaseException) else error


def _is_from_outside(error: BaseException) -> bool:
    """Whether an error was raised from outside in the middle of it, in this thread, as libraries for time-outs do."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    at = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
    of = type(error).__module__.partition(".")[0]
    return of not in {*_MACHINERY, "builtins", at}


def _describe(error: BaseException) -> str:
    text = str(error)
    if is_from_compiler(error):
        lines = str(getattr(error, "output", "")).strip().splitlines() or ["it says nothing"]
        return f"the C++ compiler failed: {next((line for line in lines if 'error' in line.lower()), lines[0])}"
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}".rstrip(": .")


def is_from_compiler(error: BaseException) -> bool:
    """Whether it is what a C++ compiler says of a program."""
    return type(error).__name__ == "CppCompileError"  # by name, as torch may be unable to import it


def _lacks_compiler(error: BaseException) -> bool:
    return type(error).__name__ == "InvalidCxxCompiler"


def _remedy(error: BaseException) -> str:
    if _lacks_compiler(error):
        return " Install a C++ compiler, such as g++ or clang++, or name one in the environment variable CXX."
    if is_from_compiler(error):
        return " Mend that compiler, or name another one in the environment variable CXX."
    if isinstance(error, ImportError):
        return " Mend the installation of torch."
    if isinstance(error, OSError):
        return (
            f" Torch keeps machine code in {_folder_for_message()}: make that a folder that can be written to, with space "
            f"left, by the environment variable {_FOLDER}."
        )
    if isinstance(error, AssertionError) and "already registered" in str(error):
        return " An earlier import of torch's compiler has failed in this process: start Python anew to see why."
    return ""


def _folder_for_message() -> str:
    try:
        return _cache_folder()
    except OSError:  # there is no folder for temporary files
        return "the folder for temporary files"
