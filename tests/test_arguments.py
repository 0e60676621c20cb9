"""Junk given to an argument, whichever function takes it, is one sentence that names the argument; nothing changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pyro_elbo_ext as package
from pyro_elbo_ext.programs.arguments import check_count, check_fraction, check_seed, named_arguments, names_of

Y = torch.tensor([0.3, -0.2, 1.1, 0.4])
NAN = float("nan")
NO_COUNT: list[Any] = ["x", -1, 2.5, NAN, True, []]
NO_SEED: list[Any] = ["x", -1, 1.5, True, 2**32, []]
NO_NUMBER: list[Any] = ["x", [], None, NAN]
NO_MAPPING: list[Any] = ["x", 1, 2.5, True]


def model(y: Any) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def guide(y: Any) -> None:
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 0.7))


def local(y: torch.Tensor) -> None:
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def local_guide(y: torch.Tensor) -> None:
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)) * y, 0.7))


def adam() -> Any:
    return pyro.optim.Adam({"lr": 0.01})


def recipe(data: Any, program: Any, *args: Any) -> Any:
    return guide


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "fit": lambda **given: package.fit(
        model, guide, Y, **{"num_steps": 2, "compiled": False, "progress": False, **given}
    ),
    "auto": lambda **given: package.fit(model, "auto", Y, progress=False, **given),
    "psis_khat": lambda **given: package.psis_khat(model, guide, Y, **given),
    "evidence_bounds": lambda **given: package.evidence_bounds(model, guide, Y, **given),
    "diagnose": lambda **given: package.diagnose(model, guide, Y, progress=False, **given),
    "run_nuts": lambda **given: package.run_nuts(model, Y, progress=False, **given),
    "from_pyro_svi": lambda **given: package.from_pyro_svi(model, guide, Y, **{"num_samples": 3, **given}),
    "simulate_calibration": lambda **given: package.simulate_calibration(model, recipe, Y, progress=False, **given),
    "TrainGuide": lambda **given: package.TrainGuide(**{"guide_factory": AutoNormal, "optim": adam(), **given}),
    "active_units": lambda **given: package.active_units(local, local_guide, Y, **given),
    "elbo_surgery": lambda **given: package.elbo_surgery(local, local_guide, Y, **given),
    "amortization_gap": lambda **given: package.amortization_gap(local, local_guide, Y, **given),
    "CompiledSVI": lambda **given: package.CompiledSVI(model, guide, adam(), package.DecomposedELBO(), **given),
    "DecomposedELBO": lambda **given: package.DecomposedELBO(**given),
    "ImportanceWeightedELBO": lambda **given: package.ImportanceWeightedELBO(**{"num_particles": 2, **given}),
    "RenyiELBO": lambda **given: package.RenyiELBO(**{"num_particles": 2, **given}),
    "ThermodynamicELBO": lambda **given: package.ThermodynamicELBO(**{"num_particles": 2, **given}),
    "History": lambda **given: package.History(**given),
    "AdaptiveStopping": lambda **given: package.AdaptiveStopping(**given),
    "Patience": lambda **given: package.Patience(**given),
    "FixedSteps": lambda **given: package.FixedSteps(**{"num_steps": 3, **given}),
    "LinearWarmup": lambda **given: package.LinearWarmup(**{"num_steps": 3, **given}),
    "CyclicalWarmup": lambda **given: package.CyclicalWarmup(**{"period": 3, **given}),
}
JUNK: list[tuple[str, str, list[Any]]] = [
    ("fit", "num_steps num_epochs max_steps log_every checkpoint_every validate_every dataset_size", [*NO_COUNT, 0]),
    ("fit", "max_rollbacks", NO_COUNT),
    ("fit", "compiled", ["x", None, 1, {"nope": 1}, {"steps_per_call": 0}, {"backend": "nope"}, {"options": "x"}]),
    ("fit", "distributed", ["x", 1, {"nope": 1}]),
    ("fit", "batches", ["x", 1, True, Y, {"y": Y}, iter([Y]), [None], []]),
    ("fit", "validation", ["x", 1, True, iter([Y]), [None], [], (Y, Y), {"nope": Y}]),
    ("fit", "resume", ["x", 2, None]),
    ("fit", "checkpoint", [1, b"x", [], "a\0b"]),
    (
        "fit auto psis_khat evidence_bounds diagnose from_pyro_svi active_units elbo_surgery amortization_gap",
        "seed",
        NO_SEED,
    ),
    ("run_nuts", "seed", [*NO_SEED, None]),
    ("simulate_calibration", "seed", ["x", -1, 1.5, True, None, []]),
    ("psis_khat evidence_bounds", "batch_size", [*NO_COUNT, 0, None]),
    ("psis_khat evidence_bounds diagnose simulate_calibration", "num_draws", [*NO_COUNT, 0, None]),
    ("evidence_bounds", "level", [*NO_NUMBER, 0, 1, -1, 2.5]),
    ("evidence_bounds", "ladder", ["x", 1, None, [0], ["x"], [2.5]]),
    ("run_nuts", "num_samples chains max_tree_depth", [*NO_COUNT, 0, None]),
    ("run_nuts", "warmup", NO_COUNT),
    ("run_nuts", "start", ["x", 1, True, [], {}, Y]),
    ("auto", "accuracy", ["x", -1, 0, 1, True, NAN, []]),
    ("run_nuts", "cores", [*NO_COUNT, 0]),
    ("run_nuts", "target_accept", [*NO_NUMBER, 0, 1, True]),
    ("run_nuts", "init", ["x", -1, NAN, None, []]),
    ("run_nuts", "backend compile", ["x", -1, 2.5, None, []]),
    ("from_pyro_svi", "num_samples", [*NO_COUNT, 0, None]),
    ("from_pyro_svi simulate_calibration", "coords dims", NO_MAPPING),
    ("simulate_calibration", "num_simulations", [*NO_COUNT, 0, None]),
    ("simulate_calibration", "observed_sites var_names", [1, 2.5, True, [1]]),
    ("TrainGuide", "num_steps", [*NO_COUNT, 0, None]),
    ("TrainGuide", "optim guide_factory", ["x", 1, None, []]),
    ("active_units elbo_surgery amortization_gap", "site", [1, 2.5, True, [1], []]),
    ("active_units elbo_surgery amortization_gap", "num_draws", [*NO_COUNT, 0, 1, None]),
    ("active_units", "threshold", [*NO_NUMBER, -1]),
    ("amortization_gap", "lr", [*NO_NUMBER, -1, 0]),
    ("CompiledSVI", "steps_per_call", [*NO_COUNT, 0]),
    ("CompiledSVI", "options", ["x", 1, []]),
    ("CompiledSVI", "backend", ["x", 1, None]),
    ("DecomposedELBO ImportanceWeightedELBO RenyiELBO ThermodynamicELBO", "num_particles", [*NO_COUNT, 0, None]),
    ("DecomposedELBO ImportanceWeightedELBO RenyiELBO", "max_plate_nesting", [*NO_NUMBER, -1]),
    ("RenyiELBO", "alpha", NO_NUMBER),
    ("ThermodynamicELBO", "betas", ["x", 1, None, [0.0], [0.5, 1.0]]),
    ("History", "max_steps", [*NO_COUNT, 0, 3]),
    ("AdaptiveStopping", "accuracy elbo_tolerance factor inefficiency r_hat", [*NO_NUMBER, -1, 0]),
    ("AdaptiveStopping", "min_ess every", [*NO_COUNT, 0, None]),
    ("Patience", "min_delta", [*NO_NUMBER, -1]),
    ("Patience", "patience every", [*NO_COUNT, 0, None]),
    ("FixedSteps LinearWarmup", "num_steps", [*NO_COUNT, 0, None]),
    ("CyclicalWarmup", "period", [*NO_COUNT, 0, None]),
]


def cases() -> Iterator[Any]:
    for functions, arguments, values in JUNK:
        for function in functions.split():
            for argument in arguments.split():
                yield pytest.param(function, argument, values, id=f"{function}-{argument}")


@pytest.mark.parametrize(("function", "argument", "values"), list(cases()))
def test_junk_is_named(function: str, argument: str, values: list[Any]) -> None:
    pyro.param("loc", torch.tensor(0.1))
    called = {
        "batches": "batch",
        "validation": "held-out|validation",
        "compiled": "compiled|steps_per_call|backend|options",
    }.get(argument, argument)
    for junk in values:
        with pytest.raises((TypeError, ValueError), match=called) as caught:
            FUNCTIONS[function](**{argument: junk})
        assert len(str(caught.value)) > len(argument) + 10, junk  # a sentence
        assert pyro.param("loc").item() == pytest.approx(0.1)
        assert list(pyro.get_param_store().keys()) == ["loc"]


def test_the_words() -> None:
    assert check_count("n", torch.tensor(3)) == 3
    with pytest.raises(TypeError, match=r"^n must be an integer, not 2\.5$"):
        check_count("n", 2.5)
    with pytest.raises(ValueError, match=r"^n must be at least 2, not 1$"):
        check_count("n", 1, 2)
    check_seed(None)
    with pytest.raises(TypeError, match=r"^seed must be an integer, not None$"):
        check_seed(None, needed=True)
    with pytest.raises(ValueError, match=r"^seed must be below 2\*\*32, not 4294967296$"):
        check_seed(2**32)
    with pytest.raises(TypeError, match=r"^f must be a number, not 'x'$"):
        check_fraction("f", "x")
    assert names_of("site", "z") == ["z"]
    with pytest.raises(TypeError, match=r"^site must be a name or several, not \[1\]$"):
        names_of("site", [1])


class Network(torch.nn.Module):
    def forward(self, x: int, *rest: int, scale: int = 1) -> None:
        pass


@pytest.mark.parametrize(
    ("program", "args", "kwargs", "names"),
    [
        (model, (1,), {}, ["'y'"]),
        (pyro.poutine.scale(pyro.poutine.block(model), 2.0), (1,), {}, ["'y'"]),  # type: ignore[attr-defined]
        (partial(recipe, 1), (2, 3), {"more": 4}, ["'program'", "1", "'more'"]),
        (Network(), (1, 2, 3), {"scale": 4}, ["'x'", "1", "2", "'scale'"]),
        (Network().forward, (1,), {}, ["'x'"]),
        (lambda *args: None, (1,), {}, ["0"]),
        (type("Own", (), {"__call__": lambda self, x: None})(), (1,), {}, ["'x'"]),
        (None, (1,), {"y": 2}, ["0", "'y'"]),
    ],
)
def test_an_argument_has_the_programs_name_for_it(program: Any, args: Any, kwargs: Any, names: list[str]) -> None:
    given = [*args, *kwargs.values()]
    assert named_arguments(program, args, kwargs) == [
        (f"argument {name}", value) for name, value in zip(names, given, strict=True)
    ]
