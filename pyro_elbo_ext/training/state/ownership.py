"""The numbers that model and guide had at the end of a fit, and how to run them with these again, whatever came since.

Pyro finds parameters by name in one store, and modules hold their own tensors: a later fit, a cleared store or further
training would otherwise change what a result gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_elbo_ext.terms.registration import modules_of

_NAMED = 5  # parameters that a sentence names


class Ownership:
    """Copies of all that programs are trained in: parameters, and the parameters and buffers of modules they reach.

    Parameters
    ----------
    model, guide
        The programs.
    parameters
        Name to unconstrained tensor, as the programs have them now.
    """

    def __init__(self, model: Callable[..., Any], guide: Callable[..., Any], parameters: Mapping[str, Tensor]) -> None:
        self._programs = {"model": model, "guide": guide}
        self._live: dict[str, Tensor] = dict(parameters)
        self._paths: dict[str, str] = {}  # of a module's tensor -> its name here
        names = {id(tensor): name for name, tensor in self._live.items()}
        for path, slots, key in _slots(self._programs):
            tensor = slots[key]
            name = names.setdefault(id(tensor), path)
            self._live.setdefault(name, tensor)
            self._paths[path] = name
        self._values = {name: tensor.detach().clone() for name, tensor in self._live.items()}
        store = pyro.get_param_store()
        # one tensor may have several names in the store
        self._in_store = {name: names[id(p)] for name, p in store._params.items() if id(p) in names}
        self._constraints = {name: store._constraints[name] for name in self._in_store}

    def of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The copies of these tensors of the programs, by the names given."""
        names = {id(tensor): name for name, tensor in self._live.items()}
        return {
            name: self._values[names[id(tensor)]] if id(tensor) in names else tensor.detach().clone()
            for name, tensor in tensors.items()
        }

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Run what is inside with these numbers; afterwards parameters, modules and the store are as they were.

        Raises
        ------
        ValueError
            Inside, where a program uses a parameter that it did not have when the copies were made; it is named.
        """
        found = self._found()
        held = [(slots, key, slots[key]) for _, slots, key in _slots(self._programs)]
        before: list[tuple[Tensor, Tensor]] = []
        try:
            for tensor, name in found:
                before.append((tensor, tensor.data))
                tensor.data = self._values[name].clone()  # the same object, so that all who hold it see it
            own = {id(tensor) for tensor, _ in found}
            with pyro.get_param_store().scope(self._state()), _Known({*self._live, *self._in_store}, own):
                yield
        finally:
            for tensor, data in before:
                tensor.data = data
            for slots, key, tensor in held:  # Pyro gives a module what the store has
                slots[key] = tensor

    def restore(self) -> None:
        """Give the programs' modules and the parameter store these tensors again, with the copies' values."""
        with torch.no_grad():
            for name, tensor in self._live.items():
                tensor.copy_(self._values[name])
        for path, slots, key in _slots(self._programs):
            if path in self._paths:
                slots[key] = self._live[self._paths[path]]
        pyro.get_param_store().set_state(self._state())

    def _state(self) -> dict[str, Any]:
        """Of the parameter store, with the programs' own tensors."""
        return {
            "params": {name: self._live[key] for name, key in self._in_store.items()},
            "constraints": dict(self._constraints),
        }

    def changed(self) -> list[str]:
        """Names of the parameters and buffers that are no longer these; in the store, those that have other values."""
        names = {name: None for tensor, name in self._found() if not _same(tensor, self._values[name])}
        store = pyro.get_param_store()._params
        for name, key in self._in_store.items():
            other = store.get(name)
            if other is not None and other is not self._live[key] and not _same(other, self._values[key]):
                names[name] = None
        in_modules = set(self._paths.values())
        names.update(
            {name: None for name, key in self._in_store.items() if name not in store and key not in in_modules}
        )
        return list(names)

    def _found(self) -> list[tuple[Tensor, str]]:
        """The programs' tensors with their names: the ones that were there, and what stands in their place by now."""
        found = {id(tensor): (tensor, name) for name, tensor in self._live.items()}
        for path, slots, key in _slots(self._programs):
            tensor, name = slots[key], self._paths.get(path)
            if name is not None and id(tensor) not in found:  # a copy of the programs, as after unpickling
                if tensor.shape != self._values[name].shape:
                    raise ValueError(
                        f"'{path}' has shape {tuple(tensor.shape)} now, {tuple(self._values[name].shape)} at the end of "
                        "the fit: model and guide are no longer those of this result"
                    )
                found[id(tensor)] = tensor, name
        return list(found.values())


class _Known(Messenger):
    """Refuses parameters that were not there, whose values would be new ones, and modules that hold other tensors."""

    def __init__(self, names: set[str], own: set[int]) -> None:
        super().__init__()
        self.names, self.own = names, own

    def _pyro_param(self, msg: Any) -> None:
        if pyro.settings.get("module_local_params"):
            return
        name, given = msg["name"], msg["args"][1] if len(msg["args"]) > 1 else None
        held = pyro.get_param_store()._params.get(name)
        if name not in self.names and id(given) not in self.own and id(held) not in self.own:
            raise ValueError(
                f"parameter '{name}' is new: model and guide did not have it at the end of the fit, so that this result has "
                "no value of it. Fit again."
            )
        if "$$$" in name and isinstance(given, nn.Parameter) and id(given) not in self.own:
            raise ValueError(
                f"the module of parameter '{name}' is another one than at the end of the fit, and this result has no values "
                "of its tensors. Fit again."
            )


def said(names: Sequence[str]) -> str:
    """Names for a sentence, the first few of many."""
    rest = len(names) - _NAMED
    return ", ".join(f"'{name}'" for name in names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _slots(programs: object) -> Iterator[tuple[str, dict[str, Tensor], str]]:
    """Where modules that programs reach hold parameters and buffers: path, dictionary and key."""
    for path, module in modules_of(programs):
        for prefix, part in module.named_modules(prefix=path, remove_duplicate=False):
            for slots in (part._parameters, part._buffers):
                yield from ((f"{prefix}.{key}", slots, key) for key, tensor in slots.items() if tensor is not None)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a.detach(), b.to(a.device)))
