"""Batches of a fit: every row counts once in an epoch, or it is an error that says which does not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

from pyro_elbo_ext import DecomposedELBO
from pyro_elbo_ext.training.data.batches import Batches
from pyro_elbo_ext.training.data.scaling import ScaleCheck
from pyro_elbo_ext.training.fit import fit
from pyro_elbo_ext.training.state.state import random_state

N, B = 50, 16
Y = torch.linspace(-3, 5, N).double() ** 2


class Guide:
    """A draw that is its parameter, so that gradients have no noise."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        loc = pyro.param("loc", torch.tensor(0.3, dtype=torch.float64))
        pyro.sample("m", dist.Delta(loc))


def scaled(y: Tensor, size: int = N) -> None:
    m = pyro.sample("m", dist.Normal(torch.tensor(0.0).double(), 3.0))
    with pyro.plate("data", size, subsample_size=len(y)):
        pyro.sample("y", dist.Normal(m, 2.0), obs=y)


def unscaled(y: Tensor) -> None:
    scaled(y, len(y))


def undeclared(y: Tensor) -> None:
    m = pyro.sample("m", dist.Normal(torch.tensor(0.0).double(), 3.0))
    pyro.sample("y", dist.Normal(m.expand(y.shape), 2.0).to_event(1), obs=y)


def times(count: float, whole: float = 1.0) -> Callable[[Tensor], None]:
    """Data that count ``count`` times, in a model that counts ``whole`` times."""

    def model(y: Tensor) -> None:
        with poutine.scale(scale=whole):
            m = pyro.sample("m", dist.Normal(torch.tensor(0.0).double(), 3.0))
            with pyro.plate("data", len(y)), poutine.scale(scale=count):
                pyro.sample("y", dist.Normal(m, 2.0), obs=y)

    return model


def single(y: Tensor) -> None:
    """One datum, without a dimension."""
    m = pyro.sample("m", dist.Normal(torch.tensor(0.0).double(), 3.0))
    pyro.sample("y", dist.Normal(m, 2.0), obs=y)


def single_scaled(y: Tensor) -> None:
    m = pyro.sample("m", dist.Normal(torch.tensor(0.0).double(), 3.0))
    with poutine.scale(scale=float(N)):
        pyro.sample("y", dist.Normal(m, 2.0), obs=y)


def named(values: Tensor, weight: float = 1.0) -> None:
    scaled(values)


def two_sizes(y: Tensor, covariates: Tensor) -> None:
    scaled(y)


def first_is_shorter(covariates: Tensor, y: Tensor) -> None:
    unscaled(y)


class Stream:
    """Batches whose number and order only going through them tells."""

    def __init__(self, *sizes: int, shuffle: bool = False) -> None:
        self.sizes, self.shuffle = sizes, shuffle
        self.generator = torch.Generator().manual_seed(0)

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm(N, generator=self.generator) if self.shuffle else torch.arange(N)
        yield from Y[order].split(list(self.sizes))


