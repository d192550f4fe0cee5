"""Builds Lightning's Trainer from a config: callbacks, loggers, strategy and plugins, with checks before training."""

from __future__ import annotations

import logging
import multiprocessing
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import Trainer
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint, ProgressBar
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import DictConfig, OmegaConf

from litdistill.config.instantiate import instantiate
from litdistill.config.lr_scaling import Scale, read_scale
from litdistill.data.foreign import ForeignData
from litdistill.distillation.checks import check_method
from litdistill.methods.base import Method
from litdistill.tasks.base import Task
from litdistill.training.callbacks import EpochLogger, TestAccuracyMonitor
from litdistill.training.grouping import GROUP, Layout, log_interval, reason_for_single, without_rate_monitor
from litdistill.training.loggers import build_loggers
from litdistill.training.monitors import mode_of, monitored
from litdistill.training.precision import precision_of
from litdistill.training.preemption import GracefulStop
from litdistill.training.preflight import horizon, steps_per_epoch
from litdistill.training.progress import EpochBar
from litdistill.training.resume import LastState, RunOptions, run_options
from litdistill.utils.checkpoint import AtomicCheckpointIO
from litdistill.utils.distributed import fit_to_launch
from litdistill.utils.errors import UserError

log = logging.getLogger(__name__)

SPAWNED = ("spawn", "fork", "notebook")


class Built(NamedTuple):
    """A Trainer, and those of its callbacks and settings that a run asks for its results."""

    trainer: Trainer
    best: ModelCheckpoint  # selects the epoch
    layout: Layout  # `group` is the maximum number of minibatches per step
    watch_test: TestAccuracyMonitor | None
    options: RunOptions
    monitors: dict[str, str]  # the metric of each callback that has one, by the key of the config


def build_trainer(
    cfg: DictConfig,
    folder: Path,
    method: Method,
    task: Task,
    data: Any,
    callbacks: Sequence[Callback] = (),
    last: LastState = LastState(),  # noqa: B008
    role: str = "Student",
) -> Built:
    """Returns the Trainer of a config. `callbacks`: the caller's, before the config's. `last`: what a run is resumed from.

    `role`: who is trained, for the console.

    Raises `UserError` for a precision or strategy that is not supported, a run without a validated epoch, a monitor or mode
    that is invalid, and a resumed run's option that may not change.
    """
    refuse(cfg, method, isinstance(data, ForeignData))
    check_method(method, cfg.teacher, task)
    best, by_name = named_callbacks(cfg, task)
    monitors = {
        f"callbacks.{k}.monitor": v for k, c in by_name.items() if isinstance(v := getattr(c, "monitor", None), str)
    }
    loggers = build_loggers(cfg.logger)
    # LearningRateMonitor raises without a logger.
    named = [c for c in by_name.values() if loggers or not isinstance(c, LearningRateMonitor)]
    watch = TestAccuracyMonitor(data) if cfg.watch_test else None
    options = cfg.trainer.copy()
    OmegaConf.set_struct(options, False)  # keys for the launch or the method may be absent from the trainer's file
    fit_to_launch(options)
    options.precision = precision_of(options)
    options.log_every_n_steps = log_every(options, data)
    if isinstance(data, ForeignData):
        options.use_distributed_sampler = True  # our loaders divide samples among processes themselves
    layout = _layout(cfg, options.log_every_n_steps, [*callbacks, *named], last.layout, isinstance(data, ForeignData))
    if layout.group:  # the Distiller clips and logs
        named, callbacks = without_rate_monitor(named), without_rate_monitor(callbacks)
        options.gradient_clip_val, options.log_every_n_steps = None, 1
    own: list[Callback] = [EpochLogger(role), *progress_bar(role), *([watch] if watch else [])]
    stop = GracefulStop(
        folder / "checkpoints", cfg.checkpoint_minutes
    )  # last, to save the state that all others have updated
    kept = RunOptions(
        run_options(cfg, best),
        folder,
        last.kept,
        lambda trainer: steps_per_epoch(cfg.trainer, data, read_scale(cfg, trainer, data.batch_size)),
    )
    everything = [kept, *callbacks, *own, *named, stop]
    trainer = instantiate(
        options,
        "trainer",
        strategy=_strategy(options, method),
        default_root_dir=str(folder),
        callbacks=everything,
        logger=loggers or False,
        enable_progress_bar=any(isinstance(c, ProgressBar) for c in everything),
        plugins=plugins(),
    )
    return Built(trainer, best, layout, watch, kept, monitors)


