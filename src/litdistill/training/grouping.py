"""Groups of minibatches: decides where several minibatches may share one step of Lightning, to save its overhead per step.

Within a group only this project's code runs: batch hooks of callbacks are called once per group, Lightning counts groups as
batches, and its Trainer cannot clip or accumulate gradients. So groups are used only where this project creates the Trainer
and knows all of its callbacks; a `Distiller` in any other Trainer has automatic optimization and one minibatch per step.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from lightning import LightningDataModule
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ProgressBar,
    StochasticWeightAveraging,
)
from torch import Tensor

from litdistill.data.loading import IndexLoader, Rows
from litdistill.data.protocol import IndexedData
from litdistill.distillation.captured_batches import CapturedBatches
from litdistill.distillation.cuda_graphs import Recorder
from litdistill.distillation.distiller import Distiller
from litdistill.training.callbacks import EpochLogger, TestAccuracyMonitor
from litdistill.training.pack import Member
from litdistill.training.preemption import GracefulStop
from litdistill.types import Batch, Group
from litdistill.utils.errors import UserError
from litdistill.utils.modes import eval_mode

log = logging.getLogger(__name__)

GROUP = 16  # minibatches: enough to make Lightning's overhead per step negligible
BYTES = 2**26  # maximum size of a group's inputs
SECONDS = 2.0  # maximum duration of a group, since Ctrl-C waits for its end
PLAIN = ("auto", "ddp", "ddp_find_unused_parameters_true")
# Callbacks that work the same with groups, except LearningRateMonitor: with groups the Distiller logs the learning rate.
FINE = (
    EarlyStopping,
    EpochLogger,
    GracefulStop,
    LearningRateMonitor,
    ModelCheckpoint,
    ProgressBar,
    TestAccuracyMonitor,
)
# Callbacks that require automatic optimization.
NEVER = (BatchSizeFinder, GradientAccumulationScheduler, LearningRateFinder, StochasticWeightAveraging)
HOOKS = (
    *("on_train_batch_start", "on_train_batch_end", "on_before_backward", "on_after_backward"),
    *("on_before_optimizer_step", "on_before_zero_grad"),
)


def reason_for_single(trainer: Mapping[str, Any], callbacks: Iterable[Callback]) -> str | None:
    """Returns the option or callback that needs one minibatch per step, in words; None where groups are equivalent."""
    if (trainer.get("strategy") or "auto") not in PLAIN:
        return "the strategy"
    if (trainer.get("accumulate_grad_batches") or 1) > 1:
        return "trainer.accumulate_grad_batches"
    if str(trainer.get("precision")).startswith("16"):
        return "losses that are scaled for float16"
    for key in ("limit_train_batches", "overfit_batches", "fast_dev_run"):
        if trainer.get(key):
            return f"trainer.{key}"
    if trainer.get("val_check_interval") not in (None, 1.0) or isinstance(trainer.get("val_check_interval"), int):
        return "trainer.val_check_interval"
    for callback in callbacks:
        if isinstance(callback, NEVER):
            return type(callback).__name__
        if isinstance(callback, ModelCheckpoint) and callback.every_n_epochs == 0:
            return "a checkpoint within an epoch"
        if any(not _is_fine(callback, hook) for hook in HOOKS):
            return f"{type(callback).__name__}, which acts on each batch,"
    return None


def _is_fine(callback: Callback, hook: str) -> bool:
    """Returns whether a callback's hook is the base class's or that of a class in `FINE`."""
    if hook in vars(callback):  # as a LambdaCallback does
        return False
    known = [getattr(kind, hook) for kind in (Callback, *FINE)]
    return isinstance(callback, ProgressBar) or getattr(type(callback), hook) in known


def without_rate_monitor(callbacks: Iterable[Callback]) -> list[Callback]:
    """Returns the callbacks without LearningRateMonitor, for a run with groups: the Distiller logs the learning rate."""
    return [c for c in callbacks if not isinstance(c, LearningRateMonitor)]


def group_size(distiller: Distiller, data: IndexedData, most: int = GROUP) -> int:
    """Returns the number of minibatches of a group: as many as fit in `BYTES` and `SECONDS`, at least 1 and at most `most`.

    Measured on one minibatch, which changes no weight, no batch statistic and no random generator.
    """
    count = min(data.batch_size, len(data.train_ids))
    batch = data.get_batch("train", data.train_ids[:count], None)
    size = batch.inputs.numel() * 4 if isinstance(batch.inputs, Tensor) else 0
    most = max(1, min(most, BYTES // max(1, size)))
    if most == 1 or torch.cuda.is_available():
        return most
    seconds = step_seconds(distiller, batch)
    if seconds * most > SECONDS:  # the first step includes one-time setup
        seconds = min(seconds, step_seconds(distiller, batch))
    return max(1, min(most, int(SECONDS / max(seconds, 1e-6))))


def step_seconds(distiller: Distiller, batch: Batch) -> float:
    """Returns the approximate seconds of a step: the student's forward and backward in eval mode, the teacher's forward."""
    with eval_mode(distiller.student):
        start = time.perf_counter()
        outputs = distiller.task.forward(distiller.student, batch, False)
        total = sum(head.float().sum() for head in outputs.heads.values())
        if isinstance(total, Tensor) and total.requires_grad:
            total.backward()
        passes = 1 if distiller.adversarial is None else 1 + distiller.adversarial.steps
        seconds = passes * (time.perf_counter() - start)
        if distiller.needs_teacher_outputs and distiller.teacher is not None:
            start = time.perf_counter()
            distiller.teacher(batch)
            seconds += time.perf_counter() - start
    distiller.zero_grad(set_to_none=True)
    return seconds


class Layout(NamedTuple):
    """How an epoch is divided into groups. A resumed run keeps it, since Lightning's progress counts groups.

    `group`: maximum number of minibatches in a group; 0: no groups. `log_every`: steps between two logs.
    """

    group: int
    log_every: int


def log_interval(epochs: int, steps: int) -> int:
    """Returns the steps between two logs for a run of `steps` in all: at least two logs an epoch, and twenty in all.

    At most 50. A log ends a group of minibatches, so that more of them would cost time.
    """
    per_epoch = max(1, steps // max(1, epochs))
    return max(1, min(50, per_epoch // max(2, -(-20 // max(1, epochs)))))


def layout_of(checkpoint: Mapping[str, Any]) -> Layout | None:
    """Returns the layout stored in a checkpoint; None without one. Raises `UserError` for an invalid layout."""
    state = checkpoint.get(GroupedData.__name__)
    if not isinstance(state, Mapping):
        return None
    layout = Layout(state.get("group"), state.get("log_every"))  # type: ignore[arg-type]
    if not all(type(n) is int and 0 <= n < 2**31 for n in layout):
        raise UserError(f"The checkpoint is damaged: it says that epochs were cut by {dict(state)}.")
    return layout


class GroupedData(LightningDataModule):
    """The loaders of `data` for a Trainer, with the training set divided into groups by `layout`.

    `member`: of several trainings side by side, which share their batches; None: one alone. `recorder`: records how batches
    are augmented on its device, but not where they are shared; None: nothing is recorded.
    """

    def __init__(
        self, data: IndexedData, layout: Layout, member: Member | None = None, recorder: Recorder | None = None
    ):
        super().__init__()
        self.data, self.layout, self.member = data, layout, member
        self.recorder = recorder
        self.captured: CapturedBatches | None = None  # while training
        self._identity = functools.cache(data.identity)  # data do not change while they are trained on

    def setup(self, stage: str) -> None:
        """Uses rank 0's layout on all ranks, since each has measured its own."""
        if self.trainer is not None and self.trainer.world_size > 1:
            self.layout = Layout(*self.trainer.strategy.broadcast(tuple(self.layout)))

    def teardown(self, stage: str) -> None:
        """Lets go of graphs, which hold memory."""
        self.captured = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the layout, for checkpoints."""
        return self.layout._asdict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Does nothing: a resumed run constructs this object with the checkpoint's layout (`layout_of`)."""

    def train_dataloader(self) -> IndexLoader:
        return self.data.train_loader(*self._world(), *self.layout)

    def val_dataloader(self) -> IndexLoader:
        return self.data.eval_loader("val", *self._world())

    def test_dataloader(self) -> IndexLoader:
        return self.data.eval_loader("test", *self._world())

    def transfer_batch_to_device(self, batch: Rows, device: torch.device, dataloader_idx: int) -> Batch | Group:
        """Lightning's hook; returns the batch or group of the rows. Lightning itself would look for tensors among the sizes
        and weights of a group, too."""
        if self.member is None:
            if self.captured is None and self.recorder is not None and self.recorder.device == device.type:
                self.captured = CapturedBatches(self.data, self.recorder)
            return (self.captured or self.data).make_batch(moved(batch, device))
        make = lambda: self.data.make_batch(moved(batch, device))  # noqa: E731
        assert self.trainer is not None
        return self.member.batch(self._identity(batch.split), batch, self.trainer.global_step, make)

    def _world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)


def moved(rows: Rows, device: torch.device) -> Rows:
    """Returns the rows with their tensors on the device."""
    views, images = (None if x is None else x.to(device, non_blocking=True) for x in (rows.views, rows.images))
    return rows._replace(ids=rows.ids.to(device, non_blocking=True), views=views, images=images)
