"""What `diagnose` found, as it is told in text, tables and pictures: a verdict, its reasons, and the figures behind them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import pandas as pd

    from pyro_elbo_ext.automatic.modes import Modes
    from pyro_elbo_ext.comparison import Comparison
    from pyro_elbo_ext.evidence import EvidenceBounds
    from pyro_elbo_ext.history import History

Verdict = Literal["good", "means only", "do not use"]
VERDICTS: tuple[Verdict, ...] = ("good", "means only", "do not use")
NOT_KNOWN = "not known"  # of a scalar, where the draws of the posterior are not to be relied on


def worst_of(verdicts: Iterable[str]) -> Verdict:
    """The worst of the verdicts that are known; "good" if none is."""
    return max((v for v in VERDICTS if v in set(verdicts)), key=VERDICTS.index, default="good")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes
    ----------
    subject : str
        A site or one of its entries, ``theta[3]``, or "" for the fit as a whole.
    verdict : str
        What this finding alone allows: "good", "means only" or "do not use".
    statement : str
        What is the case, with its figures, in a sentence.
    remedy : str
        What to do about it; "" where there is nothing to do.
    """

    subject: str
    verdict: Verdict
    statement: str
    remedy: str = ""


@dataclass(frozen=True, repr=False, eq=False)
class Judgement:
    """A verdict, its reasons and its figures, without the ways to show them; the attributes are told at `Diagnosis`."""

    verdict: Verdict
    findings: tuple[Finding, ...]
    scalars: pd.DataFrame
    evidence: EvidenceBounds
    mcmc: Comparison | None
    method: str
    history: History | None = None
    modes: Modes | None = None
