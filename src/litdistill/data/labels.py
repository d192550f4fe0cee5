"""Pictures whose labels stand in a table: a class, several labels of 0 and 1, or numbers for each file.

    python scripts/train.py data=folder data.root=photos data.labels=photos/labels.csv

`labels.csv` holds a column of file names (`file`, `image`, …) relative to `data.root`, columns of labels, all others unless
`data.target` names some, and, where you like, a column `split` of train, val and test.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from litdistill.data.columns import Table, listed, read_table
from litdistill.data.duplicates import copies
from litdistill.data.folder import TEST_SHARE, Images, Labeled, say
from litdistill.data.layout import split_name
from litdistill.data.listing import ImageFile, describe_kinds, describe_skipped, list_images
from litdistill.data.targets import read_targets
from litdistill.utils.errors import UserError
from litdistill.utils.text import one_line
from litdistill.utils.units import quantity

log = logging.getLogger(__name__)

FILES = {  # names of a column of file names, in lower case
    *("file", "files", "filename", "file_name", "file name", "filepath", "file_path", "path", "image", "images"),
    *("image_path", "image_name", "image_file", "img", "img_path", "photo", "picture", "name", "id", "image_id"),
}
SPLIT = "split"


def read_labeled(
    root: Path, labels: str | Path, target: Sequence[str] | str | None = None, task: str | None = None
) -> Images:
    """Returns the images that the table `labels` names, with their targets, and says what is read and left out.

    `target`: its columns of labels; all but those of names and splits unless given. `task`: classification, multilabel or
    regression, in place of what the columns look like. Without a column `split`, and where not every name starts with the
    folder of a split, a fifth (of each class) is the test set: the names with the lowest SHA-256.
    Raises `UserError` for a table that cannot be read or does not fit the files: a name without a file, a row without a label,
    a file with two labels.
    """
    if not root.is_dir():
        raise UserError(f"There is no folder {one_line(root)}. Set data.root to the folder of the pictures.")
    place = labels_file(root, labels)
    table = read_table(place, "data.labels")
    names, columns = _columns(table, target)
    found = list_images(root)
    files = _found(table, names, root, found.files)
    targets = read_targets(table, columns, task)
    by_class = targets.task == "classification"
    _refuse_gaps(table, columns)
    label_of = _one_label_a_file(table, files, targets.values)
    left_out = Counter(
        {"not in the table (data.unlabelled=<folder> trains on those too)": len(found.files) - len(label_of)}
    )
    left_out += found.skipped - Counter({_kind_of(place): 1} if place.is_relative_to(root) else {})
    split_of = _splits(table, files, root)
    if split_of is None:
        label_of = _without_copies(label_of, left_out)
        split_of = _drawn(label_of, root, by_class)
        how = f"a fifth is the test set{' of each class' if by_class else ''}: no column '{SPLIT}'"
    else:
        _warn_of_leaks(label_of, split_of)
        how = "as given"
    splits: dict[str, Labeled] = {
        name: [(f, label_of[f]) for f in sorted(label_of) if split_of[f] == name] for name in PARTS
    }
    if not splits["train"] or not splits["test"]:
        missing = "train" if not splits["train"] else "test"
        raise UserError(
            f"{one_line(place)} gives no {missing} image in its column '{SPLIT}'. Mark some, or remove the column."
        )
    counts = ", ".join(f"{len(part):,} to {PARTS[name]}" for name, part in splits.items() if part)
    say(
        [
            f"Read {one_line(place)}: {quantity(len(label_of), 'image')} of {one_line(root)} ({describe_kinds(label_of)}).",
            *targets.said,
            f"Splits: {counts} ({how}).",
        ],
        describe_skipped(left_out),
    )
    return Images(targets.names, splits["train"], splits["val"], splits["test"], targets.task)


def labels_file(root: str | Path, labels: str | Path) -> Path:
    """Returns the path of the table: as it is given, where that is a file, else below the root."""
    return Path(labels) if Path(labels).is_file() else Path(root, labels)


PARTS = {"train": "train on", "val": "validate", "test": "test"}
Label = int | tuple[float, ...]


def _kind_of(path: Path) -> str:
    return one_line(path.suffix.lower())


def _columns(table: Table, target: Sequence[str] | str | None) -> tuple[str, list[str]]:
    """Returns the column of file names, and those of labels."""
    path = one_line(table.path)
    names = next((name for name in table.columns if name.lower() in FILES), None)
    if names is None:
        raise UserError(
            f"{path} has the columns {listed(list(table.columns))}, and none of file names: call one of them file."
        )
    if target is not None:
        columns = [target] if isinstance(target, str) else list(target)
        for name in columns:
            table.column(name, "data.target")
    else:
        columns = [name for name in table.columns if name != names and name.lower() != SPLIT]
    if not columns or names in columns:
        raise UserError(f"{path} has no column of labels beside {one_line(names)}. Add one, or several of 0 and 1.")
    return names, columns


def _found(table: Table, names: str, root: Path, images: Sequence[ImageFile]) -> list[ImageFile]:
    """Returns the file of each row: at its path below the root, else the only one of its name, with its suffix or without."""
    by_path = {image.path.relative_to(root).as_posix(): image for image in images}
    by_name: dict[str, list[ImageFile]] = {}
    for image in images:
        for name in {image.path.name, image.path.stem}:
            by_name.setdefault(name, []).append(image)
    files, missing = [], []
    for row, text in enumerate(table.columns[names]):
        if not text:
            raise UserError(f"{table.where(row)}: no file name in column {one_line(names)}.")
        path = PurePosixPath(text.replace("\\", "/")).as_posix()
        some = [by_path[path]] if path in by_path else by_name.get(path, []) if "/" not in path else []
        if len(some) > 1:
            raise UserError(
                f"{table.where(row)}: {len(some)} files are called {one_line(path)}, such as "
                f"{one_line(some[0].path)} and {one_line(some[1].path)}. Write their paths below {one_line(root)}."
            )
        files += some
        if not some:
            missing.append((row, path))
    if missing:
        row, path = missing[0]
        near = difflib.get_close_matches(path, by_path, 1)
        meant = f"; did you mean {one_line(near[0])}?" if near else "."
        raise UserError(
            f"{one_line(table.path)} names {quantity(len(missing), 'file')} of {len(table):,} that are not in "
            f"{one_line(root)}, first {one_line(path)} ({table.place(row)}){meant} Remove those rows, or set data.root to the "
            "folder that the names are relative to."
        )
    return files


def _refuse_gaps(table: Table, columns: Sequence[str]) -> None:
    for name in columns:
        gaps = [row for row, value in enumerate(table.columns[name]) if value == ""]
        if gaps:
            raise UserError(
                f"{one_line(table.path)}: {quantity(len(gaps), 'row')} of {len(table):,} have no {one_line(name)}, first "
                f"{table.place(gaps[0])}. Remove those rows: data.unlabelled=<folder> trains on pictures without labels."
            )


def _one_label_a_file(table: Table, files: Sequence[ImageFile], values: np.ndarray) -> dict[ImageFile, Label]:
    """Returns the target of each file. Raises `UserError` for a file with two different ones."""
    row_of: dict[ImageFile, int] = {}
    for row, file in enumerate(files):
        first = row_of.setdefault(file, row)
        if not np.array_equal(values[first], values[row]):
            raise UserError(
                f"{one_line(table.path)}: {one_line(file.path.name)} has one label in {table.place(first)} and another in "
                f"{table.place(row)}. Keep one of these rows."
            )
    return {file: int(values[row]) if values.ndim == 1 else tuple(values[row].tolist()) for file, row in row_of.items()}


def _splits(table: Table, files: Sequence[ImageFile], root: Path) -> dict[ImageFile, str] | None:
    """Returns the split of each file, of the column `split` or of the folder that it lies in; None where neither says it."""
    column = next((name for name in table.columns if name.lower() == SPLIT), None)
    if column is None:
        parts = [split_name(file.path.relative_to(root).parts[0]) for file in files]
        known = {file: part for file, part in zip(files, parts, strict=True) if part is not None}
        return known if len(known) == len(set(files)) and {"train", "test"} <= set(known.values()) else None
    found: dict[ImageFile, str] = {}
    for row, (file, text) in enumerate(zip(files, table.columns[column], strict=True)):
        part = split_name(text)
        if part is None:
            raise UserError(
                f"{table.where(row)}: {one_line(column)} is '{one_line(text)}', and must be train, val or test."
            )
        if found.setdefault(file, part) != part:
            raise UserError(
                f"{one_line(table.path)}: {one_line(file.path.name)} is in two splits, {found[file]} and {part}."
            )
    return found


def _without_copies(label_of: Mapping[ImageFile, Label], left_out: Counter[str]) -> dict[ImageFile, Label]:
    """Leaves out copies, byte by byte: all but the first, and all of them where their labels differ."""
    dropped: set[ImageFile] = set()
    for group in copies(label_of):
        same = len({label_of[file] for file in group}) == 1
        left_out["copies of other images" if same else "with the same bytes and other labels"] += len(group) - same
        dropped.update(group[1:] if same else group)
    return {file: label for file, label in label_of.items() if file not in dropped}


def _warn_of_leaks(label_of: Mapping[ImageFile, Label], split_of: Mapping[ImageFile, str]) -> None:
    groups = [group for group in copies(label_of) if {"train", "test"} <= {split_of[file] for file in group}]
    if groups:
        count = sum(split_of[file] == "test" for group in groups for file in group)
        pair = [next(file for file in groups[0] if split_of[file] == name) for name in ("test", "train")]
        log.warning(
            "%s training images too, byte by byte, such as %s and %s. What is measured on them is too good to be true: remove "
            "them from one of the two.",
            f"{quantity(count, 'test image')} {'is' if count == 1 else 'are'}",
            *(one_line(file.path.name) for file in pair),
        )


def _drawn(label_of: Mapping[ImageFile, Label], root: Path, by_class: bool) -> dict[ImageFile, str]:
    """Returns "test" for a fifth of the files, of each class where there are classes, by the hash of their names."""
    groups: dict[Label, list[ImageFile]] = {}
    for file, label in label_of.items():
        groups.setdefault(label if by_class else 0, []).append(file)
    found: dict[ImageFile, str] = {}
    for members in groups.values():
        hashes = {
            file: hashlib.sha256(os.fsencode(file.path.relative_to(root).as_posix())).digest() for file in members
        }
        count = max(1, round(TEST_SHARE * len(members))) if len(members) > 1 else 0
        tested = set(sorted(members, key=hashes.__getitem__)[:count])
        found |= {file: "test" if file in tested else "train" for file in members}
    return found
