"""Analytic or sampled?  Decided for each site, with the reason.

An analytic ``kl_prior`` of site ``z`` integrates ``log q(z) - log p(z | parents)`` over ``q(z)`` in closed form, at the
drawn values of the parents. That is unbiased if and only if no parent in the model was itself drawn from ``z`` in the
guide; see :mod:`pyro_elbo_ext.terms.dependencies`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from pyro.distributions import Delta
from pyro.distributions.util import sum_rightmost
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import Independent, LogNormal, Normal, TransformedDistribution
from torch.distributions import transforms as T

from pyro_elbo_ext.programs.nodes import Node
from pyro_elbo_ext.terms import closed_forms
from pyro_elbo_ext.terms.closed_forms import Weight
from pyro_elbo_ext.terms.dependencies import DependencyTracker, Sites
from pyro_elbo_ext.terms.folding import Fold, GaussianBlock, find_folds, gaussian_block, is_identity, transform_of
from pyro_elbo_ext.terms.terms import Method, Outline, Site, outline, read_sites

KLChoice = Literal["auto", "analytic", "sampled"]


class KLPrior(NamedTuple):
    """How the ``kl_prior`` of one site is computed, and why."""

    method: Method
    reason: str
    value: Tensor | None = None  # if analytic: scaled and masked, shape batch_shape
    log_q: Tensor | None = None  # the site's share, where it is not the sum over the site's guide nodes


@dataclass(frozen=True, slots=True)
class Structure:
    """What is known about a model and guide from one tracked run of them.

    Attributes
    ----------
    sites : Outline
        The sites of the ELBO.
    folds : dict
        Latent sites that an autoguide makes from an auxiliary Gaussian.
    parents : dict
        Latent site -> sites its prior depends on, through any computation and through the guide; None where unknown.
    drawn_from : dict
        Guide site -> other guide sites that its draw was computed from.
    """

    sites: Outline
    folds: Mapping[str, Fold] = field(default_factory=dict)
    parents: Mapping[str, Sites | None] = field(default_factory=dict)
    drawn_from: Mapping[str, Sites] = field(default_factory=dict)


def read_structure(model_trace: Trace, guide_trace: Trace, tracker: DependencyTracker | None) -> Structure:
    """Folds and dependencies of the traces; to be called while the ``tracker`` is still active.

    Without a tracker no dependency is known, so no KL is analytic; then sites that share an auxiliary vector are left as
    they stand in the trace.
    """
    parents: dict[str, Sites | None] = {}
    drawn_from: dict[str, Sites] = {}
    if tracker is not None:
        for site in read_sites(model_trace, guide_trace):
            for node in site.q:
                drawn_from[node["name"]] = tracker.of(node["value"]) - {node["name"]}
            if site.kind == "latent" and site.p is not None:
                try:
                    parents[site.name] = tracker.of_prior(site.p)
                except (RuntimeError, ValueError):
                    # A density known only at its own draws, such as a one-way flow's; or one that does not fit the value,
                    # which the term's own computation will report.
                    parents[site.name] = None
    folds = find_folds(model_trace, guide_trace)
    densities = {
        name: (fold.auxiliary,) if fold.identity else (fold.auxiliary, name)
        for name, fold in folds.items()
        if fold.block is None or tracker is not None
    }
    return Structure(outline(model_trace, guide_trace, densities), folds, parents, drawn_from)


def kl_prior(site: Site, structure: Structure) -> KLPrior:
    """Closed form of a latent or auxiliary site's ``kl_prior`` where it exists and is valid, else sampled.

    Parameters
    ----------
    site
        From :func:`read_sites` with ``structure.sites``.
    structure
        From :func:`read_structure`, for the same model and guide.
    """
    if site.kind == "auxiliary":
        return KLPrior("sampled", "auxiliary guide site: it has no prior")
    fold = structure.folds.get(site.name)
    q = site.q[-1]
    assert site.p is not None
    if fold is None and type(q["fn"]) is Delta:
        return _kl_of_delta(site, structure)
    invalid = _why_invalid(site, fold, structure)
    if fold is not None and fold.block is not None:
        return _kl_of_block(site.p, site.q[0], q, fold, structure, invalid)
    if invalid is not None:
        return KLPrior("sampled", invalid)
    try:
        if fold is None or fold.identity:  # an identity's q is the auxiliary Normal itself
            value, form = closed_forms.kl_prior(q["fn"], site.p["fn"], _weight(q), _weight(site.p))
            return KLPrior("analytic", form, value)
        block = gaussian_block(fold, site.p, site.q[0], given_earlier=True)
        return _kl_of_gaussian(block, site.p, site.q[0], q)
    except NotImplementedError as reason:
        return KLPrior("sampled", str(reason))


def _kl_of_delta(site: Site, structure: Structure) -> KLPrior:
    sources = structure.drawn_from.get(site.name)
    if sources is None:
        return KLPrior("sampled", "what its draw depends on is not known")
    if sources:
        return KLPrior("sampled", f"its Delta in the guide sits at a value computed from {', '.join(sorted(sources))}")
    assert site.p is not None
    p, q = site.p, site.q[-1]
    value = _weight(q)(q["fn"].log_density) - _weight(p)(p["fn"].log_prob(p["value"]))
    return KLPrior("analytic", "a Delta has a single draw", value)


def _why_invalid(site: Site, fold: Fold | None, structure: Structure) -> str | None:
    parents = structure.parents.get(site.name)
    if parents is None:
        return "what its prior depends on is not known (the sites changed since the dependencies were last tracked)"
    drawn_from_it = parents & ({site.name} if fold is None or fold.block is not None else {site.name, fold.auxiliary})
    if drawn_from_it:
        return f"a parent of '{site.name}' in the model is drawn from '{site.name}' in the guide"
    return None


def _weight(node: Node) -> Weight:
    return Weight(node["scale"], node["mask"])


def _kl_of_block(
    p: Node, auxiliary: Node, delta: Node, fold: Fold, structure: Structure, invalid: str | None
) -> KLPrior:
    """Share of one site in the joint density of an autoguide's auxiliary vector."""
    parents = structure.parents.get(p["name"]) or frozenset()
    siblings = {name for name, other in structure.folds.items() if other.auxiliary == fold.auxiliary} & parents
    others = {name for name in parents - siblings if fold.auxiliary in structure.drawn_from.get(name, ())}
    if invalid is None and others:
        invalid = f"a parent of '{p['name']}' in the model is drawn from the guide's vector '{fold.auxiliary}'"
    if invalid is None and not siblings <= fold.earlier:
        invalid = f"a parent of '{p['name']}' in the model comes later in the guide's vector '{fold.auxiliary}'"
    block = gaussian_block(fold, p, auxiliary, given_earlier=bool(siblings))
    log_q = sum_rightmost(block.log_q, block.log_q.dim() - len(p["fn"].batch_shape))
    log_q = _weight(auxiliary)(log_q)
    if not fold.identity:
        log_q = log_q + _weight(delta)(delta["fn"].log_density)
    if invalid is None:
        try:
            return _kl_of_gaussian(block, p, auxiliary, delta)._replace(log_q=log_q)
        except NotImplementedError as reason:
            invalid = str(reason)
    return KLPrior("sampled", invalid, log_q=log_q)


