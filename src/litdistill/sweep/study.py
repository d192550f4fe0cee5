"""Hyperparameter search: an Optuna study whose trials are ordinary runs, composed by Hydra.

Several processes may work on one sweep's folder. A trial belongs to the process that holds its lock, which the operating
system releases when that process dies: a process that finds a running trial without a lock resumes it from its last
checkpoint. So a sweep that was killed and resumed has the same trials as one without interruption, and repeats none.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from litdistill.config.instantiate import instantiate
from litdistill.config.origin import is_foreign, remember, replayable
from litdistill.config.recipes import recipe_hash
from litdistill.tasks import Task
from litdistill.training.monitors import monitored
from litdistill.training.pack import Member
from litdistill.utils.command_line import command_argv, config_dir_flags, literal
from litdistill.utils.distributed import launched
from litdistill.utils.errors import Stopped, UserError
from litdistill.utils.logging import format_seconds
from litdistill.utils.run_names import varying

try:
    import optuna
except ImportError as error:
    raise UserError("A sweep needs Optuna: pip install 'litdistill[sweep]'") from error

from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.storages import BaseStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import TrialState

from litdistill.sweep.packed import pack_size, run_all
from litdistill.sweep.report import best_trial, number, write_report
from litdistill.sweep.space import first, fitting, grid, pinned, plain, read_space
from litdistill.sweep.trial import OBJECTIVES, Plan, overrides_of, run_trial

log = logging.getLogger(__name__)


def sweep(cfg: DictConfig, overrides: Sequence[str], folder: Path) -> optuna.Study:
    """Runs the remaining trials, and writes `sweep.md` and `best.yaml`.

    `cfg`: `conf/sweep.yaml`, composed. `overrides`: those of its composition; all but the sweep's own are passed to every
    trial. `folder`: the output folder; a sweep that exists there is resumed.
    """
    if (launch := launched()) is not None and launch.nodes * launch.tasks > 1:
        raise UserError("A sweep is started as one process. Each trial starts its own ranks: trainer=ddp.")
    remember(folder, cfg)
    plan = make_plan(cfg, overrides, folder)
    log.info("Sweep of %d trials over %s in %s", plan.count, ", ".join(plan.space), folder)
    try:
        with helpers(cfg.sweep.workers - 1, overrides, folder) as others, varying(plan.varied):
            work(plan)
            for other in others:
                other.wait()
            work(plan)  # resumes trials of workers that died
    finally:
        write_report(plan.study, plan.folder, plan.overrides, plan.names, plan.seeds)
    trials = plan.study.get_trials(deepcopy=False)
    if trials and all(t.state == TrialState.FAIL for t in trials):
        raise UserError(f"None of {len(trials)} trials succeeded. The first: {trials[0].user_attrs.get('reason')}")
    return plan.study


def work(plan: Plan) -> None:
    """Runs trials until none is left to claim."""
    while run_next(plan):
        pass


def run_next(plan: Plan) -> bool:
    """Claims a trial, or as many as are packed, and runs them; returns False where none is left."""
    claimed: list[tuple[optuna.Trial, FileLock]] = []
    try:
        while len(claimed) < plan.pack and (one := claim(plan)) is not None:
            claimed.append(one)
        run_all(plan, [trial for trial, _ in claimed], functools.partial(attempt, plan))
    finally:
        for _, lock in claimed:
            lock.release()
    return bool(claimed)


@contextlib.contextmanager
def helpers(count: int, overrides: Sequence[str], folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Starts `count` more worker processes for the sweep in `folder`; all share the CPU threads, and end with this process."""
    if count == 0:
        yield []
        return
    threads = max(1, torch.get_num_threads() // (count + 1))
    torch.set_num_threads(threads)
    # The folder has the config already
    own = ["sweep.workers=1", f"hydra.run.dir={literal(str(folder))}", "hydra.output_subdir=null"]
    command = [sys.executable, *command_argv("sweep"), *config_dir_flags(), *overrides, *own]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    others = [subprocess.Popen(command, env=environment) for _ in range(count)]
    try:
        yield others
    finally:
        for other in others:
            other.terminate()
        for status in filter(None, [other.wait() for other in others]):
            log.warning("A worker of this sweep has ended with status %d; what it was at is done again.", status)


def make_plan(cfg: DictConfig, overrides: Sequence[str], folder: Path) -> Plan:
    """Validates the options and opens the study. Raises `UserError` for an invalid option."""
    options = cfg.sweep
    check_options(options)
    if wrong := [o for o in options.objectives if o not in OBJECTIVES]:
        raise UserError(
            f"sweep.objectives={wrong}: a trial is judged by {', '.join(OBJECTIVES)}. The test set is no objective: "
            "what was chosen by it cannot be measured on it any more."
        )
    if options.sampler not in ("tpe", "random", "grid"):
        raise UserError(f"sweep.sampler={options.sampler}: choose tpe, random or grid.")
    common = training_overrides(overrides)
    base = compose("train", common)
    fitted, left = fitting(plain(options.space) or {}, base, typed_keys(overrides))
    if left:
        log.info("Left out of the space, since this run has no such key: %s", ", ".join(left))
    space = read_space(fitted)
    if not space:
        raise UserError("sweep.space is empty: give at least one key a list or a range.")
    count = options.trials
    if options.sampler == "grid":
        count = min(len(grid(space)), math.inf if count is None else count)
    if count is None:
        raise UserError(f"sweep.trials=null goes with sweep=grid. For {options.sampler} say how many: sweep.trials=20.")
    if is_foreign():
        check_foreign_sweep(options, space, folder)
    common += pinned(base, space)
    try:
        compose("train", [*common, *(f"{key}={first(d)}" for key, d in space.items())])
    except HydraException as error:
        raise UserError(
            f"sweep.space: {str(error).splitlines()[0]} Leave a key out with sweep.space.KEY=null."
        ) from error
    monitor, mode = monitored(base.callbacks.best, bare_task(base.task))
    up = {"val"} if mode == "max" else set()
    directions = [StudyDirection.MAXIMIZE if o in up else StudyDirection.MINIMIZE for o in options.objectives]
    folder.mkdir(parents=True, exist_ok=True)
    study, storage = open_study(options, folder, directions)
    question = json.dumps(
        {
            "space": options.space,
            "objectives": options.objectives,
            "seeds": options.seeds,
            "monitored metric": monitor,
            "training options common to all trials": recipe_hash(base),  # paths and devices excluded
        },
        default=plain,
    )
    # The study of an earlier version lacks some of these keys.
    current, before = json.loads(question), json.loads(study.user_attrs.get("question", "{}"))
    if other := [key for key in current if key in before and before[key] != current[key]]:
        raise UserError(f"The sweep in {folder} has another {', another '.join(other)}. Start a new one.")
    study.set_user_attr("question", question)
    return Plan(options, folder, common, space, study, storage, count, monitor, pack_size(options, base))


def bare_task(node: DictConfig) -> Task:
    """Returns the config's task without statistics of its data; it serves to read the monitored metric."""
    task: Task = instantiate({k: v for k, v in node.items() if v is not None})
    return task


LEAST = {"trials": 1, "seed": 0, "workers": 1, "pack": 1, "attempts": 1, "prune.startup": 0, "prune.warmup": 0}


def check_options(options: DictConfig) -> None:
    """Raises `UserError` for a sweep's option that is not an integer of at least its minimum, or not the required list."""
    for key, least in LEAST.items():
        value = OmegaConf.select(options, key)
        if value is None and (key == "trials" or (key.startswith("prune.") and options.prune is None)):
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"sweep.{key}={value} must be a whole number, and at least {least}.")
    seeds = plain(options.seeds)
    if seeds is not None and not (isinstance(seeds, list) and seeds and all(type(s) is int for s in seeds)):
        raise UserError(f"sweep.seeds={seeds} must be a list of whole numbers, sweep.seeds=[0,1,2], or null.")
    if not (OmegaConf.is_list(options.objectives) and options.objectives):
        raise UserError(
            f"sweep.objectives={options.objectives} must be a list of one or more of {', '.join(OBJECTIVES)}: "
            "sweep.objectives=[val]."
        )


