"""Tables over run folders. Only `summary.json` is read."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from litdistill.utils.errors import UserError

COLUMNS = (
    "experiment",
    "model",
    "method",
    "trained on",
    "parameters",
    "test accuracy %",
    "last epoch %",
    "NLL",
    "ECE",
    "agreement %",
    "seeds",
    "time",
)


def runs(places: Iterable[str | Path]) -> list[tuple[Path, dict[str, Any]]]:
    """Folder and summary of all finished runs at or below the given folders, in the order of their paths.

    Raises `UserError` if there is none.
    """
    folders = [Path(p) for p in places]
    paths = sorted({p.resolve() for folder in folders for p in folder.glob("**/summary.json")})
    if not paths:
        missing = [str(p) for p in folders if not p.exists()]
        raise UserError(
            (f"There is no folder {', '.join(missing)}. " if missing else "")
            + f"No finished run in {', '.join(map(str, folders))}: a finished run has a summary.json. "
            "Start one with python scripts/train.py."
        )
    return [(p.parent, json.loads(p.read_text())) for p in paths]


def summaries(places: Iterable[str | Path]) -> list[dict[str, Any]]:
    """The summaries of `runs`."""
    return [summary for _, summary in runs(places)]


def kinds(found: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Summaries that differ in their seed alone, together; a run that was repeated to the bit counts once.

    Summaries of earlier versions have no "settings": of those, only what stands in "options" tells kinds apart.
    """
    by_kind: dict[str, dict[str, dict[str, Any]]] = {}
    for run in found:
        kind = [run["experiment"], run.get("technique"), run["data"], run["options"], run.get("settings")]
        by_kind.setdefault(json.dumps(kind, sort_keys=True), {})[run["student"]["sha256"]] = run
    return [list(by_weights.values()) for by_weights in by_kind.values()]


