"""Mean and sd of what a guide draws, at any parameters; and how far two guides are apart by them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_elbo_ext.programs.nodes import is_random
from pyro_elbo_ext.programs.randomness import seeded

_DRAWS = 128  # where the moments have no closed form
_SEEDS = (0, 1)


class Moments(NamedTuple):
    """Mean and log standard deviation of each number that a guide draws, each of shape ``(D,)``, float64."""

    mean: Tensor
    log_sd: Tensor


def symmetrized_kl(a: Moments, b: Moments) -> Tensor:
    r"""Symmetrized KL between the Gaussians with the moments of each coordinate, in nats.

    .. math:: KL(a \| b) + KL(b \| a) = 2 \sinh^2(l_a - l_b) + \frac{(m_a - m_b)^2}{2} (e^{-2 l_a} + e^{-2 l_b})

    with mean m and log sd l. Near 0 it is the squared difference of the means in sds, plus twice that of the log sds.
    For a Gaussian guide it is exact for every marginal, and no larger than the symmetrized KL of the whole guide.

    Returns
    -------
    Tensor
        Shape ``(D,)``.
    """
    precision = torch.exp(-2 * a.log_sd) + torch.exp(-2 * b.log_sd)
    return 2 * torch.sinh(a.log_sd - b.log_sd).square() + 0.5 * (a.mean - b.mean).square() * precision


def flatten(parameters: Sequence[Tensor]) -> Tensor:
    """Unconstrained parameters as one vector, shape ``(P,)``, detached."""
    return torch.cat([parameter.detach().reshape(-1) for parameter in parameters])


@torch.no_grad()
def unflatten(flat: Tensor, parameters: Sequence[Tensor]) -> None:
    """Write a vector from :func:`flatten` into the parameters."""
    pieces = flat.split([parameter.numel() for parameter in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.copy_(piece.reshape(parameter.shape))


class GuideMoments:
    """Moments of a guide's own random sites, auxiliary ones among them, as a function of its parameters.

    They are those of the sites' distributions where these don't depend on what the guide has drawn before, as in
    AutoNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal, independent sites by hand, and an encoder at given
    data. Otherwise, as with flows or AutoStructured, they are those of draws under one seed at all parameters, so that they
    differ where the parameters do and little else.

    Parameters
    ----------
    guide
        A guide that has been run before, so that its parameters exist.
    parameters
        Unconstrained, leaf tensors.
    args, kwargs
        Of the guide; of a minibatch, any one will do.

    Attributes
    ----------
    method : {"closed form", "draws"}

    Raises
    ------
    NotImplementedError
        If the guide draws nothing, or only points: then there is no sd to measure by.
    """

    def __init__(
        self,
        guide: Callable[..., Any],
        parameters: Sequence[Tensor],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._guide, self._parameters = guide, list(parameters)
        self._args, self._kwargs = args, dict(kwargs or {})
        with torch.no_grad():
            first = self._run(_SEEDS[0])
            self._sites = [name for name, node in first.nodes.items() if is_random(node)]
            if not self._sites:
                raise NotImplementedError("the guide draws nothing but points")
            with _Subsamples(first):
                second = self._run(_SEEDS[1])
        self.method = "closed form" if self._are_fixed(first, second) and self._tell_all() else "draws"
        if self.method == "draws":  # points, too: an autoguide may move them by what its parameters say
            self._sites = [name for name, node in first.nodes.items() if _is_drawn(node)]
        self._varies: Tensor | slice = slice(None)
        moments = self(flatten(self._parameters))
        self._varies = moments.log_sd > -torch.inf
        if not self._varies.any() or not all(torch.isfinite(part[self._varies]).all() for part in moments):
            raise NotImplementedError(f"the guide's sites {self._sites} have no finite mean and sd")

    @torch.no_grad()
    def __call__(self, flat: Tensor) -> Moments:
        """Moments at the parameters ``flat``, shape ``(P,)``; the guide's own, and random numbers, are put back."""
        with self._at(flat):
            if self.method == "closed form":
                trace = self._run(_SEEDS[0])
                mean, sd = zip(*[_exact(trace.nodes[name]) for name in self._sites], strict=True)
                return self._of(torch.cat(mean), torch.cat(sd))
            with seeded(_SEEDS[0]):
                draws = torch.stack([self._draw() for _ in range(_DRAWS)])
            return self._of(draws.mean(0), draws.std(0))

    def _of(self, mean: Tensor, sd: Tensor) -> Moments:
        """Without the numbers that did not vary at the start, such as the padding of an imputed site."""
        return Moments(mean[self._varies], sd[self._varies].log())

    def _draw(self) -> Tensor:
        trace = poutine.trace(self._guide).get_trace(*self._args, **self._kwargs)
        return torch.cat([trace.nodes[name]["value"].double().reshape(-1) for name in self._sites])

    def _run(self, seed: int) -> Trace:
        with seeded(seed):
            return poutine.trace(self._guide).get_trace(*self._args, **self._kwargs)

    def _are_fixed(self, first: Trace, second: Trace) -> bool:
        """Whether the sites' moments have a closed form and are the same after other draws."""
        for name in self._sites:
            try:
                pairs = zip(_exact(first.nodes[name]), _exact(second.nodes[name]), strict=True)
            except (KeyError, NotImplementedError):
                return False
            if not all(bool(torch.isfinite(a).all()) and torch.equal(a, b) for a, b in pairs):
                return False
        return True

    @torch.enable_grad()
    def _tell_all(self) -> bool:
        """Whether the moments depend on every parameter that the guide reads, unlike AutoStructured's."""
        trace = self._run(_SEEDS[0])
        parts = [part for name in self._sites for part in _exact(trace.nodes[name])]
        read = [node["value"].unconstrained() for node in trace.nodes.values() if node["type"] == "param"]
        trained = [parameter for parameter in read if parameter.requires_grad]
        total = torch.cat(parts).sum()
        if not trained or not total.requires_grad:
            return not trained
        return all(gradient is not None for gradient in torch.autograd.grad(total, trained, allow_unused=True))

    @contextmanager
    def _at(self, flat: Tensor) -> Iterator[None]:
        before = [parameter.detach().clone() for parameter in self._parameters]
        unflatten(flat, self._parameters)
        try:
            yield
        finally:
            for parameter, value in zip(self._parameters, before, strict=True):
                parameter.copy_(value)


class _Subsamples(Messenger):
    """Give plates the subsamples of another run."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self._values = {
            name: node["value"]
            for name, node in trace.nodes.items()
            if node["type"] == "sample" and site_is_subsample(node)
        }

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self._values and not msg["done"]:
            msg["value"], msg["done"] = self._values[msg["name"]], True


def _is_drawn(node: Any) -> bool:
    if node["type"] != "sample" or node["is_observed"] or site_is_subsample(node):
        return False
    return bool(node["value"].is_floating_point() or is_random(node))


def _exact(node: Any) -> tuple[Tensor, Tensor]:
    fn = node["fn"]
    mean, variance = fn.mean, fn.variance
    shape = node["value"].shape
    return mean.double().expand(shape).reshape(-1), variance.double().sqrt().expand(shape).reshape(-1)
