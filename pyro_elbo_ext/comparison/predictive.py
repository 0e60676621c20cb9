"""Do an approximation and MCMC predict the same?  Leave-one-out densities and posterior predictive draws."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from pyro_elbo_ext.comparison.marginal import Comparison, compare_to_mcmc
from pyro_elbo_ext.inference_data.arviz_statistics import leave_one_out
from pyro_elbo_ext.inference_data.export import dataset_of
from pyro_elbo_ext.programs.arguments import names_of


class PredictiveComparison:
    """Predictions of both sides per observed site; made by `compare_predictive`.

    Attributes
    ----------
    loo : pandas.DataFrame
        Indexed by ``observed`` site, in nats: ``elpd_approx`` and ``elpd_mcmc``, the expected log predictive densities of
        all observations; ``difference``, the first less the second, and its standard error ``difference_error`` over
        observations; ``bad_khat_approx`` and ``bad_khat_mcmc``, the observations whose k-hat is above
        ``min(1 - 1 / log10(S), 0.7)`` with S draws, so that their densities are unreliable; ``method_approx`` and
        ``method_mcmc``, ArviZ's function.
    pointwise : dict
        Observed site to a Dataset with ``approx`` and ``mcmc``, each observation's elpd, and their k-hats.
    predictions : Comparison or None
        Posterior predictive draws, observation by observation, if both sides have them.
    """

    def __init__(self, loo: pd.DataFrame, pointwise: dict[str, xr.Dataset], predictions: Comparison | None) -> None:
        self.loo, self.pointwise, self.predictions = loo, pointwise, predictions

    @property
    def verdict(self) -> str:
        """A line per observed site, and one for the predictive draws."""
        lines = []
        for name, row in self.loo.iterrows():
            bad = int(row["bad_khat_approx"] + row["bad_khat_mcmc"])
            doubt = f"; not to be relied on, {bad} k-hats are too high" if bad else ""
            lines.append(
                f"{name}: elpd {row['difference']:+.2f} ± {row['difference_error']:.2f} nats from MCMC's{doubt}"
            )
        if self.predictions is not None:
            lines.append(f"predictions: {self.predictions.verdict}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"{self.loo.to_string()}\n{self.verdict}"

    def _repr_html_(self) -> str:
        return f"{self.loo.to_html()}<p>{self.verdict}</p>".replace("\n", "<br>")


def compare_predictive(
    approx: Any, mcmc: Any, var_names: Iterable[str] | None = None, *, predictions: bool = True
) -> PredictiveComparison:
    """Compare the predictions of an approximation with those of MCMC.

    Parameters
    ----------
    approx, mcmc
        ArviZ data with the group ``log_likelihood``, as of ``from_pyro_svi``, ``from_pyro_mcmc`` and
        ``run_nuts(..., log_likelihood=True)``, and ``posterior_predictive`` if predictions are to be compared. With ArviZ
        1.x and ``log_p`` and ``log_q`` in ``sample_stats``, the approximation's leave-one-out densities are of the exact
        posterior by importance weights, so that they should agree where k-hat is low; otherwise they are of the
        approximation taken as the posterior.
    var_names
        Observed sites; by default all of ``mcmc``'s log likelihoods.
    predictions
        Whether to compare posterior predictive draws, where both sides have them. Leave them out if an observation is
        the same in all draws, which has no scale to compare on.

    Raises
    ------
    KeyError
        If a group or site is missing.
    ValueError
        If a site has other observations on the two sides.

    References
    ----------
    Vehtari, Gelman, Gabry (2017), Practical Bayesian model evaluation using leave-one-out cross-validation and WAIC.
    Magnusson, Andersen, Jonasson, Vehtari (2019), Bayesian Leave-One-Out Cross-Validation for Large Data.
    """
    sides = {"approx": approx, "mcmc": mcmc}
    likelihoods = {side: _likelihood(data, side) for side, data in sides.items()}
    chosen = likelihoods["mcmc"].data_vars if var_names is None else names_of("var_names", var_names)
    names = [str(name) for name in chosen]
    if not names:
        raise ValueError("there is no observed site to compare")
    for name in names:
        shapes = {}
        for side, likelihood in likelihoods.items():
            if name not in likelihood:
                raise KeyError(f"'{name}' is not in log_likelihood of {side}, which has {list(likelihood.data_vars)}")
            shapes[side] = likelihood[name].transpose("chain", "draw", ...).shape[2:]
        if shapes["approx"] != shapes["mcmc"]:
            raise ValueError(f"'{name}' has observations {shapes['approx']} in approx and {shapes['mcmc']} in mcmc")
    rows, pointwise = {}, {}
    for name in names:
        row: dict[str, Any] = {}
        found: dict[str, Any] = {}
        for side, data in sides.items():
            elpd, khat, row[f"method_{side}"] = leave_one_out(data, name)
            sizes = likelihoods[side].sizes
            threshold = min(1 - 1 / np.log10(sizes["chain"] * sizes["draw"]), 0.7)
            row[f"elpd_{side}"], row[f"bad_khat_{side}"] = float(elpd.sum()), int((khat > threshold).sum())
            found |= {side: (elpd.dims, elpd.values), f"khat_{side}": (elpd.dims, khat.values)}
        difference = np.ravel(found["approx"][1] - found["mcmc"][1])
        row["difference"] = float(difference.sum())
        row["difference_error"] = (
            float(difference.size**0.5 * difference.std(ddof=1)) if difference.size > 1 else np.nan
        )
        rows[name], pointwise[name] = row, xr.Dataset(found)
    order = ["elpd", "bad_khat", "method"]
    columns = [f"{what}_{side}" for what in order for side in sides]
    columns[2:2] = ["difference", "difference_error"]
    table = pd.DataFrame.from_dict(rows, orient="index")[columns].rename_axis("observed")
    return PredictiveComparison(table, pointwise, _predictions(approx, mcmc, names) if predictions else None)


def _likelihood(data: Any, side: str) -> xr.Dataset:
    try:
        return dataset_of(data, "log_likelihood")
    except KeyError as error:
        raise KeyError(
            f"{side}: {error.args[0]}. run_nuts makes it with log_likelihood=True, from_pyro_svi and from_pyro_mcmc "
            "unless told not to"
        ) from None


def _predictions(approx: Any, mcmc: Any, names: list[str]) -> Comparison | None:
    try:
        draws = [dataset_of(data, "posterior_predictive") for data in (approx, mcmc)]
    except KeyError:  # it is not asked for
        return None
    return compare_to_mcmc(draws[0], draws[1], names)
