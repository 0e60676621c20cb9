"""NUTS on an unchanged Pyro model, by nutpie or by Pyro, on one log density with its gradient."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import numbers
import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import numpy as np
import pyro
import torch
import xarray as xr
from pyro import poutine
from pyro.infer import MCMC, NUTS

from pyro_elbo_ext.export import to_arviz
from pyro_elbo_ext.log_density import LogDensity
from pyro_elbo_ext.unconstrained import base_distribution, isolated

logger = logging.getLogger(__name__)

INIT_TRIES = 100  # starting points tried per chain, as in Stan
COMPILE_DRAWS = 1000  # warmup included, all chains: from here on compiling saves more seconds than it takes


def run_nuts(
    model: Callable[..., Any],
    *args: Any,
    num_samples: int = 1000,
    warmup: int = 1000,
    chains: int = 4,
    seed: int = 0,
    backend: Literal["auto", "pyro", "nutpie"] = "auto",
    progress: bool = True,
    target_accept: float = 0.8,
    max_tree_depth: int = 10,
    init: float | Mapping[str, Any] = 2.0,
    compile: bool | Literal["auto"] = "auto",
    cores: int | None = None,
    **kwargs: Any,
) -> Any:
    """Draw from a Pyro model's posterior by NUTS.

    The model is taken as it is. Latent sites may have any support with a bijection to unconstrained space, flat ones
    too (``ImproperUniform``). Sampling is in float64 where the model allows it, also for a float32 model and data.
    ``pyro.param`` and module parameters are held at their current values; the parameter store, the modules and the
    random number generators of torch, numpy and random are left as they were.

    With nutpie, chains of a compiled model run at the same time, each in one thread, without Python. They run one after the
    other with Pyro, where the model is not compiled, and where its graph needs torch's operations beside its own code (large
    matrix products, factorizations). The draws are the same either way. Interrupted by Ctrl-C, sampling ends with the draws
    so far, of the chains and in the length that keep most of them, and with a warning.

    Sites marked for enumeration are summed out and not reported, nor are deterministic sites of such a model. For a
    site with ``obs_mask`` the completed data are reported under the site's own name, ``name_unobserved`` is not.

    Parameters
    ----------
    model
        Pyro model, called as ``model(*args, **kwargs)``. Model keywords with the name of a parameter below need
        ``functools.partial``.
    num_samples, warmup
        Draws per chain kept, and draws before them used for adaptation and dropped.
    chains
        Number of chains.
    seed
        Same seed, same draws; from 0 to 2**32 - 1.
    backend
        "nutpie" (needs ``pip install "pyro_elbo_ext[nuts]"``), "pyro", or "auto": nutpie where it is installed.
    progress
        Show a progress bar.
    target_accept
        Mean acceptance probability that the step size is adapted to, in (0, 1).
    max_tree_depth
        At most ``2**max_tree_depth - 1`` leapfrog steps per draw.
    init
        A number r: chains start uniformly on (-r, r) in unconstrained space, as in Stan. A mapping from site name to
        value: these sites start there, the others uniformly on (-2, 2).
    compile
        Whether to turn log density and gradient into machine code first, by torch's Inductor and a C++ compiler;
        "auto": if ``chains * (warmup + num_samples)`` is at least `COMPILE_DRAWS`. Where a model does not compile it
        runs as a graph of torch operations, and a message at level INFO of the logger ``pyro_elbo_ext`` says why.
    cores
        Chains that run at the same time, at most; as many as there are cores if None.

    Returns
    -------
    arviz.InferenceData or xarray.DataTree
        Groups ``posterior`` (continuous latent and deterministic sites, shape (chain, draw, *plates, *event)),
        ``sample_stats`` (``diverging``, ``tree_depth``, ``n_steps``, ``energy``, ``acceptance_rate``, ``step_size``,
        ``lp``; all of shape (chain, draw)) and ``observed_data``. ``lp`` is the log density on unconstrained space,
        Jacobian included. ``energy`` is the Hamiltonian of the draw for nutpie; Pyro keeps only the one that its
        trajectory starts from, which differs by the integration error.

    Raises
    ------
    ValueError
        For arguments out of range; a model without continuous latent sites, with unmarked discrete latent sites,
        subsampling plates, NaN observations, or random numbers outside ``pyro.sample``; where no starting point with
        finite density is found (naming the site). All before sampling.
    TypeError
        For arguments of a wrong type.
    ImportError
        For ``backend="nutpie"`` without nutpie.
    KeyboardInterrupt
        For Ctrl-C before the first draw after warmup.

    References
    ----------
    Hoffman, Gelman (2014), The No-U-Turn Sampler. Betancourt (2017), A Conceptual Introduction to Hamiltonian Monte
    Carlo.
    """
    if not callable(model):
        raise TypeError(f"model must be callable, got {type(model).__name__}")
    if cores is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for name, number, least in (
        ("num_samples", num_samples, 1),
        ("warmup", warmup, 0),
        ("chains", chains, 1),
        ("seed", seed, 0),
        ("max_tree_depth", max_tree_depth, 1),
        ("cores", cores, 1),
    ):
        if isinstance(number, bool) or not isinstance(number, numbers.Integral):
            raise TypeError(f"{name} must be an integer, got {number!r}")
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")
    if seed >= 2**32:
        raise ValueError(f"seed must be below 2**32, got {seed}")
    if not 0 < target_accept < 1:
        raise ValueError(f"target_accept must be between 0 and 1, got {target_accept}")
    if not isinstance(init, Mapping) and not (isinstance(init, numbers.Real) and 0 <= init < np.inf):
        raise ValueError(f"init must be a radius of at least 0 or a mapping from site to value, got {init!r}")
    if backend not in ("auto", "pyro", "nutpie"):
        raise ValueError(f"backend must be 'auto', 'pyro' or 'nutpie', got {backend!r}")
    if compile not in ("auto", True, False):
        raise ValueError(f"compile must be 'auto', True or False, got {compile!r}")
    installed = importlib.util.find_spec("nutpie") is not None
    if backend == "nutpie" and not installed:
        raise ImportError('backend="nutpie" needs nutpie: pip install "pyro_elbo_ext[nuts]"')
    library = "nutpie" if installed and backend != "pyro" else "pyro"

    with isolated(seed):
        if compile == "auto":
            compile = chains * (warmup + num_samples) >= COMPILE_DRAWS
        # the code of a chain runs in one thread, beside the others; by the number of chains, not of cores, so that the
        # draws do not depend on the machine
        one_thread = library == "nutpie" and chains > 1
        density = LogDensity(model, args, kwargs, seed, bool(compile), one_thread)
        began = time.perf_counter()
        sample = _sample_nutpie if library == "nutpie" else _sample_pyro
        drawn = sample(
            density, num_samples, warmup, chains, seed, progress, float(target_accept), max_tree_depth, init, cores
        )
        elapsed = time.perf_counter() - began
        kept, points, stats = drawn.rectangle()
        values = density.constrain(points)

    attrs = {
        "inference_library": library,
        "inference_library_version": importlib.metadata.version("pyro-ppl" if library == "pyro" else library),
        "sampling_time": elapsed,
        "tuning_steps": warmup,
        "seed": seed,
    }
    if drawn.interrupted:
        attrs["interrupted"] = 1
        warnings.warn(
            f"interrupted: {points.shape[1]} of {num_samples} draws are kept, in {len(kept)} of {chains} chains",
            stacklevel=2,
        )
    samples = {"chain": np.array(kept), "draw": np.arange(points.shape[1])}
    sites = density.program.sites
    observed = {
        name: site["value"].detach().cpu().numpy()
        for name, site in sites.items()
        if site["is_observed"] and not site["infer"].get("_deterministic") and base_distribution(site["fn"]) != "Unit"
    }
    return to_arviz(
        {
            "posterior": _dataset({name: values[name] for name in density.names}, sites, samples, attrs),
            "sample_stats": _dataset(stats, {}, samples, attrs),
            "observed_data": _dataset(observed, sites, {}, {}),
        }
    )


class _Draws(NamedTuple):
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


def starting_point(density: LogDensity, rng: np.random.Generator, init: float | Mapping[str, Any]) -> np.ndarray:
    """A point with finite log density and gradient: uniform on (-init, init), or at given sites' values."""
    radius = 2.0 if isinstance(init, Mapping) else float(init)
    tries = INIT_TRIES if radius > 0 else 1
    x = np.zeros(density.dim)
    for _ in range(tries):
        x = rng.uniform(-radius, radius, density.dim) if radius > 0 else np.zeros(density.dim)
        if isinstance(init, Mapping):
            density.program.place(torch.from_numpy(x), init, "init")
        value, gradient = density.value_and_grad(x)
        if np.isfinite(value) and np.isfinite(gradient).all():
            return x
    raise ValueError(
        f"no starting point with finite log density and gradient in {tries} tries: {_culprit(density, x)}. "
        "Check the data and supports of that site, or give starting values by init={site: value}."
    )


