"""Predictions of a network for a whole split, and the task's metrics of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from litdistill.data.foreign import training_inputs
from litdistill.distillation.examine import of_classes_known
from litdistill.distillation.mixed import reads_ids
from litdistill.distillation.recorded import RecordedTeacher
from litdistill.distillation.teacher_cache import cached_logits
from litdistill.features.outputs import run_network
from litdistill.models.ensemble import Ensemble, with_members
from litdistill.models.parts import evaluating
from litdistill.tasks.base import Task, at_places
from litdistill.tasks.classification import Classification
from litdistill.tasks.findings import judge
from litdistill.types import EMBEDDING, Batch, Outputs
from litdistill.utils.hashing import stable_repr
from litdistill.utils.modes import eval_mode


@torch.no_grad()
def predict_split(
    net: nn.Module, data: Any, split: str, device: torch.device | str = "cpu", task: Task | None = None
) -> tuple[Outputs, Tensor]:
    """Returns what `Task.keep` keeps of the outputs of `net` in eval mode for all of a split, float32, and the targets, all on
    the CPU."""
    task = task or Classification()
    found: list[tuple[Outputs, Tensor]] = []
    with eval_mode(net.to(device)):
        for batch in data.batches(split, device):
            outputs = task.keep(task.forward(net, batch, False))
            found.append((Outputs({k: v.float().cpu() for k, v in outputs.heads.items()}), batch.targets.cpu()))
    heads = {name: torch.cat([outputs.heads[name] for outputs, _ in found]) for name in found[0][0].heads}
    return Outputs(heads), torch.cat([targets for _, targets in found])


@torch.no_grad()
def output_width(net: nn.Module, data: Any, device: torch.device | str) -> int:
    """Returns how many outputs `net` has."""
    return run_network(net.to(device).eval(), training_inputs(data, 2).to(device)).main.shape[1]


def collect(net: nn.Module, data: Any, split: str, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Returns the logits (N, outputs) of `net` for a split, and the targets."""
    outputs, targets = predict_split(net, data, split, device)
    return outputs.logits, targets


def teacher_outputs(
    teacher: nn.Module, data: Any, task: Task, split: str, device: torch.device | str, folder: Path | None
) -> Outputs | None:
    """Returns the teacher's outputs for a split; runs with the same cache `folder` compute them once.

    None for a file of outputs that lacks a sample of the split. Those of an ensemble have the head `members`
    (`litdistill.models.ensemble.Members`), unless the task keeps predictions alone: these are not known one by one.
    """
    if isinstance(teacher, RecordedTeacher):
        return teacher.of_split(split) if teacher.judges(split) else None
    mixed, kept_by_id = reads_ids(teacher), folder is not None and hasattr(data, "get_batch")
    if not mixed and not kept_by_id:
        return predict_split(with_members(teacher), data, split, device, task)[0]
    if isinstance(teacher, Ensemble) and _own_keep(task):
        return predict_split(teacher, data, split, device, task)[0]
    if isinstance(teacher, Ensemble):  # members are known one by one, to every ensemble that they are in
        found = [teacher_outputs(net, data, task, split, device, folder) for net in teacher.parts().values()]
        if any(outputs is None for outputs in found):
            return None
        each = teacher.arranged([outputs.logits for outputs in found if outputs is not None])
        return Outputs({"logits": teacher.combined(each), "members": each})
    assert folder is not None
    compute = lambda: predict_split(teacher, data, split, device, task)[0].main  # noqa: E731
    run = lambda inputs: task.keep(task.forward(teacher, Batch(inputs, None), False)).main  # noqa: E731
    kept = cached_logits(teacher, data, split, torch.device(device), folder, compute, run, _own_keep(task))
    return Outputs({head_name(teacher, data, task, device): kept})


def _own_keep(task: Task) -> str:
    """Returns what the kept outputs depend on besides the network: the options of a task that keeps others than it gets."""
    return "" if type(task).keep is Task.keep else stable_repr([type(task).__qualname__, vars(task)])


@torch.no_grad()
def head_name(net: nn.Module, data: Any, task: Task, device: torch.device | str) -> str:
    """Returns the name of the head that `net` is trained for, `logits` or `embedding`, by a forward of two samples."""
    batch = data.get_batch("train", data.train_ids[:2].to(device))
    with evaluating(net.to(device)):
        heads = task.keep(task.forward(net, batch, False)).heads
    return next((name for name in ("logits", EMBEDDING) if name in heads), next(iter(heads)))


