"""Draws of summed-out sites and probabilities of their states, against sums over all states written out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from torch import Tensor

from pyro_elbo_ext.programs.randomness import seeded
from pyro_elbo_ext.terms.enumeration.at_draws import AtDraws
from pyro_elbo_ext.terms.enumeration.posterior_draws import completed, draw_states, log_joint, state_probabilities

S = 20_000
pytestmark = pytest.mark.usefixtures("double")


@pytest.fixture
def double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Problem(NamedTuple):
    """A model, its other latent sites at two points, and its discrete sites with all values of one element."""

    model: Callable[..., Any]
    points: dict[str, Tensor]  # two of each
    discrete: dict[str, tuple[tuple[int, ...], list[Any]]]  # batch shape, and states
    looped: bool = False


def two(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


X = [0.3, -1.1, 2.0]


@config_enumerate
def mixture() -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("components", 3):
        locs = pyro.sample("locs", dist.Normal(0.0, 2.0))
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(locs[z], 0.7), obs=torch.tensor(X))
        pyro.deterministic("loc_of", locs[z])


@config_enumerate
def markov() -> None:
    rows = pyro.sample("rows", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
    z = torch.tensor(0)
    for t in pyro.markov(range(4)):
        z = pyro.sample(f"z_{t}", dist.Categorical(rows[z]))
        pyro.sample(f"x_{t}", dist.Normal(z.to(rows.dtype), 0.8), obs=torch.tensor([0.2, 0.9, 0.1, 1.4][t]))


@config_enumerate
def sequences() -> None:
    """Two chains with a common discrete site above them, of unequal length, and tones in a plate inside."""
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    regime = pyro.sample("regime", dist.Bernoulli(0.4))
    tones = pyro.plate("tones", 2, dim=-1)
    with pyro.plate("sequences", 2, dim=-2):
        z = torch.zeros(2, 1)
        for t in pyro.markov(range(2)):
            with poutine.mask(mask=torch.tensor([[True], [t < 1]])):
                z = pyro.sample(f"z_{t}", dist.Bernoulli(0.2 + 0.6 * p * z + 0.1 * regime))
                with tones:
                    data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
                    pyro.sample(f"x_{t}", dist.Bernoulli(0.3 + 0.5 * z), obs=data)


@config_enumerate
def nested() -> None:
    """Several dependent sites: a global one, one in a plate, one in the plate inside, of different kinds."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    k = pyro.sample("k", dist.Binomial(2, torch.sigmoid(a)))
    with pyro.plate("groups", 2, dim=-2):
        b = pyro.sample("b", dist.Bernoulli(torch.sigmoid(a + k)))
        with pyro.plate("items", 2, dim=-1):
            c = pyro.sample("c", dist.OneHotCategorical(logits=torch.stack([a + 0 * b, b], -1)))
            loc = c @ torch.tensor([-1.0, 1.5])
            pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor([[0.1, 1.0], [-0.7, 2.0]]))