def _culprit(density: LogDensity, x: np.ndarray) -> str:
    """The site to blame for a log density or gradient that is not finite at ``x``."""
    try:
        trace, _ = density.program.run_at(torch.from_numpy(x))
    except torch.linalg.LinAlgError as error:
        return f"the model itself fails, {error}"
    with density.program.precision():
        for name in density.program.sites:
            single = poutine.Trace()
            single.add_node(name, **trace.nodes[name])
            value = float(single.log_prob_sum())
            if not np.isfinite(value):
                return f"the log prob of site '{name}' is {value}"
    _, gradient = density.value_and_grad(x)
    for name, latent in density.layout.items():
        if not np.isfinite(gradient[latent.start : latent.stop]).all():
            return f"the gradient with respect to site '{name}' is not finite"
    return "the log Jacobian of the map to unconstrained space is not finite"


def _sample_nutpie(
    density: LogDensity,
    num_samples: int,
    warmup: int,
    chains: int,
    seed: int,
    progress: bool,
    target_accept: float,
    max_tree_depth: int,
    init: float | Mapping[str, Any],
    cores: int,
) -> _Draws:
    import nutpie
    import pyarrow  # comes with nutpie, whose results it reads
    from nutpie.compiled_pyfunc import from_pyfunc

    def expand(x: np.ndarray, **_: Any) -> dict[str, np.ndarray]:
        return {"x": np.array(x)}

    lock = (
        threading.Lock()
    )  # of several chains that start at once, one runs the model by Pyro, whose handlers are global

    def start(chain_seed: int) -> np.ndarray:
        with lock:
            return starting_point(density, np.random.default_rng(chain_seed), init)

    start(seed)  # errors come out here as they are, not through nutpie's threads
    compiled = _without_python(density, start)
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
    sampler = nutpie.sample(
        compiled,
        draws=num_samples,
        tune=warmup,
        chains=chains,
        cores=min(cores, chains),
        seed=seed,
        progress_bar=progress,
        return_raw_trace=True,
        blocking=False,
        target_accept=target_accept,
        maxdepth=max_tree_depth,
    )
    interrupted = False
    try:
        trace = sampler.wait()
    except KeyboardInterrupt:
        interrupted, trace = True, sampler.abort()
    except BaseException:
        sampler.cancel()
        raise
    batches, records = trace.get_arrow_trace()
    draws = [
        pyarrow.array(batch.column("x")).flatten().to_numpy().reshape(-1, density.dim)[warmup:] for batch in batches
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
            ours: pyarrow.array(r.column(theirs)).to_numpy(zero_copy_only=False)[warmup:]
            for ours, theirs in names.items()
        }
        for r in records
    ]
    return _Draws(draws, stats, interrupted)


