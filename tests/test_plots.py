from __future__ import annotations

import builtins
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pyro_elbo_ext.history.history import History, SiteInfo
from pyro_elbo_ext.history.plots import plot_history, running_mean

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def _figures() -> Iterator[None]:
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    yield
    plt.close("all")


def data(n: int = 300, sites: int = 3, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    kl_prior = np.arange(1.0, sites + 1) + 0.1 * rng.normal(size=(n, sites))
    reconstruction = -50 + rng.normal(size=n)
    return {
        "steps": np.arange(n),
        "elbo": reconstruction - kl_prior.sum(1),
        "reconstruction": reconstruction,
        "kl_prior": kl_prior,
        "sites": [f"z{i}" for i in range(sites)],
    }


def band(collection: Any) -> tuple[float, float]:
    y = collection.get_paths()[0].vertices[:, 1]
    return float(y.min()), float(y.max())


def test_three_panels_with_raw_behind_smooth_and_named_axes() -> None:
    given = data()
    axes = plot_history(**given)
    assert axes.shape == (3,)
    axes[0].figure.savefig("/dev/null", format="png")
    for axis, name in ((axes[0], "elbo"), (axes[1], "reconstruction")):
        raw, smooth = axis.get_lines()
        np.testing.assert_array_equal(raw.get_ydata(), given[name])
        assert raw.get_alpha() < 0.5
        np.testing.assert_allclose(smooth.get_ydata(), running_mean(given["steps"] * 1.0, given[name], 0.05 * 299))
        assert axis.get_ylabel() == "nats"
    assert axes[2].get_title(loc="left") == "KL(q || prior) by site"
    assert axes[2].get_xlabel() == "step"


def test_the_stack_adds_up_to_the_total() -> None:
    given = data()
    axes = plot_history(**given, smooth=0.1)
    areas = axes[2].collections
    assert len(areas) == 3
    raw, total, _ = axes[2].get_lines()
    np.testing.assert_allclose(raw.get_ydata(), given["kl_prior"].sum(1))
    top = max(band(area)[1] for area in areas)
    assert top == pytest.approx(total.get_ydata().max())
    # Largest first, from the bottom; the legend reads in the order of the stack.
    assert [area.get_label() for area in areas] == ["z2", "z1", "z0"]
    assert [text.get_text() for text in axes[2].get_legend().get_texts()] == ["total", "z0", "z1", "z2"]


def test_negative_terms_are_stacked_below_zero() -> None:
    given = data(n=50)
    given["kl_prior"] = np.tile([2.0, -3.0, 1.0], (50, 1))
    axes = plot_history(**given)
    bands = [band(area) for area in axes[2].collections if band(area) != (0.0, 0.0)]
    assert sorted(bands) == [(-3.0, 0.0), (0.0, 2.0), (2.0, 3.0)]
    np.testing.assert_allclose(axes[2].get_lines()[1].get_ydata(), 0.0, atol=1e-12)


def test_many_sites_show_the_largest_and_other() -> None:
    given = data(sites=30)
    axes = plot_history(**given, top=10)
    labels = [text.get_text() for text in axes[2].get_legend().get_texts()]
    assert labels == ["total", "other (20)", *(f"z{i}" for i in range(20, 30))]
    other = next(area for area in axes[2].collections if area.get_label() == "other (20)")
    low, high = band(other)
    assert low == pytest.approx(sum(range(21, 31)), rel=0.02)
    assert high == pytest.approx(sum(range(1, 31)), rel=0.02)
    styles = [(tuple(area.get_facecolor()[0]), area.get_hatch()) for area in axes[2].collections]
    assert len(set(styles)) == 11


def test_a_start_far_below_is_off_the_scale_and_said_to_be() -> None:
    given = data()
    given["elbo"][:3] = -1e6
    axes = plot_history(**given)
    low, high = axes[0].get_ylim()
    late = given["elbo"][20:]
    assert late.min() - 10 < low < late.min()
    assert late.max() < high
    assert "-1e+06" in axes[0].texts[0].get_text()
    assert not axes[1].texts
    assert axes[1].get_ylim()[0] < given["reconstruction"].min()


def test_given_axes_are_used_and_no_figure_is_made() -> None:
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure

    figure = Figure()
    panels = figure.subplots(1, 3)
    axes = plot_history(**data(), axes=panels, objective=data()["elbo"] + 1)
    assert plt.get_fignums() == []
    assert list(axes) == list(panels)
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["ELBO", "weighted objective"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"smooth": 2.0}, "from 0 to 1"),
        ({"top": 0}, "at least 1"),
        ({"sites": ["a"]}, "1 sites"),
        ({"axes": []}, "three matplotlib axes; got 0"),
        ({"steps": np.zeros(0)}, "at least one step"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_history(**{**data(), **change})


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r'pip install "pyro_elbo_ext\[plots\]"'):
        plot_history(**data())


