"""The samplers behind `run_nuts`, nutpie and Pyro: from a log density to draws and their statistics."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro.infer import MCMC, NUTS

from pyro_elbo_ext.density import LogDensity
from pyro_elbo_ext.inference_data.quiet_arviz import import_arviz
from pyro_elbo_ext.mcmc.starts import starting_point

logger = logging.getLogger(__name__)


class Asked(NamedTuple):
    """What a sampler is to do, as `run_nuts` was asked."""

    num_samples: int
    warmup: int
    chains: int
    seed: int
    progress: bool
    target_accept: float
    max_tree_depth: int
    init: float | Mapping[str, Any]
    cores: int
    points: np.ndarray | None  # of a fit, shape (S, dim), for chains to start from

    def start(self, density: LogDensity, seed: int) -> np.ndarray:
        """Where the chain of this seed starts."""
        rng = np.random.default_rng(seed)
        if self.points is None:
            return starting_point(density, rng, self.init)
        return np.array(self.points[rng.integers(len(self.points))])


class Draws(NamedTuple):
    """What a sampler drew: for each chain unconstrained points (draws, dim) and statistics (draws,)."""

    points: list[np.ndarray]
    stats: list[dict[str, np.ndarray]]
    interrupted: bool

    def rectangle(self) -> tuple[list[int], np.ndarray, dict[str, np.ndarray]]:
        """Chains, points (chains, draws, dim) and statistics (chains, draws): of interrupted chains as many draws as fit.

        Chains are cut to one length, and those that are shorter left out, so that most draws are kept.
        """
        lengths = [min(len(points), *map(len, stats.values())) for points, stats in zip(*self[:2], strict=True)]
        length = max(lengths, key=lambda at_least: at_least * sum(n >= at_least for n in lengths), default=0)
        if length == 0:
            raise KeyboardInterrupt("interrupted before the first draw after warmup")
        kept = [chain for chain, n in enumerate(lengths) if n >= length]
        return (
            kept,
            np.stack([self.points[chain][:length] for chain in kept]),
            {name: np.stack([self.stats[chain][name][:length] for chain in kept]) for name in self.stats[0]},
        )


def sample_nutpie(density: LogDensity, asked: Asked) -> Draws:
    """Draw with nutpie: chains of compiled kernels at the same time, others one after the other."""
    import_arviz()  # nutpie does, and would pass on its notice
    import nutpie
    import pyarrow  # comes with nutpie, whose results it reads
    from nutpie.compiled_pyfunc import from_pyfunc

    def expand(x: np.ndarray, **_: Any) -> dict[str, np.ndarray]:
        return {"x": np.array(x)}

    lock = threading.Lock()  # chains start at once, but Pyro, whose handlers are global, runs for one at a time

    def start(chain_seed: int) -> np.ndarray:
        with lock:
            return asked.start(density, chain_seed)

    start(asked.seed)  # errors come out here as they are, not through nutpie's threads
    cores, compiled = asked.cores, without_python(density, start)
    if compiled is None:
        cores = 1  # Python's lock is held between operations, and Pyro's handlers are global to the process
        compiled = from_pyfunc(
            ndim=density.dim,
            make_logp_fn=lambda: density.value_and_grad,
            make_expand_fn=lambda *_: expand,
            expanded_dtypes=[np.dtype("float64")],
            expanded_shapes=[(density.dim,)],
            expanded_names=["x"],
            make_initial_point_fn=start,
        )
    interrupted = False
    try:
        sampler = nutpie.sample(
            compiled,
            draws=asked.num_samples,
            tune=asked.warmup,
            chains=asked.chains,
            cores=min(cores, asked.chains),
            seed=asked.seed,
            progress_bar=asked.progress,
            return_raw_trace=True,
            blocking=False,
            target_accept=asked.target_accept,
            maxdepth=asked.max_tree_depth,
        )
        try:
            trace = sampler.wait()
        except KeyboardInterrupt:
            interrupted, trace = True, sampler.abort()
        except BaseException:
            sampler.cancel()
            raise
        batches, records = trace.get_arrow_trace()
    except BaseException as error:
        if type(error).__module__ != "pyo3_runtime":
            raise
        # a panic of its Rust code, which is no Exception
        raise RuntimeError(
            f"nutpie has failed, {error}; see its message above. Pass backend='pyro', or other numbers of draws."
        ) from error
    draws = [
        pyarrow.array(batch.column("x")).flatten().to_numpy().reshape(-1, density.dim)[asked.warmup :]
        for batch in batches
    ]
    names = {
        "diverging": "diverging",
        "tree_depth": "depth",
        "n_steps": "n_steps",
        "energy": "energy",
        "acceptance_rate": "mean_tree_accept",
        "step_size": "step_size",
        "lp": "logp",
    }
    stats = [
        {
            ours: pyarrow.array(r.column(theirs)).to_numpy(zero_copy_only=False)[asked.warmup :]
            for ours, theirs in names.items()
        }
        for r in records
    ]
    return Draws(draws, stats, interrupted)


def without_python(density: LogDensity, start: Callable[[int], np.ndarray]) -> Any:
    """The density for nutpie as a C function, which its threads call at the same time; None where there is none."""
    if density.native is None:
        return None
    try:
        from nutpie.compile_pymc import CompiledPyMCModel  # needs no PyMC: a C function for values, one for the draws

        known = {field.name for field in dataclasses.fields(CompiledPyMCModel)}
        arguments = {
            "dims": {},
            "compiled_logp_func": SimpleNamespace(address=density.native.function),
            "compiled_expand_func": SimpleNamespace(address=density.native.copy),
            "initial_point_func": start,
            "shared_data": {},
            "shared_var_keys": {},  # nutpie 0.16.11 has it, 0.16.8 does not
            "user_data": density.native.data,
            "n_expanded": density.dim,
            "shape_info": (["x"], [slice(0, density.dim)], [(density.dim,)]),
            "logp_func": density,  # held as long as the model is
            "expand_func": None,
            "_n_dim": density.dim,
            "_shapes": {"x": (density.dim,)},
            "_coords": {},
        }
        return CompiledPyMCModel(**{name: value for name, value in arguments.items() if name in known})
    except (ImportError, TypeError) as error:  # no public interface of nutpie
        logger.warning("chains run one after the other: nutpie does not take a C function as expected, %s", error)
        return None


class RecordingNUTS(NUTS):
    """Pyro's NUTS, keeping what it knows about each trajectory and does not report."""

    def _sample_r(self, name: str) -> Any:
        r, unscaled = super()._sample_r(name)
        self.energy = float(self._kinetic_energy(unscaled) + self._potential_energy_last)
        self.depth = 0
        self.accepts: list[float] = []
        return r, unscaled

    def _build_tree(self, z: Any, r: Any, grads: Any, log_slice: Any, direction: Any, depth: int, energy: Any) -> Any:
        self.depth = max(self.depth, depth + 1)
        return super()._build_tree(z, r, grads, log_slice, direction, depth, energy)

    def _build_basetree(self, *args: Any) -> Any:
        tree = super()._build_basetree(*args)
        self.accepts.append(float(tree.sum_accept_probs))
        return tree


