"""Students of few labels: alone, fine-tuned and distilled, over the number of labels a class; a table and a picture of curves.

    python scripts/few_table.py                            bundled digits, three seeds
    python scripts/few_table.py dataset=mnist jobs=8       also fashion_mnist and cifar10
    python scripts/few_table.py only=true                  writes the page of what is kept and trains nothing

Runs are those of conf/experiment/compare with other numbers of labels, in <runs>/<dataset>; what is finished there is not
repeated. What the page says is kept in one JSON file of all data sets.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from litdistill.benchmarks.compare import Job, run_all
from litdistill.report.plots import COLORS, LINES, MARKERS
from litdistill.tasks.figures import new_figure
from litdistill.utils.checkpoint import write_text
from litdistill.utils.errors import UserError
from litdistill.utils.logging import filter_warnings, format_seconds
from litdistill.utils.text import markdown_table
from litdistill.utils.units import measured, spread
from litdistill.utils.versions import versions

DEFAULTS = {
    **{"dataset": "digits", "seeds": 3, "jobs": 2, "labels": None, "runs": "runs/few", "overrides": []},
    **{"keep": "docs/few.json", "out": "docs/few.md", "picture": "docs/few.png", "only": False},
}
# By name: the experiment, what stands beside it on the command line, and what the student learns from.
WAYS: dict[str, tuple[str, list[str], str]] = {
    "alone": ("scratch", [], "the labels"),
    "fine-tuned": ("transfer_all", [], "the labels, from weights of all images of the first five classes"),
    "distilled, same images": ("distilled", [], "the labels, and the teacher's outputs for the same images"),
    "distilled, all images": (
        "distilled",
        ["data.per_class=null", "method.hard=0", "method.soft=1"],
        "the teacher's outputs for all images, and no label",
    ),
}
ALL = "distilled, all images"  # reads no label, so their number is no matter


class Setting(NamedTuple):
    """What the runs of a data set have: numbers of labels a class, overrides of all runs, and of those beside the teacher."""

    labels: tuple[int, ...]
    overrides: tuple[str, ...] = ()
    teacher: tuple[str, ...] = ()


def _images(crop: str, teacher: str, epochs: int, places: bool) -> Setting:
    """Real data sets: minibatches of 128, 32 steps an epoch for the student, whole epochs for the teacher.

    `places`: whether the classifiers see places too, as in conf/experiment/mnist.yaml.
    """
    steps = ("data.batch_size=128", "data.epoch_size=4096", f"data.augment=[{crop}]")
    student = ("student.widths=[16,32,64]", f"student.global_pool={not places}")
    recipe = ("teacher.recipe.data.epoch_size=null", f"teacher.recipe.trainer.max_epochs={epochs}")
    large = (f"teacher.widths={teacher}", f"teacher.global_pool={not places}", *recipe)
    return Setting((10, 20, 50, 100, 200, 500), (*steps, *student), large)


SETTINGS = {
    "digits": Setting((10, 20, 50, 100)),
    "mnist": _images("{Crop:{pad:2}}", "[32,64,128]", 3, True),
    "fashion_mnist": _images("{Crop:{pad:2}}", "[32,64,128]", 6, True),
    "cifar10": _images("{Crop:{pad:4}},Flip", "[64,128,256]", 6, False),
}


def jobs(choices: DictConfig) -> list[Job]:
    """Returns one job for each way, number of labels and seed.

    What others wait for comes first: a run of each seed from a starting point, and one beside the teacher.
    """
    setting, runs = SETTINGS[choices.dataset], f"{choices.runs}/{choices.dataset}"
    counts = list(choices.labels or setting.labels)
    found = []
    for way, (experiment, own, _) in WAYS.items():
        teacher = setting.teacher if experiment == "distilled" else ("teacher=null",)
        for count in counts[:1] if way == ALL else counts:
            for seed in range(choices.seeds):
                said = [f"experiment=compare/{experiment}", f"data={choices.dataset}", f"seed={seed}", f"runs={runs}"]
                said += ["logger=none", f"data.per_class={count}", *setting.overrides, *teacher, *own]
                variant = "" if way == ALL else str(count)
                found.append(Job(slug(way), variant, seed, (*said, *choices.overrides), runs))
    starts = [job for job in found if job.technique == "fine-tuned" and job.variant == str(counts[0])]
    beside = [job for job in found if job.technique == slug(ALL)][:1]
    return list(dict.fromkeys([*beside, *starts, *found]))


def slug(way: str) -> str:
    """Returns the name of a way as a folder's name."""
    return way.replace(", ", "-").replace(" ", "-")


def record(choices: DictConfig) -> dict[str, Any]:
    """Trains the runs of a data set, and returns what the page says of them: accuracies of the last epoch in per cent."""
    todo = jobs(choices)
    summaries = {
        job: json.loads((folder / "summary.json").read_text())
        for job, folder in zip(todo, run_all(todo, choices.jobs), strict=True)
    }
    named = {slug(way): way for way in WAYS}
    cells: dict[str, dict[str, list[float]]] = {way: {} for way in WAYS}
    for job in sorted(todo, key=lambda j: (list(named).index(j.technique), int(j.variant or 0), j.seed)):
        value = 100 * summaries[job]["student"]["test"]["accuracy"]["last"]
        cells[named[job.technique]].setdefault(job.variant or "all", []).append(round(value, 4))
    some = next(s for j, s in summaries.items() if j.technique == slug(ALL))
    own = {key: choices[key] for key in ("dataset", "seeds", "labels")}
    own["overrides"] = [text for text in choices.overrides if not text.startswith("data.root=")]
    said = [f"{key}={value}".replace(", ", ",") for key, value in own.items() if value != DEFAULTS[key]]
    return {
        "command": " ".join(["python scripts/few_table.py", *said]),
        "seconds": round(sum(s["time"]["total_s"] for s in summaries.values())),
        "steps": some["steps"],
        "student": [some["student"]["name"], some["student"]["params"]],
        "teacher": [some["teacher"]["name"], some["teacher"]["params"], 100 * some["teacher"]["test"]["accuracy"]],
        "data": {key: some["data"][key] for key in ("test", "input_shape")},
        "device": some["device"]["type"],
        "versions": versions(),
        "cells": cells,
    }


