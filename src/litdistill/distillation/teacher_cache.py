"""What a frozen teacher says of an image in one view never changes: here it is computed once, and kept.

    cache = TeacherCache(teacher, data, device, folder)      folder=None: in memory
    outputs = cache.outputs(batch)                           Outputs(logits, features), as teacher(batch.images) gives them

A row holds the logits and the tapped features of one image in one view. Rows are computed when they first come up, and
lie in a file that is mapped into memory: the ranks of a run, and runs beside and after it, share it page by page. What
must be equal for rows to be shared is in the key that names the folder; another teacher, data set, augmentation or
precision is another folder. Each row carries a fingerprint of its bytes and its place, written after it: a row that was
torn by a kill, or that was damaged since, does not count, and is computed anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from litdistill.data import augment as aug
from litdistill.data.datamodule import Batch, ImageData
from litdistill.distillation.teacher import FrozenTeacher
from litdistill.models.parts import evaluating
from litdistill.types import Outputs
from litdistill.utils.checkpoint import write_atomically
from litdistill.utils.errors import UserError
from litdistill.utils.hashing import stable_repr, weights_sha256

log = logging.getLogger(__name__)

SPOT_CHECK = 32  # rows of a file that are computed again before it is believed
# ... and may differ by, relative to the largest: kernels round differently from one batch size to another.
TOLERANCE = 1e-3


class Store:
    """Rows of `width` numbers and a fingerprint each, in two files `<path>.rows` and `<path>.marks`, or in memory.

    Raises `OSError` where there is no room for the files: room is taken when they are made, since running out of it
    later would kill the process.
    """

    def __init__(self, rows: int, width: int, dtype: torch.dtype, device: torch.device, path: Path | None = None):
        self.dtype, self.device = dtype, device
        self.values = _mapped(path, ".rows", rows * width, dtype).view(rows, width)
        self.marks = _mapped(path, ".marks", rows, torch.int64)
        self.known = torch.zeros(rows, dtype=torch.bool)
        for index in self.marks.nonzero().flatten().split(max(1, 2**22 // width)):  # 16 MiB at a time
            self.known[index] = self.marks[index] == fingerprint(self.values[index], index)
        # On the CPU the file itself is what rows are gathered from; a GPU has a copy.
        self.near = self.values if device.type == "cpu" else self.values.to(device)
        self.known = self.known.to(device)

    def get(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The rows (N, width) float32, and which of them are known (N,)."""
        return self.near[index].float(), self.known[index]

    def put(self, index: Tensor, values: Tensor) -> None:
        """Keeps rows (N, width); `index` (N,)."""
        here, exact, values = index.cpu(), values, values.to(self.dtype)
        near = values.cpu()
        if self.dtype == torch.float16 and near.isinf().any() and exact.isfinite().all():
            raise UserError(
                f"teacher.cache.dtype=float16 holds numbers up to 65,504, and the teacher gives {exact.abs().max():.3g}: "
                "keep its outputs as float32."
            )
        self.values[here] = near
        self.marks[here] = fingerprint(near, here)  # after the row: a mark without its row would be a lie
        if self.near is not self.values:
            self.near[index] = values
        self.known[index] = True

    def look_again(self, index: Tensor) -> Tensor:
        """Which of these rows (N,) another process has written since."""
        here = index.cpu()
        if not self.marks[here].any():
            return torch.zeros_like(index, dtype=torch.bool)
        found = (self.marks[here] == fingerprint(self.values[here], here)).to(self.device)
        if self.near is not self.values:
            self.near[index[found]] = self.values[here[found.cpu()]].to(self.device)
        self.known[index[found]] = True
        return found

    def clear(self) -> None:
        self.marks.zero_()
        self.known.zero_()


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
    total = aug._mix(total + (head * _ODD[: head.shape[1]]).sum(1))
    mark = aug._mix(total + aug._GOLDEN * (index + 1))
    return torch.where(mark == 0, torch.ones_like(mark), mark)


