"""The ELBO by its terms: each site's ``kl_prior`` analytic where that is valid, else sampled."""

from __future__ import annotations

import math
import queue
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

import torch
from pyro.infer import TraceEnum_ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.util import check_model_guide_match
from torch import Tensor
from torch.distributions import Distribution

from pyro_elbo_ext.bounds import Gradient, bounds
from pyro_elbo_ext.bounds.gradients import GradientName
from pyro_elbo_ext.bounds.site_weights import Number
from pyro_elbo_ext.bounds.weighting import FreeBits, KLWeight
from pyro_elbo_ext.history import History
from pyro_elbo_ext.history.history import SiteInfo
from pyro_elbo_ext.objectives.arguments import PyrosArguments, with_pyros_arguments
from pyro_elbo_ext.objectives.bound_estimate import estimate_bound
from pyro_elbo_ext.objectives.bound_record import Particles
from pyro_elbo_ext.objectives.enumerated import evaluate_enumerated
from pyro_elbo_ext.objectives.evaluation import (
    Args,
    Evaluation,
    Kwargs,
    Pair,
    Program,
    Totals,
    signature_of,
)
from pyro_elbo_ext.objectives.kl_choice import Evaluated, KLObjective
from pyro_elbo_ext.particles.estimate import Ledger, Particle, average, evaluate, row, sums_by_site
from pyro_elbo_ext.programs.pairs import check_draws, check_pair
from pyro_elbo_ext.programs.running import trace_pair
from pyro_elbo_ext.terms import Terms
from pyro_elbo_ext.terms.dependencies import DependencyTracker
from pyro_elbo_ext.terms.enumeration.traces import Beginnings, Begun, is_marked
from pyro_elbo_ext.terms.kl import KLChoice, KLPrior
from pyro_elbo_ext.terms.terms import read_sites, stack_particles

if TYPE_CHECKING:
    import xarray as xr


