from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from pyro_elbo_ext.history import gradient_noise
from pyro_elbo_ext.history.history import History, SiteInfo
from tests.interruptions import stopped_everywhere

BY_PARAMETER = ["parameter", "numel", "snr", "snr_median", "snr_min", "snr_max", "num_steps"]
BY_ELEMENT = ["parameter", "index", "mean", "sd", "snr", "num_steps"]
SITES = (SiteInfo("mu", "latent", "sampled", None),)
gpu = pytest.mark.gpu
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]),
]


def draws(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(1.0, 2.0, size=shape)


def record(history: History, gradients: np.ndarray, name: str = "w", device: str = "cpu") -> None:
    for gradient in gradients:
        history.append_gradients({name: torch.tensor(gradient, device=device)})


def assert_moments(history: History, mean: np.ndarray, sd: np.ndarray, num_steps: int, rtol: float = 1e-10) -> None:
    """Both tables of a history of one parameter against its moments."""
    elements = history.gradient_snr(by="element")
    assert list(elements.columns) == BY_ELEMENT
    assert elements["index"].tolist() == list(np.ndindex(mean.shape))
    np.testing.assert_allclose(elements["mean"], mean.ravel(), rtol=rtol)
    np.testing.assert_allclose(elements["sd"], sd.ravel(), rtol=rtol)
    snr = np.abs(mean).ravel() / sd.ravel()
    np.testing.assert_allclose(elements["snr"], snr, rtol=rtol)
    assert (elements["num_steps"] == num_steps).all()
    table = history.gradient_snr()
    assert list(table.columns) == BY_PARAMETER
    (row,) = table.to_dict("records")
    assert (row["numel"], row["num_steps"]) == (mean.size, num_steps)
    assert row["snr"] == pytest.approx(np.linalg.norm(mean) / np.sqrt((sd**2).sum()), rel=rtol)
    for name, value in [("snr_median", np.median(snr)), ("snr_min", snr.min()), ("snr_max", snr.max())]:
        assert row[name] == pytest.approx(value, rel=rtol)


# What is computed


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("steps", "read"),
    [(2, 2), (9, 9), (10, 10), (11, 11), (19, 19), (20, 20), (21, 11), (30, 20), (31, 11), (57, 17), (100, 20)],
)
def test_over_steps_it_is_that_of_the_last_one_to_two_windows(steps: int, read: int, device: str) -> None:
    gradients = draws(steps, 2, 3)
    history = History(gradient_snr="steps", gradient_window=10)
    record(history, gradients, device=device)
    last = gradients[-read:]
    assert_moments(history, last.mean(0), last.std(0, ddof=1), read)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("steps", "read"), [(1, 1), (10, 10), (20, 20), (21, 11), (44, 14)])
def test_over_particles_it_pools_the_moments_within_steps(steps: int, read: int, device: str) -> None:
    gradients = draws(steps, 5, 2, 3) + 10 * draws(steps, 1, 1, 1, seed=1)  # steps differ by far more than particles
    history = History(gradient_snr="particles", gradient_window=10)
    record(history, gradients, device=device)
    last = gradients[-read:]
    assert_moments(history, last.mean((0, 1)), np.sqrt((last.var(1, ddof=1) / 5).mean(0)), read)


def test_particles_may_change_in_number() -> None:
    few, many = draws(2, 3), draws(8, 3, seed=1)
    history = History(gradient_snr="particles")
    for gradient in (few, many):
        history.append_gradients({"w": torch.tensor(gradient)})
    variance = (few.var(0, ddof=1) / 2 + many.var(0, ddof=1) / 8) / 2
    assert_moments(history, (few.mean(0) + many.mean(0)) / 2, np.sqrt(variance), 2)


def test_both_modes_agree_on_a_standard_normal_estimator() -> None:
    """SNR of the mean of K independent draws of N(m, s^2) is sqrt(K) |m| / s, whichever way it is measured."""
    normal = np.random.default_rng(0).normal(0.5, 2.0, size=(400, 16, 50))  # steps, particles, elements
    steps, particles = (History(gradient_snr=mode, gradient_window=400) for mode in ("steps", "particles"))  # type: ignore[arg-type]
    for step in torch.tensor(normal):
        steps.append_gradients({"w": step.mean(0)})
        particles.append_gradients({"w": step})
    for history in (steps, particles):
        # sd of the ratio, 50 elements pooled: about sqrt((1 + snr^2 / 2) / (400 * 50)) = 0.009
        assert history.gradient_snr().loc[0, "snr"] == pytest.approx(4 * 0.5 / 2.0, abs=0.04)


@pytest.mark.parametrize("mode", ["steps", "particles"])
def test_a_gradient_that_does_not_vary(mode: Any) -> None:
    history = History(gradient_snr=mode)
    constant = torch.tensor([0.0, 0.1, -0.7])
    for _ in range(3):
        gradient = constant if mode == "steps" else constant.expand(5, 3)
        history.append_gradients({"w": gradient, "b": gradient[..., :0]})
    elements = history.gradient_snr(by="element")
    np.testing.assert_array_equal(elements["snr"], [np.nan, np.inf, np.inf])
    table = history.gradient_snr().set_index("parameter")
    assert table.loc["w", ["snr", "snr_median", "snr_min", "snr_max"]].tolist() == [np.inf] * 4  # NaN is left out
    assert table.loc["b", "numel"] == 0
    assert table.loc["b", ["snr", "snr_median", "snr_min", "snr_max"]].isna().all()


