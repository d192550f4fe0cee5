"""Compares all techniques on the same data, budget and seeds: trains ordinary runs in parallel, and writes one page."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from litdistill.config.recipes import recipe_hash, starting_point_dir
from litdistill.report import points
from litdistill.report.build import build
from litdistill.report.collect import Group, settings_of
from litdistill.report.headline import chosen
from litdistill.report.sections import looks, scores
from litdistill.training.train import train
from litdistill.utils.command_line import literal
from litdistill.utils.errors import UserError
from litdistill.utils.files import write_text
from litdistill.utils.logging import filter_warnings, format_seconds, logged_to
from litdistill.utils.paths import CONF
from litdistill.utils.units import axis, quantity, shown

log = logging.getLogger(__name__)
DETECTION = "compare/detection"
FINE_TUNED = "fine_tuned"  # the technique of detectors that starts from a finished classification run
# Data with boxes whose objects are images of other data, with classes: the recipe of a run on these.
BACKBONES = {"digit_scenes": "compare/detection/_backbone"}


class Job(NamedTuple):
    """One run: the technique's name, its variant, its seed and its overrides."""

    technique: str
    variant: str
    seed: int
    overrides: tuple[str, ...]
    runs: str


def compare(cfg: DictConfig) -> list[Group]:
    """Trains the runs of `conf/compare.yaml` and writes the page; returns the measured groups."""
    started = time.perf_counter()
    cfg = with_backbone(cfg)
    todo = jobs(cfg)
    if (left := left_out(cfg)) is not None:
        print(left, flush=True)
    print(f"Training {quantity(len(todo), 'run')}, {min(cfg.jobs, len(todo))} at a time, in {cfg.runs}", flush=True)
    folders = run_all(todo, cfg.jobs)
    print(f"Trained in {format_seconds(time.perf_counter() - started)}; measuring", flush=True)
    settings = settings_of(cfg, int8=place_of(cfg) == DETECTION)
    torch.set_num_threads(cfg.threads)
    groups = build(folders, cfg.out, f"Techniques compared on {cfg.dataset}", settings)
    if cfg.picture is not None:
        draw(groups[0], Path(cfg.picture))
        print(f"Drawn to {cfg.picture}")
    for problem in (p for g in groups for p in g.problems):
        print(problem)
    taken = format_seconds(time.perf_counter() - started)
    print(f"{quantity(len(folders), 'run')} in {taken}. Written to {Path(cfg.out, 'index.html')} and report.md")
    return groups


def place_of(cfg: DictConfig) -> str:
    """Returns the folder of conf/experiment that holds the techniques: that of detectors where the data are of their task's
    folder, else that of classifiers. Raises `UserError` for data of a task that has none."""
    file = CONF / "data" / f"{cfg.dataset}.yaml"
    target = OmegaConf.select(OmegaConf.load(file), "_target_") if file.is_file() else None
    room, _, rest = str(target or "").removeprefix("litdistill.").partition(".")
    task = rest.partition(".")[0]
    if room == "tasks" and not (CONF / "experiment" / "compare" / task).is_dir():
        raise UserError(
            f"dataset={cfg.dataset}: no techniques are compared for {task}; there are those of images and boxes."
        )
    return f"compare/{task}" if room == "tasks" else "compare"


def with_backbone(cfg: DictConfig) -> DictConfig:
    """Returns the config with the folder of the run that `fine_tuned` starts from in place of `backbone: auto`, trained once;
    null where there is none for these data, and where the technique is not asked for."""
    if cfg.backbone != "auto":
        return cfg
    wanted = any(job.technique == FINE_TUNED for job in jobs(cfg))
    cfg = cfg.copy()
    cfg.backbone = None
    if wanted and cfg.dataset in BACKBONES:
        print(f"Training the network that {FINE_TUNED} starts from, in {cfg.runs}", flush=True)
        overrides = (f"experiment={BACKBONES[cfg.dataset]}", "seed=0", f"runs={literal(str(cfg.runs))}")
        cfg.backbone = str(run_all([Job("backbone", "", 0, overrides, str(cfg.runs))], 1)[0])
    return cfg


def left_out(cfg: DictConfig) -> str | None:
    """Returns in a line which technique of detectors is left out for want of a backbone; None without one."""
    if place_of(cfg) != DETECTION or cfg.backbone is not None or cfg.techniques is not None:
        return None
    return f"{FINE_TUNED} is left out: name a finished classification run of images as these by backbone=<its folder>."


