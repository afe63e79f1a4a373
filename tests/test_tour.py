"""examples/tour.ipynb runs from its first cell to its last.

``python -m tests.test_tour`` runs it and saves it with its outputs.
"""

import re
import tempfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from .conftest import ROOT

TOUR = ROOT / "examples/tour.ipynb"
LARGEST = 1_000_000  # bytes, of a file that every clone has


def executed(folder: Path) -> nbformat.NotebookNode:
    """The tour with its outputs, run in ``folder``; nothing in it depends on when and where it ran."""
    notebook = nbformat.read(TOUR, as_version=4)
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=600, record_timing=False, coalesce_streams=True, resources=where).execute()
    notebook.metadata.language_info = {"name": "python"}  # not the version of this machine's
    return notebook


def outputs(notebook: nbformat.NotebookNode) -> str:
    """All that the cells printed, and what they showed as text."""
    parts = (output for cell in notebook.cells for output in cell.get("outputs", ()))
    return "\n".join(part.get("text") or part.data.get("text/plain", "") for part in parts)


def pictures(notebook: nbformat.NotebookNode) -> int:
    parts = (output for cell in notebook.cells for output in cell.get("outputs", ()))
    return sum("image/png" in part.get("data", {}) for part in parts)


@pytest.mark.slow
def test_the_tour_runs_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = executed(tmp_path)  # a cell that fails raises here
    shown = outputs(notebook)
    assert "12 good parts; to be judged: 34" in shown
    assert "A false-alarm rate of 5.0% needs 19 normal images" in shown
    assert "crack/000.png: anomalous, score " in shown
    score, in_table = shown.split("crack/000.png: anomalous, score ")[1].split("; in the table ")
    in_table = in_table.split()[0]  # what the next cell logs may follow
    assert float(score) == pytest.approx(float(in_table), abs=0.011)
    assert pictures(notebook) == 4
    assert (tmp_path / "results/tour/weights/onnx/model.onnx").is_file()


def test_the_saved_tour_is_complete_small_and_free_of_local_paths() -> None:
    notebook = nbformat.read(TOUR, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run it, see CONTRIBUTING.md"
    assert all(not cell.metadata for cell in code), "execution times change with every run"
    assert pictures(notebook) == 4
    assert not re.search(r"""(^|[\s'"(])/\w""", outputs(notebook)), "a path of the machine that it ran on"
    assert TOUR.stat().st_size < LARGEST


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(executed(Path(folder)), TOUR)
