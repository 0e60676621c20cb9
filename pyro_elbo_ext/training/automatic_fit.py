"""`fit` with ``guide="auto"``: a guide made from the model, fitted on its log density."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_elbo_ext.automatic.approximate import Approximation, approximate
from pyro_elbo_ext.automatic.evaluations import Evaluations
from pyro_elbo_ext.automatic.flow import Flow, FlowGuide
from pyro_elbo_ext.automatic.guide import DiagonalGuide, GaussianGuide, UnconstrainedGuide
from pyro_elbo_ext.automatic.search import entries
from pyro_elbo_ext.density import LogDensity
from pyro_elbo_ext.density.completing import complete
from pyro_elbo_ext.diagnosis import Diagnosis
from pyro_elbo_ext.evidence.importance import about_khat
from pyro_elbo_ext.history import History
from pyro_elbo_ext.history.pictures import COLOURS, OTHER, TOTAL, pyplot
from pyro_elbo_ext.inference_data.export import dataset_of, groups_of, to_arviz
from pyro_elbo_ext.inference_data.names import by_site
from pyro_elbo_ext.objectives import DecomposedELBO
from pyro_elbo_ext.programs.arguments import check_count, check_seed
from pyro_elbo_ext.programs.randomness import isolated, seeded, untouched
from pyro_elbo_ext.programs.running import check_callable
from pyro_elbo_ext.training.callbacks import CallbackList
from pyro_elbo_ext.training.progress import Progress
from pyro_elbo_ext.training.result import FitResult

Family = Literal["auto", "gaussian", "diagonal", "flow"]
FAMILIES = ("auto", "gaussian", "diagonal", "flow")
_PARTICLES, _RECORDS = 32, 50  # of the history


class Rung(NamedTuple):
    """What one rung of ``fit(..., accuracy=...)`` reached, and what it cost.

    ``distance`` is the largest error of a mean, in sds, or of a log sd, as far as it is known, else NaN; ``says`` is why it
    is enough, or why it is not.
    """

    rung: str
    enough: bool
    distance: float
    elbo: float
    gradients: int
    seconds: float
    says: str


@dataclass(repr=False)
class AutomaticFit(FitResult):
    """A guide that `fit` has made.

    Attributes
    ----------
    density : LogDensity
        What it was fitted to.
    approximation : Approximation
        Family, gradient evaluations, k-hat, what to try next.
    rungs : list of Rung
        With ``accuracy``: what was tried, the last one last. Else empty.
    chains
        ArviZ data of `run_nuts`, where that was the last rung; `draws` are of these then. Guide, terms and ELBO are those of
        the rung before.
    """

    density: LogDensity = field(default=None, repr=False)  # type: ignore[assignment]  # always given
    approximation: Approximation = field(default=None, repr=False)  # type: ignore[assignment]
    rungs: list[Rung] = field(default_factory=list, repr=False)
    chains: Any = field(default=None, repr=False)

    @property
    def accurate(self) -> bool | None:
        """Whether `draws` are as near the posterior as ``accuracy`` asked for, as far as is known; None if it did not."""
        return self.rungs[-1].enough if self.rungs else None

    @property
    def path(self) -> pd.DataFrame:
        """One row per step: ELBO of its batch, gradients so far, draws, step size, what a whole step would gain."""
        return pd.DataFrame(self.approximation.path)

    @property
    def modes(self) -> pd.DataFrame:
        """One row per mode that was found, the heaviest first.

        Columns ``weight`` and ``weight_se``, the posterior probability and its standard error, ``khat`` of the importance
        weights behind it (where it is not good, the weight is a lower bound; NaN where there is one mode alone), ``share``
        of the guide's draws about it, ``climbs`` that ended there, ``copy_of`` (row of the mode that it is a symmetry's copy
        of, or -1), and the value of each entry of each site at the maximum.
        """
        found = self.approximation.modes
        if isinstance(found, str) or not found.modes:
            return pd.DataFrame(columns=["weight", "weight_se", "khat", "share", "climbs", "copy_of"])
        points = np.stack([mode.gaussian.loc for mode in found.modes])
        sites = entries(Evaluations(self.density, 1 << 62), points)
        rows = []
        for k, mode in enumerate(found.modes):
            row: dict[str, float] = {
                "weight": mode.weight,
                "weight_se": mode.weight_se,
                "khat": mode.khat,
                "share": mode.share,
                "climbs": mode.climbs,
                "copy_of": -1 if mode.copy_of is None else mode.copy_of,
            }
            rows.append(row | {f"{name} (site)" if name in row else name: sites[name][k] for name in sites})
        return pd.DataFrame(rows)

    def _known_modes(self) -> NDArray[np.float64] | None:
        found = self.approximation.modes
        if isinstance(found, str) or not found.modes:
            return None
        return np.stack([mode.gaussian.loc for mode in found.modes])

    def _mean_elbo(self) -> float:
        return self.approximation.elbo

    @property
    def history(self) -> History:
        """The terms at the fitted guide, evaluated when first asked for."""
        if self.loss.history.num_recorded == 0:
            self._record()
        return cast(History, self.loss.history)

    def _record(self) -> None:
        with self.own_parameters(), seeded(0), torch.no_grad():
            for _ in range(_RECORDS):
                evaluation = self.loss._evaluate(self.model, self.guide, self.args, self.kwargs, with_gradient=False)
                self.loss._record(evaluation)
        self.loss.forget()

    def refine(self, *, seed: int | None = None, progress: bool = True, **options: Any) -> AutomaticFit:
        """The next guide up: a short normalizing flow that starts from this Gaussian.

        Returns
        -------
        AutomaticFit
            Printed, it says what the flow has bought: ELBO and k-hat beside the Gaussian's.

        Raises
        ------
        ValueError
            If this is a flow already.
        """
        if self.approximation.family == "flow":
            raise ValueError("this guide is a flow already; there is no next one. Use run_nuts, or write a guide.")
        with self.own_parameters():
            return fit_automatically(
                self.density, "flow", (), {}, seed=seed, progress=progress, start=self.approximation, **options
            )

    def _draws(self, count: int) -> dict[str, Tensor]:
        if self.chains is None:
            return complete(self.density, self._unconstrained(count))
        sites = by_site(dataset_of(self.chains))
        values = {name: v.transpose("chain", "draw", ...).values for name, v in sites.items()}
        chains, length = next(iter(values.values())).shape[:2]
        chosen = torch.randint(chains * length, (count,)).numpy()
        return {name: torch.from_numpy(v.reshape(-1, *v.shape[2:])[chosen]) for name, v in values.items()}

    def to_arviz(self, **options: Any) -> Any:
        """The draws as ArviZ data: of the guide, see `from_pyro_svi` for the options, or `chains` where there are any."""
        if self.chains is None:
            return super().to_arviz(**options)
        if options:
            raise TypeError(
                f"the draws are of NUTS, which has made them already: to_arviz takes no {', '.join(options)}"
            )
        return self.chains

    def diagnose(self, **options: Any) -> Diagnosis:
        """How far the guide is from the posterior, by `chains` where there are any; see `FitResult.diagnose`."""
        if self.chains is not None:
            options.setdefault("mcmc", self.chains)
        return super().diagnose(**options)

    def _unconstrained(self, count: int) -> Tensor:
        return cast(Tensor, self.approximation.guide.get_posterior().sample((count,)))

    def unconstrained_draws(self, num_draws: int = 1000, *, seed: int | None = None) -> NDArray[np.float64]:
        """Draws of the guide in the coordinates of `density`, shape (num_draws, dim); see `draws`."""
        check_count("num_draws", num_draws)
        check_seed(seed)
        with self.own_parameters(), untouched(seed), torch.no_grad():
            return self._unconstrained(num_draws).double().cpu().numpy()

    def plot(self, axes: Any = None) -> NDArray[np.object_]:
        """ELBO and predicted gain by gradient evaluations, and the terms at the fitted guide.

        Parameters
        ----------
        axes
            Two matplotlib axes; by default a new figure.

        Raises
        ------
        ImportError
            Without matplotlib.
        """
        if axes is None:
            _, axes = pyplot().subplots(1, 2, figsize=(9, 3.2), layout="constrained")
        left, right = np.ravel(axes)
        path = self.path
        left.plot(path["gradients"], path["elbo"], marker=".", color=COLOURS[0])
        left.set(xlabel="gradient evaluations", ylabel="nats", title="ELBO of each step's draws")
        worst = path["elbo"].iloc[len(path) // 3]
        span = self.elbo - worst
        if span > 0:
            left.set_ylim(worst - 0.5 * span, self.elbo + 0.5 * span)
        table = self.summary()
        right.barh(table.index, table["mean"], xerr=table["se"], color=[OTHER] * (len(table) - 1) + [TOTAL])
        right.invert_yaxis()
        right.set(xlabel="nats", title="reconstruction - KL(q || prior), by site")
        return np.array([left, right], object)

    def _content(self) -> dict[str, Any]:
        fields = {name: value for name, value in vars(self.approximation).items() if name != "guide"}
        chains = (
            None if self.chains is None else {group: dataset_of(self.chains, group) for group in groups_of(self.chains)}
        )
        return {**super()._content(), "automatic": fields, "history": None, "rungs": self.rungs, "chains": chains}

    @classmethod
    def _read(
        cls,
        content: dict[str, Any],
        path: str,
        model: Callable[..., Any] | LogDensity,
        guide: Callable[..., Any] | str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> FitResult:
        if not isinstance(guide, str):
            raise ValueError(f"{path} has a guide that was made by fit: pass guide='auto'")
        density = _density(model, args, kwargs)
        saved, dim = {**content["parameters"], **content["buffers"]}, density.dim
        if saved["loc"].shape != (dim,):
            raise ValueError(
                f"{path} is of another model: its guide has {len(saved['loc'])} coordinates, the model's unconstrained "
                f"space {dim}"
            )
        loc, fields = saved["loc"].double(), content["automatic"]
        made: UnconstrainedGuide
        eye = torch.eye(dim, dtype=loc.dtype)
        if fields["family"] == "diagonal":
            made = DiagonalGuide(density, loc, torch.ones_like(loc))
        elif fields["family"] == "flow":
            made = FlowGuide(density, loc, eye, Flow(dim))
        else:
            made = GaussianGuide(density, loc, eye)
        made.load_state_dict(saved)
        found = Approximation(guide=made, **fields)
        result = _result(density, found, content["account"]["seconds"])
        result.rungs = content.get("rungs", [])
        if content.get("chains") is not None:
            result.chains = to_arviz(content["chains"])
        return result

    def lines(self) -> list[str]:
        """The account in a few lines."""
        a = self.approximation
        found = [
            f"{a.family} guide in {self.seconds:.2f} s, {a.gradients:,} gradient evaluations",
            f"stopped: {self.reason}",
            f"ELBO {a.elbo:.6g} +- {a.elbo_se:.2g} nats, {about_khat(a.khat, a.ess, a.num_draws)}",
            *a.notes,
        ]
        if self.rungs:
            found += [
                f"{rung.rung}, {rung.seconds:.2f} s: {'enough' if rung.enough else 'not enough'}. {rung.says}"
                for rung in self.rungs
            ]
        elif a.next_guide:
            found.append(a.next_guide)
        if self.chains is not None:
            found.append("draws are of NUTS; guide, terms and ELBO are those of the guide")
        return found + self._about_parameters()


def fit_automatically(
    model: Callable[..., Any] | LogDensity,
    family: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    seed: int | None = None,
    progress: bool = True,
    callbacks: CallbackList | None = None,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> AutomaticFit:
    """Make a guide for a model and fit it; see `fit`."""
    began = time.monotonic()
    if family not in FAMILIES:
        raise ValueError(f"guide must be a Pyro guide or one of {', '.join(map(repr, FAMILIES))}, not {family!r}")
    check_seed(seed)
    density = _density(model, args, kwargs)
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    callbacks = CallbackList(()) if callbacks is None else callbacks
    bar = Progress(None, 0, progress)
    taken = itertools.count(1)

    def step(entry: dict[str, float]) -> None:
        bar.advance(1)
        if bar.is_due:
            bar.show(entry, f"{int(entry['gradients']):,} gradients")
        callbacks.log(next(taken), {name: value for name, value in entry.items() if name != "step"})

    try:
        callbacks.start(dict(settings or {}))
        found = approximate(density, family=cast(Any, family), seed=seed, progress=step, **options)
        bar.conclude({"elbo": found.elbo}, f"by draws of its own, {found.gradients:,} gradients")
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        callbacks.finish({"status": status, "reason": f"{type(error).__name__}: {error}"}, error)
        raise
    finally:
        bar.close()
    seconds = time.monotonic() - began
    callbacks.finish(
        {
            "status": "finished",
            "reason": found.reason,
            "converged": found.converged,
            "steps": len(found.path),
            "seconds": seconds,
            "elbo": found.elbo,
        }
    )
    return _result(density, found, seconds)


def _density(model: Callable[..., Any] | LogDensity, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LogDensity:
    """The model's log density, not compiled unless it is already."""
    if isinstance(model, LogDensity):
        if args or kwargs:
            raise TypeError("a LogDensity has its model's arguments already: pass none")
        return model
    check_callable(model, "model", args, kwargs)
    with isolated(0):
        return LogDensity(model, args, kwargs, 0)


def _result(density: LogDensity, found: Approximation, seconds: float) -> AutomaticFit:
    guide, program = found.guide, density.program
    return AutomaticFit(
        model=program.model,
        guide=guide,
        args=program.args,
        kwargs=program.kwargs,
        loss=DecomposedELBO(_PARTICLES, vectorize_particles="vmap"),
        reason=found.reason,
        converged=found.converged,
        num_steps=len(found.path),
        seconds=seconds,
        uncompiled=None if density.traced else "the model is not a graph",
        parameters=dict(guide.named_parameters()),
        buffers=dict(guide.named_buffers()),
        density=density,
        approximation=found,
    )
