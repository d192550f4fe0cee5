"""Runs both networks once on the example before anything is trained, and says in a line what does not fit.

The error of the network itself is the `__cause__` of each `UserError`, so that Python shows its traceback too.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from litdistill.distillation.recorded import RecordedTeacher
from litdistill.methods.base import BOXES
from litdistill.models.ensemble import Ensemble
from litdistill.models.preprocess import check_scale
from litdistill.tasks.base import Task
from litdistill.types import Batch, Outputs
from litdistill.utils.errors import UserError
from litdistill.utils.modes import eval_mode
from litdistill.utils.shapes import described


def check_network(net: object, role: str) -> None:
    """Raises `UserError` for what is no network, or one without weights. `role`: "student" or "teacher"."""
    if isinstance(net, type) and issubclass(net, nn.Module):
        raise UserError(f"The {role} is the class {net.__name__}: give a network of it, {net.__name__}(…).")
    if not isinstance(net, nn.Module):
        remedy = "wrap it in a module whose forward calls it" if callable(net) else "give the network itself"
        if isinstance(net, Mapping):
            remedy = "build the network, and load these weights by load_state_dict"
        raise UserError(f"The {role} has to be a torch.nn.Module, and is of the type {type(net).__name__}: {remedy}.")
    parts = [*net.named_parameters(), *net.named_buffers()]
    if held := [name for name, part in parts if part.is_meta]:
        raise UserError(
            f"The {role} has no weights in memory, {held[0]} is on the device meta: build it without torch.device('meta'), or "
            "net.to_empty(device='cpu'), and load its weights."
        )
    if role == "teacher" and (lazy := [name for name, part in parts if is_lazy(part)]):
        raise UserError(
            f"The teacher was never run: its lazy module has no {lazy[0]} yet. Run it once on a batch, and load its weights."
        )
    try:
        with eval_mode(net):  # which gives each part its own mode again: frozen ones stay in eval mode
            net.eval()
    except NotImplementedError as error:
        raise UserError(
            f"The {role} is a program of torch.export, which has no modes of training and evaluation: give the network that it "
            "was exported from, or as a teacher its outputs in a file (docs/teachers.md)."
        ) from error


def freeze(net: nn.Module) -> nn.Module:
    """Lets no parameter of a network ask for a gradient; TorchScript's modules have no `requires_grad_` of their own."""
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    return net


def run_example(task: Task, batch: Batch | None, student: nn.Module, teacher: nn.Module | None) -> Outputs | None:
    """Runs both networks on the example in eval mode; returns the teacher's outputs, None without a teacher or an example.

    Raises `UserError` for a network that cannot be called with the batch's inputs, or that would misread their scale.
    """
    if batch is None:
        return None
    for net in (student, *([teacher] if teacher is not None else [])):
        check_scale(net, batch.inputs)
    _run(task, batch, student, "student")
    if teacher is None or isinstance(teacher, (RecordedTeacher, Ensemble)):  # they have looked at their data themselves
        return None
    return _run(task, batch, teacher, "teacher")


@torch.no_grad()
def _run(task: Task, batch: Batch, net: nn.Module, role: str) -> Outputs:
    with eval_mode(net):
        try:
            return task.forward(net, batch, False)
        except (TypeError, RuntimeError, ValueError, IndexError, AssertionError) as error:
            said = str(error).strip().splitlines()
            raise UserError(
                f"The {role} ({type(net).__name__}) cannot run on a batch of the loader, {described(batch.inputs)}: "
                f"{said[0] if said else type(error).__name__}{'' if said and said[0].endswith('.') else '.'} "
                f"{remedy_for(net, batch.inputs, role)}"
            ) from error


def remedy_for(net: nn.Module, inputs: Any, role: str) -> str:
    """Returns in a sentence what most likely lets a network run on these inputs."""
    if isinstance(inputs, (Mapping, tuple, list)):
        what = ", ".join(map(str, inputs)) if isinstance(inputs, Mapping) else f"{len(inputs)} arguments"
        return (
            f"Its forward takes {_parameters(net)}, and is called with {what}: the last entry of a tuple is the target and all "
            "before it are arguments; of a dict all but the labels are arguments by name. A collate_fn that returns "
            "litdistill.Batch(inputs, targets) says which is which."
        )
    kinds = {p.dtype for p in net.parameters() if p.is_floating_point()}
    if not isinstance(inputs, Tensor) or len(kinds) != 1 or inputs.dtype in kinds:
        size = (
            "; images are (N, channels, height, width)" if isinstance(inputs, Tensor) and inputs.ndim in (3, 4) else ""
        )
        return f"Give inputs as the {role} takes them{size}."
    wanted = str(kinds.pop()).removeprefix("torch.")
    if not inputs.is_floating_point():
        return (
            f"Its weights are {wanted}: have the loader convert images to floats from 0 to 1, or let the {role} do it, "
            "litdistill.models.preprocess.Preprocessed(net, Preprocess(mean, std))."
        )
    if wanted != "float32":
        return (
            f"Its weights are {wanted}: give {role}.float(), and choose the precision with trainer={{'precision': …}}."
        )
    return "Its weights are float32: have the loader, or its collate_fn, return inputs.float()."


def _parameters(net: nn.Module) -> str:
    try:
        names = [str(one).split(":")[0] for one in inspect.signature(net.forward).parameters.values()]
    except (TypeError, ValueError):  # TorchScript
        return "other arguments"
    return f"({', '.join(names)})"


def check_outputs(task: Task, student: Outputs, teacher: Outputs | None, batch: Batch) -> None:
    """Raises `UserError` if both networks give another number of logits, or the labels do not fit the student's."""
    if teacher is not None and task.kind != BOXES and "logits" in student.heads and "logits" in teacher.heads:
        own, theirs = student.logits.shape, teacher.logits.shape
        if own[-1:] != theirs[-1:]:
            raise UserError(
                f"The student gives logits {tuple(own)} and the teacher {tuple(theirs)}: both need the same classes in one "
                "order. A network that returns features beside logits returns the logits first; of a teacher of other classes "
                "litdistill.models.backbone.cut(teacher, images) leaves the classifier out, for a method that reads features."
            )
    if batch.targets is not None and "logits" in student.heads:
        task.check_targets(student, batch.targets)
