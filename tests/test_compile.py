"""A compiled step is Pyro's step: the same loss, parameters and optimizer state; and what cannot be compiled is refused."""

from __future__ import annotations

import io
import linecache
import logging
import math
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGaussian,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    AutoStructured,
)
from pyro.infer.reparam import StableReparam
from pyro.nn import PyroModule
from scipy.stats import ks_2samp
from torch import Tensor, nn

from pyro_elbo_ext import (
    ChiUpperBound,
    CompiledSVI,
    DecomposedELBO,
    History,
    ImportanceWeightedELBO,
    RenyiELBO,
    ThermodynamicELBO,
    fit,
)
from pyro_elbo_ext.compile import CannotCompile, finding
from tests.models import SIGMA, Regression, Y, nested_plates, vectors
from tests.oracles import PROBLEMS, Problem

Program = Callable[..., Any]
STEPS = 5


def eight_schools(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(5.0)))
    with pyro.plate("schools", 8):
        z = pyro.sample("z", dist.Normal(y.new_tensor(0.0), 1.0))
        pyro.sample("y", dist.Normal(mu + tau * z, sigma), obs=y)


def scaled_schools(y: Tensor, sigma: Tensor) -> None:
    """Two sites, of which one has an analytic KL and one has none."""
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(5.0)))
    with pyro.plate("schools", 8):
        z = pyro.sample("z", dist.Normal(y.new_tensor(0.0), 1.0))
        pyro.sample("y", dist.Normal(tau * z, sigma), obs=y)


class Fit(NamedTuple):
    losses: list[float]
    parameters: dict[str, Tensor]
    state: dict[str, Any]
    svi: Any


def train(
    make: Callable[..., Any],
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    *,
    loss: Any = None,
    optim: Any = None,
    steps: int = STEPS,
    after: Callable[[Any], None] | None = None,
    run: bool = False,
    keep: bool = False,
) -> Fit:
    """Train from a fresh param store, unless it is to be kept, and a fixed seed."""
    if not keep:
        pyro.clear_param_store()
    pyro.set_rng_seed(1)
    optim = optim or pyro.optim.Adam({"lr": 0.01})  # type: ignore[attr-defined]
    svi = make(model, guide, optim, loss if loss is not None else Trace_ELBO())
    losses = []
    if run:
        losses = svi.run(steps, *args, progress=False).tolist()
    else:
        for _ in range(steps):
            losses.append(svi.step(*args))
            if after is not None:
                after(optim)
    parameters = {name: p.detach().clone() for name, p in pyro.get_param_store()._params.items()}
    return Fit(losses, parameters, svi.optim.get_state(), svi)


def by_operator(*args: Any, **options: Any) -> CompiledSVI:
    """The graph without a compiler: the same operators as Pyro's, so the same numbers."""
    return CompiledSVI(*args, backend="eager", steps_per_call=2, **options)


def assert_equal(ours: Fit, theirs: Fit, tolerance: float = 0.0) -> None:
    assert ours.losses == pytest.approx(theirs.losses, rel=tolerance, abs=tolerance)
    assert list(ours.parameters) == list(theirs.parameters)
    for name, value in theirs.parameters.items():
        torch.testing.assert_close(
            ours.parameters[name], value, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert_same_state(ours.state, theirs.state, tolerance)


def assert_same_state(ours: Any, theirs: Any, tolerance: float) -> None:
    if isinstance(theirs, Tensor):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            assert_same_state(ours[key], theirs[key], tolerance)
    elif isinstance(theirs, list):
        for one, other in zip(ours, theirs, strict=True):
            assert_same_state(one, other, tolerance)
    else:
        assert ours == theirs


def compare(model: Program, guide: Callable[[], Program], args: tuple[Any, ...], **options: Any) -> None:
    """Compare with Pyro's SVI, step by step and through ``run``, to the last digit unless sums have another order."""
    tolerance = options.pop("tolerance", 0.0)
    loss = options.pop("loss", Trace_ELBO)
    make_optim = options.pop("optim", lambda: None)
    theirs = train(SVI, model, guide(), args, loss=loss(), optim=make_optim(), **options)
    ours = train(by_operator, model, guide(), args, loss=loss(), optim=make_optim(), **options)
    assert ours.svi.eager_reason is None
    assert_equal(ours, theirs, tolerance)
    if "after" not in options:
        many = train(by_operator, model, guide(), args, loss=loss(), optim=make_optim(), run=True, **options)
        assert_equal(many, theirs, tolerance)


# ----------------------------------------------------------------------------------------------------------------------
# Programs


def lkj(x: Tensor) -> None:
    corr = pyro.sample("corr", dist.LKJCholesky(2, torch.tensor(1.0)))
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), scale_tril=scale.unsqueeze(-1) * corr), obs=x)


def gaussian_process(x: Tensor, y: Tensor) -> None:
    length = pyro.sample("length", dist.LogNormal(0.0, 1.0))
    noise = pyro.sample("noise", dist.LogNormal(-1.0, 1.0))
    kernel = torch.exp(-0.5 * ((x[:, None] - x) / length) ** 2) + (noise + 1e-3) * torch.eye(len(x))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), kernel), obs=y)


def mixture(x: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    loc = pyro.sample("loc", dist.Normal(torch.tensor([-1.0, 0.0, 1.0]), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(loc, 1.0)), obs=x)


def subsampled(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(y), subsample_size=3) as index:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])


def state_space(y: Tensor) -> None:
    drift = pyro.sample("drift", dist.LogNormal(-1.0, 0.5))
    state: Any = 0.0
    for t in pyro.markov(range(len(y))):
        state = pyro.sample(f"state_{t}", dist.Normal(state, drift))
        pyro.sample(f"y_{t}", dist.Normal(state, 1.0), obs=y[t])


PROGRAMS: dict[str, tuple[Program, Callable[[Program], Program], tuple[Tensor, ...]]] = {
    "eight_schools-Normal": (eight_schools, AutoNormal, (Y, SIGMA)),
    "eight_schools-MultivariateNormal": (eight_schools, AutoMultivariateNormal, (Y, SIGMA)),
    "eight_schools-LowRank": (eight_schools, AutoLowRankMultivariateNormal, (Y, SIGMA)),
    "eight_schools-Delta": (eight_schools, AutoDelta, (Y, SIGMA)),
    "eight_schools-Structured": (eight_schools, AutoStructured, (Y, SIGMA)),
    "eight_schools-Gaussian": (eight_schools, AutoGaussian, (Y, SIGMA)),
    "gaussian_process-Messenger": (gaussian_process, AutoNormalMessenger, (torch.linspace(0, 1, 7), torch.ones(7))),
    "vectors-DiagonalNormal": (vectors, AutoDiagonalNormal, ()),
    "lkj-IAF": (lkj, AutoIAFNormal, (torch.arange(12.0).reshape(6, 2).sin(),)),
    "lkj-MultivariateNormal": (lkj, AutoMultivariateNormal, (torch.arange(12.0).reshape(6, 2).sin(),)),
    "gaussian_process-Normal": (gaussian_process, AutoNormal, (torch.linspace(0, 1, 7), torch.linspace(0, 1, 7).sin())),
    "mixture-Normal": (mixture, AutoNormal, (torch.linspace(-2, 2, 9),)),
    "subsampled-Normal": (subsampled, AutoNormal, (torch.linspace(-2, 2, 9),)),
    "nested_plates-Normal": (nested_plates, AutoNormal, ()),
    "state_space-Normal": (state_space, AutoNormal, (torch.linspace(-1, 1, 5),)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_steps_equal_pyro(name: str) -> None:
    model, guide, args = PROGRAMS[name]
    compare(model, lambda: guide(model), args)


@pytest.mark.parametrize("problem", [p for p in PROBLEMS if "auxiliary" not in p.name], ids=str)
def test_hand_written_guides_equal_pyro(problem: Problem) -> None:
    compare(problem.model, lambda: problem.guide, (), loss=lambda: Trace_ELBO(num_particles=2), steps=3, tolerance=1e-6)


@pytest.mark.parametrize("autoguide", [AutoNormal, AutoMultivariateNormal])
def test_float64(autoguide: Any) -> None:
    torch.set_default_dtype(torch.float64)
    compare(eight_schools, lambda: autoguide(eight_schools), (Y.double(), SIGMA.double()))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 6))
        self.register_buffer("offset", torch.full((6,), 0.1))

    def forward(self, z: Tensor) -> Tensor:
        return self.net(z) + self.offset  # type: ignore[no-any-return]


