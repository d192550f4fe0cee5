"""Several runs at once in one process, on one pass of the data and of the teacher: `sweep.pack=8`.

Each run is the whole of `litdistill.train.train` in a thread of its own, and exactly one has its turn at a time: it trains
one window of minibatches (`litdistill.window`), then the next run trains on the same one, whose images were gathered and
augmented, and the teacher asked, by whoever came first. So a run ends where it would have ended alone, to the bit on a CPU:
its steps, random draws, schedules, callbacks, logs, checkpoints, pruning, failure and resume are its own. Only such runs
share that have data and teacher in common; the others wait until these are through.

Turns, and not one step of stacked parameters (`torch.func.vmap`): on a CPU a student's own step is what costs, and grouped
kernels are slower. Milliseconds a student and step, batch 64: a ConvNet of 8, 16 and 32 channels on 28x28 images takes 9.0
in turns and 18 stacked; on 8x8 images, where there is next to nothing to compute, 2.5 and 2.0.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig

from litdistill.data.datamodule import ImageData
from litdistill.distiller import Distiller
from litdistill.errors import Stopped
from litdistill.methods.base import Method
from litdistill.recipes import finished
from litdistill.safety import StopSafely
from litdistill.shared import Shared, common
from litdistill.train import start, train

log = logging.getLogger(__name__)


class Pack:
    """Up to `size` runs that take turns. Whoever runs in it calls its `train` instead of `litdistill.train.train`."""

    def __init__(self, size: int):
        self.size = size
        self.heard: int | None = None  # a signal to stop
        self.dropped = False
        self.current: Member | None = None  # whose turn it is
        self.shared: Shared | None = None  # of those that are training
        self.key: str | None = None  # of their config: see `common`
        self.users = 0  # how many they are
        self._back = threading.Semaphore(0)
        self._before: dict[int, Any] = {}

    def run(self, job: Callable[[], bool]) -> bool:
        """Calls `job` in up to `size` threads, one begun after the other, until one says that there was nothing to do.

        Whether there was anything. Raises what a job raised, when all have ended.
        """
        members: list[Member] = []
        argv, self.heard, self.dropped = sys.argv, None, False
        with self._listening(), _named_lines():
            try:
                while len(members) < self.size and self.heard is None:
                    sys.argv = argv
                    members.append(Member(self, job))
                    self._give(members[-1])
                    if members[-1].did is False:
                        break
                while alive := [m for m in members if not m.ended]:
                    ready = [m for m in alive if m.wants is None or self.key in (None, m.wants)]
                    self._give(min(ready, key=lambda m: m.position))  # the ones behind catch up
            finally:
                self._drop(members)
                sys.argv = argv
        for member in members:
            if member.error is not None:
                raise member.error
        if self.heard is not None:  # too late for any of them
            raise Stopped(self.heard, "the end of these runs")
        return any(m.did for m in members)

    def train(self, cfg: DictConfig, callbacks: Sequence[Callback] = ()) -> float:
        """`litdistill.train.train`, in turns with the others where that can be: on one device, from images in memory."""
        member, trainer = self.current, cfg.trainer
        one = trainer.get("strategy") in (None, "auto") and trainer.get("devices") == 1 and trainer.max_epochs != 0
        if member is None or not one or finished(Path(cfg.folder)):
            return train(cfg, callbacks)
        try:
            return train(cfg, callbacks, member.build, member.clock)
        finally:
            member.leave()

    def _give(self, member: Member) -> None:
        """Lets a member have its turn, and does what it asks of the main thread."""
        while True:
            self.current = member
            member.wake.release()
            self._wait()
            if member.request is None:
                return
            member.answer()

    def _wait(self) -> None:
        """Until the current member gives its turn back; not for ever, as a signal that another thread got comes late."""
        while not self._back.acquire(timeout=0.5):
            pass
        self.current = None

    def _drop(self, members: Sequence[Member]) -> None:
        """Ends those that are left when this thread is interrupted, so that locks and files are closed."""
        self.dropped = True
        if self.current is not None:
            self._wait()
        for member in members:
            while not member.ended:
                member.request = None
                self._give(member)

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """Signals reach this thread alone: `StopSafely` is told of them in each member's next turn."""
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._receive) for s in StopSafely.signals}
        try:
            yield
        finally:
            for signum, handler in self._before.items():
                signal.signal(signum, handler)

    def _receive(self, signum: int, frame: Any) -> None:
        self.heard = signum
        signal.signal(signum, self._before[signum])
        log.warning("%s: all runs stop after their next step. Again to stop at once.", signal.Signals(signum).name)


