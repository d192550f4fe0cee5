"""A training step of several minibatches, which pays Lightning's overhead per step once for all of them.

To Lightning it is one step of manual optimization. This module does what Lightning would do between minibatches: clipping,
the average of the weights, seeding, schedulers, and the stop at `max_steps`. Logs, validation, checkpoints and a graceful
stop happen between groups. `training/grouping.py` decides where groups are equivalent.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from litdistill.distillation.adversarial import attacked_batch
from litdistill.distillation.balance import Rule, Together
from litdistill.distillation.running_means import Seen
from litdistill.methods.base import Method
from litdistill.types import ADVERSARIAL, Batch, Group, Outputs
from litdistill.utils.errors import UserError

if TYPE_CHECKING:
    from litdistill.distillation.distiller import Distiller

log = logging.getLogger(__name__)

BY_MINIBATCH = ("cpu",)  # types of device on which large batches are no faster


def train_group(distiller: Distiller, group: Group) -> Tensor:
    """Optimizes on the minibatches of `group` one after the other; returns the loss of the last one."""
    trainer, captured = distiller.trainer, distiller.captured
    teacher = teacher_ahead(distiller, group) if captured is None else captured.begin(group)
    loss, minibatches = torch.zeros(()), None
    for i in range(len(group.sizes)):
        taken = None if captured is None else captured.train(i)
        if taken is None or distiller.data is None:
            minibatches = minibatches or list(group.minibatches())
            distiller.statistics.remember(distiller, minibatches[i])
        if taken is None:
            assert minibatches is not None
            distiller.seed_step(group.first + i)
            taken = optimize(distiller, minibatches[i], teacher[i] if teacher else None)
        loss = taken
        step_schedulers(distiller, "step")
        if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
            break
    if captured is not None:
        captured.end()
    if trainer.is_last_batch:
        step_schedulers(distiller, "epoch")
    return loss.detach()


def optimize(distiller: Distiller, batch: Batch, teacher: Outputs | None) -> Tensor:
    """Takes the optimizer's step of one minibatch of a group; returns its loss. `teacher`: its outputs, if already computed."""
    optimizer = distiller.optimizers()
    loss = distiller.loss(batch, teacher)
    optimizer.zero_grad()  # type: ignore[union-attr]
    distiller.manual_backward(loss * batch.weight if batch.weight != 1 else loss)
    clip(optimizer.optimizer, *distiller.clip)  # type: ignore[union-attr]
    optimizer.step()  # type: ignore[union-attr]
    distiller.update_average()
    return loss


def clip(optimizer: Optimizer, value: float | None, algorithm: str | None) -> None:
    """Clips the gradients of an optimizer's parameters: by their common "norm" (the default), or each by "value".

    Lightning's own clipping refuses fused optimizers in mixed precision, also in bfloat16, which scales no loss.
    """
    if not value:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if algorithm == "value":
        torch.nn.utils.clip_grad_value_(parameters, value)
    else:
        torch.nn.utils.clip_grad_norm_(parameters, value)


def teacher_ahead(distiller: Distiller, group: Group) -> Sequence[Outputs] | None:
    """Returns the teacher's outputs for each minibatch of a group, from one forward: large batches are faster on a GPU.

    Returns None without a teacher; for uncached features, which take too much memory for a whole group; and without a cache
    on a CPU, where large batches are no faster.
    """
    shared = group.once
    if not distiller.needs_teacher_outputs:
        return None
    assert distiller.teacher is not None
    by_minibatch = shared is not None and distiller.cache is None and distiller.device.type in BY_MINIBATCH
    if not runs_ahead(distiller) and (distiller.teacher.taps or not by_minibatch):
        return None

    def ahead() -> Sequence[Outputs]:
        if by_minibatch:  # of several trainings on this group, each to be equal to one alone
            return [distiller.teacher_outputs(batch) for batch in group.minibatches()]
        return distiller.teacher_outputs(group.batch).split(group.sizes)

    if shared is None:
        return ahead()
    outputs: Sequence[Outputs] = shared((distiller.teacher.key, distiller.trainer.precision), ahead)
    return outputs