def autoencoder() -> tuple[Program, Program, Decoder]:
    torch.manual_seed(0)
    decoder, encoder = Decoder(), nn.Linear(6, 4)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        loc, log_scale = encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide, decoder


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO, DecomposedELBO])
def test_modules_are_trained(loss: Any) -> None:
    x = (torch.arange(42).reshape(7, 6) % 3 == 0).float()
    fits = []
    for make in (SVI, by_operator):
        model, guide, decoder = autoencoder()
        before = decoder.net[0].weight.detach().clone()  # type: ignore[union-attr]
        fits.append(train(make, model, guide, (x,), loss=loss()))
        assert not torch.equal(decoder.net[0].weight, before)  # type: ignore[union-attr,arg-type]
        assert torch.equal(decoder.net[0].weight, fits[-1].parameters["decoder$$$net.0.weight"])  # type: ignore[union-attr,arg-type]
    assert_equal(fits[1], fits[0])


def test_pyro_modules() -> None:
    x, y = torch.arange(15.0).reshape(5, 3).sin(), torch.arange(5.0)
    fits = []
    for make in (SVI, by_operator):
        torch.manual_seed(0)
        model = Regression()
        fits.append(train(make, model, AutoNormal(model), (x, y)))
        assert torch.equal(model.log_scale, fits[-1].parameters["log_scale"])
    assert_equal(fits[1], fits[0])


# ----------------------------------------------------------------------------------------------------------------------
# Losses


LOSSES: dict[str, Callable[[], Any]] = {
    "Trace_ELBO-3": lambda: Trace_ELBO(num_particles=3),
    "Trace_ELBO-vectorized": lambda: Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
    "DecomposedELBO": DecomposedELBO,
    "DecomposedELBO-sampled": lambda: DecomposedELBO(num_particles=2, kl="sampled"),
    "DecomposedELBO-vmap": lambda: DecomposedELBO(num_particles=3, vectorize_particles="vmap"),
    "DecomposedELBO-annealed": lambda: DecomposedELBO(kl_weight=lambda step: min(1.0, 0.1 * (step + 1))),
    "DecomposedELBO-annealed-sampled": lambda: DecomposedELBO(kl="sampled", kl_weight=lambda step: 1 / (1 + step)),
    "DecomposedELBO-sticking": lambda: DecomposedELBO(gradient="doubly_reparameterized", kl_weight=0.5),
    "DecomposedELBO-vargrad": lambda: DecomposedELBO(num_particles=3, gradient="vargrad"),
    "ImportanceWeightedELBO": lambda: ImportanceWeightedELBO(3),
    "ImportanceWeightedELBO-vmap": lambda: ImportanceWeightedELBO(3, vectorize_particles="vmap"),
    "ImportanceWeightedELBO-dreg": lambda: ImportanceWeightedELBO(3, gradient="doubly_reparameterized"),
    "RenyiELBO": lambda: RenyiELBO(0.5, 3),
    "ChiUpperBound": lambda: ChiUpperBound(2, 3),
    "ThermodynamicELBO": lambda: ThermodynamicELBO(num_particles=3),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("run", [False, True], ids=["step", "run"])
def test_losses_equal_eager_and_are_recorded(name: str, run: bool) -> None:
    results = []
    for make in (SVI, by_operator):
        loss = LOSSES[name]()
        guide = AutoNormal(scaled_schools)
        fit = train(make, scaled_schools, guide, (Y, SIGMA), loss=loss, run=run and make is not SVI)
        results.append((fit, getattr(loss, "history", None), loss))
    (theirs, history, _), (ours, own_history, loss) = results
    assert_equal(ours, theirs, 1e-5)
    if history is None:
        return
    assert loss.last is None
    assert loss.num_steps == STEPS
    expected, recorded = history.to_dataframe(), own_history.to_dataframe()
    assert list(recorded.columns) == list(expected.columns)
    for column in expected:
        if expected[column].dtype == np.float64:
            np.testing.assert_allclose(recorded[column], expected[column], rtol=2e-6, atol=2e-6, err_msg=column)
        else:
            assert recorded[column].equals(expected[column]), column
    assert own_history.to_dataframe(by="step").objective.tolist() == pytest.approx(
        history.to_dataframe(by="step").objective.tolist(), rel=2e-6
    )


def test_evaluate_loss() -> None:
    for loss in (Trace_ELBO(), DecomposedELBO()):
        fit = train(by_operator, eight_schools, AutoNormal(eight_schools), (Y, SIGMA), loss=loss)
        eager = SVI(eight_schools, fit.svi.guide, fit.svi.optim, loss)
        for _ in range(2):
            pyro.set_rng_seed(3)
            ours = fit.svi.evaluate_loss(Y, SIGMA)
            pyro.set_rng_seed(3)
            assert ours == pytest.approx(eager.evaluate_loss(Y, SIGMA), rel=1e-6)
        if isinstance(loss, DecomposedELBO):
            assert loss.history is not None
            assert loss.history.num_recorded == STEPS


def test_evaluate_loss_comes_first() -> None:
    svi = by_operator(eight_schools, AutoNormal(eight_schools), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())  # type: ignore[attr-defined]
    assert math.isfinite(svi.evaluate_loss(Y, SIGMA))
    before = [p.detach().clone() for p in pyro.get_param_store()._params.values()]
    assert math.isfinite(svi.evaluate_loss(Y, SIGMA))
    assert all(torch.equal(p, b) for p, b in zip(pyro.get_param_store()._params.values(), before, strict=True))
    svi.step(Y, SIGMA)
    svi.step(Y, SIGMA)
    assert svi.eager_reason is None


# ----------------------------------------------------------------------------------------------------------------------
# Optimizers


def matrix(x: Tensor) -> None:
    weights = pyro.sample("weights", dist.Normal(x.new_zeros(2, 3), 1.0).to_event(2))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x @ weights).sum(-1), 1.0), obs=x[:, 0])


def matrix_guide(x: Tensor) -> None:
    loc = pyro.param("loc", torch.ones(2, 3))
    scale = pyro.param("scale", torch.full((2, 3), 0.5), constraint=dist.constraints.positive)
    pyro.sample("weights", dist.Normal(loc, scale).to_event(2))


SQUARE = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.3, 0.2]])


def per_parameter(name: str) -> dict[str, float]:
    return {"lr": 0.1 if name == "loc" else 0.001}


OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "Adam": lambda: pyro.optim.Adam({"lr": 0.01, "weight_decay": 0.1}),  # type: ignore[attr-defined]
    "Adam-amsgrad": lambda: pyro.optim.Adam({"lr": 0.01, "amsgrad": True, "betas": (0.95, 0.9)}),  # type: ignore[attr-defined]
    "Adam-per-parameter": lambda: pyro.optim.Adam(per_parameter),  # type: ignore[attr-defined]
    "Adam-clip": lambda: pyro.optim.Adam({"lr": 0.01}, {"clip_norm": 0.5, "clip_value": 0.4}),  # type: ignore[attr-defined]
    "AdamW": lambda: pyro.optim.AdamW({"lr": 0.01, "weight_decay": 0.1}),  # type: ignore[attr-defined]
    "ClippedAdam": lambda: pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.9, "clip_norm": 0.5, "weight_decay": 0.1}),
    "SGD": lambda: pyro.optim.SGD({"lr": 1e-4}),  # type: ignore[attr-defined]
    "SGD-momentum": lambda: pyro.optim.SGD({"lr": 1e-4, "momentum": 0.9, "weight_decay": 0.1}),  # type: ignore[attr-defined]
    "SGD-nesterov": lambda: pyro.optim.SGD({"lr": 1e-4, "momentum": 0.9, "nesterov": True}),  # type: ignore[attr-defined]
    "PyroOptim": lambda: pyro.optim.PyroOptim(torch.optim.Adam, {"lr": 0.01}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_equal_pyro(name: str) -> None:
    tolerance = 1e-6 if "SGD" in name else 0.0  # Pyro's step is one fused multiplication and addition
    compare(matrix, lambda: matrix_guide, (SQUARE,), optim=OPTIMIZERS[name], tolerance=tolerance)


def test_scheduler() -> None:
    def make() -> Any:
        settings = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.5}
        return pyro.optim.ExponentialLR(settings)  # type: ignore[attr-defined]

    compare(matrix, lambda: matrix_guide, (SQUARE,), optim=make, after=lambda optim: optim.step())


# SparseAdam takes no dense gradient, LBFGS evaluates the loss several times; Horovod's needs Horovod
ALL = [
    name
    for name in dir(pyro.optim)
    if name in {*pyro.optim.pytorch_optims, "AdagradRMSProp", "ClippedAdam", "DCTAdam"} and not name.endswith("Adam")
] + ["Adam", "ClippedAdam", "DCTAdam", "NAdam", "RAdam"]
SCHEDULERS: dict[str, dict[str, Any]] = {
    "ChainedScheduler": {},
    "ConstantLR": {},
    "CosineAnnealingLR": {"T_max": 3},
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "cycle_momentum": False, "step_size_up": 2},
    "ExponentialLR": {"gamma": 0.5},
    "LambdaLR": {"lr_lambda": lambda step: 0.5**step},
    "LinearLR": {"total_iters": 3},
    "MultiStepLR": {"milestones": [2]},
    "MultiplicativeLR": {"lr_lambda": lambda step: 0.5},
    "OneCycleLR": {"max_lr": 0.2, "total_steps": 20},
    "PolynomialLR": {"total_iters": 3},
    "ReduceLROnPlateau": {"patience": 0},
    "SequentialLR": {},
    "StepLR": {"step_size": 2},
}


def same_as_pyro(make: Callable[[], Any], after: Callable[[Any], None] | None = None) -> CompiledSVI:
    theirs = train(SVI, matrix, matrix_guide, (SQUARE,), optim=make(), after=after)
    ours = train(by_operator, matrix, matrix_guide, (SQUARE,), optim=make(), after=after)
    assert_equal(ours, theirs, 1e-6)
    assert any(not torch.equal(value, torch.ones(2, 3)) for name, value in ours.parameters.items() if name == "loc")
    assert ours.svi.eager_reason is None
    return ours.svi


@pytest.mark.parametrize("name", ALL)
def test_every_optimizer_equals_pyro(name: str) -> None:
    if hasattr(torch.optim.lr_scheduler, name):
        if name in ("LRScheduler", "_LRScheduler", "ChainedScheduler", "SequentialLR"):
            return  # of other schedulers: not made by pyro.optim
        settings = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.01}, **SCHEDULERS[name]}

        def after(optim: Any) -> None:
            optim.step(*([1.0] if name == "ReduceLROnPlateau" else []))

        svi = same_as_pyro(lambda: getattr(pyro.optim, name)(dict(settings)), after)
        assert (svi.optimizer_reason is None) == (name != "OneCycleLR")
    else:
        svi = same_as_pyro(
            lambda: getattr(pyro.optim, name)({"eta": 0.1} if name == "AdagradRMSProp" else {"lr": 0.01})
        )
        assert (svi.optimizer_reason is None) == (name in ("Adam", "AdamW", "ClippedAdam", "SGD"))


@pytest.mark.parametrize(
    ("settings", "is_part"),
    [
        ({"lr": torch.tensor(0.01)}, False),
        ({"lr": 0.01, "foreach": True}, True),
        ({"lr": 0.01, "foreach": False}, True),
        ({"lr": 0.01, "fused": True}, False),
        ({"lr": 0.01, "maximize": True}, True),
        ({"lr": 0.01, "capturable": False}, True),
        ({"lr": 0.01, "differentiable": False}, True),
        ({"lr": np.float64(0.01)}, True),
        ({"lr": torch.tensor(0.01), "betas": (torch.tensor(0.9), torch.tensor(0.99))}, False),
    ],
    ids=str,
)
def test_settings_of_optimizers(settings: dict[str, Any], is_part: bool) -> None:
    svi = same_as_pyro(lambda: pyro.optim.Adam(dict(settings)))  # type: ignore[attr-defined]
    assert (svi.optimizer_reason is None) == is_part


class Noisy(pyro.optim.PyroOptim):
    """Does something of its own before each step."""

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        params = list(params)
        for p in params:
            p.grad = p.grad.sign()
        super().__call__(params, *args, **kwargs)


class Stateless(torch.optim.Optimizer):
    def __init__(self, params: Any, size: float = 0.01) -> None:
        super().__init__(params, {"size": size})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["size"] * p.grad


