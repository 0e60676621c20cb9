"""The adapter to ``pyro.infer.ELBO``: everything that Pyro's SVI, ELBOModule and users call."""

from __future__ import annotations

import logging
import math
import numbers
import operator
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import pyro
import torch
from pyro.infer import ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.util import check_model_guide_match
from torch import Tensor

from pyro_elbo_ext.dependencies import DependencyTracker
from pyro_elbo_ext.estimate import Ledger, Particle, evaluate, row
from pyro_elbo_ext.history import VALUES, History, SiteInfo
from pyro_elbo_ext.kl import KLChoice, KLPrior, Structure, kl_prior, read_structure
from pyro_elbo_ext.per_pair import PerPair
from pyro_elbo_ext.registration import check_registered, collects_parameters
from pyro_elbo_ext.terms import (
    PARTICLE_PLATE,
    Site,
    Terms,
    check_pair,
    outline,
    read_sites,
    run_pair,
    stack_particles,
    trace_pair,
)

logger = logging.getLogger(__name__)

Program = Callable[..., Any]
KLWeight = float | Callable[[int], float]
Signature = tuple[object, ...]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Values = list[tuple[float, ...]]

_SAMPLED = KLPrior("sampled", "kl='sampled'")
_MAX_STRUCTURES = 64  # of a program whose sites vary without end
_SUMMED = [VALUES.index(name) for name in ("log_p", "log_q", "kl_prior", "num_observations")]  # over a site's batch


@dataclass(slots=True)
class _Pair:
    """What has been found out about one (model, guide)."""

    structures: dict[Signature, Structure] = field(default_factory=dict)
    infos: dict[Signature, tuple[SiteInfo, ...]] = field(default_factory=dict)
    track_next: bool = True  # the dependencies of the sites last seen are not known
    registered: set[Signature] = field(default_factory=set)
    max_plate_nesting: int | None = None


@dataclass(slots=True)
class _Evaluation:
    """One evaluation of the objective, averaged over particles."""

    pair: _Pair
    signature: Signature
    ledger: Ledger
    sites: tuple[SiteInfo, ...]
    values: Values  # for each site, as the history takes them
    objective: float
    kl_weight: float