class Rows(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(Y)


def loader(size: int = B, data: Any = None, **options: Any) -> DataLoader[Any]:
    return DataLoader(Y if data is None else data, batch_size=size, **options)  # type: ignore[arg-type]


def trained(model: Callable[..., Any], batches: Iterable[Any], **options: Any) -> Any:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    return fit(model, Guide(), batches=batches, **{"num_steps": 30, "compiled": False, "progress": False, **options})


def epochs_gradient(model: Callable[..., Any], batches: Iterable[Any], epochs: int = 1) -> float:
    """Mean of the gradients over the batches of some epochs, without a step."""
    pyro.clear_param_store()
    data, loss, found = Batches(batches, (), {}), DecomposedELBO(history=False), []
    data.first()
    while data.epoch < epochs:
        args, kwargs = data.next()
        if data.epoch == epochs:
            break
        loss.loss_and_grads(model, Guide(), *args, **kwargs)
        p = pyro.get_param_store()._params["loc"]
        found.append(float(p.grad))
        p.grad = None
    return float(np.mean(found))


FULL = float((0.3 / 9) - ((Y - 0.3) / 4).sum())  # of all data at once, minus the log posterior's

RIGHT: dict[str, tuple[Callable[..., Any], Callable[[], Iterable[Any]], dict[str, Any]]] = {
    "even": (scaled, lambda: loader(10), {}),
    "even list": (scaled, lambda: list(Y.split(10)), {}),
    "counted by the number of batches": (times(4.0), loader, {}),
    "counted by the number of batches, list": (times(4.0), lambda: list(Y.split(B)), {}),
    "one batch": (scaled, lambda: [Y], {}),
    "one batch, unscaled": (unscaled, lambda: [Y], {}),
    "data without dimensions": (single_scaled, lambda: list(Y), {}),
    "mapping": (named, lambda: [{"values": y, "weight": 1.0} for y in Y.split(25)], {}),
    "stream": (scaled, lambda: Stream(25, 25), {}),
    "iterable dataset": (scaled, lambda: loader(10, Rows()), {}),
    "other argument": (two_sizes, lambda: [(y, torch.ones(3)) for y in Y.split(10)], {}),
}


@pytest.mark.parametrize("case", RIGHT)
def test_an_epoch_is_the_whole(case: str) -> None:
    model, batches, options = RIGHT[case]
    assert epochs_gradient(model, batches()) == pytest.approx(FULL, rel=1e-12)
    assert trained(model, batches(), **options).num_steps == 30


def test_scaled_as_a_whole_is_right() -> None:
    """As where a user divides the loss by the number of data."""
    model = times(4.0, 1 / N)
    assert epochs_gradient(model, loader()) == pytest.approx(FULL / N, rel=1e-12)
    assert trained(model, loader()).num_steps == 30


@pytest.mark.parametrize(
    ("model", "batches"),
    [
        (scaled, lambda: loader(shuffle=True)),
        (scaled, lambda: loader(shuffle=True, generator=torch.Generator().manual_seed(1))),
        (times(4.0), lambda: loader(shuffle=True)),
        (scaled, lambda: loader(sampler=SubsetRandomSampler(range(N)))),
        (scaled, lambda: Stream(16, 16, 16, 2, shuffle=True)),
    ],
    ids=["loader", "generator", "constant", "subset of all", "stream"],
)
def test_changing_orders_are_right_on_average(model: Any, batches: Callable[[], Iterable[Any]]) -> None:
    torch.manual_seed(0)
    source = batches()
    each = np.array([epochs_gradient(model, source) for _ in range(100)])
    if model is scaled:
        assert each.std() > 1e-6
        assert abs(each.mean() - FULL) < 4 * each.std() / 10
    else:
        assert each == pytest.approx(np.full(100, FULL), rel=1e-12)
    assert trained(model, source).num_steps == 30


WRONG: dict[str, tuple[Callable[..., Any], Callable[[], Iterable[Any]], dict[str, Any], str]] = {
    "uneven": (
        scaled,
        loader,
        {},
        "2 to 16 rows, in the same order.*counts 6.25 times.*of 16 0.78 times.*shuffle=True",
    ),
    "uneven, size given": (scaled, loader, {"dataset_size": N}, "2 to 16 rows"),
    "uneven list": (scaled, lambda: list(Y.split(B)), {}, "2 to 16 rows"),
    "uneven tuple": (scaled, lambda: tuple(Y.split([20, 30])), {}, "20 to 30 rows"),
    "small first": (scaled, lambda: list(Y.split([2, 16, 16, 16])), {}, "2 to 16 rows"),
    "uneven mappings": (named, lambda: [{"values": y} for y in Y.split(B)], {}, "2 to 16 rows"),
    "list of a loader": (scaled, lambda: list(loader(shuffle=True)), {}, "2 to 16 rows"),
    "uneven stream": (scaled, lambda: Stream(16, 16, 16, 2), {}, "2 to 16 rows"),
    "uneven iterable dataset": (scaled, lambda: loader(B, Rows()), {}, "2 to 16 rows"),
    "data without dimensions": (single, lambda: list(Y), {}, r"each of the 1 data.* there are 50"),
    "numbers": (lambda y: single(torch.tensor(y).double()), lambda: Y.tolist(), {}, "each of the 1 data"),
    "unscaled": (unscaled, loader, {}, "each of the 16 data of a batch 1 times"),
    "unscaled list": (unscaled, lambda: list(Y.split(10)), {}, r"each of the 10 data.*there are 50"),
    "unscaled stream": (unscaled, lambda: Stream(25, 25), {}, r"each of the 25 data.*there are 50"),
    "in no plate": (undeclared, lambda: loader(10), {}, r"each of the 10 data.*there are 50"),
    "in no plate, list": (undeclared, lambda: list(Y.split(10)), {}, r"each of the 10 data.*there are 50"),
    "by the first batch's size": (times(N / B), lambda: loader(shuffle=True), {}, r"each of the 2 data.*3.125 times"),
    "other size": (scaled, lambda: loader(10), {"dataset_size": 1000}, "there are 1000"),
    "subset": (scaled, lambda: loader(5, sampler=SubsetRandomSampler(range(20))), {}, "there are 20"),
    "other argument": (first_is_shorter, lambda: [(torch.ones(3), y) for y in Y.split(10)], {}, "there are 50"),
}


@pytest.mark.parametrize("case", WRONG)
def test_rows_that_count_otherwise_are_an_error(case: str) -> None:
    model, batches, options, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        trained(model, batches(), **options)
    if "stream" not in case and "iterable" not in case:  # known before the first step
        assert float(pyro.param("loc").detach()) == pytest.approx(0.3)


def test_uneven_local_latents_need_no_scale() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(pyro.param("slope", torch.tensor(0.1)) * y, 1.0))

    def in_no_plate(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)

    def guide_in_no_plate(y: Tensor) -> None:
        pyro.sample("z", dist.Normal(pyro.param("slope", torch.tensor(0.1)) * y, 1.0).to_event(1))

    for pair in ((model, guide), (in_no_plate, guide_in_no_plate)):
        pyro.clear_param_store()
        result = fit(*pair, batches=DataLoader(Y.float(), batch_size=B), num_steps=8, compiled=False, progress=False)  # type: ignore[arg-type]
        assert result.num_steps == 8


