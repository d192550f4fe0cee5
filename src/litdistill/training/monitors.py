"""The metrics that callbacks monitor: which direction is better, and whether they are measured at all."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from litdistill.config.distiller import example_batch
from litdistill.config.instantiate import locate
from litdistill.data.foreign import ForeignData
from litdistill.distillation.distiller import Distiller
from litdistill.evaluation.predictions import agreement
from litdistill.tasks.base import Task
from litdistill.utils.errors import UserError
from litdistill.utils.modes import eval_mode
from litdistill.utils.units import MAPS

LOWER_IS_BETTER = ("nll", "brier", "ece", "kl", "loss", "rmse", "mae", "mse", "error", "deviation")
HIGHER_IS_BETTER = ("accuracy", "agreement", "teacher_accuracy", *MAPS, "f1", "r2", "spearman", "cosine")


def direction(monitor: str, task: Task) -> str | None:
    """Returns "max" or "min" for a logged metric of this project, None for an unknown one. Terms of the loss are "min"."""
    split, _, name = monitor.rpartition("/")
    if monitor == f"val/{task.monitor[0]}":
        return task.monitor[1]
    if name in HIGHER_IS_BETTER:
        return "max"
    return "min" if name in LOWER_IS_BETTER or split == "train" else None


def monitored(node: DictConfig, task: Task) -> tuple[str, str]:
    """Returns the logged name of the metric that selects the epoch, and its mode, "max" or "min"."""
    monitor = node.get("monitor") or f"val/{task.monitor[0]}"
    known = direction(monitor, task)
    mode = _mode("best", monitor, node.get("mode"), known)
    if mode is None:
        raise UserError(f"callbacks.best.monitor={monitor}: say with callbacks.best.mode=max or min which is better.")
    return monitor, mode


def mode_of(name: str, node: DictConfig, task: Task) -> dict[str, str]:
    """Returns the argument `mode` for another callback that monitors a known metric, which its default may contradict."""
    monitor = node.get("monitor")
    if monitor is None or "mode" not in inspect.signature(locate(str(node["_target_"]))).parameters:
        return {}
    mode = _mode(name, str(monitor), node.get("mode"), direction(str(monitor), task))
    return {} if mode is None else {"mode": mode}


def _mode(name: str, monitor: str, mode: str | None, known: str | None) -> str | None:
    if mode is not None and known is not None and mode != known:
        raise UserError(
            f"callbacks.{name}.monitor={monitor} with mode={mode} would keep the worst epoch: its mode is {known}. Leave "
            f"callbacks.{name}.mode at null, which follows the metric."
        )
    return mode or known


@torch.no_grad()
def check_monitors(net: nn.Module, data: Any, task: Task, monitors: Mapping[str, str], has_teacher: bool) -> None:
    """Raises `UserError` if a monitor is a validation metric that the task does not compute.

    `monitors`: the metric's name by the key of the config, `callbacks.best.monitor`. `has_teacher`: whether there is a
    teacher, which adds the metrics of agreement. The names of metrics are read from an evaluation of two samples; if that
    evaluation fails, the check is skipped.
    """
    if not any(monitor.startswith("val/") for monitor in monitors.values()):
        return
    batch = task.batch(data.example) if isinstance(data, ForeignData) else example_batch(data)
    try:
        with eval_mode(net):
            outputs = task.forward(net, batch, False)
        metrics = task.metrics()
        metrics.update(outputs, task.truth(batch.targets, outputs))
        names = {str(key) for key in metrics.compute()}
        if has_teacher:
            kept = task.keep(outputs)
            names |= {*agreement(task, kept, kept, batch.targets), f"teacher_{task.monitor[0]}"}
    except Exception:  # a user's task may raise any type for two samples
        return
    _refuse_others("val", names, monitors)


def check_train_monitors(distiller: Distiller, example: Any, monitors: Mapping[str, str]) -> None:
    """Raises `UserError` if a monitor begins with `train/` and is no loss or score of training.

    Their names are read from one step of a copy; where that fails, for a reason of its own, the check is skipped.
    """
    if not any(monitor.startswith("train/") for monitor in monitors.values()):
        return
    try:
        with torch.random.fork_rng():
            probe = copy.deepcopy(distiller)
            probe.balance = None  # measures with a Trainer, and changes no name
            probe.on_train_epoch_start()
            probe.loss(probe.task.batch(example))
            names = set(probe.means.means())
    except Exception:  # a user's method may raise any type for two samples
        return
    _refuse_others("train", names, monitors)


def _refuse_others(split: str, names: set[str], monitors: Mapping[str, str]) -> None:
    for key, monitor in monitors.items():
        of, _, name = monitor.partition("/")
        if of == split and name not in names:
            raise UserError(
                f"{key}={monitor} is not measured here. There is {', '.join(f'{split}/{n}' for n in sorted(names))}."
            )
