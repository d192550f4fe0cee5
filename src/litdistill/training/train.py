"""Trains one run and writes its folder: config, TensorBoard, checkpoints, student.safetensors, train.log, summary.json."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig
from torch import nn

from litdistill.config.build import build_data, build_student, build_teacher
from litdistill.config.changes import as_started
from litdistill.config.distiller import (
    build_distiller,
    build_method,
    build_optimizer,
    build_scheduler,
    example_batch,
)
from litdistill.config.instantiate import check_objects
from litdistill.config.lr_scaling import Scale, read_scale
from litdistill.config.members import members_of
from litdistill.config.origin import accept_record, check_foreign, is_foreign, remember
from litdistill.config.recipes import is_complete, teacher_config
from litdistill.config.schema import check
from litdistill.data.foreign import ForeignData, sample_count
from litdistill.data.protocol import training_labels
from litdistill.distillation.distiller import Distiller
from litdistill.distillation.recorded import RecordedTeacher
from litdistill.distillation.sharding import ShardedTeacher
from litdistill.evaluation.predictions import evaluations_folder, teacher_outputs
from litdistill.models.preprocess import preprocessing
from litdistill.training.compiling import decide
from litdistill.training.finish import Run, finish
from litdistill.training.grouping import GroupedData, group_size
from litdistill.training.last_batch import say_what_is_left_out
from litdistill.training.loggers import wandb_finished
from litdistill.training.monitors import check_monitors, check_train_monitors
from litdistill.training.pack import Member
from litdistill.training.preemption import run_lock, translate_interrupts, translate_worker_errors
from litdistill.training.preflight import check_data, check_student, check_values, horizon, with_min_steps
from litdistill.training.prerequisites import Prerequisites
from litdistill.training.refusals import lightning_refusals
from litdistill.training.resume import check_unchanged, last_state
from litdistill.training.trainer import Built, build_trainer
from litdistill.utils.allocator import keep_freed_memory
from litdistill.utils.distributed import init_process_group_early, is_first_rank
from litdistill.utils.errors import UserError
from litdistill.utils.logging import ONCE, adopt_lightning_logs
from litdistill.utils.units import quantity
from litdistill.utils.versions import versions

log = logging.getLogger(__name__)


def train(
    cfg: DictConfig, callbacks: Sequence[Callback] = (), role: str = "Student", member: Member | None = None
) -> float:
    """Trains as `conf/train.yaml` describes; returns the best value of the metric that selects the epoch.

    `callbacks`: the caller's, which run before those of the config. `role`: who is trained, for the lines on the console.
    `member`: of several trainings side by side (`litdistill.training.pack`).
    """
    folder = Path(cfg.folder)
    if is_complete(folder):  # a resumed sweep repeats no finished run
        check_unchanged(cfg, folder)
        accept_record(folder)
        log.info("%s is finished already.", folder)
        return float(json.loads((folder / "summary.json").read_text())["val"]["best"])
    with run_lock(folder), translate_worker_errors(), translate_interrupts(folder), wandb_finished():
        started, of_core = time.perf_counter(), time.process_time()
        admit(cfg, folder)
        prepare_process(cfg)
        method = build_method(cfg)  # first, to raise errors in options before a teacher is trained
        data, task = build_data(cfg)
        check_data(cfg, data, task)
        longer = with_min_steps(cfg, data)
        last = last_state(folder / "checkpoints", longer.trainer.max_epochs)
        built = build_trainer(longer, folder, method, task, data, callbacks, last, role)
        trainer = built.trainer
        init_process_group_early(trainer)
        scale = read_scale(cfg, trainer, data.batch_size)
        first = as_started(cfg, built.options.all_changes)  # its teacher is the one that it began with
        optimizer = build_optimizer(cfg.optimizer, scale.lr)
        scheduler = build_scheduler(
            cfg.scheduler, *horizon(longer.trainer, data, scale), built.best.monitor, built.best.mode
        )
        before = Prerequisites(train, lambda: check_student(cfg, data, task, optimizer, built.monitors), role)
        sharded = cfg.teacher is not None and isinstance(trainer.strategy, ShardedTeacher)
        teacher = build_teacher(first, data, task, before.teacher)
        start = before.starting_point(first)
        torch.manual_seed(cfg.seed)  # the same initial weights for every method and prerequisite
        student = build_student(cfg, data, teacher, start)
        check_monitors(student, data, task, built.monitors, teacher is not None)
        indexed = None if isinstance(data, ForeignData) else data
        example = data.example if indexed is None else example_batch(data)
        known = None
        if teacher is not None and indexed is not None and not sharded:
            known = teacher_outputs(teacher, data, task, "val", trainer.strategy.root_device, evaluations_folder(cfg))
        distiller = build_distiller(
            cfg, student, method, teacher, task, example, indexed, optimizer, scheduler, known, built.layout.group, sharded,
            labels=training_labels(data),
        )  # fmt: skip
        compile_if_it_pays(cfg, built, distiller, example, horizon(longer.trainer, data, scale)[1], data.batch_size)
        check_train_monitors(distiller, example, built.monitors)
        introduce(data, distiller, scale, role)
        fit_started = time.perf_counter()
        best = fit(cfg, built, distiller, data, last.path, member)
        run = Run(cfg, folder, data, task, distiller, built, best, built.options.history)
        total_s, fit_s = (time.perf_counter() - begun for begun in (started + before.seconds, fit_started))
        if trainer.is_global_zero or sharded:  # all ranks run a sharded teacher together
            core_s = time.process_time() - of_core  # of a teacher that was trained first, too
            finish(run, {"fit_s": fit_s, "teacher_s": distiller.teacher_s, "total_s": total_s, "core_s": core_s}, role)
        trainer.strategy.barrier()
        return best


def admit(cfg: DictConfig, folder: Path) -> None:
    """Raises `UserError` for an untrusted foreign config, for options without sense, the teacher's too; records the run."""
    check_foreign(cfg, folder)
    if is_foreign() and (root := cfg.data.get("root")) is not None:
        log.info("This run was made elsewhere, and names the place of its data: they are read from data.root=%s.", root)
    check_values(cfg)
    check(cfg)
    check_objects(cfg)
    for one in members_of(cfg) or ([cfg] if cfg.teacher is not None else []):
        if trains_teacher(one.teacher):
            check(teacher_config(one), of="In the teacher's training (teacher.recipe):\n")
    if is_first_rank():
        remember(folder, cfg)