def hook(optim: Any) -> None:
    """Halve each gradient from the second step on, by a hook of the optimizers."""

    def halve(optimizer: Any, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = p.grad / 2

    for optimizer in optim.optim_objs.values():
        if not optimizer._optimizer_step_pre_hooks:
            optimizer.register_step_pre_hook(halve)


def decay(optim: Any) -> None:
    """Change a setting beside the learning rate, after two compiled steps."""
    optim.steps = getattr(optim, "steps", 0) + 1
    for optimizer in optim.optim_objs.values():
        optimizer.param_groups[0]["weight_decay"] = 0.5 * (optim.steps > 3)


@pytest.mark.parametrize(
    ("make", "after"),
    [
        (lambda: Noisy(torch.optim.Adam, {"lr": 0.01}), None),
        (lambda: pyro.optim.PyroOptim(Stateless, {}), None),
        (lambda: pyro.optim.Adam({"lr": 0.01}), hook),  # type: ignore[attr-defined]
        (lambda: pyro.optim.Adam({"lr": 0.01}), decay),  # type: ignore[attr-defined]
    ],
    ids=["a call of its own", "no state", "hooks", "another setting"],
)
def test_what_hangs_on_an_optimizer_is_not_left_out(make: Any, after: Any) -> None:
    svi = same_as_pyro(make, after)
    assert svi.optimizer_reason is not None


def test_replaced_optimizer_is_used() -> None:
    def fit(make: Callable[..., Any]) -> Fit:
        first = train(make, matrix, matrix_guide, (SQUARE,), optim=pyro.optim.SGD({"lr": 1e-3}))  # type: ignore[attr-defined]
        first.svi.optim = pyro.optim.Adam({"lr": 0.1})  # type: ignore[attr-defined]
        losses = [first.svi.step(SQUARE) for _ in range(STEPS)]
        values = {name: p.detach().clone() for name, p in pyro.get_param_store()._params.items()}
        return Fit(losses, values, first.svi.optim.get_state(), first.svi)

    assert_equal(fit(by_operator), fit(SVI), 1e-6)


def test_optimizers_that_svi_cannot_use() -> None:
    leaf = torch.zeros(1, requires_grad=True)
    for optim in (torch.optim.LBFGS([leaf]), pyro.optim.PyroOptim(torch.optim.LBFGS, {})):
        with pytest.raises(ValueError, match="LBFGS"):
            by_operator(matrix, matrix_guide, optim, Trace_ELBO())


def test_what_svi_takes_at_construction() -> None:
    adam = OPTIMIZERS["Adam"]
    with pytest.warns(FutureWarning, match="num_steps"):
        svi = CompiledSVI(matrix, matrix_guide, adam(), Trace_ELBO(), None, 0, 7, num_chains=2)
    assert (svi.num_steps, svi.num_samples, svi.num_chains) == (7, 0, 2)
    with pytest.warns(FutureWarning, match="num_samples"):
        CompiledSVI(matrix, matrix_guide, adam(), Trace_ELBO(), num_samples=3)
    with pytest.raises(TypeError, match="backnd"):
        CompiledSVI(matrix, matrix_guide, adam(), Trace_ELBO(), backnd="eager")
    with pytest.raises(TypeError, match="number of steps first"):
        svi.run(SQUARE)


def test_losses_that_are_functions_and_tuples_fall_back() -> None:
    def loss(model: Any, guide: Any, *args: Any) -> Any:
        return Trace_ELBO().differentiable_loss(model, guide, *args)

    def with_fallback(*args: Any) -> CompiledSVI:
        return CompiledSVI(*args, backend="eager", fallback=True)

    theirs = train(SVI, matrix, matrix_guide, (SQUARE,), loss=loss)
    assert_equal(train(with_fallback, matrix, matrix_guide, (SQUARE,), loss=loss), theirs)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    wake = pyro.infer.ReweightedWakeSleep(num_particles=2)
    svi = with_fallback(matrix, matrix_guide, OPTIMIZERS["Adam"](), wake)
    assert len(svi.step(SQUARE)) == 2  # type: ignore[arg-type]
    assert svi.run(3, SQUARE).shape == (3, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "zz"}, "'inductor', 'eager'.*'zz'"),
        ({"backend": 3}, "not 3"),
        ({"backend": "eager", "options": {"cpp_wrapper": True}}, "options are for backend='inductor'"),
        ({"options": {"cpp_wraper": True}}, "'cpp_wraper'"),
        ({"options": {"cpp_wrapper": "yes"}}, "must be of type bool"),
        ({"steps_per_call": 0}, "steps_per_call"),
    ],
    ids=str,
)
@pytest.mark.parametrize("fallback", [False, True])
def test_how_to_compile_is_checked_at_construction(options: dict[str, Any], message: str, fallback: bool) -> None:
    with pytest.raises(ValueError, match=message):
        CompiledSVI(matrix, matrix_guide, OPTIMIZERS["Adam"](), Trace_ELBO(), fallback=fallback, **options)
    with pytest.raises(ValueError, match=message):
        fit(matrix, matrix_guide, SQUARE, num_steps=3, compiled={"fallback": fallback, **options}, progress=False)


@pytest.mark.parametrize("name", ["RMSprop", "OneCycleLR"])
def test_other_optimizers_run_on_compiled_gradients(name: str, caplog: pytest.LogCaptureFixture) -> None:
    def make() -> Any:
        if name == "RMSprop":
            return pyro.optim.RMSprop({"lr": 0.01})  # type: ignore[attr-defined]
        settings = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "max_lr": 0.2, "total_steps": 20}
        return pyro.optim.OneCycleLR(settings)  # type: ignore[attr-defined]

    after = (lambda optim: optim.step()) if name == "OneCycleLR" else None
    theirs = train(SVI, matrix, matrix_guide, (SQUARE,), optim=make(), after=after)
    with caplog.at_level(logging.INFO, "pyro_elbo_ext"):
        ours = train(by_operator, matrix, matrix_guide, (SQUARE,), optim=make(), after=after)
    assert_equal(ours, theirs)
    assert ours.svi.eager_reason is None
    assert "not part of the graph" in ours.svi.optimizer_reason
    assert caplog.text.count("on compiled gradients") == 1
    for loss in (Trace_ELBO(), DecomposedELBO()):
        many = train(by_operator, matrix, matrix_guide, (SQUARE,), optim=make(), loss=loss, run=True)
        assert len(many.losses) == STEPS


def test_torch_optimizer() -> None:
    def fit(make: Callable[..., Any]) -> Fit:
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        guide = AutoNormal(eight_schools)
        guide(Y, SIGMA)
        if make is SVI:
            return train(SVI, eight_schools, guide, (Y, SIGMA))
        pyro.set_rng_seed(1)
        optim = torch.optim.Adam(guide.parameters(), lr=0.01)
        svi = by_operator(eight_schools, guide, optim, Trace_ELBO())
        losses = [svi.step(Y, SIGMA) for _ in range(STEPS)]
        assert svi.optimizer_reason is None
        assert optim.state[next(iter(guide.parameters()))]["step"] == STEPS
        values = {name: p.detach().clone() for name, p in pyro.get_param_store()._params.items()}
        return Fit(losses, values, {}, svi)

    assert_equal(fit(by_operator), fit(SVI)._replace(state={}))


@pytest.mark.parametrize("name", ["Adam", "ClippedAdam", "SGD-momentum"])
def test_state_is_saved_and_resumed(name: str) -> None:
    whole = train(by_operator, matrix, matrix_guide, (SQUARE,), optim=OPTIMIZERS[name](), steps=8)
    first = train(by_operator, matrix, matrix_guide, (SQUARE,), optim=OPTIMIZERS[name](), steps=4)
    random_state = torch.get_rng_state()
    store, state = io.BytesIO(), io.BytesIO()
    torch.save(pyro.get_param_store().get_state(), store)
    torch.save(first.state, state)
    pyro.clear_param_store()
    pyro.get_param_store().set_state(torch.load(io.BytesIO(store.getvalue()), weights_only=False))
    optim = OPTIMIZERS[name]()
    optim.set_state(torch.load(io.BytesIO(state.getvalue()), weights_only=False))
    svi = by_operator(matrix, matrix_guide, optim, Trace_ELBO())
    torch.set_rng_state(random_state)
    losses = [svi.step(SQUARE) for _ in range(4)]
    values = {name: p.detach().clone() for name, p in pyro.get_param_store()._params.items()}
    tolerance = 1e-6 if "SGD" in name else 0.0
    assert_equal(Fit(first.losses + losses, values, optim.get_state(), svi), whole, tolerance)


def test_replaced_optimizer_state_is_used() -> None:
    fit = train(by_operator, eight_schools, AutoNormal(eight_schools), (Y, SIGMA))
    for p, optimizer in fit.svi.optim.optim_objs.items():
        state = optimizer.state_dict()
        state["state"][0] = {**state["state"][0], "exp_avg": torch.full_like(p, 1e6)}
        optimizer.load_state_dict(state)
    before = {name: p.detach().clone() for name, p in pyro.get_param_store()._params.items()}
    fit.svi.step(Y, SIGMA)
    for name, p in pyro.get_param_store()._params.items():
        assert (before[name] - p).min() > 1.0


