"""A backend of opt_einsum: sums of products of numbers given by their logarithms, in operators that ``torch.vmap`` knows.

Pyro's own has a function of its own for the logarithm, which has no rule for ``torch.vmap``.
"""

from __future__ import annotations

import math

import torch
from pyro.ops.einsum.util import Tensordot
from torch import Tensor


def transpose(a: Tensor, axes: tuple[int, ...]) -> Tensor:
    """As opt_einsum asks for it."""
    return a.permute(axes)


def einsum(equation: str, *operands: Tensor) -> Tensor:
    """``log sum exp`` of the sum of the operands, over the dims that the output does not have."""
    inputs, output = equation.split("->")
    symbols = output + "".join(sorted(set(inputs) - {",", *output}))
    total: Tensor | float = 0.0
    for dims, operand in zip(inputs.split(","), operands, strict=True):
        sizes = dict(zip(dims, operand.shape, strict=True))
        ordered = operand.permute([dims.index(symbol) for symbol in symbols if symbol in dims])
        total = total + ordered.reshape([sizes.get(symbol, 1) for symbol in symbols])
    assert isinstance(total, Tensor)
    return _log_sum_exp(total, list(range(len(output), len(symbols)))) if len(symbols) > len(output) else total


def _log_sum_exp(total: Tensor, dims: list[int]) -> Tensor:
    """As torch has it; but where all are -inf, as in states that cannot be reached, the gradient is 0 and not NaN."""
    shift = total.detach().amax(dims, keepdim=True).clamp_min(torch.finfo(total.dtype).min)
    sums = (total - shift).exp().sum(dims)
    logs = torch.where(sums > 0, sums, 1.0).log()
    return torch.where(sums > 0, logs, -math.inf) + shift.squeeze(dims)


tensordot = Tensordot(einsum)