class DecomposedELBO(ELBO):
    r"""Evidence lower bound that keeps every term: a drop-in for ``pyro.infer.Trace_ELBO`` and ``TraceMeanField_ELBO``.

    .. math:: \mathrm{ELBO} = \mathrm E_q[\log p(x \mid z)] - \mathrm{KL}(q(z) \,\|\, p(z))
              = \log p(x) - \mathrm{KL}(q(z) \,\|\, p(z \mid x))

    The first KL is ``kl_prior``, recorded for each site at each step. The second, the gap, is not part of it.

    Parameters
    ----------
    num_particles : int
        Draws of the guide per evaluation.
    max_plate_nesting : int, optional
        Bound on the number of nested plates, needed with ``vectorize_particles``; guessed for each (model, guide) by one
        run that leaves the random state as it was, if it is not given.
    max_iarange_nesting
        Pyro's deprecated name of ``max_plate_nesting``.
    vectorize_particles : bool
        Draw all particles in one plate; model and guide must broadcast. Otherwise they are drawn one after the other, and
        their graphs are held together until the backward pass.
    strict_enumeration_warning, ignore_jit_warnings, jit_options, tail_adaptive_beta
        Accepted as ``pyro.infer.ELBO`` does; nothing here uses them.
    retain_graph : bool, optional
        Keep the graph after ``loss_and_grads``.
    kl : {"auto", "analytic", "sampled"}
        Analytic where a closed form exists and is valid, else sampled; analytic, or an error that names the site and the
        reason; or sampled everywhere, with values and gradients equal to ``Trace_ELBO``'s.
    kl_weight : float or callable
        Weight of ``kl_prior`` in the objective, or a function of the step (0, 1, ...) that gives it. The history always
        holds the true ELBO, with weight 1, beside the objective.
    gradient : {"pathwise"}
        Estimator of the gradient: pathwise, with score-function terms for sites whose draws are not reparameterized.
    history : bool or History
        Whether to record each step; or a :class:`~pyro_elbo_ext.history.History` to record to.

    Attributes
    ----------
    last : Terms or None
        The detached terms of the last evaluation.
    history : History or None
        One record for each call of ``loss_and_grads`` or, with gradients enabled, ``differentiable_loss``.

    Raises
    ------
    ValueError
        At construction for arguments out of range. At evaluation, before any parameter changes: if a term is NaN or
        infinite (naming site, term and step), a latent site is missing from the guide, a site is marked for enumeration,
        an analytic KL is asked for where none is valid, or an ``nn.Module`` in use is not registered with Pyro.

    References
    ----------
    Wingate and Weber (2013), "Automated variational inference in probabilistic programming".
    Ranganath, Gerrish and Blei (2014), "Black box variational inference".
    Kucukelbir et al. (2017), "Automatic differentiation variational inference".
    """

    def __init__(
        self,
        num_particles: int = 1,
        max_plate_nesting: float = float("inf"),
        max_iarange_nesting: int | None = None,
        vectorize_particles: bool = False,
        strict_enumeration_warning: bool = True,
        ignore_jit_warnings: bool = False,
        jit_options: dict[str, Any] | None = None,
        retain_graph: bool | None = None,
        tail_adaptive_beta: float = -1.0,
        *,
        kl: KLChoice = "auto",
        kl_weight: KLWeight = 1.0,
        gradient: Literal["pathwise"] = "pathwise",
        history: bool | History = True,
    ) -> None:
        if isinstance(num_particles, bool) or operator.index(num_particles) < 1:
            raise ValueError(f"num_particles must be a positive integer, not {num_particles!r}")
        if not max_plate_nesting >= 0:
            raise ValueError(f"max_plate_nesting must be at least 0, not {max_plate_nesting!r}")
        if kl not in get_args(KLChoice):
            raise ValueError(f"kl must be one of {get_args(KLChoice)}, not {kl!r}")
        if gradient != "pathwise":
            raise ValueError(f"gradient must be 'pathwise', not {gradient!r}")
        if not isinstance(history, bool | History):
            raise TypeError(f"history must be True, False or a History, not {type(history).__name__}")
        if not callable(kl_weight):
            _check_weight(kl_weight, "kl_weight")
        super().__init__(
            num_particles,
            max_plate_nesting,
            max_iarange_nesting,
            vectorize_particles,
            strict_enumeration_warning,
            ignore_jit_warnings,
            jit_options,
            retain_graph,
            tail_adaptive_beta,
        )
        self.max_plate_nesting: float
        self.kl = kl
        self.kl_weight = kl_weight
        self.gradient = gradient
        self.history: History | None = (History() if history else None) if isinstance(history, bool) else history
        self.num_steps = 0
        self._last: list[Particle] | None = None
        self._pairs: PerPair[_Pair] = PerPair(_Pair)

    # What Pyro calls

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Negative objective, averaged over particles, in nats.  It is not recorded in the history."""
        return -self._evaluate(model, guide, args, kwargs).objective

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Negative objective, after adding its gradient to the ``grad`` of every parameter it depends on."""
        evaluation = self._evaluate(model, guide, args, kwargs)
        surrogate_loss = evaluation.ledger.surrogate_loss(self.num_particles)
        if surrogate_loss.requires_grad:
            registered = evaluation.pair.registered
            if evaluation.signature not in registered and collects_parameters():
                check_registered(surrogate_loss, (model, guide), (args, kwargs))
                registered.add(evaluation.signature)
            surrogate_loss.backward(retain_graph=self.retain_graph)
        self._record(evaluation)
        return -evaluation.objective

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Negative objective as a scalar tensor with the gradient of the surrogate."""
        evaluation = self._evaluate(model, guide, args, kwargs)
        surrogate_loss = evaluation.ledger.surrogate_loss(self.num_particles)
        if torch.is_grad_enabled():
            self._record(evaluation)
        return -evaluation.objective + (surrogate_loss - surrogate_loss.detach())

    @property
    def last(self) -> Terms | None:
        """Detached terms of the last evaluation; None before the first."""
        if self._last is None:
            return None
        if len(self._last) > 1:
            return stack_particles([Terms({term.site: term for term in particle.terms}) for particle in self._last])
        return Terms({term.site: term for term in self._last[0].terms}, self.num_particles)

    def _get_trace(self, model: Program, guide: Program, args: Args, kwargs: Kwargs) -> tuple[Trace, Trace]:
        """Pyro's hook: traces of one draw."""
        return run_pair(model, guide, args, kwargs)

    def _get_traces(self, model: Program, guide: Program, args: Args, kwargs: Kwargs) -> Iterator[tuple[Trace, Trace]]:
        """Pyro's hook: a pair of traces for each particle, or one for all if they are vectorized."""
        repeats, model, guide = self._programs(model, guide, args, kwargs)
        for _ in range(repeats):
            yield self._get_trace(model, guide, args, kwargs)

    def _guess_max_plate_nesting(self, model: Program, guide: Program, args: Args, kwargs: Kwargs) -> int:
        """Pyro's guess, from one run of the pair; but nothing is stored and the random state is left as it was."""
        stored = self.max_plate_nesting
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        try:
            with torch.random.fork_rng(devices=devices):
                super()._guess_max_plate_nesting(model, guide, args, kwargs)
            return int(self.max_plate_nesting)
        finally:
            self.max_plate_nesting = stored

    # One evaluation

    def _programs(self, model: Program, guide: Program, args: Args, kwargs: Kwargs) -> tuple[int, Program, Program]:
        """How often to run model and guide, and the two, inside the particle plate if there is one."""
        if not self.vectorize_particles or self.num_particles == 1:
            return self.num_particles, model, guide
        nesting = self.max_plate_nesting
        if math.isinf(nesting):
            pair = self._pairs(model, guide)
            if pair.max_plate_nesting is None:
                pair.max_plate_nesting = self._guess_max_plate_nesting(model, guide, args, kwargs)
            nesting = pair.max_plate_nesting
        particles = [pyro.plate(PARTICLE_PLATE, self.num_particles, dim=-int(nesting)) for _ in range(2)]
        return 1, particles[0](model), particles[1](guide)

    def _evaluate(self, model: Program, guide: Program, args: Args, kwargs: Kwargs) -> _Evaluation:
        pair = self._pairs(model, guide)
        kl_weight = self._kl_weight()
        ledger = Ledger()
        particles: list[Particle] = []
        infos: list[tuple[SiteInfo, ...]] = []
        repeats, model, guide = self._programs(model, guide, args, kwargs)
        for _ in range(repeats):
            tracker = DependencyTracker() if self.kl != "sampled" and pair.track_next else None
            with tracker or nullcontext():
                model_trace, guide_trace = trace_pair(model, guide, args, kwargs, tracker)
                signature = _signature(model_trace, guide_trace, args, kwargs)
                if is_validation_enabled() or signature not in pair.structures:
                    check_pair(model_trace, guide_trace)
                    if is_validation_enabled():
                        check_model_guide_match(model_trace, guide_trace, self.max_plate_nesting)
                structure = self._structure(pair, signature, model_trace, guide_trace, tracker)
            sites = read_sites(model_trace, guide_trace, structure.sites)
            kls = [None if site.kind == "observed" else self._kl_prior(site, structure) for site in sites]
            info = self._describe(pair, signature, sites, kls)
            if tracker is not None or self.kl == "analytic":
                self._report(info)
            infos.append(info)
            particles.append(
                evaluate(
                    sites,
                    kls,
                    model_trace,
                    guide_trace,
                    kl_weight=kl_weight,
                    max_plate_nesting=self.max_plate_nesting,
                    ledger=ledger,
                )
            )
        host = ledger.to_host()
        rows = [row(particle.slots, info, host) for particle, info in zip(particles, infos, strict=True)]
        info, values = _average(infos, rows, self.num_particles // repeats)
        reconstruction = math.fsum(
            [value[0] for site, value in zip(info, values, strict=True) if site.kind == "observed"]
        )
        kl_total = math.fsum([value[2] for site, value in zip(info, values, strict=True) if site.kind != "observed"])
        if not math.isfinite(reconstruction - kl_total):
            self._raise_not_finite(info, values)
        self._last = particles
        return _Evaluation(pair, signature, ledger, info, values, reconstruction - kl_weight * kl_total, kl_weight)

    def _kl_prior(self, site: Site, structure: Structure) -> KLPrior:
        return _SAMPLED if self.kl == "sampled" else kl_prior(site, structure)

    def _describe(
        self, pair: _Pair, signature: Signature, sites: list[Site], kls: list[KLPrior | None]
    ) -> tuple[SiteInfo, ...]:
        """How each site's term is computed; the same object as at the last step if nothing has changed."""
        known = pair.infos.get(signature)
        if known is not None and self.kl == "sampled":
            return known
        info = tuple(
            [
                SiteInfo(site.name, site.kind, kl and kl.method, kl and kl.reason)
                for site, kl in zip(sites, kls, strict=True)
            ]
        )
        if known == info:
            return known
        pair.infos[signature] = info
        return info

    def _kl_weight(self) -> float:
        if callable(self.kl_weight):
            return _check_weight(self.kl_weight(self.num_steps), f"kl_weight({self.num_steps})")
        return float(self.kl_weight)

    def _structure(
        self,
        pair: _Pair,
        signature: Signature,
        model_trace: Trace,
        guide_trace: Trace,
        tracker: DependencyTracker | None,
    ) -> Structure:
        structure = pair.structures.get(signature)
        if tracker is None and (structure is not None or self.kl != "sampled"):
            if structure is None:  # new sites, seen without a tracker: sample them now, track the next run
                pair.track_next = True
                return Structure(outline(model_trace, guide_trace))
            return structure
        structure = read_structure(model_trace, guide_trace, tracker)
        if len(pair.structures) >= _MAX_STRUCTURES:
            pair.structures.clear()
            pair.infos.clear()
        pair.structures[signature] = structure
        pair.track_next = False
        return structure

    def _report(self, sites: tuple[SiteInfo, ...]) -> None:
        """Say how each kl_prior is computed: in the log, or as the error that kl='analytic' asks for."""
        sampled = [site for site in sites if site.kl_method == "sampled"]
        if self.kl == "analytic" and sampled:
            listed = "; ".join(f"site '{site.site}': {site.kl_reason}" for site in sampled)
            raise ValueError(
                f"kl='analytic', but there is no valid closed form for {listed}. Use kl='auto' or kl='sampled'."
            )
        for site in sites:
            if site.kl_method is not None:
                logger.info("kl_prior of site '%s' is %s: %s", site.site, site.kl_method, site.kl_reason)

    def _raise_not_finite(self, sites: tuple[SiteInfo, ...], values: Values) -> None:
        for site, (log_p, log_q, kl, *_) in zip(sites, values, strict=True):
            if math.isfinite(log_p if site.kind == "observed" else kl):
                continue
            terms = {"log_p": log_p, "log_q": log_q, "kl_prior": kl}
            absent = {"observed": {"log_q", "kl_prior"}, "auxiliary": {"log_p"}}.get(site.kind, set())
            listed = ", ".join(
                f"{term} = {value}" for term, value in terms.items() if term not in absent and not math.isfinite(value)
            )
            raise ValueError(
                f"site '{site.site}' ({site.kind}) has {listed} at step {self.num_steps}. No parameter has been changed. "
                "Check the data and parameters that reach this site, and that its value lies in the support of its "
                "distribution; if training has diverged, lower the learning rate."
            )

    def _record(self, evaluation: _Evaluation) -> None:
        if self.history is not None:
            self.history.append(
                self.num_steps,
                evaluation.sites,
                np.array(evaluation.values).reshape(-1, len(VALUES)),
                objective=evaluation.objective,
                kl_weight=evaluation.kl_weight,
            )
        self.num_steps += 1


def _check_weight(weight: float, name: str) -> float:
    if not isinstance(weight, numbers.Real) or not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"{name} must be a finite number, at least 0, not {weight!r}")
    return float(weight)


