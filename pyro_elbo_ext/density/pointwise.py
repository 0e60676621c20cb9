"""Log likelihoods of single observations at points of the flat unconstrained space."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_elbo_ext.density.completing import at_points
from pyro_elbo_ext.density.log_density import LogDensity
from pyro_elbo_ext.inference_data.draws import pointwise_log_likelihood, to_numpy
from pyro_elbo_ext.programs.nodes import is_data
from pyro_elbo_ext.programs.randomness import isolated
from pyro_elbo_ext.terms.enumeration.pointwise import Together, pointwise


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


Summed = list[tuple[Together, NDArray[Any]]]


def of_summed_out(density: LogDensity, u: NDArray[Any]) -> Summed:
    """Log likelihoods of observations with the discrete sites that they depend on summed out, at each point.

    ``u`` has shape ``(*batch, dim)``, the arrays ``(*batch, *plates)``.

    Raises
    ------
    ValueError
        Where discrete sites tie all observations together.
    """
    if not density.program.has_discrete:
        return []
    points = torch.as_tensor(u, dtype=torch.float64)
    with isolated(0), density.program.precision():
        found = pointwise(at_points(density, points.reshape(-1, density.dim)))
    return [(of, to_numpy(value).reshape(*points.shape[:-1], *value.shape[1:])) for of, value in found]


def log_likelihoods(density: LogDensity, u: NDArray[Any], summed_out: Summed) -> dict[str, Pointwise]:
    """Log likelihood of each observation at each point.

    Parameters
    ----------
    density
        Of a model. Sites from which discrete ones are summed out are left out: :func:`of_summed_out` has them.
    u
        Shape ``(*batch, dim)``, as for ``density.constrain``.
    summed_out
        What `of_summed_out` has found.

    Returns
    -------
    dict
        Observed site to its log likelihoods.
    """
    program = density.program
    others = {site for together, _ in summed_out for site in together.sites}
    names = [name for name, site in program.sites.items() if is_data(site) and name not in others]

    def compute(x: Tensor) -> tuple[Tensor, ...]:
        run, _ = program.run_at(x)
        with program.precision():
            found = pointwise_log_likelihood(run)
        return tuple(part.double() for name in names for part in found[name])

    if not names:
        return {}
    rows = density.at_each(u, compute, "log likelihood")
    batch = tuple(range(np.ndim(u) - 1))
    return {
        name: Pointwise(to_numpy(values), np.asarray(to_numpy(counts).astype(bool).any(batch)))
        for name, values, counts in zip(names, rows[::2], rows[1::2], strict=True)
    }