def trains_teacher(node: DictConfig) -> bool:
    """Returns whether the teacher is trained where there is none yet."""
    return node.get("checkpoint") == "auto" and not node.get("ensemble") and node.get("outputs") is None


def prepare_process(cfg: DictConfig) -> None:
    """Applies the settings of the whole process, and reads the versions for the summary now to raise their errors early.

    What torch.compile has compiled is kept beside the teacher's cache, for runs to come.
    """
    versions()
    adopt_lightning_logs()
    keep_freed_memory()
    torch.set_float32_matmul_precision("high")
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    if any((cfg.get("compile") or {}).values()):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str((Path(cfg.runs) / "cache" / "compile").absolute()))


def compile_if_it_pays(
    cfg: DictConfig, built: Built, distiller: Distiller, example: Any, steps: int, batch_size: int
) -> None:
    """Compiles the student where `compile.student=auto` decides so; `steps`: of the run."""
    if (cfg.get("compile") or {}).get("student") != "auto":
        return
    trainer, kept = built.trainer, built.options.compiled
    device = trainer.strategy.root_device.type
    chosen = decide(distiller, example, batch_size, steps, device, str(trainer.precision), kept)
    built.options.compiled = chosen
    if chosen != "off":
        distiller.student.compile(mode=chosen)


