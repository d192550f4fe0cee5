"""Resuming a run from its checkpoint: which one, with which options, and wherever the run's folder lies now."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from omegaconf import DictConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from litdistill.config.changes import (
    Changes,
    Options,
    check_changes,
    check_finished,
    compared_options,
    differences,
)
from litdistill.config.origin import accept_record
from litdistill.distillation.distiller import Distiller
from litdistill.distillation.schedules import optimizer_of
from litdistill.training.grouping import Layout, layout_of
from litdistill.utils.checkpoint import load_checkpoint
from litdistill.utils.errors import UserError
from litdistill.utils.hashing import weights_sha256

log = logging.getLogger(__name__)


# What Lightning restores a training from.
NEEDED = {"state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks", "global_step"}


class LastState(NamedTuple):
    """The checkpoint that a run is resumed from; all None for a new run."""

    path: Path | None = None
    layout: Layout | None = None
    kept: dict[str, Any] | None = None  # the state of `RunOptions`


def last_state(checkpoints: Path, max_epochs: int | None = None) -> LastState:
    """Returns the checkpoint to resume from, `last.ckpt` or else `best.ckpt`.

    A checkpoint that cannot be read is skipped with a warning. Raises `UserError` if its epoch is beyond `max_epochs`.
    """
    for name in ("last.ckpt", "best.ckpt"):
        if (checkpoints / name).is_file():
            try:
                state = load_checkpoint(checkpoints / name)
                layout = layout_of(state)
                if type(state.get("epoch")) is not int or not state.keys() >= NEEDED:
                    raise UserError(
                        f"{checkpoints / name} is no checkpoint that a training goes on from, or of an old version of "
                        f"Lightning: it lacks {', '.join(sorted({'epoch', *NEEDED} - state.keys())) or 'a count of epochs'}."
                    )
            except UserError as error:
                log.warning("%s Trying the one before.", error)
                continue
            if max_epochs is not None and 0 <= max_epochs <= state["epoch"]:
                raise UserError(
                    f"{checkpoints / name} is of epoch {state['epoch'] + 1}, and trainer.max_epochs={max_epochs}. Set that "
                    "higher to go on, or start a new run without resume."
                )
            log.info("Going on from %s", checkpoints / name)
            return LastState(checkpoints / name, layout, kept_options(state))
    return LastState()


def kept_options(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the state of `RunOptions` in a checkpoint; None without a valid one."""
    callbacks = checkpoint.get("callbacks")
    kept = callbacks.get(RunOptions.__qualname__) if isinstance(callbacks, Mapping) else None
    valid = isinstance(kept, dict) and isinstance(kept.get("options"), dict) and isinstance(kept.get("history"), list)
    return kept if valid else None


def run_options(cfg: DictConfig, best: ModelCheckpoint) -> Options:
    """Returns the options of a run that a resumed run is held against. `best`: the callback that selects the epoch."""
    chosen_by = {"callbacks.best.monitor": str(best.monitor), "callbacks.best.mode": best.mode}
    return compared_options(cfg) | chosen_by


def check_unchanged(cfg: DictConfig, folder: Path) -> None:
    """Raises `UserError` where the finished run in `folder` was trained with other options than `cfg` has."""
    last = folder / "checkpoints" / "last.ckpt"
    kept = kept_options(load_checkpoint(last)) if last.is_file() else None
    if kept is not None:
        then = {k: v for k, v in kept["options"].items() if not k.startswith("callbacks.")}
        check_finished(differences(then, compared_options(cfg)), folder)


