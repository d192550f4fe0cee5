"""What is wrong with a finished run, in order of weight: each finding with its figure and the one change to try.

    litdistill doctor run=runs/train/<stamp>

Reads the run, its teacher and its checkpoints, and runs both networks over the validation set and as many training samples.
Nothing is trained, and the test set is not read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from litdistill.config.build import build_student
from litdistill.config.distiller import build_distiller, build_method, example_batch
from litdistill.data import augment as aug
from litdistill.data.foreign import ForeignData
from litdistill.distillation.balance import Balance
from litdistill.distillation.batch_statistics import has_lag, recompute, training_batches
from litdistill.distillation.distiller import Distiller
from litdistill.distillation.mixed import judges
from litdistill.distillation.step import label_terms, outputs_of_both
from litdistill.evaluation.calibration import fit_temperature
from litdistill.evaluation.evaluate import load_run, rebuild
from litdistill.evaluation.findings import GAP, GAP_REMEDY
from litdistill.evaluation.predictions import measured, predict_split, quality
from litdistill.methods.base import CATEGORICAL
from litdistill.models.preprocess import preprocessing
from litdistill.tasks.base import Task
from litdistill.types import Outputs
from litdistill.utils.checkpoint import load_checkpoint
from litdistill.utils.errors import UserError
from litdistill.utils.units import SHARES, named, quantity, shown

SURE = 0.95  # the teacher's probability of another class from which it contradicts a label
CONTRADICTED = 0.01  # the share of such labels from which they are a finding
SHARPER = 1.5  # the temperature that calibrates the teacher, relative to the method's, from which it is too sure
LARGE = 1.0  # the gradient of a hint relative to that of the labels' loss from which its weight is too large
LAGGED = 0.05  # by how much statistics computed anew raise a share on the validation set
BATCHES = 4  # minibatches whose gradients are measured
LISTED = 10  # samples that a finding names


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
    balanced: bool  # whether weights of hints were set by their gradients

    def value(self, outputs: Outputs, targets: Tensor | None = None) -> float:
        """Returns the monitored metric of outputs."""
        return measured(self.task, outputs, self.targets if targets is None else targets)[self.task.monitor[0]]

    def shown(self, value: float) -> str:
        """Returns a value of the monitored metric in words."""
        return shown(self.task.monitor[0], value)


Rule = Callable[[Case], Finding | None]


def diagnose(
    folder: str | Path, overrides: DictConfig | None = None, device: str = "cpu", trust: Sequence[str] = ()
) -> list[Finding]:
    """Returns what is wrong with a finished run, the weightiest first. Raises `UserError` for a run that cannot be rebuilt."""
    folder = Path(folder)
    cfg, summary = load_run(folder, trust)
    data, distiller = rebuild(folder, overrides, trust)
    if isinstance(data, ForeignData) or not distiller.task.reads_labels:
        raise UserError(
            "The doctor reads runs whose samples have ids and labels: data of this project, not a loader of yours."
        )
    best = folder / "checkpoints" / "best.ckpt"
    epoch = int(load_checkpoint(best)["epoch"]) + 1 if best.is_file() else None
    return judged(examined(cfg, data, distiller, summary, epoch, device))


def examined(
    cfg: DictConfig,
    data: Any,
    distiller: Distiller,
    summary: Mapping[str, Any],
    best_epoch: int | None,
    device: torch.device | str = "cpu",
) -> Case:
    """Returns the case of a rebuilt run: the outputs of both networks."""
    task, student = distiller.task, distiller.deployed_student
    outputs, targets = predict_split(student, data, "val", device, task)
    net = distiller.teacher.net if distiller.teacher is not None else None
    teacher = predict_split(net, data, "val", device, task)[0] if net is not None and judges(net, "val") else None
    if teacher is not None and not task.measures(teacher):  # it has no classes
        teacher = None
    trained = of_samples(student, data, task, labeled_ids(data)[: len(targets)], device)
    epochs, balanced = int(summary["epochs"]), bool(summary.get("balance"))
    return Case(
        *(cfg, data, task, distiller, device, targets, outputs, teacher, trained, best_epoch, epochs),
        balanced=balanced,
    )


def judged(case: Case) -> list[Finding]:
    """Returns the findings of all rules, the weightiest first."""
    found = [finding for rule in RULES if (finding := rule(case)) is not None]
    return sorted(found, key=lambda finding: -finding.weight)


def labeled_ids(data: Any) -> Tensor:
    """Returns the ids of the training samples with a label, in random order."""
    ids, targets = aug.order(0, 0, data.train_ids), data.train_targets
    return ids[targets[ids] >= 0] if targets.ndim == 1 and not targets.is_floating_point() else ids


@torch.no_grad()
def of_samples(
    net: nn.Module, data: Any, task: Task, ids: Tensor, device: torch.device | str
) -> tuple[Outputs, Tensor]:
    """Returns the outputs of `net` for training samples without augmentation, and their targets; on the CPU."""
    return predict_split(net, _These(data, ids), "train", device, task)


class _These:
    """A data module whose training split is these samples."""

    def __init__(self, data: Any, ids: Tensor):
        self.data, self.ids = data, ids

    def batches(self, split: str, device: torch.device | str = "cpu") -> Any:
        """Yields batches of the samples."""
        for chunk in self.ids.split(self.data.batch_size):
            yield self.data.get_batch(split, chunk.to(device), None)


# -- rules --------------------------------------------------------------------------------------------------------------


def teacher_at_chance(case: Case) -> Finding | None:
    """Judges the teacher on the validation set."""
    if case.teacher is None:
        return None
    value, chance = case.value(case.teacher), case.task.chance(case.targets)
    if chance is None or case.task.better(value, chance):
        return None
    return Finding(
        1.0,
        "teacher at chance",
        f"The teacher's {named(case.task.monitor[0])} on the validation set is {case.shown(value)}, and guessing gives up to "
        f"{case.shown(chance)}: it teaches noise.",
        "train it first (teacher.checkpoint=auto), or name another (teacher.checkpoint=<run folder>)",
    )


def other_preprocessing(case: Case) -> Finding | None:
    """Compares how both networks normalize and resize, where the teacher is no better than the student it taught."""
    net = case.distiller.teacher.net if case.distiller.teacher is not None else None
    if net is None or case.teacher is None:
        return None
    own, others = preprocessing(case.distiller.deployed_student), preprocessing(net)
    if own == others or case.task.better(case.value(case.teacher), case.value(case.student)):
        return None
    return Finding(
        0.8,
        "preprocessing",
        f"The teacher sees images by {others}, the student by {own}, and the teacher is no better than the student: "
        f"{case.shown(case.value(case.teacher))} and {case.shown(case.value(case.student))} on the validation set.",
        "give the teacher the values that it was trained with (teacher.preprocess={mean: [..], std: [..]})",
    )


def overconfident(case: Case) -> Finding | None:
    """Compares the temperature that calibrates the teacher on the validation set with the method's."""
    temperature = case.cfg.method.get("temperature")
    if case.teacher is None or case.task.kind != CATEGORICAL or not isinstance(temperature, (int, float)):
        return None
    if "logits" not in case.teacher.heads:  # a task that keeps its predictions alone, such as masks
        return None
    logits, targets = case.teacher.logits, case.targets
    if logits.ndim != 2 or targets.ndim != 1 or targets.is_floating_point():
        return None
    right = fit_temperature(logits, targets)
    if right < SHARPER * temperature:
        return None
    p = (logits.double() / temperature).softmax(1)
    entropy = -(p * p.clamp_min(1e-30).log()).sum(1).mean().item()
    return Finding(
        min(1.0, 0.2 * right / temperature),
        "overconfident teacher",
        f"The teacher's targets at temperature {temperature:g} have an entropy of {entropy:.3g} nats, of "
        f"{math.log(logits.shape[1]):.3g} at most; a temperature of {right:.3g} calibrates it.",
        f"method.temperature={right:.2g}",
    )


