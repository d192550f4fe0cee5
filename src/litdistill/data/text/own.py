"""A user's own texts: which are trained on, validated and tested, what is left out, and what is said of it.

Folders are laid out as those of images are (`litdistill.data.folder`); tables are read by `litdistill.data.text.reading`.
"""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from litdistill.data.folder import Labeled, read_splits, say
from litdistill.data.listing import Kind, list_images
from litdistill.data.text.reading import TABLES, Text, read_file, read_text
from litdistill.utils.errors import UserError
from litdistill.utils.text import one_line
from litdistill.utils.units import quantity

TEXTS = Kind(
    "text",
    lambda: frozenset({".txt"}),
    dict.fromkeys((".md", ".html", ".pdf", ".docx", ".rtf", ".gz"), " (convert them to .txt)"),
)
TEST_SHARE = 0.2
FEW = 8  # names in a line


class Files(NamedTuple):
    """Where a user's texts are: the options of `litdistill.data.text.sets.texts`."""

    root: str | None
    test: str | None = None
    validation: str | None = None
    unlabelled: str | None = None
    text: str = "text"
    label: str = "label"
    encoding: str = "utf-8"


class Corpus(NamedTuple):
    """The texts of a data set. `validation` is empty where it is to be drawn from `train`."""

    classes: tuple[str, ...]
    train: list[Text]
    validation: list[Text]
    test: list[Text]
    unlabelled: list[Text]


def read(files: Files, classes: Sequence[str] | None = None) -> Corpus:
    """Reads a user's texts, and logs in lines what is read, what is skipped, and how it is split.

    `classes`: the labels in their order; None: those of the training set, sorted. Left out are empty texts, copies within a
    class, and texts that stand under two labels. Raises `UserError` for files that cannot be read, for labels outside of
    `classes`, and for a test set that lies in the training set as a whole.
    """
    if files.root is None:
        raise UserError(
            "data=texts needs texts: data.root=<a folder of class folders, or a .tsv, .csv or .jsonl file>."
        )
    root = Path(files.root)
    skipped = Skipped()
    if root.is_dir():
        if files.test or files.validation:
            raise UserError(
                f"data.root={one_line(root)} is a folder, so test/ and val/ lie in it: leave out data.test."
            )
        found = _folder(root, files, classes, skipped)
    else:
        found = _tables(root, files, classes, skipped)
    if files.unlabelled is not None:
        some = _unlabelled(Path(files.unlabelled), files)
        found.unlabelled.extend(_not_empty(some, skipped))
    parts = [f"{len(found.train):,} to train on{'' if found.validation else ' and validate (data.val_size)'}"]
    parts += [f"{len(found.validation):,} to validate"] * bool(found.validation)
    parts += [f"{len(found.test):,} to test", *[f"{len(found.unlabelled):,} without a label"] * bool(found.unlabelled)]
    held = "" if files.test or root.is_dir() else " (a fifth of each class: there is no data.test)"
    lines = [_introduction(root, found)] * root.is_file()  # of a folder it has been said
    say([*lines, f"Texts: {', '.join(parts)}{held}."], skipped.described())
    return found