def check_foreign_sweep(options: DictConfig, space: Mapping[str, BaseDistribution], folder: Path) -> None:
    """Raises `UserError` for a sweep made elsewhere that would set other keys than a run's own, or open another database."""
    if options.storage not in ("sqlite", "journal"):
        raise UserError(
            f"sweep.storage={options.storage} is refused: {folder} was not made here. Use sqlite or journal."
        )
    for key, distribution in space.items():
        choices = distribution.choices if isinstance(distribution, CategoricalDistribution) else ("0",)
        overrides = [f"{key}={choice}" for choice in choices]
        if "_target_" in key or replayable(overrides, folder) != overrides:
            raise UserError(f"sweep.space.{key} is refused: {folder} was not made here, and may not search that.")


def typed_keys(overrides: Sequence[str]) -> set[str]:
    """Returns the keys of the space that overrides set: `method.temperature` of `sweep.space.method.temperature.low=2`."""
    keys = {o.lstrip("+~").partition("=")[0].removeprefix("sweep.space.") for o in overrides if "sweep.space." in o}
    return keys | {key.rpartition(".")[0] for key in keys}


def training_overrides(overrides: Sequence[str]) -> list[str]:
    """Returns the overrides of a sweep that apply to its runs."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    own = ("sweep", "hydra", "resume", "folder")
    return [str(o.input_line) for o in parsed if o.key_or_group.split(".")[0].split("/")[0] not in own]


# -- the study -------------------------------------------------------------------------------------------------------


def open_study(
    options: DictConfig, folder: Path, directions: Sequence[StudyDirection]
) -> tuple[optuna.Study, BaseStorage]:
    """Returns the folder's study, new or resumed, and its storage."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    place = str(options.storage)
    pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
    if options.prune is not None:
        pruner = optuna.pruners.MedianPruner(options.prune.startup, options.prune.warmup)
    name = f"{folder.parent.name}/{folder.name}" if "://" in place else "sweep"  # a database may hold several studies
    with FileLock(folder / ".sweep.lock"):  # only one process creates the tables
        storage = open_storage(place, folder)
        study = optuna.create_study(
            storage=storage, study_name=name, directions=list(directions), load_if_exists=True, pruner=pruner
        )
    return study, storage


