"""The loops of other projects that `benchmark.py` times: the one that most code has, and torchdistill's distillation box."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from benchmark_data import OneByOne
from torch.utils.data import DataLoader
from torchvision import transforms

if TYPE_CHECKING:
    from benchmark_parts import Bench


def images_of(bench: Bench) -> OneByOne:
    """The images of a pair, one by one, augmented and normalized."""
    steps = [
        transforms.RandomCrop(bench.pair.shape[-1], padding=bench.pair.shift),
        *([transforms.RandomHorizontalFlip()] if bench.pair.flip else []),
        transforms.ToTensor(),
        transforms.Normalize(bench.data.mean, bench.data.std),
    ]
    return OneByOne(bench.data.source.train, transforms.Compose(steps))


def endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def peers(bench: Bench, workers: int = 0) -> Callable[[], float]:
    student, teacher = bench.networks()
    optimizer = bench.optimizer(student.parameters())
    loader = DataLoader(
        images_of(bench),
        batch_size=bench.pair.batch,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        timeout=30 if workers else 0,
    )
    batches = endless(loader)

    def run() -> float:
        student.train()
        start = bench.clock()
        for _ in range(bench.pair.steps):
            images, targets = (x.to(bench.device) for x in next(batches))
            with torch.no_grad():
                teacher_logits = teacher(images)
            logits = student(images)
            soft = F.kl_div(F.log_softmax(logits / 4, 1), F.softmax(teacher_logits / 4, 1), reduction="batchmean") * 16
            loss = 0.1 * F.cross_entropy(logits, targets) + 0.9 * soft
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item(), (logits.argmax(1) == targets).float().mean().item()  # what its progress line shows
        return (bench.clock() - start) / bench.pair.steps

    return run


def torchdistill(bench: Bench) -> Callable[[], float]:
    from torchdistill.core.distillation import get_distillation_box

    student, teacher = bench.networks()
    side = {"forward_proc": "forward_batch_only", "sequential": []}
    paths = {
        f"{who}_module_{what}": value
        for who in ("student", "teacher")
        for what, value in (("path", "."), ("io", "output"))
    }
    criterion = {"key": "KDLoss", "kwargs": {**paths, "temperature": 4.0, "alpha": 0.1, "reduction": "batchmean"}}
    box = get_distillation_box(
        teacher,
        student,
        {"train": images_of(bench)},
        {
            "num_epochs": 1,
            "train_data_loader": {
                "dataset_id": "train",
                "sampler": {"class_or_func": torch.utils.data.RandomSampler, "kwargs": {}},
                "kwargs": {"batch_size": bench.pair.batch, "num_workers": 0},
            },
            "teacher": {**side, "requires_grad": False},
            "student": {**side, "requires_grad": True},
            "optimizer": {"key": "SGD", "kwargs": {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}},
            "criterion": {
                "key": "WeightedSumLoss",
                "kwargs": {"sub_terms": {"kd": {"criterion": criterion, "weight": 1.0}}},
            },
        },
        bench.device,
        None,
        False,
        1,
    )
    batches = endless(box.train_data_loader)
    box.pre_epoch_process(epoch=0)

    def run() -> float:
        start = bench.clock()
        for _ in range(bench.pair.steps):
            images, targets, extra = next(batches)
            loss = box.forward_process(images.to(bench.device), targets.to(bench.device), extra)
            box.post_forward_process(loss)
            loss.item()
        return (bench.clock() - start) / bench.pair.steps

    return run
