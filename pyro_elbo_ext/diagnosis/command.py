"""``python -m pyro_elbo_ext diagnose``: a report on a model and guide that a module holds."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro.poutine.messenger import Messenger

from pyro_elbo_ext.diagnosis.diagnosis import Diagnosis
from pyro_elbo_ext.files.untrusted import read_npz, reading

STATUS = {"good": 0, "means only": 1, "do not use": 2}
FAILED = 3


def run_diagnose(
    model: str,
    guide: str,
    *,
    data: str | None = None,
    params: str | None = None,
    mcmc: str | None = None,
    num_draws: int | None = None,
    seed: int = 0,
    output: str = "report.html",
    echo: Callable[[str], Any] = print,
) -> int:
    """Diagnose what the files hold, write the page, print the text; return the exit status.

    Parameters
    ----------
    model, guide
        ``module:name``, imported with the working directory first on the path. For classes and factories of guides see
        ``python -m pyro_elbo_ext diagnose --help``.
    data
        ``.npz``, whose arrays are the keyword arguments of both.
    params
        Written by ``pyro.get_param_store().save``.
    mcmc
        Posterior draws, as :func:`~pyro_elbo_ext.read_draws` reads them.
    num_draws, seed
        As of ``diagnose``.
    output
        The page; its folder is made.
    echo
        Takes the text.

    Raises
    ------
    ValueError, TypeError, KeyError, ImportError, OSError
        For what cannot be read or is not what it should be, naming it. Errors of the model and guide come as they are.
    """
    from pyro_elbo_ext.comparison import read_draws
    from pyro_elbo_ext.diagnosis.verdict import diagnose

    page = Path(output)
    if page.is_dir():
        raise IsADirectoryError(f"--output: {page} is a folder, not a file")
    page.parent.mkdir(parents=True, exist_ok=True)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    pyro.set_rng_seed(seed)
    the_model = _made(_loaded(model, "model"), "model")
    the_guide = _made(_loaded(guide, "--guide"), "--guide", the_model)
    kwargs = {} if data is None else read_data(data)
    taken = sorted(set(kwargs) & set(inspect.signature(diagnose).parameters))
    if taken:
        raise ValueError(
            f"--data: arrays called {', '.join(taken)} cannot be told from options of diagnose: rename them"
        )
    if params is not None:
        load_params(params, the_model, the_guide, kwargs)
    options: dict[str, Any] = {} if num_draws is None else {"num_draws": num_draws}
    posterior = None if mcmc is None else read_draws(mcmc)
    diagnosis: Diagnosis = diagnose(the_model, the_guide, mcmc=posterior, seed=seed, **options, **kwargs)
    echo(str(diagnosis))
    diagnosis.to_html(page, title=f"Did it work? {model} with {guide}")
    echo(f"\nReport: {page}")
    return STATUS[diagnosis.verdict]


def command(**options: Any) -> int:
    """`run_diagnose`, whose errors are told on stderr and return `FAILED`: Python's own status for them is a verdict's."""
    try:
        return run_diagnose(**options)
    except (Exception, SystemExit) as error:
        explained = isinstance(error, ValueError | TypeError | ImportError | OSError)
        if not explained or _in_own_code(error):
            traceback.print_exc()
        print(f"python -m pyro_elbo_ext diagnose: error: {error}", file=sys.stderr)
        return FAILED


def _in_own_code(error: BaseException | None) -> bool:
    """Whether it, or what caused it, passed through a file of the working directory: then its line is worth knowing."""
    here, package = Path.cwd(), Path(__file__).parents[1]
    while error is not None:
        for frame in traceback.extract_tb(error.__traceback__):
            file = Path(frame.filename)
            if file.is_relative_to(here) and not file.is_relative_to(package) and "site-packages" not in file.parts:
                return True
        error = error.__cause__ or error.__context__
    return False


def read_data(path: str) -> dict[str, Any]:
    """The arrays of an ``.npz`` file as arguments of a model.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such file, if it is no ``.npz``, or if an array does not hold numbers.
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"--data: no such file: {file}")
    if file.suffix != ".npz":
        raise ValueError(f"--data: {file} must be an .npz file, as numpy.savez writes")
    found: dict[str, Any] = {}
    try:
        arrays = read_npz(file)
    except (ValueError, OSError) as error:
        raise type(error)(f"--data: {error}") from error
    for name, array in arrays.items():
        if not array.ndim:
            found[name] = array.item()
            continue
        tensor = torch.from_numpy(array.astype(np.int64) if array.dtype.kind in "iu" else array)
        dtype = torch.get_default_dtype() if tensor.is_floating_point() else tensor.dtype
        found[name] = tensor.to(torch.get_default_device(), dtype)
    return found


