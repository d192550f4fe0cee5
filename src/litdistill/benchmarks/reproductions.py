"""`docs/reproductions.md`: published figures beside what runs of this project gave, from `docs/results` alone.

A result is the summary of one run, at `docs/results/<experiment>/<seed>.json`; where the run changed more than its seed, at
`docs/results/<experiment>/<what it changed>/<seed>.json`. `collect` puts them there, `page` reads them.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from litdistill.benchmarks.published_tables import TABLES, Published, Table, cells, published, register
from litdistill.evaluation.evaluate import differences, evaluate, load_run, rebuild
from litdistill.evaluation.predictions import collect as logits_of
from litdistill.utils.errors import UserError
from litdistill.utils.files import write_text
from litdistill.utils.paths import CONF
from litdistill.utils.text import markdown_table
from litdistill.utils.units import spread

RESULTS = Path("docs/results")
PROTOCOLS = {"last": "last epoch", "best": "best on validation", "best_on_test": "best on test"}

# Overrides that make no variant of an experiment: the seed, and those that do not change the weights.
NO_VARIANT = (
    *("experiment", "name", "seed", "threads", "watch_test", "runs", "logger", "resume"),
    *("hydra.run.dir", "hydra.sweep.dir"),
    *("student.checkpoint", "trainer.accelerator", "trainer.devices", "data.root"),
)

Results = Mapping[str, Sequence[dict[str, Any]]]


# -- from runs to results -----------------------------------------------------------------------------------------------


def cell_of(folder: Path) -> tuple[str, int]:
    """Returns a run's experiment, with its other overrides, and its seed. Raises `UserError` without an experiment."""
    experiment, overrides = _started_as(folder)
    cfg, _ = load_run(folder)
    register([experiment])
    with initialize_config_dir(str(CONF), version_base="1.3"):
        plain = compose("train", [f"experiment={experiment}"])
    new = (o for o in overrides if o.lstrip("+~").split("=")[0] not in NO_VARIANT)
    variant = sorted(_by_teacher(o) for o in new if not _is_said_by(plain, o, cfg))
    return "/".join([experiment, *([" ".join(variant)] if variant else [])]), int(cfg.seed)


def _started_as(folder: Path) -> tuple[str, list[str]]:
    """Returns the experiment of a run and its overrides. Raises `UserError` without an experiment."""
    record: Any = OmegaConf.to_container(OmegaConf.load(folder / ".hydra" / "hydra.yaml"), resolve=False)
    experiment = record["hydra"]["runtime"]["choices"].get("experiment")
    if experiment is None or not re.fullmatch(r"\w+(/\w+)*", experiment):
        raise UserError(f"{folder} is the run of no experiment.")
    return experiment, record["hydra"]["overrides"]["task"]


def _by_teacher(override: str) -> str:
    """Returns an override; of one that names the run of a teacher, the last word of that run's experiment instead."""
    parsed = OverridesParser.create().parse_override(override)
    if parsed.key_or_group != "teacher.checkpoint":
        return override
    return f"teacher={_started_as(Path(str(parsed.value())))[0].rpartition('/')[2]}"


def _is_said_by(plain: DictConfig, override: str, cfg: DictConfig) -> bool:
    """Returns whether a run's override sets the value that the experiment has already."""
    key = override.partition("=")[0]
    here = OmegaConf.select(cfg, key)
    return key[0] not in "+~" and not OmegaConf.is_config(here) and here == OmegaConf.select(plain, key)


def collect(folder: Path, results: Path = RESULTS) -> Path:
    """Evaluates a finished run again on the kind of device that it ran on, and copies its summary to `results`; raises
    `UserError` unless all values are equal."""
    cell, seed = cell_of(folder)
    _, summary = load_run(folder)
    device = summary["device"]["type"]
    if wrong := differences(evaluate(folder, device=device), summary):
        raise UserError(f"{folder} is not what its summary says: " + "; ".join(wrong))
    data, distiller = rebuild(folder)
    logits, targets = logits_of(distiller.deployed_student, data, "test", device)
    wrong_ones = targets[logits.argmax(1) != targets]
    summary["errors_by_class"] = torch.bincount(wrong_ones, minlength=data.num_classes).tolist()
    path = results / cell / f"{seed}.json"
    if not path.resolve().is_relative_to(results.resolve()):
        raise UserError(f"{folder} was started with {cell}: its results would lie outside of {results}.")
    write_text(path, json.dumps(summary, indent=2) + "\n")
    return path


