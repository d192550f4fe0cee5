"""The interface of a distillation method: a function from the outputs of two networks to the distillation loss.

A method reads no trainer, task, data set or config. The task computes the labels' loss; a method only weighs it.
To add a method, write one file here with a `Method` and one yaml in `conf/method/` that names it.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from litdistill.features.pyramid import PYRAMID, same_stride
from litdistill.types import ADVERSARIAL, Batch, Outputs, Taps
from litdistill.utils.errors import UserError

log = logging.getLogger(__name__)

# What logits are: the parameters of one distribution a sample, or a sigmoid a class of each box; see `Task.kind`.
CATEGORICAL, BERNOULLI, REAL, BOXES = "categorical", "bernoulli", "real", "boxes"
ALL_KINDS = (CATEGORICAL, BERNOULLI, REAL, BOXES)


# Options of methods of this project that are weights of their own terms of the loss, beside `hard`.
WEIGHTS = (
    *("soft", "adversarial", "hint", "tckd", "nckd", "inter", "intra", "instance", "batch", "classes", "pseudo"),
    *("target", "others", "distance", "angle", "box", "centerness"),
    *("foreground", "background", "attention", "context"),
)


class Method(nn.Module):
    """Base of all methods. A method's parameters (projectors) are trained beside the student and not deployed.

    Args:
        hard: weight of the labels' loss, which the task computes.
    """

    needs_teacher = True
    kinds: tuple[str, ...] = (CATEGORICAL, BERNOULLI, REAL)  # kinds of logits that its formula is defined for
    # Whether its rows may be places of sequences or pictures (`Task.places`): it compares no whole samples.
    takes_places = False
    reads_targets = False  # whether its own terms read the label of every sample
    some_classes = False  # whether it is defined for a teacher that knows only some of the classes
    # Whether it reads logits at adversarial inputs (`adversarial_logits`) beside those at its own.
    reads_adversarial = False
    relabels = False  # whether `relabel` gives labels to samples without
    init_epochs = 0  # epochs of a first phase that trains other parameters, without the labels' loss
    # Of a class of your own: whether nothing but `epoch` changes its terms in Python from step to step.
    recordable = False
    # Whether its terms change with `epoch` beyond the two phases: a step is then recorded anew each epoch.
    by_epoch = False
    needs_hard = False  # whether `hard` must be above 0
    # With fewer, the teacher's logits say no more than its decision, in one of the method's terms at least.
    fewest_classes = 2
    epoch = 0

    def __init__(self, hard: float = 1.0):
        super().__init__()
        check_weights(hard=hard)
        self.hard = hard

    def taps(self) -> Taps:
        """Returns the taps to read from both networks; none by default."""
        return Taps()

    def prepare(self, student: nn.Module, teacher: Any, example: Any) -> nn.Module:
        """Returns the network to train: the student, unless the method gives it another head or trains companions.

        `teacher`: a network; None for a method that needs none. `example`: inputs of a few samples that both networks take.
        """
        return student

    def ship(self, student: nn.Module) -> nn.Module:
        """Returns the part of the prepared network to evaluate and deploy: all of it, unless the method trains companions."""
        return student

    def build(self, student: Outputs, teacher: Any, targets: Tensor | None) -> None:
        """Creates projectors and memories, once, from the outputs of a dry forward of one small batch, which give the shapes.

        `teacher`: its `Outputs`; None for a method that needs none.
        `targets`: (M,) int64, the label of every training sample by id, -1 for those that are not trained on; None where
        the data has no ids.
        Raises `UserError` where the method is not defined for this pair of networks (no spatial maps, say).
        """

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch; epochs count from 0."""
        self.epoch = epoch

    def hard_factor(self, epoch: int) -> float:
        """Returns the factor of the labels' loss in this epoch, beside `hard`: 0 in the first `init_epochs`, then 1."""
        return 0.0 if epoch < self.init_epochs else 1.0

    def relabel(self, teacher: Any, batch: Batch) -> Batch:
        """Returns the batch with the labels that the method gives to samples without (`litdistill.types.has_label`); it is
        called before the labels' loss is computed. `teacher`: its `Outputs`, None without. By default nothing is changed."""
        return batch

    def attacked_loss(self, student: Outputs, teacher: Any, batch: Batch) -> Tensor | None:
        """Returns what the attack of adversarial training ascends, a scalar; None (the default): the labels' loss.

        `student`: its outputs at the attacked inputs, without features. The teacher's are those at the batch's own.
        """
        return None

    def watched(self) -> dict[str, Tensor]:
        """Returns scalars of the last minibatch to log beside the loss, by name; none by default. The same names each time."""
        return {}

    def own_weights(self) -> set[str]:
        """Returns the terms whose weight was chosen for the case at hand, which `balance` therefore keeps.

        By default those whose option of the same name has another value than its default.
        """
        options = inspect.signature(type(self)).parameters.values()
        values = {o.name: (getattr(self, o.name, None), o.default) for o in options}
        numbers = {k: pair for k, pair in values.items() if all(isinstance(v, (int, float)) for v in pair)}
        return {name for name, (value, default) in numbers.items() if value != default}

    def companions(self, student: Outputs) -> Sequence[Outputs]:
        """Returns the outputs of networks that are trained on the labels beside the student; none by default."""
        return ()

    def forward(self, student: Outputs, teacher: Any, batch: Batch) -> dict[str, Tensor]:
        """Returns the distillation loss: scalar terms by name, each already weighted.

        They are added to the labels' loss, and logged by their names. `teacher`: its `Outputs`; None for a method that
        needs none. A term whose weight is 0 is left out and not computed.
        """
        raise NotImplementedError


