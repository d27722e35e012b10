"""The notebooks run from top to bottom; what they keep of their last run is small and whole."""

import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from support.cases import full_run
from support.pages import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
MOST_BYTES = 100_000


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell: Any) -> list[str]:
    """Of what a cell says; what libraries warn of depends on the machine, and so do the paths in it."""
    return [out.output_type for out in cell.outputs if out.get("name") != "stderr"]


@pytest.mark.skipif(not full_run(), reason="starts a kernel for each; run with --full")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own assertions hold, and every cell says as many things as the kept run did."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    kept = nbformat.read(path, as_version=4)
    again = nbformat.read(path, as_version=4)
    NotebookClient(again, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    for before, after in zip(code(kept), code(again), strict=True):
        assert kinds(after) == kinds(before), before.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_it_keeps(path: Path) -> None:
    """Outputs of one run from top to bottom, none of them an error or a path of a machine."""
    assert path.stat().st_size < MOST_BYTES
    cells = code(nbformat.read(path, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert {out.output_type for cell in cells for out in cell.outputs} <= {"stream", "display_data", "execute_result"}
    assert not any(out.get("name") == "stderr" for cell in cells for out in cell.outputs)
    assert str(Path.home()) not in path.read_text()
