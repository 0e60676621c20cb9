"""Files that are not what they say: an error that names the file, at once and in bounded memory, from every reader."""

from __future__ import annotations

import json
import os
import re
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from pyro_elbo_ext import compare_to_mcmc, read_draws
from pyro_elbo_ext.calibration.files import Folder
from pyro_elbo_ext.diagnosis.command import read_data
from pyro_elbo_ext.history.history import History
from pyro_elbo_ext.history.record import SiteInfo

MOST = 100_000_000  # bytes that a refusal may take


def history() -> History:
    made = History(8)
    sites = (SiteInfo("z", "latent", "sampled", "why"), SiteInfo("y", "observed", None, None))
    for step in range(20):
        made.append(step, sites, np.ones((2, 6)), objective=1.0, kl_weight=1.0)
    return made


def header(shape: str, descr: str = "'<f8'") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (63 - (len(text) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def zipped(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def good(path: Path) -> None:
    """A good file of each kind."""
    if path.suffix == ".npz":
        np.savez(path, a=np.zeros((2, 50)), b=np.ones((2, 50)))
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"a": [1.0, 2.0] * 50}] * 2))
    elif path.suffix == ".zip":
        zipped(path, {"a.json": json.dumps([{"a": [1.0, 2.0] * 50}] * 2).encode()})
    else:
        data = xr.Dataset({"a": (["chain", "draw"], np.zeros((2, 50)))})
        data.to_netcdf(path, group="posterior", engine="h5netcdf")


Make = Callable[[Path], Any]
ANY: dict[str, Make] = {
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(np.random.default_rng(0).bytes(3000)),
    "text": lambda path: path.write_text("no draws\n" * 20),
    "half": lambda path: (good(path), path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])),
    "pickle": lambda path: path.write_bytes(b"\x80\x04K*."),
    "folder": lambda path: path.mkdir(),
}


def of(values: Any) -> Make:
    return lambda path: path.write_text(json.dumps(values))


def netcdf(**variables: Any) -> Make:
    return lambda path: xr.Dataset(variables).to_netcdf(path, group="posterior", engine="h5netcdf")


def declared(path: Path) -> None:
    import h5netcdf

    with h5netcdf.File(path, "w") as file:
        group = file.create_group("posterior")
        group.dimensions = {"chain": 4, "draw": 10**11}
        group.create_variable("a", ("chain", "draw"), "f8", chunks=(1, 1000))


DRAWS: dict[tuple[str, str], tuple[Make, str]] = {
    (".json", "number"): (of(1), "must hold a list"),
    (".json", "object"): (of({"a": [1]}), "must hold a list"),
    (".json", "no chains"): (of([]), "must hold a list"),
    (".json", "no names"): (of([{}]), "no draws"),
    (".json", "no draws"): (of([{"a": []}]), "'a' has shape"),
    (".json", "a number"): (of([{"a": 1}]), "no list of draws of 'a'"),
    (".json", "text in it"): (of([{"a": ["1"]}]), "'a' is not an array of numbers"),
    (".json", "null in it"): (of([{"a": [None, 1.0]}]), "'a' is not an array of numbers"),
    (".json", "truths"): (of([{"a": [True]}]), "'a' is not an array of numbers"),
    (".json", "objects"): (of([{"a": [{}]}]), "'a' is not an array of numbers"),
    (".json", "ragged"): (of([{"a": [[1], [1, 2]]}]), "'a' is not an array of numbers"),
    (".json", "far index"): (of([{"a[2,99999999]": [1.0, 2.0]}]), r"a\[1,1\] is missing"),
    (".json", "index beyond all"): (of([{"a[1]": [1.0], f"a[{10**30}]": [1.0]}]), r"a\[2\] is missing"),
    (".json", "many indices"): (of([{f"a[{','.join('1' * 70)}]": [1.0]}]), "70 indices"),
    (".json", "twice"): (of([{"a[1]": [1.0], "a[01]": [2.0]}]), "there twice"),
    (".json", "index 0"): (of([{"a[0]": [1.0]}]), "index 0"),
    (".json", "other names"): (of([{"a": [1.0]}, {"b": [1.0]}]), "other names"),
    (".json", "long number"): (lambda path: path.write_text('[{"a": [' + "1" * 5000 + "]}]"), "digits"),
    (".json", "deep"): (lambda path: path.write_text("[" * 100_000), "recursion"),
    (".json", "latin"): (lambda path: path.write_bytes(b'[{"a\xe9": [1]}]'), "utf-8"),
    (".zip", "bomb"): (lambda path: zipped(path, {"a.json": b" " * 200_000_000}), "refused"),
    (".zip", "bomb beside"): (lambda path: zipped(path, {"a.json": b"[]", "b": b" " * 200_000_000}), "refused"),
    (".zip", "two"): (lambda path: zipped(path, {"a.json": b"[]", "b.json": b"[]"}), "one .json file"),
    (".zip", "none"): (lambda path: zipped(path, {"a.txt": b"[]"}), "one .json file"),
    (".npz", "objects"): (lambda path: np.savez(path, a=np.array([{}])), "'a' holds Python objects"),
    (".npz", "pickled text"): (lambda path: path.write_bytes(b"\x80\x04\x95aaaa."), "not"),
    (".npz", "text"): (lambda path: np.savez(path, a=np.array([["a", "b"]])), "'a' has dtype"),
    (".npz", "complex"): (lambda path: np.savez(path, a=np.zeros((2, 3), complex)), "'a' has dtype"),
    (".npz", "large in words"): (
        lambda path: zipped(path, {"a.npy": header("(2, 99999999999)") + b"12345678"}),
        "'a' says",
    ),
    (".npz", "bad header"): (lambda path: zipped(path, {"a.npy": header("(2, __import__('os'))") + b"1"}), "not"),
    (".npz", "bomb"): (
        lambda path: zipped(path, {"a.npy": header("(2, 12500000)") + bytes(200_000_000)}),
        "refused",
    ),
    (".npz", "no array"): (lambda path: zipped(path, {"readme": b"x"}), "'readme' is not an array"),
    (".npz", "spoiled"): (
        lambda path: (
            np.savez(path, a=np.zeros((2, 50))),
            path.write_bytes(path.read_bytes().replace(bytes(64), b"x" * 64)),
        ),
        "not",
    ),
    (".nc", "other group"): (
        lambda path: xr.Dataset({"a": 1}).to_netcdf(path, engine="h5netcdf"),
        "no group 'posterior'",
    ),
    (".nc", "text"): (netcdf(a=(["chain", "draw"], np.array([["x", "y"]]))), "'a' has dtype"),
    (".nc", "declared"): (declared, "refused"),
}
DRAWS |= {(kind, name): (make, "") for kind in (".json", ".npz", ".nc", ".zip") for name, make in ANY.items()}


