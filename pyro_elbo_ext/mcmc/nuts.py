"""NUTS on an unchanged Pyro model, by nutpie or by Pyro, on one log density with its gradient."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import numbers
import os
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from pyro_elbo_ext.density import LogDensity
from pyro_elbo_ext.density.completing import complete
from pyro_elbo_ext.inference_data.draws import as_integers, to_numpy
from pyro_elbo_ext.inference_data.export import to_arviz
from pyro_elbo_ext.inference_data.labels import Labels
from pyro_elbo_ext.mcmc.predictions import Predictions
from pyro_elbo_ext.mcmc.samplers import Asked, sample_nutpie, sample_pyro
from pyro_elbo_ext.mcmc.starts import draws_of
from pyro_elbo_ext.programs.arguments import check_count, check_fraction, check_seed
from pyro_elbo_ext.programs.nodes import is_data, is_marked_site
from pyro_elbo_ext.programs.randomness import isolated

STARTED_WARMUP = 200  # of chains that start from a fit
COMPILE_DRAWS = 1000  # warmup included, all chains: from here on compiling saves more seconds than it takes


def run_nuts(
    model: Callable[..., Any] | LogDensity,
    *args: Any,
    num_samples: int = 1000,
    warmup: int | None = None,
    chains: int = 4,
    seed: int = 0,
    backend: Literal["auto", "pyro", "nutpie"] = "auto",
    progress: bool = True,
    target_accept: float = 0.8,
    max_tree_depth: int = 10,
    init: float | Mapping[str, Any] = 2.0,
    start: Any = None,
    compile: bool | Literal["auto"] = "auto",
    cores: int | None = None,
    log_likelihood: bool = False,
    posterior_predictive: bool = False,
    discrete: bool = True,
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

    Sites marked for enumeration are summed out while sampling. Then each draw of the others is completed by one of them,
    from their exact posterior given it and the data, so that all are draws of the joint posterior. For a site with
    ``obs_mask`` the completed data are reported under the site's own name, ``name_unobserved`` is not.

    Parameters
    ----------
    model
        Pyro model, called as ``model(*args, **kwargs)``. Model keywords with the name of a parameter below need
        ``functools.partial``. Or what `compiled_log_density` made of a model and its arguments: then nothing is traced and
        compiled again, which takes longer than to sample from a small model. Data and parameters are those of that moment,
        and a chain runs in as many threads as torch was set to.
    num_samples, warmup
        Draws per chain kept, at least 1, and draws before them used for adaptation and dropped, at least 0. Without any,
        which only Pyro can do, steps have the first size that is tried. None: 1000, or 200 with ``start``.
    chains
        Number of chains.
    seed
        Same seed, same draws; from 0 to ``2**32 - 1``.
    backend
        "nutpie" (needs ``pip install "pyro_elbo_ext[nuts]"``), "pyro", or "auto": nutpie where it is installed and there
        is a warmup.
    progress
        Show a progress bar.
    target_accept
        Mean acceptance probability that the step size is adapted to, in (0, 1).
    max_tree_depth
        At most ``2**max_tree_depth - 1`` leapfrog steps per draw.
    init
        A number r: chains start uniformly on (-r, r) in unconstrained space, as in Stan. A mapping from site name to
        value: these sites start there, the others uniformly on (-2, 2).
    start
        What `fit` gave for this model and data. Chains start at draws of its guide, in the midst of the posterior, so that
        a short warmup is enough. Modes that the guide does not know the chains do not know either. ``init`` is not used.
    compile
        Whether to turn log density and gradient into machine code first, by torch's Inductor and a C++ compiler;
        "auto": if ``chains * (warmup + num_samples)`` is at least `COMPILE_DRAWS`. Where a model does not compile it
        runs as a graph of torch operations, and a message at level INFO of the logger ``pyro_elbo_ext`` says why.
    cores
        Chains that run at the same time, at most; as many as there are cores if None.
    log_likelihood
        Whether to have the group ``log_likelihood`` too, as of `from_pyro_svi`: what ``arviz.loo``, ``arviz.compare`` and
        `compare_predictive` need. It takes 8 bytes for each draw and observation.
    posterior_predictive
        Whether to have the group ``posterior_predictive`` too, for which the model runs once per draw.
    discrete
        Whether to draw the sites that are marked for enumeration too. If not, neither they are reported nor the
        deterministic sites of such a model.

    Returns
    -------
    arviz.InferenceData or xarray.DataTree
        Names that files cannot hold are changed as in `from_pyro_svi`. Groups
        ``posterior`` (latent and deterministic sites, shape ``(chain, draw, *plates, *event)``, integers where a site is
        marked for enumeration),
        ``sample_stats`` (``diverging``, ``tree_depth``, ``n_steps``, ``energy``, ``acceptance_rate``, ``step_size``,
        ``lp``; all of shape (chain, draw)) and ``observed_data``. ``lp`` is the log density on unconstrained space,
        Jacobian included. ``energy`` is the Hamiltonian of the draw for nutpie; Pyro keeps only the one that its
        trajectory starts from, which differs by the integration error. Beside these, the groups that are asked for.

    Raises
    ------
    ValueError
        For arguments out of range; a model without continuous latent sites, with unmarked discrete latent sites,
        subsampling plates, NaN in observations or parameters, or random numbers outside ``pyro.sample``; where no starting
        point with finite density and gradient is found. Each names the argument or the site, before sampling.
    TypeError
        For arguments of a wrong type, ``start`` among them.
    ImportError
        For ``backend="nutpie"`` without nutpie.
    RuntimeError
        If nutpie itself fails.
    KeyboardInterrupt
        For Ctrl-C before the first draw after warmup.

    References
    ----------
    Hoffman, Gelman (2014), The No-U-Turn Sampler. Betancourt (2017), A Conceptual Introduction to Hamiltonian Monte
    Carlo.
    """
    if isinstance(model, LogDensity):
        if args or kwargs:
            raise TypeError("the log density has been made for the model's arguments: pass no others")
    elif not callable(model):
        raise TypeError(f"model must be callable, got {type(model).__name__}")
    if warmup is None:
        warmup = 1000 if start is None else STARTED_WARMUP
    if cores is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for name, number, least in (
        ("num_samples", num_samples, 1),
        ("warmup", warmup, 0),
        ("chains", chains, 1),
        ("max_tree_depth", max_tree_depth, 1),
        ("cores", cores, 1),
    ):
        check_count(name, number, least)
    check_seed(seed, needed=True)
    check_fraction("target_accept", target_accept)
    if not isinstance(init, Mapping) and not (isinstance(init, numbers.Real) and 0 <= init < np.inf):
        raise ValueError(f"init must be a radius of at least 0 or a mapping from site to value, got {init!r}")
    if backend not in ("auto", "pyro", "nutpie"):
        raise ValueError(f"backend must be 'auto', 'pyro' or 'nutpie', got {backend!r}")
    if compile not in ("auto", True, False):
        raise ValueError(f"compile must be 'auto', True or False, got {compile!r}")
    if not isinstance(discrete, bool):
        raise TypeError(f"discrete must be True or False, got {discrete!r}")
    installed = importlib.util.find_spec("nutpie") is not None
    if backend == "nutpie" and not installed:
        raise ImportError('backend="nutpie" needs nutpie: pip install "pyro_elbo_ext[nuts]"')
    if backend == "nutpie" and warmup == 0:
        raise ValueError("warmup must be at least 1 with nutpie, which adapts in it: pass warmup=1, or backend='pyro'")
    library = "nutpie" if installed and backend != "pyro" and warmup > 0 else "pyro"

    with isolated(seed):
        if compile == "auto":
            compile = chains * (warmup + num_samples) >= COMPILE_DRAWS
        # the code of a chain runs in one thread, beside the others; by the number of chains, not of cores, so that the
        # draws do not depend on the machine
        one_thread = library == "nutpie" and chains > 1
        density = (
            model if isinstance(model, LogDensity) else LogDensity(model, args, kwargs, seed, bool(compile), one_thread)
        )
        sites = density.program.sites
        with_states = discrete and density.program.has_discrete
        reported = _names_with_discrete(density) if with_states else density.names
        labels = Labels(nodes=sites)
        predictions = Predictions(log_likelihood, posterior_predictive)
        predictions.check(density, with_states)
        labels.check({name: site for name, site in sites.items() if name in reported or site["is_observed"]})
        began = time.perf_counter()
        sample = sample_nutpie if library == "nutpie" else sample_pyro
        points = None if start is None else draws_of(start, density, seed)
        asked = Asked(
            num_samples, warmup, chains, seed, progress, float(target_accept), max_tree_depth, init, cores, points
        )
        drawn = sample(density, asked)
        elapsed = time.perf_counter() - began
        kept, points, stats = drawn.rectangle()
        values = density.constrain(points)
        whole = (
            {name: to_numpy(value) for name, value in complete(density, points, seed).items()}
            if with_states
            else values
        )
    predicted = predictions.groups(density, points, whole, labels, seed, progress)
    values = {name: as_integers(value) if is_marked_site(sites[name]) else value for name, value in whole.items()}

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
    observed = {
        name: site["value"].detach().cpu().numpy()
        for name, site in sites.items()
        if site["type"] == "sample" and is_data(site)
    }
    groups = {
        "posterior": labels.dataset({name: values[name] for name in reported}, sites, attrs=attrs),
        "sample_stats": labels.dataset(stats, {}, attrs=attrs),
        **predicted,
    }
    groups = {name: group.assign_coords(chain=kept) for name, group in groups.items()}
    return to_arviz({**groups, "observed_data": labels.dataset(observed, sites, ())})


def _names_with_discrete(density: LogDensity) -> list[str]:
    """The sites that a completed draw has, of which one is made: whether it can be is known before sampling then."""
    try:
        return list(complete(density, density.program.points[0], 0))
    except (ValueError, NotImplementedError) as error:
        raise ValueError(
            f"{error}\nPass discrete=False to do without draws of the sites that are summed out."
        ) from error
