"""Pictures with boxes of one's own, annotated in COCO's form: a JSON file, or one a split, and a folder of pictures.

    python scripts/train.py data=coco data.root=<folder> task=detection net@student=fcos_slim net@teacher=fcos_slim

The JSON files are found by the words train, val or valid, and test in their name or that of their folder, as COCO's own
(`annotations/instances_train2017.json`) and Roboflow's (`train/_annotations.coco.json`) are, or named by `data.train`,
`data.validation` and `data.test`. Boxes are `bbox` (x, y, width, height); `iscrowd` is neither trained on nor counted.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from litdistill.data.listing import list_images
from litdistill.data.tensors import TensorData, TensorSource
from litdistill.tasks.detection.annotated import Box, Faults, Parts, Picture, as_source, check_size, chosen, first_names
from litdistill.utils.errors import UserError
from litdistill.utils.text import one_line

WORDS = {"train": "train", "validation": r"val(id(ation)?)?", "test": "test"}
# COCO's other annotations.
OTHERS = re.compile(r"^(captions|person_keypoints|panoptic|stuff|image_info)", re.IGNORECASE)
LONGEST = 2**31  # pixels of a side that annotations may state
LOOKED_AT = 20  # pictures by which the folder is found


def coco(
    root: str | Path | None = None,
    train: str | None = None,
    validation: str | None = None,
    test: str | None = None,
    images: str | None = None,
    unlabelled: str | None = None,
    classes: Sequence[str] | None = None,
    size: Sequence[int] = (320, 320),
    **options: Any,
) -> TensorData:
    """Returns the pictures of a folder with the boxes of COCO files.

    Args:
        root: the folder. train, validation, test: JSON files, below it or by their path; None: found by their names. Without
            one to test on, a fifth of the pictures to train on are held out by the hash of their names; without one to validate
            on, `val_size` of them.
        images: the folder of the pictures; None: found among those of the JSON file and of `root`.
        unlabelled: a folder of further pictures to train on without labels.
        classes: names of categories in the order of the outputs; None: all, by their id. size: (height, width) in pixels.
        options: those of `TensorData`.
    """
    files = {"train": train, "validation": validation, "test": test}
    read = functools.partial(_read, root, files, images, unlabelled, classes, check_size(size))
    return TensorData(read, "coco", "detection", standardize=True, **options)


def _read(
    place: str | Path | None,
    named: dict[str, str | None],
    images: str | None,
    unlabelled: str | None,
    classes: Sequence[str] | None,
    size: tuple[int, int],
) -> TensorSource:
    if place is None:
        raise UserError("data=coco needs the folder of the pictures and their JSON files: data.root=<folder>.")
    root = Path(place)
    if not root.is_dir():
        raise UserError(
            f"There is no folder {one_line(root)}. Set data.root to the folder of the pictures and JSON files."
        )
    files = {part: _below(root, path, f"data.{part}") for part, path in named.items() if path is not None}
    files = files or find_files(root)
    if "train" not in files:
        raise UserError(f"{one_line(root)} has no JSON file to train on: data.train=<file>.")
    faults, found = Faults(), {part: Annotations(path) for part, path in files.items()}
    names = chosen(classes, [name for annotated in found.values() for name in annotated.categories.values()])
    pictures, folders = {}, set()
    for part, annotated in found.items():
        folder = _folder(root, annotated, part) if images is None else _below(root, images, "data.images")
        pictures[part] = annotated.pictures(folder, names, classes is not None, faults)
        folders.add(folder)
    without = without_labels(root, unlabelled)
    _check_unlisted(folders, {p.file for some in (*pictures.values(), without) for p in some}, faults)
    first, val, tested = (pictures.get(part, []) for part in WORDS)
    parts = Parts(first, val, tested, without)
    return as_source(one_line(root), parts, names, size, faults)


def without_labels(root: Path, folder: str | None) -> list[Picture]:
    """Returns the pictures of `data.unlabelled`, at any depth. Raises `UserError` where there are none."""
    if folder is None:
        return []
    place = _below(root, folder, "data.unlabelled")
    found = list_images(place).files if place.is_dir() else []
    if not found:
        raise UserError(f"data.unlabelled={one_line(folder)} is no folder with pictures.")
    return [Picture(file.path.relative_to(place).as_posix(), file.path, None) for file in found]


def _below(root: Path, path: str, option: str) -> Path:
    """Returns a path of an option, which is below `root` or stands for itself. Raises `UserError` where there is nothing."""
    for place in (root / path, Path(path)):
        if place.exists():
            return place
    raise UserError(f"{option}={one_line(path)}: there is nothing of that name, neither in {one_line(root)} nor here.")


def find_files(root: Path) -> dict[str, Path]:
    """Returns the JSON file of each part by the words in its name or its folder's. Raises `UserError` for none, or two."""
    every = sorted(path for path in (*root.glob("*.json"), *root.glob("*/*.json")) if not OTHERS.match(path.name))
    if not every:
        raise UserError(
            f"{one_line(root)} holds no JSON file, nor do its subfolders: name it, data.train=<file>, or use data=voc."
        )
    found: dict[str, Path] = {}
    for path in every:
        for part, word in WORDS.items():
            text = path.relative_to(root).as_posix().lower()
            if re.search(rf"(?<![a-z]){word}(?![a-z])", text):
                if part in found:
                    raise UserError(
                        f"{one_line(found[part])} and {one_line(path)} are both of {part} by their names: name one of them, "
                        f"data.{part}=<file>."
                    )
                found[part] = path
                break
    if not found and len(every) == 1:
        return {"train": every[0]}
    if not found:
        raise UserError(
            f"{one_line(root)} has {len(every)} JSON files, and no name says which is to train on: data.train=<file> "
            f"({first_names([path.name for path in every])})."
        )
    return found