def plugins() -> list[Any]:
    """Returns Lightning's plugins of every run: whole checkpoints, and under SLURM no requeueing of its own."""
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        return [AtomicCheckpointIO(), SLURMEnvironment(auto_requeue=False)]  # `GracefulStop` handles that signal
    return [AtomicCheckpointIO()]


def refuse(cfg: DictConfig, method: Method, foreign: bool = False) -> None:
    """Raises `UserError` for trainer options that would lose a training; `foreign`: the data module has no sample ids."""
    trainer = cfg.trainer
    if (precision := str(trainer.get("precision"))) in ("bf16-true", "16-true", "64-true", "64"):
        raise UserError(
            f"trainer.precision={precision}: weights and images are float32 here. Use 32-true, bf16-mixed or 16-mixed."
        )
    strategy = str(trainer.get("strategy"))
    if any(word in strategy for word in SPAWNED):
        raise UserError(
            f"trainer.strategy={strategy} trains in processes that take their results with them when they end: choose "
            "trainer=ddp, which starts processes that stay."
        )
    if trainer.get("fast_dev_run"):
        raise UserError(
            "trainer.fast_dev_run would leave a run without a checkpoint. trainer=debug is the same with one: a step of "
            "training and of validation."
        )
    if trainer.get("overfit_batches") and not foreign:
        raise UserError(
            "trainer.overfit_batches fixes the samples of torch's DataLoaders alone, and these loaders would draw others each "
            "epoch. To see a few samples learned by heart, set data.per_class=1 or a small data.epoch_size."
        )
    epochs, rehearsed = trainer.get("max_epochs") or 0, trainer.get("limit_train_batches") is not None
    if 0 < epochs <= method.init_epochs and not rehearsed:
        raise UserError(
            f"trainer.max_epochs={epochs} would end within the first phase of this method, which leaves the student untrained "
            f"for method.init_epochs={method.init_epochs} epochs. Set trainer.max_epochs above that, or method.init_epochs "
            "lower."
        )
    every = trainer.get("check_val_every_n_epoch") or 1
    if (0 < epochs < every) or trainer.get("limit_val_batches") == 0:
        raise UserError(
            f"No epoch would be validated, so that none is the best: trainer.check_val_every_n_epoch={every} with "
            f"trainer.max_epochs={epochs}, limit_val_batches={trainer.get('limit_val_batches')}. Let at least one be."
        )


def named_callbacks(cfg: DictConfig, task: Task) -> tuple[ModelCheckpoint, dict[str, Callback]]:
    """Returns the callback `best`, which selects the epoch, and all callbacks of the config by name, `best` first.

    A monitor or mode of null is the task's. Raises `UserError` for a mode that contradicts a known metric.
    """
    nodes = _given(cfg.callbacks)
    for name in ("best", "last"):
        if name not in nodes:
            raise UserError(f"callbacks.{name} is missing: a run ends with the weights that it keeps. Leave it in.")
    monitor, mode = monitored(nodes["best"], task)
    best = instantiate(nodes.pop("best"), "callbacks.best", monitor=monitor, mode=mode)
    others = {n: instantiate(node, f"callbacks.{n}", **mode_of(n, node, task)) for n, node in nodes.items()}
    for name, callback in (("best", best), ("last", others["last"])):
        _check_kept(name, callback, Path(cfg.folder) / "checkpoints")
    return best, {"best": best, **others}


