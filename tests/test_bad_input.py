"""Wrong input gets an error that names the site or argument, and no parameter changes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, config_enumerate
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_elbo_ext import (
    ChiUpperBound,
    DecomposedELBO,
    History,
    ImportanceWeightedELBO,
    MultiSampleELBO,
    RenyiELBO,
    ThermodynamicELBO,
)
from pyro_elbo_ext.bounds.bounds import CUBO, ELBO, IWAE, TVO, Bound, Renyi

NAN, INF = float("nan"), float("inf")

ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"num_particles": 0}, "num_particles"),
    ({"num_particles": -1}, "num_particles"),
    ({"num_particles": 1.5}, "num_particles|integer"),
    ({"num_particles": True}, "num_particles"),
    ({"num_particles": "2"}, "num_particles|integer"),
    ({"max_plate_nesting": -1}, "max_plate_nesting"),
    ({"max_plate_nesting": NAN}, "max_plate_nesting"),
    ({"kl": "exact"}, "kl must be one of"),
    ({"kl": None}, "kl must be one of"),
    ({"kl_weight": -0.1}, "kl_weight"),
    ({"kl_weight": NAN}, "kl_weight"),
    ({"kl_weight": INF}, "kl_weight"),
    ({"kl_weight": "1"}, "kl_weight"),
    ({"gradient": "reinforce"}, "gradient"),
    ({"history": 100}, "history"),
    ({"history": None}, "history"),
]


@pytest.mark.parametrize(("options", "match"), ARGUMENTS, ids=str)
def test_arguments(options: dict[str, Any], match: str) -> None:
    with pytest.raises((ValueError, TypeError), match=match):
        DecomposedELBO(**options)


def test_history_too_short() -> None:
    with pytest.raises(ValueError, match="max_steps"):
        History(max_steps=0)


@dataclass
class Bad:
    name: str
    model: Callable[..., Any]
    guide: Callable[..., Any]
    match: str
    validate: bool = False
    objective: Callable[[], Any] = DecomposedELBO

    def __str__(self) -> str:
        return self.name


def loc() -> torch.Tensor:
    return pyro.param("loc", torch.tensor(0.3))


def guide(size: int | None = None) -> None:
    pyro.sample("z", dist.Normal(loc(), 1.0))


def model_with(obs: torch.Tensor, scale: Any = 1.0) -> Callable[[], None]:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, scale).expand(obs.shape).to_event(obs.dim()), obs=obs)

    return model


def observes(fn: Callable[[torch.Tensor], Any], obs: Any) -> Callable[[], None]:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", fn(z), obs=obs)

    return model


def latent(fn: Callable[[], Any]) -> Callable[[], None]:
    def model() -> None:
        pyro.sample("z", fn())

    return model


def factored(value: Any) -> Callable[[], None]:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", value * z.detach() ** 0)

    return model


def two_latents() -> None:
    pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("w", dist.Normal(0.0, 1.0))


def plated(size: int, obs: torch.Tensor) -> Callable[[], None]:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size):
            pyro.sample("x", dist.Normal(z, 1.0), obs=obs)

    return model


def unregistered(where: str) -> tuple[Callable[[], None], Callable[[], None]]:
    network = nn.Linear(1, 1)

    def model() -> None:
        loc = network(torch.ones(1)).squeeze(-1) if where == "model" else torch.tensor(0.0)
        pyro.sample("z", dist.Normal(loc, 1.0))

    def module_guide() -> None:
        shift = network(torch.ones(1)).squeeze(-1) if where == "guide" else 0.0
        pyro.sample("z", dist.Normal(loc() + shift, 1.0))

    return model, module_guide


class NoGradient(dist.Normal):  # type: ignore[misc]
    """Claims a reparameterized draw but cuts its gradient."""

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> torch.Tensor:  # noqa: B008
        return super().rsample(sample_shape).detach()


def enumerated_guide() -> None:
    loc()
    pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})


ok_model = model_with(torch.tensor([1.0, 2.0]))


def scaled_by_nan() -> None:
    with poutine.scale(scale=torch.tensor(NAN)):
        ok_model()


BAD = [
    Bad("NaN in data", model_with(torch.tensor([1.0, NAN])), guide, "site 'x'"),
    Bad("NaN in data, validated", model_with(torch.tensor([1.0, NAN])), guide, "x", validate=True),
    Bad("infinite data", model_with(torch.tensor([1.0, INF])), guide, "site 'x'"),
    Bad("NaN scale in the model", model_with(torch.ones(2), torch.tensor(NAN)), guide, "site 'x'"),
    Bad("zero scale in the model", model_with(torch.ones(2), torch.tensor(0.0)), guide, "site 'x'"),
    Bad("negative scale, validated", model_with(torch.ones(2), torch.tensor(-1.0)), guide, "scale", validate=True),
    Bad("NaN prior", latent(lambda: dist.Normal(torch.tensor(NAN), 1.0)), guide, "site 'z'"),
    Bad("zero prior scale", latent(lambda: dist.Normal(0.0, torch.tensor(0.0))), guide, "site 'z'"),
    Bad("NaN parameter", ok_model, lambda: pyro.sample("z", dist.Normal(loc() * NAN, 1.0)), "site 'z'"),
    Bad("infinite parameter", ok_model, lambda: pyro.sample("z", dist.Normal(loc() + INF, 1.0)), "site 'z'"),
    Bad("zero guide scale", ok_model, lambda: pyro.sample("z", dist.Normal(loc(), torch.tensor(0.0))), "site 'z'"),
    Bad("NaN factor", factored(NAN), guide, "site 'f'"),
    Bad("factor of minus infinity", factored(-INF), guide, "site 'f'"),
    Bad("NaN scale weight", scaled_by_nan, guide, "site 'z'|site 'x'"),
    Bad(
        "data outside the support", observes(lambda z: dist.Gamma(z.exp(), 1.0), torch.tensor(-1.0)), guide, "site 'x'"
    ),
    Bad(
        "data outside, validated",
        observes(lambda z: dist.Gamma(z.exp(), 1.0), torch.tensor(-1.0)),
        guide,
        "site 'x'",
        validate=True,
    ),
    Bad(
        "category out of range, validated",
        observes(lambda z: dist.Categorical(logits=torch.zeros(2) + z), torch.tensor(2)),
        guide,
        "x",
        True,
    ),
    Bad(
        "latent outside the support",
        latent(lambda: dist.Beta(2.0, 2.0)),
        lambda: pyro.sample("z", dist.Normal(loc() + 5, 0.1)),
        "site 'z'",
    ),
    Bad(
        "uniform that does not cover the guide",
        latent(lambda: dist.Uniform(0.0, 1.0)),
        lambda: pyro.sample("z", dist.Uniform(0.0, 2.0 + loc())),
        "site 'z'",
    ),
    Bad("guide misses a site", two_latents, guide, "site 'w' is latent in the model but the guide has no"),
    Bad(
        "guide misses a site, validated",
        two_latents,
        guide,
        "site 'w' is latent in the model but the guide has no",
        validate=True,
    ),
    Bad("empty guide", ok_model, lambda: None, "site 'z' is latent"),
    Bad(
        "a log weight of what the guide enumerates",
        latent(lambda: dist.Bernoulli(0.5)),
        enumerated_guide,
        "site 'z' of the guide is marked for enumeration.*gradient='score_function'.*mark it in the model",
        objective=lambda: DecomposedELBO(gradient="score_function", num_particles=2),
    ),
    Bad(
        "several draws of a site of the model",
        config_enumerate(latent(lambda: dist.Bernoulli(0.5)), num_samples=3),
        lambda: loc(),
        "site 'z' of the model is marked with num_samples=3.*Draw it in the guide",
    ),
    Bad("empty batch", model_with(torch.zeros(0)), guide, "site 'x' is empty"),
    Bad("empty plate", plated(0, torch.zeros(0)), guide, "size cannot be zero.*empty"),
    Bad(
        "rows against columns",
        observes(lambda z: dist.Normal(z * torch.ones(3), 1.0), torch.zeros(3, 1)),
        guide,
        "site 'x'.*broadcast",
    ),
    Bad("too much data for the plate", plated(3, torch.zeros(4)), guide, "x|size of tensor", validate=True),
    Bad("too much data, not validated", plated(3, torch.zeros(4)), guide, "site 'x'|size of tensor"),
    Bad(
        "batch outside a plate",
        observes(lambda z: dist.Normal(z * torch.ones(3), 1.0), torch.zeros(3)),
        guide,
        'site "x"',
        validate=True,
    ),
    Bad(
        "event of the wrong size",
        observes(lambda z: dist.Normal(z * torch.ones(3), 1.0).to_event(1), torch.zeros(2)),
        guide,
        "site 'x'",
    ),
    Bad(
        "shapes of model and guide differ",
        latent(lambda: dist.Normal(torch.zeros(3), 1.0).to_event(1)),
        lambda: pyro.sample("z", dist.Normal(loc() + torch.zeros(2), 1.0).to_event(1)),
        "site 'z'",
        validate=True,
    ),
    Bad(
        "shapes differ, not validated",
        latent(lambda: dist.Normal(torch.zeros(3), 1.0).to_event(1)),
        lambda: pyro.sample("z", dist.Normal(loc() + torch.zeros(2), 1.0).to_event(1)),
        "site 'z'",
    ),
    Bad(
        "event dims differ",
        latent(lambda: dist.Normal(torch.zeros(3), 1.0).to_event(1)),
        lambda: pyro.sample("z", dist.Normal(loc() + torch.zeros(3), 1.0)),
        "site 'z'",
        validate=True,
    ),
    Bad("a draw without gradient", ok_model, lambda: pyro.sample("z", NoGradient(loc(), 1.0)), "site 'z'.*gradient"),
    Bad("module not registered in the guide", *unregistered("guide"), "network.weight.*pyro.module"),
    Bad("module not registered in the model", *unregistered("model"), "network.bias.*pyro.module"),
    Bad(
        "no closed form",
        latent(lambda: dist.StudentT(3.0)),
        guide,
        "site 'z'.*StudentT",
        objective=lambda: DecomposedELBO(kl="analytic"),
    ),
    Bad(
        "schedule that returns NaN",
        ok_model,
        guide,
        "kl_weight",
        objective=lambda: DecomposedELBO(kl_weight=lambda step: NAN),
    ),
    Bad(
        "schedule that returns a negative weight",
        ok_model,
        guide,
        "kl_weight",
        objective=lambda: DecomposedELBO(kl_weight=lambda step: -1.0),
    ),
    Bad(
        "NaN in the second of two particles",
        model_with(torch.tensor([1.0, NAN])),
        guide,
        "site 'x'",
        objective=lambda: DecomposedELBO(num_particles=2),
    ),
    Bad(
        "NaN in data, sampled",
        model_with(torch.tensor([1.0, NAN])),
        guide,
        "site 'x'",
        objective=lambda: DecomposedELBO(kl="sampled"),
    ),
]


def assert_rejected(bad: Bad, objective: Any) -> None:
    """The error says what is wrong, and nothing has changed."""
    guide()
    parameter = pyro.get_param_store()._params["loc"]
    before = parameter.detach().clone()
    with pyro.validation_enabled(bad.validate):
        svi = SVI(bad.model, bad.guide, pyro.optim.Adam({"lr": 0.1}), objective)
        with pytest.raises((ValueError, RuntimeError), match=f"(?s){bad.match}"):
            svi.step()
    assert torch.equal(parameter, before)
    assert parameter.grad is None or not parameter.grad.any()
    assert objective.history is not None
    assert len(objective.history) == 0


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_programs(bad: Bad) -> None:
    assert_rejected(bad, bad.objective())


def test_there_are_many() -> None:
    assert len(ARGUMENTS) + len(BAD) >= 40
    assert len({bad.name for bad in BAD}) == len(BAD)


def test_the_step_is_named() -> None:
    data = torch.tensor([1.0, 2.0])
    model = model_with(data)
    elbo = DecomposedELBO()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), elbo)
    for _ in range(3):
        svi.step()
    before = pyro.param("loc").detach().clone()
    data[0] = NAN
    with (
        pyro.validation_enabled(False),
        pytest.raises(ValueError, match=r"site 'x' \(observed\) has log_p = nan at step 3"),
    ):
        svi.step()
    assert torch.equal(pyro.param("loc"), before)
    data[0] = 1.0
    svi.step()
    assert elbo.history is not None
    assert elbo.history.steps.tolist() == [0, 1, 2, 3]


def test_unregistered_module_is_fine_where_svi_does_not_collect() -> None:
    model, module_guide = unregistered("guide")
    elbo = DecomposedELBO()
    elbo.loss_and_grads(model, module_guide)
    elbo.differentiable_loss(model, module_guide).backward()


def test_frozen_module_is_fine() -> None:
    network = nn.Linear(1, 1).requires_grad_(False)

    def frozen_guide() -> None:
        pyro.sample("z", dist.Normal(loc() + network(torch.ones(1)).squeeze(-1), 1.0))

    SVI(ok_model, frozen_guide, pyro.optim.Adam({"lr": 0.1}), DecomposedELBO()).step()


def test_hidden_parameters_are_known_to_pyro() -> None:
    autoguide = AutoNormal(ok_model)
    autoguide()
    hidden = poutine.block(autoguide, hide_types=["param"])
    SVI(ok_model, hidden, pyro.optim.Adam({"lr": 0.1}), DecomposedELBO()).step()


# Several particles

MULTI_ARGUMENTS: list[tuple[Callable[[], Any], str]] = [
    (lambda: ImportanceWeightedELBO(0), "num_particles"),
    (lambda: ImportanceWeightedELBO(-3), "num_particles"),
    (lambda: ImportanceWeightedELBO(True), "num_particles"),
    (lambda: ImportanceWeightedELBO(1.5), "num_particles|integer"),  # type: ignore[arg-type]
    (lambda: ImportanceWeightedELBO("2"), "num_particles|integer"),  # type: ignore[arg-type]
    (lambda: ImportanceWeightedELBO(2, -1), "max_plate_nesting"),
    (lambda: ImportanceWeightedELBO(vectorize_particles="yes"), "vectorize_particles"),
    (lambda: ImportanceWeightedELBO(gradient="reinforce"), "gradient must be one of"),
    (lambda: ImportanceWeightedELBO(gradient=None), "gradient must be one of"),
    (lambda: ImportanceWeightedELBO(history=3), "history"),
    (lambda: ImportanceWeightedELBO(kl="auto"), "kl"),
    (lambda: ImportanceWeightedELBO(bound=IWAE()), "bound"),
    (lambda: ImportanceWeightedELBO(gradient="vargrad"), "vargrad.*score_function"),
    (lambda: MultiSampleELBO(IWAE), "bound must be a Bound"),  # type: ignore[arg-type]
    (lambda: MultiSampleELBO("iwae"), "bound must be a Bound"),  # type: ignore[arg-type]
    (lambda: MultiSampleELBO(4), "bound must be a Bound"),  # type: ignore[arg-type]
    (lambda: MultiSampleELBO(ELBO(), 1, gradient="vargrad"), "num_particles of at least 2"),
    (lambda: DecomposedELBO(1, gradient="vargrad"), "num_particles of at least 2"),
    (lambda: DecomposedELBO(2, kl="analytic", gradient="score_function"), "kl='sampled'"),
    (lambda: RenyiELBO(NAN), "alpha"),
    (lambda: RenyiELBO(INF), "alpha"),
    (lambda: Renyi(-INF), "alpha"),
    (lambda: RenyiELBO(0.5, 0), "num_particles"),
    (lambda: RenyiELBO("0.5"), "alpha|real number"),  # type: ignore[arg-type]
    (lambda: ChiUpperBound(1), "n must be .* greater than 1"),
    (lambda: ChiUpperBound(0.5), "n must be .* greater than 1"),
    (lambda: ChiUpperBound(-2), "n must be .* greater than 1"),
    (lambda: CUBO(NAN), "n must be .* greater than 1"),
    (lambda: CUBO(INF), "n must be .* greater than 1"),
    (lambda: ThermodynamicELBO([0.0, 0.6, 0.5, 1.0]), "betas must increase from 0 to 1"),
    (lambda: ThermodynamicELBO([0.0, 0.5, 0.5, 1.0]), "betas must increase from 0 to 1"),
    (lambda: ThermodynamicELBO([0.1, 1.0]), "betas must increase from 0 to 1"),
    (lambda: ThermodynamicELBO([0.0, 0.9]), "betas must increase from 0 to 1"),
    (lambda: ThermodynamicELBO([0.0, NAN, 1.0]), "betas must increase from 0 to 1"),
    (lambda: ThermodynamicELBO([0.0]), "betas must increase from 0 to 1"),
    (lambda: ThermodynamicELBO([]), "betas must increase from 0 to 1"),
    (lambda: TVO(side="left"), "side must be 'lower' or 'upper'"),  # type: ignore[arg-type]
    (lambda: ThermodynamicELBO(side="both"), "side must be 'lower' or 'upper'"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("make", "match"), MULTI_ARGUMENTS, ids=lambda value: value if isinstance(value, str) else "")
def test_arguments_of_several_particles(make: Callable[[], Any], match: str) -> None:
    with pytest.raises((ValueError, TypeError), match=match):
        make()


# What is wrong with the programs is wrong whatever the objective; but the score function needs no path, and a particle
# outside the support has weight zero.
NOT_SHARED = ("a draw without gradient", "uniform that does not cover the guide")
SHARED = [bad for bad in BAD if bad.objective is DecomposedELBO and bad.name not in NOT_SHARED]


@pytest.mark.parametrize("bad", SHARED, ids=str)
@pytest.mark.parametrize("gradient", ["pathwise", "doubly_reparameterized", "score_function"])
@pytest.mark.parametrize("bound", [IWAE(), TVO(side="upper")], ids=str)
def test_programs_with_several_particles(bound: Bound, gradient: Any, bad: Bad) -> None:
    assert_rejected(bad, MultiSampleELBO(bound, 3, gradient=gradient))


@pytest.mark.parametrize("gradient", ["pathwise", "doubly_reparameterized"])
def test_a_draw_without_gradient(gradient: Any) -> None:
    bad = next(bad for bad in BAD if bad.name == "a draw without gradient")
    assert_rejected(bad, ImportanceWeightedELBO(3, gradient=gradient))


def hierarchy(size: int | None = None, *, nested: bool = False) -> Callable[[], None]:
    """A global latent z, and w in a plate; w2 in a plate inside it."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4, subsample_size=size, dim=-1):
            w = pyro.sample("w", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(w, 1.0), obs=torch.zeros(size or 4))
            if nested:
                with pyro.plate("groups", 3, dim=-2):
                    pyro.sample("x2", dist.Normal(w, 1.0), obs=torch.zeros(3, size or 4))

    return model


