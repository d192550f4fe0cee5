"""Students of few labels: alone, fine-tuned and distilled, over the number of labels a class; a table and a picture of curves.

    python scripts/few_table.py                            bundled digits, three seeds
    python scripts/few_table.py dataset=mnist jobs=8       also fashion_mnist and cifar10
    python scripts/few_table.py only=true                  writes the page of what is kept and trains nothing

Runs are those of conf/experiment/compare with other numbers of labels, in <runs>/<dataset>; what is finished there is not
repeated, so seeds=1 gives a first look, and seeds=3 goes on from it. What the page says is kept in one JSON file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from omegaconf import DictConfig

from litdistill.benchmarks.compare import Job, run_all
from litdistill.benchmarks.tables import interval, read_options, run_script
from litdistill.report.plots import COLORS, LINES, MARKERS
from litdistill.tasks.figures import new_figure, save_figure
from litdistill.utils.command_line import literal
from litdistill.utils.errors import UserError
from litdistill.utils.files import write_text
from litdistill.utils.logging import format_seconds
from litdistill.utils.text import markdown_table
from litdistill.utils.units import measured, spread
from litdistill.utils.versions import in_words, versions

DEFAULTS = {
    **{"dataset": "digits", "seeds": 3, "jobs": 2, "labels": None, "runs": "runs/few", "overrides": []},
    **{"keep": "docs/few.json", "out": "docs/few.md", "picture": "docs/few.png", "only": False},
}
# By name: the experiment, what stands beside it on the command line, and what the student learns from.
WAYS: dict[str, tuple[str, list[str], str]] = {
    "alone": ("scratch", [], "the labels"),
    "fine-tuned": (
        "transfer_all",
        [],
        "the labels, from weights of all images of the first five classes and their labels",
    ),
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


def _images(student: str, teacher: str, crop: str, samples: int, epochs: int, places: bool) -> Setting:
    """Real data sets: minibatches of 64, `samples` an epoch for the student, `epochs` of all images for the teacher.

    Small networks and short schedules, chosen before any figure was seen, so that a core makes three seeds of a data set in
    less than an hour. As nothing is chosen on validation images, there are few. `places`: whether the classifiers see places
    too, as in conf/experiment/mnist.yaml.
    """
    steps = ("data.batch_size=64", f"data.epoch_size={samples}", "data.val_size=500", f"data.augment=[{crop}]")
    small = (f"student.widths={student}", f"student.global_pool={not places}")
    recipe = ("teacher.recipe.data.epoch_size=null", f"teacher.recipe.trainer.max_epochs={epochs}")
    large = (f"teacher.widths={teacher}", f"teacher.global_pool={not places}", *recipe)
    return Setting((10, 30, 100, 500), (*steps, *small), large)


SETTINGS = {
    "digits": Setting((10, 20, 50, 100)),
    "mnist": _images("[8,16,32]", "[24,48,96]", "{Crop:{pad:2}}", 2048, 2, True),
    "fashion_mnist": _images("[8,16,32]", "[24,48,96]", "{Crop:{pad:2}}", 2048, 4, True),
    "cifar10": _images("[16,32,64]", "[32,64,128]", "{Crop:{pad:4}},Flip", 3072, 6, False),
}


def jobs(choices: DictConfig) -> list[Job]:
    """Returns one job for each way, number of labels and seed: all of a seed before the next.

    What others wait for comes first in a seed: the run beside the teacher, and one from a starting point.
    """
    setting, runs = SETTINGS[choices.dataset], f"{choices.runs}/{choices.dataset}"
    counts = list(choices.labels or setting.labels)
    found = []
    for seed in range(choices.seeds):
        for way, (experiment, own, _) in WAYS.items():
            teacher = setting.teacher if experiment == "distilled" else ("teacher=null",)
            for count in counts[:1] if way == ALL else counts:
                said = [
                    f"experiment=compare/{experiment}",
                    f"data={choices.dataset}",
                    f"seed={seed}",
                    f"runs={literal(runs)}",
                ]
                said += ["logger=none", f"data.per_class={count}", *setting.overrides, *teacher, *own]
                variant = "" if way == ALL else str(count)
                found.append(Job(slug(way), variant, seed, (*said, *choices.overrides), runs))
    waited = {(slug(ALL), ""): 0, ("fine-tuned", str(counts[0])): 1}
    return sorted(found, key=lambda job: (job.seed, waited.get((job.technique, job.variant), 2)))


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
    [steps] = {s["steps"] for s in summaries.values()}  # the page says that all ways take as many
    own = {key: choices[key] for key in ("dataset", "seeds", "labels")}
    own["overrides"] = [text for text in choices.overrides if not text.startswith("data.root=")]
    said = [f"{key}={value}".replace(", ", ",") for key, value in own.items() if value != DEFAULTS[key]]
    return {
        "command": " ".join(["python scripts/few_table.py", *said]),
        "seconds": round(sum(s["time"]["total_s"] for s in summaries.values())),
        "steps": steps,
        "student": [some["student"]["name"], some["student"]["params"]],
        "teacher": [some["teacher"]["name"], some["teacher"]["params"], 100 * some["teacher"]["test"]["accuracy"]],
        "data": {key: some["data"][key] for key in ("test", "input_shape")},
        "device": some["device"]["type"],
        "versions": versions(),
        "cells": cells,
    }


# -- the page -----------------------------------------------------------------------------------------------------------


QUESTION = """## I have ten pictures a class: what do I do?

