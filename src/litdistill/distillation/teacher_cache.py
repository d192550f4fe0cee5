"""A cache of the teacher's outputs. The teacher is frozen, so its outputs for one view of a sample never change.

    cache = TeacherCache(teacher, data, device, folder)      folder=None: in memory
    outputs = cache.outputs(batch)                           Outputs(heads, features), equal to teacher(batch)

A row holds all heads and tapped features of one view of a sample. A row is computed when it is first needed, and stored in a
memory-mapped file (`litdistill.distillation.row_store`), which the ranks of a run, and concurrent and later runs, share. The
folder's name is a hash of everything that the rows depend on: the teacher, the data set, the augmentation, the precision.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from litdistill.data.protocol import IndexedData, split_ids
from litdistill.distillation.cache_room import prepare
from litdistill.distillation.row_store import RowStore
from litdistill.features.outputs import run_network
from litdistill.models.parts import evaluating
from litdistill.types import Batch, Outputs
from litdistill.utils.command_line import near
from litdistill.utils.errors import UserError
from litdistill.utils.files import write_atomically
from litdistill.utils.hashing import network_sha256, weights_sha256

log = logging.getLogger(__name__)

FEW = 8  # of a training set of so many times the samples that are trained on, a file is of these alone, and its key too
OUTSIDE = 2**62  # the place of a sample that is not trained on: no row
SPOT_CHECK = 32  # rows of a file that are computed again before it is used
# Their largest difference, relative to the largest value: kernels round differently at different batch sizes.
TOLERANCE = 1e-3


class Shape(NamedTuple):
    """Of one sample's values: `size`, and its dimensions (from 1) from the outermost in memory to the innermost: `order`."""

    size: torch.Size
    order: list[int]


class Teacher(Protocol):
    """The interface of `litdistill.distillation.teacher.FrozenTeacher` that the cache uses."""

    @property
    def sha256(self) -> str: ...  # of its weights, structure and preprocessing

    @property
    def taps(self) -> Sequence[str]: ...

    @property
    def mode(self) -> str | None: ...  # of `torch.compile`

    def __call__(self, batch: Batch) -> Outputs: ...