def runs_ahead(distiller: Distiller) -> bool:
    """Returns whether the teacher's outputs for a whole group are computed before its steps: see `teacher_ahead`."""
    if not distiller.needs_teacher_outputs:
        return False
    assert distiller.teacher is not None
    return distiller.cache is not None or not (distiller.teacher.taps or distiller.device.type in BY_MINIBATCH)


def loss_of(distiller: Distiller, batch: Batch, teacher: Outputs | None) -> tuple[Tensor, Seen]:
    """Returns the loss of one minibatch, a scalar, and what is measured of it; `teacher`: its outputs, if already computed."""
    method, samples = distiller.method, len(batch.targets)
    student, teacher, batch = outputs_of_both(distiller, batch, teacher)
    labels = label_terms(distiller, student, method.relabel(teacher, batch))
    terms = weighed(distiller, student, labels, method(student, teacher, batch))
    return total(method, terms), Seen(terms, student, teacher, batch.targets, samples, method.watched())


def outputs_of_both(
    distiller: Distiller, batch: Batch, teacher: Outputs | None
) -> tuple[Outputs, Outputs | None, Batch]:
    """Returns the outputs of student and teacher for a batch, and the batch, all at the places that the task predicts.

    `teacher`: its outputs, if already computed. In adversarial training the student's are those at the inputs that the attack
    has found; for a method that reads both (`Method.reads_adversarial`) those at the batch's own, and a head `adversarial`.
    """
    if teacher is None and distiller.needs_teacher_outputs:
        teacher = distiller.teacher_outputs(batch)
    # A compiled backward cannot keep its graph, which measuring needs.
    with torch.compiler.set_stance("force_eager") if measures(distiller) else contextlib.nullcontext():
        attacked = batch if distiller.adversarial is None else attacked_batch(distiller, batch, teacher)
        seen = batch if distiller.method.reads_adversarial else attacked
        student = distiller.extractor.run(lambda net: distiller.task.forward(net, seen, True))._replace(ids=batch.ids)
        if distiller.method.reads_adversarial:
            found = distiller.task.forward(distiller.student, attacked, True)
            student = student._replace(heads={**student.heads, ADVERSARIAL: found.logits})
    places = distiller.task.places(batch.targets)
    if places is None:
        return student, teacher, batch
    return student.at(places), None if teacher is None else teacher.at(places), batch.at(places)


def label_terms(distiller: Distiller, student: Outputs, batch: Batch) -> dict[str, Tensor]:
    """Returns the terms of the labels' loss, summed over student and companions and weighted by the method's `hard`."""
    method = distiller.method
    weight = method.hard * method.hard_factor(distiller.current_epoch)
    if not weight or (distiller.labels == "none" and not method.relabels):
        return {}
    task = distiller.task
    loss = task.loss if distiller.labels == "all" else task.labelled_loss
    terms = dict(loss(distiller.student, student, batch))
    for companion in method.companions(student):
        for name, value in loss(distiller.student, companion, batch).items():
            terms[name] = terms[name] + value
    return {name: weight * value for name, value in terms.items()}


def measures(distiller: Distiller) -> bool:
    """Returns whether `balance` measures this minibatch: one of a training's first, once the labels' loss counts."""
    balance = distiller.balance
    return balance is not None and not balance.finished and _balanced(distiller)


def _balanced(distiller: Distiller) -> bool:
    """Returns whether this is a minibatch of a training in which the labels' loss counts."""
    if distiller.current_epoch < distiller.method.init_epochs:
        return False
    try:
        return bool(distiller.trainer.training)
    except RuntimeError:  # a loss that somebody asks for without a trainer
        return False


