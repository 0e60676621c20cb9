"""Log likelihoods of single observations at points of the flat unconstrained space."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pyro_elbo_ext.density.log_density import LogDensity
from pyro_elbo_ext.inference_data.draws import pointwise_log_likelihood, to_numpy
from pyro_elbo_ext.programs.nodes import is_data


class Pointwise(NamedTuple):
    """Log likelihoods of one observed site.

    Attributes
    ----------
    values : numpy.ndarray
        Unscaled log density of each observation at each point, shape ``(*batch, *plates)``; 0 where masked out.
    counts : numpy.ndarray of bool
        Whether the observation counts at any point, shape ``plates``.
    """

    values: NDArray[Any]
    counts: NDArray[np.bool_]


def log_likelihoods(density: LogDensity, u: NDArray[Any]) -> dict[str, Pointwise]:
    """Log likelihood of each observation at each point.

    Parameters
    ----------
    density
        Of a model from which no discrete sites are summed out.
    u
        Shape ``(*batch, dim)``, as for ``density.constrain``.

    Returns
    -------
    dict
        Observed site to its log likelihoods.
    """
    program = density.program
    names = [name for name, site in program.sites.items() if is_data(site)]

    def compute(x: Tensor) -> tuple[Tensor, ...]:
        run, _ = program.run_at(x)
        with program.precision():
            found = pointwise_log_likelihood(run)
        return tuple(part.double() for name in names for part in found[name])

    rows = density.at_each(u, compute, "log likelihood")
    batch = tuple(range(np.ndim(u) - 1))
    return {
        name: Pointwise(to_numpy(values), np.asarray(to_numpy(counts).astype(bool).any(batch)))
        for name, values, counts in zip(names, rows[::2], rows[1::2], strict=True)
    }
