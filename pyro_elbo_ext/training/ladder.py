"""`fit` with ``accuracy``: from the Gaussian up, rung by rung, until draws are as near the posterior as was asked for."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import xarray as xr

from pyro_elbo_ext.automatic.centering import centred_in_part, centredness
from pyro_elbo_ext.automatic.guide import DiagonalGuide, GaussianGuide
from pyro_elbo_ext.automatic.modes import Modes
from pyro_elbo_ext.density import LogDensity
from pyro_elbo_ext.diagnosis.many_chains import split_rhat
from pyro_elbo_ext.inference_data.arviz_statistics import effective_size, pareto_smoothed
from pyro_elbo_ext.inference_data.export import dataset_of
from pyro_elbo_ext.mcmc import run_nuts
from pyro_elbo_ext.programs.arguments import check_fraction
from pyro_elbo_ext.training.automatic_fit import AutomaticFit, Rung, fit_automatically
from pyro_elbo_ext.training.callbacks import CallbackList
from pyro_elbo_ext.training.mode_chains import CannotTell, chains_by_mode, error_by_weights, put_together

FLOW = 100  # coordinates up to which a flow is tried
CHAINS, DRAWS = 4, 1000
SEVERAL = 8  # chains, from all over the place, where modes have no weights that are known
RHAT, DIVERGING = 1.01, 0.001  # of the chains, at most: a share of divergences that small is no place left out
HEAVY, FINITE_VARIANCE = 2.2, 0.5  # sd of a scalar's squares from which on their k-hat is looked at, and its limit
ATTEMPTS: tuple[dict[str, Any], ...] = ({}, {"target_accept": 0.97, "warmup": 1000, "num_samples": 2 * DRAWS})


def climb(
    model: Callable[..., Any] | LogDensity,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    accuracy: float,
    *,
    seed: int | None,
    progress: bool,
    callbacks: CallbackList | None = None,
    settings: Mapping[str, Any] | None = None,
) -> AutomaticFit:
    """A Gaussian; where that is not enough NUTS from its draws; where that is not, a flow on top of the Gaussian.

    NUTS comes before the flow since it takes less time where it does, and shows where it does not. The result has the draws
    of the rung that is enough, or those of NUTS, and says which; see `fit`.
    """
    check_fraction("accuracy", accuracy)
    result = fit_automatically(
        model, "auto", args, kwargs, seed=seed, progress=progress, callbacks=callbacks, settings=settings
    )
    rungs = [_of_guide(result, accuracy)]
    modes = result.approximation.modes
    several = modes if isinstance(modes, Modes) and modes.missed else None
    if not rungs[-1].enough and several is None:
        other = _centred_in_part(result, seed, progress)
        if other is not None:
            rungs.append(_of_guide(other, accuracy)._replace(rung=f"{other.approximation.family}, centred in part"))
            if rungs[-1].enough or other.elbo > result.elbo:
                result = other
    if not rungs[-1].enough:
        chains, rung = _by_nuts(result, accuracy, several, seed, progress)
        rungs.append(rung)
        if not rung.enough and several is None and result.converged and result.density.dim <= FLOW:
            flow = result.refine(seed=seed, progress=progress)
            rungs.append(_of_guide(flow, accuracy))
            if rungs[-1].enough:
                result = flow
        if not rungs[-1].enough or rung.enough:
            result.chains = chains
    result.rungs = rungs
    return result


def _centred_in_part(result: AutomaticFit, seed: int | None, progress: bool) -> AutomaticFit | None:
    """The Gaussian of the same model in better coordinates, where there are any."""
    guide = result.approximation.guide
    assert isinstance(guide, DiagonalGuide | GaussianGuide)
    if not (shares := centredness(result.density, guide.gaussian)):
        return None
    model = centred_in_part(result.model, shares)
    return fit_automatically(model, "auto", result.args, result.kwargs, seed=seed, progress=progress)


def _of_guide(result: AutomaticFit, accuracy: float) -> Rung:
    found = result.approximation
    # what the weights say is known to that of their effective draws
    most = found.distance + 2 / math.sqrt(found.ess)
    says = found.next_guide
    if not says:
        says = f"means and log sds are {found.distance:.2f} off, {most:.2f} at most, by importance weights"
    enough = found.converged and not found.next_guide and most <= accuracy
    return Rung(found.family, enough, found.distance, found.elbo, found.gradients, result.seconds, says)


def _by_nuts(
    result: AutomaticFit, accuracy: float, modes: Modes | None, seed: int | None, progress: bool
) -> tuple[Any, Rung]:
    """Chains that start at the guide's draws, or, where there are other modes than the guide's, in each of them."""
    began, density = time.monotonic(), result.density
    density.compile(one_thread=True)
    gradients, chains, problems, says, distance = 0, None, list[str](), "", math.nan
    for attempt in ATTEMPTS:
        options = {
            "chains": CHAINS,
            "num_samples": DRAWS,
            "seed": 0 if seed is None else seed,
            "progress": progress,
            **attempt,
        }
        by_weights = 0.0
        if modes is None:
            parts = [chains := run_nuts(density, start=result, **options)]
        else:
            try:
                parts, kept = chains_by_mode(density, modes, **options)
            except CannotTell as error:
                parts = [chains := run_nuts(density, **{**options, "chains": SEVERAL})]
                says = f"{error}; chains from all over: "
            else:
                chains, by_weights = put_together(parts, kept), error_by_weights(parts, kept)
                says = f"chains in each of {len(kept)} modes, by their weights: "
        statistics = [dataset_of(part, "sample_stats") for part in parts]
        gradients += sum(int(part["n_steps"].sum()) for part in statistics)
        agreements = [_agreement(dataset_of(part)) for part in parts]
        rhat, ess = max(one[0] for one in agreements), min(one[1] for one in agreements)
        by_chains = max(one[2] for one in agreements)
        diverging = max(float(part["diverging"].mean()) for part in statistics)
        distance = math.hypot(by_chains, by_weights)
        problems = [
            *([f"R-hat {rhat:.3f} is not below {RHAT}"] if not rhat < RHAT else []),
            *(["a scalar has so heavy tails that draws do not tell its sd"] if distance == math.inf else []),
            *([f"means and log sds are known to ± {distance:.2f} only"] if accuracy < 2 * distance < math.inf else []),
            *([f"{diverging:.1%} of the draws diverged"] if diverging > DIVERGING else []),
        ]
        if not problems:
            says += f"R-hat {rhat:.3f}, {ess:.0f} effective draws"
            break
    if problems:
        says += f"{'; '.join(problems)}. Write the model in another parameterization"
        says += ", or with its modes told apart." if modes is not None else "."
        distance = math.nan
    return chains, Rung("nuts", not problems, distance, math.nan, gradients, time.monotonic() - began, says)


def _agreement(posterior: xr.Dataset) -> tuple[float, float, float]:
    """Largest R-hat, fewest effective draws, and largest standard error of a mean, in sds, or log sd, of what varies.

    Squared deviations have effective draws of their own, and a spread that heavy tails make large; infinite where these are
    so heavy that draws do not tell an sd.
    """
    rhat, ess, error = 1.0, math.inf, 0.0
    for variable in posterior.data_vars.values():
        draws = variable.transpose("chain", "draw", ...).values.astype(float)
        draws = draws.reshape(*draws.shape[:2], -1)
        draws = draws[..., draws.std((0, 1)) > 1e-12 * np.abs(draws).max((0, 1), initial=0.0)]
        if not draws.shape[-1]:
            continue
        rhat = max(rhat, float(np.max(np.nan_to_num(split_rhat(draws), nan=np.inf))))
        squares = ((draws - draws.mean((0, 1))) / draws.std((0, 1))) ** 2
        for column, square in zip(np.moveaxis(draws, -1, 0), np.moveaxis(squares, -1, 0), strict=True):
            own = effective_size(column)
            of_log_sd = 0.5 * float(square.std()) / math.sqrt(effective_size(square)) if square.std() > 0 else 0.0
            if square.std() > HEAVY and pareto_smoothed(np.log(square.ravel() + 1e-300))[1] >= FINITE_VARIANCE:
                of_log_sd = math.inf
            ess, error = min(ess, own), max(error, 1 / math.sqrt(own), of_log_sd)
    return rhat, ess, error
