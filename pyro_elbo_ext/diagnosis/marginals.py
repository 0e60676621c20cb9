"""How far each scalar's marginal under the guide is from the posterior's: shift of the mean, ratio of the sds.

The posterior comes as importance weights of the guide's own draws, or as draws of chains. Both figures come with standard
errors, by the influence of every draw on them (Hampel 1974).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from pyro_elbo_ext.diagnosis.findings import NOT_KNOWN, Verdict
from pyro_elbo_ext.inference_data.arviz_statistics import effective_size, pareto_smoothed
from pyro_elbo_ext.inference_data.draws import to_numpy
from pyro_elbo_ext.inference_data.labels import Labels, scalar_label

Array = NDArray[np.float64]

GOOD = (
    0.1  # posterior sds of the mean, and log sds: below in both, the guide's marginal can stand in for the posterior's
)
BAD = 0.5  # above in either, it cannot
HEAVY = 0.5  # shape of the tails from which on there is no variance
CENTRAL = (0.15865525393145707, 0.5, 0.8413447460685429)  # of a Gaussian: mean and one sd to either side
BLOCKS = 16  # of draws, whose quantiles differ as much as their errors are large
COLUMNS = 256  # scalars whose figures are computed at once: it takes several times the memory of their draws
INDEPENDENT = 32  # chains from which on their means alone give the standard error


class Scalars(NamedTuple):
    """Draws of scalars, shape ``(*sample, n)``, with each one's name and site."""

    names: list[str]
    sites: list[str]
    draws: Array

    def take(self, chosen: NDArray[np.bool_]) -> Scalars:
        """Those that are chosen, a mask of shape ``(n,)``."""
        if chosen.all():
            return self
        return Scalars(
            [name for name, good in zip(self.names, chosen, strict=True) if good],
            [site for site, good in zip(self.sites, chosen, strict=True) if good],
            self.draws[..., chosen],
        )


def scalars_of(values: Mapping[str, Any], nodes: Mapping[str, Any], leading: int) -> Scalars:
    """Every entry of every site's draws, as float64; the first ``leading`` dims are the draws'."""
    names: list[str] = []
    sites: list[str] = []
    columns: list[Array] = []
    labels = Labels(nodes=nodes)
    for site, value in values.items():
        array = to_numpy(value) if isinstance(value, Tensor) else np.asarray(value)
        sample = [f"sample_{i}" for i in range(leading)]
        key = labels.variable(site)
        one = labels.dataset({site: array[(slice(0, 1),) * leading]}, nodes, sample)[key]
        flat = array.reshape(*array.shape[:leading], math.prod(array.shape[leading:])).astype(np.float64)
        names += [scalar_label(key, one, index) for index in np.ndindex(array.shape[leading:])]
        sites += [site] * flat.shape[-1]
        columns.append(flat)
    return Scalars(names, sites, np.concatenate(columns, -1) if columns else np.empty((1,) * leading + (0,)))


def varying(draws: Array) -> NDArray[np.bool_]:
    """Which scalars are finite in every draw and more than a constant, shape ``(n,)``."""
    flat = draws.reshape(math.prod(draws.shape[:-1]), draws.shape[-1])
    with np.errstate(invalid="ignore"):
        spread, size = np.ptp(flat, axis=0), np.abs(flat).max(0)
    return np.isfinite(spread) & (spread > 1e-6 * size)


