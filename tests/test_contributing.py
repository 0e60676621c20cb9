"""What CONTRIBUTING.md and CITATION.cff say is so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal

import pyro_elbo_ext
from pyro_elbo_ext.bounds import ELBO, IWAE

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_bound_that_is_added() -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    exec(example, names)
    bound = names["Half"]()
    log_weights = torch.randn(8, 5, dtype=torch.float64)
    value = bound.value(log_weights)
    expected = (ELBO().value(log_weights) + IWAE().value(log_weights)) / 2
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(bound.value(log_weights + 3.0), value + 3.0)
    torch.testing.assert_close(bound.gradient(log_weights).sum(0), torch.ones(5, dtype=torch.float64))

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.05}), names["objective"])
    losses = [svi.step() for _ in range(300)]
    evidence = dist.Normal(0.0, 2.0**0.5).log_prob(torch.tensor(1.0)).item()
    # the guide's family holds the posterior, where every bound is log p(x)
    assert sum(losses[-100:]) / 100 == pytest.approx(-evidence, abs=0.02)


def test_what_it_names_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"make ([a-z-]+)", TEXT)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for path in set(re.findall(r"`((?:tests|pyro_elbo_ext)/[\w/.]*)`", TEXT)):
        assert (ROOT / path).exists(), path


def test_one_version() -> None:
    cited = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert cited == [pyro_elbo_ext.__version__]
    assert f"## [{pyro_elbo_ext.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
