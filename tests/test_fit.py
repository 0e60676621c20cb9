"""The training loop: the same steps as SVI's, safety, data, validation, checkpoints."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn
from torch.distributions import constraints
from torch.utils.data import DataLoader, TensorDataset

from pyro_elbo_ext import AdaptiveStopping, Callback, CompiledSVI, Decision, DecomposedELBO, Patience
from pyro_elbo_ext.bounds.weighting import Geco, LinearWarmup
from pyro_elbo_ext.training.data.batches import Batches
from pyro_elbo_ext.training.fit import fit
from pyro_elbo_ext.training.result import FitResult
from tests.models import SIGMA, Y, schools

X = torch.linspace(-1, 1, 40)
Z = 0.5 + 2 * X + 0.3 * torch.sin(40 * X)


def line(x: Tensor, y: Tensor, size: int = 40) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size, subsample_size=len(x)):
        pyro.sample("y", dist.Normal(a + b * x, 0.5), obs=y)


def adam(rate: float = 0.01) -> pyro.optim.PyroOptim:
    return pyro.optim.Adam({"lr": rate})


def fresh(model: Callable[..., Any]) -> AutoNormal:
    pyro.clear_param_store()
    return AutoNormal(model)


def values() -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in pyro.get_param_store()._params.items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("make_loss", [Trace_ELBO, DecomposedELBO])
def test_equals_the_plain_loop(make_loss: Callable[[], Any]) -> None:
    guide = fresh(schools)
    guide(Y, SIGMA)  # so that its set-up draws nothing from the seed
    pyro.set_rng_seed(3)
    svi = SVI(schools, guide, adam(), make_loss())
    losses = [svi.step(Y, SIGMA) for _ in range(230)]
    expected = values()
    guide = fresh(schools)
    guide(Y, SIGMA)
    result = fit(
        schools, guide, Y, SIGMA, loss=make_loss(), optim=adam(), num_steps=230, compiled=False, progress=False, seed=3
    )
    assert_same(expected, values())
    assert result.num_steps == 230
    assert result.uncompiled == "compiled=False"
    assert result.converged is None
    looks = [np.mean(losses[:100]), np.mean(losses[100:200]), np.mean(losses[200:])]
    np.testing.assert_allclose(result.losses["loss"], looks, rtol=1e-12)


def test_compiled_steps_equal_those_of_compiled_svi() -> None:
    guide = fresh(schools)
    guide(Y, SIGMA)
    pyro.set_rng_seed(3)
    svi = CompiledSVI(schools, guide, adam(), DecomposedELBO())
    svi.run(1500, Y, SIGMA, progress=False)
    expected = values()
    guide = fresh(schools)
    guide(Y, SIGMA)
    result = fit(schools, guide, Y, SIGMA, optim=adam(), num_steps=1500, progress=False, seed=3)
    assert result.uncompiled is None
    assert_same(expected, values())
    assert result.history is not None
    assert result.history.num_recorded == 1500


# Checkpoints


def interrupted_at(step: int | None, **options: Any) -> FitResult:
    """A fit whose callback sends SIGINT at a step."""

    class Interrupt(Callback):
        def log(self, at: int, metrics: Any) -> None:
            if at == step:
                os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return fit(callbacks=[Interrupt()], log_every=10, **options)
    finally:
        signal.signal(signal.SIGINT, before)


def clipped() -> pyro.optim.PyroOptim:
    return pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.999})


def programs(data: str) -> tuple[Callable[..., Any], dict[str, Any], tuple[Any, ...]]:
    if data == "whole":
        return schools, {}, (Y, SIGMA)
    loader = DataLoader(TensorDataset(X, Z), batch_size=12, shuffle=True)  # the last batch is smaller: another graph
    return line, {"batches": loader}, ()


@pytest.mark.parametrize(
    "compiled",
    [False, {"backend": "eager"}, pytest.param(True, marks=pytest.mark.slow)],
    ids=["pyro", "graph", "machine"],
)
@pytest.mark.parametrize("data", ["whole", "batches"])
def test_resumed_run_equals_the_whole(data: str, compiled: Any, tmp_path: Path) -> None:
    model, source, args = programs(data)
    if compiled:
        loss: Callable[[], Any] = DecomposedELBO
    else:
        loss = Trace_ELBO
    options: dict[str, Any] = {"num_steps": 170, "compiled": compiled, "progress": False, **source}
    whole = fit(model, fresh(model), *args, seed=5, loss=loss(), optim=clipped(), **options)
    expected, random = values(), torch.random.get_rng_state()
    path = tmp_path / "fit.pt"
    for step in (60, 130):
        guide = fresh(model)
        result = interrupted_at(
            step,
            model=model,
            guide=guide,
            **dict(zip(("y", "sigma"), args, strict=False)),
            seed=5,
            loss=loss(),
            optim=clipped(),
            checkpoint=path,
            resume=True,
            **options,
        )
        assert result.reason == "interrupted"
        assert result.num_steps == step
    pyro.set_rng_seed(99)
    guide = fresh(model)
    kwargs = dict(zip(("y", "sigma"), args, strict=False))
    resumed = interrupted_at(
        None,
        model=model,
        guide=guide,
        **kwargs,
        loss=loss(),
        optim=clipped(),
        checkpoint=path,
        resume=True,
        **options,
    )
    assert resumed.num_steps == 170
    assert_same(expected, values())
    assert torch.equal(random, torch.random.get_rng_state())
    if compiled:
        assert whole.history is not None
        assert resumed.history is not None
        assert whole.history.to_xarray().identical(resumed.history.to_xarray())


def test_checkpoint_is_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyro_elbo_ext.training.state import checkpoints

    path = tmp_path / "c.pt"
    checkpoints.write(path, {"a": 1})

    def fails(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="disk full"):
        checkpoints.write(path, {"a": 2})
    assert checkpoints.read(path)["a"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_checkpoint_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    options: dict[str, Any] = {"num_steps": 5, "compiled": False, "progress": False, "checkpoint": path}
    fit(schools, fresh(schools), Y, SIGMA, **options)
    with pytest.raises(FileExistsError, match="resume=True"):
        fit(schools, fresh(schools), Y, SIGMA, **options)
    with pytest.raises(ValueError, match=r"other(.|\n)*'a'|lacks the parameters"):
        fit(line, fresh(line), X, Z, resume=True, **options)


# Safety


class Spoiled(nn.Module):
    """A guide's scale that turns NaN at some evaluations."""

    def __init__(self, bad: Callable[[int], bool]) -> None:
        super().__init__()
        self.bad, self.calls = bad, 0

    def model(self) -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide(self) -> None:
        loc = pyro.param("loc", torch.tensor(1.0))
        self.calls += 1
        if self.bad(self.calls):
            loc = loc * math.nan
        pyro.sample("z", dist.Normal(loc, 1.0, validate_args=False))


