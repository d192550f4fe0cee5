"""Metrics of a classifier as pure functions of all its logits: exact for any batches and number of processes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_confusion_matrix

from litdistill.tasks.base import overflowed

ECE_BINS = 15


def quality(logits: Tensor, targets: Tensor) -> dict[str, float]:
    """Returns accuracy, negative log-likelihood (nats), Brier score and expected calibration error; (N, classes), (N,).

    The Brier score is the sum over classes of squared differences, averaged over samples (Brier 1950): from 0 to 2.
    ECE: 15 bins of equal width (Guo et al. 2017, arXiv 1706.04599, section 2). Raises `UserError` for logits whose softmax
    is NaN.
    """
    logits = logits.double()
    p = logits.softmax(1)
    if bad := int(p.isnan().any(1).sum()):
        raise overflowed(f"The logits of {bad} of {len(p)} samples")
    return {
        "accuracy": (logits.argmax(1) == targets).double().mean().item(),
        "nll": F.cross_entropy(logits, targets).item(),
        "brier": (p - F.one_hot(targets, logits.shape[1])).square().sum(1).mean().item(),
        "ece": multiclass_calibration_error(p, targets, logits.shape[1], n_bins=ECE_BINS).item(),
    }


def sample_agreement(student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    """Returns, for each sample, (N,) float64, whether the predictions are equal, and KL(teacher ‖ student) in nats at T = 1.
    Both logits are (N, classes). A teacher's logit of −∞ is a class that it does not know: the divergence is among the others.
    """
    unknown = teacher == -torch.inf
    log_q = student.double().masked_fill(unknown, -torch.inf).log_softmax(1).masked_fill(unknown, 0.0)
    log_p = teacher.double().log_softmax(1).masked_fill(unknown, 0.0)
    return {
        "agreement": (student.argmax(1) == teacher.argmax(1)).double(),
        "kl": F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1),
    }


def agreement(student: Tensor, teacher: Tensor) -> dict[str, float]:
    """Returns the means of `sample_agreement` over all samples."""
    return {name: values.mean().item() for name, values in sample_agreement(student, teacher).items()}


def of_known_classes(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns which samples are of a class that the network knows, booleans (N,): its logit of the label is not −∞.

    All of them where targets are not one label each, or where no logit is −∞: then targets may be numbers of a task of one's
    own that are no classes. Logits (N, classes), targets (N,).
    """
    if targets.ndim != 1 or targets.is_floating_point() or logits.ndim != 2 or not bool((logits == -torch.inf).any()):
        return torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    return logits.gather(1, targets.long().clamp(min=0)[:, None])[:, 0] != -torch.inf


def confusion(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the confusion matrix, counts (classes, classes): rows are labels, columns are predictions."""
    return multiclass_confusion_matrix(logits.argmax(1), targets, logits.shape[1])


def reliability(logits: Tensor, targets: Tensor, bins: int = ECE_BINS) -> tuple[Tensor, Tensor, Tensor]:
    """Returns confidence, accuracy and number of samples of each confidence bin: three tensors (bins,), NaN for empty bins."""
    confidence, predicted = logits.double().softmax(1).max(1)
    index = (confidence * bins).long().clamp(max=bins - 1)
    count = torch.bincount(index, minlength=bins).double()
    mean = lambda x: torch.bincount(index, weights=x, minlength=bins) / count  # noqa: E731
    return mean(confidence), mean((predicted == targets).double()), count
