"""A compiled step reads the tensors that Pyro would read, whatever has been done to them since the last step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from torch import Tensor, nn

from pyro_elbo_ext import CompiledSVI, DecomposedELBO, fit
from pyro_elbo_ext.compile.errors import CannotCompile

Backend = str
BACKENDS = ["eager", "inductor"]


def regression(x: Tensor, y: Tensor) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(x @ slope, 1.0), obs=y)


def location(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    with pyro.plate("rows", 20, subsample=y):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def adam() -> Any:
    return pyro.optim.Adam({"lr": 0.05})  # type: ignore[attr-defined]


def trained(
    make: Callable[..., Any], model: Any, guide: Callable[[Any], Any], steps: Callable[[Any], list[float]]
) -> Any:
    """Losses and parameters after ``steps``, from a fresh store."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = make(model, guide(model), adam(), Trace_ELBO())
    losses = steps(svi)
    return losses, {name: p.detach().clone() for name, p in pyro.get_param_store()._params.items()}


def assert_as_pyro(
    model: Any, steps: Callable[[Any], list[float]], backend: str, guide: Callable[[Any], Any] = AutoDelta
) -> None:
    losses, parameters = trained(SVI, model, guide, steps)
    ours, values = trained(lambda *args: CompiledSVI(*args, backend=backend, steps_per_call=2), model, guide, steps)
    assert ours == pytest.approx(losses, rel=1e-4, abs=1e-4)
    for name, value in parameters.items():
        torch.testing.assert_close(values[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_buffers_that_are_filled_anew_for_each_batch(backend: Backend) -> None:
    data, outcome = torch.randn(70, 3), torch.randn(70)

    def steps(svi: Any) -> list[float]:
        x, y = torch.empty(0, 3), torch.empty(0)
        losses = []
        for _ in range(3):
            for idx in torch.arange(70).split(32):
                torch.index_select(data, 0, idx, out=x.resize_(0))
                torch.index_select(outcome, 0, idx, out=y.resize_(0))
                losses.append(svi.step(x, y))
        return losses

    assert_as_pyro(regression, steps, backend)


def _transpose(x: Tensor) -> None:
    x.t_()


def _resize(x: Tensor) -> None:
    x.resize_(2, 3)


def _strides(x: Tensor) -> None:
    x.as_strided_((3, 3), (1, 3))


def _shorter(x: Tensor) -> None:
    x.data = x.data[:2]


def _expanded(x: Tensor) -> None:
    x.data = x.data[:1].expand(3, 3)


def _another(x: Tensor) -> None:
    x.set_(torch.arange(6.0).reshape(3, 2))  # type: ignore[call-overload]


def _double(x: Tensor) -> None:
    x.data = x.data.double()


def _unsqueezed(x: Tensor) -> None:
    x.unsqueeze_(0)


def _moved(x: Tensor) -> None:
    x.data = x.data.clone() + 1


def _offset(x: Tensor) -> None:
    x.data = torch.arange(30.0)[12:21].reshape(3, 3)


CHANGES = [_transpose, _resize, _strides, _shorter, _expanded, _another, _double, _unsqueezed, _moved, _offset]
SQUARE = torch.tensor([[1.0, 4.0, -2.0], [0.5, 8.0, 3.0], [2.0, 7.0, 9.0]])


class Held(nn.Module):
    def __init__(self, y: Tensor) -> None:
        super().__init__()
        self.register_buffer("y", y)

    def forward(self) -> None:
        weighted(self.y)  # type: ignore[arg-type]


def weighted(y: Tensor) -> None:
    """Tells places apart, so that a transpose matters."""
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    scale = 1.0 + torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape)
    pyro.sample("y", dist.Normal(mean, scale).to_event(y.dim()), obs=y)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("run", [False, True])
@pytest.mark.parametrize("captured", [False, True])
def test_tensors_that_change_in_place_between_steps(captured: bool, run: bool, backend: Backend) -> None:
    changes = CHANGES if backend == "eager" else [_transpose, _expanded]
    held = Held(SQUARE.clone())

    def steps(svi: Any) -> list[float]:
        y = held.y if captured else SQUARE.clone()
        args = () if captured else (y,)

        def some(count: int) -> list[float]:
            if run and isinstance(svi, CompiledSVI):
                return svi.run(count, *args, progress=False).tolist()
            return [svi.step(*args) for _ in range(count)]

        losses = []
        for change in changes:
            y.data = SQUARE.clone()
            losses += some(3)
            change(y)
            losses += some(3)
        y.data = SQUARE.clone()
        return [*losses, *some(2), svi.evaluate_loss(*args)]

    assert_as_pyro(held if captured else weighted, steps, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluate_loss_reads_what_is_there(backend: Backend) -> None:
    y = SQUARE.clone()

    def steps(svi: Any) -> list[float]:
        y.data = SQUARE.clone()
        losses = [svi.step(y), svi.step(y), svi.evaluate_loss(y)]
        y.t_()
        losses.append(svi.evaluate_loss(y))
        y.resize_(4)
        return [*losses, svi.evaluate_loss(y), svi.step(y)]

    assert_as_pyro(weighted, steps, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gone", [0, 8])
def test_memory_that_is_gone_is_an_error_that_names_the_tensor(gone: int, backend: Backend) -> None:
    y, held = SQUARE.clone(), SQUARE.clone()

    def model(y: Tensor, more: dict[str, Tensor] | None = None) -> None:
        weighted(y + held if more is None else y + more["of"])

    def lose(tensor: Tensor) -> None:
        tensor.untyped_storage().resize_(gone)

    pyro.clear_param_store()
    svi = CompiledSVI(model, AutoDelta(model), adam(), Trace_ELBO(), backend=backend)
    spare = SQUARE.clone()
    for _ in range(3):
        svi.step(y)
        svi.step(y, more={"of": spare})
    before = copy.deepcopy(pyro.get_param_store().get_state()["params"])
    lose(spare)
    lose(held)
    for call in (svi.step, svi.evaluate_loss, lambda *args, **kw: svi.run(3, *args, progress=False, **kw)):
        with pytest.raises(ValueError, match=r"argument 'more'\['of'\] has shape \(3, 3\), but its memory"):
            call(y, more={"of": spare})
        with pytest.raises(ValueError, match="a tensor that model or guide read from outside has shape"):
            call(y)
    lose(y)
    held.untyped_storage().resize_(36)
    for call in (svi.step, svi.evaluate_loss, lambda *args: svi.run(3, *args, progress=False)):
        with pytest.raises(ValueError, match=r"argument 'y' has shape \(3, 3\), but its memory"):
            call(y)
    for name, p in pyro.get_param_store().get_state()["params"].items():
        assert torch.equal(p, before[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_parameter_without_memory_is_named(backend: Backend) -> None:
    y = SQUARE.clone()
    pyro.clear_param_store()
    svi = CompiledSVI(weighted, AutoDelta(weighted), adam(), Trace_ELBO(), backend=backend)
    for _ in range(3):
        svi.step(y)
    (p,) = pyro.get_param_store()._params.values()
    p.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"the parameter 'AutoDelta\.mean' has shape"):
        svi.step(y)


def test_a_parameter_of_another_shape() -> None:
    net = nn.Linear(2, 2, bias=False)
    x = torch.ones(5, 2)
    start = net.weight.detach().clone()

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z + x @ net.weight.sum(0), 1.0).to_event(1), obs=x.sum(-1))

    def steps(svi: Any) -> list[float]:
        net.weight.data = start.clone()
        net.weight.grad = None
        losses = [svi.step(x) for _ in range(3)]
        net.weight.data = torch.arange(6.0).reshape(3, 2)
        net.weight.grad = None
        svi.optim.optim_objs.clear()
        losses += [svi.step(x) for _ in range(3)]
        return losses

    assert_as_pyro(model, steps, "eager")


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_argument_comes_to_require_a_gradient(backend: str) -> None:
    pyro.clear_param_store()
    y, loss = torch.ones(20), DecomposedELBO()
    svi = CompiledSVI(location, AutoDelta(location), adam(), loss, backend=backend)
    for _ in range(3):
        svi.step(y)
    before = {name: p.detach().clone() for name, p in pyro.get_param_store()._params.items()}
    y.requires_grad_(True)
    for call in (svi.step, svi.evaluate_loss, lambda y: svi.run(2, y, progress=False)):
        with pytest.raises(CannotCompile, match=r"y.* requires a gradient"):
            call(y)
    assert loss.num_steps == 3
    for name, p in pyro.get_param_store()._params.items():
        assert torch.equal(p, before[name])
    y.requires_grad_(False)
    svi.step(y)
    assert svi.is_traced(y)
    assert loss.num_steps == 4
    assert len(svi._programs) == 1


def test_freezing_and_unfreezing_a_network() -> None:
    net = nn.Linear(2, 1).eval()  # in training Pyro warns of frozen parameters
    x = torch.ones(5, 2)
    start = copy.deepcopy(net.state_dict())

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z + net(x).squeeze(-1), 1.0).to_event(1), obs=3 * x.sum(-1))

    def steps(svi: Any) -> list[float]:
        net.load_state_dict(start)
        net.requires_grad_(True)
        losses = [svi.step(x) for _ in range(3)]
        net.weight.requires_grad_(False)
        frozen = net.weight.detach().clone()
        losses += [svi.step(x) for _ in range(3)]
        assert torch.equal(net.weight, frozen)
        net.weight.requires_grad_(True)
        losses += [svi.step(x) for _ in range(3)]
        assert not torch.equal(net.weight, frozen)
        return losses

    assert_as_pyro(model, steps, "eager")


def test_programs_of_both_shapes_are_kept() -> None:
    y = SQUARE.clone()
    pyro.clear_param_store()
    held = Held(SQUARE.clone())
    svi = CompiledSVI(held, AutoDelta(held), adam(), Trace_ELBO(), backend="eager")
    for _ in range(4):
        for rows in (3, 2):
            held.y.data = y[:rows].clone()
            svi.step()
            svi.step()
    assert len(svi._programs) == 2


def test_fit_with_buffers_of_varying_size() -> None:
    data = torch.randn(20) + 3

    class Batches:
        epoch = 0

        def __iter__(self) -> Any:
            x = torch.empty(0)
            self.epoch += 1
            for idx in torch.randperm(20, generator=torch.Generator().manual_seed(self.epoch)).split(8):
                yield (torch.index_select(data, 0, idx, out=x.resize_(0)),)

    found = []
    for compiled in ({"backend": "eager"}, False):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        fit(location, AutoDelta(location), batches=Batches(), num_steps=12, compiled=compiled, progress=False)
        found.append(pyro.param("AutoDelta.mean").item())
    assert found[0] == pytest.approx(found[1], rel=1e-4)
