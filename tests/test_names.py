"""One renaming for all exports: any name that Pyro takes is drawn, exported, saved, read and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro.infer import MCMC, NUTS
from torch import Tensor

from pyro_elbo_ext import compare_to_mcmc, diagnose, evidence_bounds, from_pyro_mcmc, from_pyro_svi, run_nuts
from pyro_elbo_ext.inference_data.export import dataset_of
from pyro_elbo_ext.inference_data.names import by_site, storable, variables_of

ODD = (
    "a/b",
    "a.b",
    "a\\b",
    ".",
    "",
    " ",
    "b ",
    "$$$",
    "chain",
    "draw",
    "p.z",
    "nul\0",
    "a\nb",
    "zarr.json",
    "p/z_dim",
    "µ",
)
DATA = torch.tensor([0.3, -0.2, 0.9])


def odd(data: Tensor) -> None:
    """Sites and plates with names that files cannot hold, or that are others' after renaming."""
    for name in ODD:
        pyro.sample(name, dist.Normal(0.0, 1.0))
    with pyro.plate("draws/of", 3):
        mean = pyro.sample("mean/", dist.Normal(0.0, 1.0))
        with pyro.plate("p/z", 2, dim=-2):
            pyro.sample("p/z/w", dist.Normal(0.0, 1.0))
        pyro.sample("y/y", dist.Normal(mean, 1.0), obs=data)


def odd_guide(data: Tensor) -> None:
    for name in ODD:
        pyro.sample(name, dist.Normal(0.0, 1.0))
    with pyro.plate("draws/of", 3):
        pyro.sample("mean/", dist.Normal(data / 2, 0.5**0.5))
        with pyro.plate("p/z", 2, dim=-2):
            pyro.sample("p/z/w", dist.Normal(0.0, 1.0))


def written_and_read(data: Any, path: Path) -> dict[str, xr.Dataset]:
    groups = (
        [name.strip("/") for name in data.groups if name != "/"] if isinstance(data, xr.DataTree) else data.groups()
    )
    data.to_netcdf(str(path))
    found = {}
    for group in groups:
        with xr.open_dataset(path, group=group, engine="h5netcdf") as dataset:
            found[group] = dataset.load()
    return found


@pytest.fixture(scope="module")
def exports() -> dict[str, Any]:
    made = {
        backend: run_nuts(
            odd, DATA, num_samples=40, warmup=40, chains=2, backend=backend, progress=False, compile=False, seed=1
        )
        for backend in ("pyro", "auto")
    }
    made["svi"] = from_pyro_svi(odd, odd_guide, DATA, num_samples=100, seed=0)
    pyro.set_rng_seed(0)
    mcmc = MCMC(NUTS(odd, max_tree_depth=3), num_samples=8, warmup_steps=8, disable_progbar=True)
    mcmc.run(DATA)
    made["mcmc"] = from_pyro_mcmc(mcmc, seed=0)
    return made


@pytest.mark.parametrize("which", ["pyro", "auto", "svi", "mcmc"])
def test_any_name_is_drawn_and_goes_through_files(which: str, exports: dict[str, Any], tmp_path: Path) -> None:
    data = exports[which]
    expected = variables_of(["y/y", *ODD, "mean/", "p/z/w"])
    posterior = dataset_of(data)
    assert set(posterior.data_vars) == {name for site, name in expected.items() if site != "y/y"}
    assert posterior["mean."].dims == ("chain", "draw", "draws.of")
    assert posterior["p.z.w"].dims == ("chain", "draw", "p.z_dim_dim", "draws.of")  # sites have the other two
    assert list(dataset_of(data, "observed_data").data_vars) == ["y.y"]
    for group, read in written_and_read(data, tmp_path / "draws.nc").items():
        own = dataset_of(data, group)
        assert set(read.variables) == set(own.variables)
        for name in own.variables:
            np.testing.assert_array_equal(read[name].values, own[name].values)
            assert read[name].attrs.get("site") == own[name].attrs.get("site")
    assert set(by_site(posterior)) == {site.replace("\0", "\\0") for site in expected if site != "y/y"}
    posterior.drop_attrs(deep=False).to_zarr(tmp_path / "draws.zarr", zarr_format=2)
    assert set(xr.open_zarr(tmp_path / "draws.zarr").data_vars) == set(posterior.data_vars)


def test_names_match_on_both_sides(exports: dict[str, Any], tmp_path: Path) -> None:
    table = compare_to_mcmc(exports["svi"], exports["pyro"]).table
    assert len(table) == len(ODD) + 3 + 6
    exports["auto"].to_netcdf(str(tmp_path / "nuts.nc"))
    assert list(compare_to_mcmc(exports["svi"], tmp_path / "nuts.nc").table.index) == list(table.index)
    by_own_name = {"a/b": np.random.default_rng(0).normal(size=(1, 100))}
    assert list(compare_to_mcmc(by_own_name, exports["pyro"], ["a.b_"]).table.index) == ["a.b_"]
    assert list(compare_to_mcmc(exports["svi"], by_own_name).table.index) == ["a/b"]


def test_draws_come_back_to_their_sites(exports: dict[str, Any]) -> None:
    bounds = evidence_bounds(odd, odd_guide, DATA, posterior=exports["auto"], num_draws=100, seed=0)
    exact = dist.Normal(0.0, 2.0**0.5).log_prob(DATA).sum().item()
    assert bounds.log_evidence.lower - 0.01 < exact < bounds.log_evidence.upper + 0.01
    found = diagnose(odd, odd_guide, DATA, mcmc=exports["auto"], num_draws=200, seed=0)
    assert {"a.b_", "mean.[0]", "p.z.w[1, 2]"} <= set(found.scalars.index)
    assert found.mcmc is not None


def test_sites_whose_shapes_disagree_are_refused_before_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    def model() -> None:
        with pyro.plate("rows", 2):
            pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("rows_dim", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("rows_dim_dim_0", 3):
            pyro.sample("b", dist.Normal(0.0, 1.0))

    monkeypatch.setattr("pyro_elbo_ext.mcmc.nuts.sample_pyro", lambda *args: pytest.fail("it draws"))
    with pytest.raises(ValueError, match="dim 'rows_dim_dim_0' has size 2 at 'rows_dim' and 3 at 'b'"):
        run_nuts(model, num_samples=4, warmup=4, chains=1, backend="pyro", progress=False, compile=False)


@pytest.mark.parametrize("order", [ODD, ODD[::-1]])
def test_the_renaming_is_one_to_one_and_leaves_good_names(order: tuple[str, ...]) -> None:
    found = variables_of(order)
    assert len(set(found.values())) == len(order)
    assert all(storable(name) == name for name in found.values())
    assert {found[name] for name in ("a.b", "p.z", "µ")} == {"a.b", "p.z", "µ"}
    assert not {"chain", "draw"} & set(found.values())