def by_weights(guide: Scalars, log_weights: Array) -> pd.DataFrame:
    """Figures by importance weights of the guide's own draws.

    Parameters
    ----------
    guide
        Draws of shape ``(S, n)``.
    log_weights
        Normalized log weights, shape ``(S,)``.
    """
    x, count = guide.draws, len(log_weights)
    weights = np.exp(log_weights)[:, None]
    guide_mean, guide_sd = x.mean(0), x.std(0, ddof=1)
    mean = (weights * x).sum(0)
    sd = np.sqrt((weights * (x - mean) ** 2).sum(0))
    # the same draws are on both sides: where the weights are equal, so are the means, without any error
    shift = (count * weights * (x - mean) - (x - guide_mean)) / sd
    own, other = ((x - guide_mean) / guide_sd) ** 2 - 1, ((x - mean) / sd) ** 2 - 1
    ratio = 0.5 * (own - count * weights * other)
    with np.errstate(divide="ignore"):
        logs = 2 * np.log(np.abs(x - mean))
    khat = [pareto_smoothed(log_weights + column)[1] for column in logs.T]
    frame = _frame(guide, (mean - guide_mean) / sd, np.log(guide_sd / sd), khat)
    frame["mean_shift_se"] = shift.std(0, ddof=1) / np.sqrt(count)
    frame["log_sd_ratio_se"] = ratio.std(0, ddof=1) / np.sqrt(count)
    return judged(frame)


def by_chains(guide: Scalars, posterior: Array, khat: float) -> pd.DataFrame:
    """Figures by draws of the posterior.

    Where a scalar's tails are too heavy for a variance, on either side, median and half the width of the central 68% take
    the places of mean and sd, which do not exist; column ``robust`` says so.

    Parameters
    ----------
    guide
        Draws of shape ``(S, n)``.
    posterior
        Draws of the same scalars, shape ``(chain, draw, n)``.
    khat
        Of the guide's importance weights.
    """
    x, flat = guide.draws, posterior.reshape(-1, posterior.shape[-1])
    blocks = [_figures(x[:, i : i + COLUMNS], posterior[..., i : i + COLUMNS]) for i in range(0, x.shape[1], COLUMNS)]
    shift, ratio, shift_error, ratio_error = np.concatenate(blocks, 1) if blocks else np.empty((4, 0))
    frame = _frame(guide, shift, ratio, khat)
    frame["mean_shift_se"] = shift_error
    frame["log_sd_ratio_se"] = ratio_error
    # without draws of the posterior, which are NaN then, there is nothing to compare
    heavy = [bool(np.isfinite(b).all()) and max(_tail(a), _tail(b)) >= HEAVY for a, b in zip(x.T, flat.T, strict=True)]
    for column in np.flatnonzero(heavy):
        figures, errors = _by_quantiles(x[:, column], posterior[..., column])
        frame.loc[frame.index[column], ["mean_shift", "log_sd_ratio"]] = figures
        frame.loc[frame.index[column], ["mean_shift_se", "log_sd_ratio_se"]] = errors
    frame["robust"] = heavy
    return judged(frame)


def _figures(x: Array, posterior: Array) -> Array:
    """Shift of the mean, log ratio of the sds, and their errors, shape ``(4, n)``."""
    flat = posterior.reshape(-1, posterior.shape[-1])
    guide_mean, guide_sd = x.mean(0), x.std(0, ddof=1)
    mean, sd = flat.mean(0), flat.std(0, ddof=1)
    centred = (posterior - mean) / sd
    own = (x - guide_mean) / guide_sd
    shift_error = np.hypot(_chain_error(centred), guide_sd / sd / np.sqrt(len(x)))
    ratio_error = 0.5 * np.hypot(_chain_error(centred**2), (own**2).std(0, ddof=1) / np.sqrt(len(x)))
    return np.stack([(mean - guide_mean) / sd, np.log(guide_sd / sd), shift_error, ratio_error])


def by_comparison(guide: Scalars, table: pd.DataFrame, khat: float) -> pd.DataFrame:
    """Figures of `compare_to_mcmc`, whose table is given, for the same scalars in the same order."""
    frame = _frame(guide, -table["mean_diff"].to_numpy(), table["log_sd_ratio"].to_numpy(), khat)
    frame["mean_shift_se"] = table["mean_diff_error"].to_numpy()
    frame["log_sd_ratio_se"] = table["log_sd_ratio_error"].to_numpy()
    return judged(frame)


