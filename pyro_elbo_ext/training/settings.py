"""What a run was asked to do, as plain values for its callbacks."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

import torch
from pyro.optim import PyroOptim

_PACKAGES = ("pyro_elbo_ext", "pyro-ppl", "torch")


def describe_run(
    model: Any, guide: Any, loss: Any, optim: PyroOptim | torch.optim.Optimizer | None, rule: Any, **others: Any
) -> dict[str, Any]:
    """Names of the programs and of what trains them, the optimizer's options, versions, and ``others`` as they are."""
    options, scheduler = _options(optim), getattr(optim, "pt_scheduler_constructor", None)
    return {
        "model": name_of(model),
        "guide": name_of(guide),
        "loss": name_of(loss),
        "optimizer": None if optim is None else name_of(getattr(optim, "pt_optim_constructor", optim)),
        "learning_rate": options.pop("lr", None),
        "optimizer_options": options,
        "scheduler": None if scheduler is None else name_of(scheduler),
        "stopping": None if rule is None else name_of(rule),
        **others,
        "versions": {
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in _PACKAGES},
        },
    }


def name_of(program: Any) -> str:
    """The name of a function or class, of a function that was wrapped, or of an object's class; text as it is."""
    if isinstance(program, str):
        return program
    while isinstance(program, functools.partial):
        program = program.func
    return str(getattr(program, "__qualname__", type(program).__name__))


def _options(optim: PyroOptim | torch.optim.Optimizer | None) -> dict[str, Any]:
    """The optimizer's options; with several groups those of the first. None are known if they depend on the parameter."""
    if isinstance(optim, torch.optim.Optimizer):
        return {name: value for name, value in optim.param_groups[0].items() if name != "params"}
    inner = getattr(optim, "optimizer", None)
    if inner is not None:
        return _options(inner)
    given = getattr(optim, "pt_optim_args", {})
    return dict(given) if isinstance(given, Mapping) else {}
