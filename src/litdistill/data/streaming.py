"""Images that do not fit into memory: they stay encoded where they are, and worker processes decode them ahead of use.

Only decoding is done image by image. What comes out of it is the same uint8 tensor that a resident data set is gathered
from, so that order, views, ids and pixels are those of a data set in memory, to the bit.
"""

from __future__ import annotations

import contextlib
import gc
import io
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from litdistill.data.decode import decode
from litdistill.utils.errors import UserError

TIMEOUT = 300  # seconds that a batch may take: longer than any disk does, and shorter than anybody waits


class Files(Protocol):
    """N encoded images: the name of each, for messages, and its bytes."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[str, bytes]: ...


class Encoded:
    """N images decoded whenever they are asked for; indexed by ids like the uint8 tensor (N, `channels`, `size`, `size`)
    that they would be.

    The shorter side is resized to `size`, and the centre cropped. `sha256`: of what the images are.
    """

    dtype = torch.uint8

    def __init__(self, files: Files, size: int, channels: int, sha256: str):
        self.files, self.size, self.channels, self.sha256 = files, size, channels, sha256
        self.shape = torch.Size((len(files), channels, size, size))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, ids: Any) -> Tensor:
        """Raises `UserError`, which names the file, for an image that cannot be read."""
        return self.decode(torch.arange(len(self))[ids].tolist())

    def decode(self, ids: Sequence[int], progress: bool = False) -> Tensor:
        """(n, C, S, S), by several threads, or by one in a worker process; with a progress bar on a terminal."""
        images = np.empty((len(ids), *self.shape[1:]), np.uint8)

        def fill(place: int) -> None:
            name, content = self.files[ids[place]]
            images[place] = decode(io.BytesIO(content), name, self.channels, self.size, self.size)

        if get_worker_info() is not None:
            for place in range(len(ids)):
                fill(place)
            return torch.from_numpy(images)
        console, pool = Console(stderr=True), ThreadPoolExecutor()
        try:
            done = pool.map(fill, range(len(ids)))
            quiet = not (progress and console.is_terminal)
            for _ in track(done, "Reading images", len(ids), console=console, disable=quiet):
                pass
        finally:
            pool.shutdown(cancel_futures=True)
        return torch.from_numpy(images)


class _Decoder:
    """What a worker does: gives a batch of ids with their images. An error is handed over as it is, and raised there."""

    def __init__(self, images: Mapping[str, Any], wanted: Callable[[Any], Tensor]):
        self.images, self.wanted = images, wanted

    def __getitem__(self, rows: Any) -> Any:
        try:
            return rows._replace(images=self.images[rows.split][self.wanted(rows)])
        except UserError as error:
            return error


def _begin(worker: int) -> None:
    """What a worker does first.

    A Ctrl-C reaches all processes of a terminal: the run decides what comes of it, and still needs its data. And what was
    garbage before the fork is not collected here: an onnxruntime session would wait for threads that this process lacks.
    """
    gc.freeze()
    for signum in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)


class Prefetched:
    """Calling it on `Rows` gives them with their images, decoded ahead by `workers` processes.

    `images`: the splits by name. `wanted`: the ids of the images that some rows need. `keep`: whether workers live on
    from one epoch to the next. Raises `UserError` where an image cannot be read, where a worker dies, and where one gives
    nothing for `TIMEOUT` seconds.
    """

    def __init__(self, images: Mapping[str, Any], wanted: Callable[[Any], Tensor], workers: int, keep: bool = False):
        self.queue = _Queue()
        self.loader: DataLoader[Any] = DataLoader(
            _Decoder(images, wanted),  # type: ignore[arg-type]
            sampler=self.queue,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=keep and workers > 0,
            timeout=TIMEOUT if workers else 0,
            worker_init_fn=_begin,
            generator=torch.Generator(),  # or it would draw from the one that dropout draws from
        )

    def __call__(self, rows: Iterable[Any]) -> Iterator[Any]:
        self.queue.rows = rows
        batches: Any = iter(self.loader)
        try:
            for batch in batches:
                if isinstance(batch, UserError):
                    raise batch
                yield batch
        except (RuntimeError, EOFError, ConnectionError) as error:  # the latter two of a worker that died while it sent
            if isinstance(error, RuntimeError) and "DataLoader" not in str(error):
                raise
            # Here, or the end of each other worker would raise it once more, anywhere.
            with contextlib.suppress(RuntimeError):
                batches._shutdown_workers()
            told = str(error.__cause__ or "").strip() or str(error).strip() or "it broke off while it sent images"
            cause = told.splitlines()[0]
            raise UserError(
                f"A process that reads images has ended or hangs ({cause}). Most often memory ran out: set fewer "
                "data.workers or a smaller data.batch_size, or data.workers=0 to see what happens."
            ) from error


class _Queue:
    """The sampler of a DataLoader that lives for several epochs: whatever rows come next."""

    def __init__(self) -> None:
        self.rows: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


def _as_it_is(batch: Any) -> Any:
    return batch
