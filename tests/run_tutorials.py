"""Execute every notebook of a folder and fail if a cell raises.

    python tests/run_tutorials.py tutorials

The notebooks run in a temporary copy of the folder, so that whatever they write is thrown away and the files in the
repository keep their stored outputs.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

CELL_TIMEOUT = 600  # seconds


def run_notebook(path: Path) -> str | None:
    """Execute one notebook in its own folder; return the error, or None if all its cells ran."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=CELL_TIMEOUT, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    )
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description="Execute every notebook of a folder; fail if a cell raises.")
    parser.add_argument("folder", type=Path, help="folder that holds the notebooks")
    folder = parser.parse_args().folder
    names = sorted(path.name for path in folder.glob("*.ipynb"))
    if not names:
        print(f"No notebook in {folder}", file=sys.stderr)
        return 1

    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch, "tutorials")
        shutil.copytree(folder, copy)
        for name in names:
            print(f"{name} ...", end=" ", flush=True)
            start = time.perf_counter()
            error = run_notebook(copy / name)
            print(f"{'ok' if error is None else 'FAILED'} ({time.perf_counter() - start:.0f} s)", flush=True)
            if error is not None:
                failed.append(name)
                print(error, file=sys.stderr, flush=True)

    if failed:
        print(f"{len(failed)} of {len(names)} notebooks failed: {', '.join(failed)}", file=sys.stderr)
        return 1
    print(f"{len(names)} notebooks ran without error")
    return 0


if __name__ == "__main__":
    sys.exit(main())
