"""Measures finished runs anew, for the page: each run's student as it ships, and each teacher, on the same images.

Only run folders are read. What takes long (robustness) is kept beside the page, by the hash of what was measured.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from litdistill.data.datamodule import ImageData
from litdistill.evaluation import robustness
from litdistill.evaluation.calibration import fit_temperature
from litdistill.evaluation.evaluate import load_run, pick_device, rebuild
from litdistill.evaluation.predictions import collect
from litdistill.export.predict import runtime
from litdistill.export.writers import ExportWrapper
from litdistill.models.preprocess import preprocess_of
from litdistill.report import tables as report
from litdistill.report.files import shipped_file, write_teacher
from litdistill.tasks import metrics
from litdistill.utils.checkpoint import write_text
from litdistill.utils.errors import UserError
from litdistill.utils.manifest import verified

log = logging.getLogger(__name__)


class Settings(NamedTuple):
    """What of the page is measured, and how; see conf/report.yaml."""

    threads: int = 1
    rounds: int = 20
    robustness: int = 1000
    epsilons: tuple[int, ...] = (4, 8, 16, 32)
    device: str = "auto"
    trust: tuple[str, ...] = ()


@dataclass
class Seed:
    """One trained model, measured."""

    summary: dict[str, Any]
    folder: Path
    val: Tensor = field(default_factory=lambda: torch.empty(0))  # logits (N, classes)
    val_targets: Tensor = field(default_factory=lambda: torch.empty(0))
    test: Tensor = field(default_factory=lambda: torch.empty(0))
    test_targets: Tensor = field(default_factory=lambda: torch.empty(0))
    temperature: float = 1.0
    robustness: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    sha256: str = ""  # of the weights
    starts: dict[str, float] = field(default_factory=dict)  # seconds of each run that it started from, by its name

    @property
    def quality(self) -> dict[str, float]:
        return metrics.quality(self.test, self.test_targets)

    @property
    def calibrated(self) -> dict[str, float]:
        return metrics.quality(self.test / self.temperature, self.test_targets)


@dataclass
class Row:
    """One line of the tables: a teacher, or runs that differ in their seed alone."""

    label: str
    about: dict[str, Any]  # name, params, macs of the network
    seeds: list[Seed] = field(default_factory=list)
    teacher: bool = False
    checkpoint: str | None = "auto"  # of a teacher: how the config of its first student's run has it
    precision: str = "fp32"
    file: Path | None = None  # the ONNX file of the first seed, which is timed
    net: nn.Module | None = None  # the same for the GPU, where it is no int8
    timing: dict[str, Any] = field(default_factory=dict)


@dataclass
class Group:
    """All rows on one data set."""

    name: str
    facts: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    images: Tensor = field(default_factory=lambda: torch.empty(0))  # of the test set, uint8 (N, C, H, W)
    classes: tuple[str, ...] = ()
    problems: list[str] = field(default_factory=list)

    @property
    def teacher(self) -> Row | None:
        return next((r for r in self.rows if r.teacher), None)


def groups(places: Sequence[str | Path], out: Path, settings: Settings) -> list[Group]:
    """All finished runs at or below `places`, measured. A run that cannot be rebuilt is told of in `Group.problems`."""
    found = report.runs(places)
    by_data: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for folder, summary in found:
        known = {k: summary["data"].get(k) for k in ("name", "classes", "input_shape", "test")}
        by_data.setdefault(json.dumps(known), []).append((folder, summary))
    return [_group(json.loads(key), runs, out, settings) for key, runs in by_data.items()]


def _group(facts: dict[str, Any], runs: Sequence[tuple[Path, dict[str, Any]]], out: Path, settings: Settings) -> Group:
    group = Group(facts["name"], facts)
    taught = {s["teacher"]["sha256"]: s["teacher"] for _, s in runs if s["teacher"]}
    teachers = {sha: Row("teacher", t, teacher=True) for sha, t in taught.items()}
    students = [(f, s) for f, s in runs if s["student"]["sha256"] not in teachers]
    kinds = report.kinds([s for _, s in students])
    folders = {id(s): f for f, s in students}
    spoilt: dict[str, list[Tensor]] = {}
    rows = []
    for kind in kinds:
        about = kind[0]["student"]
        row = Row(report.label(kind[0], kinds), about, precision=about.get("precision", "fp32"))
        for summary in kind:
            log.info("Measuring %s, seed %s", row.label, summary["seed"])
            try:
                _measure_run(group, row, folders[id(summary)], summary, teachers, spoilt, out, settings)
            except UserError as error:
                group.problems.append(f"{folders[id(summary)].name} ({row.label}) was not measured: {error}")
        rows.append(row)
    group.rows = [r for r in (*teachers.values(), *rows) if r.seeds]
    _tell_apart(group.rows)
    return group


def _tell_apart(rows: Sequence[Row]) -> None:
    apart = report.tell_apart([r.label for r in rows], [r.about["name"] for r in rows])
    for row, label in zip(rows, apart, strict=True):
        row.label = label


def _measure_run(
    group: Group,
    row: Row,
    folder: Path,
    summary: dict[str, Any],
    teachers: dict[str, Row],
    spoilt: dict[str, list[Tensor]],
    out: Path,
    settings: Settings,
) -> None:
    data, distiller = rebuild(folder, trust=settings.trust)
    device = pick_device(settings.device)
    _adopt(group, data, spoilt, settings)
    if distiller.teacher is not None and not (teacher := teachers[summary["teacher"]["sha256"]]).seeds:
        sha = summary["teacher"]["sha256"]
        seed = Seed(_own_summary(folder, sha, settings) or {}, folder, sha256=sha)
        _measure(seed, distiller.teacher.net, None, data, device, group, spoilt, out, settings)
        teacher.seeds.append(seed)
        teacher.checkpoint = load_run(folder, settings.trust)[0].teacher.checkpoint
        teacher.file = write_teacher(distiller.teacher.net, data, out / "cache" / f"teacher-{sha[:12]}.onnx")
        teacher.net = ExportWrapper(distiller.teacher.net)
    net = distiller.deployed_student
    path = None
    if row.precision == "int8" or row.file is None:
        path = shipped_file(folder, row.precision, summary, settings.trust)
    seed = Seed(summary, folder, sha256=summary["student"]["sha256"], starts=_starts(folder, summary, settings))
    _measure(seed, net, path if row.precision == "int8" else None, data, device, group, spoilt, out, settings)
    row.seeds.append(seed)
    if row.file is None:
        row.file, row.net = path, None if row.precision == "int8" else ExportWrapper(net)


def _adopt(group: Group, data: ImageData, spoilt: dict[str, list[Tensor]], settings: Settings) -> None:
    """Takes the test images from the first run that has them, and spoils some of them once for all models."""
    images = data.source.test.images[data.test_ids]
    if not group.classes:
        group.images, group.classes = images, tuple(data.class_names)
        if settings.robustness:
            spoilt.update(robustness.corrupted(group.images[spread_out(settings.robustness, len(images))]))
    if tuple(data.class_names) != group.classes or not torch.equal(images, group.images):
        raise UserError("it was tested on other images than the runs before it. Give it a page of its own.")


def _own_summary(folder: Path, sha: str, settings: Settings) -> dict[str, Any] | None:
    """The summary of the run that trained a teacher, among those that are kept beside a student's run."""
    cfg, _ = load_run(folder, settings.trust)
    for path in Path(cfg.runs, "teachers").glob("*/summary.json"):
        summary = json.loads(path.read_text())
        if summary["student"]["sha256"] == sha:
            return dict(summary)
    return None