def fit(
    cfg: DictConfig, built: Built, distiller: Distiller, data: Any, last: Path | None, member: Member | None = None
) -> float:
    """Trains, from the checkpoint `last` if given; returns the best value of the metric that selects the epoch."""
    trainer = built.trainer
    module: LightningDataModule
    if isinstance(data, ForeignData):
        module = data.module
        warn_of_padding(data.count("val"), trainer.world_size)
    else:
        layout = built.layout
        if layout.group and last is None:
            layout = layout._replace(group=group_size(distiller, data, layout.group))
        module = GroupedData(data, layout, member, distiller.recorder)
    if cfg.trainer.max_epochs == 0:
        return untrained(built, distiller, module, Path(cfg.folder) / "checkpoints")
    with lightning_refusals():  # of a callback that monitors a metric that is not logged, for example
        trainer.fit(distiller, datamodule=module, ckpt_path=last, weights_only=True)
    if built.best.best_model_score is None:
        raise UserError(
            f"No epoch was validated with {built.best.monitor}, so that none is the best: trainer.limit_val_batches and "
            "trainer.check_val_every_n_epoch must let at least one be."
        )
    return float(built.best.best_model_score)


def warn_of_padding(count: int | None, processes: int) -> None:
    """Warns where Lightning's distributed sampler repeats validation samples to give each process equally many."""
    if count is not None and count % processes:
        log.warning(
            "%d validation samples are divided among %d processes by Lightning, which repeats %d of them: metrics of the "
            "validation count these twice. The test set is measured by one process, each sample once.",
            *(count, processes, -count % processes),
        )


def untrained(built: Built, distiller: Distiller, module: LightningDataModule, checkpoints: Path) -> float:
    """Validates the student without training and writes its checkpoints; returns the monitored metric."""
    (found,) = built.trainer.validate(distiller, datamodule=module, verbose=False)
    for name in ("best.ckpt", "last.ckpt"):
        built.trainer.save_checkpoint(checkpoints / name)
    return found[str(built.best.monitor)]


def introduce(data: Any, distiller: Distiller, scale: Scale, role: str) -> None:
    """Logs the sizes of the data, of what is trained (`role`) and of its teacher, and the learning rate."""
    if not isinstance(data, ForeignData):
        say_what_is_left_out(data, distiller.method, scale.processes)
    count = sum(p.numel() for p in distiller.student.parameters())
    teacher = ""
    net = distiller.teacher.net if distiller.teacher is not None else None
    if isinstance(net, RecordedTeacher):
        teacher = f", teacher {net.file.path}"
    elif net is not None:
        size = sum(p.numel() for p in net.parameters())
        teacher = f", teacher {size:,} parameters ({size / count:.1f}x)"
    verbs = VERBS | {"train": VERBS["train"] + WITHOUT_LABELS[training_labels(data)]}
    sizes = ", ".join(f"{sample_count(data, split) or 'unknown'} to {verb}" for split, verb in verbs.items())
    shape = "x".join(map(str, data.input_shape or ()))
    counted = data.num_classes and distiller.task.reads_labels
    about = f"; {quantity(data.num_classes, 'output')} of {shape}" if counted and shape else ""
    log.info("%s: %s%s.", data.name, sizes, about, extra=ONCE)  # a teacher has seen the same
    log.info("%s: %s parameters%s. %s", role, f"{count:,}", teacher, scale)
    if said := sizes_seen(data, {f"the {role.lower()}": distiller.student, "its teacher": net}):
        log.info("%s", said)


def sizes_seen(data: Any, networks: Mapping[str, nn.Module | None]) -> str:
    """Returns in a sentence at how many pixels each network sees the images; empty where all see them as they are loaded."""
    shape = data.input_shape
    if shape is None or len(shape) != 3:
        return ""
    loaded = f"{shape[1]}x{shape[2]}"
    seen = {
        name: list(dict.fromkeys("x".join(map(str, facts["size"] or shape[1:])) for facts in preprocessing(net)))
        for name, net in networks.items()
        if net is not None
    }
    if all(sizes in ([], [loaded]) for sizes in seen.values()):
        return ""
    each = [f"{name} sees {'them as they are' if not sizes else ' and '.join(sizes)}" for name, sizes in seen.items()]
    return f"Images and their views have {loaded} pixels: {', '.join(each)}."


VERBS = {"train": "train on", "val": "validate", "test": "test"}
WITHOUT_LABELS = {"all": "", "some": " (some of them without labels)", "none": " (all without labels)"}


if __name__ == "__main__":  # without this the command would exit silently
    print("Training is started by: litdistill train trainer=debug, or python scripts/train.py", file=sys.stderr)
    sys.exit(2)
