"""Step time of ``pyro.infer.SVI`` with ``DecomposedELBO`` over that with ``Trace_ELBO``, in one process.

    python tests/benchmarks/run.py [--steps N] [--blocks B] [--only NAME]

Each objective fits the same problem from the same seed, with parameters of its own; they take turns in short blocks
(A B C A B C ...), each block under one seed, so that a change in the machine's speed hits all of them. Ratios are taken
within a block and their median, least and greatest are printed. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam  # type: ignore[attr-defined]  # Pyro defines it at run time
from torch import Tensor, nn

from pyro_elbo_ext import DecomposedELBO

WARM_UP = 10
SECONDS = 18.0  # for a problem and setting; a slow machine gets fewer blocks, the whole run stays under 3 minutes


class Problem(NamedTuple):
    """A model with its guide and data, built for each objective; ``steps`` is the default length of a block."""

    build: Callable[[], tuple[Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]]
    steps: int


class Block(NamedTuple):
    """Seconds of each step of a block, and the loss of the last step."""

    seconds: list[float]
    loss: float


# ----------------------------------------------------------------------------------------------------------------------
# Problems


def eight_schools() -> tuple[Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]:
    """Eight schools (Rubin, 1981), non-centered, with AutoNormal."""
    effect = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    error = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def model(effect: Tensor, error: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("school", 8):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * theta, error), obs=effect)

    return model, AutoNormal(model), (effect, error)


def logistic_regression() -> tuple[Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]:
    """Logistic regression with 1000 rows and 20 predictors, with AutoNormal."""
    x = torch.randn(1000, 20)
    y = dist.Bernoulli(logits=x @ torch.randn(20)).sample()

    def model(x: Tensor, y: Tensor) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(20), 1.0).to_event(1))
        bias = pyro.sample("bias", dist.Normal(0.0, 5.0))
        with pyro.plate("row", 1000):
            pyro.sample("y", dist.Bernoulli(logits=x @ weight + bias), obs=y)

    return model, AutoNormal(model), (x, y)


def fifty_sites() -> tuple[Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]:
    """Fifty scalar latents, each a site of its own, with AutoNormal."""
    y = torch.randn(50)

    def model(y: Tensor) -> None:
        z = [pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0)) for i in range(50)]
        with pyro.plate("row", 50):
            pyro.sample("y", dist.Normal(torch.stack(z), 1.0), obs=y)

    return model, AutoNormal(model), (y,)


class Encoder(nn.Module):
    """784 pixels to the location and scale of 50 latents."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(784, 400)
        self.loc = nn.Linear(400, 50)
        self.log_scale = nn.Linear(400, 50)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return location and scale, each of shape (batch, 50)."""
        hidden = nn.functional.softplus(self.hidden(x))
        return self.loc(hidden), self.log_scale(hidden).exp()


def vae() -> tuple[Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]:
    """A variational autoencoder 784-400-50 on a batch of 256 random binary images (Kingma and Welling, 2014)."""
    encoder = Encoder()
    decoder = nn.Sequential(nn.Linear(50, 400), nn.Softplus(), nn.Linear(400, 784))
    x = torch.bernoulli(torch.full((256, 784), 0.3))

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("image", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 50), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("image", len(x)):
            pyro.sample("z", dist.Normal(*encoder(x)).to_event(1))

    return model, guide, (x,)


PROBLEMS = {
    "eight_schools": Problem(eight_schools, 40),
    "logistic_regression": Problem(logistic_regression, 40),
    "fifty_sites": Problem(fifty_sites, 5),
    "vae": Problem(vae, 5),
}
OBJECTIVES: dict[str, Callable[[], ELBO]] = {
    "Trace_ELBO()": Trace_ELBO,  # the one the others are divided by
    'DecomposedELBO(kl="sampled")': lambda: DecomposedELBO(kl="sampled"),
    "DecomposedELBO()": DecomposedELBO,
}


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


class Fit:
    """One objective's fit of a problem, with parameters of its own, so that several can take turns in one process."""

    def __init__(self, problem: Problem, objective: Callable[[], ELBO]) -> None:
        pyro.set_rng_seed(0)
        model, guide, self.data = problem.build()
        self.svi = SVI(model, guide, Adam({"lr": 1e-3}), loss=objective())
        with pyro.get_param_store().scope() as self.parameters:
            self.run(WARM_UP)

    def run(self, steps: int) -> Block:
        """Take ``steps`` steps, each timed."""
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            loss = self.svi.step(*self.data)
            seconds.append(time.perf_counter() - start)
        return Block(seconds, float(loss))

    def run_block(self, steps: int, seed: int) -> Block:
        """Take ``steps`` further steps under ``seed``, after two that bring code and data back into the caches."""
        with pyro.get_param_store().scope(self.parameters):
            pyro.set_rng_seed(seed)
            self.run(2)
            return self.run(steps)


