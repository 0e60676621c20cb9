"""What a run's result hangs on, as plain values: kept with a checkpoint, compared when it is resumed."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from pyro import validation_enabled
from pyro.distributions.util import scale_and_mask
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from pyro_elbo_ext.compile.binding import WholeOptimizer
from pyro_elbo_ext.compile.tracing.static_check import nothing_changed
from pyro_elbo_ext.programs.nodes import Node, base_distribution, is_subsample
from pyro_elbo_ext.programs.randomness import seeded
from pyro_elbo_ext.programs.running import trace_pair
from pyro_elbo_ext.training.data.batches import Batches, Whole
from pyro_elbo_ext.training.settings import name_of

Fingerprint = dict[str, Any]

_DEPTH = 5
_LEVEL = 0.1  # of every unconstrained parameter, where programs are compared
_TOLERANCE = 1e-4  # of a log density, which is summed in another order on another machine
_BATCH, _DENSITIES = "first batch", "log densities"
_NOT_OF_THE_RESULT = ("history", "max_plate_nesting", "max_iarange_nesting", "retain_graph", "ignore_jit_warnings")


def fingerprint(
    optim: Any,
    loss: Any,
    data: Whole | Batches,
    rule: Any,
    validation: Any,
    seed: int | None,
    programs: Mapping[str, Any],
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
        "programs": dict(programs),
    }


def of_programs(model: Any, guide: Any, parameters: Mapping[str, Tensor], data: Whole | Batches) -> dict[str, Any]:
    """What model and guide are: at each site the distribution and its plates, and what they compute.

    The latter is the log density of every site with all parameters at one level and under one seed, so that it does not
    depend on how they start or how far they have come. Of batches it is the first under one seed, a digest of which is
    kept, as only those of the same batch can be compared; shapes are left out.
    """
    is_whole, call = isinstance(data, Whole), data.seeded_first()
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    found: dict[str, Any] = {}
    try:
        with nothing_changed((model, guide)), torch.no_grad(), seeded(0), validation_enabled(False):
            for parameter in parameters.values():
                parameter.fill_(_LEVEL)
            try:
                traces = trace_pair(model, guide, *call)
            except (ValueError, RuntimeError):  # not at this level
                return {}
            if not is_whole:
                found[_BATCH] = described(call)
            for where, trace in zip(("model", "guide"), traces, strict=True):
                sites = {name: node for name, node in trace.nodes.items() if node["type"] == "sample"}
                found[where] = {name: _site(node, is_whole) for name, node in sites.items() if not is_subsample(node)}
                if all(parameter.device.type == "cpu" for parameter in parameters.values()):
                    found[f"{_DENSITIES} of the {where}"] = _densities(sites)
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(before[name])
    return found


def _site(node: Node, is_whole: bool) -> str:
    fn = node["fn"]
    plates = sorted(frame.name for frame in node["cond_indep_stack"])
    shapes = f" {tuple(fn.batch_shape)} {tuple(fn.event_shape)}" if is_whole else ""
    within = f" in {', '.join(plates)}" if plates else ""
    return f"{base_distribution(fn)}{shapes}{within}{', observed' if node['is_observed'] else ''}"


def _densities(sites: Mapping[str, Node]) -> dict[str, Any]:
    """Log density of each site that has one."""
    found = {}
    for name, node in sites.items():
        try:
            value = node["fn"].log_prob(node["value"])
        except (ValueError, RuntimeError, NotImplementedError):
            continue
        found[name] = {"about": float(scale_and_mask(value, node["scale"], node["mask"]).sum())}
    return found


def differences(then: Fingerprint, now: Fingerprint) -> dict[str, list[str]]:
    """What differs, by what `fit` calls it, in words."""
    found: dict[str, list[str]] = {}
    for name in now:
        if name not in then or (name == "programs" and not (then[name] and now[name])):  # not known
            continue
        if name == "programs" and "data" in found:  # which are what they compute
            continue
        if name == "seed" and now[name] is None:  # none is asked for: the run goes on with its own random numbers
            continue
        before, after = then[name], now[name]
        if name == "programs" and before.get(_BATCH) != after.get(_BATCH):
            before, after = _without_densities(before), _without_densities(after)
        said = list(_differences(before, after, name))
        if said:
            found[name] = said
    return found


def _without_densities(programs: Mapping[str, Any]) -> dict[str, Any]:
    """What does not hang on a batch, which is another now, or was not kept."""
    return {name: value for name, value in programs.items() if name != _BATCH and not name.startswith(_DENSITIES)}


def _differences(then: Any, now: Any, path: str) -> Any:
    if isinstance(then, dict) and isinstance(now, dict) and then.keys() == now.keys() == {"about"}:
        a, b = then["about"], now["about"]
        if not (math.isclose(a, b, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE) or (a != a and b != b)):
            yield f"{path}, was {a:.6g} and is now {b:.6g} at the same parameters and draws"
    elif isinstance(then, dict) and isinstance(now, dict) and then.get("class") == now.get("class"):
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
