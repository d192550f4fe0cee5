"""A training step of several minibatches: Lightning's own cost a step is paid once for all of them.

What users and callbacks see keeps its meaning: the counts that `global_step`, `batch_idx`, logging, checkpoints and a
resume go by advance with every minibatch, callbacks are called around every minibatch, schedules step at the end of the
epoch. It follows `_TrainingEpochLoop.advance` of Lightning, which does the same around a single one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from litdistill.data.datamodule import Batch
from litdistill.types import Outputs

if TYPE_CHECKING:
    from litdistill.distillation.distiller import Distiller


def train_window(module: Distiller, window: Batch, first: int) -> Tensor:
    """Optimises on the minibatches of `window` one after the other; `first` is the index of the first in its epoch.

    Gives the loss of the last one. Lightning begins the first of them; after the last it calls `end_window`.
    """
    trainer = module.trainer
    loop, optimizer = trainer.fit_loop.epoch_loop, module.optimizers()
    parts = list(minibatches(window))[window.skip :]
    taught = module.taught_ahead(window)
    for i, batch in enumerate(parts):
        if i:
            _begin(module, batch, first + i)
        if window.sizes is not None:  # else Lightning has seen what the loader has left
            loop.batch_progress.is_last_batch = loop.batch_progress.current.ready == trainer.num_training_batches
        loss = module.loss(batch, taught[window.skip + i] if taught else None)
        optimizer.zero_grad()  # type: ignore[union-attr]
        module.manual_backward(loss)
        if module.gradient_clip_val is not None:
            module.clip_gradients(optimizer, module.gradient_clip_val, module.gradient_clip_algorithm)  # type: ignore[arg-type]
        optimizer.step()  # type: ignore[union-attr]
        if loop._num_ready_batches_reached():
            for scheduler in (config.scheduler for config in trainer.lr_scheduler_configs):
                scheduler.step()
        loop.batch_progress.increment_processed()
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            callback.on_train_batch_end(trainer, module, {"loss": loss.detach()}, batch, first + i)
        if i + 1 == len(parts) or loop._is_training_done or loop.done:
            break
        loop.batch_progress.increment_completed()
        loop._batches_that_stepped += 1  # the x-axis of what is logged
    # Lightning is about to end the last one too: to count it, and to call the callbacks, with the index of the first.
    for progress in (loop.batch_progress.current, loop.batch_progress.total):
        progress.processed -= 1  # type: ignore[attr-defined]
    module.called, trainer.callbacks = trainer.callbacks, []  # type: ignore[attr-defined]
    return loss.detach()


def end_window(module: Distiller) -> None:
    """Gives the callbacks back, which have been called already; called by Lightning where it has called them."""
    if module.called is not None:
        module.trainer.callbacks, module.called = module.called, None  # type: ignore[attr-defined]


def minibatches(window: Batch) -> Iterator[Batch]:
    """The minibatches of a window, as views of its tensors."""
    sizes = window.sizes or (len(window.images),)
    start = 0
    for size in sizes:
        rows = slice(start, start + size)
        ids, views = (None if x is None else x[rows] for x in (window.ids, window.views))
        yield Batch(window.images[rows], window.targets[rows], ids, views)
        start += size


def split(outputs: Outputs, sizes: tuple[int, ...]) -> list[Outputs]:
    """What a network gave for a window, by minibatch."""
    logits = outputs.logits.split(sizes)
    features = {k: v.split(sizes) for k, v in outputs.features.items()}
    ids = outputs.ids.split(sizes) if outputs.ids is not None else [None] * len(sizes)
    return [Outputs(logits[i], {k: v[i] for k, v in features.items()}, ids[i]) for i in range(len(sizes))]


def _begin(module: Distiller, batch: Batch, index: int) -> None:
    trainer, progress = module.trainer, module.trainer.fit_loop.epoch_loop.batch_progress
    progress.increment_ready()
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        callback.on_train_batch_start(trainer, module, batch, index)
    progress.increment_started()
