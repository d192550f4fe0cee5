"""Measures how safe students are, and writes the tables of docs/security.md: `make secure`.

    python scripts/secure_table.py out=docs/security.md
    python scripts/secure_table.py parts=[robust] seeds=1 jobs=1

A part is a function of `PARTS`; its text stands in the document between `<!-- part -->` and `<!-- end part -->`. Runs are in
runs/secure/; what is finished there is not repeated.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from litdistill.config.recipes import recipe_hash
from litdistill.data.datamodule import ImageData
from litdistill.distillation.adversarial import unit_images
from litdistill.evaluation.attacks import ATTACKS, cross_entropy, fgsm, pgd, robust_accuracy, square
from litdistill.evaluation.evaluate import rebuild
from litdistill.evaluation.predictions import spread_out, whole_split
from litdistill.methods import KD, Supervised
from litdistill.models.preprocess import Preprocess, Preprocessed
from litdistill.models.small import conv4
from litdistill.tasks import Classification
from litdistill.training.distill import distill
from litdistill.training.train import train
from litdistill.types import Batch, Outputs
from litdistill.utils.checkpoint import write_text
from litdistill.utils.errors import UserError
from litdistill.utils.logging import filter_warnings
from litdistill.utils.paths import CONF
from litdistill.utils.units import spread
from litdistill.utils.versions import versions

DEFAULTS = {
    "out": "docs/security.md",
    "parts": None,
    "seeds": 3,
    "jobs": 2,
    "runs": "runs",
    "data": "digits",
    "root": "data",
}
EPS = 0.1  # of all attacks: chosen before any run, a tenth of the range of a pixel
IMAGES = 500  # that are attacked, spread over the test set: all of the digits'
SECONDS = "seconds"  # of a core, beside the scores

Scores = dict[str, float]


def evaluated(net: nn.Module, data: Any, attacks: Mapping[str, Any]) -> Scores:
    """Returns the accuracy under each attack on test images that are spread out, as `robust_accuracy` does."""
    images, targets = whole_split(data, "test")
    assert images is not None
    chosen = spread_out(IMAGES, len(images))
    net.eval().requires_grad_(False)
    return robust_accuracy(net, unit_images(images[chosen]), targets[chosen], EPS, attacks)


def kept(path: Path, compute: Callable[[], Scores]) -> Scores:
    """Returns the numbers in a file, computed and written there unless it is there, with the seconds of a core they took."""
    if not path.is_file():
        start = time.process_time()
        found = compute()
        write_text(path, json.dumps({**found, SECONDS: time.process_time() - start}))
    return json.loads(path.read_text())


def together(function: Callable[..., Any], cells: Sequence[tuple[Any, ...]], jobs: int) -> list[Any]:
    """Returns `function` of all cells, in order. The first is computed alone, for it trains the teacher of all."""
    first = [function(*cells[0])]
    if jobs == 1:
        return first + [function(*cell) for cell in cells[1:]]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        return first + list(pool.map(function, *zip(*cells[1:], strict=True)))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    line = lambda cells: "| " + " | ".join(cells) + " |"  # noqa: E731
    return "\n".join([line(head), "|---" + "|---:" * (len(head) - 1) + "|", *map(line, rows)])


def percent(scores: Sequence[Scores], name: str) -> str:
    """Returns mean ± standard deviation over runs, in per cent."""
    return spread([100 * s[name] for s in scores])


# -- robust students ----------------------------------------------------------------------------------------------------

# By name: what stands on the command line beside experiment=secure/robust.
STUDENTS = {
    "labels alone": ["method=supervised", "adversarial=none"],
    "`kd`": ["method=kd", "adversarial=none"],
    "labels, adversarial": ["method=supervised"],
    "`kd`, adversarial": ["method=kd"],
    "`ard`": ["method=ard"],
    "`rslad`": ["method=rslad"],
}


def cell(overrides: Sequence[str], seed: int, runs: str) -> DictConfig:
    """Returns the config of a run, whose folder is named by all that decides its weights."""
    given = ["experiment=secure/robust", *overrides, f"seed={seed}", f"runs={runs}", "folder=''"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", given)
    cfg.folder = str(Path(runs) / "secure" / f"{seed}-{recipe_hash(cfg)}")
    return cfg


def robust_student(overrides: Sequence[str], seed: int, runs: str) -> tuple[Scores, Scores]:
    """Returns the scores of a student, trained unless it is there, and of its teacher."""
    torch.set_num_threads(1)
    cfg = cell(overrides, seed, runs)
    folder = Path(cfg.folder)
    if not (folder / "summary.json").is_file():
        write_text(folder / ".hydra" / "config.yaml", OmegaConf.to_yaml(cfg))
        train(cfg)
    data, distiller = rebuild(folder)
    teacher = distiller.teacher
    assert teacher is not None
    place = folder.parent / f"teacher-{teacher.sha256[:16]}.json"
    return (
        kept(folder / "robust.json", lambda: evaluated(distiller.deployed_student, data, ATTACKS)),
        kept(place, lambda: evaluated(teacher.net, data, ATTACKS)),
    )


def robust(choices: DictConfig) -> str:
    """Students of a robust teacher, with and without adversarial training."""
    names = ["`rslad`", *(name for name in STUDENTS if name != "`rslad`")]
    cells = [(STUDENTS[name], seed, choices.runs) for name in names for seed in range(choices.seeds)]
    found = dict(
        zip(
            [(n, s) for n in names for s in range(choices.seeds)],
            together(robust_student, cells, choices.jobs),
            strict=True,
        )
    )
    columns = ["clean", *ATTACKS, "worst"]
    rows = [["its teacher, by PGD", *(f"{100 * found[names[0], 0][1][c]:.2f}" for c in columns)]]
    for name in STUDENTS:
        scores = [found[name, seed][0] for seed in range(choices.seeds)]
        rows.append([name, *(percent(scores, c) for c in columns)])
    example = json.loads((Path(cell(STUDENTS[names[0]], 0, choices.runs).folder) / "summary.json").read_text())
    student, teacher, count = (example[key] for key in ("student", "teacher", "data"))
    return f"""Accuracy in per cent on the {count["test"]} test images of the digits (8x8), as they are and under attacks with