def test_looking_changes_nothing() -> None:
    """Neither random numbers nor the running means of modules, so that a resumed run equals the whole."""
    net = torch.nn.BatchNorm1d(1).double()

    def model(y: Tensor) -> None:
        pyro.module("net", net)
        m = pyro.sample("m", dist.Normal(net(y[:, None]).mean(), 3.0))
        with pyro.plate("data", N, subsample_size=len(y)):
            pyro.sample("y", dist.Normal(m, 2.0), obs=y)

    pyro.clear_param_store()
    data = Batches(loader(shuffle=True, generator=torch.Generator().manual_seed(5)), (), {})
    data.first()
    before = random_state(), {name: b.clone() for name, b in net.named_buffers()}
    data.check = ScaleCheck(model, Guide(), data, None)
    for batch in (data.first_batch, *data.examples()):
        data.look(batch)
    assert all(torch.equal(before[1][name], b) for name, b in net.named_buffers())
    assert torch.equal(before[0]["torch"], random_state()["torch"])
    assert len(data._checked) == 2


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [
        (-1, ValueError, "dataset_size must be at least 1"),
        (0, ValueError, "dataset_size must be at least 1"),
        (50.0, TypeError, "dataset_size must be an integer"),
        (float("nan"), TypeError, "dataset_size must be an integer"),
        (True, TypeError, "dataset_size must be an integer"),
        ("50", TypeError, "dataset_size must be an integer"),
        (torch.tensor(50.0), TypeError, "dataset_size must be"),
        (5, ValueError, "dataset_size is 5, but one batch has 10 data"),
    ],
)
@pytest.mark.parametrize("way", ["batches", "loader", "whole", "auto"])
def test_dataset_size_is_a_number_of_data(way: str, size: Any, error: type[Exception], message: str) -> None:
    pyro.clear_param_store()
    options: dict[str, Any] = {"dataset_size": size, "progress": False}
    if way == "auto" and size == 5:
        with pytest.raises(TypeError, match="takes no dataset_size"):
            fit(scaled, "auto", Y, **options)
        return
    ways: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
        "auto": ("auto", (Y,), {}),
        "whole": (Guide(), (Y[:10],), {}),
        "batches": (Guide(), (), {"batches": list(Y.split(10))}),
        "loader": (Guide(), (), {"batches": loader(10)}),
    }
    guide, args, more = ways[way]
    if way != "auto":
        more |= {"num_steps": 5, "compiled": False}
    with pytest.raises(error, match=message):
        fit(scaled, guide, *args, **more, **options)
    assert not any(
        "loc" in name and float(p.detach()) != pytest.approx(0.3) for name, p in pyro.get_param_store().items()
    )


def test_dataset_size_is_looked_at_without_batches_too() -> None:
    options: dict[str, Any] = {"num_steps": 3, "compiled": False, "progress": False}
    pyro.clear_param_store()
    with pytest.raises(ValueError, match="counts each of the 10 data of a batch 1 times"):
        fit(unscaled, Guide(), Y[:10], dataset_size=50, **options)
    assert fit(scaled, Guide(), Y[:10], dataset_size=50, **options).num_steps == 3


def test_autoguide_on_uneven_batches_is_right() -> None:
    """The example that went 8.8 sds off: shuffled, the mean is the posterior's."""

    def model(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 10.0))
        with pyro.plate("data", N, subsample_size=len(y)):
            pyro.sample("y", dist.Normal(m, 5.0), obs=y)

    y = Y.float()
    pyro.clear_param_store()
    result = fit(
        model,
        AutoNormal(model),
        batches=loader(data=TensorDataset(y), shuffle=True),
        num_steps=4000,
        optim=pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.999}),
        compiled=False,
        progress=False,
        seed=1,
    )
    precision = N / 25 + 1 / 100
    mean, sd = float(y.sum()) / 25 / precision, precision**-0.5
    with result.own_parameters():
        draws = torch.stack([result.guide(y)["m"].detach() for _ in range(2000)])  # type: ignore[index]
    assert abs(float(draws.mean()) - mean) < 0.35 * sd  # noise of the last steps
    assert abs(float(draws.std()) / sd - 1) < 0.25
