"""All particles in one run of guide and model, through ``torch.vmap``; the programs need not broadcast.

Pyro's ``vectorize_particles`` wraps the programs in a plate, so that ``X @ w`` fails or means something else. Under
``torch.vmap`` a program sees the shapes of one particle. What comes out is laid out as that plate would have it: with
``n`` the deepest plate or batch dimension of all sites, a tensor of one particle's batch shape has the shape
``(num_particles, 1, ..., 1, *batch_shape)``, ``n + 1`` dimensions and the event's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro
import torch
from pyro.distributions.score_parts import ScoreParts
from pyro.poutine import Trace
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor, nn
from torch._C import _functorch
from torch.nn.modules.module import register_module_buffer_registration_hook

from pyro_elbo_ext.particles.supply import CannotBatch, Supply, subsamples
from pyro_elbo_ext.particles.vmap_draws import DrawMode, samplers_for
from pyro_elbo_ext.programs.densities import log_prob, score_parts
from pyro_elbo_ext.programs.nodes import PARTICLE_PLATE, Node, is_deterministic
from pyro_elbo_ext.programs.running import trace_pair

Program = Callable[..., Any]
Derive = Callable[[Trace, Trace], dict[str, Tensor]]

# what torch says if a program cannot be batched, and what that means
_REASONS = {
    "data-dependent control flow": "it branches on a drawn value",
    ".item()": "it reads a drawn value into Python (float, int, .item(), range or torch.tensor of a drawn value)",
    "data pointer": "it reads a drawn value into Python (.numpy() or .tolist())",
    "Cannot access storage": "it copies or reads the memory of a drawn value",
    "accessing `data`": "it reads .data of a drawn value",
    "dynamic shape": "the shape of a result depends on a drawn value",
    "inplace randomness": "it draws random numbers into an existing tensor",
    "is not possible because there exists a Tensor": "it writes a drawn value into an existing tensor, in place",
    "doesn't match the broadcast shape": "it writes a drawn value into an existing tensor, in place",
    "got a batched tensor": "batch normalization updates its running statistics",
    "setup_context": "it uses a torch.autograd.Function that has no rule for torch.vmap",
    "vmap fallback": "it uses an operator that has no rule for torch.vmap",
    "Batching rule": "it uses an operator that has no rule for torch.vmap",
    "vmap": "it does what torch.vmap does not support",
    "functorch": "it does what torch.vmap does not support",
}

_FROM_REFERENCE = ("type", "name", "fn", "args", "kwargs", "infer", "is_observed")


class Batched(NamedTuple):
    """All particles' draws and densities, in the layout of Pyro's particle plate.

    Attributes
    ----------
    model_trace, guide_trace : Trace
        Sample sites only. Each node has the site's batched ``value``, ``scale``, ``mask``, ``log_prob`` and
        ``unscaled_log_prob``, in the guide ``score_parts``, and the ``fn``, ``infer``, ``args`` and ``kwargs`` of the
        reference run, whose tensors are one particle's. ``pyro.deterministic`` sites have no densities. Subsample sites
        are as in a looped run: all particles share one subsample.
    derived : dict of str to Tensor
        What ``derive`` returned.
    """

    model_trace: Trace
    guide_trace: Trace
    derived: dict[str, Tensor]


def run_batched(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_particles: int,
    reference: tuple[Trace, Trace],
    *,
    draws: Mapping[str, Tensor] | None = None,
    derive: Derive | None = None,
    detach: bool = False,
) -> Batched:
    """Draw all particles from the guide and score them under model and guide, running each once.

    Parameters
    ----------
    num_particles
        Number of draws, ``K``.
    reference
        Model's and guide's trace, with subsample sites, of one ordinary run of the same programs, as from
        :func:`pyro_elbo_ext.terms.trace_pair`. It has made all parameters, and has validated values.
    draws
        Guide site -> values to score instead of drawing them, shape ``(K, *value_shape)`` or in the layout of a result;
        differentiable. At a Delta site the point mass is put there. Subsample site -> indices, shape ``(size,)``.
    derive
        Called with the model's and the guide's trace of one particle, without subsample sites, inside ``torch.vmap``;
        returns tensors of a shape that broadcasts to the batch.
    detach
        Whether draws are constants to what follows; a Delta's are not.

    Raises
    ------
    CannotBatch
        If the programs cannot be batched, or their sites are not those of the reference.
    ValueError
        If ``draws`` do not fit. Any other error of the programs themselves is raised as it is.
    """
    given, indices = _split_draws(draws or {}, num_particles, reference)
    outputs = _Outputs()
    particle = _Particle(model, guide, args, kwargs, reference, indices, derive, detach, outputs)
    fallback = _functorch._is_vmap_fallback_enabled()  # type: ignore[attr-defined]
    # a loop over the particles, with a warning, for operators that have no rule
    _functorch._set_vmap_fallback_enabled(False)  # type: ignore[attr-defined]
    try:
        with pyro.validation_enabled(False), _buffers_unbatched():
            seed = torch.zeros(num_particles, dtype=torch.bool)
            outputs.tensors = torch.vmap(particle.run, randomness="different")(seed, given)
    except CannotBatch:
        raise
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise CannotBatch(f"{particle.where()}{reason}") from error
    finally:
        _functorch._set_vmap_fallback_enabled(fallback)  # type: ignore[attr-defined]
    return _lay_out(outputs, num_particles)


class _Outputs:
    """The tensors that leave ``torch.vmap``, each once, and the nodes that refer to them by :class:`_At`."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.model: list[Node] = []
        self.guide: list[Node] = []
        self.derived: dict[str, Any] = {}
        self.depth = 0  # of the deepest plate or batch dimension
        self._places: dict[int, int] = {}

    def add(self, value: Any, event_dim: int = 0) -> Any:
        """Where a tensor will be found, an :class:`_At`; what is not a tensor, itself."""
        if not isinstance(value, Tensor):
            return value
        place = self._places.setdefault(id(value), len(self.tensors))
        if place == len(self.tensors):
            self.tensors.append(value)
        return _At(place, event_dim)

    def add_batched(self, value: Any) -> Any:
        """The same for a tensor that varies over the particles; any other is left as it is."""
        return self.add(value) if isinstance(value, Tensor) and _functorch.is_batchedtensor(value) else value


