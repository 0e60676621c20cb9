"""What model and guide read in Python is what it is now, as in Pyro, not what it was when a graph was made."""

from __future__ import annotations

import enum
import functools
import logging
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from torch import Tensor, nn

from pyro_elbo_ext import CompiledSVI, DecomposedELBO, fit
from pyro_elbo_ext.compile import CannotCompile, reports
from pyro_elbo_ext.training.callbacks import Callback

Y = torch.tensor([1.0, 4.0, -2.0, 0.5, 8.0])
SCALE: Any = 1.0
LEVEL: Any = Y.clone()
SETTINGS: Any = types.ModuleType("settings_of_the_user")
NETWORK: Any = None


def adam() -> Any:
    return pyro.optim.Adam({"lr": 0.05})  # type: ignore[attr-defined]


def by_operator(*args: Any, **options: Any) -> CompiledSVI:
    return CompiledSVI(*args, backend="eager", steps_per_call=2, **options)


def observe(mean: Any, scale: Any, data: Tensor = Y) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 5.0))
    pyro.sample("y", dist.Normal(z + mean, scale).expand(data.shape).to_event(1), obs=data)


class Link(enum.Enum):
    NONE = 0
    DOUBLE = 2


class Program:
    """Reads what is tried in turn."""

    beta = 1.0

    def __init__(self) -> None:
        self.scale: Any = 1.0
        self.link: Any = Link.NONE
        self.name = "identity"
        self.flag: Any = None
        self.config: Any = {"inner": [1.0, {"deep": 2.0}], "other": (1.0, [3.0])}
        self.data: Any = Y.clone()
        self.array = np.array([1.0, 2.0])
        self.number: Any = np.float32(0.5)
        self.act: Any = torch.tanh
        self._hidden = 0.25

    @property
    def hidden(self) -> float:
        return self._hidden

    def shift(self) -> float:
        return 0.125

    def __call__(self) -> None:
        inner = self.config["inner"]
        mean = self.beta + inner[0] + inner[1]["deep"] + self.config["other"][1][0] + self.hidden + self.shift()
        mean = mean + torch.tensor(self.array).sum() + float(self.number) + self.act(torch.tensor(2.0))
        if self.link is Link.DOUBLE:
            mean = 2 * mean
        if self.name != "identity":
            mean = mean + 10
        if self.flag is not None:
            mean = mean - self.flag
        observe(mean, self.scale, self.data)


def of_object(change: Callable[[Program], None]) -> Any:
    def build() -> tuple[Any, Callable[[], None], tuple[Any, ...]]:
        program = Program()
        return program, lambda: change(program), ()

    return build


def of_closure() -> Any:
    beta = 1.0

    def model() -> None:
        def inner() -> float:
            return beta

        observe(inner(), 1.0)

    def change() -> None:
        nonlocal beta
        beta = 7.0

    return model, change, ()


def _helper() -> float:
    return float(SCALE)


def of_global() -> Any:
    def change() -> None:
        global SCALE
        SCALE = 3.0

    globals()["SCALE"] = 1.0
    return lambda: observe(0.0, _helper()), change, ()


def of_global_tensor() -> Any:
    globals()["LEVEL"] = Y.clone()
    return lambda: observe(LEVEL, 1.0), lambda: globals().update(LEVEL=Y + 5), ()


def of_module() -> Any:
    SETTINGS.level = 1.0
    return lambda: observe(SETTINGS.level, 1.0), lambda: setattr(SETTINGS, "level", 4.0), ()


def of_default() -> Any:
    options = {"level": 1.0}

    def model(options: Any = options) -> None:
        observe(options["level"], 1.0)

    return model, lambda: options.update(level=6.0), ()


def of_partial() -> Any:
    model = functools.partial(observe, scale=1.0, mean=0.0)
    return model, lambda: model.keywords.update(mean=3.0), ()


def of_class() -> Any:
    class Fixed:
        level = 1.0

    return lambda: observe(Fixed.level, 1.0), lambda: setattr(Fixed, "level", 5.0), ()


def of_function() -> Any:
    def act(value: float) -> float:
        return value

    table = {"act": act}
    return lambda: observe(table["act"](2.0), 1.0), lambda: table.update(act=lambda value: 3 * value), ()


@dataclass(eq=False)
class Options:
    level: float = 1.0


def of_argument() -> Any:
    options = Options()

    def model(options: Options) -> None:
        observe(options.level, 1.0)

    return model, lambda: setattr(options, "level", 9.0), (options,)


class Slotted:
    __slots__ = ("level",)

    def __init__(self) -> None:
        self.level = 1.0


def of_slot() -> Any:
    options = Slotted()
    return lambda: observe(options.level, 1.0), lambda: setattr(options, "level", 9.0), ()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer: Any = nn.Linear(1, 1)
        self.leaky = nn.LeakyReLU(0.1)
        self.power = 1
        nn.init.constant_(self.layer.weight, -4.0)
        nn.init.constant_(self.layer.bias, 0.25)
        self.register_buffer("offset", torch.tensor(1.0))

    def forward(self) -> None:
        pyro.module("net", self)
        mean = self.leaky(self.layer(torch.ones(1))) ** self.power + self.offset
        observe(mean if self.training else 2 * mean, 1.0)


