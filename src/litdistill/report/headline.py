"""The card at the top of a data set: how much smaller and faster the student is, what it lost, and what distilling added."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

from litdistill.evaluation.controls import LABELS_ALONE, Difference, control_of, difference, is_distilled
from litdistill.evaluation.predictions import measured
from litdistill.report.blocks import Card, Warn
from litdistill.report.collect import Group, Row, Seed
from litdistill.tasks.findings import judge
from litdistill.utils.units import SHARES, decimals, factor, named, quantity


def card(group: Group) -> Card | None:
    """Returns the card of the `chosen` student. A figure whose runs are not there is left out."""
    row = chosen(group)
    if row is None:
        return None
    figures = [*_costs(row, teacher_row(row, group)), *_quality(row, group)]
    return Card(row.label, figures, _note(row, group))


def chosen(group: Group) -> Row | None:
    """Returns the student that is best on the validation set among `_candidates`; None where there is none."""
    candidates, _ = _candidates(group)
    sign = -1 if group.less_is_better else 1
    return max(candidates, key=lambda row: sign * _validated(row, group.metric), default=None)


def _candidates(group: Group) -> tuple[list[Row], str]:
    """Returns the students that have a control; else those that learned from a teacher; else all; and words for them."""
    students = [row for row in group.rows if not row.teacher]
    learned = [row for row in students if is_distilled(row.seeds[0].summary)]
    if controlled := [row for row in learned if control(row, group) is not None]:
        return controlled, "that learned from a teacher and have a run by labels alone beside them"
    return (learned, "that learned from a teacher") if learned else (students, "here")


def control(row: Row, group: Group, find: Callable[..., int | None] = control_of) -> Row | None:
    """Returns the row of the same student trained by labels alone, on the same data at the same budget; `find` chooses it."""
    rows = [r for r in group.rows if not r.teacher]
    found = find(_conditions(row), [[_conditions(r)] for r in rows])
    return None if row.teacher or found is None else rows[found]


def _conditions(row: Row) -> Mapping[str, Any]:
    if row.teacher:
        return {"method": LABELS_ALONE}
    values = [s.summary.get("val", {}).get("best", 0.0) for s in row.seeds]
    return row.seeds[0].summary | {"val": {"best": statistics.mean(values)}}


def against(row: Row, group: Group, other: Row | None) -> Difference | None:
    """Returns by how much a row's metric exceeds another's; against a teacher, each run's own."""
    if row.teacher or other is None:
        return None
    values = {_seed(s): s.score for s in row.seeds}
    if not other.teacher:
        return difference(values, {_seed(s): s.score for s in other.seeds})
    teachers = {r.seeds[0].sha256: r.seeds[0].score for r in group.rows if r.teacher}
    own = {_seed(s): teachers.get(str(_sha(s)), other.seeds[0].score) for s in row.seeds}
    return difference(values, own)


def signed(group: Group, found: Difference | None) -> str:
    """Returns a difference of scores with its spread over seeds, with the digits of the table: `+3.40 ± 0.52`."""
    if found is None:
        return ""
    digits = places(group)
    text = f"{found.mean:+,.{digits}f}".replace("-", "−")
    return text if found.deviation is None else f"{text} ± {found.deviation:,.{digits}f}"


def places(group: Group) -> int:
    """Returns how many digits the group's metric is shown with."""
    return decimals(group.metric, statistics.mean(s.score for r in group.rows for s in r.seeds))


def warnings(group: Group) -> list[Warn]:
    """Returns what was found to be wrong with a student of the group, each finding once."""
    found: dict[str, list[str]] = {}
    for row in group.rows:
        for seed in row.seeds:
            for text in findings(seed, group):
                found.setdefault(f"{row.label}: {text}", []).append(str(_seed(seed)))
    return [Warn(f"{text} (seed {', '.join(seeds)})") for text, seeds in found.items()]


