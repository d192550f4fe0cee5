"""The doctor at the end of a run whose student is far behind its teacher or its control: one line of the log."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from litdistill.distillation.distiller import Distiller
from litdistill.evaluation import doctor
from litdistill.evaluation.controls import LABELS_ALONE, control_of, is_distilled
from litdistill.utils.command_line import typed
from litdistill.utils.units import SHARES, named, shown

log = logging.getLogger(__name__)

BELOW_TEACHER, BELOW_CONTROL = 0.1, 0.02  # by how much a share on the validation set is lower
TIMES_TEACHER, TIMES_CONTROL = 2.0, 1.1  # by how many times an error there is larger


def consult(
    cfg: DictConfig, data: Any, distiller: Distiller, summary: Mapping[str, Any], device: torch.device | str
) -> None:
    """Logs what is wrong with a finished run that is far behind. What fails only says so: the run is finished."""
    reference, command = "", f"litdistill doctor {typed('run', cfg.folder)}"
    try:
        said = behind(summary, distiller.on_validation.metrics, Path(cfg.runs), Path(cfg.folder))
        if said is None or not doctor.reads(data, distiller):
            return
        reference = f"{said} "
        found = doctor.brief(cfg, data, distiller, summary, device)
    except Exception as error:  # memory, a network of yours, another run's damaged summary
        log.info("%sThe doctor could not look at it: %s: %s", reference, type(error).__name__, error)
        return
    log.info("%sDoctor: %s. More: %s", reference, found or "nothing found in few samples", command)


def behind(summary: Mapping[str, Any], teacher: Mapping[str, float], runs: Path, folder: Path) -> str | None:
    """Returns in a sentence what the student is far behind on the validation set, its teacher or its control; None if nothing.

    `teacher`: its metrics there. The control is looked for among the finished runs in `runs`, of the same seed if there is one.
    """
    name, value = summary["metric"]["name"], summary["val"]["best"]
    if not is_distilled(summary):
        return None
    if (best := teacher.get(f"teacher_{name}")) is not None and _far(name, value, best, BELOW_TEACHER, TIMES_TEACHER):
        return _said(name, value, "teacher", best)
    others = [one for one in _controls(runs, folder) if control_of(summary, [[one]]) == 0]
    values = [one["val"]["best"] for one in others if one["seed"] == summary["seed"]] or [
        one["val"]["best"] for one in others
    ]
    if not values:
        return None
    mean = sum(values) / len(values)
    return _said(name, value, "control", mean) if _far(name, value, mean, BELOW_CONTROL, TIMES_CONTROL) else None


def _far(name: str, value: float, reference: float, below: float, times: float) -> bool:
    return reference - value >= below if name in SHARES else name != "r2" and value > times * reference > 0


def _said(name: str, value: float, who: str, reference: float) -> str:
    return (
        f"The student's {named(name)} on the validation set is {shown(name, value)}, and its {who}'s "
        f"{shown(name, reference)}."
    )


def _controls(runs: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """Yields the summaries of the finished runs by labels alone in the folders of `runs`."""
    deep = [*runs.glob("*/*/summary.json"), *runs.glob("*/*/*/summary.json"), *folder.parent.glob("*/summary.json")]
    for path in sorted({path.resolve() for path in deep}):
        text = path.read_text(encoding="utf-8", errors="replace")
        if path.parent != folder.resolve() and f'"method": "{LABELS_ALONE}"' in text:
            try:
                found = json.loads(text)
            except ValueError:
                continue
            yield found