Look for more pictures first: they need no labels. Then:

| what there is | what to do |
|---|---|
| a good network for these classes, of any size | 1: it teaches a small one on all pictures, with labels and without |
| no such network | 2: fine-tune one pretrained on ImageNet. Where its size does not matter, this is the model |
| that, and more pictures without labels | 3: it teaches the small one on all of them |
| the labelled pictures alone | 4: it teaches the small one on these, beside the same small one on the labels alone |

```bash
# 1: <run> is a finished run, or a file of weights
litdistill train data=folder data.root=<folder> data.image_size=32 data.unlabelled=<another> teacher.checkpoint=<run>
# 2
litdistill train experiment=photos/fine_tuned_cpu data.root=<folder>
# 3
litdistill train -m experiment=photos/cpu data.root=<folder> data.unlabelled=<another> seed=0,1,2
# 4
litdistill train -m experiment=photos/cpu data.root=<folder> method=kd,supervised seed=0,1,2
```

Read the last epoch and several seeds: a validation set of a picture a class chooses an epoch badly. With a GPU take
`experiment=photos`. How a folder is read stands in [Your photos](your_photos.md).

On this page the teacher has seen all labels of the data set, as in the first row above. A teacher of your ten pictures a class
knows less. [Photos](photos.md) measures one that is fine-tuned on 20 and on 100 a class: with the same pictures the student
gained nothing there, and with others without labels it did at 20.
"""


def page(kept: Mapping[str, Mapping[str, Any]], picture: str) -> str:
    """Returns the page of all data sets that are kept."""
    ways = "\n".join(f"- **{name}**: {learns}." for name, (_, _, learns) in WAYS.items())
    return f"""# Few labels

The same small student, of few labelled images a class, in {len(WAYS)} ways:

{ways}

{QUESTION}
## What each way gave

{worth(kept)}

In brackets: the fewest labels a class, of those tried, with which the student alone is as good on average.

![Test accuracy over labels a class, a curve for each way]({picture}){{ width="{340 * panels(kept)[1]}" }}

Lines are means, bands the range of the seeds. In the tables below: test accuracy in per cent at the last epoch, mean ± standard
deviation over seeds, which draw the images, the student's first weights and the order; the teacher is one. In brackets: the
gain over the student alone, seed by seed. A difference counts where its 95 % interval (Student's t, of so many seeds, each
comparison by itself) leaves out zero.

All ways take as many steps, of as many images. On top come the teacher, trained once, and what fine-tuning starts from, trained
once for each seed in as many steps. Learning rates, weights and temperature are those of `conf/experiment/compare`, which are
for the digits; nothing was fitted to the other data sets, and a schedule for each could give more.

{"".join(section(name, found) for name, found in kept.items())}{missing(kept)}\
This page is written by `python scripts/few_table.py` and not edited by hand.
"""


def missing(kept: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns a line on the data sets that the script knows and that were not run; nothing where all were."""
    left = [name for name in SETTINGS if name not in kept]
    return f"Not run yet: {', '.join(f'`make few DATA={name}`' for name in left)}.\n\n" if left else ""


