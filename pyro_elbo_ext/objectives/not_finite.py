"""The error for a loss, a term or a gradient that is NaN or infinite, and why it is, as far as the traces tell."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pyro.poutine import Trace

from pyro_elbo_ext.history.history import SiteInfo
from pyro_elbo_ext.programs.faults import cause


class NotFinite(ValueError):
    """A loss, or a term of it, is NaN or infinite: training may go on from an earlier state with smaller steps."""


def why(traces: Sequence[tuple[Trace, Trace]], *, of_gradient: bool = False) -> str:
    """A line that says why terms of these runs, or their gradients, are not finite; empty where it is not known."""
    found = (cause(*pair, of_gradient=of_gradient) for pair in traces)
    return next((f"{reason}\n" for reason in found if reason is not None), "")


def check_terms(
    sites: Sequence[SiteInfo],
    values: Sequence[Sequence[float]],
    step: int,
    traces: Sequence[tuple[Trace, Trace]] = (),
) -> None:
    """Raise NotFinite for the first site with a term that is not finite.

    Parameters
    ----------
    sites, values
        The sites, and for each the numbers that the history takes.
    traces
        Model's and guide's, of each run; they are asked for the cause.
    """
    reason = why(traces)
    for site, (log_p, log_q, kl, *_) in zip(sites, values, strict=True):
        if math.isfinite(log_p if site.kind == "observed" else kl):
            continue
        terms = {"log_p": log_p, "log_q": log_q, "kl_prior": kl}
        absent = {"observed": {"log_q", "kl_prior"}, "auxiliary": {"log_p"}}.get(site.kind, set())
        listed = ", ".join(
            f"{term} = {value}" for term, value in terms.items() if term not in absent and not math.isfinite(value)
        )
        if not reason and kl == math.inf and site.kl_method == "analytic":
            raise NotFinite(
                f"the KL of the guide to the prior is infinite at site '{site.site}', or too large for its dtype, at step "
                f"{step}: the guide has mass where the prior has next to none, as a Gamma of concentration 1 or less has "
                "at 0, beside an InverseGamma. No parameter has been changed. Give the guide's site a family with the "
                "prior's tails, such as LogNormal, or other starting values; kl='sampled' would only hide it."
            )
        raise NotFinite(
            reason + f"site '{site.site}' ({site.kind}) has {listed} at step {step}. No parameter has been changed. "
            "Check the data and parameters that reach this site, and that its value lies in the support of its "
            "distribution; if training has diverged, lower the learning rate."
        )
