"""A Pyro model as a program on flat unconstrained space, in float64 where it allows that."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch.distributions import biject_to
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from pyro_elbo_ext.programs.densities import check_densities
from pyro_elbo_ext.programs.faults import NO_LATENT, cause, check_data, discrete_latent, first_line, nan_parameter
from pyro_elbo_ext.programs.interrupts import handlers_are_heard
from pyro_elbo_ext.programs.nodes import is_deterministic, plate_nesting, tensor_options
from pyro_elbo_ext.programs.running import trace_program
from pyro_elbo_ext.terms.enumeration.rows import log_density
from pyro_elbo_ext.terms.enumeration.traces import is_marked

logger = logging.getLogger(__name__)

ATTEMPTS = 100  # random points at which the first run of a model is tried


class _Latent(NamedTuple):
    """Where a latent site lives in the flat unconstrained vector."""

    start: int
    stop: int
    shape: torch.Size  # unconstrained
    dtype: torch.dtype
    device: torch.device


class _Promote(TorchFunctionMode):
    """Compute in float64: lower-precision floating tensors are widened where an operation reads them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):
            return func(*args, **(kwargs or {}))
        in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or "out" in (kwargs or {})
        # the target of an in-place write must stay the caller's own tensor, or the write would be lost
        head, tail = (args[:1], args[1:]) if in_place else ((), args)
        return func(*head, *map(_widen, tail), **{key: _widen(value) for key, value in (kwargs or {}).items()})


