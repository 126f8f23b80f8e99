"""Run docs/examples/first_model.ipynb and write its outputs into it and into its Chinese twin.

`python docs/render_notebook.py` takes about three minutes on two cores. Both files have the same
code, and so the same outputs; tests/test_notebook.py compares them, and runs the code with fewer
steps. What differs from machine to machine (times of execution, versions of the kernel) is left
out of the files.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

EXAMPLES = Path(__file__).resolve().parent / "examples"
NOTEBOOK = EXAMPLES / "first_model.ipynb"
CHINESE = EXAMPLES / "first_model.zh-CN.ipynb"
SECONDS_PER_CELL = 900


def read(path: Path) -> Any:
    """A notebook whose form has been checked."""
    return nbformat.read(path, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def run(notebook: Any, folder: Path, **parameters: Any) -> None:
    """Execute every cell in a new kernel whose working directory is `folder`.

    `parameters` replace the values in the cell with the tag `parameters`. An error in a cell is an
    exception that shows the cell.
    """
    for cell in code_cells(notebook):
        if "parameters" in cell.metadata.get("tags", ()):
            cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    # The commands that clue_ds prints are then called clue-ds, without this environment's path.
    own = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(
        notebook,
        timeout=SECONDS_PER_CELL,
        resources=resources,
        record_timing=False,
        coalesce_streams=True,
    )
    client.execute(env={**os.environ, "PATH": own})


def main() -> int:
    notebook, chinese = read(NOTEBOOK), read(CHINESE)
    with tempfile.TemporaryDirectory() as folder:
        run(notebook, Path(folder))
    notebook.metadata["language_info"] = {"name": "python"}
    for ours, theirs in zip(code_cells(notebook), code_cells(chinese), strict=True):
        theirs.source, theirs.outputs = ours.source, ours.outputs
        theirs.execution_count = ours.execution_count
    for path, book in ((NOTEBOOK, notebook), (CHINESE, chinese)):
        nbformat.write(book, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