class TeacherCache:
    """The outputs of `teacher` for the samples of `data`, by (sample, view); see the module's docstring.

    `rounds`: the number of passes through the training set, which gives the number of views where the augmentation has no
    finite set of them. `dtype`: that of the stored rows; float16 halves their size and rounds them.
    """

    def __init__(
        self,
        teacher: Teacher,
        data: IndexedData,
        device: torch.device,
        folder: Path | None = None,
        rounds: int = 1,
        dtype: torch.dtype = torch.float32,
        precision: str = "32-true",
    ):
        self.teacher, self.data, self.device, self.dtype, self.rounds = teacher, data, device, dtype, rounds
        self.computed = self.requested = 0
        self.complete = False  # whether all rows of the training samples are known to be valid
        few = FEW * len(data.train_ids) <= len(data.train_targets)
        # The place of each sample among the training samples, where rows are of these alone.
        self._places: Tensor | None = self._places_of() if few or folder is None else None
        own = data.train_ids.cpu() if few else None
        self.folder = folder / cache_key(teacher, data, device, dtype, precision, own) if folder is not None else None
        self._shapes: tuple[dict[str, Shape], dict[str, Shape]] | None = None  # of heads, of features

    def outputs(self, batch: Batch) -> Outputs:
        """Returns the teacher's outputs for a batch of training samples, whose ids and views index the rows."""
        assert batch.ids is not None
        store = self.store
        index = self._rows(batch.ids, batch.views)
        values, valid = store.get(index)
        self.requested += len(index)
        if not self.complete and not bool(valid.all()):
            missing = (~valid).nonzero().flatten()
            missing = missing[~store.refresh(index[missing])]
            if len(missing):
                store.put(index[missing], self._run(batch.inputs, missing))
                self.computed += len(missing)
            values, _ = store.get(index)
        return self._unpack(values, batch.ids)

    def start_epoch(self) -> None:
        """Notes whether all rows are known: then no batch waits for the device to say which are missing."""
        if not self.complete and self.requested >= len(self.data.train_ids):
            views = torch.arange(self.data.view_count(self.rounds), device=self.device)[:, None]
            self.complete = bool(self.store.valid[self._rows(self.data.train_ids.to(self.device), views)].all())

    def bytes(self) -> int:
        """Returns the size in bytes of the complete cache of the training samples."""
        views = self.data.view_count(self.rounds)
        return self.samples * views * (self._width() * self.dtype.itemsize + 8)

    @property
    def samples(self) -> int:
        """Returns the number of samples that have rows."""
        return len(self.data.train_targets if self._places is None else self.data.train_ids)

    def _rows(self, ids: Tensor, views: Tensor | None) -> Tensor:
        """Returns the rows of samples `ids` in `views`: of all samples, runs with other training samples share a file."""
        ids = ids if self._places is None else self._places[ids]
        return ids if views is None else views * self.samples + ids

    def _places_of(self) -> Tensor:
        ids = self.data.train_ids.cpu().sort().values
        places = torch.full((len(self.data.train_targets),), OUTSIDE)
        places[ids] = torch.arange(len(ids))
        return places.to(self.device)

    def _width(self) -> int:
        """Returns the number of values in a row, from one dry forward."""
        if self._shapes is None:
            batch = self.data.get_batch("train", self.data.train_ids[:2].to(self.device))
            out = self.teacher(Batch(batch.inputs, None))
            heads, features = ({k: _shape(v) for k, v in part.items()} for part in (out.heads, out.features))
            self._shapes = heads, features
        return sum(shape.size.numel() for part in self._shapes for shape in part.values())

    def _run(self, inputs: Any, index: Tensor) -> Tensor:
        """Returns the rows (N, width) of the inputs `index` (N,), run in batches of one size.

        Kernels round differently at different batch sizes, and a sample's row must not depend on its batch.
        """
        size, rows = self.data.batch_size, []
        for group in index.split(size):
            full = torch.cat([group, group[:1].expand(size - len(group))])
            rows.append(_pack(self.teacher(Batch(_select(inputs, full), None)))[: len(group)])
        return torch.cat(rows)

    def _unpack(self, values: Tensor, ids: Tensor) -> Outputs:
        assert self._shapes is not None
        heads, features = self._shapes
        shapes = [*heads.values(), *features.values()]
        columns = values.split([shape.size.numel() for shape in shapes], 1)
        parts = [_laid_out(x, shape) for x, shape in zip(columns, shapes, strict=True)]
        return Outputs(
            dict(zip(heads, parts, strict=False)), dict(zip(features, parts[len(heads) :], strict=True)), ids
        )

    @cached_property
    def store(self) -> RowStore:
        """Returns the rows of every training sample in every view, or unaugmented where the data has no augmentation."""
        store = self._open(self.data.view_count(self.rounds), self._width())
        if self.folder is not None:
            self._spot_check(store)
        return store

    def _open(self, views: int, width: int) -> RowStore:
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                path = self.folder / "outputs"
                return RowStore(self.samples * views, width, self.dtype, self.device, path)
            except OSError as error:
                log.warning("The teacher's cache is kept in memory: %s cannot be written: %s", self.folder, error)
                self.folder, self._places = None, self._places_of()
        return RowStore(self.samples * views, width, self.dtype, self.device)

    def _spot_check(self, store: RowStore) -> None:
        """Computes a few rows again, and clears the cache if they differ: the key then lacks something they depend on."""
        rows = store.valid.nonzero().flatten()
        if len(rows) == 0:
            return
        rows = rows[:: max(1, len(rows) // SPOT_CHECK)][:SPOT_CHECK]
        ids, views = rows % self.samples, rows // self.samples
        if self._places is not None:
            ids = self.data.train_ids.sort().values.to(ids.device)[ids]
        batch = self.data.get_batch("train", ids, views if self.data.draws_views else None)
        again = self._run(batch.inputs, torch.arange(len(rows), device=rows.device))
        if not _close(again, store.get(rows)[0], max(TOLERANCE, 2 * torch.finfo(self.dtype).eps)):
            log.warning("The cache in %s does not hold the teacher's outputs: it is computed anew.", self.folder)
            store.clear()


class CacheOptions(NamedTuple):
    """`mode`: off, memory, disk; or auto: on disk (in memory without a `folder`) if caching saves time.

    `gb`: limit in 10⁹ bytes of all caches in `folder` together, and of a cache in memory. `dtype`: float32, or float16 for
    half the size with rounding. `shared`: more runs with this teacher will follow, so that caching pays even for one pass.
    """

    mode: str = "auto"
    folder: Path | None = None
    gb: float = 8.0
    dtype: str = "float32"
    shared: bool = False


def open_cache(
    options: CacheOptions,
    teacher: Teacher,
    data: IndexedData,
    device: torch.device,
    passes: float,
    precision: str = "32-true",
) -> TeacherCache | None:
    """Returns the cache for a run of `passes` through the training set; None if it saves too little or exceeds `gb`."""
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
    views = data.view_count(rounds)
    finite = data.views is not None
    saving = expected_saving(views, passes) if finite else max(0.0, 1 - views / passes)
    again = options.shared or (cache.folder is not None and cache.folder.is_dir())
    if options.mode == "auto" and saving < 0.05 and not again:
        log.info("The teacher's outputs are not kept: each of %d views is seen about once in this run.", views)
        return None
    size = cache.bytes()
    if size > options.gb * 1e9:
        log.info(
            "The teacher's outputs are not kept, and it runs in each step: they would take %.1f GB, %.3g kB a sample and view; "
            "teacher.cache.gb is %g. teacher.cache.dtype=float16 halves that; teacher.outputs, of a file of litdistill outputs "
            "with top=…, keeps the most probable outputs alone.",
            *(size / 1e9, size / 1e3 / (views * cache.samples), options.gb),
        )
        return None
    if cache.folder is not None:
        prepare(cache.folder, size, int(options.gb * 1e9))
    log.info(
        "The teacher's outputs are kept %s, by sample and view (%d of each, %.2f GB): that saves %.0f %% of its work%s.",
        f"in {near(cache.folder)}" if cache.folder else "in memory",
        *(views, size / 1e9, 100 * saving),
        ", and all of it in runs to come" if cache.folder else "",
    )
    return cache


def _shape(x: Tensor) -> Shape:
    """Returns the shape of a sample, and the order of its dimensions in memory, of values (N, ...)."""
    return Shape(x.shape[1:], sorted(range(1, x.dim()), key=x.stride, reverse=True))


def _laid_out(x: Tensor, shape: Shape) -> Tensor:
    """Returns rows (N, width) as (N, *size), in memory as the network gives them: sums round by the order of what they add."""
    moved = x.reshape(-1, *shape.size).permute(0, *shape.order).contiguous()
    return moved.movedim([place + 1 for place in range(len(shape.order))], shape.order)


def _pack(out: Outputs) -> Tensor:
    return torch.cat([v.float().flatten(1) for v in (*out.heads.values(), *out.features.values())], 1)


def _select(inputs: Any, index: Tensor) -> Any:
    """Returns the samples `index` (N,) of a network's inputs, a tensor or a nested structure of tensors."""
    if isinstance(inputs, Tensor):
        return inputs[index]
    if isinstance(inputs, Mapping):
        return {k: _select(v, index) for k, v in inputs.items()}
    return tuple(_select(v, index) for v in inputs) if isinstance(inputs, (tuple, list)) else inputs


def cached_logits(
    net: nn.Module,
    data: IndexedData,
    split: str,
    device: torch.device,
    folder: Path,
    compute: Callable[[], Tensor],
    run: Callable[[Any], Tensor] | None = None,
    options: str = "",
) -> Tensor:
    """Returns the logits (N, classes) of a frozen `net` for a split, read from `folder`, or computed and stored there.

    The first process computes them by `compute()`; concurrent ones wait for the file. `run`: the same for a batch of inputs;
    the network's main head unless given. `options`: what the results depend on besides the network and the data.
    """
    ids = split_ids(data, split)
    run = run or (lambda inputs: run_network(net, inputs).main)
    key = logits_key(net, data, split, device, options)
    path = folder / f"{key}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock: contextlib.AbstractContextManager[Any] = FileLock(folder / f"{key}.lock").acquire()
    except OSError as error:
        log.warning("The teacher's logits are not kept: %s cannot be written: %s", folder, error)
        return compute()
    with lock:
        logits = _read(path)
        if logits is not None and not _gives(net, run, data, split, ids[:SPOT_CHECK], device, logits):
            log.warning("%s does not hold the teacher's logits: they are computed anew.", path)
            logits = None
        if logits is None:
            logits = compute()
            facts = {"sha256": weights_sha256({"logits": logits})}
            try:
                write_atomically(path, lambda temporary: save_file({"logits": logits.contiguous()}, temporary, facts))
            except UserError as error:
                log.warning("The teacher's logits are not kept: %s", error)
    return logits


def _gives(
    net: nn.Module,
    run: Callable[[Any], Tensor],
    data: IndexedData,
    split: str,
    ids: Tensor,
    device: torch.device,
    logits: Tensor,
) -> bool:
    """Returns whether `logits` (M, classes) match the network's outputs for the first samples `ids` (N,) of a split."""
    inputs = data.get_batch(split, ids.to(device)).inputs
    with evaluating(net.to(device)):
        return _close(run(inputs).float().cpu(), logits[: len(ids)].cpu(), TOLERANCE)


def _close(again: Tensor, kept: Tensor, tolerance: float) -> bool:
    """Returns whether two tensors differ by at most `tolerance` times the first one's largest finite value; False for a NaN.

    Infinite values (a class that the teacher does not know) must be equal.
    """
    if again.shape != kept.shape:
        return False
    difference = torch.where(again == kept, 0.0, again - kept).abs().max()
    return bool(difference <= tolerance * again.masked_fill(~again.isfinite(), 0.0).abs().max())


def _read(path: Path) -> Tensor | None:
    """Returns the logits in a file of `cached_logits`; None if it is missing, partial or damaged."""
    try:
        with safe_open(path, "pt") as file:
            logits, noted = file.get_tensor("logits"), (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    if noted != weights_sha256({"logits": logits}):
        log.warning("%s is damaged: the teacher's logits are computed anew.", path)
        return None
    return logits


def expected_saving(views: int, passes: float) -> float:
    """Returns the expected share of teacher forwards that an initially empty cache saves, with views drawn at random."""
    return max(0.0, 1 - views * (1 - (1 - 1 / views) ** passes) / passes)


def cache_key(
    teacher: Teacher,
    data: IndexedData,
    device: torch.device,
    dtype: torch.dtype,
    precision: str,
    own: Tensor | None = None,
) -> str:
    """Returns 16 hex digits that are equal only if the rows are. `own`: the samples of the rows (M,); None: all."""
    about = [teacher.sha256, list(teacher.taps), teacher.mode, data.identity("train"), str(dtype)]
    ids = "" if own is None else weights_sha256({"": own.sort().values})
    return _key([*about, precision, ids, *_arithmetic(device)])


def logits_key(net: nn.Module, data: IndexedData, split: str, device: torch.device, options: str = "") -> str:
    """Returns 16 hex digits that are equal only if the logits of the split are. `options`: what else they depend on."""
    ids = weights_sha256({"": split_ids(data, split)})
    return _key([network_sha256(net), split, data.identity(split), ids, options, *_arithmetic(device)])


def _arithmetic(device: torch.device) -> list[str]:
    return [torch.get_float32_matmul_precision(), device.type, torch.__version__]


def _key(facts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
