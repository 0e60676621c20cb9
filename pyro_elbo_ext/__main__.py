"""``python -m pyro_elbo_ext``: ``demo``, the whole path on real data; ``diagnose``, a report on a model and its guide."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from pyro_elbo_ext import __version__
from pyro_elbo_ext.diagnosis.command import FAILED as DIAGNOSE_FAILED
from pyro_elbo_ext.diagnosis.command import HELP as DIAGNOSE_HELP
from pyro_elbo_ext.diagnosis.command import command as diagnose_command


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


class _Parser(argparse.ArgumentParser):
    """With another exit status for wrong arguments where 2 has a meaning of its own."""

    status = 2

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(self.status, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = _Parser(prog="python -m pyro_elbo_ext", description="Variational inference in Pyro made legible.")
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
    diagnose = commands.add_parser(
        "diagnose",
        help="is a fit any good? A report on a model and guide of yours",
        description="How far is a guide from the posterior? Writes a page and says it in words.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=DIAGNOSE_HELP,
    )
    diagnose.status = DIAGNOSE_FAILED
    diagnose.add_argument("model", metavar="module:model", help="the model, in a module that can be imported from here")
    diagnose.add_argument(
        "--guide", required=True, metavar="module:guide", help="the guide, or what makes it of a model"
    )
    diagnose.add_argument("--data", metavar="DATA.npz", help="their arguments, by name")
    diagnose.add_argument("--params", metavar="PARAMS.pt", help="the fit, by pyro.get_param_store().save")
    diagnose.add_argument(
        "--mcmc", metavar="DRAWS", help="posterior draws: ArviZ's .nc, or posteriordb's .npz, .json, .zip"
    )
    diagnose.add_argument("--num-draws", type=_positive, metavar="N", help="draws of the guide")
    diagnose.add_argument("--seed", type=_seed, default=0, metavar="S", help="seed of the draws (default: %(default)s)")
    diagnose.add_argument("--output", default="report.html", metavar="FILE", help="the page (default: %(default)s)")
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:  # told by the command's own parser, for its exit status
        commands.choices[arguments.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    if arguments.command == "diagnose":
        return diagnose_command(**{name: value for name, value in vars(arguments).items() if name != "command"})

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
