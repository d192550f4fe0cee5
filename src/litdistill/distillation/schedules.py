"""Schedules of the learning rate and of the weights of loss terms, and the moving average of the student's weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from litdistill.utils.errors import UserError

if TYPE_CHECKING:
    from litdistill.distillation.distiller import Distiller


def warmup_cosine(optimizer: Optimizer, total: int, warmup: float = 0.05) -> LambdaLR:
    """Returns a scheduler with linear warm-up over the share `warmup` of `total` steps, then cosine decay to zero.

    Loshchilov & Hutter 2017 (arXiv 1608.03983, equation 5) without restarts; warm-up as in Goyal et al. 2017
    (arXiv 1706.02677, section 2.2). Raises `UserError` for `warmup` outside [0, 1) or `total` below 1.
    """
    if not 0 <= warmup < 1 or total < 1:
        raise UserError(f"warmup={warmup} is a share of total={total} steps: at least 0 and below 1; 0.05 is common.")
    rising = int(warmup * total)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1, total - rising))))

    return LambdaLR(optimizer, factor)


def optimizer_of(distiller: Distiller) -> Optimizer:
    """Returns a new optimizer of the student and the method's own layers.

    Where these have a rate of their own (`method_lr`), they are a second group of parameters. Raises `UserError` for a rate
    that is not above 0, or not finite, and where there is no parameter to train.
    """
    student, own = ([p for p in part.parameters() if p.requires_grad] for part in (distiller.student, distiller.method))
    factor = distiller.method_lr
    if factor is not None and not 0 < factor < math.inf:
        raise UserError(
            f"method_lr={factor} must be above 0: the rate of the method's own layers, times the student's."
        )
    if not student and not own:
        raise UserError(
            "The student has no parameter that asks for a gradient, so that nothing can be trained: "
            "student.requires_grad_(True)."
        )
    apart = factor not in (None, 1) and bool(own)
    optimizer = distiller.optimizer([{"params": student}, {"params": own}] if apart else [*student, *own])
    for group in optimizer.param_groups if distiller.lr is not None else ():
        group["lr"] = distiller.lr
    if apart:
        optimizer.param_groups[1]["lr"] *= factor
    return optimizer


def scheduler_of(distiller: Distiller, optimizer: Optimizer) -> LRScheduler:
    """Returns the scheduler of an optimizer; a OneCycleLR has the peak of the method's own layers in proportion too.

    Raises `UserError` for another one that sets one rate for all parameters, where these are to have another.
    """
    assert distiller.scheduler is not None
    first, *others = [group["lr"] for group in optimizer.param_groups]
    make, options = distiller.scheduler, getattr(distiller.scheduler, "keywords", {})
    peak = options.get("max_lr")
    if others and getattr(make, "func", None) is OneCycleLR and isinstance(peak, (int, float)):
        scheduler: LRScheduler = OneCycleLR(
            optimizer, **options | {"max_lr": [peak, *(peak * other / first for other in others)]}
        )
    else:
        scheduler = make(optimizer)
    now, *after = [group["lr"] for group in optimizer.param_groups]
    if not all(math.isclose(lr * now, other * first) for lr, other in zip(others, after, strict=True)):
        raise UserError(
            f"{type(scheduler).__name__} sets one rate for all parameters, so that method_lr={distiller.method_lr} has no "
            "effect: leave it out, or choose another scheduler (scheduler=warmup_cosine)."
        )
    return scheduler


class MomentumRamp(LRScheduler):
    """The momentum rises linearly from `start` to `end` in the first `ramp` epochs, while the rate falls by `gamma` an epoch.

    As in Hinton et al. 2012 (arXiv 1207.0580). The rate is also multiplied by 1 - momentum, so that what a gradient moves
    in all, through the momentum too, is the optimizer's rate times `gamma` to the power of the epoch. For SGD: of `momentum`
    in the optimizer nothing is left. Raises `UserError` for an optimizer without momentum.
    """

    def __init__(
        self, optimizer: Optimizer, gamma: float = 0.998, start: float = 0.5, end: float = 0.99, ramp: int = 500
    ):
        if any("momentum" not in group for group in optimizer.param_groups):
            raise UserError(
                f"{type(optimizer).__name__} has no momentum to raise: optimizer=sgd goes with this scheduler."
            )
        self.gamma, self.start, self.end, self.ramp = gamma, start, end, ramp
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """torch's hook: sets the momentum, and returns the learning rates of the epoch `last_epoch`."""
        momentum = self.start + (self.end - self.start) * min(1.0, self.last_epoch / max(1, self.ramp))
        for group in self.optimizer.param_groups:
            group["momentum"] = momentum
        return [rate * self.gamma**self.last_epoch * (1 - momentum) for rate in self.base_lrs]


def step_plateau(distiller: Distiller) -> None:
    """Steps each ReduceLROnPlateau after an epoch with a validation.

    Raises `UserError` if its metric is not logged.
    """
    trainer = distiller.trainer
    every = trainer.check_val_every_n_epoch or 1
    if (distiller.current_epoch + 1) % every:
        return
    for config in trainer.lr_scheduler_configs:
        if not isinstance(config.scheduler, ReduceLROnPlateau):
            continue
        found, monitor = trainer.callback_metrics, distiller.waits_for
        if monitor in found:
            config.scheduler.step(float(found[monitor]))
        elif any(name.startswith("val/") for name in found):  # else the run was resumed after this epoch's validation
            names = ", ".join(sorted(name for name in found if name.startswith(("val/", "train/"))))
            raise UserError(f"The scheduler waits for {monitor}, which is not logged: name one of {names}.")


def interpolate(points: Sequence[tuple[float, float]], x: float) -> float:
    """Returns the value at `x` of the piecewise linear function through `points`, sorted by x and constant outside."""
    (x0, y0), *rest = points
    if x <= x0:
        return y0
    for x1, y1 in rest:
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
        x0, y0 = x1, y1
    return y0


def average_of(student: nn.Module, decay: float) -> AveragedModel:
    """Returns the exponential moving average of the student's weights and buffers, without gradients."""
    average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    return average.requires_grad_(False)


@torch.no_grad()
def follow(average: AveragedModel, student: nn.Module, first: bool) -> None:
    """Updates the average as its `update_parameters` does, which reads from the device how often it was called.

    `first`: whether that may be the first time, when the weights are copied.
    """
    if first or average.multi_avg_fn is None:
        average.update_parameters(student)
        return
    pairs = zip(_state(average.module), _state(student), strict=True)
    by_type: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for mean, value in pairs:
        means, values = by_type.setdefault(mean.dtype, ([], []))
        means.append(mean.detach())
        values.append(value.detach())
    for means, values in by_type.values():
        average.multi_avg_fn(means, values, average.n_averaged)
    average.n_averaged += 1


def _state(net: nn.Module) -> list[Tensor]:
    return [*net.parameters(), *net.buffers()]
