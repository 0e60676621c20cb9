"""Random numbers for several processes, made from a seed and the step alone.

Each step has its own stream, so that a resumed run draws what the uninterrupted one would have drawn without any process
keeping the state of its generator; and the program's own generator, which may shuffle its data, is left as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

Purpose = Literal["step", "evaluation"]
_PURPOSES = ("step", "evaluation")


class RandomStreams:
    """The streams of one process.

    Parameters
    ----------
    seed
        The same in all processes.
    rank
        Number of this process.
    shared
        Whether all processes draw alike what is not inside a subsampled plate.
    """

    def __init__(self, seed: int, rank: int, shared: bool) -> None:
        self.seed, self.rank, self.shared = seed, rank, shared

    def seed_at(self, count: int, purpose: Purpose = "step", rank: int | None = None) -> int:
        """What ``torch.manual_seed`` is called with before step (or evaluation) number ``count``.

        ``rank`` is this process if it is not given; shared draws are those of process 0.
        """
        if rank is None:
            rank = 0 if self.shared else self.rank
        return self._mix(count, _PURPOSES.index(purpose), rank)

    def _mix(self, *key: int) -> int:
        return int(np.random.SeedSequence(self.seed, spawn_key=key).generate_state(1)[0])

    @contextmanager
    def at(self, count: int, purpose: Purpose = "step") -> Iterator[None]:
        """Draw from the stream of that step; afterwards the generators are as they were."""
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.seed_at(count, purpose))
            if not self.shared:
                yield
                return
            own = self._mix(count, _PURPOSES.index(purpose), self.rank, 1)
            with _OwnDraws(own):
                yield


class _OwnDraws(Messenger):
    """Draws subsamples, and sites inside subsampled plates, from a generator of the process's own."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed
        self._own: list[Tensor] | None = None
        self._shared: list[Tensor] | None = None

    def _pyro_sample(self, msg: Any) -> None:
        if msg["done"] or msg["value"] is not None or not (site_is_subsample(msg) or is_split(msg)):
            return
        self._shared = _state()
        if self._own is None:
            torch.manual_seed(self._seed)
        else:
            _set_state(self._own)

    def _pyro_post_sample(self, msg: Any) -> None:
        if self._shared is not None:
            self._own = _state()
            _set_state(self._shared)
            self._shared = None


def is_split(site: Any) -> bool:
    """Whether a site is inside a plate that holds a part of its data only."""
    return any(frame.full_size is not None and frame.size < frame.full_size for frame in site["cond_indep_stack"])


def _state() -> list[Tensor]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return states


def _set_state(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])
