"""Which folders of a user's data set are its splits, whatever they are called (Training, test_set), and which its classes."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from litdistill.data.listing import IMAGES, Kind, class_folders, list_images
from litdistill.utils.errors import UserError
from litdistill.utils.text import one_line

NAMES = {
    "train": {"train", "training", "trn"},
    "val": {"val", "valid", "validation", "validate", "dev"},
    "test": {"test", "testing", "tst"},
}
FILLERS = {"set", "data", "dataset", "images", "imgs", "split", "folder"}  # "training_set", "test-images"
FEW = 5  # names in a message


class Layout(NamedTuple):
    """The folders of a data set's splits; the classes lie in each. `train` is the root where there is no folder of splits."""

    train: Path
    val: Path | None
    test: Path | None
    skipped: Counter[str]  # what lies beside the splits, by reason


def find_splits(root: Path, kind: Kind = IMAGES) -> Layout:
    """Finds the splits of the data set in `root`.

    A folder is a split if it is called as one and its subfolders hold images, so that classes may be called "train" or "test".
    Raises `UserError` for two folders of one split, a test or validation set without a training set, splits without class
    folders, and for folders that look like several data sets side by side.
    """
    folders, skipped = class_folders(root, kind)
    called = {path: split_name(path.name) for path in folders}
    with_classes = {path: subfolders_with_images(path, kind) for path in folders}
    splits = {path: name for path, name in called.items() if name is not None and with_classes[path]}
    by_name: dict[str, Path] = {}
    for path, name in splits.items():
        if name in by_name:
            raise UserError(
                f"{_shown(root)} has two folders for one split: {_shown(by_name[name].name)} and {_shown(path.name)}. "
                "Keep one of them there, or merge them."
            )
        by_name[name] = path
    if "train" in by_name:
        for path in folders:
            if path not in splits and (count := len(list_images(path, kind).files)):
                bare = " without class folders" if called[path] else f" beside {_shown(by_name['train'].name)}"
                skipped[f"in {_shown(path.name)}{bare}"] += count
        return Layout(by_name["train"], by_name.get("val"), by_name.get("test"), skipped)
    classes = {path.name for path in folders if path not in splits}
    for path in splits:
        if not classes or {inner.name for inner in with_classes[path]} & classes:  # else it is a class with subfolders
            raise UserError(
                f"{_shown(root)} has a folder {_shown(path.name)} with classes in it and none called train. "
                f"Move the classes to train on into {_shown(root / 'train')}."
            )
    flat = [path for path, name in called.items() if name is not None and not with_classes[path]]
    if len(flat) > 1 and len(flat) == len(folders):
        raise UserError(
            f"{_names(flat)} in {_shown(root)} look like splits and hold no class folders. Sort their {kind.noun}s into "
            f"folders named after the classes: {_shown(flat[0].name)}/<class>/."
        )
    _refuse_data_sets_side_by_side(root, folders, with_classes, kind)
    return Layout(root, None, None, Counter())  # whoever reads the classes counts what lies beside them


def split_name(name: str) -> str | None:
    """Returns "train", "val" or "test" for a folder that is called like one in any case, else None."""
    words = [word for word in re.split(r"[^a-z]+", name.lower()) if word and word not in FILLERS]
    word = "".join(words)
    for filler in ("set", "data"):
        word = word.removesuffix(filler) or word
    return next((split for split, names in NAMES.items() if word in names), None)


def subfolders_with_images(folder: Path, kind: Kind = IMAGES) -> list[Path]:
    """Returns the subfolders of a folder in which images, or files of another kind, lie at any depth."""
    return [path for path in class_folders(folder, kind)[0] if has_images(path, kind)]


def has_images(folder: Path, kind: Kind = IMAGES) -> bool:
    """Returns whether a file of that kind lies in the folder or below it; mostly after a look at one file."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if Path(entry.name).suffix.lower() in kind.extensions() and entry.name[0] != "." and entry.is_file():
                return True
    return bool(list_images(folder, kind).files)


def _refuse_data_sets_side_by_side(root: Path, folders: list[Path], inner: dict[Path, list[Path]], kind: Kind) -> None:
    """Raises `UserError` where all folders hold the same subfolders with files of that kind, as several data sets do."""
    names = [{path.name for path in inner[folder]} for folder in folders]
    if len(folders) < 2 or len(names[0]) < 2 or any(one != names[0] for one in names):
        return
    shown = _names(inner[folders[0]])
    if all(split_name(name) for name in names[0]):
        raise UserError(
            f"{_names(folders)} in {_shown(root)} each hold {shown}: splits lie outside and classes inside. Move the "
            f"{kind.noun}s to {_shown(inner[folders[0]][0].name)}/{_shown(folders[0].name)} and so on."
        )
    raise UserError(
        f"{_names(folders)} in {_shown(root)} each hold the folders {shown}, so they look like data sets side by side, and not "
        f"like classes. Rename them to train and test, or set data.root to one of them; if they are classes, move their images "
        f"out of these subfolders."
    )


def _names(paths: list[Path]) -> str:
    shown = [_shown(path.name) for path in paths[:FEW]]
    if len(paths) > FEW:
        return f"{', '.join(shown)} and {len(paths) - FEW} more"
    return f"{', '.join(shown[:-1])} and {shown[-1]}" if len(shown) > 1 else shown[0]


def _shown(name: Path | str) -> str:
    return one_line(name)
