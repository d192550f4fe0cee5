"""The section on security: accuracy under attack, membership of samples, copies of the student, and what protection costs.

What each model betrays is measured for every page of classifiers. Attacks that train models of their own (`make secure`) keep
what they found in a file `security.json`, which is shown where it lies at or below the folders of the page.
"""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from litdistill.evaluation.controls import unprotected
from litdistill.evaluation.privacy import FALSE_POSITIVES, Membership
from litdistill.evaluation.robustness import ALL
from litdistill.report import headline
from litdistill.report.blocks import Block, Fold, Section, Table, Text
from litdistill.report.collect import Group, Row, Settings
from litdistill.report.sections import MEASURED, looks
from litdistill.utils.units import measured, quantity, shown_mean, spread

log = logging.getLogger(__name__)

FILE = "security.json"  # what attacks that train models have found
SHARE = f"{100 * FALSE_POSITIVES:.0f} %"


def security(group: Group, key: str, settings: Settings) -> Section:
    """Returns the section of what attackers get from each model."""
    title, id = "Security: what attackers get, and what protection costs", f"{key}security"
    attacked = all(seed.robustness for row in group.rows for seed in row.seeds)
    inferred = any(seed.membership for row in group.rows for seed in row.seeds)
    if not (attacked or inferred):
        return Section(id, title, [Text("Not measured: robustness=0, and these data do not show their samples by id.")])
    head, rows = ["model", "accuracy %", "over labels alone"], []
    head += [f"under attack %, ε {e}/255" for e in settings.epsilons] if attacked else []
    head += ["area under the curve", f"members found at {SHARE} false ones", "members", "others"] if inferred else []
    for style, row in zip(looks(group), group.rows, strict=True):
        cells = [style.name, shown_mean("accuracy", [seed.quality["accuracy"] for seed in row.seeds])]
        cells.append(headline.signed(group, headline.against(row, group, headline.control(row, group, unprotected))))
        cells += [_worst(row, i) for i in range(1, len(settings.epsilons) + 1)] if attacked else []
        rows.append([*cells, *(_members(row) if inferred else [])])
    texts = [*([_attacks(settings)] if attacked else []), *([_threshold(group)] if inferred else [])]
    return Section(id, title, [Table(f"{key}attackers", head, rows), Fold(MEASURED, texts)])


def _worst(row: Row, i: int) -> str:
    """Returns the accuracy under all attacks at once, the mean over seeds."""
    each = [seed.robustness["attacks"][ALL][i] for seed in row.seeds]
    return f"{100 * statistics.mean(each):.1f}"


def _members(row: Row) -> list[str]:
    found = [seed.membership for seed in row.seeds if seed.membership is not None]
    if len(found) < len(row.seeds):
        return ["not measured"] + [""] * 3
    return [spread([m.auc for m in found], 3), _found(found), f"{found[0].members:,}", f"{found[0].others:,}"]


def _found(found: Sequence[Membership]) -> str:
    shares = [100 * m.found for m in found if m.found is not None]
    return f"{spread(shares)} %" if len(shares) == len(found) else "too few samples"


def _attacks(settings: Settings) -> str:
    more = " With attacks=strong the page attacks harder." if settings.attacks == "quick" else ""
    return (
        "Under attack: the share of the images of the table on robustness that are classified right as they are and under each "
        "of its attacks. Over labels alone: what the accuracy gained or lost against the same network trained on the same "
        f"samples by labels alone, at the images as they are; of a model with a protection that is its cost.{more}"
    )


def _threshold(group: Group) -> str:
    return (
        "Members: the attack takes samples on which a model has a small loss for members of its training set (Yeom et "
        "al. 2018, "
        "arXiv 1709.01604). The area under its curve is the probability that a member has a smaller loss than a test sample: "
        f"0.5 if it learns nothing. Beside it stands the share of members that it finds while it takes {SHARE} of the test "
        f"samples for members, too (Carlini et al. 2022, arXiv 2112.03570): {SHARE} if it learns nothing. Members are the "
        f"labelled training {group.things} of a student's run, as they are, and for a teacher those of its first student. This "
        "is the weakest of attacks: one that trains models of its own finds more."
    )


# -- what `make secure` kept ------------------------------------------------------------------------------------------


def trained_attacks(places: Sequence[str | Path]) -> list[Section]:
    """Returns the sections of each file of what was kept at or below the folders; a damaged one is left out, and logged."""
    files = sorted({p.resolve() for place in places for p in Path(place).glob(f"**/{FILE}")})
    found = []
    for i, path in enumerate(files):
        try:
            kept = json.loads(path.read_text())
            there = [(part, data) for part in SECTIONS for data in kept.get(part, {})]
            found += [SECTIONS[part](kept[part][data], f"a{i}-{data}-") for part, data in there]
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            log.warning("%s is damaged, and not shown (%s: %s).", path, type(error).__name__, error)
    return found


TEACHER, CONTROL = "its teacher, by PGD", "labels alone"  # rows of the tables of accuracy under attack


def of_students(kept: Mapping[str, Any], key: str = "") -> Section:
    """Returns the section of students with and without adversarial training: lists over seeds by row and column."""
    student, teacher = kept["params"]
    text = (
        f"{_under_attack(kept)} The student has {student:,} parameters, its teacher {teacher:,}; the weights are those of the "
        f"last of {quantity(kept['epochs'], 'epoch')}. Worst: under all attacks at once."
    )
    title = f"Robust students on {kept['dataset']}: accuracy under attack, and what adversarial training costs"
    return Section(f"{key}robust", title, [_accuracies(f"{key}students", kept), Fold(MEASURED, [text])])


