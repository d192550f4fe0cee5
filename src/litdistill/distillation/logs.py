"""Logging while training: the means since the last log, the speed, and with groups the learning rate.

A single step is logged by `LightningModule.log`. The values of a group are passed to the loggers directly: Lightning would
use the number of groups as x axis, and log the last values again at each group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from litdistill.distillation.checks import check_finite

if TYPE_CHECKING:
    from litdistill.distillation.distiller import Distiller


def log_step(distiller: Distiller) -> None:
    """Logs the means after a single step."""
    means = _means(distiller)
    for name, value in means.items():
        distiller.log(name, value, prog_bar=name == "train/loss", sync_dist=True)
    for name, number in (_speed(distiller) | _factors(distiller)).items():
        distiller.log(name, number)
    distiller.means.reset()


def log_group(distiller: Distiller) -> None:
    """Logs the means after a group, with the optimizer's step count as x axis."""
    means, trainer = _means(distiller), distiller.trainer
    if trainer.world_size > 1 and means:
        reduced = trainer.strategy.reduce(torch.stack([v.float() for v in means.values()]), reduce_op="mean")
        means = dict(zip(means, reduced, strict=True))
    for name, value in means.items():  # the loss for the progress bar, all for callbacks at the end of an epoch
        if name == "train/loss" or trainer.is_last_batch:
            distiller.log(name, value, prog_bar=name == "train/loss", logger=False)
    values = _numbers(means) | _speed(distiller) | _factors(distiller)
    values |= _rates(distiller)
    for logger in distiller.loggers:
        logger.log_metrics(values | {"epoch": float(distiller.current_epoch)}, trainer.global_step)
    distiller.means.reset()


def _means(distiller: Distiller) -> dict[str, Tensor]:
    means = distiller.means.means()
    check_finite(distiller, _numbers(means))
    return {f"train/{name}": value for name, value in means.items()}


def _numbers(means: dict[str, Tensor]) -> dict[str, float]:
    """Returns the values of scalars, in one read from the device."""
    if not means:
        return {}
    return dict(zip(means, torch.stack([value.float() for value in means.values()]).tolist(), strict=True))


def _speed(distiller: Distiller) -> dict[str, float]:
    means = distiller.means
    seconds = max(means.elapsed, 1e-9)
    samples = means.samples * distiller.trainer.world_size
    return {"speed/samples_per_s": samples / seconds, "speed/teacher_share": means.teacher_s / seconds}


def _factors(distiller: Distiller) -> dict[str, float]:
    """Returns by what `balance` multiplies terms of the loss."""
    balance = distiller.balance
    return {} if balance is None else {f"balance/{name}": float(factor) for name, factor in balance.factors.items()}


def _rates(distiller: Distiller) -> dict[str, float]:
    """Returns the learning rates under the names of Lightning's LearningRateMonitor, whose x axis would count groups."""
    return {f"lr-{type(o).__name__}": float(o.param_groups[0]["lr"]) for o in distiller.trainer.optimizers}
