"""A last minibatch of one sample, which networks with batch normalization on maps of 1x1 cannot be trained on.

Such a layer normalizes by the deviation over samples and pixels, and one value has none. Where the student, or a layer of the
method, is of that kind, the samples of such a minibatch are left out of the epoch. They are others in each epoch, as each has
its own order. Of a stranger's loader nothing can be left out: it is refused before the first step.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from litdistill.data.loading import trained_samples
from litdistill.data.protocol import IndexedData
from litdistill.distillation.inference import NORMS
from litdistill.methods.base import Method
from litdistill.tasks.base import Task
from litdistill.types import Batch
from litdistill.utils.errors import UserError

log = logging.getLogger(__name__)
NO_DEVIATION = "Expected more than 1 value per channel"  # torch.nn.functional.batch_norm's words


def require_two_samples(student: Callable[[], nn.Module], data: IndexedData, task: Task, several: bool) -> None:
    """Sets `data.smallest_batch` to 2 where an epoch may end with one sample and the student cannot be trained on it.

    Must be called before anything counts the steps of an epoch. `student`: returns the network, and is called only where it
    matters. `several`: whether the run may have several processes, whose parts may be of one sample.
    """
    ends_with_one = data.batch_size == 1 or (data.epoch_size or len(data.train_ids)) % data.batch_size == 1
    if hasattr(data, "smallest_batch") and (ends_with_one or several):
        views = torch.zeros(1, dtype=torch.int64) if data.draws_views else None
        if fails_on_one(student(), data.get_batch("train", data.train_ids[:1], views), task):
            data.smallest_batch = 2


def say_what_is_left_out(data: IndexedData, method: Method, processes: int) -> None:
    """Logs how many samples of each epoch are left out. Raises `UserError` where an epoch has no other.

    Layers of batch normalization that are the method's own take two samples as well, whatever their maps.
    """
    if hasattr(data, "smallest_batch") and any(isinstance(module, NORMS) for module in method.modules()):
        data.smallest_batch = 2
    count, smallest = data.epoch_size or len(data.train_ids), getattr(data, "smallest_batch", 1)
    kept = trained_samples(count, data.batch_size, processes, smallest)
    if kept == 0 or data.batch_size < smallest:
        raise UserError(
            f"Batch normalization of the student or of the method takes two samples in each process: {count} training "
            f"samples in minibatches of {data.batch_size} leave none with two. Set data.batch_size to 2 or more, and train on "
            "more samples."
        )
    if kept < count:
        log.info(
            "The last %d of the %d samples of each epoch are left out, others every time: a batch of one has no deviation for "
            "batch normalization.",
            *(count - kept, count),
        )


def refuse_single(student: Callable[[], nn.Module], loader: Any, example: Batch, task: Task) -> None:
    """Raises `UserError` for a DataLoader that ends with one sample, on which the student cannot be trained.

    `student`: as of `require_two_samples`. `example`: a batch of the loader.
    """
    if not isinstance(loader, DataLoader) or not loader.batch_size or loader.drop_last:
        return
    try:
        count = len(loader.dataset)  # type: ignore[arg-type]
    except TypeError:
        return
    inputs, targets = example.inputs, example.targets
    if count % loader.batch_size != 1 or not isinstance(inputs, Tensor) or not isinstance(targets, Tensor):
        return
    if fails_on_one(student(), example._replace(inputs=inputs[:1], targets=targets[:1]), task):
        raise UserError(
            f"The training loader's last batch has one sample ({count} in batches of {loader.batch_size}), and the student's "
            "batch normalization takes two: give DataLoader(drop_last=True), or another batch_size."
        )


def fails_on_one(net: nn.Module, batch: Batch, task: Task) -> bool:
    """Returns whether batch normalization refuses this one sample; the network and random generators stay as they are."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            task.forward(copy.deepcopy(net).train(), batch, True)
        except ValueError as error:
            return NO_DEVIATION in str(error)
        except RuntimeError:  # whatever else is wrong is reported where it is trained
            return False
    return False
