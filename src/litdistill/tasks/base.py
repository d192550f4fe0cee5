"""What a task is: all that is particular to what a network is trained for, and nothing of how it is distilled.

To add a task, write a `Task` in a folder or file of its own, here or in your own package, and name it with
`task._target_=my_package.MyTask`. A task sees no method, no trainer, no data module and no config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities import dim_zero_cat

from litdistill.features.outputs import run_network
from litdistill.methods.base import CATEGORICAL
from litdistill.types import Batch, Outputs
from litdistill.utils.errors import UserError


class Task:
    """Base of all tasks; what it defines is right for a network with one head, `logits`.

    Attributes:
        kind: how logits are read: "categorical" (a softmax over classes), "bernoulli" (a sigmoid each) or "real". A method
            whose formula is not defined for it is refused.
        monitor: the metric that chooses the best epoch, and whether more of it or less is better.
    """

    kind: str = CATEGORICAL
    monitor: tuple[str, Literal["max", "min"]] = ("accuracy", "max")

    def batch(self, raw: Any) -> Batch:
        """A `Batch` of what a loader yields: a `Batch`, a pair (inputs, targets), or a dict of inputs with `labels`.

        Of a longer tuple the last is the target. Raises `UserError` for anything else.
        """
        return to_batch(raw)

    def forward(self, net: nn.Module, batch: Batch, training: bool) -> Outputs:
        """The outputs of `net` on a batch."""
        return run_network(net, batch.inputs)

    def loss(self, net: nn.Module, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """What the labels say: scalar terms by name, each a mean over the batch, not weighted."""
        raise NotImplementedError

    def decode(self, outputs: Outputs) -> dict[str, Tensor]:
        """Predictions by name, each (N, ...): what `predict` gives."""
        raise NotImplementedError

    def metrics(self) -> Metric | MetricCollection:
        """A fresh metric: `update(outputs, targets)` for each batch, then `compute()` gives a dict of scalars.

        Exact under any number of processes: what it sums or keeps is gathered from all of them.
        """
        raise NotImplementedError

    def scores(self, outputs: Outputs, targets: Tensor) -> dict[str, Tensor]:
        """What is watched while training: a number a sample by name, each (N,); cheap, as it is computed at every log."""
        return {}

    def agreement(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """How far a student follows its teacher: a number a sample by name, each (N,)."""
        return {}

    def chance(self, targets: Tensor) -> float | None:
        """The monitored metric of whoever guesses without looking; None where that cannot be said.

        A teacher that is no better is refused, and a student that is no better is warned of.
        """
        return None

    def units(self) -> dict[str, list[float]] | None:
        """`mean` and `std` of each output, by which logits · std + mean are in the targets' own units; None: they are as they
        are. Written beside weights, since without them a file's outputs mean nothing."""
        return None

    def figures(self, samples: Samples) -> dict[str, Any]:
        """Pictures for TensorBoard by name, matplotlib's figures; none by default."""
        return {}

    def better(self, value: float, other: float) -> bool:
        """Whether one value of the monitored metric is better than another."""
        return value > other if self.monitor[1] == "max" else value < other


class Samples:
    """What a task draws pictures of: a split's samples in order, and what the networks make of them.

    Attributes:
        inputs: the i-th sample's input as it was read, None where that is no single tensor.
        targets: of all samples. names: of classes, labels or values.
        student, teacher: their outputs for all samples; the teacher's None where there is none.
    """

    def __init__(
        self,
        inputs: Callable[[int], Tensor | None],
        targets: Tensor,
        names: Sequence[str],
        student: Outputs,
        teacher: Outputs | None,
    ):
        self.inputs, self.targets, self.names, self.student, self.teacher = inputs, targets, names, student, teacher


class WholeSplit(Metric):
    """Applies `function(logits, targets)` to all samples of a split at once: exact whatever the batches and processes.

    `function`: takes (N, outputs) and the targets, and gives a dict of floats.
    """

    full_state_update = False
    logits: list[Tensor]
    targets: list[Tensor]

    def __init__(self, function: Callable[[Tensor, Tensor], dict[str, float]]):
        super().__init__()
        self.function = function
        self.add_state("logits", default=[], dist_reduce_fx="cat")
        self.add_state("targets", default=[], dist_reduce_fx="cat")

    def update(self, outputs: Outputs, targets: Tensor) -> None:
        self.logits.append(outputs.logits.detach().float().clone())  # a CUDA graph writes its next outputs over these
        self.targets.append(targets)

    def compute(self) -> dict[str, Tensor]:
        found = self.function(dim_zero_cat(self.logits), dim_zero_cat(self.targets))
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()}


def to_batch(raw: Any) -> Batch:
    """See `Task.batch`."""
    if isinstance(raw, Batch):
        return raw
    if isinstance(raw, Mapping):
        rest = dict(raw)
        ids, views = rest.pop("ids", None), rest.pop("views", None)
        for key in ("labels", "label", "targets", "target"):
            if key in rest:
                targets = rest.pop(key)
                inputs: Any = next(iter(rest.values())) if rest.keys() in ({"inputs"}, {"images"}) else rest
                return Batch(inputs, targets, ids, views)
        raise UserError(f"A batch with the keys {', '.join(map(str, raw))} has no labels: name them labels or targets.")
    if isinstance(raw, (tuple, list)) and len(raw) >= 2 and isinstance(raw[-1], Tensor):
        return Batch(raw[0] if len(raw) == 2 else tuple(raw[:-1]), raw[-1])
    raise UserError(
        f"The loader yields {type(raw).__name__}s, and a batch should be a pair (inputs, targets) of tensors, a dict with "
        "labels, or a litdistill.Batch."
    )
