"""Backbones in a config: a teacher without classes, and the width of a student that learns from it in a task without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, open_dict
from torch import nn

from litdistill.data.foreign import training_inputs
from litdistill.distillation.recorded import RecordedTeacher
from litdistill.features.outputs import run_network
from litdistill.models.parts import evaluating
from litdistill.tasks.base import Task
from litdistill.utils.checkpoint import read_metadata
from litdistill.utils.errors import UserError


def fact_of(source: str | Path | nn.Module | None, key: str) -> Any:
    """Returns a fact of the metadata of weights; None without a file of them."""
    return None if source is None or isinstance(source, nn.Module) else read_metadata(source, key)


def check_head(node: DictConfig, role: str) -> None:
    """Raises `UserError` for a `head` of a network's node that is none."""
    if node.get("head") not in (None, "new", "cut"):
        raise UserError(
            f"{role}.head={node.get('head')}: set it to new for a classifier that starts from nothing, to cut for a backbone "
            "without one, or to null."
        )


def student_outputs(cfg: DictConfig, data: Any, teacher: nn.Module | None) -> int | None:
    """Returns the number of the student's outputs in a task without labels: `task.width`, else the width of its teacher (128
    for a trial without one). None where they are the data's classes, and where the student's options name their number."""
    if "width" not in cfg.task or cfg.student.get("num_classes") is not None:
        return None
    if cfg.task.width is None and isinstance(teacher, RecordedTeacher):
        return teacher.outputs(data.get_batch("train", data.train_ids[:2])).main.shape[1]
    if cfg.task.width is None and teacher is not None:
        with evaluating(teacher):
            return run_network(teacher, training_inputs(data, 2)).main.shape[1]
    return cfg.task.width or 128


def as_backbone(node: DictConfig, task: Task) -> DictConfig:
    """Returns the node of a teacher, in a task without labels that of a backbone (`head: cut`)."""
    if task.reads_labels or node.get("head") is not None:
        return node
    node = node.copy()
    with open_dict(node):
        node.head = "cut"
    return node
