"""Classification with one label per sample: cross-entropy, accuracy, calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from litdistill.methods.base import CATEGORICAL
from litdistill.tasks import metrics
from litdistill.tasks.base import Samples, Task, WholeSplit
from litdistill.types import Batch, Outputs, class_of
from litdistill.utils.errors import UserError
from litdistill.utils.shapes import described


class Classification(Task):
    """Targets (N,) int64, or (N, classes) probabilities where labels were mixed; logits (N, classes).

    Args:
        label_smoothing: the share of a label's probability that is spread evenly over all classes (Szegedy et al. 2016,
            arXiv 1512.00567, section 7).
        class_weights: the weight of each class in the labels' loss; `balanced_weights` gives those of scikit-learn's
            "balanced", which a config writes as `task.class_weights=balanced`. None: 1 each.
    """

    kind = CATEGORICAL
    monitor: tuple[str, Literal["max", "min"]] = ("accuracy", "max")

    def __init__(
        self, label_smoothing: float = 0.0, class_weights: Sequence[float] | Literal["balanced"] | None = None
    ):
        if not 0 <= label_smoothing < 1:
            raise UserError(f"label_smoothing={label_smoothing} must be at least 0 and below 1; 0.1 is common.")
        if isinstance(class_weights, str) or not all(0 <= w < math.inf for w in class_weights or ()):
            raise UserError(
                f"class_weights={class_weights} must be one number for each class, none negative, or balanced in a config; "
                "in Python balanced_weights(targets, classes) gives these."
            )
        self.label_smoothing = label_smoothing
        self.class_weights = None if class_weights is None else torch.tensor(list(class_weights), dtype=torch.float32)

    def loss(self, net: nn.Module, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Returns `hard`: cross-entropy in nats, computed in float32 also under autocast.

        With class weights it is the mean over the batch of each sample's, times its class's weight. torch's own mean divides by
        the batch's sum of weights, which would make a sample's weight depend on its batch, and the loss on its size.

        Raises `UserError` for targets that are neither classes nor probabilities.
        """
        logits, targets = outputs.logits.float(), _classes(outputs.logits, batch.targets)
        if self.class_weights is None:
            return {"hard": self._cross_entropy(logits, targets, reduction="mean")}
        return {"hard": self._cross_entropy(logits, targets, reduction="sum") / len(logits)}

    def labelled_loss(self, net: nn.Module, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Returns `hard` over the samples with a label, 0 where no sample has one; a target of -1 is none."""
        logits, targets = outputs.logits.float(), _classes(outputs.logits, batch.targets)
        if targets.ndim != 1:
            return super().labelled_loss(net, outputs, batch)
        total = self._cross_entropy(logits, targets, reduction="sum", ignore_index=-1)
        return {"hard": total / (targets >= 0).sum().clamp(min=1)}

    def _cross_entropy(self, logits: Tensor, targets: Tensor, **options: Any) -> Tensor:
        weight = None if self.class_weights is None else self._weights_for(logits)
        try:
            return F.cross_entropy(logits, targets, weight, label_smoothing=self.label_smoothing, **options)
        except IndexError as error:  # raised on a CPU only; a check on a GPU would need a synchronization
            check_range(logits, targets)
            raise UserError(str(error)) from error

    def _weights_for(self, logits: Tensor) -> Tensor:
        assert self.class_weights is not None
        if len(self.class_weights) != logits.shape[1]:
            raise UserError(
                f"class_weights={self.class_weights.tolist()} are {len(self.class_weights)}, and the network gives "
                f"{logits.shape[1]} logits: give one for each class."
            )
        if self.class_weights.device != logits.device:
            self.class_weights = self.class_weights.to(logits.device)
        return self.class_weights

    def decode(self, outputs: Outputs) -> dict[str, Tensor]:
        probabilities = outputs.logits.float().softmax(1)
        confidence, label = probabilities.max(1)
        return {"label": label, "confidence": confidence, "probabilities": probabilities}

    def check_targets(self, outputs: Outputs, targets: Any) -> None:
        found = _classes(outputs.logits, targets)
        if found.ndim == 1:
            check_range(outputs.logits, found, lowest=-1)

    def truth(self, targets: Any, teacher: Outputs | None) -> Any:
        """Returns the classes (N,) int64; of probabilities the most likely."""
        return class_of(targets).long() if isinstance(targets, Tensor) else targets

    def metrics(self) -> Metric:
        return WholeSplit(_quality)

    def scores(self, outputs: Outputs, targets: Tensor) -> dict[str, Tensor]:
        return {"accuracy": (outputs.logits.argmax(1) == class_of(targets)).float()}

    def agreement(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        return metrics.sample_agreement(student.logits, teacher.logits)

    def chance(self, targets: Tensor) -> float:
        """Returns the share s of the most frequent label plus three of its standard deviations, at most (1 + s) / 2.

        The maximum matters for few samples, where three standard deviations could reach beyond 1.
        """
        targets = class_of(targets).long()
        share = (torch.bincount(targets).max() / len(targets)).item()
        return share + min(3 * math.sqrt(share * (1 - share) / len(targets)), (1 - share) / 2)

    def can_judge(self, value: float, targets: Tensor) -> bool:
        """Returns whether an accuracy on N samples rules out that the true one is in the upper half between the share s of the
        most frequent label and 1: whether Wilson's interval of two standard deviations ends below (1 + s) / 2."""
        targets = class_of(targets).long()
        share, n, z = (torch.bincount(targets).max() / len(targets)).item(), len(targets), 2
        spread = z * math.sqrt(value * (1 - value) / n + z**2 / (4 * n**2))
        return (value + z**2 / (2 * n) + spread) / (1 + z**2 / n) < (1 + share) / 2

    def figures(self, samples: Samples) -> dict[str, Any]:
        from litdistill.tasks.figures import classification_figures

        return classification_figures(samples)


def check_range(logits: Tensor, targets: Tensor, lowest: int = 0) -> None:
    """Raises `UserError` for classes (N,) outside of the logits (N, classes), or below `lowest`: -1 admits samples without."""
    if len(targets) == 0 or (targets.min() >= lowest and targets.max() < logits.shape[1]):
        return
    low, high, known = int(targets.min()), int(targets.max()), targets[targets >= 0].unique().tolist()
    said = f"Labels go from {low} to {high}, and the network gives {logits.shape[1]} logits: "
    if high < logits.shape[1] and low < 0:
        raise UserError(
            f"{said}a label below 0 is none. In training, -1 marks samples without a label where Distiller(labels='some'), or "
            "a data module's train_labels, says so; a validation set needs all its labels, so leave such samples out."
        )
    gaps = (
        f" Those here are {', '.join(map(str, known[:6]))}: map them to 0, 1, 2, …"
        if low >= 0 and known != list(range(len(known)))
        else ""
    )
    raise UserError(f"{said}it needs one for each class, and classes are counted from 0.{gaps}")


def _quality(logits: Tensor, targets: Tensor) -> dict[str, float]:
    check_range(logits, targets)
    return metrics.quality(logits, targets)


def balanced_weights(targets: Tensor, classes: int) -> list[float]:
    """Returns a weight for each class, samples / (classes · samples of the class): their mean over the samples is 1.

    `targets`: (N,) int64. Classes without a sample have the weight 1 and are not counted as classes.
    """
    counts = torch.bincount(targets, minlength=classes).double()
    weights = len(targets) / ((counts > 0).sum() * counts.clamp(min=1))
    return torch.where(counts > 0, weights, 1.0).tolist()


def _classes(logits: Tensor, targets: Any) -> Tensor:
    """Returns targets for `F.cross_entropy`. Raises `UserError` for other targets, or logits that are not (N, classes)."""
    if logits.ndim != 2:
        raise UserError(f"The network gives {tuple(logits.shape)}, and classification needs logits (N, classes).")
    if isinstance(targets, Tensor) and targets.shape == logits.shape[:1] and not targets.is_floating_point():
        return targets.long()
    if isinstance(targets, Tensor) and targets.shape == logits.shape and targets.is_floating_point():
        return targets
    raise UserError(
        f"The targets are {described(targets)}, and classification with logits {tuple(logits.shape)} needs integers "
        f"({len(logits)},), or probabilities {tuple(logits.shape)}. Numbers are learned by task=regression, several labels a "
        "sample by task=multilabel."
    )
