"""Which options of a run may change when it is resumed. Each is free, applied, or refused by its name.

Free options change no weights: threads, loggers, places, devices, further callbacks. Applied options (`APPLIED`) are used
from the resumed step on. Every other option belongs to the training as a whole, and a change of it is refused: neither the
config nor the summary may name what was not done.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from litdistill.config.recipes import NO_RECIPE, short_names
from litdistill.utils.command_line import literal, typed
from litdistill.utils.errors import UserError

# What decides the weights of a run; all other keys of a config are free.
COMPARED = (
    *("data", "student", "compress", "teacher", "task", "method", "optimizer", "scheduler", "schedule", "ema", "seed"),
    *("trainer", "scale", "balance", "adversarial", "method_lr"),
)
FREE = {  # options of these that are free: places, speed, and what only reports
    **NO_RECIPE,
    "teacher": ("cache", "allow_chance"),
    "student": ("recipe",),  # the resumed student is past its starting point
    "trainer": (
        *NO_RECIPE["trainer"],
        *("strategy", "sync_batchnorm", "use_distributed_sampler", "deterministic", "benchmark", "detect_anomaly"),
        *("num_sanity_val_steps", "profiler", "logger", "enable_checkpointing", "default_root_dir", "_target_"),
    ),
}
# Used from the resumed step on. Learning rate and schedule are then those of a run that has them from its first step.
APPLIED = (
    *(
        "optimizer.",
        "scheduler.",
        "scale.",
        "trainer.max_epochs",
        "min_steps",
        "trainer.max_steps",
        "trainer.min_epochs",
    ),
    *("trainer.min_steps", "trainer.max_time", "trainer.gradient_clip_val", "trainer.gradient_clip_algorithm"),
    "trainer.check_val_every_n_epoch",
)
# Not applied although they begin so: they change what the saved state means.
BOUND = ("optimizer._target_", "scheduler._target_", "scheduler.interval", "scheduler.monitor")
SWITCHES = ("optimizer.nesterov", "optimizer.maximize")  # the flags of optimizers that need no state of their own

Options = dict[str, Any]  # plain values by dotted key; null is absent
Changes = dict[str, list[Any]]  # key -> [value in the checkpoint, value now]


def flat(node: Mapping[str, Any], prefix: str = "") -> Options:
    """Returns the values that are neither dicts nor null, by their dotted keys."""
    found: Options = {}
    for key, value in node.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        elif value is not None:
            found[f"{prefix}{key}"] = value
    return found


def compared_options(cfg: DictConfig) -> Options:
    """Returns the options of a config that a resumed run is held against.

    A path of a checkpoint is represented by the word `given`, since folders move: the teacher is compared by its weights,
    and the student's come from the run's own checkpoint.
    """
    kept: dict[str, Any] = {}
    for key in COMPARED:
        value = cfg.get(key)
        if OmegaConf.is_config(value):
            value = OmegaConf.to_container(value, resolve=True)
        if isinstance(value, dict):
            value = {k: v for k, v in value.items() if k not in FREE.get(key, ())}
        kept[key] = short_names(value)
    if kept["teacher"] and kept["teacher"].get("outputs") is not None:  # a file, known by its digest, and no network
        kept["teacher"] = {"outputs": "given"}
    for role in ("student", "teacher"):
        if kept[role] and kept[role].get("checkpoint") not in (None, "auto", "teacher"):
            kept[role] |= {"checkpoint": "given", "recipe": None}
    if not (kept["scale"] or {}).get("reference_batch"):
        kept["scale"] = None  # without a reference batch the rule changes nothing
    return flat(kept)


def differences(then: Options, now: Options) -> Changes:
    """Returns the options that differ between a checkpoint and a config."""
    return {k: [then.get(k), now.get(k)] for k in sorted({*then, *now}) if then.get(k) != now.get(k)}


def is_applied(key: str, then: Any, now: Any) -> bool:
    """Returns whether a changed option is used from the resumed step on; otherwise it is refused."""
    if not key.startswith(APPLIED) or key in BOUND:
        return False
    if isinstance(then, bool) or isinstance(now, bool):
        return key in SWITCHES or not key.startswith("optimizer.")
    if key == "optimizer.momentum":  # some optimizers keep a momentum only if they start with one
        return bool(then) == bool(now)
    return True


def check_changes(changes: Changes, folder: Path) -> None:
    """Raises `UserError` for changed options that are not applied: by their keys, with the values and the remedies."""
    refused = {key: pair for key, pair in changes.items() if not is_applied(key, *pair)}
    if not refused:
        return
    named = "; ".join(f"{key} was {then}, and is {now}" for key, (then, now) in list(refused.items())[:5])
    more = f"; and {len(refused) - 5} more" if len(refused) > 5 else ""
    back = shlex.join(f"{key}={literal(then)}" for key, (then, _) in list(refused.items())[:3])
    raise UserError(
        f"{folder} cannot go on with other options than it began with: {named}{more}. To go on, leave them as they were "
        f"({back}). To change them, start a new run from these weights: {new_run(folder)}, without resume=."
    )


def check_finished(changes: Changes, folder: Path) -> None:
    """Raises `UserError` where a finished run is resumed with other options, none of which would be used."""
    if changes:
        named = "; ".join(f"{key} was {then}, and is {now}" for key, (then, now) in list(changes.items())[:5])
        raise UserError(
            f"{folder} is finished, and other options would change nothing in it: {named}. Start a new run from its "
            f"weights: {new_run(folder)}, without resume=."
        )


def new_run(folder: Path) -> str:
    """Returns the option with which a new run starts from the weights of the run in `folder`, as it is typed in a shell."""
    found = folder / "checkpoints" / "last.ckpt"
    for path in (folder / "checkpoints" / "best.ckpt", folder / "student.safetensors"):
        if path.is_file():
            found = folder if path.parent == folder else path
    return typed("student.checkpoint", found)


def as_started(cfg: DictConfig, history: Any) -> DictConfig:
    """Returns a config as it was at the first start of a run that was resumed with other options.

    The recipes of its teacher and its starting point follow from that config. `history`: the list of changes as a checkpoint
    or a summary holds it, each with `options` (`Changes`); entries of another form are ignored.
    """
    started = cfg
    for entry in reversed(history if isinstance(history, list) else []):
        options = entry.get("options") if isinstance(entry, dict) else None
        for key, pair in (options if isinstance(options, dict) else {}).items():
            if isinstance(pair, list) and len(pair) == 2 and is_applied(str(key), *pair) and _plain(pair[0]):
                started = started.copy() if started is cfg else started
                OmegaConf.update(started, str(key), pair[0], force_add=True)
    return started


def _plain(value: Any) -> bool:
    """Returns whether a value of a file is a number, a word, null, or a list of them, without an interpolation."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return all(_plain(v) for v in value)
    return value is None or isinstance(value, (bool, int, float)) or (isinstance(value, str) and "${" not in value)
