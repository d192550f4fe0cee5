"""Trains one run and leaves its folder: config, TensorBoard, checkpoints, student.safetensors, train.log, summary.json."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from lightning import Trainer
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, LearningRateMonitor
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from omegaconf import DictConfig, OmegaConf

from litdistill.compress.quantize import Int8
from litdistill.compress.structure import structure_of
from litdistill.config.build import build_data, build_distiller, build_net, build_teacher, steps_at_once
from litdistill.config.instantiate import instantiate
from litdistill.config.lr_scaling import UnevenBatchWeighting, read_scale
from litdistill.config.origin import check_foreign, check_links, remember
from litdistill.config.recipes import is_complete, student_config, student_folder, teacher_config
from litdistill.data.datamodule import ImageData
from litdistill.distillation.distiller import Distiller
from litdistill.distillation.sharding import ShardedTeacher
from litdistill.evaluation import figures as pictures
from litdistill.evaluation.evaluate import collect_teacher, load_student, measure, measure_last
from litdistill.evaluation.summary import hyperparameters, summarize
from litdistill.export.export import export_student
from litdistill.methods.base import Method
from litdistill.training.callbacks import EpochLogger, PerStepSeed, TestAccuracyMonitor, progress_bar
from litdistill.training.preemption import GracefulStop, run_lock, translate_worker_errors
from litdistill.utils.allocator import keep_freed_memory
from litdistill.utils.checkpoint import STUDENT, AtomicCheckpointIO, load_checkpoint, save_student, write_text
from litdistill.utils.distributed import broadcast_from_rank0, fit_to_launch, init_process_group_early, is_first_rank
from litdistill.utils.errors import UserError
from litdistill.utils.logging import adopt_lightning_logs, format_seconds, logged_to

log = logging.getLogger(__name__)


def build(cfg: DictConfig, method: Method) -> tuple[ImageData, Distiller, float]:
    """A run's data, its distiller, whose teacher is trained first where there is none yet, and the seconds that took.

    These are the time of the runs that this one starts from, and of waiting for them.
    """
    data, apart_s = build_data(cfg), 0.0

    def timed(work: Callable[..., Any], *given: Any) -> Any:
        """A teacher or a starting point is a run of its own: its time, and that of waiting for it, is not this one's."""
        nonlocal apart_s
        begun = time.perf_counter()
        found = work(*given)
        apart_s += time.perf_counter() - begun
        return found

    def absent(one: DictConfig, folder: Path) -> None:
        # A student that cannot be built is better known before its teacher is trained than after.
        student = {k: v for k, v in cfg.student.items() if k != "checkpoint"}
        instantiate(cfg.optimizer)(build_net(OmegaConf.create(student), data, "student").parameters())
        timed(train_teacher, one, folder)

    teacher = build_teacher(cfg, data, absent)
    distiller = build_distiller(cfg, data, method, teacher, timed(start, cfg))
    return data, distiller, apart_s


def train(cfg: DictConfig, callbacks: Sequence[Callback] = ()) -> float:
    """Trains as `conf/train.yaml` describes; gives the best validation accuracy, or whatever else `callbacks.best` monitors.

    `callbacks`: of whoever calls, before the config's own.
    """
    folder = Path(cfg.folder)
    with contextlib.nullcontext() if is_complete(folder) else run_lock(folder):
        return _train(cfg, folder, callbacks)