def _starts(folder: Path, summary: dict[str, Any], settings: Settings) -> dict[str, float]:
    """Seconds of the run that a run's student started from, of the one before that, and so on, each without the others."""
    cfg, _ = load_run(folder, settings.trust)
    found: dict[str, float] = {}
    while (start := summary.get("start")) is not None and "run" in start:
        file = Path(cfg.runs, "students", Path(start["run"]).name, "summary.json")
        if not file.is_file():
            return found | {start["run"]: start["total_s"]}  # which is that of all before it together
        summary = json.loads(file.read_text())
        found[start["run"]] = summary["time"]["total_s"]
    return found


def _measure(
    seed: Seed,
    net: nn.Module,
    file: Path | None,
    data: ImageData,
    device: str,
    group: Group,
    spoilt: dict[str, list[Tensor]],
    out: Path,
    settings: Settings,
) -> None:
    """Fills a seed in. What predicts is the network, or the int8 `file` of it; gradients are the network's."""
    net.to(device).eval().requires_grad_(False)
    if file is None:
        seed.val, seed.val_targets = collect(net, data, "val", device)
        seed.test, seed.test_targets = collect(net, data, "test", device)
        predict = partial(_predict, net, device, data.eval_batch_size)
        measured = seed.sha256
    else:
        content, facts = verified(file)
        predict = partial(_run, runtime(content, facts, file), data.eval_batch_size)
        train, test = data.source.train, data.source.test
        seed.val, seed.val_targets = predict(train.images[data.val_ids]), train.targets[data.val_ids]
        seed.test, seed.test_targets = predict(test.images[data.test_ids]), test.targets[data.test_ids]
        measured = hashlib.sha256(content).hexdigest()
    seed.temperature = fit_temperature(seed.val, seed.val_targets)
    if settings.robustness:
        chosen = spread_out(settings.robustness, len(group.images))
        images, targets = group.images[chosen], seed.test_targets[chosen]
        seen = hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()
        how = hashlib.sha256(inspect.getsource(robustness).encode()).hexdigest()  # another definition, another accuracy
        preprocess = preprocess_of(net)
        asked = [group.facts, seen, settings.epsilons, preprocess.facts() if preprocess is not None else None, how]
        compute = lambda: _robustness(predict, net, images, targets, spoilt, settings, device)  # noqa: E731
        seed.robustness = _cached(out / "cache" / f"robustness-{measured[:16]}.json", asked, compute)