def read(results: Path = RESULTS) -> dict[str, list[dict[str, Any]]]:
    """Returns the summaries of all cells, by the cell's name, in the order of their seeds."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(results.glob("*/**/*.json"), key=lambda p: (str(p.parent), int(p.stem))):
        found.setdefault(str(path.parent.relative_to(results)), []).append(json.loads(path.read_text()))
    return found


# -- from results to the page -------------------------------------------------------------------------------------------


def figures(runs: Sequence[dict[str, Any]], protocol: str, errors: bool) -> list[float]:
    """Returns one value per run, test accuracy in % or errors of 10,000; empty where a run lacks the value."""
    found = [run["student"]["test"]["accuracy"].get(protocol) for run in runs]
    return [] if None in found else [_figure(accuracy, errors) for accuracy in found]


def _figure(accuracy: float, errors: bool) -> float:
    return 10_000 * (1 - accuracy) if errors else 100 * accuracy


def verdict(ours: Sequence[float], theirs: Published | None) -> str:
    """Compares the mean over seeds with the published value: reached, within the spread over seeds, or missed by how much."""
    if theirs is None:
        return "no published figure"
    if not ours:
        return f"not measured: {PROTOCOLS[theirs.protocol]}"
    gap = statistics.mean(ours) - theirs.value if theirs.errors else theirs.value - statistics.mean(ours)
    if gap <= 1e-9:
        return "reached"
    if len(ours) > 1 and gap <= statistics.stdev(ours):
        return "within spread"
    return f"missed by {gap:.0f} errors" if theirs.errors else f"missed by {gap:.2f} points"


def row(cell: str, runs: Sequence[dict[str, Any]], theirs: Published | None, errors: bool) -> list[str]:
    """Returns one row of a table of results."""
    digits = 0 if errors else 2
    ours = {p: figures(runs, p, errors) for p in PROTOCOLS}
    judged = [run["teacher"] for run in runs if run["teacher"] and run["teacher"]["test"]]
    teachers = {teacher["sha256"]: teacher["test"]["accuracy"] for teacher in judged}
    teacher_values = [_figure(accuracy, errors) for accuracy in teachers.values()]
    shown = [spread(v, 1 if errors and len(v) > 1 else digits) if v else "" for v in (*ours.values(), teacher_values)]
    return [
        cell.split("/", 1)[1],
        f"{theirs.value:.{digits}f}" if theirs else "",
        *shown,
        str(len(runs)),
        duration(statistics.mean(run["time"]["total_s"] for run in runs)),
        verdict(ours[theirs.protocol] if theirs else [], theirs),
    ]


def by_class(own: Results) -> str:
    """Returns a table of the errors per class, the mean over seeds, for the best epoch on validation."""
    counts = {
        cell: [statistics.mean(c) for c in zip(*(r["errors_by_class"] for r in own[cell]), strict=True)] for cell in own
    }
    classes = [str(i) for i in range(max(map(len, counts.values())))]
    rows = [[cell, *(f"{c:.0f}" for c in found)] for cell, found in counts.items()]
    return "The same errors (best on validation) by the class of the image:\n\n" + markdown_table(
        ["experiment", *classes], rows
    )


def duration(seconds: float) -> str:
    """Returns a text in minutes, or in seconds below two minutes."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def hardware(runs: Sequence[dict[str, Any]]) -> str:
    """Returns the distinct devices of the runs."""
    kinds = {f"{r['device']['name']} ({r['device']['type']}), {r['device']['threads']} thread(s)" for r in runs}
    return "; ".join(sorted(kinds))


