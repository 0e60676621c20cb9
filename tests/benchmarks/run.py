"""Step time of ``pyro.infer.SVI`` with ``DecomposedELBO`` over that with ``Trace_ELBO``.

    python -m tests.benchmarks.run [--steps N] [--blocks B] [--only NAME]

How it is measured: :mod:`tests.benchmarks.measuring`.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyro
from pyro.infer import Trace_ELBO

from pyro_elbo_ext import DecomposedELBO
from tests.benchmarks.measuring import Objectives, measure, one_thread, parse, print_header, print_rows
from tests.benchmarks.problems import PROBLEMS

SECONDS = 18.0  # for a problem and setting; a slow machine gets fewer blocks, the whole run stays under 3 minutes

OBJECTIVES: Objectives = {
    "Trace_ELBO()": Trace_ELBO,  # the one the others are divided by
    'DecomposedELBO(kl="sampled")': lambda: DecomposedELBO(kl="sampled"),
    "DecomposedELBO()": DecomposedELBO,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the chosen problems with Pyro's validation off and on, and print a table."""
    arguments = parse("Step time with DecomposedELBO over that with Trace_ELBO.", argv)
    with one_thread():
        print_header("problem", "validation")
        for name, problem in PROBLEMS.items():
            if arguments.only not in (None, name):
                continue
            for validation in (False, True):
                steps = arguments.steps or problem.steps
                with pyro.validation_enabled(validation):
                    measured = measure(problem, OBJECTIVES, steps=steps, blocks=arguments.blocks, seconds=SECONDS)
                print_rows(measured, name, "on" if validation else "off")


if __name__ == "__main__":
    main()
