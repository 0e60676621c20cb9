"""One mistake, one sentence, whatever the way in; and programs that are unusual but right pass everywhere."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.autoname import scope
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal

from pyro_elbo_ext import (
    CompiledSVI,
    DecomposedELBO,
    ImportanceWeightedELBO,
    compiled_log_density,
    diagnose,
    evidence_bounds,
    fit,
    from_pyro_mcmc,
    from_pyro_svi,
    psis_khat,
    run_nuts,
)
from pyro_elbo_ext.density.log_density import LogDensity

Program = Callable[..., Any]
NAN = float("nan")
N = 4


def adam() -> Any:
    return pyro.optim.Adam({"lr": 0.1})


# The ways in. Each is given model, guide and arguments.

WITH_GUIDE: dict[str, Callable[..., Any]] = {
    "DecomposedELBO": lambda m, g, *a: SVI(m, g, adam(), DecomposedELBO()).step(*a),
    "DecomposedELBO, sampled": lambda m, g, *a: SVI(m, g, adam(), DecomposedELBO(kl="sampled")).step(*a),
    "IWAE": lambda m, g, *a: SVI(m, g, adam(), ImportanceWeightedELBO(2)).step(*a),
    "fit": lambda m, g, *a: fit(m, g, *a, num_steps=2, compiled=False, progress=False),
    "fit, Pyro's loss": lambda m, g, *a: fit(m, g, *a, num_steps=2, loss=Trace_ELBO(), compiled=False, progress=False),
    "CompiledSVI": lambda m, g, *a: CompiledSVI(m, g, adam(), DecomposedELBO(), backend="eager").step(*a),
    "CompiledSVI, Pyro's loss": lambda m, g, *a: CompiledSVI(m, g, adam(), Trace_ELBO(), backend="eager").step(*a),
    "CompiledSVI, fallback": lambda m, g, *a: CompiledSVI(
        m, g, adam(), Trace_ELBO(), backend="eager", fallback=True
    ).step(*a),
    "psis_khat": lambda m, g, *a: psis_khat(m, g, *a, num_draws=20),
    "evidence_bounds": lambda m, g, *a: evidence_bounds(m, g, *a, num_draws=30, fallback=None),
    "diagnose": lambda m, g, *a: diagnose(m, g, *a, num_draws=100, progress=False),
    "from_pyro_svi": lambda m, g, *a: from_pyro_svi(m, g, *a, num_samples=3),
}
WITHOUT_GUIDE: dict[str, Callable[..., Any]] = {
    "auto": lambda m, *a: fit(m, "auto", *a, seed=0, progress=False),
    "compiled_log_density": lambda m, *a: compiled_log_density(m, *a),
    "run_nuts": lambda m, *a: run_nuts(m, *a, num_samples=4, warmup=4, chains=1, compile=False, progress=False),
}
SCORERS = ("psis_khat", "evidence_bounds", "diagnose", "from_pyro_svi")


@dataclass
class Bad:
    """A mistake, what every way in says of it, and which ways it cannot be met on."""

    name: str
    model: Program
    guide: Program | None  # None: AutoNormal
    sentence: str
    args: tuple[Any, ...]
    legal: tuple[str, ...] = ()  # ways on which it is no mistake
    of_fit: str = ""  # what `fit` says, which looks at its arguments first
    of_guide: bool = False  # so that the ways without a guide have nothing to say

    def __str__(self) -> str:
        return self.name


def loc() -> torch.Tensor:
    return pyro.param("loc", torch.tensor(0.3))


def guide(*args: Any) -> None:
    pyro.sample("w", dist.Normal(loc(), 0.1))


def regression(fn: Callable[[torch.Tensor], Any], plate: bool = True) -> Program:
    """One weight w, and labels y with the distribution that ``fn`` makes of the means."""

    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        if not plate:
            pyro.sample("y", fn(w * x), obs=y)
            return
        with pyro.plate("data", len(x)):
            pyro.sample("y", fn(w * x), obs=y)

    return model


def normal(mean: torch.Tensor) -> Any:
    return dist.Normal(mean, 1.0)


X, Y = torch.linspace(-1, 1, N), torch.tensor([0.1, -0.2, 0.4, 0.8])
COLUMN = Y.unsqueeze(-1)
WITH_NAN = Y.clone().index_fill_(0, torch.tensor(1), NAN)


def masked_nan(x: torch.Tensor, y: torch.Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)), poutine.mask(mask=~y.isnan()):
        pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)


def masked_by_fn(x: torch.Tensor, y: torch.Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w * x, 1.0, validate_args=False).mask(~y.isnan()), obs=y)


def two_latents(x: torch.Tensor, y: torch.Tensor) -> None:
    pyro.sample("extra", dist.Normal(0.0, 1.0))
    regression(normal)(x, y)


def guide_of_y(*args: Any) -> None:
    guide()
    with pyro.plate("data", N):
        pyro.sample("y", dist.Normal(0.0, 1.0))


def guide_observes(*args: Any) -> None:
    loc()
    pyro.sample("w", dist.Normal(0.0, 1.0), obs=torch.tensor(0.1))


def with_sigma(prior: Any) -> Program:
    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        sigma = pyro.sample("sigma", prior)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x, sigma), obs=y)

    return model


def negative_sigma(*args: Any) -> None:
    guide()
    pyro.sample("sigma", dist.Normal(loc() - 5.0, 0.1))


def matrix(x: torch.Tensor, y: torch.Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def vector_guide(*args: Any) -> None:
    pyro.sample("w", dist.Normal(loc() + torch.zeros(2), 0.1).to_event(1))


def wrong_shape_guide(*args: Any) -> None:
    pyro.sample("w", dist.Normal(loc() + torch.zeros(3), 0.1).to_event(1))


def elementwise(x: torch.Tensor, y: torch.Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * w).sum(-1), 1.0), obs=y)


def nan_guide(*args: Any) -> None:
    pyro.sample("w", dist.Normal(loc() * NAN, 0.1))


def in_plate_of(size: int) -> Program:
    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size):
            pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)

    return model


BROADCAST = "at site 'y', a value of shape (4, 1) does not fit a distribution with batch shape "
NANS = "observed site 'y' has NaN in 1 of 4 observations"
BAD = [
    Bad("rows against columns", regression(normal), guide, BROADCAST + "(4,)", (X, COLUMN)),
    Bad(
        "rows against columns in an event",
        regression(lambda mean: normal(mean).to_event(1), plate=False),
        guide,
        BROADCAST + "() and event shape (4,)",
        (X, COLUMN),
    ),
    Bad(
        "rows against columns of a discrete event",
        regression(lambda mean: dist.Bernoulli(logits=mean).to_event(1), plate=False),
        guide,
        BROADCAST + "() and event shape (4,)",
        (X, (COLUMN > 0).float()),
    ),
    Bad(
        "rows against columns, masked",
        regression(lambda mean: normal(mean).to_event(1).mask(torch.tensor(True)), plate=False),
        guide,
        BROADCAST + "() and event shape (4,)",
        (X, COLUMN),
    ),
    Bad(
        "a column of means in a plate",
        regression(lambda mean: normal(mean.unsqueeze(-1))),
        guide,
        "at site 'y', a value of shape (4,) does not fit a distribution with batch shape (4, 4)",
        (X, Y),
    ),
    Bad(
        "columns of means and labels in a plate",
        regression(lambda mean: normal(mean.unsqueeze(-1))),
        guide,
        BROADCAST + "(4, 4)",
        (X, COLUMN),
    ),
    Bad(
        "labels for a multivariate event",
        regression(lambda mean: dist.MultivariateNormal(mean.unsqueeze(-1).expand(N, 3), torch.eye(3))),
        guide,
        BROADCAST + "(4,) and event shape (3,)",
        (X, COLUMN),
    ),
    Bad(
        "too many labels",
        regression(normal),
        guide,
        "at site 'y', a value of shape (5,) does not fit a distribution with batch shape (4,)",
        (X, torch.zeros(5)),
    ),
    Bad("NaN in data", regression(normal), guide, NANS, (X, WITH_NAN)),
    Bad("NaN in data, autoguide", regression(normal), None, NANS, (X, WITH_NAN)),
    Bad("NaN behind a mask", masked_nan, guide, NANS, (X, WITH_NAN), legal=SCORERS),
    Bad("NaN behind a mask of the distribution", masked_by_fn, guide, NANS, (X, WITH_NAN), legal=SCORERS),
    Bad(
        "infinite data",
        regression(normal),
        guide,
        "observed site 'y' has infinite values in 1 of 4 observations",
        (X, Y.clone().index_fill_(0, torch.tensor(1), float("inf"))),
    ),
    Bad(
        "NaN in what the means are made of",
        regression(normal),
        guide,
        "site 'y' has no finite log density, and argument 'x' has NaN in 1 of 4 elements",
        (WITH_NAN, Y),
    ),
    Bad(
        "bits of another dtype",
        regression(lambda mean: dist.Bernoulli(logits=mean)),
        guide,
        "at site 'y', a value of dtype int64 does not fit its Bernoulli of float32",
        (X, torch.tensor([1, 0, 0, 1])),
    ),
    Bad(
        "data outside the support",
        regression(lambda mean: dist.LogNormal(mean, 1.0)),
        guide,
        "observed site 'y' has data outside the support of its LogNormal, GreaterThan(lower_bound=0.0): -0.2",
        (X, Y),
    ),
    Bad(
        "empty data",
        regression(lambda mean: normal(mean).to_event(1), plate=False),
        guide,
        "site 'y' is empty: its value has shape (0,)",
        (X[:0], Y[:0]),
        of_fit="the arguments: argument 0 is empty",
    ),
    Bad(
        "empty plate",
        in_plate_of(0),
        guide,
        "plate 'data': size cannot be zero",
        (X[:0], Y[:0]),
        of_fit="the arguments: argument 0 is empty",
    ),
    Bad(
        "guide misses a site",
        two_latents,
        guide,
        "site 'extra' is latent in the model but the guide has no site of that name",
        (X, Y),
        of_guide=True,
    ),
    Bad(
        "guide samples an observed site",
        regression(normal),
        guide_of_y,
        "site 'y' is observed in the model, but the guide samples it",
        (X, Y),
        of_guide=True,
    ),
    Bad(
        "guide observes a latent site",
        regression(normal),
        guide_observes,
        "site 'w' is observed in the guide, but latent in the model",
        (X, Y),
        of_guide=True,
    ),
    *[
        Bad(
            f"draw outside the support, {name}",
            with_sigma(prior),
            negative_sigma,
            f"the guide draws site 'sigma' outside the support of the model's {name}",
            (X, Y),
            of_guide=True,
        )
        for name, prior in (
            ("HalfNormal", dist.HalfNormal(1.0)),
            ("Exponential", dist.Exponential(1.0)),
            ("Gamma", dist.Gamma(2.0, 1.0)),
            ("ImproperUniform", dist.ImproperUniform(dist.constraints.positive, (), ())),
        )
    ],
    Bad(
        "two dtypes",
        matrix,
        vector_guide,
        "the model puts tensors of different dtypes together after site 'w' ('w' float32, argument 'x' float64",
        (torch.ones(N, 2, dtype=torch.float64), Y),
        legal=("auto", "compiled_log_density", "run_nuts"),  # they compute in float64
    ),
    Bad(
        "another shape in the guide",
        matrix,
        wrong_shape_guide,
        "Model and guide shapes disagree at site 'w': the guide's draw of shape (3,) does "
        "not fit a distribution with batch shape () and event shape (2,)",
        (torch.ones(N, 3), Y),
        of_guide=True,
    ),
    Bad(
        "a scalar for a vector",
        elementwise,
        guide,
        "Model and guide event_dims disagree at site 'w': the guide's draw of shape () does "
        "not fit a distribution with batch shape () and event shape (2,)",
        (torch.ones(N, 2), Y),
        of_guide=True,
    ),
    Bad(
        "a guide that draws NaN",
        regression(normal),
        nan_guide,
        "site 'w' of the guide draws NaN",
        (X, Y),
        of_guide=True,
    ),
]


def nested(fn: Callable[[torch.Tensor], Any]) -> Program:
    """The same in two plates of one size."""

    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", N, dim=-2), pyro.plate("columns", N, dim=-1):
            pyro.sample("y", fn(w * x), obs=y)

    return model


def behind_a_column(handler: Callable[[torch.Tensor], Any]) -> Program:
    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N), handler(torch.ones(N, 1)):
            pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)

    return model


def categories(mean: torch.Tensor) -> Any:
    return dist.Categorical(logits=torch.stack([mean, -mean, 0 * mean], -1))


def mixture(mean: torch.Tensor) -> Any:
    parts = dist.Categorical(torch.ones(*mean.shape, 2))
    return dist.MixtureSameFamily(parts, dist.Normal(torch.stack([mean, -mean], -1), 1.0))


COUNTS = torch.tensor([0, 1, 2, 1])
REPEATED: dict[str, tuple[Program, torch.Tensor]] = {
    "Poisson": (regression(lambda mean: dist.Poisson(mean.exp())), COUNTS.float().unsqueeze(-1)),
    "Bernoulli": (regression(lambda mean: dist.Bernoulli(logits=mean.unsqueeze(-1))), (Y > 0).float()),
    "StudentT": (regression(lambda mean: dist.StudentT(3.0, mean.unsqueeze(-1), 1.0)), COLUMN),
    "Categorical": (regression(lambda mean: categories(mean.unsqueeze(-1))), COUNTS),
    "Multinomial": (
        regression(lambda mean: dist.Multinomial(5, logits=categories(mean).logits)),
        torch.full((N, 1), 5.0),
    ),
    "mixture": (regression(lambda mean: mixture(mean.unsqueeze(-1))), Y),
    "transformed": (
        regression(
            lambda mean: dist.TransformedDistribution(normal(mean.unsqueeze(-1)), [dist.transforms.ExpTransform()])
        ),
        Y.exp(),
    ),
    "masked": (regression(lambda mean: normal(mean).mask(torch.ones(N, 1, dtype=torch.bool))), Y),
    "no plate": (regression(lambda mean: normal(mean.unsqueeze(-1) * mean), plate=False), Y),
    "no plate, three of four": (regression(lambda mean: normal(mean.unsqueeze(-1).expand(N, 3)), plate=False), Y[:3]),
    "a mean for each part of a datum": (regression(lambda mean: normal(mean), plate=False), torch.tensor(0.3)),
    "one event for all of a plate": (regression(lambda mean: normal(mean.expand(N, N)).to_event(1)), Y),
    "an event of matrices": (regression(lambda mean: normal(mean.expand(N, N)).to_event(2), plate=False), Y),
    "nested, more labels": (nested(lambda mean: normal(mean.expand(N, N))), torch.randn(N, N, 1)),
    "nested, more means": (nested(lambda mean: normal(mean.expand(N, N).unsqueeze(-1))), torch.randn(N, N)),
    "nested, labels for the rows": (nested(normal), Y),
    "under a mask": (behind_a_column(lambda of: poutine.mask(mask=of > 0)), Y),
    "under a scale": (behind_a_column(lambda of: poutine.scale(scale=of)), Y),
}


@pytest.mark.parametrize("validate", [True, False], ids=["validated", "not validated"])
@pytest.mark.parametrize("way", ["DecomposedELBO", "CompiledSVI, Pyro's loss", "psis_khat", "compiled_log_density"])
@pytest.mark.parametrize("name", REPEATED)
def test_no_datum_counts_several_times(name: str, way: str, validate: bool) -> None:
    model, y = REPEATED[name]
    with (
        pyro.validation_enabled(validate),
        pytest.raises(
            ValueError, match=rf"^at site 'y', a value of shape \({', '.join(map(str, y.shape))}.*does not fit"
        ),
    ):
        enter(way, Bad(name, model, guide, "", (X, y)))


OUTSIDE: dict[str, tuple[Callable[[torch.Tensor], Any], torch.Tensor, str]] = {
    "Poisson": (lambda mean: dist.Poisson(mean.exp()), torch.tensor([1.0, 0.5, 0.0, 2.0]), "Poisson, IntegerGr.*: 0.5"),
    "Bernoulli": (lambda mean: dist.Bernoulli(logits=mean), torch.tensor([1.0, 2.0, 0.0, 0.0]), "Bernoulli, Bool.*: 2"),
    "Dirichlet": (
        lambda mean: dist.Dirichlet(mean.exp().unsqueeze(-1).expand(N, 2)),
        torch.full((N, 2), 0.4),
        r"Dirichlet, .*: \[0.4, 0.4\]",
    ),
    "Multinomial": (
        lambda mean: dist.Multinomial(3, logits=mean.unsqueeze(-1).expand(N, 2)),
        torch.tensor([[1.0, 2.0], [1.5, 1.5], [3.0, 0.0], [0.0, 3.0]]),
        r"Multinomial, .*: \[1.5, 1.5\]",
    ),
    "Categorical": (
        lambda mean: dist.Categorical(logits=mean.unsqueeze(-1).expand(N, 2)),
        torch.tensor([0.0, 1.0, 0.7, 1.0]),
        r"Categorical, .*: 0.7",
    ),
}


@pytest.mark.parametrize("way", ["DecomposedELBO", "CompiledSVI", "psis_khat", "from_pyro_svi", "compiled_log_density"])
@pytest.mark.parametrize("name", OUTSIDE)
def test_data_that_have_a_density_outside_the_support(name: str, way: str) -> None:
    """Where values are validated; without validation they are soft labels, and whatever else one may want."""
    fn, y, said = OUTSIDE[name]
    with pytest.raises(ValueError, match=f"^observed site 'y' has data outside the support of its {said}"):
        enter(way, Bad(name, regression(fn), guide, "", (X, y)))
    with pyro.validation_enabled(False):
        enter(way, Bad(name, regression(fn), guide, "", (X, y)))


@pytest.mark.parametrize("way", [*WITH_GUIDE, "compiled_log_density"])
def test_rows_of_a_multinomial_may_have_totals_of_their_own(way: str) -> None:
    """As torch has it: total_count is the most that a row may have, and no part of the density; more is an error."""

    def counts(mean: torch.Tensor) -> Any:
        return dist.Multinomial(3, logits=torch.stack([mean, -mean], -1))

    y = torch.tensor([[1.0, 2.0], [1.0, 0.0], [0.0, 2.0], [0.0, 3.0]])
    enter(way, Bad("", regression(counts), guide, "", (X, y)))
    y[1] += 2
    with pytest.raises(
        ValueError, match=r"^observed site 'y' has data outside the support of its Multinomial.*\[3, 2\]"
    ):
        enter(way, Bad("", regression(counts), guide, "", (X, y)))


@pytest.mark.parametrize("validate", [True, False], ids=["validated", "not validated"])
def test_a_draw_may_leave_data_outside_its_support(validate: bool) -> None:
    """Its weight is zero; with seeds at which the first draw, of reference, is such a one."""

    def model(y: torch.Tensor) -> None:
        top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Uniform(0.0, top), obs=y)

    def guide_of_top(y: torch.Tensor) -> None:
        pyro.sample("top", dist.LogNormal(loc(), 0.3))

    with pyro.validation_enabled(validate):
        for seed in range(4):
            pyro.set_rng_seed(seed)
            sample = psis_khat(model, guide_of_top, torch.tensor([0.2, 1.3]), num_draws=200, seed=seed)
            assert 20 < sample.num_zero < 180


@pytest.mark.parametrize("value", [[0.1, 0.2, 0.3, 0.4], np.zeros(4), 0.5], ids=["list", "array", "number"])
@pytest.mark.parametrize("validate", [True, False], ids=["validated", "not validated"])
def test_data_that_are_no_tensor(value: Any, validate: bool) -> None:
    for way in (*WITH_GUIDE, *WITHOUT_GUIDE):
        if way.startswith("CompiledSVI") and isinstance(value, np.ndarray):  # says that arguments must be tensors
            continue
        with (
            pyro.validation_enabled(validate),
            pytest.raises(TypeError, match=f"^at site 'y', the value is a {type(value).__name__} and no tensor"),
        ):
            enter(way, Bad("", regression(normal), guide, "", (X, value)))


def enter(way: str, bad: Bad) -> None:
    if way in WITHOUT_GUIDE:
        WITHOUT_GUIDE[way](bad.model, *bad.args)
    else:
        WITH_GUIDE[way](bad.model, bad.guide or AutoNormal(bad.model), *bad.args)


def first_sentence_of(error: BaseException) -> str:
    return str(error).splitlines()[0]


def store() -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


CASES = [
    (bad, way) for bad in BAD for way in (*WITH_GUIDE, *(() if bad.of_guide else WITHOUT_GUIDE)) if way not in bad.legal
]


@pytest.mark.parametrize("validate", [True, False], ids=["validated", "not validated"])
@pytest.mark.parametrize(("bad", "way"), CASES, ids=str)
def test_one_sentence_on_every_way(bad: Bad, way: str, validate: bool) -> None:
    before = {"loc": loc().detach().clone()}
    with pyro.validation_enabled(validate), pytest.raises((ValueError, RuntimeError)) as caught:
        enter(way, bad)
    sentence = bad.of_fit if bad.of_fit and way.startswith("fit") else bad.sentence
    assert first_sentence_of(caught.value).startswith(sentence), first_sentence_of(caught.value)
    assert all(torch.equal(store()[name], value) for name, value in before.items())
    parameter = pyro.get_param_store()._params["loc"]
    assert parameter.grad is None or not parameter.grad.any()


LEGAL = [(bad, way) for bad in BAD for way in bad.legal]


@pytest.mark.parametrize(("bad", "way"), LEGAL, ids=str)
def test_where_it_is_no_mistake(bad: Bad, way: str) -> None:
    with pyro.validation_enabled(False):
        enter(way, bad)


# Programs that are unusual, and right: each with its log joint density at w


@dataclass
class Good:
    name: str
    model: Program
    log_joint: Callable[[torch.Tensor], torch.Tensor]
    args: tuple[Any, ...] = (X, Y)
    site: str = "w"

    def __str__(self) -> str:
        return self.name


def log_normal(x: Any, loc: Any = 0.0, scale: Any = 1.0) -> torch.Tensor:
    x, loc, scale = (torch.as_tensor(value, dtype=torch.float64) for value in (x, loc, scale))
    return -0.5 * ((x - loc) / scale) ** 2 - scale.log() - 0.9189385332046727


def observed(w: torch.Tensor, y: torch.Tensor = Y) -> torch.Tensor:
    seen = ~y.isnan()
    return log_normal(w) + log_normal(y[seen], w * X.double()[seen]).sum()


def multivariate(x: torch.Tensor, y: torch.Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    covariance = torch.eye(2) + 0.5
    with pyro.plate("data", len(y)):
        mean = torch.stack([w.expand(len(y)), 2 * w.expand(len(y))], -1)
        pyro.sample("y", dist.NanMaskedMultivariateNormal(mean, covariance), obs=y)


PAIRS = torch.tensor([[0.1, 0.2], [NAN, 0.5], [0.3, NAN], [NAN, NAN]])


def of_pairs(w: torch.Tensor) -> torch.Tensor:
    mean = torch.stack([w, 2 * w]).double()
    whole = torch.distributions.MultivariateNormal(mean, torch.eye(2).double() + 0.5)
    sd = 1.5**0.5
    return (
        log_normal(w)
        + whole.log_prob(PAIRS[0].double())
        + log_normal(PAIRS[1, 1], 2 * w, sd)
        + log_normal(PAIRS[2, 0], w, sd)
    )


def imputed_by_mask(x: torch.Tensor, y: torch.Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    seen = ~y.isnan()
    with pyro.plate("data", len(x)), poutine.mask(mask=seen):
        pyro.sample("y", dist.Normal(w * x, 1.0), obs=y.nan_to_num())


def scalar_prior_in_a_plate(x: torch.Tensor, y: torch.Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w, 1.0), obs=y)


def event_of_a_scalar(x: torch.Tensor, y: torch.Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([N]).to_event(1))
    pyro.sample("y", dist.Normal(w, 1.0).to_event(1), obs=y)


def scalar_data(y: torch.Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(w, 1.0), obs=y)


def one_datum_for_all(x: torch.Tensor, y: torch.Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", N):
        pyro.sample("y", dist.Normal(w * x, 1.0), obs=torch.tensor(0.5))


def factored(x: torch.Tensor, y: torch.Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.factor("half", -0.5 * (w - 1.0) ** 2)
    pyro.deterministic("double", 2 * w)


def scoped(x: torch.Tensor, y: torch.Tensor) -> None:
    with scope(prefix="outer"):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)


def mixed_dtypes(x: torch.Tensor, y: torch.Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)


def plates_with_dims(x: torch.Tensor, y: torch.Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", N, dim=-2):
        pyro.sample("y", dist.Normal(w * x.unsqueeze(-1), 1.0), obs=y.unsqueeze(-1))


def crossed_plates(x: torch.Tensor, y: torch.Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", N, dim=-1):
        pyro.sample("y", dist.Normal(w * x, 1.0), obs=y.expand(2, N))


def restarts(x: torch.Tensor, y: torch.Tensor) -> None:
    """The same data for each of several models that know nothing of each other."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("restarts", 3, dim=-2), pyro.plate("data", len(x), dim=-1):
        pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)


