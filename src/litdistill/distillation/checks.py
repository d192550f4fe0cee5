"""Checks before and during the training of a `Distiller`: they refuse runs that would fail late or train on wrong data."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning import Trainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader

from litdistill import methods
from litdistill.distillation.dry_run import check_network
from litdistill.distillation.inference import NORMS
from litdistill.distillation.recorded import RecordedTeacher
from litdistill.distillation.teacher import FrozenTeacher
from litdistill.methods import NAMES
from litdistill.methods.base import BOXES, WEIGHTS, MapMethod, Method
from litdistill.methods.shuffled import Shuffled
from litdistill.methods.sum import Sum
from litdistill.models.ensemble import Ensemble
from litdistill.tasks.base import Task, has_places
from litdistill.types import Batch, Outputs
from litdistill.utils.errors import UserError
from litdistill.utils.modes import eval_mode
from litdistill.utils.shapes import described

if TYPE_CHECKING:
    from litdistill.distillation.distiller import Distiller


def check_given(student: object, teacher: object, method: object, optimizer: object) -> None:
    """Raises `UserError` for networks that are none or have no weights, and for a method or optimizer of another type."""
    check_network(student, "student")
    if teacher is not None:
        check_network(teacher.net if isinstance(teacher, FrozenTeacher) else teacher, "teacher")
    if not isinstance(method, Method):
        named = {short: kind for kind, short in NAMES.items()} | {kind: kind for kind in NAMES}
        text = method.__name__ if isinstance(method, type) else str(method)
        near = named.get(text) or next((named[n] for n in difflib.get_close_matches(text, named, 1)), "KD")
        raise UserError(f"method={method!r} is no method: give an object, method=litdistill.{near}().")
    if isinstance(optimizer, torch.optim.Optimizer) or not callable(optimizer):
        raise UserError(
            f"optimizer={described(optimizer)} does not make an optimizer: give what makes one from the parameters, since "
            "those of the method are trained too: optimizer=functools.partial(torch.optim.SGD, lr=0.1)."
        )


def check_method(method: Method, teacher: object, task: Task) -> None:
    """Raises `UserError` if the method needs a teacher and it is None, or is not defined for the task's kind of logits."""
    name = type(method).__name__
    if method.needs_teacher and teacher is None:
        raise UserError(f"{name} learns from a teacher: give one, or use Supervised.")
    if task.kind not in method.kinds:
        others = "a method that reads features, LogitMSE, or for several labels BinaryKD"
        remedy = "dense_kd, pkd, fgd or pseudo_boxes" if task.kind == BOXES else others
        raise UserError(
            f"{name} is defined for logits that are {' or '.join(method.kinds)}, and those of {type(task).__name__} are "
            f"{task.kind}: use {remedy}."
        )
    if has_places(task) and not method.takes_places:
        known = {NAMES[kind]: getattr(methods, kind) for kind in sorted(NAMES, key=NAMES.__getitem__)}
        fitting = [k for k, found in known.items() if found.takes_places and not issubclass(found, MapMethod)]
        raise UserError(
            f"{name} compares whole samples, and {type(task).__name__} predicts at each place of one: use a method that takes "
            f"each as a sample ({', '.join(fitting)}), or of networks with maps one that compares these (cwd, at, fitnet). "
            "One of your own says so by takes_places = True."
        )


def check_average(task: Task, teachers: int) -> None:
    """Raises `UserError` for several teachers whose outputs have no mean."""
    if teachers > 1 and not task.averages:
        raise UserError(
            f"{type(task).__name__} takes one teacher, and there are {teachers}: what they find has no mean, since each has "
            "anchors of its own. Take one of them, without teacher.ensemble."
        )


def check_classes(method: Method, teacher: nn.Module | None) -> None:
    """Raises `UserError` if the teacher knows only some of the classes, and the method reads the probabilities of all."""
    if teacher is None or not method.needs_teacher or not isinstance(teacher, (Ensemble, RecordedTeacher)):
        return
    if not teacher.partial:
        return
    leaves = [m for m in method.modules() if isinstance(m, Method) and not isinstance(m, (Sum, Shuffled))]
    unfit = sorted({type(m).__name__ for m in leaves if m.needs_teacher and not m.some_classes})
    if unfit:
        known = ", ".join(f"{int(k.sum())} of {len(k)}" for k in teacher.known)
        raise UserError(
            f"{' and '.join(unfit)} needs a teacher of all classes, and "
            f"{'this one knows' if len(teacher.known) == 1 else 'these know'} {known}: use method=kd or soft_target_ce, which "
            "compare the classes that each knows, or a method that reads features alone."
        )


