"""The columnar store of a fit: values by site and step, bounded in memory, decoded when read."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

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


class Decoded(NamedTuple):
    """Kept steps as one table per value and label."""

    steps: NDArray[np.int64]  # (rows,)
    names: list[str]  # (sites,)
    present: NDArray[np.bool_]  # (rows, sites)
    values: dict[str, Floats]  # each (rows, sites), NaN where the site is absent
    labels: dict[str, NDArray[np.object_]]  # each (rows, sites), None where absent or not applicable

    @property
    def has_contributions(self) -> bool:
        """Whether the objective of some step was a bound that is not linear in the log weights."""
        return bool(np.isfinite(self.values["contribution"]).any())

    @property
    def has_site_weights(self) -> bool:
        """Whether some step has a weight of ``kl_prior`` for each site."""
        return SITE_WEIGHT in self.values


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

    What is read from them, ``max_steps`` and ``num_recorded`` are described at :class:`pyro_elbo_ext.History`.

    An exception may come between any two lines, from the handler of a signal. So what changes is made aside, and takes its
    place at once, by one assignment or one ``vars(self).update``; what is written beyond ``_end`` does not count before.
    """

    def __init__(self, max_steps: int | None = 10_000) -> None:
        if max_steps is not None and (operator.index(max_steps) < 4):
            raise ValueError(f"max_steps must be at least 4, or None to keep every step; got {max_steps}")
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
    def _steps(self) -> NDArray[np.int64]:
        return self._columns.steps

    @property
    def _objective(self) -> Floats:
        return self._columns.objective

    @property
    def _kl_weight(self) -> Floats:
        return self._columns.kl_weight

    @property
    def _layout(self) -> NDArray[np.int32]:
        return self._columns.layout

    @property
    def _flat(self) -> Floats:
        return self._columns.flat

    @property
    def _rows(self) -> int:
        return self._end[0]

    @property
    def _used(self) -> int:
        return self._end[1]

    def __len__(self) -> int:
        return self._rows

    @property
    def steps(self) -> NDArray[np.int64]:
        """Kept steps, increasing, shape ``(len(record),)``."""
        return self._steps[: self._rows].copy()

    @property
    def objective(self) -> Floats:
        """What was optimized, the weighted ELBO or another bound, at every kept step, shape ``(len(record),)``."""
        return self._objective[: self._rows].copy()

    @property
    def kl_weight(self) -> Floats:
        """The weight of ``kl_prior`` in the objective at every kept step, shape ``(len(record),)``.

        Where weights differ by site, or there are free bits, it is ``(reconstruction - objective) / kl_prior``, and NaN
        where ``kl_prior`` is 0.
        """
        return self._kl_weight[: self._rows].copy()

    @property
    def elbo(self) -> Floats:
        """The true ELBO (weight 1, whatever ``kl_weight`` was) at every kept step, shape ``(len(record),)``."""
        totals = self._totals()
        return totals["reconstruction"] - totals["kl_prior"]

    def recent(self, rows: int) -> dict[str, float]:
        """Means over the last ``rows`` kept steps, cheap enough to be read while training.

        Returns
        -------
        dict
            ``elbo``, ``objective``, ``reconstruction``, ``kl_prior``, ``kl_weight``, and by site ``log_p/SITE`` and, but for
            observed sites, ``kl_prior/SITE``. Empty if there are no steps.
        """
        rows = min(rows, self._rows)
        if rows < 1:
            return {}
        means = {"reconstruction": 0.0, "kl_prior": 0.0}
        for sites, _, values in self._groups(self._rows - rows):
            sums = values.sum(0) / rows
            for info, of_site in zip(sites, sums, strict=True):
                observed = info.kind == "observed"
                means["reconstruction" if observed else "kl_prior"] += of_site[0 if observed else 2]
                columns = [("log_p", 0)] * (info.kind != "auxiliary") + [("kl_prior", 2)] * (not observed)
                for name, column in columns:
                    key = f"{name}/{info.site}"
                    means[key] = means.get(key, 0.0) + of_site[column]
        by_step = {
            name: getattr(self, f"_{name}")[self._rows - rows : self._rows] for name in ("objective", "kl_weight")
        }
        totals = {"elbo": means["reconstruction"] - means["kl_prior"], **{n: v.mean() for n, v in by_step.items()}}
        return {name: float(value) for name, value in {**totals, **means}.items()}

    def _groups(self, first: int = 0) -> Iterator[tuple[tuple[SiteInfo, ...], NDArray[np.int64], Floats]]:
        """Per layout: its sites, its row numbers counted from ``first``, and its values (rows, sites, 6 or 7)."""
        layout = self._layout[: self._rows]
        lengths = self._lengths()
        starts = (np.cumsum(lengths[layout]) - lengths[layout])[first:]
        for i in np.unique(layout[first:]):
            rows = np.flatnonzero(layout[first:] == i)
            if rows.size == self._rows - first:  # one layout: no need to gather
                values = self._flat[self._used - rows.size * lengths[i] : self._used]
            else:
                values = self._flat[starts[rows, None] + np.arange(lengths[i])]
            sites, width = self._layouts[i]
            yield sites, rows, values.reshape(rows.size, len(sites), width)

    def _totals(self) -> dict[str, Floats]:
        totals = {name: np.empty(self._rows) for name in ("reconstruction", "kl_prior", "num_observations")}
        for sites, rows, values in self._groups():
            observed = np.array([info.kind == "observed" for info in sites], bool)
            totals["reconstruction"][rows] = values[:, observed, 0].sum(1)
            totals["kl_prior"][rows] = values[:, ~observed, 2].sum(1)
            totals["num_observations"][rows] = values[:, observed, 4].sum(1)
        return totals

    def _decode(self, first: int = 0) -> Decoded:
        layouts = [self._layouts[i] for i in np.unique(self._layout[first : self._rows])]
        names = sorted({info.site for sites, _ in layouts for info in sites}, key=self._order.__getitem__)
        weighted = [SITE_WEIGHT] if any(width > len(VALUES) for _, width in layouts) else []
        shape = (self._rows - first, len(names))
        present = np.zeros(shape, bool)
        columns = {name: np.full(shape, np.nan) for name in (*VALUES[:2], "reconstruction", *VALUES[2:], *weighted)}
        labels = {name: np.full(shape, None, object) for name in LABELS}
        position = {name: i for i, name in enumerate(names)}
        for sites, rows, values in self._groups(first):
            cells = np.ix_(rows, np.array([position[info.site] for info in sites], np.int64))
            observed = np.array([info.kind == "observed" for info in sites], bool)
            present[cells] = True
            for i, name in enumerate((*VALUES, *weighted)[: values.shape[2]]):
                columns[name][cells] = values[:, :, i]
            columns["kl_prior"][cells] = np.where(observed, 0.0, values[:, :, 2])
            columns["reconstruction"][cells] = np.where(observed, values[:, :, 0], 0.0)
            for name in LABELS:
                labels[name][cells] = np.array([getattr(info, name) or None for info in sites], object)
        return Decoded(self._steps[first : self._rows].copy(), names, present, columns, labels)

    def _window(self, window: int | None) -> int:
        """Number of last steps to average over: ``window`` if it is at full resolution, or a default for None."""
        full = self.num_recorded - self._tail
        if window is None:
            return min(max(self.num_recorded // 4, 100), full, (self.max_steps or 4 * full) // 4)
        if not 1 <= operator.index(window) <= full:
            raise ValueError(
                f"window must be from 1 to {full}, the number of last steps kept at full resolution; got {window}. "
                "For a longer one record with a greater max_steps"
            )
        return int(window)

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

    def _divisor(self) -> Floats:
        count = self._totals()["num_observations"]
        bad = ~(count > 0)
        if bad.any():
            raise ValueError(
                f"per_observation=True, but step {self._steps[: self._rows][bad][0]} has no observations "
                "(num_observations is 0 or NaN at every observed site); use per_observation=False"
            )
        return count


def _resized(array: NDArray[Any], size: int) -> NDArray[Any]:
    if size == array.size:  # rows that count are never written to again: two may have them
        return array
    new = np.empty(size, array.dtype)
    kept = min(size, array.size)
    new[:kept] = array[:kept]
    return new
