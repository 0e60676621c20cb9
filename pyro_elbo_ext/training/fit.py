"""`fit`: the training loop that everyone who uses SVI rewrites."""

from __future__ import annotations

import logging
import operator
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyro
import torch
from pyro.optim import Adam, PyroOptim
from torch.utils.data import DataLoader

from pyro_elbo_ext.bounds.weighting import check_reaches_one
from pyro_elbo_ext.compile.machine_code.compiler import import_dynamo
from pyro_elbo_ext.compile.threads import OneThread
from pyro_elbo_ext.compile.tracing.first_look import look
from pyro_elbo_ext.compile.tracing.static_check import nothing_changed
from pyro_elbo_ext.objectives import DecomposedELBO
from pyro_elbo_ext.objectives.objective import Objective
from pyro_elbo_ext.programs.arguments import check_seed
from pyro_elbo_ext.programs.points import point_sites
from pyro_elbo_ext.programs.running import check_callable, trace_pair
from pyro_elbo_ext.training import processes
from pyro_elbo_ext.training.arguments import check_counts, check_kinds
from pyro_elbo_ext.training.automatic_fit import fit_automatically
from pyro_elbo_ext.training.callbacks import Callback, CallbackList
from pyro_elbo_ext.training.data.batches import Batches, Call, Whole
from pyro_elbo_ext.training.data.scaling import ScaleCheck, check_dataset_size, check_whole
from pyro_elbo_ext.training.data.validation import Validation, true_objective
from pyro_elbo_ext.training.distributed.replica import start_alike
from pyro_elbo_ext.training.fingerprint import fingerprint, of_programs
from pyro_elbo_ext.training.flat_priors import flat_priors_have_a_start
from pyro_elbo_ext.training.ladder import climb
from pyro_elbo_ext.training.loop import LOOK_EVERY, Loop
from pyro_elbo_ext.training.result import FitResult
from pyro_elbo_ext.training.safety import explain
from pyro_elbo_ext.training.settings import describe_run
from pyro_elbo_ext.training.state.state import parameters_of_programs, random_state_kept
from pyro_elbo_ext.training.steps import uncompiled, what_steps
from pyro_elbo_ext.training.stopping import AdaptiveStopping, Patience, StoppingRule

logger = logging.getLogger(__name__)

_RATE, _FIRST_RATE = 0.01, 0.02  # of Adam; the latter where a stopping rule lowers it