def sample_pyro(density: LogDensity, asked: Asked) -> Draws:
    """Draw with Pyro, one chain after the other."""
    draws, stats, interrupted = [], [], False
    for chain_seed in np.random.SeedSequence(asked.seed).generate_state(asked.chains):
        start = torch.from_numpy(asked.start(density, chain_seed))
        pyro.set_rng_seed(int(chain_seed))
        rows: list[tuple[Any, ...]] = []
        points: list[np.ndarray] = []

        def record(
            kernel: Any,
            state: Any,
            stage: str,
            step: int,
            rows: list[tuple[Any, ...]] = rows,
            points: list[np.ndarray] = points,
        ) -> None:
            if stage == "Sample":
                lp = -float(kernel._potential_energy_last)
                accept = float(np.mean(kernel.accepts))
                diverging = kernel._divergences[-1:] == [step]
                points.append(state["x"].numpy().copy())
                rows.append(
                    (diverging, kernel.depth, len(kernel.accepts), kernel.energy, accept, float(kernel.step_size), lp)
                )

        kernel = RecordingNUTS(
            potential_fn=lambda z: -density.log_density(z["x"]),
            target_accept_prob=asked.target_accept,
            max_tree_depth=asked.max_tree_depth,
        )
        with torch.device("cpu"):  # the sampler's own state; the model runs where its tensors are
            mcmc = MCMC(
                kernel,
                num_samples=asked.num_samples,
                warmup_steps=asked.warmup,
                initial_params={"x": start},
                hook_fn=record,
                disable_progbar=not asked.progress,
            )
            try:
                mcmc.run()
            except KeyboardInterrupt:
                interrupted = True
        draws.append(np.array(points).reshape(-1, density.dim))
        names = ("diverging", "tree_depth", "n_steps", "energy", "acceptance_rate", "step_size", "lp")
        stats.append({name: np.array([row[i] for row in rows]) for i, name in enumerate(names)})
        if interrupted:
            break
    return Draws(draws, stats, interrupted)