def test_one_step_says_nothing_of_the_variation_over_steps() -> None:
    history = History(gradient_snr="steps")
    record(history, draws(1, 3))
    assert history.gradient_snr(by="element")["snr"].isna().all()
    assert np.isnan(history.gradient_snr().loc[0, "snr"])
    assert history.gradient_snr().loc[0, "num_steps"] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_is_summed_in_single(dtype: torch.dtype) -> None:
    gradients = torch.tensor(draws(300, 4) + 100).to(dtype)
    history = History(gradient_snr="steps", gradient_window=300)
    for gradient in gradients:
        history.append_gradients({"w": gradient})
    exact = gradients.double().numpy()
    assert_moments(history, exact.mean(0), exact.std(0, ddof=1), 300, rtol=1e-5)


def test_sparse_gradients_count_as_dense() -> None:
    dense = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    history, expected = History(gradient_snr="steps"), History(gradient_snr="steps")
    for factor in (1.0, 3.0):
        history.append_gradients({"w": (factor * dense).to_sparse()})
        expected.append_gradients({"w": factor * dense})
    pd.testing.assert_frame_equal(history.gradient_snr("element"), expected.gradient_snr("element"))


# What is kept


def test_parameters_come_and_go() -> None:
    history = History(gradient_snr="steps", gradient_window=10)
    a, late = draws(40, 2), draws(40, 3, seed=1)
    for t in range(30):
        gradients = {"a": torch.tensor(a[t]), "early": torch.ones(1)} if t < 5 else {"a": torch.tensor(a[t])}
        if t >= 18:
            gradients["late"] = torch.tensor(late[t])
        history.append_gradients(gradients)
        assert ("early" in history.gradient_snr()["parameter"].tolist()) == (t < 20)
    table = history.gradient_snr(by="element")
    assert table["parameter"].tolist() == ["a"] * 2 + ["late"] * 3
    assert table["num_steps"].tolist() == [20] * 2 + [12] * 3
    mean, sd = late[18:30].mean(0), late[18:30].std(0, ddof=1)
    np.testing.assert_allclose(table["snr"][2:], np.abs(mean) / sd, rtol=1e-10)


@pytest.mark.parametrize("when", [5, 10, 15])
def test_a_change_of_shape_starts_the_parameter_anew(when: int) -> None:
    history = History(gradient_snr="steps", gradient_window=10)
    other = draws(when + 4, 1)
    for gradient in draws(when, 3):
        history.append_gradients({"w": torch.tensor(gradient), "other": torch.tensor(other[0])})
    gradients = draws(4, 2, 2, seed=1)
    for gradient in gradients:
        history.append_gradients({"w": torch.tensor(gradient), "other": torch.tensor(other[0])})
    table = history.gradient_snr().set_index("parameter")
    assert table.loc["w", "numel"] == 4
    assert table["num_steps"].to_dict() == {"w": 4, "other": when + 4}
    mean, sd = gradients.mean(0), gradients.std(0, ddof=1)
    assert table.loc["w", "snr"] == pytest.approx(np.linalg.norm(mean) / np.linalg.norm(sd))


@pytest.mark.parametrize("mode", ["steps", "particles"])
def test_what_the_caller_does_with_its_gradient_changes_nothing(mode: Any) -> None:
    history = History(gradient_snr=mode)
    leaf = torch.tensor(draws(2, 3), requires_grad=True)
    for factor in (1.0, 2.0):
        history.append_gradients({"w": factor * leaf})  # with a graph
    before = history.gradient_snr("element")
    history = History(gradient_snr=mode)
    gradient = torch.empty(2, 3, dtype=torch.float64)
    for factor in (1.0, 2.0):
        gradient.copy_(factor * leaf.detach())
        history.append_gradients({"w": gradient})
        gradient.zero_()
    pd.testing.assert_frame_equal(history.gradient_snr("element"), before)
    assert not any(tensor.requires_grad for tensor in stored(history))


def stored(history: History) -> list[torch.Tensor]:
    noise = history._noise
    assert noise is not None
    return [
        tensor
        for bucket in (noise._current, noise._previous)
        for moments in bucket.values()
        for tensor in (moments.mean, moments.spread)
    ]


@pytest.mark.parametrize("mode", ["steps", "particles"])
def test_memory_is_four_tensors_for_a_parameter_however_long_the_run(mode: Any) -> None:
    history = History(gradient_snr=mode, gradient_window=5)
    for t in range(200):
        gradients = {name: torch.full((3, 2), float(t)) for name in ("a", "b", f"only_at_{t}")}
        history.append_gradients(gradients)
        elements = 6 if mode == "steps" else 2
        assert len(stored(history)) <= 4 * 2 + 2 * 2 * 5  # and two for each name of the last two windows
        assert sum(tensor.untyped_storage().nbytes() for tensor in stored(history)) <= 4 * elements * (
            4 * 2 + 2 * 2 * 5
        )


