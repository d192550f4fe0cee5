"""Pictures with boxes from annotations: faults are counted and named, pictures are decoded once, boxes follow.

`coco`, `voc` and `bccd` read annotations into `Picture`s; `as_source` makes a `TensorSource` of them. Pictures keep their
aspect: each is fitted in whole at the top left of a gray ground of `data.size` (`litdistill.data.decode.letterbox`).
"""

from __future__ import annotations

import difflib
import hashlib
import io
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from litdistill.data.decode import letterbox
from litdistill.data.folder import say
from litdistill.data.tensors import TEST_SHARE, TensorSource, TensorSplit
from litdistill.tasks.detection.boxes import COLUMNS, LABEL, padded
from litdistill.utils.errors import UserError
from litdistill.utils.modality import Modality
from litdistill.utils.text import one_line
from litdistill.utils.units import quantity

log = logging.getLogger(__name__)

FEW = 3  # pictures that are named of each fault
SOME = 10  # classes that are named
SLACK = 0.5  # pixels that a box may reach outside without a word, as rounding does
SHAPES = 0.01  # by how much the aspect of a picture may differ from the stated one
LARGE = 4e9  # bytes of pictures in memory above which it is said
SIDES = (16, 4096)  # of `data.size`
THREADS = 8  # that decode; Pillow releases the interpreter's lock


class Box(NamedTuple):
    """An object: x1, y1, x2, y2 in pixels of the picture as annotated, on pixel edges, and its class."""

    x1: float
    y1: float
    x2: float
    y2: float
    label: int
    crowd: bool = False


class Picture(NamedTuple):
    """A picture as annotations describe it."""

    name: str  # as messages call it, below the data's folder
    file: Path | bytes
    boxes: Sequence[Box] | None  # None: it has no labels
    sides: tuple[int, int] | None = None  # width and height that the annotations state


class Parts(NamedTuple):
    """The pictures of a data set. `val` and `test` are empty where they are held out of `train`."""

    train: list[Picture]
    val: list[Picture]
    test: list[Picture]
    unlabelled: list[Picture]


