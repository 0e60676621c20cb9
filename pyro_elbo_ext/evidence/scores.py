"""Draws with their log densities, put together of chunks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
NO_ARRAY = "site '{}' is not in every draw, or varies in shape: there is no array of draws"


class Scores(NamedTuple):
    """Draws and their log densities, in nats.

    Attributes
    ----------
    values : dict of str to Tensor
        Latent and deterministic sites of the model, shape ``(S, *plates, *event)``.
    log_p, log_q : ndarray
        ``log p(x, z)`` and ``log q(z)``, shape ``(S,)``, summed over sites in float64.
    log_prior : ndarray
        The latent sites' share of ``log_p``, shape ``(S,)``.
    local : dict of str to ndarray
        Plate to the log weights of each of its indices, shape ``(S, size)``; see `Scorer.not_local`.
    """

    values: dict[str, Tensor]
    log_p: Array
    log_q: Array
    log_prior: Array
    local: dict[str, Array]


class Joined:
    """Scores of chunks of draws, one after the other, copied into their places as they come.

    Small tensors kept of every chunk would lie among the large ones that are freed, and hold the process's memory.
    """

    def __init__(self, count: int) -> None:
        self.count, self.done = count, 0
        self._values: dict[str, Tensor] = {}
        self._sums = np.empty((3, count))
        self._local: dict[str, Array] = {}

    def add(self, chunk: Scores) -> None:
        there = slice(self.done, self.done + len(chunk.log_p))
        if self.done == 0:
            self._values = {
                name: value.new_empty((self.count, *value.shape[1:])) for name, value in chunk.values.items()
            }
            self._local = {plate: np.empty((self.count, local.shape[1])) for plate, local in chunk.local.items()}
        for name, whole in self._values.items():
            value = chunk.values.get(name)
            if value is None or value.shape[1:] != whole.shape[1:]:
                raise ValueError(NO_ARRAY.format(name))
            if value.dtype != whole.dtype:
                self._values[name] = whole = whole.to(torch.promote_types(value.dtype, whole.dtype))
            whole[there] = value
        for row, sums in zip(self._sums, (chunk.log_p, chunk.log_q, chunk.log_prior), strict=True):
            row[there] = sums
        self._local = {plate: local for plate, local in self._local.items() if plate in chunk.local}
        for plate, local in self._local.items():
            local[there] = chunk.local[plate]
        self.done = there.stop

    def scores(self) -> Scores:
        log_p, log_q, log_prior = self._sums
        return Scores(self._values, log_p, log_q, log_prior, self._local)
