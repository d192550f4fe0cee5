"""Finds the samples of a data set by the names of their files, as a file of outputs has them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litdistill.utils.errors import UserError


def rows_by_name(path: Path, data: Any, split: str, names: Sequence[str]) -> Tensor:
    """Returns for each sample of the split's files its row among `names`, -1 for one that is not named.

    A name is a path below the data's folder, or as much of its end as tells it from the others: `cat/1.jpg`,
    `/photos/train/cat/1.jpg` and `1.jpg` may be one file. Names of files that the data do not have are left out.

    Raises `UserError` for data without file names, a name that fits several samples, and where none fits.
    """
    known = data.sample_names(split) if callable(getattr(data, "sample_names", None)) else None
    if known is None:
        raise UserError(
            f"{path} names its samples by file, and these data have no files: give ids, the place of each sample in its split."
        )
    by_end: dict[str, list[int]] = defaultdict(list)
    for number, name in enumerate(known):
        by_end[_parts(name)[-1]].append(number)
    rows = torch.full((len(known),), -1, dtype=torch.int64)
    for row, name in enumerate(names):
        parts = _parts(name)
        fitting = [i for i in by_end.get(parts[-1], ()) if _agree(parts, _parts(known[i]))]
        if len(fitting) > 1:
            raise UserError(
                f"{path}: the name {name!r} fits {len(fitting)} files, {known[fitting[0]]} and {known[fitting[1]]}: give "
                "more of its path."
            )
        if fitting:
            if rows[fitting[0]] >= 0:
                raise UserError(
                    f"{path}: {names[int(rows[fitting[0]])]!r} and {name!r} are the same file: leave one out."
                )
            rows[fitting[0]] = row
    if len(names) and bool((rows < 0).all()):
        raise UserError(
            f"{path}: none of its {len(names):,} names is a file of these data. The first is {names[0]!r}, where the data have "
            f"{known[0]!r}."
        )
    return rows


def _parts(name: str) -> tuple[str, ...]:
    return tuple(part for part in str(name).replace("\\", "/").split("/") if part not in ("", ".")) or ("",)


def _agree(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Returns whether the shorter of two paths is the end of the other."""
    n = min(len(one), len(other))
    return one[-n:] == other[-n:]
