"""Tables of methods over pairs: a row a method, a column a pair of teacher and student, and what a teacher adds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from litdistill.evaluation.controls import control_of, difference, is_distilled, is_measured, shown_difference
from litdistill.report.tables import Cell, differing, kinds
from litdistill.report.writers import ADDED
from litdistill.utils.units import Number, heading, measured

LABELS = ("method", "trained on")  # the columns before the pairs
Runs = Sequence[dict[str, Any]]


def pivot(found: Runs) -> list[dict[str, Cell]]:
    """Returns a row for each method and number of training samples, teachers first, and two columns for each pair.

    The second column, `over labels alone`, is the difference from the same student trained by labels alone, on the same data
    at the same budget, in pairs of one seed; it stands where there is such a run. All runs are of one table
    (`tables.by_data`).
    """
    grouped = kinds(found)
    pairs = list(dict.fromkeys(pair for kind in grouped for pair in _pairs(kind[0], grouped)))
    metric = found[0]["metric"]["name"]
    teachers = {t: {r["teacher"]["sha256"]: r["teacher"]["test"][metric]
                    for r in found if _teacher(r) == t and is_measured(r["teacher"])}
                for t, _ in pairs if t}  # fmt: skip
    teachers = {name: values for name, values in teachers.items() if values}
    table: dict[tuple[str, int | None], dict[str, Cell]] = {}
    if teachers:
        table["teacher", -1] = {"method": "teacher", "trained on": ""}
        for teacher, student in pairs:
            if teacher in teachers:
                table["teacher", -1][_column(teacher, student, metric)] = measured(
                    metric, list(teachers[teacher].values())
                )
    for kind in _ordered(grouped):
        count = kind[0]["data"]["train"]
        for pair in _pairs(kind[0], grouped):
            name = _method(kind[0], [k[0] for k in grouped if pair in _pairs(k[0], grouped)])
            while _column(*pair, metric) in table.get((name, count), {}):  # of another experiment
                name += f", {kind[0]['experiment']}"
            row = table.setdefault(
                (name, count), {"method": name, "trained on": "" if count is None else Number(count)}
            )
            row |= _cells(kind, grouped, pair, metric)
    columns = [name for pair in pairs for name in (_column(*pair, metric), _added(*pair))]
    columns = [name for name in columns if any(name in row for row in table.values())]
    return [{name: row.get(name, "") for name in (*LABELS, *columns)} for row in table.values()]


def _cells(kind: Runs, grouped: Sequence[Runs], pair: tuple[str, str], metric: str) -> dict[str, Cell]:
    values = {run["seed"]: run["student"]["test"][metric]["best"] for run in kind}
    cells: dict[str, Cell] = {_column(*pair, metric): measured(metric, list(values.values()))}
    if is_distilled(kind[0]) and (i := control_of(kind[0], grouped)) is not None:
        others = {run["seed"]: run["student"]["test"][metric]["best"] for run in grouped[i]}
        scale = sum(values.values()) / len(values)
        cells[_added(*pair)] = shown_difference(metric, difference(values, others), scale)
    return cells


def _teacher(run: dict[str, Any]) -> str:
    return run["teacher"]["name"] if run["teacher"] else ""


def _pairs(run: dict[str, Any], grouped: Sequence[Runs]) -> list[tuple[str, str]]:
    """Returns the pairs whose columns a run belongs to: one without a teacher belongs to all pairs of its student."""
    student = run["student"]["name"]
    if run["teacher"]:
        return [(_teacher(run), student)]
    same = [_teacher(k[0]) for k in grouped if k[0]["student"]["name"] == student and k[0]["teacher"]]
    return [(teacher, student) for teacher in dict.fromkeys(same)] or [("", student)]


def _ordered(grouped: Sequence[Runs]) -> list[Runs]:
    """Sorts kinds by their training samples, labels alone first."""
    return sorted(grouped, key=lambda kind: (kind[0]["data"]["train"] or 0, is_distilled(kind[0])))


def _method(run: dict[str, Any], same_pair: Runs) -> str:
    apart = differing(run, same_pair)
    return (run.get("technique") or run["method"]) + (f" ({apart})" if apart else "")


def _column(teacher: str, student: str, metric: str) -> str:
    return f"{_words(teacher, student)}, test {heading(metric)}"


def _added(teacher: str, student: str) -> str:
    return f"{_words(teacher, student)}, {ADDED}"


def _words(teacher: str, student: str) -> str:
    return f"{teacher} → {student}" if teacher else student
