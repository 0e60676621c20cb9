"""The guide as an importance sampler of the posterior: weights, k-hat, effective sample size, resampled draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_elbo_ext.evidence.scores import Array, Scores
from pyro_elbo_ext.evidence.scoring import Scorer
from pyro_elbo_ext.inference_data.arviz_statistics import pareto_smoothed
from pyro_elbo_ext.inference_data.draws import to_numpy
from pyro_elbo_ext.inference_data.export import attributes, to_arviz
from pyro_elbo_ext.inference_data.labels import Labels
from pyro_elbo_ext.programs.arguments import check_count, check_seed
from pyro_elbo_ext.programs.given import imputation
from pyro_elbo_ext.programs.interrupts import handlers_are_heard
from pyro_elbo_ext.programs.nodes import Node
from pyro_elbo_ext.programs.randomness import untouched

BATCH_SIZE = 1000  # draws run at once
EVEN = 0.95  # effective share of draws from which on weights are so even that the shape of their tail says nothing


@dataclass(frozen=True, eq=False)
class ImportanceSample:
    """Draws ``z_s`` of a guide and their importance weights ``w_s = p(x, z_s) / q(z_s)`` for the posterior.

    Attributes
    ----------
    draws : dict of str to Tensor
        Latent site of the model to its draws, in its constrained space, shape ``(S, *plates, *event)``.
    deterministics : dict of str to Tensor
        ``pyro.deterministic`` sites of the model at these draws, same shape.
    log_p, log_q : ndarray
        ``log p(x, z_s)`` and ``log q(z_s)``, in nats, shape ``(S,)``, scaled and masked as in the ELBO.
    log_prior : ndarray
        The latent sites' share of ``log_p``, ``log p(z_s)``, shape ``(S,)``.
    local : dict of str to ndarray
        Plate to the log weights of each of its indices, shape ``(S, size)``, where the model factorizes: all latent
        sites of model and guide are in the plate, so that the weight is a constant times the product over the indices.
    not_local : dict of str to str
        The other plates, and why.
    looped : str or None
        Why model and guide were run draw by draw; None if they were run on all draws at once.
    noise : float
        Bound on the rounding errors of a log weight, in nats, from the dtype of the densities.
    """

    draws: dict[str, Tensor]
    log_p: Array
    log_q: Array
    log_prior: Array
    deterministics: dict[str, Tensor] = field(default_factory=dict)
    local: dict[str, Array] = field(default_factory=dict)
    not_local: dict[str, str] = field(default_factory=dict)
    looped: str | None = None
    noise: float = 0.0
    nodes: Mapping[str, Node] = field(default_factory=dict, repr=False)

    @property
    def num_draws(self) -> int:
        """Number of draws, S."""
        return len(self.log_p)

    @cached_property
    def log_weights(self) -> Array:
        """``log p(x, z_s) - log q(z_s)``, in nats, shape ``(S,)``; -inf where the draw is outside the model's support."""
        return self.log_p - self.log_q

    @property
    def num_zero(self) -> int:
        """Draws outside the model's support, whose weight is zero."""
        return int((self.log_weights == -np.inf).sum())

    @cached_property
    def _smoothed(self) -> tuple[Array, float]:
        return pareto_smoothed(self.log_weights, self.noise)

    @property
    def khat(self) -> float:
        """Shape of the weights' tail, by ArviZ: the weights have a variance below 1/2, a mean below 1.

        -inf where the largest weights are equal up to rounding; inf where there are too few positive weights to tell.
        """
        return self._smoothed[1]

    @property
    def threshold(self) -> float:
        """What k-hat must stay below for S draws, ``min(1 - 1 / log10(S), 0.7)`` (Vehtari et al. 2024)."""
        return khat_threshold(self.num_draws)

    @property
    def log_smoothed(self) -> Array:
        """Pareto-smoothed log weights, normalized so that the weights sum to one, shape ``(S,)``."""
        return self._smoothed[0]

    @property
    def ess(self) -> float:
        """Kish's effective sample size of the smoothed weights, ``1 / sum_s w_s^2``, from 1 to S."""
        return _ess(self.log_smoothed)

    @property
    def even(self) -> bool:
        """Whether the weights are so nearly equal that k-hat, the shape of what tail they have, says nothing."""
        return self.ess > EVEN * self.num_draws

    @property
    def reliable(self) -> bool:
        """Whether the draws can be reweighted to the posterior: k-hat below its threshold, or weights nearly equal."""
        return self.even or self.khat < self.threshold

    @cached_property
    def local_khat(self) -> dict[str, Array]:
        """Plate to k-hat of each of its indices, shape ``(size,)``; plates as in ``local``."""
        return {plate: np.array([khat for _, khat in smoothed]) for plate, smoothed in self._local_smoothed.items()}

    @cached_property
    def local_reliable(self) -> dict[str, NDArray[np.bool_]]:
        """Plate to whether the weights of each of its indices are, shape ``(size,)``; see ``reliable``."""
        return {
            plate: np.array(
                [khat < self.threshold or _ess(weights) > EVEN * self.num_draws for weights, khat in smoothed]
            )
            for plate, smoothed in self._local_smoothed.items()
        }

    @cached_property
    def _local_smoothed(self) -> dict[str, list[tuple[Array, float]]]:
        return {
            plate: [pareto_smoothed(column, self.noise) for column in weights.T]
            for plate, weights in self.local.items()
        }

    def per_draw(self) -> pd.DataFrame:
        """One row per draw: ``log_p``, ``log_q``, ``log_weight``, the normalized ``weight`` and the ``smoothed_weight``."""
        raw = self.log_weights - self.log_weights.max()
        return pd.DataFrame(
            {
                "log_p": self.log_p,
                "log_q": self.log_q,
                "log_weight": self.log_weights,
                "weight": np.exp(raw) / np.exp(raw).sum(),
                "smoothed_weight": np.exp(self.log_smoothed),
            }
        ).rename_axis("draw")

    def resample(
        self, num_draws: int | None = None, *, seed: int | np.random.Generator | None = None, replace: bool = True
    ) -> Any:
        """Draws resampled by their smoothed weights, as ArviZ data: approximately the posterior's where k-hat is good.

        Parameters
        ----------
        num_draws
            How many, S by default.
        seed
            Seed or generator of NumPy.
        replace
            Whether one draw may be taken several times. Without, ``num_draws`` should be well below ``ess``.

        Returns
        -------
        arviz.InferenceData or xarray.DataTree
            Group ``posterior``, dims as of :func:`~pyro_elbo_ext.from_pyro_svi`, shape (1, num_draws, ...), with
            ``khat``, its ``khat_threshold`` and ``importance_ess`` among the attributes; group ``sample_stats`` with
            ``log_p``, ``log_q``, ``log_weight`` and ``source_draw``, the index in this sample.

        Raises
        ------
        ValueError
            For ``num_draws`` below 1, or without replacement above the number of positive weights.
        """
        size = self.num_draws if num_draws is None else num_draws
        check_count("num_draws", size, 1)
        weights = np.exp(self.log_smoothed)
        if not replace and size > np.count_nonzero(weights):
            raise ValueError(
                f"num_draws={size} is above the {np.count_nonzero(weights)} draws with a positive weight: use replace=True"
            )
        if seed is not None and not isinstance(seed, np.random.Generator):
            check_count("seed", seed, 0)
        rng = np.random.default_rng(seed)
        index = rng.choice(self.num_draws, size=size, replace=replace, p=weights / weights.sum())
        rows = torch.from_numpy(index)
        labels = Labels(nodes=self.nodes)
        attrs = attributes() | {
            "khat": self.khat,
            "khat_threshold": self.threshold,
            "importance_ess": self.ess,
        }
        values = {
            name: to_numpy(value[rows.to(value.device)])[None]
            for name, value in (*self.draws.items(), *self.deterministics.items())
            if not self._imputes(name)
        }
        stats: dict[str, NDArray[Any]] = {
            "log_p": self.log_p[index][None],
            "log_q": self.log_q[index][None],
            "log_weight": self.log_weights[index][None],
            "source_draw": index[None],
        }
        return to_arviz(
            {
                "posterior": labels.dataset(values, self.nodes, attrs=attrs),
                "sample_stats": labels.dataset(stats, {}, attrs=attrs),
            }
        )

    def to_dataframe(self) -> pd.DataFrame:
        """k-hat of the whole and, where the model factorizes, of each index of a plate.

        Columns ``plate`` and ``index`` (None for the whole), ``khat``, ``threshold``, ``ok``, ``ess``.
        """
        rows: list[dict[str, Any]] = [self._row(None, None, self.khat, self.ess)]
        for plate, smoothed in self._local_smoothed.items():
            rows += [self._row(plate, index, khat, _ess(weights)) for index, (weights, khat) in enumerate(smoothed)]
        return pd.DataFrame(rows)

    def _row(self, plate: str | None, index: int | None, khat: float, ess: float) -> dict[str, Any]:
        ok = khat < self.threshold or ess > EVEN * self.num_draws
        return {"plate": plate, "index": index, "khat": khat, "threshold": self.threshold, "ok": ok, "ess": ess}

    def _imputes(self, name: str) -> bool:
        return name in self.draws and imputation(name, self.nodes)

    def __repr__(self) -> str:
        text = (
            f"ImportanceSample: {about_khat(self.khat, self.ess, self.num_draws)}, effective sample size {self.ess:.1f} of "
            f"{self.num_draws} draws"
        )
        if self.num_zero:
            text += f"\n{self.num_zero} of {self.num_draws} draws are outside the model's support: their weight is zero"
        for plate, khats in self.local_khat.items():
            text += (
                f"\nplate '{plate}': {int((~self.local_reliable[plate]).sum())} of {len(khats)} indices have k-hat of "
                f"{self.threshold:.2f} or more, the largest {khats.max():.2f} at index {int(khats.argmax())}"
            )
        for plate, reason in self.not_local.items():
            text += f"\nplate '{plate}': no k-hat per index, since {reason}"
        return text

    def _repr_html_(self) -> str:
        return "".join(f"<p>{line}</p>" for line in repr(self).splitlines())


