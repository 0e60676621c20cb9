"""The detached record of a fit: every site's terms at every step, columnar, bounded in memory and decoded when read."""

from __future__ import annotations

import importlib.util
import operator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import numpy as np
import pandas as pd
import xarray as xr

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

VALUES = ("log_p", "log_q", "kl_prior", "scale", "num_observations")
KINDS = ("observed", "latent", "auxiliary")
BY_SITE = ["step", "site", "kind", "log_p", "log_q", "reconstruction", "kl_prior", "kl_method", "kl_reason", "scale"]
BY_STEP = ["step", "elbo", "objective", "reconstruction", "kl_prior", "kl_weight", "num_observations"]
PER_OBSERVATION = ("log_p", "log_q", "reconstruction", "kl_prior", "elbo", "objective")
LABELS = ("kind", "kl_method", "kl_reason")
IDENTITY = (
    "elbo = sum(reconstruction) - sum(kl_prior); objective = sum(reconstruction) - kl_weight * sum(kl_prior); "
    "kl_prior is KL(q || prior); log p(x) = elbo + KL(q || posterior)"
)
LONG_NAMES = {
    "log_p": "log density of the site under the model",
    "log_q": "log density of the site under the guide",
    "reconstruction": "E_q[log p(x | z)], the site's part",
    "kl_prior": "KL(q || prior), the site's part",
    "scale": "scale of the site in the model",
    "num_observations": "data elements that the site's scaled term stands for",
    "elbo": "evidence lower bound, every kl_prior with weight 1",
    "objective": "what was optimized: reconstruction - kl_weight * kl_prior",
    "kl_weight": "weight of kl_prior in the objective",
    "kind": "observed, latent or auxiliary",
    "kl_method": "analytic or sampled; empty where there is no kl_prior",
    "kl_reason": "why the kl_prior is analytic or sampled",
}
ENGINES: dict[str, Literal["h5netcdf", "zarr"]] = {".nc": "h5netcdf", ".zarr": "zarr"}


class SiteInfo(NamedTuple):
    """What a site is, apart from its numbers.

    ``kind`` is "observed", "latent" or "auxiliary" (in the guide only); ``kl_method`` "analytic", "sampled" or None
    (observed sites have no ``kl_prior``); ``kl_reason`` says why that method, or is None.
    """

    site: str
    kind: str
    kl_method: str | None
    kl_reason: str | None


class _Decoded(NamedTuple):
    names: list[str]
    present: NDArray[np.bool_]  # (rows, sites)
    values: dict[str, Floats]  # each (rows, sites), NaN where the site is absent
    labels: dict[str, NDArray[np.object_]]  # each (rows, sites), None where absent or not applicable


