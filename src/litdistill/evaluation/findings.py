"""Whether a student is far better on its training samples than on others: learned by heart, or others of another kind."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import nn

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
    trained = predict_split(student, _Some(data, len(targets)), "train", device, task)
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


class _Some:
    """A data module whose training split is `count` of its samples in random order; whole batches of a stranger's loader."""

    def __init__(self, data: Any, count: int):
        self.data, self.count = data, count

    def batches(self, split: str, device: torch.device | str = "cpu") -> Iterator[Batch]:
        """Yields batches of the training samples."""
        data = self.data
        if isinstance(data, ForeignData):
            yield from islice(data.batches(split, device), -(-self.count // max(1, data.batch_size)))
            return
        ids, targets = aug.order(0, 0, data.train_ids), data.train_targets
        if targets.ndim == 1 or targets.is_floating_point():
            ids = ids[has_label(targets[ids])]
        ids = ids[: self.count]
        for chunk in ids.split(data.batch_size):
            yield data.get_batch(split, chunk.to(device), None)
