"""Embeddings without labels: a student's vectors against its teacher's, by cosine and by the order of their similarities.

    python scripts/train.py task=embedding net@teacher=efficientnet_lite0 teacher.checkpoint=null method=cosine

The teacher is a backbone without classes. There is no label: metrics compare with the teacher's embedding of held-out samples.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from litdistill.methods.base import REAL
from litdistill.tasks.base import Samples, Task, WholeSplit
from litdistill.tasks.multilabel import check_finite
from litdistill.types import EMBEDDING, Batch, Outputs
from litdistill.utils.errors import UserError

PAIRED = 2000  # samples whose similarities are ranked: two million pairs


class Embedding(Task):
    """The head `embedding` (N, D): whatever a network gives for a sample, classes or not.

    Args:
        width: D of the student; None: that of its teacher, in whose place the student can then be used.
    """

    kind = REAL
    monitor: tuple[str, Literal["max", "min"]] = ("spearman", "max")
    reads_labels = False

    def __init__(self, width: int | None = None):
        if width is not None and (type(width) is not int or width < 2):
            raise UserError(f"task.width={width} must be a number of values, at least 2, or null for the teacher's.")
        self.width = width

    def batch(self, raw: Any) -> Batch:
        """Returns the `Batch` of an item of a loader, which needs no labels: inputs alone have targets of -1."""
        if isinstance(raw, Tensor):
            return Batch(raw, torch.full((len(raw),), -1, device=raw.device))
        if isinstance(raw, (tuple, list)) and len(raw) == 1:
            return self.batch(raw[0])
        return super().batch(raw)

    def forward(self, net: nn.Module, batch: Batch, training: bool) -> Outputs:
        """Returns the head `embedding`: that of the network, or else its only output. Raises `UserError` for other shapes."""
        outputs = super().forward(net, batch, training)
        embedding = outputs.main
        if embedding.ndim != 2 or embedding.shape[1] < 2:
            raise UserError(
                f"An embedding is one vector a sample, and the network gives {tuple(embedding.shape)}: end it with a linear "
                "layer or a mean over positions."
            )
        return outputs._replace(heads={EMBEDDING: embedding})

    def loss(self, net: nn.Module, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Returns nothing: there are no labels."""
        return {}

    def truth(self, targets: Any, teacher: Outputs | None) -> Tensor:
        if teacher is None:
            raise UserError(
                "task=embedding measures a student by its teacher's embeddings, and there is no teacher: name one "
                "(net@teacher=efficientnet_lite0 teacher.checkpoint=null)."
            )
        return teacher.main

    def measures(self, outputs: Outputs) -> bool:
        return True

    def decode(self, outputs: Outputs) -> dict[str, Tensor]:
        return {"embedding": outputs.main.float()}

    def metrics(self) -> Metric:
        return WholeSplit(self.quality)

    def quality(self, embedding: Tensor, teacher: Tensor) -> dict[str, float]:
        """Returns `spearman`, the rank correlation of both networks' cosine similarities over all pairs of samples (of at most
        `PAIRED` samples), and where the widths are equal `cosine`, the mean cosine of both embeddings of a sample."""
        check_finite(embedding)
        check_finite(teacher)
        found = {"spearman": spearman_of_similarities(embedding, teacher)}
        if embedding.shape[1] == teacher.shape[1]:
            found["cosine"] = F.cosine_similarity(embedding.double(), teacher.double()).mean().item()
        return found

    def figures(self, samples: Samples) -> dict[str, Any]:
        """Returns the similarities of pairs of samples, the student's over its teacher's."""
        if samples.teacher is None or len(samples.teacher.main) < 3:
            return {}
        from litdistill.tasks.figures import new_figure

        x, y = (_similarities(o.main[:PAIRED]).cpu().numpy() for o in (samples.teacher, samples.student))
        figure = new_figure(5, 4.5)
        axes = figure.add_subplot(xlabel="teacher's cosine similarity", ylabel="student's")
        counts = axes.hist2d(x, y, bins=60, cmin=1)[3]
        axes.axline((0, 0), slope=1, linewidth=0.8, color="gray")
        figure.colorbar(counts, label=f"of {len(x):,} pairs of samples")
        return {"similarities": figure}

    def agreement(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """Returns the cosine of both embeddings of each sample, (N,), where their widths are equal."""
        s, t = student.main, teacher.main
        return {"cosine": F.cosine_similarity(s.double(), t.double())} if s.shape[1] == t.shape[1] else {}


def spearman_of_similarities(a: Tensor, b: Tensor, most: int = PAIRED) -> float:
    """Returns Spearman's rank correlation between the cosine similarities of the rows of `a` (N, D) and of `b` (N, E), over all
    N (N − 1) / 2 pairs; 0 where either are all equal, NaN below three samples.

    Of more than `most` samples it takes `most`, evenly spaced in the order of their first value in `b`: the same ones for any
    order of the rows. Ties have their mean rank.
    """
    if len(a) > most:
        order = b[:, 0].double().argsort(stable=True)
        chosen = order[torch.linspace(0, len(a) - 1, most, device=order.device).round().long()]
        a, b = a[chosen], b[chosen]
    if len(a) < 3:
        return float("nan")
    x, y = (average_ranks(_similarities(m)) for m in (a, b))
    x, y = x - x.mean(), y - y.mean()
    scale = (x.square().sum() * y.square().sum()).sqrt()
    return ((x * y).sum() / scale).item() if scale > 0 else 0.0


def _similarities(x: Tensor) -> Tensor:
    unit = F.normalize(x.double(), dim=1)
    i, j = torch.triu_indices(len(x), len(x), 1, device=x.device)
    return (unit @ unit.T)[i, j]


def average_ranks(x: Tensor) -> Tensor:
    """Returns the ranks (M,) of the values of `x` (M,) from 1, float64; equal values have the mean of their ranks."""
    _, place, counts = x.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[place]
