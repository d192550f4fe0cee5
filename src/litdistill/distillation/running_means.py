"""Running means of losses and scores while training: summed for several minibatches at once, read only at a log."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from litdistill.tasks.base import Task
from litdistill.types import Outputs, has_label

AT_ONCE = 16  # minibatches summed together: a dozen small operations for each would cost as much as an optimizer's step
VALUES = 2**22  # numbers of one network's outputs that are held for that at most: those of sequences are many


class Seen(NamedTuple):
    """What is measured of a minibatch in training; see `RunningMeans.add`."""

    terms: Mapping[str, Tensor]  # of the loss by name, weighted: a scalar, or one of each of several minibatches
    student: Outputs
    teacher: Outputs | None
    targets: Tensor
    samples: int
    watched: Mapping[str, Tensor] = MappingProxyType({})  # what the method wants to be seen (`Method.watched`)


class RunningMeans:
    """Means since the last log: of the loss and its terms over minibatches, of scores and agreement over samples
    (or the places of sequences).

    The mean loss of an epoch is kept beside them, since an epoch may have no log or several.
    """

    def __init__(self, task: Task, labels: str = "all"):
        self.task, own = task, type(task)
        self.labels = labels  # "all", "some" or "none": which samples have a label, a target of -1 being none
        # Dense heads are large: those of a task without scores are neither copied nor held.
        self.scored = own.scores is not Task.scores or own.agreement is not Task.agreement
        self.reset()
        self.start_epoch()

    def reset(self) -> None:
        """Clears all sums and restarts the timer."""
        self.steps = self.samples = 0
        self.teacher_s = 0.0  # seconds spent in the teacher (on a GPU: in launching its kernels)
        self._started = time.perf_counter()
        self._noted: list[tuple[dict[str, Tensor], Outputs, Outputs | None, Tensor]] = []
        self._noted_steps = 0
        self._sums: dict[str, Tensor] = {}
        self._values = 0  # numbers in the heads that are noted
        self._counts: dict[
            str, int
        ] = {}  # of the scores: samples, or places of sequences; of what is watched: minibatches
        self._labeled: Tensor | int = 0  # samples with a label
        self._of_labels: set[str] = set()  # scores, of samples with a label alone

    def start_epoch(self) -> None:
        """Clears the mean loss of an epoch, which `reset` keeps."""
        self._epoch_sum: Tensor | None = None
        self._epoch_steps = 0

    def epoch_loss(self) -> Tensor | None:
        """Returns the mean loss of the minibatches since `start_epoch`, a scalar on the device; None without any."""
        if self._noted:
            self._sum()
        return None if self._epoch_sum is None else self._epoch_sum / self._epoch_steps

    @property
    def elapsed(self) -> float:
        """Returns the seconds since the last log."""
        return time.perf_counter() - self._started

    def add(self, seen: Seen, steps: int = 1) -> None:
        """Adds a minibatch, or several as one whose tensors are joined."""
        terms, student, teacher, targets, samples, watched = seen
        for name, value in watched.items():
            self._counts[name] = self._counts.get(name, 0) + steps
            self._add(name, value.detach().float().sum())
        # A CUDA graph overwrites the heads.
        heads = {name: head.detach().clone() for name, head in student.heads.items()} if self.scored else {}
        # Its features are large, and read no more.
        teacher = teacher._replace(features={}) if self.scored and teacher is not None else None
        self._noted.append(({k: v.detach() for k, v in terms.items()}, Outputs(heads), teacher, targets))
        self._noted_steps += steps
        self.steps += steps
        self.samples += samples
        self._values += sum(head.numel() for head in heads.values())
        if self._noted_steps >= AT_ONCE or self._values > VALUES:
            self._sum()

    @torch.no_grad()
    def _sum(self) -> None:
        noted, steps = self._noted, self._noted_steps
        self._noted, self._noted_steps, self._values = [], 0, 0
        for name in dict.fromkeys(name for terms, *_ in noted for name in terms):
            value = torch.cat([terms[name].float().reshape(-1) for terms, *_ in noted if name in terms]).sum()
            self._add(name, value)
            self._epoch_sum = value if self._epoch_sum is None else self._epoch_sum + value
        self._epoch_steps += steps
        if not self.scored:
            return
        student, targets = _joined([s for _, s, _, _ in noted]), torch.cat([t for *_, t in noted])
        by_sample = self._scores(student, targets)
        teacher = [t for _, _, t, _ in noted if t is not None]
        if len(teacher) == len(noted) and self.task.measures(teacher[0]):
            by_sample |= self.task.agreement(student, _joined(teacher))
        for name, values in by_sample.items():
            self._counts[name] = self._counts.get(name, 0) + len(values)
            self._add(name, values.float().sum())

    def _scores(self, student: Outputs, targets: Tensor) -> dict[str, Tensor]:
        if self.labels != "some":
            return self.task.scores(student, targets) if self.labels == "all" else {}
        labeled = has_label(targets)
        self._labeled = self._labeled + labeled.sum()
        scores = self.task.scores(student, targets)
        self._of_labels.update(scores)
        return {name: torch.where(labeled, values, 0) for name, values in scores.items()}

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def _count(self, name: str) -> Tensor | int:
        if name in self._of_labels:
            return self._labeled
        return self._counts.get(name, self.steps)

    def means(self) -> dict[str, Tensor]:
        """Returns the means by name, scalars on the device; `loss` is the sum of the terms. Empty without minibatches."""
        if self._noted:
            self._sum()
        found = {k: v / self._count(k) for k, v in self._sums.items()}
        terms = [v for k, v in found.items() if k not in self._counts]
        return {"loss": torch.stack(terms).sum(), **found} if terms else found


def _joined(outputs: list[Outputs]) -> Outputs:
    """Returns the heads of several minibatches, concatenated."""
    return Outputs({name: torch.cat([o.heads[name] for o in outputs]) for name in outputs[0].heads})
