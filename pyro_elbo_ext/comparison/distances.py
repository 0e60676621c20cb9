"""Distances between two sets of draws in all their dimensions at once, and tests that there is none."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.spatial.distance import pdist, squareform

Floats = NDArray[np.float64]
SINGULAR = 1e-10  # share of the largest variance below which the reference does not vary in a direction


def whitened(draws: Floats, reference: Floats) -> Floats:
    """Draws in coordinates in which the reference has mean 0 and the identity as covariance.

    Parameters
    ----------
    draws, reference
        Shape (n, d) and (m, d), m > 1.

    Returns
    -------
    numpy.ndarray
        Shape (n, k), the principal components of the reference, each over its standard deviation. k is less than d where
        parameters depend on each other linearly, as the entries of a simplex do.
    """
    _check(draws, reference)
    if len(reference) <= reference.shape[1]:
        raise ValueError(
            f"there are {len(reference)} reference draws for {reference.shape[1]} parameters, too few for their covariance: "
            "take fewer parameters, by var_names, or more draws"
        )
    mean, sd = reference.mean(0), reference.std(0, ddof=1)
    if not (sd > 0).all():
        raise ValueError(f"column {int(np.argmin(sd))} of the reference is constant: leave it out")
    variances, directions = np.linalg.eigh(np.atleast_2d(np.cov(((reference - mean) / sd).T)))
    kept = variances > SINGULAR * variances[-1]
    whitening: Floats = directions[:, kept] / np.sqrt(variances[kept])
    return np.asarray((draws - mean) / sd @ whitening)


def sliced_wasserstein(a: Floats, b: Floats, num_projections: int = 100, seed: int = 0) -> float:
    """Mean Wasserstein-1 distance of projections on random directions.

    Parameters
    ----------
    a, b
        Shape (n, d) and (m, d).
    num_projections
        Directions, uniform on the sphere.
    seed
        Same seed, same directions.

    Returns
    -------
    float
        In the draws' units; in one dimension the Wasserstein-1 distance itself.

    References
    ----------
    Rabin, Peyré, Delon, Bernot (2011), Wasserstein Barycenter and its Application to Texture Mixing.
    """
    _check(a, b)
    if num_projections < 1:
        raise ValueError(f"num_projections must be at least 1, got {num_projections}")
    directions = np.random.default_rng(seed).normal(size=(a.shape[1], num_projections))
    directions /= np.linalg.norm(directions, axis=0)
    distances = [stats.wasserstein_distance(x, y) for x, y in zip((a @ directions).T, (b @ directions).T, strict=True)]
    return float(np.mean(distances))


def mmd(
    a: Floats, b: Floats, num_permutations: int = 200, bandwidth: float | None = None, seed: int = 0
) -> tuple[float, float]:
    """Squared maximum mean discrepancy with a Gaussian kernel, and the p-value that a and b have one distribution.

    Parameters
    ----------
    a, b
        Independent draws, shape (n, d) and (m, d), n and m at least 2. Takes memory for (n + m)^2 numbers.
    num_permutations
        B, of the draws between the two sides; the smallest p-value is 1 / (B + 1).
    bandwidth
        h in ``exp(-|x - y|^2 / (2 h^2))``; by default the median distance between two of all draws.
    seed
        Of the permutations.

    Returns
    -------
    tuple of float
        The unbiased estimate, which may be below 0, and the p-value.

    References
    ----------
    Gretton, Borgwardt, Rasch, Schölkopf, Smola (2012), A Kernel Two-Sample Test.
    """
    _check(a, b)
    n, m = len(a), len(b)
    if min(n, m) < 2:
        raise ValueError(f"at least 2 draws are needed on each side, got {n} and {m}")
    pooled = np.concatenate([a, b])
    distances = pdist(pooled)
    width = float(np.median(distances)) if bandwidth is None else bandwidth
    if not width > 0:
        raise ValueError("the bandwidth must be above 0; half of the draws or more are the same")
    kernel = squareform(np.exp(-0.5 * (distances / width) ** 2))  # without its diagonal, as the estimate wants it
    rng = np.random.default_rng(seed)
    sides = np.zeros((num_permutations + 1, n + m))
    sides[0, :n] = 1.0
    for row in sides[1:]:
        row[rng.permutation(n + m)[:n]] = 1.0
    from_a = sides @ kernel
    within_a = (from_a * sides).sum(1)
    across = from_a.sum(1) - within_a
    within_b = kernel.sum() - within_a - 2 * across
    values = within_a / (n * (n - 1)) + within_b / (m * (m - 1)) - 2 * across / (n * m)
    # rounding: a permutation that gives the same split must count as equal
    extreme = (values[1:] >= values[0] - 1e-12).sum()
    return float(values[0]), float((1 + extreme) / (num_permutations + 1))


def classifier_accuracy(a: Floats, b: Floats, classifier: Any = None, seed: int = 0) -> tuple[float, float]:
    """How often a classifier tells which side a draw is from, and the p-value that it only guesses.

    The classifier is trained on half of the draws, and its accuracy is that on the other half: 1/2 where the two sides
    have one distribution.

    Parameters
    ----------
    a, b
        Independent draws, shape (n, d) and (m, d); of the longer side, evenly spaced ones are taken.
    classifier
        scikit-learn classifier; by default a forest of 200 trees.
    seed
        Of the halves and the forest.

    Returns
    -------
    tuple of float
        The accuracy, and the probability of one as high by fair coins.

    Raises
    ------
    ImportError
        Without scikit-learn.

    References
    ----------
    Lopez-Paz, Oquab (2017), Revisiting Classifier Two-Sample Tests.
    """
    _check(a, b)
    try:
        from sklearn.base import clone
        from sklearn.ensemble import RandomForestClassifier
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError(
            'the classifier two-sample test needs scikit-learn: pip install "pyro_elbo_ext[comparison]"'
        ) from error

    size = min(len(a), len(b))
    if size < 4:
        raise ValueError(f"at least 4 draws are needed on each side, got {len(a)} and {len(b)}")
    features = np.concatenate([spaced(a, size), spaced(b, size)])
    sides = np.repeat([0, 1], size)
    train, test, train_sides, test_sides = train_test_split(
        features, sides, test_size=0.5, stratify=sides, random_state=seed
    )
    if classifier is None:
        classifier = RandomForestClassifier(n_estimators=200, min_samples_leaf=5, random_state=seed)
    right = int((clone(classifier).fit(train, train_sides).predict(test) == test_sides).sum())
    return right / len(test), float(stats.binomtest(right, len(test), alternative="greater").pvalue)


def spaced(draws: Floats, size: int) -> Floats:
    """Evenly spaced rows, at most ``size`` of them."""
    if len(draws) <= size:
        return draws
    return draws[np.linspace(0, len(draws) - 1, size).round().astype(int)]


def _check(a: Floats, b: Floats) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"draws must have shapes (n, d) and (m, d), got {a.shape} and {b.shape}")
    for which, draws in (("first", a), ("second", b)):
        if not draws.size:
            raise ValueError(f"the {which} side has no draws")
        if not np.isfinite(draws).all():
            raise ValueError(f"the {which} side has {int((~np.isfinite(draws)).sum())} NaN or infinite numbers")
