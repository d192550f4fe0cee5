"""Regression: mean squared error of standardized targets; RMSE, mean absolute error and R²."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from litdistill.methods.base import REAL
from litdistill.tasks.base import Samples, Task, WholeSplit, as_matrix
from litdistill.tasks.multilabel import check_finite
from litdistill.types import Batch, Outputs
from litdistill.utils.errors import UserError


class Regression(Task):
    """Targets (N,) or (N, values); the head `logits` (N, values) predicts the standardized targets.

    Args:
        mean, std: of each value over the training set, by which targets are standardized; predictions and metrics are in the
            units of the targets.
    """

    kind = REAL
    monitor: tuple[str, Literal["max", "min"]] = ("rmse", "min")

    def __init__(self, mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,)):
        if len(mean) != len(std) or not all(s > 0 for s in std):
            raise UserError(f"mean={list(mean)}, std={list(std)}: one of each for every value, and std above 0.")
        self.mean, self.std = (torch.tensor(list(x), dtype=torch.float64) for x in (mean, std))

    def loss(self, net: nn.Module, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Returns `hard`: the mean squared error of standardized values. Raises `UserError` for targets of another shape."""
        targets = self.standardized(as_matrix(batch.targets))
        if targets.shape != outputs.logits.shape:
            raise UserError(
                f"The network gives {tuple(outputs.logits.shape)} and the targets are {tuple(targets.shape)}: give it as many "
                "outputs as there are values."
            )
        return {"hard": F.mse_loss(outputs.logits.float(), targets)}

    def check_targets(self, outputs: Outputs, targets: Any) -> None:
        self.loss(nn.Identity(), outputs, Batch(None, targets))

    def standardized(self, targets: Tensor) -> Tensor:
        """Returns the targets (N, values) standardized by `mean` and `std`, float32."""
        mean, std = self.mean.to(targets.device), self.std.to(targets.device)
        return ((targets - mean) / std).float()

    def values(self, outputs: Outputs) -> Tensor:
        """Returns the predictions (N, values) in the units of the targets, float64."""
        logits = outputs.logits.double()
        return logits * self.std.to(logits) + self.mean.to(logits)

    def units(self) -> dict[str, list[float]]:
        return {"mean": self.mean.tolist(), "std": self.std.tolist()}

    def decode(self, outputs: Outputs) -> dict[str, Tensor]:
        return {"values": self.values(outputs)}

    def metrics(self) -> Metric:
        return WholeSplit(self.quality)

    def quality(self, logits: Tensor, targets: Tensor) -> dict[str, float]:
        """Returns the root mean squared error, the mean absolute error and R², each averaged over the values."""
        check_finite(logits)
        truth = as_matrix(targets).double()
        error = self.values(Outputs.of(logits)) - truth
        spread = (truth - truth.mean(0)).square().mean(0).clamp(min=1e-300)
        return {
            "rmse": error.square().mean(0).sqrt().mean().item(),
            "mae": error.abs().mean().item(),
            "r2": (1 - error.square().mean(0) / spread).mean().item(),
        }

    def scores(self, outputs: Outputs, targets: Tensor) -> dict[str, Tensor]:
        return {"absolute_error": (self.values(outputs) - as_matrix(targets)).abs().mean(1)}

    def agreement(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """Returns the mean absolute difference of both predictions, (N,), in the units of the targets."""
        return {"deviation": (self.values(student) - self.values(teacher)).abs().mean(1)}

    def chance(self, targets: Tensor) -> float:
        """Returns the standard deviation of the targets: the root mean squared error of predicting their mean."""
        return as_matrix(targets).double().std(0, correction=0).mean().item()

    def figures(self, samples: Samples) -> dict[str, Any]:
        from litdistill.tasks.label_figures import regression_figures

        return regression_figures(samples, lambda logits: self.values(Outputs.of(logits)))