def one_vector_for_all(x: torch.Tensor, y: torch.Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("restarts", 3):
        pyro.sample("y", dist.Normal(w * x, 1.0).to_event(1), obs=y)


def one_number_for_an_event(x: torch.Tensor, y: torch.Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(w * x, 1.0).to_event(1), obs=torch.tensor(0.3))


def flat(x: torch.Tensor, y: torch.Tensor) -> None:
    w = pyro.sample("w", dist.ImproperUniform(dist.constraints.real, (), ()))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)


def soft_labels(x: torch.Tensor, y: torch.Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=w * x, validate_args=False), obs=y)


SOFT = torch.tensor([0.2, 0.9, 0.5, 0.4])
GOOD = [
    Good(
        "NaN-masked likelihood",
        regression(lambda mean: dist.NanMaskedNormal(mean, 1.0)),
        lambda w: observed(w, WITH_NAN),
        (X, WITH_NAN),
    ),
    Good("NaN-masked multivariate likelihood", multivariate, of_pairs, (X, PAIRS)),
    Good("numbers behind a mask", imputed_by_mask, lambda w: observed(w, WITH_NAN), (X, WITH_NAN)),
    Good(
        "a scalar mean in a plate",
        scalar_prior_in_a_plate,
        lambda w: log_normal(w) + log_normal(Y, w).sum(),
    ),
    Good("an event of an expanded scalar", event_of_a_scalar, lambda w: (log_normal(w) + log_normal(Y, w)).sum()),
    Good("scalar data", scalar_data, lambda w: log_normal(w) + log_normal(0.7, w), (torch.tensor(0.7),)),
    Good("one datum for all means", one_datum_for_all, lambda w: log_normal(w) + log_normal(0.5, w * X.double()).sum()),
    Good("a factor", factored, lambda w: log_normal(w) - 0.5 * (w - 1.0) ** 2),
    Good("scoped names", scoped, observed, site="outer/w"),
    Good("float64 data against float32 parameters", mixed_dtypes, observed, (X.double(), Y.double())),
    Good("a plate with its dim", plates_with_dims, observed),
    Good("crossed plates", crossed_plates, lambda w: log_normal(w) + 2 * (observed(w) - log_normal(w))),
    Good("the same data several times", restarts, lambda w: 3 * observed(w) - 2 * log_normal(w)),
    Good("the same vector several times", one_vector_for_all, lambda w: 3 * observed(w) - 2 * log_normal(w)),
    Good(
        "one number for an event",
        one_number_for_an_event,
        lambda w: log_normal(w) + log_normal(0.3, w * X.double()).sum(),
    ),
    Good("a flat prior", flat, lambda w: observed(w) - log_normal(w)),
    Good(
        "soft labels",
        soft_labels,
        lambda w: log_normal(w) + (SOFT * (w * X.double()) - torch.nn.functional.softplus(w * X.double())).sum(),
        (X, SOFT),
    ),
]


