"""Runs that leave the caller's random numbers, and parameters, as they were."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import pyro
import torch


@contextmanager
def torch_kept() -> Iterator[None]:
    """The generators of torch, on all devices in use, are put back after."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        yield


def taken_down() -> Callable[[], None]:
    """Take down the generators of torch, on all devices in use; what is returned puts them back."""
    state = torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def put_back() -> None:
        torch.set_rng_state(state)
        if devices:
            torch.cuda.set_rng_state_all(devices)

    return put_back


@contextmanager
def kept() -> Iterator[None]:
    """The generators of torch, numpy and random are put back after."""
    state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 (Pyro seeds the global one)
    try:
        with torch_kept():
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)  # noqa: NPY002


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of torch, numpy and random from a seed, 0 to 2**32 - 1; the generators are put back after."""
    with kept():
        pyro.set_rng_seed(seed)
        yield


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Random numbers from a seed; generators and the parameter store are put back after."""
    store = pyro.get_param_store()
    with store.scope(store.get_state()), seeded(seed):
        yield


@contextmanager
def untouched(seed: int | None) -> Iterator[None]:
    """Autograd off, the parameter store put back; with a seed, random numbers from it and the generators put back."""
    store = pyro.get_param_store()
    with torch.no_grad(), store.scope(store.get_state()), nullcontext() if seed is None else seeded(seed):
        yield
