"""Folders of images, or sounds, with one subfolder per class: which files are trained on, validated and tested."""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from litdistill.data.decode import sides
from litdistill.data.duplicates import copies
from litdistill.data.layout import Layout, find_splits, subfolders_with_images
from litdistill.data.listing import (
    IMAGES,
    ImageFile,
    Kind,
    class_folders,
    describe_kinds,
    describe_skipped,
    list_images,
)
from litdistill.data.streaming import Encoded
from litdistill.utils.distributed import is_first_rank
from litdistill.utils.errors import UserError
from litdistill.utils.text import one_line
from litdistill.utils.units import quantity

log = logging.getLogger(__name__)

Labeled = list[tuple[ImageFile, Any]]  # image files with their class index, or a tuple of labels or numbers (`labels`)
ByClass = dict[str, list[ImageFile]]
TEST_SHARE = 0.2  # fraction of each class, for a folder without a test set
FEW = 10  # classes that are named
FEWEST = 10  # images of a folder without classes
NO_CLASS = "no class"
LOOKED_AT = 100  # images whose size is looked at


class Images(NamedTuple):
    """The files of a data set. `val` is empty where the validation set is to be drawn from `train`."""

    classes: tuple[str, ...]
    train: Labeled
    val: Labeled
    test: Labeled
    task: str = "classification"


def read_splits(root: Path, kind: Kind = IMAGES) -> Images:
    """Lists the images, or files of another kind, of a user's data set, and logs in three lines what is read, what is
    skipped, and how it is split.

    `sources.read_folder` documents the layout. Where one class of the training set holds several files of the same bytes, the
    first is kept; files of the same bytes in two classes are left out of both. Raises `UserError` for a folder that is no data
    set, for splits of different classes, and for a test or validation set that lies in the training set as a whole.
    """
    if root.is_file():
        raise UserError(f"{root} is a file. Unpack it where it is an archive, and set data.root to the folder.")
    if not root.is_dir():
        raise UserError(
            f"There is no folder {root}. Set data.root to the folder that holds train/ or the classes.{_nearest(root)}"
        )
    layout = find_splits(root, kind)
    if kind == IMAGES and layout.train == root and not class_folders(root, kind)[0]:
        return _without_classes(root, kind)
    skipped = layout.skipped
    train = _without_copies(_by_class(layout.train, skipped, kind), skipped, kind)
    val, test = (_by_class(path, skipped, kind) if path else {} for path in (layout.val, layout.test))
    for path, found in ((layout.val, val), (layout.test, test)):
        if path and found.keys() != train.keys():
            raise UserError(
                f"The classes in {layout.train} and {path} differ: only in {layout.train.name} {_only(train, found)}, "
                f"only in {path.name} {_only(found, train)}. Make both hold the same class folders."
            )
    for name, members in train.items():
        if not members:
            raise UserError(
                f"All {kind.noun}s of {layout.train / name} lie in other classes too, byte by byte. Sort them out."
            )
    _refuse_leaks(layout, train, val, test, kind)
    lines = _introduction(root, kind, train, val, test)
    if not layout.test:
        train, test = _hold_out(layout.train, train, kind)
    lines += [f"Splits: {_describe_splits(layout, train, val, test)}."]
    say(lines, describe_skipped(skipped, kind=kind))
    return Images(tuple(train), _flat(train), _flat(val), _flat(test))


def _without_classes(root: Path, kind: Kind) -> Images:
    """Returns the files of a folder without class folders: without labels, for `embedding`. A fifth are the test set."""
    found = list_images(root, kind)
    skipped = found.skipped
    if len(found.files) < FEWEST:
        count, what = quantity(len(found.files), kind.noun), describe_skipped(skipped, kind=kind)
        raise UserError(
            f"{root} has 0 class folders and {count}{f' ({what})' if what else ''}; it needs two or more, each named after its "
            f"class, or {FEWEST} {kind.noun}s without classes for task=embedding."
        )
    files = _without_copies({NO_CLASS: found.files}, skipped, kind)
    train, test = _hold_out(root, files, kind)
    counts = f"{len(train[NO_CLASS]):,} to train and validate on, {len(test[NO_CLASS]):,} to test"
    say(
        [
            f"Read {one_line(root)}: {kind.noun}s without class folders, so without labels, for task=embedding; {counts}."
        ],
        describe_skipped(skipped, kind=kind),
    )
    return Images((NO_CLASS,), _flat(train), [], _flat(test), "embedding")


