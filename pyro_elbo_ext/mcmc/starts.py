"""Where chains start: at random, at given values, or at draws of a fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pyro import poutine
from torch import Tensor

from pyro_elbo_ext.density import LogDensity
from pyro_elbo_ext.density.points import guide_points

Array = NDArray[np.float64]

INIT_TRIES = 100  # starting points tried per chain, as in Stan
DRAWS = 400  # of a fit, among which chains choose


def starting_point(density: LogDensity, rng: np.random.Generator, init: float | Mapping[str, Any]) -> np.ndarray:
    """A point with finite log density and gradient: uniform on (-init, init), or at given sites' values."""
    radius = 2.0 if isinstance(init, Mapping) else float(init)
    tries = INIT_TRIES if radius > 0 else 1
    x = np.zeros(density.dim)
    for _ in range(tries):
        x = rng.uniform(-radius, radius, density.dim) if radius > 0 else np.zeros(density.dim)
        if isinstance(init, Mapping):
            density.program.place(torch.from_numpy(x), init, "init")
        value, gradient = density.value_and_grad(x)
        if np.isfinite(value) and np.isfinite(gradient).all():
            return x
    raise ValueError(
        f"no starting point with finite log density and gradient in {tries} tries: {culprit(density, x)}. "
        "Check the data and supports of that site, or give starting values by init={site: value}."
    )


def culprit(density: LogDensity, x: np.ndarray) -> str:
    """The site to blame for a log density or gradient that is not finite at ``x``."""
    try:
        trace, _ = density.program.run_at(torch.from_numpy(x))
    except torch.linalg.LinAlgError as error:
        return f"the model itself fails, {error}"
    with density.program.precision():
        for name in density.program.sites:
            single = poutine.Trace()
            single.add_node(name, **trace.nodes[name])
            value = float(single.log_prob_sum())
            if not np.isfinite(value):
                return f"the log prob of site '{name}' is {value}"
    _, gradient = density.value_and_grad(x)
    for name, latent in density.layout.items():
        if not np.isfinite(gradient[latent.start : latent.stop]).all():
            return f"the gradient with respect to site '{name}' is not finite"
    return "the log Jacobian of the map to unconstrained space is not finite"


def draws_of(start: Any, density: LogDensity, seed: int) -> Array:
    """Unconstrained points of a fit's draws at which the density is finite, shape (S, dim).

    Raises
    ------
    TypeError
        If ``start`` is no result of `fit`.
    ValueError
        If it lacks a site of the model, if its draws have another shape or are outside the support, each named, or if the
        density is finite at hardly any.
    """
    if not callable(getattr(start, "draws", None)):
        raise TypeError(f"start must be a result of fit, which has draws, got {type(start).__name__}")
    own = getattr(start, "density", None)
    if own is not None and own.layout == density.layout:
        points = np.asarray(start.unconstrained_draws(DRAWS, seed=seed))
    else:
        sites: dict[str, Tensor] = start.draws(DRAWS, seed=seed)
        if missing := [name for name in density.layout if name not in sites]:
            raise ValueError(
                f"start has no draws of the sites {missing} of the model: it is a fit of another model. Of a model with "
                "obs_mask pass what fit(model, 'auto') gives."
            )
        for name in density.layout:
            expected = density.program.sites[name]["value"].shape
            if sites[name].shape[1:] != expected:
                raise ValueError(
                    f"start has draws of shape {tuple(sites[name].shape[1:])} of site '{name}', the model's has "
                    f"{tuple(expected)}: it is a fit of other data"
                )
        points = guide_points(density, sites)[0].numpy()
    values, gradients = density.value_and_grad(points)
    finite = np.isfinite(values) & np.isfinite(gradients).all(1)
    if finite.sum() < DRAWS // 10:
        raise ValueError(
            f"the log density is finite at {int(finite.sum())} of {DRAWS} draws of start: it is a fit of another model, or "
            "of other data"
        )
    return points[finite]