def hierarchy_guide(size: int | None = None) -> Callable[[], None]:
    def run() -> None:
        guide()
        with pyro.plate("data", 4, subsample_size=size, dim=-1):
            pyro.sample("w", dist.Normal(0.0, 1.0))

    return run


def in_a_loop() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    for i in pyro.plate("data", 6, subsample_size=2):
        pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=torch.tensor(1.0))


def learnable_prior() -> None:
    z = pyro.sample("z", dist.Normal(pyro.param("prior", torch.tensor(0.0)), 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))


planar = dist.transforms.planar(2)


def planar_model() -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z.sum(), 1.0), obs=torch.tensor(1.0))


def planar_guide() -> None:
    pyro.module("planar", planar)
    pyro.sample("z", dist.TransformedDistribution(dist.Normal(loc() + torch.zeros(2), 1.0).to_event(1), [planar]))


def scaled_guide() -> None:
    guide()
    with poutine.scale(scale=0.5):
        pyro.sample("w", dist.Normal(0.0, 1.0))


def everywhere_impossible() -> None:
    pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("f", torch.tensor(-INF))


def options(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[], Any]:
    return lambda: make(*args, **kwargs)


MULTI = [
    Bad(
        "unknown plate",
        hierarchy(),
        hierarchy_guide(),
        "local_plates names 'rows'.*the plates are data",
        objective=options(ImportanceWeightedELBO, 2, local_plates="rows"),
    ),
    Bad(
        "no plates at all",
        ok_model,
        guide,
        "local_plates names 'data'.*the plates are none",
        objective=options(ImportanceWeightedELBO, 2, local_plates="data"),
    ),
    Bad(
        "partly inside",
        hierarchy(nested=True),
        hierarchy_guide(),
        "site 'w' is in plate 'data' but not in 'groups'",
        objective=options(ImportanceWeightedELBO, 2, local_plates=["data", "groups"]),
    ),
    Bad(
        "upper bound with local plates",
        hierarchy(),
        hierarchy_guide(),
        "local_plates=.*'data'.*CUBO is an upper one. Use a lower bound",
        objective=options(ChiUpperBound, 2.0, 2, local_plates="data"),
    ),
    Bad(
        "negative alpha with local plates",
        hierarchy(),
        hierarchy_guide(),
        "local_plates=.*'data'.*Renyi is an upper one",
        objective=options(RenyiELBO, -1.0, 2, local_plates="data"),
    ),
    Bad(
        "vectorized, with a global latent",
        hierarchy(),
        hierarchy_guide(),
        "site 'z' is outside local_plates.*'data'.*vectorize_particles=False",
        objective=options(ImportanceWeightedELBO, 2, 1, vectorize_particles=True, local_plates="data"),
    ),
    Bad(
        "doubly reparameterized, with a global latent",
        hierarchy(),
        hierarchy_guide(),
        "site 'z' is outside local_plates.*'data'.*gradient='doubly_reparameterized'.*gradient='pathwise'",
        objective=options(ImportanceWeightedELBO, 2, gradient="doubly_reparameterized", local_plates="data"),
    ),
    Bad(
        "a subsample with a global latent",
        hierarchy(2),
        hierarchy_guide(2),
        "plate 'data', which subsamples 2 of 4, but 'z' is not in it.*local_plates='data'.*DecomposedELBO",
        objective=ImportanceWeightedELBO,
    ),
    Bad(
        "a subsample in a loop",
        in_a_loop,
        guide,
        "site 'x.' is in plate 'data'.*sequential.*as a context",
        objective=ImportanceWeightedELBO,
    ),
    Bad(
        "different scales in the guide",
        two_latents,
        scaled_guide,
        "guide sites 'z' and 'w' have different scales, 1 and 0.5",
        objective=ImportanceWeightedELBO,
    ),
    Bad(
        "every particle impossible",
        everywhere_impossible,
        guide,
        "site 'f' .observed. has log_p = -inf",
        objective=options(ImportanceWeightedELBO, 3),
    ),
    Bad(
        "every particle impossible, upper bound",
        everywhere_impossible,
        guide,
        "site 'f' .observed. has log_p = -inf",
        objective=options(ChiUpperBound, 2, 3),
    ),
    Bad(
        "a flow that cannot be inverted",
        planar_model,
        planar_guide,
        "guide site 'z' is known only at its own draw.*gradient='pathwise'",
        objective=options(ImportanceWeightedELBO, 2, gradient="doubly_reparameterized"),
    ),
    Bad(
        "a flow that cannot be inverted, ELBO",
        planar_model,
        planar_guide,
        "guide site 'z' is known only at its own draw.*gradient='pathwise'",
        objective=options(DecomposedELBO, 2, gradient="doubly_reparameterized"),
    ),
    Bad(
        "a parameter of the model under an upper bound",
        learnable_prior,
        guide,
        "ChiUpperBound is minimized.*the model's 'prior'.*hide_types",
        objective=ChiUpperBound,
    ),
    Bad(
        "a parameter of the model under an upper sum",
        learnable_prior,
        guide,
        "ThermodynamicELBO is minimized.*the model's 'prior'",
        objective=options(ThermodynamicELBO, side="upper"),
    ),
    Bad(
        "one particle for gradients of particles",
        ok_model,
        guide,
        "gradient_snr='particles' needs|gradient_snr='particles'. needs",
        objective=options(ImportanceWeightedELBO, 1, history=History(gradient_snr="particles")),
    ),
]


