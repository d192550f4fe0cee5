"""Rows of numbers in a file that several processes share, with a checksum for each row.

The checksum (fingerprint) of a row's bytes and index is written after the row. A row that a kill left partial, or that was
damaged later, does not match it and is invalid.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from litdistill.data.augment import GOLDEN, splitmix64
from litdistill.distillation.cache_room import allocated
from litdistill.utils.errors import UserError


class RowStore:
    """Rows of `width` numbers and their fingerprints, in two files `<path>.rows` and `<path>.marks`, or in memory.

    Raises `OSError` if the disk has no room for them. Their blocks are allocated at creation, since a full disk would later
    kill the process with SIGBUS.
    """

    def __init__(self, rows: int, width: int, dtype: torch.dtype, device: torch.device, path: Path | None = None):
        self.dtype, self.device = dtype, device
        self.values = _mapped(path, ".rows", rows, width, dtype).view(rows, width)
        self.marks = _mapped(path, ".marks", rows, 1, torch.int64)
        self.valid = torch.zeros(rows, dtype=torch.bool)
        for index in self.marks.nonzero().flatten().split(max(1, 2**22 // width)):  # 16 MiB at a time
            self.valid[index] = self.marks[index] == fingerprint(self.values[index], index)
        # On a CPU rows are gathered from the mapped file itself; a GPU has a copy where it has room for one.
        copied = device.type != "cpu" and has_room(device, self.values.nbytes)
        self.rows = self.values.to(device) if copied else self.values
        self.valid = self.valid.to(device)

    def get(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the rows (N, width) float32, and which of them are valid (N,) bool."""
        return self.rows[index.to(self.rows.device)].to(self.device).float(), self.valid[index]

    def put(self, index: Tensor, values: Tensor) -> None:
        """Stores rows (N, width) at `index` (N,). Raises `UserError` where a finite value overflows float16."""
        here, exact, values = index.cpu(), values, values.to(self.dtype)
        kept = values.cpu()
        if self.dtype == torch.float16 and kept.isinf().any() and exact.isfinite().all():
            raise UserError(
                f"teacher.cache.dtype=float16 holds numbers up to 65,504, and the teacher gives {exact.abs().max():.3g}: "
                "keep its outputs as float32."
            )
        self.values[here] = kept
        self.marks[here] = fingerprint(kept, here)  # after the row, so that a partial row has no valid mark
        if self.rows is not self.values:
            self.rows[index] = values
        self.valid[index] = True

    def refresh(self, index: Tensor) -> Tensor:
        """Reads the rows at `index` (N,) that another process has written; returns which of them it has, (N,) bool."""
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


def has_room(device: torch.device, size: int) -> bool:
    """Returns whether `size` bytes take at most half of what is free on a device, which training needs too."""
    return device.type != "cuda" or size <= torch.cuda.mem_get_info(device)[0] // 2


def _mapped(path: Path | None, suffix: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Returns the numbers of all rows, in a file or in memory."""
    count, size = rows * width, rows * width * dtype.itemsize
    if path is None:
        return torch.zeros(count, dtype=dtype)
    file = path.with_name(path.name + suffix)
    with FileLock(path.with_name(path.name + ".lock")), open(file, "ab") as opened:
        if os.fstat(opened.fileno()).st_size < size:  # a longer file is of a longer run, and can be used
            opened.truncate(size)  # allocates nothing
        # To ask again costs a look at each block where the file system has no holes; macOS has no such call.
        if hasattr(os, "posix_fallocate") and allocated(file) < size:
            os.posix_fallocate(opened.fileno(), 0, size)
    return torch.from_file(str(file), shared=True, size=count, dtype=dtype)


def fingerprint(values: Tensor, index: Tensor) -> Tensor:
    """Returns a checksum (N,) int64, never 0, of each row (N, width) and its index (N,)."""
    words = values.contiguous().view({2: torch.int16, 4: torch.int32}[values.dtype.itemsize])
    total = words.sum(1, dtype=torch.int64)
    head = words[:, :256].long()  # weights the first words by position, so that their order matters
    total = splitmix64(total + (head * _ODD[: head.shape[1]]).sum(1))
    mark = splitmix64(total + GOLDEN * (index + 1))
    return torch.where(mark == 0, torch.ones_like(mark), mark)


_ODD = splitmix64(torch.arange(1, 257)) | 1
