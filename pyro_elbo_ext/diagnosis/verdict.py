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
from pyro_elbo_ext.comparison.ordering import OrderedBy
from pyro_elbo_ext.density import LogDensity
from pyro_elbo_ext.diagnosis.diagnosis import Diagnosis
from pyro_elbo_ext.diagnosis.findings import VERDICTS, Finding
from pyro_elbo_ext.diagnosis.labelling import Labelling, labelling_of
from pyro_elbo_ext.diagnosis.many_chains import CONVERGED, split_rhat
from pyro_elbo_ext.diagnosis.marginals import (
    GOOD,
    Array,
    Scalars,
    by_chains,
    by_comparison,
    by_weights,
    scalars_of,
    unknown,
    varying,
)
from pyro_elbo_ext.diagnosis.other_modes import density_of, look_for_modes, on_modes
from pyro_elbo_ext.diagnosis.posterior_draws import CannotSample, PosteriorDraws, draw_posterior
from pyro_elbo_ext.diagnosis.reasons import findings_of
from pyro_elbo_ext.diagnosis.reliability import (
    is_level,
    on_chains,
    on_comparison,
    on_history,
    on_scalars_left_out,
    on_weights,
)
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


def diagnose(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    mcmc: Any = None,
    history: Any = None,
    ordered_by: OrderedBy | None = None,
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

    Where the model is the same in any order of its components, as of a mixture, or of the states of a hidden Markov model
    (see :func:`~pyro_elbo_ext.exchangeable_components`, which is asked), a finding says so. Scalars of such components that
    are off are then "not known", and the whole is "means only" at best, unless they are off by 0.5 with all components'
    entries sorted too; ``ordered_by`` names the components, so that each is judged.

    Other modes are looked for by climbs of the log density from dispersed points: draws of the prior, of the guide, these
    pushed outwards, wide random ones. A mode of weight 0.05 or more, by importance sampling about it, that the guide has no
    draws in is a finding with its place and weight, and is reckoned with in the figures of all scalars. No search finds
    every mode: a finding says how many climbs it took, or that none was made since the model is no graph.

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
    ordered_by
        Site by whose numbers exchangeable components are put in order, in each draw of both sides, as for
        :func:`~pyro_elbo_ext.compare_to_mcmc`: ``"locs"``, or ``("locs", 0)`` where it has several for each component.
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
        variable in common with the model, or of another shape. For an ``ordered_by`` that is no site of exchangeable
        components.
    TypeError
        For arguments of a wrong type.

    References
    ----------
    Yao, Vehtari, Simpson, Gelman (2018), Yes, but Did It Work?: Evaluating Variational Inference. Dhaka, Catalina,
    Welandawe, Andersen, Huggins, Vehtari (2021), Challenges and opportunities in high dimensional variational inference.
    """
    return judge(
        model,
        guide,
        args,
        kwargs,
        mcmc=mcmc,
        history=history,
        ordered_by=ordered_by,
        num_draws=num_draws,
        seed=seed,
        progress=progress,
    )


@handlers_are_heard()
def judge(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    mcmc: Any = None,
    history: Any = None,
    ordered_by: OrderedBy | None = None,
    num_draws: int = 2000,
    seed: int | None = None,
    progress: bool = False,
    known_modes: Array | None = None,
) -> Diagnosis:
    """`diagnose`, for who knows modes already: unconstrained points of shape (n, dim), from which is climbed too."""
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
        sample = psis_khat(model, guide, *args, num_draws=num_draws, seed=seed, progress=progress, **kwargs)
        labelling = labelling_of(model, args, kwargs, sample.draws, _values(sample), ordered_by)
        run = _Run(model, guide, args, kwargs, num_draws, seed, progress, labelling)
        density = density_of(model, args, kwargs, seed)
        found = None if mcmc is None else run.with_mcmc(mcmc, sample)
        found = found or run.with_weights(sample) or run.with_chains(sample, scorer, density)
        modes = look_for_modes(density, sample, seed, known_modes, labelling.found)
        scalars, on_others = on_modes(modes, density, found.scalars, found.guide, sample)
    findings = findings_of(found.scalars, found.guide, found.posterior, found.evidence, sample, is_level(record))
    if scalars is not found.scalars:  # what is good in the mode that was seen is not good in all
        findings = [finding for finding in findings if finding.verdict != "good"]
        findings += on_weights(found.evidence, sample)
    findings = [*on_others, *findings, *found.findings, *on_history(record)]
    findings.sort(key=lambda finding: -VERDICTS.index(finding.verdict))
    verdict = findings[0].verdict if findings else "good"
    return Diagnosis(
        verdict,
        tuple(findings),
        scalars,
        found.evidence,
        found.comparison,
        found.method,
        record,
        None if isinstance(modes, str) else modes,
    )


class _Run(NamedTuple):
    """The arguments that every way needs."""

    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    num_draws: int
    seed: int
    progress: bool
    labelling: Labelling

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
        given = named_as(draws_of(mcmc, "mcmc"), approx)
        names = self.labelling
        approx, draws = names.ordered(approx, "the guide"), names.ordered(given, "mcmc")
        shared = [str(name) for name in draws.data_vars if name in approx]
        if not shared:
            raise ValueError(
                f"mcmc has none of the model's sites {list(approx.data_vars)}; it has {list(draws.data_vars)}"
            )
        pairs = aligned(approx, draws, shared)
        sites = {name: site_of(name, approx[name]) for name in shared}
        left, right = ({sites[name]: pair[side].values for name, pair in pairs.items()} for side in (0, 1))
        guide, posterior = _in_common(left, right, sample, (2, 2))
        if not guide.names:
            raise ValueError("nothing to compare: every scalar in common with mcmc is constant or not finite")
        comparison, flat, scalars = _compared(guide, posterior, sample.khat)
        rhat = _rhat(posterior)
        unknown(scalars, [not rhat[name] < CONVERGED for name in guide.names])
        of_sorted = _in_common(names.sorted_values(left), names.sorted_values(right), sample, (2, 2))
        taken_back = names.taken_back(scalars, lambda: _compared(*of_sorted, sample.khat)[2])
        rhat |= _rhat(of_sorted[1])  # chains may differ in the order alone
        findings = on_comparison(scalars, rhat, sorted(set(map(str, approx.data_vars)) - set(shared)))
        findings += names.findings(taken_back)
        variables = {site: name for name, site in sites.items()}
        complete = all(site in variables for site in sample.draws)
        theirs = (
            {site: given[variables[site]].transpose("chain", "draw", ...).values for site in sample.draws}
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
        names = self.labelling
        values = names.ordered_values(_values(sample), 1, "the guide")
        whole = scalars_of(values, sample.nodes, 1)
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
            [*names.findings(0), *on_scalars_left_out(_left_out(sample, whole, guide))],
        )

    def with_chains(self, sample: ImportanceSample, scorer: Scorer, density: LogDensity | str) -> _Found:
        names, own = self.labelling, _values(sample)
        values = names.ordered_values(own, 1, "the guide")
        whole = scalars_of(values, sample.nodes, 1)
        try:
            drawn = draw_posterior(self.model, self.args, self.kwargs, density, sample.draws, self.seed, self.progress)
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
            return _Found(scalars, "none", guide, None, self.evidence(None), [finding, *names.findings(0)])
        if scorer.looped is None:  # more draws, for smaller errors: they cost little
            with untouched(self.seed + 1):
                more = scorer.draw(4 * self.num_draws).values
            values = names.ordered_values({name: more[name] for name in own}, 1, "the guide")
            whole = scalars_of(values, sample.nodes, 1)
        agreed = names.agreed(drawn)
        guide, posterior = _in_common(values, agreed.values, sample, (1, 2))
        whole = whole.take(np.array([site in agreed.values for site in whole.sites]))
        scalars = by_chains(guide, posterior.draws, sample.khat)
        of_sorted = _in_common(names.sorted_values(values), names.sorted_values(agreed.values), sample, (1, 2))
        taken_back = names.taken_back(
            scalars,
            lambda: by_chains(of_sorted[0], of_sorted[1].draws, sample.khat),
        )
        if not agreed.converged:
            unknown(scalars)
        evidence, reason = self._with_posterior(self._for_evidence(drawn, sample))
        findings = [
            *on_chains(agreed),
            *names.findings(taken_back),
            *reason,
            *on_scalars_left_out(_left_out(sample, whole, guide)),
        ]
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


def _in_common(
    guide: Mapping[str, Any], posterior: Mapping[str, Any], sample: ImportanceSample, leading: tuple[int, int]
) -> tuple[Scalars, Scalars]:
    """Scalars of both sides that vary on both."""
    shared = [name for name in guide if name in posterior]
    sides = (guide, posterior)
    left, right = (
        scalars_of({name: side[name] for name in shared}, sample.nodes, dims)
        for side, dims in zip(sides, leading, strict=True)
    )
    kept = varying(left.draws) & varying(right.draws)
    return left.take(kept), right.take(kept)


def _compared(guide: Scalars, posterior: Scalars, khat: float) -> tuple[Comparison, Scalars, pd.DataFrame]:
    """The comparison, the guide's draws of shape ``(S, n)``, and the figures."""
    draws = [{name: side.draws[..., i] for i, name in enumerate(side.names)} for side in (guide, posterior)]
    comparison, flat = compare_to_mcmc(draws[0], draws[1]), guide._replace(draws=guide.draws[0])
    return comparison, flat, by_comparison(flat, comparison.table, khat)


def _rhat(posterior: Scalars) -> dict[str, float]:
    """Split R-hat by scalar; 1 where the chains are too short for it."""
    found = split_rhat(posterior.draws) if posterior.draws.shape[1] >= 8 else np.ones(len(posterior.names))
    return dict(zip(posterior.names, map(float, found), strict=True))


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
