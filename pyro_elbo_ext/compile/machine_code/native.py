"""Compiled steps repeated by a C function, without Python between the kernels and from step to step."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_elbo_ext.compile.machine_code.kernel_calls import Calls, NotKnown, NotNative, record
from pyro_elbo_ext.compile.machine_code.layouts import SOURCE as LAYOUTS
from pyro_elbo_ext.compile.machine_code.layouts import Changed, Layouts, address_of_items, comparable_in_c
from pyro_elbo_ext.compile.machine_code.own_kernels import SOURCE as OWN_KERNELS
from pyro_elbo_ext.history.record import VALUES
from pyro_elbo_ext.objectives.evaluation import Weight

_SOURCE = """
static const long places[][3] = {{{places}}};  // of inputs: where their addresses are asked for, which, how far into it

extern "C" long steps(const Layouts* inputs, char** objects, long count, char** at, void** kernel, const long* seeds,
                      const double* weights, double* losses, double* tables, long* done)
{{
    take(inputs, objects);
    const long changed = first_changed(inputs);
    if (changed >= 0) return 2 + changed;
    for (long i = 0; i < {num_places}; i++) at[places[i][0]] = inputs->addresses[places[i][1]] + places[i][2];
    long i = 0;
    try {{
        for (; i < count; i++) {{
{seeds}
            __builtin_memcpy(at[{weight}], weights + i * {weights}, {weights} * sizeof(double));
{calls}
            losses[i] = *(const double*) at[{loss}];
            __builtin_memcpy(tables + i * {width}, at[{table}], {width} * sizeof(double));
            *done = i + 1;
            if (!*(const bool*) at[{good}]) break;
        }}
    }} catch (...) {{ return 1; }}
    return 0;
}}

