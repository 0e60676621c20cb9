"""Models with guides and data for the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from tests.models import SIGMA, Y


class Problem(NamedTuple):
    """A model with its guide and data, built for each objective; ``steps`` is the default length of a block."""

    build: Callable[[], tuple[Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]]
    steps: int


def eight_schools() -> tuple[Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]:
    """Eight schools (Rubin, 1981), non-centered, with AutoNormal."""

    def model(effect: Tensor, error: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("school", 8):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * theta, error), obs=effect)

    return model, AutoNormal(model), (Y, SIGMA)


def logistic_regression() -> tuple[Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]:
    """Logistic regression with 1000 rows and 20 predictors, with AutoNormal."""
    x = torch.randn(1000, 20)
    y = dist.Bernoulli(logits=x @ torch.randn(20)).sample()

    def model(x: Tensor, y: Tensor) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(20), 1.0).to_event(1))
        bias = pyro.sample("bias", dist.Normal(0.0, 5.0))
        with pyro.plate("row", 1000):
            pyro.sample("y", dist.Bernoulli(logits=x @ weight + bias), obs=y)

    return model, AutoNormal(model), (x, y)


def fifty_sites() -> tuple[Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]:
    """Fifty scalar latents, each a site of its own, with AutoNormal."""
    y = torch.randn(50)

    def model(y: Tensor) -> None:
        z = [pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0)) for i in range(50)]
        with pyro.plate("row", 50):
            pyro.sample("y", dist.Normal(torch.stack(z), 1.0), obs=y)

    return model, AutoNormal(model), (y,)


class Encoder(nn.Module):
    """784 pixels to the location and scale of 50 latents."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(784, 400)
        self.loc = nn.Linear(400, 50)
        self.log_scale = nn.Linear(400, 50)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return location and scale, each of shape (batch, 50)."""
        hidden = nn.functional.softplus(self.hidden(x))
        return self.loc(hidden), self.log_scale(hidden).exp()


def decoder() -> nn.Sequential:
    """50 latents to the logits of 784 pixels."""
    return nn.Sequential(nn.Linear(50, 400), nn.Softplus(), nn.Linear(400, 784))


def images(batch: int) -> Tensor:
    """Random binary images, shape ``(batch, 784)``."""
    return torch.bernoulli(torch.full((batch, 784), 0.3))


def vae(batch: int = 256) -> tuple[Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]:
    """A variational autoencoder 784-400-50 on a batch of random binary images (Kingma and Welling, 2014)."""
    encode, decode = Encoder(), decoder()

    def model(x: Tensor) -> None:
        pyro.module("decoder", decode)
        with pyro.plate("image", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 50), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decode(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encode)
        with pyro.plate("image", len(x)):
            pyro.sample("z", dist.Normal(*encode(x)).to_event(1))

    return model, guide, (images(batch),)


PROBLEMS = {
    "eight_schools": Problem(eight_schools, 40),
    "logistic_regression": Problem(logistic_regression, 40),
    "fifty_sites": Problem(fifty_sites, 5),
    "vae": Problem(vae, 5),
}
