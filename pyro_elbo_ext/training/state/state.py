"""All that a training run changes, read out and put back in place: parameters, buffers, optimizers, random numbers."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import SVI
from torch import Tensor, nn
from torch.optim import Optimizer

from pyro_elbo_ext.compile import CompiledSVI
from pyro_elbo_ext.compile.binding import WholeOptimizer
from pyro_elbo_ext.compile.machine_code.compiler import import_dynamo
from pyro_elbo_ext.objectives.objective import Objective
from pyro_elbo_ext.terms.registration import modules_of

State = dict[str, Any]


def random_state() -> State:
    """The state of every random number generator that a program may use: torch's on all devices, numpy's and Python's."""
    return {
        "torch": torch.random.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": np.random.get_state(),  # noqa: NPY002 (the global one, which Pyro seeds)
        "python": random.getstate(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put back what :func:`random_state` gave."""
    torch.random.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    random.setstate(state["python"])


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Put the random number generators back at the end of the block."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)


def parameters_of_programs(evaluate: Callable[[], Any]) -> dict[str, Tensor]:
    """The unconstrained parameters that an evaluation meets, by the names of their ``pyro.param`` sites."""
    with poutine.trace(param_only=True) as called:
        evaluate()
    found: dict[str, Tensor] = {}
    for name, site in called.trace.nodes.items():
        parameter = site["value"].unconstrained()
        if all(parameter is not other for other in found.values()):
            found[name] = parameter
    return found


class TrainingState:
    """Parameters and buffers of two programs, with the state of the optimizer that trains them.

    Parameters
    ----------
    svi
        What takes the steps.
    parameters
        Name to unconstrained tensor.
    """

    def __init__(self, svi: SVI, parameters: Mapping[str, Tensor]) -> None:
        self.svi, self.parameters = svi, dict(parameters)
        self.buffers = self.buffers_of(svi.model, svi.guide)
        own = {id(p) for p in self.parameters.values()}
        self._former = {id(p) for p in svi.optim.optim_objs} - own  # of other runs that the optimizer was used for

    def capture(self) -> State:
        """Copies of all of it."""
        return {
            "parameters": {name: p.detach().clone() for name, p in self.parameters.items()},
            "buffers": {name: b.detach().clone() for name, b in self.buffers.items()},
            "optimizers": {key: _optimizer_state(optimizer) for key, optimizer in self._optimizers()},
        }

    def make_optimizers(self) -> None:
        """Make the optimizers of all parameters, as PyroOptim does at a parameter's first step.

        So their learning rates can be lowered before that.
        """
        optim = self.svi.optim
        if isinstance(optim, WholeOptimizer):
            return
        import_dynamo()  # they do, but not where torch cannot make its folder
        for parameter in self.parameters.values():
            if parameter not in optim.optim_objs:
                optim.optim_objs[parameter] = optim._get_optim(parameter)
                optim.grad_clip[parameter] = optim._get_grad_clip(parameter)
                saved = optim._state_waiting_to_be_consumed.pop(pyro.get_param_store().param_name(parameter), None)
                if saved is not None:
                    optim.optim_objs[parameter].load_state_dict(saved)

    def restore(self, captured: Mapping[str, Any]) -> None:
        """Write copies back into the same tensors, so that whatever holds them sees it."""
        with torch.no_grad():
            for live, saved in ((self.parameters, captured["parameters"]), (self.buffers, captured["buffers"])):
                for name, tensor in live.items():
                    if name in saved:  # or it has come into being since
                        tensor.copy_(saved[name])
        optim = self.svi.optim
        self.make_optimizers()
        for key, optimizer in list(self._optimizers()):
            if key in captured["optimizers"]:
                _load_optimizer(optimizer, captured["optimizers"][key], in_place=isinstance(self.svi, CompiledSVI))
            else:  # it has come into being since
                optim.optim_objs.pop(self.parameters[key])
                optim.grad_clip.pop(self.parameters[key], None)
        if isinstance(self.svi, CompiledSVI):
            self.svi.take_over_optimizer_state()

    def adopt(self) -> None:
        """Take in parameters that the programs have made since."""
        objects = self.svi.optim.optim_objs
        if len(objects) <= len(self.parameters) + len(self._former):
            return
        store, known = pyro.get_param_store(), {id(p) for p in self.parameters.values()} | self._former
        for p in objects:
            if id(p) not in known:
                self.parameters[store.param_name(p) or f"parameter_{len(self.parameters)}"] = p

    def flat(self) -> Tensor:
        """The parameters, one after the other, shape (P,)."""
        tensors = [p.detach().reshape(-1) for p in self.parameters.values()]
        return torch.cat(tensors) if tensors else torch.zeros(0)

    def set_flat(self, values: Tensor) -> None:
        """Write a vector as :meth:`flat` gives it into the parameters."""
        start = 0
        with torch.no_grad():
            for p in self.parameters.values():
                p.copy_(values[start : start + p.numel()].reshape(p.shape))
                start += p.numel()

    def not_finite(self) -> list[str]:
        """Names of parameters that have NaN or infinite entries."""
        return [name for name, p in self.parameters.items() if not bool(torch.isfinite(p).all())]

    @staticmethod
    def buffers_of(model: Any, guide: Any) -> dict[str, Tensor]:
        """Buffers of all modules that the programs reach, such as the running means of batch normalization."""
        found: dict[str, Tensor] = {}
        for path, module in modules_of({"model": model, "guide": guide}):
            for name, buffer in module.named_buffers():
                if all(buffer is not other for other in found.values()):
                    found[f"{path}.{name}"] = buffer
        return found

    # Learning rates

    def learning_rates(self) -> list[float]:
        """Those of all groups of parameters."""
        return [float(group[_rate_of(group)]) for group in self._groups() if _rate_of(group) in group]

    def scale_learning_rates(self, factor: float) -> None:
        """Multiply every learning rate, and what schedulers start from, by a factor."""
        for _, optimizer in self._optimizers():
            inner = getattr(optimizer, "optimizer", optimizer)
            for group in inner.param_groups:
                rate = _rate_of(group)
                if rate in group:
                    group[rate] = group[rate] * factor
                if "initial_lr" in group:
                    group["initial_lr"] = group["initial_lr"] * factor
            if inner is not optimizer and hasattr(optimizer, "base_lrs"):
                optimizer.base_lrs = [rate * factor for rate in optimizer.base_lrs]

    def _groups(self) -> Iterator[dict[str, Any]]:
        for _, optimizer in self._optimizers():
            yield from getattr(optimizer, "optimizer", optimizer).param_groups

    def _optimizers(self) -> Iterator[tuple[str, Any]]:
        """Optimizers or schedulers: one for each parameter, by its name, or a single one."""
        objects = self.svi.optim.optim_objs
        distinct = {id(o): o for o in objects.values()}
        if len(distinct) == 1 and hasattr(self.svi.optim, "optimizer"):
            yield "optimizer", next(iter(distinct.values()))
            return
        for name, p in self.parameters.items():
            if p in objects:
                yield name, objects[p]


def _rate_of(group: Mapping[str, Any]) -> str:
    """What the optimizer calls its learning rate."""
    return "eta" if "eta" in group and "lr" not in group else "lr"  # as Pyro's AdagradRMSProp


def training_modes(programs: tuple[Any, ...]) -> list[tuple[nn.Module, bool]]:
    """Every module with whether it is in training mode."""
    return [(module, module.training) for _, module in modules_of(dict(enumerate(programs)))]


def _optimizer_state(optimizer: Any) -> State:
    inner: Optimizer = getattr(optimizer, "optimizer", optimizer)
    parameters = [p for group in inner.param_groups for p in group["params"]]
    return {
        "state": [copy.deepcopy(dict(inner.state.get(p, {}))) for p in parameters],
        "groups": [
            {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}
            for group in inner.param_groups
        ],
        "scheduler": copy.deepcopy(optimizer.state_dict()) if inner is not optimizer else None,
    }


def _load_optimizer(optimizer: Any, saved: Mapping[str, Any], in_place: bool) -> None:
    """Go back to a state; to that before the first step by zeros where a graph of steps holds the tensors."""
    inner: Optimizer = getattr(optimizer, "optimizer", optimizer)
    parameters = [p for group in inner.param_groups for p in group["params"]]
    for p, state in zip(parameters, saved["state"], strict=True):
        if not state:
            if in_place:  # what graphs can take begins with zeros
                for name, value in inner.state.get(p, {}).items():
                    if isinstance(value, Tensor):
                        value.zero_()
                    elif isinstance(value, int | float):
                        inner.state[p][name] = type(value)(0)
            else:
                inner.state.pop(p, None)
            continue
        live = inner.state[p]
        for name in [name for name in live if name not in state]:
            del live[name]
        for name, value in state.items():
            if isinstance(value, Tensor) and isinstance(live.get(name), Tensor):
                live[name].copy_(value)
            else:
                live[name] = value.to(p.device) if isinstance(value, Tensor) and value.dim() else copy.deepcopy(value)
    for group, settings in zip(inner.param_groups, saved["groups"], strict=True):
        group.update(copy.deepcopy(settings))
    if saved["scheduler"] is not None:
        optimizer.load_state_dict(copy.deepcopy(saved["scheduler"]))


def objective_state(loss: Any) -> State:
    """What an objective of this package remembers from step to step; nothing for Pyro's losses."""
    if not isinstance(loss, Objective):
        return {}
    return {
        "num_steps": loss.num_steps,
        "history": loss.history,
        "weights": {name: weight.state_dict() for name, weight in _stateful_weights(loss)},
    }


def load_objective(loss: Any, state: Mapping[str, Any], *, same: bool = True) -> None:
    """Put back what :func:`objective_state` gave; if it is not of the ``same`` loss, only the count and the history."""
    if not isinstance(loss, Objective) or (not same and not state):
        return
    loss.num_steps = state["num_steps"]
    if loss.history is not None and state["history"] is not None:
        loss.history.__dict__.update(copy.deepcopy(state["history"].__dict__))
    for name, weight in _stateful_weights(loss) if same else ():
        weight.load_state_dict(state["weights"][name])


def _stateful_weights(loss: Any) -> Iterator[tuple[str, Any]]:
    weight = getattr(loss, "kl_weight", None)
    weights = dict(weight) if isinstance(weight, Mapping) else {"": weight}
    for name, value in weights.items():
        if hasattr(value, "state_dict"):
            yield name, value