def findings(seed: Seed, group: Group) -> list[str]:
    """Returns what is wrong with a student: a constant, at chance level, or good on its training samples alone.

    Measured anew, as the row is; what was found on training samples is in the summary. Empty for a teacher.
    """
    if any(seed is its for row in group.rows if row.teacher for its in row.seeds):
        return []
    found = judge(seed.task, seed.test, seed.test_targets, seed.quality[group.metric], names=group.classes or ())
    gap = (seed.summary.get("findings") or {}).get("gap")
    return [*found.values(), *([str(gap)] if gap else [])]


def _costs(row: Row, teacher: Row | None) -> list[tuple[str, str]]:
    if teacher is None:
        return []
    sizes = [
        ("the file", row.timing.get("bytes"), teacher.timing.get("bytes")),
        ("by parameters", row.about.get("params"), teacher.about.get("params")),
    ]
    found = [(_ratio(mine, its, ("smaller", "larger", "as large")), what) for what, mine, its in sizes if mine and its][
        :1
    ]
    timed = [r.timing.get("cpu", {}).get(1, {}) for r in (row, teacher)]
    # Ratios of rounds to one reference: a process that slows a round down affects both networks alike.
    mine, its = (one["ratio"][1] if all("ratio" in t for t in timed) else one.get("p50_ms") for one in timed)
    if mine and its:
        thing = "image" if _pictured(row) else "sample"
        found.append((_ratio(mine, its, ("faster", "slower", "as fast")), f"one {thing} on the CPU"))
    return found


def _pictured(row: Row) -> bool:
    return len(row.seeds[0].summary.get("data", {}).get("input_shape") or ()) == 3


def _ratio(mine: float, its: float, words: tuple[str, str, str]) -> str:
    """Returns `15x smaller`: how many times less than the teacher's, or more; words for less, more and equal."""
    times, word = (its / mine, words[0]) if its >= mine else (mine / its, words[1])
    return words[2] if times < 1.05 else f"{times:.{0 if times >= 9.95 else 1}f}x {word}"


def _quality(row: Row, group: Group) -> list[tuple[str, str]]:
    metric, digits = named(group.metric), places(group)
    unit = " points" if group.metric in SHARES else ""
    worse = ", less is better" if group.less_is_better else ""
    score = statistics.mean(s.score for s in row.seeds)
    found = [(f"{score:,.{digits}f}{' %' if factor(group.metric) > 1 else ''}", f"test {metric}{worse}")]
    if (to_teacher := against(row, group, teacher_row(row, group))) is not None:
        found.append((signed(group, to_teacher) + unit, f"{metric} against its teacher"))
    if is_distilled(row.seeds[0].summary):
        added = against(row, group, control(row, group))
        if added is not None:
            found.append((signed(group, added) + unit, "by distillation, over labels alone"))
    return found


def _note(row: Row, group: Group) -> str:
    candidates, words = _candidates(group)
    seeds = quantity(len({_seed(s) for s in row.seeds}), "seed")
    one = len([r for r in group.rows if not r.teacher]) == 1
    if one:
        of = ""
    elif len(candidates) == 1:
        of = f", the only one {words.replace('have', 'has').replace('them', 'it')}"
    else:
        of = f", the best on validation of {len(candidates)} {words}"
    several = "; ± is the standard deviation over seeds" if len(row.seeds) > 1 else ""
    return f"{row.about['name']}, {seeds}{of}{several}."


def teacher_row(row: Row, group: Group) -> Row | None:
    """Returns the row of the first run's teacher; None where that run had none."""
    sha = _sha(row.seeds[0])
    return next((r for r in group.rows if r.teacher and r.seeds[0].sha256 == sha), None)


def _validated(row: Row, metric: str) -> float:
    return statistics.mean(measured(s.task, s.val, s.val_targets)[metric] for s in row.seeds)


def _seed(seed: Seed) -> Any:
    return seed.summary.get("seed")


def _sha(seed: Seed) -> str | None:
    return (seed.summary.get("teacher") or {}).get("sha256")
