"""The demo's report: one HTML file with all tables and pictures, that opens without a server or a network."""

from __future__ import annotations

import html
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyro_elbo_ext.comparison import Comparison
from pyro_elbo_ext.demo.speed import Speed
from pyro_elbo_ext.diagnosis import Diagnosis
from pyro_elbo_ext.diagnosis.page import PAGE, STYLE, card, note, section
from pyro_elbo_ext.diagnosis.report import fragment, number, table
from pyro_elbo_ext.history import History

ROWS = 25  # of the table of steps
POINTS = 600  # of each scatter
OWN_STYLE = """
pre { font: 0.85rem/1.45 ui-monospace, Menlo, Consolas, monospace; overflow-x: auto; margin: 0; overflow-wrap: normal; }
h2.promise { font-size: 1.3rem; margin: 1.6rem 0 0.8rem; }
section.wide figure img { max-width: 52rem; }
.numbers td:last-child, .numbers thead th:last-child { text-align: right; }
"""


def write_report(
    path: Path,
    said: Sequence[str],
    history: History,
    diagnosis: Diagnosis,
    comparisons: Mapping[str, Comparison],
    draws: Mapping[str, Mapping[str, NDArray[Any]]],
    speed: Speed,
    schools: Sequence[str],
    version: str,
) -> None:
    """Write the page.

    Parameters
    ----------
    path
        File to write; one that is there is replaced.
    said
        Lines of the terminal.
    history, diagnosis
        Of the mean-field fit.
    comparisons
        Name of a guide to its comparison with NUTS.
    draws
        "NUTS" and the names of the guides to draws of ``tau``, shape (S,), and ``theta``, shape (S, schools).
    speed
        Of Pyro's and of compiled steps.
    schools
        Their names.
    version
        Of the package.
    """
    plots = importlib.util.find_spec("matplotlib") is not None
    parts = [section("What the terminal said", f"<pre>{html.escape(chr(10).join(said).strip())}</pre>")]
    parts.append(_promise("1. Legible: every term of the ELBO, by site"))
    if plots:
        parts.append(_wide(card("The terms of the mean-field fit over its steps", 5.2, _history(history))))
    parts.append(section("Terms by step, in nats: means since the row before", _steps(history)))
    parts.append(section("Part of each site in the ELBO over the last steps", _summary(history)))
    parts.append(_promise("2. Trustworthy: is the fit any good?"))
    parts.append(section("The mean-field fit of the centred model, diagnosed without MCMC", fragment(diagnosis)))
    if plots:
        parts.append(_wide(card("The funnel: theta of one school against log tau", 2.4, _funnel(draws, schools))))
    for name, comparison in comparisons.items():
        legend = note("In NUTS's standard deviations: figure ± standard error (noise floor).")
        parts.append(section(f"{name} beside NUTS", legend + table(comparison.displayed(), "scalar")))
    parts.append(_promise("3. Fast: the same steps as machine code"))
    parts.append(section("A whole step of SVI with Adam: the quickest of several runs of each", _speed(speed)))
    if not plots:
        parts.append(section("Pictures", 'They need matplotlib: <code>pip install "pyro_elbo_ext[plots]"</code>'))
    title = "Eight schools: legible, trustworthy, fast"
    text = PAGE.substitute(title=title, style=STYLE + OWN_STYLE, body="\n".join(parts), version=html.escape(version))
    path.write_text(text, encoding="utf-8")


def _wide(picture: str) -> str:
    return picture.replace("<section>", '<section class="wide">', 1)


def _promise(title: str) -> str:
    return f'<h2 class="promise">{html.escape(title)}</h2>'


def _steps(history: History) -> str:
    frame = history.to_dataframe("site")
    latent = frame[frame["kind"] == "latent"]
    by_site = latent.pivot(index="step", columns="site", values="kl_prior")[list(dict.fromkeys(latent["site"]))]
    totals = history.to_dataframe("step").set_index("step")[["elbo", "reconstruction"]]
    steps = totals.join(by_site.add_prefix("kl_prior of "))
    ends = np.unique(np.geomspace(1, len(steps), ROWS).round().astype(int))
    means = steps.groupby(np.searchsorted(ends, np.arange(1, len(steps) + 1))).mean()
    starts = [1, *(ends[:-1] + 1)]
    means.index = [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]
    return f'<div class="numbers">{table(means.map(lambda value: f"{value:.3f}"), "steps")}</div>'


def _summary(history: History) -> str:
    frame = history.summary()
    shown = frame.assign(
        mean=[number(mean, se) for mean, se in zip(frame["mean"], frame["se"], strict=True)],
        share=[f"{share:.0%}" for share in frame["share"]],
        kl_method=frame["kl_method"].fillna(""),
    )
    return table(shown[["kind", "mean", "share", "kl_method"]], "site")


def _speed(speed: Speed) -> str:
    if speed.not_compiled is not None:
        return f"<p>{html.escape(speed.not_compiled)}</p>"
    seconds = {"pyro.infer.SVI.step": speed.pyro, "CompiledSVI.step": speed.step, "CompiledSVI.run": speed.run}
    rows = {"microseconds": [f"{1e6 * each:.2f}" for each in seconds.values()]}
    rows["times as fast as Pyro"] = [f"{speed.pyro / each:.0f}" for each in seconds.values()]
    compiled = note(f"Compiled in {speed.compiling:.1f} s, once; one thread, Pyro's checks of arguments off.")
    return f'<div class="numbers">{table(pd.DataFrame(rows, index=list(seconds)), "by")}</div>{compiled}'


def _history(history: History) -> Callable[[Any], Any]:
    return lambda figure: history.plot(axes=figure.subplots(3, 1, sharex=True, height_ratios=(1, 1, 1.25)))


def _funnel(draws: Mapping[str, Mapping[str, NDArray[Any]]], schools: Sequence[str]) -> Callable[[Any], Any]:
    def paint(figure: Any) -> None:
        panels = figure.subplots(1, len(draws), sharex=True, sharey=True)
        for axis, (name, values) in zip(panels, draws.items(), strict=True):
            some = np.linspace(0, len(values["tau"]) - 1, POINTS).astype(int)
            axis.scatter(values["theta"][some, 0], np.log(values["tau"][some]), s=4, alpha=0.4, linewidth=0)
            axis.set_title(name, fontsize="medium")
        panels[len(panels) // 2].set_xlabel(f"theta of school {schools[0]}, points")
        panels[0].set_ylabel("log tau")

    return paint
