from __future__ import annotations

import base64
import importlib.util
import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure
from pyro.infer import SVI
from torch import Tensor

from pyro_elbo_ext import DecomposedELBO, compare_to_mcmc, evidence_bounds
from pyro_elbo_ext.diagnosis import Diagnosis, Finding
from pyro_elbo_ext.diagnosis.page import MAX_ROWS
from pyro_elbo_ext.diagnosis.plots import MAX_SCALARS, plot_elbo, plot_evidence, plot_forest, plot_weights
from pyro_elbo_ext.diagnosis.report import interval, number, worst_first
from pyro_elbo_ext.evidence.ledger import Interval

HOSTILE = '<script>alert("z")</script>&amp;$\\frac$</td>'
Y = torch.tensor([1.0, 2.0])
VOID = {"meta", "link", "source", "img", "br"}


def model(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def guide(y: Tensor) -> None:  # the posterior is Normal(1, sd 0.577)
    pyro.sample("z", dist.Normal(1.0, 0.4))


def half_line(y: Tensor) -> None:
    z = pyro.sample("z", dist.HalfNormal(1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def wide_guide(y: Tensor) -> None:
    pyro.sample("z", dist.Normal(0.5, 1.0, validate_args=False))


def scalars(**values: tuple[float, float, str]) -> pd.DataFrame:
    return pd.DataFrame.from_dict(
        {
            name: {
                "mean": 0.5,
                "sd": 0.25,
                "mean_shift": shift,
                "mean_shift_se": 0.02,
                "log_sd_ratio": ratio,
                "log_sd_ratio_se": 0.03,
                "khat": 0.6,
                "verdict": verdict,
            }
            for name, (shift, ratio, verdict) in values.items()
        },
        orient="index",
    )


def diagnosis(table: pd.DataFrame | None = None) -> Diagnosis:
    given = {
        "fine": (0.01, -0.02, "good"),
        HOSTILE: (-8.3, 0.7, "do not use"),
        "narrow": (0.03, -0.36, "means only"),
        "dark": (math.nan, math.nan, "do not use"),
    }
    return Diagnosis(
        verdict="do not use",
        findings=(
            Finding(
                HOSTILE, "do not use", f"the mean of {HOSTILE} is 8.3 posterior sds off", "Use <b>another</b> guide."
            ),
            Finding("narrow", "means only", "its sd is 0.7 times the posterior's", "Use a full covariance."),
        ),
        scalars=scalars(**given) if table is None else table,
        evidence=evidence_bounds(model, guide, Y, num_draws=400, seed=0),
        mcmc=None,
        method="importance weights",
    )


class Page(HTMLParser):
    """Tags with attributes, visible text, and whether every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data

    def pictures(self) -> list[str]:
        return [
            attrs.get("src", attrs.get("srcset", ""))
            for tag, attrs in self.tags
            if tag in ("img", "source")  # a light and a dark one each
        ]


def written(found: Diagnosis, folder: Path, **options: object) -> Page:
    path = found.to_html(folder / "page.html", **options)  # type: ignore[arg-type]
    return Page(path.read_text("utf-8"))


def test_text_has_the_verdict_first_and_then_reasons_scalars_and_evidence() -> None:
    text = str(diagnosis())
    assert text == repr(diagnosis())
    places = [
        text.index(part)
        for part in (
            "Verdict: DO NOT USE",
            "8.3 posterior sds off",
            "-> Use <b>another</b> guide.",
            "-> Use a full covariance.",
            "Scalars: 2 do not use, 1 means only, 1 good",
            "-8.30 ± 0.02",
            "-0.36 ± 0.03",
            "\n  log p(x) ",
            "\n  KL(q || posterior) ",
            "\n  KL(q || prior) ",
            "\n  k-hat ",
        )
    ]
    assert places == sorted(places)
    assert places[0] == 0


def test_no_bare_kl_anywhere(tmp_path: Path) -> None:
    found = diagnosis()
    page = written(found, tmp_path).text
    for text in (str(found), found._repr_html_(), page):
        assert re.findall(r"KL(?!\(q \|\| (?:posterior|prior)\))", text) == []
        evidence = found.evidence
        assert interval(evidence.kl_posterior) in text
        assert f"{evidence.kl_prior:.4f}" in text


def test_page_needs_nothing_else_and_runs_nothing(tmp_path: Path) -> None:
    page = written(diagnosis(), tmp_path, history=[-5.0, -4.0, -3.5])
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "iframe", "object", "embed", "form", "base"}
    for tag, attrs in page.tags:
        assert not [name for name in attrs if name.startswith("on")]
        for name in ("src", "href", "srcset", "action", "data"):
            assert attrs.get(name, "data:").startswith("data:"), (tag, attrs)
    style = re.search("<style>(.*?)</style>", (tmp_path / "page.html").read_text("utf-8"), re.DOTALL)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    assert "prefers-color-scheme: dark" in style[1]
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags


def test_names_are_text_wherever_they_come_from(tmp_path: Path) -> None:
    found = diagnosis()
    page = written(found, tmp_path, title=HOSTILE)
    assert page.text.count(HOSTILE) >= 5  # title and heading, subject, statement and row
    assert "Use <b>another</b> guide." in page.text
    fragment = Page(found._repr_html_())
    assert HOSTILE in fragment.text
    assert "script" not in {tag for tag, _ in fragment.tags}


def test_page_has_verdict_names_figures_and_ledger(tmp_path: Path) -> None:
    found = diagnosis()
    page = written(found, tmp_path)
    assert "✗ do not use" in page.text
    for name in found.scalars.index:
        assert name in page.text
    for finding in found.findings:
        assert finding.statement in page.text
        assert finding.remedy in page.text
    for bound in found.evidence.bounds:
        assert number(bound.value, bound.standard_error) in page.text
        assert bound.note in page.text
    for note in found.evidence.notes:
        assert note in page.text


@pytest.mark.parametrize(("history", "count"), [(None, 3), ([-9.0, -4.0, -3.5], 4)])
def test_pictures_are_svg_in_the_page(tmp_path: Path, history: list[float] | None, count: int) -> None:
    pictures = written(diagnosis(), tmp_path, history=history).pictures()
    assert len(pictures) == 2 * count
    assert len(set(pictures)) == 2 * count
    for picture in pictures:
        assert picture.startswith("data:image/svg+xml;base64,")
        root = ElementTree.fromstring(base64.b64decode(picture.partition(",")[2]))
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 10
        for element in root.iter():
            assert not element.tag.endswith("script")
            for name, value in element.attrib.items():
                assert not name.endswith("href") or value.startswith("#")


def test_same_diagnosis_same_page(tmp_path: Path) -> None:
    found = diagnosis()
    first, second = (found.to_html(tmp_path / f"{i}.html").read_bytes() for i in range(2))
    assert first == second


def test_comparison_with_mcmc_is_on_the_page(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    compared = compare_to_mcmc({"<z>": rng.normal(size=(1, 200))}, {"<z>": rng.normal(size=(2, 200))})
    page = written(replace(diagnosis(), mcmc=compared), tmp_path)
    assert compared.verdict in page.text
    assert compared.displayed().loc["<z>", "wasserstein"] in page.text


def test_many_scalars_are_cut_with_a_word(tmp_path: Path) -> None:
    count = MAX_ROWS + 7
    table = scalars(**{f"w[{i}]": (i / count, 0.0, "good") for i in range(count)})
    found = diagnosis(table)
    page = written(found, tmp_path)
    assert f"The worst {MAX_ROWS} of {count}." in page.text
    assert f"w[{count - 1}]" in page.text
    assert "w[6]" not in page.text
    assert str(found).count("\nw[") == 10
    figure = found.plot()
    assert f"the worst {MAX_SCALARS} of {count}" in {axis.get_title(loc="left") for axis in figure.axes}
    assert len(figure.axes[0].get_yticks()) == MAX_SCALARS


def test_dataframe_is_a_copy_with_the_verdict() -> None:
    found = diagnosis()
    table = found.to_dataframe()
    assert table.attrs["verdict"] == "do not use"
    pd.testing.assert_frame_equal(table, found.scalars)
    table.loc["fine", "mean_shift"] = 99.0
    assert found.scalars.loc["fine", "mean_shift"] == 0.01


def test_worst_first() -> None:
    assert list(worst_first(diagnosis().scalars).index) == ["dark", HOSTILE, "narrow", "fine"]


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ((-1.0, 2.0), "[-1.0000, 2.0000]"),
        ((-1.0, math.inf), "at least -1.0000"),
        ((-math.inf, 2.0), "at most 2.0000"),
        ((math.inf, math.inf), "infinite"),
        ((-math.inf, math.inf), "unknown"),
    ],
)
def test_open_intervals_are_said_in_words(limits: tuple[float, float], words: str) -> None:
    assert interval(Interval(*limits)) == words


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (0.123, 0.045, "+0.12 ± 0.04"),
        (2.5e7, 1e3, "+2.5e+07 ± 1e+03"),
        (math.nan, 0.1, "unknown"),
        (0.5, math.nan, "+0.50"),
    ],
)
def test_figures_with_errors(value: float, error: float, words: str) -> None:
    assert number(value, error, signed=True) == words


def test_forest_has_the_figures_at_their_places() -> None:
    found = diagnosis()
    left, right = plot_forest(found.scalars, Figure().subplots(1, 2, sharey=True))
    assert left.get_yticklabels()[0].get_text() == "fine"
    drawn = {
        (float(x), float(y)) for line in left.lines if line.get_marker() == "o" for x, y in line.get_xydata().tolist()
    }
    assert drawn == {(0.01, 0.0), (0.03, 2.0)}
    assert {text.get_text() for text in left.texts} == {"-8.3", "unknown"}
    assert {(0.7, 1.0)} <= {
        (float(x), float(y)) for line in right.lines if line.get_marker() == "o" for x, y in line.get_xydata().tolist()
    }


def test_ledger_has_every_bound_and_the_interval() -> None:
    evidence = diagnosis().evidence
    ax = plot_evidence(evidence, Figure().subplots())
    drawn = {float(x) for line in ax.lines for x in np.asarray(line.get_xdata(), float)}
    assert {bound.value for bound in evidence.bounds if bound.valid} <= drawn
    assert any(evidence.log_evidence.lower == pytest.approx(patch.get_x()) for patch in ax.patches)  # type: ignore[attr-defined]


def test_weights_are_drawn_and_their_khat_is_said() -> None:
    sample = diagnosis().evidence.importance
    ax = plot_weights(sample, Figure().subplots())
    weights = sample.per_draw()["weight"].sort_values(ascending=False).to_numpy()
    ranks, heights = (np.asarray(data) for data in ax.lines[0].get_data())
    np.testing.assert_allclose(10.0**heights, weights[ranks.astype(int) - 1], rtol=1e-6)
    assert f"k-hat {sample.khat:.2f}" in ax.get_title(loc="left")


def test_history_of_the_objective_is_drawn(tmp_path: Path) -> None:
    elbo = DecomposedELBO()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    for _ in range(30):
        svi.step(Y)
    found = diagnosis()
    ax = plot_elbo(elbo.history, found.evidence, Figure().subplots())
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), elbo.history.elbo)
    assert len(written(found, tmp_path, history=elbo.history).pictures()) == 8


@pytest.mark.parametrize("history", [[], [[1.0, 2.0]]])
def test_history_of_another_shape(tmp_path: Path, history: list[float]) -> None:
    with pytest.raises(ValueError, match="history must have the ELBO of at least one step"):
        diagnosis().to_html(tmp_path / "page.html", history=history)
    assert not (tmp_path / "page.html").exists()


def test_guide_that_leaves_the_support(tmp_path: Path) -> None:
    with pyro.validation_enabled(False):
        evidence = evidence_bounds(half_line, wide_guide, Y, num_draws=300, seed=0, fallback=None)
    assert evidence.elbo == -math.inf
    found = replace(diagnosis(), evidence=evidence)
    page = written(found, tmp_path, history=[-3.0] * 50)
    assert len(page.pictures()) == 8
    for text in (str(found), page.text):
        assert "outside the model's support" in text
        assert "infinite" in text


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = diagnosis()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find_spec(name, *a)
    )
    page = written(found, tmp_path)
    assert 'pip install "pyro_elbo_ext[plots]"' in page.text
    assert page.pictures() == []
    assert HOSTILE in page.text
    with pytest.raises(ImportError, match=r"pyro_elbo_ext\[plots\]"):
        found.plot()


def test_findings_on_the_whole_come_before_those_on_scalars(tmp_path: Path) -> None:
    table = scalars(**{f"w[{i}]": (1.0, 0.0, "do not use") for i in range(6)})
    findings = (
        *(Finding(f"w[{i}]", "do not use", f"w[{i}] is off", f"Richer guide: for {i}.") for i in range(6)),
        Finding("w[0]", "do not use", "The chains disagree", "Run NUTS."),
        Finding("w", "do not use", "A funnel", "Non-centre it."),
        Finding("w", "do not use", "Another funnel", "Non-centre it."),
        Finding("", "good", "The weights are heavy.", "Do not reweight."),
    )
    found = replace(diagnosis(table), findings=findings)
    text = str(found)
    assert text.index("[do not use] w: A funnel") < text.index("[do not use] w[0]: w[0] is off")
    assert "w[2] is off" in text
    assert "w[3] is off" not in text
    assert "The chains disagree" in text
    assert "... and 3 more on single scalars, in .findings" in text
    assert text.count("-> Non-centre it.") == 1
    assert text.index("Another funnel") < text.index("-> As for w.")
    assert "spread is up to 1.00 times too large, and its mean up to 1.00 posterior sds off; from 1.65" in " ".join(
        text.split()
    )
    assert "[note] The weights are heavy." in text
    for page in (Page(found._repr_html_()), written(found, tmp_path)):
        assert "3 more on single scalars" in page.text
        assert all(finding.statement in page.text for finding in findings)
        assert "note The weights are heavy." in page.text
