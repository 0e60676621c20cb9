"""A guide for a log density, made and fitted without tuning, and what is known about it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from pyro_elbo_ext.automatic.ascent import Fit, fit_gaussian
from pyro_elbo_ext.automatic.evaluations import LARGE, Evaluations, TooManyGradients
from pyro_elbo_ext.automatic.flow import FlowGuide, bend, look_through
from pyro_elbo_ext.automatic.gaussian import Gaussian, triangular
from pyro_elbo_ext.automatic.guide import DiagonalGuide, GaussianGuide, UnconstrainedGuide
from pyro_elbo_ext.automatic.modes import Modes
from pyro_elbo_ext.automatic.moments import Weighted, distance_of, look, match_moments
from pyro_elbo_ext.automatic.search import search_modes, told
from pyro_elbo_ext.automatic.starting import find_start
from pyro_elbo_ext.density import LogDensity
from pyro_elbo_ext.evidence.importance import khat_threshold

FULL_COVARIANCE = 500  # coordinates up to which the covariance is a full one
CHECK_DRAWS = 4000  # for ELBO, k-hat and moments of the result; half of it where these are dear
GOOD = 0.1  # distance up to which a guide is good, as `diagnose` has it
SEARCH_DRAWS = 1000  # of the guide, for the search for other modes


@dataclass(frozen=True, eq=False)
class Approximation:
    """A fitted guide.

    Attributes
    ----------
    guide : UnconstrainedGuide
        A Pyro guide: an ``nn.Module`` with its parameters.
    family : str
        "gaussian" (full covariance), "diagonal" or "flow".
    elbo, elbo_se : float
        In nats, with its standard error, from draws that had no part in the fit.
    converged : bool
        Whether what could still be gained and the Monte Carlo errors were small at the end.
    reason : str
        Why it ended.
    notes : list of str
        What else should be known: other modes, moments that were matched, draws without a density.
    gradients : int
        Gradient evaluations, all included.
    seconds : float
        Without tracing and compiling the density.
    path : list of dict
        One entry per step: ``step``, ``elbo``, ``gradients``, ``draws``, ``step_size``, ``gain``, ``error``; see `Fit`.
    khat, khat_threshold, num_draws, ess
        Pareto k-hat of the importance weights of ``num_draws`` draws, what it must stay below, and the effective draws
        that they leave.
    distance : float
        Largest difference in a mean, in sds, or in a log sd between guide and posterior, by importance weights; NaN where
        these cannot tell, or where it has not converged.
    gain, gain_se, khat_before : float
        Of a flow: its ELBO less that of the Gaussian it starts from, in nats, with its standard error, and the Gaussian's
        k-hat; else NaN.
    modes : Modes or str
        The posterior's modes, with their weights and the share of the guide's draws about each; or why they were not looked
        for.
    next_guide : str
        What to try where the family is not enough, else empty.
    """

    guide: UnconstrainedGuide
    family: str
    elbo: float
    elbo_se: float
    converged: bool
    reason: str
    gradients: int
    seconds: float
    khat: float
    khat_threshold: float
    num_draws: int
    distance: float
    path: list[dict[str, float]] = field(repr=False)
    notes: list[str] = field(default_factory=list)
    next_guide: str = ""
    ess: float = math.nan
    gain: float = math.nan
    gain_se: float = math.nan
    khat_before: float = math.nan
    modes: Modes | str = "not looked for"


def approximate(
    density: LogDensity,
    *,
    family: Literal["auto", "gaussian", "diagonal", "flow"] = "auto",
    seed: int = 0,
    max_gradients: int = 1_000_000,
    start: Approximation | None = None,
    progress: Callable[[dict[str, float]], None] | None = None,
) -> Approximation:
    """Fit a guide to a log density.

    A Gaussian on unconstrained space starts from the best Laplace approximation along several climbs, or a mean-field one
    (`find_start`), and moves to the greatest ELBO by natural-gradient and quasi-Newton steps (`fit_gaussian`). Where the
    importance weights are good and say that its means or sds are off, they are set to the weighted draws'
    (`match_moments`), which costs a little of the ELBO. Other modes are looked for (`search_modes`); where the heaviest is
    another one, the Gaussian is fitted once more from there.

    Parameters
    ----------
    density
        Log density, compiled or not: what is not compiled is evaluated as a graph on whole batches, which takes no
        compilation.
    family
        "gaussian", with full covariance; "diagonal"; "flow", a normalizing flow from the Gaussian; "auto": "gaussian" up to
        `FULL_COVARIANCE` coordinates, else "diagonal".
    seed
        Same seed, same guide.
    max_gradients
        Cap on gradient evaluations.
    start
        A Gaussian that was fitted to the same density: nothing else is looked for, and where it has converged it is left
        as it is.
    progress
        Called after each step with its entry of the path.

    Returns
    -------
    Approximation
        Also where it has not converged, which ``converged`` and ``reason`` say.

    Raises
    ------
    ValueError
        For arguments out of range; a density that is nowhere finite, or improper; a site whose support depends on another
        latent site. Each names the site.
    """
    if family not in ("auto", "gaussian", "diagonal", "flow"):
        raise ValueError(f"family must be 'auto', 'gaussian', 'diagonal' or 'flow', got {family!r}")
    if max_gradients < 1:
        raise ValueError(f"max_gradients must be at least 1, got {max_gradients}")
    if start is not None and not isinstance(start.guide, DiagonalGuide | GaussianGuide):
        raise ValueError(f"start must be a Gaussian, got a {start.family}")
    if family == "flow" and density.dim > FULL_COVARIANCE:
        raise ValueError(f"family='flow' is for up to {FULL_COVARIANCE} coordinates, the model has {density.dim}")
    began = time.perf_counter()
    diagonal = family == "diagonal" or (family == "auto" and density.dim > FULL_COVARIANCE)
    if not density.compiled and density.traced and not density.batched:
        density.compile()  # point by point, a graph is slow
    evaluate, rng = Evaluations(density, max_gradients), np.random.default_rng(seed)
    known: list[np.ndarray] = []  # other modes, as far as they are known
    if start is None:
        try:
            first, *rest = find_start(evaluate, rng, diagonal=diagonal).modes
        except TooManyGradients:
            raise ValueError(f"max_gradients={max_gradients} is not enough to find a starting point") from None
        beginning, known = first[0], [gaussian.loc for gaussian, _ in rest]
    else:
        assert isinstance(start.guide, DiagonalGuide | GaussianGuide)
        beginning = start.guide.gaussian
        if beginning.diagonal and not diagonal:
            beginning = Gaussian(beginning.loc, np.diag(beginning.factor))
    if start is not None and isinstance(start.modes, Modes):
        known = [mode.gaussian.loc for mode in start.modes.modes]
    modes: Modes | str = ""
    if start is not None and start.converged:
        fit = Fit(beginning, True, start.reason)
    else:
        fit = fit_gaussian(evaluate, beginning, rng, after_step=progress)
        modes = search_modes(density, *_drawn(density, fit.gaussian, rng), seed, known)
        if isinstance(modes, Modes) and modes.modes and modes.modes[0].missed and modes.modes[0].reliable:
            known = [mode.gaussian.loc for mode in modes.modes]  # the heaviest is another one: from there once more
            heaviest = modes.modes[0].gaussian
            again = Gaussian(heaviest.loc, heaviest.sd) if diagonal else heaviest
            fit = fit_gaussian(evaluate, again, rng, after_step=progress)
            modes = _both(modes, search_modes(density, *_drawn(density, fit.gaussian, rng), seed, known))
    check = Evaluations(density, 1 << 62)  # the cap is the fit's: the result is always looked at
    count = CHECK_DRAWS if density.native is not None or density.size <= LARGE else CHECK_DRAWS // 2
    notes: list[str] = []
    gain = gain_se = khat_before = np.nan
    why = ""  # the weights do not tell the distance
    guide: UnconstrainedGuide
    if family == "flow":
        gaussian = triangular(fit.gaussian)
        before, _ = look(check, gaussian, rng, count)
        flow, fit = bend(evaluate, gaussian, seed, fit.path, progress)
        weighted, gain, gain_se = look_through(check, gaussian, flow, rng, 4 * count)
        telling, khat_before = weighted, before.khat
        distance, why = distance_of(check, weighted, weighted)
        guide = FlowGuide(density, torch.from_numpy(gaussian.loc), torch.from_numpy(gaussian.factor), flow)
        notes.append(
            f"the flow's ELBO is {gain:.3g} ± {gain_se:.1g} nats above the Gaussian's; k-hat was {khat_before:.2f} and is "
            f"{weighted.khat:.2f}"
        )
    else:
        gaussian, distance = fit.gaussian, np.nan
        if fit.converged:
            matched = match_moments(check, gaussian, rng, count)
            gaussian, weighted, telling = matched.gaussian, matched.own, matched.many
            distance, why = matched.distance, matched.why
            notes += [matched.note] if matched.note else []
        else:
            weighted, telling = look(check, gaussian, rng, count)
        if diagonal:
            guide = DiagonalGuide(density, torch.from_numpy(gaussian.loc), torch.from_numpy(gaussian.sd))
        else:
            lower = triangular(gaussian).factor
            guide = GaussianGuide(density, torch.from_numpy(gaussian.loc), torch.from_numpy(lower))
    made = "diagonal" if diagonal else "flow" if family == "flow" else "gaussian"
    if not modes or family == "flow":
        posterior = guide.get_posterior()
        with torch.no_grad():
            drawn = posterior.sample((SEARCH_DRAWS,))
            log_q = posterior.log_prob(drawn).double().numpy()
        x = drawn.double().numpy()
        again_found = search_modes(density, x, check(x)[0] - log_q, seed, known)
        modes = _both(modes, again_found) if isinstance(modes, Modes) else again_found
    notes.append(told(modes, check))
    rivals = isinstance(modes, Modes) and bool(modes.missed)
    if weighted.outside:
        notes.append(f"the log density is not finite at {weighted.outside} of {weighted.num_draws} draws")
    return Approximation(
        guide=guide,
        family=made,
        elbo=weighted.elbo,
        elbo_se=weighted.elbo_se,
        converged=fit.converged and not weighted.outside,
        reason=fit.reason,
        gradients=evaluate.gradients + check.gradients + (modes.gradients if isinstance(modes, Modes) else 0),
        seconds=time.perf_counter() - began,
        khat=weighted.khat,
        khat_threshold=khat_threshold(weighted.num_draws),
        num_draws=weighted.num_draws,
        ess=weighted.ess,
        distance=distance,
        path=fit.path,
        notes=notes,
        next_guide=_advice(made, fit.converged, weighted, telling, distance, why, rivals),
        gain=gain,
        gain_se=gain_se,
        khat_before=khat_before,
        modes=modes,
    )


def _drawn(density: LogDensity, gaussian: Gaussian, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draws of a Gaussian with their log weights."""
    noise = rng.standard_normal((SEARCH_DRAWS, density.dim))
    log_q = -0.5 * (noise**2).sum(1) - 0.5 * density.dim * np.log(2 * np.pi) - gaussian.log_volume
    draws = gaussian.at(noise)
    return draws, Evaluations(density, 1 << 62)(draws)[0] - log_q


