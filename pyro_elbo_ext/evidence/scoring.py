"""Log densities of model and guide at many draws: the guide's own, or draws that come from elsewhere.

All draws of a chunk are run at once through ``torch.vmap`` where that gives the same as one by one, else one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pyro.distributions import Delta
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from tqdm import tqdm

from pyro_elbo_ext.bounds import Pathwise
from pyro_elbo_ext.evidence.scores import NO_ARRAY, Array, Joined, Scores
from pyro_elbo_ext.evidence.structure import check_density, factors
from pyro_elbo_ext.inference_data.draws import to_numpy
from pyro_elbo_ext.particles.batched_draws import Batch
from pyro_elbo_ext.particles.batching import run_batched
from pyro_elbo_ext.particles.supply import CannotBatch, Supply
from pyro_elbo_ext.programs.densities import check_observed, log_prob, score_parts
from pyro_elbo_ext.programs.faults import NO_LATENT, cause, dirac
from pyro_elbo_ext.programs.given import check_full, values_of
from pyro_elbo_ext.programs.nodes import is_latent, is_point_mass, is_random
from pyro_elbo_ext.programs.pairs import Marked, check_pair
from pyro_elbo_ext.programs.points import point_estimate, point_sites
from pyro_elbo_ext.programs.running import check_callable, trace_pair
from pyro_elbo_ext.terms.enumeration.marginal_model import without_marks
from pyro_elbo_ext.terms.folding import transform_of, unpack
from pyro_elbo_ext.terms.terms import outline, read_sites


@dataclass(slots=True)
class Scorer:
    """A model and a guide at fixed parameters and data, whose log densities are wanted at many draws.

    Attributes
    ----------
    reference : tuple of Trace
        Model's and guide's trace of one ordinary run, without subsample sites.
    latents : tuple of str
        The model's latent sites.
    not_local : dict of str to str
        Plates over which the model does not factorize, and why.
    eps : float
        Relative rounding error of the densities seen so far.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch_size: int
    progress: bool
    reference: tuple[Trace, Trace] = field(init=False)
    latents: tuple[str, ...] = field(init=False)
    not_local: dict[str, str] = field(init=False)
    eps: float = field(init=False, default=0.0)
    _batch: Batch = field(init=False)
    _plates: dict[str, tuple[int, int, frozenset[str]]] = field(init=False)
    _outside: dict[str, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        check_callable(self.model, "model", self.args, self.kwargs)
        check_callable(self.guide, "guide", self.args, self.kwargs)

        def check(model_trace: Trace, guide_trace: Trace) -> None:
            check_pair(model_trace, guide_trace)
            check_full(guide_trace)
            check_full(model_trace)

        with torch.no_grad():
            try:
                self._batch = Batch.start(self.model, self.guide, self.args, self.kwargs, None, check)
            except Marked:
                self.model, self.guide = without_marks(self.model, self.guide, self.args, self.kwargs)
                self._batch = Batch.start(self.model, self.guide, self.args, self.kwargs, None, check)
        model_trace, guide_trace = self._batch.reference
        self.reference = prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)
        self.batch_size = self._batch.at_once(self.batch_size)
        self.latents = tuple(name for name, node in self.reference[0].nodes.items() if is_random(node))
        if not self.latents:
            raise ValueError(NO_LATENT)
        points = point_sites(*self.reference, self.model, self.guide, self.args, self.kwargs)
        if points:
            raise ValueError(point_estimate(points))
        for name, node in self.reference[0].nodes.items():
            if is_latent(node) and is_point_mass(node["fn"]) and not is_point_mass(self.reference[1].nodes[name]["fn"]):
                raise ValueError(dirac(node))
        check_density(*self.reference)
        with torch.no_grad():
            check_observed(self.reference[0])
        self._plates, self.not_local = factors(read_sites(*self.reference))

    @property
    def looped(self) -> str | None:
        """Why the draws are run one by one, None while they are run at once."""
        return self._batch.reason

    @torch.no_grad()
    def draw(self, count: int) -> Scores:
        """``count`` draws of the guide.

        Raises
        ------
        ValueError
            If a draw, or a log density, is NaN or the density of the guide is not finite; the site is named.
        """
        joined = Joined(count)
        with tqdm(total=count, desc="draws", disable=not self.progress) as bar:
            programs = self.model, self.guide, self.args, self.kwargs
            for model_trace, guide_trace, size in self._batch.chunks(*programs, count, self.batch_size):
                joined.add(self._read(model_trace, guide_trace, size, joined.done, own=True))
                bar.update(size or 1)
        return joined.scores()

    @torch.no_grad()
    def at(self, draws: Mapping[str, Tensor]) -> Scores:
        """Draws that come from elsewhere.

        Parameters
        ----------
        draws
            Every latent site of the model to its values, shape ``(S, *plates, *event)``.

        Raises
        ------
        ValueError
            If a site is missing or of another shape, or if the guide cannot make these values: the site is named.
        """
        draws = self._checked(draws)
        given = self.guide_values(draws)
        count = len(next(iter(draws.values())))
        joined = Joined(count)
        with tqdm(total=count, desc="posterior draws", disable=not self.progress) as bar:
            while (done := joined.done) < count:
                size = min(self.batch_size, count - done)
                if size > 1 and self.looped is None:
                    part = {name: value[done : done + size] for name, value in given.items()}
                    try:
                        batched = self.run(part, size)
                    except CannotBatch as error:
                        self._batch.reason = str(error)
                        continue
                    joined.add(self._read(batched[0], batched[1], size, done, own=False))
                else:
                    with Supply({name: value[done] for name, value in given.items()}, {}):
                        traces = trace_pair(self.model, self.guide, self.args, self.kwargs)
                    joined.add(self._read(*traces, None, done, own=False))
                bar.update(joined.done - done)
        scores = joined.scores()
        for name, value in draws.items():
            self._check_reproduced(name, value, scores.values[name])
        return scores

    @torch.no_grad()
    def draw_batch(self, count: int) -> Trace | None:
        """The guide's trace of ``count`` draws made at once; None if they can only be run one by one."""
        drawn = self._batch.draw(self.model, self.guide, self.args, self.kwargs, count, Pathwise())
        return None if drawn is None else drawn.draw.guide_trace

    def run(self, given: Mapping[str, Tensor], count: int) -> tuple[Trace, Trace]:
        """Traces of model and guide at values of the guide's own random sites, all at once; differentiable.

        Raises
        ------
        CannotBatch
            If they can only be run one by one.
        """
        batched = run_batched(self.model, self.guide, self.args, self.kwargs, count, self._batch.reference, draws=given)
        return batched.model_trace, batched.guide_trace

    def guide_values(self, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the guide's random sites must have drawn to give these values of the model's latent sites.

        A site of the guide with a density is the value itself. An autoguide's auxiliary site is made of the values in
        unconstrained space: one site's (``{site}_unconstrained``), or those of several, one after the other.
        """
        model_trace, guide_trace = self.reference
        count = len(next(iter(draws.values())))
        deltas = [name for name in self.latents if isinstance(guide_trace.nodes[name]["fn"], Delta)]
        found: dict[str, Tensor] = {}
        for name, node in guide_trace.nodes.items():
            if not is_random(node):
                continue
            if name in draws:
                found[name] = draws[name]
                continue
            partner = name.removesuffix("_unconstrained")
            if partner in deltas:
                found[name] = transform_of(model_trace.nodes[partner]).inv(draws[partner])
                continue
            blocks = unpack(name, node["value"], _in_order(deltas, guide_trace), model_trace, guide_trace)
            if not blocks or node["value"].dim() != 1:
                raise ValueError(
                    f"guide site '{name}' cannot be computed from the latent sites of the model, so that the guide's "
                    "density at draws from elsewhere is not known. Use a guide that draws each latent site, or one of "
                    "Pyro's autoguides with a joint or a factorized density in unconstrained space."
                )
            parts = [transform_of(model_trace.nodes[site]).inv(draws[site]) for site in blocks]
            found[name] = torch.cat([part.reshape(count, part[0].numel()) for part in parts], -1)
        return found

    def _checked(self, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name in self.latents:
            if name not in draws:
                raise ValueError(
                    f"the posterior draws lack latent site '{name}'; they have {', '.join(draws) or 'none'}"
                )
            value = self.reference[0].nodes[name]["value"]
            tensor = torch.as_tensor(draws[name], device=value.device).to(value.dtype)
            if tensor.shape[1:] != value.shape:
                raise ValueError(
                    f"the posterior draws of site '{name}' have shape {tuple(tensor.shape)}, not (draws, "
                    f"{', '.join(map(str, value.shape))})"
                )
            if not torch.isfinite(tensor).all():
                raise ValueError(f"site '{name}' has NaN or infinite posterior draws")
            found[name] = tensor
        counts = {name: len(tensor) for name, tensor in found.items()}
        if len(set(counts.values())) != 1:
            raise ValueError(f"the posterior has different numbers of draws at different sites: {counts}")
        return found

    def _check_reproduced(self, name: str, given: Tensor, made: Tensor) -> None:
        if not given.is_floating_point():
            same = torch.equal(given, made)
        else:
            several = len(given) > 1 and given.numel()
            spread = given.reshape(len(given), -1).std(0).max() if several else given.new_zeros(())
            same = bool(((given - made).abs() <= 1e-3 * given.abs() + 1e-3 * spread + 1e-6).all())
        if not same:
            raise ValueError(
                f"the guide does not give back the posterior draws of site '{name}': its support in the guide is not that "
                "in the model, as where the support depends on another latent site. Use a guide that draws the site itself."
            )

    def _read(self, model_trace: Trace, guide_trace: Trace, size: int | None, start: int, *, own: bool) -> Scores:
        """The scores of a batch of ``size`` draws, or of one ordinary run."""
        count = 1 if size is None else size
        log_p, log_q, log_prior = np.zeros(count), np.zeros(count), np.zeros(count)
        local = {plate: np.zeros((count, width)) for plate, (_, width, _) in self._plates.items()}
        sites = read_sites(model_trace, guide_trace, outline(model_trace, guide_trace))
        for site in sites:
            parts = [] if site.p is None else [(1.0, log_prob(site.p, model_trace))]
            parts += [(-1.0, score_parts(node, guide_trace).log_prob) for node in site.q]
            for sign, density in parts:
                density = torch.as_tensor(density)
                self.eps = max(self.eps, torch.finfo(density.dtype).eps)
                if size is None:
                    density = density.unsqueeze(0)
                total = to_numpy(
                    density.flatten(1).sum(1, dtype=torch.float64) if density.dim() > 1 else density.double()
                )
                _check_finite(
                    total, site.name, "model" if sign > 0 else "guide", start, own, (model_trace, guide_trace)
                )
                if sign > 0:
                    log_p += total
                    if site.kind == "latent":
                        log_prior += total
                else:
                    log_q += total
                for plate, (dim, width, inside) in self._plates.items():
                    if site.name in inside:
                        local[plate] += sign * _along(density, dim, width)
            if site.kind == "observed":
                self._watch_outside(site.name, total)
        values = {}
        for name, value in values_of(prune_subsample_sites(model_trace)).items():
            known = self.reference[0].nodes.get(name)
            shape = None if known is None else known["value"].shape
            if (
                shape is None
                or value.shape[value.dim() - len(shape) :] != shape
                or value.numel() != count * shape.numel()
            ):
                raise ValueError(NO_ARRAY.format(name))
            values[name] = value.detach().reshape(count, *shape)
        for name in self.latents:  # imputed elements too, which are no values to report
            value = guide_trace.nodes[name]["value"]
            values.setdefault(name, value.detach().reshape(count, *self.reference[0].nodes[name]["value"].shape))
        return Scores(values, log_p, log_q, log_prior, {plate: local[plate] for plate in self._plates})

    def _watch_outside(self, name: str, total: Array) -> None:
        """An observed site outside a plate is a constant factor, or else the model does not factorize over the plate."""
        first = self._outside.setdefault(name, float(total[0]))
        if np.all(total == first):
            return
        for plate in [plate for plate, (_, _, inside) in self._plates.items() if name not in inside]:
            del self._plates[plate]
            self.not_local[plate] = f"observed site '{name}' is outside it and depends on the latent sites"


def _in_order(deltas: list[str], guide_trace: Trace) -> list[str]:
    return [name for name in guide_trace.nodes if name in deltas]


def _along(density: Tensor, dim: int, width: int) -> Array:
    """A density of shape ``(S, ..., *batch)`` summed over all but the draws and one dim."""
    if density.dim() == 1 or density.dim() <= -dim:
        # cannot happen for a site in the plate, whose batch shape has its dim
        raise AssertionError(f"density of shape {tuple(density.shape)} has no dim {dim}")
    moved = density.movedim(dim, 1)
    total = moved.flatten(2).sum(2, dtype=torch.float64) if moved.dim() > 2 else moved.double()
    return to_numpy(total.expand(len(density), width))


def _check_finite(total: Array, site: str, where: str, start: int, own: bool, traces: tuple[Trace, Trace]) -> None:
    """-inf is legal for the model, a draw outside its support; and for the guide at draws that are not its own."""
    bad = np.isnan(total) | (total == np.inf)
    if where == "guide" and own:
        bad |= total == -np.inf
    if bad.any():
        index = int(np.flatnonzero(bad)[0])
        reason = cause(*traces)
        raise ValueError(
            ("" if reason is None else f"{reason}\n")
            + f"the log density of site '{site}' in the {where} is {total[index]} at draw {start + index}, and not finite "
            f"in {int(bad.sum())} of {len(total)}. Look for parameters of the guide or model, or data, that are "
            "NaN or infinite."
        )
