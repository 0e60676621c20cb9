"""Predictive comparison on a normal mean, whose leave-one-out densities are exact."""

from __future__ import annotations

from typing import Any

import arviz as az
import numpy as np
import pytest
import xarray as xr
from scipy import stats

from pyro_elbo_ext.comparison.predictive import compare_predictive
from pyro_elbo_ext.inference_data.export import to_arviz

Y = np.array([0.3, -1.0, 0.8, 1.5, 0.1, -0.4])
VARIANCE = 1 / (1 + Y.size)  # mu ~ N(0, 1), y ~ N(mu, 1)
MEAN = VARIANCE * Y.sum()


def exact_elpd() -> np.ndarray:
    others = Y.sum() - Y
    return stats.norm.logpdf(Y, others / Y.size, np.sqrt(1 + 1 / Y.size))


def data_of(mean: float, sd: float, seed: int, *, approximate: bool = False, predictive: bool = True) -> Any:
    rng = np.random.default_rng(seed)
    mu = rng.normal(mean, sd, (4, 1000))
    dims = ("chain", "draw", "datum")
    groups = {
        "posterior": xr.Dataset({"mu": (dims[:2], mu)}),
        "log_likelihood": xr.Dataset({"y": (dims, stats.norm.logpdf(Y, mu[..., None], 1.0))}),
        "observed_data": xr.Dataset({"y": ("datum", Y)}),
    }
    if predictive:
        groups["posterior_predictive"] = xr.Dataset({"y": (dims, rng.normal(mu[..., None], 1.0, (*mu.shape, Y.size)))})
    if approximate:
        log_p = stats.norm.logpdf(mu) + stats.norm.logpdf(Y, mu[..., None], 1.0).sum(-1)
        groups["sample_stats"] = xr.Dataset(
            {"log_p": (dims[:2], log_p), "log_q": (dims[:2], stats.norm.logpdf(mu, mean, sd))}
        )
    indexed = {
        n: g.assign_coords(chain=range(4), draw=range(1000)) if "chain" in g.dims else g for n, g in groups.items()
    }
    return to_arviz(indexed)


def test_exact_draws_on_both_sides() -> None:
    sd = VARIANCE**0.5
    found = compare_predictive(data_of(MEAN, sd, 0), data_of(MEAN, sd, 1))
    row = found.loo.loc["y"]
    # leaving one out of seven terms: the importance weights are mild, and 4000 draws give some 0.01 per observation
    np.testing.assert_allclose(found.pointwise["y"]["mcmc"], exact_elpd(), atol=0.05)
    assert row["difference"] == pytest.approx(0, abs=0.1)
    assert row["bad_khat_approx"] == row["bad_khat_mcmc"] == 0
    assert found.predictions is not None
    assert set(found.predictions.table["verdict"]) == {"good"}
    assert "from MCMC's" in repr(found)
    assert "predictions: 6 parameters" in found._repr_html_()


def test_shifted_draws() -> None:
    shift = 1.0
    found = compare_predictive(data_of(MEAN + shift, 0.05, 0), data_of(MEAN, VARIANCE**0.5, 1))
    # nearly a point at MEAN + shift: its densities are those of the point
    point = stats.norm.logpdf(Y, MEAN + shift, 1.0).sum()
    assert found.loo.loc["y", "elpd_approx"] == pytest.approx(point, abs=0.2)
    assert found.loo.loc["y", "difference"] == pytest.approx(point - exact_elpd().sum(), abs=0.3)
    assert found.predictions is not None
    # a predictive sd of sqrt(1 + VARIANCE)
    off = found.predictions.table["mean_diff"] - shift / (1 + VARIANCE) ** 0.5
    assert (off.abs() < 4.5 * found.predictions.table["mean_diff_error"]).all()


@pytest.mark.skipif(not hasattr(az, "loo_approximate_posterior"), reason="ArviZ 1.x only")
def test_approximate_posterior_is_weighted_right() -> None:
    """A guide that is too wide: its weights are bounded, and with them its densities are the exact posterior's."""
    found = compare_predictive(
        data_of(MEAN, 1.5 * VARIANCE**0.5, 0, approximate=True, predictive=False), data_of(MEAN, VARIANCE**0.5, 1)
    )
    assert found.loo.loc["y", "method_approx"] == "loo_approximate_posterior"
    np.testing.assert_allclose(found.pointwise["y"]["approx"], exact_elpd(), atol=0.05)
    assert found.predictions is None


def test_bad_inputs() -> None:
    good = data_of(MEAN, 1.0, 0)
    with pytest.raises(KeyError, match=r"approx: there is no group 'log_likelihood'.*run_nuts makes it with"):
        compare_predictive(to_arviz({"posterior": xr.Dataset()}), good)
    with pytest.raises(KeyError, match="'w' is not in log_likelihood of approx"):
        compare_predictive(good, good, ["w"])
    with pytest.raises(ValueError, match="no observed site"):
        compare_predictive(good, good, [])
    other = to_arviz({"log_likelihood": xr.Dataset({"y": (("chain", "draw", "datum"), np.zeros((1, 9, 3)))})})
    with pytest.raises(ValueError, match=r"'y' has observations \(3,\) in approx and \(6,\) in mcmc"):
        compare_predictive(other, good)
