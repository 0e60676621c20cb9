"""What `diagnose` found: a verdict, its reasons, and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pandas as pd

from pyro_elbo_ext.comparison import Comparison
from pyro_elbo_ext.evidence import EvidenceBounds

Verdict = Literal["good", "means only", "do not use"]
VERDICTS: tuple[Verdict, ...] = ("good", "means only", "do not use")


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


@dataclass(frozen=True)
class Diagnosis:
    """How far a guide is from the posterior, and what to do about it.

    Attributes
    ----------
    verdict : str
        "good"; "means only": the means can be used, the spread cannot; or "do not use".
    findings : tuple of Finding
        The reasons, worst first.
    scalars : DataFrame
        One row per scalar of the latent sites, by name: ``mean``, ``sd`` (the guide's), ``mean_shift`` (estimated
        difference of the posterior's mean, in posterior sds), ``log_sd_ratio`` (log of the guide's sd over the posterior's),
        each with its standard error (``mean_shift_se``, ``log_sd_ratio_se``), ``khat``, ``verdict``.
    evidence : EvidenceBounds
        Bounds on log p(x) and KL(q || posterior), KL(q || prior), the importance weights.
    mcmc : Comparison or None
        The comparison with MCMC draws, where there are any.
    method : str
        What the scalars' figures rest on: "mcmc", "importance weights", "annealed importance sampling" ...
    """

    verdict: Verdict
    findings: tuple[Finding, ...]
    scalars: pd.DataFrame
    evidence: EvidenceBounds
    mcmc: Comparison | None
    method: str