def judged(frame: pd.DataFrame) -> pd.DataFrame:
    """The table with its last column, the verdict on each scalar."""
    frame["verdict"] = [
        verdict_of(*row)
        for row in frame[["mean_shift", "mean_shift_se", "log_sd_ratio", "log_sd_ratio_se"]].itertuples(index=False)
    ]
    if "robust" not in frame:
        frame["robust"] = False
    columns = [name for name in frame.columns if name not in ("robust", "verdict")]
    return frame[[*columns, "robust", "verdict"]]


def unknown(frame: pd.DataFrame, where: Sequence[bool] | bool = True) -> pd.DataFrame:
    """The table where chains disagree, a mask of shape ``(n,)``: what they have not shown to be bad is not known."""
    disagree = np.broadcast_to(np.asarray(where), len(frame))
    frame.loc[disagree & (frame["verdict"] != "do not use").to_numpy(), "verdict"] = NOT_KNOWN
    return frame


def verdict_of(shift: float, shift_se: float, ratio: float, ratio_se: float) -> Verdict:
    """ "good" where both figures are below `GOOD`, "do not use" where one is above `BAD`, else "means only".

    The largest of many figures is large by their errors too; so the square of each is corrected by what these add to it.
    """
    worst = max(corrected(shift, shift_se), corrected(ratio, ratio_se))
    if not worst <= BAD:  # NaN too
        return "do not use"
    return "good" if worst < GOOD else "means only"


def corrected(figure: float, error: float) -> float:
    """``|figure|`` without what its standard error adds in the quadratic mean."""
    if not np.isfinite(figure) or not np.isfinite(error):
        return float("nan")
    return float(np.sqrt(max(figure**2 - error**2, 0.0)))


def _frame(guide: Scalars, shift: Any, ratio: Any, khat: Any) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "site": guide.sites,
            "mean": guide.draws.mean(0),
            "sd": guide.draws.std(0, ddof=1),
            "mean_shift": shift,
            "mean_shift_se": np.nan,
            "log_sd_ratio": ratio,
            "log_sd_ratio_se": np.nan,
            "khat": khat,
        },
        index=pd.Index(guide.names, name="scalar"),
    )


def _chain_error(values: Array) -> Array:
    """Standard error of the mean of values of shape ``(chain, draw, n)``, shape ``(n,)``."""
    if len(values) >= INDEPENDENT:
        return np.asarray(values.mean(1).std(0, ddof=1) / np.sqrt(len(values)))
    spread = values.reshape(-1, values.shape[-1]).std(0, ddof=1)
    size = np.array([effective_size(values[..., i]) for i in range(values.shape[-1])])
    return np.asarray(spread / np.sqrt(size))


def _tail(draws: Array) -> float:
    """Shape of the tails of draws of shape ``(S,)``: a generalized Pareto distribution's, as of k-hat."""
    distance = np.abs(draws - np.median(draws))
    with np.errstate(divide="ignore"):
        return pareto_smoothed(np.log(distance))[1]


def _by_quantiles(guide: Array, posterior: Array) -> tuple[Array, Array]:
    """Both figures from quantiles, and their errors from the spread of these over blocks of draws and chains."""

    def figures(a: Array, b: Array) -> Array:
        (low, middle, high), (left, centre, right) = np.quantile(a, CENTRAL), np.quantile(b, CENTRAL)
        return np.array([2 * (centre - middle) / (right - left), np.log((high - low) / (right - left))])

    blocks = np.array_split(guide, BLOCKS)
    parts = np.array_split(posterior, BLOCKS, axis=0 if len(posterior) >= BLOCKS else 1)
    found = np.array([figures(a, b.ravel()) for a, b in zip(blocks, parts, strict=True)])
    return figures(guide, posterior.ravel()), found.std(0, ddof=1) / np.sqrt(BLOCKS)