# ----------------------------------------------------------------------------------------------------------------------
# Nothing is baked into the graph


def compiled_eight_schools(**options: Any) -> CompiledSVI:
    svi: CompiledSVI = train(by_operator, eight_schools, AutoNormal(eight_schools), (Y, SIGMA), steps=2, **options).svi
    return svi


def loss_of(svi: Any, *args: Any, seed: int = 5) -> float:
    """To six digits: Pyro adds up float32 numbers here, the graph float64."""
    pyro.set_rng_seed(seed)
    return float(f"{svi.evaluate_loss(*args):.6g}")


def test_data_random_numbers_and_parameters_are_inputs() -> None:
    svi = compiled_eight_schools()
    eager = SVI(svi.model, svi.guide, svi.optim, Trace_ELBO())
    base = loss_of(svi, Y, SIGMA)
    assert loss_of(svi, Y, SIGMA) == base == loss_of(eager, Y, SIGMA)
    other = Y + 1
    assert loss_of(svi, other, SIGMA) == loss_of(eager, other, SIGMA) != base
    assert loss_of(svi, Y, SIGMA, seed=6) == loss_of(eager, Y, SIGMA, seed=6) != base
    changed = Y.clone()
    assert loss_of(svi, changed, SIGMA) == base
    changed[0] = 0.0  # the same object
    assert loss_of(svi, changed, SIGMA) == loss_of(eager, changed, SIGMA) != base
    with torch.no_grad():
        next(iter(pyro.get_param_store()._params.values())).add_(1.0)
    assert loss_of(svi, Y, SIGMA) == loss_of(eager, Y, SIGMA) != base
    assert len(svi._programs) == 1


def test_tensors_from_outside_are_inputs() -> None:
    y = Y.clone()

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("data", 8):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    svi = train(by_operator, model, AutoNormal(model), ()).svi
    base = loss_of(svi)
    y.add_(1.0)
    assert loss_of(svi) == loss_of(SVI(model, svi.guide, svi.optim, Trace_ELBO())) != base
    pyro.set_rng_seed(0)
    assert svi.step() == pytest.approx(loss_of(SVI(model, svi.guide, svi.optim, Trace_ELBO()), seed=0), rel=0.1)


def test_argument_that_the_program_also_reads_from_outside() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("data", 8):
            pyro.sample("y", dist.Normal(mu, SIGMA), obs=y)

    svi = train(by_operator, model, AutoNormal(model), (SIGMA,)).svi
    eager = SVI(model, svi.guide, svi.optim, Trace_ELBO())
    assert loss_of(svi, Y) == loss_of(eager, Y)
    svi = train(by_operator, eight_schools, AutoNormal(eight_schools), (SIGMA, SIGMA)).svi
    eager = SVI(eight_schools, svi.guide, svi.optim, Trace_ELBO())
    assert loss_of(svi, Y, SIGMA) == loss_of(eager, Y, SIGMA)


def test_buffers_are_inputs() -> None:
    model, guide, decoder = autoencoder()
    x = torch.ones(3, 6)
    svi = train(by_operator, model, guide, (x,)).svi
    base = loss_of(svi, x)
    decoder.offset.add_(1.0)
    assert loss_of(svi, x) == loss_of(SVI(model, guide, svi.optim, Trace_ELBO()), x) != base


def test_training_mode_of_modules() -> None:
    net = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.5), nn.Linear(4, 1))

    def model(y: Tensor) -> None:
        pyro.module("net", net)
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 8):
            pyro.sample("y", dist.Normal(net(mu.reshape(1)), 10.0), obs=y)

    svi = train(by_operator, model, AutoNormal(model), (Y,)).svi
    eager = SVI(model, svi.guide, svi.optim, Trace_ELBO())
    training = loss_of(svi, Y)
    net.eval()
    for _ in range(2):
        assert loss_of(svi, Y) == loss_of(eager, Y) != training
    net.train()
    assert loss_of(svi, Y) == training


def test_no_tensor_is_left_in_the_graph() -> None:
    svi = train(by_operator, lkj, AutoIAFNormal(lkj), (torch.eye(2),)).svi
    (program,) = svi._programs.values()
    assert not [node for node in program._capture.graph.graph.nodes if node.op == "get_attr"]
    assert not list(program._capture.graph.parameters())
    assert all(program.reached)


def test_cleared_param_store_begins_anew() -> None:
    fit = train(by_operator, eight_schools, AutoNormal(eight_schools), (Y, SIGMA))
    for name, value in fit.parameters.items():
        if name.endswith("locs.mu"):
            pyro.get_param_store()[name] = torch.full_like(value, 50.0)
    pyro.set_rng_seed(0)
    eager = SVI(eight_schools, fit.svi.guide, fit.svi.optim, Trace_ELBO())
    expected = loss_of(eager, Y, SIGMA)
    assert loss_of(fit.svi, Y, SIGMA) == expected > fit.losses[0] + 50
    fit.svi.step(Y, SIGMA)
    fit.svi.step(Y, SIGMA)
    for name in fit.parameters:
        if name.endswith("locs.mu"):
            assert (pyro.get_param_store()[name] > 49.0).all()


def test_what_reads_the_parameters_sees_them() -> None:
    fit = train(by_operator, eight_schools, AutoNormal(eight_schools), (Y, SIGMA), steps=40)
    theirs = train(SVI, eight_schools, AutoNormal(eight_schools), (Y, SIGMA), steps=40)
    medians = theirs.svi.guide.median(Y, SIGMA)
    fit = train(by_operator, eight_schools, AutoNormal(eight_schools), (Y, SIGMA), steps=40)
    for name, value in fit.svi.guide.median(Y, SIGMA).items():
        torch.testing.assert_close(value, medians[name], rtol=0, atol=0)
    draws = Predictive(eight_schools, guide=fit.svi.guide, num_samples=3)(Y, SIGMA)
    assert draws["z"].shape[0] == 3


# ----------------------------------------------------------------------------------------------------------------------
# Arguments


def test_mini_batches_and_new_shapes(caplog: pytest.LogCaptureFixture) -> None:
    data = torch.linspace(-1, 3, 20)

    def model(batch: Tensor, scale: float = 1.0) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("data", 20, subsample=batch):
            pyro.sample("y", dist.Normal(mu, scale), obs=batch)

    def fit(make: Callable[..., Any]) -> Fit:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = make(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())  # type: ignore[attr-defined]
        losses = [svi.step(batch) for _ in range(2) for batch in data.split(6)]
        losses += [svi.step(data[:6], scale=scale) for scale in (2.0, 2.0, 3.0)]
        losses += [svi.step(data[::3])]
        values = {name: p.detach().clone() for name, p in pyro.get_param_store()._params.items()}
        return Fit(losses, values, svi.optim.get_state(), svi)

    with caplog.at_level(logging.WARNING, "pyro_elbo_ext"):
        ours = fit(by_operator)
    assert_equal(ours, fit(SVI))
    assert len(ours.svi._programs) == 4  # 6 and 2 rows, a scale, another stride
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "pyro_elbo_ext"):
        for size in range(7, 16):  # and none of those for the cleared parameters
            ours.svi.step(data[:size])
    assert "9 kinds of arguments" in caplog.text


