"""What a student's step costs in packs of different sizes: process CPU time on one thread, medians of interleaved rounds.

OMP_NUM_THREADS=1 python scripts/benchmark_pack.py                 1, 2, 4, 8 and 16 students, teacher cached and live
OMP_NUM_THREADS=1 python scripts/benchmark_pack.py --sizes 1 8 --rounds 3 --json pack.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import benchmark_parts as parts
import torch
from hydra import compose, initialize_config_dir
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig

from litdistill.pack import Pack
from litdistill.runtime import CONF, quieten
from litdistill.train import train

WARM_UP, MEASURED = 2, 5  # windows of 16 minibatches of 64
SMALL_PAIR = [  # conv4 of 32, 64 and 128 channels teaches one of 8, 16 and 32 on 28x28 images
    *("data=mnist", "data.batch_size=64", f"+data.epoch_size={64 * 16 * (WARM_UP + MEASURED + 2)}"),
    *("student.widths=[8,16,32]", "teacher.checkpoint=null", "teacher.allow_chance=true"),
    *("trainer=cpu", "trainer.log_every_n_steps=1000000", "logger=none", "trainer.max_epochs=100"),
]
TEACHERS = {"small": ["teacher.widths=[32,64,128]"], "resnet50": ["net@teacher=resnet50", "teacher.stem=standard"]}


class Enough(Exception):
    """Ends a run once it is measured."""


class Watch(Callback):
    """Notes the process's CPU time where the windows to be measured begin and end."""

    def __init__(self) -> None:
        self.windows, self.times = 0, list[float]()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch.sizes is None:
            return
        if self.windows in (WARM_UP, WARM_UP + MEASURED):
            self.times.append(time.process_time())
        if self.windows == WARM_UP + MEASURED:
            raise Enough
        self.windows += 1


def milliseconds(size: int, cfg: DictConfig) -> float:
    """Of CPU time a student and step, in a pack of `size` students with different temperatures."""
    watches = [Watch() for _ in range(size)]
    with tempfile.TemporaryDirectory() as folder:
        left = list(enumerate(watches))

        def job(train: Any) -> bool:
            i, watch = left.pop(0)
            own = cfg.copy()
            own.folder, own.method.temperature = str(Path(folder, str(i))), 1 + i / 2
            with contextlib.suppress(Enough):
                train(own, [watch])
            return True

        torch.manual_seed(0)  # the same teacher each time
        if size == 1:
            job(train)
        else:
            pack = Pack(size)
            pack.run(partial(job, pack.train))
    begin, end = watches[0].times  # the first one's: between them every one has trained on every window
    return 1000 * (end - begin) / (size * MEASURED * 16)


def pack_ratios(sizes: Sequence[int] = (1, 2, 4, 8, 16), rounds: int = 5) -> dict[str, dict[str, dict[str, float]]]:
    """For a cached and a live teacher and each size: `ms` a student and step, and `ratio`, how many times less that is than
    in a run alone, with quartiles `low` and `high`; medians over rounds, the order of the sizes reversed in every other."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for teacher, mode in (("cached", "disk"), ("live", "off")):
        times = {size: list[float]() for size in (1, *sizes)}
        with tempfile.TemporaryDirectory() as runs, initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose(
                "train", [*SMALL_PAIR, *TEACHERS["small"], f"teacher.cache.mode={mode}", f"runs={runs}", "folder=null"]
            )
            milliseconds(1, cfg)  # fills the cache
            for i in range(rounds):
                for size in sorted(times, reverse=bool(i % 2)):
                    times[size].append(milliseconds(size, cfg))
        found[teacher] = {}
        for size in sizes:
            ratios = [alone / packed for alone, packed in zip(times[1], times[size], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if rounds > 1 else ratios * 3
            found[teacher][str(size)] = {
                "ms": statistics.median(times[size]),
                "ratio": middle,
                "low": low,
                "high": high,
            }
    return found


def sixteen_trials(rounds: int = 5) -> dict[str, list[float]]:
    """How many times longer sixteen runs of the loop of other projects take than a pack of sixteen students whose teacher's
    outputs are kept, a step: quartiles over rounds, by the pair's name. Images are not augmented."""
    found = {}
    for name, teacher in TEACHERS.items():
        loop = parts.peers(parts.Bench(parts.PAIRS[name]._replace(shift=0), torch.device("cpu")))
        with tempfile.TemporaryDirectory() as runs, initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("train", [*SMALL_PAIR, *teacher, f"runs={runs}", "folder=null"])
            milliseconds(1, cfg), loop()  # fills the cache; warms up
            ratios = [1000 * loop() / milliseconds(16, cfg) for _ in range(rounds)]
        found[name] = statistics.quantiles(ratios, n=4, method="inclusive") if rounds > 1 else ratios * 3
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.chdir(CONF.parent)
    quieten()
    torch.set_num_threads(1)
    found = pack_ratios(options.sizes, options.rounds)
    print("| teacher | students | ms a student and step | times less than alone |\n|---|---|---|---|")
    for teacher, rows in found.items():
        for size, row in rows.items():
            print(f"| {teacher} | {size} | {row['ms']:.2f} | {row['ratio']:.2f} ({row['low']:.2f}–{row['high']:.2f}) |")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