@pytest.mark.parametrize("case", DRAWS, ids=" ".join)
def test_draws(case: tuple[str, str], tmp_path: Path) -> None:
    make, message = DRAWS[case]
    path = tmp_path / f"draws{case[0]}"
    make(path)
    tracemalloc.start()
    try:
        with pytest.raises((ValueError, IsADirectoryError), match=f"{re.escape(str(path))}(.|\n)*{message}") as caught:
            read_draws(path)
        assert tracemalloc.get_traced_memory()[1] < MOST
    finally:
        tracemalloc.stop()
    assert "allow_pickle" not in str(caught.value)
    if case[1] != "folder":
        with pytest.raises(ValueError, match=re.escape(str(path))):
            compare_to_mcmc({"a": np.zeros((1, 5))}, str(path))


def test_good_files_are_read(tmp_path: Path) -> None:
    for kind in (".json", ".npz", ".nc", ".zip"):
        good(tmp_path / f"draws{kind}")
        assert read_draws(tmp_path / f"draws{kind}")["a"].sizes["chain"] == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable(tmp_path: Path) -> None:
    good(tmp_path / "a.json")
    (tmp_path / "a.json").chmod(0)
    with pytest.raises(PermissionError, match=r"a\.json"):
        read_draws(tmp_path / "a.json")


@pytest.mark.parametrize(
    "name", [case[1] for case in DRAWS if case[0] == ".npz" and case[1] not in ("complex", "text")]
)
def test_data_of_the_command(name: str, tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    DRAWS[".npz", name][0](path)
    with pytest.raises((ValueError, IsADirectoryError), match=f"--data: {re.escape(str(path))}") as caught:
        read_data(str(path))
    assert "allow_pickle" not in str(caught.value)


def changed(**attributes: Any) -> Make:
    def make(path: Path) -> None:
        data = history().to_xarray()
        for name, value in attributes.items():
            data.attrs[name] = value
        data.to_netcdf(path, engine="h5netcdf")

    return make


HISTORIES: dict[str, tuple[Make, str]] = {
    "stride 0": (changed(thinning_stride=0), "thinning_stride"),
    "negative stride": (changed(thinning_stride=-2), "thinning_stride"),
    "stride of words": (changed(thinning_stride="two"), "thinning_stride"),
    "stride of a fraction": (changed(thinning_stride=1.5), "thinning_stride"),
    "many steps": (changed(num_recorded=10**17), "attributes say"),
    "many thinned steps": (changed(num_recorded=10**17, full_resolution_from=10**17), "attributes say"),
    "negative steps": (changed(num_recorded=-1), "num_recorded"),
    "tail behind the end": (changed(full_resolution_from=10**6), "full_resolution_from"),
    "few at most": (changed(max_steps=2), "max_steps"),
    "other dataset": (lambda path: xr.Dataset({"a": 1}).to_netcdf(path, engine="h5netcdf"), "missing"),
    "steps of words": (
        lambda path: (
            history()
            .to_xarray()
            .assign_coords(step=list("abcdefgh")[: len(history())])
            .to_netcdf(path, engine="h5netcdf")
        ),
        "whole numbers",
    ),
    **{name: (make, "") for name, make in ANY.items() if name != "half"},
}


@pytest.mark.parametrize("name", HISTORIES)
def test_histories(name: str, tmp_path: Path) -> None:
    make, message = HISTORIES[name]
    path = tmp_path / "history.nc"
    make(path)
    tracemalloc.start()
    try:
        with pytest.raises((ValueError, IsADirectoryError), match=f"{re.escape(str(path))}(.|\n)*{message}"):
            History.load(path)
        assert tracemalloc.get_traced_memory()[1] < MOST
    finally:
        tracemalloc.stop()


def test_history_of_zarr_that_is_none(tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    (tmp_path / "h.zarr").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=r"h\.zarr"):
        History.load(tmp_path / "h.zarr")
    (tmp_path / "file.zarr").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"file\.zarr"):
        History.load(tmp_path / "file.zarr")


def test_calibration_folder(tmp_path: Path) -> None:
    settings = {"shapes": {"a": []}}
    Folder(tmp_path / "there", settings)
    for name in ("empty", "garbage", "pickle"):
        file = tmp_path / "there" / "simulation_000000.npz"
        ANY[name](file)
        with pytest.raises(ValueError, match=re.escape(str(file))):
            Folder(tmp_path / "there", settings).read(1)
    for content in ("", "[1]", "{"):
        (tmp_path / "there" / "settings.json").write_text(content)
        with pytest.raises(ValueError, match=r"settings\.json"):
            Folder(tmp_path / "there", settings)
