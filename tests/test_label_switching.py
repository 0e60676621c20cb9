"""Components that can trade places: found from the model's density, put in order, and not held against a fit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_elbo_ext import compare_to_mcmc, diagnose, exchangeable_components
from pyro_elbo_ext.comparison.ordering import in_order
from pyro_elbo_ext.inference_data.labels import Labels
from pyro_elbo_ext.programs.randomness import isolated
from pyro_elbo_ext.programs.symmetry import Components

Y = torch.tensor([-2.2, -1.9, 0.1, 0.3, 2.1, 1.8])


def mixture(y: Any = Y, weights: Any = (1.0, 1.0, 1.0)) -> None:
    w = pyro.sample("w", dist.Dirichlet(torch.tensor(weights)))
    with pyro.plate("components", 3):
        locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        scales = pyro.sample("scales", dist.LogNormal(0.0, 1.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(w), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(locs[z] @ torch.tensor([1.0, 0.5]), tau * scales[z]), obs=y)
    pyro.deterministic("counts", (z[:, None] == torch.arange(3)).sum(0))
    pyro.deterministic("total", (w[:, None] * locs).sum())
    pyro.deterministic("pairs", (w[:, None] * scales).flatten())


def hmm(stickiness: float = 1.0, first: Any = (1.0, 1.0, 1.0)) -> None:
    start = pyro.sample("start", dist.Dirichlet(torch.tensor(first)))
    with pyro.plate("states", 3):
        rows = pyro.sample("rows", dist.Dirichlet(torch.ones(3, 3) + stickiness * torch.eye(3)))
        locs = pyro.sample("locs", dist.Normal(0.0, 2.0))
    z = None
    for t in pyro.markov(range(4)):
        z = pyro.sample(f"z_{t}", dist.Categorical(start if z is None else rows[z]), infer={"enumerate": "parallel"})
        pyro.sample(f"y_{t}", dist.Normal(locs[z], 1.0), obs=Y[t])


def two_mixtures() -> None:
    with pyro.plate("components", 3):
        a, b = (pyro.sample(name, dist.Normal(0.0, scale)) for name, scale in (("a", 1.0), ("b", 2.0)))
    with pyro.plate("data", len(Y)):
        z, u = (pyro.sample(name, dist.Categorical(torch.ones(3))) for name in "zu")
        pyro.sample("y", dist.Normal(a[z] + b[u], 1.0), obs=Y)


def network() -> None:
    inner = pyro.sample("inner", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    outer = pyro.sample("outer", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(torch.tanh(Y[:, None] * inner) @ outer, 1.0).to_event(1), obs=Y)


def ordered() -> None:
    base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    locs = pyro.sample("locs", dist.TransformedDistribution(base, dist.transforms.OrderedTransform()))
    with pyro.plate("data", len(Y)):
        z = pyro.sample("z", dist.Categorical(torch.ones(3)))
        pyro.sample("y", dist.Normal(locs[z], 1.0), obs=Y)


def equal_data() -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", 3):
        theta = pyro.sample("theta", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=torch.ones(3))


def regression() -> None:
    with pyro.plate("data", len(Y)):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=Y)


def log_joint(model: Callable[[], None], values: dict[str, torch.Tensor]) -> float:
    return float(poutine.trace(poutine.condition(model, values)).get_trace().log_prob_sum())


MIXTURE = {"w": (-1,), "locs": (-2,), "scales": (-1,), "tau": (), "z": (), "counts": (-1,), "total": ()}
HMM = {"start": (-1,), "rows": (-2, -1), "locs": (-1,), **{f"z_{t}": () for t in range(4)}}


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (mixture, [(3, MIXTURE, ("z",), ("pairs",))]),
        (hmm, [(3, HMM, ("z_0", "z_1", "z_2", "z_3"), ())]),
        (
            two_mixtures,
            [
                (3, {"a": (-1,), "b": (), "z": (), "u": ()}, ("z",), ()),
                (3, {"a": (), "b": (-1,), "z": (), "u": ()}, ("u",), ()),
            ],
        ),
        (network, [(4, {"inner": (-1,), "outer": (-1,)}, (), ())]),
        (lambda: mixture(weights=(1.0, 1.0, 1.001)), []),
        (lambda: hmm(first=(1.0, 2.0, 1.0)), []),
        (ordered, []),
        (regression, []),
        (equal_data, []),
    ],
    ids=["mixture", "hmm", "two", "network", "unequal weights", "unequal start", "ordered", "data", "no order"],
)
def test_components_are_found(model: Callable[[], None], found: list[Any]) -> None:
    assert exchangeable_components(model) == tuple(Components(*each) for each in found)


@pytest.mark.parametrize("model", [mixture, hmm, two_mixtures, network])
def test_every_order_of_what_is_found_has_the_same_density(model: Callable[[], None]) -> None:
    """And no order of a part of it has."""
    with isolated(1):
        trace = poutine.trace(model).get_trace()
    values = {name: node["value"] for name, node in trace.nodes.items() if node["type"] == "sample"}
    for group in exchangeable_components(model):
        latent = {site: values[site] for site in group.axes if not trace.nodes[site]["infer"].get("_deterministic")}
        for order in itertools.permutations(range(group.size)):
            moved = dict(latent)
            for site in latent:
                for axis in group.axes[site]:
                    moved[site] = moved[site].index_select(axis, torch.tensor(order))
                if site in group.states:
                    moved[site] = torch.tensor(np.argsort(order))[moved[site]]
            assert log_joint(model, moved) == pytest.approx(log_joint(model, latent), abs=1e-4)
            if order == (1, 2, 0):
                part = {**moved, group.indexed[0]: latent[group.indexed[0]]}
                assert abs(log_joint(model, part) - log_joint(model, latent)) > 1e-3


def test_many_sites_are_not_listed_one_by_one() -> None:
    (found,) = exchangeable_components(hmm)
    assert (
        str(found)
        == "3 components of start (axis -1), rows (axis -2, axis -1), locs (axis -1), z_0, z_1, ..., z_3 (their states)"
    )


def test_a_prior_that_cannot_be_drawn_from() -> None:
    def flat() -> None:
        locs = pyro.sample("locs", dist.ImproperUniform(dist.constraints.real, (3,), ()))
        with pyro.plate("data", len(Y)):
            z = pyro.sample("z", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(locs[z], 1.0), obs=Y)

    with pytest.raises(ValueError, match="'locs' cannot be drawn") as caught:
        exchangeable_components(flat)
    assert "pass values=" in caught.value.__notes__[-1]
    (found,) = exchangeable_components(flat, values={"locs": torch.randn(3, 3)})
    assert found.axes == {"locs": (-1,), "z": ()}


def draws_of(model: Callable[[], None], chains: int = 2, draws: int = 30) -> Any:
    """Draws of the prior, as an export has them."""
    with isolated(0):
        traces = [poutine.trace(model).get_trace() for _ in range(chains * draws)]
    nodes = traces[0].nodes
    names = [name for name, node in nodes.items() if node["type"] == "sample" and not name.startswith(("y", "data"))]
    names = [name for name in names if name not in ("components", "states")]
    arrays = {name: np.stack([t.nodes[name]["value"].numpy() for t in traces]) for name in names}
    arrays = {name: array.reshape(chains, draws, *array.shape[1:]) for name, array in arrays.items()}
    return Labels(nodes=nodes).dataset(arrays, nodes)


@pytest.mark.parametrize(("model", "by"), [(mixture, ("locs", 1)), (mixture, "scales"), (hmm, "locs")])
def test_ordered_draws_are_other_names_of_the_same(model: Callable[[], None], by: Any) -> None:
    draws = draws_of(model)
    components = exchangeable_components(model)
    found, left = in_order(draws, components, by, (), "approx")
    assert not left
    key = found["locs"].values[..., 1] if by == ("locs", 1) else found[by].values
    assert (np.diff(key, axis=-1) >= 0).all()
    for chain, draw in itertools.product(range(2), range(0, 30, 7)):
        before, after = (
            {str(n): torch.tensor(v.values[chain, draw]) for n, v in side.data_vars.items()} for side in (draws, found)
        )
        assert log_joint(model, after) == pytest.approx(log_joint(model, before), abs=1e-4)
        if model is mixture:
            torch.testing.assert_close(after["locs"][after["z"]], before["locs"][before["z"]])
            torch.testing.assert_close(after["counts"], (after["z"][:, None] == torch.arange(3)).sum(0))
            torch.testing.assert_close(after["total"], before["total"])
        else:
            torch.testing.assert_close(
                after["rows"][after["z_1"], after["z_2"]], before["rows"][before["z_1"], before["z_2"]]
            )
    assert "pairs" not in found  # a flattened matrix


def shuffled(draws: Any, components: Components, seed: int) -> Any:
    """Draws with the components of each in an order of its own."""
    rng = np.random.default_rng(seed)
    key = rng.normal(size=(*[draws.sizes[dim] for dim in ("chain", "draw")], components.size))
    with_key = draws.assign(key=(("chain", "draw", "key_dim_0"), key))
    by_key = Components(components.size, {**components.axes, "key": (-1,)}, components.states, components.unclear)
    return in_order(with_key, [by_key], "key", (), "approx")[0].drop_vars("key")


@pytest.fixture(scope="module")
def sides() -> tuple[Any, Any, tuple[Components, ...]]:
    """The same draws in two orders; of a posterior whose components differ."""
    rng = np.random.default_rng(0)
    shape = (2, 1000)
    locs = rng.normal([-2.0, 0.0, 2.0], 0.1, (*shape, 3))
    z = (rng.random((*shape, 6)) < 0.2) + np.array([0, 0, 1, 1, 1, 0])
    draws = {
        "locs": np.stack([locs, rng.normal(size=locs.shape)], -1),
        "scales": np.exp(rng.normal([-1.0, 0.0, 1.0], 0.1, (*shape, 3))),
        "w": rng.dirichlet([50.0, 30.0, 20.0], shape),
        "tau": np.exp(rng.normal(0.0, 0.1, shape)),
        "z": z,
    }
    (components,) = exchangeable_components(mixture)
    named = Labels().dataset(draws, {})
    return named, shuffled(named, components, 1), (components,)


def test_comparison_says_that_components_are_exchangeable(sides: Any) -> None:
    approx, mcmc, components = sides
    plain = compare_to_mcmc(approx, mcmc)
    assert {"bad"} == set(plain.table.filter(like="scales", axis=0)["verdict"])
    assert "pass components=exchangeable_components(model, *args)" in plain.verdict
    found = compare_to_mcmc(approx, mcmc, components=components)
    assert set(found.table.drop("tau")["verdict"]) <= {"exchangeable", "good", "not enough draws to tell"}
    assert set(found.states["verdict"]) == {"exchangeable"}
    assert "no fault of the fit" in found.verdict
    assert "Worst: " in found.verdict
    ordered = compare_to_mcmc(approx, mcmc, components=components, ordered_by="scales")
    assert "exchangeable" not in {*ordered.table["verdict"], *ordered.states["verdict"]}
    np.testing.assert_allclose(ordered.table[["mean_diff", "log_sd_ratio"]], 0.0, atol=1e-12)
    np.testing.assert_array_equal(ordered.states["total_variation"], 0.0)
    assert not ordered.switching


def test_a_bad_fit_is_bad_in_any_order(sides: Any) -> None:
    approx, mcmc, components = sides
    wider = approx.assign(scales=approx["scales"] * 3.0)
    found = compare_to_mcmc(wider, mcmc, components=components)
    assert set(found.table.filter(like="scales", axis=0)["verdict"]) == {"bad"}
    assert set(compare_to_mcmc(wider, mcmc).table.filter(like="scales", axis=0)["verdict"]) == {"bad"}
    assert "scales" not in compare_to_mcmc(wider, mcmc).switching


def test_functions_of_draws_are_of_ordered_ones(sides: Any) -> None:
    approx, mcmc, components = sides
    made = {"first": lambda draws: draws["scales"][..., 0]}
    found = compare_to_mcmc(approx, mcmc, ["first"], transformed=made, components=components, ordered_by="scales")
    assert found.table.loc["first", "mean_diff"] == 0
    np.testing.assert_array_equal(found.mcmc["first"], mcmc["scales"].values.min(-1))


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, {"ordered_by": "scales", "components": None}, r"ordered_by needs .*exchangeable_components"),
        ({}, {"ordered_by": "tau"}, r"'tau', which no exchangeable components index. There are .*scales"),
        ({}, {"ordered_by": "locs"}, r"'locs' has \(2,\) for each component, an entry .*\('locs', 0\)"),
        ({}, {"ordered_by": ("locs", 2)}, r"index 2 at place 0 of 'locs' is outside its 2 entries"),
        ({}, {"ordered_by": "scales", "components": ()}, r"The model has none"),
        ({"pairs": np.ones((2, 1000, 9))}, {"ordered_by": "scales"}, r"'pairs' cannot be put .* var_names"),
        ({"other": np.ones((2, 1000, 3))}, {"ordered_by": "scales"}, r"'other' cannot be put .*no site of the model"),
        ({"w": np.ones((2, 1000, 4))}, {"ordered_by": "scales"}, r"'w' has shape \(4,\) .* the 3 components"),
        ({"z": np.full((2, 1000, 6), 3)}, {"ordered_by": "scales"}, r"'z' has states .* not 0 to 2"),
    ],
)
def test_what_cannot_be_ordered(sides: Any, change: Any, arguments: Any, message: str) -> None:
    approx, mcmc, components = sides
    given = {"components": components, **arguments}
    changed = {**{str(n): v.values for n, v in mcmc.data_vars.items()}, **change}
    with pytest.raises(ValueError, match=message):
        compare_to_mcmc({**{str(n): v.values for n, v in approx.data_vars.items()}, **change}, changed, **given)


def test_a_matrix_has_no_order() -> None:
    draws, components = draws_of(hmm), exchangeable_components(hmm)
    with pytest.raises(
        ValueError, match=r"'rows', which the components index along 2 axes.*Order by one of start, locs"
    ):
        compare_to_mcmc(draws, draws, components=components, ordered_by="rows")


LOCS, SD = (-1.0, 1.0), 0.1


def two_components() -> None:
    """A posterior that is known: two components around -1 and 1, in both orders."""
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 10.0).to_event(1).mask(False))
    places = torch.tensor(LOCS)
    both = torch.stack([dist.Normal(places, SD).log_prob(x), dist.Normal(places.flip(0), SD).log_prob(x)]).sum(-1)
    pyro.factor("both", both.logsumexp(0))


def one_order(shift: float = 0.0) -> None:
    pyro.sample("x", dist.Normal(torch.tensor(LOCS) + shift, SD).to_event(1))


def both_orders(chains: int = 4, draws: int = 500) -> dict[str, np.ndarray]:
    """Each chain in one of the orders."""
    x = np.random.default_rng(0).normal(LOCS, SD, (chains, draws, 2))
    x[::2] = x[::2, :, ::-1]
    return {"x": x}


@pytest.mark.parametrize(
    ("shift", "ordered_by", "verdict", "of_scalars"),
    [
        (0.0, None, "means only", "not known"),
        (0.0, "x", "good", "good"),
        (1.0, None, "do not use", "do not use"),
        (1.0, "x", "do not use", "do not use"),
    ],
)
def test_diagnosis_with_mcmc(shift: float, ordered_by: Any, verdict: str, of_scalars: str) -> None:
    found = diagnose(two_components, lambda: one_order(shift), mcmc=both_orders(), ordered_by=ordered_by, seed=0)
    assert (found.verdict, set(found.scalars["verdict"])) == (verdict, {of_scalars})
    (said,) = [finding for finding in found.findings if "in any order" in finding.statement]
    assert f"by up to {math.log(2):.2f} nats" in said.statement
    assert ("ordered_by='x'" in said.remedy) == (ordered_by is None)


def test_diagnosis_alone() -> None:
    """Of a guide of both orders, whose chains do not mix: in order they agree, and show that it is too wide."""

    def guide() -> None:
        both = torch.tensor([LOCS, LOCS[::-1]])
        pyro.sample("x", dist.MixtureOfDiagNormals(both, torch.full((2, 2), 1.2 * SD), torch.zeros(2)))

    figures = diagnose(two_components, guide, ordered_by="x", seed=0, num_draws=500).scalars
    assert set(figures["verdict"]) == {"means only"}
    assert ((figures["log_sd_ratio"] - math.log(1.2)).abs() < 4.5 * figures["log_sd_ratio_se"]).all()


def test_diagnosis_refuses_what_is_no_component() -> None:
    with pytest.raises(ValueError, match=r"'theta', which no exchangeable components index. The model has none"):
        diagnose(regression, lambda: regression_guide(), ordered_by="theta", seed=0)


def regression_guide() -> None:
    with pyro.plate("data", len(Y)):
        pyro.sample("theta", dist.Normal(Y / 2, math.sqrt(0.5)))
