"""Checks before training of everything that could fail after it, so that no finished training is lost."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from litdistill.config.build import build_net
from litdistill.config.distiller import example_batch
from litdistill.config.lr_scaling import Scale
from litdistill.data.foreign import ForeignData
from litdistill.distillation.distiller import OptimizerFactory
from litdistill.tasks.base import Task
from litdistill.utils.errors import UserError


def check_values(cfg: DictConfig) -> None:
    """Raises `UserError` for values of a config that `summary.json` cannot hold."""
    for name in map(str, cfg):
        try:
            json.dumps(OmegaConf.to_container(cfg[name], resolve=True) if OmegaConf.is_config(cfg[name]) else cfg[name])
        except TypeError as error:
            raise UserError(f"{name}: {error}. A config holds numbers, texts, lists and mappings of them.") from error


def check_student(cfg: DictConfig, data: Any, task: Task, optimizer: OptimizerFactory, monitor: str) -> None:
    """Builds a student and its optimizer once, to raise their errors before training, and calls `check_monitor`."""
    node = {k: v for k, v in cfg.student.items() if k != "checkpoint"}
    net = build_net(OmegaConf.create(node), data, "student", say=False)
    optimizer(net.parameters())
    check_monitor(net, data, task, monitor, cfg.teacher is not None)


@torch.no_grad()
def check_monitor(net: nn.Module, data: Any, task: Task, monitor: str, has_teacher: bool) -> None:
    """Raises `UserError` if `monitor` is a validation metric that the task does not compute.

    `has_teacher`: whether there is a teacher, which adds the metrics of agreement. The names of metrics are read from an
    evaluation of two samples; if that evaluation fails, the check is skipped.
    """
    split, _, name = monitor.partition("/")
    if split != "val":
        return  # logged by a callback or in training
    batch = task.batch(data.example) if isinstance(data, ForeignData) else example_batch(data)
    modes = [(module, module.training) for module in net.modules()]
    try:
        outputs = task.forward(net.eval(), batch, False)
        metrics = task.metrics()
        metrics.update(outputs, batch.targets)
        names = {str(key) for key in metrics.compute()}
        names |= {*task.agreement(outputs, outputs), f"teacher_{task.monitor[0]}"} if has_teacher else set()
    except Exception:  # a user's task may raise any type for two samples
        return
    finally:
        for module, training in modes:
            module.training = training
    if name not in names:
        raise UserError(
            f"callbacks.best.monitor={monitor} is not measured here. There is {', '.join(f'val/{n}' for n in sorted(names))}."
        )


def horizon(trainer: DictConfig, data: Any, scale: Scale) -> tuple[int, int]:
    """Returns the number of epochs of a run, and of its optimizer steps, under the config's trainer.

    Raises `UserError` for a loader without length and without a limit, and for a run that ends before its first validation.
    """
    per_epoch, most = steps_per_epoch(trainer, data, scale), trainer.get("max_steps") or -1
    validated = per_epoch * (trainer.get("check_val_every_n_epoch") or 1)
    if 0 < most < validated and trainer.get("val_check_interval") in (None, 1.0):
        raise UserError(
            f"trainer.max_steps={most} would end the run before its first validation, after {validated} steps, so that no "
            "epoch is the best. Set it to that at least."
        )
    epochs = trainer.get("max_epochs")
    if epochs is None or epochs < 0:
        epochs = math.ceil(most / per_epoch) if most > 0 else 1
    steps = epochs * per_epoch
    return max(1, epochs), max(1, min(steps, most) if most > 0 else steps)


def steps_per_epoch(trainer: DictConfig, data: Any, scale: Scale) -> int:
    """Returns the number of optimizer steps in an epoch. Raises `UserError` for a loader without length and without a limit."""
    limit = trainer.get("limit_train_batches")
    if isinstance(data, ForeignData):
        batches = _batches(data, limit)
    else:
        batches = math.ceil((data.epoch_size or len(data.train_ids)) / (scale.batch // scale.accumulated))
    if limit is not None:
        batches = min(batches, limit if isinstance(limit, int) else max(1, int(batches * limit)))
    return math.ceil(batches / scale.accumulated)


def _batches(data: ForeignData, limit: int | float | None) -> int:
    """Returns the number of training batches in an epoch; `limit` for a loader without length."""
    batches = data.batches_of_epoch()
    if batches is not None:
        return batches
    if isinstance(limit, int):
        return limit
    raise UserError(
        "The training loader has no length: say with trainer.limit_train_batches how many batches make an epoch."
    )
