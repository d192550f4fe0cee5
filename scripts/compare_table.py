"""Writes the table of a comparison of detectors into docs/detection.md, of the runs of `litdistill compare`: each detector and
its int8 file, timed by turns.

    litdistill compare dataset=digit_scenes
    python scripts/compare_table.py
    python scripts/compare_table.py 'runs=[a/compare,b/compare]'      runs of several folders, as of several seeds

It stands in the document between `<!-- compare -->` and `<!-- end compare -->`. mAP is that of summary.json, and of int8 files
that of their check over the whole test set; a file that is missing is written.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf

from litdistill.benchmarks.tables import between_marks, read_options, run_script
from litdistill.evaluation.evaluate import rebuild
from litdistill.evaluation.predictions import whole_split
from litdistill.export.latency import time_files
from litdistill.report.files import check_of, shipped_file, write_teacher
from litdistill.report.tables import runs
from litdistill.utils.errors import UserError
from litdistill.utils.files import write_text
from litdistill.utils.text import markdown_table
from litdistill.utils.units import shown_mean

DEFAULTS = {"runs": "runs/compare/digit_scenes/compare", "out": "docs/detection.md", "rounds": 20}
HEAD = ("detector", "seeds", "mAP %", "in int8", "boxes the same %", "kB", "in int8", "time", "in int8")
TEACHER, SMALL = "teacher", "{}, then int8"
Found = Sequence[tuple[Path, dict[str, Any]]]


class Row(NamedTuple):
    """One technique: by seed its mAP and the checks of its int8 files, and the files of its first seed."""

    values: list[float]
    checks: list[dict[str, Any]]
    files: dict[str, bytes]


def main() -> None:
    options = read_options(DEFAULTS, {"rounds": 1})
    places = [options.runs] if isinstance(options.runs, str) else OmegaConf.to_container(options.runs)
    assert isinstance(places, list)
    out = Path(options.out)
    between_marks(out.read_text(), "compare", "")  # refused before anything is measured
    torch.set_num_threads(1)
    found = by_technique(runs(places))
    rows = {name: row_of(some) for name, some in found.items()}
    folder, summary = next(iter(found.values()))[0]
    data, distiller = rebuild(folder)
    if distiller.teacher is None:
        raise UserError(f"{folder} has no teacher, which the others are timed beside.")
    with tempfile.TemporaryDirectory() as place:
        file = write_teacher(distiller.teacher.net, data, Path(place) / "teacher.onnx", distiller.task)
        files = {TEACHER: file.read_bytes()} | {
            name: content for row in rows.values() for name, content in row.files.items()
        }
    inputs, _ = whole_split(data, "test")
    assert inputs is not None
    timed = time_files(files, inputs, TEACHER, rounds=options.rounds)
    text = text_of(summary["teacher"]["test"]["map"], rows, {k: len(v) for k, v in files.items()}, timed)
    write_text(out, between_marks(out.read_text(), "compare", text))
    print(f"Written into {out}\n{text}")


def by_technique(found: Found) -> dict[str, Found]:
    """Returns the runs of detectors of each technique, in the order of its seeds. Raises `UserError` without any."""
    named: dict[str, dict[int, tuple[Path, dict[str, Any]]]] = {}
    for folder, summary in found:
        if summary["metric"]["name"] == "map" and summary.get("technique"):
            named.setdefault(summary["technique"].replace("_", " "), {})[summary["seed"]] = (folder, summary)
    if not named:
        raise UserError("None of these runs is a detector of litdistill compare: name its folder by runs=<folder>.")
    return {name: [by_seed[seed] for seed in sorted(by_seed)] for name, by_seed in sorted(named.items())}


def row_of(found: Found) -> Row:
    small = [shipped_file(folder, "int8", summary) for folder, summary in found]
    name, whole = found[0][1]["technique"].replace("_", " "), shipped_file(found[0][0], "fp32", found[0][1])
    values = [summary["student"]["test"]["map"]["best"] for _, summary in found]
    files = {name: whole.read_bytes(), SMALL.format(name): small[0].read_bytes()}
    return Row(values, [check_of(path) for path in small], files)


def text_of(teacher: float, rows: Mapping[str, Row], sizes: Mapping[str, int], timed: Mapping[str, Any]) -> str:
    """Returns the table; times of one picture are parts of the teacher's.

    `teacher`: its mAP. `sizes`: bytes of each file, `timed`: as `time_files` returns it, by its name.
    """
    kb = lambda name: f"{sizes[name] / 1e3:,.0f}"  # noqa: E731
    time = lambda name: f"{timed[name][1]['ratio'][1]:.2f}"  # noqa: E731
    lines = [[TEACHER, "1", shown_mean("map", [teacher]), "", "", kb(TEACHER), "", time(TEACHER), ""]]
    for name, row in rows.items():
        small = SMALL.format(name)
        exported, same = ([check[key] for check in row.checks] for key in ("exported", "agreement"))
        cells = [shown_mean("map", row.values), shown_mean("map", exported), shown_mean("agreement", same)]
        cost = [kb(name), kb(small), time(name), time(small)]
        lines.append([name, str(len(row.values)), *cells, *cost])
    return markdown_table(HEAD, lines)


if __name__ == "__main__":
    run_script(main)
