"""Components that can trade places: axes of sites that may be permuted together without a change of the model's density."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_elbo_ext.programs.given import run_given
from pyro_elbo_ext.programs.nodes import is_deterministic, is_latent
from pyro_elbo_ext.programs.randomness import seeded, untouched
from pyro_elbo_ext.programs.running import check_callable

POINTS = 3  # at which the density is compared
TRIES = 20  # runs of the model in which these are looked for
MOST_RUNS = 1000  # of the model for one search, after which there is no answer
LISTED = 3  # sites with states that are named one by one
STATES = 0  # in place of an axis, which is negative: the site's values are numbers of components


@dataclass(frozen=True)
class Components:
    """Components of a model that are exchangeable: its log joint density is the same in any order of them.

    Attributes
    ----------
    size : int
        K, how many there are. The posterior has each of its modes in up to ``K!`` places.
    axes : dict
        Every latent and deterministic site to the axes of its value that are indexed by the component, counted from the
        right (-1 is the last), batch before event dims; ``()`` where there are none.
    states : tuple of str
        Discrete sites whose values are numbers of components, 0 to K - 1.
    unclear : tuple of str
        Deterministic sites that change with the order in another way than by their axes or states, as a flattened matrix.
    """

    size: int
    axes: Mapping[str, tuple[int, ...]]
    states: tuple[str, ...] = ()
    unclear: tuple[str, ...] = ()

    @property
    def indexed(self) -> list[str]:
        """Sites that change with the order of the components in a known way."""
        return [site for site, axes in self.axes.items() if axes or site in self.states]

    def __str__(self) -> str:
        own = [site for site in self.indexed if self.axes[site] or len(self.states) <= LISTED]
        parts = [
            f"{site} (" + ", ".join([*(f"axis {axis}" for axis in self.axes[site]), *self._says(site)]) + ")"
            for site in own
        ]
        rest = [site for site in self.indexed if site not in own]
        parts += [f"{rest[0]}, {rest[1]}, ..., {rest[-1]} (their states)"] if rest else []
        return f"{self.size} components of " + ", ".join(parts)

    def _says(self, site: str) -> list[str]:
        return ["its states"] if site in self.states else []


class Place(NamedTuple):
    """An axis of a site's value, counted from the right, or its states."""

    site: str
    axis: int


