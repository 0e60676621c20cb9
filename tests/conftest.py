from __future__ import annotations

from collections.abc import Iterator

import pyro
import pytest
import torch

torch.set_num_threads(1)  # tensors of a few elements: further threads only wait for each other


@pytest.fixture(autouse=True)
def fresh_pyro() -> Iterator[None]:
    """Each test starts with an empty param store, a fixed seed and validation on, and leaves nothing behind."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with pyro.validation_enabled(True):
        yield
    pyro.clear_param_store()
    torch.set_default_dtype(torch.float32)