def test_nan_step_goes_back_and_halves_the_step() -> None:
    pyro.clear_param_store()
    spoiled = Spoiled(lambda calls: calls in (150, 151, 390))
    optim = adam(0.08)
    result = fit(
        spoiled.model, spoiled.guide, num_steps=600, optim=optim, compiled=False, progress=False, seed=0, log_every=7
    )
    assert [rollback.factor for rollback in result.rollbacks] == [0.5, 0.25, 0.125]
    assert "site 'z'" in result.rollbacks[0].reason
    assert result.rollbacks[0].to_step == 100
    assert result.num_steps == 600
    (group,) = next(iter(optim.optim_objs.values())).param_groups
    assert group["lr"] == pytest.approx(0.01)
    assert bool(torch.isfinite(pyro.param("loc")))
    assert "3 returns" in repr(result)


def test_nan_again_and_again_raises_with_good_parameters() -> None:
    pyro.clear_param_store()
    spoiled = Spoiled(lambda calls: calls > 250)
    with pytest.raises(ValueError, match=r"failed 4 times(.|\n)*site 'z'"):
        fit(spoiled.model, spoiled.guide, num_steps=600, compiled=False, progress=False, seed=0, max_rollbacks=3)
    assert bool(torch.isfinite(pyro.param("loc")))


def test_nan_of_pyros_loss_names_the_site() -> None:
    pyro.clear_param_store()
    spoiled = Spoiled(lambda calls: calls > 250)
    with pytest.raises(ValueError, match="site 'z'"):
        fit(
            spoiled.model,
            spoiled.guide,
            loss=Trace_ELBO(),
            num_steps=600,
            compiled=False,
            progress=False,
            seed=0,
            max_rollbacks=0,
        )


def test_divergence_goes_back() -> None:
    pyro.clear_param_store()

    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide() -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(1.0)), torch.tensor(1.0)))

    # gradient descent with a rate above 2 goes away from the optimum
    result = fit(
        model, guide, num_steps=3000, optim=pyro.optim.SGD({"lr": 2.2}), compiled=False, progress=False, seed=0
    )
    assert "the loss has risen from" in result.rollbacks[0].reason
    assert abs(pyro.param("loc").item()) < 5


class Own(ValueError):
    pass