def _signature(model_trace: Trace, guide_trace: Trace, args: Args, kwargs: Kwargs) -> Signature:
    """What tells one structure of a program from another: its sites, and the flags and names it was called with."""
    signature: list[object] = []
    for trace in (model_trace, guide_trace):
        for name, node in trace.nodes.items():
            if node["type"] == "sample":
                signature += (name, node["fn"].__class__, node["is_observed"])
    for key, value in (*enumerate(args), *kwargs.items()):
        if value is None or isinstance(value, bool | str):
            signature += (key, value)
    return tuple(signature)


def _average(
    infos: list[tuple[SiteInfo, ...]], rows: list[Values], vectorized: int
) -> tuple[tuple[SiteInfo, ...], Values]:
    """Mean over particles, of which ``vectorized`` are summed in each row; a site that some lack counts as zero in them."""
    if len(rows) == 1 and vectorized == 1:
        return infos[0], rows[0]
    if all(info == infos[0] for info in infos):
        total, sites = np.sum(rows, axis=0), infos[0]
    else:
        by_name: dict[str, SiteInfo] = {}
        for info in infos:
            for site in info:
                by_name.setdefault(site.site, site)
        places = {name: i for i, name in enumerate(by_name)}
        total, sites = np.zeros((len(places), len(VALUES))), tuple(by_name.values())
        for info, values in zip(infos, rows, strict=True):
            total[[places[site.site] for site in info]] += values
    total = total / len(rows)
    total[:, _SUMMED] /= vectorized
    return sites, [tuple(value) for value in total.tolist()]
