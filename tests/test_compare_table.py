"""The table of scripts/compare_table.py: which runs it takes, what stands in its cells, and that the document has it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from litdistill.utils.errors import UserError
from litdistill.utils.paths import CONF


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_table", CONF.parent / "scripts" / "compare_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(technique: str | None, seed: int, metric: str = "map") -> tuple[Path, dict]:
    return Path(f"{technique}-{seed}"), {"technique": technique, "seed": seed, "metric": {"name": metric}}


def test_runs_of_a_technique_are_taken_by_seed_and_those_of_no_detector_are_not(script):
    found = [
        run("pseudo_boxes", 1),
        run("backbone", 0, "accuracy"),
        run(None, 0),
        run("distilled", 0),
        run("pseudo_boxes", 0),
    ]
    named = script.by_technique(found)
    assert list(named) == ["distilled", "pseudo boxes"]
    assert [str(folder) for folder, _ in named["pseudo boxes"]] == ["pseudo_boxes-0", "pseudo_boxes-1"]
    with pytest.raises(UserError, match="None of these runs is a detector"):
        script.by_technique(found[1:3])


def test_a_row_has_a_detector_and_its_int8_file(script):
    checks = [{"exported": 0.74, "agreement": 0.99}, {"exported": 0.76, "agreement": 0.97}]
    rows = {"distilled": script.Row([0.75, 0.77], checks, {})}
    sizes = {"teacher": 3_236_700, "distilled": 239_000, "distilled, then int8": 116_700}
    times = {"teacher": 1.0, "distilled": 0.184, "distilled, then int8": 0.166}
    timed = {k: {1: {"ratio": (0.0, ratio, 9.0)}} for k, ratio in times.items()}
    lines = script.text_of(0.8106, rows, sizes, timed).splitlines()
    assert lines[2] == "| teacher | 1 | 81.06 |  |  | 3,237 |  | 1.00 |  |"
    cells = "distilled | 2 | 76.00 ± 1.41 | 75.00 ± 1.41 | 98.00 ± 1.41 | 239 | 117 | 0.18 | 0.17"
    assert lines[3] == f"| {cells} |"


def test_the_document_has_a_table_that_the_script_wrote(script):
    document = (CONF.parent / script.DEFAULTS["out"]).read_text()
    (part,) = re.findall(r"<!-- compare -->\n\n(.*)\n\n<!-- end compare -->", document, re.DOTALL)
    lines = part.splitlines()
    assert lines[0] == "| " + " | ".join(script.HEAD) + " |"
    names = {line.split(" | ")[0].removeprefix("| ") for line in lines[2:]}
    files = {p.stem.replace("_", " ") for p in (CONF / "experiment" / "compare" / "detection").glob("[!_]*.yaml")}
    assert names == files | {script.TEACHER}