class Later(Callback):
    """A model, data set or callback that makes a mistake after a while."""

    def __init__(self, where: str) -> None:
        self.where, self.calls, self.error = where, 0, Own(f"a mistake in the {where}")

    def spoil(self, where: str, after: int = 30) -> None:
        self.calls += where == self.where
        if where == self.where and self.calls > after:
            raise self.error

    def model(self, x: Tensor, y: Tensor) -> None:
        self.spoil("model")
        line(x, y)

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Any:
        for i in range(0, 40, 10):
            self.spoil("data")
            yield X[i : i + 10], Z[i : i + 10]

    def log(self, step: int, metrics: Any) -> None:
        self.spoil("callback", 0)


@pytest.mark.parametrize(
    ("where", "compiled"),
    [
        ("model", False),  # which a compiled step does not call
        *[(where, compiled) for where in ("data", "callback") for compiled in (False, {"backend": "eager"})],
    ],
)
def test_mistakes_come_through_as_they_were_raised(where: str, compiled: Any) -> None:
    later = Later(where)
    guide = fresh(line)
    with pytest.raises(Own) as caught:
        fit(
            later.model if where == "model" else line,  # else each call would change what the model reads
            guide,
            batches=later,
            dataset_size=40,
            callbacks=[later] if where == "callback" else [],
            log_every=10,
            num_steps=200,
            compiled=compiled,
            progress=False,
            seed=0,
        )
    assert str(later.error) in str(caught.value)  # Pyro makes another one of it, with the shapes of the model
    assert later.calls <= 31 + 1


def varying(x: Tensor, y: Tensor) -> None:
    line(x, y)
    if float(x[0]) > 0:
        pyro.sample("more", dist.Normal(0.0, 1.0))


def scaled(x: Tensor, y: Tensor) -> None:
    mean = pyro.sample("a", dist.Normal(0.0, 1.0)) + pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 40, subsample_size=len(x)):
        pyro.sample("y", dist.Normal(mean, (0.5 - x).clamp(min=0)), obs=y)


def counted(x: Tensor, y: Tensor) -> None:
    rate = (pyro.sample("a", dist.Normal(0.0, 1.0)) + pyro.sample("b", dist.Normal(0.0, 1.0))).exp()
    with pyro.plate("data", 40, subsample_size=len(x)):
        pyro.sample("y", dist.Poisson(rate), obs=(x < 0.5).to(x) - 0.5 * (x > 0.9))


PYRO, GRAPH = False, {"backend": "eager"}


@pytest.mark.parametrize(
    ("model", "options", "message", "compiled"),
    [
        *[(line, {"loss": lambda: DecomposedELBO(kl_weight={"nope": 0.5})}, "nope", how) for how in (PYRO, GRAPH)],
        *[(line, {"loss": lambda: DecomposedELBO(free_bits={"nope": 1.0})}, "nope", how) for how in (PYRO, GRAPH)],
        *[(varying, {}, "'more'", how) for how in (PYRO, GRAPH)],
        (scaled, {}, "Expected parameter scale", PYRO),  # a compiled step does not check values
        (counted, {}, "Expected value argument", PYRO),
    ],
)
def test_mistakes_are_not_taken_for_divergence(model: Any, options: Any, message: str, compiled: Any) -> None:
    guide = fresh(line)
    given = {name: make() for name, make in options.items()}
    batches = [(X[i : i + 10], Z[i : i + 10]) for i in range(0, 40, 10)]
    with pytest.raises(ValueError, match=message) as caught:
        fit(
            model,
            guide,
            batches=batches,
            dataset_size=40,
            num_steps=200,
            compiled=compiled,
            progress=False,
            seed=0,
            **given,
        )
    assert "times" not in str(caught.value)
    assert "learning rate" not in str(caught.value)


def overflowing() -> None:
    loc = pyro.param("loc", torch.tensor(1.0))
    pyro.sample("z", dist.Normal(loc.exp() - loc.exp(), 1.0))


def vanishing() -> None:
    pyro.sample("z", dist.Normal(0.0, pyro.param("loc", torch.tensor(1.0)).exp()))


def singular() -> None:
    loc = pyro.param("loc", torch.tensor(1.0))
    z = pyro.sample("z", dist.Normal(loc, 1.0))
    torch.linalg.cholesky(torch.eye(2) * torch.where(loc.detach().abs() > 50, -1.0, 1.0) + 0 * z)


