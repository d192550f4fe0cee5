"""Extraction: how good a copy is distilled from an exported student by somebody who can only ask it, and what hiding costs.

    record(Choices())                  three seeds on the bundled digits

The thief runs the ONNX file on images of their own, writes down what it answers, and trains the same network on that file
(`teacher.outputs`), without a label. Answers are all probabilities, these rounded, or the class alone. Beside the copies stands
what the same images are worth with their labels. What hiding costs the honest user is measured on the same answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from litdistill.benchmarks.compare import Job, run_all
from litdistill.benchmarks.shadows import BATCH, DISTILLED, Choices, train_runs
from litdistill.distillation.outputs_numbers import FLOOR
from litdistill.evaluation.evaluate import rebuild
from litdistill.evaluation.predictions import predict_split
from litdistill.export.export import export
from litdistill.export.outputs import training_ids
from litdistill.export.predict import load
from litdistill.tasks import metrics
from litdistill.utils.checkpoint import load_checkpoint, load_state_dict_checked
from litdistill.utils.command_line import literal
from litdistill.utils.files import write_atomically

DIGITS = 2  # of a rounded probability
LABELS = "their labels"
FORMS: dict[str, Callable[[Tensor], Tensor]] = {  # from probabilities (N, classes) to what is answered
    "all probabilities": lambda p: p,
    f"rounded to {DIGITS} digits": lambda p: p.round(decimals=DIGITS),
    "class alone": lambda p: F.one_hot(p.argmax(1), p.shape[1]).double(),
}
BUDGETS = (0.1, 0.5)  # the share of the training samples that the thief has images of
DRAWN = 1000  # added to the seed: which images these are


class Victim(NamedTuple):
    """An exported student and its answers: probabilities (N, classes) in float64 for training samples and the test set."""

    file: Path
    classes: list[str]
    ids: Tensor
    train: Tensor
    test: Tensor
    targets: Tensor  # of the test set


def ask(folder: Path) -> Victim:
    """Exports a finished run's student to ONNX where that is not done, and returns its answers."""
    file = folder / "export" / "student.onnx"
    if not file.is_file():
        export(folder)
    data, _ = rebuild(folder)
    model, ids = load(file), training_ids(data)
    answer = lambda images: torch.from_numpy(model.run(images.numpy())).double().softmax(1)  # noqa: E731
    train = torch.cat([answer(data.get_batch("train", chunk).inputs) for chunk in ids.split(BATCH)])
    test = list(data.batches("test"))
    answers, targets = torch.cat([answer(batch.inputs) for batch in test]), torch.cat([b.targets for b in test])
    return Victim(file, list(data.class_names), ids, train, answers, targets)


def write_answers(victim: Victim, form: str, path: Path) -> None:
    """Writes what a victim answers in a form for the training samples, as a file of outputs."""
    answers = FORMS[form](victim.train).numpy()

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # numpy adds an ending to a path
            np.savez(file, probabilities=answers, ids=victim.ids.numpy(), classes=np.array(victim.classes))

    write_atomically(path, write)


def job(choices: Choices, form: str, budget: float, seed: int, outputs: Path | None) -> Job:
    """Returns the run of a thief: of a file of answers, or of labels where `outputs` is None."""
    experiment = "scratch" if outputs is None else "distilled"
    said = [
        f"experiment=compare/{experiment}",
        f"data={choices.dataset}",
        f"seed={seed}",
        f"runs={literal(choices.runs)}",
    ]
    said += ["logger=none", "data.per_class=null", f"data.fraction={budget}", f"data.subset_seed={DRAWN + seed}"]
    if outputs is None:
        said.append("teacher=null")
    else:
        said += [f"teacher.outputs={literal(str(outputs))}", "method.hard=0", "method.soft=1", "method.temperature=1"]
    name = f"copy-of-{form.replace(' ', '-')}"
    return Job(name, str(budget), seed, (*said, *choices.overrides), choices.runs)


def copied(folder: Path) -> tuple[Tensor, int]:
    """Returns the logits of a copy on the test set, (N, classes), with its last weights, and how many images it has seen.

    The best weights were chosen by labels of the validation set, which a thief does not have.
    """
    data, distiller = rebuild(folder)
    net, prefix = distiller.deployed_student, "student."
    state = load_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"]
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    load_state_dict_checked(net, own, folder, "copy")
    return predict_split(net.eval(), data, "test", "cpu", distiller.task)[0].logits, len(data.train_ids)


def honest(victim: Victim, form: str) -> dict[str, float]:
    """Returns accuracy, Brier score and ECE of what an honest user is answered for the test set."""
    answers = FORMS[form](victim.test)
    found = metrics.quality((answers / answers.sum(1, keepdim=True)).clamp(min=FLOOR).log(), victim.targets)
    return {key: found[key] for key in ("accuracy", "brier", "ece")}


def record(choices: Choices) -> dict[str, Any]:
    """Trains victims and copies, and returns what the page says of them: lists over seeds, shares from 0 to 1."""
    seeds = range(choices.seeds)
    victims = [ask(folder) for folder in train_runs(choices, [DISTILLED], seeds)[DISTILLED]]
    todo: list[tuple[str, float, int, Job]] = []
    for form in (*FORMS, LABELS):
        for seed, victim in zip(seeds, victims, strict=True):
            path = None if form == LABELS else victim.file.with_name(f"{form.replace(' ', '-')}.npz")
            if path is not None and not path.is_file():
                write_answers(victim, form, path)
            todo += [(form, budget, seed, job(choices, form, budget, seed, path)) for budget in BUDGETS]
    folders = run_all([one for *_, one in todo], choices.jobs)
    copies: dict[str, dict[str, dict[str, list[float]]]] = {form: {} for form in (*FORMS, LABELS)}
    seconds = 0.0
    for (form, _, seed, _), folder in zip(todo, folders, strict=True):
        logits, images = copied(folder)
        victim = victims[seed]
        right = (logits.argmax(1) == victim.targets).double().mean().item()
        like = metrics.agreement(logits, victim.test.clamp(min=FLOOR).log())
        cell = copies[form].setdefault(str(images), {"accuracy": [], "agreement": [], "kl": []})
        for key, value in {"accuracy": right, **like}.items():
            cell[key].append(value)
        seconds += json.loads((folder / "summary.json").read_text())["time"]["core_s"]
    users = {form: [honest(victim, form) for victim in victims] for form in FORMS}
    return {
        "seconds": round(seconds),
        "copies": copies,
        "honest": {form: {key: [one[key] for one in each] for key in each[0]} for form, each in users.items()},
    }
