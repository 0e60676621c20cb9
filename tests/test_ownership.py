"""A result gives what its own parameters give, whatever has come since."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_elbo_ext import DecomposedELBO, psis_khat
from pyro_elbo_ext.training.automatic_fit import AutomaticFit
from pyro_elbo_ext.training.fit import fit
from pyro_elbo_ext.training.result import FitResult

HERE = torch.full((20,), 3.0)
THERE = torch.full((20,), -7.0)


def model(y: Tensor) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(m.sum(-1), 1.0), obs=y)


def by_hand(y: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor(0.0))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    pyro.sample("m", dist.Normal(loc, scale).expand([2]).to_event(1))


class Guide(PyroModule):
    """A tensor of each kind that a module may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4, momentum=1.0), nn.Linear(4, 1))
        self.shift = nn.Parameter(torch.tensor(0.0))
        self.scale = PyroParam(torch.tensor(1.0), constraints.positive)

    def forward(self, y: Tensor) -> None:
        loc = self.net(y[:, None]).mean() + self.shift
        pyro.sample("m", dist.Normal(loc, self.scale).expand([2]).to_event(1))


def encoder() -> Callable[..., Any]:
    """A plain module in a closure, which Pyro only knows by its name."""
    net, bias = nn.Linear(1, 1), [nn.Linear(1, 1), nn.Linear(1, 1)]

    def guide(y: Tensor) -> None:
        pyro.module("encoder", net)
        for i, part in enumerate(bias):
            pyro.module(f"bias{i}", part)
        loc = net(y.mean().reshape(1)) + sum(part(torch.ones(1)) for part in bias)
        pyro.sample("m", dist.Normal(loc[0], 0.3).expand([2]).to_event(1))

    return guide


GUIDES: dict[str, Callable[[], Callable[..., Any]]] = {
    "function": lambda: by_hand,
    "normal": lambda: AutoNormal(model),
    "full": lambda: AutoMultivariateNormal(model),
    "flow": lambda: AutoIAFNormal(model, hidden_dim=[4]),
    "modules": Guide,
    "closure": encoder,
}


def trained(guide: Callable[..., Any], y: Tensor, steps: int = 60) -> FitResult:
    return fit(
        model, guide, y, optim=pyro.optim.Adam({"lr": 0.1}), num_steps=steps, compiled=False, progress=False, seed=1
    )


def given(result: FitResult) -> tuple[Tensor, float, Any]:
    draws = result.draws(50, seed=2)["m"]
    tree = result.to_arviz(num_samples=5, seed=2, prior=False, posterior_predictive=False)
    with result.own_parameters():
        sample = psis_khat(result.model, result.guide, *result.args, num_draws=20, seed=3)
    return draws, float(sample.log_weights.sum()), tree["posterior"]["m"].values.tolist()


def numbers() -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in pyro.get_param_store()._params.items()}


# What may come between a fit and what is asked of it


def another_fit(kind: str, result: FitResult) -> None:
    if kind in ("flow", "modules", "closure"):  # a new module under a name that the store has
        with pytest.raises(ValueError, match="not registered with Pyro"):
            trained(GUIDES[kind](), THERE)
    else:
        trained(GUIDES[kind](), THERE)


def same_guide_again(kind: str, result: FitResult) -> None:
    trained(result.guide, THERE)


def cleared(kind: str, result: FitResult) -> None:
    pyro.clear_param_store()


def cleared_and_another_fit(kind: str, result: FitResult) -> None:
    pyro.clear_param_store()
    trained(GUIDES[kind](), THERE)
    result.guide(THERE)  # by hand: Pyro gives the modules of the old guide what the store has now


def spoiled_in_place(kind: str, result: FitResult) -> None:
    with torch.no_grad():
        for p in pyro.get_param_store()._params.values():
            p.add_(5.0)
        if isinstance(result.guide, nn.Module):
            for tensor in (*result.guide.parameters(), *result.guide.buffers()):
                tensor.add_(1)


@pytest.mark.filterwarnings("ignore:.*was not registered in the param store")
@pytest.mark.parametrize(
    "happen",
    [another_fit, same_guide_again, cleared, cleared_and_another_fit, spoiled_in_place],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("kind", GUIDES)
def test_what_comes_later_changes_nothing(kind: str, happen: Callable[[str, FitResult], None]) -> None:
    pyro.clear_param_store()
    result = trained(GUIDES[kind](), HERE)
    if isinstance(result.guide, nn.Module):
        result.guide.eval()
    draws, weights, exported = given(result)
    happen(kind, result)
    if isinstance(result.guide, nn.Module):
        result.guide.eval()
    before = numbers()
    modules = list(result.guide.parameters()) if isinstance(result.guide, nn.Module) else []
    again = given(result)
    assert torch.equal(again[0], draws)
    assert again[1] == weights
    assert again[2] == exported
    after = numbers()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)  # what is there now is left as it is
    if modules:
        assert all(a is b for a, b in zip(modules, result.guide.parameters(), strict=True))


