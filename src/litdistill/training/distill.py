"""Five lines of Python: `distill(student, teacher, train, val, method=KD())`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

from litdistill.config.distiller import example_batch, train_labels
from litdistill.data.foreign import first_batch
from litdistill.data.protocol import as_indexed
from litdistill.distillation.distiller import Clip, Distiller, OptimizerFactory
from litdistill.evaluation.evaluate import load_weights_of
from litdistill.methods.base import Method
from litdistill.methods.kd import KD
from litdistill.methods.supervised import Supervised
from litdistill.tasks import named_task
from litdistill.tasks.base import Task
from litdistill.training.callbacks import EpochLogger
from litdistill.training.grouping import GROUP, GroupedData, Layout, group_size, reason_for_single, without_rate_monitor
from litdistill.training.trainer import progress_bar
from litdistill.utils.checkpoint import AtomicCheckpointIO
from litdistill.utils.errors import UserError


def distill(
    student: nn.Module,
    teacher: nn.Module | None,
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
    """Trains `student` to follow `teacher`, and returns the Distiller with the best weights on the validation set.

    Args:
        student, teacher: any modules that the task can run; without a teacher the labels alone teach.
        train, val: loaders whose batches the task takes, or a LightningDataModule as `train` and no `val`.
        method: what is learnt from the teacher: `KD()` by default, `Supervised()` without a teacher.
        task: "classification", "multilabel", "regression", or a `Task` of your own.
        out: the folder of checkpoints and of TensorBoard's curves.
        optimizer: makes the optimizer from the parameters. callbacks: Lightning's or your own.
        trainer: more arguments of Lightning's Trainer. options: more of `Distiller`.

    The deployed network is `.deployed_student` of what is returned, in eval mode. Raises `UserError` for wrong input.
    """
    task, options = named_task(task), dict(options)
    module = train if isinstance(train, LightningDataModule) else None
    if module is not None and val is not None:
        raise UserError("A data module brings its own validation loader: leave val out.")
    if module is not None:
        module.prepare_data()
        module.setup("fit")
    data = as_indexed(module)
    if data is not None:
        example: Any = example_batch(data)
        options = {"data": data, "train_targets": train_labels(data), "seed": 0, **options}
    else:
        example = first_batch(train if module is None else module.train_dataloader())
    arguments = {"accelerator": "auto", "devices": 1, "log_every_n_steps": 50, **(trainer or {})}
    layout = Layout(0, arguments["log_every_n_steps"])
    if data is not None and reason_for_single(arguments, callbacks) is None:
        layout, callbacks = layout._replace(group=GROUP), without_rate_monitor(callbacks)
        options.setdefault("clip", Clip(arguments.pop("gradient_clip_val", None)))
        arguments["log_every_n_steps"] = 1
    chosen = method or (KD() if teacher is not None else Supervised())
    distiller = Distiller(
        student, chosen, teacher, example, task, optimizer, group=layout.group, **options
    )  # fmt: skip
    best = ModelCheckpoint(
        Path(out), "best", monitor=f"val/{task.monitor[0]}", mode=task.monitor[1], enable_version_counter=False
    )
    validated = module is not None or val is not None
    keeping: list[Callback] = [best] if validated else []
    fitted = Trainer(
        max_epochs=max_epochs,
        default_root_dir=str(out),
        callbacks=[EpochLogger(), *progress_bar(), *keeping, *callbacks],
        plugins=[AtomicCheckpointIO()],
        enable_model_summary=False,
        enable_checkpointing=validated,
        num_sanity_val_steps=0,
        use_distributed_sampler=data is None,
        **arguments,
    )
    if data is not None:
        grouped = layout._replace(group=group_size(distiller, data, layout.group)) if layout.group else layout
        fitted.fit(distiller, datamodule=GroupedData(data, grouped))
    elif module is not None:
        fitted.fit(distiller, datamodule=module)
    else:
        fitted.fit(distiller, train, val)
    if validated and best.best_model_path:
        load_weights_of(distiller, Path(best.best_model_path))
    distiller.eval()
    return distiller
