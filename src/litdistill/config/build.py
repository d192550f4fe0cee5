"""From a config to objects: the one place that reads what the networks, the method and the data are.

Training and evaluation build a run by the same function, so that a run is rebuilt from its own folder.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import nn

from litdistill.compress.quantize import Int8
from litdistill.compress.structure import Step, load_structure, restore, structure_of
from litdistill.config.instantiate import instantiate
from litdistill.config.recipes import NETWORK_META_KEYS, is_complete, teacher_folder
from litdistill.data import augment as aug
from litdistill.data.datamodule import ImageData
from litdistill.distillation.teacher import Ensemble
from litdistill.models.finetune import with_own_head
from litdistill.utils.checkpoint import load_state_dict_checked, load_weights
from litdistill.utils.distributed import broadcast_from_rank0
from litdistill.utils.errors import UserError
from litdistill.utils.manifest import check_int8

log = logging.getLogger(__name__)

CALIBRATION = 512  # training images, unaugmented, that compressing may look at


def build_data(cfg: DictConfig) -> ImageData:
    """The data set of a config, read and split."""
    data: ImageData = instantiate(cfg.data)
    data.setup()
    return data


def build_net(node: DictConfig, data: ImageData, role: str, source: str | Path | nn.Module | None = None) -> nn.Module:
    """A network for the shapes of `data`, with the weights that its `checkpoint` names, or those of `source`.

    Where these are of a compressed network, it is compressed likewise.
    """
    options = {k: v for k, v in node.items() if k not in NETWORK_META_KEYS}
    net: nn.Module = instantiate(options, num_classes=data.num_classes, input_shape=data.input_shape)
    if source is None:
        source = node.get("checkpoint")
    if source is None:
        return net
    if isinstance(source, nn.Module):
        name, state, steps = "the teacher", source.state_dict(), structure_of(source)
    else:
        name, state, steps = str(source), load_weights(source), load_structure(source)
    example, head = torch.zeros(2, *data.input_shape), node.get("head")
    if head not in (None, "new"):
        raise UserError(f"{role}.head={head}: set it to new for a classifier that starts from nothing, or to null.")
    net = restore(net, steps, example, new_head=head is not None)
    if head is not None:
        state = with_own_head(net, state, example)
    load_state_dict_checked(net, state, name, role)
    return net


def build_student(
    cfg: DictConfig,
    data: ImageData,
    teacher: nn.Module | None,
    source: Path | None = None,
    structure: list[Step] | None = None,
) -> nn.Module:
    """The student with the weights that it starts from, made smaller where `compress` says so.

    `source`: the finished run that `student.checkpoint: auto` stands for. `structure`: that of a finished run's student,
    which is given it and neither weights nor compression: its weights are to be loaded afterwards.
    """
    if structure is not None:
        return restore(build_net(cfg.student, data, "student"), structure, torch.zeros(2, *data.input_shape))
    if cfg.student.get("checkpoint") == "teacher" and teacher is None:
        raise UserError("student.checkpoint=teacher: there is no teacher. Name one (net@teacher=…).")
    start = teacher if cfg.student.get("checkpoint") == "teacher" else source
    student = build_net(cfg.student, data, "student", start)
    if cfg.get("compress") is not None:
        if isinstance(student, Int8):
            raise UserError(
                f"compress={str(cfg.compress.get('_target_')).rpartition('.')[2]}: the student starts from an int8 network, "
                "which is one traced graph and is compressed no further. Start from the float run that it was made of."
            )
        ids = aug.order(0, 0, data.train_ids)[:CALIBRATION]
        student = instantiate(cfg.compress)(student, data.get_batch("train", ids, None).images)
    if isinstance(student, Int8):
        if cfg.student.get("trainable") is not None:
            raise UserError(
                f"student.trainable={list(cfg.student.trainable)}: an int8 network is one traced graph, of which no layer can "
                "be named. Train those layers of the float network first, and start from that run with compress=int8 and "
                "student.trainable=null."
            )
        check_int8(data.class_names)  # before it is trained, as its file is a part of its run
    return student


def build_teacher(cfg: DictConfig, data: ImageData, absent: Callable[[DictConfig, Path], None]) -> nn.Module | None:
    """The teacher of a config with its weights, an `Ensemble` where several are named; None without one.

    `absent(cfg, folder)` is called where `teacher.checkpoint` is auto and no run of that recipe is finished in `folder`:
    it trains the teacher, or raises.
    """
    if cfg.teacher is None:
        return None
    if diffs := cfg.teacher.get("ensemble"):
        members = []
        for diff in diffs:
            one = cfg.copy()
            with open_dict(one):
                one.teacher.ensemble = None
                one.teacher = OmegaConf.merge(one.teacher, diff)
            members.append(build_teacher(one, data, absent))
        return Ensemble([m for m in members if m is not None])
    if cfg.teacher.checkpoint != "auto":
        torch.manual_seed(cfg.seed)  # one as it is built is the same on every rank, and again when the run is rebuilt
        return build_net(cfg.teacher, data, "teacher")
    folder = teacher_folder(cfg)
    if not broadcast_from_rank0(is_complete(folder)):
        absent(cfg, folder)
    return build_net(cfg.teacher, data, "teacher", folder)
