"""Whether a model counts a batch for as many data as there are."""

from __future__ import annotations

import math

import torch
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample

from pyro_elbo_ext.programs.nodes import is_data
from pyro_elbo_ext.training.batches import Call, batch_length


def check_scale(model_trace: Trace, call: Call, dataset_size: int) -> None:
    """Raise a ValueError if an observed site stands for another number of data than there are.

    With N data in batches of B, the log likelihood of a batch must count N / B times, as ``pyro.plate("data", N,
    subsample_size=B)`` does, or else priors and ``kl_prior`` of what all data share weigh too much. Where no latent site is
    outside the plate of the batch, an unscaled model is right too: the ELBO is then that of the batch.

    Parameters
    ----------
    model_trace
        Of one batch.
    call
        The batch; B is the length of its first tensor.
    dataset_size
        N.
    """
    size = batch_length(call)
    if size is None:
        return
    wanted = dataset_size / size
    nodes = {name: node for name, node in model_trace.nodes.items() if node["type"] == "sample"}
    for name, node in nodes.items():
        if not is_data(node):
            continue
        frames = [frame for frame in node["cond_indep_stack"] if frame.size == size]
        if not frames and size != 1:
            continue  # not one datum for each row
        scale = float(torch.as_tensor(node["scale"], dtype=torch.float64).mean())
        if math.isclose(scale, wanted, rel_tol=1e-3):
            continue
        inside = {frame.name for frame in frames}
        shared = [
            other
            for other, latent in nodes.items()
            if not latent["is_observed"]
            and not inside & {frame.name for frame in latent["cond_indep_stack"]}
            and not other.startswith("_")
            and not site_is_subsample(latent)
        ]
        if math.isclose(scale, 1.0, rel_tol=1e-3) and not shared:
            continue
        plate = frames[0].name if frames else "data"
        because = f", which latent site '{shared[0]}' is shared by" if shared else ""
        raise ValueError(
            f"observed site '{name}' counts each of the {size} data of a batch {scale:g} times, for {size * scale:g} data "
            f"in all, but there are {dataset_size}{because}. Write pyro.plate('{plate}', {dataset_size}, subsample_size="
            f"{size}) with the size of the batch, or pass dataset_size= if {dataset_size} is not the number of data."
        )