def test_tensors_in_containers_and_keywords() -> None:
    def model(data: dict[str, list[Tensor]], *, flag: bool) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        y, scale = data["both"]
        with pyro.plate("data", 8):
            pyro.sample("y", dist.Normal(mu, scale if flag else 2 * scale), obs=y)

    def fit(make: Callable[..., Any]) -> Fit:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = make(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())  # type: ignore[attr-defined]
        held = {"both": [Y, SIGMA]}
        losses = [svi.step(held, flag=flag) for flag in (True, True, False, False, True)]
        held["both"][0] = Y + 5  # the same container
        losses += [svi.step(held, flag=True)]
        values = {name: p.detach().clone() for name, p in pyro.get_param_store()._params.items()}
        return Fit(losses, values, svi.optim.get_state(), svi)

    ours = fit(by_operator)
    assert_equal(ours, fit(SVI))
    assert len(ours.svi._programs) == 2


def test_subsamples_are_drawn_anew() -> None:
    svi = train(by_operator, subsampled, AutoDelta(subsampled), (torch.arange(9.0),)).svi
    assert len({svi.evaluate_loss(torch.arange(9.0)) for _ in range(10)}) > 3


# ----------------------------------------------------------------------------------------------------------------------
# What cannot be compiled


def reads_item() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z.item(), 1.0), obs=torch.tensor(0.0))


def branches() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    loc = z if z > 0 else -z
    pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor(0.0))


def reads_data(y: Tensor = Y) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", int(y.max()) if y is not Y else 8):
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(8))


def varies() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    if z.detach().numpy() > 0:
        pyro.sample("positive", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))


def leaves_torch() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(torch.tensor(np.sin(z.detach().numpy())), 1.0), obs=torch.tensor(0.0))


def draws_in_numpy() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z + float(np.random.normal()), 1.0), obs=torch.tensor(0.0))  # noqa: NPY002


def normal_guide() -> None:
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))


REFUSED = {
    reads_item: r"reads the value .* at test_compile.py:\d+: `pyro.sample\(\"x\", dist.Normal\(z.item\(\)",
    branches: r"reads the value .* at test_compile.py:\d+: `loc = z if z > 0 else -z`",
    varies: "site 'positive' of the model is in one run and not in another",
    leaves_torch: "is not the program's own under the same seed",
    draws_in_numpy: "is not the program's own under the same seed",
}


@pytest.mark.parametrize("model", REFUSED, ids=lambda model: model.__name__)
@pytest.mark.filterwarnings("ignore:.*were in guide but not model.*")
def test_programs_that_are_not_static(model: Program, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(CannotCompile, match=REFUSED[model]):
        train(by_operator, model, normal_guide, ())
    with caplog.at_level(logging.WARNING, "pyro_elbo_ext"):
        ours = train(lambda *args: by_operator(*args, fallback=True), model, normal_guide, ())
    theirs = train(SVI, model, normal_guide, ())
    assert_equal(ours, theirs)
    assert ours.svi.eager_reason in caplog.text
    assert caplog.text.count("uncompiled") == 1
    many = train(lambda *args: by_operator(*args, fallback=True), model, normal_guide, (), run=True)
    assert_equal(many, theirs)


def test_pyros_own_code_is_named_where_it_reads_a_value() -> None:
    def model() -> None:
        stability = pyro.sample("stability", dist.Uniform(1.2, 1.8))
        with poutine.reparam(config={"x": StableReparam()}):
            pyro.sample("x", dist.Stable(stability, 0.3, 1.0, 0.0), obs=torch.tensor(0.0))

    with pytest.raises(
        CannotCompile, match=r"test_compile.py:\d+: `pyro.sample\(\"x\".*, in Pyro's \w+ \(stable.py:\d+\)"
    ):
        train(by_operator, model, AutoNormal(model), ())


def test_reading_an_argument() -> None:
    def model(size: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", int(size)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(int(size)))

    def guide(size: Tensor) -> None:
        normal_guide()

    with pytest.raises(CannotCompile, match=r"test_compile.py:\d+: `with pyro.plate\(\"data\", int\(size\)\)"):
        train(by_operator, model, guide, (torch.tensor(3),))


def test_refusal_is_repeated_without_a_step() -> None:
    svi = by_operator(reads_item, normal_guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())  # type: ignore[attr-defined]
    with pytest.raises(CannotCompile):
        svi.step()
    after = pyro.param("loc").item()
    with pytest.raises(CannotCompile, match="reads the value"):
        svi.step()
    assert pyro.param("loc").item() == after


def in_file(filename: str, source: str) -> Any:
    """The ``model`` that a source defines, as if it stood in a file, or in a cell, of that name."""
    lines = source.splitlines(keepends=True)
    linecache.cache[filename] = (len(source), None, lines, filename)
    namespace: dict[str, Any] = {}
    exec(compile(source, filename, "exec"), namespace)
    return namespace["model"]


READS = """
import pyro, pyro.distributions as dist, torch
def model():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z.item(), 1.0), obs=torch.tensor(0.0))
"""


@pytest.mark.parametrize(
    ("filename", "place"),
    [
        (f"{sysconfig.get_path('purelib')}/cells/model.py", r"at model.py:5: `pyro.*z.item.*`, in cells's model: "),
        (
            f"{sysconfig.get_path('purelib')}/torchcells/model.py",
            r"at model.py:5: `pyro.*z.item.*`, in torchcells's model: ",
        ),
        ("<ipython-input-7-0123456789ab>", r"at cell \[7\], line 5: `pyro.*z.item"),
        ("/tmp/ipykernel_4242/1234.py", r"at a cell of the notebook, line 5: `pyro.*z.item"),
        ("<stdin>", r"at <stdin>:5: `pyro.*z.item"),
    ],
)
def test_place_of_a_value_that_is_read(filename: str, place: str) -> None:
    """Named although every frame is in an installed package, or in a notebook."""
    with pytest.raises(CannotCompile, match=f"reads the value of a tensor into Python, {place}"):
        train(by_operator, in_file(filename, READS), normal_guide, ())


def test_place_names_own_code_before_that_of_a_package() -> None:
    of_package = in_file(f"{sysconfig.get_path('purelib')}/cells/model.py", READS)

    def model() -> None:
        of_package()

    with pytest.raises(
        CannotCompile, match=r"at test_compile.py:\d+: `of_package\(\)`, in cells's model \(model.py:5\)"
    ):
        train(by_operator, model, normal_guide, ())


@pytest.mark.parametrize("make", [by_operator, SVI], ids=["compiled", "eager"])
@pytest.mark.parametrize("kind", ["Linear", "PyroModule", "Sequential", "pyro.module"])
def test_two_networks_of_one_name(make: Any, kind: str) -> None:
    """Pyro trains the first and leaves the other as it was; the remedy is another name."""
    make_network: Callable[[], Any] = {
        "PyroModule": lambda: PyroModule[nn.Linear](1, 1),
        "Sequential": lambda: nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1)),
    }.get(kind, lambda: nn.Linear(1, 1))

    class Holder(PyroModule):  # type: ignore[misc]
        def __init__(self, name: str) -> None:
            super().__init__()
            setattr(self, name, make_network())

    def programs(name: str) -> tuple[Any, Any]:
        if kind == "pyro.module":
            decoder, encoder = make_network(), make_network()

            def model() -> None:
                pyro.module("net", decoder)
                z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
                pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=torch.ones(1))

            def guide() -> None:
                pyro.module(name, encoder)
                pyro.sample("z", dist.Normal(encoder(torch.ones(1)), 1.0).to_event(1))

            return model, guide

        class Model(Holder):
            def forward(self) -> None:
                z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
                pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=torch.ones(1))

        class Guide(Holder):
            def forward(self) -> None:
                pyro.sample("z", dist.Normal(getattr(self, name)(torch.ones(1)), 1.0).to_event(1))

        return Model("net"), Guide(name)

    with pytest.raises(ValueError, match=r"two modules use the name 'net'.*Rename one of the two"):
        train(make, *programs("net"), (), loss=DecomposedELBO())
    train(make, *programs("other"), (), loss=DecomposedELBO())


