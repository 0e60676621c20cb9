from __future__ import annotations

import copy
import importlib.util
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from pyro_elbo_ext.history import record as record_module
from pyro_elbo_ext.history.history import VALUES, History, SiteInfo
from tests.interruptions import stopped_everywhere

MU = SiteInfo("mu", "latent", "analytic", "Normal against Normal")
TAU = SiteInfo("tau", "latent", "sampled", "no closed form")
AUX = SiteInfo("_aux", "auxiliary", "sampled", "in the guide only")
Y = SiteInfo("y", "observed", None, None)
NAN = math.nan
TWO = (MU, Y)
THREE = (TAU, AUX, Y)
COLUMNS = ["step", "site", "kind", "log_p", "log_q", "reconstruction", "kl_prior", "kl_method", "kl_reason", "scale"]
STEP_COLUMNS = ["step", "elbo", "objective", "reconstruction", "kl_prior", "kl_weight", "num_observations"]


def two_values(t: float, count: float = 10.0) -> np.ndarray:
    return np.array([[-1.0 - t, -0.5, 0.5 + t, 1.0, 0.0, NAN], [-20.0 + t, NAN, NAN, 2.0, count, NAN]])


def three_values(t: float) -> np.ndarray:
    return np.array(
        [
            [-2.0, -1.0 - t, 1.0 + t, 1.0, 0.0, NAN],
            [NAN, -3.0, 0.25, 1.0, 0.0, NAN],
            [-7.0 * t, NAN, NAN, 1.0, 5.0, NAN],
        ]
    )


def bound_values(t: float) -> np.ndarray:
    """As ``two_values``, under a bound that is not linear in the log weights."""
    values = two_values(t)
    values[:, -1] = [-0.25 - t, -16.0 + t]
    return values


def record(history: History, start: int, stop: int) -> None:
    """A run whose sites change every third step."""
    for t in range(start, stop):
        if t % 3:
            history.append(10 * t, TWO, two_values(t), objective=-0.5 * t, kl_weight=0.5)
        else:
            history.append(10 * t, THREE, three_values(t), objective=-2.0 * t, kl_weight=1.0)


def assert_same(a: History, b: History) -> None:
    xr.testing.assert_identical(a.to_xarray(), b.to_xarray())
    pd.testing.assert_frame_equal(a.to_dataframe(), b.to_dataframe())
    assert (len(a), a.num_recorded, a.max_steps) == (len(b), b.num_recorded, b.max_steps)


# Reading what was recorded


def test_by_site_table_has_every_number_where_it_belongs() -> None:
    history = History()
    history.append(3, TWO, two_values(1.0), objective=-20.5, kl_weight=0.5)
    history.append(7, THREE, three_values(2.0), objective=-17.0, kl_weight=1.0)
    table = history.to_dataframe()
    expected = pd.DataFrame(
        [
            [3, "mu", "latent", -2.0, -0.5, 0.0, 1.5, "analytic", "Normal against Normal", 1.0],
            [3, "y", "observed", -19.0, NAN, -19.0, 0.0, None, None, 2.0],
            [7, "y", "observed", -14.0, NAN, -14.0, 0.0, None, None, 1.0],
            [7, "tau", "latent", -2.0, -3.0, 0.0, 3.0, "sampled", "no closed form", 1.0],
            [7, "_aux", "auxiliary", NAN, -3.0, 0.0, 0.25, "sampled", "in the guide only", 1.0],
        ],
        columns=COLUMNS,
    )
    assert list(table.columns) == COLUMNS
    pd.testing.assert_frame_equal(table, expected)


