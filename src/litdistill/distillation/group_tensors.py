"""Tensors at fixed addresses that recorded steps read and write: those of a whole group of minibatches.

A group's samples are written here at once. A step knows its place among them by a number on the device, which it moves on
itself: between two steps of a group nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from litdistill.distillation.running_means import Seen
from litdistill.types import Batch, Group, Outputs


class Left(NamedTuple):
    """What steps leave in the tensors of a group: the names of the terms of the loss and of what is watched, and of the heads
    of student and teacher; None of the teacher: its outputs were known before."""

    terms: tuple[str, ...]
    watched: tuple[str, ...]
    student: tuple[str, ...]
    teacher: tuple[str, ...] | None


class GroupTensors:
    """See the module's docstring. Made for groups like `group`, with at most as many samples and minibatches.

    `teacher`: its outputs for the minibatches, where they are known before the steps; `heads`: those of a forward over the
    whole group, which writes them itself.
    """

    def __init__(self, group: Group, teacher: Sequence[Outputs] | None):
        batch, self.rows, self.minibatches = group.batch, sum(group.sizes), len(group.sizes)
        self.device = batch.inputs.device
        self.batch = _each(torch.empty_like, batch)
        known = None if teacher is None else teacher[0]
        self.heads = {k: self._of_rows(v) for k, v in (known.heads if known is not None else {}).items()}
        self.features = {k: self._of_rows(v) for k, v in (known.features if known is not None else {}).items()}
        self._place = torch.zeros(
            2, dtype=torch.int64, device=self.device
        )  # of the next step: its first sample, its minibatch
        self._range = torch.arange(self.rows, device=self.device)
        self._at = (0, 0)  # what that holds when all that was launched has run
        self._minis: dict[
            int, tuple[Batch, Outputs | None, Tensor]
        ] = {}  # by size; the last: how a step moves the place
        self._left: dict[tuple[str, str], Tensor] = {}  # by network and head
        self._numbers: dict[Left, Tensor] = {}

    def _of_rows(self, like: Tensor) -> Tensor:
        return torch.zeros(self.rows, *like.shape[1:], dtype=like.dtype, device=like.device)

    def fits(self, group: Group, teacher: Sequence[Outputs] | None) -> bool:
        """Returns whether a group's samples have a place here."""
        own, theirs = (
            [None if x is None else (x.shape[1:], x.dtype) for x in b[:4]] for b in (self.batch, group.batch)
        )
        outputs = teacher[0] if teacher is not None else Outputs(self.heads, self.features)
        parts = zip((self.heads, self.features), (outputs.heads, outputs.features), strict=True)
        shapes = lambda part: {k: (v.shape[1:], v.dtype) for k, v in part.items()}  # noqa: E731
        small = sum(group.sizes) <= self.rows and len(group.sizes) <= self.minibatches
        return small and own == theirs and all(shapes(a) == shapes(b) for a, b in parts)

    def fill(self, batch: Batch) -> None:
        """Writes the samples of a group, and has the next step read from the first one on."""
        self._place.zero_()
        self._at = (0, 0)
        for whole, given in zip(self.batch[:4], batch[:4], strict=True):
            if whole is not None:
                whole[: len(given)].copy_(given)

    def fill_outputs(self, teacher: Sequence[Outputs]) -> None:
        """Writes the teacher's outputs for the minibatches of a group."""
        for part, of in ((self.heads, lambda o: o.heads), (self.features, lambda o: o.features)):
            for name, whole in part.items():
                parts = [of(outputs)[name] for outputs in teacher]
                torch.cat(parts, out=whole[: sum(map(len, parts))])

    def keep_heads(self, heads: Mapping[str, Tensor]) -> None:
        """Writes the teacher's heads for the first samples, from a forward over all of them."""
        for name, head in heads.items():
            if name not in self.heads:
                self.heads[name] = self._of_rows(head)
            self.heads[name][: len(head)].copy_(head)

    def samples(self, count: int) -> Batch:
        """Returns the first samples, as views."""
        return _each(lambda x: x[:count], self.batch)

    def place(self, start: int, minibatch: int) -> None:
        """Has the next step read from this sample and minibatch on; nothing is launched where the last one ended there."""
        if self._at != (start, minibatch):
            self._place[0].fill_(start)
            self._place[1].fill_(minibatch)

    def moved(self, start: int, minibatch: int) -> None:
        """Notes where the step that was launched last has moved the place to."""
        self._at = (start, minibatch)

    # -- within a step -----------------------------------------------------------------------------------------------

    def minibatch(self, size: int) -> tuple[Batch, Outputs | None, Tensor]:
        """Returns the next minibatch, the teacher's outputs for it if they are known, and the places of its samples (size,).

        They are the same tensors for each minibatch of a size.
        """
        rows = self._place[0] + self._range[:size]
        if size not in self._minis:
            batch = _each(lambda x: torch.empty_like(x[:size]), self.batch)
            heads, features = (
                {k: torch.empty_like(v[:size]) for k, v in x.items()} for x in (self.heads, self.features)
            )
            move = torch.ones_like(self._place)
            move[0].fill_(size)
            self._minis[size] = batch, Outputs(heads, features, batch.ids) if heads else None, move
        batch, teacher, _ = self._minis[size]
        pairs: list[tuple[Any, Any]] = list(zip(batch[:4], self.batch[:4], strict=True))
        for part, whole in ((teacher.heads, self.heads), (teacher.features, self.features)) if teacher else ():
            pairs += [(part[name], whole[name]) for name in part]
        for mini, every in pairs:
            if mini is not None:
                torch.index_select(every, 0, rows, out=mini)
        return batch, teacher, rows

    def leave(self, seen: Seen, rows: Tensor, own_teacher: bool) -> Left:
        """Writes what is measured of a step to its places, and moves the place on; `own_teacher`: whether the step computed
        the teacher's outputs."""
        computed = seen.teacher if own_teacher else None
        left = Left(
            tuple(seen.terms),
            tuple(seen.watched),
            tuple(seen.student.heads),
            tuple(computed.heads) if computed is not None else None,
        )
        numbers = torch.stack([x.detach().float().reshape(()) for x in (*seen.terms.values(), *seen.watched.values())])
        if left not in self._numbers:
            self._numbers[left] = numbers.new_zeros(self.minibatches, len(numbers))
        self._numbers[left].index_copy_(0, self._place[1:], numbers[None])
        for who, outputs in (("student", seen.student), ("teacher", computed)):
            for name, head in (outputs.heads if outputs is not None else {}).items():
                if (who, name) not in self._left:
                    self._left[who, name] = self._of_rows(head)
                self._left[who, name].index_copy_(0, rows, head.detach())
        self._place.add_(self._minis[len(rows)][2])
        return left

    # -- after the steps of a group ----------------------------------------------------------------------------------

    def seen(self, left: Left, samples: slice, minibatches: slice) -> Seen:
        """Returns what steps have left: numbers (minibatches,), heads of all their samples; but for the student's, copies."""
        numbers = self._numbers[left][minibatches].clone().unbind(1)
        named = dict(zip((*left.terms, *left.watched), numbers, strict=True))
        student = Outputs({name: self._left["student", name][samples] for name in left.student})
        teacher = Outputs({name: head[samples].clone() for name, head in self.heads.items()}) if self.heads else None
        if left.teacher is not None:
            teacher = Outputs({name: self._left["teacher", name][samples].clone() for name in left.teacher})
        return Seen(
            {name: named[name] for name in left.terms},
            student,
            teacher,
            self.batch.targets[samples].clone(),
            samples.stop - samples.start,
            {name: named[name] for name in left.watched},
        )


def _each(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    inputs, targets, ids, views = (None if x is None else function(x) for x in batch[:4])
    return Batch(inputs, targets, ids, views)
