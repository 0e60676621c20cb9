"""Signal-to-noise ratio of the gradient: running moments per parameter, on its device, read when asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from pyro_elbo_ext.programs.arguments import check_count

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

Mode = Literal["steps", "particles"]


class Moments(NamedTuple):
    """Moments of one parameter's gradient. No tensor is ever changed in place, so copies may share them."""

    num_steps: int
    mean: Tensor  # of the step gradients
    spread: (
        Tensor  # "steps": sum of squares about the mean; "particles": sum over steps of the step gradient's variance
    )


class Estimate(NamedTuple):
    """What the moments say, on the host."""

    num_steps: int
    mean: Floats  # of the step gradients
    variance: Floats


class GradientNoise:
    """Moments of the gradients of the last ``window + 1`` to ``2 * window`` steps (all of a shorter run).

    They are kept in two buckets: the current one, and the one before it, of ``window`` steps. A step costs a few
    operations per parameter on the parameter's device, and waits for none of them.

    Parameters
    ----------
    mode
        "steps": each step brings one gradient, and noise is its variation over steps. "particles": each step brings the
        gradients of its particles, and noise is their variation within the step.
    window
        In steps, at least 2.

    Raises
    ------
    ValueError
        ``mode`` is neither, or ``window`` is below 2.
    """

    def __init__(self, mode: Mode, window: int) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"gradient_snr must be 'steps', 'particles' or None, not {mode!r}")
        check_count("gradient_window", window, 2)
        self.mode = mode
        self.window = window
        self.clear()

    _num_steps: int  # in the current bucket
    _current: dict[str, Moments]
    _previous: dict[str, Moments]

    def clear(self) -> None:
        """Forget every gradient."""
        vars(self).update(_num_steps=0, _current={}, _previous={})

    def append(self, gradients: Mapping[str, Tensor]) -> None:
        """Take in one step, as ``History.append_gradients`` describes it; an error leaves everything as it was."""
        step = {name: self._moments(name, gradient) for name, gradient in gradients.items()}
        num_steps, current, previous = self._num_steps, dict(self._current), self._previous
        if num_steps == self.window:  # of all parameters at once: one that no longer comes is then forgotten
            num_steps, current, previous = 0, {}, current
        for name, moments in step.items():
            if name in previous and previous[name].mean.shape != moments.mean.shape:  # another parameter by that name
                previous = {other: known for other, known in previous.items() if other != name}
            known = current.get(name)
            fits = known is not None and known.mean.shape == moments.mean.shape
            current[name] = self._merge(known, moments) if known is not None and fits else moments
        # in one call: an exception from the handler of a signal may come between any two lines
        vars(self).update(_num_steps=num_steps + 1, _current=current, _previous=previous)

    def table(self, by: Literal["parameter", "element"]) -> pd.DataFrame:
        """The signal-to-noise ratios, as ``History.gradient_snr`` describes them."""
        if by not in ("parameter", "element"):
            raise ValueError(f"by must be 'parameter' or 'element', got {by!r}")
        names = list({**self._previous, **self._current})
        if not names:
            raise ValueError("gradient_snr() needs the gradients of at least one step; none has been recorded")
        estimates = [self._read(name) for name in names]
        return _by_parameter(names, estimates) if by == "parameter" else _by_element(names, estimates)

    def _moments(self, name: str, gradient: Tensor) -> Moments:
        """The moments of one step."""
        if not isinstance(gradient, Tensor) or not gradient.is_floating_point():
            kind = f"{gradient.dtype} tensor" if isinstance(gradient, Tensor) else type(gradient).__name__
            raise TypeError(
                f"the gradient of {name!r} must be a tensor of real floating-point numbers, not {kind}; leave out "
                "parameters that have no gradient"
            )
        if gradient.layout is not torch.strided:  # an embedding's, say
            gradient = gradient.to_dense()
        dtype = torch.promote_types(gradient.dtype, torch.float32)  # half precision would lose the sums
        gradient = gradient.detach()
        if self.mode == "steps":  # copied, for the optimizer goes on to change it
            mean = gradient.to(dtype, copy=True)
            return Moments(1, mean, torch.zeros_like(mean))
        if not gradient.dim() or len(gradient) < 2:
            raise ValueError(
                f"gradient_snr='particles' needs at least 2 particles, the first dimension of each gradient; that of "
                f"{name!r} has shape {tuple(gradient.shape)}. Use num_particles of at least 2, or gradient_snr='steps'"
            )
        if not gradient.numel():  # torch warns of its variance
            return Moments(1, gradient[0], gradient[0])
        variance, mean = torch.var_mean(gradient.to(dtype), 0)
        return Moments(1, mean, variance / len(gradient))

    def _merge(self, a: Moments, b: Moments) -> Moments:
        """The moments of both samples (Chan, Golub and LeVeque 1983), on the device of ``b``."""
        num_steps = a.num_steps + b.num_steps
        mean, spread = a.mean.to(b.mean.device), a.spread.to(b.mean.device) + b.spread
        delta = b.mean - mean
        if self.mode == "steps":
            spread = torch.addcmul(spread, delta, delta, value=a.num_steps * b.num_steps / num_steps)
        return Moments(num_steps, torch.add(mean, delta, alpha=b.num_steps / num_steps), spread)

    def _read(self, name: str) -> Estimate:
        """Both buckets of a parameter, from its device."""
        buckets = [bucket[name] for bucket in (self._previous, self._current) if name in bucket]
        moments = self._merge(*buckets) if len(buckets) == 2 else buckets[0]
        mean, spread = (moment.cpu().double().numpy() for moment in (moments.mean, moments.spread))
        divisor = moments.num_steps - 1 if self.mode == "steps" else moments.num_steps
        return Estimate(moments.num_steps, mean, spread / divisor if divisor else np.full(mean.shape, math.nan))

    def __getstate__(self) -> dict[str, Any]:
        """A copy can be read where the parameters' device is missing; the next step takes its moments back to it."""
        state = self.__dict__.copy()
        for name in ("_current", "_previous"):
            state[name] = {key: Moments(n, mean.cpu(), spread.cpu()) for key, (n, mean, spread) in state[name].items()}
        return state


