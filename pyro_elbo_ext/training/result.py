"""What a fit gives back."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyro_elbo_ext.diagnosis import Diagnosis
from pyro_elbo_ext.diagnosis.verdict import judge
from pyro_elbo_ext.history import History
from pyro_elbo_ext.inference_data import from_pyro_svi
from pyro_elbo_ext.objectives import DecomposedELBO
from pyro_elbo_ext.programs.arguments import check_count, check_seed
from pyro_elbo_ext.programs.points import point_estimate
from pyro_elbo_ext.programs.randomness import untouched
from pyro_elbo_ext.programs.running import check_callable
from pyro_elbo_ext.training.guide_draws import draw_guide
from pyro_elbo_ext.training.state import checkpoints
from pyro_elbo_ext.training.state.ownership import Ownership, said
from pyro_elbo_ext.training.state.state import TrainingState, parameters_of_programs, random_state_kept

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray


class Rollback(NamedTuple):
    """A return to the last good state.

    Attributes
    ----------
    step
        Steps that had been taken.
    to_step
        The step whose state was put back.
    reason
        What had gone wrong, naming the site where it is known.
    factor
        What the learning rates have been multiplied by since the start.
    """

    step: int
    to_step: int
    reason: str
    factor: float


@dataclass(repr=False)
class FitResult:
    """A fitted guide, and how it was fitted.

    Attributes
    ----------
    model, guide
        The programs. Called by hand they take their parameters from Pyro's store and their modules, as ever: those of the
        fit until something changes them. All that the result gives uses its own.
    parameters, buffers : dict of str to Tensor
        Copies of the unconstrained parameters, and of the modules' buffers, at the end of the fit.
    went_on_from : tuple of str
        Parameters that were in Pyro's store before the fit, which went on from them.
    args, kwargs
        What they were called with; with batches, the first batch.
    point_sites : tuple of str
        Latent sites at which the guide is a point mass, such as AutoDelta's: a point estimate, without a posterior.
    history : History or None
        Every step's terms; None with a loss of Pyro's. ``losses`` is there in any case.
    reason : str
        Why training stopped.
    converged : bool or None
        Whether a stopping rule found that it had converged; None where there was none to ask.
    num_steps : int
        Steps taken, those before a resume included.
    rollbacks : list of Rollback
        Returns to an earlier state after a step that was NaN or diverged.
    validation : DataFrame
        Columns ``step``, ``elbo``: the true ELBO of the held-out data.
    losses : DataFrame
        Columns ``step`` and ``loss``: mean loss of the steps between two looks.
    seconds : float
        Of this process, compilation included.
    uncompiled : str or None
        Why Pyro took the steps; None if they were compiled.
    loss
        The objective.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    loss: Any
    reason: str
    converged: bool | None
    num_steps: int
    seconds: float
    uncompiled: str | None = None
    parameters: dict[str, Tensor] = field(default_factory=dict, repr=False)
    buffers: dict[str, Tensor] = field(default_factory=dict, repr=False)
    went_on_from: tuple[str, ...] = ()
    point_sites: tuple[str, ...] = ()
    rollbacks: list[Rollback] = field(default_factory=list)
    validation: pd.DataFrame = field(default_factory=lambda: pd.DataFrame({"step": [], "elbo": []}), repr=False)
    losses: pd.DataFrame = field(default_factory=lambda: pd.DataFrame({"step": [], "loss": []}), repr=False)

    def __post_init__(self) -> None:
        self._own = Ownership(self.model, self.guide, self.parameters)
        self.parameters, self.buffers = self._own.of(self.parameters), self._own.of(self.buffers)
        self._elbo = self._mean_elbo()  # now: the history goes on if the loss trains something else

    # Parameters

    def own_parameters(self) -> AbstractContextManager[None]:
        """A block in which model and guide have the numbers that they had at the end of the fit.

        Whatever has come since: another fit of parameters of the same names, a cleared store, modules trained further. After
        the block all is as it was before.

        Raises
        ------
        ValueError
            Inside, where a program uses a parameter that this result has no value of; it is named.

        Examples
        --------
        >>> with result.own_parameters():
        ...     sample = psis_khat(model, result.guide, data)
        """
        return self._own.in_force()

    def restore_parameters(self) -> None:
        """Write the result's parameters into model, guide and Pyro's store, in place of what has come since."""
        self._own.restore()

    @property
    def history(self) -> History | None:
        """Every step's terms; that of the loss, which goes on if the loss is used again."""
        return getattr(self.loss, "history", None)

    def draws(self, num_draws: int = 1000, *, seed: int | None = None) -> dict[str, Tensor]:
        """Draws of the guide in the model's constrained space.

        Parameters
        ----------
        num_draws
            How many.
        seed
            Same seed, same draws, and the caller's random numbers are left as they were. None: draw from these.

        Returns
        -------
        dict
            Latent and deterministic site to tensor of shape ``(num_draws, *plates, *event)``.

        Raises
        ------
        ValueError
            For no draws, a plate that subsamples (call with the full data), or sites that vary from draw to draw.

        Warns
        -----
        UserWarning
            Where the guide is a point mass at a site: its draws are all the same.
        """
        check_count("num_draws", num_draws)
        check_seed(seed)
        if self.point_sites:
            warnings.warn(point_estimate(self.point_sites), stacklevel=2)
        with self.own_parameters(), untouched(seed):
            return self._draws(num_draws)

    def _draws(self, count: int) -> dict[str, Tensor]:
        return draw_guide(self.model, self.guide, self.args, self.kwargs, count)

    def to_arviz(self, **options: Any) -> Any:
        """The guide's draws as ArviZ data: :func:`pyro_elbo_ext.from_pyro_svi` with the parameters of this result.

        Parameters
        ----------
        options
            As of that function, such as ``num_samples``; ``history`` is that of the fit.
        """
        options.setdefault("history", self.history if self.history is not None and len(self.history) else None)
        with self.own_parameters():
            return from_pyro_svi(self.model, self.guide, *self.args, **options, **self.kwargs)

    def diagnose(self, **options: Any) -> Diagnosis:
        """How far the guide is from the posterior: :func:`pyro_elbo_ext.diagnose` with this fit's history."""
        options.setdefault("history", self.history if self.history is not None and len(self.history) else None)
        with self.own_parameters():
            return judge(self.model, self.guide, self.args, self.kwargs, known_modes=self._known_modes(), **options)

    def _known_modes(self) -> NDArray[np.float64] | None:
        """Unconstrained points of modes that were found on the way, shape (n, dim)."""
        return None

    # Files

    def save(self, path: str | Path) -> None:
        """Write parameters, history and the account of the run to ``path``, atomically.

        Model, guide and data are not in it. It is a pickle.
        """
        checkpoints.write(Path(path), self._content())

    def _content(self) -> dict[str, Any]:
        return {
            "kind": "fit",
            "type": type(self),  # which knows how to read the rest
            "parameters": {name: p.cpu() for name, p in self.parameters.items()},
            "buffers": {name: b.cpu() for name, b in self.buffers.items()},
            "history": self.history,
            "account": {
                name: getattr(self, name)
                for name in (
                    "reason",
                    "converged",
                    "num_steps",
                    "seconds",
                    "uncompiled",
                    "point_sites",
                    "rollbacks",
                    "validation",
                    "losses",
                )
            },
        }

    @classmethod
    def load(
        cls, path: str | Path, model: Callable[..., Any], guide: Callable[..., Any] | str, *args: Any, **kwargs: Any
    ) -> FitResult:
        """Read what :meth:`save` wrote, and write its parameters into model and guide. Load your own files only.

        Parameters
        ----------
        path
            The file.
        model, guide, args, kwargs
            As at the fit: a guide of the same structure, or "auto" for one that `fit` made; data of the same shapes.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If it is not one of `save`'s, or has other parameters than the programs: both are named.
        """
        content = checkpoints.read(Path(path))
        if content.get("kind") != "fit":
            raise ValueError(
                f"{path} is a checkpoint, not a saved result: pass it to fit as checkpoint= with resume=True"
            )
        checkpoints.check_parts(content, ("type", "parameters"), Path(path))
        try:
            if callable(model):
                check_callable(model, "model", args, kwargs)
            if callable(guide):
                check_callable(guide, "guide", args, kwargs)
        except TypeError as error:
            raise TypeError(
                f"{error}. Give the data that the fit had: FitResult.load(path, model, guide, *data)"
            ) from None
        of: type[FitResult] = content["type"]
        return of._read(content, str(path), model, guide, args, kwargs)

    @classmethod
    def _read(
        cls,
        content: dict[str, Any],
        path: str,
        model: Callable[..., Any],
        guide: Callable[..., Any] | str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> FitResult:
        """The result whose file had this content."""
        if isinstance(guide, str):
            raise ValueError(f"{path} has a guide that was given: pass it, not guide='auto'")
        loss = DecomposedELBO(history=content["history"] if content["history"] is not None else False)
        with random_state_kept(), torch.no_grad():
            parameters = parameters_of_programs(lambda: loss.loss(model, guide, *args, **kwargs))
        checkpoints.check_same_parameters(parameters, content["parameters"], path)
        buffers = TrainingState.buffers_of(model, guide)
        with torch.no_grad():
            for live, saved in ((parameters, content["parameters"]), (buffers, content["buffers"])):
                for name, tensor in live.items():
                    tensor.copy_(saved[name])
        loss.forget()
        return cls(
            model=model,
            guide=guide,
            args=args,
            kwargs=kwargs,
            loss=loss,
            parameters=parameters,
            buffers=buffers,
            **content["account"],
        )

    # Showing

    def summary(self, window: int | None = None) -> pd.DataFrame:
        """Mean of every site's part in the ELBO over the last steps: :meth:`pyro_elbo_ext.History.summary`.

        These are no posterior means: for those see `draws` and `to_arviz`.

        Raises
        ------
        ValueError
            If there is no history, as with a loss of Pyro's.
        """
        return self._history().summary(window)

    def plot(self, axes: Any = None) -> NDArray[np.object_]:
        """The history, :meth:`pyro_elbo_ext.History.plot`, with the validation ELBO and rollbacks in the first panel.

        Raises
        ------
        ValueError
            If there is no history, as with a loss of Pyro's.
        """
        panels = self._history().plot(axes)
        first: Axes = panels[0]
        if len(self.validation):
            first.plot(self.validation["step"], self.validation["elbo"], color="#D55E00", marker=".", label="held out")
            first.legend()
        for rollback in self.rollbacks:
            first.axvline(rollback.step, color="#8F8F8F", linestyle=":", linewidth=1)
        return panels

    def _history(self) -> History:
        if self.history is None:
            raise ValueError(
                f"{type(self.loss).__name__} keeps no history: use loss=DecomposedELBO() or leave loss out; losses has the "
                "mean losses"
            )
        return self.history

    @property
    def elbo(self) -> float:
        """Mean true ELBO of the last quarter of the recorded steps; minus the mean loss with a loss of Pyro's.

        Of a guide that `fit` has made: from draws that had no part in the fit.
        """
        return self._elbo

    def _mean_elbo(self) -> float:
        if self.history is not None and len(self.history):
            return self.history.recent(max(1, min(len(self.history) // 4, 1000)))["elbo"]
        return -float(self.losses["loss"].iloc[-1]) if len(self.losses) else math.nan

    def lines(self) -> list[str]:
        """The account in a few lines."""
        state = {True: "converged", False: "not converged", None: "no stopping rule"}[self.converged]
        how = "compiled steps" if self.uncompiled is None else f"steps by Pyro ({self.uncompiled})"
        found = [
            f"{self.num_steps:,} steps in {self.seconds:.1f} s, {how}",
            f"stopped: {self.reason}" + ("" if self.reason.startswith("converged") else f" ({state})"),
            f"ELBO {self.elbo:.6g} nats"
            if not self.point_sites
            else f"objective {self.elbo:.6g} nats: no ELBO and no bound on log p(x), since the guide is a point mass at "
            f"{said(self.point_sites)}; draws have no spread there",
        ]
        if len(self.validation):
            found.append(
                f"held-out ELBO {self.validation['elbo'].iloc[-1]:.6g}, best {self.validation['elbo'].max():.6g}"
            )
        if self.rollbacks:
            last = self.rollbacks[-1]
            found.append(
                f"{len(self.rollbacks)} returns to an earlier state, learning rates now {last.factor:g} of the given; the "
                f"last at step {last.step}: {last.reason}"
            )
        return found + self._about_parameters()

    def _about_parameters(self) -> list[str]:
        """Where the parameters came from, if not from the guide, and whether they are still the live ones."""
        found = []
        if self.went_on_from:
            found.append(
                f"went on from parameters that were there before: {said(self.went_on_from)}; pyro.clear_param_store() "
                "before a fit begins anew"
            )
        changed = self._own.changed()
        if changed:
            found.append(
                f"model and guide have other numbers now than at the end of this fit: {said(changed)}. What this result "
                "gives uses its own; restore_parameters() puts them back"
            )
        return found

    def __repr__(self) -> str:
        return "\n".join([type(self).__name__, *(f"  {line}" for line in self.lines())])

    def _repr_html_(self) -> str:
        import html

        items = "".join(f"<li>{html.escape(line)}</li>" for line in self.lines())
        table = ""
        if self.history is not None and len(self.history):
            table = self.history._repr_html_()
        return f"<p><b>{type(self).__name__}</b></p><ul>{items}</ul>{table}"