class Skipped:
    """What is left out: how many texts for each reason, and which is the first."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, reason: str, text: Text) -> None:
        self.counts[reason] += 1
        self.first.setdefault(reason, text.place)

    def described(self) -> str:
        """Returns "3 texts are skipped: 2 empty (the first reviews.tsv:7), …"; "" where there are none."""
        total = sum(self.counts.values())
        parts = [f"{n:,} {why} ({'the first ' * (n > 1)}{one_line(self.first[why])})" for why, n in self.counts.items()]
        return f"{quantity(total, 'text')} {'is' if total == 1 else 'are'} skipped: {', '.join(parts)}" if total else ""


def _not_empty(texts: Sequence[Text], skipped: Skipped) -> list[Text]:
    for one in texts:
        if not one.words:
            skipped.add("empty", one)
    return [one for one in texts if one.words]


# -- folders -----------------------------------------------------------------------------------------------------------


def _folder(root: Path, files: Files, classes: Sequence[str] | None, skipped: Skipped) -> Corpus:
    found = read_splits(root, TEXTS)
    names = _ordered(found.classes, classes, root)

    def part(labeled: Labeled) -> list[Text]:
        texts = []
        for file, target in labeled:
            words = read_text(file.path, files.encoding).strip()
            texts.append(Text(words, found.classes[target], str(file.path)))
        return _not_empty(texts, skipped)

    corpus = Corpus(names, part(found.train), part(found.val), part(found.test), [])
    _check_labels([*corpus.train, *corpus.validation, *corpus.test], names, "label")
    _check_each(corpus, root)
    return corpus


def _unlabelled(path: Path, files: Files) -> list[Text]:
    """Returns the texts of a .txt file, one a line; of a table; or of a folder of .txt files, a text each."""
    if path.is_dir():
        found = list_images(path, TEXTS).files
        if not found:
            raise UserError(f"data.unlabelled={one_line(path)} holds no .txt file: give a folder of texts, or a file.")
        return [Text(read_text(file.path, files.encoding).strip(), None, str(file.path)) for file in found]
    return read_file(path, files.text, None, files.encoding)


# -- tables ------------------------------------------------------------------------------------------------------------


def _tables(root: Path, files: Files, classes: Sequence[str] | None, skipped: Skipped) -> Corpus:
    def part(path: str | Path | None) -> list[Text]:
        if path is None:
            return []
        return _not_empty(read_file(path, files.text, files.label, files.encoding), skipped)

    if not root.is_file():
        raise UserError(
            f"There is no {one_line(root)}. Set data.root to a folder of class folders, or to a file {', '.join(TABLES[:3])}."
        )
    every = part(root)
    train = [one for one in every if one.label is not None]
    without = [one for one in every if one.label is None]
    names = _ordered(_labels(train, root, files.label), classes, root)
    _check_labels(train, names, files.label)
    train = _without_copies(train, skipped)
    held = {}
    for option, path in (("test", files.test), ("validation", files.validation)):
        held[option] = part(path)
        _check_labels(held[option], names, files.label)
        _refuse_leaks(train, held[option], option)
    if files.test is None:
        train, held["test"] = _hold_out(train)
    corpus = Corpus(names, train, held["validation"], held["test"], without)
    _check_each(corpus, root)
    return corpus


def _labels(train: Sequence[Text], root: Path, column: str) -> list[str]:
    """Returns the labels of the training set, sorted. Raises `UserError` where they can be no classes."""
    found = sorted({one.label for one in train if one.label is not None})
    if len(found) < 2:
        what = f"the label {one_line(found[0])!r} alone" if found else "no label"
        raise UserError(f"{one_line(root)} has {what} in {column!r}: two classes or more are needed.")
    if len(found) > 50 and len(found) > len(train) / 5:
        raise UserError(
            f"{one_line(root)} has {len(found):,} labels for {len(train):,} texts in {column!r}: is that the column of the "
            "class? Name it by data.label=<column>."
        )
    return sorted(found, key=int) if all(name.isdecimal() for name in found) else found


def _ordered(found: Sequence[str], classes: Sequence[str] | None, root: Path) -> tuple[str, ...]:
    """Returns the classes in their order. Raises `UserError` where one of those that are asked for has no text."""
    if classes is None:
        return tuple(found)
    absent = [name for name in classes if name not in found]
    if absent or len(set(classes)) < len(classes):
        raise UserError(
            f"data.classes={list(classes)}: {one_line(root)} has no text labelled {', '.join(absent) or 'twice'}; it has "
            f"{_named(found)}."
        )
    return tuple(classes)


def _check_labels(texts: Sequence[Text], classes: Sequence[str], column: str) -> None:
    """Raises `UserError` for the first label outside of `classes`, and for a text without one."""
    known = set(classes)
    for one in texts:
        if one.label in known:
            continue
        if one.label is None:
            raise UserError(f"{one_line(one.place)} has no {column}: texts to test and validate on need one.")
        count = sum(other.label is not None and other.label not in known for other in texts)
        more = f", and so have {count - 1:,} more texts labels outside of them" if count > 1 else ""
        near = difflib.get_close_matches(one.label, classes, 1)
        meant = f"Did you mean {one_line(near[0])}? " if near else ""
        raise UserError(
            f"{one_line(one.place)} has the label {one_line(one.label)!r}, which is none of the classes "
            f"{_named(classes)}{more}. {meant}Mend the labels, or name all classes by data.classes=[…]."
        )


def _check_each(corpus: Corpus, root: Path) -> None:
    """Raises `UserError` where a class has no text left to train on."""
    counts = Counter(one.label for one in corpus.train)
    for name in corpus.classes:
        if counts[name] < 2:
            raise UserError(
                f"{one_line(root)} has {quantity(counts[name], 'text')} of the class {one_line(name)!r} to train on, and two "
                "are needed. Add some, or leave out that class."
            )


def _without_copies(texts: Sequence[Text], skipped: Skipped) -> list[Text]:
    """Leaves out copies: all but the first of each label, and all of them where they have several labels."""
    labels: dict[str, set[str | None]] = {}
    for one in texts:
        labels.setdefault(one.words, set()).add(one.label)
    kept, seen = [], set()
    for one in texts:
        if len(labels[one.words]) > 1:
            skipped.add("that stand under two labels", one)
        elif one.words in seen:
            skipped.add("copies of other texts", one)
        else:
            kept.append(one)
            seen.add(one.words)
    return kept


def _refuse_leaks(train: list[Text], held: Sequence[Text], option: str) -> None:
    """Leaves out of the training set, in place, what is tested on. Raises `UserError` where all of that lies in it."""
    known = {one.words for one in train}
    shared = [one for one in held if one.words in known]
    if held and len(shared) == len(held):
        raise UserError(
            f"All {len(held):,} texts of data.{option} stand in data.root too: what is measured on them would be no more than "
            "memory. Give other texts, or leave it out for a part of the training texts to be held out."
        )
    if shared:
        removed = {one.words for one in shared}
        train[:] = [one for one in train if one.words not in removed]
        say([f"{quantity(len(removed), 'text')} of data.{option} in data.root too: left out of training."], "")


def _hold_out(texts: Sequence[Text]) -> tuple[list[Text], list[Text]]:
    """Splits each class into training and test texts by the hash of their words."""
    by_class: dict[str | None, list[Text]] = {}
    for one in texts:
        by_class.setdefault(one.label, []).append(one)
    held = set()
    for members in by_class.values():
        ranked = sorted(members, key=lambda one: _digest(one.words))
        held.update(ranked[: max(1, round(TEST_SHARE * len(members)))])
    return [one for one in texts if one not in held], [one for one in texts if one in held]


def _digest(words: str) -> bytes:
    return hashlib.sha256(words.encode(errors="surrogatepass")).digest()


def fifth(text: Text) -> bool:
    """Returns whether a text is one of the fifth that a hash of its words chooses, whatever other texts there are."""
    return int.from_bytes(_digest(text.words)[:8], "big") % 5 == 0


# -- what is said ------------------------------------------------------------------------------------------------------


def _introduction(root: Path, corpus: Corpus) -> str:
    labelled = [*corpus.train, *corpus.validation, *corpus.test]
    counts = Counter(one.label for one in labelled)
    named = ", ".join(f"{one_line(name)} {counts[name]:,}" for name in corpus.classes[:FEW])
    more = f" and {len(corpus.classes) - FEW} more" if len(corpus.classes) > FEW else ""
    return f"Read {one_line(root)}: {len(labelled):,} texts, {len(corpus.classes)} classes: {named}{more}."


def _named(names: Sequence[str]) -> str:
    return ", ".join(map(one_line, names[:FEW])) + (", …" if len(names) > FEW else "")
