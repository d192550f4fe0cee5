"""Distillation in one call from Python: `distill(student, teacher, train, val, method=KD())`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback, ProgressBar
from torch import nn

from litdistill.config.distiller import example_batch, train_labels
from litdistill.data.foreign import first_batch, offers, transferred
from litdistill.data.protocol import IndexedData, as_indexed, training_labels
from litdistill.distillation.distiller import Clip, Distiller, OptimizerFactory
from litdistill.distillation.dry_run import check_network
from litdistill.distillation.outputs_tables import OutputsFile
from litdistill.distillation.recorded import RecordedTeacher
from litdistill.evaluation.evaluate import load_weights_of
from litdistill.evaluation.predictions import measure
from litdistill.methods.base import Method
from litdistill.methods.kd import KD
from litdistill.methods.supervised import Supervised
from litdistill.tasks import named_task
from litdistill.tasks.base import Task
from litdistill.tasks.findings import report_findings
from litdistill.training.arguments import check_arguments, keeper
from litdistill.training.callbacks import EpochLogger
from litdistill.training.grouping import (
    GROUP,
    GroupedData,
    Layout,
    group_size,
    log_interval,
    reason_for_single,
    without_rate_monitor,
)
from litdistill.training.last_batch import (
    refuse_single,
    require_two_samples,
    say_what_is_left_out,
)
from litdistill.training.precision import precision_of
from litdistill.training.refusals import lightning_refusals
from litdistill.training.trainer import progress_bar
from litdistill.types import Batch
from litdistill.utils.checkpoint import AtomicCheckpointIO
from litdistill.utils.logging import without_notes

log = logging.getLogger(__name__)


@without_notes()
def distill(
    student: nn.Module,
    teacher: nn.Module | OutputsFile | None,
    train: Any,
    val: Any = None,
    method: Method | None = None,
    task: Task | str = "classification",
    max_epochs: int = 10,
    out: str | Path = "runs/distill",
    optimizer: OptimizerFactory = torch.optim.Adam,
    callbacks: Sequence[Callback] = (),
    trainer: dict[str, Any] | None = None,
    **options: Any,
) -> Distiller:
    """Distills `teacher` into `student`, and returns the Distiller with the best weights on the validation set.

    Args:
        student, teacher: any modules that the task can run; without a teacher the student is trained on labels only. A teacher
            may be a file of outputs by sample, `read_outputs("teacher.npz")`; loaders of your own then yield dicts with `ids`.
        train, val: loaders whose batches the task accepts, or a LightningDataModule as `train` and no `val`.
        method: the distillation method: `KD()` by default, `Supervised()` without a teacher.
        task: "classification", "multilabel", "regression", "language_model", or a `Task` of your own.
        out: the folder of checkpoints and of TensorBoard's curves.
        optimizer: creates the optimizer from the parameters. callbacks: Lightning's or your own.
        trainer: more arguments of Lightning's Trainer. options: more arguments of `Distiller`.

    `.deployed_student` of the result is the network to deploy, in eval mode, on the CPU. Raises `UserError` for bad arguments.
    """
    task, module = named_task(task), train if isinstance(train, LightningDataModule) else None
    check_arguments(student, train, val, max_epochs, callbacks, trainer or {}, options)
    student.cpu()  # the device of the example; the Trainer moves the networks
    example, data = prepared(train, module)
    check_last_batch(student, train, data, task, example, trainer or {})
    arguments = trainer_arguments(log_interval(max_epochs, max_epochs * batches_of_epoch(train, data)), trainer or {})
    layout = Layout(0, arguments["log_every_n_steps"])
    if data is not None:
        options = {"data": data, "train_targets": train_labels(data), "seed": 0, **options}
        if reason_for_single(arguments, callbacks) is None:
            layout, callbacks = layout._replace(group=GROUP), without_rate_monitor(callbacks)
            clip = arguments.pop("gradient_clip_val", None), arguments.pop("gradient_clip_algorithm", None) or "norm"
            options, arguments["log_every_n_steps"] = {"clip": Clip(*clip), **options}, 1
    options = {"labels": training_labels(module), **options} if module is not None else options
    chosen = method or (KD() if teacher is not None else Supervised())
    teacher = on_cpu(teacher, task, data)
    distiller = Distiller(student, chosen, teacher, example, task, optimizer, group=layout.group, **options)
    validated = val is not None if module is None else offers(module, "val")
    best = keeper(callbacks, Path(out), task, arguments) if validated else None
    kept = [best] if best is not None and best not in callbacks else []
    shown = [EpochLogger(), *progress_bar(), *kept, *callbacks]
    fitted = make_trainer(shown, max_epochs, out, best is not None, data is None, arguments)
    if data is not None:
        say_what_is_left_out(data, chosen, fitted.world_size)
        grouped = layout._replace(group=group_size(distiller, data, layout.group)) if layout.group else layout
        module = GroupedData(data, grouped, recorder=distiller.recorder)
    with lightning_refusals():
        fitted.fit(distiller, train if module is None else None, val, module)
    if best is not None and best.best_model_path:
        load_weights_of(distiller, Path(best.best_model_path))
    warn(distiller, (data or Validation(val, module, task)) if validated else None, fitted.strategy.root_device)
    return distiller.eval().cpu()


def trainer_arguments(log_every: int, given: dict[str, Any]) -> dict[str, Any]:
    """Returns arguments of Lightning's Trainer: one device, and `given` over it."""
    arguments = {"accelerator": "auto", "devices": 1, "log_every_n_steps": log_every, **given}
    if "plugins" not in arguments:  # which may be about precision
        arguments["precision"] = precision_of({"precision": "auto", **arguments})
    return arguments