class _Restore(Messenger):
    """Note every parameter's name, and give those of modules the loaded values, which `pyro.module` leaves aside."""

    def __init__(self, loaded: set[str]) -> None:
        super().__init__()
        self.loaded = loaded
        self.used: set[str] = set()

    def _pyro_param(self, msg: Any) -> None:
        name = msg["name"]
        self.used.add(name)
        own = msg["args"][1] if len(msg["args"]) > 1 else None  # after the name
        if name in self.loaded and "$$$" in name and isinstance(own, torch.Tensor):
            value = pyro.get_param_store()[name]
            if own.shape != value.shape:
                raise ValueError(
                    f"--params: '{name}' has shape {tuple(value.shape)}, but the module's has {tuple(own.shape)}"
                )
            with torch.no_grad():
                own.copy_(value)


def load_params(
    path: str, model: Callable[..., Any], guide: Callable[..., Any], kwargs: Mapping[str, Any] | None = None
) -> None:
    """Fill Pyro's parameter store from a file, and make sure that it has all that guide and model use.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such file, it is none of a parameter store, or it lacks a parameter, which is named: with fresh
        values the verdict would be on another fit.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"--params: no such file: {path}")
    store = pyro.get_param_store()
    store.clear()
    with reading(Path(path), "a file of pyro.get_param_store().save"):
        state = torch.load(path, torch.get_default_device(), weights_only=False)
    if not isinstance(state, dict) or set(state) != {"params", "constraints"}:
        raise ValueError(f"--params: {path} was not written by pyro.get_param_store().save")
    store.set_state(state)
    loaded = set(store.keys())
    with _Restore(loaded) as restore:
        trace = pyro.poutine.trace(guide).get_trace(**(kwargs or {}))
        pyro.poutine.replay(model, trace=trace)(**(kwargs or {}))
    missing = sorted(restore.used - loaded)
    if missing:
        raise ValueError(
            f"--params: {path} has no {', '.join(missing)}, which model and guide use; it has "
            f"{', '.join(sorted(loaded)) or 'none'}"
        )


def _loaded(reference: str, option: str) -> Any:
    """What ``module:name`` stands for."""
    module_name, colon, attribute = reference.partition(":")
    if not (module_name and colon and attribute):
        raise ValueError(f"{option} must be module:name, got {reference!r}")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name and not module_name.startswith(f"{error.name}."):
            raise  # one that the module itself misses
        raise ImportError(f"{option}: there is no module '{error.name}' here or installed") from error
    except SystemExit as error:  # its status would be taken for a verdict
        raise ImportError(
            f"{option}: importing {module_name} ended the program with status {error.code}: "
            "put what it runs under if __name__ == '__main__'"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ImportError(f"{option}: {module_name} has no '{attribute}'")
        found = getattr(found, part)
    return found


def _made(found: Any, option: str, *model: Callable[..., Any]) -> Callable[..., Any]:
    """The model or guide itself, where a class or a factory was named."""
    if not callable(found):
        raise TypeError(f"{option} must be callable, got {type(found).__name__}")
    takes = _first_parameter(found) == "model"
    if isinstance(found, type) or (model and takes):
        made = found(*model) if takes else found()
        if not callable(made):
            raise TypeError(
                f"{option}: {getattr(found, '__name__', found)} made a {type(made).__name__}, not a callable"
            )
        return made
    return found


def _first_parameter(function: Callable[..., Any]) -> str:
    return next(iter(inspect.signature(function).parameters), "")
