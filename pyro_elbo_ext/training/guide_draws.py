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

_AT_ONCE = 4096


def draw_guide(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    count: int,
) -> dict[str, Tensor]:
    """``count`` draws of the guide: latent and deterministic sites of the model, each of shape (count, ...).

    All at once through ``torch.vmap`` where the programs allow it, else one after the other.

    Raises
    ------
    ValueError
        If a plate subsamples, or a site is not in every draw.
    """

    def check(model_trace: Trace, guide_trace: Trace) -> None:
        check_pair(model_trace, guide_trace)
        check_full(guide_trace)
        check_full(model_trace)

    chunks: list[dict[str, Tensor]] = []
    batch = Batch.start(model, guide, args, kwargs, None, check)
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