def spread_out(n: int, of: int) -> Tensor:
    """Which of the test images are spoilt: `n` evenly spaced ones, since some data sets are sorted by class."""
    return torch.linspace(0, of - 1, min(n, of), dtype=torch.float64).long()


@torch.no_grad()
def _predict(logits_of: Callable[[Tensor], Tensor], device: str, batch: int, images: Tensor) -> Tensor:
    return torch.cat([logits_of(chunk.to(device)).float().cpu() for chunk in images.split(batch)])


def _run(run: Callable[[np.ndarray], np.ndarray], batch: int, images: Tensor) -> Tensor:
    return torch.from_numpy(np.concatenate([run(chunk.numpy()) for chunk in images.split(batch)]))


def _robustness(
    predict: Callable[[Tensor], Tensor],
    logits_of: Callable[[Tensor], Tensor],
    images: Tensor,
    targets: Tensor,
    spoilt: dict[str, list[Tensor]],
    settings: Settings,
    device: str,
) -> dict[str, dict[str, list[float]]]:
    """Accuracy under each corruption by severity, and under each attack by ε (first of which is none)."""
    clean = robustness.accuracy(predict, images, targets)
    found = {name: [robustness.accuracy(predict, x, targets) for x in xs] for name, xs in spoilt.items()}
    there, labels = images.to(device), targets.to(device)
    attacks = {
        name: [
            clean,
            *(
                robustness.accuracy(predict, robustness.attacked(attack, logits_of, there, labels, e).cpu(), targets)
                for e in settings.epsilons
            ),
        ]
        for name, attack in robustness.ATTACKS.items()
    }
    return {"corruptions": found, "attacks": attacks}


def _cached(path: Path, asked: Any, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `compute` gave when it was last asked for this, from `path` if it is there."""
    asked = json.loads(json.dumps(asked))
    if path.is_file():
        try:
            kept = json.loads(path.read_text())
            if kept["asked"] == asked:
                return dict(kept["found"])
        except (ValueError, KeyError, TypeError):
            log.warning("%s is damaged, and written anew.", path)
    found = compute()
    write_text(path, json.dumps({"asked": asked, "found": found}) + "\n")
    return found