def _swap(net: Net) -> None:
    layer = nn.Linear(1, 1)
    nn.init.constant_(layer.weight, 2.0)
    nn.init.constant_(layer.bias, 2.0)
    net.layer = layer.requires_grad_(False)
    net.eval()


def of_network(change: Callable[[Net], Any]) -> Any:
    def build() -> tuple[Any, Callable[[], Any], tuple[Any, ...]]:
        net = Net()
        return net, lambda: change(net), ()

    return build


KINDS: dict[str, Any] = {
    "attribute": of_object(lambda of: setattr(of, "scale", 2.0)),
    "attribute of the class": of_object(lambda of: setattr(Program, "beta", 1.0 + Program.beta)),
    "attribute that hides that of the class": of_object(lambda of: setattr(of, "beta", 20.0)),
    "enumeration": of_object(lambda of: setattr(of, "link", Link.DOUBLE)),
    "string": of_object(lambda of: setattr(of, "name", "other")),
    "None": of_object(lambda of: setattr(of, "flag", 2)),
    "integer to float": of_object(lambda of: setattr(of, "scale", 1)),
    "entry": of_object(lambda of: of.config["inner"].__setitem__(0, 4.0)),
    "deep entry": of_object(lambda of: of.config["inner"][1].update(deep=4.0)),
    "list in a tuple": of_object(lambda of: of.config["other"][1].__setitem__(0, 4.0)),
    "array in place": of_object(lambda of: of.array.__setitem__(0, 4.0)),
    "another array": of_object(lambda of: setattr(of, "array", np.array([3.0, 3.0]))),
    "NumPy number": of_object(lambda of: setattr(of, "number", np.float32(2.5))),
    "function": of_object(lambda of: setattr(of, "act", torch.relu)),
    "method of one object": of_object(lambda of: setattr(of, "shift", lambda: 3.0)),
    "behind a property": of_object(lambda of: setattr(of, "_hidden", 3.0)),
    "tensor by another": of_object(lambda of: setattr(of, "data", Y + 5)),
    "tensor by a shorter one": of_object(lambda of: setattr(of, "data", Y[:3])),
    "closure": of_closure,
    "global of a helper": of_global,
    "global tensor": of_global_tensor,
    "module of the user": of_module,
    "default argument": of_default,
    "partial": of_partial,
    "class by its name": of_class,
    "function in a dictionary": of_function,
    "argument": of_argument,
    "slot": of_slot,
    "setting of a layer": of_network(lambda net: setattr(net.leaky, "negative_slope", 0.5)),
    "integer of a network": of_network(lambda net: setattr(net, "power", 2)),
    "another layer": of_network(_swap),
    "training": of_network(lambda net: net.eval()),
    "buffer by another": of_network(lambda net: setattr(net, "offset", torch.tensor(3.0))),
}


def losses_of(make: Callable[..., Any], kind: str, run: bool = False, loss: Any = Trace_ELBO) -> list[float]:
    before = Program.beta
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, change, args = KINDS[kind]()
    svi = make(model, AutoDelta(model), adam(), loss())
    losses = []
    for i in range(2):
        if run and isinstance(svi, CompiledSVI):
            losses += svi.run(3, *args, progress=False).tolist()
        else:
            losses += [svi.step(*args) for _ in range(3)]
        losses.append(svi.evaluate_loss(*args))
        if i == 0:
            change()
    Program.beta = before
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_what_python_reads_is_as_it_is_now(kind: str) -> None:
    expected = losses_of(SVI, kind)
    if kind != "integer to float":
        assert abs(expected[4] - expected[3]) > 0.05
    for run in (False, True):
        assert losses_of(by_operator, kind, run) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["attribute", "tensor by another"])
def test_machine_code_reads_it_too(kind: str) -> None:
    expected = losses_of(SVI, kind)
    for run in (False, True):
        assert losses_of(CompiledSVI, kind, run, DecomposedELBO) == pytest.approx(expected, rel=1e-5)


def test_another_tensor_of_the_same_shape_takes_no_other_graph() -> None:
    program = Program()
    pyro.clear_param_store()
    svi = by_operator(program, AutoDelta(program), adam(), Trace_ELBO())
    for shift in range(5):
        program.data = Y + shift
        assert svi.evaluate_loss() == pytest.approx(SVI(program, svi.guide, svi.optim, Trace_ELBO()).evaluate_loss())
        svi.step()
    assert len(svi._programs) == 1


def test_two_names_of_one_tensor_may_part() -> None:
    class Two:
        def __init__(self) -> None:
            self.one = self.other = Y.clone()

        def __call__(self) -> None:
            observe(self.other, 1.0, self.one)

    program = Two()
    pyro.clear_param_store()
    svi = by_operator(program, AutoDelta(program), adam(), Trace_ELBO())
    for _ in range(3):
        svi.step()
    program.other = Y + 3
    assert svi.evaluate_loss() == pytest.approx(SVI(program, svi.guide, svi.optim, Trace_ELBO()).evaluate_loss())


