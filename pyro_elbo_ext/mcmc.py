"""NUTS on an unchanged Pyro model: one log density with its gradient, sampled by nutpie or by Pyro."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import numbers
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import pyro
import torch
import xarray as xr
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.infer import MCMC, NUTS
from pyro.infer.mcmc.util import TraceEinsumEvaluator
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch.distributions import biject_to
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from pyro_elbo_ext.export import to_arviz

logger = logging.getLogger(__name__)

INIT_TRIES = 100  # starting points tried per chain, as in Stan
CHECK_POINTS = 4  # random points at which a traced graph must equal the model run by Pyro

Graph = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]


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
                    f"plate '{frame.name}' subsamples {frame.size} of {frame.full_size}: NUTS needs the density of "
                    "all the data. Call the model without subsampling."
                )
        fn = msg["fn"]
        if isinstance(fn, _Subsample):
            if fn.subsample_size is not None and fn.subsample_size < fn.size:
                raise ValueError(
                    f"plate '{msg['name']}' subsamples {fn.subsample_size} of {fn.size}: NUTS needs the density of "
                    "all the data. Call the model without subsampling."
                )
            return
        if msg["is_observed"] or msg["done"]:
            return
        if getattr(fn, "has_enumerate_support", False) or fn.support.is_discrete:
            if msg["infer"].get("enumerate") is None:
                raise ValueError(
                    f"latent site '{msg['name']}' is discrete ({_base(fn)}): NUTS has no gradient for it. Sum it out in "
                    "the model, or mark it infer={'enumerate': 'parallel'} so that Pyro sums it out."
                )
            return
        transform = biject_to(fn.support)
        u = self.supply(msg, transform)
        value = transform(u)
        self.terms.append(transform.log_abs_det_jacobian(u, value).sum())
        if _imputes(msg):
            # elements that are observed have no density of their own here; a standard normal keeps them proper
            mask = msg["mask"].reshape(msg["mask"].shape + (1,) * (u.dim() - len(fn.batch_shape)))
            self.terms.append(torch.where(mask, torch.zeros_like(u), -0.5 * u * u).sum())
        msg["value"], msg["done"] = value, True


def _imputes(site: Any) -> bool:
    return site["name"].endswith("_unobserved") and isinstance(site["mask"], torch.Tensor)


def _base(fn: Any) -> str:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return type(fn).__name__


def _tensor_options(fn: Any) -> tuple[torch.dtype, torch.device]:
    """The floating dtype and device of a distribution's parameters, or torch's defaults if it has none."""
    while fn is not None:
        for value in vars(fn).values():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                return value.dtype, value.device
        fn = getattr(fn, "base_dist", None)
    return torch.get_default_dtype(), torch.get_default_device()


class LogDensity:
    """Log density and gradient of a Pyro model on the flat unconstrained space, and the way back to the sites.

    With T the bijections ``biject_to(support)`` of the continuous latent sites, ``value_and_grad`` computes
    ``log p(data, T(x)) + log |det dT/dx|`` and its gradient. Where it can, the model is run in float64 whatever the
    dtype of its tensors (float32 data are widened exactly), and is traced once into an ATen graph that is checked
    against Pyro at random points; where it cannot, a message at level INFO says why and what is used instead.

    Attributes
    ----------
    size : int
        Number of unconstrained coordinates.
    float64 : bool
        Whether the model is computed in float64; if not, in the dtype of its own tensors.
    sites : dict
        Name to trace node of one run of the model, from which names, plates and observed values are read.
    """

    def __init__(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], seed: int) -> None:
        self._model, self._args, self._kwargs = model, args, kwargs
        self._rng = np.random.default_rng(seed)
        self._layout: dict[str, _Latent] = {}
        self._evaluator: TraceEinsumEvaluator | None = None
        self.float64 = True
        self.sites = self._prototype()
        self.size = max((latent.stop for latent in self._layout.values()), default=0)
        self._check_sites()
        points = [torch.from_numpy(self._rng.uniform(-2, 2, self.size)) for _ in range(CHECK_POINTS)]
        self._check_precision(points)
        self._check_repeats(points)
        self.names = [
            name
            for name, site in self.sites.items()
            if (name in self._layout and not _imputes(site))
            or (site["infer"].get("_deterministic") and self._evaluator is None)
        ]
        skipped = [name for name, site in self.sites.items() if site["infer"].get("_deterministic")]
        if self._evaluator is not None and skipped:
            logger.info("deterministic sites %s are left out: the model has enumerated sites", skipped)
        rtol = 1e-8 if self.float64 else 1e-4
        self._value_and_grad = _trace(self._eager_value_and_grad, points, rtol, "log density")
        self._values = _trace(self._eager_values, points, rtol, "deterministic sites")

    def value_and_grad(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """Log density and its gradient at ``x``, float64 of shape (size,); -inf or NaN outside the model's domain."""
        value, gradient = self.tensors(torch.from_numpy(np.ascontiguousarray(x, dtype=np.float64)))
        return value.item(), gradient.cpu().numpy()

    def tensors(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same on tensors: a scalar and a tensor of shape (size,), both float64."""
        try:
            with torch.no_grad():
                value, gradient = self._value_and_grad(x)
        except torch.linalg.LinAlgError:  # a covariance that is not positive definite in floating point: no density
            return x.new_tensor(-torch.inf), torch.zeros_like(x)
        return value, gradient

    def constrain(self, draws: np.ndarray) -> dict[str, np.ndarray]:
        """Values of the latent and deterministic sites: (chains, draws, size) to (chains, draws, *site shape)."""
        values: dict[str, np.ndarray] = {}
        for index in np.ndindex(draws.shape[:2]):
            with torch.no_grad():
                sites = self._values(torch.from_numpy(np.ascontiguousarray(draws[index])))
            for name, value in zip(self.names, sites, strict=True):
                array = value.detach().cpu().numpy()
                if name not in values:
                    values[name] = np.empty(draws.shape[:2] + array.shape, array.dtype)
                values[name][index] = array
        return values

    def initial(self, rng: np.random.Generator, init: float | Mapping[str, Any]) -> np.ndarray:
        """A starting point with finite log density and gradient: uniform on (-init, init), or given sites' values."""
        radius = 2.0 if isinstance(init, Mapping) else float(init)
        x = np.zeros(self.size)
        for _ in range(INIT_TRIES if radius > 0 else 1):
            x = rng.uniform(-radius, radius, self.size) if radius > 0 else np.zeros(self.size)
            if isinstance(init, Mapping):
                self._place(x, init)
            value, gradient = self.value_and_grad(x)
            if np.isfinite(value) and np.isfinite(gradient).all():
                return x
        raise ValueError(
            f"no starting point with finite log density and gradient in {INIT_TRIES} tries: {self._culprit(x)}. "
            "Check the data and supports of that site, or give starting values by init={site: value}."
        )

    def _run(self, supply: Callable[[Any, Any], torch.Tensor]) -> tuple[poutine.Trace, list[torch.Tensor]]:
        model = self._model
        if self._evaluator is not None:
            model = poutine.enum(model, first_available_dim=-1 - self._plate_nesting)
        unconstrain = _Unconstrain(supply)
        with poutine.block(), pyro.validation_enabled(False), _float64(self.float64), unconstrain:
            trace = poutine.trace(model).get_trace(*self._args, **self._kwargs)
            return trace, unconstrain.terms

    def _run_at(self, x: torch.Tensor) -> tuple[poutine.Trace, list[torch.Tensor]]:
        sizes = [latent.stop - latent.start for latent in self._layout.values()]
        pieces = dict(zip(self._layout, x.split(sizes), strict=True))

        def supply(msg: Any, _: Any) -> torch.Tensor:
            if msg["name"] not in self._layout:
                raise ValueError(
                    f"latent site '{msg['name']}' is not in every run of the model: NUTS needs the same sites each time"
                )
            latent = self._layout[msg["name"]]
            u = pieces[msg["name"]].reshape(latent.shape).to(latent.device)
            return u if self.float64 else u.to(latent.dtype)

        return self._run(supply)

    def _log_density(self, x: torch.Tensor) -> torch.Tensor:
        trace, terms = self._run_at(x)
        with pyro.validation_enabled(False), _float64(self.float64):
            joint = trace.log_prob_sum() if self._evaluator is None else self._evaluator.log_prob(trace)
            total = sum(terms, joint)
        return total.to(device=x.device, dtype=torch.float64)

    def _eager_value_and_grad(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = self._log_density(x)
            (gradient,) = torch.autograd.grad(value, x, allow_unused=True, materialize_grads=True)
        return value.detach(), gradient

    def _eager_values(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        trace, _ = self._run_at(x)
        return tuple(trace.nodes[name]["value"] for name in self.names)

    def _prototype(self) -> dict[str, Any]:
        try:
            return self._first_run()
        except torch.linalg.LinAlgError:
            raise
        except Exception as error:
            # the same model without promotion tells whether promotion or the model is at fault
            self.float64 = False
            sites = self._first_run()
            logger.info("sampling in the model's own dtype, since it does not run in float64: %s", error)
            return sites

    def _first_run(self) -> dict[str, Any]:
        def supply(msg: Any, transform: Any) -> torch.Tensor:
            fn, start = msg["fn"], max((latent.stop for latent in self._layout.values()), default=0)
            shape = torch.Size(transform.inverse_shape(fn.shape()))
            dtype, device = _tensor_options(fn)
            self._layout[msg["name"]] = _Latent(start, start + shape.numel(), shape, dtype, device)
            u = torch.as_tensor(self._rng.uniform(-2, 2, tuple(shape)), device=device)
            return u if self.float64 else u.to(dtype)

        for attempt in range(INIT_TRIES):
            self._layout = {}
            try:
                trace, _ = self._run(supply)
                break
            except torch.linalg.LinAlgError:
                if attempt == INIT_TRIES - 1:
                    raise
        sites = {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}
        if any(site["infer"].get("enumerate") for site in sites.values() if not site["is_observed"]):
            frames = [f for site in sites.values() for f in site["cond_indep_stack"] if f.vectorized]
            self._plate_nesting = -min((f.dim for f in frames), default=0)
            model = poutine.enum(self._model, first_available_dim=-1 - self._plate_nesting)
            self._layout = {}
            with poutine.block(), pyro.validation_enabled(False), _float64(self.float64), _Unconstrain(supply):
                enumerated = poutine.trace(model).get_trace(*self._args, **self._kwargs)
            self._evaluator = TraceEinsumEvaluator(enumerated, True, self._plate_nesting)
        return sites

    def _check_sites(self) -> None:
        if not self._layout:
            raise ValueError("the model has no continuous latent site: there is nothing for NUTS to sample")
        for name, site in self.sites.items():
            value = site["value"]
            if not site["is_observed"] or not isinstance(value, torch.Tensor) or not value.is_floating_point():
                continue
            if site["infer"].get("_deterministic") or value.numel() == 0:
                continue
            nan = sum_rightmost(value.isnan(), site["fn"].event_dim) > 0
            if site["mask"] is not False and nan.any():
                raise ValueError(
                    f"observed site '{name}' has NaN in {int(nan.sum())} of {nan.numel()} observations, which spoil "
                    "the gradient even under a mask. Drop them, or replace them by numbers and mask them or pass obs_mask."
                )

    def _check_precision(self, points: list[torch.Tensor]) -> None:
        if not self.float64:
            return
        wide = [self._try_value(x) for x in points]
        self.float64 = False
        try:
            own = [self._try_value(x) for x in points]
        except RuntimeError as error:  # mixed dtypes that only promotion makes right
            logger.info("the model runs in float64 only: %s", error)
            own = wide
        self.float64 = all(
            abs(a - b) <= 1e-2 * (1 + abs(a)) for a, b in zip(wide, own, strict=True) if np.isfinite([a, b]).all()
        )
        if not self.float64:
            logger.info("sampling in the model's own dtype: in float64 its log density is %s, not %s", wide, own)

    def _try_value(self, x: torch.Tensor) -> float:
        try:
            return self._log_density(x).item()
        except torch.linalg.LinAlgError:
            return float("-inf")

    def _check_repeats(self, points: list[torch.Tensor]) -> None:
        for x in points:
            first, second = self._try_value(x), self._try_value(x)
            if first != second and not np.isnan([first, second]).all():
                raise ValueError(
                    "the model's log density differs between two runs at the same latent values: it draws random "
                    "numbers outside pyro.sample, or has dropout or batch normalization in training mode"
                )

    def _place(self, x: np.ndarray, values: Mapping[str, Any]) -> None:
        """Write the unconstrained counterparts of the given sites' values into ``x``."""
        for name in values:
            if name not in self._layout:
                raise ValueError(f"init names '{name}', which is no latent site; the sites are {list(self._layout)}")
        written = torch.from_numpy(x)

        def supply(msg: Any, transform: Any) -> torch.Tensor:
            latent = self._layout[msg["name"]]
            if msg["name"] in values:
                value = torch.as_tensor(np.asarray(values[msg["name"]], dtype=np.float64), device=latent.device)
                if value.shape != msg["fn"].shape():
                    raise ValueError(
                        f"init for '{msg['name']}' has shape {tuple(value.shape)}, the site {tuple(msg['fn'].shape())}"
                    )
                written[latent.start : latent.stop] = transform.inv(value).reshape(-1).cpu()
            u = written[latent.start : latent.stop].reshape(latent.shape).to(latent.device)
            return u if self.float64 else u.to(latent.dtype)

        self._run(supply)

    def _culprit(self, x: np.ndarray) -> str:
        """The site to blame for a log density or gradient that is not finite at ``x``."""
        point = torch.from_numpy(x)
        try:
            trace, _ = self._run_at(point)
        except torch.linalg.LinAlgError as error:
            return f"the model itself fails, {error}"
        with pyro.validation_enabled(False), _float64(self.float64):
            for name in self.sites:
                node = trace.nodes[name]
                single = poutine.Trace()
                single.add_node(name, **node)
                value = single.log_prob_sum()
                if not np.isfinite(float(value)):
                    return f"the log prob of site '{name}' is {float(value)}"
        _, gradient = self.tensors(point)
        for name, latent in self._layout.items():
            if not gradient[latent.start : latent.stop].isfinite().all():
                return f"the gradient with respect to site '{name}' is not finite"
        return "the log Jacobian of the map to unconstrained space is not finite"


def _trace(function: Graph, points: list[torch.Tensor], rtol: float, what: str) -> Graph:
    """``function`` as one ATen graph with its constants folded, or unchanged where that would not be the same."""
    try:
        graph = make_fx(lambda x: function(x))(points[0])
        _fold_constants(graph)
        for x in points:
            traced, eager = graph(x), function(x)
            for a, b in zip(traced, eager, strict=True):
                torch.testing.assert_close(a, b, rtol=rtol, atol=rtol, equal_nan=True)
    except Exception as error:  # whatever stops the tracer, the model itself runs, and is used instead
        logger.info("the %s is not traced, Pyro runs the model each time: %s", what, str(error).splitlines()[:1])
        return function
    return graph


def _fold_constants(module: torch.fx.GraphModule) -> None:
    """Compute once whatever does not depend on the input, unless the graph writes into such a value in place."""
    graph = module.graph
    graph.eliminate_dead_code()
    calls = [node for node in graph.nodes if node.op == "call_function"]
    known: dict[torch.fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            known[node] = getattr(module, node.target)
        elif node.op == "call_function" and all(source in known for source in node.all_input_nodes):
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                continue
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            with torch.no_grad():
                known[node] = node.target(*args, **kwargs)
    for node in calls:
        if getattr(getattr(node.target, "_schema", None), "is_mutable", False):
            root = node.args[0]
            while isinstance(root, torch.fx.Node) and _returns_view(root):
                root = root.args[0]
            if not isinstance(root, torch.fx.Node) or root in known or root.op != "call_function":
                return  # a folded buffer would carry what one call wrote into the next
    for index, (node, value) in enumerate(known.items()):
        if isinstance(value, torch.Tensor) and any(user not in known for user in node.users):
            module.register_buffer(f"_folded_{index}", value.detach())
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.get_attr(f"_folded_{index}"))
    for node in calls:
        if node.target is torch.ops.aten.detach.default and node not in known:
            node.replace_all_uses_with(node.args[0])
    graph.eliminate_dead_code()
    module.recompile()


def _returns_view(node: torch.fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(result.alias_info is not None for result in schema.returns)


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
    **kwargs: Any,
) -> Any:
    """Draw from a Pyro model's posterior by NUTS.

    The model is taken as it is. Latent sites may have any support with a bijection to unconstrained space, flat ones
    too (``ImproperUniform``). Sampling is in float64 where the model allows it, also for a float32 model and data.
    ``pyro.param`` and module parameters are held at their current values; the parameter store, the modules and the
    random number generators of torch, numpy and random are left as they were. Chains run one after the other.

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

    References
    ----------
    Hoffman, Gelman (2014), The No-U-Turn Sampler. Betancourt (2017), A Conceptual Introduction to Hamiltonian Monte
    Carlo. Seyboldt, Carlson, Carpenter (2026), Preconditioning Hamiltonian Monte Carlo by Minimizing Fisher Divergence.
    """
    if not callable(model):
        raise TypeError(f"model must be callable, got {type(model).__name__}")
    for name, number, least in (
        ("num_samples", num_samples, 1),
        ("warmup", warmup, 0),
        ("chains", chains, 1),
        ("seed", seed, 0),
        ("max_tree_depth", max_tree_depth, 1),
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
    installed = importlib.util.find_spec("nutpie") is not None
    if backend == "nutpie" and not installed:
        raise ImportError('backend="nutpie" needs nutpie: pip install "pyro_elbo_ext[nuts]"')
    library = "nutpie" if installed and backend != "pyro" else "pyro"

    with _isolated(seed):
        density = LogDensity(model, args, kwargs, seed)
        began = time.perf_counter()
        sample = _sample_nutpie if library == "nutpie" else _sample_pyro
        draws, stats = sample(
            density, num_samples, warmup, chains, seed, progress, float(target_accept), max_tree_depth, init
        )
        elapsed = time.perf_counter() - began
        values = density.constrain(draws)

    attrs = {
        "inference_library": library,
        "inference_library_version": importlib.metadata.version("pyro-ppl" if library == "pyro" else library),
        "sampling_time": elapsed,
        "tuning_steps": warmup,
        "seed": seed,
    }
    samples = {"chain": np.arange(chains), "draw": np.arange(num_samples)}
    sites = density.sites
    observed = {
        name: site["value"].detach().cpu().numpy()
        for name, site in sites.items()
        if site["is_observed"] and not site["infer"].get("_deterministic") and _base(site["fn"]) != "Unit"
    }
    return to_arviz(
        {
            "posterior": _dataset({name: values[name] for name in density.names}, sites, samples, attrs),
            "sample_stats": _dataset(stats, {}, samples, attrs),
            "observed_data": _dataset(observed, sites, {}, {}),
        }
    )


@contextmanager
def _isolated(seed: int) -> Iterator[None]:
    """Seed every generator that a model or Pyro may use, and put them and the parameter store back afterwards."""
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 (Pyro itself uses the global state)
    store = pyro.get_param_store()
    try:
        with torch.random.fork_rng(devices=cuda), store.scope(store.get_state()):
            pyro.set_rng_seed(seed)
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)  # noqa: NPY002


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
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    import nutpie
    import pyarrow  # comes with nutpie, whose results it reads
    from nutpie.compiled_pyfunc import from_pyfunc

    def expand(x: np.ndarray, **_: Any) -> dict[str, np.ndarray]:
        return {"x": np.array(x)}

    density.initial(np.random.default_rng(seed), init)  # errors come out here as they are, not through nutpie's threads
    compiled = from_pyfunc(
        ndim=density.size,
        make_logp_fn=lambda: density.value_and_grad,
        make_expand_fn=lambda *_: expand,
        expanded_dtypes=[np.dtype("float64")],
        expanded_shapes=[(density.size,)],
        expanded_names=["x"],
        make_initial_point_fn=lambda chain_seed: density.initial(np.random.default_rng(chain_seed), init),
    )
    sampler = nutpie.sample(
        compiled,
        draws=num_samples,
        tune=warmup,
        chains=chains,
        cores=1,  # Python's lock is held between operations, and Pyro's handlers are global to the process
        seed=seed,
        progress_bar=progress,
        return_raw_trace=True,
        blocking=False,
        target_accept=target_accept,
        maxdepth=max_tree_depth,
    )
    try:
        batches, records = sampler.wait().get_arrow_trace()
    except BaseException:
        sampler.cancel()
        raise
    draws = np.stack(
        [pyarrow.array(batch.column("x")).flatten().to_numpy().reshape(-1, density.size)[warmup:] for batch in batches]
    )
    names = {
        "diverging": "diverging",
        "tree_depth": "depth",
        "n_steps": "n_steps",
        "energy": "energy",
        "acceptance_rate": "mean_tree_accept",
        "step_size": "step_size",
        "lp": "logp",
    }
    stats = {
        ours: np.stack([pyarrow.array(r.column(theirs)).to_numpy(zero_copy_only=False)[warmup:] for r in records])
        for ours, theirs in names.items()
    }
    return draws, stats


class _Precomputed(torch.autograd.Function):
    """Potential energy whose gradient was computed along with it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, density: LogDensity) -> torch.Tensor:
        value, gradient = density.tensors(x.detach())
        ctx.save_for_backward(gradient)
        return -value

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return -upstream * gradient, None


class _RecordingNUTS(NUTS):
    """Pyro's NUTS, keeping what it knows about each trajectory and does not report."""

    def _sample_r(self, name: str) -> Any:
        r, unscaled = super()._sample_r(name)
        self.energy = float(self._kinetic_energy(unscaled) + self._potential_energy_last)
        self.depth, self.accepts = 0, []
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
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    draws, stats = [], []
    for chain_seed in np.random.SeedSequence(seed).generate_state(chains):
        start = torch.from_numpy(density.initial(np.random.default_rng(chain_seed), init))
        pyro.set_rng_seed(int(chain_seed))
        rows: list[tuple[Any, ...]] = []

        def record(kernel: Any, _: Any, stage: str, step: int, rows: list[tuple[Any, ...]] = rows) -> None:
            if stage == "Sample":
                lp = -float(kernel._potential_energy_last)
                accept = float(np.mean(kernel.accepts))
                diverging = kernel._divergences[-1:] == [step]
                rows.append(
                    (diverging, kernel.depth, len(kernel.accepts), kernel.energy, accept, float(kernel.step_size), lp)
                )

        kernel = _RecordingNUTS(
            potential_fn=lambda z: _Precomputed.apply(z["x"], density),
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
            mcmc.run()
        draws.append(mcmc.get_samples()["x"].numpy())
        stats.append(rows)
    names = ("diverging", "tree_depth", "n_steps", "energy", "acceptance_rate", "step_size", "lp")
    return np.stack(draws), {
        name: np.array([[row[i] for row in rows] for rows in stats]) for i, name in enumerate(names)
    }


def _dataset(
    values: Mapping[str, np.ndarray], sites: Mapping[str, Any], samples: dict[str, np.ndarray], attrs: dict[str, Any]
) -> xr.Dataset:
    """Arrays with leading dims ``samples``, then the plates' names, then ``{site}_dim_{axis}`` as ArviZ has it."""
    variables, coords = {}, dict(samples)
    for name, array in values.items():
        shape = array.shape[len(samples) :]
        dims = [f"{name}_dim_{axis}" for axis in range(len(shape))]
        site = sites.get(name)
        for frame in site["cond_indep_stack"] if site else ():
            # pyro.deterministic counts all dims as event dims unless told otherwise
            event_dim = site["fn"].event_dim if not site["infer"].get("_deterministic") else 0
            axis = len(shape) - event_dim + frame.dim if frame.vectorized else -1
            if axis >= 0 and shape[axis] == frame.size:
                dims[axis] = f"{frame.name}_dim" if frame.name in values else frame.name
        coords.update({dim: np.arange(size) for dim, size in zip(dims, shape, strict=True)})
        variables[name] = ([*samples, *dims], array)
    return xr.Dataset(variables, coords=coords, attrs=attrs)