eps = {EPS}, which was chosen before any run, as was everything else. The student has {student["params"]:,} parameters, its
teacher {teacher["params"]:,}; the weights are those of the last of {example["epochs"]} epochs. Mean ± standard deviation over
{choices.seeds} seed(s). `worst`: under all attacks at once. Each row is
`python scripts/train.py experiment=secure/robust <options> seed=<seed>`, with the options of `STUDENTS` in the script.

{table(["student", *columns], rows)}"""


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
    folder = Path(choices["runs"]) / "secure" / "defensive" / choices["data"] / f"{temperature:g}-{seed}"

    def compute() -> Scores:
        data = ImageData(choices["data"], choices["root"], batch_size=64, seed=seed)
        data.prepare_data()
        data.setup()

        def fresh(start: int) -> nn.Module:
            torch.manual_seed(start)
            net = conv4(data.num_classes, tuple(data.input_shape), widths=[16, 32, 64])
            return Preprocessed(net, Preprocess([0.3], [0.35]))

        run = partial(distill, train=data, max_epochs=EPOCHS[choices["data"]], task=AtTemperature(temperature))
        run = partial(
            run, optimizer=partial(torch.optim.Adam, lr=3e-3), trainer={"accelerator": "cpu", "logger": False}
        )
        net = run(fresh(seed), None, method=Supervised(), out=folder / "first").deployed_student
        if temperature != 1:
            method = KD(hard=0.0, soft=1.0, temperature=temperature)
            net = run(fresh(seed + 1000), net, method=method, out=folder / "second").deployed_student
        return evaluated(net, data, defense(temperature))

    return kept(folder / "robust.json", compute)


def defensive(choices: DictConfig) -> str:
    """Defensive distillation, and what undoes it."""
    plain = {"runs": choices.runs, "data": choices.data, "root": choices.root}
    cells = [(kind, seed, plain) for seed in range(choices.seeds) for kind in TEMPERATURES]
    found = together(defended, cells, choices.jobs)
    columns = ["clean", *defense(1.0)]
    by_kind = {k: [s for (kind, *_), s in zip(cells, found, strict=True) if kind == k] for k in TEMPERATURES}
    rows = [[kind, *(percent(scores, c) for c in columns)] for kind, scores in by_kind.items()]
    return f"""Accuracy in per cent on {choices.data}, at most 1,000 test images, eps = {EPS}, mean ± standard deviation over
{choices.seeds} seed(s), {EPOCHS[choices.data]} epochs. FGSM and PGD (20 steps) follow the gradient of the cross-entropy, as
they are usually written; T is 1 for labels alone.

{table(["network", *columns], rows)}"""


PARTS: dict[str, Callable[[DictConfig], str]] = {"robust": robust, "defensive": defensive}


def insert(document: str, name: str, text: str) -> str:
    """Returns the document with the text of a part between its marks. Raises `UserError` where it has none."""
    begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    if document.count(begin) != 1 or document.count(end) != 1:
        raise UserError(
            f"The document needs {begin} and {end}, each on a line of its own, for what is written between them."
        )
    before, after = document.split(begin)[0], document.split(end)[1]
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def main() -> None:
    filter_warnings()
    choices = OmegaConf.merge(DEFAULTS, OmegaConf.from_cli())
    assert isinstance(choices, DictConfig)
    chosen = choices.parts or list(PARTS)
    if set(choices) != set(DEFAULTS) or choices.seeds < 1 or not set(chosen) <= set(PARTS):
        options = ", ".join(f"{k}={v}" for k, v in DEFAULTS.items())
        raise UserError(f"Give {options} or other values; the parts are {', '.join(PARTS)}.")
    torch.set_num_threads(1)
    path = Path(choices.out)
    used = ", ".join(f"{k} {v}" for k, v in versions().items())
    for name in chosen:
        text = f"{PARTS[name](choices)}\n\nMade by `python scripts/secure_table.py parts=[{name}]` with {used}."
        print(f"\n{text}\n", flush=True)
        write_text(path, insert(path.read_text(), name, text))
    print(f"Written to {path}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
