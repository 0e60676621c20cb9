"""Finished simulations of a calibration in a folder, one file each, so that an interrupted run can go on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from pyro_elbo_ext.calibration.simulation import QUANTITIES, Ranked
from pyro_elbo_ext.files.atomic import remove_stale, replaced
from pyro_elbo_ext.files.untrusted import read_npz, reading

SETTINGS = "settings.json"


class Folder:
    """Where a calibration keeps its finished simulations.

    Parameters
    ----------
    path
        Folder; made if it is not there.
    settings
        What simulations must share to be of one calibration; written to a new folder, compared with an old one's.

    Raises
    ------
    ValueError
        If the folder has other settings, or other files and no settings.
    """

    def __init__(self, path: str | os.PathLike[str], settings: dict[str, Any]) -> None:
        self.path = Path(path)
        self.names: list[str] = list(settings["shapes"])
        settings = json.loads(json.dumps(settings))  # tuples become lists, as they do in the file
        file = self.path / SETTINGS
        if file.exists():
            with reading(file, "the settings of a calibration"):
                there = json.loads(file.read_text(encoding="utf-8"))
                if not isinstance(there, dict):
                    raise ValueError("it holds no object")
            if there != settings:
                differ = [
                    f"{key}: {there.get(key)} there, {settings.get(key)} now"
                    for key in sorted(there.keys() | settings.keys())
                    if there.get(key) != settings.get(key)
                ]
                raise ValueError(f"{self.path} holds another calibration ({'; '.join(differ)}). Pass another path.")
            return
        remove_stale(file)
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ValueError(f"{self.path} is there and holds no calibration. Pass the path of a new or empty folder.")
        with replaced(file) as new:
            new.write_text(json.dumps(settings, indent=1), encoding="utf-8")

    def read(self, num_simulations: int) -> dict[int, Ranked]:
        """The finished ones among the first ``num_simulations``."""
        found = {}
        for index in range(num_simulations):
            file = self._file(index)
            if file.exists():
                arrays = read_npz(file, "fiubU")
                with reading(file, "a simulation of this calibration"):
                    values = {
                        quantity: {name: arrays[f"{quantity}_{i}"] for i, name in enumerate(self.names)}
                        for quantity in QUANTITIES
                    }
                    found[index] = Ranked(index, values, str(arrays["digest"]))
        return found

    def write(self, ranked: Ranked) -> None:
        """Keep one; whole or not at all."""
        arrays = {
            f"{quantity}_{i}": ranked.values[quantity][name]
            for quantity in QUANTITIES
            for i, name in enumerate(self.names)
        }
        with replaced(self._file(ranked.index)) as new, new.open("wb") as stream:
            np.savez(stream, allow_pickle=False, digest=np.array(ranked.digest), **arrays)

    def _file(self, index: int) -> Path:
        return self.path / f"simulation_{index:06d}.npz"
