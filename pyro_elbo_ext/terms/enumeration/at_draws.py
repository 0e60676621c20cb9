"""A model whose marked sites are summed out, at many draws of its other latent sites: log factors of all draws at once.

What is enumerated and how the factors depend on it is Pyro's ``EnumMessenger``'s work; here one run of the model gives one
draw's factors, and ``torch.vmap`` runs the model for many draws where that gives the same. The draws are one more plate.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

import opt_einsum
import torch
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_elbo_ext.programs.densities import check_densities
from pyro_elbo_ext.programs.given import Given, check_full, run_given
from pyro_elbo_ext.programs.nodes import Node, is_data, is_latent, plate_nesting
from pyro_elbo_ext.programs.randomness import torch_kept
from pyro_elbo_ext.programs.running import trace_program
from pyro_elbo_ext.terms.enumeration.factors import model_factors
from pyro_elbo_ext.terms.enumeration.over_draws import OverDraws
from pyro_elbo_ext.terms.enumeration.traces import Enumerate

NUMBERS_AT_ONCE = 8_000_000  # log factors of all draws that are computed at once

Ordinal = frozenset[str]  # symbols of the plates that a factor is in
Tree = OrderedDict[Ordinal, list[Tensor]]


class Factor(NamedTuple):
    """What a site's log density is a function of.

    Attributes
    ----------
    site
        Its name.
    ordinal
        Symbols of its plates, those of size 1 left out.
    dims
        A symbol for each dim of the packed log density: plates and enumerated sites.
    shape
        Of the packed log density.
    kind
        "states" of an enumerated site, "observed" for data, or "other": another latent site, or a factor.
    """

    site: str
    ordinal: Ordinal
    dims: str
    shape: torch.Size
    kind: str


class Discrete(NamedTuple):
    """An enumerated site.

    Attributes
    ----------
    symbol
        Of its dim; None where it has one state only.
    support
        All its states, shape ``(K, *event_shape)``.
    batch_shape
        Of the site.
    """

    symbol: str | None
    support: Tensor
    batch_shape: torch.Size


class Factors(NamedTuple):
    """Log factors that depend on the enumerated sites, at ``size`` draws; and the log density of all the rest.

    Attributes
    ----------
    tensors : list of Tensor
        One for each `Factor`, shape ``(size, *shape)``.
    rest : Tensor
        Scaled and masked log density of the sites that depend on no enumerated one, shape ``(size,)``, float64.
    """

    tensors: list[Tensor]
    rest: Tensor

    @property
    def size(self) -> int:
        """Number of draws."""
        return len(self.rest)


class _Unmark(Messenger):
    """Sites that have draws are not enumerated, whatever their mark."""

    def __init__(self, names: Mapping[str, Any]) -> None:
        super().__init__()
        self._names = names

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self._names:
            msg["infer"] = {**msg["infer"], "enumerate": None}


@dataclass
class AtDraws:
    """A model with marked sites, at draws of all its other latent sites.

    Parameters
    ----------
    model, args, kwargs
        The program and its arguments.
    draws
        Latent site to its draws, shape ``(S, *value_shape)``: every latent site but those to be summed out. Of other names
        none is looked at.
    count
        Number of draws S; that of the draws by default, which a model without other latent sites needs.

    Attributes
    ----------
    reference : Trace
        One ordinary run at the first draw, without subsample sites.
    discrete : dict of str to Discrete
        The sites that are summed out, in the model's order; empty if nothing is marked.
    factors : list of Factor
        The log factors that depend on them.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    draws: Mapping[str, Tensor]
    count: int = 0

    def __post_init__(self) -> None:
        self.count = self.count or min((len(draws) for draws in self.draws.values()), default=1)
        self._run = OverDraws(self._one)
        with torch_kept(), torch.no_grad():
            first = {name: draws[0] for name, draws in self.draws.items()}
            self.reference = run_given(self.model, self.args, self.kwargs, first)
            self.marked = self._look(self.reference)
            check_densities(self.reference, finite=False)
            self.discrete: dict[str, Discrete] = {}
            self._enumerate(first)

    @property
    def looped(self) -> str | None:
        """Why the draws are run one after the other; None while they are run at once."""
        return self._run.looped

    # What is enumerated

    def _look(self, trace: Trace) -> list[str]:
        """Names of the sites to be summed out."""
        check_full(trace)
        found = []
        for name, node in trace.nodes.items():
            if not is_latent(node):
                continue
            if name in self.draws:
                shape, given = node["fn"].shape(), self.draws[name].shape[1:]
                if any(a != b for a, b in zip_longest(given[::-1], shape[::-1], fillvalue=1)):
                    raise ValueError(
                        f"the draws of site '{name}' have shape {tuple(given)} each, the site {tuple(shape)}"
                    )
            elif not node["infer"].get("enumerate"):
                raise ValueError(f"latent site '{name}' has no draws, and is not marked to be summed out")
            else:
                _check_mark(node)
                found.append(name)
        counts = {name: len(draws) for name, draws in self.draws.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"there are different numbers of draws at different sites: {counts}")
        return found

    def _enumerate(self, first: Mapping[str, Tensor]) -> None:
        self.nesting = plate_nesting(self.reference)
        trace = self._trace(first)
        self.factors: list[Factor]
        self.factors, tensors, _ = self._read(trace)
        self.scale = next((self.reference.nodes[f.site]["scale"] for f in self.factors if f.kind == "states"), 1.0)
        self.sum_dims = set("".join(f.dims for f in self.factors)) - set(trace.plate_to_symbol.values())
        self.symbol_to_dim = dict(trace.symbol_to_dim)
        self.plates = {symbol: name for name, symbol in trace.plate_to_symbol.items()}
        self.draws_symbol = opt_einsum.get_symbol(2 * len(trace.plate_to_symbol))  # as Pyro would call one more plate
        for name in self.marked:
            node = self.reference.nodes[name]
            event_shape = node["fn"].event_shape
            support = node["fn"].enumerate_support(expand=False)
            support = support.reshape(len(support), *event_shape)
            symbol = trace.nodes[name]["infer"]["_enumerate_symbol"] if len(support) > 1 else None
            self.discrete[name] = Discrete(symbol, support, node["fn"].batch_shape)
        numbers = sum(t.numel() for t in tensors) + sum(
            node["log_prob"].numel() + node["value"].numel()
            for node in trace.nodes.values()
            if node["type"] == "sample"
        )
        self.at_once = max(1, NUMBERS_AT_ONCE // max(1, numbers))

    def _trace(self, values: Mapping[str, Tensor]) -> Trace:
        """The enumerated run at one draw, its log densities packed."""
        model = Enumerate(first_available_dim=-1 - self.nesting)(_Unmark(self.draws)(self.model))
        with Given(values):
            trace = prune_subsample_sites(trace_program(model, self.args, self.kwargs))
        trace.compute_log_prob()
        trace.pack_tensors()
        return trace

    def _read(self, trace: Trace) -> tuple[list[Factor], list[Tensor], Tensor]:
        """The factors of one draw, their tensors, and the log density of the rest."""
        rest, tree, _, _, _ = model_factors(trace, Trace())
        sites = {
            id(tensor): name
            for name, node in trace.nodes.items()
            if node["type"] == "sample"
            for tensor in node["packed"].values()
        }
        factors, tensors = [], []
        for tensor in [tensor for terms in tree.values() for tensor in terms]:
            node = trace.nodes[sites[id(tensor)]]
            kind = "other"
            if node["infer"].get("_enumerate_dim") is not None:
                kind = "states"
            elif is_data(node):
                kind = "observed"
            # a plate of size 1 has no dim
            ordinal = frozenset(trace.plate_to_symbol[f.name] for f in _frames(node) if f.size > 1)
            factors.append(Factor(node["name"], ordinal, tensor._pyro_dims, tensor.shape, kind))
            tensors.append(tensor)
        costs = [torch.as_tensor(cost).sum(dtype=torch.float64) for terms in rest.values() for cost in terms]
        return factors, tensors, torch.stack(costs).sum() if costs else torch.zeros((), dtype=torch.float64)

    # Factors at draws

    def chunks(self, batch_size: int | None = None) -> Iterator[tuple[slice, Factors]]:
        """The factors of all draws, at most ``batch_size`` at a time and as many as memory allows."""
        done = 0
        while done < self.count:
            size = min(self.at_once, batch_size or self.at_once, self.count - done)
            part = slice(done, done + size)
            yield part, self._at(part)
            done += size

    def _at(self, part: slice) -> Factors:
        values = {name: draws[part] for name, draws in self.draws.items()}
        *tensors, rest = self._run(values, part.stop - part.start)
        dtype = functools.reduce(torch.promote_types, [t.dtype for t in tensors], torch.float16)
        return Factors([t.to(dtype) for t in tensors], rest)  # states of float32 and data of float64, say

    def _one(self, values: Mapping[str, Tensor]) -> list[Tensor]:
        factors, tensors, rest = self._read(self._trace(values))
        if factors != self.factors:
            odd = set(factors) ^ set(self.factors)
            site = min(factor.site for factor in odd) if odd else factors[0].site
            raise ValueError(
                f"the sites that depend on enumerated ones, or their shapes, vary from draw to draw, at site '{site}': a "
                "model whose structure varies cannot be summed out"
            )
        return [*tensors, rest]

    def tree(self, tensors: list[Tensor], chosen: Collection[int] | None = None) -> Tree:
        """The factors, all or those at the ``chosen`` positions, as Pyro's contractions take them.

        The draws are a plate around all others.
        """
        tree: Tree = OrderedDict()
        for index, (factor, tensor) in enumerate(zip(self.factors, tensors, strict=True)):
            if chosen is None or index in chosen:
                tensor._pyro_dims = self.draws_symbol + factor.dims  # type: ignore[attr-defined]
                tree.setdefault(factor.ordinal | {self.draws_symbol}, []).append(tensor)
        return tree

    def by_plate(self, packed: Tensor, dims: str, depth: int) -> Tensor:
        """A packed tensor with the draws in front, and ``depth`` dims for the plates behind, of size 1 where it has none."""
        plates = sorted(set(dims) - {self.draws_symbol}, key=self.symbol_to_dim.__getitem__)
        ordered = packed.permute([dims.index(symbol) for symbol in [self.draws_symbol, *plates]])
        shape = [1] * depth
        for symbol, size in zip(plates, ordered.shape[1:], strict=True):
            shape[self.symbol_to_dim[symbol]] = size
        return ordered.reshape(len(ordered), *shape)


def _check_mark(node: Node) -> None:
    name, infer = node["name"], node["infer"]
    if infer.get("num_samples") is not None or not getattr(node["fn"], "has_enumerate_support", False):
        raise ValueError(
            f"site '{name}' is marked for sums over draws of it (num_samples), which give no exact posterior of it. Mark "
            "discrete sites alone, by config_enumerate without num_samples."
        )
    if infer["enumerate"] != "parallel":
        raise ValueError(
            f"site '{name}' of the model is marked infer={{'enumerate': '{infer['enumerate']}'}}, which Pyro does in guides "
            "only. Mark it 'parallel'."
        )


def _frames(node: Node) -> list[Any]:
    return [frame for frame in node.get("cond_indep_stack", ()) if frame.vectorized]
