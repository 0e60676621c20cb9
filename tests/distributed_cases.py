"""What the processes of ``test_distributed`` run: each case in every process, with its part of the data.

    torchrun --nproc-per-node 2 -m tests.distributed_cases FOLDER

The same functions give the results of a single process, with all data, to compare with.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_elbo_ext import CSVTracker, DecomposedELBO, FitResult, ImportanceWeightedELBO, fit
from pyro_elbo_ext.bounds.weighting import Geco
from pyro_elbo_ext.training import processes
from pyro_elbo_ext.training.distributed.svi import DistributedSVI

N, BATCH = 40, 8
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = X @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + 0.3


def part(batch: Tensor, sizes: tuple[int, ...] = (BATCH // 2, BATCH // 2)) -> Tensor:
    """This process's part of a batch; the whole of it in a single process."""
    return batch.split(list(sizes))[processes.rank()] if processes.is_distributed() else batch


def batches(num_steps: int) -> list[Tensor]:
    """Indices of the data, shape (BATCH,) for each step."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randperm(N, generator=generator)[:BATCH] for _ in range(num_steps)]


def regression(x: Tensor, y: Tensor, size: int = N) -> None:
    weights = pyro.sample("weights", dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(torch.zeros((), dtype=torch.float64), 1.0))
    with pyro.plate("row", size, subsample_size=len(y)):
        pyro.sample("y", dist.Normal(x @ weights, sigma), obs=y)


def plain_guide(x: Tensor, y: Tensor, size: int = N) -> None:
    """Parameters that no module holds; their start differs between processes."""
    zero = torch.zeros(3, dtype=torch.float64)
    loc = pyro.param("loc", zero + processes.rank())
    scale = pyro.param("scale", zero + 0.1 + processes.rank(), constraint=constraints.positive)
    pyro.sample("weights", dist.Normal(loc, scale).to_event(1))
    pyro.sample("sigma", dist.Delta(pyro.param("sigma_loc", zero[0] + 1.0, constraint=constraints.positive)))


class GivenNoise(dist.Normal):
    """A Normal whose draws are made of noise that the caller has drawn."""

    def __init__(self, loc: Tensor, scale: Tensor, noise: Tensor, validate_args: bool | None = None) -> None:
        super().__init__(loc, scale, validate_args=validate_args)
        self.noise = noise

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.loc + self.scale * self.noise

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        return GivenNoise(self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.noise)


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 4, dtype=torch.float64)
        self.decoder = nn.Linear(2, 3, dtype=torch.float64)

    def model(self, x: Tensor, noise: Tensor) -> None:
        pyro.module("vae", self)
        offset = pyro.sample("offset", dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1))
        with pyro.plate("row", N, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(offset + self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor, noise: Tensor) -> None:
        pyro.module("vae", self)
        # a parameter that no module holds, if this one does not
        offset = self.offset if hasattr(self, "offset") else pyro.param("offset_loc", torch.ones_like(x[0]))
        pyro.sample("offset", dist.Delta(offset, event_dim=1))
        with pyro.plate("row", N, subsample_size=len(x)):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", GivenNoise(loc, log_scale.exp(), noise).to_event(1))


def parameters() -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in pyro.get_param_store()._params.items()}


def table(loss: Any) -> pd.DataFrame:
    return loss.history.to_dataframe().drop(columns=["kl_reason", "kl_method"])


def message(action: Callable[[], Any]) -> str:
    """Type and text of the error that it raises."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def train(svi: Any, num_steps: int, sizes: tuple[int, ...] = (BATCH // 2, BATCH // 2)) -> list[float]:
    return [svi.step(part(X[index], sizes), part(Y[index], sizes)) for index in batches(num_steps)]


def ready(guide: Any) -> Any:
    """Set up an autoguide, alike wherever it is done."""
    pyro.set_rng_seed(0)
    guide(X[:BATCH], Y[:BATCH])
    return guide


Result = dict[str, Any]


def auto_normal(svi_class: Any = DistributedSVI, **options: Any) -> Result:
    """Global latents with the same draws in all processes; Adam; one of the two sites is folded and analytic."""
    guide, loss = ready(AutoNormal(regression)), DecomposedELBO(num_particles=2)
    svi = svi_class(regression, guide, pyro.optim.Adam({"lr": 0.05}), loss, **options)
    return {"losses": train(svi, 6), "parameters": parameters(), "table": table(loss)}


def shared_auto_normal() -> Result:
    return auto_normal(shared_draws=True, seed=5)


def lazy_auto_normal() -> Result:
    """The guide sets itself up in the first step, from other random numbers in each process."""
    pyro.set_rng_seed(processes.rank())
    guide = AutoNormal(regression)
    svi = DistributedSVI(regression, guide, pyro.optim.ClippedAdam({"lr": 0.05}), DecomposedELBO(), seed=1)
    train(svi, 3)
    return {"parameters": parameters()}


