"""Summed-out sites that form a chain, or stand alone: the log of their sum and their posterior, by messages both ways.

Pyro's contraction takes some operators for each factor, and its backward pass as many again, so that a hidden Markov model
of T times costs T times as many. Here factors that are alike are stacked, and the whole chain is one operator. The posterior
is that of the forward-backward algorithm (Rabiner 1989, "A tutorial on hidden Markov models", section III), in logarithms.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyro_elbo_ext.terms.packing import dims_of, named

MOST_STATES = 64  # of a layer of several sites: their sum together costs more than one after the other

_library = torch.library.Library("pyro_elbo_ext", "DEF")
_library.define("chain(Tensor alone, Tensor between) -> (Tensor, Tensor, Tensor)")


def sum_of_chain(alone: Tensor, between: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The log of a sum over all paths through layers of states, and the paths' posterior.

    Parameters
    ----------
    alone
        Log factors of the states of one layer, shape ``(layers, batch, states)``.
    between
        Log factors of the states of two layers next to each other, shape ``(layers - 1, batch or 1, states, states)``, the
        earlier layer's first.

    Returns
    -------
    log_sum, of_alone, of_between : Tensor
        Shape ``(batch,)``; and its derivatives, the probabilities of states and of pairs of them, shapes
        ``(layers, batch, states)`` and ``(layers - 1, batch, states, states)``. Without gradient. Where no path is possible
        the first is -inf and the others are 0.
    """
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.pyro_elbo_ext.chain(alone, between)
    return found


