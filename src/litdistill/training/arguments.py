"""The arguments of `distill`: refused in a line where they have no sense, before anything is run."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import Dataset, IterableDataset

from litdistill.distillation.distiller import Distiller
from litdistill.distillation.dry_run import check_network
from litdistill.tasks.base import Task
from litdistill.utils.errors import UserError
from litdistill.utils.shapes import described

OWN = {"max_epochs": "max_epochs", "callbacks": "callbacks", "default_root_dir": "out"}  # of the Trainer, by name here
ABOUT_THE_OPTIMIZER = ("lr", "learning_rate", "weight_decay", "momentum")


def check_arguments(
    student: object,
    train: Any,
    val: Any,
    max_epochs: object,
    callbacks: object,
    trainer: object,
    options: Mapping[str, Any],
) -> None:
    """Raises `UserError` for a student that is no network, data that are no loader, several loaders, two validation sets, and
    arguments that there are not or that are of another type."""
    check_network(student, "student")
    check_options(options)
    for name, loader in {"train": train, "val": val}.items():
        if isinstance(loader, (list, tuple, dict)):
            raise UserError(
                f"{name} is a {type(loader).__name__}, which Lightning takes for several loaders: give one DataLoader."
            )
        if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
            raise UserError(
                f"{name} is a data set, whose items are single samples: give DataLoader({name}, batch_size=32"
                f"{', shuffle=True' if name == 'train' else ''})."
            )
    if isinstance(train, LightningDataModule) and val is not None:
        raise UserError("A data module brings its own validation loader: leave val out.")
    if type(max_epochs) is not int or max_epochs < -1:
        raise UserError(f"max_epochs={max_epochs!r} has to be a whole number of epochs; -1: no limit.")
    if not isinstance(callbacks, Sequence) or not all(isinstance(c, Callback) for c in callbacks):
        raise UserError(f"callbacks={described(callbacks)}: give a list of Lightning's callbacks, callbacks=[…].")
    if isinstance(trainer, Trainer):
        raise UserError(
            "distill makes its Trainer, of arguments: trainer={'max_steps': 100, …}. A Trainer of your own takes a Distiller: "
            "trainer.fit(Distiller(student, KD(), teacher, example=batch), train, val)."
        )
    if not isinstance(trainer, Mapping):
        raise UserError(
            f"trainer={described(trainer)}: give arguments of Lightning's Trainer, trainer={{'max_steps': 100}}."
        )
    for name in OWN.keys() & trainer.keys():
        raise UserError(f"trainer={{{name!r}: …}}: give distill({OWN[name]}=…) instead.")


def check_options(options: Mapping[str, Any]) -> None:
    """Raises `UserError` for an argument that neither `distill` nor `Distiller` has."""
    known = [*inspect.signature(Distiller).parameters, "max_epochs", "out", "callbacks", "trainer", "train", "val"]
    of_trainer = inspect.signature(Trainer).parameters
    for name in options:
        if name in known:
            continue
        near = difflib.get_close_matches(name, known, 1)
        remedy = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
        if name in of_trainer:
            remedy = f"it is one of Lightning's Trainer: trainer={{{name!r}: …}}."
        elif name in ABOUT_THE_OPTIMIZER:
            remedy = f"give it to the optimizer: optimizer=functools.partial(torch.optim.Adam, {name}=…)."
        raise UserError(f"distill has no argument {name}: {remedy}")


def keeper(
    callbacks: Sequence[Callback], folder: Path, task: Task, trainer: Mapping[str, Any]
) -> ModelCheckpoint | None:
    """Returns the callback that keeps the best epoch, in `folder`: the user's own where Lightning could not tell it from that;
    None where the Trainer is to write no checkpoints."""
    if trainer.get("enable_checkpointing") is False or trainer.get("barebones"):
        return None
    metric, mode = task.monitor
    ours = ModelCheckpoint(folder, "best", f"val/{metric}", mode=mode, enable_version_counter=False)
    return next((c for c in callbacks if isinstance(c, ModelCheckpoint) and c.state_key == ours.state_key), ours)
