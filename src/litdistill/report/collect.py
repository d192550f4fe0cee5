"""Evaluates finished runs again for the page: each run's deployed student, and each teacher, on the same samples.

Only run folders are read. Robustness, which takes long, is cached beside the page by the hash of the model.
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

from litdistill.data.protocol import as_indexed
from litdistill.evaluation import attacks, robustness
from litdistill.evaluation.calibration import fit_temperature
from litdistill.evaluation.controls import is_measured
from litdistill.evaluation.evaluate import load_run, pick_device, rebuild
from litdistill.evaluation.predictions import measured, predict_split, spread_out, whole_split
from litdistill.evaluation.privacy import Membership, losses, membership
from litdistill.export.predict import runtime
from litdistill.export.writers import ExportWrapper
from litdistill.features.outputs import run_network
from litdistill.models.preprocess import preprocess_of
from litdistill.report import tables as report
from litdistill.report.files import check_of, or_untimed, own_summary, shipped_file, starts, write_teacher
from litdistill.tasks import Classification, Task
from litdistill.types import Outputs
from litdistill.utils.errors import UserError
from litdistill.utils.files import write_text
from litdistill.utils.manifest import verified
from litdistill.utils.units import factor

log = logging.getLogger(__name__)


class Settings(NamedTuple):
    """The options of the measurements; see conf/report.yaml."""

    threads: int = 1
    rounds: int = 20
    robustness: int = 1000
    epsilons: tuple[int, ...] = (4, 8, 16, 32)
    attacks: str = "quick"
    device: str = "auto"
    trust: tuple[str, ...] = ()
    int8: bool = False


def settings_of(cfg: Any, trust: tuple[str, ...] = (), int8: bool = False) -> Settings:
    """Returns the settings in a config of `report` or of the comparison of techniques, which share these options."""
    return Settings(
        threads=cfg.threads,
        rounds=cfg.rounds,
        robustness=cfg.robustness,
        epsilons=tuple(cfg.epsilons),
        attacks=cfg.attacks,
        device=cfg.device,
        trust=trust,
        int8=int8,
    )


@dataclass
class Seed:
    """One trained model and its measurements."""

    summary: dict[str, Any]
    folder: Path
    task: Task = field(default_factory=Classification)
    val: Outputs = field(default_factory=lambda: Outputs({}))  # outputs for all samples of the split, in order
    val_targets: Tensor = field(default_factory=lambda: torch.empty(0))
    test: Outputs = field(default_factory=lambda: Outputs({}))
    test_targets: Tensor = field(default_factory=lambda: torch.empty(0))
    temperature: float = 1.0  # of a classifier
    robustness: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    membership: Membership | None = None  # of a classifier whose training samples have ids
    sha256: str = ""  # of the weights
    starts: dict[str, float] = field(default_factory=dict)  # seconds of each run among its starting points, by name

    @property
    def quality(self) -> dict[str, float]:
        """Returns the task's metrics on the test set."""
        return measured(self.task, self.test, self.test_targets)

    @property
    def score(self) -> float:
        """Returns the monitored metric on the test set, in its display units."""
        name = self.task.monitor[0]
        return factor(name) * self.quality[name]

    @property
    def calibrated(self) -> dict[str, float]:
        """Returns `quality` of the logits divided by the temperature."""
        return measured(self.task, Outputs.of(self.test.logits / self.temperature), self.test_targets)


@dataclass
class Row:
    """One row of the tables: a teacher, or runs that differ in the seed alone."""

    label: str
    about: dict[str, Any]  # name, params, macs of the network
    seeds: list[Seed] = field(default_factory=list)
    teacher: bool = False
    checkpoint: str | None = "auto"  # of a teacher: `teacher.checkpoint` in its first student's config
    precision: str = "fp32"
    converted: bool = False  # to int8 after the training: the runs are those of another row
    file: Path | None = None  # the ONNX file of the first seed, for timing
    net: nn.Module | None = None  # the network, for timing on the GPU; None for int8
    timing: dict[str, Any] = field(default_factory=dict)