class History:
    """Every site's terms at every step of a fit, at bounded memory.

    The ELBO of a step is ``sum(reconstruction) - sum(kl_prior)`` over its sites, each ``kl_prior`` being
    KL(q || prior) with weight 1; the objective, which may weight it, is kept beside it. Values are in nats.

    Parameters
    ----------
    max_steps
        Most steps kept, at least 4; None keeps all. At least the last ``max_steps // 4`` steps are kept at full
        resolution. Older ones are thinned to every ``stride``-th step (the first always among them), the stride
        doubling as the run gets longer, so between half and all of ``max_steps`` rows cover the whole run.

    Attributes
    ----------
    num_recorded : int
        Steps recorded so far; ``len(history)`` is the number of them kept.
    """

    def __init__(self, max_steps: int | None = 10_000) -> None:
        if max_steps is not None and (operator.index(max_steps) < 4):
            raise ValueError(f"max_steps must be at least 4, or None to keep every step; got {max_steps}")
        self.max_steps = max_steps
        self.clear()

    def clear(self) -> None:
        """Forget every recorded step; ``max_steps`` stays."""
        self.num_recorded = 0
        self._rows = 0
        self._used = 0  # numbers used in _flat
        self._stride = 1  # rows before record number _tail are those whose number is a multiple of it
        self._tail = 0
        self._last_step: float = -np.inf
        self._steps = np.empty(0, np.int64)
        self._objective = np.empty(0)
        self._kl_weight = np.empty(0)
        self._layout = np.empty(0, np.int32)  # per row: which of _layouts
        self._flat = np.empty(0)  # the values of all rows end to end: rows differ in length where layouts do
        self._layouts: list[tuple[SiteInfo, ...]] = []
        self._ids: dict[tuple[SiteInfo, ...], int] = {}
        self._order: dict[str, int] = {}  # site -> rank by first appearance
        self._sites: tuple[SiteInfo, ...] | None = None
        self._id = 0
        self._shape = (0, len(VALUES))

    # Recording

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
        values : (len(sites), 5) array
            Columns ``VALUES``: each summed over the site's batch, averaged over particles, NaN where it doesn't apply.
            It is copied.
        objective, kl_weight
            The weighted objective, ``sum(reconstruction) - kl_weight * sum(kl_prior)``, and its weight.

        Raises
        ------
        TypeError
            ``sites`` is not a tuple, ``values`` is not an array, ``step`` is not an integer, or ``objective`` or
            ``kl_weight`` is not a number.
        ValueError
            The shape of ``values`` doesn't fit ``sites``, two sites share a name, a kind is unknown, or the step does
            not increase. The history is then unchanged.
        """
        if sites is not self._sites:
            self._switch_layout(sites)
        if not isinstance(values, np.ndarray):
            raise TypeError(f"values must be a numpy array, got {type(values).__name__}")
        if values.shape != self._shape:
            raise ValueError(
                f"values has shape {values.shape}, but {len(sites)} sites need {self._shape}: "
                f"one row per site, columns {', '.join(VALUES)}"
            )
        step, objective, kl_weight = operator.index(step), float(objective), float(kl_weight)
        if step <= self._last_step:
            raise ValueError(
                f"step {step} is not after the last recorded step, {self._last_step}: continue the step count, "
                "call history.clear(), or use a new History"
            )
        if self._rows == self._steps.size:
            self._make_room()
        row, start, end = self._rows, self._used, self._used + values.size
        if end > self._flat.size:
            rows_left = self._steps.size - row
            self._flat = _resized(self._flat, max(start + rows_left * values.size, start * 9 // 8))
        self._flat[start:end] = values.ravel()
        self._steps[row] = step
        self._objective[row] = objective
        self._kl_weight[row] = kl_weight
        self._layout[row] = self._id
        self._rows = row + 1
        self._used = end
        self._last_step = step
        self.num_recorded += 1

    def _switch_layout(self, sites: tuple[SiteInfo, ...]) -> None:
        if not isinstance(sites, tuple):
            raise TypeError(f"sites must be a tuple of SiteInfo, got {type(sites).__name__}")
        if sites not in self._ids:
            names = [info.site for info in sites]
            if len(set(names)) < len(names):
                raise ValueError(f"site {max(names, key=names.count)!r} occurs more than once in sites")
            for info in sites:
                if info.kind not in KINDS:
                    raise ValueError(f"site {info.site!r} has kind {info.kind!r}; it must be one of {', '.join(KINDS)}")
            self._ids[sites] = len(self._layouts)
            self._layouts.append(sites)
            for name in names:
                self._order.setdefault(name, len(self._order))
        self._sites = sites
        self._id = self._ids[sites]
        self._shape = (len(sites), len(VALUES))

    def _make_room(self) -> None:
        if self._rows == self.max_steps:
            self._thin(self.max_steps)
            return
        capacity = max(2 * self._rows, 256)
        if self.max_steps is not None:
            capacity = min(capacity, self.max_steps)
        for name in ("_steps", "_objective", "_kl_weight", "_layout"):
            setattr(self, name, _resized(getattr(self, name), capacity))

    def _records(self) -> NDArray[np.int64]:
        """Record number of every kept row: multiples of the stride up to ``_tail``, then all."""
        return np.concatenate([np.arange(0, self._tail, self._stride), np.arange(self._tail, self.num_recorded)])

    def _lengths(self) -> NDArray[np.int64]:
        """Numbers per row, by layout."""
        return np.fromiter((len(sites) * len(VALUES) for sites in self._layouts), np.int64)

    def _thin(self, max_steps: int) -> None:
        records = self._records()
        tail = self.num_recorded - max_steps // 4
        while True:
            keep = (records % self._stride == 0) | (records >= tail)
            rows = int(keep.sum())
            if 4 * rows <= 3 * max_steps:  # a quarter is freed at each pass, which pays for the pass
                break
            self._stride *= 2
        self._tail = tail
        lengths = self._lengths()[self._layout]
        kept, used = np.flatnonzero(keep), int(lengths[keep].sum())
        if (lengths == lengths[0]).all():
            table = self._flat[: self._used].reshape(self._rows, -1)
            still = int((kept == np.arange(rows)).sum())  # rows at the start that stay where they are
            for i in range(still, rows, 256):  # by blocks: a copy of all at once costs more than the rest of the pass
                table[i : i + 256][: rows - i] = table[kept[i : i + 256]]
        else:
            self._flat[:used] = self._flat[: self._used][np.repeat(keep, lengths)]
        for column in (self._steps, self._objective, self._kl_weight, self._layout):
            column[:rows] = column[kept]
        self._rows, self._used = rows, used
        if len(self._layouts) > 1:  # forget layouts that no kept row has, or their number would not be bounded
            alive = np.union1d(self._layout[:rows], [self._id])
            self._layout[:rows] = np.searchsorted(alive, self._layout[:rows])
            self._id = int(np.searchsorted(alive, self._id))
            self._layouts = [self._layouts[i] for i in alive]
            self._ids = {sites: i for i, sites in enumerate(self._layouts)}
            names = {info.site for sites in self._layouts for info in sites}
            self._order = {name: i for i, name in enumerate(n for n in self._order if n in names)}

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in ("_steps", "_objective", "_kl_weight", "_layout"):
            state[name] = state[name][: self._rows].copy()  # without the spare room
        state["_flat"] = self._flat[: self._used].copy()
        return state

    # Reading

    def __len__(self) -> int:
        return self._rows

    @property
    def steps(self) -> NDArray[np.int64]:
        """Kept steps, increasing, shape ``(len(history),)``."""
        return self._steps[: self._rows].copy()

    @property
    def objective(self) -> Floats:
        """The weighted objective at every kept step, shape ``(len(history),)``."""
        return self._objective[: self._rows].copy()

    @property
    def kl_weight(self) -> Floats:
        """The weight of ``kl_prior`` in the objective at every kept step, shape ``(len(history),)``."""
        return self._kl_weight[: self._rows].copy()

    @property
    def elbo(self) -> Floats:
        """The true ELBO (weight 1, whatever ``kl_weight`` was) at every kept step, shape ``(len(history),)``."""
        totals = self._totals()
        return totals["reconstruction"] - totals["kl_prior"]

    def _groups(self, first: int = 0) -> Iterator[tuple[tuple[SiteInfo, ...], NDArray[np.int64], Floats]]:
        """Per layout: its sites, its row numbers counted from ``first``, and its values (rows, sites, 5)."""
        layout = self._layout[: self._rows]
        lengths = self._lengths()
        starts = (np.cumsum(lengths[layout]) - lengths[layout])[first:]
        for i in np.unique(layout[first:]):
            rows = np.flatnonzero(layout[first:] == i)
            if rows.size == self._rows - first:  # one layout: no need to gather
                values = self._flat[self._used - rows.size * lengths[i] : self._used]
            else:
                values = self._flat[starts[rows, None] + np.arange(lengths[i])]
            yield self._layouts[i], rows, values.reshape(rows.size, len(self._layouts[i]), len(VALUES))

    def _totals(self) -> dict[str, Floats]:
        totals = {name: np.empty(self._rows) for name in ("reconstruction", "kl_prior", "num_observations")}
        for sites, rows, values in self._groups():
            observed = np.array([info.kind == "observed" for info in sites], bool)
            totals["reconstruction"][rows] = values[:, observed, 0].sum(1)
            totals["kl_prior"][rows] = values[:, ~observed, 2].sum(1)
            totals["num_observations"][rows] = values[:, observed, 4].sum(1)
        return totals

    def _decode(self, first: int = 0) -> _Decoded:
        layouts = [self._layouts[i] for i in np.unique(self._layout[first : self._rows])]
        names = sorted({info.site for sites in layouts for info in sites}, key=self._order.__getitem__)
        shape = (self._rows - first, len(names))
        present = np.zeros(shape, bool)
        columns = {name: np.full(shape, np.nan) for name in (*VALUES[:2], "reconstruction", *VALUES[2:])}
        labels = {name: np.full(shape, None, object) for name in LABELS}
        position = {name: i for i, name in enumerate(names)}
        for sites, rows, values in self._groups(first):
            cells = np.ix_(rows, np.array([position[info.site] for info in sites], np.int64))
            observed = np.array([info.kind == "observed" for info in sites], bool)
            present[cells] = True
            for i, name in enumerate(VALUES):
                columns[name][cells] = values[:, :, i]
            columns["kl_prior"][cells] = np.where(observed, 0.0, values[:, :, 2])
            columns["reconstruction"][cells] = np.where(observed, values[:, :, 0], 0.0)
            for name in LABELS:
                labels[name][cells] = np.array([getattr(info, name) or None for info in sites], object)
        return _Decoded(names, present, columns, labels)

    def _divisor(self) -> Floats:
        count = self._totals()["num_observations"]
        bad = ~(count > 0)
        if bad.any():
            raise ValueError(
                f"per_observation=True, but step {self._steps[: self._rows][bad][0]} has no observations "
                "(num_observations is 0 or NaN at every observed site); use per_observation=False"
            )
        return count

    def to_dataframe(self, by: Literal["site", "step"] = "site", *, per_observation: bool = False) -> pd.DataFrame:
        """The kept steps as a table.

        Parameters
        ----------
        by
            "site": one row per (step, site), columns ``step, site, kind, log_p, log_q, reconstruction, kl_prior,
            kl_method, kl_reason, scale``; ``reconstruction`` is 0 at a latent site and ``kl_prior`` 0 at an
            observed one, and a site that a step didn't have has no row there.
            "step": one row per step, columns ``step, elbo, objective, reconstruction, kl_prior, kl_weight,
            num_observations``.
        per_observation
            Divide all values in nats by the step's number of observations, so that runs with different batch sizes
            compare. ``scale``, ``kl_weight`` and ``num_observations`` stay.

        Raises
        ------
        ValueError
            ``by`` is neither; or ``per_observation`` and a step has no observations.
        """
        if by not in ("site", "step"):
            raise ValueError(f"by must be 'site' or 'step', got {by!r}")
        divisor = self._divisor() if per_observation else np.ones(self._rows)
        columns: dict[str, Any]
        if by == "step":
            columns = {**self._totals(), "step": self.steps, "objective": self.objective, "kl_weight": self.kl_weight}
            columns["elbo"] = columns["reconstruction"] - columns["kl_prior"]
            columns.update({name: columns[name] / divisor for name in PER_OBSERVATION if name in columns})
            return pd.DataFrame(columns, columns=BY_STEP)
        names, present, values, labels = self._decode()
        row, site = np.nonzero(present)
        columns = {name: column[present] for name, column in {**values, **labels}.items()}
        columns["step"] = self._steps[row]
        columns["site"] = np.array(names, object)[site]
        columns.update({name: columns[name] / divisor[row] for name in PER_OBSERVATION if name in columns})
        return pd.DataFrame(columns, columns=BY_SITE)

    def summary(self, window: int | None = None) -> pd.DataFrame:
        """Mean contribution of every site to the ELBO over the last steps.

        Parameters
        ----------
        window
            Number of last recorded steps. Default: the last quarter of the run, at least 100 steps (all of a shorter
            run) and at most ``max_steps // 4``.

        Returns
        -------
        pandas.DataFrame
            Indexed by site, the last row "ELBO" the total. Columns: ``kind``; ``mean`` of ``reconstruction - kl_prior``
            (a step without the site counts as 0, so that the sites sum to the ELBO); ``se``, its standard error
            allowing for autocorrelation (initial monotone sequence, Geyer 1992; NaN below 4 steps; a trend in
            the window inflates it, as it should); ``share``, ``|mean|`` over the sum of ``|mean|`` of all sites;
            ``kl_method`` in the window. ``attrs`` has ``window``, ``first_step`` and ``last_step``.

        Raises
        ------
        ValueError
            Nothing was recorded, or ``window`` exceeds the steps kept at full resolution.
        """
        self._require_steps("summary()")
        full = self.num_recorded - self._tail
        if window is None:
            window = min(max(self.num_recorded // 4, 100), full, (self.max_steps or 4 * full) // 4)
        elif not 1 <= operator.index(window) <= full:
            raise ValueError(
                f"window must be from 1 to {full}, the number of last steps kept at full resolution; got {window}. "
                "For a longer one record with a greater max_steps"
            )
        first = self._rows - window
        names, present, values, labels = self._decode(first)
        terms = np.where(present, values["reconstruction"] - values["kl_prior"], 0.0)
        series = np.column_stack([terms, self.elbo[first:]])
        mean = series.mean(0)
        size = np.abs(mean[:-1])
        share = size / size.sum() if size.sum() > 0 else np.zeros(len(names))
        seen = [[labels[name][present[:, i], i] for name in LABELS] for i in range(len(names))]
        methods = [", ".join(sorted({str(m) for m in method if m})) or None for _, method, _ in seen]
        table = pd.DataFrame(
            {
                "kind": [*(str(kind[-1]) for kind, _, _ in seen), "total"],
                "mean": mean,
                "se": _standard_error(series),
                "share": [*share, 1.0],
                "kl_method": [*methods, None],
            },
            index=pd.Index([*names, "ELBO"], name="site"),
        )
        steps = self._steps[first : self._rows]
        table.attrs.update(window=int(window), first_step=int(steps[0]), last_step=int(steps[-1]))
        return table

    def _require_steps(self, what: str) -> None:
        if not self._rows:
            raise ValueError(f"{what} needs at least one recorded step; this history is empty")

    # Files

    def to_xarray(self) -> xr.Dataset:
        """The kept steps as a Dataset; ``History.from_xarray`` is its inverse.

        Returns
        -------
        xarray.Dataset
            Coordinates ``step`` and ``site``. ``elbo``, ``objective``, ``kl_weight`` have dims (step,); ``log_p``,
            ``log_q``, ``reconstruction``, ``kl_prior``, ``scale``, ``num_observations`` (step, site), NaN where a step
            didn't have the site; ``kind``, ``kl_method``, ``kl_reason`` (site,), or (step, site) if they change, empty
            for none. ``attrs`` holds the identity that ties them and what is needed to go on recording.
        """
        names, present, values, labels = self._decode()
        data: dict[str, Any] = {
            name: ("step", column)
            for name, column in [("elbo", self.elbo), ("objective", self.objective), ("kl_weight", self.kl_weight)]
        }
        data.update({name: (("step", "site"), column) for name, column in values.items()})
        first_row = present.argmax(0) if self._rows else np.zeros(0, np.int64)
        for name, label in labels.items():
            label[label == None] = ""  # noqa: E711 - elementwise; a file has no None
            fixed = label[first_row, np.arange(len(names))]
            data[name] = (("step", "site"), label) if ((label != fixed) & present).any() else ("site", fixed)
        dataset = xr.Dataset(data, {"step": self.steps, "site": np.array(names, object)})
        for name, long_name in LONG_NAMES.items():
            dataset[name].attrs["long_name"] = long_name
        dataset.attrs.update(
            title="Decomposed ELBO by step and site",
            identity=IDENTITY,
            num_recorded=self.num_recorded,
            thinning_stride=self._stride,
            full_resolution_from=self._tail,
        )
        if self.max_steps is not None:
            dataset.attrs["max_steps"] = self.max_steps
        return dataset

    @classmethod
    def from_xarray(cls, dataset: xr.Dataset) -> History:
        """The history that gave ``dataset`` by ``to_xarray``, ready for further steps.

        Raises
        ------
        ValueError
            A variable or attribute is missing, or steps were taken out of the dataset.
        """
        needed = {*VALUES, *LABELS, "reconstruction", "objective", "kl_weight", "step", "site"}
        attributes = {"num_recorded", "thinning_stride", "full_resolution_from"}
        missing = sorted((needed - set(dataset.variables)) | (attributes - set(dataset.attrs)))
        if missing:
            raise ValueError(f"not a saved History: {', '.join(missing)} missing")
        max_steps = dataset.attrs.get("max_steps")
        history = cls(None if max_steps is None else int(max_steps))
        dataset = dataset.transpose("step", "site")
        names, steps = dataset["site"].values.tolist(), dataset["step"].values.tolist()
        objective, kl_weight = dataset["objective"].values.tolist(), dataset["kl_weight"].values.tolist()
        values = np.stack([dataset[name].values for name in VALUES], -1)
        # A present site has a 0 in one of the two: kl_prior if observed, reconstruction if not.
        absent = np.isnan(values[:, :, 2]) & np.isnan(dataset["reconstruction"].values)
        labels = [np.broadcast_to(dataset[name].values.astype(object), absent.shape) for name in LABELS]
        codes = [pd.factorize(label.ravel())[0].reshape(absent.shape) for label in labels]
        # One SiteInfo tuple per distinct row of labels.
        _, firsts, layout = np.unique(np.hstack([absent, *codes]), axis=0, return_index=True, return_inverse=True)
        present = [np.flatnonzero(~absent[row]) for row in firsts]
        layouts = [
            tuple(SiteInfo(names[i], kind[row, i], method[row, i] or None, reason[row, i] or None) for i in here)
            for row, here in zip(firsts, present, strict=True)
            for kind, method, reason in [labels]
        ]
        for row, (step, i) in enumerate(zip(steps, layout.ravel(), strict=True)):
            row_values = values[row, present[i]]
            history.append(step, layouts[i], row_values, objective=objective[row], kl_weight=kl_weight[row])
        history.num_recorded = int(dataset.attrs["num_recorded"])
        history._stride = int(dataset.attrs["thinning_stride"])
        history._tail = int(dataset.attrs["full_resolution_from"])
        history._order = {name: i for i, name in enumerate(names)}
        if len(history._records()) != len(history):
            raise ValueError(
                f"the dataset has {len(history)} steps where its attributes say {len(history._records())}: steps were "
                "taken out of it; use the dataset that to_xarray() or save() gave"
            )
        return history

    def save(self, path: str | Path) -> None:
        """Write the history to ``path``, replacing it: netCDF if it ends in .nc, zarr if it ends in .zarr.

        Raises
        ------
        ValueError
            Another suffix.
        ImportError
            h5netcdf (for .nc) or zarr (for .zarr) is not installed.
        """
        path = Path(path)
        if _engine(path) == "zarr":
            self.to_xarray().to_zarr(path, mode="w", zarr_format=2)  # strings are outside the zarr 3 specification
        else:
            self.to_xarray().to_netcdf(path, engine="h5netcdf")

    @classmethod
    def load(cls, path: str | Path) -> History:
        """Read a history that ``save`` wrote; it equals the saved one exactly and can be appended to.

        Raises
        ------
        FileNotFoundError
            Nothing is at ``path``.
        ValueError
            Another suffix than .nc or .zarr, or the file is not a saved history.
        ImportError
            h5netcdf (for .nc) or zarr (for .zarr) is not installed.
        """
        path = Path(path)
        engine = _engine(path)
        if not path.exists():
            raise FileNotFoundError(f"no such history: {path}")
        with xr.open_dataset(path, engine=engine) as dataset:
            return cls.from_xarray(dataset.load())

    # Showing

    def plot(
        self,
        axes: Sequence[Axes] | None = None,
        *,
        per_observation: bool = False,
        smooth: float = 0.05,
        top: int = 6,
    ) -> NDArray[np.object_]:
        """Draw ELBO, reconstruction and stacked KL(q || prior) by site over steps; see ``plots.plot_history``.

        Parameters
        ----------
        axes
            Three matplotlib axes; by default a new figure.
        per_observation
            As in ``to_dataframe``.
        smooth
            Width of the running mean as a fraction of the run; 0 for none.
        top
            Number of sites with the largest ``kl_prior`` to show; the rest are "other".

        Returns
        -------
        numpy.ndarray
            The three axes.

        Raises
        ------
        ValueError
            Nothing was recorded, or ``per_observation`` and a step has no observations.
        """
        self._require_steps("plot()")
        from pyro_elbo_ext.plots import plot_history

        table = self.to_dataframe(by="step", per_observation=per_observation)
        names, present, values, labels = self._decode()
        latent = [i for i in range(len(names)) if (labels["kind"][present[:, i], i] != "observed").any()]
        divisor = self._divisor() if per_observation else np.ones(self._rows)
        kl_prior = np.where(present, values["kl_prior"], 0.0)[:, latent] / divisor[:, None]
        return plot_history(
            self.steps,
            table["elbo"].to_numpy(),
            table["reconstruction"].to_numpy(),
            kl_prior,
            [names[i] for i in latent],
            objective=table["objective"].to_numpy() if (self.kl_weight != 1).any() else None,
            axes=axes,
            smooth=smooth,
            top=top,
            unit="nats per observation" if per_observation else "nats",
        )

    def _status(self) -> str:
        if not self._rows:
            return "no steps recorded"
        kept = "" if len(self) == self.num_recorded else f", {len(self):,} kept"
        return f"{self.num_recorded:,} steps recorded{kept}, ELBO {self.elbo[-1]:.6g} at step {self._last_step}"

    def __repr__(self) -> str:
        return f"<History: {self._status()}>"

    def _repr_html_(self) -> str:
        if not self._rows:
            return f"<p><b>History</b>: {self._status()}</p>"
        table = self.summary()
        caption = f"<p><b>History</b>: {self._status()}</p>"
        window = table.attrs["window"]
        note = f"mean contribution to the ELBO (reconstruction - kl_prior) over the last {window:,} steps"
        if len(table) > 21:
            largest = table["share"].iloc[:-1].nlargest(20).index
            note += f"; the 20 largest of {len(table) - 1} sites"
            table = pd.concat([table.loc[[name for name in table.index[:-1] if name in largest]], table.iloc[-1:]])
        html = table.to_html(float_format=lambda x: f"{x:.4g}", na_rep="", border=0)
        return f"{caption}<p><small>{note}</small></p>{cast(str, html)}"


def _resized(array: NDArray[Any], size: int) -> NDArray[Any]:
    new = np.empty(size, array.dtype)
    new[: array.size] = array
    return new


def _engine(path: Path) -> Literal["h5netcdf", "zarr"]:
    engine = ENGINES.get(path.suffix)
    if engine is None:
        raise ValueError(f"a history is saved as {' or '.join(ENGINES)}, not {path.suffix!r}: {path}")
    if importlib.util.find_spec(engine) is None:
        raise ImportError(f"a {path.suffix} file needs the package {engine}: pip install {engine}")
    return engine


def _standard_error(series: Floats) -> Floats:
    """Standard error of the mean of each column of ``series`` (n, m) allowing for autocorrelation, shape (m,).

    The long-run variance is ``-gamma_0 + 2 sum_k Gamma_k`` with ``Gamma_k = gamma_2k + gamma_2k+1`` cut where it first
    is not positive and made monotone (Geyer 1992, Practical Markov Chain Monte Carlo, section 3.3).
    """
    n = len(series)
    if n < 4:
        return np.full(series.shape[1], np.nan)
    spectrum = np.fft.rfft(series - series.mean(0), 2 * n, axis=0)
    covariance = np.fft.irfft(np.abs(spectrum) ** 2, 2 * n, axis=0)[:n] / n
    pairs = covariance[0 : n - 1 : 2] + covariance[1:n:2]
    positive = np.logical_and.accumulate(pairs > 0, axis=0)
    variance = 2 * np.minimum.accumulate(np.where(positive, pairs, 0.0), axis=0).sum(0) - covariance[0]
    # An antithetic series may estimate a variance below 0: the bound on its efficiency that Stan uses.
    variance = np.maximum(variance, covariance[0] / max(np.log10(n), 1.0))
    return cast("Floats", np.sqrt(np.maximum(variance, 0.0) / n))