def rows(found: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """One row for each teacher and for each kind of student; runs that differ in their seed alone are one row."""
    teachers = {run["teacher"]["sha256"]: run for run in found if run["teacher"]}
    own = {run["student"]["sha256"] for run in found}
    table = [_teacher_row(run) for sha, run in teachers.items() if sha not in own]
    alike = kinds(found)
    return table + [_row(runs, _differing(runs[0], [k[0] for k in alike])) for runs in alike]


def label(run: dict[str, Any], alike: Sequence[Sequence[dict[str, Any]]]) -> str:
    """What a kind of run is called where space is short: its technique, or its method and how many images it saw."""
    differing = _differing(run, [k[0] for k in alike])
    name = str(run.get("technique") or "").replace("_", " ") or f"{run['method']}, {run['data']['train']:,} images"
    return name + (f" ({differing})" if differing else "")


def tell_apart(labels: Sequence[str], names: Sequence[str]) -> list[str]:
    """Labels that stand twice get their network's name, and a number where even that is not enough."""
    found = list(labels)
    for more in (names, [str(i + 1) for i in range(len(found))]):
        found = [f"{one}, {added}" if found.count(one) > 1 else one for one, added in zip(found, more, strict=True)]
    return found


def _differing(run: dict[str, Any], others: Sequence[dict[str, Any]]) -> str:
    """In what a run differs from those that share its experiment, technique, model, method and data, as text.

    First its options; then, from those whose options are the same, its settings.
    """
    name = lambda r: (r["experiment"], r.get("technique"), r["student"]["name"], r["method"], r["data"]["train"])  # noqa: E731
    others = [r for r in others if name(r) == name(run)]
    told = [f"{k.rsplit('/', 1)[-1]} {run['options'][k]}" for k in _own(run, others, "options")]
    alike = [r for r in others if r["options"] == run["options"]]
    if "settings" in run:
        told += [_setting(k, run["settings"][k]) for k in _own(run, alike, "settings")]
    elif any("settings" in r for r in alike):
        told.append("settings not noted")
    return ", ".join(told)


def _own(run: dict[str, Any], others: Sequence[dict[str, Any]], what: str) -> list[str]:
    """The keys of `what` that another run which has noted that gives another value."""
    noted = [r[what] for r in others if what in r]
    return [k for k, v in run[what].items() if any(o.get(k) != v for o in noted)]


def _setting(key: str, value: Any) -> str:
    """`optimizer.weight_decay` is called weight_decay, `scheduler._target_` scheduler; of a network the whole key."""
    if key.endswith("._target_"):
        return f"{key.removesuffix('._target_')} {str(value).rsplit('.', 1)[-1]}"
    return f"{key if key.startswith(('student.', 'teacher.')) else key.split('.', 1)[-1]} {value}"


def _teacher_row(run: dict[str, Any]) -> dict[str, str]:
    teacher = run["teacher"]
    values = (
        *(run["experiment"], teacher["name"], "teacher", "", f"{teacher['params']:,}"),
        *(
            f"{100 * teacher['test']['accuracy']:.2f}",
            "",
            f"{teacher['test']['nll']:.3f}",
            f"{teacher['test']['ece']:.3f}",
            "",
            "",
            "",
        ),
    )
    return dict(zip(COLUMNS, values, strict=True))


def _row(runs: Sequence[dict[str, Any]], differing: str) -> dict[str, str]:
    first = runs[0]
    students = [r["student"] for r in runs]
    tests = [s["test"] for s in students]
    values = (
        first["experiment"],
        first["student"]["name"],
        (first.get("technique") or first["method"]) + (f" ({differing})" if differing else ""),
        f"{first['data']['train']:,}",
        f"{students[0]['params']:,}",
        spread([100 * t["accuracy"]["best"] for t in tests]),
        spread([100 * t["accuracy"]["last"] for t in tests]),
        spread([t["nll"] for t in tests], 3),
        spread([t["ece"] for t in tests], 3),
        spread([100 * s["agreement"] for s in students]) if students[0]["agreement"] is not None else "",
        str(len({r["seed"] for r in runs})),
        f"{statistics.mean(r['time']['total_s'] for r in runs):.0f} s",
    )
    return dict(zip(COLUMNS, values, strict=True))


def picture(found: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Draws the test accuracy of every run as a dot, a row for each kind of student, and the teacher as a line."""
    from litdistill.tasks.figures import STUDENT_COLOR, TEACHER_COLOR, new_figure

    alike = kinds(found)
    names = tell_apart([label(k[0], alike) for k in alike], [k[0]["student"]["name"] for k in alike])
    teachers = {r["teacher"]["name"]: 100 * r["teacher"]["test"]["accuracy"] for r in found if r["teacher"]}
    figure = new_figure(7.2, 1.1 + 0.5 * len(alike))
    axes = figure.subplots()
    for row, runs in enumerate(alike):
        values = [100 * run["student"]["test"]["accuracy"]["best"] for run in runs]
        axes.plot(values, [row] * len(values), "o", color=STUDENT_COLOR, alpha=0.6)
        mean = statistics.mean(values)
        axes.plot([mean, mean], [row - 0.28, row + 0.28], color=STUDENT_COLOR, linewidth=3)
        axes.annotate(f"{mean:.1f}", (mean, row - 0.32), ha="center", va="bottom", fontsize=9, color=STUDENT_COLOR)
    for name, value in teachers.items():
        axes.axvline(value, color=TEACHER_COLOR, linestyle="--", label=f"teacher {name}: {value:.1f}")
    axes.set_yticks(range(len(names)), names, parse_math=False)  # a name is no formula
    axes.set_ylim(len(names) - 0.4, -0.7)
    axes.set_xlabel("test accuracy (%), a dot a seed, a bar the mean")
    axes.spines[["top", "right"]].set_visible(False)
    if teachers:
        axes.legend(frameon=False, loc="lower left", fontsize=8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard deviation over seeds (the sample's, n - 1), or the value alone where there is one."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    finite = all(map(math.isfinite, values))  # of others stdev makes an error
    deviation = statistics.stdev(values) if finite else math.nan
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def table(rows: Sequence[dict[str, str]]) -> Table:
    """For the terminal."""
    shown = Table()
    for column in COLUMNS:
        shown.add_column(column, justify="left" if column in COLUMNS[:3] else "right")
    for row in rows:
        shown.add_row(*map(Text, row.values()))  # in which brackets are no markup
    return shown


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """For a README."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * 3 + "---:|" * (len(COLUMNS) - 3)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row.values()) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def evaluation_table(found: dict[str, Any]) -> Table:
    """What `evaluate` found of one run."""
    shown = Table("on the test set", "accuracy %", "NLL", "ECE", "Brier", "agreement %", "KL")
    names = {"teacher": "teacher", "student": "student (best epoch on validation)", "last": "student (last epoch)"}
    for key, name in names.items():
        if key in found:
            q, like = found[key], found.get("likeness", {}) if key == "student" else {}
            follows = (f"{100 * like['agreement']:.2f}", f"{like['kl']:.4f}") if like else ("", "")
            shown.add_row(
                name, f"{100 * q['accuracy']:.2f}", f"{q['nll']:.4f}", f"{q['ece']:.4f}", f"{q['brier']:.4f}", *follows
            )
    return shown