@handlers_are_heard()
def psis_khat(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_draws: int = 1000,
    seed: int | None = None,
    batch_size: int = BATCH_SIZE,
    progress: bool = False,
    **kwargs: Any,
) -> ImportanceSample:
    """How far the guide is from the posterior, told by the tail of its importance weights: Pareto k-hat.

    With ``w = p(x, z) / q(z)`` at draws of the guide, k-hat is the shape of the generalized Pareto distribution that fits
    the largest weights. Below ``min(1 - 1 / log10(S), 0.7)`` the draws can be reweighted to the posterior with an error that
    can be relied on; above, the guide misses mass, mostly by tails that are too light. It sees only where the guide
    draws: a mode that the guide never visits cannot be seen.

    Parameters
    ----------
    model, guide
        As given to ``pyro.infer.SVI``, called as ``model(*args, **kwargs)``. Model keywords with the name of a
        parameter below need ``functools.partial``.
    num_draws
        Number of draws S; some thousands where the answer is near the threshold.
    seed
        Same seed and ``batch_size``, same draws, and the caller's random number generators are left as they were. None: draw
        from these.
    batch_size
        Draws run at once, by ``torch.vmap``; fewer need less memory. Where model or guide cannot be run so, they are run
        draw by draw; ``looped`` of the result says why.
    progress
        Show a progress bar.

    Returns
    -------
    ImportanceSample
        With ``khat``, ``threshold``, ``ess``, ``local_khat`` per plate index where the model factorizes (``not_local`` says
        why not), ``per_draw()``, ``resample()``, ``to_dataframe()``.

    Raises
    ------
    ValueError
        For a plate that subsamples; a guide site that is missing, a point mass, an auxiliary draw without a density in the
        model, or scaled; NaN or infinite densities, naming the site; draws that are all outside the model's support.
    TypeError
        For arguments of a wrong type.

    References
    ----------
    Yao, Vehtari, Simpson, Gelman (2018), Yes, but Did It Work?: Evaluating Variational Inference. Vehtari, Simpson,
    Gelman, Yao, Gabry (2024), Pareto smoothed importance sampling.
    """
    check_count("num_draws", num_draws, 1)
    check_count("batch_size", batch_size, 1)
    check_seed(seed)
    with untouched(seed):
        scorer = Scorer(model, guide, args, kwargs, batch_size, progress)
        return importance_sample(scorer, num_draws)