// One step: the others of the arguments above, which stay the same, are passed from Python faster in one array.
extern "C" long step(void** of, char** objects)
{{
    return steps((const Layouts*) of[0], objects, 1, (char**) of[1], (void**) of[2], (const long*) of[3],
                 (const double*) of[4], (double*) of[5], (double*) of[6], (long*) of[7]);
}}
"""
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}  # of sums in another order


class Taken:
    """Steps as they are taken, to be read even if one fails."""

    def __init__(self) -> None:
        self.losses = torch.zeros(0, dtype=torch.float64)
        self.tables = torch.zeros((0, 0), dtype=torch.float64)
        self.count = torch.zeros((), dtype=torch.int64)

    def results(self) -> tuple[Tensor, Tensor]:
        """Losses and tables, shapes ``(taken,)`` and ``(taken, width)``, float64."""
        return self.losses[: int(self.count)], self.tables[: int(self.count)]


class NativeSteps:
    """Repeats a compiled step.

    Parameters
    ----------
    compiled
        One step, as :func:`~pyro_elbo_ext.compile.step_graph.build_steps` makes it, compiled by Inductor.
    inputs
        What it is called with.
    fixed
        Which of them are these tensors at every call; the last is the weight of ``kl_prior``, or the weights of sites, and
        the one before says whether all losses were finite. The others are ``live``: they may be other tensors of the same
        shape, strides and dtype.
    written
        Which of them the step may write to.

    Raises
    ------
    NotNative
        If it needs Python, or if C does not do what Python does.
    """

    def __init__(
        self, compiled: Callable[..., Any], inputs: Sequence[Tensor], fixed: slice, written: Sequence[int]
    ) -> None:
        if not comparable_in_c():
            raise NotKnown("it does not let C look at tensors")
        good = fixed.stop - 2
        calls = record(compiled, inputs)
        loss, table = calls.results
        if not all(of.dtype == torch.float64 and of.is_contiguous() for of in calls.results):
            raise NotNative("it does not return numbers in double precision")
        if len({bounds[:2] for bounds in calls.seeds}) > 1:
            raise NotNative("it draws seeds of several kinds")
        self._width = table.numel()
        self._of_weights = tuple(inputs[good + 1].shape[1:])  # of one step
        self._num_weights = inputs[good + 1].numel()
        self._all_weights = slice(None) if self._of_weights else 0
        self._num_seeds = sum(seeds.numel() for _, _, seeds in calls.seeds)
        self._bounds = calls.seeds[0][:2] if calls.seeds else (0, 1)
        # the order of Layouts: first the live ones
        order = [*range(fixed.start), *range(fixed.stop, len(inputs)), *range(fixed.start, fixed.stop)]
        live, kept = (*inputs[: fixed.start], *inputs[fixed.stop :]), inputs[fixed]
        self._layouts = Layouts(live, kept, in_c=True)
        self._places: list[tuple[int, int, int]] = []  # of addresses in inputs: their slot, the input, how far into it
        slots: dict[int, int] = {}

        def at(tensor: Tensor) -> str:
            address = tensor.data_ptr()
            if address not in slots:
                slots[address] = len(slots)
                self._find_input(address, slots[address], [inputs[i] for i in order], calls)
            return f"at[{slots[address]}]"

        seeds, start = [], 0
        for _, _, tensor in calls.seeds:
            seeds.append(f"__builtin_memcpy({at(tensor)}, seeds + i * {self._num_seeds} + {start}, {tensor.nbytes});")
            start += tensor.numel()
        lines = [call.text.format(*map(at, call.tensors)) + ";" for call in calls.calls]
        weight, ok, value, row = (at(tensor)[3:-1] for tensor in (inputs[good + 1], inputs[good], loss, table))
        source = _SOURCE.format(
            seeds=_indented(seeds),
            calls=_indented(lines),
            weight=weight,
            weights=self._num_weights,
            good=ok,
            loss=value,
            table=row,
            width=self._width,
            places=", ".join(f"{{{slot}, {which}, {offset}}}" for slot, which, offset in self._places) or "{0, 0, 0}",
            num_places=len(self._places),
        )
        from torch._inductor.codecache import CppCodeCache  # slow to import

        # on disk, by a hash of the source, which holds no address
        library = CppCodeCache.load(OWN_KERNELS + LAYOUTS + source)
        libraries = [ctypes.CDLL(kernel.__self__.__file__) for kernel in calls.kernels]
        pointer = ctypes.c_void_p
        self._steps = library.steps
        self._steps.restype, self._steps.argtypes = ctypes.c_long, [pointer, pointer, ctypes.c_long, *[pointer] * 7]
        self._step = library.step
        self._step.restype, self._step.argtypes = ctypes.c_long, [pointer, pointer]
        self._at = (pointer * len(slots))(*slots)
        self._kernels = (pointer * len(libraries))(*[ctypes.cast(of.kernel, pointer).value for of in libraries])
        self._keep = calls, compiled, libraries
        # of a single step: loss, the number of steps, the weights, and the table
        numbers = np.zeros(2 + self._num_weights + self._width)
        drawn = torch.zeros(1, self._num_seeds, dtype=torch.int64)
        at_loss, table_at = numbers.ctypes.data, 2 + self._num_weights
        addresses = (drawn.data_ptr(), at_loss + 16, at_loss, at_loss + 8 * table_at, at_loss + 8)
        at_kernels = ctypes.addressof(self._at), ctypes.addressof(self._kernels)
        self._arguments = (pointer * 8)(self._layouts.address, *at_kernels, *addresses)  # of ``step`` in C
        self._single = numbers, ctypes.addressof(self._arguments), drawn
        self._weights, self._row = numbers[2:table_at], numbers[table_at:].reshape(-1, len(VALUES))
        tolerance = max((_TOLERANCE[of] for of in calls.sums), default=0.0)
        self._check(compiled, inputs, live, [inputs[i] for i in written], tolerance)

    def _find_input(self, address: int, place: int, inputs: Sequence[Tensor], calls: Calls) -> None:
        buffers = [buffer.untyped_storage() for buffer in calls.buffers]
        if any(b.data_ptr() <= address < b.data_ptr() + max(b.nbytes(), 1) for b in buffers):
            return
        found = [i for i, tensor in enumerate(inputs) if tensor.data_ptr() == address]
        storages = [tensor.untyped_storage() for tensor in inputs]
        found = found or [i for i, of in enumerate(storages) if of.data_ptr() <= address < of.data_ptr() + of.nbytes()]
        if len(found) > 1:
            raise NotNative("two of its inputs are in the same memory")
        if found:  # otherwise a constant of the graph, or a tensor without entries
            self._places.append((place, found[0], address - inputs[found[0]].data_ptr()))

    def __call__(self, taken: Taken, weights: Tensor, live: tuple[Tensor, ...]) -> None:
        """Take as many steps as there are weights; if the graph guards, only up to the first whose loss is not finite.

        Parameters
        ----------
        taken
            Takes the results, even if a step fails.
        weights
            Of ``kl_prior``, float64, shape ``(count,)``, or ``(count, sites)``; contiguous.
        live
            The inputs that are not fixed.

        Raises
        ------
        Changed
            If one of the inputs has another shape, or the like, than at construction; then no step has been taken.
        """
        count = len(weights)
        taken.losses, taken.tables = weights.new_empty(count), weights.new_empty((count, self._width))
        # in one call the numbers that the steps would draw one after the other
        seeds = torch.randint(*self._bounds, (count, self._num_seeds))
        tensors = seeds, weights, taken.losses, taken.tables, taken.count
        at, addresses = self._layouts.address, map(Tensor.data_ptr, tensors)
        state = self._steps(at, address_of_items(live), count, self._at, self._kernels, *addresses)
        if state:
            self._fail(state, live)

    def once(self, weight: Weight, live: tuple[Tensor, ...]) -> tuple[float, NDArray[np.float64]]:
        """Take one step: its loss, and its table, shape ``(sites, 6)``, in memory that the next step writes to."""
        numbers, arguments, seeds = self._single
        self._weights[self._all_weights] = weight
        if self._num_seeds:
            seeds.random_(*self._bounds)  # as ``torch.randint`` draws
        state = self._step(arguments, address_of_items(live))
        if state:
            self._fail(state, live)
        return float(numbers[0]), self._row

    def forget(self) -> None:
        """Forget the last step: :meth:`last` is None until the next one."""
        self._single[0][1] = 0.0  # all bits of the count

    def last(self) -> tuple[float, NDArray[np.float64]] | None:
        """What the last call of :meth:`once` gave, or would have given if no exception had come; None if it took no step."""
        numbers = self._single[0]
        return (float(numbers[0]), self._row) if numbers[1:2].view(np.int64)[0] else None

    def _fail(self, state: int, live: tuple[Tensor, ...]) -> NoReturn:
        if state == 1:
            raise RuntimeError(
                "a compiled kernel failed; most likely an index is out of bounds. pyro.infer.SVI with validation on "
                "shows where."
            )
        raise Changed(self._layouts.at(state - 2, live))

    def _check(
        self,
        compiled: Callable[..., Any],
        inputs: Sequence[Tensor],
        live: tuple[Tensor, ...],
        written: Sequence[Tensor],
        tolerance: float,
    ) -> None:
        """Take one step by Python and one by C from the same state, compare, and undo both."""
        before = [tensor.clone() for tensor in written]
        weights = torch.ones((1, *self._of_weights), dtype=torch.float64)

        def outcome(step: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
            try:
                with torch.random.fork_rng(devices=[]):
                    results = [tensor.clone() for tensor in step()]
                return results + [tensor.clone() for tensor in written]
            finally:
                for tensor, old in zip(written, before, strict=True):
                    if not torch.equal(tensor, old):
                        tensor.copy_(old)

        def by_c() -> Sequence[Tensor]:
            taken = Taken()
            self(taken, weights, live)
            return taken.results()

        with torch.no_grad():
            expected, ours = outcome(lambda: compiled(*inputs)), outcome(by_c)
        for a, b in zip(expected, ours, strict=True):
            try:
                torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance, equal_nan=True)
            except AssertionError as error:
                raise NotNative("it gives other results when called without Python") from error


def _indented(lines: list[str]) -> str:
    return "\n".join(f"            {line}" for line in lines)
