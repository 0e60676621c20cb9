"""What a diagnosis says, in words and tables: shared by the text, the notebook and the HTML page."""

from __future__ import annotations

import html
import math
import re
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pyro_elbo_ext.diagnosis.marginals import BAD
from pyro_elbo_ext.evidence.ledger import Interval

if TYPE_CHECKING:
    from pyro_elbo_ext.diagnosis.findings import Finding, Judgement
    from pyro_elbo_ext.evidence import EvidenceBounds

WIDTH = 100  # columns of the text
SHOWN = 10  # scalars that the short forms show
SINGLES = 3  # findings on single scalars with one remedy that they show
SEVERITY = {"do not use": 0, "not known": 1, "means only": 2, "good": 3}
MEANING = {
    "good": "means and spreads of the guide can stand in for the posterior's.",
    "means only": "the guide's means can be used, to half a posterior sd; its standard deviations and intervals cannot.",
    "do not use": "neither means nor spreads of the guide can be relied on.",
}
SIGNED = ("mean_shift", "log_sd_ratio")


def worst_first(scalars: pd.DataFrame) -> pd.DataFrame:
    """The scalars by verdict, then by the larger of ``|mean_shift|`` and ``|log_sd_ratio|``; unknown ones before known."""
    size = scalars[list(SIGNED)].abs().max(axis=1, skipna=False).fillna(np.inf)
    severity = scalars["verdict"].map(SEVERITY).fillna(len(SEVERITY))
    order = np.lexsort((-size.to_numpy(float), severity.to_numpy(float)))
    return scalars.iloc[order]


def number(value: float, error: float | None = None, signed: bool = False) -> str:
    """A figure with its standard error, with two places where these say enough."""
    if math.isnan(value):
        return "unknown"
    text = format(value, f"{'+' if signed else ''}{_places(value)}")
    return text if error is None or math.isnan(error) else f"{text} ± {format(error, _places(error))}"


def interval(limits: Interval) -> str:
    """An interval in words where an end is open."""
    lower, upper = limits
    if math.isfinite(lower):
        return str(limits) if math.isfinite(upper) else f"at least {lower:.4f}"
    if math.isfinite(upper):
        return f"at most {upper:.4f}"
    return "infinite" if lower > 0 else "unknown"


def summary(evidence: EvidenceBounds) -> list[tuple[str, str, str]]:
    """The terms of the identity: name, value in nats, what it is."""
    percent = f"{100 * evidence.level:g}% interval"
    weights = evidence.importance
    return [
        ("log p(x)", interval(evidence.log_evidence), f"{percent} of the evidence"),
        ("ELBO", f"{evidence.elbo:.4f} ± {evidence.elbo_error:.4f}", "with its standard error"),
        (
            "KL(q || posterior)",
            interval(evidence.kl_posterior),
            f"{percent} of the gap, log p(x) - ELBO: how wrong the guide is",
        ),
        (
            "KL(q || prior)",
            f"{evidence.kl_prior:.4f}",
            "a part of the ELBO, how far the guide is from the prior; not the gap",
        ),
        (
            "k-hat",
            f"{weights.khat:.2f}",
            "tail of the importance weights; says nothing where they are so nearly equal"
            if weights.even
            else f"tail of the importance weights; reliable below {weights.threshold:.2f} with {weights.num_draws} draws",
        ),
        ("effective draws", f"{weights.ess:.0f} of {weights.num_draws}", "importance weights' effective sample size"),
    ]


def displayed(scalars: pd.DataFrame) -> pd.DataFrame:
    """The scalars as text, each figure together with its standard error."""
    columns: dict[str, Any] = {}
    for column in map(str, scalars.columns):
        values = scalars[column]
        if column == "site" or (column.endswith("_se") and column.removesuffix("_se") in scalars):
            continue
        if pd.api.types.is_bool_dtype(values):
            if values.any():
                columns[column] = ["yes" if value else "" for value in values]
            continue
        if not pd.api.types.is_numeric_dtype(values):
            columns[column] = [str(value) for value in values]
            continue
        errors = scalars.get(f"{column}_se")
        columns[column] = [
            f"{value:.4g}"
            if column in ("mean", "sd")
            else number(value, None if error is None else error, column in SIGNED)
            for value, error in zip(values, [None] * len(values) if errors is None else errors, strict=True)
        ]
    return pd.DataFrame(columns, index=scalars.index.rename(None))


