"""The columnar store of a fit: values by site and step, bounded in memory."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pyro_elbo_ext.programs.arguments import check_count

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

VALUES = ("log_p", "log_q", "kl_prior", "scale", "num_observations", "contribution")
KINDS = ("observed", "latent", "auxiliary")
LABELS = ("kind", "kl_method", "kl_reason")
SITE_WEIGHT = "site_kl_weight"  # a seventh value, where weights differ by site


class SiteInfo(NamedTuple):
    """What a site is, apart from its numbers.

    ``kind`` is "observed", "latent" or "auxiliary" (in the guide only); ``kl_method`` "analytic", "sampled" or None
    (observed sites have no ``kl_prior``); ``kl_reason`` says why that method, or is None.
    """

    site: str
    kind: str
    kl_method: str | None
    kl_reason: str | None


class _Columns(NamedTuple):
    """One entry for each row, with room for more; ``flat`` has the values of all rows end to end."""

    steps: NDArray[np.int64]
    objective: Floats
    kl_weight: Floats
    layout: NDArray[np.int32]  # which of the layouts; rows differ in length where these do
    flat: Floats

    def resized(self, rows: int, numbers: int) -> _Columns:
        """With room for so many rows, and numbers in ``flat``."""
        steps, objective, kl_weight, layout, flat = self
        return _Columns(
            _resized(steps, rows),
            _resized(objective, rows),
            _resized(kl_weight, rows),
            _resized(layout, rows),
            _resized(flat, numbers),
        )


class Record:
    """Every site's values at every step, at bounded memory.

    ``max_steps`` and ``num_recorded`` are described at :class:`pyro_elbo_ext.History`; what is read is in ``reading``.

    An exception may come between any two lines, from the handler of a signal. So what changes is made aside, and takes its
    place at once, by one assignment or one ``vars(self).update``; what is written beyond ``_end`` does not count before.
    """

    def __init__(self, max_steps: int | None = 10_000) -> None:
        if max_steps is not None:  # which keeps every step
            check_count("max_steps", max_steps, 4)
        self.max_steps = max_steps
        self._begin()

    def clear(self) -> None:
        """Forget every recorded step; ``max_steps`` stays."""
        empty = object.__new__(Record)
        empty._begin()
        vars(self).update(vars(empty))

    def _begin(self) -> None:
        # kept rows, numbers used in _flat, last step, steps recorded
        self._end: tuple[int, int, float, int] = 0, 0, -np.inf, 0
        self._stride = 1  # rows before record number _tail are those whose number is a multiple of it
        self._tail = 0
        self._columns = _Columns(np.empty(0, np.int64), np.empty(0), np.empty(0), np.empty(0, np.int32), np.empty(0))
        self._layouts: list[tuple[tuple[SiteInfo, ...], int]] = []  # sites, and values of each
        self._ids: dict[tuple[tuple[SiteInfo, ...], int], int] = {}
        self._order: dict[str, int] = {}  # site -> rank by first appearance
        # the last layout: its sites, shape of its values, and place in _layouts
        self._current: tuple[tuple[SiteInfo, ...] | None, tuple[int, int], int] = None, (0, len(VALUES)), 0

    def append(
        self, step: int, sites: tuple[SiteInfo, ...], values: Floats, *, objective: float, kl_weight: float
    ) -> None:
        """Record one step; costs a few microseconds when ``sites`` is the same object as at the last call.

        Parameters
        ----------
        step
            Greater than the last recorded step; steps need not be consecutive.
        sites
            What the rows of ``values`` are. It may change between steps.
        values : (len(sites), 6) or (len(sites), 7) array
            Columns ``VALUES``: each summed over the site's batch, averaged over particles, NaN where it doesn't apply.
            ``contribution`` is the site's part in a bound that is not linear in the log weights (IWAE, Renyi),
            ``sum_k g_k (log p_k - log q_k)`` over particles k with g the gradient of the bound in the log weights;
            NaN where the objective is the ELBO, to which a site contributes ``reconstruction - kl_prior``.
            The seventh, where weights differ by site, is the weight of the site's ``kl_prior``. It is copied.
        objective, kl_weight
            What was optimized: the weighted objective, ``sum(reconstruction) - kl_weight * sum(kl_prior)``, and its
            weight, NaN if there is no such number; or a bound that is not linear in the log weights.

        Raises
        ------
        TypeError
            ``sites`` is not a tuple, ``values`` is not an array, ``step`` is not an integer, or ``objective`` or
            ``kl_weight`` is not a number.
        ValueError
            The shape of ``values`` doesn't fit ``sites``, two sites share a name, a kind is unknown, or the step does
            not increase. The history is then unchanged.
        """
        if not isinstance(values, np.ndarray):
            raise TypeError(f"values must be a numpy array, got {type(values).__name__}")
        known, shape, layout = self._current
        if sites is not known or values.shape != shape:
            shape, layout = self._switch_layout(sites, values)
        if values.shape != shape:
            raise ValueError(
                f"values has shape {values.shape}, but {len(sites)} sites need {shape}: "
                f"one row per site, columns {', '.join(VALUES)}"
            )
        step, objective, kl_weight = operator.index(step), float(objective), float(kl_weight)
        row, start, last, count = self._end
        end = start + values.size
        if step <= last:
            raise ValueError(
                f"step {step} is not after the last recorded step, {last}: continue the step count, "
                "call history.clear(), or use a new History"
            )
        columns = self._columns
        if row == columns.steps.size or end > columns.flat.size:
            columns = self._with_room(values.size)
            row, start, _, _ = self._end
            end, layout = start + values.size, self._current[2]
        columns.flat[start:end] = values.ravel()
        columns.steps[row] = step
        columns.objective[row] = objective
        columns.kl_weight[row] = kl_weight
        columns.layout[row] = layout
        self._end = row + 1, end, step, count + 1

    def extend(
        self,
        steps: NDArray[np.int64],
        sites: tuple[SiteInfo, ...],
        values: Floats,
        *,
        objective: Floats,
        kl_weight: Floats,
    ) -> None:
        """Record many steps: what :meth:`append` does for each, at less cost.

        Parameters
        ----------
        steps, objective, kl_weight : (n,) arrays
        values : (n, len(sites), 6) or (n, len(sites), 7) array

        Raises
        ------
        ValueError
            As :meth:`append` does; the history is then unchanged.
        """
        known, shape, _ = self._current
        if sites is not known or values.shape[1:] != shape:
            shape, _ = self._switch_layout(sites, values)
        if values.shape != (len(steps), *shape):
            raise ValueError(f"values has shape {values.shape}, but {len(steps)} steps need {(len(steps), *shape)}")
        if len(steps) and (steps[0] <= self._end[2] or (np.diff(steps) <= 0).any()):
            raise ValueError(f"the steps do not increase from the last recorded step, {self._end[2]}, on")
        size, done = shape[0] * shape[1], 0
        while done < len(steps):
            columns = self._with_room(size)
            row, start = self._rows, self._used
            # an end of either kind of room is an end of this piece
            count = min(len(steps) - done, columns.steps.size - row, (columns.flat.size - start) // max(size, 1) or 1)
            end = start + count * size
            taken, rows = slice(done, done + count), slice(row, row + count)
            columns.flat[start:end] = values[taken].ravel()
            columns.steps[rows] = steps[taken]
            columns.objective[rows] = objective[taken]
            columns.kl_weight[rows] = kl_weight[taken]
            columns.layout[rows] = self._current[2]
            done += count
            self._end = row + count, end, int(steps[done - 1]), self.num_recorded + count

    def _switch_layout(self, sites: tuple[SiteInfo, ...], values: Floats) -> tuple[tuple[int, int], int]:
        if not isinstance(sites, tuple):
            raise TypeError(f"sites must be a tuple of SiteInfo, got {type(sites).__name__}")
        width = len(VALUES) + (values.shape[-1:] == (len(VALUES) + 1,))
        layout = sites, width
        if layout not in self._ids:
            names = [info.site for info in sites]
            if len(set(names)) < len(names):
                raise ValueError(f"site {max(names, key=names.count)!r} occurs more than once in sites")
            for info in sites:
                if info.kind not in KINDS:
                    raise ValueError(f"site {info.site!r} has kind {info.kind!r}; it must be one of {', '.join(KINDS)}")
            for name in names:
                self._order.setdefault(name, len(self._order))
            self._layouts.append(layout)  # without its id, and so without rows, it would only take up room
            self._ids[layout] = len(self._layouts) - 1
        self._current = sites, (len(sites), width), self._ids[layout]
        return self._current[1:]

    def _with_room(self, size: int) -> _Columns:
        """The columns, with room for at least one more row of ``size`` values."""
        if self._rows == self.max_steps:
            self._thin(self.max_steps)
        columns = self._columns
        capacity, numbers = columns.steps.size, columns.flat.size
        if self._rows == capacity:
            capacity = max(2 * self._rows, 256)
            if self.max_steps is not None:
                capacity = min(capacity, self.max_steps)
        if self._used + size > numbers:
            numbers = max(self._used + (capacity - self._rows) * size, self._used * 9 // 8)
        if (capacity, numbers) != (columns.steps.size, columns.flat.size):
            self._columns = columns.resized(capacity, numbers)
        return self._columns

    def _resume(self, num_recorded: int, stride: int, tail: int, names: list[str]) -> None:
        """After its kept rows were appended to an empty record: go on where the record they come from stood."""
        self._end = *self._end[:3], num_recorded
        self._stride, self._tail = stride, tail
        self._order = {name: i for i, name in enumerate(names)}
        if len(self._records()) != self._rows:
            raise ValueError(
                f"the dataset has {self._rows} steps where its attributes say {len(self._records())}: steps were "
                "taken out of it; use the dataset that to_xarray() or save() gave"
            )

    def _records(self) -> NDArray[np.int64]:
        """Record number of every kept row: multiples of the stride up to ``_tail``, then all."""
        return np.concatenate([np.arange(0, self._tail, self._stride), np.arange(self._tail, self.num_recorded)])

    def _lengths(self) -> NDArray[np.int64]:
        """Numbers per row, by layout."""
        return np.fromiter((len(sites) * width for sites, width in self._layouts), np.int64)

    def _thin(self, max_steps: int) -> None:
        records = self._records()
        stride, tail = self._stride, self.num_recorded - max_steps // 4
        while True:
            keep = (records % stride == 0) | (records >= tail)
            rows = int(keep.sum())
            if 4 * rows <= 3 * max_steps:  # a quarter is freed at each pass, which pays for the pass
                break
            stride *= 2
        steps, objective, kl_weight, layout, old = self._columns
        lengths = self._lengths()[layout]
        kept, used = np.flatnonzero(keep), int(lengths[keep].sum())
        flat = np.empty_like(old)
        if (lengths == lengths[0]).all():
            table = old[: self._used].reshape(self._rows, -1)
            np.take(table, kept, axis=0, out=flat[:used].reshape(rows, -1), mode="clip")  # "raise" would make a copy
        else:
            flat[:used] = old[: self._used][np.repeat(keep, lengths)]
        thinned = _Columns(steps[kept], objective[kept], kl_weight[kept], layout[kept], flat).resized(
            steps.size, flat.size
        )
        new: dict[str, Any] = {
            "_columns": thinned,
            "_end": (rows, used, *self._end[2:]),
            "_stride": stride,
            "_tail": tail,
        }
        if len(self._layouts) > 1:  # forget layouts that no kept row has, or their number would not be bounded
            sites, shape, current = self._current
            layout = thinned.layout[:rows]
            alive = np.union1d(layout, [current])
            layout[:] = np.searchsorted(alive, layout)
            layouts = [self._layouts[i] for i in alive]
            names = {info.site for known, _ in layouts for info in known}
            new |= {
                "_current": (sites, shape, int(np.searchsorted(alive, current))),
                "_layouts": layouts,
                "_ids": {layout: i for i, layout in enumerate(layouts)},
                "_order": {name: i for i, name in enumerate(n for n in self._order if n in names)},
            }
        vars(self).update(new)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_columns": self._columns.resized(self._rows, self._used)}  # without the spare room

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if "_end" not in state:  # pickled by an older version
            state["_end"] = tuple([state.pop(name) for name in ("_rows", "_used", "_last_step", "num_recorded")])
            state["_columns"] = _Columns(*[state.pop(f"_{name}") for name in _Columns._fields])
            state["_current"] = tuple([state.pop(name) for name in ("_sites", "_shape", "_id")])
        vars(self).update(state)

    @property
    def num_recorded(self) -> int:
        """Steps recorded since the start, whether kept or not."""
        return self._end[3]

    @property
    def _rows(self) -> int:
        return self._end[0]

    @property
    def _used(self) -> int:
        return self._end[1]

    def __len__(self) -> int:
        return self._rows


def _resized(array: NDArray[Any], size: int) -> NDArray[Any]:
    if size == array.size:  # rows that count are never written to again: two may have them
        return array
    new = np.empty(size, array.dtype)
    kept = min(size, array.size)
    new[:kept] = array[:kept]
    return new