def open_storage(place: str, folder: Path) -> BaseStorage:
    """Opens `place`: sqlite or journal, a file in `folder`, or a database's URL. Raises `UserError` where it cannot."""
    try:
        if place == "journal":
            return optuna.storages.JournalStorage(JournalFileBackend(str(folder / "study.log")))
        if place == "sqlite":  # several processes wait for each other's writes
            url = f"sqlite:///{folder / 'study.db'}"
            return optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})
        return optuna.storages.RDBStorage(place)
    except Exception as error:  # each database raises its own errors, whose text may contain the URL's password
        raise UserError(
            f"sweep.storage cannot be opened ({type(error).__name__}). It is sqlite, journal, or the URL of a database "
            "that runs and whose driver is installed."
        ) from error


def sampler(options: DictConfig, number: int) -> optuna.samplers.BaseSampler:
    """Returns a sampler for one trial: it depends on the seed, the number and earlier trials, not on interruptions."""
    seed = int(np.random.SeedSequence([options.seed, number]).generate_state(1)[0])
    if options.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    return optuna.samplers.RandomSampler(seed=seed)


def claim(plan: Plan) -> tuple[optuna.Trial, FileLock] | None:
    """Returns a trial and its acquired lock: first a trial whose process died, then a new one; None if none is left."""
    study = plan.study
    with FileLock(plan.folder / ".sweep.lock"):
        trials = study.get_trials(deepcopy=False)
        for old in trials:
            if old.state == TrialState.RUNNING and (lock := _lock(plan, old.number)):
                study.sampler = sampler(plan.options, old.number)
                log.info("Going on with trial %d", old.number)
                place = plan.storage.get_study_id_from_name(study.study_name)
                trial_id = plan.storage.get_trial_id_from_study_id_trial_number(place, old.number)
                return optuna.Trial(study, trial_id), lock
        waiting = [t.number for t in trials if t.state == TrialState.WAITING]
        if not waiting:
            if len(trials) >= plan.count:
                return None
            if plan.options.sampler == "grid":
                study.enqueue_trial(grid(plan.space)[len(trials)])
        study.sampler = sampler(plan.options, min(waiting, default=len(trials)))
        trial = study.ask()
        lock = _lock(plan, trial.number)
        assert lock is not None  # the trial is new, and the sweep's lock is held
        overrides_of(plan, trial)  # drawn by this trial's sampler: the next of a pack has another
        return trial, lock


def _lock(plan: Plan, number: int) -> FileLock | None:
    lock = FileLock(plan.folder / f".{number}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return lock


# -- a trial ---------------------------------------------------------------------------------------------------------


def attempt(plan: Plan, trial: optuna.Trial, member: Member | None = None) -> bool:
    """Runs a trial and reports its state to the study; an error in it fails this trial only.

    `member`: of a pack of trials; None: alone. Returns False for one that found no memory beside the others of its pack: it is
    to be run alone.
    """
    study, starts = plan.study, trial.user_attrs.get("starts", 0) + 1
    if starts > plan.options.attempts:
        trial.set_user_attr("reason", f"its process died {starts - 1} times")
        study.tell(trial, state=TrialState.FAIL)
        return True
    trial.set_user_attr("starts", starts)
    try:
        values = run_trial(plan, trial, member)
    except optuna.TrialPruned as end:
        trial.set_user_attr("reason", str(end))
        study.tell(trial, state=TrialState.PRUNED)
        log.info("Trial %d  pruned: %s%s", trial.number, end, standing(plan))
    except Stopped:
        trial.set_user_attr("starts", starts - 1)  # the sweep was stopped: this start does not count
        raise
    except Exception as error:
        if member is not None and isinstance(error, torch.OutOfMemoryError):
            trial.set_user_attr("starts", starts - 1)
            return False
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        trial.set_user_attr("reason", reason)
        study.tell(trial, state=TrialState.FAIL)
        log.error("Trial %d failed: %s", trial.number, reason, exc_info=not isinstance(error, UserError))
    else:
        study.tell(trial, values)
        shown = "  ".join(f"{name} {value:.6g}" for name, value in zip(plan.names, values, strict=True))
        params = " ".join(f"{key}={number(value)}" for key, value in trial.params.items())
        log.info("Trial %d  %s  %s%s", trial.number, params, shown, standing(plan))
    return True


def standing(plan: Plan) -> str:
    """Returns the best value so far, and the time left as the trials so far tell, as the end of a trial's line."""
    trials = plan.study.get_trials(deepcopy=False)
    best, text = best_trial(plan.study), ""
    if best is not None:
        text += f"  best {best.values[0]:.6g} (trial {best.number})"
    durations = [t.duration.total_seconds() for t in trials if t.state.is_finished() and t.duration is not None]
    left = plan.count - sum(t.state.is_finished() for t in trials)
    if durations and left > 0:
        text += f"  {format_seconds(sum(durations) / len(durations) * left / plan.options.workers)} left"
    return text