def ordered(diagnosis: Judgement) -> list[Finding]:
    """Findings by verdict, those on the whole or on a site before those on one scalar: these often say the same."""
    single = set(diagnosis.scalars.index)
    return sorted(
        diagnosis.findings, key=lambda each: (SEVERITY.get(each.verdict, len(SEVERITY)), each.subject in single)
    )


def few(diagnosis: Judgement) -> tuple[list[Finding], list[Finding]]:
    """The findings for the short forms, and the rest: those on further scalars that call for what was said already."""
    shown: list[Finding] = []
    rest: list[Finding] = []
    said: Counter[str] = Counter()
    for finding in ordered(diagnosis):
        remedy = re.split("[:.]", finding.remedy)[0]
        said[remedy] += finding.subject in diagnosis.scalars.index
        repeats = finding.subject in diagnosis.scalars.index and said[remedy] > SINGLES
        (rest if repeats else shown).append(finding)
    return shown, rest


def _each_remedy_once(findings: Sequence[Finding]) -> list[Finding]:
    """The findings, with the name of the first one in place of a remedy that stands there already."""
    first: dict[str, str] = {"": ""}
    found = []
    for finding in findings:
        repeats = finding.remedy in first and finding.remedy
        found.append(replace(finding, remedy=f"As for {first[finding.remedy] or 'the whole'}.") if repeats else finding)
        first.setdefault(finding.remedy, finding.subject)
    return found


def meaning(diagnosis: Judgement) -> str:
    """What a verdict says of the use of the guide, and how far off it is where it is not to be used."""
    known = diagnosis.scalars[diagnosis.scalars["verdict"] == "do not use"] if len(diagnosis.scalars) else None
    if diagnosis.verdict != "do not use" or known is None or known.empty:
        return MEANING[diagnosis.verdict]
    shift, ratios = float(known["mean_shift"].abs().max()), known["log_sd_ratio"]
    ratio = float(ratios.loc[ratios.abs().idxmax()]) if ratios.notna().any() else math.nan
    if math.isnan(shift) or math.isnan(ratio):
        return MEANING[diagnosis.verdict]
    return (
        f"in the worst scalars the guide's spread is up to {times(ratio)} times too {'small' if ratio < 0 else 'large'}, "
        f"and its mean up to {number(shift)} posterior sds off; from {math.exp(BAD):.2f} times or {BAD} sds on it is not "
        "for use."
    )


def times(log_ratio: float) -> str:
    """The factor that two numbers differ by."""
    factor = math.exp(min(abs(log_ratio), 700.0))
    return f"{factor:.2f}" if factor < 100 else f"{factor:.1e}"


def counted(scalars: pd.DataFrame) -> str:
    """How many scalars have which verdict."""
    counts = scalars["verdict"].value_counts()
    ordered = sorted(counts.items(), key=lambda item: SEVERITY.get(str(item[0]), len(SEVERITY)))
    return ", ".join(f"{count} {verdict}" for verdict, count in ordered)


def text(diagnosis: Judgement) -> str:
    """The whole in plain text: verdict, reasons with remedies, worst scalars, the ledger's intervals."""
    lines = [f"Verdict: {diagnosis.verdict.upper()}", *_wrapped(f"That is, {meaning(diagnosis)}"), ""]
    shown, rest = few(diagnosis)
    if shown:
        lines.append("Reasons, worst first")
        for finding in _each_remedy_once(shown):
            lines += _finding(finding)
        lines += [f"... and {len(rest)} more on single scalars, in .findings", ""] if rest else [""]
    scalars = worst_first(diagnosis.scalars)
    if len(scalars):
        lines.append(f"Scalars: {counted(scalars)}" + (f"; the worst {SHOWN}:" if len(scalars) > SHOWN else ""))
        lines += displayed(scalars.iloc[:SHOWN]).to_string(max_colwidth=None).splitlines()
        lines += [*_wrapped(f"{LEGEND} Estimated by: {diagnosis.method}."), ""]
    lines.append("Evidence: log p(x) = ELBO + KL(q || posterior), in nats")
    lines += [f"  {name:<19} {value:<26} {what}" for name, value, what in summary(diagnosis.evidence)]
    for note in diagnosis.evidence.notes:
        lines += _wrapped(f"- {note}", "  ")
    return "\n".join(lines)


