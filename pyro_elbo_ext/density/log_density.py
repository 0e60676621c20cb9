"""The log density of a Pyro model on flat unconstrained space, with its gradient, as one compiled graph."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyro_elbo_ext.density.graph import Graph, check_equal, short_vectors_only, to_machine_code, trace, trace_batch
from pyro_elbo_ext.density.native import NativeDensity, NotNative
from pyro_elbo_ext.density.unconstrained import UnconstrainedModel
from pyro_elbo_ext.programs.faults import first_line
from pyro_elbo_ext.programs.interrupts import handlers_are_heard
from pyro_elbo_ext.programs.randomness import isolated

logger = logging.getLogger(__name__)

CHECK_POINTS = 4  # random points at which a graph must equal the model run by Pyro
CHUNK = 256  # points of a batch computed at a time, at least
AT_ONCE = 1 << 20  # numbers that are computed at a time, if that is more


def compiled_log_density(model: Callable[..., Any], *args: Any, **kwargs: Any) -> LogDensity:
    """Log density and gradient of a Pyro model on unconstrained space, as one compiled graph.

    ``model(*args, **kwargs)`` is taken as it is, and its data are held: to change them, compile again. The same graph is
    sampled from by :func:`pyro_elbo_ext.run_nuts`. The parameter store and the random number generators are left as
    they were; ``pyro.param`` and module parameters are held at their current values.

    With T the bijections ``torch.distributions.biject_to(support)`` of the continuous latent sites, each read in every
    run, the log density is ``log p(data, T(u)) + log |det dT/du|``, constants included. That is minus the potential energy
    of Pyro's NUTS (``pyro.infer.mcmc.util.initialize_model``), which however keeps a support that depends on another
    latent as it was in its first run; and, where Stan's transform of a constraint is the same, Stan's log density with
    Jacobian and without dropped constants (Stan Reference Manual, "Constraint transforms"). A flat site
    (``dist.ImproperUniform``) has density 1 on its support and adds its Jacobian only. Sites follow each other in ``u`` as
    in the model; what is marked for enumeration is summed out.

    Where a model cannot be traced, compiled, or computed in float64, Pyro or an interpreter runs it with the same
    results; a message at level INFO of the logger ``pyro_elbo_ext`` says why. The machine code is kept on disk between
    processes by torch (``TORCHINDUCTOR_CACHE_DIR``).

    Parameters
    ----------
    model
        Pyro model.
    args, kwargs
        Its arguments.

    Returns
    -------
    LogDensity
        With ``log_density``, ``value_and_grad``, ``constrain``, ``unconstrain``; see there.

    Raises
    ------
    ValueError
        For a model without continuous latent sites, with unmarked discrete latent sites, subsampling plates, NaN in
        observations or parameters, each named; or with random numbers outside ``pyro.sample``. A density that is nowhere
        finite is no error here, since it may be at other points: `run_nuts` names the site.
    TypeError
        For a model that cannot be called.

    Examples
    --------
    >>> density = compiled_log_density(model, data)
    >>> u = density.unconstrain({"mu": 0.0, "tau": 1.0})
    >>> value, gradient = density.value_and_grad(u)
    """
    if not callable(model):
        raise TypeError(f"model must be callable, got {type(model).__name__}")
    with isolated(0):
        return LogDensity(model, args, kwargs, 0, compile=True)


class LogDensity:
    """Log density and gradient of a Pyro model on the flat unconstrained space, and the way to the sites and back.

    Made by :func:`compiled_log_density`, where the conventions are. Points are NumPy arrays or tensors, of shape (dim,) or
    ``(*batch, dim)``; results are of the same kind, and float64 whatever the dtype of the point. Where it can, the model is
    run in float64 whatever the dtype of its own tensors (float32 data are widened exactly).

    Compiled code runs in as many threads as torch was set to at compilation (``torch.set_num_threads``). It may be called
    from several threads at once, a model that Pyro runs may not.

    Attributes
    ----------
    dim : int
        Number of unconstrained coordinates.
    names : list of str
        Latent and deterministic sites, as `constrain` gives them.
    coordinates : list of str
        Name of each unconstrained coordinate: the site's, with its index in the site's unconstrained shape.
    layout : dict
        Name of each continuous latent site to its place in the flat vector (``start``, ``stop``, ``shape``).
    float64 : bool
        Whether the model is computed in float64; if not, in the dtype of its own tensors.
    compiled : bool
        Whether it is machine code.
    native : NativeDensity or None
        The C function for threads without Python's lock, where the graph has one.
    compile_time : float
        Seconds from the first run of the model to the checked code.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        seed: int,
        compile: bool = False,
        one_thread: bool = False,
    ) -> None:
        began = time.perf_counter()
        self.program = UnconstrainedModel(model, args, kwargs, seed, CHECK_POINTS)
        self.dim, self.names = self.program.dim, self.program.names
        self.layout, self.float64 = self.program.layout, self.program.float64
        self.coordinates = [
            f"{name}[{', '.join(map(str, index))}]" if index else name
            for name, latent in self.layout.items()
            for index in np.ndindex(*latent.shape)
        ]
        self._rtol, points = 1e-8 if self.float64 else 1e-4, self.program.points
        self._graph = trace(self.program.value_and_grad, points, self._rtol, "log density")
        self.native: NativeDensity | None = None
        self._value_and_grad: Graph = self._graph
        self.compiled = False
        self.compile_time = time.perf_counter() - began
        if compile:
            self.compile(one_thread)
            _ = self._values

    def compile(self, one_thread: bool = False) -> None:
        """Turn the graph into machine code, where there is one and it has not been done.

        Parameters
        ----------
        one_thread
            Whether the code runs in the caller's thread alone, instead of as many as torch is set to.
        """
        if self.compiled or not isinstance(self._graph, torch.fx.GraphModule):
            return
        began, points = time.perf_counter(), self.program.points
        with short_vectors_only():
            machine_code = to_machine_code(self._graph, points, self._rtol, "log density", one_thread)
            if machine_code is not None:
                self.compiled, self._value_and_grad = True, machine_code
                self.native = _native(machine_code, points)
        self.compile_time += time.perf_counter() - began

    @cached_property
    def _values(self) -> Graph:
        """Latent and deterministic sites of a point, traced when first asked for."""
        with isolated(0):
            return trace(self.program.values, self.program.points, self._rtol, "deterministic sites")

    @property
    def traced(self) -> bool:
        """Whether it is a graph, and not the model run by Pyro."""
        return isinstance(self._graph, torch.fx.GraphModule)

    @property
    def batched(self) -> bool:
        """Whether many points go through that graph at once."""
        if not isinstance(self._graph, torch.fx.GraphModule):
            return False
        try:
            torch.vmap(self._graph)(torch.stack([self.program.points[0]] * 2))
        except (RuntimeError, ValueError) as error:
            logger.info("points are computed one after the other: %s", first_line(error))
            return False
        return True

    @property
    def num_entries(self) -> int:
        """Entries of all latent and deterministic sites together."""
        return sum(self.program.sites[name]["value"].numel() for name in self.names)

    @property
    def size(self) -> int:
        """Numbers that are computed on the way to one density and its gradient; 0 where it is not a graph."""
        return _size(self._graph) if isinstance(self._graph, torch.fx.GraphModule) else 0

    @property
    def operations(self) -> int:
        """Of one density and its gradient; 0 where it is not a graph."""
        return len(self._graph.graph.nodes) if isinstance(self._graph, torch.fx.GraphModule) else 0

    def for_batches(self, count: int) -> Graph:
        """`value_and_grad` of tensors of shape (count, dim), float64, for many calls with the same ``count``.

        What ``torch.vmap`` does at each call, which takes longer than the arithmetic of a small model, is done once.
        """
        if self.compiled or count < 2 or not isinstance(self._graph, torch.fx.GraphModule):
            return self.value_and_grad
        if count > _at_once(self._graph):
            return self.value_and_grad
        some = torch.stack([self.program.points[i % len(self.program.points)] for i in range(count)])
        graph = trace_batch(self._graph, some, self._rtol)
        if graph is None:
            return self.value_and_grad

        def evaluate(x: Tensor) -> tuple[Tensor, ...]:
            try:
                with torch.no_grad():
                    return graph(x)
            except torch.linalg.LinAlgError:  # no density at some points
                return self.value_and_grad(x)

        return evaluate

    def log_density(self, u: Any) -> Any:
        """Log density at ``u``.

        Parameters
        ----------
        u
            Array or tensor of shape ``(*batch, dim)``.

        Returns
        -------
        float, ndarray or Tensor
            Shape ``(*batch)``; -inf or NaN outside the model's domain. Of a tensor, differentiable once by autograd.
        """
        value, gradient = self.value_and_grad(u)
        return _Differentiable.apply(u, value, gradient) if isinstance(u, Tensor) else value

    def value_and_grad(self, u: Any) -> tuple[Any, Any]:
        """Log density and its gradient at ``u``.

        Parameters
        ----------
        u
            Array or tensor of shape ``(*batch, dim)``.

        Returns
        -------
        tuple of float, ndarray or Tensor
            Shapes ``(*batch)`` and ``(*batch, dim)``, float64, without autograd.
        """
        x = self._points(u)
        if x.dim() == 1:
            value, gradient = self._at(x)
        else:
            flat = x.reshape(-1, self.dim)
            value, gradient = self._batch(flat, self._graph, self._at)
            value, gradient = value.reshape(x.shape[:-1]), gradient.reshape(x.shape)
        if isinstance(u, Tensor):
            return value, gradient
        return value.item() if x.dim() == 1 else value.cpu().numpy(), gradient.cpu().numpy()

    def constrain(self, u: Any) -> dict[str, Any]:
        """Values of the latent and deterministic sites at ``u``.

        Parameters
        ----------
        u
            Array or tensor of shape ``(*batch, dim)``.

        Returns
        -------
        dict
            Site to array or tensor of shape ``(*batch, *site shape)``, in the site's own dtype, or float64 where the model
            is computed in it.
        """
        found = self.all_values(u)
        return {name: found[name] if isinstance(u, Tensor) else found[name].cpu().numpy() for name in self.names}

    def all_values(self, u: Any) -> dict[str, Tensor]:
        """What `constrain` gives, as tensors, and the other continuous latent sites: missing elements of observed ones."""
        x = self._points(u)
        with torch.no_grad():
            values = self._batch(x.reshape(-1, self.dim), self._values, self._values)
        return {
            name: value.reshape(x.shape[:-1] + value.shape[1:]).detach()
            for name, value in zip(self.program.all_names, values, strict=True)
        }

    def at_each(self, u: Any, function: Graph, what: str) -> tuple[Tensor, ...]:
        """What ``function`` computes of one point, at each of many: by one graph over all of them where there is one."""
        x = self._points(u)
        with isolated(0), torch.no_grad():
            graph = trace(function, self.program.points, self._rtol, what)
            rows = self._batch(x.reshape(-1, self.dim), graph, graph)
        return tuple(row.reshape(x.shape[:-1] + row.shape[1:]).detach() for row in rows)

    def unconstrain(self, values: Mapping[str, Any]) -> Tensor:
        """The point at which the sites have the given values: the inverse of `constrain`.

        Parameters
        ----------
        values
            Every continuous latent site to its value, of the site's shape, inside its support. Deterministic sites are
            ignored.

        Returns
        -------
        Tensor
            Shape (dim,), float64.

        Raises
        ------
        ValueError
            For a missing or unknown site, or a value of another shape or outside its support; all named.
        """
        latent = {name: value for name, value in values.items() if name in self.layout or name not in self.names}
        missing = [name for name in self.layout if name not in latent]
        if missing:
            raise ValueError(f"values lack the sites {missing}: give every continuous latent site a value")
        x = torch.zeros(self.dim, dtype=torch.float64)
        with isolated(0):
            self.program.place(x, latent, "values")
        return x

    def _points(self, u: Any) -> Tensor:
        """``u`` as a float64 tensor of a shape that fits."""
        x = (u.detach() if isinstance(u, Tensor) else torch.from_numpy(np.array(u))).to(torch.float64)
        if x.shape[-1:] != (self.dim,):
            raise ValueError(f"points have shape (*batch, {self.dim}), one coordinate each, got {tuple(x.shape)}")
        return x

    def _at(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Value and gradient at one point."""
        if self.native is not None and x.device.type == "cpu":
            return _tensors(*self.native(np.ascontiguousarray(x.numpy())))
        try:
            with torch.no_grad():
                value, gradient = self._value_and_grad(x)
        except torch.linalg.LinAlgError:  # a covariance that is not positive definite in floating point: no density
            return x.new_tensor(-torch.inf), torch.zeros_like(x)
        return value, gradient

    def _batch(self, x: Tensor, graph: Graph, one: Graph) -> tuple[Tensor, ...]:
        """``one`` at each row of ``x``: by the ATen graph over all at once, or one after the other where that fails."""
        if len(x) > 1 and isinstance(graph, torch.fx.GraphModule):
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
                    return torch.vmap(graph, chunk_size=_at_once(graph))(x)
            except torch.linalg.LinAlgError:  # no density at some points, which halving finds
                halves = [self._batch(half, graph, one) for half in x.tensor_split(2)]
                return tuple(torch.cat(pair) for pair in zip(*halves, strict=True))
            except (RuntimeError, ValueError) as error:  # an operation without batching
                logger.info("points are computed one after the other: %s", first_line(error))
        rows = [one(row) for row in x] or [one(x.new_zeros(self.dim))]
        return tuple(torch.stack(column)[: len(x)] for column in zip(*rows, strict=True))


def _at_once(graph: torch.fx.GraphModule) -> int:
    """Points of a batch that are computed at a time."""
    return max(CHUNK, AT_ONCE // max(1, _size(graph)))


def _size(graph: torch.fx.GraphModule) -> int:
    """Numbers that a graph computes, counted once: it is asked for at each batch."""
    if "size" not in graph.meta:
        values = tree_leaves([node.meta.get("val") for node in graph.graph.nodes])
        graph.meta["size"] = sum(value.numel() for value in values if isinstance(value, torch.Tensor))
    return int(graph.meta["size"])


class _Differentiable(torch.autograd.Function):
    """The log density, whose gradient is computed along with it."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient.to(u.dtype))
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return upstream.to(gradient.dtype).unsqueeze(-1) * gradient, None, None


def _tensors(value: float, gradient: np.ndarray) -> tuple[Tensor, Tensor]:
    return torch.tensor(value, dtype=torch.float64), torch.from_numpy(gradient)


def _native(compiled: Graph, points: list[Tensor]) -> NativeDensity | None:
    """The C function of compiled code, equal to it at the points; None, with a message, where there is none."""
    with handlers_are_heard():
        try:
            native = NativeDensity(compiled, points[0])
            tolerance = 0.0 if native.is_exact else 1e-9
            check_equal(lambda x: _tensors(*native(x.numpy())), compiled, points, tolerance)
            return native
        except NotNative as error:
            logger.info("the log density is called through Python: %s", error)
        except (
            Exception
        ) as error:  # what Inductor generates is no public interface, and it can be called through Python
            logger.warning("the log density is called through Python, unexpectedly: %s", first_line(error))
    return None
