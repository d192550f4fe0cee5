"""The progress bar of a fit on a terminal: one line with who is trained, the epoch, its steps, and the time left in all."""

from __future__ import annotations

import math
import time
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich import get_console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from litdistill.types import Group
from litdistill.utils.logging import format_seconds

REFRESH = 0.1  # seconds between two updates, since steps of tiny networks are faster than a terminal


class EpochBar(ProgressBar):
    """Shows the steps of the current epoch. It counts epochs from 1 and minibatches, as the log does, and not groups of them.

    Lightning's own bars count epochs from 0, and show the last logged loss. `role`: who is trained, "Student" or "Teacher".
    """

    def __init__(self, role: str = "Student") -> None:
        super().__init__()
        self.role, self.enabled = role, True
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def disable(self) -> None:
        """Lightning's hook, for ranks other than 0."""
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.enabled:
            return
        self._start, self._shown, self._begun = time.perf_counter(), 0.0, float("nan")
        self._bar = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(table_column=Column(ratio=1)),
            TextColumn(
                "{task.completed:.0f}/{task.total:.0f} steps{task.fields[left]}", table_column=Column(no_wrap=True)
            ),
            console=get_console(),
            transient=True,
            expand=True,
        )
        self._task = self._bar.add_task("", total=0, left="")
        self.on_train_epoch_start(trainer)  # Lightning skips this hook for a run that is resumed within an epoch
        self._bar.start()

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        if self._bar is None:
            return
        of = f"/{total}" if (total := epochs_in_all(trainer, trainer.current_epoch)) > 0 else ""
        description = f"{self.role}: epoch {trainer.current_epoch + 1}{of}"
        self._bar.update(self._task, description=description, total=steps_of_epoch(trainer), completed=0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        if self._bar is None or (now - self._shown < REFRESH and not trainer.is_last_batch):
            return
        self._shown = now
        done = batch.first + len(batch.sizes) if isinstance(batch, Group) else batch_idx + 1
        epochs = trainer.current_epoch + done / max(done, steps_of_epoch(trainer))
        if math.isnan(self._begun):  # the time left is extrapolated from here: the first step includes one-time setup
            self._start, self._begun = now, epochs
        left, total = "", epochs_in_all(trainer, epochs)
        if total > 0 and epochs > self._begun:
            left = f", {format_seconds((now - self._start) / (epochs - self._begun) * max(0, total - epochs))} left"
        self._bar.update(self._task, completed=done, left=left)

    def on_train_end(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_exception(self, *_: Any) -> None:
        self.on_train_end()


def epochs_in_all(trainer: Trainer, done: float) -> int:
    """Returns the number of epochs of a fit after `done` of them; -1 for one without end. `max_steps` may end it earlier."""
    total = trainer.max_epochs or -1
    if total < 0 and trainer.max_steps > 0:
        whole = max(1, math.ceil(done))
        per_epoch = trainer.global_step / done if done and trainer.global_step else steps_of_epoch(trainer)
        total = max(whole, math.ceil(trainer.max_steps / max(1.0, per_epoch)))
    return total


def steps_of_epoch(trainer: Trainer) -> int:
    """Returns the number of minibatches of a training epoch in this process; 0 for a loader without length."""
    count = getattr(trainer.train_dataloader, "minibatches", None)  # of our loader, whose length counts groups
    if count is None or trainer.limit_train_batches != 1.0:
        count = trainer.num_training_batches
    return int(count) if math.isfinite(count) else 0