def evaluations_folder(cfg: DictConfig) -> Path | None:
    """Returns the cache folder of the teacher's validation and test outputs, shared by runs; None without a cache."""
    if cfg.teacher is None or (cfg.teacher.get("cache") or {}).get("mode") in ("off", "memory"):
        return None
    return Path(cfg.runs) / "cache" / "evaluations"


def local_metrics(task: Task) -> Metric | MetricCollection:
    """Returns the task's metrics without synchronization between processes."""
    return local(task.metrics())


def local(metrics: Metric | MetricCollection) -> Metric | MetricCollection:
    """Returns metrics, which no longer synchronize between processes."""
    for metric in metrics.values() if isinstance(metrics, MetricCollection) else [metrics]:
        metric.distributed_available_fn = lambda: False  # the constructor alone reads `sync_on_compute`
    return metrics


def measured(task: Task, outputs: Outputs, targets: Tensor) -> dict[str, float]:
    """Returns the task's metrics of outputs for a whole split, computed in this process alone."""
    metrics = local_metrics(task)
    metrics.update(outputs, targets)
    return {name: float(value) for name, value in metrics.compute().items()}


def quality(
    net: nn.Module,
    data: Any,
    task: Task,
    split: str = "test",
    device: torch.device | str = "cpu",
    teacher: nn.Module | None = None,
) -> dict[str, float]:
    """Returns the task's metrics of `net` for a split. `teacher`: what a task without labels compares with."""
    outputs, targets = predict_split(net, data, split, device, task)
    expected = None
    if teacher is not None and not task.reads_labels:
        expected = teacher_outputs(teacher, data, task, split, device, None)
    return measured(task, outputs, task.truth(targets, expected))


def agreement(task: Task, student: Outputs, teacher: Outputs, targets: Tensor) -> dict[str, float]:
    """Returns the means of `Task.agreement` over all samples, or all places of sequences; or what `Task.agreement_metric`
    computes."""
    whole = task.agreement_metric()
    if whole is not None:
        local(whole).update(student, teacher)
        return {name: float(value) for name, value in whole.compute().items()}
    student, teacher = (at_places(task, targets, x) for x in (student, teacher))
    return {name: values.double().mean().item() for name, values in task.agreement(student, teacher).items()}


def measure(
    student: nn.Module,
    teacher: nn.Module | None,
    data: Any,
    task: Task,
    split: str = "test",
    device: torch.device | str = "cpu",
    folder: Path | None = None,
) -> dict[str, Any]:
    """Returns the student's metrics and, with a teacher, the teacher's metrics and their agreement, as plain dicts.

    The teacher's are left out where it is a file of outputs that lacks a sample of the split, and for a teacher without classes
    in a task that has them.

    `chance`: the monitored metric at chance level; None where it is undefined. `findings`: what is wrong with the student
    (`litdistill.tasks.findings.judge`). `by_class`: of each network what `Task.by_class` returns, where it returns any.

    `folder`: see `teacher_outputs`.
    """
    outputs, targets = predict_split(student, data, split, device, task)
    expected = None if teacher is None else teacher_outputs(teacher, data, task, split, device, folder)
    truth = task.truth(targets, expected)
    found: dict[str, Any] = {"student": measured(task, outputs, truth), "chance": task.chance(truth)}
    found["findings"] = judge(task, outputs, truth, found["student"].get(task.monitor[0]), split, data.class_names)
    if expected is not None and task.measures(expected):
        likeness = agreement(task, outputs, expected, targets)
        found |= {"teacher": measured(task, *of_classes_known(expected, truth)), "agreement": likeness}
    networks = {"student": outputs} | ({"teacher": expected} if expected is not None and "teacher" in found else {})
    of_classes = {who: task.by_class(kept, truth, data.class_names) for who, kept in networks.items()}
    found["by_class"] = {who: classes for who, classes in of_classes.items() if classes}
    return found


def whole_split(data: Any, split: str) -> tuple[Tensor | None, Tensor]:
    """Returns the inputs (N, ...) of "val" or "test", None where they are no single tensor, and the targets."""
    batches = list(data.batches(split))
    one = all(isinstance(batch.inputs, Tensor) for batch in batches)
    return torch.cat([b.inputs for b in batches]) if one else None, torch.cat([b.targets for b in batches])


def spread_out(n: int, of: int) -> Tensor:
    """Returns `n` evenly spaced indices below `of` (some data sets are sorted by class)."""
    return torch.linspace(0, of - 1, min(n, of), dtype=torch.float64).long()
