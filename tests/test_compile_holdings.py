"""What programs read by ways that cannot be watched: namespaces, modules, classes, functions, shapes of tensors."""

from __future__ import annotations

import argparse
import functools
import sys
import threading
import types
import weakref
from array import array
from collections import ChainMap, UserDict
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from torch import nn

from pyro_elbo_ext import CompiledSVI
from pyro_elbo_ext.compile import CannotCompile

Y = torch.tensor([1.0, 4.0, -2.0, 0.5, 8.0])
Built = tuple[Callable[[], None], Callable[[], None]]
MODULE: Any = types.ModuleType("module_of_a_user")
MODULE.inner = types.ModuleType("module_of_a_user.inner")
sys.modules["module_of_a_user"], sys.modules["module_of_a_user.inner"] = MODULE, MODULE.inner
GIVEN = 1.0


class Plain:
    """An object of the user's."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


def observe(mean: Any) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 5.0))
    pyro.sample("y", dist.Normal(z + mean, 1.0).expand([5]).to_event(1), obs=Y)


def of(holder: Any, read: Callable[[Any], Any], change: Callable[[Any], Any]) -> Callable[[], Built]:
    """A model that reads something of what ``holder`` makes, and how it is changed."""

    def build() -> Built:
        held = holder()
        return lambda: observe(read(held)), lambda: change(held)

    return build


def _set(name: str, value: Any) -> Callable[[Any], None]:
    return lambda held: setattr(held, name, value)


def _module(read: Callable[[], float]) -> Callable[[], Built]:
    def build() -> Built:
        MODULE.LEVEL = MODULE.inner.LEVEL = 1.0

        def change() -> None:
            MODULE.LEVEL = MODULE.inner.LEVEL = 4.0

        return lambda: observe(read()), change

    return build


def _imported_inside() -> float:
    import module_of_a_user as inside

    return float(inside.LEVEL)


def _imported_from() -> float:
    from module_of_a_user.inner import LEVEL

    return float(LEVEL)


def _class(read: Callable[[Any], float]) -> Callable[[], Built]:
    class Parent:
        level = 1.0

        def by_super(self) -> float:
            return self.level

    class Child(Parent):
        @classmethod
        def by_class(cls) -> float:
            return cls.level

        def by_super(self) -> float:
            return super().level

    def build() -> Built:
        Parent.level = 1.0
        one = Child()
        return lambda: observe(read(one)), lambda: setattr(Parent, "level", 4.0)

    return build


def _function() -> Built:
    def model() -> None:
        observe(model.level)  # type: ignore[attr-defined]

    model.level = 1.0  # type: ignore[attr-defined]
    return model, lambda: setattr(model, "level", 4.0)


def _code() -> Built:
    def helper() -> float:
        return 1.0

    def other() -> float:
        return 4.0

    return lambda: observe(helper()), lambda: setattr(helper, "__code__", other.__code__)


def _command_line() -> Built:
    given: dict[str, Any] = {"observe": observe, "LEVEL": 1.0, "__name__": "__main__"}
    exec("def model():\n    observe(LEVEL)", given)  # as with python -c
    return given["model"], lambda: given.update(LEVEL=4.0)


def _other_class() -> Built:
    class Low:
        def level(self) -> float:
            return 1.0

    class High:
        def level(self) -> float:
            return 4.0

    one = Low()
    return lambda: observe(one.level()), lambda: setattr(one, "__class__", High)


def _own_lookup() -> Built:
    class Own:
        def __init__(self) -> None:
            self.inner = {"level": 1.0}

        def __getattribute__(self, name: str) -> Any:
            inner = object.__getattribute__(self, "inner")
            return inner[name] if name in inner else object.__getattribute__(self, name)

    one: Any = Own()
    return lambda: observe(one.level), lambda: one.inner.update(level=4.0)


def _partial(**keywords: Any) -> Callable[[], Built]:
    def build() -> Built:
        config = {"level": 1.0}
        inner = functools.partial(lambda given: observe(given["level"]), **dict.fromkeys(keywords, config))
        model = inner if keywords else functools.partial(inner, config)
        return model, lambda: config.update(level=4.0)

    return build


def _cached() -> Built:
    @functools.cache
    def config() -> dict[str, float]:
        return {"level": 1.0}

    return lambda: observe(config()["level"]), lambda: config().update(level=4.0)


def _weak() -> Built:
    one = Plain(level=1.0)
    reference = weakref.ref(one)

    def change() -> None:
        one.level = 4.0  # type: ignore[attr-defined]

    return lambda: observe(reference().level), change  # type: ignore[union-attr]


def _deep() -> list[Any]:
    inner: list[Any] = [1.0]
    for _ in range(12):
        inner = [inner]
    return inner


def _innermost(value: Any) -> Any:
    while isinstance(value[0], list):
        value = value[0]
    return value


def _global() -> Built:
    globals()["GIVEN"] = 1.0
    return lambda: observe(globals()["GIVEN"]), lambda: globals().update(GIVEN=4.0)


def _no_global() -> Built:
    globals().pop("TO_COME", None)

    def model() -> None:
        try:
            level = TO_COME  # type: ignore[name-defined]
        except NameError:
            level = 1.0
        observe(level)

    return model, lambda: globals().update(TO_COME=4.0)


def _slotted() -> Any:
    class Slotted:
        __slots__ = ("level",)

    return Slotted()


def _with_tag() -> Any:
    data = torch.zeros(3)
    data.level = 1.0  # type: ignore[attr-defined]
    return data


def _assigned(key: Any, value: Any) -> Callable[[Any], Any]:
    return lambda held: held.__setitem__(key, value)


KINDS: dict[str, Callable[[], Built]] = {
    "SimpleNamespace": of(lambda: types.SimpleNamespace(level=1.0), lambda of: of.level, _set("level", 4.0)),
    "argparse": of(lambda: argparse.Namespace(level=1.0), lambda of: of.level, _set("level", 4.0)),
    "in an object": of(
        lambda: Plain(args=argparse.Namespace(level=1.0)), lambda of: of.args.level, lambda of: _set("level", 4.0)(of.args)
    ),
    "UserDict": of(lambda: UserDict(level=1.0), lambda of: of["level"], _assigned("level", 4.0)),
    "ChainMap": of(lambda: ChainMap({"level": 1.0}), lambda of: of["level"], _assigned("level", 4.0)),
    "read-only view": of(
        lambda: (config := {"level": 1.0}, types.MappingProxyType(config)), lambda of: of[1]["level"],
        lambda of: of[0].update(level=4.0),
    ),
    "array.array": of(lambda: array("d", [1.0]), lambda of: of[0], _assigned(0, 4.0)),
    "bytearray": of(lambda: bytearray([1]), lambda of: of[0], _assigned(0, 4)),
    "objects in an array": of(
        lambda: np.array([[1.0], None], dtype=object), lambda of: of[0][0], lambda of: of[0].__setitem__(0, 4.0)
    ),
    "DataFrame": of(
        lambda: pd.DataFrame({"level": [1.0]}), lambda of: float(of["level"].iloc[0]),
        lambda of: of.loc.__setitem__((0, "level"), 4.0),
    ),
    "context variable": of(lambda: ContextVar("level", default=1.0), lambda of: of.get(), lambda of: of.set(4.0)),
    "of the thread": of(
        lambda: (local := threading.local(), setattr(local, "level", 1.0))[0], lambda of: of.level, _set("level", 4.0)
    ),
    "deep": of(_deep, lambda of: _innermost(of)[0], lambda of: _assigned(0, 4.0)(_innermost(of))),
    "of a distribution": of(
        lambda: dist.Normal(torch.tensor(1.0), torch.tensor(1.0)), lambda of: of.loc, _set("loc", torch.tensor(4.0))
    ),
    "an attribute to come": of(Plain, lambda of: getattr(of, "level", 1.0), _set("level", 4.0)),
    "an attribute of a module to come": of(nn.Identity, lambda of: getattr(of, "level", 1.0), _set("level", 4.0)),
    "a slot to come": of(_slotted, lambda of: getattr(of, "level", 1.0), _set("level", 4.0)),
    "a global to come": _no_global,
    "globals()": _global,
    "__getattribute__": _own_lookup,
    "type(self)": _class(lambda of: type(of).level),
    "__class__": _class(lambda of: of.__class__.level),
    "class method": _class(lambda of: of.by_class()),
    "super()": _class(lambda of: of.by_super()),
    "another class": _other_class,
    "getattr of a module": _module(lambda: getattr(MODULE, "LEVEL")),  # noqa: B009
    "vars of a module": _module(lambda: vars(MODULE)["LEVEL"]),
    "module in a module": _module(lambda: MODULE.inner.LEVEL),
    "import inside": _module(_imported_inside),
    "import from inside": _module(_imported_from),
    "module in a list": of(
        lambda: (setattr(MODULE, "LEVEL", 1.0), [MODULE])[1], lambda of: of[0].LEVEL, lambda of: _set("LEVEL", 4.0)(of[0])
    ),
    "attribute of a function": _function,
    "code of a function": _code,
    "command line": _command_line,
    "argument of a partial": _partial(),
    "keyword of a partial": _partial(given=1),
    "cached function": _cached,
    "weak reference": _weak,
    "attribute of a tensor": of(_with_tag, lambda of: of.level, _set("level", 4.0)),
    "number of rows": of(lambda: torch.zeros(3), lambda of: float(len(of)), lambda of: of.resize_(5)),
    "shape in a list": of(lambda: [torch.zeros(3)], lambda of: float(of[0].numel()), lambda of: of[0].resize_(5)),
    "dtype": of(
        lambda: torch.zeros(3), lambda of: float(of.element_size()), lambda of: setattr(of, "data", of.data.double())
    ),
    "requires_grad": of(lambda: torch.zeros(3), lambda of: float(of.requires_grad), lambda of: of.requires_grad_()),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_watched_is_as_it_is_now(kind: str) -> None:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, change = KINDS[kind]()
    optim = pyro.optim.Adam({"lr": 0.05})  # type: ignore[attr-defined]
    compiled = CompiledSVI(model, AutoDelta(model), optim, Trace_ELBO(), backend="eager")
    pyros = SVI(model, compiled.guide, optim, Trace_ELBO())
    compiled.step()
    before = compiled.evaluate_loss()
    assert before == pytest.approx(pyros.evaluate_loss(), rel=1e-5)
    (made,) = compiled._programs.values()
    assert made.fits()  # type: ignore[union-attr]
    change()
    after = compiled.evaluate_loss()
    assert after == pytest.approx(pyros.evaluate_loss(), rel=1e-5)
    assert abs(after - before) > 0.5


def by_operator(model: Any, guide: Any, **options: Any) -> CompiledSVI:
    optim = pyro.optim.Adam({"lr": 0.05})  # type: ignore[attr-defined]
    return CompiledSVI(model, guide, optim, Trace_ELBO(), backend="eager", **options)


def pyros(model: Any, guide: Any, **options: Any) -> SVI:
    return SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())  # type: ignore[attr-defined]


def losses_of(make: Callable[..., Any], train: Callable[[Callable[..., Any]], list[float]]) -> list[float]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    return train(make)


def test_a_handler_around_a_step_is_the_one_of_now(caplog: pytest.LogCaptureFixture) -> None:
    def train(make: Callable[..., Any]) -> list[float]:
        def model() -> None:
            observe(0.0)

        svi = make(model, AutoDelta(model))
        losses = [svi.step(), svi.step()]
        for scale in (0.5, 0.1):
            with poutine.scale(scale=scale):
                losses += [svi.step(), float(svi.run(1, progress=False)[0]) if make is by_operator else svi.step()]
        return [*losses, svi.step()]

    assert losses_of(by_operator, train) == pytest.approx(losses_of(pyros, train), rel=1e-5)
    assert [record.getMessage() for record in caplog.records if "ScaleMessenger" in record.getMessage()]


def test_another_model_and_another_guide() -> None:
    def train(make: Callable[..., Any]) -> list[float]:
        def model() -> None:
            observe(0.0)

        def other() -> None:
            pyro.sample("z", dist.Delta(pyro.param("other", torch.tensor(3.0))))

        svi = make(model, AutoDelta(model))
        losses = [svi.step(), svi.step()]
        svi.model = poutine.scale(model, 0.1)
        losses += [svi.step(), svi.step()]
        svi.guide = other
        return [*losses, svi.step(), svi.step()]

    assert losses_of(by_operator, train) == pytest.approx(losses_of(pyros, train), rel=1e-5)


@pytest.mark.parametrize("late", [False, True])
def test_arguments_that_need_a_gradient_are_refused_by_name(late: bool) -> None:
    def train(make: Callable[..., Any]) -> list[float]:
        encoder = nn.Linear(3, 1)
        x = torch.randn(5, 3)

        def model(mean: torch.Tensor) -> None:
            pyro.module("encoder", encoder)
            observe(mean.squeeze(-1))

        svi = make(model, AutoDelta(model))
        before = [svi.step(encoder(x).detach()) for _ in range(2 * late)]
        return [*before, *[svi.step(encoder(x)) for _ in range(3)]]

    with pytest.raises(CannotCompile, match=r"argument 'mean' requires a gradient.*\.detach\(\)"):
        losses_of(by_operator, train)
    with_fallback = functools.partial(by_operator, fallback=True)
    assert losses_of(with_fallback, train) == pytest.approx(losses_of(pyros, train), rel=1e-5)


@pytest.mark.parametrize("captured", [False, True])
def test_signs_that_are_not_in_memory_are_refused(captured: bool) -> None:
    numbers = torch.complex(Y, Y)
    plain, negated = numbers.imag, numbers.conj().imag
    model = (lambda mean: observe(negated)) if captured else observe
    pyro.clear_param_store()
    svi = by_operator(model, AutoDelta(model))
    if not captured:
        svi.step(plain)
        svi.step(plain)
    with pytest.raises(CannotCompile, match=r"resolve_neg"):
        svi.step(plain if captured else negated)


def test_tensors_from_outside_that_are_not_strided() -> None:
    matrix = torch.eye(5).to_sparse()

    def model() -> None:
        observe(torch.sparse.mm(matrix, torch.ones(5, 1)).squeeze(-1))

    pyro.clear_param_store()
    with pytest.raises(CannotCompile, match=r"torch\.sparse_coo"):
        by_operator(model, AutoDelta(model)).step()


def test_trial_runs_leave_no_trace_in_tensors_that_a_model_writes_to() -> None:
    def train(make: Callable[..., Any]) -> list[float]:
        count, rows = torch.zeros(()), torch.zeros(2, 3)
        seen = []

        def model() -> None:
            count.add_(1)
            rows[1].add_(2)
            observe(0.0)

        svi = make(model, AutoDelta(model))
        for _ in range(4):
            svi.step()
            seen += [float(count), float(rows.sum())]
        return seen

    assert losses_of(by_operator, train) == losses_of(pyros, train)
