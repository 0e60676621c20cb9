"""Local latent sites: those with one value per datum, inside a data plate; read for VAE-like models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.distributions import Delta
from pyro.poutine import Trace
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor
from torch.distributions import Distribution

from pyro_elbo_ext.programs.arguments import names_of
from pyro_elbo_ext.programs.densities import log_prob
from pyro_elbo_ext.programs.nodes import PARTICLE_PLATE, Node, is_marked_site
from pyro_elbo_ext.programs.pairs import check_pair
from pyro_elbo_ext.programs.running import trace_pair
from pyro_elbo_ext.terms.dependencies import DependencyTracker
from pyro_elbo_ext.terms.kl import read_structure
from pyro_elbo_ext.terms.terms import Outline, Site, read_sites

Program = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class LocalRun:
    """One run of guide and model, with the local latent sites picked out.

    Attributes
    ----------
    local : tuple of Site
        The sites asked for; each has one guide node, whose draw was not computed from any other guide site.
    others : tuple of Site
        All other sites of the ELBO.
    plate : CondIndepStackFrame
        The data plate; its ``dim`` is negative.
    """

    model_trace: Trace
    guide_trace: Trace
    local: tuple[Site, ...]
    others: tuple[Site, ...]
    plate: CondIndepStackFrame
    outline: Outline

    @property
    def scale(self) -> float:
        """Data size over batch size, where the plate subsamples."""
        return self.plate.full_size / self.plate.size if self.plate.full_size else 1.0

    @property
    def subsample(self) -> Tensor | None:
        """Indices of the data of this run where the plate subsamples, shape ``(size,)``; else None."""
        if self.scale == 1.0:
            return None
        node: Any = self.model_trace.nodes[self.plate.name]
        return torch.as_tensor(node["value"])

    def has_plate(self, node: Node) -> bool:
        return any(frame.name == self.plate.name for frame in node["cond_indep_stack"])

    def by_datum(self, log_density: Tensor) -> Tensor:
        """Log density of a site in the plate summed over its other batch dims: ``batch_shape`` to ``(size,)``."""
        assert self.plate.dim is not None
        return log_density.movedim(self.plate.dim, 0).reshape(self.plate.size, -1).sum(1)

    def log_prior(self) -> Tensor:
        """Sum over the local sites of ``log p`` at the draw, not scaled up, in nats, shape ``(size,)``."""
        return (
            torch.stack([self.by_datum(log_prob(_p(site), self.model_trace)) for site in self.local]).sum(0)
            / self.scale
        )

    def reconstruction(self) -> tuple[Tensor, Tensor]:
        """``log p(x | z)`` of the sites in the plate, not scaled up, shape ``(size,)``; and of those outside, a scalar."""
        like = self.local[0].q[-1]["value"]
        inside, outside = like.new_zeros(self.plate.size), like.new_zeros(())
        for site in self.others:
            if site.kind == "observed":
                node = _p(site)
                value = log_prob(node, self.model_trace)
                if self.has_plate(node):
                    inside = inside + self.by_datum(value) / self.scale
                else:
                    outside = outside + value.sum()
        return inside, outside


def _p(site: Site) -> Node:
    assert site.p is not None
    return site.p


def distribution(site: Site) -> Distribution:
    """Guide's distribution of a local site, with the data plate among its batch dims."""
    fn: Distribution = site.q[-1]["fn"]
    return fn


def run_local(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    site: str | Sequence[str] | None,
    plate: str | None,
) -> LocalRun:
    """Run guide and model once, and find the local sites and their plate.

    Parameters
    ----------
    site
        Latent sites to look at; by default all latent sites in the plate.
    plate
        Name of the data plate; by default the one plate that these sites and an observed site share.

    Raises
    ------
    KeyError
        If there is no such latent site or plate.
    ValueError
        If the plate is not determined, or a site is not in it; if a local site has no density of its own in the guide, is
        drawn from other guide sites, or is scaled or masked.
    """
    with DependencyTracker() as tracker:
        model_trace, guide_trace = trace_pair(model, guide, args, dict(kwargs), tracker and tracker.enter_model)
        _check_not_summed_out(model_trace, guide_trace)
        check_pair(model_trace, guide_trace, enumerated=True)  # marked sites of the guide are drawn, as any other
        structure = read_structure(model_trace, guide_trace, tracker)
    sites = read_sites(model_trace, guide_trace, structure.sites)
    frame = _find_plate(sites, _names(site), plate)
    wanted = _names(site)
    local = [s for s in sites if s.kind == "latent" and (s.name in wanted if wanted else _in(s, frame.name))]
    for one in local:
        if not _in(one, frame.name):
            raise ValueError(f"site '{one.name}' is not in plate '{frame.name}' in model and guide: it is not local")
        _check_density(one)
        value = one.q[0]["value"]
        assert frame.dim is not None
        by_datum = (
            value.movedim(frame.dim - one.q[0]["fn"].event_dim, 0).flatten(1) if value.dim() > 1 else value[:, None]
        )
        check_finite(by_datum.double().sum(1), f"the draw of site '{one.name}'")
        sources = structure.drawn_from.get(one.q[-1]["name"], frozenset())
        if sources:
            raise ValueError(
                f"the guide draws site '{one.name}' given {', '.join(sorted(sources))}, so it has no q(z | x_n) of its own. "
                "Only local sites that the guide draws from the data alone can be looked at: name these in site=[...]."
            )
    names = {one.name for one in local}
    others = tuple([s for s in sites if s.name not in names])
    run = LocalRun(model_trace, guide_trace, tuple(local), others, frame, structure.sites)
    for one in local:
        for node in (_p(one), *one.q):
            _check_unweighted(node, run.scale)
    return run


