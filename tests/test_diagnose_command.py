"""The command line's answer and exit status, on a model with a known posterior: mu ~ Normal(2, sd 0.25)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_elbo_ext
from pyro_elbo_ext.__main__ import main
from pyro_elbo_ext.diagnosis.command import load_params, read_data

SOURCE = """
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn

net = nn.Linear(1, 2)


def model(y, scale=1.0):
    mu = pyro.sample("mu", dist.Normal(0.0, 1e3))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, scale), obs=y)


def exact(y, scale=1.0):
    pyro.sample("mu", dist.Normal(2.0, 0.25))


def narrow(y, scale=1.0):
    pyro.sample("mu", dist.Normal(2.0, 0.19))


def shifted(y, scale=1.0):
    pyro.sample("mu", dist.Normal(2.5, 0.25))


def other_site(y, scale=1.0):
    pyro.sample("nu", dist.Normal(2.0, 0.25))


def network(y, scale=1.0):
    pyro.module("net", net)
    loc, log_sd = net(torch.ones(1))
    pyro.sample("mu", dist.Normal(loc, log_sd.exp()))


def factory(model):
    return AutoNormal(model)


number = 3
"""
STATUS = {"exact": 0, "narrow": 1, "shifted": 2}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "fitted_model.py").write_text(SOURCE)
    (tmp_path / "stops.py").write_text("raise SystemExit(0)\n")
    (tmp_path / "lacks.py").write_text("import no_such_module_at_all\n")
    (tmp_path / "raises.py").write_text(
        "def model(y, scale):\n    raise RuntimeError('mine')\n\n\ndef guide(y, scale):\n    pass\n"
    )
    y = 2 + np.tile([-1.0, 1.0], 8)
    np.savez(tmp_path / "data.npz", y=y, scale=np.float64(1.0))
    np.savez(tmp_path / "words.npz", y=np.array(["a", "b"]))
    np.savez(tmp_path / "clash.npz", y=y, seed=np.int64(1))
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "draws.npz", mu=rng.normal(2.0, 0.25, (4, 1000)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
    for name in ("fitted_model", "stops", "lacks", "raises"):
        sys.modules.pop(name, None)


def diagnose(*arguments: str, guide: str = "fitted_model:exact", data: str = "data.npz") -> int:
    return main(["diagnose", "fitted_model:model", "--guide", guide, "--data", data, *arguments])


@pytest.mark.parametrize(("guide", "status"), STATUS.items())
def test_exit_status_is_the_verdict(folder: Path, guide: str, status: int) -> None:
    ran = subprocess.run(
        [
            sys.executable,
            *("-m", "pyro_elbo_ext", "diagnose", "fitted_model:model", "--guide", f"fitted_model:{guide}"),
            *("--data", "data.npz", "--seed", "1", "--output", "new/page.html"),
        ],
        env={**os.environ, "PYTHONPATH": str(Path(pyro_elbo_ext.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == status, ran.stdout + ran.stderr
    verdict = ("good", "means only", "do not use")[status]
    assert ran.stdout.startswith(f"Verdict: {verdict.upper()}\n")
    assert "log p(x)" in ran.stdout
    assert "mu " in ran.stdout
    page = (folder / "new" / "page.html").read_text("utf-8")
    assert f"{verdict}</strong>" in page
    assert "fitted_model:model" in page


def test_with_mcmc_draws(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert diagnose("--mcmc", "draws.npz", "--num-draws", "1000") == 0
    assert "Against MCMC" in (folder / "report.html").read_text("utf-8")
    assert str(folder) not in capsys.readouterr().err


@pytest.mark.parametrize("guide", ["pyro.infer.autoguide:AutoNormal", "fitted_model:factory"])
def test_class_or_factory_with_its_fit(folder: Path, guide: str, capsys: pytest.CaptureFixture[str]) -> None:
    import fitted_model  # type: ignore[import-not-found]

    auto = AutoNormal(fitted_model.model)
    auto(**read_data("data.npz"))
    with torch.no_grad():
        auto.locs.mu.fill_(2.0)
        auto.scales.mu = 0.25 * torch.ones(())
    pyro.get_param_store().save(str(folder / "fit.pt"))
    pyro.clear_param_store()
    assert diagnose(guide=guide) == 2  # not trained
    pyro.clear_param_store()
    assert diagnose("--params", "fit.pt", guide=guide) == 0
    assert "2 " in capsys.readouterr().out


def test_parameters_of_a_network_are_the_saved_ones(folder: Path) -> None:
    import fitted_model

    data = read_data("data.npz")
    svi = SVI(fitted_model.model, fitted_model.network, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(20):
        svi.step(**data)
    trained = fitted_model.net(torch.ones(1)).detach().clone()
    pyro.get_param_store().save(str(folder / "net.pt"))
    pyro.clear_param_store()
    nn.init.normal_(fitted_model.net.weight)
    load_params("net.pt", fitted_model.model, fitted_model.network, data)
    assert torch.equal(fitted_model.net(torch.ones(1)), trained)
    with pytest.raises(ValueError, match=r"net\.pt has no AutoNormal\.locs\.mu, AutoNormal\.scales\.mu.*net\$\$\$bias"):
        load_params("net.pt", fitted_model.model, AutoNormal(fitted_model.model), data)


def test_data_become_tensors_of_the_default_dtype(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "data.npz",
        real=np.array([1.5, 2.5]),
        whole=np.array([[1, 2]], np.uint8),
        truth=np.array([True]),
        number=np.int32(7),
        fraction=np.float32(0.5),
    )
    found = read_data(str(tmp_path / "data.npz"))
    assert found["real"].dtype == torch.float32
    assert found["real"].tolist() == [1.5, 2.5]
    assert found["whole"].dtype == torch.int64
    assert found["whole"].tolist() == [[1, 2]]
    assert found["truth"].dtype == torch.bool
    assert (found["number"], type(found["number"])) == (7, int)
    assert (found["fraction"], type(found["fraction"])) == (0.5, float)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere:model", "--guide", "fitted_model:exact"], "no module 'nowhere'"),
        (["fitted_model", "--guide", "fitted_model:exact"], "must be module:name"),
        (["fitted_model:modle", "--guide", "fitted_model:exact"], "fitted_model has no 'modle'"),
        (["fitted_model:number", "--guide", "fitted_model:exact"], "must be callable, got int"),
        (["stops:model", "--guide", "fitted_model:exact"], "ended the program with status 0"),
        (["lacks:model", "--guide", "fitted_model:exact"], "no_such_module_at_all"),
        (["fitted_model:model", "--guide", "fitted_model:exact", "--data", "none.npz"], "no such file: none.npz"),
        (["fitted_model:model", "--guide", "fitted_model:exact", "--data", "stops.py"], "must be an .npz file"),
        (["fitted_model:model", "--guide", "fitted_model:exact", "--data", "words.npz"], "array 'y' has dtype <U1"),
        (["fitted_model:model", "--guide", "fitted_model:exact", "--data", "clash.npz"], "arrays called seed"),
        (
            ["fitted_model:model", "--guide", "fitted_model:exact", "--data", "data.npz", "--params", "x.pt"],
            "--params: no such file",
        ),
        (
            ["fitted_model:model", "--guide", "fitted_model:exact", "--data", "data.npz", "--mcmc", "x.nc"],
            "no such draws",
        ),
        (["fitted_model:model", "--guide", "fitted_model:exact", "--output", "."], "is a folder"),
        (["fitted_model:model", "--guide", "fitted_model:other_site", "--data", "data.npz"], "mu"),
    ],
)
def test_no_verdict_is_status_three(
    folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diagnose", *arguments]) == 3
    out, err = capsys.readouterr()
    assert message in err.splitlines()[-1]
    assert "error: " in err
    assert out == ""
    assert not (folder / "report.html").exists()


@pytest.mark.usefixtures("folder")
def test_error_of_the_model_comes_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", "raises:model", "--guide", "raises:guide", "--data", "data.npz"]) == 3
    err = capsys.readouterr().err
    assert "raises.py" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m:model"], "--guide"),
        (["m:model", "--guide", "m:guide", "--num-draws", "0"], "must be at least 1"),
        (["m:model", "--guide", "m:guide", "--seed", "-1"], "from 0 to"),
        (["m:model", "--guide", "m:guide", "--loud"], "unrecognized arguments: --loud"),
    ],
)
def test_wrong_arguments_are_no_verdict(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["diagnose", *arguments])
    assert stopped.value.code == 3
    assert message in capsys.readouterr().err
