"""What `diagnose` found: a verdict, its reasons, and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyro_elbo_ext.diagnosis.findings import Judgement

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

    from pyro_elbo_ext.history import History


@dataclass(frozen=True, repr=False, eq=False)
class Diagnosis(Judgement):
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
        each with its standard error (``mean_shift_se``, ``log_sd_ratio_se``), ``khat``, ``verdict``; this is "not known"
        where the chains behind the figures disagree.
    evidence : EvidenceBounds
        Bounds on log p(x) and KL(q || posterior), KL(q || prior), the importance weights.
    mcmc : Comparison or None
        The comparison with MCMC draws, where there are any.
    method : str
        What the scalars' figures rest on: "mcmc", "importance weights", "annealed importance sampling" ...
    history : History or None
        The fit's record, where there is one.
    modes : Modes or None
        What the search for other modes has found: ``modes.modes``, each with ``weight``, ``weight_se`` and the ``share`` of
        the guide's draws about it; None where it was not looked for.
    """

    def to_dataframe(self) -> pd.DataFrame:
        """A copy of ``scalars``; the verdict on the whole is ``attrs["verdict"]``."""
        table = self.scalars.copy()
        table.attrs["verdict"] = self.verdict
        return table

    def to_html(
        self,
        path: str | Path,
        *,
        history: History | ArrayLike | None = None,
        title: str = "Did the fit work?",
    ) -> Path:
        """Write the whole as one HTML file: no scripts, nothing loaded, light or dark as the reader's system is.

        Parameters
        ----------
        path
            File to write, in a folder that exists; one that is there is replaced.
        history
            In place of the record that `diagnose` was given: another one, or the ELBO of each step, shape (n,), in nats,
            which ``SVI.step`` returns the negative of.
        title
            Heading of the page.

        Returns
        -------
        Path
            The file.

        Raises
        ------
        ValueError
            For a history without steps.
        OSError
            If the file cannot be written.

        Notes
        -----
        Without matplotlib the page has no pictures, and says so.
        """
        from pyro_elbo_ext.diagnosis.page import write_page

        return write_page(self, path, history=history, title=title)

    def plot(self, *, history: History | ArrayLike | None = None) -> Figure:
        """Mean shift and log sd ratio of the scalars, bounds on ``log p(x)``, importance weights, the fit's ELBO.

        Parameters
        ----------
        history
            As in `to_html`.

        Returns
        -------
        matplotlib.figure.Figure

        Raises
        ------
        ValueError
            For a history without steps.
        ImportError
            Without matplotlib.
        """
        from pyro_elbo_ext.diagnosis.plots import plot_diagnosis

        return plot_diagnosis(self, history)

    def __repr__(self) -> str:
        from pyro_elbo_ext.diagnosis.report import text

        return text(self)

    def _repr_html_(self) -> str:
        from pyro_elbo_ext.diagnosis.report import fragment

        return fragment(self)
