"""What the sites of guide and model are given in a batched run, or when one of its particles is run again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
from pyro.distributions import Delta
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyro_elbo_ext.particles.vmap_draws import DrawMode


class CannotBatch(Exception):
    """The particles cannot be run as one batch; the message says why, and at which site.  Run them one by one."""


class Supply(Messenger):
    """Pyro messenger that supplies values to sites, and makes draws in a way that can be batched.

    To be entered around the programs, where it sees each site after their own handlers.

    Parameters
    ----------
    draws
        Guide site -> its value.
    indices
        Subsample site -> the distribution of the indices that is expected, and the indices.
    mode
        Under which the other sites are drawn; None outside ``torch.vmap``.
    detach
        Whether draws made under ``mode`` are constants to what follows.

    Attributes
    ----------
    site : str or None
        Where the programs have got to.
    """

    def __init__(
        self,
        draws: Mapping[str, Tensor],
        indices: Mapping[str, tuple[_Subsample, Tensor]],
        mode: DrawMode | None = None,
        *,
        detach: bool = False,
    ) -> None:
        super().__init__()
        self._draws = draws
        self._known = indices
        self._mode = mode
        self._detach = detach
        self.site: str | None = None

    def _pyro_sample(self, msg: Any) -> None:
        self.site = name = msg["name"]
        if msg["done"] or msg["is_observed"] or msg["value"] is not None:
            return
        fn, args, kwargs = msg["fn"], msg["args"], msg["kwargs"]
        if isinstance(fn, _Subsample):
            msg["value"] = self._indices(name, fn)
        elif name in self._draws:
            msg["value"] = self._draws[name]
            if type(fn) is Delta:
                msg["fn"] = Delta(msg["value"], fn.log_density, fn.event_dim)
        elif type(fn) is Delta and not args and not kwargs:
            msg["value"] = fn.v  # itself, by which score_parts knows its own draw
        elif self._mode is not None:
            with self._mode:
                value = fn(*args, **kwargs)
            msg["value"] = value.detach() if self._detach else value
        msg["done"] = msg["value"] is not None

    def _indices(self, name: str, fn: _Subsample) -> Tensor | None:
        if not subsamples(fn) or (self._mode is None and name not in self._known):
            return None  # all indices, the same for each particle; or an ordinary run of a plate not seen before
        expected, indices = self._known.get(name, (None, None))
        if expected is None or (fn.size, fn.subsample_size) != (expected.size, expected.subsample_size):
            raise CannotBatch(
                f"plate '{name}' subsamples {fn.subsample_size} of {fn.size}, which is not as in the run before: the "
                "structure varies"
            )
        return indices

    def _pyro_param(self, msg: Any) -> None:
        store = pyro.get_param_store()
        if self._mode is not None and msg["name"] not in store and getattr(msg["fn"], "__self__", None) is store:
            raise CannotBatch(
                f"parameter '{msg['name']}' does not exist yet, and would be made for one particle only: the structure "
                "varies"
            )


def subsamples(fn: _Subsample) -> bool:
    """Whether a plate takes fewer indices than there are."""
    return fn.subsample_size is not None and fn.subsample_size < fn.size
