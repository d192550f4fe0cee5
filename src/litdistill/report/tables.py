"""Tables of run folders, from `summary.json` alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from litdistill.utils.errors import UserError
from litdistill.utils.text import printable_values
from litdistill.utils.units import SHARES, axis, decimals, factor, heading, named, shown_mean

LABELS = ("experiment", "model", "method")  # left-aligned columns
NETWORK = (
    "name",
    "sha256",
    "params",
    "macs",
    "bytes",
    "precision",
    "test",
)  # keys of a student; all others measure its agreement with the teacher
HIDDEN = ("brier", "kl")  # measured, but not shown for lack of space


def runs(places: Iterable[str | Path]) -> list[tuple[Path, dict[str, Any]]]:
    """Returns folder and summary of all finished runs at or below the given folders, sorted by path.

    Raises `UserError` if there is none.
    """
    folders = [Path(p) for p in places]
    paths = sorted({p.resolve() for folder in folders for p in folder.glob("**/summary.json")})
    if not paths:
        missing = [str(p) for p in folders if not p.exists()]
        raise UserError(
            (f"There is no folder {', '.join(missing)}. " if missing else "")
            + f"No finished run in {', '.join(map(str, folders))}: a finished run has a summary.json. "
            "Start one with litdistill train."
        )
    return [(p.parent, _summary(p)) for p in paths]


def _summary(path: Path) -> dict[str, Any]:
    """Returns a summary without terminal control characters. Raises `UserError` for a damaged file."""
    try:
        found = printable_values(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: fetch it anew, or leave that run out.") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is no summary of a run: leave it out.")
    return found


def summaries(places: Iterable[str | Path]) -> list[dict[str, Any]]:
    """Returns the summaries of `runs`."""
    return [summary for _, summary in runs(places)]


def kinds(found: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Groups summaries that differ in the seed alone; runs with identical weights count once.

    Summaries of earlier versions have no "settings": only their "options" distinguish kinds.
    """
    by_kind: dict[str, dict[str, dict[str, Any]]] = {}
    for run in found:
        kind = [run["experiment"], run.get("technique"), run["data"], run["options"], run.get("settings")]
        by_kind.setdefault(json.dumps(kind, sort_keys=True), {})[run["student"]["sha256"]] = run
    return [list(by_weights.values()) for by_weights in by_kind.values()]


