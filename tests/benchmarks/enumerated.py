"""Step time of ``pyro.infer.SVI`` with ``TraceEnum_ELBO`` over that of this package, on programs with enumerated sites.

    python -m tests.benchmarks.enumerated [--blocks B] [--only NAME] [--eager] [--growth]

As ``tests.benchmarks.compiled``: one thread, validation off, in turns, in one process. ``--eager`` leaves the compiled ones
out. ``--growth`` prints instead how long tracing and compiling take as a Python loop of ``pyro.markov`` grows. For NumPyro's
update beside it see ``tests.benchmarks.peers``.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, JitTraceEnum_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam  # type: ignore[attr-defined]  # Pyro defines it at run time
from torch import Tensor, nn

from pyro_elbo_ext import CompiledSVI, DecomposedELBO
from tests.benchmarks.compiled import Contestant, Runner

Built = tuple[Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]


def _hidden(model: Any, *names: str) -> tuple[Any, Any]:
    """The model with its discrete sites marked, and a mean-field guide of the others."""
    marked = config_enumerate(model)
    return marked, AutoNormal(poutine.block(model, hide_fn=lambda site: site["name"].partition("_")[0] in names))


def mixture() -> Built:
    """Gaussian mixture of 5, 1000 data."""
    data = torch.cat([torch.randn(200) + 3.0 * k for k in range(5)])

    def model(data: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(5)))
        with pyro.plate("components", 5):
            locs = pyro.sample("locs", dist.Normal(6.0, 5.0))
            scales = pyro.sample("scales", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("y", dist.Normal(locs[z], scales[z]), obs=data)

    return *_hidden(model, "z"), (data,)


def hmm(states: int = 16, length: int = 50, sequences: int = 20) -> Built:
    """Hidden Markov model: a Python loop over 50 times, 20 sequences."""
    data = torch.randn(length, sequences).cumsum(0)

    def model(data: Tensor) -> None:
        rows = pyro.sample("rows", dist.Dirichlet(torch.ones(states, states) + states * torch.eye(states)).to_event(1))
        locs = pyro.sample("locs", dist.Normal(torch.linspace(-8.0, 8.0, states), 2.0).to_event(1))
        with pyro.plate("sequences", sequences, dim=-1):
            x: Any = 0
            for t in pyro.markov(range(length)):
                x = pyro.sample(f"x_{t}", dist.Categorical(rows[x]))
                pyro.sample(f"y_{t}", dist.Normal(locs[x], 1.0), obs=data[t])

    return *_hidden(model, "x"), (data,)


def factorial_hmm() -> Built:
    """Two chains of 4 states that meet in the data, 20 times, 20 sequences."""
    data = torch.randn(20, 20).cumsum(0)

    def model(data: Tensor) -> None:
        prior = dist.Dirichlet(torch.ones(4, 4) + 4.0 * torch.eye(4)).to_event(1)
        a, b = pyro.sample("rows_a", prior), pyro.sample("rows_b", prior)
        locs = pyro.sample("locs", dist.Normal(torch.zeros(4, 4), 5.0).to_event(2))
        with pyro.plate("sequences", data.shape[1], dim=-1):
            w: Any = 0
            x: Any = 0
            for t in pyro.markov(range(len(data))):
                w = pyro.sample(f"w_{t}", dist.Categorical(a[w]))
                x = pyro.sample(f"x_{t}", dist.Categorical(b[x]))
                pyro.sample(f"y_{t}", dist.Normal(locs[w, x], 1.0), obs=data[t])

    return *_hidden(model, "w", "x"), (data,)


def semi_supervised() -> Built:
    """Autoencoder with a class of 10 that the guide enumerates, 784 pixels, batch of 200."""
    data = (torch.rand(200, 784) < 0.3).float()
    decoder = nn.Sequential(nn.Linear(30, 200), nn.Softplus(), nn.Linear(200, 784))
    classes = nn.Sequential(nn.Linear(784, 200), nn.Softplus(), nn.Linear(200, 10))
    encoder = nn.Sequential(nn.Linear(794, 200), nn.Softplus(), nn.Linear(200, 40))

    def model(data: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.Normal(torch.zeros(20), 1.0).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(torch.full((10,), 0.1)))
            z = z + torch.zeros_like(y[..., :1])  # for each class
            logits = decoder(torch.cat([z, y + torch.zeros_like(z[..., :1])], -1))
            pyro.sample("x", dist.Bernoulli(logits=logits, validate_args=False).to_event(1), obs=data)

    @config_enumerate
    def guide(data: Tensor) -> None:
        pyro.module("classes", classes)
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(data)):
            y = pyro.sample("y", dist.OneHotCategorical(logits=classes(data)))
            batch = torch.broadcast_shapes(y.shape[:-1], data.shape[:-1])
            given = torch.cat([data.expand(*batch, 784), y.expand(*batch, 10)], -1)
            loc, log_scale = encoder(given).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide, (data,)


def topics() -> Built:
    """Topic model: 8 topics, 200 words of 64 in each of 50 documents, every word's topic summed out."""
    words = torch.randint(0, 64, (200, 50))

    def model(words: Tensor) -> None:
        with pyro.plate("topics", 8):
            by_topic = pyro.sample("weights", dist.Dirichlet(torch.ones(64)))
        with pyro.plate("documents", words.shape[1], dim=-1):
            shares = pyro.sample("shares", dist.Dirichlet(torch.ones(8)))
            with pyro.plate("words", words.shape[0], dim=-2):
                topic = pyro.sample("topic", dist.Categorical(shares))
                pyro.sample("word", dist.Categorical(by_topic[topic]), obs=words)

    return *_hidden(model, "topic"), (words,)


