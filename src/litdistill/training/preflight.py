"""Checks before training of everything that could fail after it, so that no finished training is lost."""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from litdistill.config.backbones import student_outputs
from litdistill.config.build import build_net
from litdistill.config.lr_scaling import Scale
from litdistill.data.foreign import ForeignData, sample_count
from litdistill.data.loading import trained_samples
from litdistill.distillation.distiller import OptimizerFactory
from litdistill.tasks.base import Task
from litdistill.training.last_batch import refuse_single, require_two_samples
from litdistill.training.monitors import check_monitors
from litdistill.utils.errors import UserError
from litdistill.utils.manifest import check_names
from litdistill.utils.units import quantity

log = logging.getLogger(__name__)


def check_values(cfg: DictConfig) -> None:
    """Raises `UserError` for values of a config that `summary.json` cannot hold."""
    for name in map(str, cfg):
        try:
            json.dumps(OmegaConf.to_container(cfg[name], resolve=True) if OmegaConf.is_config(cfg[name]) else cfg[name])
        except TypeError as error:
            raise UserError(f"{name}: {error}. A config holds numbers, texts, lists and mappings of them.") from error


def check_data(cfg: DictConfig, data: Any, task: Task) -> None:
    """Raises `UserError` for data with which a run could not end: a class name that no export may hold, no test set, or a last
    minibatch that its student cannot be trained on. Must be called before anything counts the steps of an epoch."""
    check_names(data.class_names)
    if sample_count(data, "test") == 0:
        raise UserError(f"{data.name} has no test samples, on which a run is measured at its end: hold some out.")
    check_last_batch(cfg, data, task)


def check_student(
    cfg: DictConfig, data: Any, task: Task, optimizer: OptimizerFactory, monitors: Mapping[str, str]
) -> None:
    """Builds a student and its optimizer once, to raise their errors before training, and calls `check_monitors`."""
    net = trial_student(cfg, data)
    optimizer(net.parameters())
    check_monitors(net, data, task, monitors, cfg.teacher is not None)


def trial_student(cfg: DictConfig, data: Any) -> nn.Module:
    """Returns a student of the config to try something with, and not the weights that it starts from."""
    node = {k: v for k, v in cfg.student.items() if k != "checkpoint"}
    return build_net(OmegaConf.create(node), data, "student", say=False, outputs=student_outputs(cfg, data, None))


def check_last_batch(cfg: DictConfig, data: Any, task: Task) -> None:
    """Has a last minibatch of one sample left out, or refuses it, where the student cannot be trained on it."""
    build = functools.partial(trial_student, cfg, data)
    if isinstance(data, ForeignData):
        refuse_single(build, data.module.train_dataloader(), data.example, task)
    else:
        several = (cfg.trainer.get("num_nodes") or 1) > 1 or cfg.trainer.get("devices") not in (None, 1, "1")
        require_two_samples(build, data, task, several)


def with_min_steps(cfg: DictConfig, data: Any) -> DictConfig:
    """Returns `cfg`, or a copy with more epochs where the run would have fewer optimizer steps than `min_steps`; says so.

    Steps are counted as one process takes them, so that a run has as many epochs on any number of devices. A run that
    trainer.max_steps or trainer.limit_train_batches cuts short keeps its epochs, and so do data of unknown length.
    Raises `UserError` for a `min_steps` that is no number of steps.
    """
    least, trainer = cfg.get("min_steps"), cfg.trainer
    if least is None:
        return cfg
    if type(least) is not int or least < 1:
        raise UserError(f"min_steps={least} must be a number of optimizer steps, or null for none.")
    count = data.count("train") if isinstance(data, ForeignData) else data.epoch_size or len(data.train_ids)
    cut = (trainer.get("max_steps") or -1) > 0 or trainer.get("limit_train_batches") is not None
    if cut or count is None or (trainer.get("max_epochs") or 0) < 1:
        return cfg
    per_epoch = math.ceil(math.ceil(count / data.batch_size) / (trainer.get("accumulate_grad_batches") or 1))
    epochs = math.ceil(least / per_epoch)
    if epochs <= trainer.max_epochs:
        return cfg
    log.info(
        "%d epochs instead of trainer.max_epochs=%d: an epoch of %s has %s, and min_steps=%d.",
        *(epochs, trainer.max_epochs, quantity(count, "sample"), quantity(per_epoch, "step"), least),
    )
    longer = cfg.copy()
    OmegaConf.update(longer, "trainer.max_epochs", epochs)
    return longer


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
        whole = scale.batch // scale.accumulated  # of all processes
        count = data.epoch_size or len(data.train_ids)
        count = trained_samples(count, data.batch_size, whole // data.batch_size, getattr(data, "smallest_batch", 1))
        batches = math.ceil(count / whole)
    if isinstance(limit, float) and int(batches * limit) < 1:
        raise UserError(
            f"trainer.limit_train_batches={limit} of {batches} batches is none: give {1 / batches:.2g} or more, or a number of "
            "batches, 1."
        )
    if limit is not None:
        batches = min(batches, limit if isinstance(limit, int) else int(batches * limit))
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