@dataclass
class Group:
    """All rows on one data set with one monitored metric."""

    name: str
    facts: dict[str, Any]  # `tables.facts` of the summaries
    rows: list[Row] = field(default_factory=list)
    # Of the test set, (N, ...) without preprocessing; None where they are no single tensor.
    inputs: Tensor | None = None
    classes: tuple[str, ...] | None = None  # of the outputs; None until a run was measured
    problems: list[str] = field(default_factory=list)

    @property
    def metric(self) -> str:
        """Returns the name of the monitored metric."""
        return str(self.facts["metric"]["name"])

    @property
    def less_is_better(self) -> bool:
        """Returns whether a smaller value of the metric is better."""
        return self.facts["metric"]["direction"] == "min"

    @property
    def pictured(self) -> bool:
        """Returns whether inputs are images: uint8 (N, C, H, W)."""
        return self.inputs is not None and self.inputs.ndim == 4 and self.inputs.dtype == torch.uint8

    @property
    def things(self) -> str:
        """Returns the word for samples in texts."""
        return "images" if self.pictured else "samples"

    @property
    def one_label(self) -> bool:
        """Returns whether each sample has one class, and outputs are logits of classes."""
        return all(one_label(seed.test, seed.test_targets) for row in self.rows for seed in row.seeds)

    @property
    def teacher(self) -> Row | None:
        return next((r for r in self.rows if r.teacher), None)


BATCH = 512  # samples per forward
MEMBERS = 5000  # training samples whose membership is inferred, at most


def one_label(outputs: Outputs, targets: Tensor) -> bool:
    """Returns whether targets are (N,) class indices for logits (N, classes)."""
    classified = targets.ndim == 1 and not targets.is_floating_point()
    return classified and "logits" in outputs.heads and outputs.logits.ndim == 2


def groups(places: Sequence[str | Path], out: Path, settings: Settings) -> list[Group]:
    """Returns the measurements of all finished runs at or below `places`; `Group.problems` lists runs that failed."""
    found = report.runs(places)
    by_data: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for folder, summary in found:
        by_data.setdefault(json.dumps(report.facts(summary)), []).append((folder, summary))
    return [_group(json.loads(key), runs, out, settings) for key, runs in by_data.items()]


def _group(facts: dict[str, Any], runs: Sequence[tuple[Path, dict[str, Any]]], out: Path, settings: Settings) -> Group:
    group = Group(facts["name"], facts)
    # A file of outputs has no row: there is nothing to time or to attack.
    measured = [s["teacher"] for _, s in runs if is_measured(s["teacher"]) and "outputs" not in s["teacher"]]
    by_sha = {teacher["sha256"]: teacher for teacher in measured}
    teachers = {sha: Row("teacher", t, teacher=True) for sha, t in by_sha.items()}
    students = [(f, s) for f, s in runs if s["student"]["sha256"] not in teachers]
    kinds = report.kinds([s for _, s in students])
    folders = {id(s): f for f, s in students}
    corrupted: dict[str, list[Tensor]] = {}
    rows = []
    for kind in kinds:
        about, label = kind[0]["student"], report.label(kind[0], kinds)
        precision = about.get("precision", "fp32")
        made = [(Row(label, about, precision=precision), kind)]
        if settings.int8 and precision == "fp32":
            converted = Row(f"{label}, then int8", about, precision="int8", converted=True)
            made.append((converted, [_converted(summary) for summary in kind]))
        for row, summaries in made:
            for summary, source in zip(summaries, kind, strict=True):
                folder = folders[id(source)]
                log.info("Measuring %s, seed %s", row.label, summary["seed"])
                try:
                    _measure_run(group, row, folder, summary, teachers, corrupted, out, settings)
                except UserError as error:
                    group.problems.append(f"{folder.name} ({row.label}) was not measured: {error}")
            rows.append(row)
    group.rows = [r for r in (*teachers.values(), *rows) if r.seeds]
    _tell_apart(group.rows)
    return group


