r"""Whether a model counts every row of its batches once in an epoch, beside the priors of what all rows share.

Let batch k of K have B_k of N rows, which the model counts s_k times each, as ``pyro.plate("data", N, subsample_size=B_k)``
does with s_k = N / B_k. Over an epoch a row of batch k then counts s_k / K times. It must count once, or the posterior is
that of other data:

- in an order that is the same in every epoch, if s_k = K for all k, which N / B_k is where batches are of one size;
- in an order that changes, also if s_k = N / B_k, which is right on average over the orders.

Where no latent site is outside the plate of the rows, s_k need only be the same for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_elbo_ext.compile.tracing.static_check import nothing_changed
from pyro_elbo_ext.programs.arguments import check_count, named_arguments
from pyro_elbo_ext.programs.nodes import PARTICLE_PLATE, Node, is_deterministic, is_latent
from pyro_elbo_ext.programs.running import trace_pair
from pyro_elbo_ext.training.data.batches import Batches, Call, Order, Rows

EXACT = 1e-3  # relative error of a scale
UNEVEN = 0.01  # relative difference of the rows' weights over an epoch


class _Scale(NamedTuple):
    """How often a site counts each row of a batch."""

    batch: int | str  # which argument of the batch has the rows
    rows: int
    scale: float
    plate: str | None
    shared: str | None  # a latent site outside the plate, whose prior has weight 1 beside it


class ScaleCheck:
    """Looks at batches of every size, before the first step where they are known, else when they come.

    Parameters
    ----------
    model, guide
        The programs.
    dataset_size
        N, where the caller says it.
    """

    def __init__(
        self, model: Callable[..., Any], guide: Callable[..., Any], data: Batches, dataset_size: int | None
    ) -> None:
        self._programs, self._data, self._given = (model, guide), data, dataset_size
        self._seen: dict[str, dict[int, _Scale]] = {}  # site -> rows -> scale

    def __call__(self, call: Call, rows: Rows) -> None:
        """Run the programs on one batch, if it is the first of its size, and see that it counts as it must.

        Raises
        ------
        ValueError
            Naming the site, if it does not.
        """
        with nothing_changed(self._programs), torch.no_grad():
            model_trace, _ = trace_pair(*self._programs, *call)
        for name, scale in scales_of(model_trace, rows):
            _check_size(self._given, scale)
            self._seen.setdefault(name, {})[scale.rows] = scale
        self.judge()

    def judge(self) -> None:
        """Compare what has been seen with what is known of an epoch by now."""
        for name, scales in self._seen.items():
            self._judge(name, scales)

    def _judge(self, name: str, scales: Mapping[int, _Scale]) -> None:
        first = next(iter(scales.values()))
        sizes = self._data.rows_of_epoch(first.batch)
        total = self._given or self._data.dataset_size or (None if sizes is None else sum(sizes))
        even = sizes is None or max(sizes) == min(sizes)
        constant: float | None = first.scale
        if any(scale.shared for scale in scales.values()):
            constant = None if sizes is None or total is None else total * len(sizes) / sum(sizes)
        tolerance = EXACT if even else UNEVEN
        complete = even or (sizes is not None and set(sizes) <= scales.keys())
        alike = constant is not None and all(
            math.isclose(s.scale, constant, rel_tol=tolerance) for s in scales.values()
        )
        if total is None or (alike and (complete or constant == first.scale)):
            return
        for scale in scales.values():
            if not math.isclose(scale.scale, total / scale.rows, rel_tol=EXACT) and (
                complete or constant is None or not math.isclose(scale.scale, constant, rel_tol=UNEVEN)
            ):
                raise ValueError(_miscounted(name, scale, total))
        if complete and not even and self._data.order is Order.FIXED:
            assert sizes is not None
            raise ValueError(_uneven(name, sizes))


def scales_of(model_trace: Trace, rows: Rows) -> list[tuple[str, _Scale]]:
    """Every observed site of the model that has a row of the batch for each of its data, and how often it counts them."""
    nodes: dict[str, Node] = {name: node for name, node in model_trace.nodes.items() if node["type"] == "sample"}
    latents = {name: node for name, node in nodes.items() if is_latent(node) and not name.startswith("_")}
    found = []
    for name, node in nodes.items():
        if not node["is_observed"] or is_deterministic(node):
            continue
        batch = _batch_of(node, rows)
        if batch is None:
            continue
        frames = [f for f in node["cond_indep_stack"] if f.size == rows[batch] and f.name != PARTICLE_PLATE]
        inside = {frame.name for frame in frames}
        shared = [other for other, latent in latents.items() if not _is_local(latent, inside, rows[batch])]
        weights = {_scale(latents[other]) for other in shared}
        base = weights.pop() if len(weights) == 1 else 1.0  # of a model that is scaled as a whole
        scale = _scale(node) / base if base else _scale(node)
        plate = frames[0].name if frames else None
        found.append((name, _Scale(batch, rows[batch], scale, plate, shared[0] if shared else None)))
    return found


def _is_local(latent: Node, inside: set[str], count: int) -> bool:
    """Whether a latent site has a draw for each row: by plate, or by shape where the data's rows are in no plate."""
    if inside:
        return any(frame.name in inside for frame in latent["cond_indep_stack"])
    return count > 1 and count in latent["value"].shape


