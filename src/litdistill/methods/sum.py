"""Several methods at once: their terms are added."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from litdistill.features.feature_extractor import resolve_taps
from litdistill.methods.base import Method
from litdistill.types import Outputs, Taps
from litdistill.utils.errors import UserError


class Sum(Method):
    """The terms of all `methods` together; each method reads its own taps.

    A term is named after its method's key: `kd_soft` and `at_hint` of `{"kd": …, "at": …}`. `hard` alone keeps its
    name, and one method alone may have it: labels that count twice would not be seen in a log. So `hard: 0` is set in
    all methods but one. Raises `UserError` otherwise, here or, for methods that have no `hard`, in `forward`.
    """

    def __init__(self, methods: Mapping[str, Method]):
        super().__init__()
        if not methods:
            raise UserError("method.methods is empty. Name the methods to add, say {kd: …, at: …}.")
        labeled = [key for key, m in methods.items() if getattr(m, "hard", 0)]
        labeled.sort(key=lambda key: not methods[key].needs_hard)
        if len(labeled) > 1:
            if methods[labeled[1]].needs_hard:
                raise UserError(
                    f"{' and '.join(labeled[:2])} must both learn from the labels. Leave one out of the sum."
                )
            raise UserError(f"Two methods of the sum learn from the labels. Set method.methods.{labeled[1]}.hard=0.")
        self.methods = nn.ModuleDict(methods)
        self.needs_teacher = any(m.needs_teacher for m in methods.values())
        self.phases = any(m.phases for m in methods.values())
        self.init_epochs = min(m.init_epochs for m in methods.values())
        self.names: dict[str, tuple[list[str], list[str]]] = {}  # by method: which features of either network it reads

    def parts(self) -> dict[str, Method]:
        """The methods by key."""
        return {key: part for key, part in self.methods.items() if isinstance(part, Method)}

    def prepare(self, student: nn.Module, teacher: nn.Module | None, example: Tensor) -> nn.Module:
        """Prepares each method in turn, then finds the taps of each: `taps()` is known only afterwards.

        Each method gets its own features back from the union by these names, so that `"stages"` of one and `"pooled"`
        of another stay apart.
        """
        for part in self.parts().values():
            student = part.prepare(student, teacher, example)
        for key, part in self.parts().items():
            taps = part.taps()
            read = [] if teacher is None else resolve_taps(teacher, example, taps.teacher)
            self.names[key] = resolve_taps(student, example, taps.student), read
        return student

    def taps(self) -> Taps:
        """The union of the methods' taps, as names of submodules."""
        if not self.names:
            raise UserError("A Sum finds its taps in prepare(student, teacher, example): call it before taps().")
        student = dict.fromkeys(name for names, _ in self.names.values() for name in names)
        teacher = dict.fromkeys(name for _, names in self.names.values() for name in names)
        return Taps(list(student), list(teacher))

    def ship(self, student: nn.Module) -> nn.Module:
        for part in reversed(self.parts().values()):
            student = part.ship(student)
        return student

    def build(self, student: Outputs, teacher: Outputs | None, targets: Tensor) -> None:
        for key, part in self.parts().items():
            part.build(*self._own(key, student, teacher), targets)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Tensor) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        for key, part in self.parts().items():
            part.epoch = self.epoch
            for name, value in part(*self._own(key, student, teacher), target).items():
                if name == "hard" and name in terms:
                    raise UserError(f"Two methods of the sum learn from the labels. Set method.methods.{key}.hard=0.")
                terms[name if name == "hard" else f"{key}_{name}"] = value
        return terms

    def _own(self, key: str, student: Outputs, teacher: Outputs | None) -> tuple[Outputs, Outputs | None]:
        """Both outputs with the features that this method asked for, in its order."""
        s, t = self.names[key]
        own = student._replace(features={name: student.features[name] for name in s})
        if teacher is None:
            return own, None
        return own, teacher._replace(features={name: teacher.features[name] for name in t})