def _kl_of_gaussian(block: GaussianBlock, p: Node, auxiliary: Node, delta: Node) -> KLPrior:
    """Closed form for a site whose unconstrained value is Gaussian.

    The cross-entropy of a prior with independent elements needs only their means and variances; the entropy is the block's
    share by the chain rule, which is less than that of independent elements if the block is correlated.
    """
    prior, q_weight = p["fn"], _weight(auxiliary)
    transform = transform_of(p)
    normal: torch.distributions.Distribution = Normal(block.loc, block.scale, validate_args=False)
    if not is_identity(transform):
        if transform.domain.event_dim:
            raise NotImplementedError(f"no closed form is known for a Gaussian through {type(transform).__name__}")
        if not q_weight.same_as(_weight(delta)):
            raise NotImplementedError("the guide weighs the density and the Jacobian of this site differently")
        if isinstance(transform, T.ExpTransform):
            normal = LogNormal(block.loc, block.scale, validate_args=False)
        else:
            normal = TransformedDistribution(normal, [transform], validate_args=False)
    event_dims = prior.event_dim
    q = Independent(normal, event_dims, validate_args=False) if event_dims else normal
    value, form = closed_forms.kl_prior(q, prior, q_weight, _weight(p))
    if block.correlated:
        if not closed_forms.has_independent_elements(prior):
            raise NotImplementedError("the elements of the prior are dependent, and so are the guide's")
        independent = Normal(block.loc, block.scale, validate_args=False).entropy()
        value = value + q_weight(sum_rightmost(independent - block.entropy, event_dims))
    return KLPrior("analytic", form, value)