def test_elbo_has_weight_one_and_stands_beside_the_objective() -> None:
    history = History()
    history.append(0, TWO, two_values(0.0), objective=-20.25, kl_weight=0.5)
    history.append(2, THREE, three_values(1.0), objective=-9.25, kl_weight=1.0)
    np.testing.assert_array_equal(history.elbo, [-20.5, -7.0 - 2.25])
    np.testing.assert_array_equal(history.objective, [-20.25, -9.25])
    np.testing.assert_array_equal(history.kl_weight, [0.5, 1.0])
    np.testing.assert_array_equal(history.steps, [0, 2])
    steps = history.to_dataframe(by="step")
    assert list(steps.columns) == STEP_COLUMNS
    np.testing.assert_array_equal(steps["elbo"], history.elbo)
    np.testing.assert_array_equal(steps["reconstruction"], [-20.0, -7.0])
    np.testing.assert_array_equal(steps["kl_prior"], [0.5, 2.25])
    np.testing.assert_array_equal(steps["num_observations"], [10.0, 5.0])
    by_site = history.to_dataframe().groupby("step")[["reconstruction", "kl_prior"]].sum()
    np.testing.assert_allclose(by_site["reconstruction"] - by_site["kl_prior"], history.elbo, rtol=1e-15)


def test_per_observation_makes_batch_sizes_compare() -> None:
    history = History()
    for step, batch in enumerate((10, 40)):
        values = two_values(0.0) * np.array([batch, batch, batch, 1.0, 1.0, 1.0])
        values[1, 4] = batch
        history.append(step, TWO, values, objective=-20.25 * batch, kl_weight=0.5)
    table = history.to_dataframe(per_observation=True)
    first, second = (table[table["step"] == step].drop(columns="step").reset_index(drop=True) for step in (0, 1))
    pd.testing.assert_frame_equal(first, second)
    np.testing.assert_allclose(first["kl_prior"], [0.5, 0.0])
    np.testing.assert_allclose(first["log_p"], [-1.0, -20.0])
    np.testing.assert_allclose(first["scale"], [1.0, 2.0])
    steps = history.to_dataframe(by="step", per_observation=True)
    np.testing.assert_allclose(steps["elbo"], -20.5)
    np.testing.assert_allclose(steps["objective"], -20.25)
    np.testing.assert_allclose(steps["num_observations"], [10, 40])


def test_per_observation_says_which_step_has_none() -> None:
    history = History()
    history.append(0, TWO, two_values(0.0), objective=0.0, kl_weight=1.0)
    history.append(4, (MU,), two_values(0.0)[:1], objective=0.0, kl_weight=1.0)
    with pytest.raises(ValueError, match="step 4 has no observations"):
        history.to_dataframe(per_observation=True)
    with pytest.raises(ValueError, match="by must be"):
        history.to_dataframe(by="sites")  # type: ignore[arg-type]


def test_the_caller_may_reuse_its_array_and_change_what_it_reads() -> None:
    history = History()
    values = two_values(0.0)
    history.append(0, TWO, values, objective=-20.5, kl_weight=1.0)
    values[:] = 99.0
    history.steps[:] = 5
    history.objective[:] = 5
    np.testing.assert_array_equal(history.elbo, [-20.5])
    np.testing.assert_array_equal(history.steps, [0])
    np.testing.assert_array_equal(history.objective, [-20.5])


def test_noncontiguous_values_are_recorded_in_order() -> None:
    history, expected = History(), History()
    history.append(0, THREE, np.asfortranarray(three_values(1.0)), objective=0.0, kl_weight=1.0)
    expected.append(0, THREE, three_values(1.0), objective=0.0, kl_weight=1.0)
    assert_same(history, expected)


def test_xarray_has_labels_per_site_until_they_change() -> None:
    history = History()
    history.append(0, TWO, two_values(0.0), objective=0.0, kl_weight=1.0)
    history.append(1, (Y,), two_values(0.0)[1:], objective=0.0, kl_weight=1.0)
    dataset = history.to_xarray()
    assert dataset["kl_method"].dims == ("site",)
    assert dataset["kl_method"].sel(site="mu").item() == "analytic"
    assert np.isnan(dataset["kl_prior"].sel(step=1, site="mu"))
    assert dataset["elbo"].dims == ("step",)
    assert "KL(q || prior)" in dataset.attrs["identity"]

    sampled = MU._replace(kl_method="sampled")
    history.append(2, (sampled, Y), two_values(0.0), objective=0.0, kl_weight=1.0)
    dataset = history.to_xarray()
    assert dataset["kl_method"].dims == ("step", "site")
    assert dataset["kl_reason"].dims == ("site",)
    assert dataset["kl_method"].sel(site="mu").values.tolist() == ["analytic", "", "sampled"]
    assert set(VALUES) - {"contribution"} <= set(dataset.data_vars)
    assert "contribution" not in dataset


