"""Comparison with MCMC draws: closed-form distances between normals, verdicts, and bad inputs."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pyro
import pytest
import torch
import xarray as xr
from scipy import stats

from pyro_elbo_ext.comparison.marginal import FIGURES, compare_to_mcmc
from pyro_elbo_ext.inference_data.export import to_arviz


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
    few = compare_to_mcmc({"x": normal(shape=(1, 20))}, {"x": normal(seed=1, shape=(1, 30))})
    assert few.table.loc["x", "verdict"] == "not enough draws to tell"
    # errors near sqrt(1/20 + 1/30) = 0.29, and a floor between halves of 15 draws, against the threshold 0.1
    times = re.search(r"To tell takes about (\d+) times the 20 draws of approx and 30 of mcmc", few.verdict)
    assert times is not None
    assert 8 <= int(times[1]) <= 400
    assert "To tell" not in compare_to_mcmc({"x": normal()}, {"x": normal(seed=1)}).verdict


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


# joint distributions


def correlated(seed: int, rho: float, shape: tuple[int, ...] = (4, 500)) -> dict[str, np.ndarray]:
    z = normal(seed=seed, shape=(*shape, 2))
    return {"x": np.stack([z[..., 0], rho * z[..., 0] + (1 - rho**2) ** 0.5 * z[..., 1]], -1)}


def test_joint_sees_what_marginals_do_not() -> None:
    pytest.importorskip("sklearn")
    comparison = compare_to_mcmc(correlated(0, 0.0), correlated(1, 0.9))
    assert set(comparison.table["verdict"]) == {"good"}
    joint = comparison.joint(["sliced_wasserstein", "mmd", "classifier"])
    assert (joint["value"] > joint["floor"]).all()
    assert joint.loc["sliced_wasserstein", "value"] > 3 * joint.loc["sliced_wasserstein", "floor"]
    assert math.isnan(joint.loc["sliced_wasserstein", "p_value"])
    assert (joint.loc[["mmd", "classifier"], "p_value"] < 0.01).all()
    assert (joint.loc[["mmd", "classifier"], "floor_p_value"] > 0.01).all()


def test_joint_of_one_distribution() -> None:
    joint = compare_to_mcmc(correlated(0, 0.9), correlated(1, 0.9)).joint(max_draws=500)
    assert list(joint.index) == ["sliced_wasserstein", "mmd"]
    assert joint.loc["sliced_wasserstein", "value"] < 1.5 * joint.loc["sliced_wasserstein", "floor"]
    assert joint.loc["mmd", "p_value"] > 0.01
    assert (joint["draws"] == 500).all()
    assert (joint["floor_draws"] == 250).all()


def test_joint_of_many_dimensions() -> None:
    """The covariance of 100 parameters from 1000 draws is far off, in the same way for both sides."""
    pytest.importorskip("sklearn")
    a, b = normal(shape=(4, 500, 100)), normal(seed=1, shape=(4, 500, 100))
    joint = compare_to_mcmc({"x": a}, {"x": b}).joint(["sliced_wasserstein", "mmd", "classifier"])
    assert joint.loc["sliced_wasserstein", "value"] < joint.loc["sliced_wasserstein", "floor"]
    assert (joint.loc[["mmd", "classifier"], "p_value"] > 0.01).all()


def test_joint_counts_independent_draws() -> None:
    """An autoregression with coefficient 0.9 has 1/19 of its draws' number as effective size; the p-value stays honest."""
    noise = normal(seed=2, shape=(4, 2000))
    chains = np.zeros((4, 2000))
    chains[:, 0] = noise[:, 0] / (1 - 0.81) ** 0.5
    for i in range(1, 2000):
        chains[:, i] = 0.9 * chains[:, i - 1] + noise[:, i]
    joint = compare_to_mcmc({"x": normal(scale=1 / 0.19**0.5)}, {"x": chains}).joint(["mmd"])
    assert 4000 / 19 / 2 < joint.loc["mmd", "draws"] < 4000 / 19 * 2  # half of the draws are compared
    assert joint.loc["mmd", "p_value"] > 0.01


def test_joint_bad_inputs() -> None:
    comparison = compare_to_mcmc({"x": normal()}, {"x": normal(seed=1)})
    with pytest.raises(ValueError, match="unknown distance 'energy'"):
        comparison.joint(["energy"])
    with pytest.raises(ValueError, match="4 independent draws"):
        comparison.joint(max_draws=4)


# transformed parameters, names and dims


