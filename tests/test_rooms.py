"""The rooms of the package, as its own imports tell them: which room may use which, and that there are no circles."""

from __future__ import annotations

import ast
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

import pyro_elbo_ext

ROOT = Path(pyro_elbo_ext.__file__).parent
NAME = ROOT.name

# Top to bottom: a room uses those below it, and no other. This list is the only place that says so; the docs show it.
ROOMS = [
    "__main__",
    "demo",
    "__init__",
    "training",
    "diagnosis",
    "automatic",
    "mcmc",
    "density",
    "calibration",
    "amortized",
    "evidence",
    "comparison",
    "compile",
    "objectives",
    "particles",
    "inference_data",
    "bounds",
    "terms",
    "history",
    "programs",
    "files",
]
MOST_LINES = 430  # of a file: one past about 400 is two
MOST_BOXES = 20  # of a drawing of the package: folders and modules at its top, inside the frame that `__init__` is


class Import(NamedTuple):
    """One imported name: ``importer`` and ``module`` without the package's own name, ``name`` None for a module."""

    importer: str
    line: int
    module: str
    name: str | None

    def __str__(self) -> str:
        what = self.module if self.name is None else f"{self.name} from {self.module}"
        return f"{self.importer}:{self.line} imports {what}"


def modules() -> dict[str, Path]:
    """Dotted name inside the package to file; a folder's own file is called ``folder.__init__``."""
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(ROOT.rglob("*.py"))}


MODULES = modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8"), str(path)) for name, path in MODULES.items()}
FOLDERS = sorted({name.rpartition(".")[0] for name in MODULES})  # "" is the package


def module_of(dotted: str) -> str | None:
    """The module of this name inside the package, given with the package's name before it; None for anything else."""
    inside = dotted.removeprefix(NAME).removeprefix(".")
    if dotted != NAME and not dotted.startswith(f"{NAME}."):
        return None
    return next((name for name in (inside, f"{inside}.__init__".removeprefix(".")) if name in MODULES), None)


def imports_of(importer: str) -> list[Import]:
    """Every import of the package's own modules, wherever it stands: at the top, in a function, for types only."""
    found = []
    for node in ast.walk(TREES[importer]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                module = module_of(alias.name)
                if module is not None:
                    found.append(Import(importer, node.lineno, module, None))
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                whole, module = module_of(f"{node.module}.{alias.name}"), module_of(node.module)
                if whole is not None:
                    found.append(Import(importer, node.lineno, whole, None))
                elif module is not None:
                    found.append(Import(importer, node.lineno, module, alias.name))
    return found


IMPORTS = [one for name in MODULES for one in imports_of(name)]


def child_of(folder: str, module: str) -> str | None:
    """The folder or file right inside ``folder`` that a module is in; None if it is elsewhere."""
    inside = module if not folder else module.removeprefix(f"{folder}.")
    return None if folder and inside == module else inside.partition(".")[0]


def arrows(folder: str) -> dict[str, dict[str, Import]]:
    """From each child of a folder to the others it imports, with one import that says so."""
    found: dict[str, dict[str, Import]] = defaultdict(dict)
    for one in IMPORTS:
        a, b = child_of(folder, one.importer), child_of(folder, one.module)
        if a is not None and b is not None and a != b:
            found[a].setdefault(b, one)
    return found


def circle(folder: str) -> list[str]:
    """Imports that lead from a child of the folder back to it; empty if none do."""
    graph = arrows(folder)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        way = error.args[1][::-1]  # graphlib gives it from what is used to what uses it
        return [str(graph[a][b]) for a, b in pairwise(way)]
    return []


def test_the_root_has_only_its_doors_and_rooms() -> None:
    here = {path.name for path in ROOT.iterdir() if path.name != "__pycache__"}
    files = {name for name in here if (ROOT / name).is_file()}
    assert files == {"__init__.py", "__main__.py", "py.typed"}
    assert not list((ROOT / "data").rglob("*.py"))  # files of data, not a room
    rooms = (here - files - {"data"}) | {name.removesuffix(".py") for name in files if name.endswith(".py")}
    assert rooms == set(ROOMS)
    assert len(ROOMS) == len(set(ROOMS))


def test_the_drawing_of_the_rooms_fits_on_a_page() -> None:
    assert len([room for room in ROOMS if room != "__init__"]) <= MOST_BOXES


def test_files_are_short() -> None:
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    long = {name: length for name, length in lengths.items() if length > MOST_LINES}
    assert not long, f"files to be split at a seam: {long}"


def test_imports_name_their_module_in_full() -> None:
    relative = [
        f"{name}:{node.lineno}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.level or any(alias.name == "*" for alias in node.names))
    ]
    assert not relative, f"relative or starred imports hide what is used: {relative}"


def test_a_room_uses_only_rooms_below_it() -> None:
    upward = [
        str(one)
        for one in IMPORTS
        if ROOMS.index(one.importer.partition(".")[0]) > ROOMS.index(one.module.partition(".")[0])
    ]
    assert not upward, "imports that run up:\n" + "\n".join(upward)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder or NAME)
