"""Models that several test files use; those of a single file stand there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor, nn

# Eight schools (Rubin, 1981): effects of coaching, and their standard errors
Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools(y: Tensor, sigma: Tensor) -> None:
    """Eight schools, centered."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools() -> None:
    """Non-centered, with the data in it and a deterministic site."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("schools", 8):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * z)
        pyro.sample("y", dist.Normal(theta, SIGMA), obs=Y)


def through_origin(x: Tensor) -> None:
    """A line through the origin, with data 2 x."""
    slope = pyro.sample("slope", dist.Normal(x.new_tensor(0.0), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=2 * x)


def nested_plates() -> None:
    """Two plates, a scale, masks in model and data, and a factor."""
    with pyro.plate("rows", 3, dim=-2):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("columns", 4, dim=-1), poutine.scale(scale=2.0):
            b = pyro.sample("b", dist.Normal(a, 1.0).expand([3, 4]).mask(torch.rand(3, 4) < 0.7))
            pyro.sample("x", dist.Normal(b, 1.0), obs=torch.ones(3, 4), obs_mask=torch.arange(12).reshape(3, 4) % 3 > 0)
    pyro.factor("penalty", -a.square().sum())


def vectors() -> None:
    """Latents with events, a simplex among them."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    s = pyro.sample("s", dist.Gamma(2.0, 2.0))
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    c = pyro.sample("c", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
    with pyro.plate("data", 5):
        pyro.sample("x", dist.Normal((w * p).sum() + c.sum(), s), obs=torch.arange(5.0))


class Regression(PyroModule):
    """A linear layer with a prior on its weights and a trained scale."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = PyroModule[nn.Linear](3, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
        self.log_scale = PyroParam(torch.tensor(0.0))

    def forward(self, x: Tensor, y: Tensor) -> None:
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, self.log_scale.exp()), obs=y)


class Encoder(nn.Module):
    """Six pixels to location and scale of two latents."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loc, log_scale = self.net(x).chunk(2, -1)
        return loc, log_scale.exp()


def autoencoder() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Model and guide of binary images of six pixels, with two latents each."""
    encoder, decoder = Encoder(), nn.Linear(2, 6)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(*encoder(x)).to_event(1))

    return model, guide
