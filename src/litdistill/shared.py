"""What the runs of a pack (`litdistill.pack`) have in common: data, teacher, and what both give for the last window."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from litdistill.build import build_data, build_distiller, build_teacher
from litdistill.data.datamodule import Batch, Ids, ImageData
from litdistill.distiller import Distiller
from litdistill.methods.base import Method, Outputs
from litdistill.recipes import recipe_hash, teacher_config
from litdistill.train import train_teacher

# What of a config runs may differ in that share their data and teacher; the teacher's own recipe is looked at besides.
MAY_DIFFER = (
    *("name", "technique", "folder", "resume", "callbacks", "logger", "watch_test", "checkpoint_minutes"),
    *("seed", "student", "compress", "method", "optimizer", "scheduler", "schedule", "scale", "ema"),
)
CLIPPING = ("gradient_clip_val", "gradient_clip_algorithm")


def common(cfg: DictConfig) -> str:
    """Equal for two configs only if their runs see the same images in the same order, and the same teacher."""
    facts: Any = OmegaConf.to_container(cfg.copy(), resolve=True)
    for key in MAY_DIFFER:
        facts.pop(key, None)
    for key in CLIPPING:
        facts["trainer"].pop(key, None)
    if cfg.data.get("fraction") is None and cfg.data.get("per_class") is None:
        facts["data"].pop("subset_seed", None)  # all of it, whatever the seed
    if cfg.teacher is not None and (cfg.teacher.checkpoint == "auto" or cfg.teacher.get("ensemble")):
        facts["recipe"] = recipe_hash(teacher_config(cfg))
    if cfg.teacher is not None and _is_drawn(cfg.teacher):
        facts["seed"] = cfg.seed
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _is_drawn(teacher: Any) -> bool:
    """Whether weights of a teacher depend on the run's seed."""
    if diffs := teacher.get("ensemble"):
        return any(_is_drawn({**teacher, "ensemble": None, **diff}) for diff in diffs)
    return teacher.get("checkpoint") is None or teacher.get("head") is not None


class Shared:
    """Data and teacher that runs have in common, and the last window's images and what the teacher gave for it."""

    def __init__(self, cfg: DictConfig):
        if cfg.threads is not None:
            torch.set_num_threads(cfg.threads)
        self.data = build_data(cfg)
        self.teacher = build_teacher(cfg, self.data, train_teacher)
        self._streams = self.data._is_encoded("train")
        self._held_out = set(self.data.val_ids.tolist())
        self._epoch = functools.lru_cache(maxsize=1)(self.data._epoch)
        self._window: tuple[Ids, Batch, list[int]] | None = None
        self._kept: dict[Any, Any] = {}

    def build(
        self,
        cfg: DictConfig,
        method: Method,
        start: Callable[[DictConfig], Path | None],
        before_window: Callable[[Trainer], None],
    ) -> tuple[ImageData, Distiller]:
        """`litdistill.train.build` for one of the runs; `start` as there."""
        data = copy.copy(self.data)  # a trainer's own; images and splits are the same
        distiller = build_distiller(cfg, data, method, self.teacher, start(cfg))
        if not self._streams:  # else there would be so many times the processes that decode images
            data.batch = functools.partial(self._batch, data, before_window)  # type: ignore[method-assign]
            data._epoch = self._epoch  # type: ignore[method-assign]
        if (teacher := distiller.teacher) is not None:
            taps = tuple(teacher.tapped.names)
            distiller.__dict__["teacher"] = self._kept.setdefault(("teacher", taps), teacher)
            said = self._kept.setdefault(("said", taps), Said())
            distiller._taught = functools.partial(said, distiller._taught)  # type: ignore[method-assign]
            distiller._open_cache = functools.partial(self._open_cache, distiller, taps)  # type: ignore[method-assign]
        return data, distiller

    def _batch(self, data: ImageData, before_window: Callable[[Trainer], None], rows: Ids) -> Batch:
        """`data.batch`: for training those of the last window, where these are asked for and unchanged."""
        trainer, examined = data.trainer, int(rows.ids[0]) in self._held_out  # as teachers are, before training begins
        if trainer is None or not trainer.training or examined:
            return self.data.batch(rows)
        before_window(trainer)
        if self._window is not None:
            asked, batch, versions = self._window
            same = all(_equal(a, b) for a, b in ((asked.ids, rows.ids), (asked.views, rows.views)))
            if same and versions == _versions(batch):
                return batch._replace(sizes=rows.sizes, skip=rows.skip)
        batch = self.data.batch(rows)
        self._window = (rows._replace(images=None), batch, _versions(batch))
        return batch

    def _open_cache(self, distiller: Distiller, taps: tuple[str, ...]) -> None:
        key = ("cache", taps, distiller.method.needs_teacher)
        if key not in self._kept:
            Distiller._open_cache(distiller)
            if distiller.cache is not None:
                distiller.cache.data = self.data  # no single run's, which would be kept alive
            self._kept[key] = distiller.cache
        distiller.cache = self._kept[key]


class Said:
    """What the teacher gave for the last window or for its minibatches, for whoever asks next with the same tensors."""

    def __init__(self) -> None:
        self.window: Tensor | None = None  # kept, so that no other tensor comes to lie in its place
        self.kept: dict[tuple[int, int], tuple[Outputs, list[int]]] = {}

    def __call__(self, ask: Callable[[Batch], Outputs], batch: Batch) -> Outputs:
        images = batch.images
        if self.window is None or self.window.untyped_storage().data_ptr() != images.untyped_storage().data_ptr():
            self.window, self.kept = images, {}
        place = (int(images.storage_offset()), len(images))
        if place in self.kept:
            said, versions = self.kept[place]
            if versions == _versions((said.logits, *said.features.values())):
                return said
        said = ask(batch)
        self.kept[place] = said, _versions((said.logits, *said.features.values()))
        return said


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


def _versions(tensors: Sequence[Any]) -> list[int]:
    """They change where one of the tensors is changed in place: what one run did to them, no other must see."""
    return [x._version for x in tensors if isinstance(x, Tensor)]
