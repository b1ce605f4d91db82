"""The notebook of examples/ runs as it is, and is stored as it ran."""

import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

REPOSITORY = Path(__file__).resolve().parents[2]
NOTEBOOK = REPOSITORY / "examples" / "classify.ipynb"


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: Any, kind: str) -> list[str]:
    made = [output for cell in code_cells(notebook) for output in cell.outputs]
    return [output.data[kind] for output in made if kind in output.get("data", {})]


def top1(notebook: Any) -> dict[str, float]:
    """Network -> top-1 in percent, read off the table of `evaluate`."""
    (table,) = (html for html in outputs(notebook, "text/html") if "top-5" in html)
    rows = [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in table.split("<tr>")]
    return {row[0]: float(row[2].removesuffix(" %")) for row in rows if row}


@pytest.fixture
def stored() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_stored_with_its_outputs(stored: Any) -> None:
    cells = code_cells(stored)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error"]
    assert len(outputs(stored, "image/png")) == 6
    assert len(outputs(stored, "text/html")) == 7
    text = NOTEBOOK.read_text()
    assert not re.search(r"/(home|root|tmp|work|Users)/|\\u001b\[", text)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_it_runs(stored: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ran = nbformat.from_dict(stored)
    for cell in code_cells(ran):
        cell.outputs, cell.execution_count = [], None
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(ran, timeout=300, kernel_name="python3", resources=where).execute()
    assert len(outputs(ran, "image/png")) == 6
    accuracy = top1(ran)
    names = ["SmallRepVGG", "plain INT8", "reptrt fast", "reptrt accurate"]
    assert list(accuracy) == names == list(top1(stored))
    assert accuracy["SmallRepVGG"] > 90
    assert accuracy["reptrt fast"] > accuracy["SmallRepVGG"] - 1
    assert list(tmp_path.iterdir()) == []
