"""The main job on real data: three guides for eight schools, every term of their ELBO, and NUTS to say which one is right.

The centered parameterization draws each school's effect from ``Normal(mu, tau)``: its posterior is a funnel that a guide of
independent normals cannot follow. The non-centered one, the same model of the same data, has no funnel.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from pyro.infer import SVI
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.optim import ClippedAdam
from pyro.util import get_rng_state, set_rng_state
from scipy import integrate, stats
from torch import Tensor

from pyro_elbo_ext.comparison import Comparison, compare_to_mcmc
from pyro_elbo_ext.history import History
from pyro_elbo_ext.inference_data import from_pyro_svi
from pyro_elbo_ext.inference_data.export import dataset_of, to_arviz
from pyro_elbo_ext.mcmc import run_nuts
from pyro_elbo_ext.objectives import DecomposedELBO

Model = Callable[..., None]
VAR_NAMES = ("mu", "tau", "theta")
NUTS_SIZES = {"nutpie": (4, 400, 600), "pyro": (2, 300, 400), "quick": (2, 200, 200)}  # chains, warmup, draws
NUM_ROWS = 6  # of the table that each fit prints as it goes


@dataclass(frozen=True)
class Fit:
    """One guide after training, beside NUTS.

    ``elbo`` and its standard error are over the exported draws, in nats; ``kl_posterior`` is KL(q || posterior), the gap
    between the ELBO and log p(x).
    """

    name: str
    label: str
    history: History
    data: Any
    elbo: float
    elbo_error: float
    kl_posterior: float
    comparison: Comparison


@dataclass(frozen=True)
class Demo:
    """What the demo found: log p(x) by quadrature, the fits, NUTS's draws, the closing sentences and the files."""

    log_evidence: float
    fits: dict[str, Fit]
    nuts: Any
    sentences: list[str]
    files: list[Path]


def load_eight_schools() -> dict[str, Any]:
    """The shipped data: ``school`` (8 names), ``y`` (estimated effects) and ``sigma`` (their standard errors), in points."""
    return json.loads(resources.files("pyro_elbo_ext").joinpath("data/eight_schools.json").read_text("utf-8"))


def centered(sigma: Tensor, y: Tensor | None = None) -> None:
    """Eight schools with each ``theta`` drawn from ``Normal(mu, tau)``."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(sigma)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def noncentered(sigma: Tensor, y: Tensor | None = None) -> None:
    """The same model with ``theta = mu + tau * z`` and ``z`` standard normal."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(sigma)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * z)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


GUIDES: dict[str, tuple[str, Model, type[AutoNormal] | type[AutoMultivariateNormal]]] = {
    "centered_normal": ("centered model, AutoNormal", centered, AutoNormal),
    "noncentered_normal": ("non-centered model, AutoNormal", noncentered, AutoNormal),
    "noncentered_multivariate": ("non-centered model, AutoMultivariateNormal", noncentered, AutoMultivariateNormal),
}


