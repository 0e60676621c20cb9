"""Draws of a fitted guide as tensors, in the model's constrained space."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_elbo_ext.particles.batched_draws import Batch
from pyro_elbo_ext.programs.given import check_full, values_of
from pyro_elbo_ext.programs.pairs import check_pair
from pyro_elbo_ext.terms.enumeration.at_draws import AtDraws
from pyro_elbo_ext.terms.enumeration.marks import check_drawn, latent_names
from pyro_elbo_ext.terms.enumeration.posterior_draws import completed, draw_states
from pyro_elbo_ext.terms.enumeration.traces import is_marked

_AT_ONCE = 4096


def draw_guide(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    count: int,
) -> dict[str, Tensor]:
    """``count`` draws of the guide: latent and deterministic sites of the model, each of shape (count, ...).

    All at once through ``torch.vmap`` where the programs allow it, else one after the other. Sites that are summed out of
    the model are drawn from their exact posterior given the guide's.

    Raises
    ------
    ValueError
        If a plate subsamples, or a site is not in every draw.
    """

    marked: list[tuple[Trace, Trace]] = []

    def check(model_trace: Trace, guide_trace: Trace) -> None:
        if is_marked(model_trace, guide_trace):
            marked.append((model_trace, guide_trace))
            return
        check_pair(model_trace, guide_trace)
        check_full(guide_trace)
        check_full(model_trace)

    chunks: list[dict[str, Tensor]] = []
    batch = Batch.start(model, guide, args, kwargs, None, check)
    if marked:
        return _completed(model, guide, args, kwargs, count, marked[0])
    shapes = {
        name: torch.as_tensor(value).shape
        for name, value in values_of(prune_subsample_sites(batch.reference[0])).items()
    }
    for model_trace, guide_trace, size in batch.chunks(model, guide, args, kwargs, count, _AT_ONCE):
        if size is None:
            check_pair(model_trace, guide_trace)
        values = values_of(prune_subsample_sites(model_trace))
        if values.keys() != shapes.keys():
            odd = sorted(values.keys() ^ shapes.keys())
            raise ValueError(f"site '{odd[0]}' is not in every draw: a model whose sites vary has no array of draws")
        chunks.append(
            {name: torch.as_tensor(v).detach().reshape(size or 1, *shapes[name]) for name, v in values.items()}
        )
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in shapes}


def _completed(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    count: int,
    pair: tuple[Trace, Trace],
) -> dict[str, Tensor]:
    """Draws of the guide alone, sites that it marks drawn like any other, completed by what the model marks."""
    check_drawn(*pair)
    batch = Batch.start(_nothing, guide, args, kwargs, None, lambda _, guide_trace: check_full(guide_trace))
    reference = batch.reference[1]
    wanted = [name for name in latent_names(pair[0]) if name in reference]
    parts: dict[str, list[Tensor]] = {name: [] for name in wanted}
    if wanted:
        for _, guide_trace, size in batch.chunks(_nothing, guide, args, kwargs, count, _AT_ONCE):
            for name, chunks in parts.items():
                value = guide_trace.nodes[name]["value"].detach()
                chunks.append(value.reshape(size or 1, *reference.nodes[name]["value"].shape))
    at = AtDraws(model, args, kwargs, {name: torch.cat(chunks) for name, chunks in parts.items()}, count)
    return completed(at, draw_states(at))


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands for the model, which is run at the draws afterwards."""