def test_unregistered_parameters() -> None:
    net = nn.Linear(1, 1)

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(net(z.reshape(1)), 1.0).to_event(1), obs=torch.zeros(1))

    with pytest.raises(CannotCompile, match=r"never train it: .*net\.(weight|bias) \(Linear\)"):
        train(by_operator, model, normal_guide, ())
    net.requires_grad_(False)
    compare(model, lambda: normal_guide, ())


@pytest.mark.parametrize("make", [by_operator, SVI], ids=["compiled", "eager"])
def test_parameters_that_loading_has_replaced(make: Any, tmp_path: Path) -> None:
    network = nn.Linear(1, 2)

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    def guide(x: Tensor, update: bool = False) -> None:
        pyro.module("network", network, update_module_params=update)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(network(x)[:, 0], network(x)[:, 1].exp()))

    svi = train(make, model, guide, (Y[:, None],), loss=DecomposedELBO()).svi
    pyro.get_param_store().save(tmp_path / "store")
    pyro.get_param_store().load(tmp_path / "store")
    with pytest.raises(ValueError, match=r"another tensor by the name 'network\$\$\$\w+'.*update_module_params=True"):
        train(make, model, guide, (Y[:, None],), loss=DecomposedELBO(), optim=svi.optim, keep=True)
    updating = make(model, lambda x: guide(x, True), pyro.optim.Adam({"lr": 0.1}), DecomposedELBO())  # type: ignore[attr-defined]
    before = network.bias.detach().clone()
    for _ in range(3):
        updating.step(Y[:, None])
    assert not torch.equal(before, network.bias)


@pytest.mark.parametrize(
    ("argument", "name"), [(np.zeros(2), "ndarray"), ([{1, 2}], "set"), (torch.eye(2).to_sparse(), "layout")]
)
def test_arguments_that_cannot_be_inputs(argument: Any, name: str) -> None:
    def model(_: Any) -> None:
        branchless()

    def branchless() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.0))

    def guide(_: Any) -> None:
        normal_guide()

    with pytest.raises(CannotCompile, match=name):
        train(by_operator, model, guide, (argument,))
    ours = train(lambda *args: by_operator(*args, fallback=True), model, guide, (argument,))
    assert_equal(ours, train(SVI, model, guide, (argument,)))


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (TraceGraph_ELBO(), "TraceGraph_ELBO cannot be compiled"),
        (lambda model, guide: torch.tensor(0.0), "cannot be compiled"),
        (DecomposedELBO(history=History(gradient_snr="steps")), "gradient_snr='steps'"),
    ],
)
def test_losses_that_cannot_be_compiled(loss: Any, match: str) -> None:
    optim = pyro.optim.Adam({"lr": 0.01})  # type: ignore[attr-defined]
    guide = AutoNormal(eight_schools)
    with pytest.raises(CannotCompile, match=match):
        CompiledSVI(eight_schools, guide, optim, loss)
    svi = CompiledSVI(eight_schools, guide, optim, loss, fallback=True)
    assert svi.eager_reason is not None
    if isinstance(loss, DecomposedELBO):
        svi.run(3, Y, SIGMA, progress=False)
        assert loss.history is not None
        assert loss.history.num_recorded == 3


class Reweighted(Trace_ELBO):
    def _differentiable_loss_particle(self, model_trace: Any, guide_trace: Any) -> Any:
        loss, surrogate = super()._differentiable_loss_particle(model_trace, guide_trace)
        return 2 * loss, 2 * surrogate


class Halved(TraceMeanField_ELBO):
    def loss_and_grads(self, *args: Any, **kwargs: Any) -> Any:
        return super().loss_and_grads(*args, **kwargs) / 2


class Shifted(DecomposedELBO):
    def loss_and_grads(self, *args: Any, **kwargs: Any) -> float:
        return super().loss_and_grads(*args, **kwargs) + 1


class Unrecorded(ImportanceWeightedELBO):
    def _record_step(self, *args: Any) -> None:
        """Keep nothing."""


def patched(loss: Any, name: str) -> Any:
    setattr(loss, name, lambda *args, **kwargs: 0.0)
    return loss


def test_methods_of_a_loss_that_a_compiled_step_does_not_call_are_refused_by_name() -> None:
    optim = pyro.optim.Adam({"lr": 0.01})  # type: ignore[attr-defined]
    guide = AutoNormal(eight_schools)
    from pyro.contrib.cevae import TraceCausalEffect_ELBO

    for loss, name in (
        (Reweighted(), "Reweighted .*_differentiable_loss_particle"),
        (TraceCausalEffect_ELBO(), "TraceCausalEffect_ELBO .*_differentiable_loss_particle"),
        (Halved(), "loss_and_grads"),
        (Shifted(), "loss_and_grads"),
        (Unrecorded(), "_record_step"),
        (patched(Trace_ELBO(), "_differentiable_loss_particle"), "_differentiable_loss_particle"),
        (patched(DecomposedELBO(), "_get_traces"), "_get_traces"),
        (patched(DecomposedELBO(), "loss_and_grads"), "loss_and_grads"),
    ):
        with pytest.raises(CannotCompile, match=name):
            CompiledSVI(eight_schools, guide, optim, loss)


def test_hooks_that_are_patched_into_a_class_of_pyros_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trace_ELBO, "_differentiable_loss_particle", lambda *args: (0.0, 0.0))
    with pytest.raises(CannotCompile, match="_differentiable_loss_particle"):
        CompiledSVI(eight_schools, eight_schools, pyro.optim.Adam({}), Trace_ELBO())  # type: ignore[attr-defined]


def test_methods_of_a_loss_that_a_compiled_step_calls_are_called() -> None:
    seen: list[str] = []

    class Watching(Trace_ELBO):
        def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
            seen.append("trace")
            scaled = poutine.scale(model, 3.0)
            return super()._get_trace(scaled, guide, args, kwargs)

    class Counting(DecomposedELBO):
        def _evaluate(self, model: Any, guide: Any, args: Any, kwargs: Any, *, with_gradient: bool) -> Any:
            seen.append("evaluate")
            return super()._evaluate(model, guide, args, kwargs, with_gradient=with_gradient)

    for loss in (Watching, Counting):
        seen.clear()
        compare(eight_schools, lambda: AutoNormal(eight_schools), (Y, SIGMA), loss=loss, tolerance=1e-5)
        assert seen


def test_hooks_of_pyros_losses_that_an_objective_never_calls_are_refused() -> None:
    class Hooked(DecomposedELBO):
        def _differentiable_loss_particle(self, model_trace: Any, guide_trace: Any) -> Any:
            return 0.0, 0.0

    with pytest.raises(TypeError, match="Hooked has its own _differentiable_loss_particle"):
        Hooked()
    elbo: Any = patched(ImportanceWeightedELBO(), "_get_trace")
    svi = SVI(eight_schools, AutoNormal(eight_schools), pyro.optim.Adam({"lr": 0.1}), elbo)  # type: ignore[attr-defined]
    for call in (svi.step, svi.evaluate_loss):
        with pytest.raises(TypeError, match="its own _get_trace"):
            call(Y, SIGMA)