def _converted(summary: dict[str, Any]) -> dict[str, Any]:
    """Returns the summary of a run for its int8 file: nothing was trained of that, and its findings are the run's."""
    return {**summary, "epochs": 0, "findings": {}, "student": {**summary["student"], "precision": "int8"}}


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
    corrupted: dict[str, list[Tensor]],
    out: Path,
    settings: Settings,
) -> None:
    data, distiller = rebuild(folder, trust=settings.trust)
    device, task = pick_device(settings.device), distiller.task
    _adopt(group, data, corrupted, settings)
    exports = group.inputs is not None
    sha = summary["teacher"]["sha256"] if distiller.teacher is not None else None
    if sha in teachers and not (teacher := teachers[sha]).seeds:
        assert distiller.teacher is not None
        seed = Seed(own_summary(folder, sha, settings.trust) or {}, folder, task, sha256=sha)
        _measure(seed, distiller.teacher.net, None, data, device, group, corrupted, out, settings)
        teacher.seeds.append(seed)
        teacher.checkpoint = load_run(folder, settings.trust)[0].teacher.checkpoint
        if exports:
            file = out / "cache" / f"teacher-{sha[:12]}.onnx"
            write = partial(write_teacher, distiller.teacher.net, data, file, task)
            teacher.file = or_untimed(write, group.problems, f"The teacher of {folder.name}")
        teacher.net = ExportWrapper(distiller.teacher.net, task=task)
    net = distiller.deployed_student
    path = None
    if exports and (row.precision == "int8" or row.file is None):
        ship = partial(shipped_file, folder, row.precision, summary, settings.trust)
        path = ship() if row.precision == "int8" else or_untimed(ship, group.problems, f"{folder.name} ({row.label})")
    seed = Seed(
        summary, folder, task, sha256=summary["student"]["sha256"], starts=starts(folder, summary, settings.trust)
    )
    _measure(seed, net, path if row.precision == "int8" else None, data, device, group, corrupted, out, settings)
    if row.converted and path is not None:
        summary["check"] = check_of(path)
    if not task.reads_labels:
        reference = teachers[str(sha)].seeds[0]
        for one in (reference, seed):  # their measure is the teacher
            one.val_targets, one.test_targets = reference.val.main, reference.test.main
    row.seeds.append(seed)
    if row.file is None:
        row.file, row.net = path, None if row.precision == "int8" else ExportWrapper(net, task=task)


def _adopt(group: Group, data: Any, corrupted: dict[str, list[Tensor]], settings: Settings) -> None:
    """Takes the test samples from the first run, and corrupts some of them once for all models."""
    inputs, targets = whole_split(data, "test")
    if group.classes is None:
        group.inputs, group.classes = inputs, tuple(data.class_names)
        if settings.robustness and group.pictured and targets.ndim == 1:
            assert inputs is not None
            corrupted.update(robustness.corrupted(inputs[spread_out(settings.robustness, len(inputs))]))
    same = inputs is group.inputs or (
        inputs is not None and group.inputs is not None and torch.equal(inputs, group.inputs)
    )
    if tuple(data.class_names) != group.classes or not same:
        raise UserError("it was tested on other samples than the runs before it. Give it a page of its own.")