@pytest.mark.parametrize("validate", [True, False], ids=["validated", "not validated"])
@pytest.mark.parametrize(
    "good",  # what looks for NaN in Python is no graph, and takes its time
    [pytest.param(good, marks=pytest.mark.slow if good.name.startswith("NaN") else ()) for good in GOOD],
    ids=str,
)
def test_unusual_programs_pass_with_the_right_value(good: Good, validate: bool) -> None:
    model, args = good.model, good.args
    with pyro.validation_enabled(validate):
        guide = AutoNormal(model, init_loc_fn=pyro.infer.autoguide.init_to_value(values={good.site: torch.tensor(0.2)}))
        if good.name == "an event of an expanded scalar":
            guide = AutoNormal(model)
        for kl in ("auto", "sampled"):  # which makes the parameters
            DecomposedELBO(kl=kl).loss(model, guide, *args)
        losses = []
        for objective in (Trace_ELBO(), DecomposedELBO(kl="sampled")):
            pyro.set_rng_seed(1)
            losses.append(objective.loss(model, guide, *args))
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        sample = psis_khat(model, guide, *args, num_draws=40, seed=0)
        draws = sample.draws[good.site].double()
        expected = torch.stack([good.log_joint(w) for w in draws])
        torch.testing.assert_close(torch.from_numpy(sample.log_p), expected, rtol=1e-5, atol=1e-4)
        exported = from_pyro_svi(model, guide, *args, num_samples=3, seed=0, prior=good.name != "a flat prior")
        theirs = torch.from_numpy(exported["posterior"][good.site.replace("/", ".")].values[0].copy()).double()
        log_p = torch.from_numpy(exported["sample_stats"]["log_p"].values[0].copy()).double()
        torch.testing.assert_close(log_p, torch.stack([good.log_joint(w) for w in theirs]), rtol=1e-5, atol=1e-4)
        density = fit(model, "auto", *args, seed=0, progress=False).density
        point = torch.linspace(-0.5, 0.5, density.dim).double()
        at = point if density.dim > 1 else point[0]
        assert density.log_density(point).item() == pytest.approx(good.log_joint(at).item(), rel=1e-6)
        for way in ("IWAE", "fit", "fit, Pyro's loss", "CompiledSVI, fallback", "evidence_bounds"):
            WITH_GUIDE[way](model, guide, *args)
        WITHOUT_GUIDE["run_nuts"](model, *args)