def _train(cfg: DictConfig, folder: Path, callbacks: Sequence[Callback]) -> float:
    if is_complete(folder):  # a resumed sweep repeats nothing
        log.info("%s is finished already.", folder)
        return float(json.loads((folder / "summary.json").read_text())["val"]["best"])
    check_foreign(cfg, folder)
    if is_first_rank():
        remember(folder, cfg)
    started = time.perf_counter()
    adopt_lightning_logs()
    keep_freed_memory()
    torch.set_float32_matmul_precision("high")
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    method = instantiate(cfg.method)  # first, so that a wrong option is known before a teacher is trained
    # Some batches only, as with trainer=debug, are to see that all fits together.
    rehearsed = cfg.trainer.get("limit_train_batches") is not None
    if 0 < (epochs := cfg.trainer.max_epochs or 0) <= method.init_epochs and not rehearsed:
        raise UserError(
            f"trainer.max_epochs={epochs} would end within the first phase of this method, which leaves the student untrained "
            f"for method.init_epochs={method.init_epochs} epochs. Set trainer.max_epochs above that, or method.init_epochs "
            "lower."
        )
    trainer = build_trainer(cfg, folder, phases=method.phases)
    trainer.callbacks[:0] = callbacks  # type: ignore[attr-defined]
    scale = read_scale(cfg, trainer)
    if trainer.world_size > 1:
        trainer.callbacks.insert(0, UnevenBatchWeighting())  # type: ignore[attr-defined]
    init_process_group_early(trainer)
    sharded = cfg.teacher is not None and isinstance(trainer.strategy, ShardedTeacher)
    if sharded:  # its ranks run it together: none may find in a cache what another asks for
        cfg = cfg.copy()
        OmegaConf.update(cfg, "teacher.cache.mode", "off", force_add=True)
    data, distiller, apart_s = build(cfg, method)
    distiller.optimizer = partial(distiller.optimizer, lr=scale.lr)
    if distiller.teacher is not None and not sharded:
        where = trainer.strategy.root_device
        distiller.val_logits = collect_teacher(distiller.teacher.net, data, "val", where, evaluations(cfg))
    _introduce(cfg, data, distiller)
    log.info("%s", scale)

    fit_started = time.perf_counter()
    with translate_worker_errors():
        if cfg.trainer.max_epochs == 0:
            best = untrained(trainer, distiller, data, folder / "checkpoints")
        else:
            last = last_state(folder / "checkpoints", cfg.trainer.max_epochs)
            trainer.fit(distiller, datamodule=data, ckpt_path=last, weights_only=True)
            score = trainer.checkpoint_callback.best_model_score  # type: ignore[union-attr]
            if score is None:
                raise UserError(
                    "No epoch was validated, so that none is the best: trainer.limit_val_batches and "
                    "trainer.check_val_every_n_epoch must let at least one be."
                )
            best = float(score)
    fit_s = time.perf_counter() - fit_started
    if trainer.is_global_zero or sharded:
        total_s = time.perf_counter() - started - apart_s
        times = {"fit_s": fit_s, "teacher_s": distiller.teacher_s, "total_s": total_s}
        _finish(cfg, folder, data, distiller, trainer, best, times)
    trainer.strategy.barrier()
    return best


def evaluations(cfg: DictConfig) -> Path | None:
    """Where what a teacher says of the validation and test sets is kept for all runs that have it."""
    if cfg.teacher is None or (cfg.teacher.get("cache") or {}).get("mode") in ("off", "memory"):
        return None
    return Path(cfg.runs) / "cache" / "evaluations"


def untrained(trainer: Trainer, distiller: Distiller, data: ImageData, checkpoints: Path) -> float:
    """What is monitored, of a student that is taken as it starts; its checkpoints are written nonetheless."""
    (found,) = trainer.validate(distiller, datamodule=data, verbose=False)
    for name in ("best.ckpt", "last.ckpt"):
        trainer.save_checkpoint(checkpoints / name)
    return found[monitored(trainer)]


def monitored(trainer: Trainer) -> str:
    """The metric by which the best epoch is chosen."""
    return trainer.checkpoint_callback.monitor  # type: ignore[union-attr]


