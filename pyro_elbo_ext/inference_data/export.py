"""Pyro runs as ArviZ data.  Beside `arviz_statistics` the only user of ArviZ."""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import pyro
import xarray as xr
from numpy.typing import NDArray
from pyro.infer import MCMC

from pyro_elbo_ext.history import History
from pyro_elbo_ext.inference_data.draws import by_chain, to_numpy
from pyro_elbo_ext.inference_data.guide_runs import guide_runs
from pyro_elbo_ext.inference_data.labels import Labels
from pyro_elbo_ext.inference_data.model_runs import ModelRuns
from pyro_elbo_ext.inference_data.quiet_arviz import import_arviz
from pyro_elbo_ext.inference_data.summed_out import SummedOut
from pyro_elbo_ext.programs.arguments import check_count, check_seed
from pyro_elbo_ext.programs.given import check_full, run_given
from pyro_elbo_ext.programs.points import point_estimate
from pyro_elbo_ext.programs.randomness import torch_kept, untouched
from pyro_elbo_ext.programs.running import check_callable
from pyro_elbo_ext.terms.enumeration.marks import latent_names
from pyro_elbo_ext.terms.enumeration.pointwise import Together


def to_arviz(groups: Mapping[str, xr.Dataset]) -> Any:
    """Groups of labelled arrays as the data structure of the installed ArviZ.

    Parameters
    ----------
    groups
        Name of the group, such as ``"posterior"``, to its arrays. ArviZ wants dims ``(chain, draw, ...)`` in the groups
        of samples. The attributes of ``posterior`` become
        those of the whole too, with ``created_at`` and ``creation_library`` where they are missing.

    Returns
    -------
    arviz.InferenceData or xarray.DataTree
        The former with ArviZ 0.x, the latter with ArviZ 1.x. Both have ``data["posterior"]["site"]``,
        ``data.to_netcdf(path)`` and are taken by all functions of that ArviZ; :func:`dataset_of` reads either.

    Raises
    ------
    TypeError
        If a group is not an ``xarray.Dataset``.
    """
    for name, group in groups.items():
        if not isinstance(group, xr.Dataset):
            raise TypeError(f"group '{name}' must be an xarray.Dataset, got {type(group).__name__}")
    arviz = import_arviz()

    tree = xr.DataTree.from_dict(dict(groups))
    made = attributes()
    created = {name: made[name] for name in ("created_at", "creation_library", "creation_library_version")}
    tree.attrs = {**created, **(groups["posterior"].attrs if "posterior" in groups else {})}
    return arviz.from_datatree(tree) if hasattr(arviz, "from_datatree") else tree


def dataset_of(data: Any, group: str = "posterior") -> xr.Dataset:
    """One group of ArviZ data of either generation.

    Parameters
    ----------
    data
        ``arviz.InferenceData``, ``xarray.DataTree``, or an ``xarray.Dataset``, which is returned as it is.
    group
        Name of the group.

    Raises
    ------
    KeyError
        If there is no such group.
    TypeError
        If ``data`` is none of these.
    """
    if isinstance(data, xr.Dataset):
        return data
    names = groups_of(data)
    if group not in names:
        raise KeyError(f"there is no group '{group}' in the data; it has {', '.join(names) or 'none'}")
    found = data[group]
    return found.to_dataset() if isinstance(found, xr.DataTree) else found


def groups_of(data: Any) -> list[str]:
    """Names of the groups of ArviZ data of either generation.

    Raises
    ------
    TypeError
        If ``data`` is neither ``arviz.InferenceData`` nor ``xarray.DataTree``.
    """
    if isinstance(data, xr.DataTree):
        return list(data.children)
    if callable(getattr(data, "groups", None)):  # InferenceData, also of an ArviZ that is not the installed one
        return list(data.groups())
    raise TypeError(f"data must be InferenceData, DataTree or xarray.Dataset, got {type(data).__name__}")


