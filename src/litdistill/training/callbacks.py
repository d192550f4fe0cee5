"""Callbacks of a run: what its steps draw, a line an epoch with the time left, and what some runs need."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from litdistill.distillation.distiller import Distiller
from litdistill.evaluation.predictions import collect, quality
from litdistill.utils.errors import UserError
from litdistill.utils.logging import format_seconds

log = logging.getLogger(__name__)


class EpochLogger(Callback):
    """Logs a line an epoch, to the console and the run's log file: losses, metrics, and the time left."""

    def __init__(self) -> None:
        self._last = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start, self._first = time.perf_counter(), trainer.current_epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        done, total = trainer.current_epoch + 1, trainer.max_epochs or -1
        if total < 0 and trainer.max_steps > 0:  # steps are what ends it
            total = max(done, math.ceil(trainer.max_steps * done / max(1, trainer.global_step)))
        now = time.perf_counter()
        left = (now - self._start) / (done - self._first) * (total - done)
        # Short epochs are summed up: a line every second at most, and always the last.
        if now - self._last < 1 and done < total:
            return
        self._last = now
        shown = {k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith("speed/")}
        metric = pl_module.task.monitor[0] if isinstance(pl_module, Distiller) else "accuracy"
        keys = ("train/loss", f"val/{metric}", "val/agreement", "val/distance")
        text = "  ".join(f"{k} {shown[k]:.4f}" for k in keys if k in shown)
        if trainer.is_global_zero:
            log.info("epoch %*d/%d  %s  %s left", len(str(total)), done, total, text, format_seconds(left))


class TestAccuracyMonitor(Callback):
    """Measures the student on the test set after each epoch, for the figure that other tables give as "best on test".

    It is logged and summarized beside the others, and chooses nothing. `data`: whose test set it is.
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
    """Raises the student's biases of `classes` by one number, before training: the one that is best on the validation set.

    Hinton, Vinyals & Dean 2015 (arXiv 1503.02531), section 3, correct so what a student makes of classes that its
    transfer set lacks (3.5 for the threes) or of the only ones it has (-7.6 for the sevens and eights). They choose the
    number on the test set.
    """

    def __init__(self, classes: Sequence[int]):
        self.classes = list(classes)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step:
            return  # a resumed run has it
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
    """What to add to the logits (N, C) of `classes` for the most correct predictions of the targets (N,).

    Exact: a prediction changes only where the shift passes the gap between the best logit within `classes` and the best
    of the others. Of all shifts that are as good, the middle of the widest interval.
    """
    inside = torch.zeros(logits.shape[1], dtype=torch.bool)
    inside[list(classes)] = True
    within, guess_within = logits.double().masked_fill(~inside, -torch.inf).max(1)
    others, guess_others = logits.double().masked_fill(inside, -torch.inf).max(1)
    gaps, order = (others - within).sort()
    gains = ((guess_within == targets).long() - (guess_others == targets).long())[order]
    correct = torch.cat([gains.new_zeros(1), gains.cumsum(0)])  # beyond the first 0, 1, …, N gaps
    edges = torch.cat([gaps[:1] - 1, gaps, gaps[-1:] + 1])
    widths = edges.diff()
    best = correct[widths > 0].max()
    i = int(torch.where(correct == best, widths, -1.0).argmax())
    return float((edges[i] + edges[i + 1]) / 2)