def jobs(cfg: DictConfig) -> list[Job]:
    """Returns one job for each technique and seed; seeds vary fastest."""
    place = place_of(cfg)
    known = sorted(p.stem for p in (CONF / "experiment" / place).glob("*.yaml") if not p.stem.startswith("_"))
    chosen = [n for n in known if n != FINE_TUNED or cfg.backbone] if cfg.techniques is None else list(cfg.techniques)
    if unknown := [name for name in chosen if name not in known]:
        raise UserError(f"No such technique: {', '.join(unknown)}. There are {', '.join(known)}.")
    if FINE_TUNED in chosen and cfg.backbone is None:
        raise UserError(f"{FINE_TUNED} needs backbone=<folder of a finished classification run>.")
    if cfg.seeds < 1 or cfg.jobs < 1:
        raise UserError("seeds and jobs must be at least 1.")
    found = []
    for name in chosen:
        for widths in list(cfg.family) if name == "family" else [""]:
            for seed in range(cfg.seeds):
                overrides = [f"experiment={place}/{name}", f"data={cfg.dataset}", f"seed={seed}"]
                overrides += [f"runs={literal(str(cfg.runs))}"]
                overrides += [f"student.widths={widths}"] if widths else []
                overrides += [f"student.backbone={literal(str(cfg.backbone))}"] if name == FINE_TUNED else []
                variant = "x".join(str(widths).strip("[]").split(","))
                found.append(Job(name, variant, seed, (*overrides, *cfg.overrides), str(cfg.runs)))
    return found


def run_all(todo: list[Job], at_once: int, split: str = "test") -> list[Path]:
    """Returns the folders of the finished runs, in the order of the jobs. The error of a failed run ends them all.

    `split`: of which a line on the console says what a run reached, "test" or "val".
    """
    started, done = time.perf_counter(), {}
    for job, folder in _results(todo, at_once):
        done[job] = folder
        summary = json.loads((folder / "summary.json").read_text())
        metric = summary["metric"]["name"]
        value = summary["val"]["best"] if split == "val" else summary["student"]["test"][metric]["best"]
        left = (time.perf_counter() - started) / len(done) * (len(todo) - len(done))
        name = f"{job.technique} {job.variant}".rstrip()
        print(
            f"{len(done):3d}/{len(todo)}  {name}, seed {job.seed}: {shown(metric, value)}   {format_seconds(left)} left",
            flush=True,
        )
    return [done[job] for job in todo]


def _results(todo: list[Job], at_once: int) -> Iterator[tuple[Job, Path]]:
    if at_once == 1:
        for job in todo:
            yield job, run(job)
        return
    context = multiprocessing.get_context("spawn")  # the fork of a process with threads may deadlock
    with ProcessPoolExecutor(min(at_once, len(todo)), context, initializer=_quietly) as pool:
        waiting = {pool.submit(run, job): job for job in todo}
        try:
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _quietly() -> None:
    filter_warnings()
    logging.getLogger().setLevel(logging.INFO)  # each run logs to its own file
    os.environ.setdefault("RUN_STAMP", "compare")
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()


def end_with(parent: int, pause: float = 15) -> None:
    """Sends SIGTERM to this process when its parent has died: the first one saves the run, a second one ends it."""
    while True:
        time.sleep(pause)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)


def config_of(job: Job) -> DictConfig:
    """Returns the config of a run, with its folder.

    The hash of its recipe is in the folder's name, so a run with another config is trained anew.
    """
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [*job.overrides, "folder=''"])
    name = f"{job.technique}-{job.variant}".rstrip("-")
    cfg.folder = str(Path(job.runs) / "compare" / name / f"{job.seed}-{recipe_hash(cfg)}")
    return cfg


def run(job: Job) -> Path:
    """Trains one run unless it is finished, and returns its folder."""
    cfg = config_of(job)
    folder = Path(cfg.folder)
    write_text(folder / ".hydra" / "config.yaml", OmegaConf.to_yaml(cfg))
    write_text(folder / ".hydra" / "overrides.yaml", OmegaConf.to_yaml(OmegaConf.create(list(job.overrides))))
    with logged_to(folder / "train.log"):
        train(cfg)
    if cfg.student.checkpoint is None:  # techniques with the same recipe start from this run
        start = starting_point_dir(cfg)
        start.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            start.symlink_to(os.path.relpath(folder, start.parent))
    return folder


def draw(group: Group, path: Path) -> None:
    """Writes the main figure of the page as a PNG."""
    timed = [(look, row) for look, row in zip(looks(group), group.rows, strict=True) if "cpu" in row.timing]
    styles, rows = [look for look, _ in timed], [row for _, row in timed]
    row, values = chosen(group), [scores(row) for row in rows]
    index = rows.index(row) if row in rows else None
    costs = [
        ("file (kB)", [row.timing["bytes"] / 1e3 for row in rows]),
        (f"latency, p50 of one {group.things[:-1]} (ms)", [row.timing["cpu"][1]["p50_ms"] for row in rows]),
    ]
    planes = [(label, points.Plane(styles, cost, values, group.less_is_better, index)) for label, cost in costs]
    points.main_picture(planes, f"test {axis(group.metric)}", path)
