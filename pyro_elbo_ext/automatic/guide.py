"""Gaussians on unconstrained space as Pyro guides, for models from which Pyro's autoguides cannot start too."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide.guides import AutoContinuous
from pyro.infer.autoguide.initialization import init_to_value
from pyro.nn.module import PyroParam
from torch import Tensor, nn
from torch.distributions import biject_to, constraints

from pyro_elbo_ext.automatic.gaussian import Gaussian
from pyro_elbo_ext.density import LogDensity
from pyro_elbo_ext.programs.randomness import isolated

POINTS = 1  # other ones at which the guide's sites must be those of the density


_NUMBERS = itertools.count(1)


class UnconstrainedGuide(AutoContinuous):
    """A guide that is one distribution on a model's unconstrained space, in the coordinates of a `LogDensity`.

    It is one of Pyro's ``AutoContinuous`` guides: an auxiliary vector, cut into sites, each mapped to its support. Unlike
    Pyro's own it starts from given values, so that ``ImproperUniform`` sites do, and leaves sites to be enumerated alone.
    Its numbers are float64 where the model, its data or its parameters have any, else float32.

    Parameters
    ----------
    density
        Log density of the model, with its arguments.
    loc
        A point of unconstrained space, shape (dim,), in the middle of the distribution.

    Raises
    ------
    ValueError
        Where the support of a site depends on another latent site, which such a guide cannot follow; it is named.
    """

    def __init__(self, density: LogDensity, loc: Tensor) -> None:
        program, names = density.program, set(density.layout)

        def other(site: Any) -> bool:
            return bool(site["type"] == "sample" and not site["is_observed"] and site["name"] not in names)

        with isolated(0), torch.no_grad():
            traces = [program.run_at(x)[0] for x in (loc, *program.points[:POINTS])]
            kinds = {value.dtype for value in _floating(traces[0])} | {place.dtype for place in density.layout.values()}
            preferred = torch.float64 if torch.float64 in kinds else torch.float32
            failure: RuntimeError | None = None
            for dtype in (preferred, torch.float64 if preferred is torch.float32 else torch.float32):
                values = {name: traces[0].nodes[name]["value"].to(dtype) for name in names}
                super().__init__(poutine.block(program.model, hide_fn=other), init_to_value(values=values))
                self._pyro_name = f"{type(self).__name__}_{next(_NUMBERS)}"  # or the parameter store mixes guides up
                try:
                    self._setup_prototype(*program.args, **program.kwargs)
                except RuntimeError as error:  # dtypes that the model does not mix
                    failure = failure or error
                    continue
                break
            else:
                assert failure is not None
                raise failure
            self.dtype = dtype
            for x, trace in zip((loc, *program.points), traces, strict=False):
                for site, own in self._unpack_latent(x):
                    value, expected = biject_to(site["fn"].support)(own), trace.nodes[site["name"]]["value"]
                    if not torch.allclose(value, expected.to(value), rtol=1e-3, atol=1e-3, equal_nan=True):
                        raise ValueError(
                            f"the support of site '{site['name']}' depends on another latent site: an automatic guide has "
                            "fixed supports. Write it as a site of fixed support, and the rest as pyro.deterministic."
                        )

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        """A draw of the auxiliary vector."""
        name = f"_{type(self).__name__}_latent"
        return pyro.sample(name, self.get_posterior(*args, **kwargs), infer={"is_auxiliary": True})

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        with poutine.block():
            super()._setup_prototype(*args, **kwargs)
        # what the model was called with and returned is not needed, and may be large
        for name in ("_INPUT", "_RETURN"):
            self.prototype_trace.remove_node(name)


class GaussianGuide(UnconstrainedGuide):
    """A Gaussian with full covariance on a model's unconstrained space.

    Its parameters are ``loc``, shape (dim,), and ``scale_tril``, the covariance's lower Cholesky factor, shape (dim, dim).

    Parameters
    ----------
    density
        Log density of the model, with its arguments.
    loc, scale_tril
        Starting values.
    """

    def __init__(self, density: LogDensity, loc: Tensor, scale_tril: Tensor) -> None:
        super().__init__(density, loc)
        self.loc = nn.Parameter(loc.to(self.dtype))
        self.scale_tril = PyroParam(scale_tril.to(self.dtype), constraints.lower_cholesky)

    @property
    def gaussian(self) -> Gaussian:
        """Its parameters as they are now."""
        return Gaussian(*(x.detach().cpu().double().numpy() for x in (self.loc, self.scale_tril)))

    def get_base_dist(self) -> Any:
        return dist.Normal(torch.zeros_like(self.loc), torch.ones_like(self.loc)).to_event(1)

    def get_transform(self, *args: Any, **kwargs: Any) -> Any:
        return dist.transforms.LowerCholeskyAffine(self.loc, scale_tril=self.scale_tril)

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        """The Gaussian of the auxiliary vector."""
        return dist.MultivariateNormal(self.loc, scale_tril=self.scale_tril)

    def _loc_scale(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.loc, self.scale_tril.square().sum(-1).sqrt()


class DiagonalGuide(UnconstrainedGuide):
    """A Gaussian with independent coordinates on a model's unconstrained space.

    Its parameters are ``loc`` and ``scale``, both of shape (dim,).

    Parameters
    ----------
    density
        Log density of the model, with its arguments.
    loc, scale
        Starting values.
    """

    def __init__(self, density: LogDensity, loc: Tensor, scale: Tensor) -> None:
        super().__init__(density, loc)
        self.loc = nn.Parameter(loc.to(self.dtype))
        self.scale = PyroParam(scale.to(self.dtype), constraints.positive)

    @property
    def gaussian(self) -> Gaussian:
        """Its parameters as they are now."""
        return Gaussian(*(x.detach().cpu().double().numpy() for x in (self.loc, self.scale)))

    def get_base_dist(self) -> Any:
        return dist.Normal(torch.zeros_like(self.loc), torch.ones_like(self.loc)).to_event(1)

    def get_transform(self, *args: Any, **kwargs: Any) -> Any:
        return dist.transforms.AffineTransform(self.loc, self.scale)

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        """The Gaussian of the auxiliary vector."""
        return dist.Normal(self.loc, self.scale).to_event(1)

    def _loc_scale(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.loc, self.scale


def _floating(trace: poutine.Trace) -> Iterator[Tensor]:
    """Observed values with a fraction."""
    for site in trace.nodes.values():
        value = site.get("value")
        if site["type"] == "sample" and site["is_observed"] and isinstance(value, Tensor) and value.is_floating_point():
            yield value
