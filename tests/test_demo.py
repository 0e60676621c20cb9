from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
import xarray as xr
from scipy import integrate, stats

from pyro_elbo_ext import History, demo
from pyro_elbo_ext.__main__ import main
from pyro_elbo_ext.demo import Demo, load_eight_schools, log_evidence, run_demo, tell

CENTERED, INDEPENDENT, FULL = demo.GUIDES
ARRAYS = {key: np.array(load_eight_schools()[key], float) for key in ("sigma", "y")}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Demo, list[str]]:
    lines: list[str] = []
    return run_demo(tmp_path_factory.mktemp("demo"), num_steps=900, quick=True, echo=lines.append), lines


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(demo.NUTS_SIZES, "quick", (1, 40, 40))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_evidence_is_the_double_integral() -> None:
    sigma, y = ARRAYS["sigma"], ARRAYS["y"]

    def joint(mu: float, tau: float) -> float:
        likelihood = stats.norm.pdf(y, mu, np.sqrt(sigma**2 + tau**2)).prod()
        return likelihood * stats.norm.pdf(mu, 0, 5) * stats.halfcauchy.pdf(tau, scale=5) * 1e14

    integral = sum(
        integrate.dblquad(joint, low, high, -40, 40, epsabs=0, epsrel=1e-8)[0]
        for low, high in ((0, 10), (10, 100), (100, 10_000))
    )
    assert log_evidence(sigma, y) == pytest.approx(np.log(integral) - 14 * np.log(10), abs=1e-6)


@pytest.mark.slow
class TestStory:
    def test_centered_is_wrong_and_noncentered_is_not(self, ran: tuple[Demo, list[str]]) -> None:
        fits = ran[0].fits
        tables = {name: fit.comparison.table for name, fit in fits.items()}
        assert np.exp(tables[CENTERED].loc["tau", "log_sd_ratio"]) < 0.6
        assert np.exp(tables[CENTERED].loc["mu", "log_sd_ratio"]) < 0.6
        assert (tables[CENTERED]["verdict"] == "bad").any()
        for name in (INDEPENDENT, FULL):
            assert len(tables[name]) == 10
            assert (tables[name][["mean_diff", "log_sd_ratio"]].abs() < 0.5).all(axis=None)
            assert fits[CENTERED].kl_posterior > fits[name].kl_posterior + 1

    def test_every_elbo_is_below_the_evidence(self, ran: tuple[Demo, list[str]]) -> None:
        found, _ = ran
        for fit in found.fits.values():
            assert fit.elbo < found.log_evidence + 4 * fit.elbo_error
            assert fit.elbo + fit.kl_posterior == pytest.approx(found.log_evidence)

    def test_elbo_of_the_draws_agrees_with_the_history(self, ran: tuple[Demo, list[str]]) -> None:
        for fit in ran[0].fits.values():
            last = fit.history.summary(300).loc["ELBO"]
            # the last steps still improve a little: 4 standard errors and 0.2 nats
            assert abs(last["mean"] - fit.elbo) < 4 * np.hypot(last["se"], fit.elbo_error) + 0.2

    def test_terms_are_shown_as_it_trains(self, ran: tuple[Demo, list[str]]) -> None:
        found, lines = ran
        headers = [line for line in lines if "reconstruction   " in line]
        assert [header.split()[4:] for header in headers] == [
            ["mu", "tau~", "theta"],
            ["mu", "tau~", "z"],
            ["mu", "tau~", "z"],
        ]
        rows = [line.split() for line in lines if line[:11].strip().replace("-", "").isdigit()]
        assert len(rows) == 3 * 7
        for row in rows:
            elbo, reconstruction, kl_prior, *sites = map(float, row[1:])
            assert elbo == pytest.approx(reconstruction - kl_prior, abs=0.002)
            assert kl_prior == pytest.approx(sum(sites), abs=0.003)
        steps = found.fits[CENTERED].history.to_dataframe("step")
        assert float(rows[6][1]) == pytest.approx(steps["elbo"][625:].mean(), abs=0.001)

    def test_sentences_come_from_the_figures(self, ran: tuple[Demo, list[str]]) -> None:
        found, lines = ran
        assert lines[-len(found.sentences) :] == found.sentences
        centered, independent = found.fits[CENTERED], found.fits[INDEPENDENT]
        assert "wrong in none" not in found.sentences[0]
        assert "wrong in none" in found.sentences[1]
        assert f"{centered.kl_posterior:.2f} nats" in found.sentences[-1]
        swapped = {
            **found.fits,
            CENTERED: replace(centered, comparison=independent.comparison, kl_posterior=0.01),
            INDEPENDENT: replace(independent, comparison=centered.comparison, kl_posterior=9.87),
        }
        told = tell(swapped, found.log_evidence)
        assert "wrong in none" in told[0]
        assert "wrong in none" not in told[1]
        assert "9.87 nats" in told[-1]

    def test_files_reopen(self, ran: tuple[Demo, list[str]]) -> None:
        found, _ = ran
        by_name = {path.name: path for path in found.files}
        assert all(path.exists() for path in found.files)
        for name, fit in found.fits.items():
            with xr.open_datatree(by_name[f"{name}.nc"], engine="h5netcdf") as tree:
                assert {"posterior", "posterior_predictive", "prior", "log_likelihood", "observed_data"} <= set(tree)
                assert tree["posterior"]["theta"].shape == (1, 400, 8)
                assert tree["posterior"]["school"].values.tolist() == list("ABCDEFGH")
                log_p, log_q = (tree["sample_stats"][key].values for key in ("log_p", "log_q"))
                assert (log_p - log_q).mean() == pytest.approx(fit.elbo)
                history = History.from_xarray(tree["svi_history"].to_dataset())
            np.testing.assert_array_equal(history.elbo, fit.history.elbo)
        with xr.open_datatree(by_name["nuts.nc"], engine="h5netcdf") as tree:
            np.testing.assert_array_equal(tree["posterior"]["tau"].values, found.nuts["posterior"]["tau"].values)
            assert tree["observed_data"]["y"].values.tolist() == ARRAYS["y"].tolist()
        plots = [path for path in found.files if path.suffix == ".png"]
        assert len(plots) == 7
        for path in plots:
            assert path.read_bytes().startswith(b"\x89PNG")
            assert path.stat().st_size > 10_000


