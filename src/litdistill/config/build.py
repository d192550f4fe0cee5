"""Builds the data, the task, the student and the teacher of a config.

Training and evaluation build a run by the same functions, so that a run is rebuilt from its own folder.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from omegaconf import DictConfig, open_dict
from torch import Tensor, nn

from litdistill.compress.quantize import Int8
from litdistill.compress.restore import restore
from litdistill.compress.structure import load_structure, structure_of
from litdistill.config.backbones import as_backbone, check_head, fact_of, own_backbone, student_outputs
from litdistill.config.distiller import train_labels
from litdistill.config.instantiate import NETWORK_META_KEYS, instantiate, locate
from litdistill.config.members import members_of
from litdistill.config.preprocessing import merged_preprocessing, shape_after, wanted_preprocessing
from litdistill.config.recipes import is_complete, net_name, teacher_folder
from litdistill.data.foreign import ForeignData, training_inputs
from litdistill.data.protocol import as_indexed, facts_of, input_dtype
from litdistill.distillation.boosting import FOLDS, boosted_outputs
from litdistill.distillation.checks import check_average
from litdistill.distillation.outputs_tables import read_outputs
from litdistill.distillation.recorded import RecordedTeacher
from litdistill.models.adaptations import adaptations_of, has_published_weights, published_classes
from litdistill.models.backbone import Backbone, cut
from litdistill.models.classes import class_columns, describe_columns, published_columns, with_columns
from litdistill.models.ensemble import UNKNOWN, Ensemble, check_apart
from litdistill.models.finetune import fix_statistics, freeze, with_own_head
from litdistill.models.preprocess import bare, preprocess_of, wrap
from litdistill.tasks import TASKS
from litdistill.tasks.base import Task
from litdistill.tasks.classification import balanced_weights
from litdistill.utils.checkpoint import load_state_dict_checked, load_weights, read_metadata
from litdistill.utils.distributed import broadcast_from_rank0
from litdistill.utils.errors import UserError
from litdistill.utils.manifest import check_int8

log = logging.getLogger(__name__)

CALIBRATION = 512  # unaugmented training images for the calibration of a compressed network


def build_data(cfg: DictConfig, **facts: Any) -> tuple[Any, Task]:
    """Returns the data of a config, read and split, and its task.

    A data module without sample ids is wrapped as `ForeignData`. `facts`: known options, which are then not measured.
    """
    module = instantiate(cfg.data, "data", **facts)
    if not isinstance(module, LightningDataModule):
        raise UserError(
            f"data._target_={cfg.data['_target_']} gives a {type(module).__name__}, and no LightningDataModule."
        )
    module.prepare_data()
    module.setup("fit")
    task = build_task(cfg.task, module, isinstance(cfg.data.get("labels"), str) or bool(cfg.data.get("target")))
    return as_indexed(module) or ForeignData(module, task.batch), task


def build_task(node: DictConfig, data: Any, chosen: bool = False) -> Task:
    """Returns the task of a config. A `mean` and `std` of null are measured on the targets of all samples outside of the
    validation set, whatever share is trained on, so that the outputs of teacher and student are on the same scale.
    `class_weights` of "balanced" are those of the labels that are trained on. `chosen`: whether the data take a task, too.

    Raises `UserError` if the data module's `task` attribute names another task.
    """
    wanted, kind = getattr(data, "task", None), str(node["_target_"]).rpartition(".")[2]
    name = next((key for key, task in TASKS.items() if task.__name__ == kind), None)
    if isinstance(wanted, str) and name is not None and name != wanted and TASKS[name].reads_labels:
        other = f", or data.task={name} where the labels are meant so" if chosen else ""
        raise UserError(f"These data are for task={wanted}, and the config has {name}: set task={wanted}{other}.")
    facts: dict[str, Any] = {}
    if "mean" in node and node.mean is None:
        if as_indexed(data) is None:
            raise UserError("Nothing can be measured on these data: set task.mean and task.std, one number a value.")
        rest = torch.ones(len(data.train_targets), dtype=torch.bool)
        rest[data.val_ids] = False
        targets = data.train_targets[rest].double()
        targets = targets[:, None] if targets.ndim == 1 else targets
        targets = targets[~targets.isnan().any(1)]  # those that have a label
        facts = {"mean": targets.mean(0).tolist(), "std": targets.std(0).clamp(min=1e-12).tolist()}
    if node.get("class_weights") == "balanced":
        labels = None if as_indexed(data) is None else train_labels(data)
        if labels is None:
            raise UserError(
                "task.class_weights=balanced counts the labels, and these data do not show them by id: give the weights, "
                "[1, 3], one for each class."
            )
        facts = {"class_weights": balanced_weights(labels[labels >= 0], data.num_classes)}
    # A task of one's own, named by `task._target_`, need not take what conf/task/classification.yaml leaves at null.
    takes = inspect.signature(locate(str(node["_target_"]))).parameters
    options = {k: v for k, v in node.items() if v is not None or k in takes}
    task: Task = instantiate(options, "task", **facts)
    return task


def _known(target: str, data: Any, shape: Any, outputs: int | None, **more: Any) -> dict[str, Any]:
    """Returns the facts of the data that a network's function takes, and those of `more` that it names. `outputs`: the number
    of the network's, in place of the data's classes.

    Raises `UserError` if a required one is unknown.
    """
    facts = {"num_classes": outputs or data.num_classes, "input_shape": shape}
    takes = inspect.signature(locate(target)).parameters
    named = {k: v for k, v in more.items() if k in takes and v is not None}
    if any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        return {k: v for k, v in facts.items() if v is not None} | named
    for name, value in facts.items():
        if name in takes and value is None and takes[name].default is inspect.Parameter.empty:
            raise UserError(
                f"{target} needs {name}, and {data.name} does not say it: give the data module that attribute, or set it "
                "beside the network's _target_."
            )
    return {k: v for k, v in facts.items() if k in takes and v is not None} | named


def build_net(
    node: DictConfig, data: Any, role: str, source: str | Path | nn.Module | None = None, **options: Any
) -> nn.Module:
    """Returns the network of `net_and_columns`, which takes the same `options`; one whose classes are others than the data's as
    an `Ensemble` of one."""
    net, columns = net_and_columns(node, data, role, source, **options)
    return net if columns is None else Ensemble([net], columns=[columns])


def net_and_columns(
    node: DictConfig,
    data: Any,
    role: str,
    source: str | Path | nn.Module | None = None,
    fetch: bool = True,
    say: bool = True,
    who: str | None = None,
    outputs: int | None = None,
) -> tuple[nn.Module, list[int] | None]:
    """Returns a network for the shapes of `data`, with weights and structure of `source` or of the node's `checkpoint`, and the
    column of its outputs for each class of the data; None where they are the classes, or could be put in their order.

    Each of mean, std and size of the preprocessing is that of the node's `preprocess`, else of the weights' metadata, else of
    the network's builder (published weights), else of the data. A node's `head` of "cut" leaves its classifier out.
    `fetch`: False where the caller loads weights, so that published ones need not be there. `say`: log in a line what was
    changed in a published network. `who`: its name in messages. `outputs`: how many, where they are not the data's classes."""
    check_head(node, role)
    if source is None:
        source = node.get("checkpoint")
    backbone, width = node.get("head") == "cut", fact_of(source, "outputs")
    if backbone and outputs is None:  # weights of an embedding, or a classifier that is left out
        outputs = width or len(fact_of(source, "classes") or ()) or data.num_classes or 2
    wanted = wanted_preprocessing(node, source, role)
    shape = shape_after(wanted, data)
    under = own_backbone(node, data, build_net)
    options = {k: v for k, v in node.items() if k not in (*NETWORK_META_KEYS, *under)}
    more = {"size": wanted.get("size"), "fetch": None if fetch and source is None else False, **facts_of(data), **under}
    facts = _known(str(node["_target_"]), data, shape, outputs, class_names=tuple(data.class_names), **more)
    trained = fact_of(source, "classes") or []
    kept = node.get("head") not in ("new", "cut")
    columns = class_columns(trained, data.class_names, str(source), role) if kept else None
    if columns is not None and "num_classes" in facts:
        facts["num_classes"] = len(trained)
    net: nn.Module = instantiate(options, role, **{k: v for k, v in facts.items() if k not in options})
    if source is None and not backbone and (trained := list(published_classes(net))):
        columns = published_columns(trained, data.class_names, node, role)
    changes = adaptations_of(net)
    fixed = _fix_statistics(net, node, role, published=source is None and fetch and has_published_weights(net))
    preprocess = merged_preprocessing(preprocess_of(net), wanted, data, role)
    if say and source is None and fetch and changes:
        own = " and ".join(sorted(wanted.keys() & {"mean", "std"}))
        said = " Its statistics of batch normalization are fixed." * fixed + " Its classifier is left out." * backbone
        said += f" {role}.preprocess sets {own} in place of the weights' own." if own else ""
        log.info("%s%s", changes, said)
    net = bare(net)
    blank = _blank(data, preprocess.input_shape(data.input_shape) if preprocess is not None else shape)
    if source is not None:
        net = _with_weights(net, node, role, source, blank)
    if columns is not None:
        log.info("%s", describe_columns(columns, trained, data.class_names, who or f"The {role}"))
        columns = _unless_put_in_order(net, columns, blank, role)
    if backbone:
        inputs = training_inputs(data, 2)
        net = Backbone(net) if width else cut(net, inputs if preprocess is None else preprocess(inputs))
    return wrap(net, preprocess), columns


