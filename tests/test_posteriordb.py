"""NUTS on eight real posteriors against Stan's reference draws."""

from __future__ import annotations

import arviz as az
import numpy as np
import posteriordb_models as db
import pytest

from pyro_elbo_ext.mcmc import run_nuts

pytestmark = pytest.mark.skipif(not db.FOLDER.is_dir(), reason="reference posteriors are not here")
STANDARD_ERRORS = 4.5  # about 1e-5 of a normal lies beyond, for some 120 comparisons


def sd_error(draws: np.ndarray) -> float:
    """Standard error of log sd, by the delta method from the effective size of the squared deviations."""
    squares = (draws - draws.mean()) ** 2
    return float(squares.std() / np.sqrt(az.ess(squares, method="mean")) / (2 * squares.mean()))


def mean_error(draws: np.ndarray) -> float:
    return float(draws.std() / np.sqrt(az.ess(draws, method="mean")))


@pytest.mark.parametrize("name", db.MODELS)
def test_nuts_agrees_with_reference(name: str) -> None:
    data, reference = db.load(name)
    found = run_nuts(db.MODELS[name], data, num_samples=1000, warmup=500, chains=4, seed=1, progress=False)
    print(f"\n{name}: scalar, |mean diff|/sd, log sd ratio, both in standard errors; floor of the reference halves")
    worst = 0.0
    for key, ref in reference.items():
        ours = db.scalar(found.posterior, key)
        sd = ref.std()
        diff, ratio = abs(ours.mean() - ref.mean()) / sd, np.log(ours.std() / sd)
        z_mean = diff * sd / np.hypot(mean_error(ours), mean_error(ref))
        z_sd = abs(ratio) / np.hypot(sd_error(ours), sd_error(ref))
        floor = abs(ref[:5].mean() - ref[5:].mean()) / sd, np.log(ref[:5].std() / ref[5:].std())
        print(f"{key:10} {diff:.3f} {ratio:+.3f}  {z_mean:.1f} {z_sd:.1f}  floor {floor[0]:.3f} {floor[1]:+.3f}")
        worst = max(worst, z_mean, z_sd)
    assert worst < STANDARD_ERRORS
