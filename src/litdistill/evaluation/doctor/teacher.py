"""What is wrong with a run's teacher: with itself, or with how it and the student fit together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from litdistill.distillation.mixed import judges, reads_ids
from litdistill.distillation.recorded import RecordedTeacher
from litdistill.evaluation.calibration import fit_temperature
from litdistill.evaluation.doctor.case import Case, Finding, outputs_of
from litdistill.evaluation.doctor.gradients import minibatches
from litdistill.evaluation.findings import labeled_ids
from litdistill.evaluation.predictions import predict_split
from litdistill.methods.base import CATEGORICAL
from litdistill.models.preprocess import Preprocessed, bare, preprocess_of, preprocessing, wrap
from litdistill.types import Batch, has_label
from litdistill.utils.units import SHARES, named, quantity

SURE = 0.95  # the teacher's probability of another class from which it contradicts a label
CONTRADICTED = 0.01  # the share of such labels from which they are a finding
SHARPER = 1.5  # the temperature that calibrates the teacher, relative to the method's, from which it is too sure
FAR = 0.1  # by how much a share changes where classes are put in another order, or inputs are seen otherwise
SOFTENING = ("KD", "DKD", "DIST", "SoftTargetCE", "SRD")  # methods whose `temperature` divides the teacher's logits
SEEN = 512  # augmented training samples that a teacher is asked about
LISTED = 10  # samples that a finding names


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
    """Compares how both networks normalize and resize, and tries the teacher with what the student has."""
    net = case.teacher_net
    if net is None or case.teacher is None or reads_ids(net):
        return None
    own, others = preprocessing(case.distiller.deployed_student), preprocessing(net)
    if own == others:
        return None
    now, swapped = case.value(case.teacher), None
    if isinstance(net, Preprocessed) and case.task.monitor[0] in SHARES and len(own) == 1 and _same_inputs(own, others):
        swapped = case.value(case.validated(wrap(bare(net), preprocess_of(case.distiller.deployed_student))))
    if swapped is not None and swapped - now >= FAR:
        said = f"The teacher's {named(case.task.monitor[0])} on the validation set is {case.shown(now)} as it sees "
        said += f"images, by {others[0]}, and {case.shown(swapped)} as the student does, by {own[0]}."
    elif not case.task.better(now, case.value(case.student)):
        said = f"The teacher sees images by {others}, the student by {own}, and the teacher is no better than the student: "
        said += f"{case.shown(now)} and {case.shown(case.value(case.student))} on the validation set."
    else:
        return None
    change = "give the teacher the values that it was trained with (teacher.preprocess={mean: [..], std: [..]})"
    return Finding(0.8, "preprocessing", said, change)


def _same_inputs(own: list[dict[str, Any]], others: list[dict[str, Any]]) -> bool:
    """Returns whether both networks get inputs of the same size and as many channels."""
    return all((a["size"], len(a["mean"])) == (b["size"], len(b["mean"])) for a in own for b in others)


def other_classes(case: Case) -> Finding | None:
    """Looks for classes that the teacher does not know, or knows by another name or place, whatever its file says."""
    logits = _class_logits(case)
    if logits is None:
        return None
    names, targets = [str(name) for name in case.data.class_names], case.targets
    missing = [names[i] for i in (~logits.isfinite().any(0)).nonzero().flatten().tolist()]
    if missing:
        return Finding(
            min(1.0, 0.3 + len(missing) / len(names)),
            "classes",
            f"The teacher does not know {quantity(len(missing), 'class')} of the data's {len(names)}: {listed(missing)}. It "
            "says nothing of their samples but which of its own classes they are like.",
            "a teacher of all classes, or a second one that knows these (teacher.ensemble)",
        )
    counts = torch.zeros(len(names), len(names), dtype=torch.int64)
    counts.index_put_((targets.long(), logits.argmax(1)), torch.ones((), dtype=torch.int64), accumulate=True)
    rows, columns = linear_sum_assignment(counts.numpy(), maximize=True)
    moved = [
        (i, j)
        for i, j in zip(rows.tolist(), columns.tolist(), strict=True)
        if i != j and counts[i, j] > counts[i].sum() / 2
    ]
    now, then = counts.diag().sum().item() / len(targets), counts[rows, columns].sum().item() / len(targets)
    if then - now < FAR or not moved:
        return None
    return Finding(
        min(1.0, 0.5 + then - now),
        "classes",
        f"The teacher's outputs seem to stand for other classes than the data's: it is right for {100 * now:.2f} % of the "
        f"validation samples, and would be for {100 * then:.2f} % if "
        f"{listed([f'its {names[j]} were {names[i]}' for i, j in moved])}.",
        "give the data the names or the order of the teacher's training (data.classes, or the names of their folders)",
    )


def _class_logits(case: Case) -> Tensor | None:
    """Returns the teacher's logits (N, classes) where each sample has one class, None where they are something else."""
    if case.teacher is None or case.task.kind != CATEGORICAL or "logits" not in case.teacher.heads:
        return None
    logits, targets = case.teacher.logits, case.targets
    fits = logits.ndim == 2 and targets.ndim == 1 and not targets.is_floating_point()
    return logits if fits and logits.shape[1] == len(case.data.class_names) else None