# Refusing what can't be recorded


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": np.zeros((3, 6))}, ValueError, r"shape \(3, 6\), but 2 sites need \(2, 6\)"),
        ({"values": np.zeros((2, 5))}, ValueError, r"shape \(2, 5\)"),
        ({"values": [[0.0] * 6] * 2}, TypeError, "numpy array, got list"),
        ({"sites": [MU, Y]}, TypeError, "tuple of SiteInfo, got list"),
        ({"sites": (Y, Y)}, ValueError, "'y' occurs more than once"),
        ({"sites": (MU._replace(kind="latents"), Y)}, ValueError, "'mu' has kind 'latents'"),
        ({"sites": (MU,)}, ValueError, "1 sites need"),
        ({"step": 4}, ValueError, "step 4 is not after the last recorded step, 5"),
        ({"step": 5}, ValueError, "step 5 is not after"),
        ({"step": 6.5}, TypeError, "integer"),
        ({"objective": "high"}, ValueError, "float"),
        ({"kl_weight": None}, TypeError, "NoneType"),
    ],
)
def test_a_bad_append_raises_and_changes_nothing(change: dict[str, Any], error: type, message: str) -> None:
    history = History()
    history.append(5, TWO, two_values(0.0), objective=-20.5, kl_weight=1.0)
    before = copy.deepcopy(history)
    arguments: dict[str, Any] = {"step": 6, "sites": TWO, "values": two_values(1.0), "objective": 0.0, "kl_weight": 1.0}
    arguments.update(change)
    with pytest.raises(error, match=message):
        history.append(arguments.pop("step"), arguments.pop("sites"), arguments.pop("values"), **arguments)
    assert_same(history, before)
    history.append(6, TWO, two_values(1.0), objective=0.0, kl_weight=1.0)
    before.append(6, TWO, two_values(1.0), objective=0.0, kl_weight=1.0)
    assert_same(history, before)


@pytest.mark.parametrize("max_steps", [3, 0, -1])
def test_max_steps_must_leave_room_to_thin(max_steps: int) -> None:
    with pytest.raises(ValueError, match="at least 4"):
        History(max_steps)


# Thinning


