"""Classification with several labels per sample: binary cross-entropy for each label, and mean average precision."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from litdistill.methods.base import BERNOULLI
from litdistill.tasks.base import Samples, Task, WholeSplit, overflowed
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
        """Returns `hard`: binary cross-entropy in nats, summed over labels, averaged over samples.

        Raises `UserError` for targets of another shape than the logits.
        """
        targets = batch.targets.float()
        if targets.shape != outputs.logits.shape:
            raise UserError(
                f"The network gives {tuple(outputs.logits.shape)} and the targets are {tuple(targets.shape)}: several labels a "
                "sample are (N, labels) of 0 and 1, with a logit for each. One label a sample is task=classification."
            )
        loss = F.binary_cross_entropy_with_logits(outputs.logits.float(), targets, reduction="sum")
        return {"hard": loss / len(targets)}

    def check_targets(self, outputs: Outputs, targets: Any) -> None:
        self.loss(nn.Identity(), outputs, Batch(None, targets))

    def decode(self, outputs: Outputs) -> dict[str, Tensor]:
        probabilities = outputs.logits.float().sigmoid()
        return {"labels": probabilities > self.threshold, "probabilities": probabilities}

    def metrics(self) -> Metric:
        return WholeSplit(self.quality)

    def quality(self, logits: Tensor, targets: Tensor) -> dict[str, float]:
        """Returns mean average precision over the labels that occur, accuracy and micro F1 over all labels, and NLL in nats."""
        check_finite(logits)
        p, truth = logits.double().sigmoid(), targets.round().long()
        each = [
            average_precision(scores, label)
            for scores, label in zip(logits.T, truth.bool().T, strict=True)
            if label.any()
        ]
        predicted = p > self.threshold
        hits = int((predicted & truth.bool()).sum())
        both = int(predicted.sum()) + int(truth.sum())
        nll = F.binary_cross_entropy_with_logits(logits.double(), targets.double(), reduction="sum") / len(p)
        return {
            "map": sum(each) / len(each) if each else 0.0,
            "accuracy": (predicted == truth.bool()).double().mean().item(),
            "f1": 2 * hits / both if both else 1.0,
            "nll": nll.item(),
        }

    def scores(self, outputs: Outputs, targets: Tensor) -> dict[str, Tensor]:
        right = (outputs.logits.sigmoid() > self.threshold) == (targets > 0.5)
        return {"accuracy": right.float().mean(1)}

    def agreement(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """Returns the share of equal predictions, and KL(teacher ‖ student) in nats, summed over labels."""
        s, t = student.logits.double(), teacher.logits.double()
        p = t.sigmoid()
        kl = p * (F.logsigmoid(t) - F.logsigmoid(s)) + (1 - p) * (F.logsigmoid(-t) - F.logsigmoid(-s))
        equal = (s.sigmoid() > self.threshold) == (p > self.threshold)
        return {"agreement": equal.double().mean(1), "kl": kl.sum(1)}

    def chance(self, targets: Tensor) -> float | None:
        """Returns the expected mean average precision m of random rankings plus three standard deviations, at most (1 + m) / 2.

        For a label of k of n samples the expectation is ((k − 1) / (n − 1) · (n − H) + H) / n, H = Σ 1 / i over n terms
        (Manzhos et al. 2025, arXiv 2511.02571); simulated variances are below (1 − k / n) / n. Assumes independent labels.
        Returns None for fewer than two samples or without a positive label.
        """
        n, k = len(targets), (targets > 0.5).double().sum(0)
        k = k[k > 0]
        if n < 2 or not len(k):
            return None
        harmonic = (1 / torch.arange(1, n + 1, dtype=torch.float64)).sum().to(k)
        mean = (((k - 1) / (n - 1) * (n - harmonic) + harmonic) / n).mean().item()
        deviation = math.sqrt(((1 - k / n) / n).mean().item() / len(k))
        return mean + min(3 * deviation, (1 - mean) / 2)

    def figures(self, samples: Samples) -> dict[str, Any]:
        from litdistill.tasks.label_figures import multilabel_figures

        return multilabel_figures(samples)


def average_precision(scores: Tensor, truth: Tensor) -> float:
    """Returns the area under the precision-recall step function; scores (N,), booleans (N,) with at least one true.

    Samples of equal score are one threshold, as in scikit-learn's `average_precision_score`.
    """
    scores, order = scores.sort(descending=True)
    last = torch.cat([scores[1:] != scores[:-1], torch.ones(1, dtype=torch.bool, device=scores.device)])
    right = truth[order].cumsum(0)[last].double()
    seen = torch.arange(1, len(scores) + 1, device=scores.device)[last]
    return ((right.diff(prepend=right.new_zeros(1)) * right / seen).sum() / right[-1]).item()


def check_finite(outputs: Tensor) -> None:
    """Raises `UserError` for outputs (N, ...) that are not finite."""
    if bad := int((~torch.isfinite(outputs)).flatten(1).any(1).sum()):
        raise overflowed(f"The outputs for {bad} of {len(outputs)} samples")
