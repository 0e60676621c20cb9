"""How many modes that a guide misses are found, and how many are that are none.

    python -m tests.benchmarks.modes [--seeds 10] [--only missed|alarms]

``missed``: guides at one of two modes, of two Gaussians (written as a ``pyro.factor``) or of a likelihood that is a mixture
(``MixtureSameFamily``), by weight of the guide's mode, distance in sds and dimensions. ``alarms``: the fitted Gaussian of
posteriors with one mode or none, by model.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import torch

from pyro_elbo_ext.automatic.approximate import approximate
from pyro_elbo_ext.automatic.modes import Modes
from pyro_elbo_ext.automatic.search import search_modes
from pyro_elbo_ext.density import LogDensity
from tests import automatic_models as am

DRAWS = 2000
ONE_MODE = [
    "logistic",
    "negative_binomial",
    "student_t",
    "horseshoe",
    "centred",
    "funnel",
    "correlation",
    "proportions",
]
ONE_MODE += ["random_effects", "badly_scaled", "single_precision"]


def as_factor(sds: np.ndarray, far: np.ndarray, weight: float) -> Callable[[], None]:
    """Two Gaussians with the same sds under a flat prior."""

    def model() -> None:
        with pyro.plate("i", len(sds)), pyro.poutine.mask(mask=False):
            z = pyro.sample("z", dist.Normal(0.0, 3 * float(np.abs(far).max()) + 5))
        first, second = (dist.Normal(torch.from_numpy(at), torch.from_numpy(sds)).log_prob(z) for at in (0 * far, far))
        both = torch.logaddexp(first.sum() + math.log(weight), second.sum() + math.log1p(-weight))
        pyro.factor("modes", both)

    return model


def as_likelihood(sds: np.ndarray, far: np.ndarray, weight: float) -> Callable[[], None]:
    """The same as the likelihood of one observation."""
    probs, origins = torch.tensor([weight, 1 - weight]), torch.from_numpy(np.stack([0 * far, far]))

    def model() -> None:
        with pyro.plate("i", len(sds)), pyro.poutine.mask(mask=False):
            z = pyro.sample("z", dist.Normal(0.0, 3 * float(np.abs(far).max()) + 5))
        parts = dist.Normal(z - origins, torch.from_numpy(sds)).to_event(1)
        pyro.sample(
            "y", dist.MixtureSameFamily(dist.Categorical(probs.double()), parts), obs=torch.zeros(len(sds)).double()
        )

    return model


def missed(seeds: int) -> None:
    print("| written as | dims | sds apart | weight missed | found | estimate, its sd | gradients | s |")
    print("|---|---|---|---|---|---|---|---|")
    for make in (as_factor, as_likelihood):
        for dim in (1, 5, 20):
            for apart in (4, 8, 20):
                for weight in (0.9, 0.5, 0.1):
                    estimates, gradients, began = [], 0, time.process_time()
                    for seed in range(seeds):
                        rng = np.random.default_rng(seed)
                        way = rng.standard_normal(dim)
                        sds = np.exp(rng.uniform(-1.5, 1.5, dim))
                        model = make(sds, apart * sds * way / np.linalg.norm(way), weight)
                        noise = rng.standard_normal((DRAWS, dim))
                        log_q = -0.5 * (noise**2).sum(1) - np.log(sds).sum() - 0.5 * dim * math.log(2 * math.pi)
                        found = _searched(LogDensity(model, (), {}, 0), noise * sds, log_q, seed)
                        gradients += found.gradients
                        estimates += [mode.weight for mode in found.missed]
                    spent = (time.process_time() - began) / seeds
                    figures = f"{np.mean(estimates):.3f}, {np.std(estimates):.3f}" if estimates else ""
                    print(
                        f"| {make.__name__[3:]} | {dim} | {apart} | {1 - weight:.1f} | {len(estimates)} of {seeds} "
                        f"| {figures} | {gradients / seeds:.0f} | {spent:.2f} |",
                        flush=True,
                    )


def alarms(seeds: int) -> None:
    print("| model | dims | false alarms | gradients | s |")
    print("|---|---|---|---|---|")
    for name in ONE_MODE:
        density = LogDensity(getattr(am, name), (), {}, 0)
        posterior = approximate(density, seed=0).guide.get_posterior()
        count, gradients, began = 0, 0, time.process_time()
        for seed in range(seeds):
            torch.manual_seed(seed)
            draws = posterior.sample((DRAWS,))
            log_q = posterior.log_prob(draws).detach().double().numpy()
            found = _searched(density, draws.double().detach().numpy(), log_q, seed)
            count, gradients = count + bool(found.missed), gradients + found.gradients
        spent = (time.process_time() - began) / seeds
        print(f"| {name} | {density.dim} | {count} of {seeds} | {gradients / seeds:.0f} | {spent:.2f} |", flush=True)


def _searched(density: LogDensity, draws: np.ndarray, log_q: np.ndarray, seed: int) -> Modes:
    values, _ = density.value_and_grad(draws)
    found = search_modes(density, draws, values - log_q, seed)
    assert isinstance(found, Modes)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--only", choices=("missed", "alarms"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for case in (missed, alarms):
        if options.only in (None, case.__name__):
            case(options.seeds)
