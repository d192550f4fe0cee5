"""Reads a user's files as inputs of an exported student, without torch. One function for each kind of data.

A reader yields batches: what each row is called (`{"image": path}`), and the array that the file takes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from litdistill.data import columns, waves
from litdistill.data import encoding as enc
from litdistill.data.decode import decode
from litdistill.data.text import tokenizing
from litdistill.data.text.reading import read_file
from litdistill.utils.errors import UserError
from litdistill.utils.manifest import MANIFEST, ExportMetadata, companion
from litdistill.utils.modality import IMAGE, SOUND, TABLE, TEXT
from litdistill.utils.text import one_line

log = logging.getLogger(__name__)

BATCH = 64  # rows
Item = TypeVar("Item")
Rows = Iterator[tuple[list[dict[str, str]], np.ndarray]]


def images(paths: Sequence[str | Path], facts: ExportMetadata, folder: Path) -> Rows:
    """Yields image files as (N, C, H, W) uint8."""
    for some in batches(paths):
        yield [{"image": str(path)} for path in some], read_images(some, facts.input_shape)


def table(paths: Sequence[str | Path], facts: ExportMetadata, folder: Path) -> Rows:
    """Yields the rows of tables as (N, F) float32.

    Columns of a .csv, .tsv or .parquet file are found by their names, where the student was trained on names; a .npy file, and
    a .csv file without a line of names, hold the features in their order.
    """
    described = "columns" in facts.modality
    for path in paths:
        if described and Path(path).suffix.lower() != ".npy" and not _is_bare(Path(path)):
            rows = _by_name(Path(path), facts)
        else:
            rows = read_table(path, facts.input_shape[0])
        for start in range(0, len(rows), BATCH):
            some = rows[start : start + BATCH]
            yield [{"row": f"{path}:{start + i}"} for i in range(len(some))], some


def sounds(paths: Sequence[str | Path], facts: ExportMetadata, folder: Path) -> Rows:
    """Yields WAV files as (N, samples) float32 of the student's rate and length, as in training.

    Warns of sounds that are resampled or cut.
    """
    rate, shape = facts.modality.get("sample_rate"), facts.input_shape
    if type(rate) is not int or not 0 < rate <= waves.RATES[1] or len(shape) != 1:
        raise UserError(
            f"The student takes sounds, and its entry in {MANIFEST} states no sample rate: export it again."
        )
    for some in batches(paths):
        inputs = np.empty((len(some), shape[0]), np.float32)
        for row, path in zip(inputs, some, strict=True):
            wave = waves.read_wave(path)
            seconds = len(wave.samples) / wave.rate
            if wave.rate != rate:
                log.warning(
                    "%s: resampled from %s to %s samples a second.", one_line(path), f"{wave.rate:,}", f"{rate:,}"
                )
            if seconds > shape[0] / rate + 0.5 / rate:
                log.warning(
                    "%s: %.3g s long, of which the middle %.3g s count.", one_line(path), seconds, shape[0] / rate
                )
            row[:] = waves.fitted(waves.resampled(wave, rate), shape[0])
        yield [{"sound": str(path)} for path in some], inputs


def _is_bare(path: Path) -> bool:
    """Returns whether a .csv file starts with numbers, and so without the names of its columns."""
    if path.suffix.lower() != ".csv" or not path.is_file():
        return False
    with path.open("rb") as opened:
        first = opened.readline().decode("utf-8", errors="replace")
    return bool(first.strip()) and not _has_names([first])


def _by_name(path: Path, facts: ExportMetadata) -> np.ndarray:
    table = columns.read_table(path, "file")
    known = enc.from_options(facts.modality)
    rows, unknown = enc.encode(known, table, "Fill them: the student was trained on rows without missing values.")
    for line in enc.described(unknown, table):
        log.warning("%s", line)
    return rows


def text(paths: Sequence[str | Path], facts: ExportMetadata, folder: Path) -> Rows:
    """Yields the texts of .txt files, one a line, and of .tsv, .csv and .jsonl files as token ids (N, L) int64.

    Raises `UserError` for an empty text in a table, and without the tokenizer's file beside the exported one.
    """
    column, encoding = (facts.modality.get(key, usual) for key, usual in (("column", "text"), ("encoding", "utf-8")))
    encode = tokens_of(facts, folder)
    for path in paths:
        found = read_file(path, column, None, encoding, "--encoding <its encoding>", ("--column", ""))
        if empty := next((one for one in found if not one.words), None):
            raise UserError(
                f"{empty.place} is an empty text, of which nothing can be predicted: fill it, or leave it out."
            )
        if not found:
            raise UserError(f"{path} holds no text.")
        for some in batches(found):
            yield [{"text": one.place} for one in some], encode([one.words for one in some])


def words(texts: Sequence[str], facts: ExportMetadata, folder: Path) -> Rows:
    """Yields texts themselves as token ids. Raises `UserError` for an empty one, and where the student is not of texts."""
    if texts and facts.modality["kind"] != TEXT:
        raise UserError(f"This student is one of {facts.modality['kind']} data and takes no texts: name files.")
    if not all(one.strip() for one in texts):
        raise UserError("--text is empty: nothing can be predicted of it.")
    for some in batches(texts):
        yield [{"text": one} for one in some], tokens_of(facts, folder)([one.strip() for one in some])


def tokens_of(facts: ExportMetadata, folder: Path) -> Callable[[Sequence[str]], np.ndarray]:
    """Returns the function from texts to token ids that the exported file in `folder` was trained with."""
    content = companion(folder, facts, tokenizing.NAME)
    tokenizer, (length,) = tokenizing.opened(content, folder / tokenizing.NAME), facts.input_shape
    return lambda words: tokenizing.encode(tokenizer, words, length)[0]


def batches(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """Yields the items, `BATCH` at a time."""
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]


# By `Modality.kind`. `folder` is that of the exported file, with the files of its modality beside it
# (`litdistill.utils.manifest.companion`).
READERS: dict[str, Callable[[Sequence[str | Path], ExportMetadata, Path], Rows]] = {
    IMAGE: images,
    TABLE: table,
    TEXT: text,
    SOUND: sounds,
}


def read_images(paths: Sequence[str | Path], input_shape: Sequence[int]) -> np.ndarray:
    """Returns (N, C, H, W) uint8: images in gray or RGB, resized to cover H x W and center-cropped, as in training."""
    if len(input_shape) != 3:
        raise UserError(
            f"The network takes {'x'.join(map(str, input_shape))} numbers and no images: run it from Python."
        )
    channels, height, width = input_shape
    if channels not in (1, 3):
        raise UserError(f"The student takes images of {channels} channels; image files have 1 (gray) or 3 (RGB).")
    images = np.empty((len(paths), channels, height, width), np.uint8)
    for row, path in zip(images, paths, strict=True):
        row[:] = decode(path, path, channels, height, width)
    return images


def read_table(path: str | Path, count: int) -> np.ndarray:
    """Returns the (N, `count`) float32 array of a .npy file, or of a .csv file with or without a header.

    Raises `UserError` for any other file, another number of columns, and values that are not finite.
    """
    path = Path(path)
    if path.suffix not in (".npy", ".csv"):
        raise UserError(f"{path}: the student takes rows of {count} numbers, in a .npy or a .csv file.")
    try:
        if path.suffix == ".npy":
            rows = np.atleast_2d(np.load(path, allow_pickle=False)).astype(np.float32)
        else:
            lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
            if not lines:
                raise ValueError("it is empty")
            rows = np.loadtxt(lines[_has_names(lines) :], np.float32, delimiter=",", ndmin=2)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read as a table of numbers: {str(error).splitlines()[0]}") from error
    if rows.ndim != 2 or rows.shape[1] != count:
        raise UserError(f"{path} holds {rows.shape}, and the student takes rows of {count} numbers.")
    if (bad := ~np.isfinite(rows).all(1)).any():
        raise UserError(f"{path}: row {int(bad.argmax())} (counted from 0) has a value that is no finite number.")
    return rows


def _has_names(lines: Sequence[str]) -> int:
    """Returns 1 where the first line of a .csv file is a header, else 0."""
    try:
        [float(value) for value in lines[0].split(",")] if lines else []
    except ValueError:
        return 1
    return 0