# -- one file ----------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A picture as its file lists it."""

    name: str
    sides: tuple[int, int] | None


class Annotations:
    """A JSON file of COCO's form, checked. Raises `UserError` for a file of another form, without pictures or annotations."""

    def __init__(self, path: Path):
        self.path = path
        whole = read_json(path)
        lists = {
            key: whole.get(key) if isinstance(whole, dict) else None for key in ("images", "annotations", "categories")
        }
        for key, value in lists.items():
            if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
                raise self._wrong(f"has no list of {key}: it is no COCO file of boxes")
            if not value:
                raise self._wrong(f"has no {key}: there is nothing to learn from it, nor to measure on it")
        self.categories = self._names(lists["categories"])
        self.images: dict[Any, Entry] = {}
        self._list_images(lists["images"])
        self.annotations: list[dict[str, Any]] = lists["annotations"]  # type: ignore[assignment]

    def _wrong(self, what: str) -> UserError:
        return UserError(f"{one_line(self.path)} {what}.")

    def _names(self, categories: Any) -> dict[Any, str]:
        found: dict[Any, str] = {}
        for one in categories:
            if not _is_id(one.get("id")) or not isinstance(one.get("name"), str):
                raise self._wrong("has a category without id and name")
            if found.setdefault(one["id"], one["name"]) != one["name"]:
                raise self._wrong(f"has two categories of id {one['id']}: {found[one['id']]} and {one['name']}")
        twice = [name for name in found.values() if list(found.values()).count(name) > 1]
        if twice:
            raise self._wrong(f"has two categories of the name {one_line(twice[0])}: merge them")
        return dict(sorted(found.items(), key=lambda pair: (isinstance(pair[0], str), pair[0])))

    def _list_images(self, images: Any) -> None:
        files: dict[str, Any] = {}
        for one in images:
            if not _is_id(one.get("id")) or not isinstance(one.get("file_name"), str):
                raise self._wrong("has a picture without id and file_name")
            name = one["file_name"].replace("\\", "/")
            path = PurePosixPath(name)
            if not path.name:
                raise self._wrong(f"has a picture without a name, of id {one_line(one['id'])}")
            if path.is_absolute() or ".." in path.parts or ":" in path.parts[0] or "\0" in name:
                raise self._wrong(f"names the picture {one_line(name)}, which leads out of its folder")
            sides = (one.get("width"), one.get("height"))
            entry = Entry(name, sides if all(type(n) is int and 0 < n < LONGEST for n in sides) else None)
            if self.images.setdefault(one["id"], entry) != entry:
                first = one_line(self.images[one["id"]].name)
                raise self._wrong(f"has two pictures of id {one['id']}: {first} and {one_line(name)}. Number them anew")
            if files.setdefault(name, one["id"]) != one["id"]:
                raise self._wrong(f"lists the picture {one_line(name)} under two ids. Leave one of them out")

    def pictures(self, folder: Path, classes: Sequence[str], some: bool, faults: Faults) -> list[Picture]:
        """Returns the pictures in this folder with their boxes; `some`: whether `classes` are not all that there are."""
        boxes: dict[Any, list[Box]] = {number: [] for number in self.images}
        label_of = {number: classes.index(name) for number, name in self.categories.items() if name in classes}
        seen: set[tuple[Any, ...]] = set()
        ids: set[Any] = set()
        for one in self.annotations:
            number, category, box = one.get("image_id"), one.get("category_id"), one.get("bbox")
            if not _is_id(number) or number not in self.images:
                faults.add("Boxes of pictures that their file does not list, left out", f"image_id {number}")
                continue
            name = self.images[number].name
            if not _is_id(category) or category not in self.categories:
                faults.add("Boxes of categories that their file does not list, left out", f"{name}: {category}")
            elif category not in label_of:
                assert some
                faults.add("Boxes of categories that data.classes leaves out", name)
            elif not isinstance(box, list) or len(box) != 4 or not all(type(v) in (int, float) for v in box):
                faults.add("Annotations without a bbox of four numbers, left out", name)
            elif (same := (number, category, *box)) in seen:
                faults.add("Boxes that are listed twice, kept once", name)
            else:
                if _is_id(one.get("id")) and one["id"] in ids:
                    faults.add("Boxes under an id that another has, kept", name)
                seen.add(same)
                ids.add(one.get("id") if _is_id(one.get("id")) else None)
                x, y, width, height = (_float(v) for v in box)
                boxes[number].append(
                    Box(x, y, x + width, y + height, label_of[category], one.get("iscrowd") in (1, True))
                )
        made = []
        for number, (name, sides) in self.images.items():
            if _is_file(folder / name):
                made.append(Picture(name, folder / name, boxes[number], sides))
            else:
                faults.add("Pictures that are listed and are not there, left out", name)
        return made


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a name that is longer than any can be
        return False