def test_flags_that_go_back_and_forth_keep_their_graphs() -> None:
    program = Program()
    pyro.clear_param_store()
    svi = by_operator(program, AutoDelta(program), adam(), Trace_ELBO())
    for _ in range(6):
        for program.name in ("identity", "other"):
            svi.step()
    assert len(svi._programs) == 2


def test_a_counter_is_reported_and_takes_no_other_graph(caplog: pytest.LogCaptureFixture) -> None:
    class Counting:
        def __init__(self) -> None:
            self.calls = 0
            self.seen: list[int] = []
            self.last: Any = None

        def __call__(self) -> None:
            self.calls += 1
            self.seen.append(self.calls)
            self.last = torch.ones(2)
            observe(self.last.sum(), 1.0)

    program = Counting()
    pyro.clear_param_store()
    svi = by_operator(program, AutoDelta(program), adam(), Trace_ELBO())
    with caplog.at_level(logging.WARNING, "pyro_elbo_ext"):
        for _ in range(6):
            svi.step()
    (record,) = caplog.records
    assert "Counting.calls and Counting.seen themselves" in record.getMessage()
    assert len(svi._programs) == 1


def test_a_value_that_changes_at_each_step_is_an_error_that_names_it(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports, "_MOST_CHANGES", 6)  # each one is a graph
    program = Program()
    pyro.clear_param_store()
    svi = by_operator(program, AutoDelta(program), adam(), Trace_ELBO())

    def anneal() -> None:
        for i in range(20):
            program.scale = 1.0 + i
            svi.step()

    with caplog.at_level(logging.WARNING, "pyro_elbo_ext"), pytest.raises(CannotCompile, match=r"Program\.scale"):
        anneal()
    assert any("Program.scale changes from step to step" in record.getMessage() for record in caplog.records)
    expected, found = [], []
    for make, losses in ((SVI, expected), (lambda *args: by_operator(*args, fallback=True), found)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        program = Program()
        svi = make(program, AutoDelta(program), adam(), Trace_ELBO())
        for i in range(12):
            program.scale = 1.0 + i
            losses.append(svi.step())
    assert found == pytest.approx(expected, rel=1e-5)
    assert "Program.scale" in svi.eager_reason  # type: ignore[operator]


def test_settings_of_the_loss() -> None:
    loss = Trace_ELBO()
    pyro.clear_param_store()
    program = Program()
    svi = by_operator(program, AutoDelta(program), adam(), loss)
    for _ in range(3):
        svi.step()
    (made,) = svi._programs.values()
    assert made.fits()  # type: ignore[union-attr]
    loss.num_particles = 3
    assert not made.fits()  # type: ignore[union-attr]


def test_nothing_of_this_package_is_taken_for_the_users(caplog: pytest.LogCaptureFixture) -> None:
    """Its own objects change in every run, and its globals never: watching them costs more than the step."""
    loss = DecomposedELBO()
    pyro.clear_param_store()
    program = Program()
    svi = by_operator(program, AutoDelta(program), adam(), loss)
    with caplog.at_level(logging.WARNING, "pyro_elbo_ext"):
        for _ in range(3):
            svi.step()
    assert not caplog.records
    (made,) = svi._programs.values()
    settings = {f"DecomposedELBO.{name}" for name in vars(loss)}
    names = {name for name in made.guards.names() if name not in settings}  # type: ignore[union-attr]
    assert any(name.startswith("Program.") for name in names)
    others = {name for name in names if not name.startswith(("Program.", "Link"))}
    others = {name for name in others if not name.startswith(("the code of ", "the class of "))}
    assert others == {"the global 'Link'", "the global 'observe'", "a default argument of observe"}


def test_errors_name_the_users_line_and_not_this_packages() -> None:
    program = Program()
    program.act = lambda one: torch.tensor(float(pyro.sample("drawn", dist.Normal(0.0, 1.0)).detach()))
    pyro.clear_param_store()
    svi = by_operator(program, AutoDelta(program), adam(), DecomposedELBO())
    with pytest.raises(
        CannotCompile, match=r"reads the value of a tensor into Python, at .*test_compile_reads\.py:\d+"
    ):
        svi.step()  # Pyro's, then the graph is made


def test_fit_trains_with_what_is_there_now() -> None:
    found = []
    for compiled in ({"backend": "eager"}, False):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        program = Program()

        class Anneal(Callback):
            def log(self, step: int, metrics: Any, of: Program = program) -> None:
                of.scale = 3.0

        fit(
            program,
            AutoDelta(program),
            num_steps=30,
            callbacks=[Anneal()],
            log_every=10,
            compiled=compiled,
            progress=False,
        )
        found.append(pyro.param("AutoDelta.z").item())
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_nothing_is_left_patched() -> None:
    losses_of(by_operator, "attribute")
    for cls in (nn.Module, Program, pyro.poutine.messenger.Messenger):
        assert "__getattribute__" not in vars(cls)
