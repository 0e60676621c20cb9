"""``python -m pyro_elbo_ext demo``: the whole path, from the ELBO's terms to the comparison with NUTS, on real data."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pyro_elbo_ext import __version__


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _seed(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2**32 - 1, got {number}")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pyro_elbo_ext", description="Variational inference in Pyro made legible."
    )
    parser.add_argument("--version", action="version", version=f"pyro_elbo_ext {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="eight schools: three guides, every term of the ELBO, and NUTS beside them")
    demo.add_argument(
        "--output", default="demo_output", metavar="DIR", help="folder for the files (default: %(default)s)"
    )
    demo.add_argument(
        "--num-steps",
        type=_positive,
        metavar="N",
        help="optimization steps per guide (default: 2000; with --quick 600)",
    )
    demo.add_argument(
        "--seed", type=_seed, default=0, metavar="S", help="seed of fits and chains (default: %(default)s)"
    )
    demo.add_argument("--quick", action="store_true", help="fewer steps and draws; rougher figures")
    arguments = parser.parse_args(argv)

    import torch

    torch.set_num_threads(1)  # tensors of eight numbers: a second thread only waits
    from pyro_elbo_ext.demo import run_demo  # takes seconds: not needed for --help

    try:
        run_demo(arguments.output, num_steps=arguments.num_steps, seed=arguments.seed, quick=arguments.quick)
    except (FileExistsError, NotADirectoryError) as error:
        print(f"{parser.prog} demo: error: --output: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