@pytest.mark.parametrize("guide", [overflowing, vanishing, singular])
@pytest.mark.parametrize("loss", [Trace_ELBO, DecomposedELBO])
@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_what_divergence_does_to_a_program_is_taken_back(guide: Any, loss: Any) -> None:
    pyro.clear_param_store()
    rates = {overflowing: 100.0, vanishing: -200.0, singular: 100.0}

    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    class Jump(torch.optim.Optimizer):
        """Goes to its learning rate at the tenth step, so that it can be told what happens."""

        def __init__(self, parameters: Any, lr: float) -> None:
            super().__init__(parameters, {"lr": lr, "steps": 0})

        def step(self, closure: Any = None) -> None:
            (group,) = self.param_groups
            group["steps"] += 1
            if group["steps"] == 10:
                group["params"][0].data.add_(group["lr"])

    optim = pyro.optim.PyroOptim(Jump, {"lr": rates[guide]})
    result = fit(
        model, guide, num_steps=40, optim=optim, loss=loss(), compiled=False, progress=False, seed=0, max_rollbacks=8
    )
    assert result.num_steps == 40
    assert len(result.rollbacks) >= 1
    assert abs(pyro.param("loc").item()) < 110


@pytest.mark.parametrize("loss", [Trace_ELBO, DecomposedELBO])
def test_bad_data_changes_nothing(loss: Callable[[], Any]) -> None:
    guide = fresh(schools)
    with pyro.validation_enabled(False):
        guide(Y, SIGMA)
        before = values()
        with pytest.raises(ValueError, match="site 'y'"):
            fit(schools, guide, Y * math.nan, SIGMA, loss=loss(), num_steps=5, compiled=False, progress=False)
    assert_same(before, values())