def _unless_put_in_order(net: nn.Module, columns: list[int], example: Tensor, role: str) -> list[int] | None:
    """Puts the outputs of `net` into the data's order in place and returns None, or the columns where it cannot."""
    if with_columns(net, columns, example):
        return None
    if role == "student":
        raise UserError(
            "The student was trained on these classes in another order, and its outputs cannot be put into another. "
            "Give the data the order of its training (data.classes)."
        )
    return columns


def _blank(data: Any, shape: Any) -> Tensor:
    """Returns two inputs of zeros, of the data's type and the shape after preprocessing."""
    return torch.zeros(2, *(shape or ()), dtype=input_dtype(data))


def _fix_statistics(net: nn.Module, node: DictConfig, role: str, published: bool) -> bool:
    """Fixes the statistics of batch normalization where the config says so, by default for published weights; returns whether
    there are any."""
    wanted = node.get("statistics")
    if wanted not in (None, "fixed", "learned"):
        raise UserError(f"{role}.statistics={wanted}: choose fixed or learned, or null.")
    return (wanted == "fixed" or (wanted is None and published)) and fix_statistics(net) > 0


def _with_weights(
    net: nn.Module, node: DictConfig, role: str, source: str | Path | nn.Module, example: Tensor
) -> nn.Module:
    """Returns the network with the weights and structure of `source`. `example`: a few preprocessed images (N, C, H, W)."""
    head = None if node.get("head") == "cut" else node.get("head")
    steps = structure_of(source) if isinstance(source, nn.Module) else load_structure(source)
    net = restore(net, steps, example, new_head=head is not None)
    if isinstance(source, nn.Module):
        name, state = "the teacher", source.state_dict()
    else:
        name, state = str(source), load_weights(source, net.state_dict().keys())
    if head is not None:
        state = with_own_head(net, state, example)
    load_state_dict_checked(net, state, name, role)
    return net


