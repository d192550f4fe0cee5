"""Training, validation and subset splits as pure functions of the labels, and checks of the options that set them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from litdistill.data import augment as aug
from litdistill.data.sources import Split
from litdistill.types import has_label
from litdistill.utils.errors import UserError

log = logging.getLogger(__name__)


def budget(resident: bool | str, memory_gb: float) -> float:
    """Returns the bytes that the images of a folder or of shards may take in memory. Raises `UserError` for bad options."""
    if resident not in (True, False, "auto") or not memory_gb >= 0:
        raise UserError(
            f"data.resident={resident} must be true, false or auto, and data.memory_gb={memory_gb} not negative."
        )
    return memory_gb * 1e9 if resident == "auto" else math.inf if resident else 0


def check_options(val_size: float, fraction: float | None, per_class: int | None, smallest: int) -> None:
    """Raises `UserError` for contradictory or out-of-range split options; `smallest`: the least of the sizes and counts."""
    if fraction is not None and per_class is not None:
        raise UserError(
            "data.fraction and data.per_class both choose a subset: set one of them, and the other to null."
        )
    if fraction is not None and not 0 < fraction <= 1:
        raise UserError(f"data.fraction={fraction} must be above 0 and at most 1.")
    if per_class is not None and per_class < 1:
        raise UserError(f"data.per_class={per_class} must be at least 1.")
    if val_size <= 0:
        raise UserError(
            f"data.val_size={val_size} leaves nothing to choose the best epoch on. "
            "Give a fraction below 1 (0.1) or a number of images (5000)."
        )
    if smallest < 1:
        raise UserError("data.batch_size, data.eval_batch_size and data.epoch_size must be at least 1.")


def check_unlabelled(folder: object, labelled: bool | None, mixed: bool, balanced: bool) -> None:
    """Raises `UserError` for options that images without labels contradict."""
    if folder is None and labelled is False:
        raise UserError(
            "data.labelled=false leaves nothing to train on: give images without labels by data.unlabelled=<folder>."
        )
    if folder is not None and (mixed or balanced):
        option, what = ("data.mix", "mixes labels") if mixed else ("data.balanced=true", "draws by labels")
        raise UserError(f"{option} {what}, and images of data.unlabelled have none: leave out one of them.")


def check_statistics(mean: Sequence[float], std: Sequence[float], channels: int) -> None:
    """Raises `UserError` unless there is a mean and a standard deviation of each channel."""
    if not len(mean) == len(std) == channels:
        raise UserError(
            f"data.mean={list(mean)} and data.std={list(std)}: these images have {channels} channel{'s' * (channels > 1)}, and "
            "each has a number. A network that takes more channels has its own: student.preprocess={mean: …, std: …}."
        )


def strata(targets: Tensor) -> Tensor:
    """Returns what splits are stratified by, (N,) int64: the class; 0 for labels or numbers, and -1 without any."""
    return targets if targets.ndim == 1 else has_label(targets).long() - 1


def check_classes(task: str, **options: object) -> None:
    """Raises `UserError` for an option of classes that is set where samples have several labels, or numbers."""
    for name, value in options.items():
        if value and task != "classification":
            raise UserError(f"data.{name} goes by classes, and these images have {WORDS[task]}: leave it out.")


WORDS = {"embedding": "none", "multilabel": "several labels each", "regression": "numbers for labels"}


def only(split: Split, classes: Sequence[int]) -> Split:
    """Renumbers targets in the order of `classes`, -1 for the others; images, and so ids, are unchanged."""
    new = torch.full((int(split.targets.max()) + 2,), -1, dtype=torch.int64)  # the last: of -1
    for i, c in enumerate(classes):
        if 0 <= c < len(new) - 1:
            new[c] = i
    return Split(split.images, new[split.targets])


def class_indices(option: str, chosen: str | int | Sequence[int | str], names: Sequence[str]) -> list[int]:
    """Returns the indices of classes that `option` gives by number, counted from 0, or by name; text is always a name.

    Raises `UserError` for a list of both, and for an unknown or repeated class.
    """
    given: list[Any] = [chosen] if isinstance(chosen, (str, int)) else list(chosen)
    kinds = {type(c) for c in given}
    if not kinds <= {int} and not kinds <= {str}:
        shown = ", ".join(repr(c) for c in given)
        raise UserError(f"{option} takes either names of classes or numbers: {shown}. Quote a name of digits: '\"3\"'.")
    if kinds == {str}:
        place = {name: i for i, name in enumerate(names)}
        for name in given:
            if name not in place:
                near = get_close_matches(str(name), names, 1)
                known = f"did you mean {near[0]}?" if near else f"the classes are {_some(names)}."
                raise UserError(f"{option}: there is no class {name}; {known}")
        given = [place[name] for name in given]
    unknown = [c for c in given if not 0 <= c < len(names)]
    if unknown:
        raise UserError(
            f"{option} has the number {unknown[0]}, and the classes are 0 to {len(names) - 1}: {_some(names)}. "
            "A name of digits is quoted: '\"3\"'."
        )
    if len(set(given)) != len(given):
        raise UserError(f"{option} names a class twice: {', '.join(names[c] for c in given)}.")
    return given


def _some(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _shuffled_classes(ids: Tensor, targets: Tensor, seed: int) -> list[Tensor]:
    """Returns the ids of each class, shuffled by the seed and the ids alone."""
    ids = aug.order(seed, 0, ids)
    return [ids[targets[ids] == c] for c in targets[ids].unique()]


def validation(targets: Tensor, given: int, val_size: float) -> tuple[Tensor, Tensor]:
    """Splits the ids of the training files with a target of 0 or above into (validation, rest); sorted.

    The last `given` files are the validation set, or, where `given` is 0, as many as `val_size` says (`hold_out`).
    """
    labeled = torch.arange(len(targets))[targets >= 0]
    if not given:
        return hold_out(labeled, targets, val_size)
    is_held = labeled >= len(targets) - given
    return labeled[is_held], labeled[~is_held]


def hold_out(ids: Tensor, targets: Tensor, val_size: float, said: str | None = None) -> tuple[Tensor, Tensor]:
    """Splits ids into (held out, rest), stratified, sorted, and independent of the run's seed. Raises `UserError` if empty.

    Of each class with two samples or more at least one is held out, however small `val_size` is, which is logged.
    `said`: what `val_size` is called in messages.
    """
    said = said or f"data.val_size={val_size}"
    share = val_size if val_size < 1 else val_size / len(ids)
    classes = _shuffled_classes(ids, targets, seed=-1)
    asked = [round(len(c) * share) for c in classes]
    counts = [max(n, 1) if len(c) > 1 else 0 for c, n in zip(classes, asked, strict=True)]
    held, rest = (torch.cat(parts).sort().values for parts in _cut(classes, counts))
    splittable = [len(c) for c in classes if len(c) > 1]
    if not splittable:
        raise UserError(
            f"{said}: each of the {len(classes)} classes has one training sample, so that none can be held out."
        )
    if any(n >= len(c) for c, n in zip(classes, counts, strict=True)):
        most = math.floor(100 * (min(splittable) - 1) / min(splittable)) / 100
        raise UserError(
            f"{said} of {len(ids)} training samples leaves {len(rest)} to train on and {len(held)} to "
            f"validate on, and each class needs at least one on either side. Set it to {most} at most, or to "
            f"{len(splittable)}, one sample of each class."
        )
    if counts != asked:
        log.info(
            "%s is less than one sample for %d of %d classes: %d of %d training samples are held out, at least one of each "
            "class%s.",
            *(said, sum(n != a for n, a in zip(counts, asked, strict=True)), len(classes), len(held), len(ids)),
            "" if len(splittable) == len(classes) else " that has two",
        )
    return held, rest


def subset(ids: Tensor, targets: Tensor, fraction: float | None, per_class: int | None, seed: int) -> Tensor:
    """Returns the ids to train on, the same number or fraction of each class; sorted."""
    if fraction is None and per_class is None:
        return ids
    classes = _shuffled_classes(ids, targets, seed)
    if per_class is not None:
        smallest = min(len(c) for c in classes)
        if per_class > smallest:
            raise UserError(f"data.per_class={per_class}, but the smallest class has {smallest} samples to train on.")
        counts = [per_class] * len(classes)
    else:
        counts = [max(1, round(len(c) * (fraction or 1))) for c in classes]
    return torch.cat(_cut(classes, counts)[0]).sort().values


def without(ids: Tensor, targets: Tensor, omit: Sequence[int], count: int) -> Tensor:
    """Returns the ids whose class is not in `omit`; `count`: the number of classes. Raises `UserError` if none is left."""
    if len(omit) == count:
        raise UserError(
            "data.omit names all classes, so that nothing is left to train on: leave some of them out of it."
        )
    return ids[~torch.isin(targets[ids], torch.tensor(omit, dtype=targets.dtype))]


def _cut(classes: list[Tensor], counts: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    pairs = list(zip(classes, counts, strict=True))
    return [c[:n] for c, n in pairs], [c[n:] for c, n in pairs]


def mean_std(batches: Iterable[Tensor]) -> tuple[list[float], list[float]]:
    """Returns mean and std per channel of uint8 images (N, C, H, W), on the scale 0 to 1: exact, from histograms of batches."""
    counts: list[Tensor] = []
    for images in batches:
        counts = counts or [torch.zeros(256, dtype=torch.int64) for _ in range(images.shape[1])]
        for c, count in enumerate(counts):
            count += torch.bincount(images[:, c].flatten(), minlength=256)
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for count in counts:
        p = count.double() / count.sum()
        m = (p * levels).sum()
        mean.append(float(m))
        std.append(float((p * (levels - m) ** 2).sum().sqrt()) or 1.0)
    return mean, std


def measured(inputs: Tensor, ids: Tensor, wanted: bool | Sequence[bool]) -> tuple[list[float], list[float]]:
    """Returns mean and standard deviation of each feature of samples (N, F), 0 and 1 of those that are not `wanted`; or of each
    channel of uint8 images (N, C, H, W), as `mean_std`. `ids`: the samples that count."""
    if inputs.ndim == 4:
        return mean_std(inputs[chunk] for chunk in ids.split(1024))
    features, chosen = inputs[ids].double(), torch.tensor(wanted)
    deviation = features.std(0, correction=0)
    std = torch.where(chosen & (deviation > 0), deviation, 1.0)
    return torch.where(chosen, features.mean(0), 0.0).tolist(), std.tolist()