class _At(NamedTuple):
    place: int
    event_dim: int


class _Particle:
    """Guide, model and densities of one particle, as ``torch.vmap`` runs it."""

    def __init__(
        self,
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        reference: tuple[Trace, Trace],
        indices: dict[str, tuple[_Subsample, Tensor]],
        derive: Derive | None,
        detach: bool,
        outputs: _Outputs,
    ) -> None:
        self._programs = model, guide, args, kwargs
        self._reference = reference
        self._indices = indices
        self._derive = derive
        self._detach = detach
        self._outputs = outputs
        self._supply: Supply | None = None
        self._scored: str | None = None
        self._deriving = False

    def where(self) -> str:
        """Where the run has got to, to begin an error with."""
        if self._deriving:
            return "in the closed form of a kl_prior (kl='sampled' needs none), "
        if self._scored is not None:
            return f"in the log density of site '{self._scored}', "
        if self._supply is not None and self._supply.site is not None:
            return f"at or after site '{self._supply.site}', "
        return ""

    def run(self, seed: Tensor, draws: dict[str, Tensor]) -> list[Tensor]:
        """Fill the outputs' nodes, and return their tensors."""
        mode = DrawMode(seed)
        with samplers_for(mode):
            self._supply = Supply(draws, self._indices, mode, detach=self._detach)
            with self._supply:
                model_trace, guide_trace = trace_pair(*self._programs)
            unwrapped = pyro.poutine.unwrap(self._programs[1])
            if isinstance(unwrapped, GuideMessenger):
                unwrapped.trace = Trace()  # a GuideMessenger would keep tensors that die with torch.vmap
            outputs = self._outputs
            outputs.guide = self._score(guide_trace, self._reference[1], "guide")
            outputs.model = self._score(model_trace, self._reference[0], "model")
            self._scored = None
            if self._derive is not None:
                self._deriving = True
                derived = self._derive(prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace))
                outputs.derived = {name: outputs.add(value) for name, value in derived.items()}
        return outputs.tensors

    def _score(self, trace: Trace, reference: Trace, where: str) -> list[Node]:
        nodes = []
        add, add_batched = self._outputs.add, self._outputs.add_batched
        for name, node in trace.nodes.items():
            if node["type"] != "sample":
                continue
            known = reference.nodes.get(name)
            if (
                known is None
                or node["is_observed"] != known["is_observed"]
                or type(node["fn"]) is not type(known["fn"])
            ):
                raise CannotBatch(f"site '{name}' of the {where} is not as in the run before: the structure varies")
            laid_out = {key: known[key] for key in _FROM_REFERENCE}
            nodes.append(laid_out)
            fn, stack = node["fn"], node["cond_indep_stack"]
            laid_out["cond_indep_stack"] = stack
            if site_is_subsample(node):
                laid_out.update(value=node["value"], scale=node["scale"], mask=node["mask"])
                continue
            laid_out["value"] = add(node["value"], getattr(fn, "event_dim", 0))
            laid_out["scale"] = add_batched(node["scale"])
            laid_out["mask"] = add_batched(node["mask"])
            depth = max([-frame.dim for frame in stack if frame.dim is not None], default=0)
            if not is_deterministic(node):
                self._scored = name
                density = log_prob(node, trace) if where == "model" else score_parts(node, trace).log_prob
                depth = max(depth, density.dim())
                laid_out["log_prob"] = add(density)
                laid_out["unscaled_log_prob"] = add(node["unscaled_log_prob"])
                if where == "guide":
                    laid_out["score_parts"] = ScoreParts(*[add(part) for part in node["score_parts"]])
            self._outputs.depth = max(self._outputs.depth, depth)
        missing = [
            name for name, node in reference.nodes.items() if node["type"] == "sample" and name not in trace.nodes
        ]
        if missing:
            raise CannotBatch(f"site '{missing[0]}' of the {where} is not in this run: the structure varies")
        return nodes


