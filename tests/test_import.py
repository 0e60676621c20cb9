"""What importing the package brings and what it does not: modules are counted, not seconds."""

from __future__ import annotations

import ast
import inspect
import json
import os
import pickle
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import pyro_elbo_ext

# what tables, files, plots and statistics need, each between a tenth of a second and two seconds
HEAVY = {"arviz", "matplotlib", "pandas", "scipy.stats", "xarray", "joblib", "cloudpickle", "nutpie", "sklearn"}
STAGES = """
import json, sys
import pyro
seen = set(sys.modules)
for line in ("import pyro_elbo_ext", "from pyro_elbo_ext import DecomposedELBO", "from pyro_elbo_ext import *",
             "from pyro_elbo_ext.inference_data.export import to_arviz; to_arviz({})"):
    exec(line)
    print(json.dumps(sorted(set(sys.modules) - seen)))
"""


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[set[str]], Path]:
    """The modules that are there beside Pyro's after each of four lines, in an interpreter in which warnings are errors."""
    cache = tmp_path_factory.mktemp("cache")  # without the mark by which ArviZ knows that it has given its notice today
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-W", "error::FutureWarning", "-c", STAGES],
        env={**os.environ, "XDG_CACHE_HOME": str(cache)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return [set(json.loads(line)) for line in ran.stdout.splitlines()], cache


def test_the_package_alone_imports_nothing(stages: tuple[list[set[str]], Path]) -> None:
    assert stages[0][0] == {"pyro_elbo_ext"}


def test_an_objective_imports_what_it_needs(stages: tuple[list[set[str]], Path]) -> None:
    found = stages[0][1]
    assert not found & HEAVY
    rooms = {name.split(".")[1] for name in found if name.startswith("pyro_elbo_ext.")}
    assert rooms == {"bounds", "files", "history", "objectives", "particles", "programs", "terms"}


def test_all_names_at_once_leave_arviz_for_later(stages: tuple[list[set[str]], Path]) -> None:
    assert not stages[0][2] & {"arviz", "matplotlib", "nutpie", "sklearn", "torch._inductor"}


def test_arviz_comes_without_its_notice(stages: tuple[list[set[str]], Path]) -> None:
    modules, cache = stages
    assert "arviz" in modules[3]  # and its FutureWarning would have ended the interpreter
    if metadata.version("arviz").startswith("0.") and sys.platform == "linux":
        assert list(cache.rglob("daily_warning"))  # it was given


def test_every_public_name() -> None:
    assert pyro_elbo_ext.__all__ == sorted(set(pyro_elbo_ext.__all__))
    assert {"Bound", "Gradient", "Callback", "StoppingRule", "DecomposedELBO", "fit"} <= set(pyro_elbo_ext.__all__)
    for name in pyro_elbo_ext.__all__:
        value = getattr(pyro_elbo_ext, name)
        assert value.__name__ == name
        assert inspect.getdoc(value)
        assert value.__module__.startswith("pyro_elbo_ext.")
    assert set(pyro_elbo_ext.__all__) <= set(dir(pyro_elbo_ext))
    taken: dict[str, Any] = {}
    exec("from pyro_elbo_ext import *", taken)
    assert set(taken) - {"__builtins__"} == set(pyro_elbo_ext.__all__)


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(inspect.getsource(pyro_elbo_ext))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {}
    for line in block.body:
        assert isinstance(line, ast.ImportFrom)
        (alias,) = line.names
        assert alias.asname == alias.name  # which re-exports it
        seen[alias.name] = line.module
    assert seen == {name: f"pyro_elbo_ext.{module}" for name, module in pyro_elbo_ext._MODULES.items()}


def test_rooms_are_attributes() -> None:
    code = "import pyro_elbo_ext as p; print(p.bounds.IWAE.__name__, hasattr(p, 'nothing'), p.__version__)"
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["IWAE", "False", pyro_elbo_ext.__version__]
    with pytest.raises(AttributeError, match="module 'pyro_elbo_ext' has no attribute 'DecomposedElbo'"):
        pyro_elbo_ext.DecomposedElbo  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'DecomposedElbo'"):
        exec("from pyro_elbo_ext import DecomposedElbo")


@pytest.mark.parametrize("name", pyro_elbo_ext.__all__)
def test_public_names_are_pickled_by_reference(name: str) -> None:
    value = getattr(pyro_elbo_ext, name)
    assert pickle.loads(pickle.dumps(value)) is value