# No latent sites, discrete ones, and finished MCMC


def without_latents(x: torch.Tensor, y: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(loc() * x, 1.0), obs=y)


NOTHING_TO_INFER = ("auto", "run_nuts", "compiled_log_density", *SCORERS)


@pytest.mark.parametrize("way", NOTHING_TO_INFER)
def test_a_model_without_latent_sites(way: str) -> None:
    bad = Bad("no latent site", without_latents, lambda *args: None, "", (X, Y))
    with pytest.raises(ValueError, match=r"^the model has no continuous latent site, so there is no posterior to find"):
        enter(way, bad)


@pytest.mark.parametrize("way", ["DecomposedELBO", "fit", "fit, Pyro's loss", "CompiledSVI"])
def test_parameters_alone_are_trained(way: str) -> None:
    before = loc().detach().clone()
    enter(way, Bad("no latent site", without_latents, lambda *args: None, "", (X, Y)))
    assert not torch.equal(loc(), before)


def partly_observed(x: torch.Tensor, y: torch.Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=w * x), obs=y.nan_to_num(), obs_mask=~y.isnan())


BITS = torch.tensor([1.0, NAN, 0.0, 1.0])


@pytest.mark.parametrize("way", WITHOUT_GUIDE)
def test_a_discrete_site_with_missing_data(way: str) -> None:
    """It is refused, by the same sentence; what that advises is tested below."""
    with pytest.raises(
        ValueError, match=r"^latent site 'y_unobserved' is discrete \(Bernoulli\).*config_enumerate"
    ) as caught:
        WITHOUT_GUIDE[way](partly_observed, X, BITS)
    assert "NUTS" not in str(caught.value)


