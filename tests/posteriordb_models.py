"""Eight posteriors of posteriordb as Pyro programs, and the map from Stan's scalar names to Pyro's sites."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

FOLDER = Path(__file__).parents[2] / "shared" / "posteriordb"


def flat(name: str, size: int) -> Tensor:
    return pyro.sample(name, dist.ImproperUniform(constraints.real_vector, (), (size,)))


def flat_positive(name: str) -> Tensor:
    return pyro.sample(name, dist.ImproperUniform(constraints.positive, (), ()))


def column(data: dict[str, Any], name: str) -> Tensor:
    return torch.tensor(data[name], dtype=torch.float64)


def observe(mean: Tensor, sigma: Tensor, y: Tensor) -> None:
    with pyro.plate("observation", len(y)):
        pyro.sample("y", dist.Normal(mean, sigma), obs=y)


def eight_schools(data: dict[str, Any]) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(data["y"])):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * z)
        pyro.sample("y", dist.Normal(theta, column(data, "sigma")), obs=column(data, "y"))


def kidiq(data: dict[str, Any]) -> None:
    beta, sigma = flat("beta", 2), pyro.sample("sigma", dist.HalfCauchy(2.5))
    observe(beta[0] + beta[1] * column(data, "mom_iq"), sigma, column(data, "kid_score"))


def sblrc(data: dict[str, Any]) -> None:
    x = column(data, "X")
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([x.shape[1]]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(10.0))
    observe(x @ beta, sigma, column(data, "y"))


def nes(data: dict[str, Any]) -> None:
    age = column(data, "age_discrete")
    first = [column(data, name) for name in ("real_ideo", "race_adj")]
    last = [column(data, name) for name in ("educ1", "gender", "income")]
    ages = [(age == level).double() for level in (2, 3, 4)]
    x = torch.stack([torch.ones_like(age), *first, *ages, *last], -1)
    beta, sigma = flat("beta", 9), flat_positive("sigma")
    observe(x @ beta, sigma, column(data, "partyid7"))


def mesquite(data: dict[str, Any]) -> None:
    logs = [column(data, name).log() for name in ("diam1", "diam2", "canopy_height", "total_height", "density")]
    x = torch.stack([torch.ones_like(logs[0]), *logs, column(data, "group")], -1)
    beta, sigma = flat("beta", 7), flat_positive("sigma")
    observe(x @ beta, sigma, column(data, "weight").log())


def ark(data: dict[str, Any]) -> None:
    lags, y = int(data["K"]), column(data, "y")
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([lags]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    x = torch.stack([y[lags - k : len(y) - k] for k in range(1, lags + 1)], -1)
    observe(alpha + x @ beta, sigma, y[lags:])


def gp_pois_regr(data: dict[str, Any]) -> None:
    x = column(data, "x")
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
    f_tilde = pyro.sample("f_tilde", dist.Normal(0.0, 1.0).expand([len(x)]).to_event(1))
    squares = (x[:, None] - x) ** 2
    kernel = alpha**2 * torch.exp(-squares / (2 * rho**2)) + 1e-10 * torch.eye(len(x), dtype=x.dtype)
    f = pyro.deterministic("f", torch.linalg.cholesky(kernel) @ f_tilde)
    with pyro.plate("observation", len(x)):
        pyro.sample("k", dist.Poisson(f.exp()), obs=column(data, "k"))


def low_dim_gauss_mix(data: dict[str, Any]) -> None:
    mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.ordered_vector, (), (2,)))
    pyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum())
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    weights = dist.Categorical(torch.stack([theta, 1 - theta]))
    with pyro.plate("observation", len(data["y"])):
        pyro.sample("y", dist.MixtureSameFamily(weights, dist.Normal(mu, sigma)), obs=column(data, "y"))


MODELS: dict[str, Callable[[dict[str, Any]], None]] = {
    "eight_schools-eight_schools_noncentered": eight_schools,
    "kidiq-kidscore_momiq": kidiq,
    "sblrc-blr": sblrc,
    "nes1980-nes": nes,
    "mesquite-logmesquite": mesquite,
    "arK-arK": ark,
    "gp_pois_regr-gp_pois_regr": gp_pois_regr,
    "low_dim_gauss_mix-low_dim_gauss_mix": low_dim_gauss_mix,
}


def load(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The data, and the reference draws by Stan's scalar name, float64 of shape (10 chains, 1000 draws)."""
    data = json.loads((FOLDER / f"{name}.data.json").read_text())
    with np.load(FOLDER / f"{name}.draws.npz") as archive:
        return data, {key: archive[key].astype(np.float64) for key in archive.files}


def scalar(posterior: Any, stan_name: str) -> np.ndarray:
    """Draws of a Stan scalar, ``beta[1]`` being the first entry of site ``beta``; shape (chain, draw)."""
    match = re.fullmatch(r"(\w+)(?:\[(\d+)\])?", stan_name)
    assert match is not None, stan_name
    values = posterior[match[1]].values
    return values if match[2] is None else values[..., int(match[2]) - 1]
