"""Joint distances: closed forms, direct sums, scikit-learn, and the level of their tests."""

from __future__ import annotations

import builtins
import itertools
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from pyro_elbo_ext.comparison.distances import classifier_accuracy, mmd, sliced_wasserstein, spaced, whitened


def normal(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d))


def test_whitened_reference() -> None:
    reference = normal(500, 3) @ np.array([[1.0, 2.0, 0.0], [0.0, 1e-3, 0.0], [0.0, 0.0, 5.0]]) + 7
    white = whitened(reference, reference)
    np.testing.assert_allclose(np.cov(white.T), np.eye(3), atol=1e-8)
    np.testing.assert_allclose(white.mean(0), 0, atol=1e-10)
    # distances in these coordinates are Mahalanobis's
    a, b = reference[:2]
    mahalanobis = (a - b) @ np.linalg.solve(np.cov(reference.T), a - b)
    assert ((white[0] - white[1]) ** 2).sum() == pytest.approx(mahalanobis, rel=1e-6)
    simplex = np.random.default_rng(0).dirichlet([1, 2, 3], 200)
    assert whitened(simplex, simplex).shape == (200, 2)


def test_sliced_wasserstein_of_quantiles() -> None:
    """Quantiles in place of draws: W1 of N(0, 1) and N(m, s) is the mean of |m + (s - 1) z|."""
    z = stats.norm.ppf((np.arange(4000) + 0.5) / 4000)[:, None]
    assert sliced_wasserstein(z, z + 0.7) == pytest.approx(0.7, rel=1e-9)
    assert sliced_wasserstein(z, 1.5 * z) == pytest.approx(0.5 * math.sqrt(2 / math.pi), rel=1e-3)


def test_sliced_wasserstein_of_shift() -> None:
    """A shift by v has W1 |v . u| along u; its mean over directions of the plane is 2 |v| / pi."""
    a = normal(50, 2)
    shift = np.array([0.3, 0.4])
    found = sliced_wasserstein(a, a + shift, num_projections=4000)
    # |cos| of a uniform angle has variance 1/2 - 4 / pi^2
    assert abs(found - 0.5 * 2 / math.pi) < 4.5 * 0.5 * math.sqrt((0.5 - 4 / math.pi**2) / 4000)


def test_mmd_by_double_loop() -> None:
    a, b = normal(7, 2), normal(5, 2, seed=1) + 0.5
    pooled = np.concatenate([a, b])
    width = np.median([np.linalg.norm(x - y) for x, y in itertools.combinations(pooled, 2)])

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return math.exp(-((x - y) ** 2).sum() / (2 * width**2))

    def estimate(a: np.ndarray, b: np.ndarray) -> float:
        within = [
            sum(k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j) / (len(s) * (len(s) - 1))
            for s in (a, b)
        ]
        return sum(within) - 2 * sum(k(x, y) for x in a for y in b) / (len(a) * len(b))

    value, p_value = mmd(a, b, num_permutations=4000)
    assert value == pytest.approx(estimate(a, b), abs=1e-12)
    splits = list(itertools.combinations(range(12), 7))
    permuted = np.array([estimate(pooled[list(s)], np.delete(pooled, list(s), axis=0)) for s in splits])
    exact = (permuted >= value - 1e-12).mean()
    assert abs(p_value - exact) < 4.5 * math.sqrt(exact * (1 - exact) / 4000)


def test_mmd_of_gaussians() -> None:
    """E k(x, y) of N(0, I) draws is (h^2 / (h^2 + 2))^(d / 2), times exp(-v^2 / (2 (h^2 + 2))) where y is shifted by v."""
    h, v, d = 1.5, 1.0, 2
    a, b = normal(1000, d), normal(1000, d, seed=1) + np.array([v, 0.0])
    same = (h**2 / (h**2 + 2)) ** (d / 2)
    exact = 2 * same * (1 - math.exp(-(v**2) / (2 * (h**2 + 2))))
    values = [mmd(a[i : i + 100], b[i : i + 100], 1, bandwidth=h)[0] for i in range(0, 1000, 100)]
    assert abs(np.mean(values) - exact) < 4.5 * np.std(values, ddof=1) / math.sqrt(10)


