"""Log densities on unconstrained space: equal to Pyro's potential, the way to the sites and back, threads, bad inputs."""

from __future__ import annotations

import logging
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor

from pyro_elbo_ext import LogDensity, compiled_log_density

Y = torch.tensor([1.0, -0.5, 2.0, 0.3], dtype=torch.float64)


def supports(y: Tensor) -> None:
    """Sites on the real line, the half line, an interval, the simplex, and ordered and correlation Cholesky spaces."""
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 2.0))
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_ones(())))
    rate = pyro.sample("rate", dist.Uniform(y.new_zeros(()), 2.0))
    weight = pyro.sample("weight", dist.Dirichlet(y.new_ones(3)))
    corr = pyro.sample("corr", dist.LKJCholesky(3, y.new_tensor(2.0)))
    normal = dist.Normal(y.new_zeros(2), 1.0).to_event(1)
    pyro.sample("cut", dist.TransformedDistribution(normal, dist.transforms.OrderedTransform()))
    pyro.deterministic("total", (weight * torch.arange(3.0, dtype=torch.float64)).sum() + rate)
    with pyro.plate("row", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta + corr[1, 0], 1.0), obs=y)


@pytest.fixture(scope="module")
def density() -> LogDensity:
    return compiled_log_density(supports, Y)


@pytest.fixture
def points(density: LogDensity) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(6, density.dim))


def split(density: LogDensity, u: Tensor) -> dict[str, Tensor]:
    return {name: u[at.start : at.stop].reshape(at.shape) for name, at in density.layout.items()}


def test_equals_minus_pyros_potential(density: LogDensity, points: np.ndarray) -> None:
    _, potential, transforms, _ = initialize_model(supports, (Y,))
    assert density.compiled
    for row in points:
        u = torch.tensor(row, requires_grad=True)
        expected = -potential(split(density, u))
        (gradient,) = torch.autograd.grad(expected, u)
        for value, ours in (density.value_and_grad(row), density.value_and_grad(u)):
            torch.testing.assert_close(torch.as_tensor(value, dtype=torch.float64), expected.detach().squeeze())
            torch.testing.assert_close(torch.as_tensor(ours), gradient, rtol=1e-9, atol=1e-9)
        assert density.log_density(row) == density.value_and_grad(row)[0]
        values = density.constrain(u)
        for name, v in split(density, u.detach()).items():
            torch.testing.assert_close(values[name], transforms[name].inv(v))


def test_the_way_to_the_sites_and_back(density: LogDensity, points: np.ndarray) -> None:
    assert set(density.names) == {"mu", "tau", "rate", "weight", "corr", "cut", "total", "theta"}
    assert density.coordinates[:3] == ["mu", "tau", "rate"]
    assert density.coordinates[-1] == "theta[3]"
    assert len(density.coordinates) == density.dim == 1 + 1 + 1 + 2 + 3 + 2 + 4
    for row in points:
        values = density.constrain(row)
        assert all(isinstance(value, np.ndarray) for value in values.values())
        assert values["weight"].sum() == pytest.approx(1)
        assert values["cut"][1] > values["cut"][0]
        assert 0 < values["rate"] < 2
        np.testing.assert_allclose(values["total"], values["weight"] @ np.arange(3.0) + values["rate"])
        np.testing.assert_allclose(density.unconstrain(values), row, rtol=1e-8, atol=1e-8)


def test_batches_equal_single_points(density: LogDensity, points: np.ndarray) -> None:
    batch = points.reshape(2, 3, -1)
    value, gradient = density.value_and_grad(batch)
    values = density.constrain(torch.tensor(batch))
    assert value.shape == (2, 3)
    assert gradient.shape == batch.shape
    assert values["corr"].shape == (2, 3, 3, 3)
    for index in np.ndindex(2, 3):
        np.testing.assert_allclose(value[index], density.log_density(batch[index]))
        np.testing.assert_allclose(gradient[index], density.value_and_grad(batch[index])[1], rtol=1e-9, atol=1e-12)
        for name, single in density.constrain(batch[index]).items():
            np.testing.assert_allclose(values[name][index], single)
    assert density.value_and_grad(batch[:0])[1].shape == (0, 3, density.dim)
    assert density.constrain(batch[:0])["corr"].shape == (0, 3, 3, 3)


@pytest.mark.parametrize("shape", [(), (6,)])
def test_differentiable(density: LogDensity, points: np.ndarray, shape: tuple[int, ...]) -> None:
    u = torch.tensor(points if shape else points[0], requires_grad=True)
    value = density.log_density(u)
    assert value.shape == shape
    (2 * value).sum().backward()
    torch.testing.assert_close(u.grad, 2 * density.value_and_grad(u)[1])