def test_nan_in_a_batch_is_named() -> None:
    bad = [(X, Z), (X, Z * math.nan)]
    with pyro.validation_enabled(False), pytest.raises(ValueError, match=r"site 'y'(.|\n)*argument 'y', have NaN"):
        fit(line, fresh(line), batches=bad, num_steps=5, compiled=False, progress=False, dataset_size=40)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps must be"),
        ({"num_steps": 1.5}, "num_steps must be"),
        ({"num_epochs": 0}, "num_epochs must be"),
        ({"num_epochs": 2, "num_steps": 3}, "not both"),
        ({"batches": []}, "batches is empty"),
        ({"batches": [torch.zeros(0)]}, "is empty"),
        ({"batches": iter([X])}, "iterator"),
        ({"batches": X}, "argument of the model"),
        ({"validation": []}, "no held-out data"),
        ({"log_every": 0}, "log_every must be"),
        ({"checkpoint_every": 0}, "checkpoint_every must be"),
        ({"validate_every": 0}, "validate_every must be"),
        ({"max_rollbacks": -1}, "max_rollbacks must be"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    def model(x: Tensor = X) -> None:
        line(x, x)

    given = {} if "num_epochs" in options else {"num_steps": 5}
    guide = fresh(model)
    with pytest.raises((ValueError, TypeError), match=message):
        fit(model, guide, **{**given, "compiled": False, "progress": False, **options})


def test_guide_without_a_site_is_named() -> None:
    pyro.clear_param_store()

    def guide(x: Tensor, y: Tensor) -> None:
        pyro.sample("a", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    with pytest.raises(ValueError, match="'b'"):
        fit(line, guide, X, Z, num_steps=5, progress=False)


# Data


def test_scale_of_batches_is_checked() -> None:
    def unscaled(x: Tensor, y: Tensor) -> None:
        line(x, y, len(x))

    loader = DataLoader(TensorDataset(X, Z), batch_size=10)
    options: dict[str, Any] = {"num_steps": 5, "compiled": False, "progress": False}
    with pytest.raises(ValueError, match=r"site 'y'(.|\n)*'a'(.|\n)*pyro.plate\('data', 40"):
        fit(unscaled, fresh(unscaled), loader, **options)
    with pytest.raises(ValueError, match="40 data"):
        fit(line, fresh(line), loader, dataset_size=1000, **options)
    result = fit(line, fresh(line), loader, **options)
    assert result.num_steps == 5
    assert fit(unscaled, fresh(unscaled), loader, dataset_size=10, **options).num_steps == 5


def test_local_latents_need_no_scale() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        slope = pyro.param("slope", torch.tensor(0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x, 1.0))

    pyro.clear_param_store()
    loader = DataLoader(X, batch_size=10)
    assert fit(model, guide, batches=loader, num_epochs=3, compiled=False, progress=False).num_steps == 12


def test_batches_become_arguments() -> None:
    seen: list[tuple[Any, ...]] = []

    def model(x: Tensor, y: Tensor | None = None, size: int = 40) -> None:
        seen.append((x.shape, None if y is None else y.shape, size))
        line(x, x if y is None else y, size)

    options: dict[str, Any] = {"num_steps": 2, "compiled": False, "progress": False, "dataset_size": 40}
    for batches in ([X], [(X, Z)], [{"x": X, "y": Z}]):
        seen.clear()
        guide = fresh(model)
        fit(model, guide, batches=batches, **options)
        assert {shape for shape, _, _ in seen} == {X.shape}
    seen.clear()
    fit(model, fresh(model), batches=[X], size=40, **options)
    assert {size for _, _, size in seen} == {40}


def test_order_of_batches_is_resumed() -> None:
    loader = DataLoader(torch.arange(20), batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    whole = Batches(loader, (), {})
    expected = [whole.next()[0][0].tolist() for _ in range(30)]
    loader.generator.manual_seed(1)
    torch.manual_seed(0)
    first = Batches(loader, (), {})
    got = [first.next()[0][0].tolist() for _ in range(17)]
    state, random = first.state_dict(), torch.random.get_rng_state()
    loader.generator.manual_seed(7)
    second = Batches(loader, (), {})
    second.load_state_dict(state)
    torch.random.set_rng_state(random)
    got += [second.next()[0][0].tolist() for _ in range(13)]
    assert got == expected


def test_first_batch_leaves_the_order_as_it_was() -> None:
    loader = DataLoader(torch.arange(20), batch_size=3, shuffle=True)
    torch.manual_seed(0)
    expected = [batch.tolist() for batch in loader]
    torch.manual_seed(0)
    batches = Batches(loader, (), {})
    batches.first()
    assert [batches.next()[0][0].tolist() for _ in range(7)] == expected


# Validation


def test_validation_is_the_true_elbo_and_changes_nothing() -> None:
    options: dict[str, Any] = {"num_steps": 200, "compiled": False, "progress": False, "seed": 2}
    fit(line, fresh(line), X, Z, loss=DecomposedELBO(kl_weight=0.3), **options)
    expected = values()
    held_out = X + 0.01, Z
    result = fit(
        line, fresh(line), X, Z, loss=DecomposedELBO(kl_weight=0.3, num_particles=8), validation=held_out, **options
    )
    result = fit(line, fresh(line), X, Z, loss=DecomposedELBO(kl_weight=0.3), validation=held_out, **options)
    assert_same(expected, values())
    assert result.validation["step"].tolist() == [0, 100, 200]
    # analytic in every term but the reconstruction, which is within its noise of a long average
    elbo = DecomposedELBO(num_particles=4000, vectorize_particles="vmap", history=False)
    long = -elbo.loss(line, result.guide, *held_out)
    single = np.array([-DecomposedELBO(history=False).loss(line, result.guide, *held_out) for _ in range(50)])
    assert abs(result.validation["elbo"].iloc[-1] - long) < 5 * single.std()


def test_validation_puts_modules_in_evaluation_mode() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.modes = nn.BatchNorm1d(1), []

        def forward(self, x: Tensor) -> Tensor:
            self.modes.append(self.training)
            return self.norm(x[:, None])[:, 0]

    encoder = Encoder()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 1.0))

    pyro.clear_param_store()
    options: dict[str, Any] = {"compiled": False, "progress": False}
    fit(model, guide, X, num_steps=100, validation=X + 1, validate_every=50, **options)
    assert encoder.modes.count(False) == 3
    assert encoder.training


# The result


@pytest.fixture(scope="module")
def fitted() -> FitResult:
    guide = fresh(schools)
    return fit(schools, guide, Y, SIGMA, num_steps=1000, compiled=False, progress=False, seed=0)


def test_draws(fitted: FitResult) -> None:
    draws = fitted.draws(4001, seed=1)
    assert {name: tuple(value.shape) for name, value in draws.items()} == {
        "mu": (4001,),
        "tau": (4001,),
        "theta": (4001, 8),
    }
    assert bool((draws["tau"] > 0).all())
    again = fitted.draws(4001, seed=1)
    assert torch.equal(draws["mu"], again["mu"])
    median = fitted.guide.median(Y, SIGMA)  # type: ignore[attr-defined]
    error = 1.25 * draws["mu"].std() / math.sqrt(4001)
    assert abs(draws["mu"].median() - median["mu"]) < 4 * error
    with pytest.raises(ValueError, match="at least 1"):
        fitted.draws(0)


def test_save_and_load(fitted: FitResult, tmp_path: Path) -> None:
    path = tmp_path / "fit.pt"
    fitted.save(path)
    with pyro.get_param_store().scope():
        guide = AutoNormal(schools)
        loaded = FitResult.load(path, schools, guide, Y, SIGMA)
        for a, b in zip(loaded.draws(10, seed=1).values(), fitted.draws(10, seed=1).values(), strict=True):
            assert torch.equal(a, b)
        assert repr(loaded) == repr(fitted)
        assert loaded.history is not None
        assert fitted.history is not None
        assert loaded.history.to_xarray().identical(fitted.history.to_xarray())
        with pytest.raises(ValueError, match="another model or guide"):
            FitResult.load(path, line, AutoNormal(line), X, Z)
    with pytest.raises(FileNotFoundError):
        FitResult.load(tmp_path / "none.pt", schools, fitted.guide, Y, SIGMA)
    with pytest.raises(TypeError, match=r"missing a required argument: 'y'.*Give the data that the fit had"):
        FitResult.load(path, schools, fitted.guide)


def test_plot_and_summary(fitted: FitResult) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    assert fitted.summary().loc["ELBO", "mean"] == pytest.approx(fitted.elbo, abs=2.0)
    assert len(fitted.plot()) == 3
    pyplot.close("all")
    assert "<li>stopped: all 1,000 steps were taken" in fitted._repr_html_()


@pytest.mark.parametrize("autoguide", [AutoNormal, AutoMultivariateNormal])
def test_flat_priors(autoguide: Any) -> None:
    def model(x: Tensor, y: Tensor) -> None:
        b = pyro.sample("b", dist.ImproperUniform(constraints.real_vector, (), (2,)))
        scale = pyro.sample("scale", dist.ImproperUniform(constraints.positive, (), ()))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(b[0] + b[1] * x, scale), obs=y)

    pyro.clear_param_store()
    guide = autoguide(model)
    with pytest.raises(NotImplementedError):  # Pyro's own loop cannot begin
        SVI(model, autoguide(model), adam(), Trace_ELBO()).step(X, Z)
    fit(model, guide, X, Z, optim=adam(0.03), num_steps=600, compiled=False, progress=False, seed=0)
    design = torch.stack([torch.ones_like(X), X], -1)
    least_squares = torch.linalg.lstsq(design, Z[:, None]).solution[:, 0]
    residuals = (Z - design @ least_squares).std()
    errors = residuals * torch.linalg.inv(design.T @ design).diagonal().sqrt()
    # the last iterate wanders by less than a posterior sd
    assert bool(((guide.median()["b"] - least_squares).abs() < errors).all())
    with pytest.raises(NotImplementedError):
        dist.ImproperUniform(constraints.real, (), ()).sample()