def other_views(case: Case) -> Finding | None:
    """Compares what the teacher makes of training samples as the student sees them with what it makes of them as they are."""
    net, name = case.teacher_net, case.task.monitor[0]
    data = case.data
    if net is None or case.teacher is None or not data.draws_views or name not in SHARES:
        return None
    if isinstance(net, RecordedTeacher) and not net.views:
        return Finding(
            0.3,
            "views",
            f"The student sees augmented views, and {net.file.path} has one output a sample: each view is taught what the "
            "sample is as it stands.",
            "a file of outputs for each view (litdistill outputs … views=8), or data.augment=[]",
        )
    if reads_ids(net) or getattr(data, "mix", None) is not None:
        return None
    seen = _seen(case)
    if not seen:
        return None
    ids = torch.cat([batch.ids for batch in seen if batch.ids is not None]).cpu()
    viewed = case.value(*predict_split(net, _Fixed(seen), "train", case.device, case.task))
    plain = case.value(*outputs_of(net, data, case.task, "train", ids, case.device))
    if plain - viewed < FAR:
        return None
    return Finding(
        min(1.0, 2 * (plain - viewed)),
        "views",
        f"The teacher is lost in the views that the student sees: its {named(name)} on {quantity(len(ids), 'training sample')} "
        f"is {case.shown(plain)} as they are, and {case.shown(viewed)} as they are augmented.",
        "train the teacher with the same augmentation (teacher.recipe.data.augment), or augment less (data.augment)",
    )


def overconfident(case: Case) -> Finding | None:
    """Compares the temperature that calibrates the teacher on the validation set with the method's."""
    temperature, logits = case.cfg.method.get("temperature"), _class_logits(case)
    softens = str(case.cfg.method.get("_target_")).rpartition(".")[2] in SOFTENING
    if not softens or logits is None or not isinstance(temperature, (int, float)) or not bool(logits.isfinite().all()):
        return None
    targets = case.targets
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


def contradicted_labels(case: Case) -> Finding | None:
    """Looks for training labels that the teacher is sure are others."""
    net, targets = case.teacher_net, case.data.train_targets
    if net is None or _class_logits(case) is None or targets.ndim != 1 or not judges(net, "train"):
        return None
    ids = labeled_ids(case.data)[: case.most].sort().values
    outputs, labels = outputs_of(net, case.data, case.task, "train", ids, case.device)
    p, predicted = F.softmax(outputs.logits.double(), 1).max(1)
    wrong = ((predicted != labels) & (p > SURE)).nonzero().squeeze(1)
    share = len(wrong) / max(1, len(ids))
    if share < CONTRADICTED or len(wrong) < 2:
        return None
    names = case.data.class_names
    each = [
        f"{_sample(case, int(ids[i]))} ({names[labels[i]]}, not {names[predicted[i]]})"
        for i in wrong[p[wrong].argsort(descending=True)]
    ]
    return Finding(
        min(1.0, 2 * share),
        "labels",
        f"The teacher contradicts {len(wrong)} of {len(ids)} training labels ({100 * share:.1f} %) with a probability above "
        f"{100 * SURE:.0f} %: samples {listed(each)}.",
        "look at these samples; where labels are wrong, correct them or count them less (method.hard=0.1)",
    )


def _sample(case: Case, index: int) -> str:
    """Returns the name of the file of a training sample, or its id where data have no files."""
    names = getattr(case.data, "sample_names", None)
    known = names("train") if callable(names) else None
    return str(index) if known is None else str(known[index])


def listed(each: Sequence[str]) -> str:
    """Returns the first of these, and how many more there are."""
    more = f" and {len(each) - LISTED} more" if len(each) > LISTED else ""
    return ", ".join(each[:LISTED]) + more


def _seen(case: Case) -> list[Batch]:
    """Returns minibatches of labelled samples as the student saw them in its first epoch, as many as are looked at."""
    found: list[Batch] = []
    for raw in minibatches(case.data, torch.device(case.device)):
        batch = case.task.batch(raw)
        kept = has_label(batch.targets).nonzero().squeeze(1)
        if len(kept):
            found.append(batch.rows(kept))
        if sum(len(b.targets) for b in found) >= SEEN:
            break
    return found


class _Fixed:
    """A data module whose only split is these minibatches."""

    def __init__(self, kept: list[Batch]):
        self.kept = kept

    def batches(self, split: str, device: torch.device | str = "cpu") -> list[Batch]:
        """Returns the minibatches."""
        return self.kept


RULES = (teacher_at_chance, other_preprocessing, other_classes, other_views, overconfident, contradicted_labels)