# -- the page -----------------------------------------------------------------------------------------------------------


def page(kept: Mapping[str, Mapping[str, Any]], picture: str) -> str:
    """Returns the page of all data sets that are kept."""
    ways = "\n".join(f"- **{name}**: {learns}." for name, (_, _, learns) in WAYS.items())
    return f"""# Few labels

Written by `python scripts/few_table.py`; not to be edited by hand.

The same small student, of few labelled images a class, in {len(WAYS)} ways. Each takes as many steps. The teacher has seen all
labels: it is for the case that a good network is there already, and the labels that it was trained on are not.

{ways}

![Test accuracy over labels a class]({picture})

Test accuracy in per cent at the last epoch, mean ± standard deviation over seeds, which draw the images, the first weights and
the order. Nothing is chosen on the test set or the validation set, and weights and temperature are those of `method=kd`. A gain
is taken seed by seed.

{"".join(section(name, found) for name, found in kept.items())}"""


def section(name: str, found: Mapping[str, Any]) -> str:
    """Returns the section of a data set, with what the runs are, from the runs themselves."""
    (student, params), (large, many, accuracy) = found["student"], found["teacher"]
    columns = ["labels a class", *WAYS]
    rows = [[count, *(cell(found["cells"], way, count) for way in WAYS)] for count in found["cells"]["alone"]]
    table = markdown_table(columns, rows, 0)
    used = ", ".join(f"{k} {v}" for k, v in found["versions"].items() if v is not None)
    return f"""## {name}

{table}

Student {student}, {params:,} parameters, {found["steps"]:,} steps; teacher {large}, {many:,} parameters, {accuracy:.2f} %;
{found["data"]["test"]:,} test images of {"x".join(map(str, found["data"]["input_shape"]))}. Made by
`{found["command"]}` in {format_seconds(found["seconds"])} of runs that each have one thread ({found["device"]}),
with {used}.

"""


def cell(cells: Mapping[str, Mapping[str, Sequence[float]]], way: str, count: str) -> str:
    """Returns mean ± spread, and how much that is above the student alone."""
    values = cells[way].get(count) or cells[way].get("all")
    if not values:
        return "–"
    if way == "alone":
        return spread(values)
    differences = [(a - b) / 100 for a, b in zip(values, cells["alone"][count], strict=True)]
    return f"{spread(values)} ({measured('accuracy', differences, signed=True)})"


def draw(kept: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Writes the curves as a PNG: a panel for each data set, the mean as a line and the range of the seeds as a band."""
    figure = new_figure(3.6 * len(kept) + 0.4, 4.0)
    for axes, (name, found) in zip(figure.subplots(1, len(kept), squeeze=False)[0], kept.items(), strict=True):
        counts = [int(count) for count in found["cells"]["alone"]]
        for i, (way, values) in enumerate(found["cells"].items()):
            each = [values.get(str(count)) or values["all"] for count in counts]
            means = [sum(v) / len(v) for v in each]
            look = {"color": COLORS[i], "marker": "" if "all" in values else MARKERS[i], "linestyle": LINES[i]}
            axes.plot(counts, means, **look, markersize=4, linewidth=1.5, label=way)
            axes.fill_between(
                counts, list(map(min, each)), list(map(max, each)), color=COLORS[i], alpha=0.15, linewidth=0
            )
        axes.axhline(found["teacher"][2], color="black", linewidth=0.8, linestyle=":", label="teacher")
        axes.set_xscale("log")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.set_xlabel("labels a class")
        axes.set_title(name, fontsize=10, loc="left", parse_math=False)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("test accuracy (%)")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, fontsize=8, frameon=False, loc="outside lower center", ncols=min(len(labels), 2 + len(kept))
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    filter_warnings()
    choices = OmegaConf.merge(DEFAULTS, OmegaConf.from_cli())
    assert isinstance(choices, DictConfig)
    if set(choices) != set(DEFAULTS) or min(choices.seeds, choices.jobs) < 1 or choices.dataset not in SETTINGS:
        raise UserError(
            f"Give {', '.join(f'{k}={v}' for k, v in DEFAULTS.items())} or other values, at least one seed and one job; "
            f"dataset: {', '.join(SETTINGS)}."
        )
    keep = Path(choices.keep)
    kept = json.loads(keep.read_text()) if keep.is_file() else {}
    if not choices.only:
        kept[choices.dataset] = record(choices)
        kept = {name: kept[name] for name in SETTINGS if name in kept}
        write_text(keep, json.dumps(kept) + "\n")
    if not kept:
        raise UserError(f"{keep} keeps no runs. Leave only=true out.")
    draw(kept, Path(choices.picture))
    write_text(choices.out, page(kept, Path(choices.picture).name))
    print(f"Written to {choices.out}, {choices.picture} and {keep}")


if __name__ == "__main__":
    multiprocessing.freeze_support()
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
