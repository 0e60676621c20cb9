"""Build the wheel and the sdist, look into both, and run README's first example where only the wheel is installed.

    python tests/check_distributions.py [FOLDER]     # default: dist, which is emptied

The example runs in a new virtual environment that holds the wheel and, as links into the environment of this interpreter,
the distributions that the wheel says it needs, with what these need, and nothing else: a requirement that is missing
from pyproject.toml is an ImportError. To download them again would take torch's gigabytes each time, and would say no more.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
NAME = "pyro_elbo_ext"
IN_SDIST = (
    *("README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "Makefile", "constraints.txt"),
    *("pyproject.toml", "docs/conf.py", "tests/conftest.py", "tests/test_rooms.py", "tutorials/07_fit.ipynb"),
    *(f"{NAME}/__init__.py", f"{NAME}/py.typed"),
)
EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def run(*command: str | Path, folder: Path = ROOT, **variables: str) -> str:
    """Run a command, its output shown; return what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    print("+", *command, flush=True)
    ran = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    print(ran.stdout, end="", flush=True)
    if ran.returncode:
        sys.exit(f"{Path(command[0]).name} ended with status {ran.returncode}")
    return ran.stdout


def build(folder: Path) -> tuple[Path, Path]:
    """The wheel and the sdist; the wheel is made from the sdist, so that the sdist is known to be whole."""
    shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    run(sys.executable, "-m", "twine", "check", "--strict", *sorted(folder.iterdir()))
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def check_contents(wheel: Path, sdist: Path) -> None:
    """End with what is missing from either, or should not be in the wheel."""
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    with tarfile.open(sdist) as archive:
        unpacked = {name.partition("/")[2] for name in archive.getnames()}
    tracked = {
        str(path.relative_to(ROOT))
        for path in (ROOT / NAME).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    problems = [f"the sdist lacks {name}" for name in sorted({*IN_SDIST, *tracked} - unpacked)]
    problems += [f"the wheel lacks {name}" for name in sorted(tracked - inside)]
    problems += [
        f"the wheel has {name}" for name in sorted(inside - tracked) if not re.match(rf"{NAME}-[^/]+\.dist-info/", name)
    ]
    if problems:
        sys.exit("\n".join(problems))
    print(f"{wheel.name}: {len(inside)} files; {sdist.name}: {len(unpacked)} files")


def needed(requirements: list[str]) -> dict[str, metadata.Distribution]:
    """The installed distributions that the requirements name, with all that these need."""
    found: dict[str, metadata.Distribution] = {}
    wanted = [(Requirement(text), "") for text in requirements]
    while wanted:
        requirement, extra = wanted.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        known = name in found
        if not known:
            found[name] = metadata.distribution(name)
            if not requirement.specifier.contains(found[name].version, prereleases=True):
                sys.exit(f"{name} {found[name].version} is installed, and {requirement} needed")
        for each in (*requirement.extras, *([] if known else [""])):
            wanted += [(Requirement(text), each) for text in found[name].requires or []]
    return found


def link(distributions: dict[str, metadata.Distribution], packages: Path) -> None:
    """Put links to all files and folders of the distributions in ``packages``."""
    for distribution in distributions.values():
        for file in distribution.files or []:
            top = file.parts[0]
            if top not in ("..", "__pycache__", "/") and not (packages / top).exists():
                (packages / top).symlink_to(Path(str(distribution.locate_file(top))).resolve())


def check_example(wheel: Path) -> None:
    """Run README's first example in the new environment, away from the sources."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    example = EXAMPLE.search(text)
    if example is None:
        sys.exit("README.md has no example")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        venv.create(folder / "environment", with_pip=False, symlinks=True)
        python = folder / "environment" / "bin" / "python"
        run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-compile", wheel)
        new = folder / "environment"
        packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        (own,) = metadata.distributions(name=NAME, path=[str(packages)])
        link(needed(own.requires or []), packages)
        (folder / "example.py").write_text(example[1], encoding="utf-8")
        where = run(python, "-c", f"import {NAME}; print({NAME}.__file__)", folder=folder).strip()
        if not Path(where).resolve().is_relative_to(new.resolve()):
            sys.exit(f"the example would run with {where}")
        if not run(python, "example.py", folder=folder).strip():
            sys.exit("README's example prints nothing")
        run(python, "-m", NAME, "--version", folder=folder)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "dist").resolve()
    wheel, sdist = build(folder)
    check_contents(wheel, sdist)
    check_example(wheel)


if __name__ == "__main__":
    main()