def last_state(checkpoints: Path, max_epochs: int | None = None) -> Path | None:
    """The newest checkpoint that can be read, to go on from: `last.ckpt`, else `best.ckpt`; None for a new run.

    Raises `UserError` where it is of an epoch beyond `max_epochs`.
    """
    for name in ("last.ckpt", "best.ckpt"):
        if (checkpoints / name).is_file():
            try:
                state = load_checkpoint(checkpoints / name)
            except UserError as error:
                log.warning("%s Trying the one before.", error)
                continue
            if max_epochs is not None and 0 <= max_epochs <= state["epoch"]:
                raise UserError(
                    f"{checkpoints / name} is of epoch {state['epoch'] + 1}, and trainer.max_epochs={max_epochs}. Set that "
                    "higher to go on, or start a new run without resume."
                )
            log.info("Going on from %s", checkpoints / name)
            return checkpoints / name
    return None


def build_trainer(cfg: DictConfig, folder: Path, phases: bool = False) -> Trainer:
    """Lightning's Trainer with the config's callbacks and loggers, and this project's.

    `phases`: the method trains some parameters in its first epochs only, which plain DDP would take for a mistake.
    """
    if (precision := str(cfg.trainer.get("precision"))) in ("bf16-true", "16-true", "64-true", "64"):
        raise UserError(
            f"trainer.precision={precision}: weights and images are float32 here. Use 32-true, bf16-mixed or 16-mixed."
        )
    callbacks: list[Callback] = [PerStepSeed(cfg.seed), EpochLogger(), *progress_bar()]
    loggers: list[Logger] = [instantiate(c) for c in (cfg.logger or {}).values()]
    named = [instantiate(c) for c in (cfg.callbacks or {}).values()]
    # The monitor refuses to have no logger.
    callbacks += [c for c in named if loggers or not isinstance(c, LearningRateMonitor)]
    if cfg.watch_test:
        callbacks.append(TestAccuracyMonitor())  # before the average's own, which puts the student's weights back
    if cfg.ema is not None:
        callbacks.append(EMAWeightAveraging(decay=cfg.ema))
    # Last: what it saves, all others have seen.
    callbacks.append(GracefulStop(folder / "checkpoints", cfg.checkpoint_minutes))
    bar = any(c.__class__.__name__ == "RichProgressBar" for c in callbacks)
    plugins: list[Any] = [AtomicCheckpointIO()]
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # `StopSafely` has that signal
    options = cfg.trainer.copy()
    OmegaConf.set_struct(options, False)  # what a launch or a method needs may be no key of this trainer's file
    if steps_at_once(cfg) > 1:  # the distiller clips: Lightning does not look into a step of several minibatches
        options.gradient_clip_val = None
    fit_to_launch(options)
    if phases and options.get("strategy") == "ddp":
        options.strategy = "ddp_find_unused_parameters_true"
    elif phases and OmegaConf.is_dict(options.get("strategy")):
        options.strategy.find_unused_parameters = True
    return instantiate(
        options,
        default_root_dir=str(folder),
        callbacks=callbacks,
        logger=loggers or False,
        enable_progress_bar=bar,
        plugins=plugins,
    )


def train_teacher(cfg: DictConfig, folder: Path) -> None:
    """Trains the teacher of `cfg` in `folder`, unless another process has just done so."""
    _train_once(teacher_config(cfg), folder, "teacher")


def start(cfg: DictConfig) -> Path | None:
    """The run that the student starts from where `student.checkpoint` is auto, trained where there is none yet."""
    if cfg.student.get("checkpoint") != "auto":
        return None
    folder = student_folder(cfg)
    if not broadcast_from_rank0(is_complete(folder)):
        _train_once(student_config(cfg), folder, "starting point")
    return folder


def _train_once(recipe: DictConfig, folder: Path, what: str) -> None:
    with _lock(folder):
        if broadcast_from_rank0(is_complete(folder)):
            return
        log.info("No such %s yet: training it once, in %s", what, folder)
        recipe.folder = str(folder)
        check_links(folder)
        if is_first_rank():
            write_text(folder / ".hydra" / "config.yaml", OmegaConf.to_yaml(recipe))
        with logged_to(folder / "train.log"):
            train(recipe)
        log.info("The %s is trained.", what)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Held by the first process of a run only: its other ranks train the teacher together with it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    while not broadcast_from_rank0(_acquired(lock) if is_first_rank() else True):
        pass  # the ranks are told once a minute that the first one still waits, as they would give it up
    try:
        yield
    finally:
        lock.release()