def check_pairing(
    method: Method,
    student: nn.Module,
    teacher: nn.Module | None,
    task: Task,
    example: Any,
    labels: str = "all",
    optimizer: Callable[..., Any] = torch.optim.Adam,
) -> None:
    """Raises `UserError` for arguments of another type, if the method lacks the teacher, the kind of logits, the labels or the
    example that it needs, or if student and teacher share parameters."""
    check_given(student, teacher, method, optimizer)
    check_method(method, teacher, task)
    net = teacher.net if isinstance(teacher, FrozenTeacher) else teacher
    check_average(task, len(net.weights) if isinstance(net, Ensemble) else 1)
    check_classes(method, net)
    check_weighted(method, labels)
    if not task.reads_labels and (not method.needs_teacher or method.needs_hard or method.reads_targets):
        raise UserError(
            f"{type(method).__name__} learns from labels, and {type(task).__name__} has none: use a method that reads the "
            "teacher's features alone, cosine, srd (soft=0), rkd or pkt."
        )
    check_labels(method, labels)
    name = type(method).__name__
    if teacher is not None and {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}:
        raise UserError(
            "The student has parameters of the teacher, which would be frozen with it: give one of them as a copy, "
            "copy.deepcopy(net)."
        )
    kind = type(method)
    builds = kind.build is not Method.build or kind.prepare is not Method.prepare
    if example is None and (builds or any(method.taps())):
        raise UserError(
            f"{name} reads features or makes layers of its own: give Distiller(example=…), a batch of a few samples as the "
            "loader yields it, from which they are found."
        )


def check_weighted(method: Method, labels: str = "all") -> None:
    """Raises `UserError` if every term of the loss has the weight 0, as far as this project's own methods say."""
    parts = [m for m in method.modules() if isinstance(m, Method) and type(m).__module__.startswith("litdistill.")]
    own = [(name, getattr(part, name, None)) for part in parts for name in WEIGHTS]
    given = {name: value for name, value in own if isinstance(value, (int, float))}
    if given and not any(value for _, value in own) and (labels == "none" or not method.hard):
        shown = ", ".join(f"{name}=0" for name in (*(["hard"] if labels != "none" else []), *given))
        raise UserError(f"{type(method).__name__}({shown}): nothing is learned. Give one of them a weight.")


def check_readable(method: Method, task: Task, student: Outputs, teacher: Outputs | None, batch: Batch) -> None:
    """Raises `UserError` for a method that reads logits of a teacher without classes: it is called once, in eval mode."""
    if teacher is None or task.measures(teacher):
        return
    with eval_mode(method):
        method(student._replace(ids=batch.ids), teacher, batch)


def check_trained(distiller: Distiller, batch: Batch | None) -> None:
    """Raises `UserError` if no sample has a label and the method trains no classifier, as those that read features alone.

    A dry forward of `batch` in eval mode shows which parameters the logits depend on and which the method's own terms.
    """
    if batch is None or distiller.labels != "none" or distiller.teacher is None or distiller.method.relabels:
        return
    with eval_mode(distiller.student, distiller.method), torch.enable_grad():
        student = distiller.extractor.run(lambda net: distiller.task.forward(net, batch, False))
        terms = distiller.method(student._replace(ids=batch.ids), distiller.teacher(batch), batch)
        idle = _parameters_of(student.main.sum(), distiller.student)
        idle -= _parameters_of(torch.stack([*terms.values()]).sum(), distiller.student)
    if idle:
        layers = sorted({name.rpartition(".")[0] for name in idle})
        what = "classifier" if distiller.task.reads_labels else "last layer"
        raise UserError(
            f"{type(distiller.method).__name__} reads features and trains no {what} ({', '.join(layers[:3])}), and no image "
            "has a label that is read: use method=kd, add it (method=kd_at), or train on labelled images too."
        )


