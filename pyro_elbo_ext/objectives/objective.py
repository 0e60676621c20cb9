"""The adapter to ``pyro.infer.ELBO``: everything that Pyro's SVI, ELBOModule and users call, for every objective here."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar, Unpack

import numpy as np
import pyro
import torch
from pyro.infer import ELBO
from pyro.poutine import Trace
from torch import Tensor

from pyro_elbo_ext.bounds import Gradient
from pyro_elbo_ext.bounds.gradients import as_gradient
from pyro_elbo_ext.history import History
from pyro_elbo_ext.history.history import VALUES, SiteInfo
from pyro_elbo_ext.objectives.arguments import PyrosArguments, checked_arguments
from pyro_elbo_ext.objectives.evaluation import (
    MAX_STRUCTURES,
    Args,
    Evaluation,
    Floats,
    Kwargs,
    Pair,
    Program,
    Read,
    Signature,
    Totals,
    Traced,
    Values,
    Weight,
    signature_of,
)
from pyro_elbo_ext.objectives.hooks import PYROS, own_hooks
from pyro_elbo_ext.objectives.not_finite import NotFinite, check_terms, why
from pyro_elbo_ext.objectives.per_pair import PerPair
from pyro_elbo_ext.particles.batched_draws import Batch, call_key
from pyro_elbo_ext.programs.nodes import PARTICLE_PLATE
from pyro_elbo_ext.programs.pairs import Marked, check_pair
from pyro_elbo_ext.programs.randomness import taken_down, torch_kept
from pyro_elbo_ext.programs.running import run_pair
from pyro_elbo_ext.terms import Terms
from pyro_elbo_ext.terms.dependencies import DependencyTracker
from pyro_elbo_ext.terms.enumeration.traces import Beginnings, Begun, first_values
from pyro_elbo_ext.terms.kl import Structure, read_structure
from pyro_elbo_ext.terms.registration import check_registered, collects_parameters, parameters_of
from pyro_elbo_ext.terms.terms import Site

Result = TypeVar("Result")
_PYROS = frozenset(PYROS)
_PACKAGE = __name__.partition(".")[0] + "."


class Objective(ELBO):
    """Base of the objectives: Pyro's interface on the outside, ``_evaluate`` to be given by each.

    Takes what ``pyro.infer.ELBO`` takes, in the same order, then ``gradient`` and ``history``; the objectives describe them.
    """

    maximized = True  # the loss is the negative objective
    weighting: tuple[object, ...] = ()  # what a compiled graph has taken from kl_weight and free_bits
    _weighs_by_site = False  # whether the objective is other than reconstruction - kl_weight * kl_prior
    _tracks_dependencies = False  # what closed forms need

    def __init__(
        self, *args: Any, gradient: str | Gradient, history: bool | History, **options: Unpack[PyrosArguments]
    ) -> None:
        given = checked_arguments(self, args, options)
        vectorize_particles: bool | Literal["vmap"] = given["vectorize_particles"]
        if not isinstance(history, bool | History):
            raise TypeError(f"history must be True, False or a History, not {type(history).__name__}")
        self._check_hooks()
        super().__init__(**{**given, "vectorize_particles": vectorize_particles is True})
        self.max_plate_nesting: float
        self.vectorize_particles = vectorize_particles
        self.estimator = as_gradient(gradient)
        self.history: History | None = (History() if history else None) if isinstance(history, bool) else history
        self.num_steps = 0
        self._pairs: PerPair[Pair] = PerPair(Pair)
        self._traced: Traced | None = None

    def __repr__(self) -> str:
        own = {name: getattr(self, name) for name in ("kl", "bound") if hasattr(self, name)}
        own |= {"num_particles": self.num_particles, "gradient": self.gradient}
        said = [f"{name}={type(value).__name__ if name == 'bound' else repr(value)}" for name, value in own.items()]
        return f"{type(self).__name__}({', '.join(said)})"

    @property
    def gradient(self) -> str:
        """Name of the gradient's estimator."""
        return self.estimator.name

    @abstractmethod
    def _evaluate(
        self, model: Program, guide: Program, args: Args, kwargs: Kwargs, *, with_gradient: bool
    ) -> Evaluation:
        """Evaluate the objective once, averaged over its particles.

        Raises ValueError where a term is NaN or infinite, before anything has changed.
        """

    @property
    @abstractmethod
    def last(self) -> Terms | None:
        """Detached terms of the last evaluation; None before the first."""

    @abstractmethod
    def forget(self) -> None:
        """Forget the last evaluation: ``last`` is None again."""

    def _check_hooks(self) -> None:
        """Raise TypeError if a hook of Pyro's losses is overridden, which would have no effect here."""
        ours = [cls for cls in type(self).__mro__ if cls.__module__.startswith(_PACKAGE) or cls is ELBO]
        own = own_hooks(self, PYROS, ours)
        if own:
            raise TypeError(
                f"{type(self).__name__} has its own {' and '.join(own)}, which objectives of pyro_elbo_ext never call. "
                "Override _evaluate, or subclass Pyro's Trace_ELBO and train with pyro.infer.SVI."
            )

    # What Pyro calls

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The loss, in nats: the negative objective.  It is not recorded in the history."""
        if not _PYROS.isdisjoint(vars(self)):
            self._check_hooks()
        return self._loss(self._evaluate(model, guide, args, kwargs, with_gradient=False))

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The loss, after adding its gradient to the ``grad`` of every parameter it depends on."""
        if not _PYROS.isdisjoint(vars(self)):
            self._check_hooks()
        evaluation = self._evaluate(model, guide, args, kwargs, with_gradient=True)
        shares = evaluation.surrogate()
        if shares.requires_grad:
            pair, signature = evaluation.pair, evaluation.signature
            if signature not in pair.registered and collects_parameters():
                self._check_trainable(evaluation)
                check_registered(shares, (model, guide), (args, kwargs))
                self._check_gradient(shares, evaluation)
                pair.registered.add(signature)
            if self.history is not None and self.history.gradient_mode is not None:
                self._backward_and_record(shares, self.history)
            else:
                (shares.sum() if shares.dim() else shares).backward(retain_graph=self.retain_graph)
        self._record(evaluation)
        return self._loss(evaluation)

    def check_programs(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The loss, after a look at its gradient too; nothing is recorded, and no ``grad`` is touched.

        Raises
        ------
        ValueError
            As :meth:`loss`; and where the gradient is NaN or infinite.
        """
        with torch.enable_grad():
            evaluation = self._evaluate(model, guide, args, kwargs, with_gradient=True)
            shares = evaluation.surrogate()
            if shares.requires_grad:
                self._check_gradient(shares, evaluation)
        return self._loss(evaluation)

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss as a scalar tensor with the gradient of the surrogate."""
        if not _PYROS.isdisjoint(vars(self)):
            self._check_hooks()
        evaluation = self._evaluate(model, guide, args, kwargs, with_gradient=True)
        surrogate = evaluation.surrogate().sum()
        if torch.is_grad_enabled():
            self._record(evaluation)
        return self._loss(evaluation) + (surrogate - surrogate.detach())

    def _loss(self, evaluation: Evaluation) -> float:
        return -evaluation.objective if self.maximized else evaluation.objective

    def _check_sites(self, sites: list[Site]) -> None:
        """Raise ValueError if the objective names sites that do not fit these."""

    def _recorded(
        self, sites: tuple[SiteInfo, ...], rows: Floats, objective: Floats, kl_weights: list[Weight]
    ) -> tuple[Floats, Floats]:
        """What the history takes of n steps: the sites' values, and the weight of ``kl_prior`` as one number."""
        return rows, np.array(kl_weights)

    def _follow(self, sites: tuple[SiteInfo, ...], values: Floats) -> None:
        """Take in a step's values, where the next step's weight depends on them."""

    def _check_trainable(self, evaluation: Evaluation) -> None:
        """Raise ValueError if SVI must not train what the loss depends on."""

    def _check_gradient(self, shares: Tensor, evaluation: Evaluation) -> None:
        """Raise NotFinite if the gradient is not finite, though the objective is; asked once for each structure."""
        parameters = parameters_of(shares)
        gradients = torch.autograd.grad(shares.sum(), list(parameters.values()), retain_graph=True, allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is None or bool(torch.isfinite(gradient).all()):
                continue
            raise NotFinite(
                why(evaluation.traces, of_gradient=True)
                + f"The gradient of parameter '{name}' is not finite at step {self.num_steps}, though the objective is. No "
                "parameter has been changed. Look for a branch of torch.where or a masked element that is NaN or infinite."
            )

    def _get_trace(self, model: Program, guide: Program, args: Args, kwargs: Kwargs) -> tuple[Trace, Trace]:
        """Pyro's hook: traces of one draw."""
        return run_pair(model, guide, args, kwargs)

    def _get_traces(self, model: Program, guide: Program, args: Args, kwargs: Kwargs) -> Iterator[tuple[Trace, Trace]]:
        """Pyro's hook: a pair of traces for each particle, or one for all if they are in a particle plate."""
        repeats, model, guide = self._programs(model, guide, args, kwargs)
        for _ in range(repeats):
            yield self._get_trace(model, guide, args, kwargs)

    def _guess_max_plate_nesting(self, model: Program, guide: Program, args: Args, kwargs: Kwargs) -> None:
        """Pyro's hook, for callers outside: guess from one run of the pair, and store the guess, as Pyro's does."""
        super()._guess_max_plate_nesting(model, guide, args, kwargs)
        if self.vectorize_particles == "vmap" and self.num_particles > 1:
            self.max_plate_nesting -= 1  # Pyro has counted a particle plate, and there is none

    # What the objectives share

    def _transfer(self, scalars: Tensor, read: Read) -> Totals:
        """Bring all scalars of a step to the host and read them: the one point that waits for the device."""
        return read(scalars.tolist()) if self._traced is None else self._traced.transfer(scalars, read)

    def _guess_in_private(self, model: Program, guide: Program, args: Args, kwargs: Kwargs) -> int:
        """The same guess; but nothing is stored, and the random state is left as it was."""
        stored = self.max_plate_nesting
        try:
            with torch_kept():
                self._guess_max_plate_nesting(model, guide, args, kwargs)
            return int(self.max_plate_nesting)
        finally:
            self.max_plate_nesting = stored

    def _by_enumeration(
        self, pair: Pair, plain: Callable[[], Result], enumerated: Callable[[Begun | None], Result]
    ) -> Result:
        """``enumerated`` if sites are marked for it, which the first run tells.

        It goes on with that run, or has its random numbers again.
        """
        if pair.enumerates:
            return enumerated(None)
        put_back = taken_down() if pair.enumerates is None and self._traced is None else None
        try:
            result = plain()
        except Begun as first:
            begun: Begun | None = first
        except Marked:
            begun = None
            if put_back is not None:
                put_back()
        else:
            pair.enumerates = False
            return result
        pair.enumerates = True
        return enumerated(begun)

    def _looking_for_marks(
        self, pair: Pair, model: Program, guide: Program, values: Beginnings | None = None
    ) -> tuple[Program, Program]:
        """Model and guide for a first run: where it is known how many dims plates have, as enumeration would run them.

        A program may count on its values' shapes under enumeration, and can then not be run without. ``values`` takes those
        of the guide's "sequential" sites that are left to run.
        """
        if pair.enumerates is not None or self._traced is not None or math.isinf(self.max_plate_nesting):
            return model, guide
        return first_values(model, guide, int(self.max_plate_nesting), values)

    def _plate_nesting(self, pair: Pair, model: Program, guide: Program, args: Args, kwargs: Kwargs) -> int:
        """How many dims belong to plates, the particle plate among them: as given, or guessed in private."""
        if not math.isinf(self.max_plate_nesting):
            return int(self.max_plate_nesting)
        if pair.max_plate_nesting is None:
            pair.max_plate_nesting = self._guess_in_private(model, guide, args, kwargs)
        return pair.max_plate_nesting

    def _particle_dim(self, model: Program, guide: Program, args: Args, kwargs: Kwargs) -> int | None:
        """Dim of Pyro's particle plate; None if the particles are not in one."""
        if self.vectorize_particles is not True or self.num_particles == 1:
            return None
        return -self._plate_nesting(self._pairs(model, guide), model, guide, args, kwargs)

    def _programs(self, model: Program, guide: Program, args: Args, kwargs: Kwargs) -> tuple[int, Program, Program]:
        """How often to run model and guide, and the two, inside the particle plate if there is one."""
        dim = self._particle_dim(model, guide, args, kwargs)
        if dim is None:
            return self.num_particles, model, guide
        particles = [pyro.plate(PARTICLE_PLATE, self.num_particles, dim=dim) for _ in range(2)]
        return 1, particles[0](model), particles[1](guide)

    def _batch(self, pair: Pair, model: Program, guide: Program, args: Args, kwargs: Kwargs) -> Batch | None:
        """What is known of batching the particles of such a call; None if they are not to be batched."""
        if self.vectorize_particles != "vmap" or self.num_particles == 1:
            return None
        key = call_key(args, kwargs)
        batch = pair.batches.get(key)
        if batch is None:

            def read(model_trace: Trace, guide_trace: Trace) -> None:
                check_pair(model_trace, guide_trace)
                signature = signature_of(model_trace, guide_trace, args, kwargs)
                self._remember(pair, signature, model_trace, guide_trace, tracker)

            if len(pair.batches) >= MAX_STRUCTURES:
                pair.batches.clear()
            tracker = DependencyTracker() if self._tracks_dependencies else None
            batch = pair.batches[key] = Batch.start(model, guide, args, kwargs, tracker, read)
        return batch

    def _remember(
        self,
        pair: Pair,
        signature: Signature,
        model_trace: Trace,
        guide_trace: Trace,
        tracker: DependencyTracker | None,
    ) -> Structure:
        """Read the structure of the traces and keep it."""
        structure = read_structure(model_trace, guide_trace, tracker)
        if len(pair.structures) >= MAX_STRUCTURES:
            pair.structures.clear()
            pair.infos.clear()
        pair.structures[signature] = structure
        pair.track_next = False
        return structure

    def _raise_not_finite(
        self, sites: tuple[SiteInfo, ...], values: Values, traces: Sequence[tuple[Trace, Trace]] = ()
    ) -> None:
        """Raise NotFinite if a term is not finite, and say why, as far as the traces tell."""
        check_terms(sites, values, self.num_steps, traces if self._traced is None else ())

    def _backward_and_record(self, shares: Tensor, history: History) -> None:
        """Add the gradient to ``grad``, and each parameter's to the history."""
        parameters = parameters_of(shares)
        tensors = list(parameters.values())
        if history.gradient_mode == "steps":
            gradients = torch.autograd.grad(shares.sum(), tensors, retain_graph=self.retain_graph, allow_unused=True)
            recorded = {name: g for name, g in zip(parameters, gradients, strict=True) if g is not None}
        else:
            if not shares.dim() or len(shares) < 2:
                raise NotFinite(
                    "History(gradient_snr='particles') needs at least two particles whose gradients can be told apart: use "
                    "num_particles of 2 or more with vectorize_particles=False, or gradient_snr='steps'"
                )
            last = len(shares) - 1
            by_particle = [
                torch.autograd.grad(share, tensors, retain_graph=self.retain_graph or k < last, allow_unused=True)
                for k, share in enumerate(shares)
            ]
            stacked = [
                torch.stack([torch.zeros_like(tensor) if g is None else g for g in of_tensor])
                for tensor, of_tensor in zip(tensors, zip(*by_particle, strict=True), strict=True)
            ]
            gradients = tuple(g.sum(0) for g in stacked)
            recorded = dict(zip(parameters, [len(shares) * g for g in stacked], strict=True))
        for tensor, gradient in zip(tensors, gradients, strict=True):
            if gradient is not None:
                tensor.grad = gradient if tensor.grad is None else tensor.grad + gradient
        history.append_gradients(recorded)

    def _record(self, evaluation: Evaluation) -> None:
        values = np.array(evaluation.values).reshape(-1, len(VALUES))
        self._record_step(evaluation.sites, values, evaluation.objective, evaluation.kl_weight)

    def _record_step(self, sites: tuple[SiteInfo, ...], values: Floats, objective: float, weight: Weight) -> None:
        """Enter a step into the history, and count it."""
        self._follow(sites, values)
        step, history, kl_weight = self.num_steps, self.history, weight
        if history is None:
            self.num_steps = step + 1
            return
        before = history.num_recorded
        if self._weighs_by_site:
            rows, weights = self._recorded(sites, values[None], np.array([objective]), [weight])
            values, kl_weight = rows[0], float(weights[0])
        try:
            assert not isinstance(kl_weight, list)
            history.append(step, sites, values, objective=objective, kl_weight=kl_weight)
            self.num_steps = step + 1
        except BaseException:
            self._recount(step, before)
            raise

    def _record_steps(
        self, sites: tuple[SiteInfo, ...], rows: Floats, objective: Floats, kl_weights: list[Weight]
    ) -> None:
        """Enter n steps into the history, and count them: ``rows`` of shape (n, sites, 6), ``objective`` (n,)."""
        step, history, count = self.num_steps, self.history, len(objective)
        if history is None:
            self.num_steps = step + count
            return
        before = history.num_recorded
        recorded, weights = self._recorded(sites, rows, objective, kl_weights)
        try:
            history.extend(np.arange(step, step + count), sites, recorded, objective=objective, kl_weight=weights)
            self.num_steps = step + count
        except BaseException:
            self._recount(step, before)
            raise

    def _recount(self, step: int, before: int) -> None:
        """Count the steps that were entered into the history, which had ``before``: an exception has come, perhaps after."""
        assert self.history is not None
        self.num_steps = step + self.history.num_recorded - before