def from_pyro_svi(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 1000,
    history: History | None = None,
    posterior_predictive: bool = True,
    prior: bool = True,
    log_likelihood: bool = True,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str | None]] | None = None,
    seed: int | None = None,
    progress: bool = False,
    **kwargs: Any,
) -> Any:
    """Draws of a fitted guide, and what the model makes of them, as ArviZ data.

    Guide and model run once per draw, so that any model will do, vectorized or not. Parameters are left as they are,
    and modules in the mode they are in: call ``eval()`` first if that matters, as for dropout and batch normalization.

    Parameters
    ----------
    model, guide
        As given to ``pyro.infer.SVI``, called as ``model(*args, **kwargs)``. Model keywords with the name of a
        parameter below need ``functools.partial``.
    num_samples
        Number of draws S, in one chain.
    history
        Record of the fit, as ``DecomposedELBO.history``.
    posterior_predictive, prior, log_likelihood
        Whether to make these groups.
    coords
        Dim to the labels along it.
    dims
        Site, or tensor argument of the model, to the names of its axes, plates before event dims, None to keep an axis'
        own name: the plate's name, or ``{site}_dim_{axis}``.
    seed
        Same seed, same draws, and the caller's random number generators are left as they were. None: draw from these.
    progress
        Show a progress bar.

    Returns
    -------
    arviz.InferenceData or xarray.DataTree
        See :func:`to_arviz`. A name that files cannot hold is changed, ``/`` to ``.``, see
        `pyro_elbo_ext.inference_data.names`; the variable's ``attrs["site"]`` is then the site's name. Groups:

        ``posterior``
            Latent sites in their constrained space, and ``pyro.deterministic`` sites, shape ``(1, S, *plates, *event)``. A
            site with ``obs_mask`` is there completed, under its own name. A discrete site that is marked for enumeration
            is drawn by the guide, or, where the guide leaves it to be summed out, from its exact posterior given the
            guide's draw and the data; its states are integers.
        ``posterior_predictive``
            Observed sites drawn anew at each draw of the posterior, same shape; without ``pyro.factor``.
        ``prior``, ``prior_predictive``
            The same from the model alone.
        ``log_likelihood``
            Unscaled ``log p(x_i | z)`` of each observation i, an element of the site's batch, in nats, shape
            ``(1, S, *plates)``, so that ``arviz.loo`` counts each observation once, whatever ``poutine.scale`` says.
            Observations masked out in all draws are left out: a site that has any has, in place of the plates' dims,
            ``{site}_unmasked`` with coordinates ``{site}_{plate}``. Where the mask differs between draws, an
            observation has 0 in those that mask it, and ``arviz.loo`` has no meaning. Discrete sites that are marked and
            not in the guide are summed out, so that it is ``log sum_k p(k) p(x_i | k, z)``. Where they tie observations
            together, as in a sequence, it is that of all of them, by the plates that are left, and the variable's
            ``attrs["of"]`` says so; where no plate is left it is refused.
        ``sample_stats``
            ``log_p`` and ``log_q``, the log densities of model and guide at each draw, in nats, shape (1, S), scaled
            and masked as in the ELBO, which is the mean of their difference; what is summed out is summed out in
            ``log_p`` too. ``arviz.loo_approximate_posterior(data,
            data["sample_stats"]["log_p"], data["sample_stats"]["log_q"])`` of ArviZ 1.x takes them.
        ``observed_data``
            Observed sites' values, masked or not.
        ``constant_data``
            Tensors and arrays among the model's arguments, named as in its signature, unless they are observed.
        ``svi_history``
            ``history.to_xarray()``; ``History.from_xarray(dataset_of(data, "svi_history"))`` is the history again.

    Raises
    ------
    ValueError
        For ``num_samples`` below 1; a site that is missing from the guide, has NaN, cannot be drawn, or differs in
        shape between draws; a plate that subsamples; two plates of one name and different size; ``coords`` or ``dims`` that
        don't fit. The message names site, plate or argument.
    TypeError
        For arguments of a wrong type, or that model or guide cannot be called with.

    References
    ----------
    Magnusson, Andersen, Jonasson, Vehtari (2019), Bayesian Leave-One-Out Cross-Validation for Large Data: what
    ``log_p`` and ``log_q`` are for.
    """
    size = check_count("num_samples", num_samples)
    check_seed(seed)
    if history is not None and not isinstance(history, History):
        raise TypeError(f"history must be a History, such as DecomposedELBO.history, got {type(history).__name__}")
    check_callable(model, "model", args, kwargs)
    check_callable(guide, "guide", args, kwargs)

    make = {"posterior_predictive": posterior_predictive, "prior": prior, "log_likelihood": log_likelihood}
    with untouched(seed):
        runs = guide_runs(
            model, guide, args, kwargs, size, make, lambda nodes: Labels(coords, dims, nodes).check(nodes), progress
        )
    labels = Labels(coords, dims, runs.nodes)
    attrs = attributes()
    if runs.points:
        warnings.warn(point_estimate(runs.points), stacklevel=2)
        attrs["point_estimates"] = ", ".join(runs.points)
    groups = {
        "posterior": labels.dataset(by_chain(runs.posterior, 1), runs.nodes, attrs=attrs),
        "sample_stats": labels.dataset(by_chain(runs.stats, 1), {}, attrs=attrs),
        **runs.rest.groups(1, labels, attrs),
    }
    labels.check_used()
    if history is not None:
        groups["svi_history"] = history.to_xarray()
    return to_arviz(groups)