@pytest.mark.parametrize("max_steps", [4, 5, 7, 16, 100, 257])
def test_thinning_keeps_the_first_the_recent_and_a_uniform_grid(max_steps: int) -> None:
    history = History(max_steps)
    for step in range(12 * max_steps + 3):
        history.append(step, TWO, two_values(step), objective=float(step), kl_weight=1.0)
        kept = history.steps
        count = step + 1
        assert len(history) == len(kept) <= max_steps
        assert history.num_recorded == count
        if count <= max_steps:
            assert len(kept) == count
            continue
        assert len(kept) >= max_steps // 4 + 1
        recent = np.arange(count - max_steps // 4 - 1, count)
        assert np.isin(recent, kept).all()
        gaps = np.diff(kept)
        stride = gaps[0]
        assert kept[0] == 0
        assert stride & (stride - 1) == 0  # a power of two
        dense = np.flatnonzero(gaps != stride)  # the grid, at most one odd gap, then every step
        assert (gaps[dense[1:]] == 1).all()
        if stride > 1 and dense.size:
            assert (np.diff(dense) == 1).all()
        if max_steps >= 16:
            assert len(kept) >= max_steps // 2
    np.testing.assert_array_equal(history.objective, kept)
    np.testing.assert_allclose(history.elbo, [-20.0 + t - 0.5 - t for t in kept])


def test_thinning_keeps_each_row_whole_when_layouts_alternate() -> None:
    everything, thinned = History(None), History(64)
    record(everything, 0, 1000)
    record(thinned, 0, 1000)
    assert len(everything) == 1000
    assert 32 <= len(thinned) <= 64
    whole, part = everything.to_dataframe(), thinned.to_dataframe()
    whole = whole[whole["step"].isin(thinned.steps)].sort_values(["step", "site"]).reset_index(drop=True)
    pd.testing.assert_frame_equal(part.sort_values(["step", "site"]).reset_index(drop=True), whole)


def test_memory_stays_bounded_when_every_step_has_new_labels() -> None:
    history = History(100)
    for step in range(3000):
        sites = (MU._replace(site=f"mu_{step}", kl_reason=f"reason {step}"), Y)
        history.append(step, sites, two_values(0.0), objective=0.0, kl_weight=1.0)
    assert len(history._layouts) <= 201
    assert len(history._order) <= 202
    assert history._columns.flat.size <= 3 * 100 * 12
    assert set(history.to_dataframe()["site"]) == {"y", *(f"mu_{step}" for step in history.steps)}


def test_memory_does_not_grow_with_the_run() -> None:
    history = History(1000)
    sizes = []
    for step in range(20_000):
        history.append(step, TWO, two_values(0.0), objective=0.0, kl_weight=1.0)
        sizes.append(history._columns.flat.nbytes + 28 * history._columns.steps.size)
    assert max(sizes) == 1000 * (12 * 8 + 28)


def test_clear_forgets_everything_but_max_steps() -> None:
    history = History(50)
    record(history, 0, 200)
    history.clear()
    assert_same(history, History(50))
    record(history, 0, 200)
    again = History(50)
    record(again, 0, 200)
    assert_same(history, again)


# Summary


def test_summary_means_shares_and_methods() -> None:
    history = History()
    for t in range(200):
        history.append(t, TWO, two_values(t % 2), objective=0.0, kl_weight=1.0)
    table = history.summary(window=10)
    assert table.index.tolist() == ["mu", "y", "ELBO"]
    assert list(table.columns) == ["kind", "mean", "se", "share", "kl_method"]
    np.testing.assert_allclose(table["mean"], [-1.0, -19.5, -20.5])
    np.testing.assert_allclose(table["share"], [1 / 20.5, 19.5 / 20.5, 1.0])
    assert table["kind"].tolist() == ["latent", "observed", "total"]
    assert table.loc["mu", "kl_method"] == "analytic"
    assert table["kl_method"].isna().tolist() == [False, True, True]
    assert table.attrs == {"window": 10, "first_step": 190, "last_step": 199}
    assert table.loc["ELBO", "se"] == pytest.approx(0.0, abs=1e-12)  # mu and y cancel


def test_summary_sites_sum_to_the_elbo_when_sites_come_and_go() -> None:
    history = History()
    record(history, 0, 90)
    table = history.summary(window=30)
    assert table["mean"].iloc[:-1].sum() == pytest.approx(table.loc["ELBO", "mean"], rel=1e-12)
    assert table.loc["ELBO", "mean"] == pytest.approx(history.elbo[-30:].mean(), rel=1e-12)
    assert table.loc["tau", "mean"] == pytest.approx(-np.mean([1.0 + t if t % 3 == 0 else 0 for t in range(60, 90)]))


def test_summary_window_is_exact_under_thinning_and_refused_beyond() -> None:
    everything, thinned = History(None), History(400)
    rng = np.random.default_rng(0)
    for step in range(5000):
        values = two_values(rng.normal())
        for history in (everything, thinned):
            history.append(step, TWO, values, objective=0.0, kl_weight=1.0)
    pd.testing.assert_frame_equal(thinned.summary(window=100), everything.summary(window=100))
    assert thinned.summary().attrs["window"] == 100
    assert everything.summary().attrs["window"] == 1250
    for window in (0, 2000):
        with pytest.raises(ValueError, match="window must be from 1 to"):
            thinned.summary(window=window)


def test_summary_of_a_short_run_and_of_changing_methods() -> None:
    history = History()
    history.append(0, TWO, two_values(0.0), objective=0.0, kl_weight=1.0)
    table = history.summary()
    np.testing.assert_array_equal(table["mean"], [-0.5, -20.0, -20.5])
    assert table["se"].isna().all()
    history.append(1, (MU._replace(kl_method="sampled"), Y), two_values(0.0), objective=0.0, kl_weight=1.0)
    assert history.summary().loc["mu", "kl_method"] == "analytic, sampled"


def ar1(phi: float, n: int, chains: int, seed: int) -> np.ndarray:
    """Stationary AR(1) series of unit innovation variance, shape (n, chains)."""
    rng = np.random.default_rng(seed)
    x = np.empty((n, chains))
    x[0] = rng.normal(size=chains) / math.sqrt(1 - phi**2)
    for t in range(1, n):
        x[t] = phi * x[t - 1] + rng.normal(size=chains)
    return x


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9, 0.97, -0.5])
def test_standard_error_on_an_autoregression(phi: float) -> None:
    n, chains = 4000, 60
    series = ar1(phi, n, chains, seed=7)
    sites = tuple(SiteInfo(f"z{i}", "latent", "sampled", None) for i in range(chains))
    history = History(None)
    values = np.zeros((chains, 6))
    values[:, 5] = np.nan  # the ELBO's steps have no contributions
    for t in range(n):
        values[:, 2] = series[t]
        history.append(t, sites, values, objective=0.0, kl_weight=1.0)
    table = history.summary(window=n)
    lags = np.arange(1, n)
    exact = (1 + 2 * ((1 - lags / n) * phi**lags).sum()) / (1 - phi**2) / n
    ratio = table["se"].iloc[:-1].to_numpy() ** 2 / exact
    # Mean over 60 independent series within 4 of its standard errors, and 6 % for the estimator's known small biases
    # (upward by keeping positive noise, downward by the estimated mean).
    error = ratio.std(ddof=1) / math.sqrt(chains)
    assert abs(ratio.mean() - 1) < 4 * error + 0.06
    assert error < 0.06  # or the line above says nothing
    z = table["mean"].iloc[:-1].to_numpy() / table["se"].iloc[:-1].to_numpy()
    assert abs((z**2).mean() - 1) < 4 * math.sqrt(2 / chains)
    # The total's error is that of a sum of independent series, not of one of them.
    assert table.loc["ELBO", "se"] ** 2 / (chains * exact) == pytest.approx(1, abs=0.5)


