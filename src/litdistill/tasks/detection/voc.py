"""Pictures with boxes of one's own, annotated in PASCAL VOC's form: an XML file a picture.

    python scripts/train.py data=voc data.root=<folder> task=detection net@student=fcos_slim net@teacher=fcos_slim

The folder, or one below it such as `VOCdevkit/VOC2007`, holds `Annotations/*.xml`, `JPEGImages/*` and, if you like, the lists
`ImageSets/Main/train.txt`, `val.txt` and `test.txt` of names. `difficult` is neither trained on nor counted. VOC counts pixels
from 1 and includes the last; where a coordinate is 0, the set is taken to count from 0.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from litdistill.data.decode import extensions
from litdistill.data.tensors import TensorData, TensorSource
from litdistill.tasks.detection.annotated import (
    Box,
    Faults,
    Parts,
    Picture,
    as_source,
    check_size,
    chosen,
    first_names,
    refuse,
)
from litdistill.tasks.detection.coco import without_labels
from litdistill.utils.errors import UserError
from litdistill.utils.text import one_line

LONGEST = 2**20  # bytes of an annotation
DEEPEST = 16  # elements inside each other
PARTS = {"train": ("train", "trainval"), "validation": ("val", "valid"), "test": ("test",)}


def voc(
    root: str | Path | None = None,
    train: str | None = None,
    validation: str | None = None,
    test: str | None = None,
    unlabelled: str | None = None,
    classes: Sequence[str] | None = None,
    size: Sequence[int] = (320, 320),
    **options: Any,
) -> TensorData:
    """Returns the pictures of a VOC tree with their boxes.

    Args:
        root: the folder. train, validation, test: names of lists in `ImageSets/Main`; None: train, or trainval without it; val;
            test. Without lists all pictures are trained on, validated and tested; without one to test on, a fifth of those to
            train on are held out by the hash of their names; without one to validate on, `val_size` of them.
        unlabelled: a folder of further pictures to train on without labels.
        classes: names in the order of the outputs; None: all, sorted. size: (height, width) in pixels.
        options: those of `TensorData`.
    """
    if root is None:
        raise UserError("data=voc needs a folder with Annotations, JPEGImages and ImageSets: data.root=<folder>.")
    lists = {"train": train, "validation": validation, "test": test}
    read = functools.partial(_read, Path(root), lists, unlabelled, classes, check_size(size))
    return TensorData(read, "voc", "detection", standardize=True, **options)


class Tree(NamedTuple):
    """The files of a VOC tree by the names of its pictures, without extension."""

    annotations: Mapping[str, Path | bytes]
    pictures: Mapping[str, Path | bytes]
    lists: Mapping[str, str]  # the text of each list of names


def _read(
    root: Path,
    named: Mapping[str, str | None],
    unlabelled: str | None,
    classes: Sequence[str] | None,
    size: tuple[int, int],
) -> TensorSource:
    return source_of(one_line(root), on_disk(root), named, without_labels(root, unlabelled), classes, size)


def on_disk(root: Path) -> Tree:
    """Returns the files of the VOC tree in a folder, or in the only one below it that is one."""
    if not root.is_dir():
        raise UserError(f"There is no folder {one_line(root)}. Set data.root to the folder that holds Annotations.")
    trees = [root] if (root / "Annotations").is_dir() else sorted(p.parent for p in root.glob("*/Annotations"))
    trees = trees or sorted(p.parent for p in root.glob("*/*/Annotations"))
    if len(trees) != 1:
        many = f"{len(trees)} folders with Annotations ({first_names([p.name for p in trees])})" if trees else "none"
        raise UserError(
            f"{one_line(root)} holds {many}: set data.root to the folder that holds Annotations and JPEGImages."
        )
    (tree,) = trees
    pictures = sorted(p for p in (tree / "JPEGImages").glob("*") if p.suffix.lower() in extensions())
    return Tree(
        {path.stem: path for path in sorted((tree / "Annotations").glob("*.xml"))},
        {path.stem: path for path in pictures},
        {path.stem: path.read_text("utf-8", "replace") for path in sorted((tree / "ImageSets/Main").glob("*.txt"))},
    )


def source_of(
    place: str,
    tree: Tree,
    named: Mapping[str, str | None],
    unlabelled: list[Picture],
    classes: Sequence[str] | None,
    size: tuple[int, int],
) -> TensorSource:
    """Returns the data set of a VOC tree. Raises `UserError` for one without annotations, and for a list that is not there."""
    if not tree.annotations:
        raise UserError(f"{place} has no Annotations/*.xml: there is nothing to learn.")
    parts = _parts(place, tree, named)
    faults = Faults()
    listed = list(dict.fromkeys(name for names in parts.values() for name in names))
    found: dict[str, Annotation] = {}
    broken: dict[str, UserError] = {}
    for name in listed:
        if name not in tree.annotations:
            faults.add("Pictures that are listed and have no annotation, left out", name)
        elif name not in tree.pictures:
            faults.add("Annotations without a picture, left out", name)
        else:
            try:
                found[name] = read_annotation(tree.annotations[name], f"{name}.xml")
            except UserError as error:
                broken[name] = error
    refuse(broken)
    for name in tree.pictures:
        if name not in tree.annotations:
            faults.add("Pictures without an annotation, left out (data.unlabelled=<folder>)", name)
    objects = [one for annotation in found.values() for one in annotation.objects]
    names = chosen(classes, sorted({one.name for one in objects}))
    first = 0 if any(min(one.box[:2]) == 0 for one in objects) else 1  # the number of the first pixel
    pictures = {name: _picture(name, tree, one, names, first, faults) for name, one in found.items()}
    train, val, test = ([pictures[name] for name in parts.get(part, ()) if name in pictures] for part in PARTS)
    return as_source(place, Parts(train, val, test, unlabelled), names, size, faults)


def _parts(place: str, tree: Tree, named: Mapping[str, str | None]) -> dict[str, list[str]]:
    """Returns the names of the pictures of each part."""
    lists: dict[str, str] = {}
    for part, words in PARTS.items():
        asked = named.get(part)
        if asked is not None:
            if asked.removesuffix(".txt") not in tree.lists:
                known = f"there are {first_names(list(tree.lists))}" if tree.lists else "there is none"
                raise UserError(f"data.{part}={one_line(asked)} is no list of {place}/ImageSets/Main: {known}.")
            lists[part] = asked.removesuffix(".txt")
        elif word := next((word for word in words if word in tree.lists), None):
            lists[part] = word
    if "train" not in lists:
        return {"train": sorted(tree.annotations)}
    # The first word of a line: lists of a class have 1 or -1 behind it.
    return {
        part: [line.split()[0] for line in tree.lists[name].splitlines() if line.strip()]
        for part, name in lists.items()
    }


def _picture(name: str, tree: Tree, one: Annotation, classes: Sequence[str], first: int, faults: Faults) -> Picture:
    boxes = []
    for label, (x1, y1, x2, y2), difficult in one.objects:
        if label not in classes:
            faults.add("Boxes of classes that data.classes leaves out", name)
        elif x1 == x2 or y1 == y2:  # as it is written, whichever pixel is the first
            faults.add("Boxes of no area, left out", name)
        else:
            boxes.append(Box(x1 - first, y1 - first, x2, y2, classes.index(label), difficult))
    return Picture(name, tree.pictures[name], boxes, one.sides)


# -- one annotation ----------------------------------------------------------------------------------------------------


class Object(NamedTuple):
    """An object as its file describes it."""

    name: str
    box: tuple[float, float, float, float]  # xmin, ymin, xmax, ymax
    difficult: bool


class Annotation(NamedTuple):
    """The objects of a picture, and the width and height that are stated."""

    objects: list[Object]
    sides: tuple[int, int] | None


def read_annotation(file: Path | bytes, name: str) -> Annotation:
    """Returns what an XML file says. Raises `UserError` with its name for one that is none, or declares a document type."""
    try:
        content = file.read_bytes() if isinstance(file, Path) else file
        root = parse(content)
        sides = tuple(int(float(root.findtext(f"size/{side}") or 0)) for side in ("width", "height"))
        objects = []
        for one in root.iterfind("object"):
            label = (one.findtext("name") or "").strip()
            corners = [one.findtext(f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax")]
            if not label or None in corners:
                raise ValueError("an object has no name, or no bndbox of xmin, ymin, xmax and ymax")
            x1, y1, x2, y2 = (float(corner or math.nan) for corner in corners)
            objects.append(Object(label, (x1, y1, x2, y2), (one.findtext("difficult") or "0").strip() == "1"))
    except (OSError, ValueError, OverflowError, expat.ExpatError) as error:
        raise UserError(
            f"The annotation {one_line(name)} cannot be read ({error}). Mend it, or leave it out."
        ) from error
    return Annotation(objects, (sides[0], sides[1]) if min(sides) > 0 else None)


def parse(content: bytes) -> Element:
    """Returns the root of an XML document.

    Raises `ValueError` for a document type, by which entities are declared that name files or grow without limit, and for one
    that is longer or deeper than any annotation.
    """
    if len(content) > LONGEST:
        raise ValueError(f"it has {len(content):,} bytes, and an annotation has {LONGEST:,} at most")
    builder, depth = TreeBuilder(), 0
    parser = expat.ParserCreate()

    def refuse(*_: Any) -> None:
        raise ValueError("it declares a document type, as no annotation does")

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > DEEPEST:
            raise ValueError("its elements are nested deeper than any annotation's")
        builder.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(tag)

    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = builder.data
    parser.Parse(content, True)
    return builder.close()
