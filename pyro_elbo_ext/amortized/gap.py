"""The amortization gap: what a per-datum optimum of the same family gains over the encoder's (Cremer et al. 2018)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyro
import torch
from torch import Tensor

from pyro_elbo_ext.amortized.free_distribution import FreeDistribution
from pyro_elbo_ext.amortized.local_sites import (
    LocalRun,
    check_all_data,
    check_finite,
    distribution,
    run_local,
)
from pyro_elbo_ext.amortized.surgery import standard_error
from pyro_elbo_ext.inference_data.draws import to_numpy
from pyro_elbo_ext.programs.arguments import check_count, check_number, check_seed
from pyro_elbo_ext.programs.densities import log_prob
from pyro_elbo_ext.programs.given import run_given
from pyro_elbo_ext.programs.nodes import is_deterministic
from pyro_elbo_ext.programs.randomness import untouched
from pyro_elbo_ext.programs.running import trace_program
from pyro_elbo_ext.terms.terms import latent_values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


@dataclass(frozen=True, repr=False, eq=False)
class AmortizationGap:
    """ELBO per datum of the encoder and of free parameters; made by `amortization_gap`.

    Attributes
    ----------
    elbo_amortized, elbo_optimized, gap, gap_error : (N,) arrays
        Nats per datum, with the same random numbers for both; ``gap`` is optimized minus amortized.
    log_evidence, log_evidence_error : (N,) arrays or None
        IWAE's lower bound on ``log p(x_n)``, from the optimized distributions.
    mean_gap_error, mean_approximation_gap_error : float
        Standard errors, over draws with the data held fixed; the second is NaN without ``log_evidence``.
    further_gain, further_gain_error : float
        What another fifth of the steps would add to the mean ELBO per datum, and its standard error; negative where there
        is nothing left to gain but noise, NaN with under 5 steps.
    objective : (num_steps,) array
        Mean ELBO per datum at each step of the optimization, one draw each.
    sites, plate, num_draws
        What was optimized, and the draws behind each ELBO.
    """

    elbo_amortized: Floats
    elbo_optimized: Floats
    gap: Floats
    gap_error: Floats
    log_evidence: Floats | None
    log_evidence_error: Floats | None
    mean_gap_error: float
    mean_approximation_gap_error: float
    further_gain: float
    further_gain_error: float
    objective: Floats
    sites: tuple[str, ...]
    plate: str
    num_draws: int

    @property
    def mean_gap(self) -> float:
        """Mean over data of the amortization gap, in nats."""
        return float(self.gap.mean())

    @property
    def approximation_gap(self) -> Floats | None:
        """``log_evidence - elbo_optimized`` per datum: what the family itself lacks; None without ``log_evidence``."""
        return None if self.log_evidence is None else self.log_evidence - self.elbo_optimized

    @property
    def still_rising(self) -> bool:
        """Whether another fifth of the steps gains more than 3 standard errors, 0.01 nats, and a fiftieth of the gap."""
        return self.further_gain > max(3 * self.further_gain_error, 0.01, self.mean_gap / 50)

    @property
    def verdict(self) -> str:
        """One or two sentences."""
        text = f"The encoder loses {self.mean_gap:.3f} ± {self.mean_gap_error:.3f} nats per datum to per-datum optima"
        approximation = self.approximation_gap
        if approximation is None:
            text += "."
        else:
            text += (
                f"; their family loses {approximation.mean():.3f} ± {self.mean_approximation_gap_error:.3f} or more to the "
                "posterior."
            )
            if self.mean_gap > max(approximation.mean(), 3 * self.mean_gap_error):
                text += " A larger encoder, or more training of it, would help more than a richer family."
            elif approximation.mean() > max(self.mean_gap, 3 * self.mean_approximation_gap_error):
                text += " A richer family (full covariance, flows) would help more than a larger encoder."
        if self.still_rising:
            text += " The optimization was still gaining when it ended: take more steps (num_steps), the gap is larger."
        return text

    def to_dataframe(self) -> pd.DataFrame:
        """One row per datum, nats."""
        columns = {
            "elbo_amortized": self.elbo_amortized,
            "elbo_optimized": self.elbo_optimized,
            "gap": self.gap,
            "gap_error": self.gap_error,
        }
        if self.log_evidence is not None and self.log_evidence_error is not None:
            columns |= {
                "log_evidence": self.log_evidence,
                "log_evidence_error": self.log_evidence_error,
                "approximation_gap": self.log_evidence - self.elbo_optimized,
            }
        return pd.DataFrame(columns).rename_axis(self.plate)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Histogram of the gaps of the data; returns the axes."""
        from pyro_elbo_ext.amortized.plots import plot_amortization_gap

        return plot_amortization_gap(self.gap, self.approximation_gap, ax)

    def _head(self) -> str:
        return (
            f"Amortization gap of {', '.join(self.sites)} over plate '{self.plate}': {self.gap.size} data, "
            f"{self.objective.size} steps, {self.num_draws} draws; nats per datum"
        )

    def _summary(self) -> pd.DataFrame:
        return self.to_dataframe().describe().loc[["mean", "min", "50%", "max"]]

    def __repr__(self) -> str:
        return f"{self._head()}\n{self._summary().to_string(float_format='{:.4f}'.format)}\n{self.verdict}"

    def _repr_html_(self) -> str:
        return f"<p>{self._head()}</p>{self._summary().to_html(float_format='{:.4f}'.format)}<p>{self.verdict}</p>"