@pytest.mark.parametrize("mode", ["steps", "particles"])
def test_recording_never_reads_the_device(mode: Any) -> None:
    """Meta tensors have no numbers: whatever needs one raises."""
    history = History(gradient_snr=mode, gradient_window=2)
    for _ in range(7):
        history.append_gradients({"w": torch.empty(4, 3, device="meta")})
    assert {tensor.device.type for tensor in stored(history)} == {"meta"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", [lambda h: pickle.loads(pickle.dumps(h)), copy.deepcopy], ids=["pickle", "deepcopy"])
def test_copies_are_equal_and_independent(how: Callable[[History], History], device: str) -> None:
    history = History(gradient_snr="steps", gradient_window=10)
    gradients = draws(40, 3)
    record(history, gradients[:17], device=device)
    twin = how(history)
    before = history.gradient_snr("element")
    assert twin.gradient_mode == "steps"
    assert {tensor.device.type for tensor in stored(twin)} == {"cpu"}
    pd.testing.assert_frame_equal(twin.gradient_snr("element"), before)
    record(twin, gradients[17:], device=device)
    pd.testing.assert_frame_equal(history.gradient_snr("element"), before)
    record(history, gradients[17:], device=device)
    pd.testing.assert_frame_equal(twin.gradient_snr("element"), history.gradient_snr("element"))


def test_clear_forgets_and_files_leave_gradients_out(tmp_path: Path) -> None:
    pytest.importorskip("h5netcdf")
    history = History(gradient_snr="particles", gradient_window=3)
    record(history, draws(5, 2, 3))
    history.append(0, SITES, np.zeros((1, 6)), objective=0.0, kl_weight=1.0)
    history.save(tmp_path / "history.nc")
    assert History.load(tmp_path / "history.nc").gradient_mode is None
    history.clear()
    assert history.gradient_mode == "particles"
    assert stored(history) == []
    with pytest.raises(ValueError, match="at least one step; none has been recorded"):
        history.gradient_snr()
    gradients = draws(2, 2, 3, seed=1)
    record(history, gradients)
    assert_moments(history, gradients.mean((0, 1)), np.sqrt((gradients.var(1, ddof=1) / 2).mean(0)), 2)


# Refusing


def test_without_asking_at_construction_there_is_none() -> None:
    history = History()
    assert history.gradient_mode is None
    for call in (history.gradient_snr, lambda: history.append_gradients({})):
        with pytest.raises(ValueError, match=r'construct it with History\(gradient_snr="steps"\)'):
            call()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gradient_snr": "step"}, "must be 'steps', 'particles' or None, not 'step'"),
        ({"gradient_snr": True}, "must be 'steps', 'particles' or None, not True"),
        ({"gradient_snr": "steps", "gradient_window": 1}, "gradient_window must be at least 2, not 1"),
    ],
)
def test_bad_construction(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        History(**arguments)


@pytest.mark.parametrize(
    ("mode", "gradient", "error", "message"),
    [
        ("particles", torch.ones(1, 3), ValueError, r"'bad' has shape \(1, 3\)\. Use num_particles of at least 2"),
        ("particles", torch.ones(()), ValueError, r"'bad' has shape \(\)"),
        ("steps", None, TypeError, "'bad' must be a tensor .* not NoneType; leave out"),
        ("steps", torch.ones(3, dtype=torch.int64), TypeError, "'bad' must be .* not torch.int64 tensor"),
        ("steps", torch.ones(3, dtype=torch.complex64), TypeError, "'bad' must be .* not torch.complex64 tensor"),
    ],
)
def test_a_bad_gradient_raises_and_changes_nothing(mode: Any, gradient: Any, error: type, message: str) -> None:
    history = History(gradient_snr=mode, gradient_window=2)
    record(history, draws(2, 2, 3))
    before = history.gradient_snr("element")
    with pytest.raises(error, match=message):
        history.append_gradients({"w": torch.ones(2, 3, dtype=torch.float64), "bad": gradient})
    pd.testing.assert_frame_equal(history.gradient_snr("element"), before)
    with pytest.raises(ValueError, match="by must be 'parameter' or 'element', got 'site'"):
        history.gradient_snr(by="site")  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [3, 10], ids=["in a bucket", "at its end"])
def test_an_exception_at_any_place_leaves_the_moments_of_whole_steps(steps: int) -> None:
    gradients = draws(steps + 1, 4)

    def prepare() -> History:
        history = History(gradient_snr="steps", gradient_window=10)
        record(history, gradients[:-1])
        return history

    def act(history: History) -> None:
        record(history, gradients[-1:])

    stopped = 0
    for history in stopped_everywhere(prepare, act, gradient_noise, stride=2):
        stopped += 1
        (count,) = set(history.gradient_snr(by="element")["num_steps"])
        assert count in (steps, steps + 1)
        assert_moments(history, gradients[:count].mean(0), gradients[:count].std(0, ddof=1), count)
    assert stopped > 50