def _measure(
    seed: Seed,
    net: nn.Module,
    file: Path | None,
    data: Any,
    device: str,
    group: Group,
    corrupted: dict[str, list[Tensor]],
    out: Path,
    settings: Settings,
) -> None:
    """Fills the fields of `seed`. Predictions are the network's or its int8 `file`'s; gradients are the network's.

    Only classifiers have a temperature, and only those of images have robustness.
    """
    net.to(device).eval().requires_grad_(False)
    if file is None:
        seed.val, seed.val_targets = predict_split(net, data, "val", device, seed.task)
        seed.test, seed.test_targets = predict_split(net, data, "test", device, seed.task)
        predict = partial(_predict, net, device)
        weights = seed.sha256
    else:
        content, facts = verified(file)
        predict = partial(_run, runtime(content, facts, file))
        (val, seed.val_targets), (test, seed.test_targets) = whole_split(data, "val"), whole_split(data, "test")
        assert val is not None
        assert test is not None
        seed.val, seed.test = (seed.task.read_exported(predict(inputs)) for inputs in (val, test))
        weights = hashlib.sha256(content).hexdigest()
    if not one_label(seed.test, seed.test_targets):
        return
    seed.temperature = fit_temperature(seed.val.logits, seed.val_targets)
    seed.membership = _membership(predict, data, seed.test, seed.test_targets)
    if settings.robustness and group.pictured:
        assert group.inputs is not None
        chosen = spread_out(settings.robustness, len(group.inputs))
        images, targets = group.inputs[chosen], seed.test_targets[chosen]
        seen = hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()
        code = (
            inspect.getsource(robustness) + inspect.getsource(attacks)
        ).encode()  # changes of the code invalidate the cache
        how = hashlib.sha256(code).hexdigest()
        preprocess = preprocess_of(net)
        cache_key = [
            group.facts,
            seen,
            settings.epsilons,
            settings.attacks,
            preprocess.facts() if preprocess is not None else None,
            how,
        ]
        logits_of = lambda x: run_network(net, x).logits  # noqa: E731
        compute = lambda: _robustness(predict, logits_of, images, targets, corrupted, settings, device)  # noqa: E731
        seed.robustness = _cached(out / "cache" / f"robustness-{weights[:16]}.json", cache_key, compute)


def _membership(predict: Callable[[Tensor], Tensor], data: Any, test: Outputs, targets: Tensor) -> Membership | None:
    """Returns what the losses of `MEMBERS` labelled training samples at most betray; None for data without ids."""
    if as_indexed(data) is None or not isinstance(data.get_batch("train", data.train_ids[:1]).inputs, Tensor):
        return None
    ids = data.train_ids[data.train_targets[data.train_ids] >= 0]
    if not len(ids):
        return None
    batches = [data.get_batch("train", chunk) for chunk in ids[spread_out(MEMBERS, len(ids))].split(BATCH)]
    own = torch.cat([losses(predict(batch.inputs), batch.targets) for batch in batches])
    return membership(own, losses(test.logits, targets))


@torch.no_grad()
def _predict(net: nn.Module, device: str, images: Tensor) -> Tensor:
    chunks = images.split(BATCH)
    return torch.cat([run_network(net, chunk.to(device)).logits.float().cpu() for chunk in chunks])


def _run(run: Callable[[np.ndarray], np.ndarray], images: Tensor | None) -> Tensor:
    assert images is not None  # an exported file takes a single tensor
    return torch.from_numpy(np.concatenate([run(chunk.numpy()) for chunk in images.split(BATCH)]))


def _robustness(
    predict: Callable[[Tensor], Tensor],
    logits_of: Callable[[Tensor], Tensor],
    images: Tensor,
    targets: Tensor,
    corrupted: dict[str, list[Tensor]],
    settings: Settings,
    device: str,
) -> dict[str, dict[str, list[float]]]:
    """Returns the accuracy under each corruption by severity, and under each attack by ε, from ε = 0."""
    found = {name: [robustness.accuracy(predict, x, targets) for x in xs] for name, xs in corrupted.items()}
    how = (settings.epsilons, settings.attacks, device)
    return {"corruptions": found, "attacks": robustness.under_attacks(predict, logits_of, images, targets, *how)}


def _cached(path: Path, question: Any, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns the result of `compute`, from the file at `path` where its key equals `question`."""
    question = json.loads(json.dumps(question))
    if path.is_file():
        try:
            kept = json.loads(path.read_text())
            if kept["question"] == question:
                return dict(kept["found"])
        except (ValueError, KeyError, TypeError):
            log.warning("%s is damaged, and written anew.", path)
    found = compute()
    write_text(path, json.dumps({"question": question, "found": found}) + "\n")
    return found