class FolderFiles:
    """The encoded files of one split, in order."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = [str(path) for path in paths]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, bytes]:
        try:
            return self.paths[index], Path(self.paths[index]).read_bytes()
        except OSError as error:
            raise UserError(f"The image {one_line(self.paths[index])} cannot be read: {error.strerror}.") from error


def encoded(root: Path, files: Labeled, size: int, channels: int) -> Encoded:
    """Returns the images of one split, encoded. Their hash covers names, sizes in bytes and modification times."""
    digest = hashlib.sha256(f"{size} {channels}".encode())
    for file, _ in files:
        digest.update(os.fsencode(f"{file.path.relative_to(root).as_posix()} {file.size} {file.time_ns}\n"))
    return Encoded(FolderFiles([file.path for file, _ in files]), size, channels, digest.hexdigest())


def _by_class(folder: Path, skipped: Counter[str], kind: Kind) -> ByClass:
    """Returns the files of each class folder, and counts in `skipped` what is left out."""
    folders, beside = class_folders(folder, kind)
    skipped.update(beside)
    if len(folders) < 2:
        inner = [path for path in folders if len(subfolders_with_images(path, kind)) > 1]
        remedy = f" Or is {inner[0]} the data set? Then set data.root to it." if inner else ""
        count = quantity(len(folders), "class folder")
        raise UserError(f"{folder} has {count}; it needs two or more, each named after its class.{remedy}")
    files: ByClass = {}
    for path in folders:
        if path.name != os.fsencode(path.name).decode(errors="replace"):  # class names are written as text
            raise UserError(f"The name of the class folder {path.name!r} in {folder} is not UTF-8. Rename it.")
        found = list_images(path, kind)
        if not found.files:
            what = describe_skipped(found.skipped, kind=kind)
            raise UserError(
                f"{one_line(path)} holds no {kind.noun}{f' ({what})' if what else ''}. Add some, or remove the folder."
            )
        files[path.name] = found.files
        skipped.update(found.skipped)
    return files


def _without_copies(files: ByClass, skipped: Counter[str], kind: Kind) -> ByClass:
    """Leaves out copies: all but the first of each class, and all of them where they lie in several classes."""
    class_of = {file: name for name, members in files.items() for file in members}
    left_out = set()
    for group in copies(class_of):
        if len({class_of[file] for file in group}) > 1:
            skipped["that lie in two classes with the same bytes"] += len(group)
            left_out.update(group)
        else:
            skipped[f"copies of other {kind.noun}s"] += len(group) - 1
            left_out.update(group[1:])
    return {name: [file for file in members if file not in left_out] for name, members in files.items()}


def _hold_out(folder: Path, files: ByClass, kind: Kind) -> tuple[ByClass, ByClass]:
    """Splits each class into training and test files by the hash of their names."""
    kept, held_out = {}, {}
    for name, members in files.items():
        if len(members) < 2:
            raise UserError(
                f"{folder / name} holds one {kind.noun}; with no test folder a class needs two or more. Add some."
            )
        names = {file: os.fsencode(file.path.relative_to(folder).as_posix()) for file in members}
        ranked = sorted(members, key=lambda file: hashlib.sha256(names[file]).digest())
        count = max(1, round(TEST_SHARE * len(members)))
        held_out[name], kept[name] = sorted(ranked[:count]), sorted(ranked[count:])
    return kept, held_out


def _refuse_leaks(layout: Layout, train: ByClass, val: ByClass, test: ByClass, kind: Kind) -> None:
    """Warns of files of the same bytes in two splits. Raises `UserError` where a whole split lies in the training set."""
    folders = {"train": layout.train, "val": layout.val, "test": layout.test}
    splits = {"train": train, "val": val, "test": test}
    given = [name for name, path in folders.items() if path]
    if len(given) < 2:  # all is drawn from files without copies
        return
    split_of = {file: name for name in splits for members in splits[name].values() for file in members}
    groups = copies(split_of)
    for one, other in (("train", "test"), ("train", "val"), ("val", "test")):
        shared = []  # a file of each of the two splits
        inside = 0
        for group in groups:
            first, second = ([file for file in group if split_of[file] == name] for name in (one, other))
            if first and second:
                shared.append(f"{one_line(second[0].path)} is {one_line(first[0].path)}")
                inside += len(second)
        count = sum(map(len, splits[other].values()))
        if one == "train" and inside == count > 0:
            raise UserError(
                f"All {count} {kind.noun}s of {folders[other]} lie in {folders[one]} too, byte by byte: what is measured on "
                f"them would be no more than memory. Give other {kind.noun}s, or remove that folder, for a part of the "
                f"training {kind.noun}s to be held out."
            )
        if shared:
            log.warning(
                "%d of %d %s %ss are %s %ss too, byte by byte: %s. What is measured on them is too good to be true; "
                "remove them from one of the two.",
                *(inside, count, WORDS[other], kind.noun, WORDS[one], kind.noun, ", ".join(shared[:2])),
            )


WORDS = {"train": "training", "val": "validation", "test": "test"}


def _nearest(root: Path) -> str:
    """Returns a question with the folder of the nearest name beside a missing one; empty where there is none."""
    try:
        beside = [path.name for path in root.parent.iterdir() if path.is_dir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(root.name, beside, n=1)
    if not near:
        return ""
    meant = one_line(root.parent / near[0])
    if near[0] == near[0].strip():
        return f" Did you mean {meant}?"
    return f""" Did you mean '{meant}', with a space at an end? Then quote it twice: 'data.root="{meant}"'"""


# -- what is said ------------------------------------------------------------------------------------------------------

_SAID: set[str] = set()  # a run reads its data again for its teacher, which nobody needs to hear of twice


def say(lines: list[str], skipped: str | Sequence[str]) -> None:
    """Logs `lines`, with a warning of what is `skipped`, or one for each, after the first, once in a process."""
    warnings = [skipped] * bool(skipped) if isinstance(skipped, str) else list(skipped)
    told = "\n".join([*lines, *warnings])
    if told in _SAID or not is_first_rank():
        return
    _SAID.add(told)
    log.info("%s", lines[0])
    for text in warnings:
        log.warning("%s.", text)
    for line in lines[1:]:
        log.info("%s", line)


def _introduction(root: Path, kind: Kind, *splits: ByClass) -> list[str]:
    files = [file for split in splits for members in split.values() for file in members]
    counts = Counter({name: sum(len(split.get(name, ())) for split in splits) for name in splits[0]})
    named = ", ".join(f"{one_line(name)} {count:,}" for name, count in list(counts.items())[:FEW])
    more = f" and {len(counts) - FEW} more, of {min(counts.values()):,} to {max(counts.values()):,}"
    return [
        f"Read {one_line(root)}: {len(files):,} {kind.noun}s ({describe_kinds(files)}"
        f"{_describe_sizes(files) if kind is IMAGES else ''}), {len(counts)} classes: "
        f"{named}{more if len(counts) > FEW else ''}."
    ]


def _describe_sizes(files: Sequence[ImageFile]) -> str:
    looked_at = files[:: -(-len(files) // LOOKED_AT)]
    found = [side for file in looked_at for side in sides(file.path) or ()]
    sides_of = str(min(found)) if min(found, default=0) == max(found, default=0) else f"{min(found)} to {max(found)}"
    size = f"; sides of {sides_of} pixels" if found else "; sizes unknown"
    return f"{size} ({len(looked_at)} looked at)" if found and len(looked_at) < len(files) else size


def _describe_splits(layout: Layout, train: ByClass, val: ByClass, test: ByClass) -> str:
    def part(files: ByClass, folder: Path) -> str:
        return f"{sum(map(len, files.values())):,} of {one_line(folder.name or folder)}"

    texts = [f"{part(train, layout.train)} to train {'on' if layout.val else 'on and validate (data.val_size)'}"]
    if layout.val:
        texts.append(f"{part(val, layout.val)} to validate (data.val_size is not used)")
    if layout.test:
        texts.append(f"{part(test, layout.test)} to test")
    else:
        texts.append(f"{part(test, layout.train)} to test ({TEST_SHARE:.0%} of each class: there is no test folder)")
    return ", ".join(texts)


def _flat(files: ByClass) -> Labeled:
    return [(file, label) for label, members in enumerate(files.values()) for file in members]


def _only(one: Iterable[str], other: Iterable[str]) -> str:
    return ", ".join(one_line(name) for name in sorted(set(one) - set(other))) or "none"