def build_student(
    cfg: DictConfig,
    data: Any,
    teacher: nn.Module | None,
    source: Path | None = None,
    finished: Path | None = None,
) -> nn.Module:
    """Returns the student with its initial weights, compressed by the config's `compress`.

    `source`: the finished run that `student.checkpoint: auto` refers to. `finished`: the folder of a finished run; the result
    then has the structure and preprocessing of its student, without its weights, which the caller loads.
    """
    if finished is not None:
        return _rebuilt_student(cfg.student, data, finished)
    if cfg.student.get("checkpoint") == "teacher" and teacher is None:
        raise UserError("student.checkpoint=teacher: there is no teacher. Name one (net@teacher=…).")
    if cfg.student.get("checkpoint") == "teacher" and isinstance(teacher, RecordedTeacher):
        raise UserError(
            "student.checkpoint=teacher: a file of outputs has no weights. Name a run or a file of weights."
        )
    if cfg.student.get("checkpoint") == "teacher" and isinstance(teacher, Ensemble):
        raise UserError(
            "student.checkpoint=teacher: the teacher is several networks, or knows other classes than the data have. Name one "
            "run or file of weights: student.checkpoint=<run folder>."
        )
    start = teacher if cfg.student.get("checkpoint") == "teacher" else source
    student = build_net(cfg.student, data, "student", start, outputs=student_outputs(cfg, data, teacher))
    if cfg.get("compress") is not None:
        student = _compressed(student, cfg, data)
    if isinstance(bare(student), Int8):
        if cfg.student.get("trainable") is not None:
            raise UserError(
                f"student.trainable={list(cfg.student.trainable)}: an int8 network is one traced graph, of which no layer can "
                "be named. Train those layers of the float network first, and start from that run with compress=int8 and "
                "student.trainable=null."
            )
        check_int8(data.class_names)  # before training, since the run exports an int8 file at its end
    elif (trainable := cfg.student.get("trainable")) is not None:
        freeze(student, trainable, training_inputs(data, 2))
    return student


def _rebuilt_student(node: DictConfig, data: Any, finished: Path) -> nn.Module:
    """Returns the network of a finished run's student, without its weights."""
    facts = {k: read_metadata(finished, k) for k in ("mean", "std", "size")}
    node = node.copy()
    with open_dict(node):
        node.checkpoint = None
        if facts["mean"] is not None and facts["std"] is not None:
            node.preprocess = facts
    net = build_net(node, data, "student", fetch=False, outputs=read_metadata(finished, "outputs"))
    preprocess = preprocess_of(net)
    shape = preprocess.input_shape(data.input_shape) if preprocess is not None else data.input_shape
    return wrap(restore(bare(net), load_structure(finished), _blank(data, shape)), preprocess)


