"""A backend of opt_einsum: Pyro's forward filtering, backward sampling, for tensors whose dims come in any order.

Pyro puts the samples of two steps together by their names in the order of the alphabet, and fails where a step has them in
another: opt_einsum orders the dims between two steps by their sizes.
"""

from __future__ import annotations

from pyro.ops.einsum import torch_sample
from pyro.ops.einsum.adjoint import transpose
from pyro.ops.einsum.util import Tensordot
from pyro.ops.rings import SampleRing
from torch import Tensor

__all__ = ["SortedSampleRing", "einsum", "tensordot", "transpose"]


class SortedSampleRing(SampleRing):
    """Pyro's ring of samples, by this backend."""

    _backend = __name__


def einsum(equation: str, *operands: Tensor) -> Tensor:
    """As Pyro's; what is sampled in the backward pass has its dims in the order of the alphabet."""
    result: Tensor = torch_sample.einsum(equation, *operands)
    backward = getattr(result, "_pyro_backward", None)
    if backward is not None:
        backward.output = "".join(sorted(backward.output))
    return result


tensordot = Tensordot(einsum)
