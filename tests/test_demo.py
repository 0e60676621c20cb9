from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
import xarray as xr
from numpy.typing import NDArray
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from scipy import integrate, stats

from pyro_elbo_ext import DecomposedELBO, History, __version__, compare_to_mcmc, diagnose
from pyro_elbo_ext.__main__ import main
from pyro_elbo_ext.demo import Demo, Speed, load_eight_schools, log_evidence, page, run_demo, story
from pyro_elbo_ext.demo.telling import WIDTH, Lines, agreement

ARRAYS = {key: np.array(load_eight_schools()[key], float) for key in ("sigma", "y")}
SITES = ("mu", "tau", *(f"theta[{school}]" for school in "ABCDEFGH"))


def exact_moments() -> pd.DataFrame:
    """Mean and sd of each scalar given y: normal given tau, whose density is on a fine grid."""
    sigma, y = ARRAYS["sigma"], ARRAYS["y"]
    tau = np.geomspace(1e-4, 1e4, 200_001)[:, None]
    variance = sigma**2 + tau**2
    precision = (1 / variance).sum(1) + 1 / 25
    mu = (y / variance).sum(1) / precision
    log_density = 0.5 * (mu**2 * precision - np.log(precision) - (np.log(variance) + y**2 / variance).sum(1))
    weights = (
        np.exp(log_density - log_density.max()) * stats.halfcauchy.pdf(tau[:, 0], scale=5) * np.gradient(tau[:, 0])
    )
    weights /= weights.sum()
    within = 1 / (1 / sigma**2 + 1 / tau**2)
    theta = within * (y / sigma**2 + mu[:, None] / tau**2)
    given = [(mu, 1 / precision), (tau[:, 0], np.zeros_like(mu))]
    given += [(theta[:, j], within[:, j] + (within[:, j] / tau[:, 0] ** 2) ** 2 / precision) for j in range(8)]
    means = [weights @ mean for mean, _ in given]
    sds = [
        np.sqrt(weights @ (variance + (mean - total) ** 2))
        for (mean, variance), total in zip(given, means, strict=True)
    ]
    return pd.DataFrame({"mean": means, "sd": sds}, index=list(SITES))


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


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Demo, list[str]]:
    """One run for all, as the command line calls it, and its lines; parameters and random numbers are as they were."""
    lines: list[str] = []
    with pyro.get_param_store().scope():
        pyro.param("mine", torch.tensor(1.5))
        before = torch.get_rng_state()
        found = run_demo(tmp_path_factory.mktemp("demo") / "new" / "folder", quick=True, echo=lines.append)
        assert torch.equal(torch.get_rng_state(), before)
        assert dict(pyro.get_param_store().items()) == {"mine": torch.tensor(1.5)}
    return found, lines


def numbers(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"[-+]?\d+(?:\.\d+)?(?:e[-+]\d+)?", line.replace(",", ""))]


def line_of(lines: list[str], start: str) -> str:
    (found,) = [line for line in lines if line.strip().startswith(start)]
    return found


