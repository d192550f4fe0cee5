"""The stages of `gpu.py` that train: Hinton's table on MNIST, and cells of published tables on CIFAR-10.

Each run lies in `runs` of `gpu.py` and goes on from its last epoch where it was stopped. A teacher is trained before its
students, and kept. The summary of a finished run is copied to `results` in `out`, at its place in docs/results: what is found
good is copied there, and `python scripts/reproductions.py page` writes docs/reproductions.md.

The data are read from the folder `data=` of `gpu.py`, and never downloaded. In the dry form they are the bundled digits.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu import Figures
from hydra import compose, initialize_config_dir

from litdistill.benchmarks.published_tables import register
from litdistill.benchmarks.reproductions import collect
from litdistill.config.recipes import teacher_folder
from litdistill.data.fetch import obtain
from litdistill.training.prerequisites import Prerequisites
from litdistill.training.run import run
from litdistill.training.train import train
from litdistill.utils.command_line import as_command, literal
from litdistill.utils.paths import CONF

SEEDS = (0, 1, 2)


class Cell(NamedTuple):
    """A run of an experiment; `teacher`, `start`: experiments whose runs are its teacher, or that its student starts from."""

    experiment: str
    teacher: str | None = None
    start: str | None = None


# The student of WRN-40-1 alone is that of WRN-16-2.
PAIRS = {
    "crd_cifar10/resnet32x4_resnet8x4": ("student", "kd", "dkd"),
    "zagoruyko2017/wrn_16_2_wrn_16_1": ("student", "kd", "at", "kd_at"),
    "zagoruyko2017/wrn_40_1_wrn_16_1": ("kd", "at", "kd_at"),
    "zagoruyko2017/wrn_40_2_wrn_16_2": ("student", "kd", "at", "kd_at"),
    "aberhu/resnet110_resnet20": ("student", "kd", "sp"),
}
LONG = "hinton2015/teacher_long"
HINTON = (
    Cell(LONG),
    Cell("hinton2015/student"),
    *(Cell(f"hinton2015/{name}", LONG) for name in ("distilled", "no_threes", "only_7_8")),
    *(Cell(f"hinton2015/{name}_bias", LONG, f"hinton2015/{name}") for name in ("no_threes", "only_7_8")),
)
DRY = [  # over the data, the sizes and the devices of an experiment
    *("data=digits", "data.per_class=4", "data.augment=[]", "trainer=cpu", "trainer.max_epochs=1", "threads=1"),
    *("teacher.allow_chance=true", "logger=none"),
]
DRY_TEACHER = ["++teacher.recipe.trainer.max_epochs=1", "++teacher.recipe.trainer.check_val_every_n_epoch=1"]


class Runs:
    """Trains cells into `runs`, and keeps their figures and summaries; `data`: the folder of the data's files."""

    def __init__(self, figures: Figures, stage: str, device: torch.device, given: Mapping[str, str]):
        self.figures, self.stage, self.dry = figures, stage, device.type == "cpu"
        self.runs, self.out, self.data = Path(given["runs"]), Path(given["out"]), given["data"]

    def overrides(self, cell: Cell, seed: int) -> list[str]:
        """What a cell's command says, but for the place of its folder."""
        register([f"experiment={cell.experiment}"])
        found = [f"experiment={cell.experiment}", f"seed={seed}", "watch_test=true", f"runs={literal(str(self.runs))}"]
        if cell.teacher is not None:
            found.append(f"teacher.checkpoint={literal(str(self.folder(Cell(cell.teacher), 0)))}")
        if cell.start is not None:
            found.append(f"student.checkpoint={literal(str(self.folder(Cell(cell.start, cell.teacher), seed)))}")
        if not self.dry:
            return [*found, f"data.root={literal(self.data)}"]
        alone = cell.experiment.endswith(("student", "teacher_long"))
        checked = ["trainer.check_val_every_n_epoch=1"] if cell.experiment == LONG else []
        return [*found, *(o for o in DRY if not (alone and o.startswith("teacher."))), *checked] + (
            [] if alone or cell.teacher is not None else DRY_TEACHER
        )

    def folder(self, cell: Cell, seed: int) -> Path:
        """Where a cell's run lies."""
        taught = "" if cell.teacher is None else f"-{cell.teacher.rpartition('/')[2]}"
        return self.runs / f"{cell.experiment.replace('/', '-')}{taught}" / str(seed)

    def cell(self, cell: Cell, seed: int) -> None:
        """Trains a cell, unless it has a figure."""
        folder = self.folder(cell, seed)

        def work() -> dict[str, Any]:
            typed = self.overrides(cell, seed)
            with as_command(["litdistill", "train", *typed]):
                run(*typed, folder=folder)
            return {**shown(folder), "summary": str(collect(folder, self.out / "results").relative_to(self.out))}

        self.figures.measure(self.stage, f"{cell.experiment} seed {seed}", work)

    def teacher(self, cell: Cell) -> None:
        """Trains the teacher that a cell's recipe names, unless it is there."""

        def work() -> dict[str, Any]:
            with initialize_config_dir(str(CONF), version_base="1.3"):
                cfg = compose("train", [*self.overrides(cell, 0), "folder=null"])
            folder = teacher_folder(cfg)
            Prerequisites(train, lambda: None).teacher(cfg, folder)
            return shown(folder)

        self.figures.measure(self.stage, f"{cell.experiment.rpartition('/')[0]} teacher", work)


def shown(folder: Path) -> dict[str, Any]:
    """Of a finished run: test accuracies in % by protocol, that of its teacher, and seconds."""
    summary = json.loads((folder / "summary.json").read_text())
    found = {k: 100 * v for k, v in summary["student"]["test"]["accuracy"].items()}
    if (teacher := summary["teacher"]) and teacher["test"]:
        found["its_teacher"] = 100 * teacher["test"]["accuracy"]
    return {**found, "total_s": summary["time"]["total_s"]}


def cells_of_tables(figures: Figures, device: torch.device, given: Mapping[str, str]) -> None:
    """Cells of the tables on CIFAR-10, with one seed after the other; the dry form has one pair."""
    runs = Runs(figures, "cells", device, given)
    pairs = dict(list(PAIRS.items())[:1]) if runs.dry else PAIRS
    if not runs.dry:
        obtain("cifar10", given["data"], download=False)
    for seed in (0,) if runs.dry else SEEDS:
        for pair, methods in pairs.items():
            runs.teacher(Cell(f"{pair}/kd"))
            for method in methods:
                runs.cell(Cell(f"{pair}/{method}"), seed)
    means(figures, "cells")


def hinton_on_mnist(figures: Figures, device: torch.device, given: Mapping[str, str]) -> None:
    """Section 3 of Hinton, Vinyals & Dean 2015 with a teacher by the recipe that it refers to."""
    runs = Runs(figures, "mnist", device, given)
    if not runs.dry:
        obtain("mnist", given["data"], download=False)
    for seed in (0,) if runs.dry else SEEDS:
        for cell in HINTON:
            runs.cell(cell, seed)
    means(figures, "mnist")


def means(figures: Figures, stage: str) -> None:
    """Prints for each experiment mean and deviation over its seeds, of the last epoch's test accuracy in %."""
    last: dict[str, Sequence[float]] = {}
    for f in figures.read():
        name, parted, _ = f["what"].rpartition(" seed ")
        if f["stage"] == stage and parted and "last" in f:
            last[name] = [*last.get(name, ()), f["last"]]
    for name, values in last.items():
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        print(f"{stage}: {name}: {statistics.mean(values):.2f}{spread}, {len(values)} seeds", flush=True)
