"""Packs of trials: which of them are trained side by side (`litdistill.training.pack`), and where none is."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

import optuna
import torch
from hydra import compose
from omegaconf import DictConfig, OmegaConf

from litdistill.config.distiller import records_steps
from litdistill.config.recipes import teacher_folder
from litdistill.sweep.trial import Plan, overrides_of
from litdistill.training.pack import together
from litdistill.utils.logging import ONCE

log = logging.getLogger(__name__)

# What trials of one pack have in common: the minibatches, the teacher's outputs, and what they are computed by and with.
SHARED = ("data", "task", "teacher", "trainer", "compile", "group", "watch_test")


def pack_size(options: DictConfig, base: DictConfig) -> int:
    """Returns how many trials are trained side by side: `sweep.pack`, or 1 where that gains nothing, as a line says."""
    if options.pack > 1 and (reason := reason_for_single(options, base)) is not None:
        log.info("sweep.pack=%d: trials are trained one by one. %s", options.pack, reason)
        return 1
    return int(options.pack)


def reason_for_single(options: DictConfig, base: DictConfig) -> str | None:
    """Returns in a sentence why trials are not packed; None where they are. `base`: the config of a run."""
    trainer = base.trainer
    if not torch.cuda.is_available() or trainer.get("accelerator") == "cpu":
        return "On a CPU the students' own work is what takes the time, and the teacher's outputs are computed once for all."
    if trainer.get("strategy") not in (None, "auto") or trainer.get("devices") != 1:
        return "A pack is of runs on one device: trainer.devices=1."
    if not records_steps(base):
        return "Steps are not recorded, and a pack is of those that are: capture=auto, without compile=reduce-overhead."
    if "fit_s" in options.objectives:
        return "The time of a run, by which they are judged, would be that of all of its pack."
    if any("wandb" in str((node or {}).get("_target_")) for node in (base.logger or {}).values()):
        return "Weights & Biases has one run at a time in a process."
    return None


def run_all(plan: Plan, trials: Sequence[optuna.Trial], attempt: Callable[..., bool]) -> None:
    """Runs trials, those side by side that are alike; one that finds no memory so is then run alone.

    `attempt(trial, member=None)`: runs one; returns whether it has ended.
    """
    for alike in groups(plan, trials):
        numbers = ", ".join(str(trial.number) for trial in alike)
        if len(alike) == 1:
            attempt(alike[0])
            continue
        log.info("Side by side, on one pass of images and teacher: trials %s. Their times are those of all.", numbers)
        ended = together([functools.partial(attempt, trial) for trial in alike])
        for trial, done in zip(alike, ended, strict=True):
            if not done:
                log.info("Trial %d found no memory beside the others: it is trained alone.", trial.number)
                torch.cuda.empty_cache()
                attempt(trial)


def groups(plan: Plan, trials: Sequence[optuna.Trial]) -> list[list[optuna.Trial]]:
    """Returns the trials in groups that can share their minibatches and their teacher; says what keeps the others apart."""
    if len(trials) < 2:
        return [[trial] for trial in trials]
    seeds = [f"seed={seed}" for seed in plan.seeds[:1]]
    facts = [shared_options(compose("train", [*overrides_of(plan, trial), "folder=x", *seeds])) for trial in trials]
    found: dict[str, list[optuna.Trial]] = {}
    for trial, options in zip(trials, facts, strict=True):
        found.setdefault(json.dumps(options, sort_keys=True, default=str), []).append(trial)
    if len(found) > 1:
        apart = sorted({key for options in facts for key in options if options[key] != facts[0].get(key)})
        fixed = " ".join(f"{key}={facts[0][key]}" for key in apart if key.endswith("seed"))
        remedy = f"; to share order and views: {fixed}" if fixed else ""
        log.info(
            "%d trials are not one pack, since they differ in %s%s.", len(trials), ", ".join(apart), remedy,
            extra=ONCE,
        )  # fmt: skip
    return list(found.values())


def shared_options(cfg: DictConfig) -> dict[str, Any]:
    """Returns the options that trials of a pack have in common, by their full keys; with the folder of a teacher that is
    trained by a recipe, which depends on others."""
    found = {key: value for name in SHARED for key, value in _flat(name, cfg.get(name)).items()}
    if cfg.teacher is not None and cfg.teacher.get("checkpoint") == "auto":
        found["teacher.recipe"] = str(teacher_folder(cfg))
    return found


def _flat(name: str, node: Any) -> dict[str, Any]:
    value = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    if not isinstance(value, dict):
        return {name: value}
    return {key: leaf for inner, part in value.items() for key, leaf in _flat(f"{name}.{inner!s}", part).items()}