def test_schedules_go_on_by_epoch_or_step(tmp_path: Path) -> None:
    def scheduler() -> Any:
        return pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.5})

    def rate(optim: Any) -> float:
        return float(next(iter(optim.optim_objs.values())).optimizer.param_groups[0]["lr"])

    options: dict[str, Any] = {"compiled": False, "progress": False, "seed": 0}
    optim = scheduler()
    fit(line, fresh(line), X, Z, optim=optim, num_steps=4, **options)
    assert rate(optim) == pytest.approx(0.1 * 0.5**4)
    batches = [(X[:20], Z[:20]), (X[20:], Z[20:])]
    optim = scheduler()
    fit(line, fresh(line), batches=batches, optim=optim, num_steps=7, **options)
    assert rate(optim) == pytest.approx(0.1 * 0.5**3)
    expected = values()
    for steps in (3, 7):
        optim = scheduler()
        fit(
            line,
            fresh(line),
            batches=batches,
            optim=optim,
            num_steps=steps,
            checkpoint=tmp_path / "c.pt",
            resume=True,
            **options,
        )
    assert rate(optim) == pytest.approx(0.1 * 0.5**3)
    assert_same(expected, values())


def test_plateau_is_told_the_validation() -> None:
    settings = {"factor": 0.5, "patience": 0, "threshold": 1e3, "threshold_mode": "abs"}  # nothing is better by so much
    optim = pyro.optim.ReduceLROnPlateau({"optimizer": torch.optim.Adam, "optim_args": {"lr": 1e-3}, **settings})
    options: dict[str, Any] = {"compiled": False, "progress": False, "seed": 0}
    fit(line, fresh(line), X, Z, optim=optim, num_steps=6, validation=(X, Z), validate_every=2, **options)
    scheduler = next(iter(optim.optim_objs.values()))
    # of four validations, the first before any step, three were no better than the one before
    assert scheduler.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 / 8)


def test_warm_up_must_end_within_the_run() -> None:
    options: dict[str, Any] = {"compiled": False, "progress": False, "seed": 0}
    with pytest.raises(ValueError, match=r"kl_weight is 0.049(.|\n)*run at least 1001 steps"):
        fit(line, fresh(line), X, Z, loss=DecomposedELBO(kl_weight=LinearWarmup(1000)), num_steps=50, **options)
    result = fit(line, fresh(line), X, Z, loss=DecomposedELBO(kl_weight=LinearWarmup(40)), num_steps=50, **options)
    assert result.history is not None
    assert result.history.kl_weight[[0, 20, 40, 49]].tolist() == [0.0, 0.5, 1.0, 1.0]


