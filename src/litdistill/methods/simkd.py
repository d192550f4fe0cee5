"""Reused teacher classifier (SimKD). Chen et al. 2022 (arXiv 2203.14001), section 3.

The trained and deployed network is the student up to its last map, a projector, and the teacher's own classifier,
frozen; the student learns only the teacher's map, the classifier's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from litdistill.losses import mse, same_size
from litdistill.methods.base import Method, check_weights, maps
from litdistill.methods.layers import dry_forward, reusable_classifier
from litdistill.types import Batch, Outputs, Taps
from litdistill.utils.errors import UserError


class ReusedHead(nn.Module):
    """The student up to its last map, the projector and the teacher's classifier: student inputs -> logits (N, classes).

    A plain network with a complete state dict, which is exported alone. `tap` names the last map in `backbone`; later
    layers are not used. `size`: height and width of the teacher's map, to which a larger map is pooled.
    """

    def __init__(
        self, backbone: nn.Module, tap: str, projector: nn.Module, classifier: nn.Module, size: tuple[int, int]
    ):
        super().__init__()
        self.backbone, self.projector, self.classifier, self.size = backbone, projector, classifier, size
        self._storage = _TapStorage()
        for m in backbone.modules():
            if getattr(m, "inplace", False) is True:
                m.inplace = False  # type: ignore[assignment] # an in-place activation after the tap would overwrite the map
        name, _, where = tap.partition(":")
        module = backbone.get_submodule(name)
        if where:
            module.register_forward_pre_hook(partial(_save_input, self._storage))
        else:
            module.register_forward_hook(partial(_save_output, self._storage))

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        self.backbone(*inputs, **named)
        x, self._storage.map = self._storage.map, None  # drops the reference, which would keep this batch's graph
        assert x is not None
        h, w = min(x.shape[2], self.size[0]), min(x.shape[3], self.size[1])
        if x.shape[2:] != (h, w):
            x = F.adaptive_avg_pool2d(x, (h, w))
        return self.classifier(self.projector(x).mean((2, 3)))


class _TapStorage:
    """Storage that the hook writes to; a deep copy of the network copies it, and `torch.export` accepts it."""

    map: Tensor | None = None


def _save_input(storage: _TapStorage, module: nn.Module, args: tuple[Any, ...]) -> None:
    storage.map = args[0]


def _save_output(storage: _TapStorage, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
    storage.map = out


def projector(channels: int, out: int, factor: int) -> nn.Sequential:
    """1x1, 3x3 and 1x1 convolutions with BatchNorm and ReLU, with out/factor inner channels.

    The last ReLU is the authors': a teacher's last map is expected to follow a ReLU, too.
    """
    mid = max(1, out // factor)
    layers: list[nn.Module] = []
    for a, b, kernel in ((channels, mid, 1), (mid, mid, 3), (mid, out, 1)):
        layers += [nn.Conv2d(a, b, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers)


def without_head(net: nn.Module, tap: str, called: list[nn.Module]) -> None:
    """Replaces layers with weights that run only after the tap by `Identity`, since their output is not used.

    Otherwise they would be deployed untrained, and would stop DDP, which waits for the gradient of each parameter.
    """
    name, _, where = tap.partition(":")
    tapped = {id(m) for m in net.get_submodule(name).modules()}
    inside = [i for i, m in enumerate(called) if id(m) in tapped]
    end = inside[-len({id(called[i]) for i in inside})] if where else inside[-1] + 1
    head = {id(m) for m in called[end:]} - {id(m) for m in called[:end]}
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in head and list(child.parameters()):
                setattr(parent, name, nn.Identity())


class SimKD(Method):
    """`hint` · MSE(projected student map, teacher map) + `hard` · labels' loss of the reused classifier's logits.

    The paper has no hard term: only the map is learned.
    """

    def __init__(
        self,
        hard: float = 0.0,
        hint: float = 1.0,
        factor: int = 2,
        student_taps: Sequence[str] | str = "last",
        teacher_taps: Sequence[str] | str = "last",
    ):
        super().__init__(hard)
        check_weights(hint=hint)
        if factor < 1:
            raise UserError(f"factor={factor} divides the projector's inner channels and must be 1 or more.")
        self.hint, self.factor, self.read = hint, factor, Taps(student_taps, teacher_taps)

    def taps(self) -> Taps:
        """Returns the projector's output in the network that `prepare` returns, and the teacher's map."""
        return Taps(("projector",), self.read.teacher) if self.hint else Taps()

    def prepare(self, student: nn.Module, teacher: nn.Module, example: Any) -> nn.Module:
        classifier = reusable_classifier(teacher, example, self.read.teacher, "simkd")
        t = maps(dry_forward(teacher, example, self.read.teacher)[1].features, "simkd")[-1]
        tap, outputs, called = dry_forward(student, example, self.read.student)
        s = maps(outputs.features, "simkd")[-1]
        without_head(student, tap, called)
        project = projector(s.shape[1], t.shape[1], self.factor).to(s.device)
        return ReusedHead(student, tap, project, classifier, (t.shape[2], t.shape[3]))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        if not self.hint:
            return {}
        s, t = same_size(maps(student.features, "simkd")[-1], maps(teacher.features, "simkd")[-1])
        return {"hint": self.hint * mse(s, t)}
