"""One search for modes, for guides of any kind: how many climbs, how long, from where."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pyro_elbo_ext.automatic.dispersing import dispersed
from pyro_elbo_ext.automatic.evaluations import LARGE, Array, Evaluations
from pyro_elbo_ext.automatic.modes import LEAST, Mode, Modes, find_modes, gaussian_of
from pyro_elbo_ext.density import LogDensity
from pyro_elbo_ext.density.points import prior_points

CLIMBS, FEWEST = 64, 16  # from points other than the prior's; the second where a density is dear
PRIOR, FEWEST_PRIOR = 24, 6  # the same from the prior's, each of which takes a run of the model
SITES = 50  # of a model whose runs take long
STEPS, FEWEST_STEPS = 100, 40  # of a climb
CANDIDATES, FEWEST_CANDIDATES = 12, 3  # ends of climbs that are looked at as modes
OPERATION, NUMBER = 2e-5, 2e-9  # seconds that an operation on a batch takes, and each number computed
SECONDS = 1.0  # that climbs should take, by these
NAMED = 3  # entries of sites that tell where a mode is
KINDS = {
    "guide": "the guide's draws",
    "pushed": "these pushed outwards",
    "prior": "the prior's",
    "wide": "wide random points",
    "lines": "rises along lines outwards",
    "known": "modes found before",
}


def search_modes(
    density: LogDensity, draws: Array, log_weights: Array, seed: int, known: Sequence[Array] = ()
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
        Points that are climbed from too, as modes found before, shape (dim,) each.
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
    if len(known):
        starts["known"] = np.stack(list(known))
    return find_modes(evaluate, rng, starts, draws, log_weights, steps=steps, candidates=candidates)


def how_hard(modes: Modes) -> str:
    """How hard it was looked, in words."""
    kinds = ", ".join(f"{count} from {KINDS[kind]}" for kind, count in modes.climbs.items() if count)
    elsewhere = f", {modes.elsewhere} of which ended at no maximum," if modes.elsewhere else ""
    return f"{sum(modes.climbs.values())} climbs ({kinds}; {modes.gradients:,} gradients){elsewhere}"


def said_weight(mode: Mode) -> str:
    """A weight with its standard error, or as the bound that it is."""
    return f"{mode.weight:.2g} ± {mode.weight_se:.1g}" if mode.reliable else f"at least {mode.weight:.2g}"


def told(modes: Modes | str, evaluate: Evaluations) -> str:
    """What a search for modes has found, in a sentence."""
    if isinstance(modes, str):
        return f"other modes were not looked for: {modes}"
    found = [mode for mode in modes.modes if mode.missed]
    if not found:
        return f"other modes: none of weight {LEAST} or more in {sum(modes.climbs.values())} climbs"
    values = entries(evaluate, np.stack([mode.gaussian.loc for mode in modes.modes]))
    spread = {name: np.ptp(column) / (1e-3 + np.abs(column).max()) for name, column in values.items()}
    names = sorted(values, key=lambda name: -spread[name])[:NAMED]

    def one(index: int, mode: Mode) -> str:
        place = ", ".join(f"{name} = {values[name][index]:.3g}" for name in names)
        copy = "" if mode.copy_of is None else f", a copy of mode {mode.copy_of + 1} by a symmetry"
        own = (
            "the guide's"
            if mode.share > 0.5
            else "missed"
            if mode.missed
            else "minor"
            if mode.weight < LEAST
            else "shared"
        )
        return f"{said_weight(mode)} at {place} ({own}{copy})"

    shown = "; ".join(one(index, mode) for index, mode in enumerate(modes.modes))
    return (
        f"the posterior has other modes: {sum(modes.climbs.values())} climbs found {len(modes.modes)}, of weight {shown}. "
        "All other figures here are of what the guide covers"
    )


def entries(evaluate: Evaluations, x: Array) -> dict[str, Array]:
    """Every entry of every site at points of shape (n, dim), by name, shape (n,)."""
    found: dict[str, Array] = {}
    for name, value in evaluate.constrain(x).items():
        for index in np.ndindex(value.shape[1:]):
            label = f"{name}[{', '.join(map(str, index))}]" if index else name
            found[label] = np.asarray(value[(slice(None), *index)], float)
    return found
