"""Draw the README's picture: the terms of a fit by site, and what the same fit missed.

python docs/images/terms_and_posterior.py
"""

import io
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyro
import torch
from PIL import Image
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal

from pyro_elbo_ext import DecomposedELBO, from_pyro_svi, run_nuts
from pyro_elbo_ext.demo import centered, load_eight_schools, noncentered

COLOURS = {"theta": "#0072b2", "tau": "#e69f00", "mu": "#009e73"}


def smooth(values: np.ndarray, width: int = 50) -> np.ndarray:
    counts = np.convolve(np.ones(len(values)), np.ones(width), "same")
    return np.convolve(values, np.ones(width), "same") / counts


schools = load_eight_schools()
sigma, y = (torch.tensor(schools[name], dtype=torch.float32) for name in ("sigma", "y"))

pyro.set_rng_seed(0)
guide, elbo = AutoNormal(centered), DecomposedELBO()
svi = SVI(centered, guide, pyro.optim.ClippedAdam({"lr": 0.02}), elbo)
for _ in range(2000):
    svi.step(sigma, y)
approximation = from_pyro_svi(centered, guide, sigma, y, num_samples=4000, log_likelihood=False, prior=False, seed=0)
nuts = run_nuts(
    noncentered, sigma, y, num_samples=2000, seed=0, progress=False
)  # without the funnel, so NUTS can be trusted

table = elbo.history.to_dataframe().pivot(index="step", columns="site", values=["kl_prior", "reconstruction"])
figure = plt.figure(figsize=(10, 4), layout="constrained")
left, right = figure.subfigures(1, 2, width_ratios=(1, 1.15))

upper, lower = left.subplots(2, 1, sharex=True)
left.suptitle("The terms, by site", fontsize="large")
upper.plot(smooth(table["reconstruction", "y"].to_numpy()), color="#444444")
upper.set_title("reconstruction, nats", loc="left", fontsize="medium")
upper.set_ylim(-40, -25)
terms = [smooth(table["kl_prior", site].to_numpy()) for site in COLOURS]
lower.stackplot(table.index, terms, labels=list(COLOURS), colors=list(COLOURS.values()))
lower.set_title("kl_prior, nats", loc="left", fontsize="medium")
lower.set_xlabel("step")
lower.legend(loc="upper right", ncols=3, frameon=False, fontsize="small")

panels = right.subplots(1, 3)
right.suptitle("The posterior: guide (line), NUTS (filled)", fontsize="large")
for ax, (site, index, limits) in zip(
    panels, (("mu", (), (-10, 20)), ("tau", (), (0, 15)), ("theta", (0,), (-10, 30))), strict=True
):
    bins = np.linspace(*limits, 40)
    reference, drawn = (data["posterior"][site].values[(..., *index)].ravel() for data in (nuts, approximation))
    ax.hist(reference, bins, density=True, color=COLOURS[site], alpha=0.4)
    ax.hist(drawn, bins, density=True, histtype="step", color=COLOURS[site], linewidth=2)
    ax.set_title(site + "".join(f"[{i}]" for i in index), loc="left", fontsize="medium")
    ax.set_yticks([])
for ax in (upper, lower, *panels):
    ax.spines[["top", "right"]].set_visible(False)

png = io.BytesIO()
figure.savefig(png, dpi=110)
with Image.open(png) as image:
    image.convert("RGB").quantize(64).save(Path(__file__).with_suffix(".png"), optimize=True)