def _both(first: Modes, second: Modes | str) -> Modes | str:
    """The second search with the gradients of both."""
    return replace(second, gradients=first.gradients + second.gradients) if isinstance(second, Modes) else second


def _advice(
    family: str,
    converged: bool,
    own: Weighted,
    telling: Weighted,
    distance: float,
    why: str,
    rivals: bool,
) -> str:
    """What to try where a family is not enough, by its own draws and those whose weights tell the distance, if any do.

    Weights of too heavy a tail are an answer too: the guide is so far off that they cannot tell how far. A wider guide's
    weights are the better ones, so that where even they are bad the guide's own are, whatever their k-hat is estimated at.
    """
    reasons = []
    if rivals:
        reasons.append("there are other modes")
    if distance > GOOD:
        reasons.append(f"a mean or log sd is {distance:.2f} off, by importance weights")
    elif np.isnan(distance) and not own.good:
        reasons.append(f"k-hat {own.khat:.2f} is not below {khat_threshold(own.num_draws):.2f}")
    elif np.isnan(distance) and not telling.good:
        limit = khat_threshold(telling.num_draws)
        reasons.append(f"k-hat of draws spread wider, {telling.khat:.2f}, is not below {limit:.2f}")
    elif np.isnan(distance) and why and not telling.outside:
        reasons.append(why)
    if not converged:  # so that it does not tell what the family can do
        reasons.insert(0, "it has not converged")
        return (
            f"The {family} guide is not to be relied on: {' and '.join(reasons)}. "
            "Try another seed, a larger max_gradients, or run_nuts."
        )
    if reasons:
        more = {"diagonal": "guide='gaussian'", "gaussian": "result.refine() (a flow), or run_nuts", "flow": "run_nuts"}
        remedy = more[family]
        if rivals:  # neither a flow nor a chain of NUTS crosses between them
            remedy = (
                "a mixture with a component for each mode, of these weights; or, for what is in this mode, " + remedy
            )
        return f"A {family} guide is not enough: {' and '.join(reasons)}. Try {remedy}."
    if np.isnan(distance):
        return (
            f"Whether a {family} guide is enough importance weights cannot tell, since the log density is not finite at "
            f"{telling.outside} of {telling.num_draws} draws; diagnose can."
        )
    return ""
