"""Models of the kinds that Pyro's SVI examples cover, trained by ``pyro.infer.SVI`` and by ``CompiledSVI``.

    python -m tests.benchmarks.models [--only NAME ...] [--steps N] [--blocks B]

Each model is trained twice in float64 from one seed, eagerly and compiled with ``same_draws=True``: the losses of all
steps, the parameters and the buffers of modules must agree at the end. Then twice in float32, compiled with the backend's
own random draws and taking turns in blocks. The ratio is that of the times below which a tenth of all steps stays, which a
machine that does other things disturbs least. At the end the losses of both at the same parameters (steps with a learning
rate of 0) must have the same distribution, by the test of Kolmogorov and Smirnov. One thread, validation off. Compilation is
cold only with an empty cache (set TORCHINDUCTOR_CACHE_DIR to a new folder). The outcome is

- "same": both agree;
- "refused": CompiledSVI says that it cannot compile the model, and why;
- "DIFFERENT": a bug, with what differs. The exit status is then 1.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pyro.optim
import torch
from pyro import poutine
from pyro.contrib import gp
from pyro.contrib.easyguide import EasyGuide
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGaussian,
    AutoGuideList,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
    AutoStructured,
)
from pyro.infer.reparam import LocScaleReparam, StableReparam, TransformReparam
from pyro.nn import PyroModule, PyroSample
from scipy.stats import ks_2samp
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_elbo_ext import CompiledSVI
from pyro_elbo_ext.compile import CannotCompile
from pyro_elbo_ext.terms.registration import modules_of

Program = Callable[..., Any]


class Case(NamedTuple):
    """A model to train; ``batches`` are the arguments of the steps, in turn."""

    model: Program
    guide: Program
    batches: list[tuple[Any, ...]]
    loss: Callable[[], Any] = Trace_ELBO
    optim: Callable[[], Any] = lambda: pyro.optim.Adam({"lr": 0.01})  # type: ignore[attr-defined]


CASES: dict[str, Callable[[], Case]] = {}


def case(build: Callable[[], Case]) -> Callable[[], Case]:
    """Register a case; its docstring says what it is."""
    CASES[build.__name__] = build
    return build


# ----------------------------------------------------------------------------------------------------------------------
# Regression and hierarchies


@case
def batting() -> Case:
    """Binomial, partially pooled log odds; AutoNormal"""
    trials = torch.full((18,), 45.0)
    hits = torch.tensor([18, 17, 16, 15, 14, 14, 13, 12, 11, 11, 10, 10, 10, 10, 10, 9, 8, 7.0])

    def model(trials: Tensor, hits: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(-1.0, 1.0))
        scale = pyro.sample("scale", dist.HalfCauchy(1.0))
        with pyro.plate("player", len(hits)):
            logits = pyro.sample("logits", dist.Normal(loc, scale))
            pyro.sample("hits", dist.Binomial(trials, logits=logits), obs=hits)

    return Case(model, AutoNormal(model), [(trials, hits)])


@case
def beta_binomial() -> Case:
    """Binomial with Beta and Pareto priors; hand-written Beta guide (implicit gradients)"""
    hits = torch.tensor([18, 17, 16, 15, 14, 14, 13, 12, 11, 11, 10, 10.0])

    def model(hits: Tensor) -> None:
        mean = pyro.sample("mean", dist.Uniform(0.0, 1.0))
        kappa = pyro.sample("kappa", dist.Pareto(1.0, 1.5))
        with pyro.plate("player", len(hits)):
            chance = pyro.sample("chance", dist.Beta(mean * kappa, (1 - mean) * kappa))
            pyro.sample("hits", dist.Binomial(45, chance), obs=hits)

    def guide(hits: Tensor) -> None:
        a = pyro.param("a", torch.tensor([2.0, 4.0]), constraint=constraints.positive)
        pyro.sample("mean", dist.Beta(a[0], a[1]))
        pyro.sample("kappa", dist.TransformedDistribution(dist.Gamma(a.sum(), 1.0), T.AffineTransform(1.0, 1.0)))
        counts = pyro.param("counts", torch.full((2, len(hits)), 5.0), constraint=constraints.positive)
        with pyro.plate("player", len(hits)):
            pyro.sample("chance", dist.Beta(counts[0], counts[1]))

    return Case(model, guide, [(hits,)])


def _groups() -> tuple[Tensor, Tensor, Tensor]:
    group = torch.arange(60) % 6
    x = torch.randn(60)
    return x, group, 0.5 * x + torch.randn(6)[group] + 0.3 * torch.randn(60)


def _varying(x: Tensor, group: Tensor, y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("group", 6):
        offset = pyro.sample("offset", dist.Normal(loc, scale))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    noise = pyro.sample("noise", dist.Exponential(1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(offset[group] + slope * x, noise), obs=y)


@case
def varying_intercepts() -> Case:
    """Groups indexed by data; AutoGaussian"""
    return Case(_varying, AutoGaussian(_varying), [_groups()])


@case
def varying_intercepts_structured() -> Case:
    """The same; AutoStructured with dependencies"""
    guide = AutoStructured(
        _varying,
        conditionals={"loc": "normal", "scale": "normal", "offset": "mvn", "slope": "normal", "noise": "delta"},
        dependencies={"offset": {"loc": "linear", "scale": "linear"}, "slope": {"offset": "linear"}},
    )
    return Case(_varying, guide, [_groups()])


@case
def varying_intercepts_reparametrized() -> Case:
    """The same with a learned centering (LocScaleReparam); AutoLowRankMultivariateNormal, ClippedAdam"""
    model = poutine.reparam(_varying, config={"offset": LocScaleReparam(shape_params=["scale"])})
    guide = AutoLowRankMultivariateNormal(model, rank=3)
    return Case(model, guide, [_groups()], optim=lambda: pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.999}))


@case
def horseshoe() -> Case:
    """Sparse regression with half-Cauchy scales and an inverse-gamma slab; AutoNormal"""
    x = torch.randn(50, 8)
    y = x[:, 0] - 2 * x[:, 1] + 0.5 * torch.randn(50)

    def model(x: Tensor, y: Tensor) -> None:
        tau = pyro.sample("tau", dist.HalfCauchy(0.2))
        slab = pyro.sample("slab", dist.InverseGamma(4.0, 4.0))
        with pyro.plate("feature", x.shape[1]):
            scale = pyro.sample("scale", dist.HalfCauchy(1.0))
            scale = slab.sqrt() * scale / (slab + tau**2 * scale**2).sqrt()
            weight = pyro.sample("weight", dist.Normal(0.0, tau * scale))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.StudentT(5.0, x @ weight, 0.5), obs=y)

    return Case(model, AutoNormal(model), [(x, y)], TraceMeanField_ELBO)


class _Network(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = PyroModule[nn.Linear](2, 5)
        self.out = PyroModule[nn.Linear](5, 1)
        for layer in (self.hidden, self.out):
            for name, p in list(layer.named_parameters()):
                setattr(layer, name, PyroSample(dist.Normal(0.0, torch.ones(())).expand(p.shape).to_event(p.dim())))

    def forward(self, x: Tensor, y: Tensor) -> None:
        mean = self.out(self.hidden(x).tanh()).squeeze(-1)
        with pyro.plate("row", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.3), obs=y)


@case
def bayesian_network() -> Case:
    """A PyroModule with PyroSample weights; AutoDiagonalNormal"""
    x = torch.randn(40, 2)
    model = _Network()
    return Case(model, AutoDiagonalNormal(model), [(x, x.prod(-1))])


@case
def zero_inflated() -> Case:
    """Zero-inflated counts, censored and masked rows, a factor; AutoMultivariateNormal"""
    x = torch.randn(60)
    counts = dist.Poisson((0.5 + 0.3 * x).exp()).sample() * (torch.rand(60) > 0.3)

    def model(x: Tensor, counts: Tensor) -> None:
        gate = pyro.sample("gate", dist.Beta(2.0, 2.0))
        beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        rate = (beta[0] + beta[1] * x).exp()
        with pyro.plate("row", len(x)):
            with poutine.mask(mask=counts < 4):
                pyro.sample("count", dist.ZeroInflatedPoisson(rate, gate=gate), obs=counts)
            with poutine.mask(mask=counts >= 4):
                cdf = torch.stack([dist.Poisson(rate).log_prob(counts.new_tensor(float(k))) for k in range(4)])
                pyro.factor("many", (1 - cdf.exp().sum(0)).clamp(min=1e-6).log())

    return Case(model, AutoMultivariateNormal(model), [(x, counts)])


@case
def subsampled_rows() -> Case:
    """Logistic regression on fresh subsamples of a plate, latents within it; EasyGuide with amortized locals"""
    x = torch.randn(200, 3)
    y = dist.Bernoulli(logits=x.sum(-1)).sample()

    def model(x: Tensor, y: Tensor) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("row", len(y), subsample_size=20) as index:
            noise = pyro.sample("noise", dist.Normal(0.0, 0.5))
            pyro.sample("y", dist.Bernoulli(logits=x[index] @ weight + noise), obs=y[index])

    class Guide(EasyGuide):
        def __init__(self) -> None:
            super().__init__(model)
            self.shift = nn.Linear(4, 1)

        def guide(self, x: Tensor, y: Tensor) -> None:
            group = self.group(match="weight")
            loc = pyro.param("loc", torch.zeros(group.event_shape))
            tril = pyro.param("tril", torch.eye(3), constraint=constraints.lower_cholesky)
            group.sample("joint", dist.MultivariateNormal(loc, scale_tril=tril))
            with self.plate("row", len(y), subsample_size=20) as index:
                inputs = torch.cat([x[index], y[index, None]], -1)
                pyro.sample("noise", dist.Normal(self.shift(inputs).squeeze(-1), 0.4))

    return Case(model, Guide(), [(x, y)])


@case
def mini_batches() -> Case:
    """Logistic regression, the batch an argument, the last one smaller; AutoNormal"""
    x = torch.randn(90, 5)
    y = dist.Bernoulli(logits=x.sum(-1)).sample()

    def model(x: Tensor, y: Tensor) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(5), 1.0).to_event(1))
        with pyro.plate("row", 90, subsample=x):
            pyro.sample("y", dist.Bernoulli(logits=x @ weight), obs=y)

    return Case(model, AutoNormal(model), list(zip(x.split(40), y.split(40), strict=True)))


# ----------------------------------------------------------------------------------------------------------------------
# Gaussian processes and covariances


@case
def gaussian_process() -> Case:
    """Marginal likelihood through the Cholesky factor of a kernel; AutoMultivariateNormal"""
    x = torch.linspace(0, 4, 25)
    y = (2 * x).sin() + 0.2 * torch.randn(25)

    def model(x: Tensor, y: Tensor) -> None:
        length = pyro.sample("length", dist.LogNormal(0.0, 0.5))
        height = pyro.sample("height", dist.LogNormal(0.0, 0.5))
        noise = pyro.sample("noise", dist.LogNormal(-1.0, 0.5))
        kernel = height * torch.exp(-0.5 * ((x[:, None] - x) / length) ** 2)
        tril = torch.linalg.cholesky(kernel + (noise**2 + 1e-4) * torch.eye(len(x)))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), scale_tril=tril), obs=y)

    return Case(model, AutoMultivariateNormal(model), [(x, y)])


@case
def sparse_gaussian_process() -> Case:
    """pyro.contrib.gp: VariationalSparseGP with a Binary likelihood"""
    x = torch.linspace(-2, 2, 40)
    y = (x > 0.3).to(x)
    kernel = gp.kernels.RBF(input_dim=1, lengthscale=torch.tensor(1.0))
    module = gp.models.VariationalSparseGP(
        x, y, kernel, Xu=torch.linspace(-2, 2, 7), likelihood=gp.likelihoods.Binary(), whiten=True, jitter=1e-4
    )
    return Case(module.model, module.guide, [()], TraceMeanField_ELBO)


@case
def lkj_covariance() -> Case:
    """Correlations with an LKJ prior; AutoMultivariateNormal"""
    return Case(_correlated, AutoMultivariateNormal(_correlated), [(_observations(),)])


@case
def lkj_autoregressive_flow() -> Case:
    """The same; AutoIAFNormal"""
    return Case(_correlated, AutoIAFNormal(_correlated, hidden_dim=[12], num_transforms=2), [(_observations(),)])


def _observations() -> Tensor:
    return torch.randn(50, 3) @ torch.tensor([[1.0, 0.6, 0.0], [0.0, 1.0, -0.4], [0.0, 0.0, 1.0]])


def _correlated(x: Tensor) -> None:
    scale = pyro.sample("scale", dist.HalfNormal(torch.ones(3)).to_event(1))
    corr = pyro.sample("corr", dist.LKJCholesky(3, torch.tensor(1.5)))
    with pyro.plate("row", len(x)):
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(3), scale_tril=scale.unsqueeze(-1) * corr), obs=x)


# ----------------------------------------------------------------------------------------------------------------------
# Flows


@case
def spline_flow_guide() -> Case:
    """A banana; AutoNormalizingFlow of autoregressive splines"""

    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a**2, 0.5))
        pyro.sample("x", dist.Normal(a + b, 0.7), obs=torch.tensor(2.0))

    def flow(size: int) -> Any:
        return T.spline_autoregressive(size, hidden_dims=[8], count_bins=4)

    return Case(model, AutoNormalizingFlow(model, flow), [()])


@case
def flow_density() -> Case:
    """A density without latents: affine coupling and a spline, trained by SVI with an empty guide"""
    x = torch.randn(100, 2)
    x = torch.stack([x[:, 0], x[:, 0] ** 2 + 0.3 * x[:, 1]], -1)
    flows: list[Any] = [
        T.affine_coupling(2, hidden_dims=[8]),
        T.permute(2, torch.tensor([1, 0])),
        T.spline_coupling(2, 1, [8], 4),
    ]

    def model(x: Tensor) -> None:
        for i in (0, 2):
            pyro.module(f"flow_{i}", flows[i])
        with pyro.plate("row", len(x)):
            flow = dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), flows)
            flow.clear_cache()  # of the last step's parameters
            pyro.sample("x", flow, obs=x)

    # at a rate of 0.01 rounding errors grow tenfold every 15 steps, between two eager trainings too
    return Case(model, lambda x: None, [(x,)], optim=lambda: pyro.optim.Adam({"lr": 1e-3}))  # type: ignore[attr-defined]


# ----------------------------------------------------------------------------------------------------------------------
# Time


def _walk(count: int) -> Tensor:
    return (0.3 * torch.randn(count)).cumsum(0) + 0.2 * torch.randn(count)


@case
def local_level() -> Case:
    """A state at each time, in a Python loop; AutoLowRankMultivariateNormal"""

    def model(y: Tensor) -> None:
        drift = pyro.sample("drift", dist.LogNormal(-1.0, 0.5))
        state = torch.zeros(())
        for t in pyro.markov(range(len(y))):
            state = pyro.sample(f"state_{t}", dist.Normal(state, drift))
            pyro.sample(f"y_{t}", dist.Normal(state, 0.2), obs=y[t])

    return Case(model, AutoLowRankMultivariateNormal(model, init_scale=0.1), [(_walk(12),)])


@case
def kalman_filter() -> Case:
    """GaussianHMM, states integrated out by a parallel scan; AutoNormal"""

    def model(y: Tensor) -> None:
        drift = pyro.sample("drift", dist.LogNormal(-1.0, 0.5))
        noise = pyro.sample("noise", dist.LogNormal(-1.0, 0.5))
        eye = torch.eye(1)
        hmm = dist.GaussianHMM(
            dist.Normal(torch.zeros(1), 1.0).to_event(1),
            eye,
            dist.Normal(torch.zeros(1), drift).to_event(1),
            eye,
            dist.Normal(torch.zeros(1), noise).to_event(1),
            duration=len(y),
        )
        pyro.sample("y", hmm, obs=y)

    return Case(model, AutoNormal(model), [(_walk(16)[:, None],)])


@case
def stochastic_volatility() -> Case:
    """Stable noise by StableReparam, volatility by cumulative sums; AutoDiagonalNormal"""
    y = 0.1 * torch.randn(20) * _walk(20).exp()

    def volatile(y: Tensor) -> None:
        drift = pyro.sample("drift", dist.LogNormal(-2.0, 0.5))
        skew = pyro.sample("skew", dist.Uniform(-1.0, 1.0))
        with pyro.plate("time", len(y)):
            step = pyro.sample("step", dist.Normal(0.0, 1.0))
            scale = (drift * step.cumsum(-1) - 2.0).exp()
            pyro.sample("y", dist.Stable(1.8, skew, scale, 0.0), obs=y)

    model = poutine.reparam(volatile, {"y": StableReparam()})
    return Case(model, AutoDiagonalNormal(model, init_scale=0.01), [(y,)])


@case
def deep_markov_model() -> Case:
    """Gated transitions, a GRU that reads the future, masked sequences; amortized guide"""
    size, hidden, batch, times = 2, 6, 5, 4
    x = (torch.rand(batch, times, 3) < 0.4).to(torch.get_default_dtype())
    lengths = torch.tensor([4, 4, 3, 2, 1])
    gate, propose = nn.Sequential(nn.Linear(size, size), nn.Sigmoid()), nn.Linear(size, size)
    emit, combine = nn.Linear(size, 3), nn.Linear(size + hidden, 2 * size)
    rnn = nn.GRU(3, hidden, batch_first=True)
    modules = nn.ModuleDict({"gate": gate, "propose": propose, "emit": emit})
    readers = nn.ModuleDict({"combine": combine, "rnn": rnn})

    def model(x: Tensor, lengths: Tensor, annealing: float) -> None:
        pyro.module("dmm", modules)
        z: Any = pyro.param("start", torch.zeros(size)).expand(batch, size)
        with pyro.plate("sequence", batch):
            for t in pyro.markov(range(times)):
                opened = gate(z)
                loc = opened * propose(z) + (1 - opened) * z
                live = t < lengths
                with poutine.scale(scale=annealing):
                    z = pyro.sample(f"z_{t}", dist.Normal(loc, 0.5).mask(live[:, None]).to_event(1))
                pyro.sample(f"x_{t}", dist.Bernoulli(logits=emit(z)).mask(live[:, None]).to_event(1), obs=x[:, t])

    def guide(x: Tensor, lengths: Tensor, annealing: float) -> None:
        pyro.module("readers", readers)
        future = rnn(x.flip(1))[0].flip(1)
        z = torch.zeros(batch, size)
        with pyro.plate("sequence", batch):
            for t in pyro.markov(range(times)):
                loc, log_scale = combine(torch.cat([z, future[:, t]], -1)).chunk(2, -1)
                live = t < lengths
                with poutine.scale(scale=annealing):
                    z = pyro.sample(f"z_{t}", dist.Normal(loc, log_scale.exp()).mask(live[:, None]).to_event(1))

    optim = {"lr": 0.01, "betas": (0.96, 0.999), "clip_norm": 10.0, "lrd": 0.9999}
    return Case(model, guide, [(x, lengths, 0.5)], optim=lambda: pyro.optim.ClippedAdam(optim))


@case
def hmm_enumerated() -> Case:
    """Discrete states summed out by TraceEnum_ELBO: to be refused"""

    @config_enumerate
    def model(y: Tensor) -> None:
        matrix = pyro.sample("matrix", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
        loc = pyro.sample("loc", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
        state: Any = 0
        for t in pyro.markov(range(len(y))):
            state = pyro.sample(f"state_{t}", dist.Categorical(matrix[state]))
            pyro.sample(f"y_{t}", dist.Normal(loc[state], 0.5), obs=y[t])

    guide = AutoDelta(poutine.block(model, expose=["matrix", "loc"]))
    return Case(model, guide, [(_walk(5),)], lambda: TraceEnum_ELBO(max_plate_nesting=0))


@case
def hmm_forward() -> Case:
    """DiscreteHMM, states summed out by the distribution; AutoGuideList of AutoDelta and AutoNormal"""

    def model(y: Tensor) -> None:
        matrix = pyro.sample("matrix", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
        loc = pyro.sample("loc", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
        start = torch.full((2,), 0.5).log()
        pyro.sample("y", dist.DiscreteHMM(start, matrix.log(), dist.Normal(loc, 0.5), duration=len(y)), obs=y)

    guide = AutoGuideList(model)
    guide.append(AutoDelta(poutine.block(model, expose=["matrix"])))
    guide.append(AutoNormal(poutine.block(model, expose=["loc"])))
    return Case(model, guide, [(_walk(10),)])


# ----------------------------------------------------------------------------------------------------------------------
# Mixtures, topics and discrete latents


def _clusters() -> tuple[Tensor]:
    return (torch.randn(60) * 0.5 + torch.tensor([-2.0, 0.0, 2.0])[torch.arange(60) % 3],)


def _mixture(x: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.full((3,), 2.0)))
    loc = pyro.sample("loc", dist.Normal(torch.tensor([-1.0, 0.0, 1.0]), 2.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("row", len(x)):
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(loc, scale)), obs=x)


@case
def mixture_marginalized() -> Case:
    """Mixture with its component summed out; AutoNormal"""
    return Case(_mixture, AutoNormal(_mixture), [_clusters()])


@case
def mixture_dirichlet_guide() -> Case:
    """The same; hand-written guide with a Dirichlet (implicit gradients)"""

    def guide(x: Tensor) -> None:
        counts = pyro.param("counts", torch.full((3,), 5.0), constraint=constraints.positive)
        pyro.sample("weights", dist.Dirichlet(counts))
        at, width = pyro.param("at", torch.tensor([-1.0, 0.0, 1.0])), pyro.param("width", torch.tensor(-2.0))
        pyro.sample("loc", dist.Normal(at, width.exp()).to_event(1))
        pyro.sample("scale", dist.LogNormal(pyro.param("log_scale", torch.tensor(0.0)), 0.1))

    return Case(_mixture, guide, [_clusters()], optim=lambda: pyro.optim.AdamW({"lr": 0.01}))  # type: ignore[attr-defined]


@case
def stick_breaking() -> Case:
    """Truncated Dirichlet process: Beta sticks, weights by cumulative products; AutoNormal"""

    def model(x: Tensor) -> None:
        with pyro.plate("stick", 4):
            part = pyro.sample("part", dist.Beta(1.0, 2.0))
        with pyro.plate("component", 5):
            loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
        rest = torch.nn.functional.pad((1 - part).cumprod(-1), (1, 0), value=1.0)
        weights = torch.nn.functional.pad(part, (0, 1), value=1.0) * rest
        with pyro.plate("row", len(x)):
            pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(loc, 0.6)), obs=x)

    return Case(model, AutoNormal(model), [_clusters()])


@case
def sparse_gamma() -> Case:
    """Two layers of gammas over Poisson counts; hand-written gamma guide (implicit gradients)"""
    x = dist.Poisson(torch.full((10, 6), 2.0)).sample()

    def model(x: Tensor) -> None:
        with pyro.plate("top", 2 * 3):
            top = pyro.sample("w_top", dist.Gamma(0.5, 0.3)).reshape(2, 3)
        with pyro.plate("bottom", 3 * 6):
            bottom = pyro.sample("w_bottom", dist.Gamma(0.5, 0.3)).reshape(3, 6)
        with pyro.plate("row", len(x)):
            z = pyro.sample("z_top", dist.Gamma(0.5, 0.5).expand([2]).to_event(1))
            z = pyro.sample("z_bottom", dist.Gamma(0.5, 0.5 / (z @ top + 1e-3)).to_event(1))
            pyro.sample("x", dist.Poisson(z @ bottom + 1e-3).to_event(1), obs=x)

    def gamma(name: str, *shape: int) -> Any:
        shape_, mean = (pyro.param(f"{name}_{what}", torch.zeros(shape)) for what in ("shape", "mean"))
        shape_, mean = (nn.functional.softplus(p) + 0.1 for p in (shape_, mean))
        return dist.Gamma(shape_, shape_ / mean)

    def guide(x: Tensor) -> None:
        for name, size in (("top", 2 * 3), ("bottom", 3 * 6)):
            with pyro.plate(name, size):
                pyro.sample(f"w_{name}", gamma(f"w_{name}", size))
        with pyro.plate("row", len(x)):
            for name, size in (("z_top", 2), ("z_bottom", 3)):
                pyro.sample(name, gamma(name, len(x), size).to_event(1))

    return Case(model, guide, [(x,)])


@case
def topics_subsampled() -> Case:
    """Topics with words summed out, documents subsampled; guide by a network, Dirichlet draws"""
    counts = dist.Multinomial(20, torch.ones(8)).sample((30,))
    net = nn.Sequential(nn.Linear(8, 10), nn.Sigmoid(), nn.Linear(10, 3))

    def model(counts: Tensor) -> None:
        with pyro.plate("topic", 3):
            words = pyro.sample("words", dist.Dirichlet(torch.ones(8)))
        with pyro.plate("document", len(counts), subsample_size=10) as index:
            share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
            log_p = (share @ words).log()
            pyro.sample("counts", dist.Multinomial(20, logits=log_p, validate_args=False), obs=counts[index])

    def guide(counts: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("topic", 3):
            pyro.sample(
                "words",
                dist.Dirichlet(pyro.param("words_at", lambda: torch.rand(3, 8) + 0.5, constraint=constraints.positive)),
            )
        with pyro.plate("document", len(counts), subsample_size=10) as index:
            pyro.sample("share", dist.Dirichlet(net(counts[index]).exp()))

    return Case(model, guide, [(counts,)])


@case
def topics_network() -> Case:
    """Topics by a network with dropout and batch normalization in training mode (ProdLDA)"""
    counts = dist.Multinomial(20, torch.ones(8)).sample((30,))
    encoder = nn.Sequential(nn.Linear(8, 10), nn.Softplus(), nn.Dropout(0.2), nn.Linear(10, 6), nn.BatchNorm1d(6))
    decoder = nn.Sequential(nn.Dropout(0.1), nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8, affine=False))

    def model(counts: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("document", len(counts)):
            share = pyro.sample("share", dist.Normal(torch.zeros(3), 1.0).to_event(1)).softmax(-1)
            pyro.sample("counts", dist.Multinomial(20, logits=decoder(share), validate_args=False), obs=counts)

    def guide(counts: Tensor) -> None:
        pyro.module("encoder", encoder)
        loc, log_scale = encoder(counts).chunk(2, -1)
        with pyro.plate("document", len(counts)):
            pyro.sample("share", dist.Normal(loc, (0.5 * log_scale).exp()).to_event(1))

    return Case(model, guide, [(counts,)], TraceMeanField_ELBO)


def _switches() -> tuple[Program, Program, tuple[Tensor]]:
    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(1.0, 1.0))
        with pyro.plate("row", len(x)):
            on = pyro.sample("on", dist.Bernoulli(0.4))
            kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
            pyro.sample("x", dist.Normal(on * loc + 0.3 * kind, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("loc", dist.Normal(pyro.param("at", torch.tensor(1.0)), 0.2))
        with pyro.plate("row", len(x)):
            pyro.sample("on", dist.Bernoulli(logits=pyro.param("logits", torch.zeros(len(x)))))
            pyro.sample("kind", dist.Categorical(logits=pyro.param("kinds", torch.zeros(len(x), 3))))

    return model, guide, (torch.randn(10) + 1,)


@case
def discrete_score_function() -> Case:
    """Bernoulli and Categorical latents drawn by the guide; score-function gradients of Trace_ELBO"""
    model, guide, data = _switches()
    return Case(model, guide, [data], lambda: Trace_ELBO(num_particles=2))


@case
def discrete_rao_blackwell() -> Case:
    """The same with TraceGraph_ELBO: to be refused"""
    model, guide, data = _switches()
    return Case(model, guide, [data], TraceGraph_ELBO)


# ----------------------------------------------------------------------------------------------------------------------
# Amortized guides


def _pixels() -> Tensor:
    return (torch.rand(32, 20) < 0.3).to(torch.get_default_dtype())


@case
def autoencoder() -> Case:
    """VAE, mini-batches of one shape in turn; amortized guide, TraceMeanField_ELBO"""
    encoder = nn.Sequential(nn.Linear(20, 16), nn.Softplus(), nn.Linear(16, 6))
    decoder = nn.Sequential(nn.Linear(3, 16), nn.Softplus(), nn.Linear(16, 20))

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        loc, log_scale = encoder(x).chunk(2, -1)
        with pyro.plate("row", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return Case(model, guide, [(batch,) for batch in _pixels().split(16)], TraceMeanField_ELBO)


@case
def autoencoder_conditional_flow() -> Case:
    """VAE with convolutions and a conditional flow as the guide"""
    encoder = nn.Sequential(nn.Unflatten(1, (1, 20)), nn.Conv1d(1, 2, 5), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten())
    head, flow = nn.Linear(16, 4), T.conditional_affine_coupling(2, 4, hidden_dims=[8])
    decoder = nn.Linear(2, 20)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        for name, module in (("encoder", encoder), ("head", head), ("flow", flow)):
            pyro.module(name, module)
        context = head(encoder(x))
        base = dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1)
        with pyro.plate("row", len(x)):
            pyro.sample("z", dist.ConditionalTransformedDistribution(base, [flow]).condition(context))

    return Case(model, guide, [(_pixels(),)])


@case
def transformed_latents() -> Case:
    """TransformReparam of a LogNormal field, AutoDelta: maximum a posteriori, SGD with momentum"""

    def field(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            base = dist.Normal(loc, 1.0)
            rate = pyro.sample("rate", dist.TransformedDistribution(base, [T.ExpTransform()]))
            pyro.sample("y", dist.Poisson(rate), obs=y)

    model = poutine.reparam(field, {"rate": TransformReparam()})
    y = dist.Poisson(torch.full((12,), 3.0)).sample()
    optim = {"lr": 1e-3, "momentum": 0.9}
    return Case(model, AutoDelta(model), [(y,)], optim=lambda: pyro.optim.SGD(optim))  # type: ignore[attr-defined]


@case
def attend_infer_repeat() -> Case:
    """The number of sites depends on a draw: to be refused"""

    def model(x: Tensor) -> None:
        total = torch.zeros(())
        for i in range(3):
            if pyro.sample(f"more_{i}", dist.Bernoulli(0.6)).item() == 0:
                break
            total = total + pyro.sample(f"part_{i}", dist.Normal(1.0, 1.0))
        pyro.sample("x", dist.Normal(total, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        for i in range(3):
            if pyro.sample(f"more_{i}", dist.Bernoulli(logits=pyro.param(f"logit_{i}", torch.zeros(())))).item() == 0:
                break
            pyro.sample(f"part_{i}", dist.Normal(pyro.param(f"loc_{i}", torch.ones(())), 0.5))

    return Case(model, guide, [(torch.tensor(2.0),)])


# ----------------------------------------------------------------------------------------------------------------------
# Measuring

TOLERANCE = 1e-6  # relative, in float64, after all steps
LEAST_P = 1e-4  # of each of some thirty models


class Training:
    """One way to train a case, with a param store of its own, so that several can take turns."""

    def __init__(self, build: Callable[[], Case], **options: Any) -> None:
        self._store: Any = {"params": {}, "constraints": {}}
        pyro.set_rng_seed(0)
        with pyro.get_param_store().scope(self._store) as self._store:
            self.case = build()
            pyro.set_rng_seed(1)
            make: Any = CompiledSVI if options else SVI
            args = (self.case.model, self.case.guide, self.case.optim(), self.case.loss())
            self.svi = make(*args, **options.get("compiled", {}))
        self.losses: list[float] = []
        self.take(1)  # what a guide draws when it is made, such as a flow's permutations, comes from the seed too

    def take(self, steps: int) -> list[float]:
        """Take steps; return the seconds of each."""
        batches, seconds = self.case.batches, []
        with pyro.get_param_store().scope(self._store) as self._store:
            for _ in range(steps):
                start = time.perf_counter()
                self.losses.append(self.svi.step(*batches[len(self.losses) % len(batches)]))
                seconds.append(time.perf_counter() - start)
        return seconds

    def state(self) -> dict[str, Tensor]:
        """Parameters and the buffers of modules."""
        found = {name: p.detach() for name, p in self._store["params"].items()}
        for path, module in modules_of({"model": self.case.model, "guide": self.case.guide}):
            found |= {f"buffer {path}.{name}": buffer for name, buffer in module.named_buffers()}
        return found


def difference(ours: Training, theirs: Training) -> tuple[float, str]:
    """The largest relative difference in losses, parameters and buffers, and where it is."""
    worst = (0.0, "nothing")
    pairs = {"losses": (torch.tensor(ours.losses), torch.tensor(theirs.losses))}
    a, b = ours.state(), theirs.state()
    if a.keys() != b.keys():
        return math.inf, f"names: {sorted(a.keys() ^ b.keys())}"
    pairs |= {name: (a[name], b[name]) for name in b}
    for name, (one, other) in pairs.items():
        if one.numel():
            one, other = one.double(), other.double()
            size = float(((one - other).abs() / (1 + other.abs())).max())
            worst = max(worst, (size if size == size else math.inf, name))
    return worst


def p_value(ours: Training, theirs: Training, cycles: int) -> float:
    """Of equal distributions of the losses, summed over batches, at the parameters that compiled training has found."""
    with torch.no_grad():
        for name, p in theirs._store["params"].items():
            p.copy_(ours._store["params"][name])
    sums = []
    for training in (ours, theirs):
        for optimizer in training.svi.optim.optim_objs.values():
            for group in getattr(optimizer, "optimizer", optimizer).param_groups:
                group["lr"] = 0.0
        count = len(training.case.batches)
        training.take(-len(training.losses) % count)
        start = len(training.losses)
        training.take(cycles * count)
        sums.append([sum(training.losses[i : i + count]) for i in range(start, start + cycles * count, count)])
    rounding = 1e-5 * abs(statistics.median(sums[1]))
    if max(map(max, sums)) - min(map(min, sums)) <= rounding:  # nothing is drawn: the losses differ by rounding
        return 1.0
    return float(ks_2samp(*sums).pvalue)


class Row(NamedTuple):
    outcome: str
    agreement: str = ""
    ratio: str = ""
    milliseconds: str = ""
    compilation: str = ""


def examine(build: Callable[[], Case], steps: int, blocks: int) -> Row:
    """Train a case in every way and compare."""
    torch.set_default_dtype(torch.float64)
    try:
        theirs = Training(build)
        theirs.take(steps)
        ours = Training(build, compiled={"same_draws": True})
        ours.take(steps)
    except CannotCompile as error:
        return Row(f"refused: {str(error).split('. ')[0].split(': a graph')[0]}")
    finally:
        torch.set_default_dtype(torch.float32)
    worst, where = difference(ours, theirs)
    agreement = f"{worst:.0e}"
    if not worst <= TOLERANCE:
        return Row(f"DIFFERENT: {where}", agreement)

    theirs, ours = Training(build), Training(build, compiled={})
    for training in (theirs, ours):
        training.take(4 * len(training.case.batches))
    seconds: tuple[list[float], list[float]] = [], []
    for _ in range(blocks):
        for training, taken in zip((theirs, ours), seconds, strict=True):
            taken += training.take(max(5, steps // blocks))
    eager, compiled = (sorted(taken)[len(taken) // 10] for taken in seconds)
    p = p_value(ours, theirs, steps // len(ours.case.batches))
    reason = ours.svi.eager_reason or ours.svi.optimizer_reason
    return Row(
        (f"DIFFERENT: losses, p = {p:.1e}" if p < LEAST_P else "same") + (f" ({reason})" if reason else ""),
        f"{agreement}; p = {p:.2f}",
        f"{eager / compiled:.1f}",
        f"{1e3 * compiled:.3f}",
        f"{ours.svi.compile_time:.1f}",
    )


def main() -> int:
    """Examine the chosen cases and print a table."""
    parser = argparse.ArgumentParser(description="Models trained by pyro.infer.SVI and by CompiledSVI.")
    parser.add_argument("--only", nargs="+", choices=CASES, help="these models alone")
    parser.add_argument("--steps", type=int, default=300, help="steps of each training (default: 300)")
    parser.add_argument("--blocks", type=int, default=10, help="blocks of the timing (default: 10)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, Pyro {pyro.__version__}, one thread\n\n"
        "| model | what | outcome | float64, same draws; float32 | times as fast | ms | compilation s |\n"
        "|---|---|---|---|---|---|---|",
        flush=True,
    )
    outcomes = []
    for name, build in CASES.items():
        if arguments.only and name not in arguments.only:
            continue
        with pyro.validation_enabled(False):
            try:
                row = examine(build, arguments.steps, arguments.blocks)
            except Exception as error:  # the table goes on, and the run fails
                row = Row(f"DIFFERENT: {type(error).__name__}: {str(error).strip().splitlines()[-1][:150]}")
        outcomes.append(row.outcome)
        print(f"| `{name}` | {build.__doc__} | {' | '.join(row)} |", flush=True)
    pyro.clear_param_store()
    counts = [sum(o.startswith(kind) for o in outcomes) for kind in ("same", "refused", "DIFFERENT")]
    print(f"\nsame {counts[0]}, refused {counts[1]}, DIFFERENT {counts[2]}; {time.perf_counter() - start:.0f} s in all")
    return int(counts[2] > 0)


if __name__ == "__main__":
    sys.exit(main())
