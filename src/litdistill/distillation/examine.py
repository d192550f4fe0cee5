"""The teacher on the validation set: evaluated once, compared with chance level, and with the student after each epoch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from litdistill.data.protocol import IndexedData
from litdistill.distillation.mixed import judges
from litdistill.features.outputs import first_tensor
from litdistill.methods.base import CATEGORICAL, Method
from litdistill.models.ensemble import Ensemble
from litdistill.tasks.base import Task, at_places, has_places
from litdistill.tasks.metrics import of_known_classes
from litdistill.types import Batch, Outputs
from litdistill.utils.errors import UserError
from litdistill.utils.units import named, quantity, shown

if TYPE_CHECKING:
    from litdistill.distillation.distiller import Distiller

log = logging.getLogger(__name__)


class TeacherOnValidation:
    """Stores the teacher's outputs for the validation batches, and accumulates the student's agreement with them.

    `known`: the outputs for `data.val_ids`, in that order, if already computed. `whole`: `Task.agreement_metric`.
    """

    def __init__(self, known: Outputs | None = None, data: IndexedData | None = None, whole: Metric | None = None):
        self.known, self.data, self.whole = known, data, whole
        self.batches: list[tuple[Outputs, Tensor]] = []  # by batch index: outputs, and the batch's `_mark`
        self.metrics: dict[str, float] = {}
        self.members: list[tuple[dict[str, float], Tensor | None]] = []  # of an ensemble: what `run` returns, for each
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def run(self, distiller: Distiller) -> tuple[dict[str, float], Tensor | None]:
        """Returns the teacher's metrics on the validation set and all labels (M,); stores its outputs by batch."""
        trainer, task, device = distiller.trainer, distiller.task, distiller.device
        metrics, targets, outputs = task.metrics().to(device), [], []
        members: list[tuple[Outputs, Tensor]] = []
        self.batches, self.metrics, self.members = [], {}, []
        if distiller.teacher is not None and not judges(distiller.teacher.net, "val"):
            return {}, None
        loader: Any = trainer.val_dataloaders
        for i, raw in enumerate(loader):
            if i >= trainer.num_val_batches[0]:  # limit_val_batches, as in the student's evaluation
                break
            batch = task.batch(trainer.precision_plugin.convert_input(trainer.strategy.batch_to_device(raw)))
            out = self._outputs(distiller, batch)
            self.batches.append((out, _mark(batch)))
            if "members" in out.heads:
                members.append((out, batch.targets))
            out, known = of_classes_known(out, batch.targets)
            if task.measures(out):
                metrics.update(out, task.truth(known, out))
            targets.append(known)
            outputs.append(out)
        if outputs and not task.measures(outputs[0]):
            log.info(
                "The teacher has no classes: it is not judged on the validation set, nor compared with the student there."
            )
            return {}, None
        self.members = measured_members(task, members, trainer.world_size, device)
        warn_of_probabilities(outputs)
        if task.kind == CATEGORICAL:
            warn_of_few_classes(distiller.method, outputs)
        found = {name: float(value) for name, value in metrics.compute().items()}
        self.metrics = {f"teacher_{task.monitor[0]}": found[task.monitor[0]]} if task.monitor[0] in found else {}
        return found, _gathered(targets, trainer.world_size)

    def _outputs(self, distiller: Distiller, batch: Batch) -> Outputs:
        assert distiller.teacher is not None
        if self.known is None or batch.ids is None or self.data is None:
            return distiller.task.keep(distiller.teacher.with_members(batch, "val"))
        place = torch.searchsorted(self.data.val_ids, batch.ids.cpu())
        return Outputs({name: head[place].to(distiller.device) for name, head in self.known.heads.items()})

    def of_batch(self, distiller: Distiller, batch: Batch, index: int) -> Outputs | None:
        """Returns the teacher's outputs for a batch: those of `run` for the validation batch `index`, unless loaders shuffle;
        -1: not of the validation set.

        None without a teacher; and where `run` was not called and the task has labels, so that only the student is validated.
        """
        if distiller.teacher is None:
            return None
        kept = self.batches[index] if 0 <= index < len(self.batches) and not distiller.trainer.sanity_checking else None
        if kept is not None and torch.equal(kept[1], _mark(batch)):
            return kept[0]
        if index < 0:
            return (
                None
                if distiller.task.reads_labels
                else distiller.task.keep(distiller.teacher.with_members(batch, "test"))
            )
        return self._outputs(distiller, batch) if kept is not None or not distiller.task.reads_labels else None

    def compare(self, task: Task, student: Outputs, teacher: Outputs | None, targets: Any) -> None:
        """Adds the agreement of both networks on a validation batch with these labels."""
        if teacher is None or not task.measures(teacher):
            return
        count = len(targets)
        if self.whole is not None:
            self.whole.to(student.main.device).update(student, teacher)
            self._count += count
            return
        if has_places(task):
            student, teacher = (at_places(task, targets, x) for x in (student, teacher))
            count = len(student.main)
        for name, values in task.agreement(student, teacher).items():
            self._sums[name] = self._sums.get(name, 0) + values.double().sum()
        self._count += count

    def agreement(self, device: torch.device) -> dict[str, float]:
        """Returns the mean agreements over all samples of all processes since the last call, and the teacher's metric."""
        if not self._count:
            return {}
        if self.whole is not None:
            found = {name: float(value) for name, value in self.whole.compute().items()}
            self.whole.reset()
            self._count = 0
            return found | self.metrics
        sums = torch.stack([*self._sums.values(), torch.tensor(float(self._count), dtype=torch.float64, device=device)])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            sums = torch.stack(gather_all_tensors(sums)).sum(0)
        found = {name: float(value / sums[-1]) for name, value in zip(self._sums, sums[:-1], strict=True)}
        self._sums, self._count = {}, 0
        return found | self.metrics


