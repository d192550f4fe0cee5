"""Images that do not fit into memory: they stay encoded on disk, and worker processes decode them ahead of use.

Only decoding works image by image. The result is the same uint8 tensor as a gather from a data set in memory, so order,
views, ids and pixels are bit-identical to it.
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
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from litdistill.data.decode import decode
from litdistill.utils.errors import UserError

TIMEOUT = 300  # seconds to wait for a batch; a working disk is faster
CHECK = 5  # seconds after which it is looked whether the workers still live


class Files(Protocol):
    """N encoded images, each as its name, for messages, and its bytes."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[str, bytes]: ...


class Encoded:
    """N images that are decoded on access; indexed by ids like a uint8 tensor (N, `channels`, `size`, `size`).

    The shorter side is resized to `size`, and the image center-cropped. `sha256`: hash that identifies the images.
    `scaled`: see `decode`.
    """

    dtype = torch.uint8

    def __init__(self, files: Files, size: int, channels: int, sha256: str, scaled: bool = False):
        self.files, self.size, self.channels, self.scaled = files, size, channels, scaled
        self.sha256 = f"{sha256} scaled" if scaled else sha256
        self.shape = torch.Size((len(files), channels, size, size))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, ids: Any) -> Tensor:
        """Returns the decoded images of `ids`. Raises `UserError` with the file's name if one cannot be read."""
        return self.decode(torch.arange(len(self))[ids].tolist())

    def decode(self, ids: Sequence[int], advance: Callable[[], object] = lambda: None) -> Tensor:
        """Decodes (n, C, S, S) with several threads, or one in a worker process; `advance` is called after each image."""
        images = np.empty((len(ids), *self.shape[1:]), np.uint8)

        def fill(index: int) -> None:
            name, content = self.files[ids[index]]
            images[index] = decode(io.BytesIO(content), name, self.channels, self.size, self.size, self.scaled)

        if get_worker_info() is not None:
            for index in range(len(ids)):
                fill(index)
            return torch.from_numpy(images)
        pool = ThreadPoolExecutor()
        try:
            for _ in pool.map(fill, range(len(ids))):
                advance()
        finally:
            pool.shutdown(cancel_futures=True)
        return torch.from_numpy(images)


@contextlib.contextmanager
def reading_bar(count: int) -> Iterator[Callable[[], None]]:
    """Shows a bar of `count` images on a terminal; gives the function that advances it by one."""
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("Reading images", total=count)
        yield lambda: bar.advance(task)


class _Decoder:
    """The workers' data set: maps a batch of ids to the same batch with images. An error is returned, and raised in the run."""

    def __init__(self, images: Mapping[str, Any], required_ids: Callable[[Any], Tensor]):
        self.images, self.required_ids = images, required_ids

    def __getitem__(self, rows: Any) -> Any:
        try:
            return rows._replace(images=self.images[rows.split][self.required_ids(rows)])
        except UserError as error:
            return error


def _init_worker(worker: int) -> None:
    """Initializes a worker process.

    Ctrl-C reaches all processes of a terminal: the run handles it, and still needs its data, so workers ignore it. Objects
    that were garbage before the fork are not collected here: an onnxruntime session would wait for threads of the parent.
    """
    gc.freeze()
    for signum in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)


class Prefetched:
    """Called on an iterable of `Rows`, yields them with their images, decoded ahead by `workers` processes.

    `images`: the splits by name. `required_ids`: returns the ids of the images that some rows need. `keep`: whether workers
    persist from one epoch to the next. Raises `UserError` where an image cannot be read, where a worker dies, and where one
    returns nothing for `TIMEOUT` seconds.
    """

    def __init__(
        self, images: Mapping[str, Any], required_ids: Callable[[Any], Tensor], workers: int, keep: bool = False
    ):
        self.queue = _RowsSampler()
        self.loader: DataLoader[Any] = DataLoader(
            _Decoder(images, required_ids),  # type: ignore[arg-type]
            sampler=self.queue,
            batch_size=None,
            collate_fn=_identity_collate,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=keep and workers > 0,
            timeout=min(CHECK, TIMEOUT) if workers else 0,
            worker_init_fn=_init_worker,
            generator=torch.Generator(),  # else it would draw from the default generator, as dropout does
        )

    def __call__(self, rows: Iterable[Any]) -> Iterator[Any]:
        self.queue.rows = rows
        batches: Any = iter(self.loader)
        try:
            while (batch := _next(batches)) is not None:
                if isinstance(batch, UserError):
                    raise batch
                yield batch
        except (RuntimeError, EOFError, ConnectionError) as error:  # the latter two: a worker died while sending
            if isinstance(error, RuntimeError) and "DataLoader" not in str(error):
                raise
            # Shut down here, or the exit of each other worker would raise the error again later.
            with contextlib.suppress(RuntimeError):
                batches._shutdown_workers()
            message = str(error.__cause__ or "").strip() or str(error).strip() or "it broke off while it sent images"
            cause = message.splitlines()[0]
            raise UserError(
                f"A process that reads images has ended or hangs ({cause}). Most often memory ran out: set fewer "
                "data.workers or a smaller data.batch_size, or data.workers=0 to see what happens."
            ) from error


def _next(batches: Iterator[Any]) -> Any:
    """Returns the next batch, None after the last.

    The loader looks after its workers whenever a wait ends, so waits are short: it also handles the signal of a worker's
    death, but Lightning takes away all such handlers where a training ends, and the next one would wait in silence.
    """
    for _ in range(max(TIMEOUT // CHECK, 1)):
        try:
            return next(batches, None)
        except RuntimeError as error:
            if "timed out" not in str(error):
                raise
    raise RuntimeError(f"DataLoader timed out after {TIMEOUT} seconds")


class _RowsSampler:
    """The sampler of a DataLoader that persists over epochs: yields the rows of the current epoch."""

    def __init__(self) -> None:
        self.rows: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


def _identity_collate(batch: Any) -> Any:
    return batch