def _sum_of_chain(alone: Tensor, between: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # both directions at once: messages of shape (2, batch, states)
    factors = torch.stack([between.mT, between.flip(0)], 1).unbind()
    alones = torch.stack([alone, alone.flip(0)], 1).unbind()
    messages, sums = [alones[0]], [torch.zeros_like(alones[0])]
    for factor, own in zip(factors, alones[1:], strict=True):
        sums.append(torch.logsumexp(factor + messages[-1].unsqueeze(-2), -1))
        messages.append(sums[-1] + own)
    message, total = torch.stack(messages), torch.stack(sums)
    forward, backward, after = message[:, 0], message[:, 1].flip(0), total[:, 1].flip(0)
    log_sum = forward[-1].logsumexp(-1)
    known = log_sum.clamp_min(torch.finfo(log_sum.dtype).min)[:, None]
    of_alone = (forward + after - known).exp()
    of_between = (forward[:-1].unsqueeze(-1) + between + (backward[1:] - known).unsqueeze(-2)).exp()
    return log_sum, of_alone.contiguous(), of_between.contiguous()


def _shapes(alone: Tensor, between: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    layers, batch, states = alone.shape
    return (
        alone.new_empty(batch),
        alone.new_empty((layers, batch, states)),
        alone.new_empty((layers - 1, batch, states, states)),
    )


_library.impl("chain", _sum_of_chain, "CompositeExplicitAutograd")
torch.library.register_fake("pyro_elbo_ext::chain", _shapes)


def _of_batches(
    info: Any, in_dims: tuple[int | None, int | None], alone: Tensor, between: Tensor
) -> tuple[tuple[Tensor, ...], tuple[int, int, int]]:
    size = info.batch_size
    alone, between = (
        tensor.unsqueeze(1).expand(-1, size, *tensor.shape[1:]) if dim is None else tensor.movedim(dim, 1)
        for tensor, dim in zip((alone, between), in_dims, strict=True)
    )
    batch = alone.shape[2]
    found = sum_of_chain(alone.flatten(1, 2), between.expand(-1, -1, batch, -1, -1).flatten(1, 2))
    log_sum, *others = [of.unflatten(0 if of.dim() == 1 else 1, (size, batch)) for of in found]
    return (log_sum, *others), (0, 1, 1)


torch.library.register_vmap("pyro_elbo_ext::chain", _of_batches)


class _Kind(NamedTuple):
    """Where factors that are alike stand."""

    batch: str  # dims that are not summed out, sorted
    of_first: tuple[int, ...]  # places of its sites in the first layer that it depends on
    of_second: tuple[int, ...]  # in the next one, if it depends on two
    layers: tuple[tuple[int, ...], ...]  # the numbers of states of the sites of these layers
    own: int | None  # which of its dims is its own site's
    number: int  # how many such there are before in the same layer


class Alike(NamedTuple):
    """Factors that differ in nothing but their names and sites, in stacks.

    Attributes
    ----------
    places : list of int
        Of the factors.
    dims : list of str
        Of each.
    density, weight : Tensor
        Log densities, and the derivatives of the expected log sum by them; shape ``(factors, *sizes of dims)``.
    """

    places: list[int]
    dims: list[str]
    density: Tensor
    weight: Tensor


class Chain:
    """Factors of summed-out sites in layers, each of which depends on the next alone.

    Parameters
    ----------
    densities
        Packed, all of one dtype.
    owns
        Of each the symbol of the summed-out site that it is the prior of, if any.
    layers
        Symbols of the sites.
    stacked
        Of each a tensor that has it, and its place there, if any: not packed, with a dim in front.
    """

    def __init__(
        self,
        densities: Sequence[Tensor],
        owns: Sequence[str | None],
        layers: Sequence[Sequence[str]],
        stacked: Sequence[tuple[Tensor, int] | None],
    ) -> None:
        self._place = {symbol: (at, i) for at, layer in enumerate(layers) for i, symbol in enumerate(layer)}
        self._sizes: dict[str, int] = {}
        for density in densities:
            self._sizes.update(zip(dims_of(density), density.shape, strict=True))
        self.batch = "".join(sorted(self._sizes.keys() - self._place.keys()))
        self._states = [tuple([self._sizes[symbol] for symbol in layer]) for layer in layers]
        self._kinds: dict[_Kind, list[int]] = {}  # places of the factors
        self._dims: list[str] = []
        self._at: list[int] = []  # the first layer that each depends on
        counts: Counter[object] = Counter()
        for place, (density, own) in enumerate(zip(densities, owns, strict=True)):
            at, dims, kind = self._kind(density, own)
            number = counts[at, kind]
            counts[at, kind] += 1
            self._kinds.setdefault(kind._replace(number=number), []).append(place)
            self._dims.append(dims)
            self._at.append(at)
        self._densities = {
            kind: _stack([(densities[at], self._dims[at], stacked[at]) for at in places])
            for kind, places in self._kinds.items()
        }

    def _kind(self, density: Tensor, own: str | None) -> tuple[int, str, _Kind]:
        dims = dims_of(density)
        sites = sorted([symbol for symbol in dims if symbol in self._place], key=self._place.__getitem__)
        batch = "".join([symbol for symbol in self.batch if symbol in dims])
        at = self._place[sites[0]][0]
        first, second = (
            tuple([i for layer, i in map(self._place.__getitem__, sites) if layer == of]) for of in (at, at + 1)
        )
        states = tuple(self._states[at : at + (2 if second else 1)])
        ordered = batch + "".join(sites)
        return at, ordered, _Kind(batch, first, second, states, None if own is None else ordered.index(own), 0)

    def log_sum(self) -> tuple[Tensor, Tensor, Tensor]:
        """What :func:`sum_of_chain` gives; the first packed, with the dims ``batch``."""
        alone, between = self._factors(1), self._factors(2)
        alone = alone.expand(-1, self._num_batch, -1)
        log_sum, of_alone, of_between = sum_of_chain(alone.contiguous(), between.contiguous())
        return named(log_sum.reshape(self._batch_shape(self.batch)), self.batch), of_alone, of_between

    @property
    def _num_batch(self) -> int:
        return math.prod(self._batch_shape(self.batch))

    def _batch_shape(self, of: str) -> list[int]:
        return [self._sizes[symbol] if symbol in of else 1 for symbol in self.batch]

    def _factors(self, layers: int) -> Tensor:
        """The log factors that depend on so many layers, by the first of these: ``(..., batch or 1, *states)``."""
        most, length = max(map(math.prod, self._states)), len(self._states) + 1 - layers
        first = next(iter(self._densities.values()))
        total = first.new_zeros([length, 1, *[most] * layers])
        for kind, places in self._kinds.items():
            if len(kind.layers) != layers:
                continue
            given = zip((kind.of_first, kind.of_second), kind.layers, strict=False)
            sizes = [size if i in own else 1 for own, states in given for i, size in enumerate(states)]
            batch, whole = (self._batch_shape(kind.batch), [size for states in kind.layers for size in states])
            spread = self._densities[kind].detach().reshape([len(places), *batch, *sizes]).expand(-1, *batch, *whole)
            counts = list(map(math.prod, kind.layers))
            flat = spread.reshape(len(places), math.prod(batch), *counts)
            flat = pad(flat, [size for count in reversed(counts) for size in (0, most - count)])
            total = total + self._in_layers(flat, places, length)
        if layers == 1 and any(math.prod(states) < most for states in self._states):
            number = torch.arange(most, device=total.device)
            known = number.new_tensor(list(map(math.prod, self._states)))
            total = total.masked_fill((number >= known[:, None])[:, None], -math.inf)
        return total

    def _in_layers(self, stacked: Tensor, places: list[int], length: int) -> Tensor:
        """Put the factors, in a stack, where their layers are, with zeros between."""
        at = [self._at[place] for place in places]
        if _is_range(at):
            return pad(stacked, [*[0, 0] * (stacked.dim() - 1), at[0], length - 1 - at[-1]])
        zeros = stacked.new_zeros([length, *stacked.shape[1:]])
        return zeros.index_add(0, torch.tensor(at, device=stacked.device), stacked)

    def alike(self, of_alone: Tensor, of_between: Tensor, slope: Tensor) -> list[Alike]:
        """The factors by kind.

        Parameters
        ----------
        of_alone, of_between
            From :meth:`log_sum`.
        slope
            The derivatives of what is expected by the log sum, with the dims ``batch``.
        """
        return [self._alike(kind, (of_alone, of_between)[len(kind.layers) - 1], slope) for kind in self._kinds]

    def _alike(self, kind: _Kind, posterior: Tensor, slope: Tensor) -> Alike:
        places = self._kinds[kind]
        at = [self._at[place] for place in places]
        posterior = _chosen(posterior, at)
        for dim, states in enumerate(kind.layers, 2):
            posterior = posterior.narrow(dim, 0, math.prod(states))
        whole = [size for states in kind.layers for size in states]
        weight = posterior.reshape([len(places), *self._batch_shape(self.batch), *whole])
        weight = weight * slope.reshape([*slope.shape, *[1] * len(whole)])
        offset, absent = 1 + len(self.batch), []
        absent += [i for i, symbol in enumerate(self.batch, 1) if symbol not in kind.batch]
        for own, states in zip((kind.of_first, kind.of_second), kind.layers, strict=False):
            absent += [offset + i for i in range(len(states)) if i not in own]
            offset += len(states)
        return Alike(
            places,
            [self._dims[place] for place in places],
            self._densities[kind],
            weight.sum(absent) if absent else weight,
        )


def chain_of(
    densities: Sequence[Tensor],
    owns: Sequence[str | None],
    summed: set[str],
    stacked: Sequence[tuple[Tensor, int] | None],
) -> Chain | None:
    """The factors as a chain; None where they are none, or another way to the sum is quicker.

    Parameters
    ----------
    densities
        Packed, of sites that are in the same plates and hang together.
    owns
        Of each the symbol of the summed-out site that it is the prior of, if any.
    summed
        Symbols of all summed-out sites.
    stacked
        As :class:`Chain` takes it.
    """
    if len({(density.dtype, density.device) for density in densities}) > 1:
        return None
    layers = _layers_of([[symbol for symbol in dims_of(density) if symbol in summed] for density in densities])
    sizes = {symbol: size for d in densities for symbol, size in zip(dims_of(d), d.shape, strict=True)}
    several = [math.prod([sizes[symbol] for symbol in layer]) for layer in layers if len(layer) > 1]
    if max(several, default=0) > MOST_STATES:
        return None
    return Chain(densities, owns, layers, stacked)


def _stack(factors: Sequence[tuple[Tensor, str, tuple[Tensor, int] | None]]) -> Tensor:
    """Packed densities, each with the order that its dims are to have, in one tensor."""
    sources: dict[int | None, list[int]] = {}
    for at, (_, _, source) in enumerate(factors):
        sources.setdefault(None if source is None else id(source[0]), []).append(at)
    parts: list[Tensor] = []
    for ats in sources.values():
        density, dims, source = factors[ats[0]]
        if source is None:
            parts.append(torch.stack([_ordered(*factors[at][:2]) for at in ats]))
            continue
        chosen = _chosen(source[0], [factors[at][2][1] for at in ats])  # type: ignore[index]
        given = dims_of(density)
        part = chosen.reshape([len(ats), *density.shape])
        parts.append(part.permute([0, *[1 + given.index(symbol) for symbol in dims]]))
    order = [at for ats in sources.values() for at in ats]
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    return _chosen(whole, sorted(range(len(order)), key=order.__getitem__))


def _chosen(whole: Tensor, places: Sequence[int]) -> Tensor:
    if _is_range(places):
        return whole if len(places) == len(whole) else whole[places[0] : places[-1] + 1]
    return whole.index_select(0, torch.tensor(list(places), device=whole.device))


def _ordered(density: Tensor, dims: str) -> Tensor:
    given = dims_of(density)
    return density if given == dims else density.permute([given.index(symbol) for symbol in dims])


def _is_range(numbers: Sequence[int]) -> bool:
    return list(numbers) == list(range(numbers[0], numbers[0] + len(numbers)))


def _layers_of(cliques: Sequence[Sequence[str]]) -> list[list[str]]:
    """The symbols by their distance from the first one: a clique lies in one layer or in two that are neighbours."""
    neighbours: dict[str, dict[str, None]] = {}
    for clique in cliques:
        for symbol in clique:
            neighbours.setdefault(symbol, {}).update(dict.fromkeys(clique))
    order = {symbol: at for at, symbol in enumerate(neighbours)}
    layers = [[next(iter(neighbours))]]
    seen = set(layers[0])
    while found := {other for symbol in layers[-1] for other in neighbours[symbol]} - seen:
        seen |= found
        layers.append(sorted(found, key=order.__getitem__))
    return layers