def examine(distiller: Distiller) -> None:
    """Runs the teacher over the validation set once. Raises `UserError` if it is no better than chance, or a member of an
    ensemble on the classes that it knows."""
    validation, task, allowed = distiller.on_validation, distiller.task, distiller.allow_chance
    whole = validation.run(distiller)
    for i, judged in enumerate(validation.members):  # first: their errors say which of them it is
        assert distiller.teacher is not None
        assert isinstance(distiller.teacher.net, Ensemble)
        who = f"Member {i} of the teacher ({distiller.teacher.net.names[i]})"
        check_teacher(task, *judged, allow_chance=allowed, who=who)
    check_teacher(task, *whole, allow_chance=allowed)


def of_classes_known(outputs: Outputs, targets: Any) -> tuple[Outputs, Any]:
    """Returns the outputs and targets of the samples whose class the network knows; for most networks all of them."""
    if "logits" not in outputs.heads or not isinstance(targets, Tensor):
        return outputs, targets
    known = of_known_classes(outputs.logits, targets)
    return (outputs, targets) if bool(known.all()) else (outputs.rows(known), targets[known])


def of_member(members: Tensor, index: int, targets: Any) -> tuple[Outputs, Any]:
    """Returns the outputs of one member of an ensemble, and the targets, for the samples of the classes that it knows; where a
    sample has several labels, for the labels that it knows. `members`: (N, members, classes)."""
    logits = members[..., index, :]
    if isinstance(targets, Tensor) and targets.shape == logits.shape:
        known = (logits != -torch.inf).all(0)
        return (Outputs.of(logits), targets) if bool(known.all()) else (Outputs.of(logits[:, known]), targets[:, known])
    return of_classes_known(Outputs.of(logits), targets)