def test_other_arguments_out_of_range() -> None:
    optim = pyro.optim.Adam({"lr": 0.01})  # type: ignore[attr-defined]
    with pytest.raises(CannotCompile, match="loss_and_grads"):
        CompiledSVI(eight_schools, eight_schools, optim, Trace_ELBO(), lambda *args: 0.0)
    with pytest.raises(ValueError, match="steps_per_call"):
        CompiledSVI(eight_schools, eight_schools, optim, Trace_ELBO(), steps_per_call=0)
    with pytest.raises(ValueError, match="num_steps"):
        by_operator(eight_schools, AutoNormal(eight_schools), optim, Trace_ELBO()).run(-1, Y, SIGMA)
    with pytest.raises(ValueError, match="PyroOptim"):
        CompiledSVI(eight_schools, eight_schools, torch.optim.Adam, Trace_ELBO())


# ----------------------------------------------------------------------------------------------------------------------
# Losses that are not finite


def fragile(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


@pytest.mark.parametrize("run", [False, True])
def test_objectives_stop_at_a_loss_that_is_not_finite(run: bool) -> None:
    loss = DecomposedELBO()
    data = Y.clone()
    fit = train(by_operator, fragile, AutoNormal(fragile), (data,), loss=loss)
    data[0] = torch.nan
    call = (lambda: fit.svi.run(6, data, progress=False)) if run else (lambda: fit.svi.step(data))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"site 'y' \(observed\) has log_p = nan at step 5"):
            call()
    for name, value in fit.parameters.items():
        assert torch.equal(pyro.get_param_store()._params[name], value)
    assert loss.num_steps == STEPS
    data[0] = 1.0
    call()
    assert loss.num_steps == STEPS + (6 if run else 1)
    assert loss.history is not None
    assert loss.history.num_recorded == loss.num_steps


def test_pyros_losses_warn_as_in_pyro() -> None:
    data = Y.clone()
    fit = train(by_operator, fragile, AutoNormal(fragile), (data,))
    data[0] = torch.nan
    with pytest.warns(UserWarning, match="Encountered NaN: loss"):
        assert math.isnan(fit.svi.step(data))


# ----------------------------------------------------------------------------------------------------------------------
# run


def test_run_takes_any_number_of_steps() -> None:
    for steps in (0, 1, 2, 7):
        many = train(by_operator, eight_schools, AutoNormal(eight_schools), (Y, SIGMA), steps=steps, run=True)
        assert len(many.losses) == steps
        theirs = train(SVI, eight_schools, AutoNormal(eight_schools), (Y, SIGMA), steps=steps)
        assert_equal(many, theirs)


def test_run_shows_that_it_compiles(capsys: pytest.CaptureFixture[str]) -> None:
    pyro.clear_param_store()
    svi = by_operator(eight_schools, AutoNormal(eight_schools), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())  # type: ignore[attr-defined]
    svi.run(9, Y, SIGMA)
    shown = capsys.readouterr().err.split("\r")
    assert any("compiling" in line and "0/9" in line for line in shown)
    assert "compiling" not in shown[-1]
    assert "9/9" in shown[-1]
    svi.run(8, Y, SIGMA)
    assert "compiling" not in capsys.readouterr().err


def test_interrupted_run_keeps_what_is_done() -> None:
    loss = DecomposedELBO()
    svi = train(by_operator, eight_schools, AutoNormal(eight_schools), (Y, SIGMA), loss=loss, run=True).svi
    (program,) = svi._programs.values()
    take, calls = program.take, []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return take(*args)

    program.take = interrupted
    with pytest.raises(KeyboardInterrupt):
        svi.run(100, Y, SIGMA, progress=False)
    assert loss.num_steps == STEPS + 2 * 2
    assert loss.history is not None
    assert loss.history.num_recorded == loss.num_steps


# ----------------------------------------------------------------------------------------------------------------------
# Machine code


def by_inductor(*args: Any, **options: Any) -> CompiledSVI:
    return CompiledSVI(*args, same_draws=True, **options)


@pytest.mark.slow
@pytest.mark.parametrize("loss", [Trace_ELBO, DecomposedELBO])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_machine_code_equals_pyro(loss: Any, dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    args = Y.to(dtype), SIGMA.to(dtype)
    theirs = train(SVI, eight_schools, AutoNormal(eight_schools), args, loss=loss())
    ours = train(by_inductor, eight_schools, AutoNormal(eight_schools), args, loss=loss())
    assert_equal(ours, theirs, 1e-5 if dtype is torch.float32 else 1e-12)
    assert ours.svi.compile_time > 0.0


def many_means(y: Tensor) -> None:
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(y.new_tensor(0.0), 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Adam", "ClippedAdam"])
def test_machine_code_of_large_parameters(name: str) -> None:
    args = (torch.arange(1500) / 1500,)  # large enough that the scalars of an update, and draws, have code of their own
    theirs = train(SVI, many_means, AutoNormal(many_means), args, optim=OPTIMIZERS[name]())
    for make, tolerance in ((by_operator, 0.0), (by_inductor, 1e-5), (CompiledSVI, 1e-5)):
        # so many numbers are drawn by torch's generator, also without same_draws
        ours = train(make, many_means, AutoNormal(many_means), args, optim=OPTIMIZERS[name]())
        assert ours.svi.optimizer_reason is None
        assert_equal(ours, theirs, tolerance)
    assert len(set(theirs.losses)) == STEPS


@pytest.mark.slow
def test_machine_code_draws_its_own_numbers() -> None:
    def make(*args: Any) -> CompiledSVI:
        return CompiledSVI(*args, steps_per_call=2)

    first, second = (
        train(make, eight_schools, AutoNormal(eight_schools), (Y, SIGMA), loss=DecomposedELBO(), steps=401, run=True)
        for _ in range(2)
    )
    assert_equal(first, second)  # reproducible from the seed
    assert len(set(first.losses)) == 401
    svi = first.svi
    ours = np.array([svi.evaluate_loss(Y, SIGMA) for _ in range(2000)])
    eager = SVI(eight_schools, svi.guide, svi.optim, DecomposedELBO())
    theirs = np.array([eager.evaluate_loss(Y, SIGMA) for _ in range(400)])
    assert ks_2samp(ours, theirs).pvalue > 0.01


# ----------------------------------------------------------------------------------------------------------------------
# GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_steps_on_a_gpu(optim: str, backend: str) -> None:
    """Parameters, state, losses and tables stay on the device; the fit is Pyro's."""
    args = Y.cuda(), SIGMA.cuda()
    default = torch.get_default_device()
    torch.set_default_device("cuda")
    try:
        theirs = train(
            SVI, eight_schools, AutoNormal(eight_schools), args, optim=OPTIMIZERS[optim](), loss=DecomposedELBO()
        )
        for run in (False, True):
            ours = train(
                lambda *of: CompiledSVI(*of, backend=backend, same_draws=True),
                eight_schools,
                AutoNormal(eight_schools),
                args,
                optim=OPTIMIZERS[optim](),
                loss=DecomposedELBO(),
                run=run,
            )
            assert_equal(ours, theirs, 1e-4)
            assert all(p.is_cuda for p in ours.parameters.values())
    finally:
        torch.set_default_device(default)


def test_a_step_of_very_many_operators_is_left_to_pyro(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding, "MANY_OPERATORS", 20)
    optim = pyro.optim.Adam({"lr": 0.01})  # type: ignore[attr-defined]
    svi = CompiledSVI(matrix, matrix_guide, optim, Trace_ELBO(), fallback=True)
    for _ in range(3):
        svi.step(SQUARE)
    assert svi.eager_reason is not None
    assert "operators" in svi.eager_reason
    assert "fallback=False" in svi.eager_reason