def _is_id(value: object) -> bool:
    return type(value) in (int, str)


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # JSON's whole numbers have no limit
        return math.inf


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file. Raises `UserError` where it is none, or is nested deeper than any annotations are."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise UserError(f"{one_line(path)} is nested deeper than any annotations are.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{one_line(path)} cannot be read as JSON: {error}") from error


# -- where the pictures are --------------------------------------------------------------------------------------------


def _folder(root: Path, annotated: Annotations, part: str) -> Path:
    """Returns the folder that holds most of the first pictures of a file. Raises `UserError` where none has any."""
    path, names = annotated.path, [entry.name for entry in annotated.images.values()][:LOOKED_AT]
    split = re.sub(r"^(instances|_?annotations?)[_.]?|[_.]?(coco|annotations?)$", "", path.stem)
    candidates = [path.parent, path.parent / "images", root, root / "images", root / "JPEGImages"]
    candidates += [base / word for base in (root, root / "images") for word in (split, part) if word]
    places = [place for place in dict.fromkeys(candidates) if place.is_dir()]
    hits = [sum(_is_file(place / name) for name in names) for place in places]
    if not max(hits):
        raise UserError(
            f"None of the pictures of {one_line(path)}, such as {one_line(names[0])}, is in "
            f"{first_names(list(map(str, places)))}: data.images=<folder>."
        )
    return places[hits.index(max(hits))]


def _check_unlisted(folders: set[Path], listed: set[Any], faults: Faults) -> None:
    """Counts the pictures in and below these folders that no annotation lists."""
    for folder in sorted(folders):
        for file in list_images(folder).files:
            if file.path not in listed:
                listed.add(file.path)
                faults.add("Pictures that no annotation lists, left out (data.unlabelled=<folder>)", file.path.name)
