"""The terms of the loss by their gradients: how large each is at the run's start, and whether it goes with the labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from litdistill.config.build import build_student
from litdistill.config.distiller import build_distiller, build_method, example_batch
from litdistill.data.protocol import training_labels
from litdistill.distillation.balance import reads
from litdistill.distillation.distiller import Distiller
from litdistill.distillation.step import label_terms, outputs_of_both
from litdistill.tasks.base import Task
from litdistill.types import Batch, Group

BATCHES = 4  # minibatches whose gradients are measured


class Term(NamedTuple):
    """A term of the loss, weighted as in the run. Norms are of the gradient at all parameters of the student.

    `size`: the mean norm relative to that of the labels' loss. `share`: of a hint, the norm relative to that of all terms that
    are none; 0 of other terms. `cosine`: with the gradient of the labels' loss.
    """

    name: str
    size: float
    share: float
    cosine: float
    hint: bool  # it reads features of the student and not its logits


class Gradients(NamedTuple):
    """`terms`: beside the labels' loss. `agreement`: the cosine of that of the labels' loss and of all terms together that read
    logits; None where there is none."""

    terms: list[Term]
    agreement: float | None


def gradients_at_start(
    cfg: DictConfig,
    data: Any,
    task: Task,
    teacher: nn.Module | None,
    device: torch.device | str,
    factors: Mapping[str, float],
) -> Gradients:
    """Returns the gradients of the terms beside the labels' loss, over the first minibatches of the run, in its own views.

    `factors`: of balanced terms. Empty where the labels do not count beside another term, and for a student that began with
    weights of another run, which are not read again.
    """
    if cfg.student.get("checkpoint") is not None or cfg.get("compress") is not None:
        return Gradients([], None)
    first = cfg.copy()
    first.balance, first.ema = None, None
    with torch.random.fork_rng():
        torch.manual_seed(cfg.seed)  # the weights that the run began with
        student = build_student(first, data, teacher)
        distiller = build_distiller(
            first, student, build_method(first), teacher, task, example_batch(data), data, labels=training_labels(data)
        ).to(device)
        if distiller.teacher is not None:
            distiller.teacher.to(device)
        distiller.method.set_epoch(distiller.method.init_epochs)
        sums: dict[str, list[float]] = {}
        hints: set[str] = set()
        for batch in islice(minibatches(data, torch.device(device)), BATCHES):
            _measure(distiller, task.batch(batch), factors, sums, hints)
    terms = {
        name: Term(name, size / count, share / count, cosine / count, name in hints)
        for name, (size, share, cosine, count) in sums.items()
        if count
    }
    together = terms.pop("", None)
    return Gradients(list(terms.values()), None if together is None else together.cosine)


def minibatches(data: Any, device: torch.device) -> Iterator[Batch]:
    """Yields the minibatches of the run's first epoch, in the views in which it saw them."""
    for rows in data.train_loader():
        views = None if rows.views is None else rows.views.to(device)
        found = data.make_batch(rows._replace(ids=rows.ids.to(device), views=views))
        yield from found.minibatches() if isinstance(found, Group) else [found]


def _measure(
    distiller: Distiller, batch: Batch, factors: Mapping[str, float], sums: dict[str, list[float]], hints: set[str]
) -> None:
    """Adds the sizes, shares and cosines of one minibatch to the sums, by term, with how many minibatches counted; those of
    all terms together that read logits by the name ""."""
    student, teacher, batch = outputs_of_both(distiller, batch, None)
    labels, terms = label_terms(distiller, student, batch), distiller.method(student, teacher, batch)
    if not labels or not terms:
        return
    parameters = [p for p in distiller.student.parameters() if p.requires_grad]
    hard = gradient(torch.stack(list(labels.values())).sum(), parameters)
    each = {name: factors.get(name, 1.0) * gradient(value, parameters) for name, value in terms.items()}
    hints |= {name for name, value in terms.items() if not reads(value, list(student.heads.values()))}
    soft = sum((vector for name, vector in each.items() if name not in hints), torch.zeros_like(hard))
    size, rest = hard.norm(), (hard + soft).norm()
    for name, vector in {**each, "": soft}.items():
        norm, found = vector.norm(), sums.setdefault(name, [0.0] * 4)
        if min(size, norm, rest) > 0:
            share = norm / rest if name in hints else torch.zeros(())
            figures = (norm / size, share, hard @ vector / (size * norm), torch.ones(()))
            found[:] = [a + float(b) for a, b in zip(found, figures, strict=True)]


def gradient(value: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """Returns the gradient of a scalar at all parameters as one vector, in float32 or their float64; the graph is kept."""
    found: list[Tensor | None] = [None] * len(parameters)
    if value.requires_grad:
        found = list(torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True))
    parts = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]
    return torch.cat([part.flatten() if part.dtype == torch.float64 else part.flatten().float() for part in parts])


def said(terms: list[Term]) -> str:
    """Returns in a sentence how large the terms' gradients are; empty where there is none."""
    each = [f"{t.name} {t.size:.3g} times (cosine {t.cosine:+.2f})" for t in terms]
    if not each:
        return ""
    return f"Gradients of {BATCHES} minibatches at the start, relative to that of the labels' loss: {', '.join(each)}."
