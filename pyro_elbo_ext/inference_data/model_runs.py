"""What a model makes of draws: predictions, likelihoods, data and constants, collected for export."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from pyro.poutine import Trace
from torch import Tensor
from tqdm import tqdm

from pyro_elbo_ext.inference_data.draws import Columns, by_chain, pointwise_log_likelihood, to_numpy
from pyro_elbo_ext.inference_data.labels import Labels
from pyro_elbo_ext.inference_data.summed_out import label_likelihoods
from pyro_elbo_ext.programs.arguments import signature_of_callable
from pyro_elbo_ext.programs.faults import data_at_fault
from pyro_elbo_ext.programs.given import data_of, run_given, values_of
from pyro_elbo_ext.terms.enumeration.pointwise import Together

_WITHOUT = "Pass log_likelihood=False to do without pointwise log likelihoods."


class ModelRuns:
    """What the model makes of draws, posterior or prior, collected draw by draw."""

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        size: int,
        posterior_predictive: bool,
        prior: bool,
        log_likelihood: bool,
        summed_out: Sequence[tuple[Together, NDArray[Any]]] = (),
    ) -> None:
        self.model, self.args, self.kwargs, self.size = model, args, kwargs, size
        self.redraw, self.from_prior, self.pointwise = posterior_predictive, prior, log_likelihood
        self.predictive, self.likelihood = Columns(size), Columns(size)
        self.prior, self.prior_predictive = Columns(size), Columns(size)
        self.counts: dict[str, NDArray[np.bool_]] = {}
        self.summed_out = summed_out  # log likelihoods that are known, of sites from which others are summed out
        self.first: Trace | None = None
        self.first_prior: Trace | None = None

    def add(self, index: int, trace: Trace, latents: Mapping[str, Tensor]) -> None:
        """Take one draw: the model's trace at it, and its latent sites' values."""
        self.first = self.first or trace
        if self.pointwise:
            known = {site for together, _ in self.summed_out for site in together.sites}
            try:
                found = pointwise_log_likelihood(trace)
            except ValueError as error:
                raise ValueError(f"{error}\n{_WITHOUT}") from error
            for name, (density, counts) in found.items():
                if name in known:
                    continue
                if bool(density.isnan().any()) and (sentence := data_at_fault(trace.nodes[name])):
                    raise ValueError(f"{sentence}\n{_WITHOUT}")
                self.likelihood.put(index, name, density)
                counted = to_numpy(counts)
                self.counts[name] = self.counts[name] | counted if name in self.counts else counted
        if self.redraw:
            again = run_given(self.model, self.args, self.kwargs, latents, redraw=True, option="posterior_predictive")
            for name, value in data_of(again).items():
                self.predictive.put(index, name, value)
        if self.from_prior:
            alone = run_given(self.model, self.args, self.kwargs, {}, redraw=True, option="prior")
            self.first_prior = self.first_prior or alone
            for name, value in values_of(alone).items():
                self.prior.put(index, name, value, allow_nan=alone.nodes[name]["is_observed"])
            for name, value in data_of(alone).items():
                self.prior_predictive.put(index, name, value)

    def add_all(self, latents: Mapping[str, Tensor], progress: bool = False) -> Columns:
        """Run the model at all draws of all latent sites, and take them; values of latent and deterministic sites."""
        values = Columns(self.size)
        for index in tqdm(range(self.size), desc="draws", disable=not progress):
            given = {name: draws[index] for name, draws in latents.items()}
            trace = run_given(self.model, self.args, self.kwargs, given)
            for name, value in values_of(trace).items():
                values.put(index, name, value, allow_nan=trace.nodes[name]["is_observed"])
            self.add(index, trace, given)
        return values

    def groups(self, chains: int, labels: Labels, attrs: Mapping[str, Any]) -> dict[str, xr.Dataset]:
        assert self.first is not None
        nodes = self.first.nodes
        groups = {}
        if self.redraw:
            groups["posterior_predictive"] = labels.dataset(self.predictive.by_chain(chains), nodes, attrs=attrs)
        if self.pointwise:
            arrays = self.likelihood.by_chain(chains)
            known = [(of, next(iter(by_chain({"": array}, chains).values()))) for of, array in self.summed_out]
            groups["log_likelihood"] = label_likelihoods(labels, arrays, self.counts, nodes, attrs, known)
        if self.from_prior:
            assert self.first_prior is not None
            theirs = self.first_prior.nodes
            groups["prior"] = labels.dataset(self.prior.by_chain(1), theirs, attrs=attrs)
            groups["prior_predictive"] = labels.dataset(self.prior_predictive.by_chain(1), theirs, attrs=attrs)
        data = {name: to_numpy(value) for name, value in data_of(self.first).items()}
        groups["observed_data"] = labels.dataset(data, nodes, (), attrs)
        constants = _constants(self.model, self.args, self.kwargs, data)
        groups["constant_data"] = labels.dataset(constants, {}, (), attrs)
        return {name: group for name, group in groups.items() if group.variables}


def _constants(
    model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], observed: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """Tensors and arrays among the model's arguments that are not data, by the names in its signature."""
    signature = signature_of_callable(model)
    named: dict[str, Any] = {}
    if signature is None:
        named = {**{f"arg_{i}": arg for i, arg in enumerate(args)}, **kwargs}
    else:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            kind = signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                named.update({f"{name}_{i}": item for i, item in enumerate(value)})
            elif kind is inspect.Parameter.VAR_KEYWORD:
                named.update(value)
            else:
                named[name] = value
    arrays = {
        name: to_numpy(value)
        for name, value in named.items()
        if isinstance(value, np.ndarray) or (isinstance(value, Tensor) and value.layout is torch.strided)
    }
    return {
        name: array
        for name, array in arrays.items()
        if not any(np.array_equal(array, data, equal_nan=array.dtype.kind in "fc") for data in observed.values())
    }
