"""What is wrong with a trained student that its loss does not show: chance level, or one prediction for all samples.

Training, `evaluate`, `distill` and `export` judge by `judge` and log what it finds; `summary.json` keeps it for tables and
pages.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from litdistill.methods.base import BERNOULLI, CATEGORICAL
from litdistill.tasks.base import Task, as_matrix
from litdistill.types import EMBEDDING, Outputs, class_of
from litdistill.utils.units import named, shown

log = logging.getLogger(__name__)

CONSTANT = 0.99  # the share of one class in the predictions from which they are called a constant
STILL = 0.01  # the spread of values over samples, relative to the targets', below which they are; of probabilities, absolute

CHANCE_REMEDY = (
    "It has learned nothing that counts there: train it for longer, look at its learning rate, and check that it gets inputs "
    "and classes as it was trained with."
)
FEW_REMEDY = "{} samples are too few to tell whether it has learned anything: test it on more."
CONSTANT_REMEDY = (
    "Do not use it. Look at the loss of its training, at its learning rate, at how many samples each class has, and at "
    "statistics of batch normalization (student.preprocess, too few steps)."
)
# From "chance", "constant", "gap" (litdistill.evaluation.findings) or a task's own word to a sentence with the remedy.
Findings = dict[str, str]


def judge(
    task: Task, outputs: Outputs, targets: Tensor, value: float | None, where: str = "test", names: Sequence[str] = ()
) -> Findings:
    """Returns what is wrong with predictions for all samples of a split; empty if nothing is.

    `value`: the monitored metric of these predictions. `where`: the split, as it is called in the sentences. `names`: of
    the classes.
    """
    found: Findings = {}
    places = task.places(targets)
    if places is not None:  # each token of sequences, or pixel of pictures, is a prediction
        outputs, targets = outputs.at(places), targets.flatten(1)[places]
    where = {"val": "validation", "train": "training"}.get(where, where)
    said = constant(task, outputs, targets, names)
    if said is not None:
        found["constant"] = f"The student is a constant: {said} of the {where} set. {CONSTANT_REMEDY}"
    found |= task.findings(outputs, targets, where)
    name, chance = task.monitor[0], task.chance(targets)
    if value is not None and chance is not None and not task.better(value, chance):
        enough = task.can_judge(value, targets)
        sure, remedy = ("is", CHANCE_REMEDY) if enough else ("may be", FEW_REMEDY.format(len(targets)))
        found["chance"] = (
            f"The student {sure} at chance level: its {named(name)} on the {where} set is {shown(name, value)}, and "
            f"guessing gives up to {shown(name, chance)}. {remedy}"
        )
    return found


def constant(task: Task, outputs: Outputs, targets: Tensor, names: Sequence[str] = ()) -> str | None:
    """Returns in words what a network predicts whatever its input is; None if predictions differ, or the targets do not."""
    if EMBEDDING in outputs.heads:
        spread = F.normalize(outputs.main.double(), dim=1).std(0, correction=0).norm() if len(targets) > 1 else None
        return "it gives the same vector for all samples" if spread is not None and spread < STILL else None
    logits = outputs.heads.get("logits")
    if logits is None or logits.ndim != 2 or len(logits) < 2 or not isinstance(targets, Tensor):
        return None
    logits = logits.double()
    if task.kind == CATEGORICAL:
        if logits.shape[1] < 2:
            return None
        counts = torch.bincount(logits.argmax(1).cpu())
        most, predicted = int(counts.argmax()), counts.max().item() / len(logits)
        label = torch.bincount(class_of(targets).long().cpu()).max().item() / len(targets)
        if predicted < CONSTANT or label >= CONSTANT:
            return None
        return f"it predicts {names[most] if most < len(names) else f'class {most}'} for {100 * predicted:.1f} %"
    truth = as_matrix(targets).double()
    spread, spread_of_targets = (x.std(0, correction=0) for x in (logits, truth))
    if not bool((spread_of_targets > 0).any()):
        return None
    if task.kind == BERNOULLI:
        still = bool((logits.sigmoid().std(0, correction=0) < STILL).all())
        return "it gives the same probabilities for all samples" if still else None
    units = task.units()
    scale = torch.tensor(units["std"], dtype=torch.float64) if units is not None else torch.ones(1, dtype=torch.float64)
    still = bool((spread * scale.to(spread) < STILL * spread_of_targets).all())
    return "it gives the same values for all samples" if still else None


def report_findings(found: Mapping[str, str]) -> None:
    """Logs a warning for each finding."""
    for text in found.values():
        log.warning("%s", text)