# Contributions to a bound that is not linear in the log weights


def mixed() -> History:
    """A step of the ELBO, then three of a bound, the last with fewer sites."""
    history = History()
    history.append(0, TWO, two_values(0.0), objective=-20.5, kl_weight=1.0)
    for t in (1, 2):
        history.append(t, TWO, bound_values(t), objective=-16.5 - t, kl_weight=1.0)
    history.append(3, (Y,), bound_values(3.0)[1:], objective=-13.5, kl_weight=1.0)
    return history


def test_contribution_is_the_last_column_exactly_where_one_was_recorded() -> None:
    history = mixed()
    table = history.to_dataframe()
    assert list(table.columns) == [*COLUMNS, "contribution"]
    np.testing.assert_array_equal(table["contribution"], [NAN, NAN, -1.25, -15.0, -2.25, -14.0, -13.0])
    pd.testing.assert_frame_equal(
        table[table["step"] < 3][["log_p", "log_q", "reconstruction", "kl_prior"]],
        pd.DataFrame(
            [row for t in range(3) for row in ([-1.0 - t, -0.5, 0.0, 0.5 + t], [-20.0 + t, NAN, -20.0 + t, 0.0])],
            columns=["log_p", "log_q", "reconstruction", "kl_prior"],
        ),
    )
    np.testing.assert_array_equal(history.elbo, [-20.5, -20.5, -20.5, -17.0])  # of plain means, whatever the bound
    np.testing.assert_array_equal(history.objective, [-20.5, -17.5, -18.5, -13.5])
    per_observation = history.to_dataframe(per_observation=True)
    np.testing.assert_array_equal(per_observation["contribution"], table["contribution"] / 10)
    infinite = History()
    values = two_values(0.0)
    values[:, -1] = math.inf
    infinite.append(0, TWO, values, objective=0.0, kl_weight=1.0)
    assert list(infinite.to_dataframe().columns) == COLUMNS


