"""Plates that subsample: guide and model are of the same rows, or it is an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import Tensor
from torch.distributions import constraints

from pyro_elbo_ext import (
    ChiUpperBound,
    CompiledSVI,
    DecomposedELBO,
    ImportanceWeightedELBO,
    RenyiELBO,
    psis_khat,
)
from pyro_elbo_ext.training.fit import fit

N = 30
Y = torch.linspace(-3, 3, N)
ROWS = torch.tensor([3, 17, 4, 28, 11])


def effects(idx: Tensor, y: Tensor) -> None:
    """A local latent, and data of the rows that are given."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
    with pyro.plate("data", N, subsample=idx):
        z = pyro.sample("z", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def with_plate(idx: Tensor, y: Tensor) -> pyro.plate:
    return pyro.plate("data", N, subsample=idx)


def own_indices(idx: Tensor, y: Tensor) -> None:
    loc = pyro.param("loc", torch.zeros(N))
    pyro.sample("scale", dist.LogNormal(0.0, 0.1))
    with pyro.plate("data", N, subsample_size=len(idx)) as rows:
        pyro.sample("z", dist.Normal(loc[rows], 0.4))


def same_indices(idx: Tensor, y: Tensor) -> None:
    loc = pyro.param("loc", torch.zeros(N))
    scale = pyro.param("scales", torch.ones(N), constraint=constraints.positive)
    pyro.sample("scale", dist.LogNormal(0.0, 0.1))
    with pyro.plate("data", N, subsample=idx.clone()) as rows:
        pyro.sample("z", dist.Normal(loc[rows], scale[rows]))


WRONG: dict[str, Callable[[], Callable[..., Any]]] = {
    "autonormal": lambda: AutoNormal(effects),
    "autodelta": lambda: AutoDelta(effects),
    "function": lambda: own_indices,
}
RIGHT: dict[str, Callable[[], Callable[..., Any]]] = {
    "autonormal": lambda: AutoNormal(effects, create_plates=with_plate),
    "function": lambda: same_indices,
}


def adam() -> pyro.optim.PyroOptim:
    return pyro.optim.Adam({"lr": 0.05})


def evaluated(loss: Callable[[], Any]) -> Callable[[Any], Any]:
    return lambda guide: loss().loss_and_grads(effects, guide, ROWS, Y[ROWS])


WAYS: dict[str, Callable[[Any], Any]] = {
    "decomposed": evaluated(DecomposedELBO),
    "three particles": evaluated(lambda: DecomposedELBO(num_particles=3)),
    "vmap": evaluated(lambda: DecomposedELBO(num_particles=3, vectorize_particles="vmap")),
    "plate": evaluated(lambda: DecomposedELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)),
    "sticking the landing": evaluated(lambda: DecomposedELBO(gradient="doubly_reparameterized")),
    "score function": evaluated(lambda: DecomposedELBO(num_particles=2, gradient="score_function")),
    "renyi": evaluated(lambda: RenyiELBO(alpha=0.5, num_particles=3)),
    "iwae": evaluated(lambda: ImportanceWeightedELBO(num_particles=3, local_plates=["data"])),
    "chi": evaluated(lambda: ChiUpperBound(num_particles=3)),
    "svi": lambda guide: SVI(effects, guide, adam(), DecomposedELBO()).step(ROWS, Y[ROWS]),
    "compiled": lambda guide: CompiledSVI(effects, guide, adam(), DecomposedELBO()).step(ROWS, Y[ROWS]),
    "compiled Pyro": lambda guide: CompiledSVI(effects, guide, adam(), Trace_ELBO()).step(ROWS, Y[ROWS]),
    "compiled, fallback": lambda guide: CompiledSVI(effects, guide, adam(), TraceMeanField_ELBO(), fallback=True).step(
        ROWS, Y[ROWS]
    ),
    "fit": lambda guide: fit(effects, guide, ROWS, Y[ROWS], num_steps=3, progress=False),
    "fit, Pyro's loss": lambda guide: fit(
        effects, guide, ROWS, Y[ROWS], num_steps=3, progress=False, loss=Trace_ELBO(), compiled=False
    ),
    "fit, batches": lambda guide: fit(
        effects, guide, batches=[(rows, Y[rows]) for rows in torch.arange(N).split(7)], num_steps=3, progress=False
    ),
    "psis": lambda guide: psis_khat(effects, guide, torch.arange(N).flip(0), Y.flip(0)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", WRONG)
def test_indices_of_its_own_are_an_error(kind: str, way: str) -> None:
    """Pyro trains it on rows that do not belong together: means 1.27 off where the sd is .1."""
    if kind == "autodelta" and way in ("renyi", "iwae", "chi", "psis", "score function"):
        pytest.skip("a point mass has no such objective")
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = WRONG[kind]()
    with pytest.raises(ValueError, match=r"plate 'data'.*create_plates"):
        WAYS[way](guide)
    if kind == "function":
        assert not pyro.param("loc", torch.zeros(N)).any()  # as it was made


@pytest.mark.parametrize("kind", RIGHT)
def test_indices_of_the_model_are_right(kind: str) -> None:
    """Over the batches of an epoch, the gradients for the rows' own parameters are those of all data at once."""
    pyro.clear_param_store()
    guide = RIGHT[kind]()
    guide(torch.arange(N), Y)
    with torch.no_grad():
        for p in pyro.get_param_store()._params.values():
            p.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.3)
    loss = DecomposedELBO()

    def gradients(*batches: Tensor) -> dict[str, Tensor]:
        params = pyro.get_param_store()._params
        for p in params.values():
            p.grad = None
        for rows in batches:
            pyro.set_rng_seed(0)
            loss.loss_and_grads(effects, guide, rows, Y[rows])
        return {name: p.grad.clone() for name, p in params.items() if p.grad is not None}

    name = next(name for name in pyro.get_param_store()._params if name in ("loc", "AutoNormal.locs.z"))
    one = gradients(ROWS)[name]
    moved = torch.zeros(N, dtype=torch.bool)
    moved[ROWS] = True
    assert bool((one[moved] != 0).all())
    assert not one[~moved].any()


def test_the_models_plate_takes_the_guides_draw_where_it_gives_none() -> None:
    """Pyro's own way, in which model and guide are of the same rows: nothing to refuse."""

    def model() -> None:
        with pyro.plate("data", N, subsample_size=6) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=Y[rows])

    pyro.clear_param_store()
    result = fit(model, AutoNormal(model), num_steps=5, progress=False, compiled=False)
    assert result.num_steps == 5
    CompiledSVI(model, result.guide, adam(), DecomposedELBO()).step()