def measure(problem: Problem, steps: int, blocks: int) -> dict[str, list[Block]]:
    """Return the blocks of each objective, one per block; in each block the objectives run one after the other.

    On a slow machine there are fewer blocks than asked for, but at least three.
    """
    start = time.perf_counter()
    fits = {name: Fit(problem, objective) for name, objective in OBJECTIVES.items()}
    measured: dict[str, list[Block]] = {name: [] for name in OBJECTIVES}
    gc.collect()
    gc.freeze()  # a later collection looks only at what the steps themselves leave behind
    for seed in range(1, blocks + 1):
        if seed > 3 and time.perf_counter() - start > SECONDS:
            break
        for name, fit in fits.items():
            measured[name].append(fit.run_block(steps, seed))
    gc.unfreeze()
    return measured


def quick(blocks: list[Block]) -> float:
    """Return the time that a tenth of all steps stays below: what a step takes when nothing disturbs it."""
    seconds = sorted(second for block in blocks for second in block.seconds)
    return seconds[len(seconds) // 10]


def print_rows(label: str, validation: bool, measured: dict[str, list[Block]]) -> None:
    """Print one row per objective; the ratios are to the first objective, in the same block."""
    reference = next(iter(measured.values()))
    for name, blocks in measured.items():
        ratios = [sum(block.seconds) / sum(other.seconds) for block, other in zip(blocks, reference, strict=True)]
        same = all(abs(b.loss - r.loss) <= 1e-4 * abs(r.loss) for b, r in zip(blocks, reference, strict=True))
        print(
            f"| {label} | {'on' if validation else 'off'} | `{name}` | {statistics.median(ratios):.3f} "
            f"| {min(ratios):.3f} to {max(ratios):.3f} | {quick(blocks) / quick(reference):.3f} "
            f"| {1e3 * quick(blocks):.3f} | {'yes' if same else 'no'} | {len(blocks)} |",
            flush=True,
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the chosen problems with Pyro's validation off and on, and print a table."""
    parser = argparse.ArgumentParser(description="Step time with DecomposedELBO over that with Trace_ELBO.")
    parser.add_argument("--steps", type=int, help="steps timed in a block (default: 40, in the slower problems 5)")
    parser.add_argument("--blocks", type=int, default=25, help="blocks per problem, at most (default: 25)")
    parser.add_argument("--only", choices=PROBLEMS, help="measure this problem alone")
    arguments = parser.parse_args(argv)
    if arguments.blocks < 1 or (arguments.steps is not None and arguments.steps < 1):
        parser.error("--steps and --blocks must be at least 1")

    torch.set_num_threads(1)
    start = time.perf_counter()
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, Pyro {pyro.__version__}, "
        f"{platform.machine()}, one thread\n\n"
        "| problem | validation | objective | ratio (median of blocks) | least to greatest "
        "| ratio (quick steps) | ms (quick steps) | same loss | blocks |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    for name, problem in PROBLEMS.items():
        if arguments.only in (None, name):
            for validation in (False, True):
                with pyro.validation_enabled(validation):
                    measured = measure(problem, arguments.steps or problem.steps, arguments.blocks)
                print_rows(name, validation, measured)
    pyro.clear_param_store()
    print(f"\n{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