def test_summary_has_contributions_and_the_mean_objective_that_they_do_not_sum_to() -> None:
    table = mixed().summary(window=4)
    assert list(table.columns) == ["kind", "mean", "se", "share", "kl_method", "contribution"]
    assert table.index.tolist() == ["mu", "y", "ELBO", "objective"]
    # Over the three steps that have any; mu is absent in one of them.
    bound = (-17.5 - 18.5 - 13.5) / 3
    np.testing.assert_allclose(table["contribution"], [-3.5 / 3, -42.0 / 3, np.nan, bound])
    assert table.loc["objective", "mean"] == pytest.approx(bound)
    assert table.loc["ELBO", "mean"] == pytest.approx(mixed().elbo.mean())
    elbo_only = mixed()
    for t in range(4, 6):
        elbo_only.append(t, TWO, two_values(t), objective=-20.5, kl_weight=1.0)
    assert "contribution" not in elbo_only.summary(window=2)
    assert "contribution is to the bound" in mixed()._repr_html_()
    weighted = History()
    record(weighted, 0, 9)
    assert "contribution is to the bound" not in weighted._repr_html_()


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_contributions_survive_files_which_without_them_are_as_before(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("h5netcdf" if suffix == ".nc" else "zarr")
    path = tmp_path / f"history{suffix}"
    mixed().save(path)
    loaded = History.load(path)
    assert_same(loaded, mixed())
    assert list(loaded.to_dataframe().columns) == [*COLUMNS, "contribution"]
    dataset = loaded.to_xarray()
    assert dataset["contribution"].dims == ("step", "site")
    assert "objective = sum(contribution) + a remainder" in dataset.attrs["identity"]
    older = History.from_xarray(dataset.drop_vars("contribution"))
    assert list(older.to_dataframe().columns) == COLUMNS
    np.testing.assert_array_equal(older.elbo, loaded.elbo)


# Files and copies


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
@pytest.mark.parametrize(("max_steps", "recorded"), [(64, 1000), (None, 50), (64, 1), (64, 0)])
def test_what_is_loaded_equals_what_was_saved_and_can_go_on(
    tmp_path: Path, suffix: str, max_steps: int | None, recorded: int
) -> None:
    pytest.importorskip("h5netcdf" if suffix == ".nc" else "zarr")
    history = History(max_steps)
    record(history, 0, recorded)
    path = tmp_path / f"history{suffix}"
    history.save(path)
    history.save(str(path))  # replaces
    loaded = History.load(path)
    assert_same(loaded, history)
    record(history, recorded, recorded + 200)
    record(loaded, recorded, recorded + 200)
    assert_same(loaded, history)
    pd.testing.assert_frame_equal(loaded.summary(), history.summary())


def test_saved_numbers_are_exact_and_nan_and_infinity_survive(tmp_path: Path) -> None:
    pytest.importorskip("h5netcdf")
    history = History()
    values = np.array([[math.pi, -math.inf, 1e-310, 0.1, 0.0, NAN], [NAN, NAN, NAN, 1 / 3, 1e300, 1e-17]])
    history.append(2**60, TWO, values, objective=0.1 + 0.2, kl_weight=1 / 3)
    history.save(tmp_path / "history.nc")
    loaded = History.load(tmp_path / "history.nc")
    assert_same(loaded, history)
    assert loaded.steps.tolist() == [2**60]
    assert loaded.to_xarray()["log_p"].values[0, 0] == math.pi


def test_a_step_without_sites_survives(tmp_path: Path) -> None:
    pytest.importorskip("h5netcdf")
    history = History()
    history.append(0, (), np.zeros((0, 6)), objective=0.0, kl_weight=1.0)
    history.append(1, TWO, two_values(0.0), objective=0.0, kl_weight=1.0)
    history.save(tmp_path / "history.nc")
    assert_same(History.load(tmp_path / "history.nc"), history)
    np.testing.assert_array_equal(history.elbo, [0.0, -20.5])


def test_files_that_are_not_histories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = History()
    record(history, 0, 10)
    with pytest.raises(ValueError, match=r"saved as .nc or .zarr, not '.pkl'"):
        history.save(tmp_path / "history.pkl")
    with pytest.raises(FileNotFoundError, match="no such history"):
        History.load(tmp_path / "history.nc")
    with pytest.raises(ValueError, match=r"not a saved History: .*full_resolution_from.* missing"):
        History.from_xarray(xr.Dataset())
    with pytest.raises(ValueError, match="steps were taken out"):
        History.from_xarray(history.to_xarray().isel(step=slice(3, None)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install h5netcdf"):
        history.save(tmp_path / "history.nc")
    with pytest.raises(ImportError, match="pip install zarr"):
        History.load(tmp_path / "history.zarr")


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_copies_are_equal_independent_and_lean(how: str) -> None:
    history = History(64)
    record(history, 0, 500)
    twin = pickle.loads(pickle.dumps(history)) if how == "pickle" else copy.deepcopy(history)
    assert_same(twin, history)
    assert twin._columns.flat.size == twin._used
    record(twin, 500, 900)
    assert history.num_recorded == 500
    record(history, 500, 900)
    assert_same(twin, history)


# Showing


def test_an_empty_history_says_so() -> None:
    history = History()
    assert len(history) == history.num_recorded == 0
    assert list(history.to_dataframe().columns) == COLUMNS
    assert list(history.to_dataframe(by="step").columns) == STEP_COLUMNS
    assert len(history.to_dataframe()) == len(history.to_dataframe(by="step")) == 0
    assert len(history.to_dataframe(per_observation=True)) == 0
    assert history.elbo.shape == history.steps.shape == (0,)
    assert dict(history.to_xarray().sizes) == {"step": 0, "site": 0}
    assert "no steps recorded" in repr(history)
    assert "no steps recorded" in history._repr_html_()
    with pytest.raises(ValueError, match=r"summary\(\) needs at least one recorded step"):
        history.summary()
    with pytest.raises(ValueError, match=r"plot\(\) needs at least one recorded step"):
        history.plot()


def test_repr_says_how_many_steps_and_the_last_elbo() -> None:
    history = History(100)
    for t in range(1000):
        history.append(t, TWO, two_values(0.0), objective=0.0, kl_weight=1.0)
    assert repr(history) == f"<History: 1,000 steps recorded, {len(history)} kept, ELBO -20.5 at step 999>"
    html = history._repr_html_()
    assert "1,000 steps recorded" in html
    assert "over the last 25 steps" in html
    for word in ("mu", "ELBO", "kl_method", "analytic", "-20.5"):
        assert f">{word}<" in html


def test_html_escapes_names_and_shows_the_largest_of_many_sites() -> None:
    history = History()
    sites = tuple(SiteInfo(f"<z{i:02d}>", "latent", "sampled", None) for i in range(30))
    values = np.zeros((30, 6))
    values[:, 2] = np.arange(30.0)
    history.append(0, sites, values, objective=0.0, kl_weight=1.0)
    html = history._repr_html_()
    assert "<z29>" not in html
    assert "&lt;z29&gt;" in html
    assert "&lt;z10&gt;" in html
    assert "&lt;z09&gt;" not in html
    assert "the 20 largest of 30 sites" in html


@pytest.mark.parametrize("max_steps", [None, 8, 100])
def test_many_steps_at_once_are_the_same_as_one_by_one(max_steps: int | None) -> None:
    one, many = History(max_steps=max_steps), History(max_steps=max_steps)
    rng = np.random.default_rng(0)
    step = 0
    for count in (3, 0, 1, 50, 260):
        values = rng.normal(size=(count, *two_values(0.0).shape))
        steps, objective, weight = np.arange(step, step + 2 * count, 2), rng.normal(size=count), rng.uniform(size=count)
        for i in range(count):
            one.append(int(steps[i]), TWO, values[i], objective=objective[i], kl_weight=weight[i])
        many.extend(steps, TWO, values, objective=objective, kl_weight=weight)
        step += 2 * count
    assert one.num_recorded == many.num_recorded == 314
    assert_same(one, many)


def test_many_bad_steps_at_once_change_nothing() -> None:
    history = History()
    record(history, 0, 5)
    before = history.to_dataframe()
    values = np.stack([two_values(0.0)] * 3)
    for steps, table in (([40, 50, 60], values), ([50, 70, 60], values), ([50, 60, 70], values[:2])):
        with pytest.raises(ValueError, match="step"):
            history.extend(np.array(steps), TWO, table, objective=np.zeros(3), kl_weight=np.ones(3))
    assert history.to_dataframe().equals(before)


# Exceptions from outside


def appended(history: History) -> None:
    history.append(1000, THREE, three_values(1000), objective=-1.0, kl_weight=1.0)


def extended(history: History) -> None:
    steps = np.arange(1000, 1010)
    values = np.stack([two_values(t) for t in steps])
    history.extend(steps, TWO, values, objective=-1.0 * steps, kl_weight=np.ones(10))


@pytest.mark.parametrize("act", [appended, extended], ids=["append", "extend"])
@pytest.mark.parametrize("steps", [0, 16, 40])
def test_an_exception_at_any_place_leaves_the_history_whole(steps: int, act: Any) -> None:
    """Empty, full so that it thins, and with layouts that alternate."""

    def prepare() -> History:
        history = History(max_steps=16)
        record(history, 0, steps)
        return history

    before, after, stopped = prepare(), prepare(), 0
    act(after)
    known = {row["step"]: row["elbo"] for row in after.to_dataframe(by="step").to_dict("records")}
    known |= {row["step"]: row["elbo"] for row in before.to_dataframe(by="step").to_dict("records")}
    for history in stopped_everywhere(prepare, act, record_module, stride=5):
        stopped += 1
        assert before.num_recorded <= history.num_recorded <= after.num_recorded
        table = history.to_dataframe(by="step")
        assert len(table) == len(history) == len(history.steps)
        assert all(known.get(row["step"], row["elbo"]) == row["elbo"] for row in table.to_dict("records"))
        assert np.isfinite(table["elbo"]).all()
        last = int(history.steps[-1]) if len(history) else -1
        for t in range(last + 1, last + 40):  # it can be appended to, thinned and read
            history.append(t, TWO, two_values(t), objective=0.0, kl_weight=1.0)
        assert history.steps[-1] == last + 39
        assert (history.elbo == history.to_dataframe(by="step")["elbo"]).all()
        history.clear()
        assert len(history) == 0
    assert stopped > 15  # places; Python 3.13 has fewer


def test_an_exception_at_any_place_while_it_is_cleared() -> None:
    def prepare() -> History:
        history = History(max_steps=16)
        record(history, 0, 40)
        return history

    for history in stopped_everywhere(prepare, History.clear, record_module, stride=2):
        assert history.num_recorded in (0, 40)
        assert len(history.to_dataframe(by="step")) == len(history)
        record(history, 41, 80)


def test_a_history_pickled_by_an_older_version_goes_on() -> None:
    history = History(max_steps=16)
    record(history, 0, 40)
    state = history.__getstate__()
    rows, used, last, count = state.pop("_end")
    sites, shape, layout = state.pop("_current")
    state |= {f"_{name}": column for name, column in state.pop("_columns")._asdict().items()}
    state |= {"_sites": sites, "_shape": shape, "_id": layout}
    old = History.__new__(History)
    old.__setstate__({**state, "_rows": rows, "_used": used, "_last_step": last, "num_recorded": count})
    assert_same(old, history)
    record(old, 40, 50)
