"""``python -m pyro_elbo_ext``: ``demo``, the whole path on real data; ``diagnose``, a report on a model and its guide."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, NoReturn

import pyro_elbo_ext

# What takes seconds to import is imported by the command that needs it.

ABOUT = """\
Variational inference in Pyro made legible, trustworthy and fast.

{prog} demo        all three on eight schools, in a minute (--quick: in 20 seconds)
{prog} diagnose    is a fit of yours any good? A report on a model and its guide
{prog} --version   the versions that matter for a bug report
{prog} COMMAND --help

In Python, one line at a time:
  DecomposedELBO()           for pyro.infer.Trace_ELBO(): every term of the ELBO, by site and step
  diagnose(model, guide, x)  how far the guide is from the posterior, why, and what to do about it
  fit(model, "auto", x)      a guide that is made and fitted without tuning
  CompiledSVI(...)           for pyro.infer.SVI(...): the same steps as machine code
  run_nuts, compare_to_mcmc  the posterior to compare with
All names: dir(pyro_elbo_ext); what one does: help(pyro_elbo_ext.fit)"""

DIAGNOSE = """\
The arrays of the data file go to model and guide as keyword arguments by name: numbers with a fraction as tensors of
torch's default dtype, whole numbers and truth values as they are, arrays without axes as Python numbers.
A guide that is a class or a function whose first parameter is called `model`, as pyro.infer.autoguide:AutoNormal, is
called with the model first. Parameters and modules are unpickled and run: use your own only.

exit status: 0, the fit is good; 1, only its means can be used; 2, do not use it; 3, there is no verdict, since
something went wrong."""

PACKAGES = ("torch", "pyro-ppl", "numpy", "scipy", "pandas", "xarray", "arviz", "nutpie")


def versions() -> str:
    """The versions that matter for a bug report, one a line."""
    found = {"pyro_elbo_ext": pyro_elbo_ext.__version__, "Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    found |= {"C++ compiler": _compiler(), "platform": platform.platform()}
    return "\n".join(f"{name:13} {version}" for name, version in found.items())


def _compiler() -> str:
    """The compiler that torch.compile looks for, and the first line that it says of itself."""
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    try:
        said = subprocess.run([name, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{name} does not run ({error}): nothing can be compiled"
    return f"{name}: {said.partition(chr(10))[0]}"


class _Versions(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(versions())
        parser.exit()


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


def _usage_status() -> int:
    return 2


def _no_verdict() -> int:
    from pyro_elbo_ext.diagnosis.command import FAILED

    return FAILED


class _Parser(argparse.ArgumentParser):
    """One that says what is wrong in a line, with another exit status where 2 has a meaning of its own."""

    status: Callable[[], int] = staticmethod(_usage_status)

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(self.status(), f"{self.prog}: error: {message}\n")


def _add_demo(commands: argparse._SubParsersAction[_Parser]) -> None:
    demo = commands.add_parser("demo", help="all that it does, on eight schools")
    demo.add_argument(
        "--output", default="demo_output", metavar="DIR", help="folder for the files (default: %(default)s)"
    )
    demo.add_argument("--seed", type=_seed, default=0, metavar="S", help="of fits and chains (default: %(default)s)")
    demo.add_argument("--quick", action="store_true", help="fewer steps and draws: rougher figures")


def _add_diagnose(commands: argparse._SubParsersAction[_Parser]) -> None:
    diagnose = commands.add_parser(
        "diagnose",
        help="is a fit any good? A report on a model and guide of yours",
        description="How far is a guide from the posterior? Writes a page and says it in words.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=DIAGNOSE,
    )
    diagnose.status = _no_verdict
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = _Parser(
        prog="python -m pyro_elbo_ext", description="Variational inference in Pyro made legible, trustworthy and fast."
    )
    parser.add_argument(
        "--version", action=_Versions, nargs=0, dest=argparse.SUPPRESS, help="the versions that matter for a bug report"
    )
    commands = parser.add_subparsers(dest="command", parser_class=_Parser)
    _add_demo(commands)
    _add_diagnose(commands)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:  # told by the command's own parser, for its exit status
        commands.choices.get(arguments.command, parser).error(f"unrecognized arguments: {' '.join(unknown)}")
    if arguments.command is None:
        print(ABOUT.format(prog=parser.prog))
        return 0
    if arguments.command == "diagnose":
        from pyro_elbo_ext.diagnosis.command import command

        return command(**{name: value for name, value in vars(arguments).items() if name != "command"})

    import torch

    torch.set_num_threads(1)  # tensors of eight numbers: a second thread only waits
    from pyro_elbo_ext.demo import run_demo

    try:
        run_demo(arguments.output, seed=arguments.seed, quick=arguments.quick)
    except (FileExistsError, NotADirectoryError) as error:
        print(f"{parser.prog} demo: error: --output: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
