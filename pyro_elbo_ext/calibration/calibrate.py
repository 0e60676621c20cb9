"""Is a guide with its training recipe calibrated?  Simulation-based calibration and its form for variational inference."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import cloudpickle
import numpy as np
import pandas as pd
import pyro
import torch
import xarray as xr
from joblib import Parallel, delayed, effective_n_jobs
from numpy.typing import NDArray
from pyro import poutine
from tqdm import tqdm

from pyro_elbo_ext.calibration.files import Folder
from pyro_elbo_ext.calibration.rank_tests import holm, symmetric_ks, uniform_chi2, uniform_ks
from pyro_elbo_ext.calibration.simulation import Failed, Job, Ranked, data_of_simulation, prior_run, run_simulation
from pyro_elbo_ext.inference_data.draws import data_of, to_numpy
from pyro_elbo_ext.inference_data.export import to_arviz
from pyro_elbo_ext.inference_data.labels import Labels, scalar_label
from pyro_elbo_ext.programs.randomness import untouched
from pyro_elbo_ext.programs.running import check_callable

DIM = "simulation"
ALPHA = 0.05
FEW = 100


class Calibration:
    """Ranks of true parameters among draws of what a recipe fits to their data; made by `simulate_calibration`.

    Attributes
    ----------
    ranks : xarray.Dataset
        Parameter to the number of draws below the truth, 0 to ``num_draws``, ties broken at random; dims
        ``(simulation, *plates, *event)``, as are those of the next two.
    probabilities : xarray.Dataset
        ``P_q(theta > truth)``, a tie counting half.
    truth, means, sds : xarray.Dataset
        True parameters, and mean and standard deviation of the draws.
    num_draws : int
        L, draws per simulation.
    num_simulations : int
        Simulations asked for; those that failed have no ranks.
    failures : pandas.DataFrame
        Indexed by simulation; columns ``error``, ``message`` and ``traceback``.
    """

    def __init__(
        self,
        results: Sequence[Ranked],
        failures: Sequence[Failed],
        labels: Labels,
        nodes: Mapping[str, Any],
        num_draws: int,
    ) -> None:
        self.num_draws, self.num_simulations = num_draws, len(results) + len(failures)
        index = np.array([result.index for result in results])

        def dataset(quantity: str) -> xr.Dataset:
            names = results[0].values[quantity]
            arrays = {name: np.stack([result.values[quantity][name] for result in results]) for name in names}
            return labels.dataset(arrays, nodes, (DIM,)).assign_coords({DIM: index})

        self.ranks, self.truth = dataset("rank"), dataset("truth")
        self.means, self.sds = dataset("mean"), dataset("sd")
        self._twice_above = dataset("above")
        self.probabilities = self._twice_above / (2 * num_draws)
        self.failures = pd.DataFrame(
            [(f.error, f.message, f.traceback) for f in failures],
            columns=["error", "message", "traceback"],
            index=pd.Index([f.index for f in failures], name=DIM, dtype=np.int64),
        )
        self._table = self._test()

    @property
    def parameters(self) -> list[str]:
        """Names of the scalar parameters."""
        return list(self._table.index)

    def of(self, parameter: str, quantity: Literal["ranks", "probabilities", "truth", "means", "sds"]) -> NDArray[Any]:
        """One scalar parameter's values of a quantity, shape (finished simulations,)."""
        for label, values in _scalars(getattr(self, quantity)):
            if label == parameter:
                return values
        raise KeyError(f"'{parameter}' was not ranked; the parameters are {self.parameters}")

    def to_dataframe(self) -> pd.DataFrame:
        """One row per scalar parameter.

        Returns
        -------
        pandas.DataFrame
            Indexed by ``parameter``.

            ``chi2_p_value``, ``ks_p_value``
                Two tests that ranks are uniform (Talts et al. 2018).
            ``sbc_p_value``
                Twice the smaller of the two, at most 1; ``sbc_adjusted`` is it adjusted for the number of parameters (Holm).
            ``symmetry_p_value``
                That ``p = P_q(theta > truth)`` is distributed as ``1 - p`` (Yao et al. 2018), by the exact
                distribution of their Kolmogorov-Smirnov distance; ``symmetry_adjusted`` as above.
            ``bias``, ``bias_error``
                Mean of p less 1/2, above 0 where the guide lies too high, and its standard error.
            ``z_mean``, ``z_sd``
                Mean and standard deviation of ``(mean - truth) / sd``; 0 and 1 for a Gaussian posterior hit exactly. An sd
                above 1: the guide is too narrow.
            ``contraction``
                1 less the mean variance of the draws over the prior's variance: near 0, the data tell nothing.
        """
        return self._table.copy()

    def passes(self, alpha: float = ALPHA, test: Literal["both", "sbc", "vsbc"] = "both") -> bool:
        """Whether no scalar parameter is rejected.

        Parameters
        ----------
        alpha
            Probability that a calibrated recipe is rejected by a test, over all parameters.
        test
            "sbc": uniform ranks, the draws have the posterior's distribution. "vsbc": symmetric p, no bias to one
            side, as of a guide whose means can be used though its widths are wrong.
        """
        columns = {"sbc": ["sbc_adjusted"], "vsbc": ["symmetry_adjusted"]}
        columns["both"] = columns["sbc"] + columns["vsbc"]
        if test not in columns:
            raise ValueError(f"test must be one of {', '.join(columns)}, got {test!r}")
        if not 0 < alpha < 1:
            raise ValueError(f"alpha must be between 0 and 1, got {alpha}")
        return bool((self._table[columns[test]] >= alpha).all(axis=None))

    @property
    def verdict(self) -> str:
        """Failures, and both tests at a level of 5%, in a few lines."""
        finished = self.ranks.sizes[DIM]
        lines = [f"{finished} of {self.num_simulations} simulations, {len(self._table)} scalar parameters"]
        if finished < FEW:
            lines.append(f"fewer than {FEW} simulations show gross errors only")
        if len(self.failures):
            first_lines = (
                self.failures["error"] + ": " + self.failures["message"].str.split("\n").str[0].str.slice(0, 200)
            )
            examples = "; ".join(f"{count} times {text}" for text, count in first_lines.value_counts().head(3).items())
            lines.append(f"{len(self.failures)} failed and are left out, which biases what follows: {examples}")
        for test, column, good, bad in (
            ("SBC", "sbc_adjusted", "ranks look uniform", "not calibrated"),
            ("VSBC", "symmetry_adjusted", "no bias to one side seen", "biased"),
        ):
            failed = self._table[self._table[column] < ALPHA].sort_values(column)
            if failed.empty:
                lines.append(f"{test}: {good} (smallest adjusted p-value {self._table[column].min():.3f})")
                continue
            names = [f"{name} ({_fault(row)})" for name, row in failed.head(5).iterrows()]
            more = f" and {len(failed) - 5} more" if len(failed) > 5 else ""
            lines.append(f"{test}: {bad} in {', '.join(names)}{more}")
        return "\n".join(lines)

    def to_arviz(self) -> Any:
        """Ranks over L as ArviZ data, group ``prior_sbc``: ArviZ 1.x's ``plot_ecdf_pit`` takes it."""
        normalized = (self.ranks + 0.5) / (self.num_draws + 1)
        return to_arviz({"prior_sbc": normalized.rename({DIM: "draw"}).expand_dims(chain=[0])})

    def plot(self, max_parameters: int = 6) -> Any:
        """Rank ECDFs with simultaneous bands, and histograms of p; returns the matplotlib figure."""
        from pyro_elbo_ext.calibration.plots import plot_calibration

        return plot_calibration(self, max_parameters)

    def _test(self) -> pd.DataFrame:
        rows = {}
        others = zip(*(_scalars(data) for data in (self._twice_above, self.truth, self.means, self.sds)), strict=True)
        for (label, ranks), ((_, above), (_, truth), (_, mean), (_, sd)) in zip(
            _scalars(self.ranks), others, strict=True
        ):
            chi2, ks = uniform_chi2(ranks, self.num_draws), uniform_ks(ranks, self.num_draws)
            p = above / (2 * self.num_draws)
            with np.errstate(divide="ignore", invalid="ignore"):  # a point guide has sd 0, one simulation no sd
                z = (mean - truth) / sd
                count = ranks.size
                rows[label] = {
                    "chi2_p_value": chi2,
                    "ks_p_value": ks,
                    "sbc_p_value": min(1.0, 2 * min(chi2, ks)),
                    "symmetry_p_value": symmetric_ks(above - self.num_draws)[1],
                    "bias": p.mean() - 0.5,
                    "bias_error": p.std(ddof=1) / count**0.5 if count > 1 else np.nan,
                    "z_mean": z.mean(),
                    "z_sd": z.std(ddof=1) if count > 1 else np.nan,
                    "contraction": 1 - (sd**2).mean() / truth.var(ddof=1) if count > 1 else np.nan,
                }
        table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("parameter")
        table.insert(3, "sbc_adjusted", holm(table["sbc_p_value"].to_numpy()))
        table.insert(5, "symmetry_adjusted", holm(table["symmetry_p_value"].to_numpy()))
        return table

    def __repr__(self) -> str:
        return f"{self._table.round(3).to_string()}\n{self.verdict}"

    def _repr_html_(self) -> str:
        lines = self.verdict.replace("&", "&amp;").replace("<", "&lt;").replace("\n", "<br>")
        return f"<p>{lines}</p>{self._table.round(3).to_html()}"