def log_evidence(sigma: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """``log p(y)`` in nats: theta and mu integrate out, and the integral over tau is done by quadrature."""

    def joint(tau: float) -> float:
        covariance = np.diag(sigma**2 + tau**2) + 5.0**2
        return stats.halfcauchy.pdf(tau, scale=5.0) * stats.multivariate_normal.pdf(y, cov=covariance)

    unit = joint(0.0)
    integral, _ = integrate.quad(lambda tau: joint(tau) / unit, 0.0, np.inf, epsabs=0.0, epsrel=1e-9)
    return float(np.log(integral) + np.log(unit))


def run_demo(
    output: str | Path = "demo_output",
    *,
    num_steps: int | None = None,
    seed: int = 0,
    quick: bool = False,
    echo: Callable[[str], None] = print,
) -> Demo:
    """Fit eight schools with three guides, run NUTS, compare, and write plots and netCDF files.

    The caller's parameter store and random number generators are left as they were.

    Parameters
    ----------
    output
        Folder for the files; made if need be, files of the same name in it are replaced.
    num_steps
        Optimization steps per guide; by default 2000, with ``quick`` 600.
    seed
        Same seed, same figures on one machine.
    quick
        Fewer steps and draws: a check that all works, with rougher figures.
    echo
        Takes each line of the report.

    Raises
    ------
    ValueError
        ``num_steps`` is not positive.
    NotADirectoryError, FileExistsError
        ``output``, or something above it, is a file.
    """
    num_steps = (600 if quick else 2000) if num_steps is None else num_steps
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    schools = load_eight_schools()
    names, labelled = schools["school"], {"school": schools["school"]}
    sigma, y = (torch.tensor(schools[key], dtype=torch.float32) for key in ("sigma", "y"))
    evidence = log_evidence(sigma.double().numpy(), y.double().numpy())
    num_samples = 400 if quick else 1000

    echo(f"{schools['title']} ({len(names)} schools; {schools['source'].split(',')[0]})")
    echo("ELBO = reconstruction - sum of kl_prior; kl_prior = KL(q || prior), in nats; ~ sampled, others analytic")
    trained: dict[str, tuple[History, Any]] = {}
    with _own_state():
        for name, (label, model, guide_class) in GUIDES.items():
            pyro.clear_param_store()
            pyro.set_rng_seed(seed)
            guide = guide_class(model, init_scale=1.0)
            echo(f"\n{label}")
            start = time.perf_counter()
            history = _train(model, guide, sigma, y, num_steps, echo)
            elapsed = time.perf_counter() - start
            echo(f"{num_steps} steps in {elapsed:.1f} s, {1e3 * elapsed / num_steps:.1f} ms per step")
            with pyro.validation_enabled(False):
                data = from_pyro_svi(
                    model, guide, sigma, y, num_samples=num_samples, history=history, coords=labelled, seed=seed
                )
            trained[name] = (history, data)

    nuts = _sample(sigma, y, labelled, seed, quick, echo)
    echo("\nGuides beside NUTS: in NUTS's standard deviations, ± standard error (noise floor: NUTS beside itself)")
    fits = {}
    for name, (history, data) in trained.items():
        weights = (dataset_of(data, "sample_stats")["log_p"] - dataset_of(data, "sample_stats")["log_q"]).values.ravel()
        elbo, error = float(weights.mean()), float(weights.std(ddof=1) / weights.size**0.5)
        comparison = compare_to_mcmc(data, nuts, VAR_NAMES)
        fits[name] = Fit(name, GUIDES[name][0], history, data, elbo, error, evidence - elbo, comparison)
        echo(f"\n{GUIDES[name][0]}\n{comparison!r}")

    echo(f"\nThe gap: log p(x) = ELBO + kl_posterior, and log p(x) = {evidence:.3f} by quadrature")
    width = max(len(fit.label) for fit in fits.values())
    echo(f"{'':{width}}  {'ELBO':>8}  {'kl_posterior':>12}")
    for fit in fits.values():
        echo(f"{fit.label:{width}}  {fit.elbo:8.3f}  {fit.kl_posterior:12.3f}  ± {fit.elbo_error:.3f}")

    files = _write_files(output, fits, nuts, echo)
    sentences = tell(fits, evidence)
    echo("")
    for sentence in sentences:
        echo(sentence)
    return Demo(evidence, fits, nuts, sentences, files)


@contextmanager
def _own_state() -> Iterator[None]:
    """An empty parameter store; it and the random number generators are put back afterwards."""
    state = get_rng_state()
    try:
        with pyro.get_param_store().scope():
            yield
    finally:
        set_rng_state(state)


def _train(
    model: Model, guide: Callable[..., Any], sigma: Tensor, y: Tensor, num_steps: int, echo: Callable[[str], None]
) -> History:
    history = History(max_steps=None)
    optimizer = ClippedAdam({"lr": 0.1, "lrd": 0.01 ** (1 / num_steps)})  # the rate falls to a hundredth
    svi = SVI(model, guide, optimizer, loss=DecomposedELBO(history=history))
    svi.step(sigma, y)  # with Pyro's checks of shapes and supports on, as they are by default
    rows = sorted({max(1, round(num_steps * (i / NUM_ROWS) ** 2)) for i in range(1, NUM_ROWS + 1)} - {1})
    done = 0
    with pyro.validation_enabled(False):
        for row in [1, *rows]:
            for _ in range(len(history), row):
                svi.step(sigma, y)
            _print_row(history, done, echo)
            done = row
    return history


def _print_row(history: History, done: int, echo: Callable[[str], None]) -> None:
    """Means over the steps since the last row."""
    table = history.to_dataframe()
    latent = table[table["kind"] != "observed"]
    if not done:
        marks = {row.site: row.site + "~" * (row.kl_method == "sampled") for row in latent.itertuples()}
        echo(
            f"{'steps':>11} {'ELBO':>9} {'reconstruction':>15}   kl_prior" + "".join(f" {m:>8}" for m in marks.values())
        )
    table, latent = table[table["step"] >= done], latent[latent["step"] >= done]
    last = int(table["step"].max()) + 1
    totals = table.groupby("step")[["reconstruction", "kl_prior"]].sum().mean()
    by_site = latent.groupby("site", sort=False)["kl_prior"].mean()
    steps = f"{done + 1}-{last}" if last > done + 1 else str(last)
    echo(
        f"{steps:>11} {totals['reconstruction'] - totals['kl_prior']:9.3f} {totals['reconstruction']:15.3f}"
        f" {totals['kl_prior']:10.3f}" + "".join(f" {value:8.3f}" for value in by_site)
    )


def _sample(
    sigma: Tensor, y: Tensor, labelled: Mapping[str, Any], seed: int, quick: bool, echo: Callable[[str], None]
) -> Any:
    fast = importlib.util.find_spec("nutpie") is not None
    chains, warmup, draws = NUTS_SIZES["quick" if quick else "nutpie" if fast else "pyro"]
    start = time.perf_counter()
    echo(f"\nNUTS on the non-centered model: {chains} chains of {warmup} + {draws} draws ...")
    progress = sys.stderr.isatty()
    nuts = run_nuts(
        noncentered, sigma, y, num_samples=draws, warmup=warmup, chains=chains, seed=seed, progress=progress,
        target_accept=0.9,
    )  # fmt: skip
    library = dataset_of(nuts).attrs["inference_library"]
    divergences = int(dataset_of(nuts, "sample_stats")["diverging"].sum())
    echo(f"{time.perf_counter() - start:.1f} s by {library}, {divergences} divergences")
    if not fast:
        echo('(more draws in the same time with nutpie: pip install "pyro_elbo_ext[nuts]")')
    groups = {group: dataset_of(nuts, group) for group in ("posterior", "sample_stats", "observed_data")}
    return to_arviz(
        {name: group.assign_coords(labelled) if "school" in group.dims else group for name, group in groups.items()}
    )


def tell(fits: Mapping[str, Fit], evidence: float) -> list[str]:
    """What the figures say, in sentences made from them."""
    by_gap = sorted(fits.values(), key=lambda fit: -fit.kl_posterior)
    sentences = [f"{fit.label}: {_judge(fit.comparison)}; {_widths(fit.comparison)}." for fit in fits.values()]
    worst, best = by_gap[0], by_gap[-1]
    sentences.append(
        f"Both parameterizations have the same log p(x) = {evidence:.2f}, so the {best.elbo - worst.elbo:.2f} nats of ELBO "
        f"between the worst ({worst.label}) and the best ({best.label}) are kl_posterior: "
        f"{worst.kl_posterior:.2f} nats from the posterior against {best.kl_posterior:.2f}."
    )
    return sentences


def _judge(comparison: Comparison) -> str:
    table = comparison.table
    bad = list(table.index[table["verdict"] == "bad"])
    if bad:
        return f"wrong in {len(bad)} of {len(table)} parameters ({', '.join(bad)})"
    largest = table["mean_diff"].abs().idxmax()
    off = abs(table["mean_diff"][largest])
    return f"wrong in none of {len(table)} parameters, means at most {off:.2f} sd off ({largest})"


def _widths(comparison: Comparison) -> str:
    table = comparison.table
    ratio = np.exp(table["log_sd_ratio"])
    theta = ratio[[name.startswith("theta") for name in table.index]].mean()
    return f"tau is {ratio['tau']:.2f} times as wide as NUTS has it, theta {theta:.2f} times on average"


def _write_files(output: Path, fits: Mapping[str, Fit], nuts: Any, echo: Callable[[str], None]) -> list[Path]:
    files = []
    for name, data in [*((fit.name, fit.data) for fit in fits.values()), ("nuts", nuts)]:
        path = output / f"{name}.nc"
        data.to_netcdf(str(path), engine="h5netcdf")
        files.append(path)
    if importlib.util.find_spec("matplotlib") is None:
        echo('\nPlots were skipped, as matplotlib is not installed: pip install "pyro_elbo_ext[plots]"')
    else:
        files += _draw(output, fits, nuts)
    echo(f"\nWritten to {output.resolve()}:")
    for path in files:
        echo(f"  {path.name}")
    return files


def _draw(output: Path, fits: Mapping[str, Fit], nuts: Any) -> list[Path]:
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure

    files = []
    for fit in fits.values():
        figure = Figure(figsize=(8.5, 8.0), layout="constrained")
        fit.history.plot(axes=figure.subplots(3, 1, sharex=True, height_ratios=(1, 1, 1.25)))
        figure.suptitle(fit.label)
        files.append(output / f"{fit.name}_history.png")
        figure.savefig(files[-1], dpi=120)
        compared = fit.comparison.plot()
        compared.axes[-1].set_title(fit.label, fontsize="medium")
        files.append(output / f"{fit.name}_comparison.png")
        compared.savefig(files[-1], dpi=120)
        plt.close(compared)
    figure = Figure(figsize=(11.0, 3.4), layout="constrained")
    panels = figure.subplots(1, 1 + len(fits), sharex=True, sharey=True)
    school = dataset_of(nuts)["school"].values[0]
    for axis, (label, data) in zip(
        panels, [("NUTS", nuts), *((fit.label, fit.data) for fit in fits.values())], strict=True
    ):
        posterior = dataset_of(data).sel(school=school)
        theta, tau = (posterior[name].values.ravel()[-1000:] for name in ("theta", "tau"))
        axis.scatter(theta, np.log(tau), s=4, alpha=0.35, linewidth=0, color="0.25" if data is nuts else "#0072B2")
        axis.set_title(label.replace(", ", ",\n"), fontsize="small")
        axis.set_xlabel(f"theta, school {school}")
    panels[0].set_ylabel("log tau")
    files.append(output / "funnel.png")
    figure.savefig(files[-1], dpi=120)
    return files
