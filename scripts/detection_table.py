"""Trains a small detector by every method for detectors, and writes the table of them all into docs/methods.md.

    python scripts/detection_table.py out=docs/methods.md seeds=5
    python scripts/detection_table.py jobs=16              so many runs at a time, of one thread each
    python scripts/detection_table.py only=true            writes the table of what is there and trains nothing

Runs are those of conf/experiment/detection/methods.yaml, in <runs>/compare/<row>/; what is finished there, or has left its
summary.json, is not repeated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig

from litdistill.benchmarks.compare import Job, config_of, run_all
from litdistill.benchmarks.tables import read_options, run_script
from litdistill.config.recipes import teacher_folder
from litdistill.utils.command_line import literal
from litdistill.utils.errors import UserError
from litdistill.utils.files import write_text
from litdistill.utils.text import markdown_table
from litdistill.utils.units import gain, spread
from litdistill.utils.versions import in_words

DEFAULTS = {"out": "docs/methods.md", "seeds": 5, "jobs": 1, "runs": "runs/detection_methods", "only": False}
TITLE = "## Detectors"
CONTROL, CONTROL_OF_ALL, CONTROL_OF_SIDES = "supervised", "supervised of all", "supervised of sides"
COLUMNS = ("method", "reads of the teacher", "options", "seeds", "test mAP %", "over the control")


class Row(NamedTuple):
    """A method, what it reads of the teacher, its options, and the row that it is held against: None for a control."""

    method: str
    reads: str
    options: tuple[str, ...] = ()
    control: str | None = CONTROL


ALONE = "data.only_labelled=true"
TAPS = ("method.student_taps=pyramid", "method.teacher_taps=pyramid")
MASKS = ("method.masked=0.65", "method.mask=places")
SIDES = ("student.bins=8", "teacher.bins=8")
PART = "method.methods.dense_kd"
ROWS = {
    CONTROL: Row("supervised", "no teacher", (ALONE,), None),
    "at": Row("at", "pyramid", (ALONE, *TAPS)),
    "cwd": Row("cwd", "pyramid", (ALONE, *TAPS)),
    "fitnet": Row("fitnet", "pyramid, the middle level", (ALONE, *TAPS)),
    "mgd": Row("mgd", "pyramid", (ALONE, *MASKS, *TAPS)),
    "mgd with slow layers": Row("mgd", "pyramid", (ALONE, *MASKS, *TAPS, "method_lr=0.06")),  # the teacher's rate
    "fgd": Row("fgd", "pyramid", (ALONE,)),
    CONTROL_OF_ALL: Row("supervised", "no teacher", ("data.only_labelled=false",), None),
    "at of all": Row("at", "pyramid", TAPS, CONTROL_OF_ALL),
    "cwd of all": Row("cwd", "pyramid", TAPS, CONTROL_OF_ALL),
    "mgd as published": Row("mgd", "pyramid", ("method.hint=2e-5", *MASKS, *TAPS), CONTROL_OF_ALL),
    "fgd of all": Row("fgd", "pyramid; detections where there are no boxes", (), CONTROL_OF_ALL),
    "pkd": Row("pkd", "pyramid", TAPS),
    "dense_kd": Row("dense_kd", "classes, boxes and centerness at every anchor", ("method.soft=3", "method.box=2")),
    "crosskd": Row("crosskd", "the teacher's head on the student's maps", ("method.soft=6", "method.box=4")),
    "pseudo_boxes": Row("pseudo_boxes", "detections"),
    "pkd_dense_kd": Row("pkd_dense_kd", "pyramid; classes, boxes and centerness", (f"{PART}.soft=3", f"{PART}.box=2")),
    CONTROL_OF_SIDES: Row("supervised", "no teacher", (ALONE, *SIDES), None),
    "ld": Row("ld", "distributions of the sides of boxes", (ALONE, *SIDES), CONTROL_OF_SIDES),
    "ld of all": Row("ld", "distributions of the sides of boxes", SIDES, CONTROL_OF_SIDES),
    "ld_dense_kd": Row(
        "ld_dense_kd",
        "distributions of sides; classes, boxes and centerness",
        (*SIDES, f"{PART}.soft=3", f"{PART}.box=2"),
        CONTROL_OF_SIDES,
    ),
}


def job(name: str, seed: int, runs: str) -> Job:
    """Returns the run of a row and a seed."""
    row = ROWS[name]
    overrides = (
        "experiment=detection/methods",
        f"method={row.method}",
        f"seed={seed}",
        f"runs={literal(runs)}",
        *row.options,
    )
    return Job(name.replace(" ", "-"), "", seed, overrides, runs)


def train_missing(todo: Mapping[Job, DictConfig], at_once: int) -> None:
    """Trains the runs that have left no summary: first one beside each teacher, for which the others would wait."""
    missing = {c: cfg for c, cfg in todo.items() if not summary(cfg).is_file()}
    by_teacher = {teacher_folder(cfg): c for c, cfg in reversed(missing.items())}
    if missing:
        run_all(list(dict.fromkeys([*by_teacher.values(), *missing])), at_once)


def summary(cfg: DictConfig) -> Path:
    return Path(cfg.folder) / "summary.json"


def score(found: Mapping[str, Any]) -> float:
    """Returns the mAP on the test set in per cent, of the weights that training ended with."""
    return 100 * found["student"]["test"]["map"]["last"]


def table(found: Mapping[str, Mapping[int, Any]]) -> str:
    """Returns the table of the summaries by row and seed, without the rows that have none."""
    scores = {name: {seed: score(one) for seed, one in by_seed.items()} for name, by_seed in found.items()}
    cells = []
    for name, values in scores.items():
        row = ROWS[name]
        over = "control" if row.control is None else gain(values, scores.get(row.control, {}))
        options = " ".join(row.options) or "as in its file"
        cells.append((f"`{row.method}`", row.reads, options, len(values), spread(list(values.values())), over))
    return markdown_table(COLUMNS, cells, 3)


def section(found: Mapping[str, Mapping[int, Any]]) -> str:
    """Returns the section of the document, with what the table is, from the runs themselves."""
    every = [one for by_seed in found.values() for one in by_seed.values()]
    example = max(every, key=lambda one: one["data"]["train"])  # the first that saw all scenes
    student, large, data = example["student"], example["teacher"], example["data"]
    used = in_words(example["versions"])
    return f"""{TITLE}

