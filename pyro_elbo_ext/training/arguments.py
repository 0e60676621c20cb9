"""Whether the arguments of `fit` are what they may be: looked at before anything else, each error naming its argument."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pyro.infer import ELBO
from pyro.optim import PyroOptim

from pyro_elbo_ext.compile import CompiledSVI
from pyro_elbo_ext.programs.arguments import check_count
from pyro_elbo_ext.training.distributed import DistributedSVI

RULE = ("every", "converged", "start", "observe")  # what the loop cannot do without, see `StoppingRule`
OF_CHECKPOINTS = ("state_dict", "load_state_dict")


def check_counts(least: int = 1, **counts: Any) -> None:
    """Raise TypeError for one that is no integer, as a truth value is, ValueError for one below ``least``; None passes."""
    for name, value in counts.items():
        if value is not None:
            check_count(name, value, least)


def check_kinds(
    *, loss: Any, optim: Any, stopping: Any, callbacks: Any, checkpoint: Any, compiled: Any, distributed: Any
) -> None:
    """Raise TypeError for an argument of another kind than its own."""
    if not (loss is None or isinstance(loss, ELBO) or (callable(loss) and not isinstance(loss, type))):
        raise TypeError(f"loss must be an objective, such as DecomposedELBO(), not {_said(loss)}")
    if not (optim is None or isinstance(optim, PyroOptim | torch.optim.Optimizer)):
        raise TypeError(f"optim must be an optimizer of pyro.optim or torch, not {_said(optim)}")
    if stopping is not None and (isinstance(stopping, type) or not hasattr(stopping, "observe")):
        raise TypeError(f"stopping must be a rule, such as Patience(), not {_said(stopping)}")
    needed = RULE if checkpoint is None else RULE + OF_CHECKPOINTS
    lacks = [] if stopping is None else [name for name in needed if name not in dir(stopping)]
    if lacks:
        where = "" if checkpoint is None else " with checkpoint="
        raise TypeError(
            f"stopping{where} needs {', '.join(needed)}; {type(stopping).__name__} lacks {', '.join(lacks)}"
        )
    if not isinstance(callbacks, Iterable):
        raise TypeError(f"callbacks must be a list of Callback objects, not {_said(callbacks)}")
    if not (checkpoint is None or isinstance(checkpoint, str | os.PathLike)):
        raise TypeError(f"checkpoint must be the path of a file, not {_said(checkpoint)}")
    if checkpoint is not None and "\0" in os.fspath(checkpoint):
        raise ValueError(f"checkpoint must be the path of a file, not {checkpoint!r}")
    for name, value, taker in (("compiled", compiled, CompiledSVI), ("distributed", distributed, DistributedSVI)):
        if not (isinstance(value, bool | Mapping) or (value is None and name == "distributed")):
            raise TypeError(f"{name} must be True, False or a mapping of keyword arguments, not {_said(value)}")
        if isinstance(value, Mapping):
            parameters = inspect.signature(taker).parameters.values()
            known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
            for key in value:
                if key not in known:
                    raise TypeError(f"{name} has {key!r}; of {taker.__name__} it can set {', '.join(known)}")


def _said(value: Any) -> str:
    return f"the class {value.__name__}; make one by {value.__name__}(...)" if isinstance(value, type) else repr(value)