@pytest.mark.slow
class TestStory:
    def test_it_fits_the_terminal(self, ran: tuple[Demo, list[str]]) -> None:
        _, lines = ran
        wide = [line for line in lines if len(line) > WIDTH and "Written to" not in line]
        assert not wide
        assert len(lines) < 60
        assert [line[:2] for line in lines if re.match(r"\d\. [A-Z]+: ", line)] == ["1.", "2.", "3."]

    def test_legible(self, ran: tuple[Demo, list[str]]) -> None:
        found, lines = ran
        assert f"log p(y) = {found.log_evidence:.3f} nats" in lines[1]
        assert found.log_evidence == pytest.approx(log_evidence(ARRAYS["sigma"], ARRAYS["y"]))
        header = lines.index(next(line for line in lines if "reconstruction - kl_prior of" in line))
        assert lines[header].split()[-3:] == ["mu", "tau", "theta"]
        rows = [line.replace(" = ", " ").replace(" - ", " ").split() for line in lines[header + 1 : header + 5]]
        table = found.history.to_dataframe()
        for steps, *values in rows:
            first, _, last = steps.partition("-")
            inside = table[table["step"].between(int(first) - 1, int(last or first) - 1)]
            elbo, reconstruction, *kl_prior = map(float, values)
            assert elbo == pytest.approx(reconstruction - sum(kl_prior), abs=0.003)
            of_sites = inside[inside["kind"] == "latent"].groupby("site", sort=False)["kl_prior"].mean()
            assert kl_prior == pytest.approx(of_sites.tolist(), abs=6e-4)
            assert reconstruction == pytest.approx(inside.loc[inside["site"] == "y", "reconstruction"].mean(), abs=6e-4)
        assert "analytic at mu and theta; sampled at tau" in " ".join(lines)

    def test_the_fit_is_said_not_to_be_used_and_why(self, ran: tuple[Demo, list[str]]) -> None:
        found, lines = ran
        said = " ".join(line.strip() for line in lines)
        assert found.diagnosis.verdict == "do not use"
        assert found.diagnosis.mcmc is None
        assert "without MCMC: DO NOT USE" in said
        assert "theta: A funnel" in said
        assert "-> Non-centre 'theta'" in said
        lower, khat = re.findall(r"KL\(q \|\| posterior\) is at least ([\d.]+) nats, k-hat ([\d.]+)", said)[0]
        ledger = found.diagnosis.evidence
        assert float(lower) == pytest.approx(ledger.kl_posterior.lower, abs=0.006)
        assert float(khat) == pytest.approx(ledger.importance.khat, abs=0.006)
        assert 0.3 < float(lower) < found.log_evidence - ledger.elbo + 4 * ledger.elbo_error  # the exact gap
        assert len(found.diagnosis.findings) == int(re.findall(r"(\d+) findings are in the report", said)[0])

    def test_auto_agrees_with_nuts_and_both_with_the_exact_posterior(self, ran: tuple[Demo, list[str]]) -> None:
        found, lines = ran
        exact = exact_moments()
        auto, mean_field = found.comparisons["auto"], found.comparisons["mean-field"]
        for name, (mean, sd) in exact.iterrows():
            for draws in (auto.mcmc[str(name)], auto.approx[str(name)]):
                assert abs(draws.mean() - mean) < 0.15 * sd  # 2000 draws, of NUTS about 1000 effective: 0.03 sd
                assert abs(np.log(draws.std() / sd)) < 0.25  # tau has heavy tails
        assert (mean_field.table["log_sd_ratio"] < -0.3).all()
        assert "auto agrees with NUTS: all 10 means" in " ".join(lines)
        assert "mean-field does not agree with NUTS: 10 of 10" in " ".join(lines)

    def test_the_figures_beside_nuts_are_those_of_the_draws(self, ran: tuple[Demo, list[str]]) -> None:
        found, lines = ran
        auto, mean_field = found.comparisons["auto"], found.comparisons["mean-field"]
        for name in ("mu", "tau", "theta[A]"):
            sides = (auto.mcmc[name], auto.approx[name], mean_field.approx[name])
            expected = [figure for draws in sides for figure in (draws.mean(), draws.std(ddof=1))]
            assert numbers(line_of(lines, f"{name} ")) == pytest.approx(expected, abs=0.006)
        shifts = numbers(re.sub(r"theta\[.\]", "", line_of(lines, "worst mean")))
        worst = [side.table["mean_diff"][side.table["mean_diff"].abs().idxmax()] for side in (auto, mean_field)]
        assert shifts == pytest.approx(worst, abs=0.006)
        ratios = numbers(re.sub(r"theta\[.\]", "", line_of(lines, "worst sd")))
        worst = [side.table["log_sd_ratio"][side.table["log_sd_ratio"].abs().idxmax()] for side in (auto, mean_field)]
        assert ratios == pytest.approx(np.exp(worst).tolist(), abs=0.006)
        gaps = numbers(line_of(lines, "log p(y) - ELBO"))
        elbos = (found.automatic.elbo, found.diagnosis.evidence.elbo)
        assert gaps == pytest.approx([found.log_evidence - elbo for elbo in elbos], abs=0.006)
        assert 0 < gaps[0] < 1 < gaps[1]

    def test_fast(self, ran: tuple[Demo, list[str]]) -> None:
        found, lines = ran
        speed = found.speed
        assert speed.not_compiled is None
        assert speed.largest_difference < 1e-4
        for start, seconds in (
            ("pyro.infer.SVI.step", speed.pyro),
            ("CompiledSVI.step", speed.step),
            ("CompiledSVI.run", speed.run),
        ):
            each, times = (
                numbers(line_of(lines, start).split("microseconds")[0])[-1],
                numbers(line_of(lines, start))[-1],
            )
            assert each == pytest.approx(1e6 * seconds, abs=0.06)
            assert times == pytest.approx(speed.pyro / seconds, abs=0.6)
        assert numbers(line_of(lines, "Compiled in"))[0] == pytest.approx(speed.compiling, abs=0.06)

    def test_files_reopen(self, ran: tuple[Demo, list[str]]) -> None:
        found, lines = ran
        by_name = {path.name: path for path in found.files}
        listed = [line.split()[0] for line in lines if line.startswith("  ") and "." in line.split()[0]]
        assert [name for name in listed if name in by_name] == list(by_name)
        np.testing.assert_array_equal(History.load(by_name["mean_field_history.nc"]).elbo, found.history.elbo)
        with xr.open_datatree(by_name["automatic.nc"], engine="h5netcdf") as tree:
            assert tree["posterior"]["school"].values.tolist() == list("ABCDEFGH")
            assert {"posterior_predictive", "log_likelihood", "observed_data"} <= set(tree)
        with xr.open_datatree(by_name["nuts.nc"], engine="h5netcdf") as tree:
            np.testing.assert_array_equal(tree["posterior"]["tau"].values, found.nuts["posterior"]["tau"].values)
            assert tree["observed_data"]["y"].values.tolist() == ARRAYS["y"].tolist()
        assert lines[-1].startswith("Read next: README.md")

    def test_the_report_holds_the_tables(self, ran: tuple[Demo, list[str]]) -> None:
        found, lines = ran
        text = check_page(found.files[0])
        assert "do not use" in text
        for finding in found.diagnosis.findings:
            assert finding.statement.split(":")[0] in text
        for side in found.comparisons.values():
            for value in side.displayed().to_numpy().ravel():
                assert value in text
        for line in lines[:10]:
            assert line.strip() in text


