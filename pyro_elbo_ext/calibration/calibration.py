"""What a calibration found: ranks of the true parameters, tests of them, and a verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from pyro_elbo_ext.calibration.rank_tests import holm, symmetric_ks, uniform_chi2, uniform_ks
from pyro_elbo_ext.calibration.simulation import Failed, Ranked
from pyro_elbo_ext.inference_data.export import to_arviz
from pyro_elbo_ext.inference_data.labels import Labels, scalar_label

DIM = "simulation"
ALPHA = 0.05
FEW = 100


class Calibration:
    """Ranks of true parameters among draws of what a recipe fits to their data; made by `simulate_calibration`.

    Attributes
    ----------
    ranks : xarray.Dataset
        Parameter to the number of draws below the truth, 0 to ``num_draws``, ties broken at random; dims
        ``(simulation, *plates, *event)``, as are those of the next two.
    probabilities : xarray.Dataset
        ``P_q(theta > truth)``, a tie counting half.
    truth, means, sds : xarray.Dataset
        True parameters, and mean and standard deviation of the draws.
    num_draws : int
        L, draws per simulation.
    num_simulations : int
        Simulations asked for; those that failed have no ranks.
    failures : pandas.DataFrame
        Indexed by simulation; columns ``error``, ``message`` and ``traceback``.
    """

    def __init__(
        self,
        results: Sequence[Ranked],
        failures: Sequence[Failed],
        labels: Labels,
        nodes: Mapping[str, Any],
        num_draws: int,
    ) -> None:
        self.num_draws, self.num_simulations = num_draws, len(results) + len(failures)
        index = np.array([result.index for result in results])

        def dataset(quantity: str) -> xr.Dataset:
            names = results[0].values[quantity]
            arrays = {name: np.stack([result.values[quantity][name] for result in results]) for name in names}
            return labels.dataset(arrays, nodes, (DIM,)).assign_coords({DIM: index})

        self.ranks, self.truth = dataset("rank"), dataset("truth")
        self.means, self.sds = dataset("mean"), dataset("sd")
        self._twice_above = dataset("above")
        self.probabilities = self._twice_above / (2 * num_draws)
        self.failures = pd.DataFrame(
            [(f.error, f.message, f.traceback) for f in failures],
            columns=["error", "message", "traceback"],
            index=pd.Index([f.index for f in failures], name=DIM, dtype=np.int64),
        )
        self._table = self._test()

    @property
    def parameters(self) -> list[str]:
        """Names of the scalar parameters."""
        return list(self._table.index)

    def of(self, parameter: str, quantity: Literal["ranks", "probabilities", "truth", "means", "sds"]) -> NDArray[Any]:
        """One scalar parameter's values of a quantity, shape (finished simulations,)."""
        for label, values in _scalars(getattr(self, quantity)):
            if label == parameter:
                return values
        raise KeyError(f"'{parameter}' was not ranked; the parameters are {self.parameters}")

    def to_dataframe(self) -> pd.DataFrame:
        """One row per scalar parameter.

        Returns
        -------
        pandas.DataFrame
            Indexed by ``parameter``.

            ``chi2_p_value``, ``ks_p_value``
                Two tests that ranks are uniform (Talts et al. 2018).
            ``sbc_p_value``
                Twice the smaller of the two, at most 1; ``sbc_adjusted`` is it adjusted for the number of parameters (Holm).
            ``symmetry_p_value``
                That ``p = P_q(theta > truth)`` is distributed as ``1 - p`` (Yao et al. 2018), by the exact
                distribution of their Kolmogorov-Smirnov distance; ``symmetry_adjusted`` as above.
            ``bias``, ``bias_error``
                Mean of p less 1/2, above 0 where the guide lies too high, and its standard error.
            ``z_mean``, ``z_sd``
                Mean and standard deviation of ``(mean - truth) / sd``; 0 and 1 for a Gaussian posterior hit exactly. An sd
                above 1: the guide is too narrow.
            ``contraction``
                1 less the mean variance of the draws over the prior's variance: near 0, the data tell nothing.
        """
        return self._table.copy()

    def passes(self, alpha: float = ALPHA, test: Literal["both", "sbc", "vsbc"] = "both") -> bool:
        """Whether no scalar parameter is rejected.

        Parameters
        ----------
        alpha
            Probability that a calibrated recipe is rejected by a test, over all parameters.
        test
            "sbc": uniform ranks, the draws have the posterior's distribution. "vsbc": symmetric p, no bias to one
            side, as of a guide whose means can be used though its widths are wrong.
        """
        columns = {"sbc": ["sbc_adjusted"], "vsbc": ["symmetry_adjusted"]}
        columns["both"] = columns["sbc"] + columns["vsbc"]
        if test not in columns:
            raise ValueError(f"test must be one of {', '.join(columns)}, got {test!r}")
        if not 0 < alpha < 1:
            raise ValueError(f"alpha must be between 0 and 1, got {alpha}")
        return bool((self._table[columns[test]] >= alpha).all(axis=None))

    @property
    def verdict(self) -> str:
        """Failures, and both tests at a level of 5%, in a few lines."""
        finished = self.ranks.sizes[DIM]
        lines = [f"{finished} of {self.num_simulations} simulations, {len(self._table)} scalar parameters"]
        if finished < FEW:
            lines.append(f"fewer than {FEW} simulations show gross errors only")
        if len(self.failures):
            first_lines = (
                self.failures["error"] + ": " + self.failures["message"].str.split("\n").str[0].str.slice(0, 200)
            )
            examples = "; ".join(f"{count} times {text}" for text, count in first_lines.value_counts().head(3).items())
            lines.append(f"{len(self.failures)} failed and are left out, which biases what follows: {examples}")
        for test, column, good, bad in (
            ("SBC", "sbc_adjusted", "ranks look uniform", "not calibrated"),
            ("VSBC", "symmetry_adjusted", "no bias to one side seen", "biased"),
        ):
            failed = self._table[self._table[column] < ALPHA].sort_values(column)
            if failed.empty:
                lines.append(f"{test}: {good} (smallest adjusted p-value {self._table[column].min():.3f})")
                continue
            names = [f"{name} ({_fault(row)})" for name, row in failed.head(5).iterrows()]
            more = f" and {len(failed) - 5} more" if len(failed) > 5 else ""
            lines.append(f"{test}: {bad} in {', '.join(names)}{more}")
        return "\n".join(lines)

    def to_arviz(self) -> Any:
        """Ranks over L as ArviZ data, group ``prior_sbc``: ArviZ 1.x's ``plot_ecdf_pit`` takes it."""
        normalized = (self.ranks + 0.5) / (self.num_draws + 1)
        return to_arviz({"prior_sbc": normalized.rename({DIM: "draw"}).expand_dims(chain=[0])})

    def plot(self, max_parameters: int = 6) -> Any:
        """Rank ECDFs with simultaneous bands, and histograms of p; returns the matplotlib figure."""
        from pyro_elbo_ext.calibration.plots import plot_calibration

        ranks, probabilities = dict(_scalars(self.ranks)), dict(_scalars(self.probabilities))
        return plot_calibration(self._table, ranks, probabilities, self.num_draws, max_parameters)

    def _test(self) -> pd.DataFrame:
        rows = {}
        others = zip(*(_scalars(data) for data in (self._twice_above, self.truth, self.means, self.sds)), strict=True)
        for (label, ranks), ((_, above), (_, truth), (_, mean), (_, sd)) in zip(
            _scalars(self.ranks), others, strict=True
        ):
            chi2, ks = uniform_chi2(ranks, self.num_draws), uniform_ks(ranks, self.num_draws)
            p = above / (2 * self.num_draws)
            with np.errstate(divide="ignore", invalid="ignore"):  # a point guide has sd 0, one simulation no sd
                z = (mean - truth) / sd
                count = ranks.size
                rows[label] = {
                    "chi2_p_value": chi2,
                    "ks_p_value": ks,
                    "sbc_p_value": min(1.0, 2 * min(chi2, ks)),
                    "symmetry_p_value": symmetric_ks(above - self.num_draws)[1],
                    "bias": p.mean() - 0.5,
                    "bias_error": p.std(ddof=1) / count**0.5 if count > 1 else np.nan,
                    "z_mean": z.mean(),
                    "z_sd": z.std(ddof=1) if count > 1 else np.nan,
                    "contraction": 1 - (sd**2).mean() / truth.var(ddof=1) if count > 1 else np.nan,
                }
        table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("parameter")
        table.insert(3, "sbc_adjusted", holm(table["sbc_p_value"].to_numpy()))
        table.insert(5, "symmetry_adjusted", holm(table["symmetry_p_value"].to_numpy()))
        return table

    def __repr__(self) -> str:
        return f"{self._table.round(3).to_string()}\n{self.verdict}"

    def _repr_html_(self) -> str:
        lines = self.verdict.replace("&", "&amp;").replace("<", "&lt;").replace("\n", "<br>")
        return f"<p>{lines}</p>{self._table.round(3).to_html()}"


def _scalars(data: xr.Dataset) -> Iterator[tuple[str, NDArray[Any]]]:
    for name, array in data.data_vars.items():
        for index in np.ndindex(array.shape[1:]):
            yield scalar_label(str(name), array, index), array.values[(slice(None), *index)]


def _fault(row: Any) -> str:
    if row["symmetry_adjusted"] < ALPHA:
        return f"too {'high' if row['bias'] > 0 else 'low'}"
    if abs(row["z_sd"] - 1) > 0.1:  # more than chance for some 200 simulations
        return f"too {'narrow' if row['z_sd'] > 1 else 'wide'}"
    return "see its rank plot"
