"""`compile.student=auto`: compiles the student of a run if that is expected to save more time than it takes.

What compiling fuses is counted on a forward of the example: each normalization with what follows it. Counted are launches and
bytes, and not seconds, so that the same run is decided alike; a resumed run goes on as it began.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from litdistill.distillation.distiller import Distiller
from litdistill.types import Batch
from litdistill.utils.modes import eval_mode
from litdistill.utils.units import quantity

log = logging.getLogger(__name__)

MODE = "default"  # fuses kernels within a recorded step
NORMALIZATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm)
# Of one NVIDIA H200 (docs/scale.md): seconds of an operation in a recorded step, and bytes that it moves in a second.
LAUNCH_S, BYTES_PER_S = 4.75e-6, 4.16e12
# Assumed, and measured on no card: what fusing a normalization with its activation saves of a step, forward and backward, and
# the seconds that it takes to compile a layer with parameters for the first time. `make gpu STAGES=compile` measures both.
LAUNCHES, PASSES, LAYER_S = 2, 4, 1.5


class Expected(NamedTuple):
    """What compiling is expected to save of each step, and to take, in seconds."""

    step_s: float
    takes_s: float

    def pays(self, steps: int) -> bool:
        """Returns whether it saves more over so many steps than it takes."""
        return steps * self.step_s > self.takes_s


def expected(distiller: Distiller, example: Batch, batch_size: int, element: int = 2) -> Expected:
    """Returns what compiling the student is expected to save and to take, for minibatches of `batch_size` samples.

    `element`: the bytes of an activation.
    """
    sizes: list[int] = []
    samples = len(example.inputs if isinstance(example.inputs, Tensor) else example.targets)

    def note(module: nn.Module, given: Any, result: Any) -> None:
        if isinstance(result, Tensor):
            sizes.append(result.numel() * batch_size // samples)

    student = distiller.student
    hooks = [m.register_forward_hook(note) for m in student.modules() if isinstance(m, NORMALIZATIONS)]
    try:
        with eval_mode(student), torch.no_grad():
            distiller.task.forward(student, example, False)
    finally:
        for hook in hooks:
            hook.remove()
    layers = sum(any(p.requires_grad for p in module.parameters(recurse=False)) for module in student.modules())
    saved = len(sizes) * LAUNCHES * LAUNCH_S + PASSES * element * sum(sizes) / BYTES_PER_S
    return Expected(saved, layers * LAYER_S)


def decide(
    distiller: Distiller, example: Any, batch_size: int, steps: int, device: str, precision: str, kept: str | None
) -> str:
    """Returns the mode of torch.compile that the student is compiled with, or "off", and logs why.

    `device`: its type; `precision`: the Trainer's; `kept`: what was decided when a resumed run began; None for a new one.
    """
    if kept in (MODE, "off"):
        log.info("compile.student=auto: %s, as when the run began.", _named(kept))
        return kept
    if device != "cuda":
        log.info("compile.student=auto: not compiled, since on a CPU no student that was tried was any faster.")
        return "off"
    found = expected(distiller, distiller.task.batch(example), batch_size, 4 if precision.startswith("32") else 2)
    chosen = MODE if found.pays(steps) else "off"
    log.info(
        "compile.student=auto: %s. It is expected to take %.0f s, and to save %.0f s over %s.",
        *(_named(chosen), found.takes_s, steps * found.step_s, quantity(steps, "step")),
    )
    return chosen


def _named(chosen: str) -> str:
    return "not compiled" if chosen == "off" else f"compiled ({chosen})"
