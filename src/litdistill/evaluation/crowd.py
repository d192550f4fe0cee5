"""A teacher that is several networks: how good each of them is on the classes that it knows, and how much they disagree."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litdistill.distillation.examine import of_member
from litdistill.evaluation.predictions import measured, teacher_outputs
from litdistill.methods.base import BERNOULLI, CATEGORICAL
from litdistill.models.ensemble import Ensemble
from litdistill.tasks.base import Task, at_places
from litdistill.tasks.metrics import of_known_classes
from litdistill.types import Outputs
from litdistill.utils.units import axis, factor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEWEST = 2  # classes that two networks must both know to be compared


def describe_crowd(
    teacher: nn.Module | None, data: Any, task: Task, device: torch.device | str = "cpu", folder: Path | None = None
) -> dict[str, Any]:
    """Returns `members` and `disagreement` of a teacher that is several networks, on "val" and "test"; empty for any other, and
    where a task keeps the predictions of a split alone.

    Of each member: `name`, `weight`, `classes` (the names of those that it knows; None: all), and on each split its `metrics`
    and the metric at `chance` over the samples of these classes. `folder`: see `predictions.teacher_outputs`.
    """
    if not isinstance(teacher, Ensemble):
        return {}
    names = [str(name) for name in data.class_names]
    members: list[dict[str, Any]] = [
        {"name": name, "weight": weight, "classes": _names(known, names)}
        for name, weight, known in zip(teacher.names, teacher.weights, teacher.known.cpu(), strict=True)
    ]
    found: dict[str, Any] = {}
    for split in ("val", "test"):
        outputs_of_all = teacher_outputs(teacher, data, task, split, device, folder)
        if outputs_of_all is None:
            continue
        if "members" not in outputs_of_all.heads:
            return {}
        logits = outputs_of_all.heads["members"]
        targets = torch.cat([batch.targets.cpu() for batch in data.batches(split)])
        for i, member in enumerate(members):
            outputs, labels = of_member(logits, i, targets)
            if len(labels):
                member[split] = {"metrics": measured(task, outputs, labels), "chance": task.chance(labels)}
        places = at_places(task, targets, outputs_of_all).heads["members"]
        found[split] = disagreement(task, teacher, places, targets)
    return {"members": members, "disagreement": found}


def _names(known: Tensor, names: Sequence[str]) -> list[str] | None:
    """Returns the names of the classes that are known, booleans (classes,); None where all are."""
    if bool(known.all()):
        return None
    return [names[i] if i < len(names) else str(i) for i in known.nonzero().flatten().tolist()]


def members_figure(task: Task, teacher: Ensemble, members: Tensor, targets: Tensor) -> Figure:
    """Returns a figure of each member's monitored metric on the classes that it knows, and of the disagreement of each pair.

    Arguments as of `disagreement`.
    """
    from matplotlib.figure import Figure

    metric, count = task.monitor[0], members.shape[-2]
    labels = [f"{i} {name}" for i, name in enumerate(teacher.names)]
    values = []
    for i in range(count):
        outputs, own = of_member(members, i, targets)
        values.append(factor(metric) * measured(task, outputs, own)[metric] if len(own) else math.nan)
    places = at_places(task, targets, Outputs({"logits": members[..., 0, :], "members": members})).heads["members"]
    matrix = disagreement(task, teacher, places, targets)["by_pair"]
    figure = Figure(figsize=(8, 1 + 0.5 * max(count, 4)), layout="constrained")
    left, right = figure.subplots(1, 2)
    bars = left.barh(range(count), values)
    left.bar_label(bars, fmt="%.3g", padding=3)
    left.margins(x=0.15)
    left.set_yticks(range(count), labels)
    left.invert_yaxis()
    left.set_xlabel(f"{axis(metric)}, of the classes that it knows")
    shown = [[math.nan if value is None else value for value in row] for row in matrix]
    right.imshow(shown, cmap="Blues", vmin=0)
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            right.text(j, i, "–" if value is None else f"{value:.3g}", ha="center", va="center")
    right.set_xticks(range(count))
    right.set_yticks(range(count))
    right.set_title("disagreement of pairs", fontsize="medium")
    return figure


def disagreement(task: Task, teacher: Ensemble, members: Tensor, targets: Tensor) -> dict[str, Any]:
    """Returns how much the members of a teacher disagree on a split: means over pairs of members, and over the samples of
    classes that both know, each predicting among these classes.

    `decisions`: the share of samples for which they predict another class (or label). `js`: the Jensen-Shannon divergence of
    their distributions in nats, from 0 to ln 2 (a label of several: summed over labels). A task without decisions has the means
    of its own `agreement`. `by_pair`: the matrix of decisions (or of its first measure), null where fewer than two classes are
    known to both; `pairs`: how many were compared. `members`: their logits for the split, (N, members, classes), −∞ for classes
    that a member does not know.
    """
    count = members.shape[1]
    known = teacher.known.cpu().expand(count, members.shape[2])
    matrix: list[list[float | None]] = [[0.0 if i == j else None for j in range(count)] for i in range(count)]
    values: dict[str, list[float]] = {}
    for i, j in itertools.combinations(range(count), 2):
        common = known[i] & known[j]
        if task.kind == CATEGORICAL and int(common.sum()) < FEWEST:
            continue
        first, second = members[:, i, common].double(), members[:, j, common].double()
        rows = of_known_classes(members[:, i], targets) & of_known_classes(members[:, j], targets)
        if not bool(rows.any()):
            continue
        pair = _of_pair(task, first[rows], second[rows])
        for name, value in pair.items():
            values.setdefault(name, []).append(value)
        matrix[i][j] = matrix[j][i] = pair.get("decisions", next(iter(pair.values()), None))
    means = {name: sum(x) / len(x) for name, x in values.items()}
    return {**means, "pairs": max(map(len, values.values()), default=0), "by_pair": matrix}


def _of_pair(task: Task, first: Tensor, second: Tensor) -> dict[str, float]:
    """Returns the measures of `disagreement` for the logits (N, classes) of two networks."""
    found = {k: float(v.double().mean()) for k, v in task.agreement(Outputs.of(first), Outputs.of(second)).items()}
    if task.kind not in (CATEGORICAL, BERNOULLI) or "agreement" not in found:
        return found
    return {"decisions": 1 - found["agreement"], "js": float(jensen_shannon(first, second, task.kind).mean())}


def jensen_shannon(first: Tensor, second: Tensor, kind: str = CATEGORICAL) -> Tensor:
    """Returns ½ KL(p ‖ m) + ½ KL(q ‖ m) with m = (p + q) / 2, in nats, for each row of two logits (N, classes); (N,).

    Of labels ("bernoulli"): the sum over labels of that of each. Lin 1991, "Divergence measures based on the Shannon entropy".
    """
    if kind == BERNOULLI:
        log_p, log_q = (torch.stack([F.logsigmoid(z), F.logsigmoid(-z)], -1) for z in (first, second))
    else:
        log_p, log_q = first.log_softmax(-1), second.log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, dtype=first.dtype))
    divergence = ((log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)) / 2).sum(-1)
    return divergence.sum(-1) if kind == BERNOULLI else divergence