def _batch_of(node: Node, rows: Rows) -> int | str | None:
    """Which argument of the batch a site has a datum for each row of; None if there is none."""
    sizes = [frame.size for frame in node["cond_indep_stack"] if frame.name != PARTICLE_PLATE]
    fn = node["fn"]
    value = node["value"] if isinstance(node["value"], Tensor) else torch.as_tensor(0.0)
    shape = (*value.shape, *getattr(fn, "batch_shape", ()), *getattr(getattr(fn, "log_factor", None), "shape", ()))
    for wanted in (sizes, shape):  # declared, then not
        for name, count in rows.items():
            if count > 1 and count in wanted:
                return name
    if math.prod(shape) == 1:
        return next((name for name, count in rows.items() if count == 1), None)
    return None


def _scale(node: Node) -> float:
    return float(torch.as_tensor(node["scale"], dtype=torch.float64).mean())


def _miscounted(name: str, found: _Scale, total: int) -> str:
    rows, scale = found.rows, found.scale
    because = f", which latent site '{found.shared}' is shared by" if found.shared else ""
    return (
        f"observed site '{name}' counts each of the {rows} data of a batch {scale:g} times, for {rows * scale:g} data in "
        f"all, but there are {total}{because}. Write pyro.plate('{found.plate or 'data'}', {total}, subsample_size={rows}) "
        f"with the size of the batch, or pass dataset_size= if {total} is not the number of data."
    )


def _uneven(name: str, sizes: list[int]) -> str:
    least, most = min(sizes), max(sizes)
    weights = [sum(sizes) / (len(sizes) * size) for size in (least, most)]
    return (
        f"the batches have {least} to {most} rows, in the same order in every epoch, and observed site '{name}' is scaled "
        f"by the size of each: over an epoch each row of a batch of {least} counts {weights[0]:.2f} times, one of a batch "
        f"of {most} {weights[1]:.2f} times. Shuffle the data (DataLoader(..., shuffle=True)), leave the smaller batch out "
        "(drop_last=True), or make batches of one size."
    )


def check_whole(model: Callable[..., Any], guide: Callable[..., Any], call: Call, dataset_size: int) -> None:
    """Raise a ValueError if arguments that are the same at each step do not count as ``dataset_size`` data."""
    given = named_arguments(model, *call)
    length = next(((name, len(value)) for name, value in given if isinstance(value, Tensor) and value.dim()), None)
    if length is None:
        return
    with nothing_changed((model, guide)), torch.no_grad():
        model_trace, _ = trace_pair(model, guide, *call)
    for name, scale in scales_of(model_trace, dict([length])):
        _check_size(dataset_size, scale)
        if scale.shared is not None and not math.isclose(scale.scale, dataset_size / scale.rows, rel_tol=EXACT):
            raise ValueError(_miscounted(name, scale, dataset_size))


def check_dataset_size(size: Any) -> None:
    """Raise unless ``size`` is None or a number of data: a TypeError for what is no integer, a ValueError below 1."""
    if size is not None:
        check_count("dataset_size", size)


def _check_size(size: int | None, found: _Scale) -> None:
    if size is not None and size < found.rows:
        raise ValueError(
            f"dataset_size is {size}, but one batch has {found.rows} data: dataset_size is the number of all of them"
        )
