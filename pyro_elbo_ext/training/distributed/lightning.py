"""Training by Lightning's ``Trainer``, in one process or several.  The only importer of Lightning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.infer import ELBO
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.utils.data import DataLoader

from pyro_elbo_ext.history.record import VALUES
from pyro_elbo_ext.objectives import DecomposedELBO
from pyro_elbo_ext.objectives.objective import Objective
from pyro_elbo_ext.programs.arguments import check_seed
from pyro_elbo_ext.training import processes
from pyro_elbo_ext.training.data.batches import Batches
from pyro_elbo_ext.training.data.scaling import ScaleCheck
from pyro_elbo_ext.training.distributed.joint_loss import JointLoss, Merged, Run
from pyro_elbo_ext.training.distributed.random_streams import RandomStreams
from pyro_elbo_ext.training.distributed.replica import is_parameter, name_of
from pyro_elbo_ext.training.state.state import random_state_kept

try:
    from lightning.pytorch import LightningModule
except ImportError as error:
    raise ImportError("LightningELBO needs Lightning: pip install 'pyro_elbo_ext[lightning]'") from error

_LOG_P, _KL_PRIOR = VALUES.index("log_p"), VALUES.index("kl_prior")


class LightningELBO(LightningModule):
    r"""A model and a guide as a ``LightningModule``: ``Trainer(...).fit(LightningELBO(model, guide), loader)``.

    A batch that is a tensor becomes the first argument of model and guide, one that is a tuple or list the first arguments,
    one that is a mapping keyword arguments; ``kwargs`` follow. The plate of the batch must have the size of the whole data
    set: ``pyro.plate(name, N, subsample_size=len(batch))``.

    In several processes (``strategy="ddp"``) Lightning gives each its part of the data and averages the gradients; losses
    and sites are those of all batches together, as with :class:`~pyro_elbo_ext.DistributedSVI`, and an
    error in one process is raised in all. The parameters are those of modules, so that Lightning's checkpoints hold them;
    with them the place in the random numbers and in the schedule of ``kl_weight``, so that a resumed run draws what the
    uninterrupted one would have drawn. The history begins anew.

    Logged in each step, in nats: ``elbo``, the true one with ``kl_prior`` at weight 1, ``objective``, what is maximized,
    ``reconstruction``, ``kl_prior``, which is KL(q || prior), and by site ``reconstruction/SITE`` and ``kl_prior/SITE``. In
    validation, once an epoch, the same but ``objective`` as ``val_elbo`` and so on, the mean over batches by their sizes.
    With one of Pyro's losses only ``elbo`` and ``val_elbo``.

    Parameters
    ----------
    model, guide
        Pyro programs.
    loss : pyro.infer.ELBO, optional
        As of ``DistributedSVI``; ``DecomposedELBO()`` by default.
    optim : callable or PyroOptim, optional
        Called with the list of parameters, returns what ``configure_optimizers`` may return: an optimizer, or a dict with
        ``"optimizer"`` and ``"lr_scheduler"``. An optimizer of ``pyro.optim`` is taken with its arguments. By default
        ``torch.optim.Adam`` with rate 0.01.
    example : optional
        A batch to set up the guide with, at once; autoguides make their parameters at their first call. By default the first
        batch of the training data, when the trainer starts.
    kwargs : mapping, optional
        Further keyword arguments of model and guide, the same for all batches, such as the size of the data set.
    shared_draws : bool
        As of ``DistributedSVI``.
    seed : int, optional
        Of all random numbers; by default drawn by torch, so that ``seed_everything`` fixes it. Draws are made per step and
        process, and leave the program's own generators as they were.

    Attributes
    ----------
    objective : pyro.infer.ELBO
        The loss, with its history if it is an objective of this package.

    Raises
    ------
    ImportError
        When this module is imported without Lightning.
    TypeError
        At construction, for a loss without ``differentiable_loss`` or an ``optim`` that cannot be used.
    ValueError
        If parameters belong to no module (plain ``pyro.param``), which Lightning could neither train nor save, or if there
        are none; and in training as ``DistributedSVI`` does, naming process and site.

    Examples
    --------
    >>> trainer = Trainer(max_epochs=10, accelerator="cpu", devices=2, strategy="ddp")
    >>> trainer.fit(LightningELBO(vae.model, vae.guide, kwargs={"size": len(data)}), loader, validation_loader)
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        loss: ELBO | None = None,
        optim: Callable[[list[nn.Parameter]], Any] | PyroOptim | None = None,
        *,
        example: Any = None,
        kwargs: Mapping[str, Any] | None = None,
        shared_draws: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self._optim = _optimizer_of(optim)
        self._kwargs = dict(kwargs or {})
        check_seed(seed)
        seed = int(torch.randint(1 << 31, ())) if seed is None else seed
        loss = DecomposedELBO() if loss is None else loss
        self._joint = _OfModules(model, guide, loss, RandomStreams(seed, 0, shared_draws))
        self.elbo = self._joint.replica  # registered: its parameters are those that Lightning trains and saves
        self.objective = loss
        if example is not None:
            self._set_up(example)

    # Setting up

    def configure_model(self) -> None:
        """Lightning's hook before it distributes the module: set up the guide with the first batch, if without example."""
        if self._joint.is_fixed:
            return
        trainer = self.trainer
        if not trainer.training:
            raise ValueError("the guide has not been set up yet: give LightningELBO a batch by example=")
        with torch.random.fork_rng(devices=[]):  # the order of the data stays what it was
            trainer.fit_loop.setup_data()
            loader: Any = trainer.train_dataloader
            batch = next(iter(loader))
        self._set_up(batch)

    def _set_up(self, batch: Any) -> None:
        """Run once, so that all parameters are there, and find out who holds them."""
        args, kwargs = self._arguments(batch)
        joint = self._joint
        with joint.streams.at(0):
            run = joint.run(args, kwargs, with_gradient=True)
        if run.error is not None:
            raise run.error
        if not any(p.requires_grad for p in self.elbo.parameters()):
            raise ValueError("model and guide have no parameters: there is nothing to train")
        joint.replica.evaluation = None
        joint.is_fixed = True
        if isinstance(self.objective, Objective):
            self.objective.forget()

    def on_fit_start(self) -> None:
        """Lightning's hook: all processes draw from the seed of process 0."""
        self._joint.streams.seed = self.trainer.strategy.broadcast(self._joint.streams.seed)

    def on_train_start(self) -> None:
        """Lightning's hook: every row of the loader's batches must count once in an epoch, as in ``fit``.

        In several processes, whose shares of an epoch only the sampler knows, the plates' sizes alone are compared.
        """
        loader = self.trainer.train_dataloader
        if not isinstance(loader, DataLoader) or processes.world_size() > 1:
            return
        data = Batches(loader, (), self._kwargs)
        data.check = ScaleCheck(self._joint.model, self._joint.guide, data, None)
        data.first()
        with random_state_kept(), torch.enable_grad():
            for batch in (data.first_batch, *data.examples()):
                data.look(self._on_device(batch))

    def _on_device(self, batch: Any) -> Any:
        return self.transfer_batch_to_device(batch, self.device, 0)

    def configure_optimizers(self) -> Any:
        """Lightning's hook."""
        return self._optim([p for p in self.parameters() if p.requires_grad])

    # Steps

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Lightning's hook: a scalar with the gradient of the loss."""
        run, merged = self._evaluate(batch, with_gradient=True)
        assert run.surrogate is not None
        self._joint.record(run, merged)
        self._joint.steps += 1
        metrics = self._metrics(run, merged)
        size = _size(run, batch)
        self.log("elbo", metrics.pop("elbo"), prog_bar=True, on_step=True, on_epoch=False, batch_size=size)
        self.log_dict(metrics, on_step=True, on_epoch=False, batch_size=size)
        # what Lightning shows and callbacks see is the loss, whatever the value of the surrogate
        surrogate = merged.weight * run.surrogate
        return merged.loss + (surrogate - surrogate.detach())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Lightning's hook: the true ELBO of held-out data, without a step."""
        self._held_out(batch, "val_")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Lightning's hook, as :meth:`validation_step`, with the names ``test_elbo`` and so on."""
        self._held_out(batch, "test_")

    def _held_out(self, batch: Any, prefix: str) -> None:
        with torch.inference_mode(False):  # or what is made here could not be used in training
            run, merged = self._evaluate(batch, with_gradient=False)
        metrics = self._metrics(run, merged)
        metrics.pop("objective", None)
        named = {prefix + name: value for name, value in metrics.items()}
        # the values are those of all processes already: sync_dist for the sizes that they are weighted with
        self.log_dict(named, on_step=False, on_epoch=True, sync_dist=True, batch_size=_size(run, batch))

    def _evaluate(self, batch: Any, *, with_gradient: bool) -> tuple[Run, Merged]:
        joint = self._joint
        joint.streams.rank = processes.rank() if processes.is_distributed() else 0
        args, kwargs = self._arguments(batch)
        return joint.evaluate(args, kwargs, with_gradient=with_gradient)

    def _arguments(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if isinstance(batch, Mapping):
            return (), {**{str(name): value for name, value in batch.items()}, **self._kwargs}
        return tuple(batch) if isinstance(batch, list | tuple) else (batch,), self._kwargs

    def _metrics(self, run: Run, merged: Merged) -> dict[str, float]:
        if run.evaluation is None:
            return {"elbo": -merged.loss}
        observed = {
            of.site: float(row[_LOG_P])
            for of, row in zip(run.evaluation.sites, merged.values, strict=True)
            if of.kind == "observed"
        }
        latent = {
            of.site: float(row[_KL_PRIOR])
            for of, row in zip(run.evaluation.sites, merged.values, strict=True)
            if of.kind != "observed"
        }
        reconstruction, kl_prior = sum(observed.values()), sum(latent.values())
        return {
            "elbo": reconstruction - kl_prior,
            "objective": merged.objective,
            "reconstruction": reconstruction,
            "kl_prior": kl_prior,
            **{f"reconstruction/{site}": value for site, value in observed.items()},
            **{f"kl_prior/{site}": value for site, value in latent.items()},
        }

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning's hook: the place in the random numbers and schedules."""
        steps = self.objective.num_steps if isinstance(self.objective, Objective) else 0
        checkpoint["pyro_elbo_ext"] = {**self._joint.state_dict(), "objective_steps": steps}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning's hook."""
        state = checkpoint["pyro_elbo_ext"]
        self._joint.load_state_dict(state)
        if isinstance(self.objective, Objective):
            self.objective.num_steps = state["objective_steps"]
            if self.objective.history is not None:
                self.objective.history.clear()


class _OfModules(JointLoss):
    """A joint loss whose parameters are all those of modules.

    Attributes
    ----------
    is_fixed : bool
        Whether optimizer and processes know the parameters already, so that none may come later.
    """

    is_fixed = False

    def _check_new(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves = [leaf for leaf in run.leaves if is_parameter(leaf)]
        strays = self.replica.missing(leaves) if self.is_fixed else self.replica.adopt(leaves)
        if not strays:
            return
        names = ", ".join(sorted(repr(name_of(p, None) or f"of shape {tuple(p.shape)}") for p in strays))
        if self.is_fixed:
            raise ValueError(
                f"the parameters {names} have appeared after the set-up, so that no optimizer has them. Give LightningELBO "
                "an example batch that reaches all parameters; and if the param store has them from an earlier module of "
                "the same name, call pyro.clear_param_store() before the module is made."
            )
        raise ValueError(
            f"no module of model or guide holds the parameters {names}, so that Lightning could neither train nor save "
            "them. Make them PyroParam attributes of a PyroModule, or train by DistributedSVI."
        )


def _optimizer_of(optim: Any) -> Callable[[list[nn.Parameter]], Any]:
    """What makes the optimizer from the parameters."""
    if optim is None:
        return lambda parameters: Adam(parameters, lr=0.01)
    if isinstance(optim, PyroOptim):
        make, options = optim.pt_optim_constructor, optim.pt_optim_args
        if callable(options) or optim.pt_clip_args or hasattr(optim, "pt_scheduler_constructor"):
            raise TypeError(
                "an optimizer of pyro.optim with arguments by parameter, with clipping or with a scheduler has no "
                "equivalent in Lightning: pass optim=lambda parameters: {'optimizer': ..., 'lr_scheduler': ...}, and "
                "Trainer(gradient_clip_val=...)"
            )
        return lambda parameters: make(parameters, **options)
    if isinstance(optim, Optimizer) or not callable(optim):
        raise TypeError(
            f"optim must be a function from parameters to an optimizer, such as lambda parameters: Adam(parameters), not "
            f"{type(optim).__name__}: the guide may have no parameters yet"
        )
    return optim


def _size(run: Run, batch: Any) -> int:
    """Size of this process's batch: what weighs it among the batches of an epoch."""
    split = [run.survey.plates[name][0] for name in sorted(run.survey.split)]
    if split:
        return split[0]
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else (batch,)
    return next((len(value) for value in values if isinstance(value, Tensor) and value.dim()), 1)
