"""Execute every notebook of a folder and fail if a cell raises.

    python tests/run_tutorials.py tutorials
    python tests/run_tutorials.py tutorials --store [--only 01_decomposed_elbo.ipynb ...]

The notebooks run in a temporary copy of the folder, so that whatever they write is thrown away and the files in the
repository keep their stored outputs. With ``--store`` the new outputs take the place of those, made small: images with a
palette of 64 colours, no times of execution, and no paths of this machine.
"""

from __future__ import annotations

import argparse
import base64
import io
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from PIL import Image

CELL_TIMEOUT = 600  # seconds


def run_notebook(path: Path, *, store: Path | None = None) -> str | None:
    """Execute one notebook in its own folder, and write it to ``store``; return the error, or None if all its cells ran."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=CELL_TIMEOUT, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    )
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        return f"{type(error).__name__}: {error}"
    if store is not None:
        make_small(notebook)
        nbformat.write(notebook, store)
    return None


def make_small(notebook: nbformat.NotebookNode) -> None:
    """Take from the outputs what a reader does not need."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", ()):
            if "text" in output:
                output.text = re.sub(r"/\S*/site-packages/", "", output.text)
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = with_palette(output.data["image/png"])


def with_palette(png: str, colours: int = 64) -> str:
    """The same image, a base64 string, with the colours that serve it best."""
    with Image.open(io.BytesIO(base64.b64decode(png))) as image:
        small = io.BytesIO()
        image.convert("RGB").quantize(colours).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def main() -> int:
    parser = argparse.ArgumentParser(description="Execute every notebook of a folder; fail if a cell raises.")
    parser.add_argument("folder", type=Path, help="folder that holds the notebooks")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these notebooks of the folder")
    parser.add_argument("--store", action="store_true", help="keep the outputs in the folder's notebooks")
    options = parser.parse_args()
    folder = options.folder
    names = sorted(path.name for path in folder.glob("*.ipynb") if options.only is None or path.name in options.only)
    if len(names) < len(options.only or [""]):
        print(f"No such notebook in {folder}: {options.only or '*.ipynb'}", file=sys.stderr)
        return 1

    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch, "tutorials")
        shutil.copytree(folder, copy)
        for name in names:
            print(f"{name} ...", end=" ", flush=True)
            start = time.perf_counter()
            error = run_notebook(copy / name, store=folder / name if options.store else None)
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
