"""NumPyro and PyMC on the problems of the benchmark of peers, in the interpreter that has them.

    python peer_workers.py numpyro-svi PROBLEM GUIDE DATA.npz
    python peer_workers.py numpyro-nuts PROBLEM METHOD DATA.npz
    python peer_workers.py pymc-nuts PROBLEM CORES DATA.npz

is started by :mod:`tests.benchmarks.peers`. It reads commands, a line each, from its input and writes a reply, a line of
JSON, for each. This file imports nothing of the project, and the libraries only where they are used.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

CHAINS, DRAWS = 4, 1000  # and as many draws of warm-up

Commands = Mapping[str, Callable[[int], Any]]


def serve(commands: Commands) -> None:
    """Answer lines ``command number`` with JSON until the input ends; what the libraries print goes to the error stream."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print('"ready"', file=replies, flush=True)
    for line in sys.stdin:
        name, number = line.split()
        print(json.dumps(commands[name](int(number))), file=replies, flush=True)


def timed(call: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds of wall time and of the process' CPU time, and what the call returned."""
    cpu, start = time.process_time(), time.perf_counter()
    result = call()
    return time.perf_counter() - start, time.process_time() - cpu, result


def saved(posterior: Mapping[str, Any]) -> str:
    """Draws, each of shape (chain, draw, ...), in a file that whoever asked for them deletes."""
    with tempfile.NamedTemporaryFile(suffix=".npz", delete=False) as file:
        np.savez(file, **{name: np.asarray(values) for name, values in posterior.items()})
    return file.name


# ----------------------------------------------------------------------------------------------------------------------
# NumPyro


def numpyro_model(problem: str) -> Callable[..., None]:
    """The problem in NumPyro."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.contrib.control_flow import scan

    def eight_schools(effect: Any, error: Any) -> None:
        mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
        with numpyro.plate("school", 8):
            theta = numpyro.sample("theta", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Normal(mu + tau * theta, error), obs=effect)

    def logistic_regression(x: Any, y: Any) -> None:
        weight = numpyro.sample("weight", dist.Normal(jnp.zeros(20), 1.0).to_event(1))
        bias = numpyro.sample("bias", dist.Normal(0.0, 5.0))
        with numpyro.plate("row", 1000):
            numpyro.sample("y", dist.Bernoulli(logits=x @ weight + bias), obs=y)

    def mixture(data: Any) -> None:
        weights = numpyro.sample("weights", dist.Dirichlet(jnp.ones(5)))
        with numpyro.plate("components", 5):
            locs = numpyro.sample("locs", dist.Normal(6.0, 5.0))
            scales = numpyro.sample("scales", dist.LogNormal(0.0, 1.0))
        with numpyro.plate("data", len(data)):
            z = numpyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
            numpyro.sample("y", dist.Normal(locs[z], scales[z]), obs=data)

    def hmm(data: Any) -> None:
        prior = dist.Dirichlet(jnp.ones((16, 16)) + 16 * jnp.eye(16)).to_event(1)
        rows = numpyro.sample("rows", prior)
        locs = numpyro.sample("locs", dist.Normal(jnp.linspace(-8.0, 8.0, 16), 2.0).to_event(1))

        def step(x: Any, y: Any) -> tuple[Any, None]:
            with numpyro.plate("sequences", data.shape[1], dim=-1):
                x = numpyro.sample("x", dist.Categorical(rows[x]), infer={"enumerate": "parallel"})
                numpyro.sample("y", dist.Normal(locs[x], 1.0), obs=y)
            return x, None

        scan(step, jnp.zeros(data.shape[1], dtype=jnp.int32), data)

    models = (eight_schools, logistic_regression, mixture, hmm)
    return {model.__name__: model for model in models}[problem]


def numpyro_svi(problem: str, guide: str, data: tuple[Any, ...]) -> Commands:
    """SVI with Adam: ``scan`` and ``update`` take steps by compiled functions made once, ``run`` is ``svi.run``."""
    import jax
    from numpyro import optim
    from numpyro.handlers import block
    from numpyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, autoguide

    model = numpyro_model(problem)
    loss, of = Trace_ELBO(), model
    if problem in ("mixture", "hmm"):
        loss, of = TraceEnum_ELBO(max_plate_nesting=1), block(model, hide=["x", "z"])
    svi = SVI(model, getattr(autoguide, guide)(of), optim.Adam(0.01), loss)
    state = svi.init(jax.random.PRNGKey(0), *data)
    compiled: dict[int, Any] = {}
    update = jax.jit(svi.update)

    def scan(steps: int) -> tuple[float, float, float]:
        """As ``svi.run`` does it, but compiled once for each number of steps."""
        nonlocal state
        if steps not in compiled:
            compiled[steps] = jax.jit(
                lambda state: jax.lax.scan(lambda s, _: svi.update(s, *data), state, None, length=steps)
            )
        seconds, cpu, (state, losses) = timed(lambda: jax.block_until_ready(compiled[steps](state)))
        return seconds, cpu, float(losses.mean())

    def by_update(steps: int) -> tuple[float, float, float]:
        """One call of a compiled ``update`` for each step; the loss is read each time, as ``step`` of ours does."""
        nonlocal state

        def take() -> float:
            nonlocal state
            total = 0.0
            for _ in range(steps):
                state, loss = update(state, *data)
                total += float(loss)
            return total

        seconds, cpu, total = timed(take)
        return seconds, cpu, total / steps

    def run(steps: int) -> tuple[float, float, float]:
        seconds, cpu, result = timed(
            lambda: jax.block_until_ready(svi.run(jax.random.PRNGKey(0), steps, *data, progress_bar=False))
        )
        return seconds, cpu, float(result.losses[-steps // 4 :].mean())

    return {"scan": scan, "update": by_update, "run": run}


def numpyro_nuts(problem: str, method: str, data: tuple[Any, ...]) -> Commands:
    """NUTS; the first ``draw`` compiles."""
    import jax
    from numpyro.infer import MCMC, NUTS

    mcmc = MCMC(
        NUTS(numpyro_model(problem)),
        num_warmup=DRAWS,
        num_samples=DRAWS,
        num_chains=CHAINS,
        chain_method=method,
        progress_bar=False,
    )

    def draw(seed: int) -> tuple[float, float, str]:
        def run() -> Any:
            mcmc.run(jax.random.PRNGKey(seed), *data)
            return jax.block_until_ready(mcmc.get_samples(group_by_chain=True))

        seconds, cpu, samples = timed(run)
        return seconds, cpu, saved(samples)

    return {"draw": draw}


# ----------------------------------------------------------------------------------------------------------------------
# PyMC


def pymc_nuts(problem: str, cores: str, data: tuple[Any, ...]) -> Commands:
    """NUTS by nutpie; the first ``draw`` compiles."""
    import nutpie
    import pymc as pm

    with pm.Model() as model:
        if problem == "eight_schools":
            effect, error = data
            mu, tau = pm.Normal("mu", 0.0, 5.0), pm.HalfCauchy("tau", 5.0)
            theta = pm.Normal("theta", 0.0, 1.0, shape=8)
            pm.Normal("y", mu + tau * theta, error, observed=effect)
        else:
            x, y = data
            weight, bias = pm.Normal("weight", 0.0, 1.0, shape=20), pm.Normal("bias", 0.0, 5.0)
            pm.Bernoulli("y", logit_p=pm.math.dot(x, weight) + bias, observed=y)
    compiled: list[Any] = []

    def draw(seed: int) -> tuple[float, float, str]:
        def run() -> Any:
            if not compiled:
                compiled.append(nutpie.compile_pymc_model(model))
            return nutpie.sample(
                compiled[0], draws=DRAWS, tune=DRAWS, chains=CHAINS, cores=int(cores), seed=seed, progress_bar=False
            )

        seconds, cpu, trace = timed(run)
        names = [rv.name for rv in model.free_RVs]
        return seconds, cpu, saved({name: trace.posterior[name] for name in names})

    return {"draw": draw}


WORKERS = {"numpyro-svi": numpyro_svi, "numpyro-nuts": numpyro_nuts, "pymc-nuts": pymc_nuts}


if __name__ == "__main__":
    kind, problem, option, file = sys.argv[1:]
    arrays = np.load(file)
    serve(WORKERS[kind](problem, option, tuple(arrays[name] for name in arrays.files)))
