"""How far averages at falling learning rates still are from where they go, if the distance is a power of the rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import logsumexp

_POWERS = np.linspace(0.5, 1.0, 51)  # of averaged iterates, which are off by O(rate) at best and O(rate**0.5) at worst
_NOISES = np.geomspace(0.05, 10.0, 40)  # sd of the log of a measured distance


class PowerLaw(NamedTuple):
    """A fit of ``error = constant * rate**power``.

    Attributes
    ----------
    power : float
        Posterior mean.
    error : float
        Predicted distance between the last average and the limit at rate zero.
    """

    power: float
    error: float


def fit_power_law(distances: Sequence[float], rates: Sequence[float], factor: float) -> PowerLaw:
    r"""Posterior of the power law, given the distances between successive averages.

    Where the average at rate :math:`\gamma` is :math:`C \gamma^\kappa` from the limit, and approaches it on one line, two
    successive ones are apart by :math:`C \gamma_k^\kappa (\rho^{-\kappa} - 1)` with :math:`\rho` the factor of the rate.
    The log distances are taken as normal around this, with weights that fall with age; :math:`\kappa` is uniform on (0, 1],
    :math:`\log C` flat, and the noise's sd half-Cauchy.

    Parameters
    ----------
    distances
        Between the averages at ``rates[k] / factor`` and at ``rates[k]``, > 0.
    rates
        Learning rates, falling, in any unit.
    factor
        By which the learning rate falls each time, in (0, 1).

    References
    ----------
    Welandawe, Andersen, Vehtari, Huggins (2022), A framework for improving the reliability of black-box variational
    inference, section 4.
    """
    y, x = np.log(distances), np.log(rates)
    age = np.arange(len(y))[::-1]
    weight = (1 + age**2 / 9) ** -0.25
    step = np.log(factor**-_POWERS - 1)
    residual = y - _POWERS[:, None] * x - step[:, None]  # log C, were there no noise, shape (powers, n)
    log_c = (residual * weight).sum(1) / weight.sum()
    misfit = ((residual - log_c[:, None]) ** 2 * weight).sum(1)
    # log C is integrated out, which takes one power of the noise's sd
    log_posterior = (
        -0.5 * misfit[:, None] / _NOISES**2
        - (weight.sum() - 1) * np.log(_NOISES)
        - np.log1p(_NOISES**2 / 100)
        + np.log(_NOISES)  # the grid's spacing
    )
    log_of_power = logsumexp(log_posterior, axis=1)
    probability = np.exp(log_of_power - logsumexp(log_of_power))
    power = float(probability @ _POWERS)
    log_error = float(probability @ (log_c + _POWERS * x[-1]))
    return PowerLaw(power, float(np.exp(log_error)))


def predicted_steps(steps: Sequence[int], factor: float) -> float:
    """Steps that the next learning rate will take: by a line through their logarithms, at least as many as the last.

    With a single number they are inversely proportional to the rate. Newer ones weigh more.
    """
    if len(steps) == 1:
        return steps[0] / factor
    x, y = np.arange(len(steps), dtype=float), np.log(steps)
    weight = (1 + x[::-1] ** 2 / 9) ** -0.25
    slope, intercept = np.polyfit(x, y, 1, w=np.sqrt(weight))
    return float(max(np.exp(intercept + slope * len(steps)), steps[-1]))