def lagging_statistics(case: Case) -> Finding | None:
    """Computes statistics of batch normalization anew over training samples, and the metric with them."""
    name, direction = case.task.monitor
    norms = [m for m in case.distiller.evaluated.modules() if has_lag(m)]
    if not norms or name not in SHARES:
        return None
    kept = {k: v.clone() for k, v in case.distiller.evaluated.state_dict().items()}
    try:
        recompute(norms, case.distiller.to(case.device), training_batches(case.data, torch.device(case.device)))
        anew = quality(case.distiller.deployed_student, case.data, case.task, "val", case.device)[name]
    finally:
        case.distiller.evaluated.load_state_dict(kept)
    now = case.value(case.student)
    if anew - now < LAGGED or direction != "max":
        return None
    return Finding(
        min(1.0, 5 * (anew - now)),
        "statistics of batch normalization",
        f"They lag behind the weights: {named(name)} on the validation set is {case.shown(now)}, and {case.shown(anew)} with "
        "statistics computed anew over training samples.",
        "more steps (trainer.max_epochs), or a larger momentum in the layers of batch normalization",
    )


def gradient_shares(case: Case) -> Finding | None:
    """Measures the gradients of hints at the student as it was at the start."""
    shares = {} if case.balanced else initial_shares(case)
    name, share = max(shares.items(), key=lambda item: item[1], default=("", 0.0))
    if share <= LARGE:
        return None
    return Finding(
        min(1.0, 0.4 + 0.2 * math.log10(share)),
        "share of a term",
        f"At the start the gradient of {name} at the student is {share:.3g} times that of the other terms: the labels hardly "
        "count.",
        "balance=auto",
    )


