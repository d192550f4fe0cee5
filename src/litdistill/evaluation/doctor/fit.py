"""What is wrong with a student's training: weights of terms, statistics, too little or too much of it."""

from __future__ import annotations

import math

import torch

from litdistill.distillation.batch_statistics import has_lag, recompute, training_batches
from litdistill.evaluation.doctor.case import Case, Finding
from litdistill.evaluation.findings import GAP, GAP_REMEDY
from litdistill.methods.base import CATEGORICAL
from litdistill.utils.units import SHARES, named, quantity

LARGE = 1.0  # the gradient of a hint relative to that of the other terms from which its weight is too large
# The cosine of the gradients of a term that reads logits and of the labels' loss below which they disagree.
AGAINST = 0.0
LAGGED = 0.05  # by how much statistics computed anew raise a share on the validation set


def gradient_shares(case: Case) -> Finding | None:
    """Judges the gradients of hints at the student as it was at the start, balanced where the run balanced them."""
    term = max((t for t in case.gradients.terms if t.hint), key=lambda t: t.share, default=None)
    if term is None or term.share <= LARGE:
        return None
    ratio, rule = f"'balance.terms={{{term.name}: 0.1}}'", case.cfg.get("balance") or {}
    change = ratio if "steps" in rule else f"balance=auto {ratio}"  # which measures gradients
    return Finding(
        min(1.0, 0.4 + 0.2 * math.log10(term.share)),
        "share of a term",
        f"At the start the gradient of {term.name} at the student is {term.share:.3g} times that of the other terms: the "
        "labels hardly count.",
        change,
    )


def against_the_labels(case: Case) -> Finding | None:
    """Judges whether teacher and labels pull the student's logits the same way at the start."""
    if case.task.kind != CATEGORICAL:
        return None
    cosine = case.gradients.agreement
    if cosine is None or cosine >= AGAINST:
        return None
    return Finding(
        min(1.0, 0.5 - cosine),
        "teacher against labels",
        f"At the start the teacher and the labels do not pull the student the same way: the cosine of their gradients "
        f"is {cosine:.2f}, over minibatches of the run's own data.",
        "look at the labels, and at the names and order of the teacher's classes; with neither at fault, count one of both "
        "less (method.hard, method.soft)",
    )


def lagging_statistics(case: Case) -> Finding | None:
    """Computes statistics of batch normalization anew over training samples, and the metric with them."""
    name, direction = case.task.monitor
    norms = [m for m in case.distiller.evaluated.modules() if has_lag(m)]
    if not norms or name not in SHARES:
        return None
    kept = {k: v.clone() for k, v in case.distiller.evaluated.state_dict().items()}
    try:
        recompute(norms, case.distiller.to(case.device), training_batches(case.data, torch.device(case.device)))
        anew = case.value(case.validated(case.distiller.deployed_student))
    finally:
        case.distiller.evaluated.load_state_dict(kept)
    now = case.value(case.student)
    if anew - now < LAGGED or direction != "max":
        return None
    return Finding(
        min(1.0, 5 * (anew - now)),
        "statistics of batch normalization",
        f"They lag behind the weights: {named(name)} on the validation set is {case.shown(now)}, and {case.shown(anew)} with "
        "statistics computed anew over training samples.",
        "more steps (trainer.max_epochs), or a larger momentum in the layers of batch normalization",
    )


def learned_by_heart(case: Case) -> Finding | None:
    """Compares the student on training samples with the validation set."""
    name = case.task.monitor[0]
    if name not in SHARES:
        return None
    train, val = case.value(*case.trained), case.value(case.student)
    if train - val <= GAP:
        return None
    return Finding(
        min(1.0, train - val),
        "overfitting",
        f"The student's {named(name)} is {case.shown(train)} on {quantity(len(case.trained[1]), 'training sample')}, and "
        f"{case.shown(val)} on the validation set. {GAP_REMEDY}",
        "data.augment=[{_target_: litdistill.data.augment.Crop, pad: 2}], or images without labels (data.unlabelled=<folder>)",
    )


def underfitting(case: Case) -> Finding | None:
    """Compares the student on training samples with what its teacher reaches on others: a short schedule, or a small net."""
    name = case.task.monitor[0]
    if name not in SHARES or case.teacher is None:
        return None
    train, teacher = case.value(*case.trained), case.value(case.teacher)
    if teacher - train < GAP / 2:
        return None
    late = case.best_epoch is not None and case.best_epoch >= case.epochs
    said = f"The student's {named(name)} is {case.shown(train)} on its own training samples, and its teacher's "
    said += f"{case.shown(teacher)} on samples that it has not seen"
    if late:
        said += f"; the best epoch was the last, {case.epochs} of {case.epochs}: the schedule is too short."
        return Finding(min(1.0, teacher - train), "short schedule", said, f"trainer.max_epochs={2 * case.epochs}")
    said += f"; the best epoch was {case.best_epoch} of {case.epochs}: it cannot follow."
    return Finding(
        min(1.0, teacher - train),
        "capacity",
        said,
        "a larger student, or an assistant between (experiment=schemes/assistant)",
    )


RULES = (gradient_shares, against_the_labels, lagging_statistics, learned_by_heart, underfitting)
