"""What part of the data each process has, and what weight that gives its ELBO.

Let process r evaluate a batch of B_r of N data, so that the plate that holds them scales its sites by N / B_r::

    ELBO_r = N / B_r  sum_{n in batch r} f_n  +  g,

with f_n the terms of one datum (its likelihood, less ``kl_prior`` of its own latents) and g those outside the plate. With
B = sum_r B_r and weights w_r = B_r / B, which sum to 1,

    sum_r w_r ELBO_r = N / B  sum_{all n} f_n  +  g,

which is the ELBO of all batches taken together. It is linear in them, so that gradients average alike; batches of one size
have equal weights. If the processes draw the latents outside the plate anew, g and f_n are averages over those draws, as
with several particles.

A model that does not scale its batch is right too if all its sites are inside the plate of the batch, as in many
autoencoders: its ELBO is that of the batch, and that of all batches together is the sum, so that all weights are 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pyro.distributions import Unit
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_elbo_ext.programs.nodes import PARTICLE_PLATE, is_deterministic
from pyro_elbo_ext.training.distributed.random_streams import is_split

Floats = NDArray[np.float64]


class Survey(Messenger):
    """Sees which plates a run of model and guide has, and which of its data nothing scales.

    Attributes
    ----------
    plates : dict of str to (int, int)
        Size of each plate and its full size, of which the size is a subsample.
    split : set of str
        The plates that hold a part of their data.
    sites_in_split : set of str
        The sites inside these.
    unscaled : dict of str to Tensor
        The values of observed sites that have weight 1, outside these.
    shared : set of str, or None
        The plates that every site is inside; None before the first site.
    """

    def __init__(self) -> None:
        super().__init__()
        self.plates: dict[str, tuple[int, int]] = {}
        self.split: set[str] = set()
        self.sites_in_split: set[str] = set()
        self.unscaled: dict[str, Tensor] = {}
        self.shared: set[str] | None = None

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) or is_deterministic(msg):
            return
        around = {frame.name for frame in msg["cond_indep_stack"]} - {PARTICLE_PLATE}
        self.shared = around if self.shared is None else self.shared & around
        for frame in msg["cond_indep_stack"]:
            full = frame.size if frame.full_size is None else frame.full_size
            self.plates[frame.name] = int(frame.size), int(full)
            if frame.size < full:
                self.split.add(frame.name)
        if is_split(msg):
            self.sites_in_split.add(msg["name"])
        elif msg["is_observed"] and not isinstance(msg["fn"], Unit) and isinstance(msg["value"], Tensor):
            scale = msg["scale"]
            if bool((scale == 1).all()) if isinstance(scale, Tensor) else scale == 1:
                self.unscaled[msg["name"]] = msg["value"]

    def digests(self) -> dict[str, str]:
        """A digest of each of the unscaled data, to compare between processes."""
        return {name: _digest(value) for name, value in self.unscaled.items()}


def _digest(value: Tensor) -> str:
    data = value.detach().cpu().contiguous()
    number = hashlib.blake2b(data.view(-1).view(torch.uint8).numpy().tobytes() if data.numel() else b"", digest_size=16)
    return f"{tuple(data.shape)} {data.dtype} {number.hexdigest()}"


@dataclass(frozen=True, slots=True)
class Report:
    """What a process found in a run of a kind that is new to it.

    Attributes
    ----------
    sites : tuple of (str, str)
        Names and kinds of the sites that the history records.
    plates, split : tuple of str
        All plates, and those that hold a part of their data.
    shared : tuple of str
        The plates that every site is inside.
    digests : dict of str to str
        Of the data that nothing scales.
    parameters : dict of str to tuple
        Shapes of the parameters that the loss depends on, by name.
    """

    sites: tuple[tuple[str, str], ...]
    plates: tuple[str, ...]
    split: tuple[str, ...]
    shared: tuple[str, ...]
    digests: Mapping[str, str]
    parameters: Mapping[str, tuple[int, ...]]


def check_reports(reports: Sequence[Report]) -> bool:
    """Whether the ELBOs of the processes are to be summed, not averaged: those of batches that nothing scales.

    Raises ValueError, the same in all processes, if they do not train the same model, or would train it wrongly.
    """
    count = len(reports)
    first = reports[0]
    for number, report in enumerate(reports):
        if report.sites != first.sites:
            differing = sorted({site for site, _ in set(report.sites) ^ set(first.sites)}) or ["their order"]
            raise ValueError(
                f"processes 0 and {number} have different sites: {', '.join(differing)}. Model and guide must have the same "
                "sites in every process: do not let them depend on the process's data."
            )
        lacking = sorted({name for other in reports for name in other.split} - set(report.plates))
        if lacking:
            raise ValueError(f"plate '{lacking[0]}' is in another process, but not in process {number}")
        check_shapes(first.parameters, report.parameters, number)
    for name, digest in first.digests.items():
        others = [number for number, report in enumerate(reports) if report.digests.get(name, digest) != digest]
        if others and not first.split and set(first.shared).intersection(*(of.shared for of in reports)):
            return True
        if others:
            raise ValueError(
                f"site '{name}' has other data in process {others[0]} than in process 0, but its weight is 1, while other "
                f"sites are shared by all data: the mean over {count} processes would count the data {count} times too "
                "little. Give the plate of the batch its full size, pyro.plate(name, N, subsample_size=len(batch)), where "
                "N is the size of the whole data set, not of the process's part."
            )
    return False


def check_shapes(first: Mapping[str, tuple[int, ...]], other: Mapping[str, tuple[int, ...]], number: int) -> None:
    """Raise ValueError if the parameters of process ``number`` are not those of process 0, by name and shape."""
    for name in sorted(set(first) | set(other)):
        shapes = [of.get(name) for of in (first, other)]
        if shapes[0] != shapes[1]:
            found = [f"shape {shape}" if shape is not None else "not used" for shape in shapes]
            raise ValueError(
                f"parameter '{name}' is in process 0: {found[0]}, in process {number}: {found[1]}. Parameters must be the "
                "same in every process: do not let them depend on the process's own data; size them by the whole data set."
            )


def weights_of(plates: Sequence[str], sizes: Floats, full_sizes: Floats) -> Floats:
    """The weights of the processes' ELBOs, which sum to 1.

    Parameters
    ----------
    plates
        The plates that hold a part of their data, P of them.
    sizes, full_sizes : (R, P) arrays
        Their sizes in each process: of the batch, and of the data set.

    Returns
    -------
    (R,) array

    Raises
    ------
    ValueError
        If the full size of a plate differs between processes; or if batches differ in size, and several plates do so in
        different proportion, so that no weights are right. Names the plate and the sizes.
    """
    count = len(sizes)
    for i, name in enumerate(plates):
        if (full_sizes[:, i] != full_sizes[0, i]).any():
            raise ValueError(
                f"plate '{name}' has size {_listed(full_sizes[:, i])} in processes 0 to {count - 1}: it must be the size of "
                "the whole data set in all of them, not that of the process's part."
            )
    if not len(plates) or (sizes == sizes[0]).all():
        return np.full(count, 1 / count)
    shares = sizes / sizes.sum(0)
    for i, name in enumerate(plates):
        # cross-multiplied, whole numbers
        if (sizes[:, i] * sizes[:, 0].sum() != sizes[:, 0] * sizes[:, i].sum()).any():
            raise ValueError(
                f"the batches of processes 0 to {count - 1} have sizes {_listed(sizes[:, 0])} in plate '{plates[0]}' but "
                f"{_listed(sizes[:, i])} in plate '{name}': no weights make their mean the ELBO of all batches together. "
                "Give all processes batches of one size, as DistributedSampler(drop_last=True) does with a DataLoader of "
                "drop_last=True."
            )
    return np.asarray(shares[:, 0])


def _listed(sizes: Floats) -> str:
    return ", ".join(f"{size:.0f}" for size in sizes)


def merge(values: Floats, weights: Floats, split: NDArray[np.bool_]) -> Floats:
    """The values of sites for all batches together, from those of each process.

    Parameters
    ----------
    values : (R, S, 6) array
        In the columns of :data:`pyro_elbo_ext.history.record.VALUES`.
    weights : (R,) array
        Of :func:`weights_of`, or ones.
    split : (S,) array
        Whether each site is inside a plate that holds a part of its data.

    Returns
    -------
    (S, 6) array
        Weighted sums; but scales are means, and that of a site in a split plate is N over the size of all batches together.
    """
    merged = np.einsum("r,rsv->sv", weights, values)
    merged[:, 3] = weights @ values[:, :, 3] / weights.sum()
    merged[split, 3] = 1 / (1 / values[:, split, 3]).sum(0)
    return merged