def simulate_calibration(
    model: Callable[..., Any],
    recipe: Callable[..., Any],
    *args: Any,
    num_simulations: int = 200,
    num_draws: int = 999,
    observed_sites: Iterable[str] | None = None,
    var_names: Iterable[str] | None = None,
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str | None]] | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Calibration:
    """Try a recipe on data simulated from the model, and rank the true parameters among its draws.

    Each simulation draws parameters and data from the model, calls the recipe on the data, and counts how many of its
    draws are below the true parameters. If the recipe gives exact posteriors, the ranks are uniform (Talts et al. 2018).
    A variational family that is too simple fails that for sure; whether it is at least centered where it should be is what
    symmetry of ``P_q(theta > truth)`` about 1/2 tells (Yao et al. 2018).

    Simulations run through joblib, one after the other unless the caller says otherwise::

        with joblib.parallel_config(backend="loky", n_jobs=4):  # or "dask", or "ray"
            simulate_calibration(...)

    Each has its own seed, its own copies of model, recipe and arguments, and a parameter store that is empty at first; the
    result does not depend on where and in which order they run, save for rounding. In threads they take turns, since
    Pyro's state belongs to the process. Modules that are globals of an imported file are not copied: pass them as arguments,
    or make them in the recipe.

    Parameters
    ----------
    model
        Pyro model, called as ``model(*args, **kwargs)``, with ``obs=data`` as ever: its observed sites are drawn anew. Its
        parameters (``pyro.param``, modules) are at their initial values there. Model keywords with the name of a
        parameter below need ``functools.partial``.
    recipe
        Called as ``recipe(data, model, *args, **kwargs)``: ``data`` maps observed sites to simulated tensors, ``model`` is
        conditioned on them. An argument that holds the real data, equal to an observed site's value, holds the simulated
        data instead. Returns a guide, which is called with the same arguments; or a mapping from parameter to
        array of shape ``(num_draws, *shape)``; or ArviZ data with chain * draw = num_draws. Draws must be independent: thin
        those of MCMC. `TrainGuide` is such a recipe.
    num_simulations
        N. With 200 and one parameter, an sd too small by a fifth is found about half of the time.
    num_draws
        L. For the chi-squared test L + 1 is best a multiple of 20.
    observed_sites
        Sites that are data although the arguments hold none (``obs=None``), beside those that are observed.
    var_names
        Parameters to rank; by default all latent sites. Deterministic sites may be named too.
    seed
        Same seed, same result; the random number generators are left as they were.
    path
        Folder in which finished simulations are kept. Called again with the same path and settings, only those that are
        missing or failed are run. ``num_simulations`` may have grown.
    coords, dims
        As in ``from_pyro_svi``.
    progress
        Show a progress bar, with the number of failures.

    Returns
    -------
    Calibration
        Single failures are in its ``failures`` and its ``verdict``.

    Raises
    ------
    RuntimeError
        If all simulations fail; with the first error.
    ValueError
        If numbers are too small; if the model cannot be simulated (factors, improper priors, subsampling), has no
        data or no such parameter; if ``path`` holds another calibration.
    TypeError
        If model or recipe cannot be called, or pickled.

    References
    ----------
    Talts, Betancourt, Simpson, Vehtari, Gelman (2018), Validating Bayesian Inference Algorithms with Simulation-Based
    Calibration. Yao, Vehtari, Simpson, Gelman (2018), Yes, but Did It Work?: Evaluating Variational Inference.
    """
    for name, value, least in (("num_simulations", num_simulations, 1), ("num_draws", num_draws, 2), ("seed", seed, 0)):
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if operator.index(value) < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    check_callable(model, "model", args, kwargs)
    if not callable(recipe):
        raise TypeError(f"recipe must be callable, got {type(recipe).__name__}")
    observed = tuple([observed_sites] if isinstance(observed_sites, str) else observed_sites or ())
    with untouched(seed % 2**32):
        truth, data, trace = prior_run(model, args, kwargs, observed)
        data_arguments = _data_arguments(data_of(poutine.trace(model).get_trace(*args, **kwargs)), args, kwargs)
    if not data:
        raise ValueError("the model has no observed site: call it with its data, or name the sites in observed_sites")
    shapes = {name: tuple(truth[name].shape) for name in _parameters(truth, trace.nodes, var_names)}
    try:
        program = cloudpickle.dumps((model, recipe, args, kwargs))
    except Exception as error:
        raise TypeError(f"model, recipe and arguments must be picklable, to run anywhere: {error}") from error
    job = Job(
        program,
        observed,
        shapes,
        data_arguments,
        operator.index(num_draws),
        operator.index(seed),
        torch.get_default_dtype(),
        bool(pyro.infer.is_validation_enabled()),
    )
    labels = Labels(coords, dims, trace.nodes)
    for name, shape in shapes.items():
        if DIM in labels.of(name, shape, trace.nodes[name]):
            raise ValueError(f"'{name}' has a dim '{DIM}', which is that of the simulations: rename it by dims")
    labels.check_used()

    folder = None if path is None else Folder(path, _description(job, recipe, data))
    done = {} if folder is None else folder.read(num_simulations)
    for index in list(done)[:1]:
        if done[index].digest != data_of_simulation(job, index):
            raise ValueError(f"{path} was made with another model or other arguments. Pass another path.")
    failures: dict[int, Failed] = {}
    missing = [index for index in range(num_simulations) if index not in done]
    with tqdm(total=num_simulations, initial=len(done), desc="simulations", disable=not progress) as bar:
        for result in _finished(job, missing):
            if isinstance(result, Failed):
                failures[result.index] = result
                bar.set_postfix(failed=len(failures))
            else:
                done[result.index] = result
                if folder is not None:
                    folder.write(result)
            bar.update()
    if not done:
        first = failures[min(failures)]
        raise RuntimeError(
            f"all {num_simulations} simulations failed, the first with {first.error}: {first.message}\n{first.traceback}"
        )
    return Calibration(
        [done[index] for index in sorted(done)],
        [failures[index] for index in sorted(failures)],
        labels,
        trace.nodes,
        job.num_draws,
    )