@pytest.mark.parametrize("bad", MULTI, ids=str)
def test_several_particles(bad: Bad) -> None:
    with pyro.validation_enabled(False):
        bad.guide(), planar(torch.zeros(2))
    assert_rejected(bad, bad.objective())


@pytest.mark.parametrize("bound", [IWAE(), Renyi(0.5), Renyi(-1.0), CUBO(2.0)], ids=str)
@pytest.mark.parametrize("gradient", ["pathwise", "doubly_reparameterized", "score_function"])
def test_one_impossible_particle_is_fine(bound: Bound, gradient: Any) -> None:
    """It has weight zero, and so no part in the path's gradient: as if one of two particles of three had been drawn."""
    runs = itertools.count()

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", -z.square() if next(runs) % 3 != 1 else torch.tensor(-INF))

    guide()
    parameter = pyro.get_param_store()._params["loc"]
    objective = MultiSampleELBO(bound, 3, gradient=gradient)
    pyro.set_rng_seed(1)
    loss = objective.loss_and_grads(model, guide)
    assert parameter.grad is not None
    assert parameter.grad.isfinite()
    assert objective.last is not None
    log_weights = objective.last.log_weights
    assert log_weights.isinf().tolist() == [False, True, False]
    power = getattr(bound, "power")  # noqa: B009 - a Bound has none
    expected = (power * log_weights).exp().mean().log() / power
    assert loss == pytest.approx(-expected.item() if bound.side == "lower" else expected.item(), rel=1e-5)
    pyro.set_rng_seed(1)
    differentiable = objective.differentiable_loss(model, guide)
    assert differentiable.item() == pytest.approx(loss)
    assert torch.autograd.grad(differentiable, parameter)[0] == pytest.approx(parameter.grad.item(), rel=1e-5)
    contributions = objective.last.contributions
    assert contributions is not None
    assert all(math.isfinite(contribution) for contribution in contributions.values())
    if gradient == "pathwise":
        pyro.set_rng_seed(1)
        noise = torch.stack([torch.randn(()) for _ in range(3)])[[0, 2]]
        location = parameter.detach().clone().requires_grad_()
        z = location + noise
        terms = dist.Normal(0.0, 1.0).log_prob(z) - z.square() - dist.Normal(location, 1.0).log_prob(z)
        (by_hand,) = torch.autograd.grad((power * terms).logsumexp(0) / power, location)
        torch.testing.assert_close(parameter.grad, -by_hand if bound.side == "lower" else by_hand)


