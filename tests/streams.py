"""Folders and shards of small images, and what a trainer sees of them, shared by the tests of streaming."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from PIL import Image

from litdistill.data import shards
from litdistill.data.augment import Crop, Flip
from litdistill.data.datamodule import ImageData
from litdistill.data.streaming import Encoded


@pytest.fixture(scope="session", name="root")
def root_fixture(tmp_path_factory) -> Path:
    """Three classes of 20 and 5 images of various sizes, some gray, some JPEG."""
    return images(tmp_path_factory.getbasetemp() / "images")


@cache
def images(folder: Path) -> Path:
    draw = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 5)):
        for label in "abc":
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                shape = (10 + i % 4, 13 - i % 5) if i % 6 == 0 else (10 + i % 4, 13 - i % 5, 3)
                image = Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8))
                image.save(folder / split / label / f"{i:02}.{'jpg' if i % 3 else 'png'}")
    return folder


@pytest.fixture(scope="session", name="sharded")
def sharded_fixture(root, tmp_path_factory) -> Path:
    pytest.importorskip("litdata")
    return written(root, tmp_path_factory.getbasetemp() / "shards")


@cache
def written(root: Path, out: Path) -> Path:
    shards.write(root, out, chunk_bytes=4000)
    assert len(list((out / "train").glob("*.bin"))) > 3
    return out


def data(place: Path, resident: bool, name: str = "folder", **options) -> ImageData:
    options = {"augment": [Crop(1), Flip()], "batch_size": 8, "workers": 2, "eval_batch_size": 7} | options
    found = ImageData(name, place, image_size=9, val_size=0.2, resident=resident, **options)
    found.setup()
    assert isinstance(found.source.train.images, Encoded) is not resident
    return found


class Recorder(LightningModule):
    """Keeps all that a step gets; `stop`: the number of the step before which it raises."""

    def __init__(self, stop: int = -1):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.got, self.stop = [], stop

    def training_step(self, batch, batch_idx):
        if len(self.got) == self.stop:
            raise KeyboardInterrupt
        views = batch.views.tolist() if batch.views is not None else None
        self.got.append((batch.inputs.numpy().tobytes(), batch.targets.tolist(), batch.ids.tolist(), views))
        return self.weight * 1.0

    def validation_step(self, batch, batch_idx):
        self.got.append((batch.inputs.numpy().tobytes(), batch.targets.tolist(), batch.ids.tolist(), None))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(found: ImageData, tmp_path: Path) -> list:
    model = Recorder()
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(model, datamodule=found)
    return model.got


def same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for one, other in zip(a, b, strict=True)
        for x, y in zip(one, other, strict=True)
    )
