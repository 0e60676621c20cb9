"""Compiled programs with masks as indices, and draws of Bernoulli variables."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, AutoNormalizingFlow
from torch import Tensor

from pyro_elbo_ext import CompiledSVI
from pyro_elbo_ext.compile import CannotCompile
from tests.test_compile import assert_equal, compare, train

X = torch.linspace(-2, 2, 12).reshape(4, 3).sin()
OBSERVED = X > 0
GROUP = torch.tensor([0, 1, 2, 1, 0])


def correlated(x: Tensor) -> None:
    corr = pyro.sample("corr", dist.LKJCholesky(3, torch.tensor(1.5)))
    with pyro.plate("row", len(x)):
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(3), scale_tril=corr), obs=x)


def banana() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 3.0))
    b = pyro.sample("b", dist.Normal(a**2, 0.5))
    pyro.sample("x", dist.Normal(a + b, 0.7), obs=torch.tensor(2.0))


def assigns(x: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    mean = (x * w).clone()
    low = mean < 0
    mean[low] = 0.1
    high = mean > 0.5
    mean[high] = (w * x)[high] ** 1  # not what the mask took, but computed from it
    with pyro.plate("row", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)


def constant_masks(x: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(4, 3), 1.0).to_event(2))
    even = torch.arange(4) % 2 == 0
    rows = torch.ones(4).nonzero().squeeze(-1)
    with pyro.plate("row", 2):
        pyro.sample("x", dist.Normal(w[rows][even], 1.0).to_event(1), obs=x[even])


def written_mask(x: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    keep = torch.zeros(3, dtype=torch.bool)
    keep[1] = True
    pyro.sample("x", dist.Normal(w[keep], 1.0).to_event(1), obs=x[0, :1])


def by_data(x: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    mean = (x * w)[OBSERVED]
    with pyro.plate("row", len(mean)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x[OBSERVED])


def by_value(x: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.factor("sum", w.masked_select(w > 0).sum())


def closure_index() -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("row", 5):
        pyro.sample("x", dist.Normal(w[GROUP], 1.0), obs=X.reshape(-1)[:5])


def spline(size: int) -> Any:
    return T.spline_autoregressive(size, hidden_dims=[8], count_bins=4)


def test_triangles_and_other_constant_masks() -> None:
    compare(correlated, lambda: AutoMultivariateNormal(correlated), (X,))
    compare(constant_masks, lambda: AutoNormal(constant_masks), (X,))
    compare(closure_index, lambda: AutoNormal(closure_index), ())


def test_splines() -> None:
    # some draws are outside of the spline's bounds, some are not
    compare(banana, lambda: AutoNormalizingFlow(banana, spline), (), steps=40, tolerance=1e-5)


@pytest.mark.parametrize("model", [assigns, written_mask, by_data, by_value])
def test_sizes_that_depend_on_values_are_refused(model: Any) -> None:
    with pytest.raises(CannotCompile, match="how many elements"):
        train(
            lambda *args: CompiledSVI(*args, backend="eager"), model, AutoNormal(model, init_scale=1.0), (X,), steps=2
        )


@pytest.mark.slow
def test_machine_code_has_the_same_draws() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("row", len(x)):
            on = pyro.sample("on", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(on, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("row", len(x)):
            pyro.sample("on", dist.Bernoulli(logits=pyro.param("logits", torch.zeros(len(x)))))

    theirs = train(SVI, model, guide, (X[:, 0],))
    ours = train(lambda *a: CompiledSVI(*a, same_draws=True), model, guide, (X[:, 0],))
    assert_equal(ours, theirs, 1e-5)