def _split_draws(
    draws: Mapping[str, Tensor], num_particles: int, reference: tuple[Trace, Trace]
) -> tuple[dict[str, Tensor], dict[str, tuple[_Subsample, Tensor]]]:
    """The given draws of sites, shape ``(num_particles, *value_shape)``; and the indices of all subsamples."""
    sites = {
        name: node
        for trace in reference
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and (trace is reference[1] or site_is_subsample(node))
    }
    given: dict[str, Tensor] = {}
    for name, draw in draws.items():
        node = sites.get(name)
        if node is None or node["is_observed"]:
            raise ValueError(f"draws are given for '{name}', which is not a latent site of the guide. Leave it out.")
        if site_is_subsample(node):
            continue
        shape = node["value"].shape
        ones = draw.dim() - 1 - len(shape)  # of the layout of a result
        if ones < 0 or len(draw) != num_particles or any(size != 1 for size in draw.shape[1 : 1 + ones]):
            raise ValueError(
                f"the draws of site '{name}' have shape {tuple(draw.shape)}, but {num_particles} values of shape "
                f"{tuple(shape)} are needed. Stack them along dimension 0."
            )
        given[name] = draw.reshape(num_particles, *draw.shape[1 + ones :]) if ones else draw
    indices = {
        name: (node["fn"], draws[name] if name in draws else node["fn"].sample())
        for name, node in sites.items()
        if site_is_subsample(node) and subsamples(node["fn"])
    }
    return given, indices


def _lay_out(outputs: _Outputs, num_particles: int) -> Batched:
    """Put the tensors that have left ``torch.vmap`` where the nodes refer to them, the particles' dimension in front."""
    depth = outputs.depth
    frame = CondIndepStackFrame(PARTICLE_PLATE, -depth - 1, num_particles, 0, num_particles)
    aligned: dict[_At, Tensor] = {}

    def find(entry: Any) -> Any:
        if type(entry) is not _At:
            return entry
        if entry not in aligned:
            tensor = outputs.tensors[entry.place]
            for _ in range(depth - (tensor.dim() - 1 - entry.event_dim)):
                tensor = tensor.unsqueeze(1)
            aligned[entry] = tensor
        return aligned[entry]

    traces = []
    for nodes in (outputs.model, outputs.guide):
        trace = Trace()
        for node in nodes:
            if not site_is_subsample(node):
                for key in ("value", "scale", "mask", "log_prob", "unscaled_log_prob"):
                    if key in node:
                        node[key] = find(node[key])
                if "score_parts" in node:
                    node["score_parts"] = ScoreParts(*[find(part) for part in node["score_parts"]])
                node["cond_indep_stack"] = (frame, *node["cond_indep_stack"])
            trace.add_node(node["name"], **node)
        traces.append(trace)
    return Batched(traces[0], traces[1], {name: find(entry) for name, entry in outputs.derived.items()})


@contextmanager
def _buffers_unbatched() -> Iterator[None]:
    """Refuse to let a module keep a batched tensor, which is dead once ``torch.vmap`` returns."""
    handle = register_module_buffer_registration_hook(_refuse_batched)
    try:
        yield
    finally:
        handle.remove()


def _refuse_batched(module: nn.Module, name: str, buffer: Tensor | None) -> None:
    if buffer is not None and _functorch.is_batchedtensor(buffer):
        raise CannotBatch(f"buffer '{name}' of {type(module).__name__} is set to a value that depends on a draw")


def _reason(error: BaseException | None) -> str | None:
    """Why a program cannot be batched, if that is what the error, or one that it came from, is about."""
    while error is not None:
        if isinstance(error, RuntimeError):
            for text, reason in _REASONS.items():
                if text in str(error):
                    return reason
        error = error.__cause__ or error.__context__
    return None