@OneThread("fit")
def fit(
    model: Callable[..., Any],
    guide: Callable[..., Any] | str = "auto",
    *args: Any,
    loss: Any = None,
    optim: PyroOptim | torch.optim.Optimizer | None = None,
    accuracy: float | None = None,
    num_steps: int | Literal["auto"] = "auto",
    num_epochs: int | None = None,
    max_steps: int = 100_000,
    batches: Iterable[Any] | None = None,
    dataset_size: int | None = None,
    validation: Any = None,
    validate_every: int | None = None,
    stopping: StoppingRule | None = None,
    callbacks: Iterable[Callback] = (),
    log_every: int = LOOK_EVERY,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool | Literal["anyway"] = False,
    compiled: bool | Mapping[str, Any] = True,
    distributed: bool | Mapping[str, Any] | None = None,
    max_rollbacks: int = 5,
    progress: bool = True,
    seed: int | None = None,
    **kwargs: Any,
) -> FitResult:
    r"""Fit a guide: one that is made here, or your own by the loop around ``SVI.step``, with what that lacks.

    With ``guide="auto"`` a Gaussian on unconstrained space, of full covariance up to 500 coordinates, is fitted to all the
    data without tuning or compilation: it starts from the best mode that several climbs find, moves to the greatest ELBO by
    natural-gradient steps, and then, where importance weights can tell, to the posterior's means and sds. Whether that is
    enough the result says; its ``refine()`` is the next guide up, and ``accuracy`` climbs on by itself. Only ``callbacks``,
    ``progress`` and ``seed`` go with it. The model may then be a :class:`LogDensity` too, for one that is compiled already.

    With any model and guide it takes the steps that ``SVI`` takes, compiled where possible. Before anything changes, model,
    guide and data are tried once, so that NaN data, a guide that misses a site or a wrongly scaled batch is an error that
    names the site. A step that is NaN or diverges is taken back, see ``max_rollbacks``. Ctrl-C returns the result so far.

    Parameters
    ----------
    model, guide, args, kwargs
        As for ``pyro.infer.SVI`` and ``SVI.step``; or for ``guide`` "auto", or by name "gaussian", "diagonal" or "flow".
        Model keywords with the name of a parameter below need ``functools.partial``. A ``DataLoader`` as the first argument
        is taken for ``batches``. Autoguides may have flat priors (``ImproperUniform``): they start at 0 in unconstrained
        space there.
    loss
        Objective of this package, or one of Pyro's losses, which keep no history. ``DecomposedELBO()`` by default.
    optim
        Optimizer of ``pyro.optim`` or of torch; Adam by default, with a learning rate of 0.02 where
        :class:`AdaptiveStopping` lowers it, else 0.01. Schedulers of ``pyro.optim`` go on at the end of each epoch, without
        ``batches`` after each step, ``ReduceLROnPlateau`` after each validation.
    accuracy
        With ``guide="auto"``: the largest error of a mean, in posterior sds, or of a log sd that the draws are to have, such
        as 0.1. Where the Gaussian is not known to be that near, hierarchies are centred in part as the data ask for
        (``result.model`` is the model in these coordinates); then NUTS follows from the guide's draws, whose chains must
        agree, and where they do not a normalizing flow. The result's ``rungs`` say what each gave and took, ``accurate``
        whether the last is enough; ``draws`` are of that one. Callbacks are told of the first.
    num_steps
        How many steps, or "auto": until ``stopping`` says so.
    num_epochs
        In place of ``num_steps``, with ``batches``.
    max_steps
        Bound on the steps where ``num_steps`` is "auto".
    batches
        ``DataLoader`` or another iterable (not an iterator) of batches. A tensor becomes the first argument, a tuple or list
        the first arguments, a mapping keyword arguments; ``args`` and ``kwargs`` follow.
    dataset_size
        Number of data behind ``batches``, for the check that the model counts every row once in an epoch; by default that of
        the loader's dataset or the list, or what the first epoch has.
    validation
        Held-out data: a tensor, a tuple of arguments or a mapping, as one batch, or an iterable of batches. Its true ELBO,
        ``kl_prior`` at weight 1, is recorded without a step, in evaluation mode and under the same random numbers each time.
    validate_every
        Steps between validations; by default once an epoch, without ``batches`` at each look.
    stopping
        Rule that ends the training, before ``num_steps`` are taken. Where ``num_steps`` is "auto": :class:`Patience` if
        there are held-out data, else :class:`AdaptiveStopping`, which lowers the learning rate again and again until that
        changes little, and leaves the average of the last iterates in the guide.
    callbacks
        Trackers, such as ``CSVTracker``, or other :class:`Callback` objects.
    log_every
        Steps between two reports to them.
    checkpoint
        File to resume from, written atomically. It is a pickle: resume from your own only.
    checkpoint_every
        Steps between checkpoints, about a minute by default. One is written at the end and after Ctrl-C in any case.
    resume
        Go on from ``checkpoint`` if it is there, with the same arguments. The resumed run equals the uninterrupted one bit
        for bit: parameters, optimizer, schedules, random numbers, order of the batches, history. Other programs, another
        optimizer, loss, stopping rule, seed or data, with their settings, are an error that says what differs, and so is a
        ``num_steps`` that has been passed already. "anyway": go on with what is given now; an optimizer or rule that
        differs begins anew.
    compiled
        Whether to take the steps by :class:`CompiledSVI`, which goes by Pyro where a program cannot be compiled; or keyword
        arguments for it. The result's ``uncompiled`` says why not.
    distributed
        Whether this is one of several processes that take every step together, by :class:`DistributedSVI`; or keyword
        arguments for it. By default in a process that ``torchrun`` started with others. ``batches`` must then give each
        process its own part (``torch.utils.data.DistributedSampler``). Process 0 shows progress, writes checkpoints and
        calls the callbacks.
    max_rollbacks
        How often to return to the last good state and go on with half the learning rate before it is an error. A step has
        failed if a term or parameter is not finite, or if the loss has risen by 100 times the range that it has come down.
    progress
        Whether to show a line of progress.
    seed
        For ``pyro.set_rng_seed``; with a guide that is made here, of that alone, and the generators are left as they were.

    Returns
    -------
    FitResult
        An :class:`AutomaticFit` where the guide is made here.

    Raises
    ------
    ValueError
        For arguments out of range or a warm-up of ``kl_weight`` that does not end within the run, and before anything has
        changed: NaN data, a latent site that the guide lacks, batches that are empty or not scaled to the data set, each
        named. During training if steps fail more than ``max_rollbacks`` times; the parameters are then the last good ones.
    FileExistsError
        If there is a checkpoint and ``resume`` is False.
    RuntimeError
        If another thread is in ``fit``.
    TypeError
        For arguments of a wrong type, or that model and guide cannot be called with.

    References
    ----------
    Welandawe, Andersen, Vehtari, Huggins (2022), A framework for improving the reliability of black-box variational
    inference. Khan, Lin (2023), The Bayesian learning rule. Roeder, Wu, Duvenaud (2017), Sticking the landing.

    Examples
    --------
    >>> result = fit(model, "auto", data)
    >>> result = fit(model, AutoNormal(model), data, num_steps=5000)
    >>> result.history.plot(), result.draws(1000), result.diagnose()
    """
    began = time.monotonic()
    if resume not in (True, False, "anyway"):
        raise ValueError(f"resume must be True, False or 'anyway', not {resume!r}")
    import_dynamo()  # torch does, on the way to what it need not compile, but not where it cannot make its folder
    check_counts(log_every=log_every, max_steps=max_steps, num_epochs=num_epochs)
    check_counts(checkpoint_every=checkpoint_every, validate_every=validate_every)
    check_counts(0, max_rollbacks=max_rollbacks)
    check_seed(seed)
    check_kinds(
        loss=loss,
        optim=optim,
        stopping=stopping,
        callbacks=callbacks,
        checkpoint=checkpoint,
        compiled=compiled,
        distributed=distributed,
    )
    check_dataset_size(dataset_size)
    listeners = CallbackList(callbacks)
    if not callable(guide) and not isinstance(guide, str):
        raise TypeError(
            f"guide must be callable or 'auto', got {type(guide).__name__}: it comes second, before the data"
        )
    if isinstance(guide, str):
        given = {
            "loss": loss,
            "optim": optim,
            "num_epochs": num_epochs,
            "batches": batches,
            "dataset_size": dataset_size,
            "validation": validation,
            "validate_every": validate_every,
            "stopping": stopping,
            "checkpoint": checkpoint,
            "checkpoint_every": checkpoint_every,
            "resume": resume or None,
            "distributed": distributed,
            "num_steps": None if num_steps == "auto" else num_steps,
        }
        _refuse(guide, {name: value for name, value in given.items() if value is not None})
        settings = describe_run(model, guide, DecomposedELBO, None, None, seed=seed) if listeners else None
        if accuracy is not None:
            if guide != "auto":
                raise TypeError(f"accuracy goes with guide='auto', which chooses the guide, not with guide='{guide}'")
            return climb(
                model, args, kwargs, accuracy, seed=seed, progress=progress, callbacks=listeners, settings=settings
            )
        return fit_automatically(
            model, guide, args, kwargs, seed=seed, progress=progress, callbacks=listeners, settings=settings
        )
    if accuracy is not None:
        raise TypeError("accuracy goes with guide='auto', which chooses the guide: leave it out, or give no guide")
    if seed is not None:
        pyro.set_rng_seed(seed)
    data, args = _data(args, kwargs, batches)
    batched = isinstance(data, Batches)
    call = data.first()
    held_out = None if validation is None else Validation(validation, args if batched else (), kwargs)
    check_callable(guide, "guide", *call)
    check_callable(model, "model", *call)
    if held_out is not None:
        held_out.check(model)
    loss = DecomposedELBO() if loss is None else loss
    there = set(pyro.get_param_store().keys())
    parameters = _look_at(model, guide, loss, call)
    went_on_from = tuple(name for name in parameters if name in there)
    points = _point_sites(model, guide, call)
    if went_on_from:
        logger.info("fit goes on from parameters that are there: %s", ", ".join(went_on_from))
    _check_counts_of_data(model, guide, data, dataset_size)
    most = _steps(num_steps, num_epochs, max_steps, data)
    if stopping is None and num_steps == "auto" and num_epochs is None:
        stopping = AdaptiveStopping() if validation is None else Patience()
    if optim is None:
        # clipped gradients are biased ones, whose averages end beside the optimum
        optim = Adam({"lr": _FIRST_RATE if isinstance(stopping, AdaptiveStopping) else _RATE})
    weight = getattr(loss, "kl_weight", 1.0)
    if isinstance(loss, Objective):
        check_reaches_one(weight, most, first_step=loss.num_steps)
    described = {}
    if checkpoint is not None:
        programs = of_programs(model, guide, parameters, data)
        described = fingerprint(optim, loss, data, stopping, validation, seed, programs)
    loop = Loop(
        what_steps(model, guide, optim, loss, compiled, distributed, call),
        loss,
        parameters,
        data,
        call,
        max_steps=most,
        rule=stopping,
        not_before=_warm_up(weight),
        validation=held_out,
        validate_every=validate_every,
        callbacks=listeners if processes.is_main() else CallbackList(()),
        log_every=log_every,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        checkpoint_every=checkpoint_every,
        max_rollbacks=max_rollbacks,
        progress=progress and processes.is_main(),
        settings=describe_run(
            model, guide, loss, optim, stopping, num_steps=num_steps, max_steps=most, seed=seed, compiled=bool(compiled)
        ),
        fingerprint=described,
    )
    start_alike({**loop.state.parameters, **loop.state.buffers})
    if loop.checkpoint is not None and processes.from_main(loop.checkpoint.exists()):
        if not resume:
            raise FileExistsError(
                f"{checkpoint} exists: pass resume=True to go on from it, or another path to begin anew"
            )
        loop.resume(anyway=resume == "anyway")
        went_on_from = ()
    loop.seconds += time.monotonic() - began
    loop.run()
    return FitResult(
        model=model,
        guide=guide,
        args=call[0],
        kwargs=call[1],
        loss=loss,
        reason=loop.reason,
        converged=loop.converged,
        num_steps=loop.step,
        seconds=loop.seconds,
        uncompiled=uncompiled(loop.svi),
        parameters=loop.state.parameters,
        buffers=loop.state.buffers,
        went_on_from=went_on_from,
        point_sites=points,
        rollbacks=loop.rollbacks,
        validation=pd.DataFrame(loop.validated, columns=["step", "elbo"]),
        losses=pd.DataFrame(loop.looks, columns=["step", "loss"]),
    )