Written by `python scripts/detection_table.py`; not to be edited by hand.

Every method trains the same small detector ({student["params"]:,} parameters) for {example["steps"]} steps on
{data["train"]:,} scenes of `data=digit_scenes`, of which 250 have boxes, beside the same teacher ({large["params"]:,}
parameters, trained on all boxes: {100 * large["test"]["map"]:.2f} % mAP on the {data["test"]} scenes of the test set). The
first control is `{CONTROL}` on those 250 scenes alone (`{ALONE}`), for as many steps. The second sees all scenes, as
methods that learn from the others, too: a quarter of each minibatch has labels then, each labelled scene is seen a quarter as
often, and a method whose hint trains no head is to be held against this. `ld` needs a head of distributions, in the
student and the teacher: with it both are other networks, and so is the control. The learning rate was chosen for
the first control on the validation set. Weights are the published ones for detectors where there are any, else
`balance=auto` sets them, which is the default; those of `crosskd`, of `dense_kd` (in its sum with `pkd`), and the threshold of
`pseudo_boxes` were chosen of a few on the validation set. The test set was used to choose nothing: the mAP is that of
the last epoch. Mean ± standard deviation over seeds, which draw first weights and order; the difference is taken seed
by seed. As above it is a sanity check and no ranking.

Each run is `python scripts/train.py experiment=detection/methods method=<method> <options> seed=<seed>`.
Made with {used}.

{table(found)}
"""


def main() -> None:
    choices = read_options(DEFAULTS, {"seeds": 1, "jobs": 1})
    torch.set_num_threads(1)
    # All rows of one seed first: what is stopped has a table.
    cells = {(name, seed): job(name, seed, choices.runs) for seed in range(choices.seeds) for name in ROWS}
    configs = {one: config_of(one) for one in cells.values()}
    if not choices.only:
        train_missing(configs, choices.jobs)
    found: dict[str, dict[int, Any]] = {}
    for name in ROWS:
        for seed in range(choices.seeds):
            if (file := summary(configs[cells[name, seed]])).is_file():
                found.setdefault(name, {})[seed] = json.loads(file.read_text())
    if not found:
        raise UserError(f"There is no finished run in {choices.runs}. Leave only=true out.")
    path = Path(choices.out)
    before = path.read_text().split(f"\n{TITLE}\n")[0].rstrip("\n") if path.is_file() else "# Methods"
    write_text(path, f"{before}\n\n{section(found)}")
    print(f"Written to {choices.out}")


if __name__ == "__main__":
    run_script(main)
