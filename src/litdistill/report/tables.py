"""The rows of tables over run folders, from `summary.json` alone; `writers.py` writes them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from litdistill.evaluation.controls import is_measured
from litdistill.utils.errors import UserError
from litdistill.utils.text import printable_values
from litdistill.utils.units import SHARES, Number, heading, measured, quantity

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
FACTS = ("name", "classes", "input_shape", "test")  # of a summary's `data`: runs that share them share a table

Cell = str | Number


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


def by_data(found: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Groups summaries by what was tested: data set, classes, shape, test samples and monitored metric; one table each."""
    apart: dict[str, list[dict[str, Any]]] = {}
    for run in found:
        apart.setdefault(json.dumps(facts(run)), []).append(run)
    return list(apart.values())


def facts(run: dict[str, Any]) -> dict[str, Any]:
    """Returns what runs of one table have in common: `FACTS` of their data, and "metric"."""
    return {k: run["data"].get(k) for k in FACTS} | {"metric": run["metric"]}


def data_title(found: Sequence[dict[str, Any]]) -> str:
    """Returns the title of a table of summaries: its data set and how large that is."""
    data, of = found[0]["data"], things(found[0]["data"])
    counts = sorted({run["data"]["train"] for run in found if run["data"].get("train") is not None})
    size = []
    if counts:
        span = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
        size.append(f"trained on {span} {of}")
    if data.get("test") is not None:
        size.append(f"tested on {data['test']:,}" + ("" if counts else f" {of}"))
    if data.get("classes") is not None:
        noun = {"MultiLabel": "label", "Regression": "value", "LanguageModel": "token"}.get(
            str(found[0].get("task")), "class"
        )
        size.append(quantity(data["classes"], noun) + (" to predict" if noun == "value" else ""))
    if shape := data.get("input_shape"):
        image = len(shape) == 3
        channels = {1: " in gray", 3: " in color"}.get(shape[0], f", {quantity(shape[0], 'channel')}")
        size.append(f"{shape[1]}x{shape[2]} pixels{channels}" if image else f"inputs of {'x'.join(map(str, shape))}")
    return str(data.get("name") or "data") + (f": {', '.join(size)}" if size else "")


def records(found: Sequence[dict[str, Any]]) -> list[dict[str, Cell]]:
    """Returns one row for each teacher and each kind of student; runs that differ in the seed alone share a row.

    All runs are of one table (`by_data`). A row maps column names to cells. Rows of one student follow one another.
    """
    teachers = {run["teacher"]["sha256"]: run for run in found if is_measured(run["teacher"])}
    own = {run["student"]["sha256"] for run in found}
    grouped, measures = kinds(found), _measured(found)
    table = [_teacher_row(run, *measures) for sha, run in teachers.items() if sha not in own]
    models = list(dict.fromkeys(runs[0]["student"]["name"] for runs in grouped))
    for runs in sorted(grouped, key=lambda runs: models.index(runs[0]["student"]["name"])):
        table.append(_row(runs, differing(runs[0], [k[0] for k in grouped]), *measures))
    return table


def rows(found: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Returns `records` as text."""
    return [{name: str(cell) for name, cell in row.items()} for row in records(found)]


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
    apart = differing(run, [k[0] for k in alike])
    count = run["data"]["train"]
    seen = f", {count:,} {things(run['data'])}" if count is not None else ""
    name = str(run.get("technique") or "").replace("_", " ") or run["method"] + seen
    return name + (f" ({apart})" if apart else "")


def tell_apart(labels: Sequence[str], names: Sequence[str]) -> list[str]:
    """Returns unique labels: repeated ones get their network's name, then a number."""
    found = list(labels)
    for more in (names, [str(i + 1) for i in range(len(found))]):
        found = [f"{one}, {added}" if found.count(one) > 1 else one for one, added in zip(found, more, strict=True)]
    return found


def differing(run: dict[str, Any], others: Sequence[dict[str, Any]]) -> str:
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
    """Returns key and value as text: weight_decay for `optimizer.weight_decay`, the full key for a network's or an attack's."""
    if key.endswith("._target_"):
        return f"{key.removesuffix('._target_')} {str(value).rsplit('.', 1)[-1]}"
    return f"{key if key.startswith(('student.', 'teacher.', 'adversarial.')) else key.split('.', 1)[-1]} {value}"


def _cells(
    name: str,
    words: Sequence[str],
    train: Cell,
    params: int | None,
    measures: Mapping[str, Cell],
    seeds: Cell = "",
    time: Cell = "",
) -> dict[str, Cell]:
    """Returns a row; the first two entries of `measures` are the best and the last epoch."""
    (best, last), others = list(measures.values())[:2], list(measures.items())[2:]
    return {
        **dict(zip(LABELS, words, strict=True)),
        **{"trained on": train, "parameters": "" if params is None else Number(params)},
        f"test {heading(name)}": best,
        "last epoch" + (" %" if name in SHARES else ""): last,
        **{heading(k): v for k, v in others},
        **{"seeds": seeds, "time": time},
    }


def _teacher_row(run: dict[str, Any], others: Sequence[str], follows: Sequence[str]) -> dict[str, Cell]:
    teacher, name = run["teacher"], run["metric"]["name"]
    test = teacher["test"]
    measures: dict[str, Cell] = {"best": measured(name, [test[name]]), "last": ""}
    measures |= {k: measured(k, [test[k]]) if k in test else "" for k in others} | dict.fromkeys(follows, "")
    return _cells(name, (run["experiment"], teacher["name"], "teacher"), "", teacher["params"], measures)


def _row(runs: Sequence[dict[str, Any]], apart: str, others: Sequence[str], follows: Sequence[str]) -> dict[str, Cell]:
    first, name = runs[0], runs[0]["metric"]["name"]
    students, tests = [r["student"] for r in runs], [r["student"]["test"] for r in runs]
    measures: dict[str, Cell] = {when: measured(name, [t[name][when] for t in tests]) for when in ("best", "last")}
    for key, found in [*((k, tests) for k in others), *((k, students) for k in follows)]:
        values = [one[key] for one in found if one.get(key) is not None]
        measures[key] = measured(key, values) if values else ""
    method = (first.get("technique") or first["method"]) + (f" ({apart})" if apart else "")
    count = first["data"]["train"]
    return _cells(
        name,
        (first["experiment"], first["student"]["name"], method),
        "" if count is None else Number(count),
        students[0]["params"],
        measures,
        Number(len({r["seed"] for r in runs})),
        Number(statistics.mean(r["time"]["total_s"] for r in runs), unit="s"),
    )
