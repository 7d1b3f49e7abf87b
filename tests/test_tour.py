"""The notebook of the docs does what it shows."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TOUR = Path(__file__).parents[1] / "docs" / "tour.ipynb"
NUMBER = re.compile(r"-?\d+\.\d+")


def outputs(notebook):
    """What each cell of code leaves: the kinds in which it can be shown, and its text."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = [[output for output in cell.outputs if output.output_type != "stream"] for cell in cells]
    assert all(len(own) == 1 for own in shown)
    return [(set(own[0].data), own[0].data["text/plain"]) for own in shown]


def test_the_tour_leads_where_it_says(smollm2):
    kept = nbformat.read(TOUR, as_version=4)
    assert not any("traceback" in output for cell in kept.cells for output in cell.get("outputs", []))
    done = nbformat.read(TOUR, as_version=4)
    NotebookClient(done, timeout=300, kernel_name="python3").execute()
    assert len(outputs(kept)) == 10
    for (kinds, text), (expected_kinds, expected) in zip(outputs(done), outputs(kept), strict=True):
        assert kinds == expected_kinds
        # Numbers are rounded, and no two machines round all of them alike.
        assert [float(each) for each in NUMBER.findall(text)] == pytest.approx(
            [float(each) for each in NUMBER.findall(expected)], abs=0.11
        )
        assert NUMBER.sub("", text).split() == NUMBER.sub("", expected).split()
    assert "Japanese yen" in outputs(done)[8][1]
    assert "yen" not in outputs(done)[7][1]