def by_metric(found: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Groups summaries by their monitored metric: one table each."""
    apart: dict[str, list[dict[str, Any]]] = {}
    for run in found:
        apart.setdefault(run["metric"]["name"], []).append(run)
    return list(apart.values())


def rows(found: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Returns one row for each teacher and each kind of student; runs that differ in the seed alone share a row.

    All runs have one monitored metric (`by_metric`). A row maps column names to cells.
    """
    teachers = {run["teacher"]["sha256"]: run for run in found if run["teacher"]}
    own = {run["student"]["sha256"] for run in found}
    grouped, measured = kinds(found), _measured(found)
    table = [_teacher_row(run, *measured) for sha, run in teachers.items() if sha not in own]
    return table + [_row(runs, _differing(runs[0], [k[0] for k in grouped]), *measured) for runs in grouped]


def _measured(found: Sequence[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Returns the names of the other metrics of the runs, and of their measures of agreement with the teacher."""
    monitored = {run["metric"]["name"] for run in found}
    students = [run["student"] for run in found]
    others = dict.fromkeys(k for s in students for k in s["test"] if k not in monitored and k not in HIDDEN)
    follows = dict.fromkeys(k for s in students for k, v in s.items() if k not in (*NETWORK, *HIDDEN) and v is not None)
    return list(others), list(follows)


def things(data: dict[str, Any]) -> str:
    """Returns the word for the samples of a summary's `data`."""
    return "images" if len(data.get("input_shape") or ()) == 3 else "samples"


def label(run: dict[str, Any], alike: Sequence[Sequence[dict[str, Any]]]) -> str:
    """Returns a short label for a kind of run: its technique, or its method and the number of training samples."""
    differing = _differing(run, [k[0] for k in alike])
    count = run["data"]["train"]
    seen = f", {count:,} {things(run['data'])}" if count is not None else ""
    name = str(run.get("technique") or "").replace("_", " ") or run["method"] + seen
    return name + (f" ({differing})" if differing else "")


def tell_apart(labels: Sequence[str], names: Sequence[str]) -> list[str]:
    """Returns unique labels: repeated ones get their network's name, then a number."""
    found = list(labels)
    for more in (names, [str(i + 1) for i in range(len(found))]):
        found = [f"{one}, {added}" if found.count(one) > 1 else one for one, added in zip(found, more, strict=True)]
    return found


def _differing(run: dict[str, Any], others: Sequence[dict[str, Any]]) -> str:
    """Returns as text how a run differs from others of the same experiment, technique, model, method and data.

    It lists the differing options, and the settings that differ from runs with the same options.
    """
    name = lambda r: (r["experiment"], r.get("technique"), r["student"]["name"], r["method"], r["data"]["train"])  # noqa: E731
    others = [r for r in others if name(r) == name(run)]
    differing = [f"{k.rsplit('/', 1)[-1]} {run['options'][k]}" for k in _own(run, others, "options")]
    same_options = [r for r in others if r["options"] == run["options"]]
    if "settings" in run:
        differing += [_setting(k, run["settings"][k]) for k in _own(run, same_options, "settings")]
    elif any("settings" in r for r in same_options):
        differing.append("settings not noted")
    return ", ".join(differing)


def _own(run: dict[str, Any], others: Sequence[dict[str, Any]], what: str) -> list[str]:
    """Returns the keys of `what` whose value differs in another run that has `what`."""
    theirs = [r[what] for r in others if what in r]
    return [k for k, v in run[what].items() if any(o.get(k) != v for o in theirs)]


def _setting(key: str, value: Any) -> str:
    """Returns key and value as text: weight_decay for `optimizer.weight_decay`, the full key for a network's options."""
    if key.endswith("._target_"):
        return f"{key.removesuffix('._target_')} {str(value).rsplit('.', 1)[-1]}"
    return f"{key if key.startswith(('student.', 'teacher.')) else key.split('.', 1)[-1]} {value}"


def _cells(
    name: str,
    words: Sequence[str],
    train: str,
    params: int,
    measured: Mapping[str, str],
    seeds: str = "",
    time: str = "",
) -> dict[str, str]:
    """Returns a row; the first two entries of `measured` are the best and the last epoch."""
    (best, last), others = list(measured.values())[:2], list(measured.items())[2:]
    return {
        **dict(zip(LABELS, words, strict=True)),
        **{"trained on": train, "parameters": f"{params:,}"},
        f"test {heading(name)}": best,
        "last epoch" + (" %" if name in SHARES else ""): last,
        **{heading(k): v for k, v in others},
        **{"seeds": seeds, "time": time},
    }


def _teacher_row(run: dict[str, Any], others: Sequence[str], follows: Sequence[str]) -> dict[str, str]:
    teacher, name = run["teacher"], run["metric"]["name"]
    test = teacher["test"]
    measured = {"best": shown_mean(name, [test[name]]), "last": ""}
    measured |= {k: shown_mean(k, [test[k]]) if k in test else "" for k in others} | dict.fromkeys(follows, "")
    return _cells(name, (run["experiment"], teacher["name"], "teacher"), "", teacher["params"], measured)


def _row(
    runs: Sequence[dict[str, Any]], differing: str, others: Sequence[str], follows: Sequence[str]
) -> dict[str, str]:
    first, name = runs[0], runs[0]["metric"]["name"]
    students, tests = [r["student"] for r in runs], [r["student"]["test"] for r in runs]
    measured = {when: shown_mean(name, [t[name][when] for t in tests]) for when in ("best", "last")}
    for key, found in [*((k, tests) for k in others), *((k, students) for k in follows)]:
        values = [one[key] for one in found if one.get(key) is not None]
        measured[key] = shown_mean(key, values) if values else ""
    method = (first.get("technique") or first["method"]) + (f" ({differing})" if differing else "")
    count = first["data"]["train"]
    return _cells(
        name,
        (first["experiment"], first["student"]["name"], method),
        "" if count is None else f"{count:,}",
        students[0]["params"],
        measured,
        str(len({r["seed"] for r in runs})),
        f"{statistics.mean(r['time']['total_s'] for r in runs):.0f} s",
    )


def picture(found: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Draws the test metric of every run as a dot, one row per kind of student, and each teacher as a line.

    Raises `UserError` where the runs have several monitored metrics.
    """
    from litdistill.tasks.figures import STUDENT_COLOR, TEACHER_COLOR, new_figure

    metrics = {run["metric"]["name"]: run["metric"]["direction"] for run in found}
    if len(metrics) > 1:
        raise UserError(f"These runs are judged by {', '.join(map(named, metrics))}: draw a picture of those of one.")
    ((metric, direction),) = metrics.items()
    grouped, by, form = kinds(found), factor(metric), ".1f" if metric in SHARES else ".4g"
    names = tell_apart([label(k[0], grouped) for k in grouped], [k[0]["student"]["name"] for k in grouped])
    teachers = {r["teacher"]["name"]: by * r["teacher"]["test"][metric] for r in found if r["teacher"]}
    figure = new_figure(7.2, 1.1 + 0.5 * len(grouped))
    axes = figure.subplots()
    for row, runs in enumerate(grouped):
        values = [by * run["student"]["test"][metric]["best"] for run in runs]
        axes.plot(values, [row] * len(values), "o", color=STUDENT_COLOR, alpha=0.6)
        mean = statistics.mean(values)
        axes.plot([mean, mean], [row - 0.28, row + 0.28], color=STUDENT_COLOR, linewidth=3)
        axes.annotate(f"{mean:{form}}", (mean, row - 0.32), ha="center", va="bottom", fontsize=9, color=STUDENT_COLOR)
    for name, value in teachers.items():
        axes.axvline(value, color=TEACHER_COLOR, linestyle="--", label=f"teacher {name}: {value:{form}}")
    axes.set_yticks(range(len(names)), names, parse_math=False)  # names are not parsed as math
    axes.set_ylim(len(names) - 0.4, -0.7)
    better = ", less is better" if direction == "min" else ""
    axes.set_xlabel(f"test {axis(metric)}{better}, a dot a seed, a bar the mean")
    axes.spines[["top", "right"]].set_visible(False)
    if teachers:
        axes.legend(frameon=False, loc="lower left", fontsize=8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def table(rows: Sequence[dict[str, str]]) -> Table:
    """Returns the rows as a table for the terminal."""
    shown = Table()
    for column in rows[0]:
        shown.add_column(Text(column), justify="left" if column in LABELS else "right")
    for row in rows:
        shown.add_row(*map(Text, row.values()))  # Text does not parse markup
    return shown


def fitting(rows: Sequence[dict[str, str]], console: Console) -> list[dict[str, str]]:
    """Returns the rows with as many columns as the console has room for, unbroken.

    Columns are left out from the right; what names a row and the test metric stay.
    """
    kept, unlimited = [dict(row) for row in rows], console.options.update(width=10_000)
    for column in reversed(list(rows[0])):
        if console.measure(table(kept), options=unlimited).maximum <= console.width:
            break
        if column not in LABELS and not column.startswith("test "):
            kept = [{name: cell for name, cell in row.items() if name != column} for row in kept]
    return kept


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """Returns the rows as a Markdown table."""
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(LABELS) + "---:|" * (len(head) - len(LABELS))]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row.values()) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def evaluation_table(found: dict[str, Any]) -> Table:
    """Returns the result of `evaluate` as a table for the terminal."""
    measured, follows = list(found["student"]), list(found.get("agreement", {}))
    shown = Table("on the test set", *map(heading, (*measured, *follows)))
    names = {"teacher": "teacher", "student": "student (best epoch on validation)", "last": "student (last epoch)"}
    for key, name in names.items():
        if key in found:
            cells = [_precise(k, found[key].get(k)) for k in measured]
            like = found.get("agreement", {}) if key == "student" else {}
            shown.add_row(name, *cells, *(_precise(k, like.get(k)) for k in follows))
    return shown


def _precise(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{factor(name) * value:.{2 if name in SHARES else max(4, decimals(name, value))}f}"