class Dropped(BaseException):
    """Ends a member whose pack was interrupted for a second time."""


class Member:
    """A thread and its turns."""

    def __init__(self, pack: Pack, job: Callable[[], bool]):
        self.pack, self.job = pack, job
        self.wake = threading.Semaphore(0)
        self.did: bool | None = None  # what the job gave
        self.error: BaseException | None = None
        self.threads = torch.get_num_threads()  # which a new thread would not know of everywhere
        self.ended = False
        self.wants: str | None = None  # waits for this to be what the pack shares
        self.joined = False
        self.position = (-1, 0)  # epoch and batch
        self.request: Callable[[], Any] | None = None
        self.away = 0.0  # seconds that others had
        self._answer: tuple[Any, BaseException | None] = (None, None)
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        self.wake.acquire()
        torch.set_num_threads(self.threads)
        try:
            if not self.pack.dropped:
                self.did = self.job()
        except BaseException as error:
            self.error = error
            if isinstance(error, Stopped):
                self.pack.heard = error.status - 128  # then all stop
        finally:
            self.ended = True
            self.pack._back.release()

    def clock(self) -> float:
        """Seconds, without those in which others had their turn."""
        return time.perf_counter() - self.away

    def turn(self) -> None:
        """Lets the others have theirs."""
        argv, left = sys.argv, time.perf_counter()
        self.pack._back.release()
        self.wake.acquire()
        sys.argv = argv  # what a run takes for its command
        self.away += time.perf_counter() - left
        if self.pack.dropped:
            raise Dropped

    def before_window(self, trainer: Trainer) -> None:
        """Lets the others have their turns before this run's next window is made."""
        loop = trainer.fit_loop.epoch_loop
        self.position = (trainer.current_epoch, loop.batch_progress.current.ready)
        self.turn()
        if self.pack.heard is not None:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, StopSafely):
                    callback.heard = self.pack.heard

    def build(self, cfg: DictConfig, method: Method) -> tuple[ImageData, Distiller]:
        """`litdistill.train.build` from what this run has in common with those that are training, once these have that."""
        pack, key = self.pack, common(cfg)
        while pack.key not in (None, key):
            self.wants, self.position = key, (-1, 0)
            self.turn()
            if pack.heard is not None:
                raise Stopped(pack.heard, "its start")
        self.wants = None
        if pack.shared is None:
            pack.shared, pack.key = self.in_main(lambda: Shared(cfg)), key
        pack.users += 1
        self.joined = True
        return pack.shared.build(cfg, method, self.start, self.before_window)

    def leave(self) -> None:
        """Ends what `build` began."""
        self.pack.users -= self.joined
        self.joined = False
        if self.pack.users == 0:
            self.pack.shared = self.pack.key = None

    def start(self, cfg: DictConfig) -> Path | None:
        """`litdistill.train.start`, by the main thread where a run is to be trained."""
        return self.in_main(lambda: start(cfg)) if cfg.student.get("checkpoint") == "auto" else None

    def in_main(self, request: Callable[[], Any]) -> Any:
        """What the main thread gives, which hears signals: a run that is trained first can be stopped too."""
        self.request, away = request, self.away
        self.turn()
        self.away = away
        result, error = self._answer
        if error is not None:
            raise error
        return result

    def answer(self) -> None:
        request, self.request = self.request, None
        assert request is not None
        try:
            self._answer = request(), None
        except (Exception, Stopped) as error:
            self._answer = None, error


def _show(handler: logging.Handler, record: logging.LogRecord) -> bool:
    """Has a line of another thread shown under that one's name."""
    if record.thread == threading.main_thread().ident or hasattr(record, "named"):
        return True
    again = copy.copy(record)
    again.named, again.msg = True, f"[{record.threadName}] {record.msg}"
    handler.handle(again)
    return False


@contextlib.contextmanager
def _named_lines() -> Iterator[None]:
    filters = [(handler, functools.partial(_show, handler)) for handler in logging.getLogger().handlers]
    for handler, show in filters:
        handler.addFilter(show)
    try:
        yield
    finally:
        for handler, show in filters:
            handler.removeFilter(show)