def test_saved_file_has_the_results_own(tmp_path: Path) -> None:
    pyro.clear_param_store()
    result = trained(by_hand, HERE)
    draws, elbo = result.draws(50, seed=2)["m"], result.diagnose(num_draws=100, seed=3).evidence.elbo
    trained(by_hand, THERE)
    assert result.diagnose(num_draws=100, seed=3).evidence.elbo == elbo
    result.save(tmp_path / "fit.pt")
    pyro.clear_param_store()
    loaded = FitResult.load(tmp_path / "fit.pt", model, by_hand, HERE)
    trained(by_hand, THERE)
    assert torch.equal(loaded.draws(50, seed=2)["m"], draws)
    assert loaded.diagnose(num_draws=100, seed=3).evidence.elbo == elbo


@pytest.mark.parametrize("again", [lambda r: pickle.loads(pickle.dumps(r)), copy.deepcopy], ids=["pickle", "deepcopy"])
@pytest.mark.parametrize("kind", ["function", "normal"])
def test_copies_own_theirs(kind: str, again: Callable[[FitResult], FitResult]) -> None:
    pyro.clear_param_store()
    result = trained(GUIDES[kind](), HERE)
    draws = result.draws(50, seed=2)["m"]
    other = again(result)
    trained(result.guide, THERE)
    pyro.clear_param_store()
    assert torch.equal(other.draws(50, seed=2)["m"], draws)
    assert torch.equal(result.draws(50, seed=2)["m"], draws)


def test_elbo_stays_when_the_loss_goes_on() -> None:
    pyro.clear_param_store()
    loss = DecomposedELBO()
    result = fit(model, by_hand, HERE, loss=loss, num_steps=50, compiled=False, progress=False, seed=1)
    elbo = result.elbo
    fit(model, by_hand, THERE, loss=loss, num_steps=50, compiled=False, progress=False, seed=1)
    assert result.elbo == elbo


def test_automatic_guides_own_theirs() -> None:
    result = fit(model, "auto", HERE, seed=1, progress=False)
    assert isinstance(result, AutomaticFit)
    expected = result.draws(20, seed=2)["m"]
    flow = result.refine(seed=3, progress=False)
    with torch.no_grad():
        for p in result.guide.parameters():
            p.add_(4.0)
    assert torch.equal(result.draws(20, seed=2)["m"], expected)
    summary = result.summary()  # evaluated when first asked for
    assert abs(summary["mean"].iloc[-1] - result.elbo) < 0.1
    assert torch.equal(result.refine(seed=3, progress=False).draws(20, seed=2)["m"], flow.draws(20, seed=2)["m"])
    assert any("other numbers now" in line for line in result.lines())


def test_it_says_what_is_no_longer_the_same_and_puts_it_back() -> None:
    pyro.clear_param_store()
    first = trained(AutoNormal(model), HERE)
    assert first.went_on_from == ()
    assert not any("numbers" in line or "went on" in line for line in first.lines())
    second = trained(AutoNormal(model), THERE)
    assert set(second.went_on_from) == {"AutoNormal.locs.m", "AutoNormal.scales.m"}
    assert "went on from parameters that were there before: 'AutoNormal.locs.m'" in repr(second)
    changed = next(line for line in first.lines() if "other numbers now" in line)
    assert "AutoNormal.locs.m" in changed
    assert not any("other numbers now" in line for line in second.lines())
    draws = first.draws(20, seed=2)["m"]
    first.restore_parameters()
    pyro.set_rng_seed(4)
    by_guide = torch.stack([first.guide(HERE)["m"].detach() for _ in range(50)]).mean()
    assert abs(float(by_guide) - float(draws.mean())) < 0.5
    assert not any("other numbers now" in line for line in first.lines())


def test_parameters_that_are_new_are_an_error() -> None:
    pyro.clear_param_store()
    extra = []

    def guide(y: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        scale = pyro.param("more", torch.tensor(1.0)) if extra else 1.0
        pyro.sample("m", dist.Normal(loc, scale).expand([2]).to_event(1))

    result = fit(model, guide, HERE, loss=Trace_ELBO(), num_steps=5, compiled=False, progress=False)
    extra.append(True)
    with pytest.raises(ValueError, match="parameter 'more' is new"):
        result.draws(5)
