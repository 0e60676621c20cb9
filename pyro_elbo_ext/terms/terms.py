"""From the traces of a Pyro model and guide to the terms of the ELBO.

For one draw ``z`` of the guide ``q`` and a model ``p(x, z)``, with the sites of each plate, mask and scale weighted as
Pyro weighs them::

    ELBO = sum over observed sites of log p(x | z)  -  sum over guide sites of (log q(z) - log p(z))
           `------- reconstruction -------'            `------------- kl_prior -------------'

``kl_prior`` is ``KL(q || prior)``, the part of the ELBO; it is not the gap ``KL(q || posterior)`` between the ELBO and
``log p(x)``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from pyro.poutine import Trace
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_elbo_ext.programs.nodes import PARTICLE_PLATE, Node, is_deterministic, is_point_mass

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

    from pyro_elbo_ext.terms.states import States

Kind = Literal["observed", "latent", "auxiliary"]
Method = Literal["analytic", "sampled", "enumerated", "marginalized"]


# ----------------------------------------------------------------------------------------------------------------------
# Sites: which nodes of the two traces belong together


@dataclass(frozen=True, slots=True)
class Site:
    """The nodes of model and guide that make up one term; see :class:`Term` for the kinds.

    ``q`` holds the guide nodes whose densities together are the site's: itself, or an autoguide's auxiliary draw and the
    Delta that transforms it.
    """

    name: str
    kind: Kind
    p: Node | None
    q: tuple[Node, ...]

    @property
    def is_point(self) -> bool:
        """Whether it is latent and all that the guide has of it is a point mass."""
        return self.kind == "latent" and len(self.q) == 1 and is_point_mass(self.q[0]["fn"])


Outline = tuple[tuple[str, Kind, tuple[str, ...]], ...]  # name, kind, and the guide nodes of each site


def outline(model_trace: Trace, guide_trace: Trace, densities: Mapping[str, tuple[str, ...]] | None = None) -> Outline:
    """The sites that contribute to the ELBO, the model's first, in the order of the program.

    Parameters
    ----------
    model_trace, guide_trace
        From `programs.running`.
    densities
        Latent site -> guide sites whose densities together are its own, where that is not the guide site of its name
        alone. Auxiliary sites among them are not listed by themselves.
    """
    densities = densities or {}
    sites: list[tuple[str, Kind, tuple[str, ...]]] = []
    for name, node in model_trace.nodes.items():
        if _has_density(node):
            summed_out = node["is_observed"] or ("_enumerate_dim" in node["infer"] and name not in guide_trace.nodes)
            kind: Kind = "observed" if node["is_observed"] else "latent"
            sites.append((name, kind, () if summed_out else densities.get(name, (name,))))
    shared = {part for parts in densities.values() for part in parts}
    latent = {name for name, kind, _ in sites if kind == "latent"}
    for name, node in guide_trace.nodes.items():
        if _has_density(node) and name not in shared and name not in latent:
            sites.append((name, "auxiliary", (name,)))
    return tuple(sites)


def _has_density(node: Node) -> bool:
    return node["type"] == "sample" and not is_deterministic(node) and not site_is_subsample(node)


def read_sites(model_trace: Trace, guide_trace: Trace, sites: Outline | None = None) -> list[Site]:
    """The traces' nodes, by site, as listed in their :func:`outline`."""
    model_nodes, guide_nodes = model_trace.nodes, guide_trace.nodes
    return [
        Site(
            name, kind, None if kind == "auxiliary" else model_nodes[name], tuple([guide_nodes[part] for part in parts])
        )
        for name, kind, parts in (outline(model_trace, guide_trace) if sites is None else sites)
    ]


def latent_values(model_trace: Trace, guide_trace: Trace) -> dict[str, Tensor]:
    """Detached draws of the model's latent sites, in the model's order."""
    return {
        name: guide_trace.nodes[name]["value"].detach()
        for name, node in model_trace.nodes.items()
        if node["type"] == "sample" and not node["is_observed"]
    }


# ----------------------------------------------------------------------------------------------------------------------
# Terms


