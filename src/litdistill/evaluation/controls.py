"""The control of a distilled student: the same student, trained on the same data at the same budget by labels alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from litdistill.utils.units import Number, decimals, deviation, factor

LABELS_ALONE = "supervised"
CONTROLS = (LABELS_ALONE, "shuffled")  # methods that learn nothing from a teacher, or nothing but noise
# Settings that may differ from the control's: how the student learns, but not from what, on what or for how long.
FREE = ("method", "teacher", "optimizer", "scheduler", "schedule")
BUDGET = ("train/epochs", "train/batch_size", "train/global_batch")


class Difference(NamedTuple):
    """How a figure differs from another's: the mean, the standard deviation over seeds, and over how many of these."""

    mean: float
    deviation: float | None
    seeds: int  # that both have; 0: none, and the means were compared


def is_measured(teacher: Mapping[str, Any] | None) -> bool:
    """Returns whether there is a teacher in a summary, with metrics: one without classes has none in a task of classes."""
    return teacher is not None and bool(teacher["test"])


def is_distilled(run: Mapping[str, Any]) -> bool:
    """Returns whether a summary is of a student that learned from a teacher."""
    return run.get("teacher") is not None and str(run["method"]).split("+")[0] not in CONTROLS


def control_of(run: Mapping[str, Any], kinds: Sequence[Sequence[Mapping[str, Any]]]) -> int | None:
    """Returns the index of the kind that is the control of a run; None where there is none, or `run` is of one itself.

    Of several, which differ in the optimizer, it is the best on the validation set.
    """
    if run["method"] == LABELS_ALONE:
        return None
    wanted = _conditions(run)
    found = [i for i, kind in enumerate(kinds) if kind[0]["method"] == LABELS_ALONE and _conditions(kind[0]) == wanted]
    sign = -1 if run["metric"]["direction"] == "min" else 1
    return max(found, key=lambda i: sign * _validated(kinds[i]), default=None)


def unprotected(run: Mapping[str, Any], kinds: Sequence[Sequence[Mapping[str, Any]]]) -> int | None:
    """Returns the index of the control of a run that saw no adversarial inputs; None where there is none, or `run` is of it.

    A run on labels alone that saw some has one, too.
    """
    settings = run.get("settings") or {}
    bare = {key: value for key, value in settings.items() if not key.startswith("adversarial.")}
    if run["method"] == LABELS_ALONE and len(bare) == len(settings):
        return None
    return control_of({**run, "method": "", "settings": bare}, kinds)


def _conditions(run: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a run and its control have in common."""
    start, student = run.get("start") or {}, run["student"]
    kept = {k: v for k, v in (run.get("settings") or {}).items() if k.split(".")[0] not in FREE}
    return {
        "data": run["data"],
        "student": (student["name"], student.get("precision", "fp32"), student.get("params")),
        "start": {k: start.get(k) for k in ("from", "images", "method")},
        "budget": [run["options"].get(k) for k in BUDGET],
        "settings": kept,
    }


def _validated(kind: Sequence[Mapping[str, Any]]) -> float:
    return sum(run.get("val", {}).get("best", 0.0) for run in kind) / len(kind)


def difference(values: Mapping[Any, float], others: Mapping[Any, float]) -> Difference:
    """Returns by how much values by seed exceed others: in pairs of one seed where there are some, else between the means."""
    common = [seed for seed in values if seed in others]
    if not common:
        return Difference(_mean(list(values.values())) - _mean(list(others.values())), None, 0)
    pairs = [values[seed] - others[seed] for seed in common]
    return Difference(_mean(pairs), deviation(pairs), len(pairs))


def shown_difference(name: str, found: Difference, scale: float) -> Number:
    """Returns a difference of a metric as a table shows it, with the digits of a value of that `scale`."""
    by = factor(name)
    spread = None if found.deviation is None else by * found.deviation
    return Number(by * found.mean, spread, decimals(name, by * scale), signed=True)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