def test_float32_points_are_widened(density: LogDensity, points: np.ndarray) -> None:
    u = torch.tensor(points[0], dtype=torch.float32)
    value, gradient = density.value_and_grad(u)
    assert value.dtype == gradient.dtype == torch.float64
    torch.testing.assert_close(value, density.value_and_grad(u.double())[0])


@pytest.fixture(scope="module")
def regression() -> LogDensity:
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))

    def model() -> None:
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), scale).to_event(1))
        with pyro.plate("row", 50):
            pyro.sample("y", dist.Bernoulli(logits=x @ weight), obs=(x[:, 0] > 0).float())

    return compiled_log_density(model)


def test_c_function_has_the_bits_of_the_compiled_graph(regression: LogDensity) -> None:
    assert regression.native is not None
    for row in np.random.default_rng(0).normal(size=(6, 4)):
        value, gradient = regression._value_and_grad(torch.from_numpy(row))
        ours = regression.native(row)
        assert ours[0] == value.item()
        np.testing.assert_array_equal(ours[1], gradient)
    with pytest.raises(ValueError, match=r"points of shape \(4,\)"):
        regression.native(np.zeros(3))


@pytest.mark.parametrize("name", ["density", "regression"])
def test_threads_do_not_share_memory(name: str, request: pytest.FixtureRequest) -> None:
    shared: LogDensity = request.getfixturevalue(name)
    rows = np.random.default_rng(1).normal(size=(400, shared.dim))
    alone = [shared.value_and_grad(row) for row in rows]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(shared.value_and_grad, rows))
    for one, other in zip(alone, together, strict=True):
        assert one[0] == other[0]
        np.testing.assert_array_equal(one[1], other[1])


def test_graph_with_a_factorization_has_no_c_function(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="pyro_elbo_ext")

    def model() -> None:
        zero, eye = Y.new_zeros(2), torch.eye(2, dtype=torch.float64)
        rho = pyro.sample("rho", dist.Normal(zero[0], 1.0))
        covariance = eye + rho * (1 - eye)
        pyro.sample("y", dist.MultivariateNormal(zero, covariance), obs=zero)

    density = compiled_log_density(model)
    assert density.compiled
    assert density.native is None
    assert "the log density is called through Python: ['it calls " in caplog.text
    value, _ = density.value_and_grad(np.array([[0.5], [1.5]]))  # the second covariance is not positive definite
    np.testing.assert_allclose(value, [-1.5 * math.log(2 * math.pi) - 0.125 - 0.5 * math.log(0.75), -math.inf])


def test_eager_model_has_the_same_interface() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("f", x if x > 0 else 3 * x)

    density = compiled_log_density(model)
    assert not density.compiled
    np.testing.assert_allclose(density.value_and_grad(np.array([[0.5], [-0.5]]))[1], [[0.5], [3.5]])
    np.testing.assert_allclose(density.constrain(np.array([[0.5], [-0.5]]))["x"], [0.5, -0.5])


def test_nothing_global_is_changed() -> None:
    pyro.clear_param_store()
    torch.manual_seed(7)
    before = torch.get_rng_state()

    def model() -> None:
        pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(2.0)), 1.0))

    density = compiled_log_density(model)
    density.unconstrain({"x": 1.0})
    density.value_and_grad(np.zeros(1))
    assert torch.equal(before, torch.get_rng_state())
    assert not list(pyro.get_param_store().keys())
    assert density.compile_time > 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mu": 0.0}, "values lack the sites \\['tau'"),
        ({"nu": 0.0}, "values lack the sites"),
        ({"mu": [0.0, 1.0]}, "values for 'mu' has shape \\(2,\\)"),
        ({"extra": 0.0}, "values names 'extra'"),
    ],
)
def test_bad_values(density: LogDensity, points: np.ndarray, values: dict[str, Any], message: str) -> None:
    full = density.constrain(points[0])
    with pytest.raises(ValueError, match=message):
        density.unconstrain(values if "lack" in message else full | values)


def test_bad_points(density: LogDensity) -> None:
    with pytest.raises(ValueError, match=r"points have shape \(\*batch, 14\)"):
        density.value_and_grad(np.zeros(3))
    with pytest.raises(TypeError, match="model must be callable"):
        compiled_log_density("model")  # type: ignore[arg-type]