def _finished(job: Job, indices: Sequence[int]) -> Iterator[Ranked | Failed]:
    """Results as they come, by the joblib backend that the caller has set."""
    try:
        parallel = Parallel(return_as="generator_unordered")
    except ValueError:
        # not every backend can hand out results one by one (Ray's): rounds, so that there are some to keep at all
        size = 4 * effective_n_jobs()
        with Parallel() as parallel:
            for start in range(0, len(indices), size):
                yield from parallel(delayed(run_simulation)(job, index) for index in indices[start : start + size])
        return
    yield from parallel(delayed(run_simulation)(job, index) for index in indices)


def _data_arguments(data: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[int | str, str]:
    found: dict[int | str, str] = {}
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for key, value in given:
        if isinstance(value, torch.Tensor | np.ndarray):
            array = to_numpy(value)
            for site, observed in data.items():
                other = to_numpy(observed)
                if array.ndim and np.array_equal(
                    array, other, equal_nan=array.dtype.kind in "fc" and other.dtype.kind in "fc"
                ):
                    found[key] = site
    return found


def _parameters(truth: Mapping[str, Any], nodes: Mapping[str, Any], var_names: Iterable[str] | None) -> list[str]:
    if var_names is None:
        names = [name for name in truth if not nodes[name]["infer"].get("_deterministic")]
    else:
        names = [var_names] if isinstance(var_names, str) else list(var_names)
        for name in names:
            if name not in truth:
                raise ValueError(f"var_names has '{name}', which is none of the model's parameters: {', '.join(truth)}")
    if not any(truth[name].numel() for name in names):
        raise ValueError("there is no parameter to rank: the model has no latent site, or var_names is empty")
    return names


def _description(job: Job, recipe: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """What a resumed calibration must have in common with the one before."""
    # functions have a name; an object may describe itself, but by default shows its address
    named = getattr(recipe, "__qualname__", type(recipe).__qualname__)
    described = repr(recipe)
    return {
        "format": 1,
        "seed": job.seed,
        "num_draws": job.num_draws,
        "shapes": job.shapes,
        "data": {name: list(value.shape) for name, value in data.items()},
        "dtype": str(job.dtype),
        "recipe": named if " at 0x" in described else described,
    }


def _scalars(data: xr.Dataset) -> Iterator[tuple[str, NDArray[Any]]]:
    for name, array in data.data_vars.items():
        for index in np.ndindex(array.shape[1:]):
            yield scalar_label(str(name), array, index), array.values[(slice(None), *index)]


def _fault(row: Any) -> str:
    if row["symmetry_adjusted"] < ALPHA:
        return f"too {'high' if row['bias'] > 0 else 'low'}"
    if abs(row["z_sd"] - 1) > 0.1:  # more than chance for some 200 simulations
        return f"too {'narrow' if row['z_sd'] > 1 else 'wide'}"
    return "see its rank plot"
