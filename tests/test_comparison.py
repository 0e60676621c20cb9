"""Comparison with MCMC draws: closed-form distances between normals, verdicts, and bad inputs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from pyro_elbo_ext.comparison import FIGURES, compare_to_mcmc


def normal(loc: float = 0.0, scale: float = 1.0, seed: int = 0, shape: tuple[int, ...] = (4, 1000)) -> np.ndarray:
    return np.random.default_rng(seed).normal(loc, scale, shape)


@pytest.mark.parametrize(("shift", "verdict"), [(0.25, "rough"), (1.0, "bad")])
def test_shifted_normals(shift: float, verdict: str) -> None:
    row = compare_to_mcmc({"x": normal(shift)}, {"x": normal(seed=1)}).table.loc["x"]
    exact = dict(zip(FIGURES, [shift, 0.0, shift, 2 * stats.norm.cdf(shift / 2) - 1], strict=True))
    for name, value in exact.items():
        assert abs(row[name] - value) < 4.5 * row[f"{name}_error"], name
    assert row["verdict"] == verdict


def test_scaled_normals() -> None:
    row = compare_to_mcmc({"x": normal(scale=1.3)}, {"x": normal(seed=1)}).table.loc["x"]
    assert abs(row["log_sd_ratio"] - math.log(1.3)) < 4.5 * row["log_sd_ratio_error"]
    assert abs(row["wasserstein"] - 0.3 * math.sqrt(2 / math.pi)) < 4.5 * row["wasserstein_error"]
    assert row["verdict"] == "means only"


def test_errors_of_independent_draws() -> None:
    row = compare_to_mcmc({"x": normal()}, {"x": normal(seed=1)}).table.loc["x"]
    # an sd from 50 replicates has a standard error of a tenth: 4.5 of them either side
    assert row["mean_diff_error"] == pytest.approx(math.sqrt(2 / 4000), rel=0.45)
    assert row["log_sd_ratio_error"] == pytest.approx(math.sqrt(1 / 4000), rel=0.45)
    assert row["verdict"] == "good"


def test_agrees_with_scipy() -> None:
    a, b = normal(0.3).round(1), normal(seed=1, shape=(2, 300)).round(1)  # with ties
    row = compare_to_mcmc({"x": a}, {"x": b}).table.loc["x"]
    a, b = a.ravel(), b.ravel()
    assert row["kolmogorov"] == pytest.approx(stats.ks_2samp(a, b).statistic, abs=1e-12)
    assert row["wasserstein"] == pytest.approx(stats.wasserstein_distance(a, b) / b.std(ddof=1), rel=1e-9)


def test_floor_and_too_few_draws() -> None:
    mcmc = normal(seed=1)
    mcmc[:2] += 2
    row = compare_to_mcmc({"x": normal(1.0)}, {"x": mcmc}).table.loc["x"]
    assert row["mean_diff_floor"] == pytest.approx((mcmc[:2].mean() - mcmc[2:].mean()) / mcmc[2:].std(ddof=1))
    assert row["verdict"] == "not enough draws to tell"
    few = compare_to_mcmc({"x": normal(shape=(1, 20))}, {"x": normal(seed=1, shape=(1, 20))})
    assert few.table.loc["x", "verdict"] == "not enough draws to tell"


def test_labels_and_display() -> None:
    dims = ("chain", "draw", "school")
    data = xr.Dataset({"theta": (dims, normal(shape=(2, 100, 2)))}, coords={"school": ["Alpha", "Beta"]})
    comparison = compare_to_mcmc(data, xr.DataTree.from_dict({"posterior": data}))
    assert list(comparison.to_dataframe().index) == ["theta[Alpha]", "theta[Beta]"]
    assert "theta[Alpha]" in repr(comparison)
    assert "theta[Alpha]" in comparison._repr_html_()
    assert "2 parameters" in comparison.verdict
    assert (comparison.table[list(FIGURES)] == 0).all().all()


def test_plot() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    comparison = compare_to_mcmc({"x": normal(shape=(1, 50, 2))}, {"x": normal(seed=1, shape=(1, 50, 2))})
    figure = comparison.plot()
    assert len(figure.axes) == 3
    assert [label.get_text() for label in figure.axes[-1].get_yticklabels()] == ["x[0]", "x[1]"]
    matplotlib.pyplot.close(figure)


NAN = np.where(np.arange(1000) == 3, np.nan, normal())


@pytest.mark.parametrize(
    ("approx", "mcmc", "error", "message"),
    [
        ({"y": normal()}, {"x": normal()}, KeyError, "'x' is not in approx"),
        ({"x": normal()}, {"x": normal(shape=(1, 9, 2))}, ValueError, "'x' has shape"),
        ({"x": NAN}, {"x": normal()}, ValueError, "'x' has 4 NaN or infinite draws in approx"),
        ({"x": normal()}, {"x": np.ones((4, 9))}, ValueError, "'x' is constant in mcmc"),
        ({"x": normal(shape=(1, 3))}, {"x": normal()}, ValueError, "'x' has 3 draws in approx"),
        ({"x": normal(shape=(9,))}, {"x": normal()}, ValueError, "must start with"),
        (3, {"x": normal()}, TypeError, "approx must be ArviZ data"),
        ({"x": normal()}, {}, ValueError, "no variable"),
    ],
)
def test_bad_inputs(approx: Any, mcmc: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        compare_to_mcmc(approx, mcmc)
