"""Writes a safetensors file piece by piece: its tensors are mapped from the disk while they are filled."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from litdistill.distillation.outputs_tables import DIGEST, DTYPES, data_sha256
from litdistill.utils.files import write_atomically

Shape = tuple[torch.dtype, tuple[int, ...]]
UNKNOWN = "0" * 64  # in place of a digest of which the contents are not there yet


def write_outputs(
    path: str | Path,
    arrays: Mapping[str, Shape],
    metadata: Mapping[str, str],
    fill: Callable[[Mapping[str, Tensor]], None],
) -> None:
    """Writes a safetensors file of `arrays` (name -> dtype and shape), which `fill` fills in place, however large they are.

    The file appears when it is whole, with the SHA-256 of its contents in its metadata. Raises `UserError` where the disk has
    no room, before anything is computed.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {**metadata, DIGEST: UNKNOWN}}
    end, places = 0, {}
    for name in sorted(arrays, key=lambda name: (-arrays[name][0].itemsize, name)):  # so that each is aligned
        dtype, shape = arrays[name]
        places[name] = end, (end := end + math.prod(shape) * dtype.itemsize)
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": list(places[name])}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def write(temporary: Path) -> None:
        start = 8 + len(text)
        with temporary.open("r+b") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.flush()
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(
                    file.fileno(), 0, start + end
                )  # a full disk would kill a process that writes to a map
            else:
                file.truncate(start + end)
        whole = np.memmap(temporary, np.uint8, "r+")
        tensors = {}
        for name, (first, last) in places.items():
            dtype, shape = arrays[name]
            tensors[name] = torch.from_numpy(np.asarray(whole[start + first : start + last])).view(dtype).view(shape)
        fill(tensors)
        whole.flush()
        digest = data_sha256(temporary)
        with temporary.open("r+b") as file:
            file.seek(8 + text.index(UNKNOWN.encode()))
            file.write(digest.encode())
            file.flush()
            os.fsync(file.fileno())

    write_atomically(path, write)
