"""The parameters of a graph and their optimizers' state as they are now: what a step reads and writes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from pyro.optim import PyroLRScheduler, PyroOptim
from torch import Tensor, nn
from torch.optim import Optimizer

from pyro_elbo_ext.compile.updates import Rule, Unsupported, check_supported, rule_for


class WholeOptimizer(PyroOptim):
    """A torch optimizer that was made with all its parameters, behind Pyro's interface.

    Parameters that it does not have are not trained.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(type(optimizer), {})
        self.optimizer = optimizer
        self.optim_objs = {p: optimizer for group in optimizer.param_groups for p in group["params"]}

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """Take one step, whatever the parameters."""
        self.optimizer.step(*args, **kwargs)

    def get_state(self) -> dict[str, Any]:
        """The optimizer's ``state_dict``, by the name "optimizer"."""
        return {"optimizer": self.optimizer.state_dict()}

    def set_state(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`get_state` gave."""
        self.optimizer.load_state_dict(state_dict["optimizer"])


def portable(optim: PyroOptim) -> PyroOptim:
    """What can be copied and pickled in place of an optimizer that has parameters of the param store.

    It has their state by name, as ``PyroOptim.set_state`` takes it: the tensors that Pyro makes carry weak references, which
    no pickle takes. An optimizer whose parameters are all a module's is its own.
    """
    if all(isinstance(p, nn.Parameter) for p in optim.optim_objs) or isinstance(optim, WholeOptimizer):
        return optim
    found = copy.copy(optim)
    state = copy.deepcopy({name: of for name, of in optim.get_state().items() if name is not None})
    found._state_waiting_to_be_consumed = {**optim._state_waiting_to_be_consumed, **state}
    found.optim_objs, found.grad_clip = {}, {}
    return found


_OPTIMS = (PyroOptim, PyroLRScheduler, WholeOptimizer)


class Binding:
    """Parameters with their rules, as tensors in the order that a graph of steps takes them.

    Parameters
    ----------
    parameters
        Each with its name in the param store, or None if it is not there.
    optim
        Has updated every parameter that a gradient reached.

    Raises
    ------
    Unsupported
        If an optimizer cannot be part of a graph.
    """

    def __init__(self, parameters: Sequence[tuple[str | None, Tensor]], optim: PyroOptim, reached: list[bool]) -> None:
        for method in ("__call__", "_get_grad_clip"):
            if all(getattr(type(optim), method) is not getattr(of, method) for of in _OPTIMS):
                raise Unsupported(f"{type(optim).__name__} has a {method} of its own")
        self.optim = optim
        self.rules: list[Rule | None] = []
        self._parameters = [p for _, p in parameters]
        self.is_missing = False  # whether the optimizer has yet to see a parameter
        for (_, p), is_reached in zip(parameters, reached, strict=True):
            optimizer = _optimizer_of(optim, p)
            if optimizer is None:
                self.is_missing |= is_reached and not isinstance(optim, WholeOptimizer)
            else:
                check_supported(optimizer)
            has_state = optimizer is not None and len(optimizer.state.get(p, ())) > 0
            if optimizer is None or not (has_state or is_reached):
                self.rules.append(None)
                continue
            if not has_state and not _needs_no_state(optimizer, p):
                self.is_missing = True
                return
            clip = {} if isinstance(optim, WholeOptimizer) else dict(optim._get_grad_clip_args(p))
            self.rules.append(rule_for(optimizer, p, clip))
        used = [rule for rule in self.rules if rule is not None]
        self._states = [(rule.optimizer, rule.optimizer.state) for rule in used]
        self._used, self._counting = used, [rule for rule in used if rule.counts]
        self._counted = self._counts()
        self._decaying = _once([rule for rule in used if rule.decay != 1.0])
        device = parameters[0][1].device if parameters else torch.device("cpu")
        self._groups = list({id(rule.group): rule.group for rule in used}.values())
        self._seen = [dict(group) for group in self._groups]
        self.rates = [float(rule.group["lr"]) for rule in used]
        self.rate_tensor = torch.tensor(self.rates, dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.good = torch.ones((), dtype=torch.bool, device=device)

    def tensors(self) -> list[Tensor]:
        """The first inputs of a graph of steps, up to ``good``."""
        states = [tensor for rule in self.rules if rule is not None for tensor in rule.tensors]
        return [*self._parameters, *states, self.rate_tensor, self.count, self.good]

    def is_current(self) -> bool:
        """Whether the optimizers' state is still the same object; new learning rates are taken over.

        Raises
        ------
        Unsupported
            If another setting of an optimizer has changed, or its learning rate is no number any more.
        """
        for optimizer, state in self._states:
            if optimizer.state is not state:
                return False
        if self._counting and self._counts() != self._counted:  # another graph has taken steps since
            self.reload()
        if self._groups != self._seen:
            if any(rule.has_other_settings for rule in self._used):
                raise Unsupported("its settings, beside the learning rate, change from step to step")
            self._seen = [dict(group) for group in self._groups]
            self.rates = [float(rule.group["lr"]) for rule in self._used]
            self.rate_tensor.copy_(torch.tensor(self.rates, dtype=torch.float64))
        return True

    def reload(self) -> None:
        """Read the numbers that optimizers keep in Python again; the reverse of :meth:`advance`."""
        for rule in self._counting:
            rule.tensors[-1].fill_(float(rule.optimizer.state[rule.parameter]["step"]))
        self._counted = self._counts()

    def _counts(self) -> list[int]:
        return [rule.optimizer.state[rule.parameter]["step"] for rule in self._counting]

    def advance(self, steps: int) -> None:
        """Make the numbers that optimizers keep in Python what the graph has made its copies of them.

        From where they stood: if an exception from outside comes in the middle, :meth:`settle` does the rest.
        """
        if not self._counting:
            return
        counts, rates = [count + steps for count in self._counted], self.rates
        for rule, count in zip(self._counting, counts, strict=True):
            rule.optimizer.state[rule.parameter]["step"] = count
        if self._decaying:
            decays = {id(rule.group): rule.decay for rule in self._decaying}
            rates = []
            for rule, rate in zip(self._used, self.rates, strict=True):
                for _ in range(steps):
                    rate *= decays.get(id(rule.group), 1.0)
                rates.append(rate)
                rule.group["lr"] = rate
        seen = [dict(group) for group in self._groups] if self._decaying else self._seen
        vars(self).update(_counted=counts, rates=rates, _seen=seen)

    def settle(self) -> None:
        """Advance by the steps that the graph has taken since: after an exception has come in between."""
        if self._counting:
            self.advance(int(self._counting[0].tensors[-1]) - self._counted[0])


def _optimizer_of(optim: PyroOptim, p: Tensor) -> Optimizer | None:
    found = optim.optim_objs.get(p)
    return getattr(found, "optimizer", found)  # of a scheduler


def _needs_no_state(optimizer: Optimizer, p: Tensor) -> bool:
    return isinstance(optimizer, torch.optim.SGD) and not any(
        group["momentum"] for group in optimizer.param_groups if any(p is other for other in group["params"])
    )


def _once(rules: list[Rule]) -> list[Rule]:
    """One rule for each group of parameters."""
    return list({id(rule.group): rule for rule in rules}.values())
