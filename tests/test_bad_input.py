"""Wrong input gets an error that names the site or argument, and no parameter changes."""

from __future__ import annotations

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

from pyro_elbo_ext import DecomposedELBO, History

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
    objective: Callable[[], DecomposedELBO] = DecomposedELBO

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
    Bad("enumeration in the guide", latent(lambda: dist.Bernoulli(0.5)), enumerated_guide, "site 'z'.*TraceEnum_ELBO"),
    Bad(
        "enumeration in the model",
        config_enumerate(latent(lambda: dist.Bernoulli(0.5))),
        lambda: loc(),
        "site 'z'.*TraceEnum_ELBO",
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


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_programs(bad: Bad) -> None:
    guide()
    parameter = pyro.get_param_store()._params["loc"]
    before = parameter.detach().clone()
    objective = bad.objective()
    with pyro.validation_enabled(bad.validate):
        svi = SVI(bad.model, bad.guide, pyro.optim.Adam({"lr": 0.1}), objective)
        with pytest.raises((ValueError, RuntimeError), match=f"(?s){bad.match}"):
            svi.step()
    assert torch.equal(parameter, before)
    assert parameter.grad is None or not parameter.grad.any()
    assert objective.history is not None
    assert len(objective.history) == 0


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
