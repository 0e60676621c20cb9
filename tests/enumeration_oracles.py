"""Sums over all states, written out: what enumeration must give, for models with few and small discrete sites."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

Program = Callable[..., Any]


@dataclass
class Exact:
    """The model's part of an ELBO at given draws, with its discrete sites summed out.

    ``log_p`` is the posterior expectation of each site's log density; ``log_q`` that of ``log r(m_i | m_1, ..., m_{i-1})``,
    in the order of the program; ``marginals`` the posterior probabilities of a site's values, ``(*value shape, states)``.
    """

    log_sum: Tensor
    log_p: dict[str, Tensor]
    log_q: dict[str, Tensor]
    marginals: dict[str, Tensor]


def states_of(model: Program, args: tuple[Any, ...], draws: dict[str, Tensor]) -> dict[str, tuple[torch.Size, Tensor]]:
    """The discrete latent sites, with the shape of their batch and the values that each element can have."""
    trace = poutine.trace(poutine.condition(model, data=draws)).get_trace(*args)
    return {
        name: (node["fn"].batch_shape, node["fn"].enumerate_support(expand=False).reshape(-1, *node["fn"].event_shape))
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not node["is_observed"] and node["fn"].has_enumerate_support
    }


def assignments(
    model: Program, args: tuple[Any, ...], draws: dict[str, Tensor]
) -> Iterator[tuple[tuple[int, ...], dict[str, Tensor]]]:
    """All values of all elements of the discrete sites, as numbers of states and as the sites' values."""
    states = states_of(model, args, draws)
    counts = [len(values) for shape, values in states.values() for _ in range(math.prod(shape))]
    for numbers in itertools.product(*[range(count) for count in counts]):
        left, given = list(numbers), {}
        for name, (shape, values) in states.items():
            own = [left.pop(0) for _ in range(math.prod(shape))]
            given[name] = values[torch.tensor(own, dtype=torch.long)].reshape((*shape, *values.shape[1:]))
        yield numbers, given


def sum_over_states(model: Program, args: tuple[Any, ...], draws: dict[str, Tensor]) -> Exact:
    """Everything about the model's discrete sites at ``draws``, the values of all its other latent sites."""
    totals, terms, numbers = [], [], []
    for number, given in assignments(model, args, draws):
        trace = poutine.trace(poutine.condition(model, data=given | draws)).get_trace(*args)
        trace.compute_log_prob()
        of_sites = {name: node["log_prob"].sum() for name, node in trace.nodes.items() if node["type"] == "sample"}
        terms.append(of_sites)
        totals.append(torch.stack([term for name, term in of_sites.items()]).sum())
        numbers.append(number)
    log_joint = torch.stack(totals)
    log_sum = log_joint.logsumexp(0)
    posterior = (log_joint - log_sum).exp()
    log_p = {name: (posterior * torch.stack([of[name] for of in terms])).sum() for name in terms[0]}
    log_q, marginals, first = {}, {}, 0
    table = torch.tensor(numbers)
    for name, (shape, values) in states_of(model, args, draws).items():
        last = first + math.prod(shape)
        log_q[name] = _minus_entropy(posterior, table[:, :last]) - _minus_entropy(posterior, table[:, :first])
        marginals[name] = torch.stack(
            [
                (posterior[:, None] * (table[:, first:last] == state)).sum(0).reshape(shape)
                for state in range(len(values))
            ],
            -1,
        )
        first = last
    return Exact(log_sum, log_p, log_q, marginals)


def _minus_entropy(probabilities: Tensor, table: Tensor) -> Tensor:
    """``sum p log p`` of the joint distribution of the table's columns."""
    if not table.shape[1]:
        return probabilities.new_zeros(())
    _, group = torch.unique(table, dim=0, return_inverse=True)
    joint = probabilities.new_zeros(int(group.max()) + 1).index_add(0, group, probabilities)
    return torch.xlogy(joint, joint).sum()
