"""Small networks, data and Trainers for tests of the engine, without Hydra."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from torch import Tensor, nn

from litdistill.data.datamodule import ImageData
from litdistill.distillation.distiller import Distiller
from litdistill.models.preprocess import Preprocess, Preprocessed
from litdistill.models.small import conv4
from litdistill.training.grouping import GroupedData, Layout
from litdistill.types import Batch


def net(width: int = 8, seed: int = 0) -> nn.Module:
    """A ConvNet for digits of 8x8 pixels, which normalizes them itself."""
    torch.manual_seed(seed)
    return Preprocessed(conv4(10, (1, 8, 8), widths=[width, width]), Preprocess([0.3], [0.35]))


def digits(**options: Any) -> ImageData:
    """Three batches of 40 digits an epoch, unless options say otherwise."""
    data = ImageData("digits", **{"per_class": 12, "batch_size": 40, **options})
    data.setup()
    return data


def example(data: ImageData) -> Batch:
    """Two training samples."""
    return data.get_batch("train", data.train_ids[:2])


def quiet_trainer(folder: Path, **options: Any) -> Trainer:
    """A Trainer on the CPU that prints and writes nothing of its own accord but checkpoints."""
    settings = {
        "accelerator": "cpu", "max_epochs": 2, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "default_root_dir": folder, "num_sanity_val_steps": 0, "log_every_n_steps": 1,
    }  # fmt: skip
    return Trainer(**(settings | options))


def fit(distiller: Distiller, data: Any, folder: Path, ckpt: Path | None = None, **options: Any) -> Trainer:
    """Trains on a data module or on (train, val) loaders."""
    trainer = quiet_trainer(folder, **options)
    if isinstance(data, tuple):
        trainer.fit(distiller, *data, ckpt_path=ckpt, weights_only=True)
    else:
        trainer.fit(distiller, datamodule=data, ckpt_path=ckpt, weights_only=True)
    return trainer


def grouped(data: ImageData, group: int, log_every: int = 0, recorder: Any = None) -> GroupedData:
    """The data in groups of minibatches; 0: one by one."""
    return GroupedData(data, Layout(group, log_every), recorder=recorder)


def logged(trainer: Trainer) -> list[dict[str, float]]:
    """The rows of a CSVLogger, without the measured speed."""
    with open(f"{trainer.logger.log_dir}/metrics.csv") as file:
        rows = [{k: v for k, v in row.items() if not k.startswith("speed/") and v} for row in csv.DictReader(file)]
    return [{k: float(v) for k, v in row.items()} for row in rows]


def same(a: dict[str, Tensor] | nn.Module, b: dict[str, Tensor] | nn.Module) -> bool:
    """Whether all weights are equal to the bit."""
    a, b = (x.state_dict() if isinstance(x, nn.Module) else x for x in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
