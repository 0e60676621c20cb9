"""How often rules stop a run too early, and how often too late or not at all, where the best guide is known.

python -m tests.benchmarks.stopping [--seeds N] [--only NAME] [--rate R] [--max-steps N]
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor

from pyro_elbo_ext import CompiledSVI
from pyro_elbo_ext.training.stopping.adaptive import AdaptiveStopping
from pyro_elbo_ext.training.stopping.guide_moments import GuideMoments, Moments, flatten, unflatten
from pyro_elbo_ext.training.stopping.rules import CONTINUE, Decision, StoppingRule

FALSE_STOP = 0.1  # sd: the worst mean's distance from the best guide's


class Problem(NamedTuple):
    """A model with its guide, and the moments of the best guide in its own order."""

    model: Callable[..., Any]
    guide: Callable[..., Any]
    best: Moments


def gaussian() -> Problem:
    """Ten correlated numbers with sds from 0.1 to 10; the best mean-field guide has the inverse precisions as variances."""
    rng = np.random.default_rng(1)
    factor = rng.normal(size=(10, 20))
    scale = np.geomspace(0.1, 10, 10)
    covariance = torch.tensor(np.outer(scale, scale) * np.corrcoef(factor), dtype=torch.float32)
    mean = torch.tensor(scale * rng.normal(size=10), dtype=torch.float32)

    def model() -> None:
        pyro.sample("z", dist.MultivariateNormal(mean, covariance))

    precision = torch.linalg.inv(covariance.double()).diagonal()
    return Problem(model, AutoNormal(model), Moments(mean.double(), -0.5 * precision.log()))


def regression() -> Problem:
    """Linear regression with known noise, 100 rows and 8 correlated predictors, full-rank guide."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(100, 8)) + 1.5 * rng.normal(size=(100, 1))
    y = x @ rng.normal(size=8) + rng.normal(size=100)
    rows, outcome = torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)

    def model() -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(8), 5.0).to_event(1))
        with pyro.plate("row", 100):
            pyro.sample("y", dist.Normal(rows @ weight, 1.0), obs=outcome)

    covariance = np.linalg.inv(x.T @ x + np.eye(8) / 25)
    mean = covariance @ (x.T @ y)
    log_sd = 0.5 * np.log(np.diag(covariance))
    return Problem(model, AutoMultivariateNormal(model), Moments(torch.tensor(mean), torch.tensor(log_sd)))


