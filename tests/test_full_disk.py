"""A disk that is full: an error that names the file, the old file as it was, nothing left beside it; and then it goes on."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_elbo_ext import CSVTracker, FitResult, History, fit
from pyro_elbo_ext.files.atomic import write_whole

resource = pytest.importorskip("resource")  # not on Windows

Y = torch.tensor([0.3, -0.2, 1.1, 0.4])


def model(y: torch.Tensor) -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(400), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z.mean(), 1.0), obs=y)


@contextmanager
def no_space(left: int) -> Iterator[None]:
    """No file grows beyond ``left`` bytes, which to a program is a write that fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (left, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fitted(num_steps: int = 8, **options: Any) -> FitResult:
    return fit(
        model, AutoNormal(model), Y, num_steps=num_steps, seed=1, compiled=False, progress=False, log_every=1, **options
    )


WRITERS: dict[str, Callable[[Path, FitResult], Any]] = {
    "checkpoint.pt": lambda path, _: fitted(checkpoint=path, resume=True, num_steps=12 if path.exists() else 8),
    "result.pt": lambda path, result: result.save(path),
    "history.nc": lambda path, result: result.history.save(path),
    "page.html": lambda path, _: write_whole(path, bytes(9000)),
}


@pytest.mark.parametrize("left", [0, 3000])
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_said_and_leaves_the_old_file(name: str, left: int, tmp_path: Path) -> None:
    path, write = tmp_path / name, WRITERS[name]
    result = fitted()
    write(path, result)
    before = path.read_bytes()
    assert len(before) > 3000
    pyro.clear_param_store()
    result = fitted()
    with no_space(left), pytest.raises(OSError, match=rf"File too large: '{path}'") as raised:
        write(path, result)
    assert raised.value.errno == errno.EFBIG
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    write(path, result)


def test_a_table_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    given: dict[str, Any] = {"checkpoint": tmp_path / "run.pt", "checkpoint_every": 2}
    fitted(num_steps=4, callbacks=[CSVTracker(path)], **given)
    whole = path.read_bytes()
    pyro.clear_param_store()
    given["checkpoint_every"] = 100
    with no_space(len(whole) + 20), pytest.raises(OSError, match=rf"File too large: '{path}'"):
        fitted(callbacks=[CSVTracker(path)], resume=True, **given)
    pyro.clear_param_store()
    fitted(callbacks=[CSVTracker(path)], resume=True, **given)
    rows = path.read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", *map(str, range(1, 9))]
    assert len({row.count(",") for row in rows}) == 1


def test_a_history_is_read_as_it_was(tmp_path: Path) -> None:
    result = fitted()
    result.history.save(tmp_path / "history.nc")
    again = History.load(tmp_path / "history.nc")
    assert again.to_dataframe().equals(result.history.to_dataframe())