def amortization_gap(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    site: str | Sequence[str] | None = None,
    plate: str | None = None,
    num_steps: int = 500,
    lr: float = 0.05,
    num_draws: int = 64,
    evidence_draws: int | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> AmortizationGap:
    r"""Optimize the local distributions datum by datum, from where the encoder puts them, and compare ELBOs.

    .. math::

        \log p(x_n) = \mathrm{ELBO}_n(\text{amortized})
            + \underbrace{\mathrm{ELBO}_n^* - \mathrm{ELBO}_n(\text{amortized})}_{\text{amortization gap}}
            + \underbrace{\log p(x_n) - \mathrm{ELBO}_n^*}_{\text{approximation gap}}

    with :math:`\mathrm{ELBO}_n^*` the best of the same family for datum n; the two gaps add up to ``kl_posterior``. The
    family's parameters are free, one set per datum, and the model stays as it is; Adam with a step size that falls to 0,
    on sticking-the-landing gradients, whose noise vanishes at an exact posterior. An optimization that ended early makes
    the gap too small, never too large but for noise.

    Parameters
    ----------
    model, guide
        Pyro programs; called with ``*args, **kwargs``: the data of which to know the gap, a part of all if you like. Put
        modules with dropout or batch normalization in eval mode first.
    site, plate
        Local latent sites and their data plate, as for `elbo_surgery`; the sites are optimized together.
    num_steps, lr
        Steps of Adam and the step size it starts with, on unconstrained parameters. A fifth more are taken on a copy, to see
        whether there is more to gain.
    num_draws
        Draws for each ELBO, at least 2; the same random numbers for both.
    evidence_draws
        If given, also draws of an IWAE estimate of ``log p(x_n)`` for the approximation gap, at least 2.
    seed
        Of the random numbers; the generators, the param store, and gradients of parameters are left as they were.

    Returns
    -------
    AmortizationGap

    Raises
    ------
    KeyError, ValueError
        As `elbo_surgery`; if a family has no reparameterized draws or cannot be rebuilt from its parameters, if a site
        outside the plate depends on the local ones (there is no ELBO per datum), or if an ELBO is NaN or infinite.

    References
    ----------
    Cremer, Li and Duvenaud (2018), "Inference suboptimality in variational autoencoders".
    Roeder, Wu and Duvenaud (2017), "Sticking the landing".
    """
    check_count("num_steps", num_steps, 1)
    check_seed(seed)
    check_count("num_draws", num_draws, 2)
    if evidence_draws is not None:
        check_count("evidence_draws", evidence_draws, 2)
    check_number("lr", lr)
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr must be a positive number, not {lr!r}")
    with untouched(seed):
        run = run_local(model, guide, args, kwargs, site, plate)
        check_all_data(run)
        if evidence_draws is not None and _shares_draws(run):
            raise ValueError(
                "evidence_draws needs local latents only: with other guide sites log p(x) is no sum over data. Leave it out."
            )
        problem = _PerDatum(model, guide, args, kwargs, run)
        start, free = problem.free(), problem.free()
        objective = _optimize(problem, free, num_steps, lr)
        further = copy.deepcopy(free)
        probe_steps = num_steps // 5
        if probe_steps:  # is there more to gain? They start with large steps again, whose noise may also lose a little
            _optimize(problem, further, probe_steps, lr / 2)
        # the same seed before each pair of evaluations: common random numbers
        seeds = torch.randint(2**31 - 1, (num_draws,)).tolist()
        amortized, optimized, beyond = (
            np.stack([problem.log_weights(q, one) for one in seeds]) for q in (start, free, further)
        )
        evidence = None
        if evidence_draws is not None:
            seeds = torch.randint(2**31 - 1, (evidence_draws,)).tolist()
            evidence = np.stack([problem.log_weights(free, one) for one in seeds])
    gain, shared = optimized - amortized, _shares_draws(run)
    log_evidence, log_evidence_error = (None, None) if evidence is None else _log_mean_exp(evidence)
    approximation_error = math.nan
    if log_evidence_error is not None:
        approximation_error = math.hypot(
            standard_error(optimized, shared=shared), math.sqrt((log_evidence_error**2).sum()) / log_evidence_error.size
        )
    return AmortizationGap(
        amortized.mean(0),
        optimized.mean(0),
        gain.mean(0),
        gain.std(0, ddof=1) / math.sqrt(num_draws),
        log_evidence,
        log_evidence_error,
        standard_error(gain, shared=shared),
        approximation_error,
        float((beyond - optimized).mean()) if probe_steps else math.nan,
        standard_error(beyond - optimized, shared=shared) if probe_steps else math.nan,
        objective,
        tuple([one.name for one in run.local]),
        run.plate.name,
        num_draws,
    )


Family = Mapping[str, FreeDistribution]


class _PerDatum:
    """The ELBO of each datum as a function of the local distributions; the rest of model and guide as they are."""

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        run: LocalRun,
    ) -> None:
        self.model, self.guide, self.args, self.kwargs, self.run = model, guide, args, dict(kwargs), run
        self._checked = False

    def free(self) -> dict[str, FreeDistribution]:
        with torch.enable_grad():
            return {site.name: FreeDistribution(distribution(site), site.name) for site in self.run.local}

    def log_weights(self, free: Family, seed: int) -> Floats:
        """``log p(x_n, z_n) - log q(z_n)`` of one draw from ``seed``, shape ``(N,)``."""
        pyro.set_rng_seed(seed)
        value = self.elbo(free)
        check_finite(value, "the ELBO per datum")
        return np.asarray(to_numpy(value.double()))

    def elbo(self, free: Family) -> Tensor:
        """One draw's ELBO per datum, shape ``(N,)``: the terms inside the plate."""
        run = self.run
        guide_trace, values = run.guide_trace, {}
        if _shares_draws(run):  # draws of the other sites; an encoder alone has nothing new to say
            with torch.no_grad():
                guide_trace = trace_program(self.guide, self.args, self.kwargs)
            values = latent_values(run.model_trace, guide_trace)
        values |= {name: q.distribution().rsample() for name, q in free.items()}
        model_trace = run_given(self.model, self.args, self.kwargs, values)
        inside: Tensor = torch.zeros(run.plate.size, device=next(iter(values.values())).device)
        outside: list[Tensor] = []
        for node in model_trace.nodes.values():
            if node["type"] != "sample" or is_deterministic(node):
                continue
            log_p = log_prob(node, model_trace)
            if run.has_plate(node):
                inside = inside + run.by_datum(log_p)
            elif log_p.requires_grad:
                outside.append(log_p.sum())
        if outside and not self._checked:
            self._check_outside(torch.stack(outside).sum(), free)
        self._checked = True
        for name, q in free.items():  # sticking the landing: the path through the draw only
            inside = inside - run.by_datum(q.distribution(detached=True).log_prob(values[name]))
        for site in run.others:
            for part in site.q:
                node = guide_trace.nodes[part["name"]]
                if run.has_plate(node):
                    inside = inside - run.by_datum(log_prob(node, guide_trace))
        return inside

    def _check_outside(self, outside: Tensor, free: Family) -> None:
        leaves = [leaf for q in free.values() for leaf in q.leaves.values()]
        found = torch.autograd.grad(outside, leaves, retain_graph=True, allow_unused=True)
        if any(gradient is not None for gradient in found):
            raise ValueError(
                f"a site outside plate '{self.run.plate.name}' depends on {', '.join(free)}: there is no ELBO per datum. "
                "Put all sites that depend on the local latents in the plate."
            )


