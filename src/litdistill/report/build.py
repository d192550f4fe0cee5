"""`build(places, out)`: writes the page of all finished runs at or below the given folders."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from litdistill.report import history, sections
from litdistill.report.blocks import Block, Link, Section, Text, write
from litdistill.report.collect import Group, Settings, groups
from litdistill.report.robust import robust
from litdistill.report.timing import machine, time_rows
from litdistill.utils.errors import UserError
from litdistill.utils.units import quantity
from litdistill.utils.versions import versions


def build(places: Sequence[str | Path], out: str | Path, title: str, settings: Settings) -> list[Group]:
    """Measures the runs, writes `out`/index.html and `out`/report.md, and returns the measured groups.

    Raises `UserError` where there is no finished run, where none can be rebuilt, or where a package is missing.
    """
    _check_packages()
    out = Path(out)
    found = groups(places, out, settings)
    for group in found:
        time_rows(group, settings)
    problems = [problem for group in found for problem in group.problems]
    found = [group for group in found if group.rows]
    if not found:
        raise UserError("None of these runs could be measured. " + " ".join(problems[:3]))
    shown: list[Section] = []
    for i, group in enumerate(found):
        key = f"{i}-" if len(found) > 1 else ""
        prefix = f"{group.name}: " if len(found) > 1 else ""
        shown += [s._replace(title=prefix + s.title) for s in page_sections(group, f"d{key}" if key else "", settings)]
    shown += _sweeps(places, out)
    if problems:
        shown.append(Section("problems", "What could not be measured", [Text(problem) for problem in problems]))
    write(title, _facts(found, settings), shown, out)
    return found


def _check_packages() -> None:
    for name in ("matplotlib", "jinja2", "onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(name)
        except ImportError as error:
            raise UserError(
                f"The page needs {name}: pip install 'litdistill[report,export]'. A plain table needs neither: "
                "out=table.md."
            ) from error


def page_sections(group: Group, key: str, settings: Settings) -> list[Section]:
    """Returns the sections that apply: per-class ones for classification, failures and robustness for images."""
    found = [
        sections.tradeoffs(group, key),
        sections.quality(group, key),
        sections.cost(group, key, settings),
        sections.over_seeds(group, key),
    ]
    if group.one_label:
        found += [sections.per_class(group, key), sections.calibration(group, key)]
        if group.pictured:
            found += [sections.failures(group, key), robust(group, key, settings)]
    return [*found, history.curves(group, key), history.compute(group, key), history.rerun(group, key)]


def test_count(group: Group) -> int:
    """Returns the number of test samples."""
    return len(group.rows[0].seeds[0].test_targets)


def _facts(found: Sequence[Group], settings: Settings) -> list[str]:
    facts = []
    for group in found:
        shape = "x".join(map(str, group.facts["input_shape"] or ()))
        of_shape = f" of {shape}" if shape else ""
        runs = sum(len(r.seeds) for r in group.rows if not r.teacher)
        kinds = sum(not r.teacher for r in group.rows)
        noun = "class" if group.one_label else "output"
        classes = group.facts["classes"]
        outputs = quantity(classes, noun) if classes else "unknown classes" if group.one_label else "unknown outputs"
        facts.append(
            f"{group.name}: {quantity(kinds, 'student')} in {quantity(runs, 'run')}; {outputs}{of_shape}, "
            f"{test_count(group):,} test {group.things}"
        )
    here = machine()
    cores, threads = quantity(here["cores"], "core"), quantity(settings.threads, "thread")
    timed = f"Timed on {here['cpu']}, {cores}, {threads}, {here['system']}"
    facts.append(timed + (f", and on {here['gpu']}" if "gpu" in here else "; no GPU"))
    used = versions()
    facts.append(", ".join(f"{k} {v}" for k, v in used.items()) + time.strftime("; %Y-%m-%d %H:%M"))
    return facts


def _sweeps(places: Sequence[str | Path], out: Path) -> list[Section]:
    """Returns a section with links to the reports of sweeps in `places`; empty if there are none."""
    reports = sorted({p.resolve() for place in places for p in Path(place).glob("**/sweep.md")})
    if not reports:
        return []
    relative = [os.path.relpath(p, out.resolve()) for p in reports]
    blocks: list[Block] = [
        Link(f"Trials, importances and Pareto front of {Path(r).parent.name}", quote(r)) for r in relative
    ]
    return [Section("sweeps", "Sweeps", blocks)]
