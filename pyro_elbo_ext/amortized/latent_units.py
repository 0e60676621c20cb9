"""Which units of a local latent carry information about the data, and whether the posterior has collapsed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal, Normal

from pyro_elbo_ext.amortized.local_sites import (
    as_batches,
    check_cover,
    check_finite,
    distribution,
    run_local,
)
from pyro_elbo_ext.inference_data.draws import to_numpy
from pyro_elbo_ext.programs.arguments import check_count, check_number, check_seed
from pyro_elbo_ext.programs.randomness import untouched
from pyro_elbo_ext.terms import closed_forms
from pyro_elbo_ext.terms.closed_forms import Weight
from pyro_elbo_ext.terms.terms import Site

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AT_PRIOR = 0.01  # nats per datum: a unit's kl_prior below it is about 0
REMEDIES = (
    "warm up the weight of kl_prior in training, DecomposedELBO(kl_weight=LinearWarmup(2000)) (Bowman et al. 2016)",
    "free bits: do not penalize the first part of a nat of kl_prior per site, DecomposedELBO(free_bits=0.5) (Kingma et "
    "al. 2016)",
    "a weaker decoder: one that models the data well without z leaves nothing for z to do (Chen et al. 2017)",
    "no remedy, if the data need no more units: with too many, the best ELBO leaves some inactive (Lucas et al. 2019)",
)
_UNWEIGHTED = Weight(1.0, None)


@dataclass(frozen=True, repr=False)
class ActiveUnits:
    """Information per latent unit; made by `active_units`.

    Attributes
    ----------
    table : pandas.DataFrame
        One row per ``site`` and ``unit``: ``variance_of_mean``, the variance over data of ``E_q[z | x_n]`` in the unit's own
        units squared; ``kl_prior``, the mean over data of ``KL(q(z | x_n) || p(z))`` of the unit in nats, NaN where no
        closed form is known; ``active``; and ``at_prior``, whether ``kl_prior`` is about 0.
    threshold : float
        A unit is active above this ``variance_of_mean``.
    num_data : int
    plate : str
    """

    table: pd.DataFrame
    threshold: float
    num_data: int
    plate: str

    @property
    def num_active(self) -> int:
        return int(self.table["active"].sum())

    @property
    def share_inactive(self) -> float:
        return 1 - self.num_active / len(self.table)

    @property
    def posterior_collapse(self) -> Literal["none", "partial", "full"]:
        """ "full" where no unit is active, "partial" where some are not."""
        if self.num_active == 0:
            return "full"
        return "none" if self.num_active == len(self.table) else "partial"

    @property
    def remedies(self) -> tuple[str, ...]:
        """What to try; empty where all units are active."""
        return () if self.posterior_collapse == "none" else REMEDIES

    @property
    def verdict(self) -> str:
        """One or two sentences; `remedies` has what to do."""
        units = len(self.table)
        if self.posterior_collapse == "none":
            return f"All {units} units are active."
        if self.posterior_collapse == "full":
            text = f"Posterior collapse: none of the {units} units is active; the codes say nothing about the data."
        else:
            text = f"{units - self.num_active} of {units} units are inactive ({self.share_inactive:.0%})."
        away = int((~self.table["active"] & ~self.table["at_prior"] & self.table["kl_prior"].notna()).sum())
        if away:
            text += (
                f" {away} of the inactive are the same for all data but not at the prior: they cost kl_prior and carry "
                "nothing, which more training or a learned prior would mend."
            )
        return text

    def to_dataframe(self) -> pd.DataFrame:
        """A copy of the table."""
        return self.table.copy()

    def plot(self, ax: Axes | None = None) -> Axes:
        """Variance of the mean per unit, largest first, with the threshold; returns the axes."""
        from pyro_elbo_ext.amortized.plots import plot_active_units

        return plot_active_units(self.table, self.threshold, ax)

    def _head(self) -> str:
        return f"{self.num_active} of {len(self.table)} units active over plate '{self.plate}': {self.num_data} data"

    def __repr__(self) -> str:
        table = self.table.to_string(index=False, float_format="{:.4f}".format)
        lines = [self._head(), table, self.verdict, *[f"- {remedy}" for remedy in self.remedies]]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        items = "".join(f"<li>{remedy}</li>" for remedy in self.remedies)
        table = self.table.to_html(index=False, float_format="{:.4f}".format)
        return f"<p>{self._head()}</p>{table}<p>{self.verdict}</p>" + (f"<ul>{items}</ul>" if items else "")


def active_units(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    site: str | Sequence[str] | None = None,
    plate: str | None = None,
    threshold: float = 0.01,
    batches: Iterable[Any] | None = None,
    num_draws: int = 200,
    seed: int = 0,
    **kwargs: Any,
) -> ActiveUnits:
    r"""Variance over data of the posterior mean, per latent unit: is the unit used?

    A unit ``u`` is active if :math:`\mathrm{Var}_n(\mathrm E_{q(z|x_n)}[z_u])` is above ``threshold`` (Burda et al. 2016,
    who take 0.01, for priors of sd 1). A unit is an element of a local site's value apart from the data plate's dim.

    Parameters
    ----------
    model, guide
        Pyro programs; called with ``*args, **kwargs``.
    site, plate
        Local latent sites and their data plate, as for `elbo_surgery`.
    threshold
        In the units of z, squared.
    batches
        As for `elbo_surgery`.
    num_draws
        Draws per datum for a mean that the distribution does not know; the variance is corrected for them. At least 2.
    seed
        Of the random numbers; the generators, and the param store, are left as they were.

    Returns
    -------
    ActiveUnits

    Raises
    ------
    KeyError, ValueError
        As `elbo_surgery`; or if there are fewer than two data, or ``threshold`` is negative.

    References
    ----------
    Burda, Grosse and Salakhutdinov (2016), "Importance weighted autoencoders".
    """
    check_seed(seed)
    check_count("num_draws", num_draws, 2)
    check_number("threshold", threshold)
    if not (math.isfinite(threshold) and threshold >= 0):
        raise ValueError(f"threshold must be a finite number, at least 0, not {threshold!r}")
    with untouched(seed):
        runs = [run_local(model, guide, part, kwargs, site, plate) for part in as_batches(args, batches)]
        check_cover(runs, batches is not None)
        size = sum(run.plate.size for run in runs)
        if size < 2:
            raise ValueError("active units need at least 2 data: the figure is a variance over them")
        rows: list[dict[str, Any]] = []
        for index, one in enumerate(runs[0].local):
            means, excess, kls = [], [], []
            for run in runs:
                of, dim = run.local[index], run.plate.dim
                assert dim is not None
                mean, error = _mean(distribution(of), num_draws)
                axis = dim - len(distribution(of).event_shape)
                means.append(mean.movedim(axis, 0))
                excess.append(error.movedim(axis, 0))
                kl = _unit_kl_prior(of)
                kls.append((torch.full_like(mean, math.nan) if kl is None else kl).movedim(axis, 0))
            mean, error, kl = (torch.cat(values).double() for values in (means, excess, kls))
            check_finite(mean, f"E_q[z | x] of site '{one.name}'")
            variance = to_numpy((mean.var(0) - error.mean(0)).clamp(min=0.0))
            average = to_numpy(kl.mean(0))
            rows.extend(
                {"site": one.name, "unit": _label(at), "variance_of_mean": variance[at], "kl_prior": average[at]}
                for at in np.ndindex(variance.shape)
            )
    table = pd.DataFrame(rows)
    table["active"] = table["variance_of_mean"] > threshold
    table["at_prior"] = table["kl_prior"] < AT_PRIOR
    return ActiveUnits(table, float(threshold), size, runs[0].plate.name)


def _label(index: tuple[int, ...]) -> int | tuple[int, ...]:
    if not index:
        return 0
    return index[0] if len(index) == 1 else index


def _mean(fn: Distribution, num_draws: int) -> tuple[Tensor, Tensor]:
    """Mean, shape ``batch_shape + event_shape``, and the variance of the error that it has if it is sampled."""
    try:
        mean = fn.mean
    except NotImplementedError:
        draws = fn.sample(torch.Size([num_draws]))
        return draws.mean(0), draws.var(0) / num_draws
    return mean, torch.zeros_like(mean)


def _unit_kl_prior(site: Site) -> Tensor | None:
    """``KL(q || prior)`` per element of the value, between marginals where elements are correlated; None if unknown."""
    p: Any = site.p
    q, prior = distribution(site), p["fn"]
    shape = q.batch_shape + q.event_shape
    by_q, by_p = (_marginal(closed_forms.bare(fn).leaf) for fn in (q, prior))
    if by_q is None or by_p is None:
        return None
    try:
        return closed_forms.kl_prior(by_q.expand(shape), by_p.expand(shape), _UNWEIGHTED, _UNWEIGHTED)[0]
    except NotImplementedError:
        return None


def _marginal(leaf: Distribution) -> Distribution | None:
    if isinstance(leaf, MultivariateNormal):
        return Normal(leaf.mean, leaf.stddev, validate_args=False)
    return None if leaf.event_shape else leaf
