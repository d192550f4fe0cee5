"""Callbacks of a run: a line an epoch with the time left, and a stop that loses nothing."""

from __future__ import annotations

import hashlib
import logging
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ProgressBar, RichProgressBar

log = logging.getLogger(__name__)


class Stopped(Exception):
    """Training was interrupted by a signal after its state was saved."""

    def __init__(self, signum: int, where: str):
        super().__init__(f"Stopped by {signal.Signals(signum).name} at {where}; the state is saved.")
        self.status = 128 + signum


class StopSafely(Callback):
    """On Ctrl-C or SIGTERM: finishes the step, saves `last.ckpt` in the middle of the epoch, and ends.

    A resumed run continues with the next batch, and ends with the weights of a run that was never stopped. A second
    Ctrl-C does not wait.
    """

    signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, dirpath: str | Path):
        self.path = Path(dirpath) / "last.ckpt"
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        try:
            self._before = {s: signal.signal(s, self._receive) for s in self.signals}
        except ValueError:  # not the main thread: whoever runs us handles signals
            self._before = {}

    def _receive(self, signum: int, frame: Any) -> None:
        self.received = signum
        signal.signal(signum, self._before.get(signum, signal.SIG_DFL))
        log.warning("%s: stopping after this step. Again to stop at once.", signal.Signals(signum).name)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        # At an epoch's last batch there is still its validation to do, and then its checkpoint is written anyway.
        if self.received is not None and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            trainer.save_checkpoint(self.path)
            self._stop(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.received is not None:
            self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        assert self.received is not None
        raise Stopped(self.received, f"step {trainer.global_step} of epoch {trainer.current_epoch}")

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()


class SeededSteps(Callback):
    """What a step draws (dropout, a method's negatives) depends on seed, epoch, batch and rank alone: so a run that goes
    on in the middle of an epoch needs no generator's state, and no two ranks draw the same."""

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        place = f"{self.seed} {trainer.current_epoch} {batch_idx} {trainer.global_rank}"
        seed = int.from_bytes(hashlib.sha256(place.encode()).digest()[:8])
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` asks every kind of device, which takes longer
        if pl_module.device.type == "cuda":
            torch.cuda.manual_seed(seed)


class EpochLine(Callback):
    """Logs a line an epoch, to the console and the run's log file: losses, metrics, and the time left."""

    def __init__(self) -> None:
        self._last = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start, self._first = time.perf_counter(), trainer.current_epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        done, total = trainer.current_epoch + 1, trainer.max_epochs or 0
        now = time.perf_counter()
        left = (now - self._start) / (done - self._first) * (total - done)
        # Short epochs are summed up: a line every second at most, and always the last.
        if now - self._last < 1 and done < total:
            return
        self._last = now
        shown = {k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith("speed/")}
        text = "  ".join(f"{k} {shown[k]:.4f}" for k in ("train/loss", "val/accuracy", "val/agreement") if k in shown)
        if trainer.is_global_zero:
            log.info("epoch %*d/%d  %s  %s left", len(str(total)), done, total, text, format_seconds(left))


def format_seconds(seconds: float) -> str:
    """A duration for people: 8 s, 3 min 20 s, 2 h 5 min."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60} s"
    return f"{s // 3600} h {s % 3600 // 60} min"


def progress_bar() -> list[ProgressBar]:
    """A live bar where there is a terminal; elsewhere the lines of `EpochLine` are progress enough."""
    return [RichProgressBar(leave=False)] if sys.stdout.isatty() else []
