"""Trains one run and leaves its folder: config, TensorBoard, checkpoints, student.safetensors, train.log, summary.json."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from filelock import FileLock
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, LearningRateMonitor
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from litdistill import pictures
from litdistill.build import build_data, build_distiller, build_teacher, finished, make, teacher_config
from litdistill.callbacks import EpochLine, SeededSteps, StopSafely, format_seconds, progress_bar
from litdistill.checkpoint import STUDENT, load_checkpoint, save_student, write_text
from litdistill.data.datamodule import ImageData
from litdistill.distiller import Distiller
from litdistill.errors import UserError
from litdistill.evaluate import load_student, measure, measure_last
from litdistill.runtime import adopt_lightning_logs
from litdistill.summary import hyperparameters, summarise

log = logging.getLogger(__name__)


def train(cfg: DictConfig, callbacks: Sequence[Callback] = ()) -> float:
    """Trains as `conf/train.yaml` describes; gives the best validation accuracy, which is what a sweep maximises.

    `callbacks`: of whoever calls, before the config's own.
    """
    folder = Path(cfg.folder)
    if finished(folder):  # a resumed sweep repeats nothing
        log.info("%s is finished already.", folder)
        return float(json.loads((folder / "summary.json").read_text())["val"]["best"])
    started = time.perf_counter()
    adopt_lightning_logs()
    torch.set_float32_matmul_precision("high")
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    method = make(cfg.method)  # first, so that a wrong option is known before a teacher is trained
    data = build_data(cfg)
    teacher = build_teacher(cfg, data, train_teacher)
    distiller = build_distiller(cfg, data, method, teacher)
    _introduce(cfg, data, distiller)

    trainer = build_trainer(cfg, folder, phases=method.phases)
    trainer.callbacks[:0] = callbacks  # type: ignore[attr-defined]
    fit_started = time.perf_counter()
    trainer.fit(distiller, datamodule=data, ckpt_path=last_state(folder / "checkpoints"), weights_only=True)
    fit_s = time.perf_counter() - fit_started
    checkpoint = trainer.checkpoint_callback
    best = float(checkpoint.best_model_score)  # type: ignore[union-attr]
    if trainer.is_global_zero:
        times = {"fit_s": fit_s, "teacher_s": distiller.teacher_s, "total_s": time.perf_counter() - started}
        _finish(cfg, folder, data, distiller, trainer, best, times)
    trainer.strategy.barrier()
    return best


def last_state(checkpoints: Path) -> Path | None:
    """The newest checkpoint that can be read, to go on from: `last.ckpt`, else `best.ckpt`; None for a new run."""
    for name in ("last.ckpt", "best.ckpt"):
        if (checkpoints / name).is_file():
            try:
                load_checkpoint(checkpoints / name)
            except UserError as error:
                log.warning("%s Trying the one before.", error)
                continue
            log.info("Going on from %s", checkpoints / name)
            return checkpoints / name
    return None


def build_trainer(cfg: DictConfig, folder: Path, phases: bool = False) -> Trainer:
    """Lightning's Trainer with the config's callbacks and loggers, and this project's.

    `phases`: the method trains some parameters in its first epochs only, which plain DDP would take for a mistake.
    """
    callbacks: list[Callback] = [SeededSteps(cfg.seed), EpochLine(), *progress_bar()]
    loggers: list[Logger] = [make(c) for c in (cfg.logger or {}).values()]
    named = [make(c) for c in (cfg.callbacks or {}).values()]
    # The monitor refuses to have no logger.
    callbacks += [c for c in named if loggers or not isinstance(c, LearningRateMonitor)]
    if cfg.ema is not None:
        callbacks.append(EMAWeightAveraging(decay=cfg.ema))
    callbacks.append(StopSafely(folder / "checkpoints"))  # last: what it saves, all others have seen
    bar = any(c.__class__.__name__ == "RichProgressBar" for c in callbacks)
    options = cfg.trainer.copy()
    if phases and options.get("strategy") == "ddp":
        options.strategy = "ddp_find_unused_parameters_true"
    return make(
        options,
        default_root_dir=str(folder),
        callbacks=callbacks,
        logger=loggers or False,
        enable_progress_bar=bar,
    )


def train_teacher(cfg: DictConfig, folder: Path) -> None:
    """Trains the teacher of `cfg` in `folder`, unless another process has just done so."""
    with _lock(folder):
        if finished(folder):
            return
        log.info("No such teacher yet: training it once, in %s", folder)
        recipe = teacher_config(cfg)
        recipe.folder = str(folder)
        if is_first_rank():
            write_text(folder / ".hydra" / "config.yaml", OmegaConf.to_yaml(recipe))
        with logged_to(folder / "train.log"):
            train(recipe)
        log.info("The teacher is trained.")


def is_first_rank() -> bool:
    """Whether this process is a run's first, asked before there is a trainer."""
    return int(getattr(rank_zero_only, "rank", None) or 0) == 0


def _lock(folder: Path) -> contextlib.AbstractContextManager[object]:
    """Held by the first process of a run only: its other ranks train the teacher together with it."""
    if not is_first_rank():
        return contextlib.nullcontext()
    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(folder.parent / f".{folder.name}.lock")


@contextlib.contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Puts the log's lines into `path` too."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def _introduce(cfg: DictConfig, data: ImageData, distiller: Distiller) -> None:
    count = sum(p.numel() for p in distiller.student.parameters())
    taught = ""
    if distiller.teacher is not None:
        size = sum(p.numel() for p in distiller.teacher.parameters())
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
    """Measures best and last weights on the test set, which nothing has seen before, and writes what a run leaves."""
    device = trainer.strategy.root_device
    teacher = distiller.teacher.net if distiller.teacher is not None else None
    checkpoints = folder / "checkpoints"
    last = measure_last(distiller, checkpoints / "last.ckpt", data, device)
    student = load_student(distiller, checkpoints / "best.ckpt")
    found = measure(student, teacher, data, "test", device)
    summary = summarise(cfg, data, student, teacher, found, last, best, times, trainer)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(hyperparameters(cfg), {"best/val_accuracy": best})
            pictures.show(logger.experiment, student, teacher, data, device, trainer.global_step)
            logger.experiment.add_text("config", "```yaml\n" + OmegaConf.to_yaml(cfg) + "```", 0)
            logger.experiment.add_custom_scalars(pictures.LAYOUT)
            logger.experiment.flush()
    facts = {"classes": data.class_names, "mean": data.mean, "std": data.std, "input_shape": data.input_shape}
    save_student(student, folder / STUDENT, {k: json.dumps(v) for k, v in facts.items()})
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")  # last: it says that the run is finished
    log.info(
        "%s: test accuracy %.2f %% (best epoch on validation), %.2f %% (last epoch)%s; %s in all. %s",
        *(cfg.name, 100 * found["student"]["accuracy"], 100 * last["accuracy"]),
        f", teacher {100 * found['teacher']['accuracy']:.2f} %" if teacher is not None else "",
        *(format_seconds(times["total_s"]), os.path.relpath(folder)),
    )
