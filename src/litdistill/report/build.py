"""`build(places, out)`: writes the page of all finished runs at or below the given folders."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from litdistill.report import costs, headline, history, members, of_task, sections
from litdistill.report.blocks import Block, Link, Section, Warn, write
from litdistill.report.collect import Group, Settings, groups
from litdistill.report.robust import robust
from litdistill.report.security import security, trained_attacks
from litdistill.report.tables import data_title
from litdistill.report.timing import machine, time_rows
from litdistill.utils.errors import UserError
from litdistill.utils.units import quantity
from litdistill.utils.versions import in_words, versions


def build(places: Sequence[str | Path], out: str | Path, title: str, settings: Settings) -> list[Group]:
    """Measures the runs, writes `out`/index.html and `out`/report.md, or an `out` that ends in .html; returns the groups.

    Raises `UserError` where there is no finished run, where none can be rebuilt, or where a package is missing.
    """
    _check_packages()
    out = Path(out)
    # What takes long is kept for the next page; beside a single file, in a folder that says what it belongs to.
    found = groups(places, out.with_name(f"{out.stem}_files") if out.suffix == ".html" else out, settings)
    for group in found:
        time_rows(group, settings)
        group.problems += not_attacked(group, settings)
    problems = [problem for group in found for problem in group.problems]
    found = [group for group in found if any(not row.teacher for row in group.rows)]
    if not found:
        raise UserError("None of these runs could be measured. " + " ".join(problems[:3]))
    shown: list[Section] = []
    for i, group in enumerate(found):
        shown += chapter(group, f"d{i}-" if len(found) > 1 else "", settings)
    if more := [*trained_attacks(places), *_sweeps(places, out)]:
        shown += [Section("more", "Beside these runs", [], chapter=True), *more]
    if problems:
        shown.insert(0, Section("problems", "What could not be measured", list(map(Warn, problems)), chapter=True))
    write(title, _facts(found, settings), shown, out)
    return found


def not_attacked(group: Group, settings: Settings) -> list[str]:
    """Returns a line where nothing of a group was attacked, although `attacks` asks for more than the default; else none."""
    if settings.attacks == "quick" or any(seed.robustness for row in group.rows for seed in row.seeds):
        return []
    why = "attacks are on classifiers of images" if settings.robustness else "robustness=0 asks for no images"
    return [f"attacks={settings.attacks}: nothing on {group.name} was attacked: {why}."]


def _check_packages() -> None:
    for name in ("matplotlib", "jinja2", "onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(name)
        except ImportError as error:
            raise UserError(
                f"The page needs {name}: pip install 'litdistill[report,export]'. A plain table needs neither: "
                "out=table.md."
            ) from error


def chapter(group: Group, key: str, settings: Settings) -> list[Section]:
    """Returns all that is shown of one data set: the card and what was found wrong, then the sections."""
    seeds = [seed.summary for row in group.rows if not row.teacher for seed in row.seeds]
    top: list[Block] = [*([card] if (card := headline.card(group)) else []), *headline.warnings(group)]
    opening = Section(f"{key}top", data_title(seeds), top, chapter=True)
    return [opening, *page_sections(group, key, settings)]


def page_sections(group: Group, key: str, settings: Settings) -> list[Section]:
    """Returns the sections that apply: per class, label or value by the task, failures and robustness for images."""
    found = [
        sections.quality(group, key),
        sections.tradeoffs(group, key),
        costs.cost(group, key, settings),
        sections.over_seeds(group, key),
    ]
    if group.one_label:
        found += [sections.per_class(group, key), sections.calibration(group, key)]
        if group.pictured:
            found += [sections.failures(group, key), robust(group, key, settings)]
        found.append(security(group, key, settings))
    found += [*of_task.of_task(group, key), *members.of_members(group, key)]
    return [*found, history.curves(group, key), history.compute(group, key), history.rerun(group, key)]


def _facts(found: Sequence[Group], settings: Settings) -> list[str]:
    facts = []
    runs = sum(len(r.seeds) for g in found for r in g.rows if not r.teacher)
    kinds = sum(not r.teacher for g in found for r in g.rows)
    facts.append(f"{quantity(kinds, 'student')} in {quantity(runs, 'run')}")
    here = machine()
    cores, threads = quantity(here["cores"], "core"), quantity(settings.threads, "thread")
    timed = f"Timed on {here['cpu']}, {cores}, {threads}, {here['system']}"
    facts.append(timed + (f", and on {here['gpu']}" if "gpu" in here else "; no GPU"))
    facts.append(in_words(versions()))
    facts.append(time.strftime("Written on %Y-%m-%d at %H:%M"))
    return facts


def _sweeps(places: Sequence[str | Path], out: Path) -> list[Section]:
    """Returns a section with links to the reports of sweeps in `places`; empty if there are none."""
    reports = sorted({p.resolve() for place in places for p in Path(place).glob("**/sweep.md")})
    if not reports:
        return []
    base = out.resolve().parent if out.suffix == ".html" else out.resolve()
    relative = [os.path.relpath(p, base) for p in reports]
    blocks: list[Block] = [
        Link(f"Trials, importances and Pareto front of {Path(r).parent.name}", quote(r)) for r in relative
    ]
    return [Section("sweeps", "Sweeps", blocks)]