class Faults:
    """What is wrong with annotations: how often, and in which pictures first."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.names: dict[str, list[str]] = {}

    def add(self, fault: str, name: str) -> None:
        """Counts a fault in the picture, or annotation, of this name."""
        self.counts[fault] += 1
        names = self.names.setdefault(fault, [])
        if name not in names and len(names) <= FEW:
            names.append(name)

    def lines(self) -> list[str]:
        """Returns a line for each kind of fault."""
        return [f"{fault}: {count:,} ({first_names(self.names[fault])})" for fault, count in self.counts.items()]


def first_names(names: Sequence[str]) -> str:
    """Returns the first names of a list, and an ellipsis where there are more."""
    return ", ".join(one_line(name) for name in names[:FEW]) + (", …" if len(names) > FEW else "")


def refuse(wrong: Mapping[str, UserError]) -> None:
    """Raises the first of these errors, with how many others there are; they go by the names of their files."""
    if not wrong:
        return
    first, *others = wrong
    more = f" Others that cannot be used: {len(others):,} ({first_names(others)})." if others else ""
    raise UserError(f"{wrong[first]}{more}") from wrong[first]


def check_size(size: Sequence[int]) -> tuple[int, int]:
    """Returns `data.size` as (height, width). Raises `UserError` for any but two numbers of `SIDES`."""
    given = [size, size] if isinstance(size, int) else list(size)
    if len(given) != 2 or not all(isinstance(n, int) and SIDES[0] <= n <= SIDES[1] for n in given):
        raise UserError(
            f"data.size={size} must be [height, width] in pixels, {SIDES[0]} to {SIDES[1]} each: [96, 128]."
        )
    return given[0], given[1]


# -- boxes -------------------------------------------------------------------------------------------------------------


def clean(picture: Picture, sides: tuple[int, int], faults: Faults) -> Tensor | None:
    """Returns the boxes of a picture of these sides (width, height) as (n, 6) float32, in its pixels; None where the picture is
    of another shape than its annotation states.

    Boxes are clipped to the picture; those without area in it are left out. Both are counted in `faults`.
    """
    scale = (1.0, 1.0)
    if picture.sides is not None and picture.sides != sides:
        aspect, stated = sides[0] / sides[1], picture.sides[0] / picture.sides[1]
        if abs(aspect / stated - 1) > SHAPES:
            faults.add("Pictures of another shape than their annotation states, left out", picture.name)
            return None
        faults.add("Pictures of another size than their annotation states, whose boxes are scaled", picture.name)
        scale = (sides[0] / picture.sides[0], sides[1] / picture.sides[1])
    kept = []
    for box in picture.boxes or ():
        if not all(map(math.isfinite, box[:4])):
            faults.add("Boxes whose numbers are not finite, left out", picture.name)
        elif box.x2 < box.x1 or box.y2 < box.y1:
            faults.add("Boxes with x2 < x1 or y2 < y1, left out", picture.name)
        elif box.x2 == box.x1 or box.y2 == box.y1:
            faults.add("Boxes of no area, left out", picture.name)
        else:
            moved = [value * scale[i % 2] for i, value in enumerate(box[:4])]
            inside = [min(max(value, 0.0), float(sides[i % 2])) for i, value in enumerate(moved)]
            if inside[0] >= inside[2] or inside[1] >= inside[3]:
                faults.add("Boxes outside of their picture, left out", picture.name)
                continue
            if max(abs(a - b) for a, b in zip(moved, inside, strict=True)) > SLACK:
                faults.add("Boxes that reach outside of their picture, clipped", picture.name)
            kept.append((*inside, float(box.label), float(box.crowd)))
    return torch.tensor(kept, dtype=torch.float32).reshape(-1, COLUMNS)


# -- pictures ----------------------------------------------------------------------------------------------------------


class Decoded(NamedTuple):
    """The pictures of one part that could be read."""

    places: list[int]  # of each among those that were to be read
    pictures: list[Picture]
    images: np.ndarray  # (N, 3, H, W) uint8
    boxes: list[Tensor]  # of each (n, 6), in pixels of the image; (1, 6) NaN without labels
    hashes: list[bytes]  # of the pixels


def decoded(pictures: Sequence[Picture], size: tuple[int, int], faults: Faults) -> Decoded:
    """Returns the pictures at `size` (height, width) with their boxes; those that cannot be read are counted in `faults`."""
    images = np.empty((len(pictures), 3, *size), np.uint8)

    def read(place: int) -> tuple[tuple[int, int], tuple[int, int], bytes] | UserError:
        picture = pictures[place]
        file = picture.file if isinstance(picture.file, Path) else io.BytesIO(picture.file)
        try:
            found = letterbox(file, picture.name, 3, *size, picture.sides)
        except UserError as error:
            return error
        images[place] = found.pixels
        return found.inside, found.sides, hashlib.blake2b(images[place].tobytes(), digest_size=16).digest()

    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        found = list(pool.map(read, range(len(pictures))))
    kept, boxes, hashes = [], [], []
    for place, (picture, one) in enumerate(zip(pictures, found, strict=True)):
        if isinstance(one, UserError):
            faults.add("Pictures that cannot be read, left out", picture.name)
            continue
        inside, sides, pixels = one
        if picture.boxes is None:
            own: Tensor | None = torch.full((1, COLUMNS), torch.nan)
        else:
            own = clean(picture, sides, faults)
        if own is None:
            continue
        own[:, :4] *= torch.tensor([inside[i % 2] / sides[i % 2] for i in range(4)])
        kept.append(place)
        boxes.append(own)
        hashes.append(pixels)
    images = images if len(kept) == len(images) else images[kept]
    return Decoded(kept, [pictures[i] for i in kept], images, boxes, hashes)


def check_memory(count: int, size: tuple[int, int]) -> None:
    """Says how much memory so many pictures take, where that is much. Raises `UserError` beyond what this machine has."""
    needed, height, width = 3.0 * count * size[0] * size[1], *size
    smaller = f"data.size=[{height // 2}, {width // 2}] takes a quarter of it"
    what = f"{count:,} pictures of {height} x {width} pixels take {needed / 1e9:,.1f} GB of memory"
    has = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf
    if needed > has:
        raise UserError(f"{what}, and this machine has {has / 1e9:,.1f} GB: {smaller}.")
    if needed > LARGE:
        log.warning("%s; %s.", what, smaller)


# -- the data set ------------------------------------------------------------------------------------------------------


def as_source(
    place: str, parts: Parts, classes: Sequence[str], size: tuple[int, int], faults: Faults | None = None
) -> TensorSource:
    """Returns these pictures as a data set in memory, and logs what was read and a line for each kind of fault.

    Without pictures to test on, `TEST_SHARE` of those to train on are held out by the hash of their names. Raises `UserError`
    where no picture to train on or to test on has a box.
    """
    faults = Faults() if faults is None else faults
    check_memory(sum(map(len, parts)), size)
    drawn = not parts.test
    if drawn:
        train, tested = _held_out(parts.train)
        parts = parts._replace(train=train, test=tested)
    # One array holds all that is not tested: copies of it would be as large.
    first = decoded([*parts.train, *parts.val, *parts.unlabelled], size, faults)
    test = decoded(parts.test, size, faults)
    ends = [len(parts.train), len(parts.train) + len(parts.val)]
    ranges = [sum(place < end for place in first.places) for end in ends]
    boxes = {"train on": first.boxes[: ranges[0]], "validate": first.boxes[ranges[0] : ranges[1]], "test": test.boxes}
    _introduce(place, boxes, len(first.boxes) - ranges[1], classes, drawn, faults)
    _warn_of_copies(first, test, ranges[0])

    def show(split: str, i: int) -> str:
        return one_line((test if split == "test" else first).pictures[i].name)

    return TensorSource(
        TensorSplit(torch.from_numpy(first.images), padded(first.boxes)),
        TensorSplit(torch.from_numpy(test.images), padded(test.boxes)),
        tuple(classes),
        Modality(),
        torch.arange(*ranges) if boxes["validate"] else None,
        show=show,
        geometry="boxes",
    )


def _held_out(pictures: list[Picture]) -> tuple[list[Picture], list[Picture]]:
    """Returns the others and `TEST_SHARE` of the pictures, by the hash of their names, in their order."""
    hashes = [hashlib.sha256(os.fsencode(picture.name)).digest() for picture in pictures]
    count = max(1, round(TEST_SHARE * len(pictures)))
    tested = set(sorted(range(len(pictures)), key=hashes.__getitem__)[:count])
    both: tuple[list[Picture], list[Picture]] = ([], [])
    for i, picture in enumerate(pictures):
        both[i in tested].append(picture)
    return both


def _introduce(
    place: str, parts: Mapping[str, list[Tensor]], without: int, classes: Sequence[str], drawn: bool, faults: Faults
) -> None:
    """Logs what was read in two lines, and each kind of fault in one. Raises `UserError` for a part without any box."""
    boxes = {part: torch.cat([torch.zeros(0, COLUMNS), *found]) for part, found in parts.items()}
    for part in ("train on", "test"):
        if not len(boxes[part]):
            why = "".join(f"\n  - {line}" for line in faults.lines())
            raise UserError(f"{place} has no box to {part}: there is nothing to learn or to measure.{why}")
    labels = torch.cat(list(boxes.values()))[:, LABEL].long()
    counts = torch.bincount(labels, minlength=len(classes)).tolist()
    named = ", ".join(f"{one_line(name)} {count:,}" for name, count in list(zip(classes, counts, strict=True))[:SOME])
    more = f" and {len(classes) - SOME} classes more" if len(classes) > SOME else ""
    total = sum(len(found) for found in parts.values())
    shares = [f"{len(found):,} to {part}" for part, found in parts.items() if found]
    shares[-1] += f" (a fifth, by the hash of their names: {place} names none)" * drawn
    shares += [f"{without:,} without labels"] * bool(without)
    empty = sum(not len(own) for found in parts.values() for own in found)
    learned = torch.bincount(boxes["train on"][:, LABEL].long(), minlength=len(classes)).tolist()
    unseen = [name for name, count in zip(classes, learned, strict=True) if not count]
    lines = [
        f"Read {place}: {quantity(total, 'picture')}, {quantity(len(labels), 'box')}: {named}{more}.",
        f"Splits: {', '.join(shares)}." + f" {empty:,} without objects train as background." * bool(empty),
    ]
    told = [f"Classes without a box to train on: {len(unseen)} ({first_names(unseen)})"] * bool(unseen)
    say(lines, [*faults.lines(), *told])


def _warn_of_copies(train: Decoded, test: Decoded, count: int) -> None:
    """Warns of pictures to test on that are among the first `count` to train on."""
    trained = dict(zip(train.hashes[:count], train.pictures[:count], strict=True))
    pairs = [(p.name, trained[h].name) for h, p in zip(test.hashes, test.pictures, strict=True) if h in trained]
    if pairs:
        log.warning(
            "%s a training picture too, pixel by pixel, such as %s and %s. What is measured on them is too good to be true: "
            "remove them from one of the two.",
            f"{quantity(len(pairs), 'test picture')} {'is' if len(pairs) == 1 else 'are each'}",
            *map(one_line, pairs[0]),
        )


# -- classes -----------------------------------------------------------------------------------------------------------


def chosen(asked: Sequence[str] | None, found: Iterable[str]) -> tuple[str, ...]:
    """Returns the classes in the order of the outputs: those that are asked for, by `data.classes`, or all that were found.

    Raises `UserError` for one that was not found.
    """
    known = tuple(dict.fromkeys(found))
    if asked is None:
        return known
    names = [str(name) for name in asked]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            meant = f"did you mean {one_line(near[0])}?" if near else f"there are {first_names(known)}."
            raise UserError(f"data.classes: there is no class {one_line(name)}; {meant}")
    return tuple(dict.fromkeys(names))
