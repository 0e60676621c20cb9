"""NumPy arrays that programs read: any change of content, shape or dtype is seen, and large ones cost no copy."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_elbo_ext import CompiledSVI
from pyro_elbo_ext.compile.tracing import arrays
from pyro_elbo_ext.compile.tracing.arrays import Arrays

CHANGES: dict[str, Callable[[np.ndarray], object]] = {
    "first": lambda a: a.__setitem__(0, 7),
    "last": lambda a: a.__setitem__(-1, 7),
    "sign of zero": lambda a: a.__setitem__(3, -0.0),
    "shape": lambda a: setattr(a, "shape", (2, a.size // 2)),
    "dtype": lambda a: setattr(a, "dtype", np.int64),
}


@pytest.mark.parametrize("in_c", [True, False], ids=["memcmp", "copies"])
@pytest.mark.parametrize("size", [8, 1 << 12])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of NumPy, of setting a shape or dtype
def test_every_change_is_seen(change: str, size: int, in_c: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not in_c:
        monkeypatch.setattr(arrays, "_compare", None)
    others = [np.arange(3), np.arange(size, dtype=float)[::2], np.array([np.nan] * size)]
    array = np.zeros(size)
    kept = Arrays([*others, array])
    assert len(kept) == 4
    assert kept.are_same()
    CHANGES[change](array)
    assert not kept.are_same()


def test_memory_that_is_no_longer_the_same_is_looked_at_where_it_is() -> None:
    array = np.zeros(1 << 12)
    kept = Arrays([array])
    array.resize(1 << 16, refcheck=False)
    array.resize(1 << 12, refcheck=False)
    assert kept.are_same()
    array[5] = 1
    assert not kept.are_same()


def test_large_arrays_cost_no_copy() -> None:
    """Of 10 MB: a comparison in place reads, a copy writes as well."""
    array = np.random.default_rng(0).random(10**7 // 8)
    kept, content = Arrays([array]), array.tobytes()

    def seconds(look: Callable[[], bool]) -> float:
        times = []
        for _ in range(7):
            began = time.process_time()
            assert look()
            times.append(time.process_time() - began)
        return min(times)

    assert seconds(kept.are_same) < 0.8 * seconds(lambda: array.tobytes() == content)


@pytest.mark.parametrize("size", [8, 1 << 12])
def test_a_step_takes_what_the_array_has_now(size: int) -> None:
    offsets = np.zeros(size)

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(float(offsets.mean())))

    def guide() -> None:
        pyro.sample("z", dist.Delta(pyro.param("loc", torch.tensor(0.5))))

    losses = []
    for make in (lambda *a: CompiledSVI(*a, backend="eager"), SVI):
        pyro.clear_param_store()
        offsets[:] = 0
        svi = make(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())  # type: ignore[attr-defined]
        found = [svi.step() for _ in range(3)]
        offsets[-1] = size
        losses.append([*found, *(svi.step() for _ in range(3))])
    assert losses[0] == pytest.approx(losses[1])
