"""One evaluation of an objective, and what is remembered of the programs from one to the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyro.poutine import Trace
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from pyro_elbo_ext.history.history import SiteInfo
from pyro_elbo_ext.particles.batched_draws import Batch, CallKey
from pyro_elbo_ext.terms.kl import Structure

Program = Callable[..., Any]
Signature = tuple[object, ...]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Floats = NDArray[np.float64]
Values = list[tuple[float, ...]]
Totals = tuple[float, float, Values]  # reconstruction (or the bound), kl_prior, and each site's numbers
Read = Callable[[list[float]], Totals]
Weight = float | list[float]  # of ``kl_prior``: one, or those of the sites that are named

MAX_STRUCTURES = 64  # of a program whose sites vary without end


@dataclass(slots=True)
class Pair:
    """What has been found out about one (model, guide)."""

    structures: dict[Signature, Structure] = field(default_factory=dict)
    infos: dict[Signature, tuple[SiteInfo, ...]] = field(default_factory=dict)
    enumerates: bool | None = None  # whether sites are marked for enumeration; None before the first run
    track_next: bool = True  # the dependencies of the sites last seen are not known
    tracked: set[CallKey] = field(default_factory=set)  # where weights by site need the dependencies in every run
    registered: set[Signature] = field(default_factory=set)
    max_plate_nesting: int | None = None
    batches: dict[CallKey, Batch] = field(default_factory=dict)


@dataclass(slots=True)
class Traced:
    """An evaluation that is being traced into a graph; see :mod:`pyro_elbo_ext.compile`.

    ``kl_weight`` is an input of the graph: a scalar, or the weights of the sites that are named, shape ``(sites,)``.
    ``scalars`` become an output, which ``read``, linear in them, makes into what the history takes. ``penalty`` is what
    the objective takes off the reconstruction where it is not ``kl_weight`` times ``kl_prior``.
    """

    kl_weight: Tensor
    scalars: Tensor | None = None
    read: Read | None = None
    penalty: Tensor | None = None

    def transfer(self, scalars: Tensor, read: Read) -> Totals:
        """Keep both; give the numbers of this one run."""
        self.scalars, self.read = scalars, read
        with disable_proxy_modes_tracing():
            return read(scalars.detach().tolist())


@dataclass(slots=True)
class Evaluation:
    """One evaluation of an objective.

    Attributes
    ----------
    sites, values
        What the history takes: the sites, and for each its numbers.
    objective : float
        The bound, or the weighted ELBO; what the history calls by that name.
    kl_weight : float or list of float
        The weight of ``kl_prior``, or those of the sites that are named.
    surrogate : callable
        Gives each particle's share of a function whose gradient estimates that of the *loss*, shape ``(K,)``, or their
        sum, a scalar, where the particles' shares cannot be told apart.
    model_parameters : callable
        Gives the names of the parameters that the model has and the guide has not.
    traces
        Model's and guide's, of each run.
    """

    pair: Pair
    signature: Signature
    sites: tuple[SiteInfo, ...]
    values: Values
    objective: float
    kl_weight: Weight
    surrogate: Callable[[], Tensor]
    model_parameters: Callable[[], list[str]]
    traces: Sequence[tuple[Trace, Trace]] = ()


def signature_of(model_trace: Trace, guide_trace: Trace, args: Args, kwargs: Kwargs) -> Signature:
    """What tells one structure of a program from another: its sites, and the flags and names it was called with."""
    signature: list[object] = []
    for trace in (model_trace, guide_trace):
        for name, node in trace.nodes.items():
            if node["type"] == "sample":
                signature += (name, node["fn"].__class__, node["is_observed"], node["infer"].get("enumerate"))
    for key, value in (*enumerate(args), *kwargs.items()):
        if value is None or isinstance(value, bool | str):
            signature += (key, value)
    return tuple(signature)