def test_geco_is_resumed(tmp_path: Path) -> None:
    options: dict[str, Any] = {"compiled": False, "progress": False, "seed": 0}
    whole = DecomposedELBO(kl_weight=Geco(target=-1.0, per_observation=True))
    fit(line, fresh(line), X, Z, loss=whole, num_steps=60, **options)
    for steps in (25, 60):
        loss = DecomposedELBO(kl_weight=Geco(target=-1.0, per_observation=True))
        fit(line, fresh(line), X, Z, loss=loss, num_steps=steps, checkpoint=tmp_path / "c.pt", resume=True, **options)
    assert isinstance(loss.kl_weight, Geco)
    assert isinstance(whole.kl_weight, Geco)
    assert loss.kl_weight.state_dict() == whole.kl_weight.state_dict()
    assert loss.history is not None
    assert whole.history is not None
    assert loss.history.to_xarray().identical(whole.history.to_xarray())


def test_run_with_a_stopping_rule_is_resumed(tmp_path: Path) -> None:
    options: dict[str, Any] = {"compiled": {"backend": "eager"}, "progress": False, "seed": 4, "max_steps": 20_000}

    def rule() -> AdaptiveStopping:
        return AdaptiveStopping(accuracy=0.3)

    def run(at: int | None, **more: Any) -> FitResult:
        guide = fresh(line)
        return interrupted_at(
            at, model=line, guide=guide, x=X, y=Z, optim=adam(0.1), stopping=rule(), **more, **options
        )

    whole = run(None)
    expected = values()
    assert whole.converged
    for step in (700, 1300, None):
        resumed = run(step, checkpoint=tmp_path / "c.pt", resume=True)
    assert resumed.reason == whole.reason
    assert resumed.num_steps == whole.num_steps
    assert_same(expected, values())
    # line is conjugate: posterior precision and mean by hand
    design = torch.stack([torch.ones_like(X), X], -1).double()
    precision = torch.eye(2) + design.T @ design / 0.25
    mean = torch.linalg.solve(precision, design.T @ Z.double() / 0.25)
    sds = precision.diagonal() ** -0.5
    found = torch.stack([resumed.guide.median()[name] for name in ("a", "b")])  # type: ignore[attr-defined]
    assert bool(((found - mean).abs() < 0.3 * sds).all())


def test_patience_gives_back_the_best(tmp_path: Path) -> None:
    def model(x: Tensor) -> None:
        pyro.sample("x", dist.Normal(pyro.param("mean", torch.tensor(0.0)), 1.0).expand(x.shape).to_event(1), obs=x)

    def guide(x: Tensor) -> None: ...

    pyro.clear_param_store()
    # the training mean is 1, the held-out one 0.5: gradient descent goes past it
    result = fit(
        model,
        guide,
        torch.ones(10),
        validation=torch.full((10,), 0.5),
        validate_every=1,
        optim=pyro.optim.SGD({"lr": 0.001}),
        stopping=Patience(5),
        compiled=False,
        progress=False,
        seed=0,
    )
    assert result.converged
    best = result.validation["elbo"].idxmax()
    assert 0 < best == len(result.validation) - 6
    assert pyro.param("mean").item() == pytest.approx(0.5, abs=0.01)
    assert "validation ELBO" in result.reason


def test_first_step_that_fails_halves_the_step_too() -> None:
    pyro.clear_param_store()
    spoiled = Spoiled(lambda calls: calls == 3)  # two looks come before anything changes
    optim = adam(0.08)
    result = fit(spoiled.model, spoiled.guide, num_steps=300, optim=optim, compiled=False, progress=False, seed=0)
    assert [rollback.factor for rollback in result.rollbacks] == [0.5]
    (group,) = next(iter(optim.optim_objs.values())).param_groups
    assert group["lr"] == pytest.approx(0.04)


