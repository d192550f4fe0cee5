"""The interface of a task: the labels' loss, predictions, metrics and batch format, independent of the distillation method.

To add a task, write a `Task` in a folder or file of its own, here or in your own package, and name it with
`task._target_=my_package.MyTask`. A task reads no method, trainer, data module or config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities import dim_zero_cat

from litdistill.features.outputs import run_network
from litdistill.methods.base import BERNOULLI, CATEGORICAL
from litdistill.types import EMBEDDING, Batch, Outputs, has_label
from litdistill.utils.errors import UserError
from litdistill.utils.shapes import described


class Task:
    """Base of all tasks; its defaults are for a network with one head, `logits`.

    Attributes:
        kind: the distribution that logits parametrize: "categorical" (softmax over classes), "bernoulli" (a sigmoid each) or
            "real". A method that is not defined for it is refused.
        reads_labels: whether its loss reads labels. False: no sample needs one, and a student learns from its teacher alone.
        recordable: of a class of your own: whether nothing in Python changes its loss from step to step, so that a CUDA graph
            may hold it (`litdistill.distillation.captured`).
        averages: whether the outputs of several teachers have a mean (`litdistill.models.ensemble.Ensemble`).
        monitor: the metric that selects the best epoch, and whether it is maximized or minimized.
    """

    kind: str = CATEGORICAL
    reads_labels = True
    recordable = False
    averages = True
    monitor: tuple[str, Literal["max", "min"]] = ("accuracy", "max")
    # What `compare_exported` compares, as the sentences of `export` name it.
    compared: tuple[str, str] = ("logits", "predictions agree")
    compared_in_int8: tuple[str, str] | None = None  # of an int8 file, where that is something else

    def batch(self, raw: Any) -> Batch:
        """Returns the `Batch` for an item of a loader: a `Batch`, a pair (inputs, targets), or a dict with `labels`.

        The last element of a longer tuple is the target. Raises `UserError` for anything else.
        """
        return to_batch(raw)

    def forward(self, net: nn.Module, batch: Batch, training: bool) -> Outputs:
        """Returns the outputs of `net` for a batch."""
        return run_network(net, batch.inputs)

    def loss(self, net: nn.Module, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Returns the labels' loss: unweighted scalar terms by name, each a mean over the batch."""
        raise NotImplementedError

    def labelled_loss(self, net: nn.Module, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Returns `loss` over the samples with a label (`litdistill.types.has_label`); 0 where no sample has one.

        A task may compute the same without choosing rows, whose number depends on values: such a step can be recorded.
        """
        rows = has_label(batch.targets).nonzero().squeeze(1)
        if len(rows) == 0:
            whole = self.loss(net, outputs, batch._replace(targets=torch.zeros_like(batch.targets)))
            return {name: 0 * value for name, value in whole.items()}
        return self.loss(net, outputs.rows(rows), batch.rows(rows))

    def places(self, targets: Any) -> Tensor | None:
        """Returns which places of each sample are predicted, (N, T) bool, where logits are (N, T, outputs): tokens of padded
        sequences, pixels of pictures row by row. None (the default): a sample has one prediction.

        Losses, methods, scores and agreement then see the predicted places of all samples one after the other: logits (P,
        outputs), features (P, C) and targets (P,), so that a mean over the batch is one over places, and padding never counts.
        Targets may have more axes, (N, H, W), whose places are in their order. Maps (N, C, H, W) among the features stay maps.
        """
        return None

    def keep(self, outputs: Outputs) -> Outputs:
        """Returns what is kept of the outputs for a batch where those of a whole split are gathered: for metrics, agreement,
        figures and files. All of them by default; a task whose outputs are large returns its predictions."""
        return outputs

    def decode(self, outputs: Outputs) -> dict[str, Tensor]:
        """Returns the predictions by name, each (N, ...), as `predict` returns them."""
        raise NotImplementedError

    def metrics(self) -> Metric | MetricCollection:
        """Returns a new metric: `update(outputs, targets)` takes each batch, and `compute()` returns a dict of scalars.

        It must be exact for any number of processes: its states are gathered from all of them.
        """
        raise NotImplementedError

    def truth(self, targets: Any, teacher: Outputs | None) -> Any:
        """Returns what metrics compare the outputs for a batch with: its labels; without labels, the teacher's outputs."""
        return targets

    def check_targets(self, outputs: Outputs, targets: Any) -> None:
        """Raises `UserError` for targets that do not fit the outputs. It is called once, on the example; nothing by default."""

    def measures(self, outputs: Outputs) -> bool:
        """Returns whether the metrics are defined for these outputs. False for a teacher without classes, which is then neither
        measured nor judged."""
        return "logits" in outputs.heads

    def scores(self, outputs: Outputs, targets: Tensor) -> dict[str, Tensor]:
        """Returns scores to log while training: one value per sample by name, each (N,); they must be cheap to compute."""
        return {}

    def agreement(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """Returns measures of agreement between student and teacher: one value per sample by name, each (N,)."""
        return {}

    def agreement_metric(self) -> Metric | None:
        """Returns a new metric of the agreement over a whole split, for measures that are no mean over samples.

        `update(student, teacher)` takes the outputs of each batch, and `compute()` returns a dict of scalars. None (the
        default): agreement is the mean of `agreement`.
        """
        return None

    def by_class(self, outputs: Outputs, targets: Tensor, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Returns for a whole split what `summary.json` keeps of each class by its name, measures and `count` in the targets.
        None by default."""
        return {}

    def findings(self, outputs: Outputs, targets: Tensor, where: str) -> dict[str, str]:
        """Returns what is wrong with a student's predictions for a whole split beyond its metrics, sentences by a word each;
        `where` is what the split is called in them."""
        return {}

    def chance(self, targets: Tensor) -> float | None:
        """Returns the monitored metric of predictions that ignore the inputs (chance level); None if it is not defined.

        A teacher that is no better is refused, and a student that is no better causes a warning.
        """
        return None

    def can_judge(self, value: float, targets: Tensor) -> bool:
        """Returns whether these samples are enough to call a network with this value of the monitored metric no better than
        chance. False where a good network, too, may have such a value on so few."""
        return True

    def units(self) -> dict[str, list[float]] | None:
        """Returns `mean` and `std` of each output: logits · std + mean are in the units of the targets. None: logits are not
        standardized. They are stored with the weights, whose outputs cannot be interpreted without them."""
        return None

    @property
    def output_kind(self) -> str:
        """Returns how the outputs of an exported file are read: `kind`, "embedding", or another of
        `litdistill.utils.manifest.OUTPUT_NAMES`, which names the outputs of such a file."""
        return self.kind if self.reads_labels else EMBEDDING

    def exported(self, outputs: Outputs, inputs: Tensor) -> tuple[Tensor, ...]:
        """Returns what an exported file gives for the network's outputs, float32, in the order of its names; it is traced.

        `inputs`: of the file, before any preprocessing, for their size. The logits by default. A task with post-processing
        includes it, in fixed shapes, and has an `output_kind` of its own.
        """
        return (outputs.main,)

    def own_operators(self, format: str) -> dict[Any, Any]:
        """Returns for each operator of its own in `exported` the function by which an exported file has it instead: for "onnx"
        one of onnxscript, for "pt2" one of torch."""
        return {}

    def read_exported(self, found: Tensor) -> Outputs:
        """Returns the outputs of an exported file in the form of `keep`.

        `found`: what `litdistill.export.predict.Model.run` returns: logits (N, outputs); boxes (N, K, 6) as x1, y1, x2, y2,
        score, class; a mask (N, H, W).
        """
        return Outputs.of(found)

    def compare_exported(
        self, exported: Outputs, own: Outputs, targets: Any, precision: str = "fp32"
    ) -> tuple[float, float, float]:
        """Returns how the outputs of a file differ from the network's, as kept for a whole split: the largest difference of
        any value, the largest absolute value of the network's, and the share of equal decisions."""
        a, b = exported.main.double(), own.main.double()
        difference, largest = (a - b).abs().max().item(), b.abs().max().item()
        a, b = (at_places(self, targets, x).main for x in (exported, own))
        if self.kind == CATEGORICAL:
            return difference, largest, (a.argmax(1) == b.argmax(1)).double().mean().item()
        same = ((a > 0) == (b > 0)).double().mean().item() if self.kind == BERNOULLI else 1.0
        return difference, largest, same

    def least_metric(self, own: float, share: float, precision: str) -> float | None:
        """Returns the least monitored metric of a file where the network's is `own` and `share` of its decisions are to be
        equal; None where that share is limit enough."""
        return None

    def figures(self, samples: Samples) -> dict[str, Any]:
        """Returns matplotlib figures for TensorBoard by name; none by default."""
        return {}

    def better(self, value: float, other: float) -> bool:
        """Returns whether `value` of the monitored metric is better than `other`."""
        return value > other if self.monitor[1] == "max" else value < other


def overflowed(what: str) -> UserError:
    """Returns the error for outputs that are not finite; `what` they are, in words."""
    return UserError(
        f"{what} are not finite: the inputs hold NaN, or the network's weights have overflowed. Checkpoints of earlier "
        "epochs are kept. A smaller learning rate or gradients clipped at 1 usually help."
    )


def as_matrix(targets: Tensor) -> Tensor:
    """Returns targets (N,) as (N, 1); others as they are."""
    return targets[:, None] if targets.ndim == 1 else targets


def has_places(task: Task) -> bool:
    """Returns whether the logits of a task are (N, T, outputs): see `Task.places`."""
    return type(task).places is not Task.places


def at_places(task: Task, targets: Any, outputs: Outputs) -> Outputs:
    """Returns the outputs at the places that the task predicts, one after the other; as they are where it has none."""
    places = task.places(targets)
    return outputs if places is None else outputs.at(places)


def every_place(task: Task, outputs: Outputs | None) -> Any:
    """Returns the outputs (N, T, …) at all places, padding included, for their shapes; as they are where a task has none."""
    if outputs is None or not has_places(task):
        return outputs
    return outputs.at(torch.ones(outputs.logits.shape[:2], dtype=torch.bool, device=outputs.logits.device))


class Samples:
    """The samples of a split in order, with the outputs of both networks, for the figures of a task.

    Attributes:
        inputs: returns the i-th sample's input as it was read, None if it is not a single tensor.
        words: returns the i-th sample in words, for data that show it so; else None.
        targets: of all samples. names: of classes, labels or values.
        student, teacher: their outputs for all samples; None without a teacher.
    """

    def __init__(
        self,
        inputs: Callable[[int], Tensor | None],
        targets: Tensor,
        names: Sequence[str],
        student: Outputs,
        teacher: Outputs | None,
        words: Callable[[int], str | None] = lambda i: None,
    ):
        self.inputs, self.targets, self.names, self.student, self.teacher = inputs, targets, names, student, teacher
        self.words = words


class WholeSplit(Metric):
    """Applies `function(logits, targets)` to all samples of a split at once: exact for any batches and number of processes.

    `function`: takes logits (N, outputs) and the targets, and returns a dict of floats.
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
        self.logits.append(outputs.main.detach().float().clone())  # the next replay of a CUDA graph overwrites these
        self.targets.append(targets)

    def compute(self) -> dict[str, Tensor]:
        if not len(self.logits):
            raise UserError("There is no sample to measure: the validation or test loader yields no batch.")
        found = self.function(dim_zero_cat(self.logits), dim_zero_cat(self.targets))
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()}


IMAGES = ("inputs", "images", "input", "image", "img", "x", "pixel_values")  # names of what a network is called with
LABELS = ("labels", "label", "targets", "target")


def to_batch(raw: Any) -> Batch:
    """See `Task.batch`. A dict of one entry named in `IMAGES` beside the labels is the network's only argument."""
    if isinstance(raw, Batch):
        return raw
    if isinstance(raw, Mapping):
        rest = dict(raw)
        ids, views = rest.pop("ids", None), rest.pop("views", None)
        for key in LABELS:
            if key in rest:
                targets = rest.pop(key)
                if not isinstance(targets, Tensor):
                    raise UserError(_no_batch(raw))
                inputs: Any = next(iter(rest.values())) if len(rest) == 1 and rest.keys() <= {*IMAGES} else rest
                return Batch(inputs, targets, ids, views)
        raise UserError(f"A batch with the keys {', '.join(map(str, raw))} has no labels: name them labels or targets.")
    if isinstance(raw, (tuple, list)) and len(raw) >= 2 and isinstance(raw[-1], Tensor):
        return Batch(raw[0] if len(raw) == 2 else tuple(raw[:-1]), raw[-1])
    raise UserError(_no_batch(raw))


def _no_batch(raw: Any) -> str:
    """Returns the message for what is no batch, with what it is and what mends it."""
    last = next((raw[k] for k in LABELS if k in raw), None) if isinstance(raw, Mapping) else None
    last = raw[-1] if isinstance(raw, (tuple, list)) and raw else last
    remedy = "A collate_fn of the DataLoader can return one."
    if isinstance(last, (int, np.integer)):
        remedy = "This looks like one sample: give DataLoader(dataset, batch_size=32), not the dataset."
    elif isinstance(last, (tuple, list)) and last and isinstance(last[0], str):
        remedy = "Labels are numbers, the places of their classes, and stand last: map names to numbers in the dataset."
    elif isinstance(last, (np.ndarray, list, tuple)) and len(last) and isinstance(last[0], (int, np.integer)):
        remedy = "Convert arrays and lists to tensors in the collate_fn: torch.as_tensor(labels)."
    return (
        f"The loader yields {described(raw)}, and a batch should be a pair (inputs, targets) of tensors, a dict with labels, "
        f"or a litdistill.Batch. {remedy}"
    )
