"""Turns texts into rows of token ids, with Hugging Face's `tokenizers` (the extra `text`) and without torch.

    content = trained(texts, 8000)      # the JSON of a tokenizer whose vocabulary is that of these texts
    ids, lengths = encode(opened(content), texts, 64)

In an array of ids 0 is padding. The JSON is the whole tokenizer: it travels with an exported student.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from litdistill.utils.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NAME = "tokenizer.json"  # of the file beside an exported student
PAD, UNKNOWN = "[PAD]", "[UNK]"


def library() -> ModuleType:
    """Returns the package `tokenizers`. Raises `UserError` where it is not installed."""
    try:
        return importlib.import_module("tokenizers")
    except ImportError as error:
        raise UserError("Texts need tokenizers: pip install 'litdistill[text]', or pip install tokenizers.") from error


def trained(texts: Sequence[str], vocab_size: int = 8000) -> bytes:
    """Returns the JSON of a tokenizer for lower-case words by byte-pair encoding; the same for the same texts.

    Sennrich et al. 2016 (arXiv 1508.07909). `vocab_size`: tokens at most; few texts have fewer. The library's trainers of
    WordPiece and unigram models are left out: they give other tokens each time.
    """
    library()
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[PAD, UNKNOWN], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str().encode()


def opened(content: bytes, place: str | Path = NAME) -> Tokenizer:
    """Returns the tokenizer of a JSON, which neither pads nor truncates. Raises `UserError` for anything else.

    `place`: the file that it is from, for messages.
    """
    kind = library().Tokenizer
    try:
        tokenizer: Tokenizer = kind.from_str(content.decode())
    except Exception as error:  # the library raises its own bare Exception
        raise UserError(
            f"{place} is no tokenizer of the library tokenizers ({_reason(error)}): give a tokenizer.json."
        ) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    first = tokenizer.id_to_token(0)
    if first is not None and "pad" not in first.lower():
        raise UserError(
            f"{place}: its token 0 is {first!r}, and here 0 is padding. Give a tokenizer whose first token is {PAD}, or train "
            "one: data.tokenizer=bpe."
        )
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids (N, length) int64, padded with 0 behind, and the number of tokens (N,) of each text before it was cut.

    Of a longer text the first tokens are kept, and the special tokens that the tokenizer puts around it.
    """
    lengths = np.array([len(e.ids) for e in tokenizer.encode_batch(list(texts))], np.int64)
    ids = np.zeros((len(texts), length), np.int64)
    tokenizer.enable_truncation(length)
    for row, encoding in zip(ids, tokenizer.encode_batch(list(texts)), strict=True):
        row[: len(encoding.ids)] = encoding.ids
    tokenizer.no_truncation()
    return ids, lengths


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Returns one more than the largest id: the rows of an embedding that takes all ids."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
