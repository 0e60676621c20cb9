"""A diagnosis as one HTML file that needs nothing else: style and pictures are in it, scripts there are none."""

from __future__ import annotations

import base64
import html
import importlib.util
import io
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import pandas as pd

from pyro_elbo_ext.diagnosis import report
from pyro_elbo_ext.files.atomic import write_whole
from pyro_elbo_ext.history.pictures import COLOURS

if TYPE_CHECKING:
    from pyro_elbo_ext.diagnosis.findings import Judgement

MAX_ROWS = 1000  # of scalars: more would make the page slow
WIDTH = 4.6  # inches of a picture, near to a phone's width, so that its letters stay readable there
THEMES: dict[str, tuple[str, dict[str, str]]] = {  # ink, and colours that would be faint on the background
    "light": ("#1d2330", {}),
    "dark": ("#e4e7ee", {COLOURS[0].lower(): COLOURS[4].lower()}),
}

STYLE = """
:root { color-scheme: light dark; --bg: #f6f7f9; --card: #fff; --ink: #1d2330; --muted: #5a6372; --line: #d9dde5;
  --good: #14713f; --means: #8a5a00; --bad: #b3261e; --on: #fff; }
@media (prefers-color-scheme: dark) { :root { --bg: #12151c; --card: #1b2029; --ink: #e4e7ee; --muted: #a0a9b8;
  --line: #343b48; --good: #6fd39b; --means: #f0b84d; --bad: #ff8a80; --on: #12151c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: anywhere; }
main { max-width: 84rem; margin: 0 auto; padding: 1rem clamp(0.75rem, 3vw, 2rem) 3rem; }
h1 { font-size: 1.3rem; margin: 0.5rem 0 1rem; }
h2 { font-size: 1.1rem; margin: 0 0 0.6rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 0.6rem; padding: 1rem; margin: 0 0 1rem;
  min-width: 0; }
.verdict { border-left: 0.5rem solid var(--c); }
.verdict > strong { font-size: 1.6rem; color: var(--c); display: block; }
.verdict p, .note { margin: 0.2rem 0; }
.good { --c: var(--good); } .means-only { --c: var(--means); } .do-not-use { --c: var(--bad); }
.other, .not-known { --c: var(--muted); }
.badge { background: var(--c); color: var(--on); border-radius: 0.3rem; padding: 0.05rem 0.4rem; font-size: 0.8rem;
  font-weight: 600; white-space: nowrap; }
.findings { padding-left: 1.4rem; margin: 0; } .findings li { margin-bottom: 0.7rem; }
.findings li:last-child { margin-bottom: 0; } details { margin-top: 0.7rem; } summary { cursor: pointer; }
.findings + details .findings { margin-top: 0.7rem; }
.remedy { margin: 0.2rem 0 0; padding-left: 0.7rem; border-left: 3px solid var(--line); }
.note, .what, figcaption, footer { color: var(--muted); font-size: 0.9rem; }
code { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 0.92em; }
.scroll { overflow: auto; max-width: 100%; } .long { max-height: 32rem; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: 0.3rem 0.7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th[scope=row] { text-align: left; font-weight: 600; }
thead th:first-child, thead th:last-child { text-align: left; } td:last-child { text-align: left; }
thead th { position: sticky; top: 0; background: var(--card); }
td.text { text-align: left; white-space: normal; min-width: 16rem; }
.summary td { text-align: left; } .summary td.what { white-space: normal; min-width: 14rem; }
@media (max-width: 40rem) { .summary, .summary tbody, .summary tr, .summary th, .summary td { display: block; border: 0; }
  .summary th, .summary td { padding: 0 0.2rem; white-space: normal; } .summary tr { border-bottom: 1px solid var(--line);
  padding: 0.35rem 0; } .summary td.what { min-width: 0; } }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 1rem;
  align-items: start; margin: 0 0 1rem; }
.figures.even { grid-template-columns: repeat(auto-fit, minmax(min(100%, 34rem), 1fr)); }
.figures section { margin: 0; }
figure { margin: 0; } figure img { width: 100%; height: auto; max-width: 36rem; display: block; margin: 0 auto; }
"""

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<link rel="icon" href="data:,">
<style>$style</style>
</head>
<body>
<main>
<h1>$title</h1>
$body
<footer>Made by pyro_elbo_ext $version. log p(x) = ELBO + KL(q || posterior); KL(q || prior) is a part of the ELBO.</footer>
</main>
</body>
</html>
""")


def write_page(
    diagnosis: Judgement, path: str | Path, *, history: Any = None, title: str = "Did the fit work?"
) -> Path:
    """Write the page to ``path``, whole or not at all. Returns the path."""
    file = Path(path)
    write_whole(file, page(diagnosis, history=history, title=title).encode())
    return file


def page(diagnosis: Judgement, *, history: Any = None, title: str = "Did the fit work?") -> str:
    """The page's text."""
    evidence = diagnosis.evidence
    parts = [_verdict(diagnosis)]
    if diagnosis.findings:
        parts.append(section("Reasons, and what to do", report.findings(diagnosis)))
    notes = "".join(note(line) for line in evidence.notes)
    parts.append(section("log p(x) = ELBO + KL(q || posterior), in nats", report.summary_table(evidence) + notes))
    parts.append(_figures(diagnosis, history))
    if len(diagnosis.scalars):
        parts.append(_scalars(diagnosis))
    parts.append(section("The ledger of the evidence", _ledger(diagnosis)))
    weights = repr(evidence.importance).splitlines()
    parts.append(section("k-hat, of the whole and by plate", "".join(note(line) for line in weights)))
    if diagnosis.mcmc is not None:
        compared = diagnosis.mcmc
        parts.append(
            section(
                "Against MCMC",
                note(compared.verdict)
                + report.table(compared.displayed().iloc[:MAX_ROWS], "parameter")
                + note("figure ± standard error (noise floor)"),
            )
        )
    return PAGE.substitute(
        title=html.escape(title), style=STYLE, body="\n".join(parts), version=version("pyro_elbo_ext")
    )


