"""Data sets of token sequences for language models, inputs and targets (N, T) int64: `docstrings`, and `token_sequences` of
texts of one's own.

python scripts/train.py data=docstrings task=language_model net@student=causal_transformer net@teacher=causal_transformer
python scripts/train.py data=token_sequences data.root=novel.txt task=language_model net@student=causal_transformer …
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from litdistill.data.tensors import TensorData, TensorSource, TensorSplit
from litdistill.data.text import docstrings as library
from litdistill.data.text import tokenizing
from litdistill.data.text.reading import read_text
from litdistill.data.text.windows import BYTES, byte_tokenizer, ids_of, names_of, windows
from litdistill.utils.errors import UserError
from litdistill.utils.modality import PADDING, TOKENS, Modality
from litdistill.utils.text import one_line
from litdistill.utils.units import quantity

log = logging.getLogger(__name__)

SHARE = 0.1  # of the characters of one's own texts, to validate on and to test on


class Options(NamedTuple):
    """How texts become sequences.

    Attributes:
        vocab_size: tokens at most of the byte-level tokenizer, which is trained on the texts to train on.
        length: tokens of a sequence. held_out: sequences to validate on at most, and to test on.
    """

    vocab_size: int = 512
    length: int = 64
    held_out: int = 1000


class Parts(NamedTuple):
    """The texts to train on, to validate on and to test on."""

    train: list[str]
    val: list[str]
    test: list[str]


def docstrings(
    root: str = "data_files", vocab_size: int = 512, length: int = 64, held_out: int = 1000, **options: Any
) -> TensorData:
    """Returns the docstrings of the standard library of this Python as token sequences; see `litdistill.data.text.docstrings`.

    Modules are drawn for test and validation by a hash of their names, a twentieth each. `root`: the folder where what was
    read from the sources is kept. The others: see `Options` and `TensorData`.
    """
    how = _checked(Options(vocab_size, length, held_out))

    def read() -> TensorSource:
        found = library.read(root)
        of = lambda part: [one.text for one in found if one.part == part]  # noqa: E731
        return sequences(Parts(of("train"), of("val"), of("test")), how)

    return TensorData(read, "docstrings", "language_model", **options)


def token_sequences(
    root: str | None = None,
    test: str | None = None,
    encoding: str = "utf-8",
    vocab_size: int = 512,
    length: int = 64,
    held_out: int = 1000,
    **options: Any,
) -> TensorData:
    """Returns texts of one's own as token sequences: a .txt file, or a folder of them.

    Args:
        root: the file or folder. Files are read in the order of their names, and copies of a file once.
        test: a file or folder to test on. Without one the last tenth of the text is tested on; the tenth before it, or the last
            one, is validated on.
        encoding: of all files. The others: see `Options` and `TensorData`.
    """
    how = _checked(Options(vocab_size, length, held_out))
    if root is None:
        raise UserError("data=token_sequences needs texts: data.root=<a .txt file, or a folder of them>.")
    read = functools.partial(_read_own, root, test, encoding, how)
    return TensorData(read, "token_sequences", "language_model", **options)


def _checked(how: Options) -> Options:
    least = BYTES + 2
    if how.vocab_size < least or how.length < 2 or how.held_out < 1:
        raise UserError(
            f"vocab_size={how.vocab_size}, length={how.length}, held_out={how.held_out}: a byte-level vocabulary has {least} "
            "tokens at least, a sequence 2, and one sequence is held out at least."
        )
    return how


def _read_own(root: str, test: str | None, encoding: str, how: Options) -> TensorSource:
    texts = read_texts(root, encoding)
    if test is not None:
        train, val = cut(texts, [1 - SHARE])
        known = set(texts)
        tested = [text for text in read_texts(test, encoding) if text not in known]
        if not tested:
            raise UserError(f"data.test={one_line(test)} holds nothing but texts that are trained on: give others.")
    else:
        train, val, tested = cut(texts, [1 - 2 * SHARE, 1 - SHARE])
    if not (val and tested):
        raise UserError(
            f"{one_line(root)} holds {quantity(sum(map(len, texts)), 'character')}, too few to train, validate and test on: "
            "give more text."
        )
    return sequences(Parts(train, val, tested), how, encoding)


def read_texts(root: str | Path, encoding: str) -> list[str]:
    """Returns the distinct texts of a .txt file, or of those in a folder, in the order of their names.

    Raises `UserError` without any, and for one in another encoding.
    """
    path = Path(root)
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not path.exists() or (not path.is_dir() and path.suffix.lower() != ".txt"):
        raise UserError(
            f"data.root={one_line(root)} is {'no .txt file' if path.exists() else 'not there'}: give a .txt file, or a folder "
            "of them."
        )
    texts = {file: read_text(file, encoding) for file in files}
    if empty := [file for file, text in texts.items() if not text.strip()]:
        are = "is" if len(empty) == 1 else "are"
        log.warning("%s %s empty, and left out, such as %s.", quantity(len(empty), "text"), are, empty[0])
    found = list(dict.fromkeys(text for text in texts.values() if text.strip()))
    if not found:
        raise UserError(f"{one_line(root)} holds no text{': it is empty' if files else ' (*.txt)'}. Give another file.")
    return found


def cut(texts: Sequence[str], shares: Sequence[float]) -> list[list[str]]:
    """Returns one more part than there are `shares`: the texts in order, cut at these shares of all their characters.

    A text that lies across such a place is cut behind the white space that follows it.
    """
    total, ends, seen = sum(map(len, texts)), [*shares, 1.0], 0
    parts: list[list[str]] = [[] for _ in ends]
    for text in texts:
        start = 0
        for part, share in zip(parts, ends, strict=True):
            end = len(text) if share == 1.0 else min(len(text), max(start, round(share * total) - seen))
            while start < end < len(text) and not text[end - 1].isspace():
                end += 1
            if text[start:end].strip():
                part.append(text[start:end])
            start = max(start, end)
        seen += len(text)
    return parts


def sequences(parts: Parts, how: Options, encoding: str = "utf-8") -> TensorSource:
    """Returns texts as a data set, with a tokenizer that is trained on the texts to train on; `encoding`: of their files."""
    content = byte_tokenizer(parts.train, how.vocab_size)
    tokenizer = tokenizing.opened(content)
    train, val, test = (_split(windows(ids_of(tokenizer, texts), how.length)) for texts in parts)
    val, test = (split.rows(torch.arange(min(len(split.inputs), how.held_out))) for split in (val, test))
    both = TensorSplit(*(torch.cat(pair) for pair in zip(train, val, strict=True)))
    log.info(
        "Sequences of %d tokens: %d to train on, %d to validate, %d to test, of a vocabulary of %d; %.0f %% of the places to "
        "train on are padding.",
        *(how.length, len(train.inputs), len(val.inputs), len(test.inputs), tokenizer.get_vocab_size()),
        100 * (train.targets == PADDING).double().mean().item(),
    )
    validation = torch.arange(len(train.inputs), len(both.inputs))
    show = _shown({"train": both, "test": test}, lambda ids: tokenizer.decode(ids, skip_special_tokens=True))
    modality = Modality(TOKENS, {"encoding": encoding}, {tokenizing.NAME: content})
    return TensorSource(both, test, names_of(tokenizer), modality, validation, show=show)


def _split(pair: tuple[Any, Any]) -> TensorSplit:
    return TensorSplit(*map(torch.from_numpy, pair))


def _shown(splits: dict[str, TensorSplit], decode: Callable[[list[int]], str]) -> Callable[[str, int], str]:
    """Returns the function from (split, id) to the text of a sequence, its last target included."""

    def show(split: str, index: int) -> str:
        inputs, targets = (x[index] for x in splits[split])
        there = targets != PADDING
        return decode([*inputs[there].tolist(), *targets[there][-1:].tolist()])

    return show