def section(name: str, title: str, results: Results, theirs: Mapping[str, Published], notes: str) -> str:
    """Returns the section of one paper: table, notes, hardware and commands."""
    own = {cell: runs for cell, runs in results.items() if cell.startswith(f"{name}/")}
    parts = [f"## {title}"]
    if own:
        errors = any(p.errors for c, p in theirs.items() if c.startswith(f"{name}/"))
        unit = "test errors of 10,000" if errors else "test accuracy %"
        head = ["experiment", "published", *PROTOCOLS.values(), "its teacher", "seeds", "time a run", "verdict"]
        place = {cell: i for i, cell in enumerate(theirs)}
        order = sorted(
            own, key=lambda c: (place.get(c, len(place)), [float(n) for n in re.findall(r"\d+\.?\d*", c)], c)
        )
        rows = [row(c, own[c], theirs.get(re.sub("/[^/]*=.*", "", c)), errors) for c in order]
        parts.append(f"In {unit}, mean ± standard deviation over seeds.\n\n" + markdown_table(head, rows))
        if errors:
            parts.append(by_class({c.split("/", 1)[1]: own[c] for c in order}))
        everything = [run for runs in own.values() for run in runs]
        commands = "\n".join(own[c][0]["command"] for c in order)
        parts.append(f"On: {hardware(everything)}. Commands of the first seeds:\n\n```bash\n{commands}\n```")
    if notes:
        parts.insert(1, notes.strip())
    return "\n\n".join(parts)


def not_run(table: Table, name: str, results: Results) -> str:
    """Returns the published values of cells without runs, one row per method, one column per pair; empty if none."""
    missing = {
        key: figure
        for key, figure in cells(table).items()
        if f"{name}/{'_'.join(table.pairs[key[0]])}/{key[1]}" not in results
    }
    columns, methods = dict.fromkeys(c for c, _ in missing), dict.fromkeys(m for _, m in missing)
    if not missing:
        return ""
    shown = lambda figure: "none" if figure is None else f"{figure:.2f}"  # noqa: E731
    rows = [[m, *(shown(missing[c, m]) if (c, m) in missing else "" for c in columns)] for m in methods]
    key = "; ".join(f"{c}: `{'_'.join(table.pairs[c])}`" for c in columns)
    why = "" if name.endswith("_short") else ": needs a GPU"
    return (
        f"Not run here{why}. Top-1 accuracy in %, of {table.source}:\n\n{markdown_table(['', *columns], rows)}\n\n"
        f"`python scripts/train.py experiment={name}/<pair>/<method> watch_test=true` runs a cell. Pairs: {key}."
    )


TITLES = {
    "hinton2015": "MNIST: Hinton, Vinyals & Dean 2015 (arXiv 1503.02531), section 3",
    "zagoruyko2017": "CIFAR-10: Zagoruyko & Komodakis 2017 (arXiv 1612.03928), table 1",
    "zagoruyko2017_short": "CIFAR-10: the same in 6 epochs, for two cores",
    "aberhu": "CIFAR-10: AberHu's Knowledge-Distillation-Zoo",
    "crd_cifar10": "CIFAR-10 under the CRD protocol",
    "crd": "CIFAR-100: the table of Tian, Krishnan & Isola 2020 (arXiv 1910.10699) and its later rows",
    "imagenet": "ImageNet: rows of the methods' own papers",
}

INTRODUCTION = """# Published figures, and what this project gives

Made by `python scripts/reproductions.py page` of the runs' own summaries, which lie in `docs/results`; no figure is typed by
hand. `python scripts/reproductions.py collect <run folder>` adds a run, if measuring it anew gives its summary to the digit.

Three figures of one run: the accuracy on the test set of the **last epoch**; of the epoch that was **best on validation**;
and of the epoch that was **best on test**, which many tables report and which is no accuracy on unseen images: it is logged
(`watch_test=true`) and chooses nothing. A verdict compares the mean over seeds with the published figure under the protocol
of the publication; where that chooses by something else than the last epoch or the test set, under best on validation.
*Within spread* is missed by no more than the standard deviation over the seeds. *Its teacher* is measured with the weights
that were best on validation.
"""


def page(results: Path = RESULTS) -> str:
    """Returns the whole page in Markdown."""
    found, theirs, parts = read(results), published(), [INTRODUCTION.strip()]
    for name, title in TITLES.items():
        notes = results / name / "notes.md"
        parts.append(section(name, title, found, theirs, notes.read_text() if notes.is_file() else ""))
        if name in TABLES and (rest := not_run(TABLES[name], name, found)):
            parts.append(rest)
    return "\n\n".join(parts) + "\n"