def _compressed(student: nn.Module, cfg: DictConfig, data: Any) -> nn.Module:
    """Returns the student compressed by the config's `compress`, which is calibrated on preprocessed training images."""
    if isinstance(bare(student), Int8):
        raise UserError(
            f"compress={str(cfg.compress.get('_target_')).rpartition('.')[2]}: the student starts from an int8 network, "
            "which is one traced graph and is compressed no further. Start from the float run that it was made of."
        )
    images = training_inputs(data, CALIBRATION)
    preprocess = preprocess_of(student)
    return wrap(
        instantiate(cfg.compress, "compress")(bare(student), images if preprocess is None else preprocess(images)),
        preprocess,
    )


def build_teacher(
    cfg: DictConfig, data: Any, task: Task, absent: Callable[[DictConfig, Path], None]
) -> nn.Module | None:
    """Returns the teacher of a config with its weights, an `Ensemble` for several networks, a `RecordedTeacher` for a file of
    outputs; None without a teacher.

    `absent(cfg, folder)` is called if `teacher.checkpoint` is auto and `folder` holds no finished run of the teacher's recipe:
    it trains the teacher, or raises. Raises `UserError` if the units of the teacher's outputs are not the task's.
    """
    if cfg.teacher is None:
        return None
    if cfg.teacher.get("outputs") is not None:
        return _recorded(cfg, data, task)
    if not cfg.teacher.get("ensemble"):
        net, columns = _build_teacher(cfg, data, task, absent)
        return net if columns is None else Ensemble([net], columns=[columns], kind=task.kind)
    configs = members_of(cfg)
    check_average(task, len(configs))
    found = [_build_teacher(one, data, task, absent, f"Member {i} of the teacher") for i, one in enumerate(configs)]
    members, columns_of = [net for net, _ in found], [columns for _, columns in found]
    check_apart(members)
    names = [net_name(one.teacher) for one in configs]
    weights, mean = cfg.teacher.get("ensemble_weights"), cfg.teacher.get("ensemble_mean")
    return Ensemble(members, weights, mean or "logits", columns_of, task.kind, names)


def _recorded(cfg: DictConfig, data: Any, task: Task) -> RecordedTeacher:
    """Returns a file of outputs as a teacher; that of gradient boosting is written where it is not there."""
    path = cfg.teacher.outputs
    if isinstance(data, ForeignData):
        raise UserError(
            f"teacher.outputs={path} has outputs by sample id, and {data.name} has no ids: give it the attributes of "
            "litdistill.data.protocol.IndexedData, or in Python batches with ids to litdistill.distill()."
        )
    if path in FOLDS:
        path = boosted_outputs(path, data, task.kind, Path(cfg.runs) / "teachers")
    return RecordedTeacher(read_outputs(path), task, data)


def _build_teacher(
    cfg: DictConfig, data: Any, task: Task, absent: Callable[[DictConfig, Path], None], who: str = "The teacher"
) -> tuple[nn.Module, list[int] | None]:
    """Returns one network of a config's teacher, and its columns (`net_and_columns`). `who`: what messages call it."""
    if cfg.teacher.get("outputs") is not None:
        recorded = _recorded(cfg, data, task)
        known = recorded.known[0].tolist() if recorded.partial else []
        return recorded, [i if there else UNKNOWN for i, there in enumerate(known)] or None
    if cfg.teacher.checkpoint != "auto":
        torch.manual_seed(cfg.seed)  # initial weights are the same on every rank and in a rebuilt run
        if cfg.teacher.checkpoint is not None:
            _check_units(cfg.teacher.checkpoint, task)
        return net_and_columns(as_backbone(cfg.teacher, task), data, "teacher", who=who)
    if not task.reads_labels:
        raise UserError(
            f"{type(task).__name__} has no labels to train a teacher on (teacher.checkpoint=auto): name a network with "
            "weights, net@teacher=efficientnet_lite0 teacher.checkpoint=null, or a finished run, teacher.checkpoint=<folder>."
        )
    folder = teacher_folder(cfg)
    if not broadcast_from_rank0(is_complete(folder)):
        absent(cfg, folder)
    _check_units(folder, task)
    return net_and_columns(cfg.teacher, data, "teacher", folder, who=who)


def _check_units(source: str | Path, task: Task) -> None:
    then, now = read_metadata(source, "units"), task.units()
    if then is not None and then != now:
        raise UserError(
            f"The outputs of the teacher in {source} are in other units than the student's will be ({then} instead of {now}): "
            f"set task.mean={then['mean']} task.std={then['std']}, or train a teacher on these data."
        )
