"""Whatever fails in compiling is a reason to train as Pyro does, from the same state; time-outs come through."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from pyro_elbo_ext import CompiledSVI, DecomposedELBO, compiled_log_density
from pyro_elbo_ext.compile import CannotCompile, program
from pyro_elbo_ext.compile.machine_code import compiler, step_graph
from pyro_elbo_ext.compile.machine_code.kernel_calls import NotNative
from pyro_elbo_ext.compile.machine_code.layouts import Changed
from tests.models import through_origin as line

X = torch.linspace(-1.0, 1.0, 20)


def adam() -> Any:
    return pyro.optim.Adam({"lr": 0.01})  # type: ignore[attr-defined]


def rmsprop() -> Any:
    return pyro.optim.RMSprop({"lr": 0.01})  # type: ignore[attr-defined]


class Broken:
    """``make_fx`` as a compiler that fails from some call on."""

    def __init__(self, error: Exception, after: int) -> None:
        self.error, self.left, self.tried = error, after, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.tried += 1
        if self.tried > self.left:
            raise self.error
        return make_fx(*args, **kwargs)


make_fx = step_graph.make_fx

Calls = Callable[[Any], list[Any]]


def steps(svi: Any) -> list[Any]:
    return [svi.step(X) for _ in range(5)]


def steps_of_two_shapes(svi: Any) -> list[Any]:
    return [svi.step(X[:n]) for n in (20, 20, 20, 6, 6, 20, 6, 20)]


def loss_in_between(svi: Any) -> list[Any]:
    return [svi.step(X), svi.step(X), svi.evaluate_loss(X), svi.evaluate_loss(X), svi.step(X)]


def run(svi: Any) -> list[Any]:
    if isinstance(svi, CompiledSVI):
        return svi.run(9, X, progress=False).tolist()
    return [svi.step(X) for _ in range(9)]


# what is called, the optimizer, and the graphs that are compiled before it fails
WHEN: dict[str, tuple[Calls, Callable[[], Any], int]] = {
    "the first graph": (steps, adam, 0),
    "a second shape": (steps_of_two_shapes, adam, 1),
    "the loss": (loss_in_between, adam, 1),
    "the gradient": (steps, rmsprop, 0),
    "several steps, in a run": (run, adam, 1),
    "one step, in a run": (run, adam, 0),
}


class Trained(NamedTuple):
    losses: list[Any]
    parameters: dict[str, Tensor]
    counts: dict[str, float]  # of the optimizer's steps
    svi: Any


def trained(make: Callable[..., Any], calls: Calls, optim: Any, loss: Any) -> Trained:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = make(line, AutoNormal(line), optim, loss)
    losses = calls(svi)
    counts = {name: float(state["state"][0]["step"]) for name, state in svi.optim.get_state().items()}
    return Trained(losses, values(), counts, svi)


def values() -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in pyro.get_param_store()._params.items()}


def assert_same(ours: Trained, theirs: Trained) -> None:
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-6)
    assert ours.counts == theirs.counts
    for name, value in theirs.parameters.items():
        torch.testing.assert_close(ours.parameters[name], value)


@pytest.mark.parametrize("loss", [Trace_ELBO, lambda: DecomposedELBO(kl="sampled")], ids=["Pyro's", "ours"])
@pytest.mark.parametrize("when", WHEN)
def test_pyro_goes_on_where_a_graph_fails(
    when: str, loss: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls, optim, after = WHEN[when]
    theirs = trained(SVI, calls, optim(), loss())
    broken = Broken(RuntimeError("the compiler is broken\nmore"), after)
    monkeypatch.setattr(step_graph, "make_fx", broken)

    def make(*args: Any) -> CompiledSVI:
        return CompiledSVI(*args, backend="eager", steps_per_call=4, fallback=True)

    objective = loss()
    with caplog.at_level(logging.WARNING):
        ours = trained(make, calls, optim(), objective)
    assert_same(ours, theirs)
    assert broken.tried > after
    assert "RuntimeError: the compiler is broken" in ours.svi.eager_reason
    assert sum("the compiler is broken" in record.getMessage() for record in caplog.records) == 1
    if isinstance(objective, DecomposedELBO):
        assert objective.history is not None
        assert list(objective.history.to_dataframe()["step"].unique()) == list(range(objective.num_steps))
        assert len(ours.losses) == objective.num_steps + (when == "the loss") * 2


def inductor_error(kind: str, *of: Any) -> Exception:
    from torch._inductor import exc

    return exc.InductorError(getattr(exc, kind)(*of) if hasattr(exc, kind) else NotImplementedError(*of), None)


FAILURES: dict[str, tuple[Callable[[], Exception], str]] = {
    "full disk": (
        lambda: OSError(28, "No space left on device", "/cache/x"),
        r"No space left on device(.|\n)*TORCHINDUCTOR_CACHE_DIR",
    ),
    "import": (lambda: ImportError("no module of torch"), "ImportError: no module of torch"),
    "import again": (lambda: AssertionError("Artifact of type=x already registered"), "start Python anew"),
    "slow compiler": (lambda: subprocess.TimeoutExpired("g++", 30), "TimeoutExpired(.|\n)*30 seconds"),
    "no compiler": (lambda: inductor_error("InvalidCxxCompiler"), r"No working C\+\+ compiler(.|\n)*Install"),
    "failing compiler": (
        lambda: inductor_error("CppCompileError", ["g++", "x.cpp"], "x.cpp: In function f\nx.cpp:1: error: bad"),
        r"the C\+\+ compiler failed: x.cpp:1: error: bad",
    ),
    "missing operator": (lambda: inductor_error("", "an operator"), "NotImplementedError: an operator"),
    "memory": (MemoryError, "MemoryError"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_the_true_cause_is_said(failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, message = FAILURES[failure]
    pyro.clear_param_store()
    svi = CompiledSVI(line, AutoNormal(line), adam(), Trace_ELBO(), backend="eager")
    svi.step(X)
    monkeypatch.setattr(step_graph, "make_fx", Broken(make(), 0))
    before = values()
    for _ in range(2):  # and repeated
        with pytest.raises(CannotCompile, match=message) as refusal:
            svi.step(X)
    assert ("C++ compiler" in str(refusal.value)) == (failure in ("no compiler", "failing compiler"))
    assert all(torch.equal(value, before[name]) for name, value in values().items())


def test_a_machine_without_a_compiler_is_asked_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pyro.clear_param_store()
    broken = Broken(OSError(28, "No space left on device"), 0)
    monkeypatch.setattr(step_graph, "make_fx", broken)
    svi = CompiledSVI(line, AutoNormal(line), adam(), Trace_ELBO(), backend="eager", fallback=True)
    for n in (20, 20, 6, 6, 7, 7):
        svi.step(X[:n])
    assert broken.tried == 1
    assert len(caplog.records) == 1


def test_tracing_that_fails_is_a_reason_too() -> None:
    def model(x: Tensor) -> None:
        if get_proxy_mode() is not None:
            raise NotImplementedError("not while it is traced")
        line(x)

    pyro.clear_param_store()
    guide = AutoNormal(line)
    svi = CompiledSVI(model, guide, adam(), Trace_ELBO(), backend="eager", fallback=True)
    svi.step(X)
    svi.step(X)
    assert svi.eager_reason is not None
    assert "NotImplementedError: not while it is traced" in svi.eager_reason


def test_a_backend_that_fails_at_its_first_call() -> None:
    from torch._dynamo import list_backends, register_backend

    backend = "failing_in_tests"
    if backend not in list_backends(exclude_tags=()):

        @register_backend(name=backend)
        def fail(graph: Any, inputs: Any) -> Any:
            raise LookupError("no such device")

    pyro.clear_param_store()
    svi = CompiledSVI(line, AutoNormal(line), adam(), Trace_ELBO(), backend=backend, fallback=True)
    losses = [svi.step(X) for _ in range(3)]
    assert len(losses) == 3
    assert svi.eager_reason is not None
    assert "LookupError: no such device" in svi.eager_reason


def test_a_lazy_backend_takes_no_step_when_it_compiles() -> None:
    theirs = trained(SVI, steps, adam(), Trace_ELBO())

    def make(*args: Any) -> CompiledSVI:
        return CompiledSVI(*args, backend="aot_eager", same_draws=True)

    ours = trained(make, steps, adam(), Trace_ELBO())
    assert ours.svi.eager_reason is None
    assert_same(ours, theirs)


@pytest.mark.parametrize("error", [CannotCompile("told not to be"), Changed(X)], ids=["fails", "changed"])
def test_a_run_returns_the_losses_of_steps_before_a_graph_fails(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as were asked for, each of them recorded once, and the same as without."""
    take, calls, until = program.Program.take, 0, 3

    def fails(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == until or (calls > until and isinstance(error, CannotCompile)):
            raise error
        return take(self, *args)

    def run(patched: bool) -> tuple[list[float], DecomposedELBO, CompiledSVI]:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        loss = DecomposedELBO()
        svi = CompiledSVI(line, AutoNormal(line), adam(), loss, backend="eager", fallback=True, steps_per_call=2)
        svi.step(X)
        with monkeypatch.context() as patch:
            if patched:
                patch.setattr(program.Program, "take", fails)
            return svi.run(9, X, progress=False).tolist(), loss, svi

    expected, _, _ = run(False)
    losses, loss, svi = run(True)
    assert calls >= until
    assert losses == pytest.approx(expected, rel=1e-5)
    assert loss.history is not None
    assert loss.num_steps == loss.history.num_recorded == 10
    assert loss.history.objective[1:] == pytest.approx([-value for value in losses])
    assert (svi.eager_reason is None) == isinstance(error, Changed)
    state = next(iter(svi.optim.get_state().values()))["state"]
    assert int(next(iter(state.values()))["step"]) == 10


# ----------------------------------------------------------------------------------------------------------------------
# What comes from outside


class OutOfTime(Exception):
    pass


@contextmanager
def time_out(error: BaseException) -> Iterator[None]:
    def handler(number: int, frame: Any) -> None:
        raise error

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def swallows(then: Callable[..., Any]) -> Callable[..., Any]:
    """Code of a compiler in which the time is up, and which hides it."""

    def compiling(*args: Any, **kwargs: Any) -> Any:
        try:
            signal.raise_signal(signal.SIGUSR1)
        except Exception as error:
            if then is not make_fx:
                raise RuntimeError("wrapped") from error
        return then(*args, **kwargs)

    return compiling


@pytest.mark.parametrize(
    "error", [OutOfTime("up"), TimeoutError("up"), RuntimeError("up"), KeyboardInterrupt()], ids=repr
)
@pytest.mark.parametrize("fallback", [True, False])
def test_time_outs_come_through(error: BaseException, fallback: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pyro.clear_param_store()
    svi = CompiledSVI(line, AutoNormal(line), adam(), Trace_ELBO(), backend="eager", fallback=fallback)
    svi.step(X)
    before = values()
    with time_out(error):
        for code in (swallows(make_fx), swallows(Broken(RuntimeError(), 0))):
            monkeypatch.setattr(step_graph, "make_fx", code)
            with pytest.raises(type(error)) as caught:
                svi.step(X)
            assert caught.value is error
            own = signal.getsignal(signal.SIGUSR1)
            assert callable(own)
            assert own.__qualname__.endswith("time_out.<locals>.handler")
    assert all(torch.equal(value, before[name]) for name, value in values().items())
    monkeypatch.undo()
    svi.step(X)  # it goes on, compiled
    assert svi.eager_reason is None
    assert svi.is_traced(X)


def test_time_outs_come_through_while_tracing() -> None:
    def model(x: Tensor) -> None:
        if get_proxy_mode() is not None:
            signal.raise_signal(signal.SIGUSR1)
        line(x)

    pyro.clear_param_store()
    guide = AutoNormal(line)
    guide(X)
    svi = CompiledSVI(model, guide, adam(), Trace_ELBO(), backend="eager", fallback=True)
    with time_out(OutOfTime()), pytest.raises(OutOfTime):
        svi.step(X)


def test_time_outs_come_through_in_the_loop_in_c(monkeypatch: pytest.MonkeyPatch) -> None:
    error = TimeoutError("up")  # an OSError

    def make_native(*args: Any) -> NotNative:
        try:
            signal.raise_signal(signal.SIGUSR1)
        except OSError as caught:
            return NotNative(str(caught))
        raise AssertionError

    pyro.clear_param_store()
    svi = CompiledSVI(line, AutoNormal(line), adam(), Trace_ELBO(), fallback=True)
    monkeypatch.setattr(program, "compile_function", lambda function, *args: function)
    monkeypatch.setattr(program.Program, "_make_native", make_native)
    svi.step(X)
    with time_out(error), pytest.raises(TimeoutError):
        svi.step(X)
    (made,) = svi._programs.values()
    assert isinstance(made, program.Program)
    assert made._native is None  # it is tried again


@pytest.mark.parametrize("error", [OutOfTime(), TimeoutError()], ids=repr)
def test_time_outs_come_through_a_log_density(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "import_module", swallows(lambda name: sys.modules[name]))
    with time_out(error), pytest.raises(type(error)):
        compiled_log_density(line, X)


def test_time_outs_come_through_the_first_run_of_a_log_density() -> None:
    runs: list[int] = []

    def model(x: Tensor) -> None:
        runs.append(0)
        if len(runs) == 1:
            signal.raise_signal(signal.SIGUSR1)
        line(x)

    with time_out(OutOfTime()), pytest.raises(OutOfTime):
        compiled_log_density(model, X)


def test_errors_that_a_thread_was_sent_come_through() -> None:
    # of a class that the compiler does not know, raised in the middle of its code
    namespace: dict[str, Any] = {"__name__": "torch.fx.somewhere", "error": OutOfTime}
    exec("def compiling(*args, **kwargs):\n    raise error", namespace)
    with pytest.raises(OutOfTime), compiler.failures_are_reasons("compiling"):
        namespace["compiling"]()
    namespace["error"] = KeyError
    with pytest.raises(CannotCompile, match="KeyError"), compiler.failures_are_reasons("compiling"):
        namespace["compiling"]()


# ----------------------------------------------------------------------------------------------------------------------
# Broken machines

_TRAIN = """
import logging, resource, sys, torch, pyro
from pyro.infer.autoguide import AutoNormal
from pyro.infer import Trace_ELBO
from pyro_elbo_ext import CompiledSVI, fit
from tests.test_compile_fallback import X, adam, line
if sys.argv[1] == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    logging.disable()
said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("pyro_elbo_ext.compile").addHandler(handler)
svi = CompiledSVI(line, AutoNormal(line), adam(), Trace_ELBO(), fallback=True)
losses = [svi.step(X) for _ in range(3)]
assert all(loss == loss for loss in losses)
pyro.clear_param_store()
result = fit(line, AutoNormal(line), X, num_steps=20, progress=False, seed=0)
assert result.num_steps == 20
assert result.uncompiled == svi.eager_reason, result.uncompiled
assert sys.argv[1] == "full" or len(said) == 2, said  # one of each
pyro.clear_param_store()
assert fit(line, "auto", X, progress=False, seed=0).uncompiled is None
print(svi.eager_reason)
"""


@pytest.mark.parametrize(
    ("machine", "cause"),
    [
        ({"CXX": "false", "TORCHINDUCTOR_CACHE_DIR": "{folder}"}, "Install a C++ compiler"),
        ({"PATH": "{folder}", "TORCHINDUCTOR_CACHE_DIR": "{folder}"}, "Install a C++ compiler"),
        ({"TORCHINDUCTOR_CACHE_DIR": "{folder}/file"}, "File exists"),
        ({"TORCHINDUCTOR_CACHE_DIR": "{folder}", "full": "full"}, "with space left"),
    ],
    ids=["a compiler that fails", "no compiler", "a file for a folder", "a full disk"],
)
@pytest.mark.slow
def test_broken_machines(machine: dict[str, str], cause: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    root = Path(__file__).parents[1]
    there = {name: value.format(folder=tmp_path) for name, value in machine.items()}
    environment = {**os.environ, "PYTHONPATH": str(root), **there}
    command = [sys.executable, "-W", "ignore", "-c", _TRAIN, there.get("full", "")]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert cause in done.stdout


def test_a_time_out_in_the_import_of_the_compiler_waits_for_its_end() -> None:
    """Half an import of torch's compiler, cut off by a handler of signals, is of no use to the process."""
    script = """
import signal
from pyro_elbo_ext.compile.machine_code.compiler import import_inductor

def out(*_):
    raise TimeoutError("time is up")

signal.signal(signal.SIGALRM, out)
signal.setitimer(signal.ITIMER_REAL, 0.1)
try:
    import_inductor()
except TimeoutError as error:
    print(error)
import_inductor()
print("imported")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[:2] == ["time is up", "imported"], done.stderr
