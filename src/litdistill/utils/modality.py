"""What kind of data a sample is, and what is needed to make a network's input of a user's file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

IMAGE, TABLE, TEXT, SOUND, TOKENS = KINDS = ("image", "table", "text", "sound", "tokens")


PADDING = -100  # the target of a place of a sequence that has none; torch's and Hugging Face's own


class Modality(NamedTuple):
    """The kind of a data set's samples. It travels with an exported file, so that `predict` reads files of that kind.

    Attributes:
        kind: one of `KINDS`.
        options: plain values that reading a file needs, such as a sample rate or a length; recorded in `manifest.json`.
        files: contents of the files that it needs, by name, such as `tokenizer.json`; written beside an exported file.
    """

    kind: str = IMAGE
    options: Mapping[str, Any] = {}
    files: Mapping[str, bytes] = {}


def modality_of(data: object, input_shape: object = None) -> Modality:
    """Returns the modality that data state as their attribute `modality`.

    Without it, samples of one axis are a table's rows, and any other are images.
    """
    found = getattr(data, "modality", None)
    if isinstance(found, Modality):
        return found
    shape = getattr(data, "input_shape", None) or input_shape
    return Modality(TABLE if isinstance(shape, (tuple, list)) and len(shape) == 1 else IMAGE)
