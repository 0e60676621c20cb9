"""Log densities on unconstrained space: equal to Pyro's potential, the way to the sites and back, threads, bad inputs."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor
from torch.distributions import constraints

from pyro_elbo_ext import LogDensity, compiled_log_density
from pyro_elbo_ext.compile.machine_code import kernel_calls
from pyro_elbo_ext.density import graph as density_graph
from pyro_elbo_ext.programs.randomness import isolated

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


def test_batches_of_one_size_are_batched_once(points: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    with isolated(0):
        density = LogDensity(supports, (Y,), {}, 0)
    many = torch.tensor(points)
    expected = density.value_and_grad(many)
    evaluate = density.for_batches(len(many))
    monkeypatch.setattr(torch, "vmap", None)  # at each call it would cost more than the arithmetic
    for shown, found in zip(expected, evaluate(many), strict=True):
        assert torch.equal(found, shown)
        assert torch.equal(evaluate(many.flip(0))[0], expected[0].flip(0))


def test_batches_of_one_size_where_there_is_no_graph_for_them() -> None:
    def branching() -> None:
        x = pyro.sample("x", dist.Normal(Y.new_zeros(()), 1.0))
        pyro.factor("f", x if x > 0 else 3 * x)

    def singular() -> None:  # at some points
        rho = pyro.sample("rho", dist.Normal(Y.new_zeros(()), 1.0))
        covariance = torch.eye(2, dtype=torch.float64) + rho * (1 - torch.eye(2, dtype=torch.float64))
        pyro.sample("y", dist.MultivariateNormal(Y.new_zeros(2), covariance), obs=Y.new_zeros(2))

    many = torch.tensor([[0.5], [1.5]], dtype=torch.float64)
    for model in (branching, singular):
        with isolated(0):
            density = LogDensity(model, (), {}, 0)
        for shown, found in zip(density.value_and_grad(many), density.for_batches(2)(many), strict=True):
            # torch 2.9 has NaN where later ones raise, which makes it -inf
            torch.testing.assert_close(found, shown, rtol=1e-12, atol=1e-12, equal_nan=True)


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


def test_matrix_products_are_in_the_c_function(caplog: pytest.LogCaptureFixture) -> None:
    """Their memory is that of the kernels: a cast before an address once took its offset for so many numbers."""
    caplog.set_level(logging.INFO, logger="pyro_elbo_ext")
    x = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def network() -> None:
        first = pyro.sample("first", dist.Normal(x.new_zeros(3, 4), 1.0).to_event(2))
        second = pyro.sample("second", dist.Normal(x.new_zeros(4, 2), 1.0).to_event(2))
        with pyro.plate("data", 20):
            pyro.sample("y", dist.Normal(torch.tanh(x @ first) @ second, 1.0).to_event(1), obs=x.new_zeros(20, 2))

    compiled, eager = compiled_log_density(network), LogDensity(network, (), {}, 0)
    assert compiled.native is not None
    assert "unexpectedly" not in caplog.text
    points = np.random.default_rng(0).normal(size=(50, 20))
    for ours, theirs in zip(compiled.native.rows(points), eager.value_and_grad(points), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


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
    assert "the log density is called through Python: it calls " in caplog.text
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
        ({"tau": -1.0}, "values for 'tau' is outside the interior of its support, .*: -1.0"),
        ({"tau": 0.0}, "values for 'tau' is outside"),
        ({"tau": math.nan}, "values for 'tau' is outside"),
        ({"rate": 2.5}, "values for 'rate' is outside"),
        ({"weight": [0.5, 0.4, 0.3]}, "values for 'weight' is outside"),
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


def test_values_in_float32_are_inside_their_supports(density: LogDensity, points: np.ndarray) -> None:
    values = {name: value.astype(np.float32) for name, value in density.constrain(points[0]).items()}
    np.testing.assert_allclose(density.unconstrain(values), points[0], rtol=1e-4, atol=1e-4)


def test_flat_sites_add_their_jacobian_only() -> None:
    """The posterior under the flat prior, on the log scale: Stan's log density of a parameter with a lower bound."""

    def model() -> None:
        mu = pyro.sample("mu", dist.ImproperUniform(constraints.real, (2,), ()))
        tau = pyro.sample("tau", dist.ImproperUniform(constraints.positive, (), ()))
        pyro.sample("y", dist.Normal(mu, tau).to_event(1), obs=Y[:2])

    density = compiled_log_density(model)
    u = np.array([0.5, -1.0, 0.3])
    z = (Y[:2].numpy() - u[:2]) / math.exp(u[2])
    value, gradient = density.value_and_grad(u)
    assert value == pytest.approx(-0.5 * (z**2).sum() - 2 * u[2] - math.log(2 * math.pi) + u[2])
    np.testing.assert_allclose(gradient, [*z / math.exp(u[2]), (z**2).sum() - 2 + 1])
    assert density.constrain(u)["tau"] == pytest.approx(math.exp(0.3))