def _ratio(mean: Floats, variance: Floats) -> Floats:
    """Of the root of ``mean**2`` to that of the variance: inf where only that is 0, NaN where both are."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.abs(mean) / np.sqrt(variance))


def _by_parameter(names: list[str], estimates: list[Estimate]) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for name, (num_steps, mean, variance) in zip(names, estimates, strict=True):
        snr = _ratio(mean, variance)
        known = snr[~np.isnan(snr)]
        rows.append(
            {
                "parameter": name,
                "numel": mean.size,
                "snr": float(_ratio(np.asarray(np.sqrt((mean**2).sum())), np.asarray(variance.sum()))),
                "snr_median": np.median(known) if known.size else math.nan,
                "snr_min": known.min() if known.size else math.nan,
                "snr_max": known.max() if known.size else math.nan,
                "num_steps": num_steps,
            }
        )
    return pd.DataFrame(rows)


def _by_element(names: list[str], estimates: list[Estimate]) -> pd.DataFrame:
    import pandas as pd

    size = [estimate.mean.size for estimate in estimates]
    mean = np.concatenate([estimate.mean.ravel() for estimate in estimates])
    variance = np.concatenate([estimate.variance.ravel() for estimate in estimates])
    return pd.DataFrame(
        {
            "parameter": np.repeat(np.array(names, object), size),
            "index": pd.Series([at for estimate in estimates for at in np.ndindex(estimate.mean.shape)], dtype=object),
            "mean": mean,
            "sd": np.sqrt(variance),
            "snr": _ratio(mean, variance),
            "num_steps": np.repeat([estimate.num_steps for estimate in estimates], size),
        }
    )
