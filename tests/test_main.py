"""``python -m pyro_elbo_ext``: what it says by itself. Its commands are in test_demo.py and test_diagnose_command.py."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import metadata

import pytest
import torch._inductor.config

import pyro_elbo_ext
from pyro_elbo_ext.__main__ import main, versions


def test_alone_it_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert max(map(len, out.splitlines())) <= 100
    for what in ("demo", "diagnose", "--version", "--help"):
        assert f"python -m pyro_elbo_ext {what}" in out or f"COMMAND {what}" in out
    named = set(re.findall(r"[a-zA-Z_]{3,}", out)) & set(pyro_elbo_ext.__all__)
    assert named >= {"DecomposedELBO", "diagnose", "fit", "CompiledSVI", "run_nuts", "compare_to_mcmc"}


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    found = dict(
        re.split(r"\s{2,}|(?<=pyro_elbo_ext) |(?<=C\+\+ compiler) ", line, maxsplit=1)
        for line in versions().splitlines()
    )
    assert found["pyro_elbo_ext"] == pyro_elbo_ext.__version__
    assert found["Python"] == sys.version.split()[0]
    for package in ("torch", "pyro-ppl", "numpy", "arviz", "xarray", "pandas", "nutpie"):
        installed = {distribution.name.lower() for distribution in metadata.distributions()}
        assert found[package] == (metadata.version(package) if package in installed else "not installed")
    assert found["platform"]
    # the one that Inductor calls
    assert found["C++ compiler"].partition(" ")[0].rstrip(":") == torch._inductor.config.cpp.cxx[1]
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler does not run" in versions()


def test_by_the_interpreter_and_at_once() -> None:
    """Neither ``--version`` nor the list of what there is imports torch."""
    code = """
import json, runpy, sys
for arguments in (["--version"], [], ["diagnose", "--help"]):
    sys.argv = ["pyro_elbo_ext", *arguments]
    try:
        runpy.run_module("pyro_elbo_ext", run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, ended.code
print(json.dumps(sorted(sys.modules)))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    out = ran.stdout.splitlines()
    assert out[0].split() == ["pyro_elbo_ext", pyro_elbo_ext.__version__]
    assert not {"torch", "pyro", "numpy"} & set(json.loads(out[-1]))


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["fit"], 2, "invalid choice"),
        (["--nothing"], 2, "unrecognized arguments: --nothing"),
        (["demo", "--seed", "-1"], 2, "from 0 to"),
        (["demo", "--steps", "3"], 2, "unrecognized arguments: --steps 3"),
        (["diagnose", "module:model"], 3, "--guide"),
        (["diagnose", "module:model", "--guide", "module:guide", "--num-draws", "0"], 3, "must be at least 1"),
    ],
)
def test_wrong_arguments(arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == status
    assert message in capsys.readouterr().err
