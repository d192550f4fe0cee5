"""Times a training step of a detector that learns from a live teacher, against a bare loop over torchvision's parts.

    python scripts/benchmark_detector_step.py
    python scripts/benchmark_detector_step.py --rounds 15 --steps 32

Both train the same student by the same teacher with the same losses (dense_kd) on the same scenes of digits in memory, flipped
at random, with the same fused AdamW, on one thread. They take turns in one process, every other round in reverse; figures are
process CPU time a step, and the median and the quartiles of each round's ratio. The bare loop is what one writes with
torchvision's backbone, head, anchor generator and `compute_loss`; it logs nothing. This project's step has the callbacks and
the TensorBoard log of a run, and asks its teacher in each step.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from benchmark import quartiles, quiet
from benchmark_parts import LOG_EVERY, Stopwatch
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.image_list import ImageList

from litdistill.data.augment import Flip
from litdistill.data.tensors import TensorData
from litdistill.distillation.distiller import Distiller
from litdistill.distillation.teacher import FrozenTeacher
from litdistill.distillation.teacher_cache import CacheOptions
from litdistill.models.preprocess import Preprocess, Preprocessed
from litdistill.tasks.detection import dense_losses as dense
from litdistill.tasks.detection.boxes import as_dicts
from litdistill.tasks.detection.dense_kd import DenseKD
from litdistill.tasks.detection.detector import Detector
from litdistill.tasks.detection.fcos import fcos_slim
from litdistill.tasks.detection.scenes import digit_scenes
from litdistill.tasks.detection.task import Detection
from litdistill.training.callbacks import EpochLogger
from litdistill.training.grouping import GROUP, GroupedData, Layout, group_size
from litdistill.training.preemption import GracefulStop

AIM = 1.15
STUDENT = {"width": 16, "fpn": 32, "convs": 1, "strides": [4, 8]}  # those of experiment=detection/digit_scenes
TEACHER = {"width": 48, "depth": 2, "fpn": 96, "strides": [4, 8]}
CLASSES, SHAPE = 10, (3, 64, 64)
BATCH, STEPS = 16, 32
OPTIMIZER = functools.partial(torch.optim.AdamW, lr=1e-3, fused=True)


class Clock:
    """Seconds of this process's CPU."""

    def clock(self) -> float:
        return time.process_time()


def scenes(count: int, batch: int = BATCH) -> TensorData:
    """Returns `count` scenes to train on, and as few as can be to validate on."""
    data = digit_scenes(count=count + 1, val_size=1, batch_size=batch, augment=[Flip()])
    data.setup()
    return data


def networks(data: TensorData, student: dict[str, Any] = STUDENT, teacher: dict[str, Any] = TEACHER) -> list[nn.Module]:
    """Returns student and teacher, which normalize their pictures, with the same first weights each time."""
    facts = Preprocess(list(data.mean or ()), list(data.std or ()))  # measured by `scenes`
    torch.manual_seed(0)
    nets = [Preprocessed(fcos_slim(CLASSES, SHAPE, **options), facts) for options in (student, teacher)]
    return [net.to(memory_format=torch.channels_last) for net in nets]


# -- the bare loop ---------------------------------------------------------------------------------------------------


class Bare:
    """The same networks and pictures, and a loop over torchvision's own parts."""

    def __init__(self, data: TensorData, student: nn.Module, teacher: nn.Module):
        self.images = data.source.train.inputs[data.train_ids]
        self.objects = as_dicts(data.source.train.targets[data.train_ids])
        self.mean, self.std = (torch.tensor(x).view(1, -1, 1, 1) for x in (data.mean, data.std))
        self.student, self.teacher = torchvisions(student), torchvisions(teacher).eval().requires_grad_(False)
        self.optimizer = OPTIMIZER(self.student.parameters())
        self.batch = data.batch_size

    def view(self, chosen: Tensor, flipped: Tensor) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Returns the normalized pictures of these numbers, some of them flipped, with their objects."""
        images = self.images[chosen]
        images = torch.where(flipped[:, None, None, None], images.flip(3), images)
        objects = []
        for i, flip in zip(chosen.tolist(), flipped.tolist(), strict=True):
            boxes = self.objects[i]["boxes"]
            if flip:
                boxes = torch.stack([SHAPE[2] - boxes[:, 2], boxes[:, 1], SHAPE[2] - boxes[:, 0], boxes[:, 3]], 1)
            objects.append({"boxes": boxes, "labels": self.objects[i]["labels"]})
        images = (images.float() / 255 - self.mean) / self.std
        return images.contiguous(memory_format=torch.channels_last), objects

    def loss(self, images: Tensor, objects: list[dict[str, Tensor]]) -> Tensor:
        """Returns the labels' loss and the three of dense_kd, summed."""
        with torch.no_grad():
            heads, anchors, _ = predictions(self.teacher, images)
            logits, centers = heads["cls_logits"], heads["bbox_ctrness"].squeeze(2)
            boxes = self.teacher.box_coder.decode(heads["bbox_regression"], anchors[0])
        own, anchors, levels = predictions(self.student, images)
        labels = self.student.compute_loss(objects, own, anchors, levels)
        weight = dense.above(dense.confidence(logits), 0.05)
        own_boxes = self.student.box_coder.decode(own["bbox_regression"], anchors[0])
        soft = [
            dense.quality_focal(own["cls_logits"], logits, 2.0),
            dense.weighted_giou(own_boxes, boxes, weight),
            dense.weighted_entropy(own["bbox_ctrness"].squeeze(2), centers, weight),
        ]
        return torch.stack([*labels.values(), *soft]).sum()

    def steps(self, count: int) -> float:
        """Trains for so many steps; returns seconds a step."""
        self.student.train()
        start = time.process_time()
        for _ in range(count):
            chosen = torch.randint(len(self.images), (self.batch,))
            loss = self.loss(*self.view(chosen, torch.rand(self.batch) < 0.5))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return (time.process_time() - start) / count


