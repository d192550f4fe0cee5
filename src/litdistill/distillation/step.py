"""A training step of several minibatches: Lightning's own cost a step is paid once for all of them.

Lightning sees one step of manual optimization. What it would do between minibatches is done here: clipping, the average
of the weights, random draws, schedulers, and an end at `max_steps`. Everything else that happens between steps, as logs,
validation, checkpoints and a stop, happens between groups. `training/grouping.py` knows where that is right.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from litdistill.types import Batch, Group, Outputs

if TYPE_CHECKING:
    from litdistill.distillation.distiller import Distiller


def train_group(distiller: Distiller, group: Group) -> Tensor:
    """Optimizes on the minibatches of `group` one after the other; returns the loss of the last one."""
    trainer, optimizer = distiller.trainer, distiller.optimizers()
    taught = teacher_ahead(distiller, group)
    loss = torch.zeros(())
    for i, batch in enumerate(group.minibatches()):
        distiller.seed_step(group.first + i)
        loss = distiller.loss(batch, taught[i] if taught else None)
        optimizer.zero_grad()  # type: ignore[union-attr]
        distiller.manual_backward(loss * batch.weight if batch.weight != 1 else loss)
        if distiller.clip.value is not None:
            distiller.clip_gradients(optimizer, distiller.clip.value, distiller.clip.algorithm)  # type: ignore[arg-type]
        optimizer.step()  # type: ignore[union-attr]
        distiller.update_average()
        step_schedulers(distiller, "step")
        if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
            break
    if trainer.is_last_batch:
        step_schedulers(distiller, "epoch")
    return loss.detach()


def teacher_ahead(distiller: Distiller, group: Group) -> Sequence[Outputs] | None:
    """The teacher's outputs for each minibatch of a group, run at once: it is frozen, and large batches are what is fast.

    None where that gains nothing: without a teacher, for features that nobody keeps, which are too much to hold, and on a
    CPU, which is as fast on small batches.
    """
    if not distiller.needs_teacher_outputs:
        return None
    assert distiller.teacher is not None
    if distiller.cache is None and (distiller.teacher.taps or distiller.device.type == "cpu"):
        return None
    return distiller.teacher_outputs(group.batch).split(group.sizes)


def step_schedulers(distiller: Distiller, interval: str) -> None:
    """Steps the schedulers of that interval but for those that wait for a metric (`schedules.step_plateau`)."""
    for config in distiller.trainer.lr_scheduler_configs:
        if config.interval == interval and not isinstance(config.scheduler, ReduceLROnPlateau):
            config.scheduler.step()


def seed_step(seed: int, epoch: int, index: int, rank: int, device: torch.device) -> None:
    """Makes what a step draws (dropout, a method's negatives) depend on seed, epoch, minibatch and process alone: so a run
    that goes on in the middle of an epoch needs no generator's state, and no two processes draw the same."""
    place = f"{seed} {epoch} {index} {rank}"
    number = int.from_bytes(hashlib.sha256(place.encode()).digest()[:8])
    torch.default_generator.manual_seed(number)  # `torch.manual_seed` asks every kind of device, which takes longer
    if device.type == "cuda":
        torch.cuda.manual_seed(number)


def timed_outputs(distiller: Distiller, batch: Batch) -> tuple[Outputs, float]:
    """The teacher's outputs for a batch, from the cache where there is one, and the seconds that they took."""
    assert distiller.teacher is not None
    start = time.perf_counter()
    if distiller.cache is not None and batch.ids is not None:
        outputs = distiller.cache.outputs(batch)
    else:
        outputs = distiller.teacher(batch)._replace(ids=batch.ids)
    return outputs, time.perf_counter() - start