@pytest.mark.parametrize("compiled", [False, {"backend": "eager"}], ids=["pyro", "graph"])
@pytest.mark.parametrize(("make", "rate"), [(pyro.optim.SGD, 30.0), (pyro.optim.Adam, 1000.0)])
def test_rates_are_halved_from_the_very_start(make: Any, rate: float, compiled: Any) -> None:
    pyro.clear_param_store()

    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide() -> None:
        loc = pyro.param("loc", torch.tensor(1.0))
        mean = loc.exp() + (-loc).exp() if make is pyro.optim.Adam else loc
        pyro.sample("z", dist.Normal(mean, torch.tensor(1.0)))

    # both overflow before the first look: gradient descent grows by a factor of 29 a step, Adam goes to exp(999) at once
    optim = make({"lr": rate})
    result = fit(model, guide, num_steps=300, optim=optim, compiled=compiled, max_rollbacks=12, progress=False, seed=0)
    assert len(result.rollbacks) >= 4
    assert {rollback.to_step for rollback in result.rollbacks} == {0}
    (group,) = next(iter(optim.optim_objs.values())).param_groups
    assert group["lr"] == pytest.approx(rate * 0.5 ** len(result.rollbacks))
    assert math.isfinite(result.elbo)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("num_epochs", float("nan")),
        ("max_steps", 0),
        ("max_steps", float("nan")),
        ("log_every", "2"),
        ("checkpoint_every", 0.5),
        ("validate_every", True),
        ("max_rollbacks", float("nan")),
        ("seed", "a"),
        ("seed", 1.5),
        ("seed", -1),
        ("seed", 2**32),
        ("optim", "adam"),
        ("optim", torch.optim.Adam),
        ("loss", "elbo"),
        ("loss", DecomposedELBO),
        ("stopping", "auto"),
        ("stopping", Patience),
        ("callbacks", 3),
        ("checkpoint", 3),
        ("compiled", "yes"),
        ("distributed", "yes"),
    ],
)
def test_an_argument_of_another_kind_is_named(argument: str, value: Any) -> None:
    def program(*args: Any) -> None:
        raise AssertionError("must not be run")

    with pytest.raises((TypeError, ValueError), match=f"^{argument} must be"):
        fit(program, program, torch.zeros(3), **{argument: value})


def test_a_stopping_rule_that_lacks_something_is_told_what_before_training() -> None:
    class Level:
        converged, every = False, 10

        def observe(self, step: int, iterate: Tensor, losses: Any) -> Decision:
            return Decision("stop", reason="level")

    class Starts(Level):
        def start(self, parameters: Any, **rest: Any) -> None: ...

    def program(*args: Any) -> None:
        raise AssertionError("must not be run")

    rule: Any = Level()
    with pytest.raises(TypeError, match=r"^stopping needs every, converged, start, observe; Level lacks start$"):
        fit(program, program, stopping=rule)
    rule = Starts()
    with pytest.raises(
        TypeError, match=r"^stopping with checkpoint= needs .*; Starts lacks state_dict, load_state_dict$"
    ):
        fit(program, program, stopping=rule, checkpoint="fit.pt")
    pyro.clear_param_store()
    result = fit(line, AutoNormal(line), X, Z, stopping=rule, compiled=False, progress=False)
    assert (result.num_steps, result.reason) == (10, "level")


def test_programs_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By `fit`, and with a loss of Pyro's not again by the first compiled step."""
    from pyro_elbo_ext.compile.tracing import first_look

    looks = []

    def counted(*args: Any) -> None:
        looks.append(args)

    monkeypatch.setattr("pyro_elbo_ext.training.fit.look", counted)
    monkeypatch.setattr(first_look, "look", counted)

    def model(y: torch.Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    result = fit(
        model,
        AutoNormal(model),
        torch.ones(3),
        loss=Trace_ELBO(),
        num_steps=3,
        compiled={"backend": "eager"},
        progress=False,
    )
    assert result.uncompiled is None
    assert len(looks) == 1


def test_a_guide_that_is_none_is_told_what_a_guide_is() -> None:
    with pytest.raises(
        TypeError, match=r"^guide must be a program, got the class AutoNormal: pass AutoNormal\(model\)$"
    ):
        fit(line, AutoNormal, X, Z)
    with pytest.raises(
        TypeError, match=r"^guide must be callable or 'auto', got Tensor: it comes second, before the data$"
    ):
        fit(line, X, Z)  # type: ignore[arg-type]


def test_an_autoguide_of_a_discrete_site_says_what_can_be_done() -> None:
    def model(y: Tensor) -> None:
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Normal(k, 1.0), obs=y)

    with pytest.raises(ValueError, match=r"^latent site 'k' is discrete.*config_enumerate.*sum it out") as caught:
        fit(model, AutoNormal(model), torch.tensor(1.0), progress=False)
    assert "Trace Shapes" not in str(caught.value)


def test_what_is_wrong_with_data_is_said_without_all_their_values() -> None:
    y = Z.clone()
    y[3] = math.nan
    pyro.clear_param_store()
    with pytest.raises(ValueError, match=r"^observed site 'y' has NaN in 1 of 40") as caught:
        fit(line, AutoNormal(line), X, y, progress=False)
    assert "tensor(" not in str(caught.value)