class DecomposedELBO(KLObjective):
    r"""Evidence lower bound that keeps every term: a drop-in for ``pyro.infer.Trace_ELBO`` and ``TraceMeanField_ELBO``.

    .. math:: \mathrm{ELBO} = \mathrm E_q[\log p(x \mid z)] - \mathrm{KL}(q(z) \,\|\, p(z))
              = \log p(x) - \mathrm{KL}(q(z) \,\|\, p(z \mid x))

    The first KL is ``kl_prior``, recorded for each site at each step. The second, the gap, is not part of it.

    Sites marked for enumeration are summed over as by ``pyro.infer.TraceEnum_ELBO``. Of a site that the guide marks, the row
    is an exact expectation under the guide; of one that only the model has, under its exact posterior given the draws of
    the others, which is its guide.

    Parameters
    ----------
    num_particles : int
        Draws of the guide per evaluation.
    max_plate_nesting : int, optional
        Bound on the number of nested plates, needed with ``vectorize_particles``; guessed for each (model, guide) by one
        run that leaves the random state as it was, if it is not given.
    max_iarange_nesting
        Pyro's deprecated name of ``max_plate_nesting``.
    vectorize_particles : bool or "vmap"
        True draws all particles in one plate, Pyro's way: model and guide must broadcast. "vmap" draws them in one run by
        ``torch.vmap`` without that, checked against the loop, and loops where the programs do not allow it. False draws
        them one after the other; their graphs are held together until the backward pass. Looped particles take a subsample
        each with ``gradient="pathwise"``, as in Pyro; otherwise all of them share one.
    strict_enumeration_warning, ignore_jit_warnings, jit_options, tail_adaptive_beta
        Accepted as ``pyro.infer.ELBO`` does; nothing here uses them.
    retain_graph : bool, optional
        Keep the graph after ``loss_and_grads``.
    kl : {"auto", "analytic", "sampled"}
        Analytic where a closed form exists and is valid, else sampled; analytic, or an error that names the site and the
        reason; or sampled everywhere, with values and gradients equal to ``Trace_ELBO``'s.
    kl_weight : float, callable, or mapping from site to either
        Weight of ``kl_prior`` in the objective, or a function of the step (0, 1, ...) that gives it, such as the schedules
        of :mod:`pyro_elbo_ext.bounds`, or :class:`~pyro_elbo_ext.Geco`. Sites that a mapping does not name
        have weight 1; those that it names must be in every run. The history always holds the true ELBO, with weight 1,
        beside the objective; with weights by site its ``kl_weight`` of a step is ``(reconstruction - objective) /
        kl_prior``, and ``to_dataframe()`` has that of each site.
    free_bits : float or mapping from site to float, optional
        Nats that the ``kl_prior`` of each latent site, or of those named, counts as at least, for each element of the
        site's plates: in the objective its sum over them is ``max(kl_prior, free_bits * elements)``, subsampled elements
        counting for those they stand for. So the mean over the minibatch is compared, site by site (Kingma et al. 2016);
        a site outside of plates is one element. Where the floor is the greater the gradient of that ``kl_prior`` is 0.
        A Delta in the guide has none: its ``kl_prior`` is infinite but for a constant, above any floor.
        A sampled ``kl_prior`` is compared by its estimate, the mean over particles, and ``E[max(estimate, floor)]`` is
        above ``max(kl_prior, floor)``: there the objective is biased downwards, and the gradient's gate is open or shut by
        chance, which matters near the floor only. Use analytic ones, or several particles.
    gradient : {"pathwise", "doubly_reparameterized", "score_function", "vargrad"}
        Estimator of the gradient: pathwise, with score-function terms for sites whose draws are not reparameterized;
        sticking the landing; score function with leave-one-out baseline; the same by the name of VarGrad. See
        :mod:`pyro_elbo_ext.bounds`. All but the first need every ``kl_prior`` sampled, so with them "auto"
        samples.
    history : bool or History
        Whether to record each step; or a :class:`~pyro_elbo_ext.History` to record to.

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
        infinite (naming site, term and step), a latent site is missing from the guide and not marked to be summed out, an
        analytic KL is asked for where none is valid, ``kl_weight`` or ``free_bits`` names a site that has no
        ``kl_prior`` or shares it with others, or an ``nn.Module`` in use is not registered with Pyro.

    References
    ----------
    Wingate and Weber (2013), "Automated variational inference in probabilistic programming".
    Ranganath, Gerrish and Blei (2014), "Black box variational inference".
    Kucukelbir et al. (2017), "Automatic differentiation variational inference".
    Kingma et al. (2016), "Improved variational inference with inverse autoregressive flow", section C.8: free bits.
    Obermeyer et al. (2019), "Tensor variable elimination for plated factor graphs": sums over discrete sites.
    """

    @with_pyros_arguments
    def __init__(
        self,
        *args: Any,
        kl: KLChoice = "auto",
        kl_weight: KLWeight = 1.0,
        free_bits: FreeBits | None = None,
        gradient: GradientName | Gradient = "pathwise",
        history: bool | History = True,
        **options: Unpack[PyrosArguments],
    ) -> None:
        super().__init__(
            *args, kl=kl, kl_weight=kl_weight, free_bits=free_bits, gradient=gradient, history=history, **options
        )
        self._last: list[Particle] | Particles | None = None

    @property
    def last(self) -> Terms | None:
        """Detached terms of the last evaluation; None before the first."""
        if self._last is None:
            return None
        if isinstance(self._last, Particles):
            return self._last.terms()
        if len(self._last) > 1:
            return stack_particles([Terms({term.site: term for term in particle.terms}) for particle in self._last])
        return Terms({term.site: term for term in self._last[0].terms}, self.num_particles)

    # Discrete sites that are summed over

    def marginals(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> xr.Dataset:
        """Probabilities of the states of the discrete sites that are summed over, labelled; at one new draw per particle.

        A variable for each such site: its dims are its plates and ``{site}_state``, whose coordinates are the states. Of a
        site that the model sums out these are posterior probabilities given the draws of the other sites; of one that the
        guide enumerates, the guide's. ``elbo.last.marginals()`` has those of the last evaluation.
        """
        before = self._last
        try:
            with torch.no_grad():
                self._evaluate(model, guide, args, kwargs, with_gradient=False)
            terms = self.last
            assert terms is not None
            return terms.marginals()
        finally:
            self._last = before

    def compute_marginals(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> dict[str, Distribution]:
        """Pyro's own: the marginal distribution of each site that the model sums out; see :meth:`marginals`."""
        found: dict[str, Distribution] = self._pyros_own().compute_marginals(model, guide, *args, **kwargs)
        return found

    def sample_posterior(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Any:
        """Pyro's own: runs the model with the sites that it sums out drawn from their posterior; returns what it returns."""
        return self._pyros_own().sample_posterior(model, guide, *args, **kwargs)

    def _pyros_own(self) -> TraceEnum_ELBO:
        vectorized = self.vectorize_particles is True and self.num_particles > 1
        return TraceEnum_ELBO(
            num_particles=self.num_particles,
            max_plate_nesting=self.max_plate_nesting - vectorized,
            vectorize_particles=vectorized,
            strict_enumeration_warning=False,
        )

    # One evaluation

    def _evaluate(
        self, model: Program, guide: Program, args: Args, kwargs: Kwargs, *, with_gradient: bool
    ) -> Evaluation:
        weights, given = self._site_weights()
        if not self._by_terms:
            evaluation, self._last = estimate_bound(
                self,
                bounds.ELBO(),
                model,
                guide,
                args,
                kwargs,
                kl_weights=weights,
                reason=f"gradient='{self.gradient}' takes log q at the draw",
                with_gradient=with_gradient,
            )
            evaluation.kl_weight = given
            return evaluation
        pair = self._pairs(model, guide)
        given_call = pair, model, guide, args, kwargs
        ledger, signature, particles, infos, traces = self._by_enumeration(
            pair,
            lambda: self._evaluate_plain(*given_call),
            lambda begun: evaluate_enumerated(self, *given_call, begun, differentiable=not weights.is_one),
        )
        repeats = len(particles)
        info: tuple[SiteInfo, ...] = ()
        numbers: list[Number] = []

        def read(host: list[float]) -> Totals:
            nonlocal info, numbers
            numbers = list(host)
            rows = [row(particle.slots, of, host) for particle, of in zip(particles, infos, strict=True)]
            info, values = average(infos, rows, self.num_particles // repeats)
            reconstruction = math.fsum(
                [of[0] for site, of in zip(info, values, strict=True) if site.kind == "observed"]
            )
            kl_total = math.fsum([of[2] for site, of in zip(info, values, strict=True) if site.kind != "observed"])
            return reconstruction, kl_total, values

        scalars = ledger.stacked()
        reconstruction, kl_total, values = self._transfer(scalars, read)
        if not math.isfinite(reconstruction - kl_total):
            self._raise_not_finite(info, values, traces)
        self._last = particles
        by_particle = self.history is not None and self.history.gradient_mode == "particles"
        shares = ledger.surrogate_shares if by_particle else ledger.surrogate_loss
        if weights.is_uniform:
            penalty = weights.others * kl_total
        else:
            if self._traced is not None:
                numbers = list(scalars.double().unbind())
            penalty, weights = weights.penalty(*sums_by_site(particles, numbers, self.num_particles))
            if self._traced is not None:
                self._traced.penalty = torch.as_tensor(penalty, dtype=torch.float64)
        objective: Any = reconstruction - penalty  # a number, but while a graph is traced, which has its own
        surrogate = partial(shares, self.num_particles, weights)
        return Evaluation(pair, signature, info, values, objective, given, surrogate, list, traces)

    def _evaluate_plain(self, pair: Pair, model: Program, guide: Program, args: Args, kwargs: Kwargs) -> Evaluated:
        batched = self._evaluate_batch(pair, model, guide, args, kwargs)
        return batched or self._evaluate_loop(pair, model, guide, args, kwargs)

    def _evaluate_loop(self, pair: Pair, model: Program, guide: Program, args: Args, kwargs: Kwargs) -> Evaluated:
        """Particles one after the other, or all of them in Pyro's particle plate."""
        ledger = Ledger()
        particles: list[Particle] = []
        infos: list[tuple[SiteInfo, ...]] = []
        runs: list[tuple[Trace, Trace]] = []
        repeats, model, guide = self._programs(model, guide, args, kwargs)
        rest: Beginnings = queue.LifoQueue()
        model, first = self._looking_for_marks(pair, model, guide, rest)
        begins, guide = first is not guide, first
        for _ in range(repeats):
            ledger.begin_particle()
            tracker = DependencyTracker() if self._is_tracked(pair, args, kwargs) else None
            with tracker or nullcontext():
                traces = trace_pair(model, guide, args, kwargs, tracker and tracker.enter_model)
                if begins and is_marked(*traces):
                    raise Begun(traces, rest, tracker)
                model_trace, guide_trace = traces
                signature = signature_of(model_trace, guide_trace, args, kwargs)
                if is_validation_enabled() or signature not in pair.structures:
                    check_pair(model_trace, guide_trace)
                    if is_validation_enabled():
                        check_model_guide_match(model_trace, guide_trace, self.max_plate_nesting)
                is_new = signature not in pair.structures and self._traced is None
                structure = self._structure(pair, signature, model_trace, guide_trace, tracker)
            if is_new:
                check_draws(model_trace)
            runs.append((model_trace, guide_trace))
            sites = read_sites(model_trace, guide_trace, structure.sites)
            self._check_sites(sites)
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
                    max_plate_nesting=self.max_plate_nesting,
                    ledger=ledger,
                    counts_latent=self._free_bits is not None,
                )
            )
        return Evaluated(ledger, signature, particles, infos, runs)

    def _evaluate_batch(
        self, pair: Pair, model: Program, guide: Program, args: Args, kwargs: Kwargs
    ) -> Evaluated | None:
        """All particles in one run; None if they cannot be batched."""
        batch = self._batch(pair, model, guide, args, kwargs)
        if batch is None:
            return None
        signature = signature_of(*batch.reference, args, kwargs)
        structure = self._structure(pair, signature, *batch.reference, None)
        found: dict[str, KLPrior] = {}

        def derive(model_trace: Trace, guide_trace: Trace) -> dict[str, Tensor]:
            tensors = {}
            for site in read_sites(model_trace, guide_trace, structure.sites):
                if site.kind != "observed":
                    found[site.name] = kl = self._kl_prior(site, structure)
                    tensors.update({f"value of {site.name}": kl.value, f"log_q of {site.name}": kl.log_q})
            return {name: tensor for name, tensor in tensors.items() if tensor is not None}

        batched = batch.draw(model, guide, args, kwargs, self.num_particles, self.estimator, derive)
        if batched is None:
            return None
        model_trace, guide_trace = batched.draw.model_trace, batched.draw.guide_trace
        sites = read_sites(model_trace, guide_trace, structure.sites)
        self._check_sites(sites)
        kls = [
            None
            if site.kind == "observed"
            else found[site.name]._replace(
                value=batched.derived.get(f"value of {site.name}"), log_q=batched.derived.get(f"log_q of {site.name}")
            )
            for site in sites
        ]
        info = self._describe(pair, signature, sites, kls)
        if self.kl == "analytic":
            self._report(info)
        ledger = Ledger()
        ledger.begin_particle()
        particle = evaluate(
            sites,
            kls,
            model_trace,
            guide_trace,
            max_plate_nesting=math.inf,
            ledger=ledger,
            counts_latent=self._free_bits is not None,
        )
        return Evaluated(ledger, signature, [particle], [info], [(model_trace, guide_trace)])

    def forget(self) -> None:
        self._last = None