class Page(HTMLParser):
    """Text, opened and closed tags, and addresses of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.open, self.addresses, self.pictures = "", [], [], 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.pictures += tag == "img"
        self.addresses += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]
        assert tag != "script"
        if tag not in ("img", "meta", "link", "source", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def check_page(path: Path, pictures: int = 2) -> str:
    """The text of a page that is whole and asks for nothing from outside."""
    read = Page()
    read.feed(path.read_text(encoding="utf-8"))
    assert not read.open
    assert read.pictures == pictures
    assert all(address.startswith("data:") for address in read.addresses)
    assert f"pyro_elbo_ext {__version__}" in read.text
    return read.text


# Parts, on figures that are made up


@pytest.fixture(scope="module")
def made_up() -> dict[str, dict[str, NDArray[np.float64]]]:
    rng = np.random.default_rng(0)
    shapes = {"mu": (4, 300), "tau": (4, 300), "theta": (4, 300, 8)}
    return {side: {name: rng.gamma(2.0, size=shape) for name, shape in shapes.items()} for side in ("NUTS", "guide")}


def test_agreement_is_by_the_worst_figure(made_up: dict[str, dict[str, NDArray[np.float64]]]) -> None:
    table = compare_to_mcmc(made_up["guide"], made_up["NUTS"]).table
    assert agreement(table) == "agrees with NUTS: all 10 means and log sds are within 0.2"
    for column in ("mean_diff", "log_sd_ratio"):
        off = table.copy()
        off.loc["tau", column] = -0.21
        assert agreement(off) == "does not agree with NUTS: 1 of 10 scalars are over 0.2 sds off"


def test_speed_in_words() -> None:
    lines: list[str] = []
    speed = Speed(2e-3, 1e-5, 2e-6, 6.0, 0.0, None)
    Lines(lines.append).timed(speed)
    assert numbers(line_of(lines, "CompiledSVI.run")) == [2.0, 1000]
    assert "are equal" in " ".join(lines)
    lines.clear()
    Lines(lines.append).timed(replace(speed, largest_difference=2e-7))
    assert "differ by 2e-07 nats" in " ".join(line.strip() for line in lines)
    lines.clear()
    Lines(lines.append).timed(replace(speed, not_compiled="there is no C++ compiler"))
    assert line_of(lines, "Not compiled here") == "   Not compiled here: there is no C++ compiler"
    assert not [line for line in lines if line.strip().startswith("CompiledSVI.step")]


def test_report_with_and_without_matplotlib(
    made_up: dict[str, dict[str, NDArray[np.float64]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model() -> None:
        pyro.sample("z", pyro.distributions.Normal(0.0, 1.0))
        pyro.sample("y", pyro.distributions.Normal(0.0, 1.0), obs=torch.tensor(1.0))

    with pyro.get_param_store().scope():
        pyro.set_rng_seed(0)
        guide, elbo = AutoNormal(model), DecomposedELBO()
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
        for _ in range(40):
            svi.step()
        diagnosis = diagnose(model, guide, num_draws=200, seed=0)
    comparisons = {"<guide>": compare_to_mcmc(made_up["guide"], made_up["NUTS"])}
    flat = {side: {name: np.concatenate(list(x)) for name, x in draws.items()} for side, draws in made_up.items()}

    speed = Speed(2e-3, 1e-5, 2e-6, 6.0, 0.0, None)

    def written(name: str) -> Path:
        said = ["1. <b> & more"]
        page.write_report(
            tmp_path / name, said, elbo.history, diagnosis, comparisons, flat, speed, list("ABCDEFGH"), __version__
        )
        return tmp_path / name

    text = check_page(written("with.html"))
    assert "1. <b> & more" in text
    assert "<guide> beside NUTS" in text
    assert "CompiledSVI.run2.001000" in text  # cells of a row: microseconds, and times as fast
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find_spec(name, *a)
    )
    assert 'pip install "pyro_elbo_ext[plots]"' in check_page(written("without.html"), pictures=0)


def test_nuts_without_nutpie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nutpie", None)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "nutpie" else find_spec(name, *a))
    lines: list[str] = []
    sigma, y = (torch.tensor(ARRAYS[key], dtype=torch.float32) for key in ("sigma", "y"))
    sizes = replace(story.QUICK, nuts_by_pyro=(1, 20, 10))
    nuts = story._sample(sigma, y, {"school": list("ABCDEFGH")}, 0, sizes, Lines(lines.append))
    assert nuts["posterior"]["theta"].shape == (1, 10, 8)
    assert "1 x 10 draws" in lines[-1]
    assert "by pyro" in lines[-1]


def test_output_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    for output in ("file", "file/below"):
        assert main(["demo", "--output", str(tmp_path / output)]) == 2
        assert "--output" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"
