"""The sections on training: curves, training time, and the commands that rerun each row."""

from __future__ import annotations

import re
import shlex
import statistics
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from litdistill.config.origin import made_here, replayable
from litdistill.report import plots
from litdistill.report.blocks import Block, Code, Fold, Grid, Picture, Section, Table, Text
from litdistill.report.collect import Group, Row, Seed
from litdistill.report.sections import MEASURED, capitalized, looks
from litdistill.utils.errors import UserError
from litdistill.utils.tags import tag
from litdistill.utils.units import SHARES, axis, factor, named, quantity

STARTS = (  # the beginnings of commands that train
    *(["litdistill", verb] for verb in ("train", "sweep", "compare")),
    *(["python", "-m", "litdistill", verb] for verb in ("train", "sweep", "compare")),
)


def curves(group: Group, key: str) -> Section:
    """Returns the section of training curves: the validation metric from TensorBoard's event files."""
    metric = group.metric
    found = [
        (s, r, [c for seed in r.seeds if not r.teacher if (c := curve(seed.folder, metric))]) for s, r in _both(group)
    ]
    shown = [(s, r, c) for s, r, c in found if c]
    limits, unit = None, ""
    if metric in SHARES:
        floor = max(0.0, min((min(sorted(v)[len(v) // 4 :]) for _, _, c in shown for _, v in c), default=0.0) - 5)
        limits, unit = (floor, 100.5), " per cent"
    pictures = []
    for style, row, series in shown:
        ends = ", ".join(f"{v[-1]:.1f}" if unit else f"{v[-1]:.4g}" for _, v in series)
        alt = f"Validation {named(metric)} of {row.label} while it is trained; it ends at {ends}{unit}."
        svg = plots.curves(series, teacher_line(row, metric), style.name, f"validation {axis(metric)}", limits)
        pictures.append(Picture(f"{key}curve-{style.number}", svg, alt))
    about = (
        f"{capitalized(named(metric))} on the validation set, a line a seed; dotted, the teacher's. A row without epochs of "
        "its own has none."
    )
    blocks: list[Block] = (
        [Grid(pictures), Fold(MEASURED, [about])] if pictures else [Text("These runs wrote no event files.")]
    )
    return Section(f"{key}curves", "Training curves", blocks)


def _both(group: Group) -> list[tuple[plots.Style, Row]]:
    """Returns the rows that were trained, with their styles: what was converted afterwards has the history of another."""
    return [(s, r) for s, r in zip(looks(group), group.rows, strict=True) if not r.converted]


def curve(folder: Path, metric: str) -> tuple[list[int], list[float]] | None:
    """Returns steps and values (fractions in percent) of a validation metric; None for fewer than two values."""
    events = scalars(folder, f"val/{metric}")
    return ([s for s, _ in events], [factor(metric) * v for _, v in events]) if len(events) > 1 else None


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    """Returns the steps and values of a logged metric in TensorBoard's event files; empty without them."""
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    places = sorted({p.parent for p in folder.glob("**/events.out.tfevents.*")})
    if not places:
        return []
    events = EventAccumulator(str(places[0]), size_guidance={SCALARS: 0}).Reload()
    found = next((t for t in (tag(name), name) if t in events.Tags()["scalars"]), None)
    return [(e.step, e.value) for e in events.Scalars(found)] if found is not None else []


def teacher_line(row: Row, metric: str) -> float | None:
    """Returns the teacher's validation metric (fractions in percent); None if the run did not log it."""
    events = scalars(row.seeds[0].folder, f"val/teacher_{metric}")
    return factor(metric) * events[-1][1] if events else None


def compute(group: Group, key: str) -> Section:
    """Returns the section on training time."""
    pairs = [(s, r) for s, r in _both(group) if not r.teacher]
    training = {r.seeds[0].sha256: r.seeds[0].summary for r in group.rows if r.teacher}
    head = ["model", "a run, s", "of which teacher, s", "teacher's share %", "before it, s", "epochs", "steps"]
    head += [f"{group.things} seen", "device"]
    rows, own, teacher_s, begun, total, total_teacher = [], [], [], [], 0.0, 0.0
    starts: dict[str, float] = {}
    for style, row in pairs:
        spent = [s.summary["time"]["total_s"] for s in row.seeds]
        teacher = [s.summary["time"]["teacher_s"] for s in row.seeds]
        total, total_teacher = total + sum(spent), total_teacher + sum(teacher)
        a, b = statistics.mean(spent), statistics.mean(teacher)
        own.append(a - b)
        teacher_s.append(b)
        begun.append(statistics.mean(sum(s.starts.values()) for s in row.seeds))
        for seed in row.seeds:
            starts |= seed.starts
        first = row.seeds[0].summary
        cells = [style.name, f"{a:.1f}", f"{b:.2f}", f"{100 * b / a:.1f}", f"{begun[-1]:.1f}" if begun[-1] else ""]
        cells += [f"{first['epochs']}", f"{first['steps']:,}"]
        rows.append([*cells, images_seen(row.seeds[0]), device(first)])
    blocks: list[Block] = []
    once = [s["time"]["total_s"] for s in training.values() if s]
    for sha, summary in training.items():
        style = next(s for s, r in _both(group) if r.teacher and r.seeds[0].sha256 == sha)
        known = (
            (f"{summary['time']['total_s']:.1f}", f"{summary['epochs']}", f"{summary['steps']:,}") if summary else None
        )
        cells = (
            [*known[:1], "", "", "", *known[1:], images_seen(row_seed(group, sha)), device(summary)] if known else []
        )
        rows.insert(0, [f"{style.name} (trained once)", *(cells or ["not known", *[""] * 7])])
    before = sum(starts.values())
    whole = total + sum(once) + before
    part = 100 * (total_teacher + sum(once)) / whole if whole else 0.0
    seconds = f"{whole:,.0f} s in all runs on this page, of which the teacher took {part:.0f} %"
    about = (
        f"{seconds}: {sum(once):,.0f} s to be trained once, and {total_teacher:,.1f} s to be run while its students "
        f"were trained; {before:,.0f} s went to runs that others started from, counted once here, and for each row "
        "that needs them under “before it”. Times are by the wall, evaluation included."
    )
    blocks += [Table(f"{key}time", head, rows), Fold(MEASURED, [about])]
    if pairs:
        svg = plots.bars(
            [s.name for s, _ in pairs],
            [("student", own), ("teacher", teacher_s), *([("runs before it", begun)] if any(begun) else [])],
            "seconds (mean over seeds)",
        )
        blocks.append(Picture(f"{key}compute", svg, f"Seconds a run, by who took them. {seconds}."))
    return Section(f"{key}compute", "What training took", blocks)


def row_seed(group: Group, sha: str) -> Seed:
    return next(r.seeds[0] for r in group.rows if r.teacher and r.seeds[0].sha256 == sha)


def images_seen(seed: Seed) -> str:
    time = seed.summary["time"]
    return f"{time['samples_per_s'] * time['fit_s']:,.0f}"


def device(summary: dict[str, Any]) -> str:
    d = summary["device"]
    return f"{d['world_size']} × {d['type']}, {quantity(d['threads'], 'thread')}"


def rerun(group: Group, key: str) -> Section:
    """Returns the section with the command of each row."""
    blocks: list[Block] = []
    for style, row in zip(looks(group), group.rows, strict=True):
        if row.converted:
            blocks += [Text(f"{style.name}: litdistill export run=<folder of each of these runs> precision=int8")]
            continue
        if row.teacher:
            blocks += [Text(f"{style.name}: {origin(row.checkpoint)}.")]
            continue
        needed = row.seeds[0].summary.get("experiment") in ("teachers", "students")
        blocks += [Text(f"{style.name}: is trained by the first run that needs it, here by" if needed else style.name)]
        blocks += [Code("\n".join(dict.fromkeys(command(s) for s in row.seeds)))]
    return Section(f"{key}rerun", "How to run each row again", blocks)


def origin(checkpoint: str | None) -> str:
    """Returns a text on the source of a teacher's weights."""
    if checkpoint == "auto":
        return "is trained by the first run that needs it"
    return "has the weights that it is built with" if checkpoint is None else f"was given, as {checkpoint}"


def command(seed: Seed) -> str:
    """Returns the command that starts this run: its saved overrides if it was a job of a sweep, else the typed command.

    For a teacher or a starting point, it is the command of the run that trained it on demand.
    """
    overrides = seed.folder / ".hydra" / "overrides.yaml"
    if overrides.is_file():
        try:
            # Interpolations are not resolved.
            kept: Any = OmegaConf.to_container(OmegaConf.load(overrides), resolve=False)
            typed = shlex.join(["python", "scripts/train.py", *map(str, kept)])
        except (OSError, ValueError, TypeError, YAMLError, OmegaConfBaseException) as error:
            return f"# not known: {overrides.name} is damaged ({type(error).__name__})"
    else:
        typed = str(seed.summary["command"])
    return typed if made_here(seed.folder) else _harmless(typed, seed.folder)


def _harmless(typed: str, folder: Path) -> str:
    """Returns the command of a run made elsewhere if it is safe to type, else a comment.

    A safe command starts one of this project's verbs with overrides of a run's own keys, none of which names a class.
    """
    try:
        words = shlex.split(typed)
        count = next((len(start) for start in STARTS if words[: len(start)] == start), 0)
        if not count and re.fullmatch(r"python (scripts/)?\w+\.py", " ".join(words[:2])):
            count = 2
        multirun = [word for word in words[count:] if word in ("-m", "--multirun")]
        kept = replayable([word for word in words[count:] if word not in multirun], folder)
        if count and not any("_target_" in word for word in kept):
            return shlex.join([*words[:count], *multirun, *kept])
    except (UserError, ValueError):
        pass
    return "# not shown: it was not started here, and its command does more than to set options of a run"