_ODD = aug._mix(torch.arange(1, 257)) | 1


class TeacherCache:
    """The outputs of `teacher` for the images of `data`, by (image, view); see the head of this file.

    `rounds`: how many passes through the training set there will be, which an augmentation without a finite number of
    views needs to know. `dtype`: what rows are kept in; float16 halves them, at the price of its rounding.
    """

    def __init__(
        self,
        teacher: FrozenTeacher,
        data: ImageData,
        device: torch.device,
        folder: Path | None = None,
        rounds: int = 1,
        dtype: torch.dtype = torch.float32,
        precision: str = "32-true",
    ):
        self.teacher, self.data, self.device, self.dtype, self.rounds = teacher, data, device, dtype, rounds
        self.folder = folder / cache_key(teacher, data, device, dtype, precision) if folder is not None else None
        self.computed = self.asked = 0
        self._shapes: dict[str, torch.Size] = {}

    def outputs(self, batch: Batch) -> Outputs:
        """What the teacher gives for a batch of training images, whose ids and views say which rows these are."""
        assert batch.ids is not None
        store = self.store
        index = batch.ids if batch.views is None else batch.views * len(self.data.train_targets) + batch.ids
        values, known = store.get(index)
        self.asked += len(index)
        if not bool(known.all()):
            missing = (~known).nonzero().flatten()
            found = store.look_again(index[missing])
            missing = missing[~found]
            if len(missing):
                store.put(index[missing], self._run(batch.images[missing]))
                self.computed += len(missing)
            values, _ = store.get(index)
        return self._unpack(values, batch.ids)

    def bytes(self) -> int:
        """What the rows of the training images take, once all are there."""
        views = view_count(self.data, self.rounds)
        return len(self.data.train_targets) * views * (self._width() * self.dtype.itemsize + 8)

    def _width(self) -> int:
        """The numbers of a row; from a dry forward, once."""
        if not self._shapes:
            out = self.teacher(self.data.get_batch("train", self.data.train_ids[:2].to(self.device), None).images)
            self._shapes = {"logits": out.logits.shape[1:], **{k: v.shape[1:] for k, v in out.features.items()}}
        return sum(s.numel() for s in self._shapes.values())

    def _run(self, images: Tensor) -> Tensor:
        """The rows of images, in groups of one size: what the teacher says of one must not depend on who came with it."""
        size = self.data.batch_size
        rows = []
        for group in images.split(size):
            padding = size - len(group)
            full = torch.cat([group, group[:1].expand(padding, *group.shape[1:])]) if padding else group
            out = self.teacher(full)
            rows.append(_pack(out)[: len(group)])
        return torch.cat(rows)

    def _unpack(self, values: Tensor, ids: Tensor) -> Outputs:
        parts = values.split([s.numel() for s in self._shapes.values()], 1)
        named = {k: p.view(-1, *s) for (k, s), p in zip(self._shapes.items(), parts, strict=True)}
        return Outputs(named.pop("logits"), named, ids)

    @cached_property
    def store(self) -> Store:
        """The rows: of every training image in every view, or as it is where nothing is augmented."""
        rows = len(self.data.train_targets) * view_count(self.data, self.rounds)
        store = self._open(rows, self._width())
        if self.folder is not None:
            self._believe(store)
        return store

    def _open(self, rows: int, width: int) -> Store:
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                return Store(rows, width, self.dtype, self.device, self.folder / "outputs")
            except OSError as error:
                log.warning("The teacher's cache is kept in memory: %s cannot be written: %s", self.folder, error)
                self.folder = None
        return Store(rows, width, self.dtype, self.device)

    def _believe(self, store: Store) -> None:
        """Computes a few of the rows again, and drops all if they differ: something is not in the key that should be."""
        count = len(self.data.train_targets)
        rows = store.known.nonzero().flatten()
        if len(rows) == 0:
            return
        rows = rows[:: max(1, len(rows) // SPOT_CHECK)][:SPOT_CHECK]
        ids, views = rows % count, rows // count
        batch = self.data.get_batch("train", ids, views if self.data.draws_views else None)
        again, kept = self._run(batch.images), store.get(rows)[0]
        if not _alike(again, kept, max(TOLERANCE, 2 * torch.finfo(self.dtype).eps)):
            log.warning("The teacher's cache in %s is not what the teacher says: it is computed anew.", self.folder)
            store.clear()


class CacheOptions(NamedTuple):
    """`mode`: off, memory, disk; or auto: on disk (in memory without a `folder`) where it pays.

    `gb`: what all caches in `folder` may take together, and any cache in memory. `dtype`: float32, or float16 for half the
    room and its rounding. `shared`: more runs with this teacher are known to follow, so that even one pass pays.
    """

    mode: str = "auto"
    folder: Path | None = None
    gb: float = 8.0
    dtype: str = "float32"
    shared: bool = False


def open_cache(
    options: CacheOptions,
    teacher: FrozenTeacher,
    data: ImageData,
    device: torch.device,
    passes: float,
    precision: str = "32-true",
) -> TeacherCache | None:
    """The cache for a run of so many `passes` through the training set, or None where it does not pay or does not fit."""
    if options.mode not in ("auto", "disk", "memory", "off") or options.dtype not in ("float32", "float16"):
        raise UserError(
            f"teacher.cache.mode={options.mode}, dtype={options.dtype}: the mode is auto, disk, memory or off, and rows are "
            "kept as float32 or float16."
        )
    if options.mode == "off" or passes <= 0:
        return None
    rounds = math.ceil(passes)
    folder = options.folder if options.mode != "memory" else None
    cache = TeacherCache(teacher, data, device, folder, rounds, getattr(torch, options.dtype), precision)
    views = view_count(data, rounds)
    finite = data.views is not None
    saving = expected_saving(views, passes) if finite else max(0.0, 1 - views / passes)
    again = options.shared or (cache.folder is not None and cache.folder.is_dir())
    if options.mode == "auto" and saving < 0.05 and not again:
        log.info("The teacher's outputs are not kept: each of %d views is seen about once in this run.", views)
        return None
    size = cache.bytes()
    if size > options.gb * 1e9:
        log.info(
            "The teacher's outputs are not kept: they would take %.1f GB, and teacher.cache.gb is %g.",
            *(size / 1e9, options.gb),
        )
        return None
    if cache.folder is not None:
        prepare(cache.folder, size, int(options.gb * 1e9))
    log.info(
        "The teacher's outputs are kept %s, by image and view (%d of each, %.2f GB): that saves %.0f %% of its work%s.",
        f"in {os.path.relpath(cache.folder)}" if cache.folder else "in memory",
        *(views, size / 1e9, 100 * saving),
        ", and all of it in runs to come" if cache.folder else "",
    )
    return cache


def _pack(out: Outputs) -> Tensor:
    return torch.cat([out.logits.float(), *(v.float().flatten(1) for v in out.features.values())], 1)


def cached_logits(
    net: nn.Module, data: ImageData, split: str, device: torch.device, folder: Path, compute: Callable[[], Tensor]
) -> Tensor:
    """What `compute()` gives, the logits (N, classes) of a frozen `net` over a split, from `folder` where they lie already.

    Whoever comes first computes them; those who start at the same time wait for the file.
    """
    ids = {"train": data.train_ids, "val": data.val_ids, "test": data.test_ids}[split]
    key = cache_key(FrozenTeacher(net), data, device, torch.float32, f"{split} {_digest(ids)}")
    path = folder / f"{key}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock: contextlib.AbstractContextManager[Any] = FileLock(folder / f"{key}.lock").acquire()
    except OSError as error:
        log.warning("What the teacher says is not kept: %s cannot be written: %s", folder, error)
        return compute()
    with lock:
        logits = _read(path)
        if logits is not None and not _says(net, data, split, ids[:SPOT_CHECK], device, logits):
            log.warning("%s is not what the teacher says: it is computed anew.", path)
            logits = None
        if logits is None:
            logits = compute()
            facts = {"sha256": weights_sha256({"logits": logits})}
            try:
                write_atomically(path, lambda temporary: save_file({"logits": logits.contiguous()}, temporary, facts))
            except UserError as error:
                log.warning("What the teacher says is not kept: %s", error)
    return logits


def _says(net: nn.Module, data: ImageData, split: str, ids: Tensor, device: torch.device, logits: Tensor) -> bool:
    """Whether these are a network's logits (M, classes) for a split, as far as its first images `ids` (N,) tell."""
    images = data.get_batch("test" if split == "test" else "train", ids.to(device), None).images
    with evaluating(net.to(device)):
        return _alike(net(images).float().cpu(), logits[: len(ids)].cpu(), TOLERANCE)


def _alike(again: Tensor, kept: Tensor, tolerance: float) -> bool:
    """Whether two tensors differ by no more than `tolerance` of the first one's largest number; no where one has a NaN."""
    return again.shape == kept.shape and bool((again - kept).abs().max() <= tolerance * again.abs().max())


def _read(path: Path) -> Tensor | None:
    """The logits in a file of `evaluated`; None where there is none, or not a whole one."""
    try:
        with safe_open(path, "pt") as file:
            logits, noted = file.get_tensor("logits"), (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    if noted != weights_sha256({"logits": logits}):
        log.warning("%s is damaged: what the teacher says is computed anew.", path)
        return None
    return logits


def view_count(data: ImageData, rounds: int) -> int:
    """How many rows an image can have: its distinct views, or one for every pass where there is no end of them."""
    return data.views or min(rounds, data.fixed_views or rounds)


def expected_saving(views: int, passes: float) -> float:
    """The share of the teacher's work that is not done in a run that starts without a row and draws its views at random."""
    return max(0.0, 1 - views * (1 - (1 - 1 / views) ** passes) / passes)


def cache_key(teacher: FrozenTeacher, data: ImageData, device: torch.device, dtype: torch.dtype, precision: str) -> str:
    """Sixteen hex digits that are equal only where rows may be shared."""
    mixed = [stable_repr(data.mix), _digest(data.train_ids)] if data.mix is not None else None
    facts: Mapping[str, Any] = {
        "teacher": teacher.sha256,
        "network": [repr(teacher.net), stable_repr(teacher.net)],
        "taps": teacher.tapped.names,
        "compiled": teacher.mode,
        "data": data.sha256,
        "normalised": (data.mean, data.std),
        "augment": [stable_repr(a) for a in data.augment],
        "mixed": mixed,
        "seed": None if data.views is not None else data.view_seed,
        "kept": str(dtype),
        "precision": (precision, torch.get_float32_matmul_precision(), device.type, torch.__version__),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def prepare(folder: Path, needed: int, limit: int) -> None:
    """Makes the folder of a cache, with room for it, or notes that it is in use; one process at a time.

    Where that cannot be done, rows are kept in memory, which is said when they are.
    """
    with contextlib.suppress(OSError):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / ".room.lock"):
            make_room(folder, needed, limit)
            folder.mkdir(exist_ok=True)
            os.utime(folder)


def make_room(folder: Path, needed: int, limit: int) -> None:
    """Removes the caches beside `folder` that were not used for longest until all stay below `limit` bytes when it holds
    `needed`. It itself stays.

    Those who have one open go on with it: a file that is mapped lives on without its name.
    """
    caches = sorted((p for p in folder.parent.glob("*") if any(p.glob("*.rows"))), key=lambda p: p.stat().st_mtime)
    sizes = {p: sum(f.stat().st_size for f in p.iterdir()) for p in caches}
    total = sum(sizes.values()) + max(0, needed - sizes.pop(folder, 0))
    for cache, size in sizes.items():
        if total <= limit:
            return
        log.info("Removing %s to make room.", cache)
        shutil.rmtree(cache, ignore_errors=True)
        total -= size