def test_no_circle_between_the_children_of_a_folder(folder: str) -> None:
    way = circle(folder)
    assert not way, "imports that lead back to where they began:\n" + "\n".join(way)


def past_the_face() -> list[str]:
    """Imports of a name from a file of a folder, by one outside it, that the folder's own file gives."""
    faces = {
        folder: {(one.module, one.name) for one in IMPORTS if one.importer == f"{folder}.__init__"}
        for folder in FOLDERS
        if folder
    }
    return [
        f"{one}: take it from {folder}"
        for one in IMPORTS
        for folder, face in faces.items()
        if not one.importer.startswith(f"{folder}.") and (one.module, one.name) in face
    ]


def test_nothing_reaches_past_a_face_that_has_the_name() -> None:
    past = past_the_face()
    assert not past, "\n".join(past)


def test_nothing_private_is_taken_from_another_file() -> None:
    private = [str(one) for one in IMPORTS if _is_private(one.name or one.module.rpartition(".")[2])]
    assert not private, "\n".join(private)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder])
def test_a_folder_says_what_it_is_for(folder: str) -> None:
    tree = TREES[f"{folder}.__init__"]
    text = ast.get_docstring(tree)
    assert text, f"{folder}/__init__.py has no docstring"
    assert text.split("\n\n")[0].endswith((".", "?")), f"the first line of {folder}/__init__.py is no sentence"
    given = {one.name or one.module.rpartition(".")[2] for one in IMPORTS if one.importer == f"{folder}.__init__"}
    named = [node.value for node in tree.body if isinstance(node, ast.Assign) and _is_all(node)]
    listed = set(ast.literal_eval(named[0])) if named else set()
    assert listed == given, f"__all__ of {folder}/__init__.py is not what it imports"


def _is_all(node: ast.Assign) -> bool:
    return [target.id for target in node.targets if isinstance(target, ast.Name)] == ["__all__"]


def test_no_folder_without_its_own_file() -> None:
    assert not [folder for folder in FOLDERS if f"{folder}.__init__".removeprefix(".") not in MODULES]


# That the checks above can fail


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from pyro_elbo_ext.terms.kl import x", [("terms.kl", "x")]),
        ("def f():\n    from pyro_elbo_ext.terms import kl", [("terms.kl", None)]),
        ("if TYPE_CHECKING:\n    from pyro_elbo_ext.terms import Terms", [("terms.__init__", "Terms")]),
        ("import pyro_elbo_ext.terms.kl as k, torch", [("terms.kl", None)]),
        ("import pyro_elbo_ext", [("__init__", None)]),
        ("from pyro_elbo_ext import fit, terms", [("__init__", "fit"), ("terms.__init__", None)]),
        ("import pyro_elbo_extras\nfrom pyro.infer import SVI", []),
    ],
)
def test_every_way_of_importing_is_seen(
    source: str, expected: list[tuple[str, str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TREES, "x", ast.parse(source))
    assert [(one.module, one.name) for one in imports_of("x")] == expected


def test_a_circle_is_found_at_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    way = [("training.data.batches", "training.state.state"), ("training.state.checkpoints", "training.data.scaling")]
    added = [Import(a, 1, b, None) for a, b in way]
    monkeypatch.setitem(globals(), "IMPORTS", added)
    assert sorted(circle("training")) == sorted(map(str, added))
    assert not circle("")
    assert not circle("training.data")
