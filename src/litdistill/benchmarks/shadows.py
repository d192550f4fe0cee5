"""Membership inference with shadow runs: what a teacher, its student and the same student alone betray of their samples.

    record(Choices())                  16 shadow runs and one that is attacked, of each kind, on the bundled digits

Each run is an ordinary one, on a random half of the training samples (`data.fraction`, `data.subset_seed`); what is finished is
not repeated. Each of the 17 runs of a kind is attacked once, with the others as shadow models. A student's teacher was trained
on the same half as the student.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from litdistill.benchmarks.compare import Job, run_all
from litdistill.evaluation.evaluate import rebuild
from litdistill.evaluation.predictions import predict_split
from litdistill.evaluation.privacy import Membership, likelihood_ratio, log_odds, losses, membership
from litdistill.export.outputs import training_ids
from litdistill.features.outputs import run_network
from litdistill.utils.command_line import literal

TEACHER, PLAIN, DISTILLED = "teacher", "student alone", "distilled student"
KINDS = {  # by name: the experiment and its own overrides
    TEACHER: ("scratch", ["net@student=conv4_wide", "optimizer.lr=1.0e-3", "teacher=null"]),
    PLAIN: ("scratch", ["teacher=null"]),
    DISTILLED: ("distilled", []),
}
BATCH = 512  # samples per forward


class Choices(NamedTuple):
    """Of the table of what attackers get. `overrides`: of all runs; they serve tests, and other schedules."""

    runs: str = "runs/secure"
    dataset: str = "digits"
    shadows: int = 16
    jobs: int = 2
    seeds: int = 3
    overrides: tuple[str, ...] = ()


class Scores(NamedTuple):
    """One run's scores of all candidates, (N,), whether it was trained on each, and its test accuracy."""

    log_odds: Tensor
    losses: Tensor
    trained: Tensor
    accuracy: float


def job(choices: Choices, kind: str, half: int, teacher: Path | None = None) -> Job:
    """Returns the run of a kind on a half of the samples; of a student that is distilled, with the folder of its teacher."""
    experiment, own = KINDS[kind]
    said = [
        f"experiment=compare/{experiment}",
        f"data={choices.dataset}",
        f"seed={half}",
        f"runs={literal(choices.runs)}",
    ]
    said += ["logger=none", "data.per_class=null", "data.fraction=0.5", f"data.subset_seed={half}", *own]
    said += [] if teacher is None else [f"teacher.checkpoint={literal(str(teacher))}"]
    return Job(kind.replace(" ", "-"), "", half, (*said, *choices.overrides), choices.runs)


def train_runs(choices: Choices, kinds: Sequence[str], halves: Sequence[int]) -> dict[str, list[Path]]:
    """Returns the folders of finished runs of each kind, in the order of the halves; teachers are trained first."""
    rest = [kind for kind in kinds if kind not in (TEACHER, PLAIN)]
    first = [kind for kind in (TEACHER, PLAIN) if kind in kinds or (kind == TEACHER and rest)]
    found = _by_kind(choices, {kind: [job(choices, kind, half) for half in halves] for kind in first})
    taught = list(zip(halves, found[TEACHER], strict=True)) if rest else []
    found |= _by_kind(choices, {kind: [job(choices, kind, *pair) for pair in taught] for kind in rest})
    return {kind: found[kind] for kind in kinds}


def _by_kind(choices: Choices, jobs: Mapping[str, list[Job]]) -> dict[str, list[Path]]:
    todo = [one for each in jobs.values() for one in each]
    folders = iter(run_all(todo, choices.jobs) if todo else [])
    return {kind: [next(folders) for _ in each] for kind, each in jobs.items()}


@torch.no_grad()
def scores(folder: Path) -> Scores:
    """Returns the scores of a finished run: of the training samples that are not validated on, as they are."""
    data, distiller = rebuild(folder)
    net, ids = distiller.deployed_student.eval(), training_ids(data)
    batches = [data.get_batch("train", chunk) for chunk in ids.split(BATCH)]
    logits = torch.cat([run_network(net, batch.inputs).logits for batch in batches])
    targets = torch.cat([batch.targets for batch in batches])
    test, labels = predict_split(net, data, "test", "cpu", distiller.task)
    accuracy = (test.logits.argmax(1) == labels).double().mean().item()
    return Scores(log_odds(logits, targets), losses(logits, targets), torch.isin(ids, data.train_ids), accuracy)


def attack(runs: Sequence[Scores]) -> dict[str, list[Membership]]:
    """Returns, for each run, the success of the threshold on the loss, and of the likelihood ratio with all other runs."""
    odds, trained = torch.stack([run.log_odds for run in runs]), torch.stack([run.trained for run in runs])
    found: dict[str, list[Membership]] = {"threshold": [], "shadows": []}
    for i, run in enumerate(runs):
        others = [k for k in range(len(runs)) if k != i]
        ratio = likelihood_ratio(run.log_odds, odds[others], trained[others])
        known = ~ratio.isnan()
        for name, loss in (("threshold", run.losses), ("shadows", -ratio)):
            found[name].append(membership(loss[known & run.trained], loss[known & ~run.trained]))
    return found


def record(choices: Choices) -> dict[str, Any]:
    """Trains the runs, and returns what the page says of them: lists over the runs that were attacked, shares from 0 to 1."""
    folders = train_runs(choices, list(KINDS), range(choices.shadows + 1))
    kinds, seconds = {}, 0.0
    for kind, own in folders.items():
        measured = [scores(folder) for folder in own]
        found = attack(measured)
        seconds += sum(json.loads((folder / "summary.json").read_text())["time"]["core_s"] for folder in own)
        kinds[kind] = {
            "accuracy": [run.accuracy for run in measured],
            **{name: [[one.auc, one.found] for one in attacks] for name, attacks in found.items()},
        }
    trained = measured[0].trained
    return {
        "shadows": choices.shadows,
        "members": int(trained.sum()),
        "others": int((~trained).sum()),
        "seconds": round(seconds),
        "kinds": kinds,
    }
