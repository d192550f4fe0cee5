"""Whether a student is far better on its training samples than on others: learned by heart, or others of another kind."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from litdistill.data import augment as aug
from litdistill.data.foreign import ForeignData
from litdistill.evaluation.predictions import measured, predict_split
from litdistill.tasks.base import Task
from litdistill.tasks.findings import Findings
from litdistill.types import Batch, has_label
from litdistill.utils.units import SHARES, named, quantity, shown

GAP = 0.2  # by how much a share (accuracy, …) on training samples may be above that on others
TIMES = 2.0  # by how many times an error on other samples may be above that on training samples

GAP_REMEDY = (
    "It knows its training samples by heart, or the others are of another kind: more of them or stronger augmentation "
    "(data.augment), fewer epochs or weight decay help against the first; look at some of both for the second."
)


def judge_gap(student: nn.Module, data: Any, task: Task, device: torch.device | str) -> Findings:
    """Returns whether a student is far better on training samples than on the validation set.

    Measured anew with the kept weights on both, in eval mode, on as many training samples as there are validation samples,
    without augmentation where samples have ids. A task without labels has nothing to learn by heart.
    """
    if not task.reads_labels:
        return {}
    outputs, targets = predict_split(student, data, "val", device, task)
    some = (
        _Some(data, len(targets)) if isinstance(data, ForeignData) else These(data, labeled_ids(data)[: len(targets)])
    )
    trained = predict_split(student, some, "train", device, task)
    name = task.monitor[0]
    val, train = (measured(task, *pair)[name] for pair in ((outputs, targets), trained))
    far = train - val > GAP if name in SHARES or name == "r2" else task.monitor[1] == "min" and val > TIMES * train
    if not far:
        return {}
    count = quantity(len(trained[1]), "training sample")
    return {
        "gap": f"The student's {named(name)} is {shown(name, train)} on {count}, and {shown(name, val)} on the validation set. "
        f"{GAP_REMEDY}"
    }


def labeled_ids(data: Any) -> Tensor:
    """Returns the ids of the training samples with a label, in random order."""
    ids, targets = aug.order(0, 0, data.train_ids), data.train_targets
    return ids[has_label(targets[ids])] if targets.ndim == 1 or targets.is_floating_point() else ids


class These:
    """A data module whose splits are these samples, without augmentation."""

    def __init__(self, data: Any, ids: Tensor):
        self.data, self.ids = data, ids

    def batches(self, split: str, device: torch.device | str = "cpu") -> Iterator[Batch]:
        """Yields batches of the samples."""
        for chunk in self.ids.split(self.data.batch_size):
            yield self.data.get_batch(split, chunk.to(device), None)


class _Some:
    """A stranger's data whose training split is whole batches of `count` samples at least."""

    def __init__(self, data: ForeignData, count: int):
        self.data, self.count = data, count

    def batches(self, split: str, device: torch.device | str = "cpu") -> Iterator[Batch]:
        """Yields the batches."""
        yield from islice(self.data.batches(split, device), -(-self.count // max(1, self.data.batch_size)))