@pytest.mark.usefixtures("tiny")
def test_without_extras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module("arviz")  # ArviZ 0.x imports matplotlib itself
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "nutpie", None)
    find_spec = importlib.util.find_spec
    absent = {"matplotlib", "nutpie"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in absent else find_spec(name, *a))
    lines: list[str] = []
    found = run_demo(tmp_path, num_steps=30, quick=True, echo=lines.append)
    text = "\n".join(lines)
    assert 'Plots were skipped, as matplotlib is not installed: pip install "pyro_elbo_ext[plots]"' in text
    assert 'pip install "pyro_elbo_ext[nuts]"' in text
    assert "by pyro" in text
    assert {path.suffix for path in found.files} == {".nc"}


@pytest.mark.usefixtures("tiny")
def test_state_is_left_alone_and_seed_repeats(tmp_path: Path) -> None:
    pyro.param("mine", torch.tensor(1.5))
    before = torch.get_rng_state()
    first, second = (
        run_demo(tmp_path / str(i), num_steps=12, quick=True, seed=3, echo=lambda line: None) for i in range(2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert dict(pyro.get_param_store().items()) == {"mine": torch.tensor(1.5)}
    assert first.sentences == second.sentences
    for name in first.fits:
        np.testing.assert_array_equal(first.fits[name].history.elbo, second.fits[name].history.elbo)


@pytest.mark.usefixtures("tiny")
def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["demo", "--output", str(tmp_path / "new" / "folder"), "--num-steps", "10", "--seed", "1", "--quick"]) == 0
    )
    out, err = capsys.readouterr()
    assert "10 steps in" in out
    assert "log p(x) = -31.311" in out
    assert err == ""
    assert (tmp_path / "new" / "folder" / "funnel.png").exists()


def test_output_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    for output in ("file", "file/below"):
        assert main(["demo", "--output", str(tmp_path / output)]) == 2
        assert "--output" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("num_steps", [0, -3])
def test_num_steps_must_be_positive(tmp_path: Path, num_steps: int) -> None:
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        run_demo(tmp_path / "out", num_steps=num_steps)
    assert not (tmp_path / "out").exists()