def test_compiled_steps_take_indices_as_arguments() -> None:
    pyro.clear_param_store()
    guide = AutoNormal(effects, create_plates=with_plate)
    guide(ROWS, Y[ROWS])
    pyro.set_rng_seed(2)
    eager = SVI(effects, guide, adam(), DecomposedELBO())
    start = {name: p.detach().clone() for name, p in pyro.get_param_store()._params.items()}
    batches = [torch.randperm(N)[:5] for _ in range(4)]
    pyro.set_rng_seed(3)
    expected = [eager.step(rows, Y[rows]) for rows in batches]
    with torch.no_grad():
        for name, value in start.items():
            pyro.get_param_store()._params[name].copy_(value)
    compiled = CompiledSVI(effects, guide, adam(), DecomposedELBO(), backend="eager")
    pyro.set_rng_seed(3)
    found = [float(compiled.step(rows, Y[rows])) for rows in batches]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("size", [None, 12])
def test_other_size_in_the_guide_is_an_error(size: int | None) -> None:
    """A local site of a plate that subsamples, in a plate of another size or in none: its log q would count otherwise."""

    def guide(idx: Tensor, y: Tensor) -> None:
        pyro.sample("scale", dist.LogNormal(0.0, 0.1))
        with pyro.plate(
            "other" if size is None else "data", len(idx) if size is None else size, subsample_size=len(idx)
        ):
            pyro.sample("z", dist.Normal(0.0, pyro.param("s", torch.tensor(1.0))))

    def model(idx: Tensor, y: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
        with pyro.plate("data", N, subsample_size=len(y)):
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    for loss in (DecomposedELBO(), ImportanceWeightedELBO(num_particles=2)):
        pyro.clear_param_store()
        with pytest.raises(ValueError, match="'z' stands for 6 draws in the model and for"):
            loss.loss_and_grads(model, guide, ROWS, Y[ROWS])
