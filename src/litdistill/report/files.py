"""The files that the page reads beside a run: its ONNX file, its teacher's, which is written for the page only, and the
summaries of the runs that it starts from."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from litdistill.evaluation.evaluate import load_run
from litdistill.export.export import export
from litdistill.export.predict import runtime
from litdistill.export.writers import write_format
from litdistill.models.preprocess import Preprocessed
from litdistill.tasks import Task
from litdistill.types import Batch
from litdistill.utils.errors import UserError
from litdistill.utils.files import write_atomically
from litdistill.utils.manifest import MANIFEST, ExportMetadata, read_manifest, verified

SAME = 0.95  # the least share of decisions that a teacher's file has in common with it


def shipped_file(folder: Path, precision: str, summary: dict[str, Any], trust: Sequence[str] = ()) -> Path:
    """Returns the verified ONNX file of a run; exports the student where there is none."""
    manifest = folder / "export" / MANIFEST
    files = read_manifest(manifest) if manifest.is_file() else {}
    for name, entry in files.items():
        right = entry.get("format") == "onnx" and entry.get("precision") == precision and entry.get("preprocessing")
        if right and entry.get("student_sha256") == summary["student"]["sha256"]:
            path = manifest.parent / Path(name).name
            content, facts = verified(path)
            runtime(content, facts, path)  # raises UserError for external weights
            return path
    return export(folder, "onnx", precision, trust=trust)[0]


def check_of(path: Path) -> dict[str, Any]:
    """Returns how an exported file was compared with its network; see `litdistill.export.export.check`."""
    return dict(read_manifest(path.parent / MANIFEST)[path.name].get("check") or {})


def or_untimed(make: Callable[[], Path], problems: list[str], whose: str) -> Path | None:
    """Returns the file that `make` returns; where it raises `UserError`, None, and why in `problems`: the row is not timed."""
    try:
        return make()
    except UserError as error:
        problems.append(f"{whose} is not timed: {error}")
        return None


def write_teacher(net: nn.Module, data: Any, path: Path, task: Task | None = None) -> Path:
    """Writes the teacher as ONNX, like an exported student, with the post-processing of `task`; raises `UserError` where its
    outputs differ from the network's."""
    task = task or Task()
    preprocessing = any(isinstance(m, Preprocessed) for m in net.modules())
    entry = {"format": "onnx", "precision": "fp32", "preprocessing": preprocessing}
    # The file includes the preprocessing, which may differ between members of an ensemble.
    batch = next(iter(data.batches("test")))
    inputs, targets = batch.inputs[:64], batch.targets[:64]
    shape, kind = list(inputs.shape[1:]), task.output_kind
    facts = ExportMetadata("onnx", preprocessing, list(data.class_names), [], [], None, shape, {}, kind)
    write_atomically(path, lambda temporary: write_format(net.cpu(), data, temporary, entry, facts, 0, task))
    with torch.no_grad():
        expected = task.keep(task.forward(net.eval(), Batch(inputs, None), False))
    given = task.read_exported(torch.from_numpy(runtime(path.read_bytes(), facts, path)(inputs.numpy())))
    difference, largest, same = task.compare_exported(given, expected, targets)
    if not difference <= 1e-3 * largest or same < SAME:
        raise UserError(f"{path} gives other outputs than the teacher: it cannot be timed in the students' runtime.")
    return path


def own_summary(folder: Path, sha: str, trust: Sequence[str]) -> dict[str, Any] | None:
    """Returns the summary of the run that trained the teacher, from the `teachers` folder; None if it is not there."""
    cfg, _ = load_run(folder, trust)
    for path in Path(cfg.runs, "teachers").glob("*/summary.json"):
        summary = json.loads(path.read_text())
        if summary["student"]["sha256"] == sha:
            return dict(summary)
    return None


def starts(folder: Path, summary: dict[str, Any], trust: Sequence[str]) -> dict[str, float]:
    """Returns the seconds of each run among a student's starting points, by name, each without its predecessors."""
    cfg, _ = load_run(folder, trust)
    found: dict[str, float] = {}
    while (start := summary.get("start")) is not None and "run" in start:
        file = Path(cfg.runs, "students", Path(start["run"]).name, "summary.json")
        if not file.is_file():
            return found | {start["run"]: start["total_s"]}  # the total, predecessors included
        summary = json.loads(file.read_text())
        found[start["run"]] = summary["time"]["total_s"]
    return found
