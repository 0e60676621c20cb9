"""Starting values where a prior is flat: Pyro's autoguides draw theirs from the prior, which then cannot be drawn from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from pyro.distributions import ImproperUniform
from torch import Tensor
from torch.distributions import biject_to


@contextmanager
def flat_priors_have_a_start() -> Iterator[None]:
    """Let ``ImproperUniform.sample`` give the point that is 0 in unconstrained space, while an autoguide sets itself up."""
    original = ImproperUniform.sample
    ImproperUniform.sample = _origin
    try:
        yield
    finally:
        ImproperUniform.sample = original


def _origin(self: ImproperUniform, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008 (Pyro's signature)
    transform = biject_to(self.support)
    return transform(torch.zeros(transform.inverse_shape(torch.Size(sample_shape) + self.shape())))