def pyro_loss() -> Result:
    guide = ready(AutoNormal(regression))
    optim = torch.optim.Adam(guide.parameters(), lr=0.05)
    svi = DistributedSVI(regression, guide, optim, Trace_ELBO(), shared_draws=True, seed=5)
    losses = train(svi, 4)
    loss = svi.evaluate_loss(part(X[:BATCH]), part(Y[:BATCH]))
    return {"losses": [*losses, loss], "parameters": {name: p.detach() for name, p in guide.named_parameters()}}


def bound() -> Result:
    """A bound that is not linear in the log weights, inside the plate."""

    def model(x: Tensor) -> None:
        scale = pyro.param("prior_scale", torch.ones((), dtype=torch.float64), constraint=constraints.positive)
        with pyro.plate("row", N, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), scale))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        slope = pyro.param("slope", torch.tensor(0.5, dtype=torch.float64))
        with pyro.plate("row", N, subsample_size=len(x)):
            noise = torch.arange(-1.0, 1.0, 2 / 3, dtype=torch.float64)[:3, None].expand(3, len(x))
            pyro.sample("z", GivenNoise(slope * x, torch.tensor(0.7, dtype=torch.float64), noise))

    loss = ImportanceWeightedELBO(3, max_plate_nesting=1, vectorize_particles=True, local_plates="row")
    svi = DistributedSVI(model, guide, pyro.optim.SGD({"lr": 1e-3}), loss)
    losses = [svi.step(part(Y[index])) for index in batches(3)]
    return {"losses": losses, "parameters": parameters(), "table": table(loss)}


