"""A short normalizing flow on the space that a Gaussian whitens, for posteriors that no Gaussian is near."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy

import numpy as np
import pyro.distributions as dist
import torch
from pyro.distributions.torch_transform import TransformModule
from pyro.nn import AutoRegressiveNN, PyroModule
from torch import Tensor, nn
from torch.distributions import biject_to, constraints

from pyro_elbo_ext.automatic.ascent import Fit
from pyro_elbo_ext.automatic.evaluations import Evaluations, TooManyGradients
from pyro_elbo_ext.automatic.gaussian import Gaussian, standard_draws
from pyro_elbo_ext.automatic.guide import UnconstrainedGuide
from pyro_elbo_ext.automatic.moments import Weighted, weigh
from pyro_elbo_ext.density import LogDensity
from pyro_elbo_ext.programs.randomness import isolated

RATE, LEAST_RATE = 0.01, 0.0006  # of Adam, halved when a round gains nothing
DRAWS, CHECK_DRAWS = 256, 1024  # per step, and to compare rounds
LARGEST = 4.0  # log scale of an autoregressive layer
ROUND, MOST_ROUNDS = 100, 60  # steps of a round


class SinhArcsinh(TransformModule):
    """``y = sinh(skew + tail * arcsinh(x))`` of each coordinate: skewness and weight of the tails (Jones, Pewsey 2009).

    Parameters
    ----------
    dim
        Number of coordinates.
    """

    domain, codomain, bijective = constraints.real_vector, constraints.real_vector, True

    def __init__(self, dim: int) -> None:
        super().__init__(cache_size=1)
        self.skew, self.log_tail = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def push(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Image and log determinant."""
        y = torch.sinh(self.skew + self.log_tail.exp() * torch.asinh(x))
        return y, (self.log_tail + 0.5 * (torch.log1p(y * y) - torch.log1p(x * x))).sum(-1)

    def _call(self, x: Tensor) -> Tensor:
        return self.push(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.sinh((torch.asinh(y) - self.skew) * (-self.log_tail).exp())

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.push(x)[1]


class Autoregressive(TransformModule):
    """``y_i = shift_i + scale_i * x_i``, both by a network of the coordinates before the i-th; the identity at first.

    Pyro's ``AffineAutoregressive`` is the same, but inverts in torch's default dtype only and keeps a log determinant of
    earlier calls.

    Parameters
    ----------
    dim
        Number of coordinates.
    order
        Of the coordinates, shape (dim,).

    References
    ----------
    Kingma et al. (2016), Improved variational inference with inverse autoregressive flow.
    """

    domain, codomain, bijective = constraints.real_vector, constraints.real_vector, True

    def __init__(self, dim: int, order: Tensor) -> None:
        super().__init__(cache_size=1)
        self.network = AutoRegressiveNN(dim, [max(16, 2 * dim)] * 2, permutation=order)
        nn.init.zeros_(self.network.layers[-1].weight)
        nn.init.zeros_(self.network.layers[-1].bias)

    def _affine(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self.network(x)
        return shift, LARGEST * torch.tanh(log_scale / LARGEST)

    def push(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Image and log determinant."""
        shift, log_scale = self._affine(x)
        return shift + log_scale.exp() * x, log_scale.sum(-1)

    def _call(self, x: Tensor) -> Tensor:
        return self.push(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        x = torch.zeros_like(y)
        for _ in range(y.shape[-1]):  # each time one more coordinate, in their order, is right
            shift, log_scale = self._affine(x)
            x = (y - shift) * (-log_scale).exp()
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.push(x)[1]


class Flow(PyroModule):
    """A bijection of standard normal draws that starts as the identity.

    Two autoregressive layers, in opposite order, shift and scale each coordinate by functions of the others, as a funnel or
    a banana asks for; before and after them each coordinate is bent on its own.

    Parameters
    ----------
    dim
        Number of coordinates.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [SinhArcsinh(dim)]
        if dim > 1:
            layers += [Autoregressive(dim, order) for order in (torch.arange(dim), torch.arange(dim).flip(0))]
            layers.append(SinhArcsinh(dim))
        self.layers = nn.ModuleList(layers).double()


class FlowGuide(UnconstrainedGuide):
    """A Gaussian on a model's unconstrained space, bent by a flow: ``z = loc + scale_tril @ flow(e)``, e standard normal.

    Parameters are those of ``flow``; ``loc`` and ``scale_tril`` are buffers. Medians and quantiles are of draws.

    Parameters
    ----------
    density
        Log density of the model, with its arguments.
    loc, scale_tril
        Of the Gaussian.
    flow
        The bijection, the identity at first.
    """

    def __init__(self, density: LogDensity, loc: Tensor, scale_tril: Tensor, flow: Flow) -> None:
        super().__init__(density, loc)
        self.register_buffer("loc", loc.to(self.dtype))
        self.register_buffer("scale_tril", scale_tril.to(self.dtype))
        self.flow = flow.to(self.dtype)

    def get_posterior(self, *args: object, **kwargs: object) -> dist.TransformedDistribution:
        """The distribution of the auxiliary vector."""
        base = dist.Normal(torch.zeros_like(self.loc), torch.ones_like(self.loc)).to_event(1)
        affine = dist.transforms.LowerCholeskyAffine(self.loc, scale_tril=self.scale_tril)
        return dist.TransformedDistribution(base, [*self.flow.layers, affine])

    @torch.no_grad()
    def quantiles(self, quantiles: list[float] | Tensor, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Quantiles of each entry of each site, of 10,000 draws, shape (quantiles, *site shape)."""
        with isolated(0):
            draws = self.get_posterior().sample((10_000,))
        wanted = torch.as_tensor(quantiles, dtype=draws.dtype)
        levels = torch.quantile(draws, wanted, dim=0)
        sites = [
            {site["name"]: biject_to(site["fn"].support)(u) for site, u in self._unpack_latent(level)}
            for level in levels
        ]
        return {name: torch.stack([values[name] for values in sites]) for name in sites[0]}

    def median(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Median of each entry of each site, of 10,000 draws."""
        return {name: values[0] for name, values in self.quantiles([0.5]).items()}


def bend(
    evaluate: Evaluations,
    gaussian: Gaussian,
    seed: int,
    path: list[dict[str, float]],
    after_step: Callable[[dict[str, float]], None] | None = None,
) -> tuple[Flow, Fit]:
    """Fit a flow on top of a Gaussian, by pathwise gradients of the ELBO.

    Adam goes in rounds; after each the averaged parameters are compared with the best so far on the same draws. Where the
    gain is within two standard errors the rate is halved, and it ends when that is small.

    Parameters
    ----------
    evaluate
        Log density and gradients.
    gaussian
        Where to start, of full covariance.
    seed
        Of draws and of the networks' hidden layers.
    path
        Entries of the steps before, which are gone on with.
    after_step
        Called with one entry per round.

    Returns
    -------
    tuple of Flow and Fit
        The best flow, and how it was found, with the Gaussian it started from.
    """
    dim, rng = evaluate.dim, np.random.default_rng(seed)
    fit = Fit(gaussian, False, f"not converged: {MOST_ROUNDS} rounds of {ROUND} steps were not enough", list(path))
    with isolated(seed):
        flow = Flow(dim)
    check = standard_draws(rng, CHECK_DRAWS, dim)
    best, rate, first = deepcopy(flow), RATE, len(path)
    averaged = deepcopy(flow)
    optimizer = torch.optim.Adam(flow.parameters(), lr=rate)
    try:
        most, _ = _elbo(evaluate, gaussian, best, check)
        for number in range(MOST_ROUNDS):
            for group in optimizer.param_groups:
                group["lr"] = rate
            total: list[Tensor] | None = None
            for step in range(ROUND):
                noise = standard_draws(rng, DRAWS, dim) if 2 * dim < DRAWS else rng.standard_normal((DRAWS, dim))
                _step(evaluate, gaussian, flow, optimizer, torch.from_numpy(noise))
                if step >= ROUND // 2:
                    now = [parameter.detach().clone() for parameter in flow.parameters()]
                    total = now if total is None else [a + b for a, b in zip(total, now, strict=True)]
            assert total is not None
            with torch.no_grad():
                for parameter, value in zip(averaged.parameters(), total, strict=True):
                    parameter.copy_(value / (ROUND - ROUND // 2))
            values, elbo = _elbo(evaluate, gaussian, averaged, check)
            rise = values - most
            error = float(rise.std() / math.sqrt(len(rise)))
            gain = float(rise.mean())
            entry = {"step": first + number, "elbo": elbo, "gradients": evaluate.gradients, "draws": DRAWS,
                     "step_size": rate, "gain": gain, "error": error}  # fmt: skip
            fit.path.append(entry)
            if after_step is not None:
                after_step(entry)
            if not gain > 2 * error:
                rate /= 2
            if gain > 0:
                best, most = deepcopy(averaged), values
            elif not math.isfinite(gain) or gain < -10 * error:  # too large steps: once more from the best
                flow.load_state_dict(best.state_dict())
                optimizer = torch.optim.Adam(flow.parameters(), lr=rate)
            if rate < LEAST_RATE:
                fit.converged = True
                fit.reason = f"converged: the last {ROUND} steps gained {gain:.2g} ± {error:.2g} nats at a small rate"
                break
    except TooManyGradients:
        fit.reason = f"not converged: {evaluate.gradients} gradients were not enough"
    return best, fit


def pushed(flow: Flow, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Standard normal draws through the flow, with the log determinants, shape (S,)."""
    x, log_det = noise, torch.zeros(len(noise), dtype=noise.dtype)
    for layer in flow.layers:
        assert isinstance(layer, SinhArcsinh | Autoregressive)
        x, of_layer = layer.push(x)
        log_det = log_det + of_layer
    return x, log_det


@torch.no_grad()
def look_through(
    evaluate: Evaluations, gaussian: Gaussian, flow: Flow, rng: np.random.Generator, count: int
) -> tuple[Weighted, float, float]:
    """Independent draws through the flow with their weights, and what it gains over the Gaussian at the same noise.

    Returns
    -------
    tuple of Weighted, float and float
        The draws; ELBO of the flow less that of the Gaussian, in nats; and its standard error.
    """
    noise = rng.standard_normal((count, evaluate.dim))
    white, log_det = pushed(flow, torch.from_numpy(noise))
    draws = gaussian.at(white.numpy())
    values, _ = evaluate(draws)
    straight, _ = evaluate(gaussian.at(noise))
    rise = values + log_det.numpy() - straight
    rise = rise[np.isfinite(rise)]
    log_q = (
        -0.5 * (noise**2).sum(1) - 0.5 * evaluate.dim * math.log(2 * math.pi) - gaussian.log_volume - log_det.numpy()
    )
    weighted = weigh(draws, values, log_q, log_q, evaluate.density.float64)
    return weighted, float(rise.mean()), float(rise.std() / math.sqrt(len(rise)))


def _step(evaluate: Evaluations, gaussian: Gaussian, flow: Flow, optimizer: torch.optim.Adam, noise: Tensor) -> None:
    white, log_det = pushed(flow, noise)
    values, gradients = evaluate(gaussian.at(white.detach().numpy()))
    inside = torch.from_numpy(np.isfinite(values))
    whitened = torch.from_numpy(gaussian.whitened(gradients))
    # of E[log p(z)], whose gradient in z is known, plus the entropy; draws outside the domain have no gradient
    loss = -(((whitened * white).sum(1) + log_det) * inside).sum() / len(noise)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
    optimizer.step()


@torch.no_grad()
def _elbo(evaluate: Evaluations, gaussian: Gaussian, flow: Flow, noise: np.ndarray) -> tuple[np.ndarray, float]:
    """Log weights up to a constant at draws from fixed noise, and the ELBO."""
    white, log_det = pushed(flow, torch.from_numpy(noise))
    values, _ = evaluate(gaussian.at(white.numpy()))
    weights = values + log_det.numpy()
    return weights, float(weights.mean() + gaussian.entropy)