def _shares_draws(run: LocalRun) -> bool:
    return any(site.kind != "observed" for site in run.others)


def _optimize(problem: _PerDatum, free: Family, num_steps: int, lr: float) -> Floats:
    """Adam on the leaves of ``free``; returns the mean ELBO per datum at each step."""
    leaves = [leaf for q in free.values() for leaf in q.leaves.values()]
    # with a small eps Adam would take full steps on the rounding errors that are left of the gradient at an optimum
    optimizer = torch.optim.Adam(leaves, lr=lr, betas=(0.9, 0.99), eps=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    record = []
    for _ in range(num_steps):
        with torch.enable_grad():
            elbo = problem.elbo(free)
            check_finite(elbo.detach(), "the ELBO per datum")
            # not backward(): that would add to the gradients of the model's parameters
            gradients = torch.autograd.grad(-elbo.sum(), leaves)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        optimizer.step()
        schedule.step()
        record.append(elbo.detach().mean())
    return np.asarray(to_numpy(torch.stack(record).double()))


def _log_mean_exp(log_weights: Floats) -> tuple[Floats, Floats]:
    """IWAE's value per datum, and its standard error by the delta method; ``(K, N)`` to ``(N,)`` each."""
    top = log_weights.max(0)
    weights = np.exp(log_weights - top)
    mean = weights.mean(0)
    return top + np.log(mean), weights.std(0, ddof=1) / (mean * math.sqrt(len(weights)))
