"""TensorBoard's figures of a task, and the layout of its Custom Scalars tab."""

from __future__ import annotations

import logging
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from litdistill.data.foreign import output_names, sample, training_inputs, words
from litdistill.evaluation.crowd import members_figure
from litdistill.evaluation.predictions import predict_split, teacher_outputs
from litdistill.features.outputs import first_tensor, run_network
from litdistill.models.ensemble import Ensemble
from litdistill.models.log_mel import spectrogram_picture
from litdistill.models.profile import weight_bytes
from litdistill.tasks.base import Samples, Task
from litdistill.tasks.figures import any_names, save_figure
from litdistill.utils.errors import UserError
from litdistill.utils.modality import SOUND, modality_of
from litdistill.utils.tags import tag
from litdistill.utils.units import named

log = logging.getLogger(__name__)


def layout(task: Task, terms: Sequence[str] = ("hard", "soft")) -> dict[str, dict[str, list[Any]]]:
    """Returns the layout of TensorBoard's Custom Scalars tab, with student and teacher in one chart.

    `terms`: the names of the loss's terms.
    """
    name = task.monitor[0]
    chart = lambda *names: ["Multiline", [tag(n) for n in names]]  # noqa: E731
    return {
        "student and teacher": {
            f"{named(name)} on the validation set": chart(f"val/{name}", f"val/teacher_{name}"),
            "the student follows its teacher": chart("val/agreement", "train/agreement"),
            "KL from the teacher (nats)": chart("val/kl"),
        },
        "loss": {"its terms, weighted": chart("train/loss", *(f"train/{term}" for term in terms))},
        "calibration": {"ECE": chart("val/ece"), "NLL and Brier": chart("val/nll", "val/brier")},
        "speed": {
            "samples a second": chart("speed/samples_per_s"),
            "teacher's share": chart("speed/teacher_share"),
        },
    }


@torch.no_grad()
def results(summary: Mapping[str, Any], student: nn.Module, data: Any, device: Any) -> dict[str, float]:
    """Returns what TensorBoard's HParams tab compares runs by: the test metric, the weights' size and latency.

    Latency is the median of a few forwards of one sample on `device`, in milliseconds; left out where inputs are no tensor.
    """
    name = summary["metric"]["name"]
    found = {
        f"test/{name}": float(summary["student"]["test"][name]["best"]),
        "test/megabytes": weight_bytes(student) / 1e6,
    }
    inputs = training_inputs(data, 1)
    if not isinstance(inputs, torch.Tensor):
        return found
    sample = inputs[:1].to(device)
    times: list[float] = []
    student.to(device).eval()
    while len(times) < 20 and sum(times) < 0.5:
        start = time.perf_counter()
        first_tensor(run_network(student, sample).heads).cpu()  # .cpu() synchronizes
        times.append(time.perf_counter() - start)
    return {**found, "test/milliseconds": 1000 * statistics.median(times)}


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
    if expected is not None and not task.measures(expected):
        expected = None  # a teacher without classes has no predictions to show
    names = output_names(data, outputs.main.shape[-1])
    samples = Samples(
        lambda i: picture(data, sample(data, "val", i)),
        targets,
        names,
        outputs,
        expected,
        lambda i: words(data, "val", i),
    )
    with any_names():
        found = dict(task.figures(samples))
        if isinstance(teacher, Ensemble) and expected is not None and "members" in expected.heads:
            found["members of the teacher"] = members_figure(task, teacher, expected.heads["members"], targets)
        for name, figure in found.items():
            writer.add_figure(f"validation/{name}", figure, step)


class PngFiles:
    """Writes figures as PNG files to a folder, `worst_misses.png`, in place of a SummaryWriter.

    Raises `UserError` where the folder cannot be made.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> PngFiles:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"pictures={self.folder} cannot be made: {error.strerror}. Name another folder.") from error
        return self

    def __exit__(self, *_: object) -> None: ...

    def add_figure(self, tag: str, figure: Any, step: int) -> None:
        """Writes a figure of matplotlib."""
        name = re.sub(r"\W+", "_", tag.rpartition("/")[2]).strip("_")
        save_figure(figure, self.folder / f"{name}.png", dpi=110, bbox_inches="tight")


def picture(data: Any, inputs: Tensor | None) -> Tensor | None:
    """Returns what is drawn of a sample's input: the spectrogram of a sound, and any other input as it is."""
    modality = modality_of(data)
    if inputs is None or modality.kind != SOUND or inputs.ndim != 1:
        return inputs
    return spectrogram_picture(inputs, int(modality.options["sample_rate"]))
