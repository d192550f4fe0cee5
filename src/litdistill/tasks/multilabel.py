"""Several labels a sample: a binary cross-entropy for each, and mean average precision."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.functional.classification import multilabel_average_precision

from litdistill.methods.base import BERNOULLI
from litdistill.tasks.base import Task, WholeSplit
from litdistill.types import Batch, Outputs
from litdistill.utils.errors import UserError


class MultiLabel(Task):
    """Targets (N, labels), 0 or 1 each (or a probability); logits (N, labels).

    Args:
        threshold: the probability above which a label is predicted.
    """

    kind = BERNOULLI
    monitor: tuple[str, Literal["max", "min"]] = ("map", "max")

    def __init__(self, threshold: float = 0.5):
        if not 0 < threshold < 1:
            raise UserError(f"threshold={threshold} is a probability: above 0 and below 1; 0.5 is common.")
        self.threshold = threshold

    def loss(self, net: nn.Module, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """`hard`: binary cross-entropy in nats, summed over labels, the mean over samples."""
        targets = batch.targets.float()
        loss = F.binary_cross_entropy_with_logits(outputs.logits.float(), targets, reduction="sum")
        return {"hard": loss / len(targets)}

    def decode(self, outputs: Outputs) -> dict[str, Tensor]:
        probabilities = outputs.logits.float().sigmoid()
        return {"labels": probabilities > self.threshold, "probabilities": probabilities}

    def metrics(self) -> Metric:
        return WholeSplit(self.quality)

    def quality(self, logits: Tensor, targets: Tensor) -> dict[str, float]:
        """Mean average precision over the labels that occur, the share of right labels, F1 over all of them, nats.

        Average precision is the area under precision over recall as a step function (scikit-learn's).
        """
        check_finite(logits)
        p, truth = logits.double().sigmoid(), targets.round().long()
        there = truth.any(0)
        each = multilabel_average_precision(p, truth, p.shape[1], average="none")
        predicted = p > self.threshold
        hits = int((predicted & truth.bool()).sum())
        both = int(predicted.sum()) + int(truth.sum())
        nll = F.binary_cross_entropy_with_logits(logits.double(), targets.double(), reduction="sum") / len(p)
        return {
            "map": each[there].mean().item() if there.any() else 0.0,
            "accuracy": (predicted == truth.bool()).double().mean().item(),
            "f1": 2 * hits / both if both else 1.0,
            "nll": nll.item(),
        }

    def scores(self, outputs: Outputs, targets: Tensor) -> dict[str, Tensor]:
        right = (outputs.logits.sigmoid() > self.threshold) == (targets > 0.5)
        return {"accuracy": right.float().mean(1)}

    def agreement(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """Share of equal decisions, and KL(teacher ‖ student) in nats, summed over labels."""
        s, t = student.logits.double(), teacher.logits.double()
        p = t.sigmoid()
        kl = p * (F.logsigmoid(t) - F.logsigmoid(s)) + (1 - p) * (F.logsigmoid(-t) - F.logsigmoid(-s))
        equal = (s.sigmoid() > self.threshold) == (p > self.threshold)
        return {"agreement": equal.double().mean(1), "kl": kl.sum(1)}

    def chance(self, targets: Tensor) -> float | None:
        """The mean share of samples that have a label: the average precision of a random order."""
        share = (targets > 0.5).double().mean(0)
        there = share > 0
        return share[there].mean().item() if there.any() else None


def check_finite(outputs: Tensor) -> None:
    """Raises `UserError` for outputs (N, ...) that are no numbers."""
    if bad := int((~torch.isfinite(outputs)).flatten(1).any(1).sum()):
        raise UserError(
            f"The outputs for {bad} of {len(outputs)} samples are not finite: the network's weights have overflowed. "
            "Checkpoints of earlier epochs are kept. A smaller learning rate or gradients clipped at 1 usually help."
        )