@config_enumerate
def hidden_cause() -> None:
    """A continuous local site whose prior depends on a discrete one, masked elements, and one state alone."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    pyro.sample("only", dist.Categorical(torch.ones(1)))
    with pyro.plate("data", 3), poutine.mask(mask=torch.tensor([True, True, False])):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        theta = pyro.sample("theta", dist.Normal(2 * z, scale))
        pyro.sample("x", dist.Normal(theta + z, 1.0), obs=torch.tensor(X))


@config_enumerate
def imputed() -> None:
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    with pyro.plate("data", 3):
        mask = torch.tensor([True, False, False])
        y = pyro.sample("y", dist.Bernoulli(p), obs=torch.ones(3), obs_mask=mask)
        pyro.sample("x", dist.Normal(y, 1.0), obs=torch.tensor(X))


@config_enumerate
def by_hand() -> None:
    """A program that reads a draw into Python, so that draws are run one after the other."""
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    z = pyro.sample("z", dist.Bernoulli(float(p)))
    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.8))


@config_enumerate
def discrete_alone() -> None:
    z = pyro.sample("z", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
    pyro.sample("x", dist.Normal(z.to(torch.float64), 1.0), obs=torch.tensor(0.8))


ONE_HOT = list(torch.eye(2, dtype=torch.float64))
BITS = [0.0, 1.0]
PROBLEMS = {
    "mixture": Problem(
        mixture,
        {"weights": two([0.2, 0.5, 0.3], [0.6, 0.1, 0.3]), "locs": two([-1.0, 0.2, 2.0], [0.5, 0.0, -0.5])},
        {"z": ((3,), [0, 1, 2])},
    ),
    "markov": Problem(
        markov,
        {"rows": two([[0.7, 0.3], [0.2, 0.8]], [[0.5, 0.5], [0.9, 0.1]])},
        {f"z_{t}": ((), [0, 1]) for t in range(4)},
    ),
    "sequences": Problem(
        sequences, {"p": two(0.3, 0.8)}, {"regime": ((), BITS), "z_0": ((2, 1), BITS), "z_1": ((2, 1), BITS)}
    ),
    "nested": Problem(
        nested,
        {"a": two(0.3, -0.8)},
        {"k": ((), [0.0, 1.0, 2.0]), "b": ((2, 1), BITS), "c": ((2, 2), ONE_HOT)},
    ),
    "hidden cause": Problem(
        hidden_cause,
        {"scale": two(0.8, 2.0), "theta": two([0.1, 1.9, 0.4], [1.0, 1.2, -1.0])},
        {"only": ((), [0]), "z": ((3,), BITS)},
    ),
    "imputed": Problem(imputed, {"p": two(0.3, 0.8)}, {"y_unobserved": ((3,), BITS)}),
    "by hand": Problem(by_hand, {"p": two(0.3, 0.8)}, {"z": ((), BITS)}, looped=True),
}


def table(problem: Problem, point: int, free: Callable[[str, tuple[int, ...]], bool]) -> tuple[list[Any], Tensor]:
    """All joint states and their log joint densities, by a run of the model at each: what is masked has its prior.

    Elements that are not ``free`` are held at their first state: they are observed, and count nothing.
    """
    elements = [
        (name, index)
        for name, (shape, _) in problem.discrete.items()
        for index in itertools.product(*map(range, shape))
        if free(name, index)
    ]
    states, densities = [], []
    for choice in itertools.product(*[range(len(problem.discrete[name][1])) for name, _ in elements]):
        values = {name: draws[point] for name, draws in problem.points.items()}
        indices = {name: torch.zeros(shape, dtype=torch.long) for name, (shape, _) in problem.discrete.items()}
        for (name, index), state in zip(elements, choice, strict=True):
            indices[name][index] = state
        for name, (_, support) in problem.discrete.items():
            values[name] = torch.stack([torch.as_tensor(value) for value in support])[indices[name]]
        trace = poutine.trace(poutine.condition(problem.model, data=values)).get_trace()
        trace.compute_log_prob()
        states.append(choice)
        sites = {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}
        others = sum(float(site["log_prob"].sum()) for name, site in sites.items() if name not in problem.discrete)
        densities.append(others + sum(float(sites[name]["unscaled_log_prob"][index]) for name, index in elements))
    return states, torch.tensor(densities)


def free_in(name: str) -> Callable[[str, tuple[int, ...]], bool]:
    return lambda site, index: not (name == "imputed" and index == (0,))


@pytest.mark.parametrize("name", PROBLEMS)
def test_draws_have_the_exact_joint_posterior(name: str) -> None:
    problem = PROBLEMS[name]
    count = S if not problem.looped else 300
    for point in (0, 1):
        # the same point many times: then the frequencies are known
        draws = {site: value[point].expand(count, *value.shape[1:]) for site, value in problem.points.items()}
        with seeded(point + 1):
            model = AtDraws(problem.model, (), {}, draws)
            states = draw_states(model)
        assert (model.looped is not None) == problem.looped
        free = free_in(name)
        columns = []
        for site, (shape, support) in problem.discrete.items():
            values = torch.stack([torch.as_tensor(value) for value in support])
            assert states[site].shape == (count, *shape, *values.shape[1:])
            for index in itertools.product(*map(range, shape)):
                if free(site, index):
                    one = states[site][(slice(None), *index)]
                    matches = (one.unsqueeze(1) == values).reshape(count, len(values), -1).all(2)
                    assert bool((matches.sum(1) == 1).all())
                    columns.append((matches.long().argmax(1), len(values)))
        keys = torch.zeros(count, dtype=torch.long)
        for column, size in columns:
            keys = keys * size + column
        _, densities = table(problem, point, free)
        exact = densities.softmax(0)
        found = torch.bincount(keys, minlength=len(exact)) / count
        errors = (found - exact) / (exact * (1 - exact) / count + 1e-12).sqrt()
        assert errors[exact * count > 20].abs().max() < 4.5
        rare = exact * count <= 20  # together
        assert (
            abs(float(found[rare].sum() - exact[rare].sum())) < 4.5 * math.sqrt(float(exact[rare].sum()) / count) + 1e-9
        )


@pytest.mark.parametrize("name", PROBLEMS)
def test_probabilities_and_joint_density_are_exact(name: str) -> None:
    problem = PROBLEMS[name]
    model = AtDraws(problem.model, (), {}, problem.points)
    free = free_in(name)
    totals, expected = [], dict.fromkeys(problem.discrete, 0.0)
    for point in (0, 1):
        states, densities = table(problem, point, free)
        totals.append(densities.logsumexp(0))
        weights = densities.softmax(0)
        column = 0
        for site, (shape, support) in problem.discrete.items():
            exact = torch.zeros(*shape, len(support))
            for index in itertools.product(*map(range, shape)):
                if free(site, index):
                    for choice, weight in zip(states, weights, strict=True):
                        exact[(*index, choice[column])] += weight
                    column += 1
            expected[site] = expected[site] + exact / 2
    torch.testing.assert_close(log_joint(model), torch.stack(totals), rtol=1e-12, atol=1e-12)
    found = state_probabilities(model)
    for site, exact in expected.items():
        if name == "imputed":
            found[site], exact = found[site][1:], exact[1:]
        torch.testing.assert_close(found[site], exact, rtol=1e-10, atol=1e-12)


def test_deterministic_sites_are_computed_at_the_drawn_states() -> None:
    problem = PROBLEMS["mixture"]
    draws = {name: value.repeat(50, *[1] * (value.dim() - 1)) for name, value in problem.points.items()}
    model = AtDraws(mixture, (), {}, draws)
    states = draw_states(model)
    values = completed(model, states)
    assert list(values) == ["weights", "locs", "z", "loc_of"]
    torch.testing.assert_close(values["loc_of"], draws["locs"].gather(1, states["z"]), rtol=0, atol=0)
    assert values["z"].dtype == torch.int64
    imputing = PROBLEMS["imputed"]
    model = AtDraws(imputed, (), {}, imputing.points)
    states = draw_states(model)
    values = completed(model, states)
    assert list(values) == ["p", "y"]
    assert bool((values["y"][:, 0] == 1).all())
    assert torch.equal(values["y"][:, 1:], states["y_unobserved"][:, 1:])


def test_a_model_of_discrete_sites_alone() -> None:
    with seeded(1):
        states = draw_states(AtDraws(discrete_alone, (), {}, {}, count=S))
    exact = (torch.tensor([0.2, 0.5, 0.3]).log() - 0.5 * (torch.arange(3) - 0.8) ** 2).softmax(0)
    found = torch.bincount(states["z"]) / S
    assert bool(((found - exact).abs() < 4 * (exact * (1 - exact) / S).sqrt()).all())


def test_same_seed_same_states_and_chunks_do_not_matter_to_probabilities() -> None:
    problem = PROBLEMS["nested"]
    draws = {"a": torch.linspace(-1, 1, 7)}
    model = AtDraws(problem.model, (), {}, draws)
    with seeded(3):
        first = draw_states(model)
    with seeded(3):
        second = draw_states(model)
    assert all(torch.equal(first[name], second[name]) for name in first)
    whole, parts = state_probabilities(model), state_probabilities(model, batch_size=2)
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"locs": torch.zeros(2, 4)}, "draws of site 'locs' have shape"),
        ({"weights": torch.full((3, 3), 1 / 3)}, "different numbers of draws"),
        ({"locs": None}, "latent site 'locs' has no draws"),
    ],
)
def test_draws_that_do_not_fit_are_named(change: dict[str, Any], words: str) -> None:
    given = {name: value for name, value in {**PROBLEMS["mixture"].points, **change}.items() if value is not None}
    model = poutine.infer_config(mixture, lambda site: {"enumerate": None} if site["name"] == "locs" else {})
    with pytest.raises(ValueError, match=words):
        AtDraws(model, (), {}, given)


def test_marks_that_give_no_exact_draws_are_refused() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.4), infer={"enumerate": "sequential"})
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.3))

    with pytest.raises(ValueError, match=r"site 'z' .*'sequential'.*Mark it 'parallel'"):
        AtDraws(model, (), {}, {})
    several = poutine.infer_config(model, lambda site: {"enumerate": "parallel", "num_samples": 3})
    with pytest.raises(ValueError, match=r"site 'z' .*num_samples"):
        AtDraws(several, (), {}, {})


def test_a_plate_that_subsamples_is_refused() -> None:
    @config_enumerate
    def model() -> None:
        with pyro.plate("data", 10, subsample_size=2):
            z = pyro.sample("z", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(2))

    with pytest.raises(ValueError, match="plate 'data' subsamples 2 of 10"):
        AtDraws(model, (), {}, {})


def test_paths_of_chains_in_a_plate_are_exact_whatever_the_order_of_the_dims() -> None:
    """Steps between which the dims of draws, plate and states come in several orders: opt_einsum's, by their sizes."""
    steps, stay, seen = 7, 0.8, torch.tensor([[0.0, 1, 1, 0, 0, 1, 0], [1, 0, 0, 1, 1, 0, 1], [0, 0, 0, 1, 0, 0, 0]])

    @config_enumerate
    def model() -> None:
        hit = pyro.sample("hit", dist.Beta(1.0, 1.0))
        with pyro.plate("chain", 3):
            z = torch.tensor(1.0)
            for t in pyro.markov(range(steps)):
                z = pyro.sample(f"z_{t}", dist.Bernoulli(stay * z + (1 - stay) * (1 - z)))
                pyro.sample(f"x_{t}", dist.Bernoulli(0.1 + hit * z), obs=seen[:, t])

    paths = torch.tensor(list(itertools.product([0.0, 1.0], repeat=steps)))
    before = torch.cat([torch.ones(len(paths), 1), paths[:, :-1]], 1)
    prior = torch.where(paths == before, stay, 1 - stay).log().sum(1)
    for count in (2, 10_000):  # fewer than chains, more than chains
        with seeded(0):
            drawn = draw_states(AtDraws(model, (), {}, {"hit": torch.full((count,), 0.6)}))
        found = torch.stack([drawn[f"z_{t}"] for t in range(steps)], -1)
        assert found.shape == (count, 3, steps)
    for chain in range(3):
        logits = prior + dist.Bernoulli(0.1 + 0.6 * paths).log_prob(seen[chain]).sum(1)
        exact = logits.softmax(0)
        frequency = torch.stack([(found[:, chain] == path).all(1) for path in paths]).double().mean(1)
        errors = (frequency - exact) / (exact * (1 - exact) / count).sqrt()
        assert errors[exact * count > 20].abs().max() < 4.5
