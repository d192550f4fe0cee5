"""One trial of a sweep: one run, or one run per seed, and the values that the study receives."""

from __future__ import annotations

import json
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from hydra import compose
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import BaseDistribution

from litdistill.data.protocol import input_dtype
from litdistill.evaluation.evaluate import rebuild
from litdistill.sweep.space import suggest, unbalanced
from litdistill.training.loggers import guarded, note_results
from litdistill.training.pack import Member
from litdistill.training.train import train
from litdistill.utils.command_line import as_command, command_argv, config_dir_flags, literal
from litdistill.utils.errors import UserError
from litdistill.utils.files import write_text
from litdistill.utils.logging import logged_to
from litdistill.utils.run_names import varied

# The objectives and their keys in summary.json. None of them is measured on the test set.
OBJECTIVES = {
    "val": ("val", "best"),
    "params": ("student", "params"),
    "macs": ("student", "macs"),
    "bytes": ("student", "bytes"),
    "fit_s": ("time", "fit_s"),
    "latency_ms": None,  # measured here
}
WARMUP, REPEATS = 5, 50  # forwards of which the latency is the median, after those that are not counted


@dataclass(frozen=True)
class Plan:
    """The settings that all trials share."""

    options: DictConfig  # conf/sweep
    folder: Path
    overrides: list[str]  # of conf/train.yaml, for all trials
    space: dict[str, BaseDistribution]
    study: optuna.Study
    storage: optuna.storages.BaseStorage  # of the study
    count: int  # of trials
    monitor: str  # the metric that `val` is the best value of
    pack: int = 1  # how many trials are trained side by side

    @property
    def names(self) -> list[str]:
        """Returns the display names of the objectives."""
        return [self.monitor if o == "val" else o for o in self.options.objectives]

    @property
    def seeds(self) -> list[int]:
        return list(self.options.seeds or [])

    @property
    def varied(self) -> list[str]:
        """Returns the options in which runs of the sweep differ."""
        return [*self.space, *(["seed"] if self.seeds else [])]

    @property
    def prunes(self) -> bool:
        return self.options.prune is not None and len(self.options.objectives) == 1


def overrides_of(plan: Plan, trial: optuna.Trial) -> list[str]:
    """Returns the overrides of a trial's runs; its point of the space is drawn when this is first called."""
    values = {name: suggest(trial, name, d) for name, d in plan.space.items()}
    overrides = [*plan.overrides, *(f"{name}={value}" for name, value in values.items())]
    return [*overrides, *unbalanced(values, compose("train", overrides))]


def run_trial(plan: Plan, trial: optuna.Trial, member: Member | None = None) -> list[float]:
    """Returns the trial's objective values: those of its run, or their means over its seeds.

    `member`: of a pack of trials; None: alone.
    """
    overrides, place = overrides_of(plan, trial), plan.folder / str(trial.number)
    trial.set_user_attr("overrides", overrides)
    if not plan.seeds:
        return run_one(plan, trial, overrides, place, plan.prunes, member)
    found = [
        run_one(plan, trial, [*overrides, f"seed={seed}"], place / f"seed{seed}", plan.prunes and i == 0, member)
        for i, seed in enumerate(plan.seeds)
    ]
    return [statistics.fmean(column) for column in zip(*found, strict=True)]


def run_one(
    plan: Plan, trial: optuna.Trial, overrides: list[str], folder: Path, judged: bool, member: Member | None = None
) -> list[float]:
    """Trains one run in its own folder, as `scripts/train.py` does, and returns its objective values."""
    inside = folder.is_relative_to(Path.cwd())
    whole = [*overrides, f"folder={literal(str(folder.relative_to(Path.cwd()) if inside else folder))}"]
    cfg = compose("train", whole)
    if cfg.teacher is not None:
        cfg.teacher.cache.shared = True  # all trials have the same teacher
    write_text(folder / ".hydra" / "config.yaml", OmegaConf.to_yaml(cfg))
    write_text(folder / ".hydra" / "overrides.yaml", OmegaConf.to_yaml(OmegaConf.create(overrides)))
    argv = [*command_argv("train"), *config_dir_flags(), *whole]
    with as_command(argv), logged_to(folder / "train.log", alone=True):
        callbacks = [OptunaPruningCallback(trial, plan.monitor, varied(whole))] if judged else []
        train(cfg, callbacks, member=member)
    values = [objective(name, folder) for name in plan.options.objectives]
    if not all(map(math.isfinite, values)):
        raise UserError(f"{dict(zip(plan.names, values, strict=True))} is not finite")
    return values


def objective(name: str, folder: Path) -> float:
    """Returns one of `OBJECTIVES` of a finished run. Raises `UserError` where its value is null."""
    path = OBJECTIVES[name]
    if path is None:
        return latency_ms(folder)
    value = json.loads((folder / "summary.json").read_text())
    for key in path:
        value = value[key]
    if value is None:
        why = "its int8 file was refused, for what its log says" if name == "bytes" else "its inputs have no one shape"
        raise UserError(f"The run in {folder} has no {name}: {why}.")
    return float(value)


@torch.inference_mode()
def latency_ms(folder: Path) -> float:
    """Returns the median latency of a finished run's student for one sample on the CPU, in milliseconds."""
    data, distiller = rebuild(folder)
    if data.input_shape is None:
        raise UserError("sweep.objectives=[latency_ms] needs data whose inputs are one tensor: use macs or params.")
    net, image, times = (
        distiller.deployed_student.eval(),
        torch.zeros(1, *data.input_shape, dtype=input_dtype(data)),
        [],
    )
    for _ in range(WARMUP + REPEATS):
        start = time.perf_counter()
        net(image)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[WARMUP:])


class OptunaPruningCallback(Callback):
    """Reports each epoch's metric to the study, and raises `optuna.TrialPruned` where the study's pruner decides so.

    A pruned run logs its last metric, so that TensorBoard's HParams tab and other loggers show it too. With several ranks
    nothing is pruned: the others would wait for this one.
    """

    def __init__(self, trial: optuna.Trial, monitor: str, shown: dict[str, Any]):
        self.trial, self.monitor, self.shown = trial, monitor, shown
        self.reported = set(trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch
        if trainer.sanity_checking or epoch in self.reported:  # a resumed run may repeat an epoch's end
            return
        value = float(trainer.callback_metrics[self.monitor])
        self.trial.report(value, epoch)
        last = epoch + 1 == trainer.max_epochs
        if last or trainer.world_size > 1 or not self.trial.should_prune():
            return
        for logger in trainer.loggers:
            with guarded(f"The results in {type(logger).__name__}"):
                note_results(logger, self.shown, {self.monitor: value}, trainer.global_step)
        raise optuna.TrialPruned(f"{self.monitor} {value:.4g} in epoch {epoch + 1} of {trainer.max_epochs}")