def test_what_is_advised_for_missing_bits_is_right() -> None:
    density = LogDensity(config_enumerate(partly_observed), (X, BITS), {}, seed=0)
    seen = ~BITS.isnan()
    for w in (-0.4, 0.9):
        logits = w * X[seen].double()
        expected = log_normal(w) + torch.distributions.Bernoulli(logits=logits).log_prob(BITS[seen].double()).sum()
        assert density.log_density(torch.tensor([w], dtype=torch.float64)).item() == pytest.approx(expected.item())


def test_a_discrete_site_without_enumeration() -> None:
    def counts(x: torch.Tensor, y: torch.Tensor) -> None:
        k = pyro.sample("k", dist.Poisson(3.0))
        pyro.sample("y", dist.Normal(k, 1.0), obs=torch.tensor(2.0))

    with pytest.raises(ValueError, match=r"^latent site 'k' is discrete \(Poisson\).*cannot be enumerated"):
        fit(counts, "auto", X, Y, progress=False)


@functools.cache
def sampled(program: Program) -> MCMC:
    with pyro.validation_enabled(False):
        mcmc = MCMC(NUTS(program), num_samples=4, warmup_steps=4, disable_progbar=True)
        mcmc.run(X, Y)
    return mcmc


def test_mcmc_of_a_batch_without_plate_names_the_option() -> None:
    mcmc = sampled(regression(normal, plate=False))
    with pytest.raises(ValueError, match=r"(?s)site \"y\".*log_likelihood=False"):
        from_pyro_mcmc(mcmc)
    assert "w" in from_pyro_mcmc(mcmc, log_likelihood=False)["posterior"]


@pytest.mark.parametrize("validate", [True, False], ids=["validated", "not validated"])
def test_mcmc_of_a_wrong_model(validate: bool) -> None:
    wrong = [
        bad for bad in BAD if bad.name in ("rows against columns", "rows against columns in an event", "NaN in data")
    ]
    mcmc = sampled(regression(normal))
    for bad in wrong:
        with pyro.validation_enabled(validate), pytest.raises(ValueError) as caught:  # noqa: PT011
            from_pyro_mcmc(mcmc, bad.model, *bad.args)
        assert first_sentence_of(caught.value).startswith(bad.sentence)


@pytest.mark.parametrize("way", ["DecomposedELBO", "fit", "CompiledSVI, Pyro's loss", "auto", "compiled_log_density"])
def test_a_point_mass_in_the_model(way: str) -> None:
    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        z = pyro.sample("z", dist.Delta(torch.tensor(2.0)))
        w = pyro.sample("w", dist.Normal(z, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)

    with pytest.raises(ValueError, match=r"^latent site 'z' of the model is a point mass \(Delta\).*deterministic"):
        enter(way, Bad("", model, None, "", (X, Y)))