def _given(nodes: DictConfig | None) -> dict[str, DictConfig]:
    """Returns the nodes of a group by their names, without those that null has dropped."""
    return {str(name): node for name, node in (nodes or {}).items() if node is not None}


def _check_kept(name: str, callback: Callback, folder: Path) -> None:
    """Raises `UserError` if the callback does not write exactly the checkpoint `<name>.ckpt`, which the run's end reads."""
    if not isinstance(callback, ModelCheckpoint):
        raise UserError(f"callbacks.{name} must be a ModelCheckpoint: a run ends with the weights that it keeps.")
    place = Path(callback.dirpath or "")
    if place.resolve() != folder.resolve() or callback.filename != name or callback.save_top_k != 1:
        raise UserError(
            f"callbacks.{name} must keep one checkpoint, {folder / name}.ckpt, with which the run ends: leave its dirpath, "
            "filename and save_top_k as they are. A callback of another name may keep more."
        )


def log_every(options: DictConfig, data: Any) -> int:
    """Returns the steps between two logs: the option, or for null an interval that fits the epoch."""
    every = options.get("log_every_n_steps")
    if isinstance(data, ForeignData) and every and (most := data.batches_of_epoch()):
        return int(min(every, most))  # each epoch is in the curves
    if every is not None:
        return int(every)
    devices, nodes = options.get("devices", 1), options.get("num_nodes") or 1
    count = devices if type(devices) is int and devices > 0 else torch.cuda.device_count()
    accumulated = options.get("accumulate_grad_batches") or 1
    scale = Scale(data.batch_size, max(1, count) * nodes, accumulated, None, "linear", None)
    return log_interval(*horizon(options, data, scale))


def _layout(
    cfg: DictConfig, log_every: int, callbacks: Sequence[Callback], kept: Layout | None, foreign: bool
) -> Layout:
    """Returns the layout of groups; without groups if an option or callback needs each minibatch, which is then logged."""
    wanted = cfg.get("group", "auto")
    if wanted != "auto" and (type(wanted) is not int or wanted < 1):
        raise UserError(f"group={wanted} is a number of minibatches, at least 1, or auto.")
    if foreign or wanted == 1 or (kept is not None and not kept.group):
        if kept is not None and kept.group:
            raise UserError("This run was trained in groups of minibatches, and goes on so: leave group at auto.")
        return Layout(0, log_every)
    reason = reason_for_single(cfg.trainer, callbacks)
    if reason is not None and kept is not None:
        raise UserError(
            f"This run was trained in groups of minibatches, and {reason} needs to see every one: start a new run, or leave "
            "that out."
        )
    if reason is not None:
        log.info("Each step of the Trainer is one minibatch: %s needs to see every one.", reason)
        return Layout(0, log_every)
    return kept or Layout(GROUP if wanted == "auto" else int(wanted), log_every)


def _strategy(options: DictConfig, method: Method) -> Any:
    """Returns the strategy. DDP does not broadcast buffers, since each rank's memory bank holds its own samples.

    A method of two phases does not use all parameters in each, which requires `find_unused_parameters`.
    """
    strategy, unused = options.get("strategy") or "auto", method.init_epochs > 0
    if strategy in ("ddp", "ddp_find_unused_parameters_true"):
        return DDPStrategy(find_unused_parameters=unused or strategy != "ddp", broadcast_buffers=False)
    if OmegaConf.is_dict(strategy):
        facts = {"find_unused_parameters": True} if unused else {}
        return instantiate(strategy, "trainer.strategy", **facts)
    return strategy


def progress_bar(role: str = "Student") -> list[ProgressBar]:
    """Returns a progress bar on a terminal, and none elsewhere, where `EpochLogger` suffices.

    None in a worker process either: bars of several runs at a time would write over each other.
    """
    return [EpochBar(role)] if sys.stdout.isatty() and multiprocessing.parent_process() is None else []
