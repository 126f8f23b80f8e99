"""The notebook of the documentation runs, and what is committed is what it prints."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A path of the machine that ran it, in an output.
OWN_PATH = re.compile(r"/(?:home|root|tmp|work|usr|opt|Users)/")


@pytest.fixture(scope="module")
def program() -> ModuleType:
    """docs/render_notebook.py."""
    pytest.importorskip("nbclient", reason="nbclient is missing")
    pytest.importorskip("ipykernel", reason="ipykernel is missing")
    spec = importlib.util.spec_from_file_location("program", ROOT / "docs/render_notebook.py")
    assert spec is not None and spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program


def texts(cell: Any) -> str:
    """All that a cell printed."""
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.mark.heavy
def test_it_runs_with_fewer_steps(program: ModuleType, tmp_path: Path) -> None:
    notebook = program.read(program.NOTEBOOK)
    program.run(notebook, tmp_path, NUM_STEPS=24, NUM_EPOCHS=1)
    said = "\n".join(map(texts, program.code_cells(notebook)))
    assert (tmp_path / "runs/notebook/run/checkpoints/step-00000024").is_dir()
    losses = re.search(r"loss (\d\.\d\d) -> (\d\.\d\d)", said)
    assert losses and float(losses[2]) < float(losses[1])
    assert len(re.findall(r"% of 2,000 new reviews are right", said)) == 2
    assert re.search(r"^(positive|negative) \d+%$", said, re.MULTILINE)


def test_its_committed_outputs_are_complete_and_of_no_machine(program: ModuleType) -> None:
    notebook = program.read(program.NOTEBOOK)
    cells = program.code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {kind for cell in cells for output in cell.outputs for kind in output.get("data", ())}
    assert "image/png" in kinds
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error"]
    found = OWN_PATH.search(program.NOTEBOOK.read_text("utf-8"))
    assert found is None, f"the notebook has {found}; run docs/render_notebook.py again"


def test_both_languages_have_the_same_code_and_outputs(program: ModuleType) -> None:
    english, chinese = program.read(program.NOTEBOOK), program.read(program.CHINESE)
    kinds = [[cell.cell_type for cell in notebook.cells] for notebook in (english, chinese)]
    assert kinds[0] == kinds[1]
    for ours, theirs in zip(*map(program.code_cells, (english, chinese)), strict=True):
        assert (ours.source, ours.outputs) == (theirs.source, theirs.outputs)
