"""What the demo says in the terminal: the lines that matter, at most 80 columns wide. The tables are in the report."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from pyro_elbo_ext.comparison import Comparison
from pyro_elbo_ext.demo.speed import Speed
from pyro_elbo_ext.diagnosis import Diagnosis
from pyro_elbo_ext.diagnosis.report import few
from pyro_elbo_ext.history import History
from pyro_elbo_ext.training.automatic_fit import AutomaticFit

WIDTH = 80
NEAR = 0.2  # of a sd: what two fits may differ by and still be said to agree


class Lines:
    """Says each line as it comes and keeps it for the report.

    Parameters
    ----------
    echo
        Takes each line.
    """

    def __init__(self, echo: Callable[[str], None]) -> None:
        self._echo = echo
        self.lines: list[str] = []

    def _say(self, line: str = "") -> None:
        self.lines.append(line)
        self._echo(line)

    def _wrap(self, text: str, first: str = "", later: str | None = None) -> None:
        later = first if later is None else later
        for line in textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=later, break_on_hyphens=False):
            self._say(line)

    def _head(self, number: int, promise: str, what: str) -> None:
        self._say()
        self._say(f"{number}. {promise}: {what}")

    def opening(self, title: str, num_schools: int, evidence: float) -> None:
        self._say(title)
        self._say(f"{num_schools} schools; log p(y) = {evidence:.3f} nats by quadrature")
        self._head(1, "LEGIBLE", "every term of the ELBO, by site")
        self._say("   SVI(model, guide, optim, DecomposedELBO())    # was: Trace_ELBO()")
        self._say("   centred model, theta ~ Normal(mu, tau); mean-field guide, AutoNormal(model)")

    # 1

    def steps(self, history: History, done: int) -> None:
        """Means over the steps since the last row, in nats."""
        table = history.to_dataframe()
        latent = table[table["kind"] != "observed"]
        if not done:
            sites = "".join(f" {site:>7}" for site in dict.fromkeys(latent["site"]))
            self._say(f"   {'steps':>10} {'ELBO':>8} = {'reconstruction':>14} - kl_prior of{sites}")
        table, latent = table[table["step"] >= done], latent[latent["step"] >= done]
        last = int(table["step"].max()) + 1
        totals = table.groupby("step")[["reconstruction", "kl_prior"]].sum().mean()
        by_site = latent.groupby("site", sort=False)["kl_prior"].mean()
        steps = f"{done + 1}-{last}" if last > done + 1 else str(last)
        elbo = totals["reconstruction"] - totals["kl_prior"]
        kl_prior = "".join(f" {value:7.3f}" for value in by_site)
        self._say(f"   {steps:>10} {elbo:8.3f} = {totals['reconstruction']:14.3f} - {'':11}{kl_prior}")

    def terms(self, history: History) -> None:
        table = history.to_dataframe()
        methods = table[table["kind"] == "latent"].groupby("kl_method", sort=False)["site"].unique()
        how = "; ".join(f"{method} at {' and '.join(sites)}" for method, sites in methods.items())
        self._wrap(f"kl_prior is KL(q || prior), {how}.", "   ")

    # 2

    def verdict(self, diagnosis: Diagnosis) -> None:
        self._head(2, "TRUSTWORTHY", "is that fit any good?")
        self._say(f"   diagnose(model, guide, sigma, y), without MCMC: {diagnosis.verdict.upper()}")
        shown, rest = few(diagnosis)
        for finding in shown[:2]:
            self._wrap(f"{finding.subject}: {finding.statement}", "   - ", "     ")
        if shown:
            self._wrap(f"-> {shown[0].remedy}", "   ", "      ")
        weights = diagnosis.evidence.importance
        self._wrap(
            f"KL(q || posterior) is at least {diagnosis.evidence.kl_posterior.lower:.2f} nats, k-hat {weights.khat:.2f}; "
            f"{len(shown) + len(rest)} findings are in the report.",
            "   - ",
            "     ",
        )

    def fitted(self, automatic: AutomaticFit) -> None:
        self._say()
        self._say('   fit(model, "auto", sigma, y) of the non-centred model, theta = mu + tau * z:')
        approximation = automatic.approximation
        self._say(
            f"   {approximation.family} guide, {approximation.gradients:,} gradients in {automatic.seconds:.1f} s, "
            f"ELBO {automatic.elbo:.2f}"
        )

    def sampled(self, chains: int, draws: int, seconds: float, library: str, divergences: int) -> None:
        self._say(
            f"   run_nuts(model, sigma, y): {chains} x {draws:,} draws, {seconds:.0f} s by {library}, "
            f"{divergences} divergences"
        )

    def compared(self, comparisons: Mapping[str, Comparison], gaps: Mapping[str, float]) -> None:
        """Means and sds of three scalars, the worst of all, and the gap, for each guide beside NUTS."""
        self._say()
        self._say("   " + f"{'mean (sd)':22}" + "".join(f"{name:>16}" for name in ("NUTS", *comparisons)))
        first = next(iter(comparisons.values()))
        for name in ("mu", "tau", next(name for name in first.mcmc if name.startswith("theta"))):
            sides = [first.mcmc[name], *(each.approx[name] for each in comparisons.values())]
            cells = "".join(f"{f'{side.mean():.2f} ({side.std(ddof=1):.2f})':>16}" for side in sides)
            self._say(f"   {name:22}{cells}")
        tables = [each.table for each in comparisons.values()]
        rows = (
            ("worst mean, in sds", [_worst(table["mean_diff"], "+.2f") for table in tables]),
            ("worst sd, of NUTS's", [_worst(table["log_sd_ratio"], "", "x") for table in tables]),
            ("log p(y) - ELBO, nats", [f"{gaps[name]:.2f}" for name in comparisons]),
        )
        for label, figures in rows:
            self._say(f"   {label:38}" + "".join(f"{figure:>16}" for figure in figures))
        for name, table in zip(comparisons, tables, strict=True):
            self._wrap(f"{name} {agreement(table)}.", "   ")

    # 3

    def timed(self, speed: Speed) -> None:
        self._head(3, "FAST", "the same steps, one thread, all timed just now")
        self._say("   CompiledSVI(model, guide, optim, loss)    # was: SVI(...)")
        rows = (("pyro.infer.SVI.step", speed.pyro), ("CompiledSVI.step", speed.step), ("CompiledSVI.run", speed.run))
        for label, seconds in rows[: 1 if speed.not_compiled else None]:
            self._say(f"   {label:22}{1e6 * seconds:10.1f} microseconds a step{speed.pyro / seconds:8.0f} x")
        if speed.not_compiled:
            self._wrap(f"Not compiled here: {speed.not_compiled}", "   ", "     ")
            return
        apart = f"differ by {speed.largest_difference:.1g} nats at most" if speed.largest_difference else "are equal"
        self._wrap(
            f"Compiled in {speed.compiling:.1f} s. With the same random numbers the first losses by Pyro and by the graph "
            f"that is compiled {apart}.",
            "   ",
        )

    # the end

    def closing(self, files: Sequence[Path], seconds: float) -> None:
        self._say()
        self._say(f"{seconds:.0f} s. Written to {files[0].parent}:")
        about = {
            "report.html": "all of it, with tables and pictures, for a browser",
            "mean_field_history.nc": "the terms at every step: History.load(...)",
            "automatic.nc": 'the fit of "auto" for ArviZ',
            "nuts.nc": "the draws of NUTS for ArviZ",
        }
        for path in files:
            self._say(f"  {path.name:22} {about[path.name]}")
        self._say("Read next: README.md, docs/, then tutorials/01_decomposed_elbo.ipynb")


def agreement(table: pd.DataFrame) -> str:
    """Whether the guide agrees with NUTS, in words, from the figures of all scalars."""
    off = table[["mean_diff", "log_sd_ratio"]].abs().max(axis=1)
    count = int((off > NEAR).sum())
    if count:
        return f"does not agree with NUTS: {count} of {len(table)} scalars are over {NEAR} sds off"
    return f"agrees with NUTS: all {len(table)} means and log sds are within {NEAR}"


def _worst(figures: pd.Series, form: str, unit: str = "") -> str:
    name = figures.abs().idxmax()
    value = figures[name]
    return f"{np.exp(value):.2f}{unit} {name}" if unit else f"{value:{form}} {name}"
