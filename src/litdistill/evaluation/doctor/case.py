"""A finished run as the doctor sees it: both networks' outputs for samples that the run did not test on, and its gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from litdistill.distillation.distiller import Distiller
from litdistill.distillation.mixed import judges
from litdistill.evaluation.doctor.gradients import Gradients, gradients_at_start
from litdistill.evaluation.findings import These, labeled_ids
from litdistill.evaluation.predictions import measured, predict_split
from litdistill.tasks.base import Task
from litdistill.types import Outputs
from litdistill.utils.units import shown


class Finding(NamedTuple):
    """`weight`: 0 to 1, how much of the student's quality it may cost. `change`: the one to try."""

    weight: float
    name: str
    said: str
    change: str


class Case(NamedTuple):
    """A finished run. Outputs are those of the validation set; `trained`: the student's on training samples, with targets."""

    cfg: DictConfig
    data: Any
    task: Task
    distiller: Distiller
    device: torch.device | str
    targets: Tensor
    student: Outputs
    teacher: Outputs | None
    trained: tuple[Outputs, Tensor]
    best_epoch: int | None  # counted from 1; None without its checkpoint
    epochs: int
    gradients: Gradients  # of the loss's terms at the start
    most: int | None = None  # samples of each split that are looked at; None: all

    @property
    def teacher_net(self) -> nn.Module | None:
        """Returns the teacher's network; None without one."""
        return None if self.distiller.teacher is None else self.distiller.teacher.net

    def value(self, outputs: Outputs, targets: Tensor | None = None) -> float:
        """Returns the monitored metric of outputs."""
        return measured(self.task, outputs, self.targets if targets is None else targets)[self.task.monitor[0]]

    def shown(self, value: float) -> str:
        """Returns a value of the monitored metric in words."""
        return shown(self.task.monitor[0], value)

    def validated(self, net: nn.Module) -> Outputs:
        """Returns the outputs of `net` for the validation samples that are looked at."""
        ids = self.data.val_ids[: self.most]
        return outputs_of(net, self.data, self.task, "val", ids, self.device)[0]


def examined(
    cfg: DictConfig,
    data: Any,
    distiller: Distiller,
    summary: Mapping[str, Any],
    best_epoch: int | None,
    device: torch.device | str = "cpu",
    most: int | None = None,
) -> Case:
    """Returns the case of a run: the outputs of both networks, of at most `most` samples of a split."""
    task, student, val = distiller.task, distiller.deployed_student, data.val_ids[:most]
    outputs, targets = outputs_of(student, data, task, "val", val, device)
    net = distiller.teacher.net if distiller.teacher is not None else None
    teacher = None
    if net is not None and judges(net, "val"):
        teacher = outputs_of(net, data, task, "val", val, device)[0]
        teacher = teacher if task.measures(teacher) else None  # it has no classes
    trained = outputs_of(student, data, task, "train", labeled_ids(data)[: len(targets)], device)
    balance = summary.get("balance") or {}
    factors = {name: figures.get("first", figures["factor"]) for name, figures in balance.items()}  # at the start
    found = gradients_at_start(cfg, data, task, net, device, factors)
    return Case(
        *(cfg, data, task, distiller, device, targets, outputs, teacher, trained, best_epoch, int(summary["epochs"])),
        gradients=found,
        most=most,
    )


def outputs_of(
    net: nn.Module, data: Any, task: Task, split: str, ids: Tensor, device: torch.device | str
) -> tuple[Outputs, Tensor]:
    """Returns the outputs of `net` for these samples of a split without augmentation, and their targets; on the CPU."""
    return predict_split(net, These(data, ids), split, device, task)
