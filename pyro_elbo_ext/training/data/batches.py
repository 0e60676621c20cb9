"""Where the arguments of each step come from: the same ones at each, a DataLoader, or any iterable of batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from pyro_elbo_ext.programs.arguments import named_arguments
from pyro_elbo_ext.programs.randomness import seeded
from pyro_elbo_ext.training import processes
from pyro_elbo_ext.training.state.state import State, random_state, random_state_kept, set_random_state

Call = tuple[tuple[Any, ...], dict[str, Any]]
Rows = dict[int | str, int]  # argument of a batch, by place or name -> rows in it

_EXAMPLES = 20  # sizes of batches that are looked at before the first step


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

    def seeded_first(self) -> Call:
        """Those to compare programs with."""
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
        check_source(source, "batches")
        self.source, self.args, self.kwargs = source, args, kwargs
        self.epoch, self.index = 0, 0  # of the next batch
        self.check: Callable[[Call, Rows], None] | None = None  # called with the first batch of each size
        self.at_epoch_end: Callable[[], None] | None = None
        self.order = _order(source)
        self.first_batch: Any = None  # as `first` found it
        self._checked: set[tuple[Any, ...]] = set()
        self._rows: list[Rows] | None = None  # of the batches of an epoch, as far as they are known
        if isinstance(source, list | tuple):
            self._rows = [rows_of(batch) for batch in source]
        self._counted: list[Rows] | None = None  # of this epoch, if it is seen from the start
        self._odd: dict[int, Tensor] = {}  # the data of the smallest batches of the last epoch, by place
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
        """Data in an epoch, None if the source does not say it."""
        if not isinstance(self.source, DataLoader):
            return None
        try:
            size = len(self.source.dataset)  # type: ignore[arg-type]
        except TypeError:
            return None
        if self.source.batch_size is None:  # of batches, or of single data
            return None
        if isinstance(self.source.sampler, SubsetRandomSampler):
            size = len(self.source.sampler)
        batch = self.source.batch_size
        return size - size % batch if self.source.drop_last and self.order is Order.FIXED else size

    def rows_of_epoch(self, name: int | str) -> list[int] | None:
        """Rows of each batch of an epoch, in the argument of this name; None if not known, or in several processes."""
        if processes.world_size() > 1:
            return None
        sizes = self._sizes_of_loader()
        if sizes is not None:
            return sizes
        if self._rows is None or any(name not in rows for rows in self._rows):
            return None
        return [rows[name] for rows in self._rows]

    def _sizes_of_loader(self) -> list[int] | None:
        loader = self.source
        if not isinstance(loader, DataLoader) or type(loader.batch_sampler) is not BatchSampler:
            return None
        try:
            count = len(loader.sampler)  # type: ignore[arg-type]
        except TypeError:
            return None
        assert loader.batch_size is not None
        rest = 0 if loader.drop_last else count % loader.batch_size
        return [loader.batch_size] * (count // loader.batch_size) + [rest] * (rest > 0)

    def examples(self) -> Iterator[Any]:
        """One batch of each size, as far as they can be had without going through all data."""
        if isinstance(self.source, list | tuple):
            assert self._rows is not None
            seen: list[Rows] = []
            for batch, rows in zip(self.source, self._rows, strict=True):
                if rows not in seen and len(seen) < _EXAMPLES:
                    seen.append(rows)
                    yield batch
            return
        sizes, loader = self._sizes_of_loader(), self.source
        if sizes and sizes[-1] != sizes[0] and isinstance(loader, DataLoader) and not _iterable(loader.dataset):
            yield loader.collate_fn([loader.dataset[i] for i in range(sizes[-1])])

    def look(self, batch: Any) -> None:
        """Have a batch checked, if it is the first of its size."""
        if self.check is None:
            return
        rows = rows_of(batch)
        key = tuple(rows.items())
        if key in self._checked:
            return
        self._checked.add(key)
        sizes = self._sizes_of_loader()
        if sizes is not None:  # these are the rows; other tensors may have other lengths
            rows = {name: count for name, count in rows.items() if count in (sizes[0], sizes[-1])}
        self.check(self._call(batch), rows)

    def first(self) -> Call:
        """A batch to look at model and guide with; the random state and the order of the epochs stay as they are."""
        try:
            self.first_batch = self.first_raw()
        except StopIteration:
            raise ValueError("batches is empty: there is nothing to fit to") from None
        return self._call(self.first_batch)

    def first_raw(self) -> Any:
        """The first batch as the source gives it; the random state and the order of the epochs stay as they are.

        Raises
        ------
        StopIteration
            If there is none.
        """
        generator = self._generator_state()
        try:
            with random_state_kept():
                return next(iter(self.source))
        finally:
            self._set_generator_state(generator)

    def seeded_first(self) -> Call:
        """The first batch under one seed: the same in each run, as far as the order hangs on torch, NumPy and random."""
        generator = self._generator_state()
        try:
            with seeded(0):
                if generator is not None:
                    self.source.generator.manual_seed(0)  # type: ignore[attr-defined]
                return self._call(next(iter(self.source)))
        finally:
            self._set_generator_state(generator)

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
                self._end_epoch()
                self._iterator, self.epoch, self.index = None, self.epoch + 1, 0
                continue
            self.look(batch)
            self._count(batch)
            self.index += 1
            return self._call(batch)
        raise ValueError(f"batches is empty in epoch {self.epoch}: there is nothing to fit to")

    def _start_epoch(self) -> None:
        for sampler in (getattr(self.source, "sampler", None), getattr(self.source, "batch_sampler", None)):
            if sampler is not None and hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self.epoch)
        self._at_start = {"random": random_state(), "generator": self._generator_state()}
        self._counted = []
        self._iterator = iter(self.source)

    def _count(self, batch: Any) -> None:
        """Note the rows of a batch, where the source does not say them, and see whether the order is always the same."""
        if self.order is not Order.UNKNOWN or self.check is None:
            return
        rows = rows_of(batch)
        if self._rows is None:
            if self._counted is not None:
                self._counted.append(rows)
            return
        if not rows or rows != self._smallest or len(self._odd) > _EXAMPLES:
            return
        data = next((value for value in _values(batch) if isinstance(value, Tensor)), None)
        before = self._odd.get(self.index)
        if data is None:
            return
        if before is not None and before.shape == data.shape and torch.equal(before, data):
            self.order = Order.FIXED
            self._end_epoch()
        self._odd[self.index] = data.detach().clone()

    def _end_epoch(self) -> None:
        if self._rows is None and self._counted:
            self._rows = self._counted
            self._smallest = min(self._rows, key=lambda rows: min(rows.values(), default=0))
        if self.at_epoch_end is not None:
            self.at_epoch_end()

    _smallest: Rows | None = None

    def _call(self, batch: Any) -> Call:
        return as_call(batch, self.args, self.kwargs, f"batch {self.index} of epoch {self.epoch}")

    def state_dict(self) -> State:
        """The place in the epoch, and the random state at its start."""
        return {
            "epoch": self.epoch,
            "index": self.index,
            "at_start": self._at_start if self._iterator is not None else None,
        }

    def load_state_dict(self, state: State) -> None:
        """Go to a place; the caller sets the random state afterwards."""
        self.epoch, self.index, self._iterator = state["epoch"], state["index"], None
        if state["at_start"] is None:
            return
        set_random_state(state["at_start"]["random"])
        self._set_generator_state(state["at_start"]["generator"])
        self._start_epoch()
        assert self._iterator is not None
        self._counted = None
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


def check_source(source: Any, name: str) -> None:
    """Raise a TypeError, which names the argument, for what are no batches that come again and again."""
    if isinstance(source, Tensor | str | bytes | Mapping) or not hasattr(source, "__iter__"):
        advice = " A tensor with all the data is an argument of the model." if isinstance(source, Tensor) else ""
        kind = type(source).__name__
        raise TypeError(f"{name} must be a DataLoader or an iterable of batches, not a {kind}.{advice}")
    if hasattr(source, "__next__"):
        raise TypeError(
            f"{name} is an iterator, which one epoch uses up and no run can be resumed on. Pass a list, a DataLoader, or an "
            "object whose __iter__ starts anew."
        )


class Order(Enum):
    """Whether epochs have the same batches, rows and all."""

    FIXED = "fixed"
    CHANGING = "changing"
    UNKNOWN = "unknown"


def _order(source: Any) -> Order:
    if isinstance(source, list | tuple):
        return Order.FIXED
    if not isinstance(source, DataLoader) or type(source.batch_sampler) is not BatchSampler:
        return Order.UNKNOWN
    sampler = source.sampler
    if isinstance(sampler, SequentialSampler) or getattr(sampler, "shuffle", None) is False:
        return Order.FIXED
    if isinstance(sampler, RandomSampler | SubsetRandomSampler | WeightedRandomSampler | DistributedSampler):
        return Order.CHANGING
    return Order.UNKNOWN


def _iterable(dataset: Any) -> bool:
    return isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__getitem__")


def _items(batch: Any) -> Iterable[tuple[int | str, Any]]:
    """The arguments that a batch gives, by place or name."""
    if isinstance(batch, Mapping):
        return [(str(key), value) for key, value in batch.items()]
    return enumerate(batch) if isinstance(batch, list | tuple) else [(0, batch)]


def _values(batch: Any) -> Iterator[Any]:
    return (value for _, value in _items(batch))


def rows_of(batch: Any) -> Rows:
    """Length of each array of a batch, by place or name; of a number it is 1."""
    rows: Rows = {}
    for name, value in _items(batch):
        shape = getattr(value, "shape", None)
        if isinstance(shape, tuple):
            rows[name] = shape[0] if shape else 1
        elif isinstance(value, int | float) and not isinstance(value, bool):
            rows[name] = 1
    return rows


def as_call(batch: Any, args: tuple[Any, ...], kwargs: dict[str, Any], what: str) -> Call:
    """A batch with the fixed arguments that follow it; ``what`` is its name in errors."""
    if batch is None:
        raise TypeError(
            f"{what} is None: a batch is a tensor, a tuple or list of arguments, or a mapping of them by name"
        )
    if isinstance(batch, Mapping):
        call = args, {**{str(key): value for key, value in batch.items()}, **kwargs}
    elif isinstance(batch, list | tuple):
        call = (*batch, *args), kwargs
    else:
        call = (batch, *args), kwargs
    check_batch(call, what)
    return call


def batch_length(call: Call) -> int | None:
    """Length of the first tensor among the arguments, None if there is none."""
    args, kwargs = call
    tensors = (value for value in [*args, *kwargs.values()] if isinstance(value, Tensor) and value.dim())
    return next((len(value) for value in tensors), None)


def check_batch(call: Call, what: str) -> None:
    """Raise a ValueError if a tensor among the arguments has no rows, naming it.  Rows may be empty: no covariates."""
    for name, value in named_arguments(None, *call):
        if isinstance(value, Tensor) and value.dim() and len(value) == 0:
            raise ValueError(f"{what}: {name} is empty, of shape {tuple(value.shape)}")
