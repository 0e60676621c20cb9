"""Bounds as functions of the log weights: values, derivatives, ordering, and the limits that are known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from pyro_elbo_ext.bounds.bounds import CUBO, ELBO, IWAE, TVO, Bound, Renyi
from tests.test_gradients import BOUNDS

MORE = [
    Renyi(1.0),
    Renyi(1.0 - 1e-3),
    Renyi(2.5),
    Renyi(-1.0),
    CUBO(3.0),
    TVO((0.0, 1.0)),
    TVO((0.0, 0.5, 1.0), "upper"),
]


@pytest.fixture
def log_weights() -> Tensor:
    return 3 * torch.randn(5, 2, 3, dtype=torch.float64)


@pytest.mark.parametrize("bound", [*BOUNDS, *MORE], ids=str)
def test_closed_forms_equal_autograd(bound: Bound, log_weights: Tensor) -> None:
    torch.testing.assert_close(bound.gradient(log_weights), Bound.gradient(bound, log_weights))
    torch.testing.assert_close(bound.curvature(log_weights), Bound.curvature(bound, log_weights))
    value, own = bound.leave_one_out(log_weights)
    expected_value, expected_own = Bound.leave_one_out(bound, log_weights)
    torch.testing.assert_close(value, expected_value)
    torch.testing.assert_close(own, expected_own)


@pytest.mark.parametrize("bound", [*BOUNDS, *MORE], ids=str)
def test_a_bound_is_symmetric_and_shifts_with_the_log_weights(bound: Bound, log_weights: Tensor) -> None:
    value = bound.value(log_weights)
    assert value.shape == (2, 3)
    torch.testing.assert_close(bound.value(log_weights.flip(0)), value)
    torch.testing.assert_close(bound.value(log_weights + 700.0), value + 700.0)
    torch.testing.assert_close(bound.gradient(log_weights).sum(0), torch.ones(2, 3, dtype=torch.float64))
    torch.testing.assert_close(bound.value(log_weights[:1]), log_weights[0])


@pytest.mark.parametrize("bound", [*BOUNDS, *MORE], ids=str)
def test_leave_one_out_does_not_depend_on_the_particle(bound: Bound, log_weights: Tensor) -> None:
    value, own = bound.leave_one_out(log_weights)
    changed = log_weights.clone()
    changed[1] += 5.0
    other_value, other_own = bound.leave_one_out(changed)
    torch.testing.assert_close(other_value[1], value[1])
    torch.testing.assert_close(other_own[1], own[1])
    assert not torch.allclose(other_value[0], value[0])


@pytest.mark.parametrize("bound", [IWAE(), Renyi(0.5), Renyi(2.0), CUBO()], ids=str)
def test_leave_one_out_neither_cancels_nor_needs_all_pairs(bound: Bound) -> None:
    log_weights = torch.tensor([[0.0], [50.0], [-torch.inf], [0.3]], dtype=torch.float64)
    value, own = bound.leave_one_out(log_weights)
    expected_value, expected_own = Bound.leave_one_out(bound, log_weights)
    known = expected_value.isfinite()
    assert torch.equal(value.isfinite(), known)
    torch.testing.assert_close(value[known], expected_value[known])
    torch.testing.assert_close(own[known], expected_own[known])
    many = torch.randn(3000, 300)  # all pairs would be 10 GB
    assert all(part.shape == many.shape and part.isfinite().all() for part in bound.leave_one_out(many))


def test_known_values(log_weights: Tensor) -> None:
    weights = log_weights.exp()
    torch.testing.assert_close(IWAE().value(log_weights), weights.mean(0).log())
    torch.testing.assert_close(CUBO(2.0).value(log_weights), 0.5 * weights.square().mean(0).log())
    torch.testing.assert_close(Renyi(0.5).value(log_weights), 2 * weights.sqrt().mean(0).log())
    torch.testing.assert_close(Renyi(0.0).value(log_weights), IWAE().value(log_weights))
    torch.testing.assert_close(Renyi(-1.0).value(log_weights), CUBO(2.0).value(log_weights))
    torch.testing.assert_close(TVO((0.0, 1.0)).value(log_weights), log_weights.mean(0))
    torch.testing.assert_close(
        TVO((0.0, 1.0), "upper").value(log_weights), (weights / weights.sum(0) * log_weights).sum(0)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alpha_near_one_goes_to_the_elbo_without_loss_of_precision(dtype: torch.dtype) -> None:
    log_weights = (-1000 + torch.randn(64, dtype=torch.float64)).to(dtype)
    mean, variance = log_weights.double().mean(), log_weights.double().var(unbiased=False)
    for distance in (0.0, 1e-12, 1e-8, 1e-4, -1e-4):
        expected = mean + distance * variance / 2  # first order in 1 - alpha
        error = Renyi(1.0 - distance).value(log_weights).double() - expected
        assert abs(error) < 2e-4 if dtype is torch.float32 else abs(error) < 1e-7, distance


@pytest.mark.parametrize("bound", [b for b in (*BOUNDS, *MORE) if not (b.linear or b == TVO((0.0, 1.0)))], ids=str)
def test_a_weight_of_zero(bound: Bound) -> None:
    log_weights = torch.tensor([0.3, -torch.inf, -1.0], dtype=torch.float64)
    if (isinstance(bound, Renyi) and bound.alpha > 1) or (isinstance(bound, TVO) and bound.side == "lower"):
        assert bound.value(log_weights) == -torch.inf  # negative powers, and the mean under beta = 0
        return
    small = log_weights.clone()
    small[1] = -600.0
    if bound != Renyi(1.0 - 1e-3):  # so near the mean that even exp(-600) counts
        assert bound.value(log_weights) == pytest.approx(bound.value(small).item(), abs=1e-3)
    assert torch.isfinite(bound.gradient(log_weights)).all()
    assert bound.gradient(log_weights)[1] == 0
    assert torch.isfinite(bound.curvature(log_weights)).all()


# A conjugate model with many particles: z ~ N(0, 1), x ~ N(z, 1), x = 1.2; q = N(0.4, 0.9)

EVIDENCE = stats.norm.logpdf(1.2, scale=math.sqrt(2.0))


def sample_log_weights(count: int, replicates: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = 0.4 + 0.9 * torch.randn(count, replicates, dtype=torch.float64, generator=generator)
    return (
        -0.5 * z**2 - 0.5 * (1.2 - z) ** 2 - math.log(2 * math.pi) + 0.5 * ((z - 0.4) / 0.9) ** 2 + math.log(0.9)
        + 0.5 * math.log(2 * math.pi)
    )  # fmt: skip


def test_ordering_and_monotonicity() -> None:
    """ELBO <= Renyi(0.5) <= IWAE <= log p(x) <= CUBO, and IWAE rises with K: in means 4 se apart."""
    log_weights = sample_log_weights(64, 40_000)

    def assert_rises(steps: list[Tensor | float]) -> None:
        for low, high in itertools.pairwise(steps):
            difference = torch.as_tensor(high - low).expand(log_weights.shape[1])
            assert difference.mean() > 4 * difference.std() / math.sqrt(difference.numel())

    assert_rises([IWAE().value(log_weights[:count]) for count in (1, 2, 4, 8, 16, 32)] + [EVIDENCE])
    eight = log_weights[:8]
    assert_rises([bound.value(eight) for bound in (Renyi(3.0), ELBO(), Renyi(0.5), IWAE())])
    assert_rises([EVIDENCE, CUBO().value(log_weights)])
    assert_rises([ELBO().value(log_weights), TVO().value(log_weights), EVIDENCE, TVO(side="upper").value(log_weights)])


def test_the_bias_of_iwae_falls_as_one_over_k() -> None:
    counts = [4, 8, 16, 32, 64]
    bias = []
    for count in counts:
        log_weights = sample_log_weights(count, 400_000, seed=count)
        weights = (log_weights - EVIDENCE).exp()
        # E[mean weight] = 1 exactly: the first two terms of log's expansion have known means and take away most of the noise
        mean = weights.mean(0) - 1
        noise = mean - 0.5 * (mean.square() - mean.square().mean())
        values = IWAE().value(log_weights) - EVIDENCE - noise
        bias.append(-values.mean().item())
    slope = np.polyfit(np.log(counts), np.log(bias), 1)[0]
    assert slope == pytest.approx(-1.0, abs=0.1), bias


def test_tvo_sums_go_to_the_evidence_with_finer_intervals() -> None:
    log_weights = sample_log_weights(200_000, 1)[:, 0]
    betas = tuple(np.linspace(0, 1, 51).tolist())
    lower, upper = (TVO(betas, side).value(log_weights).item() for side in ("lower", "upper"))  # type: ignore[arg-type]

    def integrand(beta: float) -> float:
        share = torch.softmax(beta * log_weights, 0)
        return (share * log_weights).sum().item()

    integral, _ = integrate.quad(integrand, 0, 1)
    assert integral == pytest.approx(IWAE().value(log_weights).item(), abs=1e-8)
    assert lower < integral < upper
    assert upper - lower < 0.02
    assert integral == pytest.approx(EVIDENCE, abs=0.01)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Renyi(math.nan), "alpha"),
        (lambda: CUBO(1.0), "n must be"),
        (lambda: CUBO(math.inf), "n must be"),
        (lambda: TVO((0.0, 0.5)), "increase from 0 to 1"),
        (lambda: TVO((0.0, 0.5, 0.5, 1.0)), "increase from 0 to 1"),
        (lambda: TVO((1.0,)), "increase from 0 to 1"),
        (lambda: TVO(side="middle"), "side"),  # type: ignore[arg-type]
    ],
)
def test_arguments_out_of_range(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
