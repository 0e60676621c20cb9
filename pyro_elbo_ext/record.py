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


class Record:
    """Every site's values at every step, at bounded memory.

    What is read from them, ``max_steps`` and ``num_recorded`` are described at :class:`pyro_elbo_ext.history.History`.

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
        self._steps = np.empty(0, np.int64)
        self._objective = np.empty(0)
        self._kl_weight = np.empty(0)
        self._layout = np.empty(0, np.int32)  # per row: which of _layouts
        self._flat = np.empty(0)  # the values of all rows end to end: rows differ in length where layouts do
        self._layouts: list[tuple[tuple[SiteInfo, ...], int]] = []  # sites, and values of each
        self._ids: dict[tuple[tuple[SiteInfo, ...], int], int] = {}
        self._order: dict[str, int] = {}  # site -> rank by first appearance
        self._sites: tuple[SiteInfo, ...] | None = None
        self._id = 0
        self._shape = (0, len(VALUES))

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
        if sites is not self._sites or values.shape != self._shape:
            self._switch_layout(sites, values)
        if values.shape != self._shape:
            raise ValueError(
                f"values has shape {values.shape}, but {len(sites)} sites need {self._shape}: "
                f"one row per site, columns {', '.join(VALUES)}"
            )
        step, objective, kl_weight = operator.index(step), float(objective), float(kl_weight)
        row, start, last, count = self._end
        if step <= last:
            raise ValueError(
                f"step {step} is not after the last recorded step, {last}: continue the step count, "
                "call history.clear(), or use a new History"
            )
        if row == self._steps.size:
            self._make_room()
            row, start, _, _ = self._end
        end = start + values.size
        if end > self._flat.size:
            rows_left = self._steps.size - row
            self._flat = _resized(self._flat, max(start + rows_left * values.size, start * 9 // 8))
        self._flat[start:end] = values.ravel()
        self._steps[row] = step
        self._objective[row] = objective
        self._kl_weight[row] = kl_weight
        self._layout[row] = self._id
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
        if sites is not self._sites or values.shape[1:] != self._shape:
            self._switch_layout(sites, values)
        if values.shape != (len(steps), *self._shape):
            raise ValueError(
                f"values has shape {values.shape}, but {len(steps)} steps need {(len(steps), *self._shape)}"
            )
        if len(steps) and (steps[0] <= self._end[2] or (np.diff(steps) <= 0).any()):
            raise ValueError(f"the steps do not increase from the last recorded step, {self._end[2]}, on")
        size, done = self._shape[0] * self._shape[1], 0
        while done < len(steps):
            if self._rows == self._steps.size:
                self._make_room()
            row, start, rows_left = self._rows, self._used, self._steps.size - self._rows
            count = min(len(steps) - done, rows_left)
            end = start + count * size
            if end > self._flat.size:
                self._flat = _resized(self._flat, max(start + rows_left * size, start * 9 // 8))
            taken, rows = slice(done, done + count), slice(row, row + count)
            self._flat[start:end] = values[taken].ravel()
            self._steps[rows] = steps[taken]
            self._objective[rows] = objective[taken]
            self._kl_weight[rows] = kl_weight[taken]
            self._layout[rows] = self._id
            done += count
            self._end = row + count, end, int(steps[done - 1]), self.num_recorded + count

    def _switch_layout(self, sites: tuple[SiteInfo, ...], values: Floats) -> None:
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
        vars(self).update(_sites=sites, _id=self._ids[layout], _shape=(len(sites), width))

    def _make_room(self) -> None:
        if self._rows == self.max_steps:
            self._thin(self.max_steps)
            return
        capacity = max(2 * self._rows, 256)
        if self.max_steps is not None:
            capacity = min(capacity, self.max_steps)
        columns = ("_steps", "_objective", "_kl_weight", "_layout")
        vars(self).update({name: _resized(getattr(self, name), capacity) for name in columns})

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
        lengths = self._lengths()[self._layout]
        kept, used = np.flatnonzero(keep), int(lengths[keep].sum())
        flat = np.empty_like(self._flat)
        if (lengths == lengths[0]).all():
            table = self._flat[: self._used].reshape(self._rows, -1)
            np.take(table, kept, axis=0, out=flat[:used].reshape(rows, -1), mode="clip")  # "raise" would make a copy
        else:
            flat[:used] = self._flat[: self._used][np.repeat(keep, lengths)]
        columns = {name: getattr(self, name) for name in ("_steps", "_objective", "_kl_weight", "_layout")}
        new: dict[str, Any] = {name: _resized(column[kept], column.size) for name, column in columns.items()}
        new |= {"_flat": flat, "_end": (rows, used, *self._end[2:]), "_stride": stride, "_tail": tail}
        if len(self._layouts) > 1:  # forget layouts that no kept row has, or their number would not be bounded
            layout = new["_layout"][:rows]
            alive = np.union1d(layout, [self._id])
            layout[:] = np.searchsorted(alive, layout)
            layouts = [self._layouts[i] for i in alive]
            names = {info.site for sites, _ in layouts for info in sites}
            new |= {
                "_id": int(np.searchsorted(alive, self._id)),
                "_layouts": layouts,
                "_ids": {layout: i for i, layout in enumerate(layouts)},
                "_order": {name: i for i, name in enumerate(n for n in self._order if n in names)},
            }
        vars(self).update(new)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in ("_steps", "_objective", "_kl_weight", "_layout"):
            state[name] = state[name][: self._rows].copy()  # without the spare room
        state["_flat"] = self._flat[: self._used].copy()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if "_end" not in state:  # pickled by an older version
            state["_end"] = tuple([state.pop(name) for name in ("_rows", "_used", "_last_step", "num_recorded")])
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
    new = np.empty(size, array.dtype)
    new[: array.size] = array
    return new