def test_transformed() -> None:
    z, mu = normal(shape=(4, 500, 3)), normal(seed=1, shape=(4, 500))
    dims = ("chain", "draw", "school")
    approx = xr.Dataset({"mu": (dims[:2], mu), "z": (dims, z)}, coords={"school": ["A", "B", "C"]})
    reference = {"theta": mu[..., None] + 2 * z}
    transformed = {"theta": lambda draws: draws["mu"] + 2 * draws["z"]}
    table = compare_to_mcmc(approx, reference, transformed=transformed).table
    assert table[list(FIGURES)].to_numpy() == pytest.approx(0, abs=1e-12)
    assert list(table.index) == ["theta[0]", "theta[1]", "theta[2]"]
    both = compare_to_mcmc(approx, approx, ["sum"], transformed={"sum": lambda draws: draws["z"].values.sum(-1)})
    assert list(both.table.index) == ["sum"]
    with pytest.raises(ValueError, match="both have"):
        compare_to_mcmc(approx, approx, transformed={"mu": lambda draws: draws["mu"]})
    with pytest.raises(ValueError, match="must keep 'chain' and 'draw'"):
        compare_to_mcmc(approx, reference, transformed={"theta": lambda draws: draws["z"].mean("draw")})
    with pytest.raises(ValueError, match="must keep 'chain' and 'draw'"):
        compare_to_mcmc(approx, reference, transformed={"theta": lambda draws: draws["mu"].values.ravel()})
    with pytest.raises(KeyError) as raised:
        compare_to_mcmc(approx, reference, transformed={"theta": lambda draws: draws["w"]})
    assert "in transformed['theta'] on the draws of approx" in raised.value.__notes__[0]


def test_alignment() -> None:
    values = normal(shape=(2, 100, 2, 3))
    ours = xr.Dataset({"x": (("chain", "draw", "a", "b"), values)}, coords={"a": ["p", "q"]})
    theirs = ours.transpose("b", "draw", "a", "chain").isel(a=[1, 0])
    comparison = compare_to_mcmc(ours, theirs)
    assert (comparison.table[list(FIGURES)] == 0).all().all()
    assert comparison.table.index[0] == "x[0, q]"  # in the order of mcmc
    with pytest.raises(ValueError, match=r"other labels along 'a': \['p', 'q'\] in approx, \['p', 'r'\] in mcmc"):
        compare_to_mcmc(ours, theirs.assign_coords(a=["r", "p"]).isel(a=[1, 0]))
    with pytest.raises(KeyError) as raised:
        compare_to_mcmc({"x": values, "mine": values}, {"x": values[..., :1], "theirs": values})
    message = str(raised.value)
    for part in (
        "'theirs' is not in approx",
        "'x' has shape (2, 3) in approx and (2, 1) in mcmc",
        "only in approx: mine",
        "only in mcmc: theirs",
        "transformed=",
        "var_names",
    ):
        assert part in message


def lkj(chains: int, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return pyro.distributions.LKJCholesky(3, torch.tensor(2.0)).sample((chains, 500))


def test_entries_that_are_constant_and_equal_are_left_out_and_said() -> None:
    found = compare_to_mcmc({"L": lkj(1, 0).numpy()}, {"L": lkj(4, 1).numpy()})
    assert list(found.table.index) == ["L[1, 0]", "L[1, 1]", "L[2, 0]", "L[2, 1]", "L[2, 2]"]
    assert found.constant == {"L[0, 0]": 1.0, "L[0, 1]": 0.0, "L[0, 2]": 0.0, "L[1, 2]": 0.0}
    assert "Constant and equal on both sides, so not compared: L[0, 0], L[0, 1]" in repr(found)
    assert "not compared" in found._repr_html_()
    assert found.joint(["sliced_wasserstein"]).shape[0] == 1
    assert found.plot() is not None


@pytest.mark.parametrize(
    ("approx", "mcmc", "message"),
    [
        (np.ones((1, 50)), np.random.default_rng(0).normal(size=(1, 50)), "constant in approx, at 1, and varies"),
        (np.random.default_rng(0).normal(size=(1, 50)), np.zeros((1, 50)), "constant in mcmc, at 0, and varies"),
        (np.zeros((1, 50)), np.ones((1, 50)), "0 in approx and 1 in mcmc"),
        (np.ones((1, 50)), np.ones((1, 50)), "nothing to compare"),
    ],
)
def test_constants_that_differ_are_told(approx: Any, mcmc: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare_to_mcmc({"x": approx}, {"x": mcmc})


def test_data_without_draws_are_told() -> None:
    group = xr.Dataset({"y": (["chain", "draw"], np.zeros((1, 10)))})
    draws = {"y": np.random.default_rng(0).normal(size=(1, 10))}
    for data in (xr.DataTree.from_dict({"prior": group}), to_arviz({"prior": group}), xr.DataTree()):
        for sides, which in (((data, draws), "approx"), ((draws, data), "mcmc")):
            with pytest.raises(ValueError, match=f"{which} has no draws: there is no group 'posterior'"):
                compare_to_mcmc(*sides)
    with pytest.raises(ValueError, match="'y' of approx is not an array of numbers"):
        compare_to_mcmc({"y": np.array([["a", "b"]])}, draws)
