"""The notebooks run from top to bottom, and are committed with the outputs of such a run and no trace of a machine."""

import re
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import nbclient
import nbformat
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NAMES = ["01_distil_in_ten_minutes", "02_compare_runs", "03_bring_your_own"]


def texts(cell) -> str:
    """All that a cell printed or returned in words."""
    return "".join(o.get("text", "") + "".join(str(v) for k, v in o.get("data", {}).items() if "image" not in k)
                   for o in cell.get("outputs", []))  # fmt: skip


def test_there_are_three():
    assert [p.stem for p in NOTEBOOKS] == NAMES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_committed_with_the_outputs_of_one_run(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    assert not any(o.output_type == "error" for c in code for o in c.outputs)
    assert sum("image/png" in o.get("data", {}) for c in code for o in c.outputs) >= 2
    for cell in code:
        assert not re.search(r"/(?:work|home|root|tmp|Users|opt|usr)/|\.venv|site-packages|Warning", texts(cell))
    assert path.stat().st_size < 400_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_opens_with_few_imports_and_imports_what_exists(path):
    cells = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    lines = [line for cell in cells for line in cell.splitlines() if re.match(r"\s*(import|from) ", line)]
    assert sum(line in cells[0].splitlines() for line in lines) <= 5
    for line in lines:
        exec(line.strip(), {})


@pytest.mark.parametrize("methods", [1, 4])
def test_runs_of_any_number_of_methods_are_compared(monkeypatch, methods):
    monkeypatch.setattr(plt, "show", lambda: None)
    cell = nbformat.read(FOLDER / "02_compare_runs.ipynb", 4).cells[-1]
    found = [(Path(f"{method}-{seed}"), {"method": f"m{method}"}) for method in range(methods) for seed in (0, 1)]
    stand_ins = {
        "rebuild": lambda folder: (folder, SimpleNamespace(deployed_student=None)),
        "collect": lambda net, data, split: (net, data),
        "reliability": lambda net, data, bins: ([0.5], [0.5], [1]),
    }
    names = {
        "plt": plt,
        "Path": Path,
        "runs": found,
        "colors": {f"m{i}": f"C{i}" for i in range(methods)},
        **stand_ins,
    }
    source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("from litdistill"))
    exec(source, names)
    assert [axis.get_title() for axis in names["figure"].axes] == [f"m{i}" for i in range(methods)]
    plt.close("all")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_from_top_to_bottom(path):
    notebook = nbformat.read(path, 4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}})
    client.execute()  # raises where a cell does
    assert all(o.output_type != "error" for c in notebook.cells for o in c.get("outputs", []))
