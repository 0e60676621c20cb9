"""README and docs: every Python block runs and prints what stands below it, and what is named exists."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import matplotlib
import pytest
from sybil import Document, Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser
from test_rooms import ROOMS

import pyro_elbo_ext

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted(path for path in ROOT.glob("docs/**/*.md") if "_build" not in path.parts)]
SLOW = {
    "getting_started",
    "train",
    "did_it_work",
    "against_nuts",
    "compile",
    "discrete_latents",
}

NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def same(printed: str, stored: str) -> bool:
    """Equal in words; numbers agree to 5% or 0.1, as other processors and versions of torch round otherwise."""
    if NUMBER.sub("#", printed).split() != NUMBER.sub("#", stored).split():
        return False
    pairs = zip(map(float, NUMBER.findall(printed)), map(float, NUMBER.findall(stored)), strict=True)
    return all(abs(a - b) <= max(0.1, 0.05 * abs(b)) for a, b in pairs)


def parsed(page: Path, printed: io.StringIO) -> Document:
    """The examples of a page: blocks marked ``python`` are run, and those marked ``output`` are what they print."""
    python = PythonEvaluator()

    def run(example: Example) -> None:
        printed.seek(0)
        printed.truncate()
        with redirect_stdout(printed):
            python(example)

    def compare(example: Example) -> str | None:
        found, stored = printed.getvalue().strip(), str(example.parsed).strip()
        return None if same(found, stored) else f"{page.name} prints\n{found}\nand says\n{stored}"

    return Sybil([CodeBlockParser("python", run), CodeBlockParser("output", compare)], path=str(ROOT)).parse(page)


def pages_with_code() -> Iterator[object]:
    for page in PAGES:
        if "```python" in page.read_text("utf-8"):
            marks = [pytest.mark.slow] if page.stem in SLOW or page == README else []
            yield pytest.param(page, marks=marks, id=page.relative_to(ROOT).with_suffix("").as_posix())


@pytest.mark.parametrize("page", list(pages_with_code()))
def test_code_blocks_run_and_print_what_is_said(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    for example in parsed(page, io.StringIO()).examples():
        example.evaluate()


def test_comparison_of_prints_can_fail() -> None:
    assert same("ELBO -34.05\n  tau   1.18", "ELBO  -34.1\ntau 1.2")
    assert not same("ELBO -34.05", "ELBO -44.05")
    assert not same("verdict good", "verdict do not use")
    assert not same("1 2", "1")


@pytest.mark.slow
def test_example_of_the_readme_can_be_pasted_line_by_line(tmp_path: Path) -> None:
    """Into Python's plain prompt, where a blank line ends a function."""
    source, output = re.findall(r"```(?:python|output)\n(.*?)```", README.read_text("utf-8"), flags=re.S)[:2]
    done = subprocess.run(
        [sys.executable, "-i", "-q"],
        input=source,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
        check=True,
    )
    assert "Error" not in done.stderr, done.stderr
    assert same(done.stdout, output), done.stdout


# ----------------------------------------------------------------------------------------------------------------------
# What is named exists


def test_readme_fits_its_length_and_has_one_picture() -> None:
    text = README.read_text("utf-8")
    assert len(text.splitlines()) <= 150
    assert len(re.findall(r"!\[", text)) == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_paths_and_commands_exist(page: Path) -> None:
    """Links between files with their anchors; paths and modules in code; files and words of pytest's commands."""
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() and file.parent == ROOT / "docs/tutorials":  # copied there when the pages are built
            file = ROOT / "tutorials" / file.name
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}, whose anchors are {sorted(anchors(file))}"
    for path in re.findall(r"`((?:docs|tests|tutorials|pyro_elbo_ext|\.ci)/[\w./]*)`", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"
    for module in re.findall(r"python -m (tests[\w.]+)", text):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), f"{page.name} names {module}"
    for file, word in re.findall(r"(tests/test_\w+\.py)(?: -k (\w+))?", text):
        assert (ROOT / file).exists(), f"{page.name} names {file}"
        assert word in (ROOT / file).read_text("utf-8"), f"{page.name} names {file} -k {word}"


def anchors(page: Path) -> set[str]:
    """As GitHub and MyST make them of headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_every_public_name_is_in_the_reference() -> None:
    """The build fails too, `check_reference` in docs/conf.py; this says so sooner."""
    text = "".join(path.read_text("utf-8") for path in ROOT.glob("docs/reference/*.md"))
    named = set(re.findall(r"^   (\w+)$", text, flags=re.M))
    extension_points = set(
        re.findall(r'^    "pyro_elbo_ext\.[\w.]*?(\w+)",$', (ROOT / "docs/conf.py").read_text("utf-8"), re.M)
    )
    assert len(extension_points) >= 7
    assert named >= set(pyro_elbo_ext.__all__) | extension_points


def test_design_page_states_the_order_of_the_rooms() -> None:
    table = re.findall(r"^\| `(\w+)", (ROOT / "docs/design.md").read_text("utf-8"), flags=re.M)
    assert table == [room for room in ROOMS if room != "__init__"]


def test_tutorials_are_small_and_stored_executed() -> None:
    notebooks = sorted(ROOT.glob("tutorials/*.ipynb"))
    assert sum(path.stat().st_size for path in notebooks) < 2e6
    for path in notebooks:
        text = path.read_text("utf-8")
        assert '"output_type"' in text, path.name
        assert "/site-packages/" not in text, path.name