def on_cpu(teacher: nn.Module | OutputsFile | None, task: Task, data: IndexedData | None) -> nn.Module | None:
    """Returns the teacher on the CPU; for a file of outputs the module that looks them up."""
    if isinstance(teacher, OutputsFile):
        return RecordedTeacher(teacher, task, data)
    if teacher is not None:
        check_network(teacher, "teacher")
    return None if teacher is None else teacher.cpu()


class Validation:
    """The validation batches of a loader, or of a data module without sample ids, as `predict_split` reads them."""

    class_names = ()

    def __init__(self, loader: Any, module: LightningDataModule | None, task: Task):
        self.loader, self.module, self.task = loader, module, task

    def batches(self, split: str, device: torch.device | str = "cpu") -> Iterator[Batch]:
        """Yields the batches, on the device."""
        module = self.module or LightningDataModule()
        for raw in self.loader if self.module is None else module.val_dataloader():
            yield self.task.batch(transferred(module, raw, torch.device(device)))


def warn(distiller: Distiller, data: Any, device: torch.device) -> None:
    """Logs a warning for all that `judge` finds in the student's predictions for the validation set; None without one."""
    if data is None:
        return
    try:
        found = measure(distiller.deployed_student, None, data, distiller.task, "val", device)["findings"]
    except Exception as error:  # a task without logits, a loader that is read once: the training is finished
        log.warning("The student is not judged: %s: %s", type(error).__name__, error)
    else:
        report_findings(found)


def make_trainer(
    callbacks: list[Callback], max_epochs: int, out: str | Path, checkpoints: bool, sampler: bool, more: dict[str, Any]
) -> Trainer:
    """Returns Lightning's Trainer. `sampler`: whether it divides the samples among processes. `more`: further arguments."""
    settings: dict[str, Any] = {
        "max_epochs": max_epochs,
        "default_root_dir": str(out),
        "callbacks": callbacks,
        "plugins": [AtomicCheckpointIO()],
        "enable_model_summary": False,
        "enable_checkpointing": checkpoints,
        "enable_progress_bar": any(isinstance(c, ProgressBar) for c in callbacks),
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": sampler,
    }
    if more.get("barebones"):  # nothing beside the training itself; Lightning refuses what else there is
        settings = {k: settings[k] for k in ("max_epochs", "default_root_dir", "use_distributed_sampler")}
        settings["callbacks"] = [c for c in callbacks if not isinstance(c, (ProgressBar, EpochLogger))]
        more = {k: v for k, v in more.items() if k != "log_every_n_steps"}
    with lightning_refusals():
        return Trainer(**{**settings, **more})


def check_last_batch(
    student: nn.Module, train: Any, data: IndexedData | None, task: Task, example: Any, trainer: dict[str, Any]
) -> None:
    """Has a last minibatch of one sample left out, or refuses it, where the student cannot be trained on it."""
    if data is not None:
        require_two_samples(lambda: student, data, task, trainer.get("devices", 1) != 1)
    else:
        loader = train.train_dataloader() if isinstance(train, LightningDataModule) else train
        refuse_single(lambda: student, loader, task.batch(example), task)


def batches_of_epoch(train: Any, data: IndexedData | None) -> int:
    """Returns the number of minibatches of an epoch in one process; 1000 where the loader does not say."""
    if data is not None:
        return -(-(data.epoch_size or len(data.train_ids)) // data.batch_size)
    try:
        return len(train)
    except TypeError:  # a data module, or a loader without length
        return 1000


def prepared(train: Any, module: LightningDataModule | None) -> tuple[Any, IndexedData | None]:
    """Returns a first batch, of two samples where the data has ids; and the data with ids, None for any other."""
    if module is None:
        return first_batch(train), None
    module.prepare_data()
    module.setup("fit")
    data = as_indexed(module)
    return (first_batch(module.train_dataloader(), module) if data is None else example_batch(data)), data
