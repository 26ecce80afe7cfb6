"""Execute a notebook in its folder and write it back with its outputs: python tests/notebook/execute.py train.ipynb"""

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent.parent
# A cell that trains takes minutes, and longer on a busy machine.
CELL_SECONDS = 3600


def execute(path: Path, **environment: str) -> nbformat.NotebookNode:
    """Run every cell with this Python and this project; the file is written only if all of them succeed."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],  # it warns of what is so on every single-user machine
    )
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT), **environment})
    notebook.metadata.language_info = {"name": "python"}  # not the version of the Python at hand
    nbformat.write(notebook, path)
    return notebook


if __name__ == "__main__":
    started = time.perf_counter()
    execute(Path(sys.argv[1]).resolve())
    print(f"{sys.argv[1]}: {time.perf_counter() - started:.0f} s")