def _verdict(diagnosis: Judgement) -> str:
    sign = {"good": "✓", "means only": "~", "do not use": "✗"}[diagnosis.verdict]
    meaning = html.escape(report.meaning(diagnosis))
    counts = f"Scalars: {report.counted(diagnosis.scalars)}. " if len(diagnosis.scalars) else ""
    return (
        f'<section class="verdict {diagnosis.verdict.replace(" ", "-")}"><strong>{sign} {diagnosis.verdict}</strong>'
        f"<p>That is, {meaning}</p>{note(f'{counts}Estimated by: {diagnosis.method}.')}</section>"
    )


def _scalars(diagnosis: Judgement) -> str:
    scalars = report.worst_first(diagnosis.scalars)
    left_out = note(f"The worst {MAX_ROWS} of {len(scalars)}.") if len(scalars) > MAX_ROWS else ""
    shown = report.table(report.displayed(scalars.iloc[:MAX_ROWS]), "scalar")
    return section("Scalars, worst first", left_out + shown + note(report.LEGEND))


def _ledger(diagnosis: Judgement) -> str:
    rows = [
        {
            "side": bound.direction,
            "K": str(bound.k),
            "draws": str(bound.num_draws),
            "nats": report.number(bound.value, bound.standard_error),
            "reliable": "yes" if bound.valid else "no",
            "in the interval": "yes" if bound.in_interval else "no",
            "note": bound.note,
        }
        for bound in diagnosis.evidence.bounds
    ]
    return report.table(pd.DataFrame(rows, index=[bound.method for bound in diagnosis.evidence.bounds]), "bound")


def _figures(diagnosis: Judgement, history: Any) -> str:
    if importlib.util.find_spec("matplotlib") is None:
        return section("Pictures", note('They need matplotlib: pip install "pyro_elbo_ext[plots]"'))
    from pyro_elbo_ext.diagnosis.plots import panels

    cards = [card(title, height, paint) for title, height, paint in panels(diagnosis, history)]
    layout = "figures even" if len(cards) % 2 == 0 else "figures"
    return f'<div class="{layout}">{"".join(cards)}</div>'


def card(title: str, height: float, paint: Callable[[Any], Any]) -> str:
    """A section with a picture, drawn for light and for dark by ``paint`` on a figure of ``height`` inches."""
    light, dark = (_svg(paint, height, *theme) for theme in THEMES.values())
    return section(
        title,
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{html.escape(title)}; the figures are in the tables"></picture></figure>',
    )


def _svg(paint: Any, height: float, ink: str, instead: dict[str, str]) -> str:
    """A picture as a data address, on no background, with letters as outlines, so that no font is needed."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {"font.size": 9, "svg.fonttype": "path", "svg.hashsalt": "diagnosis"}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink)
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        paint(figure)
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            # a name in a script that the font lacks becomes boxes; it is spelt out in the tables
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    picture = buffer.getvalue().decode("utf-8")
    for faint, colour in instead.items():
        picture = picture.replace(faint, colour)
    return f"data:image/svg+xml;base64,{base64.b64encode(picture.encode('utf-8')).decode('ascii')}"


def section(title: str, content: str) -> str:
    """A card with a heading, of HTML."""
    return f"<section><h2>{html.escape(title)}</h2>{content}</section>"


def note(line: str) -> str:
    """A line of plain text in the margin's grey."""
    return f'<p class="note">{html.escape(line)}</p>'
