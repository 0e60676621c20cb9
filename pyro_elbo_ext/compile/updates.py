"""The optimizers' updates as functions of tensors, equal to those of torch and Pyro in the order of their operations.

The state stays in the optimizer: its own tensors are inputs of the graph and are written in place. Learning rates are
inputs too, so that schedulers need no other graph; the remaining settings are constants of the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.optim import PyroOptim
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer
from torch.optim import optimizer as _optimizer
from torch.utils._pytree import tree_leaves

Settings = dict[str, Any]
# (parameter, gradient, state tensors, learning rate) -> their new values
Update = Callable[[Tensor, Tensor, list[Tensor], Tensor], tuple[Tensor, list[Tensor]]]


@dataclass(slots=True)
class Rule:
    """How one parameter is updated.

    Attributes
    ----------
    optimizer, group
        What holds the parameter, and its settings.
    parameter : Tensor
        The parameter.
    tensors : list of Tensor
        The optimizer's state that the update reads and writes.
    update : callable
        The update.
    counts : bool
        Whether the optimizer keeps its step, ``state["step"]``, as a number, which stands last in ``tensors`` as a copy.
    decay : float
        The learning rate is multiplied by it before each step.
    frozen : dict
        The settings that the update was made with.
    """

    optimizer: Optimizer
    group: dict[str, Any]
    parameter: Tensor
    tensors: list[Tensor]
    update: Update
    counts: bool = False
    decay: float = 1.0
    frozen: Settings = field(default_factory=dict)

    @property
    def has_other_settings(self) -> bool:
        """Whether a setting beside the learning rate has changed since, or that is no number any more."""
        return not isinstance(self.group["lr"], float | int) or self.frozen != _settings(self.group)


class Unsupported(Exception):
    """Says why an optimizer has no update here."""


_KINDS = (Adam, AdamW, ClippedAdam, SGD)


def check_supported(optimizer: Optimizer) -> None:
    """Look at an optimizer before its state.

    Raises
    ------
    Unsupported
        If it is none of those that can be in a graph, or if a graph would leave out what hangs on its steps.
    """
    if type(optimizer) not in _KINDS:
        raise Unsupported("only Adam, AdamW, ClippedAdam and SGD are")
    hooks = [
        name for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks") if getattr(optimizer, name, None)
    ]
    if hooks or _optimizer._global_optimizer_pre_hooks or _optimizer._global_optimizer_post_hooks:
        raise Unsupported("its steps have hooks")


def check_evaluates_once(optim: PyroOptim) -> None:
    """Raise ValueError for an optimizer that evaluates the loss several times a step."""
    constructor = optim.pt_optim_constructor
    if isinstance(constructor, type) and issubclass(constructor, LBFGS):
        raise ValueError(
            f"optim must not be {constructor.__name__}: it evaluates the loss several times a step, which SVI does not let "
            "it. Use Adam."
        )


def rule_for(optimizer: Optimizer, parameter: Tensor, clip: Settings) -> Rule:
    """The rule of a parameter that the optimizer has updated at least once.

    Raises
    ------
    Unsupported
        If a setting is not among those that can be in a graph.
    """
    (group,) = [group for group in optimizer.param_groups if any(parameter is p for p in group["params"])]
    state = optimizer.state.get(parameter, {})
    if not isinstance(group["lr"], float | int):
        raise Unsupported(f"its learning rate is a {type(group['lr']).__name__}, not a number")
    of_tensors = [name for name, value in group.items() if name != "params" and _has_tensor(value)]
    if of_tensors:
        raise Unsupported(f"its {of_tensors[0]} are tensors, not numbers")
    if parameter.is_complex() or parameter.is_sparse:
        raise Unsupported("a parameter is complex or sparse")
    if set(clip) - {"clip_norm", "clip_value"}:
        raise Unsupported(f"its clip_args {clip!r} are unknown")
    unusual = [name for name in ("capturable", "differentiable", "fused") if group.get(name)]
    if unusual:
        raise Unsupported(f"it has the option {unusual[0]}")
    kind = type(optimizer)
    tensors: list[Tensor]
    if kind in (Adam, AdamW):
        names = ["step", "exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
        tensors = [state[name] for name in names]
        decoupled = bool(group.get("decoupled_weight_decay", kind is AdamW))
        rule = Rule(optimizer, group, parameter, tensors, _adam(dict(group), decoupled))
    elif kind is SGD:
        tensors = [state["momentum_buffer"]] if group["momentum"] else []
        rule = Rule(optimizer, group, parameter, tensors, _sgd(dict(group)))
    elif kind is ClippedAdam:
        step = torch.tensor(float(state["step"]), dtype=torch.float64)
        tensors = [state["exp_avg"], state["exp_avg_sq"], step]
        rule = Rule(optimizer, group, parameter, tensors, _clipped_adam(dict(group)), True, group["lrd"])
    else:
        raise AssertionError(kind)  # check_supported knows no other
    rule.frozen = _settings(group)
    if clip:
        rule.update = _clipped(rule.update, clip)
    return rule


def _has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


def _settings(group: dict[str, Any]) -> Settings:
    return {name: value for name, value in group.items() if name not in ("params", "lr", "initial_lr")}


def _adam(of: Settings, decoupled: bool) -> Update:
    (beta1, beta2), eps, decay = of["betas"], of["eps"], of["weight_decay"]

    def update(p: Tensor, g: Tensor, state: list[Tensor], lr: Tensor) -> tuple[Tensor, list[Tensor]]:
        step, mean, square, *largest = state
        g = -g if of["maximize"] else g
        step = step + 1
        if decay != 0 and decoupled:
            p = p * (1 - lr * decay).to(p.dtype)
        elif decay != 0:
            g = g.add(p, alpha=decay)
        mean = torch.lerp(mean, g, 1 - beta1)
        square = (square * beta2).addcmul(g, g, value=1 - beta2)
        count = step.double()
        size = _kept(-(lr / (1 - beta1**count)), p)
        root = _kept(torch.sqrt(1 - beta2**count), p)
        if largest:
            largest = [torch.maximum(largest[0], square)]
        denominator = (largest[0] if largest else square).sqrt() / root + eps
        return _addcdiv(p, mean, denominator, size), [step, mean, square, *largest]

    return update


def _sgd(of: Settings) -> Update:
    momentum, decay = of["momentum"], of["weight_decay"]

    def update(p: Tensor, g: Tensor, state: list[Tensor], lr: Tensor) -> tuple[Tensor, list[Tensor]]:
        g = -g if of["maximize"] else g
        if decay != 0:
            g = g.add(p, alpha=decay)
        if momentum != 0:
            buffer = (state[0] * momentum).add(g, alpha=1 - of["dampening"])
            g = g.add(buffer, alpha=momentum) if of["nesterov"] else buffer
            state = [buffer]
        return p - lr.to(p.dtype) * g, state

    return update


def _clipped_adam(of: Settings) -> Update:
    (beta1, beta2), eps, decay, bound = of["betas"], of["eps"], of["weight_decay"], of["clip_norm"]

    def update(p: Tensor, g: Tensor, state: list[Tensor], lr: Tensor) -> tuple[Tensor, list[Tensor]]:
        mean, square, count = state
        g = g.clamp(-bound, bound)
        count = count + 1
        if decay != 0:
            g = g.add(p, alpha=decay)
        mean = (mean * beta1).add(g, alpha=1 - beta1)
        square = (square * beta2).addcmul(g, g, value=1 - beta2)
        size = _kept(-(lr * torch.sqrt(1 - beta2**count) / (1 - beta1**count)), p)
        return _addcdiv(p, mean, square.sqrt() + eps, size), [mean, square, count]

    return update


def _addcdiv(p: Tensor, numerator: Tensor, denominator: Tensor, value: Tensor) -> Tensor:
    """``torch.addcdiv``, which takes no tensor for ``value``."""
    return p + value * numerator / denominator


_LARGE = 1024  # elements


def _kept(scalar: Tensor, p: Tensor) -> Tensor:
    """A scalar of the update in the dtype of ``p``, computed once where ``p`` is large.

    Inductor would compute it, powers and all, again for every vector of elements of ``p``: a C++ compiler cannot take it out
    of the loop, as it may depend on what the loop writes. A view by strides is what Inductor makes a buffer for.
    """
    scalar = scalar.to(p.dtype)
    return scalar if p.numel() < _LARGE else torch.as_strided(scalar, scalar.shape, scalar.stride())


def _clipped(update: Update, clip: Settings) -> Update:
    """Clip the gradient first, as ``PyroOptim`` does with its ``clip_args``."""

    def clipped(p: Tensor, g: Tensor, state: list[Tensor], lr: Tensor) -> tuple[Tensor, list[Tensor]]:
        if clip.get("clip_norm") is not None:
            norm = torch.linalg.vector_norm(g, 2.0)
            g = g * torch.clamp(clip["clip_norm"] / (norm + 1e-6), max=1.0)
        if clip.get("clip_value") is not None:
            g = g.clamp(-clip["clip_value"], clip["clip_value"])
        return update(p, g, state, lr)

    return clipped