def initial_shares(case: Case) -> dict[str, float]:
    """Returns for each hint the norm of its gradient relative to that of all other terms, for the run's first student."""
    cfg, data, task, net = case.cfg.copy(), case.data, case.task, case.distiller.teacher
    torch.manual_seed(cfg.seed)
    cfg.balance, cfg.ema = None, None
    with torch.random.fork_rng():
        torch.manual_seed(cfg.seed)
        student = build_student(cfg, data, None if net is None else net.net)
        distiller = build_distiller(
            cfg, student, build_method(cfg), None if net is None else net.net, task, example_batch(data), data
        ).to(case.device)
        if net is not None:
            distiller.teacher.to(case.device)  # type: ignore[union-attr]
        distiller.method.set_epoch(distiller.method.init_epochs)
        balance = Balance(steps=BATCHES)
        parameters = [p for p in distiller.student.parameters() if p.requires_grad]
        for chunk in labeled_ids(data).split(data.batch_size)[:BATCHES]:
            batch = task.batch(data.get_batch("train", chunk.to(case.device), None))
            outputs, teacher, batch = outputs_of_both(distiller, batch, None)
            if not (labels := label_terms(distiller, outputs, batch)):
                return {}
            balance.measure(labels, distiller.method(outputs, teacher, batch), list(outputs.heads.values()), parameters)
    return {name: figures["unbalanced"] for name, figures in balance.found().items()}


def learned_by_heart(case: Case) -> Finding | None:
    """Compares the student on training samples with the validation set."""
    name = case.task.monitor[0]
    if name not in SHARES:
        return None
    train, val = case.value(*case.trained), case.value(case.student)
    if train - val <= GAP:
        return None
    return Finding(
        min(1.0, train - val),
        "overfitting",
        f"The student's {named(name)} is {case.shown(train)} on {quantity(len(case.trained[1]), 'training sample')}, and "
        f"{case.shown(val)} on the validation set. {GAP_REMEDY}",
        "data.augment=[{_target_: litdistill.data.augment.Crop, pad: 2}], or images without labels (data.unlabelled=<folder>)",
    )


def underfitting(case: Case) -> Finding | None:
    """Compares the student on training samples with what its teacher reaches on others: a short schedule, or a small net."""
    name = case.task.monitor[0]
    if name not in SHARES or case.teacher is None:
        return None
    train, teacher = case.value(*case.trained), case.value(case.teacher)
    if teacher - train < GAP / 2:
        return None
    late = case.best_epoch is not None and case.best_epoch >= case.epochs
    said = f"The student's {named(name)} is {case.shown(train)} on its own training samples, and its teacher's "
    said += f"{case.shown(teacher)} on samples that it has not seen"
    if late:
        said += f"; the best epoch was the last, {case.epochs} of {case.epochs}: the schedule is too short."
        return Finding(min(1.0, teacher - train), "short schedule", said, f"trainer.max_epochs={2 * case.epochs}")
    said += f"; the best epoch was {case.best_epoch} of {case.epochs}: it cannot follow."
    return Finding(
        min(1.0, teacher - train),
        "capacity",
        said,
        "a larger student, or an assistant between (experiment=schemes/assistant)",
    )


def contradicted_labels(case: Case) -> Finding | None:
    """Looks for training labels that the teacher is sure are others."""
    net = case.distiller.teacher.net if case.distiller.teacher is not None else None
    targets = case.data.train_targets
    if net is None or case.teacher is None or case.task.kind != CATEGORICAL or targets.ndim != 1:
        return None
    if not judges(net, "train"):
        return None
    ids = labeled_ids(case.data).sort().values
    outputs, labels = of_samples(net, case.data, case.task, ids, case.device)
    p, predicted = F.softmax(outputs.logits.double(), 1).max(1)
    wrong = ((predicted != labels) & (p > SURE)).nonzero().squeeze(1)
    share = len(wrong) / max(1, len(ids))
    if share < CONTRADICTED or len(wrong) < 2:
        return None
    names = case.data.class_names
    listed = ", ".join(
        f"{int(ids[i])} ({names[labels[i]]}, not {names[predicted[i]]})"
        for i in wrong[p[wrong].argsort(descending=True)][:LISTED]
    )
    more = f" and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
    return Finding(
        min(1.0, 2 * share),
        "labels",
        f"The teacher contradicts {len(wrong)} of {len(ids)} training labels ({100 * share:.1f} %) with a probability above "
        f"{100 * SURE:.0f} %: samples {listed}{more}.",
        "look at these samples; where labels are wrong, correct them or count them less (method.hard=0.1)",
    )


RULES: tuple[Rule, ...] = (
    *(teacher_at_chance, other_preprocessing, overconfident, lagging_statistics, gradient_shares, learned_by_heart),
    *(underfitting, contradicted_labels),
)


def lines(found: Sequence[Finding]) -> list[str]:
    """Returns the findings as lines of text; one line where there is none."""
    if not found:
        return [
            "Nothing found: teacher, preprocessing, statistics, weights of terms, fit, schedule and labels look right."
        ]
    return [f"{i}. {f.name}: {f.said}\n   Try: {f.change}" for i, f in enumerate(found, 1)]
