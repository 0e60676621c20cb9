"""Which sampled values does a site's prior depend on?  Tracked on the very run that is evaluated.

The analytic ``KL(q(z) || p(z | parents))`` is right only if no parent of ``z`` in the model was itself drawn from ``z`` in
the guide. So what is needed is the set of sites whose *values* flow into the prior of ``z``, through any computation,
integer indexing and control flow included. Autograd does not see those two, and site order says little.

:class:`DependencyTracker` follows values below autograd, at the level of ATen operators, on the tensors themselves: it
wraps nothing, so it changes no type, no value and no random draw, and needs no second run of the model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

Sites = frozenset[str]
_NONE: Sites = frozenset()
_PYTHON_READS = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__)


class DependencyTracker(Messenger):
    """Pyro messenger that records, for every tensor made while it is active, the sample sites it was computed from.

    Use it as a context manager around the runs of guide and model, and ask :meth:`of_prior` before leaving it.

    Dependencies are transitive: a value drawn from a distribution whose parameters came from site ``a`` depends on ``a``.
    They are per site, not per plate element, so they may name more than the true parents but not fewer. A value that the
    program reads into Python (``.item()``, ``bool``, ``.tolist()``, ``.numpy()``) can steer anything that follows, so
    every later site is taken to depend on it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._of_tensor: Any = WeakTensorKeyDictionary()
        self._of_storage: dict[int, Sites] = {}  # written in place: every view of the storage depends on it
        self._read_by_python: Sites = _NONE
        self._in_guide = True
        self._steered: dict[str, Sites] = {}  # site -> what Python had read by then; the model's record comes last
        self._modes = (_OperatorMode(self._follow), _ReadMode(self._read))

    def __enter__(self) -> DependencyTracker:
        for mode in self._modes:
            mode.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        for mode in reversed(self._modes):
            mode.__exit__(*exc)

    def enter_model(self) -> None:
        """Mark the end of the guide's run: what the guide read into Python steers no site of the model."""
        self._read_by_python, self._in_guide = _NONE, False

    def _pyro_post_sample(self, msg: Any) -> None:
        self._steered[msg["name"]] = self._read_by_python
        if msg["is_observed"] or site_is_subsample(msg) or not isinstance(msg["value"], torch.Tensor):
            return
        sites = self._read_by_python | {msg["name"]}
        if self._in_guide and ("_enumerate_dim" in msg["infer"] or "_enum_total" in msg["infer"]):
            sites |= self.of_prior(msg)  # its values are fixed, but how much each counts is computed from these
        self._add(msg["value"], sites)

    def of(self, *tensors: object) -> Sites:
        """Sites whose values the tensors were computed from; anything that is not a tensor depends on none."""
        sites = _NONE
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                sites |= self._of_tensor.get(tensor, _NONE)
                if self._of_storage and tensor.layout is torch.strided:
                    sites |= self._of_storage.get(tensor.untyped_storage()._cdata, _NONE)
        return sites

    @torch.no_grad()
    def of_prior(self, site: dict[str, Any]) -> Sites:
        """Sites that the density at a model site depends on, other than through the site's own value.

        Parameters
        ----------
        site : dict
            A sample site of a model trace recorded while the tracker was active.
        """
        value = site["value"].detach().clone()
        self._of_tensor.pop(value, None)  # the clone is a constant: what remains comes from the distribution
        log_prob = site["fn"].log_prob(value, *site["args"], **site["kwargs"])
        return self.of(log_prob, site["scale"], site["mask"]) | self._steered.get(site["name"], _NONE)

    def _add(self, tensor: torch.Tensor, sites: Sites) -> None:
        self._of_tensor[tensor] = self._of_tensor.get(tensor, _NONE) | sites

    def _follow(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        sites = self.of(*tree_leaves((args, kwargs)))
        if not sites:
            return
        if func is torch.ops.aten._local_scalar_dense.default:
            self._read(sites)
            return
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor, sites)
        if func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.is_write and isinstance(value, torch.Tensor) and value.layout is torch.strided:
                    key = value.untyped_storage()._cdata
                    self._of_storage[key] = self._of_storage.get(key, _NONE) | sites

    def _read(self, read: Sites | torch.Tensor) -> None:
        if not _called_by_a_library_check():
            self._read_by_python |= self.of(read) if isinstance(read, torch.Tensor) else read


def _called_by_a_library_check() -> bool:
    """Whether the nearest caller outside this file is torch's or Pyro's Python code.

    Their argument checks read values (``if not valid.all()``) without letting them steer what is computed.
    """
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module != __name__ and not module.startswith(("torch._", "torch.utils", "torch.overrides")):
            return module.startswith(("torch.", "pyro."))
        frame = frame.f_back  # type: ignore[assignment]
    return True


class _OperatorMode(TorchDispatchMode):
    """Reports every ATen operator after it has run."""

    def __init__(self, follow: Callable[[Any, Any, Any, Any], None]) -> None:
        super().__init__()
        self._follow = follow

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._follow(func, args, kwargs, result)
        return result


class _ReadMode(TorchFunctionMode):
    """Reports the reads into Python that are not ATen operators."""

    def __init__(self, read: Callable[[torch.Tensor], None]) -> None:
        super().__init__()
        self._read = read

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PYTHON_READS:
            self._read(args[0])
        return func(*args, **(kwargs or {}))
