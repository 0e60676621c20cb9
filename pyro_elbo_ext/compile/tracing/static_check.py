"""Is the program the same at every draw, and does its graph compute what it computes?  Checked once for each graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.poutine import Trace
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_elbo_ext.compile.errors import CannotCompile
from pyro_elbo_ext.compile.tracing.arguments import Args, Kwargs
from pyro_elbo_ext.compile.tracing.capture import Capture, Evaluation, as_traced
from pyro_elbo_ext.objectives.evaluation import Program
from pyro_elbo_ext.programs.randomness import kept
from pyro_elbo_ext.programs.running import trace_pair
from pyro_elbo_ext.terms.registration import modules_of

SEEDS = (20, 21)  # any two
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}


class Written(TorchDispatchMode):
    """Keeps what tensors held before they are first written to in the block, to be put back."""

    def __init__(self) -> None:
        super().__init__()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written and isinstance(value, Tensor) and id(value) not in self._before:
                self._before[id(value)] = value, value.clone()
        return func(*args, **(kwargs or {}))

    def restore(self) -> None:
        """Write it back, the first last: there may be several views of one memory."""
        with torch.no_grad():
            for tensor, before in reversed(self._before.values()):
                if tensor.shape == before.shape and not torch.equal(tensor, before):
                    tensor.copy_(before)
        self._before.clear()


@contextmanager
def nothing_changed(programs: tuple[Program, Program]) -> Iterator[Written]:
    """Put the generators of random numbers and the buffers of modules back as they were.

    So is what is written to in the block of what it yields.
    """
    modules: list[nn.Module] = [module for _, module in modules_of({"model and guide": programs})]
    buffers = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    written = Written()
    try:
        with kept():
            yield written
    finally:
        written.restore()
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def check_structure(model: Program, guide: Program, args: Args, kwargs: Kwargs) -> None:
    """Run the programs twice, at different draws, and compare their sites.

    Raises
    ------
    CannotCompile
        Naming the first site that is not the same in both.
    """
    runs: list[tuple[Trace, Trace]] = []
    with torch.no_grad(), as_traced():
        for seed in SEEDS:
            pyro.set_rng_seed(seed)
            runs.append(trace_pair(model, guide, args, kwargs))
    for which, first, second in zip(("model", "guide"), *runs, strict=True):
        one, two = (
            {name: node for name, node in trace.nodes.items() if node["type"] == "sample"} for trace in (first, second)
        )
        for name in [*one, *two]:
            if name not in one or name not in two:
                raise CannotCompile(f"site '{name}' of the {which} is in one run and not in another{_REMEDY}")
        if list(one) != list(two):
            name = next(a for a, b in zip(one, two, strict=True) if a != b)
            raise CannotCompile(f"the sites of the {which}, from '{name}' on, change places from run to run{_REMEDY}")
        for name, node in one.items():
            other = two[name]
            for what, a, b in (
                ("distribution", type(node["fn"]), type(other["fn"])),
                ("shape", getattr(node["value"], "shape", None), getattr(other["value"], "shape", None)),
                ("being observed", node["is_observed"], other["is_observed"]),
                ("plates", node["cond_indep_stack"], other["cond_indep_stack"]),
            ):
                if a != b:
                    raise CannotCompile(
                        f"the {what} of site '{name}' of the {which} changes from run to run: {a}, then {b}{_REMEDY}"
                    )


_REMEDY = (
    ". A graph has one structure: make the sites of model and guide the same in every run, train with pyro.infer.SVI, or "
    "pass fallback=True."
)


def check_graph(found: Capture, evaluation: Evaluation, inputs: list[Tensor]) -> None:
    """Compare loss and gradient of the graph with the program's own, at two draws.

    Raises
    ------
    CannotCompile
        If they differ: the graph holds something that the program computes in Python.
    """
    for seed in SEEDS:
        with as_traced():
            pyro.set_rng_seed(seed)
            expected = evaluation(inputs)
            state = torch.get_rng_state()
            pyro.set_rng_seed(seed)
            with torch.no_grad():
                ours = found.graph(*inputs, *found.captured)
        if evaluation.reached != found.reached:
            raise CannotCompile(f"the parameters that the loss depends on change from run to run{_REMEDY}")
        if not torch.equal(state, torch.get_rng_state()):
            raise CannotCompile(f"the program draws other random numbers from run to run{_REMEDY}")
        names = ["loss", "table", *["gradient"] * (len(expected) - 2)]
        for what, own, theirs in zip(names, ours, expected, strict=True):
            tolerance = _TOLERANCE.get(theirs.dtype, 0.0)
            if what in ("loss", "table") and any(t.dtype is torch.float32 for t in evaluation.parameters):
                tolerance = _TOLERANCE[torch.float32]
            size = float(theirs.detach().nan_to_num(0.0, 0.0, 0.0).abs().max()) if theirs.numel() else 0.0
            if not torch.allclose(own, theirs, rtol=tolerance, atol=tolerance * max(size, 1e-6), equal_nan=True):
                raise CannotCompile(
                    f"the {what} of the graph is not the program's own under the same seed (largest difference "
                    f"{float((own - theirs).abs().max()):.3g}): the program computes something in Python that differs from "
                    "run to run (numbers from .numpy(), random or a counter), which a graph would keep. Compute it "
                    "with torch, pass it as a tensor argument, train with pyro.infer.SVI, or pass fallback=True."
                )
