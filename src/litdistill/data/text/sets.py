"""Data sets of texts as token ids (N, L) int64: `movie_reviews`, and `texts` for a folder or tables of one's own.

python scripts/train.py data=movie_reviews net@student=text_cnn net@teacher=minilm
python scripts/train.py data=texts data.root=reviews.tsv data.label=stars
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from litdistill.data.fetch import obtain
from litdistill.data.folder import say
from litdistill.data.tensors import TensorData, TensorSource, TensorSplit
from litdistill.data.text import own, tokenizing
from litdistill.data.text.reading import Text
from litdistill.data.weights import obtain_weights
from litdistill.utils.errors import UserError
from litdistill.utils.modality import TEXT, Modality
from litdistill.utils.text import one_line

CLEAR = 0.5  # of the mean of people's judgements from -4 to 4: a snippet closer to 0 has no class


class Tokens(NamedTuple):
    """How texts become ids.

    Attributes:
        tokenizer: "minilm", the tokenizer of MiniLM's published weights; "bpe", trained on the training texts; or the path
            of a tokenizer.json.
        vocab_size: tokens at most of one that is trained.
        length: tokens of a text, behind which it is cut.
    """

    tokenizer: str = "bpe"
    vocab_size: int = 8000
    length: int = 64


def movie_reviews(
    root: str = "data_files",
    tokenizer: str = "minilm",
    vocab_size: int = 8000,
    length: int = 64,
    download: bool = True,
    **options: Any,
) -> TensorData:
    """Returns 10,072 snippets of film reviews, negative or positive, a fifth of them to test on.

    Of the 10,605 snippets that Hutto & Gilbert (ICWSM 2014) had judged by twenty people each, those whose mean judgement is
    at least 0.5 from neutral, on a scale from -4 to 4. A hash of a snippet's words decides whether it is tested on.
    `root`, `download`: where the file is, and whether to fetch it. The others: see `Tokens` and `TensorData`.
    """
    tokens = Tokens(tokenizer, vocab_size, length)
    read = functools.partial(_read_movie_reviews, root, download, tokens)
    return TensorData(read, "movie_reviews", "classification", **options)


def _read_movie_reviews(root: str, download: bool, tokens: Tokens) -> TensorSource:
    _check(tokens)
    files = obtain("movie_reviews", root, download)
    (content,) = files.content.values()
    train: list[Text] = []
    test: list[Text] = []
    for line in content.decode().splitlines():
        number, mean, words = line.split("\t")
        if abs(float(mean)) >= CLEAR:
            one = Text(words.strip(), "positive" if float(mean) > 0 else "negative", f"snippet {number}")
            (test if own.fifth(one) else train).append(one)
    return tokenized(own.Corpus(("negative", "positive"), train, [], test, []), tokens)


def texts(
    root: str | None = None,
    test: str | None = None,
    validation: str | None = None,
    unlabelled: str | None = None,
    text: str = "text",
    label: str = "label",
    classes: Sequence[str] | None = None,
    encoding: str = "utf-8",
    tokenizer: str = "bpe",
    vocab_size: int = 8000,
    length: int = 64,
    **options: Any,
) -> TensorData:
    """Returns texts of one's own: a folder with a folder of .txt files for each class, or a .tsv, .csv or .jsonl file.

    Args:
        root: the folder, laid out as one of images is (`train/<class>/*.txt`, `test/<class>/*.txt`, or `<class>/*.txt`
            alone), or the file.
        test, validation: files like `root`; without a test file a fifth of each class is held out.
        unlabelled: texts to train on without labels: a .txt file with one a line, a table, or a folder of .txt files.
        text, label: columns of a table, or keys of .jsonl. A text whose label is empty has none.
        classes: the labels in their order; None: those of the training set, sorted.
        encoding: of all files.
        The others: see `Tokens` and `TensorData`.
    """
    tokens = Tokens(tokenizer, vocab_size, length)
    files = own.Files(root, test, validation, unlabelled, text, label, encoding)
    read = functools.partial(_read_own, files, None if classes is None else [str(c) for c in classes], tokens)
    return TensorData(read, "texts", "classification", **options)


def _read_own(files: own.Files, classes: list[str] | None, tokens: Tokens) -> TensorSource:
    _check(tokens)
    return tokenized(own.read(files, classes), tokens, files.text, files.encoding)


def tokenized(corpus: own.Corpus, tokens: Tokens, column: str = "text", encoding: str = "utf-8") -> TensorSource:
    """Returns a corpus as token ids, and says in a line how many texts were cut. Targets are -1 for texts without a label."""
    train = [*corpus.train, *corpus.validation, *corpus.unlabelled]
    content, described = _tokenizer(tokens, train)
    tokenizer = tokenizing.opened(content)
    vocabulary = tokenizing.vocabulary_size(tokenizer)
    both, lengths = {}, []
    for name, members in (("train", train), ("test", corpus.test)):
        ids, found = tokenizing.encode(tokenizer, [one.words for one in members], tokens.length)
        both[name] = TensorSplit(torch.from_numpy(ids), _targets(members, corpus.classes))
        lengths.append(found)
    counts = np.concatenate(lengths)
    say([_describe(counts, tokens, described, vocabulary)], "")
    held = torch.arange(len(corpus.train), len(corpus.train) + len(corpus.validation)) if corpus.validation else None
    shown = {"train": train, "test": corpus.test}
    options = {"length": tokens.length, "column": column, "encoding": encoding}
    return TensorSource(
        both["train"],
        both["test"],
        corpus.classes,
        Modality(TEXT, options, {tokenizing.NAME: content}),
        validation=held,
        facts={"vocab_size": vocabulary},
        show=lambda split, i: one_line(shown[split][i].words),
    )


def _check(tokens: Tokens) -> None:
    """Raises `UserError` for options that no texts suit, and without the package, before anything is read."""
    tokenizing.library()
    if tokens.length < 3:
        raise UserError(
            f"data.length={tokens.length}: a text needs at least 3 tokens, of which two may stand around it."
        )
    if tokens.vocab_size < 10:
        raise UserError(f"data.vocab_size={tokens.vocab_size} must be at least 10; 8000 is common.")


def _targets(members: Sequence[Text], classes: Sequence[str]) -> Tensor:
    index = {name: i for i, name in enumerate(classes)}
    return torch.tensor([-1 if one.label is None else index[one.label] for one in members], dtype=torch.int64)


def _tokenizer(tokens: Tokens, texts: Sequence[Text]) -> tuple[bytes, str]:
    """Returns the JSON of the tokenizer, and what it is in words."""
    if tokens.tokenizer == "minilm":
        return obtain_weights("minilm_tokenizer").read_bytes(), "MiniLM's tokenizer"
    if tokens.tokenizer == "bpe":
        content = tokenizing.trained([one.words for one in texts], tokens.vocab_size)
        return content, f"byte-pair encoding, trained on the {len(texts):,} training texts"
    path = Path(tokens.tokenizer)
    if not path.is_file():
        raise UserError(
            f"data.tokenizer={one_line(path)}: there is no such file. Give the path of a tokenizer.json, or choose "
            "minilm or bpe."
        )
    content = path.read_bytes()
    tokenizing.opened(content, path)
    return content, one_line(path)


def _describe(counts: np.ndarray, tokens: Tokens, described: str, vocabulary: int) -> str:
    cut = int((counts > tokens.length).sum())
    what = f"{cut:,} of {len(counts):,} are cut to {tokens.length} (data.length)" if cut else "none is cut"
    return (
        f"Tokens: {described}, {vocabulary:,} in all; a text has {int(np.median(counts))} in the middle and {counts.max():,} "
        f"at most; {what}."
    )
