"""Texts as token sequences of one length, for language models: a byte-level tokenizer, and windows with padding.

    content = byte_tokenizer(texts, 512)
    inputs, targets = windows(ids_of(opened(content), texts), 64)

It needs the library `tokenizers` (the extra `text`) and numpy alone, so that `predict` reads files as training does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from litdistill.data.text.tokenizing import PAD, library
from litdistill.utils.modality import PADDING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END = "<|endoftext|>"  # stands before and behind each text, as in GPT-2
END_ID = 1  # its id: 0 is padding
BYTES = 256


def byte_tokenizer(texts: Sequence[str], vocab_size: int) -> bytes:
    """Returns the JSON of a byte-level BPE tokenizer, trained on texts: GPT-2's (Radford et al. 2019, section 2.2).

    Any text has a code, and decoding gives it back. The same texts give the same tokenizer. `vocab_size`: at least 258, the
    bytes and two special tokens; fewer pairs that occur twice give fewer.
    """
    library()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str().encode()


def ids_of(tokenizer: Tokenizer, texts: Sequence[str], ends: bool = True) -> list[np.ndarray]:
    """Returns the ids of each text, (length,) int64, with `END` before it and, with `ends`, behind it."""
    behind = [END_ID] if ends else []
    encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [np.array([END_ID, *one.ids, *behind], np.int64) for one in encoded]


def windows(texts: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns inputs and targets, (N, length) int64 each: the target at a place is the token that follows it.

    Each token of a text but the first is a target once. A text of n tokens has ⌈(n − 1) / length⌉ windows; behind its end
    inputs are 0 and targets -100.
    """
    parts = [(ids, start) for ids in texts for start in range(0, len(ids) - 1, length)]
    inputs = np.zeros((len(parts), length), np.int64)
    targets = np.full((len(parts), length), PADDING, np.int64)
    for i, (ids, start) in enumerate(parts):
        following = ids[start + 1 : start + 1 + length]
        inputs[i, : len(following)] = ids[start : start + len(following)]
        targets[i, : len(following)] = following
    return inputs, targets


def names_of(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Returns the tokens by id in readable form: ` the`, `\\n`, and `\\xe2` for a byte that is no character by itself."""
    names = []
    for i in range(tokenizer.get_vocab_size()):
        token = tokenizer.id_to_token(i) or ""
        names.append(token if i <= END_ID else readable(bytes_of(token)))
    return tuple(names)


def readable(token: bytes) -> str:
    """Returns bytes as text without control characters, each other bytes than those of another text."""

    def shown(character: str) -> str:
        if "\udc80" <= character <= "\udcff":  # a byte that is no character by itself
            return f"\\x{ord(character) - 0xDC00:02x}"
        return (
            character if character.isprintable() and character != "\\" else character.encode("unicode_escape").decode()
        )

    return "".join(map(shown, token.decode("utf-8", "surrogateescape")))


def bytes_of(token: str) -> bytes:
    """Returns the bytes of a token of a byte-level tokenizer, which writes each byte as one printable character."""
    return bytes(_BYTE[character] for character in token)


def _bytes_by_character() -> dict[str, int]:
    """Returns GPT-2's table: printable bytes stand for themselves, the others for the characters from U+0100 on."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(BYTES) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(BYTES + i): byte for i, byte in enumerate(others)}


_BYTE = _bytes_by_character()
