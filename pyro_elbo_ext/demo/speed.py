"""The same steps of SVI by Pyro and compiled, timed one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from torch import Tensor

from pyro_elbo_ext.compile import CompiledSVI

# Of so many chunks the quickest counts. All last about as long, a millisecond or two, so that on a busy machine other
# processes get into the way of one kind no more than of another.
CHUNKS = 40
BY_PYRO, BY_STEP, BY_RUN = 1, 100, 1000  # steps in a chunk
CHECKED = 20  # steps whose losses are compared


@dataclass(frozen=True)
class Speed:
    """Seconds for a whole step with Adam and ``Trace_ELBO``, Pyro's checks off.

    Attributes
    ----------
    pyro, step, run : float
        By ``pyro.infer.SVI``, by ``CompiledSVI.step``, and by ``CompiledSVI.run``.
    compiling : float
        Until both of the latter were compiled, seconds.
    largest_difference : float
        Between the losses of the first steps by Pyro and by the traced graph, from one seed with the same draws; nats.
    not_compiled : str or None
        Why steps were Pyro's after all, if they were.
    """

    pyro: float
    step: float
    run: float
    compiling: float
    largest_difference: float
    not_compiled: str | None


def measure_speed(model: Callable[..., None], sigma: Tensor, y: Tensor, seed: int) -> Speed:
    """Time steps by Pyro and compiled ones, all from the same parameters; those of the store are lost."""

    def made(kind: type[SVI], **options: object) -> SVI:
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        guide = AutoNormal(model, init_scale=1.0)
        return kind(model, guide, Adam({"lr": 0.01}), Trace_ELBO(), **options)

    def quickest(take: Callable[[int], object], count: int) -> float:
        """Seconds for a step, where ``take`` takes so many of them."""
        seconds = []
        for _ in range(CHUNKS):
            start = time.perf_counter()
            take(count)
            seconds.append((time.perf_counter() - start) / count)
        return min(seconds)

    with pyro.validation_enabled(False):
        svi = made(SVI)
        losses = torch.tensor([svi.step(sigma, y) for _ in range(CHECKED)])
        by_pyro = quickest(lambda count: [svi.step(sigma, y) for _ in range(count)], BY_PYRO)

        traced = made(CompiledSVI, same_draws=True, backend="eager", fallback=True)
        same = torch.tensor([traced.step(sigma, y) for _ in range(CHECKED)])

        start = time.perf_counter()
        compiled = made(CompiledSVI, fallback=True)
        assert isinstance(compiled, CompiledSVI)
        compiled.run(2 * CHECKED, sigma, y, progress=False)
        for _ in range(CHECKED):
            compiled.step(sigma, y)
        compiling = time.perf_counter() - start
        more = 1 if compiled.eager_reason is None else 100  # times fewer steps where they are Pyro's after all
        step = quickest(lambda count: [compiled.step(sigma, y) for _ in range(count)], BY_STEP // more)
        run = quickest(lambda count: compiled.run(count, sigma, y, progress=False), BY_RUN // more)
    return Speed(by_pyro, step, run, compiling, float((losses - same).abs().max()), compiled.eager_reason)