def measured_members(
    task: Task, batches: list[tuple[Outputs, Tensor]], world_size: int, device: torch.device
) -> list[tuple[dict[str, float], Tensor | None]]:
    """Returns for each member of an ensemble its metrics on the samples of the classes that it knows, and their labels."""
    found = []
    for i in range(batches[0][0].heads["members"].shape[-2] if batches else 0):
        pairs = [of_member(out.heads["members"], i, targets) for out, targets in batches]
        metrics = task.metrics().to(device)
        for out, targets in pairs:
            metrics.update(out, targets)
        labels = _gathered([targets for _, targets in pairs], world_size)
        empty = labels is not None and not len(labels)
        found.append(({} if empty else {k: float(v) for k, v in metrics.compute().items()}, labels))
    return found


def _mark(batch: Batch) -> Tensor:
    """Returns a tensor that identifies a batch: its ids (N,), or the sum of its first input."""
    return batch.ids if batch.ids is not None else first_tensor(batch.inputs).double().sum()


def _gathered(targets: list[Any], world_size: int) -> Tensor | None:
    """Returns the labels of all processes, concatenated; None if they are not tensors."""
    if not targets or not all(isinstance(t, Tensor) for t in targets):
        return None
    whole = torch.cat(targets)
    return torch.cat(gather_all_tensors(whole)) if world_size > 1 else whole


def warn_of_probabilities(outputs: list[Outputs]) -> None:
    """Warns if the teacher returns probabilities instead of logits: their softmax at a temperature is almost uniform."""
    heads = [out.heads["logits"] for out in outputs if "logits" in out.heads]
    if not heads or heads[0].ndim != 2 or heads[0].shape[1] < 2:
        return
    rows = heads[0].float()
    if bool((rows >= 0).all()) and torch.allclose(rows.sum(1), torch.ones(len(rows), device=rows.device), atol=1e-4):
        log.warning(
            "All rows of the teacher's outputs are probabilities (none negative, and each sums to 1), and logits are expected: "
            "its soft targets will be almost flat. Leave its last softmax out, or give their logarithms."
        )


def warn_of_few_classes(method: Method, outputs: list[Outputs]) -> None:
    """Warns if a term of the method sees nothing but the teacher's decision, as there are so few classes."""
    heads = [out.heads["logits"] for out in outputs if "logits" in out.heads]
    parts = [m for m in method.modules() if isinstance(m, Method) and heads and heads[0].shape[-1] < m.fewest_classes]
    for name in sorted({type(part).__name__ for part in parts}):
        log.warning(
            "%s sees only which of the two classes the teacher prefers, not by how much: for two classes use method=kd, dkd "
            "or wttm.",
            name,
        )


def check_teacher(
    task: Task,
    metrics: Mapping[str, float],
    targets: Tensor | None,
    allow_chance: bool = False,
    who: str = "The teacher",
) -> None:
    """Raises `UserError` for a teacher whose monitored metric is NaN or no better than chance; warns where the validation set
    is too small to tell. `who`: what it is called."""
    name, _ = task.monitor
    value = metrics.get(name)
    if value is None:
        return
    if value != value and targets is not None and task.chance(targets) is None and not task.can_judge(value, targets):
        raise UserError(
            f"{name} is not defined on the validation set: its {quantity(len(targets), 'sample')} have no object, so that no "
            "epoch could be chosen. Give validation data with labels, or another data.val_size."
        )
    if value != value:
        raise UserError(f"{who}'s {name} is not a number. Its weights are damaged or of another network.")
    chance = task.chance(targets) if targets is not None else None
    if targets is None or chance is None or task.better(value, chance) or allow_chance:
        return
    if not task.can_judge(value, targets):
        log.warning(
            "%s cannot be judged on %s for validation: its %s is %s, guessing gives up to %s, and a good teacher "
            "may have as little on so few. A larger data.val_size tells.",
            *(who, quantity(len(targets), "sample"), named(name), shown(name, value), shown(name, chance)),
        )
    else:
        raise UserError(
            f"{who} is at chance level: its {named(name)} on the validation set is {shown(name, value)}, and guessing gives up "
            f"to {shown(name, chance)}. A student would learn noise from it. Train the teacher, for longer if it was, name one "
            "that is trained, check that it gets inputs and classes as it was trained with, or allow it with allow_chance=true."
        )