@dataclass(frozen=True, slots=True, repr=False)
class Term:
    """One site's contribution to the ELBO.

    Attributes
    ----------
    site : str
        Name of the site.
    kind : {"observed", "latent", "auxiliary"}
        Observed data or ``pyro.factor`` in the model; latent in both; or a guide site that the model does not have.
    log_p : Tensor or None
        Scaled and masked log density of the model at the draw, in nats, shape ``(*particles, *batch_shape)``; None for an
        auxiliary site.
    log_q_parts : tuple of Tensor
        ``log_q`` is their sum; two where an autoguide's auxiliary draw and its Delta are read as one density.
    analytic_kl_prior : Tensor or None
        ``KL(q || prior)`` in closed form, scaled and masked, same shape; None where it is sampled.
    kl_method : {"analytic", "sampled"} or None
        How ``kl_prior`` is computed; None for observed sites.
    kl_reason : str or None
        Why.
    cond_indep_stack : tuple of CondIndepStackFrame
        Pyro's enclosing plates; see ``plates`` for their names.
    scale : float or Tensor
        Weight of the site, e.g. data size over batch size.
    mask : bool, Tensor or None
        Which elements count.
    states : tuple of States
        Of a discrete site that is summed over: its states and their weights, for each looped particle.
    """

    site: str
    kind: Kind
    log_p: Tensor | None
    log_q_parts: tuple[Tensor, ...]
    analytic_kl_prior: Tensor | None
    kl_method: Method | None
    kl_reason: str | None
    cond_indep_stack: tuple[CondIndepStackFrame, ...]
    scale: float | Tensor
    mask: bool | Tensor | None
    states: tuple[States, ...] = ()

    @property
    def log_q(self) -> Tensor | None:
        """Scaled and masked log density of the guide at the draw, shape as ``log_p``; None for an observed site."""
        return functools.reduce(torch.add, self.log_q_parts) if self.log_q_parts else None

    @property
    def plates(self) -> tuple[str, ...]:
        """Names of the enclosing plates, outermost first, without the particle plate."""
        return tuple(frame.name for frame in self.cond_indep_stack if frame.name != PARTICLE_PLATE)

    @property
    def reconstruction(self) -> Tensor | None:
        """``log p(x | z)``, shape ``(*particles, *batch_shape)``; None unless the site is observed."""
        return self.log_p if self.kind == "observed" else None

    @property
    def kl_prior(self) -> Tensor | None:
        """The site's share of ``KL(q || prior)``, same shape: analytic, or ``log q - log p``; None if observed."""
        if self.kind == "observed":
            return None
        if self.analytic_kl_prior is not None:
            return self.analytic_kl_prior
        assert self.log_q is not None
        return self.log_q if self.log_p is None else self.log_q - self.log_p

    def __repr__(self) -> str:
        parts: list[str] = [self.kind]
        for name in ("log_p", "log_q", "kl_prior"):
            value = getattr(self, name)
            if value is not None:
                shape = f", the sum of {'x'.join(map(str, value.shape))}" if value.dim() else ""
                parts.append(f"{name}={float(value.sum()):.4f}{shape}")
        parts += [f"{self.kl_method}: {self.kl_reason}"] if self.kl_method else []
        return f"Term({self.site!r}, {'; '.join(parts)})"