def _without_python(density: LogDensity, start: Callable[[int], np.ndarray]) -> Any:
    """The density for nutpie as a C function, which its threads call at the same time; None where there is none."""
    if density.native is None:
        return None
    try:
        from nutpie.compile_pymc import CompiledPyMCModel  # needs no PyMC: a C function for values, one for the draws

        return CompiledPyMCModel(
            dims={},
            compiled_logp_func=SimpleNamespace(address=density.native.function),
            compiled_expand_func=SimpleNamespace(address=density.native.copy),
            initial_point_func=start,
            shared_data={},
            user_data=density.native.data,
            n_expanded=density.dim,
            shape_info=(["x"], [slice(0, density.dim)], [(density.dim,)]),
            logp_func=density,  # held as long as the model is
            expand_func=None,
            _n_dim=density.dim,
            _shapes={"x": (density.dim,)},
            _coords={},
        )
    except (ImportError, TypeError) as error:  # no public interface of nutpie
        logger.info("chains run one after the other: nutpie does not take a C function as expected, %s", error)
        return None


class _RecordingNUTS(NUTS):
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


def _sample_pyro(
    density: LogDensity,
    num_samples: int,
    warmup: int,
    chains: int,
    seed: int,
    progress: bool,
    target_accept: float,
    max_tree_depth: int,
    init: float | Mapping[str, Any],
    cores: int,
) -> _Draws:
    draws, stats, interrupted = [], [], False
    for chain_seed in np.random.SeedSequence(seed).generate_state(chains):
        start = torch.from_numpy(starting_point(density, np.random.default_rng(chain_seed), init))
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

        kernel = _RecordingNUTS(
            potential_fn=lambda z: -density.log_density(z["x"]),
            target_accept_prob=target_accept,
            max_tree_depth=max_tree_depth,
        )
        with torch.device("cpu"):  # the sampler's own state; the model runs where its tensors are
            mcmc = MCMC(
                kernel,
                num_samples=num_samples,
                warmup_steps=warmup,
                initial_params={"x": start},
                hook_fn=record,
                disable_progbar=not progress,
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
    return _Draws(draws, stats, interrupted)


def _dataset(
    values: Mapping[str, np.ndarray], sites: Mapping[str, Any], samples: dict[str, np.ndarray], attrs: dict[str, Any]
) -> xr.Dataset:
    """Arrays with leading dims ``samples``, then the plates' names, then ``{site}_dim_{axis}`` as ArviZ has it."""
    variables, coords = {}, dict(samples)
    for name, array in values.items():
        shape = array.shape[len(samples) :]
        dims = [f"{name}_dim_{axis}" for axis in range(len(shape))]
        site: Any = sites.get(name)
        for frame in site["cond_indep_stack"] if site is not None else ():
            # pyro.deterministic counts all dims as event dims unless told otherwise
            event_dim = 0 if site["infer"].get("_deterministic") else site["fn"].event_dim
            axis = len(shape) - event_dim + frame.dim if frame.vectorized else -1
            if axis >= 0 and shape[axis] == frame.size:
                dims[axis] = f"{frame.name}_dim" if frame.name in values else frame.name
        coords.update({dim: np.arange(size) for dim, size in zip(dims, shape, strict=True)})
        variables[name] = ([*samples, *dims], array)
    return xr.Dataset(variables, coords=coords, attrs=attrs)