def from_pyro_mcmc(
    mcmc: MCMC,
    model: Callable[..., Any] | None = None,
    *args: Any,
    log_likelihood: bool = True,
    posterior_predictive: bool = False,
    prior: bool = False,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str | None]] | None = None,
    seed: int | None = None,
    progress: bool = False,
    **kwargs: Any,
) -> Any:
    """Draws of a finished ``pyro.infer.MCMC``, and what the model makes of them, as ArviZ data.

    Parameters
    ----------
    mcmc
        After its ``run``.
    model
        Pyro model, called as ``model(*args, **kwargs)``. None: the model of ``mcmc``'s kernel, called with ``kwargs``
        if there are any, otherwise with the arguments of ``mcmc.run``. Where there is neither, as with ``potential_fn``,
        only ``posterior`` and ``sample_stats`` can be had: pass ``log_likelihood=False``.
    log_likelihood, posterior_predictive, prior, coords, dims, seed, progress
        As in :func:`from_pyro_svi`.

    Returns
    -------
    arviz.InferenceData or xarray.DataTree
        Groups as of :func:`from_pyro_svi`, with the chains and draws of ``mcmc``; ``sample_stats`` has ``diverging``
        instead of ``log_p`` and ``log_q``. Sites that were summed out are drawn from their exact posterior given the others.
        Deterministic sites are left out of ``posterior`` if another latent site that the model needs for them has no draws.

    Raises
    ------
    RuntimeError
        If ``mcmc`` has not been run.
    ValueError
        If a latent site has no draws that a group needs; and as in :func:`from_pyro_svi`.
    TypeError
        If ``mcmc`` keeps no draws; and as in :func:`from_pyro_svi`.
    """
    if not isinstance(mcmc, MCMC):
        raise TypeError(f"mcmc must be a pyro.infer.MCMC, which keeps its draws, got {type(mcmc).__name__}")
    if getattr(mcmc, "_samples", True) is None:
        raise RuntimeError("mcmc has no draws yet: call mcmc.run(...) first")
    samples = mcmc.get_samples(group_by_chain=True)
    if model is None:
        model = getattr(mcmc.kernel, "model", None)
        if model is not None and not kwargs:
            run_args, run_kwargs = getattr(mcmc, "_args", None), getattr(mcmc, "_kwargs", None)
            if run_args is None or run_kwargs is None:
                raise RuntimeError("mcmc does not know its model's arguments: pass the model and its arguments")
            args, kwargs = run_args, run_kwargs
    chains, draws = next(iter(samples.values())).shape[:2]
    attrs = attributes()
    posterior = {name: to_numpy(value) for name, value in samples.items()}
    for name, array in posterior.items():
        if np.isnan(array).any():
            raise ValueError(f"site '{name}' is NaN in {int(np.isnan(array).sum())} of its draws")
    # at least four draws are needed for Pyro's other diagnostics, which it computes along
    stats = _diverging(mcmc, chains, draws) if draws >= 4 else {}

    if model is None:
        wanted = {"log_likelihood": log_likelihood, "posterior_predictive": posterior_predictive, "prior": prior}
        for option, asked in wanted.items():
            if asked:
                raise ValueError(f"{option} needs a model, and mcmc's kernel has none: pass model, or {option}=False")
        labels = Labels(coords, dims)
        groups = {
            "posterior": labels.dataset(posterior, {}, attrs=attrs),
            "sample_stats": labels.dataset(stats, {}, attrs=attrs),
        }
        labels.check_used()
        return to_arviz(groups)

    check_callable(model, "model", args, kwargs)
    latents = dict(mcmc.get_samples(group_by_chain=False))
    size = chains * draws
    make = {"posterior_predictive": posterior_predictive, "prior": prior, "log_likelihood": log_likelihood}
    with untouched(seed):
        with torch_kept():
            first = run_given(model, args, kwargs, {name: value[0] for name, value in latents.items()})
        check_full(first)
        Labels(coords, dims, first.nodes).check(first.nodes)
        missing = [name for name in latent_names(first) if name not in latents]
        known: list[tuple[Together, NDArray[Any]]] = []
        summed = None
        if missing and all(first.nodes[name]["infer"].get("enumerate") for name in missing):
            summed, missing = SummedOut(model, args, kwargs, latents, size), []
            latents = {**latents, **summed.states}
            known = summed.log_likelihoods() if log_likelihood else []
        if missing and (log_likelihood or posterior_predictive):
            option = "log_likelihood" if log_likelihood else "posterior_predictive"
            raise ValueError(
                f"latent site '{missing[0]}' of the model has no draws in mcmc, and is not marked to be summed out, so that "
                f"{option} would be at a value from the prior. Pass {option}=False."
            )
        rest = ModelRuns(model, args, kwargs, size, **make, summed_out=known)
        values = rest.add_all(latents, progress)
    if summed is not None:
        posterior = by_chain(summed.posterior(), chains)
    elif not missing:
        posterior = values.by_chain(chains)
    labels = Labels(coords, dims, first.nodes)
    groups = {
        "posterior": labels.dataset(posterior, first.nodes, attrs=attrs),
        "sample_stats": labels.dataset(stats, {}, attrs=attrs),
        **rest.groups(chains, labels, attrs),
    }
    labels.check_used()
    return to_arviz(groups)


def _diverging(mcmc: MCMC, chains: int, draws: int) -> dict[str, NDArray[Any]]:
    """Which draws came from a diverging trajectory, shape ``(chains, draws)``; nothing if the kernel does not say."""
    by_chain = mcmc.diagnostics().get("divergences")
    if by_chain is None:
        return {}
    diverging = np.zeros((chains, draws), bool)
    for chain in range(chains):
        diverging[chain, by_chain[f"chain {chain}"]] = True
    return {"diverging": diverging}


def attributes() -> dict[str, Any]:
    return {
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(),
        "creation_library": "pyro_elbo_ext",
        "creation_library_version": version("pyro_elbo_ext"),
        "inference_library": "pyro",
        "inference_library_version": pyro.__version__,
    }