def weighed(
    distiller: Distiller, student: Outputs, labels: dict[str, Tensor], terms: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Returns the terms of the loss, those of the labels first, each scaled by its balance and by the schedule.

    Raises `UserError` where the schedule names a term that is not among them.
    """
    every, schedule = labels | terms, distiller.schedule_factors
    unknown = schedule.keys() - every.keys()
    if unknown and not distiller.method.init_epochs:
        raise UserError(f"schedule names {', '.join(unknown)}, but the terms of this method are {', '.join(every)}.")
    factors: dict[str, float | Tensor] = dict(schedule)
    if (balance := distiller.balance) is not None:
        if measures(distiller):
            _measure(distiller, balance, student, labels, terms)
        elif _balanced(distiller):
            balance.follow(labels, terms, _together(distiller))
        found = dict(balance.factors)
        factors = found | {k: v * found.get(k, 1.0) for k, v in schedule.items()}
    return {k: v * factors[k] if k in factors else v for k, v in every.items()}


def _together(distiller: Distiller) -> Together | None:
    """Returns what adds up a vector over all processes; None where there is one."""
    strategy = distiller.trainer.strategy
    return (lambda sums: strategy.reduce(sums, reduce_op="sum")) if distiller.trainer.world_size > 1 else None


def _measure(
    distiller: Distiller, balance: Rule, student: Outputs, labels: dict[str, Tensor], terms: dict[str, Tensor]
) -> None:
    """Measures one minibatch, on all processes together; logs the factors once that is finished."""
    scaler = getattr(distiller.trainer.precision_plugin, "scaler", None)
    balance.measure(
        labels,
        terms,
        list(student.heads.values()),
        [p for p in distiller.student.parameters() if p.requires_grad],
        _together(distiller),
        scale=1.0 if scaler is None else scaler.get_scale(),
        own=(own := distiller.method.own_weights()),
    )
    if balance.finished and balance.ratios:
        log.info("%s", balance)
    elif balance.finished and not own & terms.keys():
        log.info("balance leaves all weights as they are: no hint stands beside another loss.")


def total(method: Method, terms: Mapping[str, Tensor]) -> Tensor:
    """Returns the sum of the terms of the loss. Raises `UserError` where there is none: all have the weight 0."""
    if not terms:
        raise UserError(
            f"{type(method).__name__} has no term with a weight above 0: nothing is learned. Give one a weight."
        )
    return torch.stack(list(terms.values())).sum()


def step_schedulers(distiller: Distiller, interval: str) -> None:
    """Steps the schedulers of `interval`, except ReduceLROnPlateau (see `schedules.step_plateau`)."""
    for config in distiller.trainer.lr_scheduler_configs:
        if config.interval == interval and not isinstance(config.scheduler, ReduceLROnPlateau):
            config.scheduler.step()


def seed_step(seed: int, epoch: int, index: int, rank: int, device: torch.device) -> None:
    """Seeds the generators (for dropout, a method's negatives) by seed, epoch, minibatch and rank. A run resumed within an
    epoch needs no generator state, and no two ranks draw the same numbers."""
    place = f"{seed} {epoch} {index} {rank}"
    number = int.from_bytes(hashlib.sha256(place.encode()).digest()[:8])
    torch.default_generator.manual_seed(
        number
    )  # `torch.manual_seed` also seeds all other device types, which is slower
    if device.type == "cuda":
        torch.cuda.manual_seed(number)


def timed_outputs(distiller: Distiller, batch: Batch) -> tuple[Outputs, float]:
    """Returns the teacher's outputs for a batch, from the cache if there is one, and the seconds that this took."""
    assert distiller.teacher is not None
    start = time.perf_counter()
    if distiller.cache is not None and batch.ids is not None:
        outputs = distiller.cache.outputs(batch)
    else:
        outputs = distiller.teacher(batch)._replace(ids=batch.ids)
    return outputs, time.perf_counter() - start