def adversarial_logits(student: Outputs) -> Tensor:
    """Returns the student's logits at adversarial inputs, (N, classes); in a dry forward, which attacks nothing, its logits."""
    return student.heads.get(ADVERSARIAL, student.logits)


class PairMethod(Method):
    """Base of methods that compare features of both networks in pairs: `hint` · `loss` of the pairs.

    Args:
        hard: weight of the labels' loss.
        hint: weight of `loss`.
        student_taps, teacher_taps: see `litdistill.types.Taps`; pairs are counted from the last feature.
    """

    some_classes = True  # features have no classes

    def __init__(self, hard: float, hint: float, student_taps: Sequence[str] | str, teacher_taps: Sequence[str] | str):
        super().__init__(hard)
        check_weights(hint=hint)
        self.hint, self.read = hint, Taps(student_taps, teacher_taps)

    def taps(self) -> Taps:
        return self.read if self.hint else Taps()

    def pairs(self, student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
        """Returns the pairs of student and teacher features to compare; one pair at least."""
        raise NotImplementedError

    def build(self, student: Outputs, teacher: Outputs, targets: Tensor | None) -> None:
        if self.hint:
            self.build_pairs(self.pairs(student, teacher))

    def build_pairs(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Creates projectors for these pairs; none by default."""

    def loss(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Returns the unweighted loss of the pairs, a scalar."""
        raise NotImplementedError

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"hint": self.hint * self.loss(self.pairs(student, teacher))} if self.hint else {}


class MapMethod(PairMethod):
    """Base of methods that compare spatial maps of both networks, stage by stage; arguments as of `PairMethod`."""

    kinds: tuple[str, ...] = ALL_KINDS  # maps are the same of any task
    takes_places = True  # maps stay whole where the logits are those of places: see `Outputs.at`

    def __init__(
        self,
        hard: float = 1.0,
        hint: float = 1.0,
        student_taps: Sequence[str] | str = "stages",
        teacher_taps: Sequence[str] | str = "stages",
    ):
        super().__init__(hard, hint, student_taps, teacher_taps)

    def pairs(self, student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
        """Returns the pairs of maps: (N, C_s, H_s, W_s) of the student and (N, C_t, H_t, W_t) of the teacher.

        They are counted from the last. Levels of a pyramid belong together by their stride, and those that one network alone
        has are left out.
        """
        name = type(self).__name__.lower()
        s, t = maps(student.features, name), maps(teacher.features, name)
        if not any(names_pyramid(taps) for taps in self.read):
            return pair(s, t)
        return [(s[i], t[j]) for i, j in paired_levels(s, t, name)]

    def build(self, student: Outputs, teacher: Outputs, targets: Tensor | None) -> None:
        super().build(student, teacher, targets)
        if self.hint and any(names_pyramid(taps) for taps in self.read):
            say_unpaired(student.features, teacher.features, type(self).__name__.lower())


class VectorMethod(PairMethod):
    """Base of methods that compare one vector per sample; arguments as of `PairMethod`.

    `loss` is computed in float32, also under autocast.
    """

    def __init__(
        self,
        hard: float = 1.0,
        hint: float = 1.0,
        student_taps: Sequence[str] | str = "pooled",
        teacher_taps: Sequence[str] | str = "pooled",
    ):
        super().__init__(hard, hint, student_taps, teacher_taps)

    def pairs(self, student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
        """Returns the pairs of vectors: (N, D_s) of the student and (N, D_t) of the teacher, in float32."""
        name = type(self).__name__.lower()
        return pair(vectors(student.features, name), vectors(teacher.features, name))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        if not self.hint:
            return {}
        with torch.autocast(student.main.device.type, enabled=False):
            return super().forward(student, teacher, batch)


def summed(losses: Sequence[Tensor]) -> Tensor:
    """Returns the sum of scalars, as one operation."""
    return torch.stack(list(losses)).sum()


def check_weights(**weights: float) -> None:
    """Raises `UserError` for a loss weight below zero."""
    for name, value in weights.items():
        if not value >= 0:
            raise UserError(f"{name}={value} is a loss weight and cannot be negative. Use 0 to leave the term out.")


def check_temperature(temperature: float) -> None:
    """Raises `UserError` unless the temperature is above zero."""
    if not temperature > 0:
        raise UserError(f"temperature={temperature} must be above 0. Common values are 2 to 20; 4 is a good start.")


def maps(features: Mapping[str, Tensor], method: str) -> list[Tensor]:
    """Returns the spatial maps (N, C, H, W) among the features, in order. Raises `UserError` without any."""
    found = [f for f in features.values() if f.ndim == 4]
    if not found:
        shapes = ", ".join(f"{k} {tuple(v.shape)}" for k, v in features.items()) or "no feature at all"
        raise UserError(
            f"{method} compares spatial maps (N, C, H, W), and this network offers {shapes}. "
            "Use a method that reads logits or vectors (kd, logit_mse, pkt, rkd, sp), or name a tap that is a map."
        )
    return found


def vectors(features: Mapping[str, Tensor], method: str) -> list[Tensor]:
    """Returns all features flattened to (N, D), in float32, in order. Raises `UserError` without any."""
    if not features:
        raise UserError(
            f"{method} compares features, and its taps name none. Give student_taps and teacher_taps, say pooled."
        )
    return [f.float().flatten(1) for f in features.values()]


def pair(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Pairs the features of two networks, counted from the last: the deeper network's first features stay unpaired."""
    n = min(len(student), len(teacher))
    return list(zip(student[len(student) - n :], teacher[len(teacher) - n :], strict=True))


def names_pyramid(taps: Sequence[str] | str) -> bool:
    """Returns whether taps are, or contain, the levels of a pyramid."""
    return PYRAMID in ([taps] if isinstance(taps, str) else taps)


def paired_levels(student: Sequence[Tensor], teacher: Sequence[Tensor], method: str) -> list[tuple[int, int]]:
    """Returns the indices of maps of one stride; see `same_stride`. Raises `UserError` where no two have the same."""
    pairs = same_stride(student, teacher)
    if not pairs:
        sizes = [", ".join("x".join(map(str, x.shape[2:])) for x in side) for side in (student, teacher)]
        raise UserError(
            f"{method} compares the levels of two pyramids that have one stride, and there are none: the student's maps are "
            f"{sizes[0]}, the teacher's {sizes[1]}. Build both with a common level, or name the maps of both."
        )
    return pairs


def say_unpaired(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], method: str) -> None:
    """Logs which maps of either network have no partner of their stride in the other."""
    sides = [{k: v for k, v in features.items() if v.ndim == 4} for features in (student, teacher)]
    pairs = same_stride(*(list(side.values()) for side in sides))
    for who, side, used in zip(("student", "teacher"), sides, zip(*pairs, strict=True), strict=True):
        alone = [f"{k} ({v.shape[2]}x{v.shape[3]})" for i, (k, v) in enumerate(side.items()) if i not in used]
        if alone:
            log.info("%s leaves out levels that the %s alone has: %s.", method, who, ", ".join(alone))