def vae(svi_class: Any = DistributedSVI) -> Result:
    """Local latents with given noise, networks that only pyro.module knows, a parameter that no module holds; SGD."""
    pyro.set_rng_seed(3)
    vae, loss = VAE(), DecomposedELBO()
    svi = svi_class(vae.model, vae.guide, pyro.optim.SGD({"lr": 1e-5, "momentum": 0.5}), loss)
    noise = torch.randn(N, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    losses = [svi.step(part(X[index]), part(noise[index])) for index in batches(5)]
    return {"losses": losses, "parameters": parameters(), "table": table(loss)}


def plain_parameters(svi_class: Any = DistributedSVI, **options: Any) -> Result:
    loss = DecomposedELBO()
    svi = svi_class(regression, plain_guide, pyro.optim.Adam({"lr": 0.02}), loss, **options)
    return {"losses": train(svi, 5), "parameters": parameters(), "table": table(loss)}


def shared_plain_parameters() -> Result:
    return plain_parameters(shared_draws=True, seed=6)


def uneven(svi_class: Any = DistributedSVI) -> Result:
    """Batches of 5 and 3, and a guide without noise."""
    guide, loss = ready(AutoDelta(regression)), DecomposedELBO()
    svi = svi_class(regression, guide, pyro.optim.Adam({"lr": 0.05}), loss)
    return {"losses": train(svi, 4, (5, 3)), "parameters": parameters(), "table": table(loss)}


def unscaled(svi_class: Any = DistributedSVI) -> Result:
    """All sites inside the plate of the batch, which nothing scales: the loss is that of the batch."""

    def model(x: Tensor) -> None:
        with pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        slope = pyro.param("slope", torch.tensor(0.1, dtype=torch.float64))
        with pyro.plate("row", len(x)):
            pyro.sample("z", dist.Delta(slope * x))

    loss = DecomposedELBO()
    svi = svi_class(model, guide, pyro.optim.SGD({"lr": 1e-2}), loss)
    losses = [svi.step(part(Y[index], (5, 3))) for index in batches(3)]
    return {"losses": losses, "parameters": parameters(), "table": table(loss)}


def summed_out(svi_class: Any = DistributedSVI, *, in_guide: bool = False) -> Result:
    """A class for each datum, summed out of the model or, with its mark, in the guide."""
    marked = {"enumerate": "parallel"}

    def model(y: Tensor) -> None:
        weights = pyro.param("weights", torch.tensor([0.3, 0.7], dtype=torch.float64), constraint=constraints.simplex)
        locs = pyro.param("locs", torch.tensor([-1.0, 2.0], dtype=torch.float64))
        with pyro.plate("row", N, subsample_size=len(y)):
            z = pyro.sample("z", dist.Categorical(weights), infer={} if in_guide else marked)
            pyro.sample("y", dist.Normal(locs[z], 1.0), obs=y)

    def guide(y: Tensor) -> None:
        if in_guide:
            slope = pyro.param("slope", torch.tensor(0.5, dtype=torch.float64))
            with pyro.plate("row", N, subsample_size=len(y)):
                pyro.sample("z", dist.Categorical(logits=torch.stack([-slope * y, slope * y], -1)), infer=marked)

    loss = DecomposedELBO(max_plate_nesting=1)
    svi = svi_class(model, guide, pyro.optim.SGD({"lr": 1e-3}), loss)
    losses = [svi.step(part(Y[index])) for index in batches(3)]
    return {"losses": losses, "parameters": parameters(), "table": table(loss)}


def enumerated(svi_class: Any = DistributedSVI) -> Result:
    return summed_out(svi_class, in_guide=True)


def geco(svi_class: Any = DistributedSVI) -> Result:
    """A weight that follows the reconstruction of all batches together."""
    guide, loss = ready(AutoDelta(regression)), DecomposedELBO(kl_weight=Geco(-1.2, rate=0.5))
    svi = svi_class(regression, guide, pyro.optim.Adam({"lr": 0.05}), loss)
    return {"losses": train(svi, 4), "parameters": parameters(), "table": table(loss)}


def branches(svi_class: Any = DistributedSVI) -> Result:
    """Each of two networks is used in some steps only; the second appears late."""
    pyro.set_rng_seed(7)
    networks = nn.ModuleList([nn.Linear(3, 1, dtype=torch.float64) for _ in range(2)])

    def model(x: Tensor, y: Tensor, which: int) -> None:
        pyro.module("networks", networks)
        with pyro.plate("row", N, subsample_size=len(y)):
            pyro.sample("y", dist.Normal(networks[which](x)[:, 0], 1.0), obs=y)

    def guide(x: Tensor, y: Tensor, which: int) -> None:
        pass

    svi = svi_class(model, guide, pyro.optim.SGD({"lr": 1e-3}), DecomposedELBO())
    order = [0, 0, 1, 0, 1]
    losses = [svi.step(part(X[index]), part(Y[index]), which) for index, which in zip(batches(5), order, strict=True)]
    return {"losses": losses, "parameters": parameters()}


def own_draws() -> Result:
    guide = ready(AutoNormal(regression))
    svi = DistributedSVI(regression, guide, pyro.optim.Adam({"lr": 0.05}), DecomposedELBO(), seed=8)
    before = torch.get_rng_state()
    loss = svi.step(X[:BATCH], Y[:BATCH])
    return {"loss": loss, "untouched": torch.equal(before, torch.get_rng_state())}


def resumed() -> Result:
    """Six steps, and again the last three of them from the state after three."""
    guide = ready(AutoNormal(regression))
    optim = torch.optim.Adam(guide.parameters(), lr=0.05)
    svi = DistributedSVI(regression, guide, optim, DecomposedELBO(), seed=9)
    losses = train(svi, 3)
    saved = [{name: p.clone() for name, p in guide.state_dict().items()}, optim.state_dict(), svi.state_dict()]
    torch.save(saved, buffer := Path(sys.argv[1], f"resumed{processes.rank()}.pt"))
    losses += [svi.step(part(X[index]), part(Y[index])) for index in batches(6)[3:]]
    state, optim_state, svi_state = torch.load(buffer)
    guide.load_state_dict(state)
    again = torch.optim.Adam(guide.parameters(), lr=0.05)
    again.load_state_dict(optim_state)
    other = DistributedSVI(regression, guide, again, DecomposedELBO(), seed=123)
    other.load_state_dict(svi_state)
    return {"losses": losses[3:], "again": [other.step(part(X[i]), part(Y[i])) for i in batches(6)[3:]]}


def errors() -> Result:
    """Each of them in all processes, before any parameter has changed; the run can go on."""
    pyro.set_rng_seed(0)
    rank, found = processes.rank(), {}
    guide = ready(AutoNormal(regression))
    svi = DistributedSVI(regression, guide, pyro.optim.Adam({"lr": 0.05}), DecomposedELBO(), seed=1)
    train(svi, 2)
    start, x, y = parameters(), part(X[:BATCH]), part(Y[:BATCH])
    bad = y.clone()
    bad[1] = float("nan") if rank == 1 else bad[1]
    with pyro.validation_enabled(False):
        found["nan"] = message(lambda: svi.step(x, bad))
        found["nan, evaluated"] = message(lambda: svi.evaluate_loss(x, bad))
        trace = DistributedSVI(regression, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(), seed=1)
        found["nan, Pyro's loss"] = message(lambda: trace.step(x, bad))
    found["in the model"] = message(lambda: svi.step(x, y[: len(y) - rank]))
    found["size"] = message(lambda: svi.step(x, y, 40 + rank))
    found["unscaled"] = message(lambda: svi.step(x, y, len(y)))

    def two_plates(x: Tensor, y: Tensor) -> None:
        regression(x, y)
        with pyro.plate("other", 20, subsample_size=4 + rank):
            pyro.sample("fixed", dist.Normal(0.0, 1.0), obs=torch.zeros(4 + rank))

    def more_sites(x: Tensor, y: Tensor) -> None:
        regression(x, y)
        if rank == 1:
            pyro.sample("extra", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    def by_rank(x: Tensor, y: Tensor) -> None:
        plain_guide(x, y)
        pyro.param("sized", torch.zeros(2 + rank))

    for name, model, of in (
        ("plates", two_plates, guide),
        ("sites", more_sites, guide),
        ("parameters", regression, by_rank),
    ):
        other = DistributedSVI(model, of, pyro.optim.Adam({"lr": 0.05}), DecomposedELBO(), seed=1)
        found[name] = message(lambda other=other: other.step(x, y))
    found["free bits"] = message(lambda: DistributedSVI(regression, guide, svi.optim, DecomposedELBO(free_bits=0.1)))
    now = parameters()
    same = all(torch.equal(now[name], value) for name, value in start.items())
    return {"errors": found, "unchanged": same, "goes on": svi.step(x, y)}


def gradient() -> Result:
    """A finite loss with an infinite gradient."""

    def model(y: Tensor) -> None:
        root = pyro.param("root", torch.zeros((), dtype=torch.float64)).sqrt()
        with pyro.plate("row", N, subsample_size=len(y)):
            pyro.sample("y", dist.Normal(root, 1.0), obs=y)

    svi = DistributedSVI(model, lambda y: None, pyro.optim.SGD({"lr": 0.1}), DecomposedELBO())
    return {"error": message(lambda: svi.step(part(Y[:BATCH]))), "root": pyro.param("root").item()}


def helpers() -> Result:
    def fail() -> None:
        raise OSError("disk full")

    return {
        "rank": processes.rank(),
        "size": processes.world_size(),
        "decision": processes.from_main({"stop": processes.rank()}),
        "done": processes.on_main(processes.rank),
        "failed": message(lambda: processes.on_main(fail)),
    }


def fitted() -> Result:
    """Two epochs of fit with held-out data; and again, stopped in the first and resumed."""
    folder = Path(sys.argv[1])
    data = torch.utils.data.TensorDataset(X, Y)
    sampler = torch.utils.data.DistributedSampler(data) if processes.is_distributed() else None
    loader = torch.utils.data.DataLoader(data, batch_size=BATCH // 2, sampler=sampler)

    def run_to(num_steps: int, name: str, resume: bool = False) -> FitResult:
        pyro.clear_param_store()
        pyro.set_rng_seed(processes.rank())  # other initial values in each process
        scale = 0.1 + processes.rank()
        guide = AutoNormal(regression, init_scale=scale)
        callbacks = [CSVTracker(folder / f"{name}.csv")]
        return fit(
            regression,
            guide,
            loader,
            num_steps=num_steps,
            validation=(X[processes.rank() :: 2], Y[processes.rank() :: 2]),
            checkpoint=folder / f"{name}.pt",
            resume=resume,
            callbacks=callbacks,
            log_every=2,
            progress=False,
        )

    def found(result: FitResult) -> Result:
        return {"parameters": parameters(), "table": table(result.loss), "validation": result.validation}

    whole = found(run_to(10, "whole"))
    run_to(4, "halved")
    resumed = run_to(10, "halved", resume=True)
    halved = found(resumed)
    bad = Y.clone()
    bad[39] = float("nan")  # of process 1, which has the odd rows
    pyro.clear_param_store()
    pairs = [(X[processes.rank() :: 2], of[processes.rank() :: 2]) for of in (Y, bad)]
    with pyro.validation_enabled(False):
        guide = ready(AutoNormal(regression))
        nan = message(lambda: fit(regression, guide, batches=pairs, num_steps=4, progress=False, dataset_size=N))
    return {"whole": whole, "halved": halved, "reason": resumed.reason, "nan": nan}


CASES: list[Callable[[], Result]] = [
    shared_auto_normal,
    lazy_auto_normal,
    pyro_loss,
    bound,
    vae,
    shared_plain_parameters,
    uneven,
    unscaled,
    summed_out,
    enumerated,
    geco,
    branches,
    own_draws,
    resumed,
    errors,
    gradient,
    fitted,
    helpers,
]
WITHOUT_DRAWS = (vae, uneven, unscaled, summed_out, enumerated, geco, branches)
SINGLE = {case.__name__: partial(case, SVI) for case in WITHOUT_DRAWS}


def run(case: Callable[[], Result]) -> Result:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    return case()


if __name__ == "__main__":
    torch.set_num_threads(1)
    pyro.enable_validation(True)
    processes.start(60.0)
    results = {case.__name__: run(case) for case in CASES}
    torch.save(results, Path(sys.argv[1], f"{processes.rank()}.pt"))
    torch.distributed.destroy_process_group()
