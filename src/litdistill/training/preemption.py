"""Preemption: stops a run with its state saved, and locks its folder so that no two processes train in it."""

from __future__ import annotations

import contextlib
import logging
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from litdistill.config.origin import check_links
from litdistill.utils.distributed import is_first_rank
from litdistill.utils.errors import Stopped, UserError
from litdistill.utils.files import remove_parts

log = logging.getLogger(__name__)

PATIENCE_S = 10  # seconds to wait for a process that received a signal and is still writing its checkpoint
LOST_RANK = r"(?i)gloo|nccl|c10d|connection (was )?(closed|reset)|broken pipe"  # torch's errors after a rank has died


class GracefulStop(Callback):
    """On Ctrl-C, SIGTERM or SIGUSR1: finishes the step, saves `last.ckpt` in the middle of the epoch, and ends.

    A resumed run continues with the next batch, and ends with the same weights as an uninterrupted run. A second signal
    stops at once. All ranks stop at the same step, whichever of them received the signal: they exchange it about once a
    second.

    Args:
        dirpath: the folder of `last.ckpt`, inside the run's.
        minutes: interval at which the state is saved without a signal too; None: only at the end of each epoch.
    """

    signals = tuple(s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGUSR1"))

    def __init__(self, dirpath: str | Path, minutes: float | None = None):
        self.path, self.minutes = Path(dirpath) / "last.ckpt", minutes
        self.heard: int | None = None  # the signal that this process has received
        self.agreed: int | None = None  # the signal that all ranks have agreed on
        self._interval = self._left = 1  # steps between two exchanges of the ranks, and until the next
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved = self._talked = time.monotonic()
        try:
            self._before = {s: signal.signal(s, self._receive) for s in self.signals}
        except ValueError:  # not the main thread, the only one that can set handlers
            self._before = {}
        if trainer.received_sigterm:  # received before, by Lightning's handler
            self.heard = signal.SIGTERM

    def _receive(self, signum: int, frame: Any) -> None:
        self.heard = signum
        # Not the handler before: Lightning's would end a validation with status 0 at a second SIGTERM.
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
        log.warning("%s: stopping after this step. Again to stop at once.", signal.Signals(signum).name)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        due = self._agree(trainer)
        # After an epoch's last batch comes its validation, and then its checkpoint is written in any case.
        if trainer.is_last_batch:
            return
        if due or self.agreed is not None:
            trainer.save_checkpoint(self.path, weights_only=False)
            self._saved = time.monotonic()
        if self.agreed is not None:
            self._stop(trainer)

    def _agree(self, trainer: Trainer) -> bool:
        """Sets `agreed` to the signal that any rank has received, and returns whether to save; the same on all ranks."""
        due = self.minutes is not None and time.monotonic() - self._saved >= 60 * self.minutes
        if trainer.world_size == 1:
            self.agreed = self.heard
            return due
        self._left -= 1
        if self._left:
            return False
        local = torch.tensor([self.heard or 0, due, time.monotonic() - self._talked], dtype=torch.float64)
        local = local.to(trainer.strategy.root_device)
        signum, any_due, seconds = trainer.strategy.reduce(local, reduce_op="max").tolist()
        self.agreed = int(signum) or None
        self._interval = self._left = max(1, int(self._interval * min(2, 1 / max(seconds, 1e-9))))
        self._talked = time.monotonic()
        return bool(any_due)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size == 1:
            self.agreed = self.heard
        if self.agreed is not None:
            self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        assert self.agreed is not None
        if not trainer.is_global_zero:
            sys.exit()  # without error, since Lightning kills rank 0 at once when another rank fails
        raise Stopped(self.agreed, f"step {trainer.global_step}, in epoch {trainer.current_epoch + 1}")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if not (folder := self.path.parent.parent).is_dir():
            raise UserError(
                f"The run's folder {folder} has vanished: somebody deleted or moved it. Start the run again, or move the "
                "folder back and go on with resume=auto."
            )

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()


@contextlib.contextmanager
def translate_interrupts(folder: Path) -> Iterator[None]:
    """Raises `Stopped`, whose message says how to go on, for a Ctrl-C or SIGTERM that `GracefulStop` did not handle.

    Lightning turns a Ctrl-C into an exit with status 1, and a SIGTERM into one with status 0. `folder`: the run's.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        pressed = isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt)
        if not pressed and not isinstance(error, SIGTERMException):
            raise  # another rank's own end
        kept = (folder / "checkpoints" / "last.ckpt").is_file()
        state = "the last checkpoint is kept" if kept else "there was no checkpoint yet"
        raise Stopped(signal.SIGINT if pressed else signal.SIGTERM, "once", state) from error


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Holds the lock of a run's folder, which the system releases when the process ends for any reason.

    Raises `UserError` if another process holds it for longer than `PATIENCE_S`, and for a symbolic link in the folder that
    points out of it.
    """
    if not is_first_rank():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    check_links(folder)
    try:
        held = FileLock(folder / ".lock").acquire(timeout=PATIENCE_S)
    except Timeout as error:
        raise UserError(
            f"Another process is training in {folder}. Wait until it has ended, or start a run in a folder of its own: "
            "without resume=…"
        ) from error
    with held:
        remove_parts(folder)
        yield


@contextlib.contextmanager
def translate_worker_errors() -> Iterator[None]:
    """Raises a `UserError` instead of torch's errors after the death of a data loader worker or another rank."""
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        # A worker's death can also show in the transfer of a tensor.
        through = {Path(frame.filename).name for frame in traceback.extract_tb(error.__traceback__)}
        if "DataLoader worker" in str(error) or "resource_sharer.py" in through:
            what = "A process that reads the data has died. If memory ran out, fewer workers or smaller batches help."
        elif isinstance(error, RuntimeError) and re.search(LOST_RANK, str(error)):
            what = "Another rank of this run has died; its own last lines may say of what."
        else:
            raise
        raise UserError(f"{what} The last checkpoint is kept: go on with resume=auto.") from error