def importance_sample(scorer: Scorer, num_draws: int) -> ImportanceSample:
    """``num_draws`` draws of the guide, weighted.

    Raises
    ------
    ValueError
        If every draw is outside the model's support; and as `Scorer.draw`.
    """
    scores = scorer.draw(num_draws)
    if np.all(scores.log_p == -np.inf):
        raise ValueError(
            f"all {num_draws} draws of the guide are outside the model's support (log p = -inf): no weight is positive. "
            "Give the guide the support of the model's sites."
        )
    model_trace = scorer.reference[0]
    latents = set(scorer.latents)
    return ImportanceSample(
        draws={name: scores.values[name] for name in scorer.latents},
        log_p=scores.log_p,
        log_q=scores.log_q,
        log_prior=scores.log_prior,
        deterministics={name: value for name, value in scores.values.items() if name not in latents},
        local=scores.local,
        not_local=dict(scorer.not_local),
        looped=scorer.looped,
        noise=rounding_noise(scorer, scores),
        nodes=model_trace.nodes,
    )


def rounding_noise(scorer: Scorer, scores: Scores) -> float:
    """Size of the rounding errors in a log weight, in nats."""
    finite = np.isfinite(scores.log_p) & np.isfinite(scores.log_q)
    size = np.abs(scores.log_p[finite]).mean() + np.abs(scores.log_q[finite]).mean() if finite.any() else 1.0
    return float(2 * scorer.eps * (1 + size))


def _ess(log_weights: Array) -> float:
    """Kish's effective sample size of normalized log weights."""
    return float(1 / np.exp(2 * log_weights).sum())


def about_khat(khat: float, ess: float, num_draws: int) -> str:
    """k-hat and what it says, with the effective sample size of the smoothed weights at hand."""
    if ess > EVEN * num_draws:
        return f"k-hat {khat:.2f}, which says nothing of weights so nearly equal"
    threshold = khat_threshold(num_draws)
    return f"k-hat {khat:.2f}, {'below' if khat < threshold else 'not below'} the threshold {threshold:.2f}"


def khat_threshold(num_draws: int) -> float:
    """``min(1 - 1 / log10(S), 0.7)``; 0 up to ten draws."""
    return min(1 - 1 / math.log10(num_draws), 0.7) if num_draws > 10 else 0.0
