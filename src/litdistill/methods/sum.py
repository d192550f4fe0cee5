"""A sum of several methods: their loss terms are added."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from litdistill.features.feature_extractor import resolve_taps
from litdistill.methods.base import ALL_KINDS, Method
from litdistill.types import Batch, Outputs, Taps
from litdistill.utils.errors import UserError


class Sum(Method):
    """The terms of all `methods`; each method reads its own taps.

    A term's name starts with its method's key: `kd_soft` and `at_hint` of `{"kd": …, "at": …}`. Only one method may weigh the
    labels' loss, and its `hard` is that of the sum, since labels counted twice would not show in a log: set `hard: 0` in all
    methods but one. Raises `UserError` otherwise. `init_epochs` is the largest of its methods', so that all first phases
    have ended by then.
    """

    def __init__(self, methods: Mapping[str, Method]):
        if not methods:
            raise UserError("methods is empty. Name the methods to add, say {kd: …, at: …}.")
        labeled = sorted((key for key, m in methods.items() if m.hard), key=lambda key: not methods[key].needs_hard)
        if len(labeled) > 1:
            if methods[labeled[1]].needs_hard:
                raise UserError(
                    f"{' and '.join(labeled[:2])} must both learn from the labels. Leave one out of the sum."
                )
            raise UserError(f"Two methods of the sum learn from the labels. Set methods.{labeled[1]}.hard=0.")
        super().__init__(methods[labeled[0]].hard if labeled else 0.0)
        self.methods = nn.ModuleDict(methods)
        self.labeled = labeled[0] if labeled else None
        self.needs_teacher = any(m.needs_teacher for m in methods.values())
        self.some_classes = all(m.some_classes for m in methods.values() if m.needs_teacher)
        self.needs_hard = any(m.needs_hard for m in methods.values())
        self.init_epochs = max(m.init_epochs for m in methods.values())
        self.takes_places = all(m.takes_places for m in methods.values())
        self.reads_adversarial = any(m.reads_adversarial for m in methods.values())
        self.relabels = any(m.relabels for m in methods.values())
        self.kinds = tuple(kind for kind in ALL_KINDS if all(kind in m.kinds for m in methods.values()))
        self.names: dict[
            str, tuple[list[str], list[str]]
        ] = {}  # by method: the names of its student and teacher features

    def parts(self) -> dict[str, Method]:
        """Returns the methods by key."""
        return {key: part for key, part in self.methods.items() if isinstance(part, Method)}

    def prepare(self, student: nn.Module, teacher: Any, example: Any) -> nn.Module:
        """Prepares each method in turn, then resolves the taps of each, since `taps()` is known only afterwards.

        These names select each method's own features from the union, so that `"stages"` of one and `"pooled"` of another do
        not mix.
        """
        for part in self.parts().values():
            student = part.prepare(student, teacher, example)
        for key, part in self.parts().items():
            taps = part.taps()
            read = [] if teacher is None else resolve_taps(teacher, example, taps.teacher)
            self.names[key] = resolve_taps(student, example, taps.student), read
        return student

    def relabel(self, teacher: Any, batch: Batch) -> Batch:
        for part in self.parts().values():
            batch = part.relabel(teacher, batch)
        return batch

    def attacked_loss(self, student: Outputs, teacher: Any, batch: Batch) -> Tensor | None:
        """Returns that of the first method that names one."""
        found = (part.attacked_loss(student, teacher, batch) for part in self.parts().values())
        return next((loss for loss in found if loss is not None), None)

    def watched(self) -> dict[str, Tensor]:
        """Returns those of the methods: a name that several have starts with the method's key, as a term's does."""
        each = {key: part.watched() for key, part in self.parts().items()}
        count = Counter(name for own in each.values() for name in own)
        return {
            name if count[name] == 1 else f"{key}_{name}": value
            for key, own in each.items()
            for name, value in own.items()
        }

    def taps(self) -> Taps:
        """Returns the union of the methods' taps, as names of submodules."""
        if not self.names:
            raise UserError("A Sum resolves its taps in prepare(student, teacher, example): call it before taps().")
        student = dict.fromkeys(name for names, _ in self.names.values() for name in names)
        teacher = dict.fromkeys(name for _, names in self.names.values() for name in names)
        return Taps(list(student), list(teacher))

    def ship(self, student: nn.Module) -> nn.Module:
        for part in reversed(self.parts().values()):
            student = part.ship(student)
        return student

    def build(self, student: Outputs, teacher: Any, targets: Tensor | None) -> None:
        for key, part in self.parts().items():
            part.build(*self._own(key, student, teacher), targets)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        for part in self.parts().values():
            part.set_epoch(epoch)

    def hard_factor(self, epoch: int) -> float:
        """Returns the factor of the method that weighs the labels' loss."""
        return 1.0 if self.labeled is None else self.parts()[self.labeled].hard_factor(epoch)

    def own_weights(self) -> set[str]:
        return {f"{key}_{name}" for key, part in self.parts().items() for name in part.own_weights()}

    def companions(self, student: Outputs) -> list[Outputs]:
        own = [part.companions(self._own(key, student, None)[0]) for key, part in self.parts().items()]
        return [companion for companions in own for companion in companions]

    def forward(self, student: Outputs, teacher: Any, batch: Batch) -> dict[str, Tensor]:
        terms = {}
        for key, part in self.parts().items():
            for name, value in part(*self._own(key, student, teacher), batch).items():
                terms[f"{key}_{name}"] = value
        return terms

    def _own(self, key: str, student: Outputs, teacher: Outputs | None) -> tuple[Outputs, Outputs | None]:
        """Returns both networks' outputs with only the features of this method, in its order."""
        s, t = self.names[key]
        own = student._replace(features={name: student.features[name] for name in s})
        if teacher is None:
            return own, None
        return own, teacher._replace(features={name: teacher.features[name] for name in t})
