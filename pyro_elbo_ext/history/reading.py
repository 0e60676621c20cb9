"""What is read from the store of a fit: columns, means, and tables by site."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pyro_elbo_ext.history.record import LABELS, SITE_WEIGHT, VALUES, Record, SiteInfo

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


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


class ReadableRecord(Record):
    """A record whose kept steps can be read."""

    @property
    def steps(self) -> NDArray[np.int64]:
        """Kept steps, increasing, shape ``(len(record),)``."""
        return self._columns.steps[: self._rows].copy()

    @property
    def objective(self) -> Floats:
        """What was optimized, the weighted ELBO or another bound, at every kept step, shape ``(len(record),)``."""
        return self._columns.objective[: self._rows].copy()

    @property
    def kl_weight(self) -> Floats:
        """The weight of ``kl_prior`` in the objective at every kept step, shape ``(len(record),)``.

        Where weights differ by site, or there are free bits, it is ``(reconstruction - objective) / kl_prior``, and NaN
        where ``kl_prior`` is 0.
        """
        return self._columns.kl_weight[: self._rows].copy()

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
            name: getattr(self._columns, name)[self._rows - rows : self._rows] for name in ("objective", "kl_weight")
        }
        totals = {"elbo": means["reconstruction"] - means["kl_prior"], **{n: v.mean() for n, v in by_step.items()}}
        return {name: float(value) for name, value in {**totals, **means}.items()}

    def _groups(self, first: int = 0) -> Iterator[tuple[tuple[SiteInfo, ...], NDArray[np.int64], Floats]]:
        """Per layout: its sites, its row numbers counted from ``first``, and its values (rows, sites, 6 or 7)."""
        layout = self._columns.layout[: self._rows]
        lengths = self._lengths()
        starts = (np.cumsum(lengths[layout]) - lengths[layout])[first:]
        for i in np.unique(layout[first:]):
            rows = np.flatnonzero(layout[first:] == i)
            if rows.size == self._rows - first:  # one layout: no need to gather
                values = self._columns.flat[self._used - rows.size * lengths[i] : self._used]
            else:
                values = self._columns.flat[starts[rows, None] + np.arange(lengths[i])]
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
        layouts = [self._layouts[i] for i in np.unique(self._columns.layout[first : self._rows])]
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
        return Decoded(self._columns.steps[first : self._rows].copy(), names, present, columns, labels)

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

    def _divisor(self) -> Floats:
        count = self._totals()["num_observations"]
        bad = ~(count > 0)
        if bad.any():
            raise ValueError(
                f"per_observation=True, but step {self._columns.steps[: self._rows][bad][0]} has no observations "
                "(num_observations is 0 or NaN at every observed site); use per_observation=False"
            )
        return count
