"""Models under ``poutine.reparam``: what it leaves in a site's place is a value that was computed, and no data."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.infer.reparam import LocScaleReparam

from pyro_elbo_ext import DecomposedELBO, fit, from_pyro_svi, run_nuts
from pyro_elbo_ext.density import LogDensity
from pyro_elbo_ext.inference_data.export import dataset_of, groups_of
from tests.models import SIGMA, Y, schools

OTHER = poutine.reparam(schools, {"theta": LocScaleReparam(0.0)})
SITES = {"mu", "tau", "theta_decentered", "theta"}


def check(data: Any) -> None:
    posterior = dataset_of(data)
    assert set(posterior) == SITES
    assert posterior["theta"].dims == ("chain", "draw", "school")
    computed = posterior["mu"] + posterior["tau"] * posterior["theta_decentered"]
    np.testing.assert_allclose(posterior["theta"].values, computed.values, rtol=1e-4, atol=1e-4)
    for group in {"observed_data", "log_likelihood", "posterior_predictive"} & set(groups_of(data)):
        assert set(dataset_of(data, group)) == {"y"}


def test_exports() -> None:
    check(run_nuts(OTHER, Y, SIGMA, num_samples=20, warmup=20, chains=2, compile=False, progress=False))
    guide = AutoNormal(OTHER)
    guide(Y, SIGMA)
    check(from_pyro_svi(OTHER, guide, Y, SIGMA, num_samples=20))
    result = fit(OTHER, "auto", Y, SIGMA, seed=0, progress=False)
    check(result.to_arviz(num_samples=20))
    assert set(result.draws(5)) == SITES


def test_terms_and_density() -> None:
    elbo, guide = DecomposedELBO(), AutoNormal(OTHER)
    elbo.loss(OTHER, guide, Y, SIGMA)
    assert set(elbo.last.to_dataframe()["site"]) == {"mu", "tau", "theta_decentered", "y"}
    density = LogDensity(OTHER, (Y, SIGMA), {}, 0)
    assert set(density.names) == SITES
    values = density.constrain(np.zeros(10))
    np.testing.assert_allclose(values["theta"], values["mu"] + values["tau"] * values["theta_decentered"])
    assert torch.is_tensor(density.unconstrain({k: v for k, v in values.items() if k in density.layout}))
