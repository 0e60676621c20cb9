"""NUTS, and the verdict on three guides each, on eight real posteriors against Stan's reference draws."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import arviz as az
import numpy as np
import posteriordb_guides
import posteriordb_models as db
import pytest
import torch

from pyro_elbo_ext import diagnose
from pyro_elbo_ext.density.log_density import LogDensity, compiled_log_density
from pyro_elbo_ext.diagnosis.findings import VERDICTS
from pyro_elbo_ext.mcmc.nuts import run_nuts

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
    draws, warmup = (400, 300) if name.startswith("gp_pois") else (1000, 500)  # there each gradient has a factorization
    found = run_nuts(db.MODELS[name], data, num_samples=draws, warmup=warmup, chains=4, seed=1, progress=False)
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


def complete(name: str, data: dict[str, object], reference: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The reference draws with those of the latent sites that they determine: all that the verdict is on."""
    draws = dict(reference)
    if name.startswith("eight_schools"):
        draws |= {f"z[{j}]": (draws[f"theta[{j}]"] - draws["mu"]) / draws["tau"] for j in range(1, 9)}
    if name.startswith("gp_pois"):
        x = np.array(data["x"])
        f = np.stack([draws[f"f[{i + 1}]"] for i in range(len(x))], -1)
        rho, alpha = (draws[key][..., None, None] for key in ("rho", "alpha"))
        kernel = alpha**2 * np.exp(-((x[:, None] - x) ** 2) / (2 * rho**2)) + 1e-10 * np.eye(len(x))
        white = np.linalg.solve(np.linalg.cholesky(kernel), f[..., None])[..., 0]
        draws |= {f"f_tilde[{i + 1}]": white[..., i] for i in range(len(x))}
    return draws


def from_zero(stan_name: str) -> str:
    """``beta[1]`` as ``beta[0]``."""
    return re.sub(r"\[(\d+)\]", lambda match: f"[{int(match[1]) - 1}]", stan_name)


def verdict_at(distance: float) -> str:
    return "do not use" if distance > 0.5 else "good" if distance < 0.1 else "means only"


def distance_to(
    reference: dict[str, np.ndarray], guide: posteriordb_guides.GaussianGuide, density: LogDensity
) -> tuple[float, float]:
    """The largest of all scalars' |difference in mean| in reference sds and |log sd ratio|, and its standard error."""
    noise = torch.randn(20_000, density.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = density.constrain((guide.loc + noise @ guide.factor.T).numpy())
    worst = (0.0, 0.0)
    for key, ref in reference.items():
        match = re.fullmatch(r"(\w+)(?:\[(\d+)\])?", key)
        assert match is not None
        ours = values[match[1]] if match[2] is None else values[match[1]][..., int(match[2]) - 1]
        sd, one_chain = ref.std(), ours[None]
        shift, ratio = abs(ours.mean() - ref.mean()) / sd, abs(np.log(ours.std() / sd))
        shift_error = np.hypot(mean_error(one_chain), mean_error(ref)) / sd
        worst = max(worst, (shift, shift_error), (ratio, np.hypot(sd_error(one_chain), sd_error(ref))))
    return worst


@pytest.fixture(scope="module")
def confusion() -> Iterator[Counter[tuple[str, str]]]:
    """Counts of (verdict at the reference, verdict of diagnose), printed when all cases are through."""
    counts: Counter[tuple[str, str]] = Counter()
    yield counts
    print("\nverdict at the reference (rows) and of diagnose (columns); 'near' is nearer to a threshold than its noise")
    print(f"{'':22}" + "".join(f"{verdict:>12}" for verdict in VERDICTS))
    for row in sorted({row for row, _ in counts}):
        print(f"{row:22}" + "".join(f"{counts[row, column]:12}" for column in VERDICTS))


@pytest.mark.slow
@pytest.mark.parametrize("name", db.MODELS)
def test_verdict_agrees_with_reference(name: str, confusion: Counter[tuple[str, str]]) -> None:
    """Without MCMC, for three guides: the same verdict as their distance to the reference draws gives."""
    data, reference = db.load(name)
    model, reference = db.MODELS[name], complete(name, data, reference)
    density = compiled_log_density(model, data)
    wrong = []
    print(f"\n{name}: guide, distance to the reference with its error, and estimated; verdicts; method")
    for which, make in posteriordb_guides.GUIDES.items():
        guide = make(density)
        found = diagnose(model, guide, data, seed=1)
        assert {from_zero(key) for key in reference} == set(found.scalars.index)
        distance, error = distance_to(reference, guide, density)
        estimate = found.scalars[["mean_shift", "log_sd_ratio"]].abs().to_numpy().max()
        # two standard errors of the reference, and two of the estimate that chance may put on either side
        own = found.scalars[["mean_shift_se", "log_sd_ratio_se"]].to_numpy().max()
        near = min(abs(distance - 0.1), abs(distance - 0.5)) < 2 * np.hypot(error, min(own, 0.02))
        expected = verdict_at(distance)
        print(
            f"{which:10} {distance:8.3f} ± {error:.3f} {estimate:8.3f}  {expected:10} {found.verdict:10} {found.method}"
            f"{' near a threshold' if near else ''}"
        )
        confusion[expected + (", near" if near else ""), found.verdict] += 1
        if found.verdict != expected and not near:
            wrong.append((which, distance, estimate))
    assert not wrong