def test_levels() -> None:
    """Both tests reject equal distributions at 20% in 20% of 100 cases, whose count has an sd of 4."""
    rejected = np.zeros(2)
    knn = pytest.importorskip("sklearn.neighbors").KNeighborsClassifier(5)
    for seed in range(100):
        a, b = normal(40, 2, seed), normal(40, 2, 1000 + seed)
        rejected += mmd(a, b, 99)[1] <= 0.2, classifier_accuracy(a, b, knn, seed)[1] <= 0.2
    assert abs(rejected[0] - 20) < 4.5 * 4
    assert rejected[1] < 20 + 4.5 * 4  # the accuracy is discrete: at most 20%


def test_power_on_correlation() -> None:
    pytest.importorskip("sklearn")
    a, b = normal(600, 2), normal(600, 2, seed=1)
    a[:, 0] = 0.8 * a[:, 1] + 0.6 * a[:, 0]  # same marginals
    assert mmd(a, b)[1] < 0.01
    assert classifier_accuracy(a, b)[1] < 0.01
    assert sliced_wasserstein(a, b) > 2 * sliced_wasserstein(b[:300], b[300:])


def test_classifier_agrees_with_sklearn() -> None:
    """A linear classifier's accuracy on a shift is Phi(|v| / 2); figures are scikit-learn's own for the same halves."""
    sklearn = pytest.importorskip("sklearn.linear_model")
    from sklearn.model_selection import StratifiedShuffleSplit, cross_val_score

    a, b = normal(1000, 3), normal(1500, 3, seed=1) + np.array([1.5, 0.0, 0.0])
    logistic = sklearn.LogisticRegression()
    accuracy, p_value = classifier_accuracy(a, b, logistic, seed=3)
    assert abs(accuracy - stats.norm.cdf(0.75)) < 4.5 * math.sqrt(0.25 / 1000)
    x, y = np.concatenate([a, spaced(b, 1000)]), np.repeat([0, 1], 1000)
    split = StratifiedShuffleSplit(1, test_size=0.5, random_state=3)
    assert accuracy == pytest.approx(cross_val_score(logistic, x, y, cv=split)[0], abs=1e-12)
    assert p_value == pytest.approx(stats.binom.sf(round(accuracy * 1000) - 1, 1000, 0.5))


def test_without_sklearn(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install \"pyro_elbo_ext\[comparison\]\""):
        classifier_accuracy(normal(9, 2), normal(9, 2))


def test_spaced() -> None:
    rows = np.arange(10.0)[:, None]
    assert spaced(rows, 4).ravel().tolist() == [0.0, 3.0, 6.0, 9.0]
    assert spaced(rows, 20) is rows


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mmd(normal(9, 2), normal(9, 3)), r"got \(9, 2\) and \(9, 3\)"),
        (lambda: mmd(normal(1, 2), normal(9, 2)), "at least 2 draws"),
        (lambda: mmd(np.zeros((5, 1)), np.zeros((5, 1))), "bandwidth must be above 0"),
        (lambda: sliced_wasserstein(normal(9, 2) * np.nan, normal(9, 2)), "the first side has 18 NaN"),
        (lambda: sliced_wasserstein(normal(9, 2), np.zeros((0, 2))), "the second side has no draws"),
        (lambda: sliced_wasserstein(normal(9, 2), normal(9, 2), 0), "num_projections"),
        (lambda: whitened(normal(9, 2), np.ones((9, 2))), "column 0 of the reference is constant"),
        (lambda: whitened(normal(9, 2), normal(2, 2)), "2 reference draws for 2 parameters"),
        (lambda: classifier_accuracy(normal(3, 2), normal(9, 2)), "at least 4 draws"),
    ],
)
def test_bad_inputs(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
