"""Reference draws read from files of each kind, and files that do not hold any."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import posteriordb_models as db
import pytest
import xarray as xr

from pyro_elbo_ext.comparison.marginal import FIGURES, compare_to_mcmc
from pyro_elbo_ext.comparison.reference_draws import read_draws, stan_dataset
from pyro_elbo_ext.inference_data.export import to_arviz

COLUMNS = {
    name: np.random.default_rng(i).normal(size=(2, 5))
    for i, name in enumerate(["mu", "beta[2]", "beta[1]", "L[1,1]", "L[2,1]", "L[1,2]", "L[2,2]", "L[1, 3]", "L[2,3]"])
}


def check(found: xr.Dataset) -> None:
    assert {name: found[name].shape for name in found} == {"mu": (2, 5), "beta": (2, 5, 2), "L": (2, 5, 2, 3)}
    np.testing.assert_array_equal(found["mu"], COLUMNS["mu"])
    np.testing.assert_array_equal(found["beta"][..., 1], COLUMNS["beta[2]"])
    np.testing.assert_array_equal(found["L"][..., 1, 0], COLUMNS["L[2,1]"])
    np.testing.assert_array_equal(found["L"][..., 0, 2], COLUMNS["L[1, 3]"])


def test_stan_names_from_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "draws.npz", **COLUMNS)
    check(read_draws(tmp_path / "draws.npz"))


def test_posteriordb_json_and_zip(tmp_path: Path) -> None:
    text = json.dumps([{name: values[chain].tolist() for name, values in COLUMNS.items()} for chain in range(2)])
    (tmp_path / "draws.json").write_text(text)
    with zipfile.ZipFile(tmp_path / "draws.json.zip", "w") as archive:
        archive.writestr("draws.json", text)
    check(read_draws(tmp_path / "draws.json"))
    check(read_draws(str(tmp_path / "draws.json.zip")))


def test_netcdf_and_comparison(tmp_path: Path) -> None:
    posterior = stan_dataset(COLUMNS)
    to_arviz({"posterior": posterior}).to_netcdf(tmp_path / "draws.nc", engine="h5netcdf")
    check(read_draws(tmp_path / "draws.nc"))
    comparison = compare_to_mcmc(posterior, tmp_path / "draws.nc")
    assert (comparison.table[list(FIGURES)] == 0).all().all()


@pytest.mark.skipif(not db.FOLDER.is_dir(), reason="reference posteriors are not here")
def test_reference_posteriors_of_posteriordb() -> None:
    for name in db.MODELS:
        _, columns = db.load(name)
        found = read_draws(db.FOLDER / f"{name}.draws.npz")
        for key, values in columns.items():
            np.testing.assert_array_equal(db.scalar(found, key), values)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"x[1]": np.zeros((1, 4)), "x[3]": np.zeros((1, 4))}, r"'x' has shape \(3,\), but x\[2\] is missing"),
        ({"x": np.zeros((1, 4)), "x[1]": np.zeros((1, 4))}, r"'x' has entries of \[0, 1\] indices"),
        ({"x[0]": np.zeros((1, 4))}, "Stan counts from 1"),
        ({"x": np.zeros(4)}, r"'x' has shape \(4,\)"),
        ({"x": np.zeros((1, 4)), "y": np.zeros((1, 5))}, r"'y' has shape \(1, 5\), 'x' \(1, 4\)"),
        ({}, "there are no draws"),
    ],
)
def test_bad_columns(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stan_dataset(columns)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x": [1]}, "list with one object per chain"),
        ([{"x": [1]}, {"y": [1]}], r"chain 1 of .* has other names than chain 0: \['x', 'y'\]"),
        ([{"x": [1]}, {"x": [1, 2]}], r"lengths \[1, 2\]"),
    ],
)
def test_bad_json(tmp_path: Path, content: Any, message: str) -> None:
    (tmp_path / "draws.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_draws(tmp_path / "draws.json")


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such draws"):
        read_draws(tmp_path / "draws.nc")
    (tmp_path / "draws.csv").write_text("x")
    with pytest.raises(ValueError, match=r"not '\.csv'"):
        read_draws(tmp_path / "draws.csv")
    with zipfile.ZipFile(tmp_path / "draws.zip", "w"):
        pass
    with pytest.raises(ValueError, match=r"must hold one \.json file"):
        read_draws(tmp_path / "draws.zip")
