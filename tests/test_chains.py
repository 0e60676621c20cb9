"""Summed-out sites that form chains: one operator in place of a contraction, with the same values, rows and gradients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import Tensor

from pyro_elbo_ext import CompiledSVI, DecomposedELBO
from pyro_elbo_ext.compile.machine_code.native import NativeSteps
from pyro_elbo_ext.programs import alike
from pyro_elbo_ext.terms.enumeration import marginals
from pyro_elbo_ext.terms.enumeration.chains import chain_of, sum_of_chain

Program = Callable[..., Any]


def factors(layers: int = 5, batch: int = 2, states: int = 3, shared: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    alone = torch.randn((layers, batch, states), generator=generator, dtype=torch.float64)
    shape = (layers - 1, 1 if shared else batch, states, states)
    return alone, 3 * torch.randn(shape, generator=generator, dtype=torch.float64)


def over_paths(alone: Tensor, between: Tensor) -> Tensor:
    """The log of the sum, path by path, shape ``(batch,)``."""
    layers, _, states = alone.shape
    paths = []
    for path in itertools.product(range(states), repeat=layers):
        terms = [alone[t, :, i] for t, i in enumerate(path)]
        terms += [between[t, :, i, j].expand(alone.shape[1]) for t, (i, j) in enumerate(itertools.pairwise(path))]
        paths.append(torch.stack(terms).sum(0))
    return torch.stack(paths).logsumexp(0)


@pytest.mark.parametrize("shared", [False, True])
def test_sum_and_posterior_are_those_over_all_paths(shared: bool) -> None:
    alone, between = factors(shared=shared)
    between[1, 0, 0] = -math.inf  # a state without a way on
    log_sum, of_alone, of_between = sum_of_chain(alone, between)
    leaves = alone.requires_grad_(), between.requires_grad_()
    expected = over_paths(*leaves)
    torch.testing.assert_close(log_sum, expected.detach(), rtol=0, atol=1e-12)
    for_alone, for_between = torch.autograd.grad(expected.sum(), leaves)
    torch.testing.assert_close(of_alone, for_alone, rtol=0, atol=1e-12)
    summed = of_between.sum(1, keepdim=True) if shared else of_between
    torch.testing.assert_close(summed, for_between.nan_to_num(0.0), rtol=0, atol=1e-12)


def test_where_no_path_is_possible() -> None:
    alone, between = factors()
    between[2, 1] = -math.inf
    log_sum, of_alone, of_between = sum_of_chain(alone, between)
    assert log_sum.isinf().tolist() == [False, True]
    assert of_alone[:, 1].eq(0).all()
    assert of_between[:, 1].eq(0).all()


@pytest.mark.parametrize("shared", [False, True])
def test_batches_of_chains(shared: bool) -> None:
    alone, between = factors(shared=shared)
    several = torch.stack([alone, alone.flip(0), 2 * alone])
    found = torch.vmap(sum_of_chain, in_dims=(0, None))(several, between)
    for i, one in enumerate(several):
        for ours, expected in zip(found, sum_of_chain(one, between), strict=True):
            torch.testing.assert_close(ours[i], expected, rtol=0, atol=1e-12)


# Programs

DATA = torch.tensor([[0.1, -0.4], [0.9, 0.2], [1.3, -1.0], [-0.3, 0.8], [0.2, 0.7], [1.1, -0.6]], dtype=torch.float64)
TABLE = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5]], dtype=torch.float64)


def _locs() -> Tensor:
    locs: Tensor = pyro.sample("locs", dist.Normal(torch.tensor([-1.0, 0.0, 1.0]).double(), 1.0).to_event(1))
    return locs


def sequences(data: Tensor) -> None:
    """In a plate; with a mask, and a second observation at every other time."""
    locs, x = _locs(), 0
    with pyro.plate("sequences", 2, dim=-1):
        for t in pyro.markov(range(len(data))):
            x = pyro.sample(f"x_{t}", dist.Categorical(TABLE[x]))
            with poutine.mask(mask=torch.tensor([True, t < 4])):
                pyro.sample(f"y_{t}", dist.Normal(locs[x], 1.0), obs=data[t])
            if t % 2 == 0:
                pyro.sample(f"z_{t}", dist.Bernoulli(logits=locs[x]), obs=(data[t] > 0).double())


def scaled_sequences(data: Tensor) -> None:
    with poutine.scale(scale=0.3):
        sequences(data)


def without_data_for_each(data: Tensor) -> None:
    """Only the last state is seen."""
    locs, x = _locs(), 0
    for t in pyro.markov(range(len(data))):
        x = pyro.sample(f"x_{t}", dist.Categorical(locs.softmax(-1) * TABLE[x]))
        if t == len(data) - 1:
            pyro.sample("y", dist.Normal(locs[x], 1.0), obs=data[0, 0])


def tied(data: Tensor) -> None:
    """Two chains that meet in the data, of 3 and 2 states: their posterior does not split by site."""
    locs, x, w = _locs(), 0, 0
    with pyro.plate("sequences", 2, dim=-1):
        for t in pyro.markov(range(len(data))):
            w = pyro.sample(f"w_{t}", dist.Categorical(TABLE[:2, :2][w]))
            x = pyro.sample(f"x_{t}", dist.Categorical(TABLE[x]))
            pyro.sample(f"y_{t}", dist.Normal(locs[x] + w, 1.0), obs=data[t])


def second_order(data: Tensor) -> None:
    locs, a, b = _locs(), torch.tensor(0), torch.tensor(1)
    for t in pyro.markov(range(8), history=2):
        a, b = b, pyro.sample(f"x_{t}", dist.Categorical(0.5 * TABLE[a] + 0.5 * TABLE[b]))
        pyro.sample(f"y_{t}", dist.Normal(locs[b], 1.0), obs=data[t % 6, 0])


MODELS = [sequences, scaled_sequences, without_data_for_each, tied, second_order]
NESTING = {without_data_for_each: 0, second_order: 0}


def evaluated(elbo: Any, model: Program, guide: Program) -> tuple[float, dict[str, Tensor]]:
    parameters = dict(pyro.get_param_store().named_parameters())
    for parameter in parameters.values():
        parameter.grad = None
    pyro.set_rng_seed(5)
    loss = elbo.loss_and_grads(config_enumerate(model), guide, DATA)
    return loss, {name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None}


def guide_of(model: Program, of: Callable[..., Any] = AutoNormal) -> Any:
    pyro.set_rng_seed(3)
    guide = of(poutine.block(model, expose=["locs"]))
    guide(DATA)
    return guide


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_rows_and_gradients_are_those_of_the_contraction(model: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    guide, nesting = guide_of(model), NESTING.get(model, 1)
    loss, gradients = evaluated(TraceEnum_ELBO(max_plate_nesting=nesting), model, guide)
    taken: list[bool] = []

    def noted(*of: Any) -> Any:
        found = chain_of(*of)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(marginals, "chain_of", noted)
    terms = []
    for _ in range(2):
        elbo = DecomposedELBO(max_plate_nesting=nesting, kl="sampled")
        ours, our_gradients = evaluated(elbo, model, guide)
        assert ours == pytest.approx(loss, abs=1e-10)
        for name, gradient in gradients.items():
            torch.testing.assert_close(our_gradients[name], gradient, rtol=0, atol=1e-10)
        terms.append(elbo.last)
        monkeypatch.setattr(marginals, "chain_of", lambda *of: None)
        monkeypatch.setattr(alike, "FEWEST", 1000)
    assert taken == [True]
    of_chain, contracted = terms
    assert of_chain is not None
    assert contracted is not None
    assert list(of_chain) == list(contracted)
    for name, term in contracted.items():
        for what in ("log_p", "log_q"):
            expected, found = getattr(term, what), getattr(of_chain[name], what)
            pairs = (
                [(found, expected)] if isinstance(expected, Tensor) else zip(found or (), expected or (), strict=True)
            )
            for a, b in pairs:
                torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    for site in contracted.marginals():
        found, expected = (torch.as_tensor(of[site].values) for of in (of_chain.marginals(), contracted.marginals()))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_wide_layers_are_left_to_the_contraction() -> None:
    densities = [torch.zeros(9, 9, 9) for _ in range(6)]
    for i, density in enumerate(densities):
        density._pyro_dims = "abcdefghij"[i : i + 3]  # type: ignore[attr-defined]
    assert chain_of(densities, [None] * 6, set("abcdefghij"), [None] * 6) is None


# Compiled


def stepped(make: Any, model: Program, steps: int, guide: Any = AutoNormal, **options: Any) -> tuple[list[float], Any]:
    pyro.clear_param_store()
    marked, guide = config_enumerate(model), guide_of(model, guide)
    svi = make(marked, guide, pyro.optim.Adam({"lr": 0.01}), TraceEnum_ELBO(max_plate_nesting=1), **options)
    pyro.set_rng_seed(7)
    return [svi.step(DATA) for _ in range(steps)], svi


def overwriting(data: Tensor) -> None:
    """What is computed again from the same is written to once: the graph must not take both for one."""
    locs, x = _locs(), 0
    with pyro.plate("sequences", 2, dim=-1):
        for t in pyro.markov(range(5)):
            rows = torch.exp(locs * 0.1) + 1.0
            if t == 3:
                rows += 4.0
            x = pyro.sample(f"x_{t}", dist.Categorical(rows * TABLE[x]))
            pyro.sample(f"y_{t}", dist.Normal(locs[x], 1.0), obs=data[t])


@pytest.mark.parametrize("model", [tied, overwriting], ids=lambda model: model.__name__)
def test_graphs_equal_pyro(model: Program) -> None:
    expected, _ = stepped(SVI, model, 4)
    ours, svi = stepped(CompiledSVI, model, 4, backend="eager")
    assert svi.eager_reason is None
    assert ours == pytest.approx(expected, abs=1e-8)


def test_operators_for_each_time_are_few() -> None:
    counts = []
    for length in (8, 16):

        def hmm(data: Tensor, length: int = length) -> None:
            locs, x = _locs(), 0
            with pyro.plate("sequences", 2, dim=-1):
                for t in pyro.markov(range(length)):
                    x = pyro.sample(f"x_{t}", dist.Categorical(locs.softmax(-1) * TABLE[x]))
                    pyro.sample(f"y_{t}", dist.Normal(locs[x], 1.0), obs=data[t % 6])

        _, svi = stepped(CompiledSVI, hmm, 2, backend="eager")
        (program,) = svi._programs.values()
        counts.append(program.operators)
    assert counts[1] - counts[0] <= 12 * 8, counts


def test_chains_in_c() -> None:
    expected, _ = stepped(SVI, tied, 6, AutoDelta)  # which draws nothing
    ours, svi = stepped(CompiledSVI, tied, 6, AutoDelta)
    (program,) = svi._programs.values()
    assert isinstance(program._native, NativeSteps)
    assert ours == pytest.approx(expected, abs=1e-8)