def run_again(
    run: LocalRun, model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> LocalRun:
    """Another run of the same sites, without the cost of finding out about them."""
    model_trace, guide_trace = trace_pair(model, guide, args, dict(kwargs))
    sites = {site.name: site for site in read_sites(model_trace, guide_trace, run.outline)}
    local, others = (tuple([sites[site.name] for site in of]) for of in (run.local, run.others))
    return replace(run, model_trace=model_trace, guide_trace=guide_trace, local=local, others=others)


def _check_not_summed_out(model_trace: Trace, guide_trace: Trace) -> None:
    for name, node in model_trace.nodes.items():
        if is_marked_site(node) and name not in guide_trace:
            raise ValueError(
                f"site '{name}' is summed out of the model, so that p(x | z) of a datum is a sum over it, which is not "
                f"looked at here. Give the guide pyro.sample('{name}', ...), marked or not: then it is a site as any other."
            )


def _names(site: str | Sequence[str] | None) -> tuple[str, ...]:
    if site is None:
        return ()
    names = tuple(names_of("site", site))
    if not names:
        raise ValueError("site names no site: give the name of a latent site, or None for all in the plate")
    return names


def _plates(node: Node) -> dict[str, CondIndepStackFrame]:
    return {
        frame.name: frame for frame in node["cond_indep_stack"] if frame.vectorized and frame.name != PARTICLE_PLATE
    }


def _in(site: Site, plate: str) -> bool:
    return site.p is not None and plate in _plates(site.p) and all(plate in _plates(node) for node in site.q)


def _find_plate(sites: Sequence[Site], wanted: tuple[str, ...], plate: str | None) -> CondIndepStackFrame:
    latent = {s.name: s for s in sites if s.kind == "latent"}
    for name in wanted:
        if name not in latent:
            raise KeyError(f"'{name}' is no latent site of the model; there are {', '.join(latent) or 'none'}")
    frames = {name: frame for s in latent.values() for name, frame in _plates(_p(s)).items()}
    if plate is not None:
        if plate not in frames:
            raise KeyError(f"no latent site is in a plate '{plate}'; the plates are {', '.join(frames) or 'none'}")
        return frames[plate]
    data = {name for s in sites if s.kind == "observed" for name in _plates(_p(s))}
    of_sites = [set(_plates(_p(latent[name]))) for name in wanted] or [set(frames)]
    shared = data.intersection(*of_sites)
    if len(shared) != 1:
        found = f"several plates, {', '.join(sorted(shared))}," if shared else "no plate"
        raise ValueError(
            f"{found} shared by an observed site and {', '.join(wanted) or 'a latent site'}: name the data plate with "
            "plate=..., and put the local latents and the data in it (with pyro.plate(...))."
        )
    return frames[shared.pop()]


def _check_density(site: Site) -> None:
    if len(site.q) != 1 or isinstance(site.q[0]["fn"], Delta):
        raise ValueError(
            f"site '{site.name}' has no density of its own in the guide (a Delta, or a transformed auxiliary site): write "
            f"it as pyro.sample('{site.name}', q) with a distribution per datum."
        )


def _check_unweighted(node: Node, plate_scale: float) -> None:
    scale = torch.as_tensor(node["scale"]) / plate_scale
    is_masked = node["mask"] is not None and node["mask"] is not True
    if is_masked or not torch.allclose(scale, torch.ones_like(scale)):
        raise ValueError(
            f"site '{node['name']}' is scaled or masked: the terms are those of the unweighted ELBO. Leave poutine.scale "
            "and poutine.mask off the latent sites (for a weight in training, DecomposedELBO(kl_weight=...))."
        )


def check_all_data(run: LocalRun) -> None:
    """Raise a ValueError if the plate subsamples."""
    if run.scale != 1.0:
        raise ValueError(
            f"plate '{run.plate.name}' subsamples {run.plate.size} of {run.plate.full_size}, but all data are needed. Call "
            "with a model and guide without subsampling, or give the data in batches=[...]."
        )


def as_batches(args: tuple[Any, ...], batches: Iterable[Any] | None) -> list[tuple[Any, ...]]:
    """Arguments of model and guide for each part of the data.

    Raises
    ------
    ValueError
        If both are given, or ``batches`` is empty.
    """
    if batches is None:
        return [args]
    if args:
        raise ValueError("give the data either as arguments or as batches=[...], not both")
    listed = [tuple(batch) if isinstance(batch, list | tuple) else (batch,) for batch in batches]
    if not listed:
        raise ValueError("batches is empty: give the arguments of model and guide for each part of the data")
    return listed


def check_cover(runs: Sequence[LocalRun], given_in_batches: bool) -> None:
    """Raise a ValueError unless the runs together have each datum once, as far as the plate tells."""
    if not given_in_batches:
        check_all_data(runs[0])
        return
    parts = [run.subsample for run in runs]
    known = [part for part in parts if part is not None]
    if not known:
        return
    full = runs[0].plate.full_size
    indices = torch.cat(known)
    if len(known) < len(parts) or len(indices) != full or len(indices.unique()) != full:
        raise ValueError(
            f"the batches draw {len(indices)} indices, {len(indices.unique())} of them different, of plate "
            f"'{runs[0].plate.name}' with {full} data: each datum must come once. Pass indices to the plate, "
            "pyro.plate(name, size, subsample=indices)."
        )


def check_finite(value: Tensor, what: str) -> None:
    """Raise a ValueError if the tensor, one element per datum, has NaN or infinite elements."""
    bad = ~torch.isfinite(value)
    if bad.any():
        raise ValueError(
            f"{what} is NaN or infinite for {int(bad.sum())} of {bad.numel()} data, first at index "
            f"{int(bad.flatten().nonzero()[0])}. Look for parameters or data that are NaN."
        )