def _widen(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.double() if value.dtype in (torch.float32, torch.float16, torch.bfloat16) else value
    if isinstance(value, torch.Size):  # as a tuple, () would be a shape no more: ``tensor.new(())`` is empty
        return value
    return tree_map_only(torch.Tensor, _widen, value) if isinstance(value, list | tuple | dict) else value


@contextmanager
def _float64(enabled: bool) -> Iterator[None]:
    if not enabled:
        yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Promote():
            yield
    finally:
        torch.set_default_dtype(before)


class _Unconstrain(Messenger):
    """Give each continuous latent site the value ``biject_to(support)(u)`` and add up the log Jacobians.

    The support is read at every run, so one that depends on another latent site, ``Uniform(0, theta)``, is right.
    """

    def __init__(self, supply: Callable[[dict[str, Any], torch.distributions.Transform], torch.Tensor]) -> None:
        super().__init__()
        self.supply = supply
        self.terms: list[torch.Tensor] = []

    def _pyro_sample(self, msg: Any) -> None:
        for frame in msg["cond_indep_stack"]:
            if frame.full_size is not None and frame.full_size != frame.size:
                raise ValueError(
                    f"plate '{frame.name}' subsamples {frame.size} of {frame.full_size}: the density of all the data is "
                    "needed. Call the model without subsampling."
                )
        fn = msg["fn"]
        if isinstance(fn, _Subsample):
            if fn.subsample_size is not None and fn.subsample_size < fn.size:
                raise ValueError(
                    f"plate '{msg['name']}' subsamples {fn.subsample_size} of {fn.size}: the density of all the data is "
                    "needed. Call the model without subsampling."
                )
            return
        if msg["is_observed"] or msg["done"]:
            return
        if getattr(fn, "has_enumerate_support", False) or fn.support.is_discrete:
            if msg["infer"].get("enumerate") is None:
                raise ValueError(discrete_latent(msg))
            return
        transform = biject_to(fn.support)
        u = self.supply(msg, transform)
        value = transform(u)
        if _batch(value, transform.codomain) != _batch(u, transform.domain):
            raise ValueError(
                f"the support of latent site '{msg['name']}' depends on a site that is summed out, so that it has no "
                "density of its own. Draw a site of a fixed support, and transform it."
            )
        self.terms.append(transform.log_abs_det_jacobian(u, value).sum())
        if _imputes(msg):
            # elements that are observed have no density of their own here; a standard normal keeps them proper
            mask = msg["mask"].reshape(msg["mask"].shape + (1,) * (u.dim() - len(fn.batch_shape)))
            self.terms.append(torch.where(mask, torch.zeros_like(u), -0.5 * u * u).sum())
        msg["value"], msg["done"] = value, True


def _batch(value: torch.Tensor, constraint: Any) -> torch.Size:
    return value.shape[: value.dim() - constraint.event_dim]


def _imputes(site: Any) -> bool:
    return site["name"].endswith("_unobserved") and isinstance(site["mask"], torch.Tensor)


class UnconstrainedModel:
    """A Pyro model run at points of the flat unconstrained space, by Pyro.

    Attributes
    ----------
    dim : int
        Number of unconstrained coordinates.
    layout : dict
        Name of each continuous latent site to its place in the flat vector.
    float64 : bool
        Whether the model is computed in float64; if not, in the dtype of its own tensors.
    sites : dict
        Name to trace node of one run of the model, from which names, plates and observed values are read.
    names : list of str
        Latent and deterministic sites whose values `values` computes.
    points : list of Tensor
        Some points, of finite density where any was found.
    has_discrete : bool
        Whether discrete sites are summed out: deterministic sites may depend on them, and have no value then.
    """

    def __init__(
        self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], seed: int, points: int
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self._rng = np.random.default_rng(seed)
        self.layout: dict[str, _Latent] = {}
        self.has_discrete = False
        self.float64 = True
        self.sites = self._prototype()
        self.dim = max((latent.stop for latent in self.layout.values()), default=0)
        self._check_sites()
        if is_validation_enabled():
            self._check_data()
        tried = [torch.from_numpy(self._rng.uniform(-2, 2, self.dim)) for _ in range(points)]
        values = self._check_precision(tried)
        self._check_repeats(tried, values)
        self._check_gradient(tried)
        self.points = [x for x, value in zip(tried, values, strict=True) if np.isfinite(value)] or tried
        self.names = [
            name
            for name, site in self.sites.items()
            if (name in self.layout and not _imputes(site)) or (is_deterministic(site) and not self.has_discrete)
        ]

    @contextmanager
    def precision(self, validate: bool = False) -> Iterator[None]:
        """Compute in the dtype that was chosen for the model, and without Pyro's checks of values."""
        with pyro.validation_enabled(validate), _float64(self.float64):
            yield

    def run(
        self, supply: Callable[[Any, Any], torch.Tensor], validate: bool = False
    ) -> tuple[poutine.Trace, list[torch.Tensor]]:
        """Trace of the model with unconstrained values ``supply(site, bijection)``, and its log Jacobians."""
        model = self.model
        if self.has_discrete:
            model = poutine.enum(model, first_available_dim=-1 - self._plate_nesting)
        unconstrain = _Unconstrain(supply)
        with poutine.block(), self.precision(validate), unconstrain:
            trace = trace_program(model, self.args, self.kwargs)
            return trace, unconstrain.terms

    def run_at(self, x: torch.Tensor, validate: bool = False) -> tuple[poutine.Trace, list[torch.Tensor]]:
        """The same at one point of the flat space."""
        sizes = [latent.stop - latent.start for latent in self.layout.values()]
        pieces = dict(zip(self.layout, x.split(sizes), strict=True))

        def supply(msg: Any, _: Any) -> torch.Tensor:
            if msg["name"] not in self.layout:
                raise ValueError(
                    f"latent site '{msg['name']}' is not in every run of the model: a density needs the same ones"
                )
            latent = self.layout[msg["name"]]
            u = pieces[msg["name"]].reshape(latent.shape).to(latent.device)
            return u if self.float64 else u.to(latent.dtype)

        return self.run(supply, validate)

    def place(self, x: torch.Tensor, values: Mapping[str, Any], what: str) -> None:
        """Write the unconstrained counterparts of the given sites' values into ``x``; errors call the values ``what``."""
        for name in values:
            if name not in self.layout:
                raise ValueError(f"{what} names '{name}', which is no latent site; the sites are {list(self.layout)}")

        def supply(msg: Any, transform: Any) -> torch.Tensor:
            name, latent = msg["name"], self.layout[msg["name"]]
            if name in values:
                given = torch.as_tensor(values[name], device=latent.device)
                value, support = given.double(), msg["fn"].support
                shape = self.sites[name]["fn"].shape()
                if value.shape != shape:
                    raise ValueError(f"{what} for '{name}' has shape {tuple(value.shape)}, the site {tuple(shape)}")
                u = transform.inv(value)
                # in its own dtype, whose rounding the constraints allow for
                inside = support.check(given if given.is_floating_point() else value)
                if not (inside.all() and u.isfinite().all()):
                    raise ValueError(
                        f"{what} for '{name}' is outside the interior of its support, {support}: {values[name]}"
                    )
                x[latent.start : latent.stop] = u.reshape(-1).to(x.device)
            u = x[latent.start : latent.stop].reshape(latent.shape).to(latent.device)
            return u if self.float64 else u.to(latent.dtype)

        with torch.no_grad():
            self.run(supply)

    def log_density(self, x: torch.Tensor) -> torch.Tensor:
        """Log joint density at ``x`` of shape (dim,), Jacobian included: a float64 scalar."""
        trace, terms = self.run_at(x)
        with self.precision():
            joint = log_density(trace, self._plate_nesting) if self.has_discrete else trace.log_prob_sum()
            total = sum(terms, joint)
        return total.to(device=x.device, dtype=torch.float64)

    def value_and_grad(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same with its gradient, of shape (dim,)."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = self.log_density(x)
            (gradient,) = torch.autograd.grad(value, x, allow_unused=True, materialize_grads=True)
        return value.detach(), gradient

    def values(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Values of the sites ``names`` at ``x``, and of the other continuous latent sites after them."""
        trace, _ = self.run_at(x)
        return tuple(trace.nodes[name]["value"] for name in self.all_names)

    @property
    def all_names(self) -> list[str]:
        """The sites of `values`: ``names``, and those that stand for missing elements of partly observed ones."""
        return [*self.names, *(name for name in self.layout if name not in self.names)]

    def _prototype(self) -> dict[str, Any]:
        with handlers_are_heard() as raised:
            try:
                return self._first_run()
            except torch.linalg.LinAlgError:
                raise
            except Exception as error:
                if raised:  # by a signal's handler, as a time-out: no reason for another dtype
                    raise
                # the same model without promotion tells whether promotion or the model is at fault
                self.float64 = False
                sites = self._first_run()
                logger.info("sampling in the model's own dtype, since it does not run in float64: %s", error)
                return sites

    def _first_run(self) -> dict[str, Any]:
        def supply(msg: Any, transform: Any) -> torch.Tensor:
            fn, start = msg["fn"], max((latent.stop for latent in self.layout.values()), default=0)
            shape = torch.Size(transform.inverse_shape(fn.shape()))
            dtype, device = tensor_options(fn)
            self.layout[msg["name"]] = _Latent(start, start + shape.numel(), shape, dtype, device)
            u = torch.as_tensor(self._rng.uniform(-2, 2, tuple(shape)), device=device)
            return u if self.float64 else u.to(dtype)

        for attempt in range(ATTEMPTS):
            self.layout = {}
            try:
                trace, _ = self.run(supply)
                with torch.no_grad(), self.precision():
                    check_densities(trace, finite=False)
                break
            except torch.linalg.LinAlgError:
                if attempt == ATTEMPTS - 1:
                    raise
        if sentence := nan_parameter(trace):
            raise ValueError(sentence)
        sites = {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}
        if is_marked(trace):
            self._plate_nesting = plate_nesting(trace)
            self.has_discrete = True
        return sites

    def _check_sites(self) -> None:
        if not self.layout:
            raise ValueError(NO_LATENT)

    def _check_data(self) -> None:
        """Raise ValueError for data outside the support of a site that validates, as its density may not."""
        x = torch.from_numpy(np.random.default_rng(0).uniform(-2, 2, self.dim))
        with torch.no_grad(), handlers_are_heard():
            try:
                trace, _ = self.run_at(x, validate=True)
            except (ValueError, RuntimeError):  # of parameters that a distribution refuses at this point
                return
            check_data(trace)

    def _check_precision(self, points: list[torch.Tensor]) -> list[float]:
        """Choose the dtype; the log density at the points in it."""
        wide = [self._try_value(x) for x in points]
        if not self.float64:
            return wide
        self.float64 = False
        with handlers_are_heard():
            try:
                own = [self._try_value(x) for x in points]
            except RuntimeError as error:  # mixed dtypes that only promotion makes right
                logger.info("the model runs in float64 only: %s", first_line(error))
                own = wide
        self.float64 = all(
            abs(a - b) <= 1e-2 * (1 + abs(a)) for a, b in zip(wide, own, strict=True) if np.isfinite([a, b]).all()
        )
        if not self.float64:
            logger.info("sampling in the model's own dtype: in float64 its log density is %s, not %s", wide, own)
        return wide if self.float64 else own

    def _check_gradient(self, points: list[torch.Tensor]) -> None:
        """Raise ValueError if density or gradient are finite nowhere and it is known why; elsewhere they may be."""
        of_gradient = False
        for x in points:
            try:
                value, gradient = self.value_and_grad(x)
            except torch.linalg.LinAlgError:
                return
            if bool(value.isfinite()) and bool(gradient.isfinite().all()):
                return
            of_gradient |= bool(value.isfinite())
        with torch.no_grad():
            trace, _ = self.run_at(points[0])
            with self.precision():
                check_densities(trace, finite=False)
        if sentence := cause(trace, of_gradient=of_gradient):
            raise ValueError(sentence)

    def _try_value(self, x: torch.Tensor) -> float:
        try:
            return self.log_density(x).item()
        except torch.linalg.LinAlgError:
            return float("-inf")

    def _check_repeats(self, points: list[torch.Tensor], values: list[float]) -> None:
        for x, first in zip(points, values, strict=True):
            second = self._try_value(x)
            if first != second and not np.isnan([first, second]).all():
                raise ValueError(
                    "the model's log density differs between two runs at the same latent values: it draws random "
                    "numbers outside pyro.sample, or has dropout or batch normalization in training mode"
                )
