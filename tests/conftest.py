from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyro
import pytest
import torch

torch.set_num_threads(1)  # tensors of a few elements: further threads only wait for each other

CACHE = "TORCHINDUCTOR_CACHE_DIR"
SLOW = Path(__file__).parent / "slow.txt"  # seconds and test, as mark_slow.py measured them


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu-seconds", metavar="FILE", help="add a line for each test: its seconds of processor time")


def processor_time() -> float:
    """Seconds, those of processes that have ended included."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """What ``mark_slow.py`` reads, one line in one write, as several processes may write to it."""
    file, began = item.config.getoption("--cpu-seconds"), processor_time()
    found = yield
    if file:
        with open(file, "a", buffering=1) as lines:
            lines.write(f"{processor_time() - began:.2f}\t{item.nodeid}\n")
    return found


def pytest_configure(config: pytest.Config) -> None:
    """One folder of compiled graphs for the run, which its processes share; empty at the start."""
    if not hasattr(config, "workerinput") and CACHE not in os.environ:
        folder = os.environ[CACHE] = tempfile.mkdtemp(prefix="compiled_graphs_")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests that were measured to be slow; a line that no test answers to is an error."""
    slow = {line.partition("\t")[2] for line in SLOW.read_text().splitlines()}
    found = set()
    for item in items:
        names = {item.nodeid, item.nodeid.partition("[")[0]} & slow
        found |= names
        if names:
            item.add_marker(pytest.mark.slow)
    if config.args_source == pytest.Config.ArgsSource.TESTPATHS and slow - found:
        raise pytest.UsageError(f"{SLOW.name} names tests that are gone: {', '.join(sorted(slow - found))}")


@pytest.fixture(autouse=True)
def fresh_pyro() -> Iterator[None]:
    """Each test starts with an empty param store, a fixed seed and validation on, and leaves nothing behind."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with pyro.validation_enabled(True):
        yield
    pyro.clear_param_store()
    torch.set_default_dtype(torch.float32)
