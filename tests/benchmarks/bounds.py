"""Step time of ``pyro.infer.SVI`` with bounds of several particles, over that with Pyro's ``RenyiELBO``.

    python -m tests.benchmarks.bounds [--steps N] [--blocks B] [--only NAME]

How it is measured: :mod:`tests.benchmarks.measuring`. Pyro's validation is off.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyro.infer

from pyro_elbo_ext import RenyiELBO
from tests.benchmarks.measuring import Objectives, measure, one_thread, parse, print_header, print_rows
from tests.benchmarks.problems import PROBLEMS, Problem

NAMES = ("eight_schools", "logistic_regression")
NUM_PARTICLES = (1, 16, 64)
NUM_PARTICLES_OF_GRADIENTS = 16
GRADIENTS = ("pathwise", "doubly_reparameterized", "score_function")
SECONDS = 14.0  # for a problem and setting; a slow machine gets fewer blocks, the whole run stays under 3 minutes


def objectives(num_particles: int) -> Objectives:
    """Pyro's, which the others are divided by; ours; and ours with the particles batched, if there are several."""
    looped: Objectives = {
        "pyro.infer.RenyiELBO": lambda: pyro.infer.RenyiELBO(0, num_particles),
        "RenyiELBO": lambda: RenyiELBO(0, num_particles),
    }
    if num_particles == 1:
        return looped
    return {**looped, 'RenyiELBO, "vmap"': lambda: RenyiELBO(0, num_particles, vectorize_particles="vmap")}


def by_gradient(vectorize_particles: bool | str) -> Objectives:
    """The estimators of the gradient, the pathwise one first."""
    return {
        f'gradient="{gradient}"': lambda gradient=gradient: RenyiELBO(
            0, NUM_PARTICLES_OF_GRADIENTS, vectorize_particles=vectorize_particles, gradient=gradient
        )
        for gradient in GRADIENTS
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure bounds and gradients on the chosen problems, and print a table of each."""
    arguments = parse("Step time with bounds of several particles over that with pyro.infer.RenyiELBO.", argv, NAMES)
    chosen = {name: PROBLEMS[name] for name in NAMES if arguments.only in (None, name)}

    def rows(problem: Problem, found: Objectives, steps: int, *labels: object) -> None:
        steps = arguments.steps or steps
        with pyro.validation_enabled(False):
            measured = measure(problem, found, steps=steps, blocks=arguments.blocks, seconds=SECONDS)
        print_rows(measured, *labels)

    with one_thread():
        print_header("problem", "particles")
        for name, problem in chosen.items():
            for num_particles in NUM_PARTICLES:
                steps = max(2, problem.steps // num_particles)
                rows(problem, objectives(num_particles), steps, name, num_particles)
        print_header("problem", f"{NUM_PARTICLES_OF_GRADIENTS} particles")
        for name, problem in chosen.items():
            rows(problem, by_gradient(False), 3, name, "looped")
            rows(problem, by_gradient("vmap"), 20, name, '"vmap"')


if __name__ == "__main__":
    main()
