"""What a run's result hangs on, as plain values: kept with a checkpoint, compared when it is resumed."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from pyro_elbo_ext.compile.binding import WholeOptimizer
from pyro_elbo_ext.training.data.batches import Batches, Whole
from pyro_elbo_ext.training.settings import name_of

Fingerprint = dict[str, Any]

_DEPTH = 5
_NOT_OF_THE_RESULT = ("history", "max_plate_nesting", "max_iarange_nesting", "retain_graph", "ignore_jit_warnings")


def fingerprint(
    optim: Any, loss: Any, data: Whole | Batches, rule: Any, validation: Any, seed: int | None
) -> Fingerprint:
    """By what `fit` calls it: a number, text, or a mapping or list of them. Of arrays shape, dtype and a digest.

    Of objects it is the class, and what was given to its constructor as far as the object tells; of a data set that is not
    in memory its class and length.
    """
    given: dict[str, Any]
    if isinstance(data, Whole):
        given = {**{f"argument {i}": value for i, value in enumerate(data.call[0])}, **data.call[1]}
    else:
        given = {"batches": data.source, "then": (data.args, data.kwargs)}
    return {
        "optim": _optimizer(optim),
        "loss": described(loss),
        "data": described(given),
        "stopping": described(rule),
        "validation": described(validation),
        "seed": seed,
    }


def differences(then: Fingerprint, now: Fingerprint) -> dict[str, list[str]]:
    """What differs, by what `fit` calls it, in words."""
    found = {}
    for name in now:
        if name == "seed" and now[name] is None:  # none is asked for: the run goes on with its own random numbers
            continue
        said = list(_differences(then.get(name), now[name], name))
        if said:
            found[name] = said
    return found


def _differences(then: Any, now: Any, path: str) -> Any:
    if isinstance(then, dict) and isinstance(now, dict) and then.get("class") == now.get("class"):
        for key in dict.fromkeys([*then, *now]):
            yield from _differences(then.get(key), now.get(key), f"{path}, {key}")
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        for i, (a, b) in enumerate(zip(then, now, strict=True)):
            yield from _differences(a, b, f"{path}[{i}]")
    elif then != now and not (then != then and now != now):
        yield f"{path} was {_short(then)} and is now {_short(now)}"


def _short(value: Any) -> str:
    if isinstance(value, dict) and "class" in value:
        return str(value["class"])
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def described(value: Any, depth: int = 0) -> Any:
    """A value as plain values."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor | np.ndarray):
        return _array(value)
    if isinstance(value, DataLoader):
        return {
            "class": name_of(value),
            "dataset": described(value.dataset, depth + 1),
            "batch_size": value.batch_size,
            "sampler": name_of(value.sampler),
            "drop_last": value.drop_last,
        }
    if isinstance(value, TensorDataset):
        return {"class": name_of(value), "tensors": [_array(tensor) for tensor in value.tensors]}
    if isinstance(value, Subset):
        indices = _array(np.asarray(value.indices))
        return {"class": name_of(value), "dataset": described(value.dataset, depth + 1), "indices": indices}
    if depth >= _DEPTH or isinstance(value, nn.Module) or inspect.isroutine(value) or inspect.isclass(value):
        return name_of(value)
    if isinstance(value, Mapping):
        return {str(key): described(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [described(item, depth + 1) for item in value]
    found = {"class": name_of(value), **{name: described(item, depth + 1) for name, item in _given(value).items()}}
    try:
        return {**found, "length": len(value)}
    except TypeError:
        return found


def _given(value: Any) -> dict[str, Any]:
    """What the constructors of an object's classes took, where it is an attribute and no state of a run."""
    state = value.state_dict() if hasattr(value, "state_dict") and not isinstance(value, nn.Module) else {}
    found = {}
    for cls in type(value).__mro__[:-1]:
        if "__init__" not in vars(cls):
            continue
        try:
            names = inspect.signature(vars(cls)["__init__"]).parameters
        except (TypeError, ValueError):  # some have none
            continue
        for name in names:
            attribute = next((of for of in (name, f"_{name}") if of in vars(value)), None)
            if attribute is None and isinstance(getattr(type(value), name, None), property):
                attribute = name
            if attribute is not None and name not in state and name not in _NOT_OF_THE_RESULT:
                found[name] = getattr(value, attribute)
    return found


def _array(value: Tensor | np.ndarray) -> str:
    """Shape, dtype and a digest of the content."""
    shape, dtype = tuple(value.shape), str(value.dtype)
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_quantized:
            return f"{dtype} {shape}"
        value = torch.view_as_real(value.detach()) if value.is_complex() else value.detach()
        raw = value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy() if value.numel() else np.zeros(0, np.uint8)
    elif value.dtype.hasobject:
        raw = np.frombuffer(repr(value.tolist()).encode(), np.uint8)
    else:
        raw = np.ascontiguousarray(value).reshape(-1).view(np.uint8) if value.size else np.zeros(0, np.uint8)
    return f"{dtype} {shape} {hashlib.sha1(raw.data, usedforsecurity=False).hexdigest()[:12]}"


def _optimizer(optim: Any) -> dict[str, Any]:
    """The optimizer's class with its settings, and those of clipping and of a schedule."""
    if isinstance(optim, WholeOptimizer):
        optim = optim.optimizer
    if isinstance(optim, torch.optim.Optimizer):
        groups = [{k: v for k, v in group.items() if k not in ("params", "initial_lr")} for group in optim.param_groups]
        return {"class": name_of(optim), "settings": described(groups)}
    assert isinstance(optim, PyroOptim)
    scheduler = getattr(optim, "pt_scheduler_constructor", None)
    return {
        "class": name_of(optim.pt_optim_constructor),
        "settings": described(optim.pt_optim_args),
        "clip_args": described(optim.pt_clip_args),
        "scheduler": None if scheduler is None else name_of(scheduler),
        "scheduler_settings": None if scheduler is None else described(getattr(optim, "kwargs", None)),
    }
