"""Callbacks of a run: a log line per epoch with the time left, the test accuracy per epoch, and biases of classes."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from litdistill.distillation.distiller import Distiller
from litdistill.evaluation.predictions import collect, quality
from litdistill.training.progress import epochs_in_all
from litdistill.utils.errors import UserError
from litdistill.utils.logging import format_seconds

log = logging.getLogger(__name__)


class EpochLogger(Callback):
    """Logs a line per epoch, to the console and the run's log file: who is trained, the epoch's loss, metrics, the time left.

    `train/loss` is the mean over the epoch's minibatches, on all ranks; metrics are those of a validation in this epoch.
    `role`: who is trained, "Student" or "Teacher".
    """

    def __init__(self, role: str = "Student") -> None:
        self.role = role
        self._last, self._validated = 0.0, -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start, self._first = time.perf_counter(), trainer.current_epoch

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = -1 if trainer.sanity_checking else trainer.current_epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss = epoch_loss(trainer, pl_module)  # on all ranks, whatever each of them logs
        done = trainer.current_epoch + 1
        total, now = epochs_in_all(trainer, done), time.perf_counter()
        # At most one line per second for short epochs; the last epoch is always logged.
        if not trainer.is_global_zero or (now - self._last < 1 and done != total):
            return
        self._last = now
        metric = pl_module.task.monitor[0] if isinstance(pl_module, Distiller) else "accuracy"
        keys = (f"val/{metric}", "val/agreement", "val/deviation") if self._validated == trainer.current_epoch else ()
        shown = {k: float(trainer.callback_metrics[k]) for k in keys if k in trainer.callback_metrics}
        shown = {"train/loss": loss, **shown} if loss is not None else shown
        words = [f"{self.role}: epoch {done:>{len(str(total))}}/{total}" if total > 0 else f"{self.role}: epoch {done}"]
        words += [f"{k} {v:.4f}" for k, v in shown.items()]
        if 0 < done < total:
            words.append(f"{format_seconds((now - self._start) / (done - self._first) * (total - done))} left")
        log.info("%s", "  ".join(words))


def epoch_loss(trainer: Trainer, module: LightningModule) -> float | None:
    """Returns the mean loss of the minibatches of the current epoch over all ranks, which call this together."""
    mean = module.means.epoch_loss() if isinstance(module, Distiller) else None
    if mean is not None and trainer.world_size > 1:
        mean = trainer.strategy.reduce(mean, reduce_op="mean")
    return None if mean is None else float(mean)


class TestAccuracyMonitor(Callback):
    """Measures the student on the test set after each epoch, for the figure that publications report as "best on test".

    The value is logged and added to the summary, and selects no epoch. `data`: the data module with the test set.
    """

    def __init__(self, data: Any) -> None:
        self.data, self.best = data, None

    best: float | None

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Distiller)
        task, name = pl_module.task, pl_module.task.monitor[0]
        value = quality(pl_module.deployed_student, self.data, task, "test", pl_module.device)[name]
        if self.best is None or task.better(value, self.best):
            self.best = value
        pl_module.log(f"watched/test_{name}", value)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]


class ClassBias(Callback):
    """Before training, adds one number to the student's biases of `classes`: the one with the best validation accuracy.

    Hinton, Vinyals & Dean 2015 (arXiv 1503.02531), section 3, correct in this way the biases of classes that the transfer
    set lacks (3.5 for digit 3) or of the only classes that it contains (-7.6 for digits 7 and 8). They choose the number on
    the test set.
    """

    def __init__(self, classes: Sequence[int]):
        self.classes = list(classes)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step:
            return  # the weights of a resumed run include the shift
        student = pl_module.student
        data = getattr(trainer.datamodule, "data", trainer.datamodule)  # type: ignore[attr-defined]
        logits, targets = collect(student, data, "val", pl_module.device)  # type: ignore[arg-type]
        layers = [m for m in student.modules() if isinstance(m, nn.Linear) and m.out_features == logits.shape[1]]  # type: ignore
        if not layers or layers[-1].bias is None:
            raise UserError("ClassBias needs a student that ends in a linear layer with a bias for each class.")
        shift = best_shift(logits, targets, self.classes)
        with torch.no_grad():
            layers[-1].bias[self.classes] += shift
        log.info("The biases of the classes %s are raised by %.2f.", ", ".join(map(str, self.classes)), shift)


def best_shift(logits: Tensor, targets: Tensor, classes: Sequence[int]) -> float:
    """Returns the number to add to the logits (N, C) of `classes` for the most correct predictions of the targets (N,).

    Exact: a prediction changes only where the shift passes the gap between the largest logit within `classes` and the
    largest of the others. Of all optimal shifts, returns the middle of the widest interval.
    """
    inside = torch.zeros(logits.shape[1], dtype=torch.bool)
    inside[list(classes)] = True
    within, guess_within = logits.double().masked_fill(~inside, -torch.inf).max(1)
    others, guess_others = logits.double().masked_fill(inside, -torch.inf).max(1)
    gaps, order = (others - within).sort()
    gains = ((guess_within == targets).long() - (guess_others == targets).long())[order]
    correct = torch.cat([gains.new_zeros(1), gains.cumsum(0)])  # for a shift above the smallest 0, 1, …, N gaps
    edges = torch.cat([gaps[:1] - 1, gaps, gaps[-1:] + 1])
    widths = edges.diff()
    best = correct[widths > 0].max()
    i = int(torch.where(correct == best, widths, -1.0).argmax())
    return float((edges[i] + edges[i + 1]) / 2)
