"""Backbones in a config: a teacher without classes, the width of a student that learns from it in a task without labels, and
the network under a detector."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from yaml import YAMLError

from litdistill.config.origin import made_here
from litdistill.config.trust import check_trusted
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


def own_backbone(node: DictConfig, data: Any, build: Callable[..., nn.Module]) -> dict[str, nn.Module]:
    """Returns as `backbone` the network that a detector's node describes by it, with its weights: the student of a finished run
    in that folder, or a node with a `_target_` and a `checkpoint`. Empty for a name, which is the detector's to find.

    `build`: `litdistill.config.build.build_net`. Raises `UserError` for a folder that is no finished run.
    """
    given = node.get("backbone")
    if isinstance(given, DictConfig):
        return {"backbone": build(given, _facts(data, given.get("checkpoint")), "backbone", say=False)}
    if not isinstance(given, str) or not Path(given).is_dir():
        return {}
    folder = Path(given)
    config = folder / ".hydra" / "config.yaml"
    if not config.is_file() or not (folder / "summary.json").is_file():
        raise UserError(f"backbone={given} is no finished run: it needs .hydra/config.yaml and summary.json.")
    content = config.read_bytes()
    try:
        cfg = OmegaConf.load(io.StringIO(content.decode()))
        with open_dict(cfg):
            cfg.folder = str(folder)
        student = cfg.student.copy()
    except (ValueError, YAMLError, OmegaConfBaseException, AttributeError) as error:
        raise UserError(f"{config} is damaged ({str(error).splitlines()[0]}): name another run.") from error
    if not made_here(folder, content):
        check_trusted(cfg, folder)  # type: ignore[arg-type]
    with open_dict(student):
        student.checkpoint = student.head = student.preprocess = None
    return {"backbone": build(student, _facts(data, folder), "backbone", folder, say=False)}


def _facts(data: Any, source: str | Path | None) -> SimpleNamespace:
    """Returns what a network is built by: the classes and the shape of the images of its weights, else of the data."""
    names = fact_of(source, "classes") or ()
    return SimpleNamespace(
        name="the backbone's data",
        num_classes=fact_of(source, "outputs") or len(names) or data.num_classes or 2,
        class_names=tuple(names),
        input_shape=tuple(fact_of(source, "input_shape") or data.input_shape),
        mean=fact_of(source, "data_mean") or getattr(data, "mean", None),
        std=fact_of(source, "data_std") or getattr(data, "std", None),
    )
