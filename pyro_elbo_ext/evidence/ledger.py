"""What is known of ``log p(x)`` and of ``KL(q || posterior)``, as a table."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

import pandas as pd

from pyro_elbo_ext.evidence.importance import ImportanceSample


class Interval(NamedTuple):
    """A confidence interval, in nats; an end that is not known is infinite."""

    lower: float
    upper: float

    def __str__(self) -> str:
        return f"[{self.lower:.4f}, {self.upper:.4f}]"


@dataclass(frozen=True)
class Bound:
    """One row of the ledger.

    Attributes
    ----------
    method : str
    direction : {"lower", "upper", "estimate"}
        Which side of ``log p(x)`` its expectation lies on; an estimate lies on neither.
    k : int
        Weights in one value of the bound; the exponent of CUBO.
    num_draws : int
        Draws it is made of, of guide and posterior together.
    value, standard_error : float
        In nats.
    valid : bool
        Whether value and standard error can be relied on.
    in_interval : bool
        Whether it counts towards the intervals.
    note : str
        Why not, or what it assumes.
    """

    method: str
    direction: Literal["lower", "upper", "estimate"]
    k: int
    num_draws: int
    value: float
    standard_error: float
    valid: bool
    in_interval: bool
    note: str


@dataclass(frozen=True, repr=False)
class EvidenceBounds:
    """The ledger of ``log p(x) = ELBO + KL(q || posterior)``; made by :func:`~pyro_elbo_ext.evidence_bounds`.

    Attributes
    ----------
    log_evidence : Interval
        (lower, upper) for ``log p(x)``, in nats; upper is inf where no valid bound from above is known.
    kl_posterior : Interval
        (lower, upper) for ``KL(q || posterior)``, the gap between the ELBO and ``log p(x)``, in nats; at least 0.
    kl_prior : float
        ``KL(q || prior)``, in nats, a part of the ELBO: analytic where `DecomposedELBO` knows it, else sampled.
    elbo, elbo_error : float
        The ELBO and its standard error, in nats.
    level : float
        Confidence level of the intervals.
    bounds : tuple of Bound
        The ledger.
    importance : ImportanceSample
        The guide's draws and weights, with k-hat.
    reason : str
        Why there was no annealed importance sampling where it was due; else empty.
    """

    log_evidence: Interval
    kl_posterior: Interval
    kl_prior: float
    elbo: float
    elbo_error: float
    level: float
    bounds: tuple[Bound, ...]
    importance: ImportanceSample
    reason: str = ""

    @property
    def consistent(self) -> bool:
        """Whether the lower limit of ``log p(x)`` is below the upper one."""
        return self.log_evidence.lower <= self.log_evidence.upper

    @property
    def notes(self) -> list[str]:
        """What is to be known about the intervals beside their ends."""
        khat, threshold, count = self.importance.khat, self.importance.threshold, self.importance.num_draws
        notes = []
        if not self.consistent:
            notes.append(
                "The limits contradict each other: the posterior draws are not of this model and these data, their chains "
                "have not converged, or neither they nor the guide reach all of the posterior."
            )
        if math.isinf(self.log_evidence.upper):
            notes.append(
                "No upper bound: without posterior draws it needs weights with a variance (k-hat below 0.5, here "
                f"{khat:.2f}). Pass draws of run_nuts(...)."
                if not any(bound.method == "EUBO" for bound in self.bounds)
                else "No upper bound: the guide has no density at some of the posterior draws."
            )
        if not self.importance.reliable:
            notes.append(
                f"k-hat {khat:.2f} is not below {threshold:.2f}, the threshold for {count} draws: the guide is no good "
                "importance sampler of the posterior, and bounds made of its draws alone are loose."
            )
        if self.importance.num_zero:
            notes.append(
                f"{self.importance.num_zero} of {count} draws of the guide are outside the model's support: the ELBO is "
                "-inf and KL(q || posterior) infinite."
            )
        annealed = any(bound.method == "AIS" for bound in self.bounds)
        if not annealed and any(bound.method == "bridge sampling" and not bound.valid for bound in self.bounds):
            notes.append(
                "Guide and posterior draws are too far apart for a bridge: fallback='ais' anneals between them."
            )
        if self.reason:
            notes.append(self.reason)
        return notes

    def to_dataframe(self) -> pd.DataFrame:
        """One row per bound, columns as the attributes of `Bound`."""
        return pd.DataFrame([asdict(bound) for bound in self.bounds])

    def _summary(self) -> list[tuple[str, str, str]]:
        percent = f"{100 * self.level:g}%"
        return [
            ("log p(x)", str(self.log_evidence), f"{percent} interval"),
            ("ELBO", f"{self.elbo:.4f} ± {self.elbo_error:.4f}", "standard error"),
            ("KL(q || posterior)", str(self.kl_posterior), f"{percent} interval of the gap, log p(x) - ELBO"),
            ("KL(q || prior)", f"{self.kl_prior:.4f}", "a part of the ELBO, not the gap"),
            (
                "k-hat",
                f"{self.importance.khat:.2f}",
                f"threshold {self.importance.threshold:.2f}"
                + ("; says nothing of weights so nearly equal" if self.importance.even else ""),
            ),
        ]

    def __repr__(self) -> str:
        head = [f"{name:<20}{value:<28}{what}" for name, value, what in self._summary()]
        table = self.to_dataframe().to_string(index=False, float_format="{:.4f}".format)
        return "\n".join([*head, "", table, *self.notes])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th>{name}</th><td>{value}</td><td>{what}</td></tr>" for name, value, what in self._summary()
        )
        table = self.to_dataframe().to_html(index=False, float_format="{:.4f}".format)
        return f"<table>{rows}</table>{table}" + "".join(f"<p>{note}</p>" for note in self.notes)