def logistic() -> Problem:
    """Logistic regression with 300 rows and 10 predictors; the best mean-field guide by quadrature and L-BFGS."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(300, 10)) + 0.5 * rng.normal(size=(300, 1))
    y = (rng.uniform(size=300) < 1 / (1 + np.exp(-x @ rng.normal(size=10)))).astype(float)
    rows, outcome = torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)

    def model() -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(10), 2.0).to_event(1))
        with pyro.plate("row", 300):
            pyro.sample("y", dist.Bernoulli(logits=rows @ weight), obs=outcome)

    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    points, share = torch.tensor(nodes), torch.tensor(weights / weights.sum())
    design, target = torch.tensor(x), torch.tensor(y)
    mean, log_sd = torch.zeros(10).double().requires_grad_(), torch.full((10,), -1.0).double().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [mean, log_sd], max_iter=1000, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def negative_elbo() -> Tensor:
        optimizer.zero_grad()
        # each row's logit is Gaussian under the guide
        center, spread = design @ mean, (design.square() @ (2 * log_sd).exp()).sqrt()
        logits = center[:, None] + spread[:, None] * points
        log_likelihood = (target[:, None] * logits - torch.nn.functional.softplus(logits)) @ share
        prior = -(mean.square() + (2 * log_sd).exp()).sum() / (2 * 4)
        loss = -(log_likelihood.sum() + prior + log_sd.sum())
        loss.backward()
        return loss

    optimizer.step(negative_elbo)
    negative_elbo()
    assert mean.grad is not None
    assert mean.grad.abs().max() < 1e-6
    return Problem(model, AutoNormal(model), Moments(mean.detach(), log_sd.detach()))


PROBLEMS = {"gaussian": gaussian, "regression": regression, "logistic": logistic}


class RelativeChange:
    """Stop when the mean loss of the last window differs from that of the one before by less than 0.1% of it.

    The guide is left at the last iterate, or at the average of the iterates of the second half of the run.
    """

    def __init__(self, tail: bool = False) -> None:
        self.every, self.converged, self.status = 200, False, ""
        self._tail, self._iterates = tail, list[Tensor]()
        self._before = math.nan

    def start(self, parameters: Any, **_: Any) -> None:
        """Begin."""

    def observe(self, step: int, iterate: Tensor, losses: Any) -> Decision:
        """Compare two windows."""
        self._iterates.append(iterate)
        mean = float(losses.mean())
        self.converged = abs(mean - self._before) < 1e-3 * abs(self._before)
        self._before = mean
        return Decision("stop", reason="little change") if self.converged else CONTINUE

    @property
    def average(self) -> Tensor | None:
        """Of the second half."""
        return torch.stack(self._iterates[len(self._iterates) // 2 :]).mean(0) if self._tail else None


class Run(NamedTuple):
    """The end of a run."""

    steps: int
    converged: bool
    worst_mean: float  # sds
    worst_log_sd: float
    seconds: float
    seconds_looking: float
    reason: str


class Trainer:
    """A problem with its compiled steps, which all seeds share."""

    def __init__(self, problem: Problem, particles: int = 1) -> None:
        self.problem = problem
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        problem.guide()
        self.names = dict(pyro.get_param_store()._params)
        self.parameters = list(self.names.values())
        self.first = flatten(self.parameters)
        self.adam = torch.optim.Adam(self.parameters)
        elbo = Trace_ELBO(num_particles=particles)
        self.svi = CompiledSVI(problem.model, problem.guide, self.adam, elbo)
        self.svi.run(200, progress=False)
        self.moments = GuideMoments(problem.guide, self.parameters)

    def fit(self, rule: StoppingRule, seed: int, rate: float, max_steps: int) -> Run:
        """Train from a random start until the rule or the cap ends the run."""
        generator = torch.Generator().manual_seed(seed)
        unflatten(self.first, self.parameters)
        with torch.no_grad():
            for name, parameter in self.names.items():
                if "loc" in name:
                    parameter.copy_(4 * torch.rand(parameter.shape, generator=generator) - 2)
        for state in self.adam.state.values():
            for tensor in state.values():
                tensor.zero_()
        self.adam.param_groups[0]["lr"] = rate
        pyro.set_rng_seed(seed)
        rule.start(self.names, guide=self.problem.guide, learning_rate=rate)
        began, looking, step = time.perf_counter(), 0.0, 0
        reason = "cap"
        while step < max_steps:
            losses = self.svi.run(rule.every, progress=False).numpy()
            step += rule.every
            before = time.perf_counter()
            decision = rule.observe(step, flatten(self.parameters), losses)
            looking += time.perf_counter() - before
            if decision.action == "stop":
                reason = decision.reason
                break
            if decision.action == "lower":
                self.adam.param_groups[0]["lr"] *= decision.factor
                if decision.parameters is not None:
                    unflatten(decision.parameters, self.parameters)
        seconds = time.perf_counter() - began
        average = rule.average
        found = self.moments(flatten(self.parameters) if average is None else average)
        best = self.problem.best
        worst_mean = float(((found.mean - best.mean) / best.log_sd.exp()).abs().max())
        worst_log_sd = float((found.log_sd - best.log_sd).abs().max())
        return Run(step, rule.converged, worst_mean, worst_log_sd, seconds, looking, reason)


RULES: dict[str, Callable[[], Any]] = {
    "AdaptiveStopping": AdaptiveStopping,
    "relative change": RelativeChange,
    "relative change, tail averaged": lambda: RelativeChange(tail=True),
}


COLUMNS = (
    "problem",
    "rule",
    "stops",
    "false stops",
    "not stopped",
    "steps: median, 9 in 10",
    "worst mean, sd: median, 9 in 10, largest",
    "worst log sd: the same",
    "seconds",
    "of them looking",
)


def row(name: str, label: str, runs: Sequence[Run]) -> str:
    """One line of the table."""

    def quantiles(numbers: list[float], at: Sequence[float], digits: int) -> str:
        return ", ".join(f"{value:.{digits}f}" for value in np.quantile(numbers, at))

    cells = (
        name,
        label,
        sum(run.converged for run in runs),
        sum(run.converged and run.worst_mean > FALSE_STOP for run in runs),
        sum(not run.converged for run in runs),
        quantiles([run.steps for run in runs], (0.5, 0.9), 0),
        quantiles([run.worst_mean for run in runs], (0.5, 0.9, 1), 3),
        quantiles([run.worst_log_sd for run in runs], (0.5, 0.9, 1), 3),
        quantiles([run.seconds for run in runs], (0.5,), 2),
        quantiles([run.seconds_looking for run in runs], (0.5,), 2),
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def main(argv: Sequence[str] | None = None) -> None:
    """Run all rules on all problems and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--only", choices=PROBLEMS)
    parser.add_argument("--rate", type=float, default=0.05, help="learning rate of Adam at the start")
    parser.add_argument("--particles", type=int, default=1)
    parser.add_argument("--max-steps", type=int, default=200_000)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for name, build in PROBLEMS.items():
        if given.only not in (None, name):
            continue
        trainer = Trainer(build(), given.particles)
        for label, make in RULES.items():
            runs = [trainer.fit(make(), seed, given.rate, given.max_steps) for seed in range(given.seeds)]
            print(row(name, label, runs), flush=True)


if __name__ == "__main__":
    main()
