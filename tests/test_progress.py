"""The line of progress, where it can be overwritten and where it cannot."""

from __future__ import annotations

import io
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_elbo_ext import DecomposedELBO, LinearWarmup, fit
from pyro_elbo_ext.training import progress as module
from pyro_elbo_ext.training.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(elbo: float) -> dict[str, float]:
    return {"elbo": elbo, "reconstruction": elbo + 2, "kl_prior": 2.0}


@pytest.mark.parametrize(("slope", "word"), [(1.0, "(rising)"), (-1.0, "(falling)"), (0.0, "(level)")])
def test_trend(slope: float, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    bar = Progress(100, 0, True)
    noise = 0.1 * (-1.0) ** np.arange(12)
    for i, value in enumerate(noise):
        bar.show(shown(-100 + slope * i + value), "lr 0.1")
        bar.advance(1)
    bar.close()
    last = stream.getvalue().split("\r")[-1]
    assert word in last
    for part in ("ELBO -", "reconstruction", "KL(q||prior) 2", "lr 0.1", "12/100", "step/s"):
        assert part in last


def test_too_few_numbers_have_no_trend(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    bar = Progress(None, 0, True)
    for value in (1.0, 2.0, 3.0):
        bar.show(shown(value), "")
    bar.close()
    assert not any(word in stream.getvalue() for word in ("rising", "falling", "level"))


def test_a_log_file_gets_whole_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_overwrites", lambda: False)

    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide() -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(1.0)), torch.tensor(1.0)))

    pyro.clear_param_store()
    result = fit(model, guide, num_steps=300, compiled=False, loss=DecomposedELBO(kl_weight=LinearWarmup(100)))
    out, err = capsys.readouterr()
    assert out == ""
    assert "\r" not in err
    lines = err.splitlines()
    assert len(lines) < 6  # not one for each refresh
    assert any("steps by Pyro, uncompiled: compiled=False" in line for line in lines)
    assert "300/300" in lines[-1]
    assert f"ELBO {result.elbo:.5g}," in lines[-1]  # the result's own, not that of the last few steps, and no trend
    assert "KL(q||prior)" in lines[-1]
    assert lines[-1].isascii()


def test_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Progress(10, 0, False)
    assert not bar.is_due
    bar.advance(3)
    bar.say("nothing")
    bar.close()
    assert capsys.readouterr().err == ""