# Running mean


def brute_force(steps: np.ndarray, values: np.ndarray, width: float) -> np.ndarray:
    weight = np.gradient(steps)
    out = np.empty_like(values)
    for i, step in enumerate(steps):
        half = min(width / 2, (step - steps[0]) / 2)
        near = (np.abs(steps - step) <= half) & np.isfinite(values)
        out[i] = np.average(values[near], weights=weight[near]) if near.any() else np.nan
    return out


def test_running_mean_equals_its_definition_on_uneven_steps_with_gaps() -> None:
    rng = np.random.default_rng(1)
    steps = np.cumsum(rng.integers(1, 9, size=200)).astype(float)
    values = 1e6 + rng.normal(size=(200, 2))
    values[50:60, 1] = np.nan
    smooth = running_mean(steps, values, 12.0)
    for column in (0, 1):
        np.testing.assert_allclose(smooth[:, column], brute_force(steps, values[:, column], 12.0), rtol=1e-13)
    assert np.isnan(smooth[:, 1]).any()


def test_running_mean_of_a_line_is_the_line_up_to_the_cut_end() -> None:
    steps = np.arange(100.0)
    smooth = running_mean(steps, 3 * steps, 10.0)
    np.testing.assert_allclose(smooth[:95], 3 * steps[:95])
    np.testing.assert_array_equal(running_mean(steps, steps, 0.0), steps)
    np.testing.assert_array_equal(running_mean(steps[:1], np.array([5.0]), 10.0), [5.0])
    assert np.isnan(running_mean(steps[:3], np.full(3, np.nan), 1.0)).all()


# Through History


def filled(n: int = 100, kl_weight: float = 1.0, observations: float = 20.0, contribution: float = np.nan) -> History:
    history = History(64)
    sites = (
        SiteInfo("mu", "latent", "analytic", None),
        SiteInfo("aux", "auxiliary", "sampled", None),
        SiteInfo("y", "observed", None, None),
    )
    for t in range(n):
        values = np.array(
            [
                [-1.0, -1, 4, 1, 0, contribution],
                [np.nan, -1, -1, 1, 0, contribution],
                [-40, np.nan, np.nan, 1, observations, contribution],
            ]
        )
        history.append(t, sites, values, objective=-40 - kl_weight * 3, kl_weight=kl_weight)
    return history


def test_history_plot_draws_latent_and_auxiliary_sites() -> None:
    axes = filled().plot()
    assert [text.get_text() for text in axes[2].get_legend().get_texts()] == ["total", "aux", "mu"]
    assert axes[0].get_legend() is None
    np.testing.assert_allclose(axes[0].get_lines()[1].get_ydata(), -43)
    np.testing.assert_allclose(axes[2].get_lines()[1].get_ydata(), 3)


def test_history_plot_shows_the_objective_when_weighted_and_per_observation() -> None:
    axes = filled(kl_weight=0.5).plot(per_observation=True)
    _, elbo, _, objective = axes[0].get_lines()
    np.testing.assert_allclose(elbo.get_ydata(), -43 / 20)
    np.testing.assert_allclose(objective.get_ydata(), -41.5 / 20)
    np.testing.assert_allclose(axes[2].get_lines()[1].get_ydata(), 3 / 20)
    assert axes[0].get_ylabel() == "nats per observation"
    with pytest.raises(ValueError, match="no observations"):
        filled(observations=0.0).plot(per_observation=True)


def test_history_plot_calls_a_nonlinear_objective_a_bound() -> None:
    axes = filled(contribution=-12.0).plot()
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["ELBO", "bound (objective)"]
    axes = filled(kl_weight=0.5).plot()
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["ELBO", "weighted objective"]


def test_a_thinned_raw_curve_is_drawn_at_one_density() -> None:
    history = filled(n=1000)
    raw = filled(n=1000).plot()[0].get_lines()[0].get_xdata()
    gaps = np.diff(history.steps)
    assert gaps[0] > gaps[-1] == 1
    assert (np.diff(raw)[:-1] == gaps[0]).all()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_very_short_runs_draw(n: int) -> None:
    axes = filled(n=n).plot()
    axes[0].figure.savefig("/dev/null", format="png")
    assert len(axes[2].collections) >= 2