PROBLEMS: dict[str, tuple[Callable[[], Built], int]] = {
    "Gaussian mixture": (mixture, 1),
    "HMM": (hmm, 1),
    "factorial HMM": (factorial_hmm, 1),
    "semi-supervised autoencoder": (semi_supervised, 1),
    "topic model": (topics, 2),
}


def measure(build: Callable[[], Built], nesting: int, blocks: int, *, compiled: bool) -> dict[str, Any]:
    """Seconds per step of each contestant in each block, and seconds of compilation."""

    def svi(loss: Callable[..., Any]) -> Callable[..., Any]:
        return lambda model, guide: SVI(model, guide, Adam({"lr": 0.01}), loss(max_plate_nesting=nesting))

    def compiled_svi(loss: Callable[..., Any]) -> Callable[..., Any]:
        return lambda model, guide: CompiledSVI(model, guide, Adam({"lr": 0.01}), loss(max_plate_nesting=nesting))

    contestants: dict[str, Contestant] = {
        "Pyro": Contestant(build, svi(TraceEnum_ELBO)),
        "eager, DecomposedELBO()": Contestant(build, svi(DecomposedELBO)),
    }
    if compiled:
        contestants["JitTraceEnum_ELBO"] = Contestant(
            build, svi(lambda **options: JitTraceEnum_ELBO(**options, ignore_jit_warnings=True))
        )
        contestants["step, TraceEnum_ELBO"] = Contestant(build, compiled_svi(TraceEnum_ELBO))
        contestants["step, DecomposedELBO()"] = Contestant(build, compiled_svi(DecomposedELBO))
        contestants["run, DecomposedELBO()"] = Runner(build, compiled_svi(DecomposedELBO))
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(blocks):
        for name, contestant in contestants.items():
            seconds[name].append(contestant.block())
    return {name: (seconds[name], getattr(one.svi, "compile_time", 0.0)) for name, one in contestants.items()}


def growth() -> None:
    """Print seconds of compilation of the hidden Markov model by its length."""
    print("| times | compilation s |\n|---|---|")
    for length in (25, 50, 100, 300):
        pyro.clear_param_store()
        model, guide, data = hmm(length=length)
        svi = CompiledSVI(model, guide, Adam({"lr": 0.01}), DecomposedELBO(max_plate_nesting=1))
        for _ in range(3):
            svi.step(*data)
        print(f"| {length} | {svi.compile_time:.1f} |", flush=True)


def main() -> None:
    """Print a table of ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--only", choices=PROBLEMS)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--growth", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, Pyro {pyro.__version__}, one thread\n")
    with pyro.validation_enabled(False):
        if arguments.growth:
            growth()
            return
        print(
            "| problem | by | times as fast as Pyro's step (median) | least to greatest | ms | Pyro ms | compilation s |"
        )
        print("|---|---|---|---|---|---|---|")
        for name, (build, nesting) in PROBLEMS.items():
            if arguments.only not in (None, name):
                continue
            measured = measure(build, nesting, arguments.blocks, compiled=not arguments.eager)
            base, _ = measured.pop("Pyro")
            for contestant, (seconds, compilation) in measured.items():
                ratios = [b / s for b, s in zip(base, seconds, strict=True)]
                print(
                    f"| {name} | {contestant} | {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} | "
                    f"{1e3 * statistics.median(seconds):.4f} | {1e3 * statistics.median(base):.3f} | {compilation:.1f} |",
                    flush=True,
                )
    pyro.clear_param_store()


if __name__ == "__main__":
    main()