@dataclass(frozen=True, slots=True)
class Terms(Mapping[str, Term]):
    """The terms of the ELBO by site, for one or several particles.  Without the ``kl_weight``: the true ELBO.

    Attributes
    ----------
    by_site : dict of str to Term
    num_particles : int
        If more than one, dimension 0 of every tensor is the particle.
    contributions : dict of str to float, or None
        Each site's weighted contribution to a bound that is not linear in the log weights, in nats:
        ``sum_k g_k (log p_k - log q_k)`` with g the bound's gradient in the log weights (for IWAE the normalized
        weights). It is not a KL, and the contributions do not sum to the bound. None for the ELBO.
    """

    by_site: dict[str, Term]
    num_particles: int = 1
    contributions: dict[str, float] | None = None

    def __getitem__(self, site: str) -> Term:
        return self.by_site[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_site)

    def __len__(self) -> int:
        return len(self.by_site)

    @property
    def reconstruction(self) -> float:
        """``E_q[log p(x | z)]``, averaged over particles, in nats."""
        return self._mean(term.reconstruction for term in self.by_site.values())

    @property
    def kl_prior(self) -> float:
        """``KL(q || prior)``, averaged over particles, in nats."""
        return self._mean(term.kl_prior for term in self.by_site.values())

    @property
    def elbo(self) -> float:
        """``reconstruction - kl_prior``, in nats."""
        return self.reconstruction - self.kl_prior

    @property
    def log_weights(self) -> Tensor:
        """``log p(x, z) - log q(z)`` of each particle from the sampled densities, shape ``(num_particles,)``."""
        total: Tensor | float = 0.0
        for term in self.by_site.values():
            for value, sign in ((term.log_p, 1.0), (term.log_q, -1.0)):
                if value is not None:
                    total = total + sign * self._by_particle(value)
        return torch.as_tensor(total).expand(self.num_particles)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per site: summed over the batch, averaged over particles, in nats; with ``contribution`` if known."""
        rows = [
            {
                "site": term.site,
                "kind": term.kind,
                "log_p": math.nan if term.log_p is None else self._mean([term.log_p]),
                "log_q": math.nan if term.log_q is None else self._mean([term.log_q]),
                "reconstruction": self._mean([term.reconstruction]),
                "kl_prior": self._mean([term.kl_prior]),
                "kl_method": term.kl_method,
                "kl_reason": term.kl_reason,
                "scale": float(torch.as_tensor(term.scale, dtype=torch.float64).mean()),
                "plates": term.plates,
            }
            for term in self.by_site.values()
        ]
        import pandas as pd  # takes a third of a second: not before there is a table to make

        frame = pd.DataFrame(rows)
        if self.contributions is not None:
            frame["contribution"] = frame["site"].map(self.contributions)
        return frame

    def marginals(self) -> xr.Dataset:
        """Probabilities of the states of the discrete sites that are summed over, averaged over particles.

        Returns
        -------
        xarray.Dataset
            A variable for each such site: dims are its plates and ``{site}_state``, whose coordinates are the states, or
            their numbers where they are vectors. Of a site that the model sums out these are posterior probabilities given
            the draws of the other sites; of one that the guide enumerates, the guide's.
        """
        import xarray as xr  # as pandas: only when asked for

        variables = {}
        for name, term in self.by_site.items():
            if not term.states:
                continue
            frames = sorted(
                [frame for frame in term.cond_indep_stack if frame.vectorized], key=lambda frame: frame.dim or 0
            )
            each = []
            for states in term.states:
                table = states.probabilities
                table = (
                    table.reshape((1,) * (1 - (frames[0].dim or 0) - table.dim()) + table.shape) if frames else table
                )
                table = table.reshape(*[table.shape[frame.dim - 1] for frame in frames if frame.dim], table.shape[-1])
                if frames and frames[0].name == PARTICLE_PLATE:
                    table = table.mean(0)
                each.append(table)
            dims = [frame.name for frame in frames if frame.name != PARTICLE_PLATE] + [f"{name}_state"]
            labels = {f"{name}_state": term.states[0].labels.cpu().numpy()}
            variables[name] = xr.DataArray(torch.stack(each).mean(0).cpu().numpy(), labels, dims)
        return xr.Dataset(variables)

    def __repr__(self) -> str:
        head = f"Terms(elbo={self.elbo:.4f}, reconstruction={self.reconstruction:.4f}, kl_prior={self.kl_prior:.4f})"
        if not self.by_site:
            return head
        return head + "\n" + self.to_dataframe().drop(columns=["kl_reason"]).to_string(index=False)

    def _repr_html_(self) -> str:
        return self.to_dataframe().to_html(index=False, na_rep="", float_format="{:.4f}".format)

    def _by_particle(self, value: Tensor) -> Tensor:
        if self.num_particles == 1:
            return value.sum()
        return value.flatten(1).sum(1) if value.dim() > 1 else value

    def _mean(self, values: Iterable[Tensor | None]) -> float:
        total = math.fsum(float(value.sum()) for value in values if value is not None)
        return total / self.num_particles


def stack_particles(particles: list[Terms]) -> Terms:
    """Join the terms of looped particles, each with ``num_particles=1``, along a new dimension 0.

    A site that only some particles have (a model whose structure varies) contributes zeros in the others; where its shape
    varies too, sums over its batch are joined.
    """
    if len(particles) == 1:
        return particles[0]
    joined = {}
    for name in dict.fromkeys(name for terms in particles for name in terms):
        present = [terms.by_site.get(name) for terms in particles]
        first = next(term for term in present if term is not None)
        analytic = [None if term is None else term.analytic_kl_prior for term in present]
        if any(kl is None for kl in analytic):  # not all analytic: join what they amount to
            analytic = [None if term is None or first.analytic_kl_prior is None else term.kl_prior for term in present]
        log_q = _join([None if term is None else term.log_q for term in present])
        joined[name] = replace(
            first,
            log_p=_join([None if term is None else term.log_p for term in present]),
            log_q_parts=() if log_q is None else (log_q,),
            analytic_kl_prior=_join(analytic),
            states=tuple([states for term in present if term is not None for states in term.states]),
        )
    return Terms(joined, len(particles))


def _join(values: list[Tensor | None]) -> Tensor | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    if any(value.shape != known[0].shape for value in known):
        known, values = [known[0].sum()], [None if value is None else value.sum() for value in values]
    return torch.stack([torch.zeros_like(known[0]) if value is None else value for value in values])