def exchangeable_components(
    model: Callable[..., Any],
    *args: Any,
    values: Mapping[str, Any] | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> tuple[Components, ...]:
    """Find the components of a model that are exchangeable, as those of a mixture or the states of a hidden Markov model.

    No name is taken as a sign: sets of axes of latent sites (and values of discrete ones) with one size are found such that
    the log density of every site of the model, the observed ones included, is the same to rounding after both the entries
    along all of them are permuted and the values are relabelled. That is looked at in three points, for a transposition
    and a cycle, which together generate all permutations. A model that an order is built into, by an ordered vector, data
    for some component or unequal priors, has none; nor one whose components are sites of their own. Left out are components
    that are independent of each other given the rest, as in a plate whose data are equal: they have no place to trade.

    Parameters
    ----------
    model
        Pyro model, called as ``model(*args, **kwargs)``. Model keywords with the name of a parameter below need
        ``functools.partial``.
    values
        Latent sites to values with a first dim of points, to look at these; others are drawn from the model. Draws of a
        posterior or a guide are best: densities at draws of a wide prior may be too large to be compared.
    seed
        Of what is drawn. The caller's generators and parameters are left as they were.

    Returns
    -------
    tuple of Components
        Empty where there are none, or where the model has no finite density at the points.

    Raises
    ------
    ValueError, TypeError
        If the model cannot be run.

    References
    ----------
    Stephens (2000), Dealing with label switching in mixture models.
    """
    check_callable(model, "model", args, kwargs)
    search = _Search(model, args, kwargs, seed)
    with untouched(None):
        search.start(values or {})
        found: list[Components] = []
        taken: set[Place] = set()
        if not search.points:
            return ()
        # states alone are no components: there is nothing that tells them apart
        for place in [place for place in search.places if place.axis != STATES]:
            if place in taken:
                continue
            chosen = search.closure(place)
            if chosen is not None and not search.separate(chosen):
                taken |= chosen
                found.append(search.described(chosen))
    return tuple(found)


class _Factor(NamedTuple):
    """Log density of a site, summed, and how exactly it is known."""

    value: float
    error: float


Factors = dict[str, _Factor]
Values = dict[str, Tensor]


class _Search:
    """The model's densities at some points, before and after permutations."""

    def __init__(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], seed: int) -> None:
        self.model, self.args, self.kwargs, self.seed = model, args, kwargs, seed
        self.points: list[Values] = []
        self.before: list[Factors] = []
        self.places: dict[Place, int] = {}  # to the size
        self.known: dict[str, Tensor] = {}
        self.runs = 0

    def start(self, given: Mapping[str, Any]) -> None:
        """Points with a finite density, and what could be permuted there."""
        count = min((len(value) for value in given.values()), default=TRIES)
        for number in range(min(TRIES, count)):
            values = {name: torch.as_tensor(value[number]) for name, value in given.items()}
            with seeded((self.seed + number) % 2**32), pyro.validation_enabled(False):
                try:
                    trace = run_given(self.model, self.args, self.kwargs, values)
                except ValueError as error:
                    if not given:
                        error.add_note("The model is run from its prior: pass values={site: draws} to look at these.")
                    raise
            point = {name: node["value"].detach() for name, node in trace.nodes.items() if is_latent(node)}
            factors = self.factors(point)
            if not all(math.isfinite(factor.value) for factor in factors.values()):
                continue
            if not self.points:
                self._list(trace)
            self.points.append(point)
            self.before.append(factors)
            if len(self.points) == POINTS:
                break

    def _list(self, trace: Any) -> None:
        for name, node in trace.nodes.items():
            if not is_latent(node):
                continue
            shape = node["value"].shape
            self.places |= {Place(name, axis - len(shape)): size for axis, size in enumerate(shape) if size > 1}
            fn = node["fn"]
            if not fn.has_enumerate_support or fn.event_shape:
                continue
            try:
                support = fn.enumerate_support(expand=False).flatten()
            except NotImplementedError:  # counts of unequal totals
                continue
            if len(support) > 1 and torch.equal(support, torch.arange(len(support)).to(support)):
                self.places[Place(name, STATES)] = len(support)

    def factors(self, values: Values) -> Factors:
        """Each site's log density, and NaN for one of a latent site outside its support."""
        found = {}
        with seeded(self.seed), pyro.validation_enabled(False):  # the same indices of plates that subsample
            trace = run_given(self.model, self.args, self.kwargs, values)
            trace.compute_log_prob()
        self.runs += 1
        for name, node in trace.nodes.items():
            if node["type"] != "sample" or is_deterministic(node):
                continue
            log_prob = node["log_prob"].detach()
            terms = log_prob.double()
            outside = is_latent(node) and not _is_inside(node["fn"], node["value"])
            eps = torch.finfo(log_prob.dtype).eps
            error = 3 * eps**0.75 * (1 + float(terms.abs().sum()))
            found[name] = _Factor(math.nan if outside else float(terms.sum()), error)
        return found

    def changed(self, point: int, chosen: frozenset[Place], order: Tensor) -> frozenset[str]:
        """Sites whose density is another after the permutation."""
        before, after = self.before[point], self.factors(permuted(self.points[point], chosen, order))
        return frozenset(
            name
            for name, factor in before.items()
            if name not in after or not abs(after[name].value - factor.value) <= factor.error
        )

    def closure(self, first: Place) -> frozenset[Place] | None:
        """The smallest set of places with ``first`` that may be permuted together; None if there is none.

        A site whose density changes needs another place that it depends on: the sets grow by one of these at a time.
        """
        size, self.runs = self.places[first], 0
        touched: dict[Place, frozenset[str]] = {}
        same = [place for place, count in self.places.items() if count == size]
        order = torch.arange(size).roll(-1)
        sets, seen = [(1, 0, frozenset([first]))], {frozenset([first])}
        number = itertools.count(1)
        while sets and self.runs < MOST_RUNS:
            _, _, chosen = heapq.heappop(sets)
            broken = self.changed(0, chosen, order)
            if not broken:
                if self._holds(chosen, size):
                    return chosen
                continue
            for place in same:
                if place not in touched:
                    touched[place] = self.changed(0, frozenset([place]), order)
            ways = [
                [place for place in same if place not in chosen and name in touched[place]] for name in sorted(broken)
            ]
            fewest = min(map(len, ways))
            if fewest == 0:
                continue
            forced = frozenset(way[0] for way in ways if len(way) == 1)
            for added in [forced] if forced else [frozenset([place]) for place in min(ways, key=len)]:
                more = chosen | added
                if more not in seen:
                    seen.add(more)
                    heapq.heappush(sets, (len(more), next(number), more))
        return None

    def _holds(self, chosen: frozenset[Place], size: int) -> bool:
        """At all points, for permutations that generate all others."""
        swap = torch.tensor([1, 0, *range(2, size)])
        orders = [swap] if size == 2 else [swap, torch.arange(size).roll(-1)]
        return not any(self.changed(i, chosen, order) for i in range(len(self.points)) for order in orders)

    def separate(self, chosen: frozenset[Place]) -> bool:
        """Whether components are independent of each other, given the rest: each then has one place, and that is its own.

        Then a component of one point may trade places with that of another, and the densities of both have the same sum.
        """
        if len(self.points) < 2 or any(place.axis == STATES for place in chosen):
            return False
        one, other = self.points[0], dict(self.points[0])
        # in another order, since all points may be in one mode, at which the density may look like a product
        moved = permuted(self.points[1], chosen, torch.arange(self.places[next(iter(chosen))]).roll(-1))
        mixed = [dict(one), dict(one)]
        for site in {place.site for place in chosen}:
            other[site] = moved[site]
            first = torch.zeros(one[site].shape, dtype=torch.bool, device=one[site].device)
            for place in chosen:
                if place.site == site:
                    first.select(place.axis, 0).fill_(True)
            for values, (a, b) in zip(mixed, ((one, other), (other, one)), strict=True):
                values[site] = torch.where(first, a[site], b[site])
        whole, parts = ([self.factors(values) for values in some] for some in ((one, other), mixed))
        return all(
            abs(sum(each[name].value for each in parts) - sum(each[name].value for each in whole))
            <= sum(each[name].error for each in (*parts, *whole))
            for name in whole[0]
        )

    def described(self, chosen: frozenset[Place]) -> Components:
        size = self.places[next(iter(chosen))]
        axes: dict[str, tuple[int, ...]] = {
            site: tuple(sorted(place.axis for place in chosen if place.site == site and place.axis != STATES))
            for site in self.points[0]
        }
        states = [place.site for place in chosen if place.axis == STATES]
        unclear = []
        for site, found in self._deterministic(chosen, size).items():
            if found is None:
                unclear.append(site)
                continue
            axes[site] = tuple(sorted(place.axis for place in found if place.axis != STATES))
            states += [place.site for place in found if place.axis == STATES]
        return Components(size, axes, tuple(sorted(states)), tuple(unclear))

    def _deterministic(self, chosen: frozenset[Place], size: int) -> dict[str, frozenset[Place] | None]:
        """How each deterministic site changes; None where that is no permutation of axes and states."""
        order = torch.arange(size).roll(-1)
        pairs = [(self._values_of(p), self._values_of(permuted(p, chosen, order))) for p in self.points]
        found: dict[str, frozenset[Place] | None] = {}
        for site, value in pairs[0][0].items():
            places = [Place(site, i - value.dim()) for i, count in enumerate(value.shape) if count == size]
            if not value.is_floating_point() and bool(((value >= 0) & (value < size)).all()):
                places.append(Place(site, STATES))
            sets = itertools.chain.from_iterable(
                itertools.combinations(places, count) for count in range(len(places) + 1)
            )
            found[site] = next(
                (
                    frozenset(some)
                    for some in sets
                    if all(_same(permuted(before, some, order)[site], after.get(site)) for before, after in pairs)
                ),
                None,
            )
        return found

    def _values_of(self, values: Values) -> Values:
        with seeded(self.seed), pyro.validation_enabled(False):
            trace = run_given(self.model, self.args, self.kwargs, values)
        return {
            name: torch.as_tensor(node["value"]).detach()
            for name, node in trace.nodes.items()
            if node["type"] == "sample" and is_deterministic(node)
        }


def permuted(values: Mapping[str, Tensor], chosen: frozenset[Place] | Sequence[Place], order: Tensor) -> Values:
    """Values whose component k is the one that was number ``order[k]``, in all chosen places."""
    found = dict(values)
    for site, axis in chosen:
        value, own = found[site], order.to(found[site].device)
        if axis == STATES:
            found[site] = own.argsort()[value.long()].to(value)
        else:
            found[site] = value.index_select(axis, own)
    return found


def _is_inside(fn: Any, value: Tensor) -> bool:
    try:
        return bool(fn.support.check(value).all())
    except NotImplementedError:  # a support that is not told, or cannot be looked at
        return True


def _same(a: Tensor, b: Tensor | None) -> bool:
    if b is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    error = 3 * torch.finfo(a.dtype).eps ** 0.75 * max(1e-30, float(a.abs().max()) if a.numel() else 0.0)
    return bool(((a - b).abs() <= error).all())
