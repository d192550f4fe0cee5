"""Rows of numbers in a file that processes share: each counts only if it is whole.

A row carries a fingerprint of its bytes and its place, written after it: a row that was torn by a kill, or that was damaged
since, does not count.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from litdistill.data.augment import GOLDEN, splitmix64
from litdistill.utils.errors import UserError


class RowStore:
    """Rows of `width` numbers and a fingerprint each, in two files `<path>.rows` and `<path>.marks`, or in memory.

    Raises `OSError` where there is no room for the files: room is taken when they are made, since running out of it
    later would kill the process.
    """

    def __init__(self, rows: int, width: int, dtype: torch.dtype, device: torch.device, path: Path | None = None):
        self.dtype, self.device = dtype, device
        self.values = _mapped(path, ".rows", rows * width, dtype).view(rows, width)
        self.marks = _mapped(path, ".marks", rows, torch.int64)
        self.valid = torch.zeros(rows, dtype=torch.bool)
        for index in self.marks.nonzero().flatten().split(max(1, 2**22 // width)):  # 16 MiB at a time
            self.valid[index] = self.marks[index] == fingerprint(self.values[index], index)
        # On a CPU the file itself is what rows are gathered from; a GPU has a copy.
        self.rows = self.values if device.type == "cpu" else self.values.to(device)
        self.valid = self.valid.to(device)

    def get(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The rows (N, width) float32, and which of them are valid (N,)."""
        return self.rows[index].float(), self.valid[index]

    def put(self, index: Tensor, values: Tensor) -> None:
        """Keeps rows (N, width); `index` (N,)."""
        here, exact, values = index.cpu(), values, values.to(self.dtype)
        kept = values.cpu()
        if self.dtype == torch.float16 and kept.isinf().any() and exact.isfinite().all():
            raise UserError(
                f"teacher.cache.dtype=float16 holds numbers up to 65,504, and the teacher gives {exact.abs().max():.3g}: "
                "keep its outputs as float32."
            )
        self.values[here] = kept
        self.marks[here] = fingerprint(kept, here)  # after the row: a mark without its row would be a lie
        if self.rows is not self.values:
            self.rows[index] = values
        self.valid[index] = True

    def refresh(self, index: Tensor) -> Tensor:
        """Reads those of these rows (N,) that another process has written since; says which they are (N,)."""
        here = index.cpu()
        if not self.marks[here].any():
            return torch.zeros_like(index, dtype=torch.bool)
        found = (self.marks[here] == fingerprint(self.values[here], here)).to(self.device)
        if self.rows is not self.values:
            self.rows[index[found]] = self.values[here[found.cpu()]].to(self.device)
        self.valid[index[found]] = True
        return found

    def clear(self) -> None:
        """Makes every row invalid."""
        self.marks.zero_()
        self.valid.zero_()


def _mapped(path: Path | None, suffix: str, count: int, dtype: torch.dtype) -> Tensor:
    if path is None:
        return torch.zeros(count, dtype=dtype)
    file, size = path.with_name(path.name + suffix), count * dtype.itemsize
    with FileLock(path.with_name(path.name + ".lock")), open(file, "ab") as opened:
        if os.fstat(opened.fileno()).st_size < size:  # a file that is longer belongs to a longer run, and serves too
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(opened.fileno(), 0, size)
            else:  # macOS: the file is made, but no room is taken
                opened.truncate(size)
    return torch.from_file(str(file), shared=True, size=count, dtype=dtype)


def fingerprint(values: Tensor, index: Tensor) -> Tensor:
    """A number (N,) int64, never 0, for each row (N, width) at its place (N,): it changes with any bit of either."""
    words = values.contiguous().view({2: torch.int16, 4: torch.int32}[values.dtype.itemsize])
    total = words.sum(1, dtype=torch.int64)
    head = words[:, :256].long()  # the order of words counts too, where rows are short
    total = splitmix64(total + (head * _ODD[: head.shape[1]]).sum(1))
    mark = splitmix64(total + GOLDEN * (index + 1))
    return torch.where(mark == 0, torch.ones_like(mark), mark)


_ODD = splitmix64(torch.arange(1, 257)) | 1
