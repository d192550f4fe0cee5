"""Several trainings side by side in one process, on one pass of images and of the teacher.

    together([lambda member: train(one, member=member), lambda member: train(other, member=member)])

Each training is the ordinary one, in a thread of its own, and one at a time has its turn. It hands the turn on where it asks
for data: to the one that is furthest behind, so that trainings which begin at one step stay at one step. Who is first to ask
for samples in their views makes the batch and, in its step, the teacher's outputs; who asks for the same next is given these
tensors. Both are known by their contents, so that trainings may differ in anything, and each is equal to the bit to one alone.

On a GPU each thread has a stream of its own: what one training has launched runs while others launch. What a step needs of
the process (generators of random numbers, `sys.argv`) is put back with the turn.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from litdistill.data.loading import Rows
from litdistill.types import Batch, Group
from litdistill.utils.errors import Stopped

T = TypeVar("T")


class Once:
    """Makes each thing once, by its key, and gives it to all who ask: on a GPU to be read after the work that makes it."""

    def __init__(self) -> None:
        self._made: dict[Hashable, tuple[Any, Any]] = {}

    def __call__(self, key: Hashable, make: Callable[[], T]) -> T:
        """Returns what `make` returned when it was first called with this key."""
        if key not in self._made:
            made = make()
            self._made[key] = made, torch.cuda.current_stream().record_event() if _on_gpu() else None
            return made
        value, event = self._made[key]
        if event is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(event)
            # Or its memory would be used again while this stream may still read it.
            for tensor in _tensors(value):
                if tensor.is_cuda:
                    tensor.record_stream(stream)
        found: T = value
        return found


class Pack:
    """Whose turn it is, and the batch that was made last."""

    def __init__(self, count: int) -> None:
        self.members = [Member(self) for _ in range(count)]
        self.stopped: BaseException | None = None
        self._active, self._holder = list(self.members), self.members[0]
        self._lock = threading.Lock()
        self._last: tuple[str, Rows] | None = None
        self._once = Once()

    def hand_on(self) -> None:
        """Gives the turn to the member that is furthest behind."""
        with self._lock:
            if self._active:
                self._holder = min(self._active, key=lambda member: member.at)
                self._holder.turn.release()

    def leave(self, member: Member) -> None:
        """Takes a member out, and hands its turn on if it has it."""
        with self._lock:
            self._active.remove(member)
            held = self._holder is member
        if held:
            self.hand_on()

    def batch(self, identity: str, rows: Rows, make: Callable[[], Batch | Group]) -> Batch | Group:
        """Returns the batch of these rows of the data with this identity, as made by the first member that asks for it."""
        if self._last is None or self._last[0] != identity or not _same(self._last[1], rows):
            self._last, self._once = (identity, rows), Once()
        made = self._once("batch", make)
        return made._replace(once=self._once) if isinstance(made, Group) else made


class Member:
    """One of the trainings of a pack."""

    def __init__(self, pack: Pack) -> None:
        self.pack = pack
        self.at = (-1, 0)  # the steps taken, and how often data were asked for since
        self.turn = threading.Semaphore(0)
        self._random: Tensor | None = None  # the state of the GPU's generator at the end of its last turn

    def batch(self, identity: str, rows: Rows, step: int, make: Callable[[], Batch | Group]) -> Batch | Group:
        """Returns the batch of these rows, after the others had their turns.

        `identity`: of the data; `step`: how many steps this training has taken; `make`: makes the batch. Raises `Stopped` where
        another training of the pack was stopped.
        """
        self.at = (step, self.at[1] + 1 if step == self.at[0] else 0)
        argv = sys.argv
        with isolate_rng(include_cuda=_on_gpu()):
            self._finish_random()
            self.pack.hand_on()
            self.turn.acquire()
        sys.argv = argv
        if self.pack.stopped is not None:
            signum = getattr(self.pack.stopped, "signum", signal.SIGINT)
            raise Stopped(signum, f"step {step}", "the last checkpoint is kept")
        return self.pack.batch(identity, rows, make)

    def _finish_random(self) -> None:
        """Waits for the steps of a turn that drew random numbers on the GPU: all graphs read their seed at one place."""
        if not _on_gpu():
            return
        state = torch.cuda.get_rng_state()
        if self._random is None or not torch.equal(state, self._random):
            torch.cuda.current_stream().synchronize()
        self._random = state


def together(jobs: Sequence[Callable[[Member], T]]) -> list[T]:
    """Runs trainings side by side; returns what each has returned.

    The first runs in the calling thread, the only one that signals can reach. If it is stopped, the others are at their next
    turn. Raises the first error of those that were not caught in a job, after all have ended.
    """
    pack, argv = Pack(len(jobs)), sys.argv
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def work(index: int) -> None:
        member = pack.members[index]
        try:
            member.turn.acquire()
            sys.argv = argv
            with torch.cuda.stream(torch.cuda.Stream()) if torch.cuda.is_available() else contextlib.nullcontext():
                results[index] = jobs[index](member)
        except BaseException as error:
            errors.append(error)
            if not isinstance(error, Exception):
                pack.stopped = error
        finally:
            pack.leave(member)

    threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(1, len(jobs))]
    for thread in threads:
        thread.start()
    pack.hand_on()
    work(0)
    for thread in threads:
        try:
            thread.join()
        except KeyboardInterrupt as error:
            pack.stopped = error
            thread.join()
    sys.argv = argv
    if errors:
        raise errors[0]
    return [results[index] for index in range(len(jobs))]


def _same(one: Rows, other: Rows) -> bool:
    """Returns whether two requests are of the same samples in the same views, cut into the same minibatches."""

    def equal(a: Tensor | None, b: Tensor | None) -> bool:
        return a is b or (a is not None and b is not None and torch.equal(a, b))

    facts = [(rows.split, rows.sizes, rows.weights, rows.first, rows.logs) for rows in (one, other)]
    return facts[0] == facts[1] and equal(one.ids, other.ids) and equal(one.views, other.views)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yields the tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)


def _on_gpu() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()
