"""The main job, small: the files, and the story that its figures tell."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyro
import pytest
import torch
import xarray as xr

from pyro_elbo_ext import __version__
from pyro_elbo_ext.demo import Demo, log_evidence, run_demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    pytest.importorskip("nutpie")
    lines: list[str] = []
    found = run_demo(tmp_path_factory.mktemp("demo") / "out", quick=True, echo=lines.append)
    assert any("kl_posterior" in line for line in lines)
    return found


def test_centered_is_wrong_and_noncentered_is_right(demo: Demo) -> None:
    centered, noncentered = demo.fits["centered_normal"], demo.fits["noncentered_normal"]
    assert centered.kl_posterior > noncentered.kl_posterior + 1
    assert centered.comparison.table.loc["tau", "verdict"] == "bad"
    assert centered.comparison.table.loc["tau", "log_sd_ratio"] < -0.5
    assert (noncentered.comparison.table["verdict"] != "bad").all()


def test_the_gap_is_never_negative(demo: Demo) -> None:
    for fit in demo.fits.values():
        assert fit.elbo + fit.kl_posterior == pytest.approx(demo.log_evidence)
        assert fit.kl_posterior > -4.5 * fit.elbo_error


def test_files_reopen(demo: Demo) -> None:
    assert {path.suffix for path in demo.files} == {".nc", ".png"}
    for path in demo.files:
        assert path.stat().st_size > 1000
        if path.suffix == ".nc":
            with xr.open_dataset(path, group="posterior", engine="h5netcdf") as posterior:
                assert posterior.sizes["school"] == 8


def test_log_evidence_without_between_school_variance() -> None:
    """One school: theta integrates out, and a scale-mixture over tau remains, which a fine sum gives too."""
    found = log_evidence(torch.tensor([10.0]).numpy().astype(float), torch.tensor([8.0]).numpy().astype(float))
    tau = torch.linspace(0, 4000, 2_000_001, dtype=torch.float64)
    density = pyro.distributions.HalfCauchy(torch.tensor(5.0, dtype=torch.float64)).log_prob(tau)
    likelihood = pyro.distributions.Normal(0.0, (125 + tau**2).sqrt()).log_prob(torch.tensor(8.0, dtype=torch.float64))
    assert found == pytest.approx(torch.trapezoid((density + likelihood).exp(), tau).log().item(), abs=1e-3)


def test_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pyro_elbo_ext"]
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout.split() == ["pyro_elbo_ext", __version__]
    (tmp_path / "file").write_text("not a folder")
    failed = subprocess.run([*command, "demo", "--output", str(tmp_path / "file")], capture_output=True, text=True)
    assert failed.returncode == 2
    assert "--output" in failed.stderr
    assert subprocess.run([*command, "demo", "--num-steps", "0"], capture_output=True).returncode == 2
