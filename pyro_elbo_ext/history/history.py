"""The detached record of a fit and what can be read from it: tables, summary, files and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from pyro_elbo_ext.files.untrusted import reading
from pyro_elbo_ext.history import files as history_files
from pyro_elbo_ext.history import tables as history_tables
from pyro_elbo_ext.history.gradient_noise import GradientNoise
from pyro_elbo_ext.history.reading import ReadableRecord
from pyro_elbo_ext.history.record import VALUES, SiteInfo

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd
    import xarray as xr
    from matplotlib.axes import Axes
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["VALUES", "History", "SiteInfo"]


class History(ReadableRecord):
    """Every site's terms at every step of a fit, at bounded memory.

    The ELBO of a step is ``sum(reconstruction) - sum(kl_prior)`` over its sites, each ``kl_prior`` being
    KL(q || prior) with weight 1; the objective, which may weight it or be another bound, is kept beside it. Values are
    in nats.

    Parameters
    ----------
    max_steps
        Most steps kept, at least 4; None keeps all. At least the last ``max_steps // 4`` steps are kept at full
        resolution. Older ones are thinned to every ``stride``-th step (the first always among them), the stride
        doubling as the run gets longer, so between half and all of ``max_steps`` rows cover the whole run.
    gradient_snr
        Whether to record gradients too, for the method of the same name: None, not; "steps", one gradient for each step,
        whose noise is its variation from step to step; "particles", the gradients of each step's particles, whose
        variation within the step gives the noise of their mean.
    gradient_window
        Gradients of the last ``gradient_window`` to ``2 * gradient_window`` steps are read; at least 2. However long the
        run, four tensors of the size of each parameter are kept.

    Attributes
    ----------
    num_recorded : int
        Steps recorded so far; ``len(history)`` is the number of them kept.

    Raises
    ------
    ValueError
        ``max_steps`` is below 4, ``gradient_snr`` is none of the three, or ``gradient_window`` is below 2.

    References
    ----------
    Rainforth et al. (2018), "Tighter variational bounds are not necessarily better".
    """

    def __init__(
        self,
        max_steps: int | None = 10_000,
        *,
        gradient_snr: Literal["steps", "particles"] | None = None,
        gradient_window: int = 200,
    ) -> None:
        self._noise = None if gradient_snr is None else GradientNoise(gradient_snr, gradient_window)
        super().__init__(max_steps)

    def clear(self) -> None:
        """Forget every recorded step and gradient; the arguments of the constructor stay."""
        super().clear()
        if self._noise is not None:
            self._noise.clear()

    # Gradients

    @property
    def gradient_mode(self) -> Literal["steps", "particles"] | None:
        """What ``append_gradients`` takes, the constructor's ``gradient_snr``; None if it takes nothing."""
        return None if self._noise is None else self._noise.mode

    def append_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Record the gradients of one step; nothing waits for their device.

        Parameters
        ----------
        gradients
            By parameter, of the parameter's shape in mode "steps". In mode "particles" of shape ``(K, *parameter.shape)``,
            the gradients of K particles whose mean over them is the step's. They are copied, in single precision or
            wider. A parameter may come later, pause, or change its shape, which starts it anew; one that has not come
            for ``2 * gradient_window`` steps is forgotten.

        Raises
        ------
        TypeError
            A gradient is not a tensor of real floating-point numbers.
        ValueError
            The history was not constructed to record gradients, or K is below 2. Nothing is then recorded.
        """
        self._require_noise("append_gradients()").append(gradients)

    def gradient_snr(self, by: Literal["parameter", "element"] = "parameter") -> pd.DataFrame:
        """Signal-to-noise ratio of the step's gradient, ``|E[g]| / sd[g]``, over the last steps (Rainforth et al. 2018).

        In mode "steps" the moments are those of the gradients of the last steps, so that a drift of the gradient counts
        as noise. In mode "particles" the mean is that of the steps' means, and sd the root of the mean over steps of
        the variance within the step over K, the variance of the mean of K particles. Like the constructor's
        ``gradient_snr``, gradients do not go into files.

        Parameters
        ----------
        by
            "parameter": one row each, columns ``parameter``, ``numel``, ``snr`` (norm of the mean over the root of the sum
            of variances), ``snr_median``, ``snr_min``, ``snr_max`` (of its elements, leaving out NaN) and ``num_steps``.
            "element": one row each, columns ``parameter``, ``index`` (a tuple), ``mean``, ``sd``, ``snr`` and ``num_steps``.

        Returns
        -------
        pandas.DataFrame
            A ratio is inf where the gradient did not vary and is not 0; NaN where it was always 0, and in mode "steps"
            after a single step.

        Raises
        ------
        ValueError
            The history was not constructed to record gradients, none was recorded, or ``by`` is neither.
        """
        return self._require_noise("gradient_snr()").table(by)

    def _require_noise(self, what: str) -> GradientNoise:
        if self._noise is None:
            raise ValueError(
                f'{what} needs a history that records gradients: construct it with History(gradient_snr="steps"), or '
                '"particles", and give it to the objective before the fit'
            )
        return self._noise

    # Tables

    def to_dataframe(self, by: Literal["site", "step"] = "site", *, per_observation: bool = False) -> pd.DataFrame:
        """The kept steps as a table.

        Parameters
        ----------
        by
            "site": one row per (step, site), columns ``step, site, kind, log_p, log_q, reconstruction, kl_prior,
            kl_method, kl_reason, scale``; ``reconstruction`` is 0 at a latent site and ``kl_prior`` 0 at an
            observed one, and a site that a step didn't have has no row there. A last column ``contribution`` is there
            exactly if a step has a finite one, which is where the objective is not linear in the log weights (IWAE,
            Renyi): the site's part in that bound, ``sum_k g_k (log p_k - log q_k)`` over particles k with g the bound's
            gradient in the log weights. It is no KL, and NaN at steps of the ELBO, where the site's part is
            ``reconstruction - kl_prior``. The other columns are plain means over particles in either case. If a step has
            weights by site or free bits, the very last column is ``kl_weight``, the weight of the site's ``kl_prior`` (with
            free bits, of the greater of it and its floor), NaN at observed sites.
            "step": one row per step, columns ``step, elbo, objective, reconstruction, kl_prior, kl_weight,
            num_observations``. Where weights differ by site or there are free bits, ``kl_weight`` is
            ``(reconstruction - objective) / kl_prior``, so that the objective is always ``reconstruction - kl_weight *
            kl_prior``.
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
        if by == "site":
            return history_tables.by_site(self._decode(), divisor, self.kl_weight)
        columns = {"step": self.steps, "objective": self.objective, "kl_weight": self.kl_weight, **self._totals()}
        return history_tables.by_step(columns, divisor)

    def summary(self, window: int | None = None) -> pd.DataFrame:
        """Mean of every site's part in the ELBO over the last steps.

        Parameters
        ----------
        window
            Number of last recorded steps. Default: the last quarter of the run, at least 100 steps (all of a shorter
            run) and at most ``max_steps // 4``.

        Returns
        -------
        pandas.DataFrame
            Indexed by site, then a row "ELBO" for the total. Columns: ``kind``; ``mean`` of ``reconstruction - kl_prior``
            (a step without the site counts as 0, so that the sites sum to the ELBO); ``se``, its standard error
            allowing for autocorrelation (initial monotone sequence, Geyer 1992; NaN below 4 steps; a trend in
            the window inflates it, as it should); ``share``, ``|mean|`` over the sum of ``|mean|`` of all sites;
            ``kl_method`` in the window. If sites contributed to a bound that is not linear in the log weights (see
            ``to_dataframe``), also ``contribution``: its mean over the steps in the window that have any, a step without
            the site counting as 0; and a last row "objective", the mean of the bound over the same steps, to which
            contributions do not sum: the objective less their sum is the remainder that comes from the concentration of
            the weights, for IWAE -KL(normalized weights || uniform). ``attrs`` has ``window``,
            ``first_step`` and ``last_step``.

        Raises
        ------
        ValueError
            Nothing was recorded, or ``window`` exceeds the steps kept at full resolution.
        """
        self._require_steps("summary()")
        first = self._rows - self._window(window)
        return history_tables.summarize(self._decode(first), self.elbo[first:], self.objective[first:])

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
            for none; ``contribution`` (step, site) if any is finite, and ``site_kl_weight`` (step, site) if weights differ
            by site. ``attrs`` holds the identity that ties them and what is needed to go on recording.
        """
        by_step = {"elbo": self.elbo, "objective": self.objective, "kl_weight": self.kl_weight}
        progress = (self.num_recorded, self._stride, self._tail)
        attrs: dict[str, Any] = dict(zip(history_files.ATTRIBUTES, progress, strict=True))
        if self.max_steps is not None:
            attrs["max_steps"] = self.max_steps
        return history_files.to_dataset(self._decode(), by_step, attrs)

    @classmethod
    def from_xarray(cls, dataset: xr.Dataset) -> History:
        """The history that gave ``dataset`` by ``to_xarray``, ready for further steps, but without gradients.

        Raises
        ------
        ValueError
            A variable or attribute is missing, or steps were taken out of the dataset.
        """
        history_files.check_dataset(dataset)
        max_steps = dataset.attrs.get("max_steps")
        history = cls(None if max_steps is None else int(max_steps))
        for row in history_files.rows_of(dataset):
            history.append(row.step, row.sites, row.values, objective=row.objective, kl_weight=row.kl_weight)
        num_recorded, stride, tail = (int(dataset.attrs[name]) for name in history_files.ATTRIBUTES)
        history._resume(num_recorded, stride, tail, dataset["site"].values.tolist())
        return history

    def save(self, path: str | Path) -> None:
        """Write the history to ``path``, replacing it: netCDF if it ends in .nc, zarr if it ends in .zarr.

        Gradients are left out.

        Raises
        ------
        ValueError
            Another suffix.
        ImportError
            h5netcdf (for .nc) or zarr (for .zarr) is not installed.
        """
        history_files.write(self.to_xarray(), Path(path))

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
        with reading(Path(path), "a saved history"):
            return cls.from_xarray(history_files.read(Path(path)))

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
        from pyro_elbo_ext.history.plots import plot_history

        table = self.to_dataframe(by="step", per_observation=per_observation)
        decoded = self._decode()
        _, names, present, values, labels = decoded
        bound = decoded.has_contributions
        latent = [i for i in range(len(names)) if (labels["kind"][present[:, i], i] != "observed").any()]
        divisor = self._divisor() if per_observation else np.ones(self._rows)
        kl_prior = np.where(present, values["kl_prior"], 0.0)[:, latent] / divisor[:, None]
        return plot_history(
            self.steps,
            table["elbo"].to_numpy(),
            table["reconstruction"].to_numpy(),
            kl_prior,
            [names[i] for i in latent],
            objective=table["objective"].to_numpy() if bound or (self.kl_weight != 1).any() else None,
            objective_label="bound (objective)" if bound else "weighted objective",
            axes=axes,
            smooth=smooth,
            top=top,
            unit="nats per observation" if per_observation else "nats",
        )

    def _status(self) -> str:
        if not self._rows:
            return "no steps recorded"
        kept = "" if len(self) == self.num_recorded else f", {len(self):,} kept"
        return f"{self.num_recorded:,} steps recorded{kept}, ELBO {self.elbo[-1]:.6g} at step {self._end[2]}"

    def __repr__(self) -> str:
        return f"<History: {self._status()}>"

    def _repr_html_(self) -> str:
        if not self._rows:
            return f"<p><b>History</b>: {self._status()}</p>"
        table = self.summary()
        caption = f"<p><b>History</b>: {self._status()}</p>"
        window = table.attrs["window"]
        note = f"mean part in the ELBO (reconstruction - kl_prior) over the last {window:,} steps"
        if "contribution" in table:
            note += "; contribution is to the bound, whose mean is in the last row"
        if len(table) > 21:
            import pandas as pd

            sites = table[~table["kind"].isin(["total", "bound"])]
            largest = sites["share"].nlargest(20).index
            note += f"; the 20 largest of {len(sites)} sites"
            rest = table.iloc[len(sites) :]
            table = pd.concat([sites.loc[[name for name in sites.index if name in largest]], rest])
        html = table.to_html(float_format=lambda x: f"{x:.4g}", na_rep="", border=0)
        return f"{caption}<p><small>{note}</small></p>{cast(str, html)}"
