"""TensorBoard's figures of a task, and the layout of its Custom Scalars tab."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from litdistill.data.foreign import output_names, sample
from litdistill.evaluation.predictions import predict_split, teacher_outputs
from litdistill.tasks.base import Samples, Task

log = logging.getLogger(__name__)


def layout(task: Task) -> dict[str, dict[str, list[Any]]]:
    """Returns the layout of TensorBoard's Custom Scalars tab, with student and teacher in one chart."""
    name = task.monitor[0]
    return {
        "student and teacher": {
            f"{name} on the validation set": ["Multiline", [f"val/{name}", f"val/teacher_{name}"]],
            "the student follows its teacher": ["Multiline", ["val/agreement", "train/agreement"]],
            "KL from the teacher (nats)": ["Multiline", ["val/kl"]],
        },
        "loss": {"terms, weighted": ["Multiline", ["train/loss", "train/hard", "train/soft", "train/hint"]]},
        "calibration": {"ECE": ["Multiline", ["val/ece"]], "NLL and Brier": ["Multiline", ["val/nll", "val/brier"]]},
        "speed": {
            "samples a second": ["Multiline", ["speed/samples_per_s"]],
            "teacher's share": ["Multiline", ["speed/teacher_share"]],
        },
    }


def show(
    writer: Any,
    student: nn.Module,
    teacher: nn.Module | None,
    data: Any,
    task: Task,
    device: Any,
    step: int,
    folder: Path | None = None,
) -> None:
    """Writes the task's figures for the validation set to TensorBoard; without matplotlib logs a warning instead.

    `folder`: cache of the teacher's outputs (`litdistill.evaluation.predictions.teacher_outputs`).
    """
    if find_spec("matplotlib") is None:
        log.warning("No pictures in TensorBoard: pip install 'litdistill[report]' brings matplotlib.")
        return
    outputs, targets = predict_split(student, data, "val", device, task)
    expected = teacher_outputs(teacher, data, task, "val", device, folder) if teacher is not None else None
    names = output_names(data, outputs.logits.shape[1])
    samples = Samples(lambda i: sample(data, "val", i), targets, names, outputs, expected)
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False}):  # a class's name is no formula
        for name, figure in task.figures(samples).items():
            writer.add_figure(f"validation/{name}", figure, step)
