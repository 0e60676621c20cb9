"""One search for modes, for guides of any kind: how many climbs, how long, from where."""

from __future__ import annotations

import numpy as np

from pyro_elbo_ext.automatic.dispersing import dispersed
from pyro_elbo_ext.automatic.evaluations import LARGE, Array, Evaluations
from pyro_elbo_ext.automatic.modes import Modes, find_modes, gaussian_of
from pyro_elbo_ext.density import LogDensity
from pyro_elbo_ext.density.points import prior_points

CLIMBS, FEWEST = 64, 16  # from points other than the prior's; the second where a density is dear
PRIOR, FEWEST_PRIOR = 24, 6  # the same from the prior's, each of which takes a run of the model
SITES = 50  # of a model whose runs take long
STEPS, FEWEST_STEPS = 100, 40  # of a climb
CANDIDATES, FEWEST_CANDIDATES = 12, 3  # ends of climbs that are looked at as modes
OPERATION, NUMBER = 2e-5, 2e-9  # seconds that an operation on a batch takes, and each number computed
SECONDS = 1.0  # that climbs should take, by these


def search_modes(
    density: LogDensity, draws: Array, log_weights: Array, seed: int, known: Array | None = None
) -> Modes | str:
    """The modes of a posterior, and which of them a guide has draws in; or why they were not looked for.

    Parameters
    ----------
    density
        Log density.
    draws
        Of the guide, unconstrained, shape (S, dim).
    log_weights
        Log density at these less the guide's, shape (S,); -inf where that is not known.
    seed
        Same seed, same answer.
    known
        Points that are climbed from too, as modes found before, shape (n, dim).
    """
    if not (density.traced or density.compiled):
        return "the model is not a graph, so that each gradient is a run of it"
    if not len(draws):
        return "no draw of the guide has a finite place in unconstrained space"
    evaluate, rng = Evaluations(density, 1 << 62), np.random.default_rng(seed)
    at_once = density.compiled or density.batched
    rows = CLIMBS if at_once and density.size <= LARGE else FEWEST
    call = (OPERATION * density.operations + NUMBER * density.size * rows) * (1 if at_once else rows)
    steps = int(np.clip(SECONDS / call, FEWEST_STEPS, STEPS))
    candidates = int(np.clip(SECONDS / (4 * call), FEWEST_CANDIDATES, CANDIDATES))
    prior, _ = prior_points(density, PRIOR if len(density.program.sites) <= SITES else FEWEST_PRIOR, seed)
    starts = dispersed(evaluate, rng, draws, gaussian_of(draws), prior.numpy(), rows)
    if known is not None and len(known):
        starts["known"] = known
    return find_modes(evaluate, rng, starts, draws, log_weights, steps=steps, candidates=candidates)