def _parameters_of(value: Tensor, net: nn.Module) -> set[str]:
    """Returns the names of the trained parameters of `net` that a scalar depends on."""
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    if not named or not value.requires_grad:
        return set()
    found = torch.autograd.grad(value, list(named.values()), retain_graph=True, allow_unused=True)
    return {name for name, gradient in zip(named, found, strict=True) if gradient is not None}


def check_labels(method: Method, labels: str) -> None:
    """Raises `UserError` if the method cannot learn from data of which "some" or "none" have labels ("all": it can)."""
    if labels == "all":
        return
    readers = sorted({type(m).__name__ for m in method.modules() if isinstance(m, Method) and m.reads_targets})
    if readers:
        raise UserError(
            f"{' and '.join(readers)} compares the labels of all samples, and the images of data.unlabelled have none: use "
            "method=kd or another that reads the teacher alone, or leave data.unlabelled out."
        )
    if labels == "none" and (not method.needs_teacher or (method.needs_hard and not method.relabels)):
        what = "needs the labels' loss" if method.needs_hard else "has no teacher to learn from"
        raise UserError(
            f"{type(method).__name__} {what}, and no image has a label (data.labelled=false): use method=kd with a teacher, or "
            "train on the labelled images too."
        )


def check_plateau(scheduler: ReduceLROnPlateau, interval: str, monitor: str, task: Task) -> None:
    """Raises `UserError` for a ReduceLROnPlateau that is stepped by the step, or whose mode contradicts the metric."""
    if interval != "epoch":
        raise UserError("ReduceLROnPlateau waits for a metric of the validation: its interval is epoch.")
    if monitor == f"val/{task.monitor[0]}" and scheduler.mode != task.monitor[1]:
        raise UserError(
            f"ReduceLROnPlateau(mode={scheduler.mode!r}) would cut the learning rate whenever {monitor} gets better: its "
            f"mode is {task.monitor[1]!r}."
        )


def check_trainer(trainer: Trainer, method: Method) -> None:
    """Raises `UserError` where DDP would overwrite a method's buffers, or `overfit_batches` would not fix the samples."""
    model = trainer.strategy.model
    if isinstance(model, DistributedDataParallel) and model.broadcast_buffers:
        own = [m for m in method.modules() if not isinstance(m, NORMS)]
        if any(True for module in own for _ in module.buffers(recurse=False)):
            raise UserError(
                f"{type(method).__name__} remembers samples, each process its own, and DDP would overwrite them with the "
                "first one's: use strategy=DDPStrategy(broadcast_buffers=False)."
            )
    loader: Any = trainer.train_dataloader
    overfit = trainer.overfit_batches  # type: ignore[attr-defined]
    if overfit and loader is not None and not isinstance(loader, DataLoader):
        raise UserError(
            "overfit_batches fixes the samples of torch's DataLoaders alone, and this loader would draw others each epoch: "
            "take few samples instead, as ImageData(per_class=…) or ImageData(epoch_size=…) does."
        )


def check_finite(distiller: Distiller, means: Mapping[str, float | Tensor], weights: bool = False) -> None:
    """Raises `UserError` if the mean loss since the last log, or with `weights` a weight of the student, is not finite."""
    if means and not math.isfinite(means["loss"]):
        bad = ", ".join(f"{k} = {float(v):g}" for k, v in means.items())
    elif weights and not _finite_weights(distiller.student):
        bad = "the student's weights"
    else:
        return
    remedy = "A smaller learning rate or gradients clipped at 1 usually help."
    if any(p.dtype == torch.float16 for p in distiller.student.parameters()):
        remedy = (
            "The student's weights are float16, which holds too few numbers for an optimizer: train student.float(), in the "
            "precision 16-mixed or bf16-mixed."
        )
    raise UserError(
        f"The loss is not finite any more, before step {distiller.trainer.global_step + 1} of epoch "
        f"{distiller.current_epoch}: {bad}. Checkpoints of earlier epochs are kept. {remedy}"
    )


def _finite_weights(net: nn.Module) -> bool:
    largest = [p.detach().abs().max().float() for p in net.parameters() if p.numel()]
    return not largest or bool(torch.stack(largest).isfinite().all())


def world_size() -> int:
    """Returns the number of processes of the distributed run, 1 without one."""
    from torch import distributed

    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