@pytest.mark.parametrize("bound", [ELBO(), TVO(), Renyi(2.0)], ids=str)
def test_one_impossible_particle_where_the_bound_is_minus_infinity(bound: Bound) -> None:
    runs = itertools.count()

    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", torch.tensor(0.0 if next(runs) % 3 != 1 else -INF))

    assert_rejected(Bad("", model, guide, "site 'f' .observed. has log_p = -inf"), MultiSampleELBO(bound, 3))


def test_history_of_impossible_particles() -> None:
    """The ELBO of such a step is minus infinity, its bound is not."""
    runs = itertools.count()

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", -z.square() if next(runs) % 7 else torch.tensor(-INF))

    objective = ImportanceWeightedELBO(2)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), objective)
    losses = [svi.step() for _ in range(20)]
    assert all(math.isfinite(loss) for loss in losses)
    history = objective.history
    assert history is not None
    assert history.objective.tolist() == [-loss for loss in losses]
    assert (~torch.tensor(history.elbo).isfinite()).sum() == 6
    assert history.to_dataframe().contribution.notna().all()
    summary = history.summary()
    assert summary.contribution.abs().max() < INF
    assert "contribution" in history._repr_html_()
    assert objective.last is not None
    assert "contribution" in objective.last._repr_html_()


def test_model_parameters_can_be_hidden_from_an_upper_bound() -> None:
    hidden = poutine.block(learnable_prior, hide_types=["param"])
    guide()
    pyro.param("prior", torch.tensor(0.0))
    before = {name: value.detach().clone() for name, value in pyro.get_param_store()._params.items()}
    SVI(hidden, guide, pyro.optim.Adam({"lr": 0.1}), ChiUpperBound(2, 4)).step()
    after = pyro.get_param_store()._params
    assert torch.equal(after["prior"], before["prior"])
    assert not torch.equal(after["loc"], before["loc"])
    # where the caller has its own way to the parameters it is left to the caller
    ChiUpperBound(2, 4).loss_and_grads(learnable_prior, guide)
    # a lower bound trains both
    SVI(learnable_prior, guide, pyro.optim.Adam({"lr": 0.1}), ImportanceWeightedELBO(4)).step()
    assert not torch.equal(pyro.get_param_store()._params["prior"], before["prior"])