LEGEND = (
    "mean_shift: the posterior's mean less the guide's, in posterior sds; log_sd_ratio: log of the guide's sd "
    "over the posterior's; each ± standard error."
)


def fragment(diagnosis: Judgement) -> str:
    """The short form as HTML, for notebooks."""
    scalars = worst_first(diagnosis.scalars)
    cut = f", the worst {SHOWN} below" if len(scalars) > SHOWN else ""
    parts = [
        f"<p><strong>Verdict: {html.escape(diagnosis.verdict)}</strong> – {html.escape(meaning(diagnosis))}</p>",
        findings(diagnosis),
        f"<p>Scalars: {html.escape(counted(scalars))}{cut}</p>" if len(scalars) else "",
        table(displayed(scalars.iloc[:SHOWN])) if len(scalars) else "",
        f"<p>{html.escape(LEGEND)} Estimated by: {html.escape(diagnosis.method)}.</p>",
        summary_table(diagnosis.evidence),
        *(f"<p>{html.escape(note)}</p>" for note in diagnosis.evidence.notes),
    ]
    return "".join(parts)


def findings(diagnosis: Judgement) -> str:
    """Findings as lists, those that repeat what was said folded away."""
    shown, rest = few(diagnosis)
    folded = f"<details><summary>{len(rest)} more on single scalars</summary>{_items(rest)}</details>" if rest else ""
    return _items(shown) + folded


def _items(findings: Sequence[Finding]) -> str:
    items = []
    for finding in _each_remedy_once(findings):
        subject = f"<code>{html.escape(finding.subject)}</code>: " if finding.subject else ""
        remedy = f'<p class="remedy"><b>What to do:</b> {html.escape(finding.remedy)}</p>' if finding.remedy else ""
        items.append(
            f"<li>{badge(_weight(finding))} {subject}<span>{html.escape(finding.statement)}</span>{remedy}</li>"
        )
    return f'<ol class="findings">{"".join(items)}</ol>' if items else ""


def badge(verdict: str) -> str:
    """A verdict with a class for its colour."""
    name = verdict.replace(" ", "-") if verdict in SEVERITY else "other"
    return f'<strong class="badge {name}">{html.escape(verdict)}</strong>'


def summary_table(evidence: EvidenceBounds) -> str:
    """`summary` as a table."""
    rows = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(value)}</td>'
        f'<td class="what">{html.escape(what)}</td></tr>'
        for name, value, what in summary(evidence)
    )
    return f'<div class="scroll"><table class="summary"><tbody>{rows}</tbody></table></div>'


def table(frame: pd.DataFrame, label: str = "") -> str:
    """A frame of texts as a table, nothing shortened, all text escaped."""
    head = "".join(f'<th scope="col">{html.escape(str(name))}</th>' for name in (label, *frame.columns))
    rows = []
    for name, row in zip(frame.index, frame.itertuples(index=False), strict=True):
        cells = "".join(_cell(str(column), str(value)) for column, value in zip(frame.columns, row, strict=True))
        rows.append(f'<tr><th scope="row">{html.escape(str(name))}</th>{cells}</tr>')
    body = "".join(rows)
    return f'<div class="scroll long" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _places(value: float) -> str:
    return ".2f" if abs(value) < 1000 else ".3g"


def _cell(column: str, value: str) -> str:
    if column == "verdict":
        return f"<td>{badge(value)}</td>"
    return f'<td class="text">{html.escape(value)}</td>' if column == "note" else f"<td>{html.escape(value)}</td>"


def _weight(finding: Finding) -> str:
    """What a finding means for the fit: one that leaves it good by itself is worth knowing, no praise."""
    return "note" if finding.verdict == "good" else finding.verdict


def _finding(finding: Finding) -> list[str]:
    subject = f"{finding.subject}: " if finding.subject else ""
    lines = _wrapped(f"[{_weight(finding)}] {subject}{finding.statement}", "  ", "    ")
    return lines + (_wrapped(f"-> {finding.remedy}", "    ", "       ") if finding.remedy else [])


def _wrapped(line: str, first: str = "", later: str | None = None) -> list[str]:
    indent = first + "  " if later is None and first else later or ""
    return textwrap.wrap(
        line, WIDTH, initial_indent=first, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
