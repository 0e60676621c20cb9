"""Steps in C are the steps of the graph, called from Python, to the last bit; what C cannot do, Python does."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_elbo_ext import CompiledSVI, DecomposedELBO
from pyro_elbo_ext.compile import binding, finding, program, svi, taking
from pyro_elbo_ext.compile.machine_code import compiler, kernel_calls, layouts
from pyro_elbo_ext.compile.machine_code import native as native_room
from pyro_elbo_ext.compile.machine_code.kernel_calls import NotNative, record
from pyro_elbo_ext.compile.program import Program
from pyro_elbo_ext.history import record as history_room
from pyro_elbo_ext.history.history import History
from pyro_elbo_ext.objectives import objective
from tests.interruptions import stopped_everywhere
from tests.models import SIGMA, Y
from tests.test_compile import Fit, assert_equal, eight_schools, train

ROWS = torch.linspace(-1, 1, 24).reshape(12, 2)


def regression(data: Tensor) -> None:
    """Features and outcome are columns of one tensor."""
    features, outcome = data[:, :-1], data[:, -1]
    weights = pyro.sample("weights", dist.Normal(features.new_zeros(features.shape[1]), 1.0).to_event(1))
    with pyro.plate("rows", len(data)):
        pyro.sample("outcome", dist.Normal(features @ weights, 0.5), obs=outcome)


def in_columns(features: Tensor, outcome: Tensor) -> None:
    regression(torch.cat([features, outcome[:, None]], -1))


def mean_of(y: Tensor, sigma: Tensor) -> None:
    """Quick to compile, for what does not hang on the model."""
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mean, sigma), obs=y)


def test_what_is_made_of_a_graph_is_kept_for_this_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A later run takes it from Inductor's folder, with constants of its own; one on another CPU does not."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x, counters = torch.linspace(0, 1, 6).reshape(2, 3).t(), torch._dynamo.utils.counters

    def value(constant: float, x: Tensor) -> tuple[Tensor, ...]:
        table = torch.full((2,), constant)
        return compiler.inductor_code(make_fx(lambda x: ((x * table).exp().sum(0), x.expand(4, 3, 2) + 1))(x), [x])(x)

    def hits(capability: str, constant: float, x: Tensor) -> int:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        before = counters["inductor"]["fxgraph_cache_hit"]
        for of, expected in zip(value(constant, x), ((x * constant).exp().sum(0), x.expand(4, 3, 2) + 1), strict=True):
            torch.testing.assert_close(of, expected)
        return int(counters["inductor"]["fxgraph_cache_hit"] - before)

    assert [hits("A", 0.5, x) for _ in range(2)] == [0, 1]
    hits("A", 0.7, x)
    assert hits("B", 0.5, x) == 0
    assert hits("A", 0.5, x.contiguous()) == 0


def is_native(fit: Fit) -> bool:
    (program,) = fit.svi._programs.values()
    return isinstance(program._native, native_room.NativeSteps)


def fit(model: Any, guide: Any, args: tuple[Any, ...], steps: int = 40, **options: Any) -> Fit:
    return train(CompiledSVI, model, guide, args, steps=steps, **options)


@pytest.fixture
def by_python(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def refuse(*args: Any) -> None:
        raise NotNative("told not to be")

    return lambda: monkeypatch.setattr(Program, "native", lambda self, arguments: None)


@pytest.mark.parametrize("loss", [Trace_ELBO, DecomposedELBO])
@pytest.mark.parametrize("autoguide", [AutoNormal, AutoMultivariateNormal])
def test_steps_in_c_equal_those_from_python(autoguide: Any, loss: Any, by_python: Callable[[], None]) -> None:
    in_c = [fit(eight_schools, autoguide(eight_schools), (Y, SIGMA), loss=loss(), run=run) for run in (False, True)]
    by_python()
    expected = fit(eight_schools, autoguide(eight_schools), (Y, SIGMA), loss=loss())
    assert all(is_native(one) for one in in_c)
    assert_equal(in_c[0], in_c[1])
    # the draws of the multivariate guide are sums in another order
    assert_equal(in_c[0], expected, 0.0 if autoguide is AutoNormal else 1e-3)
    if loss is DecomposedELBO:
        tables = [one.svi.objective.history.to_dataframe() for one in (*in_c, expected)]
        for table in tables[:2]:
            np.testing.assert_allclose(table["log_p"], tables[2]["log_p"], rtol=1e-3)
        assert tables[0].equals(tables[1])
        assert len(tables[0]) == 40 * 4


def test_matrix_products_and_triangular_systems_in_double_precision(by_python: Callable[[], None]) -> None:
    data = torch.arange(48).sin().reshape(12, 4).double()
    for autoguide in (AutoMultivariateNormal, AutoLowRankMultivariateNormal):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            ours = fit(regression, autoguide(regression), (data,))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Program, "native", lambda self, arguments: None)
                theirs = fit(regression, autoguide(regression), (data,))
        finally:
            torch.set_default_dtype(default)
        assert is_native(ours) == (autoguide is AutoMultivariateNormal)  # the other one has a Cholesky factorization
        assert_equal(ours, theirs, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_own_linear_algebra_equals_torchs(dtype: torch.dtype) -> None:
    """Every kind of call, with strides of every kind, compiled and run in C."""
    torch.manual_seed(0)
    made = [torch.randn(2, 3, 4), torch.randn(2, 5, 4).mT, torch.randn(4, 3).T, torch.randn(5), torch.randn(2, 3, 3)]
    a, b, matrix, row, t = (tensor.to(dtype) for tensor in made)
    t = t + 3 * torch.eye(3, dtype=dtype)

    def step(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        a, b, matrix, row, t, _, weight = inputs
        found = [
            torch.bmm(a, b),
            torch.mm(matrix, b[0]),
            torch.addmm(row, matrix, b[1]),
            torch.linalg.solve_triangular(t, a, upper=False),
            torch.linalg.solve_triangular(t.mT, a, upper=True),
            torch.linalg.solve_triangular(t, a, upper=True, unitriangular=True),
        ]
        return weight.clone(), torch.cat([of.flatten() for of in found]).double()[None] * weight

    good, weight = torch.ones((), dtype=torch.bool), torch.ones(1, dtype=torch.float64)
    inputs = [a, b, matrix, row, t, good, weight]
    from pyro_elbo_ext.compile.machine_code.step_graph import compile_function

    compiled = compile_function(step, inputs, "inductor", False, {})
    own = [call for call in record(compiled, inputs).calls if "product<" in call.text or "solve<" in call.text]
    assert len(own) >= 8  # batches are taken apart
    steps = native_room.NativeSteps(compiled, inputs, slice(5, 7), [])
    _, table = steps.once(1.0, tuple(inputs[:5]))
    torch.testing.assert_close(torch.tensor(table.ravel()), step(*inputs)[1][0], rtol=1e-5, atol=1e-5)


@pytest.fixture
def anew() -> Iterator[None]:
    """What was found out about torch, and said of it, is found out and said again."""
    remembered = layouts.comparable_in_c, program._say_off
    for of in remembered:
        of.cache_clear()
    yield
    for of in remembered:
        of.cache_clear()


def run_twice(caplog: pytest.LogCaptureFixture) -> list[Fit]:
    with caplog.at_level(logging.WARNING, "pyro_elbo_ext"):
        return [fit(mean_of, AutoNormal(mean_of), (Y, SIGMA), steps=8, run=run) for run in (True, False)]


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_steps_are_taken_in_c_with_the_installed_torch(anew: None, caplog: pytest.LogCaptureFixture) -> None:
    """So with every release that is promised, as each lane of CI runs this."""
    assert all(map(is_native, run_twice(caplog)))
    assert not warnings_in(caplog)


def no_function_of_torch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(layouts, "_GETTERS", (*layouts._GETTERS, "what_is_gone"))


def no_function_of_c10(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(layouts, "_REQUIRES_GRAD", "what_is_gone")


def no_tensor_in_its_object(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(layouts, "_inside", lambda: 0)


def no_graph_of_inductor(patch: pytest.MonkeyPatch) -> None:
    def graph_of(compiled: Any) -> Any:
        raise AttributeError("CompiledFxGraph has no current_callable\nand so on")

    patch.setattr(kernel_calls, "inductor_graph", graph_of)


def no_cell_with_a_graph(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(native_room, "record", lambda compiled, inputs: kernel_calls.inductor_graph(lambda: None))


@pytest.mark.parametrize(
    ("lacks", "reason"),
    [
        (no_function_of_torch, "it does not let C look at tensors"),
        (no_function_of_c10, "it does not let C look at tensors"),
        (no_tensor_in_its_object, "it does not let C look at tensors"),
        (no_graph_of_inductor, "AttributeError: CompiledFxGraph has no current_callable"),
        (no_cell_with_a_graph, "what Inductor compiles keeps its graph in another place"),
    ],
)
def test_a_torch_that_lacks_what_c_needs_is_named_once(
    lacks: Any, reason: str, anew: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = fit(mean_of, AutoNormal(mean_of), (Y, SIGMA), steps=8)
    layouts.comparable_in_c.cache_clear()
    lacks(monkeypatch)
    found = run_twice(caplog)
    assert not any(map(is_native, found))
    (said,) = warnings_in(caplog)
    assert f"do not know torch {torch.__version__} ({reason})" in said
    for one in found:
        assert_equal(one, expected)


def test_what_needs_python_is_called_from_python(caplog: pytest.LogCaptureFixture) -> None:
    def model(y: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Exponential(rate), obs=y)

    def guide(y: Tensor) -> None:
        shape = pyro.param("shape", torch.tensor(2.0), constraint=dist.constraints.positive)
        pyro.sample("rate", dist.Gamma(shape, 1.0))

    with caplog.at_level(logging.INFO, "pyro_elbo_ext"):
        found = fit(model, guide, (torch.tensor([1.0, 2.0]),), run=True)
    assert not is_native(found)
    assert len(found.losses) == 40
    assert "called from Python each time: it calls" in caplog.text


def test_inputs_may_share_memory() -> None:
    data = torch.randn(12, 3)
    found = fit(in_columns, AutoNormal(in_columns), (data[:, :-1], data[:, -1]))
    assert is_native(found)
    theirs = fit(regression, AutoNormal(regression), (data,))
    assert_equal(found, theirs, 1e-6)


def test_two_names_of_the_same_memory_are_told_apart_or_left_to_python() -> None:
    first = fit(in_columns, AutoNormal(in_columns), (Y[:, None], Y), steps=3)
    svi = first.svi
    pyro.set_rng_seed(0)
    before = {name: p.detach().clone() for name, p in pyro.get_param_store()._params.items()}
    one = svi.step(Y[:, None], Y)
    for name, p in pyro.get_param_store()._params.items():
        p.data.copy_(before[name])
    pyro.set_rng_seed(0)
    other = svi.evaluate_loss(Y[:, None], Y + 1)
    pyro.set_rng_seed(0)
    assert svi.evaluate_loss(Y[:, None], Y) == pytest.approx(one)
    pyro.set_rng_seed(0)
    assert svi.step(Y[:, None], Y + 1) == pytest.approx(other)
    assert other != pytest.approx(one, rel=1e-3)


def test_parameters_and_data_that_have_moved_are_found() -> None:
    svi = fit(mean_of, AutoNormal(mean_of), (Y, SIGMA), steps=3).svi
    store = pyro.get_param_store()._params
    for p in store.values():
        p.data = p.data.clone()
    addresses = {name: p.data_ptr() for name, p in store.items()}
    before = {name: p.detach().clone() for name, p in store.items()}
    pyro.set_rng_seed(0)
    expected = svi.evaluate_loss(Y + 5, SIGMA)
    pyro.set_rng_seed(0)
    assert svi.step(Y + 5, SIGMA) == pytest.approx(expected)
    assert all(p.data_ptr() == addresses[name] for name, p in store.items())
    assert all(not torch.equal(p, before[name]) for name, p in store.items())


def test_a_tensor_from_outside_may_have_another_shape() -> None:
    outside = torch.linspace(-1, 1, 8)

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(outside)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=outside)

    svi = fit(model, AutoDelta(model), (), steps=3).svi
    for size in (8, 4):
        outside.data = torch.ones(size)
        expected = SVI(model, svi.guide, svi.optim, Trace_ELBO()).evaluate_loss()
        assert svi.run(2, progress=False)[0] == pytest.approx(expected)


def test_random_numbers_go_on_as_with_single_steps() -> None:
    svi = fit(mean_of, AutoNormal(mean_of), (Y, SIGMA), steps=3).svi
    states = []
    for run in (False, True):
        pyro.set_rng_seed(3)
        if run:
            svi.run(150, Y, SIGMA, progress=False)  # more than one call of C
        else:
            for _ in range(150):
                svi.step(Y, SIGMA)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_schedules_of_the_kl_weight_reach_every_step() -> None:
    def loss() -> DecomposedELBO:
        return DecomposedELBO(kl_weight=lambda step: min(1.0, (step + 1) / 30))

    by_step, by_run = (fit(mean_of, AutoNormal(mean_of), (Y, SIGMA), loss=loss(), run=run) for run in (False, True))
    assert_equal(by_step, by_run)
    weights = by_run.svi.objective.history.kl_weight
    np.testing.assert_allclose(weights, np.minimum(1.0, np.arange(1, 41) / 30))


def test_a_long_run_stops_at_the_first_loss_that_is_not_finite() -> None:
    """In one call of C too, which takes the 100 steps."""
    svi = fit(mean_of, AutoNormal(mean_of), (Y, SIGMA), loss=DecomposedELBO(), run=True).svi
    before = {name: p.detach().clone() for name, p in pyro.get_param_store()._params.items()}
    bad = Y.clone()
    bad[0] = float("nan")
    with pytest.raises(ValueError, match="'y'"):
        svi.run(100, bad, SIGMA, progress=False)
    for name, p in pyro.get_param_store()._params.items():
        assert torch.equal(p, before[name])
    assert svi.objective.num_steps == len(svi.objective.history.steps) == 40
    assert bool(svi.run(10, Y, SIGMA, progress=False).isfinite().all())


def test_an_interrupt_keeps_the_steps_that_were_taken() -> None:
    svi = fit(regression, AutoNormal(regression), (ROWS,), loss=DecomposedELBO(), run=True).svi
    main = threading.main_thread().ident
    assert main is not None
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores interrupts
    timer = threading.Timer(2.0, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            svi.run(1 << 25, ROWS, progress=False)
    finally:
        signal.signal(signal.SIGINT, before)
    steps = svi.objective.num_steps
    assert steps > 40
    assert svi.objective.history.num_recorded == steps
    state = next(iter(svi.optim.get_state().values()))["state"]
    assert int(next(iter(state.values()))["step"]) == steps


def test_buffers_are_written_once_a_step(by_python: Callable[[], None]) -> None:
    """Batch normalization in training mode: 7 steps by ``run``, in graphs of 4, are 7 steps."""

    def make() -> tuple[Any, Any]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(2, 3, bias=False), nn.BatchNorm1d(3), nn.Linear(3, 1))

        def model(x: Tensor) -> None:
            pyro.module("network", network)
            with pyro.plate("rows", len(x)):
                pyro.sample("y", dist.Normal(network(x).squeeze(-1), 1.0), obs=x[:, 0])

        return model, network

    def buffers_after(trainer: Any, run: bool) -> list[Tensor]:
        model, network = make()
        train(trainer, model, lambda x: None, (ROWS,), steps=8, run=run)
        return [buffer.clone() for buffer in network.buffers()]

    buffers = [buffers_after(SVI, False), buffers_after(CompiledSVI, False), buffers_after(CompiledSVI, True)]
    by_python()
    buffers += [buffers_after(CompiledSVI, False), buffers_after(CompiledSVI, True)]
    assert int(buffers[0][2]) == 8
    for others in buffers[1:]:
        for one, other in zip(buffers[0], others, strict=True):
            torch.testing.assert_close(one, other)


def test_a_kernel_that_fails_is_an_error() -> None:
    def model(index: Tensor) -> None:
        table = pyro.sample("table", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("rows", len(index)):
            pyro.sample("y", dist.Normal(table[index], 1.0), obs=torch.zeros(len(index)))

    svi = fit(model, AutoNormal(model), (torch.tensor([0, 1, 2]),), steps=3).svi
    with pytest.raises(RuntimeError, match="index"):
        svi.step(torch.tensor([0, 1, 7]))


@pytest.mark.parametrize("run", [False, True], ids=["step", "run"])
def test_an_exception_at_any_place_leaves_steps_history_and_optimizer_counted_alike(run: bool) -> None:
    """As a time-out by a signal does, in a step, or after it, or while it is recorded."""
    loss, rate, decay = DecomposedELBO(history=History(max_steps=64)), 0.01, 0.999
    optim = pyro.optim.ClippedAdam({"lr": rate, "lrd": decay})  # type: ignore[attr-defined]
    done = fit(eight_schools, AutoNormal(eight_schools), (Y, SIGMA), loss=loss, optim=optim)
    assert is_native(done)
    (made,) = done.svi._programs.values()
    counts = made.binding._counting
    assert counts

    def act(svi: CompiledSVI) -> None:
        if run:
            svi.run(5, Y, SIGMA, progress=False)
        else:
            svi.step(Y, SIGMA)

    rooms, before, partly = (
        (svi, finding, taking, program, native_room, binding, objective, history_room),
        loss.num_steps,
        0,
    )
    for _ in stopped_everywhere(lambda: done.svi, act, *rooms, stride=1 if not run else 2):
        steps = loss.num_steps
        assert loss.history.num_recorded == steps
        assert loss.history.steps[-1] == steps - 1
        for rule in counts:
            assert rule.optimizer.state[rule.parameter]["step"] == int(rule.tensors[-1]) == steps
            assert rule.group["lr"] == pytest.approx(rate * decay**steps, rel=1e-9)
        partly += steps > before
        before = steps
    assert partly > 50  # it came after the step
    act(done.svi)
    assert loss.num_steps == before + (5 if run else 1)
    assert len(loss.history.to_dataframe(by="step")) == len(loss.history)
