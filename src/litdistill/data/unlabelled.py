"""Images without labels of any folder: a transfer set, on which a student learns from its teacher alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from litdistill.data.duplicates import copies
from litdistill.data.folder import encoded, say
from litdistill.data.listing import ImageFile, describe_kinds, describe_skipped, list_images
from litdistill.data.streaming import Encoded, Files
from litdistill.utils.errors import UserError
from litdistill.utils.text import one_line


def read_unlabelled(folder: str | Path, known: Iterable[ImageFile], size: int, channels: int) -> Encoded:
    """Returns the images in and below a folder, at any depth, without those of the same bytes as another or as one of `known`.

    A test image without its label would still be trained on. Logs what is read and what is skipped. Raises `UserError` for a
    missing folder, and for one without an image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"data.unlabelled={one_line(folder)}: there is no such folder.")
    files, skipped = list_images(folder)
    labeled = set(known)
    left_out: set[ImageFile] = set()
    for group in copies([*labeled, *(file for file in files if file not in labeled)]):
        left_out.update(group if group[0] in labeled else group[1:])
    left_out |= labeled
    kept = [file for file in files if file not in left_out]
    skipped["of the same bytes as one that is read already"] += len(files) - len(kept)
    if not kept:
        what = describe_skipped(skipped) or "it is empty"
        raise UserError(f"data.unlabelled={one_line(folder)} holds no image that is not read already ({what}).")
    say(
        [f"Read {one_line(folder)}: {len(kept):,} images without labels ({describe_kinds(kept)})."],
        describe_skipped(skipped),
    )
    return encoded(folder, [(file, -1) for file in kept], size, channels)


def appended(images: Tensor | Encoded, more: Encoded) -> Tensor | Encoded:
    """Returns the images with `more` behind them; decoded, where `images` are."""
    if isinstance(images, Tensor):
        return torch.cat([images, more.decode(range(len(more)))])
    digest = hashlib.sha256(f"{images.sha256} {more.sha256}".encode()).hexdigest()
    return Encoded(_Joined(images.files, more.files), images.size, images.channels, digest, images.scaled)


class _Joined:
    """The encoded files of two sources, one behind the other."""

    def __init__(self, first: Files, second: Files):
        self.first, self.second = first, second

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, index: int) -> tuple[str, bytes]:
        return self.first[index] if index < len(self.first) else self.second[index - len(self.first)]