def worth(kept: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns a table of all data sets at the fewest labels, with how many labels the student alone needs to be as good."""
    rows = []
    for name, found in kept.items():
        alone = {count: mean(values) for count, values in found["cells"]["alone"].items()}
        count = next(iter(alone))
        row = [name, count]
        for way in WAYS:
            values = of_way(found["cells"], way, count)
            reached = next(
                (other for other, value in alone.items() if value >= mean(values)), f"over {list(alone)[-1]}"
            )
            row.append(f"{mean(values):.2f}" + ("" if way == "alone" else f" ({reached})"))
        rows.append([*row, f"{found['teacher'][2]:.2f}"])
    return markdown_table(["data", "labels a class", *WAYS, "teacher"], rows, 1)


def section(name: str, found: Mapping[str, Any]) -> str:
    """Returns the section of a data set, with what the runs are, from the runs themselves."""
    (student, params), (large, many, accuracy) = found["student"], found["teacher"]
    columns = ["labels a class", *WAYS]
    rows = [[count, *(cell(found["cells"], way, count) for way in WAYS)] for count in found["cells"]["alone"]]
    used = in_words(found["versions"])
    return f"""## {name}

{markdown_table(columns, rows, 0)}

{verdict(found["cells"])}

Student {student}, {params:,} parameters, {found["steps"]:,} steps; teacher {large}, {many:,} parameters, {accuracy:.2f} %;
{found["data"]["test"]:,} test images of {"x".join(map(str, found["data"]["input_shape"]))}. Made by
`{found["command"]}` in {format_seconds(found["seconds"])} by the clock, summed over runs of one
thread each ({found["device"]}; other work on the machine makes it longer), with {used}.

"""


def of_way(cells: Mapping[str, Mapping[str, Sequence[float]]], way: str, count: str) -> Sequence[float]:
    """Returns the accuracies of a way with so many labels, by seed."""
    return cells[way].get(count) or cells[way]["all"]


def gains(cells: Mapping[str, Mapping[str, Sequence[float]]], way: str, count: str) -> list[float]:
    """Returns by how many points a way is above the student alone, by seed."""
    return [a - b for a, b in zip(of_way(cells, way, count), cells["alone"][count], strict=True)]


def cell(cells: Mapping[str, Mapping[str, Sequence[float]]], way: str, count: str) -> str:
    """Returns mean ± spread, and how much that is above the student alone."""
    text = spread(of_way(cells, way, count))
    if way == "alone":
        return text
    return f"{text} ({measured('accuracy', [gain / 100 for gain in gains(cells, way, count)], signed=True)})"


def verdict(cells: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Returns a line for each way: at which numbers of labels it is better than the student alone, and where that is open."""
    seeds = len(next(iter(cells["alone"].values())))
    if seeds < 2:
        return "Of one seed nothing can be said of differences."
    lines = []
    for way in list(WAYS)[1:]:
        found: dict[str, list[str]] = {"better": [], "worse": [], f"no difference that {seeds} seeds can tell": []}
        for count in cells["alone"]:
            low, high = interval(gains(cells, way, count))
            place = 0 if low > 0 else 1 if high < 0 else 2
            list(found.values())[place].append(count)
        said = "; ".join(f"{what} at {', '.join(counts)}" for what, counts in found.items() if counts)
        lines.append(f"- {way}: {said}.")
    return "\n".join(lines)


def panels(kept: Mapping[str, Mapping[str, Any]]) -> tuple[int, int]:
    """Returns rows and columns of the picture: two columns at most, so that it can be read on a phone."""
    return -(-len(kept) // 2), min(len(kept), 2)


def draw(kept: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Writes the curves as a PNG: a panel for each data set, the mean as a line and the range of the seeds as a band."""
    rows, columns = panels(kept)
    figure = new_figure(2.9 * columns + 0.2, 2.7 * rows + 0.9)
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (name, found) in zip(places, kept.items(), strict=False):
        counts = [int(count) for count in found["cells"]["alone"]]
        for i, way in enumerate(WAYS):
            each = [of_way(found["cells"], way, str(count)) for count in counts]
            look = {"color": COLORS[i], "marker": "" if way == ALL else MARKERS[i], "linestyle": LINES[i]}
            axes.plot(counts, list(map(mean, each)), **look, markersize=4, linewidth=1.5, label=way)
            low, high = list(map(min, each)), list(map(max, each))
            axes.fill_between(counts, low, high, color=COLORS[i], alpha=0.15, linewidth=0)
        axes.axhline(found["teacher"][2], color="black", linewidth=0.8, linestyle=":", label="teacher")
        axes.set_xscale("log")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.set_xlabel("labels a class")
        axes.set_ylabel("test accuracy (%)")
        axes.set_title(name, fontsize=10, loc="left", parse_math=False)
        axes.grid(alpha=0.3)
    for axes in places[len(kept) :]:
        axes.set_axis_off()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=9, frameon=False, loc="outside lower center", ncols=columns)
    save_figure(figure, path, dpi=150)


def main() -> None:
    choices = read_options(DEFAULTS, {"seeds": 1, "jobs": 1}, {"dataset": SETTINGS})
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
    run_script(main)