def of_defenses(kept: Mapping[str, Any], key: str = "") -> Section:
    """Returns the section of defensive distillation, which a stronger attack undoes: lists over seeds by row and column."""
    text = (
        f"{_under_attack(kept)} {quantity(kept['epochs'], 'epoch')} each. FGSM and PGD (20 steps) follow the gradient of the "
        "cross-entropy, as they are usually written; T is 1 for labels alone."
    )
    title = f"Defensive distillation on {kept['dataset']}, and the attacks that see through it"
    return Section(f"{key}defensive", title, [_accuracies(f"{key}defenses", kept), Fold(MEASURED, [text])])


def _under_attack(kept: Mapping[str, Any]) -> str:
    seeds = quantity(len(kept["rows"][CONTROL]["clean"]), "seed")
    return (
        f"Accuracy in per cent on {kept['images']:,} images of {kept['dataset']}, spread over the test set, as they are and "
        f"under attacks with ε = {kept['eps']}, which was chosen before any run, as was everything else. Mean ± standard "
        f"deviation over {seeds}. Cost: the clean accuracy gained or lost against labels alone, seed by seed."
    )


def _accuracies(id: str, kept: Mapping[str, Any]) -> Table:
    rows, control = [], kept["rows"][CONTROL]["clean"]
    for name, scores in kept["rows"].items():
        cost = "" if name in (TEACHER, CONTROL) else _over(scores["clean"], control)
        means = [spread([100 * value for value in values]) for values in scores.values()]
        rows.append([name, means[0], cost, *means[1:]])
    columns = list(kept["rows"][CONTROL])
    return Table(id, ["network", columns[0], "cost", *columns[1:]], rows)


def of_shadows(kept: Mapping[str, Any], key: str = "") -> Section:
    """Returns the section of membership inference with shadow runs, of what `benchmarks.shadows.record` returns."""
    head = ["model", "accuracy %", "over the student alone"]
    head += [f"{words}, {name}" for name in ("loss", "shadows") for words in ("area", f"found at {SHARE}")]
    alone, rows = kept["kinds"].get("student alone"), []
    for kind, found in kept["kinds"].items():
        gain = (
            "" if alone is None or kind in ("student alone", "teacher") else _over(found["accuracy"], alone["accuracy"])
        )
        cells = [kind, shown_mean("accuracy", found["accuracy"]), gain]
        for name in ("threshold", "shadows"):
            areas, shares = zip(*found[name], strict=True)
            known = [100 * share for share in shares if share is not None]
            cells += [spread(areas, 3), f"{spread(known)} %" if len(known) == len(shares) else "too few samples"]
        rows.append(cells)
    text = (
        f"On {kept['dataset']}, with {quantity(kept['shadows'], 'shadow run')} of each kind (Carlini et al. 2022, arXiv "
        "2112.03570): a sample's log-odds of its label are compared with two normal distributions, those of shadow models that "
        "were trained on it and those of the others. Each model was trained on a random half of the training samples, which "
        f"gives {kept['members']:,} members and {kept['others']:,} others of the same kind; a student's teacher on "
        f"the same half. "
        f"Mean ± standard deviation over {quantity(kept['shadows'] + 1, 'run')}, each of which was attacked with the others. "
        f"The area is 0.5 and the share {SHARE} if an attack learns nothing. Beside it the threshold on the loss, on the same "
        "samples. Samples are asked as they are, without augmented views. Over the student alone: what a kind gains "
        "or loses in "
        "accuracy, run by run."
    )
    blocks: list[Block] = [Table(f"{key}shadow-runs", head, rows), Fold(MEASURED, [text])]
    return Section(f"{key}shadows", "Membership with shadow runs: an attack that trains models", blocks)


def _over(found: Sequence[float], alone: Sequence[float]) -> str:
    differences = [a - b for a, b in zip(found, alone, strict=True)]
    return str(measured("accuracy", differences, signed=True))


def of_copies(kept: Mapping[str, Any], key: str = "") -> Section:
    """Returns the section of extraction, of what `benchmarks.extraction.record` returns."""
    head, rows = ["what is answered"], []
    budgets = list(next(iter(kept["copies"].values())))
    for images in budgets:
        head += [f"{images} images: agreement %", "accuracy %"]
    head += ["honest user: accuracy %", "Brier", "ECE"]
    for form, cells in kept["copies"].items():
        row = [form]
        for images in budgets:
            row += [shown_mean(name, cells[images][name]) for name in ("agreement", "accuracy")]
        user = kept["honest"].get(form)
        row += ["", "", ""] if user is None else [shown_mean(name, user[name]) for name in ("accuracy", "brier", "ece")]
        rows.append(row)
    text = (
        f"On {kept['dataset']}: the thief asks the exported ONNX file of a distilled student about images of their "
        f"own, and trains "
        "the same network on the answers alone, without a label, at temperature 1 and with the last epoch's weights. "
        "Agreement: "
        "the share of test samples for which copy and student decide alike. The images are drawn from the training samples, "
        "as many of each class, and about half of them are among those that the student was trained on. Their labels: the same "
        "network trained on these images with true labels, for comparison. For the honest user: what the answers to "
        "the test set "
        "are worth, where a class alone counts as a probability of 1. Mean ± standard deviation over "
        f"{quantity(len(next(iter(kept['honest'].values()))['ece']), 'seed')}."
    )
    blocks: list[Block] = [Table(f"{key}copies", head, rows), Fold(MEASURED, [text])]
    return Section(f"{key}extraction", "Extraction: copies of the student, by what it answers", blocks)


# What is kept by part and data set, and how each part is shown, in order.
SECTIONS: dict[str, Callable[[Mapping[str, Any], str], Section]] = {
    "robust": of_students,
    "defensive": of_defenses,
    "membership": of_shadows,
    "extraction": of_copies,
}