def discrete() -> None:
    pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("k", dist.Poisson(3.0))


def nan_data() -> None:
    pyro.sample("y", dist.Normal(pyro.sample("x", dist.Normal(0.0, 1.0)), 1.0), obs=torch.tensor(torch.nan))


def nan_parameter() -> None:
    pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor([0.0, torch.nan])), 1.0).to_event(1))


def subsampled() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 4, subsample_size=2) as index:
        pyro.sample("y", dist.Normal(x, 1.0), obs=Y[index])


def no_latent() -> None:
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))


def random_numbers() -> None:
    pyro.factor("f", torch.randn(()) * pyro.sample("x", dist.Normal(0.0, 1.0)))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (discrete, "latent site 'k' is discrete"),
        (nan_data, "'y' has NaN in 1 of 1"),
        (nan_parameter, "parameter 'loc' has NaN"),
        (subsampled, "plate 'rows' subsamples 2 of 4"),
        (no_latent, "no continuous latent site"),
        (random_numbers, "differs between two runs"),
    ],
)
def test_bad_models(model: Callable[[], None], message: str) -> None:
    pyro.clear_param_store()
    with pytest.raises(ValueError, match=message):
        compiled_log_density(model)


def test_as_many_threads_as_torch_is_set_to() -> None:
    x = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0))

    def model() -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("row", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=x @ weight), obs=(x[:, 0] > 0).float())

    before, sources, values = torch.get_num_threads(), [], []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            density = compiled_log_density(model)
            generated = kernel_calls.inductor_graph(density._value_and_grad).current_callable
            sources.append(Path(generated.__code__.co_filename).read_text())
            values.append(density.log_density(np.zeros(3)))
    finally:
        torch.set_num_threads(before)
    assert "num_threads(" not in sources[0]
    assert "num_threads(2)" in sources[1]
    np.testing.assert_allclose(values, -20_000 * math.log(2) - 1.5 * math.log(2 * math.pi))


def test_longer_vectors_are_not_tried_and_that_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config, cpu_vec_isa

    monkeypatch.setattr(density_graph, "_has_long_vectors", lambda: True)
    cpu_vec_isa.valid_vec_isa_list.cache_clear()
    before = list(cpu_vec_isa.supported_vec_isa_list)
    with density_graph.short_vectors_only(), config.patch({"cpp.vec_isa_ok": True}):
        assert all(kind.bit_width() <= 256 for kind in cpu_vec_isa.valid_vec_isa_list())
    assert cpu_vec_isa.valid_vec_isa_list.cache_info().currsize == 0
    assert cpu_vec_isa.supported_vec_isa_list == before
    assert any(kind.bit_width() > 256 for kind in before)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("extern_kernels.convolution(x, x)", "it calls extern_kernels.convolution"),
        ("torch.mm(x, x)", "it calls torch.mm"),
        ("aten.sin(x)", "it calls aten.sin"),
        ("self.partitions[0](args)", "it calls self.partitions"),
        ("print(x)", "it calls print"),
        ("nothing(x)", "it calls nothing"),
        ("kernel(x, 3)", "a kernel takes other things than tensors"),
    ],
)
def test_code_that_does_more_than_call_kernels_is_refused(
    regression: LogDensity, line: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = kernel_calls.inductor_graph(regression._value_and_grad)
    names = dict(graph.current_callable.__func__.__globals__)
    names["kernel"] = next(value for value in names.values() if getattr(value, "__name__", "") == "kernel")
    exec(f"class Runner:\n    def call(self, args):\n        x = args[0]\n        {line}\n        return x, x", names)
    monkeypatch.setattr(graph, "current_callable", names["Runner"]().call)
    with pytest.raises(kernel_calls.NotNative, match=message):
        kernel_calls.record(regression._value_and_grad, [regression.program.points[0]])
