"""Discrete sites compared by the probabilities of their states."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

GOOD = 0.05  # total variation: below, the probabilities can stand in for MCMC's
BAD = 0.2  # above, they cannot
UNTOLD = "not enough draws to tell"
MOST_STATES = 20  # a count with more is compared as a number

Resample = Callable[[np.ndarray, np.random.Generator], np.ndarray]
Halves = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def are_states(approx: np.ndarray, mcmc: np.ndarray) -> bool:
    """Whether both sides are integers of few states."""
    if approx.dtype.kind not in "iub" or mcmc.dtype.kind not in "iub":
        return False
    return len(np.union1d(approx, mcmc)) <= MOST_STATES


def compare_states(
    approx: np.ndarray, mcmc: np.ndarray, resample: Resample, halves: Halves, replicates: int
) -> dict[str, float | str]:
    """Total variation of the two distributions over states, with its standard error and its noise floor.

    Half the sum of the absolute differences in probability: the most that the probability of any set of states differs.

    Parameters
    ----------
    approx, mcmc
        Draws of one scalar, shape (chain, draw).
    resample, halves
        Draws with replacement, by a generator; and the two halves of MCMC's.
    replicates
        Of the bootstrap.
    """
    rng, states = np.random.default_rng(0), np.union1d(approx, mcmc)

    def chances(draws: np.ndarray) -> np.ndarray:
        return (draws.reshape(-1, 1) == states).mean(0)

    def variation(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.abs(a - b).sum() / 2)

    gap = chances(approx) - chances(mcmc)
    value, floor = variation(chances(approx), chances(mcmc)), variation(*map(chances, halves(mcmc)))
    # of the differences around the one found: a total variation of noise alone would be above zero
    noise = [chances(resample(approx, rng)) - chances(resample(mcmc, rng)) - gap for _ in range(replicates)]
    error = float(np.sqrt(np.mean(np.square([np.abs(one).sum() / 2 for one in noise]))))
    limit = BAD if value > BAD else GOOD
    verdict = "bad" if value > BAD else "good" if value < GOOD else "rough"
    return {
        "total_variation": value,
        "total_variation_error": error,
        "total_variation_floor": floor,
        "states": len(states),
        "verdict": UNTOLD if error > limit else verdict,
    }


def displayed(table: pd.DataFrame) -> pd.DataFrame:
    """The table as text: total variation ± standard error (noise floor)."""
    columns = [table[f"total_variation{part}"] for part in ("", "_error", "_floor")]
    text = [f"{value:.3f} ± {error:.3f} ({floor:.3f})" for value, error, floor in zip(*columns, strict=True)]
    return pd.DataFrame(
        {"total_variation": text, "states": table["states"], "verdict": table["verdict"]}, index=table.index
    )


def sentence(table: pd.DataFrame) -> str:
    """One line over all discrete scalars."""
    parts = ", ".join(f"{count} {verdict}" for verdict, count in table["verdict"].value_counts().items())
    worst = table["total_variation"].idxmax()
    return (
        f"{len(table)} discrete: {parts}. Worst: {worst}, probabilities of its states off by "
        f"{table['total_variation'][worst]:.3f}"
    )