def _data(args: tuple[Any, ...], kwargs: dict[str, Any], batches: Any) -> tuple[Whole | Batches, tuple[Any, ...]]:
    """Where arguments come from, and the fixed ones."""
    loaders = [i for i, arg in enumerate(args) if isinstance(arg, DataLoader)]
    if batches is None and loaders:
        if len(loaders) > 1 or loaders[0] != 0:
            raise TypeError(
                "one DataLoader, as the first argument after the guide or as batches=, is what fit can train on"
            )
        batches, args = args[0], args[1:]
    if batches is None:
        return Whole(args, kwargs), args
    return Batches(batches, args, kwargs), args


def _refuse(guide: str, given: Mapping[str, Any]) -> None:
    if given:
        raise TypeError(
            f"guide='{guide}' is fitted to all the data by a method of its own, which takes no {', '.join(given)}. Leave "
            "out what it does not take, or give a guide, such as AutoMultivariateNormal(model)."
        )


def _steps(num_steps: int | str, num_epochs: int | None, max_steps: int, data: Whole | Batches) -> int:
    if num_epochs is not None:
        if num_steps != "auto":
            raise ValueError("give num_steps or num_epochs, not both")
        if data.per_epoch is None:
            raise ValueError("num_epochs needs batches with a length: give num_steps instead")
        return num_epochs * data.per_epoch
    if num_steps == "auto":
        num_steps = max_steps
    if isinstance(num_steps, str | bool) or not hasattr(num_steps, "__index__") or operator.index(num_steps) < 1:
        raise ValueError(f"num_steps must be 'auto' or an integer of at least 1, not {num_steps!r}")
    return num_steps


