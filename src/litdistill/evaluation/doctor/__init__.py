"""What is wrong with a finished run, in order of weight: each finding with its figure and the one change to try.

    litdistill doctor run=runs/train/<stamp>

Reads the run, its teacher and its checkpoints, and runs both networks over the validation set and as many training samples.
Nothing is trained, and the test set is not read. `train` calls `brief` at the end of a run whose student is far behind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig

from litdistill.data.foreign import ForeignData
from litdistill.distillation.distiller import Distiller
from litdistill.evaluation.doctor import fit, gradients, teacher
from litdistill.evaluation.doctor.case import Case, Finding, examined
from litdistill.evaluation.doctor.gradients import Term
from litdistill.evaluation.evaluate import load_run, rebuild
from litdistill.utils.checkpoint import load_checkpoint
from litdistill.utils.errors import UserError

Rule = Callable[[Case], Finding | None]
RULES: tuple[Rule, ...] = (*teacher.RULES, *fit.RULES)
FEW = 1000  # samples of a split that the short form looks at
NONE = (
    "Nothing found: teacher, classes, preprocessing, views, statistics, weights of terms, fit, schedule and labels look "
    "right."
)


class Diagnosis(NamedTuple):
    """`findings`: the weightiest first. `terms`: of the loss, measured at the start."""

    findings: list[Finding]
    terms: list[Term]


def diagnose(
    folder: str | Path, overrides: DictConfig | None = None, device: str = "cpu", trust: Sequence[str] = ()
) -> Diagnosis:
    """Returns what is wrong with a finished run. Raises `UserError` for a run that cannot be rebuilt."""
    folder = Path(folder)
    cfg, summary = load_run(folder, trust)
    data, distiller = rebuild(folder, overrides, trust)
    if not reads(data, distiller):
        raise UserError(
            "The doctor reads runs whose samples have ids and labels: data of this project, not a loader of yours."
        )
    case = examined(cfg, data, distiller, summary, best_epoch(folder), device)
    return Diagnosis(judged(case), case.gradients.terms)


def reads(data: Any, distiller: Distiller) -> bool:
    """Returns whether the doctor can read runs on these data."""
    return not isinstance(data, ForeignData) and distiller.task.reads_labels


def best_epoch(folder: Path) -> int | None:
    """Returns the epoch of the weights that a run kept, counted from 1; None without its checkpoint."""
    best = folder / "checkpoints" / "best.ckpt"
    return int(load_checkpoint(best)["epoch"]) + 1 if best.is_file() else None


def judged(case: Case) -> list[Finding]:
    """Returns the findings of all rules, the weightiest first."""
    found = [finding for rule in RULES if (finding := rule(case)) is not None]
    return sorted(found, key=lambda finding: -finding.weight)


def lines(found: Diagnosis) -> list[str]:
    """Returns the findings as lines of text, one line where there is none, and the gradients that were measured."""
    each = [f"{i}. {f.name}: {f.said}\n   Try: {f.change}" for i, f in enumerate(found.findings, 1)]
    figures = gradients.said(found.terms)
    return [*(each or [NONE]), *([figures] if figures else [])]


def brief(
    cfg: DictConfig,
    data: Any,
    distiller: Distiller,
    summary: Mapping[str, Any],
    device: torch.device | str,
) -> str:
    """Returns the findings of a run that just ended in a few words: "labels (try: …); overfitting (try: …)"."""
    found = judged(examined(cfg, data, distiller, summary, best_epoch(Path(cfg.folder)), device, FEW))
    return "; ".join(f"{f.name} (try: {f.change})" for f in found)
