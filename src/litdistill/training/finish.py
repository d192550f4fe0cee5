"""The end of a run: measures the best and the last weights on the so far unused test set, and writes figures and summary."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig, OmegaConf
from torch import nn

from litdistill.compress.quantize import Int8
from litdistill.compress.structure import structure_of
from litdistill.config.changes import as_started
from litdistill.config.origin import accept_record
from litdistill.distillation.distiller import Distiller
from litdistill.evaluation import figures
from litdistill.evaluation.crowd import describe_crowd
from litdistill.evaluation.evaluate import load_weights_of, measure_last
from litdistill.evaluation.findings import judge_gap
from litdistill.evaluation.predictions import evaluations_folder, measure, output_width
from litdistill.evaluation.summary import hyperparameters, start_of, summarize
from litdistill.export.export import export_student
from litdistill.export.latency import WITHOUT, has_postprocessing, onnx_of, time_files
from litdistill.models.metadata import student_metadata
from litdistill.models.preprocess import bare
from litdistill.tasks.base import Task
from litdistill.tasks.findings import Findings, report_findings
from litdistill.training.consult import consult
from litdistill.training.loggers import guarded, note_results, picture_writer
from litdistill.training.trainer import Built
from litdistill.utils.checkpoint import STUDENT, save_student
from litdistill.utils.command_line import near, typed
from litdistill.utils.errors import UserError
from litdistill.utils.files import write_text
from litdistill.utils.logging import format_seconds
from litdistill.utils.run_names import varied
from litdistill.utils.tags import tag
from litdistill.utils.units import named, shown

log = logging.getLogger(__name__)


class Run(NamedTuple):
    """A run after its training."""

    cfg: DictConfig
    folder: Path
    data: Any
    task: Task
    distiller: Distiller
    built: Built
    best: float  # value of the metric that selects the epoch
    changes: list[dict[str, Any]]  # of options, each where the run was resumed with others


def finish(run: Run, times: dict[str, float], role: str) -> None:
    """Measures the best and the last weights, and writes the weights, the figures and, last, the summary.

    `times`: seconds of the fit, of the teacher within it, and in total. `role`: who was trained, for the console. Only
    rank 0 writes.
    """
    cfg, trainer, task = run.cfg, run.built.trainer, run.task
    device, kept = trainer.strategy.root_device, evaluations_folder(cfg)
    teacher = run.distiller.teacher.net if run.distiller.teacher is not None else None
    checkpoints = run.folder / "checkpoints"
    last = measure_last(run.distiller, checkpoints / "last.ckpt", run.data, device)
    student = load_weights_of(run.distiller, checkpoints / "best.ckpt")
    found = measure(student, teacher, run.data, task, "test", device, kept)
    summary = summarize(cfg, run.data, task, student, teacher, found, last, run.best, times, trainer)
    if run.distiller.balance is not None and (balanced := run.distiller.balance.found()):
        summary["balance"] = balanced
    if run.changes:  # no run that kept its options is averaged with this one, and its teacher is the one it began with
        summary |= {"changes": run.changes, "start": start_of(as_started(cfg, run.changes))}
        summary["settings"]["changes"] = json.dumps(run.changes)
    if teacher is not None:
        summary["teacher"] |= describe_crowd(teacher, run.data, task, device, kept)
    if run.built.watch_test is not None:
        summary["student"]["test"][task.monitor[0]]["best_on_test"] = run.built.watch_test.best
    if not trainer.is_global_zero:
        return
    accept_record(run.folder)  # of a resume that had no step left to train
    width = None if task.reads_labels else output_width(student, run.data, device)
    metadata = student_metadata(student, run.data, structure_of(student), task.units(), width)
    save_student(student, run.folder / STUDENT, metadata)
    if isinstance(bare(student), Int8):
        summary["student"] |= {"precision": "int8", "bytes": _write_int8(run.folder, student, run.data, task)}
    if cfg.get("latency") and role == "Student":
        nets = {"student": student} | ({} if teacher is None else {"teacher": teacher})
        summary["latency"] = latency_of(nets, run.data, task)
        for net in nets.values():  # files are written on the CPU
            net.to(device)
    summary["findings"] = judge_student(student, run, found["findings"], device)
    # This file marks the run as finished: pictures come after it, and none can lose it.
    write_text(run.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    name = task.monitor[0]
    judged = "teacher" in found and task.reads_labels  # a backbone without classes is its own measure
    reference = f", teacher {shown(name, found['teacher'][name])}" if judged else ""
    log.info(
        "%s: test %s %s (best epoch on validation), %s (last epoch)%s; %s in all. %s",
        *(role, named(name), shown(name, found["student"][name]), shown(name, last[name]), reference),
        *(format_seconds(times["total_s"]), near(run.folder)),
    )
    report_findings({k: text.replace("The student", f"The {role.lower()}") for k, text in summary["findings"].items()})
    show(run, student, teacher, device, kept, summary)
    if trainer.world_size == 1:
        consult(cfg, run.data, run.distiller, summary, device)


def latency_of(nets: Mapping[str, nn.Module], data: Any, task: Task) -> dict[str, Any] | None:
    """Returns by network and batch size p50 and p95 in ms, with and without post-processing, of ONNX files on one CPU thread;
    None, with a warning, where networks cannot be written as such."""
    try:
        if not has_postprocessing(task):
            raise UserError(
                "latency=true times files with post-processing, of boxes and masks; the page times all others."
            )
        files = {name: onnx_of(net, data, task) for name, net in nets.items()}
        found = time_files(files, next(iter(data.batches("test"))).inputs.cpu(), list(files)[-1])
    except (UserError, ModuleNotFoundError) as error:
        log.warning("The run is finished without its latency. %s", error)
        return None
    kept = lambda one: {key: one[key] for key in ("p50_ms", "p95_ms")}  # noqa: E731
    return {
        "runtime": "onnxruntime",
        "threads": 1,
        **{
            name: {
                str(batch): {**kept(one), WITHOUT.replace(" ", "_"): kept(one[WITHOUT])} for batch, one in times.items()
            }
            for name, times in found.items()
        },
    }


def judge_student(student: nn.Module, run: Run, found: Findings, device: torch.device) -> Findings:
    """Returns `found` and whether the student is far better on its training samples; a failure there logs a warning."""
    try:
        return found | judge_gap(student, run.data, run.task, device)
    except Exception as error:  # a stranger's loader, memory: nothing of a finished training is lost for this
        log.warning("The student is not compared on training samples: %s: %s", type(error).__name__, error)
        return found


def show(
    run: Run,
    student: nn.Module,
    teacher: nn.Module | None,
    device: torch.device,
    kept: Path | None,
    summary: dict[str, Any],
) -> None:
    """Writes hyperparameters, results and figures to all loggers, as far as each takes them. What fails only logs a warning."""
    trainer = run.built.trainer
    options = hyperparameters(run.cfg, trainer, run.data.batch_size)
    later = f" To draw them later: litdistill evaluate {typed('run', run.folder)} pictures=true"
    for logger in trainer.loggers:
        tensorboard = isinstance(logger, TensorBoardLogger)
        name = "TensorBoard" if tensorboard else type(logger).__name__
        with guarded(f"The results in {name}"):
            best = {f"best/{(run.built.best.monitor or '').replace('/', '_')}": run.best}
            about, found = options, best | results(summary)
            if tensorboard:
                about = varied(sys.argv[1:]) or main_options(options)
                found = figures.results(summary, student, run.data, device)
                logger.log_metrics(found, 0)  # a level beside the curves: one point alone would be a card with a dot
            note_results(logger, about, found, trainer.global_step)
        with guarded(f"The pictures in {name}", later if tensorboard else ""):
            writer = picture_writer(logger)
            if tensorboard:
                writer.add_text("config", "```yaml\n" + OmegaConf.to_yaml(run.cfg) + "```", 0)
                terms = [
                    n.removeprefix("train/") for n in trainer.callback_metrics if (tag(n) or "").startswith("loss/")
                ]
                writer.add_custom_scalars(figures.layout(run.task, [t for t in terms if t != "loss"]))
            if writer is not None:
                figures.show(writer, student, teacher, run.data, run.task, device, trainer.global_step, kept)
            if tensorboard:
                writer.flush()
        with guarded(f"The results in {name}"):
            logger.finalize("success")


def results(summary: dict[str, Any]) -> dict[str, float]:
    """Returns the numbers of a summary that loggers show of a run: what the test set gives, the student's size, the time."""
    student = summary["student"]
    test = {f"test/{k}": v for k, v in student["test"].items() if isinstance(v, (int, float))}
    kept = student["test"][summary["metric"]["name"]]
    test |= {f"test/{summary['metric']['name']}": kept["best"], f"test/{summary['metric']['name']}_last": kept["last"]}
    cost = {f"student/{k}": student[k] for k in ("params", "macs", "bytes") if isinstance(student.get(k), (int, float))}
    return {**test, **cost, "time/fit_s": summary["time"]["fit_s"]}


def main_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those hyperparameters in which single runs of one folder mostly differ."""
    return {key: options[key] for key in ("method", "student", "teacher", "train/lr", "seed")}


def _write_int8(folder: Path, student: nn.Module, data: Any, task: Task) -> int | None:
    """Writes the int8 file and returns its size in bytes; on a `UserError` logs a warning and returns None."""
    try:
        return int(export_student(folder, student, data, precision="int8", task=task)[1]["bytes"])
    except UserError as error:
        log.warning(
            "The int8 file is not written, and the run is finished without it. %s To write it later: "
            "litdistill export %s precision=int8",
            *(error, typed("run", folder)),
        )
        return None