class RunOptions(Callback):
    """Keeps the options of a run in its checkpoints, and applies those that have changed when the run is resumed.

    A checkpoint brings the learning rate, the weight decay and the horizon of the schedule with it that it was written with.
    Where options differ, the parameter groups and the scheduler become those that a run with the new options has after as
    many steps; the moments of the optimizer stay. Without a difference nothing is touched.

    Args:
        options: of the run, by `run_options`. folder: the run's folder, for messages.
        kept: the state of this callback in the checkpoint that is resumed; None for a new run.
        steps: returns the optimizer's steps in an epoch under a Trainer, for the position in a schedule where the number of
            processes has changed.

    Raises `UserError` for a changed option that is not applied.
    """

    def __init__(self, options: Options, folder: Path, kept: dict[str, Any] | None, steps: Callable[[Trainer], int]):
        self.options, self.folder, self.kept, self.steps = options, folder, kept, steps
        self.changes: Changes = differences(kept["options"], self.options) if kept is not None else {}
        check_changes(self.changes, folder)
        self.history: list[dict[str, Any]] = list(kept["history"]) if kept is not None else []
        self.steps_per_epoch = 0
        self.rates: list[float] = []  # the learning rate of each parameter group at the first step
        self.teacher: str | None = None
        self.compiled: str | None = (
            None if kept is None else kept.get("compiled")
        )  # by `compile.student=auto`: a mode, or "off"
        self._patience: dict[EarlyStopping, int] = {}

    @property
    def all_changes(self) -> list[dict[str, Any]]:
        """Returns the history with the changes that are still to be applied."""
        return [*self.history, {"options": self.changes}]

    def state_dict(self) -> dict[str, Any]:
        keys = ("options", "history", "steps_per_epoch", "rates", "teacher", "compiled")
        return {key: getattr(self, key) for key in keys}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Its state in a checkpoint holds its patience, too.
        self._patience = {c: c.patience for c in trainer.callbacks if isinstance(c, EarlyStopping)}  # type: ignore[attr-defined]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            state = checkpoint.get("callbacks", {}).get(callback.state_key)
            if isinstance(callback, ModelCheckpoint) and isinstance(state, dict) and callback.dirpath is not None:
                checkpoint["callbacks"][callback.state_key] = moved(state, Path(callback.dirpath))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        teacher = pl_module.teacher if isinstance(pl_module, Distiller) else None
        self.teacher = None if teacher is None else weights_sha256(teacher.net.state_dict())
        then = self.kept.get("teacher") if self.kept is not None else self.teacher
        if then != self.teacher:
            raise UserError(
                f"{self.folder} cannot go on with another teacher: the SHA-256 of its weights was {str(then)[:12]}, and is "
                f"{str(self.teacher)[:12]}. Name the run or the file that it began with in teacher.checkpoint."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for callback, patience in self._patience.items():
            callback.patience = patience
        assert isinstance(pl_module, Distiller)
        if trainer.is_global_zero:
            accept_record(self.folder)
        self.steps_per_epoch = self.steps(trainer)
        fresh = optimizer_of(pl_module)
        self.rates = [float(group["lr"]) for group in fresh.param_groups]
        if self.kept is None:
            return
        if self.changes:
            where = {"epoch": trainer.current_epoch, "step": trainer.global_step}
            self.history.append(where | {"options": self.changes})
            log.info(
                "From step %d (epoch %d) on, with other options: %s. Learning rate and schedule are those of a run that had "
                "them from its start.",
                *(trainer.global_step, trainer.current_epoch + 1),
                ", ".join(f"{key} {then} -> {now}" for key, (then, now) in self.changes.items()),
            )
        same = (self.kept.get("rates"), self.kept.get("steps_per_epoch")) == (self.rates, self.steps_per_epoch)
        if self.changes or not same:
            self._apply(trainer, pl_module)

    def _apply(self, trainer: Trainer, distiller: Distiller) -> None:
        """Sets the parameter groups and the scheduler to those of a run with the present options after as many steps."""
        made = distiller.configure_optimizers()
        fresh: Optimizer = made["optimizer"] if isinstance(made, dict) else made
        (optimizer,) = trainer.optimizers
        for key in (k.partition(".")[2] for k in self.changes if k.startswith("optimizer.")):
            if any(key not in group for group in fresh.param_groups):
                raise UserError(
                    f"optimizer.{key} is no option that {type(fresh).__name__} keeps for its parameters, and cannot change in "
                    "the middle of a training. Leave it as it was."
                )
        for config in trainer.lr_scheduler_configs:
            new = made["lr_scheduler"]["scheduler"]
            if isinstance(config.scheduler, ReduceLROnPlateau):
                assert self.kept is not None
                then = self.kept.get("rates") or self.rates
                for group, now, rate in zip(fresh.param_groups, optimizer.param_groups, then, strict=True):
                    group["lr"] *= now["lr"] / rate if rate else 1  # reductions so far are kept
                seen = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")
                state = new.state_dict() | {k: v for k, v in config.scheduler.state_dict().items() if k in seen}
            else:
                _step(new, self._position(config.scheduler, config.interval))
                state = new.state_dict()
            config.scheduler.load_state_dict(state)
        for group, now in zip(optimizer.param_groups, fresh.param_groups, strict=True):
            group.update({key: value for key, value in now.items() if key != "params"})

    def _position(self, scheduler: Any, interval: str) -> int:
        """Returns how often the scheduler would have been stepped: fewer processes take more steps in an epoch."""
        if not hasattr(scheduler, "last_epoch"):
            raise UserError(
                f"{type(scheduler).__name__} does not say how often it was stepped, so that changed options cannot be "
                "applied to it. Leave them as they were."
            )
        then = (self.kept or {}).get("steps_per_epoch")
        scale = self.steps_per_epoch / then if interval == "step" and then else 1
        return round(scheduler.last_epoch * scale)


def _step(scheduler: Any, times: int) -> None:
    """Steps a scheduler whose optimizer takes no steps."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        for _ in range(times):
            scheduler.step()


def moved(state: dict[str, Any], dirpath: Path) -> dict[str, Any]:
    """Returns the state of a `ModelCheckpoint` for checkpoints that lie in `dirpath` now.

    Lightning forgets the best score where the absolute path has changed. It is kept, with the paths below the new folder. It
    is dropped where the best checkpoint itself is missing, so that a later epoch is written.
    """
    old = state.get("dirpath")
    if not isinstance(old, str):
        return state

    def new(path: Any) -> Any:
        return str(dirpath / Path(path).name) if isinstance(path, str) and path else path

    changed = dict(state) if old == str(dirpath) else {**state, "dirpath": str(dirpath)}
    if old != str(dirpath):
        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            changed[key] = new(state.get(key))
        changed["best_k_models"] = {new(k): v for k, v in (state.get("best_k_models") or {}).items()}
    best = changed.get("best_model_path")
    if best and not Path(best).is_file():
        log.warning("%s is missing: the best epoch is chosen anew, among those to come.", best)
        changed |= {"best_model_score": None, "best_k_models": {}, "best_model_path": "", "kth_best_model_path": ""}
        changed.pop("kth_value", None)
    return changed
