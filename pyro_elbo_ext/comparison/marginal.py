"""How far an approximation's draws are from MCMC draws, one scalar parameter at a time and jointly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from pyro_elbo_ext.comparison.alignment import SIDES, Transformed, aligned, draws_of, with_transformed
from pyro_elbo_ext.comparison.distances import classifier_accuracy, mmd, sliced_wasserstein, spaced, whitened
from pyro_elbo_ext.comparison.ordering import HOW, OrderedBy, as_groups, in_order
from pyro_elbo_ext.comparison.states import are_states, compare_states, displayed, sentence
from pyro_elbo_ext.comparison.switching import EXCHANGEABLE, of_exchangeable, of_suspects
from pyro_elbo_ext.inference_data.arviz_statistics import effective_size
from pyro_elbo_ext.inference_data.labels import scalar_label
from pyro_elbo_ext.inference_data.names import named_as
from pyro_elbo_ext.programs.arguments import check_count, check_seed, names_of
from pyro_elbo_ext.programs.symmetry import Components

GOOD = 0.1  # MCMC sds of the mean, and log sds: below in both, the marginal can stand in for MCMC's
BAD = 0.5  # above in either, it cannot
UNTOLD = "not enough draws to tell"
CLEAR = 4.0  # standard errors above `BAD`, with which that is told however large they are
REPLICATES = 50  # block bootstrap replicates behind each Monte Carlo error
NAMED = 5  # scalars that a sentence names
ROUNDING = 1e-6  # relative range of draws that are one number
FIGURES = ("mean_diff", "log_sd_ratio", "wasserstein", "kolmogorov")


class Comparison:
    """Figures and verdict per scalar parameter; made by `compare_to_mcmc`.

    Attributes
    ----------
    table : pandas.DataFrame
        Indexed by parameter. For each figure F of ``mean_diff``, ``log_sd_ratio``, ``wasserstein``, ``kolmogorov``:
        ``F``, its standard error ``F_error`` and its noise floor ``F_floor``; and ``verdict``.
    approx, mcmc : dict
        Draws by scalar parameter, float64 arrays of shape (chain, draw).
    constant : dict
        Scalar parameters that are one number in all draws of both sides, as a part of a Cholesky factor is, and that number:
        they agree, and are not in the table.
    states : pandas.DataFrame
        Indexed by scalar of a discrete site, integers of at most 20 states: ``total_variation`` of the two
        distributions over them, ``total_variation_error``, ``total_variation_floor``, the number of ``states``, and
        ``verdict``. They are not in the other attributes.
    switching : str
        What is said of components that can trade places; empty if that changes no verdict.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        approx: dict[str, np.ndarray],
        mcmc: dict[str, np.ndarray],
        constant: Mapping[str, float] | None = None,
        states: pd.DataFrame | None = None,
        switching: str = "",
    ) -> None:
        self.table, self.approx, self.mcmc, self.constant = table, approx, mcmc, dict(constant or {})
        self.switching = switching
        self.states = pd.DataFrame() if states is None else states

    @property
    def verdict(self) -> str:
        """One line over all parameters."""
        counts = self.table["verdict"].value_counts()
        parts = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        judged = self.table[self.table["verdict"] != EXCHANGEABLE]
        worst = ""
        if len(judged):
            name = judged[["mean_diff", "log_sd_ratio"]].abs().max(axis=1).idxmax()
            row = judged.loc[name]
            worst = (
                f" Worst: {name}, mean off by {row['mean_diff']:+.2f} MCMC sd, log sd ratio {row['log_sd_ratio']:+.2f}"
            )
        switching = f". {self.switching}" if self.switching else ""
        rest = f"{self._about_draws()}{self._about_constant()}{self._about_states()}{switching}"
        return f"{len(self.table)} parameters: {parts}.{worst}{rest if worst else rest.removeprefix('.')}"

    def _about_states(self) -> str:
        return f". {sentence(self.states)}" if len(self.states) else ""

    def _about_draws(self) -> str:
        """How many draws would tell, where there are not enough: noise falls with their square root."""
        open_ = self.table[self.table["verdict"] == UNTOLD]
        if open_.empty:
            return ""
        threshold = np.where(open_[["mean_diff", "log_sd_ratio"]].abs().max(axis=1) > BAD, BAD, GOOD)
        noise = open_[[f"{name}_{what}" for name in FIGURES[:2] for what in ("error", "floor")]].abs().max(axis=1)
        times = math.ceil(float((noise / threshold).max()) ** 2)
        ours, theirs = (next(iter(side.values())).size for side in (self.approx, self.mcmc))
        return f". To tell takes about {times} times the {ours} draws of approx and {theirs} of mcmc"

    def _about_constant(self) -> str:
        if not self.constant:
            return ""
        names = list(self.constant)
        listed = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
        return f". Constant and equal on both sides, so not compared: {listed}"

    def to_dataframe(self) -> pd.DataFrame:
        """A copy of the table."""
        return self.table.copy()

    def joint(
        self,
        distances: Sequence[str] = ("sliced_wasserstein", "mmd"),
        *,
        max_draws: int = 1000,
        num_projections: int = 100,
        num_permutations: int = 200,
        classifier: Any = None,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Distances between the joint distributions of all compared parameters, which marginals can't show.

        All are taken in coordinates in which the MCMC draws have mean 0 and the identity as covariance, by the first half
        of each chain, and compare the second halves. Of both sides evenly spaced draws are taken, no more than are
        effectively independent.

        Parameters
        ----------
        distances
            Of "sliced_wasserstein"; "mmd", squared; "classifier", the accuracy of a classifier that is to tell the sides
            apart, 1/2 if it can't, which needs scikit-learn.
        max_draws
            Draws per side, at most. More find smaller differences.
        num_projections, num_permutations, classifier, seed
            As in `pyro_elbo_ext.comparison.distances`.

        Returns
        -------
        pandas.DataFrame
            Indexed by ``distance``: ``value``; ``floor``, the same between two halves of the MCMC draws compared,
            split by chains where there are several; ``p_value``, that both sides have one distribution, NaN for the sliced
            Wasserstein distance; ``floor_p_value``, which is small if the MCMC chains themselves disagree; ``draws`` per
            side and ``floor_draws`` per half. A half has fewer draws: the floor is rather too high.

        Raises
        ------
        ValueError
            For an unknown distance, or too few draws for the number of parameters.
        ImportError
            For "classifier" without scikit-learn.
        """
        functions: dict[str, Callable[[np.ndarray, np.ndarray], tuple[float, float]]] = {
            "sliced_wasserstein": lambda a, b: (sliced_wasserstein(a, b, num_projections, seed), np.nan),
            "mmd": lambda a, b: mmd(a, b, num_permutations, seed=seed),
            "classifier": lambda a, b: classifier_accuracy(a, b, classifier, seed),
        }
        for what, count in (
            ("max_draws", max_draws),
            ("num_projections", num_projections),
            ("num_permutations", num_permutations),
        ):
            check_count(what, count)
        check_seed(seed)
        for name in distances:
            if name not in functions:
                raise ValueError(f"unknown distance '{name}'; there are {', '.join(functions)}")
        # Draws are nearer to the covariance estimated from them than others of the same distribution are, which would
        # tell the sides apart in many dimensions: take the covariance from draws that are not compared.
        early, late = zip(*(np.array_split(draws, 2, axis=1) for draws in self.mcmc.values()), strict=True)
        firsts, seconds = zip(*map(_halves, late), strict=True)
        independent, reference = (min(map(effective_size, side.values())) for side in (self.approx, self.mcmc))
        size = int(min(max_draws, independent, reference / 2))
        if size < 8:
            raise ValueError(f"there are {size} independent draws on a side; joint distances need at least 8")
        a, b, half_a, half_b = (
            spaced(whitened(_columns(draws), _columns(early)), count)
            for draws, count in (
                (self.approx.values(), size),
                (late, size),
                (firsts, size // 2),
                (seconds, size // 2),
            )
        )
        rows = {}
        for name in distances:
            (value, p_value), (floor, floor_p_value) = functions[name](a, b), functions[name](half_a, half_b)
            rows[name] = {"value": value, "floor": floor, "p_value": p_value, "floor_p_value": floor_p_value}
            rows[name] |= {"draws": size, "floor_draws": size // 2}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("distance")

    def plot(self) -> Any:
        """Marginals overlaid, then a forest of all parameters; returns the matplotlib figure."""
        from pyro_elbo_ext.comparison.plots import plot_comparison

        return plot_comparison(self.table, self.approx, self.mcmc)

    def displayed(self) -> pd.DataFrame:
        """The table as text: figure ± standard error (noise floor)."""
        columns = {
            name: [
                f"{value:.3f} ± {error:.3f} ({floor:.3f})"
                for value, error, floor in zip(
                    self.table[name], self.table[f"{name}_error"], self.table[f"{name}_floor"], strict=True
                )
            ]
            for name in FIGURES
        }
        return pd.DataFrame({**columns, "verdict": self.table["verdict"]}, index=self.table.index)

    def __repr__(self) -> str:
        of_states = f"{displayed(self.states).to_string()}\n" if len(self.states) else ""
        return f"{self.displayed().to_string()}\n{of_states}figure ± standard error (noise floor)\n{self.verdict}"

    def _repr_html_(self) -> str:
        caption = "figure ± standard error (noise floor)"
        of_states = displayed(self.states).to_html() if len(self.states) else ""
        return f"<p>{self.verdict}</p>{self.displayed().to_html()}{of_states}<p>{caption}</p>"


def compare_to_mcmc(
    approx: Any,
    mcmc: Any,
    var_names: Iterable[str] | None = None,
    *,
    transformed: Transformed | None = None,
    components: Components | Iterable[Components] | None = None,
    ordered_by: OrderedBy | None = None,
) -> Comparison:
    """Compare an approximation's marginals with MCMC's; for the joint distribution see :meth:`Comparison.joint`.

    With m, s the MCMC mean and standard deviation of a scalar parameter, the figures are ``(mean - m) / s``,
    ``log(sd / s)``, the Wasserstein-1 distance over s, and the Kolmogorov distance. Each has a standard error, from a
    bootstrap of blocks of consecutive draws of both sides (Kuensch 1989; blocks of about the square root of a chain's
    length keep the autocorrelation), and a noise floor: the same figure between two halves of the MCMC draws, split by
    chains where there are several, else by draws.

    Per parameter the verdict is "bad" where mean_diff or log_sd_ratio exceeds `BAD`, "good" where both stay below
    `GOOD`, "means only" where only the mean does, else "rough"; "not enough draws to tell" where a standard error or
    noise floor of the two is above the threshold that decides, and the figure not far above it. Discrete sites (integers
    of few states) are compared by the probabilities of their states: the total variation, in ``states``.

    Parameters
    ----------
    approx, mcmc
        ArviZ data with a group ``posterior``, a Dataset, a mapping from name to array, shape (chain, draw, ...); or
        the path of a file: ArviZ's ``.nc``, or posteriordb's ``.npz``, ``.json`` or ``.zip`` with Stan's names.
    var_names
        Variables to compare; by default all of ``mcmc``.
    transformed
        Further variables: name to a function of a Dataset of draws, that returns draws, as
        ``{"theta": lambda draws: draws["mu"] + draws["tau"] * draws["z"]}``. Called for the sides that lack the name, with
        components in order where that is asked for.
    components
        What can trade places: :func:`~pyro_elbo_ext.exchangeable_components` of the model. A scalar of such components that
        is not good has the verdict "exchangeable", unless it is bad with the components' entries sorted too.
    ordered_by
        Site of exchangeable components: on both sides, in each draw, all that these components index is put in the order of
        this site's numbers, the smallest first, and the states of discrete sites are renumbered, before anything is
        compared. Of a site with several numbers for each component, ``("locs", 0)`` names the one that counts.

    Returns
    -------
    Comparison

    Raises
    ------
    KeyError
        If a variable is missing on a side.
    ValueError
        If shapes or labels differ, draws are NaN, infinite or fewer than four, or constant but not equal on both sides; the
        parameter is named. What is constant and equal on both sides is left out, and said. For ``ordered_by`` without
        ``components``, a site that these do not index, or variables whose place in the order is not known.
    """
    groups = as_groups(components)
    reference = draws_of(mcmc, "mcmc")
    left = named_as(draws_of(approx, "approx"), reference)
    if ordered_by is not None:
        if groups is None:
            raise ValueError(f"ordered_by needs to know what the components index: pass {HOW}")
        needed = list(reference.data_vars) if var_names is None else names_of("var_names", var_names)
        (left, _), (reference, groups) = (
            in_order(draws, groups, ordered_by, needed, side)
            for side, draws in zip(SIDES, (left, reference), strict=True)
        )
    left, right = with_transformed(left, reference, transformed or {})
    sides: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] = ({}, {})
    constant: dict[str, float] = {}
    states: dict[str, dict[str, float | str]] = {}
    pairs = aligned(left, right, var_names)
    for name, (a, b) in pairs.items():
        for index in np.ndindex(b.shape[2:]):
            label = scalar_label(name, b, index)
            ours, theirs = (
                _checked(label, side, array.values[(slice(None), slice(None), *index)])
                for side, array in zip(SIDES, (a, b), strict=True)
            )
            if are_states(a.values, b.values):
                states[label] = compare_states(ours, theirs, _resample, _halves, REPLICATES)
            elif _is_constant(label, ours, theirs):
                constant[label] = float(theirs.flat[0])
            else:
                sides[0][label], sides[1][label] = ours, theirs
    if not sides[1] and states:
        raise ValueError(f"{', '.join(list(states)[:NAMED])} are discrete; add a continuous variable to compare")
    if not sides[1]:
        raise ValueError(
            f"nothing to compare: {', '.join(list(constant)[:NAMED])} are constant and equal on both sides"
        )
    rows = {label: _row(sides[0][label], sides[1][label]) for label in sides[1]}
    switching = of_suspects(pairs, rows, _row) if groups is None else of_exchangeable(pairs, rows, states, groups, _row)
    tables = [pd.DataFrame.from_dict(found, orient="index").rename_axis("parameter") for found in (rows, states)]
    return Comparison(tables[0], *sides, constant, tables[1], switching)


def _is_constant(label: str, approx: np.ndarray, mcmc: np.ndarray) -> bool:
    """Whether both sides have one and the same number in all draws.

    Raises
    ------
    ValueError
        If only one of them is constant, or both at different numbers: this is a difference that no figure in sds can tell.
    """
    fixed = [side for side, draws in zip(SIDES, (approx, mcmc), strict=True) if _varies_not(draws)]
    if not fixed:
        return False
    if len(fixed) == 1:
        at = (approx if fixed[0] == SIDES[0] else mcmc).flat[0]
        raise ValueError(
            f"'{label}' is constant in {fixed[0]}, at {at:g}, and varies on the other side: the two differ, by more than "
            "sds can tell. Leave it out by var_names to compare the rest."
        )
    here, there = float(approx.flat[0]), float(mcmc.flat[0])
    if abs(here - there) > ROUNDING * max(abs(here), abs(there)):
        raise ValueError(
            f"'{label}' is constant on both sides, {here:g} in approx and {there:g} in mcmc: the two differ, by more than "
            "sds can tell. Leave it out by var_names to compare the rest."
        )
    return True


def _varies_not(draws: np.ndarray) -> bool:
    return bool(np.ptp(draws) <= ROUNDING * np.abs(draws).max())


def _checked(label: str, side: str, draws: np.ndarray) -> np.ndarray:
    draws = np.asarray(draws, dtype=np.float64)
    if draws.size < 4:
        raise ValueError(f"'{label}' has {draws.size} draws in {side}; at least 4 are needed")
    if not np.isfinite(draws).all():
        raise ValueError(f"'{label}' has {int((~np.isfinite(draws)).sum())} NaN or infinite draws in {side}")
    return draws


def _figures(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.ravel(), b.ravel()
    mean, scale = b.mean(), b.std(ddof=1)
    both = np.concatenate([a, b])
    order = np.argsort(both)
    steps = np.diff(both[order])
    from_a = np.cumsum(order < a.size)[:-1]
    # difference of the two empirical distribution functions between one draw and the next
    gap = np.abs(from_a / a.size - (np.arange(1, both.size) - from_a) / b.size)
    return np.array(
        [(a.mean() - mean) / scale, np.log(a.std(ddof=1) / scale), (gap * steps).sum() / scale, gap[steps > 0].max()]
    )


def _columns(draws: Iterable[np.ndarray]) -> np.ndarray:
    return np.stack([values.ravel() for values in draws], axis=-1)


def _halves(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    axis = 0 if draws.shape[0] > 1 else 1
    first, second = np.array_split(draws, 2, axis=axis)
    return first, second


def _resample(draws: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    chains, length = draws.shape
    block = max(1, round(length**0.5))
    count = -(-draws.size // block)
    start = rng.integers(0, length, count)[:, None] + np.arange(block)
    return draws[rng.integers(0, chains, count)[:, None], start % length].ravel()[: draws.size]


def _row(a: np.ndarray, b: np.ndarray) -> dict[str, float | str]:
    rng = np.random.default_rng(0)
    value, floor = _figures(a, b), _figures(*_halves(b))
    error = np.std([_figures(_resample(a, rng), _resample(b, rng)) for _ in range(REPLICATES)], axis=0, ddof=1)
    row: dict[str, float | str] = {}
    for i, name in enumerate(FIGURES):
        row |= {name: float(value[i]), f"{name}_error": float(error[i]), f"{name}_floor": float(floor[i])}
    noise = float(np.maximum(error[:2], np.abs(floor[:2])).max())
    return {**row, "verdict": _verdict(abs(value[0]), abs(value[1]), noise)}


def _verdict(mean_diff: float, log_sd_ratio: float, noise: float) -> str:
    bad = max(mean_diff, log_sd_ratio) > BAD
    clear = max(mean_diff, log_sd_ratio) > BAD + CLEAR * noise
    if noise > (BAD if bad else GOOD) and not clear:
        return UNTOLD
    if bad:
        return "bad"
    if mean_diff < GOOD:
        return "good" if log_sd_ratio < GOOD else "means only"
    return "rough"
