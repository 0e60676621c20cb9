"""The automatic guide on eight real posteriors: how near it is, and what it says.

What it costs beside NUTS: ``python -m tests.benchmarks.automatic``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import automatic_models as am
import numpy as np
import posteriordb_guides
import posteriordb_models as db
import pytest
import torch
from torch import Tensor

from pyro_elbo_ext import AutomaticFit, fit
from pyro_elbo_ext.automatic.approximate import Approximation, approximate
from pyro_elbo_ext.density.log_density import LogDensity, compiled_log_density
from pyro_elbo_ext.mcmc.nuts import run_nuts
from pyro_elbo_ext.programs.randomness import isolated

pytestmark = pytest.mark.slow
DRAWS = 20_000
MEAN, LOG_SD = 0.06, 0.1  # in sds of the reference
# Importance weights cannot tell the moments: length scale and amplitude bend the distribution of the process's values.
TOO_SKEW = ("gp_pois_regr-gp_pois_regr",)


@dataclass
class Row:
    name: str
    worst: tuple[float, float]
    floor: tuple[float, float]
    usual: tuple[float, float]
    gradients: int
    found: Approximation
    bent: tuple[tuple[float, float], Approximation] | None = None  # by a flow


def worst(values: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> tuple[float, float]:
    """Largest |difference in mean| in reference sds, and |log sd ratio|, of all scalars; values of shape (draw, ...)."""
    posterior = {name: _Chain(value[None]) for name, value in values.items()}
    pairs = [(db.scalar(posterior, key), ref) for key, ref in reference.items()]
    return (
        max(float(abs(ours.mean() - ref.mean()) / ref.std()) for ours, ref in pairs),
        max(float(abs(np.log(ours.std() / ref.std()))) for ours, ref in pairs),
    )


class _Chain:
    def __init__(self, values: np.ndarray) -> None:
        self.values = values


def draws_of(found: Approximation, density: LogDensity) -> dict[str, np.ndarray]:
    """Sites at draws of the guide's auxiliary vector."""
    with isolated(1), torch.no_grad():
        u: Tensor = found.guide.get_posterior().sample((DRAWS,))
    return density.constrain(u.numpy())


def floor_of(reference: dict[str, np.ndarray]) -> tuple[float, float]:
    """The same between the halves of the reference."""
    return (
        max(float(abs(ref[:5].mean() - ref[5:].mean()) / ref.std()) for ref in reference.values()),
        max(float(abs(np.log(ref[:5].std() / ref[5:].std()))) for ref in reference.values()),
    )


@pytest.fixture(scope="module")
def table() -> Iterator[list[Row]]:
    """Rows of the cases, printed when all are through."""
    rows: list[Row] = []
    yield rows
    print(f"\n\nWorst |mean difference| in sds, |log sd ratio| of {DRAWS} draws")
    print(f"{'posterior':20} {'guide':>12} {'floor':>12} {'Pyro, usual':>14} {'gradients':>9}")
    for row in rows:
        pairs = [f"{a:.3f} {b:.3f}" for a, b in (row.worst, row.floor, row.usual)]
        print(f"{row.name.split('-')[0]:20} {pairs[0]:>12} {pairs[1]:>12} {pairs[2]:>14} {row.gradients:9}")
    for row in rows:
        if row.bent is not None:
            (mean, log_sd), bent = row.bent
            short = row.name.split("-")[0]
            print(
                f"{short}, flow: {mean:.3f} {log_sd:.3f}, {bent.seconds:.1f} s, {bent.gradients} gradients; "
                f"{bent.notes[0]}. {bent.reason}. {bent.next_guide}"
            )
        print(f"{row.name.split('-')[0]}: {row.found.reason}. {' '.join(row.found.notes)} {row.found.next_guide}")


@pytest.mark.skipif(not db.FOLDER.is_dir(), reason="reference posteriors are not here")
@pytest.mark.parametrize("name", db.MODELS)
def test_reaches_the_reference_or_says_so(name: str, table: list[Row]) -> None:
    data, reference = db.load(name)
    density = compiled_log_density(db.MODELS[name], data)
    result = fit(density, "auto", progress=False, seed=0)
    assert isinstance(result, AutomaticFit)
    found = result.approximation
    usual = posteriordb_guides.usual(density)
    noise = torch.randn(DRAWS, density.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    of_usual = worst(density.constrain((usual.loc + noise @ usual.factor.T).numpy()), reference)

    ours = worst({site: value.numpy() for site, value in result.draws(DRAWS, seed=1).items()}, reference)
    table.append(Row(name, ours, floor_of(reference), of_usual, found.gradients, found))
    assert found.converged
    if name in TOO_SKEW:
        assert "not enough" in found.next_guide
        assert max(ours[0] / MEAN, ours[1] / LOG_SD) > 1  # else it belongs to the others
        bent = result.refine(seed=0, progress=False).approximation
        of_bent = worst(draws_of(bent, density), reference)
        table[-1].bent = of_bent, bent
        assert bent.gain > 5 * bent.gain_se
        assert of_bent[0] <= MEAN
        assert of_bent[1] < min(ours[1], 0.2)
    else:
        assert found.next_guide == ""
        assert ours[0] <= MEAN
        assert ours[1] <= LOG_SD


@pytest.mark.parametrize("name", [name for name in am.MODELS if name != "walk"])  # NUTS takes minutes for that one
def test_other_models_are_right_or_say_so(name: str) -> None:
    """Against 8000 draws of NUTS, or 4000 where a gradient takes a millisecond; their own error is up to about 0.05."""
    density = compiled_log_density(am.MODELS[name])
    found = approximate(density)
    draws = 1000 if name == "correlation" else 2000
    chains = run_nuts(density, num_samples=draws, warmup=500, progress=False)
    values = draws_of(found, density)
    off = 0.0
    for site in density.names:
        ours, theirs = values[site].reshape(DRAWS, -1), chains.posterior[site].values.reshape(4 * draws, -1)
        kept = theirs.std(0) > 1e-9
        sd = theirs.std(0)[kept]
        shift = np.abs(ours.mean(0) - theirs.mean(0))[kept] / sd
        off = max(off, shift.max(), np.abs(np.log(ours.std(0)[kept] / sd)).max())
    print(
        f"\n{name}: {off:.3f} off, {found.gradients} gradients, {found.seconds:.2f} s; {found.reason}. {found.next_guide}"
    )
    assert off < 0.15 or found.next_guide != ""
    assert found.next_guide == "" or off > 0.06
