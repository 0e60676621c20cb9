"""Did the fit work? `diagnose` looks at a guide from all sides and says how far it is from the posterior."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyro
import torch

from pyro_elbo_ext.comparison import Comparison, compare_to_mcmc
from pyro_elbo_ext.comparison.alignment import aligned, draws_of
from pyro_elbo_ext.diagnosis.diagnosis import Diagnosis
from pyro_elbo_ext.diagnosis.findings import VERDICTS, Finding
from pyro_elbo_ext.diagnosis.many_chains import CONVERGED, split_rhat
from pyro_elbo_ext.diagnosis.marginals import (
    GOOD,
    Scalars,
    by_chains,
    by_comparison,
    by_weights,
    scalars_of,
    unknown,
    varying,
)
from pyro_elbo_ext.diagnosis.posterior_draws import CannotSample, PosteriorDraws, draw_posterior
from pyro_elbo_ext.diagnosis.reasons import findings_of
from pyro_elbo_ext.diagnosis.reliability import is_level, on_chains, on_comparison, on_history, on_scalars_left_out
from pyro_elbo_ext.evidence import EvidenceBounds, ImportanceSample, evidence_bounds, psis_khat
from pyro_elbo_ext.evidence.importance import BATCH_SIZE
from pyro_elbo_ext.evidence.intervals import LEAST_DRAWS
from pyro_elbo_ext.evidence.scoring import Scorer
from pyro_elbo_ext.history import History
from pyro_elbo_ext.inference_data.labels import Labels
from pyro_elbo_ext.inference_data.names import named_as, site_of
from pyro_elbo_ext.programs.arguments import check_count, check_seed
from pyro_elbo_ext.programs.faults import discrete_latent
from pyro_elbo_ext.programs.given import imputation
from pyro_elbo_ext.programs.interrupts import handlers_are_heard
from pyro_elbo_ext.programs.randomness import seeded, untouched

FINITE_VARIANCE = 0.5  # k-hat of the weights below which they are relied on
PRECISE = GOOD / 3  # standard error of a figure with which it can be told from the threshold
ENTRIES = 2000  # of a deterministic site, above which it is left out
FOR_EVIDENCE = 1000  # draws of the chains that the ledger is made with


class _Found(NamedTuple):
    """The figures, what they rest on, and draws of both sides."""

    scalars: pd.DataFrame
    method: str
    guide: Scalars  # draws of shape (S, n)
    posterior: Scalars | None  # of the same, shape (T, n)
    evidence: EvidenceBounds
    findings: list[Finding]
    comparison: Comparison | None = None


@handlers_are_heard()
def diagnose(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    mcmc: Any = None,
    history: Any = None,
    num_draws: int = 2000,
    seed: int | None = None,
    progress: bool = False,
    **kwargs: Any,
) -> Diagnosis:
    r"""How far a fitted guide is from the posterior, why, and what to do about it.

    For every scalar, each entry of each latent and deterministic site on its own, constrained scale, two figures are found
    without trusting the guide: ``mean_shift``, the posterior's mean less the guide's in posterior sds, and ``log_sd_ratio``,
    the log of the guide's sd over the posterior's. The verdict is "good" where the largest of both is below 0.1, "do not
    use" where one is above 0.5, or where the posterior could not be found, else "means only".

    The posterior is taken from ``mcmc``, if given. If not, and if the guide is a good importance sampler (k-hat below 0.5,
    and standard errors small beside 0.1), from its own draws with Pareto-smoothed importance weights. Otherwise from 128
    chains of Hamiltonian Monte Carlo that start at draws of the guide, if R-hat says that they have come to agree.

    Scalars for which the chains of ``mcmc`` disagree (R-hat of 1.05 or more) are "not known", and the whole is "means only"
    at best. It is "do not use" where one has an R-hat above 1.12, which is chains half a posterior sd apart, or where half
    of the scalars disagree.

    A mode of the posterior that neither the guide nor ``mcmc`` has draws in is not seen by any of it: the verdict is then on
    the mode that is seen. Where there may be several, pass draws of chains that started in different places.

    Parameters
    ----------
    model, guide
        As given to ``pyro.infer.SVI``, called as ``model(*args, **kwargs)``, after training. Model keywords with the name of
        a parameter below need ``functools.partial``.
    mcmc
        Draws of the posterior, as of :func:`~pyro_elbo_ext.run_nuts`: ArviZ data, a Dataset, a mapping from site to array of
        shape ``(chain, draw, ...)``, or the path of a file.
    history
        The fit's record, a :class:`~pyro_elbo_ext.History` or an objective that has one, to see whether the ELBO was still
        rising.
    num_draws
        Draws of the guide, at least 25.
    seed
        Same seed, same answer. The caller's random number generators and parameters are left as they were; without a
        seed one is drawn from torch's.
    progress
        Show progress bars.

    Returns
    -------
    Diagnosis
        ``verdict``, ``findings`` with remedies, the figures per scalar, the bounds on log p(x) and KL(q || posterior).

    Raises
    ------
    ValueError
        For a discrete latent site, a plate that subsamples, and as :func:`~pyro_elbo_ext.psis_khat`: a guide that misses a
        site or is a point mass, NaN or infinite densities or draws; each names the site. For ``mcmc`` draws that have no
        variable in common with the model, or of another shape.
    TypeError
        For arguments of a wrong type.

    References
    ----------
    Yao, Vehtari, Simpson, Gelman (2018), Yes, but Did It Work?: Evaluating Variational Inference. Dhaka, Catalina,
    Welandawe, Andersen, Huggins, Vehtari (2021), Challenges and opportunities in high dimensional variational inference.
    """
    check_count("num_draws", num_draws, LEAST_DRAWS)
    check_seed(seed)
    record = _record_of(history)
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    # one scope for all: parameters that the programs make in their first run are there in all that follows
    store = pyro.get_param_store()
    with store.scope(store.get_state()):
        with torch.no_grad(), seeded(seed):
            scorer = Scorer(model, guide, args, kwargs, BATCH_SIZE, False)
        nodes = scorer.reference[0].nodes
        for name in scorer.latents:
            if nodes[name]["fn"].support.is_discrete:
                raise ValueError(discrete_latent(nodes[name], by_hand=True))
        run = _Run(model, guide, args, kwargs, num_draws, seed, progress)
        sample = psis_khat(model, guide, *args, num_draws=num_draws, seed=seed, progress=progress, **kwargs)
        found = None if mcmc is None else run.with_mcmc(mcmc, sample)
        found = found or run.with_weights(sample) or run.with_chains(sample, scorer)
    findings = findings_of(found.scalars, found.guide, found.posterior, found.evidence, sample, is_level(record))
    findings += [*found.findings, *on_history(record)]
    findings.sort(key=lambda finding: -VERDICTS.index(finding.verdict))
    verdict = findings[0].verdict if findings else "good"
    return Diagnosis(verdict, tuple(findings), found.scalars, found.evidence, found.comparison, found.method, record)


class _Run(NamedTuple):
    """The arguments that every way needs."""

    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    num_draws: int
    seed: int
    progress: bool

    def evidence(self, posterior: Mapping[str, Any] | None) -> EvidenceBounds:
        return evidence_bounds(
            self.model,
            self.guide,
            *self.args,
            num_draws=self.num_draws,
            posterior=posterior,
            fallback=None,
            seed=self.seed,
            progress=self.progress,
            **self.kwargs,
        )

    def with_mcmc(self, mcmc: Any, sample: ImportanceSample) -> _Found:
        approx = Labels(nodes=sample.nodes).dataset(
            {name: value.cpu().numpy()[None] for name, value in _values(sample).items()}, sample.nodes
        )
        draws = named_as(draws_of(mcmc, "mcmc"), approx)
        shared = [str(name) for name in draws.data_vars if name in approx]
        if not shared:
            raise ValueError(
                f"mcmc has none of the model's sites {list(approx.data_vars)}; it has {list(draws.data_vars)}"
            )
        pairs = aligned(approx, draws, shared)
        sites = {name: site_of(name, approx[name]) for name in shared}
        left = scalars_of({sites[name]: a.values for name, (a, _) in pairs.items()}, sample.nodes, 2)
        right = scalars_of({sites[name]: b.values for name, (_, b) in pairs.items()}, sample.nodes, 2)
        kept = varying(left.draws) & varying(right.draws)
        guide, posterior = left.take(kept), right.take(kept)
        if not guide.names:
            raise ValueError("nothing to compare: every scalar in common with mcmc is constant or not finite")
        comparison = compare_to_mcmc(
            {name: guide.draws[..., i] for i, name in enumerate(guide.names)},
            {name: posterior.draws[..., i] for i, name in enumerate(guide.names)},
        )
        flat = guide._replace(draws=guide.draws[0])
        scalars = by_comparison(flat, comparison.table, sample.khat)
        rhat = split_rhat(posterior.draws) if posterior.draws.shape[1] >= 8 else np.ones(len(guide.names))
        unknown(scalars, ~(np.asarray(rhat) < CONVERGED))
        findings = on_comparison(
            scalars, dict(zip(guide.names, rhat, strict=True)), sorted(set(map(str, approx.data_vars)) - set(shared))
        )
        variables = {site: name for name, site in sites.items()}
        complete = all(site in variables for site in sample.draws)
        theirs = (
            {site: draws[variables[site]].transpose("chain", "draw", ...).values for site in sample.draws}
            if complete
            else None
        )
        evidence, reason = self._with_posterior(theirs)
        findings += reason
        joined = posterior._replace(draws=posterior.draws.reshape(-1, len(guide.names)))
        return _Found(scalars, "mcmc", flat, joined, evidence, findings, comparison)

    def with_weights(self, sample: ImportanceSample) -> _Found | None:
        """None where the weights cannot be relied on."""
        if not (sample.even or sample.khat < FINITE_VARIANCE) or sample.num_zero:
            return None
        whole = scalars_of(_values(sample), sample.nodes, 1)
        guide = whole.take(varying(whole.draws))
        scalars = by_weights(guide, sample.log_smoothed)
        errors = scalars[["mean_shift_se", "log_sd_ratio_se"]].to_numpy()
        if not (errors.max() < PRECISE and scalars["khat"].max() < sample.threshold):
            return None
        index = np.random.default_rng(self.seed).choice(
            sample.num_draws, sample.num_draws, p=np.exp(sample.log_smoothed) / np.exp(sample.log_smoothed).sum()
        )
        return _Found(
            scalars,
            "importance weights",
            guide,
            guide._replace(draws=guide.draws[index]),
            self.evidence(None),
            on_scalars_left_out(_left_out(sample, whole, guide)),
        )

    def with_chains(self, sample: ImportanceSample, scorer: Scorer) -> _Found:
        whole = scalars_of(_values(sample), sample.nodes, 1)
        try:
            drawn = draw_posterior(self.model, self.args, self.kwargs, sample.draws, self.seed, self.progress)
        except CannotSample as error:
            guide = whole.take(varying(whole.draws))
            scalars = by_chains(guide, np.full((2, 4, len(guide.names)), np.nan), sample.khat)
            finding = Finding(
                "",
                "do not use",
                f"How far the guide is from the posterior cannot be found out: {error}.",
                "Pass draws of the posterior, mcmc=run_nuts(...), or give the guide starting values where the model has a "
                "finite density.",
            )
            return _Found(scalars, "none", guide, None, self.evidence(None), [finding])
        if scorer.looped is None:  # more draws, for smaller errors: they cost little
            with untouched(self.seed + 1):
                more = scorer.draw(4 * self.num_draws).values
            whole = scalars_of({name: more[name] for name in _values(sample)}, sample.nodes, 1)
        shared = [name for name in _values(sample) if name in drawn.values]
        of_chains = scalars_of({name: drawn.values[name] for name in shared}, sample.nodes, 2)
        known = np.array([site in shared for site in whole.sites])
        whole = whole.take(known)
        kept = varying(whole.draws) & varying(of_chains.draws)
        guide, posterior = whole.take(kept), of_chains.take(kept)
        scalars = by_chains(guide, posterior.draws, sample.khat)
        if not drawn.converged:
            unknown(scalars)
        evidence, reason = self._with_posterior(self._for_evidence(drawn, sample))
        findings = [*on_chains(drawn), *reason, *on_scalars_left_out(_left_out(sample, whole, guide))]
        joined = posterior._replace(draws=posterior.draws.reshape(-1, len(guide.names)))
        return _Found(scalars, drawn.method, guide, joined, evidence, findings)

    def _for_evidence(self, drawn: PosteriorDraws, sample: ImportanceSample) -> dict[str, Any] | None:
        if not drawn.converged or any(name not in drawn.values for name in sample.draws):
            return None
        chains, draws = next(iter(drawn.values.values())).shape[:2]
        step = max(1, chains * draws // FOR_EVIDENCE)
        return {name: drawn.values[name][:, ::step] for name in sample.draws} if draws // step >= 4 else None

    def _with_posterior(self, posterior: dict[str, Any] | None) -> tuple[EvidenceBounds, list[Finding]]:
        if posterior is None:
            return self.evidence(None), []
        try:
            return self.evidence(posterior), []
        except ValueError as error:
            return self.evidence(None), [
                Finding("", "good", f"The gap KL(q || posterior) has no bound from draws of the posterior: {error}")
            ]


def _values(sample: ImportanceSample) -> dict[str, torch.Tensor]:
    """Latent and deterministic sites that a verdict is given on."""
    values = {name: value for name, value in sample.draws.items() if not imputation(name, sample.nodes)}
    for name, value in sample.deterministics.items():
        if value[0].numel() <= ENTRIES:
            values[name] = value
    return values


def _left_out(sample: ImportanceSample, whole: Scalars, kept: Scalars) -> list[str]:
    """Deterministic sites that are too large, and scalars that are not finite."""
    large = [name for name in sample.deterministics if name not in _values(sample)]
    missing = set(whole.names) - set(kept.names)
    bad = [
        name
        for name, column in zip(whole.names, whole.draws.T, strict=True)
        if name in missing and not np.isfinite(column).all()
    ]
    return large + bad


def _record_of(history: Any) -> History | None:
    if history is None or isinstance(history, History):
        return history
    record = getattr(history, "history", None)
    if not isinstance(record, History):
        raise TypeError(
            f"history must be a History or an objective that has one, got {type(history).__name__}. "
            "DecomposedELBO() has one unless it was made with history=False."
        )
    return record