def _look_at(model: Any, guide: Any, loss: Any, call: Call) -> dict[str, torch.Tensor]:
    """One evaluation before anything changes: it makes the parameters and finds what is wrong with programs or data."""
    objective = true_objective(loss)
    values: list[float] = []
    try:
        with random_state_kept(), torch.no_grad(), flat_priors_have_a_start(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Encountered NaN")  # which is an error below
            parameters = parameters_of_programs(lambda: values.append(_evaluated(objective, model, guide, call)))
    finally:
        if isinstance(loss, Objective):
            loss.forget()
    if not values[0] - values[0] == 0:
        raise explain(model, guide, loss, call, values[0], 0)
    if not parameters:
        raise ValueError("model and guide have no parameters: there is nothing to fit")
    return parameters


def _check_counts_of_data(model: Any, guide: Any, data: Whole | Batches, dataset_size: int | None) -> None:
    """See that every row counts once in an epoch: now as far as batches are known, and as they come."""
    if isinstance(data, Whole):
        if dataset_size is not None:
            check_whole(model, guide, data.call, dataset_size)
        return
    check = ScaleCheck(model, guide, data, dataset_size)
    data.check, data.at_epoch_end = check, check.judge
    with random_state_kept():
        for batch in (data.first_batch, *data.examples()):
            data.look(batch)
    data.first_batch = None


def _evaluated(objective: Any, model: Any, guide: Any, call: Call) -> float:
    """The loss; what is wrong with shapes, with values or with the gradient is an error."""
    if isinstance(objective, Objective):
        return objective.check_programs(model, guide, *call[0], **call[1])
    look(objective, model, guide, *call)
    return float(getattr(objective, "loss", objective)(model, guide, *call[0], **call[1]))


def _point_sites(model: Any, guide: Any, call: Call) -> tuple[str, ...]:
    with nothing_changed((model, guide)), torch.no_grad():
        return point_sites(*trace_pair(model, guide, *call), model, guide, *call)


def _warm_up(kl_weight: Any) -> int:
    """Steps until every weight of ``kl_prior`` stays at 1, as far as that is known."""
    weights = kl_weight.values() if isinstance(kl_weight, Mapping) else [kl_weight]
    return max([getattr(weight, "reaches_one_at", None) or 0 for weight in weights], default=0)
