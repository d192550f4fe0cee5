"""Measures how safe students are, and writes the tables and the picture of docs/security.md: `make secure`.

    python scripts/secure_table.py                              on the bundled digits, three seeds
    python scripts/secure_table.py parts=[defensive] dataset=mnist root=data
    python scripts/secure_table.py parts=[]                     writes the tables of what is kept and trains nothing

A part is one of `PARTS`; its tables stand in the document between `<!-- part -->` and `<!-- end part -->`. Runs are in
<runs>; what is finished there is not repeated. What was found is kept in a JSON file, by part and data set, and beside the
runs, where `litdistill report` finds it.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from litdistill.benchmarks import extraction, shadows
from litdistill.benchmarks.compare import Job, config_of, run
from litdistill.benchmarks.tables import between_marks, read_options, run_script
from litdistill.data.datamodule import ImageData
from litdistill.distillation.adversarial import unit_images
from litdistill.evaluation.attacks import ATTACKS, cross_entropy, fgsm, pgd, robust_accuracy, square
from litdistill.evaluation.evaluate import rebuild
from litdistill.evaluation.predictions import spread_out, whole_split
from litdistill.methods import KD, Supervised
from litdistill.models.preprocess import Preprocess, Preprocessed
from litdistill.models.small import conv4
from litdistill.report.blocks import Fold, Table
from litdistill.report.plots import COLORS, MARKERS
from litdistill.report.plots import TEACHER as LOOK
from litdistill.report.security import FILE, SECTIONS, TEACHER
from litdistill.tasks import Classification
from litdistill.tasks.figures import new_figure, save_figure
from litdistill.training.distill import distill
from litdistill.types import Batch, Outputs
from litdistill.utils.command_line import literal
from litdistill.utils.files import write_text
from litdistill.utils.logging import format_seconds
from litdistill.utils.text import markdown_table
from litdistill.utils.versions import in_words, versions

DEFAULTS = {
    **{"dataset": "digits", "root": "data", "seeds": 3, "shadows": 16, "jobs": 2, "runs": "runs/secure"},
    **{"keep": "docs/security.json", "out": "docs/security.md", "picture": "docs/security.png"},
}
EPS = 0.1  # of all attacks: chosen before any run, a tenth of the range of a pixel
IMAGES = 500  # that are attacked, spread over the test set: all of the digits'

Scores = dict[str, float]
Kept = dict[str, Any]


def evaluated(net: nn.Module, data: Any, attacks: Mapping[str, Any]) -> Scores:
    """Returns the accuracy under each attack on `IMAGES` test images, as `robust_accuracy` does."""
    images, targets = whole_split(data, "test")
    assert images is not None
    chosen = spread_out(IMAGES, len(images))
    net.eval().requires_grad_(False)
    return robust_accuracy(net, unit_images(images[chosen]), targets[chosen], EPS, attacks)


def kept(path: Path, compute: Callable[[], Scores]) -> Scores:
    """Returns the numbers in a file, computed and written there unless it is there; `seconds` are those of a core."""
    if not path.is_file():
        start = time.process_time()
        found = compute()
        write_text(path, json.dumps({**found, "seconds": time.process_time() - start}))
    return dict(json.loads(path.read_text()))


def together(function: Callable[..., Any], cells: Sequence[tuple[Any, ...]], jobs: int) -> list[Any]:
    """Returns `function` of all cells, in order. The first is computed alone, for it trains the teacher of all."""
    first = [function(*cells[0])]
    if jobs == 1:
        return first + [function(*cell) for cell in cells[1:]]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        return first + list(pool.map(function, *zip(*cells[1:], strict=True)))


def by_row(
    names: Sequence[str], found: Mapping[tuple[str, int], Scores], seeds: int
) -> dict[str, dict[str, list[float]]]:
    """Returns the scores of cells (row, seed) as lists over seeds, by row and column."""
    rows = {name: [found[name, seed] for seed in range(seeds)] for name in names}
    return {name: {c: [s[c] for s in each] for c in each[0] if c != "seconds"} for name, each in rows.items()}


# -- robust students ----------------------------------------------------------------------------------------------------

# By name: what stands on the command line beside experiment=secure/robust.
STUDENTS = {
    "labels alone": ("method=supervised", "adversarial=none"),
    "kd": ("method=kd", "adversarial=none"),
    "labels, adversarial": ("method=supervised",),
    "kd, adversarial": ("method=kd",),
    "ard": ("method=ard",),
    "rslad": ("method=rslad",),
}


def job(name: str, seed: int, choices: Mapping[str, Any]) -> Job:
    """Returns the run of a student."""
    said = [
        "experiment=secure/robust",
        f"data={choices['dataset']}",
        f"data.root={literal(choices['root'])}",
        "data.batch_size=64",
    ]
    said += [*STUDENTS[name], f"seed={seed}", f"runs={literal(choices['runs'])}"]
    return Job("robust-" + "-".join(name.replace(",", "").split()), "", seed, tuple(said), choices["runs"])


def robust_student(one: Job) -> tuple[Scores, Scores]:
    """Returns the scores of a student, trained unless it is there, and of its teacher."""
    torch.set_num_threads(1)
    folder = Path(config_of(one).folder)
    if not (folder / "summary.json").is_file():
        run(one)
    data, distiller = rebuild(folder)
    teacher = distiller.teacher
    assert teacher is not None
    scores = kept(folder / "robust.json", lambda: evaluated(distiller.deployed_student, data, ATTACKS))
    scores["seconds"] += json.loads((folder / "summary.json").read_text())["time"]["core_s"]
    place = Path(one.runs) / f"teacher-{teacher.sha256[:16]}.json"
    return scores, kept(place, lambda: evaluated(teacher.net, data, ATTACKS))


def robust(choices: DictConfig) -> Kept:
    """Students of a robust teacher, with and without adversarial training."""
    cells = [(name, seed) for seed in range(choices.seeds) for name in STUDENTS]
    todo = [job(name, seed, choices) for name, seed in cells]
    found = together(robust_student, [(one,) for one in todo], choices.jobs)
    scores = dict(zip(cells, (student for student, _ in found), strict=True))
    summary = json.loads((Path(config_of(todo[0]).folder) / "summary.json").read_text())
    teacher = found[0][1]
    rows = {
        TEACHER: {c: [v] for c, v in teacher.items() if c != "seconds"},
        **by_row(list(STUDENTS), scores, choices.seeds),
    }
    return {
        **{"eps": EPS, "images": min(IMAGES, summary["data"]["test"]), "epochs": summary["epochs"], "rows": rows},
        **{"params": [summary[one]["params"] for one in ("student", "teacher")]},
        "seconds": round(sum(s["seconds"] for s in scores.values()) + teacher["seconds"], 1),
    }


# -- defensive distillation ---------------------------------------------------------------------------------------------

TEMPERATURES = {"labels alone": 1.0, "distilled at T = 20": 20.0, "distilled at T = 100": 100.0}
EPOCHS = {"digits": 30, "mnist": 3}  # of either network


def defense(temperature: float) -> dict[str, Any]:
    """Returns the attacks that are compared, by name."""

    def cooled(attack: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda f, x, y, eps: attack(lambda v: f(v) / temperature, x, y, eps, loss=cross_entropy)

    return {
        "FGSM": partial(fgsm, loss=cross_entropy),
        "PGD": partial(pgd, loss=cross_entropy),
        "FGSM, logits / T": cooled(fgsm),
        "PGD, logits / T": cooled(pgd),
        "Square": partial(square, queries=1000),
    }


class AtTemperature(Classification):
    """Labels at a temperature: the cross-entropy of logits / T, which makes logits T times as large."""

    def __init__(self, temperature: float):
        super().__init__()
        self.temperature = temperature

    def loss(self, net: nn.Module, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        return super().loss(net, Outputs.of(outputs.logits / self.temperature), batch)


def defended(kind: str, seed: int, choices: Mapping[str, Any]) -> Scores:
    """Returns the scores of a network trained on labels, or distilled defensively from one like it (arXiv 1511.04508)."""
    torch.set_num_threads(1)
    temperature = TEMPERATURES[kind]
    folder = Path(choices["runs"]) / "defensive" / choices["dataset"] / f"{temperature:g}-{seed}"

    def compute() -> Scores:
        data = ImageData(choices["dataset"], choices["root"], batch_size=64, seed=seed)
        data.prepare_data()
        data.setup()

        def fresh(start: int) -> nn.Module:
            torch.manual_seed(start)
            net = conv4(data.num_classes, tuple(data.input_shape), widths=[16, 32, 64])
            return Preprocessed(net, Preprocess([0.3], [0.35]))

        run = partial(distill, train=data, max_epochs=EPOCHS[choices["dataset"]], task=AtTemperature(temperature))
        run = partial(
            run, optimizer=partial(torch.optim.Adam, lr=3e-3), trainer={"accelerator": "cpu", "logger": False}
        )
        net = run(fresh(seed), None, method=Supervised(), out=folder / "first").deployed_student
        if temperature != 1:
            method = KD(hard=0.0, soft=1.0, temperature=temperature)
            net = run(fresh(seed + 1000), net, method=method, out=folder / "second").deployed_student
        return evaluated(net, data, defense(temperature))

    return kept(folder / "robust.json", compute)


def defensive(choices: DictConfig) -> Kept:
    """Defensive distillation, and what undoes it."""
    plain = {key: choices[key] for key in ("runs", "dataset", "root")}
    cells = [(kind, seed) for seed in range(choices.seeds) for kind in TEMPERATURES]
    found = together(defended, [(*cell, plain) for cell in cells], choices.jobs)
    rows = by_row(list(TEMPERATURES), dict(zip(cells, found, strict=True)), choices.seeds)
    about = {"eps": EPS, "images": IMAGES, "epochs": EPOCHS[choices.dataset]}
    return {**about, "rows": rows, "seconds": round(sum(s["seconds"] for s in found), 1)}


# -- the document -------------------------------------------------------------------------------------------------------


def by_training(record: Callable[[shadows.Choices], Kept]) -> Callable[[DictConfig], Kept]:
    """Returns a part of the attacks that train models."""
    own = ("runs", "dataset", "shadows", "jobs", "seeds")
    root = lambda choices: (f"data.root={literal(choices.root)}",)  # noqa: E731
    return lambda choices: record(shadows.Choices(**{key: choices[key] for key in own}, overrides=root(choices)))


# What is measured, in the order of the page. Each part has a section on it, by the same name.
PARTS: dict[str, Callable[[DictConfig], Kept]] = {
    "robust": robust,
    "defensive": defensive,
    "membership": by_training(shadows.record),
    "extraction": by_training(extraction.record),
}


def measured(part: str, choices: DictConfig) -> Kept:
    """Returns what a part found on a data set, with its command and versions."""
    own = {"dataset": choices.dataset, "seeds": choices.seeds, "shadows": choices.shadows}
    said = [f"{key}={value}" for key, value in own.items() if value != DEFAULTS[key]]
    command = " ".join(["python scripts/secure_table.py", f"parts=[{part}]", *said])
    return {"dataset": choices.dataset, "command": command, "versions": versions(), **PARTS[part](choices)}


def markdown(part: str, found: Mapping[str, Kept]) -> str:
    """Returns the tables of a part, one for each data set, how each was measured, and what it took."""
    texts = []
    for one in found.values():
        for block in SECTIONS[part](one, "").blocks:
            if isinstance(block, Table):
                texts.append(markdown_table(block.head, block.rows))
            if isinstance(block, Fold):
                texts += block.texts
        used = in_words(one["versions"])
        texts.append(f"Made by `{one['command']}` in {format_seconds(one['seconds'])} of one core, with {used}.")
    return "\n\n".join(texts)


PANELS = {"robust": "Students of a robust teacher", "defensive": "Defensive distillation"}


def draw(found: Mapping[str, Mapping[str, Kept]], path: Path) -> None:
    """Writes the picture: for each table of accuracy under attack a panel below the last, with a line for each row."""
    tables = [(part, one) for part in PANELS for one in found.get(part, {}).values()]
    if not tables:
        return
    figure = new_figure(6, 3.3 * len(tables))  # narrow, to be read on a telephone
    for axes, (part, one) in zip(figure.subplots(len(tables), 1, squeeze=False)[:, 0], tables, strict=True):
        for i, (name, scores) in enumerate(one["rows"].items()):
            means = [100 * mean(values) for values in scores.values()]
            columns = [column.replace(", ", ",\n") for column in scores]
            look = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i]} if name != TEACHER else LOOK
            axes.plot(columns, means, label=name, linewidth=1.4, **look)
        axes.set_ylim(-3, 103)
        axes.set_ylabel("accuracy (%)")
        axes.set_title(f"{PANELS[part]}, {one['dataset']}", fontsize=11, loc="left")
        axes.grid(alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize=9, frameon=False)
    save_figure(figure, path, dpi=150)


def main() -> None:
    names: dict[str, Collection[str]] = {"dataset": EPOCHS, "parts": PARTS}
    choices = read_options({**DEFAULTS, "parts": list(PARTS)}, {"seeds": 1, "shadows": 1, "jobs": 1}, names)
    torch.set_num_threads(1)
    keep, path = Path(choices.keep), Path(choices.out)
    found = json.loads(keep.read_text()) if keep.is_file() else {}
    for part in choices.parts:
        print(f"{part}, {choices.dataset}", flush=True)
        of_part = {**found.get(part, {}), choices.dataset: measured(part, choices)}
        found[part] = {name: of_part[name] for name in EPOCHS if name in of_part}
        for place in (keep, Path(choices.runs, FILE)):
            write_text(place, json.dumps(found) + "\n")
    for part in [name for name in PARTS if name in found]:
        text = markdown(part, found[part])
        write_text(path, between_marks(path.read_text(), part, text))
    draw(found, Path(choices.picture))
    print(f"Written to {path}, {choices.picture} and {keep}")


if __name__ == "__main__":
    run_script(main)