def _acquired(lock: FileLock) -> bool:
    with contextlib.suppress(Timeout):
        lock.acquire(timeout=60)
    return lock.is_locked


def _introduce(cfg: DictConfig, data: ImageData, distiller: Distiller) -> None:
    count = sum(p.numel() for p in distiller.student.parameters())
    taught = ""
    if distiller.teacher is not None:
        size = sum(p.numel() for p in distiller.teacher.net.parameters())
        taught = f", teacher {size:,} parameters ({size / count:.1f}x)"
    log.info(
        "%s: %d images to train on, %d to validate, %d to test; %d classes of %s. Student %s parameters%s.",
        *(data.name, len(data.train_ids), len(data.val_ids), len(data.test_ids), data.num_classes),
        *("x".join(map(str, data.input_shape)), f"{count:,}", taught),
    )


def _finish(
    cfg: DictConfig,
    folder: Path,
    data: ImageData,
    distiller: Distiller,
    trainer: Trainer,
    best: float,
    times: dict[str, float],
) -> None:
    """Measures best and last weights on the test set, which nothing has seen before, and writes what a run leaves.

    The first rank alone writes.
    """
    device = trainer.strategy.root_device
    teacher = distiller.teacher.net if distiller.teacher is not None else None
    checkpoints = folder / "checkpoints"
    last = measure_last(distiller, checkpoints / "last.ckpt", data, device)
    student = load_student(distiller, checkpoints / "best.ckpt")
    found = measure(student, teacher, data, "test", device, evaluations(cfg))
    summary = summarize(cfg, data, student, teacher, found, last, best, times, trainer)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, TestAccuracyMonitor):
            summary["student"]["test"]["accuracy"]["best_on_test"] = callback.best
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(
                hyperparameters(cfg, trainer), {f"best/{monitored(trainer).replace('/', '_')}": best}
            )
            pictures.show(logger.experiment, student, teacher, data, device, trainer.global_step, evaluations(cfg))
            logger.experiment.add_text("config", "```yaml\n" + OmegaConf.to_yaml(cfg) + "```", 0)
            logger.experiment.add_custom_scalars(pictures.LAYOUT)
            logger.experiment.flush()
    if not trainer.is_global_zero:
        return
    facts = {"classes": data.class_names, "mean": data.mean, "std": data.std, "input_shape": data.input_shape}
    metadata = {k: json.dumps(v) for k, v in facts.items()}
    if steps := structure_of(student):
        metadata["structure"] = json.dumps(steps)
    save_student(student, folder / STUDENT, metadata)
    if isinstance(student, Int8):
        summary["student"] |= {"precision": "int8", "bytes": _ship_int8(folder, student, data)}
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")  # last: it says that the run is finished
    log.info(
        "%s: test accuracy %.2f %% (best epoch on validation), %.2f %% (last epoch)%s; %s in all. %s",
        *(cfg.name, 100 * found["student"]["accuracy"], 100 * last["accuracy"]),
        f", teacher {100 * found['teacher']['accuracy']:.2f} %" if teacher is not None else "",
        *(format_seconds(times["total_s"]), os.path.relpath(folder)),
    )


def _ship_int8(folder: Path, student: Int8, data: ImageData) -> int | None:
    """The bytes of the file that is written; None where none can be, for which a trained run is not given up."""
    try:
        return int(export_student(folder, student, data, precision="int8")[1]["bytes"])
    except UserError as error:
        log.warning(
            "The int8 file is not written, and the run is finished without it. %s To write it later: "
            "python scripts/export.py run=%s precision=int8",
            *(error, os.path.relpath(folder)),
        )
        return None
