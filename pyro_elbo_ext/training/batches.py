"""Where the arguments of each step come from: the same ones at each, a DataLoader, or any iterable of batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pyro_elbo_ext.training.state import State, random_state, random_state_kept, set_random_state

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Whole:
    """The same arguments at each step."""

    per_epoch: int | None = 1
    dataset_size: int | None = None
    epoch = 0

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.call = args, kwargs
        check_batch(self.call, "the arguments")

    def first(self) -> Call:
        """Arguments to look at model and guide with."""
        return self.call

    def next(self) -> Call:
        """Those of the next step."""
        return self.call

    def state_dict(self) -> State:
        """Nothing."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Nothing to do."""


class Batches:
    """Batches of a ``DataLoader`` or another iterable, epoch after epoch, to be resumed in the middle of one.

    A batch that is a tensor becomes the first argument, one that is a list or tuple the first arguments, one that is a
    mapping keyword arguments; the fixed arguments follow.

    The order of an epoch is that of the random state at its start. Resuming puts that back, skips the batches that have
    been used, and then puts back the random state of the checkpoint.
    """

    def __init__(self, source: Iterable[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if isinstance(source, Tensor | str | bytes | Mapping) or not hasattr(source, "__iter__"):
            raise TypeError(
                f"batches must be a DataLoader or an iterable of batches, not a {type(source).__name__}. A tensor with all "
                "the data is an argument of the model."
            )
        if hasattr(source, "__next__"):
            raise TypeError(
                "batches is an iterator, which one epoch uses up and no run can be resumed on. Pass a list, a DataLoader, "
                "or an object whose __iter__ starts anew."
            )
        self.source, self.args, self.kwargs = source, args, kwargs
        self.epoch, self.index = 0, 0  # of the next batch
        self._iterator: Iterator[Any] | None = None
        self._at_start: State = {}

    @property
    def per_epoch(self) -> int | None:
        """Batches in an epoch, None if that is not known."""
        try:
            return len(self.source)  # type: ignore[arg-type]
        except TypeError:
            return None

    @property
    def dataset_size(self) -> int | None:
        """Data in an epoch, None if that is not known."""
        if not isinstance(self.source, DataLoader):
            return None
        try:
            size = len(self.source.dataset)  # type: ignore[arg-type]
        except TypeError:
            return None
        batch = self.source.batch_size
        return size - size % batch if self.source.drop_last and batch and not _shuffles(self.source) else size

    def first(self) -> Call:
        """A batch to look at model and guide with; the random state and the order of the epochs stay as they are."""
        generator = self._generator_state()
        try:
            with random_state_kept():
                for batch in self.source:
                    return self._call(batch)
        finally:
            self._set_generator_state(generator)
        raise ValueError("batches is empty: there is nothing to fit to")

    def next(self) -> Call:
        """The next batch; after the last one the first of the next epoch."""
        for _ in range(2):
            if self._iterator is None:
                self._start_epoch()
            assert self._iterator is not None
            try:
                batch = next(self._iterator)
            except StopIteration:
                if self.index == 0:
                    raise ValueError(f"batches is empty in epoch {self.epoch}: there is nothing to fit to") from None
                self._iterator, self.epoch, self.index = None, self.epoch + 1, 0
                continue
            self.index += 1
            return self._call(batch)
        raise ValueError(f"batches is empty in epoch {self.epoch}: there is nothing to fit to")

    def _start_epoch(self) -> None:
        for sampler in (getattr(self.source, "sampler", None), getattr(self.source, "batch_sampler", None)):
            if sampler is not None and hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self.epoch)
        self._at_start = {"random": random_state(), "generator": self._generator_state()}
        self._iterator = iter(self.source)

    def _call(self, batch: Any) -> Call:
        return as_call(batch, self.args, self.kwargs, f"batch {self.index} of epoch {self.epoch}")

    def state_dict(self) -> State:
        """The place in the epoch, and the random state at its start."""
        return {"epoch": self.epoch, "index": self.index, "at_start": self._at_start if self._iterator else None}

    def load_state_dict(self, state: State) -> None:
        """Go to a place; the caller sets the random state afterwards."""
        self.epoch, self.index, self._iterator = state["epoch"], state["index"], None
        if state["at_start"] is None:
            return
        set_random_state(state["at_start"]["random"])
        self._set_generator_state(state["at_start"]["generator"])
        self._start_epoch()
        assert self._iterator is not None
        skipped = sum(1 for _ in itertools.islice(self._iterator, self.index))
        if skipped < self.index:
            raise ValueError(
                f"the checkpoint is at batch {self.index} of epoch {self.epoch}, but batches has only {skipped}: resume "
                "with the same data"
            )

    def _generator_state(self) -> Tensor | None:
        generator = getattr(self.source, "generator", None)
        return generator.get_state() if isinstance(generator, torch.Generator) else None

    def _set_generator_state(self, state: Tensor | None) -> None:
        if state is not None:
            self.source.generator.set_state(state)  # type: ignore[attr-defined]


def _shuffles(loader: DataLoader[Any]) -> bool:
    return not isinstance(loader.sampler, torch.utils.data.SequentialSampler)


def as_call(batch: Any, args: tuple[Any, ...], kwargs: dict[str, Any], what: str) -> Call:
    """A batch with the fixed arguments that follow it; ``what`` is its name in errors."""
    if isinstance(batch, Mapping):
        call = args, {**{str(key): value for key, value in batch.items()}, **kwargs}
    elif isinstance(batch, list | tuple):
        call = (*batch, *args), kwargs
    else:
        call = (batch, *args), kwargs
    check_batch(call, what)
    return call


def named_arguments(call: Call) -> Iterator[tuple[str, Any]]:
    """Every argument, with what errors call it."""
    args, kwargs = call
    yield from ((f"argument {i}", value) for i, value in enumerate(args))
    yield from kwargs.items()


def batch_length(call: Call) -> int | None:
    """Length of the first tensor among the arguments, None if there is none."""
    return next((len(value) for _, value in named_arguments(call) if isinstance(value, Tensor) and value.dim()), None)


def check_batch(call: Call, what: str) -> None:
    """Raise a ValueError if a tensor among the arguments has no rows, naming it.  Rows may be empty: no covariates."""
    for name, value in named_arguments(call):
        if isinstance(value, Tensor) and value.dim() and len(value) == 0:
            raise ValueError(f"{what}: {name} is empty, of shape {tuple(value.shape)}")