def torchvisions(net: nn.Module) -> FCOS:
    """Returns torchvision's FCOS of the parts of a network of `networks`."""
    ours = next(m for m in net.modules() if isinstance(m, Detector))
    return FCOS(
        ours.backbone, CLASSES, anchor_generator=ours.anchor_generator, head=ours.head, center_sampling_radius=1.5
    )


def predictions(model: FCOS, images: Tensor) -> tuple[dict[str, Tensor], list[Tensor], list[int]]:
    """Returns the heads at all anchors, the anchors of each picture, and how many there are by level."""
    maps = list(model.backbone(images).values())
    sizes = [tuple(images.shape[-2:])] * len(images)
    anchors = model.anchor_generator(ImageList(images, sizes), maps)
    return model.head(maps), anchors, [m.shape[2] * m.shape[3] for m in maps]


# -- this project ----------------------------------------------------------------------------------------------------


def distiller_of(data: TensorData, student: nn.Module, teacher: nn.Module) -> Distiller:
    """Returns what a run of method=dense_kd trains, without a cache."""
    example = data.get_batch("train", data.train_ids[:2])
    return Distiller(
        student,
        DenseKD(),
        FrozenTeacher(teacher.eval(), Detection(), example=example),
        example,
        task=Detection(),
        optimizer=OPTIMIZER,
        seed=0,
        allow_chance=True,
        data=data,
        cache=CacheOptions("off"),
        group=GROUP,
    )


def project(data: TensorData, nets: list[nn.Module], steps: int) -> float:
    """A fit with what a run has; returns seconds a step, after as many to warm up."""
    distiller = distiller_of(data, *nets)
    group = min(steps, group_size(distiller, data, GROUP))
    with tempfile.TemporaryDirectory() as folder:
        watch = Stopwatch(Clock(), steps, 2 * steps)  # type: ignore[arg-type]
        trainer = Trainer(
            accelerator="cpu",
            max_steps=2 * steps,
            max_epochs=-1,
            callbacks=[EpochLogger(), GracefulStop(folder), watch],
            logger=TensorBoardLogger(folder),
            log_every_n_steps=1,  # of groups: the Distiller knows after which one something is logged
            limit_val_batches=0,
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=folder,
            use_distributed_sampler=False,
        )
        trainer.fit(distiller, datamodule=GroupedData(data, Layout(group, LOG_EVERY)))
    return watch.seconds


def variants(data: TensorData, steps: int) -> dict[str, Callable[[], float]]:
    """By name a function that trains for `steps` steps and returns seconds a step."""
    bare = Bare(data, *networks(data))
    return {"bare": functools.partial(bare.steps, steps), "live": lambda: project(data, networks(data), steps)}


def main(rounds: int, steps: int) -> None:
    quiet()
    run = variants(scenes(BATCH * 64), steps)
    for step in run.values():
        step()  # allocations, kernels
    times: dict[str, list[float]] = {name: [] for name in run}
    for i in range(rounds):
        for name in list(run) if i % 2 == 0 else list(run)[::-1]:
            times[name].append(run[name]())
    low, middle, high = quartiles([a / b for a, b in zip(times["live"], times["bare"], strict=True)])
    for name, seconds in times.items():
        print(f"{name}: {1e3 * statistics.median(seconds):.1f} ms a step")
    print(f"live ÷ bare: {middle:.3f} ({low:.3f} to {high:.3f}) over {rounds} rounds, aim ≤ {AIM:g}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=STEPS)
    given = parser.parse_args()
    main(given.rounds, given.steps)
